"""From rows to the page: what is collected, how systems are compared, what the claims come to, and that docs/results.md shows it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("datasets", reason="the recipes need the train extra: pip install peft-s2lora[train]")
pytest.importorskip("matplotlib", reason="figures need the train extra: pip install peft-s2lora[train]")

import evidence_rows as made

from recipes.evidence import beyond_report, child_report, claims, languages_report
from recipes.evidence.__main__ import chosen_runs
from recipes.evidence.__main__ import smoke as smoke_command
from recipes.evidence.claims import ARITHMETIC, CLAIMS, DIRECTION, FAILS, HOLDS, RULES, UNDECIDED, UNTESTED
from recipes.evidence.collect import as_text, collect, command
from recipes.evidence.comparing import (
    Estimate,
    Results,
    Sample,
    correlation,
    difference,
    mean_difference,
    mean_rate,
    spearman,
    weighted_mean,
)
from recipes.evidence.page import BLOCK, NOTHING, all_results, block, sets_line, skeleton, updated, write_page
from recipes.evidence.runs import Settings, of_variant
from recipes.evidence.store import Store
from recipes.evidence.tables import method_name

# ---- collecting --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with runs of all parts, collected into `results`."""
    work = tmp_path_factory.mktemp("evidence")
    chosen = made.write_rows(work, [*made.child_rows(), *made.language_rows(), *made.beyond_rows()])
    collect(chosen, made.ground(), work / "results")
    return work


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Results]:
    """Part -> results."""
    return {part: each for (_, part), each in all_results(folder / "results").items()}


def test_a_file_per_part_holds_every_error_of_every_clip_and_what_a_set_is_once(folder: Path) -> None:
    rows = Store(folder / "runs" / "pocket" / "rows").rows()
    paths = sorted((folder / "results").glob("*.json"))
    assert [path.name for path in paths] == [f"evidence-pocket-{part}.json" for part in ("beyond", "child", "languages")]
    found: dict[str, Any] = {}
    for path in paths:
        run = json.loads(path.read_text("utf-8"))
        found |= run["runs"]
        assert run["base"] == made.BASE
        assert run["base_parameters"] == 1_000_000
        for row in run["runs"].values():
            for name, each in row["sets"].items():
                assert set(each) - {"texts"} == {"word_errors", "char_errors"}
                assert len(each["word_errors"]) == len(run["sets"][row["part"]][name]["words"]) == made.NUM_CLIPS
    assert found.keys() == rows.keys()
    for key, row in rows.items():
        for name, each in row.get("sets", {}).items():
            assert found[key]["sets"][name]["char_errors"] == each["char_errors"]
    # Errors of a set stand on one line, so that a change can be read.
    child = (folder / "results" / "evidence-pocket-child.json").read_text("utf-8")
    assert len(re.findall(r'^ *"word_errors": \[[\d, ]+\],?$', child, re.MULTILINE)) == sum(len(row["sets"]) for row in made.child_rows())


