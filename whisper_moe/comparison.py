"""Several adapters on several sets, side by side with the base: rates with intervals, paired significance, and old languages' outputs.

The main path is `evaluate_adapters`; what it returns writes itself as JSON, Markdown and a figure. Adapters are switched, never merged: the
base is borrowed and leaves as it came. "Old languages" are those the base (or an earlier adapter) served before: for them not error
rates are compared but bits, of the weights, the encoder's output, the decoder's scores and the text.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whisper_moe.base_signature import base_parameters
from whisper_moe.data import Clips, extract_features, label_ids, window_s
from whisper_moe.evaluate import (
    NORMALIZERS,
    ErrorCounts,
    autocast,
    clip_windows,
    count_errors,
    encode,
    evaluate_clips,
    evaluating,
    normalize,
    show_errors,
    write_down,
)
from whisper_moe.intervals import Interval, bootstrap_rate, holm, paired_difference
from whisper_moe.languages import LanguagePosterior, language_code, language_name, language_posterior, language_tokens
from whisper_moe.registry import AdapterSwitch, LanguageAdapter, LoadAdapter, check_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

BASE_NAME = "base"
FORMAT = 1  # of evaluation.json
FILES = {"json": "evaluation.json", "markdown": "evaluation.md", "figure": "evaluation.png", "transcripts": "transcripts.jsonl"}


# ---- what is asked ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalSet:
    """Clips of one language to be written by the base and by every adapter for that language."""

    clips: Clips
    language: str
    carrier: str | None = None
    """The base's prompt for a language without a token; by default the first adapter's carrier, else what is heard most."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "language", language_code(self.language))


@dataclass(frozen=True)
class OldLanguage:
    """Clips of a language that was served before, by the base alone or by an adapter; its outputs must stay the same bits."""

    clips: Clips
    language: str
    adapter: LanguageAdapter | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "language", language_code(self.language))


# ---- what is answered ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Error rates of one system on one set under one normaliser."""

    wer: Interval
    cer: Interval
    substitutions: int
    deletions: int
    insertions: int
    num_words: int
    num_chars: int
    headline: str


@dataclass(frozen=True)
class SystemResult:
    """What the base or an adapter wrote for a set."""

    name: str
    prompt_language: str
    rates: dict[str, Rates]
    """Normaliser -> rates."""
    hypotheses: list[str]
    seconds: float


@dataclass(frozen=True)
class PairedResult:
    """Whether `better` makes fewer errors than `than`, on the same clips."""

    better: str
    than: str
    rate: str
    difference: float
    """Rate of `than` less rate of `better`: positive where the first is indeed better."""
    low: float | None
    high: float | None
    p_value: float
    p_adjusted: float
    """After Holm, over all pairs of the set."""
    exact: bool
    unit: str


@dataclass(frozen=True)
class SetResult:
    """Everything about one set."""

    name: str
    language: str
    num_clips: int
    hours: float
    left_out: str
    references: list[str]
    systems: list[SystemResult]
    comparisons: list[PairedResult]
    samples: list[dict[str, str]]
    """Clips with every system's errors marked: `{"which", "reference", <system>: ...}`."""


