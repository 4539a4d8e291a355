"""Clips with transcripts -> training batches: parquet in the Hub's layout in, features and labels out.

Knows Whisper's window, its label layout and light augmentation; knows no adapters and no metrics. Every clip is decoded
once, when it is loaded: a bad one is counted then, and not met in the middle of a training run. Audio is kept as 16-bit
samples, 115 MB an hour.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from glob import glob
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import soxr
import torch
from torch.utils.data import Dataset, Sampler

from whisper_moe.audio import SAMPLE_RATE, AudioError, load_audio
from whisper_moe.languages import language_code

if TYPE_CHECKING:
    from transformers import WhisperProcessor

IGNORED = -100  # label that the loss leaves out
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")  # what Hub datasets call it, in order of preference

_Result = TypeVar("_Result")
ClipKey = tuple[int, int]  # (epoch, index): what augmentation is drawn from, so that a resumed run draws the same


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

    @property
    def reasons(self) -> str:
        """Empty if none was left out."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())

    def __str__(self) -> str:
        if not self.left_out:
            return "none left out"
        return f"left out: {self.reasons}" + (f" (the first: {self.first_error})" if self.first_error else "")


class Clips(Dataset):
    """Decoded clips. An item is `{"audio": (samples,) float32 at 16 kHz, "text", "language", "speaker", "duration_s"}`."""

    def __init__(self, clips: Sequence[Clip], name: str = "clips", report: LoadReport | None = None) -> None:
        self.clips, self.name = list(clips), name
        self.report = LoadReport() if report is None else report

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index]
        audio = clip.samples.astype(np.float32) / 32768
        return {
            "audio": audio,
            "text": clip.text,
            "language": clip.language,
            "speaker": clip.speaker,
            "duration_s": clip.duration_s,
        }

    def __str__(self) -> str:
        return f"{self.name}: {len(self):,} clips, {self.hours:.2f} h, {self.report}"

    @property
    def hours(self) -> float:
        return sum(clip.duration_s for clip in self.clips) / 3600

    @property
    def texts(self) -> list[str]:
        return [clip.text for clip in self.clips]

    def select(self, keep: Callable[[Clip], bool], reason: str) -> Clips:
        """The clips for which `keep` is true; the others are counted under `reason`."""
        kept = [clip for clip in self.clips if keep(clip)]
        left_out = self.report.left_out.copy()
        if len(kept) < len(self.clips):
            left_out[reason] += len(self.clips) - len(kept)
        return Clips(kept, self.name, LoadReport(left_out, self.report.first_error))


def load_clips(
    source: str | Path,
    *,
    split: str | None = None,
    text_column: str | None = None,
    language: str | None = None,
    min_duration_s: float = 0.1,
    max_duration_s: float = 30.0,
    exclude_text: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Clips:
    """Read and decode clips from parquet files laid out as on the Hugging Face Hub.

    Args:
        source: a parquet file, a glob of them, or a folder with `<split>.parquet` or `data/<split>-*.parquet`.
        split: which split of a folder; may be left out if the folder has only one.
        text_column: the transcript's column; by default the first of `text`, `sentence`, `transcription`, `transcript`.
        language: label every clip with this language; where the file has a `language` column, clips of others are left out.
        min_duration_s, max_duration_s: shorter and longer clips are left out.
        exclude_text: a regular expression; clips whose transcript it matches are left out.
        limit: read only this many rows, drawn by `seed`.
        name: what reports call the set; by default its folder and split.

    Returns:
        The clips, with a report of those left out. A source without a single usable clip is a `ValueError`.
    """
    paths = parquet_files(source, split)
    default_name = f"{paths[0].parent.name}/{paths[0].stem}" if len(paths) == 1 else f"{Path(source).name}/{split or 'all'}"
    return clips_from_rows(
        _read_rows(paths, text_column, limit, seed),
        language=language,
        min_duration_s=min_duration_s,
        max_duration_s=max_duration_s,
        exclude_text=exclude_text,
        name=default_name if name is None else name,
    )


def clips_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    language: str | None = None,
    min_duration_s: float = 0.1,
    max_duration_s: float = 30.0,
    exclude_text: str | None = None,
    name: str = "clips",
) -> Clips:
    """Decode rows of `audio` (what `load_audio` takes, or the Hub's `{"bytes", "path"}` and `{"array", "sampling_rate"}`), `text`
    and, if known, `language` and `speaker`. The other arguments are those of `load_clips`; any dataset that yields such rows will do."""
    excluded = re.compile(exclude_text) if exclude_text else None
    wanted = None if language is None else _code(language)
    report, clips = LoadReport(), []

    def read(row: Mapping[str, Any]) -> Clip | str | AudioError:
        """The clip, or why it is left out."""
        text = tidy_text(row["text"] or "")
        own_language = _code(row["language"]) if row.get("language") else None
        if not text:
            return "without a transcript"
        if excluded and excluded.search(text):
            return "with an excluded transcript"
        if wanted and own_language and own_language != wanted:
            return f"in another language than {wanted}"
        try:
            samples = load_audio(_encoded(row["audio"]))
        except (AudioError, OSError) as error:
            return AudioError(str(error))
        duration_s = len(samples) / SAMPLE_RATE
        if duration_s < min_duration_s:
            return f"shorter than {min_duration_s:g} s"
        if duration_s > max_duration_s:
            return f"longer than {max_duration_s:g} s"
        int16 = np.clip(samples * 32768, -32768, 32767).astype(np.int16)
        return Clip(int16, text, wanted or own_language, row.get("speaker"))

    with ThreadPoolExecutor() as pool:
        for outcome in _in_order(pool, read, rows):
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


