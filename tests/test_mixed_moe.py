"""Mixtures with routers (LoRA-MoE) as rows of a mixed batch, beside every other kind of row.

The truth for a row is that row alone through PEFT's `LoraMoeModel` with that one adapter; for the formula itself, a plain loop over
experts.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import base_hash, build_tiny_model, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_mixed_batch import stamped_model
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from peft_s2lora import S2LoraConfig
from whisper_moe import LanguagePosterior, LanguageTable, LoraMoeConfig, generate_mixed, language_posterior
from whisper_moe.moe_gates import mask_experts, use_gates
from whisper_moe.routed_linear import BeginDecoder, RoutedLinear

TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]
EXPERTS = {
    "cy": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS),
    "fr": LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "de": LoraConfig(r=1, target_modules=["q_proj", "fc1"]),
}
MIXTURES = {
    "utterance": {"router": "utterance", "experts": ["cy", "fr", "de"], "r": 2, "loramoe_alpha": 3},
    "sharp": {"router": "utterance", "experts": ["fr", "cy", "de"], "r": 2, "top_k": 2, "temperature": 0.5, "prior": [0.5, 0.3, 0.2]},
    "two": {"router": "utterance", "experts": ["cy", "fr"], "r": 4, "new_expert": False},
    "token": {"router": "token", "experts": ["cy", "fr", "de"], "r": 2},
    "hard": {"router": "token", "experts": ["fr", "de", "cy"], "r": 2, "top_k": 1, "temperature": 2.0},
    "static": {"router": "static", "experts": ["cy", "fr", "de"], "r": 2, "top_k": 2},
    "prior": {"router": "language", "experts": ["cy", "fr", "de"], "r": 2, "prior": [0.6, 0.3, 0.1], "top_k": 2},
    "refers": {"router": "utterance", "experts": ["cy", "de"], "r": 2, "save_experts": "reference"},
    "alone": {"r": 3, "target_modules": ["q_proj", "fc1"]},
}
GIVEN = "language"  # a mixture that takes its gates from the caller
OTHERS = {"lora": LoraConfig(r=3, target_modules=["q_proj", "k_proj", "fc1"]), "s2": S2LoraConfig(r=6, s2lora_alpha=3)}
POSTERIOR = LanguagePosterior({"en": 0.5, "de": 0.2, "cy": 0.3}, None)
NUM_ROWS = 6


@pytest.fixture(scope="module")
def base(tiny_processor):
    """In double precision, so that what remains of a difference is arithmetic and not rounding."""
    return build_tiny_model(tiny_processor).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("adapters"), base)


def write_all(root: Path, base, wanted=(*MIXTURES, GIVEN), others=OTHERS) -> dict[str, Path]:
    made = {name: write_adapter(root / name, base, name, peft_config=copy.deepcopy(config), seed=n + 20) for n, (name, config) in enumerate(
        {**EXPERTS, **others}.items()
    )}  # fmt: skip
    for number, (name, options) in enumerate((MIXTURES | {GIVEN: {"router": "language", "experts": ["cy", "fr", "de"], "r": 2}}).items()):
        if name not in wanted:
            continue
        experts = {e: str(made[e]) for e in options["experts"]} if "experts" in options else None
        config = LoraMoeConfig(**options | ({"experts": experts} if experts else {}))
        made[name] = write_adapter(root / name, base, "cy", name=name, peft_config=config, seed=number)
    return made


@pytest.fixture(scope="module")
def inputs(tiny_processor) -> dict[str, torch.Tensor]:
    start = tiny_processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    generator = torch.Generator().manual_seed(3)
    features = 2 * torch.randn(NUM_ROWS, 80, 200, generator=generator, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[start, 5, 6, 7]]).expand(NUM_ROWS, -1)}


@pytest.fixture(scope="module")
def peft_models(base, folders):
    """adapter -> PEFT's model with it alone, made when it is asked for."""
    made = {None: base}

    def model_of(name):
        if name not in made:
            made[name] = PeftModel.from_pretrained(copy.deepcopy(base), folders[name], autocast_adapter_dtype=False).eval()
        return made[name]

    return model_of


