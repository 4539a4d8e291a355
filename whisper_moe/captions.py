"""A transcript as files: plain text, captions that players show (SubRip and WebVTT, written by pysubs2), and JSON.

A segment is as long as the model's window and may hold more than a screen does, so it is cut into cues. Knows no model; what a
recording says or is called cannot break a file, or lead out of the folder.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from whisper_moe.explain import explain

if TYPE_CHECKING:
    from whisper_moe.explain import Explanation
    from whisper_moe.transcribe import Transcript

CaptionFormat = Literal["srt", "vtt"]
FileFormat = Literal["txt", "srt", "vtt", "json"]
FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
Part: TypeAlias = tuple[float, float, str]  # start and end in seconds, what is said

LINE_WIDTH = 42
"""Letters in a line of a caption, after the broadcasters' guides; wide ones (Chinese, Japanese, Korean) count as two."""

_LONGEST_NAME = 120  # bytes, so that an ending and a number still fit what file systems take (255)
_JOINER = "\u2060"  # shows nothing and takes no room: parts what would have a meaning to a player from what gives it that meaning
_RIGHT_TO_LEFT = "\u200f"


# ---- files -------------------------------------------------------------------------------------------------------------


def write_files(
    transcript: Transcript,
    folder: str | Path,
    stem: str,
    formats: Sequence[FileFormat] = FORMATS,
    *,
    decision: Explanation | None = None,
) -> dict[str, Path]:
    """Write a transcript in several formats: `folder/stem.txt`, `.srt`, `.vtt` and `.json`.

    Args:
        transcript: What to write.
        folder: Where; it is made if it is not there.
        stem: Name of the files without an ending, e.g. the recording's. Made safe by `safe_name`.
        formats: Which of them.
        decision: For the JSON: what `explain` said, if it was told more than the transcript; None: it is asked here.

    Returns:
        Format -> file.

    Raises:
        ValueError: A format is unknown.
    """
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise ValueError(f"Unknown format: {', '.join(map(repr, unknown))}. Known: {', '.join(FORMATS)}.")
    folder, stem = Path(folder), safe_name(stem)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for kind in formats:
        files[kind] = folder / f"{stem}.{kind}"
        files[kind].write_bytes(file_content(transcript, kind, decision))
    return files


def file_content(transcript: Transcript, kind: FileFormat, decision: Explanation | None = None) -> bytes:
    """A transcript in one of the formats, in UTF-8."""
    if kind == "txt":
        return f"{transcript.text}\n".encode("utf-8", "replace")
    if kind == "json":
        # Half a letter (a lone surrogate) has no UTF-8, but it has a way to be written in JSON.
        return f"{json.dumps(as_json(transcript, decision), indent=2, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")
    return captions([(part.start_s, part.end_s, part.text) for part in transcript.segments], kind).encode()


def as_json(transcript: Transcript, decision: Explanation | None = None) -> dict[str, Any]:
    """The transcript as plain values, with the decision behind it."""
    return transcript.to_dict() | {"decision": (explain(transcript) if decision is None else decision).to_dict()}


