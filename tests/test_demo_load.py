"""The page's server under load: a real process, and many visitors at once through the clients that they use.

What each should get is first asked for one by one, of the same server; among the others it has to be the same, letter by letter.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import EXAMPLES, READABLE, ROWS, character_errors, served

pytestmark = pytest.mark.pocket
pytest.importorskip("gradio_client", reason="[demo] to run it: pip install peft-s2lora[demo]")

from gradio_client import Client, handle_file  # noqa: E402

NUM_USERS, AT_ONCE, WAITING = 50, 4, 46
PATIENCE_S = 120
LONG_TIMES = 18  # three minutes: as long as it takes to fill the queue behind a few of them
TEXTS = {row["file"]: row["text"] for row in ROWS.values()}
LANGUAGES = {row["file"]: row["language"] for row in ROWS.values()}


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for."""

    file: str
    language: str = "auto"
    adapter: str = "auto"


# Every example with its language detected and given; the adapters that are chosen by name only, and one against what is heard.
ASKED = [
    *(Asked(file) for file in LANGUAGES),
    *(Asked(file, language) for file, language in LANGUAGES.items() if language in ("en", "de", "es", "cy")),
    *(Asked(file, adapter=adapter) for file, adapter in (("child.ogg", "en-child"), ("spanish.flac", "qug"), ("english.wav", "cy"))),
]


@dataclass(frozen=True)
class Server:
    url: str
    folder: Path

    def sent(self, file: str) -> Path:
        """An example under another name: `served` knows uploads from the page's own examples by it."""
        path = self.folder / f"sent_{file}"
        if not path.exists():
            path.write_bytes((EXAMPLES / file).read_bytes())
        return path

    def uploads(self) -> set[str]:
        """Names of the files that visitors sent."""
        return {path.name for path in (self.folder / "uploads").rglob("sent_*")}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that works on few requests at once and lets few wait. When it has stopped, no upload may be left."""
    folder = tmp_path_factory.mktemp("load")
    with served(folder, "--max-at-once", str(AT_ONCE), "--max-waiting", str(WAITING)) as url:
        server = Server(url, folder)
        yield server
        assert "sent_english.wav" in server.uploads(), "that nothing is left would say nothing"


def visitor_of(server: Server) -> Client:
    """A client with patience for a busy machine."""
    return Client(server.url, verbose=False, httpx_kwargs={"timeout": PATIENCE_S})


def ask(server: Server, client: Client, asked: Asked) -> tuple[str, str | None, str | None]:
    """The text, and the language and adapter that it was written in."""
    answer = client.predict(handle_file(server.sent(asked.file)), asked.language, asked.adapter, api_name="/transcribe")
    return answer["text"], answer["language"], answer["adapter"]


def test_each_of_fifty_visitors_gets_what_it_gets_alone(crowded: Server) -> None:
    client = visitor_of(crowded)
    alone = {asked: ask(crowded, client, asked) for asked in ASKED}
    assert {adapter for _, _, adapter in alone.values()} == {None, "cy", "en-child", "qug"}
    assert len({language for _, language, _ in alone.values()}) > 6
    assert len({text for text, _, _ in alone.values()}) > 12, "texts that are alike would hide a mix-up"

    start = threading.Barrier(NUM_USERS)
    wrong: list[object] = []

    def visit(number: int) -> None:
        try:
            own = visitor_of(crowded)
            start.wait(PATIENCE_S)
            asked = ASKED[number % len(ASKED)]
            got = ask(crowded, own, asked)
            if got != alone[asked]:
                wrong.append((asked, got, alone[asked]))
        except Exception as error:
            wrong.append((number, error))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(NUM_USERS)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(PATIENCE_S)
    assert not any(visitor.is_alive() for visitor in visitors)
    assert not wrong


# ---- more than there is room for ---------------------------------------------------------------------------------------


def upload(url: str, path: Path) -> dict[str, Any]:
    """A recording as the endpoint takes it, once it is on the server."""
    mark = "----recording"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\nContent-Type: audio/ogg\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/upload", body, headers), timeout=PATIENCE_S) as answer:
        (kept,) = json.load(answer)
    return {"path": kept, "meta": {"_type": "gradio.FileData"}}


def arguments(url: str, **given: Any) -> list[Any]:
    """The endpoint's arguments in their order, defaults where nothing is given."""
    with urllib.request.urlopen(f"{url}gradio_api/info", timeout=PATIENCE_S) as answer:
        parameters = json.load(answer)["named_endpoints"]["/transcribe"]["parameters"]
    return [given.get(each["parameter_name"], each.get("parameter_default")) for each in parameters]


def push(url: str, values: list[Any]) -> tuple[int, dict[str, Any]]:
    """Ask without waiting for the answer: the status, and either the event's id or what is wrong."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{url}gradio_api/call/transcribe", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def fetch(url: str, event: str) -> dict[str, Any]:
    """The answer of an event."""
    with urllib.request.urlopen(f"{url}gradio_api/call/transcribe/{event}", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    assert "event: complete" in text, text
    answers: list[dict[str, Any]] = json.loads(text.rpartition("data: ")[2])
    return answers[0]


def test_who_finds_the_queue_full_is_told_so_and_everybody_else_is_served(crowded: Server) -> None:
    short = arguments(crowded.url, audio=upload(crowded.url, crowded.sent("english.wav")), adapter="none")
    samples, rate = soundfile.read(crowded.sent("german_long.ogg"), dtype="float32")
    soundfile.write(crowded.folder / "sent_long.flac", np.tile(samples, LONG_TIMES), rate)
    long = arguments(crowded.url, audio=upload(crowded.url, crowded.folder / "sent_long.flac"), adapter="none")
    busy = [push(crowded.url, long) for _ in range(AT_ONCE)]
    assert [status for status, _ in busy] == [200] * AT_ONCE
    with ThreadPoolExecutor(16) as visitors:
        answers = list(visitors.map(lambda _: push(crowded.url, short), range(2 * WAITING)))
    refused = {said["detail"] for status, said in answers if status == 503}
    accepted = [said["event_id"] for status, said in answers if status == 200]
    assert len(refused) == 1
    assert "Queue is full" in refused.pop()
    assert WAITING <= len(accepted) < len(answers)
    (text,) = {fetch(crowded.url, event)["text"] for event in accepted}
    assert character_errors(TEXTS["english.wav"], text) < READABLE
    (read,) = {fetch(crowded.url, said["event_id"])["text"] for _, said in busy}
    assert character_errors(" ".join([TEXTS["german_long.ogg"]] * LONG_TIMES), read) < READABLE
    assert ask(crowded, visitor_of(crowded), Asked("english.wav", adapter="none"))[0] == text
