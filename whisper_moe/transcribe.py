"""The inference path: a recording in, a `Transcript` out.

Speech is found, the language is heard with adapters off, the registry chooses, the switch puts the chosen adapter on the base, and
windows are written in batches. Everything that touches the model is in `Transcriber`, behind one lock.

Every window is encoded once: what was listened to is written from the same encoder states, unless the chosen adapter changes the encoder.
Then the windows that were listened to (the first ones, once a recording) are encoded again, and no others.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from whisper_moe.audio import SAMPLE_RATE, Source, Span, find_windows, load_audio
from whisper_moe.base_signature import base_parameters, base_signature
from whisper_moe.languages import (
    LanguagePosterior,
    adapters_off,
    allowed_codes,
    language_code,
    language_name,
    language_posterior,
    language_tokens,
)
from whisper_moe.registry import BASE, AdapterRegistry, AdapterSwitch, Decision, LanguageAdapter, LoadAdapter, check_fit
from whisper_moe.segments import find_segments, steady_languages

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    from transformers.modeling_outputs import BaseModelOutput

OnProgress: TypeAlias = Callable[[float, str], None]
Adapters: TypeAlias = "str | Path | Sequence[str | Path] | AdapterRegistry | None"
IfUnsure: TypeAlias = Literal["base", "two-best"]

MAX_DURATION_S = 4 * 3600.0
NO_SPEECH = 0.6  # above this probability of the no-speech token a window counts as noise; Whisper's own figure

_LISTEN_S, _LISTEN_WINDOWS = 20.0, 3  # of speech that the language is judged by: one long window, or several short ones
_LISTEN_ROUNDS = 4  # how often to listen to as much again if nobody speaks at the start; after that, a batch at a time
# Tokens a window may hold. Nobody speaks faster, even in scripts that take three tokens a letter; a model that is caught in a
# repetition would else fill the whole window with it.
_TOKENS_PER_S, _TOKENS_AT_LEAST = 40, 16
_NUM_SHOWN = 8  # languages in a transcript's probabilities
_NUM_REMEMBERED = 64  # windows whose encoder states are kept from listening to writing; whisper-large needs 8 MB for each


# ---- what comes out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """What is said in one stretch of the recording.

    Args:
        start_s, end_s: Where. A change of language is known no more finely than that.
        text: What is said there.
        language: The code of its language.
        adapter: Name of the adapter that wrote it; None for the base model alone.
        probabilities: The most probable languages of this stretch, if each was listened to by itself; else empty.
    """

    start_s: float
    end_s: float
    text: str
    language: str | None = None
    adapter: str | None = None
    probabilities: dict[str, float] = field(default_factory=dict, hash=False)


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
        scores: Where two languages were written because the language was uncertain: the mean log probability per token of each.
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
    scores: dict[str, float] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        row = asdict(self)
        return row | {"segments": list(row["segments"]), "warnings": list(row["warnings"])}


# ---- the path ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heard:
    """One window as the base hears it: encoder states (1, positions, d_model), None where too many would be kept, and the posterior."""

    states: torch.Tensor | None
    posterior: LanguagePosterior


@dataclass
class _Work:
    """One recording while it is worked on. Windows go by their number in `spans`."""

    samples: np.ndarray
    spans: Sequence[Span]
    num_beams: int
    batch_size: int
    tell: OnProgress
    drop_noise: bool
    heard: dict[int, _Heard] = field(default_factory=dict)
    num_done: int = 0

    def speech(self) -> list[int]:
        """The windows that were listened to and in which somebody speaks."""
        return [number for number, heard in self.heard.items() if not _is_noise(heard.posterior)]

    def posterior(self, numbers: Sequence[int]) -> LanguagePosterior:
        """One posterior for several windows, weighted by their length."""
        lengths = [self.spans[number].end_s - self.spans[number].start_s for number in numbers]
        return LanguagePosterior.mean([self.heard[number].posterior for number in numbers], lengths)

    def languages(self) -> dict[str, list[int]]:
        """The languages that are spoken, those spoken longest first, with their windows. Every window was listened to."""
        numbers = sorted(self.speech())
        lengths = {number: self.spans[number].end_s - self.spans[number].start_s for number in numbers}
        steady = steady_languages([self.heard[number].posterior.probabilities for number in numbers], list(lengths.values()))
        found: dict[str, list[int]] = {}
        for number, code in zip(numbers, steady, strict=True):
            found.setdefault(code, []).append(number)
        return dict(sorted(found.items(), key=lambda item: -sum(lengths[number] for number in item[1])))


@dataclass(frozen=True)
class _Piece:
    """What was written for a window."""

    number: int
    segment: Segment
    was_cut: bool


_Choose: TypeAlias = Callable[[], list[Decision]]
_Write: TypeAlias = Callable[[list[Decision]], tuple[Decision, list[_Piece]]]


class _UnusableError(Exception):
    """An adapter cannot be put on the model; `error` says why."""

    def __init__(self, adapter: LanguageAdapter, error: ValueError) -> None:
        super().__init__(str(error))
        self.adapter, self.error = adapter, error


class Transcriber:
    """A Whisper with its adapters, ready to write what it hears. Safe to call from several threads: one at a time is served.

    Args:
        model: The bare base model. It is put into evaluation mode.
        processor: Its processor; window and features are read from it.
        registry: The adapters to choose from.
        name: What to call the model in transcripts.
        load: What puts adapters on the model, as for `AdapterSwitch`.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        registry: AdapterRegistry | None = None,
        *,
        name: str = "whisper",
        load: LoadAdapter | None = None,
    ) -> None:
        features = processor.feature_extractor
        if features.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"The model hears {features.sampling_rate} Hz; recordings are read at {SAMPLE_RATE} Hz.")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.window_s = features.n_samples / features.sampling_rate
        self.registry = AdapterRegistry()
        self.switch = AdapterSwitch(model, load)
        self._lock = threading.Lock()
        self._signature = base_signature(model)  # once: the model's modules are looked at under the lock only
        # A checkpoint may say which of its language tokens it learnt to use; Whisper's own do not, they know all of theirs.
        self._written: list[str] | None = getattr(model.generation_config, "written_languages", None)
        self._heard: list[str] | None = getattr(model.generation_config, "heard_languages", None)
        for adapter in registry or ():
            self.add_adapter(adapter)
        for source in () if registry is None else registry.expected:
            self.registry.expect(source.language, source.fetch, where=source.where, domain=source.domain)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        adapters: Adapters = None,
        device: str = "auto",
        dtype: str = "auto",
        *,
        load: LoadAdapter | None = None,
    ) -> Transcriber:
        """Load a base model and its adapters.

        Args:
            model: A folder or a model id of the Hub ("openai/whisper-small"); None: the pocket Whisper that is shipped.
            adapters: A folder of adapters, or several; None: those shipped with the pocket, and none for another model.
            device: "cuda", "mps", "cpu"; "auto" takes the first that is there.
            dtype: "float16", "bfloat16", "float32"; "auto" is half precision on CUDA and single elsewhere.
            load: What puts adapters on the model, as for `AdapterSwitch`; `hub_utils.load_adapter` for adapters of strangers.
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
        return cls(whisper, WhisperProcessor.from_pretrained(source), registry, name=name, load=load)

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
        self.check_fit(adapter)
        return self.registry.add(adapter)

    def check_fit(self, adapter: LanguageAdapter) -> None:
        """Raise `WrongBaseError` if an adapter is known to have been made for another base. Does not touch the model."""
        check_fit(adapter, self.model, self._signature)

    def transcribe(
        self,
        audio: Source,
        *,
        language: str | None = None,
        adapter: str | None = None,
        allowed: Collection[str] | None = None,
        threshold: float = 0.5,
        if_unsure: IfUnsure = "base",
        switching: bool = False,
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
            threshold: Below this probability the language counts as uncertain.
            if_unsure: What is done then. "base": the base model writes. "two-best": the beginning is written in the two most probable
                languages, each by its own adapter, and the likelier text decides (mean log probability per token).
            switching: Whether the language may change within the recording: it is cut at its pauses, and a language found for each piece.
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
        self._check(language, adapter, allowed, threshold, num_beams, batch_size, if_unsure)
        detecting = language is None and adapter in (None, BASE)
        if switching and not detecting:
            raise ValueError(
                "With switching=True the languages are heard piece by piece: leave language and adapter out (adapter='none' may stay)."
            )
        tell(0.0, "Reading the recording")
        samples = load_audio(audio, max_duration_s=max_duration_s)
        tell(0.05, "Looking for speech")
        spans = find_segments(samples, self.window_s) if switching else find_windows(samples, self.window_s)
        work = _Work(samples, spans, num_beams, batch_size, tell, drop_noise=detecting)
        if not spans:
            tell(1.0, "Done")
            return _nothing(language, None, self._facts(None, samples, started))
        heard = None
        if detecting:
            tell(0.1, "Listening for the language")
            among = self.detectable_languages if allowed is None else allowed
            with self._lock:
                heard = self._listen_everywhere(work, among) if switching else self._listen(work, among)
            if _is_noise(heard):
                tell(1.0, "Done")
                return _nothing(language, heard, self._facts(heard, samples, started))
        if switching:
            languages = work.languages()
            decision, written = self._decide_and_write(
                work,
                lambda: self._choose_for_each(work, languages, adapter, threshold),
                lambda decisions: self._write_switching(work, languages, decisions),
                by_name=False,
            )
        else:
            decision, written = self._decide_and_write(
                work,
                lambda: self._choose(heard, language, adapter, threshold, if_unsure),
                lambda decisions: self._write_one(work, decisions),
                by_name=adapter not in (None, BASE),
            )
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
        if_unsure: str,
    ) -> None:
        """Refuse what cannot be done."""
        if if_unsure not in get_args(IfUnsure):
            raise ValueError(f"if_unsure is one of {', '.join(map(repr, get_args(IfUnsure)))}; got {if_unsure!r}.")
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

    def _listen(self, work: _Work, allowed: Collection[str]) -> LanguagePosterior:
        """One posterior for the recording: of its first windows in which somebody speaks, weighted by their length."""
        for part in _parts(work.spans, work.batch_size):
            self._hear(work, part, allowed)
            speech = [number for number in part if not _is_noise(work.heard[number].posterior)]
            if speech:
                return work.posterior(speech)
        return work.posterior(list(work.heard))

    def _listen_everywhere(self, work: _Work, allowed: Collection[str]) -> LanguagePosterior:
        """The same of all windows; each is remembered by itself."""
        for start in range(0, len(work.spans), work.batch_size):
            self._hear(work, range(len(work.spans))[start : start + work.batch_size], allowed)
        return work.posterior(work.speech() or list(work.heard))

    def _hear(self, work: _Work, numbers: Sequence[int], allowed: Collection[str]) -> None:
        """Remember what the base hears in some windows."""
        with adapters_off(self.model):
            encoded = self._encode(self._features(work.samples, [work.spans[number] for number in numbers]))
        states = encoded.last_hidden_state
        assert states is not None
        posteriors = language_posterior(self.model, None, encoder_outputs=encoded, allowed=allowed)
        num_free = _NUM_REMEMBERED - sum(heard.states is not None for heard in work.heard.values())
        for row, (number, posterior) in enumerate(zip(numbers, posteriors, strict=True)):
            is_kept = num_free > 0 and not _is_noise(posterior)  # noise is not written; a copy, or the whole batch would be kept
            num_free -= is_kept
            work.heard[number] = _Heard(states[row : row + 1].clone() if is_kept else None, posterior)

    # ---- deciding ------------------------------------------------------------------------------------------------------

    def _decide_and_write(self, work: _Work, choose: _Choose, write: _Write, *, by_name: bool) -> tuple[Decision, list[_Piece]]:
        """Choose, with the lock free, because an adapter may have to be fetched; then write, with the lock held.

        An adapter that was fetched and cannot be put on the model after all is withdrawn, and the choice made anew; the new decision
        carries the reason. If the adapter is at hand, or was asked for by its name, that is an error.
        """
        withdrawn: set[Path] = set()
        while True:
            decisions = choose()
            work.num_done = 0
            try:
                with self._lock:
                    return write(decisions)
            except _UnusableError as unusable:
                path, problem = unusable.adapter.path, self.registry.withdraw(unusable.adapter, unusable.error)
                if problem is None:
                    raise unusable.error from None
                if by_name or path in withdrawn:
                    raise ValueError(problem) from unusable.error
                withdrawn.add(path)

    def _choose(
        self, heard: LanguagePosterior | None, language: str | None, adapter: str | None, threshold: float, if_unsure: str
    ) -> list[Decision]:
        """Who writes the recording; two rivals where the language is uncertain and both shall be tried."""
        options: dict[str, Any] = {"adapter": adapter, "threshold": threshold, "written": self._written}
        unsure = heard is not None and heard.best[1] < threshold and len(heard.probabilities) > 1
        if heard is None or not unsure or if_unsure == "base":
            return [self.registry.choose(heard, language=language, **options)]
        return [self.registry.choose(heard, language=code, **options) for code in heard.top(2)]

    @contextmanager
    def _using(self, decision: Decision) -> Iterator[None]:
        """The decision's adapter at work. Raises `_UnusableError` if it cannot be put on the model."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self.switch.active(decision.adapter))
            except ValueError as error:
                assert decision.adapter is not None
                raise _UnusableError(decision.adapter, error) from error
            yield

    def _write_one(self, work: _Work, rivals: Sequence[Decision]) -> tuple[Decision, list[_Piece]]:
        """Everything that is said, in one language: that of the only decision, or of the one whose text is the likelier."""
        numbers = range(len(work.spans))
        if len(rivals) == 1:
            return rivals[0], self._write(work, rivals[0], numbers)
        tried = self._try(work, rivals)
        decision = _likelier(rivals, [score for _, score in tried])
        beginning = next(pieces for each, (pieces, _) in zip(rivals, tried, strict=True) if each.language == decision.language)
        return decision, beginning + self._write(work, decision, [number for number in numbers if number not in work.heard])

    def _try(self, work: _Work, rivals: Sequence[Decision]) -> list[tuple[list[_Piece], float]]:
        """What each decision writes for the windows that were listened to, and the mean log probability of a token of it.

        Decisions for the same writer (two languages of the base) are rows of one batch.
        """
        tried: list[tuple[list[_Piece], float] | None] = [None] * len(rivals)
        for first in {None if each.adapter is None else each.adapter.name: each for each in rivals}.values():
            writer = first.adapter
            same = [index for index, each in enumerate(rivals) if each.adapter == writer]
            with self._using(first):
                numbers, encoded = self._encoded(work, sorted(work.heard), writer)
                states = encoded.last_hidden_state
                rows = _output(states.repeat(len(same), 1, 1))  # (decisions * windows, positions, d_model)
                languages = [rivals[index].prompt_language for index in same for _ in numbers]
                tokens, limit = self._generate(rows, [work.spans[number] for number in numbers] * len(same), languages, work.num_beams)
                sums, counts = self._log_probabilities(rows, tokens, languages, limit)
            texts = self._texts(tokens)
            for place, index in enumerate(same):
                own = slice(place * len(numbers), (place + 1) * len(numbers))
                pieces = [_piece(work, number, text, rivals[index]) for number, text in zip(numbers, texts[own], strict=True)]
                tried[index] = pieces, sum(sums[own]) / max(1, sum(counts[own]))
        return [each for each in tried if each is not None]

    def _choose_for_each(
        self, work: _Work, languages: Mapping[str, Sequence[int]], adapter: str | None, threshold: float
    ) -> list[Decision]:
        """Who writes each language, in their order."""
        seconds = {code: sum(work.spans[number].end_s - work.spans[number].start_s for number in own) for code, own in languages.items()}
        decisions = []
        for code, own in languages.items():
            heard = work.posterior(own)
            sure = heard.probabilities[code] >= threshold
            decision = self.registry.choose(heard, language=code, adapter=adapter if sure else BASE, written=self._written)
            decisions.append(_heard_in_pieces(decision, seconds, sure, threshold))
        return decisions

    def _write_switching(
        self, work: _Work, languages: Mapping[str, Sequence[int]], decisions: Sequence[Decision]
    ) -> tuple[Decision, list[_Piece]]:
        """Each language by its own writer; the decision is that of the language that is spoken longest."""
        pieces = [self._write(work, decision, own) for decision, own in zip(decisions, languages.values(), strict=True)]
        written = [piece for own in pieces for piece in own]
        warnings = " ".join(dict.fromkeys(each.warning for each in decisions if each.warning is not None))
        return replace(decisions[0], warning=warnings or None), sorted(written, key=lambda piece: piece.number)

    # ---- writing -------------------------------------------------------------------------------------------------------

    def _write(self, work: _Work, decision: Decision, numbers: Sequence[int]) -> list[_Piece]:
        """What is said in some windows. Those in which nobody speaks are left out."""
        pieces: list[_Piece] = []
        with self._using(decision):
            for start in range(0, len(numbers), work.batch_size):
                batch = numbers[start : start + work.batch_size]
                work.tell(0.15 + 0.85 * work.num_done / len(work.spans), f"Writing, {work.num_done} of {len(work.spans)} parts done")
                kept, encoded = self._encoded(work, batch, decision.adapter)
                work.num_done += len(batch)
                if not kept:
                    continue
                spans = [work.spans[number] for number in kept]
                tokens, _ = self._generate(encoded, spans, [decision.prompt_language] * len(kept), work.num_beams)
                pieces += [_piece(work, number, text, decision) for number, text in zip(kept, self._texts(tokens), strict=True)]
        return pieces

    def _encoded(self, work: _Work, numbers: Sequence[int], adapter: LanguageAdapter | None) -> tuple[list[int], Any]:
        """The windows in which somebody speaks, and their encoder states (windows, positions, d_model) under the adapter at work."""
        import torch

        as_base = adapter is None or not adapter.touches_encoder
        kept = [number for number in numbers if not (number in work.heard and work.drop_noise and _is_noise(work.heard[number].posterior))]
        remembered = {number: work.heard[number].states for number in kept if number in work.heard} if as_base else {}
        states = {number: known for number, known in remembered.items() if known is not None}
        new = [number for number in kept if number not in states]
        if new:
            encoded = self._encode(self._features(work.samples, [work.spans[number] for number in new]))
            assert encoded.last_hidden_state is not None
            states |= {number: encoded.last_hidden_state[row : row + 1] for row, number in enumerate(new)}
            noise = self._noise(work, new, encoded, as_base) if work.drop_noise else set()
            kept = [number for number in kept if number not in noise]
        return kept, _output(torch.cat([states[number] for number in kept])) if kept else None

    def _noise(self, work: _Work, numbers: Sequence[int], encoded: BaseModelOutput, as_base: bool) -> set[int]:
        """Those of some windows in which the base hears nobody speak.

        States made with an adapter on tell the base's decoder a little else than its own would. They only raise the suspicion: a suspect
        is listened to once more with the adapter off, and speech costs nothing.
        """
        heard = language_posterior(self.model, None, encoder_outputs=encoded)
        noise = [number for number, each in zip(numbers, heard, strict=True) if number not in work.heard and _is_noise(each)]
        if as_base or not noise:
            return set(noise)
        again = language_posterior(self.model, self._features(work.samples, [work.spans[number] for number in noise]))
        return {number for number, each in zip(noise, again, strict=True) if _is_noise(each)}

    def _generate(
        self, encoded: BaseModelOutput, spans: Sequence[Span], languages: Sequence[str], num_beams: int
    ) -> tuple[torch.Tensor, int]:
        """The tokens of each window after the prompt, (windows, tokens), and how many there may be."""
        prompt = {"language": list(languages), "task": "transcribe"} if language_tokens(self.model) else {}
        longest_s = max(span.end_s - span.start_s for span in spans)
        # `max_length`, to which Whisper's generate adds the prompt: the checkpoint sets it too, and with `max_new_tokens`
        # transformers warns of the two at every call.
        limit = min(self.model.config.max_target_positions, _TOKENS_AT_LEAST + round(_TOKENS_PER_S * longest_s))
        tokens: torch.Tensor = self.model.generate(
            encoder_outputs=encoded,
            attention_mask=_whole_windows(encoded),
            num_beams=num_beams,
            max_length=limit,
            return_timestamps=False,
            **prompt,
        )
        return tokens, limit

    def _texts(self, tokens: torch.Tensor) -> list[str]:
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().rstrip("\ufffd").rstrip() for text in texts]  # \ufffd: a letter cut in the middle by the limit

    def _log_probabilities(
        self, encoded: BaseModelOutput, tokens: torch.Tensor, languages: Sequence[str], limit: int
    ) -> tuple[list[float], list[int]]:
        """Of each window's text and its end: the sum of the tokens' log probabilities, and their number. One pass of the decoder."""
        import torch

        config = self.model.generation_config
        ids = language_tokens(self.model)
        fixed = [config.task_to_id["transcribe"], config.no_timestamps_token_id]
        prompt = torch.tensor([[config.decoder_start_token_id, ids[code], *fixed] for code in languages], device=tokens.device)
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        ended = torch.cat([tokens, torch.full_like(tokens[:, :1], end)], 1)  # (windows, steps): `generate` takes the end off
        ended = ended[:, : min(limit, self.model.config.max_target_positions - prompt.shape[1])]
        with torch.no_grad():
            inputs = torch.cat([prompt, ended[:, :-1]], 1)
            logits = self.model(encoder_outputs=encoded, decoder_input_ids=inputs, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        found = logits.float().log_softmax(-1).gather(-1, ended[..., None])[..., 0]  # (windows, steps)
        is_text = (ended == end).cumsum(1) - (ended == end).long() == 0  # up to the first end, which is part of it
        return (found * is_text).sum(1).tolist(), is_text.sum(1).tolist()

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


def _piece(work: _Work, number: int, text: str, decision: Decision) -> _Piece:
    """What was written for a window, without an endless ending."""
    span, shortened = work.spans[number], _without_repetition(text)
    heard_alone = number in work.heard and len(work.heard) == len(work.spans)
    probabilities = work.heard[number].posterior.top(_NUM_SHOWN) if heard_alone else {}
    adapter = None if decision.adapter is None else decision.adapter.name
    segment = Segment(round(span.start_s, 2), round(span.end_s, 2), shortened, decision.language, adapter, probabilities)
    return _Piece(number, segment, shortened != text)


def _likelier(rivals: Sequence[Decision], scores: Sequence[float]) -> Decision:
    """The decision whose text is the likelier one, with its reason."""
    best, other = sorted(range(len(rivals)), key=lambda index: -scores[index])
    shown = [
        f"{language_name(rivals[index].language)} ({rivals[index].probability:.0%} heard, {scores[index]:.2f})" for index in (best, other)
    ]
    chosen = rivals[best]
    by = "the base model" if chosen.adapter is None else f"the adapter {chosen.adapter.name!r}"
    reason = (
        f"The language was uncertain, so the beginning was written in both: {shown[0]} is likelier than {shown[1]}, by mean log "
        f"probability per token; {by} writes."
    )
    warning = "The language is uncertain. If you know it, say so." + ("" if chosen.warning is None else f" {chosen.warning}")
    named = {each.language: score for each, score in zip(rivals, scores, strict=True)}
    return replace(chosen, reason=reason, warning=warning, scores=named)


def _heard_in_pieces(decision: Decision, seconds: dict[str, float], sure: bool, threshold: float) -> Decision:
    """The decision for one language of a recording with several, with its reason."""
    shares = ", ".join(f"{language_name(code)} {length:.1f} s" for code, length in sorted(seconds.items(), key=lambda item: -item[1]))
    warning = decision.warning
    if not sure:
        name = language_name(decision.language)
        warning = f"{name} is only a guess ({decision.probability:.0%}, the threshold is {threshold:.0%}); the base model wrote it."
    return replace(decision, reason=f"Each piece between pauses was listened to by itself: {shares}.", warning=warning)


def _transcript(written: Sequence[_Piece], num_spans: int, decision: Decision, facts: dict[str, Any]) -> Transcript:
    """The transcript of what was written."""
    segments = tuple(piece.segment for piece in written if piece.segment.text)
    warnings = [] if decision.warning is None else [decision.warning]
    if len(written) < num_spans:
        warnings.append(f"{num_spans - len(written)} of {num_spans} parts were left out: sound in which nobody speaks.")
    if any(piece.was_cut for piece in written):
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
        scores={} if decision.scores is None else dict(decision.scores),
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


def _parts(spans: Sequence[Span], batch_size: int) -> Iterator[Sequence[int]]:
    """Numbers of the windows to listen to until somebody speaks: at first about as much as the language is judged by, then in batches."""
    start = 0
    for _ in range(_LISTEN_ROUNDS):
        part: list[int] = []
        for number in range(start, min(start + _LISTEN_WINDOWS, len(spans))):
            if not part or sum(spans[other].end_s - spans[other].start_s for other in part) < _LISTEN_S:
                part.append(number)
        if not part:
            return
        yield part
        start += len(part)
    for first in range(start, len(spans), batch_size):
        yield range(first, min(first + batch_size, len(spans)))


def _output(states: torch.Tensor) -> BaseModelOutput:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


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
    fields = ("name", "language", "domain", "carrier", "peft_type", "base", "num_parameters", "num_bytes", "metrics", "touches_encoder")
    return {field: getattr(adapter, field) for field in fields}
