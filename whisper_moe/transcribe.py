"""The inference path: a recording in, a `Transcript` out.

Speech is found, the language is heard with adapters off, the registry chooses, and windows are written in batches, each by its adapter.
Everything that runs the model is in the engine (engine.py), which puts the windows of all who ask at the same time into common batches:
many recordings in many languages are written together, and each gets the text that it would get alone.

Every window is encoded once: what was listened to is written from the same encoder states, unless the chosen adapter changes the encoder.
Then the windows that were listened to (the first ones, once a recording) are encoded again, and no others.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from whisper_moe.audio import SAMPLE_RATE, AudioError, Source, Span, find_windows, load_audio
from whisper_moe.base_signature import base_parameters, base_signature
from whisper_moe.engine import MAX_ROWS, CheckAdapter, Engine, Heard, Row, UnusableError, Written, by_frames, is_noise
from whisper_moe.languages import LanguagePosterior, allowed_codes, language_code, language_name, language_tokens
from whisper_moe.registry import BASE, AdapterRegistry, Decision, Fallback, LanguageAdapter, LoadAdapter, check_fit
from whisper_moe.segments import find_segments, steady_languages

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_moe.gate_map import GateMap

OnProgress: TypeAlias = Callable[[float, str], None]
OnSegments: TypeAlias = "Callable[[list[Segment]], None]"
OnDone: TypeAlias = "Callable[[int, Transcript | Exception], None]"
Adapters: TypeAlias = "str | Path | Sequence[str | Path] | AdapterRegistry | None"
IfUnsure: TypeAlias = Literal["base", "two-best"]

MAX_DURATION_S = 4 * 3600.0
AT_ONCE = 32  # recordings that `transcribe_many` works on at the same time

_LISTEN_S, _LISTEN_WINDOWS = 20.0, 3  # of speech that the language is judged by: one long window, or several short ones
_LISTEN_ROUNDS = 4  # how often to listen to as much again if nobody speaks at the start; after that, a batch at a time
# Tokens a window may hold. Nobody speaks faster, even in scripts that take three tokens a letter; a model that is caught in a
# repetition would else fill the whole window with it.
_TOKENS_PER_S, _TOKENS_AT_LEAST = 40, 16
_CROP_S = 2.0  # to a multiple of this are windows cropped, so that those of one length can share a batch
_MAP_WINDOWS = 8  # that a map of gates holds the model for
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
        fallback: Why no adapter wrote, as a word for programs (`whisper_moe.registry.Fallback`); None if one did.
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
    fallback: Fallback | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        row = asdict(self)
        return row | {"segments": list(row["segments"]), "warnings": list(row["warnings"])}


# ---- the path ----------------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """One recording while it is worked on. Windows go by their number in `spans`."""

    samples: np.ndarray
    spans: Sequence[Span]
    num_beams: int
    batch_size: int
    tell: OnProgress
    show: OnSegments
    drop_noise: bool
    heard: dict[int, Heard] = field(default_factory=dict)
    features: dict[int, torch.Tensor] = field(default_factory=dict)  # (n_mels, frames) of windows that were listened to, some of them
    num_done: int = 0

    def speech(self) -> list[int]:
        """The windows that were listened to and in which somebody speaks."""
        return [number for number, heard in self.heard.items() if not is_noise(heard.posterior)]

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


class Transcriber:
    """A Whisper with its adapters, ready to write what it hears. Many threads may call it at once, and share its batches.

    Args:
        model: The bare base model. It is put into evaluation mode.
        processor: Its processor; window and features are read from it.
        registry: The adapters to choose from.
        name: What to call the model in transcripts.
        load: What puts adapters on the model that cannot lie side by side with others, as for `AdapterSwitch`.
        check: What looks an adapter over before it is laid beside others. With a `load` of your own and without it, adapters are used one
            at a time.
        max_rows: Windows in a batch, of all recordings together.
        graphs: Whether greedy decoding on an NVIDIA GPU replays recorded graphs.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        processor: WhisperProcessor,
        registry: AdapterRegistry | None = None,
        *,
        name: str = "whisper",
        load: LoadAdapter | None = None,
        check: CheckAdapter | None = None,
        max_rows: int = MAX_ROWS,
        graphs: bool = False,
    ) -> None:
        features = processor.feature_extractor
        if features.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"The model hears {features.sampling_rate} Hz; recordings are read at {SAMPLE_RATE} Hz.")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.window_s = features.n_samples / features.sampling_rate
        self.registry = AdapterRegistry()
        self._signature = base_signature(model)  # once: later the model's modules are the engine's
        self._is_cropping = bool(getattr(model.generation_config, "cropped_windows", False))
        self._description = _description(name, model)
        self.engine = Engine(model, load, check, max_rows=max_rows, graphs=graphs)
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
        check: CheckAdapter | None = None,
        max_rows: int = MAX_ROWS,
        graphs: bool = False,
    ) -> Transcriber:
        """Load a base model and its adapters.

        Args:
            model: A folder or a model id of the Hub ("openai/whisper-small"); None: the pocket Whisper that is shipped.
            adapters: A folder of adapters, or several; None: those shipped with the pocket, and none for another model.
            device: "cuda", "mps", "cpu"; "auto" takes the first that is there.
            dtype: "float16", "bfloat16", "float32"; "auto" is half precision on CUDA and single elsewhere.
            load, check: As for `Transcriber`; `hub_utils.load_adapter` and `hub_utils.check_adapter` for adapters of strangers.
            max_rows, graphs: As for `Transcriber`.
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
        processor = WhisperProcessor.from_pretrained(source)
        return cls(whisper, processor, registry, name=name, load=load, check=check, max_rows=max_rows, graphs=graphs)

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
        return self._description

    def add_adapter(self, adapter: str | Path | LanguageAdapter) -> LanguageAdapter:
        """Add an adapter, or the folder of one, if it was made for this base."""
        adapter = adapter if isinstance(adapter, LanguageAdapter) else LanguageAdapter.load(adapter)
        self.check_fit(adapter)
        return self.registry.add(adapter)

    def check_fit(self, adapter: LanguageAdapter) -> None:
        """Raise `WrongBaseError` if an adapter is known to have been made for another base. Does not touch the model."""
        check_fit(adapter, self.model, self._signature)

    def detect(
        self, audio: Source, *, allowed: Collection[str] | None = None, max_duration_s: float | None = MAX_DURATION_S
    ) -> LanguagePosterior | None:
        """The languages of a recording, as `transcribe` hears them, without writing anything down.

        Args:
            audio, allowed, max_duration_s: As for `transcribe`.

        Returns:
            Their probabilities, and that of nobody speaking; None if the recording is silent.

        Raises:
            AudioError: The recording cannot be used.
            ValueError: A language is unknown, or none is allowed.
        """
        allowed_codes(language_tokens(self.model) or {"en": -1}, allowed)
        samples = load_audio(audio, max_duration_s=max_duration_s)
        spans = find_windows(samples, self.window_s)
        if not spans:
            return None
        work = _Work(samples, spans, 1, _LISTEN_WINDOWS, _tell_nobody, _show_nobody, drop_noise=True)
        return self._listen(work, self.detectable_languages if allowed is None else allowed)

    def gate_map(self, audio: Source, adapter: str | LanguageAdapter, *, max_duration_s: float | None = MAX_DURATION_S) -> GateMap:
        """Which expert of a LoRA-MoE adapter helps when in a recording.

        Args:
            audio: As for `transcribe`.
            adapter: The adapter, or its name.
            max_duration_s: Refuse longer recordings; None: no limit.

        Raises:
            AudioError: The recording cannot be used, or nobody speaks in it.
            ValueError: The adapter is no LoRA-MoE, or cannot be used.
        """
        from whisper_moe.gate_map import GateMap

        adapter = adapter if isinstance(adapter, LanguageAdapter) else self.registry[adapter]
        samples = load_audio(audio, max_duration_s=max_duration_s)
        spans = find_windows(samples, self.window_s)
        if not spans:
            raise AudioError("The recording is silent, so no expert has anything to do in it.")
        features = self._features(samples, spans)  # as they are written
        try:
            maps = [self._gates_of(adapter, features, spans, numbers) for numbers in by_frames(features, _MAP_WINDOWS)]
        except UnusableError as unusable:
            raise unusable.error from None
        return GateMap.joined(maps)

    def _gates_of(
        self, adapter: LanguageAdapter, features: Sequence[torch.Tensor], spans: Sequence[Span], numbers: Sequence[int]
    ) -> GateMap:
        """The gates over a few windows of the same length; in between, others may use the model."""
        import torch

        from whisper_moe.gate_map import gate_map

        with self.engine.table(adapter) as found:
            if found is None:
                raise ValueError(f"The adapter {adapter.name!r} fits no table of languages, so its gates cannot be looked at.")
            table, name = found
            return gate_map(table, name, torch.stack([features[number] for number in numbers]), [spans[number] for number in numbers])

    def load(self, adapter: LanguageAdapter) -> None:
        """Put an adapter on the model before it is needed. Raises `ValueError` if that cannot be."""
        try:
            self.engine.check(adapter)
        except UnusableError as unusable:
            raise unusable.error from None

    def unload(self) -> None:
        """Take all adapters off the model, which is the bare base again until the next one is used."""
        self.engine.unload()

    def transcribe_many(
        self,
        recordings: Iterable[Source],
        *,
        at_once: int = AT_ONCE,
        on_done: Callable[[int, Transcript | Exception], None] | None = None,
        **options: Any,
    ) -> list[Transcript | Exception]:
        """Write down several recordings, in common batches whatever their languages are.

        Args:
            recordings: As `audio` of `transcribe`.
            at_once: How many are worked on at the same time.
            on_done: Called with the number of a recording, from 0, and its answer, as soon as that is there; in no particular order.
            options: Of `transcribe`, the same for all.

        Returns:
            For each recording its transcript, or the exception that it ended in: one that cannot be used does not end the others.
        """
        if at_once < 1:
            raise ValueError(f"at_once is at least 1; got {at_once}.")

        tell, is_over, free = options.pop("on_progress", None) or _tell_nobody, threading.Event(), threading.Semaphore(at_once)

        def tell_unless_over(share: float, what: str) -> None:
            if is_over.is_set():
                raise CancelledError
            tell(share, what)

        def answer(number: int, audio: Source) -> Transcript | Exception:
            try:
                done: Transcript | Exception = self.transcribe(audio, on_progress=tell_unless_over, **options)
            except Exception as error:
                done = error
            finally:
                free.release()
            if on_done is not None:
                on_done(number, done)
            return done

        pool, futures = ThreadPoolExecutor(at_once, thread_name_prefix="transcribe"), []
        try:
            for number, audio in enumerate(recordings):
                free.acquire()  # a recording is asked for when there is somebody to work on it
                futures.append(pool.submit(copy_context().run, answer, number, audio))
            return [future.result() for future in futures]
        finally:
            is_over.set()  # interrupted: what is under way ends at its next batch
            pool.shutdown(cancel_futures=True)

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
        on_segments: OnSegments | None = None,
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
            on_progress: Called with the share that is done (0 to 1) and what is being done, between batches. What it raises ends the
                work and comes out of here.
            on_segments: Called with the segments that were just written, as soon as they are. With `if_unsure="two-best"` or
                `switching` they need not come in order.

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
        work = _Work(samples, spans, num_beams, batch_size, tell, on_segments or _show_nobody, drop_noise=detecting)
        if not spans:
            tell(1.0, "Done")
            return _nothing(language, None, self._facts(None, samples, started))
        heard = None
        if detecting:
            tell(0.1, "Listening for the language")
            among = self.detectable_languages if allowed is None else allowed
            heard = self._listen_everywhere(work, among) if switching else self._listen(work, among)
            if is_noise(heard):
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

    def _features(self, samples: np.ndarray, spans: Sequence[Span]) -> list[torch.Tensor]:
        """Of each span (n_mels, frames): a whole window or, for a model that was trained on such, one cropped to the speech in it."""
        if not spans:
            return []
        waves = [samples[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
        extract = partial(self.processor.feature_extractor, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        if not self._is_cropping:
            return list(extract(waves).input_features)
        crop = round(_CROP_S * SAMPLE_RATE)
        lengths = [min(self.processor.feature_extractor.n_samples, crop * -(-len(wave) // crop)) for wave in waves]
        return [extract([wave], max_length=length).input_features[0] for wave, length in zip(waves, lengths, strict=True)]

    def _listen(self, work: _Work, allowed: Collection[str]) -> LanguagePosterior:
        """One posterior for the recording: of its first windows in which somebody speaks, weighted by their length."""
        for part in _parts(work.spans, work.batch_size):
            self._hear(work, part, allowed)
            speech = [number for number in part if not is_noise(work.heard[number].posterior)]
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
        features = self._features(work.samples, [work.spans[number] for number in numbers])
        num_free = _NUM_REMEMBERED - sum(heard.states is not None for heard in work.heard.values())
        work.heard |= zip(numbers, self.engine.hear(features, allowed=allowed, num_kept=num_free), strict=True)
        work.features |= list(zip(numbers, features, strict=True))[: _NUM_REMEMBERED - len(work.features)]
        work.tell(0.1, "Listening for the language")

    # ---- deciding ------------------------------------------------------------------------------------------------------

    def _decide_and_write(self, work: _Work, choose: _Choose, write: _Write, *, by_name: bool) -> tuple[Decision, list[_Piece]]:
        """Choose, for which an adapter may have to be fetched, and write.

        An adapter that was fetched and cannot be put on the model after all is withdrawn, and the choice made anew; the new decision
        carries the reason. If the adapter is at hand, or was asked for by its name, that is an error.
        """
        withdrawn: set[Path] = set()
        while True:
            decisions = choose()
            work.num_done = 0
            try:
                return write(decisions)
            except UnusableError as unusable:
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
        numbers = self._speech(work, sorted(work.heard))
        for first in {None if each.adapter is None else each.adapter.name: each for each in rivals}.values():
            same = [index for index, each in enumerate(rivals) if each.adapter == first.adapter]
            rows = [row for index in same for row in self._rows(work, numbers, rivals[index])]
            written = self.engine.write(rows, first.adapter, num_beams=work.num_beams, is_scored=True)
            for place, index in enumerate(same):
                own = written[place * len(numbers) : (place + 1) * len(numbers)]
                pieces = self._pieces(work, numbers, own, rivals[index])
                total = sum(each.log_probability for each in own)
                tried[index] = pieces, total / max(1, sum(each.num_scored for each in own))
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
            if not sure and adapter != BASE:
                decision = replace(decision, fallback="below-threshold")
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
        for start in range(0, len(numbers), work.batch_size):
            batch = numbers[start : start + work.batch_size]
            work.tell(0.15 + 0.85 * work.num_done / len(work.spans), f"Writing, {work.num_done} of {len(work.spans)} parts done")
            speech = self._speech(work, batch)
            written = self.engine.write(self._rows(work, speech, decision), decision.adapter, num_beams=work.num_beams)
            new = self._pieces(work, speech, written, decision)
            work.num_done += len(batch)
            pieces += new
            segments = [piece.segment for piece in new if piece.segment.text]
            if segments:
                work.show(segments)
        return pieces

    @staticmethod
    def _speech(work: _Work, numbers: Sequence[int]) -> list[int]:
        """Those of some windows of which it is not known that nobody speaks."""
        known = work.heard if work.drop_noise else {}
        return [number for number in numbers if number not in known or not is_noise(known[number].posterior)]

    def _rows(self, work: _Work, numbers: Sequence[int], decision: Decision) -> list[Row]:
        """Windows, ready to be written."""
        if not numbers:
            return []
        new = [number for number in numbers if number not in work.features]
        features = work.features | dict(zip(new, self._features(work.samples, [work.spans[number] for number in new]), strict=True))
        rows = []
        for number in numbers:
            span, heard = work.spans[number], work.heard.get(number)
            limit = min(self.model.config.max_target_positions, _TOKENS_AT_LEAST + round(_TOKENS_PER_S * (span.end_s - span.start_s)))
            states = None if heard is None else heard.states
            drop_noise = work.drop_noise and heard is None
            rows.append(Row(features[number], decision.prompt_language, limit, states, drop_noise))
        return rows

    def _pieces(self, work: _Work, numbers: Sequence[int], written: Sequence[Written], decision: Decision) -> list[_Piece]:
        """What was written for some windows, as text."""
        spoken = [(number, each.tokens) for number, each in zip(numbers, written, strict=True) if each.tokens is not None]
        if not spoken:
            return []
        texts = self.processor.tokenizer.batch_decode([tokens for _, tokens in spoken], skip_special_tokens=True)
        # \ufffd: a letter cut in the middle by the limit
        cleaned = [text.strip().rstrip("\ufffd").rstrip() for text in texts]
        return [_piece(work, number, text, decision) for (number, _), text in zip(spoken, cleaned, strict=True)]

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
        fallback=decision.fallback,
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
        fallback="no-speech",
        **facts,
    )


# ---- small parts -------------------------------------------------------------------------------------------------------


def _tell_nobody(share: float, what: str) -> None:
    """Progress that nobody asked for."""


def _show_nobody(segments: list[Segment]) -> None:
    """Segments that nobody asked for."""


def _description(name: str, model: Any) -> str:
    millions = sum(parameter.numel() for parameter in base_parameters(model).values()) / 1e6
    precision = str(model.dtype).removeprefix("torch.")
    return f"{name}, {millions:.3g} million parameters, {precision} on {model.device.type}"


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


_REPETITION = re.compile(r"(.{1,80}?)\1{6,}(?=(.{0,80})$)", re.DOTALL)


def _without_repetition(text: str) -> str:
    """The text without an ending in which the same words come again and again: a decoder caught in a loop, not speech."""
    found = _REPETITION.search(text)
    if found is None or not found.group(1).startswith(found.group(2)) or len(found.group(0)) < 24:
        return text
    return (text[: found.start()] + found.group(1)).strip()


def _info(adapter: LanguageAdapter) -> dict[str, Any]:
    fields = (
        "name",
        "language",
        "domain",
        "carrier",
        "peft_type",
        "base",
        "num_parameters",
        "num_bytes",
        "metrics",
        "touches_encoder",
        "source",
    )
    return {field: getattr(adapter, field, None) for field in fields}
