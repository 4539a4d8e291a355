"""Many adapters trained in one batch: every row goes through its own, and only that one gets a gradient from it.

An adapter is one flat vector, so that its optimizer state, its clipping and its place in a checkpoint are its own. A batch stacks the
vectors that its rows need; from there on each weight is two batched products, however many languages take part. Knows tensors, modules and
which row uses which vector; no languages, no clips, no files.

    W x + scaling B A x      `LoraVectors`: a vector holds A (r, d_in) and B (d_out, r) of every weight
    W x + scaling B diag(s) A x      `PoolVectors`: A and B are frozen and shared by all adapters, a vector holds s (r,) of every weight

    x: (rows, T, d_in)       stacked: (groups, numbers)       a group: rows next to each other that use the same adapter
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from whisper_moe.experts import Gathered, add_gathered, add_shared, add_up, project_down

_LOGITS_AT_ONCE = 16 * 2**20  # numbers in memory at a time while the loss over a vocabulary is computed


# ---- what a vector means -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedWeight:
    """A linear layer and the adapter's place on it."""

    name: str
    d_out: int
    d_in: int
    rank: int
    scaling: float


class Add(Protocol):
    """Adds an adapter's part to what the base layer gave: y (rows, T, d_out), x (rows, T, d_in)."""

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...


