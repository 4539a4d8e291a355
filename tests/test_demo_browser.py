"""The page in a real browser, offline: the real app in a process of its own, with the shipped pocket and its adapters.

Every test fails on an error in the page's scripts and on any request that leaves this machine. Pictures for docs/demo.md are
written only when asked for:

    DEMO_SCREENSHOTS=docs/images pytest tests/test_demo_browser.py
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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

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

pytestmark = [pytest.mark.e2e, pytest.mark.pocket]
pytest.importorskip("gradio", reason="[e2e] to run it: pip install peft-s2lora[demo,e2e]")
playwright_api = pytest.importorskip("playwright.sync_api", reason="[e2e] to run it: pip install peft-s2lora[demo,e2e]")


# ---- server, browser, page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address. The server's own words are in the failure if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    command = [sys.executable, "-m", "demo.app", "--port", str(port), "--max-upload-mb", "8"]
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


def files_of_examples() -> set[str]:
    return {row["file"] for row in ROWS.values()}


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
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
        assert not faults


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
    path = page.locator(".wm-path:not(.read)")
    path.wait_for()
    language, writer, _ = path.locator("> li").all()
    seen = {
        "text": page.locator(".wm-text").inner_text(),
        "language": language.locator("strong").inner_text(),
        "sure": language.locator("span").last.inner_text(),
        "writer": writer.locator("strong").inner_text(),
        "all": page.locator("#result").inner_text(),
    }
    path.evaluate("path => path.classList.add('read')")
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


def test_the_measure_of_readability():
    assert character_errors("Ein Hund.", "ein hund") == 0
    assert character_errors("kitten", "sitting") == pytest.approx(3 / 6)


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "language", "writer"),
    [
        ("English", "English", "the base model"),
        ("German", "German", "the base model"),
        ("Spanish", "Spanish", "the base model"),
        ("Welsh", "Welsh", "adapter cy"),
    ],
)
def test_an_example_becomes_text_by_the_right_writer_in_one_click(page, label, language, writer):
    click_example(page, label)
    seen = answer(page)
    assert (seen["language"], seen["writer"]) == (language, writer)
    assert character_errors(ROWS[label]["text"], seen["text"]) <= READABLE, seen["text"]


def test_an_example_about_an_adapter_is_written_by_it(new_page):
    label = "English, a high voice, adapter en-child"
    click_example(new_page, label)  # it chooses the adapter, which stays chosen
    seen = answer(new_page)
    assert (seen["language"], seen["writer"]) == ("English", "adapter en-child")
    assert character_errors(ROWS[label]["text"], seen["text"]) <= READABLE, seen["text"]


def test_an_uploaded_recording_of_another_rate_and_two_channels_becomes_text(page, tmp_path):
    samples, rate = soundfile.read(EXAMPLES / "german.ogg")
    twice = np.interp(np.arange(0, len(samples) * 44_100 // rate) * rate / 44_100, np.arange(len(samples)), samples)
    soundfile.write(tmp_path / "upload.wav", np.stack([twice, 0.5 * twice], axis=1), 44_100)
    upload(page, tmp_path / "upload.wav")
    seen = answer(page)
    assert seen["language"] == "German"
    assert character_errors(ROWS["German"]["text"], seen["text"]) <= READABLE, seen["text"]


def test_a_recording_from_the_microphone_becomes_text(new_page):
    page = new_page
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(4000)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.locator("#audio time").first.wait_for()
    page.get_by_role("button", name="Transcribe").click()
    assert answer(page)["text"]


def test_what_the_person_chooses_overrides_what_is_heard(new_page):
    page = new_page
    choose(page, "Adapter", "None: the base model alone")
    choose(page, "Language", "Welsh (adapter cy)")
    upload(page, EXAMPLES / "welsh.ogg")
    seen = answer(page)
    assert (seen["language"], seen["sure"], seen["writer"]) == ("Welsh", "given, not detected", "the base model")


def test_only_allowed_candidates_are_heard(new_page):
    page = new_page
    choose(page, "Candidates", "French")
    click_example(page, "German")
    assert answer(page)["language"] == "French"


def test_where_no_adapter_writes_the_language_the_page_warns(page):
    click_example(page, "Finnish, no adapter")
    seen = answer(page)
    assert (seen["language"], seen["writer"]) == ("Finnish", "the base model")
    assert "No adapter for Finnish" in page.locator(".wm-warning").inner_text()


def test_a_long_recording_is_written_in_segments_with_rising_times(page):
    click_example(page, "German, four sentences")
    answer(page)
    rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in page.locator(".wm-segments tbody tr").all()]
    assert len(rows) >= 2
    times = [time for start, end, _ in rows for time in (start, end)]
    assert times == sorted(times)
    page.get_by_role("button", name="JSON").click()
    page.locator("#json").get_by_text("start_s").first.wait_for()  # the panel opens with a movement


def test_two_people_at_once_get_their_own_text(open_page):
    first, second = open_page(), open_page()
    click_example(first, "German")
    click_example(second, "Spanish")
    assert (answer(first)["language"], answer(second)["language"]) == ("German", "Spanish")


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_silence_is_called_silence_and_the_next_request_works(page, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(48_000), 16_000)
    upload(page, tmp_path / "silence.wav")
    page.get_by_text("Nothing was written down.").wait_for()
    assert "silent" in page.locator("#result").inner_text()
    click_example(page, "English")
    assert answer(page)["language"] == "English"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(bytes(range(256)) * 40), "cannot be read|not a recording|damaged"),
        (lambda path: soundfile.write(path, np.zeros(8000 * 660, np.float32), 8000, "PCM_U8"), "longer than 10 minutes"),
    ],
    ids=["zero bytes", "no sound inside", "eleven minutes"],
)
def test_a_useless_file_gets_a_readable_message_and_the_next_request_works(page, tmp_path, make, said):
    make(tmp_path / "bad.wav")
    page.locator("#audio input[type=file]").set_input_files(tmp_path / "bad.wav")
    page.get_by_role("button", name="Clear").wait_for()
    page.get_by_role("button", name="Transcribe").click()
    heard = message(page)
    assert re.search(said, heard), heard
    assert "Traceback" not in heard
    page.get_by_text("No text this time").wait_for()
    click_example(page, "English")
    assert answer(page)["language"] == "English"


def test_a_file_that_is_too_large_is_refused_during_the_upload(page, tmp_path):
    soundfile.write(tmp_path / "large.wav", np.zeros(4_500_000, np.int16), 16_000)
    page.locator("#audio input[type=file]").set_input_files(tmp_path / "large.wav")
    assert "size" in message(page)
    click_example(page, "Spanish")
    assert answer(page)["language"] == "Spanish"


def test_no_recording_at_all_is_said(new_page):
    page = new_page
    page.get_by_role("button", name="Transcribe").click()
    assert "There is no recording yet" in message(page)


# ---- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light")], ids=["desktop", "dark", "phone"])
def test_the_answer_fits_the_screen_and_can_be_read(open_page, size, scheme, request):
    page = open_page(size, scheme)
    click_example(page, "Welsh")
    answer(page)
    page.wait_for_function("document.querySelector('.wm-text').getBoundingClientRect().top < innerHeight", timeout=5000)  # in view
    page.get_by_role("button", name="Options").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "it scrolls sideways"
    assert serious_findings(page) == []
    page.get_by_role("button", name="Options").click()
    save_picture(page, f"demo_{request.node.callspec.id}", whole=size is DESKTOP)


def serious_findings(page: Any) -> list[str]:
    """What axe finds wrong for people who read with difficulty or with a screen reader."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{fault['id']}: {fault['nodes'][0]['html']}" for fault in found if fault["impact"] in ("serious", "critical")]


def save_picture(page: Any, name: str, *, whole: bool) -> None:
    """A picture of the whole page, or of the answer as the screen shows it, if the environment asks for one."""
    folder = os.environ.get("DEMO_SCREENSHOTS")
    if folder:
        page.locator("#result").evaluate("result => result.scrollIntoView()")
        page.wait_for_timeout(700)  # Gradio's transitions
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)
