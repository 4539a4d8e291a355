"""Recipes: every flag can stand in one, each value has its type, and what YAML makes of a word is not taken for what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from whisper_moe.cli_train import Train
from whisper_moe.train_settings import TrainSettings, check_logger
from whisper_moe.training_recipe import read_recipe

KEYS: dict[str, Any] = {
    "language": str | None,
    "out": Path | None,
    "max_steps": int | None,
    "learning_rate": float | None,
    "augment": bool | None,
    "data": tuple[str, ...] | None,
    "weights": tuple[float, ...] | None,
    "method": Literal["s2lora", "lora"] | None,
}


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def test_values_have_the_types_of_their_keys(tmp_path: Path) -> None:
    text = """
    # a comment
    language: cy
    out: adapters/cy
    max_steps: 100
    learning_rate: 1e-3
    augment: false
    data: [one, two]
    weights: [3, 0.5]
    method: lora
    """
    assert read_recipe(recipe(tmp_path, text), KEYS) == {
        "language": "cy",
        "out": Path("adapters/cy"),
        "max_steps": 100,
        "learning_rate": 0.001,
        "augment": False,
        "data": ("one", "two"),
        "weights": (3.0, 0.5),
        "method": "lora",
    }
    assert read_recipe(recipe(tmp_path, "data: one\nlanguage:\nlearning_rate: 1"), KEYS) == {"data": ("one",), "learning_rate": 1.0}
    assert read_recipe(recipe(tmp_path, ""), KEYS) == {}
    assert read_recipe(recipe(tmp_path, 'language: "no"'), KEYS) == {"language": "no"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("langauge: cy", "unknown key 'langauge'; did you mean 'language'?"),
        ("zzz: 1", "Known: language, out"),
        ("language: no", 'language is false (bool), expected text. YAML reads a bare no or off or false so. Quote it if that is what you '
         'mean: "no" is Norwegian'),
        ("data: [one, off]", "data, entry 2 is false"),
        ("language: 12", 'language is 12 (int), expected text. Quote it: "12".'),
        ("max_steps: 1.5", "max_steps is 1.5 (float), expected a whole number"),
        ("max_steps: true", "max_steps is true (bool), expected a whole number"),
        ("max_steps: ten", "max_steps is 'ten' (str), expected a whole number"),
        ("learning_rate: quick", "learning_rate is 'quick' (str), expected a number"),
        ("augment: 1", "augment is 1 (int), expected true or false"),
        ("augment: [true]", "augment is [True] (list)"),
        ("method: dora", "method is 'dora' (str), expected one of s2lora, lora"),
        ("weights: [1, x]", "weights, entry 2 is 'x'"),
        ("language: cy\nout: a\nlanguage: br", "line 3: the key 'language' stands twice"),
        ("- language: cy", "holds a list"),
        ("just words", "holds a str"),
        ("language: [cy", "is not YAML"),
        ("language: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("? [a]\n: b", "is not"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_mean_is_refused_with_what_was_expected(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_recipe(recipe(tmp_path, text), KEYS)
    assert words in str(error.value)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "gone.yaml", KEYS)
    with pytest.raises(ValueError, match="--data"):
        read_recipe(tmp_path / "clips", KEYS)


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "language: cy\nmax_steps: 100\naugment: false\nbatch_size: 4\ntarget_modules: [q_proj]")
    asked = Train(recipe=path, max_steps=5, augment=True).with_recipe()
    assert (asked.language, asked.max_steps, asked.augment, asked.batch_size, asked.target_modules) == ("cy", 5, True, 4, ("q_proj",))
    assert asked._settings() == {"max_steps": 5, "augment": True, "batch_size": 4}
    for flag in ("resume: true", "dry_run: true", "recipe: other.yaml"):
        with pytest.raises(ValueError, match="unknown key"):
            Train(recipe=recipe(tmp_path, flag)).with_recipe()


def test_every_setting_has_a_flag_of_its_type() -> None:
    from typing import Literal, get_args, get_origin, get_type_hints

    flags, settings = get_type_hints(Train), get_type_hints(TrainSettings)
    for name, wanted in settings.items():
        kinds = {type(each) for hint in get_args(flags[name]) for each in (get_args(hint) or ())} or set(get_args(flags[name]))
        if get_origin(wanted) is Literal:
            assert wanted in get_args(flags[name]), name
            continue
        assert (wanted in kinds) or set(get_args(wanted)) & kinds, name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"patience": 0}, "patience is 0"),
        ({"best_metric": "bleu"}, "Known: cer, wer"),
        ({"log_to": "mlflow"}, "none, tensorboard, trackio, wandb"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"cache_encoder_states": True}, "Set augment to false"),
        ({"cache_encoder_states": True, "augment": False, "crop_share": 0.5}, "cached encoder states have one window"),
        ({"crop_states": True}, "Add cache_encoder_states"),
        ({"storage": "int8"}, "Known: float16, model"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_made(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSettings(**values)


@pytest.mark.parametrize("package", ["tensorboard", "trackio", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_with_the_line_that_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in (package, "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_logger(package)
    check_logger("none")
