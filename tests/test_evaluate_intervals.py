"""Intervals and tests against the plain loop, the exact enumeration, the normal approximation, and sets whose true rate is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_moe.intervals import FEWEST_SPEAKERS, bootstrap_rate, holm, paired_difference


def clips(number: int, rate: float = 0.2, words: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(clips,) errors and lengths of a system with a known error rate."""
    rng = np.random.default_rng(seed)
    return rng.binomial(words, rate, number), np.full(number, words)


def test_the_interval_is_that_of_a_plain_loop_over_the_same_draws() -> None:
    errors, lengths = clips(30)
    lengths = lengths + np.arange(30) % 7
    interval = bootstrap_rate(errors, lengths, num_resamples=300, seed=5)
    rng, rates = np.random.default_rng(5), []
    draws = rng.integers(30, size=(300, 30))
    for row in draws.tolist():
        wrong = said = 0
        for clip in row:
            wrong, said = wrong + int(errors[clip]), said + int(lengths[clip])
        rates.append(wrong / said)
    assert interval.value == pytest.approx(errors.sum() / lengths.sum())
    assert (interval.low, interval.high) == pytest.approx((np.quantile(rates, 0.025), np.quantile(rates, 0.975)))


def test_the_interval_agrees_with_the_normal_approximation_where_that_holds() -> None:
    errors, lengths = clips(2000)
    interval = bootstrap_rate(errors, lengths)
    spread = 1.96 * (errors / 10).std() / 2000**0.5
    assert interval.high - interval.low == pytest.approx(2 * spread, rel=0.08)


def test_intervals_hold_the_true_rate_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        interval = bootstrap_rate(*clips(60, seed=seed), num_resamples=400, seed=seed)
        held += interval.low <= 0.2 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_clips_of_one_speaker_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    speakers = [f"s{at // 20}" for at in range(300)]  # 15 speakers, each good or bad throughout
    errors = rng.binomial(10, np.repeat(rng.choice([0.05, 0.5], 15), 20))
    lengths = np.full(300, 10)
    by_clip, by_speaker = bootstrap_rate(errors, lengths), bootstrap_rate(errors, lengths, speakers)
    assert (by_clip.unit, by_speaker.unit, by_speaker.num_units) == ("clips", "speakers", 15)
    assert by_clip.value == by_speaker.value
    assert by_speaker.high - by_speaker.low > 2 * (by_clip.high - by_clip.low)


def test_few_or_unnamed_speakers_are_not_drawn_from() -> None:
    errors, lengths = clips(40)
    assert bootstrap_rate(errors, lengths, ["a", "b"] * 20).unit == "clips"
    assert bootstrap_rate(errors, lengths, [None, *(str(at) for at in range(39))]).unit == "clips"
    assert bootstrap_rate(errors, lengths, [str(at % FEWEST_SPEAKERS) for at in range(40)]).unit == "speakers"


def test_one_clip_has_a_rate_and_no_interval() -> None:
    interval = bootstrap_rate([1], [4])
    assert (interval.value, interval.low, interval.high, str(interval)) == (0.25, None, None, "25.0%")


def test_empty_references_count_as_inserted_and_nothing_else_is_refused() -> None:
    interval = bootstrap_rate([3, 0, 1], [0, 5, 5])
    assert interval.value == 0.4
    assert np.isfinite([interval.low, interval.high]).all()
    with pytest.raises(ValueError, match="undefined"):
        bootstrap_rate([1, 2], [0, 0])


@pytest.mark.parametrize(("options", "words"), [({"level": 95}, "between 0 and 1"), ({"num_resamples": 10}, "2000 is usual")])
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bootstrap_rate([1, 2], [5, 5], **options)


# ---- pairs -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9))
def test_the_p_value_of_few_clips_is_the_count_over_all_swaps(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = paired_difference(first, second, [6] * len(pairs))
    observed = abs(sum(first) - sum(second))
    at_least = total = 0
    for swapped in product((False, True), repeat=len(pairs)):
        gap = sum((b - a) if swap else (a - b) for swap, (a, b) in zip(swapped, pairs, strict=True))
        at_least, total = at_least + (abs(gap) >= observed), total + 1
    assert found.exact
    assert found.p_value == pytest.approx(at_least / total)
    assert found.value == pytest.approx((sum(first) - sum(second)) / (6 * len(pairs)))


def test_a_drawn_p_value_is_near_the_exact_one() -> None:
    rng = np.random.default_rng(2)
    gains = rng.integers(-3, 5, 14)
    gains = gains[gains != 0]
    signs = np.array(list(product((-1, 1), repeat=len(gains))))
    exact = np.mean(np.abs(signs @ gains) >= abs(gains.sum()))
    import whisper_moe.intervals as module

    drawn, _ = module._swap_test(np.concatenate([gains, np.zeros(5, int)]), 20_000, 0)
    limit, module._EXACT_UP_TO = module._EXACT_UP_TO, 2
    try:
        sampled, was_exact = module._swap_test(gains, 20_000, 0)
    finally:
        module._EXACT_UP_TO = limit
    assert not was_exact
    assert sampled == pytest.approx(exact, abs=0.015)
    assert drawn == pytest.approx(exact, abs=0.015)


def test_equal_systems_differ_by_chance_and_unequal_ones_do_not() -> None:
    alarms = 0
    for seed in range(100):
        first, lengths = clips(50, seed=2 * seed)
        second, _ = clips(50, seed=2 * seed + 1)
        alarms += paired_difference(first, second, lengths, num_resamples=400, seed=seed).p_value < 0.05
    assert alarms <= 12
    better, lengths = clips(50, rate=0.05)
    worse, _ = clips(50, rate=0.3, seed=1)
    found = paired_difference(worse, better, lengths)
    assert found.p_value < 0.001
    assert 0 < found.low < found.value < found.high


def test_a_pair_is_surer_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.integers(0, 9, 80)  # most of the spread is the clips' own, and both systems share it
    first, second = difficulty + rng.integers(0, 2, 80), difficulty
    alone = bootstrap_rate(first, np.full(80, 10))
    together = paired_difference(first, second, np.full(80, 10))
    assert together.high - together.low < (alone.high - alone.low) / 3
    assert together.p_value < 0.01


def test_pairs_need_the_same_clips() -> None:
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_difference([1, 2], [1], [5, 5])


def test_identical_systems_have_no_difference() -> None:
    errors, lengths = clips(20)
    found = paired_difference(errors, errors, lengths)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_holm_as_in_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]
