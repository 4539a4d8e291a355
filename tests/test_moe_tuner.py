"""The mixture itself: experts converted exactly, routers against plain formulas, gates from outside, the terms of the loss, files.

PEFT's own LoRA is the truth where it can be: a mixture with fixed gates is a sum of LoRA adapters with their scaling changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from tuner_behaviours import CASES, Utterances, close, loss_of, output

from peft_s2lora import S2LoraConfig
from whisper_moe import LanguagePosterior, LoraMoeConfig, LoraMoeLayer, Routing, expert_files, use_gates
from whisper_moe.router import balance_loss, entropy_loss

WHISPER, MLP = CASES["whisper"], CASES["mlp"]
TARGETS = ["q_proj", "v_proj", "fc1"]


def write_lora(folder: Path, case=WHISPER, seed: int = 1, method=LoraConfig, **options: Any) -> str:
    base = case.base()  # sets the seed
    torch.manual_seed(seed)
    start = {"init_lora_weights": False} if method is LoraConfig else {"init_weights": False}
    model = get_peft_model(base, method(**{"r": 2, "target_modules": TARGETS, **start, **options}))
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    """Three LoRA experts of different rank and scaling; the last leaves fc1 alone."""
    folder = tmp_path_factory.mktemp("experts")
    return {
        "cy": write_lora(folder / "cy", seed=1, r=2, lora_alpha=3),
        "eu": write_lora(folder / "eu", seed=2, r=3, lora_alpha=1, use_rslora=True),
        "fi": write_lora(folder / "fi", seed=3, r=1, target_modules=["q_proj", "v_proj"]),
    }


def mixture(experts: dict[str, str], seed: int = 0, **options: Any) -> PeftModel:
    base = WHISPER.base()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraMoeConfig(**{"r": 2, "experts": experts, "init_weights": False, **options})).eval()


def loras(experts: dict[str, str], gates: dict[str, float], case=WHISPER) -> PeftModel:
    """The same experts as PEFT's LoRA adapters, all active, each scaled by its gate."""
    names = list(experts)
    model = PeftModel.from_pretrained(case.base(), experts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(experts[name], name)
    for module in model.modules():
        for name in names:
            if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling:
                module.scaling[name] *= gates.get(name, 0.0)
    model.base_model.set_adapter(names)
    return model


def layers(model: nn.Module) -> dict[str, LoraMoeLayer]:
    return {module.module_names["default"]: module for module in model.modules() if isinstance(module, LoraMoeLayer)}


# ---- experts -----------------------------------------------------------------------------------------------------------


def test_a_fixed_mixture_of_loras_is_the_sum_of_them(experts):
    gates = {"cy": 0.5, "eu": 0.3, "fi": 0.2}
    model = mixture(experts, new_expert=False)
    with model.base_model.use_gates(gates):
        assert close(output(model, WHISPER.inputs), output(loras(experts, gates), WHISPER.inputs))


@pytest.mark.parametrize("scope", ["shape", "module_type", "global"])
def test_an_s2_lora_expert_is_converted_exactly(tmp_path, scope):
    folder = write_lora(tmp_path / "s2", method=S2LoraConfig, r=4, s2lora_alpha=2, share_scope=scope, share_groups=[r".*encoder.*"])
    truth = PeftModel.from_pretrained(WHISPER.base(), folder)
    model = mixture({"s2": folder}, new_expert=False)
    with use_gates(model, {"s2": 1.0}):
        assert close(output(model, WHISPER.inputs), output(truth, WHISPER.inputs))


def test_rank_patterns_of_an_expert_are_followed(tmp_path):
    folder = write_lora(tmp_path / "a", rank_pattern={"fc1": 5, r".*encoder.*q_proj": 1}, alpha_pattern={"v_proj": 9})
    model = mixture({"a": folder}, new_expert=False)
    with use_gates(model, {"a": 1.0}):
        assert close(output(model, WHISPER.inputs), output(PeftModel.from_pretrained(WHISPER.base(), folder), WHISPER.inputs))


def test_loras_loaded_in_the_model_become_experts_and_make_room(experts):
    gates = {"cy": 0.75, "eu": 0.25}
    inner = loras({name: experts[name] for name in gates}, dict.fromkeys(gates, 1.0)).get_base_model()
    model = get_peft_model(inner, LoraMoeConfig(experts=["cy", "eu"], prior=gates, router="static"))
    assert close(output(model, WHISPER.inputs), output(loras({n: experts[n] for n in gates}, gates), WHISPER.inputs))
    assert not [name for name, _ in model.named_parameters() if ".lora_A" in name]
    unloaded = model.unload()
    assert torch.equal(output(unloaded, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_the_experts_targets_are_taken_when_none_are_given(experts):
    model = mixture({"cy": experts["cy"]})
    assert model.peft_config["default"].target_modules == set(TARGETS)
    assert {name.rpartition(".")[2] for name in layers(model)} == set(TARGETS)


def test_a_weight_that_no_expert_adapts_has_no_router(experts):
    model = mixture({"fi": experts["fi"]}, target_modules=TARGETS)
    assert {name.rpartition(".")[2] for name, layer in layers(model).items() if not layer.has_experts("default")} == {"fc1"}
    output(model, WHISPER.inputs)


# ---- what is refused at the door ---------------------------------------------------------------------------------------


def assert_unchanged(base: nn.Module) -> None:
    fresh = WHISPER.base()
    assert [type(module) for module in base.modules()] == [type(module) for module in fresh.modules()]
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def edited(source: str, folder: Path, **fields: Any) -> str:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda e, f: {"experts": {"no": "nowhere"}},
            r"'no'.*nowhere is neither a folder .* nor a LoRA adapter of this model \(loaded: none\)",
        ),
        (lambda e, f: {"experts": {"hub": "someone/adapter@0a1b2c"}}, "not pinned to a commit"),
        (lambda e, f: {"experts": {"hub": f"someone/adapter@{'0' * 40}"}}, "nobody was named who fetches"),
        (
            lambda e, f: {"experts": {"mlp": write_lora(f / "m", case=MLP, target_modules=["lin0"])}},
            r"'mlp'.*no linear layer of this model",
        ),
        (
            lambda e, f: {"experts": e, "target_modules": ["q_proj"]},
            r"'cy' adapts 10 module\(s\) that are no targets.*Leave target_modules out",
        ),
        (lambda e, f: {"experts": {"d": edited(e["cy"], f / "d", use_dora=True)}}, "use_dora"),
        (lambda e, f: {"experts": {"b": edited(e["cy"], f / "b", bias="all")}}, "bias"),
        (lambda e, f: {"experts": {"p": edited(e["cy"], f / "p", init_lora_weights="pissa")}}, "pissa"),
        (lambda e, f: {"experts": {"v": edited(e["cy"], f / "v", peft_type="VERA")}}, "VERA"),
        (lambda e, f: {"experts": {"r": edited(e["cy"], f / "r", r=5)}}, "rank 5"),
        (lambda e, f: {"experts": e, "expert_hashes": {"eu": "0" * 64}}, "'eu'.*has changed"),
        (lambda e, f: {"experts": e, "target_modules": [*TARGETS, "conv1"]}, "conv1 is a Conv1d"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_and_the_model_is_as_before(experts, tmp_path, make, message):
    base = WHISPER.base()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraMoeConfig(**make(experts, tmp_path)))
    assert_unchanged(base)


def test_experts_are_refused_in_words_of_the_mixture(experts, tmp_path):
    folder = Path(shutil.copytree(experts["cy"], tmp_path / "odd"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.x.magnitude": torch.ones(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no A or B of a linear layer") as refused:
        get_peft_model(WHISPER.base(), LoraMoeConfig(experts={"odd": str(folder)}))
    assert "table" not in str(refused.value)


def test_the_hash_of_an_expert_is_that_of_the_bytes_that_were_read(experts, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(experts["cy"], tmp_path / "cy"))
    path = folder / "adapter_model.safetensors"
    expected, read = hashlib.sha256(path.read_bytes()).hexdigest(), expert_files.lora_pairs

    def read_and_replace(files):  # somebody writes another file in the meantime
        save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
        return read(files)

    monkeypatch.setattr(expert_files, "lora_pairs", read_and_replace)
    model = mixture({"cy": str(folder)}, save_experts="reference")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["expert_hashes"] == {"cy": expected}
    assert hashlib.sha256(path.read_bytes()).hexdigest() != expected


def test_an_expert_of_another_size_is_refused(experts, tmp_path):
    tensors = load_file(Path(experts["cy"]) / "adapter_model.safetensors")
    wide = {key: torch.zeros(t.shape[0], t.shape[1] + 1) if "lora_A" in key else t for key, t in tensors.items()}
    folder = Path(shutil.copytree(experts["cy"], tmp_path / "wide"))
    save_file(wide, folder / "adapter_model.safetensors")
    base = WHISPER.base()
    with pytest.raises(ValueError, match=r"from 17 to 16 features; this model has 16 to 16.*another base model"):
        get_peft_model(base, LoraMoeConfig(experts=[str(folder)]))
    assert_unchanged(base)


def test_an_expert_with_the_fingerprint_of_another_base_is_refused(tmp_path, tiny_model, make_adapter):
    folder = make_adapter("cy")
    with torch.no_grad():
        tiny_model.model.encoder.layers[0].fc1.weight.normal_()
        tiny_model.model.decoder.layers[1].fc2.weight.normal_()
        for parameter in tiny_model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"'cy'.*other weights"):
        get_peft_model(tiny_model, LoraMoeConfig(experts=[str(folder)]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": []}, "experts is empty"),
        ({"experts": "folder"}, r"Write|write \['folder'\]"),
        ({"experts": ["a/cy", "b/cy"]}, "Two experts are called 'cy'"),
        ({"router": "token"}, "router given, but no experts"),
        ({"balance_weight": 0.1}, "no experts"),
        ({"new_expert": False}, "nothing to add"),
        ({"experts": ["a", "b"], "top_k": 3}, r"number of experts, 2 \(a, b\), got 3"),
        ({"experts": ["a", "b"], "top_k": 0}, "top_k must be a whole number"),
        ({"experts": ["a", "b"], "router": "magic"}, "utterance, token, static, language"),
        ({"experts": ["a", "b"], "temperature": 0}, "temperature must be a number above 0"),
        ({"experts": ["a", "b"], "prior": {"a": 1}}, "the experts are a, b"),
        ({"experts": ["a", "b"], "prior": [1, 0]}, "prior of 'b' must be a number above 0"),
        ({"experts": ["a", "b"], "prior": [1]}, "1 numbers for 2 experts"),
        ({"experts": ["a", "b"], "router": "language", "entropy_weight": 1}, "nothing to train"),
        ({"r": 0}, "r must be a whole number"),
        ({"loramoe_dropout": 1.0}, "below 1"),
        ({"save_experts": "maybe"}, "copy, reference"),
        ({"entropy_weight": -1}, "entropy_weight must be 0 or above"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraMoeConfig(**fields)


def test_a_model_that_is_wrapped_already_is_refused(experts):
    with pytest.raises(ValueError, match=r"get_base_model\(\)"):
        get_peft_model(PeftModel.from_pretrained(WHISPER.base(), experts["cy"]), LoraMoeConfig(experts=[experts["eu"]]))


def test_loaded_adapters_that_are_no_experts_are_refused(experts):
    inner = loras({name: experts[name] for name in ("cy", "eu")}, {}).get_base_model()
    with pytest.raises(ValueError, match="eu, which are no experts"):
        get_peft_model(inner, LoraMoeConfig(experts=["cy"]))


# ---- routers against plain formulas ------------------------------------------------------------------------------------


def recorded(model: PeftModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with model.base_model.record_gates() as report:
        output(model, inputs)
    return {module: torch.from_numpy(report.array(module)) for module in report.modules}


def seen_inputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each adapted layer is given."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in layers(model).items()
    ]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("router", ["utterance", "token"])
def test_the_gates_are_the_softmax_of_what_the_router_reads(experts, router):
    model = mixture(experts, router=router, temperature=2.0)
    gates, seen = recorded(model, WHISPER.inputs), seen_inputs(model, WHISPER.inputs)
    with torch.no_grad():
        heard = model.base_model.model.model.encoder(WHISPER.inputs["input_features"]).last_hidden_state.mean(dim=1)
    for name, layer in layers(model).items():
        pooled = seen[name].mean(dim=1) if ".encoder." in name else heard
        read = seen[name] if router == "token" else pooled
        scores = read.double() @ layer.loramoe_router_weight["default"].T.double() + layer.loramoe_router_bias["default"].double()
        assert torch.allclose(gates[name].double(), torch.softmax(scores / 2.0, dim=-1), atol=1e-5), name


@pytest.mark.parametrize("router", ["utterance", "token"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_routed_layer_is_the_loop_over_experts(experts, router, top_k):
    model = mixture(experts, router=router, top_k=top_k, loramoe_alpha=3)
    gates, seen = recorded(model, WHISPER.inputs), seen_inputs(model, WHISPER.inputs)
    name = "model.encoder.layers.0.self_attn.q_proj"
    layer, x, g = layers(model)[name], seen[name].double(), gates[name].double()
    A, B = layer.loramoe_experts_A["default"].double(), layer.loramoe_experts_B["default"].double()
    expected = (
        layer.base_layer(seen[name]).double() + 1.5 * x @ layer.loramoe_A["default"].T.double() @ layer.loramoe_B["default"].T.double()
    )
    for e in range(3):
        gate = g[..., e, None] if router == "token" else g[:, e, None, None]
        expected = expected + gate * (x @ A[e].T @ B[e])
    assert torch.allclose(layer(seen[name]).double(), expected, atol=1e-5)
    if top_k is not None:
        assert int((g > 0).sum(-1).max()) == top_k
        assert torch.allclose(g.sum(-1), torch.ones(()).double(), atol=1e-6)


def test_gates_differ_between_recordings_where_the_router_reads_them(experts):
    gates = recorded(mixture(experts, temperature=4.0), WHISPER.inputs)  # undecided enough to differ everywhere
    assert all(float(g.std(dim=0).max()) > 1e-3 for g in gates.values())


def test_the_gates_of_a_recording_do_not_depend_on_the_rest_of_the_batch(experts):
    for router in ("utterance", "token"):
        model = mixture(experts, router=router)
        alone = [output(model, {name: x[row : row + 1] for name, x in WHISPER.inputs.items()}) for row in range(3)]
        assert close(output(model, WHISPER.inputs), torch.cat(alone))


@pytest.mark.parametrize("router", ["utterance", "token", "static"])
def test_later_tokens_do_not_change_earlier_positions(experts, router):
    model = mixture(experts, router=router, target_modules=None)
    changed = WHISPER.inputs["decoder_input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 5) % 30
    before, after = output(model, WHISPER.inputs), output(model, {**WHISPER.inputs, "decoder_input_ids": changed})
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("router", ["utterance", "token", "static"])
@pytest.mark.parametrize("top_k", [None, 1])
def test_token_steps_with_a_cache_compute_what_the_whole_text_does(experts, router, top_k):
    model = mixture(experts, router=router, top_k=top_k)
    whole = output(model, WHISPER.inputs)
    inner, ids = model.base_model.model, WHISPER.inputs["decoder_input_ids"]
    with torch.no_grad():
        encoded, cache, steps = inner.get_encoder()(WHISPER.inputs["input_features"]), None, []
        for position in range(ids.shape[1]):
            one = ids[:, position : position + 1]
            result = inner(encoder_outputs=encoded, decoder_input_ids=one, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
    assert close(torch.cat(steps, dim=1), whole)


def test_a_change_of_the_router_between_two_calls_is_seen(experts):
    model = mixture(experts)
    inner = model.base_model.model
    with torch.no_grad():
        encoded = inner.get_encoder()(WHISPER.inputs["input_features"])
        call = {"encoder_outputs": encoded, "decoder_input_ids": WHISPER.inputs["decoder_input_ids"]}
        before = inner(**call).logits
        for name, layer in layers(model).items():
            if ".decoder." in name:
                layer.loramoe_router_bias["default"].add_(torch.tensor([3.0, 0.0, -3.0]))
        after = inner(**call).logits
        with model.base_model.mask_experts(["cy"]):
            masked = inner(**call).logits
        assert torch.equal(inner(**call).logits, after)
    assert not close(before, after, atol=1e-3)
    assert not close(masked, after, atol=1e-3)


def test_a_change_of_the_experts_between_two_calls_is_seen(experts):
    """Experts that were collected for an utterance are collected again when they have changed."""
    model = mixture(experts, top_k=1, train_experts=True)
    inner = model.base_model.model
    with torch.no_grad():
        encoded = inner.get_encoder()(WHISPER.inputs["input_features"][:1])
        call = {"encoder_outputs": encoded, "decoder_input_ids": WHISPER.inputs["decoder_input_ids"][:1]}
        before = inner(**call).logits
        assert torch.equal(inner(**call).logits, before)
        for name, layer in layers(model).items():
            if ".decoder." in name:
                layer.loramoe_experts_A["default"].mul_(-1)
        assert not close(inner(**call).logits, before, atol=1e-3)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        output(model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in WHISPER.inputs.items()})


def test_beam_search_gives_each_row_what_it_gives_it_alone(experts):
    model = mixture(experts)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    batch = model.generate(input_features=WHISPER.inputs["input_features"], **options)
    for row in range(3):
        alone = model.generate(input_features=WHISPER.inputs["input_features"][row : row + 1], **options)
        assert torch.equal(batch[row, : alone.shape[1]], alone[0])


# ---- gates from outside ------------------------------------------------------------------------------------------------


def test_each_row_of_a_batch_may_use_its_own_expert(experts):
    model = mixture(experts, router="language", new_expert=False)
    alone = {name: output(loras(experts, {name: 1.0}), WHISPER.inputs) for name in ("cy", "fi")}
    for gates in (["fi", None, "cy"], torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]]), Routing.one_hot([2, None, 0])):
        with model.base_model.use_gates(gates):
            mixed = output(model, WHISPER.inputs)
        assert close(mixed[0], alone["fi"][0])
        assert close(mixed[1], output(WHISPER.base(), WHISPER.inputs)[1])
        assert close(mixed[2], alone["cy"][2])


def test_a_language_posterior_is_restricted_to_the_experts(experts):
    model = mixture(experts, router="language")
    posterior = LanguagePosterior({"en": 0.6, "fi": 0.3, "cy": 0.1}, None)
    with model.base_model.use_gates([posterior] * 3):
        from_posterior = output(model, WHISPER.inputs)
    with model.base_model.use_gates({"fi": 0.75, "cy": 0.25}):
        assert close(output(model, WHISPER.inputs), from_posterior)


def test_the_language_router_asks_for_gates_and_falls_back_to_its_prior(experts):
    with pytest.raises(ValueError, match=r"use_gates.*prior"):
        output(mixture(experts, router="language"), WHISPER.inputs)
    prior = {"cy": 2, "eu": 1, "fi": 1}
    model = mixture(experts, router="language", prior=prior, new_expert=False)
    truth = loras(experts, {"cy": 0.5, "eu": 0.25, "fi": 0.25})
    assert close(output(model, WHISPER.inputs), output(truth, WHISPER.inputs))


def test_masked_experts_leave_their_share_to_the_others(experts):
    model = mixture(experts, router="static", prior=[1, 1, 2], new_expert=False)
    with model.base_model.mask_experts(["fi"]):
        assert close(output(model, WHISPER.inputs), output(loras(experts, {"cy": 0.5, "eu": 0.5}), WHISPER.inputs))
        with model.base_model.use_gates({"cy": 0.2, "fi": 0.4}):
            assert close(output(model, WHISPER.inputs), output(loras(experts, {"cy": 0.6}), WHISPER.inputs))


@pytest.mark.parametrize("router", ["utterance", "token", "static"])
def test_with_all_experts_masked_the_new_one_is_alone(experts, router):
    model = mixture(experts, router=router)
    with model.base_model.mask_experts(list(experts)):
        alone = output(model, WHISPER.inputs)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.loramoe_experts_B["default"].zero_()
    assert close(output(model, WHISPER.inputs), alone)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (["cy", "xx", None], "No expert 'xx'. Known: cy, eu, fi"),
        ({"cyy": 1.0}, "Did you mean 'cy'"),
        (torch.zeros(3, 2), r"\(rows, 3\)"),
        (torch.zeros(2), r"shape \(3,\)"),
        ({"cy": float("nan")}, "finite"),
        ("cy", "list with one entry per row"),
        (Routing.one_hot([7]), "expert 7"),
        ({"model.encoder": torch.zeros(3)}, "missing"),
    ],
)
def test_gates_that_make_no_sense_are_refused(experts, gates, message):
    model = mixture(experts)
    with pytest.raises(ValueError, match=message), model.base_model.use_gates(gates):
        pass


def test_gates_for_another_number_of_rows_are_refused_by_the_layer_and_nothing_stays_behind(experts):
    model = mixture(experts)
    before = output(model, WHISPER.inputs)
    with pytest.raises(ValueError, match="2 rows, but a layer was called with 3"), model.base_model.use_gates(["cy", "eu"]):
        output(model, WHISPER.inputs)
    assert torch.equal(output(model, WHISPER.inputs), before)


# ---- one way or another ------------------------------------------------------------------------------------------------


def test_a_long_recording_alone_goes_through_the_weight_and_comes_out_the_same(experts, monkeypatch):
    """One recording without autograd is added to the weight; with autograd, and in a batch, it is added to the output."""
    model = mixture(experts, loramoe_alpha=3)
    layer = layers(model)["model.encoder.layers.0.fc1"]
    x = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(3))
    calls = []
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self is layer.base_layer), linear(self, x))[1])
    with_autograd = layer(x)
    with torch.no_grad():
        in_batch = layer(torch.cat([x, x.flip(1)]))[:1]
        assert sum(calls) == 2
        alone = layer(x)
    assert sum(calls) == 2  # the base layer itself was not asked
    assert close(alone, with_autograd)
    assert close(alone, in_batch)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_a_base_layer_that_does_more_than_its_product_is_always_called(experts, kind):
    """As programs do that bring a weight to the device for the length of a call."""
    layer = layers(mixture(experts))["model.encoder.layers.0.fc1"]
    x = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        usual = layer(x) - layer.base_layer(x)
        if kind == "hook":
            layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
        elif kind == "pre-hook":
            layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            forward = layer.base_layer.forward
            layer.base_layer.forward = lambda x: forward(x) + 1
        assert close(layer(x), layer.base_layer(x) + usual)


