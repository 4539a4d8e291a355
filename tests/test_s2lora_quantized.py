"""S2-LoRA on bitsandbytes' 8-bit and 4-bit linear layers, where that package is installed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_behaviours import close, output

from peft_s2lora import Linear, S2LoraConfig

bnb = pytest.importorskip("bitsandbytes", reason="quantised layers need bitsandbytes: pip install bitsandbytes")


def quantized_base(bits: int) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    if bits == 8:
        layers = [bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False) for _ in range(2)]
    else:
        layers = [bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4") for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    model.load_state_dict(plain.state_dict())
    return model.to("cpu")  # this is what quantises


@pytest.mark.parametrize("bits", [8, 4])
def test_the_adapter_of_a_quantised_layer_adds_its_formula_and_shares(bits):
    torch.manual_seed(1)
    model = get_peft_model(quantized_base(bits), S2LoraConfig(r=4, target_modules=["0", "2"], init_weights=False))
    first, _, second = model.base_model.model
    assert isinstance(first, Linear)
    assert first.shared_factors["default"] is second.shared_factors["default"]
    x = torch.randn(3, 64)
    A, B, s = first.s2lora_A["default"], first.s2lora_B["default"], first.s2lora_coefficients["default"]
    with torch.no_grad():
        expected = first.base_layer(x) + x @ (B @ torch.diag(s) @ A).T
        assert close(first(x), expected)
    assert {layer.quantization_backend for layer in model.get_layer_status()} == {f"bnb {bits}bit"}


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_of_quantised_layers_trains_saves_and_loads(bits, tmp_path):
    model = get_peft_model(quantized_base(bits), S2LoraConfig(r=4, target_modules=["0", "2"], init_weights=False))
    model(torch.randn(3, 64)).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "s2lora_" in name)
    x = {"input": torch.randn(3, 64)}
    model.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(quantized_base(bits), tmp_path), x), output(model, x))


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_into_quantised_weights_is_near_the_unmerged_output(bits):
    model = get_peft_model(quantized_base(bits), S2LoraConfig(r=4, target_modules=["0", "2"], init_weights=False))
    x, unmerged = {"input": torch.randn(3, 64)}, copy.deepcopy(model)
    with unmerged.disable_adapter():
        base = output(unmerged, x)
    expected = output(unmerged, x)
    model.merge_adapter()
    assert (output(model, x) - expected).abs().mean() < 0.5 * (expected - base).abs().mean()  # the rest is rounding to 8 or 4 bits


def test_merging_a_4_bit_weight_that_was_repacked_for_the_cpu_is_refused():
    # PEFT's own methods merge it without a word, and the model is then wrong.
    model = get_peft_model(quantized_base(4), S2LoraConfig(r=4, target_modules=["0", "2"], init_weights=False))
    output(model, {"input": torch.randn(3, 64)})
    if not model.base_model.model[0].base_layer.weight.quant_state.packing_format_for_cpu:
        pytest.skip("bitsandbytes does not repack 4-bit weights on this processor: nothing to refuse")
    with pytest.raises(ValueError, match="repacked this 4-bit weight"):
        model.merge_adapter()
