"""Why a recording was written the way it was, as one sentence and as data: made from a `Transcript`, and from nothing else.

The command line prints the sentence, the page shows it large, and every JSON carries the data under "decision". Figures are those that
the adapter's own file names; none is computed here. Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from whisper_moe.languages import language_name

if TYPE_CHECKING:
    from whisper_moe.registry import Fallback
    from whisper_moe.transcribe import Transcript

METHOD_NAMES = {
    "S2LORA": "S2-LoRA",
    "LORAMOE": "LoRA-MoE",
    "LORA": "LoRA",
    "RANDLORA": "RandLoRA",
    "VERA": "VeRA",
    "VBLORA": "VB-LoRA",
    "ADALORA": "AdaLoRA",
}
_NUM_ALTERNATIVES = 2  # languages that the sentence names besides
_MOST_RATE, _MOST_CLIPS, _MOST_LETTERS = 100, 999_999_999, 200  # as the registry takes them
_WORTH_NAMING = 0.005  # what would be written as 0 % is not named in it


# ---- figures as people read them -----------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """0.913 -> "91 %"; never "0 %" for something, nor "100 %" for less than all."""
    whole = round(100 * share)
    if share > 0 and whole == 0:
        return "< 1 %"
    if share < 1 and whole == 100:
        return "> 99 %"
    return f"{whole} %"


def size(num_bytes: int) -> str:
    """41300 -> "41 kB"."""
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f} MB"


def method(peft_type: str) -> str:
    """PEFT's name of a method as papers write it."""
    return METHOD_NAMES.get(peft_type, peft_type)


# ---- the decision as data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alternative:
    """Another language that was heard, and how probable it was."""

    language: str
    language_name: str
    probability: float


@dataclass(frozen=True)
class Measured:
    """Error rates of an adapter and of the base without it, as fractions; None where they were not measured.

    Args:
        wer_before, wer_after: Of words, without the adapter and with it.
        cer_before, cer_after: Of letters.
        clips: Recordings in the test set.
        test_set: Its name.
        normalizer: What was done to the texts before they were compared.
    """

    wer_before: float | None
    wer_after: float | None
    cer_before: float | None
    cer_after: float | None
    clips: int | None
    test_set: str | None
    normalizer: str | None


@dataclass(frozen=True)
class Part:
    """One language of a recording with several: for how long it is spoken, and who wrote it (None: the base model)."""

    language: str
    language_name: str
    seconds: float
    adapter: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a recording was written the way it was.

    Args:
        language: Code of the language; None if nobody speaks.
        language_name: Its English name; empty if nobody speaks.
        probability: Of that language; None if it was given, not detected.
        alternatives: The other languages that were heard, the most probable first.
        parts: The languages of a recording with several, the longest first; empty otherwise.
        allowed: Codes of the languages that could be heard, if there was a list; None: all.
        threshold: The probability below which no adapter is used, if it was given to `explain`.
        model: Name of the base model.
        adapter: Name of the adapter that wrote; None for the base model alone.
        method: How the adapter is made ("S2-LoRA").
        num_bytes: Its size on disk.
        num_parameters: Its trained numbers.
        source: Where it came from, for people; None if that is not known.
        carrier: Code of the language that the model is told instead, where Whisper has no token for the adapter's own.
        measured: How well the adapter did in a test; None if its file has no figures.
        fallback: Why no adapter wrote, as a word for programs; None if one did.
        reason: The same in a sentence, or why this adapter.
        sentence: All of it in one sentence.
    """

    language: str | None
    language_name: str
    probability: float | None
    alternatives: tuple[Alternative, ...]
    parts: tuple[Part, ...]
    allowed: tuple[str, ...] | None
    threshold: float | None
    model: str
    adapter: str | None
    method: str | None
    num_bytes: int | None
    num_parameters: int | None
    source: str | None
    carrier: str | None
    measured: Measured | None
    fallback: Fallback | None
    reason: str

    @property
    def sentence(self) -> str:
        """All of it in one sentence."""
        return "".join(text for _, text in phrases(self))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, the sentence first."""
        row = asdict(self)
        lists = {name: list(row[name]) for name in ("alternatives", "parts")}
        return {"sentence": self.sentence, **row, **lists, "allowed": None if self.allowed is None else list(self.allowed)}


def explain(transcript: Transcript, *, allowed: Collection[str] | None = None, threshold: float | None = None) -> Explanation:
    """Why a recording was written the way it was.

    Args:
        transcript: What came of it.
        allowed: The languages that it was to be heard among, if you gave a list.
        threshold: The threshold, if you want it named.
    """
    info = transcript.adapter_info or {}
    ranked = sorted(transcript.probabilities.items(), key=lambda item: -item[1])
    return Explanation(
        language=transcript.language,
        language_name=transcript.language_name,
        probability=transcript.probability,
        alternatives=tuple(Alternative(code, language_name(code), share) for code, share in ranked if code != transcript.language),
        parts=_parts(transcript),
        allowed=None if allowed is None else tuple(allowed),
        threshold=threshold,
        model=transcript.model,
        adapter=transcript.adapter,
        method=None if info.get("peft_type") is None else method(info["peft_type"]),
        num_bytes=info.get("num_bytes"),
        num_parameters=info.get("num_parameters"),
        source=info.get("source"),
        carrier=info.get("carrier"),
        measured=measured(info.get("metrics")),
        fallback=transcript.fallback,
        reason=transcript.reason,
    )


