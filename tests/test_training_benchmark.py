"""The benchmark of training, at toy size: every arm runs, trains what it should, and arms that are compared do the same work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.s2lora import Sizes, whisper
from benchmarks.training import CACHED_ARMS, MANY_ARMS, ManyStep, Recordings, Settings, Step

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=40, frames=100, positions=32, batch_size=2, labels=5)


@pytest.fixture(autouse=True)
def one_thread_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base() -> Any:
    model = whisper(TOY)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)  # otherwise nothing depends on what is heard
    return model


@pytest.fixture
def recordings(base, tmp_path: Path) -> Recordings:
    return Recordings(TOY, base, 3, tmp_path)


def test_cached_states_are_those_of_the_features(base, recordings) -> None:
    with torch.no_grad():
        expected = base.get_encoder()(recordings.features).last_hidden_state
    torch.testing.assert_close(recordings.states(range(3)), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("arm", CACHED_ARMS[:-1])
def test_a_step_moves_what_the_arm_trains_and_nothing_else(base, recordings, arm: str) -> None:
    step = Step(arm, copy.deepcopy(base), recordings, [0, 1])
    before = {name: weight.detach().clone() for name, weight in step.model.named_parameters()}
    for _ in range(2):
        step()
    moved = {name for name, weight in step.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in step.model.named_parameters() if weight.requires_grad}
    in_encoder = any(".encoder." in name for name in moved)
    assert in_encoder == (arm in ("full", "lora"))


def test_all_adapters_begin_with_the_same_loss(base, recordings) -> None:
    losses = [Step(arm, copy.deepcopy(base), recordings, [0, 1])() for arm in CACHED_ARMS[:-1]]
    losses.append(ManyStep(copy.deepcopy(base), recordings, [0, 0])())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=5e-3)  # half precision in the cache


@pytest.mark.parametrize("options", [{}, {"pool": True}, {"live": True}], ids=str)
def test_languages_together_do_the_work_of_one_after_another(base, recordings, options: dict[str, bool]) -> None:
    together = ManyStep(copy.deepcopy(base), recordings, [0, 1, 2], **options)
    arm = "lora" if options.get("live") else "lora_cached"
    alone = [Step(arm, copy.deepcopy(base), recordings, [row])() for row in range(3)]
    assert together() == pytest.approx(sum(alone), rel=2e-3)
    assert together.adapters.model is together.model
    before = [vector.detach().clone() for vector in together.adapters.parameters]
    together()
    assert all(not torch.equal(vector, was) for vector, was in zip(together.adapters.parameters, before, strict=True))


def test_one_after_another_takes_a_step_on_each(base, recordings) -> None:
    step, rows = Step("lora_cached", copy.deepcopy(base), recordings, range(3)), []
    backward = step.backward
    step.backward = lambda which: rows.append(list(which)) or backward(which)  # type: ignore[method-assign]
    step.one_by_one()
    assert rows == [[0], [1], [2]]
    assert next(iter(step.optimizer.state.values()))["step"] == 3


def test_a_run_writes_its_files_and_prints_its_tables(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(training.MODELS, "tiny", TOY)
    settings = Settings(rounds=1, languages=2, live=True, out=tmp_path)
    for part in ("cached", "many"):
        path = training.run_part(part, settings)
        results = json.loads(path.read_text("utf-8"))
        assert path.name == f"training-{part}_tiny_{results['machine']['hardware']}_{results['date']}.json"
    printed = capsys.readouterr().out
    assert all(f"\n{arm} " in printed for arm in CACHED_ARMS)
    assert all(f"\ncached {arm} " in printed for arm in MANY_ARMS)
    assert "\nlive mixed " in printed
    assert results["summary"]["cached"]["one_after_another"]["to_one_after_another"]["median"] == 1
