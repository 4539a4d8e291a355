"""Speech from sentence lists by espeak-ng: many voices, speeds and pitches, packed for training.

    python -m recipes.synthetic_speech

A *pack* is two files: `<name>.i16` (16 kHz mono samples, one clip after the other) and `<name>.jsonl` (a row per clip:
offset, samples, text, language, speaker, split). Packs are memory-mapped, so training starts at once and shuffles freely.
Sentences and voices of the test split never occur in training. Needs the `espeak-ng` program; uses no network. A pack of English test
sentences can be spoken by `flite` instead, whose voices are statistical models of three people: speech of another kind.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz
MAX_DURATION_S = 9.8  # one window of the pocket, less a margin

# language -> (sentence list, espeak-ng accents)
ACCENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "en": ("en", ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")),
    "de": ("de", ("de",)),
    "es": ("es", ("es", "es-419")),
    "fr": ("fr", ("fr-fr", "fr-be", "fr-ch")),
    "it": ("it", ("it",)),
    "nl": ("nl", ("nl",)),
    "pl": ("pl", ("pl",)),
    "pt": ("pt", ("pt", "pt-br")),
    "ca": ("ca", ("ca",)),
    "cy": ("cy", ("cy",)),
    "fi": ("fi", ("fi",)),
    "sv": ("sv-SE", ("sv",)),
    "tr": ("tr", ("tr",)),
}

# Voice variants by split; families (steph, steph2, ...) stay together. Left out: robots, whispers and croaks.
TEST_VOICES = ("f4", "m7", "steph", "steph2", "Gene", "Gene2", "belinda", "adam", "linda")
DEV_VOICES = ("f5", "m5", "Alex", "quincy")
TRAIN_VOICES = (
    *("f1", "f2", "f3", "m1", "m2", "m3", "m4", "m6", "m8", "klatt", "klatt2", "klatt4", "klatt6"),
    *("Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario"),
    *("Michael", "Mike", "Nguyen", "RicishayMax", "anika", "announcer", "antonio", "aunty", "benjamin", "boris"),
    *("caleb", "david", "ed", "edward", "grandma", "grandpa", "gustave", "iven", "iven3", "john", "kaukovalta"),
    *("marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro", "rob", "robert", "sandro"),
    *("shelby", "travis", "victor", "zac"),
)
VOICES = {"train": TRAIN_VOICES, "dev": DEV_VOICES, "test": TEST_VOICES}


FLITE_VOICES = ("awb", "rms", "slt")
"""Those that were trained on recordings: a Scot, an American man and an American woman of CMU ARCTIC."""


@dataclass(frozen=True)
class Utterance:
    """What espeak-ng is asked to say: text, voice (`accent+variant`), words per minute, pitch (0 to 99)."""

    text: str
    language: str
    voice: str
    words_per_minute: int
    pitch: int
    split: str


def clean_sentence(line: str) -> str:
    """One line of a sentence list as the model shall write it: NFC, plain apostrophes, no quotation marks or dashes."""
    line = unicodedata.normalize("NFC", line).replace("\u2019", "'").replace("\u2026", ".")
    line = re.sub(r"[\"\u201c\u201d\u201e\u201a\u2018\u00ab\u00bb\u2039\u203a()\[\]*_]", "", line)
    line = re.sub(r"\s*[\u2013\u2014]\s*|\s-\s|^-", " ", line)
    return re.sub(r"\s+", " ", line).strip(" -;:,")


def split_sentences(lines: Iterable[str], seed: int, num_dev: int, num_test: int) -> dict[str, list[str]]:
    """Distinct cleaned sentences, shuffled by `seed`, as train, dev and test; the three share no sentence."""
    sentences = sorted({clean_sentence(line) for line in lines if line.strip()} - {""})
    random.Random(seed).shuffle(sentences)
    held_out = num_dev + num_test
    return {"test": sentences[:num_test], "dev": sentences[num_test:held_out], "train": sentences[held_out:]}


def spoken_texts(sentences: list[str], count: int, rng: random.Random) -> Iterator[str]:
    """`count` training texts: half are sentences; the rest are splices of two sentences and rows of random words,
    so that a small decoder learns to spell what it hears and cannot know the sentences by heart."""
    words = sorted({word for sentence in sentences for word in re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", sentence)})
    for index in range(count):
        kind = rng.random()
        if kind < 0.5:
            yield sentences[index % len(sentences)]
        elif kind < 0.75:
            first, second = rng.choice(sentences).split(), rng.choice(sentences).split()
            yield " ".join(first[: rng.randint(1, max(1, len(first) - 1))] + second[rng.randint(0, len(second) - 1) :])
        else:
            yield " ".join(rng.choice(words) for _ in range(rng.randint(2, 9)))


def speak(utterance: Utterance) -> np.ndarray:
    """The utterance as float32 samples at 16 kHz, (samples,). Raises `RuntimeError` with espeak-ng's own words."""
    # fmt: off
    command = ["espeak-ng", "-v", utterance.voice, "-s", str(utterance.words_per_minute), "-p", str(utterance.pitch),
               "--stdin", "--stdout"]
    # fmt: on
    done = subprocess.run(command, input=utterance.text.encode(), capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"espeak-ng could not say {utterance}: {done.stderr.decode(errors='replace').strip()}")
    # Streamed WAV: the header's length field is not filled in, so the samples are taken from behind the 44-byte header.
    rate = int.from_bytes(done.stdout[24:28], "little")
    samples = np.frombuffer(done.stdout[44 : 44 + (len(done.stdout) - 44) // 2 * 2], "<i2").astype(np.float32) / 32768
    return soxr.resample(samples, rate, SAMPLE_RATE)


def plan(texts: Iterable[str], language: str, split: str, seed: int) -> list[Utterance]:
    """An utterance for each text, with voice, speed and pitch drawn by `seed`."""
    rng = random.Random(f"{seed}-{language}-{split}")
    _, accents = ACCENTS[language]
    return [
        Utterance(text, language, f"{rng.choice(accents)}+{rng.choice(VOICES[split])}", rng.randint(125, 215), rng.randint(20, 80), split)
        for text in texts
    ]


def _speak_many(utterances: list[Utterance]) -> list[np.ndarray]:
    return [np.clip(speak(utterance) * 32767, -32768, 32767).astype(np.int16) for utterance in utterances]


def speak_all(utterances: list[Utterance], workers: int) -> Iterator[tuple[Utterance, np.ndarray]]:
    """Each utterance with its int16 samples, in order, those longer than the window left out. One worker is this process itself."""
    parts = [utterances[start : start + 64] for start in range(0, len(utterances), 64)]
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        spoken = map(_speak_many, parts) if pool is None else pool.map(_speak_many, parts)
        for part, clips in zip(parts, spoken, strict=True):
            for utterance, samples in zip(part, clips, strict=True):
                if len(samples) <= MAX_DURATION_S * SAMPLE_RATE:
                    yield utterance, samples


class PackWriter:
    """Appends clips to a pack. Both files get their names at the end, the index last: an interrupted pack is not taken for a whole one, and
    one that is there stays as it is until then."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._index_path, self._samples_path, self._offset = folder / f"{name}.jsonl", folder / f"{name}.i16", 0
        self._rows: list[dict[str, object]] = []
        self._file = self._part(self._samples_path).open("wb")

    @staticmethod
    def _part(path: Path) -> Path:
        return path.with_name(f"{path.name}.{os.getpid()}.part")

    def add(self, samples: np.ndarray, **row: object) -> None:
        self._file.write(samples.tobytes())
        self._rows.append({"offset": self._offset, "samples": len(samples), **row})
        self._offset += len(samples)

    def close(self) -> None:
        self._file.close()
        self._part(self._index_path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows), "utf-8")
        for path in (self._samples_path, self._index_path):
            self._part(path).replace(path)


def read_pack(folder: Path, name: str) -> tuple[np.ndarray, list[dict]]:
    """The samples of a pack (memory-mapped int16) and its rows."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return np.memmap(folder / f"{name}.i16", np.int16, "r"), rows


def pack_synthetic(
    text: Path, out: Path, language: str, num_train: int, *, num_dev: int = 40, num_test: int = 100, seed: int = 0, workers: int = 2
) -> None:
    """Speak one language's three splits into the pack `<language>`."""
    lines = (text / f"{ACCENTS[language][0]}.txt").read_text("utf-8").splitlines()
    splits = split_sentences(lines, seed, num_dev, num_test)
    splits["train"] = list(spoken_texts(splits["train"], num_train, random.Random(f"{seed}-{language}")))
    writer = PackWriter(out, language)
    for split, texts in splits.items():
        for utterance, samples in speak_all(plan(texts, language, split, seed), workers):
            writer.add(samples, text=utterance.text, language=language, speaker=utterance.voice, split=split)
    writer.close()


def speak_flite(text: str, voice: str) -> np.ndarray:
    """English by flite, int16 samples at 16 kHz. Raises `RuntimeError` with flite's own words, or with the package to install."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        try:
            done = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], capture_output=True, check=False)
        except FileNotFoundError as error:
            raise RuntimeError("flite is not installed. On Debian: apt-get install flite") from error
        if done.returncode or not path.exists():
            raise RuntimeError(f"flite could not say {text!r} as {voice}: {done.stderr.decode(errors='replace').strip()}")
        samples, rate = soundfile.read(path, dtype="float32")
    return (soxr.resample(samples, rate, SAMPLE_RATE) * 32767).clip(-32768, 32767).astype(np.int16)


def pack_flite(text: Path, out: Path, name: str, *, num_test: int = 100, seed: int = 0) -> None:
    """Speak English test sentences, those of `pack_synthetic`, into a pack that has no other split; a voice after the other."""
    sentences = split_sentences((text / "en.txt").read_text("utf-8").splitlines(), seed, 0, num_test)["test"]
    writer = PackWriter(out, name)
    for at, sentence in enumerate(sentences):
        voice = FLITE_VOICES[at % len(FLITE_VOICES)]
        samples = speak_flite(sentence, voice)
        if len(samples) <= MAX_DURATION_S * SAMPLE_RATE:
            writer.add(samples, text=sentence, language="en", speaker=voice, split="test")
    writer.close()


def pack_recorded(folder: Path, out: Path, name: str) -> None:
    """Decode one folder of `<split>.parquet` files (columns audio, text, language, speaker) into the pack `name`.

    Raises:
        ValueError: There are no such files.
    """
    import pyarrow.parquet as parquet

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no parquet file. Put the recordings there (docs/evidence.md says which), or leave {name!r} out.")
    writer = PackWriter(out, name)
    for path in files:
        for row in parquet.read_table(path).to_pylist():
            samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            if rate != SAMPLE_RATE:
                samples = soxr.resample(samples, rate, SAMPLE_RATE)
            if len(samples) <= MAX_DURATION_S * SAMPLE_RATE:
                int16 = np.clip(samples * 32767, -32768, 32767).astype(np.int16)
                text = clean_sentence(row["text"])
                writer.add(int16, text=text, language=row["language"], speaker=row["speaker"], split=path.stem)
    writer.close()


@dataclass(frozen=True)
class Settings:
    """Which packs to make. The defaults are those of the shipped pocket."""

    text: Path = Path("../shared/text")
    """Folder of sentence lists, `<code>.txt`, a sentence per line."""
    speech: Path = Path("../shared/speech")
    """Folder of recorded sets, `<name>/<split>.parquet`."""
    out: Path = Path("runs/pocket/data")
    """Folder for the packs; one that is complete is kept."""
    written: tuple[str, ...] = ("en", "de", "es", "fr", "it", "nl", "pl", "pt")
    """Languages to speak at length."""
    num_train: int = 12_000
    """Training clips of each of them."""
    detected_only: tuple[str, ...] = ("cy", "fi", "tr", "sv", "ca")
    """Languages to speak less."""
    num_train_detected: int = 4_000
    """Training clips of each of those."""
    recorded: tuple[str, ...] = ("de_kerstin", "en_kathleen", "en_speechocean_adult")
    """Recorded sets to pack."""
    seed: int = 0
    """Fixes sentences, voices, speeds and pitches."""
    workers: int = 2
    """Processes."""


def make_packs(settings: Settings) -> None:
    """Make every pack that is not there yet.

    Raises:
        ValueError: Something that is needed is not there; nothing has been made.
    """
    wanted = [name for name in (*settings.written, *settings.detected_only) if not (settings.out / f"{name}.jsonl").exists()]
    needed = [settings.text / f"{ACCENTS[language][0]}.txt" for language in wanted]
    needed += [settings.speech / name for name in settings.recorded if not (settings.out / f"{name}.jsonl").exists()]
    missing = [str(path) for path in needed if not path.exists()]
    if wanted and shutil.which("espeak-ng") is None:
        missing.append("the program espeak-ng (Debian: espeak-ng)")
    if missing:
        told = ", ".join(missing)
        raise ValueError(f"Missing: {told}. docs/evidence.md says what has to be where; --text and --speech name other folders.")
    for name in settings.recorded:
        if not (settings.out / f"{name}.jsonl").exists():
            pack_recorded(settings.speech / name, settings.out, name)
            print(f"{name}: packed", flush=True)
    counts = dict.fromkeys(settings.written, settings.num_train) | dict.fromkeys(settings.detected_only, settings.num_train_detected)
    for language, count in counts.items():
        if not (settings.out / f"{language}.jsonl").exists():
            pack_synthetic(settings.text, settings.out, language, count, seed=settings.seed, workers=settings.workers)
            print(f"{language}: packed", flush=True)


def main() -> None:
    import tyro

    make_packs(tyro.cli(Settings))


if __name__ == "__main__":
    main()
