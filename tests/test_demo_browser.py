"""The page in a real browser, offline: the real app in a process of its own, with the shipped pocket and its adapters.

Fixtures and steps are in tests/browser.py. Pictures for docs/demo.md are
written only when asked for:

    DEMO_SCREENSHOTS=docs/images pytest tests/test_demo_browser.py
"""

from __future__ import annotations

import json
import re

import numpy as np
import pysubs2
import pytest
import soundfile
from browser import (
    DESKTOP,
    EXAMPLES,
    PHONE,
    READABLE,
    ROWS,
    Window,
    answer,
    character_errors,
    choose,
    click_example,
    message,
    save_picture,
    serious_findings,
    served,
    upload,
)

from whisper_moe import load_audio

pytestmark = [pytest.mark.e2e, pytest.mark.pocket]
pytest.importorskip("gradio", reason="[e2e] to run it: pip install peft-s2lora[demo,e2e]")
pytest.importorskip("playwright.sync_api", reason="[e2e] to run it: pip install peft-s2lora[demo,e2e]")


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
    page.locator("#json").get_by_role("button", name="JSON").click()
    page.locator("#json").get_by_text("start_s").first.wait_for()  # the panel opens with a movement


def test_the_base_models_text_stands_beside_the_adapters_unless_that_is_not_wanted(new_page):
    page = new_page
    click_example(page, "Welsh")
    ours = answer(page)
    page.locator(".wm-compare del").first.wait_for()
    theirs = page.locator(".wm-base-text").inner_text()
    assert page.locator(".wm-compare h3").all_inner_texts() == ["With the adapter cy", "The base model alone"]
    assert character_errors(ROWS["Welsh"]["text"], theirs) > character_errors(ROWS["Welsh"]["text"], ours["text"])
    assert page.locator(".wm-text ins").first.inner_text().strip() in ours["text"]
    assert "differ" in page.locator("#text").inner_text()
    assert "WER" in ours["sentence"]
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Compare with the base model").uncheck()
    click_example(page, "Welsh")
    assert answer(page)["text"] == ours["text"]
    page.locator("#stop").wait_for(state="hidden")
    assert page.locator(".wm-compare").count() == 0


def test_below_the_threshold_the_sentence_says_so_and_two_languages_can_be_tried(new_page):
    page = new_page
    choose(page, "Candidates", "Welsh")
    page.get_by_label("Candidates").press_sequentially("Swed")
    page.get_by_role("option", name="Swedish", exact=True).wait_for()
    page.keyboard.press("Enter")
    page.get_by_label("number input for Threshold").fill("1")
    page.keyboard.press("Tab")
    click_example(page, "Welsh")
    seen = answer(page)
    assert "2 allowed) → the base model" in seen["sentence"]
    assert "below the threshold of 100 %" in seen["sentence"]
    assert "Only your candidates could be heard (Welsh, Swedish)" in seen["all"]
    page.get_by_label("Unsure? Try the two best languages").check()
    click_example(page, "Welsh")
    seen = answer(page)
    rows = page.locator(".wm-scores tbody tr").all_inner_texts()
    assert sorted(row.split()[0] for row in rows) == ["Swedish", "Welsh"]
    assert "kept" in next(row for row in rows if row.startswith(seen["language"]))


def test_a_recording_in_two_languages_shows_each_piece_with_its_language_and_writer(new_page, tmp_path):
    page = new_page
    welsh, english = (load_audio(EXAMPLES / file) for file in ("welsh.ogg", "english.wav"))
    pause = np.zeros(16_000, np.float32)
    soundfile.write(tmp_path / "two.wav", np.concatenate([welsh, pause, english, pause, welsh]), 16_000)
    page.get_by_role("button", name="Options").click()
    page.get_by_label("The language may change").check()
    upload(page, tmp_path / "two.wav")
    seen = answer(page)
    chips = page.locator(".wm-chip").all_inner_texts()
    assert [chip.split()[0] for chip in chips] == ["cy", "en", "cy"], chips
    assert "adapter cy" in chips[0]
    assert "base model" in chips[1]
    assert re.match(r"Welsh [\d.]+ s → adapter cy, .*; English [\d.]+ s → the base model", seen["sentence"]), seen["sentence"]
    assert page.locator(".wm-strip i").all_inner_texts() == ["cy", "en", "cy"]
    page.locator(".wm-compare del").first.wait_for()
    assert serious_findings(page) == []
    save_picture(page, "demo_switching", whole=False)
    choose(page, "Language", "Welsh (adapter cy)")
    page.get_by_role("button", name="Transcribe").click()
    assert "untick" in message(page)


