"""The benchmarks of serving and of whole transcriptions at toy size: every arm runs and does the same work. No test looks at seconds."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, build_tiny_model, tone, write_adapter

from benchmarks import pipeline, serving
from benchmarks.pipeline import CPU_ARMS, pipeline_table
from benchmarks.s2lora import Sizes
from benchmarks.serving import ARMS, Request, Settings, memory, memory_table, serve, throughput, throughput_table
from whisper_moe import AdapterRegistry, Transcriber

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=400, frames=300, positions=pipeline.TOKENS + pipeline.PROMPT)


@pytest.fixture(autouse=True)
def one_thread_as_before() -> Iterator[None]:
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS", None)
    if variable is not None:
        os.environ["OMP_NUM_THREADS"] = variable


def requests(*names: str) -> list[Request]:
    return [Request(name, name.encode()) for name in names]


# ---- users -------------------------------------------------------------------------------------------------------------


def test_users_are_served_at_the_same_time_and_every_request_once() -> None:
    together = threading.Barrier(3, timeout=20)  # passed only by three at once
    asked: list[str] = []

    def ask(request: Request) -> str:
        together.wait()
        asked.append(request.name)
        return request.name.upper()

    waits: list[float] = []
    serve(ask, requests(*"abcdef"), 3, waits, {name: name.upper() for name in "abcdef"})
    assert sorted(asked) == list("abcdef")
    assert len(waits) == 6


def test_another_text_than_alone_ends_the_run_and_is_shown() -> None:
    with pytest.raises(AssertionError, match="b: 'x' among others, 'y' alone"):
        serve(lambda request: "x", requests("a", "b"), 2, [], {"a": "x", "b": "y"})


def test_what_a_request_raises_comes_out() -> None:
    def ask(request: Request) -> str:
        raise ValueError("no such language")

    with pytest.raises(ValueError, match="no such language"):
        serve(ask, requests("a", "b"), 2, [])


# ---- throughput and memory ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transcriber(tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Transcriber:
    model = build_tiny_model(tiny_processor)
    folder = write_adapter(tmp_path_factory.mktemp("adapters") / "cy", model, "cy")
    return Transcriber(model, tiny_processor, AdapterRegistry([folder]))


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    def encoded(frequency: float) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, tone(frequency), SAMPLE_RATE, format="WAV")
        return file.getvalue()

    return [Request("low", encoded(200), "en"), Request("high", encoded(900), "cy"), Request("named", encoded(500), adapter="cy")]


def test_every_arm_answers_every_user(transcriber: Transcriber, asked: list[Request]) -> None:
    results = throughput(transcriber, asked, Settings(users=(1, 4), requests=4, rounds=2))
    assert list(results["summary"]) == ["1 user", "4 users"]
    for stage, rows in results["summary"].items():
        assert tuple(rows) == ARMS
        for arm, row in rows.items():
            assert len(results["seconds"][stage][arm]) == 2
            assert row["wait_median_s"] <= row["wait_p95_s"]
            assert row["requests_per_second"] == pytest.approx(2 * 4 / sum(results["seconds"][stage][arm]))
        assert rows["one_at_a_time"]["times_one_at_a_time"]["median"] == 1
    assert results["rows_in_a_batch"]["1 user"] == 1
    assert all(f"{stage}: {arm}" in throughput_table(results) for stage in results["summary"] for arm in ARMS)


def test_memory_is_looked_at_ten_times(monkeypatch: pytest.MonkeyPatch, transcriber: Transcriber, asked: list[Request]) -> None:
    sizes = iter(range(0, 11 * 3000, 3000))
    monkeypatch.setattr(serving, "_status_bytes", lambda field: next(sizes))
    results = memory(transcriber, asked, Settings(memory_requests=20))
    assert results["requests"] == list(range(0, 22, 2))
    assert results["bytes_per_request_of_the_second_half"] == pytest.approx(1500)
    assert "1.5 KiB" in memory_table(results)


def test_recordings_are_asked_for_with_and_without_their_language() -> None:
    class Known:
        registry = ()

    names = [each.name for each in serving.requests_of(Known())]  # type: ignore[arg-type]
    assert "welsh.ogg, detected" in names
    assert "welsh.ogg, given" in names
    assert len(names) == len(set(names))


# ---- whole transcriptions ----------------------------------------------------------------------------------------------


def test_ours_and_the_pipeline_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "MODELS", {"tiny": TOY})
    command = ["pipeline", "--dtypes", "float32", "--batch-size", "3", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    pipeline.main()
    (path,) = tmp_path.glob("pipeline_tiny_*.json")
    results = json.loads(path.read_text())
    rows = results["summary"]["float32"]
    assert set(rows) == set(CPU_ARMS)
    for arm, row in rows.items():
        assert row["real_time_factor"] == pytest.approx(3 * 3 * 2 / sum(results["seconds"]["float32"][arm]))
    assert pipeline_table(results) in capsys.readouterr().out


def test_all_recordings_share_one_batch(tmp_path: Path) -> None:
    processor = pipeline.processor_for(TOY)
    base = pipeline.base_for(TOY, processor)
    transcriber = Transcriber(base, processor, AdapterRegistry(pipeline.write_adapters(tmp_path, base, ["cy", "br"], 2)))
    waves = [pipeline.recording(1, 3.0)[: 3 * SAMPLE_RATE] * level for level in (1, 0.5)]
    pipeline.together(transcriber, waves, ["cy", "br"], None)
    assert (transcriber.engine.num_batches, transcriber.engine.num_rows) == (1, 2)
    with pytest.raises(ValueError, match="nobody"):
        pipeline.together(transcriber, waves, ["cy", "br"], "nobody")


def test_an_arm_that_does_less_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "pipelined", lambda *_, **__: [""])
    with pytest.raises(AssertionError, match="transformers: 0 positions"):
        pipeline.measure(TOY, ["float32"], pipeline.Settings(batch_size=1, rounds=1))


def test_more_rows_than_languages_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        pipeline.Settings(batch_size=17)
