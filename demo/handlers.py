"""What a click does: the page's values in, a `Transcript` out, and what the widgets offer. No Gradio, no HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe import language_name
from whisper_moe.explain import explain
from whisper_moe.languages import language_tokens

if TYPE_CHECKING:
    from whisper_moe import LanguageAdapter, Segment, Transcriber, Transcript
    from whisper_moe.explain import Explanation
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
    switching: bool = False,
    two_best: bool = False,
    **options: Any,
) -> Transcript:
    """Transcribe the recording as the controls say. Raises `ValueError` with words for the person at the page.

    options: further ones of `Transcriber.transcribe`: limits, and where progress goes.
    """
    if audio is None:
        raise ValueError("There is no recording yet. Upload a file, record something, or click an example.")
    if switching and (language != AUTO or adapter not in (AUTO, BASE_ONLY)):
        raise ValueError(
            "If the language may change, it has to be listened for: set Language and Adapter to automatic, or untick "
            "'The language may change'."
        )
    return transcriber.transcribe(
        audio,
        language=None if language == AUTO else language,
        adapter=None if adapter == AUTO else adapter,
        allowed=list(allowed) or None,
        threshold=threshold,
        if_unsure="two-best" if two_best else "base",
        switching=switching,
        **options,
    )


def has_adapter(transcript: Transcript) -> bool:
    """Whether any adapter wrote, so that the base model alone would have written something else."""
    return transcript.adapter is not None or any(part.adapter is not None for part in transcript.segments)


def transcribe_by_base(
    transcriber: Transcriber, audio: str, transcript: Transcript, allowed: Sequence[str] = (), *, switching: bool = False, **options: Any
) -> Transcript:
    """What the base model alone writes for a recording that adapters wrote: told the same language, so that nothing else differs."""
    if switching:  # the languages are heard again, with adapters off as before, and so are the same
        return transcriber.transcribe(audio, adapter=BASE_ONLY, allowed=list(allowed) or None, switching=True, **options)
    told = (transcript.adapter_info or {}).get("carrier") or transcript.language
    return transcriber.transcribe(audio, language=told, adapter=BASE_ONLY, **options)


def explained(transcript: Transcript, allowed: Sequence[str], threshold: float) -> Explanation:
    """The decision, with those controls named that had a say in it."""
    was_detected = transcript.probability is not None
    return explain(transcript, allowed=list(allowed) or None, threshold=threshold if was_detected else None)


def as_json(transcript: Transcript, explanation: Explanation, base: Transcript | None = None) -> dict[str, Any]:
    """What the page shows as JSON: as `whisper-moe transcribe --json`, and what the base model alone wrote, if that is known."""
    row = transcript.to_dict() | {"decision": explanation.to_dict()}
    return row if base is None else row | {"base": base.to_dict()}


def captions(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Segments as `gr.Audio(subtitles=...)` takes them, and as its player does."""
    return [
        {"text": part.text, "timestamp": [part.start_s, part.end_s], "start": part.start_s, "end": part.end_s}
        for part in segments
        if part.text.strip()
    ]


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
