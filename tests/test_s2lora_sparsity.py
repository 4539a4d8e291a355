"""Sparsity that is real: exact zeros with the proximal step and none without, no loophole, pruning that changes no output."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from tuner_behaviours import CASES, Mlp, Utterances, close, loss_of, output

import peft_s2lora
from peft_s2lora import S2LoraCallback, S2LoraConfig, S2LoraLayer, proximal_step, prune, rank_report, s2lora_param_groups

WHISPER = CASES["whisper"]


def adapted(**kwargs) -> PeftModel:
    return get_peft_model(WHISPER.base(), S2LoraConfig(**{"r": 4, "init_weights": False, **kwargs}))


def coefficients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "s2lora_coefficients" in name])


def regression() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A task that needs a change of rank one in one of three layers: most coefficients have nothing to do."""
    torch.manual_seed(0)
    teacher = Mlp()
    student = Mlp()
    student.load_state_dict(teacher.state_dict())
    x = torch.randn(64, 10)
    with torch.no_grad():
        teacher.lin1.weight += 0.5 * torch.outer(torch.randn(20), torch.randn(20)) / 20**0.5
        return student, x, teacher(x)


def trained(sparsity_weight: float, proximal: bool, penalty: bool = False, steps: int = 300) -> PeftModel:
    base, x, y = regression()
    config = S2LoraConfig(r=8, target_modules=["lin0", "lin1", "lin2"], sparsity_weight=sparsity_weight)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam(s2lora_param_groups(model, lr=3e-3))
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        if penalty:
            loss = loss + model.regularization_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if proximal:
            model.proximal_step(optimizer)
    return model


# ---- zeros ------------------------------------------------------------------------------------------------------------


def test_training_reaches_exact_zeros_with_the_proximal_step_and_not_without():
    with_step = coefficients(trained(0.5, proximal=True))
    plain_penalty = coefficients(trained(0.5, proximal=False, penalty=True))
    assert (with_step == 0).float().mean() > 0.3
    assert (with_step != 0).any()
    assert (plain_penalty == 0).sum() == 0


def test_the_sparse_adapter_still_learns_the_task():
    base, x, y = regression()
    before = nn.functional.mse_loss(base(x), y).item()
    model = trained(0.5, proximal=True)
    assert nn.functional.mse_loss(model(x), y).item() < 0.1 * before


