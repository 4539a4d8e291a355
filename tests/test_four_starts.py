"""The recipe of the four starts: its whole path on a handful of clips, and the page that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from recipes.four_starts import END, FIGURE, PAGE, START, Settings, newest_results, run, table, write_page
from whisper_moe.pocket import ADAPTERS


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The settings of a run that has been made."""
    asked = Settings(smoke=True, work=tmp_path_factory.mktemp("four_starts"), speech=SHARED / "speech", threads=1)
    run(asked.made_small())
    return asked.made_small()


@pytest.mark.pocket
@pytest.mark.shared
def test_the_recipe_trains_and_measures_all_four_and_old_languages_stay_the_same_bits(smoke: Settings) -> None:
    results = newest_results(smoke.results)
    (measured,) = results["evaluation"]["sets"]
    assert [system["name"] for system in measured["systems"]] == ["base", "cold", "warm", "stacked", "moe"]
    adapters = {name: json.loads((smoke.work / "adapters" / name / "language_adapter.json").read_text()) for name in results["adapters"]}
    assert {name: row["start"]["kind"] for name, row in adapters.items()} == {name: name for name in adapters}
    assert adapters["warm"]["start"]["sources"] == adapters["stacked"]["start"]["sources"] == adapters["moe"]["start"]["sources"][:1]
    assert {name: row["method"] for name, row in results["adapters"].items()} == {
        "cold": "LORA", "warm": "LORA", "stacked": "LORA", "moe": "LORAMOE",
    }  # fmt: skip
    old = results["evaluation"]["old_languages"]
    assert {row["after"] for row in old} == set(adapters)
    assert {row["name"] for row in old} == {"de_kerstin/test", "en_kathleen/test"}
    assert not any(row["differing"] for row in old)


@pytest.mark.pocket
@pytest.mark.shared
def test_the_recipe_writes_its_table_and_figure_and_refuses_to_mix_settings(smoke: Settings) -> None:
    page = (smoke.docs / PAGE).read_text("utf-8")
    for name in ("base", "cold", "warm", "stacked", "moe"):
        assert re.search(rf"^\| {name} \|.*%", page, re.MULTILINE)
    assert (smoke.docs / "images" / FIGURE).read_bytes().startswith(b"\x89PNG")
    committed = (ROOT / "docs" / PAGE).read_text("utf-8").partition(START)[2].partition(END)[0]
    assert "--smoke" not in committed
    with pytest.raises(ValueError, match="rank 16, not 4"):
        run(Settings(**{**vars(smoke), "rank": 4}))
    assert ADAPTERS not in smoke.work.parents  # nothing is trained into the package


def test_the_page_and_the_results_agree(tmp_path: Path) -> None:
    page, results = ROOT / "docs" / PAGE, ROOT / "benchmarks" / "results"
    text = page.read_text("utf-8")
    assert text.count(START) == text.count(END) == 1
    if not list(results.glob("four-starts_pocket_*.json")):
        assert f"{START}\n{END}" in text, "a table without the results that it was made from"
        return
    again = tmp_path / PAGE
    again.write_text(text, "utf-8")
    write_page(newest_results(results), again)
    assert again.read_text("utf-8") == text, "run python -m recipes.four_starts, which writes the page"
    assert table(newest_results(results)) in text
