"""What the page says of languages: interference and forgetting, new languages, similarity, minutes of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evidence.comparing import (
    Estimate,
    Results,
    Sample,
    System,
    common_sets,
    correlation,
    how_of,
    mean_rate,
    speakers_of,
    spearman,
    target_of,
    weighted_mean,
)
from recipes.evidence.figures import Picture, draw_rows, error_bars, new_figure, picture
from recipes.evidence.tables import (
    EXPECTED,
    against,
    by_part,
    bytes_cell,
    cer_cells,
    count_cell,
    estimate_cell,
    how_name,
    percent,
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
        "languages-interference": _interference,
        "languages-expansion": _expansion,
        "languages-similarity": _similarity,
        "languages-hours": _hours,
        "languages-tuning": _tuning,
    }
    return by_part(results, makers)


def base_sets(results: Results) -> list[str]:
    """The sets that all ways of the interference learn."""
    return list(results.run["sets"]["languages-interference"])


def _interference(results: Results) -> str:
    systems, sets = ways(results, "languages-interference"), base_sets(results)
    better = against(systems, "joint-full", sets)
    rows = []
    for how, system in systems.items():
        wer = percent(mean_rate(system, sets, "wer").value) if all(system.has(name) for name in sets) else ""
        rows.append([how_name(how), *size_cells(system), *cer_cells(system, sets), wer, better.get(how, "")])
    head = ["", "trained", "kept", *(set_name(name) for name in sets), "mean CER", "mean WER", "points below one model"]
    made = (
        "**Interference.** Character error rates in percent after the same number of clips per language for every row: mean over seeds "
        "(95 % interval over clips and seeds) ± half the distance between seeds. Trained and kept: of one model or adapter, be it for "
        "all or for a language. The last column is the difference of mean CER to full fine-tuning of one model "
        f"on all languages, on the same clips.\n\n{table(head, rows)}\n\n{source(results, 'languages-interference', sets)}"
    )
    forgotten = _forgetting(results, systems, sets)
    return f"{made}\n\n{forgotten}" if forgotten else made


def size_cells(system: System) -> list[str]:
    """Numbers that were trained, and bytes that are kept."""
    return [count_cell(system.mean("num_trained")), bytes_cell(system.mean("num_bytes"))]


def forgetting(system: System, rate: str = "cer") -> dict[str, tuple[float, float, Estimate]]:
    """Set -> its rate when it had just been learned, at the end, and the paired loss, over the seeds in which others came after it."""
    kind, unit = ("word_errors", "words") if rate == "wer" else ("char_errors", "chars")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in system.rows:
        for name in row.get("order", [])[:-1]:
            found.setdefault(name, []).append(row)
    lost = {}
    for name, rows in found.items():
        before = np.array([row["stages"][name][kind] for row in rows])  # (seeds, clips)
        after = np.array([row["sets"][name][kind] for row in rows])
        about = system.sets[name]
        runs = tuple((int(row["seed"]), "") for row in rows)
        loss = Sample(after - before, np.array(about[unit]), speakers_of(about), runs)
        lost[name] = (
            float(before.sum() / (loss.lengths.sum() * len(rows))),
            float(after.sum() / (loss.lengths.sum() * len(rows))),
            weighted_mean([(1, [loss])]),
        )
    return lost


def _forgetting(results: Results, systems: dict[str, System], sets: Sequence[str]) -> str:
    rows = [
        [how_name(how), set_name(name), percent(learned), percent(last), estimate_cell(lost)]
        for how, system in systems.items()
        for name, (learned, last, lost) in forgetting(system).items()
    ]
    if not rows:
        return ""
    head = ["", "language", "CER when learned", "CER at the end", "points forgotten"]
    return (
        "**Forgetting.** Languages learned one after the other, each seed beginning with another; over the seeds in which others came "
        f"after it.\n\n{table(head, rows, left=2)}\n\n{source(results, 'languages-interference', sets)}"
    )


def _expansion(results: Results) -> str:
    part = "languages-expansion"
    systems, sets = ways(results, part), targets_of(results, part)
    to_full, to_cold = against(systems, "full", sets), against(systems, "cold", sets)
    rows = [
        [how_name(how), *size_cells(system), *cer_cells(system, sets), to_full.get(how, ""), to_cold.get(how, "")]
        for how, system in systems.items()
    ]
    head = ["", "trained", "kept", *(set_name(name) for name in sets), "mean CER", "points below full", "points below cold"]
    made = f"**New languages.** Character error rates in percent.\n\n{table(head, rows)}\n\n{source(results, part, sets)}"
    old = _old_languages(results, systems, sets)
    return f"{made}\n\n{old}" if old else made


def old_rates(results: Results) -> tuple[System, System, list[str]] | None:
    """The base, what full fine-tuning on new languages made of it, and the old sets that both were measured on."""
    systems = ways(results, "languages-expansion")
    if "full" not in systems or "base" not in systems:
        return None
    new = set(targets_of(results, "languages-expansion"))
    old = [name for name in common_sets([systems["full"], systems["base"]]) if name not in new]
    return (systems["base"], systems["full"], old) if old else None


def _old_languages(results: Results, systems: dict[str, System], sets: Sequence[str]) -> str:
    parts = []
    if (found := old_rates(results)) is not None:
        before, after, old = found
        rows = [
            [set_name(name), rate_cell(before.sample(name, "cer")), rate_cell(after.sample(name, "cer"))]
            for name in old
        ]  # fmt: skip
        parts.append(
            "After full fine-tuning on a new one: mean over new languages and seeds, and both are drawn for the interval; ± is half the "
            "distance between the best and the worst run, whichever new language and seed it had."
        )
        parts.append(table(["old language", "CER before", "CER after full fine-tuning on a new one"], rows))
    looked = {how: [row["old_languages"] for row in system.rows if "old_languages" in row] for how, system in systems.items()}
    told = [f"{how_name(how)} {sum(not any(each.values()) for each in runs)} of {len(runs)}" for how, runs in looked.items() if runs]
    if told:
        parts.append(
            "What old languages get (weights, encoder states, logits, texts) is the same bits before a new language was learned and after "
            f"it was used, in so many runs: {'; '.join(told)}."
        )
    if not parts:
        return ""
    return "\n\n".join(["**Old languages.**", *parts, source(results, "languages-expansion", sets)])


def similarity_points(results: Results) -> list[dict[str, Any]]:
    """One entry per new language and source: similarity, CER, and points gained over the cold start of as many steps; `own` is how much of
    the new language's speech the base takes for itself, where a run says so."""
    systems = results.systems("languages-similarity").values()
    cold = {target_of(system.rows[0]): system for system in systems if system.rows[0]["source"] is None}
    points = []
    for system in systems:
        row = system.rows[0]
        name = str(target_of(row))
        if row["source"] is not None:
            sample = system.sample(name, "cer")
            gain = cold[name].sample(name, "cer").rate - sample.rate if name in cold else None
            known = {"target": name, "source": row["source"], "similarity": row["similarity"], "own": row.get("own")}
            points.append(known | {"cer": sample.rate, "gain": gain, "by_seed": dict(zip(sample.runs, sample.per_seed, strict=True))})
    return points


