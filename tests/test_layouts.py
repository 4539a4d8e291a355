"""Where adapters sit, counted in a real model, and two disjoint adapters as one against both at work together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model

from hub_utils.trust import check_config
from peft_s2lora import S2LoraConfig
from whisper_moe.layouts import MODULES, compose_adapters, decoder_only, layout_size, lower_shared, touches_encoder, upper_private
from whisper_moe.registry import AdapterRegistry, AdapterSwitch

ALL = (*MODULES, "out_proj")


@pytest.fixture(scope="module")
def base(tiny_processor: Any) -> Any:
    return build_tiny_model(tiny_processor)


def adapted_modules(base: Any, config: Any) -> set[str]:
    names = {name for name, _ in get_peft_model(copy.deepcopy(base), config).named_modules()}
    marks = [name for name in names if name.endswith((".lora_A.default", ".s2lora_coefficients"))]
    return {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] or name.rpartition(".s2lora")[0] for name in marks}


def named(base: Any, sides: tuple[str, ...], layers: set[int], modules: tuple[str, ...] = MODULES) -> set[str]:
    """The linear layers of these sides and layers, read off the model."""
    found = set()
    for name, module in base.named_modules():
        parts = name.split(".")
        if isinstance(module, torch.nn.Linear) and len(parts) > 4 and parts[1] in sides and int(parts[3]) in layers:
            found |= {name} if parts[-1] in modules else set()
    return found


def test_targets_are_the_layers_they_say(base: Any) -> None:
    assert adapted_modules(base, LoraConfig(target_modules=decoder_only(base))) == named(base, ("decoder",), {0, 1})
    assert adapted_modules(base, LoraConfig(target_modules=decoder_only(base, ("fc1",)))) == named(base, ("decoder",), {0, 1}, ("fc1",))
    assert adapted_modules(base, LoraConfig(target_modules=upper_private(base.config, 1))) == named(base, ("encoder", "decoder"), {1})
    assert adapted_modules(base, LoraConfig(target_modules=upper_private(base, 1, ALL, "decoder"))) == named(base, ("decoder",), {1}, ALL)


@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
def test_the_lower_part_is_what_the_upper_part_leaves(base: Any, side: Any) -> None:
    upper, lower = (adapted_modules(base, LoraConfig(target_modules=part(base, 1, ALL, side))) for part in (upper_private, lower_shared))
    assert not upper & lower
    assert upper | lower == named(base, ("encoder", "decoder"), {0, 1}, ALL)


def test_s2_lora_and_the_hubs_checks_take_the_targets(base: Any) -> None:
    config = S2LoraConfig(r=4, target_modules=decoder_only(base))
    model = get_peft_model(copy.deepcopy(base), config)
    adapted = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "s2lora_coefficients")}
    assert adapted == named(base, ("decoder",), {0, 1})
    row = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": upper_private(base, 1)}
    assert check_config(row)["target_modules"] == upper_private(base, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda base: upper_private(base, 0), "1 to 2"),
        (lambda base: upper_private(base, 3), "1 to 2"),
        (lambda base: lower_shared(base, True), "1 to 2"),
        (lambda base: upper_private(base, 1, side="top"), "'encoder', 'decoder' or 'both'"),
        (lambda base: decoder_only(base, ("conv1",)), "got 'conv1'"),
        (lambda base: decoder_only(base, ()), "an empty list"),
        (lambda base: layout_size(base, decoder_only(base), decoder_only(base)), "in the shared and in the private part"),
    ],
)
def test_layouts_that_no_model_has_are_refused(base: Any, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(base)


def test_sizes_are_those_of_the_files(base: Any, tmp_path: Path) -> None:
    private, shared = upper_private(base, 1, ALL), lower_shared(base, 1, ALL)
    for name, targets in (("private", private), ("shared", shared), ("all", private + shared)):
        write_adapter(tmp_path / name, base, "cy", peft_config=LoraConfig(r=3, target_modules=targets))
    size = layout_size(base, private, shared, r=3)
    tensors = {name: _tensor_bytes(tmp_path / name) for name in ("private", "shared", "all")}
    assert (size.bytes_per_language, size.shared_bytes, size.bytes_if_private) == tuple(tensors.values())
    assert size.total(10) == tensors["shared"] + 10 * tensors["private"]
    assert size.share(10) == pytest.approx(size.total(10) / (10 * tensors["all"]))


def _tensor_bytes(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())


# ---- two as one ----------------------------------------------------------------------------------------------------------


def logits(model: Any) -> torch.Tensor:
    features = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(features, decoder_input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]])).logits
    return found


@pytest.mark.parametrize("method", ["LORA", "S2LORA"])
def test_a_composed_adapter_is_both_at_work(base: Any, tmp_path: Path, method: str) -> None:
    lower = lower_shared(base, 1, ALL)
    below = LoraConfig(r=2, lora_alpha=6, target_modules=lower)
    if method == "S2LORA":
        below = S2LoraConfig(r=4, target_modules=lower, init_weights=False)
    shared = write_adapter(tmp_path / "shared", base, "en", peft_config=below, seed=1)
    private_config = LoraConfig(r=3, lora_alpha=3, target_modules=upper_private(base, 1))
    private = write_adapter(tmp_path / "cy", base, "cy", peft_config=private_config, seed=2)
    # The truth: the shared adapter merged into the base's weights by PEFT, the private one on top.
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(shared)).merge_and_unload()
    expected = logits(PeftModel.from_pretrained(merged, str(private)))
    out = compose_adapters(shared, private, tmp_path / "whole", base=base)
    found = logits(PeftModel.from_pretrained(copy.deepcopy(base), str(out)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, logits(PeftModel.from_pretrained(copy.deepcopy(base), str(private))), atol=1e-3)
    (adapter,) = AdapterRegistry([out])
    assert (adapter.name, adapter.language, adapter.peft_type) == ("cy", "cy", "LORA")
    row = json.loads((out / "language_adapter.json").read_text())
    assert row["training"]["composed_of"] == {"shared": "shared", "private": "cy"}
    switch = AdapterSwitch(copy.deepcopy(base))
    with switch.active(adapter) as model:
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_adapters_that_overlap_or_belong_to_another_base_are_not_composed(base: Any, tmp_path: Path, tiny_processor: Any) -> None:
    private = write_adapter(tmp_path / "cy", base, "cy", peft_config=LoraConfig(r=2, target_modules=upper_private(base, 1)))
    everywhere = write_adapter(tmp_path / "en", base, "en")
    alien = write_adapter(tmp_path / "alien", build_tiny_model(tiny_processor, seed=9), "en")
    for shared, out, words in (
        (everywhere, "whole", "Both adapters change"),
        (alien, "whole", "other weights"),
        (everywhere, "cy", "there already"),
    ):
        with pytest.raises(ValueError, match=words):
            compose_adapters(shared, private, tmp_path / out)
    assert not (tmp_path / "whole").exists()


def test_without_fingerprints_only_adapters_of_one_bases_name_are_composed(base: Any, tmp_path: Path) -> None:
    lower, upper = (LoraConfig(r=2, target_modules=part(base, 1)) for part in (lower_shared, upper_private))
    parts = {"shared": write_adapter(tmp_path / "shared", base, "en", peft_config=lower)}
    parts["private"] = write_adapter(tmp_path / "cy", base, "cy", peft_config=upper)
    for folder, name in zip(parts.values(), ("whisper-small", "whisper-medium"), strict=True):
        row = json.loads((folder / "language_adapter.json").read_text())
        (folder / "language_adapter.json").write_text(json.dumps(row | {"base_model": name, "base_signature": None}))
    with pytest.raises(ValueError, match="neither carries a fingerprint"):
        compose_adapters(parts["shared"], parts["private"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    (parts["shared"] / "language_adapter.json").write_text(json.dumps(row | {"base_signature": None, "base_model": "whisper-medium"}))
    assert compose_adapters(parts["shared"], parts["private"], tmp_path / "whole").is_dir()


@pytest.mark.parametrize(
    ("targets", "method", "expected"),
    [
        (["fc1"], LoraConfig, True),
        (["decoder.layers.0.fc1"], LoraConfig, False),
        (["encoder_attn.q_proj"], LoraConfig, False),
        (["proj_out"], LoraConfig, False),
        (["encoder.layers.1.fc2"], S2LoraConfig, True),
        (["decoder.layers.0.fc1", "decoder.layers.1.fc1"], S2LoraConfig, False),
    ],
)
def test_what_touches_the_encoder_is_told_from_the_weights(base: Any, tmp_path: Path, targets: Any, method: Any, expected: bool) -> None:
    folder = write_adapter(tmp_path / "cy", base, "cy", peft_config=method(r=2, target_modules=targets))
    assert touches_encoder(folder) is expected
    row = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(row | {"target_modules": ["decoder.layers.0.fc2"]}))
    assert touches_encoder(folder) is expected  # the configuration may say what it likes


def test_an_adapter_without_names_of_modules_counts_as_touching(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"base_model.prompt": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert touches_encoder(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        touches_encoder(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        touches_encoder(tmp_path / "gone")