class Vectors(Protocol):
    """How the numbers of an adapter lie in its vector."""

    weights: tuple[AdaptedWeight, ...]
    num_numbers: int

    def initial(self, generator: torch.Generator) -> torch.Tensor:
        """(numbers,) with which the adapted model is the base model."""

    def parts(self, stacked: torch.Tensor) -> dict[str, Add]:
        """What each weight adds; `stacked` is (groups, numbers)."""

    def tensors(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of PEFT's file, by their names without the prefix."""


class LoraVectors:
    """A and B of every weight, one after the other; B rank by rank, (r, d_out), as the second product wants it.

    Args:
        weights: what is adapted.
        init: `True` (PEFT's default: Kaiming uniform) or `"gaussian"`; of A. B starts at zero.
    """

    def __init__(self, weights: Sequence[AdaptedWeight], init: bool | str = True) -> None:
        self.weights, self.init = tuple(weights), init
        self._sizes = [size for weight in self.weights for size in (weight.rank * weight.d_in, weight.rank * weight.d_out)]
        self.num_numbers = sum(self._sizes)

    def initial(self, generator: torch.Generator) -> torch.Tensor:
        pieces = []
        for weight in self.weights:
            A = torch.empty(weight.rank, weight.d_in)
            if self.init == "gaussian":
                A.normal_(std=1 / weight.rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            pieces += [A.flatten(), torch.zeros(weight.rank * weight.d_out)]
        return torch.cat(pieces)

    def parts(self, stacked: torch.Tensor) -> dict[str, Add]:
        # Split once: a slice for each weight would send back a gradient of the whole stack, each time.
        pieces = iter(stacked.split_with_sizes(self._sizes, dim=1))
        found: dict[str, Add] = {}
        for weight in self.weights:
            A = next(pieces).view(-1, weight.rank, weight.d_in)
            B = next(pieces).view(-1, weight.rank, weight.d_out)
            found[weight.name] = _LoraPart(A, B if weight.scaling == 1 else B * weight.scaling)
        return found

    def tensors(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = iter(vector.split(self._sizes))
        found = {}
        for weight in self.weights:
            found[f"{weight.name}.lora_A.weight"] = next(pieces).view(weight.rank, weight.d_in).clone()
            found[f"{weight.name}.lora_B.weight"] = next(pieces).view(weight.rank, weight.d_out).T.contiguous()
        return found


class PoolVectors:
    """The coefficients s of every weight, one after the other.

    Args:
        weights: what is adapted.
        factors: A (r, d_in) and B (d_out, r) of every weight; those of one group are the same tensors, and frozen.
    """

    def __init__(self, weights: Sequence[AdaptedWeight], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.weights = tuple(weights)
        self._factors = {name: (A.detach(), B.detach()) for name, (A, B) in factors.items()}
        self._sizes = [weight.rank for weight in self.weights]
        self.num_numbers = sum(self._sizes)

    def initial(self, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(self.num_numbers)

    def parts(self, stacked: torch.Tensor) -> dict[str, Add]:
        found: dict[str, Add] = {}
        for weight, s in zip(self.weights, stacked.split_with_sizes(self._sizes, dim=1), strict=True):
            A, B = (factor.to(stacked.device) for factor in self._factors[weight.name])
            self._factors[weight.name] = A, B  # moved once
            found[weight.name] = _PoolPart(A, B, s if weight.scaling == 1 else s * weight.scaling)
        return found

    def tensors(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = vector.split(self._sizes)
        return {f"{weight.name}.s2lora_coefficients": s.clone() for weight, s in zip(self.weights, pieces, strict=True)}


@dataclass(frozen=True)
class _LoraPart:
    A: torch.Tensor  # (groups, r, d_in)
    B: torch.Tensor  # (groups, r, d_out)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if len(self.A) == 1:  # all rows alike: two plain products
            return add_up(y, project_down(x, self.A[0]), self.B[0])
        return add_gathered(y, x.reshape(len(self.A), -1, x.shape[-1]), Gathered(self.A.mT, self.B))


@dataclass(frozen=True)
class _PoolPart:
    A: torch.Tensor  # (r, d_in)
    B: torch.Tensor  # (d_out, r)
    s: torch.Tensor  # (groups, r)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return add_shared(y, x.reshape(len(self.s), -1, x.shape[-1]), self.A, self.B, self.s)


# ---- the layers --------------------------------------------------------------------------------------------------------


class RowAdapters:
    """One trainable vector per adapter, and the layers of a model that look up which of them the rows of the batch use.

    Args:
        model: the base; `attached` puts the layers on it and takes them off.
        vectors: what the vectors mean.
        initial: (numbers,) for each adapter.
    """

    def __init__(self, model: nn.Module, vectors: Vectors, initial: Sequence[torch.Tensor]) -> None:
        self.model, self.vectors = model, vectors
        reference = model.get_submodule(vectors.weights[0].name).weight
        assert isinstance(reference, torch.Tensor)
        dtype = torch.promote_types(reference.dtype, torch.float32)  # half precision would lose small steps
        self.parameters = [nn.Parameter(vector.to(reference.device, dtype)) for vector in initial]
        self._parts: dict[str, Add] | None = None
        self._num_rows: int | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The layers on the model, whose own weights are frozen meanwhile; afterwards the very modules that were there, as they were."""
        required = {name: weight.requires_grad for name, weight in self.model.named_parameters()}
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            self.model.requires_grad_(False)
            for weight in self.vectors.weights:
                owner, _, last = weight.name.rpartition(".")
                parent, layer = self.model.get_submodule(owner), self.model.get_submodule(weight.name)
                assert isinstance(layer, nn.Linear), f"{weight.name} is no plain linear layer"
                setattr(parent, last, _RowLinear(layer, self, weight.name))
                replaced.append((parent, last, layer))
            yield
        finally:
            for parent, last, layer in replaced:
                setattr(parent, last, layer)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(required[name])

    @contextmanager
    def rows(self, adapters: Sequence[int]) -> Iterator[None]:
        """Row i of every batch in this block uses adapter `adapters[i]`. Equal ones next to each other cost least."""
        size = group_size(adapters)
        with self._using([self.parameters[index] for index in adapters[::size]], len(adapters)):
            yield

    @contextmanager
    def all_rows(self, vector: torch.Tensor) -> Iterator[None]:
        """Every row, however many there are, uses these numbers, and nothing is trained."""
        with self._using([vector.detach()], None):
            yield

    @contextmanager
    def _using(self, chosen: Sequence[torch.Tensor], num_rows: int | None) -> Iterator[None]:
        before = self._parts, self._num_rows
        # The vectors of a batch are stacked once; the gradient of a vector is the sum over its groups.
        stacked = chosen[0][None] if len(chosen) == 1 else torch.stack(list(chosen))
        self._parts, self._num_rows = self.vectors.parts(stacked), num_rows
        try:
            yield
        finally:
            self._parts, self._num_rows = before

    def add(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self._parts is None:
            return y
        if self._num_rows not in (None, x.shape[0]):
            raise ValueError(
                f"Adapters were named for {self._num_rows} rows, but {name} was called with {x.shape[0]}. Name one for each row."
            )
        return self._parts[name](y, x)


class _RowLinear(nn.Module):
    """A frozen linear layer with every row's own adapter on it."""

    def __init__(self, base_layer: nn.Linear, adapters: RowAdapters, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self._adapters = (adapters,)  # not a module, and it holds the model
        self.train(base_layer.training)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (rows, T, d_in) -> (rows, T, d_out)
        y = self.base_layer(x.reshape(-1, x.shape[-1]))  # flat, so that it is no view and may be added to in place
        return self._adapters[0].add(self.name, y, x).view(*x.shape[:-1], -1)


def group_size(adapters: Sequence[int]) -> int:
    """The largest n such that the rows are groups of n that use the same adapter."""
    runs, size = 1, 0
    for before, after in zip(adapters, [*adapters[1:], None], strict=True):
        if before == after:
            runs += 1
        else:
            size, runs = math.gcd(size, runs), 1
    return size


# ---- the loss ----------------------------------------------------------------------------------------------------------


def token_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each token, (tokens,), of hidden states (tokens, d_model) under a frozen output layer `head` (vocabulary, d_model).

    The same numbers and gradients as `cross_entropy(hidden @ head.T, targets)`, without keeping logits: their gradient is multiplied back
    while they are there. That saves three passes over tensors as wide as the vocabulary, and the memory for them.
    """
    losses: torch.Tensor = _FrozenHead.apply(hidden, head.detach(), targets, label_smoothing)
    return losses


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        vocabulary = len(head)
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        step = max(1, _LOGITS_AT_ONCE // vocabulary)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = functional.linear(hidden[rows], head).to(losses.dtype)  # (some tokens, vocabulary)
            right = logits.gather(1, targets[rows, None]).squeeze(1)
            mean = logits.mean(1) if smoothing else None
            total = logits.logsumexp(1)
            losses[rows] = total - right
            if mean is not None:
                losses[rows] = (1 - smoothing) * losses[rows] + smoothing * (total - mean)
            if gradient is not None:
                shares = logits.sub_(total[:, None]).exp_()  # probabilities, then the gradient, where the logits were
                if smoothing:
                    shares.sub_(smoothing / vocabulary)
                shares.scatter_add_(1, targets[rows, None], shares.new_full((len(shares), 1), smoothing - 1))
                gradient[rows] = torch.mm(shares.to(head.dtype), head).to(gradient.dtype)
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        gradient = ctx.saved_tensors[0] if ctx.saved_tensors else None
        return None if gradient is None else gradient * upstream[0][:, None].to(gradient.dtype), None, None, None
