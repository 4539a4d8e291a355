"""Is this adapter what it says, and can it do nothing but add to the base model? Decided before any model is touched.

The configuration is read through an allow-list of fields with bounds, and a *fresh* PEFT configuration is made from what is known. The
weights must be exactly the tensors that base and configuration ask for: one more could overwrite a base weight for good, because PEFT
loads with `strict=False`. Pure functions: plain data in, a configuration or `AdapterError` out.

To add a method: its fields in `_FIELDS`, the tensors it writes in `_EXPECTED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .adapter_files import AdapterError, AdapterFiles, is_line, short
from .naming import Pinned, is_hub_id

MAX_RANK = 1024
MAX_ALPHA = 65_536
MAX_ABS_VALUE = 10_000
"""Largest weight that is taken for one. Trained adapters stay below 100; far above, half precision overflows."""
_MAX_NAMES = 1024  # whisper-large-v2 has 512 weights that can be adapted
_FEW_PATTERNS = 16

PREFIX = "base_model.model."
"""What PEFT writes before the name of every tensor."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BaseModel:
    """What the checks need to know of a base model.

    Args:
        linear: Module name -> (d_out, d_in), of its linear layers.
        others: Names of its other modules.
        encoder: Path of the encoder, with a dot behind, in an encoder-decoder model; None in others.
        encoder_width: Width of the encoder's output there.
    """

    linear: Mapping[str, tuple[int, int]]
    others: frozenset[str] = frozenset()
    encoder: str | None = None
    encoder_width: int | None = None


# ---- the configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """What a field may hold. `kept`: it goes into the fresh configuration; otherwise it is only looked at."""

    expected: str
    holds: Callable[[Any], bool]
    kept: bool = True

    def or_none(self) -> _Rule:
        return _Rule(f"{self.expected}, or null", lambda value: value is None or self.holds(value), self.kept)

    def dropped(self) -> _Rule:
        return _Rule(self.expected, self.holds, kept=False)