def test_a_weight_that_nothing_adapts_adds_nothing_where_it_is(experts):
    layer = layers(mixture({"fi": experts["fi"]}, target_modules=TARGETS, new_expert=False).to("meta", torch.bfloat16))
    delta = layer["model.encoder.layers.0.fc1"].get_delta_weight("default", torch.ones(1))
    assert (delta.device.type, delta.dtype, tuple(delta.shape)) == ("meta", torch.bfloat16, (24, 16))


@pytest.mark.parametrize("router", ["utterance", "token"])
def test_autocast_is_near_full_precision(experts, router):
    model = mixture(experts, router=router)
    with torch.autocast("cpu", torch.bfloat16):
        half = output(model, WHISPER.inputs)
    assert close(half, output(model, WHISPER.inputs), atol=0.15)


def test_a_layer_compiles_into_one_graph(experts):
    model = mixture(experts)
    layer = layers(model)["model.encoder.layers.0.fc1"]
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = layer(x)
        torch._dynamo.reset()
        assert close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)


# ---- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["utterance", "token", "static"])
def test_training_the_router_finds_the_expert_that_the_task_needs(tmp_path, router):
    """Two kinds of input, two experts; the answer is the base model with the expert of that kind. Only the router can tell them apart."""
    torch.manual_seed(0)
    names, base = ["a", "b"], nn.Sequential(nn.Linear(6, 6))
    for index, name in enumerate(names):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(generator=torch.Generator().manual_seed(index + 1))
        model.save_pretrained(tmp_path / name)
    sources = {name: str(tmp_path / name) for name in names}
    config = LoraMoeConfig(r=2, experts=sources, router=router, new_expert=False)
    model = get_peft_model(base, config)
    layer = next(module for module in model.modules() if isinstance(module, LoraMoeLayer))
    A, B = layer.loramoe_experts_A["default"], layer.loramoe_experts_B["default"]
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(0, 2, (64,), generator=generator) if router != "static" else torch.ones(64, dtype=torch.long)
    x = torch.randn(64, 5, 6, generator=generator)
    x[:, :, 0] += 4 * (2 * kinds[:, None] - 1)  # what tells the kinds apart
    with torch.no_grad():
        target = layer.base_layer(x) + torch.stack([x[i] @ A[kind].T @ B[kind] for i, kind in enumerate(kinds.tolist())])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    with model.base_model.record_gates() as report, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)
    gates = torch.from_numpy(report.array("0"))
    gates = gates.mean(dim=1) if gates.dim() == 3 else gates
    chosen = gates.argmax(dim=-1)
    assert torch.equal(chosen, kinds if router != "static" else torch.ones(1, dtype=torch.long))
    assert float(gates.max(dim=-1).values.min()) > 0.8


