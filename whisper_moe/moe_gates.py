"""Gates from outside: fixing them, masking experts, the terms of the loss. For any model that holds LoRA-MoE layers.

A `PeftModel`, its `base_model`, or a model adapted with `inject_adapter_in_model` or `add_adapter`: all work. `LoraMoeModel` offers the
same as methods.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from whisper_moe.moe_layer import LoraMoeLayer
from whisper_moe.moe_state import MixtureState, changed
from whisper_moe.routing import Routing


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraMoeLayer]:
    """Module name, as the base model says it -> LoRA-MoE layer, of the layers that hold the adapter, in the model's order."""
    return {
        module.module_names[adapter_name]: module
        for module in model.modules()
        if isinstance(module, LoraMoeLayer) and adapter_name in module.states
    }


def base_model_of(model: nn.Module) -> nn.Module:
    """The adapted model without PEFT's wrappers."""
    inner = model.base_model if isinstance(model, PeftModel) else model
    return inner.model if isinstance(inner, BaseTuner) else inner


def states_of(model: nn.Module) -> dict[str, MixtureState]:
    """Adapter name -> what its layers share."""
    states: dict[str, MixtureState] = {}
    for module in model.modules():
        if isinstance(module, LoraMoeLayer):
            states |= module.states
    return states


def single_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, MixtureState]:
    """Name and state of the LoRA-MoE adapter meant, which is the active one unless named."""
    states = states_of(model)
    if not states:
        raise ValueError(
            f"This {type(model).__name__} has no LoRA-MoE adapter. Make one with get_peft_model(model, LoraMoeConfig(...)); if the model "
            "is wrapped for parallel training, pass the model inside (model.module)."
        )
    if adapter_name is None:
        active = next(layer.active_adapters for layer in model.modules() if isinstance(layer, LoraMoeLayer))
        names = [name for name in active if name in states]
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active ({', '.join(names) or 'none'}): say which one with adapter_name=.")
        adapter_name = names[0]
    if adapter_name not in states:
        raise ValueError(f"No LoRA-MoE adapter {adapter_name!r}. Known: {', '.join(sorted(states))}.")
    return adapter_name, states[adapter_name]


@contextmanager
def use_gates(model: nn.Module, gates: Any, adapter_name: str | None = None) -> Iterator[None]:
    """Run the model with these gates instead of its router's, for the length of the block.

    Args:
        model: A model with a LoRA-MoE adapter.
        gates: For all rows: a dict expert -> weight, a tensor (experts,), a dict module -> tensor (experts,), or a `GateReport`, whose mean
            over what it has seen is used for each weight. For each row its own: a list with an expert's name, a dict expert -> weight, a
            `LanguagePosterior` (its share of the experts, scaled to sum to 1) or `None` (no expert) per row; a tensor (rows, experts);
            or a `Routing`. Rows that become several beams keep their gates.
        adapter_name: Which adapter; the active one unless named.

    Raises:
        ValueError: An unknown expert, a wrong number of weights; or later, in a layer, a batch with another number of rows.
    """
    name, state = single_adapter(model, adapter_name)
    if not state.experts:
        raise ValueError(f"Adapter {name!r} has no experts, so there are no gates to give.")
    state.settle()
    fixed = _fixed(model, name, state, gates)
    if fixed is not None:
        with changed(state, fixed=fixed):
            yield
        return
    # The slot is put back last: `changed` may put an older state back first.
    with state.slot.use(_routing(gates, state, _device(model, name))), changed(state, fixed=None):
        yield


@contextmanager
def mask_experts(model: nn.Module, experts: Collection[str], adapter_name: str | None = None) -> Iterator[None]:
    """Leave these experts out for the length of the block; the others take their share. With all masked, the new expert is alone."""
    _, state = single_adapter(model, adapter_name)
    if isinstance(experts, str):
        raise ValueError(f"mask_experts takes a list of names, got {experts!r}. Write [{experts!r}].")
    _check_names(experts, state)
    state.settle()
    with changed(state, masked=state.masked | frozenset(experts)):
        yield


