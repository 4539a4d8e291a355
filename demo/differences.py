"""Where two texts of the same recording differ: word by word, and letter by letter in scripts that put no spaces between words.

Capitals, punctuation and ways of typing an accent are no difference: texts are compared as `whisper_moe.normalize` leaves them. No HTML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whisper_moe import Segment

# Scripts of the languages in `whisper_moe.evaluate.SCRIPTS_WITHOUT_SPACES`. The text is asked, not the language: the base model may answer
# in another script.
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class Piece:
    """A stretch of a text, and whether the other text has something else there. All pieces together are the text."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Differences:
    """Two texts in pieces.

    Args:
        first, second: The texts.
        num_different: Words (or letters) that one has and the other has not; a word against another counts once.
        num_compared: All of them.
        unit: "word", or "letter" if one of the texts is written without spaces.
    """

    first: tuple[Piece, ...]
    second: tuple[Piece, ...]
    num_different: int
    num_compared: int
    unit: str


def compare(first: str, second: str) -> Differences:
    """Compare two texts."""
    a, b = list(_tokens(first)), list(_tokens(second))
    # Punctuation by itself is never compared, so it can be no difference.
    compared_a, compared_b = [token for token in a if token.key], [token for token in b if token.key]
    blocks = SequenceMatcher(None, [token.key for token in compared_a], [token.key for token in compared_b], autojunk=False).get_opcodes()
    different = [(compared_a[i:j], compared_b[k:m]) for kind, i, j, k, m in blocks if kind != "equal"]
    num_different = sum(max(len(ours), len(theirs)) for ours, theirs in different)
    num_equal = sum(j - i for kind, i, j, _, _ in blocks if kind == "equal")
    return Differences(
        _pieces(a, {id(token) for ours, _ in different for token in ours}),
        _pieces(b, {id(token) for _, theirs in different for token in theirs}),
        num_different,
        num_equal + num_different,
        "letter" if any(token.is_letter for token in (*a, *b)) else "word",
    )


def compare_segments(first: Sequence[Segment], second: Sequence[Segment]) -> Differences:
    """Compare what two transcripts of one recording say, each stretch of it with the same stretch: quick for long ones too."""
    ours, theirs = ({segment.start_s: segment.text for segment in segments} for segments in (first, second))
    found = [compare(ours.get(start, ""), theirs.get(start, "")) for start in sorted({*ours, *theirs})]
    return Differences(
        _joined([each.first for each in found]),
        _joined([each.second for each in found]),
        sum(each.num_different for each in found),
        sum(each.num_compared for each in found),
        "letter" if any(each.unit == "letter" for each in found) else "word",
    )


def _joined(parts: Sequence[Sequence[Piece]]) -> tuple[Piece, ...]:
    """The pieces of one text after those of another, with a space between."""
    joined: list[Piece] = []
    for part in filter(None, parts):
        joined += [Piece(" ", False), *part] if joined else part
    return tuple(joined)


@dataclass(frozen=True)
class _Token:
    """A word or a letter. `key`: what is compared of it, empty for punctuation and spaces."""

    text: str
    key: str
    is_letter: bool = False


def _tokens(text: str) -> Iterator[_Token]:
    from whisper_moe import normalize  # loads torch

    for found in re.finditer(r"\s+|\S+", text):
        word = found.group()
        if word.isspace():
            yield _Token(word, "")
            continue
        for without_spaces, letters in groupby(_letters(word), _is_without_spaces):
            if without_spaces:
                yield from (_Token(letter, normalize(letter), True) for letter in letters)
            else:
                rest = "".join(letters)
                yield _Token(rest, normalize(rest))


def _letters(word: str) -> list[str]:
    """The letters of a word, each with its marks."""
    letters: list[str] = []
    for char in word:
        if letters and unicodedata.category(char).startswith("M"):
            letters[-1] += char
        else:
            letters.append(char)
    return letters


def _is_without_spaces(letter: str) -> bool:
    return unicodedata.name(letter[0], "").startswith(_WITHOUT_SPACES)


def _pieces(tokens: Sequence[_Token], different: set[int]) -> tuple[Piece, ...]:
    """Tokens that differ in a row are one piece, with the spaces between them."""
    marks = [id(token) in different for token in tokens]
    for index in range(1, len(tokens) - 1):
        if not tokens[index].key and marks[index - 1]:
            following = next((after for after in range(index, len(tokens)) if tokens[after].key), None)
            marks[index] = following is not None and id(tokens[following]) in different
    together = groupby(zip(tokens, marks, strict=True), key=lambda pair: pair[1])
    return tuple(Piece("".join(token.text for token, _ in group), differs) for differs, group in together)