def test_dropout_is_the_new_experts_alone(experts):
    model = mixture(experts, router="static", loramoe_dropout=0.5).train()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.loramoe_B["default"].zero_()
    a = layers(model)["model.encoder.layers.0.fc1"]
    x = torch.randn(2, 3, 16)
    assert torch.equal(a(x), a(x))  # B = 0: whatever is dropped, the experts' part is the same


# ---- balance and entropy -----------------------------------------------------------------------------------------------


def test_the_terms_are_what_they_say():
    even, decided = torch.full((4, 3), 1 / 3), torch.eye(3)
    one = torch.tensor([[1.0, 0, 0]] * 4)
    assert math.isclose(float(balance_loss(even)), 0, abs_tol=1e-6)
    assert math.isclose(float(balance_loss(decided)), 0, abs_tol=1e-6)  # each recording decided, all experts used
    assert math.isclose(float(balance_loss(one)), 2, abs_tol=1e-6)
    assert math.isclose(float(entropy_loss(even)), 1, abs_tol=1e-6)
    assert math.isclose(float(entropy_loss(one)), 0, abs_tol=1e-6)
    gates = torch.rand(5, 2, 3).softmax(-1)
    expected = -(gates * gates.log()).sum(-1).mean() / math.log(3)
    assert math.isclose(float(entropy_loss(gates)), float(expected), rel_tol=1e-5)


