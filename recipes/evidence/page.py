"""`docs/results.md`: what is between its markers is made of the committed results, everything else is written by hand.

A block `<!-- EVIDENCE child -->` ... `<!-- /EVIDENCE child -->` holds the tables and figures of a part on every ground that has results.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recipes.evidence import beyond_report, child_report, claims, languages_report
from recipes.evidence.collect import RESULTS
from recipes.evidence.comparing import Results
from recipes.evidence.tables import set_name

PAGE = Path("docs/results.md")
TITLES = {
    "own-decoder": "Real encoder, own decoder",
    "own-decoder-longer": "Real encoder, own decoder, four times the steps",
    "pocket": "The pocket",
}
"""Name of results -> its heading, in the order of the page. Others, those of full-size recipes, follow by name and are called by it."""
BLOCK = re.compile(r"<!-- EVIDENCE (?P<name>[\w-]+) -->\n.*?<!-- /EVIDENCE (?P=name) -->", re.DOTALL)
REPORTS: dict[str, Any] = {"child": child_report, "languages": languages_report, "beyond": beyond_report}
"""Part -> module with `tables` and `figures`."""
BLOCKS = ("claims", *REPORTS)
NOTHING = "No results of this part have been committed yet."


def all_results(folder: Path = RESULTS) -> dict[tuple[str, str], Results]:
    """(name, part) -> results, in the order of the page."""
    found = [Results.read(path) for path in sorted(folder.glob("evidence-*.json"))]
    order = {name: at for at, name in enumerate(TITLES)}
    found.sort(key=lambda each: (order.get(each.name, len(order)), each.name, str(each.run["part"])))
    return {(each.name, str(each.run["part"])): each for each in found}


def block(name: str, results: dict[tuple[str, str], Results], folder: Path = RESULTS) -> str:
    """What stands between the markers of a block; `folder` holds the benchmarks' results. Raises `ValueError` for an unknown name."""
    if name not in BLOCKS:
        raise ValueError(f"No block is called {name!r}. Known: {', '.join(BLOCKS)}.")
    if name == "claims":
        return claims.table(list(results.values()), folder) if results else NOTHING
    made = []
    for (called, part), each in results.items():
        if part == name:
            pictures = [f"![{figure.about}](images/{figure.file})" for figure in REPORTS[part].figures(each)]
            made.append("\n\n".join([f"### {TITLES.get(called, called)}", sets_line(each), REPORTS[part].tables(each), *pictures]))
    return "\n\n".join(made) or NOTHING


def sets_line(results: Results) -> str:
    """What the sets of a part are, once."""
    told = dict.fromkeys(
        f"{set_name(name)}: {about}" for name, about in results.run["about"].items() if about and not name.endswith("-dev")
    )
    return f"Sets: {'; '.join(told)}." if told else ""


def updated(page: str, results: dict[tuple[str, str], Results], folder: Path = RESULTS) -> str:
    """A page with its blocks as the results have them."""
    return BLOCK.sub(lambda found: _marked(found["name"], block(found["name"], results, folder)), page)


def _marked(name: str, text: str) -> str:
    return f"<!-- EVIDENCE {name} -->\n{text}\n<!-- /EVIDENCE {name} -->"


def skeleton() -> str:
    """A page of markers alone, for results that nobody has written about."""
    parts = [f"## {name.capitalize()}\n\n{_marked(name, '')}" for name in BLOCKS]
    return "\n\n".join(["# Results", *parts]) + "\n"


def write_page(results: Path = RESULTS, page: Path = PAGE) -> list[Path]:
    """Bring a page up to date, or make one of the markers alone, and draw its figures beside it. Returns what was written."""
    known = all_results(results)
    text = page.read_text("utf-8") if page.exists() else skeleton()
    (page.parent / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for each in known.values():
        for figure in REPORTS[each.run["part"]].figures(each):
            figure.draw().savefig(page.parent / "images" / figure.file, format="png", dpi=150)
            written.append(page.parent / "images" / figure.file)
    page.write_text(updated(text, known, results), "utf-8")
    return [*written, page]
