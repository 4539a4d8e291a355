"""LoRA-MoE on one weight: forward, merge, unmerge. What it shares with the other weights is in `MixtureState` (moe_state.py).

y = W0 x + c B A x + sum over experts e of g_e B_e A_e x

A: (r, d_in), B: (d_out, r): the new expert; always on, trained
A_e, B_e: the given experts, stacked: (E, R, d_in) and, rank by rank, (E, R, d_out); their scaling is in B_e
g: the gates, (E,) for all rows, (rows, E) per recording or (rows, T, E) per position
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from whisper_moe.experts import (
    Gathered,
    add_experts,
    add_gated,
    add_gathered,
    add_shared,
    add_up,
    gather,
    gathering_pays,
    mixed_weight,
    mixing_weight_pays,
    positions,
    project_down,
)
from whisper_moe.moe_config import LoraMoeConfig, prior_of
from whisper_moe.moe_state import MixtureState, fixed_routing, version, without_masked
from whisper_moe.router import gates_of, keep_largest, largest
from whisper_moe.routing import Routing

BASE_MODEL = "__base__"  # PEFT's name, in `adapter_names`, for a row that uses no adapter
EXPERT_NAMES = ("loramoe_experts_A", "loramoe_experts_B")


@dataclass(frozen=True)
class Gates:
    """The gates of one weight in one call: a `routing` per row, or dense `per_position` gates (rows, T, E).

    Where they hold for many calls, as in the token steps of an utterance, they are made ready once.
    """

    routing: Routing | None = None
    per_position: torch.Tensor | None = None
    common: bool = False  # every row has the same
    coefficients: torch.Tensor | None = None  # (rows, E * R) the routing made ready: every expert's gate, once for each of its ranks
    gathered: Gathered | None = None  # or the experts of each row collected


class LoraMoeLayer(nn.Module, BaseTunerLayer):
    """LoRA-MoE on `nn.Linear`, on transformers' `Conv1D` (whose weight is stored transposed) and on quantised linear layers."""

    adapter_layer_names = (
        "loramoe_A", "loramoe_B", "loramoe_experts_A", "loramoe_experts_B", "loramoe_router_weight", "loramoe_router_bias",
    )  # fmt: skip
    other_param_names = ("loramoe_dropout", "configs", "states", "module_names", "reads_utterance")

    # What PEFT's mixin brings; said here because the type checker sees PEFT as untyped.
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], torch.Tensor]
    set_base_weight: Callable[[torch.Tensor], None]
    set_adapter: Callable[..., None]
    weight: torch.Tensor
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        quantization = kwargs.pop("quantization", {})
        self.base_layer = base_layer
        self.transposes_weight = isinstance(self.get_base_layer(), Conv1D)  # the base weight is stored as (d_in, d_out)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.loramoe_A = nn.ParameterDict()
        self.loramoe_B = nn.ParameterDict()
        self.loramoe_experts_A = nn.ParameterDict()
        self.loramoe_experts_B = nn.ParameterDict()
        self.loramoe_router_weight = nn.ParameterDict()
        self.loramoe_router_bias = nn.ParameterDict()
        self.loramoe_dropout = nn.ModuleDict()
        self.configs: dict[str, LoraMoeConfig] = {}
        self.states: dict[str, MixtureState] = {}
        self.module_names: dict[str, str] = {}
        self.reads_utterance: dict[str, bool] = {}  # whether an utterance router reads the encoder's output, not this layer's input
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._merged_gates: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def update_layer(
        self,
        adapter_name: str,
        config: LoraMoeConfig,
        state: MixtureState,
        module_name: str,
        experts: tuple[torch.Tensor, torch.Tensor] | None,
        utterance_size: int | None,
    ) -> None:
        """Give this layer an adapter.

        `experts`: A (E, R, d_in) and B (E, R, d_out), or None where no expert adapts this weight. `utterance_size`: width of the encoder's
        output where the weight is the decoder's, whose utterance routers read that; None elsewhere.
        """
        self.configs[adapter_name] = config
        self.states[adapter_name] = state
        self.module_names[adapter_name] = module_name
        self.reads_utterance[adapter_name] = config.router == "utterance" and utterance_size is not None
        dropout = config.loramoe_dropout
        self.loramoe_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if config.new_expert:
            self.loramoe_A[adapter_name] = nn.Parameter(torch.empty(config.r, self.in_features))
            self.loramoe_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        if experts is not None:
            for name, tensor in zip(EXPERT_NAMES, experts, strict=True):
                getattr(self, name)[adapter_name] = nn.Parameter(tensor, requires_grad=False)
            self._make_router(adapter_name, utterance_size)
            if not config.train_experts:
                self.frozen_peft_weight_names[adapter_name] = EXPERT_NAMES
        self._initialize(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        state.join()

    def _make_router(self, adapter_name: str, utterance_size: int | None) -> None:
        config = self.configs[adapter_name]
        names = config.names
        if config.router in ("utterance", "token"):
            size = utterance_size if self.reads_utterance[adapter_name] and utterance_size is not None else self.in_features
            self.loramoe_router_weight[adapter_name] = nn.Parameter(torch.zeros(len(names), size))
        if config.router != "language":
            log_prior = [config.temperature * math.log(part) for part in prior_of(config.prior, names)]  # the gates are the prior exactly
            self.loramoe_router_bias[adapter_name] = nn.Parameter(torch.tensor(log_prior))

    def _initialize(self, adapter_name: str) -> None:
        config = self.configs[adapter_name]
        if config.new_expert and not self.loramoe_A[adapter_name].is_meta:
            nn.init.kaiming_uniform_(self.loramoe_A[adapter_name], a=math.sqrt(5))  # as LoRA does
            if not config.init_weights:
                nn.init.kaiming_uniform_(self.loramoe_B[adapter_name], a=math.sqrt(5))
        if adapter_name in self.loramoe_router_weight and not config.init_weights:
            nn.init.normal_(self.loramoe_router_weight[adapter_name])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version makes new parameters where device or dtype change, and those always require a gradient.
        required = {name: getattr(self, name)[adapter_name].requires_grad for name in self.parameter_dicts_with(adapter_name)}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, requires_grad in required.items():
            getattr(self, name)[adapter_name].requires_grad_(requires_grad)

    def parameter_dicts_with(self, adapter_name: str) -> list[str]:
        return [name for name in self.adapter_layer_names if adapter_name in getattr(self, name)]

    def delete_adapter(self, adapter_name: str) -> None:
        state = self.states.get(adapter_name)
        super().delete_adapter(adapter_name)
        if state is not None:
            state.leave()

    # ---- gates -----------------------------------------------------------------------------------------------------------

    def has_experts(self, adapter_name: str) -> bool:
        return adapter_name in self.loramoe_experts_A

    def gates(self, x: torch.Tensor, adapter_name: str, rows: Sequence[int] | None = None, num_rows: int = 0) -> Gates | None:
        """The gates for an input x (rows, T, d_in) or (rows, d_in); None where no expert takes part.

        `rows`: x holds only these rows of a batch of `num_rows` (in `adapter_names`).
        """
        state = self.states[adapter_name]
        if not self.has_experts(adapter_name) or state.all_masked:
            return None
        key = None if rows is not None or not state.may_remember else self._key(adapter_name, x.shape[0])
        module = self.module_names[adapter_name]
        if key is not None:
            A, B = self.loramoe_experts_A[adapter_name], self.loramoe_experts_B[adapter_name]
            key = (*key, A, version(A), A.dtype, A.device, B, version(B))
        known = None if key is None else state.remembered(module, key)
        if known is not None:
            return known
        gates = self._new_gates(x, adapter_name, rows, num_rows)
        if key is not None:
            gates = self._made_ready(gates, adapter_name)
            state.remember(module, key, gates)
        return gates

    def _key(self, adapter_name: str, num_rows: int) -> tuple[Any, ...] | None:
        """What the gates depend on, if that outlives this call: the same key, the same gates. None if they depend on the input."""
        state, config = self.states[adapter_name], self.configs[adapter_name]
        if state.fixed is not None:
            return (state.fixed, num_rows, state.masked)
        if state.slot.current is not None:
            return (state.slot.current, num_rows, state.masked)
        if config.router == "language":
            return None if config.prior is None else (config, num_rows, state.masked)
        bias = self.loramoe_router_bias[adapter_name]
        if config.router == "static":
            return (bias, version(bias), num_rows, state.masked)
        if not self.reads_utterance[adapter_name] or state.utterance is None:
            return None
        weight = self.loramoe_router_weight[adapter_name]
        return (state.utterance, weight, version(weight), bias, version(bias), state.masked)

    def _new_gates(self, x: torch.Tensor, adapter_name: str, rows: Sequence[int] | None, num_rows: int) -> Gates:
        state, config = self.states[adapter_name], self.configs[adapter_name]
        module = self.module_names[adapter_name]
        given = self.given_gates(adapter_name, x.device)
        if given is not None:
            state.saw(module, given)
            return Gates(_everyone(given.expand(x.shape[0], -1)), common=True)
        if state.slot.current is not None:
            routing = fixed_routing(state, x.shape[0] if rows is None else num_rows)
            assert routing is not None
            routing = routing if rows is None else routing.select(rows)
            if state.recorder is not None:
                state.saw(module, routing.dense(len(state.experts)))
            return Gates(routing, common=x.shape[0] == 1)
        if config.router == "language":
            raise ValueError(
                "router='language' takes its gates from the caller, and none were given. Run the model inside "
                "`with model.base_model.use_gates([posterior, ...]):`, one entry per row, or give the configuration a prior."
            )
        weight, bias = self.loramoe_router_weight[adapter_name], self.loramoe_router_bias[adapter_name]
        read = x if config.router == "token" else self._read(x, adapter_name, rows)
        dense = gates_of(F.linear(read.to(weight.dtype), weight, bias), config.temperature, state.kept(x.device))
        state.saw(module, dense, config.top_k)
        if config.router == "token" and x.dim() == 3:
            return Gates(per_position=keep_largest(dense, config.top_k))
        takes_all = config.top_k is None or config.top_k == dense.shape[1]
        routing = _everyone(dense) if takes_all else Routing(*largest(dense, config.top_k))  # type: ignore[arg-type]
        return Gates(routing, common=x.shape[0] == 1)

    def _made_ready(self, gates: Gates, adapter_name: str) -> Gates:
        """The gates with the work that does not depend on the input done: good for every call with the same gates."""
        assert gates.routing is not None
        A, B = self.loramoe_experts_A[adapter_name], self.loramoe_experts_B[adapter_name].mT
        num_experts, rank = A.shape[0], A.shape[1]
        routing = gates.routing
        if routing.k < num_experts and routing.num_rows * routing.k <= num_experts:  # no more memory than the stack has
            return replace(gates, gathered=gather(A, B, routing))
        return replace(gates, coefficients=routing.dense(num_experts).repeat_interleave(rank, dim=1))

    def _read(self, x: torch.Tensor, adapter_name: str, rows: Sequence[int] | None) -> torch.Tensor:
        """(rows, d) what an utterance router reads: the encoder's pooled output inside the decoder, else this layer's pooled input."""
        state = self.states[adapter_name]
        if not self.reads_utterance[adapter_name]:
            return state.pooled(x)
        if state.utterance is None:
            raise ValueError(
                "This decoder was called without encoder_hidden_states as a keyword, so its router has no recording to read. Call the "
                "whole model, or use router='token'."
            )
        return state.utterance if rows is None else state.utterance[list(rows)]

    def given_gates(self, adapter_name: str, device: torch.device) -> torch.Tensor | None:
        """(E,) gates that do not depend on the input, without masked experts: fixed for this weight, static, the prior. None: they do."""
        state, config = self.states[adapter_name], self.configs[adapter_name]
        if state.fixed is not None:
            module = self.module_names[adapter_name]
            if module not in state.fixed:
                raise ValueError(f"The given gates have none for {module}. Give one set for all weights, or one for each of them.")
            routing = _everyone(state.fixed[module].to(device)[None])
            return without_masked(routing, state).dense(len(state.experts))[0]
        if state.slot.current is not None:
            return None
        keep = state.kept(device)
        if config.router == "static":
            return keep_largest(gates_of(self.loramoe_router_bias[adapter_name], config.temperature, keep), config.top_k)
        if config.router == "language" and config.prior is not None:
            prior = torch.tensor(prior_of(config.prior, config.names), device=device)
            return keep_largest(gates_of(prior.log(), 1.0, keep), config.top_k)
        return None

    def constant_gates(self, adapter_name: str) -> torch.Tensor | None:
        """(E,) the gates as they are now, if they are the same for every input; None if they depend on it."""
        state = self.states[adapter_name]
        state.settle()
        num_experts = len(state.experts)
        if not self.has_experts(adapter_name) or state.all_masked:
            return torch.zeros(num_experts)
        given = self.given_gates(adapter_name, self.loramoe_experts_A[adapter_name].device)
        if given is not None:
            return given
        routing = None if state.slot.current is None else fixed_routing(state, state.slot.current.num_rows)
        if routing is None or routing.num_rows == 0:
            return None
        dense = routing.dense(num_experts)
        return dense[0] if torch.equal(dense, dense[:1].expand_as(dense)) else None

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # (..., d_in) -> (..., d_out)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if x.numel() == 0:  # no rows or no positions: nothing is added to nothing
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(self.base_layer(x, *args, **kwargs), x, adapter_names)
        names = [name for name in self.active_adapters if name in self.states]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        plain = _is_plain(self.base_layer) and not args and not kwargs
        shape, x = x.shape, x if x.dim() in (2, 3) else x.reshape(x.shape[0], -1, x.shape[-1])
        gates = {name: self.gates(x, name) for name in names}
        if plain and self._weight_is_cheaper(x, gates):
            y = F.linear(x, self._weight_with(gates), self.base_layer.bias)  # type: ignore[arg-type]
            return y.view(*shape[:-1], self.out_features)
        # Flat: see experts.py. Of another layer somebody else may hold the output, or it may be a view.
        y = self.base_layer(x.reshape(-1, self.in_features)) if plain else self.base_layer(x, *args, **kwargs).clone()
        for name in names:
            y = self._add(y, x, name, gates[name])
        return y if y.dim() == len(shape) else y.view(*shape[:-1], self.out_features)

    def _add(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str, gates: Gates | None) -> torch.Tensor:
        """y, which may be flat, plus one adapter's part, in place where possible."""
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)  # (rows * T, d_in)
        if adapter_name in self.loramoe_A:
            config = self.configs[adapter_name]
            dropped = self.loramoe_dropout[adapter_name](flat) if self.training else flat
            hidden = project_down(dropped, self.loramoe_A[adapter_name])
            y = add_up(y, hidden if config.scaling == 1 else hidden * config.scaling, self.loramoe_B[adapter_name].mT)
        if gates is None:
            return y
        experts_A, experts_B = self.loramoe_experts_A[adapter_name], self.loramoe_experts_B[adapter_name]
        if gates.gathered is not None:
            return add_gathered(y, x, gates.gathered)
        if gates.per_position is not None:
            return add_gated(y, x, experts_A, experts_B.mT, gates.per_position)
        assert gates.routing is not None
        length = positions(x)
        if gates.coefficients is not None and not gathering_pays(x.shape[0], length, gates.routing.k, len(experts_A)):
            apart = x if x.shape[0] > 1 and length > 1 else flat  # one coefficient per row of x
            return add_shared(y, apart, experts_A.flatten(0, 1), experts_B.flatten(0, 1).mT, gates.coefficients)
        return add_experts(y, x, experts_A, experts_B.mT, gates.routing)

    def _weight_is_cheaper(self, x: torch.Tensor, gates: dict[str, Gates | None]) -> bool:
        """Whether to add the adapters to a copy of the weight: where nothing is trained, all rows share the gates, and there are many."""
        return (
            not torch.is_grad_enabled()
            and x.dtype in (torch.float32, torch.float64)  # the sum would be rounded to fewer digits than the parts have
            and x.dtype == self.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and all(g is None or g.common for g in gates.values())
            and not self.training
            and mixing_weight_pays(x.numel() // self.in_features, self.in_features, self.out_features)
        )

    def _weight_with(self, gates: dict[str, Gates | None]) -> torch.Tensor:
        """The weight with all active adapters added, for gates that all rows share. One product per adapter."""
        weight = self.weight
        for name, g in gates.items():
            routing = None if g is None else g.routing
            weight = mixed_weight(weight, *self._pair(name, None if routing is None else (routing.indices[0], routing.weights[0])))
        return weight

    def _pair(self, adapter_name: str, gates: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter as one low-rank pair, ranks side by side: A (n, d_in) and B rank by rank (n, d_out). `gates`: indices and weights."""
        A, B = [], []
        if adapter_name in self.loramoe_A:
            A.append(self.loramoe_A[adapter_name])
            B.append(self.loramoe_B[adapter_name].mT * self.configs[adapter_name].scaling)
        if gates is not None and self.has_experts(adapter_name):
            indices, weights = gates
            experts_A, experts_B = self.loramoe_experts_A[adapter_name], self.loramoe_experts_B[adapter_name]
            A.append(experts_A[indices].flatten(0, 1))
            B.append((experts_B[indices] * weights[:, None, None].to(experts_B.dtype)).flatten(0, 1))
        if not A:
            weight = self.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32  # packed weights are integers
            return weight.new_zeros(0, self.in_features, dtype=dtype), weight.new_zeros(0, self.out_features, dtype=dtype)
        return torch.cat(A), torch.cat(B)

    def low_rank(self, adapter_name: str, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter under fixed gates (E,) as one exact LoRA: A (n, d_in) and B (d_out, n). Experts whose gate is 0 are left out."""
        indices = gates.nonzero()[:, 0]
        A, B = self._pair(adapter_name, (indices.to(self.weight.device), gates[indices].to(self.weight.device)))
        return A, B.mT

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")

    def _mixed_batch(self, result: torch.Tensor, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Row i of the batch goes through the adapter `adapter_names[i]`; rows of the base model stay as they are."""
        result = result.clone()
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name == BASE_MODEL or adapter_name not in self.states:
                continue
            rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
            part = x[rows]
            result[rows] = self._add(result[rows], part, adapter_name, self.gates(part, adapter_name, rows, len(x)))
        return result

    # ---- merging ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, gates: torch.Tensor | None = None) -> torch.Tensor:
        """What the adapter adds to the base weight, in the base weight's layout, under `gates` (E,) or the gates that are fixed now.

        Raises:
            ValueError: The gates depend on the input.
        """
        gates = self.constant_gates(adapter_name) if gates is None else gates
        if gates is None:
            raise ValueError(input_dependent(adapter_name, self.configs[adapter_name].router))
        A, B = self.low_rank(adapter_name, gates)
        dtype = A.dtype
        if A.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):  # half precision is slow there, and less exact
            A, B = A.float(), B.float()
        delta = (B @ A).to(dtype)  # (d_out, d_in)
        return delta.T if self.transposes_weight else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters (default: the active ones) to the base weight, under the gates that are fixed now.

        `safe_merge`: on a copy, refused if it is not finite. Gates that depend on the input are refused before anything is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.states]
        gates = {name: self.constant_gates(name) for name in names}
        for name in names:
            if gates[name] is None:
                raise ValueError(input_dependent(name, self.configs[name].router))
        for name in names:
            fixed = gates[name]
            assert fixed is not None
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(name, fixed).to(weight.device, weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(weight)
            self.merged_adapters.append(name)
            self._merged_gates[name] = fixed.detach().clone()

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again, under the gates they were merged with."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.states:
                weight = self.get_base_weight()
                weight -= self.get_delta_weight(name, self._merged_gates.pop(name)).to(weight.device, weight.dtype)
                self.set_base_weight(weight)

    def extra_repr(self) -> str:
        mixtures = ", ".join(f"{name}: {', '.join(state.experts) or 'no experts'}" for name, state in self.states.items())
        return ", ".join(part for part in (f"{{{mixtures}}}", quantization_extra_repr(self)) if part)

    def __repr__(self) -> str:
        return "loramoe." + super().__repr__()


def input_dependent(adapter_name: str, router: str | None) -> str:
    """The message for a mixture that is no single matrix."""
    return (
        f"Adapter {adapter_name!r} has router={router!r}: its gates depend on the input, so it is no fixed matrix and cannot be merged or "
        "exported as it is. Fix the gates first (`with model.base_model.use_gates(...)`, or to_lora(gates=...)), turn the mixture into "
        "one LoRA with distil(...), or train with router='static'."
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is the product with its weight and nothing else: no hooks, no forward of somebody else's."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in layer.__dict__


def _everyone(gates: torch.Tensor) -> Routing:
    """Dense gates (rows, E) as a routing in which every row has every expert. No check of values: those are a router's."""
    return Routing(torch.arange(gates.shape[1], device=gates.device).expand(gates.shape), gates)
