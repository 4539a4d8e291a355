"""Speech -> what a frozen encoder says to it, on disk, in shards that a decoder is trained on.

A *shard* is one safetensors file: the states of a thousand clips, one clip behind the other, and a row per clip in its metadata. Which
clips shard 17 holds and how they are disturbed follows from the settings alone, so shards can be made in any order, by any
process, ahead of the training or when it first asks. Every pack is gone through in a new order again and again: a clip that comes back has
other noise, so a small pack of recorded speech is not the same states many times. Knows no decoder and no tokens.

`whisper_moe.encoder_states` keeps states of *given* clips, undisturbed, for adapters; here the corpus has no end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recipes.synthetic_speech import SAMPLE_RATE, read_pack
from recipes.train_pocket import Noise, augment
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import extract_features
from whisper_moe.evaluate import autocast

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


@dataclass(frozen=True, kw_only=True)
class StatesSettings:
    """What the shards hold."""

    base: Path = Path("../shared/whisper-base")
    """Folder with a Whisper's encoder (`encoder.safetensors` or `model.safetensors`), its config and its tokenizer."""
    data: Path = Path("runs/pocket/data")
    """Folder of packs (`recipes.synthetic_speech`)."""
    states: Path = Path("runs/own_decoder/states")
    """Folder for the shards: some 0.2 GB each."""
    written: tuple[str, ...] = ("en", "de", "es", "fr", "it", "nl", "pl", "pt")
    """Languages the base writes."""
    detected_only: tuple[str, ...] = ("cy", "fi", "tr", "sv", "ca")
    """Languages the base detects and does not write."""
    recorded: tuple[tuple[str, float], ...] = (("de_kerstin", 1.0), ("en_kathleen", 1.0), ("en_speechocean_adult", 1.5))
    """Packs of recorded speech and how often to draw them; a written synthetic language counts 1."""
    detected_weight: float = 0.12
    """How often to draw a language of `detected_only`."""
    nospeech_share: float = 0.02
    """Share of clips that are silence or noise."""
    augmented_share: float = 0.45
    """Share of clips that are disturbed: speed, echo, tilt, noise, gain."""
    window_s: int = 10
    """Of the base that is made. Whisper's own is 30 s; the positions of the encoder are cut, their values stay."""
    whole_windows: float = 0.15
    """Share of the clips that are encoded with silence up to the end of the window, as in use; the others end behind the speech."""
    shard_clips: int = 960
    encode_batch: int = 16
    dev_clips: int = 10
    """Of the dev split of every pack, to look at during training."""
    seed: int = 0
    min_free_gb: float = 15.0
    """No shard is written that would leave the disk less."""

    def weights(self) -> dict[str, float]:
        """How often each pack is drawn."""
        return dict.fromkeys(self.written, 1.0) | dict.fromkeys(self.detected_only, self.detected_weight) | dict(self.recorded)


# ---- which clips -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """A clip as a shard holds it."""

    pack: str
    turn: int
    """The how-manieth clip drawn from its pack: decides what disturbs it."""
    wave: np.ndarray
    """(samples,) int16, as recorded."""
    text: str
    language: str


@cache
def _read(data: Path, name: str, split: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    samples, rows = read_pack(data, name)
    return samples, [row for row in rows if row["split"] == split]


def _random(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key])


@cache
def _order(seed: int, name: str, cycle: int, count: int) -> np.ndarray:
    return _random(seed, name, cycle).permutation(count)


