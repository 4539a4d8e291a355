"""`S2LoraConfig`: what it refuses and with which words, and which weights it lets share."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from peft import LoraConfig, PeftType, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from tuner_behaviours import CASES

from peft_s2lora import S2LoraConfig

REFUSED = [
    ({"r": 0}, "r must be a whole number from 1 up, got 0"),
    ({"r": -3}, "got -3"),
    ({"r": 2.5}, "got 2.5"),
    ({"r": True}, "got True"),
    ({"s2lora_alpha": 0}, "s2lora_alpha must be a number above 0, got 0"),
    ({"s2lora_alpha": float("nan")}, "got nan"),
    ({"s2lora_dropout": 1.0}, "s2lora_dropout must be from 0 to below 1, got 1.0"),
    ({"s2lora_dropout": -0.1}, "got -0.1"),
    ({"sparsity_weight": -1}, "sparsity_weight must be 0 or above, got -1"),
    ({"sparsity_weight": float("inf")}, "got inf"),
    ({"coefficient_lr_multiplier": 0}, "coefficient_lr_multiplier must be above 0, got 0"),
    ({"share_scope": "size"}, "share_scope must be one of shape, module_type, global, got 'size'"),
    ({"share_groups": ".*encoder.*"}, "share_groups must be a list"),
    ({"share_groups": ["("]}, "not a regular expression"),
    ({"target_modules": "(q_proj"}, "not a regular expression"),
    ({"bias": "lora_only"}, "bias must be one of none, all, s2lora_only, got 'lora_only'"),
    ({"layers_pattern": "layers"}, "give layers_to_transform too"),
    ({"group_ranks": {"16x16": 0}}, "must be a whole number from 1 up, got 0"),
]


@pytest.mark.parametrize(("kwargs", "message"), REFUSED, ids=[str(kwargs) for kwargs, _ in REFUSED])
def test_a_value_that_cannot_work_is_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        S2LoraConfig(**kwargs)


def test_every_field_has_a_default_and_help():
    config = S2LoraConfig()
    assert config.peft_type == PeftType.S2LORA
    own = [field for field in dataclasses.fields(S2LoraConfig) if field.name not in {f.name for f in dataclasses.fields(LoraConfig)}]
    assert all(field.metadata.get("help") for field in own)
    assert all(f"{field.name} (`" in S2LoraConfig.__doc__ for field in own)


def test_alpha_is_r_unless_given_and_zero_is_not_taken_for_missing():
    assert S2LoraConfig(r=8).scaling == 1
    assert S2LoraConfig(r=8, s2lora_alpha=4).scaling == 0.5
    assert S2LoraConfig(sparsity_weight=0).sparsity_weight == 0


def test_the_callers_lists_are_not_changed():
    targets, excluded = ["q_proj"], ["k_proj"]
    S2LoraConfig(target_modules=targets, exclude_modules=excluded)
    assert (targets, excluded) == (["q_proj"], ["k_proj"])


def test_names_are_saved_in_sorted_order_so_that_equal_configurations_are_equal_files(tmp_path):
    names = ["v_proj", "q_proj", "fc1", "out_proj", "k_proj", "fc2", "conv1", "conv2"]
    S2LoraConfig(target_modules=names, exclude_modules=names).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)


def test_share_scopes_name_the_groups():
    name = "model.encoder.layers.0.self_attn.q_proj"
    assert S2LoraConfig().sharing_key(name, 16, 24) == "16x24"
    assert S2LoraConfig(share_scope="module_type").sharing_key(name, 16, 24) == "q_proj:16x24"
    assert S2LoraConfig(share_scope="global").sharing_key(name, 16, 24) == "global"
    split = S2LoraConfig(share_groups=[r".*encoder\.layers.*", r".*\.encoder_attn\..*"])
    assert split.sharing_key(name, 16, 24) == r".*encoder\.layers.*/16x24"
    assert split.sharing_key("model.decoder.layers.0.encoder_attn.q_proj", 16, 24) == r".*\.encoder_attn\..*/16x24"
    assert split.sharing_key("model.decoder.layers.0.self_attn.q_proj", 16, 24) == "16x24"


# ---- refused when the adapter meets the model -------------------------------------------------------------------------


def test_targets_that_match_nothing_name_the_nearest():
    with pytest.raises(NoMatchingPeftModuleError, match="Nearest names in this model: q_proj"):
        get_peft_model(CASES["whisper"].base(), S2LoraConfig(target_modules=["q_prj"]))
    with pytest.raises(ValueError, match=r"Names that can be adapted in this model: .*fc1"):
        get_peft_model(CASES["whisper"].base(), S2LoraConfig(target_modules=".*nothing.*"))


def test_a_target_among_others_that_matches_nothing_is_a_warning():
    with pytest.warns(UserWarning, match=r"target_modules \['v_prj'\] match nothing in this model. Nearest names in this model: v_proj"):
        get_peft_model(CASES["whisper"].base(), S2LoraConfig(target_modules=["q_proj", "v_prj"]))


def test_an_unsupported_layer_is_refused_before_anything_is_changed():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.conv = nn.Conv2d(1, 1, 1)

    model = Mixed()
    with pytest.raises(ValueError, match="Target module conv is a Conv2d, which is not supported"):
        get_peft_model(model, S2LoraConfig(target_modules=["first", "conv"]))
    assert type(model.first) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_sharing_pattern_that_matches_no_adapted_module_is_refused():
    with pytest.raises(ValueError, match="share_groups holds 'encoder'"):
        get_peft_model(CASES["whisper"].base(), S2LoraConfig(share_groups=["encoder"]))


@pytest.mark.parametrize("name", ["encoder", "q_proj", "model", "keys", "a.b", ""])
def test_an_adapter_name_that_collides_is_refused(name):
    model = get_peft_model(CASES["whisper"].base(), S2LoraConfig())
    with pytest.raises(ValueError, match="name"):
        model.add_adapter(name, S2LoraConfig())
    assert list(model.peft_config) == ["default"]


def test_two_adapters_with_trained_biases_are_refused():
    model = get_peft_model(CASES["mlp"].base(), S2LoraConfig(target_modules=["lin0"], bias="all"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", S2LoraConfig(target_modules=["lin0"], bias="all"))


def test_a_weighted_sum_of_adapters_is_refused_with_the_way_round():
    model = get_peft_model(CASES["mlp"].base(), S2LoraConfig(target_modules=["lin0"]))
    with pytest.raises(NotImplementedError, match="they add up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# ---- which modules are adapted ----------------------------------------------------------------------------------------


def adapted_names(**kwargs) -> set[str]:
    model = get_peft_model(CASES["whisper"].base(), S2LoraConfig(r=2, **kwargs))
    return {name.removeprefix("model.") for name in model.targeted_module_names}


def test_whisper_is_adapted_in_all_attention_projections_by_default():
    expected = {f"encoder.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in ("q", "k", "v", "out")}
    expected |= {f"decoder.layers.{n}.{a}.{p}_proj" for n in (0, 1) for a in ("self_attn", "encoder_attn") for p in ("q", "k", "v", "out")}
    assert adapted_names() == expected


def test_targets_may_be_a_regular_expression():
    assert adapted_names(target_modules=r".*decoder.*fc1") == {"decoder.layers.0.fc1", "decoder.layers.1.fc1"}


def test_all_linear_takes_every_linear_layer_but_the_output_layer():
    names = adapted_names(target_modules="all-linear")
    assert len(names) == 2 * 6 + 2 * 10
    assert not any("proj_out" in name for name in names)


def test_modules_can_be_excluded():
    assert not any("encoder_attn" in name for name in adapted_names(exclude_modules=r".*encoder_attn.*"))


def test_layers_can_be_chosen_by_number():
    assert all(".1." in name for name in adapted_names(layers_to_transform=[1], layers_pattern="layers"))


def test_known_architectures_need_no_targets():
    for case in ("decoder", "encoder_decoder", "whisper"):
        get_peft_model(CASES[case].base(), S2LoraConfig(r=2))
