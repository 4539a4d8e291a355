"""From a work folder's rows to one committed file per part: `benchmarks/results/evidence-<name>-<part>.json`, the name
being the ground's and, where the settings are not the main ones, their variant's.

What a set is (its words, characters, speakers) stands once, and is checked: two runs whose sets differ cannot be compared clip by clip. The
errors of a set stand on one line, so that a change of a file can be read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

from recipes.evaluate_pocket import cpu_name
from recipes.evidence.ground import FLITE, SPOKEN, Data, Ground
from recipes.evidence.measuring import NORMALIZER
from recipes.evidence.runs import Settings, of_variant
from recipes.evidence.store import Store

RESULTS = Path("benchmarks/results")
_OF_A_SET = ("language", "seconds", "speakers", "words", "chars")
_OF_A_RUN = ("word_errors", "char_errors", "texts")
_ALWAYS_THE_SAME = ("ground", "base", "versions", "part")


def results_path(name: str, part: str, results: Path = RESULTS) -> Path:
    return results / f"evidence-{name}-{part}.json"


def collect(settings: Settings, ground: Ground, results: Path = RESULTS, made_by: str | None = None) -> list[Path]:
    """Write the files of all parts that have rows, and say which.

    Args:
        settings: those that the runs were made with: they name the work folder and the command, and `only` which of its runs.
        ground: the base that the rows have to belong to.
        results: folder to write to.
        made_by: the command that redoes the runs, where it is not `run` with these settings.

    Raises:
        ValueError: There are no rows, they belong to another base, or runs of a part measured different clips under one name.
    """
    store = Store(settings.work / "rows")
    rows = {key: row for key, row in store.rows().items() if settings.only is None or re.search(settings.only, key)}
    made_by = command(settings) if made_by is None else made_by
    if not rows:
        raise ValueError(f"{store.folder} holds no runs. Make them first: {made_by}")
    strangers = [key for key, row in rows.items() if row["base"] != ground.digest]
    if strangers:
        named = ", ".join(f"{key} ({rows[key]['base']})" for key in strangers[:3])
        raise ValueError(
            f"{len(strangers)} of {len(rows)} runs in {store.folder} belong to another base than {ground.folder} ({ground.digest}): "
            f"{named}. Delete them, or choose another work folder."
        )
    written = []
    for part in dict.fromkeys(row["part"].partition("-")[0] for row in rows.values()):
        chosen = {key: row for key, row in rows.items() if row["part"].partition("-")[0] == part}
        path = results_path(settings.name, part, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        last = max(store.path(key).stat().st_mtime for key in chosen)
        path.write_text(as_text(gathered(chosen, settings, ground, date.fromtimestamp(last), made_by)), "utf-8")
        written.append(path)
    return written


def gathered(rows: Mapping[str, dict[str, Any]], settings: Settings, ground: Ground, last: date, made_by: str) -> dict[str, Any]:
    """One part's file as plain data. Raises `ValueError` for runs that cannot be compared."""
    versions = [row["versions"] for row in rows.values()]
    sets: dict[str, dict[str, Any]] = {}
    runs = {}
    for key, row in rows.items():
        known = sets.setdefault(row["part"], {})
        measured = {}
        for name, each in row.get("sets", {}).items():
            of_set = {field: each[field] for field in _OF_A_SET}
            if known.setdefault(name, of_set) != of_set:
                differing = ", ".join(field for field in _OF_A_SET if known[name][field] != of_set[field])
                raise ValueError(
                    f"{key} measured other clips under the name {name!r} than the runs of {row['part']} before it ({differing} differ). "
                    "Runs with different settings lie in one folder: delete the old ones."
                )
            measured[name] = {field: each[field] for field in _OF_A_RUN if field != "texts" or row["seed"] == 0}
        runs[key] = {field: value for field, value in row.items() if field not in (*_ALWAYS_THE_SAME, "sets")}
        runs[key] |= {"part": row["part"], "sets": measured}
    return {
        "ground": ground.name,
        "variant": settings.variant,
        "part": next(iter(rows.values()))["part"].partition("-")[0],
        "smoke": settings.smoke,
        "command": made_by,
        "date": last.isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": settings.threads},
        "versions": {name: sorted({each[name] for each in versions}) for name in versions[0]},
        "normalizer": NORMALIZER,
        "base": ground.digest,
        "base_parameters": sum(weight.numel() for weight in ground.base.parameters()),
        "frozen_encoder": ground.frozen_encoder,
        "about": {name: _about(settings.data, name) for name in sorted({name for each in sets.values() for name in each})},
        "sets": sets,
        "runs": runs,
    }


def _about(data: Data, name: str) -> str:
    """What the clips of a set are; of a part of a set ("child-dev", "kichwa-switched") what the set is."""
    known = dict(data.sets)
    for set_name in (name, name.rpartition("-")[0]):
        if set_name in known or set_name == FLITE or set_name.startswith(SPOKEN):
            return data.source(set_name).about
    return ""


def command(settings: Settings) -> str:
    """What redoes the runs: the settings that are not the defaults. Folders are the user's own and left out."""
    defaults, parts = of_variant(Settings(variant=settings.variant)), [f"--ground {settings.ground}"]
    parts += [f"--variant {settings.variant}"] if settings.variant else []
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in ("ground", "variant", "parts", "threads", "data") or value == getattr(defaults, field.name):
            continue
        told = "" if value is True else shlex.join(map(str, value if isinstance(value, tuple) else [value]))
        parts.append(f"--{field.name.replace('_', '-')} {told}".strip())
    return " ".join(["python -m recipes.evidence run", *parts])


def as_text(value: Any) -> str:
    """JSON with a line for each entry of an object, and lists of plain values on one line."""
    return _text(value, 0) + "\n"


def _text(value: Any, depth: int) -> str:
    pad = " " * (depth + 1)
    if isinstance(value, dict) and value and any(isinstance(each, (dict, list)) for each in value.values()):
        inner = ",\n".join(f"{pad}{json.dumps(key, ensure_ascii=False)}: {_text(each, depth + 1)}" for key, each in value.items())
        return f"{{\n{inner}\n{' ' * depth}}}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        inner = ",\n".join(f"{pad}{_text(each, depth + 1)}" for each in value)
        return f"[\n{inner}\n{' ' * depth}]"
    return json.dumps(value, ensure_ascii=False)
