"""Which experts a row of a batch uses, and how strongly, as data: `Routing`. `RoutingSlot` is how it reaches the layers.

Tensors only: knows no modules and no language names. A routing is made once per request and handed to all layers through a slot that
they hold a reference to, for the length of one `with` block; nothing global, nothing that outlives the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """k experts per row of the batch. A weight of 0 means nothing is added, whatever the index beside it.

    Args:
        indices (`torch.Tensor`): (rows, k), whole numbers: which experts.
        weights (`torch.Tensor`): (rows, k), floating point: how strongly. May require a gradient.

    Raises:
        ValueError: The shapes or types do not fit. Values are checked by the constructors below, which see them before they are on a GPU.
    """

    indices: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self) -> None:
        if self.indices.dim() != 2 or self.indices.shape != self.weights.shape:
            raise ValueError(
                f"A routing needs indices and weights of one shape (rows, k), got {tuple(self.indices.shape)} and "
                f"{tuple(self.weights.shape)}. Routing.one_hot, .mixture and .static make both."
            )
        if self.indices.dtype != torch.long or not self.weights.is_floating_point():
            raise ValueError(
                f"A routing needs indices of type int64 and floating point weights, got {self.indices.dtype} and {self.weights.dtype}."
            )

    @classmethod
    def one_hot(
        cls,
        experts: Sequence[int | None],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        num_experts: int | None = None,
    ) -> Routing:
        """Row i uses expert `experts[i]` alone, with weight 1; `None` is no expert. Checked against `num_experts` if that is given."""
        for row, expert in enumerate(experts):
            if expert is None:
                continue
            if not isinstance(expert, int) or isinstance(expert, bool) or expert < 0 or (num_experts is not None and expert >= num_experts):
                known = "" if num_experts is None else f"; there are {num_experts}, numbered from 0"
                raise ValueError(f"Row {row} of the batch names expert {expert!r}{known}. Use None for a row without an expert.")
        indices = torch.tensor([[0 if expert is None else expert] for expert in experts], dtype=torch.long).reshape(-1, 1)
        weights = torch.tensor([[0.0 if expert is None else 1.0] for expert in experts], dtype=dtype).reshape(-1, 1)
        return cls(indices.to(device), weights.to(device))

    @classmethod
    def mixture(cls, weights: torch.Tensor, top_k: int | None = None) -> Routing:
        """Every expert with a weight of its own per row, from `weights` (rows, experts).

        With `top_k`, only the k largest of a row stay, scaled up so that the row's sum is what it was.
        """
        if weights.dim() != 2 or not weights.is_floating_point():
            raise ValueError(
                f"A mixture needs floating point weights of shape (rows, experts), got {weights.dtype} {tuple(weights.shape)}."
            )
        _check_finite(weights)
        num_experts = weights.shape[1]
        check_top_k(top_k, num_experts)
        if top_k is None or top_k == num_experts:
            return cls(torch.arange(num_experts, device=weights.device).expand(weights.shape), weights)
        chosen, indices = weights.topk(top_k, dim=1)
        return cls(indices, rescaled(chosen, weights.sum(dim=1, keepdim=True)))

    @classmethod
    def static(cls, weights: torch.Tensor, rows: int) -> Routing:
        """The same mixture for every row, from `weights` (experts,)."""
        if weights.dim() != 1 or not weights.is_floating_point():
            raise ValueError(
                f"A static mixture needs floating point weights of shape (experts,), got {weights.dtype} {tuple(weights.shape)}."
            )
        return cls.mixture(weights.expand(rows, -1))

    @property
    def num_rows(self) -> int:
        return self.indices.shape[0]

    @property
    def k(self) -> int:
        """Experts per row."""
        return self.indices.shape[1]

    def select(self, rows: torch.Tensor | Sequence[int]) -> Routing:
        """The routing of some rows, in the order given: those that stay in a batch while others leave it."""
        index = torch.as_tensor(rows, device=self.indices.device)
        if index.dtype == torch.bool and index.shape != (self.num_rows,):
            raise ValueError(f"A mask over rows needs {self.num_rows} entries, got shape {tuple(index.shape)}.")
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long().reshape(-1)
        return Routing(self.indices[index], self.weights[index])

    def repeat(self, n: int) -> Routing:
        """Each row n times, next to each other, as `generate` orders the beams and the returned sequences of a row."""
        return Routing(self.indices.repeat_interleave(n, dim=0), self.weights.repeat_interleave(n, dim=0))

    def for_batch(self, num_rows: int) -> Routing:
        """This routing for a batch of `num_rows`: itself, or with each row repeated where a row has become several beams."""
        if num_rows == self.num_rows:
            return self
        if self.num_rows == 0 or num_rows % self.num_rows:
            raise ValueError(
                f"The routing is for {self.num_rows} rows, but a layer was called with {num_rows}, which is no multiple of it. Give one "
                "entry per row of the batch; when rows leave a batch, use routing.select(rows)."
            )
        return self.repeat(num_rows // self.num_rows)

    def dense(self, num_experts: int) -> torch.Tensor:
        """(rows, num_experts) the weight of every expert; what a row names twice adds up."""
        weights = self.weights.new_zeros(self.num_rows, num_experts)
        return weights.scatter_add(1, self.indices, self.weights)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Routing:
        """On another device, with weights of another type; itself if nothing changes."""
        indices, weights = self.indices.to(device), self.weights.to(device, dtype)
        return self if indices is self.indices and weights is self.weights else Routing(indices, weights)


class RoutingSlot:
    """The place where layers look for the routing of the call they are part of. One per model; each layer holds a reference to it.

    Nobody sets `current` by hand: `with slot.use(routing):` does, and puts back what was there, whatever happens inside. A slot belongs to
    one model and is used by one thread at a time, as the model is.
    """

    def __init__(self) -> None:
        self.current: Routing | None = None

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        before, self.current = self.current, routing
        try:
            yield
        finally:
            self.current = before


def check_top_k(top_k: int | None, num_experts: int) -> None:
    """Refuse a number of experts to keep that is not from 1 to `num_experts`."""
    if top_k is None:
        return
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to the number of experts, {num_experts}, got {top_k!r}. Leave it out to use all of them.")


def rescaled(weights: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`weights` scaled along their last dimension so that they sum to `total`; zeros where they sum to zero."""
    kept = weights.sum(dim=-1, keepdim=True)
    return weights * torch.where(kept == 0, torch.zeros_like(total), total / torch.where(kept == 0, torch.ones_like(kept), kept))


def _check_finite(weights: torch.Tensor) -> None:
    broken = (~torch.isfinite(weights.detach())).any(dim=1).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"The weights of row {broken[0]} are not finite ({len(broken)} of {len(weights)} rows). Weights must be numbers.")
