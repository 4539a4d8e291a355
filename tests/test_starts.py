"""The four starts against dense matrices: what an adapter begins as, what trains, what is saved, and which start is chosen why."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import base_hash
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

import peft_s2lora
from peft_s2lora import S2LoraConfig
from whisper_moe.layouts import decoder_only
from whisper_moe.moe_config import LoraMoeConfig
from whisper_moe.registry import AdapterSwitch, LanguageAdapter
from whisper_moe.similarity import Similarity, SimilarLanguage
from whisper_moe.starts import (
    LEAST_PRIOR,
    ROUTER_HOURS,
    SIMILAR_TO_NEAREST,
    SIMILARITY_FLOOR,
    WARM_HOURS,
    Start,
    choose_start,
    heard_languages,
)

TARGETS = ["q_proj", "v_proj", "fc1"]
PREFIX = "base_model.model."


def hears(shares: dict[str, float], *, own: float | None = None, spread: float = 0.0, share: float = 1.0) -> Similarity:
    """A similarity report: `shares` as they are shown, renormalised over the candidates; the intervals are `spread` wide either way."""
    rows = [SimilarLanguage(code, value, value - spread, value + spread, spread, None) for code, value in shares.items()]
    rows.sort(key=lambda row: -(row.probability or 0))
    return Similarity("clips", "qug", 50, own, share, tuple(rows))


def inputs(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = 2 * model.config.max_source_positions
    return {
        "input_features": torch.randn(2, model.config.num_mel_bins, frames, generator=generator),
        "decoder_input_ids": torch.randint(0, 200, (2, 5), generator=generator),
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """(2, 5, vocabulary), in evaluation mode."""
    was_training = model.training
    model.eval()
    answer = model(**inputs(model)).logits
    model.train(was_training)
    return answer


def lora_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scaling x B A, by PEFT itself: the difference that merging makes is not used, only its layers' own delta."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    deltas = {}
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        alpha = next((a for name, a in config["alpha_pattern"].items() if module.endswith(name)), config["lora_alpha"])
        deltas[module] = B @ A * alpha / (math.sqrt(len(A)) if config["use_rslora"] else len(A))
    return deltas


def with_deltas(model: Any, *all_deltas: dict[str, torch.Tensor]) -> Any:
    """A copy of the model with the matrices added to its weights."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for deltas in all_deltas:
            for module, delta in deltas.items():
                dense.get_submodule(module).weight += delta
    return dense


