"""One linear layer of a batch in which every row may speak another language: `y = W x`, plus what each row's adapter adds.

A `Request` holds what the layers need for one batch, ready to use; it reaches them through the `RequestSlot` that all of them refer to.
Knows tensors and positions, no languages: who is in which row has been decided when the request is made (language_table.py).

    x: (rows * n, T, d_in)      n: 1, or how often `generate` has repeated each row (its beams), next to each other

A row's repeats and its positions are treated alike, so beams cost no copy of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from whisper_moe.experts import Gathered, add_gathered, add_shared, project_down, scaled

_MANY_POSITIONS = 16  # of a row, from which on the first product of a LoRA is better computed turned round


class SharedDown:
    """A x of a pool, remembered between the weights that read the same x through the same A: q, k and v of a layer, and the
    cross-attention's k and v of all decoder layers.

    Remembered by identity and version of x, so a tensor that was written to since counts as another one. Not remembered where that cannot
    be told, or where the work must be part of what is recorded: with autograd on, for inference tensors, in a compiled graph (the compiler
    finds repeated work by itself) and, for inputs that come from outside a layer (`outer`), in a CUDA graph.

    Args:
        A: (r, d_in).
        reused: Whether several weights read the same x at all; if not, holding on to x would only cost memory.
        outer: Whether x comes from outside the layer, as the encoder's states do in the decoder.
    """

    def __init__(self, A: torch.Tensor, reused: bool, outer: bool) -> None:
        self.A = A
        self.reused, self.outer = reused, outer
        self._x: torch.Tensor | None = None
        self._version = 0
        self._down: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """A x, (positions, r); `flat` is x as (positions, d_in)."""
        if torch.compiler.is_compiling() or not self._may_remember(x):
            return project_down(flat, self.A)
        if self._down is None or self._x is not x or self._version != x._version:
            self._x, self._version, self._down = x, x._version, project_down(flat, self.A)
        return self._down

    def _may_remember(self, x: torch.Tensor) -> bool:
        if not self.reused or torch.is_grad_enabled() or x.is_inference():
            return False
        return not (self.outer and x.is_cuda and torch.cuda.is_current_stream_capturing())

    def forget(self) -> None:
        self._x = self._down = None


class LoraPart:
    """Each row's own A and B."""

    def __init__(self, gathered: Gathered) -> None:
        self.gathered = gathered  # of the batch's rows, or of one row that stands for all of them
        self.rows = gathered.down.shape[0]

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y plus the adapter's part; y and x may be flat. The result has y's shape."""
        x3 = x if x.dim() == 3 and x.shape[0] == self.rows else x.reshape(self.rows, -1, x.shape[-1])
        if not _plain(y, x, self.gathered.up):
            return add_gathered(y, x3, self.gathered)
        y3 = y if y.dim() == 3 and y.shape[0] == self.rows else y.view(self.rows, -1, y.shape[-1])
        down = self.gathered.down
        # Over many positions a product that is r wide runs at half the speed of one that is r high.
        hidden = torch.bmm(x3, down) if x3.shape[1] < _MANY_POSITIONS else torch.bmm(down.mT, x3.mT).mT
        y3.baddbmm_(hidden, self.gathered.up)
        return y


class PoolPart:
    """Each row's own coefficients on one A and B."""

    def __init__(self, down: SharedDown, up: torch.Tensor, s: torch.Tensor) -> None:
        self.down, self.up = down, up  # up: (r, d_out), B turned round
        self.s = s  # (rows, r), or (1, r) for all of them
        self.rows = s.shape[0]

    def add_flat(self, y: torch.Tensor, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """y (positions, d_out) plus the adapter's part; `flat` is x as (positions, d_in)."""
        down = self.down(x, flat)  # (positions, r)
        if self.rows not in (1, down.shape[0]):
            down = down.view(self.rows, -1, down.shape[-1])
        if not _plain(y, down, self.up):
            return add_shared(y, flat, self.down.A, self.up.mT, self.s, down=down)
        hidden = down * self.s if down.dim() == 2 else (down * self.s[:, None]).view(-1, down.shape[-1])
        return y.addmm_(hidden, self.up)


class MoePart:
    """Each row's own experts, weighted by gates that depend on the input (moe_rows.py makes them).

    Args:
        gathered: The experts of the batch's rows, or of one row that stands for all of them.
        coefficients: Layer input -> (rows, C, n), the factor of each of n ranks for C stretches of a row's positions.
    """

    def __init__(self, gathered: Gathered, coefficients: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.gathered, self.coefficients = gathered, coefficients
        self.rows = gathered.down.shape[0]

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y plus the adapter's part. The result has y's shape."""
        return self.add_flat(y, x, x)

    def add_flat(self, y: torch.Tensor, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """y, which may be flat, plus the adapter's part; x is what the layer was called with, `flat` may be x as (positions, d_in)."""
        coefficients = self.coefficients(x)
        x3 = flat.reshape(self.rows, -1, flat.shape[-1])
        if not _plain(y, x, self.gathered.up):
            return add_gathered(y, x3, self.gathered, coefficients)
        down = self.gathered.down
        hidden = torch.bmm(x3, down) if x3.shape[1] < _MANY_POSITIONS else torch.bmm(down.mT, x3.mT).mT
        y.view(self.rows, -1, y.shape[-1]).baddbmm_(scaled(hidden, coefficients), self.gathered.up)
        return y


def _plain(y: torch.Tensor, x: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether there is nothing to convert and nothing to differentiate: then two products do, without the questions that experts.py must
    ask. A token step has little else to do than to launch operators."""
    return not torch.is_grad_enabled() and y.dtype == up.dtype and x.dtype == up.dtype


Part: TypeAlias = "LoraPart | PoolPart | MoePart"


class Recording(Protocol):
    """What must see the encoder's output before the decoder's layers run: gates that are made from it."""

    def hear(self, states: torch.Tensor | None, num_rows: int) -> None: ...


class Request:
    """One batch: how many rows, and what every layer adds for them.

    Args:
        num_rows: Rows of the batch, as the caller counts them: without beams.
        parts: For each routed layer of the model, by its index, what is added there; several if rows come from several stacks.
        recordings: What the decoder's layers need to know of the recording.
    """

    def __init__(self, num_rows: int, parts: Sequence[tuple[Part, ...]], recordings: Sequence[Recording] = ()) -> None:
        self.num_rows = num_rows
        self.parts = list(parts)
        self.recordings = list(recordings)


class RequestSlot:
    """Where the layers of one model look for the request they are part of. Set by `use` for the length of a `with` block, and put back
    whatever happens inside. One thread at a time, as for the model itself."""

    def __init__(self) -> None:
        self.current: Request | None = None

    @contextmanager
    def use(self, request: Request | None) -> Iterator[None]:
        before, self.current = self.current, request
        try:
            yield
        finally:
            self.current = before


class BeginDecoder:
    """Before the decoder, as a hook: let the request hear what the encoder has heard."""

    def __init__(self, slot: RequestSlot) -> None:
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        request = self.slot.current
        if request is not None:
            for recording in request.recordings:
                recording.hear(kwargs.get("encoder_hidden_states"), request.num_rows)


class RoutedLinear(nn.Module):
    """A linear layer that adds, for the length of a request, each row's adapter. Without a request it is its base layer.

    Args:
        base_layer: The layer of the base model; it stays as it is.
        slot: Where requests arrive.
        index: Which of a request's parts are this layer's.
        exact_rows: Whether every row of the batch arrives once (encoder) or possibly several times (decoder, beams).
    """

    def __init__(self, base_layer: nn.Linear, slot: RequestSlot, index: int, exact_rows: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot, self.index, self.exact_rows = slot, index, exact_rows
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.train(base_layer.training)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (rows * n, T, d_in) -> (rows * n, T, d_out)
        request = self.slot.current
        if request is None:
            return self.base_layer(x)
        num_rows = x.shape[0]
        if num_rows != request.num_rows and (self.exact_rows or num_rows == 0 or num_rows % request.num_rows):
            raise ValueError(rows_message(num_rows, request.num_rows))
        parts = request.parts[self.index]
        if not parts or x.numel() == 0:  # no positions: nothing is added to nothing
            return self.base_layer(x)
        if len(parts) == 1 and not isinstance(parts[0], PoolPart) and not torch.is_grad_enabled():
            return parts[0].add(self.base_layer(x), x)
        # Flat, so that the output is no view: adding to it in place is then free of charge, with autograd too.
        flat = x.reshape(-1, x.shape[-1])
        y = self.base_layer(flat)
        for part in parts:
            y = part.add(y, flat) if isinstance(part, LoraPart) else part.add_flat(y, x, flat)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"index={self.index}"


def rows_message(came: int, expected: int) -> str:
    return (
        f"The languages were given for {expected} rows, but the model was called with {came}. Give one language per row (None for the "
        "base model). If rows leave the batch inside generate() (recordings of several windows, or a temperature fallback), a layer "
        "cannot know which are left: use generate_mixed, which can. With num_return_sequences=n, name each row's language n times."
    )
