"""What the layers of one LoRA-MoE adapter share while the model runs, and the hooks that tell them where in a call they are.

A `MixtureState` is a plain object that layers hold a reference to. It carries the gates a caller has fixed, the experts a caller has
masked, the utterance the decoder is decoding, and whoever wants to see the gates: a recorder, or the terms of the loss. Nothing in it
outlives the call or the `with` block it belongs to.

The utterance is the mean over frames of the encoder's output. The decoder's routers read it, because it is known before the first
token: the gates of a position depend on no later one, and a token step computes what a pass over the whole text does.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from whisper_moe.router import balance_loss, entropy_loss, keep_largest
from whisper_moe.routing import Routing, RoutingSlot

Recorder = Callable[[str, torch.Tensor], None]
_NO_BACKWARD = -1  # autograd's number for a pass that is not running


class MixtureState:
    """What the layers of one adapter share.

    Args:
        experts: Names of the experts, in the order of the gates.
        balance_weight, entropy_weight: Strengths of the two terms of the loss.
    """

    def __init__(self, experts: Sequence[str], balance_weight: float = 0.0, entropy_weight: float = 0.0) -> None:
        self.experts = list(experts)
        self.balance_weight = balance_weight
        self.entropy_weight = entropy_weight
        self.slot = RoutingSlot()  # gates fixed by the caller, the same for every weight
        self.fixed: dict[str, torch.Tensor] | None = None  # gates fixed by the caller, (E,) for each weight
        self.masked: frozenset[str] = frozenset()
        self.utterance: torch.Tensor | None = None  # (rows, d_model), from the decoder's start to the end of the call it is part of
        self.awaits_file = False  # made for a file that has not been read yet
        self.recorder: Recorder | None = None
        self.term: torch.Tensor | None = None  # of the last call in training
        self.term_in_loss = False
        self._term_wanted = True  # whether anybody has asked for the last term
        self._collected: list[torch.Tensor] | None = None
        self._in_call = False
        self._pooled: dict[str, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._gates: dict[str, tuple[Any, ...]] = {}  # of the utterance being decoded, by module
        self._decoded: torch.Tensor | None = None  # the utterance of the call that is about to end
        self._before_backward: tuple[Any, ...] | None = None
        self._backward = _NO_BACKWARD  # which pass that is
        self._members = 0
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave behind what belongs to a running call."""
        transient = dict.fromkeys(("_collected", "term", "recorder", "utterance", "_decoded", "_before_backward"))
        return {**self.__dict__, **transient, "_pooled": {}, "_gates": {}}

    # ---- masks -----------------------------------------------------------------------------------------------------------

    @property
    def all_masked(self) -> bool:
        return len(self.masked) == len(self.experts)

    def kept(self, device: torch.device) -> torch.Tensor | None:
        """(E,) which experts take part; None if all do."""
        return torch.tensor([name not in self.masked for name in self.experts], device=device) if self.masked else None

    # ---- the pooled input ------------------------------------------------------------------------------------------------

    def pooled(self, x: torch.Tensor, place: str = "input") -> torch.Tensor:
        """(rows, d) mean over the positions of x (rows, T, d). Queries, keys and values read the same x: it is pooled once for them."""
        if x.dim() == 2:
            return x
        if torch.compiler.is_compiling():
            return x.mean(dim=1)
        known = self._pooled.get(place)
        written = version(x)
        if known is not None and known[0]() is x and known[1] == written and (known[2].requires_grad == _tracked(x)):
            return known[2]
        pooled = x.mean(dim=1)
        self._pooled[place] = (weakref.ref(x, lambda _: self._forget(place)), written, pooled)
        return pooled

    def _forget(self, place: str) -> None:
        self._pooled.pop(place, None)
        self._gates.clear()

    # A token step asks every router the same question as the step before it: the answer is kept while what it depends on is the same.

    @property
    def may_remember(self) -> bool:
        return not torch.is_grad_enabled() and self.recorder is None and not torch.compiler.is_compiling()

    def remember(self, module: str, key: tuple[Any, ...], gates: Any) -> None:
        self._gates[module] = (key, gates)

    def remembered(self, module: str, key: tuple[Any, ...]) -> Any:
        """What `remember` was given for this key: the same objects, equal numbers. None if something has changed."""
        known = self._gates.get(module)
        if known is None or len(known[0]) != len(key):
            return None
        same = all(a is b or (isinstance(a, (int, frozenset, torch.device)) and a == b) for a, b in zip(known[0], key, strict=True))
        return known[1] if same else None

    def forget_gates(self) -> None:
        """When a block that gave gates ends: nothing of it stays."""
        self._gates.clear()

    # ---- who sees the gates ----------------------------------------------------------------------------------------------

    def saw(self, module: str, gates: torch.Tensor, top_k: int | None = None) -> None:
        """A layer's gates before the top k are taken: (E,), (rows, E) or (rows, T, E). The loss is made from these, the record from the k.

        Nothing here may save tensors for autograd: with gradient checkpointing, the second run must save what the first did.
        """
        if self.recorder is not None:
            with torch.no_grad():
                self.recorder(module, keep_largest(gates.detach(), top_k))
        if self._collected is not None:
            self._collected.append(gates)

    @property
    def has_terms(self) -> bool:
        return self.balance_weight > 0 or self.entropy_weight > 0

    def loss_term(self) -> torch.Tensor:
        """The two terms for the last call in training; zero where there was none, or where both weights are 0."""
        self._term_wanted = True
        if self.term is None:
            return torch.zeros(())
        return self.term.detach() if self.term_in_loss else self.term

    # ---- around a call of the model --------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on a model. Done once per adapter; `leave` takes them off when its last layer goes."""
        if self._handles:
            return
        self._handles = [
            model.register_forward_pre_hook(_BeginCall(self)),
            model.register_forward_hook(_EndCall(self), with_kwargs=True, always_call=True),
        ]
        decoder = decoder_of(model)
        if decoder is not None:
            self._handles += [
                model.get_encoder().register_forward_pre_hook(_BeginEncoder(self)),  # type: ignore[operator]
                decoder.register_forward_pre_hook(_BeginDecoder(self), with_kwargs=True),
                decoder.register_forward_hook(_EndDecoder(self), always_call=True),
            ]

    def join(self) -> None:
        """One layer more."""
        self._members += 1

    def leave(self) -> None:
        """One layer less."""
        self._members -= 1
        if self._members == 0:
            self.detach()

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def snapshot(self) -> tuple[Any, ...]:
        return self.slot.current, self.fixed, self.masked, self.utterance

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self.slot.current, self.fixed, self.masked, self.utterance = snapshot

    def end_backward(self) -> None:
        before, self._before_backward = self._before_backward, None
        if before is not None:
            self.restore(before)

    def settle(self) -> None:
        """Take back what a backward pass that failed has left: autograd calls `end_backward` after one that succeeds only."""
        if self._before_backward is not None and running_backward() == _NO_BACKWARD:
            self.end_backward()

    def begin_call(self, training: bool) -> None:
        self.settle()
        self._in_call = True
        self._collected = [] if training and self.has_terms and torch.is_grad_enabled() else None

    def end_call(self) -> None:
        self._in_call, self.utterance = False, None
        gates, self._collected = self._collected, None
        if not gates:
            return
        if not self._term_wanted:
            warnings.warn(
                "balance_weight or entropy_weight is set, but the terms of the last training step reached no loss: the model returned "
                "none, and nobody called regularization_loss(). Give the model labels, or add that to the loss.",
                stacklevel=2,
            )
        device = gates[0].device
        balance = torch.stack([balance_loss(g).to(device) for g in gates]).mean()
        entropy = torch.stack([entropy_loss(g).to(device) for g in gates]).mean()
        self.term = self.balance_weight * balance + self.entropy_weight * entropy
        self.term_in_loss, self._term_wanted = False, False

    def term_for(self, loss: torch.Tensor) -> torch.Tensor:
        """Hand the term over to a loss."""
        assert self.term is not None
        self.term_in_loss = self._term_wanted = True
        return self.term.to(loss.device, loss.dtype)


