"""Two texts of one recording compared: the pieces are the texts, and what is marked is what a reader would mark."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.differences import compare, compare_segments
from whisper_moe import Segment, normalize


def marked(pieces) -> str:
    return "".join(f"[{piece.text}]" if piece.differs else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("first", "second", "ours", "theirs", "count"),
    [
        ("Bore da i chi.", "Bore ta i chi.", "Bore [da] i chi.", "Bore [ta] i chi.", (1, 4)),
        ("Bore da, Mair!", "bore DA mair", "Bore da, Mair!", "bore DA mair", (0, 3)),
        ("one two three", "one three", "one [two] three", "one three", (1, 3)),
        ("one three", "one two and three", "one three", "one [two and] three", (2, 4)),
        ("one two three four", "one 2 3 four", "one [two three] four", "one [2 3] four", (2, 4)),
        ("a b", "", "[a b]", "", (2, 2)),
        ("", "", "", "", (0, 0)),
        ("well - no", "well no", "well - no", "well no", (0, 2)),
        ("café au lait", "cafe\u0301 au lit", "café au [lait]", "cafe\u0301 au [lit]", (1, 3)),
        ("今天天气很好。", "今天天很好", "今天天[气]很好。", "今天天很好", (1, 6)),
        ("我爱你", "I love you", "[我爱你]", "[I love you]", (3, 3)),
        ("สวัสดี", "สวัสดิ", "สวัส[ดี]", "สวัส[ดิ]", (1, 4)),
        ("صباح الخير", "صباح النور", "صباح [الخير]", "صباح [النور]", (1, 2)),
        ("नमस्ते दुनिया", "नमस्ते दुनीया", "नमस्ते [दुनिया]", "नमस्ते [दुनीया]", (1, 2)),
    ],
)
def test_words_or_letters_that_differ_are_marked_and_counted(first, second, ours, theirs, count):
    found = compare(first, second)
    assert (marked(found.first), marked(found.second)) == (ours, theirs)
    assert (found.num_different, found.num_compared) == count


def test_the_unit_is_the_letter_where_a_text_has_no_spaces():
    assert compare("我爱你", "我爱他").unit == "letter"
    assert compare("one two", "one").unit == "word"


TEXTS = st.text(st.sampled_from("ab cd.,- é\u0301我气สวัาดีع ك\n\u200b"), max_size=30)


@settings(deadline=None)
@given(first=TEXTS, second=TEXTS)
def test_the_pieces_are_the_texts_and_without_what_is_marked_they_agree(first, second):
    found = compare(first, second)
    assert "".join(piece.text for piece in found.first) == first
    assert "".join(piece.text for piece in found.second) == second
    left = [normalize("".join(" " if piece.differs else piece.text for piece in pieces)) for pieces in (found.first, found.second)]
    assert left[0].replace(" ", "") == left[1].replace(" ", "")
    assert 0 <= found.num_different <= found.num_compared
    assert (found.num_different == 0) == (not any(piece.differs for piece in (*found.first, *found.second)))
    back = compare(second, first)
    assert (back.unit, compare(first, first).num_different) == (found.unit, 0)


def test_segments_are_compared_with_their_own_stretch_and_one_may_be_missing():
    ours = [Segment(0, 2, "Bore da."), Segment(3, 5, "Sut wyt ti?")]
    theirs = [Segment(0, 2, "Sut wyt ti?"), Segment(6, 8, "Hwyl!")]
    found = compare_segments(ours, theirs)
    assert marked(found.first) == "[Bore da.] [Sut wyt ti?]"
    assert marked(found.second) == "[Sut wyt ti?] [Hwyl!]"
    assert (found.num_different, found.num_compared) == (7, 7)


def test_a_word_that_comes_often_is_compared_like_any_other():
    found = compare("x" + " na" * 300, "y" + " na" * 300)
    assert (found.num_different, found.num_compared) == (1, 301)