def similarity_correlation(results: Results) -> Estimate | None:
    """Spearman's, of similarity and a low CER, both ranked within each language, so that hard languages do not count.

    The same few sources stand beside every language, so whole languages are drawn. `each` has the correlation of every seed that all have.
    """
    points = similarity_points(results)
    if len(points) <= 3:
        return None
    heard, targets = [point["similarity"] for point in points], [point["target"] for point in points]
    whole = correlation(heard, [-point["cer"] for point in points], targets, whole=True)
    seeds = [run for run in points[0]["by_seed"] if all(run in point["by_seed"] for point in points)]
    each = tuple(spearman(heard, [-point["by_seed"][run] for point in points], targets) for run in seeds)
    return replace(whole, each=each, num_seeds=len(seeds))


def _similarity(results: Results) -> str:
    points = sorted(similarity_points(results), key=lambda point: (point["target"], -point["similarity"]))
    heard = any(point["own"] is not None for point in points)  # as the language itself
    rows = []
    for point in points:
        row = [set_name(point["target"]), set_name(str(point["source"])), percent(point["similarity"], 2)]
        if heard:
            row.append("" if point["own"] is None else percent(point["own"], 2))
        rows.append([*row, percent(point["cer"]), "" if point["gain"] is None else percent(point["gain"])])
    found = similarity_correlation(results)
    told = ""
    if found is not None:
        interval = "" if found.low is None else f" (95 % interval {found.low:.2f} to {found.high:.2f})"
        languages = len({point["target"] for point in points})
        told = f" Within languages, rank correlation of similarity and a lower CER: {found.value:.2f}{interval}"
        told += f"; drawn are the {languages} languages."
    head = ["new language", "warm start from", "similarity, %", *(["heard as itself, %"] if heard else []), "CER", "points below cold"]
    part = "languages-similarity"
    return f"**Similarity against gain.**{told}\n\n{table(head, rows, left=2)}\n\n{source(results, part, targets_of(results, part))}"


