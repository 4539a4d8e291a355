"""Many people at once: what a server writes in a second when windows of all of them share batches, and how long each of them waits.

    python -m benchmarks.serving                    both parts on one core, with the pocket that is shipped
    python -m benchmarks.serving --part memory      1,000 requests, and what they leave behind
    python -m benchmarks.serving --smoke            seconds, to see that it runs

Every user is a thread that asks again as soon as it has its answer: another recording, language and adapter each time. Arms:

    one_at_a_time   ours, with a lock around it
    engine          ours, as it is
    transformers    its speech recognition pipeline with a lock around it, greedily too (left alone it takes five beams): the same
                    recordings and languages, no adapters

What either of ours writes for a recording is compared with what it writes for that one alone; a difference ends the run. The recordings
are the demo's examples and, where the shared speech is there, short real ones.
"""

from __future__ import annotations

import io
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from benchmarks._measure import RESULTS, Arms, _status_bytes, provenance, summary, table, time_rounds, use_threads, write_results

if TYPE_CHECKING:
    from whisper_moe import Transcriber

EXAMPLES = Path(__file__).parent.parent / "demo" / "examples"
SHARED = Path(__file__).parent.parent.parent / "shared" / "speech" / "multi_read"
ARMS = ("one_at_a_time", "engine", "transformers")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LONGEST_S = 9.0  # of a real recording: one window each, as the pipeline wants it
MEMORY_USERS, MEMORY_STEPS = 8, 10

Ask: TypeAlias = Callable[["Request"], str]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    part: Literal["throughput", "memory", "all"] = "all"
    users: tuple[int, ...] = (1, 8, 50)
    requests: int = 100
    """Of all users together, in a round of an arm; at least one each."""
    rounds: int = 3
    memory_requests: int = 1000
    model: Path | None = None
    """A folder; left out, the pocket."""
    adapters: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. Waits are of the wall always."""
    smoke: bool = False
    out: Path = RESULTS
    """Folder for the JSON."""


@dataclass(frozen=True)
class Request:
    """What somebody asks for: a file's bytes, and the options of `Transcriber.transcribe`."""

    name: str
    audio: bytes
    language: str | None = None
    adapter: str | None = None


# ---- what is asked -----------------------------------------------------------------------------------------------------


def requests_of(transcriber: Transcriber) -> list[Request]:
    """Each recording with the language detected and with the language given, examples of adapters with those."""
    rows = json.loads((EXAMPLES / "examples.json").read_text("utf-8"))
    found = []
    for row in rows:
        audio = (EXAMPLES / row["file"]).read_bytes()
        adapter = row["adapter"] if row["adapter"] in {each.name for each in transcriber.registry} else None
        found.append(Request(f"{row['file']}, detected", audio, adapter=adapter))
        found.append(Request(f"{row['file']}, given", audio, language=row["language"], adapter=adapter))
    english = (EXAMPLES / "english.wav").read_bytes()  # a language that cannot be heard is asked for by its adapter
    found += [Request(f"english.wav, {adapter.name}", english, adapter=adapter.name) for adapter in transcriber.registry]
    found += [Request(f"{name}, detected", audio) for name, audio in real_recordings()]
    return found


def real_recordings() -> list[tuple[str, bytes]]:
    """Short ones of the shared speech, if it is there."""
    if not SHARED.is_dir():
        return []
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(SHARED / "test.parquet", columns=["audio", "duration_s", "language"]).to_pylist()
    return [(f"multi_read {n} ({row['language']})", row["audio"]["bytes"]) for n, row in enumerate(rows) if row["duration_s"] < LONGEST_S]


def ours(transcriber: Transcriber, lock: AbstractContextManager[Any]) -> Ask:
    def ask(request: Request) -> str:
        with lock:
            return transcriber.transcribe(io.BytesIO(request.audio), language=request.language, adapter=request.adapter).text

    return ask


