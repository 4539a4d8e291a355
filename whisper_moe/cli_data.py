"""The commands `whisper-moe similar` and `whisper-moe evaluate`: flags in, calls of `similarity` and `comparison`, tables and files out.

Registered in `cli.py`. As there, heavy libraries are imported when a command runs.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_moe.data import Clips
    from whisper_moe.registry import LanguageAdapter
    from whisper_moe.transcribe import Transcriber

SOME_FAILED = 1  # exit code


# ---- similar -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similar:
    """Which languages a new one is near to, as the base model hears it: a ranked table, and a matrix of several languages."""

    data: tuple[str, ...]
    """Clips of the new language, as `language=source` or a source alone: a file, a folder, or a data set of the Hub. Further ones, each
    with its language, are compared by encoder states and tokens too, and all together make the matrix."""
    language: str | None = None
    """The language of the first source, if it is not said there; its own token is left out of the ranking."""
    split: str = "train"
    """Which split of the sources."""
    model: str | None = None
    """Folder or Hub id of the base. Default: the pocket Whisper that is shipped."""
    adapters: tuple[Path, ...] | None = None
    """Folders with adapters, shown in the table. Default: those shipped with the pocket."""
    among: tuple[str, ...] | None = None
    """Languages to rank. Default: all that the model hears."""
    only_with_adapter: bool = False
    """Rank the languages that have an adapter, and no others."""
    num_utterances: int = 200
    """Clips of each language that are listened to."""
    text_column: str | None = None
    """The transcripts' column, where guessing fails."""
    audio_column: str | None = None
    """The recordings' column, where guessing fails."""
    out: Path | None = None
    """Folder for similarity.json, .md and the figures."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    seed: int = 0
    """Of which clips are listened to."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> int:
        from whisper_moe.similarity import language_similarity, save_similarity, similarity_matrix

        first, *rest = [_named_source(text) for text in self.data]
        languages = [self.language if first[0] is None else first[0], *(code for code, _ in rest)]
        if rest and None in languages:
            raise ValueError("With several sources each needs its language: --data qug=my_kichwa de=my_german.")
        transcriber = _transcriber(self.model, self.adapters, self.device)
        sets = [_load(source, code, self, None) for code, source in [(languages[0], first[1]), *rest]]
        adapters = {adapter.name: adapter.language for adapter in transcriber.registry if adapter.domain is None}
        listening: dict[str, Any] = {"num_utterances": self.num_utterances, "seed": self.seed}
        others = {str(code): clips for code, clips in zip(languages[1:], sets[1:], strict=True)}
        similarity = language_similarity(
            transcriber.model,
            transcriber.processor,
            sets[0],
            language=languages[0],
            among=self._candidates(transcriber, adapters, others),
            others=others,
            adapters=adapters,
            **listening,
        )
        matrix = None
        if rest:
            by_language = {str(code): clips for code, clips in zip(languages, sets, strict=True)}
            matrix = similarity_matrix(transcriber.model, transcriber.processor, by_language, **listening)
        if self.out is not None:
            save_similarity(self.out, similarity, matrix)
        if self.json:
            row = similarity.to_dict() | ({} if matrix is None else {"matrix": matrix.to_dict()})
            print(json.dumps(row, ensure_ascii=False))
            return 0
        print(f"What {similarity.name} sounds like to {transcriber.name}, {similarity.num_utterances} utterances:\n")
        print(similarity.to_markdown())
        if similarity.is_weak:
            print(f"\nThese languages hold only {similarity.share:.1%} of the posterior together: their order means little.")
        return 0

    def _candidates(self, transcriber: Transcriber, adapters: dict[str, str], others: dict[str, Clips]) -> list[str] | None:
        if self.among is not None:
            return list(self.among)
        if not self.only_with_adapter:
            return list(dict.fromkeys([*transcriber.detectable_languages, *others]))
        hearable = [code for code in dict.fromkeys(adapters.values()) if code in transcriber.detectable_languages or code in others]
        if not hearable:
            raise ValueError("No adapter is for a language that can be heard, and for none there are clips. Leave --only-with-adapter out.")
        return hearable


