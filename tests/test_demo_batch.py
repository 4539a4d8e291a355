"""The batch tab: what comes of many files, the zip of them, and the tab in a real browser (fixtures and steps are in tests/browser.py)."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pysubs2
import pytest
import soundfile
from browser import DESKTOP, EXAMPLES, PHONE, READABLE, ROWS, character_errors, message, save_picture, serious_findings

from demo import views_batch
from demo.batch import Batch, Item, Progress, decisions_csv, table_csv, write_zip
from demo.page import Limits
from demo.stops import Run
from whisper_moe.audio import AudioError
from whisper_moe.captions import FORMATS
from whisper_moe.transcribe import Segment, Transcript

HEBREW = "שלום עולם"


def transcript_of(text: str, **values: Any) -> Transcript:
    facts: dict[str, Any] = {
        "segments": (Segment(0.0, 2.0, text, "cy", "cy"),),
        "language": "cy",
        "language_name": "Welsh",
        "probability": 0.91,
        "probabilities": {"cy": 0.91, "br": 0.04},
        "no_speech": 0.0,
        "adapter": "cy",
        "reason": "Welsh was heard.",
        "warnings": (),
        "adapter_info": {"name": "cy", "peft_type": "S2LORA", "num_bytes": 41_300, "metrics": {"after": {"wer": 0.18}}},
        "duration_s": 2.0,
        "model": "tiny",
        "elapsed_s": 0.1,
    }
    return Transcript(text, **(facts | values))


class Scripted:
    """In place of a transcriber: what happens to a file is what the test says for its name. Notes how many are worked on at once."""

    def __init__(self, script: dict[str, Callable[[Callable[[float, str], None]], str]] | None = None) -> None:
        self.script, self.lock = script or {}, threading.Lock()
        self.at_once = self.most_at_once = 0
        self.options: list[dict[str, Any]] = []

    def transcribe(self, audio: str, *, on_progress: Callable[[float, str], None], **options: Any) -> Transcript:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
            self.options.append(options)
        try:
            on_progress(0.0, "Reading")
            name = Path(audio).name
            return transcript_of(self.script[name](on_progress) if name in self.script else f"This is {name}")
        finally:
            with self.lock:
                self.at_once -= 1


def refuse(error: Exception) -> Callable[[Any], str]:
    def raise_it(_: Any) -> str:
        raise error

    return raise_it


def finish(batch: Batch) -> Progress:
    *_, last = batch.rounds()
    return last


# ---- what comes of the files -----------------------------------------------------------------------------------------


def test_bad_files_do_not_end_the_others_and_results_keep_the_order_given() -> None:
    slow = threading.Event()
    script = {
        "1.wav": lambda _: slow.wait(5) and "the first, done last",
        "2.wav": refuse(AudioError("'/uploads/x/2.wav' is empty.")),
        "3.wav": refuse(RuntimeError("an index is out of range in layer 7")),
        "4.wav": lambda _: slow.set() or "done first",
    }
    done = finish(Batch(Scripted(script), [f"/uploads/x/{n}.wav" for n in range(1, 5)], Run(), max_files=4))  # type: ignore[arg-type]
    assert [item.state for item in done.items] == ["done", "failed", "failed", "done"]
    assert [item.transcript.text for item in done.items if item.transcript] == ["the first, done last", "done first"]
    assert done.items[1].error == "'2.wav' is empty.", "in the visitor's words, without our folders"
    assert "layer 7" not in (done.items[2].error or "")
    assert done.is_over
    assert done.left_s is None


def test_files_are_worked_on_side_by_side_but_no_more_than_allowed() -> None:
    together = threading.Barrier(3, timeout=5)  # opens only if three are there at once
    script = {f"{n}.wav": lambda _: str(together.wait()) for n in range(6)}
    transcriber = Scripted(script)
    batch = Batch(transcriber, list(script), Run(), max_files=6, at_once=3, language="cy", adapter=None)  # type: ignore[arg-type]
    assert finish(batch).count("done") == 6
    assert transcriber.most_at_once == 3
    assert transcriber.options == [{"language": "cy", "adapter": None}] * 6


def test_stop_keeps_what_is_done_and_ends_the_rest() -> None:
    run, reached, went_on = Run(), threading.Event(), []

    def goes_on(tell: Callable[[float, str], None]) -> str:
        reached.set()
        for step in range(500):
            time.sleep(0.01)
            tell(step / 500, "Writing")
        went_on.append("to the end")
        return "never"

    transcriber = Scripted({"2.wav": goes_on})
    batch = Batch(transcriber, ["1.wav", "2.wav", "3.wav"], run, max_files=3, at_once=1)  # type: ignore[arg-type]
    for last in batch.rounds():
        if last.count("working") and reached.is_set():
            run.stop()
    assert [item.state for item in last.items] == ["done", "stopped", "stopped"]
    assert not went_on


def test_work_ends_when_nobody_looks_any_more() -> None:
    ended = threading.Event()

    def goes_on(tell: Callable[[float, str], None]) -> str:
        try:
            for _ in range(2000):
                time.sleep(0.005)
                tell(0.5, "Writing")
            return "never"
        finally:
            ended.set()

    rounds = Batch(Scripted({"1.wav": goes_on}), ["1.wav"], Run(), max_files=1).rounds()  # type: ignore[arg-type]
    next(rounds)
    rounds.close()
    assert ended.wait(3)


def test_too_many_or_no_files_are_refused_before_any_work() -> None:
    transcriber = Scripted()
    with pytest.raises(ValueError, match=r"At most 2 files .* these are 3"):
        Batch(transcriber, ["1.wav", "2.wav", "3.wav"], Run(), max_files=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no recordings yet"):
        Batch(transcriber, [], Run(), max_files=2)  # type: ignore[arg-type]
    assert not transcriber.options


def test_time_left_follows_the_size_of_what_is_left(tmp_path: Path) -> None:
    """A tenth of the bytes is done in about 0.1 s, so what is left takes about nine times as long; by number of files it would be once."""
    for name, size in (("small.wav", 1000), ("large.wav", 9000)):
        (tmp_path / name).write_bytes(bytes(size))
    is_seen = threading.Event()

    def small(_: Any) -> str:
        time.sleep(0.1)
        return "small"

    transcriber = Scripted({"small.wav": small, "large.wav": lambda _: str(is_seen.wait(10))})
    batch = Batch(transcriber, [tmp_path / "small.wav", tmp_path / "large.wav"], Run(), max_files=2)  # type: ignore[arg-type]
    began = time.monotonic()
    for progress in batch.rounds():
        if progress.count("done") == 1 and progress.left_s is not None and not is_seen.is_set():
            took = time.monotonic() - began
            assert progress.left_s == pytest.approx(9 * took, rel=0.3)
            is_seen.set()
    assert is_seen.is_set()


# ---- the zip ---------------------------------------------------------------------------------------------------------


def items_of(*files: tuple[str, Transcript | str]) -> tuple[Item, ...]:
    """As a batch makes them; a string is the error."""
    script = {name: refuse(ValueError(what)) if isinstance(what, str) else (lambda _: "") for name, what in files}
    made = finish(Batch(Scripted(script), [f"/u/{n}/{name}" for n, (name, _) in enumerate(files)], Run(), max_files=9)).items  # type: ignore[arg-type]
    return tuple(
        item if isinstance(what, str) else Item(item.name, item.stem, "done", 1.0, what)
        for item, (_, what) in zip(made, files, strict=True)
    )


def rows_of(written: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written.decode("utf-8-sig"))))


def test_the_zip_holds_every_text_in_every_format_and_the_tables(tmp_path: Path) -> None:
    items = items_of(("talk.ogg", transcript_of("one")), ("talk.wav", transcript_of(HEBREW)), ("bad.wav", "It is empty."))
    write_zip(items, tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
    texts = {f"{stem}.{kind}" for stem in ("talk", "talk (2)") for kind in ("txt", "srt", "vtt", "json")}
    assert found.keys() == texts | {"table.csv", "decisions.csv"}
    assert found["talk (2).txt"].decode() == f"{HEBREW}\n"
    assert json.loads(found["talk.json"])["text"] == "one"
    assert pysubs2.SSAFile.from_string(found["talk.srt"].decode())[0].text == "one"
    table = rows_of(found["table.csv"])
    assert [(row["file"], row["texts"], row["text"], row["error"]) for row in table] == [
        ("talk.ogg", "talk", "one", ""),
        ("talk.wav", "talk (2)", HEBREW, ""),
        ("bad.wav", "", "", "It is empty."),
    ]
    decisions = rows_of(found["decisions.csv"])
    assert [(row["file"], row["adapter"], row["wer_after"]) for row in decisions] == [
        ("talk.ogg", "cy", "0.18"),
        ("talk.wav", "cy", "0.18"),
    ]
    assert "Welsh 91 %" in decisions[0]["decision"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "＝1+1", " =cmd|' /C calc'!A0"])
def test_no_cell_of_a_table_is_run_by_a_spreadsheet(text: str) -> None:
    items = items_of((f"{text}.wav", transcript_of(text, reason=text, segments=())))
    cells = [cell for written in (table_csv(items), decisions_csv(items)) for row in rows_of(written) for cell in row.values()]
    assert f"'{text}" in cells
    assert not [cell for cell in cells if cell.strip()[:1] in tuple("=+-@＝")]


def test_a_recording_goes_by_the_name_that_the_visitor_gave_it() -> None:
    batch = Batch(Scripted(), ["/u/1/Talk 1.wav"], Run(), max_files=1, names=["Talk (1?).wav"])  # type: ignore[arg-type]
    (item,) = finish(batch).items
    assert (item.name, item.stem) == ("Talk (1?).wav", "Talk (1 )")


def test_names_from_outside_cannot_lead_out_of_the_zip() -> None:
    items = items_of(("..\\..\\evil.wav", transcript_of("a")), ("con.wav", transcript_of("b")), ("-.wav", transcript_of("c")))
    assert [item.stem for item in items] == ["evil", "_con", "recording"]


# ---- how it is shown -------------------------------------------------------------------------------------------------


def test_everything_from_outside_is_escaped() -> None:
    bad = "<script>alert(1)</script>"
    written = transcript_of(bad, language_name=bad, adapter=bad, warnings=(bad,), language='"><b>')
    items = (
        Item(bad, "x", "done", 1.0, written),
        Item(bad, "y", "failed", error=bad),
        Item(bad, "z", "done", 1.0, transcript_of("", reason=bad)),
    )
    shown = views_batch.batch(Progress(items, None, is_over=True))
    assert "<script" not in shown
    assert '"><b>' not in shown
    assert shown.count("&lt;script&gt;") == 9


def test_the_table_says_of_each_file_what_became_of_it() -> None:
    nobody = transcript_of("", segments=(), language=None, language_name="", probability=None, adapter=None, reason="Silent.")
    items = (
        Item("a.wav", "a", "done", 1.0, transcript_of("word " * 60)),
        Item("b.wav", "b", "working", 0.4),
        Item("c.wav", "c"),
        Item("d.wav", "d", "stopped"),
        Item("e.wav", "e", "done", 1.0, nobody),
    )  # fmt: skip
    shown = views_batch.batch(Progress(items, 80.0, is_over=False))
    for said in (
        "3 of 5 files finished",
        "About 1\u00a0min left",
        "Working, 40\u00a0%",
        "Waiting",
        "Stopped before",
        "91\u00a0%",
        "word …",
        "Silent.",
        "nobody speaks",
    ):
        assert said in shown, said
    over = views_batch.batch(Progress(items[:1] + items[3:4], None, is_over=True))
    assert "1 file written; 1 left out, because you pressed Stop." in over
    assert "<progress" not in over


def test_the_limits_are_said_before_anybody_meets_them() -> None:
    assert "Up to 7 files" in views_batch.limits(Limits(max_files=7, max_minutes=2.5, max_upload_mb=8))
    assert "2.5 minutes" in views_batch.limits(Limits(max_files=7, max_minutes=2.5, max_upload_mb=8))
    assert "8 MB" in views_batch.limits(Limits(max_files=7, max_minutes=2.5, max_upload_mb=8))


# ---- in the browser --------------------------------------------------------------------------------------------------


def open_tab(page: Any) -> None:
    page.get_by_role("tab", name="Many files").click()
    page.locator("#batch-start").wait_for()


def choose_files(page: Any, files: list[Path]) -> None:
    clear = page.locator("#batch-files").get_by_role("button", name="Clear", exact=True)
    if clear.count():
        clear.click()
    page.locator("#batch-files input[type=file]").set_input_files(files)
    page.locator("#batch-files").get_by_text(files[-1].stem).first.wait_for()


def table_rows(page: Any) -> list[list[str]]:
    return page.locator("table.wm-batch tbody tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")


def download_zip(page: Any, path: Path) -> dict[str, bytes]:
    page.locator("#batch-zip").wait_for()
    with page.expect_download() as event:
        page.locator("#batch-zip").click()
    event.value.save_as(path)
    assert event.value.suggested_filename == "transcripts.zip"
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.e2e
@pytest.mark.pocket
def test_several_files_fill_a_table_and_one_zip_and_stop_keeps_what_is_done(new_page: Any, tmp_path: Path) -> None:
    page = new_page
    open_tab(page)
    page.locator("#batch-start").click()
    assert "no recordings yet" in message(page)

    welsh, german, bad = (tmp_path / name for name in ("a/talk.ogg", "b/talk.ogg", "bad.wav"))
    for path, content in ((welsh, EXAMPLES / "welsh.ogg"), (german, EXAMPLES / "german.ogg")):
        path.parent.mkdir()
        path.write_bytes(content.read_bytes())
    bad.write_bytes(bytes(range(256)) * 40)
    choose_files(page, [EXAMPLES / "english.wav", welsh, german])
    page.get_by_test_id("Add more files-upload-button").set_input_files(bad)
    page.locator("#batch-files").get_by_text("bad").wait_for()
    page.locator("#batch-start").click()
    page.get_by_text("3 files written; 1 failed").wait_for()
    rows = table_rows(page)
    assert [row[0] for row in rows] == ["english.wav", "talk.ogg", "talk.ogg", "bad.wav"]
    assert [row[3] for row in rows[:3]] == ["the base model", "adapter cy", "the base model"]
    for row, label in zip(rows[:3], ("English", "Welsh", "German"), strict=True):
        assert row[2].startswith(label)
        assert character_errors(ROWS[label]["text"], row[4].splitlines()[0]) <= READABLE, row
    assert rows[3][1].startswith("Failed")
    assert str(tmp_path) not in rows[3][1]

    found = download_zip(page, tmp_path / "all.zip")
    texts = {f"{stem}.{kind}" for stem in ("english", "talk", "talk (2)") for kind in ("txt", "srt", "vtt", "json")}
    assert found.keys() == texts | {"table.csv", "decisions.csv"}
    assert found["talk.txt"].decode().strip() == rows[1][4].splitlines()[0]
    assert json.loads(found["talk.json"])["language"] == "cy"
    assert pysubs2.SSAFile.from_string(found["english.srt"].decode())[0].end > 1000
    assert [row["file"] for row in rows_of(found["table.csv"])] == ["english.wav", "talk.ogg", "talk.ogg", "bad.wav"]

    long = tmp_path / "long.wav"  # minutes of speech, so that there is time to press Stop
    samples, rate = soundfile.read(EXAMPLES / "german_long.ogg")
    soundfile.write(long, np.tile(samples[:: rate // 8000], 50)[: 8000 * 590], 8000, "PCM_U8")
    choose_files(page, [EXAMPLES / "english.wav", long])
    page.locator("#batch-start").click()
    page.get_by_text("1 of 2 files finished").wait_for()
    page.locator("#batch-stop").click()
    page.get_by_text("1 file written; 1 left out, because you pressed Stop.").wait_for()
    assert table_rows(page)[1][1] == "Stopped before it was finished"
    assert download_zip(page, tmp_path / "some.zip").keys() == {"table.csv", "decisions.csv", *(f"english.{kind}" for kind in FORMATS)}
    page.locator("#batch-stop").wait_for(state="hidden")
    assert page.locator("#batch-start").is_enabled()


@pytest.mark.e2e
@pytest.mark.pocket
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_the_batch_tab_fits_the_screen_can_be_read_and_works_by_keyboard(
    open_page: Any, tmp_path: Path, size: Any, scheme: Any, request: Any
) -> None:
    page = open_page(size, scheme)
    open_tab(page)
    empty = tmp_path / "a_recording_with_a_very_long_name_that_somebodys_telephone_gave_it_20261121.wav"
    empty.write_bytes(b"")
    choose_files(page, [EXAMPLES / "finnish.ogg", EXAMPLES / "welsh.ogg", EXAMPLES / "german_long.ogg", empty])
    page.locator("#batch-start").focus()
    page.keyboard.press("Enter")
    page.locator("#batch-zip").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "it scrolls sideways"
    page.get_by_role("button", name="Options for all files").click()
    page.locator("#batch-language").wait_for()
    assert serious_findings(page) == []
    save_picture(page, f"demo_batch_{request.node.callspec.id}", whole=True, part="#batch-table")
