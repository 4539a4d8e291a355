"""Word and character error rates, and the one place where text is normalised before it is compared.

Knows models only as something that generates; chooses no adapter: what is active when `evaluate_clips` is called is what is
measured. How sure a rate is: `intervals`. Several adapters on several sets: `comparison`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import jiwer
import numpy as np
import torch

from whisper_moe.audio import SAMPLE_RATE, find_windows
from whisper_moe.data import Clips, extract_features, window_s

if TYPE_CHECKING:
    from transformers import WhisperProcessor

Normalizer = Literal["mark-preserving", "whisper-basic"]
NORMALIZERS: tuple[Normalizer, ...] = ("mark-preserving", "whisper-basic")

SCRIPTS_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "km", "my", "yue"})
"""Languages scored by characters, spaces left out: their words are not set apart in writing."""

_APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u00b4\u0060\u2032\uff07\u055a\u05f3"), "'")


# ---- text ------------------------------------------------------------------------------------------------------------------


def normalize(text: str, kind: str = "mark-preserving") -> str:
    """Text as it is compared.

    Args:
        text: a transcript.
        kind: `"mark-preserving"` (default): NFKC, lower case, letters with their marks, digits, and apostrophes inside words;
            all else is a space. `"whisper-basic"`: Whisper's own normaliser for languages other than English, which also
            strips combining marks: it shatters Hindi or Thai words, so use it only to compare with published figures.
    """
    if kind == "mark-preserving":
        return _keep_letters_and_marks(text)
    if kind == "whisper-basic":
        return " ".join(_whisper_basic()(text).split())
    raise ValueError(f"Unknown normalizer {kind!r}. Known: {', '.join(NORMALIZERS)}.")


def _keep_letters_and_marks(text: str) -> str:
    text = "".join(char for char in text.translate(_APOSTROPHES) if unicodedata.category(char) != "Cf")  # soft hyphens, joiners
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(char if unicodedata.category(char)[0] in "LMN" or char == "'" else " " for char in text)
    return " ".join(filter(None, (word.strip("'") for word in kept.split())))


@cache
def _whisper_basic() -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


# ---- scores ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Error rates of a set as fractions, with the counts behind them. WER may exceed 1: inserted words count too."""

    wer: float
    cer: float
    num_clips: int
    num_words: int
    """Words of the references."""
    num_chars: int
    """Characters of the references; spaces between words count, except in scripts without spaces."""
    substitutions: int
    """Of words, as `deletions` and `insertions`."""
    deletions: int
    insertions: int
    normalizer: str
    headline: str
    """`"wer"`, or `"cer"` for a script without spaces."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"WER {self.wer:.1%}, CER {self.cer:.1%} ({self.num_clips:,} clips)"


def score(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "mark-preserving", *, language: str | None = None
) -> Scores:
    """Compare transcripts with what was said, clip by clip.

    Args:
        references, hypotheses: one text per clip, in the same order. An empty reference counts what was written as inserted.
        normalizer: see `normalize`.
        language: Whisper's code; decides whether spaces count in CER, and which rate is the headline.
    """
    return count_errors(references, hypotheses, normalizer, language=language).scores


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of each clip, for `intervals`; arrays are (clips,)."""

    word_errors: np.ndarray
    words: np.ndarray
    """Of the references."""
    char_errors: np.ndarray
    chars: np.ndarray
    scores: Scores
    """Of all clips together."""


def count_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "mark-preserving", *, language: str | None = None
) -> ErrorCounts:
    """`score`, with the errors of each clip."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses: there must be one of each per clip.")
    said = [normalize(text, normalizer) for text in references]
    written = [normalize(text, normalizer) for text in hypotheses]
    if not any(said):
        raise ValueError("No reference has a word in it, so an error rate is undefined. Check the transcripts' column.")
    words = jiwer.process_words(said, written)
    spaceless = language in SCRIPTS_WITHOUT_SPACES
    if spaceless:
        said, written = [text.replace(" ", "") for text in said], [text.replace(" ", "") for text in written]
    characters = jiwer.process_characters(said, written)
    return ErrorCounts(
        *_per_clip(words),
        *_per_clip(characters),
        Scores(
            wer=words.wer,
            cer=characters.cer,
            num_clips=len(said),
            num_words=words.hits + words.substitutions + words.deletions,
            num_chars=characters.hits + characters.substitutions + characters.deletions,
            substitutions=words.substitutions,
            deletions=words.deletions,
            insertions=words.insertions,
            normalizer=normalizer,
            headline="cer" if spaceless else "wer",
        ),
    )


def _per_clip(output: Any) -> tuple[np.ndarray, np.ndarray]:
    """(clips,) errors and (clips,) lengths of the references, from jiwer's alignments."""
    errors = [
        sum(max(part.ref_end_idx - part.ref_start_idx, part.hyp_end_idx - part.hyp_start_idx) for part in clip if part.type != "equal")
        for clip in output.alignments
    ]
    return np.array(errors, np.int64), np.array([len(reference) for reference in output.references], np.int64)


