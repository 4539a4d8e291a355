"""A live session as HTML. Everything that was said is escaped. No Gradio, no model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from whisper_moe import language_name

from . import views

if TYPE_CHECKING:
    from .live import Live, LivePiece

EMPTY = "Press Record and speak. The words appear here while you do, with the language of each sentence."
NOTHING_YET = "I am listening. Words appear after the first second of speech."


def live(seen: Live | None) -> str:
    """What was said so far, what is being said, and how it stands. None: nobody has spoken yet."""
    if seen is None:
        return f'<p class="wm-empty">{EMPTY}</p>'
    rows = "".join(_piece(piece, "wm-live-said") for piece in seen.pieces)
    if seen.preview is not None:
        rows += _piece(seen.preview, "wm-live-preview")
    if not rows:
        said = NOTHING_YET if seen.is_listening else "" if seen.is_working else "No speech was heard. Is the microphone on?"
        return f'{_state(seen)}<p class="wm-empty">{said}</p>{_notes(seen)}'
    return f'{_state(seen)}<ol class="wm-live">{rows}</ol>{_notes(seen)}'


def _state(seen: Live) -> str:
    """One line: listening or not, since when, in which language, and whether it keeps up."""
    state = "Listening" if seen.is_listening else "Writing the rest" if seen.is_working else "Done"
    parts = [f'<strong class="wm-live-{"on" if seen.is_listening else "off"}">{state}</strong>', f"{views.clock(seen.heard_s)[:-2]} min"]
    latest = seen.preview or (seen.pieces[-1] if seen.pieces else None)
    if seen.is_listening and latest is not None and latest.language is not None:
        parts.append(f"now in {escape(language_name(latest.language))}")
    if seen.behind_s:
        parts.append(f'<span class="wm-live-behind">{seen.behind_s:.0f} seconds behind</span>')
    return f'<p class="wm-live-state">{" · ".join(parts)}</p>'


def _piece(piece: LivePiece, kind: str) -> str:
    """A sentence or so: its language, where it begins, who wrote it, and its words."""
    name = "" if piece.language is None else escape(language_name(piece.language))
    sure = "" if piece.probability is None else f" {views.percent(piece.probability)}"
    writer = "" if piece.adapter is None else f'<span class="wm-live-writer">adapter {escape(piece.adapter)}</span>'
    still = "<span class='wm-live-still'>still being said</span>" if kind == "wm-live-preview" else ""
    return (
        f'<li class="{kind}"><div class="wm-live-head"><span class="wm-live-chip">{name}{sure}</span>'
        f"<span>{views.clock(piece.start_s)}</span>{writer}{still}</div>"
        f'<p lang="{escape(piece.language or "und")}" dir="auto">{escape(piece.text)}</p></li>'
    )


def _notes(seen: Live) -> str:
    return "".join(f'<p class="wm-warning" role="status">{escape(note)}</p>' for note in seen.notes)
