"""What a training run is told: numbers that are checked when they are given, and words for the adapter's card.

Plain data. Knows neither models nor files, so it can be read, printed and compared before anything heavy is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

Storage = Literal["float16", "model"]
Metric = Literal["cer", "wer"]
Logger = Literal["none", "tensorboard", "trackio", "wandb"]

METRICS: tuple[Metric, ...] = ("cer", "wer")
LOGGERS: tuple[Logger, ...] = ("none", "tensorboard", "trackio", "wandb")
STORAGES: tuple[Storage, ...] = ("float16", "model")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TrainSettings:
    """How one adapter is trained. The defaults suit a published Whisper; a small model wants a larger learning rate."""

    num_epochs: float = 10.0
    max_steps: int | None = None
    """Optimizer steps; overrides `num_epochs`. A stream needs it: its length is not known."""
    batch_size: int = 16
    """Clips at a time, in each process."""
    gradient_accumulation: int = 1
    """Batches per optimizer step."""
    learning_rate: float = 1e-4
    warmup_share: float = 0.1
    """Share of the steps in which the learning rate rises; it falls linearly to zero afterwards."""
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = True
    """Change speed, level and noise of the recordings, and mask parts of the features (SpecAugment)."""
    crop_share: float = 0.0
    """Share of batches whose window is cut behind the longest clip instead of filled up with silence. Saves most of the
    time when clips are much shorter than the window; below 1, since the adapter will meet whole windows."""
    num_checkpoints: int = 8
    """How often to save a checkpoint, and to measure on the dev set if there is one."""
    best_metric: str = "cer"
    """`cer` or `wer`: which error rate on the dev set decides what is kept, and when to stop early."""
    patience: int | None = None
    """Stop early after so many measurements on the dev set without a better one; None: never."""
    eval_batch_size: int = 16
    normalizer: str = "mark-preserving"
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 where the machine is faster with it."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, about a third more time."""
    cache_encoder_states: bool = False
    """Run the encoder once over the clips and train on what it said; only for adapters that leave the encoder alone, without
    augmentation."""
    storage: Storage = "float16"
    """Of cached encoder states: `float16`, or `model` for the type of the model's weights."""
    crop_states: bool = False
    """End the window of cached states behind the longest clip of all."""
    num_workers: int = 1
    """Processes that prepare batches."""
    log_to: str = "none"
    """`none`, `tensorboard`, `trackio` or `wandb`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "gradient_accumulation", "learning_rate", "num_checkpoints", "eval_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0.")
        for name in ("max_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it has to be above 0, or None for no such limit.")
        for name in ("warmup_share", "label_smoothing", "crop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        for name in ("num_workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be below 0.")
        for name, known in (("best_metric", METRICS), ("precision", PRECISIONS), ("log_to", LOGGERS), ("storage", STORAGES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Known: {', '.join(known)}.")
        if self.cache_encoder_states and self.augment:
            raise ValueError(
                "cache_encoder_states computes what the encoder hears once, but augment changes the recordings each time. "
                "Set augment to false, or leave the cache."
            )
        if self.cache_encoder_states and self.crop_share:
            raise ValueError(
                f"crop_share={self.crop_share} cuts the window of some batches, and cached encoder states have one window for all. "
                "Leave it out; crop_states ends that one window behind the longest clip."
            )
        if self.crop_states and not self.cache_encoder_states:
            raise ValueError(
                "crop_states is for cached encoder states. Add cache_encoder_states, or use crop_share, which cuts the window of batches."
            )

    def with_changes(self, changes: Mapping[str, Any]) -> TrainSettings:
        """The same settings with some changed by name.

        Raises:
            TypeError: There is no such setting; the message names the nearest one.
        """
        known = [each.name for each in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"Unknown setting {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}.")
        return replace(self, **changes)


@dataclass(frozen=True)
class CardNotes:
    """What only the person who trains knows, for the adapter's card."""

    train_data: str | None = None
    """The data, whose they are, and where they are from."""
    license: str | None = None
    """Of the adapter, as the data allow it; an identifier of the Hub such as `cc-by-4.0`."""
    command: str | None = None
    """The command line that makes this adapter again."""
    limits: str | None = None
    """What the adapter must not be relied on for, in plain words."""


def did_you_mean(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"`, or a full stop where nothing is near."""
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def check_logger(log_to: str) -> None:
    """Raises `ValueError` with the line that installs it, where the package of a logger is missing."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}.get(log_to, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ValueError(f"log_to is {log_to!r}, but the package is not installed: pip install {packages[0]}. Or log to 'none'.")
