"""A x, computed once for all layers that read the same x with the same A: q, k and v of an attention, k and v of all cross-attentions.

Tensors in, tensors out; knows no adapters. What is kept is a memo, never an input of anything: an entry counts only for the same
unchanged tensors, and only until one of its layers asks again, since that is the next pass through the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

KEPT = 4  # inputs in use at a time; 2 are: a block's own, and the encoder's output, which every decoder layer reads


class SharedProjection:
    """The down-projection of one pair (A, B), with the results of the inputs seen last."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __call__(
        self, x: torch.Tensor, A: torch.Tensor, project: Callable[[], torch.Tensor], layer: object, block: str
    ) -> torch.Tensor:  # (rows, r)
        """`project()`, unless its result is known.

        Args:
            x: The input, (..., d_in).
            A: The shared factor, (r, d_in).
            project: Computes A x.
            layer: Who asks.
            block: Name of the module around it. Where a result carries a graph, or is being captured into one, only layers of one
                block share it: others may be recomputed (gradient checkpointing) or replayed apart from each other.
        """
        if torch.compiler.is_compiling():  # the compiler finds equal expressions by itself
            return project()
        state = _state(x, A)
        known = next((entry for entry in self._entries if entry.x() is x), None)
        if known is not None:
            h = known.ask(state, layer, block)
            if h is not None:
                return h
        h = project()
        in_use = [entry for entry in self._entries if entry is not known and entry.x() is not None]
        self._entries = [*in_use[-KEPT + 1 :], _Entry(x, state, h, layer, block)]
        return h

    def __reduce__(self) -> tuple[type[SharedProjection], tuple[()]]:  # copies and pickles start with nothing
        return SharedProjection, ()


class _Entry:
    """One input and its projection, which lives no longer than the input does; with a graph, no longer than the graph."""

    def __init__(self, x: torch.Tensor, state: tuple[Any, ...], h: torch.Tensor, layer: object, block: str) -> None:
        self._state, self._block, self._layers = state, block, {id(layer)}
        held = [weakref.ref(h) if h.requires_grad else lambda: h]
        self.x = weakref.ref(x, lambda _: held.clear())
        self._held = held

    def ask(self, state: tuple[Any, ...], layer: object, block: str) -> torch.Tensor | None:
        """The projection, if it is the one that this layer would compute now."""
        in_graph = state[0]
        if not self._held or state != self._state or id(layer) in self._layers or (in_graph and block != self._block):
            return None
        self._layers.add(id(layer))
        return self._held[0]()


def _state(x: torch.Tensor, A: torch.Tensor) -> tuple[Any, ...]:
    """All that decides what A x is, besides which tensor x is; first, whether the result belongs to a graph."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    in_graph = torch.is_grad_enabled() or (device == "cuda" and torch.cuda.is_current_stream_capturing())
    return in_graph, _version(x), id(A), _version(A), autocast


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
