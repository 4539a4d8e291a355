"""The answer to a recording as HTML. Everything that came from outside is escaped. No Gradio, no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Literal, TypeAlias

from whisper_moe import explain as explaining
from whisper_moe import language_name

from . import differences

if TYPE_CHECKING:
    from whisper_moe import Segment, Transcript
    from whisper_moe.explain import Explanation

    from .follow import Progress

WAITING = "The text appears here. Upload or record something, or click an example."
NO_RESULT = "No text this time; the message says why. Change the recording or the options and try again."
WORTH_A_BAR = 0.01  # less likely languages are left out, the first three aside; the JSON has them
NOTHING_WRITTEN = "Nothing was written down."
STOPPED = "Stopped. This is what was written until then."
NUM_COLOURS = 6  # of languages in one recording; style.css has as many

BaseText: TypeAlias = "Transcript | Literal['pending', 'stopped', 'failed'] | None"
"""What the base model alone wrote: nothing asked for, not there yet, or not to be had."""


# ---- figures as people read them -----------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """0.913 -> "91 %", kept on one line; never "0 %" for something, nor "100 %" for less than all."""
    return _unbroken(explaining.percent(share))


def _unbroken(text: str) -> str:
    """Figures stay with their unit."""
    return re.sub(r"(?<=\d) (?=%|kB|MB|s\b)|(?<=[<>]) (?=\d)|(?<=over|nder) (?=\d+ %)", "\u00a0", text)


def clock(seconds: float) -> str:
    """72.34 -> "1:12.3"."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths // 10:02d}.{tenths % 10}"


def time_left(seconds: float) -> str:
    """Roughly: 3.2 -> "a few seconds left", 33 -> "about 35 s left", 130 -> "about 2 min left"."""
    if seconds < 5:
        return "a few seconds left"
    if seconds < 58:
        return f"about {5 * round(seconds / 5)}\u00a0s left"
    return f"about {round(seconds / 60)}\u00a0min left"


# ---- the text ------------------------------------------------------------------------------------------------------------


def message(line: str) -> str:
    """The text's place when there is none."""
    return f'<h2>Text</h2><p class="wm-empty" role="status">{escape(line)}</p>'


def working(progress: Progress | None) -> str:
    """How far the work is, and the text that is there already."""
    what = "Waiting for the model" if progress is None or not progress.what else progress.what
    left = "" if progress is None or progress.left_s is None else f", {time_left(progress.left_s)}"
    share = 0.0 if progress is None else min(1.0, max(0.0, progress.share))
    bar = f'<progress class="wm-progress" max="1" value="{share:.3f}" aria-label="Share that is done"></progress>'
    return f'<h2>Text</h2><div class="wm-working">{bar}<p role="status">{escape(what)}{left}</p></div>{_so_far(progress)}'


def stopped(progress: Progress | None) -> str:
    """What there was when Stop was pressed."""
    written = _so_far(progress)
    line = STOPPED if written else "Stopped before anything was written."
    return f'<h2>Text</h2>{written}<p class="wm-empty" role="status">{line}</p>'


def _so_far(progress: Progress | None) -> str:
    segments = () if progress is None else progress.segments
    said = " ".join(segment.text for segment in segments)
    return f'<p class="wm-partial" dir="auto" aria-live="off">{escape(said)}</p>' if said else ""


def text(transcript: Transcript, base: BaseText = None) -> str:
    """The words, large; beside them what the base model alone wrote, if that is known or on its way."""
    if not transcript.text.strip():
        return message(NOTHING_WRITTEN)
    spoken = f'lang="{escape(transcript.language or "und")}" dir="auto"'
    if base is None:
        return f'<h2>Text</h2><p class="wm-text" {spoken}>{escape(transcript.text)}</p>'
    if isinstance(base, str):
        heard = ""
        ours, theirs, summary = escape(transcript.text), f"<em>{_NO_BASE_TEXT[base]}</em>", ""
    else:
        found = differences.compare_segments(transcript.segments, base.segments)
        heard = ' aria-live="off"'  # it was read out when it came
        ours, theirs, summary = _marked(found.first, "ins"), _marked(found.second, "del") or "<em>Nothing.</em>", _summary(found)
    adapter = f"With the adapter {transcript.adapter}" if transcript.adapter is not None else "With adapters"
    return (
        f'<h2>Text</h2><div class="wm-compare"><div><h3>{escape(adapter)}</h3><p class="wm-text" {spoken}{heard}>{ours}</p></div>'
        f'<div><h3>The base model alone</h3><p class="wm-base-text" {spoken}>{theirs}</p></div></div>{summary}'
    )


