"""Speech that changes its language: a recording cut at its pauses, and a language for each piece that does not flicker.

The time resolution is that of the pieces. A change of language without a pause is heard as whatever the piece sounds like as a whole, and
nothing here pretends otherwise. Knows samples and probabilities, no models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from whisper_moe.audio import Span, find_windows

PAUSE_S = 0.4
"""A pause this long ends a piece. Shorter ones occur inside of words and phrases. Ours."""
SHORTEST_S = 1.0
"""A piece shorter than this joins its nearer neighbour: one syllable does not tell a language. Ours."""
SWITCH_COST = 2.0
"""What a change of language costs, in nats: one odd piece among others has to be heard with odds of e^4 = 55 to 1. Ours."""

_FULL_WEIGHT_S = 2.0  # a piece this long counts in full, a shorter one by its share
_LEAST = 1e-4  # no single piece may rule a language out


def find_segments(samples: np.ndarray, window_s: float, *, pause_s: float = PAUSE_S, shortest_s: float = SHORTEST_S) -> list[Span]:
    """The pieces between pauses, in order, none longer than the model's window.

    Args:
        samples: `(samples,)` at 16 kHz.
        window_s: The length of the model's window.
        pause_s: A pause this long ends a piece.
        shortest_s: A shorter piece joins the neighbour that is nearer, where both fit a window together.
    """
    pieces = find_windows(samples, window_s, pause_s)
    index = 0
    while index < len(pieces):
        piece = pieces[index]
        near = [other for other in (index - 1, index + 1) if 0 <= other < len(pieces)]
        near = [other for other in near if _joined(piece, pieces[other]).end_s - _joined(piece, pieces[other]).start_s <= window_s]
        if piece.end_s - piece.start_s >= shortest_s or not near:
            index += 1
            continue
        other = min(near, key=lambda each: _gap(piece, pieces[each]))
        first = min(index, other)
        pieces[first : first + 2] = [_joined(pieces[first], pieces[first + 1])]
        index = first  # it may still be too short
    return pieces


def _joined(first: Span, second: Span) -> Span:
    return Span(min(first.start_s, second.start_s), max(first.end_s, second.end_s))


def _gap(first: Span, second: Span) -> float:
    return max(second.start_s - first.end_s, first.start_s - second.end_s)


def steady_languages(
    posteriors: Sequence[Mapping[str, float]], durations_s: Sequence[float], *, switch_cost: float = SWITCH_COST
) -> list[str]:
    """The language of every piece: the path of greatest probability when each change of language costs something (Viterbi).

    Maximises  sum_i w_i log p_i(l_i)  -  switch_cost * (number of i with l_i != l_(i-1)),  w_i = min(1, duration_i / 2 s).

    Args:
        posteriors: Of each piece: code -> probability, over the same languages.
        durations_s: Of each piece.
        switch_cost: In nats; 0: each piece by itself.
    """
    if not posteriors:
        return []
    if switch_cost < 0 or math.isnan(switch_cost):
        raise ValueError(f"switch_cost is 0 or more; got {switch_cost}.")
    codes = list(posteriors[0])
    weights = np.minimum(1.0, np.asarray(durations_s) / _FULL_WEIGHT_S)
    scores = np.log([[max(each[code], _LEAST) for code in codes] for each in posteriors]) * weights[:, None]  # (pieces, languages)
    best, came_from = scores[0], []
    for row in scores[1:]:
        leader = int(best.argmax())
        changes = best < best[leader] - switch_cost
        came_from.append(np.where(changes, leader, np.arange(len(codes))))
        best = np.where(changes, best[leader] - switch_cost, best) + row
    path = [int(best.argmax())]
    for back in reversed(came_from):
        path.append(int(back[path[-1]]))
    return [codes[index] for index in reversed(path)]
