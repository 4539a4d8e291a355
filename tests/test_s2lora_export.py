"""The exported plain LoRA computes the same, in a process that never imports this package."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from fresh_process import run_python
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import nn
from tuner_behaviours import CASES, close, output

from peft_s2lora import S2LoraConfig, S2LoraLayer, to_lora


def adapted(case, **kwargs) -> PeftModel:
    config = S2LoraConfig(**{"r": 5, "s2lora_alpha": 7, "target_modules": case.targets, "init_weights": False, **kwargs})
    return get_peft_model(case.base(), config).eval()


def make_sparse(model: nn.Module) -> nn.Module:
    """Layer number n keeps n modulo 4 directions, so some weights keep none."""
    with torch.no_grad():
        for number, layer in enumerate(module for module in model.modules() if isinstance(module, S2LoraLayer)):
            layer.s2lora_coefficients["default"][number % 4 :] = 0
    return model


@pytest.mark.parametrize("scope", ["shape", "module_type", "global"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_exported_lora_computes_the_same(case, scope, tmp_path):
    model = make_sparse(adapted(case, share_scope=scope))
    expected = output(model, case.inputs)
    assert not close(expected, output(case.base(), case.inputs), atol=1e-3)
    to_lora(model, "default", tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match any targeted module).*")
        lora = PeftModel.from_pretrained(case.base(), tmp_path)
    assert type(lora.peft_config["default"]) is LoraConfig
    assert torch.allclose(output(lora, case.inputs), expected, atol=1e-5)


def test_a_process_without_this_package_loads_the_export_with_equal_logits(tmp_path):
    case = CASES["whisper"]
    model = make_sparse(adapted(case))
    to_lora(model, folder=tmp_path)
    torch.save(output(model, case.inputs), tmp_path / "expected.pt")
    result = run_python(
        """
import sys, torch
from peft import PeftModel
from tuner_behaviours import CASES, output
case = CASES["whisper"]
difference = output(PeftModel.from_pretrained(case.base(), "."), case.inputs) - torch.load("expected.pt")
assert difference.abs().max() < 1e-5, difference.abs().max()
assert not any(name.startswith("peft_s2lora") for name in sys.modules)
print("equal")
""",
        tmp_path,
    )
    assert result.stdout.strip().endswith("equal"), result.stderr[-3000:]


def test_rank_per_weight_is_the_number_of_non_zero_coefficients(tmp_path):
    model = make_sparse(adapted(CASES["mlp"]))  # lin0 keeps none, lin1 one, lin2 two directions
    config, tensors = to_lora(model, folder=tmp_path)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "base_model.model.lin1.lora_A.weight": (1, 20),
        "base_model.model.lin1.lora_B.weight": (20, 1),
        "base_model.model.lin2.lora_A.weight": (2, 20),
        "base_model.model.lin2.lora_B.weight": (20, 2),
    }
    assert sorted(config.target_modules) == ["lin1", "lin2"]
    assert config.r == config.lora_alpha == 2
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {"^lin1": 1}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()


def test_every_scaling_of_the_export_is_one(tmp_path):
    case = CASES["whisper"]
    to_lora(make_sparse(adapted(case)), folder=tmp_path)
    lora = PeftModel.from_pretrained(case.base(), tmp_path)
    assert {module.scaling["default"] for module in lora.modules() if hasattr(module, "lora_A")} == {1.0}


def test_a_uniform_rank_pads_with_zeros_and_needs_no_pattern(tmp_path):
    case = CASES["whisper"]
    model = make_sparse(adapted(case))
    config, tensors = to_lora(model, folder=tmp_path, uniform_rank=True)
    assert config.rank_pattern == config.alpha_pattern == {}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    assert torch.allclose(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs), atol=1e-5)


def test_names_that_end_alike_are_told_apart(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "x_proj": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["x_proj"](torch.relu(self.inner["proj"](torch.relu(self.proj(x)))))

    def base() -> Nested:
        torch.manual_seed(0)
        return Nested()

    x = {"x": torch.randn(3, 4)}
    for dropped in ("proj", "inner.proj"):
        model = get_peft_model(base(), S2LoraConfig(r=3, target_modules="all-linear", init_weights=False))
        with torch.no_grad():
            model.get_base_model().get_submodule(dropped).s2lora_coefficients["default"].zero_()
        config, _ = to_lora(model, folder=tmp_path)
        lora = PeftModel.from_pretrained(base(), tmp_path)
        assert set(lora.targeted_module_names) == {"proj", "inner.proj", "inner.x_proj"} - {dropped}, config.target_modules
        assert torch.allclose(output(lora, x), output(model, x), atol=1e-6)


def test_a_pruned_adapter_exports_the_same(tmp_path):
    case = CASES["whisper"]
    model = make_sparse(adapted(case))
    model.prune()
    to_lora(model, folder=tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs), atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "s2lora_only"])
def test_trained_biases_are_exported(bias, tmp_path):
    case = CASES["mlp"]
    model = make_sparse(adapted(case, bias=bias))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(1)
    expected = output(model, case.inputs)
    model.save_pretrained(tmp_path / "s2lora")
    assert torch.equal(output(PeftModel.from_pretrained(case.base(), tmp_path / "s2lora"), case.inputs), expected)
    to_lora(model, folder=tmp_path / "lora")
    assert torch.allclose(output(PeftModel.from_pretrained(case.base(), tmp_path / "lora"), case.inputs), expected, atol=1e-5)


def test_modules_to_save_are_exported(tmp_path):
    case = CASES["mlp"]
    model = adapted(case, modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    to_lora(model, folder=tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs), atol=1e-5)


def test_a_plainly_injected_adapter_exports_too(tmp_path):
    from peft import inject_adapter_in_model

    case = CASES["whisper"]
    model = inject_adapter_in_model(S2LoraConfig(r=4, init_weights=False), case.base())
    to_lora(model, folder=tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs), atol=1e-5)


def test_exporting_changes_nothing_in_the_model():
    case = CASES["whisper"]
    model = make_sparse(adapted(case))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = model.peft_config["default"].to_dict()
    to_lora(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.peft_config["default"].to_dict() == config


def test_an_adapter_of_zeros_is_refused():
    with pytest.raises(ValueError, match="changes nothing"):
        to_lora(adapted(CASES["mlp"], init_weights=True))


def test_pefts_own_conversion_works_and_needs_the_full_rank():
    case = CASES["mlp"]
    model = adapted(case)
    assert model.supports_lora_conversion()
    config, tensors = convert_to_lora(model, rank=5)
    lora = get_peft_model(case.base(), config)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, tensors)
    assert torch.allclose(output(lora, case.inputs), output(model, case.inputs), atol=1e-4)


def test_the_export_names_the_bases_class_as_pefts_own_files_do(tmp_path):
    case = CASES["whisper"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, init_weights=False))
    model.save_pretrained(tmp_path / "own")
    to_lora(model, folder=tmp_path / "lora")
    own, exported = (json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("own", "lora"))
    assert exported["auto_mapping"] == own["auto_mapping"] is not None
