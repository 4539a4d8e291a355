"""Live transcription: sound goes in as it comes, and there is always something to show. No Gradio, no HTML.

A finished piece is written once and for good; what is being said now is written again and again as a preview. If the machine is slower
than the speaker, previews are left out first, and then it is said how far behind it is. A `LiveSession` does one thing at a time when it
is told to (`work`), so that tests can be its clock; `LiveSessions` gives each visitor's session a thread that tells it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from whisper_moe import Segment, language_name
from whisper_moe.segments import SHORTEST_S, steady_languages

from .pieces import Piece, Pieces
from .stops import Run, StoppedError

if TYPE_CHECKING:
    from whisper_moe import Transcript

AT_ONCE = 16  # people who may speak at the same time
KEPT = 64  # sessions whose text is kept, with those of people who have stopped
IDLE_S = 900.0  # a session nobody looks at or speaks to is forgotten after this long
SHOWN_BEHIND_S = 4.0  # a shorter delay is nothing to speak of
MOST_BEHIND_S = 120.0  # of sound that waits to be written; beyond it no more is taken
MOST_AT_A_TIME_S = 60.0  # of sound in one call: what a call costs is bounded by it
RATES = 8_000, 192_000  # Hz, of microphones

_GONE_S = 3.0  # a microphone sends even silence, or the recorder that it is still on: without either for so long, it is off
_SWEEP_EVERY_S = 60.0  # sessions that nobody uses are looked for
_PREVIEW_EVERY_S = 0.6  # of new sound
_PIECES_REMEMBERED = 30  # by which a change of language is judged
_UNLIKELY = 1e-4  # of a language that a transcript does not name


class Writes(Protocol):
    """What a session needs of a `Transcriber`."""

    window_s: float

    def transcribe(self, audio: Any, *, language: str | None, on_progress: Callable[[float, str], None]) -> Transcript: ...


@dataclass(frozen=True)
class LivePiece:
    """What was said in one piece.

    Args:
        start_s, end_s: Where it lies.
        text: What was said.
        language: The code of its language.
        probability: How probable that is; None if the language was given.
        adapter: Name of the adapter that wrote it; None for the base model alone.
    """

    start_s: float
    end_s: float
    text: str
    language: str | None
    probability: float | None
    adapter: str | None


@dataclass(frozen=True)
class Live:
    """A session as it is now.

    Args:
        pieces: What was said, for good.
        preview: What is being said, as far as it can be told; it may change.
        heard_s: Length of what came in.
        behind_s: For how long the oldest finished piece has been waiting, in seconds of sound; 0 if that is nothing to speak of.
        is_listening: Whether more sound is expected.
        is_working: Whether something waits to be written.
        notes: What the visitor should know.
    """

    pieces: tuple[LivePiece, ...] = ()
    preview: LivePiece | None = None
    heard_s: float = 0.0
    behind_s: float = 0.0
    is_listening: bool = False
    is_working: bool = False
    notes: tuple[str, ...] = ()


class LiveSession:
    """One visitor who speaks. `hear`, `finish` and `look` come back at once; `work` takes as long as the model does.

    Args:
        transcriber: Who writes.
        max_duration_s: Sound beyond this is not taken.
        clock: Seconds, rising.
    """

    def __init__(self, transcriber: Writes, *, max_duration_s: float = 600, clock: Callable[[], float] = time.monotonic) -> None:
        self._transcriber, self._max_duration_s, self._clock = transcriber, max_duration_s, clock
        self._changed = threading.Condition()  # its lock guards everything below
        self._run = Run()
        self._pieces = Pieces(transcriber.window_s)
        self._language: str | None = None
        self._waiting: deque[Piece] = deque()
        self._current: Piece | None = None
        self._written: list[tuple[LivePiece, Transcript]] = []
        self._posteriors: deque[tuple[Mapping[str, float], float]] = deque(maxlen=_PIECES_REMEMBERED)  # and lengths
        self._preview: LivePiece | None = None
        self._previewed_s = 0.0  # how much had been heard when the last preview was begun
        self._rest_until = -float("inf")  # no preview before: it gets half of the time at most
        self._elapsed_s = 0.0
        self._is_listening = False
        self._is_full = False
        self._notes: dict[str, None] = {}
        self._heard_at = clock()
        self.used_at = clock()  # heard from, or looked at

    # ---- from the page ---------------------------------------------------------------------------------------------------

    def hear(self, rate: int, samples: np.ndarray, language: str | None = None) -> None:
        """Take sound.

        Args:
            rate: Hz.
            samples: `(samples,)` or `(samples, channels)`, integers or floats.
            language: The language, if it is known; None: each piece tells its own.

        Raises:
            ValueError: No rate of a microphone, or more than `MOST_AT_A_TIME_S`.
            AudioError: It is no sound.
        """
        check_sound(rate, samples)
        with self._changed:
            self._heard_at = self.used_at = self._clock()
            if self._is_full or len(samples) == 0:
                return
            room = max(0, round((self._max_duration_s - self._pieces.total_s) * rate))
            finished = self._pieces.add(rate, samples[:room])
            self._language, self._is_listening = language, True
            self._waiting.extend(finished)
            self._stop_if_full(is_cut=room < len(samples))
            self._changed.notify_all()

    def still_on(self) -> None:
        """The microphone is on, though its sound may be long on its way."""
        with self._changed:
            self._heard_at = self.used_at = self._clock()

    def finish(self) -> None:
        """The microphone is off. What was said until now will still be written."""
        with self._changed:
            self._finish()
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody wants the rest any more."""
        self._run.stop()
        with self._changed:
            self._waiting.clear()
            self._finish()
            self._waiting.clear()
            self._changed.notify_all()

    def look(self) -> Live:
        """The session as it is now."""
        with self._changed:
            self.used_at = self._clock()
            oldest = self._current or (self._waiting[0] if self._waiting else None)
            behind_s = 0.0 if oldest is None else self._pieces.total_s - oldest.end_s
            return Live(
                pieces=tuple(piece for piece, _ in self._written),
                preview=self._preview,
                heard_s=self._pieces.total_s,
                behind_s=behind_s if behind_s >= SHOWN_BEHIND_S else 0.0,
                is_listening=self._is_listening,
                is_working=oldest is not None,
                notes=tuple(self._notes),
            )

    def transcript(self) -> Transcript:
        """Everything that was written so far as one transcript. Raises `ValueError` if nothing was."""
        with self._changed:
            written, notes, heard_s, elapsed_s = [*self._written], tuple(self._notes), self._pieces.total_s, self._elapsed_s
        if not written:
            raise ValueError("Nothing was written down yet. Press Record, and speak.")
        return _as_one(written, notes, heard_s, elapsed_s)

    # ---- the work --------------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do until more sound comes. Waits for nobody: it is asked of all sessions, busy ones too."""
        return not self._is_listening and not self._waiting and self._current is None

    def work(self) -> bool:
        """Write the oldest finished piece or, if there is none, a preview. Returns whether there was anything to do."""
        with self._changed:
            self._notice_silence()
            preview = None
            if self._waiting:
                self._current = self._waiting[0]  # in this order: at no moment does it look as if there were nothing left
                self._waiting.popleft()
            else:
                preview = self._next_preview()
            language, piece = self._language, self._current
        try:
            if piece is not None:
                self._write(piece, language)
            elif preview is not None:
                self._write_preview(preview, language)
        except StoppedError:
            return False
        finally:
            with self._changed:
                self._current = None
                self._changed.notify_all()
        return piece is not None or preview is not None

    def serve(self) -> None:
        """Work until there is nothing left to do."""
        try:
            while not self.is_over:
                if not self.work():
                    self.wait(0.1)
        except BaseException:
            with self._changed:
                self._notes["Something went wrong here, and a piece of what you said is missing. The log of this page says more."] = None
            raise

    def wait(self, seconds: float) -> None:
        """Until something has changed, or so long."""
        with self._changed:
            self._changed.wait(seconds)

    def _write(self, piece: Piece, language: str | None) -> None:
        started = self._clock()
        try:
            found = self._transcribe(piece, language)
            probabilities = found.probabilities
            if language is None and found.language is not None:
                steady = self._steady(probabilities, piece.duration_s)
                if steady != found.language:  # one odd piece is no change of language
                    found = self._transcribe(piece, steady)
        except ValueError as error:
            with self._changed:
                self._notes[f"A piece could not be written: {error}"] = None
            return
        with self._changed:
            self._elapsed_s += self._clock() - started
            if self._preview is not None and self._preview.start_s < piece.end_s:
                self._preview = None
            if found.language is None or not found.text:
                return  # nobody speaks there
            if probabilities and language is None:
                self._posteriors.append((probabilities, piece.duration_s))
            self._written.append((_as_piece(piece, found, probabilities), found))
            self._notes |= dict.fromkeys(found.warnings)

    def _write_preview(self, piece: Piece, language: str | None) -> None:
        started = self._clock()
        try:
            found = self._transcribe(piece, language)
        except ValueError:
            return  # it is said when the piece is finished
        with self._changed:
            self._rest_until = 2 * self._clock() - started
            if found.text and (self._is_listening or self._waiting):
                self._preview = _as_piece(piece, found, found.probabilities)

    def _transcribe(self, piece: Piece, language: str | None) -> Transcript:
        return self._transcriber.transcribe(piece.samples, language=language, on_progress=lambda *_: self._run.check())

    def _steady(self, probabilities: Mapping[str, float], duration_s: float) -> str:
        """The language of a piece, after all that came before it."""
        rows = [*self._posteriors, (probabilities, duration_s)]
        codes = dict.fromkeys(code for row, _ in rows for code in row)
        full = [{code: row.get(code, _UNLIKELY) for code in codes} for row, _ in rows]
        return steady_languages(full, [length for _, length in rows])[-1]

    # ---- under the lock --------------------------------------------------------------------------------------------------

    def _next_preview(self) -> Piece | None:
        heard_s = self._pieces.total_s
        if not self._is_listening or heard_s - self._previewed_s < _PREVIEW_EVERY_S or self._clock() < self._rest_until:
            return None
        piece = self._pieces.unfinished()
        if piece is None:
            self._preview = None
        if piece is None or piece.duration_s < SHORTEST_S or piece.duration_s > self._transcriber.window_s:
            return None
        self._previewed_s = heard_s
        return piece

    def _notice_silence(self) -> None:
        if self._is_listening and self._clock() - self._heard_at > _GONE_S:
            self._finish()

    def _finish(self) -> None:
        self._waiting.extend(self._pieces.finish())
        self._is_listening = False
        if not self._waiting:
            self._preview = None

    def _stop_if_full(self, is_cut: bool) -> None:
        behind_s = sum(piece.duration_s for piece in self._waiting)
        if is_cut or self._pieces.total_s >= self._max_duration_s:
            note = f"Recording stopped: {self._max_duration_s / 60:g} minutes is the most that is taken. Clear begins anew."
        elif behind_s > MOST_BEHIND_S:
            note = f"Recording stopped: this machine is {behind_s:.0f} seconds behind. It writes the rest; Clear begins anew."
        else:
            return
        self._is_full = True
        self._notes[note] = None
        self._finish()


