"""Which adapter is chosen and why, and where from; and that switching adapters gives what PEFT gives and never touches the base."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAMPLE_RATE, base_hash, build_tiny_model, build_tiny_processor, tone, write_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from hub_utils import load_adapter
from peft_s2lora import S2LoraConfig
from whisper_moe import LoraMoeConfig
from whisper_moe.base_signature import WrongBaseError
from whisper_moe.languages import LanguagePosterior
from whisper_moe.registry import AdapterRegistry, AdapterSwitch, LanguageAdapter, check_fit

S2LORA = S2LoraConfig(r=4, target_modules=["q_proj", "v_proj", "out_proj"], init_weights=False)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `...` removes one."""
    row = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not ...}))


# ---- one adapter -------------------------------------------------------------------------------------------------------


def test_a_folder_tells_all_about_its_adapter(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("qug", name="kichwa", carrier="Spanish", domain="radio")
    adapter = LanguageAdapter.load(folder)
    assert (adapter.name, adapter.language, adapter.carrier, adapter.domain) == ("kichwa", "qug", "es", "radio")
    assert (adapter.peft_type, adapter.base, adapter.prompt_language) == ("LORA", "tiny-whisper", "es")
    assert adapter.num_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert adapter.num_parameters == sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert adapter.metrics["after"]["wer"] == 0.5


def test_a_language_of_whisper_is_its_own_prompt(make_adapter: Callable[..., Path]) -> None:
    assert LanguageAdapter.load(make_adapter("cy")).prompt_language == "cy"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2"),
        ({"language": ...}, "does not say its 'language'"),
        ({"language": "Frensh"}, "French"),
        ({"language": "qug"}, "needs a carrier"),
        ({"carrier": "qug"}, "no token in Whisper either"),
        ({"name": "none"}, "cannot be called 'none'"),
        ({"name": ""}, "cannot be called"),
        ({"num_parameters": ...}, "num_parameters"),
        # what a stranger's file could do to a terminal or a page
        ({"name": "cy\x1b[2J"}, "name is .* expected one line"),
        ({"name": "x" * 201}, "at most 200 letters"),
        ({"domain": ["child"]}, "domain is .* expected one line"),
        ({"base_model": None}, "base_model is None"),
        ({"num_parameters": "many"}, "num_parameters is 'many'; expected a whole number"),
        ({"metrics": [1]}, "metrics is .* expected an object"),
        ({"metrics": {"after": {"wer": "<b>0</b>"}}}, "metrics.after is .* expected wer, cer and clips as numbers"),
        ({"metrics": {"before": 3}}, "metrics.before is 3"),
        ({"metrics": {"after": {"wer": 10**400}}}, "metrics.after is .* rates from 0 to 100"),
        ({"metrics": {"after": {"cer": 1e300}}}, "metrics.after is .* rates from 0 to 100"),
        ({"metrics": {"before": {"wer": -0.5}}}, "metrics.before is .* rates from 0 to 100"),
        ({"metrics": {"after": {"wer": math.nan}}}, "metrics.after is .* rates from 0 to 100"),
        ({"metrics": {"after": {"clips": math.nan}}}, "metrics.after is .* whole clips"),
        ({"metrics": {"after": {"clips": 0.5}}}, "metrics.after is .* whole clips"),
        ({"metrics": {"after": {"clips": 10**9}}}, "metrics.after is .* whole clips"),
        ({"metrics": {"test_set": {"a": 1}}}, "metrics.test_set is .* expected one line"),
        ({"metrics": {"normalizer": "x" * 201}}, "metrics.normalizer is .* at most 200 letters"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(make_adapter: Callable[..., Path], changes: dict[str, Any], words: str) -> None:
    folder = make_adapter("cy")
    edit_json(folder / "language_adapter.json", **changes)
    with pytest.raises(ValueError, match=words):
        LanguageAdapter.load(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "language_adapter.json"])
def test_a_folder_without_one_of_the_files_is_refused_by_its_name(make_adapter: Callable[..., Path], file: str) -> None:
    folder = make_adapter("cy")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"lacks {file}"):
        LanguageAdapter.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_description_that_is_no_json_is_refused(make_adapter: Callable[..., Path], text: str) -> None:
    folder = make_adapter("cy")
    (folder / "language_adapter.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"language_adapter\.json"):
        LanguageAdapter.load(folder)


# ---- the registry ------------------------------------------------------------------------------------------------------


def card(name: str, language: str, domain: str | None = None, carrier: str | None = None) -> LanguageAdapter:
    return LanguageAdapter(name, Path(name), language, domain, carrier, "LORA", "tiny", None, 1, 1, {})


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry([card("welsh", "cy"), card("kichwa", "qug", carrier="es"), card("kids", "en", domain="child")])


def test_a_folder_of_folders_is_a_registry(make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("cy"), make_adapter("qug", carrier="es")]
    (folders[0].parent / "notes").mkdir()
    registry = AdapterRegistry.from_folder(folders[0].parent)
    assert [adapter.name for adapter in registry] == ["cy", "qug"]
    assert [adapter.name for adapter in AdapterRegistry.from_folder(folders[1])] == ["qug"]
    with pytest.raises(ValueError, match="no folder"):
        AdapterRegistry.from_folder(folders[0] / "gone")


def test_the_registry_says_what_it_knows(registry: AdapterRegistry) -> None:
    assert registry.languages() == ["cy", "qug"]
    assert len(registry) == 3
    assert registry.for_language("en") is None  # a domain adapter is chosen by name only
    found = registry.for_language("cy")
    assert found is not None
    assert found.name == "welsh"
    with pytest.raises(ValueError, match=r"no adapter 'klingon'. Known: welsh \(Welsh\), kichwa \(Kichwa\), kids \(English\)"):
        registry["klingon"]


def test_names_are_unique_and_can_be_freed(registry: AdapterRegistry) -> None:
    with pytest.raises(ValueError, match="adapter 'welsh' already"):
        registry.add(card("welsh", "cy"))
    registry.remove("welsh")
    registry.add(card("welsh", "cy"))
    with pytest.raises(ValueError, match="no adapter 'gone'"):
        registry.remove("gone")


def test_two_adapters_for_a_language_are_an_error_that_lists_them(registry: AdapterRegistry) -> None:
    registry.add(card("welsh-2", "cy"))
    with pytest.raises(ValueError, match="2 adapters write Welsh: 'welsh', 'welsh-2'"):
        registry.choose(heard(cy=0.9, en=0.1))
    assert registry.choose(None, adapter="welsh-2").language == "cy"


# ---- choosing ----------------------------------------------------------------------------------------------------------


def heard(**probabilities: float) -> LanguagePosterior:
    return LanguagePosterior(dict(sorted(probabilities.items(), key=lambda item: -item[1])), 0.0)


@pytest.mark.parametrize(
    ("posterior", "options", "expected"),
    [
        # (adapter, language, prompt language, probability, a word of the warning or None)
        (heard(cy=0.9, en=0.1), {}, ("welsh", "cy", "cy", 0.9, None)),
        (heard(fr=0.9, cy=0.1), {}, (None, "fr", "fr", 0.9, None)),
        (heard(en=0.9, cy=0.1), {}, (None, "en", "en", 0.9, None)),
        (heard(cy=0.4, en=0.35, fr=0.25), {}, (None, "cy", "cy", 0.4, "uncertain: Welsh 40%, English 35%, French 25%")),
        (heard(cy=0.4, en=0.35, fr=0.25), {"threshold": 0.4}, ("welsh", "cy", "cy", 0.4, None)),
        (heard(cy=0.9, en=0.1), {"threshold": 0.95}, (None, "cy", "cy", 0.9, "uncertain")),
        (heard(cy=0.9, en=0.1), {"adapter": "none"}, (None, "cy", "cy", 0.9, None)),
        (heard(cy=0.9, en=0.1), {"adapter": "kids"}, ("kids", "en", "en", 0.1, None)),
        (None, {"adapter": "kids"}, ("kids", "en", "en", None, None)),
        (None, {"adapter": "kids", "language": "en"}, ("kids", "en", "en", None, None)),
        (None, {"language": "cy"}, ("welsh", "cy", "cy", None, None)),
        (None, {"language": "qug"}, ("kichwa", "qug", "es", None, None)),
        (None, {"language": "fr"}, (None, "fr", "fr", None, r"No adapter for French ('fr'). Adapters: welsh (Welsh)")),
        (None, {"language": "cy", "adapter": "none"}, (None, "cy", "cy", None, None)),
        (None, {"language": "fr", "written": ["fr"]}, (None, "fr", "fr", None, None)),
        (None, {"language": "fi", "written": ["fr"]}, (None, "fi", "fi", None, "never learnt to write it")),
        (heard(fi=0.9, cy=0.1), {"written": ["fr"]}, (None, "fi", "fi", 0.9, "never learnt to write it")),
        (heard(fr=0.9, cy=0.1), {"written": ["fr"]}, (None, "fr", "fr", 0.9, None)),
    ],
)
def test_the_choice_and_its_warning(
    registry: AdapterRegistry, posterior: LanguagePosterior | None, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    decision = registry.choose(posterior, **options)
    adapter, language, prompt, probability, warning = expected
    assert (decision.adapter.name if decision.adapter else None) == adapter
    assert (decision.language, decision.prompt_language, decision.probability) == (language, prompt, probability)
    assert decision.reason.endswith(".")
    assert (decision.warning is None) == (warning is None)
    assert warning is None or warning in str(decision.warning)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "chr"}, r"no token for Cherokee \('chr'\), and no adapter writes it. Adapters: welsh"),
        ({"language": "qug", "adapter": "none"}, "no token for Kichwa"),
        ({"language": "fr", "adapter": "welsh"}, "'welsh' writes Welsh, not French"),
        ({"adapter": "klingon"}, "no adapter 'klingon'"),
        ({}, "Nothing to choose by"),
    ],
)
def test_what_nobody_can_write_is_refused(registry: AdapterRegistry, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.choose(None, **options)


# ---- the switch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(tiny_processor: Any) -> torch.Tensor:
    return tiny_processor.feature_extractor([tone(300)], sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features


def logits(model: Any, features: torch.Tensor) -> torch.Tensor:
    """(1, 3, vocabulary) for a fixed beginning."""
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[257, 258, 70]])).logits


