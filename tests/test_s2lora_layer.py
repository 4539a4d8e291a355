"""S2-LoRA against the formula written out: dense `W0 + c * B diag(s) A` in float64, made from the saved tensors alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_behaviours import CASES, close, loss_of, output

from peft_s2lora import Linear, S2LoraConfig

PREFIX = "base_model.model."


def dense_model(case, tensors: dict[str, torch.Tensor], scope: str, scaling: float) -> nn.Module:
    """The base model in float64 with every adapted weight replaced by the formula's. Pairs are found by the scope's own rule."""
    model = case.base().double()
    pairs = {key.removesuffix(".s2lora_A"): (A, tensors[key.removesuffix("A") + "B"]) for key, A in tensors.items() if key.endswith("_A")}
    for key, s in tensors.items():
        if not key.endswith(".s2lora_coefficients"):
            continue
        name = key.removesuffix(".s2lora_coefficients")
        module = model.get_submodule(name.removeprefix(PREFIX))
        stored = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T  # (d_out, d_in)
        d_out, d_in = stored.shape
        fitting = [
            (A, B)
            for owner, (A, B) in pairs.items()
            if scope == "global"
            or (A.shape[1] == d_in and B.shape[0] == d_out and (scope == "shape" or owner.split(".")[-1] == name.split(".")[-1]))
        ]
        assert len(fitting) == 1, name
        A, B = (factor.double() for factor in fitting[0])
        stored += scaling * B[:d_out] @ torch.diag(s.double()) @ A[:, :d_in]
    return model


@pytest.mark.parametrize("scope", ["shape", "module_type", "global"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_adapted_model_equals_the_dense_formula(case, scope):
    config = S2LoraConfig(r=5, s2lora_alpha=7, share_scope=scope, target_modules=case.targets, init_weights=False)
    model = get_peft_model(case.base(), config).double()
    dense = dense_model(case, get_peft_model_state_dict(model), scope, 7 / 5)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
    expected = output(dense, inputs)
    assert torch.allclose(output(model, inputs), expected, atol=1e-10, rtol=0)
    assert not close(expected, output(case.base(), case.inputs), atol=1e-3)
    assert torch.allclose(output(model.merge_and_unload(), inputs), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("base", [nn.Linear(6, 9), nn.Linear(6, 9, bias=False), Conv1D(9, 6)], ids=["linear", "no bias", "conv1d"])
def test_delta_weight_has_the_layout_of_the_base_weight(base):
    model = get_peft_model(nn.Sequential(base).double(), S2LoraConfig(r=3, s2lora_alpha=6, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    A, B, s = layer.s2lora_A["default"], layer.s2lora_B["default"], layer.s2lora_coefficients["default"]
    expected = 2 * sum(s[k] * torch.outer(B[:, k], A[k]) for k in range(3))
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    assert torch.allclose(delta if isinstance(base, nn.Linear) else delta.T, expected, atol=1e-6)


def test_at_the_start_only_the_coefficients_have_a_gradient():
    case = CASES["whisper"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4)).train()
    loss_of(model, case.inputs).backward()
    for name, parameter in model.named_parameters():
        if "s2lora_coefficients" in name:
            assert parameter.grad.abs().sum() > 0, name
        elif "s2lora_" in name:
            assert parameter.grad.abs().sum() == 0, name


def test_gradients_equal_those_of_the_formula():
    base = nn.Linear(6, 9).double()
    model = get_peft_model(nn.Sequential(base), S2LoraConfig(r=3, s2lora_alpha=6, target_modules=["0"], init_weights=False)).double()
    layer = model.base_model.model[0]
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    A, B, s = (
        parameter.detach().clone().requires_grad_()
        for parameter in (layer.s2lora_A["default"], layer.s2lora_B["default"], layer.s2lora_coefficients["default"])
    )
    ((x @ (base.weight + 2 * B @ torch.diag(s) @ A).T) + base.bias).square().sum().backward()
    assert torch.allclose(layer.s2lora_A["default"].grad, A.grad)
    assert torch.allclose(layer.s2lora_B["default"].grad, B.grad)
    assert torch.allclose(layer.s2lora_coefficients["default"].grad, s.grad)


def test_dropout_acts_in_training_only():
    case = CASES["mlp"]
    config = S2LoraConfig(r=4, target_modules=case.targets, s2lora_dropout=0.5, init_weights=False)
    model = get_peft_model(case.base(), config)
    assert torch.equal(output(model, case.inputs), output(model, case.inputs))
    model.train()
    assert not torch.equal(model(**case.inputs), model(**case.inputs))


def test_a_hook_on_the_base_layer_sees_the_bases_own_output():
    # The adapter is added in place only where nobody else holds the result.
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), S2LoraConfig(r=2, target_modules=["0"], init_weights=False))
    base, seen = model.base_model.model[0].base_layer, []
    base.register_forward_hook(lambda module, args, result: seen.append(result))
    x = torch.randn(2, 4)
    model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, base.weight, base.bias))


def test_a_backward_hook_on_the_base_layer_sees_the_models_own_shapes():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), S2LoraConfig(r=2, target_modules=["0"], init_weights=False))
    seen = []
    hook = model.base_model.model[0].base_layer.register_full_backward_hook(lambda module, given, received: seen.append((given, received)))
    x = torch.randn(2, 3, 4, requires_grad=True)
    model(x).square().sum().backward()
    assert [tuple(gradient.shape) for gradient in (seen[0][0][0], seen[0][1][0])] == [(2, 3, 4), (2, 3, 5)]
    gradient, x.grad = x.grad, None
    hook.remove()
    model(x).square().sum().backward()
    assert torch.allclose(gradient, x.grad)


def test_an_argument_that_the_base_layer_does_not_take_is_refused_as_by_the_base_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), S2LoraConfig(r=2, target_modules=["0"], init_weights=False))
    with pytest.raises(TypeError, match="unknown"):
        model.base_model.model[0](torch.zeros(2, 4), unknown=1)


class ScaledLinear(nn.Linear):
    """A linear layer of somebody's own that keeps its output for the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


