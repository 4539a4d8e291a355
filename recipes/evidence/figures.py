"""What all figures of the page share. Each is a name, a sentence for those who cannot see it, and how it is drawn; a report says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evidence.comparing import Estimate, Results, System, mean_rate
from recipes.evidence.tables import how_name, set_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"none": "0.45", "full": "C3", "bitfit": "C5", "lora": "C0", "adalora": "C1", "vera": "C4", "s2lora": "C2"}
"""Of a kind of method, in all figures."""


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn."""

    file: str
    about: str
    draw: Callable[[], Figure]


def picture(results: Results, what: str, about: str, draw: Callable[[Results], Figure]) -> Picture:
    """A figure of a results file; one of the smoke path says so across itself."""
    name = f"evidence_{results.run['part']}_{what}_{results.name.replace('-', '_')}.png"
    return Picture(name, about, partial(_drawn, draw, results))


def _drawn(draw: Callable[[Results], Figure], results: Results) -> Figure:
    figure = draw(results)
    if results.run["smoke"]:
        figure.text(0.5, 0.5, "smoke: means nothing", fontsize=34, color="C3", alpha=0.25, ha="center", va="center", rotation=20)
    return figure


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")


def error_bar(estimate: Estimate) -> list[list[float]]:
    """Distances to the ends of the interval in percent, as matplotlib wants them."""
    if estimate.low is None or estimate.high is None:
        return [[0.0], [0.0]]
    return [[max(0.0, 100 * (estimate.value - estimate.low))], [max(0.0, 100 * (estimate.high - estimate.value))]]


def draw_rows(axis: Any, systems: dict[str, System], sets: Sequence[str], base: str | None = None) -> None:
    """A row per way: the CER of each set as a dot, their mean as a bar with its interval. `base`: drawn as a line instead."""
    shown = {how: system for how, system in systems.items() if how != base and all(system.has(name) for name in sets)}
    for at, system in enumerate(shown.values()):
        mean = mean_rate(system, sets, "cer")
        axis.barh(at, 100 * mean.value, height=0.62, color="0.86", zorder=0)
        axis.errorbar([100 * mean.value], [at], xerr=error_bar(mean), color="0.25", elinewidth=1.5, capsize=3, zorder=2)
        for number, name in enumerate(sets):
            rate = 100 * system.sample(name, "cer").rate
            axis.plot(rate, at + 0.22 - 0.44 * number / max(1, len(sets) - 1), "o", color=f"C{number}", markersize=5, zorder=3)
    for number, name in enumerate(sets):
        axis.plot([], [], "o", color=f"C{number}", label=set_name(name))
    if base is not None and base in systems and all(systems[base].has(name) for name in sets):
        axis.axvline(100 * mean_rate(systems[base], sets, "cer").value, color="0.5", linestyle="--", linewidth=1, label="the base, mean")
    axis.set_yticks(range(len(shown)), [how_name(how) for how in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("CER in percent; bar: mean over languages with its 95 % interval")
    axis.grid(axis="x", color="0.93", zorder=-1)
    axis.legend(fontsize=8)


def error_bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, estimates) in percent."""
    return np.concatenate([error_bar(estimate) for estimate in estimates], axis=1)
