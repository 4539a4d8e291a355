"""What a user of LoRA-MoE chooses: `LoraMoeConfig`. It refuses values that cannot work, before any model is touched.

Field names that PEFT users know (`r`, `target_modules`, `bias`, ...) keep their PEFT meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from peft.config import PeftConfig

from whisper_moe._register import add_peft_type

ROUTERS = ("utterance", "token", "static", "language")
LEARNED_ROUTERS = ("utterance", "token", "static")
SAVE_EXPERTS = ("copy", "reference")
BIASES = ("none", "all", "loramoe_only")


@dataclass
class LoraMoeConfig(PeftConfig):
    """Configuration of LoRA-MoE: `y = W0 x + c B A x + sum over experts e of g_e B_e A_e x`.

    A, B are a new LoRA that always takes part and is trained; the experts are existing LoRA or S2-LoRA adapters, frozen; the gates g come
    from a router. Without experts it is plain LoRA.

    Args:
        r (`int`, defaults to 32):
            Rank of the new expert.
        loramoe_alpha (`float`, *optional*):
            The new expert's scaling is `c = loramoe_alpha / r`. Left out, it equals `r`, so c = 1.
        experts (`list[str]` or `dict[str, str]`, *optional*):
            The experts: folders of LoRA or S2-LoRA adapters for the same base model, or names of LoRA adapters that are loaded in the
            model, or, within `fetch_experts_with`, repositories of the Hub, "owner/name@commit". A dict gives them names (language codes
            are good ones); in a list, the last part of a path is the name. Ranks may differ. Each is converted exactly; weights that an
            expert leaves alone get nothing from it.
        router (`str`, *optional*):
            Where the gates come from. "utterance" (the default where there are experts): one set per recording and weight, from the mean
            over its frames of the weight's input in the encoder, and of the encoder's output in the decoder. "token": one set per
            position, from the weight's input there. "static": one learned set per weight, for all inputs. "language": given by the
            caller, see `LoraMoeModel.use_gates`; nothing to train.
        top_k (`int`, *optional*):
            Use only the k experts with the largest gates, scaled up to sum to 1. Left out, all of them.
        temperature (`float`, defaults to 1):
            The gates are `softmax(scores / temperature)`: below 1 more decided, above 1 more even.
        prior (`dict[str, float]` or `list[float]`, *optional*):
            The gates to start from, up to scale: for instance each expert's similarity to the new language. All above 0. Left out, equal.
        balance_weight (`float`, defaults to 0):
            Strength of the pull towards using all experts equally often over a batch. 0.01 to 0.1 works.
        entropy_weight (`float`, defaults to 0):
            Strength of the pull towards decided gates (low entropy) for each recording or position. 0.01 to 0.1 works.
        new_expert (`bool`, defaults to `True`):
            Whether there is a new expert. `False` only mixes the given ones.
        train_experts (`bool`, defaults to `False`):
            Train the given experts too, instead of keeping them frozen.
        save_experts (`str`, defaults to "copy"):
            "copy": the saved adapter holds the experts' tensors and needs nothing else. "reference": it holds their paths and the SHA-256
            of their files, and they are read from there again, refused if a file has changed.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the modules to adapt, a regular expression for their full names, or "all-linear". Left out, the modules that the
            experts adapt; without experts, the usual ones (Whisper: q_proj, k_proj, v_proj, fc1, fc2).
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, or a regular expression, of modules that stay as they are although `target_modules` matches them.
        loramoe_dropout (`float`, defaults to 0):
            Probability of dropping an entry of the new expert's input during training, from 0 to below 1.
        init_weights (`bool`, defaults to `True`):
            B = 0 and a router that gives the prior whatever the input: the model starts as the base with the experts mixed by the prior.
            `False` starts away from that; for tests.
        bias (`str`, defaults to "none"):
            Biases that train too: "none", "all" or "loramoe_only" (those of the adapted modules). Other than "none", disabling the
            adapter does not give the base model back.
        fan_in_fan_out (`bool`, defaults to `False`):
            Accepted because other PEFT methods have it. The layout of a weight is read from the layer's type, `Conv1D` or not.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved in full beside the adapter, for instance a new classification head.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers to adapt; left out, all.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that `layers_to_transform` counts in, if it is not the usual one.
        expert_names (`list[str]`, *optional*):
            Names of the experts of a saved adapter. Written when the experts are read; leave it alone.
        expert_ranks (`dict[str, int]`, *optional*):
            Rank of the experts on each weight. Written when the experts are read; leave it alone.
        expert_hashes (`dict[str, str]`, *optional*):
            SHA-256 of each expert's file. Written when the experts are read; leave it alone.
    """

    r: int = field(default=32, metadata={"help": "Rank of the new expert"})
    loramoe_alpha: float | None = field(default=None, metadata={"help": "Scaling of the new expert is loramoe_alpha / r; default r"})
    experts: list[str] | dict[str, str] | None = field(
        default=None, metadata={"help": "Folders of LoRA or S2-LoRA adapters, or names of loaded LoRA adapters; a dict names them"}
    )
    router: str | None = field(default=None, metadata={"help": "'utterance' (default), 'token', 'static' or 'language'"})
    top_k: int | None = field(default=None, metadata={"help": "Use only the k largest gates"})
    temperature: float = field(default=1.0, metadata={"help": "Gates are softmax(scores / temperature)"})
    prior: dict[str, float] | list[float] | None = field(default=None, metadata={"help": "Gates to start from, up to scale"})
    balance_weight: float = field(default=0.0, metadata={"help": "Pull towards using all experts equally often"})
    entropy_weight: float = field(default=0.0, metadata={"help": "Pull towards decided gates"})
    new_expert: bool = field(default=True, metadata={"help": "Whether there is a new, always-on expert"})
    train_experts: bool = field(default=False, metadata={"help": "Train the given experts too"})
    save_experts: str = field(default="copy", metadata={"help": "'copy' the experts into the saved adapter, or save a 'reference'"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt, a regular expression, or 'all-linear'"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, names or a regular expression"}
    )
    loramoe_dropout: float = field(default=0.0, metadata={"help": "Dropout on the new expert's input"})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model with the experts mixed by the prior"})
    bias: str = field(default="none", metadata={"help": "Biases that train too: 'none', 'all' or 'loramoe_only'"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Read from the layer's type; accepted for compatibility"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list that layers_to_transform counts in"})
    expert_names: list[str] | None = field(default=None, metadata={"help": "Written: names of the experts"})
    expert_ranks: dict[str, int] | None = field(default=None, metadata={"help": "Written: rank of the experts on each weight"})
    expert_hashes: dict[str, str] | None = field(default=None, metadata={"help": "Written: SHA-256 of the experts' files"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # PEFT compares sets; saved as a list again
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.experts = named_experts(self.experts)
        self._check_numbers()
        self._check_choices()
        self._check_mixture()
        if self.loramoe_alpha is None:
            self.loramoe_alpha = self.r
        if self.router is None and self.names:
            self.router = "utterance"

    def _check_numbers(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be a whole number from 1 up, got {self.r!r}. Use for instance r=32.")
        if self.loramoe_alpha is not None and not (_is_number(self.loramoe_alpha) and self.loramoe_alpha > 0):
            raise ValueError(f"loramoe_alpha must be a number above 0, got {self.loramoe_alpha!r}. Leave it out to get alpha = r.")
        if not (_is_number(self.loramoe_dropout) and 0 <= self.loramoe_dropout < 1):
            raise ValueError(f"loramoe_dropout must be from 0 to below 1, got {self.loramoe_dropout!r}. Use 0 for none.")
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}. Use 1 for a plain softmax.")
        for name in ("balance_weight", "entropy_weight"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)!r}. Use 0 to leave the term out.")
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number from 1 up, got {self.top_k!r}. Leave it out to use all experts.")

    def _check_choices(self) -> None:
        for name, choices in (("router", ROUTERS), ("save_experts", SAVE_EXPERTS), ("bias", BIASES)):
            value = getattr(self, name)
            if value not in choices and not (name == "router" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern only says where layers_to_transform counts: give layers_to_transform too, or neither.")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules holds {self.target_modules!r}, which is not a regular expression ({error}).") from error

    def _check_mixture(self) -> None:
        names = self.names
        if not names:
            given = [name for name in ("router", "top_k", "prior") if getattr(self, name) is not None]
            given += [name for name in ("balance_weight", "entropy_weight") if getattr(self, name) > 0]
            if given:
                raise ValueError(f"{', '.join(given)} given, but no experts to choose among. Give experts=[...], or leave it out.")
            if not self.new_expert:
                raise ValueError("new_expert=False and no experts: there is nothing to add to the model. Give experts=[...].")
            return
        if self.top_k is not None and self.top_k > len(names):
            raise ValueError(
                f"top_k must be at most the number of experts, {len(names)} ({', '.join(names)}), got {self.top_k}. Leave it out for all."
            )
        if self.router == "language" and (self.balance_weight > 0 or self.entropy_weight > 0):
            raise ValueError(
                "balance_weight and entropy_weight train a router, but router='language' has nothing to train. Leave them at 0, or use "
                "router='utterance'."
            )
        prior_of(self.prior, names)

    @property
    def names(self) -> list[str]:
        """Names of the experts, in the order of the gates."""
        if isinstance(self.experts, dict):
            return list(self.experts)
        return list(self.expert_names or [])

    @property
    def scaling(self) -> float:
        """c, the scaling of the new expert."""
        assert self.loramoe_alpha is not None  # set in __post_init__
        return self.loramoe_alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data. Paths of experts whose tensors are saved in the adapter are left out: nobody needs them again."""
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        if self.save_experts == "copy" and self.expert_ranks is not None:
            fields |= {"experts": None, "expert_hashes": None}
        return fields


