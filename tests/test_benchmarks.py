"""The benchmarks' instruments against sums done by hand, and a run of every arm at toy size. No test looks at how long something took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _measure, s2lora
from benchmarks.s2lora import INFERENCE_ARMS, STAGES, TRAIN_ARMS, Reader, Settings, Sizes, Trainer, whisper
from peft_s2lora import S2LoraLayer

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=40, frames=40, positions=32, labels=6, tokens=6)
MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread_as_before() -> Iterator[None]:
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS", None)
    if variable is not None:
        os.environ["OMP_NUM_THREADS"] = variable


def here(function: Callable[..., Any], *args: Any) -> Any:
    """Stands in for `in_new_process`, which takes seconds."""
    return function(*args)


# ---- instruments -------------------------------------------------------------------------------------------------------


def test_arms_take_turns_and_each_comes_first():
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = _measure.time_rounds({"one": arms, "two": {"x": lambda: calls.append("x")}}, rounds=3, warmups=1)
    assert "".join(calls) == "cabx" + "abcx" + "bcax" + "cabx"
    assert {stage: {arm: len(each) for arm, each in rows.items()} for stage, rows in seconds.items()} == {
        "one": {"a": 3, "b": 3, "c": 3},
        "two": {"x": 3},
    }


def test_each_round_keeps_what_the_clock_saw():
    now = [0.0]
    costs = iter([100.0, 1.0, 2.0, 3.0])  # the first is the warm-up's

    def work() -> None:
        now[0] += next(costs)

    seconds = _measure.time_rounds({"stage": {"arm": work}}, rounds=3, clock=lambda: now[0])
    assert seconds == {"stage": {"arm": [1.0, 2.0, 3.0]}}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        _measure.time_rounds({"stage": {"arm": lambda: None}}, rounds=0)


def test_ratios_are_taken_round_by_round():
    rows = _measure.summary({"base": [1.0, 10.0, 4.0], "arm": [2.0, 5.0, 12.0]}, ("base",))
    assert rows["arm"] == {"seconds": 5.0, "to_base": {"median": 2.0, "lowest": 0.5, "highest": 3.0}}  # 5 / 4 would be weather
    assert rows["base"]["to_base"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}


def test_peak_is_the_most_that_lived_at_once():
    def allocate() -> torch.Tensor:
        first = torch.empty(4 * MIB, dtype=torch.uint8)
        second = torch.empty(8 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(3 * MIB, dtype=torch.uint8)
        del second
        return third

    assert _measure.peak_bytes(allocate) == 12 * MIB


def test_peak_counts_what_a_kernel_needs_inside():
    values = torch.randn(1000, 1000)

    assert _measure.peak_bytes(lambda: torch.linalg.inv(values)) >= 2 * 4 * 1000 * 1000  # the inverse, and the copy it is worked out in


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own count is Linux's")
def test_resident_peak_sees_memory_that_is_gone_again():
    def touch(size: int) -> None:
        torch.ones(size, dtype=torch.uint8)

    touch(256 * MIB)  # a higher peak, but before
    peak = _measure.peak_resident_bytes(lambda: touch(64 * MIB))
    assert peak is not None
    assert 63 * MIB < peak < 80 * MIB


def test_a_new_process_is_one():
    assert _measure.in_new_process(os.getpid) != os.getpid()


def test_every_operator_counts_once():
    x = torch.ones(3)
    assert _measure.count_operators(lambda: (x + 1).mul_(2).view(3, 1)) == 3


@pytest.mark.parametrize(
    ("vendor", "name", "family", "model", "slug"),
    [
        ("AuthenticAMD", "AMD EPYC", 26, 2, "epyc-zen5"),
        ("AuthenticAMD", "AMD EPYC 9R14 96-Core Processor", 25, 17, "epyc-9r14-zen4"),
        ("AuthenticAMD", "AMD EPYC 7B13", 25, 1, "epyc-7b13-zen3"),
        ("AuthenticAMD", "AMD EPYC 7742 64-Core Processor", 23, 49, "epyc-7742-zen2"),
        ("GenuineIntel", "Intel(R) Xeon(R) Platinum 8488C", 6, 143, "xeon-platinum-8488c"),
        ("GenuineIntel", "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", 6, 142, "core-i7-8650u"),
    ],
)
def test_hardware_has_a_short_name(vendor, name, family, model, slug):
    cpuinfo = {"vendor_id": vendor, "model name": name, "cpu family": str(family), "model": str(model)}
    assert _measure.cpu_slug(cpuinfo, "x86_64") == slug


def test_without_cpuinfo_the_system_names_the_processor():
    assert _measure.cpu_slug({}, "arm64") == "arm64"


def test_provenance_holds_no_path_of_the_machine():
    found = _measure.provenance()
    assert set(found) == {"command", "commit", "date", "machine", "versions"}
    assert set(found["versions"]) == {"python", "torch", "peft", "transformers", "peft-s2lora"}
    assert found["command"].split()[0] == "python"
    assert str(Path.home()) not in json.dumps(found["machine"] | found["versions"])


def test_table_aligns_its_columns():
    assert _measure.table(["arm", "s"], [["base", "1.5"], ["x", "10.25"]]) == "arm       s\n----  -----\nbase    1.5\nx     10.25"


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_training() -> dict[str, Any]:
    return s2lora.measure_training(TOY, list(TRAIN_ARMS), rounds=2, apart=here)


def test_training_reports_every_arm(toy_training):
    assert list(toy_training["summary"]) == list(TRAIN_ARMS)
    figures = {"seconds", "to_full", "to_lora", "trainable", "file_bytes", "peak_resident_bytes"}
    figures |= {f"{peak}{to}" for peak in ("peak_bytes", "backward_peak_bytes") for to in ("", "_to_full", "_to_lora")}
    for row in toy_training["summary"].values():
        assert set(row) == figures
    assert {arm: len(took) for arm, took in toy_training["seconds"]["step"].items()} == dict.fromkeys(TRAIN_ARMS, 2)
    assert toy_training["summary"]["full"]["peak_bytes_to_full"] == 1
    assert all(line.split()[0] == arm for arm, line in zip(TRAIN_ARMS, s2lora.train_table(toy_training).splitlines()[2:], strict=True))


def test_counts_are_those_of_the_formulas(toy_training):
    d, ffn, weights = TOY.d_model, TOY.ffn_dim, 16 * TOY.layers  # 6 an encoder layer, 10 a decoder layer
    pairs = {"square": 2 * d, "fc1": d + ffn, "fc2": ffn + d}  # d_in + d_out of the three sizes of weights
    rows = toy_training["summary"]
    s2_lora = 32 * sum(pairs.values()) + 32 * weights
    per_layer = 12 * pairs["square"] + 2 * (pairs["fc1"] + pairs["fc2"])  # encoder and decoder layer together
    assert rows["s2lora"]["trainable"] == rows["s2lora_sparse"]["trainable"] == s2_lora
    assert rows["lora"]["trainable"] == 32 * per_layer * TOY.layers
    assert rows["vera"]["trainable"] == 256 * weights + (14 * d + 2 * ffn) * TOY.layers  # a number a rank, one an output
    assert rows["full"]["file_bytes"] == 4 * sum(weight.numel() for weight in whisper(TOY).parameters())
    assert 4 * s2_lora < rows["s2lora"]["file_bytes"] < 4 * s2_lora + 20_000  # the header names every tensor


def test_peak_of_full_fine_tuning_holds_gradients_and_moments(toy_training):
    row, weights = toy_training["summary"]["full"], 4 * toy_training["summary"]["full"]["trainable"]
    assert row["backward_peak_bytes"] > weights
    assert row["peak_bytes"] > 3 * weights
    assert row["peak_bytes"] >= row["backward_peak_bytes"]


@pytest.mark.parametrize("arm", TRAIN_ARMS)
def test_no_gradient_is_left_for_the_next_step(arm):
    trainer = Trainer(arm, TOY, whisper(TOY))
    trainer.step()
    assert all(weight.grad is None for weight in trainer.model.parameters())


@pytest.mark.parametrize("arm", TRAIN_ARMS)
def test_a_step_moves_what_the_arm_trains_and_nothing_else(arm):
    trainer = Trainer(arm, TOY, whisper(TOY))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    losses = [trainer.step() for _ in range(3)]
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad and not name.endswith("ranknum")}
    assert moved == trained
    assert len(set(losses)) == 3


def test_the_sparse_arm_takes_the_proximal_step():
    lengths = {}
    for arm in ("s2lora", "s2lora_sparse"):
        trainer = Trainer(arm, TOY, whisper(TOY))
        for _ in range(3):
            trainer.step()
        owner = next(layer for layer in trainer.model.modules() if isinstance(layer, S2LoraLayer))
        lengths[arm] = owner.s2lora_A["default"].norm(dim=1)
    assert torch.allclose(lengths["s2lora_sparse"], torch.ones(32), atol=1e-6)
    assert not torch.allclose(lengths["s2lora"], torch.ones(32), atol=1e-2)


def test_adalora_allocates_its_ranks():
    trainer = Trainer("adalora", TOY, whisper(TOY))
    trainer.step()  # the first one, number 0, belongs to its warm-up
    trainer.step()
    assert trainer.model.peft_config["default"].rank_pattern


# ---- inference ---------------------------------------------------------------------------------------------------------


def test_inference_reports_every_arm_and_stage(monkeypatch):
    monkeypatch.setattr(s2lora, "STEPS_AT_ONCE", 2)  # blocks of 2, 2 and 1
    results = s2lora.measure_inference(TOY, list(INFERENCE_ARMS), rounds=2)
    assert set(results) == {"summary", "operators", "seconds"}
    for stage in STAGES:
        assert {arm: len(took) for arm, took in results["seconds"][stage].items()} == dict.fromkeys(INFERENCE_ARMS, 2)
        assert all(set(row) == {"seconds", "to_base"} for row in results["summary"][stage].values())
    for arm in INFERENCE_ARMS:
        encoder, first, step, window = (results["seconds"][stage][arm] for stage in STAGES)
        assert window == pytest.approx([e + f + 5 * s for e, f, s in zip(encoder, first, step, strict=True)])
    assert results["operators"]["merged"] == results["operators"]["base"]
    assert results["operators"]["lora_all"]["token_step"] > results["operators"]["lora"]["token_step"]
    assert len(s2lora.inference_table(results).splitlines()) == 2 + len(INFERENCE_ARMS)


def test_every_token_after_the_first_takes_a_step():
    assert s2lora.step_blocks(100) == [11] * 9
    assert s2lora.step_blocks(14) == [11, 2]


@pytest.mark.parametrize("arm", INFERENCE_ARMS)
@torch.no_grad()
def test_the_window_is_greedy_decoding(arm):
    base = whisper(TOY)
    for weight in base.parameters():
        weight.mul_(8)  # otherwise every token is the same
    reader = Reader(arm, TOY, base)
    reader.encode()
    reader.call_first()
    written = [int(reader.token)]
    for _ in range(TOY.tokens - 1):
        reader.steps(1)
        written.append(int(reader.token))

    ids = reader.prompt
    for _ in range(TOY.tokens):  # the whole sequence anew for every token, without a cache
        logits = reader.model(input_features=reader.features, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert written == ids[0, TOY.prompt :].tolist()


@torch.no_grad()
def test_adapters_change_the_output_and_merging_does_not_change_it_again():
    logits = {}
    for arm in INFERENCE_ARMS:
        reader = Reader(arm, TOY, whisper(TOY))
        logits[arm] = reader.model(input_features=reader.features, decoder_input_ids=reader.prompt).logits
        assert torch.isfinite(logits[arm]).all()
    assert torch.allclose(logits["merged"], logits["s2lora"], atol=1e-5)
    for arm in ("s2lora", "s2lora_all", "lora", "lora_all"):
        assert not torch.allclose(logits[arm], logits["base"], atol=1e-3), arm


# ---- the command -------------------------------------------------------------------------------------------------------


def test_arms_are_chosen_with_what_they_are_compared_to():
    assert s2lora.chosen_arms("train", ()) == list(TRAIN_ARMS)
    assert s2lora.chosen_arms("train", ("vera",)) == ["full", "lora", "vera"]
    assert s2lora.chosen_arms("inference", ("s2lora",)) == ["base", "s2lora"]
    assert s2lora.chosen_arms("inference", ("vera",)) == []


def test_an_unknown_arm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"No arm 'dora' here\. Known: full, lora, s2lora"):
        Settings(arms=("dora",))


@pytest.mark.parametrize("part", ["train", "inference"])
def test_a_run_writes_its_file_and_prints_its_table(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(s2lora.MODELS, "tiny", TOY)
    monkeypatch.setattr(s2lora, "measure_training", partial(s2lora.measure_training, apart=here))
    settings = Settings(part=part, rounds=1, out=tmp_path / "results")
    path = s2lora.run_part(part, "tiny", s2lora.chosen_arms(part, ("s2lora",)), settings)
    results = json.loads(path.read_text("utf-8"))
    assert path.name == f"s2lora-{part}_tiny_{results['machine']['hardware']}_{results['date']}.json"
    assert {"command", "commit", "date", "machine", "versions", "part", "model", "rounds", "clock", "summary", "seconds"} <= set(results)
    assert results["machine"]["threads"] == 1
    assert any(line.startswith("s2lora ") for line in capsys.readouterr().out.splitlines())
