"""Pieces between pauses, and languages that do not flicker: against every path there is."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from conftest import silence, tone
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.audio import find_windows
from whisper_moe.segments import SWITCH_COST, find_segments, steady_languages


def best_path(posteriors: list[dict[str, float]], durations: list[float], cost: float) -> tuple[float, set[tuple[str, ...]]]:
    """The greatest score and the paths that have it, found by trying all."""
    scores = {}
    for path in product(posteriors[0], repeat=len(posteriors)):
        heard = sum(
            min(1.0, length / 2) * np.log(max(each[code], 1e-4)) for code, each, length in zip(path, posteriors, durations, strict=True)
        )
        scores[path] = heard - cost * sum(a != b for a, b in pairwise(path))
    greatest = max(scores.values())
    return greatest, {path for path, score in scores.items() if score > greatest - 1e-9}


shares = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(lambda row: dict(zip(("en", "zh", "de"), row, strict=True)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(shares, st.floats(0.1, 10)), min_size=1, max_size=5), st.floats(0, 5))
def test_the_path_is_the_best_of_all_paths(pieces: list[tuple[dict[str, float], float]], cost: float) -> None:
    posteriors, durations = [each for each, _ in pieces], [length for _, length in pieces]
    found = tuple(steady_languages(posteriors, durations, switch_cost=cost))
    assert found in best_path(posteriors, durations, cost)[1]


def test_one_odd_piece_does_not_flicker_and_a_real_change_is_heard() -> None:
    english, odd, chinese = {"en": 0.9, "zh": 0.1}, {"en": 0.3, "zh": 0.7}, {"en": 0.02, "zh": 0.98}
    pieces = [english, english, odd, english, chinese, chinese]
    assert steady_languages(pieces, [3.0] * 6) == ["en"] * 4 + ["zh"] * 2
    assert steady_languages(pieces, [3.0] * 6, switch_cost=0) == ["en", "en", "zh", "en", "zh", "zh"]
    assert steady_languages([], []) == []
    with pytest.raises(ValueError, match="0 or more"):
        steady_languages(pieces, [3.0] * 6, switch_cost=-1)


def test_odds_of_two_changes_decide_about_one_piece_among_others() -> None:
    english = {"en": 0.999, "zh": 0.001}
    for factor, expected in ((0.98, "en"), (1.02, "zh")):
        odds = np.exp(2 * SWITCH_COST * factor)
        middle = {"en": 1 / (1 + odds), "zh": odds / (1 + odds)}
        assert steady_languages([english, middle, english], [5.0] * 3)[1] == expected


def test_a_short_piece_says_less() -> None:
    english, chinese = {"en": 0.9, "zh": 0.1}, {"en": 0.001, "zh": 0.999}
    assert steady_languages([english, chinese, english], [3.0, 3.0, 3.0])[1] == "zh"
    assert steady_languages([english, chinese, english], [3.0, 0.4, 3.0])[1] == "en"


def test_pieces_end_at_pauses_that_do_not_end_a_window() -> None:
    sound = np.concatenate([tone(300, 2), silence(0.6), tone(500, 2), silence(0.6), tone(300, 2)])
    assert len(find_windows(sound, 30.0)) == 1
    pieces = find_segments(sound, 30.0)
    middles = [2.3, 4.9]
    assert len(pieces) == 3
    for (first, second), middle in zip(pairwise(pieces), middles, strict=True):
        assert first.end_s <= middle <= second.start_s
        assert second.start_s - first.end_s < 0.6


def test_a_short_piece_joins_its_nearer_neighbour() -> None:
    sound = np.concatenate([tone(300, 2), silence(0.9), tone(500, 0.3), silence(0.5), tone(300, 2)])
    pieces = find_segments(sound, 30.0)
    assert [round(piece.end_s - piece.start_s, 1) for piece in pieces] == [pytest.approx(2.2, abs=0.2), pytest.approx(3.0, abs=0.3)]
    assert len(find_segments(sound, 30.0, shortest_s=0.1)) == 3
    assert len(find_segments(sound, 2.5)) == 3  # together they would be longer than a window
    bursts = np.concatenate([np.concatenate([tone(300, 0.3), silence(0.6)]) for _ in range(4)])
    assert len(find_segments(bursts, 30.0, shortest_s=0.1)) == 4
    assert len(find_segments(bursts, 30.0, shortest_s=2.5)) == 1  # what has joined is still too short, and joins again


def test_no_piece_is_longer_than_the_window_and_none_overlap() -> None:
    sound = np.concatenate([np.concatenate([tone(200 + 10 * i, 0.4 + 0.2 * (i % 5)), silence(0.41 + 0.1 * (i % 7))]) for i in range(30)])
    pieces = find_segments(sound, 5.0)
    assert all(piece.end_s - piece.start_s <= 5.0 + 1e-6 for piece in pieces)
    assert all(first.end_s <= second.start_s + 1e-6 for first, second in pairwise(pieces))
    assert find_segments(silence(3), 5.0) == []
    with pytest.raises(ValueError, match=r"at least 0\.4"):
        find_segments(sound, 5.0, pause_s=0.1)
