"""Looking inside a mixture: which experts each weight used, by recording and by time, as arrays, a table and figures.

`with record_gates(model) as report:` keeps the gates of everything the model does in the block. Gates must be looked at: a router that
sends everything to one expert, or the same to everybody, costs like a mixture and works like one adapter.
"""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from whisper_moe.moe_gates import single_adapter
from whisper_moe.moe_state import changed

NEVER, ALWAYS = 0.01, 0.99  # mean gates beyond which an expert counts as never or always chosen
CONSTANT = 1e-4  # spread below which gates count as the same for everything


class GateReport:
    """The gates that the weights of one adapter used.

    Args:
        adapter: Name of the adapter.
        experts: Names of the experts, in the order of the last axis of every array.
    """

    def __init__(self, adapter: str, experts: list[str]) -> None:
        self.adapter = adapter
        self.experts = experts
        self.calls: dict[str, list[np.ndarray]] = {}

    def add(self, module: str, gates: torch.Tensor) -> None:
        """One call of one weight: gates (E,) for all rows, (rows, E) or (rows, positions, E)."""
        array = gates.detach().float().cpu().numpy().copy()
        self.calls.setdefault(module, []).append(array[None] if array.ndim == 1 else array)

    @property
    def modules(self) -> list[str]:
        return list(self.calls)

    def array(self, module: str) -> np.ndarray:
        """All gates of a weight: (rows of all calls, experts), or (rows, positions, experts) for a router per position.

        Calls with different numbers of positions cannot be put side by side: then they are in `calls[module]`, one by one.
        """
        if module not in self.calls:
            raise ValueError(f"No gates of {module!r} were recorded. Recorded: {', '.join(self.modules[:10]) or 'none'}.")
        arrays = self.calls[module]
        if len({array.shape[1:] for array in arrays}) > 1:
            raise ValueError(f"The {len(arrays)} calls of {module} have different shapes. Read them one by one: report.calls[{module!r}].")
        return np.concatenate(arrays)

    def flat(self, module: str) -> np.ndarray:
        """(observations, experts) every gate of a weight, rows and positions alike."""
        return np.concatenate([array.reshape(-1, len(self.experts)) for array in self.calls[module]])

    def mean_gates(self) -> dict[str, torch.Tensor]:
        """Module -> (experts,) mean gates. `use_gates` and `to_lora` take them."""
        return {module: torch.from_numpy(self.flat(module).mean(axis=0)) for module in self.calls}

    def use(self) -> np.ndarray:
        """(experts,) mean gates over everything: how much each expert was used."""
        return np.mean([self.flat(module).mean(axis=0) for module in self.calls], axis=0)

    def spread(self) -> dict[str, float]:
        """Module -> how much the gates differ between recordings and positions: the largest standard deviation of an expert's gate."""
        return {module: float(self.flat(module).std(axis=0).max()) for module in self.calls}

    @property
    def never_chosen(self) -> list[str]:
        """Experts whose gates were next to nothing everywhere."""
        return [name for name, share in zip(self.experts, self.use(), strict=True) if share < NEVER]

    @property
    def always_chosen(self) -> list[str]:
        """Experts who took next to everything everywhere, if there were others to choose."""
        return [name for name, share in zip(self.experts, self.use(), strict=True) if share > ALWAYS and len(self.experts) > 1]

    @property
    def is_constant(self) -> bool:
        """Whether no weight's gates depended on what it saw. Expected of a static router, and of a single observation."""
        return all(spread < CONSTANT for spread in self.spread().values())

    def warn(self) -> None:
        """One warning for each expert that is never or always chosen."""
        for name in self.never_chosen:
            warnings.warn(
                f"Expert {name!r} of {self.adapter!r} was never chosen (mean gate below {NEVER}). Leave it out, or use balance_weight.",
                stacklevel=3,
            )
        for name in self.always_chosen:
            warnings.warn(
                f"Expert {name!r} of {self.adapter!r} was always chosen (mean gate above {ALWAYS}): the mixture is that one adapter. "
                "Train with balance_weight, or use the adapter alone.",
                stacklevel=3,
            )

    def table(self) -> str:
        """Mean gates as text, one row per weight, with the spread over what was seen in the last column."""
        spread = self.spread()
        head = ["", *self.experts, "spread"]
        rows = [
            [module, *(f"{share:.3f}" for share in gates.tolist()), f"{spread[module]:.3f}"] for module, gates in self.mean_gates().items()
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in [head, *rows]
        ]
        seen = max((len(self.flat(module)) for module in self.calls), default=0)
        return "\n".join([f"{self.adapter}: mean gates over up to {seen} observations per weight", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Means and spreads as plain data; the arrays are in `calls`."""
        means = {module: gates.tolist() for module, gates in self.mean_gates().items()}
        return {"adapter": self.adapter, "experts": self.experts, "mean_gates": means, "spread": self.spread()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def figure(self) -> Any:
        """Mean gates, weights by experts, as a `matplotlib.figure.Figure`; `.savefig(path)` writes it. Needs matplotlib."""
        means = self.mean_gates()
        figure, axes = _figure(2.5 + 0.8 * len(self.experts), 1.5 + 0.22 * len(means))
        image = axes.imshow(np.stack([gates.numpy() for gates in means.values()]), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(self.experts)), self.experts, rotation=45, ha="right")
        axes.set_yticks(range(len(means)), [_short(module) for module in means], fontsize=7)
        axes.set_title(f"Mean gates ({self.adapter})")
        figure.colorbar(image, ax=axes, label="gate")
        return figure

    def figure_over_time(self, module: str, row: int = 0) -> Any:
        """The gates of one row of one weight, position by position, as a `matplotlib.figure.Figure`. For `router="token"`."""
        array = self.array(module)
        if array.ndim != 3:
            raise ValueError(f"The gates of {module} have no time axis: one set per recording. figure() shows them, or use router='token'.")
        figure, axes = _figure(8, 3)
        for index, name in enumerate(self.experts):
            axes.plot(array[row, :, index], label=name)
        axes.set(xlabel="position", ylabel="gate", ylim=(0, 1), title=f"{_short(module)}, row {row}")
        axes.legend()
        return figure

    def __str__(self) -> str:
        return self.table()


@contextmanager
def record_gates(model: nn.Module, adapter_name: str | None = None) -> Iterator[GateReport]:
    """Keep the gates of every weight with experts for everything the model does in the block; `with record_gates(model) as report:`.

    At the end, an expert that was never or always chosen gets a warning. Recording nothing is refused: an empty report says nothing.
    """
    name, state = single_adapter(model, adapter_name)
    if not state.experts:
        raise ValueError(f"Adapter {name!r} has no experts, so there are no gates to record.")
    report = GateReport(name, list(state.experts))
    with changed(state, recorder=report.add):
        yield report
    if not report.calls:
        raise ValueError("The model was not run inside record_gates (or all experts are masked, or the adapter is off or merged).")
    report.warn()


def _figure(width: float, height: float) -> tuple[Any, Any]:
    matplotlib_figure = importlib.import_module("matplotlib.figure")  # not pyplot: no window system, no global state
    figure = matplotlib_figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _short(module: str) -> str:
    """ "model.encoder.layers.0.self_attn.q_proj" -> "encoder 0 self_attn.q_proj"."""
    match = re.search(r"(encoder|decoder)\.(?:layers|block)\.(\d+)\.(.+)", module)
    return f"{match[1]} {match[2]} {match[3]}" if match else module
