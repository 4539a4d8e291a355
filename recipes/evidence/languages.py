"""LoRA-Whisper (arXiv 2406.06619): one LoRA a language against one model for all, and new languages from near ones.

interference   six sets that the base has something to learn from, the same number of clips of each for every arm: one model or one LoRA
               for all, one after the other, a LoRA or an S2-LoRA each, a shared LoRA with a private one on top of it
expansion      a new language by full fine-tuning, cold, warm from the nearest or the farthest, stacked, as a mixture, as coefficients
               over a pool; and what that does to the old ones
similarity     a short warm start from each of the six, with the similarity that it goes with
hours          minutes of speech against error rate

Learning rates are tuned on dev sets for each kind of method, apart for the base languages and for a new one; warm, stacked and mixed
starts take the cold one's. Adapters to start from are those of the arm "per-language-lora" with the same seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import Item
from recipes.evidence.methods import Method, Trained, attach
from recipes.evidence.pools import POOL, POOL_METHOD, joint_pool, over_pool
from recipes.evidence.runs import Context, Run, Settings, measure_sets, train
from recipes.evidence.sources import (
    EXPANSION,
    FULL,
    LORA,
    PER_LANGUAGE,
    RATES,
    S2_LORA,
    begin,
    best_rate,
    card,
    is_small,
    language_of,
    learnt_sets,
    ranked_sources,
    save_adapter,
    similarity,
    source_adapter,
    steps,
    training_items,
    tuned,
    tuning_set,
)
from whisper_moe.comparison import Fingerprint, fingerprint
from whisper_moe.registry import AdapterSwitch, LanguageAdapter, load_folder
from whisper_moe.similarity import Similarity
from whisper_moe.starts import Start

PART = "languages"
INTERFERENCE = ("joint-full", "joint-lora", "per-language-lora", "sequential-full", "sequential-lora")
BEYOND_THE_PAPER = ("per-language-full", "shared-private", "per-language-s2")
KINDS = ("full", "cold", "warm-nearest", "warm-farthest", "stacked", "moe", "pool")
MORE_SETS = ("espeak-cy", "espeak-tr")
"""Further new languages, where espeak-ng speaks the others."""
WARM_SHARE = 0.25
"""Steps of a warm start in "similarity"."""
MINUTES = (2, 8, 30)
BY_MINUTES = ("cold", "warm-nearest", "pool", "full")
NUM_TEST = {"child": 60, "kichwa": 120}
"""Test clips; of other sets `FEW`."""
FEW = 40
OLD_TEST = 24
"""Clips of each old language after a new one was learnt by full fine-tuning."""
UNCHANGED_CLIPS = 3
"""Of each old language that is compared bit for bit."""


# ---- the runs ----------------------------------------------------------------------------------------------------------


def runs(settings: Settings) -> list[Run]:
    """Tuning; all seeds of interference and of expansion; one seed of what else there is, then the other seeds of that."""
    seeds = list(range(1 if settings.smoke else settings.seeds))
    names, minutes, sources = by_minutes_sets(settings), list(MINUTES), list(settings.base_sets)
    others = [name for name in settings.new_sets if name not in names]
    if settings.smoke:  # a run of every kind
        names, others, minutes, sources = names[:1], [], minutes[-1:], sources[:1]
    made = [_tuning("lora", "learnt"), _tuning("full", "learnt")]
    made += [Run(f"{PART}-interference", "base", 0, partial(base, new=False))]
    made += [_interference(arm, seed) for seed in seeds for arm in INTERFERENCE]
    made += [_tuning("lora", "base"), *(_tuning(kind, "new") for kind in ("lora", "full", "pool"))]
    made += [Run(f"{PART}-expansion", "base", 0, partial(base, new=True))]
    made += [_expansion(name, kind, seed) for seed in seeds for name in names for kind in KINDS]
    made += [_tuning("s2lora", "learnt")]
    made += [_interference(arm, seed) for seed in seeds for arm in BEYOND_THE_PAPER]
    made += [_expansion(name, kind, seed) for seed in seeds for name in others for kind in KINDS]
    made += [_tuning("s2lora", "new")]  # for the part `beyond`
    for seed in seeds:
        made += [_similarity(name, source, seed) for name in [*names, *others] for source in (None, *sources)]
        made += [_hours(name, kind, most, seed) for name in names for most in minutes for kind in BY_MINUTES]
    made += [_expansion(name, kind, seed) for seed in seeds for name in more_sets(settings) for kind in KINDS]
    return made


def _tuning(kind: str, task: str) -> Run:
    return Run(f"{PART}-tuning", f"{kind}-{task}", 0, partial(tuning, kind=kind, task=task))


def _interference(arm: str, seed: int) -> Run:
    return Run(f"{PART}-interference", arm, seed, partial(interference, arm=arm, seed=seed))


def _expansion(name: str, kind: str, seed: int) -> Run:
    return Run(f"{PART}-expansion", f"{name}-{kind}", seed, partial(expansion, name=name, kind=kind, seed=seed))


def _similarity(name: str, source: str | None, seed: int) -> Run:
    arm = f"{name}-cold" if source is None else f"{name}-from-{source}"
    return Run(f"{PART}-similarity", arm, seed, partial(from_source, name=name, source=source, seed=seed))


def _hours(name: str, kind: str, minutes: int, seed: int) -> Run:
    return Run(f"{PART}-hours", f"{name}-{kind}-{minutes}min", seed, partial(by_minutes, name=name, kind=kind, minutes=minutes, seed=seed))


def by_minutes_sets(settings: Settings) -> list[str]:
    """The recorded new language, and the first that a synthesizer speaks."""
    return list(dict.fromkeys((settings.new_sets[0], tuning_set(settings))))


def more_sets(settings: Settings) -> tuple[str, ...]:
    return MORE_SETS if is_small(settings) and not settings.smoke else ()


def tested(context: Context, name: str, most: int | None = None) -> list[Item]:  # noqa: PT028
    """A set to test on; the same clips for all runs of a part."""
    limit = context.settings.test_clips
    if is_small(context.settings):
        limit = min(limit, NUM_TEST.get(name, FEW) if most is None else most)
    return context.ground.items(name, "test", limit)


def new_items(context: Context, name: str, seed: int, minutes: float | None = None) -> list[Item]:
    """Of a new language: so many minutes, or what the expansion takes: the most of `MINUTES`, and at full size all there is."""
    most = max(MINUTES) if is_small(context.settings) else None
    return training_items(context, name, most if minutes is None else minutes, seed)


def learnt_tests(context: Context) -> dict[str, list[Item]]:
    return {name: tested(context, name) for name in learnt_sets(context.settings)}


def old_tests(context: Context) -> dict[str, list[Item]]:
    """Fewer clips of the same sets."""
    return {name: tested(context, name, OLD_TEST) for name in context.settings.base_sets}


def base(context: Context, new: bool) -> dict[str, Any]:
    """The base as it is."""
    sets = learnt_tests(context)
    if new:
        settings = context.settings
        names = by_minutes_sets(settings)[:1] if settings.smoke else (*settings.new_sets, *more_sets(settings))
        sets = {name: tested(context, name) for name in names} | old_tests(context)
    return {"method": Method("none").to_dict(), "sets": measure_sets(context, context.ground.base, sets)}


def tuning(context: Context, kind: str, task: str) -> dict[str, Any]:
    """Learning rates of a kind of method, each tried by a short run."""
    return {"kind": kind, "task": task, "tried": RATES[kind], "rates": tuned(context, kind, task), "chosen": best_rate(context, kind, task)}


# ---- interference ------------------------------------------------------------------------------------------------------


def interference(context: Context, arm: str, seed: int) -> dict[str, Any]:
    """The learnt sets by one way of training."""
    if arm.startswith("joint"):
        return joint(context, method_for(context, arm), seed)
    if arm.startswith("sequential"):
        return sequential(context, method_for(context, arm), seed)
    if arm in ("per-language-full", "per-language-s2"):
        return each_alone(context, method_for(context, arm), seed)
    return {"per-language-lora": per_language_lora, "shared-private": shared_private}[arm](context, seed)


def method_for(context: Context, arm: str) -> Method:
    method = {"full": FULL, "lora": LORA, "s2": S2_LORA}[arm.rpartition("-")[2]]
    return method.with_rate(best_rate(context, method.kind, "learnt"))


def joint(context: Context, method: Method, seed: int) -> dict[str, Any]:
    """One model for all languages, which are mixed in every batch."""
    names = learnt_sets(context.settings)
    schedule = Schedule(len(names) * steps(context.settings, PER_LANGUAGE), context.settings.batch_size, seed=seed)
    trained, row = train(context, method, [training_items(context, name) for name in names], schedule)
    row["sets"] = measure_sets(context, trained.model, learnt_tests(context))
    return row


def sequence(names: Sequence[str], seed: int) -> list[str]:
    """The order in which languages are learnt: each seed begins with another one."""
    return [*names[seed % len(names) :], *names[: seed % len(names)]]


def sequential(context: Context, method: Method, seed: int) -> dict[str, Any]:
    """One model, languages one after the other. `stages` says how each fared when it had just been learnt."""
    order, tests = sequence(learnt_sets(context.settings), seed), learnt_tests(context)
    num_steps = steps(context.settings, PER_LANGUAGE)
    decoder_only = context.ground.frozen_encoder
    trained = attach(context.ground.fresh(), method, decoder_only=decoder_only, num_steps=num_steps * len(order), seed=seed)
    rows, stages = [], {}
    for name in order:
        schedule = Schedule(num_steps, context.settings.batch_size, seed=seed)
        trained, row = train(context, method, [training_items(context, name)], schedule, trained=trained)
        rows.append(row)
        if name != order[-1]:
            stages[name] = measure_sets(context, trained.model, {name: tests[name]})[name]
    sets = measure_sets(context, trained.model, tests)
    stages[order[-1]] = sets[order[-1]]
    errors = {name: {key: stages[name][key] for key in ("wer", "cer", "word_errors", "char_errors")} for name in order}
    return together(rows) | {"order": order, "stages": errors, "sets": sets}


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several trainings as one row: times and clips add up, the rest is the last one's."""
    return {
        **rows[-1],
        "clips": [count for row in rows for count in row["clips"]],
        "minutes": [minutes for row in rows for minutes in row["minutes"]],
        "train_s": round(sum(row["train_s"] for row in rows), 1),
        "trainings": len(rows),
    }


