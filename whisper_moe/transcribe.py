"""The inference path: a recording in, a `Transcript` out.

Speech is found, the language is heard with adapters off, the registry chooses, the switch puts the chosen adapter on the base, and
windows are written in batches. Everything that touches the model is in `Transcriber`, behind one lock.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from whisper_moe.audio import SAMPLE_RATE, Source, Span, find_windows, load_audio
from whisper_moe.base_signature import base_parameters
from whisper_moe.languages import (
    LanguagePosterior,
    adapters_off,
    allowed_codes,
    language_code,
    language_name,
    language_posterior,
    language_tokens,
)
from whisper_moe.registry import BASE, AdapterRegistry, AdapterSwitch, Decision, LanguageAdapter, check_fit

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    from transformers.modeling_outputs import BaseModelOutput

OnProgress: TypeAlias = Callable[[float, str], None]
Adapters: TypeAlias = "str | Path | Sequence[str | Path] | AdapterRegistry | None"

MAX_DURATION_S = 4 * 3600.0
NO_SPEECH = 0.6  # above this probability of the no-speech token a window counts as noise; Whisper's own figure

_LISTEN_S, _LISTEN_WINDOWS = 30.0, 3  # of speech that the language is judged by: the longer, the surer
_LISTEN_ROUNDS = 4  # how often to listen further on if nobody speaks at the start
# Tokens a window may hold. Nobody speaks faster, even in scripts that take three tokens a letter; a model that is caught in a
# repetition would else fill the whole window with it.
_TOKENS_PER_S, _TOKENS_AT_LEAST = 40, 16
_NUM_SHOWN = 8  # languages in a transcript's probabilities


# ---- what comes out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """What is said in one stretch of the recording."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said, in which language, and who wrote it.

    Args:
        text: All of it; empty if nobody speaks.
        segments: The same by stretches of the recording, none longer than the model's window.
        language: The code of the language; None if nobody speaks.
        language_name: Its English name; empty if nobody speaks.
        probability: Of that language, if it was detected.
        probabilities: The most probable languages; empty if the language was given.
        no_speech: Probability that nobody speaks; None if it was not looked at.
        adapter: Name of the adapter that wrote; None for the base model alone.
        adapter_info: What is known of that adapter.
        reason: Why this adapter or none, in one sentence.
        warnings: What the reader should know besides.
        duration_s: Length of the recording.
        model: Name of the base model.
        elapsed_s: How long it took.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    language_name: str
    probability: float | None
    probabilities: dict[str, float]
    no_speech: float | None
    adapter: str | None
    adapter_info: dict[str, Any] | None
    reason: str
    warnings: tuple[str, ...]
    duration_s: float
    model: str
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        row = asdict(self)
        return row | {"segments": list(row["segments"]), "warnings": list(row["warnings"])}


# ---- the path ----------------------------------------------------------------------------------------------------------


