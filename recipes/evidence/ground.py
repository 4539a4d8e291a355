"""What the experiments stand on: a base, sets of clips, and what the encoder says to them.

A *ground* is a Whisper with a name. On the own decoder (docs/evidence.md) and wherever else a run asks for it, the encoder stays frozen
and has spoken once: its states are computed when a set is first used and kept on disk. On the others an item holds log-mel features and the
encoder runs in every step. Knows no methods and no experiments.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from recipes.synthetic_speech import ACCENTS, pack_flite, pack_synthetic, read_pack
from whisper_moe.audio import SAMPLE_RATE
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import Clip, Clips, clips_from_rows, extract_features, label_ids, load_clips
from whisper_moe.evaluate import autocast
from whisper_moe.sources import HubRows, Loader

SPOKEN = "espeak"
"""Source of a set that espeak-ng speaks."""
FLITE = "flite-en"
"""Source and name of a test set that flite speaks: its voices and sentences are in no base's training, though the list that the sentences
are from is."""
_SILENCE_S = 0.4
"""Kept behind a clip: it is how a decoder hears that the speech is over."""
_ENCODE_BATCH = 16


# ---- sets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetSource:
    """Where the clips of a set are."""

    source: str
    """A folder of the recordings' folder, a data set of the Hub, "espeak" or "flite-en"."""
    language: str
    """Whisper's code, or ISO 639-3."""
    prompt: str | None = None
    """The language token to prompt with, for a language that has none."""
    config: str | None = None
    """Of a data set of the Hub."""
    exclude_text: str | None = None
    """Clips whose transcript this regular expression matches are left out."""
    text_column: str | None = None
    """Where guessing finds another than the wanted one."""
    lowercase: bool = False
    """For transcripts in capitals."""
    train: str = "train"
    dev: str = "dev"
    test: str = "test"
    """What the splits are called there."""
    ages: tuple[int, ...] = ()
    """Speakers from the first age to the second only; needs a column `age`."""
    dev_speakers: int = 0
    """So many speakers of the train split are the dev set, where there is none. Which ones follows from their names."""
    about: str = ""
    """What it is, for the page."""


RECORDED = {
    "child": SetSource("en_speechocean_child", "en", about="English read by children whose first language is Mandarin"),
    "adult": SetSource("en_speechocean_adult", "en", about="the same task and accent, read by adults"),
    "kathleen": SetSource("en_kathleen", "en", about="English, one speaker in a studio"),
    "kerstin": SetSource("de_kerstin", "de", about="German, one speaker in a studio"),
    "kichwa": SetSource("qug_killkan", "qug", "es", exclude_text=r"\[UNK\]", about="Kichwa, a radio drama"),
}
"""Recorded sets by name. Those of espeak-ng are called "espeak-<language>"."""


@dataclass(frozen=True)
class Item:
    """A clip as a model hears it, and what is said in it."""

    heard: torch.Tensor
    """(positions, d_model) states, or (frames, n_mels) features; fp16."""
    seconds: float
    text: str
    language: str
    prompt: str
    """The language token that is put before the text."""
    speaker: str | None
    labels: tuple[int, ...]
    """Of the whole target, with the prompt."""


