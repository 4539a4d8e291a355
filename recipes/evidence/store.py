"""One file per run, so that hours of work survive whatever happens, and two processes share them.

A run is known by its *key*, `part/arm-s<seed>`. It is `claimed` by a lock that the kernel gives back when its process ends, so a run
that was killed is simply done again.
"""

from __future__ import annotations

import fcntl
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from recipes.evidence.ground import Item
from recipes.evidence.measuring import Measured


class Store:
    """The runs of one ground, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """The row of a run; None if it has not been made."""
        path = self.path(key)
        if not path.exists():
            return None
        row: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return row

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every run that has been made, by key."""
        paths = sorted(self.folder.rglob("*.json")) if self.folder.exists() else []
        return {str(path.relative_to(self.folder).with_suffix("")): json.loads(path.read_text("utf-8")) for path in paths}

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether the run is this process's to make: not made, and nobody else at it."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            taken = _taken(lock)
            if not taken:  # by somebody at it, or for an instant by one who `waited`
                time.sleep(0.1)
                taken = _taken(lock)
            yield taken and not path.exists()

    def waited(self, key: str) -> dict[str, Any] | None:
        """The row of a run, when whoever is at it has ended."""
        path = self.path(key)
        if not path.exists() and path.parent.exists():
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
        return self.read(key)

    def write(self, key: str, row: dict[str, Any]) -> None:
        part = self.path(key).with_suffix(".part")
        part.write_text(json.dumps(row, ensure_ascii=False), "utf-8")
        part.replace(self.path(key))


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def set_row(measured: Measured, items: Sequence[Item], num_texts: int = 3) -> dict[str, Any]:
    """Errors of one set as plain data, with the first few texts to look at. Speakers are numbered: only who is the same counts."""
    names = {name: number for number, name in enumerate(dict.fromkeys(item.speaker for item in items if item.speaker is not None))}
    return {
        "language": items[0].language,
        "seconds": round(sum(item.seconds for item in items), 1),
        "speakers": [None if item.speaker is None else names[item.speaker] for item in items],
        "wer": round(measured.wer, 5),
        "cer": round(measured.cer, 5),
        "word_errors": measured.word_errors,
        "words": measured.words,
        "char_errors": measured.char_errors,
        "chars": measured.chars,
        "texts": measured.hypotheses[:num_texts],
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    import peft
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
