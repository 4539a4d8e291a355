"""The command line: `whisper-moe transcribe | train | adapters | export`. Flags in, calls of the package, text or JSON out.

Decides nothing by itself. Heavy libraries are imported when a command needs them, so that help is quick; this is also where
`peft_s2lora` and `hub_utils` join, which the package itself does not know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from whisper_moe.captions import FORMATS, FileFormat, unique_names, write_files
from whisper_moe.cli_batch import Batch
from whisper_moe.cli_data import Evaluate, Similar
from whisper_moe.cli_growth import MergeSimilar
from whisper_moe.cli_hub import (
    AddAdapter,
    FetchAdapters,
    FindAdapters,
    Publish,
    RemoveAdapter,
    UpdateAdapters,
    expect_registry,
    fetch_experts,
    registry_lines,
)
from whisper_moe.cli_many import TrainMany
from whisper_moe.cli_train import Train
from whisper_moe.expert_sources import fetch_experts_with
from whisper_moe.export import Format, Precision, Quantization

if TYPE_CHECKING:
    from whisper_moe.explain import Explanation
    from whisper_moe.registry import LanguageAdapter
    from whisper_moe.transcribe import Transcript

WRONG_USE, SOME_FAILED = 2, 1  # exit codes


# ---- transcribe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcribe:
    """Write down recordings of any format, rate and length. The language is detected, and its adapter used."""

    files: Positional[tuple[Path, ...]]
    """Recordings."""
    model: str | None = None
    """Folder or Hub id of a Whisper ("openai/whisper-small"). Default: the pocket Whisper that is shipped."""
    adapters: tuple[Path, ...] | None = None
    """Folders with adapters. Default: those shipped with the pocket."""
    registry: Path | None = None
    """The registry file; what it names is fetched when its language is heard. Default: $WHISPER_MOE_REGISTRY, or the user's settings."""
    language: str | None = None
    """The language, if you know it: a code or a name. Default: it is detected."""
    adapter: str | None = None
    """Use this adapter whatever is heard; "none": the base model alone."""
    allowed: tuple[str, ...] | None = None
    """Languages to choose among when detecting. Default: all."""
    threshold: float = 0.5
    """Below this probability the language counts as uncertain."""
    if_unsure: Literal["base", "two-best"] = "base"
    """What is done then: the base model writes, or the two best languages are written and the likelier text decides."""
    switching: bool = False
    """The language may change within a recording: cut it at its pauses, and find the language of each piece."""
    num_beams: int = 1
    """Beams of the search; 1 is quickest."""
    batch_size: int = 8
    """Windows written at a time."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    dtype: str = "auto"
    """float16, bfloat16, float32 or auto."""
    json: bool = False
    """Print one JSON object a file, each on its own line."""
    write: Path | None = None
    """Folder for files of each transcript, besides what is printed; they take the recording's name, and the place of earlier ones."""
    formats: tuple[FileFormat, ...] = FORMATS
    """What is written there: txt, captions as srt and vtt, json with the decision."""

    def run(self) -> int:
        if not self.files:
            raise ValueError("Name at least one recording: whisper-moe transcribe FILE ...")
        if self.write is not None:
            self.write.mkdir(parents=True, exist_ok=True)  # if that cannot be, it is said before the work
        _quiet_libraries()
        import peft_s2lora  # noqa: F401, teaches PEFT the method of the shipped adapters
        from hub_utils import check_adapter, load_adapter
        from whisper_moe import LoraMoeConfig, Transcriber  # noqa: F401, the first teaches PEFT mixtures
        from whisper_moe.explain import explain

        transcriber = Transcriber.from_pretrained(
            self.model, self.adapters, self.device, self.dtype, load=load_adapter, check=check_adapter
        )
        expect_registry(transcriber, self.registry, self.model, folders_first=self.adapters is not None)
        failed = 0
        for file, stem in zip(self.files, unique_names(file.stem for file in self.files), strict=True):
            progress = _Progress(str(file))
            try:
                transcript = transcriber.transcribe(
                    file,
                    language=self.language,
                    adapter=self.adapter,
                    allowed=self.allowed,
                    threshold=self.threshold,
                    if_unsure=self.if_unsure,
                    switching=self.switching,
                    num_beams=self.num_beams,
                    batch_size=self.batch_size,
                    on_progress=progress,
                )
            except ValueError as error:
                progress.clear()
                if not progress.begun:  # nobody could do what is asked for, with whatever file
                    raise
                print(f"{file}: {error}", file=sys.stderr)
                failed += 1
                continue
            progress.clear()
            decision = explain(transcript, allowed=self.allowed, threshold=self.threshold)
            row = {"file": str(file), **transcript.to_dict(), "decision": decision.to_dict()}
            print(json.dumps(row, ensure_ascii=False) if self.json else _as_text(file, transcript, decision))
            sys.stdout.flush()
            if self.write is not None:
                write_files(transcript, self.write, stem, self.formats, decision=decision)
        return SOME_FAILED if failed else 0


def _as_text(file: Path, transcript: Transcript, decision: Explanation) -> str:
    """The transcript for a terminal."""
    lines = [str(file), f"  decision: {decision.sentence}", f"  because:  {transcript.reason}"]
    lines += [f"  warning:  {warning}" for warning in transcript.warnings]
    lines.append(f"  text:     {transcript.text}")
    if len(transcript.segments) > 1:
        several = len({part.language for part in transcript.segments}) > 1
        spoken = [f"[{part.language}] {part.text}" if several else part.text for part in transcript.segments]
        lines += [
            f"  {_clock(part.start_s)} - {_clock(part.end_s)}  {text}" for part, text in zip(transcript.segments, spoken, strict=True)
        ]
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{int(minutes):3d}:{seconds:05.2f}"


