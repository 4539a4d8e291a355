"""A run: one arm of one part with one seed, from a bare base to errors per clip; and what all parts have in common.

A part is a module with `runs(settings) -> list[Run]`, the important ones first. A run gets a `Context` and returns a row of plain
values. What several runs need (an adapter to start from) is an *artifact*: a folder made once, by whoever needs it first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.fitting import Fit, Schedule, fit
from recipes.evidence.ground import FLITE, Data, Ground, Item
from recipes.evidence.measuring import TOKENS_A_SECOND, measure
from recipes.evidence.methods import Method, Trained, attach, rank_pattern
from recipes.evidence.store import Store, set_row, versions


@dataclass(frozen=True)
class Settings:
    """What all parts read. A part's own choices stand in the part."""

    ground: str = "own-decoder"
    """The base: "own-decoder" or "pocket"."""
    parts: tuple[str, ...] = ()
    """Which parts; all by default."""
    seeds: int = 3
    num_steps: int = 120
    """Optimizer steps of a run of `child`; the other parts take shares of it."""
    batch_size: int = 16
    test_clips: int = 200
    """Clips of a test set at most."""
    threads: int = 1
    rate_scale: float = 1.0
    """Multiplies the learning rates of all parts, those that are tried included: a large base wants smaller ones."""
    base_sets: tuple[str, ...] = ("child", "kerstin", "espeak-es", "espeak-fr", "espeak-it", "espeak-pl")
    """Sets of the languages that are there from the start, one each."""
    new_sets: tuple[str, ...] = ("kichwa", "espeak-ca", "espeak-fi", "espeak-sv")
    """Sets of the languages that are added."""
    out_of_domain: tuple[str, ...] = ("adult", "kathleen", "kerstin")
    """Test sets of the part `child` besides the children's."""
    only: str | None = None
    """Only the runs whose key this regular expression finds."""
    variant: str = ""
    """One of `VARIANTS`: other settings than the main ones, whose rows, adapters and results are kept apart."""
    smoke: bool = False
    """Try the path out: two steps, one seed, a handful of clips."""
    data: Data = field(default_factory=Data)

    @property
    def work(self) -> Path:
        """Rows and artifacts of this ground and variant."""
        return self.data.work / ("smoke" if self.smoke else "runs") / self.name

    @property
    def name(self) -> str:
        """Of the work folder and of the results: the ground's, and the variant's if there is one."""
        return f"{self.ground}-{self.variant}" if self.variant else self.ground


VARIANTS: dict[str, dict[str, Any]] = {
    "longer": {
        "num_steps": 480,
        "out_of_domain": (*Settings.out_of_domain, FLITE),
        "only": "|".join(
            (
                r"child-tuning/(full|lora|adalora|s2lora|sparse-s2lora)-",
                r"child/(base|full|lora-r8|adalora-r8|s2-r32|s2-r8|s2-r32-sparse-0.3|s2-r8-attention)-s\d",
                r"interference/(base|joint-full|joint-lora|per-language-lora)-",
                r"expansion/(base|.*-(full|cold|warm-nearest|moe))-",
            )
        ),
    },
}
"""Variant -> its settings. "longer": the arms of the papers' main claims with four times the steps, and a test set from no training."""


def of_variant(settings: Settings) -> Settings:
    """With the settings of its variant, where they are the defaults. Raises `ValueError` for a variant that is not known."""
    if settings.variant and settings.variant not in VARIANTS:
        raise ValueError(f"No variant is called {settings.variant!r}. Known: {', '.join(VARIANTS)}.")
    chosen = VARIANTS.get(settings.variant, {})
    return replace(settings, **{name: value for name, value in chosen.items() if getattr(settings, name) == getattr(Settings, name)})


