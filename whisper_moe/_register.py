"""The one place that touches PEFT's own tables: it makes PEFT know the method "LORAMOE".

PEFT offers `register_peft_method` for the configuration, the model class and the prefix, but it refuses a name that is not a
member of its `PeftType` enum, and an enum cannot be extended from outside. So the member is added to the enum's tables by hand,
once, before registering. Nothing else of PEFT is changed, and running this twice does nothing the second time.

(`peft_s2lora` does the same for its own method. The two libraries do not import each other, so the mechanism stands twice.)
If a new PEFT version breaks this: `tests/test_moe_registration.py` says which table moved.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "LORAMOE"
PREFIX = "loramoe_"


def add_peft_type(name: str = NAME) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there yet. Its value equals its name, as for every PEFT method."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # makes `PeftType.LORAMOE` work; EnumType's own __setattr__ is for existing members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> PeftType:
    """Enter configuration and model class in PEFT's tables. Safe to run twice, also after a reload of this package."""
    member = add_peft_type()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
        return member
    if known.__module__ != model_cls.__module__:
        raise ImportError(
            f"PEFT already knows a method {NAME}, from {known.__module__}; whisper_moe would replace it. "
            "Use that one, or a PEFT version without it (peft>=0.21,<0.22)."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX
    return member