class LiveSessions:
    """The sessions of all visitors, each by a key of its own; those that nobody uses are forgotten.

    Args:
        transcriber: Who writes.
        max_duration_s: Of each.
        at_once: How many may speak at the same time.
        kept: How many are kept; beyond it, those of people who have stopped make room.
        sweep_every_s: How often those that nobody uses are looked for.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        transcriber: Writes,
        *,
        max_duration_s: float = 600,
        at_once: int = AT_ONCE,
        kept: int = KEPT,
        sweep_every_s: float = _SWEEP_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transcriber, self._max_duration_s, self._at_once, self._kept, self._clock = transcriber, max_duration_s, at_once, kept, clock
        self._sweep_every_s = sweep_every_s
        self._lock = threading.Lock()  # never held while a session's own lock is waited for: one busy session would stop all others
        self._sessions: OrderedDict[str, LiveSession] = OrderedDict()  # the one used longest ago first
        self._threads: dict[str, threading.Thread] = {}
        self._arriving: Counter[str] = Counter()  # whose sound was let in and is not heard yet
        self._sweeper: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def hear(self, key: str, rate: int, samples: np.ndarray, language: str | None = None) -> LiveSession:
        """Give sound to a visitor's session, which is made if there is none. Arguments and errors as for `LiveSession.hear`.

        Raises:
            ValueError: Too many people are speaking at the same time.
        """
        check_sound(rate, samples)
        self._sweep()
        with self._lock:
            session = self._sessions.get(key)
            is_new = session is None or (session.is_over and not self._arriving[key])
            busy = sum(not each.is_over or self._arriving[other] > 0 for other, each in self._sessions.items() if other != key)
            if busy >= self._at_once and is_new:
                raise ValueError(f"{busy} people are speaking here at the moment, which is all that is possible. Try again in a minute.")
            old = self._make_room() if session is None else []
            if session is None:
                session = LiveSession(self._transcriber, max_duration_s=self._max_duration_s, clock=self._clock)
                self._sessions[key] = session
            self._sessions.move_to_end(key)
            self._arriving[key] += 1
            self._watch()
        for other in old:
            other.stop()
        try:
            session.hear(rate, samples, language)
        finally:
            with self._lock:
                self._arriving[key] -= 1
                if not self._arriving[key]:
                    del self._arriving[key]
        self._see_to(key, session)
        return session

    def get(self, key: str) -> LiveSession | None:
        """A visitor's session, if there is one."""
        self._sweep()
        with self._lock:
            session = self._sessions.get(key)
        if session is not None:
            self._see_to(key, session)
        return session

    def forget(self, key: str) -> None:
        """End a visitor's session, and let go of what was said."""
        with self._lock:
            session = self._drop(key)
        if session is not None:
            session.stop()

    def _see_to(self, key: str, session: LiveSession) -> None:
        """Have a thread work for a session that has something to do."""
        with self._lock:
            thread = self._threads.get(key)
            if self._sessions.get(key) is session and not session.is_over and (thread is None or not thread.is_alive()):
                # In the visitor's context: ZeroGPU asks there whose minutes these are.
                self._threads[key] = threading.Thread(target=copy_context().run, args=(session.serve,), name="live", daemon=True)
                self._threads[key].start()

    def _sweep(self) -> None:
        """Forget those that nobody uses."""
        with self._lock:
            now = self._clock()
            idle = [self._drop(key) for key, session in [*self._sessions.items()] if now - session.used_at > IDLE_S]
        for session in idle:
            if session is not None:
                session.stop()

    def _watch(self) -> None:
        """Have a thread sweep for as long as there are sessions: the last visitor has nobody after whom to be swept. Under the lock."""
        if self._sweeper is None:
            self._sweeper = threading.Thread(target=self._sweep_now_and_then, name="live sweeper", daemon=True)
            self._sweeper.start()

    def _sweep_now_and_then(self) -> None:
        while True:
            time.sleep(self._sweep_every_s)
            self._sweep()
            with self._lock:
                if not self._sessions:
                    self._sweeper = None
                    return

    # ---- under the lock: what leaves is stopped by the caller, after it -----------------------------------------------------

    def _make_room(self) -> list[LiveSession]:
        """Let go of people who have stopped, until there is room for one more session."""
        over = [key for key, session in self._sessions.items() if session.is_over and not self._arriving[key]]
        dropped = [self._drop(key) for key in over[: max(0, len(self._sessions) - self._kept + 1)]]
        return [session for session in dropped if session is not None]

    def _drop(self, key: str) -> LiveSession | None:
        self._threads.pop(key, None)
        return self._sessions.pop(key, None)


