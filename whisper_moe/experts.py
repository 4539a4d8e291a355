"""Low-rank experts on one weight, as products of tensors: `y += sum over experts e of g_e B_e A_e x`.

Tensors in, tensors out: knows no modules, no routers, no names. Letters: E experts of rank r; every row of the batch uses k of them.

    x: (rows, T, d_in)  or (rows, d_in)     A: (E, r, d_in)
    y: (rows, T, d_out) or flat (rows * T, d_out)   B: (E, d_out, r), with the scaling already in it

Three ways to the same sum, chosen by size; none has more kernels for more experts, rows or languages:

* few: all experts side by side, one product down, the gates multiplied in, one product up. Work grows with E.
* many: the k experts of each row are gathered, then two batched products. Work grows with k, and copies k experts per row.
* weight (`mixed_weight`): all rows share one mixture and are long, so it is cheapest to add it to the weight itself.

B is best stored rank by rank, `torch.empty(E, r, d_out).mT`: then no way has to copy it.
y is what the caller has just computed and nobody else holds: it is written to in place wherever autograd allows, which saves a full-size
tensor. Use the returned tensor. With autograd on, that takes a flat y (a linear layer called on a flat input): the output for a
three-dimensional input is a view, and writing to one costs autograd more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from whisper_moe.routing import Routing

# A gathered expert is read once from the stack, written once, and read again by the product, per row and call; the work it saves is
# (E - k) experts per position. Found by measuring where the two ways cross (benchmarks/moe.py has the shapes).
GATHER_COST_POSITIONS = 24


@dataclass(frozen=True)
class Gathered:
    """The experts of each row, ready to use: made once per request by `gather`, good for all its token steps.

    Args:
        down (`torch.Tensor`): (rows, d_in, k * r).
        up (`torch.Tensor`): (rows, k * r, d_out), with the rows' weights in it.
    """

    down: torch.Tensor
    up: torch.Tensor

    def for_batch(self, num_rows: int) -> Gathered:
        """Itself, or with each row repeated where a row has become several beams."""
        rows = self.down.shape[0]
        if num_rows == rows:
            return self
        if rows == 0 or num_rows % rows:
            raise ValueError(f"The gathered experts are for {rows} rows, but the batch has {num_rows}, which is no multiple of it.")
        n = num_rows // rows
        return Gathered(self.down.repeat_interleave(n, dim=0), self.up.repeat_interleave(n, dim=0))


def add_experts(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, routing: Routing) -> torch.Tensor:
    """y plus what each row's experts add. The routing may be for fewer rows than x has, if each has become several beams."""
    routing = routing.for_batch(x.shape[0])
    if gathering_pays(x.shape[0], positions(x), routing.k, A.shape[0]):
        return add_gathered(y, x, gather(A, B, routing))
    return add_gated(y, x, A, B, routing.dense(A.shape[0]))


