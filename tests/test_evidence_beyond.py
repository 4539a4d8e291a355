"""Pools, forty languages, mixed batches, merging, layouts and code-switching of the experiments, on the tiny Whisper and noise."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file

from recipes.evidence import beyond, growth_speech
from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import Data, Ground, Item
from recipes.evidence.growth_speech import GROWTH, NUM_DEV, NUM_TEST, NUM_TRAIN, Spoken, growth_items, make_pack, planned
from recipes.evidence.pools import BROAD_POOL, POOL, RANDOM_POOL, joint_pool, over_pool
from recipes.evidence.runs import Context, Settings
from recipes.evidence.store import Store
from recipes.synthetic_speech import VOICES, PackWriter, Utterance
from whisper_moe.data import clips_from_rows

WEIGHTS = "adapter_model.safetensors"
SPOKEN = {each.name: each for each in GROWTH}
CLIPS = {"train": 5, "dev": 2, "test": 4}
RATE = 16_000


def noise(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    samples = (rng.standard_normal(rng.integers(8_000, 16_000)) * 3000).astype(np.int16)
    return samples, " ".join("".join(rng.choice(list("aeilmnost"), 4)) for _ in range(3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Noise with words, as recorded and as spoken sets."""
    import pyarrow
    import pyarrow.parquet as parquet
    import soundfile

    folder, rng = tmp_path_factory.mktemp("beyond"), np.random.default_rng(0)
    for language in dict.fromkeys(("es", "it", "pl", "ca", "fi", "sv", "hu", *(spoken.name for spoken in BROAD_POOL.languages))):
        writer = PackWriter(folder / "work" / "packs", language)
        for split, count in CLIPS.items():
            for _ in range(count):
                samples, text = noise(rng)
                writer.add(samples, text=text, language=language, speaker="one", split=split)
        writer.close()
    for name, language in {"de_kerstin": "de", "qug_killkan": "qug"}.items():
        (folder / "speech" / name).mkdir(parents=True)
        for split, count in CLIPS.items():
            rows = []
            for number in range(count):
                samples, text = noise(rng)
                sound = io.BytesIO()
                soundfile.write(sound, samples, RATE, format="FLAC")
                text += " [UNK]" if split == "test" and number == 3 else ""
                rows.append({"audio": {"bytes": sound.getvalue(), "path": f"{number}.flac"}, "text": text, "code_switch": number % 2 == 0})
            for row in rows:
                row |= {"language": language, "speaker": None}
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "speech" / name / f"{split}.parquet")
    return Data(folder / "speech", folder / "text", folder / "work")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_processor: Any) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(tiny_processor).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def make_context(tiny: Path, data: Data, frozen: bool) -> Context:
    settings = Settings(
        ground="own-decoder" if frozen else "pocket", num_steps=20, batch_size=4, test_clips=4, smoke=True, data=data,
        base_sets=("kerstin", "espeak-es"), new_sets=("kichwa", "espeak-ca"),
    )  # fmt: skip
    return Context(settings, Ground(settings.ground, tiny, frozen, data), Store(settings.work / "rows"))


@pytest.fixture(scope="module")
def context(tiny: Path, data: Data) -> Context:
    """A frozen encoder, as on the own decoder."""
    return make_context(tiny, data, True)


@pytest.fixture(scope="module")
def whole(tiny: Path, data: Data) -> Context:
    """The encoder is adapted too, as on the pocket."""
    return make_context(tiny, data, False)


def logits(context: Context, model: Any, items: Sequence[Item]) -> torch.Tensor:
    with torch.inference_mode():
        states = context.ground.encoder_states(model, items)
        labels = torch.tensor([item.labels[:8] for item in items])
        found: torch.Tensor = model(encoder_outputs=(states,), decoder_input_ids=labels, use_cache=False).logits
    return found


def decoder_weights(model: Any) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if "decoder.layers" in name]


# ---- pools -------------------------------------------------------------------------------------------------------------


def test_a_language_of_a_pool_trains_a_number_for_each_direction_of_each_weight(context: Context) -> None:
    trained = over_pool(context, joint_pool(context), beyond.METHODS["pool"][0], 0)
    num_weights = len(decoder_weights(context.ground.base))
    assert trained.num_trained == POOL.rank * num_weights
    attention = over_pool(context, joint_pool(context), beyond.METHODS["pool-attention"][0], 0)
    assert attention.num_trained == POOL.rank * sum("fc" not in name for name in decoder_weights(context.ground.base))


