"""The figures in README.md are those of the committed results and of the shipped adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.update_readme import END, START, block, newest_results, updated
from whisper_moe.pocket import ADAPTERS
from whisper_moe.registry import AdapterRegistry

ROOT = Path(__file__).parent.parent


@pytest.mark.pocket
def test_readme_shows_the_committed_results() -> None:
    new = block(newest_results(ROOT / "benchmarks" / "results"), list(AdapterRegistry.from_folder(ADAPTERS)))
    assert new in (ROOT / "README.md").read_text("utf-8"), "run `python -m recipes.update_readme`"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    assert updated(f"above\n{START}\nold\n{END}\nbelow\n", "new") == "above\nnew\nbelow\n"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        updated("a page", "new")
