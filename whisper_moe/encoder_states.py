"""What the encoder says to every clip, computed once and kept on disk: for adapters that leave the encoder alone.

Of a training step of such an adapter most is the frozen encoder, which answers the same in every epoch. Three parts:

    states = cache_encoder_states(model, processor, clips, folder)      # once; resumable, several processes may do it together
    view = StatesView(clips, states)                                    # items by (epoch, index), as `data.TrainingView`
    batch = StatesCollator(processor, prompt_language)(items)           # {"encoder_states", "labels"}

One file per clip, named by a hash of all that the states depend on: the encoder's weights, the settings of the features, the precision,
the window, and the clip's samples. A file that was made from anything else has another name, so a stale one is never read.
Knows no adapters but to refuse those that would change the encoder, and no training loop.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from whisper_moe.audio import SAMPLE_RATE
from whisper_moe.base_signature import base_signature
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import IGNORED, Clip, ClipKey, Clips, extract_features, label_ids
from whisper_moe.evaluate import autocast, evaluating, uses_bf16
from whisper_moe.languages import adapters_off
from whisper_moe.train_settings import Storage

if TYPE_CHECKING:
    from transformers import WhisperProcessor

_FORMAT = 1
_SPARE_S = 0.5  # silence kept behind the longest clip of a cropped window
_ABANDONED_S = 3600.0  # a file that nobody has finished writing for so long belongs to a process that has ended
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}  # as safetensors calls them


# ---- what can be cached ------------------------------------------------------------------------------------------------


def check_leaves_encoder_alone(model: Any) -> None:
    """Raise `ValueError` if what the encoder says to a clip is not the same in every epoch: an adapter in it, a weight of it that is
    trained, or chance (dropout, layers left out, the model's own SpecAugment). `model` is a Whisper, with or without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    encoder, config = model.get_encoder(), model.config
    adapted = [name for name, module in encoder.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    trained = [name for name, weight in encoder.named_parameters() if weight.requires_grad] if _has_adapters(model) else []
    if adapted or trained:
        raise ValueError(
            f"The adapter touches the encoder (for instance {(adapted + trained)[0]!r}), so its states change while it is trained and "
            "cannot be computed once. Adapt the decoder alone, target_modules=decoder_only(model), or leave the cache."
        )
    chances = ["dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"]
    chances += ["mask_time_prob", "mask_feature_prob"] if getattr(config, "apply_spec_augment", False) else []
    by_chance = {name: getattr(config, name) for name in chances if getattr(config, name, 0)}
    if by_chance:
        raise ValueError(
            f"In training this encoder is not the same twice: {', '.join(f'{name}={value}' for name, value in by_chance.items())}. "
            "Set these to 0 in its config before it is loaded, or leave the cache."
        )


def _has_adapters(model: Any) -> bool:
    """Whether it is an adapter that is trained; the weights of a bare model require gradients by default, which means nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


# ---- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatesPlan:
    """What a cache will hold, before anything is computed."""

    folder: Path
    """Where the states of this encoder lie."""
    files: tuple[Path, ...]
    """One per clip, in their order; equal clips share a file."""
    num_samples: int
    """Of the window that the encoder hears."""
    positions: int
    d_model: int
    dtype: torch.dtype
    missing: tuple[int, ...]
    """Clips whose states are not on disk, one of each file."""

    @property
    def clip_bytes(self) -> int:
        return self.positions * self.d_model * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all states."""
        return self.clip_bytes * len(set(self.files))

    @property
    def missing_bytes(self) -> int:
        return self.clip_bytes * len(self.missing)

    def __str__(self) -> str:
        sum_of = f"{self.positions:,} positions x {self.d_model} x {self.dtype.itemsize} bytes x {len(set(self.files)):,} clips"
        return f"encoder states: {sum_of} = {_size(self.num_bytes)}, of which {_size(self.missing_bytes)} are not yet in {self.folder}"


def plan_states(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    folder: str | Path,
    *,
    precision: str = "auto",
    storage: Storage = "float16",
    crop: bool = False,
) -> StatesPlan:
    """What `cache_encoder_states` would write, with the same arguments. Nothing is computed and nothing written."""
    if storage not in ("float16", "model"):
        raise ValueError(f"storage is {storage!r}; it is 'float16' or 'model', the type of the model's weights.")
    check_leaves_encoder_alone(model)
    features = processor.feature_extractor
    if features.dither:
        raise ValueError(
            f"The processor adds noise to its features (dither={features.dither}), so no state is computed twice alike. Set it to 0."
        )
    dtype = torch.float16 if storage == "float16" else model.dtype
    longest = max((len(clip.samples) for clip in clips.clips), default=0)
    num_samples = features.n_samples
    if longest > num_samples:
        raise ValueError(
            f"A clip of {longest / SAMPLE_RATE:.1f} s does not fit in the window of {num_samples / SAMPLE_RATE:g} s. "
            "Leave it out first: load_clips(..., max_duration_s=...)."
        )
    step = 2 * features.hop_length  # samples of one position
    if crop:
        num_samples = min(num_samples, -(-(longest + int(_SPARE_S * SAMPLE_RATE)) // step) * step)
    key = _encoder_key(model, processor, uses_bf16(model.device.type, precision), dtype, num_samples)
    home = Path(folder) / key[:16]
    files = tuple(_clip_file(home, key, clip) for clip in clips.clips)
    first: dict[Path, int] = {}
    for index, file in enumerate(files):
        first.setdefault(file, index)
    shape = (num_samples // step, model.config.d_model)
    missing = tuple(index for file, index in first.items() if not _is_whole(file, shape, dtype))
    return StatesPlan(home, files, num_samples, *shape, dtype, missing)


def _encoder_key(model: Any, processor: WhisperProcessor, bf16: bool, dtype: torch.dtype, num_samples: int) -> str:
    """A hash of what the states depend on besides the clip. All weights go into it: the base's signature forgives what a change of
    precision does, and a cache must not."""
    encoder, config, features = model.get_encoder(), model.config, processor.feature_extractor
    said = {
        "format": _FORMAT,
        "features": [features.n_fft, features.hop_length, features.sampling_rate, features.feature_size, features.padding_value],
        "encoder": [config.activation_function, config.encoder_attention_heads, config.encoder_layers, config.scale_embedding],
        "computed": [str(model.dtype), "bf16" if bf16 else "as it is", num_samples],
        "stored": str(dtype),
    }
    digest = hashlib.sha256(json.dumps(said).encode())
    digest.update(torch.as_tensor(features.mel_filters).double().numpy().tobytes())
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _clip_file(home: Path, key: str, clip: Clip) -> Path:
    digest = hashlib.sha256(key.encode())
    digest.update(clip.samples.tobytes())
    name = digest.hexdigest()[:40]
    return home / name[:2] / f"{name}.safetensors"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


# ---- computing ---------------------------------------------------------------------------------------------------------


def cache_encoder_states(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    folder: str | Path,
    *,
    precision: str = "auto",
    storage: Storage = "float16",
    crop: bool = False,
    batch_size: int = 16,
    max_bytes: int | None = None,
    part: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> EncoderStates:
    """Compute what is missing of the clips' encoder states, with adapters off, and open them all.

    Each clip's file appears whole or not at all, so a run that was interrupted goes on where it was, and several processes may work on
    one folder.

    Args:
        model: a Whisper, bare or with adapters in the decoder.
        clips: as they will be trained on, without augmentation; none longer than the window.
        folder: of the cache; may serve any number of models and data sets.
        precision: of the computation, see `evaluate.uses_bf16`.
        storage: `"float16"`, or `"model"` for the type of the model's weights: twice the room in fp32, and exact.
        crop: end the window half a second behind the longest clip of the set instead of filling it up with silence. Less work for the
            encoder, once, and for the cross-attention, in every step; but the adapter will meet whole windows.
        batch_size: clips at a time.
        max_bytes: how large the whole folder may become; None: as large as the disk has room for.
        part: (which process this is, how many share the work). The states of the others may still be missing afterwards; wait for them
            before you read.
        progress: show a bar, and the size before.

    Raises:
        ValueError: The encoder is adapted or not the same twice, a clip is too long, there is no room, or a state does not fit in storage.
        OSError: The disk is full after all; what was written stays.
    """
    plan = plan_states(model, processor, clips, folder, precision=precision, storage=storage, crop=crop)
    if progress:
        print(plan, flush=True)
    process, num_processes = part
    mine = [index for index in plan.missing if index % num_processes == process]  # whatever the others have done already
    if mine:
        _check_room(plan, Path(folder), max_bytes)
        _sweep(plan.folder)
        _describe(plan, model)
    starts: Any = range(0, len(mine), batch_size)
    if progress:
        from transformers.utils import logging

        starts = logging.tqdm(starts, desc=f"encoding {clips.name}", leave=False)
    shape = (plan.positions, plan.d_model)
    with evaluating(model), adapters_off(model), torch.no_grad():
        for start in starts:
            # Another process may have been here meanwhile.
            indices = [index for index in mine[start : start + batch_size] if not _is_whole(plan.files[index], shape, plan.dtype)]
            if indices:
                states = _encode(model, processor, [clips[index]["audio"] for index in indices], plan, precision)
                for index, rows in zip(indices, states, strict=True):
                    _write(plan.files[index], rows)
    return EncoderStates(plan)


def _encode(model: Any, processor: WhisperProcessor, waves: Sequence[Any], plan: StatesPlan, precision: str) -> torch.Tensor:
    """(clips, positions, d_model), as they are stored."""
    features = extract_features(processor, waves, plan.num_samples).to(model.device, model.dtype)
    with autocast(model.device.type, precision):
        if plan.num_samples == processor.feature_extractor.n_samples:
            encoded = model.get_encoder()(features).last_hidden_state
        else:
            encoded = encode_cropped(model, features)
    stored: torch.Tensor = encoded.to("cpu", plan.dtype)
    if not torch.isfinite(stored).all():
        largest = float(encoded.float().abs().max())
        raise ValueError(f"An encoder state of {largest:g} does not fit in {plan.dtype}. Store the model's own type: storage='model'.")
    return stored


def _check_room(plan: StatesPlan, folder: Path, max_bytes: int | None) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    way_out = "Crop the window (crop=True; for a run crop_states), store float16, train on fewer clips, or delete what nobody needs there."
    free = shutil.disk_usage(existing).free
    if plan.missing_bytes > free:
        raise ValueError(f"{plan}; the disk has {_size(free)} left. {way_out}")
    if max_bytes is not None:
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
        if held + plan.missing_bytes > max_bytes:
            raise ValueError(f"{plan}; {folder} holds {_size(held)} already and may hold {_size(max_bytes)}. {way_out}")


def _sweep(home: Path) -> None:
    """Delete what processes that have ended left half written."""
    for file in home.glob("*/*.part"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink()


def _describe(plan: StatesPlan, model: Any) -> None:
    """A note for whoever finds the folder and wonders whether it may go."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    note = {
        "what": "encoder states of clips; may be deleted, they are computed again",
        "positions": plan.positions,
        "d_model": plan.d_model,
    }
    note |= {"dtype": str(plan.dtype), "window_samples": plan.num_samples, "base_signature": base_signature(model)}
    _replace(plan.folder / "about.json", (json.dumps(note, indent=2) + "\n").encode())


# ---- files -------------------------------------------------------------------------------------------------------------


def _write(file: Path, states: torch.Tensor) -> None:
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    states = states.contiguous()
    _replace(file, save({"states": states}, {"crc32": str(_checksum(states)), "of": file.stem}))


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step, whoever else writes it."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"{file.name} could not be written to the cache in {file.parent}: {error}. Make room and start again; what is there stays."
        ) from error


def _is_whole(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a clip's states are there, of the size that is expected; their content is checked when it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice("states")
            return (
                tuple(part.get_shape()) == shape
                and part.get_dtype() == _DTYPES.get(dtype)
                and (opened.metadata() or {}).get("of") == file.stem
            )
    except (OSError, SafetensorError):
        return False


def _checksum(states: torch.Tensor) -> int:
    return zlib.crc32(states.flatten().view(torch.uint8).numpy().data)


class EncoderStates(Dataset):
    """The encoder states of a set of clips, on disk. Item i is (positions, d_model), as it was stored."""

    def __init__(self, plan: StatesPlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Raises `ValueError` if the file is gone or damaged; a damaged one is deleted, so that the next run computes it again."""
        from safetensors import SafetensorError, safe_open

        file = self.plan.files[index]
        again = "Start again: only what is missing is computed."
        try:
            with safe_open(file, framework="pt") as opened:  # maps the file into memory
                states: torch.Tensor = opened.get_tensor("states")
                expected = (opened.metadata() or {}).get("crc32")
        except FileNotFoundError:
            raise ValueError(f"The encoder states of clip {index} are not in the cache ({file}). {again}") from None
        except SafetensorError as error:
            file.unlink(missing_ok=True)
            raise ValueError(
                f"The encoder states of clip {index} cannot be read ({file}: {error}). The file has been deleted. {again}"
            ) from None
        if expected != str(_checksum(states)):
            file.unlink(missing_ok=True)
            raise ValueError(f"The encoder states of clip {index} were damaged on disk ({file}). The file has been deleted. {again}")
        return states

    def part(self, rows: slice) -> EncoderStates:
        """Those of some of the clips."""
        return EncoderStates(replace(self.plan, files=self.plan.files[rows], missing=()))

    def __str__(self) -> str:
        return str(self.plan)


# ---- batches -----------------------------------------------------------------------------------------------------------


class StatesView(Dataset):
    """Clips by `ClipKey`, as `data.TrainingView`, with encoder states in place of sound."""

    def __init__(self, clips: Clips, states: EncoderStates) -> None:
        if len(clips) != len(states):
            raise ValueError(f"There are {len(clips)} clips and the states of {len(states)}. Cache the very clips that are trained on.")
        self.clips, self.states = clips, states

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: ClipKey) -> dict[str, Any]:
        clip = self.clips.clips[key[1]]
        return {"states": self.states[key[1]], "text": clip.text, "language": clip.language, "key": key}


@dataclass(frozen=True)
class StatesCollator:
    """Items of a `StatesView` -> `{"encoder_states": (batch, positions, d_model), "labels": (batch, tokens)}`."""

    processor: WhisperProcessor
    prompt_language: str
    augment: bool = False

    def __post_init__(self) -> None:
        if self.augment:
            raise ValueError("Encoder states are computed once, so recordings cannot be changed in each epoch. Set augment to false.")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [label_ids(self.processor, item["text"], self.prompt_language) for item in items]
        return {"encoder_states": torch.stack([item["states"] for item in items]), "labels": padded_labels(labels)}


def padded_labels(labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """(batch, tokens), filled up with what the loss leaves out."""
    longest = max(map(len, labels))
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in labels])
