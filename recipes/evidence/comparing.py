"""Committed results as systems that can be compared: rates with intervals, differences on the same clips, and means over sets.

A *system* is what one row of a table speaks of: all seeds of an arm, or of a way of doing things over several languages. An interval is
about other clips (or speakers) and other seeds: both are drawn again, the clips of two systems together, the seeds of each by
themselves. Several sets count the same however long they are. Knows no page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from whisper_moe.intervals import FEWEST_SPEAKERS, paired_difference

LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number, and where it would lie for other clips of the same kind and other seeds.

    Args:
        value: as a fraction. Of a difference: first less second, so above 0 the second is better.
        low, high: bootstrap; None where there was one unit to draw from.
        p_value: of a difference on one set, by swapping texts at random, given these seeds; None of everything else.
        each: what it is in every seed; of a difference, for every pair of equal seeds where both systems have the same ones, else for every
            combination.
        num_seeds: of the system that has the fewest. What was not trained has no seed, and does not count.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None = None
    each: tuple[float, ...] = ()
    num_seeds: int = 0

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def above_in_each(self) -> bool:
        """Whether it is above 0 in every seed."""
        return bool(self.each) and min(self.each) > 0


@dataclass(frozen=True)
class Sample:
    """Errors of a system on a set."""

    errors: np.ndarray
    """(runs, clips)."""
    lengths: np.ndarray
    """(clips,), of one reference each."""
    speakers: list[str] | None
    runs: tuple[tuple[int, str], ...]
    """The seed of each run, and what else tells it from another one of that seed."""
    trained: bool = True
    drawn_as: tuple[str, ...] = ()
    """The keys of the runs. Samples with the same ones are of the same models, and the same seeds of them are drawn."""

    @property
    def rate(self) -> float:
        return float(np.mean(self.per_seed))

    @property
    def per_seed(self) -> tuple[float, ...]:
        """The rate of each run."""
        return tuple((self.errors.sum(1) / self.lengths.sum()).tolist())

    def interval(self) -> Estimate:
        return weighted_mean([(1, [self])])


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
            each = np.array([row["sets"][set_name][kind] for row in rows])  # (runs, clips)
            about = self.sets[set_name]
            seeds = [int(row["seed"]) for row in rows]
            # A model for each language, measured on an old one: several runs of a seed.
            alone = len(set(seeds)) == len(seeds)
            self._samples[set_name, rate] = Sample(
                each,
                np.array(about[unit]),
                speakers_of(about),
                tuple((seed, "" if alone else str(row["arm"])) for seed, row in zip(seeds, rows, strict=True)),
                any(row.get("method", {}).get("kind") != "none" for row in rows),
                tuple(f"{row['part']}/{row['arm']}-s{row['seed']}" for row in rows),
            )
        return self._samples[set_name, rate]

    def mean(self, key: str) -> float | None:
        """Of a number that every run states, such as "num_trained"."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return float(np.mean(values)) if values else None

    @property
    def num_seeds(self) -> int:
        return len({row["seed"] for row in self.rows})


def speakers_of(about: Mapping[str, Any]) -> list[str] | None:
    """Of a set, as the results file describes it: None where some are not known."""
    return None if None in about["speakers"] else [str(speaker) for speaker in about["speakers"]]


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
    def name(self) -> str:
        """Of the ground, and of the variant of the settings if they are not the main ones."""
        return f"{self.ground}-{self.run['variant']}" if self.run["variant"] else self.ground

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


def difference(first: System, second: System, set_name: str, rate: str = "wer", level: float = LEVEL) -> Estimate:
    """How much lower the rate of `second` is on one set, clips or speakers drawn in pairs, and the seeds of each."""
    one, other = first.sample(set_name, rate), second.sample(set_name, rate)
    found = weighted_mean([(1, [one]), (-1, [other])], level)
    # Sums over three seeds and over one become comparable when each is taken as often as the other has seeds.
    by_swaps = paired_difference(
        one.errors.sum(0) * len(other.errors),
        other.errors.sum(0) * len(one.errors),
        one.lengths * len(one.errors) * len(other.errors),
        one.speakers,
    )
    return Estimate(found.value, found.low, found.high, by_swaps.p_value, found.each, found.num_seeds)


def mean_rate(system: System, sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Mean over sets, each with the same weight; every set's own clips or speakers are drawn again."""
    return weighted([(1, system)], sets, rate)


def mean_difference(first: System, second: System, sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Mean over sets of how much lower the rate of `second` is; pairs are drawn within each set."""
    return weighted([(1, first), (-1, second)], sets, rate)


def weighted(terms: Sequence[tuple[float, System]], sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Mean over sets of a weighted sum of the rates of several systems."""
    return weighted_mean([(weight, [system.sample(name, rate) for name in sets]) for weight, system in terms])


def correlation(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Any] | None = None, whole: bool = False, seed: int = 0
) -> Estimate:
    """Spearman's, with an interval over pairs drawn again; NaN where one of the two does not vary.

    Args:
        groups: of each pair. Values are ranked within their group alone, and every group has the same mean; drawn within, too.
        whole: whether groups are what is drawn.
    """
    one, other, members = np.asarray(first, float), np.asarray(second, float), _members(len(first), groups)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES if len(one) > 3 and not (whole and len(members) < 2) else 0):
        if whole:
            parts = [members[at] for at in rng.integers(len(members), size=len(members))]
        else:
            parts = [rows[rng.integers(len(rows), size=len(rows))] for rows in members]
        drawn.append(_spearman([one[rows] for rows in parts], [other[rows] for rows in parts]))
    usable = [each for each in drawn if np.isfinite(each)]
    low, high = _ends(np.array(usable), LEVEL) if usable else (None, None)
    return Estimate(spearman(first, second, groups), low, high)


