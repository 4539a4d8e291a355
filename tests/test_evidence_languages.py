"""LoRA-Whisper's experiments: equal amounts for every arm, sources, similarity, old languages; on the tiny Whisper and noise."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.evidence import languages, sources
from recipes.evidence.fitting import Schedule, fit
from recipes.evidence.ground import SPOKEN, Data, Ground, Item, SetSource
from recipes.evidence.methods import Trained, attach
from recipes.evidence.runs import Context, Settings
from recipes.evidence.store import Store
from recipes.synthetic_speech import PackWriter
from whisper_moe.languages import language_posterior
from whisper_moe.registry import LanguageAdapter, load_folder

BASE, NEW = ("espeak-es", "espeak-it", "espeak-pl"), ("kichwa", "espeak-ca")
CLIPS = {"train": 8, "dev": 2, "test": 3}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Noise with words. The language without a token is prompted as Spanish."""
    work, rng = tmp_path_factory.mktemp("languages"), np.random.default_rng(0)
    for language in ("es", "it", "pl", "ca", "qug"):
        writer = PackWriter(work / "packs", language)
        for split, count in CLIPS.items():
            for _ in range(count):
                samples = (rng.standard_normal(rng.integers(8_000, 16_000)) * 3000).astype(np.int16)
                text = " ".join("".join(rng.choice(list("aeilmnost"), 4)) for _ in range(3))
                writer.add(samples, text=text, language=language, speaker="one", split=split)
        writer.close()
    return Data(work / "none", work / "none", work, sets=(("kichwa", SetSource(SPOKEN, "qug", "es")),))


def context_over(ground: Ground, work: Path) -> Context:
    """With artifacts of its own in `work`."""
    settings = Settings(
        ground=ground.name, num_steps=4, batch_size=2, test_clips=3, seeds=2, smoke=True,
        base_sets=BASE, new_sets=NEW, data=replace(ground.data, work=work),
    )  # fmt: skip
    return Context(settings, ground, Store(settings.work / "rows"))


