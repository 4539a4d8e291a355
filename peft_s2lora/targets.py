"""Which modules of a model S2-LoRA adapts, and the checks of a new adapter against the model, made before anything is changed."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import S2LoraConfig
from .layer import Embedding, Linear, S2LoraLayer

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TARGET_MODULES: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "whisper": ATTENTION,  # encoder and decoder; the output layer is called proj_out and stays out
    "speech_to_text": ATTENTION,
    "wav2vec2": ATTENTION,
    "hubert": ATTENTION,
    "wavlm": ATTENTION,
}
PEFT_PATH_NAMES = {"base_model", "model", "base_layer"}  # PEFT puts these into the names of parameters


def layer_class(base_layer: nn.Module) -> type[S2LoraLayer] | None:
    """The S2-LoRA layer for a base layer, or None if that type is not supported."""
    if isinstance(base_layer, (nn.Linear, Conv1D)):
        return Linear
    if isinstance(base_layer, nn.Embedding):
        return Embedding
    backend = resolve_quantization_backend(base_layer)
    return Linear if backend is not None and backend.layer_type == "linear" else None


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The named modules of a model without the insides of adapter layers."""
    modules = {name: module for name, module in model.named_modules() if name}
    wrappers = tuple(f"{name}." for name, module in modules.items() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return {name: module for name, module in modules.items() if not name.startswith(wrappers)}


def unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def unsupported_message(name: str, module: nn.Module) -> str:
    return (
        f"Target module {name} is a {type(module).__name__}, which is not supported. Currently, only `torch.nn.Linear` (also quantised), "
        "`torch.nn.Embedding` and `transformers.pytorch_utils.Conv1D` are supported. Name other modules in target_modules, or leave "
        "this one out with exclude_modules."
    )


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT could not tell from a part of a parameter's name, or that torch cannot store."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter's name must not be empty or contain a dot, got {adapter_name!r}. Use for instance 'en-child'.")
    taken = PEFT_PATH_NAMES.union(*(name.split(".") for name in own_modules(model)))
    if adapter_name in taken or hasattr(nn.ParameterDict, adapter_name):
        raise ValueError(
            f"The adapter name {adapter_name!r} is also the name of a module or method in this model, so PEFT would mix up its weights "
            f"with others when saving. Use another name, for instance {adapter_name + '_adapter'!r}."
        )


def check_targets(config: S2LoraConfig, model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse targets of a type that is not supported and sharing patterns that match none; warn of names that match nothing."""
    for name, module in targets.items():
        if layer_class(unwrapped(module)) is None:
            raise ValueError(unsupported_message(name, unwrapped(module)))
    for pattern in config.share_groups or []:
        if not any(config.sharing_group(name) == pattern for name in targets):
            raise ValueError(
                f"share_groups holds {pattern!r}, which is the first match of none of the {len(targets)} adapted modules "
                f"(the first is {next(iter(targets))}). It must match a whole module name, as re.fullmatch does."
            )
    if isinstance(config.target_modules, str):
        return
    names = list(own_modules(model))
    unmatched = sorted(
        target for target in config.target_modules or [] if not any(name == target or name.endswith(f".{target}") for name in names)
    )
    if unmatched:
        warnings.warn(f"target_modules {unmatched} match nothing in this model.{nearest_names(model, unmatched)}", stacklevel=2)


def nearest_names(model: nn.Module, targets: object) -> str:
    """A sentence with the names that the user may have meant."""
    adaptable = sorted({name.rpartition(".")[2] for name, module in own_modules(model).items() if layer_class(unwrapped(module))})
    wanted = [] if isinstance(targets, str) or not targets else [str(target).rpartition(".")[2] for target in targets]  # type: ignore[attr-defined]
    near = [name for target in wanted for name in difflib.get_close_matches(target, adaptable, n=3, cutoff=0.5)]
    if near:
        return f" Nearest names in this model: {', '.join(dict.fromkeys(near))}."
    return f" Names that can be adapted in this model: {', '.join(adaptable[:20]) or 'none'}."
