"""A batch as HTML: how far it is, and a table with a line for each recording. Everything that came from outside is escaped. No Gradio."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .views import clock, percent, time_left

if TYPE_CHECKING:
    from whisper_moe import Transcript

    from .batch import Item, Progress
    from .page import Limits

WAITING = "A table appears here, with a line for each file, and fills while they are written."
_COLUMNS = ("File", "Length", "Language", "Written by", "Text")
_FIRST_LETTERS = 120  # of a text; the zip has all of it


def limits(allowed: Limits) -> str:
    """What one go may hold."""
    return (
        f'<p class="wm-note">Up to {allowed.max_files} files in one go, each at most {allowed.max_minutes:g} minutes long '
        f"and {allowed.max_upload_mb} MB large. They are deleted after {allowed.keep_uploads_s / 60:g} minutes.</p>"
    )


def message(line: str) -> str:
    """The table's place when there is none."""
    return f'<p class="wm-empty">{escape(line)}</p>'


def batch(progress: Progress) -> str:
    """How far it is, and the table."""
    return _headline(progress) + _table(progress.items)


def _headline(progress: Progress) -> str:
    count, settled = len(progress.items), progress.count("done", "failed", "stopped")
    if not progress.is_over:
        bar = sum(1.0 if item.state in ("done", "failed", "stopped") else item.share for item in progress.items)
        return (
            f'<p class="wm-batch-head" role="status">{settled} of {_files(count)} finished</p>'
            f'<progress class="wm-batch-bar" max="{count}" value="{bar:.2f}" aria-label="Progress of all files"></progress>'
            f'<p class="wm-note">{_time_left(progress.left_s)}</p>'
        )
    parts = [f"{_files(progress.count('done'))} written"]
    if progress.count("failed"):
        parts.append(f"{progress.count('failed')} failed, see the table")
    if progress.count("stopped"):
        parts.append(f"{progress.count('stopped')} left out, because you pressed Stop")
    return f'<p class="wm-batch-head" role="status">{escape("; ".join(parts))}.</p>'


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "The time left is not known yet."
    said = time_left(seconds)
    return f"{said[0].upper()}{said[1:]}."


def _table(items: tuple[Item, ...]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    rows = "".join(_row(item) for item in items)
    return (
        '<table class="wm-batch"><caption class="wm-unseen">The files, what is spoken in them, who wrote it, and how it begins</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(item: Item) -> str:
    name = f'<th scope="row" dir="auto">{escape(item.name)}</th>'
    if item.transcript is not None:
        return f'<tr class="wm-done">{name}{_cells(item.transcript)}</tr>'
    if item.state == "failed":
        said = f'<strong class="wm-failed">Failed</strong> {escape(item.error or "")}'
    elif item.state == "working":
        said = f"Working, {percent(item.share)}" if item.share else "Working"
    else:
        said = {"waiting": "Waiting", "stopped": "Stopped before it was finished"}[item.state]
    return f'<tr class="wm-{item.state}">{name}<td colspan="4" class="wm-state">{said}</td></tr>'


def _cells(written: Transcript) -> str:
    language = escape(written.language_name) or "nobody speaks"
    if written.probability is not None and written.language is not None:
        language += f' <span class="wm-figure">{escape(percent(written.probability))}</span>'
    writer = "adapter " + escape(written.adapter) if written.adapter is not None else "the base model" if written.text else "nobody"
    warnings = "".join(f'<p class="wm-warning">{escape(line)}</p>' for line in written.warnings)
    text = f'<span lang="{escape(written.language or "und")}" dir="auto">{escape(_beginning(written.text))}</span>'
    if not written.text:
        text = f"<em>{escape(written.reason)}</em>"
    cells = (clock(written.duration_s), language, writer, text + warnings)
    return "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(_COLUMNS[1:], cells, strict=True))


def _beginning(text: str) -> str:
    if len(text) <= _FIRST_LETTERS:
        return text
    cut = text[:_FIRST_LETTERS]
    return (cut.rpartition(" ")[0] or cut) + " …"
