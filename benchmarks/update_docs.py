"""Write the tables of figures in `docs/` from the committed results, so that none of them is typed by hand.

    python -m benchmarks.update_docs

A page says where a table belongs with `<!-- BENCHMARK s2lora-train_tiny -->` and `<!-- /BENCHMARK -->`: the start of the name of a results
file, of which the newest is taken. A test fails when a page and the files disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import detect, many_languages, mixed_batch, moe, pipeline, s2lora, serving, training
from benchmarks._measure import RESULTS

DOCS = RESULTS.parent.parent / "docs"
BLOCK = re.compile(r"<!-- BENCHMARK (?P<name>[\w-]+) -->\n.*?<!-- /BENCHMARK -->", re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "s2lora-train": s2lora.train_table,
    "s2lora-inference": s2lora.inference_table,
    "mixed-batch": mixed_batch.as_table,
    "many-languages": many_languages.as_table,
    "moe": moe.results_table,
    "detect": detect.detect_table,
    "pipeline": pipeline.pipeline_table,
    "serving-memory": serving.memory_table,
    "serving-throughput": serving.throughput_table,
    "training-cached": training.cached_table,
    "training-many": training.many_table,
}


def newest(name: str, results: Path = RESULTS) -> Path:
    """The last results file whose name begins with `<what>_<model>_`. Raises `ValueError` if there is none."""
    found = sorted(results.glob(f"{name}_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    if not found:
        known = sorted({"_".join(path.stem.split("_")[:2]) for path in results.glob("*.json")})
        raise ValueError(f"No results file begins with {name!r} in {results}. There are: {', '.join(known) or 'none'}.")
    return found[-1]


def block(name: str, results: Path = RESULTS) -> str:
    """A table with the command and the machine it comes from, markers included."""
    path = newest(name, results)
    run = json.loads(path.read_text("utf-8"))
    machine = run["machine"]
    source = f"`{run['command']}`, {run['date']}, {machine['cpu']}, {machine['threads']} thread(s); every round is in `{path.name}`."
    table = TABLES[name.partition("_")[0]](run)
    return f"<!-- BENCHMARK {name} -->\n```text\n{table}\n```\n\n{source}\n<!-- /BENCHMARK -->"


def updated(page: str, results: Path = RESULTS) -> str:
    """A page with its tables as the results have them."""
    return BLOCK.sub(lambda found: block(found["name"], results), page)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(updated(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
