"""Mixtures with routers (LoRA-MoE) as languages of a table: `MoeStack` stores them, and a row of a batch uses one through `MoeUse`.

A mixture is stored as one low-rank pair per weight, the ranks of its new expert first and then those of its experts, and its router beside
it. What a row adds is then two batched products with the gates between them, whichever mixtures the rows use:

    y += B (g * A x)        A: (N, d_in), B: (d_out, N)       g: (N,) 1 for the ranks of the new expert, else the gate of the rank's expert

Routers of all kinds are one formula with other numbers, so that a batch may hold any of them: `softmax(W u + b)`, where u is what the
router reads (nothing for "static": W = 0), the top k of a row's own k, and rows whose gates are given. "token" reads every position and has
stacks of its own. What an "utterance" router reads in the decoder is known before its first layer, so the gates of all decoder weights are
made at once there, and again only when the recording changes.

Letters: G rows of the batch, or 1 that stands for all of them; k mixtures per row; E experts; N ranks; C stretches of positions with gates
of their own: a row of the batch each, or a position each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from whisper_moe.adapter_files import CONFIG_FILE, AdapterFiles, Pair
from whisper_moe.language_stacks import FactorStack, Row, Size, keeps_storage, rank_bucket
from whisper_moe.moe_state import MixtureState, without_masked
from whisper_moe.routed_linear import LoraPart, MoePart, Part, rows_message
from whisper_moe.router import gates_of, keep_largest
from whisper_moe.routing import Routing, rescaled

READS_POSITIONS, READS_RECORDING, IS_GIVEN = "token", "utterance", "language"  # routers; "static" reads nothing
_A, _B, _EXPERTS_A, _EXPERTS_B = "loramoe_A", "loramoe_B", "loramoe_experts_A", "loramoe_experts_B"
_ROUTER_WEIGHT, _ROUTER_BIAS = "loramoe_router_weight", "loramoe_router_bias"
_KINDS = (_A, _B, _EXPERTS_A, _EXPERTS_B, _ROUTER_WEIGHT, _ROUTER_BIAS)

Router = tuple["torch.Tensor | None", torch.Tensor]  # W (E, d) and b (E,)
Record: TypeAlias = "Callable[[str, torch.Tensor], None]"  # weight, and its gates (rows, E) or (rows, positions, E)


# ---- one mixture -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeSpec:
    """What a mixture is, apart from its numbers.

    Args:
        experts: Names of the experts, in the order of the gates.
        router: Where the gates come from.
        top_k: How many gates are kept; None: all.
        temperature: The gates are `softmax(scores / temperature)`.
        prior: The gates where nobody gives any, for router "language"; None if there are none.
        rank: Ranks of the new expert, 0 without one.
        expert_rank: Ranks of each expert.
    """

    experts: tuple[str, ...]
    router: str
    top_k: int | None
    temperature: float
    prior: tuple[float, ...] | None
    rank: int
    expert_rank: int

    @property
    def num_ranks(self) -> int:
        return self.rank + len(self.experts) * self.expert_rank

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> MoeSpec:
        """Back out of `as_dict`, by way of JSON too."""
        prior = fields["prior"]
        return cls(**{**fields, "experts": tuple(fields["experts"]), "prior": None if prior is None else tuple(prior)})


@dataclass(frozen=True)
class Mixture:
    """A mixture as it was read: its `spec`, one pair (d_in, d_out and at most `spec.num_ranks` ranks) per weight, and its routers."""

    spec: MoeSpec
    pairs: dict[str, Pair]
    routers: dict[str, Router]


def read_mixture(files: AdapterFiles, model: nn.Module, sizes: Mapping[str, Size]) -> Mixture:
    """A LoRA-MoE adapter as the table stores it, with its experts read from their own files where it refers to them.

    Args:
        files: The adapter.
        model: The base model.
        sizes: Module name -> (d_out, d_in), of the weights that may be adapted.

    Raises:
        ValueError: The file is incomplete, does not fit its configuration or this model, or an expert has changed.
    """
    from whisper_moe.moe_config import LoraMoeConfig, prior_of

    known = ("r", "loramoe_alpha", "router", "top_k", "temperature", "prior", "new_expert", "experts", "expert_names")
    config = LoraMoeConfig(**{name: files.config[name] for name in known if files.config.get(name) is not None})
    tensors = _by_weight(files, sizes)
    if config.names and not any(_EXPERTS_A in found for found in tensors.values()):
        _add_referred_experts(files, config.experts, model, sizes, tensors)
    ranks = {found[_EXPERTS_A].shape[1] for found in tensors.values() if _EXPERTS_A in found}
    spec = MoeSpec(
        experts=tuple(config.names),
        router=config.router or "static",
        top_k=config.top_k,
        temperature=float(config.temperature),
        prior=None if config.prior is None else tuple(prior_of(config.prior, config.names)),
        rank=config.r if config.new_expert else 0,
        expert_rank=max(ranks, default=0),
    )
    width = getattr(getattr(model, "config", None), "d_model", None)
    for name, found in tensors.items():
        _check_tensors(files.label, name, found, spec, sizes[name], None if is_encoder(name) else width)
    pairs = {name: _pair(found, spec, config.scaling, sizes[name]) for name, found in tensors.items()}
    routers = {name: _router(found, spec) for name, found in tensors.items() if _EXPERTS_A in found}
    return Mixture(spec, pairs, routers)


def is_encoder(name: str) -> bool:
    """Whether a weight is the encoder's. All others come after it, and their routers can read the whole recording."""
    return ".encoder.layers." in f".{name}"