@pytest.fixture(scope="module")
def alone(peft_models, inputs):
    """(adapter, row) -> logits of that row alone, as PEFT computes them."""
    found = {}

    def logits_of(name, row):
        if (name, row) not in found:
            own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            with torch.no_grad():
                if name == GIVEN:
                    with use_gates(peft_models(name), [POSTERIOR]):
                        found[name, row] = peft_models(name)(**own).logits[0]
                else:
                    found[name, row] = peft_models(name)(**own).logits[0]
        return found[name, row]

    return logits_of


@pytest.fixture(scope="module")
def table(base, folders):
    """Everything in one table."""
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in (*EXPERTS, *OTHERS, *MIXTURES, GIVEN)})
    return table


def gates_of(rows):
    return [POSTERIOR if row == GIVEN else None for row in rows]


def logits(table, rows, inputs, **options) -> torch.Tensor:
    options.setdefault("gates", gates_of(rows))
    with torch.no_grad(), table.rows(rows, **options):
        return table.model(**{name: tensor[: len(rows)] for name, tensor in inputs.items()}).logits


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


# ---- what a row computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MIXTURES, GIVEN])
def test_a_batch_of_one_mixture_is_each_row_alone_through_peft(table, inputs, alone, name):
    assert not close(alone(name, 0), alone(None, 0), atol=1e-2), "the adapter does something"
    mixed = logits(table, [name] * 3, inputs)
    for row in range(3):
        assert close(mixed[row], alone(name, row)), row


ANY = st.sampled_from([None, *EXPERTS, *OTHERS, *MIXTURES, GIVEN])


@settings(max_examples=8, deadline=None)
@given(rows=st.lists(ANY, min_size=1, max_size=NUM_ROWS))
def test_any_batch_is_its_rows_one_by_one_through_peft(table, inputs, alone, rows):
    mixed = logits(table, rows, inputs)
    for number, name in enumerate(rows):
        assert close(mixed[number], alone(name, number)), (number, name)


def test_the_gates_of_a_learned_router_do_depend_on_the_recording(table, inputs, folders):
    """Else the comparisons above would not see a router that is read wrongly: same gates, same outputs."""
    stack, slot = table._entries["utterance"].stack, table._entries["utterance"].slot
    assert all(float(weight[:, slot].abs().max()) > 0.1 for weight in stack.storage[stack.num_factors :])
    fixed = logits(table, ["utterance"] * 2, inputs, gates=[{"cy": 1 / 3, "fr": 1 / 3, "de": 1 / 3}] * 2)
    assert not close(fixed, logits(table, ["utterance"] * 2, inputs), atol=1e-3)


def test_a_layer_is_the_loop_over_its_experts(table, folders):
    """One encoder weight against the formula, written out, from the file's own numbers."""
    name, layer_name = "sharp", "model.encoder.layers.0.fc1"
    files = load_file(folders[name] / "adapter_model.safetensors")
    t = {key.rpartition("loramoe_")[2]: v.double() for key, v in files.items() if f".{layer_name}.loramoe" in key}
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = table.model.get_submodule(layer_name)
    with torch.no_grad():
        expected = layer.base_layer(x)
        for row in range(2):
            scores = (t["router_weight"] @ x[row].mean(0) + t["router_bias"]) / 0.5
            gates = scores.exp() / scores.exp().sum()
            gates[gates.argmin()] = 0  # the two largest of three
            gates /= gates.sum()
            for position in range(7):
                expected[row, position] += t["B"] @ t["A"] @ x[row, position]
                for expert in range(3):
                    expected[row, position] += gates[expert] * t["experts_B"][expert].T @ t["experts_A"][expert] @ x[row, position]
        with table.rows([name, name]):
            assert close(layer(x), expected)
        with table.rows([name, "lora", name]):  # several stacks at once
            assert close(layer(x[[0, 1, 1]])[[0, 2]], expected)


