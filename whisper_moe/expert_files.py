"""Adapters as experts: what a LoRA or S2-LoRA folder, or a LoRA loaded in the model, adds to each weight, as plain low-rank pairs.

Files are read as data (adapter_files.py) and converted exactly. Everything is checked here, before any model is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from whisper_moe.adapter_files import CONFIG_FILE, S2LORA, lora_pairs, read_adapter, s2_as_lora, s2_coefficients
from whisper_moe.base_signature import check_base
from whisper_moe.expert_sources import fetched_experts

Shapes = Mapping[str, tuple[int, int]]  # module name -> (d_out, d_in), of the linear layers of a model


@dataclass(frozen=True)
class Expert:
    """One expert: what it adds to each weight it adapts, `B A` with the scaling in B.

    Args:
        name (`str`): What it is called in the mixture.
        pairs (`dict`): Module name -> A (r, d_in) and B (d_out, r). Ranks may differ.
        sha256 (`str`, *optional*): Hash of its weights' file, where it came from one.
    """

    name: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    sha256: str | None = None


def read_experts(sources: Mapping[str, str], model: nn.Module, shapes: Shapes) -> list[Expert]:
    """The experts of a mixture for `model`, whose linear layers have `shapes`.

    A source is a repository of a Hub, pinned to a commit (see `fetch_experts_with`), a folder, or else the name of a LoRA adapter that is
    loaded in the model.

    Raises:
        ValueError: It is none of them, or the adapter does not fit this model; the message says which expert and why.
    """
    experts = []
    fetched = fetched_experts(sources, _base_id(model))
    for name, source in sources.items():
        if name in fetched:  # before any look at folders: one that happens to be called so must not pass for the repository
            expert = _read_folder(name, fetched[name], model, shapes)
        elif (Path(source) / CONFIG_FILE).is_file():
            expert = _read_folder(name, Path(source), model, shapes)
        elif source in loaded_loras(model):
            expert = _read_loaded(name, source, model)
        else:
            raise ValueError(_no_such_source(name, source, model))
        _check_fit(expert, shapes)
        experts.append(expert)
    return experts


def loaded_loras(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters in a model."""
    names: dict[str, None] = {}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            names |= dict.fromkeys([*layer.lora_A, *layer.lora_embedding_A])
    return list(names)


def check_hashes(experts: list[Expert], hashes: Mapping[str, str], sources: Mapping[str, str]) -> None:
    """Refuse experts whose files are not those that the mixture was saved with."""
    for expert in experts:
        expected = hashes.get(expert.name)
        if expected is not None and expert.sha256 != expected:
            raise ValueError(
                f"Expert {expert.name!r}: {sources[expert.name]} has changed since the mixture was saved (SHA-256 "
                f"{str(expert.sha256)[:12]}..., expected {expected[:12]}...). Put the original file back, or train the mixture anew."
            )


def stack(experts: list[Expert], module: str, d_out: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All experts on one weight: A (E, r, d_in) and B rank by rank (E, r, d_out), r the largest rank, smaller ones padded with zeros.

    None where no expert adapts the weight.
    """
    rank = max((expert.pairs[module][0].shape[0] for expert in experts if module in expert.pairs), default=0)
    if rank == 0:
        return None
    A, B = torch.zeros(len(experts), rank, d_in), torch.zeros(len(experts), rank, d_out)
    for index, expert in enumerate(experts):
        if module in expert.pairs:
            pair_A, pair_B = expert.pairs[module]
            A[index, : len(pair_A)] = pair_A
            B[index, : len(pair_A)] = pair_B.T
    return A, B


def _read_folder(name: str, folder: Path, model: nn.Module, shapes: Shapes) -> Expert:
    try:
        files = read_adapter(folder)
        if files.is_pooled:
            raise ValueError(
                f"It uses the pool {files.config['pool']!r}: its file holds coefficients, but not the A and B they belong to. Load it "
                "with its pool and write it as LoRA first: peft_s2lora.to_lora(model, name, folder)."
            )
        if files.card.get("base_signature") is not None and hasattr(model, "config"):
            check_base(files.card["base_signature"], model)
        if files.method == S2LORA:
            _check_known(name, list(s2_coefficients(files)), shapes)
            pairs = s2_as_lora(files, shapes)
        else:
            pairs = lora_pairs(files)
    except (ValueError, AttributeError) as error:  # AttributeError: a fingerprint of a Whisper, and the model is none
        raise ValueError(f"Expert {name!r} ({folder}) cannot be used. {error}") from error
    return Expert(name, pairs, files.sha256)


def _read_loaded(name: str, adapter_name: str, model: nn.Module) -> Expert:
    pairs = {}
    for module_name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        if layer.merged:
            raise ValueError(f"Expert {name!r}: the LoRA adapters of this model are merged. Call unmerge_adapter() first.")
        if adapter_name in layer.lora_embedding_A or layer.use_dora.get(adapter_name) or layer.lora_bias.get(adapter_name):
            raise ValueError(
                f"Expert {name!r} is no plain low-rank product on {module_name} (an embedding, DoRA or a bias). Train it without."
            )
        A, B = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        pairs[module_name] = (A.clone(), B * layer.scaling[adapter_name])
    return Expert(name, pairs)


def _check_fit(expert: Expert, shapes: Shapes) -> None:
    if not expert.pairs:
        raise ValueError(f"Expert {expert.name!r} adapts no weight at all.")
    _check_known(expert.name, list(expert.pairs), shapes)
    for module, (A, B) in expert.pairs.items():
        d_out, d_in = shapes[module]
        if A.shape[1] != d_in or B.shape[0] != d_out or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"Expert {expert.name!r} adapts {module} from {A.shape[1]} to {B.shape[0]} features; this model has {d_in} to {d_out}. "
                "It was made for another base model."
            )


def _check_known(name: str, modules: list[str], shapes: Shapes) -> None:
    unknown = [module for module in modules if module not in shapes]
    if unknown:
        raise ValueError(
            f"Expert {name!r} adapts {len(unknown)} module(s) that are no linear layer of this model, the first is {unknown[0]}. It was "
            "made for another base model."
        )


def _base_id(model: nn.Module) -> str | None:
    """What the base model was loaded from, if that can be a name on a Hub."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name.count("/") == 1 and not Path(name).exists() else None


def _no_such_source(name: str, source: str, model: nn.Module) -> str:
    return (
        f"Expert {name!r}: {source} is neither a folder with {CONFIG_FILE} nor a LoRA adapter of this model (loaded: "
        f"{', '.join(loaded_loras(model)) or 'none'}). Give the folder that save_pretrained wrote, or a repository of the Hub pinned to a "
        "commit, owner/name@<40 hex digits>."
    )
