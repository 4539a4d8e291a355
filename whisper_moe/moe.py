"""LoRA-MoE as a PEFT method. Importing this module makes PEFT know it: `import whisper_moe.moe`.

`from whisper_moe import LoraMoeConfig` (or any other name of the method) does so too.
"""

from __future__ import annotations

from whisper_moe._register import register
from whisper_moe.moe_config import LoraMoeConfig
from whisper_moe.moe_export import ExportedLora, distil, to_lora
from whisper_moe.moe_gates import mask_experts, regularization_loss, use_gates
from whisper_moe.moe_layer import LoraMoeLayer
from whisper_moe.moe_model import LoraMoeModel
from whisper_moe.moe_report import GateReport, record_gates

__all__ = [
    "ExportedLora",
    "GateReport",
    "LoraMoeConfig",
    "LoraMoeLayer",
    "LoraMoeModel",
    "distil",
    "mask_experts",
    "record_gates",
    "regularization_loss",
    "to_lora",
    "use_gates",
]

register(LoraMoeConfig, LoraMoeModel)
