"""What a click does: the page's values in, a `Transcript` out, and what the widgets offer. No Gradio, no HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_moe import language_name
from whisper_moe.languages import language_tokens

if TYPE_CHECKING:
    from whisper_moe import LanguageAdapter, Transcriber, Transcript
    from whisper_moe.registry import AdapterSource

EXAMPLES = Path(__file__).parent / "examples"
AUTO = "auto"  # value of a dropdown that leaves the choice to the model
BASE_ONLY = "none"  # `Transcriber.transcribe(adapter="none")`: no adapter


def transcribe(
    transcriber: Transcriber,
    audio: str | None,
    language: str = AUTO,
    adapter: str = AUTO,
    allowed: Sequence[str] = (),
    threshold: float = 0.5,
    *,
    max_duration_s: float | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Transcript:
    """Transcribe the recording as the controls say. Raises `ValueError` with words for the person at the page."""
    if audio is None:
        raise ValueError("There is no recording yet. Upload a file, record something, or click an example.")
    return transcriber.transcribe(
        audio,
        language=None if language == AUTO else language,
        adapter=None if adapter == AUTO else adapter,
        allowed=list(allowed) or None,
        threshold=threshold,
        max_duration_s=max_duration_s,
        on_progress=on_progress,
    )


def base_description(transcriber: Transcriber) -> str:
    """Name, size and place of the base model."""
    model = transcriber.model
    precision = str(model.dtype).removeprefix("torch.")
    return f"{transcriber.name}, {model.num_parameters() / 1e6:,.1f} million parameters, on {model.device} in {precision}"


def base_languages(transcriber: Transcriber) -> list[str]:
    """Codes of the languages that the base model writes: those its checkpoint names, else all it has tokens for."""
    named = getattr(transcriber.model.generation_config, "written_languages", None)
    return list(named or language_tokens(transcriber.model) or ["en"])


def written_languages(transcriber: Transcriber) -> list[str]:
    """Codes of the languages that the base model or an adapter writes, by name."""
    return sorted({*base_languages(transcriber), *transcriber.registry.languages()}, key=language_name)


def language_choices(transcriber: Transcriber) -> list[tuple[str, str]]:
    """(label, value) of the language control; a language with an adapter names it."""
    choices = [("Automatic: listen first", AUTO)]
    for code in written_languages(transcriber):
        names = [adapter.name for adapter in transcriber.registry if adapter.language == code and adapter.domain is None]
        if any(source.language == code and source.domain is None for source in transcriber.registry.expected):
            names = [f"{code}, fetched when it is needed"]
        choices.append((language_name(code) + (f" (adapter {', '.join(names)})" if names else ""), code))
    return choices


def candidate_choices(transcriber: Transcriber) -> list[tuple[str, str]]:
    """(label, value) of the allow-list: the languages that the base model can detect."""
    return sorted((language_name(code), code) for code in language_tokens(transcriber.model))


def adapter_choices(transcriber: Transcriber) -> list[tuple[str, str]]:
    """(label, value) of the adapter control; domain adapters can be chosen only here."""
    choices = [("Automatic: by language", AUTO), ("None: the base model alone", BASE_ONLY)]
    expected = transcriber.registry.expected
    replaced = {(source.language, source.domain) for source in expected}  # by what is fetched; until then it cannot be asked for by name
    choices += [
        (f"{adapter.name}: {spoken_by(adapter)}", adapter.name)
        for adapter in transcriber.registry
        if (adapter.language, adapter.domain) not in replaced
    ]
    return choices + [(f"{source.key}: {spoken_by(source)}, fetched when it is needed", source.key) for source in expected]


def spoken_by(adapter: LanguageAdapter | AdapterSource) -> str:
    """What the adapter is for: "Welsh", or "English, domain child"."""
    name = language_name(adapter.language)
    return name if adapter.domain is None else f"{name}, domain {adapter.domain}"


def examples(transcriber: Transcriber, folder: Path = EXAMPLES) -> list[dict]:
    """The example recordings (see recipes/make_demo_examples.py) whose adapter is installed, each with its `path`."""
    rows = json.loads((folder / "examples.json").read_text("utf-8"))
    offered = {value for _, value in adapter_choices(transcriber)}
    return [row | {"path": str(folder / row["file"])} for row in rows if row["adapter"] in offered]
