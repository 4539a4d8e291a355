"""What the page says of child speech: tables and figures, from committed results alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from recipes.evidence.child_speech import IN_DOMAIN, METHODS, SLOWER
from recipes.evidence.comparing import Estimate, Results, System, correlation, difference, mean_difference, mean_rate, spearman
from recipes.evidence.figures import COLORS, Picture, error_bar, error_bars, new_figure, picture
from recipes.evidence.tables import (
    bytes_cell,
    count_cell,
    estimate_cell,
    method_name,
    p_cell,
    percent,
    rate_cell,
    set_name,
    source,
    table,
)
from whisper_moe.intervals import holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("adalora-r8", "lora-r8")
"""What the arms are compared with: the first that has been run."""
S2_ARM = "s2-r32-sparse-0.3"
"""What stands for the paper's method, which is sparse: a pull of 0.1 leaves nearly all coefficients."""
PATTERNS = ((S2_ARM,), ("adalora-r8", "adalora-r2"))
"""Whose ranks are compared: of each side the first that has been run."""
TRAINED_ON = {"own-decoder": ("adult", "kathleen", "kerstin"), "pocket": ("adult", "kathleen", "kerstin")}
"""Ground -> sets whose training clips its base was trained on. What an adapter to children leaves of them is what is kept."""
KINDS = {"full": "full fine-tuning", "bitfit": "BitFit", "lora": "LoRA", "adalora": "AdaLoRA", "vera": "VeRA", "s2lora": "S2-LoRA"}
COLUMNS: tuple[str, ...] = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    *("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj", "encoder_attn.out_proj", "fc1", "fc2"),
)
_SHORT = {"self_attn": "", "encoder_attn": "x-", "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}


def tables(results: Results) -> str:
    """All tables of the part."""
    made = [_child_methods(results), _child_differences(results)]
    if "child-amount" in results.parts:
        made.append(_child_amounts(results))
    if "child-tuning" in results.parts:
        made.append(_child_tuning(results))
    return "\n\n".join(text for text in made if text)


def system_name(system: System) -> str:
    """An arm as the page calls it."""
    slower = ", slower" if system.rows[0]["arm"] in SLOWER else ""
    return method_name(system.rows[0]["method"]) + slower


def child_systems(results: Results) -> dict[str, System]:
    """Arm -> system, the base first, then by what is kept of an arm, the fewest bytes first."""
    found = results.systems("child")
    order = [*METHODS, *SLOWER]

    def place(arm: str) -> tuple[bool, float, int, str]:
        return arm != "base", found[arm].mean("num_bytes") or 0, order.index(arm) if arm in order else len(order), arm

    return {arm: found[arm] for arm in sorted(found, key=place)}


def other_sets(results: Results) -> list[str]:
    """Test sets of the part besides the children's."""
    return [name for name in results.run["sets"]["child"] if name != IN_DOMAIN]


def trained_on(results: Results) -> list[str]:
    """Those of them that the base was trained on."""
    return [name for name in other_sets(results) if name in TRAINED_ON.get(results.ground, ())]


def out_of_domain(results: Results) -> list[str]:
    """Those that claims of other domains are judged on: what the base was not trained on, where any is there."""
    return [name for name in other_sets(results) if name not in trained_on(results)] or other_sets(results)


def kept_sets(results: Results) -> list[str]:
    """Those whose mean is shown: what the base was trained on, where any is there."""
    return trained_on(results) or other_sets(results)


def others_are(results: Results, others: Sequence[str] | None = None) -> str:
    """What such sets, all by default, are to the base: a page must not call out of domain what it was trained on."""
    others, known = other_sets(results) if others is None else others, trained_on(results)
    was = [name for name in others if name in known]
    rest = [name for name in others if name not in known]
    told = [f"what the base was trained on: {listed(was)}"] if was else []
    return "; ".join([*told, *([f"out of domain: {listed(rest)}"] if rest else [])])


def set_head(results: Results, name: str) -> str:
    """A set as the head of a column."""
    return f"{set_name(name)} (base trained on it)" if name in trained_on(results) else set_name(name)


def mean_head(results: Results) -> str:
    return f"mean of {len(kept_sets(results))} others{' (base trained on them)' if trained_on(results) else ''}"


def coefficients_cell(system: System) -> str:
    """Of an S2-LoRA: how many coefficients are not zero in the end, mean over seeds, and how many there are."""
    method, used = system.rows[0]["method"], mean_ranks(system)
    return f"{sum(used.values()):.0f} of {method['rank'] * len(used)}" if method["kind"] == "s2lora" and used else ""


def _child_methods(results: Results) -> str:
    systems = child_systems(results)
    sets = [IN_DOMAIN, *other_sets(results)]
    full = systems["full"].mean("train_s") if "full" in systems else None
    rows = []
    for system in systems.values():
        trained, seconds = system.mean("num_trained"), system.mean("train_s")
        share = "" if trained is None else percent(trained / results.base_parameters, 3 if trained < 0.01 * results.base_parameters else 1)
        time = "" if seconds is None or full is None else f"{seconds / full:.2f}"
        rates = [rate_cell(system.sample(name)) for name in sets]
        kept = bytes_cell(system.mean("num_bytes"))
        rows.append([system_name(system), count_cell(trained), share, kept, coefficients_cell(system), time, *rates])
    head = [
        "method",
        "trained",
        "% of the model",
        "kept",
        "coefficients not 0",
        "time",
        *(f"{set_head(results, name)} WER" for name in sets),
    ]
    return (
        "**Methods on child speech.** The fewest kept bytes first. Word error rates in percent: mean over seeds (95 % interval over seeds, "
        "and over speakers, or clips where there are fewer than ten) ± half the distance between the best and the worst seed. Besides "
        f"children, {others_are(results)}; where the base was trained on a set, a method is judged by what it keeps. AdaLoRA is counted "
        "at the rank it begins with, and kept at the one it ends with. Time is that of the training steps against full fine-tuning's; "
        "*slower*: the next lower learning rate."
        f"\n\n{table(head, rows)}\n\n{source(results, 'child', sets)}"
    )


def reference(systems: dict[str, System]) -> System | None:
    return next((systems[arm] for arm in REFERENCES if arm in systems), None)


def adjusted(found: Sequence[Estimate]) -> list[str]:
    """Cells of p after Holm over those that have one."""
    known = [each.p_value for each in found if each.p_value is not None]
    raised = iter(holm(known))
    return ["" if each.p_value is None else p_cell(next(raised)) for each in found]


def _child_differences(results: Results) -> str:
    systems, others = child_systems(results), other_sets(results)
    than = reference(systems)
    if than is None:
        return ""
    compared = [system for system in systems.values() if system is not than]
    kept = kept_sets(results)
    shown = dict.fromkeys((IN_DOMAIN, *(name for name in others if name == "adult" or name not in kept)))
    columns = {name: [difference(than, system, name) for system in compared] for name in shown}
    p_values = {name: adjusted(found) for name, found in columns.items()}
    rows = []
    for at, system in enumerate(compared):
        row = [system_name(system)]
        for name, found in columns.items():
            row += [estimate_cell(found[at]), p_values[name][at]]
        rows.append([*row, estimate_cell(mean_difference(than, system, kept, "wer")) if kept else ""])
    name = system_name(than)
    head = ["method", *(cell for each in columns for cell in (set_head(results, each), "p")), mean_head(results)]
    return (
        f"**Against {name}, on the same clips.** Points of WER lower than {name} (95 % interval of the paired difference, clips and "
        "seeds drawn; above 0 is better); p after Holm over the column, of these seeds. The last column is the mean over sets besides "
        f"the children's ({others_are(results, kept)}), each with the same "
        f"weight.\n\n{table(head, rows)}\n\n{source(results, 'child', [IN_DOMAIN, *others])}"
    )


def listed(names: Sequence[str]) -> str:
    called = [set_name(name) for name in names]
    return called[0] if len(called) == 1 else f"{', '.join(called[:-1])} and {called[-1]}"


def amount_systems(results: Results) -> dict[str, list[System]]:
    """Arm -> systems by the minutes of training speech, all of it included."""
    made = [(arm.rpartition("-")[0], system) for arm, system in results.systems("child-amount").items()]
    whole = results.systems("child")
    found: dict[str, list[System]] = {}
    for arm, system in made:
        found.setdefault(arm, [whole[arm]] if arm in whole else []).append(system)
    return {arm: sorted(systems, key=lambda system: system.rows[0]["minutes"][0]) for arm, systems in found.items()}


def _child_amounts(results: Results) -> str:
    """Minutes of training speech against error rates."""
    rows = []
    for systems in amount_systems(results).values():
        for system in systems:
            row = [system_name(system), f"{system.rows[0]['minutes'][0]:.0f}", str(system.rows[0]["clips"][0])]
            rows.append([*row, *(rate_cell(system.sample(name)) for name in (IN_DOMAIN, "adult") if system.has(name))])
    head = ["method", "minutes", "clips", f"{set_name(IN_DOMAIN)} WER", f"{set_head(results, 'adult')} WER"]
    return f"**Less training speech.**\n\n{table(head, rows)}\n\n{source(results, 'child-amount', [IN_DOMAIN, 'adult'])}"


def _child_tuning(results: Results) -> str:
    """What each learning rate came to on the dev set."""
    rows = []
    systems = results.systems("child-tuning")
    kinds: dict[tuple[str, bool], list[System]] = {}
    for system in systems.values():
        method = system.rows[0]["method"]
        kinds.setdefault((method["kind"], method["sparsity"] > 0), []).append(system)
    for tried in kinds.values():
        tried.sort(key=lambda system: system.rows[0]["method"]["learning_rate"])
        name = system_name(tried[0])
        best = min(tried, key=lambda system: system.sample("child-dev").rate)
        told = []
        for system in tried:
            cell = f"{system.rows[0]['method']['learning_rate']:g}: {percent(system.sample('child-dev').rate)}"
            told.append(f"**{cell}**" if system is best else cell)
        rows.append([name, "; ".join(told)])
    return (
        "**Learning rates.** WER on the children's dev clips after half the steps, one seed that no other run uses; the bold one is "
        f"taken.\n\n{table(['method', 'rate: WER'], rows, left=2)}\n\n{source(results, 'child-tuning', ['child-dev'])}"
    )


# ---- figures -----------------------------------------------------------------------------------------------------------


def figures(results: Results) -> list[Picture]:
    """Those that the runs are enough for."""
    made = [
        picture(
            results,
            "parameters",
            f"Trained numbers against word error rates, of children and of others ({others_are(results)})",
            draw_parameters,
        ),
    ]
    if rank_sides(results) is not None:
        made.append(picture(results, "ranks", "Ranks that S2-LoRA and AdaLoRA give each weight, side by side", draw_ranks))
    if "child-amount" in results.parts:
        made.append(picture(results, "amount", "Minutes of training speech against the children's word error rate", draw_amount))
    return made


def draw_parameters(results: Results) -> Figure:
    """Trained numbers against WER of children and of the other sets; the numbers at the points are those of the list."""
    systems, kept = child_systems(results), kept_sets(results)
    apart = [name for name in other_sets(results) if name not in kept]
    panels = [(f"{set_name(IN_DOMAIN)} (in domain)", [IN_DOMAIN])]
    panels += [(others_are(results, sets), sets) for sets in (apart, kept) if sets]
    figure = new_figure(4.5 + 4 * len(panels), 5.4)
    axes = figure.subplots(1, len(panels))
    for axis, (title, sets) in zip(axes, panels, strict=True):
        for number, system in enumerate(systems.values()):
            method, rate = system.rows[0]["method"], mean_rate(system, sets, "wer")
            name, color = system_name(system), COLORS[method["kind"]]
            if method["kind"] == "none":
                axis.axhline(100 * rate.value, color=color, linestyle="--", linewidth=1, label=name)
                continue
            at = (system.mean("num_trained"), 100 * rate.value)
            axis.errorbar(at[0], at[1], yerr=error_bar(rate), fmt="o", color=color, elinewidth=0.7, alpha=0.8, label=f"{number}  {name}")
            axis.annotate(str(number), at, (4, 3), textcoords="offset points", fontsize=8, color=color)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("numbers trained")
        axis.set_ylabel("WER in percent, 95 % interval")
        axis.grid(color="0.92")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def mean_ranks(system: System) -> dict[str, float]:
    """Module -> rank used, mean over seeds."""
    seeds = [row["ranks"] for row in system.rows if row.get("ranks")]
    return {module: float(np.mean([each[module] for each in seeds])) for module in seeds[0]} if seeds else {}


def rank_sides(results: Results) -> tuple[System, System] | None:
    """The S2-LoRA and the AdaLoRA whose ranks are compared; None where one of them has not been run."""
    systems = results.systems("child")
    chosen = [next((systems[arm] for arm in arms if arm in systems and mean_ranks(systems[arm])), None) for arms in PATTERNS]
    first, second = chosen
    return None if first is None or second is None else (first, second)


def rank_correlation(results: Results) -> Estimate | None:
    """Spearman's, over the weights, of the ranks that the two methods came to; within weights of one shape, which share a pair.

    `each` has the correlation of every two runs of a seed, or of every two runs.
    """
    sides = rank_sides(results)
    if sides is None:
        return None
    one, other = ({row["seed"]: row["ranks"] for row in side.rows if row.get("ranks")} for side in sides)
    same = one.keys() == other.keys()
    pairs = [(one[seed], other[seed]) for seed in one] if same else [(a, b) for a in one.values() for b in other.values()]
    whole = correlation(*_side_by_side(*(mean_ranks(side) for side in sides)))
    return replace(whole, each=tuple(spearman(*_side_by_side(*pair)) for pair in pairs), num_seeds=min(len(one), len(other)))


def _side_by_side(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[list[float], list[float], list[str]]:
    """Ranks of one, ranks of the other, and the shape, for every weight."""
    modules = sorted(one.keys() & other.keys())
    return [one[module] for module in modules], [other[module] for module in modules], [_shape(module) for module in modules]


def _shape(module: str) -> str:
    """Square in attention; the two others are each other's transpose."""
    kind = module.rpartition(".")[2]
    return kind if kind.startswith("fc") else "attention"


def rank_grid(ranks: dict[str, float]) -> tuple[list[str], np.ndarray]:
    """Names of the layers, and (layers, types) with NaN where a layer has no such weight."""
    layers = sorted({_layer(module) for module in ranks}, key=lambda layer: (layer[0] == "d", int(layer[3:])))
    grid = np.full((len(layers), len(COLUMNS)), np.nan)
    for module, rank in ranks.items():
        column = next(at for at, name in enumerate(COLUMNS) if module.endswith("." + name))
        grid[layers.index(_layer(module)), column] = rank
    return layers, grid


def _layer(module: str) -> str:
    found = re.search(r"(encoder|decoder)\.layers\.(\d+)\.", module)
    assert found is not None, module
    return f"{found[1][:3]}{found[2]}"


def draw_ranks(results: Results) -> Figure:
    """Two heat maps of the same layout, and the correlation of their values."""
    sides, estimate = rank_sides(results), rank_correlation(results)
    assert sides is not None
    assert estimate is not None
    grids = [rank_grid(mean_ranks(side)) for side in sides]
    figure = new_figure(11, 1.7 + 0.42 * max(len(layers) for layers, _ in grids))
    for axis, side, (layers, grid) in zip(figure.subplots(1, 2), sides, grids, strict=True):
        used = ~np.isnan(grid).all(0)
        image = axis.imshow(grid[:, used], cmap="viridis", vmin=0, aspect="auto")
        names = [_column_name(name) for name, is_used in zip(COLUMNS, used, strict=True) if is_used]
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(layers)), layers)
        half = np.nanmax(grid) / 2
        for (row, column), value in np.ndenumerate(grid[:, used]):
            if np.isfinite(value):
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < half else "black")
        axis.set_title(f"{system_name(side)}: ranks used", fontsize=11)
        figure.colorbar(image, ax=axis)
    interval = "" if estimate.low is None else f" (95 % interval {estimate.low:.2f} to {estimate.high:.2f})"
    figure.suptitle(
        f"Spearman correlation within weights of one shape: {estimate.value:.2f}{interval}; x- is attention to the encoder", fontsize=10
    )
    return figure


def _column_name(name: str) -> str:
    block, _, kind = name.rpartition(".")
    return _SHORT.get(block, "") + _SHORT.get(kind, kind)


def draw_amount(results: Results) -> Figure:
    """Minutes against WER, a line per method."""
    figure = new_figure(6.5, 4.2)
    axis = figure.subplots()
    amounts: set[float] = set()
    for chosen in amount_systems(results).values():
        rates = [mean_rate(each, [IN_DOMAIN], "wer") for each in chosen]
        minutes = [each.rows[0]["minutes"][0] for each in chosen]
        amounts |= set(minutes)
        method = chosen[0].rows[0]["method"]
        heights = [100 * rate.value for rate in rates]
        axis.errorbar(minutes, heights, yerr=error_bars(rates), marker="o", color=COLORS[method["kind"]], label=system_name(chosen[0]))
    axis.set_xscale("log")
    axis.set_xticks(sorted(amounts), [f"{amount:.0f}" for amount in sorted(amounts)])
    axis.minorticks_off()
    axis.set_xlabel("minutes of children's speech in training")
    axis.set_ylabel(f"WER of {set_name(IN_DOMAIN)} in percent, 95 % interval")
    axis.grid(color="0.92")
    axis.legend()
    return figure
