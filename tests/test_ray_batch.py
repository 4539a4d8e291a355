"""Transcribing folders: what a run writes and how the next one goes on, files that cannot be read or kill their worker, and Ray itself.

Most of it needs no Ray: the actor and its ledger are plain classes. One test starts Ray on this machine with two workers, kills one in the
middle, and compares every text with the plain transcriber's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import soundfile
from conftest import ROOT, SAMPLE_RATE, build_tiny_model, noise, tone, write_adapter
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.batch_output import COLUMNS, BatchOutput, Known, subtitles
from whisper_moe.batch_references import evaluate_transcripts, read_references
from whisper_moe.batch_worker import MAX_DEATHS, BatchSettings, Ledger, TranscribeActor
from whisper_moe.cli import main
from whisper_moe.ray_batch import Recording, _is_known, list_recordings, transcribe_batch
from whisper_moe.transcribe import Transcriber

NUM_GOOD = 7


# ---- a folder of recordings, good and bad ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BatchSettings:
    """The tiny Whisper with adapters for two of its languages; every recording is in one of them."""
    from transformers import WhisperForConditionalGeneration

    folder = tmp_path_factory.mktemp("adapters")
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny_folder)
    write_adapter(folder / "km", whisper, "km", seed=1)
    write_adapter(folder / "tl", whisper, "tl", seed=2)
    return BatchSettings(model=str(tiny_folder), adapters=(str(folder),), allowed=("km", "tl"), threshold=0.0, device="cpu")


@pytest.fixture(scope="module")
def plain(model: BatchSettings) -> Callable[[Path], dict[str, Any]]:
    """What the plain transcriber writes for a file."""
    assert model.adapters is not None
    transcriber = Transcriber.from_pretrained(model.model, list(model.adapters), "cpu")
    return lambda path: transcriber.transcribe(path, allowed=model.allowed, threshold=0.0).to_dict()


def write_good(folder: Path) -> list[str]:
    """Recordings of different pitch, length, rate and depth in the folder; one is longer than the window."""
    names = []
    for number in range(NUM_GOOD):
        name = f"a/{number}.flac" if number % 2 else f"{number} é.wav"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sound = tone(150 + 70 * number, 5.0 if number == 3 else 1 + 0.1 * number) + noise(1, 0.01, number).mean()
        soundfile.write(folder / name, sound, SAMPLE_RATE if number % 3 else 8000)
        names.append(name)
    return names


def write_bad(folder: Path) -> dict[str, str]:
    """Recordings that cannot be used: name -> a part of the reason."""
    (folder / "bad").mkdir(parents=True, exist_ok=True)
    (folder / "bad/empty.wav").touch()
    (folder / "bad/noise.mp3").write_bytes(bytes(range(256)) * 8)
    soundfile.write(folder / "bad/long.ogg", tone(300, 12.0), SAMPLE_RATE)
    soundfile.write(folder / "bad/whole.flac", noise(4.0), SAMPLE_RATE)
    (folder / "bad/cut.flac").write_bytes((folder / "bad/whole.flac").read_bytes()[:20_000])
    (folder / "bad/whole.flac").unlink()
    (folder / "notes.txt").write_text("no recording")
    return {"bad/empty.wav": "empty", "bad/noise.mp3": "not a recording", "bad/long.ogg": "longer than", "bad/cut.flac": "damaged"}


def jobs_of(folder: Path, language: str | None = None) -> list[dict[str, Any]]:
    import fsspec

    return [each.job(language, "digest") for each in list_recordings(fsspec.filesystem("file"), str(folder)).values()]


def actor(model: BatchSettings, ledger: Ledger | None = None) -> TranscribeActor:
    import fsspec

    return TranscribeActor(model, fsspec.filesystem("file"), Ledger(1) if ledger is None else ledger)


def row_of(file: str, text: str = "bore da", **values: Any) -> dict[str, Any]:
    """A row of the output."""
    row = dict.fromkeys(COLUMNS, "x") | {"probability": 0.5, "no_speech": None, "duration_s": 1.5, "elapsed_s": 0.1, "language": "cy"}
    row |= {"warnings": ["one"], "segments": [{"start_s": 0.0, "end_s": 1.5, "text": text, "language": None}], "adapter": None}
    return row | {"file": file, "text": text, "finished_at": "2030-01-01T00:00:00"} | values


# ---- what there is -----------------------------------------------------------------------------------------------------


def test_recordings_are_listed_by_their_path_from_the_source_largest_first(tmp_path: Path) -> None:
    import fsspec

    good, bad = write_good(tmp_path), write_bad(tmp_path)
    (tmp_path / "LOUD.WAV").write_bytes(b"x")
    found = list_recordings(fsspec.filesystem("file"), str(tmp_path))
    assert set(found) == {*good, *bad, "LOUD.WAV"}
    sizes = [each.size for each in found.values()]
    assert sizes == sorted(sizes, reverse=True) == sorted((os.path.getsize(tmp_path / name) for name in found), reverse=True)
    assert len({each.stamp for each in found.values()}) > len(good)
    before = found["LOUD.WAV"].stamp
    os.utime(tmp_path / "LOUD.WAV", (1, 1))
    assert list_recordings(fsspec.filesystem("file"), str(tmp_path))["LOUD.WAV"].stamp != before


@pytest.mark.parametrize(("name", "said"), [("", "no recording in"), ("nowhere", "no folder"), ("note.txt", "no folder")])
def test_a_source_without_recordings_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(ValueError, match=said):
        transcribe_batch(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_kept_letter_for_letter_and_those_that_lead_elsewhere_are_refused(tmp_path: Path, model: BatchSettings) -> None:
    """An object store's keys are any text: none is a folder, and `..` means nothing to it."""
    keys = ["in/a/b.wav", "in/a//b.wav", "in//a/b.wav", "in/../../../x.wav", "in/./a/b.wav", "in/..a/b.wav", "in/b.wav"]

    class Bucket:
        def isdir(self, path: str) -> bool:
            return path == "bucket/in"

        def find(self, path: str, detail: bool) -> dict[str, dict[str, Any]]:
            return {f"bucket/{key}": {"size": 10, "ETag": "x"} for key in keys}

        def cat_file(self, path: str) -> bytes:
            read.append(path)
            return b"not a recording"

    read: list[str] = []
    found = list_recordings(Bucket(), "bucket/in")
    assert {each.path: name for name, each in found.items()} == {f"bucket/{key}": key.removeprefix("in/") for key in keys}
    worker = TranscribeActor(model, Bucket(), Ledger(1))
    results = {result["file"]: result for result in worker.transcribe([each.job(None, "digest") for each in found.values()])}
    good = {"a/b.wav", "..a/b.wav", "b.wav"}
    assert {name for name, result in results.items() if result["kind"] == "refused"} == set(found) - good
    assert all("is empty, '.' or '..'" in results[name]["reason"] for name in set(found) - good)
    assert sorted(read) == sorted(f"bucket/in/{name}" for name in good)
    known = Known("sha", "digest", "10 x", "2030", "cy", 1.0)
    assert [_is_known(found[name], known, "digest", {}, True) for name in ("a/b.wav", "../../../x.wav")] == [True, False]