class Transcriber:
    """A Whisper with its adapters, ready to write what it hears. Safe to call from several threads: one at a time is served.

    Args:
        model: The bare base model. It is put into evaluation mode.
        processor: Its processor; window and features are read from it.
        registry: The adapters to choose from.
        name: What to call the model in transcripts.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        registry: AdapterRegistry | None = None,
        *,
        name: str = "whisper",
    ) -> None:
        features = processor.feature_extractor
        if features.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"The model hears {features.sampling_rate} Hz; recordings are read at {SAMPLE_RATE} Hz.")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.window_s = features.n_samples / features.sampling_rate
        self.registry = AdapterRegistry()
        self.switch = AdapterSwitch(model)
        self._lock = threading.Lock()
        # A checkpoint may say which of its language tokens it learnt to use; Whisper's own do not, they know all of theirs.
        self._written: list[str] | None = getattr(model.generation_config, "written_languages", None)
        self._heard: list[str] | None = getattr(model.generation_config, "heard_languages", None)
        for adapter in registry or ():
            self.add_adapter(adapter)

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, adapters: Adapters = None, device: str = "auto", dtype: str = "auto"
    ) -> Transcriber:
        """Load a base model and its adapters.

        Args:
            model: A folder or a model id of the Hub ("openai/whisper-small"); None: the pocket Whisper that is shipped.
            adapters: A folder of adapters, or several; None: those shipped with the pocket, and none for another model.
            device: "cuda", "mps", "cpu"; "auto" takes the first that is there.
            dtype: "float16", "bfloat16", "float32"; "auto" is half precision on CUDA and single elsewhere.
        """
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        from whisper_moe.pocket import ADAPTERS, MODEL

        source = str(MODEL if model is None else model)
        is_pocket = Path(source).resolve() == MODEL.resolve()
        if is_pocket and not (MODEL / "model.safetensors").is_file():
            raise ValueError(f"The pocket Whisper is not in {MODEL}. Make it with `python -m recipes.train_pocket`, or name another model.")
        if adapters is None and is_pocket and ADAPTERS.is_dir():
            adapters = ADAPTERS
        registry = _registry(adapters)
        chosen_device = _device(device)
        whisper = WhisperForConditionalGeneration.from_pretrained(source, dtype=_dtype(dtype, chosen_device))
        whisper.requires_grad_(False).to(chosen_device)
        name = "pocket-whisper" if is_pocket else Path(source).name if Path(source).is_dir() else source
        return cls(whisper, WhisperProcessor.from_pretrained(source), registry, name=name)

    @property
    def base_languages(self) -> list[str]:
        """The languages that the base model writes by itself, as far as is known."""
        return list(language_tokens(self.model)) or ["en"] if self._written is None else list(self._written)

    @property
    def detectable_languages(self) -> list[str]:
        """The languages that can be detected."""
        return list(language_tokens(self.model)) or ["en"] if self._heard is None else list(self._heard)

    def describe(self) -> str:
        """The base model in a few words: name, size, precision and place."""
        millions = sum(parameter.numel() for parameter in base_parameters(self.model).values()) / 1e6
        precision = str(self.model.dtype).removeprefix("torch.")
        return f"{self.name}, {millions:.3g} million parameters, {precision} on {self.model.device.type}"

    def add_adapter(self, adapter: str | Path | LanguageAdapter) -> LanguageAdapter:
        """Add an adapter, or the folder of one, if it was made for this base."""
        adapter = adapter if isinstance(adapter, LanguageAdapter) else LanguageAdapter.load(adapter)
        with self._lock:
            check_fit(adapter, self.model)
            return self.registry.add(adapter)

    def transcribe(
        self,
        audio: Source,
        *,
        language: str | None = None,
        adapter: str | None = None,
        allowed: Collection[str] | None = None,
        threshold: float = 0.5,
        num_beams: int = 1,
        batch_size: int = 8,
        max_duration_s: float | None = MAX_DURATION_S,
        on_progress: OnProgress | None = None,
    ) -> Transcript:
        """Write down what is said in a recording.

        Args:
            audio: A path, bytes, a file object, `(rate, array)`, or an array at 16 kHz.
            language: The language, if it is known: a code or a name. None: it is detected.
            adapter: An adapter to use whatever is heard, by name; "none" for the base model alone.
            allowed: Languages to choose among when detecting; None: all.
            threshold: Below this probability the language counts as uncertain, and the base model writes.
            num_beams: Beams of the search; 1 is greedy and quickest.
            batch_size: Windows written at a time.
            max_duration_s: Refuse longer recordings; None: no limit.
            on_progress: Called with the share that is done (0 to 1) and what is being done.

        Raises:
            AudioError: The recording cannot be used.
            ValueError: Nobody can write what is asked for. Known before any work is done.
        """
        started, tell = time.monotonic(), on_progress or _tell_nobody
        language = None if language is None else language_code(language)
        self._check(language, adapter, allowed, threshold, num_beams, batch_size)
        tell(0.0, "Reading the recording")
        samples = load_audio(audio, max_duration_s=max_duration_s)
        tell(0.05, "Looking for speech")
        spans = find_windows(samples, self.window_s)
        if not spans:
            tell(1.0, "Done")
            return _nothing(language, None, self._facts(None, samples, started))
        detecting = language is None and adapter in (None, BASE)
        heard = None
        with self._lock:
            if detecting:
                tell(0.1, "Listening for the language")
                heard = self._listen(samples, spans, self.detectable_languages if allowed is None else allowed)
            if heard is not None and _is_noise(heard):
                tell(1.0, "Done")
                return _nothing(language, heard, self._facts(heard, samples, started))
            decision = self.registry.choose(heard, language=language, adapter=adapter, threshold=threshold, written=self._written)
            with self.switch.active(decision.adapter):
                written = self._write(samples, spans, decision, num_beams, batch_size, drop_noise=detecting, tell=tell)
        tell(1.0, "Done")
        return _transcript(written, len(spans), decision, self._facts(heard, samples, started))

    # ---- before any work -----------------------------------------------------------------------------------------------

    def _check(
        self,
        language: str | None,
        adapter: str | None,
        allowed: Collection[str] | None,
        threshold: float,
        num_beams: int,
        batch_size: int,
    ) -> None:
        """Refuse what cannot be done."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a probability, 0 to 1; got {threshold}.")
        if num_beams < 1 or batch_size < 1:
            raise ValueError(f"num_beams and batch_size are at least 1; got {num_beams} and {batch_size}.")
        tokens = language_tokens(self.model) or {"en": -1}
        allowed_codes(tokens, allowed)
        if language is None and adapter in (None, BASE):
            return  # it will be detected: one of the model's own
        prompt = self.registry.choose(None, language=language, adapter=adapter).prompt_language
        if prompt not in tokens:
            known = ", ".join(sorted(tokens))
            raise ValueError(f"{self.name} has no language token for {language_name(prompt)} ({prompt!r}). It has: {known}.")

    # ---- hearing -------------------------------------------------------------------------------------------------------

    def _features(self, samples: np.ndarray, spans: Sequence[Span]) -> torch.Tensor:
        """(batch, n_mels, frames) on the model's device, in its precision."""
        waves = [samples[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
        features = self.processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        return features.to(self.model.device, self.model.dtype)

    def _encode(self, features: torch.Tensor) -> BaseModelOutput:
        """Encoder states (batch, positions, d_model) under whatever adapter is at work."""
        import torch

        with torch.no_grad():
            return self.model.get_encoder()(features)

    def _listen(self, samples: np.ndarray, spans: Sequence[Span], allowed: Collection[str]) -> LanguagePosterior:
        """One posterior for the recording: of its first windows in which somebody speaks, weighted by their length."""
        every: list[tuple[Span, LanguagePosterior]] = []
        for part in _first_parts(spans):
            posteriors = language_posterior(self.model, self._features(samples, part), allowed=allowed)
            found = list(zip(part, posteriors, strict=True))
            every += found
            speech = [(span, posterior) for span, posterior in found if not _is_noise(posterior)]
            if speech:
                return _weighted(speech)
        return _weighted(every)

    # ---- writing -------------------------------------------------------------------------------------------------------

    def _write(
        self,
        samples: np.ndarray,
        spans: Sequence[Span],
        decision: Decision,
        num_beams: int,
        batch_size: int,
        *,
        drop_noise: bool,
        tell: OnProgress,
    ) -> list[tuple[Segment, bool]]:
        """Segments, and whether a repetition was cut from each. Windows in which nobody speaks are left out."""
        segments: list[tuple[Segment, bool]] = []
        for start in range(0, len(spans), batch_size):
            tell(0.15 + 0.85 * start / len(spans), f"Writing, {start} of {len(spans)} parts done")
            batch = spans[start : start + batch_size]
            features, encoded = self._features(samples, batch), None
            if drop_noise:
                with adapters_off(self.model):
                    encoded = self._encode(features)
                heard = language_posterior(self.model, None, encoder_outputs=encoded)
                kept = [row for row, posterior in enumerate(heard) if not _is_noise(posterior)]
                if not kept:
                    continue
                batch, features, encoded = [batch[row] for row in kept], features[kept], _rows(encoded, kept)
            if encoded is None or decision.adapter is not None:  # the base's states hold for the base alone
                encoded = self._encode(features)
            texts = self._generate(encoded, batch, decision.prompt_language, num_beams)
            for span, text in zip(batch, texts, strict=True):
                shortened = _without_repetition(text)
                segments.append((Segment(round(span.start_s, 2), round(span.end_s, 2), shortened), shortened != text))
        return segments

    def _generate(self, encoded: BaseModelOutput, spans: Sequence[Span], language: str, num_beams: int) -> list[str]:
        """The text of each window."""
        prompt = {"language": language, "task": "transcribe"} if language_tokens(self.model) else {}
        longest_s = max(span.end_s - span.start_s for span in spans)
        # `max_length`, to which Whisper's generate adds the prompt: the checkpoint sets it too, and with `max_new_tokens`
        # transformers warns of the two at every call.
        limit = min(self.model.config.max_target_positions, _TOKENS_AT_LEAST + round(_TOKENS_PER_S * longest_s))
        tokens = self.model.generate(
            encoder_outputs=encoded,
            attention_mask=_whole_windows(encoded),
            num_beams=num_beams,
            max_length=limit,
            return_timestamps=False,
            **prompt,
        )  # (batch, tokens)
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().rstrip("\ufffd").rstrip() for text in texts]  # \ufffd: a letter cut in the middle by the limit

    def _facts(self, heard: LanguagePosterior | None, samples: np.ndarray, started: float) -> dict[str, Any]:
        """What every transcript says, whatever was written."""
        return {
            "probabilities": {} if heard is None else heard.top(_NUM_SHOWN),
            "no_speech": None if heard is None else heard.no_speech,
            "duration_s": len(samples) / SAMPLE_RATE,
            "model": self.name,
            "elapsed_s": time.monotonic() - started,
        }


# ---- the answer --------------------------------------------------------------------------------------------------------


def _transcript(written: Sequence[tuple[Segment, bool]], num_spans: int, decision: Decision, facts: dict[str, Any]) -> Transcript:
    """The transcript of what was written."""
    segments = tuple(segment for segment, _ in written if segment.text)
    warnings = [] if decision.warning is None else [decision.warning]
    if len(written) < num_spans:
        warnings.append(f"{num_spans - len(written)} of {num_spans} parts were left out: sound in which nobody speaks.")
    if any(cut for _, cut in written):
        warnings.append("The model repeated itself without end in places; the repetition was cut. The text there is doubtful.")
    return Transcript(
        text=" ".join(segment.text for segment in segments),
        segments=segments,
        language=decision.language,
        language_name=language_name(decision.language),
        probability=decision.probability,
        adapter=None if decision.adapter is None else decision.adapter.name,
        adapter_info=None if decision.adapter is None else _info(decision.adapter),
        reason=decision.reason,
        warnings=tuple(warnings),
        **facts,
    )


def _nothing(language: str | None, heard: LanguagePosterior | None, facts: dict[str, Any]) -> Transcript:
    """The transcript of a recording in which nobody speaks: it is silent, or the model heard (`heard`) no speech in it."""
    if heard is None:
        reason = "The recording is silent."
        warning = "No sound was found, so nothing was written. Is the microphone on?"
    else:
        reason = f"There is sound, but the model hears nobody speak ({heard.no_speech:.0%} sure)."
        warning = "No speech was heard, so nothing was written. If somebody does speak, say which language it is."
    return Transcript(
        text="",
        segments=(),
        language=language,
        language_name="" if language is None else language_name(language),
        probability=None,
        adapter=None,
        adapter_info=None,
        reason=reason,
        warnings=(warning,),
        **facts,
    )


# ---- small parts -------------------------------------------------------------------------------------------------------


def _tell_nobody(share: float, what: str) -> None:
    """Progress that nobody asked for."""


def _registry(adapters: Adapters) -> AdapterRegistry:
    if isinstance(adapters, AdapterRegistry):
        return adapters
    folders = [] if adapters is None else [adapters] if isinstance(adapters, (str, Path)) else adapters
    return AdapterRegistry(adapter for folder in folders for adapter in AdapterRegistry.from_folder(folder))


def _device(device: str) -> torch.device:
    import torch

    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    import torch

    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in known:
        raise ValueError(f"Unknown dtype {dtype!r}. Known: auto, {', '.join(known)}.")
    return known[dtype]


def _is_noise(posterior: LanguagePosterior) -> bool:
    return posterior.no_speech is not None and posterior.no_speech > NO_SPEECH


def _first_parts(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """The first windows to listen to, then the next ones, each time about as much as the language is judged by."""
    start = 0
    for _ in range(_LISTEN_ROUNDS):
        part: list[Span] = []
        for span in spans[start : start + _LISTEN_WINDOWS]:
            if not part or sum(other.end_s - other.start_s for other in part) < _LISTEN_S:
                part.append(span)
        if not part:
            return
        yield part
        start += len(part)


def _weighted(found: Sequence[tuple[Span, LanguagePosterior]]) -> LanguagePosterior:
    return LanguagePosterior.mean([posterior for _, posterior in found], [span.end_s - span.start_s for span, _ in found])


def _rows(encoded: BaseModelOutput, rows: Sequence[int]) -> BaseModelOutput:
    from transformers.modeling_outputs import BaseModelOutput

    states = encoded.last_hidden_state
    assert states is not None
    return BaseModelOutput(last_hidden_state=states[list(rows)])


def _whole_windows(encoded: BaseModelOutput) -> torch.Tensor:
    """A mask without effect, (batch, frames): Whisper listens to the silence that fills a window; `generate` warns without one."""
    states = encoded.last_hidden_state
    assert states is not None
    return states.new_ones((states.shape[0], 2 * states.shape[1])).long()


_REPETITION = re.compile(r"(.{1,80}?)\1{6,}(?=(.{0,80})$)", re.DOTALL)


def _without_repetition(text: str) -> str:
    """The text without an ending in which the same words come again and again: a decoder caught in a loop, not speech."""
    found = _REPETITION.search(text)
    if found is None or not found.group(1).startswith(found.group(2)) or len(found.group(0)) < 24:
        return text
    return (text[: found.start()] + found.group(1)).strip()


def _info(adapter: LanguageAdapter) -> dict[str, Any]:
    fields = ("name", "language", "domain", "carrier", "peft_type", "base", "num_parameters", "num_bytes", "metrics")
    return {field: getattr(adapter, field) for field in fields}