def _by_weight(files: AdapterFiles, sizes: Mapping[str, Size]) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> kind of tensor -> tensor."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in files.tensors.items():
        name, _, kind = key.rpartition(".")
        if kind not in _KINDS:
            raise ValueError(f"{files.label} holds {key!r}, which is not part of a LoRA-MoE on linear layers. The table cannot use it.")
        tensors.setdefault(name, {})[kind] = tensor
    return {name: tensors[name] for name in (*(n for n in sizes if n in tensors), *(n for n in tensors if n not in sizes))}


def _add_referred_experts(
    files: AdapterFiles,
    sources: Any,
    model: nn.Module,
    sizes: Mapping[str, Size],
    tensors: dict[str, dict[str, torch.Tensor]],
) -> None:
    """The experts of an adapter that was saved by reference, from where it says they are."""
    from whisper_moe.expert_files import check_hashes, read_experts, stack

    if not isinstance(sources, Mapping):
        raise ValueError(f"{files.label} names experts, but holds none and does not say where they are. Its file is incomplete.")
    experts = read_experts(sources, model, sizes)
    check_hashes(experts, files.config.get("expert_hashes") or {}, sources)
    for name in dict.fromkeys(module for expert in experts for module in expert.pairs):
        stacked = stack(experts, name, *sizes[name])
        assert stacked is not None
        tensors.setdefault(name, {}).update(zip((_EXPERTS_A, _EXPERTS_B), stacked, strict=True))


def _check_tensors(label: str, name: str, found: Mapping[str, torch.Tensor], spec: MoeSpec, size: Size, reads_width: int | None) -> None:
    """Refuse tensors of one weight that do not belong together, or to this model."""
    (d_out, d_in), num_experts = size, len(spec.experts)
    expected: dict[str, tuple[int, ...]] = {}
    if spec.rank:
        expected |= {_A: (spec.rank, d_in), _B: (d_out, spec.rank)}
    if _EXPERTS_A in found or _EXPERTS_B in found:
        rank = found.get(_EXPERTS_A, found.get(_EXPERTS_B)).shape[1]  # type: ignore[union-attr]
        expected |= {_EXPERTS_A: (num_experts, rank, d_in), _EXPERTS_B: (num_experts, rank, d_out)}
        if spec.router != IS_GIVEN:
            expected[_ROUTER_BIAS] = (num_experts,)
        if spec.router in (READS_POSITIONS, READS_RECORDING):
            reads = d_in if reads_width is None or spec.router == READS_POSITIONS else reads_width
            expected[_ROUTER_WEIGHT] = (num_experts, reads)
    for kind in {**expected, **found}:
        came = tuple(found[kind].shape) if kind in found else None
        if came != expected.get(kind):
            raise ValueError(
                f"{label}: {name}.{kind} should be {expected.get(kind) or 'none'} and is {came or 'none'} (a weight of ({d_out}, {d_in}), "
                f"router={spec.router!r}, experts {', '.join(spec.experts) or 'none'}, r={spec.rank}). {CONFIG_FILE} and the weights are "
                "of different adapters, or it was made for another base."
            )


