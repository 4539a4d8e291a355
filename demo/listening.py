"""Which language is spoken in a recording, without writing it down: as `Transcriber.transcribe` would judge it. No Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from whisper_moe import LanguagePosterior, load_audio
from whisper_moe.audio import Span, find_windows
from whisper_moe.engine import is_noise
from whisper_moe.languages import allowed_codes, language_tokens

if TYPE_CHECKING:
    from whisper_moe import Transcriber

LISTEN_S, LISTEN_WINDOWS = 20.0, 3  # of speech that the language is judged by: one long window, or several short ones


def detect(
    transcriber: Transcriber, audio: str, *, allowed: Sequence[str] = (), max_duration_s: float | None = None
) -> LanguagePosterior | None:
    """The languages of a recording, heard with adapters off; None if it holds nothing but silence.

    Args:
        transcriber: Who listens.
        audio: The recording's path.
        allowed: Languages to choose among; empty: all that the model can detect.
        max_duration_s: Refuse longer recordings.

    Raises:
        ValueError: The recording cannot be used, or a language is unknown.
    """
    allowed_codes(language_tokens(transcriber.model) or {"en": -1}, list(allowed) or None)  # refuses before any work
    among = list(allowed) or transcriber.detectable_languages
    samples = load_audio(audio, max_duration_s=max_duration_s)
    heard = []
    for spans in _parts(find_windows(samples, transcriber.window_s)):
        posteriors = [each.posterior for each in transcriber.engine.hear(transcriber._features(samples, spans), allowed=among)]
        part = [(posterior, span.end_s - span.start_s) for posterior, span in zip(posteriors, spans, strict=True)]
        speech = [each for each in part if not is_noise(each[0])]
        if speech:
            return LanguagePosterior.mean(*zip(*speech, strict=True))
        heard += part
    return LanguagePosterior.mean(*zip(*heard, strict=True)) if heard else None


def _parts(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Windows to listen to until somebody speaks: each time about as much as the language is judged by."""
    start = 0
    while start < len(spans):
        end = start + 1
        while end < min(start + LISTEN_WINDOWS, len(spans)) and sum(each.end_s - each.start_s for each in spans[start:end]) < LISTEN_S:
            end += 1
        yield spans[start:end]
        start = end