@dataclass(frozen=True)
class Data:
    """Where clips come from."""

    speech: Path = Path("../shared/speech")
    """Recorded speech, a folder per set."""
    text: Path = Path("../shared/text")
    """Sentences for espeak-ng, a file per language."""
    work: Path = Path("runs/evidence")
    """Packs that espeak-ng has spoken, and states."""
    num_spoken: int = 600
    """Training clips of a language that espeak-ng speaks."""
    num_spoken_test: int = 60
    """Its test clips: sentences and voices that are in no training set, the base's included."""
    max_duration_s: float = 9.8
    """Longer clips are left out: the small grounds hear ten seconds at a time."""
    sets: tuple[tuple[str, SetSource], ...] = tuple(RECORDED.items())

    def source(self, name: str) -> SetSource:
        """Raises `ValueError` for a set that is not known."""
        known = dict(self.sets)
        if name in known:
            return known[name]
        if name == FLITE:
            return SetSource(FLITE, "en", about="English sentences by flite's models of three people's voices, in no training here")
        speaker, _, language = name.partition("-")
        if speaker == SPOKEN and language:
            return SetSource(SPOKEN, language, about=f"{language}, spoken by espeak-ng")
        raise ValueError(f"No set is called {name!r}. Known: {', '.join(known)}, {FLITE} and {SPOKEN}-<language>.")

    def clips(self, name: str, split: str, limit: int | None = None, seed: int = 0) -> Clips:
        """The clips of a set, all or `limit` of them drawn by `seed`."""
        source = self.source(name)
        if source.source == SPOKEN:
            # The same split of the sentences as that of the pocket's packs: no test sentence has been in any base's training.
            clips = self._spoken(source.language, name, split, partial(pack_synthetic, num_train=self.num_spoken, workers=1))
            clips = Clips(clips.clips[: self.num_spoken_test], clips.name) if split == "test" else clips
        elif source.source == FLITE:
            clips = self._spoken(FLITE, name, split, pack_flite)
        else:
            folder = self.speech / source.source
            clips = read_set(source, split, folder if folder.is_dir() else source.source, self.max_duration_s)
        if limit is not None and limit < len(clips):
            chosen = np.random.default_rng(seed).permutation(len(clips))[:limit]
            clips = Clips([clips.clips[index] for index in sorted(chosen)], clips.name)
        return clips

    @contextmanager
    def speaking(self, name: str) -> Iterator[None]:
        """Two processes may come to a pack at once, and one of them speaks it."""
        path = self.work / "packs" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _spoken(self, pack: str, name: str, split: str, speak: Callable[[Path, Path, str], None]) -> Clips:
        """A split of a pack, which is spoken by `speak(text, packs, pack)` when it is first asked for."""
        packs = self.work / "packs"
        with self.speaking(pack):
            if not (packs / f"{pack}.jsonl").exists():
                speak(self.text, packs, pack)
        samples, rows = read_pack(packs, pack)
        chosen = [row for row in rows if row["split"] == split]
        return Clips(
            [Clip(samples[row["offset"] : row["offset"] + row["samples"]], row["text"], row["language"], row["speaker"]) for row in chosen],
            f"{name}/{split}",
        )


def read_set(source: SetSource, split: str, where: str | Path, max_duration_s: float, load_dataset: Loader | None = None) -> Clips:
    """The clips of a recorded set.

    Args:
        source: what is wanted.
        split: "train", "dev" or "test".
        where: a folder, or a data set of the Hub.
        max_duration_s: longer clips are left out.
        load_dataset: for tests; by default that of the `datasets` package.

    Raises:
        ValueError: Nothing usable is there, or no column `age` or no speakers where they are asked for.
    """
    from_train = split == "dev" and source.dev_speakers > 0
    there = source.train if from_train else {"train": source.train, "dev": source.dev, "test": source.test}[split]
    options = {"language": source.language, "exclude_text": source.exclude_text, "max_duration_s": max_duration_s}
    if source.ages:
        rows = HubRows(str(where), source.config, there, source.text_column, load_dataset=_aged(source.ages, load_dataset))
        clips = clips_from_rows(rows.read(), name=rows.name, **options)  # type: ignore[arg-type]
    else:
        clips = load_clips(
            where,
            split=there,
            config=source.config,
            text_column=source.text_column,
            load_dataset=load_dataset,
            **options,  # type: ignore[arg-type]
        )
    if source.dev_speakers and split != "test":
        clips = _of_speakers(clips, source.dev_speakers, from_train)
    if source.lowercase:
        clips = Clips([replace(clip, text=clip.text.lower()) for clip in clips.clips], clips.name, clips.report)
    return clips


