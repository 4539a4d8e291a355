"""A page served by a real process and looked at by a real browser, offline: fixtures and steps for the test files of the demo.

tests/conftest.py imports the fixtures, so that a run starts one server and one browser however many files use them. Every page fails its
test on an error in its scripts and on any request that leaves this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "demo" / "examples"
ROWS = {row["label"]: row for row in json.loads((EXAMPLES / "examples.json").read_text("utf-8"))}
START_S, ANSWER_S = 120, 60  # patience with a busy machine
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    f"--use-file-for-fake-audio-capture={EXAMPLES / 'english.wav'}",
]

# ---- server, browser, page -------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, *arguments: str, **variables: str) -> Iterator[str]:
    """A server in a process of its own, and its address. Its own words are in the failure if it does not start.

    folder: an empty one, for its log and its uploads. arguments: for `whisper-moe-demo`. variables: of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads")} | variables
    command = [sys.executable, "-m", "demo.app", "--port", str(port), *arguments]
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}/"
            deadline = time.monotonic() + START_S
            while not answers(url):
                assert process.poll() is None, (folder / "log.txt").read_text()
                assert time.monotonic() < deadline, (folder / "log.txt").read_text()
                time.sleep(0.3)
            yield url
        finally:
            process.terminate()
            process.wait(20)
    left = [path.name for path in (folder / "uploads").rglob("*") if path.is_file() and path.name not in files_of_examples()]
    assert not left, "uploads outlive the page"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with the shipped pocket and adapters; uploads of more than 8 MB are refused."""
    with served(tmp_path_factory.mktemp("demo"), "--max-upload-mb", "8") as url:
        yield url


def files_of_examples() -> set[str]:
    return {row["file"] for row in ROWS.values()}


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright import sync_api as playwright_api

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


class Window:
    """One page of a visitor of its own, and what went wrong in it since the last look."""

    def __init__(self, browser: Any, server: str, size: dict, scheme: str) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(ANSWER_S * 1000)
        self.page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        self.page.on("request", lambda request: self._note(request.url, server))
        self.page.goto(server)
        self.page.get_by_role("button", name="Transcribe").wait_for()

    def _note(self, url: str, server: str) -> None:
        if not url.startswith((server, server.replace("http", "ws", 1), "data:", "blob:")):
            self.faults.append(f"foreign request: {url}")

    def check(self) -> None:
        faults, self.faults[:] = [*self.faults], []
        assert not faults, faults


@pytest.fixture
def open_page(server: str, browser: Any) -> Iterator[Any]:
    """Opens pages; afterwards none of them may have had a script error or a request to elsewhere."""
    windows: list[Window] = []

    def open_one(size: dict = DESKTOP, scheme: str = "light") -> Any:
        windows.append(Window(browser, server, size, scheme))
        return windows[-1].page

    yield open_one
    for window in windows:
        window.context.close()
    for window in windows:
        window.check()


@pytest.fixture(scope="module")
def kept_windows() -> list[Window]:
    """The window that is open from one test to the next, if there is one."""
    return []


@pytest.fixture
def page(server: str, browser: Any, kept_windows: list[Window], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page without a recording and with nothing chosen. It may have answered before: opening one costs more than an answer does."""
    if not kept_windows:
        kept_windows.append(Window(browser, server, DESKTOP, "light"))
    window, failures = kept_windows[0], request.session.testsfailed
    clear = window.page.get_by_role("button", name="Clear", exact=True)
    if clear.count():
        clear.click()
        window.page.locator("#audio input[type=file]").wait_for(state="attached")
    yield window.page
    if request.session.testsfailed != failures or window.faults:
        kept_windows.clear()
        window.context.close()
    window.check()


@pytest.fixture
def new_page(open_page: Any) -> Any:
    return open_page()


# ---- what a person does and sees -------------------------------------------------------------------------------------


def click_example(page: Any, label: str) -> None:
    page.locator("#examples").get_by_role("button", name=label, exact=True).click()


def upload(page: Any, path: Path) -> None:
    page.locator("#audio input[type=file]").set_input_files(path)
    page.locator("#audio audio, #audio [data-testid=waveform-Recording]").first.wait_for(state="attached")
    page.get_by_role("button", name="Transcribe").click()


def choose(page: Any, control: str, option: str) -> None:
    """Open the options if they are closed, and choose one of a control."""
    field = page.get_by_label(control, exact=True)
    if not field.is_visible():
        page.get_by_role("button", name="Options").click()
    field.click()
    page.get_by_role("option", name=option, exact=True).click()
    page.keyboard.press("Escape")


def answer(page: Any) -> dict[str, str]:
    """Wait for a transcript and read it: text, language, what stands below it, and who wrote it. What was read is no answer again."""
    sentence = page.locator(".wm-sentence:not(.read)")
    sentence.wait_for()
    heard, said = sentence.locator(".wm-heard").first.inner_text(), sentence.inner_text()
    language, sure = re.fullmatch(r"(.+?) (\(given, not detected\)|(?:over\s|under\s)?\d+\s%|[\d.]+\ss)", heard).groups()
    seen = {
        "text": page.locator(".wm-text").inner_text(),
        "language": language,
        "sure": sure.strip("()"),
        "writer": sentence.locator(".wm-writer").first.inner_text(),
        "sentence": said.replace("\u00a0", " "),
        "all": page.locator("#result").inner_text(),
    }
    sentence.evaluate("sentence => sentence.classList.add('read')")
    return seen


def message(page: Any) -> str:
    """Read the message that popped up, and put it away."""
    said = page.locator(".toast-body").inner_text()
    page.locator(".toast-close").click()
    page.locator(".toast-body").wait_for(state="detached")
    return said


def character_errors(said: str, written: str) -> float:
    """Edit distance over the letters and digits, as a share of those that were said."""
    a, b = (re.sub(r"[\W_]+", "", text.lower()) for text in (said, written))
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1] / len(a)


READABLE = 0.3  # share of wrong letters up to which a sentence can be read


def serious_findings(page: Any) -> list[str]:
    """What axe finds wrong for people who read with difficulty or with a screen reader."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{fault['id']}: {fault['nodes'][0]['html']}" for fault in found if fault["impact"] in ("serious", "critical")]


def save_picture(page: Any, name: str, *, whole: bool, part: str = "#result") -> None:
    """A picture of the whole page, or as the screen shows it with a part in view, if the environment asks for one."""
    folder = os.environ.get("DEMO_SCREENSHOTS")
    if folder:
        page.locator(part).evaluate("part => part.scrollIntoView()")
        page.wait_for_timeout(700)  # Gradio's transitions
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)
