"""Many languages on one Whisper: `LanguageTable` keeps a thousand adapters side by side and gives each row of a batch its own.

    table = LanguageTable.attach(model)
    table.add("cy", "adapters/cy"); table.add("qug", "adapters/qug")
    with table.rows(["cy", None, "qug"]):          # one entry per row; None is the base model
        model.generate(features, language=["cy", "en", "es"])

Outside the `with` block, and in rows without a language, the model is its base. Adding, dropping and switching write to or point at a
slot of a stack (language_stacks.py, moe_rows.py); nothing is loaded, compiled or walked through. For inference: adapters are frozen
here. One thread at a time, as for the model.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from whisper_moe.adapter_files import (
    LORA,
    LORAMOE,
    S2_COEFFICIENTS,
    S2LORA,
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
from whisper_moe.moe_rows import (
    IS_GIVEN,
    READS_POSITIONS,
    GateRecorder,
    Mixture,
    MoeSpec,
    MoeStack,
    MoeUse,
    Record,
    gates_for,
    is_encoder,
    ranks_bucket,
    read_mixture,
    recordings_of,
)
from whisper_moe.moe_state import decoder_of
from whisper_moe.routed_linear import BeginDecoder, Part, Request, RequestSlot, RoutedLinear
from whisper_moe.routing import Routing

Source: TypeAlias = "str | Path | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]"
RowLanguage: TypeAlias = "str | Mapping[str, float] | None"
RowGates: TypeAlias = "Sequence[Any] | torch.Tensor | None"  # per row what `use_gates` takes for a row, None for the router's own
RowMasks: TypeAlias = "Sequence[Collection[str] | None] | None"
Stack: TypeAlias = "LoraStack | Pool | MoeStack"

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
    spec: MoeSpec | None  # of a mixture with a router


class _New(NamedTuple):
    """A language on its way into its stack."""

    language: str
    row: Row
    carrier: str | None
    spec: MoeSpec | None


class _Use(NamedTuple):
    """A language in a row: how strongly, and for a mixture with a router its gates, if they are given, and the experts left out."""

    language: str
    weight: float
    gates: tuple[float, ...] | None = None
    masked: frozenset[str] = frozenset()


class Heard(NamedTuple):
    """Gates that nobody gave but the base model was asked for: those of the mixtures that wait for some. The others keep their router's."""

    gates: Any


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
        self._hook: Any = None  # by which routers hear the recording; there from the first mixture on
        self._attached = True
        self.is_paused = False

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
                layers[name] = RoutedLinear(module, slot, len(layers), exact_rows=is_encoder(name))
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
        if self._hook is not None:
            self._hook.remove()
        self._attached = False
        return self.model

    def pause(self) -> None:
        """Put the model's own layers back for a while, for something that wants the bare base. The table keeps its languages."""
        if not self._attached:
            self._check_attached()
        self._check_idle("pause the table")
        self.is_paused = True  # first: if this is interrupted, nobody must believe the table to be on the model
        for name, layer in self._layers.items():
            if self.model.get_submodule(name) is layer:
                _replace(self.model, name, layer.base_layer)

    def resume(self) -> None:
        """Be ready again, after `pause`. The model must be the bare base."""
        if not self.is_paused:
            return
        for name, layer in self._layers.items():
            if self.model.get_submodule(name) not in (layer, layer.base_layer):
                raise ValueError(f"The model is not as it was when the table was paused: look at {name!r}. Take off what was put on since.")
        for name, layer in self._layers.items():
            _replace(self.model, name, layer)
        self.is_paused = False

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

    def experts(self, language: str) -> tuple[str, ...]:
        """The experts of a language that is a mixture with a router, in the order of its gates; none for other languages."""
        spec = self._entry(language).spec
        return () if spec is None else spec.experts

    def router(self, language: str) -> str | None:
        """Where the gates of a language that is a mixture come from: "utterance", "token", "static" or "language"; None for others."""
        spec = self._entry(language).spec
        return None if spec is None else spec.router

    def wants_gates(self, language: str) -> bool:
        """Whether the language can only be used with gates that the caller gives: its router is "language", and it has no prior."""
        spec = self._entry(language).spec
        return spec is not None and spec.router == IS_GIVEN and spec.prior is None

    def adapts_encoder(self, language: str) -> bool:
        """Whether the adapter changes the encoder. If not, a row's encoder states are the base model's."""
        return any(is_encoder(name) for name in self._entry(language).stack.names)

    # ---- adding and dropping -------------------------------------------------------------------------------------------

    def add(self, language: str, adapter: Source, *, carrier: str | None = None) -> None:
        """Add a language.

        Args:
            language: What to call it; usually its code.
            adapter: Folder of a LoRA, S2-LoRA or LoRA-MoE adapter, or `(config, tensors)`. An S2-LoRA that shares a pool needs `add_pool`
                first. A LoRA-MoE that was saved by reference reads its experts from their own folders, and checks their hashes.
            carrier: Language whose token stands in the prompt, for one that Whisper has no token for.

        Raises:
            ValueError: The name is taken, or the adapter does not fit. Table and model are as before.
        """
        self.load_many({language: adapter}, carriers={} if carrier is None else {language: carrier})

    def load_many(self, adapters: Mapping[str, Source], *, carriers: Mapping[str, str] | None = None) -> None:
        """Add many languages: all of them, or, if one cannot be added, none. Arguments and errors as for `add`."""
        self._check_attached()
        self._follow_model()
        num_stacks, before, hook = len(self._stacks), set(self._entries), self._hook
        try:
            found = [self._read(language, source, (carriers or {}).get(language)) for language, source in adapters.items()]
            for stack in self._stacks:
                new = [each for of, each in found if of is stack]
                if new:
                    self._insert(stack, new)
        except BaseException:  # out of memory, or interrupted, too
            for language in [language for language in self._entries if language not in before]:
                self._remove(language)
            del self._stacks[num_stacks:]
            if hook is None and self._hook is not None:
                self._hook.remove()
                self._hook = None
            raise
        self._entries |= {language: self._entries.pop(language) for language in adapters}  # in the order in which they were named

    def add_pool(self, adapter: Source) -> str:
        """Add the A and B that pooled S2-LoRA adapters use, from the S2-LoRA that owns them. Returns the pool's hash.

        The owner itself becomes a language only through `add`, and then uses the pool too.
        """
        self._check_attached()
        self._follow_model()
        files = read_adapter(adapter)
        if files.method != S2LORA or files.is_pooled:
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
        self._entry(language)
        if self._in_use[language]:
            raise ValueError(f"{language!r} is used by the batch that is running. Drop it after the `with table.rows(...)` block.")
        self._remove(language)

    def _remove(self, language: str) -> None:
        entry = self._entries.pop(language)
        if entry.slot is not None:
            entry.stack.release(entry.slot)
        self._recent.pop(language, None)
        if not isinstance(entry.stack, Pool) and not any(other.stack is entry.stack for other in self._entries.values()):
            self._stacks = [stack for stack in self._stacks if stack is not entry.stack]  # room for nobody costs every batch

    # ---- using ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def rows(
        self, languages: Sequence[RowLanguage], *, gates: RowGates = None, masked: RowMasks = None, record: Record | None = None
    ) -> Iterator[None]:
        """Give each row of the batch its language, for the length of a `with` block.

        Args:
            languages: For every row a language, None for the base model, or a mixture `{"cy": 0.7, "br": 0.3}` (weights as they are: for
                instance the probabilities of the languages).
            gates: For rows whose language is a LoRA-MoE: an expert's name, a dict expert -> weight, a `LanguagePosterior` or a tensor
                (experts,), instead of the router's gates; None, for a row: the router's. A router "language" has none of its own: it
                takes these, or else its prior. A tensor (rows, experts) gives them for all rows. In a row that mixes several LoRA-MoEs,
                they hold for each of them.
            masked: For such rows, experts that are left out; the others take their share.
            record: Called with the name of a weight and its gates, (rows, experts) or, of a router "token", (rows, positions, experts), for
                every weight that experts add something to: at once where the gates are known, else whenever the model makes some. All rows
                must have the same LoRA-MoE. (`record_gates` does this for a `PeftModel`.)

        Raises:
            ValueError: A language is unknown, no row is named, more languages are asked for than may lie on the device, gates are missing
                or do not fit, or there is no one mixture to record.
        """
        self._check_attached()
        asked = self._asked(languages, gates, masked)
        recorder = None if record is None else GateRecorder(record, len(asked))
        used = {use.language for row in asked for use in row}
        if recorder is not None and (len(used) != 1 or not all(row and self.experts(row[0].language) for row in asked)):
            raise ValueError(f"record= wants one and the same LoRA-MoE in every row; got {_shown(sorted(used))}. Record one at a time.")
        self._follow_model()
        self._bring(used)
        request = Request(len(asked), *self._parts(asked, recorder))
        self._in_use.update(used)
        try:
            with self._slot.use(request):
                yield
        finally:
            self._in_use.subtract(used)
            self._forget()

    def check_rows(self, languages: Sequence[RowLanguage], *, gates: RowGates = None, masked: RowMasks = None) -> None:
        """Refuse what `rows` would refuse of its arguments, without doing its work."""
        self._check_attached()
        self._asked(languages, gates, masked)

    def static_rows(self, num_rows: int, *, per_row: int = 1) -> StaticRows:
        """Room for batches of `num_rows`, at fixed addresses: for CUDA graphs, and for `torch.compile` without recompilation whichever
        languages come, mixtures with routers too. Every stack that the table has now takes part in every batch. `per_row`: most languages
        that a row may mix."""
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
            if isinstance(stack, MoeStack):
                specs = {language: entry.spec.as_dict() for language, entry in members if entry.spec is not None}
                row |= {"num_experts": stack.num_experts, "per_position": stack.per_position, "width": stack.width, "specs": specs}
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

    def _read(self, language: str, source: Source, carrier: str | None) -> tuple[Stack, _New]:
        """The stack of an adapter, and what goes into it. May add a stack; changes nothing else."""
        if not isinstance(language, str) or not language:
            raise ValueError(f"A language is called by a name, usually its code; got {language!r}.")
        if language in self._entries:
            raise ValueError(f"{language!r} is in the table already. `table.drop({language!r})` first, or choose another name.")
        files = read_adapter(source, (LORA, S2LORA, LORAMOE))
        self._check_base(files)
        carrier = files.card.get("carrier") if carrier is None else carrier
        pool = self._pool_of(files) if files.method == S2LORA else None
        if pool is not None:
            return pool, _New(language, self._pool_row(files, pool), carrier, None)
        if files.method == LORAMOE:
            if files.tensors or not files.config.get("experts"):  # one saved by reference may hold nothing of its own
                self._check_names(files, {key.rpartition(".")[0] for key in files.tensors})
            mixture = read_mixture(files, self.model, self._sizes)
            if mixture.spec.experts:
                moe_stack = self._moe_stack(mixture)
                return moe_stack, _New(language, moe_stack.pack(mixture), carrier, mixture.spec)
            pairs = mixture.pairs
        else:
            pairs = lora_pairs(files) if files.method == LORA else s2_as_lora(files, self._sizes)
        self._check_names(files, pairs)
        self._check_pairs(files, pairs)
        stack = self._lora_stack(pairs)
        return stack, _New(language, stack.pack(pairs), carrier, None)

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

    def _moe_stack(self, mixture: Mixture) -> MoeStack:
        """The stack for mixtures of these weights and about this size; made if there is none."""
        names, spec = tuple(name for name in self._sizes if name in mixture.pairs), mixture.spec
        for stack in self._stacks:
            if isinstance(stack, MoeStack) and stack.fits(names, spec):
                return stack
        rank, num_experts = ranks_bucket(spec.num_ranks), rank_bucket(len(spec.experts))
        return self._new_moe_stack(names, rank, num_experts, spec.router == READS_POSITIONS)

    def _new_moe_stack(self, names: Sequence[str], rank: int, num_experts: int, per_position: bool) -> MoeStack:
        if self._hook is None:
            decoder = decoder_of(self.model)
            if decoder is None:
                raise ValueError(f"A LoRA-MoE in a table needs a Whisper, an encoder and a decoder; this is a {type(self.model).__name__}.")
            self._hook = decoder.register_forward_pre_hook(BeginDecoder(self._slot), with_kwargs=True)
        config: Any = self.model.config
        new = MoeStack({name: self._sizes[name] for name in names}, rank, num_experts, per_position, config.d_model, *self._place())
        self._stacks.append(new)
        return new

    def _insert(self, stack: Stack, new: Sequence[_New]) -> None:
        """Put languages into a stack: into slots as long as there may be more on the device, the others into host memory."""
        room = len(new) if self.max_on_device is None else max(0, self.max_on_device - len(self._recent))
        hosts: list[Row | None] = [None] * len(new)
        if self.max_on_device is not None:
            hosts = [[tensor.to(stored.dtype) for tensor, stored in zip(each.row, stack.storage, strict=True)] for each in new]
        slots = stack.take(min(room, len(new)), self.max_on_device) if room else []
        if slots:
            self._write(stack, slots, [each.row for each in new[: len(slots)]])
        for number, (language, _, carrier, spec) in enumerate(new):
            slot = slots[number] if number < len(slots) else None
            self._entries[language] = _Entry(stack, slot, hosts[number], carrier, spec)
            if slot is not None:
                self._recent[language] = None

    @staticmethod
    def _write(stack: Stack, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Fill slots that were taken; give them back if that fails."""
        try:
            stack.write(slots, rows)
        except BaseException:
            for slot in slots:
                stack.release(slot)
            raise

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
        elif "specs" in row:
            stack = self._new_moe_stack(row["names"], row["rank"], row["num_experts"], row["per_position"])
            self._stacks.remove(stack)  # it joins the others below, when all fits
        else:
            stack = LoraStack({name: self._sizes[name] for name in row["names"]}, row["rank"], *self._place())
        specs = {language: MoeSpec.of(fields) for language, fields in row.get("specs", {}).items()}
        languages = row["languages"]
        contents = [tensors[f"{number}.{part}"] for part in range(len(stack.storage))]
        for tensor, storage in zip(contents, stack.storage, strict=True):
            expected = [len(languages) if dim == stack.slot_dim else size for dim, size in enumerate(storage.shape)]
            if list(tensor.shape) != expected:
                raise ValueError(
                    f"The table holds {tuple(tensor.shape)} where this model needs {tuple(expected)}. It was made for another."
                )
        rows = [list(each) for each in zip(*(tensor.unbind(stack.slot_dim) for tensor in contents), strict=True)]
        if self.max_on_device is not None:  # what waits in host memory must not hold on to the whole file
            rows = [[tensor.clone(memory_format=torch.contiguous_format) for tensor in each] for each in rows]
        self._stacks.append(stack)
        contained = zip(languages.items(), rows, strict=True)
        self._insert(stack, [_New(language, each, carrier, specs.get(language)) for (language, carrier), each in contained])

    # ---- inside: using -------------------------------------------------------------------------------------------------

    def _asked(self, languages: Sequence[RowLanguage], gates: RowGates, masked: RowMasks) -> list[list[_Use]]:
        """What each row asks for, checked."""
        if isinstance(languages, str):
            raise ValueError(f"rows() takes one entry per row of the batch, got the string {languages!r}. Put it in a list.")
        if not len(languages):
            raise ValueError("rows() was given no rows. Name a language, or None, for every row of the batch.")
        for name, given in (("gates", gates), ("masked", masked)):
            if given is not None and (isinstance(given, (str, Mapping)) or len(given) != len(languages)):
                raise ValueError(f"{name} needs one entry per row, {len(languages)} of them, None for the default; got {given!r}.")
        if gates is None and masked is None:
            return [self._uses(row, language, None, None) for row, language in enumerate(languages)]
        return [
            self._uses(row, language, None if gates is None else gates[row], None if masked is None else masked[row])
            for row, language in enumerate(languages)
        ]

    def _uses(self, row: int, language: RowLanguage, gates: Any, masked: Collection[str] | None) -> list[_Use]:
        """What a row asks for: languages and their weights, and the gates of those that have some."""
        mixture = {} if language is None else {language: 1.0} if isinstance(language, str) else language
        uses = []
        for name, weight in mixture.items():
            if name not in self._entries:
                raise ValueError(f"Row {row} of the batch asks for {name!r}, which is not in the table. {self._suggestion(name)}")
            if not isinstance(weight, (int, float)) or weight != weight or weight in (float("inf"), float("-inf")):
                raise ValueError(f"Row {row} of the batch gives {name!r} the weight {weight!r}. A weight is a finite number.")
            spec = self._entries[name].spec
            given = (gates.gates if self.wants_gates(name) else None) if isinstance(gates, Heard) else gates
            uses.append(_Use(name, weight) if spec is None else self._moe_use(row, name, weight, spec, given, masked))
        if (gates is not None or masked) and all(self._entries[use.language].spec is None for use in uses):
            raise ValueError(f"Row {row} has gates or masked experts, but {language!r} is no LoRA-MoE. Give None for that row.")
        return uses

    @staticmethod
    def _moe_use(row: int, name: str, weight: float, spec: MoeSpec, gates: Any, masked: Collection[str] | None) -> _Use:
        experts = ", ".join(spec.experts)
        if isinstance(masked, str):
            raise ValueError(f"Row {row}: masked takes a list of names for a row, got {masked!r}. Write [{masked!r}].")
        unknown = sorted(set(masked or ()) - set(spec.experts))
        if unknown:
            raise ValueError(f"Row {row}: {name!r} has no expert {unknown[0]!r}. Its experts: {experts}.")
        left_out = frozenset(masked or ())
        try:
            found = None
            if gates is not None or left_out or spec.router == IS_GIVEN:
                found = gates_for(spec, gates, left_out)
        except ValueError as error:
            raise ValueError(f"Row {row}, {name!r}: {error}") from None
        if found is None and spec.router == IS_GIVEN:
            raise ValueError(
                f"Row {row}: {name!r} has router='language' and no prior, so its gates come from you: rows(..., gates=[...]) with a "
                f"LanguagePosterior (see language_posterior), or a dict over {experts}, for that row. generate_mixed listens by itself."
            )
        return _Use(name, weight, found, left_out)

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
                (slot,) = entry.stack.take(1, self.max_on_device)
                self._write(entry.stack, [slot], [entry.host])
                entry.slot = slot  # only now: until it is written, the slot holds another language
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

    def _parts(self, asked: Sequence[Sequence[_Use]], recorder: GateRecorder | None = None) -> tuple[list[tuple[Part, ...]], list[Any]]:
        """For each layer what is added there, and what must hear the recording. Rows that are all alike are one row: nothing is copied for
        a single language."""
        if all(row == asked[0] for row in asked):
            asked = asked[:1]
        per_stack: list[dict[str, Part]] = []
        for stack in self._stacks:
            if isinstance(stack, MoeStack):
                uses = self._moe_uses(stack, asked)
                if uses is not None:
                    per_stack.append(stack.prepare(uses, recorder))
            else:
                routing = self._routing(stack, asked)
                if routing is not None:
                    per_stack.append(stack.prepare(routing))
        recordings = [recording for parts in per_stack for recording in recordings_of(parts)]
        if len(per_stack) == 1:
            (only,) = per_stack
            return [(only[name],) if name in only else () for name in self._layers], recordings
        return [tuple(parts[name] for parts in per_stack if name in parts) for name in self._layers], recordings

    def _routing(self, stack: Stack, asked: Sequence[Sequence[_Use]], per_row: int | None = None) -> Routing | None:
        """Slots and weights of a stack's languages in each row; None if no row has any, unless room for `per_row` is to be filled."""
        mine = [[(self._slot_of(use.language), use.weight) for use in row if self._entries[use.language].stack is stack] for row in asked]
        k = per_row if per_row is not None else max(len(row) for row in mine)
        if k == 0:
            return None
        padded = [row + [(0, 0.0)] * (k - len(row)) for row in mine]
        indices = torch.tensor([[slot for slot, _ in row] for row in padded], dtype=torch.long)
        return Routing(indices, torch.tensor([[weight for _, weight in row] for row in padded], dtype=torch.float64))

    def _moe_uses(self, stack: MoeStack, asked: Sequence[Sequence[_Use]], per_row: int | None = None) -> list[list[MoeUse | None]] | None:
        """As `_routing`, for mixtures with routers."""
        mine: list[list[MoeUse | None]] = []
        for row in asked:
            entries = [(use, self._entries[use.language]) for use in row]
            own = [(use, entry.spec) for use, entry in entries if entry.stack is stack and entry.spec is not None]
            mine.append([MoeUse(self._slot_of(use.language), use.weight, spec, use.gates, use.masked) for use, spec in own])
        k = per_row if per_row is not None else max(len(row) for row in mine)
        return [row + [None] * (k - len(row)) for row in mine] if k else None

    def _slot_of(self, language: str) -> int:
        slot = self._entries[language].slot
        assert slot is not None
        return slot

    def _forget(self) -> None:
        for stack in self._stacks:
            if isinstance(stack, (Pool, MoeStack)):
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
        if self.is_paused:
            raise ValueError("The table is paused, so the model is its base. Call table.resume() first.")

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
        self._place = table._place()
        self._stacks = list(table._stacks)
        self._buffers = [stack.static_buffers(num_rows, per_row) for stack in self._stacks]
        per_stack = [stack.static_parts(buffers) for stack, buffers in zip(self._stacks, self._buffers, strict=True)]
        self._recordings = [recording for parts in per_stack for recording in recordings_of(parts)]
        parts = [tuple(parts[name] for parts in per_stack if name in parts) for name in table._layers]
        self._request = Request(num_rows, parts, self._recordings)

    def set(self, languages: Sequence[RowLanguage], *, gates: RowGates = None, masked: RowMasks = None) -> None:
        """Give each row its language from now on; entries as for `LanguageTable.rows`.

        Routers that read the recording do so when a decoder begins: after `set`, run the decoder from its start.
        """
        table = self._table
        self._check_in_place()
        table._follow_model()  # moved and moved back: the stacks may not have come along yet
        if len(languages) != self.num_rows:
            raise ValueError(f"{len(languages)} languages came for {self.num_rows} rows. Fill a smaller batch up with None.")
        asked = table._asked(languages, gates, masked)
        for row, uses in enumerate(asked):
            if len(uses) > self.per_row:
                raise ValueError(
                    f"Row {row} mixes {len(uses)} languages, and there is room for {self.per_row}: see per_row of static_rows."
                )
            late = [use.language for use in uses if not any(table._entries[use.language].stack is stack for stack in self._stacks)]
            if late:
                raise ValueError(f"{late[0]!r} lies in a stack that did not exist when static_rows was called. Call it again.")
        table._bring({use.language for uses in asked for use in uses})
        for stack, buffers in zip(self._stacks, self._buffers, strict=True):
            if isinstance(stack, MoeStack):
                moe_uses = table._moe_uses(stack, asked, self.per_row)
                assert moe_uses is not None
                stack.collect_into(buffers, moe_uses)
            else:
                routing = table._routing(stack, asked, self.per_row)
                assert routing is not None
                stack.collect_into(buffers, routing)
        for recording in self._recordings:
            recording.forget()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Apply what was set, for the length of a `with` block. What was set last, or is set inside, holds.

        Raises:
            ValueError: The table was detached, or its model was moved or converted since.
        """
        self._check_in_place()
        try:
            with self._table._slot.use(self._request):
                yield
        finally:
            self._table._forget()

    def _check_in_place(self) -> None:
        self._table._check_attached()
        place = self._table._place()
        if place != self._place:
            was, now = (f"{dtype} on {device}" for device, dtype in (self._place, place))
            raise ValueError(f"These static rows were made for a model in {was}, and it is in {now} now. Call table.static_rows again.")


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
