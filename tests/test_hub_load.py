"""Putting adapters on a model: what is there afterwards, that a failure in the middle leaves no trace, and the cache of a few."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_server import fingerprint
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from hub_utils import AdapterCache, AdapterError, load_adapter
from hub_utils.adapter_files import LANGUAGE_FILE, WEIGHTS_FILE
from hub_utils.load import Snapshot
from peft_s2lora import S2LoraConfig
from whisper_moe import LoraMoeConfig
from whisper_moe.base_signature import check_base

S2LORA = S2LoraConfig(r=4, target_modules=["q_proj", "fc1"])


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    features = torch.randn(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


def alone(model: Any, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)))


# ---- one adapter -------------------------------------------------------------------------------------------------------


def test_the_adapter_is_active_frozen_and_for_inference(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("cy", peft_config=LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    expected = alone(tiny_model, folder)
    adapted = load_adapter(tiny_model.train(), folder, "cy", check_base=check_base)
    assert isinstance(adapted, PeftModel)
    assert torch.equal(logits(adapted), expected)
    assert not adapted.training
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_second_adapter_joins_and_the_first_stays_active(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    cy, fr = make_adapter("cy", seed=1), make_adapter("fr", seed=2)
    expected = {"cy": alone(tiny_model, cy), "fr": alone(tiny_model, fr)}
    adapted = load_adapter(load_adapter(tiny_model, cy, "cy", check_base=check_base), fr, "fr", check_base=check_base)
    assert torch.equal(logits(adapted), expected["cy"])
    adapted.set_adapter("fr")
    assert torch.equal(logits(adapted), expected["fr"])


def test_adapters_of_a_pool_join_their_pool(tiny_model: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    pool = make_adapter("en", peft_config=S2LORA)
    trained = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(pool), adapter_name="pool")
    trained.add_adapter("cy", S2LoraConfig(pool="pool"))
    for name, parameter in trained.named_parameters():
        if name.endswith("coefficients.cy"):
            torch.nn.init.normal_(parameter)
    trained.set_adapter("cy")
    trained.save_pretrained(tmp_path / "saved", selected_adapters=["cy"], save_embedding_layers=False)
    adapted = load_adapter(tiny_model, pool, "pool", check_base=check_base)
    adapted = load_adapter(adapted, tmp_path / "saved" / "cy", "welsh", base_model="x/y")
    adapted.set_adapter("welsh")
    assert torch.equal(logits(adapted), logits(trained))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_takes_the_bases_precision(tiny_model: Any, make_adapter: Callable[..., Path], dtype: torch.dtype) -> None:
    adapted = load_adapter(tiny_model.to(dtype), make_adapter("cy"), check_base=check_base)
    assert {parameter.dtype for parameter in adapted.parameters()} == {dtype}


def test_the_base_keeps_every_byte(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    adapted = load_adapter(tiny_model, make_adapter("cy"), check_base=check_base)
    after = adapted.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- whose adapter -----------------------------------------------------------------------------------------------------


def test_a_base_of_another_name_is_refused_where_there_is_no_signature(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("cy")
    row = json.loads((folder / LANGUAGE_FILE).read_text())
    (folder / LANGUAGE_FILE).write_text(json.dumps(row | {"base_model": "openai/whisper-tiny", "base_signature": None}))
    tiny_model.config._name_or_path = "openai/whisper-small"
    with pytest.raises(AdapterError, match=r"'openai/whisper-tiny', not for 'openai/whisper-small'.*base_model='openai/whisper-tiny'"):
        load_adapter(tiny_model, folder)
    with warnings.catch_warnings(record=True) as caught:
        assert load_adapter(tiny_model, folder, base_model="openai/whisper-tiny")
    assert not [warning for warning in caught if "nothing says" in str(warning.message)]


def test_a_base_that_nothing_is_known_of_is_warned_about(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="nothing says whether it was made for this very model"):
        load_adapter(tiny_model, make_adapter("cy"))


def test_a_signature_decides_and_names_do_not(tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]) -> None:
    from conftest import build_tiny_model

    folder = make_adapter("cy")
    row = json.loads((folder / LANGUAGE_FILE).read_text())
    (folder / LANGUAGE_FILE).write_text(json.dumps(row | {"base_model": "openai/whisper-tiny"}))
    tiny_model.config._name_or_path = "me/copy-of-whisper-tiny"
    assert load_adapter(tiny_model, folder, check_base=check_base)
    other = build_tiny_model(tiny_processor, seed=5)
    other.config._name_or_path = "openai/whisper-tiny"
    with pytest.raises(AdapterError, match=r"does not belong to this model.*other weights"):
        load_adapter(other, folder, check_base=check_base)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "x" * 65, "../x", "encoder", "lo", "lora_A", "my_lora_", "base_layer", None, 5])
def test_a_name_that_peft_would_mix_up_is_refused(tiny_model: Any, make_adapter: Callable[..., Path], name: Any) -> None:
    folder, before = make_adapter("cy"), fingerprint(tiny_model)
    with pytest.raises(AdapterError):
        load_adapter(tiny_model, folder, name, check_base=check_base)
    assert fingerprint(tiny_model) == before


def test_a_name_that_is_taken_is_refused(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    adapted = load_adapter(tiny_model, make_adapter("cy"), "cy", check_base=check_base)
    before = fingerprint(adapted)
    with pytest.raises(AdapterError, match="has an adapter 'cy' already"):
        load_adapter(adapted, make_adapter("fr"), "cy", check_base=check_base)
    assert fingerprint(adapted) == before


def test_methods_that_cannot_be_mixed_are_refused_and_what_is_there_stays(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    adapted = load_adapter(tiny_model, make_adapter("cy"), "cy", check_base=check_base)
    before, expected = fingerprint(adapted), logits(adapted)
    with pytest.raises(AdapterError, match="Cannot combine adapters with different peft types"):
        load_adapter(adapted, make_adapter("fr", peft_config=S2LORA), "fr", check_base=check_base)
    assert fingerprint(adapted) == before
    assert torch.equal(logits(adapted), expected)


def test_a_repository_name_is_not_a_folder(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"There is no adapter folder .*fetch_adapter\('owner/name'\)"):
        load_adapter(tiny_model, "alice/whisper-tiny-lora-cy")


# ---- failures in the middle --------------------------------------------------------------------------------------------

KINDS = {"LoRA": None, "S2-LoRA": S2LORA, "LoRA-MoE": LoraMoeConfig(r=2)}


@pytest.mark.parametrize("beside", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_in_the_middle_leaves_no_trace(
    tiny_model: Any,
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    error: type[BaseException],
    beside: bool,
) -> None:
    """PEFT has wrapped the layers, hung up its hooks and frozen the base, and then fails."""
    import peft

    first, second = (make_adapter(code, peft_config=copy.deepcopy(KINDS[kind]), seed=i) for i, code in enumerate(("cy", "fr")))
    model = load_adapter(tiny_model, first, "first", check_base=check_base) if beside else tiny_model.train()
    before, expected = fingerprint(model), logits(model)

    def fails(adapted: Any, *_: Any, **__: Any) -> None:
        assert fingerprint(adapted) != before
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", fails)
        with pytest.raises(AdapterError if issubclass(error, Exception) else error, match="in the middle"):
            load_adapter(model, second, "second", check_base=check_base)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), expected)
    adapted = load_adapter(model, second, "second", check_base=check_base)
    assert "second" in adapted.peft_config


def test_hooks_of_others_can_still_be_taken_off_after_a_failure(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    called: list[int] = []
    handle = tiny_model.register_forward_hook(lambda *_: called.append(1))
    snapshot = Snapshot(tiny_model)
    load_adapter(tiny_model, make_adapter("cy"), check_base=check_base)
    snapshot.restore()
    handle.remove()
    logits(tiny_model)
    assert not called


# ---- a few of them -----------------------------------------------------------------------------------------------------


def cache_of(model: Any, size: int) -> AdapterCache:
    return AdapterCache(model, size, check_base=check_base)


def test_the_cache_gives_each_adapter_and_loads_it_once(
    tiny_model: Any, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_adapter(code, seed=i) for i, code in enumerate(("cy", "fr", "de"))]
    expected = [alone(tiny_model, folder) for folder in folders]
    loads: list[str] = []

    def counted(model: Any, folder: Path, *args: Any, **options: Any) -> Any:
        loads.append(folder.name)
        return load_adapter(model, folder, *args, **options)

    monkeypatch.setattr("hub_utils.load.load_adapter", counted)
    cache = cache_of(tiny_model, 3)
    for i in (0, 1, 2, 0, 2, 1, 0):
        assert torch.equal(logits(cache.use(folders[i])), expected[i])
    assert loads == ["cy", "fr", "de"]


def test_the_cache_drops_the_one_unused_for_longest(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    cy, fr, de = (make_adapter(code, seed=i) for i, code in enumerate(("cy", "fr", "de")))
    expected = {folder: alone(tiny_model, folder) for folder in (cy, fr, de)}
    cache = cache_of(tiny_model, 2)
    for folder in (cy, fr, cy, de, cy, fr):
        adapted = cache.use(folder)
        assert torch.equal(logits(adapted), expected[folder])
        assert len(cache) == len(adapted.peft_config) <= 2


def test_the_cache_stays_bounded_over_many(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("cy", name=f"cy{i}", seed=i) for i in range(6)]
    cache = cache_of(tiny_model, 2)
    cache.use(folders[0])
    cache.use(folders[1])
    full = sum(parameter.numel() for parameter in tiny_model.parameters())
    for folder in folders[2:] * 2:
        cache.use(folder)
        assert sum(parameter.numel() for parameter in tiny_model.parameters()) == full


def test_the_cache_changes_method_by_starting_over(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    cy, fr = make_adapter("cy"), make_adapter("fr", peft_config=S2LORA)
    expected = {cy: alone(tiny_model, cy), fr: alone(tiny_model, fr)}
    cache = cache_of(tiny_model, 4)
    for folder in (cy, fr, cy, fr):
        assert torch.equal(logits(cache.use(folder)), expected[folder])
        assert len(cache) == 1


@pytest.mark.parametrize("config", [None, S2LORA], ids=["same method", "another method"])
def test_the_cache_survives_an_adapter_that_is_refused(tiny_model: Any, make_adapter: Callable[..., Path], config: Any) -> None:
    cy, bad = make_adapter("cy"), make_adapter("fr", peft_config=config)
    (bad / WEIGHTS_FILE).write_bytes(b"broken")
    expected, cache = alone(tiny_model, cy), cache_of(tiny_model, 1)
    cache.use(cy)
    before = fingerprint(tiny_model)
    with pytest.raises(AdapterError, match="no safetensors"):
        cache.use(bad)
    assert fingerprint(tiny_model) == before
    assert torch.equal(logits(cache.use(cy)), expected)


def test_the_cache_keeps_a_pool_that_is_in_use(tiny_model: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    pool = make_adapter("en", peft_config=S2LORA)
    trained = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(pool), adapter_name="pool")
    for code in ("cy", "fr", "de"):
        trained.add_adapter(code, S2LoraConfig(pool="pool"))
    trained.save_pretrained(tmp_path / "saved", selected_adapters=["cy", "fr", "de"], save_embedding_layers=False)
    cache = AdapterCache(tiny_model, 2, base_model="x/y", check_base=check_base)
    cache.use(pool, "pool")
    for code in ("cy", "fr", "de", "cy"):
        adapted = cache.use(tmp_path / "saved" / code)
        assert "pool" in adapted.peft_config
        assert len(cache) == 2


def test_an_adapter_trained_anew_in_its_folder_is_another_one(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folder, cache = make_adapter("cy", seed=1), cache_of(tiny_model, 2)
    old = logits(cache.use(folder))
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    os.utime(folder / WEIGHTS_FILE, ns=(1, 1))
    assert not torch.equal(logits(cache.use(folder)), old)


def test_unloading_the_cache_gives_the_base_back(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    before = fingerprint(tiny_model)
    cache = cache_of(tiny_model, 2)
    cache.use(make_adapter("cy"))
    assert fingerprint(tiny_model) != before
    assert cache.unload() is tiny_model
    assert fingerprint(tiny_model) == before
    assert len(cache) == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, None])
def test_a_cache_of_no_size_is_refused(tiny_model: Any, size: Any) -> None:
    with pytest.raises(AdapterError, match="max_adapters must be a whole number from 1 up"):
        AdapterCache(tiny_model, size)


def test_a_cache_wants_the_bare_base(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match="bare base model"):
        AdapterCache(load_adapter(tiny_model, make_adapter("cy"), check_base=check_base))
