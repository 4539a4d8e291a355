"""Which modules of a model LoRA-MoE adapts, and the checks of a new adapter against the model, made before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from whisper_moe.moe_layer import LoraMoeLayer
from whisper_moe.moe_state import decoder_of

TARGET_MODULES: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "whisper": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],  # LoRA-Whisper's, arXiv 2406.06619
}
PEFT_PATH_NAMES = {"base_model", "model", "base_layer"}  # PEFT puts these into the names of parameters


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The named modules of a model without the insides of adapter layers."""
    modules = {name: module for name, module in model.named_modules() if name}
    wrappers = tuple(f"{name}." for name, module in modules.items() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return {name: module for name, module in modules.items() if not name.startswith(wrappers)}


def unwrapped(module: nn.Module) -> nn.Module:
    base_layer: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base_layer


def is_linear(module: nn.Module) -> bool:
    """Whether a base layer is one that can be adapted."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> (d_out, d_in), of all linear layers."""
    linears = {name: unwrapped(module) for name, module in own_modules(model).items() if is_linear(unwrapped(module))}
    return {name: tuple(reversed(_get_in_out_features(layer))) for name, layer in linears.items()}


def shortest_targets(modules: Collection[str], model: nn.Module) -> set[str]:
    """The shortest `target_modules` that name exactly these: last names if that is possible, else whole names."""
    last_names = {module.rpartition(".")[2] for module in modules}
    matched = {name for name in own_modules(model) if name.rpartition(".")[2] in last_names}
    return last_names if matched == set(modules) else set(modules)


def utterance_size(model: nn.Module) -> int | None:
    """Width of the encoder's output in an encoder-decoder model, None for other models."""
    if decoder_of(model) is None:
        return None
    config = model.config
    return getattr(config, "d_model", None) or getattr(config, "hidden_size", None)


def hears_encoder(model: nn.Module, module_name: str) -> bool:
    """Whether a module of an encoder-decoder model comes after the encoder."""
    if decoder_of(model) is None:
        return False
    encoder = model.get_encoder()  # type: ignore[operator]
    path = next((name for name, module in model.named_modules() if module is encoder), None)
    return path is None or not f"{module_name}.".startswith(f"{path}.")


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that PEFT could not tell from a part of a parameter's name, or that torch cannot store."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter's name must not be empty or contain a dot, got {adapter_name!r}. Use for instance 'near-cy'.")
    taken = PEFT_PATH_NAMES.union(*(name.split(".") for name in own_modules(model)))
    if adapter_name in taken or hasattr(nn.ParameterDict, adapter_name):
        raise ValueError(
            f"The adapter name {adapter_name!r} is also the name of a module or method in this model, so PEFT would mix up its weights "
            f"with others when saving. Use another name, for instance {adapter_name + '_adapter'!r}."
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Refuse a model in PEFT's wrapper, whose names are not the base model's."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already. Pass what is inside: get_peft_model(model.get_base_model(), LoraMoeConfig(...))."
        )


def check_model(model: nn.Module, targets: Collection[str], lora_experts: Collection[str]) -> None:
    """Refuse a model whose present adapters would be in the way. LoRA adapters that serve as experts are taken out of it."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already. Pass the model inside: get_peft_model(model.get_base_model(), LoraMoeConfig(...))."
        )
    for name, module in own_modules(model).items():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, LoraMoeLayer):
            continue
        others = sorted(set(module._get_available_adapters()) - set(lora_experts))
        if others or name not in targets:
            what = f"the adapter(s) {', '.join(others)}, which are no experts of this mixture" if others else "an adapter, but is no target"
            raise ValueError(
                f"Module {name} already holds {what}. Unload those first (model.unload()), or start from the base model: a mixture takes "
                "its experts from folders too."
            )


def check_targets(model: nn.Module, targets: Collection[str]) -> None:
    """Refuse targets that are no linear layer."""
    modules = own_modules(model)
    for name in targets:
        module = unwrapped(modules[name])
        if not is_linear(module):
            raise ValueError(
                f"Target module {name} is a {type(module).__name__}, which is not supported. Currently, only `torch.nn.Linear` (also "
                "quantised) and `transformers.pytorch_utils.Conv1D` are supported. Name other modules in target_modules, or leave this one "
                "out with exclude_modules."
            )


def nearest_names(model: nn.Module, targets: object) -> str:
    """A sentence with the names that the user may have meant."""
    adaptable = sorted({name.rpartition(".")[2] for name in linear_shapes(model)})
    wanted = [] if isinstance(targets, str) or not targets else [str(target).rpartition(".")[2] for target in targets]  # type: ignore[attr-defined]
    near = [name for target in wanted for name in difflib.get_close_matches(target, adaptable, n=3, cutoff=0.5)]
    if near:
        return f" Nearest names in this model: {', '.join(dict.fromkeys(near))}."
    return f" Names that can be adapted in this model: {', '.join(adaptable[:20]) or 'none'}."
