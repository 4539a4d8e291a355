"""The command `whisper-moe merge-similar`: flags in, a call of `growth`, a table and files out.

Registered in `cli.py`. As there, heavy libraries are imported when the command runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from whisper_moe.data import Clips


@dataclass(frozen=True)
class MergeSimilar:
    """Merge adapters whose weights, or languages, are alike: fewer files for the same languages, and what it costs."""

    folders: Positional[tuple[Path, ...]]
    """Adapters, or folders that hold several. Adapters for a domain are copied as they are."""
    out: Path
    """A new folder for what is left, with growth.json, .md and .png. It is used like any folder of adapters."""
    threshold: float = 0.5
    """Least mean similarity of two clusters that are merged."""
    number: int | None = None
    """How many adapters are to be left, whatever the threshold."""
    by: Path | None = None
    """A similarity.json of `whisper-moe similar` with a matrix: languages are compared instead of weights."""
    rank: int | None = None
    """Rank of merged adapters. Default: the largest of those that are merged."""
    pruning: Literal["none", "magnitude", "ties", "dare_linear", "dare_ties"] = "none"
    """none: the mean of the deltas. Others drop entries first, as PEFT's rules do."""
    density: float = 0.5
    """Share of the entries that pruning keeps."""
    data: tuple[str, ...] = ()
    """Clips to measure the cost on, as language=source: a file, a folder, or a data set of the Hub."""
    split: str = "test"
    """Which split of the sources."""
    model: str | None = None
    """Folder or Hub id of the base; needed for S2-LoRA and for --data. Default: the pocket Whisper that is shipped."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    seed: int = 0
    """Of pruning by chance."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> int:
        from whisper_moe.growth import merge_similar
        from whisper_moe.registry import AdapterRegistry

        if not self.folders:
            raise ValueError("Name the adapters: whisper-moe merge-similar FOLDER ... --out NEW_FOLDER")
        found = [adapter for folder in self.folders for adapter in AdapterRegistry.from_folder(folder)]
        needs_base = bool(self.data) or any(adapter.peft_type != "LORA" for adapter in found)
        base, processor = _base(self.model, self.device) if needs_base else (None, None)
        growth = merge_similar(
            found,
            self.out,
            threshold=self.threshold,
            number=self.number,
            similarity=None if self.by is None else _similarity(self.by),
            rank=self.rank,
            pruning=self.pruning,
            density=self.density,
            seed=self.seed,
            base=base,
            processor=processor,
            eval_sets=_eval_sets(self.data, self.split),
        )
        growth.save()
        print(json.dumps(growth.to_dict(), ensure_ascii=False) if self.json else growth.to_markdown())
        return 0


def _base(model: str | None, device: str) -> tuple[Any, Any]:
    import peft_s2lora  # noqa: F401, teaches PEFT the method of the shipped adapters
    from whisper_moe.transcribe import Transcriber

    transcriber = Transcriber.from_pretrained(model, (), device)
    return transcriber.model, transcriber.processor


def _similarity(path: Path) -> dict[tuple[str, str], float]:
    """Pairs of languages -> the posterior that one is heard as the other."""
    try:
        matrix = json.loads(path.read_text("utf-8"))["matrix"]
        rows = zip(matrix["languages"], matrix["posterior"], strict=True)
        return {(a, b): value for a, row in rows for b, value in zip(matrix["languages"], row, strict=True) if value is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no matrix of languages ({error}). Make one: whisper-moe similar --data br=... cy=... --out FOLDER."
        ) from None


def _eval_sets(data: tuple[str, ...], split: str) -> dict[str, Clips] | None:
    from whisper_moe.data import load_clips

    if not data:
        return None
    sets = {}
    for text in data:
        code, equals, source = text.partition("=")
        if not equals:
            raise ValueError(f"--data says whose clips they are: language=source; got {text!r}.")
        sets[code] = load_clips(source, split=split, language=code)
    return sets
