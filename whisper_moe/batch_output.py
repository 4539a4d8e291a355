"""What a batch run writes: shards of transcripts, texts and subtitles, errors. Local folders and buckets (whatever fsspec opens).

A shard appears whole or not at all, so a run that is cut off leaves nothing half written; what it did leave is read by the next one,
which goes on from there. One writer at a time. Knows no model and no Ray.
"""

from __future__ import annotations

import json
import os
import posixpath
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from whisper_moe.captions import CaptionFormat, captions

FileFormat = Literal["jsonl", "parquet"]
TextFormat = Literal["txt", "srt", "vtt"]
FORMATS: tuple[FileFormat, ...] = ("jsonl", "parquet")
TEXT_FORMATS: tuple[TextFormat, ...] = ("txt", "srt", "vtt")

SHARDS, ERRORS, SUMMARY, EVALUATION = "transcripts", "errors.jsonl", "summary.json", "evaluation.json"

# Column -> what it holds, in the order of a row; also the schema of a parquet shard.
COLUMNS = {
    "file": "string",
    "sha256": "string",
    "settings": "string",
    "stamp": "string",
    "finished_at": "string",
    "text": "string",
    "language": "string",
    "language_name": "string",
    "probability": "float",
    "no_speech": "float",
    "adapter": "string",
    "reason": "string",
    "warnings": "strings",
    "segments": "segments",
    "duration_s": "float",
    "elapsed_s": "float",
    "model": "string",
}
_SEGMENT = {"start_s": "float", "end_s": "float", "text": "string", "language": "string"}  # the language where segments have their own
_READ_BACK = ("file", "sha256", "settings", "stamp", "finished_at", "language", "duration_s")
_OTHER_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # JSON allows them in a text, many readers end a line there


def is_plain_name(name: str) -> bool:
    """Whether a name with slashes leads where it says: no part of it is empty, "." or "..", which object stores allow in their keys."""
    return not {"", ".", ".."} & set(name.split("/"))


@dataclass(frozen=True)
class Known:
    """What the output holds of a file.

    Args:
        sha256: Of the file's bytes when it was transcribed.
        settings: Digest of the settings it was transcribed with.
        stamp: Its size and time of change, as the listing gave them.
        finished_at: When, in UTC; of two rows of one file the later one counts.
        language: The language that was written; None if nobody speaks.
        duration_s: Length of the recording.
    """

    sha256: str
    settings: str
    stamp: str
    finished_at: str
    language: str | None
    duration_s: float


