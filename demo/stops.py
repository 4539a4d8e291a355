"""Stop buttons: who pressed one, and the exception that ends their work between two batches of the model. No Gradio."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """The visitor pressed Stop. Not an error to them."""


class Run:
    """One request that can be stopped. Call `check` wherever it may end: in `on_progress`, for instance."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Have the next `check` end the work."""
        self._stopped.set()

    def check(self) -> None:
        """Raise `StoppedError` if Stop was pressed."""
        if self._stopped.is_set():
            raise StoppedError


class Stops:
    """The requests that are being worked on, by the visitor's session. A visitor's Stop ends all of that visitor's requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, set[Run]] = {}

    @contextmanager
    def run(self, session: str) -> Iterator[Run]:
        """A request of this session, for as long as the `with` block takes."""
        run = Run()
        with self._lock:
            self._runs.setdefault(session, set()).add(run)
        try:
            yield run
        finally:
            with self._lock:
                self._runs[session].discard(run)
                if not self._runs[session]:
                    del self._runs[session]

    def stop(self, session: str) -> int:
        """Stop everything of this session. Returns how many requests that were."""
        with self._lock:
            runs = list(self._runs.get(session, ()))
        for run in runs:
            run.stop()
        return len(runs)