def test_coefficients_begin_at_the_base_and_leave_the_pool_as_it_is(context: Context) -> None:
    pool = joint_pool(context)
    items = beyond.training_items(context, "espeak-ca")
    fresh = over_pool(context, pool, beyond.METHODS["pool"][0], 0)
    assert torch.equal(logits(context, fresh.model.eval(), items), logits(context, context.ground.base, items))
    model, row = beyond.fitted(context, "pool", items, Schedule(4, 4, seed=0))
    assert not torch.equal(logits(context, model, items), logits(context, context.ground.base, items))
    of_file = {name: tensor for name, tensor in load_file(pool / WEIGHTS).items() if "coefficients" not in name}
    now = dict(model.named_parameters())
    assert of_file
    for name, tensor in of_file.items():
        assert torch.equal(tensor, now[f"{name}.pool"]), name
    assert row["about"] == {"how": "pool", "pool": "s2-pool", "pool_bytes": (pool / WEIGHTS).stat().st_size}


def test_the_bytes_of_a_language_are_those_of_its_own_file(context: Context, tmp_path: Path) -> None:
    trained = over_pool(context, joint_pool(context), beyond.METHODS["pool"][0], 0)
    trained.model.save_pretrained(str(tmp_path), selected_adapters=["default"], save_embedding_layers=False)
    assert trained.num_bytes() == (tmp_path / WEIGHTS).stat().st_size
    assert sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values()) == trained.num_trained


def test_a_pool_is_trained_once_and_the_one_of_zero_steps_is_not(context: Context) -> None:
    trained, drawn = joint_pool(context), joint_pool(context, RANDOM_POOL)
    written = (trained / WEIGHTS).stat().st_mtime_ns
    assert joint_pool(context) == trained
    assert (trained / WEIGHTS).stat().st_mtime_ns == written
    ours, theirs = load_file(trained / WEIGHTS), load_file(drawn / WEIGHTS)
    assert any(tensor.any() for name, tensor in ours.items() if "coefficients" in name)
    for name, tensor in theirs.items():
        if "coefficients" in name:
            assert not tensor.any()
        else:  # the same draw, moved by training
            assert not torch.equal(tensor, ours[name])
            assert torch.allclose(tensor, ours[name], atol=0.1)


def test_a_broad_pool_is_trained_on_new_languages_and_on_none_that_is_added_later(context: Context) -> None:
    heard = {spoken.name for spoken in BROAD_POOL.languages}
    assert len(heard) == 16
    assert not heard & {name.removeprefix("espeak-") for name in Settings.new_sets}
    assert not any(spoken.known or not spoken.latin for spoken in BROAD_POOL.languages)
    as_long = replace(POOL, name="as-long", share=BROAD_POOL.share)  # it differs by its languages alone
    broad, narrow = (load_file(joint_pool(context, kind) / WEIGHTS) for kind in (BROAD_POOL, as_long))
    assert broad.keys() == narrow.keys()
    assert not any(torch.equal(tensor, narrow[name]) for name, tensor in broad.items())


# ---- forty languages ---------------------------------------------------------------------------------------------------


def test_the_curve_has_forty_languages_with_tokens_that_whisper_knows(context: Context) -> None:
    assert len(GROWTH) == len({each.name for each in GROWTH}) == len({each.language for each in GROWTH}) == 40
    known = context.ground.base.generation_config.lang_to_id
    assert {f"<|{each.prompt or each.language}|>" for each in GROWTH} <= set(known)
    kinds = [(not each.latin, each.known) for each in GROWTH]
    assert kinds == sorted(kinds), "new ones first, those in other letters last"


def test_no_sentence_and_no_voice_is_in_two_splits() -> None:
    lines = [f"sentence number {'x' * number}" for number in range(1, 200)]
    made = planned(lines, SPOKEN["hu"])
    assert made == planned(lines, SPOKEN["hu"])
    by_split = {split: [each for each in made if each.split == split] for split in CLIPS}
    assert {split: len(each) for split, each in by_split.items()} == {"train": NUM_TRAIN, "dev": NUM_DEV, "test": NUM_TEST}
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        for of in (lambda each: each.text, lambda each: each.voice):
            assert not {of(each) for each in by_split[first]} & {of(each) for each in by_split[second]}
    assert {each.voice.partition("+")[2] for each in by_split["test"]} <= set(VOICES["test"])
    assert {each.voice.partition("+")[0] for each in made} == {"hu"}


