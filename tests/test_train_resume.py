"""What a run takes up from an earlier one: its own checkpoints, whole, and its own figures. Anything else is refused or measured again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_model

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from peft import LoraConfig
from test_train import Crash, make_clips, train

from whisper_moe import train_record
from whisper_moe.data import Clips

WEIGHTS = "adapter_model.safetensors"
STEPS: dict[str, Any] = {"max_steps": 4, "num_checkpoints": 4}


def with_other_texts(clips: Clips) -> Clips:
    return Clips([replace(clip, text="completely different and longer") for clip in clips.clips], clips.name)


def cut_off(base: Any, out: Path, at: int = 3, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train(base, out, callbacks=[Crash(at)], **options)


# ---- figures of the base -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["base", "transcripts"])
@pytest.mark.parametrize("resume", [False, True])
def test_the_base_is_measured_again_where_the_figures_are_of_something_else(
    tiny_model, tiny_processor, tmp_path: Path, changed: str, resume: bool
) -> None:
    test = make_clips(3, "tones/test")
    cut_off((tiny_model, tiny_processor), tmp_path / "out", at=1, eval_data=test)  # before the first checkpoint
    assert (tmp_path / "out" / "checkpoints" / "before.json").is_file()
    base = (build_tiny_model(tiny_processor, seed=7).eval() if changed == "base" else tiny_model, tiny_processor)
    options = {"eval_data": test if changed == "base" else with_other_texts(test)}
    again = train(base, tmp_path / "out", resume=resume, **options)
    afresh = train(base, tmp_path / "afresh", **options)
    assert again.metrics["before"] == afresh.metrics["before"]


def test_a_resumed_run_does_not_measure_the_base_twice(tiny_model, tiny_processor, tmp_path: Path) -> None:
    base, test = (tiny_model, tiny_processor), make_clips(3, "tones/test")
    cut_off(base, tmp_path, eval_data=test, **STEPS)
    path = tmp_path / "checkpoints" / "before.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"scores": known["scores"] | {"wer": 0.125}}))  # a figure that nobody would measure
    assert train(base, tmp_path, eval_data=test, resume=True, **STEPS).metrics["before"]["wer"] == 0.125


# ---- another run's checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tiny_model, tiny_processor, tmp_path: Path) -> None:
    base, dev = (tiny_model, tiny_processor), make_clips(2, "tones/dev")
    options = STEPS | {"dev_data": dev}
    cut_off(base, tmp_path, **options)
    other_base = (build_tiny_model(tiny_processor, seed=7).eval(), tiny_processor)
    slower = lambda model, lr: [{"params": [w for w in model.parameters() if w.requires_grad], "lr": lr / 2}]  # noqa: E731
    for changed, words in (
        ({"base": other_base}, "differs: base"),
        ({"language": "br"}, "language 'cy', now 'br'"),
        ({"language": "br", "carrier": "fr"}, "prompt 'cy', now 'fr'"),
        ({"data": with_other_texts(make_clips())}, "clips"),
        ({"data": make_clips(4)}, "clips"),
        ({"dev_data": with_other_texts(dev)}, "dev"),
        ({"eval_data": make_clips(3)}, "test"),
        ({"learning_rate": 1e-5}, r"settings\.learning_rate 0.01, now 1e-05"),
        ({"seed": 5, "batch_size": 1}, r"settings\.batch_size 2, now 1; settings\.seed 0, now 5"),
        ({"peft_config": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"])}, r"method\.lora_alpha 4, now 8"),
        ({"optimizer_parameter_groups": slower}, "differs: groups"),
    ):
        asked: dict[str, Any] = {"base": base, "data": make_clips()} | options | changed
        with pytest.raises(ValueError, match=words):
            train(asked.pop("base"), tmp_path, resume=True, **asked)
    assert not any("lora" in name for name, _ in tiny_model.named_modules())
    (tmp_path / "checkpoints" / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(ValueError, match="Nothing says which run"):
        train(base, tmp_path, resume=True, **options)
    (tmp_path / "run.json").rename(tmp_path / "checkpoints" / "run.json")
    # What the weights do not hang on may change.
    train(base, tmp_path, resume=True, **options, num_workers=1, eval_batch_size=1, gradient_checkpointing=True)


def test_a_warm_run_is_resumed_with_its_own_source_only(tiny_model, tiny_processor, tmp_path: Path) -> None:
    base = (tiny_model, tiny_processor)
    for name, seed in (("one", 1), ("two", 2)):
        train(base, tmp_path / name, max_steps=1, seed=seed)
    warm = STEPS | {"peft_config": None, "start": "warm"}
    cut_off(base, tmp_path / "out", sources=[tmp_path / "one"], **warm)
    with pytest.raises(ValueError, match=r"start\.sources"):
        train(base, tmp_path / "out", sources=[tmp_path / "two"], resume=True, **warm)
    (tmp_path / "one").rename(tmp_path / "moved")  # its weights count, not where they lie
    train(base, tmp_path / "out", sources=[tmp_path / "moved"], resume=True, **warm)


# ---- whole checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", WEIGHTS, "rng_state.pth", "whole.json"])
@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_a_checkpoint_that_lost_a_file_to_a_power_cut_is_passed_over(
    tiny_model, tiny_processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    from whisper_moe.trainer import last_checkpoint

    base = (tiny_model, tiny_processor)
    cut_off(base, tmp_path, **STEPS)
    checkpoints = tmp_path / "checkpoints"
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    file = checkpoints / "checkpoint-2" / name
    file.write_bytes(b"") if how == "emptied" else file.unlink()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"


def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one(tiny_folder: Path, tmp_path: Path) -> None:
    train(str(tiny_folder), tmp_path / "undisturbed", **STEPS)
    cut_off(str(tiny_folder), tmp_path / "resumed", **STEPS)
    (tmp_path / "resumed" / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    train(str(tiny_folder), tmp_path / "resumed", resume=True, **STEPS)
    assert (tmp_path / "resumed" / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="folders are synced there")
def test_what_counts_as_written_has_reached_the_disk_before(
    tiny_model, tiny_processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    at_rename: dict[str, bool] = {}
    fsync, rename = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    def note_rename(path: Path, target: Any) -> Path:
        beside = [file for file in Path(target).parent.iterdir() if Path(target).name == "whole.json"]
        at_rename[Path(target).name] = all(file.stat().st_ino in synced for file in (path, *beside))
        return rename(path, target)

    monkeypatch.setattr(train_record.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    train((tiny_model, tiny_processor), tmp_path, max_steps=1)
    expected = {"run.json", "whole.json", WEIGHTS, "adapter_config.json", "language_adapter.json", "README.md"}
    assert expected <= set(at_rename)
    assert all(at_rename.values()), at_rename
