"""Full-size recipes: what a dry run says is what a formula and a real run say, recipes are strict, and sets of the Hub are cut as asked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need the train extra: pip install peft-s2lora[train]")
pytest.importorskip("matplotlib", reason="figures need the train extra: pip install peft-s2lora[train]")

import evidence_rows as rows

from recipes.evidence import child_speech, languages
from recipes.evidence.__main__ import main
from recipes.evidence.fitting import Schedule, fit
from recipes.evidence.full_size import BASES, Fitted, FullSize, Planned, RehearsedData, base_size, cost, expected, read_full_size, rehearse
from recipes.evidence.ground import Ground, SetSource, read_set
from recipes.evidence.methods import Method, attach
from recipes.evidence.page import all_results, skeleton, updated
from recipes.evidence.runs import Context
from recipes.evidence.store import Store
from whisper_moe.data import Clip, Clips, extract_features

RECIPES = Path(__file__).parent.parent / "recipes"
S2_LORA, LORA_WHISPER = RECIPES / "paper_s2lora.yaml", RECIPES / "paper_lora_whisper.yaml"


@pytest.fixture(scope="module")
def child() -> FullSize:
    """The recipe on the smallest Whisper: the same path, fewer layers."""
    return replace(read_full_size(S2_LORA), base="openai/whisper-tiny")


def child_runs(recipe: FullSize, pattern: str) -> list[Any]:
    return [run for run in child_speech.runs(recipe.settings) if re.search(pattern, run.key)]


def recipe_on(base: Path, recipe: Path, folder: Path) -> Path:
    """A copy of a recipe on another base, working below `folder`."""
    text = re.sub(r"^work: .*", f"work: {folder / 'work'}", recipe.read_text("utf-8"), flags=re.MULTILINE)
    path = folder / "recipe.yaml"
    path.write_text(text.replace("base: openai/whisper-small", f"base: {base}"), "utf-8")
    return path


# ---- dry runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans(child: FullSize) -> tuple[dict[str, Planned], int]:
    pattern = r"^child/base|^child-tuning/lora-0.0005|^child/(lora-r8|s2-r32-attention|full)-s[01]"
    untuned = replace(child, settings=replace(child.settings, smoke=True))  # which takes a learning rate without trying any
    made, num_parameters = rehearse(untuned, child_runs(child, pattern))
    return {plan.key: plan for plan in made}, num_parameters


def test_a_dry_run_counts_weights_as_formulas_do(plans: tuple[dict[str, Planned], int]) -> None:
    known, num_parameters = plans
    assert num_parameters == 37_760_640  # openai/whisper-tiny's
    d, ffn, layers = 384, 1536, 4
    # Per encoder layer 4 attention weights, per decoder layer 8, and fc1 and fc2 in both.
    sums = layers * (12 * 2 * d + 2 * 2 * (d + ffn))
    assert known["child/lora-r8-s0"].fitted[-1].num_trained == 8 * sums
    assert known["child/s2-r32-attention-s0"].fitted[-1].num_trained == 32 * 2 * d + 32 * 12 * layers  # one pair, a coefficient a direction
    assert known["child/full-s0"].fitted[-1].num_trained == num_parameters - 1500 * d  # all but the encoder's sinusoids
    assert known["child/base-s0"].fitted == []


def test_a_dry_run_says_steps_clips_and_every_seed(plans: tuple[dict[str, Planned], int], child: FullSize) -> None:
    known, _ = plans
    steps, sizes = child.settings.num_steps, dict(child.sizes)
    first, second = known["child/lora-r8-s0"], known["child/lora-r8-s1"]
    assert first.fitted[0].num_steps == steps
    assert known["child-tuning/lora-0.0005-s100"].fitted[0].num_steps == steps // 2
    assert first.clips == [min(child.settings.test_clips, sizes[name].clips[2]) for name in ("child", *child.settings.out_of_domain)]
    assert (second.fitted, second.clips) == (first.fitted, first.clips)


@pytest.mark.parametrize(
    ("first", "other", "stands_in"),
    [
        ("expansion/fleurs-cy-full-s0", "expansion/fleurs-el-full-s1", True),
        ("expansion/fleurs-cy-full-s0", "expansion/mls-pl-full-s0", False),  # which the first has measured too, as an old language
        ("similarity/fleurs-cy-from-mls-de-s0", "similarity/fleurs-el-from-mls-pl-s1", True),
        ("interference/per-language-lora-s0", "interference/per-language-lora-s1", True),
    ],
)
def test_a_run_that_another_stands_in_for_would_have_planned_the_same(tiny_folder: Path, first: str, other: str, stands_in: bool) -> None:
    read = read_full_size(LORA_WHISPER)
    sizes = tuple((name, replace(size, clips=(20, 10, 7 + at))) for at, (name, size) in enumerate(read.sizes))  # all of them different
    settings = replace(read.settings, base_sets=("mls-de", "mls-pl"), new_sets=("fleurs-cy", "fleurs-el", "mls-pl"), test_clips=100)
    runs = {run.key: run for run in languages.runs(settings)}
    recipe = replace(read, base=str(tiny_folder), sizes=sizes, settings=replace(settings, smoke=True))
    both, alone = (
        {plan.key: plan for plan in rehearse(recipe, [runs[f"languages-{key}"] for key in keys])[0]} for keys in ((first, other), (other,))
    )
    assert (both[f"languages-{other}"].fitted is both[f"languages-{first}"].fitted) == stands_in  # if so, nothing was attached for it
    assert {key: (both[key].fitted, both[key].clips) for key in alone} == {key: (plan.fitted, plan.clips) for key, plan in alone.items()}
    assert all(any(plan.clips or plan.fitted for plan in made.values()) for made in (both, alone))


def test_a_dry_run_of_a_run_is_what_the_run_does(tiny_folder: Path, tmp_path: Path, child: FullSize) -> None:
    settings = replace(child.settings, smoke=True, num_steps=2, batch_size=2, test_clips=2, seeds=1)
    recipe = replace(child, base=str(tiny_folder), settings=settings, device="cpu")
    (run,) = child_runs(recipe, r"^child/s2-r32-sparse")
    (plan,), _ = rehearse(recipe, [run])
    (planned,) = plan.fitted

    data = RehearsedData(work=tmp_path, sets=settings.data.sets)
    ground = Ground("tiny", recipe.base, False, data, recipe.device, whole_window=True)
    row = run.work(Context(settings, ground, Store(tmp_path / "rows")))
    assert row["num_trained"] == planned.num_trained
    assert row["schedule"]["rate_scale"] == 0.1  # the recipe's
    assert (row["schedule"]["num_steps"], row["schedule"]["batch_size"]) == (planned.num_steps, planned.batch_size)
    assert [len(each["words"]) for each in row["sets"].values()] == plan.clips
    assert row["num_bytes"] <= planned.num_bytes < 1.1 * row["num_bytes"]  # it is pruned, at most


def test_hours_are_operations_over_speed_plus_overheads(child: FullSize) -> None:
    machine = replace(child.machine, tflops=1.0, step_overhead_s=0.5, token_s=0.1)
    recipe = replace(child, machine=machine, sizes=(("child", replace(child.sizes[0][1], clip_s=5.0)),))
    size = base_size(recipe.base)
    adapter, full = Fitted(10, 40, num_steps=10, batch_size=4), Fitted(90, 360, num_steps=10, batch_size=4)
    forward = size.encoder_flops(1500) + size.decoder_flops(1500, 4 + 4 * 5.0)
    of_adapter, of_full = (cost(Planned("x", [each]), recipe, 100).train_h * 3600 for each in (adapter, full))
    assert of_adapter == pytest.approx(10 * (4 * 2 * forward / 1e12 + 0.5))
    assert of_full == pytest.approx(10 * (4 * 3 * forward / 1e12 + 0.5))
    measured = cost(Planned("x", clips=[33]), recipe, 100)
    assert measured.measure_h * 3600 == pytest.approx(33 * size.encoder_flops(1500) / 1e12 + 2 * 24 * 0.1)  # two batches
    frozen = cost(Planned("x", [adapter]), replace(recipe, frozen_encoder=True), 100)
    assert frozen.train_h < cost(Planned("x", [adapter]), recipe, 100).train_h


def test_operations_of_the_encoder_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    size = BASES["openai/whisper-tiny"]
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)).eval()
        features = torch.zeros(1, 80, 3000)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(features)
    assert size.encoder_flops(1500) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_runs_that_cannot_be_rehearsed_are_said_and_not_in_the_sum(child: FullSize) -> None:
    runs = child_runs(child, r"^child/(base|full-s0)")  # no tuning: there is no best rate
    said = expected(child, runs)
    assert "1 runs could not be rehearsed" in said
    assert "child/full-s0: The learning rates" in said
    assert re.search(r"^1 runs: ", said, re.MULTILINE)
    assert re.search(r"^\| child/base-s0 \|", said, re.MULTILINE)


def test_the_command_rehearses_lora_whisper_with_what_its_runs_start_from(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_on(tiny_folder, LORA_WHISPER, tmp_path)
    main(["full-size", str(path), "--dry-run", "--only", r"languages-(interference/base|expansion/fleurs-cy-(cold|stacked)-s[01])"])
    cells = {row[0]: row[1:] for line in capsys.readouterr().out.splitlines() if len(row := line.strip("| ").split(" | ")) == 8}
    steps, size = read_full_size(path).settings.num_steps, base_size(str(tiny_folder))
    assert size.encoder_layers == size.decoder_layers
    # Rank 32 on fc1 and fc2 of both sides, and q, k, v three times.
    lora = 32 * size.encoder_layers * (4 * (size.d_model + size.ffn) + 9 * 2 * size.d_model)
    for kind in ("cold-s0", "stacked-s0", "stacked-s1"):
        assert cells[f"languages-expansion/fleurs-cy-{kind}"][0] == f"{lora:,}"
        assert cells[f"languages-expansion/fleurs-cy-{kind}"][3:6] == [f"{steps // 2:,}", "16", "600"]
    assert cells["languages-interference/base-s0"][5] == f"{5 * 600 + 520:,}"  # Polish has 520
    sources = [key for key in cells if key.startswith("artifacts/sources-")]
    assert len(sources) == len(set(sources)) == 2 * 6  # of each base language one, for each seed
    assert all(cells[key][0] == f"{lora:,}" and cells[key][3] == f"{steps // 2:,}" for key in sources)


# ---- collecting --------------------------------------------------------------------------------------------------------


def test_results_of_a_recipe_come_on_the_page_beside_the_small_grounds(tiny_folder: Path, tmp_path: Path) -> None:
    path = recipe_on(tiny_folder, S2_LORA, tmp_path)
    base = Ground("whisper-small", tiny_folder, False, RehearsedData()).digest
    store = Store(read_full_size(path).settings.work / "rows")
    chosen = [row for row in rows.child_rows([0]) if row["part"] == "child" and row["arm"] in ("base", "full", "lora-r8")]
    for row in chosen:
        key = f"child/{row['arm']}-s{row['seed']}"
        store.path(key).parent.mkdir(parents=True, exist_ok=True)
        store.write(key, row | {"base": base, "ground": "whisper-small"})
    results = tmp_path / "results"
    main(["collect", "--recipe", str(path), "--results", str(results)])
    assert [each.name for each in results.iterdir()] == ["evidence-whisper-small-child.json"]
    text = updated(skeleton(), all_results(results), results)
    assert "### whisper-small\n\nSets: adults: the same task and accent, read by adults; children: " in text
    assert f"`python -m recipes.evidence full-size {path}`, " in text
    assert re.search(r"^\| full fine-tuning \| 990,000 ", text, re.MULTILINE)
    assert re.search(r"^\| a small set of parameters .* \| whisper-small \| LoRA r 8 trains ", text, re.MULTILINE)
    with pytest.raises(ValueError, match=r"says which runs to collect.*--smoke"):
        main(["collect", "--recipe", str(path), "--seeds", "2"])


# ---- recipes -----------------------------------------------------------------------------------------------------------


def test_the_recipes_name_a_real_base_and_sets_of_the_hub() -> None:
    for path in (S2_LORA, LORA_WHISPER):
        recipe = read_full_size(path)
        assert recipe.base in BASES
        assert (recipe.frozen_encoder, recipe.whole_window, recipe.device) == (False, True, "cuda")
        assert all("/" in source.source for _, source in recipe.settings.data.sets)
        assert [name for name, _ in recipe.settings.data.sets] == [name for name, _ in recipe.sizes]
    assert dict(read_full_size(S2_LORA).settings.data.sets)["child"].ages == (0, 15)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: 3", "seed: 3", "unknown key 'seed'.*seeds"),
        ("seeds: 3", "seeds: three", "seeds is 'three'.*a whole number"),
        ("batch_size: 16", "batch_size: 16\nbatch_size: 8", "stands twice"),
        ("    language: en\n    ages", "    langauge: en\n    ages", "sets: child: unknown key 'langauge'.*language"),
        ("    ages: [0, 15]\n", "    ages: [0]\n", "ages two"),
        ("clips: [1130, 120, 1250]", "clips: [1130, 120]", "clips are three"),
        ("out_of_domain: [adult,", "out_of_domain: [elders,", "wants the set 'elders'"),
        ("    language: de\n", '    language: "no"\n    lowercase: "no"\n', "lowercase is 'no'.*true or false"),
        ("  tflops: 60.0\n", "", "machine lacks tflops"),
        ("base: openai/whisper-small\n", "", "lacks base"),
        ("name: whisper-small", "name: pocket", "name is 'pocket'.*own-decoder"),
    ],
)
def test_a_recipe_is_read_strictly(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = S2_LORA.read_text("utf-8")
    assert old in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        read_full_size(path)


def test_bases_that_are_not_known_and_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, child: FullSize) -> None:
    with pytest.raises(ValueError, match=r"size of openai/whisper-huge.*whisper-small"):
        base_size("openai/whisper-huge")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'cuda'.*--device cpu"):
        child.open()


@pytest.mark.shared
def test_a_size_that_is_written_down_is_that_of_the_config() -> None:
    written = BASES["openai/whisper-base"]
    assert replace(base_size(str(RECIPES.parent.parent / "shared" / "whisper-base")), feed_forward=None) == written
    assert written.ffn == 2048


# ---- sets of the Hub ---------------------------------------------------------------------------------------------------

AGES = {"ann": "6", "ben": "9", "cid": "14", "dee": "19", "eve": ""}


def loader(*arguments: Any, split: str, **options: Any) -> Any:
    """Answers as `datasets.load_dataset` does."""
    from datasets import Dataset

    rows = [(name, age, number) for name, age in AGES.items() for number in range(2)]
    columns = {
        "audio": [{"array": np.full(16_000, 0.1).tolist(), "sampling_rate": 16_000, "bytes": None, "path": None} for _ in rows],
        "text": [f"{split.upper()} {name.upper()} {number}" for name, _, number in rows],
        "speaker": [name for name, _, _ in rows],
    }
    return Dataset.from_dict(columns | ({"age": [age for _, age, _ in rows]} if arguments[0] != "nobody/ageless" else {}))


def test_sets_are_cut_by_age_and_dev_speakers_are_in_no_other_split() -> None:
    source = SetSource("mispeech/speechocean762", "en", ages=(0, 15), dev_speakers=1, lowercase=True)
    read = {split: read_set(source, split, source.source, 30.0, loader) for split in ("train", "dev", "test")}
    speakers = {split: {clip.speaker for clip in clips.clips} for split, clips in read.items()}
    assert speakers["test"] == speakers["train"] | speakers["dev"] == {"ann", "ben", "cid"}
    assert len(speakers["dev"]) == 1
    assert not speakers["dev"] & speakers["train"]
    assert {clip.text.split()[0] for clip in (*read["dev"].clips, *read["train"].clips)} == {"train"}  # of that split, in small letters
    everybody = read_set(replace(source, ages=(), dev_speakers=0, train="train.100"), "train", source.source, 30.0, loader)
    assert {clip.speaker for clip in everybody.clips} == set(AGES)
    assert everybody.clips[0].text.startswith("train.100")


def test_ages_without_a_column_and_too_many_dev_speakers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no column 'age'.*audio, text, speaker"):
        read_set(SetSource("nobody/ageless", "en", ages=(0, 9)), "train", "nobody/ageless", 30.0, loader)
    with pytest.raises(ValueError, match="5 named speakers; 5 of them"):
        read_set(SetSource("some/body", "en", dev_speakers=5), "dev", "some/body", 30.0, loader)


# ---- the whole window, and devices -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise() -> Clips:
    rng = np.random.default_rng(0)
    return Clips([Clip(rng.normal(0, 3000, length).astype(np.int16), "ab", "en", "x") for length in (6_000, 12_000)])


def test_with_the_whole_window_the_encoder_hears_what_transformers_would_give_it(tiny_folder: Path, noise: Clips) -> None:
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(tiny_folder)
    whole = Ground("tiny", tiny_folder, False, RehearsedData(), whole_window=True)
    states = whole.encoder_states(whole.base, whole.hear(noise, "en", "en"))
    features = extract_features(processor, [noise[0]["audio"], noise[1]["audio"]], processor.feature_extractor.n_samples)
    wanted = whole.base.get_encoder()(features).last_hidden_state
    assert states.shape == wanted.shape == (2, 100, 16)
    torch.testing.assert_close(states, wanted, atol=0.02, rtol=0.02)  # features are kept in half precision
    cropped = Ground("tiny", tiny_folder, False, RehearsedData())
    assert cropped.encoder_states(cropped.base, cropped.hear(noise, "en", "en")).shape[1] < 100


def test_frozen_states_of_the_whole_window_are_not_mistaken_for_cropped_ones(tiny_folder: Path, noise: Clips, tmp_path: Path) -> None:
    data = RehearsedData(work=tmp_path)
    lengths = [
        [len(item.heard) for item in Ground("tiny", tiny_folder, True, data, whole_window=whole).hear(noise, "en", "en")]
        for whole in (False, True, False)
    ]
    assert lengths[1] == [100, 100]
    assert lengths[0] == lengths[2] != lengths[1]


def test_learning_rates_are_scaled_once_for_each_training() -> None:
    plain, scaled = Schedule(num_steps=10), Schedule(num_steps=10, rate_scale=0.1)
    assert [scaled.rate(step) for step in range(10)] == pytest.approx([0.1 * plain.rate(step) for step in range(10)])


@pytest.mark.gpu
def test_a_step_on_a_gpu_loses_as_much_as_on_the_cpu(tiny_folder: Path, noise: Clips) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        ground = Ground("tiny", tiny_folder, False, RehearsedData(), device, whole_window=True)
        trained = attach(ground.fresh(), Method("lora", rank=2), decoder_only=False, num_steps=1)
        assert all(weight.device.type == device for group in trained.groups for weight in group["params"])
        losses.append(fit(ground, trained, [ground.hear(noise, "en", "en")], Schedule(num_steps=1, batch_size=2)).first_loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
