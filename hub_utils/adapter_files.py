"""An adapter's folder read as plain data, within bounds: no code of a file runs, nothing larger than it says is read.

Strict where libraries are lenient: JSON without double keys, NaN or endless nesting; safetensors whose tensors lie one after another
and fill the file; regular files only. What the contents *mean* is judged in trust.py. Needs no model and no torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE = "adapter_config.json", "adapter_model.safetensors", "language_adapter.json"

MAX_JSON_BYTES = 128 * 1024  # a LoRA with a rank of its own for each weight of whisper-large has 90 kB of configuration
MAX_WEIGHTS_BYTES = 1024**3
MAX_HEADER_BYTES = 4 * 1024**2

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that adapter weights may have, by safetensors' names -> bytes of one number."""


class AdapterError(ValueError):
    """An adapter cannot be fetched, is not trusted or does not fit. The message says why and what to do; no model was changed."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file: its type, shape, first byte and byte after the last, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds.

    Args:
        label: What to call it in messages.
        config: `adapter_config.json`.
        tensors: Tensor name -> place, from the header of the weights.
        language: `language_adapter.json`; None if there is none.
        folder: Where they are.
        header: The first bytes of the weights, up to the numbers.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]
    language: Mapping[str, Any] | None
    folder: Path
    header: bytes

    def read_weights(self) -> bytes:
        """The whole file of the weights, whose header must still be the one that was looked at.

        Raises:
            AdapterError: The file has changed.
        """
        data = read_file(self.folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, self.label)
        end = max((place.end for place in self.tensors.values()), default=0)
        if not data.startswith(self.header) or len(data) != len(self.header) + end:
            raise AdapterError(f"{self.label}: {WEIGHTS_FILE} changed while it was read. Try again when nobody writes to it.")
        return data


def read_adapter(folder: str | Path, label: str | None = None) -> AdapterFiles:
    """Read an adapter's folder; of the weights the header only, so that a large file that is refused costs nothing.

    Raises:
        AdapterError: A file is missing, too large, no regular file, or not what its name says.
    """
    folder = Path(os.path.abspath(folder))
    label = f"The adapter in {folder}" if label is None else label
    if not folder.is_dir():
        raise AdapterError(f"There is no adapter folder {folder}. To get one from the Hub: fetch_adapter('owner/name').")
    config = parse_json(_read_config(folder, label), CONFIG_FILE, label)
    header, num_bytes = _read_header(folder, label)
    language = None
    if os.path.lexists(folder / LANGUAGE_FILE):
        language = parse_json(read_file(folder / LANGUAGE_FILE, MAX_JSON_BYTES, label), LANGUAGE_FILE, label)
    return AdapterFiles(label, config, parse_header(header, num_bytes, label), language, folder, header)


def _read_config(folder: Path, label: str) -> bytes:
    if not os.path.lexists(folder / CONFIG_FILE):
        raise AdapterError(f"{label} has no {CONFIG_FILE}, so nothing says what its weights are. Save it with PEFT's save_pretrained.")
    return read_file(folder / CONFIG_FILE, MAX_JSON_BYTES, label)


def _read_header(folder: Path, label: str) -> tuple[bytes, int]:
    """The header of the weights, with the length before it, and the number of bytes behind it."""
    if not os.path.lexists(folder / WEIGHTS_FILE):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        found = f" It has {pickles[0]}, a pickle, which could run code when opened and is never read." if pickles else ""
        raise AdapterError(f"{label} has no {WEIGHTS_FILE}.{found} Save it with PEFT's save_pretrained (safe_serialization=True).")
    with _open(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, label) as (file, size):
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)), size


def read_file(path: Path, max_bytes: int, label: str) -> bytes:
    """The bytes of a regular file. A link is followed only inside the Hub client's own cache, which is built of links."""
    with _open(path, max_bytes, label) as (file, size):
        data = file.read(size)
    if len(data) != size:
        raise AdapterError(f"{label}: {path.name} changed while it was read. Try again when nobody writes to it.")
    return data


