"""Adapters as plain low-rank products, read from folders and written back: what merging and composing adapters work on.

    module name -> A (r, d_in), B (d_out, r), the scaling in B:    delta = B A

Reading is exact for LoRA and S2-LoRA; what is written is a LoRA with scaling 1 that PEFT, the registry and every LoRA server can load.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whisper_moe.adapter_files import CARD_FILE, CONFIG_FILE, LORA, WEIGHTS_FILE, Pair, lora_pairs, read_adapter, s2_as_lora

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "base_model.model."


def weight_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every linear layer of a bare base -> (d_out, d_in)."""
    return {
        name: (module.out_features, module.in_features) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }


def read_pairs(folder: str | Path, base: nn.Module | None = None) -> dict[str, Pair]:
    """Module name -> A and B of an adapter folder, in float32 or wider.

    Args:
        folder: A LoRA, or an S2-LoRA with its own factors.
        base: The bare base model; S2-LoRA needs it, because its file does not hold the sizes of all weights.

    Raises:
        ValueError: The files cannot be read, or the adapter is more than a low-rank product, or belongs to a pool.
    """
    files = read_adapter(folder)
    if files.method == LORA:
        found = lora_pairs(files)
    elif files.is_pooled:
        raise ValueError(f"{files.label} owns coefficients of a pool only. Export it first: `whisper-moe export --format lora`.")
    elif base is None:
        raise ValueError(f"{files.label} is an S2-LoRA: give the base model too (base=..., --model), or export it to LoRA first.")
    else:
        found = s2_as_lora(files, weight_sizes(base))
    wide = {name: (_at_least_float32(A), _at_least_float32(B)) for name, (A, B) in found.items()}
    return {name: (A, B) for name, (A, B) in wide.items() if len(A) > 0}  # rank 0: S2-LoRA left this weight alone


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def write_lora(folder: Path, pairs: Mapping[str, Pair], sources: Sequence[str | Path], card: Mapping[str, Any]) -> Path:
    """Write a LoRA adapter folder that adds exactly `B A` to each module.

    Args:
        folder: Where to; made if it is not there.
        pairs: Module name -> A, B.
        sources: Adapter folders it was made of; the base's name and the precision of the weights are taken from the first.
        card: What `language_adapter.json` says; `num_parameters` is filled in.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not pairs:
        raise ValueError("There is nothing to write: no module is adapted.")
    configs = [json.loads((Path(source) / CONFIG_FILE).read_text("utf-8")) for source in sources]
    dtype = next(iter(read_adapter(sources[0]).tensors.values())).dtype
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    largest = max(ranks.values())
    # r and alpha are the largest rank, so that a program that ignores the patterns still gets the scaling, 1, right.
    pattern: dict[str, Any] = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=_targets(pairs, sources, configs),
        base_model_name_or_path=configs[0].get("base_model_name_or_path"),
        auto_mapping=configs[0].get("auto_mapping"),
        inference_mode=True,
    )
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = A.to(dtype).contiguous().clone()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = B.to(dtype).contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    row = dict(card) | {"num_parameters": sum(tensor.numel() for tensor in tensors.values())}
    (folder / CARD_FILE).write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return folder


def _targets(pairs: Mapping[str, Pair], sources: Sequence[str | Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sources' own short names where all say the same and adapt the same modules, else every module's name."""
    spoken: list[Any] = [config.get("target_modules") for config in configs]
    same_names = all(isinstance(names, list) and set(names) == set(spoken[0]) for names in spoken)
    if same_names and not any(config.get("layers_to_transform") or config.get("exclude_modules") for config in configs):
        suffixes = (".lora_A.weight", ".s2lora_coefficients")
        modules = [Counter(_module(key, suffixes) for key in read_adapter(source).tensors) for source in sources]
        if all(set(found) - {""} == set(pairs) for found in modules):
            return sorted(spoken[0])
    return sorted(pairs)


def _module(key: str, suffixes: tuple[str, ...]) -> str:
    return next((key.removesuffix(suffix) for suffix in suffixes if key.endswith(suffix)), "")


def other_base(first: tuple[str, Any], second: tuple[str, Any]) -> str | None:
    """Why two adapters are not for one base; None if they are. Given is each one's name of the base and fingerprint of its weights.

    Without fingerprints the names must be equal: there is nothing else to tell bases of one size apart.
    """
    (base, signature), (other, other_signature) = first, second
    if signature is not None and other_signature is not None:
        return None if signature == other_signature else f"one was made for {base!r}, the other for {other!r} with other weights."
    if signature is not None or other_signature is not None:
        return "only one of them carries a fingerprint of its base, so that nobody knows whether it is the same. Save the other one again."
    if base == other:
        return None
    return f"one was made for {base!r}, the other for {other!r}, and neither carries a fingerprint of its base."


def copy_adapter(source: str | Path, folder: Path) -> Path:
    """An adapter's folder as it is, without what training left beside it (checkpoints)."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(source).iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return folder
