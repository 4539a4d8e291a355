"""Adapter folders as a run leaves them, for the tests of the Hub: real files, small, with whatever a test wants changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN = {
    "format": 1,
    "name": "cy",
    "language": "cy",
    "domain": None,
    "carrier": None,
    "base_model": "openai/whisper-small",
    "base_signature": None,
    "num_parameters": 64,
    "train_data": "Sentences read aloud",
    "metrics": {
        "test_set": "held-out voices",
        "normalizer": "mark-preserving",
        "before": {"wer": 1.0423, "cer": 0.5, "clips": 1200},
        "after": {"wer": 0.21, "cer": 0.08, "clips": 1200},
    },
    "training": {"steps": 400, "license": "cc-by-4.0", "start": "the adapter br", "command": "whisper-moe train --language cy"},
}
CONFIG = {
    "peft_type": "S2LORA",
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "share_scope": "shape",
    "base_model_name_or_path": "/home/me/models/whisper-small",
}


def write_run(folder: Path, config: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Path:
    """Write an adapter folder. `changes` go into language_adapter.json, `config` into adapter_config.json; `seed` draws the weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "language_adapter.json").write_text(json.dumps(RUN | changes), encoding="utf-8")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    save_file({"base_model.model.x.s2lora_A": torch.randn(4, 16, generator=generator)}, folder / "adapter_model.safetensors")
    return folder
