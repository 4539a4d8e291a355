"""How many rank directions each weight uses, layer by module type: the evidence that S2-LoRA found out which weights matter.

`rank_report(model)` gives the figures; the report prints a table, writes JSON and draws a picture (the last needs matplotlib).
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .sharing import adapted_layers, base_model_of
from .sparsity import count_parameters, single_config


@dataclass(frozen=True)
class WeightRank:
    """One adapted weight: its module, where it stands, what it shares and how many directions it uses."""

    module: str
    layer: str  # the part of the name up to the first number, "model.encoder.layers.0"
    kind: str  # the rest, "self_attn.q_proj"
    group: str
    used: int
    available: int


@dataclass(frozen=True)
class RankReport:
    """Rank directions used by every adapted weight of one adapter."""

    adapter: str
    r: int
    num_parameters: int
    weights: tuple[WeightRank, ...]

    @property
    def zero_fraction(self) -> float:
        """Part of the coefficients that are exactly zero."""
        available = sum(weight.available for weight in self.weights)
        return 1 - sum(weight.used for weight in self.weights) / available

    def grid(self) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
        """Layers, kinds, and used directions by (layer, kind), in the model's order."""
        layers = list(dict.fromkeys(weight.layer for weight in self.weights))
        kinds = list(dict.fromkeys(weight.kind for weight in self.weights))
        return layers, kinds, {(weight.layer, weight.kind): weight.used for weight in self.weights}

    def table(self) -> str:
        """The grid as text, one row per layer; a dot where a layer has no such weight."""
        layers, kinds, used = self.grid()
        rows = [["", *kinds], *([layer, *(str(used.get((layer, kind), ".")) for kind in kinds)] for layer in layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(kinds) + 1)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
        head = f"{self.adapter}: r = {self.r}, {self.num_parameters:,} parameters, {100 * self.zero_fraction:.1f} % of s exactly zero"
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": [asdict(weight) for weight in self.weights], "zero_fraction": self.zero_fraction}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def figure(self) -> Any:
        """The grid as a `matplotlib.figure.Figure`; `.savefig(path)` writes it. Needs matplotlib (`pip install matplotlib`)."""
        matplotlib_figure = importlib.import_module("matplotlib.figure")  # not pyplot: no window system, no global state
        layers, kinds, used = self.grid()
        figure = matplotlib_figure.Figure(figsize=(2.5 + 0.8 * len(kinds), 1.5 + 0.35 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        values = [[used.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
        image = axes.imshow(values, vmin=0, vmax=max(weight.available for weight in self.weights), cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        axes.set_title(f"Rank directions used ({self.adapter})")
        figure.colorbar(image, ax=axes, label="non-zero coefficients")
        return figure

    def __str__(self) -> str:
        return self.table()


def rank_report(model: nn.Module, adapter_name: str | None = None) -> RankReport:
    """Count the non-zero coefficients of every weight of an adapter (the active one unless named)."""
    name, config = single_config(model, adapter_name)
    layers = adapted_layers(base_model_of(model), name)
    weights = []
    for module_name, layer in layers.items():
        place, kind = split_name(module_name)
        used = int((layer.s2lora_coefficients[name] != 0).sum())
        weights.append(WeightRank(module_name, place, kind, layer.shared_factors[name].key, used, layer.r[name]))
    return RankReport(name, config.r, count_parameters(layers.values(), name), tuple(weights))


def split_name(module_name: str) -> tuple[str, str]:
    """Place and kind: "model.encoder.layers.0.self_attn.q_proj" -> ("model.encoder.layers.0", "self_attn.q_proj")."""
    match = re.match(r"((?:[^.]*\.)*?\d+)\.(.+)", module_name)
    return (match[1], match[2]) if match else ("", module_name)