def test_without_a_sparsity_weight_the_step_does_nothing():
    model = adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    proximal_step(model, torch.optim.SGD(s2lora_param_groups(model, lr=1.0)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_step_lowers_each_coefficient_by_its_learning_rate_times_the_weight():
    model = adapted(sparsity_weight=0.5)  # directions have length one from the start
    before = coefficients(model)
    optimizer = torch.optim.SGD(s2lora_param_groups(model, lr=0.02))  # s learns ten times as fast
    proximal_step(model, optimizer)
    expected = [0.0 if abs(s) <= 0.1 else s - 0.1 * (1 if s > 0 else -1) for s in before.tolist()]
    assert torch.allclose(coefficients(model), torch.tensor(expected), atol=1e-6)


def test_the_step_takes_the_learning_rate_of_the_moment():
    model = adapted(sparsity_weight=0.5)
    optimizer = torch.optim.SGD(s2lora_param_groups(model, lr=1.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the end of a schedule
    before = coefficients(model)
    proximal_step(model, optimizer)
    assert torch.allclose(coefficients(model), before, atol=1e-6)


def test_the_step_refuses_an_optimizer_without_the_coefficients():
    model = adapted(sparsity_weight=0.5)
    with pytest.raises(ValueError, match="holds none of the rank coefficients"):
        proximal_step(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


def test_growing_factors_cannot_make_up_for_small_coefficients():
    model = adapted(sparsity_weight=0.5)
    model.eval()
    optimizer = torch.optim.SGD(s2lora_param_groups(model, lr=0.0))
    with torch.no_grad():  # the loophole: s a hundredth, A a hundred times as large, the same output
        for name, parameter in model.named_parameters():
            if "s2lora_" in name and "s2lora_B" not in name:
                parameter.mul_(100 if "s2lora_A" in name else 0.01)
    expected, hidden = output(model, WHISPER.inputs), coefficients(model)
    proximal_step(model, optimizer)
    assert close(output(model, WHISPER.inputs), expected)
    assert torch.allclose(coefficients(model), hidden * 100, rtol=1e-4)
    for layer in (module for module in model.modules() if isinstance(module, S2LoraLayer)):
        A, B, _ = layer.factors("default", torch.device("cpu"))
        assert torch.allclose(A.norm(dim=1), torch.ones(4))
        assert torch.allclose(B.norm(dim=0), torch.ones(4))


def test_a_direction_of_zeros_stays_finite():
    model = adapted(sparsity_weight=0.5)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "s2lora_A" in name)[1] = 0
    proximal_step(model, torch.optim.SGD(s2lora_param_groups(model, lr=0.1)))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ---- penalty and parameter groups -------------------------------------------------------------------------------------


def test_the_penalty_is_the_weighted_mean_of_all_coefficients():
    model = adapted(sparsity_weight=0.3)
    loss = model.regularization_loss()
    assert torch.allclose(loss, 0.3 * coefficients(model).abs().mean())
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "s2lora_coefficients" in name])
    assert torch.allclose(gradients, 0.3 * coefficients(model).sign() / len(gradients))
    assert adapted().regularization_loss() == 0


def test_the_penalty_is_that_of_the_active_adapter_unless_one_is_named():
    model = adapted(sparsity_weight=0.3)
    model.add_adapter("second", S2LoraConfig(r=2, sparsity_weight=1.0))
    assert model.regularization_loss("second") == 0  # its coefficients are all zero
    assert model.regularization_loss() > 0
    model.set_adapter("second")
    assert model.regularization_loss() == 0
    with pytest.raises(ValueError, match=r"No S2-LoRA adapter 'third'\. Known: default, second"):
        model.regularization_loss("third")


def test_functions_refuse_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="has no S2-LoRA adapter"):
        peft_s2lora.regularization_loss(nn.Linear(2, 2))


def test_coefficients_learn_faster_and_are_not_decayed():
    model = adapted(coefficient_lr_multiplier=4.0)
    slow, fast = s2lora_param_groups(model, lr=0.01, weight_decay=0.1)
    assert (slow["lr"], slow["weight_decay"]) == (0.01, 0.1)
    assert (fast["lr"], fast["weight_decay"]) == (0.04, 0.0)
    assert sum(p.numel() for p in fast["params"]) == len(coefficients(model))
    both = {id(p) for group in (slow, fast) for p in group["params"]}
    assert both == {id(p) for p in model.parameters() if p.requires_grad}


# ---- Trainer ----------------------------------------------------------------------------------------------------------


def train_with_trainer(model: PeftModel, folder, callbacks) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        label_names=["labels"], remove_unused_columns=False, lr_scheduler_type="constant", logging_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(s2lora_param_groups(model, lr=0.002))
    trainer = Trainer(model, arguments, train_dataset=Utterances(), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train()
    return trainer


def test_the_penalty_arrives_through_the_trainer(tmp_path):
    # Three steps of SGD at 0.02 with weight 1 take 0.06 off every coefficient, beside what the loss does.
    torch.manual_seed(0)
    plain, sparse = adapted(sparsity_weight=1.0), None
    sparse = adapted(sparsity_weight=1.0)
    sparse.load_state_dict(plain.state_dict())
    start = coefficients(plain)
    train_with_trainer(plain, tmp_path, [])
    train_with_trainer(sparse, tmp_path, [S2LoraCallback()])
    assert (coefficients(plain) == 0).sum() == 0
    small = start.abs() < 0.03
    assert small.any()
    assert (coefficients(sparse)[small] == 0).float().mean() > 0.5
    assert coefficients(sparse).abs().mean() < coefficients(plain).abs().mean() - 0.03


def test_a_callback_with_nothing_to_do_says_so(tmp_path):
    with pytest.raises(ValueError, match="sparsity_weight is 0"):
        train_with_trainer(adapted(), tmp_path, [S2LoraCallback()])


# ---- pruning ----------------------------------------------------------------------------------------------------------


def sparse_model(**kwargs) -> PeftModel:
    """Directions 1 and 3 used by nobody, 0 by every layer, 2 by the first layer only."""
    model = adapted(**kwargs).eval()
    layers = [module for module in model.modules() if isinstance(module, S2LoraLayer)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.s2lora_coefficients["default"][[1, 3]] = 0
            if number:
                layer.s2lora_coefficients["default"][2] = 0
    return model


def test_pruning_changes_no_logit_and_drops_unused_directions(tmp_path):
    model = sparse_model()
    expected = output(model, WHISPER.inputs)
    model.save_pretrained(tmp_path / "before")
    assert prune(model) == {"16x16": 2}
    assert close(output(model, WHISPER.inputs), expected, atol=1e-6)
    assert all(len(p) == 2 for name, p in model.named_parameters() if "s2lora_A" in name or "coefficients" in name)
    assert all(p.requires_grad == ("s2lora_" in name) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / when / "adapter_model.safetensors").stat().st_size for when in ("before", "after")]
    assert sizes[1] < sizes[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "after")
    assert torch.equal(output(loaded, WHISPER.inputs), output(model, WHISPER.inputs))


def test_pruning_keeps_the_scaling():
    model = sparse_model(s2lora_alpha=12)
    expected = output(model, WHISPER.inputs)
    model.prune()
    assert model.peft_config["default"].scaling == 3
    assert close(output(model, WHISPER.inputs), expected, atol=1e-6)


def test_pruning_twice_or_without_zeros_changes_nothing():
    model = sparse_model()
    assert prune(model) == prune(model) == {"16x16": 2}
    dense = adapted()
    assert prune(dense) == {"16x16": 4}
    assert dense.peft_config["default"].group_ranks is None


def test_pruning_an_adapter_of_zeros_keeps_one_direction():
    model = adapted(init_weights=True)
    assert prune(model) == {"16x16": 1}
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_pruning_with_a_threshold_drops_small_coefficients_too():
    model = sparse_model()
    before = coefficients(model)
    prune(model, threshold=0.5)
    assert sorted(coefficients(model)[coefficients(model) != 0].tolist()) == sorted(before[before.abs() > 0.5].tolist())
    with pytest.raises(ValueError, match="threshold must be 0 or above"):
        prune(model, threshold=-1)


def test_pruning_a_merged_adapter_is_refused():
    model = sparse_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Call unmerge_adapter"):
        prune(model)


def test_a_pruned_adapter_trains_on():
    model = sparse_model()
    prune(model)
    optimizer = torch.optim.SGD(s2lora_param_groups(model, lr=0.1))
    before = coefficients(model)
    loss_of(model.train(), WHISPER.inputs).backward()
    optimizer.step()
    assert not torch.equal(coefficients(model), before)


# ---- report -----------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_each_weight_uses():
    report = rank_report(sparse_model())
    assert (report.adapter, report.r) == ("default", 4)
    assert [weight.used for weight in report.weights] == [2] + [1] * 23
    first = report.weights[0]
    assert (first.layer, first.kind, first.group) == ("model.encoder.layers.0", "self_attn.k_proj", "16x16")
    assert report.zero_fraction == 1 - 25 / 96
    assert report.num_parameters == 4 * 32 + 4 * 24


def test_the_report_is_the_same_from_every_wrapper():
    model = sparse_model()
    assert rank_report(model) == rank_report(model.base_model) == rank_report(model.get_base_model()) == model.rank_report()


def test_the_table_has_a_row_per_layer_and_a_column_per_kind():
    lines = str(rank_report(sparse_model())).splitlines()
    assert lines[0] == "default: r = 4, 224 parameters, 74.0 % of s exactly zero"
    assert lines[1].split()[0] == "self_attn.k_proj"
    assert lines[2].split() == ["model.encoder.layers.0", "2", "1", "1", "1", ".", ".", ".", "."]
    assert len(lines) == 2 + 4


def test_the_json_holds_the_figures():
    data = json.loads(rank_report(sparse_model()).to_json())
    assert data["weights"][0]["used"] == 2
    assert data["zero_fraction"] == pytest.approx(1 - 25 / 96)


def test_the_figure_shows_layer_by_kind(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")
    figure = rank_report(sparse_model()).figure()
    figure.savefig(tmp_path / "ranks.png")
    assert next(label.get_text() for label in figure.axes[0].get_yticklabels()) == "model.encoder.layers.0"
    assert (tmp_path / "ranks.png").stat().st_size > 1000
