"""What one request may bring along: its body, and a recording that is named by an address. Both are stopped while they come in.

Gradio itself counts the bytes of uploaded files only: a JSON body of any size is read into memory, and so is whatever an address gives.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from .page import Limits

API = "/gradio_api"
JSON_MB = 8  # of a call: live.js sends 15 s of sound at most, which is 8 at 192 kHz; everything else is far smaller
AT_ONCE = 4  # recordings fetched at the same time: each is held in memory until it is whole
FETCH_S = 120.0  # for one of them

_POUR_AWAY = 64 * 2**20  # bytes; who is not listened to before the answer may never see it

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _TooLargeError(Exception):
    """More bytes came than may."""


def most_bytes(path: str, limits: Limits) -> int:
    """Of a request's body, by where it goes."""
    if path.endswith(f"{API}/upload"):  # all files of a batch may come in one; Gradio looks at the size of each
        return int((limits.max_files * limits.max_upload_mb + 1) * 2**20)
    if f"{API}/mcp" in path:  # recordings come as base64
        return max(JSON_MB, int(limits.max_upload_mb * 4 / 3) + 1) * 2**20
    return JSON_MB * 2**20


def leads_elsewhere(path: str) -> bool:
    """Whether a path asks for a file by an address: Gradio would fetch it, from anywhere, and pass it on to anybody."""
    return re.search(r"/file[=/]\s*[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE) is not None


class BodyLimit:
    """ASGI middleware that answers 413 to a body that is too large: at once where its length is announced, else when that much has come;
    and 403 to who wants a file of another machine.

    Args:
        app: What it stands before.
        limits: What visitors may send.
    """

    def __init__(self, app: Asgi, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if leads_elsewhere(scope["path"]):
            await _answer(send, 403, "Files of other machines are not passed on here.")
            return
        most = most_bytes(scope["path"].rstrip("/"), self._limits)
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > most:
            await _refuse(receive, send, most)
            return
        came, is_too_large, is_answered = 0, False, False

        async def counted() -> Message:
            nonlocal came, is_too_large
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                is_too_large = True
                raise _TooLargeError
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal is_answered
            if is_too_large and not is_answered:
                return  # what the app makes of the broken body is not the answer
            is_answered = True
            await send(message)

        try:
            await self._app(scope, counted, unless_refused)
        except Exception:
            if not is_too_large:
                raise
        if is_too_large and not is_answered:
            await _refuse(receive, send, most)


async def _refuse(receive: Receive, send: Send, most: int) -> None:
    """Answer 413, after the rest of the body was poured away, or much of it."""
    poured = 0
    while poured < _POUR_AWAY:
        message = await receive()
        poured += len(message.get("body", b""))
        if not message.get("more_body", False):  # the end, or nobody is there any more
            break
    await _answer(send, 413, f"That is too much for one request: {most / 2**20:g} MB are allowed here.")


async def _answer(send: Send, status: int, words: str) -> None:
    said = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(said)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": said})


# ---- recordings by address ---------------------------------------------------------------------------------------------


def limit_fetches(limits: Limits) -> None:
    """Have Gradio fetch recordings that are given by their address under the page's limits. For the whole process, as Gradio has it."""
    from gradio import processing_utils

    processing_utils.async_transport = transport(limits.max_upload_mb * 2**20)  # its own hook for this


def transport(most: float, *, at_once: int = AT_ONCE, fetch_s: float = FETCH_S) -> Any:
    """An `httpx` transport that connects to public addresses only, as Gradio's does, and gives up on what is too large or too slow.

    Args:
        most: Bytes of one answer.
        at_once: Answers on their way at the same time; the next one is refused.
        fetch_s: Time for each.
    """
    import gradio as gr
    from gradio.processing_utils import PUBLIC_HOSTNAME_WHITELIST, httpx
    from gradio.processing_utils import sh as safehttpx  # both as Gradio fetches with them: they are its dependencies, not ours

    slots = threading.BoundedSemaphore(at_once)  # taken without waiting, so it does not matter which event loop asks

    def refused(why: str) -> Exception:
        return gr.Error(f"The recording could not be fetched from its address: {why}. Send the file itself.", print_exception=False)

    class Counted(httpx.AsyncByteStream):
        """An answer's bytes, which end with an error where they become too many."""

        def __init__(self, answer: httpx.Response, inner: httpx.AsyncBaseTransport) -> None:
            self._answer, self._inner, self._until, self._is_open = answer, inner, time.monotonic() + fetch_s, True

        async def __aiter__(self) -> AsyncIterator[bytes]:
            came = 0
            async for chunk in self._answer.stream:
                came += len(chunk)
                if came > most:
                    raise refused(f"it has more than {most / 2**20:g} MB, which is the most that is taken")
                if time.monotonic() > self._until:
                    raise refused(f"it took more than {fetch_s:g} seconds")
                yield chunk

        async def aclose(self) -> None:
            if self._is_open:
                self._is_open = False
                slots.release()
                await self._answer.aclose()
                await self._inner.aclose()

    class Bounded(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if not slots.acquire(blocking=False):
                raise refused("several others are being fetched at the moment")
            inner: httpx.AsyncBaseTransport | None = None
            try:
                host = request.url.host
                if safehttpx.matches_domain_whitelist(host, PUBLIC_HOSTNAME_WHITELIST):
                    inner = httpx.AsyncHTTPTransport()
                else:
                    inner = safehttpx.AsyncSecureTransport(await safehttpx.async_validate_url(host))
                request.headers["Accept-Encoding"] = "identity"  # what unpacks itself may be of any size
                answer = await inner.handle_async_request(request)
                if answer.headers.get("content-encoding", "identity") != "identity":
                    raise refused("it comes compressed")
                return httpx.Response(
                    answer.status_code, headers=answer.headers, stream=Counted(answer, inner), extensions=answer.extensions
                )
            except BaseException:
                slots.release()
                if inner is not None:
                    await inner.aclose()
                raise

    return Bounded()
