"""Greedy decoding of our own beside transformers' `generate`: the same tokens, whatever ends a text and whoever writes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, write_adapter
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from peft_s2lora import S2LoraConfig
from whisper_moe import LanguageTable, LoraMoeConfig  # noqa: F401 - the second registers mixtures
from whisper_moe import fast_products as products
from whisper_moe.fast_decoding import GreedyDecoder
from whisper_moe.fast_products import fast_products

LANGUAGES = ["cy", "br", "en", "de", "cy"]
LIMIT = 20


@pytest.fixture(scope="module")
def base(tiny_processor):
    return build_tiny_model(tiny_processor).requires_grad_(False)


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def states(base) -> torch.Tensor:  # (5, positions, d_model)
    features = torch.randn(5, 80, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return base.get_encoder()(features).last_hidden_state


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: write_adapter(root / name, base, name, seed=seed) for seed, name in enumerate(("cy", "br"), 1)}
    config = S2LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_weights=False)
    return folders | {"de": write_adapter(root / "de", base, "de", peft_config=config, seed=5)}


def generated(model: Any, states: torch.Tensor, languages: list[str] = LANGUAGES, limit: int = LIMIT) -> torch.Tensor:
    """What transformers writes."""
    mask = torch.ones(len(states), 2 * states.shape[1], dtype=torch.long)
    encoded = BaseModelOutput(last_hidden_state=states)
    options = {"num_beams": 1, "max_length": limit, "return_timestamps": False, "language": languages, "task": "transcribe"}
    tokens: torch.Tensor = model.generate(encoder_outputs=encoded, attention_mask=mask, **options)
    return tokens


def without_end(tokens: torch.Tensor, model: Any) -> list[list[int]]:
    """Rows up to their end: what is compared where two ways fill up differently."""
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in tokens.tolist()]


@pytest.mark.parametrize("graphs", [False, True], ids=["as it comes", "in its place"])
class TestTheTokensAreThoseOfGenerate:
    def test_up_to_the_limit_and_up_to_the_models_own(self, model, states, graphs):
        decoder = GreedyDecoder(model, graphs=graphs)
        assert decoder.refusal() is None
        for limit in (1, LIMIT, 500):
            expected = generated(model, states, limit=limit)
            assert torch.equal(decoder(states, LANGUAGES, limit), expected)
        assert expected.shape[1] == model.config.max_target_positions - 4

    def test_where_rows_end_at_different_times(self, model, states, graphs):
        text = generated(model, states)
        ends = [row[4 + number] for number, row in enumerate(text.tolist())]  # a token of each row's text ends it
        lengths = set()
        for end in ends:
            model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
            expected = generated(model, states)
            lengths |= {len(row) for row in without_end(expected, model)}
            assert torch.equal(GreedyDecoder(model, graphs=graphs)(states, LANGUAGES, LIMIT), expected)
        assert len(lengths) > 3

    def test_where_some_tokens_may_not_come_first(self, model, states, graphs):
        text = generated(model, states)
        model.generation_config.begin_suppress_tokens = text[:, 0].unique().tolist()
        expected = generated(model, states)
        assert not (expected[:, 0] == text[:, 0]).any()
        assert torch.equal(GreedyDecoder(model, graphs=graphs)(states, LANGUAGES, LIMIT), expected)

    def test_with_several_ends_and_with_tokens_that_may_not_come(self, model, states, graphs):
        text = generated(model, states)
        config = model.generation_config
        config.suppress_tokens, config.begin_suppress_tokens = text[:, 1].unique().tolist(), text[:, 0].unique().tolist()
        expected = generated(model, states)
        assert not torch.equal(expected[:, :2], text[:, :2])
        assert torch.equal(GreedyDecoder(model, graphs=graphs)(states, LANGUAGES, LIMIT), expected)
        config.eos_token_id = [config.eos_token_id, int(expected[0, 6])]
        written = GreedyDecoder(model, graphs=graphs)(states, LANGUAGES, LIMIT)
        for row, whole in zip(written.tolist(), expected.tolist(), strict=True):  # cut at the first of all ends, which `generate` keeps
            ends = [place for place, token in enumerate(whole) if token in config.eos_token_id]
            text = whole[: ends[0]] if ends else whole
            assert row[: len(text)] == text
            assert all(token == config.pad_token_id for token in row[len(text) :])
        config.eos_token_id = [config.eos_token_id[0]]
        assert torch.equal(GreedyDecoder(model, graphs=graphs)(states, LANGUAGES, LIMIT), expected)

    def test_with_an_adapter_of_its_own_in_every_row(self, model, states, adapters, graphs):
        table = LanguageTable.attach(model)
        for name, folder in adapters.items():
            table.add(name, folder)
        names = ["cy", "br", None, "de", "cy"]
        with table.rows(names):
            expected = generated(model, states)
        assert not torch.equal(expected, generated(model, states))
        decoder = GreedyDecoder(model, graphs=graphs)
        for _ in range(2):  # again, with what is there already
            if graphs:
                written = decoder(states, LANGUAGES, LIMIT, table=table, adapters=names)
            else:
                with table.rows(names):
                    written = decoder(states, LANGUAGES, LIMIT)
            assert torch.equal(written, expected)
            assert torch.equal(decoder(states, LANGUAGES, LIMIT), generated(model, states)), "the adapters stay on"

    def test_one_batch_leaves_nothing_to_the_next(self, model, states, graphs):
        decoder = GreedyDecoder(model, graphs=graphs)
        decoder(states, LANGUAGES, 50)
        for rows in (slice(0, 1), slice(2, 5), slice(0, 2)):
            assert torch.equal(decoder(states[rows], LANGUAGES[rows], 9), generated(model, states[rows], LANGUAGES[rows], 9))


def test_an_adapter_that_peft_put_on_writes(model, states):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc2"], init_lora_weights=False)).eval()
    bare = adapted.get_base_model()
    expected = generated(bare, states)
    with adapted.disable_adapter():
        assert not torch.equal(expected, generated(bare, states))
    assert torch.equal(GreedyDecoder(bare)(states, LANGUAGES, LIMIT), expected)


def test_rows_whose_adapters_came_later_are_made_room_for(model, states, adapters):
    table = LanguageTable.attach(model)
    table.add("cy", adapters["cy"])
    decoder = GreedyDecoder(model, graphs=True)
    decoder(states[:2], LANGUAGES[:2], LIMIT, table=table, adapters=["cy", None])
    table.add("de", adapters["de"])  # another kind: in a stack that the rows above do not know
    with table.rows(["de", "cy"]):
        expected = generated(model, states[:2], LANGUAGES[:2])
    assert torch.equal(decoder(states[:2], LANGUAGES[:2], LIMIT, table=table, adapters=["de", "cy"]), expected)
    with pytest.raises(ValueError, match="xx"):
        decoder(states[:2], LANGUAGES[:2], LIMIT, table=table, adapters=["xx", "cy"])


def test_the_places_of_adapters_are_used_again(model, states, adapters, monkeypatch):
    table, decoder = LanguageTable.attach(model), GreedyDecoder(model, graphs=True)
    made: list[int] = []
    static_rows = table.static_rows
    monkeypatch.setattr(table, "static_rows", lambda size: made.append(size) or static_rows(size))
    for name in ("cy", "br"):
        table.add(name, adapters[name])
    for names in (["cy", None], ["br", "cy"], ["cy", None]):
        decoder(states[:2], LANGUAGES[:2], 3, table=table, adapters=names)
    decoder(states[:3], LANGUAGES[:3], 3, table=table, adapters=["cy", "br", None])
    assert made == [2, 4]


def test_memory_is_kept_for_a_few_sizes_only(model, states):
    decoder = GreedyDecoder(model, graphs=True)
    for positions in range(10, 20):
        decoder(states[:1, :positions], ["cy"], 2)
    assert len(decoder._recorded) == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.generation_config, "repetition_penalty", 1.2), "repetition_penalty"),
        (lambda model: setattr(model.generation_config, "no_repeat_ngram_size", 3), "no_repeat_ngram_size"),
        (lambda model: setattr(model.generation_config, "lang_to_id", {}), "language tokens"),
        (lambda model: model.get_decoder().layers[0].register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: model.get_decoder().register_forward_pre_hook(lambda *_: None), "decoder has hooks"),
        (lambda model: model.get_decoder().layers[1].__setattr__("encoder_attn", nn.Identity()), "not Whisper's"),
    ],
)
def test_a_model_that_decodes_otherwise_is_left_to_generate(model, change, reason):
    change(model)
    assert reason in (GreedyDecoder(model).refusal() or "")


# ---- products ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor on which oneDNN is quicker, if it is there at all; and how many products it made."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_quicker", lambda: True)
    calls: list[int] = []
    fits = products._fits
    monkeypatch.setattr(products, "_fits", lambda *args: fits(*args) and not calls.append(1))
    return calls


def test_products_are_the_same_up_to_rounding(onednn):
    layer = nn.Linear(48, 33).requires_grad_(False)
    for bias in (layer.bias, None):
        for x in (torch.randn(16, 48), torch.randn(3, 7, 48), torch.randn(5, 40, 48).mT.contiguous().mT):
            with torch.no_grad(), fast_products():
                found = functional.linear(x, layer.weight, bias)
            expected = x.double() @ layer.weight.double().T + (0 if bias is None else bias.double())
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 6


def test_gradients_half_precision_and_few_rows_are_left_to_torch(onednn):
    layer, x = nn.Linear(48, 33), torch.randn(20, 48)
    with fast_products():
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x[:15])
            copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(33, -1))
    assert not onednn


def test_weights_that_have_products_of_their_own_keep_them(onednn):
    class Packed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is functional.linear:
                return torch.full((len(args[0]), 33), 7.0)
            return super().__torch_function__(func, types, args, kwargs or {})

    weight = torch.zeros(33, 48).as_subclass(Packed)
    with torch.no_grad(), fast_products():
        found = functional.linear(torch.randn(20, 48), weight)
    assert (found == 7).all()
    assert not onednn


def test_nothing_happens_on_a_gpu_and_where_torchs_own_way_is_the_quicker(monkeypatch):
    monkeypatch.setattr(products, "_onednn_is_quicker", lambda: True)
    assert isinstance(fast_products("cpu"), torch.overrides.TorchFunctionMode)
    assert not isinstance(fast_products("cuda"), torch.overrides.TorchFunctionMode)
    monkeypatch.setattr(products, "_onednn_is_quicker", lambda: False)
    assert not isinstance(fast_products("cpu"), torch.overrides.TorchFunctionMode)


def test_a_text_is_the_same_with_either_library(onednn, model, states):
    expected = generated(model, states)
    with fast_products():
        assert torch.equal(GreedyDecoder(model)(states, LANGUAGES, LIMIT), expected)
    assert onednn
