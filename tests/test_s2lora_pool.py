"""Adapters that share one frozen pool and own only coefficients: what they save, what they refuse, what they leave alone."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner_behaviours import CASES, close, loss_of, output

from peft_s2lora import S2LoraConfig, S2LoraLayer, to_lora

WHISPER = CASES["whisper"]
WEIGHTS = 2 * 4 + 2 * 8


def with_pool(**kwargs) -> PeftModel:
    """A model with a pool and one adapter, "fr", that uses it and is active."""
    model = get_peft_model(WHISPER.base(), S2LoraConfig(r=6, s2lora_alpha=3, init_weights=False), adapter_name="pool").eval()
    model.add_adapter("fr", S2LoraConfig(pool="pool", **{"init_weights": False, **kwargs}))
    model.set_adapter("fr")
    return model


def save(model: PeftModel, folder) -> None:
    """Pool in folder/pool, pooled adapter in folder/fr."""
    model.save_pretrained(folder)


def test_a_pooled_adapter_uses_the_pools_pair_and_its_own_coefficients():
    model = with_pool()
    layer = next(module for module in model.modules() if isinstance(module, S2LoraLayer))
    A, B, scaled_s = layer.factors("fr", torch.device("cpu"))
    assert A.data_ptr() == layer.s2lora_A["pool"].data_ptr()
    assert B.data_ptr() == layer.s2lora_B["pool"].data_ptr()
    assert torch.equal(scaled_s, layer.s2lora_coefficients["fr"])
    assert not torch.equal(layer.s2lora_coefficients["fr"], layer.s2lora_coefficients["pool"])
    assert [name for name, _ in model.named_parameters() if name.endswith(".fr") and "coefficients" not in name] == []


def test_only_the_coefficients_train_and_the_pool_stays():
    model = with_pool().train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith("s2lora_coefficients.fr") for name in trained)
    assert model.get_nb_trainable_parameters()[0] == 6 * WEIGHTS
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model, WHISPER.inputs).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_it_starts_as_the_base_model_and_rank_and_sharing_are_the_pools():
    model = with_pool(init_weights=True)
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))
    config = model.peft_config["fr"]
    assert (config.r, config.scaling, config.target_modules) == (6, 1.0, model.peft_config["pool"].target_modules)


def test_a_second_pooled_adapter_leaves_the_first_as_it_was():
    model = with_pool()
    expected = output(model, WHISPER.inputs)
    model.add_adapter("cy", S2LoraConfig(pool="pool", target_modules=["q_proj"], init_weights=False))
    model.set_adapter("cy")
    assert not close(output(model, WHISPER.inputs), expected, atol=1e-3)
    model.set_adapter("fr")
    assert torch.equal(output(model, WHISPER.inputs), expected)


def test_merging_and_exporting_a_pooled_adapter(tmp_path):
    model = with_pool()
    expected = output(model, WHISPER.inputs)
    to_lora(model, "fr", tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(WHISPER.base(), tmp_path), WHISPER.inputs), expected, atol=1e-5)
    assert close(output(model.merge_and_unload(), WHISPER.inputs), expected)


# ---- saving and loading -----------------------------------------------------------------------------------------------


def test_the_file_holds_only_coefficients_and_the_configuration_the_pools_hash(tmp_path):
    save(with_pool(), tmp_path)
    tensors = load_file(tmp_path / "fr" / "adapter_model.safetensors")
    assert len(tensors) == WEIGHTS
    assert all(key.endswith(".s2lora_coefficients") for key in tensors)
    saved = json.loads((tmp_path / "fr" / "adapter_config.json").read_text())
    assert saved["pool"] == "pool"
    assert len(saved["pool_hash"]) == 64


@pytest.mark.parametrize("pool_name", ["pool", "another"])
def test_it_loads_with_its_pool_under_any_name(tmp_path, pool_name):
    model = with_pool()
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "pool", adapter_name=pool_name)
    loaded.load_adapter(tmp_path / "fr", "fr")
    loaded.set_adapter("fr")
    assert torch.equal(output(loaded, WHISPER.inputs), output(model, WHISPER.inputs))


def test_it_loads_into_a_transformers_model(tmp_path):
    model = with_pool()
    save(model, tmp_path)
    loaded = WHISPER.base()
    loaded.load_adapter(str(tmp_path / "pool"), "pool")
    loaded.load_adapter(str(tmp_path / "fr"), "fr")
    loaded.set_adapter("fr")
    assert torch.equal(output(loaded, WHISPER.inputs), output(model, WHISPER.inputs))


def test_a_pool_trained_after_the_adapter_was_added_is_hashed_as_it_is_when_saving(tmp_path):
    model = with_pool()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("s2lora_A.pool")).add_(0.1)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "pool", adapter_name="pool")
    loaded.load_adapter(tmp_path / "fr", "fr")


def test_another_pool_is_refused(tmp_path):
    save(with_pool(), tmp_path)
    other = get_peft_model(WHISPER.base(), S2LoraConfig(r=6), adapter_name="pool")
    with pytest.raises(ValueError, match="trained on a pool 'pool' with other values"):
        other.load_adapter(tmp_path / "fr", "fr")
    assert list(other.peft_config) == ["pool"]


def test_a_missing_pool_is_refused_by_name(tmp_path):
    save(with_pool(), tmp_path)
    with pytest.raises(ValueError, match=r"needs the pool 'pool', which is not loaded.*none\. Load the pool first"):
        PeftModel.from_pretrained(WHISPER.base(), tmp_path / "fr")


# ---- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 5}, "r=5 does not fit the pool 'pool', which has r=6"),
        ({"share_scope": "global"}, "share_scope='global' does not fit"),
        ({"target_modules": ["q_proj", "fc1"]}, "fc1 is not adapted by the pool"),
        ({"pool": "nobody"}, "needs the pool 'nobody', which is not loaded"),
        ({"pool": "fr"}, "needs the pool 'fr', which is not loaded"),
        ({"pool": ""}, "pool must be the name of another adapter"),
    ],
)
def test_a_pooled_adapter_that_cannot_work_is_refused(kwargs, message):
    model = with_pool()
    before = output(model, WHISPER.inputs)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("cy", S2LoraConfig(**{"pool": "pool", **kwargs}))
    assert set(model.peft_config) == {"pool", "fr"}
    assert torch.equal(output(model, WHISPER.inputs), before)


def test_a_pool_in_use_can_be_neither_deleted_nor_pruned():
    model = with_pool()
    with pytest.raises(ValueError, match=r"is the pool of fr\. Delete those first"):
        model.delete_adapter("pool")
    with pytest.raises(ValueError, match="is the pool of fr"):
        model.prune("pool")
    model.delete_adapter("fr")
    model.delete_adapter("pool")
    assert not [name for name, _ in model.named_parameters() if "s2lora_" in name]
    assert torch.equal(output(model.base_model.model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_pruning_a_pooled_adapter_zeroes_small_coefficients_and_leaves_the_pool():
    model = with_pool()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.prune("fr", threshold=0.5)
    s = torch.cat([p for name, p in model.named_parameters() if name.endswith("s2lora_coefficients.fr")])
    assert s[s != 0].abs().min() > 0.5
    assert (s == 0).any()
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_bringing_the_pools_directions_to_length_one_changes_no_output_of_its_users():
    from peft_s2lora import normalize_directions

    model = with_pool()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("s2lora_A.pool")).mul_(3)
    expected = output(model, WHISPER.inputs)
    normalize_directions(model, "pool")
    assert close(output(model, WHISPER.inputs), expected)


@pytest.mark.parametrize("with_stranger", [False, True])
def test_a_mixed_batch_of_pooled_adapters_computes_each_row_alone(with_stranger):
    # Rows of one pool go through one product together, whichever of its adapters they use; the pool itself is one of them.
    model = with_pool()
    model.add_adapter("cy", S2LoraConfig(pool="pool", init_weights=False))
    model.add_adapter("alone", S2LoraConfig(r=3, init_weights=False))
    names = ["cy", "fr", "__base__", "cy", "pool"] + ["alone"] * with_stranger
    inputs = {
        "input_features": torch.randn(len(names), 8, 20, generator=torch.Generator().manual_seed(5)),
        "decoder_input_ids": torch.randint(4, 30, (len(names), 4), generator=torch.Generator().manual_seed(6)),
    }
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            expected = output(WHISPER.base(), own)
        else:
            model.set_adapter(name)
            expected = output(model, own)
        assert close(mixed[row], expected[0]), name
    assert not close(mixed[0], output(WHISPER.base(), {key: value[:1] for key, value in inputs.items()})[0], atol=1e-3)


def test_a_mixed_batch_of_one_pool_takes_one_product_up_and_down_per_layer():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 7)), S2LoraConfig(r=4, target_modules=["0"], init_weights=False), "pool")
    names = [f"language{number}" for number in range(5)]
    for name in names:
        model.add_adapter(name, S2LoraConfig(pool="pool", init_weights=False))
    model.eval()
    x = torch.randn(5, 3, 6)
    counts = []
    for batch in (["pool"] * 5, names):
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(x, adapter_names=batch)
        counts.append(sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")))
    assert counts[0] == counts[1] > 0