def test_few_sentences_are_spliced_for_training_only_and_others_are_left_out() -> None:
    lines = [f"{'a' * number} {'b' * number} {'c' * number}" for number in range(1, 51)] + ["\u65e5\u672c", "123"]
    made = planned(lines, Spoken("xx", "xx", "hu", pattern="[abc ]+"))
    train = [each.text for each in made if each.split == "train"]
    held_out = {each.text for each in made if each.split != "train"}
    assert len(train) == NUM_TRAIN
    assert len(held_out) == NUM_DEV + NUM_TEST
    assert not held_out & set(train)
    assert all(set(text) <= set("abc ") for text in train + list(held_out))


def test_a_pack_is_spoken_once(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    said: list[Utterance] = []

    def speak(utterances: list[Utterance], workers: int) -> Iterator[tuple[Utterance, np.ndarray]]:
        said.extend(utterances)
        return ((each, np.full(4000 + index, 100, np.int16)) for index, each in enumerate(utterances))

    monkeypatch.setattr(growth_speech, "speak_all", speak)
    (tmp_path / "ga-IE.txt").write_text("\n".join(f"{'o' * number} is" for number in range(1, 60)), "utf-8")
    other = replace(data, text=tmp_path, work=tmp_path / "work")
    make_pack(other, SPOKEN["ga-IE"])
    make_pack(other, SPOKEN["ga-IE"])
    assert len(said) == NUM_TRAIN + NUM_DEV + NUM_TEST
    ground = context.ground.with_frozen_encoder(False)
    ground.data = other
    items = growth_items(ground, SPOKEN["ga-IE"], "test", 5)
    assert len(items) == 5
    assert {(item.language, item.prompt) for item in items} == {("ga", "cy")}
    texts = {(4000 + index) / RATE: each.text for index, each in enumerate(said)}
    assert all(texts[item.seconds] == item.text for item in items)


@pytest.mark.parametrize("arm", beyond.GROWTH_METHODS)
def test_a_kept_adapter_writes_what_the_trained_one_writes(context: Context, arm: str) -> None:
    spoken = SPOKEN["ca"]
    row = beyond.growth_arm(context, arm, spoken)
    items = growth_items(context.ground, spoken, "train", 8)
    model, trained_row = beyond.fitted(context, arm, items, beyond.schedule(context.settings, "growth", 0))
    kept = beyond.with_adapter(context, beyond.growth_adapter(context, arm, spoken))
    assert torch.equal(logits(context, kept, items), logits(context, model, items))
    assert not torch.equal(logits(context, kept, items), logits(context, context.ground.base, items))
    assert row["last_loss"] == trained_row["last_loss"]
    assert row["about"]["how"] == arm
    assert row["about"]["target"] == "ca"
    assert row["about"]["latin"]


# ---- batches and merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_rows_of_a_mixed_batch_are_what_each_language_gets_alone(
    frozen: bool, context: Context, whole: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = context if frozen else whole
    about = beyond.mixed(ours)["about"]
    assert about["num_texts"] == 10, "three of Kichwa, four of Catalan, three of the base"
    assert about["equal_texts"] == about["equal_texts_in_table"] == 10
    assert about["largest_logit_difference"] < 1e-4
    if frozen:  # would a mistake be seen?
        monkeypatch.setattr(beyond, "with_adapter", lambda context, folder: context.ground.base)
        wrong = beyond.mixed(ours)["about"]
        assert wrong["largest_logit_difference"] > 10 * about["largest_logit_difference"]
        assert not wrong["equal_bits"]


def test_a_text_that_differs_is_counted() -> None:
    rows: list[tuple[str | None, Any]] = [("a", None), ("b", None), ("a", None)]
    assert beyond._compared(rows, [(1,), (2,), (3,)], {"a": [(1,), (3,)], "b": [(2,)]}) == 3
    assert beyond._compared(rows, [(1,), (2,), (3,)], {"a": [(3,), (1,)], "b": [(2,)]}) == 1


def test_what_two_languages_merge_into_is_the_mean_cut_to_their_rank(context: Context) -> None:
    folders = [beyond.growth_adapter(context, "lora-r8", SPOKEN[name]) for name in beyond.MERGED[:2]]
    row = beyond.merged(context, 1)
    assert row["about"] == {"num_adapters": 1, "groups": "kichwa ca"}
    assert list(row["sets"]) == ["kichwa", "ca"]
    assert row["num_bytes"] < 0.6 * sum((folder / WEIGHTS).stat().st_size for folder in folders)
    deltas: list[dict[str, np.ndarray]] = []
    for folder in folders:
        tensors = load_file(folder / WEIGHTS)
        names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        deltas.append({name: (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]).numpy() for name in names})
    squares = np.zeros(2)
    for name in deltas[0]:
        left, values, right = np.linalg.svd((deltas[0][name] + deltas[1][name]) / 2)
        cut = (left[:, :8] * values[:8]) @ right[:8]
        squares += [np.square(cut - each[name]).sum() for each in deltas]
    lengths = [sum(np.square(delta).sum() for delta in each.values()) for each in deltas]
    expected = np.sqrt(squares / lengths)
    assert [each["error"] for each in row["growth"]["adapters"]] == pytest.approx(expected, rel=1e-3)