def named_experts(experts: Sequence[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    """Name -> folder or name of a loaded adapter."""
    if experts is None:
        return None
    if isinstance(experts, str) or not isinstance(experts, (Mapping, Sequence)):
        raise ValueError(
            f"experts must be a list of folders or a dict name -> folder, got {experts!r}. For one expert write [{experts!r}]."
        )
    if not experts:
        raise ValueError("experts is empty: a mixture needs at least one. Leave it out to train the new expert alone, as plain LoRA.")
    sources = {str(k): str(v) for k, v in experts.items()} if isinstance(experts, Mapping) else {}
    for source in () if isinstance(experts, Mapping) else experts:
        name = PurePath(str(source)).name
        if name in sources:
            raise ValueError(f"Two experts are called {name!r}: {sources[name]} and {source}. Name them: experts={{'a': ..., 'b': ...}}.")
        sources[name] = str(source)
    odd = [name for name in sources if not name]
    if odd:
        raise ValueError("An expert has an empty name. Name the experts: experts={'cy': 'path/to/folder'}.")
    return sources


def prior_of(prior: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """The prior of each expert, summing to 1; equal parts where none was given."""
    if prior is None:
        return [1 / len(names)] * len(names)
    if isinstance(prior, Mapping):
        if set(prior) != set(names):
            raise ValueError(f"prior names {', '.join(map(str, prior))}; the experts are {', '.join(names)}. Give each of them one number.")
        values = [prior[name] for name in names]
    else:
        values = list(prior)
        if len(values) != len(names):
            raise ValueError(f"prior has {len(values)} numbers for {len(names)} experts ({', '.join(names)}). Give each of them one.")
    for name, value in zip(names, values, strict=True):
        if not (_is_number(value) and value > 0):
            raise ValueError(f"The prior of {name!r} must be a number above 0, got {value!r}. Leave an expert out that should not be used.")
    return [value / sum(values) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
