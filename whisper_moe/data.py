"""Clips with transcripts -> training batches: any source of `sources` in, features and labels out.

Knows Whisper's window and its label layout; knows no adapters and no metrics. Two ways to hold clips: `Clips` decodes each once, when it
is loaded (a bad one is counted then, and not met in the middle of a run), and keeps 16-bit samples, 115 MB an hour; `ClipStream`
decodes while the training goes on, for what does not fit in memory. Both count what they leave out.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from whisper_moe.audio import SAMPLE_RATE, AudioError, load_audio
from whisper_moe.augment import augment_samples, mask_features
from whisper_moe.languages import language_code
from whisper_moe.sources import PROBLEMS, Loader, Row, Rows, drawn, open_rows

if TYPE_CHECKING:
    from transformers import WhisperProcessor

IGNORED = -100  # label that the loss leaves out

_Result = TypeVar("_Result")
ClipKey = tuple[int, int]  # (epoch, index): what augmentation is drawn from, so that a resumed run draws the same
_RESTART = 1 << 32  # more passes than anybody makes: added to a pass's number once for each time that its source began again


# ---- clips ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A recording and what is said in it."""

    samples: np.ndarray
    """(samples,) int16, mono, 16 kHz."""
    text: str
    language: str | None = None
    speaker: str | None = None

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass
class LoadReport:
    """What became of the clips of a source: how many were left out, and why."""

    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of clips."""
    first_error: str | None = None
    """What was wrong with the first clip that could not be decoded."""
    notes: tuple[str, ...] = ()
    """What else the reader should know of the source."""

    @property
    def reasons(self) -> str:
        """Empty if none was left out."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())

    def __str__(self) -> str:
        left_out = f"left out: {self.reasons}" if self.left_out else "none left out"
        return "; ".join([left_out + (f" (the first: {self.first_error})" if self.first_error else ""), *self.notes])


class Clips(Dataset):
    """Decoded clips. An item is `{"audio": (samples,) float32 at 16 kHz, "text", "language", "speaker", "duration_s"}`."""

    def __init__(self, clips: Sequence[Clip], name: str = "clips", report: LoadReport | None = None) -> None:
        self.clips, self.name = list(clips), name
        self.report = LoadReport() if report is None else report

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _item(self.clips[index])

    def __str__(self) -> str:
        return f"{self.name}: {len(self):,} clips, {self.hours:.2f} h, {self.report}"

    @property
    def hours(self) -> float:
        return sum(clip.duration_s for clip in self.clips) / 3600

    @property
    def texts(self) -> list[str]:
        return [clip.text for clip in self.clips]

    def digest(self) -> str:
        """SHA-256 of all samples and transcripts in their order."""
        digest = hashlib.sha256()
        for clip in self.clips:
            text = clip.text.encode()
            digest.update(f"{len(clip.samples)} {len(text)} ".encode() + text)
            digest.update(np.ascontiguousarray(clip.samples).tobytes())
        return digest.hexdigest()

    def select(self, keep: Callable[[Clip], bool], reason: str) -> Clips:
        """The clips for which `keep` is true; the others are counted under `reason`."""
        kept = [clip for clip in self.clips if keep(clip)]
        left_out = self.report.left_out.copy()
        if len(kept) < len(self.clips):
            left_out[reason] += len(self.clips) - len(kept)
        return Clips(kept, self.name, replace(self.report, left_out=left_out))


def _item(clip: Clip) -> dict[str, Any]:
    return {
        "audio": clip.samples.astype(np.float32) / 32768,
        "text": clip.text,
        "language": clip.language,
        "speaker": clip.speaker,
        "duration_s": clip.duration_s,
    }


