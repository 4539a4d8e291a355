"""S2-LoRA where PEFT's contract is not the same list for every tuner: pipelines, Trainer, dtypes beside LoRA, compiling, hotswap,
status, biases and token rows, and that a refusal leaves the model as it was. Separate processes are in test_s2lora_processes.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, WhisperForConditionalGeneration, pipeline
from tuner_behaviours import CASES as SMALL_CASES
from tuner_behaviours import Case, EmbeddingConv1D, Utterances, close, loss_of, output

from peft_s2lora import S2LoraConfig, hotswap, s2lora_param_groups


def with_many_rows(case: Case) -> Case:
    """Sixteen times the batch: from 32 rows on, layers that read the same input share its down-projection, which is what counts here."""
    return dataclasses.replace(case, inputs={name: x.repeat(16, *[1] * (x.ndim - 1)) for name, x in case.inputs.items()})


CASES = {name: with_many_rows(case) for name, case in SMALL_CASES.items()}
WHISPER, MLP = CASES["whisper"], CASES["mlp"]


def adapted(case: Case = WHISPER, seed: int = 1, **kwargs) -> PeftModel:
    base = case.base()
    torch.manual_seed(seed)
    return get_peft_model(base, S2LoraConfig(**{"r": 4, "init_weights": False, **kwargs})).eval()


def state_of(model: nn.Module) -> tuple[dict, dict, dict]:
    """All that a refusal must leave alone: tensors, types of modules, what trains."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    return tensors, types, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_same_state(model: nn.Module, before: tuple[dict, dict, dict]) -> None:
    tensors, types, trains = state_of(model)
    assert (types, trains) == before[1:]
    assert tensors.keys() == before[0].keys()
    assert [name for name in tensors if not torch.equal(tensors[name], before[0][name])] == []


# ---- transformers' doors ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech_folders(tmp_path_factory, tiny_processor):
    """The base of the tiny Whisper and an adapter for it, each with tokenizer and feature extractor."""
    from conftest import build_tiny_model

    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    build_tiny_model(tiny_processor).save_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(WhisperForConditionalGeneration.from_pretrained(base), S2LoraConfig(r=4, init_weights=False))
    model.save_pretrained(adapter, save_embedding_layers=False)
    for folder in (base, adapter):
        tiny_processor.save_pretrained(folder)
    return base, adapter


def test_a_pipeline_on_an_adapter_folder_writes_what_the_merged_model_writes(speech_folders, tmp_path, tiny_processor):
    from conftest import tone

    base, adapter = speech_folders
    PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(base), adapter).merge_and_unload().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)

    def text(folder, frequency: float) -> str:
        recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
        return recognise({"array": tone(frequency), "sampling_rate": 16_000}, generate_kwargs={"max_new_tokens": 12})["text"]

    texts = {folder: [text(folder, frequency) for frequency in (200, 1500)] for folder in (base, adapter, tmp_path)}
    assert texts[adapter] == texts[tmp_path]
    assert texts[adapter] != texts[base]


def test_the_trainer_brings_the_best_checkpoint_back(tmp_path):
    class Losses(TrainerCallback):
        """The evaluation loss, made to be best after the second of three evaluations, and the coefficients at that moment."""

        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            metrics["eval_loss"] = {1: 3.0, 2: 1.0, 3: 2.0}[state.global_step]
            if state.global_step == 2:
                self.best = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

    model = adapted(init_weights=True)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        save_steps=1, eval_steps=1, eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, label_names=["labels"],
        remove_unused_columns=False, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    optimizer = torch.optim.Adam(s2lora_param_groups(model, lr=0.01))
    losses = Losses()
    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=Utterances(), eval_dataset=Utterances(), optimizers=(optimizer, None), callbacks=[losses]
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    restored = get_peft_model_state_dict(model)
    assert restored.keys() == losses.best.keys()
    assert all(torch.equal(tensor, losses.best[name]) for name, tensor in restored.items())
    last = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, last[name]) for name, tensor in restored.items())


