"""A `Transcript` and the installed adapters as HTML. Everything that came from outside is escaped. No Gradio, no model."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from whisper_moe import language_name

if TYPE_CHECKING:
    from whisper_moe import LanguageAdapter, Transcript

METHOD_NAMES = {"S2LORA": "S2-LoRA", "LORA": "LoRA", "RANDLORA": "RandLoRA", "VERA": "VeRA", "VBLORA": "VB-LoRA", "ADALORA": "AdaLoRA"}
WAITING = "The text appears here. Upload or record something, or click an example."
NO_RESULT = "No text this time; the message says why. Change the recording or the options and try again."
WORTH_A_BAR = 0.01  # less likely languages are left out, the first three aside; the JSON has them
NOTHING_WRITTEN = "Nothing was written down."


# ---- figures as people read them -----------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """0.913 -> "91 %", kept on one line; never "0 %" for something, nor "100 %" for less than all."""
    whole = round(100 * share)
    if share > 0 and whole == 0:
        return "<\u00a01\u00a0%"
    if share < 1 and whole == 100:
        return ">\u00a099\u00a0%"
    return f"{whole}\u00a0%"


def clock(seconds: float) -> str:
    """72.34 -> "1:12.3"."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths // 10:02d}.{tenths % 10}"


def size(num_bytes: int) -> str:
    """41300 -> "41 kB"."""
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f} MB"


def method(peft_type: str) -> str:
    """PEFT's name of a method as papers write it."""
    return METHOD_NAMES.get(peft_type, peft_type)


# ---- the result ----------------------------------------------------------------------------------------------------------


def message(line: str) -> str:
    """The result's place when there is no transcript."""
    return f'<h2>Text</h2><p class="wm-empty">{escape(line)}</p>'


def result(transcript: Transcript, adapter: LanguageAdapter | None) -> str:
    """The whole answer. `adapter`: the one that wrote it, None for the base model."""
    if not transcript.text.strip():
        return f"{message(NOTHING_WRITTEN)}<p>{escape(transcript.reason)}</p>{warnings(transcript)}"
    return text(transcript) + decision(transcript, adapter) + bars(transcript) + segments(transcript)


def text(transcript: Transcript) -> str:
    """The words, large."""
    return f'<h2>Text</h2><p class="wm-text" lang="{escape(transcript.language or "und")}" dir="auto">{escape(transcript.text)}</p>'


def decision(transcript: Transcript, adapter: LanguageAdapter | None) -> str:
    """What was heard, who wrote it, how good that is known to be, and why."""
    steps = [_language_step(transcript), _writer_step(transcript, adapter), _measured_step(adapter)]
    path = "".join(f"<li><span>{label}</span><strong>{value}</strong><span>{detail}</span></li>" for label, value, detail in steps)
    reason = f'<p class="wm-reason">{escape(transcript.reason)}</p>'
    return f'<h2>The decision</h2><ol class="wm-path">{path}</ol>{reason}{warnings(transcript)}'


def _language_step(transcript: Transcript) -> tuple[str, str, str]:
    if transcript.probability is None:
        return "Language", escape(transcript.language_name), "given, not detected"
    return "Language heard", escape(transcript.language_name), escape(f"{percent(transcript.probability)} sure")


def _writer_step(transcript: Transcript, adapter: LanguageAdapter | None) -> tuple[str, str, str]:
    if adapter is None:
        return "Written by", "the base model", f"{escape(transcript.model)}, no adapter"
    return "Written by", f"adapter {escape(adapter.name)}", escape(f"{method(adapter.peft_type)}, {size(adapter.num_bytes)}")


def _measured_step(adapter: LanguageAdapter | None) -> tuple[str, str, str]:
    if adapter is None:
        return "Measured", "see the model card", "of the base model"
    return "Measured", *measured(adapter)


