"""Fresh processes without their seconds of imports: each is forked from one that has imported the libraries and nothing of ours.

That one is multiprocessing's fork server, which is started when first needed and shares nothing with pytest's own process. Where
forking is not safe (macOS) or not possible (Windows), a process starts from nothing, as `python -c` does.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = [str(ROOT), str(ROOT / "tests")]
OURS = {"peft_s2lora", "whisper_moe", "hub_utils", "demo"}
LIBRARIES = [
    "torch.distributed.fsdp",
    "peft",
    "transformers.models.whisper.modeling_whisper",
    "transformers.pipelines",
    "transformers.trainer_seq2seq",
]
PATIENCE_S = 600


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that finds this checkout and the tests' models, with `folder` as its working directory."""
    return run_together(code, folder, [arguments])[0]


def run_together(code: str, folder: Path, arguments: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """As `run_python`, in several processes at once, each with arguments of its own."""
    forks = sys.platform == "linux"
    with tempfile.TemporaryDirectory() as spoken:
        outs = [(Path(spoken) / f"{number}.out", Path(spoken) / f"{number}.err") for number in range(len(arguments))]
        processes = [(_fork if forks else _start)(code, folder, own, *paths) for own, paths in zip(arguments, outs, strict=True)]
        try:
            codes = [process.wait(PATIENCE_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [
            subprocess.CompletedProcess([*own], returncode, *(path.read_text(encoding="utf-8") for path in paths))
            for own, returncode, paths in zip(arguments, codes, outs, strict=True)
        ]


class _Forked:
    """A process of the fork server with the two methods of `Popen` that are used here."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked python", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _fork(code: str, folder: Path, arguments: Sequence[str], out: Path, err: Path) -> _Forked:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)  # read once, when the server starts
    process = context.Process(target=_run, args=(code, str(folder), list(arguments), dict(os.environ), str(out), str(err)))
    process.start()
    return _Forked(process)


def _run(code: str, folder: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """What the forked process does: speak into files, and be as `python -c` would be."""
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    known = {name.partition(".")[0] for name in sys.modules} & OURS
    assert not known, f"not a fresh process: it knows {known}"
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    sys.path[:0] = PATH
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "sys": sys})


def _start(code: str, folder: Path, arguments: Sequence[str], out: Path, err: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {PATH!r}\n{code}", *arguments]
    with open(out, "wb") as to_out, open(err, "wb") as to_err:
        return subprocess.Popen(command, cwd=folder, stdout=to_out, stderr=to_err)