def measured(metrics: Mapping[str, Any] | None) -> Measured | None:
    """The figures in an adapter's `metrics`; None if it has none for itself."""
    metrics = metrics or {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    found = Measured(
        wer_before=_rate(before.get("wer")),
        wer_after=_rate(after.get("wer")),
        cer_before=_rate(before.get("cer")),
        cer_after=_rate(after.get("cer")),
        clips=_count(after.get("clips")),
        test_set=_words(metrics.get("test_set")),
        normalizer=_words(metrics.get("normalizer")),
    )
    return None if found.wer_after is None and found.cer_after is None else found


# A transcript may come from anywhere, and so may the file of the adapter in it: what is no figure is left out, as if not measured.


def _rate(value: Any) -> float | None:
    """An error rate, if it can be one; NaN, which no JSON may hold, compares as false."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST_RATE else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_CLIPS else None


def _words(value: Any) -> str | None:
    return value[:_MOST_LETTERS] if isinstance(value, str) else None


def _parts(transcript: Transcript) -> tuple[Part, ...]:
    """How long each language is spoken, where there are several."""
    seconds: dict[tuple[str, str | None], float] = {}
    for segment in transcript.segments:
        if segment.language is not None:
            writer = segment.language, segment.adapter
            seconds[writer] = seconds.get(writer, 0.0) + segment.end_s - segment.start_s
    if len({code for code, _ in seconds}) < 2:
        return ()
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return tuple(Part(code, language_name(code), round(length, 2), adapter) for (code, adapter), length in longest)


# ---- the decision as a sentence ------------------------------------------------------------------------------------------


def phrases(explanation: Explanation) -> list[tuple[str, str]]:
    """The sentence in pieces: ("heard" | "writer" | "", text). A page may set off those that are named."""
    if explanation.language is None:
        return [("heard", "Nobody speaks"), ("", " → "), ("writer", "nothing was written"), ("", ".")]
    if explanation.parts:
        return _phrases_of_parts(explanation)
    return [("heard", _heard(explanation)), ("", f"{_others(explanation)} → "), *_writer(explanation), ("", ".")]


def _phrases_of_parts(explanation: Explanation) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    for part in explanation.parts:
        said += [("", "; ")] if said else []
        said += [("heard", f"{part.language_name} {part.seconds:.1f} s"), ("", " → ")]
        if part.adapter is not None and part.adapter == explanation.adapter:
            said += _writer(explanation)
        else:
            said += _base(explanation) if part.adapter is None else [("writer", f"adapter {part.adapter}")]
    return [*said, ("", ".")]


def _heard(explanation: Explanation) -> str:
    if explanation.probability is None:
        return f"{explanation.language_name} (given, not detected)"
    return f"{explanation.language_name} {_in_words(explanation.probability)}"


def _in_words(share: float) -> str:
    """Beside a name a sign would compare the two."""
    return percent(share).replace("< ", "under ").replace("> ", "over ")


def _others(explanation: Explanation) -> str:
    worth = [each for each in explanation.alternatives if each.probability >= _WORTH_NAMING]
    named = [f"{each.language_name} {_in_words(each.probability)}" for each in worth[:_NUM_ALTERNATIVES]]
    if explanation.allowed is not None and explanation.probability is not None:
        named.append(f"{len(explanation.allowed)} allowed" if len(explanation.allowed) > 1 else "no other allowed")
    return f" ({', '.join(named)})" if named else ""


def _writer(explanation: Explanation) -> list[tuple[str, str]]:
    if explanation.adapter is None:
        return [*_base(explanation), ("", _why_base(explanation))]
    facts = [
        explanation.method,
        None if explanation.num_bytes is None else size(explanation.num_bytes),
        None if explanation.source is None else _origin(explanation.source),
        *([] if explanation.measured is None else _figures(explanation.measured, explanation.language)),
    ]
    return [("writer", f"adapter {explanation.adapter}"), ("", "".join(f", {fact}" for fact in facts if fact is not None))]


def _origin(source: str) -> str:
    """A source is a place, or says by itself how the adapter got here."""
    return source if source.startswith("shipped ") else f"from {source}"


def _base(explanation: Explanation) -> list[tuple[str, str]]:
    return [("writer", "the base model"), ("", f" {explanation.model}")]


def _why_base(explanation: Explanation) -> str:
    threshold = "" if explanation.threshold is None else f" of {percent(explanation.threshold)}"
    return {
        None: "",
        "asked-for-base": ", as you asked",
        "below-threshold": f": too unsure for an adapter, below the threshold{threshold}",
        "no-adapter": f": no adapter for {explanation.language_name} is at hand",
        "not-needed": f", which writes {explanation.language_name} itself",
        "no-speech": "",
    }[explanation.fallback]


def _figures(figures: Measured, language: str | None) -> list[str]:
    """The rate that fits the script, with the adapter and without it."""
    from whisper_moe.evaluate import SCRIPTS_WITHOUT_SPACES

    by_letters = figures.wer_after is None or (language in SCRIPTS_WITHOUT_SPACES and figures.cer_after is not None)
    name, before, after = ("CER", figures.cer_before, figures.cer_after) if by_letters else ("WER", figures.wer_before, figures.wer_after)
    if after is None:
        return []
    where = "" if figures.test_set is None else f" on {figures.test_set}"
    return [f"{name} {percent(after)}{where}"] + ([] if before is None else [f"{percent(before)} without it"])