def test_mixtures_may_be_mixed_like_other_languages(table, inputs, peft_models, base):
    """Half of one mixture and a third of a LoRA: by the encoder's first layer, where no other layer is in between."""
    weights = {"utterance": 0.5, "two": 0.25, "lora": 0.3}
    name = "model.encoder.layers.0.self_attn.q_proj"
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base.get_submodule(name)(x)
        expected = plain + sum(
            weight * (peft_models(language).base_model.model.get_submodule(name)(x) - plain) for language, weight in weights.items()
        )
        for rows in ([weights, weights], [weights, None]):
            with table.rows(rows):
                assert close(table.model.get_submodule(name)(x)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_take_the_precision_of_the_model_and_their_routers_single_at_least(base, folders, inputs, alone, dtype):
    rows = ["utterance", None, "token", "static", "sharp"]
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in rows if name})
    table.model.to(dtype)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    mixed = logits(table, rows, cast)
    assert mixed.dtype == dtype
    routers = [t for stack in table._stacks for t in stack.storage[stack.num_factors :]]
    assert {t.dtype for t in routers} == {torch.float32}
    for number, name in enumerate(rows):
        error = (mixed[number].double() - alone(name, number)).abs().max() / alone(None, 0).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.2), name
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(table, rows, cast).isfinite().all()


def test_gradients_reach_the_input_through_gates_and_experts(table):
    for name, x in (("utterance", torch.randn(2, 3, 16)), ("token", torch.randn(2, 3, 16))):
        x = x.double().requires_grad_()
        with table.rows([name, "lora"]):
            assert torch.autograd.gradcheck(table.model.get_submodule("model.encoder.layers.0.fc1"), (x,))


# ---- generate: beams, cached steps, long recordings --------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_writes_every_row_as_peft_does_alone(table, inputs, peft_models, num_beams):
    rows = ["utterance", None, "token", "sharp", "lora", "static"]
    options = {"num_beams": num_beams, "max_length": 16, "task": "transcribe"}
    with torch.no_grad(), table.rows(rows):
        mixed = table.model.generate(inputs["input_features"], language="en", **options)
    written = set()
    for number, name in enumerate(rows):
        own = inputs["input_features"][number : number + 1]
        expected = peft_models(name).generate(input_features=own, language="en", **options)[0]
        assert mixed[number, : len(expected)].tolist() == expected.tolist(), name
        written.add(tuple(expected.tolist()))
    assert len(written) > 3, "the rows say different things"


def test_gates_follow_the_recording_and_not_the_one_before(table, inputs, alone):
    """Two decoder calls inside one block, on other encoder states: gates that were kept for the first do not serve the second."""
    decoder, ids = table.model.model.decoder, inputs["decoder_input_ids"][:1]
    with torch.no_grad(), table.rows(["utterance"]):
        states = [table.model.get_encoder()(inputs["input_features"][row : row + 1]).last_hidden_state for row in (0, 1)]
        for row in (0, 1, 1, 0):
            hidden = decoder(input_ids=ids, encoder_hidden_states=states[row]).last_hidden_state
            assert close(table.model.proj_out(hidden)[0], alone("utterance", row)), row
        changed = states[0].clone()
        first = decoder(input_ids=ids, encoder_hidden_states=changed).last_hidden_state
        changed.copy_(states[1])  # the same tensor, written to
        assert not close(decoder(input_ids=ids, encoder_hidden_states=changed).last_hidden_state, first, atol=1e-3)


def test_a_decoder_without_a_recording_is_refused(table):
    with torch.no_grad(), table.rows(["utterance"]), pytest.raises(ValueError, match="no recording to read"):
        table.model.model.decoder.layers[0].fc1(torch.zeros(1, 2, 16, dtype=torch.float64))


