"""Training in processes of its own: killed, interrupted, on a full disk, and in two at once. Each time what is on disk is looked at.

The processes are forked where that will do, since importing the libraries takes longer than training the tiny model.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from test_train import LORA, make_clips, train, uneven_clips
from transformers import TrainerCallback

WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, Any] = {"max_steps": 9, "num_checkpoints": 3, "crop_share": 0.5, "num_workers": 0}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")


class SlowSteps(TrainerCallback):
    """Says which step is done and waits, so that a signal meets the run where it is wanted."""

    def __init__(self, told: Path, wait_at: int) -> None:
        self.told, self.wait_at = told, wait_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.wait_at:
            self.told.write_text(str(state.global_step))
            deadline = time.monotonic() + 30
            while self.told.exists() and time.monotonic() < deadline:
                time.sleep(0.01)


class Process:
    """A forked child that runs a function; its exit code is what the function returns."""

    def __init__(self, work: Callable[[], int], log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                torch.set_num_threads(1)
                handle = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                code = work()
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)

    def code(self) -> int:
        """Of the ended process; negative: the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


def wait_for(path: Path, process: Process) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, process.log.read_text()
        assert os.waitpid(process.pid, os.WNOHANG)[0] == 0, process.log.read_text()
        time.sleep(0.01)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "language_adapter.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained without any trouble."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(str(tiny_folder), out, dev_data=make_clips(2), **OPTIONS)
    return out


# ---- killed and interrupted --------------------------------------------------------------------------------------------