def _pair(found: Mapping[str, torch.Tensor], spec: MoeSpec, scaling: float, size: Size) -> Pair:
    """All experts of one weight as A (N, d_in) and B (d_out, N), each at the place that its ranks have in every weight."""
    d_out, d_in = size
    kind = next(iter(found.values())).dtype
    A, B = torch.zeros(spec.num_ranks, d_in, dtype=kind), torch.zeros(spec.num_ranks, d_out, dtype=kind)
    if _A in found:
        A[: spec.rank], B[: spec.rank] = found[_A], found[_B].mT * scaling
    if _EXPERTS_A in found:
        rank = found[_EXPERTS_A].shape[1]
        for whole, part in ((A, found[_EXPERTS_A]), (B, found[_EXPERTS_B])):
            whole[spec.rank :].view(len(spec.experts), spec.expert_rank, -1)[:, :rank] = part
    return A, B.mT


def _router(found: Mapping[str, torch.Tensor], spec: MoeSpec) -> Router:
    bias = found.get(_ROUTER_BIAS)
    return found.get(_ROUTER_WEIGHT), torch.zeros(len(spec.experts)) if bias is None else bias


# ---- a mixture in a row of a batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeUse:
    """A mixture in one row.

    Args:
        slot: Where it lies in its stack.
        weight: How strongly the row uses it.
        spec: What it is.
        gates: The gates, if they do not come from the router.
        masked: Experts that are left out.
    """

    slot: int
    weight: float
    spec: MoeSpec
    gates: tuple[float, ...] | None = None
    masked: frozenset[str] = frozenset()

    @property
    def reads(self) -> bool:
        """Whether its gates depend on the input."""
        return self.gates is None and self.spec.router in (READS_POSITIONS, READS_RECORDING)


def gates_for(spec: MoeSpec, given: Any, masked: frozenset[str]) -> tuple[float, ...] | None:
    """The gates of a row, as far as they are known before the model runs; None if they are the router's.

    Args:
        spec: The mixture.
        given: What the caller gave for the row: an expert's name, a dict expert -> weight, a `LanguagePosterior` (its share of the experts,
            scaled to sum to 1), a tensor (experts,), or None for the router's own.
        masked: Experts that are left out; the others take their share.

    Raises:
        ValueError: An unknown expert, or gates that are not finite or of another number.
    """
    state = MixtureState(spec.experts)
    state.masked = masked
    if state.all_masked:
        return (0.0,) * len(spec.experts)
    if given is not None:
        from whisper_moe.moe_gates import row_gates

        return tuple(without_masked(Routing.mixture(row_gates(given, state)[None]), state).weights[0].tolist())
    if spec.router == IS_GIVEN and spec.prior is not None:
        scores = torch.tensor(spec.prior).log()
        return tuple(keep_largest(gates_of(scores, 1.0, state.kept(scores.device)), spec.top_k).tolist())
    return None