def show_errors(reference: str, hypothesis: str, normalizer: str = "mark-preserving", *, language: str | None = None) -> str:
    """The two texts in one line: `[-said-]` was left out, `{+written+}` was not said, both together are a wrong word.

    Normalised, and by characters in scripts without spaces.
    """
    said, written = normalize(reference, normalizer), normalize(hypothesis, normalizer)
    if language in SCRIPTS_WITHOUT_SPACES:
        output = jiwer.process_characters(said.replace(" ", ""), written.replace(" ", ""))
        glue = ""
    else:
        output = jiwer.process_words(said, written)
        glue = " "
    shown = []
    for part in output.alignments[0]:
        left = glue.join(output.references[0][part.ref_start_idx : part.ref_end_idx])
        right = glue.join(output.hypotheses[0][part.hyp_start_idx : part.hyp_end_idx])
        shown.append(left if part.type == "equal" else (f"[-{left}-]" if left else "") + (f"{{+{right}+}}" if right else ""))
    return glue.join(shown)


# ---- a model over clips ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a model wrote for each clip, and its scores."""

    hypotheses: list[str]
    references: list[str]
    scores: Scores


def evaluate_clips(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    *,
    prompt_language: str,
    language: str | None = None,
    normalizer: str = "mark-preserving",
    batch_size: int = 16,
    num_beams: int = 1,
    precision: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Transcribe clips with the model as it is, adapters included, and score the result.

    Args:
        model: a Whisper, or a `PeftModel` over one.
        prompt_language: the language token to prompt with (an adapter's carrier, where it has one).
        language: the clips' language if it is another; decides the headline of the scores.
        batch_size: windows at a time; a clip longer than the window is cut at quiet places into several.
        precision: of the encoder, see `uses_bf16`; the decoder computes in the model's own.
    """
    hypotheses = transcribe_clips(
        model,
        processor,
        clips,
        prompt_language=prompt_language,
        batch_size=batch_size,
        num_beams=num_beams,
        precision=precision,
        progress=progress,
    )
    scores = score(clips.texts, hypotheses, normalizer, language=prompt_language if language is None else language)
    return Evaluation(hypotheses, clips.texts, scores)


def transcribe_clips(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    *,
    prompt_language: str,
    batch_size: int = 16,
    num_beams: int = 1,
    precision: str = "auto",
    progress: bool = False,
) -> list[str]:
    """What the model writes for each clip, without comparing it with anything. Arguments as in `evaluate_clips`."""
    waves, owners = clip_windows(clips, window_s(processor))
    order = sorted(range(len(waves)), key=lambda row: len(waves[row]))  # clips of similar length end at similar steps
    starts: Any = range(0, len(order), batch_size)
    if progress:
        from transformers.utils import logging

        starts = logging.tqdm(starts, desc=f"evaluating {clips.name}", leave=False)
    texts = [""] * len(waves)
    with evaluating(model):
        for start in starts:
            rows = order[start : start + batch_size]
            encoded = encode(model, extract_features(processor, [waves[row] for row in rows]), precision)
            for row, text in zip(rows, write_down(model, processor, encoded, prompt_language, num_beams), strict=True):
                texts[row] = text
    hypotheses = [""] * len(clips)
    for owner, text in zip(owners, texts, strict=True):
        hypotheses[owner] = f"{hypotheses[owner]} {text}".strip()
    return hypotheses


def clip_windows(clips: Clips, longest_s: float) -> tuple[list[np.ndarray], list[int]]:
    """The clips' samples, each at most `longest_s` long, and for each the index of its clip."""
    waves, owners = [], []
    for index, clip in enumerate(clips.clips):
        samples = clips[index]["audio"]
        if clip.duration_s <= longest_s:
            pieces = [samples]
        else:
            spans = find_windows(samples, longest_s)
            pieces = [samples[int(span.start_s * SAMPLE_RATE) : int(span.end_s * SAMPLE_RATE)] for span in spans]
        waves += pieces
        owners += [index] * len(pieces)
    return waves, owners


@torch.inference_mode()
def encode(model: Any, features: torch.Tensor, precision: str = "auto") -> Any:
    """The encoder's output for whole windows, in the model's dtype; last_hidden_state is (batch, positions, d_model)."""
    device, dtype = model.device, model.dtype
    with autocast(device.type, precision):
        encoded = model.get_encoder()(features.to(device, dtype))
    encoded.last_hidden_state = encoded.last_hidden_state.to(dtype)
    return encoded


@torch.inference_mode()
def write_down(model: Any, processor: WhisperProcessor, encoded: Any, prompt_language: str, num_beams: int = 1) -> list[str]:
    """What `encode` returned, as text without special tokens, one per row. Greedy, or a search with `num_beams`."""
    tokens = model.generate(
        encoder_outputs=encoded,
        language=prompt_language,
        task="transcribe",
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,  # training switches the config's own value off
    )
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def autocast(device_type: str, precision: str = "auto") -> AbstractContextManager[Any]:
    """Half-precision products where the machine is faster with them: `"bf16"`, `"fp32"`, or `"auto"`, which looks."""
    return torch.autocast(device_type, torch.bfloat16) if uses_bf16(device_type, precision) else nullcontext()


def uses_bf16(device_type: str, precision: str = "auto") -> bool:
    """What `"auto"` means here: bf16 on a CPU with AVX512-BF16 and on a GPU that has it."""
    if precision in ("bf16", "fp32"):
        return precision == "bf16"
    if precision != "auto":
        raise ValueError(f"Unknown precision {precision!r}. Known: auto, bf16, fp32.")
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
