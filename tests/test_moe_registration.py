"""PEFT knows LoRA-MoE after `import whisper_moe.moe`; transformers' own doors open to it too.

If a test here fails after an upgrade of PEFT: the tables that `whisper_moe/_register.py` writes to have moved. Look at
`peft/utils/peft_types.py` (the enum and `register_peft_method`) and at the four mappings in `peft/mapping.py`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fresh_process import run_python
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tuner_behaviours import CASES, output

from whisper_moe import LoraMoeConfig, LoraMoeModel
from whisper_moe._register import add_peft_type, register

WHISPER = CASES["whisper"]


def test_the_new_member_behaves_like_peft_types_own():
    member = PeftType.LORAMOE
    assert PeftType("LORAMOE") is PeftType["LORAMOE"] is member
    assert (member.name, member.value, str(member)) == ("LORAMOE", "LORAMOE", "PeftType.LORAMOE")
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert len(set(PeftType)) == len(PeftType.__members__)


def test_the_tables_know_configuration_model_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORAMOE"] is LoraMoeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORAMOE"] is LoraMoeModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["LORAMOE"] == LoraMoeModel.prefix == "loramoe_"


def test_registering_twice_changes_nothing_and_a_foreign_method_is_not_replaced():
    before = list(PeftType)
    assert register(LoraMoeConfig, LoraMoeModel) is add_peft_type() is PeftType.LORAMOE
    assert list(PeftType) == before
    with pytest.raises(ImportError, match="already knows a method LORAMOE"):
        register(LoraMoeConfig, type("Foreign", (), {}))
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORAMOE"] is LoraMoeModel


def test_both_methods_of_this_project_live_side_by_side(tmp_path):
    code = "import peft_s2lora, whisper_moe.moe; from peft import PeftType; print(PeftType.S2LORA.value, PeftType.LORAMOE.value)"
    result = run_python(code, tmp_path)
    assert result.stdout.split() == ["S2LORA", "LORAMOE"], result.stderr


def test_a_configuration_is_saved_and_read_back(tmp_path):
    config = LoraMoeConfig(r=4, expert_names=["cy", "eu"], expert_ranks={"x": 2}, router="token", top_k=1, prior={"cy": 2, "eu": 1})
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, LoraMoeConfig)
    assert (read.names, read.router, read.top_k, read.prior) == (["cy", "eu"], "token", 1, {"cy": 2, "eu": 1})


@pytest.fixture
def saved(tmp_path):
    """A folder with a mixture, and its logits."""
    torch.manual_seed(0)
    expert = get_peft_model(WHISPER.base(), LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    expert.save_pretrained(tmp_path / "cy", save_embedding_layers=False)
    model = get_peft_model(WHISPER.base(), LoraMoeConfig(r=2, experts=[str(tmp_path / "cy")], init_weights=False))
    model.save_pretrained(tmp_path / "mixture", save_embedding_layers=False)
    return tmp_path / "mixture", output(model, WHISPER.inputs)


def test_load_adapter_of_a_transformers_model(saved):
    folder, expected = saved
    model = WHISPER.base()
    model.load_adapter(str(folder))
    assert torch.equal(output(model, WHISPER.inputs), expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "loramoe_" in name)
    model.disable_adapters()
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_a_deleted_mixture_takes_its_hooks_with_it(saved):
    folder, _ = saved
    model = WHISPER.base()
    model.load_adapter(str(folder), "mine")
    assert model._forward_hooks
    model.delete_adapter("mine")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))