class BatchOutput:
    """A folder of transcripts that a run adds to.

    Rows are collected and written as a shard when there are `shard_rows` of them or `flush_s` seconds have gone by: that much a run that
    is killed has to do again. A row for a file that is there already takes the old one's place.

    Args:
        url: The folder; a path, or an address that fsspec knows (`s3://...`).
        file_format: Of new shards.
        texts: Also write each transcript by itself: "txt", and as captions, "srt" and "vtt".
        shard_rows: Rows in a whole shard.
        flush_s: Longest time between writing a row and the next one's arrival, in seconds.
        storage_options: For fsspec.

    Raises:
        ValueError: The formats are unknown, or a shard that is there cannot be read.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        file_format: FileFormat = "jsonl",
        texts: Sequence[TextFormat] = (),
        *,
        shard_rows: int = 1000,
        flush_s: float = 30.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if file_format not in FORMATS:
            raise ValueError(f"Unknown format {file_format!r}. Known: {', '.join(FORMATS)}.")
        if unknown := [kind for kind in texts if kind not in TEXT_FORMATS]:
            raise ValueError(f"Unknown format of texts: {', '.join(map(repr, unknown))}. Known: {', '.join(TEXT_FORMATS)}.")
        if file_format == "parquet":
            _pyarrow()  # missing it is found out now, not when the first shard is full
        import fsspec

        self._fs, self.root = fsspec.core.url_to_fs(os.fspath(url), **(storage_options or {}))
        self._format, self._texts, self._shard_rows, self._flush_s = file_format, tuple(texts), shard_rows, flush_s
        self._buffer: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []
        self._errors_written = -1  # so that the first flush replaces the errors of an earlier run
        self._flushed = time.monotonic()
        self._place: dict[str, tuple[str, int]] = {}  # file -> shard and row of what counts
        self._stale: dict[str, set[int]] = {}  # shard -> rows that a later one took the place of
        self._num_rows: dict[str, int] = {}  # of each shard
        self.known: dict[str, Known] = {}
        self._load()

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Files of this run that could not be transcribed, and why."""
        return list(self._errors)

    # ---- adding --------------------------------------------------------------------------------------------------------

    def add(self, row: dict[str, Any]) -> None:
        """Take in a transcript: a value for each of `COLUMNS`."""
        for kind in self._texts:
            self._write(_text_name(row, kind), _text(row, kind))
        segments = [{name: segment.get(name) for name in _SEGMENT} for segment in row["segments"]]
        self._buffer.append({name: row[name] for name in COLUMNS} | {"segments": segments})
        self._flush_if_due()

    def fail(self, file: str, kind: str, reason: str) -> None:
        """Take in a file that could not be transcribed."""
        self._errors.append({"file": file, "kind": kind, "reason": reason})
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        if len(self._buffer) >= self._shard_rows or time.monotonic() - self._flushed >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write what was collected. It is safe then, whatever happens to the run."""
        if self._buffer:
            self._write_shard(self._buffer)
            self._buffer = []
        if len(self._errors) != self._errors_written:
            self._write(ERRORS, _json_lines(self._errors))
            self._errors_written = len(self._errors)
        self._flushed = time.monotonic()

    def tidy(self) -> None:
        """Drop rows that later ones took the place of, and join short shards. A run that is cut off here has lost nothing."""
        self.flush()
        short = [shard for shard, number in self._num_rows.items() if number < self._shard_rows]
        old = sorted({shard for shard, rows in self._stale.items() if rows} | set(short if len(short) > 1 else ()))
        kept: list[dict[str, Any]] = []
        for shard in old:
            stale = self._stale.get(shard, set())
            kept += [row for number, row in enumerate(self._read(shard)) if number not in stale]
            while len(kept) >= self._shard_rows:
                self._write_shard(kept[: self._shard_rows])
                kept = kept[self._shard_rows :]
        if kept:
            self._write_shard(kept)
        for shard in old:
            self._fs.rm_file(self._path(shard))
            del self._num_rows[shard]
            self._stale.pop(shard, None)

    def write_texts(self, files: Collection[str]) -> None:
        """Write the texts of files that were transcribed before, where they are missing, or have another length than what is known now."""
        sizes = {path: info.get("size") for kind in self._texts for path, info in self._fs.find(self._path(kind), detail=True).items()}
        for row in self.rows() if files and self._texts else ():
            for kind in self._texts if row["file"] in files else ():
                name, text = _text_name(row, kind), _text(row, kind)
                if sizes.get(self._path(name)) != len(text):
                    self._write(name, text)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a file beside the shards."""
        self._write(name, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())

    # ---- reading -------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[dict[str, Any]]:
        """The transcript of every file, a shard at a time."""
        self.flush()
        for shard in sorted(self._num_rows):
            stale = self._stale.get(shard, set())
            yield from (row for number, row in enumerate(self._read(shard)) if number not in stale)

    def _load(self) -> None:
        for path in sorted(self._fs.find(self._path(SHARDS))):
            name = posixpath.basename(path)
            if name.startswith("."):  # a shard that was being written when a run was killed
                self._fs.rm_file(path)
            elif name.endswith(tuple(f".{kind}" for kind in FORMATS)):
                shard = posixpath.join(SHARDS, name)
                self._take_in(shard, self._read(shard, _READ_BACK))

    def _take_in(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        """Note what a shard holds, and which rows it takes the place of."""
        self._num_rows[shard] = len(rows)
        for number, row in enumerate(rows):
            file = row["file"]
            known = Known(**{name: row[name] for name in _READ_BACK if name != "file"})
            if file in self.known and known.finished_at < self.known[file].finished_at:
                self._stale.setdefault(shard, set()).add(number)
                continue
            if file in self._place:
                earlier, place = self._place[file]
                self._stale.setdefault(earlier, set()).add(place)
            self.known[file], self._place[file] = known, (shard, number)

    def _read(self, shard: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        try:
            with self._fs.open(self._path(shard), "rb") as file:
                if shard.endswith(".jsonl"):
                    rows = [json.loads(line) for line in file]
                    return rows if columns is None else [{name: row[name] for name in columns} for row in rows]
                found: list[dict[str, Any]] = _pyarrow()[1].read_table(file, columns=None if columns is None else list(columns)).to_pylist()
                return found
        except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors, too
            raise ValueError(
                f"{self._path(shard)} is no shard that this version wrote ({error}). Remove it, and its files are transcribed again; or "
                "choose another folder for the output."
            ) from error

    # ---- writing -------------------------------------------------------------------------------------------------------

    def _write_shard(self, rows: list[dict[str, Any]]) -> None:
        """A name of its own for each, so that no run ever writes over another's."""
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        shard = posixpath.join(SHARDS, f"{now}-{len(self._num_rows):05d}-{secrets.token_hex(4)}.{self._format}")
        self._write(shard, _json_lines(rows) if self._format == "jsonl" else _parquet(rows))
        self._take_in(shard, rows)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file in one step. An object store does so by itself; on a disk it is renamed when it is whole."""
        from fsspec.implementations.local import LocalFileSystem

        if not is_plain_name(name):
            raise ValueError(f"{name!r} does not lead to a place in {self.root}, so nothing is written there.")
        path = self._path(name)
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, data)
            return
        local = Path(path)
        local.parent.mkdir(parents=True, exist_ok=True)
        unfinished = local.with_name(f".{secrets.token_hex(8)}.new")  # short, whatever the file's name: names have a longest length
        try:
            unfinished.write_bytes(data)
            unfinished.replace(local)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> str:
        return posixpath.join(self.root, name)


def _text_name(row: dict[str, Any], kind: TextFormat) -> str:
    return f"{kind}/{row['file']}.{kind}"


def _text(row: dict[str, Any], kind: TextFormat) -> bytes:
    return (f"{row['text']}\n" if kind == "txt" else subtitles(row["segments"], kind)).encode()


def subtitles(segments: Sequence[dict[str, Any]], kind: CaptionFormat = "srt") -> str:
    """Segments as captions."""
    return captions([(segment["start_s"], segment["end_s"], segment["text"]) for segment in segments], kind)


def _json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False).translate(_OTHER_LINE_ENDS) + "\n" for row in rows).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    pyarrow, parquet = _pyarrow()
    kinds = {"string": pyarrow.string(), "float": pyarrow.float64(), "strings": pyarrow.list_(pyarrow.string())}
    kinds["segments"] = pyarrow.list_(pyarrow.struct([(name, kinds[kind]) for name, kind in _SEGMENT.items()]))
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError('Parquet files need pyarrow: pip install "peft-s2lora[train]".') from error
    return pyarrow, parquet
