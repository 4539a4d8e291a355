"""Adapter folders read as plain data: numbers, names, and what the configuration says about them. Makes no module and runs no code
of a file.

Reads what PEFT and `peft_s2lora` write (`adapter_config.json`, `adapter_model.safetensors`), for LoRA and S2-LoRA. Whatever would mean
more than `B A x` added to a linear layer (DoRA, whole modules, trained biases, ...) is refused by name. A thousand small files are read in
well under a second: the file is read in one piece, and whoever knows its header already need not parse it again.

    LoRA      y += B A x                 A: (r, d_in), B: (d_out, r), the scaling in B
    S2-LoRA   y += B diag(s) A x         s: (r,), the scaling in s; A, B shared by a group of weights, and possibly a pool's
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "language_adapter.json"
LORA, S2LORA, LORAMOE = "LORA", "S2LORA", "LORAMOE"
S2_COEFFICIENTS = "s2lora_coefficients"

_PREFIX = "base_model.model."  # PEFT writes it before every name
_LORA_A, _LORA_B = "lora_A.weight", "lora_B.weight"
_S2_A, _S2_B = "s2lora_A", "s2lora_B"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 25_000_000  # bytes
_MAX_NUMEL = 1 << 40
_MAX_NAME = 256  # characters of a tensor's name
# What a pattern of a configuration may ask for. It comes with the adapter, and matching a worse one could take for ever.
_MAX_PATTERNS, _MAX_PATTERN, _MAX_REPEATS, _MAX_CHOICES = 4096, 256, 4, 8

# Choices that change what an adapter computes, so that A and B alone would be something else than what was trained.
_BEYOND_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva"})  # others (PiSSA, OLoRA, ...) change the base weights

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter as it lies on disk, or as it was handed over.

    Args:
        label: What to call it in messages.
        config: The configuration.
        header: The header of the weights' file; empty if there was no file.
        body: The bytes after the header, as they are.
        card: What `language_adapter.json` says; empty if there is none.
        given: The tensors, if they were handed over instead of a file.
    """

    label: str
    config: Mapping[str, Any]
    header: bytes = b""
    body: bytearray = field(default_factory=bytearray)
    card: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, torch.Tensor] | None = None

    @property
    def method(self) -> str:
        """`"LORA"`, `"S2LORA"` or `"LORAMOE"`."""
        return str(self.config["peft_type"])

    @property
    def is_pooled(self) -> bool:
        """Whether it owns coefficients only, and A and B are those of a pool."""
        return self.method == S2LORA and self.config.get("pool") is not None

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' file, taken of the bytes that were read from it."""
        digest = hashlib.sha256(len(self.header).to_bytes(8, "little"))
        digest.update(self.header)
        digest.update(self.body)
        return digest.hexdigest()

    @cached_property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
        """Tensor name, as the base model would say it -> (type, shape, first byte, byte after the last)."""
        return _read_layout(self.header, len(self.body), self.label)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensor name, as the base model would say it -> values."""
        if self.given is not None:
            tensors = {name.removeprefix(_PREFIX): tensor.detach() for name, tensor in self.given.items()}
        else:
            tensors = {name: _view(self.body, dtype, shape, start, end) for name, (dtype, shape, start, end) in self.layout.items()}
        for name, tensor in tensors.items():
            if len(name) > _MAX_NAME:
                raise ValueError(f"{self.label}: {name[:40]!r}... is {len(name)} characters long; a module's name has {_MAX_NAME} at most.")
            if not tensor.is_floating_point():
                raise ValueError(f"{self.label}: {name!r} holds {tensor.dtype}; adapter weights are floating point numbers.")
            if not tensor.isfinite().all():
                raise ValueError(f"{self.label}: {name!r} holds values that are not finite. The adapter is broken; train or save it again.")
        return tensors


def read_adapter(
    source: str | Path | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]], methods: Sequence[str] = (LORA, S2LORA)
) -> AdapterFiles:
    """Read an adapter from its folder, or take `(config, tensors)` as they are.

    Args:
        source: The folder, or configuration and tensors.
        methods: The methods that the caller can use.

    Raises:
        ValueError: A file is missing or broken, or the adapter is of a kind that cannot be represented by A, B and s.
    """
    if isinstance(source, tuple):
        files = AdapterFiles("The adapter", source[0], given=source[1])
    else:
        folder = Path(source)
        header, body = _read_safetensors(folder)
        config = _read_json(folder / CONFIG_FILE)
        card = _read_json(folder / CARD_FILE) if (folder / CARD_FILE).exists() else {}
        files = AdapterFiles(f"The adapter in {folder}", config, header, body, card)
    if not isinstance(files.card.get("carrier"), (str, type(None))):
        raise ValueError(f"{files.label}: carrier is {files.card['carrier']!r} in {CARD_FILE}; it is the code of a language, or null.")
    _check_config(files, methods)
    return files


# ---- LoRA --------------------------------------------------------------------------------------------------------------


def lora_pairs(files: AdapterFiles) -> dict[str, Pair]:
    """Module name -> A (r, d_in) and B (d_out, r) with the scaling in it, of a LoRA adapter."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in files.tensors.items():
        kind = next((kind for kind in (_LORA_A, _LORA_B) if key.endswith(f".{kind}")), None)
        if kind is None or tensor.dim() != 2:
            raise ValueError(
                f"{files.label} holds {key!r} of shape {tuple(tensor.shape)}, which is no A or B of a linear layer. "
                "LoRA is read on linear layers only."
            )
        factors.setdefault(key.removesuffix(f".{kind}"), {})[kind] = tensor
    pairs = {}
    for name, found in factors.items():
        if len(found) != 2:
            raise ValueError(f"{files.label} has only one of A and B for {name!r}. The file is incomplete.")
        A, B = found[_LORA_A], found[_LORA_B]
        rank = _by_pattern(files.config.get("rank_pattern"), name, files.config.get("r"))
        if A.shape[0] != rank or B.shape[1] != rank:
            raise ValueError(
                f"{files.label}: the configuration gives {name!r} rank {rank}, the file has A {tuple(A.shape)} and B {tuple(B.shape)}. "
                "Configuration and weights are of different adapters."
            )
        alpha = _by_pattern(files.config.get("alpha_pattern"), name, files.config.get("lora_alpha", rank))
        pairs[name] = (A, B * (alpha / (math.sqrt(rank) if files.config.get("use_rslora") else rank)))
    return pairs


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value for a module: the first pattern that its name ends with, as PEFT reads `rank_pattern` and `alpha_pattern`."""
    for pattern, value in (patterns or {}).items():
        if _ending(pattern).match(name):
            return value
    return otherwise


@lru_cache(maxsize=_MAX_PATTERNS)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


# ---- S2-LoRA -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """Which weights share one pair (A, B), as an S2-LoRA configuration says it (`S2LoraConfig.sharing_key` is the original)."""

    r: int
    scope: str
    groups: tuple[str, ...]
    group_ranks: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sharing:
        ranks = tuple(sorted((config.get("group_ranks") or {}).items()))
        return cls(int(config["r"]), str(config.get("share_scope", "shape")), tuple(config.get("share_groups") or ()), ranks)

    def key(self, name: str, d_out: int, d_in: int) -> str:
        """Name of the group of a module."""
        if self.scope == "global":
            key = "global"
        elif self.scope == "module_type":
            key = f"{name.rpartition('.')[2]}:{d_out}x{d_in}"
        else:
            key = f"{d_out}x{d_in}"
        pattern = next((pattern for pattern in self.groups if re.fullmatch(pattern, name)), None)
        return key if pattern is None else f"{pattern}/{key}"

    def rank(self, key: str) -> int:
        """Rank directions of a group."""
        return dict(self.group_ranks).get(key, self.r)


def s2_scaling(config: Mapping[str, Any]) -> float:
    """c in `W = W0 + c B diag(s) A`."""
    alpha = config.get("s2lora_alpha")
    return 1.0 if alpha is None else float(alpha) / float(config["r"])


def s2_coefficients(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Module name -> s (r,), without the scaling."""
    suffix = f".{S2_COEFFICIENTS}"
    return {key.removesuffix(suffix): tensor for key, tensor in files.tensors.items() if key.endswith(suffix)}


