"""A fingerprint of a base model, small enough to travel with an adapter: was the adapter made for *this* base?

Sizes of the architecture, and a projection of two dozen weights. An adapter on a wrong base of the same size fails without an
error: it writes nonsense. The fingerprint survives a change of precision and sees through PEFT's wrapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

_FORMAT = 1
_NUM_WEIGHTS = 24  # weights looked at, spread over the model
_NUM_VALUES = 4096  # values of each that are looked at
# A projection of weights on random signs, divided by their norm, is about N(0, 1) from model to model. Rounding to bfloat16 moves
# it by about 0.001, fine-tuning by the relative change of the weights.
_TOLERANCE = 0.01

_SIZES = (
    "model_type",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
    "vocab_size",
)


class WrongBaseError(ValueError):
    """An adapter was made for another base model."""


def base_signature(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a Whisper, bare or wrapped by PEFT, as plain JSON values."""
    config: Any = model.config
    parameters = base_parameters(model)
    names = sorted(name for name, parameter in parameters.items() if parameter.ndim > 1 and parameter.is_floating_point())
    chosen = [names[i * len(names) // _NUM_WEIGHTS] for i in range(_NUM_WEIGHTS)] if len(names) > _NUM_WEIGHTS else names
    return {
        "format": _FORMAT,
        "architecture": {size: getattr(config, size) for size in _SIZES},
        "weights": {name: _projection(parameters[name]) for name in chosen},
    }


def check_base(signature: dict[str, Any], model: nn.Module) -> None:
    """Raise `WrongBaseError` unless `model` is the base that the signature was taken from."""
    check_signature(signature, base_signature(model))


def check_signature(signature: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """The same with the signature of the base at hand in place of the base: no model is walked."""
    if signature.get("format") != _FORMAT:
        raise WrongBaseError(f"The signature has format {signature.get('format')!r}; this version reads {_FORMAT}. Update the package.")
    if signature["architecture"] != ours["architecture"]:
        raise WrongBaseError(
            f"The adapter was made for a base of {_sizes(signature['architecture'])}; this one has {_sizes(ours['architecture'])}. "
            "Load the base that the adapter's card names."
        )
    compared = signature["weights"].keys() & ours["weights"].keys()  # a quantized base has fewer weights to look at
    differing = [name for name in compared if not math.isclose(signature["weights"][name], ours["weights"][name], abs_tol=_TOLERANCE)]
    if differing:
        raise WrongBaseError(
            f"The adapter was made for a base of the same size ({_sizes(ours['architecture'])}) with other weights: "
            f"{len(differing)} of {len(compared)} differ. Load the base that the adapter's card names."
        )


def base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's own parameters under the names they have without PEFT."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    added = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name, parameter in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in base.named_parameters()
        if id(parameter) not in added
    }


def _projection(weight: torch.Tensor) -> float:
    """The first values of a weight on fixed signs, over their norm."""
    values = weight.detach().reshape(-1)[:_NUM_VALUES].float().cpu().numpy().astype(np.float64)
    # Signs from a multiplicative hash: the same in every library, version and machine.
    signs = 1 - 2 * ((np.arange(len(values), dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(17)) & np.uint64(1)).astype(np.float64)
    norm = float(np.linalg.norm(values))
    return round(float(values @ signs) / norm, 5) if norm > 0 else 0.0


def _sizes(architecture: Mapping[str, Any]) -> str:
    return (
        f"width {architecture['d_model']}, {architecture['encoder_layers']} + {architecture['decoder_layers']} layers "
        f"and a vocabulary of {architecture['vocab_size']}"
    )