def _aged(ages: Sequence[int], load_dataset: Loader | None) -> Loader:
    """A loader of data sets that keeps the rows of speakers of these ages. Ages may be text there."""

    def load(*arguments: Any, **options: Any) -> Any:
        if load_dataset is None:
            from datasets import load_dataset as loader
        else:
            loader = load_dataset
        loaded = loader(*arguments, **options)
        if "age" not in loaded.column_names:
            columns = ", ".join(loaded.column_names)
            raise ValueError(f"{arguments[0]} has no column 'age', so ages={list(ages)} cannot be chosen. Its columns: {columns}.")
        # Only this column is read: the recordings stay encoded.
        return loaded.filter(lambda age: str(age or "").strip() != "" and ages[0] <= float(age) <= ages[1], input_columns=["age"])

    return load


def _of_speakers(clips: Clips, num_dev: int, dev: bool) -> Clips:
    """The clips of the dev speakers, or of all others."""
    speakers = {clip.speaker for clip in clips.clips if clip.speaker is not None}
    if len(speakers) <= num_dev:
        raise ValueError(f"{clips.name} has {len(speakers)} named speakers; {num_dev} of them cannot be the dev set. Lower dev_speakers.")
    chosen = set(sorted(speakers, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:num_dev])
    return clips.select(lambda clip: (clip.speaker in chosen) == dev, "of speakers of the other set")


def speaks(language: str) -> bool:
    """Whether espeak-ng is known to speak a language here."""
    return language in ACCENTS


# ---- the base ----------------------------------------------------------------------------------------------------------


GROUNDS = {
    "own-decoder": ("runs/own_decoder/model", True),
    "pocket": ("whisper_moe/pocket/model", False),
}
"""Name -> (folder of the model, whether its encoder stays frozen in all runs)."""


