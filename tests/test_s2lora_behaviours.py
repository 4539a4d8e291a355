"""S2-LoRA held to the behaviours of PEFT's own tuners (tuner_behaviours.py), once for each way of sharing that differs in code."""

from __future__ import annotations

from typing import Any, ClassVar

from tuner_behaviours import SHALLOW_CASES, TunerBehaviours

from peft_s2lora import S2LoraConfig


class TestSharedByShape(TunerBehaviours):
    """The default: one pair (A, B) per size of weight."""

    prefix = "s2lora_"

    def new_config(self, **kwargs: Any) -> S2LoraConfig:
        return S2LoraConfig(r=4, **kwargs)


class TestSharedByAll(TunerBehaviours):
    """One pair at the largest size, of which smaller weights use a slice; with a scaling other than 1."""

    prefix = "s2lora_"
    cases: ClassVar = {name: SHALLOW_CASES[name] for name in ("mlp", "embedding_conv1d", "whisper")}

    def new_config(self, **kwargs: Any) -> S2LoraConfig:
        return S2LoraConfig(r=3, s2lora_alpha=6, share_scope="global", **kwargs)
