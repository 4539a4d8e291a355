"""The tables of figures in docs/ are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.update_docs import BLOCK, DOCS, newest, updated


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_shows_the_committed_results(path: Path) -> None:
    page = path.read_text("utf-8")
    assert page.count("<!-- BENCHMARK ") == len(BLOCK.findall(page)) == page.count("<!-- /BENCHMARK -->")
    assert updated(page) == page, "run `python -m benchmarks.update_docs`"


def test_some_page_has_a_table() -> None:
    assert any(BLOCK.search(path.read_text("utf-8")) for path in DOCS.glob("*.md"))


def test_the_newest_file_is_taken_whatever_the_machine(tmp_path: Path) -> None:
    for name in ("moe_small_zen_2026-01-02", "moe_small_ampere_2026-03-04", "moe_tiny_zen_2026-05-06"):
        (tmp_path / f"{name}.json").write_text(json.dumps({}))
    assert newest("moe_small", tmp_path).stem == "moe_small_ampere_2026-03-04"


def test_a_table_without_results_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "moe_small_zen_2026-01-02.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'s2lora_tiny'.*moe_small"):
        updated("<!-- BENCHMARK s2lora_tiny -->\n<!-- /BENCHMARK -->", tmp_path)
