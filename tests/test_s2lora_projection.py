"""A x is computed once for layers that read the same input, never for another input, and nothing is kept alive by it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

from peft_s2lora import S2LoraConfig
from peft_s2lora.layer import FEW_ROWS

R, D = 5, 12


class CountDown(TorchDispatchMode):
    """Counts products with a matrix of R columns and D rows: down-projections."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and tuple(args[-1].shape) == (D, R):
            self.number += 1
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    """q and k read one input, v what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
        q, k = self.q(x), self.k(x)
        return q + 2 * k + 3 * self.v(between(x))


def attention(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Attention(), S2LoraConfig(r=R, target_modules=["q", "k", "v"], init_weights=False, **kwargs))


def dense(model: nn.Module, x: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """The same in float64, weight by weight."""
    parts = []
    inner = model.base_model.model
    for layer, given in ((inner.q, x), (inner.k, x), (inner.v, changed)):
        shared = layer.shared_factors["default"]
        delta = shared.B.double() @ torch.diag(layer.s2lora_coefficients["default"].double()) @ shared.A.double()
        parts.append(given.double() @ (layer.base_layer.weight.double() + delta).T + layer.base_layer.bias.double())
    return parts[0] + 2 * parts[1] + 3 * parts[2]


def x_of(rows: int = FEW_ROWS + 1) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grad", [False, True])
def test_layers_with_one_input_compute_it_once(grad):
    model = attention()
    with torch.set_grad_enabled(grad), CountDown() as down:
        model(x_of())
    assert down.number == 1


def whisper() -> nn.Module:
    config = WhisperConfig(
        vocab_size=30, d_model=D, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=20, decoder_ffn_dim=20, max_source_positions=FEW_ROWS + 8, max_target_positions=FEW_ROWS + 8, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, init_std=0.2, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(WhisperForConditionalGeneration(config), S2LoraConfig(r=R, init_weights=False))


def whisper_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_features": torch.randn(1, 8, 2 * (FEW_ROWS + 8), generator=generator),
        "decoder_input_ids": torch.randint(4, 30, (1, FEW_ROWS + 2), generator=generator),
    }


def test_all_cross_attentions_read_the_encoders_output_through_one_product():
    # Encoder: q k v, out: 2 a layer. Decoder: self q k v, out, cross q, out: 4 a layer; cross k v of all layers: 1.
    with torch.no_grad(), CountDown() as down:
        whisper()(**whisper_inputs())
    assert down.number == 2 * 2 + 4 * 3 + 1


def test_with_a_graph_each_block_has_its_own():
    with CountDown() as down:
        whisper()(**whisper_inputs())
    assert down.number == 2 * 2 + 5 * 3


def test_gradient_checkpointing_computes_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = whisper().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**whisper_inputs()).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "between",
    [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.view(-1, D)[:, torch.arange(D).flip(0)]],
    ids=["another tensor", "changed in place", "a permutation"],
)
def test_another_or_a_changed_input_is_projected_anew(between):
    model, x = attention(), x_of()
    with torch.no_grad():
        result = model(x.clone(), between=between)
        assert torch.allclose(result.double(), dense(model, x, between(x.clone())), atol=1e-4)


def test_the_next_pass_computes_anew_even_if_the_change_left_no_trace():
    model, x = attention(), x_of()
    inner = model.base_model.model
    with torch.no_grad():
        model(x)
        x.data.mul_(2)  # does not count as a change of x
        inner.q.shared_factors["default"].A.data.mul_(3)
        assert torch.allclose(model(x).double(), dense(model, x, x), atol=1e-4)


def test_a_changed_factor_is_noticed_between_two_layers():
    model, x = attention(), x_of()
    inner = model.base_model.model

    def between(given: torch.Tensor) -> torch.Tensor:
        inner.q.shared_factors["default"].A.mul_(-1)
        return given

    with torch.no_grad():
        before = dense(model, x, x)
        result = model(x, between=between)
        expected = before + 3 * (inner.v(x).double() - (before_v(model, x)))
    assert torch.allclose(result.double(), expected, atol=1e-4)


def before_v(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """v's output with the factor's sign turned back."""
    v = model.base_model.model.v
    shared = v.shared_factors["default"]
    delta = shared.B.double() @ torch.diag(v.s2lora_coefficients["default"].double()) @ -shared.A.double()
    return x.double() @ (v.base_layer.weight.double() + delta).T + v.base_layer.bias.double()


def test_autocast_and_full_precision_do_not_mix():
    model, x = attention(), x_of()
    inner = model.base_model.model
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            inner.q(x)
        full = inner.v(x)
        assert torch.equal(full, attention().base_model.model.v(x))


def test_an_embedding_and_few_rows_need_no_memo():
    model = attention()
    with torch.no_grad(), CountDown() as down:
        result = model(x_of(FEW_ROWS))
    assert down.number == 3
    assert torch.allclose(result.double(), dense(model, x_of(FEW_ROWS), x_of(FEW_ROWS)), atol=1e-4)


def test_dropout_draws_anew_for_every_layer():
    model = attention(s2lora_dropout=0.5).train()
    with CountDown() as down:
        model(x_of())
    assert down.number == 3
    model.eval()
    with CountDown() as down:
        model(x_of())
    assert down.number == 1


def test_nothing_outlives_its_input_or_its_graph():
    model = attention()
    x = x_of()
    with torch.no_grad():
        model(x)
    projection = model.base_model.model.q.shared_factors["default"].projection
    assert [bool(known._held) for known in projection._entries] == [True]
    del x
    assert [bool(known._held) for known in projection._entries] == [False]

    start = x_of().requires_grad_()
    x = start * 2
    result = model(x)
    kept = weakref.ref(x)
    del x, result
    gc.collect()
    assert kept() is None


def test_copies_start_with_nothing():
    model, x = attention(), x_of()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (D,), (2, 3, 4, D)])
def test_inputs_of_any_shape_keep_it(shape):
    model = get_peft_model(nn.Sequential(nn.Linear(D, 7)), S2LoraConfig(r=R, target_modules=["0"], init_weights=False))
    assert model(torch.zeros(shape)).shape == (*shape[:-1], 7)


def test_an_input_of_the_wrong_width_is_refused_although_its_numbers_would_fill_other_rows():
    model = get_peft_model(nn.Sequential(nn.Linear(D, 7)), S2LoraConfig(r=R, target_modules=["0"], init_weights=False))
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.zeros(3, 2 * D))
