"""The heat map of a mixture: however many windows and pauses a recording has, its picture and its table stay small and true."""

from __future__ import annotations

import numpy as np
import pytest

from demo import heatmap
from whisper_moe.gate_map import GateMap


def windows(count: int, length_s: float, pause_s: float, *, seed: int = 0) -> GateMap:
    """Windows with pauses between them, each with gates of its own."""
    starts = 0.5 + (length_s + pause_s) * np.arange(count)
    share = np.random.default_rng(seed).uniform(size=count)
    return GateMap(("cy", "qug"), np.stack([starts, starts + length_s], axis=1), np.stack([share, 1 - share], axis=1), False)


@pytest.mark.parametrize(("count", "length_s", "pause_s"), [(120, 4.5, 0.5), (33, 0.6, 0.0), (21, 0.1, 30.0), (6000, 0.1, 0.0)])
@pytest.mark.parametrize("most", [heatmap.MOST_ROWS, heatmap.MOST_COLUMNS])
def test_no_more_stretches_than_asked_for_and_none_is_lost(count, length_s, pause_s, most):
    found = windows(count, length_s, pause_s)
    times, weights = heatmap._coarser(found.times_s, found.weights, most)
    assert len(times) == len(weights) <= most
    assert (times[0, 0], times[-1, 1]) == (found.times_s[0, 0], found.times_s[-1, 1])
    assert (times[1:, 0] >= times[:-1, 1] - 1e-9).all(), "in order, and none twice"
    seen = 0
    for (start, end), mean in zip(times, weights, strict=True):
        own = (found.times_s[:, 0] >= start - 1e-9) & (found.times_s[:, 1] <= end + 1e-9)
        assert mean == pytest.approx(found.weights[own].mean(axis=0))
        seen += own.sum()
    assert seen == count


def test_unequal_stretches_count_by_their_lengths():
    times = np.array([[0.0, 3.0], [3.0, 4.0], [50.0, 60.0]])
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    shown, means = heatmap._coarser(times, weights, 2)
    assert shown.tolist() == [[0.0, 4.0], [50.0, 60.0]]
    assert means.tolist() == [[0.75, 0.25], [0.5, 0.5]]


def test_few_long_windows_stay_as_they_are():
    found = windows(3, 20.0, 1.0)
    assert heatmap._coarser(found.times_s, found.weights, heatmap.MOST_ROWS)[0] is found.times_s


def test_the_table_of_ten_minutes_of_short_sentences_has_few_rows():
    assert heatmap._table(windows(120, 4.5, 0.5), ["cy", "qug"]).count("<tr>") <= heatmap.MOST_ROWS + 1  # and its head
