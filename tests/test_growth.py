"""Merging and composing adapters against dense deltas, PEFT's own merging, and a plain loop over the clustering."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, tone, write_adapter
from peft import LoraConfig, PeftModel

from peft_s2lora import S2LoraConfig
from whisper_moe.cli import main
from whisper_moe.growth import Join, Pruning, _leaves, cluster, delta_cosines, delta_products, merge_pairs, merge_similar
from whisper_moe.plain_lora import read_pairs
from whisper_moe.registry import AdapterRegistry, LanguageAdapter
from whisper_moe.transcribe import Transcriber

TARGETS = ["q_proj", "v_proj", "out_proj"]
BIG = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"])


@pytest.fixture(scope="module")
def base(tiny_processor: Any) -> Any:
    return build_tiny_model(tiny_processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Any) -> Path:
    """Breton and Welsh alike (one is the other with a little added), Finnish apart and of another rank, and a domain adapter."""
    folder = tmp_path_factory.mktemp("grown")
    for code in ("br", "cy"):
        write_adapter(folder / code, base, code, seed=6)
    write_adapter(folder / "fi", base, "fi", peft_config=BIG, seed=8)
    write_adapter(folder / "en-child", base, "en", domain="child", seed=9)
    _shift(folder / "cy", 0.1)
    return folder


def _shift(folder: Path, by: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(3)
    save_file({name: value + by * torch.randn_like(value) for name, value in tensors.items()}, folder / "adapter_model.safetensors")


def dense(folder: Path, base: Any) -> dict[str, torch.Tensor]:
    """Module name -> the whole delta, as PEFT computes it."""
    import copy

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    layers = {
        name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }
    return {name: module.get_delta_weight("default").detach() for name, module in layers.items()}


def product(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[name].double() * second[name].double()).sum()) for name in first.keys() & second.keys())


# ---- how alike -----------------------------------------------------------------------------------------------------------


def test_products_without_deltas_are_those_of_the_deltas(folder: Path, base: Any) -> None:
    names = ["br", "cy", "fi"]
    found = delta_products([read_pairs(folder / name) for name in names])
    whole = [dense(folder / name, base) for name in names]
    expected = np.array([[product(a, b) for b in whole] for a in whole])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    cosines = delta_cosines(found)
    assert cosines[0, 1] == pytest.approx(expected[0, 1] / np.sqrt(expected[0, 0] * expected[1, 1]), rel=1e-5)
    assert cosines[0, 1] > 0.8 > 0.3 > abs(cosines[0, 2])


def test_an_s2_lora_is_compared_as_the_lora_it_is(tmp_path: Path, base: Any, folder: Path) -> None:
    write_adapter(tmp_path / "ga", base, "ga", carrier="cy", peft_config=S2LoraConfig(r=4, target_modules=TARGETS, init_weights=False))
    pairs = read_pairs(tmp_path / "ga", base)
    whole = dense(tmp_path / "ga", base)
    for name, (A, B) in pairs.items():
        torch.testing.assert_close(B @ A, whole[name], rtol=1e-4, atol=1e-5)
    assert pairs.keys() == whole.keys()
    with pytest.raises(ValueError, match="give the base model"):
        merge_similar([folder / "br", tmp_path / "ga"], tmp_path / "out")
    growth = merge_similar([folder / "br", tmp_path / "ga"], tmp_path / "out", number=1, base=base)
    assert [row.into for row in growth.adapters] == ["merged-br-2", "merged-br-2"]


def test_an_adapter_that_adds_nothing_is_like_no_other() -> None:
    pair = {"m": (torch.randn(2, 5), torch.randn(4, 2))}
    nothing = {"m": (torch.randn(2, 5), torch.zeros(4, 2))}
    np.testing.assert_array_equal(delta_cosines(delta_products([pair, nothing])), np.eye(2))


def plain_clusters(similarity: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Average linkage, from its definition."""
    groups = [frozenset([index]) for index in range(len(similarity))]
    while len(groups) > 1:
        first, second = max(combinations(groups, 2), key=lambda pair: np.mean([similarity[i, j] for i in pair[0] for j in pair[1]]))
        if np.mean([similarity[i, j] for i in first for j in second]) < threshold:
            break
        groups = [group for group in groups if group not in (first, second)] + [first | second]
    return set(groups)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 0.3, 2.0])
