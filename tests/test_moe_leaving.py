"""Looking into a mixture, and leaving it: the record of gates, its table and figures and warnings; export to LoRA; distillation."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tuner_behaviours import CASES, close, output

from whisper_moe import GateReport, LoraMoeConfig, LoraMoeLayer, distil, mask_experts, record_gates, to_lora, use_gates
from whisper_moe.moe_export import truncate

WHISPER = CASES["whisper"]
TARGETS = ["q_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    for index, name in enumerate(("cy", "eu")):
        base = WHISPER.base()  # sets the seed
        torch.manual_seed(1 + index)
        model = get_peft_model(base, LoraConfig(r=2 + index, target_modules=TARGETS, init_lora_weights=False))
        model.save_pretrained(folder / name, save_embedding_layers=False)
    return {name: str(folder / name) for name in ("cy", "eu")}


def mixture(experts: dict[str, str] | None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraMoeConfig(**{"r": 2, "loramoe_alpha": 3, "experts": experts, "target_modules": TARGETS, "init_weights": False, **options})
    return get_peft_model(WHISPER.base(), config).eval()


# ---- the record --------------------------------------------------------------------------------------------------------


def test_the_record_holds_every_weight_recording_and_position(experts):
    model = mixture(experts)
    with record_gates(model) as report:
        output(mixture(experts), WHISPER.inputs)  # another model: none of its business
        assert report.modules == []
        output(model, WHISPER.inputs)
    assert len(report.modules) == 14  # 2 encoder layers x 3, 2 decoder layers x 4
    assert {report.array(module).shape for module in report.modules} == {(3, 2)}
    model = mixture(experts, router="token")
    with record_gates(model) as per_position:
        output(model, WHISPER.inputs)
    shapes = {module: per_position.array(module).shape for module in per_position.modules}
    assert shapes["model.encoder.layers.0.fc1"] == (3, 10, 2)
    assert shapes["model.decoder.layers.1.fc2"] == (3, 4, 2)


def test_the_record_is_what_the_layers_used(experts):
    """Gates read from the record, given back to the model, give its own answer."""
    model = mixture(experts, top_k=1)
    one = {name: x[:1] for name, x in WHISPER.inputs.items()}
    expected = output(model, one)
    with record_gates(model) as report:
        output(model, one)
    with use_gates(model, report):
        assert close(output(model, one), expected)


def test_nothing_is_recorded_after_the_block(experts):
    model = mixture(experts)
    with record_gates(model) as report:
        output(model, WHISPER.inputs)
    before = {module: len(calls) for module, calls in report.calls.items()}
    output(model, WHISPER.inputs)
    assert {module: len(calls) for module, calls in report.calls.items()} == before


def test_a_token_router_that_generates_has_one_record_per_call(experts):
    model = mixture(experts, router="token")
    with record_gates(model) as report:
        model.generate(input_features=WHISPER.inputs["input_features"], max_new_tokens=3, min_new_tokens=3)
    module = "model.decoder.layers.0.fc1"
    assert len(report.calls[module]) > 1
    assert report.flat(module).shape[1] == 2
    assert sum(array.shape[1] for array in report.calls[module]) == report.flat(module).shape[0] / 3


def report_of(gates: np.ndarray, module: str = "model.encoder.layers.0.fc1", names: tuple[str, ...] = ("cy", "eu")) -> GateReport:
    report = GateReport("default", list(names))
    report.add(module, torch.from_numpy(gates))
    return report


def test_means_and_spread_are_those_of_the_arrays():
    gates = np.array([[0.9, 0.1], [0.5, 0.5]])
    report = report_of(gates)
    assert np.allclose(report.mean_gates()["model.encoder.layers.0.fc1"], gates.mean(axis=0))
    assert math.isclose(report.spread()["model.encoder.layers.0.fc1"], gates[:, 0].std(), rel_tol=1e-6)
    assert np.allclose(report.use(), [0.7, 0.3])
    assert json.loads(report.to_json())["experts"] == ["cy", "eu"]


def test_the_table_has_a_row_per_weight_and_a_column_per_expert():
    lines = str(report_of(np.array([[0.9, 0.1], [0.5, 0.5]]))).splitlines()
    assert lines[0] == "default: mean gates over up to 2 observations per weight"
    assert lines[1].split() == ["cy", "eu", "spread"]
    assert lines[2].split() == ["model.encoder.layers.0.fc1", "0.700", "0.300", "0.200"]


def test_the_figures_are_drawn(experts, tmp_path):
    pytest.importorskip("matplotlib")
    model = mixture(experts, router="token")
    with record_gates(model) as report:
        output(model, WHISPER.inputs)
    figure = report.figure()
    assert figure.axes[0].images[0].get_array().shape == (14, 2)
    figure.savefig(tmp_path / "gates.png")
    over_time = report.figure_over_time("model.encoder.layers.0.fc1", row=1)
    assert np.allclose(over_time.axes[0].lines[1].get_ydata(), report.array("model.encoder.layers.0.fc1")[1, :, 1])
    with pytest.raises(ValueError, match="no time axis"):
        report_of(np.array([[0.9, 0.1]])).figure_over_time("model.encoder.layers.0.fc1")


def test_experts_never_or_always_chosen_get_a_warning(experts):
    model = mixture(experts, router="static", prior=[1000, 1])
    with pytest.warns(UserWarning, match="chosen") as caught, record_gates(model):
        output(model, WHISPER.inputs)
    messages = [str(warning.message) for warning in caught]
    assert any("'eu' of 'default' was never chosen" in message for message in messages)
    assert any("'cy' of 'default' was always chosen" in message for message in messages)
    even = mixture(experts, router="static")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record_gates(even):
            output(even, WHISPER.inputs)


def test_constant_gates_are_told_from_gates_that_look_at_the_input(experts):
    reports = {}
    for router in ("static", "utterance"):
        model = mixture(experts, router=router)
        with record_gates(model) as reports[router], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output(model, WHISPER.inputs)
    assert reports["static"].is_constant
    assert not reports["utterance"].is_constant
    fresh = mixture(experts, init_weights=True)  # a router that has learned nothing yet
    with record_gates(fresh) as report:
        output(fresh, WHISPER.inputs)
    assert report.is_constant


def test_an_empty_record_is_refused(experts):
    model = mixture(experts)
    with pytest.raises(ValueError, match="not run inside record_gates"), record_gates(model):
        pass
    with pytest.raises(ValueError, match="has no experts"), record_gates(mixture(None)):
        pass


# ---- to LoRA -----------------------------------------------------------------------------------------------------------


def loaded(folder: Path) -> torch.Tensor:
    return output(PeftModel.from_pretrained(WHISPER.base(), folder), WHISPER.inputs)


@pytest.mark.parametrize("options", [{"router": "static", "prior": [2, 1]}, {"router": "language", "prior": [2, 1]}, {"experts": None}])
def test_a_fixed_mixture_is_exported_exactly(experts, tmp_path, options):
    model = mixture(**{"experts": experts, **options})
    exported = to_lora(model, tmp_path)
    assert close(loaded(tmp_path), output(model, WHISPER.inputs))
    assert exported.relative_error == 0
    expected_rank = 2 if options == {"experts": None} else 2 + 3 + 3  # the new expert and two padded to the larger rank
    assert exported.config.r == expected_rank
    assert exported.config.lora_alpha == exported.config.r


@pytest.mark.parametrize("gates", [{"eu": 0.7}, torch.tensor([0.25, 0.75]), "report"])
def test_a_routed_mixture_is_exported_under_given_gates(experts, tmp_path, gates):
    model = mixture(experts)
    if gates == "report":
        with record_gates(model) as gates:
            output(model, WHISPER.inputs)
    to_lora(model, tmp_path, gates=gates)
    with use_gates(model, gates):
        assert close(loaded(tmp_path), output(model, WHISPER.inputs))


def test_masked_experts_are_left_out_of_the_export(experts, tmp_path):
    model = mixture(experts, router="static")
    with mask_experts(model, ["eu"]):
        exported = to_lora(model, tmp_path)
        assert close(loaded(tmp_path), output(model, WHISPER.inputs))
    assert exported.config.r == 2 + 3


def test_input_dependent_gates_are_refused_with_the_ways_out(experts):
    with pytest.raises(ValueError, match=r"router='utterance'.*use_gates.*distil.*static"):
        to_lora(mixture(experts))
    with pytest.raises(ValueError, match="same for all rows"):
        to_lora(mixture(experts), gates=["cy", "eu"])


def test_a_smaller_rank_is_the_best_one_and_its_error_is_reported(experts, tmp_path):
    model = mixture(experts, router="static")
    exported = to_lora(model, tmp_path, rank=3)
    assert exported.config.r == 3
    total_lost, total = 0.0, 0.0
    for layer in (module for module in model.modules() if isinstance(module, LoraMoeLayer)):
        delta = layer.get_delta_weight("default").double()
        singular = torch.linalg.svdvals(delta)
        lost, norm = float(singular[3:].norm()), float(singular.norm())  # no pair of rank 3 comes nearer (Eckart, Young)
        module = layer.module_names["default"]
        assert math.isclose(exported.relative_errors[module], lost / norm, rel_tol=1e-4)
        A = exported.tensors[f"base_model.model.{module}.lora_A.weight"].double()
        B = exported.tensors[f"base_model.model.{module}.lora_B.weight"].double()
        assert math.isclose(float((B @ A - delta).norm()), lost, rel_tol=1e-4)
        total_lost, total = total_lost + lost**2, total + norm**2
    assert math.isclose(exported.relative_error, math.sqrt(total_lost / total), rel_tol=1e-4)
    assert to_lora(model, rank=99).relative_error == 0


def test_a_rank_that_is_none_is_refused(experts):
    with pytest.raises(ValueError, match="rank must be a whole number from 1 up, got 0"):
        to_lora(mixture(experts, router="static"), rank=0)


def test_truncation_keeps_everything_when_the_rank_is_enough():
    A, B = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    small_A, small_B, lost, norm = truncate(A, B, 3)
    assert torch.allclose(small_B @ small_A, B @ A)
    assert lost < 1e-10
    assert math.isclose(norm, float((B @ A).norm()), rel_tol=1e-9)


# ---- distillation ------------------------------------------------------------------------------------------------------


BATCHES = [
    {
        "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(seed)),
        "decoder_input_ids": torch.randint(4, 30, (2, 4), generator=torch.Generator().manual_seed(seed)),
    }
    for seed in range(3)
]


def test_distilling_averages_the_gates_over_the_data(experts, tmp_path):
    model = mixture(experts)
    with record_gates(model) as report, torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    exported = distil(model, iter(BATCHES), folder=tmp_path)
    with use_gates(model, report):
        assert close(loaded(tmp_path), output(model, WHISPER.inputs))
    assert exported.report.mean_gates().keys() == report.mean_gates().keys()
    assert exported.losses == []


def test_a_mixture_that_ignores_its_input_is_distilled_exactly(experts, tmp_path):
    model = mixture(experts, router="static")
    distil(model, BATCHES[:1], folder=tmp_path)
    assert close(loaded(tmp_path), output(model, WHISPER.inputs))


def test_training_brings_the_lora_nearer_to_the_mixture_and_leaves_the_mixture_alone(experts, tmp_path):
    model = mixture(experts).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    short = distil(model, BATCHES, rank=3)
    exported = distil(model, BATCHES, rank=3, steps=30, lr=3e-3, folder=tmp_path)
    assert len(exported.losses) == 31
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def distance(folder: Path) -> float:
        student = PeftModel.from_pretrained(WHISPER.base(), folder)
        return sum(float((output(student, batch) - output(model, batch)).square().mean()) for batch in BATCHES)

    short.save(tmp_path / "short")
    assert distance(tmp_path) < 0.7 * distance(tmp_path / "short")


def test_distilling_needs_data(experts):
    with pytest.raises(ValueError, match="at least one batch"):
        distil(mixture(experts), [])
