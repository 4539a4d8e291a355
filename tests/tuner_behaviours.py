"""What PEFT holds its own tuners to, as one list of tests, run over five models. A tuner's test file subclasses `TunerBehaviours`.

`new_config(**kwargs)` must return a configuration that takes `target_modules`, `init_weights` (False = away from the base model),
`modules_to_save` and `inference_mode`, with the tuner's other fields at their defaults.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Three linear layers, two of them of one size; the last has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 20)
        self.lin2 = nn.Linear(20, 20, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))))


class EmbeddingConv1D(nn.Module):
    """An embedding and transformers' Conv1D, whose weights are stored the other way round than a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 6)
        self.conv = Conv1D(8, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(self.emb(ids))))


def _ids(*shape: int, vocabulary: int = 30) -> torch.Tensor:
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tiny_whisper(layers: int = 2) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=30, d_model=16, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10, max_target_positions=16, num_mel_bins=8, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, init_std=0.2,
        )
    )  # fmt: skip


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    )


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
            pad_token_id=0,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model to adapt: how to build it, what to feed it, which modules to adapt."""

    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    targets: list[str]

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


CASES = {
    "mlp": Case(Mlp, {"x": _floats(3, 10)}, ["lin0", "lin1", "lin2"]),
    "embedding_conv1d": Case(EmbeddingConv1D, {"ids": _ids(3, 5)}, ["emb", "conv"]),
    "decoder": Case(tiny_gpt2, {"input_ids": _ids(3, 5)}, ["c_attn", "c_proj"]),
    "encoder_decoder": Case(tiny_t5, {"input_ids": _ids(3, 5), "decoder_input_ids": _ids(3, 4)}, ["q", "k", "v", "o"]),
    "whisper": Case(
        tiny_whisper,
        {"input_features": _floats(3, 8, 20), "decoder_input_ids": _ids(3, 4)},
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
}
SHALLOW_CASES = {**CASES, "whisper": replace(CASES["whisper"], build=partial(tiny_whisper, layers=1))}  # half the modules to walk


def output(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """Logits of one forward pass in evaluation mode."""
    model.eval()
    with torch.no_grad():
        result = model(**inputs, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.logits


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**inputs)
    return (result if isinstance(result, torch.Tensor) else result.logits).float().square().mean()


class Utterances(torch.utils.data.Dataset):
    """Eight random clips with random labels, for `tiny_whisper` and transformers' Trainer."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_features": torch.randn(8, 20, generator=generator), "labels": torch.randint(4, 30, (4,), generator=generator)}


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a.float(), b.float(), atol=atol, rtol=1e-4)


def only_for(*names: str) -> Callable[[Callable], Callable]:
    """Marks a behaviour that some of the models cannot show."""

    def mark(function: Callable) -> Callable:
        function.only_cases = names
        return function

    return mark


