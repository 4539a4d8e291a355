"""What the page says of child speech: tables and figures, from committed results alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.evidence.child_speech import IN_DOMAIN, METHODS, SLOWER
from recipes.evidence.comparing import Estimate, Results, System, correlation, difference, mean_difference, mean_rate
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
PATTERNS = (("s2-r32-sparse-0.3", "s2-r32-sparse-0.1"), ("adalora-r8", "adalora-r2"))
"""Whose ranks are compared: of each side the first that has been run."""
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
    """Arm -> system, the base first, then in the order of the part."""
    found = results.systems("child")
    order = ["base", *METHODS]
    for slower, arm in SLOWER.items():
        order.insert(order.index(arm) + 1, slower)
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: (order.index(arm) if arm in order else len(order), arm))}


def out_of_domain(results: Results) -> list[str]:
    """Test sets of the part besides the children's."""
    return [name for name in results.run["sets"]["child"] if name != IN_DOMAIN]


def _child_methods(results: Results) -> str:
    systems = child_systems(results)
    sets = [IN_DOMAIN, *out_of_domain(results)]
    full = systems["full"].mean("train_s") if "full" in systems else None
    rows = []
    for system in systems.values():
        trained, seconds = system.mean("num_trained"), system.mean("train_s")
        share = "" if trained is None else percent(trained / results.base_parameters, 3 if trained < 0.01 * results.base_parameters else 1)
        time = "" if seconds is None or full is None else f"{seconds / full:.2f}"
        rates = [rate_cell(system.sample(name)) for name in sets]
        name = system_name(system)
        rows.append([name, count_cell(trained), share, bytes_cell(system.mean("num_bytes")), time, *rates])
    head = ["method", "trained", "% of the model", "kept", "time", *(f"{set_name(name)} WER" for name in sets)]
    return (
        "**Methods on child speech.** Word error rates in percent: mean over seeds (95 % interval over speakers, or clips where there are "
        "fewer than ten) ± half the distance between the best and the worst seed. Time is that of the training steps against full "
        f"fine-tuning's; *slower*: the next lower learning rate.\n\n{table(head, rows)}\n\n{source(results, 'child', sets)}"
    )


def reference(systems: dict[str, System]) -> System | None:
    return next((systems[arm] for arm in REFERENCES if arm in systems), None)


def _child_differences(results: Results) -> str:
    systems, outside = child_systems(results), out_of_domain(results)
    than = reference(systems)
    if than is None:
        return ""
    others = [system for system in systems.values() if system is not than]
    inside = [difference(than, system, IN_DOMAIN) for system in others]
    adults = [difference(than, system, "adult") for system in others] if "adult" in outside else []
    adjusted = [*holm([found.p_value or 0.0 for found in inside]), *holm([found.p_value or 0.0 for found in adults])]
    rows = []
    for at, system in enumerate(others):
        row = [system_name(system), estimate_cell(inside[at]), p_cell(adjusted[at])]
        if adults:
            row += [estimate_cell(adults[at]), p_cell(adjusted[len(others) + at])]
        rows.append([*row, estimate_cell(mean_difference(than, system, outside, "wer")) if outside else ""])
    name = system_name(than)
    head = ["method", f"{set_name(IN_DOMAIN)}", "p", *(["adults", "p"] if adults else []), "mean out of domain"]
    return (
        f"**Against {name}, on the same clips.** Points of WER lower than {name} (95 % interval of the paired difference; above 0 is "
        f"better); p after Holm over the column. The last column is the mean over {_list(outside)}, each with "
        f"the same weight.\n\n{table(head, rows)}\n\n{source(results, 'child', [IN_DOMAIN, *outside])}"
    )


def _list(names: Sequence[str]) -> str:
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
    head = ["method", "minutes", "clips", f"{set_name(IN_DOMAIN)} WER", "adults WER"]
    return f"**Less training speech.**\n\n{table(head, rows)}\n\n{source(results, 'child-amount', [IN_DOMAIN, 'adult'])}"


def _child_tuning(results: Results) -> str:
    """What each learning rate came to on the dev set."""
    rows = []
    systems = results.systems("child-tuning")
    kinds: dict[str, list[System]] = {}
    for system in systems.values():
        kinds.setdefault(system.rows[0]["method"]["kind"], []).append(system)
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
        picture(results, "parameters", "Trained numbers against word error rates, of children and out of domain", draw_parameters),
    ]
    if rank_sides(results) is not None:
        made.append(picture(results, "ranks", "Ranks that S2-LoRA and AdaLoRA give each weight, side by side", draw_ranks))
    if "child-amount" in results.parts:
        made.append(picture(results, "amount", "Minutes of training speech against the children's word error rate", draw_amount))
    return made


def draw_parameters(results: Results) -> Figure:
    """Trained numbers against WER in domain and out of domain; the numbers at the points are those of the list."""
    systems, outside = child_systems(results), out_of_domain(results)
    figure = new_figure(12.5, 5.4)
    panels = [(f"{set_name(IN_DOMAIN)} (in domain)", [IN_DOMAIN]), (f"mean of {', '.join(map(set_name, outside))}", outside)]
    axes = figure.subplots(1, 2)
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
    """Spearman's, over the weights, of the ranks that the two methods came to."""
    sides = rank_sides(results)
    if sides is None:
        return None
    first, second = (mean_ranks(side) for side in sides)
    modules = sorted(first.keys() & second.keys())
    return correlation([first[module] for module in modules], [second[module] for module in modules])


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
    figure.suptitle(f"Spearman correlation over the weights: {estimate.value:.2f}{interval}; x- is attention to the encoder", fontsize=10)
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
