"""Cells and lines that all tables of the page share: markdown, from committed results alone. Rates in percent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from recipes.evidence.comparing import Estimate, Results, Sample, System, how_of, mean_difference, mean_rate, target_of
from recipes.evidence.ground import FLITE, SPOKEN
from recipes.evidence.methods import ATTENTION, SIX_TYPES
from whisper_moe.languages import language_name

SET_NAMES = {
    "child": "children",
    "adult": "adults",
    "kathleen": "Kathleen (en)",
    "kerstin": "Kerstin (de)",
    "kichwa": "Kichwa",
    "kichwa-switched": "Kichwa, Spanish in it",
    "kichwa-plain": "Kichwa alone",
    FLITE: "flite (en)",
}


# ---- words -------------------------------------------------------------------------------------------------------------


def set_name(name: str) -> str:
    """A set as the page calls it."""
    if name in SET_NAMES:
        return SET_NAMES[name]
    if name.endswith("-dev"):
        return f"{set_name(name.removesuffix('-dev'))} (dev)"
    return language_name(name.removeprefix(f"{SPOKEN}-"))


def method_name(method: dict[str, Any]) -> str:
    """A method as the page calls it."""
    kind, rank = method["kind"], method["rank"]
    plain = {"none": "the base", "full": "full fine-tuning", "bitfit": "BitFit"}
    if kind in plain:
        return plain[kind]
    name = f"{ {'lora': 'LoRA', 'adalora': 'AdaLoRA', 'vera': 'VeRA', 's2lora': 'S2-LoRA'}[kind] } r {rank}"
    modules = tuple(method["modules"])
    if modules == ATTENTION:
        name += ", attention"
    elif modules != SIX_TYPES:
        name += ", " + " ".join(module.removesuffix("_proj") for module in modules)
    scopes = {"shape": "", "module_type": ", pair per type", "global": ", one pair"}
    name += scopes.get(method["scope"], "") if kind == "s2lora" else ""
    return name + (f", sparsity {method['sparsity']:g}" if method["sparsity"] else "")


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def rate_cell(sample: Sample) -> str:
    """Rate, interval over clips and seeds, and how far the runs lie apart."""
    interval = sample.interval()
    cell = percent(interval.value)
    if interval.low is not None and interval.high is not None:
        cell += f" ({percent(interval.low)} to {percent(interval.high)})"
    if len(sample.per_seed) > 1:
        cell += f" ±{percent((max(sample.per_seed) - min(sample.per_seed)) / 2)}"
    return cell


def estimate_cell(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def p_cell(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def count_cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def bytes_cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown, the first `left` columns flush left."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def source(results: Results, part: str, sets: Sequence[str]) -> str:
    """What stands under every table: command, date, machine, base, normaliser, clips, seeds."""
    run = results.run
    rows = results.rows(part)
    seeds = sorted({row["seed"] for row in rows})
    clips = []
    for name in sets:
        about = run["sets"][part].get(name)
        if about is not None:
            speakers = {speaker for speaker in about["speakers"] if speaker is not None}
            voices = f", {len(speakers)} voices" if speakers else ""
            clips.append(f"{set_name(name)} {len(about['words'])} clips ({about['seconds'] / 60:.0f} min{voices})")
    steps = sorted({row["schedule"]["num_steps"] for row in rows if "schedule" in row})
    long = f" {_range(steps)} steps." if steps else ""
    told = f" {'; '.join(clips)}." if clips else ""
    made_by = run["command"] + ("" if " full-size " in run["command"] else f" --parts {run['part']}")  # a recipe names its parts
    return (
        f"`{made_by}`, {run['date']}, {run['machine']['cpu']}, {run['machine']['threads']} thread(s); base "
        f"`{run['base']}`; normaliser {run['normalizer']}; seeds {', '.join(map(str, seeds))}.{long}{told}"
        + (" **Made by the smoke path: these figures mean nothing.**" if run["smoke"] else "")
    )


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


# ---- ways and languages -------------------------------------------------------------------------------------------------

HOW: dict[str, str] = {
    "base": "the base",
    "joint-full": "one model, full fine-tuning",
    "joint-lora": "one LoRA for all",
    "sequential-full": "full fine-tuning, one language after the other",
    "sequential-lora": "one LoRA, one language after the other",
    "per-language-full": "one model per language, full fine-tuning",
    "per-language-lora": "a LoRA per language",
    "per-language-s2": "an S2-LoRA per language",
    "shared-private": "shared LoRA + private LoRA",
    "full": "full fine-tuning",
    "cold": "LoRA, cold",
    "warm-nearest": "warm, from the nearest",
    "warm-farthest": "warm, from the farthest",
    "stacked": "stacked on the nearest",
    "moe": "LoRA-MoE",
    "pool": "coefficients of a pool",
    "pool-attention": "coefficients of a pool, attention",
    "pool-random": "coefficients of an untrained pool",
    "pool-broad": "coefficients of a pool of 16 languages new to the base",
    "everything": "encoder and decoder",
    "decoder-only": "the decoder",
    "upper-private": "the upper layers, over lower ones that languages share",
    "both": "the decoder's upper layers, over lower ones that languages share",
}
EXPECTED = tuple(HOW)


def how_name(how: str) -> str:
    """A way of doing things as the page calls it."""
    if how in HOW:
        return HOW[how]
    kind, _, rest = how.partition("-")
    names = {"lora": "LoRA", "s2": "S2-LoRA", "adalora": "AdaLoRA"}
    return f"{names[kind]} {rest.replace('r', 'r ', 1)}" if kind in names else how.replace("-", " ")


def ways(results: Results, part: str) -> dict[str, System]:
    """Way -> system over all its languages, in the order of the page."""
    found = results.systems(part, how_of)
    return {how: found[how] for how in sorted(found, key=lambda how: (EXPECTED.index(how) if how in EXPECTED else len(EXPECTED), how))}


def cer_cells(system: System, sets: Sequence[str]) -> list[str]:
    """The CER on each set, and their mean where the system has all of them."""
    cells = [rate_cell(system.sample(name, "cer")) if system.has(name) else "" for name in sets]
    whole = all(system.has(name) for name in sets)
    return [*cells, estimate_cell(mean_rate(system, sets, "cer")) if whole else ""]


def against(systems: dict[str, System], reference: str, sets: Sequence[str], rate: str = "cer") -> dict[str, str]:
    """Way -> points lower than `reference` in the mean over sets; empty where there is nothing to compare."""
    if reference not in systems:
        return {}
    return {
        how: estimate_cell(mean_difference(systems[reference], system, sets, rate))
        for how, system in systems.items()
        if how != reference and all(each.has(name) for each in (system, systems[reference]) for name in sets)
    }


def targets_of(results: Results, part: str) -> list[str]:
    """Sets of the new languages, in the order of the file."""
    return [name for name in dict.fromkeys(map(target_of, results.rows(part))) if name is not None]


def by_part(results: Results, makers: Mapping[str, Callable[[Results], str]]) -> str:
    """The tables of those parts that have been run, in the order of `makers`; an empty one is left out."""
    return "\n\n".join(text for part, make in makers.items() if part in results.parts and (text := make(results)))
