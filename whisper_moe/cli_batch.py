"""The command `whisper-moe batch`: flags in, a call of `ray_batch`, transcripts in a folder out.

Registered in `cli.py`. As there, heavy libraries are imported when a command runs; here that is in the workers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from whisper_moe.batch_output import FileFormat, TextFormat

SOME_FAILED = 1  # exit code


@dataclass(frozen=True)
class Batch:
    """Transcribe a folder or bucket of recordings with several workers, on one machine or many (Ray). Run it again to go on."""

    source: Positional[str]
    """Folder of recordings, or an address such as s3://bucket/folder; every machine must reach it."""
    out: Positional[str]
    """Folder or address for the transcripts."""
    model: str | None = None
    """Folder or Hub id of a Whisper ("openai/whisper-small"). Default: the pocket Whisper that is shipped."""
    adapters: tuple[Path, ...] | None = None
    """Folders with adapters. Default: those shipped with the pocket."""
    language: str | None = None
    """The language of all recordings: a code or a name. Default: it is detected."""
    adapter: str | None = None
    """Use this adapter whatever is heard; "none": the base model alone."""
    allowed: tuple[str, ...] | None = None
    """Languages to choose among when detecting. Default: all."""
    threshold: float = 0.5
    """Below this probability the language counts as uncertain, and the base model writes."""
    num_beams: int = 1
    """Beams of the search; 1 is quickest."""
    batch_size: int = 8
    """Windows of a recording written at a time."""
    max_hours: float = 4.0
    """Longer recordings are reported and passed over."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    dtype: str = "auto"
    """float16, bfloat16, float32 or auto."""
    references: Path | None = None
    """A CSV, TSV or JSONL file with the recordings' names and what is said: error rates are measured."""
    known_languages: bool = False
    """Take each recording's language from the references instead of detecting it."""
    format: FileFormat = "jsonl"
    """Of the transcripts."""
    texts: tuple[TextFormat, ...] = ()
    """Also a file for each recording: txt, srt, vtt."""
    trust_listing: bool = False
    """Take recordings whose size and time are as before for unchanged, without reading them."""
    concurrency: int | None = None
    """Workers, each with its own model. Default: as many as there are GPUs, or else processors, for."""
    num_cpus: float = 1
    """Processors for each worker, where it takes no GPU."""
    num_gpus: float | None = None
    """GPUs for each worker; 0.5: two share one. Default: 1 if there is any."""
    files_per_call: int = 8
    """Recordings that a worker gets at a time."""
    address: str | None = None
    """Of a Ray cluster: auto, or ray://host:10001. Default: RAY_ADDRESS, or else a Ray of its own on this machine."""
    json: bool = False
    """Print the summary as one JSON object."""

    def run(self) -> int:
        from hub_utils import check_adapter, load_adapter
        from whisper_moe.ray_batch import BatchSettings, transcribe_batch

        settings = BatchSettings(
            model=self.model,
            adapters=None if self.adapters is None else tuple(str(folder) for folder in self.adapters),
            language=self.language,
            adapter=self.adapter,
            allowed=self.allowed,
            threshold=self.threshold,
            num_beams=self.num_beams,
            batch_size=self.batch_size,
            max_duration_s=3600 * self.max_hours,
            device=self.device,
            dtype=self.dtype,
            imports=("peft_s2lora", "whisper_moe.moe"),  # these teach PEFT the method of the shipped adapters, and mixtures
        )
        progress = _Progress()
        summary = transcribe_batch(
            self.source,
            self.out,
            settings,
            references=self.references,
            known_languages=self.known_languages,
            file_format=self.format,
            texts=self.texts,
            trust_listing=self.trust_listing,
            concurrency=self.concurrency,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            files_per_call=self.files_per_call,
            address=self.address,
            load=load_adapter,
            check=check_adapter,
            on_result=progress,
        )
        progress.clear()
        print(json.dumps(summary.to_dict(), ensure_ascii=False) if self.json else summary)
        if summary.num_failed:
            print(f"{summary.num_failed:,} recordings could not be transcribed: see errors.jsonl in {self.out}.", file=sys.stderr)
        return SOME_FAILED if summary.num_failed else 0


class _Progress:
    """One line on a terminal that is written over; failures stay. Where the output goes to a file, failures alone."""

    def __init__(self) -> None:
        self._shown, self._done, self._seconds = sys.stderr.isatty(), 0, 0.0

    def __call__(self, result: dict[str, Any]) -> None:
        if "kind" in result:
            self.clear()
            print(f"{result['file']}: {result['reason']}", file=sys.stderr)
        else:
            self._done, self._seconds = self._done + 1, self._seconds + result["duration_s"]
        if self._shown:
            line = f"\r\x1b[2K{self._done:,} recordings, {self._seconds / 3600:.2f} h transcribed"
            print(line, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