@dataclass(frozen=True)
class Fingerprint:
    """Digests of all that a model says to some clips, and the texts themselves."""

    weights: str
    encoder: str
    logits: str
    texts: list[str]

    def differing(self, other: Fingerprint) -> list[str]:
        """Names of the parts that are not the same, bit for bit."""
        return [name for name in ("weights", "encoder", "logits", "texts") if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class OldResult:
    """An old language before and after an adapter was attached and used."""

    name: str
    language: str
    served_by: str
    after: str
    """The adapter that was attached meanwhile."""
    num_clips: int
    differing: list[str]
    """Empty: identical to the last bit."""
    wer: float
    digest: str


@dataclass
class Comparison:
    """The results of `evaluate_adapters`, complete or, if it was cut off, as far as they go."""

    model: str
    settings: dict[str, Any]
    sets: list[SetResult] = field(default_factory=list)
    old_languages: list[OldResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Sets that could not be measured, and why."""

    @property
    def old_languages_unchanged(self) -> bool:
        """Whether every bit of every old language was the same; also true if none was asked for."""
        return not any(result.differing for result in self.old_languages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The texts are not in it: see `transcripts.jsonl`."""
        row = {"format": FORMAT} | asdict(self)
        for result in row["sets"]:
            del result["references"]
            for system in result["systems"]:
                del system["hypotheses"]
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft", "jiwer")}}
        return row | {"old_languages_unchanged": self.old_languages_unchanged, "versions": versions, "date": date.today().isoformat()}

    def to_markdown(self) -> str:
        """Tables for people."""
        return _markdown(self)

    def figure(self) -> Figure:
        """Error rates with their intervals, a row for each system."""
        return _figure(self)

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json`, `.md`, `.png` and `transcripts.jsonl`. Each file is replaced in one step or left as it was."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"set": result.name, "clip": at, "reference": text} | {system.name: system.hypotheses[at] for system in result.systems}
            for result in self.sets
            for at, text in enumerate(result.references)
        ]
        texts = {
            "json": json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n",
            "transcripts": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            "markdown": self.to_markdown(),
        }
        for kind, text in texts.items():
            with _replaced(folder / FILES[kind]) as path:
                path.write_text(text, "utf-8")
        if self.sets:
            with _replaced(folder / FILES["figure"]) as path:
                self.figure().savefig(path, format="png", dpi=150)
        return folder


# ---- the main path ---------------------------------------------------------------------------------------------------------


def evaluate_adapters(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    sets: Sequence[EvalSet],
    adapters: Sequence[LanguageAdapter] = (),
    *,
    old_languages: Sequence[OldLanguage] = (),
    with_base: bool = True,
    normalizers: Sequence[str] = NORMALIZERS,
    batch_size: int = 16,
    num_beams: int = 1,
    precision: str = "auto",
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    num_samples: int = 3,
    name: str = "whisper",
    save_to: str | Path | None = None,
    progress: bool = False,
    on_set: Callable[[SetResult], None] | None = None,
    load: LoadAdapter | None = None,
) -> Comparison:
    """Measure the base and adapters on sets, and check that old languages are what they were.

    Args:
        model, processor: a bare Whisper; it leaves as it came.
        sets: what to write. Each is written by the base and by the adapters of its language.
        adapters: what to compare. All must fit the base, which is checked first.
        old_languages: what must not change. Their outputs are taken before anything is attached, and again after each adapter.
        with_base: measure the base as well.
        normalizers: the first one decides comparisons and the figure, the others stand beside it.
        batch_size, num_beams, precision: as in `evaluate_clips`.
        level, num_resamples, seed: of the intervals and tests.
        num_samples: clips shown with their errors marked.
        name: what to call the base model.
        save_to: a folder that is brought up to date after each set, so that a run that is cut off has lost nothing. If it cannot be
            written (a full disk), a warning says so and the results are still returned: save them elsewhere.
        progress: show progress bars.
        on_set: called with each set's result.
        load: what puts adapters on the model, as for `AdapterSwitch`.

    Raises:
        ValueError: An adapter does not fit the base, or has no set.
    """
    adapters = list(adapters)
    _check_request(model, sets, adapters, old_languages, with_base, normalizers)
    settings = {"normalizers": list(normalizers), "level": level, "num_resamples": num_resamples, "seed": seed}
    settings |= {"batch_size": batch_size, "num_beams": num_beams, "precision": precision}
    evaluation = Comparison(name, settings)
    switch = AdapterSwitch(model, load)
    options: dict[str, Any] = {"batch_size": batch_size, "num_beams": num_beams, "precision": precision}

    def run(measured: EvalSet) -> SetResult:
        """One set under every system."""
        carrier = _base_prompt(model, processor, measured, adapters, batch_size)
        systems: list[tuple[str, LanguageAdapter | None, str]] = [(BASE_NAME, None, carrier)] if with_base else []
        systems += [(each.name, each, each.prompt_language) for each in adapters if each.language == measured.language]
        results, counts = [], []
        for system, adapter, prompt in systems:
            started = time.monotonic()
            with switch.active(adapter) as active:
                written = evaluate_clips(
                    active, processor, measured.clips, prompt_language=prompt, language=measured.language, progress=progress, **options
                ).hypotheses
            seconds = round(time.monotonic() - started, 2)
            counted = {
                kind: count_errors(measured.clips.texts, written, kind, language=measured.language) for kind in normalizers
            }  # the texts are normalised twice for the two of them: it costs milliseconds
            speakers = [clip.speaker for clip in measured.clips.clips]
            rates = {kind: _rates(count, speakers, level, num_resamples, seed) for kind, count in counted.items()}
            results.append(SystemResult(system, prompt, rates, written, seconds))
            counts.append(counted[normalizers[0]])
        pairs = _compare(results, counts, [clip.speaker for clip in measured.clips.clips], level, num_resamples, seed)
        return SetResult(
            measured.clips.name,
            measured.language,
            len(measured.clips),
            round(measured.clips.hours, 3),
            str(measured.clips.report),
            measured.clips.texts,
            results,
            pairs,
            _samples(measured, results, counts, normalizers[0], num_samples),
        )

    try:
        before = [_outputs(switch, processor, old, options) for old in old_languages]
        for measured in sets:
            try:
                result = run(measured)
            except ValueError as error:
                evaluation.problems.append(f"{measured.clips.name}: {error}")
                continue
            evaluation.sets.append(result)
            if on_set is not None:
                on_set(result)
            _save_meanwhile(evaluation, save_to)
        for adapter in adapters if old_languages else ():
            with switch.active(adapter):
                pass  # attached and used once; what follows is said with it switched off again
            for old, earlier in zip(old_languages, before, strict=True):
                evaluation.old_languages.append(_compare_outputs(old, adapter, earlier, _outputs(switch, processor, old, options)))
            _save_meanwhile(evaluation, save_to)
    finally:
        switch.unload()
    _save_meanwhile(evaluation, save_to)
    return evaluation


def _check_request(
    model: Any,
    sets: Sequence[EvalSet],
    adapters: Sequence[LanguageAdapter],
    old_languages: Sequence[OldLanguage],
    with_base: bool,
    normalizers: Sequence[str],
) -> None:
    if not normalizers:
        raise ValueError(f"Name at least one normalizer. Known: {', '.join(NORMALIZERS)}.")
    for kind in normalizers:
        normalize("", kind)  # refuses what it does not know
    if not sets and not old_languages:
        raise ValueError("There is nothing to evaluate: give a set, or an old language.")
    names = [each.name for each in adapters]
    if repeated := sorted({each for each in names if names.count(each) > 1 or each == BASE_NAME}):
        raise ValueError(
            f"Adapters to compare need different names, and none is called {BASE_NAME!r}; got {', '.join(repeated)} more than once."
        )
    written = {each.language for each in sets}
    for adapter in [*adapters, *(old.adapter for old in old_languages if old.adapter is not None)]:
        check_fit(adapter, model)
    for adapter in adapters:
        if sets and adapter.language not in written:
            raise ValueError(
                f"The adapter {adapter.name!r} writes {language_name(adapter.language)} ({adapter.language}); there is no set of that "
                f"language, only of {', '.join(sorted(written))}. Add one, or leave the adapter out."
            )
    for each in sets:
        if not with_base and not any(adapter.language == each.language for adapter in adapters):
            raise ValueError(f"Nobody is to write {each.clips.name}: no adapter for {each.language}, and the base is left out.")
    set_names = [each.clips.name for each in sets]
    if repeated := sorted({each for each in set_names if set_names.count(each) > 1}):
        raise ValueError(f"Two sets have the name {', '.join(repeated)}. Give them names of their own: load_clips(..., name=...).")


def _base_prompt(
    model: Any, processor: WhisperProcessor, measured: EvalSet, adapters: Sequence[LanguageAdapter], batch_size: int, num_heard: int = 32
) -> str:
    """The token under which the base writes a set."""
    tokens = language_tokens(model)
    if not tokens or measured.language in tokens:
        return measured.language
    if measured.carrier is not None:
        carrier = language_code(measured.carrier)
        if carrier not in tokens:
            raise ValueError(f"The carrier {carrier!r} has no token in this Whisper. Choose among: {', '.join(sorted(tokens))}.")
        return carrier
    for adapter in adapters:
        if adapter.language == measured.language and adapter.carrier is not None:
            return adapter.carrier
    posteriors: list[LanguagePosterior] = []
    for start in range(0, min(num_heard, len(measured.clips)), batch_size):
        stop = min(start + batch_size, num_heard, len(measured.clips))
        waves = [measured.clips[row]["audio"] for row in range(start, stop)]
        posteriors += language_posterior(model, extract_features(processor, waves))
    return LanguagePosterior.mean(posteriors, [1.0] * len(posteriors)).best[0]


def _rates(counts: ErrorCounts, speakers: list[str | None], level: float, num_resamples: int, seed: int) -> Rates:
    drawn: dict[str, Any] = {"level": level, "num_resamples": num_resamples, "seed": seed}
    scores = counts.scores
    return Rates(
        bootstrap_rate(counts.word_errors, counts.words, speakers, **drawn),
        bootstrap_rate(counts.char_errors, counts.chars, speakers, **drawn),
        scores.substitutions,
        scores.deletions,
        scores.insertions,
        scores.num_words,
        scores.num_chars,
        scores.headline,
    )


def _compare(
    results: Sequence[SystemResult],
    counts: Sequence[ErrorCounts],
    speakers: list[str | None],
    level: float,
    num_resamples: int,
    seed: int,
) -> list[PairedResult]:
    """Every pair of systems, the one with fewer errors named first."""
    found = []
    for first, second in combinations(range(len(results)), 2):
        rate = counts[first].scores.headline
        errors = [counts[at].word_errors if rate == "wer" else counts[at].char_errors for at in (first, second)]
        worse, better = (first, second) if errors[0].sum() >= errors[1].sum() else (second, first)
        worse_errors, better_errors = errors if worse == first else reversed(errors)
        lengths = counts[first].words if rate == "wer" else counts[first].chars
        difference = paired_difference(worse_errors, better_errors, lengths, speakers, level=level, num_resamples=num_resamples, seed=seed)
        found.append((results[better].name, results[worse].name, rate, difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    return [
        PairedResult(better, than, rate, d.value, d.low, d.high, d.p_value, p_adjusted, d.exact, d.unit)
        for (better, than, rate, d), p_adjusted in zip(found, adjusted, strict=True)
    ]


def _samples(
    measured: EvalSet, results: Sequence[SystemResult], counts: Sequence[ErrorCounts], normalizer: str, number: int
) -> list[dict[str, str]]:
    """Clips to look at, from the best to the worst of the last system: quantiles, so that nobody picks the nice ones."""
    if not results or number < 1:
        return []
    last = counts[-1]
    order = sorted(range(len(measured.clips)), key=lambda at: (last.char_errors[at] / max(1, last.chars[at]), at))
    places = {round(step * (len(order) - 1) / max(1, number - 1)): step for step in range(number)} if number > 1 else {len(order) // 2: 0}
    rows = []
    for place in places:
        at = order[place]
        share = place / max(1, len(order) - 1)
        row = {
            "which": "best" if share == 0 else "worst" if share == 1 else f"{share:.0%} are better",
            "reference": measured.clips.texts[at],
        }
        for system in results:
            row[system.name] = show_errors(measured.clips.texts[at], system.hypotheses[at], normalizer, language=measured.language)
        rows.append(row)
    return rows


# ---- old languages ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def fingerprint(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    *,
    prompt_language: str,
    batch_size: int = 16,
    num_beams: int = 1,
    precision: str = "auto",
) -> Fingerprint:
    """All that the model, as it is, says to some clips: digests of base weights, encoder states and teacher-forced logits, and the texts.

    Two fingerprints may be compared if batches, threads and machine were the same: other shapes round otherwise.
    """
    digests = {part: hashlib.sha256() for part in ("weights", "encoder", "logits")}
    for name, weight in sorted(base_parameters(model).items()):
        digests["weights"].update(name.encode())
        _update(digests["weights"], weight)
    waves, owners = clip_windows(clips, window_s(processor))
    texts = [""] * len(clips)
    start_token, longest = model.config.decoder_start_token_id, model.config.max_target_positions
    with evaluating(model):
        for start in range(0, len(waves), batch_size):
            rows = range(start, min(start + batch_size, len(waves)))
            encoded = encode(model, extract_features(processor, [waves[row] for row in rows]), precision)
            _update(digests["encoder"], encoded.last_hidden_state)
            labels = [[start_token, *label_ids(processor, clips.texts[owners[row]], prompt_language)][:longest] for row in rows]
            width = max(map(len, labels))
            padded = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in labels], device=model.device)
            with autocast(model.device.type, precision):
                _update(digests["logits"], model(encoder_outputs=encoded, decoder_input_ids=padded, use_cache=False).logits)
            for row, text in zip(rows, write_down(model, processor, encoded, prompt_language, num_beams), strict=True):
                texts[owners[row]] = f"{texts[owners[row]]} {text}".strip()
    return Fingerprint(digests["weights"].hexdigest(), digests["encoder"].hexdigest(), digests["logits"].hexdigest(), texts)


def _update(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _outputs(switch: AdapterSwitch, processor: WhisperProcessor, old: OldLanguage, options: dict[str, Any]) -> Fingerprint:
    prompt = old.language if old.adapter is None else old.adapter.prompt_language
    with switch.active(old.adapter) as active:
        return fingerprint(active, processor, old.clips, prompt_language=prompt, **options)


def _compare_outputs(old: OldLanguage, adapter: LanguageAdapter, before: Fingerprint, after: Fingerprint) -> OldResult:
    wer = count_errors(old.clips.texts, after.texts, language=old.language).scores.wer
    served_by = BASE_NAME if old.adapter is None else old.adapter.name
    digest = hashlib.sha256("".join([after.encoder, after.logits, *after.texts]).encode()).hexdigest()[:16]
    return OldResult(old.clips.name, old.language, served_by, adapter.name, len(old.clips), before.differing(after), wer, digest)


# ---- written down ----------------------------------------------------------------------------------------------------------


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A new file that takes the old one's place when it is whole; if writing fails (a full disk), the old one stays."""
    unfinished = path.with_name(f"{path.name}.new")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _save_meanwhile(evaluation: Comparison, folder: str | Path | None) -> None:
    """Save what is there; a full disk does not stop the measuring, and costs no figures."""
    if folder is not None:
        try:
            evaluation.save(folder)
        except OSError as error:
            warnings.warn(
                f"The results so far could not be written to {folder}: {error}. Going on; make room before the end.", stacklevel=3
            )


def _markdown(evaluation: Comparison) -> str:
    level = evaluation.settings["level"]
    lines = [f"# Evaluation of {evaluation.model}", ""]
    normalizers = evaluation.settings["normalizers"]
    lines += [
        f"Text normalised by `{normalizers[0]}`" + (f", beside it `{'`, `'.join(normalizers[1:])}`" if normalizers[1:] else "") + ". "
        f"In brackets: {level:.0%} bootstrap intervals ({evaluation.settings['num_resamples']:,} resamples). WER may exceed 100 %.",
        "",
    ]
    for result in evaluation.sets:
        lines += _set_lines(result, normalizers, level)
    if evaluation.old_languages:
        lines += ["## Old languages", "", "Outputs before an adapter was attached, and afterwards with it switched off.", ""]
        lines += ["| set | served by | after | clips | WER | weights, encoder, logits, text |", "|---|---|---|---:|---:|---|"]
        for old in evaluation.old_languages:
            verdict = "identical to the last bit" if not old.differing else f"**different: {', '.join(old.differing)}**"
            lines.append(
                f"| {_cell(old.name)} ({old.language}) | {old.served_by} | {old.after} | {old.num_clips:,} | {old.wer:.1%} | {verdict} |"
            )
        lines.append("")
    if evaluation.problems:
        lines += ["## Not measured", "", *(f"- {problem}" for problem in evaluation.problems), ""]
    return "\n".join(lines)


def _set_lines(result: SetResult, normalizers: Sequence[str], level: float) -> list[str]:
    lines = [f"## {result.name}: {language_name(result.language)} ({result.language})", ""]
    lines += [f"{result.num_clips:,} clips, {result.hours * 60:.1f} minutes; {result.left_out}.", ""]
    rates = [(kind, rate) for kind in normalizers for rate in ("wer", "cer")]
    titles = [rate.upper() + ("" if kind == normalizers[0] else f", {kind}") for kind, rate in rates]
    lines += [f"| | {' | '.join(titles)} | prompt |", "|---|" + "---:|" * len(titles) + "---|"]
    for system in result.systems:
        cells = [str(getattr(system.rates[kind], rate)) for kind, rate in rates]
        lines.append(f"| {system.name} | {' | '.join(cells)} | `{system.prompt_language}` |")
    lines.append("")
    if result.comparisons:
        rate = result.comparisons[0].rate.upper()
        lines += [f"| pair | {rate} points lower | p | p after Holm | |", "|---|---:|---:|---:|---|"]
        for pair in result.comparisons:
            spread = "" if pair.low is None or pair.high is None else f" ({100 * pair.low:.1f} to {100 * pair.high:.1f})"
            verdict = "significant" if pair.p_adjusted < 1 - level else "may be chance"
            lower = f"{100 * pair.difference:.1f}{spread}"
            lines.append(f"| {pair.better} against {pair.than} | {lower} | {pair.p_value:.2g} | {pair.p_adjusted:.2g} | {verdict} |")
        lines.append("")
    if result.samples:
        lines += ["`[-left out-]`, `{+added+}`, both: a wrong word.", ""]
        for sample in result.samples:
            lines += [f"- {sample['which']}: {_cell(sample['reference'])}"]
            lines += [f"  - {name}: {_cell(text) or '(nothing)'}" for name, text in sample.items() if name not in ("which", "reference")]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    """Text that Markdown leaves alone."""
    for symbol in "\\`*_|<>#":
        text = text.replace(symbol, f"\\{symbol}")
    return text


def _figure(evaluation: Comparison) -> Figure:
    from matplotlib.figure import Figure

    normalizer = evaluation.settings["normalizers"][0]
    rows = [(result, system) for result in evaluation.sets for system in result.systems]
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(rows) + 0.3 * len(evaluation.sets)), layout="constrained")
    axes = figure.subplots(
        len(evaluation.sets), 1, sharex=True, squeeze=False, height_ratios=[len(result.systems) for result in evaluation.sets]
    )[:, 0]
    for axis, result in zip(axes, evaluation.sets, strict=True):
        for at, system in enumerate(result.systems):
            rates = system.rates[normalizer]
            interval = rates.wer if rates.headline == "wer" else rates.cer
            color = "0.45" if system.name == BASE_NAME else f"C{at}"
            if interval.low is not None and interval.high is not None:
                axis.plot([100 * interval.low, 100 * interval.high], [at, at], color=color, linewidth=2)
            axis.plot([100 * interval.value], [at], "o", color=color)
            axis.annotate(f"{interval.value:.1%}", (100 * interval.value, at), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set_yticks(range(len(result.systems)), [system.name for system in result.systems])
        axis.set_ylim(len(result.systems) - 0.4, -0.8)
        axis.set_title(f"{result.name}: {language_name(result.language)}, {result.num_clips:,} clips", loc="left", fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.set_xlim(left=0)
    headlines = {rates.headline.upper() for result in evaluation.sets for system in result.systems for rates in [system.rates[normalizer]]}
    axes[-1].set_xlabel(
        f"{' or '.join(sorted(headlines, reverse=True))} in percent, {evaluation.settings['level']:.0%} interval ({normalizer})"
    )
    return figure