# ---- biases, token rows, chosen layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "s2lora_only"])
def test_bias_says_which_biases_train_and_they_are_saved(bias, tmp_path):
    model = adapted(MLP, target_modules=["lin0"], bias=bias)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name.endswith("bias")}
    all_biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert len(all_biases) == 3
    assert trained == {"none": set(), "all": all_biases, "s2lora_only": {"base_model.model.lin0.base_layer.bias"}}[bias]
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1)
    expected = output(model, MLP.inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(MLP.base(), tmp_path), MLP.inputs), expected)
    assert sum(name.endswith("bias") for name in load_file(tmp_path / "adapter_model.safetensors")) == len(trained)


@pytest.mark.parametrize("target", ["conv", "head"])
def test_trained_token_rows_merge_and_unload(target):
    case = CASES["embedding_conv1d"]
    model = adapted(case, target_modules=[target], trainable_token_indices={"emb": [5, 7]})
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "trainable_tokens_delta.default" in name).add_(1)
    expected = output(model, case.inputs)
    merged = model.merge_and_unload()
    assert close(output(merged, case.inputs), expected)
    assert not close(expected, output(case.base(), case.inputs), atol=1e-3)
    assert {type(module) for module in merged.modules()} == {type(module) for module in EmbeddingConv1D().modules()}


def test_unloading_trained_token_rows_gives_the_base_back():
    case = CASES["embedding_conv1d"]
    model = adapted(case, target_modules=["conv"], trainable_token_indices={"emb": [5, 7]})
    unloaded, base = model.unload(), case.base().state_dict()
    assert unloaded.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in unloaded.state_dict().items())


def test_token_rows_of_two_adapters_stay_apart(tmp_path):
    case = CASES["embedding_conv1d"]
    model = adapted(case, target_modules=["conv"], trainable_token_indices={"emb": [5, 7]})
    model.add_adapter("second", S2LoraConfig(r=2, target_modules=["conv"], trainable_token_indices={"emb": [9]}))
    for number, name in enumerate(("default", "second"), start=1):
        with torch.no_grad():
            next(p for key, p in model.named_parameters() if f"trainable_tokens_delta.{name}" in key).add_(number)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        assert torch.equal(output(PeftModel.from_pretrained(case.base(), folder), case.inputs), output(model, case.inputs))


def test_one_layer_may_be_chosen_by_a_number_alone():
    model = adapted(layers_to_transform=0)
    assert model.targeted_module_names
    assert all(".layers.0." in name for name in model.targeted_module_names)


def test_excluded_names_are_left_out_of_a_list_and_out_of_all_linear():
    for kwargs in ({"target_modules": ["q_proj", "fc1"]}, {"target_modules": "all-linear"}):
        names = {name.rpartition(".")[2] for name in adapted(exclude_modules=["fc1"], **kwargs).targeted_module_names}
        assert "q_proj" in names
        assert "fc1" not in names


# ---- dtypes, beside LoRA ----------------------------------------------------------------------------------------------


def dtypes(config, case: Case, base: torch.dtype, autocast: torch.dtype | None, cast_adapter: bool) -> dict[str, set | torch.dtype]:
    """What somebody sees of a training step: dtypes of output, parameters and gradients."""
    model = get_peft_model(case.base().to(base), config, autocast_adapter_dtype=cast_adapter).train()
    inputs = {name: x.to(base) if x.is_floating_point() else x for name, x in case.inputs.items()}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        result = model(**inputs)
    result = result if isinstance(result, torch.Tensor) else result.logits
    result.float().square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    return {
        "output": result.dtype,
        "adapter": {parameter.dtype for parameter in trained},
        "base": {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad},
        "gradients": {parameter.grad.dtype for parameter in trained},
    }


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
SETTINGS = [(FLOAT, None), (FLOAT, BFLOAT), (FLOAT, HALF), (BFLOAT, None), (BFLOAT, BFLOAT), (HALF, None), (HALF, HALF)]


@pytest.mark.parametrize("cast_adapter", [True, False])
@pytest.mark.parametrize(("base", "autocast"), SETTINGS)
@pytest.mark.parametrize("name", ["mlp", "embedding_conv1d", "whisper"])
def test_dtypes_are_those_that_lora_has(name, base, autocast, cast_adapter):
    case = CASES[name]
    ours = S2LoraConfig(r=4, target_modules=case.targets, init_weights=False)
    loras = LoraConfig(r=4, target_modules=case.targets, init_lora_weights=False)
    assert dtypes(ours, case, base, autocast, cast_adapter) == dtypes(loras, case, base, autocast, cast_adapter)