def parquet_files(source: str | Path, split: str | None = None) -> list[Path]:
    """The parquet files of a split: a file is itself, a glob its matches, a folder is searched in the Hub's layout."""
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        found = sorted(Path(path) for path in glob(str(source)))
        if found:
            return found
        raise ValueError(
            f"No parquet file at {source}. Expected a .parquet file, a glob such as 'data/train-*.parquet', or a folder with "
            f"<split>.parquet. For a dataset of the Hub, download it first: `hf download --repo-type dataset NAME --local-dir DIR`."
        )
    by_split: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        by_split.setdefault(path.stem.split("-")[0], []).append(path)
    if split is None and len(by_split) == 1:
        return next(iter(by_split.values()))
    if split is None or split not in by_split:
        asked = "name one with split=..." if split is None else f"there is no '{split}'"
        raise ValueError(f"{folder} has the splits {', '.join(by_split) or '(none: no parquet file)'}; {asked}.")
    return by_split[split]


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
        return audio["sampling_rate"], audio["array"]
    return audio["bytes"] if audio.get("bytes") is not None else audio.get("path")


def _text_column(columns: Sequence[str], asked: str | None, path: Path) -> str:
    candidates = TEXT_COLUMNS if asked is None else (asked,)
    for column in candidates:
        if column in columns:
            return column
    raise ValueError(
        f"{path} has no column {' or '.join(candidates)} for the transcript. Its columns: {', '.join(columns)}. "
        "Name the right one with text_column=..."
    )


def _read_rows(paths: Sequence[Path], text_column: str | None, limit: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of parquet files with the names that `clips_from_rows` expects; audio paths made relative to their file."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "peft-s2lora[train]".') from error

    try:
        files = [parquet.ParquetFile(path) for path in paths]
    except pyarrow.ArrowException as error:
        raise ValueError(f"Not a parquet file among {', '.join(map(str, paths))}: {error}") from error
    num_rows = sum(file.metadata.num_rows for file in files)
    chosen = None
    if limit is not None and limit < num_rows:
        chosen = set(np.random.default_rng(seed).permutation(num_rows)[:limit].tolist())
    number = 0
    for path, file in zip(paths, files, strict=True):
        columns = file.schema_arrow.names
        text = _text_column(columns, text_column, path)
        if "audio" not in columns:
            raise ValueError(f"{path} has no column 'audio'. Its columns: {', '.join(columns)}. Rename the one with the recordings.")
        wanted = ["audio", text, *(column for column in ("language", "speaker") if column in columns)]
        for batch in file.iter_batches(batch_size=64, columns=wanted):
            for row in batch.to_pylist():
                if chosen is None or number in chosen:
                    yield row | {"audio": _beside(path, row["audio"]), "text": row[text]}
                number += 1


def _beside(parquet_file: Path, audio: Any) -> Any:
    """Audio that is only a relative path, as a path from the parquet file's folder."""
    encoded = _encoded(audio)
    return parquet_file.parent / encoded if isinstance(encoded, str) else encoded


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], _Result], items: Iterable[Any]) -> Iterator[_Result]:
    """`pool.map` that reads a few hundred items ahead and not all of them: the encoded audio need not fit in memory at once."""
    source = iter(items)
    while part := list(islice(source, 256)):
        yield from pool.map(work, part)