def per_language_lora(context: Context, seed: int) -> dict[str, Any]:
    """LoRA-Whisper: each language is written with its own."""
    sets: dict[str, Any] = {}
    rows, num_bytes = [], 0
    for name in learnt_sets(context.settings):
        folder = source_adapter(context, name, seed)
        model = load_folder(context.ground.fresh(), folder).eval()
        sets |= measure_sets(context, model, {name: tested(context, name)})
        said = LanguageAdapter.load(folder)
        items, training = training_items(context, name), card(folder)["training"]
        num_bytes = said.num_bytes
        rows.append(training | {"clips": [len(items)], "minutes": [_minutes(items)], "num_trained": said.num_parameters})
    return together(rows) | {"num_bytes": num_bytes, "sets": sets}


def _minutes(items: Sequence[Item]) -> float:
    return round(sum(item.seconds for item in items) / 60, 2)


def each_alone(context: Context, method: Method, seed: int) -> dict[str, Any]:
    """Every language has a model, or an S2-LoRA, of its own."""
    sets: dict[str, Any] = {}
    rows = []
    for name in learnt_sets(context.settings):
        schedule = Schedule(steps(context.settings, PER_LANGUAGE), context.settings.batch_size, seed=seed)
        trained, row = train(context, method, [training_items(context, name)], schedule)
        sets |= measure_sets(context, trained.model, {name: tested(context, name)})
        rows.append(row)
    return together(rows) | {"sets": sets}