def draws(settings: StatesSettings, shard: int) -> list[Draw]:
    """The clips of one shard. Over all shards every pack is drawn by its weight, and no clip twice before all others of its pack."""
    weights = settings.weights()
    drawn = []
    for name, weight in weights.items():
        share = settings.shard_clips * weight / sum(weights.values())
        samples, rows = _read(settings.data, name, "train")
        for turn in range(int(shard * share), int((shard + 1) * share)):
            row = rows[_order(settings.seed, name, turn // len(rows), len(rows))[turn % len(rows)]]
            wave = samples[row["offset"] : row["offset"] + row["samples"]]
            drawn.append(Draw(name, turn, wave, row["text"], row["language"]))
    return drawn


def sound(draw: Draw, settings: StatesSettings, noise: Noise) -> tuple[np.ndarray, int, bool]:
    """The clip as the encoder hears it, (samples,) float32; the silence in front of it in samples; and whether there is speech in it."""
    rng = _random(settings.seed, "sound", draw.pack, draw.turn)
    wave = draw.wave.astype(np.float32) / 32768
    if rng.random() < settings.nospeech_share:
        loud = np.float32(10 ** rng.uniform(-6, -0.5) * (rng.random() < 0.8))
        return noise.draw(len(wave), rng) * loud, 0, False
    silence = int(rng.uniform(0, 0.4) * SAMPLE_RATE) if rng.random() < 0.5 else 0
    wave = np.concatenate([np.zeros(silence, np.float32), wave])
    return (augment(wave, noise, rng) if rng.random() < settings.augmented_share else wave).astype(np.float32), silence, True


# ---- shards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """States of clips, (positions of all, d_model) in fp16, and a row per clip: start, positions, first and last position of the speech,
    text, language, spoken, pack."""

    states: torch.Tensor
    rows: list[dict[str, Any]]

    def batch(self, indices: list[int]) -> torch.Tensor:
        """(clips, positions of the longest, d_model). Shorter ones repeat their last position, which is silence: what the encoder
        would say to more of it is nearly that, and a zero is nothing that it ever says."""
        longest = max(self.rows[index]["positions"] for index in indices)
        batch = self.states.new_empty(len(indices), longest, self.states.shape[1])
        for place, index in enumerate(indices):
            start, positions = self.rows[index]["start"], self.rows[index]["positions"]
            batch[place, :positions] = self.states[start : start + positions]
            batch[place, positions:] = self.states[start + positions - 1]
        return batch


class Shards:
    """The shards of one encoder and one set of settings; what is missing is made when it is asked for.

    Raises:
        ValueError: The folder holds shards made otherwise, a clip's states do not fit in half precision, or the disk is nearly full.
    """

    def __init__(self, settings: StatesSettings, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
        self.settings, self.model, self.processor = settings, model, processor
        settings.states.mkdir(parents=True, exist_ok=True)
        about = settings.states / "about.json"
        ours = self._about()
        if not about.exists():
            about.write_text(json.dumps(ours, indent=2) + "\n")
        there = json.loads(about.read_text())
        other = [name for name in ours if there.get(name) != ours[name]]
        if other:
            changes = ", ".join(f"{name} ({there.get(name)}, now {ours[name]})" for name in other)
            raise ValueError(f"The shards in {settings.states} were made with another {changes}. Name another folder, or delete that one.")

    @cached_property
    def _noise(self) -> Noise:
        return Noise(self.settings.seed)

    def _about(self) -> dict[str, Any]:
        """All that a shard depends on."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.get_encoder().state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().float().contiguous().numpy().tobytes())
        named = {"written", "detected_only", "recorded", "detected_weight", "nospeech_share", "augmented_share", "window_s"}
        named |= {"whole_windows", "shard_clips", "encode_batch", "dev_clips", "seed"}
        chosen = {name: value for name, value in asdict(self.settings).items() if name in named}
        about: dict[str, Any] = json.loads(json.dumps(chosen | {"encoder": digest.hexdigest()}))  # tuples become lists, as in the file
        return about

    def train(self, number: int) -> Shard:
        """Shard `number` of the endless corpus."""
        return self._get(f"train_{number:05d}", lambda: self._sounds(number), number)

    def dev(self) -> Shard:
        """Some clips of every pack's dev split, undisturbed, in whole windows."""
        return self._get("dev", self._dev_sounds, None)

    def has(self, number: int) -> bool:
        return self._file(f"train_{number:05d}").exists()

    def _file(self, name: str) -> Path:
        return self.settings.states / f"{name}.safetensors"

    def _get(self, name: str, sounds: Any, number: int | None) -> Shard:
        from safetensors import safe_open

        if not self._file(name).exists():
            with self._alone(name):
                if not self._file(name).exists():  # another process may have made it while this one waited
                    self._write(name, *self._encode(sounds(), number))
        with safe_open(self._file(name), framework="pt") as opened:
            return Shard(opened.get_tensor("states"), json.loads(opened.metadata()["rows"]))

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with open(self.settings.states / f"{name}.lock", "w") as lock:  # given back when the process ends, however it does
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        (self.settings.states / f"{name}.lock").unlink(missing_ok=True)

    def _sounds(self, number: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
        heard = []
        for draw in draws(self.settings, number):
            wave, silence, spoken = sound(draw, self.settings, self._noise)
            heard.append((wave, _row(draw.pack, draw.text, draw.language, silence, spoken)))
        return heard

    def _dev_sounds(self) -> list[tuple[np.ndarray, dict[str, Any]]]:
        heard = []
        for name in self.settings.weights():
            samples, rows = _read(self.settings.data, name, "dev")
            for row in rows[: self.settings.dev_clips]:
                wave = samples[row["offset"] : row["offset"] + row["samples"]].astype(np.float32) / 32768
                heard.append((wave, _row(name, row["text"], row["language"], 0, True)))
        return heard

    def _encode(self, heard: list[tuple[np.ndarray, dict[str, Any]]], number: int | None) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Encode in batches of similar length. `number` None: whole windows."""
        heard = sorted(heard, key=lambda pair: len(pair[0]))
        states, rows, start = [], [], 0
        for at in range(0, len(heard), self.settings.encode_batch):
            batch = heard[at : at + self.settings.encode_batch]
            encoded = self._states([wave for wave, _ in batch], None if number is None else _random(self.settings.seed, number, at))
            states.append(encoded.flatten(0, 1))
            for wave, row in batch:
                last = min(encoded.shape[1], len(wave) // self._position)
                rows.append(row | {"start": start, "positions": encoded.shape[1], "first": row["first"] // self._position, "last": last})
                start += encoded.shape[1]
        return torch.cat(states), rows

    @property
    def _position(self) -> int:
        """Samples of one position of the encoder."""
        return 2 * self.processor.feature_extractor.hop_length

    def _states(self, waves: list[np.ndarray], rng: np.random.Generator | None) -> torch.Tensor:
        """(clips, positions, d_model) in fp16, on the CPU."""
        window = self.settings.window_s * SAMPLE_RATE
        num_samples = window
        if rng is not None and rng.random() >= self.settings.whole_windows:
            num_samples = min(window, max(map(len, waves)) + int(rng.uniform(0.1, 0.6) * SAMPLE_RATE))
        num_samples = -(-num_samples // self._position) * self._position
        device = self.model.device
        features = extract_features(self.processor, waves, num_samples).to(device)  # not under autocast: the mel scale wants fp32
        with torch.no_grad(), autocast(device.type):
            encoded = encode_cropped(self.model, features)
        stored: torch.Tensor = encoded.to("cpu", torch.float16)
        if not torch.isfinite(stored).all():
            raise ValueError(f"An encoder state of {float(encoded.float().abs().max()):g} does not fit in half precision.")
        return stored

    def _write(self, name: str, states: torch.Tensor, rows: list[dict[str, Any]]) -> None:
        from safetensors.torch import save_file

        free = shutil.disk_usage(self.settings.states).free - states.nbytes
        if free < self.settings.min_free_gb * 1e9:
            raise ValueError(
                f"Writing {name} would leave {free / 1e9:.1f} GB on the disk, and min_free_gb is {self.settings.min_free_gb:g}. "
                "Make room, or use fewer shards (--num-shards)."
            )
        for abandoned in self.settings.states.glob(f"{name}.*.part"):  # of a process that has ended: this one holds the lock
            abandoned.unlink()
        part = self._file(name).with_suffix(f".{os.getpid()}.part")
        save_file({"states": states}, part, {"rows": json.dumps(rows, ensure_ascii=False)})
        part.replace(self._file(name))


def _row(pack: str, text: str, language: str, first: int, spoken: bool) -> dict[str, Any]:
    return {"pack": pack, "text": text, "language": language, "first": first, "spoken": spoken}