def check_sound(rate: int, samples: np.ndarray) -> None:
    """Raise `ValueError` for what no microphone sends in one go. Costs nothing, whatever came."""
    lowest, highest = RATES
    if not lowest <= rate <= highest:
        raise ValueError(f"A sample rate of {rate} Hz is none of a microphone's; expected {lowest} to {highest} Hz.")
    if len(samples) > MOST_AT_A_TIME_S * rate:
        raise ValueError(f"{len(samples) / rate:.0f} seconds are too much sound at a time; expected {MOST_AT_A_TIME_S:g} at most.")


def _as_piece(piece: Piece, found: Transcript, probabilities: Mapping[str, float]) -> LivePiece:
    probability = probabilities.get(found.language) if found.language is not None and probabilities else None
    return LivePiece(piece.start_s, piece.end_s, found.text, found.language, probability, found.adapter)


def _as_one(written: list[tuple[LivePiece, Transcript]], notes: tuple[str, ...], heard_s: float, elapsed_s: float) -> Transcript:
    """One transcript of all pieces.

    What it says of the language is true of the language that was spoken longest; what it says of the writer and of the probabilities, of
    those of its pieces that were decided as most of its seconds were. So writer, reason and figures belong together.
    """
    by_language = _by_seconds(written, lambda piece, found: piece.language)
    own = next(iter(by_language.values()))
    main = next(iter(_by_seconds(own, lambda piece, found: (piece.adapter, found.fallback)).values()))
    shares = ", ".join(f"{language_name(code or '')} {_seconds(pieces):.1f} s" for code, pieces in by_language.items())
    probabilities = _mean_probabilities(main)
    segments = tuple(
        Segment(round(piece.start_s, 2), round(piece.end_s, 2), piece.text, piece.language, piece.adapter, dict(found.probabilities))
        for piece, found in written
    )
    longest, example = max(main, key=lambda each: each[0].end_s - each[0].start_s)
    return replace(
        example,
        text=" ".join(segment.text for segment in segments),
        segments=segments,
        probability=probabilities.get(longest.language) if longest.language is not None and probabilities else None,
        probabilities=probabilities,
        reason=f"Written while it was spoken, piece by piece: {shares}.",
        warnings=notes,
        duration_s=heard_s,
        elapsed_s=elapsed_s,
    )


def _seconds(pieces: list[tuple[LivePiece, Transcript]]) -> float:
    return sum(piece.end_s - piece.start_s for piece, _ in pieces)


def _by_seconds(
    written: list[tuple[LivePiece, Transcript]], kind: Callable[[LivePiece, Transcript], Hashable]
) -> dict[Any, list[tuple[LivePiece, Transcript]]]:
    """The pieces of each kind, those of the longest kind first."""
    groups: dict[Any, list[tuple[LivePiece, Transcript]]] = {}
    for piece, found in written:
        groups.setdefault(kind(piece, found), []).append((piece, found))
    return dict(sorted(groups.items(), key=lambda item: -_seconds(item[1])))


def _mean_probabilities(written: list[tuple[LivePiece, Transcript]]) -> dict[str, float]:
    """Means by length over the pieces whose own language decided, the most probable first. Empty if the language was given throughout."""
    heard = [(found.probabilities, piece.end_s - piece.start_s) for piece, found in written if found.probabilities]
    length_s = sum(length for _, length in heard)
    codes = dict.fromkeys(code for row, _ in heard for code in row)
    means = {code: sum(row.get(code, 0.0) * length for row, length in heard) / length_s for code in codes}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