@pytest.fixture(scope="module")
def context(tiny_folder: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A frozen encoder, as on the own decoder."""
    return context_over(Ground("tiny", tiny_folder, True, data), tmp_path_factory.mktemp("work"))


@dataclass
class Noted:
    """Stands in for training and transcribing: notes how long and with how many weights, and lets nothing happen."""

    schedules: list[Schedule] = field(default_factory=list)

    def fitted(self, trained: Trained, schedule: Schedule) -> tuple[float, float, float]:
        self.schedules.append(schedule)
        return 0.0, 0.0, 0.0

    def wrote(self, model: Any, items: Sequence[Item]) -> list[str]:
        """As if every clip had been heard rightly."""
        return [item.text for item in items]


def noting(context: Context, work: Path) -> tuple[Context, Noted]:
    ground, noted = copy.copy(context.ground), Noted()
    ground.rehearsal = noted
    return context_over(ground, work), noted


@torch.inference_mode()
def logits(context: Context, model: Any, items: Sequence[Item]) -> torch.Tensor:
    states = context.ground.encoder_states(model, items)
    labels = torch.tensor([item.labels[:8] for item in items])
    found: torch.Tensor = model.eval()(encoder_outputs=(states,), decoder_input_ids=labels, use_cache=False).logits
    return found


def with_folders(model: Any, *folders: Path) -> Any:
    """A copy of the base with LoRA folders added to its weights, product by product."""
    dense = copy.deepcopy(model)
    for folder in folders:
        tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text("utf-8"))
        for key in (key for key in tensors if "lora_A" in key):
            A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            with torch.no_grad():
                dense.get_submodule(name).weight += B @ A * config["lora_alpha"] / config["r"]
    return dense


# ---- which runs --------------------------------------------------------------------------------------------------------


def test_every_run_has_a_key_of_its_own_and_all_seeds_of_the_papers_arms_come_before_the_rest() -> None:
    keys = [run.key for run in languages.runs(Settings())]
    assert len(set(keys)) == len(keys)
    first = [
        f"languages-interference/{arm}-s{seed}" for arm in ("joint-lora", "per-language-lora", "sequential-full") for seed in (0, 1, 2)
    ]
    first += [f"languages-expansion/{name}-warm-nearest-s{seed}" for name in ("kichwa", "espeak-ca") for seed in (0, 1, 2)]
    later = [at for at, key in enumerate(keys) if "similarity/" in key or "hours/" in key or "shared-private" in key]
    assert max(keys.index(key) for key in first) < min(later)
    assert len(later) == 3 * (4 * 7 + 2 * 3 * 4 + 1)
    tried = {key.removeprefix("languages-tuning/").removesuffix("-s0") for key in keys if "tuning" in key}
    assert tried == {"lora-learnt", "full-learnt", "s2lora-learnt", "lora-base", "lora-new", "full-new", "pool-new", "s2lora-new"}


def test_a_smoke_run_has_one_of_every_kind() -> None:
    keys = [run.key for run in languages.runs(replace(Settings(), smoke=True))]
    assert {key.partition("/")[0] for key in keys} == {run.part for run in languages.runs(Settings())}
    assert all(any(key.endswith(f"-{kind}-s0") for key in keys) for kind in languages.KINDS)
    assert all(any(f"/{arm}-s0" in key for key in keys) for arm in (*languages.INTERFERENCE, *languages.BEYOND_THE_PAPER))


# ---- amounts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [*languages.INTERFERENCE, *languages.BEYOND_THE_PAPER])
def test_every_arm_takes_the_same_number_of_clips(context: Context, arm: str, tmp_path: Path) -> None:
    planned, noted = noting(context, tmp_path)
    for kind in ("lora", "full", "s2lora"):
        sources.tuned(planned, kind, "learnt")
    noted.schedules.clear()
    row = languages.interference(planned, arm, 0)
    per_language = sources.steps(planned.settings, sources.PER_LANGUAGE)
    assert per_language > 1
    assert sum(schedule.num_steps * schedule.batch_size for schedule in noted.schedules) == len(BASE) * per_language * 2
    assert set(row["sets"]) == set(BASE)


def test_minutes_are_drawn_anew_for_each_seed(context: Context) -> None:
    everything = context.ground.items("espeak-es", "train", 8)
    wanted = sum(item.seconds for item in everything) / 60 / 2
    drawn = [sources.training_items(context, "espeak-es", wanted, seed) for seed in (0, 1)]
    for items in drawn:
        assert sum(item.seconds for item in items) >= 60 * wanted > sum(item.seconds for item in items[:-1])
        assert len({id(item) for item in items}) == len(items)
        assert all(any(item is other for other in everything) for item in items)
    assert [id(item) for item in drawn[0]] != [id(item) for item in drawn[1]]


def test_each_seed_begins_with_another_language() -> None:
    orders = [languages.sequence(BASE, seed) for seed in range(4)]
    assert [order[0] for order in orders] == ["espeak-es", "espeak-it", "espeak-pl", "espeak-es"]
    assert all(sorted(order) == sorted(BASE) for order in orders)


def test_a_model_that_is_trained_again_learns_as_fast_as_the_first_time(context: Context) -> None:
    method = replace(sources.LORA, learning_rate=1e-3)
    trained = attach(context.ground.fresh(), method, decoder_only=True, num_steps=4)
    items = [context.ground.items("espeak-es", "train", 8)]

    def moved() -> float:
        before = [weight.detach().clone() for weight in trained.groups[0]["params"]]
        fit(context.ground, trained, items, Schedule(4, 2))
        return max(float((now - old).abs().max()) for now, old in zip(trained.groups[0]["params"], before, strict=True))

    first, second = moved(), moved()
    assert second > 0.5 * first
    assert trained.groups[0]["lr"] == 1e-3


def test_of_languages_learnt_in_turn_the_row_says_how_each_was_when_it_had_just_been_learnt(context: Context) -> None:
    row = languages.sequential(context, sources.LORA.with_rate(3e-2), 1)
    assert row["order"] == ["espeak-it", "espeak-pl", "espeak-es"]
    assert row["stages"]["espeak-es"]["char_errors"] == row["sets"]["espeak-es"]["char_errors"]
    alone = attach(context.ground.fresh(), sources.LORA.with_rate(3e-2), decoder_only=True, num_steps=6, seed=1)
    fit(context.ground, alone, [sources.training_items(context, "espeak-it")], Schedule(2, 2, seed=1))
    measured = sources.measure(alone.model, context.ground, languages.tested(context, "espeak-it"))
    assert row["stages"]["espeak-it"]["char_errors"] == measured.char_errors
    assert row["trainings"] == len(row["clips"]) == 3


# ---- adapters ----------------------------------------------------------------------------------------------------------


def test_a_source_is_a_folder_that_writes_what_the_base_and_its_products_write(context: Context) -> None:
    folder = sources.source_adapter(context, "kichwa", 1)
    adapter = LanguageAdapter.load(folder)
    assert (adapter.language, adapter.prompt_language) == ("qug", "es")
    items = context.ground.items("kichwa", "test", 3)
    loaded = logits(context, load_folder(context.ground.fresh(), folder), items)
    torch.testing.assert_close(loaded, logits(context, with_folders(context.ground.base, folder), items))
    assert not torch.equal(loaded, logits(context, context.ground.base, items))
    assert not adapter.touches_encoder
    assert sources.source_adapter(context, "kichwa", 0) != folder


def test_where_the_encoder_is_trained_too_sources_adapt_it(context: Context, tmp_path: Path) -> None:
    whole = context_over(context.ground.with_frozen_encoder(False), tmp_path)
    assert LanguageAdapter.load(sources.source_adapter(whole, "espeak-es")).touches_encoder


def test_starts_begin_where_they_say(context: Context) -> None:
    ranked = list(sources.ranked_sources(context, "espeak-ca"))
    folders = {name: sources.source_adapter(context, name, 0) for name in ranked}
    items, heard = context.ground.items("espeak-ca", "test", 3), sources.similarity(context, "espeak-ca")
    base = context.ground.base

    def begun(kind: str, candidates: Sequence[Path]) -> torch.Tensor:
        _, trained = sources.begin(context, kind, candidates, None if kind == "cold" else heard, rate=1e-3, seed=0)
        return logits(context, trained.model, items)

    torch.testing.assert_close(begun("cold", []), logits(context, base, items))
    nearest = logits(context, with_folders(base, folders[ranked[0]]), items)
    torch.testing.assert_close(begun("warm", list(folders.values())), nearest)
    torch.testing.assert_close(begun("stacked", list(folders.values())), nearest)
    torch.testing.assert_close(begun("warm", [folders[ranked[-1]]]), logits(context, with_folders(base, folders[ranked[-1]]), items))


@pytest.mark.parametrize("kind", ["full", "stacked", "pool"])
def test_a_new_language_leaves_old_ones_alone_unless_the_whole_model_is_trained(context: Context, kind: str) -> None:
    row = languages.expansion(context, "espeak-ca", kind, 0)
    changed = {name for name, parts in row["old_languages"].items() if parts}
    assert bool(changed) == (kind == "full")
    assert set(row["old_languages"]) == {"espeak-it", *(("espeak-pl",) if kind == "stacked" else ())}
    assert set(row["sets"]) == {"espeak-ca", *(BASE if kind == "full" else ())}


def test_each_way_begins_from_the_sources_that_it_says(context: Context, tmp_path: Path) -> None:
    planned, noted = noting(context, tmp_path)
    rows = {kind: languages.expansion(planned, "espeak-ca", kind, 0) for kind in languages.KINDS}
    heard = rows["moe"]["similarity"]
    ranked = sorted(BASE, key=lambda name: -heard[name])
    assert {kind: row.get("sources") for kind, row in rows.items()} == {
        "full": None,
        "pool": None,
        "cold": [],
        "warm-nearest": ranked[:1],
        "warm-farthest": ranked[-1:],
        "stacked": ranked[:1],
        "moe": ranked,
    }
    assert {schedule.num_steps for schedule in noted.schedules[-2:]} == {2}
    assert rows["pool"]["num_trained"] < rows["cold"]["num_trained"] == rows["stacked"]["num_trained"] < rows["moe"]["num_trained"]
    assert rows["stacked"]["num_bytes"] > rows["cold"]["num_bytes"]


def test_an_adapter_that_stays_behind_is_seen(context: Context) -> None:
    model = context.ground.fresh()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] += 1e-3
    found = languages.old_languages(context, None, model, "espeak-ca", None, None)
    assert "weights" in found["espeak-it"]


def test_the_shared_lora_lies_under_the_private_ones(context: Context) -> None:
    row = languages.shared_private(context, 0)
    shared = context.settings.work / "artifacts" / "shared-s0"
    ranks = {len(tensor) for key, tensor in load_file(shared / "adapter_model.safetensors").items() if "lora_A" in key}
    assert ranks == {sources.RANK}
    lora = sum(tensor.numel() for tensor in load_file(shared / "adapter_model.safetensors").values())
    assert row["num_trained"] == lora  # the private one alone
    assert row["num_bytes"] > 2 * 4 * lora  # both, since it is served as one LoRA


# ---- similarity and choices --------------------------------------------------------------------------------------------


def test_similarity_is_the_share_of_what_the_base_hears_besides_the_language_itself(context: Context) -> None:
    clips = context.ground.data.clips("espeak-ca", "train", 3)
    means: dict[str, float] = {}
    for index in range(len(clips)):
        features = context.ground.processor.feature_extractor(
            clips[index]["audio"], sampling_rate=16_000, return_tensors="pt"
        ).input_features
        (posterior,) = language_posterior(context.ground.base, features)
        for code, probability in posterior.probabilities.items():
            means[code] = means.get(code, 0.0) + probability / len(clips)
    shares = sources.ranked_sources(context, "espeak-ca")
    for name, share in shares.items():
        assert math.isclose(
            share, means[name.removeprefix("espeak-")] / (1 - means["ca"]), rel_tol=0.03, abs_tol=1e-5
        )  # it listens in bf16
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_similarity_is_listened_to_once_and_read_back_as_it_was(context: Context) -> None:
    first = sources.similarity(context, "kichwa")
    assert first.language == "qug"
    assert first == sources.similarity(context, "kichwa")
    assert {name for row in first.rows for name in row.adapters} == set(BASE)


def test_the_rate_with_the_fewest_wrong_characters_is_taken(context: Context, tmp_path: Path) -> None:
    other = context_over(context.ground, tmp_path)
    folder = other.settings.work / "artifacts" / "rates-lora-new"
    folder.mkdir(parents=True)
    (folder / "rates.json").write_text(json.dumps({"0.001": {"cer": 0.5}, "0.005": {"cer": 0.3}, "0.02": {"cer": 0.9}}), "utf-8")
    assert sources.best_rate(other, "lora", "new") == 0.005


def test_the_most_minutes_are_the_expansions_run(context: Context, tmp_path: Path) -> None:
    planned, noted = noting(context, tmp_path)
    planned = Context(replace(planned.settings, new_sets=Settings.new_sets), planned.ground, planned.store)
    done = {"kind": "full", "sets": {"kichwa": {"cer": 0.25}, "kerstin": {"cer": 0.5}}, "last_loss": 1.5}
    planned.store.path("languages-expansion/kichwa-full-s1").parent.mkdir(parents=True)
    planned.store.write("languages-expansion/kichwa-full-s1", done)
    row = languages.by_minutes(planned, "kichwa", "full", 30, 1)
    assert row == {"kind": "full", "sets": {"kichwa": {"cer": 0.25}}, "last_loss": 1.5, "max_minutes": 30}
    assert not noted.schedules