# ---- compiling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "scope"), [("mlp", "shape"), ("mlp", "global"), ("embedding_conv1d", "shape"), ("decoder", "shape"), ("whisper", "shape")]
)
def test_a_whole_adapted_model_compiles_to_one_graph_forward_and_backward(name, scope, fresh_compiler):
    case = CASES[name]
    model = adapted(case, target_modules=case.targets, share_scope=scope)
    loss_of(model, case.inputs).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    loss_of(compiled, case.inputs).backward()
    assert counter.frame_count == 1
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert all(close(gradients[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "treat", [lambda model: model.merge_adapter(), lambda model: model.base_model.disable_adapter_layers()], ids=["merged", "disabled"]
)
def test_a_merged_or_disabled_model_compiles_to_one_graph(treat, fresh_compiler):
    model = adapted(MLP, target_modules=MLP.targets)
    treat(model)
    counter = CompileCounter()
    expected = output(model, MLP.inputs)
    assert close(output(torch.compile(model, backend=counter, fullgraph=True), MLP.inputs), expected)
    assert counter.frame_count == 1


# ---- hotswap ----------------------------------------------------------------------------------------------------------


def folder_of(model: PeftModel, folder) -> tuple[str, torch.Tensor]:
    """A saved adapter and its logits."""
    model.save_pretrained(folder)
    return str(folder), output(model, WHISPER.inputs)


def test_pefts_own_hotswap_is_closed_to_us_and_says_so(tmp_path):
    model = adapted()
    folder, _ = folder_of(model, tmp_path)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model)
    transformers_model = WHISPER.base()
    transformers_model.load_adapter(folder, "default")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        transformers_model.load_adapter(folder, "default", hotswap=True)


def test_a_swapped_adapter_computes_as_if_loaded_and_nothing_compiles_anew(tmp_path, fresh_compiler):
    folder, expected = folder_of(adapted(seed=2), tmp_path)
    model = adapted()
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = output(compiled, WHISPER.inputs)
    hotswap(compiled, folder)
    assert torch.equal(output(compiled, WHISPER.inputs), expected)
    assert counter.frame_count == 1
    assert not close(before, expected, atol=1e-3)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == parameters


@pytest.mark.parametrize("scope", ["shape", "module_type", "global"])
def test_swapping_works_for_every_sharing_and_from_tensors_alone(scope):
    other = adapted(seed=2, share_scope=scope, target_modules=WHISPER.targets)
    model = adapted(share_scope=scope, target_modules=WHISPER.targets)
    hotswap(model, get_peft_model_state_dict(other))
    assert torch.equal(output(model, WHISPER.inputs), output(other, WHISPER.inputs))


def test_swapping_works_where_only_a_part_is_compiled_and_without_a_peft_model(tmp_path, fresh_compiler):
    folder, expected = folder_of(adapted(seed=2), tmp_path)
    part = adapted()
    part.base_model.model.model.encoder = torch.compile(part.base_model.model.model.encoder, backend="eager")
    plain = inject_adapter_in_model(S2LoraConfig(r=4, init_weights=False), WHISPER.base())
    for model in (part, plain):
        hotswap(model, folder)
        assert close(output(model, WHISPER.inputs), expected)


def test_only_the_named_adapter_is_swapped(tmp_path):
    folder, expected = folder_of(adapted(seed=2), tmp_path)
    model = adapted()
    first = output(model, WHISPER.inputs)
    model.add_adapter("second", S2LoraConfig(r=4, init_weights=False))
    hotswap(model, folder, "second")
    assert torch.equal(output(model, WHISPER.inputs), first)
    model.set_adapter("second")
    assert torch.equal(output(model, WHISPER.inputs), expected)


def test_a_pooled_adapter_is_swapped_if_its_pool_is_the_one_loaded(tmp_path):
    def with_pool(seed: int) -> PeftModel:
        model = adapted(seed=seed)
        model.add_adapter("a", S2LoraConfig(pool="default", init_weights=False))
        model.add_adapter("b", S2LoraConfig(pool="default", init_weights=False))
        return model

    model = with_pool(1)
    model.save_pretrained(tmp_path / "same")
    with_pool(2).save_pretrained(tmp_path / "other")
    model.set_adapter("b")
    expected = output(model, WHISPER.inputs)
    hotswap(model, tmp_path / "same" / "b", "a")
    model.set_adapter("a")
    assert torch.equal(output(model, WHISPER.inputs), expected)
    before = state_of(model)
    with pytest.raises(ValueError, match="trained on another pool"):
        hotswap(model, tmp_path / "other" / "b", "a")
    with pytest.raises(ValueError, match="is the pool of a, b"):
        hotswap(model, tmp_path / "same", "default")
    assert_same_state(model, before)


DIFFERENT = [
    ({"r": 5}, "r=5, the loaded one r=4"),
    ({"s2lora_alpha": 8}, "scaling=2.0, the loaded one scaling=1.0"),
    ({"share_scope": "global"}, "share_scope='global', the loaded one share_scope='shape'"),
    ({"share_groups": [r".*encoder\.layers.*"]}, "share_groups="),
    ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"lacks model\.encoder\.layers\.0\.self_attn\.out_proj\.s2lora_coefficients"),
    ({"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "proj_out"]}, r"has proj_out\.s2lora_coefficients"),
    ({"bias": "s2lora_only"}, "bias='s2lora_only', the loaded one bias='none'"),
    ({"modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\], the loaded one modules_to_save=None"),
]


@pytest.mark.parametrize(("kwargs", "message"), DIFFERENT, ids=[str(kwargs) for kwargs, _ in DIFFERENT])
def test_an_adapter_that_differs_is_not_swapped_in_and_nothing_changes(kwargs, message, tmp_path):
    folder, _ = folder_of(adapted(seed=2, **kwargs), tmp_path)
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        hotswap(model, folder)
    assert_same_state(model, before)


def test_tensors_of_another_shape_are_not_swapped_in_and_nothing_changes():
    model = adapted()
    before = state_of(model)
    tensors = get_peft_model_state_dict(adapted(seed=2))
    last = [name for name in tensors if "coefficients" in name][-1]
    with pytest.raises(ValueError, match=r"is \(5,\) in the new adapter and \(4,\) in the loaded one"):
        hotswap(model, {**tensors, last: torch.ones(5)})
    assert_same_state(model, before)


def test_swapping_into_a_merged_adapter_or_one_that_is_not_there_is_refused(tmp_path):
    folder, _ = folder_of(adapted(seed=2), tmp_path / "s2lora")
    model = adapted()
    with pytest.raises(ValueError, match=r"No S2-LoRA adapter 'nobody'\. Known: default"):
        hotswap(model, folder, "nobody")
    lora = get_peft_model(WHISPER.base(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="has no S2-LoRA adapter"):
        hotswap(lora, folder)
    with pytest.raises(ValueError, match=r"is a PeftType\.LORA, not S2LORA"):
        hotswap(model, tmp_path / "lora")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the weights"):
        hotswap(model, folder)
    with pytest.raises(ValueError, match=r"trains more than its own tensors \(modules_to_save\)"):
        hotswap(adapted(modules_to_save=["proj_out"]), folder)


# ---- gradient checkpointing -------------------------------------------------------------------------------------------


def checkpointed(config) -> PeftModel:
    base = WHISPER.base()
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def test_reentrant_checkpointing_fails_on_whisper_as_it_does_for_lora():
    for config in (S2LoraConfig(r=4, init_weights=False), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)):
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss_of(checkpointed(config), WHISPER.inputs).backward()


def test_reentrant_checkpointing_works_once_the_inputs_require_gradients():
    plain = adapted().train()
    loss_of(plain, WHISPER.inputs).backward()
    model = checkpointed(S2LoraConfig(r=4, init_weights=False))
    model.enable_input_require_grads()
    loss_of(model, WHISPER.inputs).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert close(parameter.grad, expected[name]), name


# ---- status -----------------------------------------------------------------------------------------------------------


def test_status_of_several_adapters_merged_and_disabled():
    model = adapted()
    model.add_adapter("second", S2LoraConfig(r=2, target_modules=["fc1"], share_scope="global"))
    own = {
        name: sum(p.numel() for key, p in model.named_parameters() if "s2lora_" in key and key.endswith(f".{name}"))
        for name in ("default", "second")
    }
    base = sum(parameter.numel() for parameter in WHISPER.base().parameters())
    status = model.get_model_status()
    assert status.available_adapters == ["default", "second"]
    assert (status.active_adapters, status.enabled, status.merged_adapters) == (["default"], True, [])
    assert status.requires_grad == {"default": True, "second": False}
    assert (status.trainable_params, status.total_params) == (own["default"], base + sum(own.values()))
    assert status.num_adapter_layers == 24 + 4
    assert status.peft_types == {"default": "S2LORA", "second": "S2LORA"}
    assert model.get_nb_trainable_parameters() == (own["default"], base + sum(own.values()))
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters()[0] == own["second"]
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["second"]
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["model.model.encoder.layers.0.fc1"].merged_adapters == ["second"]
    assert layers["model.model.encoder.layers.0.self_attn.q_proj"].available_adapters == ["default"]
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    status = model.get_model_status()
    assert (status.enabled, status.trainable_params) == (False, 0)


# ---- whole models: moved, cast, saved ---------------------------------------------------------------------------------


def test_half_and_moves_reach_the_shared_pairs_of_every_adapter():
    model = adapted()
    model.add_adapter("second", S2LoraConfig(r=2))
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert all(parameter.is_meta for parameter in model.to("meta").parameters())
    layers = [module for module in model.modules() if hasattr(module, "shared_factors")]
    assert all(layer.shared_factors[name].A.is_meta for layer in layers for name in layer.shared_factors)
    model.to_empty(device="cpu")
    assert len({layer.shared_factors["default"].A.data_ptr() for layer in layers}) == 1


def test_safetensors_saves_and_loads_the_whole_model(tmp_path):
    model = adapted()
    save_model(model, str(tmp_path / "model.safetensors"))
    other = adapted(seed=2)
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(output(other, WHISPER.inputs), output(model, WHISPER.inputs))


def test_adapters_made_on_the_meta_device_are_filled_from_tensors():
    model = adapted()
    tensors = get_peft_model_state_dict(model)
    empty = get_peft_model(WHISPER.base(), S2LoraConfig(r=4), low_cpu_mem_usage=True)
    set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
    injected = inject_adapter_in_model(S2LoraConfig(r=4), WHISPER.base(), low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in injected.parameters())
    set_peft_model_state_dict(injected, tensors, low_cpu_mem_usage=True)
    for filled in (empty, injected):
        assert not any(parameter.is_meta for parameter in filled.parameters())
        assert torch.equal(output(filled, WHISPER.inputs), output(model, WHISPER.inputs))


def test_a_second_adapter_is_loaded_without_memory_for_two(tmp_path):
    folder, expected = folder_of(adapted(seed=2), tmp_path)
    model = adapted()
    first = output(model, WHISPER.inputs)
    model.load_adapter(folder, "second", low_cpu_mem_usage=True)
    assert torch.equal(output(model, WHISPER.inputs), first)
    model.set_adapter("second")
    assert torch.equal(output(model, WHISPER.inputs), expected)


# ---- refused, and the model as it was ---------------------------------------------------------------------------------


class LinearAndConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.conv = nn.Conv2d(1, 1, 1)


FIRST_ADAPTERS = [
    (LinearAndConv2d, {"target_modules": ["first", "conv"]}, "conv is a Conv2d"),
    (WHISPER.base, {"target_modules": ["q_prj"]}, "Nearest names in this model: q_proj"),
    (WHISPER.base, {"target_modules": ".*nothing"}, "Names that can be adapted"),
    (WHISPER.base, {"share_groups": ["encoder"]}, "share_groups holds 'encoder'"),
    (WHISPER.base, {"pool": "romance"}, "needs the pool 'romance', which is not loaded"),
    (Case(nn.ReLU, {}, []).base, {"target_modules": "all-linear"}, "No modules were targeted"),
    (WHISPER.base, {"layers_to_transform": [7]}, "no modules matching|not found"),
]


@pytest.mark.parametrize(("build", "kwargs", "message"), FIRST_ADAPTERS, ids=[str(kwargs) for _, kwargs, _ in FIRST_ADAPTERS])
def test_a_refused_first_adapter_leaves_the_model_as_it_was(build, kwargs, message):
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, S2LoraConfig(**kwargs))
    assert_same_state(model, before)
    assert not hasattr(model, "peft_config")


SECOND_ADAPTERS = [
    ("default", {}, "already exists"),
    ("encoder", {}, "also the name of a module"),
    ("second", {"target_modules": ["zzz"]}, "not found"),
    ("second", {"target_modules": ["q_proj", "conv1"]}, "conv1 is a Conv1d"),
    ("second", {"share_groups": ["encoder"]}, "share_groups holds"),
    ("second", {"pool": "nobody"}, "which is not loaded"),
    ("second", {"pool": "default", "target_modules": ["fc1"]}, "not adapted by the pool"),
    ("second", {"pool": "default", "r": 7}, "does not fit the pool"),
    ("second", {"pool": "default", "pool_hash": "0" * 64}, "with other values"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), SECOND_ADAPTERS, ids=[f"{name} {kwargs}" for name, kwargs, _ in SECOND_ADAPTERS])
def test_a_refused_second_adapter_leaves_model_and_first_adapter_as_they_were(name, kwargs, message):
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter(name, S2LoraConfig(**kwargs))
    assert_same_state(model, before)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"


def test_an_adapter_of_another_method_does_not_join():
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert_same_state(model, before)


def shape_of_a_pair(tensors: dict) -> None:
    tensors[next(name for name in tensors if name.endswith("_A"))] = torch.ones(4, 7)


def shape_of_coefficients(tensors: dict) -> None:
    tensors[next(name for name in tensors if name.endswith("coefficients"))] = torch.ones(5)


def pair_left_out(tensors: dict) -> None:
    del tensors[next(name for name in tensors if name.endswith("_A"))]


BROKEN_FILES = [(shape_of_a_pair, "size mismatch"), (shape_of_coefficients, "size mismatch"), (pair_left_out, "not the shared s2lora_A")]


@pytest.mark.parametrize(("breaks", "message"), BROKEN_FILES, ids=[breaks.__name__ for breaks, _ in BROKEN_FILES])
def test_a_file_that_does_not_fit_touches_no_base_weight_and_its_rest_can_be_removed(breaks, message, tmp_path):
    # PEFT adds the adapter before it reads the tensors, for every method: what is left of it has to be taken away by name.
    folder, _ = folder_of(adapted(seed=2), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    breaks(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    model = adapted()
    before, expected = state_of(model), output(model, WHISPER.inputs)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_adapter(folder, "second")
    assert torch.equal(output(model, WHISPER.inputs), expected)
    model.delete_adapter("second")
    assert_same_state(model, before)
    base = WHISPER.base()
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(base, folder)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if "s2lora_" not in name}
    assert weights.keys() == before_base().keys()
    assert all(torch.equal(tensor, before_base()[name]) for name, tensor in weights.items())


def before_base() -> dict[str, torch.Tensor]:
    return WHISPER.base().state_dict()


def test_a_configuration_file_with_a_rank_of_zero_is_refused_before_the_base_is_touched(tmp_path):
    folder, _ = folder_of(adapted(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 0}))
    base = WHISPER.base()
    before = state_of(base)
    with pytest.raises(ValueError, match=re.escape("r must be a whole number from 1 up, got 0")):
        PeftModel.from_pretrained(base, folder)
    shutil.rmtree(folder)
    assert_same_state(base, before)


# ---- closed to methods outside PEFT -----------------------------------------------------------------------------------


def test_what_is_closed_by_name_says_so():
    from peft.helpers import rescale_adapter_scale

    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(WHISPER.base(), S2LoraConfig(), mixed=True)
    with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"), rescale_adapter_scale(adapted(), 0.5):
        pass