def hours_points(results: Results) -> list[dict[str, Any]]:
    """One entry per way, language and amount."""
    systems = results.systems("languages-hours")
    points = []
    for system in systems.values():
        row = system.rows[0]
        name = str(target_of(row))
        points.append({"how": how_of(row), "target": name, "minutes": row["max_minutes"], "sample": system.sample(name, "cer")})
    order = {how: at for at, how in enumerate(EXPECTED)}
    return sorted(points, key=lambda point: (point["target"], order.get(point["how"], len(order)), point["minutes"]))


def _hours(results: Results) -> str:
    points = hours_points(results)
    amounts = sorted({point["minutes"] for point in points})
    rows = []
    for target, how in dict.fromkeys((point["target"], point["how"]) for point in points):
        cells = {point["minutes"]: rate_cell(point["sample"]) for point in points if (point["target"], point["how"]) == (target, how)}
        rows.append([set_name(target), how_name(how), *(cells.get(amount, "") for amount in amounts)])
    head = ["language", "", *(f"{amount:g} min" for amount in amounts)]
    part = "languages-hours"
    return f"**Minutes of speech.** CER in percent.\n\n{table(head, rows, left=2)}\n\n{source(results, part, targets_of(results, part))}"


def _tuning(results: Results) -> str:
    """What each learning rate came to on dev sets."""
    rows = []
    for row in results.rows("languages-tuning"):
        tried = sorted(row["rates"].items(), key=lambda pair: float(pair[0]))
        told = [f"{rate}: {percent(found['cer'])}" for rate, found in tried]
        best = min(range(len(tried)), key=lambda at: tried[at][1]["cer"])
        told[best] = f"**{told[best]}**"
        what = {"base": "the languages of the sources", "learnt": "six sets together", "new": "a new language"}[row["task"]]
        rows.append([row["kind"], what, "; ".join(told)])
    told_all = table(["kind", "trained on", "rate: CER"], rows, left=3)
    where = source(results, "languages-tuning", [])
    return f"**Learning rates.** Mean CER on dev clips after a short run; the bold one is taken.\n\n{told_all}\n\n{where}"


# ---- figures -----------------------------------------------------------------------------------------------------------


def figures(results: Results) -> list[Picture]:
    """Those that the runs are enough for."""
    made = []
    if "languages-interference" in results.parts:
        made.append(picture(results, "interference", "Error rates of six languages by the way they were trained", draw_interference))
        if any(forgetting(system) for system in ways(results, "languages-interference").values()):
            made.append(picture(results, "forgetting", "Error rates when a language was learned and at the end", draw_forgetting))
    if "languages-expansion" in results.parts:
        made.append(picture(results, "expansion", "Error rates of new languages by the way they were added", draw_expansion))
    if any(point["gain"] is not None for point in similarity_points(results)):
        made.append(picture(results, "similarity", "Similarity of a source against what starting from it gains", draw_similarity))
    if "languages-hours" in results.parts:
        made.append(picture(results, "hours", "Minutes of speech against error rate", draw_hours))
    return made


