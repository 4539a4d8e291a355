"""Handfuls of clips that stand in for every set of the experiments, made of the recordings that ship with the demo.

    python -m recipes.evidence.smoke_data /tmp/somewhere

For `--smoke`, tests and CI: no recorded sets, no sentence lists, no espeak-ng and no network are needed. The clips are pieces of ten
synthetic sentences with the words that roughly belong to them, played faster and slower; a "child" is a high voice of espeak-ng, and a
language without a recording borrows another's. What is measured on them means nothing.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from recipes.evidence.ground import SPOKEN, Data
from recipes.synthetic_speech import ACCENTS, SAMPLE_RATE, PackWriter
from whisper_moe.audio import load_audio

EXAMPLES = Path(__file__).parents[2] / "demo" / "examples"
NUM_CLIPS = {"train": 10, "dev": 3, "test": 4}
RECORDINGS = {
    "en_speechocean_child": ("child.ogg",),
    "en_speechocean_adult": ("english.wav",),
    "en_kathleen": ("english.wav",),
    "de_kerstin": ("german.ogg", "german_long.ogg"),
    "qug_killkan": ("spanish.flac", "finnish.ogg"),
}
"""Set -> recordings its clips are cut from."""
LANGUAGES = {"en_speechocean_child": "en", "en_speechocean_adult": "en", "en_kathleen": "en", "de_kerstin": "de", "qug_killkan": "qug"}
GROWTH: tuple[str, ...] = (
    *("ar", "br", "cs", "da", "el", "eo", "et", "eu", "fa", "ga-IE", "hi", "hu", "id", "is", "ja", "ka", "ko", "lt", "lv", "mt"),
    *("ro", "ru", "sw", "ta", "th", "uk", "vi", "zh-CN", "zh-HK", "zh-TW"),
)
"""Names of sentence lists beside those of `ACCENTS`."""
_SPEEDS = (1.0, 1.1, 0.92, 1.2, 0.85)
_SHORTEST_S = 0.6


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording, and its share of the words."""

    samples: np.ndarray
    """(samples,) float32, 16 kHz."""
    text: str


def examples() -> dict[str, dict[str, Any]]:
    """File -> what the demo's list says of it."""
    rows: list[dict[str, Any]] = json.loads((EXAMPLES / "examples.json").read_text("utf-8"))
    return {row["file"]: row for row in rows}


def pieces(files: Sequence[str], count: int) -> list[Piece]:
    """So many different pieces: halves of the sentences first, then the same at other speeds."""
    found = list(_pieces(files, count))
    assert len(found) == count
    return found


def _pieces(files: Sequence[str], count: int) -> Iterator[Piece]:
    known, made = examples(), 0
    for speed in _SPEEDS:
        for num_parts in (2, 1, 3):
            for file in files:
                samples = load_audio(EXAMPLES / file)
                words = known[file]["text"].split()
                for part in range(num_parts):
                    cut = samples[len(samples) * part // num_parts : len(samples) * (part + 1) // num_parts]
                    said = words[len(words) * part // num_parts : len(words) * (part + 1) // num_parts]
                    if len(cut) < _SHORTEST_S * SAMPLE_RATE or len(cut) > 5 * SAMPLE_RATE or not said:
                        continue
                    if made == count:
                        return
                    made += 1
                    yield Piece(soxr.resample(cut, SAMPLE_RATE * speed, SAMPLE_RATE), " ".join(said))


def split_pieces(files: Sequence[str]) -> dict[str, list[Piece]]:
    """Split -> pieces, none of them in two splits."""
    made = pieces(files, sum(NUM_CLIPS.values()))
    starts = np.cumsum([0, *NUM_CLIPS.values()])
    return {split: made[start : start + count] for (split, count), start in zip(NUM_CLIPS.items(), starts, strict=False)}


def make_smoke_data(folder: Path) -> Data:
    """Write every set into `folder` and say where it is; what is there is kept.

    Returns:
        `Data` with the folders speech, text and work (its packs are the "espeak" sets) under `folder`.
    """
    data = Data(folder / "speech", folder / "text", folder / "work", NUM_CLIPS["train"], NUM_CLIPS["test"])
    for name, files in RECORDINGS.items():
        if not (data.speech / name).exists():
            _write_recorded(data.speech / name, LANGUAGES[name], files)
    _write_spoken(data.work / "packs", data.text)
    return data


def _write_recorded(folder: Path, language: str, files: Sequence[str]) -> None:
    """`<split>.parquet`, laid out as the recorded sets are."""
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    for split, made in split_pieces(files).items():
        rows = []
        for number, piece in enumerate(made):
            audio = io.BytesIO()
            soundfile.write(audio, piece.samples, SAMPLE_RATE, format="FLAC")
            rows.append(
                {
                    "audio": {"bytes": audio.getvalue(), "path": f"Chapter0_{split}_{number}.flac"},
                    "text": piece.text,
                    "language": language,
                    "speaker": None if language == "qug" else f"{folder.name}-{split}-{number % 2}",
                    "age": 8 if folder.name.endswith("child") else None,
                    "duration_s": round(len(piece.samples) / SAMPLE_RATE, 3),
                    "code_switch": language == "qug" and number % 2 == 0,
                    "licence": "Apache-2.0",
                    "source": "demo/examples",
                }
            )
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")


def _write_spoken(packs: Path, text: Path) -> None:
    """A pack for every language with a sentence list; those without a recording of their own share one file of samples."""
    text.mkdir(parents=True, exist_ok=True)
    by_language: dict[str, list[str]] = {}
    for file, row in examples().items():
        by_language.setdefault(row["language"], []).append(file)
    lists = {language: name for language, (name, _) in ACCENTS.items()} | {name: name for name in GROWTH}
    borrowed: Path | None = None
    for language, name in lists.items():
        files = by_language.get(language)
        if not (packs / f"{language}.jsonl").exists():
            if files is None and borrowed is not None:
                (packs / f"{language}.i16").symlink_to(borrowed.with_suffix(".i16").name)
                rows = [json.loads(line) | {"language": language} for line in borrowed.read_text("utf-8").splitlines()]
                (packs / f"{language}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            else:
                _write_pack(packs, language, files or ["italian.ogg", "polish.ogg"])
        if files is None and borrowed is None:
            borrowed = packs / f"{language}.jsonl"
        if not (text / f"{name}.txt").exists():
            said = [json.loads(line)["text"] for line in (packs / f"{language}.jsonl").read_text("utf-8").splitlines()]
            (text / f"{name}.txt").write_text("\n".join(said) + "\n", "utf-8")


def _write_pack(packs: Path, language: str, files: Sequence[str]) -> None:
    writer = PackWriter(packs, language)
    for split, made in split_pieces(files).items():
        for number, piece in enumerate(made):
            samples = np.clip(piece.samples * 32767, -32768, 32767).astype(np.int16)
            writer.add(samples, text=piece.text, language=language, speaker=f"{SPOKEN}-{split}-{number % 2}", split=split)
    writer.close()


if __name__ == "__main__":
    print(make_smoke_data(Path(sys.argv[1])))
