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


@pytest.fixture
def open_page(server: str, browser: Any) -> Iterator[Any]:
    """Opens pages; afterwards none of them may have had a script error or a request to elsewhere."""
    contexts, faults = [], []

    def open_one(size: dict = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(ANSWER_S * 1000)
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("request", lambda request: faults.append(f"foreign request: {request.url}") if is_foreign(request.url, server) else None)
        page.goto(server)
        page.get_by_role("button", name="Transcribe").wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not faults


def is_foreign(url: str, server: str) -> bool:
    return not url.startswith((server, server.replace("http", "ws", 1), "data:", "blob:"))


@pytest.fixture
def page(open_page: Any) -> Any:
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
    """Wait for a transcript and read it: text, language, what stands below it, and who wrote it."""
    page.locator(".wm-path").wait_for()
    language, writer, _ = page.locator(".wm-path > li").all()
    return {
        "text": page.locator(".wm-text").inner_text(),
        "language": language.locator("strong").inner_text(),
        "sure": language.locator("span").last.inner_text(),
        "writer": writer.locator("strong").inner_text(),
        "all": page.locator("#result").inner_text(),
    }


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
        ("English, a high voice, adapter en-child", "English", "adapter en-child"),
    ],
)
def test_an_example_becomes_text_by_the_right_writer_in_one_click(page, label, language, writer):
    click_example(page, label)
    seen = answer(page)
    assert (seen["language"], seen["writer"]) == (language, writer)
    assert character_errors(ROWS[label]["text"], seen["text"]) <= READABLE, seen["text"]


def test_an_uploaded_recording_of_another_rate_and_two_channels_becomes_text(page, tmp_path):
    samples, rate = soundfile.read(EXAMPLES / "german.ogg")
    twice = np.interp(np.arange(0, len(samples) * 44_100 // rate) * rate / 44_100, np.arange(len(samples)), samples)
    soundfile.write(tmp_path / "upload.wav", np.stack([twice, 0.5 * twice], axis=1), 44_100)
    upload(page, tmp_path / "upload.wav")
    seen = answer(page)
    assert seen["language"] == "German"
    assert character_errors(ROWS["German"]["text"], seen["text"]) <= READABLE, seen["text"]


def test_a_recording_from_the_microphone_becomes_text(page):
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(4000)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.locator("#audio time").first.wait_for()
    page.get_by_role("button", name="Transcribe").click()
    assert answer(page)["text"]


def test_what_the_person_chooses_overrides_what_is_heard(page):
    choose(page, "Adapter", "None: the base model alone")
    choose(page, "Language", "Welsh (adapter cy)")
    upload(page, EXAMPLES / "welsh.ogg")
    seen = answer(page)
    assert (seen["language"], seen["sure"], seen["writer"]) == ("Welsh", "given, not detected", "the base model")


def test_only_allowed_candidates_are_heard(page):
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
    message = page.locator(".toast-body").inner_text()
    assert re.search(said, message), message
    assert "Traceback" not in message
    page.get_by_text("No text this time").wait_for()
    click_example(page, "English")
    assert answer(page)["language"] == "English"


def test_a_file_that_is_too_large_is_refused_during_the_upload(page, tmp_path):
    soundfile.write(tmp_path / "large.wav", np.zeros(4_500_000, np.int16), 16_000)
    page.locator("#audio input[type=file]").set_input_files(tmp_path / "large.wav")
    assert "size" in page.locator(".toast-body").inner_text()
    click_example(page, "English")
    assert answer(page)["language"] == "English"


def test_no_recording_at_all_is_said(page):
    page.get_by_role("button", name="Transcribe").click()
    assert "There is no recording yet" in page.locator(".toast-body").inner_text()


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