def draw_interference(results: Results) -> Figure:
    systems = ways(results, "languages-interference")
    figure = new_figure(9, 1.4 + 0.55 * len(systems))
    draw_rows(figure.subplots(), systems, base_sets(results), "base")
    return figure


def draw_forgetting(results: Results) -> Figure:
    """A line from when a language was learned to the end, a panel per way."""
    lost = {how: found for how, system in ways(results, "languages-interference").items() if (found := forgetting(system))}
    figure = new_figure(4 * len(lost) + 2, 4)
    axes = np.atleast_1d(figure.subplots(1, len(lost), sharey=True))
    names = base_sets(results)
    for axis, (how, found) in zip(axes, lost.items(), strict=True):
        for name, (learned, last, _) in found.items():
            axis.plot([0, 1], [100 * learned, 100 * last], "o-", color=f"C{names.index(name)}", label=set_name(name))
        axis.set_xticks([0, 1], ["when learned", "at the end"])
        axis.set_xlim(-0.25, 1.25)
        axis.set_title(how_name(how), fontsize=10)
        axis.grid(axis="y", color="0.93")
    axes[0].set_ylabel("CER in percent")
    axes[0].set_ylim(bottom=0)
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(shown.values(), shown.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_expansion(results: Results) -> Figure:
    systems = ways(results, "languages-expansion")
    figure = new_figure(9, 1.4 + 0.55 * len(systems))
    sets = targets_of(results, "languages-expansion")
    draw_rows(figure.subplots(), systems, sets, "base")
    return figure


def draw_similarity(results: Results) -> Figure:
    """A point per new language and source: what the base hears in the one of the other, and points of CER below the cold start."""
    points = [point for point in similarity_points(results) if point["gain"] is not None]
    figure = new_figure(7, 4.6)
    axis = figure.subplots()
    for number, target in enumerate(dict.fromkeys(point["target"] for point in points)):
        own = [point for point in points if point["target"] == target]
        heard, gains = [100 * point["similarity"] for point in own], [100 * point["gain"] for point in own]
        axis.plot(heard, gains, "o", color=f"C{number}", label=set_name(target))
        for point in own:
            at = (100 * point["similarity"], 100 * point["gain"])
            axis.annotate(set_name(point["source"]), at, (4, 3), textcoords="offset points", fontsize=7.5)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlim(-0.02, 200)
    found = similarity_correlation(results)
    if found is not None:
        axis.set_title(f"rank correlation within languages: {found.value:.2f}", fontsize=10)
    axis.set_xlabel("share of the new language's speech that the base takes for the source's, in percent")
    axis.set_ylabel("CER points below a cold start")
    axis.grid(color="0.93")
    axis.legend(fontsize=8)
    return figure


def draw_hours(results: Results) -> Figure:
    """Minutes against CER, a line per way, a panel per language."""
    points = hours_points(results)
    targets = list(dict.fromkeys(point["target"] for point in points))
    hows = list(dict.fromkeys(point["how"] for point in points))
    figure = new_figure(4.4 * len(targets) + 2, 4)
    axes = np.atleast_1d(figure.subplots(1, len(targets)))
    for axis, target in zip(axes, targets, strict=True):
        for number, how in enumerate(hows):
            own = [point for point in points if (point["target"], point["how"]) == (target, how)]
            if own:
                rates = [point["sample"].interval() for point in own]
                heights = [100 * rate.value for rate in rates]
                minutes = [point["minutes"] * 1.04 ** (number - 1.5) for point in own]  # side by side, so that bars can be told apart
                axis.errorbar(minutes, heights, yerr=error_bars(rates), marker="o", color=f"C{number}", label=how_name(how))
        amounts = sorted({point["minutes"] for point in points})
        axis.set_xscale("log")
        axis.set_xticks(amounts, [f"{amount:g}" for amount in amounts])
        axis.minorticks_off()
        axis.set_title(set_name(target), fontsize=11)
        axis.set_xlabel("minutes of speech in training")
        axis.grid(color="0.93")
    axes[0].set_ylabel("CER in percent, 95 % interval")
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(shown.values(), shown.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
