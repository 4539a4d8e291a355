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
    Example("english.wav", "English", "en", "en-gb+adam", 145, 50, ("His mother put it before him.",)),
    Example("german.ogg", "German", "de", "de+adam", 145, 50, ("Du kannst es wohl gar nicht mehr erwarten.",)),
    Example("spanish.flac", "Spanish", "es", "es+belinda", 145, 50, ("Debe haber otra forma de salir de aquí.",)),
    Example("welsh.ogg", "Welsh", "cy", "cy+f4", 145, 50, ("Mae'r capel ar agor o hyd.",)),
    Example("french.ogg", "French", "fr", "fr-be+linda", 130, 50, ("Ils vident la maison le mois prochain.",)),
    Example("italian.ogg", "Italian", "it", "it+adam", 145, 50, ("I panni sporchi si lavano in famiglia.",)),
    Example("polish.ogg", "Polish", "pl", "pl+adam", 145, 50, ("Ale teraz do naszej sprawy.",)),
    Example("child.ogg", "English, a high voice, adapter en-child", "en", "en-us+f4", 135, 85,
            ("He made all the cropped jumpers himself.",), "en-child"),
    Example("german_long.ogg", "German, four sentences", "de", "de+adam", 145, 50,
            ("Ich bin schon am alten Markt.", "Jetzt hat sie sich ganz dreckig gemacht.",
             "Was ist so schlimm daran?", "Du kannst es wohl gar nicht mehr erwarten.")),
    Example("finnish.ogg", "Finnish, no adapter", "fi", "fi+adam", 145, 50, ("Kokouksessa oli tarjolla kahvia ja keksejä.",)),
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
