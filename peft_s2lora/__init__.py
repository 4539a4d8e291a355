"""S2-LoRA (Sparsely Shared LoRA, arXiv 2309.11756) as a PEFT method. `import peft_s2lora` makes PEFT know it; nothing else is needed.

Every weight keeps only its own few rank coefficients s; the low-rank matrices A, B are shared: `W = W0 + c * B diag(s) A`.
"""

from ._register import register
from .config import S2LoraConfig
from .export import to_lora
from .hotswap import hotswap
from .layer import Embedding, Linear, S2LoraLayer
from .model import S2LoraModel
from .report import RankReport, WeightRank, rank_report
from .sparsity import (
    S2LoraCallback,
    normalize_directions,
    proximal_step,
    prune,
    regularization_loss,
    s2lora_param_groups,
)

__all__ = [
    "Embedding",
    "Linear",
    "RankReport",
    "S2LoraCallback",
    "S2LoraConfig",
    "S2LoraLayer",
    "S2LoraModel",
    "WeightRank",
    "hotswap",
    "normalize_directions",
    "proximal_step",
    "prune",
    "rank_report",
    "regularization_loss",
    "s2lora_param_groups",
    "to_lora",
]

register(S2LoraConfig, S2LoraModel)
