"""A `GateMap` drawn: expert by time, as a picture inside the page that can also be read as a table. No Gradio, no model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe import language_name

if TYPE_CHECKING:
    from whisper_moe import Transcriber, Transcript
    from whisper_moe.gate_map import GateMap

MOST_COLUMNS = 240  # of the picture; where there are more stretches, neighbours are shown as one
MOST_ROWS = 20  # of the table
OVER_TIME = "Each row is one helper, time runs from left to right: the stronger the colour, the more of it was mixed in."
PER_WINDOW = (
    "Each row is one helper, time runs from left to right: the stronger the colour, the more of it was mixed in. "
    "This mixture decides once per stretch of speech, so a row changes only from one stretch to the next."
)


def figure_html_for(transcriber: Transcriber, audio: Any, transcript: Transcript) -> str | None:
    """The figure for what was written by a mixture; None if another adapter wrote, or its gates have no place in time.

    Args:
        transcriber: Who wrote it.
        audio: The recording, as `transcribe` takes it.
        transcript: What was written.
    """
    info = transcript.adapter_info
    if info is None or info["peft_type"] != "LORAMOE" or not transcript.segments:
        return None
    try:
        return figure_html(transcriber.gate_map(audio, info["name"]))
    except ValueError:  # a mixture without experts, or one whose routers read the text alone
        return None


def figure_html(found: GateMap) -> str:
    """The picture, one sentence on how to read it, the share of each expert, and the figures as a table."""
    reading = OVER_TIME if found.over_time else PER_WINDOW
    order = sorted(found.experts, key=lambda expert: -found.shares[expert])
    names = "".join(f"<span>{escape(_name(expert))} <b>{_percent(found.shares[expert])}</b></span>" for expert in order)
    begin, end = float(found.times_s[0, 0]), float(found.times_s[-1, 1])
    axis = "".join(f"<span>{_clock(begin + share * (end - begin))}</span>" for share in (0, 0.5, 1))
    return (
        f'<figure class="wm-map"><figcaption>{reading}</figcaption>'
        f'<div class="wm-map-grid" style="--rows:{len(order)}"><div class="wm-map-names" aria-hidden="true">{names}</div>'
        f'{_picture(found, order)}<div class="wm-map-axis" aria-hidden="true">{axis}</div></div>'
        '<p class="wm-map-scale" aria-hidden="true"><span>0\u00a0%</span><i></i><span>100\u00a0%</span></p>'
        f"{_table(found, order)}</figure>"
    )


def _picture(found: GateMap, order: list[str]) -> str:
    """The cells as SVG, one unit high and a second wide; stretched to the page's width."""
    begin, end = float(found.times_s[0, 0]), float(found.times_s[-1, 1])
    times, weights = _coarser(found.times_s, found.weights, MOST_COLUMNS)
    cells = []
    for row, expert in enumerate(order):
        for start_s, end_s, gate in _runs(times, weights[:, found.experts.index(expert)]):
            place = f'x="{start_s - begin:.2f}" y="{row + 0.04:.2f}" width="{end_s - start_s:.2f}" height="0.92"'
            cells.append(f'<rect {place} fill-opacity="{gate:.2f}"/>')
    most = order[0]
    said = "; ".join(f"{_name(expert)} {_percent(found.shares[expert])}" for expert in order)
    return (
        f'<svg class="wm-map-cells" role="img" viewBox="0 0 {end - begin:.2f} {len(order)}" preserveAspectRatio="none">'
        f"<title>Who helped, and when</title><desc>Mean shares: {escape(said)}. {escape(_peak(found, most))}</desc>"
        f'<rect class="wm-map-ground" width="{end - begin:.2f}" height="{len(order)}"/>{"".join(cells)}</svg>'
    )


def _peak(found: GateMap, expert: str) -> str:
    """Where the one who helped most helped most of all."""
    at = int(found.weights[:, found.experts.index(expert)].argmax())
    most = _percent(found.weights[at, found.experts.index(expert)])
    return f"{_name(expert)} helps most at {_clock(float(found.times_s[at, 0]))}, with {most}."


def _table(found: GateMap, order: list[str]) -> str:
    """The same in figures, in at most `MOST_ROWS` steps."""
    times, weights = _coarser(found.times_s, found.weights, MOST_ROWS)
    head = "".join(f'<th scope="col">{escape(_name(expert))}</th>' for expert in order)
    rows = "".join(
        f'<tr><th scope="row">{_clock(start)}–{_clock(end)}</th>'
        + "".join(f"<td>{_percent(gates[found.experts.index(expert)])}</td>" for expert in order)
        + "</tr>"
        for (start, end), gates in zip(times.tolist(), weights, strict=True)
    )
    return (
        "<details><summary>The same as a table</summary><div class='wm-map-table' tabindex='0' role='region' aria-label='Shares over time'>"
        f'<table><thead><tr><th scope="col">Time</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _coarser(times: np.ndarray, weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` stretches: those whose middles lie in the same part of the time are put together, weighted by their lengths.

    Gaps that are longer than a part stay gaps.
    """
    if len(times) <= most:
        return times, weights
    begin, end = times[0, 0], times[-1, 1]
    parts = ((times.mean(axis=1) - begin) * (most / (end - begin))).astype(int).clip(0, most - 1)
    first = np.flatnonzero(np.diff(parts, prepend=-1))  # of the stretches of each part: they are in order
    lengths = (times[:, 1] - times[:, 0])[:, None]
    means = np.add.reduceat(lengths * weights, first) / np.add.reduceat(lengths, first)
    return np.stack([times[first, 0], times[np.append(first[1:], len(times)) - 1, 1]], axis=1), means


def _runs(times: np.ndarray, gates: np.ndarray) -> list[tuple[float, float, float]]:
    """Start, end and gate of every stretch of time in which the gate looks the same: fewer cells for the same picture."""
    runs: list[tuple[float, float, float]] = []
    for (start, end), gate in zip(times.tolist(), gates.round(2).tolist(), strict=True):
        if runs and runs[-1][2] == gate and abs(runs[-1][1] - start) < 1e-6:
            runs[-1] = (runs[-1][0], end, gate)
        else:
            runs.append((start, end, gate))
    return runs


def _name(expert: str) -> str:
    """ "cy" -> "Welsh (cy)"; names that are no language stay as they are."""
    name = language_name(expert)
    return expert if name == expert else f"{name} ({expert})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths // 10:02d}.{tenths % 10}"