def shared_private(context: Context, seed: int) -> dict[str, Any]:
    """Half of the steps for a LoRA that all languages share, half for one on top of it that each has for itself."""
    names, rate = learnt_sets(context.settings), best_rate(context, "lora", "learnt")
    whole = steps(context.settings, PER_LANGUAGE)
    half = max(1, whole // 2)
    method = LORA.with_rate(rate)

    def make(folder: Path) -> None:
        start, begun = begin(context, "cold", rate=rate, seed=seed)
        items = [training_items(context, name) for name in names]
        trained, row = train(context, method, items, Schedule(len(names) * half, context.settings.batch_size, seed=seed), trained=begun)
        # Its language is the first one's: a folder has to name one, and a stacked start from a single candidate does not look at it.
        save_adapter(context, start, trained.model, folder, "shared", items[0][0], row)

    shared = context.artifact(f"shared-s{seed}", make)
    sets: dict[str, Any] = {}
    rows, num_bytes = [], 0
    for name in names:
        start, begun = begin(context, "stacked", [shared], rate=rate, seed=seed)
        schedule = Schedule(max(1, whole - half), context.settings.batch_size, seed=seed)
        trained, row = train(context, method, [training_items(context, name)], schedule, trained=begun)
        num_bytes = finished_bytes(context, start, trained)
        sets |= measure_sets(context, trained.model, {name: tested(context, name)})
        rows.append(row)
    row = together(rows)
    shared_s = card(shared)["training"]["train_s"]
    return row | {"num_bytes": num_bytes, "train_s": round(row["train_s"] + shared_s, 1), "shared_train_s": shared_s, "sets": sets}


def finished_bytes(context: Context, start: Start, trained: Trained) -> int:
    """Of the weights as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        start.finish(trained.model, folder, context.ground.name)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


# ---- expansion ---------------------------------------------------------------------------------------------------------


def expansion(context: Context, name: str, kind: str, seed: int, minutes: float | None = None) -> dict[str, Any]:
    """A new language, all minutes of it or some; with full fine-tuning the old ones' error rates too.

    `old_languages` says what differs, bit for bit, in what an old language's model answers after the new adapter was used.
    """
    items = new_items(context, name, seed, minutes)
    trained, row = fitted(
        context, name, kind, items, Schedule(steps(context.settings, EXPANSION), context.settings.batch_size, seed=seed), seed
    )
    tests = {name: tested(context, name)}
    if kind == "full" and minutes is None:
        tests |= old_tests(context)
    row["sets"] = measure_sets(context, trained.model, tests)
    return row


def fitted(context: Context, name: str, kind: str, items: list[Item], schedule: Schedule, seed: int) -> tuple[Trained, dict[str, Any]]:
    """A new language learnt in one of `KINDS`: the model, and what a row says of it."""
    told: dict[str, Any] = {"language": language_of(context, name), "kind": kind}
    if kind == "full":
        method = FULL.with_rate(best_rate(context, "full", "new"))
        trained, row = train(context, method, [items], schedule)
        return trained, row | told | unchanged(context, None, trained.model, name, seed)
    if kind == "pool":
        method = POOL_METHOD.with_rate(best_rate(context, "pool", "new"))
        trained = over_pool(context, joint_pool(context), method, seed)
        trained, row = train(context, method, [items], schedule, trained=trained)
        return trained, row | told | {"pool": POOL.name} | unchanged(context, None, trained.model, name, seed)
    shares = ranked_sources(context, name)
    return from_sources(context, name, kind, shares, items, schedule, seed, told)


def from_sources(
    context: Context,
    name: str,
    kind: str,
    shares: Mapping[str, float],
    items: list[Item],
    schedule: Schedule,
    seed: int,
    told: dict[str, Any],
) -> tuple[Trained, dict[str, Any]]:
    """A LoRA that starts cold, warm, stacked or as a mixture; sources with their similarity, the nearest first."""
    rate = best_rate(context, "lora", "new")
    heard: Similarity | None = None if kind == "cold" else similarity(context, name)
    chosen = {"cold": [], "warm-farthest": list(shares)[-1:]}.get(kind, list(shares))
    candidates = [source_adapter(context, each, seed) for each in chosen]
    start, trained = begin(context, kind.partition("-")[0], candidates, heard, rate=rate, seed=seed)
    trained, row = train(context, LORA.with_rate(rate), [items], schedule, trained=trained)
    used = [source.name for source in start.sources]
    told = told | {"sources": used, "similarity": {each: round(share, 5) for each, share in shares.items()}}
    told["num_bytes"] = finished_bytes(context, start, trained)
    return trained, row | told | unchanged(context, start, trained.model, name, seed, items[0], row)


def unchanged(
    context: Context, start: Start | None, model: Any, name: str, seed: int, item: Item | None = None, row: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Old languages before and after a new one was learnt and used, once for each way and language.

    Two of them: one that the base writes alone, and one with its own LoRA. An adapter that has a folder is attached beside that LoRA as
    the transcriber does it; a model that was trained as a whole, or over a pool, is asked without its adapter.
    """
    if seed != 0 or context.ground.rehearsal is not None:
        return {}
    return {"old_languages": old_languages(context, start, model, name, item, row)}


def old_languages(
    context: Context, start: Start | None, model: Any, name: str, item: Item | None, row: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    from whisper_moe.languages import adapters_off

    alone, with_own = context.settings.base_sets[1], context.settings.base_sets[-1]
    clips = {each: context.ground.data.clips(each, "test", UNCHANGED_CLIPS) for each in (alone, with_own)}

    def asked(model: Any, each: str) -> Fingerprint:
        prompt = context.ground.data.source(each).prompt or language_of(context, each)
        return fingerprint(model, context.ground.processor, clips[each], prompt_language=prompt)

    if start is None:
        before = asked(context.ground.fresh(), alone)
        with adapters_off(model):
            return {alone: before.differing(asked(model, alone))}
    assert item is not None  # given with the start, as the row
    assert row is not None
    switch, own = AdapterSwitch(context.ground.fresh()), LanguageAdapter.load(source_adapter(context, with_own, 0))
    with tempfile.TemporaryDirectory() as folder:
        new = save_adapter(context, start, model, Path(folder) / "new", f"new-{name}", item, row)

        def answers() -> dict[str, Fingerprint]:
            found = {}
            for each, adapter in ((alone, None), (with_own, own)):
                with switch.active(adapter) as active:
                    found[each] = asked(active, each)
            return found

        before_both = answers()
        with switch.active(new) as active:
            asked(active, alone)
        after = answers()
    return {each: before_both[each].differing(after[each]) for each in after}


# ---- similarity and minutes --------------------------------------------------------------------------------------------


def from_source(context: Context, name: str, source: str | None, seed: int) -> dict[str, Any]:
    """A short warm start from one source, or none."""
    items = new_items(context, name, seed)
    schedule = Schedule(steps(context.settings, WARM_SHARE), context.settings.batch_size, seed=seed)
    rate, method = best_rate(context, "lora", "new"), LORA
    candidates = [] if source is None else [source_adapter(context, source, seed)]
    _, trained = begin(context, "cold" if source is None else "warm", candidates, rate=rate, seed=seed)
    trained, row = train(context, method.with_rate(rate), [items], schedule, trained=trained)
    row |= {"language": language_of(context, name), "source": source}
    row["similarity"] = None if source is None else round(ranked_sources(context, name)[source], 5)
    row["own"] = similarity(context, name).own
    row["sets"] = measure_sets(context, trained.model, {name: tested(context, name)})
    return row


def by_minutes(context: Context, name: str, kind: str, minutes: int, seed: int) -> dict[str, Any]:
    """A new language with so many minutes; the run with all of them is that of the expansion."""
    same = minutes == max(MINUTES) and is_small(context.settings)
    done = context.store.read(f"{PART}-expansion/{name}-{kind}-s{seed}") if same else None
    row = expansion(context, name, kind, seed, minutes) if done is None else done
    return row | {"max_minutes": minutes, "sets": {name: row["sets"][name]}}
