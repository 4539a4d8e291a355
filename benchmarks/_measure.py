"""Instruments of the benchmarks: time in interleaved rounds, peak memory, operators, and the file with the figures.

Knows functions and arms (the sides of a comparison, by name), nothing of models. Another benchmark writes its arms as functions
without arguments, hands them to `time_rounds`, and `summary` and `write_results` do the rest. Torch is imported inside, as everywhere here.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

PACKAGES = ("torch", "peft", "transformers", "peft-s2lora")
RESULTS = Path("benchmarks/results")

Arms = Mapping[str, Callable[[], object]]
Seconds = dict[str, dict[str, list[float]]]  # stage -> arm -> seconds of every round

T = TypeVar("T")

# ---- time --------------------------------------------------------------------------------------------------------------


def time_rounds(
    stages: Mapping[str, Arms],
    rounds: int,
    *,
    warmups: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> Seconds:
    """Run every arm of every stage once a round and return the seconds that `clock` saw.

    The arms of a stage follow each other directly (A B C, then B C A, ...), so that a machine that slows down slows all of them, and each
    comes first in turn. `warmups` rounds come first and are not kept. Python's garbage collector rests while an arm runs.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}.")
    seconds: Seconds = {stage: {arm: [] for arm in arms} for stage, arms in stages.items()}
    gc.collect()
    gc.freeze()  # the arms' models are no garbage: do not look through them before every measurement
    try:
        for number in range(-warmups, rounds):
            for stage, arms in stages.items():
                for arm in _rotated(list(arms), number):
                    took = time_once(arms[arm], device, clock)
                    if number >= 0:
                        seconds[stage][arm].append(took)
            if progress:
                print(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up", flush=True)
    finally:
        gc.unfreeze()
    return seconds


def time_once(function: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, to the end of what it started on the device."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return clock() - start
    finally:
        if enabled:
            gc.enable()


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if not device.startswith("cpu"):
        import torch

        torch.cuda.synchronize(device)


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def summary(seconds: Mapping[str, Sequence[float]], references: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """arm -> median seconds and, to each reference arm, the median, lowest and highest of the ratios taken round by round.

    A ratio within a round compares neighbours in time; the ratio of two medians may compare different weather.
    """
    rows: dict[str, dict[str, Any]] = {arm: {"seconds": statistics.median(took)} for arm, took in seconds.items()}
    for reference in references:
        if reference in seconds:
            for arm, took in seconds.items():
                ratios = [one / other for one, other in zip(took, seconds[reference], strict=True)]
                rows[arm][f"to_{reference}"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return rows


# ---- memory ------------------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most memory that torch held at once while `function` ran, beyond what it held before.

    On a CPU: the running sum over every allocation and release that torch's allocator reports to the profiler. That is exact, the same on
    every machine, and includes the scratch space inside kernels, which a `TorchDispatchMode` does not see. (Scratch that a library
    under torch takes by itself is in `peak_resident_bytes` only.) What existed before and is released meanwhile is not deducted.
    """
    import torch

    gc.collect()
    if not device.startswith("cpu"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: what happened in one nanosecond stays in order
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def peak_resident_bytes(function: Callable[[], object]) -> int | None:
    """How far the resident memory of this process rose while `function` ran, as the Linux kernel saw it; None on other systems.

    A second opinion on `peak_bytes`: it includes everything, also code that is touched for the first time and what the C library keeps,
    so give it a fresh process (`in_new_process`) that has warmed up.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    _return_freed_memory_at_once()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    assert match is not None, f"no {field} in /proc/self/status"
    return int(match[1]) * 1024


def _return_freed_memory_at_once() -> None:
    """Make glibc map every block from 64 KiB up by itself, so that a freed tensor leaves the process instead of a hole in its heap."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also stops glibc from raising it by itself
        libc.mallopt(mmap_threshold, 64 * 1024)
        libc.malloc_trim(0)


def in_new_process(function: Callable[..., T], *args: Any) -> T:
    """The result of `function(*args)` in a process of its own. Function and arguments must be picklable."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr; read when the child imports torch
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- operators ---------------------------------------------------------------------------------------------------------


def count_operators(function: Callable[[], object]) -> int:
    """Operators that torch dispatches while `function` runs, views among them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return operator(*args, **(kwargs or {}))

    with Counter() as counter:
        function()
    return counter.count


# ---- what ran, on what -------------------------------------------------------------------------------------------------


def use_threads(threads: int) -> None:
    """Let torch compute on this many threads. The libraries below it read the variable when a child process starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Command, commit, date, machine and versions of this run. Called at its end, so that the load is that of the measured minutes."""
    import torch

    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "hardware": hardware(device)}
    return {
        "command": command(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine | {"load_of_15_minutes": round(os.getloadavg()[2], 2) if hasattr(os, "getloadavg") else None},
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }


def command() -> str:
    """The command line that started this process, without the interpreter's path."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` where a tracked file differs from it; None outside of a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def hardware(device: str = "cpu") -> str:
    """A short name for file names: `cpu-epyc-zen5`, `cpu-xeon-platinum-8488c`, `gpu-h200`."""
    if not device.startswith("cpu"):
        import torch

        return f"gpu-{_slug(torch.cuda.get_device_name(device))}"
    return f"cpu-{cpu_slug(_cpuinfo(), platform.processor() or platform.machine())}"


def cpu_slug(cpuinfo: Mapping[str, str], otherwise: str) -> str:
    """Name from the first processor of /proc/cpuinfo, with the core's generation where AMD's name does not say it."""
    name = _slug(cpuinfo.get("model name") or otherwise)
    generation = _zen(int(cpuinfo.get("cpu family", 0)), int(cpuinfo.get("model", 0))) if "AMD" in cpuinfo.get("vendor_id", "") else None
    return f"{name}-{generation}" if generation else name


def _slug(name: str) -> str:
    name = re.sub(r"\((r|tm|c)\)|@.*|\b(amd|intel|nvidia|cpu|processor|geforce|\d+-core)\b", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) or "unknown"


def _zen(family: int, model: int) -> str | None:
    """AMD's core from family and model as /proc/cpuinfo has them."""
    if family == 0x17:
        return "zen2" if model >= 0x30 else "zen1"
    if family == 0x19:
        return "zen4" if 0x10 <= model < 0x20 or model >= 0x60 else "zen3"
    return "zen5" if family == 0x1A else None


def _cpuinfo() -> dict[str, str]:
    """Field -> value for the first processor; empty where there is no /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


# ---- the file and the table --------------------------------------------------------------------------------------------


def write_results(folder: Path, what: str, model: str, results: Mapping[str, Any]) -> Path:
    """Write `<what>_<model>_<hardware>_<date>.json`; hardware and date are those of `provenance` in the results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}_{model}_{results['machine']['hardware']}_{results['date']}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is aligned to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines)