def test_clusters_are_those_of_average_linkage(seed: int, threshold: float) -> None:
    half = np.random.default_rng(seed).uniform(-1, 1, (7, 7))
    similarity = (half + half.T) / 2
    groups, joins = cluster(similarity, threshold=threshold)
    assert {frozenset(group) for group in groups} == plain_clusters(similarity, threshold)
    assert len(joins) == 6  # the whole tree, whatever was kept
    for number in (1, 3, 7):
        assert len(cluster(similarity, threshold=threshold, number=number)[0]) == number
    with pytest.raises(ValueError, match="1 to 7"):
        cluster(similarity, number=8)


# ---- merging -------------------------------------------------------------------------------------------------------------


def peft_merged(folder: Path, base: Any, combination: str, rank: int, **options: Any) -> dict[str, torch.Tensor]:
    """What PEFT's `add_weighted_adapter` makes of br and cy, as deltas."""
    import copy

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "br"), adapter_name="br")
    model.load_adapter(str(folder / "cy"), "cy")
    weights = [1.0, 1.0] if "ties" in combination else [0.5, 0.5]  # TIES divides by itself, by how many entries were kept
    model.add_weighted_adapter(["br", "cy"], weights, "both", combination_type=combination, svd_rank=rank, **options)
    layers = {
        name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }
    return {name: module.get_delta_weight("both").detach() for name, module in layers.items()}


@pytest.mark.parametrize(
    ("pruning", "combination", "rank"),
    [("none", "svd", 2), ("none", "svd", 4), ("magnitude", "magnitude_prune_svd", 2), ("ties", "ties_svd", 2)],
)
def test_a_merged_adapter_is_the_one_that_peft_merges(folder: Path, base: Any, pruning: Any, combination: str, rank: int) -> None:
    options = {} if pruning == "none" else {"density": 0.6}
    expected = peft_merged(folder, base, combination, rank, **options)
    merged = merge_pairs([read_pairs(folder / "br"), read_pairs(folder / "cy")], rank, pruning=pruning, **options)
    assert merged.keys() == expected.keys()
    for name, (A, B) in merged.items():
        assert A.shape[0] <= rank
        torch.testing.assert_close(B @ A, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pruning", get_args(Pruning))
@pytest.mark.parametrize("number", [2, 5])
def test_equal_adapters_merge_to_themselves_whatever_the_rule(folder: Path, pruning: Any, number: int) -> None:
    pairs = read_pairs(folder / "br")
    merged = merge_pairs([pairs] * number, 2, pruning=pruning, density=1.0)
    for name, (A, B) in pairs.items():
        torch.testing.assert_close(merged[name][1] @ merged[name][0], B @ A, rtol=1e-4, atol=1e-5)


def test_pruning_by_chance_is_seeded_and_leaves_the_generator_alone(folder: Path) -> None:
    pairs = [read_pairs(folder / "br"), read_pairs(folder / "cy")]
    before = torch.random.get_rng_state()
    first, again, other = (merge_pairs(pairs, 2, pruning="dare_linear", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name][1], again[name][1]) for name in first)
    assert not all(torch.equal(first[name][1], other[name][1]) for name in first)


