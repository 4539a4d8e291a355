"""What a run leaves behind: an adapter's folder, its record and its note; and, before it, the plan of what would be done.

Files are replaced in one step each, after what is in them has reached the disk: a run that dies while writing, or a machine that loses
its power, leaves the old one or the new one. Knows no models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whisper_moe.base_signature import WrongBaseError, check_signature
from whisper_moe.languages import language_name
from whisper_moe.train_settings import CardNotes


@dataclass(frozen=True)
class TrainingPlan:
    """What a run would do, and about how long it would take on this machine."""

    name: str
    language: str
    carrier: str | None
    carrier_reason: str | None
    base: str
    out: str
    clips: str
    num_clips: int | None
    """None: a stream."""
    hours: float | None
    dev: str | None
    test: str | None
    method: str
    start: str
    start_reason: str
    num_parameters: int
    """Trained."""
    num_base_parameters: int
    """Frozen."""
    steps: int
    epochs: float | None
    clips_per_step: int
    """Of all processes together."""
    processes: int
    device: str
    precision: str
    seconds_per_step: float
    training_minutes: float
    """Without what prepares the batches, which runs beside it."""
    measuring_minutes: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        spoken = language_name(self.language)
        carrier = "its own token" if self.carrier is None else f"the token of {language_name(self.carrier)}"
        passes = "" if self.epochs is None else f", {self.epochs:g} passes"
        share = self.num_parameters / max(1, self.num_parameters + self.num_base_parameters)
        lines = {
            "adapter": f"{self.name}: {spoken} under {carrier}, for {self.base}, into {self.out}",
            "carrier": self.carrier_reason or "",
            "train": self.clips,
            "dev": self.dev or "none: the last checkpoint is kept",
            "test": self.test or "none: error rates are not measured",
            "method": f"{self.method}, {self.num_parameters:,} parameters trained ({share:.2%}); start {self.start}: {self.start_reason}",
            "steps": f"{self.steps:,} of {self.clips_per_step:,} clips{passes}; {self._machine()}",
            "cost": f"about {_minutes(self.training_minutes)} of training ({self.seconds_per_step:.2g} s a step, measured now) and "
            f"{_minutes(self.measuring_minutes)} of measuring",
            "settings": ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None),
        }
        return "\n".join(f"{label + ':':<10}{text}" for label, text in lines.items() if text)

    def _machine(self) -> str:
        return f"{self.device}, {self.precision}" + (f", {self.processes} processes" if self.processes > 1 else "")


def _minutes(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def save_adapter(write: Callable[[Path], Any], out: Path, beside: Path) -> None:
    """Have `write` fill the folder `beside`, then move its files into `out`: a disk that is full spoils nothing that was there."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        sync_folder(beside)
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(beside.iterdir()):
            if path.name == "README.md":  # PEFT's own, which says nothing of this adapter
                continue
            if path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            path.replace(out / path.name)
        _sync(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_record(out: Path, row: dict[str, Any], notes: CardNotes, render_card: Callable[[Path], str] | None = None) -> None:
    """`language_adapter.json`, and a README made from it."""
    write_text(out / "language_adapter.json", json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "README.md", _note(out, row, notes) if render_card is None else render_card(out))


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a run that dies here leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    try:
        unfinished.write_text(text, "utf-8")
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that is in it have reached the disk."""
    for path in [*(path for path in folder.rglob("*") if path.is_file()), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened, and its names are written with its files
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- which run a checkpoint is of ----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as it comes back from a JSON file, so that one that was read compares equal."""
    return json.loads(
        json.dumps(value, sort_keys=True, default=lambda odd: sorted(odd, key=str) if isinstance(odd, (set, frozenset)) else str(odd))
    )


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], checkpoints: Path) -> None:
    """Raise `ValueError` with all that differs, unless what was begun in `checkpoints` is the run that is asked for.

    `base` of both is a signature, which forgives what another machine or precision does to it.
    """
    differing = differences(_without(found, "base"), _without(wanted, "base"))
    try:
        check_signature(found.get("base", {}), wanted["base"])
    except WrongBaseError:
        differing.insert(0, "base")
    if differing:
        raise ValueError(
            f"The unfinished run in {checkpoints} was another one; what differs: {'; '.join(differing)}. Give the same as then, or "
            "delete that folder to start anew."
        )


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In which entries two plain descriptions differ, with both values where they are short."""
    differing = []
    for name in dict.fromkeys([*wanted, *found]):
        one, other = found.get(name), wanted.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            differing += [f"{name}.{inner}" for inner in differences(one, other)]
        else:
            values = f" {one!r}, now {other!r}"
            differing.append(name + (values if len(values) <= 80 else ""))
    return differing


def _note(folder: Path, row: dict[str, Any], notes: CardNotes) -> str:
    """A short README for a run that was given no card. Strings of the header are quoted: YAML reads a bare `no` as false."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    header = {"language": [row["language"]], "license": notes.license, "library_name": "peft", "base_model": row["base_model"]}
    spoken = language_name(row["language"]) + (f", {row['domain']} speech" if row["domain"] else "")
    about = f"A {config['peft_type']} adapter of {row['num_parameters']:,} parameters; the base model stays as it is."
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value is not None), "---", ""]
    lines += [f"# {row['name']}: {spoken} for {row['base_model']}", "", about, ""]
    if row["carrier"]:
        lines += [f"Whisper has no token for {spoken}; prompt with `{row['carrier']}`.", ""]
    for label, key in (("base model", "before"), ("with this adapter", "after")):
        if scores := row["metrics"].get(key):
            lines.append(f"- {label}: WER {scores['wer']:.1%}, CER {scores['cer']:.1%} ({scores['clips']:,} clips)")
    measured = row["metrics"]
    told = f"\nOn {measured['test_set']}, text normalised by `{measured['normalizer']}`." if measured else "Error rates were not measured."
    lines.append(told)
    lines += ["", f"Data: {row['train_data']}"]
    lines += [f"\nThe run was stopped {row['training']['stopped']}."] if "stopped" in row["training"] else []
    lines += [f"\nMade by: `{notes.command}`"] if notes.command else []
    lines += [f"\n{notes.limits}"] if notes.limits else []
    return "\n".join([*lines, "", "A full card, ready for the Hub: `hub_utils.render_card(folder)`.", ""])