# ---- clips -> batches ------------------------------------------------------------------------------------------------------


def window_s(processor: WhisperProcessor) -> float:
    """Seconds of audio that the model hears at once (Whisper's 30, the pocket's 10)."""
    features = processor.feature_extractor
    return features.n_samples / features.sampling_rate


def extract_features(processor: WhisperProcessor, waves: Sequence[np.ndarray], num_samples: int | None = None) -> torch.Tensor:
    """Log-mel features of float32 waves, each (samples,), padded or cut to `num_samples` (default: the window).

    Returns (batch, n_mels, frames).
    """
    features = processor.feature_extractor
    width = features.n_samples if num_samples is None else num_samples
    padded = np.zeros((len(waves), width), np.float32)  # (batch, samples)
    for row, wave in enumerate(waves):
        padded[row, : min(len(wave), width)] = wave[:width]
    extracted = features(list(padded), sampling_rate=features.sampling_rate, padding="longest", truncation=False, return_tensors="pt")
    return extracted.input_features


def label_ids(processor: WhisperProcessor, text: str, prompt_language: str) -> list[int]:
    """`<|language|> <|transcribe|> <|notimestamps|> text <|endoftext|>`; the text starts with a space, as Whisper writes it.

    `<|startoftranscript|>` is not in it: Whisper puts it in front when it shifts the labels to the decoder's input.
    """
    tokenizer = processor.tokenizer
    prompt = tokenizer.convert_tokens_to_ids([f"<|{prompt_language}|>", "<|transcribe|>", "<|notimestamps|>"])
    return [*prompt, *tokenizer(f" {text}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def fit_for_training(clips: Clips, processor: WhisperProcessor, max_tokens: int, prompt_language: str) -> Clips:
    """The clips that fit in the model's window and whose labels fit in its decoder; the others are counted."""
    window = window_s(processor)
    clips = clips.select(lambda clip: clip.duration_s <= window, f"longer than the window of {window:g} s")
    return clips.select(
        lambda clip: len(label_ids(processor, clip.text, prompt_language)) <= max_tokens, f"longer than {max_tokens} tokens"
    )


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


def augment_samples(samples: np.ndarray, rng: np.random.Generator, max_samples: int) -> np.ndarray:
    """Speed by up to a tenth (pitch moves with it), level, and white noise, each drawn by `rng`. (samples,) -> (samples',)"""
    if rng.random() < 0.5:
        speed = max(rng.uniform(0.9, 1.1), len(samples) / max_samples)  # a slower clip must still fit in the window
        samples = soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE, quality="QQ")[:max_samples]
    samples = samples * np.float32(10 ** rng.uniform(-0.6, 0.2))
    if rng.random() < 0.4:
        level = samples.std() * 10 ** (-rng.uniform(10, 40) / 20)
        samples = samples + rng.standard_normal(len(samples), np.float32) * np.float32(level)
    return np.clip(samples, -1, 1)


def mask_features(features: torch.Tensor, num_frames: int, rng: np.random.Generator) -> None:
    """Blank two bands and two stretches of the first `num_frames` frames, in place (SpecAugment, Park et al. 2019).

    `features` is (n_mels, frames). A band is at most a sixth of the mels, a stretch at most a tenth of the clip.
    """
    num_mels = len(features)
    for _ in range(2):
        low, width = int(rng.integers(num_mels)), int(rng.integers(num_mels // 6 + 1))
        features[low : low + width] = 0
        start, length = int(rng.integers(max(1, num_frames))), int(rng.integers(num_frames // 10 + 1))
        features[:, start : start + length] = 0