# ---- evaluate ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluate:
    """Measure the base model and adapters on the same clips: WER and CER with intervals, significance, and old languages bit by bit."""

    data: tuple[str, ...]
    """What to write, as `language=source` or a source alone: a file, a folder, or a data set of the Hub."""
    adapters: tuple[Path, ...] = ()
    """Folders with adapters; each is measured on the sets of its language."""
    old: tuple[str, ...] = ()
    """Languages served before, as `language=source`, whose outputs must stay the same to the last bit."""
    old_adapters: tuple[Path, ...] = ()
    """Folders with the adapters that served old languages; those without one were served by the base."""
    language: str | None = None
    """The language of sources that do not say it."""
    split: str = "test"
    """Which split of the sources."""
    out: Path | None = None
    """Folder for evaluation.json, .md, .png and transcripts.jsonl, brought up to date after each set."""
    model: str | None = None
    """Folder or Hub id of the base. Default: the pocket Whisper that is shipped."""
    carrier: str | None = None
    """The base's prompt for a language without a token. Default: that of its adapter, else what is heard most."""
    normalizers: tuple[str, ...] = ("mark-preserving", "whisper-basic")
    """Text normalisers; the first one decides."""
    without_base: bool = False
    """Leave the base model out."""
    limit: int | None = None
    """Clips of each set, drawn by the seed."""
    text_column: str | None = None
    """The transcripts' column, where guessing fails."""
    audio_column: str | None = None
    """The recordings' column, where guessing fails."""
    num_samples: int = 3
    """Clips shown with their errors marked."""
    level: float = 0.95
    """Of the intervals."""
    num_resamples: int = 2000
    """Sets drawn for an interval."""
    num_beams: int = 1
    """Beams of the search; 1 is quickest."""
    batch_size: int = 16
    """Windows written at a time."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    dtype: str = "auto"
    """float16, bfloat16, float32 or auto."""
    precision: str = "auto"
    """Of the encoder: bf16, fp32 or auto."""
    seed: int = 0
    """Of everything that is drawn."""
    json: bool = False
    """Print the JSON instead of the tables."""

    def run(self) -> int:
        from hub_utils import load_adapter
        from whisper_moe.comparison import EvalSet, OldLanguage, evaluate_adapters
        from whisper_moe.languages import language_code
        from whisper_moe.registry import AdapterRegistry

        transcriber = _transcriber(self.model, (), self.device, self.dtype)
        adapters = [adapter for folder in self.adapters for adapter in AdapterRegistry.from_folder(folder)]
        problems, sets = [], []
        for text in self.data:
            code, source = _named_source(text)
            try:  # one bad source does not stop the others
                language = _one_language(self.language if code is None else code, source, adapters)
                sets.append(EvalSet(_load(source, language, self, self.limit), language, self.carrier))
            except (ValueError, OSError) as error:
                problems.append(f"{source}: {error}")
        if not sets:
            raise ValueError("Nothing can be measured. " + " ".join(problems))
        written = {each.language for each in sets}
        for adapter in adapters:
            if adapter.language not in written:
                print(f"{adapter.name}: no set of {adapter.language} is there, so it is not measured.", file=sys.stderr)
        old_languages = []
        served_by = AdapterRegistry(adapter for folder in self.old_adapters for adapter in AdapterRegistry.from_folder(folder))
        for text in self.old:
            code, source = _named_source(text)
            if code is None:
                raise ValueError(f"--old {text} does not say its language: --old de={text}.")
            old_languages.append(OldLanguage(_load(source, code, self, self.limit), code, served_by.for_language(language_code(code))))
        comparison = evaluate_adapters(
            transcriber.model,
            transcriber.processor,
            sets,
            [adapter for adapter in adapters if adapter.language in written],
            old_languages=old_languages,
            with_base=not self.without_base,
            normalizers=self.normalizers,
            batch_size=self.batch_size,
            num_beams=self.num_beams,
            precision=self.precision,
            level=self.level,
            num_resamples=self.num_resamples,
            seed=self.seed,
            num_samples=self.num_samples,
            name=transcriber.name,
            save_to=self.out,
            load=load_adapter,
        )
        comparison.problems[:0] = problems
        # Printed first: a disk that is full must not cost the figures.
        print(json.dumps(comparison.to_dict(), ensure_ascii=False) if self.json else comparison.to_markdown(), flush=True)
        if self.out is not None:
            comparison.save(self.out)
        for problem in comparison.problems:
            print(f"not measured: {problem}", file=sys.stderr)
        if not comparison.old_languages_unchanged:
            print("An old language is not what it was: see the table.", file=sys.stderr)
        return SOME_FAILED if comparison.problems or not comparison.old_languages_unchanged else 0


# ---- small parts -------------------------------------------------------------------------------------------------------


def _named_source(text: str) -> tuple[str | None, str]:
    """("qug", "folder") of `qug=folder`; (None, text) of a source alone."""
    match = re.fullmatch(r"([A-Za-z][\w -]*)=(.+)", text)
    return (None, text) if match is None or Path(text).exists() else (match[1], match[2])


def _one_language(language: str | None, source: str, adapters: list[LanguageAdapter]) -> str:
    """The language of a set: as given, or the adapters' own if they have but one."""
    found = {adapter.language for adapter in adapters}
    if language is None and len(found) == 1:
        return found.pop()
    if language is None:
        raise ValueError(f"its language is not known. Say it: --data qug={source}.")
    return language


def _load(source: str, language: str | None, command: Similar | Evaluate, limit: int | None) -> Clips:
    """The clips of a source, with what was left out told on the way."""
    from whisper_moe.data import load_clips

    if isinstance(command, Similar):  # some more than are listened to, since bad ones are left out
        limit = 2 * command.num_utterances
    columns: dict[str, Any] = {"text_column": command.text_column, "audio_column": command.audio_column}
    clips = load_clips(
        source,
        split=_split_of(source, command.split),
        language=language,
        limit=limit,
        seed=command.seed,
        **columns,
    )
    if clips.report.left_out or clips.report.notes:
        print(clips, file=sys.stderr)
    return clips


def _split_of(source: str, split: str) -> str | None:
    return None if Path(source).is_file() else split


def _transcriber(model: str | None, adapters: tuple[Path, ...] | None, device: str, dtype: str = "auto") -> Transcriber:
    from whisper_moe.cli import _quiet_libraries

    _quiet_libraries()
    import peft_s2lora  # noqa: F401, teaches PEFT the method of the shipped adapters
    from hub_utils import check_adapter, load_adapter
    from whisper_moe import LoraMoeConfig, Transcriber  # noqa: F401, the first teaches PEFT mixtures

    return Transcriber.from_pretrained(model, adapters, device, dtype, load=load_adapter, check=check_adapter)