def safe_name(name: str, otherwise: str = "recording") -> str:
    """A name that every file system takes and that stays where it is put; `otherwise` if nothing is left of it.

    No folders, no control characters or marks that turn letters round, nothing Windows forbids, no dot or dash in front, not too long.
    """
    name = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    name = "".join(letter for letter in name if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))
    name = re.sub(r'[<>:"|?*\s]+', " ", name).encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
    name = name.lstrip(" .-").rstrip(" .")
    if re.fullmatch(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", name, re.IGNORECASE):  # devices, to Windows
        name = f"_{name}"
    return name or otherwise


def unique_names(names: Iterable[str]) -> list[str]:
    """The names made safe, none twice, also for file systems to which "A" is "a": the second "talk" becomes "talk (2)"."""
    taken: set[str] = set()
    result = []
    for name in map(safe_name, names):
        candidate, number = name, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{name} ({number})"
        taken.add(candidate.casefold())
        result.append(candidate)
    return result


# ---- captions ----------------------------------------------------------------------------------------------------------


def captions(parts: Iterable[Part], kind: CaptionFormat) -> str:
    """What is said as a file of captions.

    Text that means something to a player (tags, "-->", times) is escaped in WebVTT; SubRip has no escapes, there a letter that shows
    nothing is put in between. Lines that are written from right to left say so at both ends, for players that do not look.
    """
    import pysubs2

    file = pysubs2.SSAFile()
    for cue in find_cues(parts):
        lines = [_mark_direction(_harmless(line, kind)) for line in cue.lines]
        if lines[-1].isdecimal():
            lines[-1] = _JOINER + lines[-1]  # else readers take it for the number of the next cue
        file.append(pysubs2.SSAEvent(start=cue.start_ms, end=cue.end_ms, text=r"\N".join(lines)))
    written: str = file.to_string(kind, keep_ssa_tags=True)  # nothing of ours is a tag, so there are none to turn into others
    return written.rstrip("\n") + "\n"


@dataclass(frozen=True)
class Cue:
    """What is shown at one time.

    Args:
        start_ms, end_ms: When.
        lines: One or two.
    """

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def find_cues(parts: Iterable[Part]) -> list[Cue]:
    """Cut what is said into cues of at most two lines of `LINE_WIDTH` letters, where sentences and clauses end if that can be.

    Start of the first and end of the last cue of a part are the part's. The times between are estimated: the part's time is shared
    by letters, as if everybody spoke evenly.
    """
    cues = []
    for start_s, end_s, text in parts:
        blocks = _blocks(_units(_clean(text)))
        letters = [sum(len(line) - line.count(" ") for line in block) for block in blocks]
        start_ms, end_ms = round(1000 * start_s), round(1000 * end_s)
        times = [start_ms + (end_ms - start_ms) * said // sum(letters) for said in accumulate(letters, initial=0)] if blocks else []
        cues += [Cue(start, end, lines) for start, end, lines in zip(times, times[1:], blocks, strict=False)]
    return cues


# ---- where a text may be cut -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """What stands in one line: a word, or a letter of a script without spaces. `space`: whether one stands before it."""

    text: str
    width: int
    space: bool


def _units(text: str) -> list[_Unit]:
    units = []
    for word in text.split():
        unit, space = "", True
        for cluster in _clusters(word):
            if unit and (_width(unit + cluster) > LINE_WIDTH or _may_part(unit[-1], cluster[0])):
                units.append(_Unit(unit, _width(unit), space))
                unit, space = "", False
            unit += cluster
        units.append(_Unit(unit, _width(unit), space))
    return units


def _clusters(word: str) -> Iterator[str]:
    """Letters with the marks that belong to them."""
    cluster = ""
    for letter in word:
        joins = unicodedata.category(letter)[0] == "M" or letter in "\u200c\u200d" or "\U0001f3fb" <= letter <= "\U0001f3ff"
        if cluster and not joins and cluster[-1] not in "\u200d" + _WRITTEN_FIRST:
            yield cluster
            cluster = ""
        cluster += letter
    yield cluster


_WRITTEN_FIRST = "เแโใไເແໂໃໄ"  # vowels of Thai and Lao that stand before their consonant
_NO_FIRST = "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ"  # the small kana; other letters that begin no line are known by their category
_WITHOUT_SPACES = [  # Thai, Lao, Tibetan, Burmese; Khmer; kana and Chinese with their punctuation, wide and rare forms
    (0x0E00, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF00, 0xFF9F),
    (0x20000, 0x3FFFF),
]


def _may_part(before: str, after: str) -> bool:
    """Whether a line may end between two letters of one word."""
    if not any(low <= ord(letter) <= high for letter in (before, after) for low, high in _WITHOUT_SPACES):
        return False
    closes = unicodedata.category(after) in ("Pe", "Pf", "Po", "Lm") or after in _NO_FIRST
    return not closes and unicodedata.category(before) not in ("Ps", "Pi")


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.category(letter) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


# ---- lines and cues ----------------------------------------------------------------------------------------------------


def _blocks(units: Sequence[_Unit]) -> list[tuple[str, ...]]:
    """The lines of each cue: as few cues as can be, that end where sentences end and are not almost empty. By dynamic programming."""
    ends = list(accumulate((unit.width + unit.space for unit in units), initial=0))

    def width(start: int, stop: int) -> int:
        return ends[stop] - ends[start] - units[start].space

    # After the last unit that still fits into a line, and into two.
    line = [bisect_right(ends, LINE_WIDTH + ends[at] + unit.space) - 1 for at, unit in enumerate(units)]
    reach = [line[stop] if stop < len(units) else stop for stop in line]
    costs, came_from = [0.0] + [float("inf")] * len(units), [0] * (len(units) + 1)
    for start in range(len(units)):
        for stop in range(start + 1, reach[start] + 1):
            empty = 1 - width(start, stop) / (2 * LINE_WIDTH)
            cost = costs[start] + 1 + empty**2 + (0 if stop == len(units) else _break_cost(units[stop - 1].text))
            if cost < costs[stop]:
                costs[stop], came_from[stop] = cost, start

    blocks: list[tuple[str, ...]] = []
    stop = len(units)
    while stop:
        start = came_from[stop]
        if line[start] >= stop:
            blocks.append((_joined(units[start:stop]),))
        else:
            breaks = [at for at in range(start + 1, line[start] + 1) if width(at, stop) <= LINE_WIDTH]
            middle = min(breaks, key=lambda at: abs(width(start, at) - width(at, stop)) + LINE_WIDTH * _break_cost(units[at - 1].text) / 4)
            blocks.append((_joined(units[start:middle]), _joined(units[middle:stop])))
        stop = start
    return blocks[::-1]


def _break_cost(text: str) -> float:
    """How bad it is to end a line or cue after this: not, where a sentence ends; a little, at a comma."""
    last = text.rstrip("\"'”’»›)]}」』）")[-1:]
    return 0.0 if last and last in ".!?…。！？؟۔।॥։።" else 0.5 if last and last in ",;:،؛、，；：–—" else 1.5


def _joined(units: Sequence[_Unit]) -> str:
    return "".join(f" {unit.text}" if unit.space else unit.text for unit in units).lstrip(" ")


# ---- what may stand in a file ------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Without control characters, half letters, and marks that turn the order of letters round and could be cut from their end."""
    text = " ".join(text.split())
    return "".join(
        letter
        for letter in text
        if unicodedata.category(letter) not in ("Cc", "Cs") and letter not in "\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def _harmless(line: str, kind: CaptionFormat) -> str:
    """A line that shows as it is: nothing in it is a tag, an arrow or a time."""
    line = re.sub(r"\\(?=\w)|(?<=\d):(?=\d{1,2}[.,]\d)", rf"\g<0>{_JOINER}", line)
    if kind == "vtt":
        return html.escape(line, quote=False)
    return re.sub(r"<(?=[\s/]*[A-Za-z])|\{(?=\\)|--(?=>)", rf"\g<0>{_JOINER}", line)


def _mark_direction(line: str) -> str:
    kinds = [unicodedata.bidirectional(letter) for letter in line]
    mark = _RIGHT_TO_LEFT if kinds.count("R") + kinds.count("AL") > kinds.count("L") else ""
    return f"{mark}{line}{mark}"