def spearman(first: Sequence[float], second: Sequence[float], groups: Sequence[Any] | None = None) -> float:
    """As `correlation`, the number alone."""
    one, other, members = np.asarray(first, float), np.asarray(second, float), _members(len(first), groups)
    return _spearman([one[rows] for rows in members], [other[rows] for rows in members])


def _members(number: int, groups: Sequence[Any] | None) -> list[np.ndarray]:
    """The places of every group's entries."""
    if groups is None:
        return [np.arange(number)]
    of = np.unique([str(group) for group in groups], return_inverse=True)[1]
    return [np.flatnonzero(of == group) for group in range(of.max() + 1)]


def _spearman(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Of values in groups: Pearson's of the places within them, as shares of the group."""
    one, other = (np.concatenate([(_ranks(each) - (len(each) - 1) / 2) / len(each) for each in side]) for side in (first, second))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ties share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def weighted_mean(sides: Sequence[tuple[float, Sequence[Sample]]], level: float = LEVEL) -> Estimate:
    """Mean over sets of a weighted sum of rates.

    Args:
        sides: a weight, and a sample for every set: [(1, a), (-1, b)] is how much lower b is.
        level: of the interval. Clips or speakers are drawn again within each set, the same for all sides, and the seeds of every side.

    Raises:
        ValueError: There is no set, or the sides were measured on different clips of one.
    """
    num_sets = len(sides[0][1])
    if not num_sets:
        raise ValueError("There is no set to take a mean over.")
    value, drawn, usable = 0.0, np.zeros(_RESAMPLES), True
    shares: dict[Any, np.ndarray] = {}  # of each run in each resample
    for at in range(num_sets):
        samples = [(weight, each[at]) for weight, each in sides]
        known = samples[0][1]
        if not all(np.array_equal(known.lengths, sample.lengths) for _, sample in samples):
            raise ValueError(f"The systems were measured on different clips of set {at + 1} of {num_sets}.")
        lengths = _units(known.lengths[None], known.speakers)[0]  # (units,)
        usable &= len(lengths) > 1
        times = _times_drawn(len(lengths), at)  # (resamples, units)
        total = times @ lengths
        for weight, sample in samples:
            value += weight * sample.rate / num_sets
            key = sample.drawn_as or id(sample)
            if key not in shares:
                shares[key] = _shares(sample, len(shares))
            errors = times @ _units(sample.errors, known.speakers).T  # (resamples, runs)
            drawn += weight * (errors * shares[key]).sum(1) / total / num_sets
    low, high = _ends(drawn, level) if usable else (None, None)
    each, num_seeds = _by_seed(sides)
    return Estimate(float(value), low, high, None, each, num_seeds)


@lru_cache(maxsize=48)
def _times_drawn(num_units: int, at: int) -> np.ndarray:
    """How often each unit is in each resample. -> (resamples, units)"""
    return np.random.default_rng((0, at)).multinomial(num_units, np.full(num_units, 1 / num_units), size=_RESAMPLES).astype(float)


def _shares(sample: Sample, at: int) -> np.ndarray:
    """The weight of each run in each resample: all the same where there is nothing to draw. -> (resamples, runs)"""
    number = len(sample.errors)
    if number == 1 or not sample.trained:
        return np.full((_RESAMPLES, number), 1 / number)
    return np.random.default_rng((1, at)).multinomial(number, np.full(number, 1 / number), size=_RESAMPLES) / number


def _by_seed(sides: Sequence[tuple[float, Sequence[Sample]]]) -> tuple[tuple[float, ...], int]:
    """The value in every seed, and the number of seeds of the trained side that has the fewest."""
    fixed, of_runs = 0.0, []
    for weight, samples in sides:
        if not any(sample.trained for sample in samples):
            fixed += weight * float(np.mean([sample.rate for sample in samples]))
            continue
        rates = [dict(zip(sample.runs, sample.per_seed, strict=True)) for sample in samples]
        common = [run for run in rates[0] if all(run in each for each in rates)]  # in every set
        of_runs.append({run: weight * float(np.mean([each[run] for each in rates])) for run in common})
    if not of_runs:
        return (fixed,), 0
    if all(each.keys() == of_runs[0].keys() for each in of_runs):
        values = [sum(each[run] for each in of_runs) for run in of_runs[0]]
    else:
        values = [sum(chosen) for chosen in product(*(each.values() for each in of_runs))]
    return tuple(float(fixed + value) for value in values), min(len({seed for seed, _ in each}) for each in of_runs)


def _ends(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _units(per_clip: np.ndarray, speakers: list[str] | None) -> np.ndarray:
    """Speakers where there are enough, as `whisper_moe.intervals` does it. (rows, clips) -> (rows, units)"""
    if speakers is None or len(set(speakers)) < FEWEST_SPEAKERS:
        return per_clip.astype(float)
    order = {speaker: at for at, speaker in enumerate(dict.fromkeys(speakers))}
    sums = np.zeros((len(order), len(per_clip)))
    np.add.at(sums, [order[speaker] for speaker in speakers], per_clip.T)
    return sums.T
