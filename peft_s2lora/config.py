"""What a user of S2-LoRA chooses: `S2LoraConfig`. It refuses values that cannot work and knows which weights share a pair (A, B).

Field names that PEFT users know (`r`, `target_modules`, `bias`, ...) keep their PEFT meaning.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from ._register import add_peft_type

SHARE_SCOPES = ("shape", "module_type", "global")
BIASES = ("none", "all", "s2lora_only")


@dataclass
class S2LoraConfig(PeftConfig):
    """Configuration of S2-LoRA: `W = W0 + c * B diag(s) A`, where A and B are shared by many weights and s is private to each.

    Args:
        r (`int`, defaults to 32):
            Number of shared rank directions, the rows of A and columns of B. They are paid for once per sharing group, so ranks
            above LoRA's usual ones are cheap: 16 to 64 works well.
        s2lora_alpha (`float`, *optional*):
            The scaling is `c = s2lora_alpha / r`. Left out, it equals `r`, so c = 1.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the modules to adapt, a regular expression for their full names, or "all-linear". Left out, the usual
            attention projections of a known architecture are taken (Whisper: q_proj, k_proj, v_proj, out_proj).
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, or a regular expression, of modules that stay as they are although `target_modules` matches them.
        share_scope (`str`, defaults to "shape"):
            Which weights share one pair (A, B). "shape": all of one size (d_out, d_in). "module_type": all of one last name and
            size (q_proj with q_proj). "global": all of them, one pair at the largest size, of which smaller weights use a slice.
        share_groups (`list[str]`, *optional*):
            Regular expressions for full module names (as `re.fullmatch` reads them) that split the sharing further: weights share
            only if the same first expression matches both; those that none matches form a group of their own. Example:
            `[r".*encoder\\.layers.*"]` keeps the encoder's pair apart.
        sparsity_weight (`float`, defaults to 0):
            Strength of the pull of every s towards zero. It acts through the proximal step (`S2LoraCallback`,
            `model.proximal_step(optimizer)`), which lowers each abs(s) by learning rate x sparsity_weight after an optimizer step
            and stops at exact zero. Under Adam, where a coefficient moves by up to one learning rate a step, 0.1 to 0.5 works: 0
            drops nothing, 1 everything.
            Above 0, rank directions are kept at length one, so that A and B cannot grow to make up for a small s.
        coefficient_lr_multiplier (`float`, defaults to 10):
            Learning rate of s as a multiple of that of A and B, used by `s2lora_param_groups`.
        s2lora_dropout (`float`, defaults to 0):
            Probability of dropping an entry of the input of A during training, from 0 to below 1.
        init_weights (`bool`, defaults to `True`):
            A, B random and s = 0: the adapted model starts as the base model. `False` starts away from it; for tests.
        bias (`str`, defaults to "none"):
            Biases that train too: "none", "all" or "s2lora_only" (those of the adapted modules). Other than "none", disabling the
            adapter does not give the base model back.
        fan_in_fan_out (`bool`, defaults to `False`):
            Accepted because other PEFT methods have it. The layout of a weight is read from the layer's type, `Conv1D` or not.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved in full beside the adapter, for instance a new classification head.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers to adapt; left out, all.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that `layers_to_transform` counts in, if it is not the usual one.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Rows of the embedding that train too, as in LoRA.
        pool (`str`, *optional*):
            Name of another adapter, already in the model, whose A and B this one uses without training them: it owns only its
            coefficients. Rank and sharing are the pool's; leave them out.
        group_ranks (`dict[str, int]`, *optional*):
            Rank directions left in each sharing group. `prune()` writes it; leave it alone.
        pool_hash (`str`, *optional*):
            Hash of the pool's A and B, checked when the adapter is loaded. Written when it is added; leave it alone.

    There is no rank per module to choose (no `rank_pattern`): which weight uses how many directions is what training finds out.
    """

    r: int = field(default=32, metadata={"help": "Number of shared rank directions"})
    s2lora_alpha: float | None = field(default=None, metadata={"help": "Scaling is s2lora_alpha / r; default r"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, a regular expression, or 'all-linear'"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, names or a regular expression"}
    )
    share_scope: str = field(default="shape", metadata={"help": "Which weights share A and B: 'shape', 'module_type' or 'global'"})
    share_groups: list[str] | None = field(default=None, metadata={"help": "Regular expressions that split the sharing further"})
    sparsity_weight: float = field(default=0.0, metadata={"help": "Pull of the rank coefficients towards zero"})
    coefficient_lr_multiplier: float = field(default=10.0, metadata={"help": "Learning rate of s relative to that of A and B"})
    s2lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A"})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model (s = 0)"})
    bias: str = field(default="none", metadata={"help": "Biases that train too: 'none', 'all' or 's2lora_only'"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Read from the layer's type; accepted for compatibility"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list that layers_to_transform counts in"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows that train too"}
    )
    pool: str | None = field(default=None, metadata={"help": "Adapter whose A and B are used, frozen"})
    group_ranks: dict[str, int] | None = field(default=None, metadata={"help": "Written by prune(): rank directions left per group"})
    pool_hash: str | None = field(default=None, metadata={"help": "Written for a pooled adapter: hash of the pool's A and B"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # PEFT compares sets; saved as a list again
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_numbers()
        self._check_choices()
        if self.s2lora_alpha is None:
            self.s2lora_alpha = self.r

    def _check_numbers(self) -> None:
        _check_rank("r", self.r, "Use for instance r=32.")
        if self.s2lora_alpha is not None and not (_is_number(self.s2lora_alpha) and self.s2lora_alpha > 0):
            raise ValueError(f"s2lora_alpha must be a number above 0, got {self.s2lora_alpha!r}. Leave it out to get alpha = r.")
        if not (_is_number(self.s2lora_dropout) and 0 <= self.s2lora_dropout < 1):
            raise ValueError(f"s2lora_dropout must be from 0 to below 1, got {self.s2lora_dropout!r}. Use 0 for none.")
        if not (_is_number(self.sparsity_weight) and self.sparsity_weight >= 0):
            raise ValueError(f"sparsity_weight must be 0 or above, got {self.sparsity_weight!r}. Use 0 for no sparsity.")
        if not (_is_number(self.coefficient_lr_multiplier) and self.coefficient_lr_multiplier > 0):
            raise ValueError(
                f"coefficient_lr_multiplier must be above 0, got {self.coefficient_lr_multiplier!r}. "
                "Use 1 for one learning rate for everything."
            )
        for key, rank in (self.group_ranks or {}).items():
            _check_rank(f"group_ranks[{key!r}]", rank, "prune() writes this field; leave it out of a new configuration.")

    def _check_choices(self) -> None:
        if self.share_scope not in SHARE_SCOPES:
            raise ValueError(f"share_scope must be one of {', '.join(SHARE_SCOPES)}, got {self.share_scope!r}. The default is 'shape'.")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}. The default is 'none'.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern only says where layers_to_transform counts: give layers_to_transform too, or neither.")
        if isinstance(self.share_groups, str):
            raise ValueError(f"share_groups must be a list of regular expressions, got the string {self.share_groups!r}. Put it in a list.")
        for pattern in self.share_groups or []:
            _check_pattern("share_groups", pattern)
        if self.pool is not None and not (isinstance(self.pool, str) and self.pool):
            raise ValueError(f"pool must be the name of another adapter, got {self.pool!r}. Leave it out for A and B of one's own.")
        if isinstance(self.target_modules, str):
            _check_pattern("target_modules", self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; sets in sorted order, so that the same configuration is saved as the same bytes."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    @property
    def scaling(self) -> float:
        """c in `W = W0 + c * B diag(s) A`."""
        assert self.s2lora_alpha is not None  # set in __post_init__
        return self.s2lora_alpha / self.r

    def sharing_key(self, module_name: str, d_out: int, d_in: int) -> str:
        """Name of the sharing group of a module: equal names share one pair (A, B)."""
        if self.share_scope == "global":
            key = "global"
        elif self.share_scope == "module_type":
            key = f"{module_name.rpartition('.')[2]}:{d_out}x{d_in}"
        else:
            key = f"{d_out}x{d_in}"
        pattern = self.sharing_group(module_name)
        return key if pattern is None else f"{pattern}/{key}"

    def sharing_group(self, module_name: str) -> str | None:
        """The first of `share_groups` that matches a module's name."""
        return next((pattern for pattern in self.share_groups or [] if re.fullmatch(pattern, module_name)), None)

    def group_rank(self, sharing_key: str) -> int:
        """Rank directions of a sharing group: `r`, or what `prune()` left of it."""
        return (self.group_ranks or {}).get(sharing_key, self.r)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(name: str, rank: object, way_out: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, got {rank!r}. {way_out}")


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} holds {pattern!r}, which is not a regular expression ({error}).") from error