def alone(model: Any, folder: Path, features: torch.Tensor) -> torch.Tensor:
    """The logits of PEFT's own loading on a fresh copy of the base."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)), features)


@pytest.mark.parametrize(
    "configs",
    [
        (None, None),
        (None, S2LORA),
        (S2LORA, S2LoraConfig(r=2, target_modules=["fc1", "q_proj"], share_scope="module_type", init_weights=False)),
        (None, LoraConfig(r=3, target_modules=["fc2"], modules_to_save=["conv1"])),
        (LoraConfig(r=3, target_modules=r".*decoder.*q_proj"), LoraConfig(r=1, target_modules=["fc2"], use_dora=True)),
    ],
    ids=["two LoRAs", "LoRA and S2-LoRA", "two S2-LoRAs of different size", "LoRA and a saved module", "other places, DoRA"],
)
def test_a_then_b_then_a_is_what_each_is_alone_and_the_base_keeps_its_bytes(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, configs: tuple[Any, Any]
) -> None:
    folders = [make_adapter("cy", peft_config=configs[0], seed=1), make_adapter("fr", peft_config=configs[1], seed=2)]
    expected = [alone(tiny_model, folder, features) for folder in folders]
    bare, names = logits(tiny_model, features), set(tiny_model.state_dict())
    before = base_hash(tiny_model, names)
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    switch, adapters = AdapterSwitch(tiny_model), [LanguageAdapter.load(folder) for folder in folders]
    for turn in (0, 1, 0, 1, 1, 0):
        with switch.active(adapters[turn]) as model:
            assert torch.allclose(logits(model, features), expected[turn], atol=1e-5)
            assert base_hash(tiny_model, names) == before
        assert torch.equal(logits(tiny_model, features), bare)
        assert not any(parameter.requires_grad for name, parameter in tiny_model.named_parameters() if "language" in name)
    assert switch.unload() is tiny_model
    assert set(tiny_model.state_dict()) == names
    assert base_hash(tiny_model, names) == before


def test_none_is_the_base_and_contexts_nest(tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor) -> None:
    first, second = LanguageAdapter.load(make_adapter("cy")), LanguageAdapter.load(make_adapter("fr", peft_config=S2LORA))
    bare, expected = logits(tiny_model, features), alone(tiny_model, first.path, features)
    switch = AdapterSwitch(tiny_model)
    with switch.active(first):
        with switch.active(None):
            assert torch.equal(logits(tiny_model, features), bare)
        with switch.active(second):
            assert not torch.allclose(logits(tiny_model, features), expected, atol=0.1)
        assert torch.allclose(logits(tiny_model, features), expected, atol=1e-5)
    assert torch.equal(logits(tiny_model, features), bare)


def test_if_the_outer_adapter_cannot_come_back_the_base_is_at_work(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor
) -> None:
    first, second = LanguageAdapter.load(make_adapter("cy")), LanguageAdapter.load(make_adapter("fr"))
    bare, switch = logits(tiny_model, features), AdapterSwitch(tiny_model)
    context = switch.active(first)
    context.__enter__()
    with pytest.raises(ValueError, match="are gone"), switch.active(second):
        (first.path / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(tiny_model, features), bare)


def test_an_error_inside_the_context_restores_the_base(tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor) -> None:
    bare, switch = logits(tiny_model, features), AdapterSwitch(tiny_model)
    with pytest.raises(KeyboardInterrupt), switch.active(LanguageAdapter.load(make_adapter("cy"))):
        raise KeyboardInterrupt
    assert torch.equal(logits(tiny_model, features), bare)


@pytest.mark.parametrize("name", ["lo", "lora_A", "en.child", "default", "weight", "a b"])
def test_any_name_will_do(tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, name: str) -> None:
    folder = make_adapter("cy", name=name)
    expected = alone(tiny_model, folder, features)
    with AdapterSwitch(tiny_model).active(LanguageAdapter.load(folder)):
        assert torch.allclose(logits(tiny_model, features), expected, atol=1e-5)


def test_an_adapter_that_is_trained_anew_in_place_is_loaded_anew(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor
) -> None:
    base, folder = copy.deepcopy(tiny_model), make_adapter("cy")
    switch = AdapterSwitch(tiny_model)
    with switch.active(LanguageAdapter.load(folder)):
        assert torch.allclose(logits(tiny_model, features), alone(base, folder, features), atol=1e-5)
    write_adapter(folder, base, "cy", seed=7)
    with switch.active(LanguageAdapter.load(folder)):
        assert torch.allclose(logits(tiny_model, features), alone(base, folder, features), atol=1e-5)


# Each spoils a healthy adapter folder; the words are in the message.


def _add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | {f"base_model.model.{name}": tensor}, weights)


def _without_weights(folder: Path, model: Any) -> str:
    (folder / "adapter_model.safetensors").unlink()
    return "files of the adapter 'bad' are gone"


def _cut_off(folder: Path, model: Any) -> str:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "cannot be read"


def _for_another_base(folder: Path, model: Any) -> str:
    write_adapter(folder, build_tiny_model(build_tiny_processor(), seed=5), "cy", name="bad")
    return "was made for 'tiny-whisper', not for"


def _for_another_size(folder: Path, model: Any) -> str:
    write_adapter(folder, build_tiny_model(build_tiny_processor(), d_model=32), "cy", name="bad")
    edit_json(folder / "language_adapter.json", base_signature=None)
    return "does not fit this model"


def _with_missing_tensors(folder: Path, model: Any) -> str:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[2:]), folder / "adapter_model.safetensors")
    return "2 of its weights are missing"


def _with_tensors_of_no_place(folder: Path, model: Any) -> str:
    _add_tensor(folder, "model.encoder.layers.9.fc1.lora_A.weight", torch.ones(2, 16))
    return "1 have no place"


def _overwriting_the_base(folder: Path, model: Any) -> str:
    _add_tensor(folder, "model.encoder.conv1.bias", torch.ones(16))
    return "overwrite the base weight 'model.encoder.conv1.bias'"


def _overwriting_a_tied_weight(folder: Path, model: Any) -> str:
    _add_tensor(folder, "proj_out.weight", torch.ones(364, 16))
    return "overwrite the base weight 'proj_out.weight'"


def _overwriting_a_wrapped_layer(folder: Path, model: Any) -> str:
    _add_tensor(folder, "model.encoder.layers.0.self_attn.q_proj.base_layer.weight", torch.ones(16, 16))
    return "overwrite the base weight"


def _with_trained_biases(folder: Path, model: Any) -> str:
    write_adapter(folder, model, "cy", name="bad", peft_config=LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    return "overwrite the base weight"


def _not_finite(folder: Path, model: Any) -> str:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    return "values that are not numbers"


def _of_unknown_method(folder: Path, model: Any) -> str:
    edit_json(folder / "adapter_config.json", peft_type="TELEPATHY")
    return r"'TELEPATHY', which PEFT does not know.*`import peft_s2lora` first"


def _initialised_from_the_base(folder: Path, model: Any) -> str:
    edit_json(folder / "adapter_config.json", init_lora_weights="pissa")
    return "'pissa', which changes the base weights"


def _with_other_targets(folder: Path, model: Any) -> str:
    edit_json(folder / "adapter_config.json", target_modules=["no_such_layer"])
    return "does not fit this model"


SPOILERS = [
    _without_weights,
    _cut_off,
    _for_another_base,
    _for_another_size,
    _with_missing_tensors,
    _with_tensors_of_no_place,
    _overwriting_the_base,
    _overwriting_a_tied_weight,
    _overwriting_a_wrapped_layer,
    _with_trained_biases,
    _not_finite,
    _of_unknown_method,
    _initialised_from_the_base,
    _with_other_targets,
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("attached", [False, True], ids=["first", "beside another"])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_an_adapter_that_cannot_be_attached_leaves_the_base_and_the_next_one_works(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, spoil: Callable[[Path, Any], str], attached: bool
) -> None:
    good, bad = LanguageAdapter.load(make_adapter("fr")), make_adapter("cy", name="bad")
    expected, bare, names = alone(tiny_model, good.path, features), logits(tiny_model, features), set(tiny_model.state_dict())
    before = base_hash(tiny_model, names)
    healthy = LanguageAdapter.load(bad)
    words = spoil(bad, copy.deepcopy(tiny_model))
    adapter = LanguageAdapter.load(bad) if (bad / "adapter_model.safetensors").is_file() else healthy
    switch = AdapterSwitch(tiny_model)
    if attached:
        with switch.active(good):
            pass
    with pytest.raises(ValueError, match=words), switch.active(adapter):
        raise AssertionError("it was attached")
    assert torch.equal(logits(tiny_model, features), bare)
    assert base_hash(tiny_model, names) == before
    with switch.active(good):
        assert torch.allclose(logits(tiny_model, features), expected, atol=1e-5)
    switch.unload()
    assert set(tiny_model.state_dict()) == names
    assert base_hash(tiny_model, names) == before


def test_a_wrong_base_is_told_with_both_names(tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]) -> None:
    adapter = LanguageAdapter.load(make_adapter("cy", model=build_tiny_model(tiny_processor, seed=5)))
    tiny_model.config._name_or_path = "openai/whisper-small"
    switch = AdapterSwitch(tiny_model)
    with pytest.raises(WrongBaseError, match="'cy' was made for 'tiny-whisper', not for 'whisper-small'"), switch.active(adapter):
        pass


def test_a_broken_load_in_the_middle_is_undone(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, bare, names = LanguageAdapter.load(make_adapter("cy")), logits(tiny_model, features), set(tiny_model.state_dict())
    switch = AdapterSwitch(tiny_model)

    def interrupted(*_: Any, **__: Any) -> None:
        assert any("lora" in name for name in tiny_model.state_dict())  # layers are wrapped by now
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "load_adapter", interrupted)
        with pytest.raises(KeyboardInterrupt), switch.active(adapter):
            pass
    assert set(tiny_model.state_dict()) == names
    assert torch.equal(logits(tiny_model, features), bare)
    with switch.active(adapter):
        assert not torch.equal(logits(tiny_model, features), bare)


def test_a_switch_wants_the_bare_base(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    wrapped = PeftModel.from_pretrained(tiny_model, str(make_adapter("cy")))
    with pytest.raises(ValueError, match="bare base model; got a PeftModel"):
        AdapterSwitch(wrapped)


def test_the_flags_of_the_base_come_back(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    tiny_model.train()
    tiny_model.proj_out.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in tiny_model.named_parameters()}
    switch = AdapterSwitch(tiny_model)
    with switch.active(LanguageAdapter.load(make_adapter("cy"))):
        assert not tiny_model.training
    switch.unload()
    assert tiny_model.training
    assert {name: parameter.requires_grad for name, parameter in tiny_model.named_parameters()} == flags
    assert not hasattr(tiny_model, "peft_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_run_in_half_precision(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, dtype: torch.dtype
) -> None:
    adapter = LanguageAdapter.load(make_adapter("cy", peft_config=S2LORA))
    expected = alone(tiny_model, adapter.path, features)
    half = tiny_model.to(dtype)
    with AdapterSwitch(half).active(adapter):
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        found = logits(half, features.to(dtype)).float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


def test_an_adapter_is_known_by_its_files_not_by_its_card(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    adapter = LanguageAdapter.load(make_adapter("cy"))
    switch = AdapterSwitch(tiny_model)
    with switch.active(adapter), switch.active(replace(adapter, name="renamed")):
        assert sum("language0" in name for name in tiny_model.state_dict()) > 0
        assert not any("language1" in name for name in tiny_model.state_dict())


def test_no_more_adapters_stay_attached_than_may(tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor) -> None:
    adapters = [LanguageAdapter.load(make_adapter("cy", name=f"cy{seed}", seed=seed)) for seed in range(4)]
    expected = [alone(tiny_model, adapter.path, features) for adapter in adapters]
    switch = AdapterSwitch(tiny_model, max_adapters=2)
    sizes = set()
    for turn in (0, 1, 2, 3, 1, 0, 3):
        with switch.active(adapters[turn]):
            assert torch.allclose(logits(tiny_model, features), expected[turn], atol=1e-5)
            sizes.add(sum(parameter.numel() for parameter in tiny_model.parameters()))
    assert len(sizes) == 2  # with one adapter, with two, and never more
    with switch.active(adapters[0]):
        with switch.active(adapters[1]), switch.active(adapters[2]):
            pass  # the outer one had to go, and comes back
        assert torch.allclose(logits(tiny_model, features), expected[0], atol=1e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5, None])
def test_a_switch_of_no_size_is_refused(tiny_model: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="max_adapters must be a whole number from 1 up"):
        AdapterSwitch(tiny_model, max_adapters=size)


def test_a_mixture_leaves_no_hook_behind(tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor) -> None:
    lora = make_adapter("cy")
    mixture = make_adapter("fr", peft_config=LoraMoeConfig(r=2, experts={"cy": str(lora)}, init_weights=False))
    bare, switch = logits(tiny_model, features), AdapterSwitch(tiny_model)
    with switch.active(LanguageAdapter.load(mixture)):
        assert any(module._forward_hooks for module in tiny_model.modules())
    with switch.active(LanguageAdapter.load(lora)):  # another method: the mixture has to go
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())
    switch.unload()
    assert torch.equal(logits(tiny_model, features), bare)


# ---- with a loader that trusts nothing ---------------------------------------------------------------------------------


def test_the_given_loader_is_the_only_one_and_loads_each_adapter_once(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor
) -> None:
    loaded: list[str] = []

    def load(model: Any, folder: Path, adapter_name: str = "default", **options: Any) -> Any:
        loaded.append(Path(folder).name)
        return load_adapter(model, folder, adapter_name, **options)

    folders = [make_adapter("cy", seed=1), make_adapter("fr", seed=2), make_adapter("br", peft_config=S2LORA)]
    expected = [alone(tiny_model, folder, features) for folder in folders]
    bare, before = logits(tiny_model, features), base_hash(tiny_model, set(tiny_model.state_dict()))
    names = set(tiny_model.state_dict())
    switch, adapters = AdapterSwitch(tiny_model, load), [LanguageAdapter.load(folder) for folder in folders]
    for turn in (0, 1, 0, 1, 2, 2):
        with switch.active(adapters[turn]):
            assert torch.equal(logits(tiny_model, features), expected[turn])
        assert torch.equal(logits(tiny_model, features), bare)
    assert loaded == ["cy", "fr", "br"]
    assert base_hash(switch.unload(), names) == before


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_given_loader_refuses_leaves_those_that_are_attached(
    tiny_model: Any, make_adapter: Callable[..., Path], features: torch.Tensor, spoil: Callable[[Path, Any], str]
) -> None:
    good, bad = LanguageAdapter.load(make_adapter("fr")), make_adapter("cy", name="bad")
    expected, bare = alone(tiny_model, good.path, features), logits(tiny_model, features)
    adapter, loads = LanguageAdapter.load(bad), []

    def load(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments[1])
        return load_adapter(*arguments, **options)

    switch = AdapterSwitch(tiny_model, load)
    with switch.active(good):
        pass
    spoil(bad, copy.deepcopy(tiny_model))
    with pytest.raises(ValueError), switch.active(adapter):
        raise AssertionError("it was attached")
    assert torch.equal(logits(tiny_model, features), bare)
    with switch.active(good):
        assert torch.equal(logits(tiny_model, features), expected)
    # where methods differ, the one that was there had to make room; else it stayed
    assert loads.count(good.path) == (2 if spoil is _of_unknown_method else 1)


def test_a_wrong_base_is_told_with_both_names_by_a_given_loader_too(
    tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]
) -> None:
    adapter = LanguageAdapter.load(make_adapter("cy", model=build_tiny_model(tiny_processor, seed=5)))
    tiny_model.config._name_or_path = "openai/whisper-small"
    switch = AdapterSwitch(tiny_model, load_adapter)
    with pytest.raises(ValueError, match="'cy' was made for 'tiny-whisper', not for 'whisper-small'"), switch.active(adapter):
        pass


# ---- adapters that are fetched when they are needed --------------------------------------------------------------------


class Source:
    """A place that adapters are fetched from; counts how often, and fails while `problem` is set."""

    def __init__(self, folder: Path, problem: str | None = None) -> None:
        self.folder, self.problem, self.asked = folder, problem, 0

    def __call__(self) -> Path:
        self.asked += 1
        if self.problem is not None:
            raise OSError(self.problem)
        return self.folder


def test_an_adapter_is_fetched_when_its_language_is_first_heard(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry([make_adapter("cy", name="shipped")])
    cy, fr = Source(make_adapter("cy", name="better")), Source(make_adapter("fr"))
    registry.expect("Welsh", cy, where="alice/a@0")
    registry.expect("fr", fr, where="alice/b@0")
    assert registry.languages() == ["cy", "fr"]
    assert [source.key for source in registry.expected] == ["cy", "fr"]
    assert (cy.asked, fr.asked) == (0, 0)
    for _ in range(2):
        decision = registry.choose(heard(cy=0.9, fr=0.1))
        assert (decision.adapter.name, decision.warning) == ("better", None)
    assert (cy.asked, fr.asked) == (1, 0)
    assert [adapter.name for adapter in registry] == ["better"]  # the shipped one has made room
    assert registry["cy"].name == registry["better"].name == "better"  # by the key it was expected under, and by its own name
    assert registry.choose(None, language="fr").adapter.name == "fr"
    assert (fr.asked, registry.expected) == (1, [])


def test_a_domain_adapter_is_fetched_by_its_key_alone(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry([make_adapter("en")])
    child = Source(make_adapter("en", name="child-en", domain="child"))
    registry.expect("en", child, where="alice/c@0", domain="child")
    assert registry.choose(None, language="en").adapter.name == "en"
    assert child.asked == 0
    assert registry.choose(None, adapter="en/child").adapter.name == "child-en"
    assert registry["en/child"].domain == "child"
    assert child.asked == 1


def test_an_adapter_that_cannot_be_had_is_said_and_who_is_there_writes(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = AdapterRegistry([make_adapter("cy", name="shipped")])
    cy, fr = Source(make_adapter("cy", name="better"), "no network"), Source(make_adapter("fr"), "not trusted")
    registry.expect("cy", cy, where="alice/a@0")
    registry.expect("fr", fr, where="alice/b@0")
    clock = [100.0]
    monkeypatch.setattr("whisper_moe.registry.time.monotonic", lambda: clock[0])
    decision = registry.choose(heard(cy=0.9))
    assert decision.adapter.name == "shipped"
    assert decision.warning == "The adapter for Welsh (alice/a@0) cannot be used: no network"
    for options in ({"language": "fr"}, {"language": "fr", "written": ["fr"]}, {"language": "fr", "written": ["en"]}):
        decision = registry.choose(None, **options)
        assert decision.adapter is None
        assert decision.warning.startswith("The adapter for French (alice/b@0) cannot be used: not trusted")
    decision = registry.choose(heard(fr=0.9))
    assert (decision.adapter, decision.warning) == (None, "The adapter for French (alice/b@0) cannot be used: not trusted")
    assert (cy.asked, fr.asked) == (1, 1)  # nobody waits again for what failed a moment ago
    with pytest.raises(ValueError, match="no network"):
        registry["cy"]
    assert cy.asked == 2
    cy.problem = None
    clock[0] += 61
    decision = registry.choose(heard(cy=0.9))
    assert (decision.adapter.name, decision.warning) == ("better", None)


def test_a_language_without_a_token_needs_its_adapter(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry()
    source = Source(make_adapter("qug", carrier="es"), "no network")
    registry.expect("qug", source, where="alice/q@0")
    with pytest.raises(ValueError, match=r"alice/q@0\) cannot be used: no network"):
        registry.choose(None, language="qug")


@pytest.mark.parametrize(("code", "domain"), [("fr", None), ("cy", "child")])
def test_an_adapter_that_is_for_something_else_than_was_said_is_refused(
    make_adapter: Callable[..., Path], code: str, domain: str | None
) -> None:
    registry = AdapterRegistry()
    registry.expect("cy", Source(make_adapter(code, domain=domain)), where="alice/a@0")
    decision = registry.choose(heard(cy=0.9))
    assert decision.adapter is None
    assert "is named for 'cy'. Correct the registry." in decision.warning


def test_a_name_that_is_taken_gives_way_to_the_place_and_a_language_has_one_source(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry([make_adapter("fr", name="adapter")])
    folder = make_adapter("cy", name="other")
    edit_json(folder / "language_adapter.json", name="adapter")
    registry.expect("cy", Source(folder), where="alice/a@0")
    with pytest.raises(ValueError, match="a source for 'cy' already"):
        registry.expect("cy", Source(folder), where="alice/b@0")
    assert registry.choose(heard(cy=0.9)).adapter.name == "alice/a@0"
    assert registry["adapter"].language == "fr"


@pytest.mark.parametrize("own", ["fr", "de", "en/child", "qug"])
def test_a_fetched_adapter_that_calls_itself_as_another_is_asked_for_goes_by_its_place(make_adapter: Callable[..., Path], own: str) -> None:
    registry, folder = AdapterRegistry(), make_adapter("cy", name="stranger")
    edit_json(folder / "language_adapter.json", name=own)
    fr = Source(make_adapter("fr"))
    registry.expect("fr", fr, where="alice/b@0")
    registry.expect("cy", Source(folder), where="mallory/a@0")
    assert registry["cy"].name == "mallory/a@0"
    assert registry["fr"].language == "fr"
    assert fr.asked == 1


def test_a_mixture_whose_gates_nobody_gives_is_refused_when_it_is_fetched(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    expert = make_adapter("br")
    config = LoraMoeConfig(r=2, experts={"br": str(expert)}, router="language", save_experts="copy")
    folder = make_adapter("cy", name="mixture", peft_config=config)
    registry = AdapterRegistry([make_adapter("cy", name="shipped")])
    registry.expect("cy", Source(folder), where="alice/a@0")
    decision = registry.choose(heard(cy=0.9))
    assert decision.adapter.name == "shipped"
    assert "router='language' and no prior" in decision.warning
    edit_json(folder / "adapter_config.json", prior={"br": 1.0})
    assert registry["cy"].name == "mixture"


def test_what_was_displaced_comes_back_with_the_source_when_the_new_one_is_withdrawn(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry([make_adapter("cy", name="shipped")])
    source = Source(make_adapter("cy", name="better"))
    registry.expect("cy", source, where="alice/a@0")
    better = registry["cy"]
    problem = "The adapter for Welsh (alice/a@0) cannot be used: no? [31mroom"
    assert registry.withdraw(better, ValueError("no\x9b [31mroom")) == problem
    assert registry.withdraw(better, ValueError("too late")) == problem  # another thread used it too
    decision = registry.choose(heard(cy=0.9))
    assert (decision.adapter.name, decision.warning) == ("shipped", problem)
    assert [each.key for each in registry.expected] == ["cy"]
    assert registry.withdraw(decision.adapter, ValueError("at hand")) is None
    assert registry["cy"].name == "better"
    assert source.asked == 2


def test_the_adapters_can_be_gone_through_while_one_arrives(make_adapter: Callable[..., Path]) -> None:
    registry = AdapterRegistry([make_adapter("cy", name="shipped"), make_adapter("br")])
    registry.expect("cy", Source(make_adapter("cy", name="better")), where="alice/a@0")
    registry.expect("fr", Source(make_adapter("fr")), where="alice/b@0")
    seen = []
    for adapter in registry:  # a dictionary that changed would end this with an error
        seen.append(adapter.name)
        assert {registry["cy"].name, registry["fr"].name} == {"better", "fr"}
    assert seen == ["shipped", "br"]
    assert [adapter.name for adapter in registry] == ["br", "better", "fr"]


def test_who_waits_for_one_language_does_not_hold_up_another(make_adapter: Callable[..., Path]) -> None:
    registry, slow, go = AdapterRegistry(), make_adapter("cy"), threading.Event()
    registry.expect("cy", lambda: slow if go.wait(20) else Path("nowhere"), where="alice/a@0")
    registry.expect("fr", Source(make_adapter("fr")), where="alice/b@0")
    waiting = threading.Thread(target=registry.for_language, args=("cy",))
    other = threading.Thread(target=registry.for_language, args=("fr",))
    try:
        waiting.start()
        other.start()
        other.join(10)
        assert not other.is_alive()
        assert [adapter.name for adapter in registry] == ["fr"]
    finally:
        go.set()
        waiting.join()
    assert [adapter.name for adapter in registry] == ["fr", "cy"]


def test_a_strangers_fingerprint_cannot_steer_a_terminal(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("cy")
    row = json.loads((folder / "language_adapter.json").read_text())
    row["base_signature"]["architecture"]["d_model"] = "\x1b[2J\u202e\x9b"
    (folder / "language_adapter.json").write_text(json.dumps(row))
    with pytest.raises(WrongBaseError, match="of width") as caught:
        check_fit(LanguageAdapter.load(folder), tiny_model)
    assert str(caught.value).isprintable()
