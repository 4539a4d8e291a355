"""S2-LoRA on child speech (arXiv 2309.11756): its claims against full fine-tuning, BitFit, LoRA, AdaLoRA and VeRA.

Trained on recordings of children, measured on other children (in domain) and on adults who do the same task, another English
speaker, and German (to a base that was trained on those, what is kept of them), and where settings ask for it on voices of a synthesizer
that its decoder has not met. Every method gets the best of four learning rates, chosen on the dev set by a shorter run with a seed of its
own. The encoder is frozen on the own decoder (docs/evidence.md), and the methods work in the decoder.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import Item
from recipes.evidence.methods import ATTENTION, Method
from recipes.evidence.runs import Context, Run, Settings, measure_sets, train

PART = "child"
IN_DOMAIN, OUT_OF_DOMAIN = "child", Settings.out_of_domain
TUNING_SEED = 100

METHODS: dict[str, Method] = {
    "full": Method("full"),
    "bitfit": Method("bitfit"),
    "lora-r8": Method("lora", rank=8),
    "lora-r1": Method("lora", rank=1),
    "adalora-r8": Method("adalora", rank=8),
    "adalora-r2": Method("adalora", rank=2),
    "vera-r256": Method("vera", rank=256),
    "s2-r32": Method("s2lora", rank=32),
    "s2-r8": Method("s2lora", rank=8),
    "s2-r64": Method("s2lora", rank=64),
    "s2-r32-attention": Method("s2lora", rank=32, modules=ATTENTION),
    "s2-r8-attention": Method("s2lora", rank=8, modules=ATTENTION),
    "s2-r32-by-type": Method("s2lora", rank=32, scope="module_type"),
    "s2-r32-global": Method("s2lora", rank=32, scope="global"),
    "s2-r32-sparse-0.1": Method("s2lora", rank=32, sparsity=0.1),
    "s2-r32-sparse-0.3": Method("s2lora", rank=32, sparsity=0.3),
}
"""Arm -> method, without its learning rate. Small budgets, though not equal ones, are those of lora-r1, adalora-r2, bitfit, vera-r256
and the S2-LoRA of few directions; the page sorts arms by the bytes that are kept."""

SLOWER = {"lora-r8-slower": "lora-r8", "s2-r32-slower": "s2-r32"}
"""Arm -> the arm that it repeats with the next lower learning rate: what the children gain by a rate, the others may pay for."""

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
    "adalora": (1.5e-3, 5e-3, 1.5e-2, 5e-2),
    "vera": (1e-3, 3e-3, 1e-2, 3e-2),
    "s2lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
    "sparse-s2lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
}
"""Kind -> the rates that are tried. A sparse S2-LoRA keeps its directions at length one, so that a rate is another thing to it."""
TUNED_BY = {
    "full": "full",
    "bitfit": "bitfit",
    "lora": "lora-r8",
    "adalora": "adalora-r8",
    "vera": "vera-r256",
    "s2lora": "s2-r32",
    "sparse-s2lora": "s2-r32-sparse-0.3",
}
"""Kind -> the arm whose tuning speaks for all arms of the kind."""
MINUTES = (5, 25)
"""Of training speech, for the arms of `BY_AMOUNT`; the others get all of it."""
BY_AMOUNT = ("full", "lora-r8", "s2-r32")


def tuned_as(method: Method) -> str:
    """The kind whose learning rates a method is given: a key of `LEARNING_RATES`."""
    return "sparse-s2lora" if method.kind == "s2lora" and method.sparsity else method.kind


def training_items(context: Context, minutes: float | None = None) -> list[Item]:
    """Child speech to train on, all or so many minutes of it (whole speakers' clips, in the order of the set)."""
    items = context.ground.items("child", "train", 8 if context.settings.smoke else None)
    if minutes is None:
        return items
    # One clip of each speaker in turn, so that a few minutes are of many children.
    by_speaker: dict[str | None, list[Item]] = {}
    for item in items:
        by_speaker.setdefault(item.speaker, []).append(item)
    turns = [each[turn] for turn in range(max(map(len, by_speaker.values()))) for each in by_speaker.values() if turn < len(each)]
    chosen, seconds = [], 0.0
    for item in turns:
        if seconds >= 60 * minutes:
            break
        chosen.append(item)
        seconds += item.seconds
    return chosen


def test_sets(context: Context) -> dict[str, list[Item]]:
    return {name: context.test(name) for name in (IN_DOMAIN, *context.settings.out_of_domain)}


def schedule(settings: Settings, seed: int, share: float = 1.0) -> Schedule:
    return Schedule(num_steps=max(2, round(settings.num_steps * share)), batch_size=settings.batch_size, seed=seed)


# ---- the runs ----------------------------------------------------------------------------------------------------------


def runs(settings: Settings) -> list[Run]:
    """The base, the tuning, then all arms seed by seed."""
    seeds = range(1 if settings.smoke else settings.seeds)
    arms = ["full", "lora-r8", "s2-r32-sparse-0.1"] if settings.smoke else [*METHODS, *SLOWER]
    made = [Run(PART, "base", 0, base)]
    if not settings.smoke:
        for kind, rates in LEARNING_RATES.items():
            made += [Run(f"{PART}-tuning", f"{kind}-{rate:g}", TUNING_SEED, partial(tuning, kind=kind, rate=rate)) for rate in rates]
    for seed in seeds:
        made += [Run(PART, arm, seed, partial(trained_arm, arm=arm, seed=seed)) for arm in arms]
    if not settings.smoke:
        for seed in seeds:
            for minutes in MINUTES:
                made += [
                    Run(f"{PART}-amount", f"{arm}-{minutes}min", seed, partial(trained_arm, arm=arm, seed=seed, minutes=minutes))
                    for arm in BY_AMOUNT
                ]
    return made


def base(context: Context) -> dict[str, Any]:
    """The base as it is."""
    return {"method": Method("none").to_dict(), "sets": measure_sets(context, context.ground.base, test_sets(context))}


def tuning(context: Context, kind: str, rate: float) -> dict[str, Any]:
    """Half a run with one learning rate, measured on the dev set."""
    method = METHODS[TUNED_BY[kind]].with_rate(rate)
    trained, row = train(context, method, [training_items(context)], schedule(context.settings, TUNING_SEED, 0.5))
    row["sets"] = measure_sets(context, trained.model, {"child-dev": context.ground.items("child", "dev")})
    return row


def best_rate(context: Context, kind: str) -> float:
    """The learning rate with the fewest wrong words on the dev set: words are what the results compare. The middle one where nothing was
    tuned.

    Raises:
        ValueError: Some of the tuning has not been done.
    """
    rates = LEARNING_RATES[kind]
    if context.settings.smoke:
        return rates[len(rates) // 2]
    found = {rate: context.store.waited(f"{PART}-tuning/{kind}-{rate:g}-s{TUNING_SEED}") for rate in rates}
    missing = [rate for rate, row in found.items() if row is None]
    if missing:
        raise ValueError(f"The learning rates {missing} of {kind} have not been tried. Run --parts {PART} from its beginning.")
    return min(rates, key=lambda rate: (found[rate] or {})["sets"]["child-dev"]["wer"])


def trained_arm(context: Context, arm: str, seed: int, minutes: float | None = None) -> dict[str, Any]:
    """One method, trained and measured on every set."""
    method = METHODS[SLOWER.get(arm, arm)]
    kind = tuned_as(method)
    rates, best = LEARNING_RATES[kind], best_rate(context, kind)
    method = method.with_rate(rates[max(0, rates.index(best) - 1)] if arm in SLOWER else best)
    tests = test_sets(context)  # what is missing is missed before hours of training
    trained, row = train(context, method, [training_items(context, minutes)], schedule(context.settings, seed))
    row["sets"] = measure_sets(context, trained.model, tests)
    return row