class _Progress:
    """One line on a terminal that is written over; nothing where the output goes to a file."""

    def __init__(self, name: str) -> None:
        self._name, self._shown, self.begun = name, sys.stderr.isatty(), False

    def __call__(self, share: float, what: str) -> None:
        self.begun = True
        if self._shown:
            print(f"\r\x1b[2K{self._name}: {share:4.0%}  {what}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


# ---- adapters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListAdapters:
    """List adapters: language, method, size, and error rates before and after."""

    folders: Positional[tuple[Path, ...]] = ()
    """Folders with adapters. Default: those shipped with the pocket, and what the registry file names."""
    json: bool = False
    """Print one JSON object an adapter, each on its own line; of folders only."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        from whisper_moe.pocket import ADAPTERS
        from whisper_moe.registry import AdapterRegistry

        found = [adapter for folder in self.folders or (ADAPTERS,) for adapter in AdapterRegistry.from_folder(folder)]
        for adapter in found:
            print(json.dumps(_adapter_row(adapter), ensure_ascii=False) if self.json else _adapter_line(adapter))
        named = [] if self.folders or self.json else registry_lines(self.registry)
        for line in named:
            print(line)
        if not found and not named:
            print("No adapters there. `whisper-moe train` makes one.", file=sys.stderr)
        return 0


@dataclass(frozen=True)
class Adapters:
    """Adapters: those at hand, and the registry file that says which one speaks for a language."""

    action: OmitSubcommandPrefixes[
        Annotated[ListAdapters, subcommand("list")]
        | Annotated[AddAdapter, subcommand("add")]
        | Annotated[RemoveAdapter, subcommand("remove")]
        | Annotated[UpdateAdapters, subcommand("update")]
        | Annotated[FetchAdapters, subcommand("fetch")]
        | Annotated[FindAdapters, subcommand("find")]
    ] = field(default_factory=ListAdapters)

    def run(self) -> int:
        return self.action.run()


def _adapter_row(adapter: LanguageAdapter) -> dict[str, Any]:
    fields = ("name", "language", "domain", "carrier", "peft_type", "base", "num_parameters", "num_bytes", "metrics")
    return {field: getattr(adapter, field) for field in fields} | {"path": str(adapter.path)}


def _adapter_line(adapter: LanguageAdapter) -> str:
    from whisper_moe.languages import language_name

    spoken = language_name(adapter.language) + ("" if adapter.domain is None else f", {adapter.domain} speech")
    carrier = "" if adapter.carrier is None else f", under the token of {language_name(adapter.carrier)}"
    rates = [
        f"{rate.upper()} {adapter.metrics['before'][rate]:.1%} -> {adapter.metrics['after'][rate]:.1%}"
        for rate in ("wer", "cer")
        if rate in adapter.metrics.get("before", {}) and rate in adapter.metrics.get("after", {})
    ]
    measured = "; ".join(rates) or "error rates not measured"
    return f"{adapter.name}: {spoken}{carrier}; {adapter.peft_type} for {adapter.base}, {adapter.num_parameters:,} parameters; {measured}"


# ---- export ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """Write an adapter out for other programs: as plain LoRA, merged into its base, or for CTranslate2 and faster-whisper."""

    adapter: Positional[str]
    """Folder of a language adapter, or the name of a shipped one."""
    to: Path
    """Folder to write."""
    format: Format
    """lora: an adapter that PEFT loads without this package; merged: a Whisper checkpoint; ct2: the same for faster-whisper."""
    model: str | None = None
    """Folder or Hub id of the base. Default: the one that the adapter names."""
    dtype: Precision | None = None
    """Precision of a merged checkpoint. Default: that of the base."""
    quantization: Quantization | None = None
    """What the ct2 format stores. Default: the precision of the base."""
    overwrite: bool = False
    """Replace an earlier export."""

    def run(self) -> int:
        _quiet_libraries()
        import peft_s2lora
        from hub_utils import render_card
        from whisper_moe.export import export_adapter, find_adapter
        from whisper_moe.languages import language_name

        adapter = find_adapter(self.adapter)
        folder = export_adapter(
            adapter,
            self.to,
            self.format,
            model=self.model,
            dtype=self.dtype,
            quantization=self.quantization,
            overwrite=self.overwrite,
            to_lora={"S2LORA": peft_s2lora.to_lora},
            render_card=lambda folder: render_card(folder, language_name=language_name(adapter.language)),
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{adapter.name} as {self.format}: {folder}, {size / 1e6:,.1f} MB. Its prompt is for language={adapter.prompt_language!r}.")
        return 0


# ---- the door ----------------------------------------------------------------------------------------------------------

Command = (
    Annotated[Transcribe, subcommand("transcribe")]
    | Annotated[Batch, subcommand("batch")]
    | Annotated[Train, subcommand("train")]
    | Annotated[TrainMany, subcommand("train-many")]
    | Annotated[Adapters, subcommand("adapters")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Similar, subcommand("similar")]
    | Annotated[MergeSimilar, subcommand("merge-similar")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Publish, subcommand("publish")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: all went well; 1: some recordings could not be used; 2: the request makes no sense."""
    command: Any = tyro.cli(Command, args=arguments, prog="whisper-moe", description="Speech in, text out: one small adapter per language.")
    try:
        with fetch_experts_with(fetch_experts):
            code: int = command.run()
    except (ValueError, OSError) as error:
        print(f"whisper-moe: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("whisper-moe: stopped", file=sys.stderr)
        return 130
    return code


def _quiet_libraries() -> None:
    """Keep loading bars and advice to programmers off the terminal: a transcript is what was asked for."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


if __name__ == "__main__":
    sys.exit(main())
