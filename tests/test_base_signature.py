"""The fingerprint of a base: equal for the same weights in any precision and wrapping, different for any others."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig, get_peft_model

from peft_s2lora import S2LoraConfig
from whisper_moe.base_signature import WrongBaseError, base_parameters, base_signature, check_base


def test_a_saved_signature_fits_its_base(tiny_model: Any) -> None:
    saved = json.dumps(base_signature(tiny_model))
    assert len(saved) < 4000
    check_base(json.loads(saved), tiny_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_makes_no_difference(tiny_model: Any, dtype: torch.dtype) -> None:
    signature = base_signature(tiny_model)
    check_base(signature, copy.deepcopy(tiny_model).to(dtype))
    check_base(base_signature(copy.deepcopy(tiny_model).to(dtype)), tiny_model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["conv1"]),
        S2LoraConfig(r=4, target_modules=["q_proj", "out_proj"], init_weights=False),
    ],
    ids=["lora", "lora with a saved module", "s2lora"],
)
def test_adapters_make_no_difference(tiny_model: Any, config: Any) -> None:
    signature, names = base_signature(tiny_model), set(dict(tiny_model.named_parameters()))
    wrapped = get_peft_model(tiny_model, config)
    assert base_signature(wrapped) == signature
    assert base_signature(wrapped.get_base_model()) == signature
    assert set(base_parameters(wrapped)) == names


def test_other_weights_of_the_same_size_are_refused(tiny_model: Any, tiny_processor: Any) -> None:
    with pytest.raises(WrongBaseError, match="other weights: 23 of 24 differ"):  # positions are sinusoids in every Whisper
        check_base(base_signature(tiny_model), build_tiny_model(tiny_processor, seed=1))


def test_a_fine_tuned_base_is_another_base(tiny_model: Any) -> None:
    signature = base_signature(tiny_model)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    with pytest.raises(WrongBaseError, match="other weights"):
        check_base(signature, tiny_model)


def test_another_size_is_refused_with_both_sizes(tiny_model: Any, tiny_processor: Any) -> None:
    with pytest.raises(WrongBaseError, match=r"width 16, 2 \+ 2 layers.*this one has width 16, 2 \+ 1 layers"):
        check_base(base_signature(tiny_model), build_tiny_model(tiny_processor, decoder_layers=1))


def test_a_signature_of_a_later_format_is_refused(tiny_model: Any) -> None:
    with pytest.raises(WrongBaseError, match="format 2"):
        check_base(base_signature(tiny_model) | {"format": 2}, tiny_model)


def test_a_projection_of_random_weights_is_near_standard_normal() -> None:
    """Why the tolerance of 0.01 tells models apart: unrelated weights differ by about 1."""
    torch.manual_seed(0)
    linear = {f"w{index}": torch.nn.Parameter(torch.randn(70, 70)) for index in range(24)}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterDict(linear)
            sizes = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim")
            sizes += ("decoder_ffn_dim", "num_mel_bins", "max_source_positions", "max_target_positions", "vocab_size", "d_model")
            self.config = type("Config", (), {**dict.fromkeys(sizes, 1), "model_type": "whisper"})()

    values = np.array(list(base_signature(Model())["weights"].values()))
    assert 0.6 < values.std() < 1.5
    assert abs(values.mean()) < 0.7
