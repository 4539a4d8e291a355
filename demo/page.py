"""What every tab of the page shares: Gradio, the transcriber, the limits, and how events meet the queue. One `Page` per server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_moe import Transcriber

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
        keep_uploads_s: Uploads, recordings and files made for download that are older are deleted; the rest when the server stops.
    """

    max_minutes: float = 10
    max_upload_mb: int = 100
    max_files: int = 50
    max_at_once: int = 32
    max_waiting: int = 64
    keep_uploads_s: int = 1800

    @property
    def max_duration_s(self) -> float:
        """Length of a recording in seconds."""
        return 60 * self.max_minutes


@dataclass(frozen=True)
class Page:
    """What a tab needs to be built: `gr` (Gradio), the transcriber and the limits."""

    gr: Any
    transcriber: Transcriber
    limits: Limits

    @property
    def heavy(self) -> dict[str, Any]:
        """Options of an event that works with the model."""
        return {"concurrency_id": MODEL_QUEUE, "concurrency_limit": self.limits.max_at_once, "api_visibility": "private"}

    @property
    def quick(self) -> dict[str, Any]:
        """Options of an event that only changes what is shown: past the queue, without a sign of waiting."""
        return {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

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
