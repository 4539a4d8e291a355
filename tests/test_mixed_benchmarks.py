"""The benchmarks of mixed batches and of many languages, at toy size: every arm runs, and what is compared is the same work."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import many_languages, mixed_batch
from benchmarks.s2lora import Sizes, whisper

TOY = Sizes(d_model=16, layers=1, heads=2, ffn_dim=24, vocab_size=40, frames=40, positions=32, tokens=14, batch_size=3)
SETTINGS = mixed_batch.Settings(lora_rank=2, pool_rank=4)


@pytest.fixture(autouse=True)
def one_thread_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_arm_of_the_mixed_batch_is_timed_at_every_stage():
    results = mixed_batch.measure(TOY, mixed_batch.ARMS, 2, SETTINGS)
    for stage in mixed_batch.STAGES:
        assert set(results["summary"][stage]) == set(mixed_batch.ARMS)
        assert results["summary"][stage]["base"]["to_base"]["median"] == 1
    assert all(len(seconds) == 2 for arms in results["seconds"].values() for seconds in arms.values())
    steps = {arm: counts["token_step"] for arm, counts in results["operators"].items()}
    assert steps["merged"] == steps["base"] < steps["table_lora"] < steps["peft_one"] < steps["peft_mixed"]
    assert steps["one_by_one"] > 2 * steps["base"]
    assert all(arm in mixed_batch.as_table(results) for arm in mixed_batch.ARMS)


def test_the_window_is_the_sum_of_its_stages():
    blocks = {f"steps_{number}": {"base": [1.0, 2.0], "x": [2.0, 2.0]} for number in range(3)}
    measured = {"encoder": {"base": [10.0, 10.0], "x": [20.0, 10.0]}, "first_call": {"base": [1.0, 1.0], "x": [1.0, 3.0]}, **blocks}
    found = mixed_batch.summaries(measured, TOY, 2)
    assert found["window"]["x"]["seconds"] == pytest.approx((27 + 19) / 2)
    assert found["window"]["x"]["to_base"]["median"] == pytest.approx((27 / 14 + 19 / 17) / 2)
    assert found["token_step"]["base"]["seconds"] == pytest.approx((3 / 13 + 6 / 13) / 2)


def test_the_arms_write_with_their_own_adapters():
    """What the table computes for the languages differs from the base, and each row by itself is that row of the batch."""
    readers = mixed_batch.make_readers(["base", "one_by_one", "table_lora", "table_pool"], TOY, SETTINGS)
    batch = mixed_batch.Batch.make(TOY, "cpu")
    with torch.no_grad():
        readers["base"].batch = batch
        batch.encoded = readers["base"].encode()
        batch.filled = readers["base"].call_first()
        states = {}
        for arm, reader in readers.items():
            reader.give(batch)
            if arm != "one_by_one":
                states[arm] = reader.encode().last_hidden_state
        for row, reader in enumerate(readers["one_by_one"].readers):
            alone = reader.encode().last_hidden_state[0]
            assert torch.allclose(alone, states["table_lora"][row], atol=1e-5)
    assert not torch.allclose(states["table_lora"], states["base"], atol=1e-3)
    assert not torch.allclose(states["table_pool"], states["base"], atol=1e-3)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="No arm 'loras' here"):
        mixed_batch.Settings(arms=("loras",))


def test_many_languages_are_measured_beside_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(many_languages.MODELS, "tiny", TOY)
    path = many_languages.run(many_languages.Settings(model="tiny", languages=12, peft_loaded=2, rounds=2, out=tmp_path))
    results = json.loads(path.read_text())
    assert set(results["table"]["switch_s"]) == {"1", "10", "12"}
    weights = 4 * 3  # q, k, v, out of an encoder layer, and twice of a decoder layer
    assert results["table"]["nbytes"]["one_language"] == 4 * many_languages.RANK * weights
    assert results["peft"]["nbytes"]["one_language"] == 4 * many_languages.RANK * 2 * 16 * weights


def test_the_adapters_come_off_again(tmp_path):
    base = whisper(TOY)
    names = list(base.state_dict())
    many_languages.make_folders(base, tmp_path, 3)
    many_languages.measure_table(base, tmp_path, many_languages.Settings(languages=3, rounds=1))
    assert list(base.state_dict()) == names
