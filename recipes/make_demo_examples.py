"""Make the recordings behind the page's example buttons: espeak-ng says sentences that the pocket was not trained on.

    python -m recipes.make_demo_examples --text ../shared/text --out demo/examples

Writes one small file per example, in several formats, and `examples.json`, which the page and its tests read: label,
language, what is said, and the adapter to force where the example is about one. Sentences and voices are those of the test
split (`recipes.synthetic_speech`); of these we took short ones that the pocket reads well, so they show how the page works,
not how good the model is: for that see the model card. Needs the `espeak-ng` program; uses no network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from recipes.synthetic_speech import ACCENTS, SAMPLE_RATE, TEST_VOICES, Utterance, clean_sentence, speak, split_sentences

PAUSE_S = 0.7  # between the sentences of one example


@dataclass(frozen=True)
class Example:
    """One button: what is said, by whom, and the adapter it asks for ("auto": the detected language decides)."""

    file: str
    label: str
    language: str
    voice: str
    words_per_minute: int
    pitch: int
    sentences: tuple[str, ...]
    adapter: str = "auto"


# fmt: off
EXAMPLES = (
    Example("english.wav", "English", "en", "en-gb+f4", 150, 50, ("The wide road shimmered in the hot sun.",)),
    Example("german.ogg", "German", "de", "de+m7", 150, 45, ("Kinder legen eben andere Kriterien an als Erwachsene.",)),
    Example("spanish.flac", "Spanish", "es", "es+steph", 150, 50, ("Los días de verano son aburridos.",)),
    Example("welsh.ogg", "Welsh", "cy", "cy+f4", 140, 50, ("Mae hi'n wyth o'r gloch y bore.",)),
    Example("french.ogg", "French", "fr", "fr-fr+m7", 150, 50, ("Mes chaussettes sont sous le lit.",)),
    Example("italian.ogg", "Italian", "it", "it+linda", 150, 50, ("Il vino buono si vende senza frasca.",)),
    Example("polish.ogg", "Polish", "pl", "pl+adam", 145, 50, ("W przedpokoju zauważył, że pada deszcz.",)),
    Example("child.ogg", "English, a high voice, adapter en-child", "en", "en-us+f4", 140, 80,
            ("Do we have robust disaster planning for that scenario?",), "en-child"),
    Example("german_long.ogg", "German, four sentences", "de", "de+steph", 150, 50,
            ("Ich bin schon am alten Markt.", "Dieses Gefühl schnürte ihm die Kehle zu.",
             "Hoffentlich stellt hinterher keiner komische Fragen.", "Noch eine Runde Doppelkopf?")),
)
# fmt: on


def check_held_out(example: Example, text: Path) -> None:
    """Raise `ValueError` if a sentence or the voice of the example occurs in training."""
    lines = (text / f"{ACCENTS[example.language][0]}.txt").read_text("utf-8").splitlines()
    held_out = split_sentences(lines, seed=0, num_dev=40, num_test=100)["test"]
    for sentence in example.sentences:
        if clean_sentence(sentence) not in held_out:
            raise ValueError(f"{example.file}: {sentence!r} is not a sentence of the test split; take one from there")
    variant = example.voice.partition("+")[2]
    if variant not in TEST_VOICES:
        raise ValueError(f"{example.file}: voice variant {variant!r} is used in training; take one of {', '.join(TEST_VOICES)}")


def samples_of(example: Example) -> np.ndarray:
    """The example's sentences with pauses between them, at a comfortable level. (samples,)"""
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    parts = []
    for sentence in example.sentences:
        utterance = Utterance(sentence, example.language, example.voice, example.words_per_minute, example.pitch, "test")
        parts += [speak(utterance), pause]
    samples = np.concatenate(parts[:-1])
    return samples * np.float32(0.7 / np.abs(samples).max())


def main(text: Path, out: Path) -> None:
    """Make every example.

    Args:
        text: folder of sentence lists, `<code>.txt`, against which the sentences are checked.
        out: folder for the recordings and `examples.json`.
    """
    rows = []
    for example in EXAMPLES:
        check_held_out(example, text)
        soundfile.write(out / example.file, samples_of(example), SAMPLE_RATE)
        row = asdict(example)
        rows.append(row | {"text": " ".join(row.pop("sentences"))})
    (out / "examples.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
