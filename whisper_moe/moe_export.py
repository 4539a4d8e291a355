"""Leaving the mixture: one plain LoRA in its place, exact where the gates are fixed, distilled where they depend on the input.

Under fixed gates a mixture is a LoRA whose ranks are laid side by side: `A' = [A; A_1; ...; A_E]`, `B' = [c B, g_1 B_1, ..., g_E B_E]`.
A smaller rank comes from the singular value decomposition of B' A', which no LoRA of that rank approximates better; the error is reported.
The folder is PEFT's own LoRA format and needs nothing of this package.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from whisper_moe.moe_config import LoraMoeConfig
from whisper_moe.moe_gates import adapted_layers, base_model_of, gates_per_module, single_adapter
from whisper_moe.moe_layer import LoraMoeLayer, input_dependent
from whisper_moe.moe_report import GateReport, record_gates
from whisper_moe.moe_targets import shortest_targets

CHECKPOINT_PREFIX = "base_model.model."
LORA_BIAS = {"none": "none", "all": "all", "loramoe_only": "lora_only"}

Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, d_in), B (d_out, r)


@dataclass
class ExportedLora:
    """A mixture as plain LoRA.

    Args:
        config: The LoRA configuration.
        tensors: Its tensors, named as in the file.
        relative_errors: Module -> norm of what the smaller rank lost, over the norm of the whole; 0 where nothing was cut.
        relative_error: The same over all weights together.
        report: The gates that were averaged, from `distil`.
        losses: Distance between the LoRA's and the mixture's answers over the steps of training, from `distil`; empty without.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    relative_errors: dict[str, float]
    relative_error: float
    report: GateReport | None = None
    losses: list[float] = field(default_factory=list)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


