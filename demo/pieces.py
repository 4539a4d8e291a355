"""Sound that is still coming in, cut at its pauses into pieces that are ready to be written down. Knows samples, no models.

How the sound is chopped on its way here makes no difference: it is looked at in steps of a quarter of a second, whenever they are full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from whisper_moe.audio import SAMPLE_RATE, find_windows, load_audio
from whisper_moe.segments import PAUSE_S, SHORTEST_S

if TYPE_CHECKING:
    import soxr

LONGEST_S = 15.0
"""A longer piece is cut where it is quietest: nobody wants to wait longer for the final words. Ours."""
WAIT_S = 0.4
"""So long after a piece's end (which lies 0.2 s after its last sound) it counts as finished. Ours."""
WAIT_SHORT_S = 1.3
"""The same for a piece that is too short to tell a language by: it is joined to the next one if that comes soon. Ours."""

_STEP = SAMPLE_RATE // 4
_BEFORE = 10 * SAMPLE_RATE  # finished sound that is kept: how loud speech and noise are is judged by it
_ONSET = SAMPLE_RATE // 2  # of silence that is kept: it may turn out to be the beginning of something
_FRAME = SAMPLE_RATE // 50
_REMAINS = 3 * SAMPLE_RATE // 10  # what is left of a phrase that was cut counts from this length on: less is the echo of a word


@dataclass(frozen=True)
class Piece:
    """A stretch of sound.

    Args:
        start_s, end_s: Where it lies in all that came in.
        samples: `(samples,)` float32 at 16 kHz.
    """

    start_s: float
    end_s: float
    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Pieces:
    """Takes sound, gives finished pieces, and the one that is not finished yet.

    Args:
        window_s: The length of the model's window; no piece is longer.
    """

    def __init__(self, window_s: float) -> None:
        self._longest = round(min(window_s, LONGEST_S) * SAMPLE_RATE)
        self._rate = SAMPLE_RATE
        self._stream: soxr.ResampleStream | None = None  # resamples what comes in at `_rate`
        self._sound = np.zeros(0, np.float32)
        self._first = 0  # samples that came before those in `_sound`; below, all counts are from the very first one
        self._cut = 0  # up to here all is finished, or silent
        self._seen = 0  # up to here it was looked at

    @property
    def total_s(self) -> float:
        """Length of everything that came in."""
        return self._total / SAMPLE_RATE

    @property
    def _total(self) -> int:
        return self._first + len(self._sound)

    def add(self, rate: int, array: np.ndarray) -> list[Piece]:
        """Take sound as `load_audio` takes arrays, and give the pieces that it finishes. Raises `AudioError` if it cannot be used."""
        if len(array) == 0:
            return []
        samples = load_audio((SAMPLE_RATE, array))  # mono floats; their true rate is dealt with here, across the borders of what came in
        self._append(self._resampled(rate, samples))
        found: list[Piece] = []
        while self._seen + _STEP <= self._total:
            self._seen += _STEP
            found += self._finished(self._seen)
        return found

    def finish(self) -> list[Piece]:
        """No more sound comes for now: everything that was said is finished."""
        if self._stream is not None:
            self._append(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
            self._stream = None
        self._seen = self._total
        found = self._finished(self._seen, is_end=True)
        self._forget(self._total)
        return found

    def unfinished(self) -> Piece | None:
        """What is being said now; None if nothing is."""
        phrases = self._phrases(self._seen)
        return self._piece(phrases[0][0], phrases[-1][1]) if phrases else None

    # ---- inside: counts of samples -----------------------------------------------------------------------------------------

    def _resampled(self, rate: int, samples: np.ndarray) -> np.ndarray:
        import soxr

        if rate != self._rate:
            if self._stream is not None:
                self._append(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
            load_audio((rate, np.zeros(1000, np.float32)))  # refuses what is no rate
            self._rate, self._stream = rate, None
        if rate == SAMPLE_RATE:
            return samples
        if self._stream is None:
            self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, num_channels=1, dtype="float32")
        resampled: np.ndarray = self._stream.resample_chunk(np.ascontiguousarray(samples))
        return resampled

    def _append(self, samples: np.ndarray) -> None:
        self._sound = np.concatenate([self._sound, samples])

    def _finished(self, upto: int, is_end: bool = False) -> list[Piece]:
        """The pieces that are finished when `upto` has been heard."""
        found = []
        while (piece := self._next(self._phrases(upto), upto, is_end)) is not None:
            found.append(self._piece(*piece))
            self._forget(piece[1])
        return found

    def _next(self, phrases: list[tuple[int, int]], upto: int, is_end: bool) -> tuple[int, int] | None:
        """The first piece if it is finished. Short phrases join the one that follows soon."""
        if not phrases:
            self._forget(upto if is_end else max(self._cut, upto - _ONSET))
            return None
        (start, end), rest = phrases[0], phrases[1:]
        while rest and end - start < SHORTEST_S * SAMPLE_RATE and self._may_join(start, end, *rest[0]):
            end, rest = rest[0][1], rest[1:]
        if end - start > self._longest:
            return start, self._quietest(start + self._longest // 2, start + self._longest)
        wait = WAIT_SHORT_S if end - start < SHORTEST_S * SAMPLE_RATE else WAIT_S
        return (start, end) if rest or is_end or upto - end >= wait * SAMPLE_RATE else None

    def _may_join(self, start: int, end: int, next_start: int, next_end: int) -> bool:
        return next_start - end < WAIT_SHORT_S * SAMPLE_RATE and next_end - start <= self._longest

    def _phrases(self, upto: int) -> list[tuple[int, int]]:
        """Start and end of what may be speech between the last cut and `upto`, judged together with what came before it."""
        heard = self._sound[: upto - self._first]
        spans = find_windows(heard, len(heard) / SAMPLE_RATE + 1, PAUSE_S) if len(heard) else []
        places = [(self._first + round(span.start_s * SAMPLE_RATE), self._first + round(span.end_s * SAMPLE_RATE)) for span in spans]
        return [(max(start, self._cut), end) for start, end in places if end - self._cut > (_REMAINS if start < self._cut else 0)]

    def _quietest(self, earliest: int, latest: int) -> int:
        """The middle of the quietest 0.2 s between two places."""
        sound = self._sound[earliest - self._first : latest - self._first]
        frames = sound[: len(sound) // _FRAME * _FRAME].reshape(-1, _FRAME)
        loudness = np.convolve(np.square(frames, dtype=np.float64).mean(axis=1), np.full(10, 0.1), mode="valid")
        latest_quietest = len(loudness) - 1 - int(loudness[::-1].argmin())
        return earliest + (latest_quietest + 5) * _FRAME

    def _piece(self, start: int, end: int) -> Piece:
        samples = self._sound[start - self._first : end - self._first].copy()
        return Piece(start / SAMPLE_RATE, end / SAMPLE_RATE, samples)

    def _forget(self, cut: int) -> None:
        """All before `cut` is finished: let go of it, apart from what the next pieces are judged by."""
        self._cut = max(self._cut, cut)
        first = max(self._first, self._cut - _BEFORE)
        self._sound, self._first = self._sound[first - self._first :], first
