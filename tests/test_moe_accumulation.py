"""Gradient accumulation with the balance and entropy terms of LoRA-MoE: two batches of two clips must give what they should together.

The router is static, so its terms are the same for every batch and known by themselves: their gradient comes from the formulas, applied to
the router's numbers, and the gradient of the labels' loss from the same model without terms.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from tuner_behaviours import CASES

from whisper_moe import LoraMoeConfig, LoraMoeLayer

BALANCE, ENTROPY, TEMPERATURE = 3.0, 2.0, 0.5
BATCHES = ((0, 1), (2, 3))


class Clips(torch.utils.data.Dataset):
    """Four rows whose labels differ in number: the means of the batches are not the mean of all."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for row in range(4):
            labels = torch.randint(3, 30, (6,), generator=generator)
            labels[2 + row :] = -100
            if kind == "whisper":
                features = torch.randn(*CASES["whisper"].inputs["input_features"].shape[1:], generator=generator)
                self.rows.append({"input_features": features, "labels": labels})
            else:
                self.rows.append({"input_ids": labels.clamp_min(0), "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([self.rows[row][key] for row in rows]) for key in self.rows[0]}


@pytest.fixture(scope="module", params=["whisper", "decoder"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def experts(kind, tmp_path_factory) -> dict[str, str]:
    targets = ["q_proj", "fc1"] if kind == "whisper" else ["c_attn"]
    found = {}
    for name in ("cy", "eu"):
        base = CASES[kind].base()
        torch.manual_seed(ord(name[0]))
        folder = tmp_path_factory.mktemp(name)
        get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).save_pretrained(
            folder, save_embedding_layers=False
        )
        found[name] = str(folder)
    return found


def mixture(kind: str, experts: dict[str, str], **terms: float) -> PeftModel:
    base = CASES[kind].base()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    config = LoraMoeConfig(r=2, experts=experts, router="static", prior=[5, 1], temperature=TEMPERATURE, init_weights=False, **terms)
    model = get_peft_model(base, config)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        assert not (isinstance(module, nn.Dropout) and module.p), name
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def term_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the two terms, from their formulas: E sum g^2 - 1, and - sum g log g / log E, each the mean over the weights."""
    biases = {
        f"{name}.loramoe_router_bias.default": module.loramoe_router_bias["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraMoeLayer)
    }
    terms = []
    for bias in biases.values():
        gates = (bias / TEMPERATURE).softmax(0)
        entropy = -(gates * gates.log()).sum() / torch.tensor(2.0).log()
        terms.append(BALANCE * (2 * gates.square().sum() - 1) + ENTROPY * entropy)
    found = torch.autograd.grad(torch.stack(terms).mean(), list(biases.values()))
    return dict(zip(biases, found, strict=True))


def label_gradients(kind: str, experts: dict[str, str], loss_of: Any) -> dict[str, torch.Tensor]:
    model = mixture(kind, experts)
    loss_of(model).backward()
    return gradients(model)


def mean_of_batches(kind: str) -> Any:
    clips = Clips(kind)
    return lambda model: sum(model(**clips.batch(rows)).loss for rows in BATCHES) / len(BATCHES)


def mean_of_labels(kind: str) -> Any:
    """One batch with all rows: its mean is over all labels."""
    return lambda model: model(**Clips(kind).batch((0, 1, 2, 3))).loss


def check(found: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], times: float = 1.0) -> None:
    assert found.keys() == labels.keys()
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in terms.values()), "the terms pull"
    for name, gradient in found.items():
        expected = times * (labels[name] + terms.get(name, 0.0))
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5), (name, gradient, expected)


def test_a_loop_that_divides_by_the_batches_accumulates_the_terms_once(kind, experts):
    model, clips = mixture(kind, experts, balance_weight=BALANCE, entropy_weight=ENTROPY), Clips(kind)
    for rows in BATCHES:
        (model(**clips.batch(rows)).loss / len(BATCHES)).backward()
    check(gradients(model), label_gradients(kind, experts, mean_of_batches(kind)), term_gradients(model))


def test_a_loop_with_a_loss_of_its_own_accumulates_what_it_asks_for(kind, experts):
    model, clips = mixture(kind, experts, balance_weight=BALANCE, entropy_weight=ENTROPY), Clips(kind)
    for rows in BATCHES:
        batch = clips.batch(rows)
        labels = batch.pop("labels")
        if kind == "whisper":
            batch["decoder_input_ids"] = labels.clamp_min(0)
        loss = model(**batch).logits.sum() * 0
        ((loss + model.base_model.regularization_loss()) / len(BATCHES)).backward()
    terms = term_gradients(model)
    found = gradients(model)
    for name, gradient in terms.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name


class Sequential(Trainer):
    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Look(TrainerCallback):
    """The gradient of the one optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        assert model is not None
        self.gradients = gradients(model)


def trained(kind: str, model: PeftModel, folder: Any, accepts_loss_kwargs: bool) -> dict[str, torch.Tensor]:
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0, max_grad_norm=0.0,
        report_to=[], use_cpu=True, label_names=["labels"], remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    look = Look()
    trainer = Sequential(model, arguments, train_dataset=Clips(kind), callbacks=[look])
    trainer.model_accepts_loss_kwargs = accepts_loss_kwargs
    trainer.train()
    return look.gradients


@pytest.mark.parametrize("accepts_loss_kwargs", [False, True])
def test_trainer_accumulates_the_terms_as_it_does_the_labels_loss(kind, experts, tmp_path, accepts_loss_kwargs):
    """With loss kwargs, a model that divides by the number of labels gets each batch's term by its share of them. Whisper does not divide,
    and Trainer does not either: then both parts of the loss are added up. In every case their proportion stays."""
    model = mixture(kind, experts, balance_weight=BALANCE, entropy_weight=ENTROPY)
    terms = term_gradients(copy.deepcopy(model))
    found = trained(kind, model, tmp_path, accepts_loss_kwargs)
    if kind == "decoder" and accepts_loss_kwargs:
        labels = label_gradients(kind, experts, mean_of_labels(kind))
        all_labels = Clips(kind).batch((0, 1, 2, 3))["labels"]
        # transformers counts every label of a GPT-2, of which the first of a row is no target: the whole loss is that much smaller.
        check(found, labels, terms, times=float((all_labels[:, 1:] != -100).sum() / (all_labels != -100).sum()))
    else:
        labels = label_gradients(kind, experts, mean_of_batches(kind))
        check(found, labels, terms, times=2.0 if accepts_loss_kwargs else 1.0)
