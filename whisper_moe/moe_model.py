"""LoRA-MoE on a whole model: which modules are adapted, where the experts come from, and what PEFT asks of a tuner.

It owns no parameters: those live in the layers (moe_layer.py), so PEFT's per-layer machinery does the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from whisper_moe import moe_gates
from whisper_moe.expert_files import Expert, check_hashes, read_experts, stack
from whisper_moe.moe_config import LoraMoeConfig
from whisper_moe.moe_gates import adapted_layers, states_of
from whisper_moe.moe_layer import BASE_MODEL, EXPERT_NAMES, LoraMoeLayer, input_dependent
from whisper_moe.moe_report import GateReport, record_gates
from whisper_moe.moe_state import MixtureState
from whisper_moe.moe_targets import (
    TARGET_MODULES,
    check_adapter_name,
    check_model,
    check_not_wrapped,
    check_targets,
    hears_encoder,
    linear_shapes,
    nearest_names,
    own_modules,
    shortest_targets,
    unwrapped,
    utterance_size,
)

CHECKPOINT_PREFIX = "base_model.model."  # PEFT writes it before every name; a model without PeftModel around it lacks it


class LoraMoeModel(BaseTuner):
    """Adapts a model with LoRA-MoE. Made by `peft.get_peft_model(model, LoraMoeConfig(...))`, not by hand.

    Args:
        model (`torch.nn.Module`): The model to adapt; changed in place.
        config (`LoraMoeConfig`): The configuration.
        adapter_name (`str`): Name of the adapter, "default" unless given.
        low_cpu_mem_usage (`bool`): Make the adapter's parameters on the meta device, to be filled from a file.
    """

    prefix: str = "loramoe_"
    tuner_layer_cls = LoraMoeLayer
    target_module_mapping = TARGET_MODULES

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_not_wrapped(model)
        check_adapter_name(model, adapter_name)
        config = self.peft_config[adapter_name]
        self._experts: list[Expert] = []
        self._state = MixtureState(config.names, config.balance_weight, config.entropy_weight)
        self._state.awaits_file = config.inference_mode or (config.experts is None and bool(config.expert_names))
        self._targets_from_state_dict = None if state_dict is None else _modules_of(state_dict)
        self._shapes = linear_shapes(model)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error}{nearest_names(model, config.target_modules)}") from error
        else:
            self._state.attach(model)
        finally:
            self._experts, self._shapes = [], {}
            del self._state

    def _prepare_adapter_config(self, peft_config: LoraMoeConfig, model_config: dict[str, Any]) -> LoraMoeConfig:
        if peft_config.experts is not None:
            assert isinstance(peft_config.experts, dict)  # set in __post_init__
            self._experts = read_experts(peft_config.experts, self.model, self._shapes)
            check_hashes(self._experts, peft_config.expert_hashes or {}, peft_config.experts)
            if peft_config.target_modules is None:
                modules = {module for expert in self._experts for module in expert.pairs}
                peft_config.target_modules = shortest_targets(modules, self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: LoraMoeConfig, model: nn.Module) -> None:
        """PEFT calls this before it changes anything: the moment to refuse what cannot work."""
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        modules = own_modules(model)
        if self._targets_from_state_dict is not None:
            targets = [name for name in modules if name in self._targets_from_state_dict]
        else:
            targets = [name for name in modules if self._check_target_module_exists(peft_config, name)]
        if not targets:
            return  # PEFT itself refuses to adapt nothing
        check_targets(model, targets)
        check_model(model, targets, list(peft_config.experts.values()) if isinstance(peft_config.experts, dict) else [])
        self._check_experts_within(targets)
        if peft_config.router == "utterance" and utterance_size(model) is None and any(hears_encoder(model, name) for name in targets):
            raise ValueError(
                "router='utterance' needs the width of the encoder's output, and this model's config has neither d_model nor hidden_size. "
                "Use router='token' or 'static'."
            )
        if self._experts:
            self._write_what_was_read(peft_config, targets)

    def _check_experts_within(self, targets: Sequence[str]) -> None:
        for expert in self._experts:
            outside = [module for module in expert.pairs if module not in targets]
            if outside:
                raise ValueError(
                    f"Expert {expert.name!r} adapts {len(outside)} module(s) that are no targets, the first is {outside[0]}: part of it "
                    "would be lost. Leave target_modules out to take the experts' own, or add those modules."
                )

    def _write_what_was_read(self, config: LoraMoeConfig, targets: Sequence[str]) -> None:
        """What a saved adapter must say so that it can be built again without its experts' files."""
        ranks = {name: max((e.pairs[name][0].shape[0] for e in self._experts if name in e.pairs), default=0) for name in targets}
        config.expert_names = [expert.name for expert in self._experts]
        config.expert_ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        config.expert_hashes = {expert.name: expert.sha256 for expert in self._experts if expert.sha256 is not None} or None
        missing = [expert.name for expert in self._experts if expert.sha256 is None]
        if config.save_experts == "reference" and missing:
            raise ValueError(
                f"save_experts='reference' needs experts from files; {', '.join(missing)} are adapters of the model. Use 'copy'."
            )

    def _create_and_replace(
        self,
        peft_config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        options: dict[str, Any] = {
            "config": peft_config,
            "state": self._state,
            "module_name": current_key,
            "experts": self._expert_tensors(peft_config, current_key),
            "utterance_size": utterance_size(self.model) if hears_encoder(self.model, current_key) else None,
        }
        if isinstance(target, LoraMoeLayer):
            target.update_layer(adapter_name, **options)
            return
        base_layer = unwrapped(target)  # a LoRA that serves as an expert makes room
        new_layer = LoraMoeLayer(base_layer, adapter_name, quantization=get_quantization_kwargs(self), **options)
        self._replace_module(parent, target_name, new_layer, base_layer)

    def _expert_tensors(self, config: LoraMoeConfig, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The stacked experts of one weight: as read, or empty ones that the saved adapter's file will fill."""
        d_out, d_in = self._shapes[module]
        if self._experts:
            return stack(self._experts, module, d_out, d_in)
        rank = (config.expert_ranks or {}).get(module, 0)
        if rank == 0:
            return None
        return torch.zeros(len(config.names), rank, d_in), torch.zeros(len(config.names), rank, d_out)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        states = states_of(self.model)
        if merge:
            self._check_gates_fixed(kwargs.get("adapter_names"))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for state in states.values():
            state.detach()
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights, under the gates that are fixed now. See `BaseTuner.merge_adapter`."""
        self._check_gates_fixed(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_gates_fixed(self, adapter_names: list[str] | None) -> None:
        """Refuse before the first weight is changed."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            for layer in adapted_layers(self.model, name).values():
                if name not in layer.merged_adapters and layer.constant_gates(name) is None:
                    raise ValueError(input_dependent(name, layer.configs[name].router))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "A mixture is no weighted sum of others. Mix adapters by making them experts of a new one: LoraMoeConfig(experts=[...])."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version makes new parameters, which always require a gradient: a frozen expert would thaw.
        layers = adapted_layers(self.model, adapter_name).values()
        required = [(layer, name) for layer in layers for name in layer.parameter_dicts_with(adapter_name)]
        flags = [getattr(layer, name)[adapter_name].requires_grad for layer, name in required]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for (layer, name), requires_grad in zip(required, flags, strict=True):
            getattr(layer, name)[adapter_name].requires_grad_(requires_grad)

    # ---- gates, masks, terms ---------------------------------------------------------------------------------------------

    def use_gates(self, gates: Any, adapter_name: str | None = None) -> AbstractContextManager[None]:
        """See `whisper_moe.use_gates`: run with these gates instead of the router's."""
        return moe_gates.use_gates(self.model, gates, adapter_name)

    def mask_experts(self, experts: Collection[str], adapter_name: str | None = None) -> AbstractContextManager[None]:
        """See `whisper_moe.mask_experts`: leave these experts out."""
        return moe_gates.mask_experts(self.model, experts, adapter_name)

    def record_gates(self, adapter_name: str | None = None) -> AbstractContextManager[GateReport]:
        """See `whisper_moe.record_gates`: keep the gates of every weight that the model uses."""
        return record_gates(self.model, adapter_name)

    def regularization_loss(self, adapter_name: str | None = None) -> torch.Tensor:
        """See `whisper_moe.regularization_loss`: the balance and entropy terms of the last training step."""
        return moe_gates.regularization_loss(self.model, adapter_name)

    # ---- adapter_names ---------------------------------------------------------------------------------------------------

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
                handles = _hand_to_layers(self.model, [name for name in names for _ in range(num_beams)])
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

    # ---- saving and loading ----------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoraMoeConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.save_experts == "reference" and config.names:
            if config.train_experts:
                raise ValueError("save_experts='reference' cannot hold experts that were trained. Use save_experts='copy'.")
            tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(_expert_suffixes(adapter_name))}
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraMoeConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        layers = adapted_layers(model, adapter_name)
        if config.save_experts == "reference" and isinstance(config.experts, dict):
            base = moe_gates.base_model_of(model)
            shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
            experts = read_experts(config.experts, base, shapes)
            check_hashes(experts, config.expert_hashes or {}, config.experts)
            for name, layer in layers.items():
                tensors = stack(experts, name, layer.out_features, layer.in_features)
                for factor, tensor in zip(EXPERT_NAMES, tensors or (), strict=False):
                    state_dict.setdefault(f"{CHECKPOINT_PREFIX}{name}.{factor}", tensor)
        states = [layer.states[adapter_name] for layer in layers.values()]
        try:
            _check_fit(layers, adapter_name, state_dict)
        except ValueError:
            if any(state.awaits_file for state in states):  # it was made for this file alone: leave the model as it was before
                _take_out(model, adapter_name)
            raise
        for state in states:
            state.awaits_file = False
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_fit(layers: dict[str, LoraMoeLayer], adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse a file whose tensors are not those of this mixture: other experts, another router, another size."""
    present = {key.removeprefix(CHECKPOINT_PREFIX): tensor for key, tensor in state_dict.items()}
    for name, layer in layers.items():
        for factor in layer.adapter_layer_names:
            expected = dict(getattr(layer, factor).items()).get(adapter_name)
            found = present.get(f"{name}.{factor}")
            if expected is None and found is None:
                continue
            if expected is None or found is None or expected.shape != found.shape:
                shapes = ["none" if tensor is None else str(tuple(tensor.shape)) for tensor in (expected, found)]
                raise ValueError(
                    f"The file does not fit adapter {adapter_name!r}: {name}.{factor} should be {shapes[0]} and is {shapes[1]}. Load it "
                    f"with its own adapter_config.json (router={layer.configs[adapter_name].router!r}, "
                    f"experts {', '.join(layer.states[adapter_name].experts) or 'none'} here)."
                )


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, and the layers that held nothing else."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LoraMoeLayer) and adapter_name in child.states:
                child.delete_adapter(adapter_name)
                if not child.states:
                    setattr(parent, child_name, child.base_layer)


def _modules_of(state_dict: dict[str, torch.Tensor]) -> set[str]:
    """Module names of an adapter's tensors."""
    return {key.removeprefix(CHECKPOINT_PREFIX).rpartition(".loramoe_")[0] for key in state_dict if ".loramoe_" in key}


def _expert_suffixes(adapter_name: str) -> tuple[str, ...]:
    return tuple(f".{factor}.{adapter_name}" for factor in EXPERT_NAMES)


def _hand_to_layers(module: nn.Module, adapter_names: list[str]) -> list[RemovableHandle]:
    """Make every LoRA-MoE layer below `module` receive `adapter_names` at its next calls."""
    hook = partial(_add_adapter_names, adapter_names=adapter_names)
    takers = (layer for layer in module.modules() if isinstance(layer, (LoraMoeLayer, AuxiliaryTrainingWrapper)))
    return [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in takers]


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