def test_merged_folders_serve_every_language_and_the_report_says_what_it_costs(
    tmp_path: Path, folder: Path, base: Any, tiny_processor: Any
) -> None:
    growth = merge_similar(folder, tmp_path / "out")
    assert [(row.name, row.into) for row in growth.adapters] == [("br", "merged-br-2"), ("cy", "merged-br-2"), ("fi", "fi")]
    assert (growth.left_out, growth.num_after) == (["en-child"], 3)
    now = dense(tmp_path / "out" / "merged-br-2", base)
    for row in growth.adapters[:2]:
        own = dense(folder / row.name, base)
        away = {name: own[name] - now[name] for name in own}
        assert row.error == pytest.approx(np.sqrt(product(away, away) / product(own, own)), rel=1e-4)
        assert row.cosine == pytest.approx(product(own, now) / np.sqrt(product(own, own) * product(now, now)), rel=1e-4)
    assert (growth.adapters[2].error, growth.adapters[2].cosine) == (0.0, 1.0)
    sizes = {path.parent.name: path.stat().st_size for path in folder.glob("*/*.safetensors")}
    left = sum(path.stat().st_size for path in (tmp_path / "out").glob("*/*.safetensors"))
    assert (growth.bytes_before, growth.bytes_after) == (sum(sizes.values()), left)
    assert left < growth.bytes_before
    registry = AdapterRegistry.from_folder(tmp_path / "out")
    assert sorted((adapter.name, adapter.language) for adapter in registry) == [
        ("br", "br"),
        ("cy", "cy"),
        ("en-child", "en"),
        ("fi", "fi"),
    ]
    transcriber = Transcriber(build_tiny_model(tiny_processor), tiny_processor, registry)
    alone = Transcriber(build_tiny_model(tiny_processor), tiny_processor, AdapterRegistry([tmp_path / "out" / "merged-br-2"]))
    assert transcriber.transcribe(tone(300), language="br").text == alone.transcribe(tone(300), adapter="merged-br-2").text
    welsh = transcriber.transcribe(tone(300), language="cy")
    assert (welsh.adapter, welsh.language) == ("cy", "cy")
    original = Transcriber(build_tiny_model(tiny_processor), tiny_processor, AdapterRegistry([folder / "fi"]))
    assert transcriber.transcribe(tone(300), language="fi").text == original.transcribe(tone(300), language="fi").text


