"""Judges adapter folders, each in a process of its own with bounds on memory and time. Started once; imports and the model are forked.

    with HostileServer() as server:
        [judgement] = server.judge(folder)

The server is this very file, run as a program: it reads one request a line and forks for each. The child puts the adapter on a tiny
Whisper with `hub_utils.load_adapter` and says what happened, how long it took, how much memory it needed at its peak, and whether the
model still is what it was.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

BASE_ID = "openai/whisper-tiny"  # what the tiny model says it is
KILL_AFTER_S = 20.0
MEMORY_CEILING = 3 * 1024**3  # bytes over what is mapped at the start: a runaway dies instead of taking the machine along


@dataclass(frozen=True)
class Judgement:
    """What became of one adapter.

    Args:
        verdict: "loaded", "refused" (an `AdapterError`), "killed" (too slow, or crashed), or the name of another exception.
        message: What was said.
        seconds: From the call to its end.
        peak_bytes: How much resident memory grew at its peak.
        unchanged: Whether the model is what it was before, in every byte, module, flag and hook.
    """

    verdict: str
    message: str
    seconds: float
    peak_bytes: int
    unchanged: bool


class HostileServer:
    """The server, started by `with`."""

    def __enter__(self) -> HostileServer:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def judge(self, folder: Path, companies: Sequence[Mapping[str, Path]] = ({},), *, cwd: Path | None = None) -> list[Judgement]:
        """Put an adapter on the model, in a process of its own.

        `companies`: what is put there first, name -> folder; one after the other, a judgement for each. `cwd`: where the process works.
        """
        besides = [{name: str(path) for name, path in company.items()} for company in companies]
        request = {"folder": str(folder), "companies": besides, "cwd": None if cwd is None else str(cwd)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has died"
        return [Judgement(**judgement) for judgement in json.loads(answer)]


def serve() -> None:
    model = _model()
    gc.collect()
    gc.freeze()  # children share what is there now, instead of copying it when they collect
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                os.write(writer, json.dumps(_judge(model, json.loads(line))).encode())
            finally:
                os._exit(0)
        os.close(writer)
        print(_answer_of(child, reader), flush=True)


def _answer_of(child: int, reader: int) -> str:
    """What a child says, or that it had to be killed."""
    ready, _, _ = select.select([reader], [], [], KILL_AFTER_S)
    answer = b""
    while ready and (part := os.read(reader, 1 << 16)):
        answer += part
    os.close(reader)
    if not answer:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed = {"verdict": "killed", "message": "", "seconds": KILL_AFTER_S, "peak_bytes": 0, "unchanged": False}
    return answer.decode() or json.dumps([killed])


def _model() -> Any:
    import torch
    from conftest import build_tiny_model, build_tiny_processor
    from peft import LoraConfig, get_peft_model

    import hub_utils.load  # noqa: F401 - what loads late loads now, not in every child
    import peft_s2lora
    import whisper_moe.base_signature  # noqa: F401
    from whisper_moe import LoraMoeConfig  # noqa: F401 - PEFT knows the method from now on

    torch.set_num_threads(1)
    model = build_tiny_model(build_tiny_processor())
    model.config._name_or_path = BASE_ID
    for config in (LoraConfig(target_modules=["q_proj"]), peft_s2lora.S2LoraConfig()):
        get_peft_model(copy.deepcopy(model), config)
    return model


def _judge(model: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    from hub_utils import load_adapter
    from whisper_moe.base_signature import check_base

    limit = _kilobytes("VmSize") * 1024 + MEMORY_CEILING
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    judgements = []
    for company in request["companies"]:
        for name, folder in company.items():
            model = load_adapter(model, folder, name, check_base=check_base)
        judgements.append(_judge_one(model, request["folder"]))
    return judgements


def _judge_one(model: Any, folder: str) -> dict[str, Any]:
    from hub_utils import AdapterError, load_adapter
    from whisper_moe.base_signature import check_base

    before, memory, start = fingerprint(model), _kilobytes("VmRSS"), time.perf_counter()
    try:
        load_adapter(model, folder, "hostile", check_base=check_base)
        verdict, message = "loaded", ""
    except AdapterError as error:
        verdict, message = "refused", str(error)
    except BaseException as error:
        verdict, message = type(error).__name__, str(error)
    seconds, peak = time.perf_counter() - start, (_kilobytes("VmHWM") - memory) * 1024
    same = fingerprint(model) == before
    return {"verdict": verdict, "message": message, "seconds": seconds, "peak_bytes": peak, "unchanged": same}


def fingerprint(model: Any) -> str:
    """A hash of everything about a model that loading an adapter might touch."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.requires_grad}".encode())
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")]
        digest.update(f"{name} {type(module)} {module.training} {sorted(vars(module))} {hooks}".encode())
        digest.update(str(sorted(getattr(module, "peft_config", None) or {})).encode())
        digest.update(str([getattr(module, "_active_adapter", None), getattr(module, "_disable_adapters", None)]).encode())
        adapters = [sorted(value) for value in (getattr(module, "scaling", None), getattr(module, "r", None)) if isinstance(value, dict)]
        digest.update(str(adapters).encode())
    return digest.hexdigest()


def _kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    serve()