LABELLED = {"input_features": WHISPER.inputs["input_features"], "labels": WHISPER.inputs["decoder_input_ids"]}


def router_gradient(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "router" in name])


@pytest.mark.parametrize("router", ["utterance", "token"])
def test_the_terms_are_in_the_loss_of_a_model_with_labels(experts, router):
    options = {"router": router, "balance_weight": 2.0, "entropy_weight": 3.0}
    model, plain = mixture(experts, **options).train(), mixture(experts, router=router).train()
    with model.base_model.record_gates() as report:
        loss = model(**LABELLED).loss
    gates = [torch.from_numpy(report.array(module)) for module in report.modules]
    balance = sum(float(balance_loss(g)) for g in gates) / len(gates)
    entropy = sum(float(entropy_loss(g)) for g in gates) / len(gates)
    assert math.isclose(float((loss - plain(**LABELLED).loss).detach()), 2 * balance + 3 * entropy, rel_tol=1e-3)
    assert math.isclose(float(model.base_model.regularization_loss()), 2 * balance + 3 * entropy, rel_tol=1e-4)
    assert not model.base_model.regularization_loss().requires_grad  # it is in the loss already: adding it again changes no gradient


def test_the_terms_can_be_added_to_a_loss_computed_outside(experts):
    model, labelled = mixture(experts, balance_weight=1.0).train(), mixture(experts, balance_weight=1.0).train()
    inputs = {"input_features": LABELLED["input_features"], "decoder_input_ids": WHISPER.inputs["decoder_input_ids"]}
    logits = model(**inputs).logits
    (logits.square().mean() + model.base_model.regularization_loss()).backward()
    # the same through the model's own loss: replaced by hand, the term kept
    result = labelled(**inputs, labels=LABELLED["labels"])
    term = result.loss - nn.functional.cross_entropy(result.logits.flatten(0, 1), LABELLED["labels"].flatten())
    (result.logits.square().mean() + term).backward()
    assert torch.allclose(router_gradient(model), router_gradient(labelled), atol=1e-5)