def train_a_little(adapted: PeftModel, steps: int = 2) -> None:
    """AdamW on what trains, with weight decay, so that nothing frozen survives by chance."""
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        adapted(**inputs(adapted)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()


def trained_names(adapted: PeftModel) -> set[str]:
    return {name for name, weight in adapted.named_parameters() if weight.requires_grad}


@pytest.fixture
def unharmed(tiny_model: Any) -> Callable[[], None]:
    """Checks that the model is what it was: names, bytes, flags, kinds of modules."""
    names = list(tiny_model.state_dict())
    before = base_hash(tiny_model, names), [p.requires_grad for p in tiny_model.parameters()], [type(m) for m in tiny_model.modules()]

    def check() -> None:
        assert list(tiny_model.state_dict()) == names
        assert before == (
            base_hash(tiny_model, names),
            [p.requires_grad for p in tiny_model.parameters()],
            [type(m) for m in tiny_model.modules()],
        )
        assert not hasattr(tiny_model, "peft_config")

    return check


# ---- cold --------------------------------------------------------------------------------------------------------------


def test_a_cold_start_is_the_base_and_trains_what_was_asked_for(tiny_model: Any, tmp_path: Path) -> None:
    bare = logits(tiny_model)
    start = choose_start("cold", config=LoraConfig(r=3, target_modules=TARGETS))
    adapted = start.attach(tiny_model)
    assert torch.equal(logits(adapted), bare)
    train_a_little(adapted)
    trained = logits(adapted)
    start.finish(adapted, tmp_path / "out", "some/base")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    again = PeftModel.from_pretrained(adapted.unload(), str(tmp_path / "out"))
    assert torch.equal(logits(again), trained)


def test_a_cold_start_without_a_configuration_is_lora_whispers() -> None:
    config = choose_start("cold").config()
    assert (config.r, set(config.target_modules)) == (32, {"q_proj", "k_proj", "v_proj", "fc1", "fc2"})


# ---- warm --------------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, rank_pattern={"fc1": 3}, alpha_pattern={"fc1": 1}),
    "s2lora": S2LoraConfig(r=4, s2lora_alpha=2, target_modules=TARGETS),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_start_is_its_source_and_all_of_it_trains(
    method: str, tiny_model: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_adapter("es", peft_config=METHODS[method])
    with AdapterSwitch(copy.deepcopy(tiny_model)).active(LanguageAdapter.load(folder)) as source:
        expected = logits(source)
    start = choose_start("warm", [folder], model=tiny_model)
    adapted = start.attach(tiny_model)
    assert torch.equal(logits(adapted), expected)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(t.numel() for t in saved.values())
    train_a_little(adapted)
    assert not torch.equal(logits(adapted), expected)
    trained = logits(adapted)
    again = PeftModel.from_pretrained(adapted.unload() if start.finish(adapted, tmp_path / "o") else None, str(tmp_path / "o"))
    assert torch.equal(logits(again), trained)


def test_a_warm_start_takes_the_runs_dropout_but_only_the_sources_rank_and_targets(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("es", peft_config=METHODS["lora"])
    config = copy.deepcopy(METHODS["lora"])
    config.lora_dropout = 0.25
    assert choose_start("warm", [folder], config=config).config().lora_dropout == 0.25
    for changed in ({"r": 5}, {"target_modules": ["q_proj"]}, {"lora_alpha": 1}, {"rank_pattern": {}}):
        other = LoraConfig(
            **{"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 1}, **changed}
        )
        with pytest.raises(ValueError, match=rf"{next(iter(changed))}.*Leave the configuration out.*stacked"):
            choose_start("warm", [folder], config=other)
    with pytest.raises(ValueError, match="copy of 'es' is a LORA, and a S2LORA was asked for"):
        choose_start("warm", [folder], config=S2LoraConfig())


def test_a_decoder_only_adapter_is_copied_although_peft_shortened_its_names(tiny_model: Any, tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model.config)
    config.decoder_layers = 4  # 32 names: PEFT shortens lists of more than 20 when it puts an adapter on a model
    deep = WhisperForConditionalGeneration(config)
    wanted = LoraConfig(r=2, target_modules=decoder_only(deep))
    get_peft_model(copy.deepcopy(deep), copy.deepcopy(wanted)).save_pretrained(str(tmp_path / "es"), save_embedding_layers=False)
    written = json.loads((tmp_path / "es" / "adapter_config.json").read_text())["target_modules"]
    assert set(written) != set(wanted.target_modules or ())
    start = choose_start("warm", [tmp_path / "es"], config=copy.deepcopy(wanted))
    adapted = start.attach(copy.deepcopy(deep))
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad and ".encoder." in name} == set()
    fewer = LoraConfig(r=2, target_modules=decoder_only(deep, ("fc1",)))
    with pytest.raises(ValueError, match="target_modules"):
        choose_start("warm", [tmp_path / "es"], config=fewer)


def pooled(tiny_model: Any, tmp_path: Path, seed: int = 3) -> tuple[Path, Path]:
    """Folders of a pool and of an adapter of coefficients over it."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(tiny_model), S2LoraConfig(r=4, target_modules=TARGETS), "shelf")
    adapted.add_adapter("es", S2LoraConfig(pool="shelf"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "s2lora_" in name:
                weight.normal_(std=0.5)
    # The hash was taken when the adapter was added: take it again, as training it over a finished pool would have.
    from peft_s2lora.pool import factors_hash

    adapted.peft_config["es"].pool_hash = factors_hash(adapted, "shelf")
    folder = tmp_path / f"pooled{seed}"
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder / "shelf", folder / "es"


def test_a_warm_start_over_a_pool_copies_and_trains_coefficients_alone(tiny_model: Any, tmp_path: Path) -> None:
    pool, folder = pooled(tiny_model, tmp_path)
    start = choose_start("warm", [folder], pool=pool)
    adapted = start.attach(tiny_model)
    saved = load_file(folder / "adapter_model.safetensors")
    found = {
        name.replace(".default", "").removeprefix(PREFIX): weight for name, weight in adapted.named_parameters() if weight.requires_grad
    }
    assert {key.removeprefix(PREFIX) for key in saved} == set(found)
    assert all(torch.equal(saved[PREFIX + name], weight) for name, weight in found.items())
    frozen = {name: weight.clone() for name, weight in adapted.named_parameters() if ".shelf" in name}
    assert frozen
    train_a_little(adapted)
    assert all(torch.equal(weight, frozen[name]) for name, weight in adapted.named_parameters() if name in frozen)
    start.finish(adapted, tmp_path / "out", "some/base")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(saved)
    assert start.record()["pool_sha256"] == hashlib.sha256((pool / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_warm_start_over_another_pool_is_refused_and_leaves_the_model(
    tiny_model: Any, tmp_path: Path, unharmed: Callable[[], None]
) -> None:
    _, folder = pooled(tiny_model, tmp_path)
    other, _ = pooled(tiny_model, tmp_path, seed=4)
    with pytest.raises(ValueError, match="pool"):
        choose_start("warm", [folder])
    same = S2LoraConfig(r=4, target_modules=TARGETS, pool="shelf")
    for config in (None, same):
        with pytest.raises(ValueError, match="other values"):
            choose_start("warm", [folder], config=config, pool=other).attach(tiny_model)
        unharmed()


def test_a_cold_start_over_a_pool_trains_fresh_coefficients(tiny_model: Any, tmp_path: Path) -> None:
    pool, _ = pooled(tiny_model, tmp_path)
    bare = logits(tiny_model)
    adapted = choose_start("cold", config=S2LoraConfig(pool="anything"), pool=pool).attach(tiny_model)
    assert torch.equal(logits(adapted), bare)
    assert all(name.endswith("s2lora_coefficients.default") for name in trained_names(adapted))


# ---- stacked -----------------------------------------------------------------------------------------------------------

SOURCES = {
    "the same weights": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "patterns": LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, rank_pattern={"fc1": 3}, alpha_pattern={"fc1": 7}),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj", "fc2"], use_rslora=True),
    "s2lora": S2LoraConfig(r=4, s2lora_alpha=3, target_modules=["q_proj", "fc1"]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_stacked_start_is_its_source_and_ends_as_one_lora_of_both(
    source: str, tiny_model: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_adapter("es", peft_config=SOURCES[source])
    with AdapterSwitch(copy.deepcopy(tiny_model)).active(LanguageAdapter.load(folder)) as alone:
        begins = logits(alone)
    if source == "s2lora":
        with_it = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(folder))
        peft_s2lora.to_lora(with_it, folder=tmp_path / "as_lora")
    old = lora_deltas(tmp_path / "as_lora" if source == "s2lora" else folder)

    base = copy.deepcopy(tiny_model)
    start = choose_start("stacked", [folder], config=LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    adapted = start.attach(tiny_model)
    torch.testing.assert_close(logits(adapted), begins, rtol=1e-4, atol=1e-4)
    assert {name.rpartition(".loramoe_")[2] for name in trained_names(adapted)} == {"A.default", "B.default"}
    train_a_little(adapted)

    new = {}
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "loramoe_A"):
            new[name] = (layer.loramoe_B["default"] @ layer.loramoe_A["default"]).detach() * 2  # alpha 6 / rank 3
    assert {name.rpartition(".")[2] for name in new} == {"q_proj", "v_proj", *(name.rpartition(".")[2] for name in old)}
    dense = logits(with_deltas(base, old, new))
    torch.testing.assert_close(logits(adapted), dense, rtol=1e-4, atol=1e-4)

    start.finish(adapted, tmp_path / "out", "some/base")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["base_model_name_or_path"]) == ("LORA", "some/base")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(plain), dense, rtol=1e-4, atol=1e-4)
    for module, layer in plain.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            old_rank = torch.linalg.matrix_rank(old[module]) if module in old else 0
            assert layer.r["default"] == old_rank + 3
            torch.testing.assert_close(layer.get_delta_weight("default"), old.get(module, 0) + new[module], rtol=1e-5, atol=1e-5)


def test_a_stacked_start_keeps_the_source_bit_for_bit_while_it_trains(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("es", peft_config=SOURCES["patterns"])
    adapted = choose_start("stacked", [folder], config=LoraConfig(r=3, target_modules=TARGETS)).attach(tiny_model)
    before = {name: weight.clone() for name, weight in adapted.named_parameters() if not weight.requires_grad}
    assert any("loramoe_experts_A" in name for name in before)
    train_a_little(adapted)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.named_parameters() if name in before)


def test_a_stacked_start_covers_what_the_source_adapts_beside_a_regular_expression(
    tiny_model: Any, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter("es", peft_config=LoraConfig(r=2, target_modules=["fc1"]))
    config = LoraConfig(r=2, target_modules=r".*decoder\..*q_proj")
    adapted = choose_start("stacked", [folder], config=config).attach(tiny_model)
    layers = {name for name, layer in adapted.get_base_model().named_modules() if hasattr(layer, "loramoe_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"fc1", "q_proj"}
    assert not any("encoder.layers" in name and "q_proj" in name and "model.encoder" in name for name in layers)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (S2LoraConfig(), "trains a new LoRA, and a S2LORA"),
        (LoraConfig(use_dora=True), "use_dora"),
        (LoraConfig(rank_pattern={"fc1": 2}), "rank_pattern"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights"),
        (LoraMoeConfig(experts={"cy": "somewhere"}), "experts of its own"),
    ],
)
def test_a_stacked_start_refuses_what_a_lora_on_top_cannot_be(config: Any, words: str, make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=words):
        choose_start("stacked", [make_adapter("es")], config=config)


def test_a_source_that_is_more_than_low_rank_products_cannot_be_stacked_on(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("es", peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    for kind in ("stacked", "moe"):
        with pytest.raises(ValueError, match="use_dora"):
            choose_start(kind, [folder])
    assert choose_start("warm", [folder]).config().use_dora


def test_a_pooled_source_is_stacked_on_only_as_lora(tiny_model: Any, tmp_path: Path) -> None:
    pool, folder = pooled(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"peft_s2lora\.to_lora"):
        choose_start("stacked", [folder], pool=pool)


# ---- mixture -----------------------------------------------------------------------------------------------------------


def test_a_mixture_begins_as_its_sources_in_the_proportions_of_similarity(
    tiny_model: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    shares = {"es": 0.6, "it": 0.3, "de": 0.09, "cy": 0.01}
    folders = {
        code: make_adapter(code, peft_config=LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS), seed=at)
        for at, code in enumerate(shares)
    }
    start = choose_start("moe", list(folders.values())[::-1], hears(shares), config=LoraConfig(r=3, target_modules=["k_proj"]))
    assert [source.name for source in start.sources] == ["es", "it", "de"]  # the three most similar, most similar first
    base = copy.deepcopy(tiny_model)
    adapted = start.attach(tiny_model)
    total = 0.6 + 0.3 + 0.09
    parts = {
        code: {module: delta * shares[code] / total for module, delta in lora_deltas(folders[code]).items()} for code in ("es", "it", "de")
    }
    torch.testing.assert_close(logits(adapted), logits(with_deltas(base, *parts.values())), rtol=1e-4, atol=1e-4)
    kinds = {name.rpartition(".loramoe_")[2] for name in trained_names(adapted)}
    assert kinds == {"A.default", "B.default", "router_weight.default", "router_bias.default"}

    train_a_little(adapted)
    trained = logits(adapted)
    start.finish(adapted, tmp_path / "out", "some/base")
    shutil.rmtree(folders["es"].parent)  # the saved mixture needs none of its sources
    again = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.equal(logits(again), trained)


def test_a_mixture_takes_the_settings_of_a_lora_moe_configuration(tiny_model: Any, make_adapter: Callable[..., Path]) -> None:
    wanted = LoraMoeConfig(r=3, loramoe_alpha=9, loramoe_dropout=0.1, target_modules=["k_proj"])
    config = choose_start("moe", [make_adapter("es"), make_adapter("it")], config=wanted).config()
    assert (config.r, config.loramoe_alpha, config.loramoe_dropout, config.router) == (3, 9, 0.1, "utterance")
    assert get_peft_model(tiny_model, config).peft_config["default"].expert_names == ["es", "it"]


def test_no_expert_of_a_mixture_begins_out_of_the_routers_reach(make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("es"), make_adapter("it")]
    prior = choose_start("moe", folders, hears({"es": 0.97, "it": 0.001, "de": 0.029})).config().prior
    assert prior["it"] == LEAST_PRIOR
    assert prior["es"] == pytest.approx(0.97 / 0.971)
    even = choose_start("moe", folders).config().prior  # nothing measured
    assert even == {"es": 0.5, "it": 0.5}


# ---- which start -------------------------------------------------------------------------------------------------------

LITTLE, SOME, LOTS = ROUTER_HOURS / 2, WARM_HOURS / 2, WARM_HOURS * 2


@pytest.mark.parametrize(
    ("shares", "hours", "kind", "sources"),
    [
        ({"es": 0.8, "it": 0.1, "fr": 0.1}, LITTLE, "stacked", ["es"]),
        ({"es": 0.8, "it": 0.1, "fr": 0.1}, SOME, "stacked", ["es"]),
        ({"es": 0.8, "it": 0.1, "fr": 0.1}, LOTS, "warm", ["es"]),
        ({"es": 0.8, "it": 0.1, "fr": 0.1}, None, "stacked", ["es"]),  # unknown counts as little
        ({"es": 0.5, "it": 0.3, "fr": 0.2}, SOME, "moe", ["es", "it"]),
        ({"es": 0.5, "it": 0.3, "fr": 0.2}, LITTLE, "stacked", ["es"]),  # nothing to learn a router from
        ({"es": 0.08, "it": 0.07, "fr": 0.85}, LOTS, "cold", []),
        ({"fr": 1.0}, SOME, "cold", []),
    ],
)
def test_auto_decides_by_similarity_and_hours(
    shares: dict[str, float], hours: float | None, kind: str, sources: list[str], make_adapter: Callable[..., Path]
) -> None:
    folders = [make_adapter("it"), make_adapter("es")]  # French has no adapter
    start = choose_start("auto", folders, hears(shares), hours)
    assert (start.kind, [source.name for source in start.sources]) == (kind, sources)
    assert start.reason
    assert all(name in start.reason for name in sources)


def test_auto_does_not_trust_a_similarity_whose_interval_reaches_below_the_floor(make_adapter: Callable[..., Path]) -> None:
    folders, share = [make_adapter("es")], SIMILARITY_FLOOR + 0.05
    shares = {"es": share, "fr": 1 - share}
    assert choose_start("auto", folders, hears(shares, spread=0.04), SOME).kind == "stacked"
    assert choose_start("auto", folders, hears(shares, spread=0.06), SOME).kind == "cold"


def test_auto_takes_a_second_language_only_if_it_comes_near_to_the_first(make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("es"), make_adapter("it")]
    for part, kind in ((SIMILAR_TO_NEAREST + 0.02, "moe"), (SIMILAR_TO_NEAREST - 0.02, "stacked")):
        assert choose_start("auto", folders, hears({"es": 0.6, "it": 0.6 * part}), SOME).kind == kind


def test_auto_does_not_mix_two_adapters_of_one_language(make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("es", name="es-a"), make_adapter("es", name="es-b")]
    start = choose_start("auto", folders, hears({"es": 0.9, "fr": 0.1}), SOME)
    assert (start.kind, start.sources[0].name) == ("stacked", "es-a")


def test_auto_with_a_lot_of_speech_stacks_where_a_copy_would_have_another_rank(make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter("es", peft_config=LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    start = choose_start("auto", [folder], hears({"es": 1.0}), LOTS, LoraConfig(r=8, target_modules=TARGETS))
    assert start.kind == "stacked"
    assert "Not warm" in start.reason
    assert "r 2, not 8" in start.reason


def test_auto_with_s2lora_copies_or_starts_cold(make_adapter: Callable[..., Path]) -> None:
    config = S2LoraConfig(r=4, target_modules=TARGETS)
    alike, other = make_adapter("es", peft_config=copy.deepcopy(config)), make_adapter("it")
    assert choose_start("auto", [alike], hears({"es": 1.0}), LITTLE, config).kind == "warm"
    assert choose_start("auto", [other], hears({"it": 1.0}), LITTLE, config).kind == "cold"


def test_auto_leaves_out_adapters_of_another_base_and_says_so(
    tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]
) -> None:
    from conftest import build_tiny_model

    strange = make_adapter("es", model=build_tiny_model(tiny_processor, seed=9))
    start = choose_start("auto", [strange, make_adapter("it")], hears({"es": 0.7, "it": 0.3}), SOME, model=tiny_model)
    assert [source.name for source in start.sources] == ["it"]
    assert "1 could not be used" in start.reason
    assert choose_start("auto", [strange], hears({"es": 1.0}), model=tiny_model).kind == "cold"


def test_auto_needs_similarity_where_there_is_a_choice_to_make(make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="language_similarity"):
        choose_start("auto", [make_adapter("es")])
    assert choose_start("auto").kind == "cold"


# ---- asked for by name -------------------------------------------------------------------------------------------------


def test_a_start_asked_for_takes_the_most_similar(make_adapter: Callable[..., Path]) -> None:
    folders = [make_adapter("de"), make_adapter("es"), make_adapter("it")]
    for kind in ("warm", "stacked"):
        start = choose_start(kind, folders, hears({"es": 0.5, "it": 0.3, "de": 0.2}))
        assert [source.name for source in start.sources] == ["es"]


def test_a_start_asked_for_from_a_dissimilar_language_is_made_with_a_warning(make_adapter: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="worse than a cold one"):
        start = choose_start("stacked", [make_adapter("cy")], hears({"es": 0.99, "cy": 0.01}))
    assert start.kind == "stacked"


def test_an_adapter_of_the_language_itself_is_begun_from_by_name_and_without_a_warning(make_adapter: Callable[..., Path]) -> None:
    own = make_adapter("qug", carrier="es")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_start("warm", [own], hears({"es": 0.9, "fr": 0.1})).sources[0].language == "qug"
    assert choose_start("auto", [own], hears({"es": 0.9, "fr": 0.1}), LOTS).kind == "cold"


@pytest.mark.parametrize("kind", ["warm", "stacked", "moe"])
def test_a_start_that_cannot_work_is_refused_at_the_door(
    kind: str, tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path], tmp_path: Path, unharmed: Callable[[], None]
) -> None:
    from conftest import build_tiny_model

    with pytest.raises(ValueError, match="start cold"):
        choose_start(kind)
    with pytest.raises(ValueError, match=r"no adapter to begin from: it lacks adapter_config\.json"):
        choose_start(kind, [tmp_path])
    with pytest.raises(ValueError, match="without similarity nobody knows which"):
        choose_start(kind, [make_adapter(code) for code in ("es", "it", "de", "fr")])
    strange = make_adapter("pt", model=build_tiny_model(tiny_processor, seed=9))
    with pytest.raises(ValueError, match="other weights"):
        choose_start(kind, [strange], model=tiny_model)
    broken = make_adapter("nl", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    config = json.loads((broken / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="changes the base weights"):
        choose_start(kind, [broken])
    unharmed()


def test_weights_that_do_not_fit_are_refused_and_the_model_is_as_it_was(
    tiny_model: Any, make_adapter: Callable[..., Path], unharmed: Callable[[], None]
) -> None:
    folder = make_adapter("es")
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    for spoilt in ({key: tensor[:1] for key, tensor in whole.items()}, dict(list(whole.items())[1:])):
        save_file({key: tensor.contiguous() for key, tensor in spoilt.items()}, weights)
        for kind in ("warm", "stacked"):
            with pytest.raises(ValueError):
                choose_start(kind, [folder]).attach(tiny_model)
            unharmed()


@pytest.mark.parametrize("kind", ["lukewarm", "", "Warm"])
def test_an_unknown_kind_is_refused_with_those_there_are(kind: str) -> None:
    with pytest.raises(ValueError, match="auto, cold, warm, stacked, moe"):
        choose_start(kind)


@pytest.mark.parametrize("hours", [-1.0, math.nan])
def test_impossible_hours_are_refused(hours: float) -> None:
    with pytest.raises(ValueError, match="hours"):
        choose_start("cold", hours=hours)


def test_a_task_type_is_refused_as_it_breaks_whisper() -> None:
    with pytest.raises(ValueError, match="task_type"):
        choose_start("cold", config=LoraConfig(task_type="SEQ_2_SEQ_LM"))


# ---- what is recorded --------------------------------------------------------------------------------------------------


def test_the_record_says_kind_source_hash_similarity_and_reason_but_no_path(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_adapter("es")
    start = choose_start("auto", [folder], hears({"es": 0.8, "it": 0.2}, spread=0.1), 2.0)
    text = json.dumps(start.record())
    row = json.loads(text)
    assert row["kind"] == "stacked"
    assert row["sources"] == [
        {
            "name": "es",
            "language": "es",
            "method": "LORA",
            "sha256": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        }
    ]
    assert row["similarity"]["es"] == pytest.approx({"share": 0.8, "low": 0.7, "high": 0.9, "spread": 0.1})
    assert (row["hours"], row["reason"]) == (2.0, start.reason)
    assert str(tmp_path) not in text


def test_the_record_of_auto_names_what_could_not_be_used_without_its_path(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dora = make_adapter("es", peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    start = choose_start("auto", [tmp_path / "empty", dora], hears({"es": 1.0}), LITTLE, LoraConfig(r=3, target_modules=["q_proj"]))
    assert start.kind == "cold"  # no copy of another rank, no stacking on DoRA
    text = json.dumps(start.record())
    assert "'empty' is no adapter to begin from" in text
    assert "use_dora" in text
    assert str(tmp_path) not in text


def test_similarity_is_of_all_that_is_heard_not_of_the_candidates_alone() -> None:
    # A report among candidates that have a tenth of the posterior: Spanish has 90 % of that tenth.
    assert heard_languages(hears({"es": 0.9, "it": 0.1}, share=0.1))["es"].share == pytest.approx(0.09)
    # The language's own token had half of the posterior; what is left is what there is to compare by.
    assert heard_languages(hears({"es": 0.9, "it": 0.1}, share=0.5, own=0.5))["es"].share == pytest.approx(0.9)
    # A base that knows the language all but certainly leaves nothing to compare by, and noise is not blown up to a similarity.
    assert heard_languages(hears({"es": 0.9, "it": 0.1}, share=0.001, own=0.999))["es"].share < SIMILARITY_FLOOR


def test_the_configuration_of_a_start_is_a_new_one_each_time(make_adapter: Callable[..., Path]) -> None:
    start: Start = choose_start("stacked", [make_adapter("es")])
    start.config().target_modules.clear()
    assert start.config().target_modules
