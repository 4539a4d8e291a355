"""Asking the Hub: a few tries where trying again may help, and errors in plain words. A token never stands in a message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

STALE = 412  # the answer to a commit whose parent is no longer the newest
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 10.0

Result = TypeVar("Result")


class HubError(OSError):
    """The Hub could not be asked, or refused. The message says what to do."""


def is_passing(error: BaseException | None) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _BUSY
    if isinstance(error, RuntimeError):  # the client wraps what happened to an upload
        return is_passing(error.__cause__)
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError))


def ask(call: Callable[[], Result], about: str, *, attempts: int = 3, wait_s: float = 1.0) -> Result:
    """The answer to `call`, tried again with growing pauses while the Hub is busy or the network fails.

    Raises:
        HubError: It failed for good. `about` names what was asked for: a repository, "your account".
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:  # noqa: PERF203, trying again is the point
            if not is_ours(error):
                raise
            if attempt + 1 == attempts or not is_passing(error):
                raise HubError(explain(error, about)) from error
            pause(error, wait_s * 2**attempt)
    raise ValueError(f"attempts is {attempts}; at least one is needed.")


def client_for_strangers(api: HfApi | None = None) -> HfApi:
    """A client of the same Hub that carries no token, not even the one that was logged in with: it sees what everybody sees."""
    return HfApi(endpoint=None if api is None else api.endpoint, token=False)


def check_reachable(api: HfApi | None = None, *, patience_s: float = 1.8, attempts: int = 1) -> None:
    """Find out within this time whether the Hub answers at all. The client by itself would try for half a minute.

    Args:
        api: The client whose Hub is asked.
        patience_s: How long to wait for an answer, each time. The default is for somebody who looks at a page meanwhile.
        attempts: How often to try.

    Raises:
        HubError: It does not, or must not be asked.
    """
    if constants.is_offline_mode():
        raise HubError("The Hub was not asked: HF_HUB_OFFLINE is set. Unset it and start again.")
    endpoint = (HfApi() if api is None else api).endpoint
    answered = threading.Event()

    def knock() -> None:
        try:
            get_session().head(endpoint, timeout=patience_s)
        except Exception:  # whatever it was: no answer
            return
        answered.set()

    for attempt in range(attempts):
        knocking = threading.Thread(target=knock, daemon=True)  # a name that cannot be resolved keeps it longer than any time limit
        knocking.start()
        knocking.join(patience_s)
        if answered.is_set():
            return
        if attempt + 1 < attempts:
            time.sleep(1.0)
    raise HubError(f"The Hub ({endpoint}) cannot be reached. Adapters that are here work without it.")


def pause(error: BaseException, seconds: float) -> None:
    """Wait as long as the Hub asks for, or else `seconds`; never long."""
    response = getattr(error, "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    time.sleep(min(float(asked) if asked.isdigit() else seconds, _LONGEST_WAIT_S))


def is_ours(error: BaseException) -> bool:
    """Whether an error comes from asking the Hub rather than from a mistake in the program."""
    if isinstance(error, RuntimeError):
        return error.__cause__ is not None and is_ours(error.__cause__)
    return isinstance(error, (HTTPError, LocalTokenNotFoundError, ConnectionError, TimeoutError))


def explain(error: BaseException, about: str) -> str:
    """One sentence on what went wrong and one on what to do. Made from kinds and numbers alone, so that no secret can be in it."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return explain(error.__cause__, about)
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"The Hub was not asked about {about}: HF_HUB_OFFLINE is set. Unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return f"A token is needed for {about}, and there is none. Log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return f"{about} is gated: ask for access on its page, then log in (`hf auth login`) as the user who was let in."
    if isinstance(error, RevisionNotFoundError):
        return f"{about} has no such revision. It may have been deleted; name a branch, a tag or a commit that is there."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"{about} is not on the Hub, or it is private. Check the name; if it is private, log in with `hf auth login` or set HF_TOKEN."
        )
    if status == 401:
        return f"The Hub does not accept the token given for {about}. Make a new one and log in with `hf auth login`."
    if status == 403:
        return f"The token may not do this with {about}. Use one with write access, of a user who may write there."
    if status == STALE:
        return f"{about} was changed by somebody else again and again meanwhile. Try again later."
    if status is not None:
        return f"The Hub answered {status} about {about}. Try again later; its state is on status.huggingface.co."
    return f"The Hub cannot be reached for {about} ({type(error).__name__}). Check the network and HF_ENDPOINT."


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
