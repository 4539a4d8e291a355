"""Many recordings at once: worked on side by side, each with its own outcome, and all of them in one zip. No Gradio, no HTML.

The recordings of a batch meet in the engine's common batches, whatever their languages are.
"""

from __future__ import annotations

import csv
import io
import logging
import threading
import zipfile
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from whisper_moe.captions import FORMATS, file_content, unique_names
from whisper_moe.explain import explain

from .follow import TimeLeft
from .stops import Run, StoppedError

if TYPE_CHECKING:
    from whisper_moe import Transcriber, Transcript

AT_ONCE = 8  # recordings of one visitor that are worked on at the same time
OFTEN_S = 0.4  # how often a page is drawn

State: TypeAlias = Literal["waiting", "working", "done", "failed", "stopped"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One recording of a batch, and what has become of it.

    Args:
        name: Of the file, as the visitor knows it.
        stem: Of its texts in the zip: safe everywhere, and no other recording's.
        state: What has become of it; "stopped": the visitor pressed Stop first.
        share: What is done of it, 0 to 1.
        transcript: What was written, if it is done.
        error: Why it could not be, if it failed; words for people.
    """

    name: str
    stem: str
    state: State = "waiting"
    share: float = 0.0
    transcript: Transcript | None = None
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Args:
        items: Every recording, in the order given.
        left_s: How long it will still take; None as long as that cannot be known, and at the end.
        is_over: Nothing more will be written.
    """

    items: tuple[Item, ...]
    left_s: float | None
    is_over: bool

    def count(self, *states: State) -> int:
        """How many recordings are in one of these states."""
        return sum(item.state in states for item in self.items)


class Batch:
    """Recordings to write: `rounds` does it, once.

    Args:
        transcriber: Who writes.
        files: Paths of the recordings.
        run: Its Stop ends what is being written and leaves out what is waiting; what is done stays.
        max_files: More are refused.
        names: Of the files, as the visitor knows them; None: as their paths say.
        at_once: Recordings that are worked on at the same time.
        options: Of `Transcriber.transcribe`, the same for all.

    Raises:
        ValueError: There are no files, or too many.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        files: Sequence[str | Path],
        run: Run,
        *,
        max_files: int,
        names: Sequence[str] | None = None,
        at_once: int = AT_ONCE,
        **options: Any,
    ) -> None:
        if not files:
            raise ValueError("There are no recordings yet. Choose some files first; several at a time are welcome.")
        if len(files) > max_files:
            raise ValueError(
                f"At most {max_files} files fit into one go, and these are {len(files)}. Take some away, and bring them next time."
            )
        self._transcriber, self._run, self._at_once, self._options = transcriber, run, at_once, options
        self._files = [Path(file) for file in files]
        names = [file.name for file in self._files] if names is None else names
        stems = unique_names(Path(name).stem for name in names)
        self._items = [Item(name, stem) for name, stem in zip(names, stems, strict=True)]
        self._lock = threading.Lock()
        sizes = [_num_bytes(file) for file in self._files]  # a long recording is a large file, mostly: good enough for the time left
        self._weights = [size / sum(sizes) for size in sizes]
        self._is_left = threading.Event()

    def rounds(self) -> Generator[Progress, None, None]:
        """Write them all; yields whenever something has changed, and at the end. Closing it ends the work."""
        estimate, shown = TimeLeft(), None
        pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="batch")
        try:
            open_ones: set[Future[None]] = {
                pool.submit(copy_context().run, self._write, number)  # the visitor's: ZeroGPU asks there whose minutes these are
                for number in range(len(self._files))
            }
            while open_ones:
                with self._lock:
                    items = tuple(self._items)
                if items != shown:
                    shown = items
                    yield Progress(items, estimate.after(self._share(items), "batch"), is_over=False)
                open_ones = wait(open_ones, timeout=OFTEN_S).not_done
            yield Progress(tuple(self._items), None, is_over=True)
        finally:
            self._is_left.set()  # nobody looks any more: the page was closed
            pool.shutdown(wait=False, cancel_futures=True)

    def _share(self, items: Sequence[Item]) -> float:
        settled = ("done", "failed", "stopped")
        return sum(weight * (1.0 if item.state in settled else item.share) for weight, item in zip(self._weights, items, strict=True))

    def _write(self, number: int) -> None:
        """One recording, with whatever comes of it."""

        def tell(share: float, _: str) -> None:
            self._check()
            self._change(number, share=share)

        try:
            self._check()
            self._change(number, state="working")
            transcript = self._transcriber.transcribe(str(self._files[number]), on_progress=tell, **self._options)
            self._change(number, state="done", share=1.0, transcript=transcript)
        except StoppedError:
            self._change(number, state="stopped")
        except ValueError as error:
            self._change(number, state="failed", error=str(error).replace(str(self._files[number]), self._items[number].name))
        except Exception:  # a fault of ours with one recording is no reason to lose the others
            _log.exception("A recording of a batch could not be transcribed")
            self._change(
                number, state="failed", error="Something went wrong here, and it is not your recording's fault. Try this one again."
            )

    def _check(self) -> None:
        self._run.check()
        if self._is_left.is_set():
            raise StoppedError

    def _change(self, number: int, **values: Any) -> None:
        with self._lock:
            self._items[number] = replace(self._items[number], **values)


def _num_bytes(file: Path) -> int:
    try:
        return max(1, file.stat().st_size)
    except OSError:  # reading it will say why
        return 1


# ---- the zip -----------------------------------------------------------------------------------------------------------


def write_zip(items: Iterable[Item], path: Path) -> None:
    """Write what is done: every transcript as txt, srt, vtt and json; `table.csv`, a line for each recording; `decisions.csv`, why each was
    written the way it was."""
    items = list(items)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in items:
            if item.transcript is not None:
                for kind in FORMATS:
                    archive.writestr(f"{item.stem}.{kind}", file_content(item.transcript, kind))
        archive.writestr("table.csv", table_csv(items))
        archive.writestr("decisions.csv", decisions_csv(items))


def table_csv(items: Iterable[Item]) -> bytes:
    """A line for each recording: what it is, what was written, or why nothing was."""
    head = ("file", "texts", "state", "seconds", "language", "language_name", "probability", "adapter", "text", "warnings", "error")
    return _csv(head, map(_table_row, items))


def decisions_csv(items: Iterable[Item]) -> bytes:
    """A line for each recording that was written: the decision, and the figures behind it."""
    head = (
        "file", "decision", "reason", "language", "probability", "alternatives", "adapter", "method", "bytes", "source", "fallback",
        "wer_before", "wer_after", "cer_before", "cer_after", "test_set", "clips",
    )  # fmt: skip
    return _csv(head, (_decision_row(item.name, item.transcript) for item in items if item.transcript is not None))


def _table_row(item: Item) -> list[Any]:
    written = item.transcript
    if written is None:
        return [item.name, None, item.state, *[None] * 7, item.error]
    return [
        *(item.name, item.stem, item.state, round(written.duration_s, 2), written.language, written.language_name),
        *(_rounded(written.probability), written.adapter, written.text, " ".join(written.warnings), None),
    ]


def _decision_row(name: str, transcript: Transcript) -> list[Any]:
    why = explain(transcript)
    others = "; ".join(f"{each.language} {each.probability:.3f}" for each in why.alternatives)
    figures = why.measured
    measured: list[Any] = [None] * 6
    if figures is not None:
        rates = (figures.wer_before, figures.wer_after, figures.cer_before, figures.cer_after)
        measured = [*map(_rounded, rates), figures.test_set, figures.clips]
    return [
        *(name, why.sentence, why.reason, why.language, _rounded(why.probability), others),
        *(why.adapter, why.method, why.num_bytes, why.source, why.fallback, *measured),
    ]


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """With a mark in front by which spreadsheets know UTF-8."""
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(head)
    writer.writerows([_defused(cell) for cell in row] for row in rows)
    return written.getvalue().encode("utf-8-sig", "replace")


def _defused(cell: Any) -> Any:
    """A spreadsheet runs a cell that begins like a formula: an apostrophe in front makes it text again."""
    is_formula = isinstance(cell, str) and cell.lstrip()[:1] in tuple("=+-@＝＋－＠")
    return f"'{cell}" if is_formula else cell