def s2_factors(files: AdapterFiles, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Group -> its A (r, d_in) and B (d_out, r), of an S2-LoRA adapter that owns them. `sizes`: module name -> (d_out, d_in)."""
    sharing, found = Sharing.of(files.config), dict[str, dict[str, torch.Tensor]]()
    for key, tensor in files.tensors.items():
        name, _, kind = key.rpartition(".")
        if kind in (_S2_A, _S2_B):
            if name not in sizes or tensor.dim() != 2:
                shape = tuple(tensor.shape)
                raise ValueError(f"{files.label} holds {key!r} of shape {shape}, which belongs to no linear layer of this model.")
            found.setdefault(sharing.key(name, *sizes[name]), {})[kind] = tensor
        elif kind != S2_COEFFICIENTS:
            raise ValueError(f"{files.label} holds {key!r}, which is not part of an S2-LoRA on linear layers.")
    for group, pair in found.items():
        rank = sharing.rank(group)
        if len(pair) != 2 or pair[_S2_A].shape[0] != rank or pair[_S2_B].shape[1] != rank:
            shapes = {kind: tuple(tensor.shape) for kind, tensor in pair.items()}
            raise ValueError(f"{files.label}: the group {group!r} needs A and B of rank {rank}, the file has {shapes}.")
    return {group: (pair[_S2_A], pair[_S2_B]) for group, pair in found.items()}


def factors_hash(factors: Mapping[str, Pair]) -> str:
    """SHA-256 of shared tensors, as `peft_s2lora` takes it: what a pooled adapter's `pool_hash` must be."""
    digest = hashlib.sha256()
    for group, pair in sorted(factors.items()):
        for factor in pair:
            digest.update(f"{group}:{tuple(factor.shape)}".encode())
            digest.update(factor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def s2_as_lora(files: AdapterFiles, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Module name -> A and B of the LoRA that an S2-LoRA with its own factors is, exactly: directions with s = 0 are left out."""
    sharing, scaling, factors = Sharing.of(files.config), s2_scaling(files.config), s2_factors(files, sizes)
    pairs = {}
    for name, s in s2_coefficients(files).items():
        if name not in sizes:
            continue  # the table says what it thinks of modules that it does not have
        d_out, d_in = sizes[name]
        group = sharing.key(name, d_out, d_in)
        if group not in factors or s.shape != (sharing.rank(group),):
            raise ValueError(
                f"{files.label}: {name!r} has coefficients of shape {tuple(s.shape)}, and its group {group!r} "
                f"{'has rank ' + str(sharing.rank(group)) if group in factors else 'has no A and B in the file'}. The file is incomplete."
            )
        A, B = factors[group]
        kept = s.nonzero()[:, 0]
        pairs[name] = (A[kept, :d_in], B[:d_out, kept] * (s[kept] * scaling))
    return pairs


# ---- files -------------------------------------------------------------------------------------------------------------


def _check_config(files: AdapterFiles, methods: Sequence[str]) -> None:
    config = files.config
    if config.get("peft_type") not in methods:
        raise ValueError(
            f"{files.label} has peft_type {config.get('peft_type')!r}; taken here are {', '.join(methods)}. Many other methods can be "
            "saved as a LoRA: a mixture with fixed gates by its own export, others with PEFT's convert_to_lora."
        )
    rank = config.get("r")
    if not _is_count(rank):
        raise ValueError(f"{files.label}: r is {rank!r} in {CONFIG_FILE}; it is a whole number from 1 up.")
    for name in ("lora_alpha", "s2lora_alpha"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise ValueError(f"{files.label}: {name} is {config[name]!r} in {CONFIG_FILE}; it is a finite number.")
    for name, check, what in (
        ("rank_pattern", _is_count, "whole numbers from 1 up"),
        ("alpha_pattern", _is_number, "finite numbers"),
        ("group_ranks", _is_count, "whole numbers from 1 up"),
    ):
        values = {} if config.get(name) is None else config[name]
        if not isinstance(values, Mapping) or not all(isinstance(key, str) and check(value) for key, value in values.items()):
            raise ValueError(f"{files.label}: {name} is {_short(values)} in {CONFIG_FILE}; it is an object, names with {what}.")
    if not isinstance(config.get("expert_hashes") or {}, Mapping):
        raise ValueError(f"{files.label}: expert_hashes is {_short(config['expert_hashes'])} in {CONFIG_FILE}; it is an object.")
    groups = () if config.get("share_groups") is None else config["share_groups"]
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not all(isinstance(group, str) for group in groups):
        raise ValueError(f"{files.label}: share_groups is {_short(groups)} in {CONFIG_FILE}; it is a list of patterns.")
    for name, patterns in (("share_groups", groups), *((name, config.get(name) or ()) for name in ("rank_pattern", "alpha_pattern"))):
        _check_patterns(f"{files.label}: {name} in {CONFIG_FILE}", patterns)
    used = [name for name in _BEYOND_LORA if config.get(name)]
    if used:
        raise ValueError(
            f"{files.label} was trained with {', '.join(f'{name}={config[name]!r}' for name in used)}, which A and B do not hold. "
            "Merge it into a model of its own, or train it without."
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{files.label} trained biases too (bias={config['bias']!r}). Train it with bias='none', or merge it.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in HARMLESS_INITS:
        raise ValueError(
            f"{files.label} was initialised with {init!r}, which changes the base weights. Save it as a plain LoRA: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _check_patterns(label: str, patterns: Collection[str]) -> None:
    """Refuse regular expressions that are none, or with which matching a name could take for ever."""
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"{label} has {len(patterns)} patterns; {_MAX_PATTERNS} are taken at most.")
    for pattern in patterns:
        reason = "it is too long" if len(pattern) > _MAX_PATTERN else _too_costly(pattern)
        try:
            if reason is None:
                re.compile(pattern)
                _ending(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            reason = str(error)
        if reason is not None:
            raise ValueError(f"{label}: {_short(pattern)} cannot be used as a pattern: {reason}. Write the names of the modules out.")


_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:[:=!>]|<[=!]|P?<\w+>)|\{\d*,?\d*\}|[()|*+?]", re.DOTALL)


def _too_costly(pattern: str) -> str | None:
    """Why a pattern could take for ever; None if it cannot. Backtracking tries all ways to repeat, and to choose: it is exponential where a
    group is repeated that repeats or chooses itself, and otherwise grows with the power of how many repeats and choices there are."""
    open_groups, closed = [False], False  # whether each repeats or chooses inside; that of the group that has just been closed
    repeats = choices = 0
    closed_at = end = -1  # places in the pattern: where that group ends; where the last repeat ends: a "?" or "+" there only says how
    for found in _TOKENS.finditer(pattern):
        token = found.group()
        is_repeat = token in ("*", "+") or token[0] == "{"
        if token[0] == "(":
            open_groups.append(False)
        elif token == ")":
            if len(open_groups) == 1:
                return "it closes a group that it does not open"
            closed, closed_at = open_groups.pop(), found.end()
            open_groups[-1] |= closed
            choices += closed
        elif (is_repeat or token == "?") and found.start() != end:
            if is_repeat and closed and found.start() == closed_at:
                return "it repeats a group that repeats or chooses itself"
            repeats, choices = repeats + is_repeat, choices + (token == "?")
            open_groups[-1] = True
            end = found.end()
        elif token == "|":
            open_groups[-1] = True
    if repeats > _MAX_REPEATS or choices > _MAX_CHOICES:
        return f"it has {repeats} repeats and {choices} choices, and {_MAX_REPEATS} and {_MAX_CHOICES} are taken at most"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. An adapter's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object with fields.")
    return value


def _read_safetensors(folder: Path) -> tuple[bytes, bytearray]:
    """Header and body of the weights, unparsed: the file begins with the header's length, 8 bytes, little end first."""
    path = folder / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= _MAX_HEADER else b""
            body = bytearray(file.read()) if length <= _MAX_HEADER else bytearray()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. An adapter's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.") from None
    if len(header) != length:
        raise ValueError(f"{path} is no safetensors file, or was cut off: its header should have {length} bytes.")
    return header, body


def _read_layout(header: bytes, num_bytes: int, label: str) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    layout = {}
    try:
        rows = json.loads(header)
        for name, row in rows.items():
            if name == "__metadata__":
                continue
            dtype, shape, offsets = row["dtype"], tuple(row["shape"]), tuple(row["data_offsets"])
            numbers = [*shape, *offsets]
            if len(offsets) != 2 or not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
                raise ValueError(f"{label}: {name!r} has the shape {_short(shape)} at bytes {_short(offsets)}: {WEIGHTS_FILE} is broken.")
            if math.prod(max(size, 1) for size in shape) > _MAX_NUMEL:
                raise ValueError(f"{label}: {name!r} of shape {_short(shape)} is larger than any weight.")
            start, end = offsets
            if dtype not in _DTYPES:
                raise ValueError(f"{label}: {name!r} is of type {dtype}; adapter weights are one of {', '.join(_DTYPES)}.")
            if not 0 <= start <= end <= num_bytes or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise ValueError(f"{label}: {name!r} of shape {shape} lies at bytes {start} to {end} of {num_bytes}. The file was cut off.")
            layout[name.removeprefix(_PREFIX)] = (_DTYPES[dtype], shape, start, end)
    except (AttributeError, KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{label}: {WEIGHTS_FILE} is no safetensors file ({error!r}).") from None
    return layout


def _view(body: bytearray, dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
    """A tensor of the file, without a copy where its bytes lie on the boundary that its type asks for."""
    if start == end:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:
        return torch.frombuffer(body[start:end], dtype=dtype).view(shape)
    return torch.frombuffer(body, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start).view(shape)
