"""The command line: `whisper-moe transcribe | train | adapters | export`. Flags in, calls of the package, text or JSON out.

Decides nothing by itself. Heavy libraries are imported when a command needs them, so that help is quick; this is also where
`peft_s2lora` and `hub_utils` join, which the package itself does not know.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from whisper_moe.cli_data import Evaluate, Similar
from whisper_moe.cli_hub import AddAdapter, FetchAdapters, FindAdapters, Publish, RemoveAdapter, UpdateAdapters, registry_lines
from whisper_moe.export import Format, Precision, Quantization

if TYPE_CHECKING:
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
    language: str | None = None
    """The language, if you know it: a code or a name. Default: it is detected."""
    adapter: str | None = None
    """Use this adapter whatever is heard; "none": the base model alone."""
    allowed: tuple[str, ...] | None = None
    """Languages to choose among when detecting. Default: all."""
    threshold: float = 0.5
    """Below this probability the language counts as uncertain, and the base model writes."""
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

    def run(self) -> int:
        if not self.files:
            raise ValueError("Name at least one recording: whisper-moe transcribe FILE ...")
        _quiet_libraries()
        import peft_s2lora  # noqa: F401, teaches PEFT the method of the shipped adapters
        from whisper_moe import AudioError, Transcriber

        transcriber = Transcriber.from_pretrained(self.model, self.adapters, self.device, self.dtype)
        failed = 0
        for file in self.files:
            progress = _Progress(str(file))
            try:
                transcript = transcriber.transcribe(
                    file,
                    language=self.language,
                    adapter=self.adapter,
                    allowed=self.allowed,
                    threshold=self.threshold,
                    num_beams=self.num_beams,
                    batch_size=self.batch_size,
                    on_progress=progress,
                )
            except AudioError as error:
                progress.clear()
                print(f"{file}: {error}", file=sys.stderr)
                failed += 1
                continue
            progress.clear()
            print(json.dumps({"file": str(file), **transcript.to_dict()}, ensure_ascii=False) if self.json else _as_text(file, transcript))
            sys.stdout.flush()
        return SOME_FAILED if failed else 0


def _as_text(file: Path, transcript: Transcript) -> str:
    """The transcript for a terminal."""
    lines = [str(file)]
    if transcript.language is not None:
        heard = "given" if transcript.probability is None else f"{transcript.probability:.0%}"
        lines.append(f"  language: {transcript.language_name} ({transcript.language}), {heard}")
    lines.append(f"  adapter:  {transcript.adapter or 'none, the base model'} ({transcript.model})")
    lines.append(f"  because:  {transcript.reason}")
    lines += [f"  warning:  {warning}" for warning in transcript.warnings]
    lines.append(f"  text:     {transcript.text}")
    if len(transcript.segments) > 1:
        lines += [f"  {_clock(part.start_s)} - {_clock(part.end_s)}  {part.text}" for part in transcript.segments]
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{int(minutes):3d}:{seconds:05.2f}"


class _Progress:
    """One line on a terminal that is written over; nothing where the output goes to a file."""

    def __init__(self, name: str) -> None:
        self._name, self._shown = name, sys.stderr.isatty()

    def __call__(self, share: float, what: str) -> None:
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


# ---- train -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Train:
    """Teach a frozen Whisper a language or a kind of speech: clips in, a measured adapter out."""

    data: Path
    """Training clips: a parquet file in the Hub's layout, or a folder with train.parquet."""
    language: str
    """The language of the clips: a code or a name; ISO 639-3 where Whisper has none ("qug")."""
    out: Path
    """Folder for the adapter."""
    model: str | None = None
    """Folder or Hub id of the base. Default: the pocket Whisper that is shipped."""
    method: Literal["s2lora", "lora"] = "s2lora"
    """The PEFT method."""
    rank: int = 32
    """Rank directions: shared by many weights in S2-LoRA, of each weight in LoRA."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    """Linear layers to adapt."""
    sparsity: float = 0.05
    """S2-LoRA: pull of the rank coefficients towards zero; 0.01 to 0.3 works, 0 is none."""
    name: str | None = None
    """What the registry calls the adapter. Default: the language, with the domain."""
    domain: str | None = None
    """Kind of speech ("child"), for an adapter that is chosen by name only."""
    carrier: str | None = None
    """Whisper's language whose token carries one that has none. Default: the one that is heard most."""
    base_id: str | None = None
    """Public name of the base, needed if --model is a folder."""
    eval_data: Path | None = None
    """Clips to measure on, before and after; a file, or a folder with test.parquet."""
    dev_data: Path | None = None
    """Clips that decide which checkpoint is kept; a file, or a folder with dev.parquet."""
    start_from: Path | None = None
    """Folder of an adapter to start from; method, rank and targets are then its own."""
    resume: bool = False
    """Go on from the last checkpoint, if there is one."""
    num_epochs: float | None = None
    """Passes over the clips."""
    max_steps: int | None = None
    """Optimizer steps, instead of passes."""
    batch_size: int | None = None
    """Clips a step."""
    learning_rate: float | None = None
    """Highest learning rate."""
    label_smoothing: float | None = None
    """Share of probability that the loss spreads over all tokens."""
    crop_share: float | None = None
    """Share of batches that are cut behind the longest clip: quicker if clips are much shorter than the window."""
    precision: str | None = None
    """bf16, fp32 or auto."""
    num_workers: int | None = None
    """Processes that prepare batches."""
    seed: int | None = None
    """Of everything that is drawn at random."""
    train_data: str | None = None
    """For the card: the data, whose they are, and where they are from. Default: the path."""
    license: str | None = None
    """For the card: licence of the adapter as the data allow it ("cc-by-4.0")."""

    def run(self) -> int:
        from hub_utils import render_card
        from whisper_moe.languages import language_name
        from whisper_moe.pocket import MODEL
        from whisper_moe.train import CardNotes, train_language_adapter

        adapter = train_language_adapter(
            str(MODEL) if self.model is None else self.model,
            self.data,
            language=self.language,
            out=self.out,
            name=self.name,
            domain=self.domain,
            carrier=self.carrier,
            base_id=self.base_id,
            eval_data=self.eval_data,
            dev_data=self.dev_data,
            start_from=self.start_from,
            resume=self.resume,
            notes=CardNotes(train_data=self.train_data, license=self.license, command=shlex.join(["whisper-moe", *sys.argv[1:]])),
            **self._method_arguments(),
            **self._settings(),
        )
        card = render_card(adapter.path, language_name=language_name(adapter.language), license=self.license)
        (adapter.path / "README.md").write_text(card, "utf-8")
        print(_adapter_line(adapter))
        return 0

    def _settings(self) -> dict[str, Any]:
        """The settings that were given; the others keep the defaults of `TrainSettings`."""
        names = (
            "num_epochs",
            "max_steps",
            "batch_size",
            "learning_rate",
            "label_smoothing",
            "crop_share",
            "precision",
            "num_workers",
            "seed",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _method_arguments(self) -> dict[str, Any]:
        """The PEFT config, and what the method needs beyond gradients."""
        from peft import LoraConfig, PeftConfig

        import peft_s2lora

        targets = list(self.target_modules)
        if self.start_from is not None:
            config = PeftConfig.from_pretrained(str(self.start_from))
        elif self.method == "lora":
            config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets)
        else:
            config = peft_s2lora.S2LoraConfig(r=self.rank, target_modules=targets, sparsity_weight=self.sparsity)
        if not isinstance(config, peft_s2lora.S2LoraConfig):
            return {"peft_config": config}
        sparse = [peft_s2lora.S2LoraCallback()] if config.sparsity_weight > 0 else []
        return {"peft_config": config, "callbacks": sparse, "optimizer_parameter_groups": peft_s2lora.s2lora_param_groups}


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
    | Annotated[Train, subcommand("train")]
    | Annotated[Adapters, subcommand("adapters")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Similar, subcommand("similar")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Publish, subcommand("publish")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: all went well; 1: some recordings could not be used; 2: the request makes no sense."""
    command: Any = tyro.cli(Command, args=arguments, prog="whisper-moe", description="Speech in, text out: one small adapter per language.")
    try:
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