# ---- the actor ---------------------------------------------------------------------------------------------------------


def test_the_actor_writes_what_the_plain_transcriber_writes(
    tmp_path: Path, model: BatchSettings, plain: Callable[[Path], dict[str, Any]]
) -> None:
    good = write_good(tmp_path)
    answer = actor(model)({"jobs": np.array([json.dumps(jobs_of(tmp_path))], dtype=object)})
    rows = {row["file"]: row for row in map(json.loads, answer["result"])}
    assert set(rows) == set(good)
    same = set(COLUMNS) - {"file", "sha256", "settings", "stamp", "finished_at", "elapsed_s"}
    for name, row in rows.items():
        expected = json.loads(json.dumps(plain(tmp_path / name)))
        assert {key: row[key] for key in same} == {key: expected[key] for key in same}
        assert row["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert {row["adapter"] for row in rows.values()} == {"km", "tl"}, "both adapters must have spoken, or switching was not tested"
    assert len({row["text"] for row in rows.values()}) > 3


def test_what_cannot_be_transcribed_is_reported_with_its_reason_and_passed_over(tmp_path: Path, model: BatchSettings) -> None:
    good, bad = write_good(tmp_path), write_bad(tmp_path)
    jobs = jobs_of(tmp_path)
    (tmp_path / good[0]).unlink()  # gone between the listing and the reading
    jobs[-1] = jobs[-1] | {"size": 5 * 2**30}
    jobs.append(jobs[-2] | {"name": "a\udcff.wav"})
    short = BatchSettings(**(vars(model) | {"max_duration_s": 10.0}))
    results = list(actor(short).transcribe(jobs))
    assert [result["file"] for result in results] == [job["name"] for job in jobs]
    failed = {result["file"]: (result["kind"], result["reason"]) for result in results if "kind" in result}
    expected = {name: ("audio", reason) for name, reason in bad.items() if name != jobs[-2]["name"]}
    expected |= {good[0]: ("unreadable", "No such file"), jobs[-2]["name"]: ("too large", "5.0 GiB"), "a\udcff.wav": ("refused", "UTF-8")}
    assert failed.keys() == expected.keys()
    for name, (kind, reason) in expected.items():
        assert failed[name][0] == kind
        assert reason in failed[name][1]


def test_a_fault_of_the_model_costs_one_file(tmp_path: Path, model: BatchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_good(tmp_path)
    worker, calls = actor(model), []
    whole = worker.transcriber.transcribe

    def faulty(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return whole(*arguments, **options)

    monkeypatch.setattr(worker.transcriber, "transcribe", faulty)
    results = list(worker.transcribe(jobs_of(tmp_path)))
    assert [result.get("kind") for result in results] == [None, "failed", *[None] * (NUM_GOOD - 2)]
    assert results[1]["reason"] == "RuntimeError: out of memory"


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_worker_whose_gpu_is_lost_dies_over_that_file_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """A pretended GPU: where it is lost, every later call in the same process fails; where memory was short, none does."""
    import torch

    write_good(tmp_path)
    jobs, ledger = jobs_of(tmp_path)[-4:], Ledger(1)
    poisoned: list[int] = []
    deadly = soundfile.info(jobs[2]["path"]).duration

    def touch(device: Any = None) -> None:
        if poisoned:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered", 710)

    def transcribe(samples: Any, **options: Any) -> Any:
        touch()
        if len(samples) == round(deadly * SAMPLE_RATE):
            poisoned.extend([1] * is_lost)
            raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED") if is_lost else torch.OutOfMemoryError("CUDA out of memory.")
        return SimpleNamespace(to_dict=lambda: row_of(""))

    def die(code: int) -> None:
        assert code != 0
        raise Killed

    whisper = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(BatchSettings, "load", lambda *_: SimpleNamespace(model=whisper, transcribe=transcribe))
    monkeypatch.setattr(torch.cuda, "synchronize", touch)
    monkeypatch.setattr(os, "_exit", die)
    results: list[dict[str, Any]] = []
    while not results:
        poisoned.clear()  # a new process has a new GPU
        with suppress(Killed):
            results = list(actor(BatchSettings(), ledger).transcribe(jobs))
    assert [result.get("kind") for result in results] == [None, None, "killed its worker" if is_lost else "failed", None]
    assert ledger.num_deaths() == (MAX_DEATHS if is_lost else 0)


def test_a_recording_with_a_language_of_its_own_is_written_in_it(tmp_path: Path, model: BatchSettings) -> None:
    write_good(tmp_path)
    first, second, third, *_ = jobs_of(tmp_path)
    results = list(actor(model).transcribe([first | {"language": "de"}, second | {"language": "xx"}, third]))
    assert results[0]["language"] == "de"
    assert results[0]["adapter"] is None
    assert results[1]["kind"] == "refused"
    assert "'xx'" in results[1]["reason"]
    assert results[2]["language"] in ("km", "tl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": 2.0}, "threshold is a probability"),
        ({"allowed": ("xx!",)}, "no language known here"),
        ({"adapter": "nobody"}, "nobody"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_stop_the_worker_before_any_file(model: BatchSettings, change: dict[str, Any], said: str) -> None:
    ledger = Ledger(1)
    with pytest.raises((ValueError, OSError)):
        actor(BatchSettings(**(vars(model) | change)), ledger)
    assert said in (ledger.problem() or "")


def test_an_adapter_that_does_not_fit_stops_the_worker_before_any_file(tmp_path: Path, model: BatchSettings, tiny_processor: Any) -> None:
    """Unless nobody can come to it."""
    folder = tmp_path / "adapters"
    write_adapter(folder / "km", build_tiny_model(tiny_processor), "km")
    small = write_adapter(folder / "tl", build_tiny_model(tiny_processor), "tl")
    row = json.loads((small / "adapter_config.json").read_text())
    (small / "adapter_config.json").write_text(json.dumps(row | {"r": 1}))
    card = json.loads((small / "language_adapter.json").read_text())
    (small / "language_adapter.json").write_text(json.dumps(card | {"base_signature": None}))
    ledger = Ledger(1)
    broken = replace(model, adapters=(str(folder),))
    with pytest.raises(ValueError, match="does not fit this model"):
        actor(broken, ledger)
    assert "does not fit this model" in (ledger.problem() or "")
    assert actor(replace(broken, adapter="none")).transcriber.registry.languages() == ["km", "tl"]
    assert actor(replace(broken, adapter="km")).transcriber.registry.languages() == ["km", "tl"]


COMMAND = """
import pickle, sys
from unittest.mock import patch
import whisper_moe.ray_batch
from whisper_moe.cli import main
with patch.object(whisper_moe.ray_batch, "transcribe_batch") as run:
    run.return_value.num_failed = 0
    assert main(["batch", *sys.argv[2:]]) == 0
sys.stdout.flush()
with open(sys.argv[1], "wb") as file:
    pickle.dump((run.call_args.args[2], run.call_args.kwargs["load"]), file)
"""
WORKER = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    settings, load = pickle.load(file)
transcriber = settings.load(load)
print(load.__module__.partition(".")[0], *sorted(adapter.peft_type for adapter in transcriber.registry))
"""


def test_workers_of_the_command_know_every_method_and_trust_no_stranger(tmp_path: Path, tiny_folder: Path, tiny_processor: Any) -> None:
    """In processes of their own, as workers are: nothing that this one has imported helps them."""
    from peft_s2lora import S2LoraConfig
    from whisper_moe import LoraMoeConfig

    base, targets = build_tiny_model(tiny_processor), ["q_proj", "v_proj"]
    write_adapter(tmp_path / "adapters" / "km", base, "km", peft_config=S2LoraConfig(r=2, target_modules=targets))
    write_adapter(tmp_path / "adapters" / "tl", base, "tl", peft_config=LoraMoeConfig(r=2, target_modules=targets))
    write_adapter(tmp_path / "adapters" / "cy", base, "cy")

    options = ("in", "out", "--model", tiny_folder, "--adapters", tmp_path / "adapters", "--device", "cpu")
    asked = run_python(COMMAND, tmp_path, "asked", *map(str, options))
    assert asked.returncode == 0, asked.stderr
    worker = run_python(WORKER, tmp_path, "asked")
    assert worker.stdout.split() == ["hub_utils", "LORA", "LORAMOE", "S2LORA"], worker.stderr


# ---- workers that die --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A worker's death, as the ledger sees it: nothing after it is run."""


def run_to_the_end(model: BatchSettings, jobs: list[dict[str, Any]], deadly: Callable[[str], bool]) -> tuple[list[dict[str, Any]], Ledger]:
    """What Ray does: a worker that died is started anew and gets the same group."""
    ledger = Ledger(1)
    for _ in range(20):
        worker = actor(model, ledger)
        read = worker._read

        def reading(path: str, read: Any = read) -> Any:
            if deadly(path):
                raise Killed
            return read(path)

        worker._read = reading  # type: ignore[method-assign]
        try:
            return list(worker.transcribe(jobs)), ledger
        except Killed:
            continue
    raise AssertionError("it never ended")


def test_a_file_that_kills_every_worker_is_given_up_and_its_neighbours_are_not(tmp_path: Path, model: BatchSettings) -> None:
    write_good(tmp_path)
    jobs = jobs_of(tmp_path)[-4:]
    results, ledger = run_to_the_end(model, jobs, lambda path: path == jobs[2]["path"])
    assert [result.get("kind") for result in results] == [None, None, "killed its worker", None]
    assert ledger.num_deaths() == MAX_DEATHS


def test_a_worker_that_dies_once_costs_no_file(tmp_path: Path, model: BatchSettings) -> None:
    write_good(tmp_path)
    jobs, died = jobs_of(tmp_path)[-4:], []

    def once(path: str) -> bool:
        if path == jobs[2]["path"] and not died:
            died.append(path)
            return True
        return False

    results, ledger = run_to_the_end(model, jobs, once)
    assert [result["file"] for result in results] == [job["name"] for job in jobs]
    assert not [result for result in results if "kind" in result]
    assert ledger.num_deaths() == 1


def test_workers_that_die_before_they_finish_anything_stop_the_run() -> None:
    ledger = Ledger(2)
    assert all(ledger.start() is None for _ in range(2 * (1 + MAX_DEATHS)))
    assert "before they had finished a single file" in (ledger.start() or "")


def test_a_finished_file_lets_workers_start_again() -> None:
    ledger = Ledger(1)
    for _ in range(10):
        assert ledger.start() is None
        ledger.begin("a")
        ledger.end("a")


# ---- the output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_rows_come_back_as_they_were_written(tmp_path: Path, file_format: Any) -> None:
    rows = [row_of(f"{number}.wav", text=f"dŵr {number} ྐ") for number in range(5)] + [row_of("s.wav", "", segments=[], language=None)]
    with BatchOutput(tmp_path, file_format, shard_rows=2) as output:
        for row in rows:
            output.add(row)
    again = BatchOutput(tmp_path, file_format, shard_rows=2)
    assert sorted(again.rows(), key=lambda row: row["file"]) == rows
    assert again.known["3.wav"].sha256 == "x"
    assert len(list((tmp_path / "transcripts").iterdir())) == 3
    if file_format == "parquet":
        assert sum(parquet.read_metadata(path).num_rows for path in (tmp_path / "transcripts").iterdir()) == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcde"), st.text(max_size=3)), max_size=6), max_size=4), st.booleans())
def test_after_any_runs_each_file_has_one_row_the_last_one(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[tuple[str, str]]], tidy: bool
) -> None:
    """Against a dict, with runs that end tidily or are cut off after their shards."""
    folder, expected, clock = tmp_path_factory.mktemp("runs"), {}, 0
    for run in runs:
        output = BatchOutput(folder, shard_rows=2)
        for file, text in run:
            clock += 1
            output.add(row_of(file, text, finished_at=f"{clock:05d}"))
            expected[file] = text
        output.flush()
        if tidy:
            output.tidy()
            assert sum(len(path.read_text().splitlines()) for path in (folder / "transcripts").glob("*.jsonl")) == len(expected)
    found = [(row["file"], row["text"]) for row in BatchOutput(folder).rows()]
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_a_run_killed_while_it_tidies_up_leaves_no_row_twice(tmp_path: Path) -> None:
    with BatchOutput(tmp_path, shard_rows=2) as output:
        for number in range(5):
            output.add(row_of(f"{number}.wav"))
    shard = next((tmp_path / "transcripts").iterdir())
    shutil.copy(shard, tmp_path / "transcripts" / "joined.jsonl")  # written, and the old one not yet removed
    (tmp_path / "transcripts" / ".1234.new").write_text('{"half')
    again = BatchOutput(tmp_path, shard_rows=2)
    assert sorted(row["file"] for row in again.rows()) == [f"{number}.wav" for number in range(5)]
    again.tidy()
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "transcripts").iterdir()) == 5