_NO_BASE_TEXT = {
    "pending": "It is writing ...",
    "stopped": "Stopped before it wrote anything.",
    "failed": "It could not write this recording.",
}


def _marked(pieces: Sequence[differences.Piece], tag: Literal["ins", "del"]) -> str:
    """A text whose differences are set off by an element that screen readers know, not by colour alone."""
    return "".join(f"<{tag}>{escape(piece.text)}</{tag}>" if piece.differs else escape(piece.text) for piece in pieces)


def _summary(found: differences.Differences) -> str:
    if not found.num_compared:
        return ""
    if not found.num_different:
        return '<p class="wm-note">Both wrote the same, capitals and punctuation aside.</p>'
    units = f"{found.unit}s" if found.num_compared > 1 else found.unit
    return (
        f'<p class="wm-note">{found.num_different} of {found.num_compared} {units} differ: <ins>underlined</ins> with the adapter, '
        "<del>struck through</del> without it. Which one is right, only a listener knows.</p>"
    )


# ---- the decision --------------------------------------------------------------------------------------------------------


def decision(transcript: Transcript, explanation: Explanation) -> str:
    """Everything below the text: the decision as a sentence and why, languages as bars, segments with their times."""
    reason = f'<p class="wm-reason">{escape(transcript.reason)}</p>'
    if not transcript.text.strip():
        return f"{reason}{warnings(transcript)}"
    return (
        f"<h2>The decision</h2>{sentence(explanation)}{reason}{warnings(transcript)}"
        f"{bars(transcript, explanation)}{scores(transcript)}{segments(transcript)}"
    )


def sentence(explanation: Explanation) -> str:
    """The decision in one sentence, what was heard and who wrote it set off."""
    said = "".join(
        f'<strong class="wm-{kind}">{escape(_unbroken(words))}</strong>' if kind else _with_arrows(escape(_unbroken(words)))
        for kind, words in explaining.phrases(explanation)
    )
    return f'<p class="wm-sentence">{said}</p>{_words_explained(explanation)}'


def _with_arrows(escaped: str) -> str:
    """Arrows are not read out by name."""
    return escaped.replace("→", '<span class="wm-arrow" role="img" aria-label="so">→</span>')


def _words_explained(explanation: Explanation) -> str:
    """What the sentence's words mean, for somebody who meets them for the first time; closed."""
    words = {"The percentages": "How sure the base model is of the language that it hears, before any adapter is used."}
    if explanation.adapter is None:
        words["The base model"] = "The large model that everything here is built on. It writes what no adapter is there for."
    else:
        words["The adapter"] = "A small file of extra weights, trained for one language or kind of speech, on top of the same base model."
    if explanation.method is not None:
        words[explanation.method] = "The way the adapter is built."
    if explanation.measured is not None:
        used = explanation.measured
        kept = "" if used.clips is None else f", in {used.clips} recordings kept out of training"
        rules = "" if used.normalizer is None else f" Texts were compared by the rule {escape(repr(used.normalizer))}."
        words["WER, CER"] = f"Word (letter) error rate{kept}: the share that comes out wrong, so lower is better.{rules}"
    rows = "".join(f"<dt>{escape(word)}</dt><dd>{meaning}</dd>" for word, meaning in words.items())
    return f'<details class="wm-words"><summary>What do these words mean?</summary><dl>{rows}</dl></details>'


def warnings(transcript: Transcript) -> str:
    """Every warning as its own line; nothing if there is none."""
    return "".join(f'<p class="wm-warning" role="status">{escape(line)}</p>' for line in transcript.warnings)


def bars(transcript: Transcript, explanation: Explanation | None = None) -> str:
    """Language probabilities, the likeliest first, as a list whose bars repeat the written figures, and the threshold as a line."""
    if not transcript.probabilities:
        return ""
    ranked = list(transcript.probabilities.items())
    threshold = None if explanation is None or not explanation.threshold else explanation.threshold
    line = "" if threshold is None else f'<b class="wm-threshold" style="left:{100 * threshold:.1f}%"></b>'
    rows = "".join(
        f'<li><span>{escape(language_name(code))}</span><span class="wm-bar" aria-hidden="true">'
        f'<i style="width:{100 * share:.1f}%"></i>{line}</span><span class="wm-figure">{escape(percent(share))}</span></li>'
        for code, share in ranked[:3] + [row for row in ranked[3:] if row[1] >= WORTH_A_BAR]
    )
    notes = [] if threshold is None else [f"The line is the threshold, {percent(threshold)}: below it no adapter is used."]
    if explanation is not None and explanation.allowed is not None:
        named = ", ".join(language_name(code) for code in explanation.allowed)
        notes.append(f"Only your candidates could be heard ({named}); all others were not allowed.")
    note = "".join(f'<p class="wm-note">{escape(words)}</p>' for words in notes)
    return f'<h2>Languages heard, adapters off</h2><ul class="wm-bars">{rows}</ul>{note}'


