"""How far an error rate can be trusted: bootstrap intervals, and whether one adapter is better than another on the same clips.

Counts per clip in, numbers out; knows no text and no models. An error rate is a ratio of sums (errors over words), so what is drawn
again are whole clips, or whole speakers: clips of one speaker resemble each other, and an interval that ignores it is too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

FEWEST_SPEAKERS = 10
"""With fewer, speakers are too few to be drawn from, and clips are."""
_EXACT_UP_TO = 12  # clips: 2**12 ways to swap are all tried


@dataclass(frozen=True)
class Interval:
    """A rate and where it would lie for other clips of the same kind.

    Args:
        value: The rate on these clips, as a fraction.
        low, high: Percentile bootstrap; None where fewer than two units were there to draw from.
        level: Share of sets for which such an interval holds the true rate.
        unit: What was drawn: "clips" or "speakers".
        num_units: How many of them there are.
    """

    value: float
    low: float | None
    high: float | None
    level: float
    unit: str
    num_units: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Difference:
    """How much lower the second rate is than the first on the same clips; above 0: the second is better.

    Args:
        value: First rate less second, as a fraction.
        low, high: Percentile bootstrap of the pairs; None for a single unit.
        p_value: Probability of a difference this large, in either direction, if it were a coin's toss for every clip (or speaker) which of
            the two wrote which text: a randomisation test.
        exact: Whether all ways to toss were tried, or some drawn.
        unit, num_units, level: As in `Interval`.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float
    exact: bool
    level: float
    unit: str
    num_units: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_rate(
    errors: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    speakers: Sequence[str | None] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of sum(errors) / sum(lengths).

    Args:
        errors, lengths: (clips,) of words, or of characters.
        speakers: who spoke each clip; drawn as wholes if all are named and there are at least `FEWEST_SPEAKERS`.
        level: of the interval.
        num_resamples: sets drawn.
        seed: of the draws.
    """
    _check(level, num_resamples)
    sums, unit = _units(np.stack([errors, lengths], axis=1), speakers)  # (units, 2)
    total_errors, total = sums.sum(0)
    if total == 0:
        raise ValueError("The references have no length, so an error rate is undefined.")
    low, high = None, None
    if len(sums) > 1:
        drawn = _resampled(sums, num_resamples, seed)  # (resamples, 2)
        low, high = _percentiles(drawn[:, 0], drawn[:, 1], level)
    return Interval(float(total_errors / total), low, high, level, unit, len(sums))


def paired_difference(
    first: Sequence[int] | np.ndarray,
    second: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    speakers: Sequence[str | None] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same clips.

    Args:
        first, second: (clips,) errors of each.
        lengths: (clips,) of the references, the same for both.
        speakers, level, num_resamples, seed: as in `bootstrap_rate`.
    """
    _check(level, num_resamples)
    if not len(first) == len(second) == len(lengths):
        raise ValueError(f"{len(first)} clips of one system, {len(second)} of the other, {len(lengths)} lengths: pairs are needed.")
    gains = np.asarray(first, np.int64) - np.asarray(second, np.int64)
    sums, unit = _units(np.stack([gains, lengths], axis=1), speakers)  # (units, 2)
    gain, total = sums.sum(0)
    if total == 0:
        raise ValueError("The references have no length, so an error rate is undefined.")
    low, high = None, None
    if len(sums) > 1:
        drawn = _resampled(sums, num_resamples, seed)
        low, high = _percentiles(drawn[:, 0], drawn[:, 1], level)
    p_value, exact = _swap_test(sums[:, 0], num_resamples, seed)
    return Difference(float(gain / total), low, high, p_value, exact, level, unit, len(sums))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several comparisons, raised so that the chance of any false alarm among them stays what one would have (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


def _check(level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it is a share between 0 and 1, such as 0.95.")
    if num_resamples < 100:
        raise ValueError(f"num_resamples is {num_resamples}; fewer than 100 say nothing about a tail. 2000 is usual.")


def _units(per_clip: np.ndarray, speakers: Sequence[str | None] | None) -> tuple[np.ndarray, str]:
    """Sums over what is drawn as a whole. (clips, 2) -> (units, 2)"""
    if speakers is None or None in speakers or len(set(speakers)) < FEWEST_SPEAKERS:
        return per_clip, "clips"
    if len(speakers) != len(per_clip):
        raise ValueError(f"{len(per_clip)} clips and {len(speakers)} speakers: there must be one of each.")
    order = {speaker: at for at, speaker in enumerate(dict.fromkeys(speakers))}
    sums = np.zeros((len(order), per_clip.shape[1]), per_clip.dtype)
    np.add.at(sums, [order[speaker] for speaker in speakers], per_clip)
    return sums, "speakers"


def _resampled(sums: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Totals of sets of as many units, drawn with replacement. (units, 2) -> (resamples, 2)"""
    rng = np.random.default_rng(seed)
    parts = []
    rows = max(1, 4_000_000 // len(sums))  # sets at a time: the table of draws stays at some 32 MB
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, num_resamples - start), len(sums)))
        parts.append(sums[drawn].sum(1))
    return np.concatenate(parts)


def _percentiles(numerators: np.ndarray, denominators: np.ndarray, level: float) -> tuple[float, float]:
    usable = denominators > 0  # a set of empty references alone has no rate
    rates = numerators[usable] / denominators[usable]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _swap_test(gains: np.ndarray, num_resamples: int, seed: int) -> tuple[float, bool]:
    """Two-sided p value of the sum of gains, had each of them either sign with equal chance; and whether it is exact."""
    gains = gains[gains != 0]  # a tie stays a tie
    observed = abs(int(gains.sum()))
    if len(gains) <= _EXACT_UP_TO:
        signs = np.array(list(product((-1, 1), repeat=len(gains))), np.int64).reshape(2 ** len(gains), len(gains))
        return float(np.mean(np.abs(signs @ gains) >= observed)), True
    rng = np.random.default_rng(seed)
    at_least, rows = 0, max(1, 4_000_000 // len(gains))
    for start in range(0, num_resamples, rows):
        signs = rng.integers(2, size=(min(rows, num_resamples - start), len(gains))) * 2 - 1
        at_least += int((np.abs(signs @ gains) >= observed).sum())
    return (at_least + 1) / (num_resamples + 1), False  # the observed one counts as drawn: no p value is 0