def test_as_many_adapters_as_languages_are_the_languages_own(context: Context) -> None:
    row = beyond.merged(context, 2)
    own = beyond.growth_arm(context, "lora-r8", SPOKEN["ca"])
    assert row["sets"]["ca"]["char_errors"] == own["sets"]["ca"]["char_errors"]
    assert row["about"]["groups"] == "kichwa / ca"


# ---- layouts and two languages in a clip -------------------------------------------------------------------------------


def test_a_layout_is_one_pass_where_the_encoder_is_left_alone(whole: Context) -> None:
    rows = {layout: beyond.layout_arm(whole, layout, "espeak-ca") for layout in beyond.LAYOUTS}
    assert {layout: row["about"]["one_pass"] for layout, row in rows.items()} == {
        "everything": False,
        "decoder-only": True,
        "upper-private": False,
        "both": True,
    }
    # Rank 8 on q, k, v, fc1 and fc2 of width 16 and 32: numbers of a layer's self-attention and feed-forward, and of cross-attention.
    own, cross = 8 * (3 * 32 + 2 * 48), 8 * 3 * 32
    expected = {"everything": 4 * own + 2 * cross, "decoder-only": 2 * (own + cross), "upper-private": 2 * own + cross, "both": own + cross}
    assert {layout: row["num_trained"] for layout, row in rows.items()} == expected
    assert rows["everything"]["about"]["shared_bytes"] == 0 < rows["both"]["about"]["shared_bytes"]


def test_the_halves_of_the_code_switching_set_are_the_test_set(context: Context) -> None:
    import pyarrow.parquet as parquet

    halves = beyond.switched_items(context)
    data = context.ground.data
    rows = parquet.read_table(data.speech / "qug_killkan" / "test.parquet").to_pylist()
    flags = {row["text"]: row["code_switch"] for row in rows}
    assert [flags[item.text] for item in halves["kichwa-switched"]] == [True, True]
    assert [flags[item.text] for item in halves["kichwa-plain"]] == [False], "the fourth clip has [UNK] in it"
    whole = context.ground.items("kichwa", "test")
    both = halves["kichwa-switched"] + halves["kichwa-plain"]
    assert sorted(item.text for item in both) == sorted(item.text for item in whole)
    for item in both:
        (same,) = [each for each in whole if each.text == item.text]
        assert torch.equal(item.heard, same.heard)
        assert item.labels == same.labels
    assert clips_from_rows(rows, exclude_text=r"\[UNK\]").report.left_out.total() == 1


def test_a_start_from_a_source_differs_from_a_cold_one(context: Context) -> None:
    cold, warm, mixture = (beyond.switch_arm(context, arm) for arm in ("cold", "warm-es", "moe"))
    assert [row["about"]["sources"] for row in (cold, warm, mixture)] == ["", "espeak-es", "espeak-es, espeak-it, espeak-pl"]
    assert cold["num_trained"] == warm["num_trained"] < mixture["num_trained"]
    assert cold["first_loss"] != warm["first_loss"]
    assert set(cold["sets"]) == {"kichwa-switched", "kichwa-plain"}


def test_every_run_has_a_key_of_its_own_and_layouts_are_the_pockets() -> None:
    for ground in ("own-decoder", "pocket"):
        keys = [run.key for run in beyond.runs(Settings(ground=ground))]
        assert len(keys) == len(set(keys))
        assert any("beyond-layouts" in key for key in keys) == (ground == "pocket")
        counts = Counter(key.rpartition("-s")[0].partition("/")[2].partition("-")[0] for key in keys if key.startswith("beyond-growth"))
        assert counts == {"base": 40, "pool": 80, "lora": 40}  # two pools