@torch.no_grad()
def to_lora(
    model: nn.Module,
    folder: str | os.PathLike[str] | None = None,
    gates: Any = None,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> ExportedLora:
    """The plain LoRA that computes what a mixture does under fixed gates. Every scaling is 1 (alpha = rank).

    Args:
        model: A model with a LoRA-MoE adapter, unmerged or merged.
        folder: Where to write it; nothing is written if left out.
        gates: The same for all rows: a dict expert -> weight, a tensor (experts,), a dict module -> tensor (experts,), or a `GateReport`
            (its means). Left out, the gates that are fixed now: those of a static router, a prior, `use_gates`, or no experts.
        rank: Cut every weight to this rank at most, by SVD. Left out, nothing is lost.
        adapter_name: Which adapter; the active one unless named.

    Raises:
        ValueError: No gates were given, and they depend on the input; or the rank is not a whole number from 1 up.
    """
    name, state = single_adapter(model, adapter_name)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number from 1 up, got {rank!r}. Leave it out to lose nothing.")
    layers = adapted_layers(model, name)
    given = None
    if gates is not None:
        given = gates_per_module(model, name, state, gates)
        if given is None:
            raise ValueError("A LoRA is the same for all rows: give one set of gates (a dict, a tensor (experts,) or a GateReport).")
    pairs = {module: layer.low_rank(name, _gates_for(layer, name, module, given)) for module, layer in layers.items()}
    return _export(model, name, pairs, rank, folder)


def distil(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rank: int | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    steps: int = 0,
    lr: float = 1e-4,
    adapter_name: str | None = None,
) -> ExportedLora:
    """One LoRA in the place of a mixture whose gates depend on the input: gates averaged over data, then `to_lora`.

    With `steps`, the LoRA is then trained against the mixture's own answers (no labels are needed beyond what the model takes): the
    Kullback-Leibler divergence of its logits from the mixture's, or the mean squared error for models without logits.

    Args:
        model: A model with a LoRA-MoE adapter. It is put in evaluation mode while it is asked, and not changed.
        batches: What the model is called with, `model(**batch)`. Read once; with `steps` they are kept in memory and gone through in turn.
        rank: Rank of the LoRA; left out, all ranks side by side.
        folder: Where to write it; nothing is written if left out.
        steps: Steps of training; 0 for none. Makes a copy of the model.
        lr: Learning rate of AdamW.
        adapter_name: Which adapter; the active one unless named.

    Returns:
        The LoRA with the error of the rank, the gates it was made from, and with `steps` the distances before each step and after the last.
    """
    name, state = single_adapter(model, adapter_name)
    batches = list(batches)
    if not batches:
        raise ValueError("distil needs at least one batch to average the gates over, got none.")
    was_training = model.training
    model.eval()
    try:
        report = None
        if state.experts:
            with torch.no_grad(), record_gates(model, name) as report:
                for batch in batches:
                    model(**batch)
        exported = to_lora(model, gates=report, rank=rank, adapter_name=name)
        exported.report = report
        if steps > 0:
            _train(model, exported, batches, steps, lr)
    finally:
        model.train(was_training)
    if folder is not None:
        exported.save(folder)
    return exported


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best pair of a smaller rank: A (rank, d_in), B (d_out, rank), the norm of what was lost, and the norm of the whole B A.

    Never forms B A: two QR decompositions, and the SVD of a square as large as the present rank.
    """
    q_out, r_out = torch.linalg.qr(B.double())  # (d_out, m), (m, n)
    q_in, r_in = torch.linalg.qr(A.double().T)  # (d_in, m), (m, n)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    small_B, small_A = (q_out @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_in.T)
    return small_A.to(A.dtype), small_B.to(B.dtype), float(s[rank:].norm()), float(s.norm())


def _gates_for(layer: LoraMoeLayer, name: str, module: str, given: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    if given is not None and layer.has_experts(name):
        return given[module]
    fixed = layer.constant_gates(name)
    if fixed is None:
        raise ValueError(input_dependent(name, layer.configs[name].router))
    return fixed


def _export(model: nn.Module, name: str, pairs: dict[str, Pair], rank: int | None, folder: str | os.PathLike[str] | None) -> ExportedLora:
    kept, errors, lost, whole = {}, {}, 0.0, 0.0
    for module, (A, B) in pairs.items():
        error, norm = 0.0, 0.0
        if rank is not None and len(A) > 0:
            small_A, small_B, error, norm = truncate(A, B, rank)
            if len(A) > rank:
                A, B = small_A, small_B
            else:
                error = 0.0  # it fits as it is
        errors[module] = error / norm if norm > 0 else 0.0
        lost, whole = lost + error**2, whole + norm**2
        if len(A) > 0:
            kept[module] = (A, B)
    if not kept:
        raise ValueError(f"Adapter {name!r} adds nothing under these gates: there is no LoRA to export.")
    layers = adapted_layers(model, name)
    config: LoraMoeConfig = next(iter(layers.values())).configs[name]
    tensors = _other_tensors(model, name)
    for module, (A, B) in kept.items():
        for key, tensor in (("lora_A.weight", A), ("lora_B.weight", B)):
            tensors[f"{CHECKPOINT_PREFIX}{module}.{key}"] = tensor.detach().cpu().contiguous().clone()
    ranks = {module: len(A) for module, (A, _) in kept.items()}
    exported = ExportedLora(_lora_config(config, model, ranks), tensors, errors, math.sqrt(lost / whole) if whole > 0 else 0.0)
    if folder is not None:
        exported.save(folder)
    return exported


def _other_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """What the adapter saves besides low-rank products and routers: biases, modules_to_save."""
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    others = {key: tensor for key, tensor in state_dict.items() if ".loramoe_" not in key}
    return {
        key if key.startswith(CHECKPOINT_PREFIX) else CHECKPOINT_PREFIX + key: tensor.contiguous().cpu() for key, tensor in others.items()
    }


def _lora_config(config: LoraMoeConfig, model: nn.Module, ranks: dict[str, int]) -> LoraConfig:
    # r and alpha are the largest rank, so that a program that ignores the patterns still gets the scaling, 1, right.
    largest = max(ranks.values())
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=sorted(shortest_targets(ranks, base_model_of(model))),
        bias=LORA_BIAS[config.bias],
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _train(model: nn.Module, exported: ExportedLora, batches: list[Mapping[str, Any]], steps: int, lr: float) -> None:
    """Train the LoRA against the mixture's answers; replaces its tensors."""
    student_base = _without_adapters(model)
    student_config = copy.deepcopy(exported.config)
    student_config.inference_mode = False
    student = get_peft_model(student_base, student_config)
    set_peft_model_state_dict(student, exported.tensors)
    student.eval()  # no dropout: it learns from one teacher's exact answers
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for batch in itertools.islice(itertools.cycle(batches), steps):
        loss = _distance(model, student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        exported.losses.append(float(loss.detach()))
    with torch.no_grad():
        exported.losses.append(float(_distance(model, student, batches[steps % len(batches)])))
    trained = get_peft_model_state_dict(student, save_embedding_layers=False)
    exported.tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in trained.items()}


def _distance(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        wanted = teacher(**batch)
    answer = student(**batch)
    if isinstance(wanted, torch.Tensor):
        return F.mse_loss(answer.float(), wanted.float())
    log_answer, log_wanted = (result.logits.float().log_softmax(-1).flatten(0, -2) for result in (answer, wanted))
    return F.kl_div(log_answer, log_wanted, log_target=True, reduction="batchmean")


def _without_adapters(model: nn.Module) -> nn.Module:
    """A copy of the base model alone."""
    base = copy.deepcopy(base_model_of(model))
    for parent in list(base.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LoraMoeLayer):
                if child.merged:
                    child.unmerge()
                for state in child.states.values():
                    state.detach()
                setattr(parent, child_name, child.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base
