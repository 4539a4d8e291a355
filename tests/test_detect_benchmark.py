"""The benchmark of detection at toy size: every arm runs, what it counts is true, and the table says it. No test looks at seconds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import detect
from benchmarks.detect import ARMS, detect_table, measure
from benchmarks.s2lora import Sizes

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=400, frames=300, positions=24)


@pytest.fixture(autouse=True)
def one_thread_as_before() -> Iterator[None]:
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS", None)
    if variable is not None:
        os.environ["OMP_NUM_THREADS"] = variable


def test_every_arm_is_measured_and_the_encoder_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detect, "MODELS", {"tiny": TOY})
    monkeypatch.setattr(sys, "argv", ["detect", "--windows", "1", "4", "--rounds", "2", "--out", str(tmp_path)])
    detect.main()
    (path,) = tmp_path.glob("detect_tiny_*.json")
    results = json.loads(path.read_text())
    # Transformers encodes every window twice to detect; ours once, or once more those that were listened to.
    expected = {"1 window": [1, 1, 1, 2, 1, 2], "4 windows": [4, 4, 4, 7, 4, 8]}
    assert {stage: list(rows.values()) for stage, rows in results["encoded"].items()} == expected
    for stage, rows in results["summary"].items():
        for name, given in ARMS.items():
            if given is not None:
                seconds = results["seconds"][stage]
                ratios = [one / other for one, other in zip(seconds[name], seconds[given], strict=True)]
                assert rows[name]["to_given"]["median"] == pytest.approx(sum(ratios) / 2)
    printed = capsys.readouterr().out
    assert detect_table(results) in printed


def test_a_difference_in_text_stops_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(range(1000))
    monkeypatch.setattr(detect, "transcribe", lambda *_: str(next(answers)))
    with pytest.raises(AssertionError):
        measure(TOY, (1,), 1)
