"""Looking at the gates of a mixture in a table: against those that PEFT's path records, and as a map over time.

The truth is `record_gates` on a `PeftModel` with the same adapter and the same input; the map's averages are taken by plain loops.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, write_adapter
from peft import LoraConfig, PeftModel

from whisper_moe import LanguageTable, LoraMoeConfig, language_posterior
from whisper_moe.audio import Span
from whisper_moe.gate_map import STEP_S, gate_map
from whisper_moe.moe_gates import use_gates
from whisper_moe.moe_report import record_gates

NUM_ROWS = 3
POSITION_S = 0.02  # of Whisper's encoder
EXPERTS = {
    "cy": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "fc1"]),
    "fr": LoraConfig(r=3, target_modules=["q_proj", "fc1"]),
    "de": LoraConfig(r=1, target_modules=["fc1"]),
}
MIXTURES = {
    "utterance": {"router": "utterance", "r": 2},
    "sharp": {"router": "utterance", "r": 2, "top_k": 2, "temperature": 0.5},
    "wider": {"router": "utterance", "r": 2, "target_modules": ["q_proj", "v_proj", "fc1", "fc2"]},  # no expert adapts fc2
    "token": {"router": "token", "r": 2},
    "hard": {"router": "token", "r": 2, "top_k": 1, "temperature": 2.0},
    "static": {"router": "static", "r": 2, "top_k": 2},
    "prior": {"router": "language", "r": 2, "prior": [0.6, 0.3, 0.1]},
    "given": {"router": "language", "r": 2},
}


@pytest.fixture(scope="module")
def base(tiny_processor):
    """In double precision, so that what remains of a difference is arithmetic and not rounding."""
    return build_tiny_model(tiny_processor).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    experts = {name: str(write_adapter(root / name, base, name, peft_config=copy.deepcopy(config), seed=n)) for n, (name, config) in
               enumerate(EXPERTS.items())}  # fmt: skip
    in_decoder = {name: rf".*\.decoder\..*\.{target}" for name, target in (("written", "fc1"), ("heard", "fc1"))}
    decoder_only = {
        "written": {"router": "token", "r": 2, "target_modules": in_decoder["written"]},
        "heard": {"router": "utterance", "r": 2, "target_modules": in_decoder["heard"]},
    }
    adapters = {}
    for n, (name, options) in enumerate(MIXTURES.items()):
        adapters[name] = write_adapter(root / f"moe_{name}", base, "cy", peft_config=LoraMoeConfig(experts=experts, **options), seed=n + 9)
    only = LoraConfig(r=2, target_modules=r".*\.decoder\..*\.fc1")
    part = str(write_adapter(root / "part", base, "fr", peft_config=only, seed=5))
    for n, (name, options) in enumerate(decoder_only.items()):
        config = LoraMoeConfig(experts={"fr": part}, **options)
        adapters[name] = write_adapter(root / f"moe_{name}", base, "cy", peft_config=config, seed=n + 30)
    return adapters | {"cy": root / "cy"}


@pytest.fixture(scope="module")
def table(base, folders) -> LanguageTable:
    table = LanguageTable.attach(copy.deepcopy(base))
    table.load_many(folders)
    return table


@pytest.fixture(scope="module")
def inputs(tiny_processor) -> dict[str, torch.Tensor]:
    start = tiny_processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    generator = torch.Generator().manual_seed(3)
    features = 2 * torch.randn(NUM_ROWS, 80, 200, generator=generator, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[start, 5, 6, 7]]).expand(NUM_ROWS, -1)}


@pytest.fixture(scope="module")
def posteriors(base, inputs):
    """What the base hears: not on the table's model, whose rows are at stake."""
    return language_posterior(base, inputs["input_features"])


@pytest.fixture(scope="module")
def truth(base, folders, inputs, posteriors):
    """Mixture -> module -> the gates that PEFT's path records for the rows, (rows, experts) or (rows, positions, experts)."""

    models = {}

    def recorded(name, *rows):
        if name not in models:
            models[name] = PeftModel.from_pretrained(copy.deepcopy(base), folders[name], autocast_adapter_dtype=False).eval()
        model, chosen = models[name], list(rows) or list(range(NUM_ROWS))
        fixed = use_gates(model, [posteriors[row] for row in chosen]) if name == "given" else nullcontext()
        with torch.no_grad(), fixed, record_gates(model) as report:
            model(**{key: tensor[chosen] for key, tensor in inputs.items()})
        found = {module: report.array(module) for module in report.modules}
        return {module: np.broadcast_to(array, (len(chosen), *array.shape[1:])) for module, array in found.items()}

    return recorded


def record(table, rows, inputs, **options):
    found: dict[str, np.ndarray] = {}
    with torch.no_grad(), table.rows(rows, record=lambda module, gates: found.update({module: gates.numpy().copy()}), **options):
        table.model(**inputs)
    return found


pytestmark = pytest.mark.filterwarnings("ignore:Expert .* was (never|always) chosen")