def test_generate_mixed_writes_long_recordings_of_mixtures_as_each_row_alone(inputs, tiny_processor, tmp_path):
    model = stamped_model(tiny_processor)
    names = ("sharp", "token", GIVEN)
    folders = write_all(tmp_path, model, names, {})
    table = LanguageTable.attach(model)
    table.load_many({name: folders[name] for name in names})
    features = torch.cat([inputs["input_features"], inputs["input_features"].flip(0)], dim=2)[:4]  # two windows
    mask = (torch.arange(400)[None] < torch.tensor([400, 120, 330, 400])[:, None]).long()
    rows, options = ["sharp", "token", GIVEN, None], {"max_new_tokens": 8, "prompt_languages": ["cy"] * 4, "num_beams": 2}
    written = generate_mixed(table, features, rows, attention_mask=mask, return_timestamps=True, **options)
    assert len({len(row.windows) for row in written}) > 1, "rows leave at different times"
    for number, name in enumerate(rows):
        own = {"attention_mask": mask[number : number + 1], "return_timestamps": True, **options, "prompt_languages": ["cy"]}
        (single,) = generate_mixed(table, features[number : number + 1], [name], **own)
        assert written[number].segments == single.segments, name


def test_a_language_router_hears_the_base_where_nobody_gives_its_gates(table, inputs):
    features = inputs["input_features"][:2]
    posteriors = language_posterior(table.model, features)
    options = {"prompt_languages": ["cy", "cy"], "max_new_tokens": 12}
    heard = generate_mixed(table, features, [GIVEN, "utterance"], **options)
    assert heard == generate_mixed(table, features, [GIVEN, "utterance"], gates=[posteriors[0], None], **options)
    assert heard != generate_mixed(table, features, [GIVEN, "utterance"], gates=[{"fr": 3.0}, None], **options)


def test_heard_gates_are_those_of_the_mixture_that_waits_for_them_alone(base, folders, inputs, tmp_path):
    """The truth has the heard gates as its prior, so that none are given."""
    features = inputs["input_features"][:1]
    heard = language_posterior(base, features)[0].probabilities
    share = [heard[name] / sum(heard[each] for each in EXPERTS) for name in EXPERTS]
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in (GIVEN, "two")})
    table.add("known", changed(folders[GIVEN], tmp_path / "known", {"prior": share}))
    options = {"prompt_languages": ["cy"], "logprob_threshold": -1e9, "max_new_tokens": 12}
    found, truth = (generate_mixed(table, features, [{name: 0.5, "two": 0.5}], **options)[0] for name in (GIVEN, "known"))
    assert found.tokens == truth.tokens
    assert found.windows[0].avg_logprob == pytest.approx(truth.windows[0].avg_logprob, abs=1e-5)
    given = generate_mixed(table, features, [{GIVEN: 0.5, "two": 0.5}], gates=[{"cy": 1.0}], **options)[0]  # of a caller: for both
    assert given.windows[0].avg_logprob != pytest.approx(truth.windows[0].avg_logprob, abs=1e-5)


# ---- gates and masks of rows -------------------------------------------------------------------------------------------

GATES = [{"cy": 0.7, "de": 0.6}, "fr", POSTERIOR, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), {}]


@pytest.mark.parametrize("name", ["utterance", "token", "static", "prior"])
def test_given_gates_are_pefts_use_gates(table, inputs, peft_models, name):
    mixed = logits(table, [name] * 6, inputs, gates=[*GATES, None])
    for row, gates in enumerate(GATES):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        with torch.no_grad(), use_gates(peft_models(name), [gates]):
            assert close(mixed[row], peft_models(name)(**own).logits[0]), gates
    assert close(mixed[5], logits(table, [None] * 5 + [name], inputs)[5])


@pytest.mark.parametrize("masked", [["cy"], ["fr", "de"], ["cy", "fr", "de"]])
def test_masked_experts_are_pefts_mask_experts(table, inputs, peft_models, masked):
    rows = ["utterance", "token", "static", "prior", "sharp", "utterance"]
    mixed = logits(table, rows, inputs, masked=[masked] * 5 + [None])
    for row, name in enumerate(rows):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        with torch.no_grad(), mask_experts(peft_models(name), masked if row < 5 else []):
            assert close(mixed[row], peft_models(name)(**own).logits[0]), name