def measured(adapter: LanguageAdapter) -> tuple[str, str]:
    """Word error rate with the adapter, and the rest of the sentence: without it, letters, on what."""
    before, after = adapter.metrics.get("before") or {}, adapter.metrics.get("after") or {}
    if "wer" not in after:
        return "not measured", "the adapter's card has no figures"
    parts = []
    if "wer" in before:
        parts.append(f"{percent(before['wer'])} without it")
    if "cer" in before and "cer" in after:
        parts.append(f"letters {percent(after['cer'])} instead of {percent(before['cer'])}")
    if "clips" in after:
        parts.append(f"{after['clips']} clips of {adapter.metrics.get('test_set', 'a test set')}")
    return escape(f"{percent(after['wer'])} word errors"), escape("; ".join(parts))


def warnings(transcript: Transcript) -> str:
    """Every warning as its own line; nothing if there is none."""
    return "".join(f'<p class="wm-warning" role="status">{escape(line)}</p>' for line in transcript.warnings)


def bars(transcript: Transcript) -> str:
    """Language probabilities, the likeliest first, as a list whose bars repeat the written figures."""
    if not transcript.probabilities:
        return ""
    ranked = list(transcript.probabilities.items())
    rows = "".join(
        f'<li><span>{escape(language_name(code))}</span><span class="wm-bar" aria-hidden="true">'
        f'<i style="width:{100 * share:.1f}%"></i></span><span class="wm-figure">{escape(percent(share))}</span></li>'
        for code, share in ranked[:3] + [row for row in ranked[3:] if row[1] >= WORTH_A_BAR]
    )
    return f'<h2>Languages heard, adapters off</h2><ul class="wm-bars">{rows}</ul>'


def segments(transcript: Transcript) -> str:
    """A table of the segments with their times."""
    rows = "".join(
        f'<tr><td>{clock(part.start_s)}</td><td>{clock(part.end_s)}</td><td dir="auto">{escape(part.text)}</td></tr>'
        for part in transcript.segments
    )
    head = '<thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col">Text</th></tr></thead>'
    took = f'<p class="wm-note">{transcript.duration_s:.1f} s of sound, transcribed in {transcript.elapsed_s:.1f} s.</p>'
    return f'<h2>Segments</h2><table class="wm-segments">{head}<tbody>{rows}</tbody></table>{took}'


# ---- the page's fixed parts ----------------------------------------------------------------------------------------------


def header(base: str) -> str:
    """Title, one sentence, and the base model. `base`: its name and size."""
    return (
        "<h1>Whisper, one small adapter per language</h1>"
        "<p>A recording becomes text: the page hears which language is spoken, picks the adapter trained for it, and says why.</p>"
        f'<p class="wm-note">Base model: {escape(base)}</p>'
    )


def adapters(installed: list[LanguageAdapter], spoken_by: list[str]) -> str:
    """A card per installed adapter. `spoken_by`: what each is for, in the same order."""
    if not installed:
        return (
            "<h2>Adapters</h2><p>None is installed, so the base model writes everything. "
            "Start the page with <code>--adapters FOLDER</code>.</p>"
        )
    cards = "".join(_adapter_card(adapter, purpose) for adapter, purpose in zip(installed, spoken_by, strict=True))
    return f'<h2>Adapters</h2><p>Installed here, each a small file beside the same base model.</p><ul class="wm-cards">{cards}</ul>'


def _adapter_card(adapter: LanguageAdapter, purpose: str) -> str:
    headline, rest = measured(adapter)
    facts = [f"{method(adapter.peft_type)}, {adapter.num_parameters:,} parameters, {size(adapter.num_bytes)}", _chosen(adapter)]
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<li><h3>{escape(purpose)} <code>{escape(adapter.name)}</code></h3>"
        f"<p><strong>{headline}</strong><br>{rest}</p><ul>{lines}</ul></li>"
    )


def _chosen(adapter: LanguageAdapter) -> str:
    by_hand = "used only when you choose it, under Options"
    if adapter.carrier is not None:
        return f"{by_hand}: Whisper cannot hear this language, and is told it is {language_name(adapter.carrier)}"
    return "used when its language is heard" if adapter.domain is None else by_hand