@dataclass(frozen=True)
class _Choice:
    """What rows want of the scores, apart from the routers.

    Args:
        owner: (G, 1, k, N) whole numbers: which expert each rank belongs to; E is the new expert, which is always on.
        learned: (G, 1, k, 1) 1 where the gates come from the router, else 0. None: 1 everywhere.
        given: (G, 1, k, E) the gates where they do not. None with `learned`.
        top_k: (G, 1, k, 1) how many gates are kept. None: all everywhere.
    """

    owner: torch.Tensor
    learned: torch.Tensor | None
    given: torch.Tensor | None
    top_k: torch.Tensor | None

    def gates(self, scores: torch.Tensor) -> torch.Tensor:
        """The gates, (..., G, C, k, E), from the routers' scores (..., G, C, k * E)."""
        k = self.owner.shape[-2]
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        gates = scores.unflatten(-1, (k, -1)).softmax(-1)
        if self.top_k is not None:
            gates = _keep_largest(gates, self.top_k)
        if self.learned is not None and self.given is not None:
            gates = torch.addcmul(self.given.to(gates.dtype), gates, self.learned.to(gates.dtype))
        return gates

    def coefficients(self, gates: torch.Tensor) -> torch.Tensor:
        """The factor of every rank, (..., G, C, k * N), from the gates (..., G, C, k, E)."""
        gates = F.pad(gates, (0, 1), value=1.0)
        return gates.gather(-1, self.owner.expand(*gates.shape[:-1], -1)).flatten(-2)


def _keep_largest(gates: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """As `router.keep_largest`, with a k of its own for each row."""
    ordered, indices = gates.sort(dim=-1, descending=True, stable=True)
    kept = ordered * (torch.arange(gates.shape[-1], device=gates.device) < top_k)
    return torch.zeros_like(gates).scatter(-1, indices, rescaled(kept, ordered.sum(dim=-1, keepdim=True)))


# ---- gates while the model runs ----------------------------------------------------------------------------------------


class GateRecorder:
    """Tells somebody the gates of a batch whose rows all use the same mixture, by itself.

    Args:
        record: Whom to tell.
        num_rows: Rows of the batch.
    """

    def __init__(self, record: Record, num_rows: int) -> None:
        self.record, self.num_rows = record, num_rows
        self.num_experts = 0
        self.weights: frozenset[str] = frozenset()  # that the experts add something to

    def tell(self, name: str, gates: torch.Tensor, rows: int, per_position: bool = False) -> None:
        """The gates of one weight, in the order of (rows, positions) in whatever dimensions, then (1, E)."""
        if name in self.weights:
            own = gates.detach()[..., 0, : self.num_experts].reshape(rows, -1, self.num_experts)
            self.record(name, own if per_position else own[:, 0])

    def tell_all(self, names: Sequence[str], gates: torch.Tensor) -> None:
        """The gates (weights, G, C, 1, E) of several weights, one set for each row of the batch."""
        each = gates.flatten(1, 2).expand(-1, self.num_rows, -1, -1)
        for name, of_weight in zip(names, each, strict=True):
            self.tell(name, of_weight, self.num_rows)


class PooledInput:
    """Mean over the positions of an input (rows, T, d), taken once for the weights that read the same one: q, k and v of a layer.

    Remembered by identity and version, under the conditions of `routed_linear.SharedDown`; the input itself is not held on to.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._pooled: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (rows, T, d) -> (rows, d)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference():
            return x.mean(dim=1)
        if self._pooled is None or self._x is None or self._x() is not x or self._version != x._version:
            self._x, self._version, self._pooled = weakref.ref(x), x._version, x.mean(dim=1)
        return self._pooled

    def forget(self) -> None:
        self._x = self._pooled = None


class InputGates:
    """Gates that come from the layer's own input: pooled for an utterance router in the encoder, every position for a token router.

    Args:
        weight: (G, d, k * E).
        bias: (G, 1, k * E).
        pool: What pools the input; None: every position is read.
        name: Of the weight.
        recorder: Who is told the gates, if anybody.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        choice: _Choice,
        pool: PooledInput | None,
        name: str,
        recorder: GateRecorder | None,
    ) -> None:
        self.weight, self.bias, self.choice, self.pool = weight, bias, choice, pool
        self.name, self.recorder = name, recorder

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (rows * n, T, d) -> (G, C, k * N)
        read = x if self.pool is None else self.pool(x)
        read = read.reshape(self.weight.shape[0], -1, read.shape[-1]).to(self.weight.dtype)  # (G, C, d)
        gates = self.choice.gates(torch.baddbmm(self.bias, read, self.weight))
        if self.recorder is not None:
            self.recorder.tell(self.name, gates, x.shape[0], per_position=self.pool is None)
        return self.choice.coefficients(gates)