def test_rows_of_one_mixture_with_gates_of_their_own_are_not_taken_for_one(table, inputs):
    gates = [{"cy": 1.0}, {"fr": 1.0}]
    mixed = logits(table, ["utterance"] * 2, inputs, gates=gates)
    for row in range(2):
        assert close(mixed[row], logits(table, ["utterance"] * 2, inputs, gates=[gates[row]] * 2)[row])
    assert not close(mixed[0], logits(table, ["utterance"] * 2, inputs, gates=[gates[1]] * 2)[0], atol=1e-3)


REFUSED_ROWS = {
    "no gates for a language router": ([GIVEN], {}, r"Row 0: 'language' has router='language' and no prior.*gates=\[\.\.\.\]"),
    "gates for a LoRA": (["lora"], {"gates": ["cy"]}, "Row 0 has gates or masked experts, but 'lora' is no LoRA-MoE"),
    "gates for the base": ([None], {"gates": [{"cy": 1.0}]}, "Row 0 has gates or masked experts"),
    "an unknown expert": (["utterance"], {"gates": [{"xx": 1.0}]}, "Row 0, 'utterance': No expert 'xx'"),
    "an unknown mask": (["utterance"], {"masked": [["xx"]]}, "has no expert 'xx'. Its experts: cy, fr, de"),
    "a mask that is a name": (["utterance"], {"masked": ["cy"]}, r"Write \['cy'\]"),
    "gates that are not finite": (["utterance"], {"gates": [{"cy": float("nan")}]}, "must be finite"),
    "gates of another number": (["utterance"], {"gates": [torch.ones(2)]}, r"shape \(3,\)"),
    "gates for other rows": (["utterance"], {"gates": [None, None]}, "gates needs one entry per row, 1 of them"),
}


@pytest.mark.parametrize("case", REFUSED_ROWS)
def test_gates_that_do_not_fit_are_refused(table, case):
    rows, options, message = REFUSED_ROWS[case]
    with pytest.raises(ValueError, match=message), table.rows(rows, **options):
        pass


# ---- what does not grow, and what is not compiled anew -----------------------------------------------------------------


class CountOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router", ["utterance", "token"])
def test_the_number_of_operators_does_not_grow_with_the_mixtures(base, folders, inputs, router):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({f"m{i}": folders[router] for i in range(NUM_ROWS)})
    counts = {}
    for n in (2, 3, 6):
        with torch.no_grad(), table.rows([f"m{i % n}" for i in range(NUM_ROWS)]), CountOperators() as counter:
            table.model(**inputs)
        counts[n] = counter.count
    assert counts[2] == counts[3] == counts[6], counts


def test_token_steps_do_not_make_the_gates_of_a_recording_again(table, inputs):
    class Softmaxes(TorchDispatchMode):
        over_experts = pooled = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.over_experts += func is torch.ops.aten._softmax.default and args[0].shape[-1] == 4
            self.pooled += func is torch.ops.aten.mean.dim
            return func(*args, **(kwargs or {}))

    ids = inputs["decoder_input_ids"][:2, :1]
    with torch.no_grad(), table.rows(["utterance", "static"]):
        states = table.model.get_encoder()(inputs["input_features"][:2])
        counts = []
        for _ in range(3):
            with Softmaxes() as seen:
                table.model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False)
            counts.append((seen.over_experts, seen.pooled))
    assert counts == [(1, 1), (0, 0), (0, 0)], "for all weights at once, and once"


