"""Committed results as systems that can be compared: rates with intervals, differences on the same clips, and means over sets.

A *system* is what one row of a table speaks of: all seeds of an arm, or of a way of doing things over several languages. Errors are summed
over seeds clip by clip, so an interval is about other clips and speakers, given these seeds; what seeds do is told beside it. Several sets
count the same however long they are. Knows no page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whisper_moe.intervals import FEWEST_SPEAKERS, Interval, bootstrap_rate, paired_difference

LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number, and where it would lie for other clips of the same kind.

    Args:
        value: as a fraction. Of a difference: first less second, so above 0 the second is better.
        low, high: 95 % bootstrap; None where there was one unit to draw from.
        p_value: of a difference on one set, by swapping texts at random; None of a rate or of a mean over sets.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None = None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Sample:
    """Errors of a system on a set."""

    errors: np.ndarray
    """(clips,), summed over seeds."""
    lengths: np.ndarray
    """(clips,), of one reference each."""
    speakers: list[str] | None
    per_seed: tuple[float, ...]
    """The rate of each seed."""

    @property
    def num_seeds(self) -> int:
        return len(self.per_seed)

    @property
    def rate(self) -> float:
        return float(self.errors.sum() / (self.lengths.sum() * self.num_seeds))

    def interval(self) -> Interval:
        return bootstrap_rate(self.errors, self.lengths * self.num_seeds, self.speakers, level=LEVEL)


@dataclass(frozen=True)
class System:
    """The runs behind one row of a table."""

    name: str
    rows: tuple[dict[str, Any], ...]
    sets: Mapping[str, Mapping[str, Any]]
    """What the sets are, from the results file."""
    _samples: dict[tuple[str, str], Sample] = field(default_factory=dict, compare=False, repr=False)

    def measured(self) -> list[str]:
        """Sets that a run of it has measured for its own sake: those of its target where it has one."""
        return list(dict.fromkeys(name for row in self.rows for name in row["sets"]))

    def rows_of(self, set_name: str) -> list[dict[str, Any]]:
        """Where runs are for one language each, those for this one; else all that measured the set."""
        rows = [row for row in self.rows if set_name in row["sets"]]
        meant = [row for row in rows if target_of(row) == set_name]
        return meant or rows

    def has(self, set_name: str) -> bool:
        return any(set_name in row["sets"] for row in self.rows)

    def sample(self, set_name: str, rate: str = "wer") -> Sample:
        """Errors on a set. `rate`: "wer" or "cer". Raises `ValueError` where no run measured it."""
        if (set_name, rate) not in self._samples:
            rows = self.rows_of(set_name)
            if not rows:
                raise ValueError(f"{self.name} has not been measured on {set_name!r}; it was on {', '.join(self.measured())}.")
            kind, unit = ("word_errors", "words") if rate == "wer" else ("char_errors", "chars")
            each = np.array([row["sets"][set_name][kind] for row in rows])  # (seeds, clips)
            about = self.sets[set_name]
            lengths = np.array(about[unit])
            speakers = None if None in about["speakers"] else [str(speaker) for speaker in about["speakers"]]
            rates = tuple((each.sum(1) / lengths.sum()).tolist())
            self._samples[set_name, rate] = Sample(each.sum(0), lengths, speakers, rates)
        return self._samples[set_name, rate]

    def mean(self, key: str) -> float | None:
        """Of a number that every run states, such as "num_trained"."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return float(np.mean(values)) if values else None

    @property
    def num_seeds(self) -> int:
        return len({row["seed"] for row in self.rows})


def target_of(row: Mapping[str, Any]) -> str | None:
    """The set that a run is for, where it is for one: it says so, its arm begins with it, or it has measured nothing else."""
    if "target" in row:
        return None if row["target"] is None else str(row["target"])
    if "kind" in row and f"-{row['kind']}" in row["arm"]:
        return str(row["arm"][: row["arm"].index(f"-{row['kind']}")])
    return next(iter(row["sets"])) if len(row["sets"]) == 1 else None


def how_of(row: Mapping[str, Any]) -> str:
    """What a run does, whatever the language: it says so, or its arm without the set's name does."""
    for key in ("how", "kind"):
        if key in row:
            return str(row[key])
    target = target_of(row)
    return str(row["arm"]).removesuffix(f"-{target}").removeprefix(f"{target}-")


@dataclass(frozen=True)
class Results:
    """One results file."""

    run: dict[str, Any]
    """As `collect` wrote it."""

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls(json.loads(path.read_text("utf-8")))

    @property
    def ground(self) -> str:
        return str(self.run["ground"])

    @property
    def base_parameters(self) -> int:
        return int(self.run["base_parameters"])

    @cached_property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(row["part"] for row in self.run["runs"].values()))

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The runs of a part; what a run says `about` itself stands beside the rest."""
        return [{"sets": {}, **row, **row.get("about", {})} for row in self.run["runs"].values() if row["part"] == part]

    def systems(self, part: str, name: Callable[[dict[str, Any]], str | None] = lambda row: str(row["arm"])) -> dict[str, System]:
        """The runs of a part by name, in the order of the file; those whose name is None are left out."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(self.rows(part), key=lambda row: row["seed"]):
            called = name(row)
            if called is not None:
                found.setdefault(called, []).append(row)
        return {called: System(called, tuple(rows), self.run["sets"][part]) for called, rows in found.items()}