def test_the_answer_can_be_downloaded_played_by_its_times_and_read_under_the_player(page):
    click_example(page, "German, four sentences")
    seen = answer(page)
    files = {}
    for kind in ("txt", "srt", "vtt", "json"):
        with page.expect_download() as download:
            page.locator(f"#download-{kind}").click()
        assert download.value.suggested_filename == f"german_long.{kind}"
        files[kind] = download.value.path().read_text("utf-8")
    assert files["txt"].split() == seen["text"].split()
    for kind in ("srt", "vtt"):
        cues = pysubs2.SSAFile.from_string(files[kind], kind)
        assert " ".join(cue.plaintext for cue in cues).split() == seen["text"].split()
        assert [cue.start for cue in cues] == sorted(cue.start for cue in cues)
    data = json.loads(files["json"])
    assert (data["text"], data["language"]) == (seen["text"], "de")
    last = page.locator(".wm-seek").last
    begin = last.inner_text()
    last.click()
    caption = page.get_by_test_id("subtitle-display")
    said = page.locator(".wm-said").last.inner_text()
    page.wait_for_function("said => document.querySelector('[data-testid=subtitle-display]').innerText.trim() === said", arg=said)
    assert caption.inner_text().strip() in seen["text"]
    assert page.locator("#audio time").first.inner_text() >= begin.split(".")[0]
    page.get_by_role("button", name="Clear", exact=True).click()
    page.locator("#audio input[type=file]").set_input_files(EXAMPLES / "german_long.ogg")
    page.locator("#audio time").get_by_text("0:12").wait_for()
    page.wait_for_timeout(500)  # the player takes no click while it draws
    page.get_by_role("button", name="Play", exact=True).click()
    page.locator("#audio time").get_by_text("0:01").wait_for()
    assert caption.inner_text() == "", "captions of the recording before"


def test_stop_ends_a_long_recording_keeps_its_text_and_leaves_the_next_request_alone(page, tmp_path):
    sentence = load_audio(EXAMPLES / "german_long.ogg")
    soundfile.write(tmp_path / "long.wav", np.concatenate([sentence] * 18), 16_000)
    upload(page, tmp_path / "long.wav")
    page.locator(".wm-partial").wait_for()
    assert re.search(r"Writing, \d+ of \d+ parts done", page.locator(".wm-working").inner_text())
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped. This is what was written until then.").wait_for()
    assert "Markt" in page.locator(".wm-partial").inner_text()
    page.locator("#stop").wait_for(state="hidden")
    click_example(page, "English")
    assert answer(page)["language"] == "English"


def test_a_second_press_with_another_recording_has_the_last_word(page, tmp_path):
    sentence = load_audio(EXAMPLES / "german_long.ogg")
    soundfile.write(tmp_path / "long.wav", np.concatenate([sentence] * 18), 16_000)
    upload(page, tmp_path / "long.wav")
    page.locator(".wm-partial").wait_for()
    page.get_by_role("button", name="Clear", exact=True).click()
    upload(page, EXAMPLES / "english.wav")
    seen = answer(page)
    assert character_errors(ROWS["English"]["text"], seen["text"]) <= READABLE, seen["text"]
    page.wait_for_timeout(1500)  # what the first one still had to say
    assert page.locator(".wm-text").inner_text() == seen["text"]
    assert not page.locator("#stop").is_visible()
    assert page.locator("#text [aria-live=polite], #text[aria-live=polite]").count() == 1, "the text is not read out"


def test_stop_reaches_what_still_waits_for_its_turn_and_the_next_request_works(browser, tmp_path):
    sentence = load_audio(EXAMPLES / "german_long.ogg")
    soundfile.write(tmp_path / "long.wav", np.concatenate([sentence] * 45), 16_000)
    (tmp_path / "server").mkdir()
    with served(tmp_path / "server", "--max-at-once", "1") as url:
        busy, waiting = Window(browser, url, DESKTOP, "light"), Window(browser, url, DESKTOP, "light")
        upload(busy.page, tmp_path / "long.wav")
        busy.page.locator(".wm-partial").wait_for()
        page = waiting.page
        upload(page, EXAMPLES / "german.ogg")
        page.get_by_text("Waiting for the model").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped before anything was written.").wait_for()
        page.locator("#stop").wait_for(state="hidden")
        click_example(page, "English")
        page.get_by_role("tab", name="Many files").click()
        page.locator("#batch-files input[type=file]").set_input_files(EXAMPLES / "welsh.ogg")
        page.locator("#batch-files").get_by_text("welsh").first.wait_for()
        page.locator("#batch-start").click()
        page.locator("#batch-stop").click()
        page.get_by_text("Stopped before any file was begun.").wait_for()
        page.locator("#batch-stop").wait_for(state="hidden")
        page.locator("#batch-start").click()
        assert busy.page.locator(".wm-partial").count(), "there was nothing to wait for"
        busy.page.get_by_role("button", name="Stop").click()
        page.get_by_text("1 file written").wait_for()
        page.locator("#batch-stop").wait_for(state="hidden")
        page.get_by_role("tab", name="Transcribe").click()
        assert answer(page)["language"] == "English"
        for window in (busy, waiting):
            window.context.close()
            window.check()


def test_everything_can_be_done_by_keyboard(new_page):
    page = new_page
    focused = "[document.activeElement.innerText, document.activeElement.getAttribute('aria-label')].join(' ')"

    def tab_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if name in page.evaluate(focused):
                return
        raise AssertionError(f"no way to {name!r} by keyboard")

    tab_to("Upload")
    tab_to("Welsh")
    page.keyboard.press("Enter")
    assert answer(page)["writer"] == "adapter cy"
    tab_to("Options")
    page.keyboard.press("Enter")
    page.get_by_label("Threshold").first.wait_for()
    tab_to("Text (txt)")
    tab_to("0:00.0")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Pause").wait_for()


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


def test_the_shipped_adapters_are_shown_with_their_figures_and_origin(open_page):
    page = open_page()
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_text("shipped with the pocket").first.wait_for()
    shown = page.locator("#adapters").inner_text()
    for name in ("cy", "qug", "en-child"):
        assert name in shown
    page.wait_for_timeout(700)  # Gradio's transitions
    save_picture(page, "demo_adapters", whole=True, part="#adapters")
