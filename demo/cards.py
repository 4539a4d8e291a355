"""A model card as HTML that can do nothing: whoever wrote it may be a stranger.

The card's text is escaped first; only then a few marks of Markdown become tags, none of which can run, load or link anything. An image
is its description, a link is its words with the address behind them, HTML is shown as it was typed.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whisper_moe import LanguageAdapter

CARD_FILE = "README.md"
MAX_BYTES = 64 * 1024
_LONGEST_LINE = 2000
_EMPTY_FORM = "[More Information Needed]"  # PEFT's own card, which nobody has filled in

_IMAGE = re.compile(r"!\[([^\]]{0,200})\]\([^)]{0,500}\)")
_LINK = re.compile(r"\[([^\]]{1,200})\]\(([^)\s]{1,500})\)")
_CODE = re.compile(r"`([^`]{1,300})`")
_BOLD = re.compile(r"\*\*([^*]{1,300})\*\*")


def card_of(adapter: LanguageAdapter) -> str:
    """The card of an adapter, as Markdown: the one in its folder, else one made from its record, as for what was fetched."""
    from hub_utils import AdapterError
    from hub_utils.adapter_files import read_file

    if (adapter.path / CARD_FILE).exists():
        try:
            card = read_file(adapter.path / CARD_FILE, MAX_BYTES, "The card").decode("utf-8", "replace")
        except AdapterError:  # too large, a link, no regular file
            card = _EMPTY_FORM
        if _EMPTY_FORM not in card:
            return card
    return _made_card(adapter)


def _made_card(adapter: LanguageAdapter) -> str:
    import warnings

    from hub_utils import render_card
    from whisper_moe import language_name

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the card says itself what was not recorded
            return render_card(adapter.path, language_name=language_name(adapter.language))
    except (ValueError, TypeError, OSError):  # a record with fields of other kinds than a run writes
        return "This adapter has no card that can be shown."


def to_html(markdown: str) -> str:
    """The card without its metadata. Headings begin at the fourth level, below those of the page."""
    lines = _without_metadata(markdown).splitlines()
    html, at = [], 0
    while at < len(lines):
        block, at = _block(lines, at)
        html.append(block)
    return "".join(html)


def _without_metadata(markdown: str) -> str:
    found = re.match(r"\ufeff?---\r?\n.*?\n---\r?\n", markdown, re.DOTALL)
    return markdown if found is None else markdown[found.end() :]


def _block(lines: list[str], at: int) -> tuple[str, int]:
    """The HTML of what begins at a line, and the line after it."""
    line = lines[at].rstrip()
    if line.startswith("```"):
        return _code(lines, at)
    if heading := re.match(r"(#{1,6})\s+(.*)", line):
        level = 4 if len(heading[1]) <= 2 else 5
        return f"<h{level}>{_inline(heading[2])}</h{level}>", at + 1
    for begins, make in ((r"\s*\|", _table), (r"\s*[-*]\s+", _list), (r"\s*\S", _paragraph)):
        if re.match(begins, line):
            end = at + 1
            while end < len(lines) and _goes_on(lines[end], begins):
                end += 1
            return make(lines[at:end]), end
    return "", at + 1


def _goes_on(line: str, begins: str) -> bool:
    return re.match(begins, line) is not None and not line.startswith(("```", "#"))


def _code(lines: list[str], at: int) -> tuple[str, int]:
    end = at + 1
    while end < len(lines) and not lines[end].startswith("```"):
        end += 1
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines[at + 1 : end]))}</code></pre>', end + 1


def _table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(re.fullmatch(r":?-*:?", cell) for cell in row)]  # the rule below the head, an empty head
    cells = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wm-card-table" tabindex="0"><table><tbody>{cells}</tbody></table></div>'


def _list(lines: list[str]) -> str:
    items = "".join(f"<li>{_inline(line.strip()[1:].strip())}</li>" for line in lines)
    return f"<ul>{items}</ul>"


def _paragraph(lines: list[str]) -> str:
    return f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>"


def _inline(text: str) -> str:
    """One line of text, escaped, with code and bold letters."""
    text = _IMAGE.sub(lambda found: f"[image: {found[1]}]", text[:_LONGEST_LINE])
    text = _LINK.sub(lambda found: f"{found[1]} ({found[2]})", text)
    text = escape(text)
    text = _CODE.sub(r"<code>\1</code>", text)
    return _BOLD.sub(r"<strong>\1</strong>", text)
