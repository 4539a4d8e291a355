"""Work that is watched: it goes on in a thread, and whoever iterates sees how far it is and what is written so far. No Gradio.

following = Following(lambda tell, show: transcriber.transcribe(audio, on_progress=tell, on_segments=show), run.check)
for progress in following:
    ...
transcript = following.result
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from .stops import StoppedError

if TYPE_CHECKING:
    from whisper_moe import Segment

T = TypeVar("T")
OFTEN_S = 0.2  # how soon Stop is noticed, however long the model is busy


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Args:
        share: What is done, 0 to 1.
        what: What is being done.
        left_s: How long it will still take; None as long as that cannot be known.
        segments: What is written so far, in order.
    """

    share: float
    what: str
    left_s: float | None
    segments: tuple[Segment, ...]


class Following(Generic[T]):
    """Work in a thread of its own. Iterate once; then `result` is what came of it.

    Args:
        work: Called with what to tell progress to and what to show segments to, as `Transcriber.transcribe` takes them.
        check: Raises if the work is to end early. Iterating then raises the same at once, and the work ends at its next sign of life.
    """

    def __init__(
        self, work: Callable[[Callable[[float, str], None], Callable[[list[Segment]], None]], T], check: Callable[[], None] = lambda: None
    ) -> None:
        self._work, self._check = work, check
        self._news: queue.SimpleQueue[tuple[float, str] | list[Segment] | None] = queue.SimpleQueue()
        self._is_watched = True
        self._outcome: T | BaseException | None = None

    @property
    def result(self) -> T:
        """What came of the work; raises what it raised."""
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None, "iterate first"
        return self._outcome

    def __iter__(self) -> Iterator[Progress]:
        thread = threading.Thread(target=self._run, name="followed", daemon=True)
        thread.start()
        try:
            yield from self._watch()
        finally:
            self._is_watched = False  # nobody looks any more: the visitor left, or pressed Stop
        thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome

    def _run(self) -> None:
        def tell(share: float, what: str) -> None:
            self._check()
            if not self._is_watched:
                raise StoppedError
            self._news.put((share, what))

        try:
            self._outcome = self._work(tell, self._news.put)
        except BaseException as error:  # it belongs to whoever iterates
            self._outcome = error
        finally:
            self._news.put(None)

    def _watch(self) -> Iterator[Progress]:
        estimate = TimeLeft()
        written: dict[float, Segment] = {}  # by start: what is written anew replaces itself
        share, what, left = 0.0, "", None
        while True:
            try:
                news = self._news.get(timeout=OFTEN_S)
            except queue.Empty:
                self._check()
                continue
            if news is None:
                return
            if isinstance(news, tuple):
                share, what = news
                left = estimate.after(share, what)
            else:
                written |= {segment.start_s: segment for segment in news}
            if self._news.empty():  # else there is newer news
                yield Progress(share, what, left, tuple(written[start] for start in sorted(written)))


class TimeLeft:
    """How long the work will still take, if the rest goes on as this kind of work has gone so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kind: str | None = None
        self._since = (0.0, 0.0)

    def after(self, share: float, what: str) -> float | None:
        """Seconds left, from how fast the share grew since this kind of work began; None if it has not grown."""
        now, kind = self._clock(), re.sub(r"\d+", "", what)
        if kind != self._kind:
            self._kind, self._since = kind, (now, share)
        began, share_then = self._since
        return None if share <= share_then or now <= began else (now - began) / (share - share_then) * (1 - share)
