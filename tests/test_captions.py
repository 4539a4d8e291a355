"""Transcripts as files: what pysubs2 and json read back is what was said, whatever it was and whatever the recording is called."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pysubs2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whisper_moe.captions import FORMATS, LINE_WIDTH, captions, find_cues, safe_name, unique_names, write_files
from whisper_moe.explain import explain
from whisper_moe.transcribe import Segment, Transcript

ENGLISH = (
    "This is a rather long piece, as the model writes it for half a minute of speech. It holds several sentences! Some are short. Others "
    "go on and on without a comma for so long that nobody could read them in one breath and they have to be cut somewhere in between."
)
JAPANESE = (
    "昨日は友達と一緒に東京へ行きました。とても楽しかったですが、少し疲れました。"
    "来週もまた行きたいと思っていますので、「一緒に行きませんか」と聞いてみます。"
)
THAI = "เมื่อวานนี้ฉันไปเที่ยวกับเพื่อนที่กรุงเทพมหานครแล้วก็กินข้าวด้วยกันหลายอย่างมากมายจนอิ่ม แล้วกลับบ้าน"
ARABIC = "مرحبا بالعالم، كيف حالك اليوم؟ أنا بخير 123 شكرا."


def transcript_of(*segments: Segment, text: str | None = None) -> Transcript:
    whole = " ".join(part.text for part in segments) if text is None else text
    facts: dict[str, Any] = {"probabilities": {"cy": 0.9}, "no_speech": 0.0, "adapter_info": None, "warnings": ()}
    return Transcript(
        whole, segments, "cy", "Welsh", 0.9, adapter=None, reason="Why.", duration_s=9.0, model="tiny", elapsed_s=0.1, **facts
    )  # fmt: skip


def read_back(written: str, kind: str) -> list[tuple[int, int, str]]:
    """Start, end and text of what a reader finds; the text without line breaks and spaces, and without what shows nothing."""
    if kind == "vtt":
        assert written.startswith("WEBVTT\n")
    found = pysubs2.SSAFile.from_string(written, kind)
    return [
        (cue.start, cue.end, seen(html.unescape(cue.text.replace(r"\N", "")) if kind == "vtt" else cue.text.replace(r"\N", "")))
        for cue in found
    ]


def seen(text: str) -> str:
    """What is left of a text when spaces, control characters, half letters and marks that show nothing are gone."""
    return "".join(letter for letter in text if not letter.isspace() and unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))


# ---- any text, any times ---------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["-->", "<i>", "</b>", "{\\an8}", "{\\p1}", "\\N", "&amp;", "&", "1984", "00:00:01,000", "01:02.500", "\n\n7\n", "NOTE", "ב", "你好"]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=12).map(" ".join))
TIMES = st.lists(st.floats(0, 20_000, allow_nan=False), min_size=2, max_size=8).map(sorted)


@pytest.mark.parametrize("kind", ["srt", "vtt"])
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), times=TIMES)
@example(texts=["at 00:00:01,000 --> 00:00:02,000", "in\n1984", "{\\p1} drawn"], times=[0.0, 1.0, 2.0])
@example(texts=[f"{'x' * 42} 1984"], times=[3599.9996, 3725.5])
def test_any_text_and_times_are_read_back_whole_in_order_and_inside_the_piece(kind: Any, texts: list[str], times: list[float]) -> None:
    parts = list(zip(times, times[1:], texts, strict=False))
    written = captions(parts, kind)
    cues = read_back(written, kind)
    assert written.count("-->") == len(cues), "an arrow that is said is no arrow to stricter readers either"
    assert "".join(text for *_, text in cues) == seen("".join(text for *_, text in parts))
    stamps = [stamp for start, end, _ in cues for stamp in (start, end)]
    assert stamps == sorted(stamps)
    for start_s, end_s, text in parts:  # each part's cues fill its time
        found = read_back(captions([(start_s, end_s, text)], kind), kind)
        if seen(text):
            assert (found[0][0], found[-1][1]) == (round(1000 * start_s), round(1000 * end_s))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example(ENGLISH)
@example(JAPANESE)
@example("x" * 300)
def test_a_cue_has_at_most_two_lines_that_a_screen_holds(text: str) -> None:
    for cue in find_cues([(0.0, 30.0, text)]):
        assert 1 <= len(cue.lines) <= 2
        for line in cue.lines:
            letters = [letter for letter in line if unicodedata.category(letter) not in ("Mn", "Me", "Cf")]
            assert sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in letters) <= LINE_WIDTH


# ---- how it reads ----------------------------------------------------------------------------------------------------


def test_words_stay_whole_and_cues_end_where_sentences_do() -> None:
    cues = find_cues([(0.0, 20.0, ENGLISH)])
    lines = [line for cue in cues for line in cue.lines]
    assert " ".join(lines) == ENGLISH
    assert [cue.lines[-1] for cue in cues][1] == "Some are short."
    assert find_cues([(0.0, 2.0, "One two. Three four.")])[0].lines == ("One two. Three four.",), "short sentences share a cue"


def test_time_is_shared_by_letters() -> None:
    first, second = find_cues([(10.0, 14.0, f"{'a' * 40} {'b' * 40}. {'c' * 27}.")])
    assert (first.start_ms, second.end_ms) == (10_000, 14_000)
    assert first.end_ms == second.start_ms == 10_000 + 4000 * 81 // 109


def test_scripts_without_spaces_are_cut_between_letters_but_not_before_marks_that_end_something() -> None:
    for text in (JAPANESE, THAI, "字" * 200, "「" * 3 + "ま" * 45 + "まゃ。」" * 9):
        lines = [line for cue in find_cues([(0.0, 20.0, text)]) for line in cue.lines]
        assert len(lines) > 1
        for line in lines:
            assert unicodedata.category(line[0]) not in ("Mn", "Pe", "Po"), line
            assert line[0] != "ゃ"
            assert line[-1] not in "「แเ", line


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_right_to_left_lines_say_so_at_both_ends(kind: Any) -> None:
    mark = "\u200f"
    lines = captions([(0.0, 2.0, ARABIC), (2.0, 3.0, "Bore da 123.")], kind).splitlines()
    spoken = [line for line in lines if re.search(r"[^\W\d]", line) and "WEBVTT" not in line]
    assert [(line.startswith(mark), line.endswith(mark)) for line in spoken] == [(True, True), (True, True), (False, False)]


def test_what_is_ordinary_is_written_as_it_is() -> None:
    parts = [(0.0, 1.25, 'Mae\'r "capel" ar: 3 < 4, {a} & b; 10:30.'), (3599.9996, 3725.5, "Nos da.")]
    assert captions(parts, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,250\nMae'r \"capel\" ar: 3 < 4, {a} & b; 10:30.\n\n"
        "2\n01:00:00,000 --> 01:02:05,500\nNos da.\n"
    )  # fmt: skip
    assert "3 &lt; 4, {a} &amp; b; 10:30." in captions(parts, "vtt")
    assert captions([], "vtt") == "WEBVTT\n"
    assert captions([], "srt") == "\n"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_every_format_is_written_and_json_is_the_transcript(tmp_path: Path) -> None:
    transcript = transcript_of(Segment(0.5, 2.0, "Bore da.", "cy"), Segment(2.5, 4.0, ARABIC, "ar"))
    files = write_files(transcript, tmp_path / "new", "talk")
    assert {kind: path.name for kind, path in files.items()} == {kind: f"talk.{kind}" for kind in FORMATS}
    assert sorted(tmp_path.rglob("*.*")) == sorted(files.values())
    assert files["txt"].read_text("utf-8") == f"Bore da. {ARABIC}\n"
    found = json.loads(files["json"].read_text("utf-8"))
    assert found["decision"]["sentence"] == explain(transcript).sentence
    assert {name: found[name] for name in transcript.to_dict()} == json.loads(json.dumps(transcript.to_dict()))
    for kind in ("srt", "vtt"):
        cues = pysubs2.load(str(files[kind]))
        assert (cues[0].start, cues[0].end, cues[0].text) == (500, 2000, "Bore da.")
        assert (cues[1].start, cues[-1].end) == (2500, 4000)


def test_half_a_letter_does_not_stop_any_format(tmp_path: Path) -> None:
    files = write_files(transcript_of(Segment(0.0, 1.0, "a \ud800 b")), tmp_path, "x")
    assert json.loads(files["json"].read_text("utf-8"))["text"] == "a \ud800 b"
    assert files["txt"].read_text("utf-8") == "a ? b\n"


def test_only_the_formats_asked_for_are_written_and_unknown_ones_are_refused_first(tmp_path: Path) -> None:
    write_files(transcript_of(), tmp_path, "x", ["vtt"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.vtt"]
    with pytest.raises(ValueError, match=r"Unknown format: 'doc'\. Known: txt, srt, vtt, json"):
        write_files(transcript_of(), tmp_path / "other", "x", ["txt", "doc"])  # type: ignore[list-item]
    assert not (tmp_path / "other").exists()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\windows\\talk", "talk"),
        ("a:b*c?<d>|\"e'.", "a b c d e'"),
        ("con", "_con"),
        ("LPT1.tar", "_LPT1.tar"),
        ("consul", "consul"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("fdp.\u202egpj", "fdp.gpj"),
        ("नमस्ते 你好", "नमस्ते 你好"),
        ("e\u0301", "é"),
        ("..", "recording"),
        ("\n", "recording"),
    ],
)
def test_names_are_made_safe_and_kept_as_far_as_they_are(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
def test_any_name_can_be_written_on_this_system_and_stays_in_its_folder(a: str, b: str) -> None:
    name = safe_name(f"{a}/{b * 40}")
    assert name
    assert name == safe_name(name)
    assert not set(name) & set('/\\<>:"|?*\0\n')
    assert len(name.encode()) <= 121
    assert Path("folder", name).parent == Path("folder")


@given(st.lists(st.sampled_from(["talk", "Talk", "talk (2)", "TALK (2)", "é", "e\u0301", "x/talk", ""])))
def test_names_that_some_systems_take_for_one_are_told_apart(names: list[str]) -> None:
    unique = unique_names(names)
    assert len({name.casefold() for name in unique}) == len(names)
    assert unique[:1] == [safe_name(name) for name in names[:1]]