def add_gated(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Few experts, all computed: y plus the experts weighted by `gates`, (rows, E), or (rows, T, E) for a gate per position."""
    num_experts, rank, d_in = A.shape
    down = project_down(x, A.reshape(num_experts * rank, d_in))  # (rows, T, E * r)
    if gates.dim() == 2 and x.dim() == 3:
        gates = gates[:, None]
    down = down.unflatten(-1, (num_experts, rank)) * gates[..., None].to(down.dtype)
    return add_up(y, down.flatten(-2), B.mT.reshape(num_experts * rank, -1))


def gather(A: torch.Tensor, B: torch.Tensor, routing: Routing) -> Gathered:
    """Collect each row's experts from the stacks: `Gathered`, to be reused as long as the routing holds. Gradients reach the weights.

    The weights are multiplied into B in B's own type, so that half-precision experts stay half as large.
    """
    rows, k = routing.indices.shape
    rank = A.shape[1]
    down = A[routing.indices].reshape(rows, k * rank, -1).mT  # (rows, d_in, k * r)
    up = B.mT[routing.indices] * routing.weights[:, :, None, None].to(B.dtype)  # (rows, k, r, d_out)
    return Gathered(down, up.reshape(rows, k * rank, -1))


def add_gathered(y: torch.Tensor, x: torch.Tensor, gathered: Gathered, coefficients: torch.Tensor | None = None) -> torch.Tensor:
    """y plus what the gathered experts of each row add: two batched products, with `coefficients` between them, see `scaled`."""
    down, up = gathered.down, gathered.up
    rows = x.shape[0]
    x3 = x if x.dim() == 3 else x[:, None]  # (rows, T, d_in)
    hidden = torch.bmm(*_meet(x3, down))  # (rows, T, k * r)
    if coefficients is not None:
        hidden = scaled(hidden, coefficients)
    y3 = y.reshape(rows, x3.shape[1], -1)
    hidden, up = _meet(hidden, up, y.dtype)
    if hidden.dtype != y.dtype:  # the adapter is wider than the base: round once, at the end
        return (y3 + torch.bmm(hidden, up)).to(y.dtype).view(y.shape)
    if torch.is_grad_enabled() and (y.requires_grad or hidden.requires_grad or up.requires_grad):
        return torch.baddbmm(y3, hidden, up).to(y.dtype).view(y.shape)
    return y3.baddbmm_(hidden, up).view(y.shape)


def scaled(hidden: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`hidden` (rows, T, n) times `coefficients` (rows, C, n), each of which holds for T / C positions that follow one another."""
    apart = hidden.unflatten(1, (coefficients.shape[1], -1))  # (rows, C, T / C, n)
    return (apart * coefficients[:, :, None].to(hidden.dtype)).flatten(1, 2)


def add_shared(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, coefficients: torch.Tensor, down: torch.Tensor | None = None
) -> torch.Tensor:
    """One pair A (r, d_in), B (d_out, r) for all rows, `coefficients` (rows, r) of each row's own: y plus B diag(s_row) A x.

    `down` is A x, (rows, T, r), if it is known already: weights that read the same input through the same A compute it once.
    """
    if down is None:
        down = project_down(x, A)
    s = coefficients[:, None] if down.dim() == 3 else coefficients
    return add_up(y, down * s.to(down.dtype), B.mT)


def project_down(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """A x, (rows, T, r), in the wider type of the two."""
    return F.linear(*_meet(x, A))


def add_up(y: torch.Tensor, hidden: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y plus `hidden` (rows, T, n) times `up` (n, d_out), in place where autograd allows."""
    hidden = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    flat = y if y.dim() == 2 else y.reshape(hidden.shape[0], -1)
    hidden, up = _meet(hidden, up, y.dtype)
    if hidden.dtype != y.dtype:  # the adapter is wider than the base: round once, at the end
        return (flat + torch.mm(hidden, up)).to(y.dtype).view(y.shape)
    if (
        torch.is_grad_enabled()
        and (y.requires_grad or hidden.requires_grad or up.requires_grad)
        and (flat is not y or (y.is_leaf and y.requires_grad))
    ):
        return torch.addmm(flat, hidden, up).to(y.dtype).view(y.shape)
    flat.addmm_(hidden, up)
    return flat if flat is y else flat.view(y.shape)


def mixed_weight(weight: torch.Tensor, A: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A weight (d_out, d_in) with a mixture added to it: weight + up^T A, from A (n, d_in) and `up` (n, d_out), gates and all."""
    return torch.addmm(weight, up.to(weight.dtype).T, A.to(weight.dtype))


def gathering_pays(rows: int, length: int, k: int, num_experts: int) -> bool:
    """Whether gathering k experts for each of `rows` rows of `length` positions is cheaper than computing all of them."""
    saved = rows * length * (num_experts - k) + num_experts  # reading every expert is the price of a single position
    return saved > GATHER_COST_POSITIONS * rows * k


def mixing_weight_pays(length: int, d_in: int, d_out: int) -> bool:
    """Whether adding one mixture to the weight is cheaper than applying it to `length` positions (all rows together)."""
    return length * (d_in + d_out) > 2 * d_in * d_out


def positions(x: torch.Tensor) -> int:
    """T, of an input (rows, T, d) or (rows, d)."""
    return x.shape[1] if x.dim() == 3 else 1


def _meet(a: torch.Tensor, b: torch.Tensor, autocast_to: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors in one type, the wider of the two. Under autocast the type of the product is autocast's business, unless it is given."""
    if a.dtype == b.dtype and (autocast_to is None or autocast_to == a.dtype):
        return a, b
    if torch.is_autocast_enabled(a.device.type):
        return (a, b) if autocast_to is None else (a.to(autocast_to), b.to(autocast_to))
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