class _BeginCall:
    """Before the model: collect gates for the loss from here on."""

    def __init__(self, state: MixtureState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.state.begin_call(module.training)


class _EndCall:
    """After the model: the terms join its loss, and whoever recomputes activations in the backward pass finds the state of this call."""

    def __init__(self, state: MixtureState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        state = self.state
        collected = bool(state._collected)
        state.end_call()
        if output is None:  # the call failed
            state._decoded = None
            return None
        if collected and module.training:
            output = _with_term(output, kwargs, state, _share(module, kwargs))
        if torch.is_grad_enabled():
            now = (*state.snapshot()[:3], state._decoded)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(_Replay(state, now))
        state._decoded = None
        return output


class _Replay:
    """With gradient checkpointing, layers run again in the backward pass: give them what they had, and take it back afterwards."""

    def __init__(self, state: MixtureState, snapshot: tuple[Any, ...]) -> None:
        self.state, self.snapshot = state, snapshot

    def __call__(self, gradient: torch.Tensor) -> None:
        state, backward = self.state, running_backward()
        if state._backward != backward:
            state.end_backward()  # of a pass that failed
        if state._before_backward is None:  # the first tensor of this backward pass
            state._before_backward, state._backward = state.snapshot(), backward
            torch.autograd.Variable._execution_engine.queue_callback(state.end_backward)
        state.restore(self.snapshot)


def running_backward() -> int:
    """Autograd's number for the backward pass that this thread is part of."""
    return torch._C._current_graph_task_id()


class _BeginEncoder:
    """Before the encoder, which `generate` calls without the model around it."""

    def __init__(self, state: MixtureState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.state.settle()


class _BeginDecoder:
    """Before the decoder: pool what the encoder has heard."""

    def __init__(self, state: MixtureState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.state.settle()
        encoded = kwargs.get("encoder_hidden_states")
        self.state.utterance = None if encoded is None else self.state.pooled(encoded, "utterance")


class _EndDecoder:
    """After the decoder, also when it failed."""

    def __init__(self, state: MixtureState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.state._decoded = self.state.utterance
        if not self.state._in_call:  # else the output layer, which comes after the decoder, may want it
            self.state.utterance = None


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder model of transformers."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    return decoder if decoder is not model else None


@contextmanager
def changed(state: MixtureState, **values: Any) -> Iterator[None]:
    """Attributes of a state for the length of a block."""
    state.settle()
    before = {name: getattr(state, name) for name in values}
    for name, value in values.items():
        setattr(state, name, value)
    try:
        yield
    finally:
        state.settle()  # before, or what a failed backward pass left would come back later
        for name, value in before.items():
            setattr(state, name, value)
        state.forget_gates()


def fixed_routing(state: MixtureState, rows: int) -> Routing | None:
    """The caller's gates for a batch of `rows`, without the masked experts."""
    routing = state.slot.current
    if routing is None:
        return None
    return without_masked(routing.for_batch(rows), state)


def without_masked(routing: Routing, state: MixtureState) -> Routing:
    """Given gates with the masked experts' share handed to the others."""
    keep = state.kept(routing.weights.device)
    if keep is None:
        return routing
    kept = routing.weights * keep[routing.indices]
    total, left = routing.weights.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
    return Routing(routing.indices, torch.where(left > 0, kept * total / left.clamp_min(torch.finfo(kept.dtype).tiny), kept))


def _with_term(output: Any, kwargs: dict[str, Any], state: MixtureState, share: Any) -> Any:
    if isinstance(output, dict):
        loss = output.get("loss")
        if isinstance(loss, torch.Tensor):
            output["loss"] = loss + share * state.term_for(loss)
        return output
    if isinstance(output, tuple) and kwargs.get("labels") is not None and isinstance(output[0], torch.Tensor):
        return (output[0] + share * state.term_for(output[0]), *output[1:])
    return output


def _share(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Which part of an optimizer step's loss this call's is, where the model weighs it so: then the term is weighed alike.

    `Trainer` adds up the losses of accumulated batches as they are, and hands over the number of labels in all of them: most models of
    transformers divide by it (`loss_function`). Others, Whisper among them, return the mean over their own batch and leave the rest to the
    caller; then so does the term.
    """
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if num_items is None or labels is None or "loss_function" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return 1.0
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.reshape(-1)[0].to(labels.device)
    # A decoder alone shifts the labels itself, so the first of a row is no target; Trainer counts in the same way.
    targets = labels if getattr(getattr(module, "config", None), "is_encoder_decoder", False) else labels[..., 1:]
    return (targets != -100).sum() / num_items


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else []
    return [value for value in values if isinstance(value, torch.Tensor)]


def version(x: torch.Tensor) -> int:
    """How often a tensor has been written to; -1 for inference tensors, which do not count."""
    return -1 if x.is_inference() else x._version


def _tracked(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