# ---- rows -> clips ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filters:
    """Which clips are kept. The reasons of the others are phrases, so that a report can be read aloud."""

    language: str | None = None
    """Label every clip with this language; clips that say another are left out."""
    min_duration_s: float = 0.1
    max_duration_s: float = 30.0
    exclude_text: str | None = None
    """A regular expression; clips whose transcript it matches are left out."""
    max_chars_per_s: float | None = None
    """More characters a second than anybody speaks mean that sound and text are not the same; 25 is a fair limit for alphabets."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration_s <= self.max_duration_s:
            raise ValueError(f"Clips of {self.min_duration_s:g} to {self.max_duration_s:g} s are asked for; there are none such.")
        try:
            re.compile(self.exclude_text or "")
        except re.error as error:
            raise ValueError(f"exclude_text={self.exclude_text!r} is no regular expression: {error}.") from error

    def read(self, row: Row) -> Clip | str | AudioError:
        """The clip of a row, decoded, or why it is left out."""
        if "problem" in row:
            return str(row["problem"])
        wanted = None if self.language is None else _code(self.language)
        own_language = _code(said) if isinstance(said := row.get("language"), str) and said.strip() else None
        if not isinstance(row["text"], (str, type(None))):
            return "whose transcript is no text"
        text = tidy_text(row["text"] or "")
        if not text:
            return "without a transcript"
        if self.exclude_text and re.search(self.exclude_text, text):
            return "with an excluded transcript"
        if wanted and own_language and own_language != wanted:
            return f"in another language than {wanted}"
        try:
            samples = load_audio(_encoded(row["audio"]))
        except (ValueError, TypeError, OSError) as error:  # whatever a row holds, it is that row's fault alone
            return AudioError(str(error))
        duration_s = len(samples) / SAMPLE_RATE
        if duration_s < self.min_duration_s:
            return f"shorter than {self.min_duration_s:g} s"
        if duration_s > self.max_duration_s:
            return f"longer than {self.max_duration_s:g} s"
        if self.max_chars_per_s is not None and len(text) > self.max_chars_per_s * duration_s:
            return f"with more than {self.max_chars_per_s:g} characters a second"
        int16 = np.clip(samples * 32768, -32768, 32767).astype(np.int16)
        speaker = row.get("speaker")
        return Clip(int16, text, wanted or own_language, None if speaker is None else str(speaker))


def load_clips(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    language: str | None = None,
    min_duration_s: float = 0.1,
    max_duration_s: float = 30.0,
    exclude_text: str | None = None,
    max_chars_per_s: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
    load_dataset: Loader | None = None,
) -> Clips:
    """Read and decode clips.

    Args:
        source: a parquet, CSV, TSV or JSONL file; a glob of parquet files; a folder with `<split>.parquet` or `data/<split>-*.parquet`,
            with `metadata.csv` beside the recordings, or of an unpacked Common Voice; or a data set of the Hub (`"google/fleurs"`).
        split: which split; may be left out if there is only one. "dev" also finds "validation". A file has none. A folder whose
            `metadata.csv` has no column `split` is divided into train, dev and test, the same way each time.
        config: of a data set of the Hub; may be left out for FLEURS and Multilingual LibriSpeech if the language is given.
        text_column, audio_column: the columns of transcript and recording; by default they are guessed (`text`, `sentence`,
            `transcription`, `transcript`; `audio`, `file_name`, `path` ...).
        language: label every clip with this language; where the source has a `language` column, clips of others are left out.
        min_duration_s, max_duration_s: shorter and longer clips are left out.
        exclude_text: a regular expression; clips whose transcript it matches are left out.
        max_chars_per_s: clips with more characters a second are left out; None: no limit.
        limit: read only this many rows, drawn by `seed`.
        name: what reports call the set; by default its folder and split.
        load_dataset: for tests; by default that of the `datasets` package.

    Returns:
        The clips, with a report of those left out.

    Raises:
        ValueError: No such source, split or column, or not a single usable clip.
    """
    rows = open_rows(
        source,
        split=split,
        config=config,
        text_column=text_column,
        audio_column=audio_column,
        language=language,
        load_dataset=load_dataset,
    )
    return _load(
        drawn(rows, limit, seed),
        Filters(language, min_duration_s, max_duration_s, exclude_text, max_chars_per_s),
        rows.name if name is None else name,
        rows.notes,
    )


def clips_from_rows(
    rows: Iterable[Row],
    *,
    language: str | None = None,
    min_duration_s: float = 0.1,
    max_duration_s: float = 30.0,
    exclude_text: str | None = None,
    max_chars_per_s: float | None = None,
    name: str = "clips",
) -> Clips:
    """Decode rows of `audio` (what `load_audio` takes, or the Hub's `{"bytes", "path"}` and `{"array", "sampling_rate"}`), `text`
    and, if known, `language` and `speaker`. The other arguments are those of `load_clips`; any dataset that yields such rows will do."""
    return _load(rows, Filters(language, min_duration_s, max_duration_s, exclude_text, max_chars_per_s), name)


def _load(rows: Iterable[Row], filters: Filters, name: str, notes: tuple[str, ...] = ()) -> Clips:
    report, clips = LoadReport(notes=notes), []
    with ThreadPoolExecutor() as pool:
        for outcome in _in_order(pool, filters.read, rows, read_ahead=64):
            if isinstance(outcome, Clip):
                clips.append(outcome)
            elif isinstance(outcome, AudioError):
                report.left_out["not decodable"] += 1
                report.first_error = report.first_error or str(outcome)
            else:
                report.left_out[outcome] += 1
    if not clips:
        raise ValueError(f"{name} has no usable clip; {report}. A row needs audio and a transcript.")
    return Clips(clips, name, report)


def tidy_text(text: str) -> str:
    """NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@cache
def _code(language: str) -> str:
    """Whisper's code for a language as a data set writes it; what no one knows stays as it is."""
    try:
        return language_code(language)
    except ValueError:
        return language


def _encoded(audio: Any) -> Any:
    """What `load_audio` takes: of a Hub-style audio struct the decoded array, the bytes or the path; other things as they are."""
    if not isinstance(audio, Mapping):
        return audio
    if audio.get("array") is not None:
        return audio.get("sampling_rate"), np.asarray(audio["array"])
    return audio["bytes"] if audio.get("bytes") is not None else audio.get("path")


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], _Result], items: Iterable[Any], read_ahead: int) -> Iterator[_Result]:
    """`pool.map` that is at most `read_ahead` items in front of its reader: the encoded audio need not fit in memory at once."""
    source, waiting = iter(items), deque[Future[_Result]]()
    try:
        for item in islice(source, read_ahead):
            waiting.append(pool.submit(work, item))
        while waiting:
            done = waiting.popleft().result()
            for item in islice(source, 1):
                waiting.append(pool.submit(work, item))
            yield done
    finally:
        for future in waiting:
            future.cancel()


