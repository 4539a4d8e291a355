"""Many languages on one Whisper: `LanguageTable` keeps a thousand adapters side by side and gives each row of a batch its own.

    table = LanguageTable.attach(model)
    table.add("cy", "adapters/cy"); table.add("qug", "adapters/qug")
    with table.rows(["cy", None, "qug"]):          # one entry per row; None is the base model
        model.generate(features, language=["cy", "en", "es"])

Outside the `with` block, and in rows without a language, the model is its base. Adding, dropping and switching write to or point at a
slot of a stack (language_stacks.py); nothing is loaded, compiled or walked through. For inference: adapters are frozen here. One thread
at a time, as for the model.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from whisper_moe.adapter_files import (
    LORA,
    S2_COEFFICIENTS,
    AdapterFiles,
    Pair,
    Sharing,
    factors_hash,
    lora_pairs,
    read_adapter,
    s2_as_lora,
    s2_coefficients,
    s2_factors,
    s2_scaling,
)
from whisper_moe.base_signature import base_signature, check_base
from whisper_moe.language_stacks import CoefficientPlan, LoraStack, Pool, PoolShape, Row, Size, rank_bucket
from whisper_moe.routed_linear import Part, Request, RequestSlot, RoutedLinear
from whisper_moe.routing import Routing

Source: TypeAlias = "str | Path | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]"
RowLanguage: TypeAlias = "str | Mapping[str, float] | None"
Stack: TypeAlias = "LoraStack | Pool"

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_FORMAT = 1
_NUM_SHOWN = 12  # names in a message


@dataclass
class _Entry:
    """Where a language is: in a slot of its stack, in host memory, or both."""

    stack: Stack
    slot: int | None
    host: Row | None
    carrier: str | None


class LanguageTable:
    """Adapters of many languages, ready to be used row by row. Made by `LanguageTable.attach(model)`, not by hand."""

    def __init__(self, model: nn.Module, layers: dict[str, RoutedLinear], slot: RequestSlot, max_on_device: int | None) -> None:
        self.model = model
        self.max_on_device = max_on_device
        self.num_moved = 0  # adapters brought to the device because a batch asked for them
        self._layers, self._slot = layers, slot
        self._sizes: dict[str, Size] = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        self._stacks: list[Stack] = []
        self._entries: dict[str, _Entry] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()  # languages on the device, the one used longest ago first
        self._in_use: Counter[str] = Counter()
        self._signatures: set[str] = set()  # of bases, known to be this one
        self._plans: dict[tuple[str, bytes], CoefficientPlan] = {}  # pool and header of a file -> where its coefficients are
        self._attached = True

    @classmethod
    def attach(cls, model: nn.Module, *, target_modules: Sequence[str] = TARGET_MODULES, max_on_device: int | None = None) -> LanguageTable:
        """Make a model's linear layers ready for languages. Its weights and outputs stay as they are; `detach` takes everything back.

        Args:
            model: The bare base model, a Whisper.
            target_modules: Last names of the linear layers in encoder and decoder that adapters may use.
            max_on_device: How many languages may lie on the model's device; the others wait in host memory and are moved when a batch
                asks for them, in place of the one that was used longest ago. None: all of them.

        Raises:
            ValueError: The model carries adapters, or a table, already; no layer has one of the names; `max_on_device` is below 1.
        """
        if max_on_device is not None and max_on_device < 1:
            raise ValueError(f"max_on_device must be 1 or more, got {max_on_device}. Leave it out to keep every language on the device.")
        wrapped = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
        if wrapped is not None or hasattr(model, "peft_config"):
            raise ValueError(
                f"The model carries adapters or a table already (a {type(model).__name__}; look at {wrapped or 'peft_config'!r}). A table "
                "wants the bare base: `model.unload()` for PEFT, `switch.unload()` for an AdapterSwitch, `table.detach()` for a table."
            )
        slot, layers = RequestSlot(), dict[str, RoutedLinear]()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in target_modules:
                exact_rows = ".encoder.layers." in f".{name}"
                layers[name] = RoutedLinear(module, slot, len(layers), exact_rows)
        if not layers:
            names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise ValueError(f"No linear layer is called {' or '.join(target_modules)}. This model has: {', '.join(names) or 'none'}.")
        for name, layer in layers.items():
            _replace(model, name, layer)
        return cls(model, layers, slot, max_on_device)

    def detach(self) -> nn.Module:
        """Put the model's own layers back and return the model. The table keeps its languages but has no model any more."""
        self._check_attached()
        self._check_idle("detach")
        for name, layer in self._layers.items():
            _replace(self.model, name, layer.base_layer)
        self._attached = False
        return self.model

    # ---- what is in it -------------------------------------------------------------------------------------------------

    @property
    def languages(self) -> list[str]:
        """The languages, in the order in which they came."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, language: object) -> bool:
        return language in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.languages)

    @property
    def on_device(self) -> list[str]:
        """The languages on the model's device, the one used longest ago first."""
        return list(self._recent)

    def nbytes(self, language: str | None = None) -> int:
        """Bytes of one adapter as it is stored, without what it shares with others; without a language, of everything in the table."""
        if language is not None:
            return self._entry(language).stack.row_nbytes
        on_device = sum(sum(tensor.nbytes for tensor in stack.storage) for stack in self._stacks)
        in_host = sum(tensor.nbytes for entry in self._entries.values() for tensor in entry.host or ())
        return on_device + in_host + sum(stack.shared_nbytes for stack in self._stacks if isinstance(stack, Pool))

    def carrier(self, language: str) -> str:
        """The language whose token stands in the prompt: the adapter's carrier if its card names one, else the language itself."""
        return self._entry(language).carrier or language

    # ---- adding and dropping -------------------------------------------------------------------------------------------

    def add(self, language: str, adapter: Source, *, carrier: str | None = None) -> None:
        """Add a language.

        Args:
            language: What to call it; usually its code.
            adapter: Folder of a LoRA or S2-LoRA adapter, or `(config, tensors)`. An S2-LoRA that shares a pool needs `add_pool` first.
            carrier: Language whose token stands in the prompt, for one that Whisper has no token for.

        Raises:
            ValueError: The name is taken, or the adapter does not fit. Table and model are as before.
        """
        self.load_many({language: adapter}, carriers={} if carrier is None else {language: carrier})

    def load_many(self, adapters: Mapping[str, Source], *, carriers: Mapping[str, str] | None = None) -> None:
        """Add many languages: all of them, or, if one cannot be added, none. Arguments and errors as for `add`."""
        self._check_attached()
        self._follow_model()
        num_stacks = len(self._stacks)
        try:
            found = [(language, *self._read(language, source)) for language, source in adapters.items()]
        except BaseException:
            del self._stacks[num_stacks:]
            raise
        for stack in self._stacks:
            new = [(language, row, carrier) for language, of, row, carrier in found if of is stack]
            if new:
                self._insert(stack, [(language, row, (carriers or {}).get(language, carrier)) for language, row, carrier in new])
        self._entries |= {language: self._entries.pop(language) for language in adapters}  # in the order in which they were named

    def add_pool(self, adapter: Source) -> str:
        """Add the A and B that pooled S2-LoRA adapters use, from the S2-LoRA that owns them. Returns the pool's hash.

        The owner itself becomes a language only through `add`, and then uses the pool too.
        """
        self._check_attached()
        self._follow_model()
        files = read_adapter(adapter)
        if files.method == LORA or files.is_pooled:
            raise ValueError(
                f"{files.label} owns no shared A and B: it cannot be a pool. Give the S2-LoRA that the others were trained on."
            )
        self._check_base(files)
        factors = s2_factors(files, self._sizes)
        group_of, sharing = {}, Sharing.of(files.config)
        coefficients = s2_coefficients(files)
        self._check_names(files, coefficients)
        for name in self._sizes:
            if name in coefficients:
                group_of[name] = sharing.key(name, *self._sizes[name])
        shape = PoolShape(factors_hash(factors), sharing, group_of)
        if any(pool.shape.hash == shape.hash for pool in self._pools()):
            return shape.hash
        self._check_pool(files, shape, factors)
        self._stacks.append(Pool(shape, self._sizes, factors, *self._place()))
        return shape.hash

    def drop(self, language: str) -> None:
        """Forget a language. A batch must not be using it."""
        entry = self._entry(language)
        if self._in_use[language]:
            raise ValueError(f"{language!r} is used by the batch that is running. Drop it after the `with table.rows(...)` block.")
        if entry.slot is not None:
            entry.stack.release(entry.slot)
        del self._entries[language]
        self._recent.pop(language, None)

    # ---- using ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def rows(self, languages: Sequence[RowLanguage]) -> Iterator[None]:
        """Give each row of the batch its language, for the length of a `with` block.

        Args:
            languages: For every row a language, None for the base model, or a mixture `{"cy": 0.7, "br": 0.3}` (weights as they are: for
                instance the probabilities of the languages).

        Raises:
            ValueError: A language is unknown, no row is named, or more languages are asked for than may lie on the device.
        """
        self._check_attached()
        if isinstance(languages, str):
            raise ValueError(f"rows() takes one entry per row of the batch, got the string {languages!r}. Put it in a list.")
        mixtures = [self._mixture(row, language) for row, language in enumerate(languages)]
        if not mixtures:
            raise ValueError("rows() was given no rows. Name a language, or None, for every row of the batch.")
        used = {name for mixture in mixtures for name in mixture}
        self._follow_model()
        self._bring(used)
        request = Request(len(mixtures), self._parts(mixtures))
        self._in_use.update(used)
        try:
            with self._slot.use(request):
                yield
        finally:
            self._in_use.subtract(used)
            self._forget()

    def static_rows(self, num_rows: int, *, per_row: int = 1) -> StaticRows:
        """Room for batches of `num_rows`, at fixed addresses: for CUDA graphs, and for `torch.compile` without recompilation whichever
        languages come. Every stack that the table has now takes part in every batch. `per_row`: most languages that a row may mix."""
        self._check_attached()
        if num_rows < 1 or per_row < 1:
            raise ValueError(f"num_rows and per_row must be 1 or more, got {num_rows} and {per_row}.")
        if not self._stacks:
            raise ValueError("The table holds nothing yet. Add languages or a pool first: their shapes decide how much room is needed.")
        self._follow_model()
        return StaticRows(self, num_rows, per_row)

    # ---- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything into one file that `LanguageTable.load` reads back quickly."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        rows = []
        for number, stack in enumerate(self._stacks):
            members = [(language, entry) for language, entry in self._entries.items() if entry.stack is stack]
            contents = [_row(entry) for _, entry in members]
            for part, storage in enumerate(stack.storage):
                values = [row[part] for row in contents]
                shape = [0 if dim == stack.slot_dim else size for dim, size in enumerate(storage.shape)]
                tensors[f"{number}.{part}"] = torch.stack(values, stack.slot_dim) if values else storage.new_zeros(shape, device="cpu")
            row: dict[str, Any] = {"languages": {language: entry.carrier for language, entry in members}, "names": list(stack.names)}
            if isinstance(stack, Pool):
                sharing = stack.shape.sharing
                row |= {"pool": stack.shape.hash, "r": sharing.r, "share_scope": sharing.scope, "share_groups": sharing.groups}
                row |= {"group_ranks": dict(sharing.group_ranks), "groups": list(stack.factors)}
                for group, (A, B) in enumerate(stack.factors.values()):
                    tensors |= {f"{number}.A.{group}": A.cpu().contiguous(), f"{number}.B.{group}": B.cpu().contiguous()}
            else:
                row |= {"rank": stack.rank}
            rows.append(row)
        header = {"format": _FORMAT, "stacks": rows, "order": self.languages, "base_signature": _signature(self.model)}
        save_file(tensors, str(path), metadata={"language_table": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **options: Any) -> LanguageTable:
        """Attach a table that was written by `save`. `options` as for `attach`. If it does not fit, the model is as before."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("language_table", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The table in {path} cannot be read: {error}.") from None
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise ValueError(f"{path} is no table of languages in format {_FORMAT}. LanguageTable.save writes one.")
        table = cls.attach(model, **options)
        try:
            if header["base_signature"] is not None:
                check_base(header["base_signature"], model)
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"The table in {path} holds values that are not finite, in {name!r}. Make it anew.")
            for number, row in enumerate(header["stacks"]):
                table._restore(str(number), row, tensors)
            table._entries = {language: table._entries[language] for language in header["order"]}
        except BaseException:
            table.detach()
            raise
        return table

    # ---- inside: adding ------------------------------------------------------------------------------------------------

    def _read(self, language: str, source: Source) -> tuple[Stack, Row, str | None]:
        """The stack and the row of an adapter. May add a stack; changes nothing else."""
        if not isinstance(language, str) or not language:
            raise ValueError(f"A language is called by a name, usually its code; got {language!r}.")
        if language in self._entries:
            raise ValueError(f"{language!r} is in the table already. `table.drop({language!r})` first, or choose another name.")
        files = read_adapter(source)
        self._check_base(files)
        carrier = files.card.get("carrier")
        pool = None if files.method == LORA else self._pool_of(files)
        if pool is not None:
            return pool, self._pool_row(files, pool), carrier
        pairs = lora_pairs(files) if files.method == LORA else s2_as_lora(files, self._sizes)
        self._check_names(files, pairs)
        self._check_pairs(files, pairs)
        stack = self._lora_stack(pairs)
        return stack, stack.pack(pairs), carrier

    def _pool_of(self, files: AdapterFiles) -> Pool | None:
        """The pool that an S2-LoRA uses; None for one that owns A and B which are no pool here: it is a LoRA, exactly."""
        if not files.is_pooled:
            if not self._pools():
                return None
            own = factors_hash(s2_factors(files, self._sizes))
            return next((pool for pool in self._pools() if pool.shape.hash == own), None)
        wanted = files.config.get("pool_hash")
        for pool in self._pools():
            if pool.shape.hash == wanted:
                return pool
        known = ", ".join(f"{pool.shape.hash[:12]}..." for pool in self._pools()) or "none"
        raise ValueError(
            f"{files.label} uses the pool {files.config['pool']!r} with the hash {str(wanted)[:12]}...; pools in the table: {known}. "
            f"Add the pool it was trained on first: table.add_pool(folder of {files.config['pool']!r})."
        )

    def _pool_row(self, files: AdapterFiles, pool: Pool) -> Row:
        """An adapter's coefficients. Adapters of one pool have one header as a rule: what was found out of it holds for the next one."""
        plan = self._plans.get((pool.shape.hash, files.header)) if files.header else None
        if plan is not None and len(files.body) == plan.num_bytes:
            return pool.pack_body(files.body, plan, s2_scaling(files.config), files.label)
        coefficients = s2_coefficients(files)
        if files.is_pooled and len(coefficients) < len(files.tensors):
            other = next(key for key in files.tensors if not key.endswith(f".{S2_COEFFICIENTS}"))
            raise ValueError(f"{files.label} uses a pool, so it holds coefficients only; it also has {other!r}. Save it again.")
        self._check_names(files, coefficients)
        ranks = dict(zip(pool.names, pool.ranks, strict=True))
        for name, s in coefficients.items():
            if name not in ranks:
                raise ValueError(f"{files.label} adapts {name!r}, which its pool does not. The pool adapts {_shown(pool.names)}.")
            if s.shape != (ranks[name],):
                raise ValueError(f"{files.label}: {name!r} has coefficients of shape {tuple(s.shape)}, the pool has rank {ranks[name]}.")
        if files.header and len({dtype for dtype, *_ in files.layout.values()}) == 1:
            places = {name: files.layout[f"{name}.{S2_COEFFICIENTS}"] for name in coefficients}
            self._plans[pool.shape.hash, files.header] = pool.plan(places)
        return pool.pack(coefficients, s2_scaling(files.config))

    def _lora_stack(self, pairs: Mapping[str, Pair]) -> LoraStack:
        """The stack for adapters of these weights and about this rank; made if there is none."""
        names = tuple(name for name in self._sizes if name in pairs)
        rank = rank_bucket(max(1, *(len(A) for A, _ in pairs.values())))
        for stack in self._stacks:
            if isinstance(stack, LoraStack) and stack.names == names and stack.rank == rank:
                return stack
        new = LoraStack({name: self._sizes[name] for name in names}, rank, *self._place())
        self._stacks.append(new)
        return new

    def _insert(self, stack: Stack, new: Sequence[tuple[str, Row, str | None]]) -> None:
        """Put languages into a stack: into slots as long as there may be more on the device, the others into host memory."""
        room = len(new) if self.max_on_device is None else max(0, self.max_on_device - len(self._recent))
        slots = stack.take(min(room, len(new)), self.max_on_device) if room else []
        if slots:
            stack.write(slots, [row for _, row, _ in new[: len(slots)]])
        for number, (language, row, carrier) in enumerate(new):
            slot = slots[number] if number < len(slots) else None
            host = None if self.max_on_device is None else [tensor.to(stack.storage[0].dtype) for tensor in row]
            self._entries[language] = _Entry(stack, slot, host, carrier)
            if slot is not None:
                self._recent[language] = None

    def _restore(self, number: str, row: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """A stack, and the languages in it, out of a file."""
        missing = [name for name in row["names"] if name not in self._sizes]
        if missing:
            raise ValueError(
                f"The table has adapters for {_shown(missing)}, which this model does not have. Load the base it was made for."
            )
        stack: Stack
        if "pool" in row:
            factors = {group: (tensors[f"{number}.A.{i}"], tensors[f"{number}.B.{i}"]) for i, group in enumerate(row["groups"])}
            sharing = Sharing.of(row)
            shape = PoolShape(row["pool"], sharing, {name: sharing.key(name, *self._sizes[name]) for name in row["names"]})
            for name, group in shape.group_of.items():
                self._check_factor(f"The pool in the table, {name!r}", factors.get(group), self._sizes[name], sharing)
            stack = Pool(shape, self._sizes, factors, *self._place())
        else:
            stack = LoraStack({name: self._sizes[name] for name in row["names"]}, row["rank"], *self._place())
        languages = row["languages"]
        contents = [tensors[f"{number}.{part}"] for part in range(len(stack.storage))]
        for tensor, storage in zip(contents, stack.storage, strict=True):
            expected = [len(languages) if dim == stack.slot_dim else size for dim, size in enumerate(storage.shape)]
            if list(tensor.shape) != expected:
                raise ValueError(
                    f"The table holds {tuple(tensor.shape)} where this model needs {tuple(expected)}. It was made for another."
                )
        rows = zip(*(tensor.unbind(stack.slot_dim) for tensor in contents), strict=True)
        self._stacks.append(stack)
        self._insert(stack, [(language, list(each), languages[language]) for language, each in zip(languages, rows, strict=True)])

    # ---- inside: using -------------------------------------------------------------------------------------------------

    def _mixture(self, row: int, language: RowLanguage) -> dict[str, float]:
        """What a row asks for, as languages and their weights."""
        mixture = {} if language is None else {language: 1.0} if isinstance(language, str) else dict(language)
        for name, weight in mixture.items():
            if name not in self._entries:
                raise ValueError(f"Row {row} of the batch asks for {name!r}, which is not in the table. {self._suggestion(name)}")
            if not isinstance(weight, (int, float)) or weight != weight or weight in (float("inf"), float("-inf")):
                raise ValueError(f"Row {row} of the batch gives {name!r} the weight {weight!r}. A weight is a finite number.")
        return mixture

    def _bring(self, used: set[str]) -> None:
        """See to it that the languages are on the device, in the place of others if there may be no more."""
        if self.max_on_device is not None and len(used) > self.max_on_device:
            raise ValueError(
                f"The batch asks for {len(used)} languages, and max_on_device lets {self.max_on_device} lie on the device. "
                "Use smaller batches, or attach the table with a larger max_on_device."
            )
        for language in used:
            entry = self._entries[language]
            if entry.slot is None:
                self._make_room(used)
                assert entry.host is not None
                (entry.slot,) = entry.stack.take(1, self.max_on_device)
                entry.stack.write([entry.slot], [entry.host])
                self.num_moved += 1
            self._recent[language] = None
            self._recent.move_to_end(language)

    def _make_room(self, used: set[str]) -> None:
        """Take the language used longest ago off the device, if there may be no further one."""
        assert self.max_on_device is not None
        if len(self._recent) < self.max_on_device:
            return
        idle = [language for language in self._recent if language not in used and not self._in_use[language]]
        if not idle:
            raise ValueError(
                f"All {self.max_on_device} languages that max_on_device allows are used by batches that are running. "
                "Leave the outer `with table.rows(...)` block first, or attach the table with a larger max_on_device."
            )
        evicted = idle[0]
        entry = self._entries[evicted]
        assert entry.slot is not None
        entry.stack.release(entry.slot)
        entry.slot = None
        del self._recent[evicted]

    def _parts(self, mixtures: Sequence[Mapping[str, float]]) -> list[tuple[Part, ...]]:
        """For each layer, what is added there. Rows that are all alike are one row: nothing is copied for a single language."""
        if all(mixture == mixtures[0] for mixture in mixtures):
            mixtures = mixtures[:1]
        per_stack: dict[int, dict[str, Part]] = {}
        for number, stack in enumerate(self._stacks):
            routing = self._routing(stack, mixtures)
            if routing is not None:
                per_stack[number] = stack.prepare(routing)
        if len(per_stack) == 1:
            (only,) = per_stack.values()
            return [(only[name],) if name in only else () for name in self._layers]
        return [tuple(parts[name] for parts in per_stack.values() if name in parts) for name in self._layers]

    def _routing(self, stack: Stack, mixtures: Sequence[Mapping[str, float]], per_row: int | None = None) -> Routing | None:
        """Slots and weights of a stack's languages in each row; None if no row has any, unless room for `per_row` is to be filled."""
        mine = [[(self._slot_of(name), weight) for name, weight in row.items() if self._entries[name].stack is stack] for row in mixtures]
        k = per_row if per_row is not None else max(len(row) for row in mine)
        if k == 0:
            return None
        padded = [row + [(0, 0.0)] * (k - len(row)) for row in mine]
        indices = torch.tensor([[slot for slot, _ in row] for row in padded], dtype=torch.long)
        return Routing(indices, torch.tensor([[weight for _, weight in row] for row in padded], dtype=torch.float64))

    def _slot_of(self, language: str) -> int:
        slot = self._entries[language].slot
        assert slot is not None
        return slot

    def _forget(self) -> None:
        for stack in self._stacks:
            if isinstance(stack, Pool):
                stack.forget()

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of the base model's weights; adapters keep the base's precision. Packed (quantised) weights: single."""
        weight = next(iter(self._layers.values())).weight
        return weight.device, weight.dtype if weight.is_floating_point() else torch.float32

    def _follow_model(self) -> None:
        """Move the storage to where the model is now."""
        device, dtype = self._place()
        for stack in self._stacks:
            if stack.storage[0].device != device or stack.storage[0].dtype != dtype:
                self._check_idle("move the model")
                stack.to(device, dtype)

    # ---- inside: refusing ----------------------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if not self._attached:
            raise ValueError("The table was detached from its model. Save it before, and load it with LanguageTable.load(path, model).")

    def _check_idle(self, what: str) -> None:
        if self._slot.current is not None:
            raise ValueError(f"A batch is running, so one cannot {what} now. Do it after the `with table.rows(...)` block.")

    def _entry(self, language: str) -> _Entry:
        if language not in self._entries:
            raise ValueError(f"{language!r} is not in the table. {self._suggestion(language)}")
        return self._entries[language]

    def _suggestion(self, language: object) -> str:
        near = difflib.get_close_matches(str(language), self._entries, n=1)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        return f"{meant}It knows {_shown(self._entries)}. Add one with table.add({language!r}, folder)."

    def _check_base(self, files: AdapterFiles) -> None:
        """Refuse an adapter whose card says that it was made for another base. Each different signature is compared once."""
        signature = files.card.get("base_signature")
        if signature is None:
            return
        key = json.dumps(signature, sort_keys=True)
        if key not in self._signatures:
            check_base(signature, self.model)
            self._signatures.add(key)

    def _check_names(self, files: AdapterFiles, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._sizes]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._sizes, n=1)
            meant = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(
                f"{files.label} adapts {len(unknown)} modules that the table does not have, for instance {unknown[0]!r}{meant}. If the "
                "model has them, attach with their names in target_modules; else load the base that the adapter was made for."
            )
        if not any(True for _ in names):
            raise ValueError(f"{files.label} adapts nothing: its file holds no weights of the kind that {files.method} has.")

    def _check_pairs(self, files: AdapterFiles, pairs: Mapping[str, Pair]) -> None:
        for name, (A, B) in pairs.items():
            d_out, d_in = self._sizes[name]
            if A.shape[1] != d_in or B.shape[0] != d_out:
                raise ValueError(
                    f"{files.label}: {name!r} is a weight of ({d_out}, {d_in}) here, so A is (r, {d_in}) and B ({d_out}, r); the file has "
                    f"{tuple(A.shape)} and {tuple(B.shape)}. It was made for another base."
                )

    def _check_pool(self, files: AdapterFiles, shape: PoolShape, factors: Mapping[str, Pair]) -> None:
        for name, group in shape.group_of.items():
            self._check_factor(f"{files.label}: {name!r}", factors.get(group), self._sizes[name], shape.sharing)

    @staticmethod
    def _check_factor(label: str, pair: Pair | None, size: Size, sharing: Sharing) -> None:
        """A pair fits a weight if it has its size or, for a pair that all weights share, at least its size."""
        d_out, d_in = size
        if pair is None:
            raise ValueError(f"{label} has coefficients but its group has no A and B in the file. The file is incomplete.")
        came = (pair[1].shape[0], pair[0].shape[1])
        fits = came[0] >= d_out and came[1] >= d_in if sharing.scope == "global" else came == size
        if not fits:
            shapes = f"A {tuple(pair[0].shape)} and B {tuple(pair[1].shape)}"
            raise ValueError(f"{label} is a weight of {size} here, which {shapes} do not fit. Load the base that it was made for.")

    def _pools(self) -> list[Pool]:
        return [stack for stack in self._stacks if isinstance(stack, Pool)]


class StaticRows:
    """Batches of one size whose languages change while every tensor stays where it is: `set` writes, `with rows.use():` applies.

    Made by `table.static_rows(num_rows)`. Languages that were added since must lie in a stack that existed then.
    """

    def __init__(self, table: LanguageTable, num_rows: int, per_row: int) -> None:
        self._table, self.num_rows, self.per_row = table, num_rows, per_row
        self._stacks = list(table._stacks)
        self._buffers = [stack.static_buffers(num_rows, per_row) for stack in self._stacks]
        per_stack = [stack.static_parts(buffers) for stack, buffers in zip(self._stacks, self._buffers, strict=True)]
        self._request = Request(num_rows, [tuple(parts[name] for parts in per_stack if name in parts) for name in table._layers])

    def set(self, languages: Sequence[RowLanguage]) -> None:
        """Give each row its language from now on; entries as for `LanguageTable.rows`."""
        table = self._table
        if len(languages) != self.num_rows:
            raise ValueError(f"{len(languages)} languages came for {self.num_rows} rows. Fill a smaller batch up with None.")
        mixtures = [table._mixture(row, language) for row, language in enumerate(languages)]
        for row, mixture in enumerate(mixtures):
            if len(mixture) > self.per_row:
                raise ValueError(
                    f"Row {row} mixes {len(mixture)} languages, and there is room for {self.per_row}: see per_row of static_rows."
                )
            late = [name for name in mixture if not any(table._entries[name].stack is stack for stack in self._stacks)]
            if late:
                raise ValueError(f"{late[0]!r} lies in a stack that did not exist when static_rows was called. Call it again.")
        table._bring({name for mixture in mixtures for name in mixture})
        for stack, buffers in zip(self._stacks, self._buffers, strict=True):
            routing = table._routing(stack, mixtures, self.per_row)
            assert routing is not None
            stack.collect_into(buffers, routing)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Apply what was set, for the length of a `with` block. What was set last, or is set inside, holds."""
        try:
            with self._table._slot.use(self._request):
                yield
        finally:
            self._table._forget()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _row(entry: _Entry) -> Row:
    """The numbers of a language, in host memory."""
    if entry.host is not None:
        return entry.host
    assert entry.slot is not None
    return entry.stack.read(entry.slot)


def _signature(model: nn.Module) -> dict[str, Any] | None:
    """The base's signature; None for a model that is no Whisper."""
    return base_signature(model) if getattr(getattr(model, "config", None), "model_type", None) == "whisper" else None


def _shown(names: Iterable[str]) -> str:
    """Names for a message, the first of them if there are many."""
    listed = list(names)
    more = f" and {len(listed) - _NUM_SHOWN} more" if len(listed) > _NUM_SHOWN else ""
    return ", ".join(listed[:_NUM_SHOWN]) + more if listed else "none"