def test_of_two_rows_the_later_one_counts_whatever_their_shards_are_called(tmp_path: Path) -> None:
    (tmp_path / "transcripts").mkdir()
    for shard, text, at in (("a", "new", "2030"), ("b", "old", "2029")):
        (tmp_path / "transcripts" / f"{shard}.jsonl").write_text(json.dumps(row_of("1.wav", text, finished_at=at)) + "\n")
    assert [row["text"] for row in BatchOutput(tmp_path).rows()] == ["new"]


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = BatchOutput(tmp_path, shard_rows=1)
    output.add(row_of("first.wav"))

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            output.add(row_of("second.wav"))
    assert [row["file"] for row in BatchOutput(tmp_path).rows()] == ["first.wav"]
    assert len(list((tmp_path / "transcripts").iterdir())) == 1
    output.flush()  # there is room again
    assert [row["file"] for row in BatchOutput(tmp_path).rows()] == ["first.wav", "second.wav"]


def test_a_shard_of_somebody_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "transcripts").mkdir()
    (tmp_path / "transcripts" / "theirs.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"theirs\.jsonl is no shard"):
        BatchOutput(tmp_path)


def test_the_output_may_lie_in_a_bucket() -> None:
    """In the memory of this process, which is as little a disk as a bucket is."""
    with BatchOutput("memory://bucket/out", texts=["txt"], shard_rows=2) as output:
        for number in range(3):
            output.add(row_of(f"{number}.wav"))
        output.fail("bad.wav", "audio", "empty")
        output.tidy()
    import fsspec

    fs = fsspec.filesystem("memory")
    assert fs.cat_file("/bucket/out/txt/2.wav.txt") == b"bore da\n"
    assert json.loads(fs.cat_file("/bucket/out/errors.jsonl")) == {"file": "bad.wav", "kind": "audio", "reason": "empty"}
    assert len(list(BatchOutput("memory://bucket/out").rows())) == 3


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_texts_of_earlier_transcripts_are_written_where_they_are_missing_or_old(tmp_path: Path, file_format: Any) -> None:
    with BatchOutput(tmp_path, file_format, shard_rows=2) as output:
        for name in ("a/1.wav", "2.wav", "3.wav", "gone.wav"):
            output.add(row_of(name, f"bore da {name}"))
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "2.wav.srt").write_text("of an earlier recording")
    (tmp_path / "srt" / "3.wav.srt").write_text(subtitles(row_of("3.wav", "bore da 3.wav")["segments"]))
    before = (tmp_path / "srt" / "3.wav.srt").stat()
    with BatchOutput(tmp_path, file_format, ["srt"]) as output:
        output.write_texts({"a/1.wav", "2.wav", "3.wav"})
    found = {path.relative_to(tmp_path / "srt").as_posix(): path.read_text() for path in (tmp_path / "srt").rglob("*.srt")}
    assert found == {f"{name}.srt": subtitles(row_of(name, f"bore da {name}")["segments"]) for name in ("a/1.wav", "2.wav", "3.wav")}
    after = (tmp_path / "srt" / "3.wav.srt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "what is there is left alone"
    assert not (tmp_path / "txt").exists()


@pytest.mark.parametrize("name", ["../../x.wav", "a/../../../x.wav", "a//b.wav", "./a.wav", "/x.wav"])
def test_nothing_is_written_outside_the_output(tmp_path: Path, name: str) -> None:
    output = BatchOutput(tmp_path / "deep" / "out", texts=["txt"])
    with pytest.raises(ValueError, match="does not lead to a place in"):
        output.add(row_of(name))
    assert not list(tmp_path.rglob("*.txt"))


def test_subtitles_have_the_form_that_players_read() -> None:
    segments = [{"start_s": 0.0, "end_s": 1.25, "text": "Bore da."}, {"start_s": 3599.9996, "end_s": 3725.5, "text": "Nos da."}]
    assert subtitles(segments) == ("1\n00:00:00,000 --> 00:00:01,250\nBore da.\n\n2\n01:00:00,000 --> 01:02:05,500\nNos da.\n")


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Known: jsonl, parquet"):
        BatchOutput(tmp_path, "xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Known: txt, srt"):
        BatchOutput(tmp_path, texts=["doc"])  # type: ignore[list-item]


# ---- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_change_the_text_change_the_digest_and_others_do_not(model: BatchSettings, tmp_path: Path) -> None:
    def changed(**values: Any) -> str:
        return BatchSettings(**(vars(model) | values)).digest()

    assert changed() == changed(batch_size=3, device="cuda", imports=("peft_s2lora",))
    others = [changed(num_beams=2), changed(language="cy"), changed(threshold=0.5), changed(adapters=()), changed(dtype="bfloat16")]
    copy = tmp_path / "copy"
    shutil.copytree(model.model, copy)  # type: ignore[arg-type]
    assert changed(model=str(copy)) == changed(), "the same model in another place"
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    others.append(changed(model=str(copy)))
    assert len({changed(), *others}) == len(others) + 1


def test_who_speaks_for_which_language_is_part_of_the_digest(tmp_path: Path, model: BatchSettings) -> None:
    assert model.adapters is not None
    shutil.copytree(model.adapters[0], tmp_path / "merged")
    row = {"name": "km", "language": "km", "carrier": None, "folder": "km"}
    digests = []
    for rows in (
        [row],
        [row, row | {"name": "tl", "language": "tl"}],
        [row, row | {"name": "tl", "language": "tl", "folder": "tl"}],
        [row, row | {"name": "qug", "language": "qug", "carrier": "es"}],
        [row, row | {"name": "qug", "language": "qug", "carrier": "en"}],
        [row, row | {"name": "kichwa", "language": "qug", "carrier": "en"}],
    ):
        (tmp_path / "merged" / "merged_adapters.json").write_text(json.dumps({"format": 1, "adapters": rows}))
        digests.append(replace(model, adapters=(str(tmp_path / "merged"),)).digest())
        assert digests[-1] == replace(model, adapters=(str(tmp_path / "merged"),)).digest()
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("trust_listing", [False, True])
def test_a_file_counts_as_done_under_the_same_settings_and_language_alone(trust_listing: bool) -> None:
    recording = Recording("a.wav", "/in/a.wav", 10, "10 tag")
    done = Known("sha", "digest-cy", "10 tag", "2030", "cy", 1.0)
    assert _is_known(recording, done, "digest", {"a.wav": "cy"}, trust_listing)
    assert not _is_known(recording, None, "digest", {"a.wav": "cy"}, trust_listing)
    assert not _is_known(recording, done, "other", {"a.wav": "cy"}, trust_listing)
    assert not _is_known(recording, done, "digest", {"a.wav": "fr"}, trust_listing)
    assert not _is_known(recording, done, "digest", {}, trust_listing)
    changed = Recording("a.wav", "/in/a.wav", 10, "10 other tag")
    assert _is_known(changed, done, "digest", {"a.wav": "cy"}, trust_listing) != trust_listing, "its contents are still to be compared"
    untagged, nothing_known = Recording("a.wav", "/in/a.wav", 10, ""), Known("sha", "digest-cy", "", "2030", "cy", 1.0)
    assert _is_known(untagged, nothing_known, "digest", {"a.wav": "cy"}, trust_listing) != trust_listing


# ---- references --------------------------------------------------------------------------------------------------------


def test_references_are_found_by_name_and_error_rates_are_those_of_score(tmp_path: Path) -> None:
    import fsspec

    from whisper_moe import score

    for name in ("a/1.wav", "a/2.wav", "3.wav", "4.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    recordings = list_recordings(fsspec.filesystem("file"), str(tmp_path))
    table = tmp_path / "said.csv"
    table.write_text(
        "file_name,text,language\na/1.wav,bore da,cy\n./a/2.wav,nos da i chi,Welsh\n3.wav,bonjour,fr\n5.wav,gone,fr\n", "utf-8"
    )
    said = read_references(table, recordings)
    written = [row_of("a/1.wav", "bore dda"), row_of("a/2.wav", "nos da chi", language="fr"), row_of("4.wav", "?")]
    found = evaluate_transcripts(iter(written), said)
    (welsh,) = found["languages"]
    expected = score(["bore da", "nos da i chi"], ["bore dda", "nos da chi"], language="cy")
    assert (welsh["language"], welsh["files"]) == ("cy", 2)
    assert welsh["rates"]["mark-preserving"]["wer"]["value"] == expected.wer == 2 / 6
    assert welsh["rates"]["mark-preserving"]["cer"]["value"] == expected.cer
    assert (found["without_transcript"], found["heard_right"]) == (2, 0.5)


def test_references_of_other_files_are_refused(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "1.wav").write_bytes(b"x")
    (tmp_path / "said.csv").write_text("file_name,text\nclips/1.wav,bore da\n")
    with pytest.raises(ValueError, match=r"its first name is 'clips/1\.wav', a recording is called '1\.wav'"):
        read_references(tmp_path / "said.csv", list_recordings(fsspec.filesystem("file"), str(tmp_path)))


# ---- the door ----------------------------------------------------------------------------------------------------------


def test_without_ray_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_good(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(tmp_path), str(tmp_path / "out")]) == 2
    assert 'pip install "peft-s2lora[ray]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_importing_the_module_loads_neither_ray_nor_torch() -> None:
    code = "import sys, whisper_moe.ray_batch; print([name for name in ('ray', 'torch', 'transformers', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# ---- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray on this machine with room for two workers."""
    ray = pytest.importorskip("ray", reason='batches on Ray: pip install "peft-s2lora[ray]"')
    # Ray makes its workers yield to everything else on the machine: on a busy one they would never start.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, object_store_memory=80 * 2**20, **quiet)
    yield ray
    ray.shutdown()


def worker_processes(ray: Any) -> list[int]:
    """Process ids of the live actors that transcribe, of this Ray alone."""
    return [
        each["Pid"] for each in ray._private.state.actors().values() if "Transcribe" in each["ActorClassName"] and each["State"] == "ALIVE"
    ]


def test_two_workers_on_ray_write_what_one_transcriber_does_also_when_one_is_killed(
    tmp_path: Path, cluster: Any, model: BatchSettings, plain: Callable[[Path], dict[str, Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    good, bad = write_good(source), write_bad(source)
    short = BatchSettings(**(vars(model) | {"max_duration_s": 10.0}))
    seen: list[str] = []

    def kill_one(result: dict[str, Any]) -> None:
        seen.append(result["file"])
        if len(seen) == 1:
            killed, *_ = before = worker_processes(cluster)
            os.kill(killed, signal.SIGKILL)
            # Until it has been replaced: on a busy machine the other one would have written everything before that.
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and (killed in (now := worker_processes(cluster)) or len(now) < len(before)):
                time.sleep(0.1)

    (tmp_path / "said.csv").write_text("file_name,text\n" + "".join(f"{name},bore da\n" for name in good), "utf-8")
    first = transcribe_batch(
        source, out, short, references=tmp_path / "said.csv", texts=("txt", "srt"), concurrency=2, files_per_call=2, on_result=kill_one
    )
    assert sorted(seen) == sorted([*good, *bad]), "each file is answered once"
    rows = [json.loads(line) for path in (out / "transcripts").iterdir() for line in path.read_text("utf-8").splitlines()]
    assert sorted(row["file"] for row in rows) == sorted(good)
    for row in rows:
        expected = plain(source / row["file"])
        assert (row["text"], row["language"], row["adapter"]) == (expected["text"], expected["language"], expected["adapter"])
        assert (out / "txt" / f"{row['file']}.txt").read_text("utf-8") == row["text"] + "\n"
        assert (out / "srt" / f"{row['file']}.srt").read_text("utf-8") == subtitles(row["segments"])
    assert first.worker_deaths == 1
    assert (first.found, first.transcribed, first.kept, first.failed) == (NUM_GOOD + len(bad), NUM_GOOD, 0, {"audio": len(bad)})
    errors = {row["file"]: row["reason"] for row in map(json.loads, (out / "errors.jsonl").read_text().splitlines())}
    assert errors.keys() == bad.keys()
    assert all(reason in errors[name] for name, reason in bad.items())
    assert sum(row["files"] for row in first.languages.values()) == NUM_GOOD
    assert first.hours == pytest.approx(sum(row["duration_s"] for row in rows) / 3600, abs=1e-4)
    assert sum(row["files"] for row in first.evaluation["languages"]) == NUM_GOOD  # type: ignore[index]

    # The next run: a file has other contents under the old name, size and time; another is new; one is gone.
    times = (source / good[0]).stat()
    changed = bytearray((source / good[0]).read_bytes())
    changed[44:] = bytes(reversed(changed[44:]))
    (source / good[0]).write_bytes(changed)
    os.utime(source / good[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.copy(source / good[1], source / "new.flac")
    (source / good[2]).unlink()
    shutil.rmtree(source / "bad")
    seen.clear()
    options: dict[str, Any] = {"concurrency": 1, "on_result": lambda result: seen.append(result["file"])}
    second = transcribe_batch(source, out, short, file_format="parquet", **options)
    assert sorted(seen) == sorted([good[0], "new.flac"])
    assert (second.transcribed, second.kept, second.num_failed, second.no_longer_there) == (2, NUM_GOOD - 2, 0, 1)
    rows = list(BatchOutput(out).rows())
    assert sorted(row["file"] for row in rows) == sorted([*good, "new.flac"])
    texts = {row["file"]: row["text"] for row in rows}
    assert texts[good[0]] == plain(source / good[0])["text"]
    assert texts["new.flac"] == texts[good[1]]
    assert (out / "errors.jsonl").read_text() == ""
    assert json.loads((out / "summary.json").read_text())["transcribed"] == 2

    # And one in which there is nothing to do.
    third = transcribe_batch(source, out, short, trust_listing=True, texts=("txt",), **options)
    assert {path.relative_to(out / "txt").as_posix() for path in (out / "txt").rglob("*.txt")} >= {f"{name}.txt" for name in texts}
    assert (out / "txt" / "new.flac.txt").read_text("utf-8") == texts["new.flac"] + "\n"
    assert (third.transcribed, third.kept, third.workers, len(seen)) == (0, NUM_GOOD, 0, 2)


def test_more_workers_than_the_cluster_has_room_for_are_refused(tmp_path: Path, cluster: Any, model: BatchSettings) -> None:
    write_good(tmp_path / "in")
    with pytest.raises(ValueError, match="3 workers of 1 CPU are asked for; the cluster has 2 CPU"):
        transcribe_batch(tmp_path / "in", tmp_path / "out", model, concurrency=3)
