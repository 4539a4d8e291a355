"""What every tab of the page shares: Gradio, the transcriber, the limits, and how events meet the queue. One `Page` per server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any

from .visitors import is_at_this_machine

if TYPE_CHECKING:
    from whisper_moe import Transcriber

    from .catalogue import Catalogue

_log = logging.getLogger(__name__)

MODEL_QUEUE = "model"  # one `concurrency_id` for everything that waits for the model


@dataclass(frozen=True)
class Limits:
    """What one visitor, and all of them together, may ask for.

    Args:
        max_minutes: Length of a recording.
        max_upload_mb: Size of a file, in megabytes.
        max_files: Files of one batch.
        max_at_once: Requests that are worked on at the same time; the model takes them in common batches.
        max_waiting: Requests that wait behind those; the next one is refused with a message.
        keep_uploads_s: Uploads, recordings and files made for download that are older are deleted; the rest when the server stops. Not at
            once: the player plays them, and they are downloaded.
    """

    max_minutes: float = 10
    max_upload_mb: int = 100
    max_files: int = 50
    max_at_once: int = 32
    max_waiting: int = 64
    keep_uploads_s: int = 1800

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0:
                raise ValueError(f"{each.name} is {value}; expected a number above 0.")

    @property
    def max_duration_s(self) -> float:
        """Length of a recording in seconds."""
        return 60 * self.max_minutes


@dataclass(frozen=True)
class Page:
    """What a tab needs to be built: `gr` (Gradio), the transcriber, the limits and the adapters' catalogue."""

    gr: Any
    transcriber: Transcriber
    limits: Limits
    catalogue: Catalogue
    _looks: list[tuple[Sequence[Any], Callable[[bool], Sequence[Any]]]] = field(default_factory=list)
    _changes: list[Any] = field(default_factory=list)

    @property
    def heavy(self) -> dict[str, Any]:
        """Options of an event that works with the model."""
        return {"concurrency_id": MODEL_QUEUE, "concurrency_limit": self.limits.max_at_once, "api_visibility": "private"}

    @property
    def quick(self) -> dict[str, Any]:
        """Options of an event that only changes what is shown: past the queue, without a sign of waiting."""
        return {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    # ---- adapters come while the page runs ------------------------------------------------------------------------------

    def offers(self, dropdown: Any, choices: Callable[[Transcriber], Sequence[tuple[str, str]]]) -> Any:
        """Have a dropdown learn of new adapters. `choices`: what it offers now. Returns the dropdown."""
        self.when_adapters_change([dropdown], lambda _: [self.gr.update(choices=list(choices(self.transcriber)))])
        return dropdown

    def when_adapters_change(self, components: Sequence[Any], look: Callable[[bool], Sequence[Any]]) -> None:
        """Have components show what `look` returns, one value each, when a page is opened and when adapters may have changed.

        `look` is told whether the visitor sits at this machine. If it fails, its components stay as they are, and the others are seen to.
        """
        self._looks.append((components, look))

    def knows_visitor(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Have Gradio give the event's function its parameter `request`."""
        function.__annotations__["request"] = self.gr.Request  # by which Gradio knows what to pass
        return function

    def adapters_changed(self, event: Any) -> None:
        """Say that adapters may have changed when this event has ended, well or not."""
        self._changes.append(event)

    def connect(self, app: Any, tabs: Sequence[Any]) -> None:
        """Wire the above, after all tabs are built. Another visitor may have fetched an adapter: a tab that is opened looks, too."""
        shown = [component for components, _ in self._looks for component in components]

        def look(request: Any = None) -> Any:
            is_own = is_at_this_machine(request)
            values = [value for components, look in self._looks for value in self._seen(components, look, is_own)]
            return values[0] if len(values) == 1 else values

        if shown:
            events = [app.load, *(tab.select for tab in tabs), *(change.then for change in self._changes)]
            for event in events:
                event(self.knows_visitor(look), None, shown, **self.quick)

    def _seen(self, components: Sequence[Any], look: Callable[[bool], Sequence[Any]], is_own: bool) -> Sequence[Any]:
        try:
            return list(look(is_own))
        except Exception:  # one part of the page is no reason to lose the rest
            _log.exception("A part of the page could not look at the adapters")
            return [self.gr.skip() for _ in components]

    @contextmanager
    def said_to_the_visitor(self) -> Iterator[None]:
        """A `ValueError` inside becomes a message on the page; its words are for people."""
        try:
            yield
        except ValueError as error:
            raise self.gr.Error(escape(str(error)), duration=20, print_exception=False) from error


def gradio() -> Any:
    """Gradio, imported late (seconds) and without its usage statistics, so that nothing leaves this machine."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio
