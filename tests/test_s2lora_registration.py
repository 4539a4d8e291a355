"""PEFT knows S2-LoRA after `import peft_s2lora`, in this process and in fresh ones.

If a test here fails after an upgrade of PEFT: the tables that `peft_s2lora/_register.py` writes to have moved. Look at
`peft/utils/peft_types.py` (the enum and `register_peft_method`) and at the four mappings in `peft/mapping.py`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fresh_process import run_python
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tuner_behaviours import CASES, output

import peft_s2lora
from peft_s2lora import S2LoraConfig, S2LoraModel
from peft_s2lora._register import add_peft_type, register


def test_the_new_member_behaves_like_peft_types_own():
    member = PeftType.S2LORA
    assert member == "S2LORA"
    assert PeftType("S2LORA") is PeftType["S2LORA"] is member
    assert member in list(PeftType)
    assert "S2LORA" in PeftType.__members__
    assert (member.name, member.value, str(member)) == ("S2LORA", "S2LORA", "PeftType.S2LORA")
    assert hash(member) == hash("S2LORA")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert len(set(PeftType)) == len(PeftType.__members__)


def test_the_tables_know_configuration_model_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["S2LORA"] is S2LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["S2LORA"] is S2LoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["S2LORA"] == S2LoraModel.prefix == "s2lora_"


def test_registering_twice_changes_nothing():
    before = list(PeftType)
    assert register(S2LoraConfig, S2LoraModel) is PeftType.S2LORA
    assert add_peft_type() is PeftType.S2LORA
    assert list(PeftType) == before


def test_another_package_that_registered_the_name_first_is_not_replaced():
    class Foreign:
        pass

    with pytest.raises(ImportError, match="already knows a method S2LORA"):
        register(S2LoraConfig, Foreign)
    assert PEFT_TYPE_TO_TUNER_MAPPING["S2LORA"] is S2LoraModel


def test_a_method_of_pefts_own_still_registers_and_works():
    from peft import LoraConfig

    case = CASES["mlp"]
    model = get_peft_model(case.base(), LoraConfig(target_modules=["lin0"]))
    assert torch.equal(output(model, case.inputs), output(case.base(), case.inputs))


def test_every_public_name_exists():
    assert all(hasattr(peft_s2lora, name) for name in peft_s2lora.__all__)


def test_a_fresh_process_loads_a_saved_adapter_with_equal_logits(tmp_path):
    case = CASES["whisper"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, init_weights=False))
    model.save_pretrained(tmp_path)
    case.base().save_pretrained(tmp_path / "base")
    torch.save(output(model, case.inputs), tmp_path / "expected.pt")
    result = run_python(
        """
import torch
from tuner_behaviours import CASES, output
from peft import AutoPeftModel, PeftConfig, PeftModel
try:
    PeftModel.from_pretrained(CASES["whisper"].base(), ".")
except KeyError as error:
    assert str(error) == "'S2LORA'", error
else:
    raise AssertionError("loaded without import peft_s2lora")
import peft_s2lora
case, expected = CASES["whisper"], torch.load("expected.pt")
model = PeftModel.from_pretrained(case.base(), ".")
assert torch.equal(output(model, case.inputs), expected)
assert isinstance(PeftConfig.from_pretrained("."), peft_s2lora.S2LoraConfig)
config = PeftConfig.from_pretrained(".")
config.base_model_name_or_path = "base"
config.save_pretrained(".", auto_mapping_dict=dict(base_model_class="WhisperForConditionalGeneration", parent_library="transformers"))
assert torch.equal(output(AutoPeftModel.from_pretrained("."), case.inputs), expected)
print("equal")
""",
        tmp_path,
    )
    assert result.stdout.strip().endswith("equal"), result.stderr[-3000:]


def test_a_configuration_survives_saving(tmp_path):
    config = S2LoraConfig(r=5, target_modules=["q_proj", "fc1"], share_scope="module_type", share_groups=[r".*encoder\..*"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, S2LoraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