@contextmanager
def _open(path: Path, max_bytes: int, label: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size."""
    no_follow = 0 if _links_to_blob(path) else getattr(os, "O_NOFOLLOW", 0)
    flags = os.O_RDONLY | no_follow | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO would wait for its writer
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if path.is_symlink():
            raise AdapterError(f"{label}: {path.name} is a link, and could point anywhere. Put the file itself there (cp -L).") from None
        raise AdapterError(f"{label}: {path.name} cannot be read ({error.strerror}).") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{label}: {path.name} is no regular file. Put the file itself there.")
        if status.st_size > max_bytes:
            raise AdapterError(
                f"{label}: {path.name} has {status.st_size:,} bytes; at most {max_bytes:,} are read. "
                "An adapter is smaller: is this a whole model?"
            )
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(descriptor)


def _links_to_blob(path: Path) -> bool:
    """Whether a link is one of the Hub client's cache: `models--owner--name/snapshots/<sha>/file -> ../../blobs/<hash>`."""
    if not path.is_symlink():
        return False
    repository = next((parent for parent in path.parents if parent.name.startswith("models--")), None)
    return repository is not None and path.resolve().parent == (repository / "blobs").resolve()


# ---- JSON --------------------------------------------------------------------------------------------------------------


def parse_json(data: bytes, name: str, label: str) -> dict[str, Any]:
    """A JSON object without double keys, NaN and infinity.

    Raises:
        AdapterError: It is something else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_single_keys, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise AdapterError(f"{label}: {name} is nested too deeply. Save the adapter again with PEFT's save_pretrained.") from None
    except ValueError as error:
        raise AdapterError(
            f"{label}: {name} is not valid JSON: {short(error)}. Save the adapter again with PEFT's save_pretrained."
        ) from None
    if not isinstance(value, dict):
        raise AdapterError(f"{label}: {name} holds a {type(value).__name__}, expected an object with fields.")
    return value


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {short(twice)} stands there twice, and readers differ on which one counts")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {short(text)} is too large")
    return value


def is_line(value: Any, longest: int, shortest: int = 0) -> bool:
    """Whether something a stranger wrote is a line that may be shown: nothing in it steers a terminal or turns its text around."""
    return isinstance(value, str) and value.isprintable() and shortest <= len(value) <= longest


def short(value: object) -> str:
    """A value as it may stand in a message: one line, and not much of it."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = "".join(character if character.isprintable() else "?" for character in text[:400])
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- safetensors -------------------------------------------------------------------------------------------------------


def parse_header(data: bytes, num_bytes: int, label: str) -> dict[str, TensorPlace]:
    """Tensor name -> place, of a safetensors file: 8 bytes of length (little end first), a JSON header, then the numbers.

    Args:
        data: Length and header.
        num_bytes: Size of the whole file.
        label: What to call the adapter in messages.

    Raises:
        AdapterError: The header is broken, or its tensors overlap, leave gaps, or are no floating point numbers.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) != 8 + length or data[8:9] != b"{":
        raise AdapterError(
            f"{label}: {WEIGHTS_FILE} is no safetensors file, or was cut off: its header should have {length:,} bytes, and "
            f"{max(num_bytes - 8, 0):,} are there (at most {MAX_HEADER_BYTES:,} are read). Get it again."
        )
    header = parse_json(data[8:], f"the header of {WEIGHTS_FILE}", label)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{label}: the header of {WEIGHTS_FILE} has metadata that are not plain text. Save the adapter again.")
    tensors = {name: _place(name, row, label) for name, row in header.items()}
    _check_places(tensors, num_bytes - len(data), label)
    return tensors


def _place(name: str, row: Any, label: str) -> TensorPlace:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{label}: the header of {WEIGHTS_FILE} does not say type, shape and place of {short(name)}. Get it again.")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterError(
            f"{label}: {short(name)} is of type {short(dtype)}; adapter weights are of {', '.join(DTYPE_BYTES)}. Save it as one of these."
        )
    if not (_are_sizes(shape) and len(shape) <= 8 and _are_sizes(offsets) and len(offsets) == 2):
        raise AdapterError(f"{label}: {short(name)} has shape {short(shape)} and place {short(offsets)}. The file is broken; get it again.")
    place = TensorPlace(dtype, tuple(shape), *offsets)
    if place.end - place.start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise AdapterError(
            f"{label}: {short(name)} of shape {place.shape} should have {math.prod(shape) * DTYPE_BYTES[dtype]:,} bytes, and has "
            f"{place.end - place.start:,}. The file is broken; get it again."
        )
    return place


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48 for size in value)


def _check_places(tensors: Mapping[str, TensorPlace], num_bytes: int, label: str) -> None:
    end = 0
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            problem = "overlaps another tensor" if place.start < end else "leaves a gap before it"
            raise AdapterError(f"{label}: {short(name)} {problem} in {WEIGHTS_FILE}. The file is broken; get it again.")
        end = place.end
    if end != num_bytes:
        problem = "was cut off" if end > num_bytes else "has something behind its tensors"
        raise AdapterError(f"{label}: {WEIGHTS_FILE} {problem}: its tensors take {end:,} bytes, and {num_bytes:,} are there. Get it again.")