def regularization_loss(model: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
    """`balance_weight` x balance + `entropy_weight` x entropy of the gates in the last training step: a term for the loss.

    A model that returns a loss (transformers, given labels; so also `Trainer`) has the term in it already; then this is its value alone,
    without a gradient. Who computes the loss outside adds it there. Zero where both weights are 0.
    """
    _, state = single_adapter(model, adapter_name)
    return state.loss_term()


def gate_vector(gates: Mapping[str, float] | torch.Tensor, state: MixtureState) -> torch.Tensor:
    """(E,) the gates that are the same for all rows and weights."""
    if isinstance(gates, torch.Tensor):
        if gates.shape != (len(state.experts),) or not gates.is_floating_point():
            raise ValueError(
                f"Gates for all rows are a floating point tensor of shape ({len(state.experts)},), one per expert "
                f"({', '.join(state.experts)}); got {gates.dtype} {tuple(gates.shape)}."
            )
        vector = gates.detach().clone()
    else:
        _check_names(gates, state)
        vector = torch.tensor([float(gates.get(name, 0.0)) for name in state.experts])
    if not torch.isfinite(vector).all():
        raise ValueError(f"Gates must be finite numbers, got {vector.tolist()}.")
    return vector


def gates_per_module(model: nn.Module, adapter_name: str, state: MixtureState, gates: Any) -> dict[str, torch.Tensor] | None:
    """Module name -> (E,) gates, of gates that are the same for all rows; None if they are a row's own."""
    return _fixed(model, adapter_name, state, gates)


def _fixed(model: nn.Module, adapter_name: str, state: MixtureState, gates: Any) -> dict[str, torch.Tensor] | None:
    if hasattr(gates, "mean_gates"):  # a GateReport
        gates = gates.mean_gates()
    layers = adapted_layers(model, adapter_name)
    routed = {module for module, layer in layers.items() if layer.has_experts(adapter_name)}
    if isinstance(gates, Mapping) and gates and all(isinstance(value, torch.Tensor) for value in gates.values()):
        if set(gates) != routed:
            missing, unknown = sorted(routed - set(gates)), sorted(set(gates) - routed)
            raise ValueError(
                f"Gates per weight: {len(missing)} missing{_first(missing)}, {len(unknown)} unknown{_first(unknown)}. "
                f"Give one set of gates for each of the {len(routed)} weights with experts."
            )
        return {module: gate_vector(value, state) for module, value in gates.items()}
    if isinstance(gates, Mapping) or (isinstance(gates, torch.Tensor) and gates.dim() == 1):
        vector = gate_vector(gates, state)
        return dict.fromkeys(layers, vector)
    return None


def _first(names: Sequence[str]) -> str:
    return f" (the first is {names[0]})" if names else ""


def _routing(gates: Any, state: MixtureState, device: torch.device) -> Routing:
    num_experts = len(state.experts)
    if isinstance(gates, Routing):
        if bool(((gates.indices < 0) | (gates.indices >= num_experts)).any()):
            raise ValueError(f"The routing names expert {int(gates.indices.max())}; there are {num_experts}, numbered from 0.")
        return gates.to(device)
    if isinstance(gates, torch.Tensor):
        if gates.dim() != 2 or gates.shape[1] != num_experts:
            raise ValueError(
                f"Gates per row are a tensor (rows, {num_experts}), one column per expert ({', '.join(state.experts)}); got "
                f"{tuple(gates.shape)}."
            )
        return Routing.mixture(gates.to(device))
    if isinstance(gates, str) or not isinstance(gates, Sequence):
        raise ValueError(f"gates must be a dict, a tensor, a Routing, a GateReport or a list with one entry per row; got {gates!r}.")
    return Routing.mixture(torch.stack([row_gates(entry, state) for entry in gates]).to(device))


def row_gates(entry: Any, state: MixtureState) -> torch.Tensor:
    """(E,) one row's gates, of what `use_gates` takes for a row."""
    if entry is None:
        return torch.zeros(len(state.experts))
    if isinstance(entry, str):
        return gate_vector({entry: 1.0}, state)
    probabilities = getattr(entry, "probabilities", None)
    if probabilities is not None:  # a LanguagePosterior knows many languages that are no experts
        share = torch.tensor([float(probabilities.get(name, 0.0)) for name in state.experts])
        return share / share.sum() if share.sum() > 0 else share
    return gate_vector(entry, state)


def _check_names(names: Collection[str], state: MixtureState) -> None:
    for name in names:
        if name not in state.experts:
            near = difflib.get_close_matches(str(name), state.experts, n=1)
            raise ValueError(
                f"No expert {name!r}. Known: {', '.join(state.experts) or 'none'}.{f' Did you mean {near[0]!r}?' if near else ''}"
            )


def _device(model: nn.Module, adapter_name: str) -> torch.device:
    return next(layer.weight.device for layer in adapted_layers(model, adapter_name).values())
