"""The benchmark of the mixture at toy size: every arm computes what it should, and the results have their keys. Nothing is timed here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import moe
from benchmarks.moe import ARMS, NUM_EXPERTS, Reader, Settings, measure, passes_of, results_table, write_experts
from benchmarks.s2lora import Sizes, whisper

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=40, frames=40, positions=32)


@pytest.fixture(autouse=True)
def one_thread_as_before(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def test_merged_gates_compute_what_the_router_does_and_arms_differ_from_the_base(tmp_path):
    base = whisper(TOY).eval()
    experts = write_experts(tmp_path, base)
    encoded = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arm in ARMS:
            reader = Reader(arm, TOY, base, experts, 2)
            encoded[arm] = reader.encode().last_hidden_state
    assert torch.allclose(encoded["merged"], encoded["gated"], atol=1e-5)
    for arm in ARMS[1:]:
        assert not torch.allclose(encoded[arm], encoded["base"], atol=1e-4), arm


def test_the_two_pass_form_under_equal_gates_is_the_mixture(tmp_path):
    """X-LoRA's form and ours are the same sum: with the same gates they agree."""
    from whisper_moe import use_gates

    base = whisper(TOY).eval()
    experts = write_experts(tmp_path, base)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = Reader("two_pass", TOY, base, experts, 1), Reader("gated", TOY, base, experts, 1)
        passes_of(theirs.model).gates.fill_(1 / NUM_EXPERTS)
        wanted = theirs.encode().last_hidden_state
        with use_gates(ours.model, dict.fromkeys(experts, 1 / NUM_EXPERTS)):
            assert torch.allclose(ours.encode().last_hidden_state, wanted, atol=1e-5)


def test_a_run_of_every_arm_writes_ratios_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(moe.MODELS, "tiny", TOY)
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: Settings(model="tiny", rounds=1, batch_size=2, out=tmp_path))
    moe.main()
    results = json.loads(next(Path(tmp_path).glob("moe_tiny_*.json")).read_text())
    assert set(results["summary"]["encoder"]) == set(ARMS)
    assert set(results["summary"]["encoder_batch"]) == set(ARMS) - {"merged"}
    assert set(results["summary"]["token_step"]) == set(ARMS) - {"two_pass"}
    assert all(row["to_two_pass"]["median"] > 0 for row in results["summary"]["encoder"].values())
    assert results["operators"]["merged"] == results["operators"]["base"]
    assert results_table(results) in capsys.readouterr().out


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"No arm 'xlora' here\. Known: base, gated"):
        Settings(arms=("xlora",))


def test_only_the_wanted_arms_run():
    results = measure(TOY, ["base", "gated"], 1, 0)
    assert set(results["summary"]) == {"encoder", "token_step"}
    assert set(results["operators"]) == {"base", "gated"}