def test_runs_of_another_base_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another base.*beyond-bytes/base.*Delete them"):
        collect(made.settings(folder), made.ground("ffffffffffff"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_that_measured_other_clips_under_one_name_are_refused(tmp_path: Path) -> None:
    rows = made.child_rows(seeds=[0])
    rows[-1]["sets"]["child"]["chars"] = [7] * made.NUM_CLIPS
    chosen = made.write_rows(tmp_path, rows)
    with pytest.raises(ValueError, match=r"other clips under the name 'child'.*chars differ"):
        collect(chosen, made.ground(), tmp_path / "results")


def test_a_folder_without_runs_is_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m recipes\.evidence run --ground pocket"):
        collect(made.settings(tmp_path), made.ground())


def test_the_command_names_what_differs_from_the_defaults() -> None:
    assert command(Settings()) == "python -m recipes.evidence run --ground own-decoder"
    assert (
        command(Settings(seeds=2, threads=4, base_sets=("a", "b")))
        == "python -m recipes.evidence run --ground own-decoder --seeds 2 --base-sets a b"
    )


def test_a_variant_stands_for_its_settings_and_an_unknown_one_is_refused() -> None:
    longer = of_variant(Settings(variant="longer"))
    assert (longer.num_steps, longer.out_of_domain[-1], longer.name) == (480, "flite-en", "own-decoder-longer")
    assert command(longer) == "python -m recipes.evidence run --ground own-decoder --variant longer"
    assert of_variant(replace(longer, num_steps=7)).num_steps == 7
    assert of_variant(Settings()) == Settings()
    with pytest.raises(ValueError, match=r"'shorter'.*longer"):
        of_variant(Settings(variant="shorter"))
    keys = {run.key for run in chosen_runs(longer)}
    assert {"child/full-s2", "languages-expansion/espeak-sv-moe-s2", "languages-interference/joint-lora-s0"} <= keys
    assert not [key for key in keys if re.search("bitfit|vera|slower|sparse-0.1|stacked|beyond", key)]


def test_what_is_written_is_read_back() -> None:
    value = {"a": [1, 2], "b": {"c": [[1], [2]], "d": {}, "e": None}, "f": [], "g": [{"h": 1.5}], "ä": "ö"}
    assert json.loads(as_text(value)) == value


# ---- comparing ---------------------------------------------------------------------------------------------------------


def rates_of(rows: list[dict[str, Any]], arm: str, name: str) -> list[float]:
    return [row["sets"][name]["wer"] for row in rows if row["part"] == "child" and row["arm"] == arm]


def test_the_rate_of_a_system_is_the_mean_of_its_seeds(results: dict[str, Results]) -> None:
    systems, rows = results["child"].systems("child"), made.child_rows()
    for arm in ("base", "lora-r8", "s2-r32"):
        sample = systems[arm].sample("child")
        assert sample.rate == pytest.approx(np.mean(rates_of(rows, arm, "child")), abs=1e-4)
        assert sample.per_seed == pytest.approx(rates_of(rows, arm, "child"), abs=1e-4)
    assert (systems["base"].num_seeds, systems["lora-r8"].num_seeds) == (1, 3)


def test_systems_of_one_and_of_three_seeds_are_compared_by_their_means(results: dict[str, Results]) -> None:
    systems, rows = results["child"].systems("child"), made.child_rows()
    found = difference(systems["base"], systems["full"], "child")
    expected = np.mean(rates_of(rows, "base", "child")) - np.mean(rates_of(rows, "full", "child"))
    assert found.value == pytest.approx(expected, abs=1e-4)
    assert found.low is not None
    assert 0 < found.low < found.value
    assert found.sure
    back = difference(systems["full"], systems["base"], "child")
    assert back.value == pytest.approx(-found.value)


def test_a_mean_over_sets_gives_each_the_same_weight_and_one_set_is_that_set(results: dict[str, Results]) -> None:
    systems = results["child"].systems("child")
    one, other, sets = systems["adalora-r8"], systems["s2-r32"], ["adult", "kathleen", "kerstin"]
    each = [difference(one, other, name) for name in sets]
    found = mean_difference(one, other, sets, "wer")
    assert found.value == pytest.approx(np.mean([part.value for part in each]))
    assert mean_rate(one, sets, "wer").value == pytest.approx(np.mean([one.sample(name).rate for name in sets]))
    # Three sets together say more than one.
    widths = [part.high - part.low for part in each if part.high is not None and part.low is not None]
    assert found.high is not None
    assert found.low is not None
    assert found.high - found.low < min(widths)
    alone = mean_difference(one, other, ["adult"], "wer")
    assert alone.value == pytest.approx(each[0].value)
    assert (alone.low, alone.high) == pytest.approx((each[0].low, each[0].high), abs=0.02)  # other draws


def made_sample(rates: list[float], trained: bool = True, seeds: list[int] | None = None, num_clips: int = 40) -> Sample:
    """Every clip of a seed is wrong at the same rate, so that clips say nothing and seeds all."""
    errors = np.array([[1000 * rate] * num_clips for rate in rates])
    runs = tuple((seed, "") for seed in (range(len(rates)) if seeds is None else seeds))
    return Sample(errors, np.full(num_clips, 1000), None, runs, trained)


def test_an_interval_is_also_about_other_seeds() -> None:
    rates = [0.2, 0.3, 0.43]
    found = weighted_mean([(1, [made_sample(rates)])])
    drawn = [np.mean(chosen) for chosen in itertools.product(rates, repeat=3)]  # all that can be drawn
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    assert found.value == pytest.approx(0.31)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.each, found.num_seeds) == (pytest.approx(tuple(rates)), 3)
    for nothing_to_draw in (made_sample([0.3]), made_sample([0.2, 0.4], trained=False)):
        alone = weighted_mean([(1, [nothing_to_draw])])
        assert (alone.low, alone.high) == (pytest.approx(0.3), pytest.approx(0.3))
    # Each side draws its own seeds: had they been drawn in pairs, nothing would vary.
    both = weighted_mean([(1, [made_sample(rates)]), (-1, [made_sample([rate - 0.1 for rate in rates])])])
    assert both.value == pytest.approx(0.1)
    assert both.each == pytest.approx((0.1, 0.1, 0.1))
    assert both.low is not None
    assert both.low < 0.03


def test_seeds_are_compared_in_pairs_where_both_have_the_same_ones_else_each_with_each() -> None:
    one, same, another = made_sample([0.5, 0.4]), made_sample([0.2, 0.3]), made_sample([0.2, 0.3, 0.1])
    base = made_sample([0.9], trained=False)
    assert weighted_mean([(1, [one]), (-1, [same])]).each == pytest.approx((0.3, 0.1))
    found = weighted_mean([(1, [one]), (-1, [another])])
    assert found.each == pytest.approx((0.3, 0.2, 0.4, 0.2, 0.1, 0.3))
    assert found.num_seeds == 2
    against_base = weighted_mean([(1, [base]), (-1, [same])])
    assert (against_base.each, against_base.num_seeds) == (pytest.approx((0.7, 0.6)), 2)
    # Over sets: the seeds that all sets have.
    partly = weighted_mean([(1, [one, made_sample([0.1], seeds=[1])])])
    assert (partly.each, partly.num_seeds) == (pytest.approx((0.25,)), 1)


def test_a_wider_level_gives_a_wider_interval(results: dict[str, Results]) -> None:
    systems = results["child"].systems("child")
    usual, wide = (difference(systems["lora-r8"], systems["s2-r32"], "child", level=level) for level in (0.95, 0.99))
    assert usual.low is not None
    assert wide.low is not None
    assert wide.low < usual.low


def test_a_p_value_that_is_missing_is_no_significance() -> None:
    found = child_report.adjusted([Estimate(0.1, 0, 0.2), Estimate(0.1, 0, 0.2, 0.02), Estimate(0.1, 0, 0.2, 0.5)])
    assert found == ["", "0.04", "0.5"]


def test_a_rank_correlation_in_groups_knows_nothing_of_their_levels() -> None:
    first, second = [1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11]  # the other way round within, alike between
    groups = ["a"] * 3 + ["b"] * 3
    assert spearman(first, second) > 0.5
    assert spearman(first, second, groups) == pytest.approx(-1)
    whole = correlation([1, 2, 3] * 2, [1, 2, 3, 3, 2, 1], groups, whole=True)
    assert (whole.value, whole.low, whole.high) == (pytest.approx(0), pytest.approx(-1), pytest.approx(1))


def test_the_rank_correlation_is_spearmans() -> None:
    first, second = [1.0, 5.0, 2.0, 9.0, 4.0], [2.0, 4.0, 3.0, 5.0, 1.0]
    places = [np.argsort(np.argsort(values)) for values in (first, second)]
    squares = float(((places[0] - places[1]) ** 2).sum())
    assert correlation(first, second).value == pytest.approx(1 - 6 * squares / (5 * 24))
    # Ties: Pearson's of the mean places.
    tied = correlation([1, 1, 2, 3], [1, 2, 2, 3]).value
    assert tied == pytest.approx(np.corrcoef([0.5, 0.5, 2, 3], [0, 1.5, 1.5, 3])[0, 1])
    assert np.isnan(correlation([1, 1, 1, 1], [1, 2, 3, 4]).value)


def test_forgetting_counts_the_languages_that_others_came_after(results: dict[str, Results]) -> None:
    rows = [row for row in made.language_rows() if row["arm"] == "sequential-full"]
    system = results["languages"].systems("languages-interference")["sequential-full"]
    lost = languages_report.forgetting(system)
    for name in made.BASE_SETS:
        later = [row for row in rows if row["order"][-1] != name]
        assert len(later) == 2
        expected = np.mean([row["sets"][name]["cer"] - row["stages"][name]["cer"] for row in later])
        assert lost[name][2].value == pytest.approx(expected, abs=1e-4)


def test_the_grid_of_ranks_puts_every_weight_in_its_layer_and_column() -> None:
    ranks = {"model.decoder.layers.1.encoder_attn.v_proj": 5.0, "model.encoder.layers.0.fc2": 3.0}
    layers, grid = child_report.rank_grid(ranks)
    assert layers == ["enc0", "dec1"]
    column = child_report.COLUMNS.index("encoder_attn.v_proj")
    assert grid[1, column] == 5
    assert grid[0, child_report.COLUMNS.index("fc2")] == 3
    assert np.isfinite(grid).sum() == 2


# ---- claims ------------------------------------------------------------------------------------------------------------


def verdicts(results: list[Results]) -> dict[str, str]:
    """Claim -> verdict on the only ground."""
    return {claim.claim: claims.judged(claim, results)[0][1].verdict for group in CLAIMS.values() for claim in group}


@pytest.mark.parametrize(
    ("low", "value", "each", "num_seeds", "expected"),
    [
        (0.01, 0.02, (0.01, 0.03), 2, HOLDS),
        (0.01, 0.02, (0.02,), 1, DIRECTION),  # a single seed
        (-0.01, 0.02, (0.01, 0.03), 2, DIRECTION),
        (None, 0.02, (0.01, 0.03), 2, DIRECTION),
        (0.01, 0.02, (-0.01, 0.05), 2, UNDECIDED),
        (0.01, 0.02, (0.0, 0.04), 2, UNDECIDED),
        (0.01, 0.02, (), 0, UNDECIDED),  # no seed that all sets have
        (-0.03, -0.02, (-0.01, -0.03), 2, FAILS),
        (-0.03, -0.02, (0.01, -0.05), 2, FAILS),
        (0, 0, (0.0, 0.0), 2, FAILS),
    ],
)
def test_a_lower_rate_has_to_be_lower_in_every_seed(
    low: float | None, value: float, each: tuple[float, ...], num_seeds: int, expected: str
) -> None:
    assert claims.lower(Estimate(value, low, 0.05, each=each, num_seeds=num_seeds)) == expected


def test_comparable_is_judged_by_what_the_reference_gained_and_by_kept_bytes() -> None:
    gain, slack = Estimate(0.3, 0.2, 0.4, each=(0.3, 0.3), num_seeds=2), Estimate(0.02, 0.01, 0.03, each=(0.02, 0.02), num_seeds=2)
    assert claims.comparable(gain, slack) == HOLDS
    assert claims.comparable(gain, slack, 0.5) == HOLDS
    assert claims.comparable(gain, slack, 0.6) == FAILS  # not much fewer bytes
    assert claims.comparable(gain, Estimate(0.02, -0.01, 0.03, each=(0.02, 0.02), num_seeds=2)) == DIRECTION
    assert claims.comparable(gain, Estimate(-0.02, -0.03, 0.03, each=(-0.02, -0.02), num_seeds=2)) == FAILS
    for unsure in (
        Estimate(0.1, -0.1, 0.3, each=(0.1,)),
        Estimate(-0.2, -0.3, -0.1, each=(-0.2,)),
        Estimate(0.1, 0.05, 0.3, each=(0.3, -0.1)),
    ):
        with pytest.raises(claims.Missing, match="not surely better than the base"):
            claims.comparable(unsure, slack)


def test_the_margin_is_a_tenth_of_the_gain_and_not_of_the_rate(results: dict[str, Results]) -> None:
    systems = results["child"].systems("child")
    base, reference, other = (systems[arm] for arm in ("base", "adalora-r8", "lora-r8"))
    rates = [system.sample("child").rate for system in (base, reference, other)]
    found = claims.slack(base, reference, other, ["child"], "wer")
    assert found.value == pytest.approx(0.1 * (rates[0] - rates[1]) - (rates[2] - rates[1]))
    assert len(found.each) == found.num_seeds == 3


def test_the_best_language_speaks_for_sometimes() -> None:
    worse, better = Estimate(-0.1, -0.2, 0.0, each=(-0.1, -0.1), num_seeds=2), Estimate(0.1, 0.05, 0.2, each=(0.1, 0.1), num_seeds=2)
    one_seed = Estimate(0.1, 0.05, 0.2, each=(0.1,), num_seeds=1)
    assert claims.sometimes([worse, better]) == HOLDS
    assert claims.sometimes([worse, one_seed]) == DIRECTION
    assert claims.sometimes([worse, Estimate(0.1, 0.05, 0.2, each=(0.3, -0.1), num_seeds=2)]) == UNDECIDED
    assert claims.sometimes([worse, worse]) == FAILS


def test_findings_say_what_they_are_judged_on(results: dict[str, Results]) -> None:
    found = {claim.claim: claims.judged(claim, list(results.values()))[0][1].here for group in CLAIMS.values() for claim in group}
    outside = found["generalises better out of domain than AdaLoRA"]
    assert outside.startswith("What the base was trained on: adults, Kathleen (en) and Kerstin (de). S2-LoRA r 32, sparsity 0.3")
    rates = [results["child"].systems("child")["base"].sample(name).rate for name in ("adult", "kathleen", "kerstin")]
    assert f"of the base {100 * np.mean(rates):.1f}" in outside
    assert "heard as the language itself: Catalan 55.0 %, Kichwa 55.0 %" in found["similar languages help more"]
    many = found["many languages: a pool is as good as a LoRA each, in fewer bytes"]
    assert many.startswith("4 languages in 532.0 kB as coefficients of a pool, in 512.0 kB as LoRA r 8; on the 2 of them in Latin letters")
    assert (
        "smallest S2-LoRA that is comparable by B: S2-LoRA r 32, 2" in found["in domain comparable to AdaLoRA, with much fewer parameters"]
    )
    assert "97.5% intervals" in found["a start from a dissimilar language can be worse than none"]


def test_other_domains_are_judged_on_what_the_base_was_not_trained_on_where_there_is_such_a_set(tmp_path: Path) -> None:
    rows = made.child_rows()
    for row in rows:
        row["sets"]["flite-en"] = made.set_row(0.5 if row["arm"].startswith("s2-") else 0.2, "flite-en", row["seed"])
    (child,) = collected(tmp_path, rows)
    assert child_report.other_sets(child) == ["adult", "kathleen", "kerstin", "flite-en"]
    finding = claims.better_out_of_domain(child)
    assert finding.here.startswith("Out of domain: flite (en). S2-LoRA r 32, sparsity 0.3 is -")
    assert "on one set (" in finding.here
    assert finding.here.endswith("Adapting gains nothing there: this is what is kept, not how it generalises")  # of the base 20 %
    for row in rows:
        row["sets"]["flite-en"] = made.set_row(
            {"base": 0.6, "adalora": 0.2}.get(row["arm"].partition("-")[0], 0.3), "flite-en", row["seed"]
        )
    (child,) = collected(tmp_path, rows)
    assert "what is kept" not in claims.better_out_of_domain(child).here
    assert "flite (en): English sentences by flite" in sets_line(child)
    text = child_report.tables(child)
    assert "| flite (en) | p | mean of 3 others (base trained on them) |" in text
    assert finding.verdict == FAILS  # though it is better on the three sets that the base was trained on


def test_a_variant_of_the_settings_has_rows_results_and_a_line_of_its_own(tmp_path: Path) -> None:
    main, longer = made.settings(tmp_path), of_variant(made.settings(tmp_path, variant="longer"))
    for chosen, rate in ((main, 0.4), (longer, 0.3)):
        made.write_rows(tmp_path, made.child_rows(rates={"lora": rate}), chosen)
        collect(chosen, made.ground(), tmp_path / "results")
    found = all_results(tmp_path / "results")
    assert list(found) == [("pocket", "child"), ("pocket-longer", "child")]
    rates = [child_report.child_systems(each)["lora-r8"].sample("child").rate for each in found.values()]
    assert rates == pytest.approx([0.4, 0.3], abs=0.05)
    assert {each.ground for each in found.values()} == {"pocket"}  # what it was trained on is known for both
    assert found["pocket-longer", "child"].run["command"] == "python -m recipes.evidence run --ground pocket --variant longer"
    arms = {row["arm"] for row in found["pocket-longer", "child"].rows("child")}
    assert {"base", "full", "s2-r32-sparse-0.3"} <= arms
    assert not {"bitfit", "s2-r32-sparse-0.1"} & arms  # nothing that is not the variant's, though its rows are there
    few = replace(longer, only=r"child/(base|lora-r8)-s\d")
    collect(few, made.ground(), tmp_path / "few")
    (chosen,) = all_results(tmp_path / "few").values()
    assert {row["arm"] for row in chosen.rows("child")} == {"base", "lora-r8"}
    assert chosen.run["command"].endswith(r"--ground pocket --variant longer --only 'child/(base|lora-r8)-s\d'")
    text = claims.table(list(found.values()), tmp_path)
    assert [line.split(" | ")[2] for line in text.splitlines() if "| a learnable rank" in line] == ["pocket", "pocket-longer"]


def test_the_first_table_counts_the_verdicts_below_it(results: dict[str, Results], tmp_path: Path) -> None:
    written = claims.table(list(results.values()), tmp_path)
    told = [line.removeprefix("| ").split(" | ") for line in written.splitlines()]
    counted = [cells for cells in told if len(cells) == 7 and cells[1] == "pocket"]
    assert [cells[0] for cells in counted] == [title.partition(" (")[0] for title in CLAIMS]
    given = Counter(cells[-1].removesuffix(" |").rpartition(" (")[0] for cells in told if len(cells) == 5 and cells[2] in ("pocket", ""))
    assert sum(given.values()) > 20
    for column, verdict in enumerate((HOLDS, DIRECTION, UNDECIDED, FAILS, UNTESTED), 2):
        assert sum(int(cells[column].removesuffix(" |")) for cells in counted) == given[verdict]


def test_a_pool_is_not_judged_by_the_languages_that_it_was_trained_on(results: dict[str, Results]) -> None:
    def broad(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"arm": row["arm"].replace("pool-", "pool-broad-"), "about": row["about"] | {"how": "pool-broad"}}

    def tall(row: dict[str, Any]) -> dict[str, Any]:
        """Finnish is now called Hungarian, which the broad pool has heard."""
        return json.loads(json.dumps(row).replace('"fi"', '"hu"').replace("-fi", "-hu"))

    narrow = results["beyond"]
    runs = {key.replace("-fi-", "-hu-"): tall(row) for key, row in narrow.run["runs"].items() if row["part"] == "beyond-growth"}
    runs |= {key.replace("/pool-", "/pool-broad-"): broad(row) for key, row in runs.items() if row["about"]["how"] == "pool"}
    sets = {"beyond-growth": {name.replace("fi", "hu"): about for name, about in narrow.run["sets"]["beyond-growth"].items()}}
    both = Results(narrow.run | {"runs": runs, "sets": sets})
    groups = beyond_report.growth_groups(both)
    assert (groups[beyond_report.NEW], groups[beyond_report.HEARD]) == (["ca"], ["hu"])
    assert "on the 2 of them in Latin letters" in claims.pool_for_many(both).here
    assert "on the 1 of them in Latin letters" in claims.pool_for_many(both, "pool-broad").here


def test_languages_of_the_curve_are_told_apart(results: dict[str, Results]) -> None:
    groups = beyond_report.growth_groups(results["beyond"])
    assert groups == {beyond_report.NEW: ["ca", "fi"], beyond_report.KNOWN: ["es"], beyond_report.OTHER_SCRIPT: ["th"]}
    text = beyond_report.tables(results["beyond"])
    assert "mean CER, new, Latin letters (2)" in text
    assert "mean CER, other letters (1)" in text


def test_rates_that_were_chosen_so_give_the_verdicts_that_they_should(results: dict[str, Results]) -> None:
    found = verdicts(list(results.values()))
    expected = {
        "generalises better out of domain than AdaLoRA": HOLDS,  # 0.4 against 0.5
        "its ranks are distributed as AdaLoRA's": HOLDS,
        "v and o need ranks, q and k hardly": HOLDS,
        "0.02 % of the parameters are enough to adapt": HOLDS,
        "a LoRA per language against one model for all: less interference": HOLDS,  # 0.24, 0.3
        "a new language from the nearest, against full fine-tuning": HOLDS,  # 0.25, 0.4
        "from the nearest, against a cold start": HOLDS,  # 0.25, 0.3
        "full fine-tuning on a new language hurts the old ones": HOLDS,  # 0.3 to 0.75
        "LoRA-Whisper leaves the old languages as they are": HOLDS,
        "a start from a dissimilar language can be worse than none": HOLDS,  # 0.33, 0.3
        "similar languages help more": DIRECTION,  # whatever the interval
        "in domain comparable to AdaLoRA, with much fewer parameters": HOLDS,
        "a LoRA per language against one LoRA for all (what sharing costs)": HOLDS,  # 0.24, 0.32
        "one model per language against one model for all": FAILS,  # 0.33, 0.3
        "about 5 % of the parameters per language": ARITHMETIC,
        "adapters in the decoder alone are as good, and the encoder runs once": DIRECTION,  # one seed: 0.22, 0.2, the base 0.8
        "speech that changes to Spanish: a start from Spanish beats none": DIRECTION,  # one seed
        "many languages: a pool is as good as a LoRA each, in fewer bytes": FAILS,  # more bytes for two
        "half as many adapters after merging what is alike": FAILS,  # 0.2 to 0.5
        "a batch of many languages writes what each writes alone": HOLDS,
        "two minutes of a new language: a LoRA beats full fine-tuning": HOLDS,  # 0.45, 0.55
        "two minutes of a new language: from the nearest beats full fine-tuning": HOLDS,  # 0.4, 0.55
        "eight minutes of a new language: from the nearest beats a cold start": HOLDS,  # 0.2875, 0.3375
    }
    assert {claim: found[claim] for claim in expected} == expected


def collected(tmp_path: Path, rows: list[dict[str, Any]]) -> list[Results]:
    collect(made.write_rows(tmp_path, rows), made.ground(), tmp_path / "results")
    return list(all_results(tmp_path / "results").values())


def test_rates_the_other_way_round_give_the_opposite_verdicts(tmp_path: Path) -> None:
    rows = made.child_rows(rates={"s2lora": 0.45, "adalora": 0.2, "lora": 0.3})
    for row in rows:
        if row["arm"].startswith("s2-"):
            row["sets"] |= {name: made.set_row(0.7, name, row["seed"]) for name in ("adult", "kathleen", "kerstin")}
            if row["ranks"]:
                row["ranks"] = {module: 20 - rank for module, rank in row["ranks"].items()}
    languages = made.language_rows()
    next(row for row in languages if row.get("old_languages"))["old_languages"] = {"kerstin": ["logits"]}
    for row in languages:
        if row["part"] == "languages-hours" and row["max_minutes"] == 2 and row["kind"] == "full":
            row["sets"] = {name: made.set_row(0.3, name, row["seed"]) for name in row["sets"]}
    found = verdicts(collected(tmp_path, [*rows, *languages]))
    assert found["generalises better out of domain than AdaLoRA"] == FAILS
    assert found["in domain comparable to AdaLoRA, with much fewer parameters"] == FAILS
    assert found["a learnable rank coefficient is a good design"] == HOLDS
    assert found["its ranks are distributed as AdaLoRA's"] == FAILS
    assert found["v and o need ranks, q and k hardly"] == FAILS
    assert found["LoRA-Whisper leaves the old languages as they are"] == FAILS
    assert found["two minutes of a new language: a LoRA beats full fine-tuning"] == FAILS


def test_claims_whose_runs_are_missing_are_not_testable_and_say_what_is_missing(tmp_path: Path) -> None:
    rows = [row for row in made.child_rows(seeds=[0]) if not row["arm"].startswith("adalora")]
    found = collected(tmp_path, rows)
    assert set(verdicts(found).values()) >= {UNTESTED}
    text = claims.table(found, tmp_path)
    assert "not run: adalora-r8" in text
    assert text.count("| in domain comparable to AdaLoRA") == 1
    languages = [line for line in text.splitlines() if "old languages as they are" in line]
    assert len(languages) == 1
    assert UNTESTED in languages[0]


def test_every_claim_has_a_rule_that_is_written_below_the_table(results: dict[str, Results]) -> None:
    used = {claim.rule for group in CLAIMS.values() for claim in group}
    text = claims.table(list(results.values()), ROOT / "benchmarks" / "results")
    assert used <= RULES.keys()
    assert all(f"- {letter}: " in text for letter in used)
    assert sum(map(len, CLAIMS.values())) + 1 == len(re.findall(r"\((?:A|B|C|D|E|F)\) \|$", text, re.MULTILINE))


def test_the_shares_of_whisper_small_are_those_of_adapters_on_it() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    import peft_s2lora

    width = {"d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    config = WhisperConfig(vocab_size=51_865, encoder_layers=12, decoder_layers=12, **width)
    attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
    tuners = {
        claims.lora_share_of_small(): LoraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"]),
        claims.s2_share_of_small(): peft_s2lora.S2LoraConfig(r=32, target_modules=attention),
    }
    for share, tuner in tuners.items():
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
            whole = sum(weight.numel() for weight in model.parameters())
            adapted = get_peft_model(model, tuner)
        trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        assert share == pytest.approx(trained / whole)


# ---- the page ----------------------------------------------------------------------------------------------------------


def test_a_page_keeps_what_is_written_by_hand_and_shows_every_part(folder: Path, results: dict[str, Results]) -> None:
    known = all_results(folder / "results")
    page = skeleton().replace("## Child\n", "## Child\n\nBy hand.\n")
    text = updated(page, known)
    assert "By hand." in text
    assert NOTHING not in text
    assert updated(text, known) == text
    for each in results.values():
        for figure in (*child_report.figures(each),) if each.run["part"] == "child" else ():
            assert f"(images/{figure.file})" in text
    # Every table says where it is from.
    tables = len(re.findall(r"^\|[-:|]+\|$", text.partition("<!-- /EVIDENCE claims -->")[2], re.MULTILINE))
    assert tables > 12
    assert len(re.findall(r"^`python -m recipes\.evidence run .*normaliser mark-preserving; seeds ", text, re.MULTILINE)) >= tables - 1
    assert "mean nothing" not in text


def test_a_row_of_the_table_shows_the_figures_of_its_arm(results: dict[str, Results]) -> None:
    text = child_report.tables(results["child"])
    row = next(line for line in text.splitlines() if line.startswith("| full fine-tuning |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    rate = 100 * results["child"].systems("child")["full"].sample("child").rate
    assert cells[1:6] == ["990,000", "99.0", "4.0 MB", "", "1.00"]
    assert cells[6].startswith(f"{rate:.1f} (")
    lora = next(line for line in text.splitlines() if line.startswith("| LoRA r 8 |"))
    assert [cell.strip() for cell in lora.split("|")][6] == f"{(41_000 / 990_000) ** 0.3:.2f}"


def test_arms_stand_in_the_order_of_what_is_kept_of_them(results: dict[str, Results]) -> None:
    text = child_report.tables(results["child"]).partition("**Against")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    trained = [int(cells[1].replace(",", "")) for cells in rows if cells[1]]  # here four bytes each
    assert len(trained) > 10
    assert trained == sorted(trained)
    assert rows[0][0] == "the base"
    sparse = next(cells for cells in rows if cells[0] == "S2-LoRA r 32, sparsity 0.3")
    ranks = child_report.mean_ranks(results["child"].systems("child")["s2-r32-sparse-0.3"])
    assert sparse[4] == f"{sum(ranks.values()):.0f} of {32 * len(ranks)}"


def test_figures_are_drawn_beside_the_page(folder: Path, tmp_path: Path) -> None:
    written = write_page(folder / "results", tmp_path / "docs" / "results.md")
    assert written[-1] == tmp_path / "docs" / "results.md"
    assert len(written) == 1 + 11
    for path in written[:-1]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(images/{path.name})" in written[-1].read_text("utf-8")


@pytest.mark.parametrize("seed", range(3))
def test_a_page_can_be_made_while_runs_are_still_missing(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    rows = [*made.child_rows([0, 1]), *made.language_rows([0, 1]), *made.beyond_rows()]
    some = [row for row in rows if rng.random() < (0.05, 0.15, 0.5)[seed]]
    collect(made.write_rows(tmp_path, some), made.ground(), tmp_path / "results")
    text = updated(skeleton(), all_results(tmp_path / "results"))
    assert "nan" not in text.lower().split()
    assert UNTESTED in text
    for row in some:
        if row["part"] == "child":
            assert f"| {method_name(row['method'])} |" in text


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'chidl'.*child"):
        block("chidl", {})
    assert block("child", {}) == NOTHING


def test_the_page_is_what_the_committed_results_make_of_it() -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    known = all_results(ROOT / "benchmarks" / "results")
    assert page.count("<!-- EVIDENCE ") == len(BLOCK.findall(page)) == page.count("<!-- /EVIDENCE ") == 4
    assert updated(page, known, ROOT / "benchmarks" / "results") == page, "run python -m recipes.evidence page"
    assert not any(each.run["smoke"] for each in known.values()), "results of the smoke path do not belong into the repository"


# ---- the whole path ----------------------------------------------------------------------------------------------------


@pytest.mark.pocket
def test_the_smoke_path_goes_from_nothing_to_a_page_that_says_it_means_nothing_and_does_no_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke_command(tmp_path, ("child",))
    assert "4 runs done here" in capsys.readouterr().out
    run = json.loads((tmp_path / "results" / "evidence-pocket-child.json").read_text("utf-8"))
    assert run["smoke"]
    assert "--smoke" in run["command"]
    assert set(run["runs"]) == {f"child/{arm}-s0" for arm in ("base", "full", "lora-r8", "s2-r32-sparse-0.1")}
    trained = {key: row["num_trained"] for key, row in run["runs"].items() if "num_trained" in row}
    assert trained["child/s2-r32-sparse-0.1-s0"] < trained["child/lora-r8-s0"] < trained["child/full-s0"] < run["base_parameters"]
    page = (tmp_path / "docs" / "results.md").read_text("utf-8")
    assert page.count("mean nothing") >= 3
    assert "| LoRA r 8 |" in page
    assert (tmp_path / "docs" / "images" / "evidence_child_parameters_pocket.png").stat().st_size > 10_000
    smoke_command(tmp_path, ("child",))
    assert "0 runs done here" in capsys.readouterr().out