class RecordingGates:
    """The gates of all weights that come after the encoder, from its output: made when the decoder begins, for all token steps.

    Args:
        weight: (weights, G, d_model, k * E).
        bias: (weights, G, 1, k * E).
        buffer: (weights, G, C, k * N) where the factors of the ranks are put if they must stay at one address. None: anywhere.
        names: Of the weights.
        recorder: Who is told the gates, if anybody.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        choice: _Choice,
        buffer: torch.Tensor | None,
        names: Sequence[str],
        recorder: GateRecorder | None,
    ) -> None:
        self.weight, self.bias, self.choice, self.buffer = weight, bias, choice, buffer
        self.names, self.recorder = names, recorder
        self.coefficients = buffer
        self.heard = False
        self._states: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._is_recorded = False  # in a CUDA graph, whose replays put other numbers into the buffer without a word

    def hear(self, states: torch.Tensor | None, num_rows: int) -> None:
        """Take the encoder's output (num_rows * n, positions, d_model) that the decoder is about to use; a row's repeats are alike."""
        if states is None:
            self.heard = False
            return
        if states.shape[0] == 0 or states.shape[0] % num_rows:
            raise ValueError(rows_message(states.shape[0], num_rows))
        may_remember = self._may_remember(states)
        if may_remember and self.heard and self._states is not None and self._states() is states and self._version == states._version:
            return
        pooled = states.mean(dim=1).view(num_rows, -1, states.shape[-1])[:, 0]  # (rows, d_model)
        read = pooled.reshape(self.weight.shape[1], -1, pooled.shape[-1]).to(self.weight.dtype)  # (G, C, d_model)
        gates = self.choice.gates(torch.matmul(read, self.weight) + self.bias)
        if self.recorder is not None:
            self.recorder.tell_all(self.names, gates)
        found = self.choice.coefficients(gates)
        if self.buffer is None:
            self.coefficients = found
        else:
            self.buffer.copy_(found.detach())
        self.heard = True
        if may_remember:
            self._states, self._version = weakref.ref(states), states._version
        else:
            self._states = None

    def _may_remember(self, states: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():
            return False
        if states.is_cuda and torch.cuda.is_current_stream_capturing():
            self._is_recorded = True
        return not (self._is_recorded or torch.is_grad_enabled() or states.is_inference())

    def forget(self) -> None:
        """Let the next decoder call make the gates anew."""
        self.heard, self._states = False, None


class RecordedGates:
    """One weight's share of `RecordingGates`."""

    def __init__(self, recording: RecordingGates, number: int) -> None:
        self.recording, self.number = recording, number

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # -> (G, C, k * N)
        found = self.recording.coefficients
        if not self.recording.heard or found is None:
            raise ValueError(
                "This decoder was called without encoder_hidden_states as a keyword, so its router has no recording to read. Call the "
                "whole model, or use router='token'."
            )
        return found[self.number]


def recordings_of(parts: Mapping[str, Part]) -> list[RecordingGates]:
    """Whoever among the parts must hear the recording before the decoder begins."""
    gates = [part.coefficients for part in parts.values() if isinstance(part, MoePart)]
    return list({id(each.recording): each.recording for each in gates if isinstance(each, RecordedGates)}.values())


# ---- the stack ---------------------------------------------------------------------------------------------------------