class TunerBehaviours:
    """The list. Each test builds its model anew and runs once for each of `cases`."""

    prefix: str
    cases: ClassVar = CASES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            names = [name for name in self.cases if name in getattr(metafunc.function, "only_cases", self.cases)]
            metafunc.parametrize("case", [self.cases[name] for name in names], ids=names)

    def new_config(self, **kwargs: Any) -> Any:
        raise NotImplementedError

    def adapted(self, case: Case, **kwargs: Any) -> PeftModel:
        kwargs = {"target_modules": case.targets, "init_weights": False, **kwargs}
        model = get_peft_model(case.base(), self.new_config(**kwargs))
        return model.eval()

    # ---- start, on, off ----

    def test_a_new_adapter_changes_nothing(self, case: Case) -> None:
        model = self.adapted(case, init_weights=True)
        assert torch.equal(output(model, case.inputs), output(case.base(), case.inputs))

    def test_init_weights_false_starts_away_from_the_base_model(self, case: Case) -> None:
        assert not close(output(self.adapted(case), case.inputs), output(case.base(), case.inputs), atol=1e-3)

    def test_disabling_the_adapter_gives_the_base_model(self, case: Case) -> None:
        model = self.adapted(case)
        before = output(model, case.inputs)
        with model.disable_adapter():
            assert torch.equal(output(model, case.inputs), output(case.base(), case.inputs))
        assert torch.equal(output(model, case.inputs), before)

    def test_disabling_is_undone_by_an_error_and_may_be_nested(self, case: Case) -> None:
        model = self.adapted(case)
        expected, base = output(model, case.inputs), output(case.base(), case.inputs)
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(output(model, case.inputs), base)
            assert torch.equal(output(model, case.inputs), base)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            raise ZeroDivisionError
        assert torch.equal(output(model, case.inputs), expected)

    def test_the_name_of_an_adapter_makes_no_difference(self, case: Case) -> None:
        outputs = []
        for name in ("default", "s", "Zürich-2"):
            base = case.base()
            torch.manual_seed(1)
            model = get_peft_model(base, self.new_config(target_modules=case.targets, init_weights=False), adapter_name=name)
            outputs.append(output(model, case.inputs))
        assert all(torch.equal(result, outputs[0]) for result in outputs)

    def test_adapted_layers_show_the_sizes_and_tensors_of_the_base_layer(self, case: Case) -> None:
        model, base = self.adapted(case), case.base()
        for name in model.targeted_module_names:
            layer, original = model.base_model.model.get_submodule(name), base.get_submodule(name)
            assert torch.equal(layer.weight, original.weight)
            bias = getattr(original, "bias", None)
            assert bias is None or torch.equal(layer.bias, bias)
            rows, columns = original.weight.shape
            sizes = (columns, rows) if isinstance(original, nn.Linear) else (rows, columns)
            assert (layer.in_features, layer.out_features) == sizes

    # ---- training ----

    def test_exactly_the_adapters_parameters_train(self, case: Case) -> None:
        model = self.adapted(case)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (self.prefix in name), name

    def test_inference_mode_trains_nothing(self, case: Case) -> None:
        model = self.adapted(case, inference_mode=True)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == []

    def test_a_training_step_moves_every_adapter_parameter_and_nothing_else(self, case: Case) -> None:
        model = self.adapted(case).train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss_of(model, case.inputs).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != (self.prefix in name), name

    def test_training_under_bfloat16_autocast_keeps_float32_parameters(self, case: Case) -> None:
        model = self.adapted(case).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, case.inputs).backward()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            assert parameter.dtype == parameter.grad.dtype == torch.float32

    @only_for("mlp", "embedding_conv1d")  # they have a head that is tied to nothing
    def test_modules_to_save_train_and_are_saved(self, case: Case, tmp_path) -> None:
        model = self.adapted(case, modules_to_save=["head"])
        assert model.base_model.model.head.modules_to_save["default"].weight.requires_grad
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.add_(1)
        expected = output(model, case.inputs)
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), expected)

    @only_for("mlp", "embedding_conv1d")
    def test_modules_to_save_of_two_adapters_stay_apart(self, case: Case, tmp_path) -> None:
        model = self.adapted(case, modules_to_save=["head"])
        config = self.new_config(target_modules=case.targets, init_weights=False, modules_to_save=["head"])
        model.add_adapter("second", config)
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["second"].weight.add_(1)
        model.save_pretrained(tmp_path)
        for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
            model.set_adapter(name)
            assert torch.equal(output(PeftModel.from_pretrained(case.base(), folder), case.inputs), output(model, case.inputs))
            assert [key for key, p in model.named_parameters() if p.requires_grad and "modules_to_save" in key] == [
                key for key, _ in model.named_parameters() if f"modules_to_save.{name}." in key
            ]

    def test_set_requires_grad_freezes_and_frees_the_named_adapter(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets))
        model.set_requires_grad("default", requires_grad=False)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == []
        model.set_requires_grad(["default", "second"])
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (self.prefix in name), name

    def test_what_the_user_froze_or_freed_stays_so_when_another_adapter_is_loaded(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        model.save_pretrained(tmp_path)
        next(p for name, p in model.named_parameters() if self.prefix in name).requires_grad = False
        next(p for name, p in model.named_parameters() if self.prefix not in name).requires_grad = True
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.load_adapter(tmp_path, "other")
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == before.get(name, False), name

    # ---- saving ----

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_saved_adapter_loads_with_equal_output(self, case: Case, tmp_path, low_cpu_mem_usage: bool) -> None:
        model = self.adapted(case, init_weights=True)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.3)  # so that a start made anew cannot pass for a restored one
        expected = output(model, case.inputs)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(output(loaded, case.inputs), expected)
        assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.parameters())

    def test_a_loaded_adapter_can_train_on(self, case: Case, tmp_path) -> None:
        self.adapted(case).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
        for name, parameter in loaded.named_parameters():
            assert parameter.requires_grad == (self.prefix in name), name

    def test_an_adapter_saved_under_one_name_loads_under_another(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, adapter_name="other")
        assert torch.equal(output(loaded, case.inputs), output(model, case.inputs))

    def test_adapters_of_one_model_are_saved_apart(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.save_pretrained(tmp_path)
        for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
            model.set_adapter(name)
            loaded = PeftModel.from_pretrained(case.base(), folder)
            assert torch.equal(output(loaded, case.inputs), output(model, case.inputs))

    def test_only_the_selected_adapters_are_saved(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        for name in ("second", "third"):
            model.add_adapter(name, self.new_config(target_modules=case.targets))
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        assert {path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")} == {"second"}
        with pytest.raises(ValueError, match="nobody"):
            model.save_pretrained(tmp_path, selected_adapters=["nobody"])

    def test_adapters_whose_names_contain_each_other_are_saved_apart(self, case: Case, tmp_path) -> None:
        names = ["ab", "a", "abc"]
        model = get_peft_model(case.base(), self.new_config(target_modules=case.targets, init_weights=False), adapter_name=names[0]).eval()
        for name in names[1:]:
            model.add_adapter(name, self.new_config(target_modules=case.targets, init_weights=False))
        model.save_pretrained(tmp_path)
        for name in names:
            model.set_adapter(name)
            assert torch.equal(output(PeftModel.from_pretrained(case.base(), tmp_path / name), case.inputs), output(model, case.inputs))

    def test_an_adapter_saved_as_a_pickle_loads(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").is_file()
        assert torch.equal(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs))

    def test_loading_tensors_leaves_the_callers_dictionary_alone(self, case: Case) -> None:
        model = self.adapted(case)
        tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        before = dict(tensors)
        result = set_peft_model_state_dict(self.adapted(case), tensors)
        assert not result.unexpected_keys
        assert tensors.keys() == before.keys()
        assert all(tensor is before[name] for name, tensor in tensors.items())

    def test_the_base_models_weights_are_read_and_set_under_their_own_names(self, case: Case) -> None:
        model, base = self.adapted(case), case.base()
        weights = get_base_model_state_dict(model)
        assert weights.keys() == base.state_dict().keys()
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in weights.items())
        set_base_model_state_dict(model, {name: tensor * 2 for name, tensor in weights.items()})
        assert all(torch.equal(tensor, 2 * base.state_dict()[name]) for name, tensor in get_base_model_state_dict(model).items())

    # ---- merging ----

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_the_merged_model_computes_the_same(self, case: Case, safe_merge: bool) -> None:
        model = self.adapted(case)
        expected = output(model, case.inputs)
        model.merge_adapter(safe_merge=safe_merge)
        assert close(output(model, case.inputs), expected)
        model.unmerge_adapter()
        assert close(output(model, case.inputs), expected)

    def test_merge_and_unload_leaves_a_plain_model_that_computes_the_same(self, case: Case) -> None:
        model = self.adapted(case)
        expected = output(model, case.inputs)
        merged = model.merge_and_unload()
        assert close(output(merged, case.inputs), expected)
        assert merged.state_dict().keys() == case.base().state_dict().keys()
        assert {type(module) for module in merged.modules()} == {type(module) for module in case.base().modules()}

    def test_unload_gives_the_base_model_back(self, case: Case) -> None:
        unloaded = self.adapted(case).unload()
        base = case.base().state_dict()
        assert all(torch.equal(tensor, base[name]) for name, tensor in unloaded.state_dict().items())
        assert unloaded.state_dict().keys() == base.keys()

    def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight_alone(self, case: Case) -> None:
        model = self.adapted(case)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert all(torch.isfinite(p).all() for name, p in model.named_parameters() if self.prefix not in name)

    def test_merging_twice_changes_nothing_more(self, case: Case) -> None:
        model = self.adapted(case)
        model.merge_adapter()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_adapters_merged_one_after_the_other_are_those_merged_at_once(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.base_model.set_adapter(["default", "second"])
        at_once = copy.deepcopy(model)
        at_once.merge_adapter(adapter_names=["default", "second"])
        model.merge_adapter(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(adapter_names=["second"])
        assert torch.equal(output(model, case.inputs), output(at_once, case.inputs))
        model.unmerge_adapter()
        with model.disable_adapter():
            assert close(output(model, case.inputs), output(case.base(), case.inputs))

    def test_merging_in_training_mode_is_the_same(self, case: Case) -> None:
        model = self.adapted(case)
        other = copy.deepcopy(model).train()
        model.merge_adapter()
        other.merge_adapter()
        assert torch.equal(output(other, case.inputs), output(model, case.inputs))

    def test_a_merged_adapter_is_not_deleted_until_it_is_unmerged(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.merge_adapter()
        expected = output(model, case.inputs)
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        assert list(model.peft_config) == ["default", "second"]
        model.delete_adapter("second")
        assert torch.equal(output(model, case.inputs), expected)
        model.unmerge_adapter()
        model.delete_adapter("default")
        assert not [name for name, _ in model.named_parameters() if self.prefix in name]

    def test_disabling_a_merged_adapter_unmerges_it(self, case: Case) -> None:
        model = self.adapted(case)
        model.merge_adapter()
        with model.disable_adapter():
            assert close(output(model, case.inputs), output(case.base(), case.inputs))

    # ---- several adapters ----

    def test_a_second_adapter_computes_as_if_it_were_alone(self, case: Case, tmp_path) -> None:
        model = self.adapted(case)
        first = output(model, case.inputs)
        model.add_adapter("second", self.new_config(target_modules=case.targets[:1], init_weights=False))
        assert torch.equal(output(model, case.inputs), first)
        model.save_pretrained(tmp_path)
        model.set_adapter("second")
        alone = PeftModel.from_pretrained(case.base(), tmp_path / "second")
        assert torch.equal(output(model, case.inputs), output(alone, case.inputs))
        model.set_adapter("default")
        assert torch.equal(output(model, case.inputs), first)

    def test_adding_an_adapter_changes_nobodys_requires_grad(self, case: Case) -> None:
        model = self.adapted(case)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.add_adapter("second", self.new_config(target_modules=case.targets))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == before.get(name, False), name

    def test_only_the_active_adapter_trains(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets[:1]))
        model.set_adapter("second")
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (self.prefix in name and name.endswith(".second")), name

    def test_two_active_adapters_add_up(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.base_model.set_adapter(["default", "second"])
        expected = output(model, case.inputs)
        model.merge_adapter(adapter_names=["default", "second"])
        assert close(output(model, case.inputs), expected)

    def test_a_name_in_use_is_refused_and_nothing_changes(self, case: Case) -> None:
        model = self.adapted(case)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.peft_config["default"]
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("default", self.new_config(target_modules=case.targets))
        assert model.peft_config["default"] is config
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_an_unknown_adapter_can_be_neither_set_nor_deleted(self, case: Case) -> None:
        model = self.adapted(case)
        expected = output(model, case.inputs)
        with pytest.raises(ValueError, match="nobody"):
            model.set_adapter("nobody")
        with pytest.raises(ValueError, match="nobody"):
            model.delete_adapter("nobody")
        assert torch.equal(output(model, case.inputs), expected)

    def test_deleting_the_active_adapter_activates_another_one(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        expected = output(model, case.inputs)
        model.set_adapter("second")
        with pytest.warns(UserWarning, match="Adapter second was active which is now deleted"):
            model.delete_adapter("second")
        assert model.active_adapters == ["default"]
        assert torch.equal(output(model, case.inputs), expected)

    def test_a_deleted_adapter_leaves_no_parameter_and_the_other_one_intact(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.set_adapter("second")
        expected = output(model, case.inputs)
        model.delete_adapter("default")
        assert not [name for name, _ in model.named_parameters() if ".default" in name]
        assert torch.equal(output(model, case.inputs), expected)
        model.delete_adapter("second")
        assert not [name for name, _ in model.named_parameters() if self.prefix in name]
        # PeftModel itself cannot run without an adapter (nor with LoRA); what is inside can.
        assert torch.equal(output(model.base_model.model, case.inputs), output(case.base(), case.inputs))

    def test_a_deleted_name_can_be_used_again(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        model.delete_adapter("second")
        model.add_adapter("second", self.new_config(target_modules=case.targets))
        model.set_adapter("second")
        assert torch.equal(output(model, case.inputs), output(case.base(), case.inputs))

    def test_rows_of_a_mixed_batch_go_through_their_own_adapter(self, case: Case) -> None:
        model = self.adapted(case)
        model.add_adapter("second", self.new_config(target_modules=case.targets, init_weights=False))
        expected = [output(case.base(), case.inputs)]
        for name in ("default", "second"):
            model.set_adapter(name)
            expected.append(output(model, case.inputs))
        mixed = output(model, case.inputs, adapter_names=["second", "__base__", "default"])
        assert close(mixed[0], expected[2][0])
        assert close(mixed[1], expected[0][1])
        assert close(mixed[2], expected[1][2])
        assert torch.equal(output(model, case.inputs), expected[2])  # nothing stays behind

    @only_for("decoder", "encoder_decoder", "whisper")
    def test_generating_calls_the_adapter(self, case: Case) -> None:
        model = self.adapted(case)
        key = "input_features" if "input_features" in case.inputs else "input_ids"
        arguments = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        mine = model.generate(**{key: case.inputs[key]}, **arguments)
        merged = copy.deepcopy(model).merge_and_unload().generate(**{key: case.inputs[key]}, **arguments)
        assert torch.equal(mine.sequences, merged.sequences)
        assert all(close(a, b, atol=1e-4) for a, b in zip(mine.logits, merged.logits, strict=True))
        base = case.base().generate(**{key: case.inputs[key]}, **arguments)
        assert not close(mine.logits[0], base.logits[0], atol=1e-3)

    # ---- copies, dtypes, status, low-level functions ----

    def test_a_deep_copy_is_independent(self, case: Case) -> None:
        model = self.adapted(case)
        expected = output(model, case.inputs)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(1)
        assert torch.equal(output(copied, case.inputs), expected)

    def test_a_pickled_model_computes_the_same(self, case: Case) -> None:
        model = self.adapted(case)
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(output(copied, case.inputs), output(model, case.inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_on_a_half_precision_base_the_adapter_is_float32_and_the_output_half(self, case: Case, dtype: torch.dtype, tmp_path) -> None:
        config = self.new_config(target_modules=case.targets, init_weights=False)
        model = get_peft_model(case.base().to(dtype), config)
        assert {p.dtype for name, p in model.named_parameters() if self.prefix in name} == {torch.float32}
        assert all(p.requires_grad for name, p in model.named_parameters() if self.prefix in name)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs.items()}
        result = output(model, inputs)
        assert result.dtype == dtype
        assert close(result, output(copy.deepcopy(model).float(), case.inputs), atol=0.1)
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):  # True rounds the adapter to the base's dtype, with every PEFT method
            loaded = PeftModel.from_pretrained(case.base().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(output(loaded, inputs), result) or (low_cpu_mem_usage and close(output(loaded, inputs), result, atol=0.1))
            assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_without_dtype_casting_the_adapter_takes_the_bases_dtype(self, case: Case) -> None:
        config = self.new_config(target_modules=case.targets, init_weights=False)
        model = get_peft_model(case.base().bfloat16(), config, autocast_adapter_dtype=False)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in case.inputs.items()}
        assert output(model, inputs).dtype == torch.bfloat16

    def test_the_whole_model_can_be_cast(self, case: Case) -> None:
        model = self.adapted(case)
        expected = output(model, case.inputs)
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
        assert close(output(model.double(), inputs), expected, atol=1e-4)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}

    def test_status_reports_the_adapter(self, case: Case) -> None:
        model = self.adapted(case)
        status = model.get_model_status()
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.requires_grad == {"default": True}
        assert status.devices == {"default": ["cpu"]}
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert status.total_params == status.trainable_params + sum(p.numel() for p in case.base().parameters())
        assert {layer.module_type.partition(".")[0] + "_" for layer in model.get_layer_status()} == {self.prefix}
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["default"]

    def test_an_adapter_can_be_injected_without_a_peft_model(self, case: Case) -> None:
        config = self.new_config(target_modules=case.targets, init_weights=False)
        torch.manual_seed(1)
        injected = inject_adapter_in_model(config, case.base())
        tensors = get_peft_model_state_dict(injected)
        assert all(self.prefix in key and "default" not in key for key in tensors)
        fresh = inject_adapter_in_model(self.new_config(target_modules=case.targets), case.base())
        result = set_peft_model_state_dict(fresh, tensors)
        assert not result.unexpected_keys
        assert torch.equal(output(fresh, case.inputs), output(injected, case.inputs))

    def test_an_adapter_can_be_injected_from_the_names_in_a_state_dict(self, case: Case) -> None:
        config = self.new_config(target_modules=case.targets, init_weights=False)
        injected = inject_adapter_in_model(config, case.base())
        tensors = get_peft_model_state_dict(injected)
        fresh = inject_adapter_in_model(self.new_config(target_modules=case.targets), case.base(), state_dict=tensors)
        set_peft_model_state_dict(fresh, tensors)
        assert torch.equal(output(fresh, case.inputs), output(injected, case.inputs))

    @only_for("decoder", "encoder_decoder", "whisper")
    def test_gradient_checkpointing_gives_the_same_gradients(self, case: Case) -> None:
        model = self.adapted(case).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss_of(model, case.inputs).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, case.inputs).backward()
        assert all(close(p.grad, expected[name]) for name, p in model.named_parameters() if name in expected)
        assert expected