_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}")  # of a module, or the end of one
_PATTERN_NAME = re.compile(r"\^?[A-Za-z0-9_]{1,64}(\\?\.[A-Za-z0-9_]{1,64}){0,15}")  # the same as `re.escape` writes it
_SHARE_PATTERN = re.compile(r"([A-Za-z0-9_]|\\\.|\.(?!\*))*(\.\*([A-Za-z0-9_]|\\\.|\.(?!\*))*){0,2}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_MODELING = re.compile(r"transformers\.models(\.[a-z0-9_]{1,64}){1,3}")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_share(value: Any) -> bool:
    return _is_number(value, 1e-9, 1e6)


def _is_name(value: Any, pattern: re.Pattern[str] = _NAME) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_list(value: Any, holds: Callable[[Any], bool], longest: int = _MAX_NAMES) -> bool:
    return isinstance(value, list) and len(value) <= longest and all(holds(entry) for entry in value)


def _is_dict(value: Any, key: Callable[[Any], bool], holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and len(value) <= _MAX_NAMES and all(key(k) and holds(v) for k, v in value.items())


def _is_auto_mapping(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"base_model_class", "parent_library"}:
        return False
    return _is_name(value["base_model_class"], _IDENTIFIER) and _is_name(value["parent_library"], _MODELING)


_RANK = _Rule(f"a whole number from 1 to {MAX_RANK}", lambda v: _is_whole(v, 1, MAX_RANK))
_ALPHA = _Rule(f"a number above 0 and up to {MAX_ALPHA}", lambda v: _is_number(v, 1e-6, MAX_ALPHA))
_DROPOUT = _Rule("a number from 0 to below 1", lambda v: _is_number(v, 0, 0.999))
_WEIGHT = _Rule("a number from 0 to 1e6", lambda v: _is_number(v, 0, 1e6))
_FLAG = _Rule("true or false", lambda v: isinstance(v, bool))
_STRING = _Rule("a short text", lambda v: is_line(v, 300))
_TARGETS = _Rule(f"a list of 1 to {_MAX_NAMES} plain module names (no regular expression)", lambda v: _is_list(v, _is_name) and len(v) > 0)
_NAMES = _Rule(f"a list of at most {_MAX_NAMES} plain module names (no regular expression)", lambda v: _is_list(v, _is_name))
_LAYERS = _Rule(
    "a layer's number or a list of them", lambda v: _is_whole(v, 0, 1000) or _is_list(v, lambda entry: _is_whole(entry, 0, 1000))
)
_LAYERS_PATTERN = _Rule("a plain name or a list of them", lambda v: _is_name(v, _IDENTIFIER) or _is_list(v, _is_name, 16))
_RANK_PATTERN = _Rule(
    f"at most {_MAX_NAMES} plain module names with ranks from 1 to {MAX_RANK}",
    lambda v: _is_dict(v, lambda key: _is_name(key, _PATTERN_NAME), _RANK.holds),
)
_ALPHA_PATTERN = _Rule(
    f"at most {_MAX_NAMES} plain module names with numbers above 0 and up to {MAX_ALPHA}",
    lambda v: _is_dict(v, lambda key: _is_name(key, _PATTERN_NAME), _ALPHA.holds),
)

_PRIOR = _Rule(
    "null, or at most 64 numbers above 0 and up to 1e6, with or without names",
    lambda v: v is None or _is_list(v, _is_share, 64) or _is_dict(v, lambda key: is_line(key, 300, 1), _is_share),
)


def _one_of(*values: object) -> _Rule:
    return _Rule(" or ".join(map(repr, values)), lambda v: any(type(v) is type(value) and v == value for value in values))


# What PEFT writes for every method. None of it is needed to attach an adapter, so none of it is kept.
_COMMON = {
    "peft_type": _STRING.dropped(),
    "peft_version": _STRING.or_none().dropped(),
    "task_type": _Rule("the name of a PEFT task, or null", lambda v: v is None or _is_name(v, _IDENTIFIER), kept=False),
    "base_model_name_or_path": _STRING.or_none().dropped(),
    "revision": _STRING.or_none().dropped(),
    "inference_mode": _FLAG.dropped(),
    "auto_mapping": _Rule(
        "null or the class and module of a model in transformers (it is never imported)",
        lambda v: v is None or _is_auto_mapping(v),
        kept=False,
    ),
    "fan_in_fan_out": _FLAG.dropped(),  # read from the layer's type
    "bias": _Rule("'none' (trained biases would replace the base model's)", lambda v: v == "none", kept=False),
    "target_modules": _TARGETS,
    "exclude_modules": _NAMES.or_none(),
    "layers_to_transform": _LAYERS.or_none(),
    "layers_pattern": _LAYERS_PATTERN.or_none(),
    "r": _RANK,
}

_FIELDS: dict[str, dict[str, _Rule]] = {
    "LORA": {
        "lora_alpha": _ALPHA,
        "lora_dropout": _DROPOUT,
        "use_rslora": _FLAG,
        "rank_pattern": _RANK_PATTERN,
        "alpha_pattern": _ALPHA_PATTERN,
        # Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, ...) subtract something from the base weights when the adapter is made.
        "init_lora_weights": _one_of(True, False, "gaussian", "orthogonal", "eva").dropped(),
        "eva_config": _Rule("null or plain values", lambda v: v is None or isinstance(v, dict), kept=False),
        "megatron_core": _one_of("megatron.core", None).dropped(),
        "qalora_group_size": _Rule("a whole number", lambda v: _is_whole(v, 0, 2**31), kept=False),
        "runtime_config": _Rule("null or the default", lambda v: v in (None, {}, {"ephemeral_gpu_offload": False}), kept=False),
    },
    "S2LORA": {
        "s2lora_alpha": _ALPHA.or_none(),
        "s2lora_dropout": _DROPOUT,
        "share_scope": _one_of("shape", "module_type", "global"),
        "share_groups": _Rule(
            "null or at most 16 patterns of letters, digits, '_', '\\.' and two '.*' each",
            lambda v: v is None or _is_list(v, lambda entry: _is_name(entry, _SHARE_PATTERN) and 0 < len(entry) <= 200, 16),
        ),
        "sparsity_weight": _WEIGHT,
        "coefficient_lr_multiplier": _WEIGHT.dropped(),
        "init_weights": _FLAG.dropped(),
        "group_ranks": _Rule(
            f"null or ranks from 1 to {MAX_RANK}", lambda v: v is None or _is_dict(v, lambda key: is_line(key, 300), _RANK.holds)
        ),
        "pool": _Rule("null or the name of an adapter", lambda v: v is None or _is_name(v, re.compile(r"[A-Za-z0-9_-]{1,64}"))),
        "pool_hash": _Rule("null or a SHA-256", lambda v: v is None or _is_name(v, re.compile(r"[0-9a-f]{64}"))),
    },
    "LORAMOE": {
        "loramoe_alpha": _ALPHA.or_none(),
        "loramoe_dropout": _DROPOUT,
        "experts": _Rule("null (the experts' tensors inside; save with save_experts='copy')", lambda v: v is None, kept=False),
        "expert_hashes": _Rule("null (the experts' tensors inside; save with save_experts='copy')", lambda v: v is None, kept=False),
        "save_experts": _one_of("copy"),
        "expert_names": _Rule("null or at most 64 short names", lambda v: v is None or _is_list(v, lambda e: is_line(e, 300, 1), 64)),
        "expert_ranks": _Rule(
            f"null or at most {_MAX_NAMES} module names with ranks from 1 to {MAX_RANK}",
            lambda v: v is None or _is_dict(v, _is_name, _RANK.holds),
        ),
        "router": _one_of("utterance", "token", "static", "language", None),
        "top_k": _Rule("null or a whole number from 1 to 64", lambda v: v is None or _is_whole(v, 1, 64)),
        "temperature": _Rule("a number from 1e-3 to 1e3", lambda v: _is_number(v, 1e-3, 1e3)),
        "prior": _PRIOR,  # where the router started; of a mixture whose gates are given, those that count where nobody gives any
        "balance_weight": _WEIGHT.dropped(),
        "entropy_weight": _WEIGHT.dropped(),
        "new_expert": _FLAG,
        "train_experts": _FLAG.dropped(),
        "init_weights": _FLAG.dropped(),
    },
}

TRUSTED = tuple(_FIELDS)
"""PEFT types that are trusted, once checked. Every other one is refused."""

_IMPORT = {"S2LORA": "import peft_s2lora", "LORAMOE": "from whisper_moe import LoraMoeConfig"}

_WHY_OFF = {
    "modules_to_save": "whole modules would replace the base model's",
    "trainable_token_indices": "rows of the embedding would replace the base model's",
    "layer_replication": "it rebuilds the base model",
    "loftq_config": "it changes the base weights",
    "corda_config": "it changes the base weights",
    "lora_ga_config": "it changes the base weights",
    "megatron_config": "it imports a module by name",
    "arrow_config": "it needs other adapters",
}


def check_config(config: Mapping[str, Any], label: str = "The adapter") -> dict[str, Any]:
    """The fields of `adapter_config.json` that say what the adapter computes, each within its bounds. Needs no PEFT.

    Args:
        config: What the file says.
        label: What to call the adapter in messages.

    Raises:
        AdapterError: The method is not a trusted one; a field is unknown, out of bounds, or could change the base model.
    """
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in _FIELDS:
        raise AdapterError(
            f"{label} has peft_type {short(method)}; trusted are {', '.join(TRUSTED)}. Other methods can often be saved as a LoRA "
            "(PEFT's convert_to_lora)."
        )
    rules = _COMMON | _FIELDS[method]
    for name, value in config.items():
        _check_field(name, value, rules.get(name), label)
    for name in ("r", "target_modules"):
        if name not in config:
            raise AdapterError(f"{label}: its configuration does not say {name}, expected {rules[name].expected}. Save it again with PEFT.")
    if config.get("pool") is not None and config.get("pool_hash") is None:
        raise AdapterError(f"{label} uses the pool {short(config['pool'])} and does not say its hash (pool_hash). Save it again.")
    return {name: value for name, value in config.items() if name in rules and rules[name].kept}


def fresh_config(config: Mapping[str, Any], label: str = "The adapter") -> Any:
    """A new `PeftConfig` with nothing in it but checked fields. Arguments and errors are those of `check_config`; besides, the package
    that brings the method must have been imported."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields, method = check_config(config, label), config["peft_type"]
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"{label} has peft_type {method!r}, which PEFT does not know yet. Run `{_IMPORT.get(method, 'import it')}` first."
        )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[method](**fields, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{label}: PEFT refuses its configuration: {short(error)}") from error


def _check_field(name: str, value: Any, rule: _Rule | None, label: str) -> None:
    if rule is None:
        if value is None or value is False or value == [] or value == {}:  # an option that is switched off, also one of a newer PEFT
            return
        why = _WHY_OFF.get(name, "it is not among the fields that are known to be safe")
        raise AdapterError(
            f"{label} sets {short(name)} to {short(value)}, and {why}. Train without it, or merge it into a model of its own."
        )
    if not rule.holds(value):
        raise AdapterError(f"{label} has {name}={short(value)}, expected {rule.expected}. Save it again without that, or do not use it.")


# ---- the tensors -------------------------------------------------------------------------------------------------------


def check_tensors(files: AdapterFiles, config: Any, base: BaseModel) -> None:
    """Compare the header of the weights with what base and configuration ask for: the same names, the same shapes, nothing else.

    Args:
        files: The adapter; its numbers are not looked at.
        config: From `fresh_config`.
        base: The model it is meant for.

    Raises:
        AdapterError: A tensor is missing, has another shape, or has no place.
    """
    expected = _EXPECTED[_method(config)](config, base, targets(config, base, files.label), files)
    missing = sorted(expected.keys() - files.tensors.keys())
    extra = sorted(files.tensors.keys() - expected.keys())
    if extra:
        raise AdapterError(
            f"{files.label} holds {len(extra)} tensor(s) that its configuration does not ask for, the first is {short(extra[0])}. They "
            "could overwrite weights of the base model. Configuration and weights are of different adapters, or somebody added something."
        )
    if missing:
        raise AdapterError(
            f"{files.label} lacks {len(missing)} tensor(s) that its configuration asks for, the first is {short(missing[0])}. It was made "
            "for another base model, or configuration and weights are of different adapters."
        )
    for name, shape in expected.items():
        if files.tensors[name].shape != shape:
            raise AdapterError(
                f"{files.label}: {short(name)} has shape {files.tensors[name].shape}; configuration and base model ask for {shape}. "
                "It was made for another base model, or configuration and weights are of different adapters."
            )


def check_values(tensors: Mapping[str, Any], label: str) -> None:
    """Refuse numbers that no training gives: NaN, infinity, beyond `MAX_ABS_VALUE`. `tensors`: name -> torch tensor."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        low, high = (float(bound) for bound in tensor.aminmax())  # NaN wins over every number
        if not (low >= -MAX_ABS_VALUE and high <= MAX_ABS_VALUE):
            raise AdapterError(
                f"{label}: {short(name)} holds numbers from {low:.3g} to {high:.3g}; trained weights are finite and at most "
                f"{MAX_ABS_VALUE:,}. The adapter is broken or hostile; do not use it."
            )


def targets(config: Any, base: BaseModel, label: str) -> list[str]:
    """Names of the modules that an adapter adapts, in the model's order, by PEFT's own rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    found = [name for name in base.linear if check_target_module_exists(config, name)]
    others = sorted(name for name in base.others if check_target_module_exists(config, name))
    if others:
        raise AdapterError(
            f"{label} adapts {others[0]}, which is no linear layer. Only linear layers are known to be safe. Train it without "
            f"{others[0].rpartition('.')[2]!r} in target_modules."
        )
    if not found:
        raise AdapterError(
            f"{label} adapts {short(sorted(config.target_modules))}, and this model has none of these. It was made for another base model."
        )
    return found


def _method(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _lora_shapes(config: Any, base: BaseModel, names: list[str], files: AdapterFiles) -> Shapes:
    ranks = _by_module(config.rank_pattern, names, config.r)
    _shorten_patterns(config, names, ranks)
    shapes: Shapes = {}
    for name in names:
        d_out, d_in = base.linear[name]
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (ranks[name], d_in)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (d_out, ranks[name])
    return shapes


def _by_module(patterns: Mapping[str, Any], names: list[str], otherwise: Any) -> dict[str, Any]:
    """Module name -> value of the first pattern that fits its end, as PEFT reads `rank_pattern` and `alpha_pattern`."""
    values = {}
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    for name in names:
        values[name] = next((value for pattern, value in compiled if pattern.match(name)), otherwise)
    return values


def _shorten_patterns(config: Any, names: list[str], ranks: dict[str, int]) -> None:
    """One pattern per value instead of one per module: PEFT compiles them all again for every module, which takes half a minute."""
    alphas = _by_module(config.alpha_pattern, names, config.lora_alpha)
    for field, values, usual in (("rank_pattern", ranks, config.r), ("alpha_pattern", alphas, config.lora_alpha)):
        if len(getattr(config, field)) > _FEW_PATTERNS:
            unusual = {value: [re.escape(name) for name in names if values[name] == value] for value in set(values.values()) - {usual}}
            setattr(config, field, {f"^(?:{'|'.join(modules)})": value for value, modules in unusual.items()})


def _s2lora_shapes(config: Any, base: BaseModel, names: list[str], files: AdapterFiles) -> Shapes:
    shapes: Shapes = {}
    for key, members in _groups(config, base, names):
        rank = config.group_rank(key)
        shapes |= {f"{PREFIX}{name}.s2lora_coefficients": (rank,) for name in members}
        if config.pool is None:  # the pair is saved once, under whichever layer of the group owned it
            owner = next((name for name in members if f"{PREFIX}{name}.s2lora_A" in files.tensors), members[0])
            shapes[f"{PREFIX}{owner}.s2lora_A"] = (rank, max(base.linear[name][1] for name in members))
            shapes[f"{PREFIX}{owner}.s2lora_B"] = (max(base.linear[name][0] for name in members), rank)
    return shapes


def _groups(config: Any, base: BaseModel, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(config.sharing_key(name, *base.linear[name]), []).append(name)
    yield from members.items()


def _loramoe_shapes(config: Any, base: BaseModel, names: list[str], files: AdapterFiles) -> Shapes:
    shapes: Shapes = {}
    num_experts = len(config.names)
    for name in names:
        d_out, d_in = base.linear[name]
        if config.new_expert:
            shapes |= {f"{PREFIX}{name}.loramoe_A": (config.r, d_in), f"{PREFIX}{name}.loramoe_B": (d_out, config.r)}
        rank = (config.expert_ranks or {}).get(name, 0)
        if not rank or not num_experts:
            continue
        shapes[f"{PREFIX}{name}.loramoe_experts_A"] = (num_experts, rank, d_in)
        shapes[f"{PREFIX}{name}.loramoe_experts_B"] = (num_experts, rank, d_out)
        if config.router in ("utterance", "token"):
            reads_encoder = config.router == "utterance" and base.encoder is not None and not name.startswith(base.encoder)
            width = base.encoder_width if reads_encoder and base.encoder_width is not None else d_in
            shapes[f"{PREFIX}{name}.loramoe_router_weight"] = (num_experts, width)
        if config.router != "language":
            shapes[f"{PREFIX}{name}.loramoe_router_bias"] = (num_experts,)
    return shapes


_EXPECTED: dict[str, Callable[[Any, BaseModel, list[str], AdapterFiles], Shapes]] = {
    "LORA": _lora_shapes,
    "S2LORA": _s2lora_shapes,
    "LORAMOE": _loramoe_shapes,
}


# ---- the base ----------------------------------------------------------------------------------------------------------


def declared_base(config: Mapping[str, Any], language: Mapping[str, Any] | None = None) -> str | None:
    """The Hub id of the base model that an adapter says it was made for; None if it says none, or a path.

    Args:
        config: `adapter_config.json`.
        language: `language_adapter.json`, which counts first: PEFT writes down what the model was loaded from, be it a folder.
    """
    said = (language or {}).get("base_model", config.get("base_model_name_or_path"))
    return said if isinstance(said, str) and is_hub_id(said) else None


def declared_pool(config: Mapping[str, Any], language: Mapping[str, Any] | None = None) -> Pinned | None:
    """Where the pool of a pooled S2-LoRA is published, as its record says (`pool_source`); None if it says nothing readable, or has none.

    Args:
        config: `adapter_config.json`.
        language: `language_adapter.json`.
    """
    said = (language or {}).get("pool_source")
    if config.get("pool") is None or not isinstance(said, str):
        return None
    try:
        return Pinned.parse(said)
    except ValueError:
        return None


def check_same_base(files: AdapterFiles, base_model: str | None) -> bool:
    """Compare the base an adapter was made for with the one at hand, by name. Returns whether both are known.

    Raises:
        AdapterError: They differ: models of one size accept each other's adapters, and write nonsense.
    """
    made_for = declared_base(files.config, files.language)
    if made_for is None or base_model is None:
        return False
    if made_for != base_model:
        raise AdapterError(
            f"{files.label} was made for {made_for!r}, not for {base_model!r}. Load that base model; if it is the same under another name, "
            f"say base_model={made_for!r}."
        )
    return True