def test_a_linear_layer_of_ones_own_trains():
    model = get_peft_model(nn.Sequential(ScaledLinear(4, 4)), S2LoraConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_an_embedding_that_scales_its_output_scales_the_adapter_too():
    class ScaledEmbedding(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(10, 4)
            self.register_buffer("embed_scale", torch.tensor(3.0))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = get_peft_model(nn.Sequential(ScaledEmbedding()), S2LoraConfig(r=2, target_modules=["0"], init_weights=False))
    ids = torch.tensor([[1, 2, 3]])
    expected = output(model, {"input": ids})
    assert close(output(model.merge_and_unload(), {"input": ids}), expected)


def test_the_layer_compiles_without_a_graph_break():
    torch._dynamo.reset()
    case = CASES["mlp"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, target_modules=case.targets, init_weights=False))
    expected = output(model, case.inputs)
    compiled = torch.compile(copy.deepcopy(model).get_base_model(), backend="eager", fullgraph=True)
    assert close(output(compiled, case.inputs), expected)


def test_adapter_names_must_fit_the_batch_and_exist():
    case = CASES["mlp"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, target_modules=case.targets))
    model.eval()
    with pytest.raises(ValueError, match=r"Length of `adapter_names`"):
        model(**case.inputs, adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**case.inputs, adapter_names=["default", "nobody", "default"])
    with pytest.raises(TypeError, match="expected a list of str"):
        model(**case.inputs, adapter_names="default")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**case.inputs, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**case.inputs, adapter_names=["default"] * 3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(num_beams):
    case = CASES["whisper"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, init_weights=False)).eval()
    model.add_adapter("second", S2LoraConfig(r=4, target_modules=["fc1", "v_proj"], init_weights=False))
    features = case.inputs["input_features"]
    arguments = {"max_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model.generate(features, **arguments)
    mixed = model.generate(features, adapter_names=["second", "default", "second"], **arguments)
    for row, name in enumerate(("second", "default", "second")):
        assert torch.equal(mixed[row], alone[name][row])


def test_a_representation_says_what_is_shared_and_who_owns_it():
    model = get_peft_model(CASES["mlp"].base(), S2LoraConfig(target_modules=["lin1", "lin2"]))
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert repr(layers[0]).startswith("s2lora.Linear(")
    assert "default: 20x20 (owner)" in repr(layers[0])
    assert "default: 20x20}" in repr(layers[1])