# ---- recording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_table_records_the_gates_that_peft_does(table, inputs, truth, posteriors, name):
    gates = posteriors if name == "given" else None
    found, expected = record(table, [name] * NUM_ROWS, inputs, gates=gates), truth(name)
    assert set(found) == set(expected)
    for module, array in expected.items():
        np.testing.assert_allclose(found[module], array, atol=1e-6, err_msg=module)  # PEFT's record is in single precision


def test_rows_with_gates_of_their_own_are_recorded_each(table, inputs):
    found = record(table, ["utterance"] * NUM_ROWS, inputs, gates=["cy", None, "de"])
    free = record(table, ["utterance"] * NUM_ROWS, inputs)
    for array in found.values():
        assert array[0].tolist() == [1, 0, 0]
        assert array[2].tolist() == [0, 0, 1]
    assert found["model.encoder.layers.0.fc1"][1] == pytest.approx(free["model.encoder.layers.0.fc1"][1])


def test_recording_changes_nothing_of_what_the_model_says(table, inputs):
    with torch.no_grad(), table.rows(["token"] * NUM_ROWS):
        before = table.model(**inputs).logits
    with torch.no_grad(), table.rows(["token"] * NUM_ROWS, record=lambda *_: None):
        assert torch.equal(table.model(**inputs).logits, before)


@pytest.mark.parametrize("rows", [["utterance", "token"], ["utterance", None], ["cy", "cy"], [{"utterance": 0.5, "token": 0.5}]])
def test_recording_wants_one_mixture_in_every_row(table, rows):
    with pytest.raises(ValueError, match="same LoRA-MoE in every row"), table.rows(rows, record=print):
        pass


# ---- the map -----------------------------------------------------------------------------------------------------------

SPANS = [Span(0.5, 1.73), Span(2.5, 4.5), Span(5.0, 5.09)]


def windows_of(truth, name):
    """Mean over the weights, with what has no place in time left out: (rows, positions or 1, experts), by a plain loop."""
    arrays = []
    for row in range(NUM_ROWS):
        own = [array[0] for module, array in truth(name, row).items() if array.ndim == 2 or ".encoder." in module]
        total = sum(each if each.ndim == 2 else each[None] for each in own)
        arrays.append(total / len(own))
    return np.stack(arrays)


@pytest.mark.parametrize("name", ["token", "hard"])
def test_a_token_router_is_shown_in_steps_of_the_recording(table, inputs, truth, name):
    found, expected = gate_map(table, name, inputs["input_features"], SPANS), windows_of(truth, name)
    assert found.over_time
    assert found.experts == ("cy", "fr", "de")
    at = 0
    for span, gates in zip(SPANS, expected, strict=True):
        positions = round((span.end_s - span.start_s) / POSITION_S)  # the rest of the window is filled up
        for first in range(0, positions, round(STEP_S / POSITION_S)):
            own = gates[first : min(first + 5, positions)]
            assert found.weights[at] == pytest.approx(own.mean(axis=0), abs=1e-6)
            assert found.times_s[at, 0] == pytest.approx(span.start_s + first * POSITION_S)
            at += 1
        assert found.times_s[at - 1, 1] == pytest.approx(span.end_s)
    assert at == len(found.weights) == len(found.times_s)


@pytest.mark.parametrize("name", ["utterance", "sharp", "wider", "static", "prior", "given", "heard"])
def test_other_routers_are_constant_in_each_window(table, inputs, truth, name):
    found = gate_map(table, name, inputs["input_features"], SPANS)
    assert not found.over_time
    assert found.times_s.tolist() == [[span.start_s, span.end_s] for span in SPANS]
    np.testing.assert_allclose(found.weights, windows_of(truth, name)[:, 0], atol=1e-6)


def test_more_windows_than_are_encoded_at_a_time_give_each_its_own_gates(table, inputs):
    spans = [Span(2.0 * n, 2.0 * n + 1) for n in range(10)]
    features = inputs["input_features"][torch.arange(10) % NUM_ROWS]
    found = gate_map(table, "utterance", features, spans)
    assert found.times_s[:, 0].tolist() == [span.start_s for span in spans]
    np.testing.assert_allclose(found.weights[9], found.weights[0], atol=1e-9)  # the same sound
    assert np.abs(found.weights[9] - found.weights[1]).max() > 1e-3


def test_shares_are_weighted_by_length(table, inputs):
    found = gate_map(table, "utterance", inputs["input_features"], SPANS)
    lengths = [span.end_s - span.start_s for span in SPANS]
    for number, expert in enumerate(found.experts):
        mean = sum(length * gates[number] for length, gates in zip(lengths, found.weights, strict=True)) / sum(lengths)
        assert found.shares[expert] == pytest.approx(mean)


def test_what_has_no_map_is_said(table, inputs):
    features = inputs["input_features"]
    with pytest.raises(ValueError, match="'cy' is no LoRA-MoE"):
        gate_map(table, "cy", features, SPANS)
    with pytest.raises(ValueError, match="read only the text"):
        gate_map(table, "written", features, SPANS)
    with pytest.raises(ValueError, match=r"One window of features per span.* 3 and 2"):
        gate_map(table, "token", features, SPANS[:2])
    assert gate_map(table, "token", features, SPANS).over_time, "the table works as before"