class MoeStack(FactorStack):
    """Mixtures of one set of weights and about one size.

    Args:
        sizes: Size of each weight, by name, in the order of the model's layers.
        rank: Ranks of the storage, those of all experts together.
        num_experts: Experts of the storage.
        per_position: Whether its routers read every position.
        width: Of the encoder's output.
    """

    @keeps_storage
    def __init__(
        self,
        sizes: Mapping[str, Size],
        rank: int,
        num_experts: int,
        per_position: bool,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(sizes, rank, device, dtype)
        self.num_experts, self.per_position, self.width = num_experts, per_position, width
        # Weights whose routers read something of one size; None: the recording, by all weights after the encoder at once.
        self.readers: dict[int | None, list[str]] = {}
        for name, (_, d_in) in sizes.items():
            self.readers.setdefault(d_in if per_position or is_encoder(name) else None, []).append(name)
        self.by_reader = [name for names in self.readers.values() for name in names]  # the order of the biases
        shapes: list[tuple[int, ...]] = [(len(names), 0, num_experts, d or width) for d, names in self.readers.items()]
        shapes.append((len(self.names), 0, num_experts))  # biases
        self.storage += [torch.zeros(shape, device=device, dtype=_router_dtype(dtype)) for shape in shapes]
        self._pool = None if per_position else PooledInput()

    def fits(self, names: Sequence[str], spec: MoeSpec) -> bool:
        """Whether mixtures of this kind lie in this stack."""
        kind = (tuple(names), ranks_bucket(spec.num_ranks), rank_bucket(len(spec.experts)), spec.router == READS_POSITIONS)
        return kind == (self.names, self.rank, self.num_experts, self.per_position)

    @keeps_storage
    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything; routers stay in single precision at least."""
        self.storage = [
            tensor.to(device, dtype if number < self.num_factors else _router_dtype(dtype)) for number, tensor in enumerate(self.storage)
        ]

    def forget(self) -> None:
        """Let go of what was remembered of a batch."""
        if self._pool is not None:
            self._pool.forget()

    def pack(self, mixture: Mixture) -> Row:
        """A mixture as a row."""
        row = self.pack_pairs(mixture.pairs)
        row += [tensor.new_zeros([*tensor.shape[:1], *tensor.shape[2:]], device="cpu") for tensor in self.storage[self.num_factors :]]
        for tensor, names in zip(row[self.num_factors :], self.readers.values(), strict=False):
            for number, name in enumerate(names):
                weight = mixture.routers[name][0] if name in mixture.routers else None
                if weight is not None:
                    tensor[number, : len(weight)] = weight
        for number, name in enumerate(self.by_reader):
            if name in mixture.routers:
                bias = mixture.routers[name][1]
                row[-1][number, : len(bias)] = bias
        return row

    # Per request: `uses` names for each of G rows k mixtures, or None where a row has fewer.

    def prepare(self, uses: Sequence[Sequence[MoeUse | None]], recorder: GateRecorder | None = None) -> dict[str, Part]:
        """What each weight adds. One row of `uses` stands for all rows of the batch alike. A `recorder` is told the gates: those that are
        known at once, the others when the model runs. Then every row of `uses` has the same mixture, and nothing else."""
        routing = self._routing(uses)
        if recorder is not None:
            use = uses[0][0]
            assert use is not None
            recorder.num_experts, recorder.weights = len(use.spec.experts), self._with_experts(use)
        factors = self.collect(routing)
        routers, choice = self._routers(routing, uses), self._choice(uses)
        used = [use for row in uses for use in row if use is not None]
        if not any(use.reads for use in used):
            gates = choice.gates(routers[-1])
            if recorder is not None:
                recorder.tell_all(self.by_reader, gates)
            return self._constant(factors, choice.coefficients(gates), in_place=factors[0].shape[1] != 1)
        is_mixed = any(use is None or use.gates is not None for row in uses for use in row)
        keeps = any(use.spec.top_k is not None for use in used)
        lean = _Choice(
            choice.owner, choice.learned if is_mixed else None, choice.given if is_mixed else None, choice.top_k if keeps else None
        )
        return self._parts(factors, routers, lean, None, recorder)

    @keeps_storage
    def static_buffers(self, rows: int, per_row: int) -> list[torch.Tensor]:
        """Room for what `collect_into` collects, and for the gates of the weights after the encoder."""
        uses: list[list[MoeUse | None]] = [[None] * per_row for _ in range(rows)]
        choice = self._choice(uses)
        assert choice.learned is not None
        assert choice.given is not None
        assert choice.top_k is not None
        buffers = [*self.static_factors(rows, per_row), choice.owner, choice.learned, choice.given, choice.top_k]
        num_readers = {d: len(names) for d, names in self.readers.items()}
        scores = per_row * self.num_experts
        example = self.storage[-1]
        buffers += [example.new_zeros(num, rows, self.width if d is None else d, scores) for d, num in num_readers.items()]
        buffers += [example.new_zeros(len(self.names), rows, 1, scores)]
        return [*buffers, example.new_zeros(num_readers.get(None, 0), rows, 1, per_row * self.rank)]

    @keeps_storage
    def collect_into(self, buffers: Sequence[torch.Tensor], uses: Sequence[Sequence[MoeUse | None]]) -> None:
        """Collect into tensors that stay where they are."""
        routing, choice = self._routing(uses), self._choice(uses)
        self.collect_factors_into(buffers, routing)
        new = [choice.owner, choice.learned, choice.given, choice.top_k]
        if self.capacity:
            new += self._routers(routing, uses)
        for buffer, tensor in zip(buffers[self.num_factors :], new, strict=False):
            assert tensor is not None
            buffer.copy_(tensor)

    def static_parts(self, buffers: Sequence[torch.Tensor]) -> dict[str, Part]:
        """What each weight adds, read from tensors that stay where they are."""
        n = self.num_factors
        return self._parts(buffers[:n], buffers[n + 4 : -1], _Choice(*buffers[n : n + 4]), buffers[-1])

    def _routing(self, uses: Sequence[Sequence[MoeUse | None]]) -> Routing:
        slots = torch.tensor([[0 if use is None else use.slot for use in row] for row in uses], dtype=torch.long)
        weights = torch.tensor([[0.0 if use is None else use.weight for use in row] for row in uses], dtype=torch.float64)
        return Routing(slots, weights)

    def _choice(self, uses: Sequence[Sequence[MoeUse | None]]) -> _Choice:
        num_experts, example = self.num_experts, self.storage[-1]

        def tensor(value: Callable[[MoeUse | None], Any], dtype: torch.dtype) -> torch.Tensor:  # (G, 1, k, ...)
            return torch.tensor([[[value(use) for use in row]] for row in uses], dtype=dtype).to(example.device)

        def given(use: MoeUse | None) -> list[float]:
            gates = () if use is None or use.gates is None else use.gates
            return [*gates, *[0.0] * (num_experts - len(gates))]

        nobody = torch.full((self.rank,), num_experts)
        owners = [[nobody if use is None else _owners(use.spec, num_experts, self.rank) for use in row] for row in uses]
        return _Choice(
            owner=torch.stack([torch.stack(row) for row in owners])[:, None].to(example.device),
            learned=tensor(lambda use: [float(use is not None and use.gates is None)], example.dtype),
            given=tensor(given, example.dtype),
            top_k=tensor(lambda use: [num_experts if use is None or use.spec.top_k is None else use.spec.top_k], torch.long),
        )

    def _routers(self, routing: Routing, uses: Sequence[Sequence[MoeUse | None]]) -> list[torch.Tensor]:
        """W (weights, G, d, k * E) of each kind of reader, and b (weights, G, 1, k * E), with temperatures and missing experts in them."""
        example, (rows, k) = self.storage[-1], routing.indices.shape
        slots = routing.indices.reshape(-1).to(example.device)
        inverse = torch.tensor([[1.0 if use is None else 1 / use.spec.temperature for use in row] for row in uses], dtype=torch.float64)
        inverse = inverse.view(-1, 1).to(example.device, example.dtype)  # (G * k, 1)
        closed = torch.tensor([self._closed(use) for row in uses for use in row]).to(example.device)  # (G * k, E)
        found = []
        for tensor in self.storage[self.num_factors : -1]:
            chosen = tensor.index_select(1, slots).mul_(inverse[..., None])  # (weights, G * k, E, d)
            found.append(chosen.view(len(tensor), rows, k * self.num_experts, -1).mT)
        bias = example.index_select(1, slots).mul_(inverse).masked_fill_(closed, -torch.inf)
        return [*found, bias.view(len(example), rows, 1, k * self.num_experts)]

    def _closed(self, use: MoeUse | None) -> list[bool]:
        """Which experts of the storage have no gate in a row. Where the gates are not the router's, none: its answer is not used."""
        if use is None or use.gates is not None:
            return [False] * self.num_experts
        own = [name in use.masked for name in use.spec.experts]
        return own + [True] * (self.num_experts - len(own))

    def _with_experts(self, use: MoeUse) -> frozenset[str]:
        """The weights that the experts of a mixture add something to. Others have gates here too, but nothing comes of them."""
        names: set[str] = set()
        for group, members in enumerate(self.groups.values()):
            ups = self.storage[2 * group + 1][:, use.slot, use.spec.rank : use.spec.num_ranks]  # (weights, ranks, d_out)
            names.update(name for name, adds in zip(members, ups.flatten(1).any(1).tolist(), strict=True) if adds)
        return frozenset(names)

    def _constant(self, factors: list[torch.Tensor], coefficients: torch.Tensor, in_place: bool) -> dict[str, Part]:
        """Gates that are known, `coefficients` (weights, G, 1, k * N), go into B: then a mixture is a LoRA."""
        place = {name: number for number, name in enumerate(self.by_reader)}
        for group, names in enumerate(self.groups.values()):
            ups = factors[2 * group + 1]
            of_group = coefficients[[place[name] for name in names]].mT.to(ups.dtype)  # (weights, G, k * N, 1)
            factors[2 * group + 1] = ups.mul_(of_group) if in_place else ups * of_group
        return {name: LoraPart(gathered) for name, gathered in self.gathered(factors).items()}

    def _parts(
        self,
        factors: Sequence[torch.Tensor],
        routers: Sequence[torch.Tensor],
        choice: _Choice,
        buffer: torch.Tensor | None,
        recorder: GateRecorder | None = None,
    ) -> dict[str, Part]:
        gathered = self.gathered(factors)
        gates: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        split = routers[-1].split([len(names) for names in self.readers.values()])
        for (d, names), weight, biases in zip(self.readers.items(), routers[:-1], split, strict=True):
            if d is None:
                recording = RecordingGates(weight, biases, choice, buffer, names, recorder)
                gates |= {name: RecordedGates(recording, number) for number, name in enumerate(names)}
            else:
                gates |= {name: InputGates(weight[i], biases[i], choice, self._pool, name, recorder) for i, name in enumerate(names)}
        return {name: MoePart(gathered[name], gates[name]) for name in self.names}


def ranks_bucket(ranks: int) -> int:
    """What the ranks of a mixture are rounded up to: by at most a quarter, so that mixtures of about one size share a stack."""
    step = max(1, rank_bucket(ranks) // 8)
    return -(-ranks // step) * step


@lru_cache(maxsize=256)
def _owners(spec: MoeSpec, num_experts: int, rank: int) -> torch.Tensor:
    """(N,) which expert each rank belongs to; `num_experts` is the new one. Ranks that fill up belong to it: they hold zeros."""
    own = [num_experts] * spec.rank + [expert for expert in range(len(spec.experts)) for _ in range(spec.expert_rank)]
    return torch.tensor(own + [num_experts] * (rank - len(own)))


def _router_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates are decided in single precision at least, as the tuner does."""
    return torch.promote_types(dtype, torch.float32)
