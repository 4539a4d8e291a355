"""Put another adapter's values in the place of a loaded one's, in place, so that a compiled model runs on without compiling anew.

PEFT's own `hotswap_adapter` is for LoRA only, by name. Only values change here: rank, sharing and targets must be equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from .config import S2LoraConfig
from .layer import S2LoraLayer
from .pool import factors_hash, users_of_pool
from .sharing import CHECKPOINT_PREFIX, adapted_layers, base_model_of, factors_to_owners
from .sparsity import chosen_configs, s2lora_configs

EQUAL_FIELDS = ("r", "scaling", "share_scope", "share_groups", "group_ranks", "bias", "modules_to_save", "trainable_token_indices")
BESIDES = ("modules_to_save", "trainable_token_indices")  # with a bias, what an adapter may train besides its own tensors
WAY_OUT = "Load it with load_adapter() instead."
COEFFICIENTS = ".s2lora_coefficients"
COMPILED = "_orig_mod."  # torch.compile puts it into the names of what it wraps


def hotswap(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Overwrite the values of a loaded adapter with those of another one that has the same rank, sharing and targets.

    Everything is checked before the first value changes, so a refused adapter leaves the model as it was. The name stays, and so do
    the parameters themselves: `torch.compile` does not compile anew and an optimizer still holds them. What acts in
    training only (dropout, sparsity_weight, learning rate of s) stays that of the adapter that was there.

    Args:
        model: A model with the adapter, compiled or not, wrapped by `PeftModel` or not.
        source: Folder (or repository) of the new adapter, or its tensors as `get_peft_model_state_dict` returns them. Tensors carry no
            configuration: that theirs is equal is then the caller's word.
        adapter_name: Which loaded adapter to overwrite.

    Raises:
        ValueError: No such adapter, it is merged or others use it as their pool, or the new one differs; names the first difference.
    """
    model = getattr(model, "_orig_mod", model)
    config = chosen_configs(model, adapter_name)[adapter_name]
    base_model = base_model_of(model)
    layers = adapted_layers(base_model, adapter_name)
    _check_free(model, adapter_name, layers)
    _check_only_own_tensors(adapter_name, config)
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        _check_config(model, config, PeftConfig.from_pretrained(str(source)))
        tensors = load_peft_weights(str(source), device="cpu")
    tensors = _as_named_here(layers, tensors)
    # First the targets: A and B find their owners here only if both adapters have the same ones.
    _check_same_names([f"{name}{COEFFICIENTS}" for name in layers], [name for name in tensors if name.endswith(COEFFICIENTS)])
    if config.pool is None:
        tensors = factors_to_owners(base_model, adapter_name, tensors)
    parameters = {
        f"{name}.{kind}": getattr(layer, kind)[adapter_name]
        for name, layer in layers.items()
        for kind in layer.parameter_dicts_with(adapter_name)
    }
    _check_tensors(parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _check_free(model: nn.Module, adapter_name: str, layers: Mapping[str, S2LoraLayer]) -> None:
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the weights. Call unmerge_adapter() before hotswap().")
    users = users_of_pool(s2lora_configs(model), adapter_name)
    if users:
        raise ValueError(f"Adapter {adapter_name!r} is the pool of {', '.join(users)}: other values would change those too. Load it anew.")


def _check_only_own_tensors(adapter_name: str, config: S2LoraConfig) -> None:
    chosen = [name for name in BESIDES if getattr(config, name)] + (["bias"] if config.bias != "none" else [])
    if chosen:
        raise ValueError(f"Adapter {adapter_name!r} trains more than its own tensors ({chosen[0]}), and only those are swapped. {WAY_OUT}")


def _check_config(model: nn.Module, present: S2LoraConfig, new: PeftConfig) -> None:
    if not isinstance(new, S2LoraConfig):
        raise ValueError(f"The new adapter is a {new.peft_type}, not S2LORA. {WAY_OUT}")
    for name in EQUAL_FIELDS:
        here, there = getattr(present, name), getattr(new, name)
        if here != there:
            raise ValueError(f"The new adapter has {name}={there!r}, the loaded one {name}={here!r}. {WAY_OUT}")
    if (present.pool is None) != (new.pool is None):
        raise ValueError(f"The new adapter has pool={new.pool!r}, the loaded one pool={present.pool!r}. {WAY_OUT}")
    if present.pool is not None and new.pool_hash != factors_hash(model, present.pool):
        raise ValueError(
            f"The new adapter was trained on another pool than the loaded {present.pool!r} (hash {str(new.pool_hash)[:12]}... expected, "
            f"{factors_hash(model, present.pool)[:12]}... found). Load the pool it was trained on."
        )


def _as_named_here(layers: Mapping[str, S2LoraLayer], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that their modules have in this model, of which parts may be compiled."""
    names = {name.replace(COMPILED, ""): name for name in layers}
    renamed = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.removeprefix(CHECKPOINT_PREFIX).rpartition(".")
        renamed[f"{names.get(module, module)}.{parameter}"] = tensor
    return renamed


def _check_same_names(here: Iterable[str], there: Iterable[str]) -> None:
    missing, extra = [name for name in here if name not in there], [name for name in there if name not in here]
    if missing:
        raise ValueError(f"The new adapter lacks {missing[0]}, which the loaded one has. {WAY_OUT}")
    if extra:
        raise ValueError(f"The new adapter has {extra[0]}, which the loaded one lacks. {WAY_OUT}")


def _check_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    _check_same_names(parameters, tensors)
    for name, parameter in parameters.items():
        shape = tuple(tensors[name].shape)
        if shape != tuple(parameter.shape):
            raise ValueError(f"{name} is {shape} in the new adapter and {tuple(parameter.shape)} in the loaded one. {WAY_OUT}")
        if parameter.is_meta:
            raise ValueError(f"{name} has no values yet (meta device), so there is nothing to overwrite. {WAY_OUT}")
