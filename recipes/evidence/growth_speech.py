"""Forty languages for the growth curve: who speaks each of them, under which token, and a hundred clips of it.

Thirteen are those of `recipes.synthetic_speech`, whose packs are used; Kichwa is recorded; twenty-six more are spoken here. Left out of the
forty-three sentence lists: Breton (espeak-ng has no voice), Thai (a poor one), Swahili (17 sentences) and Taiwan's (Mandarin again).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recipes.evidence.ground import SPOKEN, Data, Ground, Item
from recipes.synthetic_speech import VOICES, PackWriter, Utterance, speak_all, split_sentences, spoken_texts
from whisper_moe.data import Clips

NUM_TRAIN, NUM_DEV, NUM_TEST = 100, 10, 24


@dataclass(frozen=True)
class Spoken:
    """A language of the curve.

    Args:
        name: of its pack, which is that of its sentence list unless `recipes.synthetic_speech` speaks it.
        language: Whisper's code, or ISO 639-3.
        voice: of espeak-ng; None: not spoken here.
        prompt: the token it is written under, where Whisper has none for it.
        pattern: only sentences that it matches are read, where espeak-ng cannot read all.
        known: whether the own decoder was trained to write it.
        latin: whether it is written in Latin letters; the bases have hardly met others.
    """

    name: str
    language: str
    voice: str | None = None
    prompt: str | None = None
    pattern: str | None = None
    known: bool = False
    latin: bool = True


def _latin(*names: str) -> list[Spoken]:
    return [Spoken(name, name, name) for name in names]


def _other(*names: str) -> list[Spoken]:
    return [Spoken(name, name, name, latin=False) for name in names]


GROWTH: tuple[Spoken, ...] = (
    Spoken("kichwa", "qug", prompt="es"),
    *(Spoken(name, name) for name in ("ca", "fi", "sv", "cy", "tr")),
    *_latin("cs", "da"),
    Spoken("eo", "eo", "eo", prompt="es"),
    *_latin("et", "eu"),
    Spoken("ga-IE", "ga", "ga", prompt="cy"),
    *_latin("hu", "id", "is", "lt", "lv", "mt", "ro", "vi"),
    *(Spoken(name, name, known=True) for name in ("en", "de", "es", "fr", "it", "nl", "pl", "pt")),
    *_other("el", "ru", "uk", "ka", "ar", "fa", "hi", "ta", "ko"),
    Spoken("ja", "ja", "ja", pattern=r"[\u3041-\u30ff\u3001\u3002\uff01\uff1f!? ]+", latin=False),
    Spoken("zh-CN", "zh", "cmn-latn-pinyin", latin=False),
    Spoken("zh-HK", "yue", "yue", latin=False),
)
"""New languages in Latin letters, those that the bases know, and last, since a run may have to end early, other letters."""


def growth_items(ground: Ground, spoken: Spoken, split: str, limit: int) -> list[Item]:
    """At most so many clips of one of `GROWTH`, as the ground hears them."""
    if spoken.name == "kichwa":
        return ground.items("kichwa", split, limit)
    if spoken.voice is not None:
        make_pack(ground.data, spoken)
    clips = ground.data.clips(f"{SPOKEN}-{spoken.name}", split, limit)
    items = ground.hear(Clips(clips.clips, clips.name), spoken.language, spoken.prompt or spoken.language)
    # Letters that a tokenizer has only as bytes make long texts: what does not fit in the decoder cannot be learned from.
    fits = ground.base.config.max_target_positions
    return [item for item in items if len(item.labels) <= fits] if split == "train" else items


def make_pack(data: Data, spoken: Spoken) -> Path:
    """Speak a language's sentences, unless that has been done."""
    index = data.work / "packs" / f"{spoken.name}.jsonl"
    with data.speaking(spoken.name):
        if not index.exists():
            lines = (data.text / f"{spoken.name}.txt").read_text("utf-8").splitlines()
            writer = PackWriter(index.parent, spoken.name)
            for utterance, samples in speak_all(planned(lines, spoken), workers=1):
                writer.add(samples, text=utterance.text, language=spoken.language, speaker=utterance.voice, split=utterance.split)
            writer.close()
    return index


def planned(lines: Iterable[str], spoken: Spoken, seed: int = 0) -> list[Utterance]:
    """What espeak-ng is asked to say. No sentence and no voice is in two splits; where sentences are few, training splices them."""
    assert spoken.voice is not None
    readable = [line for line in lines if spoken.pattern is None or re.fullmatch(spoken.pattern, line.strip())]
    splits = split_sentences(readable, seed, NUM_DEV, NUM_TEST)
    rng = random.Random(f"{seed}-{spoken.name}")
    train = splits["train"]
    splits["train"] = train[:NUM_TRAIN] if len(train) >= NUM_TRAIN else list(spoken_texts(train, NUM_TRAIN, rng))
    return [
        Utterance(text, spoken.language, f"{spoken.voice}+{rng.choice(VOICES[split])}", rng.randint(125, 215), rng.randint(20, 80), split)
        for split, texts in splits.items()
        for text in texts
    ]
