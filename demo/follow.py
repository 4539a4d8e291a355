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
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from .stops import StoppedError

if TYPE_CHECKING:
    from whisper_moe import Segment

T = TypeVar("T")
OFTEN_S = 0.2  # how soon Stop is noticed, however long the model is busy
ALIVE_S = 1.0  # whoever iterates hears of the work at least this often: only between two steps can a server see that the visitor has left


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
    """Work in a thread of its own. Iterate once; then `result` is what came of it. The same is said again where nothing is new for long.

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
        self._outcome: T | None = None
        self._error: BaseException | None = None
        self._is_over = False

    @property
    def result(self) -> T:
        """What came of the work; raises what it raised."""
        assert self._is_over, "iterate first"
        if self._error is not None:
            raise self._error
        return cast(T, self._outcome)

    def __iter__(self) -> Iterator[Progress]:
        # In the visitor's context: ZeroGPU asks there whose minutes these are.
        thread = threading.Thread(target=copy_context().run, args=(self._run,), name="followed", daemon=True)
        thread.start()
        try:
            yield from self._watch()
        finally:
            self._is_watched = False  # nobody looks any more: the visitor left, or pressed Stop
        thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        def tell(share: float, what: str) -> None:
            self._check()
            if not self._is_watched:
                raise StoppedError
            self._news.put((share, what))

        try:
            self._outcome = self._work(tell, self._news.put)
        except BaseException as error:  # it belongs to whoever iterates
            self._error = error
        finally:
            self._is_over = True
            self._news.put(None)

    def _watch(self) -> Iterator[Progress]:
        estimate = TimeLeft()
        written: dict[float, Segment] = {}  # by start: what is written anew replaces itself
        share, what, left = 0.0, "", None
        said = time.monotonic()
        while True:
            try:
                news = self._news.get(timeout=OFTEN_S)
            except queue.Empty:
                self._check()
                if time.monotonic() - said < ALIVE_S:
                    continue
            else:
                if news is None:
                    return
                if isinstance(news, tuple):
                    share, what = news
                    left = estimate.after(share, what)
                else:
                    written |= {segment.start_s: segment for segment in news}
                if not self._news.empty():  # there is newer news
                    continue
            yield Progress(share, what, left, tuple(written[start] for start in sorted(written)))
            said = time.monotonic()


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
