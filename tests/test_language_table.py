"""A table of languages: what a row computes beside PEFT's own adapters, what is stored, moved and refused.

The truth is PEFT, one adapter at a time or with its `adapter_names`, on a copy of the same tiny Whisper; for pools it is `peft_s2lora`.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import base_hash, build_tiny_model, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperForConditionalGeneration

from peft_s2lora import S2LoraConfig
from whisper_moe import LanguageTable, WrongBaseError, adapters_off
from whisper_moe.language_stacks import Stack
from whisper_moe.language_table import RoutedLinear

LORAS = {  # language -> adapter; ranks, targets and scalings differ
    "cy": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "out_proj"]),
    "br": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "out_proj"]),
    "qug": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj", "fc1", "fc2"]),
    "mi": LoraConfig(r=4, rank_pattern={"fc1": 2}, alpha_pattern={"k_proj": 9}, target_modules=["k_proj", "fc1"], layers_to_transform=[1]),
    "haw": S2LoraConfig(r=6, s2lora_alpha=3),
    "su": S2LoraConfig(r=5, share_scope="global", target_modules=["q_proj", "fc1", "fc2"]),
    "sn": S2LoraConfig(r=4, share_scope="module_type", share_groups=[r".*encoder\.layers.*"]),
}
POOLED = {"ln": 7, "ha": 8, "yo": 9}  # language -> seed


@pytest.fixture(scope="module")
def base(tiny_processor) -> WhisperForConditionalGeneration:
    """In double precision, so that what remains of a difference is arithmetic and not rounding."""
    return build_tiny_model(tiny_processor).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base) -> dict[str, Path]:
    """language -> folder of its adapter; "pool" is the pool that the pooled ones use."""
    root = tmp_path_factory.mktemp("adapters")
    found = {
        name: write_adapter(root / name, base, name, peft_config=copy.deepcopy(config), seed=10 + number)
        for number, (name, config) in enumerate(LORAS.items())
    }
    torch.manual_seed(6)
    model = get_peft_model(copy.deepcopy(base), S2LoraConfig(r=6, s2lora_alpha=3, init_weights=False), adapter_name="pool")
    for name in POOLED:
        model.add_adapter(name, S2LoraConfig(pool="pool", s2lora_alpha=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            language = name.rpartition(".")[2]
            if language in (*POOLED, "pool"):
                torch.manual_seed(sum(map(ord, name)))
                parameter.normal_(std=0.5)
    model.save_pretrained(root)
    return found | {name: root / name for name in (*POOLED, "pool")}


@pytest.fixture(scope="module")
def inputs(tiny_processor) -> dict[str, torch.Tensor]:
    start = tiny_processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(12, 80, 200, generator=generator, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[start, 5, 6, 7]]).expand(12, -1)}


@pytest.fixture(scope="module")
def alone(base, folders, inputs) -> dict[str | None, torch.Tensor]:
    """language -> logits of all rows, as PEFT computes them with that adapter alone."""
    found: dict[str | None, torch.Tensor] = {}
    with torch.no_grad():
        found[None] = base(**inputs).logits
        for name in LORAS:
            model = PeftModel.from_pretrained(copy.deepcopy(base), folders[name], autocast_adapter_dtype=False).eval()
            found[name] = model(**inputs).logits
        model = PeftModel.from_pretrained(copy.deepcopy(base), folders["pool"], adapter_name="pool", autocast_adapter_dtype=False).eval()
        for name in POOLED:
            model.load_adapter(folders[name], name, autocast_adapter_dtype=False)
        for name in ("pool", *POOLED):
            model.set_adapter(name)
            found[name] = model(**inputs).logits
    return found


@pytest.fixture
def table(base, folders):
    """Everything in one table; the model is bare again afterwards."""
    table = LanguageTable.attach(base)
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in (*LORAS, *POOLED, "pool")})
    yield table
    if table.model is base and any(isinstance(module, RoutedLinear) for module in base.modules()):
        table.detach()


def logits(table: LanguageTable, rows, inputs) -> torch.Tensor:
    with torch.no_grad(), table.rows(rows):
        return table.model(**{name: tensor[: len(rows)] for name, tensor in inputs.items()}).logits


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


# ---- what a row computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [*LORAS, *POOLED, "pool"])
def test_a_batch_of_one_language_is_peft_with_that_adapter(table, inputs, alone, language):
    assert not close(alone[language], alone[None], atol=1e-2), "the adapter does something"
    assert close(logits(table, [language] * 3, inputs), alone[language][:3])


def test_every_row_of_a_mixed_batch_is_peft_with_its_adapter(table, inputs, alone):
    rows = ["cy", None, "qug", "ln", "haw", "su", "cy", "sn", "mi", "ha", "pool", "yo"]
    mixed = logits(table, rows, inputs)
    for number, language in enumerate(rows):
        assert close(mixed[number], alone[language][number]), language


def test_a_mixed_batch_is_pefts_own_mixed_batch(base, folders, inputs):
    names = ["cy", "br", "__base__", "cy"]
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders["cy"], adapter_name="cy", autocast_adapter_dtype=False).eval()
    model.load_adapter(folders["br"], "br", autocast_adapter_dtype=False)
    few = {name: tensor[:4] for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**few, adapter_names=names).logits
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({"cy": folders["cy"], "br": folders["br"]})
    assert close(logits(table, [None if name == "__base__" else name for name in names], inputs), expected)


def test_rows_without_a_language_are_the_base_bit_for_bit(table, inputs, alone):
    rows = ["cy", None, "ln", None]
    with torch.no_grad():
        table.detach()
        expected = table.model(**{name: tensor[:4] for name, tensor in inputs.items()}).logits
    again = LanguageTable.attach(table.model)
    for stack in table._stacks:  # the languages go on in a table of their own
        again._stacks.append(stack)
    again._entries = table._entries
    mixed = logits(again, rows, inputs)
    again.detach()
    assert torch.equal(mixed[1], expected[1])
    assert torch.equal(mixed[3], expected[3])
    assert close(mixed[0], alone["cy"][0])


def test_a_mixture_of_pool_languages_is_the_mixture_of_their_coefficients(table, folders, inputs, base, tmp_path):
    weights = {"ln": 0.3, "ha": 0.7}
    states = {name: load_file(folders[name] / "adapter_model.safetensors") for name in weights}
    mixed = {key: sum(weight * states[name][key] for name, weight in weights.items()) for key in states["ln"]}
    shutil.copytree(folders["ln"], tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "adapter_model.safetensors")
    table.add("mixed", tmp_path / "mixed")
    assert close(logits(table, [weights, None], inputs), logits(table, ["mixed", None], inputs))


def test_a_mixture_of_loras_adds_their_weighted_deltas(base, folders, inputs):
    weights = {"cy": 0.25, "br": 0.5}
    model = copy.deepcopy(base)
    for name, weight in weights.items():
        merged = PeftModel.from_pretrained(copy.deepcopy(base), folders[name], autocast_adapter_dtype=False).merge_and_unload()
        with torch.no_grad():
            for (key, parameter), original in zip(model.named_parameters(), base.parameters(), strict=True):
                parameter += weight * (merged.get_parameter(key) - original)
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**few).logits
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in weights})
    assert close(logits(table, [weights, weights], inputs), expected)
    assert close(logits(table, [weights, "cy"], inputs)[0], expected[0])


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.sampled_from([None, *LORAS, *POOLED]), min_size=1, max_size=12))
def test_any_batch_is_its_rows_one_by_one(property_table, inputs, alone, rows):
    mixed = logits(property_table, rows, inputs)
    for number, language in enumerate(rows):
        assert close(mixed[number], alone[language][number]), (number, language)


@pytest.fixture(scope="module")
def property_table(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in (*LORAS, *POOLED)})
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_take_the_precision_of_the_model(base, folders, inputs, alone, dtype):
    rows = ["cy", None, "ln", "haw"]
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in ("cy", "ln", "haw")})
    table.model.to(dtype)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    mixed = logits(table, rows, cast)
    assert mixed.dtype == dtype
    size = alone[None].abs().max()
    for number, language in enumerate(rows):
        error = (mixed[number].double() - alone[language][number]).abs().max() / size
        assert error < (1e-5 if dtype == torch.float32 else 0.15), language


def test_autocast_is_followed(base, folders, inputs, alone):
    rows = ["cy", None, "ln", "haw"]
    table = LanguageTable.attach(copy.deepcopy(base).float())
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in ("cy", "ln", "haw")})
    layer = table.model.model.decoder.layers[0].fc1
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 2, 16)).dtype == torch.bfloat16
        mixed = logits(table, rows, single)
    for number, language in enumerate(rows):
        assert (mixed[number].double() - alone[language][number]).abs().max() < 0.15 * alone[None].abs().max(), language


def test_gradients_reach_the_input_through_a_mixed_batch(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in ("cy", "ln")})
    layer = next(module for module in table.model.modules() if isinstance(module, RoutedLinear))
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    with table.rows(["cy", "ln", None]):
        assert torch.autograd.gradcheck(layer, (x,))


# ---- attaching and detaching -------------------------------------------------------------------------------------------


def test_detach_puts_every_module_back(base, folders, inputs):
    model = copy.deepcopy(base)
    modules, names = dict(model.named_modules()), list(model.state_dict())
    digest = base_hash(model, names)
    table = LanguageTable.attach(model)
    table.add("cy", folders["cy"])
    with torch.no_grad(), table.rows(["cy"] * 12):
        model(**inputs)
    assert table.detach() is model
    assert list(model.named_modules()) == list(modules.items())
    assert base_hash(model, names) == digest
    with pytest.raises(ValueError, match="detached"), table.rows(["cy"]):
        pass


def test_outside_the_block_the_model_is_its_base(table, inputs, alone):
    with torch.no_grad():
        assert torch.equal(table.model(**inputs).logits, alone[None])
        with pytest.raises(RuntimeError, match="stop"), table.rows(["cy"] * 12):
            raise RuntimeError("stop")
        assert torch.equal(table.model(**inputs).logits, alone[None])


def test_blocks_may_be_nested_and_the_outer_one_comes_back(table, inputs, alone):
    with torch.no_grad(), table.rows(["cy"] * 12):
        with table.rows(["qug"] * 12):
            assert close(table.model(**inputs).logits, alone["qug"])
        assert close(table.model(**inputs).logits, alone["cy"])


def test_adapters_off_hears_the_base_inside_a_block_too_and_the_block_comes_back(table, inputs, alone):
    with torch.no_grad(), table.rows(["cy"] * 12):
        with adapters_off(table.model):
            assert torch.equal(table.model(**inputs).logits, alone[None])
        assert close(table.model(**inputs).logits, alone["cy"])


def test_a_model_with_peft_adapters_is_refused_and_the_way_out_works(base, folders):
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders["cy"])
    with pytest.raises(ValueError, match=r"bare base.*unload"):
        LanguageTable.attach(model)
    with pytest.raises(ValueError, match=r"bare base.*unload"):
        LanguageTable.attach(model.get_base_model())
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    LanguageTable.attach(model.unload())


def test_a_second_table_on_a_model_is_refused(table):
    with pytest.raises(ValueError, match=r"table\.detach"):
        LanguageTable.attach(table.model)


def test_targets_that_match_nothing_are_refused_with_what_there_is(base):
    with pytest.raises(ValueError, match=r"'?query'?.*This model has: fc1, fc2, k_proj, out_proj, proj_out, q_proj, v_proj"):
        LanguageTable.attach(base, target_modules=["query"])


# ---- adding, dropping, growing -----------------------------------------------------------------------------------------


def test_languages_may_come_and_go(table, folders, inputs, alone):
    names = table.languages
    table.drop("cy")
    assert "cy" not in table
    assert len(table) == len(names) - 1
    table.add("cy2", folders["qug"])
    table.add("cy", folders["cy"])
    assert close(logits(table, ["br", "cy", "cy2"], inputs)[1], alone["cy"][1])
    assert close(logits(table, ["br", "cy", "cy2"], inputs)[0], alone["br"][0])
    assert close(logits(table, ["br", "cy", "cy2"], inputs)[2], alone["qug"][2])


def test_the_storage_doubles_and_slots_are_used_again(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    capacities = []
    for number in range(9):
        table.add(f"x{number}", folders["ln"])
        capacities.append(table._stacks[0].capacity)
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    for number in range(5):
        table.drop(f"x{number}")
    for number in range(12):
        table.add(f"y{number}", folders["ha"])
    assert table._stacks[0].capacity == 16


def test_adapters_of_one_shape_share_a_stack_and_others_do_not(table):
    stacks = {language: entry.stack for language, entry in table._entries.items()}
    assert stacks["cy"] is stacks["br"]
    assert stacks["ln"] is stacks["ha"] is stacks["yo"] is stacks["pool"]
    assert len({id(stack) for stack in table._stacks}) == len(table._stacks) == 7


def test_memory_per_language_is_the_adapters_bytes(table, folders):
    for language in ("cy", "ln"):
        stored = sum(tensor.numel() for tensor in load_file(folders[language] / "adapter_model.safetensors").values())
        assert table.nbytes(language) == 8 * stored  # double precision
    before = table.nbytes()
    table.drop("ln")
    table.add("ln", folders["ln"])
    assert table.nbytes() == before


def test_load_many_adds_all_or_none(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    with pytest.raises(ValueError, match="add_pool"):
        table.load_many({"cy": folders["cy"], "ln": folders["ln"]})
    assert table.languages == []
    assert table._stacks == []
    table.add_pool(folders["pool"])
    table.load_many({"cy": folders["cy"], "ln": folders["ln"]})
    assert table.languages == ["cy", "ln"]


def test_tensors_may_be_handed_over_instead_of_a_folder(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base))
    config = json.loads((folders["cy"] / "adapter_config.json").read_text())
    table.add("cy", (config, load_file(folders["cy"] / "adapter_model.safetensors")))
    assert close(logits(table, ["cy"], inputs), alone["cy"][:1])


def test_a_language_in_use_is_not_dropped(table):
    with table.rows(["cy", "ln"]):
        with pytest.raises(ValueError, match="is used by the batch"):
            table.drop("cy")
        table.drop("qug")
    table.drop("cy")


def test_the_card_names_the_carrier(base, tmp_path):
    folder = write_adapter(tmp_path / "qug", base, "qug", carrier="es")
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add("qug", folder)
    table.add("other", folder, carrier="cy")
    assert (table.carrier("qug"), table.carrier("other")) == ("es", "cy")


# ---- a bounded number on the device ------------------------------------------------------------------------------------


def test_languages_beyond_the_bound_wait_in_host_memory_and_are_moved_on_demand(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=2)
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in (*POOLED, "cy")})
    assert table.on_device == ["ln", "ha"]
    assert table.num_moved == 0
    assert close(logits(table, ["yo", None], inputs)[0], alone["yo"][0])
    assert (table.on_device, table.num_moved) == (["ha", "yo"], 1)
    logits(table, ["ha", "ha"], inputs)  # there already; now the one used last
    assert (table.on_device, table.num_moved) == (["yo", "ha"], 1)
    mixed = logits(table, ["cy", "ha"], inputs)
    assert (table.on_device, table.num_moved) == (["ha", "cy"], 2) or (table.on_device, table.num_moved) == (["cy", "ha"], 2)
    assert close(mixed[0], alone["cy"][0])
    assert close(mixed[1], alone["ha"][1])
    assert all(stack.capacity <= 2 for stack in table._stacks)


def test_every_order_of_batches_gives_the_same_as_without_a_bound(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=3)
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in (*LORAS, *POOLED)})
    names = table.languages
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        rows = [names[i] for i in torch.randint(len(names), (3,), generator=generator).tolist()]
        mixed = logits(table, rows, inputs)
        for number, language in enumerate(rows):
            assert close(mixed[number], alone[language][number]), (rows, language)
        assert len(table.on_device) <= 3
    assert table.num_moved > 3


def test_a_batch_with_more_languages_than_the_bound_is_refused(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=2)
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in POOLED})
    with pytest.raises(ValueError, match="asks for 3 languages, and max_on_device lets 2"), table.rows([*POOLED]):
        pass
    with table.rows(["ln", "ha"]), pytest.raises(ValueError, match="used by batches that are running"), table.rows(["yo"]):
        pass
    with pytest.raises(ValueError, match="max_on_device must be 1 or more, got 0"):
        LanguageTable.attach(copy.deepcopy(base), max_on_device=0)


# ---- one file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_on_device", [None, 2])
def test_a_saved_table_comes_back(table, base, inputs, tmp_path, max_on_device):
    rows = ["cy", None, "ln", "haw", "su", "qug", "pool"]
    expected = logits(table, rows, inputs)
    table.drop("br")
    table.save(tmp_path / "table.safetensors")
    again = LanguageTable.load(tmp_path / "table.safetensors", copy.deepcopy(table.detach()), max_on_device=max_on_device)
    assert again.languages == table.languages
    for number, language in enumerate(rows):
        batch = rows if max_on_device is None else [None] * number + [language]
        assert close(logits(again, batch, inputs)[number], expected[number]), language
    assert again.nbytes("cy") == table.nbytes("cy")


def test_a_table_of_another_base_is_refused_and_the_model_is_as_before(table, tiny_processor, tmp_path):
    table.save(tmp_path / "table.safetensors")
    other = build_tiny_model(tiny_processor, seed=1)
    with pytest.raises(WrongBaseError, match="other weights"):
        LanguageTable.load(tmp_path / "table.safetensors", other)
    assert not any(isinstance(module, RoutedLinear) for module in other.modules())


def test_a_file_that_is_no_table_is_refused(base, folders, tmp_path):
    with pytest.raises(ValueError, match="no table of languages"):
        LanguageTable.load(folders["cy"] / "adapter_model.safetensors", copy.deepcopy(base))
    (tmp_path / "table").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        LanguageTable.load(tmp_path / "table", copy.deepcopy(base))


def test_languages_of_a_loaded_file_that_wait_do_not_hold_on_to_it(base, folders, tmp_path):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in ("cy", "br")})
    table.save(tmp_path / "table")
    loaded = LanguageTable.load(tmp_path / "table", copy.deepcopy(base), max_on_device=1)
    waiting = [tensor for entry in loaded._entries.values() for tensor in entry.host]
    assert waiting
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in waiting)


# ---- when it fails in the middle ---------------------------------------------------------------------------------------


def fail_at(monkeypatch, number: int) -> None:
    """Let the device be full the first time, the second, ... that storage is written to."""
    write, calls = Stack.write, itertools.count(1)

    def write_or_fail(self, *args):
        if next(calls) == number:
            raise torch.OutOfMemoryError("out of memory")
        return write(self, *args)

    monkeypatch.setattr(Stack, "write", write_or_fail)


def test_a_language_that_could_not_be_brought_does_not_speak_with_anothers_numbers(base, folders, inputs, alone, monkeypatch):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=1)
    table.load_many({name: folders[name] for name in ("cy", "br")})
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        with pytest.raises(torch.OutOfMemoryError):
            logits(table, ["br"] * 2, inputs)
        assert "br" not in table.on_device
    size = table.nbytes()
    for language in ("br", "cy", "br"):
        assert close(logits(table, [language] * 2, inputs), alone[language][:2]), language
    assert table.nbytes() == size  # no slot was lost


@pytest.mark.parametrize("max_on_device", [None, 3])
def test_load_many_adds_none_where_storage_runs_out(base, folders, inputs, alone, monkeypatch, max_on_device):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=max_on_device)
    table.add("cy", folders["cy"])
    new = {name: folders[name] for name in ("br", "mi")}  # "br" lies beside "cy", "mi" needs a stack of its own
    stacks = list(table._stacks)
    for number in (1, 2):
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(torch.OutOfMemoryError):
                table.load_many(new)
        assert (table.languages, table.on_device, table._stacks) == (["cy"], ["cy"], stacks)
        assert close(logits(table, ["cy"] * 2, inputs), alone["cy"][:2])
    table.load_many(new)
    assert [stack.capacity for stack in table._stacks] == [2, 1]  # no slot was lost
    mixed = logits(table, ["cy", "br", "mi"], inputs)
    assert all(close(mixed[row], alone[name][row]) for row, name in enumerate(["cy", "br", "mi"]))


# ---- inference mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_on_device", [None, 1])
def test_a_table_made_and_grown_in_inference_mode_works_outside_of_it(base, folders, inputs, alone, max_on_device):
    model = copy.deepcopy(base)
    with torch.inference_mode():
        table = LanguageTable.attach(model, max_on_device=max_on_device)
        table.add_pool(folders["pool"])
        table.load_many({name: folders[name] for name in ("cy", "ln")})
        logits(table, ["ln"] * 2, inputs)
    table.load_many({name: folders[name] for name in ("br", "ha")})
    for language in ("br", "cy", "ha", "ln", "cy"):
        with torch.inference_mode(language == "ha"):
            found = logits(table, [language] * 2, inputs)
        assert close(found.clone(), alone[language][:2]), language
    layer = next(module for module in table.model.modules() if isinstance(module, RoutedLinear))
    with table.rows(["ln"]):
        x = torch.randn(1, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


def test_static_rows_made_in_inference_mode_are_set_outside_of_it(table, inputs, alone):
    with torch.inference_mode():
        rows = table.static_rows(2)
        rows.set(["cy", "ln"])
    rows.set(["br", "ha"])
    with torch.no_grad(), rows.use():
        mixed = table.model(**{name: tensor[:2] for name, tensor in inputs.items()}).logits
    assert close(mixed[0], alone["br"][0])
    assert close(mixed[1], alone["ha"][1])


# ---- what is refused ---------------------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, config=None, tensors=None, card=None) -> Path:
    """A copy of an adapter with fields of its configuration or card replaced and its tensors passed through a function."""
    shutil.copytree(folder, to)
    for name, fields in (("adapter_config.json", config), ("language_adapter.json", card)):
        if fields is not None:
            (to / name).write_text(json.dumps(json.loads((to / name).read_text()) | fields))
    if tensors is not None:
        save_file(tensors(load_file(to / "adapter_model.safetensors")), to / "adapter_model.safetensors")
    return to


def first(state: dict, part: str) -> str:
    return next(key for key in state if part in key)


def drop_first(part: str):
    return lambda state: {key: tensor for key, tensor in state.items() if key != first(state, part)}


def replace_first(part: str, change):
    return lambda state: state | {first(state, part): change(state[first(state, part)])}


def rename(old: str, new: str):
    return lambda state: {key.replace(old, new): tensor for key, tensor in state.items()}


REFUSED = {
    "not finite": ("br", {}, replace_first("lora_A", lambda t: t * float("nan")), "not finite"),
    "a shape of another base": ("br", {}, replace_first("lora_A", lambda t: t[:, :-1].contiguous()), r"weight of \(16, 16\) here"),
    "a rank that the configuration does not give": ("br", {"r": 4}, None, "gives .* rank 4, the file has A"),
    "half of a pair": ("br", {}, drop_first("lora_B"), "only one of A and B"),
    "unknown modules": ("br", {}, rename("v_proj", "value_proj"), "modules that the table does not have.*value_proj.*nearest: .*_proj"),
    "tensors that are no A or B": ("br", {}, lambda s: s | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)}, "is no A or B"),
    "integers": ("br", {}, replace_first("lora_A", lambda t: t.long()), "I64|int64"),
    "no tensors": ("br", {}, lambda s: {}, "adapts nothing"),
    "DoRA": ("br", {"use_dora": True}, None, "use_dora=True"),
    "whole modules": ("br", {"modules_to_save": ["proj_out"]}, None, "modules_to_save"),
    "trained biases": ("br", {"bias": "all"}, None, "bias='all'"),
    "PiSSA": ("br", {"init_lora_weights": "pissa"}, None, "changes the base weights"),
    "another method": ("br", {"peft_type": "VERA"}, None, "peft_type 'VERA'"),
    "a rank of zero": ("br", {"r": 0}, None, "r is 0"),
    "a rank pattern that is no pattern": (
        "mi",
        {"rank_pattern": {"(": 4}},
        None,
        r"rank_pattern in adapter_config\.json: '\('.*unterminated",
    ),
    "rank patterns without ranks": ("mi", {"rank_pattern": ["fc1"]}, None, r"rank_pattern is \['fc1'\]"),
    "a rank pattern with a rank of 0": ("mi", {"rank_pattern": {"fc1": 0}}, None, "whole numbers from 1 up"),
    "a scaling in words": ("mi", {"lora_alpha": "16"}, None, r"lora_alpha is '16' in adapter_config\.json"),
    "a scaling without an end": ("mi", {"alpha_pattern": {"fc1": float("inf")}}, None, "alpha_pattern is .*inf.*finite numbers"),
    "a rank that is a word of logic": ("mi", {"r": True}, None, "r is True"),
    "a pattern that repeats a repeat": ("mi", {"rank_pattern": {"(x+)+y": 4}}, None, "repeats a group that repeats"),
    "a pattern that repeats a choice": ("mi", {"alpha_pattern": {"(?:x|x)*y": 4}}, None, "repeats a group that repeats or chooses"),
    "a pattern of many repeats": ("mi", {"rank_pattern": {".*.*.*.*.*x": 4}}, None, "5 repeats"),
    "a pattern of many choices": ("mi", {"rank_pattern": {"(x|x)" * 9: 4}}, None, "9 choices"),
    "a pattern without an end": ("mi", {"rank_pattern": {"x" * 300: 4}}, None, "too long"),
    "groups that are no patterns": ("sn", {"share_groups": ["["]}, None, "share_groups in .*unterminated"),
    "groups that are a word": ("sn", {"share_groups": "fc1"}, None, "share_groups is 'fc1'"),
    "ranks of groups in a list": ("sn", {"group_ranks": [3]}, None, r"group_ranks is \[3\]"),
    "a name without an end": ("br", {}, rename("v_proj", "v" * 300), "characters long"),
    "a pool that is not there": ("ln", {"pool_hash": "0" * 64}, None, r"hash 000000000000\.\.\.; pools in the table: .*add_pool"),
    "coefficients of another rank": ("ln", {}, replace_first("coefficients", lambda t: t[:-1].clone()), "the pool has rank 6"),
    "coefficients that are not finite": ("ln", {}, replace_first("coefficients", lambda t: t / 0), "not finite"),
    "weights that the pool does not adapt": ("ln", {}, rename("layers.0.self_attn.q_proj", "layers.0.fc1"), "which its pool does not"),
    "a pooled adapter with A": ("ln", {}, lambda s: s | {"base_model.model.x.s2lora_A": torch.ones(3, 3)}, "holds coefficients only"),
    "an S2-LoRA without A": ("haw", {}, drop_first("s2lora_A"), "needs A and B of rank 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_and_the_table_is_as_before(table, folders, tmp_path, case):
    source, config, tensors, message = REFUSED[case]
    names, stacks, sizes = table.languages, list(table._stacks), table.nbytes()
    bare = [name.replace(".base_layer.", ".") for name in table.model.state_dict()]
    digest = base_hash(table.model, bare)
    folder = changed(folders[source], tmp_path / "broken", config, tensors)
    with pytest.raises(ValueError, match=message):
        table.add("new", folder)
    assert (table.languages, table._stacks, table.nbytes()) == (names, stacks, sizes)
    assert base_hash(table.model, bare) == digest


def test_an_adapter_of_another_base_is_refused(table, folders, tmp_path):
    signature = json.loads((folders["cy"] / "language_adapter.json").read_text())["base_signature"]
    weights = {name: value + 1 for name, value in signature["weights"].items()}
    folder = changed(folders["cy"], tmp_path / "other", card={"base_signature": signature | {"weights": weights}})
    with pytest.raises(WrongBaseError, match="other weights"):
        table.add("new", folder)


def test_patterns_as_people_write_them_are_followed(table, folders, tmp_path):
    ranks = {
        r"layers\.(0|1|2)\.self_attn\.(q|v)_proj": 7,
        r"model\.decoder\..*\.encoder_attn\.[qv]_proj": 7,
        r".*\.(?:layers\.\d{1,2}\.)?nothing": 7,
        "fc1": 2,
        r"f[c]\(*1": 9,  # the first that fits holds
    }
    table.add("new", changed(folders["mi"], tmp_path / "new", {"rank_pattern": ranks}))
    assert "new" in table


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [-16, -2], r"shape \(-16, -2\)"),
        ("shape", [0, 1 << 62, 1 << 62], "larger than any weight"),
        ("shape", [16.0, 2], r"shape \(16.0, 2\)"),
        ("data_offsets", [0, 1, 2], "is broken"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(table, folders, tmp_path, field, value, message):
    path = changed(folders["cy"], tmp_path / "broken") / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    next(row for name, row in header.items() if name != "__metadata__")[field] = value
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ValueError, match=f"(?s)The adapter in .*broken.*{message}"):
        table.add("new", path.parent)


def test_a_card_whose_carrier_is_no_language_is_refused(table, folders, tmp_path):
    with pytest.raises(ValueError, match=r"carrier is \['es'\] in language_adapter\.json"):
        table.add("new", changed(folders["cy"], tmp_path / "new", card={"carrier": ["es"]}))


def test_files_that_are_missing_or_broken_are_refused(table, folders, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        table.add("new", tmp_path)
    folder = changed(folders["cy"], tmp_path / "cut")
    data = (folder / "adapter_model.safetensors").read_bytes()
    for length in (4, 100, len(data) - 8):
        (folder / "adapter_model.safetensors").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut off|no safetensors"):
            table.add("new", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="no safetensors file"):
        table.add("new", folder)


@pytest.mark.parametrize(
    ("name", "message"), [("cy", "in the table already"), ("", "called by a name"), (3, "called by a name"), (None, "called by a name")]
)
def test_a_name_that_is_taken_or_none_is_refused(table, folders, name, message):
    with pytest.raises(ValueError, match=message):
        table.add(name, folders["br"])


def test_an_unknown_language_in_a_row_is_refused_with_the_known_ones(table):
    refusal = r"Row 1 .* 'quq', .*Did you mean 'qug'\? It knows cy, br, .*table\.add\('quq', folder\)"
    with pytest.raises(ValueError, match=refusal), table.rows(["cy", "quq"]):
        pass
    with pytest.raises(ValueError, match="'quq' is not in the table"):
        table.drop("quq")
    with pytest.raises(ValueError, match="finite number"), table.rows([{"cy": float("nan")}]):
        pass
    with pytest.raises(ValueError, match="no rows"), table.rows([]):
        pass
    with pytest.raises(ValueError, match="Put it in a list"), table.rows("cy"):
        pass


def test_a_batch_of_another_size_is_refused(table, inputs):
    with torch.no_grad(), table.rows(["cy", None, "ln"]), pytest.raises(ValueError, match=r"given for 3 rows, but .* called with 6"):
        table.model(**{name: tensor[:6] for name, tensor in inputs.items()})  # a multiple, but the encoder has no beams
    with torch.no_grad(), table.rows(["cy", None, "ln"]), pytest.raises(ValueError, match=r"given for 3 rows, but .* called with 2"):
        table.model(**{name: tensor[:2] for name, tensor in inputs.items()})


def test_a_pool_must_own_its_factors(table, folders):
    for name in ("cy", "ln"):
        with pytest.raises(ValueError, match="owns no shared A and B"):
            table.add_pool(folders[name])
    num_stacks = len(table._stacks)
    table.add_pool(folders["pool"])  # the same one again
    assert len(table._stacks) == num_stacks


# ---- speed: what must not grow, and what must not be compiled anew -----------------------------------------------------


class CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(table: LanguageTable, rows, inputs) -> int:
    few = {name: tensor[: len(rows)] for name, tensor in inputs.items()}
    with torch.no_grad(), table.rows(rows), CountOperators() as counter:
        table.model(**few)
    return counter.count


def test_the_number_of_operators_does_not_grow_with_the_languages(base, folders, inputs):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    table.load_many({f"pool{i}": folders[name] for i, name in enumerate([*POOLED] * 4)})
    table.load_many({f"lora{i}": folders["cy"] for i in range(12)})
    plain = operators(table, [None] * 12, inputs)
    for kind in ("pool", "lora"):
        counts = {n: operators(table, [f"{kind}{i % n}" for i in range(12)], inputs) for n in (1, 2, 3, 12)}
        assert counts[2] == counts[3] == counts[12], counts
        assert plain < min(counts.values()) <= max(counts.values()) < 2.2 * plain, counts


def test_the_down_projection_is_shared_by_the_weights_that_read_the_same_input(base, folders, inputs):
    class Projections(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default and args[1].shape[1] == 6:  # (positions, d_in) x (d_in, r)
                self.count += 1
            return func(*args, **(kwargs or {}))

    table = LanguageTable.attach(copy.deepcopy(base))
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in POOLED})
    with torch.no_grad(), table.rows([*POOLED]), Projections() as seen:
        table.model(**{name: tensor[:3] for name, tensor in inputs.items()})
    # Encoder, a layer: one for q, k, v and one for out. Decoder, a layer: the same, and q and out of the cross-attention; once: its k, v.
    assert seen.count == 2 * 2 + 2 * 4 + 1


def test_no_input_is_held_on_to_after_the_batch(table, inputs):
    cells = [cell for stack in table._stacks for cell in getattr(stack, "_cells", {}).values()]
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    with torch.no_grad(), table.rows(["ln", "ha"]):
        table.model(**few)
        assert any(cell._x is not None for cell in cells)
    assert all(cell._x is None and cell._down is None for cell in cells)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_what_cannot_be_remembered_is_computed(table, inputs, alone, mode):
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    with mode(), table.rows(["ln", "ha"]):
        mixed = table.model(**few).logits
    assert close(mixed[0].detach(), alone["ln"][0])
    assert close(mixed[1].detach(), alone["ha"][1])


def test_an_input_that_was_written_to_is_projected_anew(table):
    layer = table.model.model.encoder.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        with table.rows(["ln", "ha"]):
            layer(x)
            x.mul_(3)
            again = layer(x)
        with table.rows(["ln", "ha"]):
            assert torch.equal(again, layer(x))


@pytest.mark.parametrize("batches", [[["ln", "ha"], ["yo", "ln"], ["ha", None]], [["cy", "br"], ["br", None], ["br", "cy"]]])
def test_compiled_without_recompilation_when_the_languages_change(table, batches):
    counter = CompileCounter()
    layer = table.model.model.encoder.layers[0].self_attn
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            with table.rows(batch):
                assert close(compiled(x)[0], layer(x)[0])
    assert counter.frame_count == 1


def test_static_rows_are_compiled_once_whatever_comes(table):
    counter = CompileCounter()
    layer = table.model.model.encoder.layers[0].self_attn
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    rows = table.static_rows(3, per_row=2)
    with torch.no_grad(), rows.use():
        for batch in (["cy", "ln", None], ["haw"] * 3, [None] * 3, [{"cy": 0.5, "ha": 0.5}, "qug", "su"]):
            rows.set(batch)
            with table.rows(batch):
                expected = layer(x)[0]
            assert close(compiled(x)[0], expected), batch
    assert counter.frame_count == 1


def test_static_rows_stay_where_they_are_and_compute_the_same(table, inputs, alone):
    rows = table.static_rows(4)
    addresses = [buffer.data_ptr() for buffers in rows._buffers for buffer in buffers]
    few = {name: tensor[:4] for name, tensor in inputs.items()}
    for batch in (["cy", None, "ln", "haw"], ["yo", "qug", "cy", None]):
        rows.set(batch)
        with torch.no_grad(), rows.use():
            mixed = table.model(**few).logits
        for number, language in enumerate(batch):
            assert close(mixed[number], alone[language][number]), language
    assert addresses == [buffer.data_ptr() for buffers in rows._buffers for buffer in buffers]
    with pytest.raises(ValueError, match="2 languages came for 4 rows"):
        rows.set(["cy", "ln"])
    with pytest.raises(ValueError, match="Row 0 mixes 2 languages"):
        rows.set([{"cy": 0.5, "ln": 0.5}, None, None, None])


def test_static_rows_follow_neither_a_moved_model_nor_one_that_left(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in ("cy", "br")})
    rows = table.static_rows(2)
    rows.set(["cy", "br"])
    table.model.float()
    logits(table, ["cy"], {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()})
    for use in (lambda: rows.set(["cy", "br"]), lambda: rows.use().__enter__()):
        with pytest.raises(ValueError, match=r"float64 on cpu, and it is in torch.float32.*static_rows again"):
            use()
    table.model.double()
    rows.set(["br", "cy"])  # where it was, though the table has been elsewhere in between
    with torch.no_grad(), rows.use():
        mixed = table.model(**{name: tensor[:2] for name, tensor in inputs.items()}).logits
    assert close(mixed[0], alone["br"][0], atol=1e-2)
    table.detach()
    for use in (lambda: rows.set(["cy", "br"]), lambda: rows.use().__enter__()):
        with pytest.raises(ValueError, match="detached"):
            use()


def test_static_rows_need_to_know_every_stack(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    with pytest.raises(ValueError, match="holds nothing yet"):
        table.static_rows(2)
    table.add("cy", folders["cy"])
    rows = table.static_rows(2)
    table.load_many({"br": folders["br"], "qug": folders["qug"]})
    rows.set(["br", None])
    with pytest.raises(ValueError, match="'qug' lies in a stack that did not exist"):
        rows.set(["qug", None])


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_other_languages(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base).cuda())
    table.add_pool(folders["pool"])
    table.load_many({name: folders[name] for name in (*LORAS, *POOLED)})
    encoder: nn.Module = table.model.get_encoder()
    x = inputs["input_features"][:3].cuda()
    rows = table.static_rows(3)
    with torch.no_grad(), rows.use():
        rows.set([None] * 3)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            encoder(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = encoder(x).last_hidden_state
        for batch in (["cy", "ln", None], ["haw", "yo", "qug"]):
            rows.set(batch)
            graph.replay()
            with table.rows(batch):
                assert close(states, encoder(x).last_hidden_state, atol=1e-8)