def test_static_rows_are_compiled_once_whatever_comes(base, folders):
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many({name: folders[name] for name in ("utterance", "sharp", "static", "token", "hard", "cy")})
    counter = CompileCounter()
    layer = table.model.model.encoder.layers[0].self_attn
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    rows = table.static_rows(3, per_row=2)
    batches = (["utterance", "cy", None], ["sharp", "token", "static"], [None] * 3, [{"sharp": 0.5, "cy": 0.5}, "hard", "static"])
    with torch.no_grad(), rows.use():
        for batch in batches:
            rows.set(batch)
            with table.rows(batch):
                expected = layer(x)[0]
            assert close(compiled(x)[0], expected), batch
    assert counter.frame_count == 1


def test_a_decoder_layer_is_not_compiled_anew_when_mixtures_change(table, inputs):
    counter = CompileCounter()
    torch._dynamo.reset()
    decoder = table.model.model.decoder
    layer, original = decoder.layers[0].fc1, decoder.layers[0].fc1.forward
    rows = table.static_rows(2)
    few = {name: tensor[:2] for name, tensor in inputs.items()}
    try:
        for batch in (["utterance", "lora"], ["sharp", "token"], [None, "static"], ["two", "utterance"]):
            rows.set(batch)
            with torch.no_grad(), rows.use():
                layer.forward = original
                expected = table.model(**few).logits
                layer.forward = torch.compile(original, backend=counter, fullgraph=True)
                assert close(table.model(**few).logits, expected), batch
    finally:
        layer.forward = original
    assert counter.frame_count == 1


def test_static_rows_stay_where_they_are_and_compute_what_peft_does(table, inputs, alone):
    rows = table.static_rows(4)
    addresses = [buffer.data_ptr() for buffers in rows._buffers for buffer in buffers]
    few = {name: tensor[:4] for name, tensor in inputs.items()}
    for batch in (["utterance", None, "token", "lora"], ["sharp", "static", GIVEN, "refers"], ["s2", "utterance", "hard", "two"]):
        rows.set(batch, gates=gates_of(batch))
        with torch.no_grad(), rows.use():
            mixed = table.model(**few).logits
        for number, name in enumerate(batch):
            assert close(mixed[number], alone(name, number)), name
    assert addresses == [buffer.data_ptr() for buffers in rows._buffers for buffer in buffers]


def test_static_rows_hear_a_recording_anew_when_their_languages_change(table, inputs):
    """The encoder's states are the very tensor that the languages before have heard."""
    rows = table.static_rows(2)
    states = (torch.randn(2, 100, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)
    call = {"encoder_outputs": states, "decoder_input_ids": inputs["decoder_input_ids"][:2], "use_cache": False}
    with torch.no_grad(), rows.use():
        for batch in (["utterance", "sharp"], ["sharp", "utterance"]):
            rows.set(batch)
            found = table.model(**call).logits
            with table.rows(batch):
                assert close(found, table.model(**call).logits)


# ---- the table ---------------------------------------------------------------------------------------------------------


def test_languages_beyond_the_bound_are_moved_on_demand(base, folders, inputs, alone):
    table = LanguageTable.attach(copy.deepcopy(base), max_on_device=2)
    table.load_many({name: folders[name] for name in ("utterance", "sharp", "token", "lora")})
    for batch in (["token", "lora"], ["utterance", "sharp"], ["lora", "utterance"]):
        mixed = logits(table, batch, inputs)
        for number, name in enumerate(batch):
            assert close(mixed[number], alone(name, number)), (batch, name)
    assert table.num_moved == 5
    table.drop("sharp")
    table.add("again", folders["sharp"])
    assert close(logits(table, ["again"], inputs)[0], alone("sharp", 0))


@pytest.mark.parametrize("max_on_device", [None, 2])
def test_a_saved_table_with_mixtures_comes_back_without_their_experts(table, base, inputs, alone, tmp_path, max_on_device):
    table.save(tmp_path / "table.safetensors")
    again = LanguageTable.load(tmp_path / "table.safetensors", copy.deepcopy(base), max_on_device=max_on_device)
    assert again.languages == table.languages
    assert again.experts("sharp") == ("fr", "cy", "de")
    for name in (*MIXTURES, GIVEN):
        assert close(logits(again, [None, name], inputs)[1], alone(name, 1)), name


def test_mixtures_of_about_one_size_share_a_stack(table):
    stacks = {name: table._entries[name].stack for name in MIXTURES}
    assert stacks["utterance"] is stacks["sharp"] is stacks["static"] is stacks["prior"]
    assert stacks["token"] is stacks["hard"] is not stacks["utterance"]
    assert table.adapts_encoder("utterance")
    assert table.experts("lora") == ()
    assert (table.wants_gates(GIVEN), table.wants_gates("prior")) == (True, False)


def test_equal_gates_are_cut_to_the_same_experts_as_in_peft(base, folders, inputs):
    """A router that was never trained, of seven experts in storage for eight: all gates are equal."""
    experts = {f"e{n}": str(folders[name]) for n, name in enumerate(["cy", "fr", "de", "fr", "cy", "de", "fr"])}
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraMoeConfig(r=1, experts=experts, top_k=3), autocast_adapter_dtype=False).eval()
    folder = folders["cy"].parent / "untrained"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    table = LanguageTable.attach(copy.deepcopy(base))
    table.add("untrained", folder)
    with torch.no_grad():
        assert close(logits(table, ["untrained"] * NUM_ROWS, inputs), model(**inputs).logits)


