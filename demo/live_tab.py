"""The live tab: words while somebody speaks into the microphone, and the language as it changes.

The recorder is our own (live.js): Gradio's streaming microphone sends ten files a second, of which the server reads the newest only, so
that sound is lost whenever it is busy. Ours sends what has gathered when the last answer is there, in memory; nothing is written to disk.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from whisper_moe import language_code

from . import handlers, views_live
from .captions import FORMATS, write_files
from .live import MOST_AT_A_TIME_S, LiveSession, LiveSessions, check_sound
from .page import Page
from .uploads import new_folder

SCRIPT = Path(__file__).parent / "live.js"
RECORDER = (
    '<div class="wm-live-recorder"><button type="button">Record</button>'
    '<span class="wm-live-level" aria-hidden="true"><i></i></span><p class="wm-live-trouble" role="alert"></p></div>'
)


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr = page.gr
    server = LiveServer(LiveSessions(page.transcriber, max_duration_s=page.limits.max_duration_s))
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            recorder = gr.HTML(
                html_template=RECORDER,
                js_on_load=SCRIPT.read_text("utf-8"),
                server_functions=server.functions(),
                elem_classes="wm",
                elem_id="live-recorder",
            )
            language = page.offers(
                gr.Dropdown(
                    handlers.language_choices(page.transcriber), value=handlers.AUTO, label="Language spoken", elem_id="live-language"
                ),
                handlers.language_choices,
            )
            clear = gr.Button("Clear", elem_id="live-clear")
        with gr.Column(scale=6, min_width=320):
            gr.HTML(f'<div class="wm-live-place">{views_live.live(None)}</div>', elem_classes="wm", elem_id="live-said")
            with gr.Column(visible=False, elem_id="live-after") as after:
                whole = gr.Textbox(label="The whole text", lines=3, max_lines=12, interactive=False, buttons=["copy"], elem_id="live-text")
                with gr.Row():
                    files = [gr.DownloadButton(f"Save .{kind}", size="sm", min_width=60, elem_id=f"live-{kind}") for kind in FORMATS]

    def finished(key: str | None) -> dict[Any, Any]:
        """The whole text and its files, if there is any."""
        with page.said_to_the_visitor():
            session = server.session(key)
        if session is None or not session.look().pieces:
            return {after: gr.Column(visible=False)}
        transcript = session.transcript()
        written = write_files(transcript, new_folder("live"), "live")
        buttons = {button: gr.DownloadButton(value=str(written[kind])) for kind, button in zip(FORMATS, files, strict=True)}
        text = gr.Textbox(value=transcript.text, rtl=runs_to_the_left(transcript.text))
        return {after: gr.Column(visible=True), whole: text, **buttons}

    recorder.submit(finished, recorder, [after, whole, *files], **page.quick)
    language.change(None, language, None, js="(code) => { window.wmLive.language = code; }", **page.quick)
    clear.click(None, None, None, js="() => { window.wmLive.clear(); }", **page.quick)


class LiveServer:
    """What the recorder calls: JSON values in and out, errors as words for people."""

    def __init__(self, sessions: LiveSessions) -> None:
        self._sessions = sessions

    def functions(self) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
        """What the recorder may call, as plain functions: Gradio writes a mark on each, which a method does not take."""

        def live_hear(sent: dict[str, Any]) -> dict[str, Any]:
            return _answered(self.hear, sent)

        def live_on(sent: dict[str, Any]) -> dict[str, Any]:
            return _answered(self.still_on, sent)

        def live_finish(sent: dict[str, Any]) -> dict[str, Any]:
            return _answered(self.finish, sent)

        def live_clear(sent: dict[str, Any]) -> dict[str, Any]:
            return _answered(self.clear, sent)

        return [live_hear, live_on, live_finish, live_clear]

    def hear(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Take sound. `sent`: key, rate, sound (16 bit, base64), language. Gives what is to be seen."""
        key, rate, language = _key(sent.get("key")), _rate(sent.get("rate")), _language(sent.get("language"))
        session = self._sessions.hear(key, rate, _sound(sent.get("sound"), rate), language)
        return {"html": views_live.live(session.look())}

    def still_on(self, sent: dict[str, Any]) -> dict[str, Any]:
        """The microphone is on, and its sound on a long way. Gives what is to be seen."""
        session = self._sessions.get(_key(sent.get("key")))
        if session is None:
            return {}
        session.still_on()
        return {"html": views_live.live(session.look())}

    def finish(self, sent: dict[str, Any]) -> dict[str, Any]:
        """The microphone is off. Gives what is to be seen, and whether all is written; to be asked again until it is."""
        session = self._sessions.get(_key(sent.get("key")))
        if session is None:
            return {"html": views_live.live(None), "over": True}
        session.finish()
        return {"over": session.is_over, "html": views_live.live(session.look())}

    def clear(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Forget what was said."""
        self._sessions.forget(_key(sent.get("key")))
        return {"html": views_live.live(None)}

    def session(self, key: Any) -> LiveSession | None:
        """The session of a recorder, if it has one."""
        return self._sessions.get(_key(key)) if key else None


def _answered(do: Callable[[dict[str, Any]], dict[str, Any]], sent: Any) -> dict[str, Any]:
    """What it gives or, if it refuses, the problem in words."""
    try:
        return do(sent if isinstance(sent, dict) else {})
    except ValueError as error:
        return {"problem": str(error)}


def _key(key: Any) -> str:
    """Nobody's sessions can be had by guessing: a key has 128 bits, made in the browser."""
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{32}", key):
        raise ValueError("This recorder is not known here. Reload the page.")
    return key


def _rate(rate: Any) -> int:
    if not isinstance(rate, (int, float)) or not float(rate).is_integer():
        raise ValueError(f"A sample rate is a whole number of Hz; got {rate!r}.")
    return int(rate)


def _language(code: Any) -> str | None:
    if not isinstance(code, str):
        raise ValueError(f"A language is given as its code; got {code!r}.")
    return None if code == handlers.AUTO else language_code(code)


def _sound(sent: Any, rate: int) -> np.ndarray:
    """(samples,) of 16 bits. What is too long is refused before it is decoded."""
    check_sound(rate, np.empty(0))
    if not isinstance(sent, str) or not sent or len(sent) > 4 * (MOST_AT_A_TIME_S * rate * 2 / 3 + 1):
        raise ValueError("That is too much sound at a time, or none. Reload the page and try again.")
    try:
        return np.frombuffer(base64.b64decode(sent, validate=True), "<i2")
    except (binascii.Error, ValueError):
        raise ValueError("The browser sent something that is no sound. Reload the page and try again.") from None


def runs_to_the_left(text: str) -> bool:
    """Whether a text is written from right to left, by its first letter that has a direction: what dir="auto" goes by."""
    directions = (unicodedata.bidirectional(letter) for letter in text)
    return next((direction for direction in directions if direction in ("L", "R", "AL")), "L") != "L"