@dataclass
class Context:
    """What a run works with."""

    settings: Settings
    ground: Ground
    store: Store

    def test(self, name: str) -> list[Item]:
        """A test set, at most `test_clips` of it: the same ones for every run."""
        return self.ground.items(name, "test", self.settings.test_clips)

    def artifact(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, made by `make(folder)` if it is not there; who comes second waits."""
        folder = self.settings.work / "artifacts" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                part = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                make(part)
                part.replace(folder)
        return folder


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    part: str
    arm: str
    seed: int
    work: Callable[[Context], dict[str, Any]]

    @property
    def key(self) -> str:
        return f"{self.part}/{self.arm}-s{self.seed}"


def train(
    context: Context,
    method: Method,
    items: Sequence[Sequence[Item]],
    schedule: Schedule,
    *,
    ground: Ground | None = None,
    trained: Trained | None = None,
) -> tuple[Trained, dict[str, Any]]:
    """Train a method on sets of items, from a bare base or from `trained`; with what a row says of it.

    Args:
        context: of the run.
        method: what to train; it is what `trained` was made by, where that is given.
        items: one list per set.
        schedule: how long, with the seed.
        ground: another than the context's, with its encoder frozen or not.
        trained: a model that is ready to be trained.
    """
    ground = context.ground if ground is None else ground
    schedule = replace(schedule, rate_scale=context.settings.rate_scale)
    if trained is None:
        trained = attach(ground.fresh(), method, decoder_only=ground.frozen_encoder, num_steps=schedule.num_steps, seed=schedule.seed)
    fitted: Fit = fit(ground, trained, items, schedule)
    num_trained = trained.num_trained
    trained.finish()
    row = {
        "method": method.to_dict(),
        "schedule": asdict(schedule),
        "clips": [len(each) for each in items],
        "minutes": [round(sum(item.seconds for item in each) / 60, 2) for each in items],
        "num_trained": num_trained,
        "num_bytes": trained.num_bytes(),
        "train_s": round(fitted.seconds, 1),
        "first_loss": round(fitted.first_loss, 4),
        "last_loss": round(fitted.last_loss, 4),
        "ranks": rank_pattern(trained),
    }
    return trained, row


def measure_sets(
    context: Context,
    model: Any,
    sets: Mapping[str, Sequence[Item]],
    ground: Ground | None = None,
    tokens_a_second: float = TOKENS_A_SECOND,
) -> dict[str, Any]:
    """Errors on several sets: name -> row."""
    ground = context.ground if ground is None else ground
    return {name: set_row(measure(model, ground, items, tokens_a_second=tokens_a_second), items) for name, items in sets.items()}


def _same_throughout(context: Context) -> None:
    """Rows, tuned rates and adapters to start from that were made on another base, or with other sizes, are not mixed with these."""
    settings = context.settings
    sizes = {name: getattr(settings, name) for name in ("num_steps", "batch_size", "test_clips", "rate_scale")}
    told = {"base": context.ground.digest, **sizes}
    path = settings.work / "made_for.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        with suppress(FileExistsError):  # another process was first
            os.link(part, path)
        part.unlink()
    found = json.loads(path.read_text("utf-8"))
    if differing := [f"{name} {found.get(name)}, now {value}" for name, value in told.items() if found.get(name) != value]:
        raise ValueError(
            f"{settings.work} holds runs made otherwise: {'; '.join(differing)}. Delete that folder, or take another (--data.work)."
        )


def perform(runs: Sequence[Run], context: Context, say: Callable[[str], None] = print) -> int:
    """Do the runs that are not done and that nobody else is at, in their order. Returns how many were done here.

    Raises:
        ValueError: The folder holds runs on another base or of other sizes.
        RuntimeError: Some runs failed; all others have been done.
    """
    done, failed = 0, []
    _same_throughout(context)
    for run in runs:
        with context.store.claimed(run.key) as mine:
            if not mine:
                continue
            started = time.perf_counter()
            try:
                row = run.work(context)
            except Exception as error:  # hours of other runs shall not wait for somebody to read of this one
                say(f"{run.key} FAILED: {error!r}\n{traceback.format_exc()}")
                failed.append(f"{run.key} ({error})")
                continue
            row |= {
                "part": run.part,
                "arm": run.arm,
                "seed": run.seed,
                "ground": context.ground.name,
                "base": context.ground.digest,
                "seconds": round(time.perf_counter() - started, 1),
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
            context.store.write(run.key, row)
            done += 1
            rates = ", ".join(f"{name} {each['wer']:.1%}" for name, each in row.get("sets", {}).items())
            say(f"{run.key}: {rates} ({row['seconds']:.0f} s)")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. Run again for those alone: the others are kept."
        )
    return done