def test_a_run_killed_between_checkpoints_ends_with_the_weights_of_an_undisturbed_one(
    tiny_folder: Path, tmp_path: Path, undisturbed: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "told"

    def work() -> int:
        train(str(tiny_folder), out, dev_data=make_clips(2), callbacks=[SlowSteps(told, 5)], **OPTIONS)
        return 0

    process = Process(work, tmp_path / "log")
    wait_for(told, process)
    process.send(signal.SIGKILL)
    assert process.code() == -signal.SIGKILL
    assert not (out / "language_adapter.json").exists()
    train(str(tiny_folder), out, dev_data=make_clips(2), resume=True, **OPTIONS)
    assert (out / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("after", ["early stop", "last step"])
def test_a_run_killed_when_it_had_nothing_left_to_train_trains_no_further(
    tiny_folder: Path, tmp_path: Path, undisturbed: Path, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nine steps of five clips in batches of two end where an epoch does; seven end inside one.
    options = OPTIONS | ({"max_steps": 7, "num_checkpoints": 7} if after == "last step" else {"patience": 1, "num_checkpoints": 9})
    options |= {"learning_rate": 1e-9} if after == "early stop" else {}  # no better at the second look
    train(str(tiny_folder), tmp_path / "whole", dev_data=make_clips(2), **options)
    steps = record(tmp_path / "whole")["training"]["steps"]
    assert steps == {"early stop": 2, "last step": 7}[after]

    from whisper_moe import train as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            train(str(tiny_folder), tmp_path / "out", dev_data=make_clips(2), **options)
    train(str(tiny_folder), tmp_path / "out", dev_data=make_clips(2), resume=True, **options)
    assert record(tmp_path / "out")["training"]["steps"] == steps
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_ctrl_c_saves_the_best_so_far_and_the_run_can_go_on(tiny_folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    out, told = tmp_path / "out", tmp_path / "told"
    options = OPTIONS | {"num_workers": 1}  # Ctrl-C reaches the processes that prepare batches too

    def work() -> int:
        os.setpgid(0, 0)
        train(str(tiny_folder), out, dev_data=make_clips(2), progress=True, callbacks=[SlowSteps(told, 4)], **options)
        return 7

    process = Process(work, tmp_path / "log")
    wait_for(told, process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    told.unlink()
    assert process.code() == 7, process.log.read_text()
    assert process.log.read_text().count("stopping after this step") == 1
    training = record(out)["training"]
    assert training["stopped"] == "by Ctrl-C, at step 5 of 9"
    assert (training["steps"], training["kept_step"]) == (5, 3)
    assert set(record(out)["metrics"]) == {"test_set", "normalizer", "before", "after"}
    assert "stopped by Ctrl-C, at step 5 of 9" in (out / "README.md").read_text()
    assert (out / WEIGHTS).is_file()
    train(str(tiny_folder), out, dev_data=make_clips(2), resume=True, **OPTIONS)
    assert (out / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert "stopped" not in record(out)["training"]


def test_a_second_ctrl_c_ends_the_command_at_once_with_130(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from whisper_moe import cli, cli_train

    told = tmp_path / "told"
    data = write_folder(tmp_path / "clips")
    monkeypatch.setattr(cli_train, "_s2lora_callbacks", lambda: [SlowSteps(told, 2)])
    flags = f"--model {tiny_folder} --base-id a/b --data {data} --language cy --method lora --rank 2 --max-steps 9 --num-workers 0"
    command = ["train", *flags.split(), "--batch-size", "2", "--out", str(tmp_path / "out")]

    process = Process(lambda: cli.main(command), tmp_path / "log")
    wait_for(told, process)
    process.send(signal.SIGINT)
    time.sleep(0.1)
    process.send(signal.SIGINT)  # while the step under way is still waiting
    assert process.code() == 130, process.log.read_text()
    assert not (tmp_path / "out" / "language_adapter.json").exists()
    assert "whisper-moe: stopped" in process.log.read_text()

    process = Process(lambda: cli.main([*command, "--resume"]), tmp_path / "log2")  # no checkpoint yet: from the beginning
    told.unlink()
    wait_for(told, process)
    process.send(signal.SIGINT)
    time.sleep(0.1)
    told.unlink()
    assert process.code() == 130, process.log.read_text()
    assert record(tmp_path / "out")["training"]["stopped"] == "by Ctrl-C, at step 3 of 9"
    assert "--resume" in process.log.read_text()


def write_folder(folder: Path, count: int = 6) -> Path:
    """Recordings with metadata.csv."""
    import soundfile

    folder.mkdir()
    lines = ["file_name,text"]
    for index, clip in enumerate(make_clips(count).clips):
        soundfile.write(folder / f"{index}.wav", clip.samples, 16_000)
        lines.append(f"{index}.wav,{clip.text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


# ---- a full disk -------------------------------------------------------------------------------------------------------


class FullFrom(TrainerCallback):
    """From a step on, no file of this process may grow beyond some bytes: what a quota or a full disk does."""

    def __init__(self, step: int, largest: int) -> None:
        self.step, self.largest = step, largest

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("largest", [100, 3000], ids=["the weights do not fit", "the optimizer does not fit"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tiny_folder: Path, tmp_path: Path, undisturbed: Path, largest: int) -> None:
    out = tmp_path / "out"

    def work() -> int:
        try:
            train(str(tiny_folder), out, dev_data=make_clips(2), callbacks=[FullFrom(5, largest)], **OPTIONS)
        except OSError as error:
            return 5 if "The checkpoint of step 3 is whole" in str(error) and "--resume" in str(error) else 6
        return 0

    process = Process(work, tmp_path / "log")
    assert process.code() == 5, process.log.read_text()
    assert sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*")) == ["checkpoint-3"]
    train(str(tiny_folder), out, dev_data=make_clips(2), resume=True, **OPTIONS)
    assert (out / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def test_a_full_disk_at_the_end_leaves_the_adapter_that_was_there(tiny_folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    train(str(tiny_folder), out, max_steps=1)
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}

    def work() -> int:
        try:
            train(str(tiny_folder), out, dev_data=make_clips(2), callbacks=[FullFrom(9, 10_000_000), FullAtEnd()], **OPTIONS)
        except OSError as error:
            return 5 if "nothing is trained again" in str(error) and "--resume" in str(error) else 6
        return 0

    process = Process(work, tmp_path / "log")
    assert process.code() == 5, process.log.read_text()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == earlier
    train(str(tiny_folder), out, dev_data=make_clips(2), resume=True, **OPTIONS)
    assert (out / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


class FullAtEnd(TrainerCallback):
    """The disk is full when training has ended and its checkpoints are written."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# ---- two processes -----------------------------------------------------------------------------------------------------


class CtrlC(TrainerCallback):
    """One of two processes hears the signal after a step."""

    def __init__(self, step: int, process: int) -> None:
        self.step, self.process = step, process

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and args.process_index == self.process:
            os.kill(os.getpid(), signal.SIGINT)


def in_two_processes(work: Callable[[], None], log: Path) -> None:
    """Run a function in two forked processes that find each other as those of a launcher do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_rank(rank: int) -> int:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # of trainings in this process before it was forked
        GradientState._reset_state()
        number = str(rank)
        os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        work()
        return 0

    logs = [log.with_name(f"{log.name}{rank}") for rank in (0, 1)]
    processes = [Process(partial(as_rank, rank), logs[rank]) for rank in (0, 1)]
    assert [process.code() for process in processes] == [0, 0], "".join(path.read_text() for path in logs)


def test_ctrl_c_in_two_processes_saves_and_marks_and_leaves_measuring_to_the_run_that_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"max_steps": 4, "num_checkpoints": 2, "eval_data": make_clips(2, "tones/test"), "num_workers": 0}
    in_two_processes(lambda: train(str(tiny_folder), out, uneven_clips(8), callbacks=[CtrlC(3, 1)], **options), tmp_path / "log")
    said = record(out)
    assert said["training"]["stopped"] == "by Ctrl-C, at step 3 of 4"
    assert said["metrics"] == {}
    assert (out / "checkpoints" / "checkpoint-3" / "whole.json").is_file()
    with pytest.raises(ValueError, match="processes 2, now 1"):
        train(str(tiny_folder), out, uneven_clips(8), resume=True, **options)
    in_two_processes(lambda: train(str(tiny_folder), out, uneven_clips(8), resume=True, **options), tmp_path / "again")
    assert set(record(out)["metrics"]) == {"test_set", "normalizer", "before", "after"}
    single = train(str(tiny_folder), tmp_path / "single", uneven_clips(8), gradient_accumulation=2, **options)
    one, two = load_file(single.path / WEIGHTS), load_file(out / WEIGHTS)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    # Adam does not see the scale of a gradient; the loss does.
    assert record(out)["training"]["last_loss"] == pytest.approx(record(single.path)["training"]["last_loss"], abs=2e-4)


LAUNCHED = """
import sys, json
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_train import make_clips, train, uneven_clips
from test_train_processes import Crash
from whisper_moe.trainer import in_processes
crash, out = {crash!r}, {out!r}
options = dict(dev_data=make_clips(3), eval_data=make_clips(5, "tones/test"), max_steps=6, num_checkpoints=3, crop_share=0.5)
if crash:
    try:
        train({base!r}, out, uneven_clips(12), callbacks=[Crash(5)], **options)
    except RuntimeError:
        pass
adapter = train({base!r}, out, uneven_clips(12), resume=crash, **options)
open(f"{{out}}.{{in_processes()[0]}}", "w").write(json.dumps(dict(process=in_processes(), metrics=adapter.metrics)))
"""


class Crash(TrainerCallback):
    """Both processes fail at the same step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(tiny_folder: Path, tmp_path: Path) -> None:
    options = {"dev_data": make_clips(3), "eval_data": make_clips(5, "tones/test"), "max_steps": 6, "num_checkpoints": 3, "crop_share": 0.5}
    single = train(str(tiny_folder), tmp_path / "single", uneven_clips(12), gradient_accumulation=2, **options)
    script = tmp_path / "launched.py"
    out = tmp_path / "two"
    script.write_text(LAUNCHED.format(tests=str(ROOT / "tests"), base=str(tiny_folder), out=str(out), crash=True))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(Path(f"{out}.{process}").read_text()) for process in (0, 1)]
    assert [each["process"] for each in told] == [[0, 2], [1, 2]]
    assert all(each["metrics"] == single.metrics for each in told)
    assert record(out)["training"]["processes"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS, "language_adapter.json"]
    one, two = load_file(tmp_path / "single" / WEIGHTS), load_file(out / WEIGHTS)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert LORA.r == 2