def test_detach_takes_the_hook_off_too(base, folders, inputs):
    model = copy.deepcopy(base)
    digest = base_hash(model, list(model.state_dict()))
    table = LanguageTable.attach(model)
    table.load_many({name: folders[name] for name in ("utterance", "token")})
    assert [type(hook) for hook in model.model.decoder._forward_pre_hooks.values()] == [BeginDecoder]
    logits(table, ["utterance", "token"], inputs)
    assert table.detach() is model
    assert not model.model.decoder._forward_pre_hooks
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())
    assert base_hash(model, list(model.state_dict())) == digest


def changed(folder: Path, to: Path, config=None, tensors=None) -> Path:
    shutil.copytree(folder, to)
    if config is not None:
        path = to / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        save_file(tensors(load_file(to / "adapter_model.safetensors")), to / "adapter_model.safetensors")
    return to


def first(part: str, change):
    def apply(state):
        key = next(key for key in state if part in key)
        found = change(state[key])
        return {name: tensor for name, tensor in (state | {key: found}).items() if tensor is not None}

    return apply


REFUSED = {
    "a router of another size": ("utterance", {}, first("router_weight", lambda t: t[:2].clone()), r"router_weight should be \(3, 16\)"),
    "a router that is missing": ("utterance", {}, first("router_weight", lambda t: None), "router_weight should be .* and is none"),
    "another router": ("utterance", {"router": "static"}, None, "router_weight should be none"),
    "experts of another shape": ("token", {}, first("experts_A", lambda t: t[..., :-1].clone()), "made for another base"),
    "half a new expert": ("utterance", {}, first("loramoe_B", lambda t: None), "loramoe_B should be .* and is none"),
    "other expert names": ("utterance", {"expert_names": ["cy", "fr"]}, None, "of different adapters"),
    "a top_k that is too large": ("utterance", {"top_k": 9}, None, "top_k must be at most the number of experts"),
    "an unknown router": ("utterance", {"router": "psychic"}, None, "router must be one of"),
    "numbers that are not finite": ("utterance", {}, first("experts_B", lambda t: t / 0), "not finite"),
    "unknown modules": (
        "utterance", {}, lambda s: {key.replace("fc1", "fc9"): t for key, t in s.items()}, "modules that the table does not have.*fc9",
    ),
    "foreign tensors": ("utterance", {}, lambda s: s | {"base_model.model.model.encoder.layers.0.fc1.x": torch.ones(2)}, "is not part of"),
    "trained biases": ("utterance", {"bias": "all"}, None, "bias='all'"),
    "experts that have changed": ("refers", {"expert_hashes": {"cy": "0" * 64}}, None, "has changed since"),
    "experts that are gone": ("refers", {"experts": {"cy": "nowhere", "de": "nowhere"}}, None, "neither a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mixture_that_does_not_fit_is_refused_and_the_table_is_as_before(table, folders, tmp_path, case):
    source, config, tensors, message = REFUSED[case]
    names, stacks, size = table.languages, list(table._stacks), table.nbytes()
    with pytest.raises(ValueError, match=message):
        table.add("new", changed(folders[source], tmp_path / "broken", config, tensors))
    assert (table.languages, table._stacks, table.nbytes()) == (names, stacks, size)


# ---- nothing: no rows, no positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["utterance", "token", "lora", "s2"])
def test_no_positions_are_no_positions_and_no_rows_are_refused(table, name):
    for place in ("encoder", "decoder"):
        layer = table.model.get_submodule(f"model.{place}.layers.0.self_attn.q_proj")
        with torch.no_grad(), table.rows([name, None]):
            assert layer(torch.zeros(2, 0, 16, dtype=torch.float64)).shape == (2, 0, 16)
            with pytest.raises(ValueError, match="given for 2 rows, but the model was called with 0"):
                layer(torch.zeros(0, 3, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["utterance", "hard", "static", "lora", "s2"])
@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16)])
def test_pefts_layers_give_nothing_for_nothing(peft_models, name, shape):
    layer = peft_models(name).base_model.model.get_submodule("model.encoder.layers.0.self_attn.q_proj")
    x = torch.zeros(shape, dtype=torch.float64)
    names = [None] if name == "lora" else [None, ["default", "__base__"][: shape[0]]]  # PEFT's own LoRA refuses an empty mixed batch
    for adapter_names in names:
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                assert layer(x, **({} if adapter_names is None else {"adapter_names": adapter_names})).shape == shape