def renamed(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of an adapter that says other things of itself."""
    shutil.copytree(source, folder)
    row = json.loads((folder / "language_adapter.json").read_text())
    (folder / "language_adapter.json").write_text(json.dumps(row | values))
    return folder


def test_what_adapters_call_themselves_never_becomes_a_path(tmp_path: Path, folder: Path) -> None:
    names = {"br": "../../outside", "cy": "a/b", "fi": str(tmp_path / "absolute"), "en-child": "../merged-br-2"}
    adapters = [renamed(folder / source, tmp_path / "in" / source, name=name) for source, name in names.items()]
    growth = merge_similar(adapters, tmp_path / "deep" / "down" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["down"]
    assert [path.name for path in (tmp_path / "deep" / "down").iterdir()] == ["out"]
    found = {path.relative_to(growth.folder).as_posix() for path in growth.folder.rglob("adapter_config.json")}
    assert found == {f"{name}/adapter_config.json" for name in ("merged-br-2", "fi", "en")}
    registry = AdapterRegistry.from_folder(growth.folder)
    assert {(adapter.name, adapter.language, adapter.path.name) for adapter in registry} == {
        ("../../outside", "br", "merged-br-2"),
        ("a/b", "cy", "merged-br-2"),
        (names["fi"], "fi", "fi"),
        ("../merged-br-2", "en", "en"),
    }


def test_folders_of_one_language_and_taken_names_are_told_apart(tmp_path: Path, folder: Path) -> None:
    adapters = [
        folder / "br",
        folder / "cy",
        renamed(folder / "fi", tmp_path / "en", language="en", name="Merged-BR-2"),
        folder / "en-child",
    ]
    growth = merge_similar(adapters, tmp_path / "out")
    assert [row.into for row in growth.adapters] == ["merged-br-2-2", "merged-br-2-2", "Merged-BR-2"]
    assert growth.num_after == 3
    where = {adapter.name: adapter.path.name for adapter in AdapterRegistry.from_folder(tmp_path / "out")}
    assert where == {"br": "merged-br-2-2", "cy": "merged-br-2-2", "Merged-BR-2": "en", "en-child": "en-2"}


def test_many_adapters_with_long_names_become_one_that_loads(tmp_path: Path, folder: Path) -> None:
    codes = ["br", "cy", "fi", "sv", "da", "de", "es", "it", "pt", "ro", "pl", "cs", "sk"]
    adapters = [renamed(folder / "br", tmp_path / code, name=f"whisper-small-lora-{code}-{'long' * 10}", language=code) for code in codes]
    growth = merge_similar(adapters, tmp_path / "out")
    assert {row.into for row in growth.adapters} == {"merged-br-13"}
    assert sorted(adapter.language for adapter in AdapterRegistry.from_folder(tmp_path / "out")) == sorted(codes)
    alone = LanguageAdapter.load(tmp_path / "out" / "merged-br-13")
    assert alone.name == "merged-br-13"
    row = json.loads((alone.path / "language_adapter.json").read_text())
    assert [member["language"] for member in row["training"]["merged_from"]] == codes


def test_without_fingerprints_adapters_of_bases_with_different_names_are_not_merged(tmp_path: Path, folder: Path) -> None:
    def made_for(code: str, base: str, signature: Any) -> Path:
        where = tmp_path / f"{code} {base} {signature is None}"
        return where if where.exists() else renamed(folder / code, where, base_model=base, base_signature=signature)

    signature = json.loads((folder / "br" / "language_adapter.json").read_text())["base_signature"]
    for first, second, words in (
        (("whisper-small", None), ("whisper-medium", None), "'whisper-small', the other for 'whisper-medium', and neither carries"),
        (("whisper-small", None), ("whisper-small", signature), "only one of them carries a fingerprint"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_similar([made_for("br", *first), made_for("cy", *second)], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    merge_similar([made_for("br", "whisper-small", None), made_for("cy", "whisper-small", None)], tmp_path / "out")
    merge_similar([made_for("br", "here", signature), made_for("cy", "there", signature)], tmp_path / "same weights")


def test_languages_can_be_compared_instead_of_weights(tmp_path: Path, folder: Path) -> None:
    alike = {("br", "fi"): 0.9, ("fi", "br"): 0.7, ("br", "cy"): 0.1, ("fi", "cy"): 0.2}
    growth = merge_similar(folder, tmp_path / "out", similarity=alike, number=2)
    assert [(row.name, row.into) for row in growth.adapters] == [("br", "merged-br-2"), ("cy", "cy"), ("fi", "merged-br-2")]
    assert growth.similarity[0, 2] == growth.similarity[2, 0] == pytest.approx(0.8)
    assert growth.by == "language similarity"
    with pytest.raises(ValueError, match="No similarity of 'br' and 'cy'"):
        merge_similar(folder, tmp_path / "other", similarity={("br", "fi"): 0.9})
    assert not (tmp_path / "other").exists()


def test_the_cost_is_the_difference_of_two_evaluations(tmp_path: Path, folder: Path, base: Any, tiny_processor: Any) -> None:
    from whisper_moe.data import Clip, Clips
    from whisper_moe.evaluate import evaluate_clips

    sounds = [(tone(200 + 150 * i, 0.5) * 32767).astype(np.int16) for i in range(4)]
    untranscribed = Clips([Clip(sound, f"ab cd {i}") for i, sound in enumerate(sounds)], "set")
    own = PeftModel.from_pretrained(build_tiny_model(tiny_processor), str(folder / "cy"))
    written = evaluate_clips(own, tiny_processor, untranscribed, prompt_language="cy", batch_size=16).hypotheses
    clips = Clips([Clip(sound, text) for sound, text in zip(sounds, written, strict=True)], "set")  # so the adapter makes no errors
    growth = merge_similar(folder, tmp_path / "out", base=base, processor=tiny_processor, eval_sets={"Welsh": clips})
    rates = growth.adapters[1].rates
    for key, path in (("before", folder / "cy"), ("after", tmp_path / "out" / "merged-br-2")):
        model = PeftModel.from_pretrained(build_tiny_model(tiny_processor), str(path))
        expected = evaluate_clips(model, tiny_processor, clips, prompt_language="cy", batch_size=16)
        assert rates[key] == pytest.approx(expected.scores.wer)
    assert rates["before"] == 0 < rates["after"]
    assert rates["cost"] == pytest.approx(rates["after"] - rates["before"])
    assert rates["low"] <= rates["cost"] <= rates["high"]
    assert (growth.adapters[0].rates, growth.adapters[2].rates) == ({}, {})
    assert "WER" in growth.to_markdown()


def test_clips_that_cannot_be_scored_are_told_and_the_report_is_not_lost(
    tmp_path: Path, folder: Path, base: Any, tiny_processor: Any
) -> None:
    from whisper_moe.data import Clip, Clips

    clips = Clips([Clip((tone(200) * 32767).astype(np.int16), "?!")], "marks")
    with pytest.warns(UserWarning, match="could not be measured: marks: No reference has a word"):
        growth = merge_similar(folder, tmp_path / "out", base=base, processor=tiny_processor, eval_sets={"cy": clips})
    assert [row.rates for row in growth.adapters] == [{}, {}, {}]
    assert growth.num_after == 3


def test_files_hold_the_figures_and_a_picture(tmp_path: Path, folder: Path) -> None:
    growth = merge_similar(folder, tmp_path / "out")
    saved = growth.save()
    assert json.loads((saved / "growth.json").read_text()) == growth.to_dict()
    assert "4 adapters became 3" in (saved / "growth.md").read_text()
    assert (saved / "growth.png").read_bytes()[:4] == b"\x89PNG"
    labels = [label.get_text() for axis in growth.figure().axes for label in axis.get_yticklabels()]
    assert sorted(labels) == ["br", "cy", "fi"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out": "."}, "there already"),
        ({"adapters": ["br"]}, "nothing to compare"),
        ({"adapters": ["br", "alien"]}, "other weights"),
        ({"adapters": ["br", "cy", "cy-again"]}, "Two adapters write Welsh"),
        ({"number": 9}, "1 to 3"),
        ({"pruning": "ties!"}, "pruning is one of"),
        ({"rank": 0}, "at least 1"),
        ({"eval_sets": {"cy": None}}, "its processor"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(
    tmp_path: Path, folder: Path, base: Any, tiny_processor: Any, change: dict[str, Any], words: str
) -> None:
    write_adapter(tmp_path / "adapters" / "alien", build_tiny_model(tiny_processor, seed=9), "sv")
    write_adapter(tmp_path / "adapters" / "cy-again", base, "cy", seed=4)
    places = {
        name: next(path for path in (folder / name, tmp_path / "adapters" / name) if path.exists()) for name in change.get("adapters", ())
    }
    adapters = list(places.values()) or folder
    out = tmp_path / change.get("out", "out")
    with pytest.raises(ValueError, match=words):
        merge_similar(adapters, out, **{key: value for key, value in change.items() if key not in ("adapters", "out")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]


def test_a_broken_map_of_merged_adapters_is_named(tmp_path: Path, folder: Path) -> None:
    merge_similar(folder, tmp_path / "out")
    row = {"name": "cy", "language": "cy", "carrier": None, "folder": "../elsewhere"}
    (tmp_path / "out" / "merged_adapters.json").write_text(json.dumps({"format": 1, "adapters": [row]}))
    with pytest.raises(ValueError, match=r"'\.\./elsewhere', which is no adapter beside it"):
        AdapterRegistry.from_folder(tmp_path / "out")


def test_the_command_merges_a_folder(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = {"languages": ["br", "cy", "fi"], "posterior": [[0.5, 0.1, 0.6], [0.1, 0.5, 0.1], [0.7, 0.1, 0.5]]}
    (tmp_path / "similarity.json").write_text(json.dumps({"matrix": matrix}))
    arguments = ["merge-similar", str(folder), "--out", str(tmp_path / "out"), "--by", str(tmp_path / "similarity.json"), "--number", "2"]
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [each["into"] for each in row["adapters"]] == ["merged-br-2", "cy", "merged-br-2"]
    assert (tmp_path / "out" / "growth.md").is_file()
    assert main(["merge-similar", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "there already" in capsys.readouterr().err
    (tmp_path / "similarity.json").write_text("{}")
    assert main(["merge-similar", str(folder), "--out", str(tmp_path / "new"), "--by", str(tmp_path / "similarity.json")]) == 2
    assert "no matrix of languages" in capsys.readouterr().err


def test_the_tree_is_drawn_without_crossings() -> None:
    joins = [Join((0,), (3,), 0.9), Join((1,), (2,), 0.8), Join((0, 3), (1, 2), 0.1)]
    assert _leaves(joins, 4) == [0, 3, 1, 2]