# ---- streams and mixtures --------------------------------------------------------------------------------------------------


_MAX_WORKERS = 256  # processes of one DataLoader whose counts are kept apart


class ClipStream(IterableDataset):
    """Clips that are decoded as they are read, by threads that work ahead. Items are those of `Clips`, with a `key` for augmentation.

    A bad clip is counted and passed over; `report` holds the counts of all worker processes of a DataLoader, each of which reads its own
    part of the rows. The order is drawn by seed and epoch within a buffer, so a repeated epoch is the same.

    Args:
        rows: what `open_rows` returned.
        filters: which clips are kept.
        shuffle_buffer: clips among which the next one is drawn; 0: the order of the source.
        seed: of the order.
        num_threads: that decode, in each process.
        read_ahead: clips that may wait decoded.
    """

    def __init__(
        self,
        rows: Rows,
        filters: Filters | None = None,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        num_threads: int = 2,
        read_ahead: int = 32,
    ) -> None:
        super().__init__()
        self.rows, self.filters, self.name = rows, Filters() if filters is None else filters, rows.name
        self.shuffle_buffer, self.seed, self.num_threads, self.read_ahead = shuffle_buffer, seed, num_threads, read_ahead
        self._fit: _Fit | None = None
        self._part = (0, 1)  # of the processes that train together
        # In memory that worker processes share: their own `self` is a copy, made once if they persist from epoch to epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        # (workers, reasons)
        self._counts = torch.zeros(_MAX_WORKERS, 32, dtype=torch.int64).share_memory_()
        self._kept = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._known = self._known_reasons()

    @property
    def epoch(self) -> int:
        """The pass that comes next, or is under way."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this one: another order, other augmentation."""
        self._epoch.fill_(epoch)

    def fitting(self, processor: WhisperProcessor, max_tokens: int, prompt_language: str) -> ClipStream:
        """The same stream without clips longer than the model's window or labels longer than its decoder; they are counted too."""
        return self._again(_Fit(processor, max_tokens, prompt_language))

    def fresh(self) -> ClipStream:
        """The same stream with counts of its own, for whoever only wants to look at some clips."""
        return self._again(self._fit)

    def _again(self, fit: _Fit | None) -> ClipStream:
        other = ClipStream(
            self.rows,
            self.filters,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            num_threads=self.num_threads,
            read_ahead=self.read_ahead,
        )
        other._part, other._fit = self._part, fit
        other._known = other._known_reasons()
        return other

    def digest(self) -> str:
        """SHA-256 of what says which clips come, and in which order; the clips themselves are not known."""
        return _sha256([self.name, asdict(self.filters), self.shuffle_buffer, self.seed])

    def share_of(self, process: int, num_processes: int) -> None:
        """Read only the rows that fall to one of several processes that train together."""
        self._part = (process, num_processes)

    @property
    def report(self) -> LoadReport:
        """What was left out so far, over all passes and processes."""
        totals = self._counts.sum(0).tolist()
        return LoadReport(Counter({reason: totals[at] for at, reason in enumerate(self._known) if totals[at]}), notes=self.rows.notes)

    @property
    def num_read(self) -> int:
        """Usable clips given out so far, over all passes and processes."""
        return int(self._kept.sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read_pass(self.epoch)

    def read_pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        """One pass, by its number: what a worker process is in the middle of does not hang on what another one does."""
        worker = get_worker_info()
        row, num_rows = (0, 1) if worker is None else (worker.id, worker.num_workers)
        process, num_processes = self._part
        shard, num_shards = process * num_rows + row, num_processes * num_rows
        rng = np.random.default_rng((self.seed, epoch, shard))
        numbered = (
            _item(clip) | {"key": (epoch, number * num_shards + shard)} for number, clip in enumerate(self._clips(shard, num_shards, row))
        )
        if not self.shuffle_buffer:
            yield from numbered
            return
        buffer = list(islice(numbered, self.shuffle_buffer))
        for item in numbered:
            at = int(rng.integers(len(buffer)))
            chosen, buffer[at] = buffer[at], item
            yield chosen
        for at in rng.permutation(len(buffer)):
            yield buffer[at]

    def _clips(self, shard: int, num_shards: int, row: int) -> Iterator[Clip]:
        """The usable clips of a shard; `row` is where its counts stand."""
        warned = False
        with ThreadPoolExecutor(self.num_threads) as pool:
            for outcome in _in_order(pool, self.filters.read, self.rows.read(shard, num_shards), self.read_ahead):
                if isinstance(outcome, Clip) and self._fit is not None:
                    outcome = self._fit.why_not(outcome) or outcome
                if isinstance(outcome, Clip):
                    self._kept[row] += 1
                    yield outcome
                    continue
                if isinstance(outcome, AudioError) and not warned:
                    warnings.warn(f"{self.name}: a clip cannot be decoded and is passed over: {outcome}", stacklevel=2)
                    warned = True
                reason = "not decodable" if isinstance(outcome, AudioError) else outcome
                self._counts[row, self._known.index(reason if reason in self._known else "for another reason")] += 1

    def _known_reasons(self) -> list[str]:
        """All reasons there can be, in an order every process agrees on."""
        filters = self.filters
        reasons = ["not decodable", "without a transcript", "whose transcript is no text", "with an excluded transcript"]
        reasons += [f"shorter than {filters.min_duration_s:g} s", f"longer than {filters.max_duration_s:g} s"]
        reasons += [] if filters.language is None else [f"in another language than {_code(filters.language)}"]
        reasons += [] if filters.max_chars_per_s is None else [f"with more than {filters.max_chars_per_s:g} characters a second"]
        reasons += [] if self._fit is None else list(self._fit.reasons)
        return [*reasons, *PROBLEMS, "for another reason"]


@dataclass(frozen=True)
class _Fit:
    """What a model can take in at once."""

    processor: WhisperProcessor
    max_tokens: int
    prompt_language: str

    @property
    def reasons(self) -> tuple[str, str]:
        return f"longer than the window of {window_s(self.processor):g} s", f"longer than {self.max_tokens} tokens"

    def why_not(self, clip: Clip) -> str | None:
        """Why a clip does not fit, None if it does."""
        if clip.duration_s > window_s(self.processor):
            return self.reasons[0]
        return self.reasons[1] if len(label_ids(self.processor, clip.text, self.prompt_language)) > self.max_tokens else None


def stream_clips(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    filters: Filters | None = None,
    load_dataset: Loader | None = None,
    **options: Any,
) -> ClipStream:
    """`load_clips` for what does not fit in memory: nothing is read before the first clip is asked for, a Hub data set is streamed.

    Args:
        source, split, config, text_column, audio_column, load_dataset: as in `load_clips`.
        filters: which clips are kept, and their language.
        options: those of `ClipStream`.
    """
    filters = Filters() if filters is None else filters
    rows = open_rows(
        source,
        split=split,
        config=config,
        text_column=text_column,
        audio_column=audio_column,
        language=filters.language,
        streaming=True,
        load_dataset=load_dataset,
    )
    return ClipStream(rows, filters, **options)


def _sha256(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _shares(weights: Sequence[float], num_sources: int) -> np.ndarray:
    """(sources,) that sum to 1."""
    if len(weights) != num_sources or num_sources == 0:
        raise ValueError(f"{num_sources} sources and {len(weights)} weights: there must be one weight for each source.")
    array = np.asarray(weights, np.float64)
    if not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(f"The weights are {list(weights)}; each has to be above 0. Leave out a source that is not wanted.")
    return array / array.sum()


def mix_clips(sources: Sequence[Clips], weights: Sequence[float], *, num_clips: int | None = None, seed: int = 0) -> Clips:
    """A set in which each source has its share of the clips.

    Args:
        sources: the sets. Their clips are shared, not copied.
        weights: one for each, in any unit.
        num_clips: of the mixture; by default as many as all sources have together. What a source lacks is repeated, as evenly as possible.
        seed: of which clips are taken.
    """
    shares = _shares(weights, len(sources))
    if empty := [clips.name for clips in sources if not len(clips)]:
        raise ValueError(f"Nothing can be drawn from an empty set: {', '.join(empty)}.")
    total = sum(map(len, sources)) if num_clips is None else num_clips
    ends = np.round(np.cumsum(shares) * total).astype(int)
    mixed: list[Clip] = []
    for clips, number in zip(sources, np.diff(ends, prepend=0).tolist(), strict=True):
        rng = np.random.default_rng((seed, len(mixed)))
        order: list[int] = []
        while len(order) < number:
            order += rng.permutation(len(clips)).tolist()
        mixed += [clips.clips[at] for at in order[:number]]
    name = " + ".join(f"{share:.0%} {clips.name}" for share, clips in zip(shares, sources, strict=True))
    left_out = sum((clips.report.left_out for clips in sources), Counter[str]())
    first = next((clips.report.first_error for clips in sources if clips.report.first_error), None)
    return Clips(mixed, name, LoadReport(left_out, first, tuple(note for clips in sources for note in clips.report.notes)))


class StreamMixture(IterableDataset):
    """Streams drawn from in turn, by their weights.

    Args:
        sources: the streams.
        weights: one for each, in any unit.
        stop: "first" ends with the first stream that ends; "all" lets streams begin again until each has ended once.
        seed: of the draws.
    """

    def __init__(self, sources: Sequence[ClipStream], weights: Sequence[float], *, stop: str = "all", seed: int = 0) -> None:
        super().__init__()
        if stop not in ("first", "all"):
            raise ValueError(f"stop is {stop!r}; it is 'first' or 'all'.")
        self.sources, self.shares, self.stop, self.seed = list(sources), _shares(weights, len(sources)), stop, seed
        self.name = " + ".join(f"{share:.0%} {source.name}" for share, source in zip(self.shares, self.sources, strict=True))

    @property
    def epoch(self) -> int:
        """The pass that comes next, or is under way."""
        return self.sources[0].epoch

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this one, for every source."""
        for source in self.sources:
            source.set_epoch(epoch)

    def fitting(self, processor: WhisperProcessor, max_tokens: int, prompt_language: str) -> StreamMixture:
        """The same mixture without clips that do not fit in the model; see `ClipStream.fitting`."""
        return self._of([source.fitting(processor, max_tokens, prompt_language) for source in self.sources])

    def fresh(self) -> StreamMixture:
        """The same mixture with counts of its own; see `ClipStream.fresh`."""
        return self._of([source.fresh() for source in self.sources])

    def _of(self, sources: Sequence[ClipStream]) -> StreamMixture:
        return StreamMixture(sources, self.shares.tolist(), stop=self.stop, seed=self.seed)

    def digest(self) -> str:
        """SHA-256 of what says which clips come, and in which order."""
        return _sha256([[source.digest() for source in self.sources], self.shares.tolist(), self.stop, self.seed])

    def share_of(self, process: int, num_processes: int) -> None:
        """Read only the rows that fall to one of several processes that train together."""
        for source in self.sources:
            source.share_of(process, num_processes)

    @property
    def num_read(self) -> int:
        """Usable clips given out so far, over all passes and processes."""
        return sum(source.num_read for source in self.sources)

    @property
    def report(self) -> LoadReport:
        left_out = sum((source.report.left_out for source in self.sources), Counter[str]())
        return LoadReport(left_out, notes=tuple(note for source in self.sources for note in source.rows.notes))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read_pass(self.epoch)

    def read_pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        """One pass over all sources, by its number. A source that begins again does so in another order and with other augmentation.

        The key of an item is that of its stream, with the stream's number here between its two.
        """
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, epoch, 0 if worker is None else worker.id, self.sources[0]._part[0]))
        streams = [source.read_pass(epoch) for source in self.sources]
        restarts, unfinished = [0] * len(streams), set(range(len(streams)))
        while unfinished:
            at = int(rng.choice(len(streams), p=self.shares))
            item = next(streams[at], None)
            if item is None:
                if self.stop == "first":
                    return
                unfinished.discard(at)
                if not unfinished:
                    return
                restarts[at] += 1
                streams[at] = self.sources[at].read_pass(epoch + restarts[at] * _RESTART)
                item = next(streams[at], None)
                if item is None:  # nothing of it is usable here, and never will be
                    raise ValueError(f"{self.sources[at].name} has no usable clip; {self.sources[at].report}.")
            turn, number = item["key"]
            yield item | {"key": (turn, at, number)}


class EndlessStream(IterableDataset):
    """Pass after pass of a stream, each in its own order: what a loop that counts steps reads.

    Ends only where a whole pass had nothing usable in it. The same seed gives the same clips in the same order, so a run that is
    resumed reads up to where it was and goes on from there.
    """

    def __init__(self, stream: ClipStream | StreamMixture) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            item = None
            for item in self.stream.read_pass(epoch):
                yield item
            if item is None:
                return


def batches(
    clips: Dataset | IterableDataset, collator: Collator, batch_size: int, *, num_workers: int = 2, prefetch: int = 4, **options: Any
) -> DataLoader:
    """A DataLoader whose workers decode and extract features ahead of the training step. Other options are PyTorch's."""
    ahead: dict[str, Any] = {"prefetch_factor": prefetch, "persistent_workers": True} if num_workers else {}
    return DataLoader(clips, batch_size, collate_fn=collator, num_workers=num_workers, **ahead, **options)


# ---- clips -> batches ------------------------------------------------------------------------------------------------------


def window_s(processor: WhisperProcessor) -> float:
    """Seconds of audio that the model hears at once (Whisper's 30, the pocket's 10)."""
    features = processor.feature_extractor
    return features.n_samples / features.sampling_rate


def extract_features(processor: WhisperProcessor, waves: Sequence[np.ndarray], num_samples: int | None = None) -> torch.Tensor:
    """Log-mel features of float32 waves, each (samples,), padded or cut to `num_samples` (default: the window).

    Returns (batch, n_mels, frames). Computed as far as the longest wave reaches: behind it every frame is the same silence, which is
    copied. For clips of some seconds in a window of thirty that is a quarter of the work.
    """
    features = processor.feature_extractor
    width = features.n_samples if num_samples is None else num_samples
    # A whole transform of silence behind the longest wave: then the last frame has heard none of it.
    heard = min(width, -(-(max(map(len, waves)) + 2 * features.n_fft) // features.hop_length) * features.hop_length)
    padded = np.zeros((len(waves), heard), np.float32)  # (batch, samples)
    for row, wave in enumerate(waves):
        padded[row, : min(len(wave), heard)] = wave[:heard]
    extracted = features(list(padded), sampling_rate=features.sampling_rate, padding="longest", truncation=False, return_tensors="pt")
    found: torch.Tensor = extracted.input_features
    missing = width // features.hop_length - found.shape[-1]
    if heard == width or missing <= 0:
        return found
    return torch.cat([found, found[..., -1:].expand(-1, -1, missing)], dim=-1)


def label_ids(processor: WhisperProcessor, text: str, prompt_language: str) -> list[int]:
    """`<|language|> <|transcribe|> <|notimestamps|> text <|endoftext|>`; the text starts with a space, as Whisper writes it.

    `<|startoftranscript|>` is not in it: Whisper puts it in front when it shifts the labels to the decoder's input.
    """
    tokenizer = processor.tokenizer
    prompt = tokenizer.convert_tokens_to_ids([f"<|{prompt_language}|>", "<|transcribe|>", "<|notimestamps|>"])
    return [*prompt, *tokenizer(f" {text}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def fit_for_training(clips: Clips, processor: WhisperProcessor, max_tokens: int, prompt_language: str) -> Clips:
    """The clips that fit in the model's window and whose labels fit in its decoder; the others are counted."""
    fit = _Fit(processor, max_tokens, prompt_language)
    for reason in fit.reasons:
        clips = clips.select(lambda clip, reason=reason: fit.why_not(clip) != reason, reason)  # type: ignore[misc]
    return clips


class EpochOrder(Sampler[ClipKey]):
    """A new order of all clips in every epoch, drawn by `seed`, with clips of similar length beside each other.

    Yields (epoch, index) and not the index alone, so that a worker process can draw its augmentation from both.
    """

    def __init__(self, durations_s: Sequence[float], batch_size: int, seed: int, pool_batches: int = 20) -> None:
        self.durations_s, self.batch_size, self.seed = list(durations_s), batch_size, seed
        self.pool_size = batch_size * pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.durations_s)

    def __iter__(self) -> Iterator[ClipKey]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self))
        batches = []
        for start in range(0, len(order), self.pool_size):
            pool = sorted(order[start : start + self.pool_size].tolist(), key=self.durations_s.__getitem__)
            batches += [pool[at : at + self.batch_size] for at in range(0, len(pool), self.batch_size)]
        # A short batch has to stay last: the sampler above this one cuts the indices into equal batches.
        whole, short = batches, []
        if len(batches[-1]) < self.batch_size:
            whole, short = batches[:-1], batches[-1:]
        for batch in [*(whole[at] for at in rng.permutation(len(whole))), *short]:
            yield from ((self.epoch, index) for index in batch)


class TrainingView(Dataset):
    """Clips by `ClipKey`, so that the collator knows the epoch."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: ClipKey) -> dict[str, Any]:
        return self.clips[key[1]] | {"key": key}


@dataclass
class Collator:
    """Items of a `TrainingView` -> `{"input_features": (batch, n_mels, frames), "labels": (batch, tokens)}`."""

    processor: WhisperProcessor
    prompt_language: str
    augment: bool = True
    """Change speed, level and noise, and mask parts of the features (SpecAugment)."""
    crop_share: float = 0.0
    """Share of batches whose window ends shortly after the longest clip in it."""
    seed: int = 0

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        rngs = [np.random.default_rng((self.seed, *item["key"])) for item in items]
        waves = [item["audio"] for item in items]
        if self.augment:
            waves = [augment_samples(wave, rng, extractor.n_samples) for wave, rng in zip(waves, rngs, strict=True)]
        features = extract_features(self.processor, waves, self._width(waves, rngs[0]))
        if self.augment:
            for row, (wave, rng) in enumerate(zip(waves, rngs, strict=True)):
                mask_features(features[row], -(-len(wave) // extractor.hop_length), rng)
        labels = [label_ids(self.processor, item["text"], self.prompt_language) for item in items]
        longest = max(map(len, labels))
        padded = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
        return {"input_features": features, "labels": padded}

    def _width(self, waves: Sequence[np.ndarray], rng: np.random.Generator) -> int:
        """Samples of the batch's window: all of it, or up to half a second of silence behind the longest clip."""
        extractor = self.processor.feature_extractor
        if rng.random() >= self.crop_share:
            return extractor.n_samples
        longest = max(map(len, waves)) + int(rng.uniform(0, 0.5) * SAMPLE_RATE)
        position = 2 * extractor.hop_length  # samples of one encoder position
        return min(extractor.n_samples, -(-longest // position) * position)
