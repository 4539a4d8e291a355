"""Stop buttons: who pressed one, and the exception that ends their work between two batches of the model. No Gradio.

A request is announced when it is asked for, and taken over by its work when its turn comes: Stop reaches it from the first moment on.

ticket = stops.announce(session)
with stops.run(session, ticket) as run:
    run.check()
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_WAITING = 4096  # announced requests that are remembered, of all visitors; some never come: the queue was full, the visitor left


class StoppedError(Exception):
    """The visitor pressed Stop. Not an error to them."""


class Run:
    """One request that can be stopped. Call `check` wherever it may end: in `on_progress`, for instance."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._is_replaced = False

    @property
    def is_stopped(self) -> bool:
        """Whether it is to end."""
        return self._stopped.is_set()

    @property
    def is_replaced(self) -> bool:
        """Whether the visitor has asked for something newer since: the page shows that one, so this one ends without a word."""
        return self._is_replaced

    def stop(self) -> None:
        """Have the next `check` end the work."""
        self._stopped.set()

    def replace(self) -> None:
        """Stop it because of a newer one."""
        self._is_replaced = True
        self.stop()

    def check(self) -> None:
        """Raise `StoppedError` if Stop was pressed."""
        if self._stopped.is_set():
            raise StoppedError


class Stops:
    """Requests by the visitor's session: those that wait for their turn, and those that are being worked on.

    A visitor's Stop ends all of that visitor's requests, and so does the visitor's next request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, tuple[str, Run]] = OrderedDict()  # by ticket: session, request
        self._working: dict[str, set[Run]] = {}

    def announce(self, session: str) -> str:
        """Note a request that will wait for its turn; it replaces the visitor's earlier ones. Returns its ticket, for `run`."""
        ticket = secrets.token_hex(8)
        with self._lock:
            self._replace(session)
            self._waiting[ticket] = session, Run()
            if len(self._waiting) > _MOST_WAITING:
                self._waiting.popitem(last=False)
        return ticket

    def withdraw(self, session: str, ticket: str | None) -> None:
        """Forget a request that will not come."""
        with self._lock:
            if ticket is not None and self._waiting.get(ticket, ("", None))[0] == session:
                del self._waiting[ticket]

    @contextmanager
    def run(self, session: str, ticket: str | None = None) -> Iterator[Run]:
        """A request of this session, for as long as the `with` block takes; it may be stopped already.

        ticket: from `announce`. A request that was not announced, or is long forgotten, is the visitor's newest.
        """
        with self._lock:
            found = None if ticket is None else self._waiting.get(ticket)
            if found is not None and found[0] == session:
                run = self._waiting.pop(ticket)[1]  # type: ignore[arg-type]
            else:
                self._replace(session)
                run = Run()
            self._working.setdefault(session, set()).add(run)
        try:
            yield run
        finally:
            with self._lock:
                self._working[session].discard(run)
                if not self._working[session]:
                    del self._working[session]

    def stop(self, session: str) -> bool:
        """Stop everything of this session.

        Returns whether work was going on that will say so by itself; if not, what there is still waits for its turn.
        """
        with self._lock:
            waiting, working = self._runs(session)
            for run in (*waiting, *working):
                run.stop()
            return any(not run.is_replaced for run in working)

    def is_busy(self, session: str) -> bool:
        """Whether a request of this session waits or is being worked on, and is not to end."""
        with self._lock:
            waiting, working = self._runs(session)
            return any(not run.is_stopped for run in (*waiting, *working))

    def _runs(self, session: str) -> tuple[list[Run], list[Run]]:
        """Those that wait, and those that are being worked on. The caller holds the lock."""
        return [run for whose, run in self._waiting.values() if whose == session], list(self._working.get(session, ()))

    def _replace(self, session: str) -> None:
        for runs in self._runs(session):
            for run in runs:
                run.replace()