def common_sets(systems: Iterable[System]) -> list[str]:
    """Sets that all of the systems were measured on, in the order of the first."""
    all_systems = list(systems)
    return [name for name in all_systems[0].measured() if all(system.has(name) for system in all_systems)] if all_systems else []


def difference(first: System, second: System, set_name: str, rate: str = "wer") -> Estimate:
    """How much lower the rate of `second` is on one set, clips or speakers drawn in pairs."""
    one, other = first.sample(set_name, rate), second.sample(set_name, rate)
    _same_clips(one, other, set_name)
    # Sums over three seeds and over one become comparable when each is taken as often as the other has seeds.
    scale = one.num_seeds * other.num_seeds
    found = paired_difference(one.errors * other.num_seeds, other.errors * one.num_seeds, one.lengths * scale, one.speakers, level=LEVEL)
    return Estimate(found.value, found.low, found.high, found.p_value)


def mean_rate(system: System, sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Mean over sets, each with the same weight; every set's own clips or speakers are drawn again."""
    parts = []
    for name in sets:
        sample = system.sample(name, rate)
        parts.append((sample.errors / sample.num_seeds, sample.lengths, sample.speakers))
    return mean_of_ratios(parts)


def mean_difference(first: System, second: System, sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Mean over sets of how much lower the rate of `second` is; pairs are drawn within each set."""
    return mean_difference_of([(first, second, name) for name in sets], rate)


def mean_difference_of(pairs: Iterable[tuple[System, System, str]], rate: str = "cer") -> Estimate:
    """As `mean_difference`, each set with systems of its own."""
    parts = []
    for first, second, name in pairs:
        one, other = first.sample(name, rate), second.sample(name, rate)
        _same_clips(one, other, name)
        parts.append((one.errors / one.num_seeds - other.errors / other.num_seeds, one.lengths, one.speakers))
    return mean_of_ratios(parts)


def relative_gain(first: System, second: System, sets: Sequence[str], rate: str = "cer") -> float:
    """How much lower the mean of `second` is, as a share of that of `first`."""
    before = mean_rate(first, sets, rate).value
    return (before - mean_rate(second, sets, rate).value) / before


def correlation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """Spearman's, with an interval over pairs drawn again; NaN where one of the two does not vary."""
    one, other = np.asarray(first, float), np.asarray(second, float)
    rng = np.random.default_rng(seed)
    drawn = [_spearman(one[rows], other[rows]) for rows in rng.integers(len(one), size=(_RESAMPLES, len(one)))] if len(one) > 3 else []
    usable = [each for each in drawn if np.isfinite(each)]
    low, high = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if usable else (None, None)
    return Estimate(_spearman(one, other), None if low is None else float(low), None if high is None else float(high))


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    one, other = _ranks(first), _ranks(second)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ties share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def _same_clips(one: Sample, other: Sample, set_name: str) -> None:
    if not np.array_equal(one.lengths, other.lengths):
        raise ValueError(f"The two systems were measured on different clips of {set_name!r}.")


def mean_of_ratios(parts: Sequence[tuple[np.ndarray, np.ndarray, list[str] | None]]) -> Estimate:
    """Mean over parts of sum(numbers) / sum(lengths), its interval by drawing units within each part."""
    if not parts:
        raise ValueError("There is no set to take a mean over.")
    rng = np.random.default_rng(0)
    values, drawn = [], np.zeros(_RESAMPLES)
    usable = True
    for numbers, lengths, speakers in parts:
        values.append(float(numbers.sum() / lengths.sum()))
        sums = _units(np.stack([numbers.astype(float), lengths.astype(float)], axis=1), speakers)  # (units, 2)
        usable &= len(sums) > 1
        totals = sums[rng.integers(len(sums), size=(_RESAMPLES, len(sums)))].sum(1)  # (resamples, 2)
        drawn += totals[:, 0] / totals[:, 1] / len(parts)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if usable else (None, None)
    return Estimate(float(np.mean(values)), None if low is None else float(low), None if high is None else float(high))


def _units(per_clip: np.ndarray, speakers: list[str] | None) -> np.ndarray:
    """Speakers where there are enough, as `whisper_moe.intervals` does it. (clips, 2) -> (units, 2)"""
    if speakers is None or len(set(speakers)) < FEWEST_SPEAKERS:
        return per_clip
    order = {speaker: at for at, speaker in enumerate(dict.fromkeys(speakers))}
    sums = np.zeros((len(order), 2))
    np.add.at(sums, [order[speaker] for speaker in speakers], per_clip)
    return sums
