"""A and B exist once: in memory, in the file, in every count. Ownership passes on when the owner goes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from tuner_behaviours import CASES, close, loss_of, output

from peft_s2lora import S2LoraConfig, S2LoraLayer

WHISPER = CASES["whisper"]
SIX_TYPES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapted(**kwargs) -> PeftModel:
    config = S2LoraConfig(**{"r": 4, "target_modules": SIX_TYPES, "init_weights": False, **kwargs})
    return get_peft_model(WHISPER.base(), config).eval()


def layers_of(model: nn.Module) -> list[S2LoraLayer]:
    return [module for module in model.modules() if isinstance(module, S2LoraLayer)]


def pairs_in_use(model: nn.Module, name: str = "default") -> dict[tuple[int, int], set[int]]:
    """(d_out, d_in) -> storages of A that layers of this size use."""
    storages: dict[tuple[int, int], set[int]] = {}
    for layer in layers_of(model):
        A, B, _ = layer.factors(name, torch.device("cpu"))
        assert B.shape[1] == A.shape[0] == layer.r[name]
        storages.setdefault((layer.out_features, layer.in_features), set()).add(A.untyped_storage().data_ptr())
    return storages


def assert_shared_by_shape(model: nn.Module) -> None:
    assert [len(storages) for storages in pairs_in_use(model).values()] == [1, 1, 1]
    names = [name for name, _ in model.named_parameters() if "s2lora_A" in name or "s2lora_B" in name]
    assert len(names) == 2 * 3
    assert len({parameter.data_ptr() for name, parameter in model.named_parameters() if name in names}) == len(names)


# ---- who shares -------------------------------------------------------------------------------------------------------


def test_weights_of_one_size_use_one_pair():
    model = adapted()
    assert set(pairs_in_use(model)) == {(16, 16), (24, 16), (16, 24)}
    assert_shared_by_shape(model)


def test_weights_of_one_name_use_one_pair():
    model = adapted(share_scope="module_type")
    by_name: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, S2LoraLayer):
            by_name.setdefault(name.rpartition(".")[2], set()).add(module.shared_factors["default"].A.data_ptr())
    assert set(by_name) == set(SIX_TYPES)
    assert all(len(storages) == 1 for storages in by_name.values())
    assert len(set().union(*by_name.values())) == 6


def test_all_weights_use_slices_of_one_pair():
    model = adapted(share_scope="global")
    A, B = (next(p for name, p in model.named_parameters() if factor in name) for factor in ("s2lora_A", "s2lora_B"))
    assert (A.shape, B.shape) == ((4, 24), (24, 4))
    assert set().union(*pairs_in_use(model).values()) == {A.untyped_storage().data_ptr()}


def test_share_groups_keep_encoder_and_decoder_apart():
    model = adapted(share_groups=[r".*encoder\.layers.*"])
    storages = {side: set() for side in ("encoder.layers", "decoder.layers")}
    for name, module in model.named_modules():
        if isinstance(module, S2LoraLayer):
            side = next(side for side in storages if side in name)
            storages[side].add(module.shared_factors["default"].A.data_ptr())
    assert len(storages["encoder.layers"]) == len(storages["decoder.layers"]) == 3
    assert not storages["encoder.layers"] & storages["decoder.layers"]


def test_adapters_do_not_share_with_each_other():
    model = adapted()
    model.add_adapter("second", S2LoraConfig(r=7, share_scope="global", target_modules=SIX_TYPES))
    first, second = pairs_in_use(model), pairs_in_use(model, "second")
    assert not set().union(*first.values()) & set().union(*second.values())
    assert layers_of(model)[0].r == {"default": 4, "second": 7}


# ---- sharing survives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "treat",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: model.bfloat16().float(),
        lambda model: model.to("cpu"),
    ],
    ids=["deepcopy", "pickle", "dtype and back", "bfloat16", "device"],
)
def test_sharing_survives(treat):
    model = adapted()
    assert_shared_by_shape(treat(model))


def test_a_deep_copy_shares_within_itself_and_not_with_the_original():
    model = adapted()
    copied = copy.deepcopy(model)
    first, second = pairs_in_use(model), pairs_in_use(copied)
    assert not set().union(*first.values()) & set().union(*second.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_sharing_survives_saving_and_loading(tmp_path, low_cpu_mem_usage):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_shared_by_shape(loaded)


def test_an_adapter_made_on_the_meta_device_takes_no_memory_and_shares():
    model = get_peft_model(WHISPER.base(), S2LoraConfig(r=4), low_cpu_mem_usage=True)
    parameters = [parameter for name, parameter in model.named_parameters() if "s2lora_" in name]
    assert all(parameter.is_meta for parameter in parameters)
    assert len({id(layer.shared_factors["default"].A) for layer in layers_of(model)}) == 1


def test_a_model_built_on_the_meta_device_shares_when_it_gets_memory():
    with torch.device("meta"):
        model = get_peft_model(WHISPER.build(), S2LoraConfig(r=4, target_modules=SIX_TYPES))
    model.to_empty(device="cpu")
    assert_shared_by_shape(model)


def test_a_training_step_moves_the_pair_that_all_layers_use():
    model = adapted().train()
    before = {size: next(iter(storages)) for size, storages in pairs_in_use(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model, WHISPER.inputs).backward()
    optimizer.step()
    assert {size: next(iter(storages)) for size, storages in pairs_in_use(model).items()} == before


# ---- counted and saved once -------------------------------------------------------------------------------------------


def test_parameters_are_counted_once(capsys):
    model = adapted(r=4)
    pairs = 4 * (16 + 16) + 4 * (24 + 16) + 4 * (16 + 24)
    weights = 2 * 6 + 2 * 10
    expected = pairs + 4 * weights
    assert model.get_nb_trainable_parameters()[0] == model.get_model_status().trainable_params == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,d} ||" in capsys.readouterr().out


def test_the_count_on_whisper_small_is_the_papers_figure():
    # 53,760 numbers, 0.02 % of the model: r = 32 on the attention projections, as in the paper's smallest setting.
    with torch.device("meta"):
        config = WhisperConfig(d_model=768, encoder_layers=12, decoder_layers=12, encoder_attention_heads=12, decoder_attention_heads=12,
                               encoder_ffn_dim=3072, decoder_ffn_dim=3072, vocab_size=51865)  # fmt: skip
        model = get_peft_model(WhisperForConditionalGeneration(config), S2LoraConfig(r=32))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 53_760
    assert round(100 * trainable / total, 4) == 0.0222


def test_the_file_holds_each_pair_once_and_little_else(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("s2lora_A" in key for key in tensors) == sum("s2lora_B" in key for key in tensors) == 3
    assert sum("s2lora_coefficients" in key for key in tensors) == 2 * 6 + 2 * 10
    assert sum(tensor.numel() for tensor in tensors.values()) == model.get_nb_trainable_parameters()[0]


def test_rank_32_on_whisper_small_shapes_is_under_1_3_megabytes(tmp_path):
    shapes = [(768, 768)] * (12 * 4 + 12 * 8) + [(3072, 768), (768, 3072)] * 24
    with torch.device("meta"):
        base = nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in shapes))
    model = get_peft_model(base, S2LoraConfig(r=32, target_modules="all-linear"))
    state_dict = {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items() if "s2lora_" in key}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1.3e6


# ---- ownership passes on ----------------------------------------------------------------------------------------------


def test_when_the_owners_adapter_is_deleted_the_next_layer_takes_the_pair_over():
    model = adapted()
    owner, heir = [layer for layer in layers_of(model) if layer.shared_factors["default"].key == "16x16"][:2]
    A = owner.s2lora_A["default"]
    owner.delete_adapter("default")
    assert heir.s2lora_A["default"] is A
    assert heir.shared_factors["default"].owner is heir
    assert "default" not in owner.s2lora_A
    output(model, WHISPER.inputs)


def test_an_owner_cut_out_of_the_model_is_replaced_when_saving(tmp_path):
    model = adapted()
    model.get_base_model().model.encoder.layers = model.get_base_model().model.encoder.layers[1:]
    expected = output(model, WHISPER.inputs)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("s2lora_A" in key for key in tensors) == 3
    base = WHISPER.base()
    base.model.encoder.layers = base.model.encoder.layers[1:]
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), WHISPER.inputs), expected)
    assert_shared_by_shape(model)


def test_an_adapter_loads_into_a_model_that_lacks_the_owning_layer(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = WHISPER.base()
    base.model.encoder.layers = base.model.encoder.layers[1:]
    loaded = PeftModel.from_pretrained(base, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    pairs = {tuple(tensor.shape): tensor for key, tensor in saved.items() if "s2lora_A" in key and "fc" not in key}
    attention = next(layer for layer in layers_of(loaded) if layer.shared_factors["default"].key == "16x16")
    assert torch.equal(attention.s2lora_A["default"], pairs[4, 16])


def test_merging_in_any_order_needs_no_owner():
    model = adapted()
    expected = output(model, WHISPER.inputs)
    for layer in reversed(layers_of(model)):
        layer.merge()
    assert close(output(model, WHISPER.inputs), expected)


# ---- checkpoints that do not fit --------------------------------------------------------------------------------------


def test_a_checkpoint_without_its_pair_is_refused():
    model = adapted()
    tensors = {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if "s2lora_A" not in key}
    with pytest.raises(ValueError, match="not the shared s2lora_A"):
        load(model, tensors)


def test_a_checkpoint_of_another_share_scope_is_refused():
    tensors = get_peft_model_state_dict(adapted(share_scope="module_type"))
    with pytest.raises(ValueError, match="several s2lora_A for the sharing group '16x16'"):
        load(adapted(), tensors)


def test_a_checkpoint_of_another_rank_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(adapted(), get_peft_model_state_dict(adapted(r=5)))


def load(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, tensors)