def pipelined(transcriber: Transcriber, lock: AbstractContextManager[Any]) -> Ask:
    """Transformers' pipeline on the same base model."""
    import copy

    from transformers import pipeline

    from whisper_moe.audio import SAMPLE_RATE, load_audio

    transcriber.unload()  # a copy of the bare base
    model, processor = copy.deepcopy(transcriber.model), transcriber.processor
    recognize = pipeline(
        "automatic-speech-recognition", model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    known = set(transcriber.detectable_languages)

    def ask(request: Request) -> str:
        told = {"language": request.language} if request.language in known else {}
        with lock:
            recording: dict[str, Any] = {"raw": load_audio(io.BytesIO(request.audio)), "sampling_rate": SAMPLE_RATE}
            longer = {"chunk_length_s": transcriber.window_s} if len(recording["raw"]) > transcriber.window_s * SAMPLE_RATE else {}
            text: str = recognize(recording, generate_kwargs={"task": "transcribe", "num_beams": 1, **told}, **longer)["text"]
            return text.strip()

    return ask


# ---- users -------------------------------------------------------------------------------------------------------------


def serve(ask: Ask, requests: Sequence[Request], num_users: int, waits: list[float], expected: dict[str, str] | None = None) -> None:
    """Have users ask for all requests between them; every one's wait, in seconds, is added to `waits`. What goes wrong comes out."""
    todo: Iterator[Request] = iter(requests)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def use() -> None:
        while not failures:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            started = time.perf_counter()
            try:
                text = ask(request)
                if expected is not None and text != expected[request.name]:
                    raise AssertionError(f"{request.name}: {text!r} among others, {expected[request.name]!r} alone")
            except BaseException as error:
                failures.append(error)
                raise
            waits.append(time.perf_counter() - started)

    users = [threading.Thread(target=use, name=f"user {number}") for number in range(num_users)]
    previous, threading.excepthook = threading.excepthook, lambda _: None  # told below, once
    try:
        for user in users:
            user.start()
        for user in users:
            user.join()
    finally:
        threading.excepthook = previous
    if failures:
        raise failures[0]


def cycle(requests: Sequence[Request], count: int) -> list[Request]:
    return [requests[number % len(requests)] for number in range(count)]


# ---- measuring ---------------------------------------------------------------------------------------------------------


def throughput(transcriber: Transcriber, requests: Sequence[Request], settings: Settings) -> dict[str, Any]:
    """Requests a second and seconds of waiting, by number of users and arm."""
    lock = threading.Lock()
    asks = {
        "one_at_a_time": ours(transcriber, lock),
        "engine": ours(transcriber, nullcontext()),
        "transformers": pipelined(transcriber, lock),
    }
    alone = {request.name: asks["one_at_a_time"](request) for request in requests}  # warms up as well
    asks["transformers"](requests[0])
    stages: dict[str, Arms] = {}
    waits: dict[str, dict[str, list[float]]] = {}
    batches: dict[str, list[int]] = {}
    for users in settings.users:
        asked = cycle(requests, max(users, settings.requests))
        stage = f"{users} user{'s' if users > 1 else ''}"
        waits[stage] = {arm: [] for arm in ARMS}

        def run(arm: str, stage: str, asked: Sequence[Request], users: int) -> None:
            before = transcriber.engine.num_batches, transcriber.engine.num_rows
            serve(asks[arm], asked, users, waits[stage][arm], None if arm == "transformers" else alone)
            if arm == "engine":
                batches[stage] = [transcriber.engine.num_batches - before[0], transcriber.engine.num_rows - before[1]]

        stages[stage] = {arm: partial(run, arm, stage, asked, users) for arm in ARMS}
    seconds = time_rounds(stages, settings.rounds, warmups=0, clock=CLOCKS[settings.clock], progress=True)
    found: dict[str, Any] = {"summary": {}, "rows_in_a_batch": {stage: rows / num for stage, (num, rows) in batches.items()}}
    for stage, users in zip(stages, settings.users, strict=True):
        count = max(users, settings.requests)
        rows = summary(seconds[stage], ("one_at_a_time", "transformers"))
        found["summary"][stage] = {
            arm: {
                "requests": count,
                "requests_per_second": count / row["seconds"],
                **{f"times_{other}": _inverse(row[f"to_{other}"]) for other in ("one_at_a_time", "transformers")},
                "wait_median_s": statistics.median(waits[stage][arm]),
                "wait_p95_s": sorted(waits[stage][arm])[round(0.95 * (len(waits[stage][arm]) - 1))],
            }
            for arm, row in rows.items()
        }
    return found | {"seconds": seconds}


def _inverse(ratio: dict[str, float]) -> dict[str, float]:
    """Of seconds -> of throughput."""
    return {"median": 1 / ratio["median"], "lowest": 1 / ratio["highest"], "highest": 1 / ratio["lowest"]}


def memory(transcriber: Transcriber, requests: Sequence[Request], settings: Settings) -> dict[str, Any]:
    """Resident bytes of this process after every tenth of the requests, and how they grow over the second half."""
    ask, step = ours(transcriber, nullcontext()), max(1, settings.memory_requests // MEMORY_STEPS)
    alone = {request.name: ask(request) for request in requests}
    counts, sizes = [0], [_status_bytes("VmRSS")]
    while counts[-1] < settings.memory_requests:
        serve(ask, cycle(requests, step), MEMORY_USERS, [], alone)
        counts.append(counts[-1] + step)
        sizes.append(_status_bytes("VmRSS"))
        print(f"{counts[-1]} requests: {sizes[-1] / 2**20:.0f} MiB", flush=True)
    half = len(counts) // 2
    slope = statistics.linear_regression(counts[half:], sizes[half:]).slope if len(counts) - half > 1 else 0.0
    return {"requests": counts, "resident_bytes": sizes, "bytes_per_request_of_the_second_half": slope, "users": MEMORY_USERS}


# ---- the run -----------------------------------------------------------------------------------------------------------


def throughput_table(results: dict[str, Any]) -> str:
    """A line for each number of users and arm."""
    lines = []
    for stage, arms in results["summary"].items():
        for arm, row in arms.items():
            ratios = [f"{row[f'times_{other}']['median']:.2f}" for other in ("one_at_a_time", "transformers")]
            waits = [f"{row['wait_median_s']:.2f}", f"{row['wait_p95_s']:.2f}"]
            lines.append([f"{stage}: {arm}", f"{row['requests_per_second']:.1f}", *ratios, *waits])
    return table(["", "requests/s", "x one at a time", "x transformers", "wait s, median", "p95"], lines)


def memory_table(results: dict[str, Any]) -> str:
    """A line for each tenth of the requests."""
    lines = [[f"{n} requests", f"{size / 2**20:.0f}"] for n, size in zip(results["requests"], results["resident_bytes"], strict=True)]
    lines.append(["growth of a request, second half", f"{results['bytes_per_request_of_the_second_half'] / 1024:.1f} KiB"])
    return table(["after", "resident MiB"], lines)


PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "throughput": (throughput, throughput_table),
    "memory": (memory, memory_table),
}


def main() -> None:
    import tyro

    import peft_s2lora  # noqa: F401 - registers S2-LoRA with PEFT
    from whisper_moe import Transcriber

    settings = tyro.cli(Settings, description=__doc__)
    if settings.smoke:
        settings = Settings(**vars(settings) | {"users": (1, 3), "requests": 4, "rounds": 1, "memory_requests": 20})
    use_threads(settings.threads)
    transcriber = Transcriber.from_pretrained(settings.model, settings.adapters or None, device="cpu", dtype=settings.dtype)
    requests = requests_of(transcriber)
    if settings.smoke:
        requests = requests[:3]
    name = "pocket" if settings.model is None else settings.model.name
    for part, (measure, as_table) in PARTS.items():
        if settings.part in (part, "all"):
            results = measure(transcriber, requests, settings)
            choices = {name: getattr(settings, name) for name in ("rounds", "clock", "dtype")}
            header = provenance() | {
                "part": part,
                "model": transcriber.describe(),
                "recordings": [each.name for each in requests],
                **choices,
            }
            path = write_results(settings.out, f"serving-{part}", name, header | results)
            print(f"\n{transcriber.describe()}, {settings.threads} thread(s)\n{as_table(results)}\n{path}\n", flush=True)


if __name__ == "__main__":
    main()
