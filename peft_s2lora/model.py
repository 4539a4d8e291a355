"""S2-LoRA on a whole model: which modules are adapted, which of them share a pair (A, B), and what PEFT asks of a tuner.

It owns no parameters: those live in the layers (see layer.py), so PEFT's per-layer machinery does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import sparsity
from .config import S2LoraConfig
from .layer import BASE_MODEL, S2LoraLayer
from .pool import factors_hash, join_pool, pool_group, users_of_pool
from .report import RankReport, rank_report
from .sharing import SharedFactors, adapted_layers, factors_to_owners, rehome, sharing_groups
from .targets import (
    TARGET_MODULES,
    check_adapter_name,
    check_targets,
    layer_class,
    nearest_names,
    own_modules,
    unsupported_message,
    unwrapped,
)


class S2LoraModel(BaseTuner):
    """Adapts a model with S2-LoRA. Made by `peft.get_peft_model(model, S2LoraConfig(...))`, not by hand.

    Args:
        model (`torch.nn.Module`): The model to adapt; changed in place.
        config (`S2LoraConfig`): The configuration.
        adapter_name (`str`): Name of the adapter, "default" unless given.
        low_cpu_mem_usage (`bool`): Make the adapter's parameters on the meta device, to be filled from a file.
    """

    prefix: str = "s2lora_"
    tuner_layer_cls = S2LoraLayer
    target_module_mapping = TARGET_MODULES

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_adapter_name(model, adapter_name)
        self._groups = sharing_groups(model, adapter_name)
        self._targets_from_state_dict = state_dict is not None
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error}{nearest_names(model, self.peft_config[adapter_name].target_modules)}") from error
        finally:
            self._groups = {}

    def _prepare_adapter_config(self, peft_config: S2LoraConfig, model_config: dict[str, Any]) -> S2LoraConfig:
        if peft_config.pool is not None:
            adapter_name = next(name for name, config in self.peft_config.items() if config is peft_config)
            join_pool(self.model, adapter_name, self.peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: S2LoraConfig, model: nn.Module) -> None:
        """PEFT calls this before it changes anything: the moment to refuse what cannot work."""
        if self._targets_from_state_dict or peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        targets = {name: module for name, module in own_modules(model).items() if self._check_target_module_exists(peft_config, name)}
        if targets:  # PEFT itself refuses to adapt nothing
            check_targets(peft_config, model, targets)
        if peft_config.pool is not None:
            for name, module in targets.items():
                pool_group(module, name, peft_config)

    def _create_and_replace(
        self,
        peft_config: S2LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base_layer = unwrapped(target)
        new_class = layer_class(base_layer)
        if new_class is None:
            raise ValueError(unsupported_message(current_key, base_layer))
        d_in, d_out = _get_in_out_features(base_layer)
        key = peft_config.sharing_key(current_key, d_out, d_in)
        if peft_config.pool is None:
            shared = self._groups.setdefault(key, SharedFactors(adapter_name, key))
        else:
            shared = pool_group(target, current_key, peft_config)
        if isinstance(target, S2LoraLayer):
            target.update_layer(adapter_name, shared, peft_config)
            return
        new_layer = new_class(target, adapter_name, shared, peft_config, **get_quantization_kwargs(self))
        new_layer.block = current_key.rpartition(".")[0]
        self._replace_module(parent, target_name, new_layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # unloaded: PEFT's version would assign its merged rows, which are no Parameter
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        users = users_of_pool(self.peft_config, adapter_name)
        if users:
            raise ValueError(f"Adapter {adapter_name!r} is the pool of {', '.join(users)}. Delete those first.")
        super().delete_adapter(adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "S2-LoRA adapters have A and B of their own, so one cannot be a weighted sum of others. Activate several at once, "
            'model.base_model.set_adapter(["a", "b"]), and they add up; or export each with to_lora and combine those.'
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version makes new parameters, which always require a gradient: a frozen adapter would thaw.
        layers = adapted_layers(self.model, adapter_name).values()
        required = [(layer, name) for layer in layers for name in layer.parameter_dicts_with(adapter_name)]
        flags = [getattr(layer, name)[adapter_name].requires_grad for layer, name in required]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for (layer, name), requires_grad in zip(required, flags, strict=True):
            getattr(layer, name)[adapter_name].requires_grad_(requires_grad)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` (one name per row of the batch) to every layer for the length of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        names = list(adapter_names)
        num_beams = kwargs.get("num_beams")
        handles = []
        try:
            if isinstance(num_beams, int) and num_beams > 1:  # generate() repeats each row num_beams times, in the decoder only
                repeated = [name for name in names for _ in range(num_beams)]
                handles = _hand_to_layers(self.model, repeated)
                get_encoder = getattr(self.model, "get_encoder", None)
                encoder = get_encoder() if get_encoder is not None else None
                if encoder is not None and encoder is not self.model:
                    handles += _hand_to_layers(encoder, names)  # hooks run in order, so this one has the last word
            else:
                handles = _hand_to_layers(self.model, names)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        unknown = sorted(set(adapter_names) - {BASE_MODEL} - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(self.peft_config))}, and {BASE_MODEL} for the base model."
            )

    def regularization_loss(self, adapter_name: str | None = None) -> torch.Tensor:
        """See `peft_s2lora.regularization_loss`."""
        return sparsity.regularization_loss(self, adapter_name)

    def proximal_step(self, optimizer: torch.optim.Optimizer, adapter_name: str | None = None) -> None:
        """See `peft_s2lora.proximal_step`: after every optimizer.step(), move the coefficients towards exact zeros."""
        sparsity.proximal_step(self, optimizer, adapter_name)

    def prune(self, adapter_name: str | None = None, threshold: float = 0.0) -> dict[str, int]:
        """See `peft_s2lora.prune`: drop the rank directions that no weight uses."""
        return sparsity.prune(self, adapter_name, threshold)

    def rank_report(self, adapter_name: str | None = None) -> RankReport:
        """See `peft_s2lora.rank_report`: how many rank directions each weight uses."""
        return rank_report(self, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: S2LoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.pool is not None:
            config.pool_hash = factors_hash(model, config.pool)  # as it is now; PEFT writes the configuration after this
        for name, layer in rehome(model, adapter_name).items():
            to_return[f"{name}.s2lora_A.{adapter_name}"] = layer.s2lora_A[adapter_name].detach()
            to_return[f"{name}.s2lora_B.{adapter_name}"] = layer.s2lora_B[adapter_name].detach()
        return to_return

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: S2LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if config.pool is None:
            state_dict = factors_to_owners(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _hand_to_layers(module: nn.Module, adapter_names: list[str]) -> list[RemovableHandle]:
    """Make every S2-LoRA layer below `module` receive `adapter_names` at its next calls."""
    hook = partial(_add_adapter_names, adapter_names=adapter_names)
    takers = (layer for layer in module.modules() if isinstance(layer, (S2LoraLayer, AuxiliaryTrainingWrapper)))
    return [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in takers]


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