class Ground:
    """A base and what it hears.

    Args:
        name: one of `GROUNDS`, or what results shall call it.
        folder: the model: a folder, or an id of the Hub.
        frozen_encoder: adapters and fine-tuning leave the encoder alone, and its states are kept on disk.
        data: where clips come from.
        device: where models are and the encoder works: "cpu", "cuda", "cuda:1". Weights are fp32; products are bf16 where it has them.
        whole_window: the encoder hears the whole window, silence behind the clip included, as OpenAI's Whisper was trained. Otherwise
            the window ends behind the longest clip of a batch, as the small grounds were trained.
    """

    rehearsal: Any = None
    """Of a dry run (`full_size.Rehearsal`): it is told what would be trained and transcribed, and nothing is."""

    def __init__(
        self, name: str, folder: str | Path, frozen_encoder: bool, data: Data, device: str = "cpu", whole_window: bool = False
    ) -> None:
        self.name, self.folder, self.frozen_encoder, self.data = name, str(folder), frozen_encoder, data
        self.whole_window = whole_window
        self.base = WhisperForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32).eval().to(device)
        self.processor = WhisperProcessor.from_pretrained(self.folder)
        self._sets: dict[tuple[str, str, int | None, int], list[Item]] = {}

    @classmethod
    def open(cls, name: str, data: Data) -> Ground:
        """One of `GROUNDS`. Raises `ValueError` for another name, or where its model has not been made."""
        if name not in GROUNDS:
            raise ValueError(f"No ground is called {name!r}. Known: {', '.join(GROUNDS)}.")
        folder, frozen = GROUNDS[name]
        if not (Path(folder) / "config.json").exists():
            raise ValueError(f"{folder} holds no model. Make it first: python -m recipes.own_decoder (docs/evidence.md).")
        return cls(name, folder, frozen, data)

    def with_frozen_encoder(self, frozen: bool) -> Ground:
        """The same base, its encoder frozen or not."""
        other = copy.copy(self)
        other.frozen_encoder, other._sets = frozen, {}
        return other

    def fresh(self) -> WhisperForConditionalGeneration:
        """A copy of the base to put an adapter on."""
        model = copy.deepcopy(self.base)
        model.requires_grad_(False)
        return model

    @cached_property
    def digest(self) -> str:
        """Of the base's weights, short: states and results name what they belong to."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.base.state_dict().items()):
            digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def _encoder_digest(self) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(self.base.get_encoder().state_dict().items()):
            digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    # -- items

    def items(self, name: str, split: str, limit: int | None = None, seed: int = 0) -> list[Item]:
        """A set as this base hears it; kept in memory."""
        key = (name, split, limit, seed)
        if key not in self._sets:
            source = self.data.source(name)
            clips = self.data.clips(name, split, limit, seed)
            prompt = source.prompt or source.language
            self._sets[key] = self.hear(clips, source.language, prompt)
        return self._sets[key]

    def hear(self, clips: Clips, language: str, prompt: str) -> list[Item]:
        """Clips as items, in their order."""
        heard = self._states(clips) if self.frozen_encoder else self._features(clips)
        return [
            Item(each, clip.duration_s, clip.text, language, prompt, clip.speaker, tuple(label_ids(self.processor, clip.text, prompt)))
            for each, clip in zip(heard, clips.clips, strict=True)
        ]

    def encoder_states(self, model: Any, items: Sequence[Item]) -> torch.Tensor:
        """(batch, positions, d_model) for a batch of items; through the model's encoder, adapters included, unless it is frozen.

        Shorter items repeat their last position or frame, which is silence.
        """
        longest = max(len(item.heard) for item in items)
        if self.whole_window and not self.frozen_encoder:
            longest = self.processor.feature_extractor.nb_max_frames
        batch = items[0].heard.new_empty(len(items), longest, items[0].heard.shape[1])
        for row, item in zip(batch, items, strict=True):
            row[: len(item.heard)] = item.heard
            row[len(item.heard) :] = item.heard[-1]
        batch = batch.to(model.device, torch.float32)
        return batch if self.frozen_encoder else encode_cropped(model, batch.transpose(1, 2))

    @property
    def _window(self) -> str:
        """What the states of a clip depend on besides the clip."""
        return "whole" if self.whole_window else str(_SILENCE_S)

    def _num_samples(self, clip: Clip) -> int:
        """Of a clip with the silence behind it: whole positions of the encoder, at most a window."""
        features = self.processor.feature_extractor
        if self.whole_window and self.frozen_encoder:  # its states are kept, so they are those of the whole window
            return int(features.n_samples)
        position = 2 * features.hop_length
        return int(min(features.n_samples, -(-(len(clip.samples) + int(_SILENCE_S * SAMPLE_RATE)) // position) * position))

    def _features(self, clips: Clips) -> list[torch.Tensor]:
        found = []
        for index, clip in enumerate(clips.clips):
            mel = extract_features(self.processor, [clips[index]["audio"]], self._num_samples(clip))[0]  # (n_mels, frames)
            found.append(mel.T.half().contiguous())
        return found

    def _states(self, clips: Clips) -> list[torch.Tensor]:
        from safetensors import safe_open
        from safetensors.torch import save_file

        folder = self.data.work / "states" / self._encoder_digest
        path = folder / f"{hashlib.sha256((clips.digest() + self._window).encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            states = self._encoded(clips)
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            save_file({"states": torch.cat(states)}, part, {"lengths": json.dumps([len(each) for each in states])})
            part.replace(path)
        with safe_open(path, framework="pt") as opened:
            lengths = json.loads(opened.metadata()["lengths"])
            return list(opened.get_tensor("states").split(lengths))

    def _encoded(self, clips: Clips) -> list[torch.Tensor]:
        """fp16 states of every clip, (positions, d_model)."""
        found: dict[int, torch.Tensor] = {}
        order = sorted(range(len(clips)), key=lambda index: len(clips.clips[index].samples))
        for start in range(0, len(order), _ENCODE_BATCH):
            rows = order[start : start + _ENCODE_BATCH]
            num_samples = self._num_samples(clips.clips[rows[-1]])
            features = extract_features(self.processor, [clips[row]["audio"] for row in rows], num_samples)
            with torch.no_grad(), autocast(self.base.device.type):
                encoded = encode_cropped(self.base, features.to(self.base.device))
            stored = encoded.to("cpu", torch.float16)
            if not torch.isfinite(stored).all():
                raise ValueError(f"An encoder state of {float(encoded.abs().max()):g} does not fit in half precision.")
            found.update(zip(rows, stored, strict=True))
        return [found[index] for index in range(len(clips))]
