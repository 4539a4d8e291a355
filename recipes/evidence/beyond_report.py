"""What the page says of what goes beyond the papers: bytes, forty languages, mixed batches, merging, layouts, two languages in a clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.evidence.comparing import Results, System, common_sets, difference, how_of, mean_difference, mean_rate, target_of
from recipes.evidence.figures import COLORS, Picture, error_bar, new_figure, picture
from recipes.evidence.pools import BROAD_POOL
from recipes.evidence.tables import (
    against,
    by_part,
    bytes_cell,
    cer_cells,
    count_cell,
    estimate_cell,
    how_name,
    rate_cell,
    set_name,
    source,
    table,
    targets_of,
    ways,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(results: Results) -> str:
    """All tables of the part."""
    makers = {
        "beyond-bytes": _bytes,
        "beyond-growth": _growth,
        "beyond-mixed": _mixed,
        "beyond-merge": _merge,
        "beyond-layouts": _layouts,
        "beyond-switching": _switch,
    }
    return by_part(results, makers)


def _bytes(results: Results) -> str:
    part = "beyond-bytes"
    systems, sets = ways(results, part), targets_of(results, part)
    better = against(systems, "pool", sets)
    ordered = sorted(systems.items(), key=lambda each: each[1].mean("num_bytes") or 0)
    rows = [
        [
            how_name(how),
            count_cell(system.mean("num_trained")),
            bytes_cell(system.mean("num_bytes")),
            *cer_cells(system, sets),
            better.get(how, ""),
        ]
        for how, system in ordered
    ]
    pool = next((row["pool_bytes"] for row in results.rows(part) if row.get("pool_bytes")), None)
    once = f" The pool itself is {bytes_cell(pool)}, once for all languages." if pool else ""
    head = ["", "trained", "bytes a language", *(set_name(name) for name in sets), "mean CER", "points below the pool"]
    return f"**Bytes against errors.** CER in percent.{once}\n\n{table(head, rows)}\n\n{source(results, part, sets)}"


def growth_curve(results: Results, how: str, names: Sequence[str]) -> list[tuple[str, float, float]]:
    """Language by language: name, bytes of all so far (the pool's counted once), its CER."""
    rows = [row for row in results.rows("beyond-growth") if how_of(row) == how and target_of(row) in names]
    rows.sort(key=lambda row: names.index(str(target_of(row))))
    system, total = results.systems("beyond-growth", how_of)[how], 0.0
    curve: list[tuple[str, float, float]] = []
    for row in rows:
        total += row.get("num_bytes", 0) + (row.get("pool_bytes", 0) if not curve else 0)
        name = str(target_of(row))
        curve.append((name, total, system.sample(name, "cer").rate))
    return curve


NEW, HEARD, KNOWN, OTHER_SCRIPT = "new, Latin letters", "new, heard by the pool of 16", "known to the base", "other letters"


def growth_groups(results: Results) -> dict[str, list[str]]:
    """Languages that every way has been run for: those the base was not trained to write, in Latin letters, by which the curve is judged;
    apart from them those that the broad pool was trained on, if it was run; those that the base knows; and those in letters it hardly met.
    In each those first that the base writes best."""
    systems = results.systems("beyond-growth", how_of)
    told = {str(target_of(row)): row for row in results.rows("beyond-growth")}
    names = [name for name in targets_of(results, "beyond-growth") if all(system.has(name) for system in systems.values())]
    if "base" in systems:
        names.sort(key=lambda name: systems["base"].sample(name, "cer").rate)
    groups: dict[str, list[str]] = {NEW: [], HEARD: [], KNOWN: [], OTHER_SCRIPT: []}
    heard = {spoken.name for spoken in BROAD_POOL.languages} if "pool-broad" in systems else set()
    for name in names:
        new = HEARD if name in heard else NEW
        groups[OTHER_SCRIPT if not told[name]["latin"] else KNOWN if told[name]["known"] else new].append(name)
    return {label: names for label, names in groups.items() if names}


def base_of(results: Results, part: str, names: Sequence[str]) -> System | None:
    """The base on the same clips, measured by that part or by another one."""
    sets = results.run["sets"]
    for each in dict.fromkeys([part, *results.parts]):
        system = results.systems(each, how_of).get("base")
        if system is not None and all(system.has(name) and sets[each][name]["words"] == sets[part][name]["words"] for name in names):
            return system
    return None


def _growth(results: Results) -> str:
    part = "beyond-growth"
    systems, groups = ways(results, part), growth_groups(results)
    number = sum(map(len, groups.values()))
    if not number:
        return ""
    better = {label: against(systems, "lora-r8", group) for label, group in groups.items()}
    rows = []
    for how, system in systems.items():
        pool = next((row["pool_bytes"] for row in system.rows if row.get("pool_bytes")), None)
        each = system.mean("num_bytes")
        total = None if each is None else each * number + (pool or 0)
        row = [how_name(how), count_cell(system.mean("num_trained")), bytes_cell(each), bytes_cell(pool), bytes_cell(total)]
        for label, group in groups.items():
            row += [estimate_cell(mean_rate(system, group, "cer")), better[label].get(how, "")]
        rows.append(row)
    head = ["", "trained", "bytes a language", "once", f"all {number}"]
    for label, group in groups.items():
        head += [f"mean CER, {label} ({len(group)})", "points below LoRA r 8"]
    told = "; ".join(f"{label}: {', '.join(set_name(name) for name in group)}" for label, group in groups.items())
    return (
        f"**{number} languages, one by one.** CER in percent, one seed, each language with the same weight. Judged are those that neither "
        "the base nor the pool in question was trained to write and that use Latin letters. "
        f"{told[:1].upper() + told[1:]}.\n\n{table(head, rows)}\n\n{source(results, part, [])}"
    )


def _mixed(results: Results) -> str:
    part = "beyond-mixed"
    lines = []
    for row in results.rows(part):
        rows, in_table, with_peft = row["num_texts"], row["logits"]["in_table"], row["logits"]["with_peft"]
        lines.append(
            f"A batch of {rows} rows ({row['adapters']}). The tokens are those that each language gets alone in the same table in "
            f"{row['equal_texts_in_table']} of {rows} rows, and those that PEFT writes with that adapter alone in {row['equal_texts']}. "
            f"Bit for bit the logits are equal in {in_table['rows_equal']} and {with_peft['rows_equal']} rows; their "
            f"largest difference is {in_table['largest_difference']:.1e} and {with_peft['largest_difference']:.1e}, the spread "
            f"{row['logit_spread']:.2g}. One adapter after the other takes {row['time_ratio']:.2f} times as long as "
            "the mixed batch (medians, interleaved)."
        )
    return "\n\n".join(["**Mixed batches.**", *lines, source(results, part, [])])


def merge_systems(results: Results) -> list[tuple[int, System]]:
    """Number of adapters left and system, the most first."""
    systems = results.systems("beyond-merge")
    return sorted(((system.rows[0]["num_adapters"], system) for system in systems.values()), key=lambda each: -each[0])


def _merge(results: Results) -> str:
    systems = merge_systems(results)
    sets = common_sets(system for _, system in systems)
    if not sets:
        return ""
    whole = systems[0][1]
    rows = []
    for number, system in systems:
        worse = "" if system is whole else estimate_cell(mean_difference(system, whole, sets))
        rows.append([str(number), system.rows[0]["groups"], bytes_cell(system.mean("num_bytes")), *cer_cells(system, sets), worse])
    head = ["adapters", "who shares one", "bytes", *(set_name(name) for name in sets), "mean CER", "points lost"]
    return f"**`merge_similar`.** CER in percent.\n\n{table(head, rows, left=2)}\n\n{source(results, 'beyond-merge', sets)}"


def _layouts(results: Results) -> str:
    part = "beyond-layouts"
    systems, sets = ways(results, part), targets_of(results, part)
    better = against(systems, "everything", sets)
    rows = []
    for how, system in systems.items():
        passes = {row.get("one_pass") for row in system.rows}  # the base has no adapter to encode with
        shared = bytes_cell(system.mean("shared_bytes")) if system.mean("shared_bytes") else ""
        one = "" if passes == {None} else "yes" if passes == {True} else "no"
        sizes = [count_cell(system.mean("num_trained")), bytes_cell(system.mean("num_bytes"))]
        rows.append([how_name(how), *sizes, shared, one, *cer_cells(system, sets), better.get(how, "")])
    head = [
        "LoRA r 8 on",
        "trained",
        "bytes a language",
        "once",
        "encoded once",
        *(set_name(name) for name in sets),
        "mean CER",
        "points below everything",
    ]
    return f"**Layouts.** CER in percent.\n\n{table(head, rows)}\n\n{source(results, part, sets)}"


def _switch(results: Results) -> str:
    part = "beyond-switching"
    systems = results.systems(part)
    sets = common_sets(systems.values())
    cold = systems.get("cold")
    rows = []
    for arm, system in systems.items():
        row = [how_name(arm)]
        for name in sets:
            row += [rate_cell(system.sample(name)), rate_cell(system.sample(name, "cer"))]
            row.append("" if cold is None or system is cold else estimate_cell(difference(cold, system, name, "cer")))
        rows.append(row)
    head = [""]
    for name in sets:
        head += [f"{set_name(name)}: WER", "CER", "points below cold"]
    return f"**Two languages in one clip.** In percent.\n\n{table(head, rows)}\n\n{source(results, part, sets)}"


# ---- figures -----------------------------------------------------------------------------------------------------------


def figures(results: Results) -> list[Picture]:
    """Those that the runs are enough for."""
    made = []
    if "beyond-bytes" in results.parts:
        made.append(picture(results, "bytes", "Bytes of an adapter against error rate", draw_bytes))
    if "beyond-growth" in results.parts and growth_groups(results):
        made.append(picture(results, "growth", "Languages against bytes and error rates, a pool and a LoRA each", draw_growth))
    if "beyond-merge" in results.parts and common_sets(system for _, system in merge_systems(results)):
        made.append(picture(results, "merge", "Adapters left after merging against error rates", draw_merge))
    return made


SHORT = {
    "pool": "pool",
    "pool-attention": "pool, attention",
    "pool-random": "untrained pool",
    "pool-broad": "pool of 16 new languages",
}
"""What figures call ways with long names."""


def _color(how: str) -> str:
    """Of a way: that of its family, except that the two trained pools stand side by side."""
    own = {"base": COLORS["none"], "pool-broad": "C4"}
    families = {"pool": COLORS["s2lora"], "lora": COLORS["lora"], "s2": "C1"}
    return own.get(how) or families[how.partition("-")[0]]


def draw_bytes(results: Results) -> Figure:
    """Bytes a language against mean CER, a point per way."""
    part = "beyond-bytes"
    systems, sets = ways(results, part), targets_of(results, part)
    figure = new_figure(7.5, 4.6)
    axis = figure.subplots()
    for how, system in systems.items():
        if not all(system.has(name) for name in sets):
            continue
        rate, size = mean_rate(system, sets, "cer"), system.mean("num_bytes")
        if size is None:
            axis.axhline(100 * rate.value, color="0.6", linestyle="--", linewidth=1, label="the base")
            continue
        axis.errorbar([size / 1e3], [100 * rate.value], yerr=error_bar(rate), fmt="o", color=_color(how))
        below = how == "pool-random"  # at the same place as the pool
        place = (6, -10 if below else 4)
        axis.annotate(SHORT.get(how, how_name(how)), (size / 1e3, 100 * rate.value), place, textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.set_xlabel("kB a language")
    axis.set_ylabel(f"mean CER of {', '.join(map(set_name, sets))} in percent")
    axis.grid(color="0.93")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    return figure


def draw_growth(results: Results) -> Figure:
    """Bytes of the first n languages, and the mean CER of so many of each group, those first that the base writes best."""
    from matplotlib.ticker import MaxNLocator

    systems, groups = ways(results, "beyond-growth"), growth_groups(results)
    columns = 3 if len(groups) > 2 else 1 + len(groups)
    lines = -(-(1 + len(groups)) // columns)
    figure = new_figure(3.6 * columns, 3.6 * lines + 0.6)
    left, *rest = [figure.add_subplot(lines, columns, at + 1) for at in range(1 + len(groups))]
    everything = [name for group in groups.values() for name in group]
    for how, system in systems.items():
        color = _color(how)
        if how != "base":
            totals = [total / 1e6 for _, total, _ in growth_curve(results, how, everything)]
            left.plot(range(1, len(totals) + 1), totals, color=color)
        for axis, group in zip(rest, groups.values(), strict=True):
            counts = np.arange(1, len(group) + 1)
            rates = np.cumsum([system.sample(name, "cer").rate for name in group]) / counts
            axis.plot(counts, 100 * rates, "--" if how == "base" else "-", marker=".", color=color, label=SHORT.get(how, how_name(how)))
    left.set_ylabel("MB of all adapters, the pool included")
    for axis in rest:
        axis.set_ylabel("mean CER in percent")
    for axis, title in zip([left, *rest], ["all", *groups], strict=True):
        axis.set_title(title, fontsize=11)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("languages, those first that the base writes best" if axis is left else "languages")
        axis.set_ylim(bottom=0)
        axis.grid(color="0.93")
    figure.legend(*rest[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=2)
    return figure


def draw_merge(results: Results) -> Figure:
    """Adapters left against CER: a line per language, and their mean."""
    systems = merge_systems(results)
    sets = common_sets(system for _, system in systems)
    figure = new_figure(7, 4.4)
    axis = figure.subplots()
    numbers = [number for number, _ in systems]
    for number, name in enumerate(sets):
        rates = [100 * system.sample(name, "cer").rate for _, system in systems]
        axis.plot(numbers, rates, "o-", color=f"C{number}", alpha=0.55, linewidth=1, markersize=4, label=set_name(name))
    axis.plot(numbers, [100 * mean_rate(system, sets, "cer").value for _, system in systems], "k-", linewidth=2.5, label="mean")
    axis.invert_xaxis()
    axis.set_xticks(numbers, [f"{number}\n{bytes_cell(system.mean('num_bytes'))}" for number, system in systems])
    axis.set_xlabel("adapters left, and their bytes")
    axis.set_ylabel("CER in percent")
    axis.grid(color="0.93")
    axis.legend(fontsize=8, ncols=2)
    return figure
