"""The instruments of `benchmarks.data_loading`: a loader that is slow is seen to be waited for, one that is ahead is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data_loading import Settings, endless, make_clips, measure, tables, waiting
from whisper_moe.data import load_clips


def slow(seconds: float) -> Iterator[dict[str, Any]]:
    while True:
        time.sleep(seconds)
        yield {}


@pytest.mark.parametrize(("loads_s", "steps_s", "waited"), [(0.03, 0.01, 0.75), (0.0, 0.03, 0.0)])
def test_the_share_waited_is_that_of_the_loader(loads_s: float, steps_s: float, waited: float) -> None:
    found = waiting(slow(loads_s), lambda batch: time.sleep(steps_s), 6, "cpu")
    assert found["share_waited"] == pytest.approx(waited, abs=0.2)
    assert found["step_s"] >= steps_s
    assert found["wait_s"] >= loads_s


def test_epochs_follow_each_other_and_are_told_apart() -> None:
    class Order:
        epochs: list[int] = []  # noqa: RUF012, written here only

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    batches = endless([{"a": 1}, {"a": 2}], Order())
    assert [next(batches)["a"] for _ in range(5)] == [1, 2, 1, 2, 1]
    assert Order.epochs == [0, 1, 2]


def test_made_clips_are_read_back(tmp_path: Path) -> None:
    clips = load_clips(make_clips(tmp_path, 3))
    assert len(clips) == 3
    assert all(2 <= clip.duration_s <= 12 for clip in clips.clips)


@pytest.mark.pocket
def test_every_arm_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.data_loading as module

    monkeypatch.setattr(module, "tiny_step", lambda processor, device: lambda batch: time.sleep(0.01))  # seconds a step otherwise
    results = measure(Settings(num_clips=5, batch_size=2, steps=1, workers=(0, 1)))
    assert set(results["training"]) == {f"{kind}, {workers} workers" for kind in ("memory", "stream") for workers in (0, 1)}
    assert all(row["clips_per_s"] > 0 for row in results["stages"].values())
    assert "share waited" in tables(results)