# ---- encoder states that are there already -----------------------------------------------------------------------------


def test_given_encoder_states_are_written_down_as_the_features_are(table, inputs):
    rows, prompts = ["utterance", None, "lora", "token"], ["cy", "en", "fr", "de"]
    options = {"prompt_languages": prompts, "max_new_tokens": 10, "num_beams": 2}
    features = inputs["input_features"][:4]
    with torch.no_grad(), table.rows(rows):
        states = table.model.get_encoder()(features)
    expected = generate_mixed(table, features, rows, **options)
    for form in (states, states.last_hidden_state, (states.last_hidden_state,)):
        assert generate_mixed(table, None, rows, encoder_outputs=form, **options) == expected
    assert generate_mixed(table, features, rows, encoder_outputs=states, **options) == expected
    other = generate_mixed(table, None, rows, encoder_outputs=states.last_hidden_state.roll(1, 0), **options)
    assert other != expected, "the states are what is written down"


def test_the_encoder_is_not_run_for_given_states(table, inputs, monkeypatch):
    states = torch.randn(1, 100, 16, dtype=torch.float64)
    monkeypatch.setattr(table.model.model.encoder, "forward", lambda *_, **__: pytest.fail("the encoder ran"))
    (row,) = generate_mixed(table, None, [None], encoder_outputs=states, max_new_tokens=4)
    assert row.prompt_language is not None, "the base hears the language in the states"


def test_encoder_states_that_do_not_fit_are_refused(table, inputs):
    states = torch.zeros(2, 100, 16, dtype=torch.float64)
    for features, found, message in (
        (None, None, "give input_features, or encoder_outputs"),
        (None, states[:, :50], r"encoder_outputs of shape \(2, 50, 16\) came; .* \(2, 100, 16\)"),
        (torch.zeros(2, 80, 400), states, "of a single window"),
        (None, states[:1], r"shape \(1, 100, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_mixed(table, features, ["cy", "fr"], encoder_outputs=found)
    with pytest.raises(ValueError, match=r"were made with that adapter\. Give input_features"):
        generate_mixed(table, None, [GIVEN] * 2, encoder_outputs=states, prompt_languages=["cy"] * 2)