def test_terms_that_reach_no_loss_are_reported(experts):
    model = mixture(experts, balance_weight=1.0).train()
    inputs = WHISPER.inputs
    model(**inputs)
    with pytest.warns(UserWarning, match="reached no loss"):
        model(**inputs)


def test_the_terms_with_gradient_checkpointing_have_the_same_gradients(experts):
    gradients = []
    for checkpointing in (False, True):
        model = mixture(experts, top_k=2, balance_weight=1.0, entropy_weight=1.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**LABELLED).loss.backward()
        gradients.append(router_gradient(model))
    assert torch.allclose(*gradients, atol=1e-6)


def test_checkpointed_layers_find_the_gates_of_their_own_call_in_the_backward_pass(experts):
    """Two calls under different gates, one backward pass, after the blocks have ended."""
    gradients = []
    for checkpointing in (False, True):
        model = mixture(experts)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        losses = []
        for gates in (["cy", "eu", "fi"], ["fi", None, "cy"]):
            with model.base_model.use_gates(gates):
                losses.insert(0, model(**LABELLED).loss)
        losses.append(model(**LABELLED).loss)
        sum(losses).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        state = next(iter(layers(model).values())).states["default"]
        assert (state.slot.current, state.utterance, state.fixed) == (None, None, None)  # nothing stays behind
    assert torch.allclose(*gradients, atol=1e-5)