def scores(transcript: Transcript) -> str:
    """How likely each text was, where two languages were tried."""
    if not transcript.scores:
        return ""
    ranked = sorted(transcript.scores.items(), key=lambda item: -item[1])
    rows = "".join(
        f'<tr><th scope="row">{escape(language_name(code))}</th><td>{score:.2f}</td>'
        f"<td>{'kept' if code == transcript.language else ''}</td></tr>"
        for code, score in ranked
    )
    return (
        f'<h2>Two languages tried</h2><table class="wm-scores"><thead><tr><th scope="col">Written as</th><th scope="col">Score</th>'
        f'<th scope="col">Chosen</th></tr></thead><tbody>{rows}</tbody></table>'
        '<p class="wm-note">The score is how likely the model finds its own text (log probability of a token): nearer to 0 is likelier.</p>'
    )


# ---- segments ------------------------------------------------------------------------------------------------------------


def segments(transcript: Transcript) -> str:
    """A table of the segments with their times, which play them; with a chip each where the language may change."""
    several = is_switching(transcript)
    colours = _colours(transcript)
    rows = "".join(
        f"<tr><td>{_seek(part.start_s)}</td><td>{clock(part.end_s)}</td><td>"
        f'{_chip(part, colours) if several else ""}<span class="wm-said" dir="auto">{escape(part.text)}</span></td></tr>'
        for part in transcript.segments
    )
    head = '<thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col">Text</th></tr></thead>'
    took = f'<p class="wm-note">{transcript.duration_s:.1f} s of sound, transcribed in {transcript.elapsed_s:.1f} s.</p>'
    strip = _strip(transcript, colours) if several else ""
    return f'<h2>Segments</h2>{strip}<table class="wm-segments">{head}<tbody>{rows}</tbody></table>{took}'


def is_switching(transcript: Transcript) -> bool:
    """Whether the segments were listened to one by one, or are in several languages."""
    parts = transcript.segments
    return len({part.language for part in parts}) > 1 or (len(parts) > 1 and all(part.probabilities for part in parts))


def _colours(transcript: Transcript) -> dict[str | None, int]:
    """Language -> number of its colour, by first appearance."""
    codes = dict.fromkeys(part.language for part in transcript.segments)
    return {code: index % NUM_COLOURS for index, code in enumerate(codes)}


def _seek(seconds: float) -> str:
    """A time that plays the recording from there (transcribe_tab.PLAYER)."""
    return f'<button type="button" class="wm-seek" data-seek="{seconds:.2f}" title="Play from here">{clock(seconds)}</button>'


def _chip(part: Segment, colours: dict[str | None, int]) -> str:
    """Language, how sure, and who wrote."""
    code = part.language or "?"
    sure = f" {percent(part.probabilities[code])}" if code in part.probabilities else ""
    writer = "base model" if part.adapter is None else f"adapter {part.adapter}"
    return (
        f'<span class="wm-chip wm-language-{colours[part.language]}"><b>{escape(code)}</b> {escape(language_name(code))}{sure}, '
        f"{escape(writer)}</span>"
    )


def _strip(transcript: Transcript, colours: dict[str | None, int]) -> str:
    """The recording from left to right, each stretch in the colour and with the code of its language."""
    whole = max([transcript.duration_s, *(part.end_s for part in transcript.segments)]) or 1.0
    stretches = "".join(
        f'<i class="wm-language-{colours[part.language]}" style="left:{100 * part.start_s / whole:.2f}%;'
        f'width:{100 * (part.end_s - part.start_s) / whole:.2f}%">{escape(part.language or "?")}</i>'
        for part in transcript.segments
    )
    said = ", ".join(
        f"{language_name(part.language or '?')} from {clock(part.start_s)} to {clock(part.end_s)}" for part in transcript.segments
    )
    return f'<div class="wm-strip" role="img" aria-label="{escape(said)}">{stretches}</div>'


# ---- the page's fixed parts ----------------------------------------------------------------------------------------------


def header(base: str) -> str:
    """Title, one sentence, and the base model. `base`: its name and size."""
    return (
        "<h1>Whisper, one small adapter per language</h1>"
        "<p>A recording becomes text: the page hears which language is spoken, picks the adapter trained for it, and says why.</p>"
        f'<p class="wm-note">Base model: {escape(base)}</p>'
    )
