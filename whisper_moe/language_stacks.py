"""Adapters of equal shape side by side in one storage, a slot each: `LoraStack`, `Pool`. Tensors and slots; no language names, no files.
Mixtures with routers have a stack of their own kind, in moe_rows.py.

    LoraStack   per adapted weight A (capacity, r, d_in), B (capacity, d_out, r)       smaller ranks padded with zeros, scaling in B
    Pool        A (r, d_in), B (d_out, r) per group of weights, frozen and shared;     s (capacity, weights, r) for all layers together

Weights of one size lie in one tensor, (weights, capacity, r, d), so that what a batch needs is collected for all layers by one operator
per size, however many languages there are. A `row` is one adapter outside of its slot, in host memory: a list of tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeAlias, TypeVar

import torch

from whisper_moe.adapter_files import Pair, Sharing
from whisper_moe.experts import Gathered
from whisper_moe.routed_linear import LoraPart, Part, PoolPart, SharedDown
from whisper_moe.routing import Routing

Row: TypeAlias = "list[torch.Tensor]"
Size: TypeAlias = "tuple[int, int]"  # (d_out, d_in)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def keeps_storage(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make or write storage outside of inference mode, whoever calls: what is made inside can never be written to outside again."""

    @functools.wraps(function)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


class Stack:
    """Slots that are handed out and taken back. A kind of stack has `storage`: tensors with the slots along `slot_dim`."""

    slot_dim: int
    names: tuple[str, ...]
    storage: list[torch.Tensor]

    def __init__(self) -> None:
        self.capacity = 0
        self._free: list[int] = []

    @property
    def row_nbytes(self) -> int:
        """Bytes of one adapter."""
        return sum(tensor.element_size() * tensor.numel() // max(tensor.shape[self.slot_dim], 1) for tensor in self._like())

    def _like(self) -> list[torch.Tensor]:
        """The storage, with at least one slot: for its sizes only."""
        return [tensor if self.capacity else tensor.new_empty(_resized(tensor, self.slot_dim, 1)) for tensor in self.storage]

    @keeps_storage
    def take(self, count: int, limit: int | None) -> list[int]:
        """Free slots; if there are too few, the storage grows to twice its size or more, but not beyond `limit` without need."""
        if len(self._free) < count:
            needed = self.capacity + count - len(self._free)
            doubled = 2 * self.capacity if limit is None else min(2 * self.capacity, limit)
            capacity = max(needed, doubled)
            self.storage = [_grown(tensor, self.slot_dim, capacity) for tensor in self.storage]
            self._free += range(self.capacity, capacity)
            self.capacity = capacity
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def release(self, slot: int) -> None:
        """Take a slot back. Its numbers stay until they are written over: nothing refers to them."""
        self._free.append(slot)

    @keeps_storage
    def write(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Put adapters into slots."""
        for number, tensor in enumerate(self.storage):
            values = torch.stack([row[number] for row in rows], self.slot_dim)
            index = torch.tensor(slots, device=tensor.device)
            tensor.index_copy_(self.slot_dim, index, values.to(tensor.device, tensor.dtype))

    def read(self, slot: int) -> Row:
        """An adapter out of its slot, in host memory."""
        return [tensor.select(self.slot_dim, slot).to("cpu", copy=True) for tensor in self.storage]

    @keeps_storage
    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything."""
        self.storage = [tensor.to(device, dtype) for tensor in self.storage]


class FactorStack(Stack):
    """Low-rank pairs of one set of weights, A and B with their rank first, (r, d_in) and (r, d_out). What else a kind stores comes after.

    Args:
        sizes: Size of each weight, by name, in the order of the model's layers.
        rank: Rank of the storage; smaller ones are padded.
    """

    slot_dim = 1

    @keeps_storage
    def __init__(self, sizes: Mapping[str, Size], rank: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.names, self.rank = tuple(sizes), rank
        self.groups: dict[Size, list[str]] = {}
        for name, size in sizes.items():
            self.groups.setdefault(size, []).append(name)
        # B is stored rank by rank, (r, d_out), as the second product wants it.
        self.storage = [
            torch.zeros(len(names), 0, rank, width, device=device, dtype=dtype)
            for (d_out, d_in), names in self.groups.items()
            for width in (d_in, d_out)
        ]

    @property
    def num_factors(self) -> int:
        """How many tensors of the storage hold pairs: one of A and one of B per size."""
        return 2 * len(self.groups)

    def pack_pairs(self, pairs: Mapping[str, Pair]) -> Row:
        """A (r', d_in) and B (d_out, r') of weights, r' at most the stack's rank, as the part of a row that holds pairs."""
        row = [tensor.new_zeros(tensor.shape[0], self.rank, tensor.shape[3], device="cpu") for tensor in self.storage[: self.num_factors]]
        for group, names in enumerate(self.groups.values()):
            for number, name in enumerate(names):
                if name in pairs:
                    A, B = pairs[name]
                    row[2 * group][number, : len(A)] = A
                    row[2 * group + 1][number, : len(A)] = B.mT
        return row

    def collect(self, routing: Routing) -> list[torch.Tensor]:
        """The pairs in the slots `routing.indices`, (weights, rows, k * r, width) of each tensor that holds pairs."""
        slots, weights = routing.indices, routing.weights
        collected = []
        plain = slots.shape == (1, 1) and bool(weights == 1)  # one adapter as it is: no copy, its slot is used in place
        for number, tensor in enumerate(self.storage[: self.num_factors]):
            if plain:
                collected.append(tensor.narrow(1, int(slots), 1))
                continue
            chosen = torch.empty(0, device=tensor.device, dtype=tensor.dtype)
            collected.append(self._collect(number, slots.to(tensor.device), weights.to(tensor.device, tensor.dtype), chosen))
        return collected

    @keeps_storage
    def static_factors(self, rows: int, per_row: int) -> list[torch.Tensor]:
        """Room for what `collect` collects."""
        factors = self.storage[: self.num_factors]
        return [tensor.new_zeros(tensor.shape[0], rows, per_row * self.rank, tensor.shape[3]) for tensor in factors]

    @keeps_storage
    def collect_factors_into(self, buffers: Sequence[torch.Tensor], routing: Routing) -> None:
        """Collect into tensors that stay where they are."""
        for number, buffer in enumerate(buffers[: self.num_factors]):
            slots, weights = routing.indices.to(buffer.device), routing.weights.to(buffer.device, buffer.dtype)
            if self.capacity:
                self._collect(number, slots, weights, buffer)

    def _collect(self, number: int, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        tensor, (rows, k) = self.storage[number], slots.shape
        shape = (tensor.shape[0], rows, k, *tensor.shape[2:])
        flat = out.view(shape[0], rows * k, *shape[3:]) if out.numel() else out
        chosen = torch.index_select(tensor, 1, slots.reshape(-1), out=flat).view(shape)  # (weights, rows, k, r, width)
        if number % 2:  # the weights of a row go into B
            chosen.mul_(weights[:, :, None, None])
        return chosen.view(shape[0], rows, k * self.rank, shape[-1])

    def gathered(self, collected: Sequence[torch.Tensor]) -> dict[str, Gathered]:
        """Weight -> what was collected for it."""
        found: dict[str, Gathered] = {}
        for group, names in enumerate(self.groups.values()):
            downs, ups = collected[2 * group].mT.unbind(), collected[2 * group + 1].unbind()
            found |= {name: Gathered(down, up) for name, down, up in zip(names, downs, ups, strict=True)}
        return found


class LoraStack(FactorStack):
    """LoRA adapters of one set of weights and one rank. Arguments as for `FactorStack`."""

    def pack(self, pairs: Mapping[str, Pair]) -> Row:
        """A (r', d_in) and B (d_out, r') of every weight as a row."""
        return self.pack_pairs(pairs)

    def prepare(self, routing: Routing) -> dict[str, Part]:
        """What each weight adds, for rows that use the slots `routing.indices`. One row stands for all rows of the batch alike."""
        return self.static_parts(self.collect(routing))

    def static_buffers(self, rows: int, per_row: int) -> list[torch.Tensor]:
        """Room for what `collect_into` collects."""
        return self.static_factors(rows, per_row)

    def collect_into(self, buffers: Sequence[torch.Tensor], routing: Routing) -> None:
        """Collect into tensors that stay where they are."""
        self.collect_factors_into(buffers, routing)

    def static_parts(self, buffers: Sequence[torch.Tensor]) -> dict[str, Part]:
        """What each weight adds, read from tensors that stay where they are."""
        return {name: LoraPart(gathered) for name, gathered in self.gathered(buffers).items()}


@dataclass(frozen=True)
class CoefficientPlan:
    """Where the coefficients of a pool's adapter lie in a file, for all files with the same header.

    Args:
        dtype: Of all of them.
        num_bytes: Of the file without its header.
        source: (n,) place of each coefficient in the file, in the order of their places in a row.
        target: (n,) their places in a row; None if they fill it.
    """

    dtype: torch.dtype
    num_bytes: int
    source: torch.Tensor
    target: torch.Tensor | None


@dataclass(frozen=True)
class PoolShape:
    """What a pool is, apart from its numbers.

    Args:
        hash: Of its A and B, as `peft_s2lora` takes it.
        sharing: Which weights share a pair.
        group_of: Weight -> its group, in the order of the model's layers.
    """

    hash: str
    sharing: Sharing
    group_of: Mapping[str, str]


class Pool(Stack):
    """One A and B per group of weights, and the coefficients of every adapter that uses them.

    Args:
        shape: Who shares what.
        sizes: Size of each weight, by name.
        factors: A and B of every group.
    """

    slot_dim = 0

    @keeps_storage
    def __init__(
        self, shape: PoolShape, sizes: Mapping[str, Size], factors: Mapping[str, Pair], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.names = shape, tuple(shape.group_of)
        self._sizes = {name: sizes[name] for name in self.names}
        self.factors = {group: (_kept(A, device, dtype), _kept(B, device, dtype)) for group, (A, B) in factors.items()}
        self.ranks = [shape.sharing.rank(group) for group in shape.group_of.values()]
        self.storage = [torch.zeros(0, len(self.names), max(self.ranks), device=device, dtype=dtype)]
        self._set_up()

    @property
    def shared_nbytes(self) -> int:
        """Bytes that all its adapters share."""
        return sum(factor.nbytes for pair in self.factors.values() for factor in pair)

    @keeps_storage
    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.factors = {group: (A.to(device, dtype), B.to(device, dtype)) for group, (A, B) in self.factors.items()}
        self._set_up()
        super().to(device, dtype)  # last: where the coefficients are is where the pool counts as being

    def forget(self) -> None:
        """Let go of the inputs that were remembered."""
        for cell in self._cells.values():
            cell.forget()

    def pack(self, coefficients: Mapping[str, torch.Tensor], scaling: float) -> Row:
        """s (r,) of every weight, those that are missing being zero, as a row with the scaling in it."""
        row = self.storage[0].new_zeros(self.storage[0].shape[1:], device="cpu")
        for number, name in enumerate(self.names):
            if name in coefficients:
                row[number, : self.ranks[number]] = coefficients[name] * scaling
        return [row]

    def plan(self, places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int, int]]) -> CoefficientPlan:
        """Where the coefficients are, from the type, shape, first byte and byte after the last of each; of one type."""
        dtype = next(iter(places.values()))[0]
        number_of = {name: number for number, name in enumerate(self.names)}
        width = self.storage[0].shape[2]
        source = [torch.arange(start, end, dtype.itemsize) // dtype.itemsize for _, _, start, end in places.values()]
        target = [number_of[name] * width + torch.arange(shape[0]) for name, (_, shape, _, _) in places.items()]
        ordered, order = torch.cat(target).sort()
        fills = len(ordered) == len(self.names) * width
        num_bytes = max(end for *_, end in places.values())
        return CoefficientPlan(dtype, num_bytes, torch.cat(source)[order], None if fills else ordered)

    def pack_body(self, body: bytearray, plan: CoefficientPlan, scaling: float, label: str) -> Row:
        """As `pack`, out of a file that a plan fits."""
        values = torch.frombuffer(body, dtype=plan.dtype)[plan.source] * scaling
        if not values.isfinite().all():
            raise ValueError(f"{label}: its coefficients hold values that are not finite. The adapter is broken; train or save it again.")
        shape, dtype = self.storage[0].shape[1:], self.storage[0].dtype
        if plan.target is None:
            return [values.to(dtype).view(shape)]
        row = values.new_zeros(shape, dtype=dtype)
        row.view(-1)[plan.target] = values.to(dtype)
        return [row]

    def prepare(self, routing: Routing) -> dict[str, Part]:
        """What each weight adds, for rows that use the slots `routing.indices`. One row stands for all rows of the batch alike."""
        return self._parts(self._collect(routing))

    @keeps_storage
    def static_buffers(self, rows: int, per_row: int) -> list[torch.Tensor]:
        """Room for what `collect_into` collects."""
        return [self.storage[0].new_zeros(len(self.names), rows, self.storage[0].shape[2])]

    @keeps_storage
    def collect_into(self, buffers: Sequence[torch.Tensor], routing: Routing) -> None:
        """Collect into tensors that stay where they are."""
        if self.capacity:
            buffers[0].copy_(self._collect(routing))

    def static_parts(self, buffers: Sequence[torch.Tensor]) -> dict[str, Part]:
        """What each weight adds, read from tensors that stay where they are."""
        return self._parts(buffers[0])

    def _collect(self, routing: Routing) -> torch.Tensor:
        """(weights, rows, r): a row's coefficients are the weighted sum of those of its adapters, since all have the same A and B."""
        stored, (rows, k) = self.storage[0], routing.indices.shape
        weights = routing.weights.to(stored.device, stored.dtype)
        chosen = stored.index_select(0, routing.indices.to(stored.device).reshape(-1)).view(rows, k, *stored.shape[1:])
        chosen = chosen.mul_(weights[:, :, None, None])
        return (chosen[:, 0] if k == 1 else chosen.sum(1)).transpose(0, 1).contiguous()

    def _parts(self, collected: torch.Tensor) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for name, rank, s in zip(self.names, self.ranks, collected.unbind(), strict=True):
            down, up = self._of_weight[name]
            parts[name] = PoolPart(down, up, s if s.shape[1] == rank else s[:, :rank])
        return parts

    def _set_up(self) -> None:
        """For each weight, its A x, remembered together with the other weights that read the same x, and its B turned round."""
        self._cells: dict[tuple[str, int, bool, bool], SharedDown] = {}
        self._of_weight: dict[str, tuple[SharedDown, torch.Tensor]] = {}
        ups = {group: B.mT.contiguous() for group, (_, B) in self.factors.items()}  # (r, d_out)
        for name, group in self.shape.group_of.items():
            d_out, d_in = self._sizes[name]
            reused, outer = reads_shared_input(name), reads_outer_input(name)
            cell = (group, d_in, reused, outer)
            if cell not in self._cells:
                self._cells[cell] = SharedDown(self.factors[group][0][:, :d_in], reused, outer)
            self._of_weight[name] = (self._cells[cell], ups[group][:, :d_out])


def reads_shared_input(name: str) -> bool:
    """Whether other weights read the same input: q, k and v of an attention."""
    return name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")


def reads_outer_input(name: str) -> bool:
    """Whether the input is the encoder's states, the same for all decoder layers."""
    return name.rpartition(".")[0].endswith("encoder_attn") and name.rpartition(".")[2] in ("k_proj", "v_proj")


def _kept(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor to keep: one that was made in inference mode could not take part in autograd."""
    moved = tensor.to(device, dtype)
    return moved.clone() if moved.is_inference() else moved


def _resized(tensor: torch.Tensor, dim: int, size: int) -> list[int]:
    return [size if number == dim else length for number, length in enumerate(tensor.shape)]


def _grown(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The same with `size` slots; the new ones hold zeros, so that a slot that nobody uses adds nothing."""
    grown = tensor.new_zeros(_resized(tensor, dim, size))
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def rank_bucket(rank: int) -> int:
    """The rank that an adapter is stored at: the next power of two, so that near ranks share a stack and little is padded."""
    return next(size for size in (1 << power for power in itertools.count()) if size >= rank)