class Fails(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")


def without_dropout(model: PeftModel, checkpointing: bool) -> PeftModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradients_of(model: PeftModel) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


BLOCKS = {
    "masked": lambda model: model.base_model.mask_experts(["fi"]),
    "gates for all rows": lambda model: model.base_model.use_gates({"cy": 1.0}),
    "gates for each row": lambda model: model.base_model.use_gates(["cy", None, "fi"]),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_backward_pass_that_fails_leaves_no_gates_behind(experts, block, inside):
    model, fresh = (without_dropout(mixture(experts), checkpointing=True) for _ in range(2))
    expected = output(fresh, WHISPER.inputs)
    encoded = fresh.get_base_model().get_encoder()(WHISPER.inputs["input_features"]).last_hidden_state

    def fail() -> None:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()

    for check in ("model", "encoder", "block", "backward"):
        model.train()
        with use_gates(model, {"eu": 1.0}):
            usual = model(**LABELLED).loss
        handle = model.get_base_model().model.decoder.layers[0].fc1.register_forward_hook(lambda _, args, y: Fails.apply(y))
        with BLOCKS[block](model):
            loss = model(**LABELLED).loss
            if inside:
                fail()
        if not inside:
            fail()
        handle.remove()
        model.zero_grad()
        if check == "encoder":  # as generate calls it, without the model around it
            model.eval()
            assert close(model.get_base_model().get_encoder()(WHISPER.inputs["input_features"]).last_hidden_state, encoded)
        elif check == "block":
            with BLOCKS["masked"](model), BLOCKS["masked"](fresh):
                assert close(output(model, WHISPER.inputs), output(fresh, WHISPER.inputs))
        elif check == "backward":  # of a call before the one that failed
            usual.backward()
            with use_gates(fresh, {"eu": 1.0}):
                fresh.train()(**LABELLED).loss.backward()
            assert torch.allclose(gradients_of(model), gradients_of(fresh), atol=1e-5)
            state = next(iter(layers(model).values())).states["default"]
            assert (state.slot.current, state.utterance, state.fixed, state.masked) == (None, None, None, frozenset())
        assert close(output(model, WHISPER.inputs), expected), check


def test_a_model_without_an_encoder_forgets_a_failed_backward_pass_too(tmp_path):
    folder = write_lora(tmp_path / "a", case=MLP, target_modules=["lin0"])
    model = get_peft_model(MLP.base(), LoraMoeConfig(experts={"a": folder}, init_weights=False))
    expected = output(model, MLP.inputs)
    handle = model.get_base_model().lin0.register_forward_hook(lambda _, args, y: Fails.apply(y))
    with model.base_model.mask_experts(["a"]):
        loss = loss_of(model, MLP.inputs)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    handle.remove()
    assert close(output(model, MLP.inputs), expected)


def test_a_trainer_trains_the_terms(experts, tmp_path):
    """With a strong balance term alone the gates even out, whatever the labels say."""
    model = mixture(experts, router="static", prior=[20, 1, 1], balance_weight=100.0)
    arguments = Seq2SeqTrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, learning_rate=0.3, report_to=[], use_cpu=True, label_names=["labels"],
        remove_unused_columns=False, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    before = recorded(model, WHISPER.inputs)["model.encoder.layers.0.fc1"]
    Seq2SeqTrainer(model, arguments, train_dataset=Utterances()).train()
    after = recorded(model.cpu(), WHISPER.inputs)["model.encoder.layers.0.fc1"]
    assert float(before.max()) > 0.9
    assert float(after.max()) < 0.6


# ---- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_mixture_needs_no_experts_folders(experts, tmp_path):
    moved = {name: shutil.copytree(folder, tmp_path / "moved" / name) for name, folder in experts.items()}
    model = mixture({name: str(folder) for name, folder in moved.items()}, router="token")
    expected = output(model, WHISPER.inputs)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "moved")
    loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "saved")
    assert torch.equal(output(loaded, WHISPER.inputs), expected)
    assert "moved" not in (tmp_path / "saved" / "adapter_config.json").read_text()  # no paths of this machine
    with loaded.base_model.mask_experts(["fi"]):
        output(loaded, WHISPER.inputs)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_reference_reads_the_experts_again_and_refuses_a_changed_one(experts, tmp_path, low_cpu_mem_usage):
    moved = {name: str(shutil.copytree(folder, tmp_path / "moved" / name)) for name, folder in experts.items()}
    model = mixture(moved, save_experts="reference")
    expected = output(model, WHISPER.inputs)
    model.save_pretrained(tmp_path / "saved")
    assert not [key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors") if "experts" in key]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "saved", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded, WHISPER.inputs), expected)
    path = Path(moved["eu"]) / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
    base = WHISPER.base()
    with pytest.raises(ValueError, match=r"'eu'.*has changed since"):
        PeftModel.from_pretrained(base, tmp_path / "saved")
    assert_unchanged(base)


def test_a_file_of_another_mixture_is_refused_and_the_model_is_as_before(experts, tmp_path):
    mixture(experts, router="token").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for fields in ({"router": "static"}, {"expert_names": ["cy", "eu"]}, {"new_expert": False}, {"r": 3}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
        base = WHISPER.base()
        with pytest.raises(ValueError, match="does not fit adapter 'default'"):
            PeftModel.from_pretrained(base, tmp_path)
        assert_unchanged(base)


def test_a_file_that_does_not_fit_leaves_a_trained_adapter_alone(experts):
    model = mixture(experts, router="token")
    before = output(model, WHISPER.inputs)
    with pytest.raises(ValueError, match="does not fit"):
        set_peft_model_state_dict(model, {"base_model.model.model.encoder.layers.0.fc1.loramoe_A": torch.zeros(9, 9)})
    assert torch.equal(output(model, WHISPER.inputs), before)


def test_a_fresh_process_needs_one_import_line(experts, tmp_path):
    mixture(experts).save_pretrained(tmp_path)
    code = """
from tuner_behaviours import CASES, output
from peft import PeftModel
{line}
print(float(output(PeftModel.from_pretrained(CASES["whisper"].base(), "."), CASES["whisper"].inputs).sum()))
"""
    without, with_it = run_python(code.format(line=""), tmp_path), run_python(code.format(line="import whisper_moe.moe"), tmp_path)
    assert "LORAMOE" in without.stderr
    expected = float(output(mixture(experts), WHISPER.inputs).sum())
    assert math.isclose(float(with_it.stdout), expected, rel_tol=1e-4), with_it.stderr
