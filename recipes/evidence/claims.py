"""The claims of the two papers, what came out here, and a verdict by a rule that is the same for all claims of its kind.

A claim names the paper's figure and where it stands; what it came to here is computed from committed results and never typed. A check
looks at one results file and gives a `Finding`; it raises `Missing` where the runs that it needs have not been made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from recipes.evidence import beyond_report, child_report, languages_report
from recipes.evidence.child_report import S2_ARM, system_name
from recipes.evidence.child_speech import IN_DOMAIN
from recipes.evidence.comparing import LEVEL, Estimate, Results, System, common_sets, difference, mean_difference, mean_rate, weighted
from recipes.evidence.tables import bytes_cell, estimate_cell, how_name, percent, set_name, targets_of, ways
from recipes.evidence.tables import table as markdown

TINY_SHARE = 0.0002
"""Of the model's numbers, with which the paper is reported to adapt."""
ADALORA, LORA, FULL = "adalora-r8", "lora-r8", "full"
MARGIN = 0.1
"""Of what a reference gained over the base: what a method that is comparable may be short of it."""
MUCH_FEWER = 0.5
"""Share of the other's kept bytes up to which a method has "much fewer"."""
WHISPER_SMALL = {"d_model": 768, "layers": 12, "ffn": 3072, "parameters": 241_734_912}

HOLDS, DIRECTION, UNDECIDED, FAILS = "**holds**", "direction only", "undecided", "**does not hold**"
ARITHMETIC, UNTESTED = "arithmetic", "not testable here"
RULES = {
    "A": f"lower error rate: holds if the difference on the same clips is above 0, its {LEVEL:.0%} interval leaves 0 out, and it is "
    "above 0 in every seed (every pair of equal seeds where both sides have the same ones, else every combination), of which both sides "
    "have at least two; direction only if it is above 0 in every seed; undecided if its mean is above 0 and seeds disagree; does not "
    "hold if its mean is 0 or below. The base is not trained and has no seeds",
    "B": f"comparable: as A, of what is left when the loss is taken from a margin: {MARGIN:.0%} of what the other gained over the base "
    "on these clips. Not testable where the other is not surely better than the base. Where the claim is one of fewer numbers too, the "
    f"bytes that are kept have to be at most {MUCH_FEWER:.0%} of the other's, else it does not hold",
    "C": "alike: as A, of a rank correlation. Where few languages or the same sources stand behind it, direction only at most",
    "D": "always: holds if it is so in every run that looked; does not hold otherwise",
    "E": f"sometimes: as A for each language, at a level of 1 - {1 - LEVEL:.2f} / their number (Bonferroni); the best verdict of any is "
    "taken, and it does not hold only if the mean of none is above 0",
    "F": "counted: a number computed for whisper-small is set beside the paper's. It takes no run, and confirms a formula, not a claim",
}


class Missing(ValueError):
    """The runs that a claim needs are not there."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    here: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One thing that a paper says, and how it is judged."""

    claim: str
    paper: str
    """Its figure, and where it stands."""
    rule: str
    """A letter of `RULES`."""
    part: str
    """The results that it is judged by."""
    check: Callable[[Results], Finding]
    why_not: str = "no such runs have been committed"
    """Where there are none."""


# ---- rules -------------------------------------------------------------------------------------------------------------


def lower(found: Estimate) -> str:
    """Rule A, and C."""
    if not np.isfinite(found.value):
        raise Missing("one of the two does not vary")
    if found.value <= 0:
        return FAILS
    if not found.above_in_each:
        return UNDECIDED
    return HOLDS if found.sure and found.num_seeds >= 2 else DIRECTION


def comparable(gain: Estimate, slack: Estimate, share: float = 0.0) -> str:
    """Rule B.

    Args:
        gain: of the reference over the base.
        slack: margin less loss.
        share: of the reference's kept bytes, where fewer are claimed.
    """
    if not (gain.value > 0 and gain.sure and gain.above_in_each):
        raise Missing("what it is compared with is not surely better than the base")
    return FAILS if share > MUCH_FEWER else lower(slack)


def slack(base: System, reference: System, other: System, sets: Sequence[str], rate: str = "cer") -> Estimate:
    """Margin less loss: MARGIN (base - reference) - (other - reference)."""
    return weighted([(MARGIN, base), (1 - MARGIN, reference), (-1, other)], sets, rate)


def as_good(base: System | None, reference: System, other: System, sets: Sequence[str], rate: str = "cer", share: float = 0.0) -> str:
    """Rule B on systems. Raises `Missing` where the base was not measured on these clips, or the reference is not better."""
    if base is None:
        raise Missing("the base has not been measured on these clips")
    return comparable(mean_difference(base, reference, sets, rate), slack(base, reference, other, sets, rate), share)


def gained(base: System | None, system: System, sets: Sequence[str], rate: str = "cer") -> str:
    return "" if base is None else f", which is {points(mean_difference(base, system, sets, rate))} below the base"


def kept_share(one: System, other: System) -> float:
    """Of the bytes that are kept of the other."""
    return (one.mean("num_bytes") or 0) / (other.mean("num_bytes") or 1)


def always(good: int, looked: int) -> str:
    """Rule D."""
    if not looked:
        raise Missing("no run has looked")
    return HOLDS if good == looked else FAILS


def sometimes(found: Sequence[Estimate]) -> str:
    """Rule E; each estimate is above 0 where the claim is right, and has the corrected level."""
    verdicts = [lower(each) for each in found]
    return next(verdict for verdict in (HOLDS, DIRECTION, UNDECIDED, FAILS) if verdict in verdicts)


def at_most_direction(verdict: str) -> str:
    return DIRECTION if verdict == HOLDS else verdict


def points(found: Estimate) -> str:
    return f"{estimate_cell(found)} points"


def systems(found: dict[str, System], *names: str) -> list[System]:
    """Those of the names. Raises `Missing` with what is not there."""
    absent = [name for name in names if name not in found]
    if absent:
        raise Missing(f"not run: {', '.join(absent)}")
    return [found[name] for name in names]


def _some(names: list[str]) -> list[str]:
    """The names. Raises `Missing` if there are none."""
    if not names:
        raise Missing("the runs have no language in common")
    return names


# ---- S2-LoRA -----------------------------------------------------------------------------------------------------------


def _share(system: System, results: Results) -> str:
    share = 100 * (system.mean("num_trained") or 0) / results.base_parameters
    return f"{share:.3f} %" if share < 1 else f"{share:.1f} %"


def small_set_is_enough(results: Results) -> Finding:
    base, full, lora = systems(child_report.child_systems(results), "base", FULL, LORA)
    below, rate, share = difference(full, lora, IN_DOMAIN), full.sample(IN_DOMAIN).rate, kept_share(lora, full)
    here = (
        f"{system_name(lora)} trains {_share(lora, results)}, keeps {share:.0%} of the bytes and is {points(below)} below full fine-tuning "
    )
    here += f"({percent(rate)} % WER{gained(base, full, [IN_DOMAIN], 'wer')})"
    return Finding(here, as_good(base, full, lora, [IN_DOMAIN], "wer", share))


def coefficients_are_good(results: Results) -> Finding:
    lora, adalora = systems(child_report.child_systems(results), LORA, ADALORA)
    found = difference(lora, adalora, IN_DOMAIN)
    return Finding(f"AdaLoRA is {points(found)} of WER below LoRA of the same rank in domain", lower(found))


def in_domain_like_adalora(results: Results) -> Finding:
    found = child_report.child_systems(results)
    base, adalora, s2 = systems(found, "base", ADALORA, S2_ARM)
    below, rate, share = difference(adalora, s2, IN_DOMAIN), adalora.sample(IN_DOMAIN).rate, kept_share(s2, adalora)
    here = f"{system_name(s2)} is {points(below)} below {system_name(adalora)} ({percent(rate)} % WER"
    here += f"{gained(base, adalora, [IN_DOMAIN], 'wer')}), with {share:.0%} of its kept bytes"
    verdict = as_good(base, adalora, s2, [IN_DOMAIN], "wer", share)
    others = [each for each in found.values() if each.rows[0]["method"]["kind"] == "s2lora"]  # the fewest bytes first
    smallest = next((each for each in others if as_good(base, adalora, each, [IN_DOMAIN], "wer") == HOLDS), None)
    told = "none" if smallest is None else f"{system_name(smallest)}, {kept_share(smallest, adalora):.0%} of the bytes"
    return Finding(f"{here}. Exploratory, the smallest S2-LoRA that is comparable by B: {told}", verdict)


def better_out_of_domain(results: Results, than: str = ADALORA) -> Finding:
    found, others = child_report.child_systems(results), _some(child_report.out_of_domain(results))
    other, s2 = systems(found, than, S2_ARM)
    below = mean_difference(other, s2, others, "wer")
    each = ", ".join(f"{set_name(name)} {percent(difference(other, s2, name).value)}" for name in others)
    number = "one set" if len(others) == 1 else f"the mean of {len(others)} sets"
    here = f"{system_name(s2)} is {points(below)} of WER below {system_name(other)} on {number} ({each})"
    if "base" in found:
        rates = {arm: mean_rate(found[arm], others, "wer").value for arm in ("base", S2_ARM, than)}
        own = ", ".join(f"{set_name(name)} {percent(found['base'].sample(name).rate)}" for name in others)
        here += f"; WER {percent(rates[S2_ARM])} against {percent(rates[than])}, of the base {percent(rates['base'])} ({own})"
    gains = "base" in found and mean_difference(found["base"], s2, others, "wer").value > 0
    kept = "" if gains else ". Adapting gains nothing there: this is what is kept, not how it generalises"
    told = child_report.others_are(results, others)
    return Finding(f"{told[:1].upper()}{told[1:]}. {here}{kept}", lower(below))


def s2_share_of_small() -> float:
    """Trained share of whisper-small with one pair of rank 32 for all attention matrices: r (d + d) + r M."""
    width, layers = WHISPER_SMALL["d_model"], WHISPER_SMALL["layers"]
    weights = 4 * layers + 8 * layers  # of the encoder; of the decoder, which attends twice
    return 32 * (2 * width + weights) / WHISPER_SMALL["parameters"]


def tiny_arm(results: Results) -> System:
    """The S2-LoRA whose share of the model is nearest to the paper's."""
    found = [each for each in child_report.child_systems(results).values() if each.rows[0]["method"]["kind"] == "s2lora"]
    if not found:
        raise Missing("no S2-LoRA has been run")
    return min(found, key=lambda each: abs(np.log((each.mean("num_trained") or 1) / results.base_parameters / TINY_SHARE)))


def tiny_adapters_learn(results: Results) -> Finding:
    base, adalora = systems(child_report.child_systems(results), "base", ADALORA)
    tiny = tiny_arm(results)
    here = (
        f"{system_name(tiny)}: {_share(tiny, results)} of this base (of rank 32 it would be {s2_share_of_small():.3%} of whisper-small); "
    )
    here += f"{points(difference(base, tiny, IN_DOMAIN))} of WER below the base, {points(difference(adalora, tiny, IN_DOMAIN))} below "
    here += f"{system_name(adalora)}{gained(base, adalora, [IN_DOMAIN], 'wer')}"
    return Finding(here, as_good(base, adalora, tiny, [IN_DOMAIN], "wer"))


def ranks_alike(results: Results) -> Finding:
    sides, found = child_report.rank_sides(results), child_report.rank_correlation(results)
    if sides is None or found is None:
        raise Missing("a sparse S2-LoRA and AdaLoRA have not both been run")
    verdict = lower(found)
    span = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    return Finding(
        f"rank correlation within weights of one shape {found.value:.2f}{span}, {system_name(sides[0])} and {system_name(sides[1])}",
        verdict,
    )


def values_before_queries(results: Results) -> Finding:
    """Mean rank of v and o less that of q and k, an attention block being the unit."""
    sides = child_report.rank_sides(results)
    if sides is None:
        raise Missing("a sparse S2-LoRA and AdaLoRA have not both been run")
    ranks = child_report.mean_ranks(sides[0])
    blocks = sorted({module.rpartition(".")[0] for module in ranks if module.endswith("q_proj")})
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    if not all(f"{block}.{name}" in ranks for block in blocks for name in names):
        raise Missing("not all attention matrices are adapted")

    def gain(of: Mapping[str, float]) -> np.ndarray:
        """(blocks,)"""
        query, key, value, out = (np.array([of[f"{block}.{name}"] for block in blocks]) for name in names)
        return (value + out - query - key) / 2

    seeds = [gain(row["ranks"]) for row in sides[0].rows if row.get("ranks")]
    drawn = gain(ranks)[np.random.default_rng(0).integers(len(blocks), size=(2000, len(blocks)))].mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value, each = float(gain(ranks).mean()), tuple(float(seed.mean()) for seed in seeds)
    means = ", ".join(f"{name.removesuffix('_proj')} {np.mean([ranks[f'{block}.{name}'] for block in blocks]):.1f}" for name in names)
    verdict = lower(Estimate(value, float(low), float(high), each=each, num_seeds=len(seeds)))
    return Finding(f"{system_name(sides[0])}, mean ranks {means}: {value:.1f} more ({low:.1f} to {high:.1f}, blocks drawn)", verdict)


def merged_costs_nothing(folder: Path) -> Finding:
    """From the benchmark of inference, which counts operators and takes times."""
    files = sorted(folder.glob("s2lora-inference_small_*.json"))
    if not files:
        raise Missing("no benchmark of inference beside these results")
    run = json.loads(files[-1].read_text("utf-8"))
    base, merged = (run["operators"][arm]["token_step"] for arm in ("base", "merged"))
    ratio = run["summary"]["token_step"]["merged"]["to_base"]["median"]
    return Finding(
        f"merged: {merged} operators a token, the base {base}; {ratio:.2f} times its time (`{run['command']}`)", always(merged == base, 1)
    )


# ---- LoRA-Whisper ------------------------------------------------------------------------------------------------------


def fewer_errors(results: Results, part: str, than: str, how: str, sets: Callable[[Results], list[str]]) -> Finding:
    """Mean CER of one way below that of another, with the relative gain."""
    return _fewer(ways(results, part), than, how, sets(results))


def _fewer(known: dict[str, System], than: str, how: str, sets: Sequence[str]) -> Finding:
    one, other = systems(known, than, how)
    names = _some([name for name in sets if one.has(name) and other.has(name)])
    found = mean_difference(one, other, names)
    gains = {rate: 1 - mean_rate(other, names, rate).value / mean_rate(one, names, rate).value for rate in ("cer", "wer")}
    here = f"{how_name(how)} against {how_name(than)}: CER {points(found)} lower, relative {gains['cer']:+.1%} (WER {gains['wer']:+.1%})"
    return Finding(f"{here}; {len(names)} languages", lower(found))


def expansion(than: str, how: str) -> Callable[[Results], Finding]:
    return partial(fewer_errors, part="languages-expansion", than=than, how=how, sets=partial(targets_of, part="languages-expansion"))


def interference(than: str, how: str) -> Callable[[Results], Finding]:
    return partial(fewer_errors, part="languages-interference", than=than, how=how, sets=languages_report.base_sets)


def with_little_speech(results: Results, minutes: int, than: str, how: str) -> Finding:
    """As `fewer_errors`, of runs with so many minutes of a new language."""
    part = "languages-hours"
    known = results.systems(part, lambda row: str(row["kind"]) if row["max_minutes"] == minutes else None)
    return _fewer(known, than, how, targets_of(results, part))


def full_hurts_old(results: Results) -> Finding:
    found = languages_report.old_rates(results)
    if found is None:
        raise Missing("full fine-tuning on a new language has not been measured on old ones")
    before, after, old = found
    lost = mean_difference(after, before, old)
    ratios = [after.sample(name, "cer").rate / max(1e-9, before.sample(name, "cer").rate) for name in old]
    here = f"old languages' CER rises by {points(lost)}, to {min(ratios):.1f} to {max(ratios):.1f} times what it was"
    return Finding(here, lower(lost))


def old_untouched(results: Results) -> Finding:
    looked = [row["old_languages"] for row in results.rows("languages-expansion") if "old_languages" in row and row.get("kind") != "full"]
    same = sum(not any(each.values()) for each in looked)
    return Finding(
        f"the same bits (weights, encoder states, logits, texts) after {same} of {len(looked)} expansions", always(same, len(looked))
    )


def far_start_hurts(results: Results) -> Finding:
    cold, far = systems(ways(results, "languages-expansion"), "cold", "warm-farthest")
    names = _some([name for name in targets_of(results, "languages-expansion") if cold.has(name) and far.has(name)])
    level = 1 - (1 - LEVEL) / len(names)
    worse = {name: difference(far, cold, name, "cer", level) for name in names}
    here = f"CER above the cold start, from the farthest source ({level:.1%} intervals): " + ", ".join(
        f"{set_name(name)} {points(each)}" for name, each in worse.items()
    )
    return Finding(here, sometimes(list(worse.values())))


def similar_sources_help(results: Results) -> Finding:
    found = languages_report.similarity_correlation(results)
    if found is None:
        raise Missing("fewer than four pairs of language and source")
    span = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    given = languages_report.similarity_points(results)
    languages = len({point["target"] for point in given})
    here = (
        f"rank correlation of similarity and low CER within languages {found.value:.2f}{span}, {len(given)} pairs of {languages} languages"
    )
    own = {set_name(point["target"]): point["own"] for point in given if point["own"] is not None}
    if own:
        here += "; heard as the language itself: " + ", ".join(f"{name} {percent(share)} %" for name, share in own.items())
    return Finding(here, at_most_direction(lower(found)))


def lora_share_of_small() -> float:
    """Trained share of whisper-small: rank 32 on q, k, v, fc1, fc2."""
    width, layers, ffn = WHISPER_SMALL["d_model"], WHISPER_SMALL["layers"], WHISPER_SMALL["ffn"]
    attention = 3 * 3 * layers * 2 * width  # three matrices, of one block in the encoder and two in the decoder
    return 32 * (attention + 2 * 2 * layers * (width + ffn)) / WHISPER_SMALL["parameters"]


def few_parameters(results: Results) -> Finding:
    (own,) = systems(ways(results, "languages-interference"), "per-language-lora")
    share = lora_share_of_small()
    rounds = "rounds to the paper's" if round(100 * share) == 5 else "does not round to the paper's"
    return Finding(f"{share:.1%} of whisper-small by its formula, which {rounds}; {_share(own, results)} of this base", ARITHMETIC)


# ---- beyond ------------------------------------------------------------------------------------------------------------


def pool_for_many(results: Results, pool: str = "pool") -> Finding:
    base, lora, pooled = systems(ways(results, "beyond-growth"), "base", "lora-r8", pool)
    groups = beyond_report.growth_groups(results)
    new = groups.get(beyond_report.NEW, [])
    names = _some(new if pool == "pool-broad" else [*new, *groups.get(beyond_report.HEARD, [])])  # not what it was made of
    found, rate = mean_difference(lora, pooled, names), mean_rate(lora, names, "cer").value
    everything = [name for group in groups.values() for name in group]
    sizes = [beyond_report.growth_curve(results, how, everything)[-1][1] for how in (pool, "lora-r8")]
    here = f"{len(everything)} languages in {bytes_cell(sizes[0])} as {how_name(pool)}, in {bytes_cell(sizes[1])} as LoRA r 8; on the "
    here += f"{len(names)} of them in Latin letters that neither the base nor the pool was trained to write "
    here += f"CER {points(found)} below LoRA's {percent(rate)} %{gained(base, lora, names)}"
    return Finding(here, as_good(base, lora, pooled, names, share=sizes[0] / sizes[1]))


def pool_against_lora_r1(results: Results, pool: str = "pool") -> Finding:
    lora, pooled = systems(ways(results, "beyond-bytes"), "lora-r1", pool)
    names = _some([name for name in targets_of(results, "beyond-bytes") if lora.has(name) and pooled.has(name)])
    found = mean_difference(lora, pooled, names)
    sizes = [bytes_cell(system.mean("num_bytes")) for system in (pooled, lora)]
    here = f"{how_name(pool)}, {sizes[0]} against {sizes[1]} a language: CER {points(found)} lower; {len(names)} languages"
    return Finding(here, lower(found))


def mixed_is_the_same(results: Results) -> Finding:
    rows = results.rows("beyond-mixed")
    same, all_rows = sum(int(row["equal_texts"]) for row in rows), sum(int(row["num_texts"]) for row in rows)
    return Finding(f"{same} of {all_rows} texts, as PEFT writes them with each adapter alone", always(same, all_rows))


def decoder_is_enough(results: Results) -> Finding:
    everything, decoder = systems(ways(results, "beyond-layouts"), "everything", "decoder-only")
    names = _some([name for name in targets_of(results, "beyond-layouts") if everything.has(name) and decoder.has(name)])
    found, rate = mean_difference(everything, decoder, names), mean_rate(everything, names, "cer").value
    base = beyond_report.base_of(results, "beyond-layouts", names)
    here = f"LoRA r 8 on the decoder: CER {points(found)} below one on everything ({percent(rate)} %{gained(base, everything, names)})"
    return Finding(here, as_good(base, everything, decoder, names))


def half_the_adapters(results: Results) -> Finding:
    merged = beyond_report.merge_systems(results)
    if len(merged) < 2:
        raise Missing("nothing has been merged")
    (most, whole), half = merged[0], next(((number, each) for number, each in merged if 2 * number <= merged[0][0]), None)
    if half is None:
        raise Missing("adapters have not been merged to half their number")
    names = _some(common_sets([whole, half[1]]))
    found, rate = mean_difference(whole, half[1], names), mean_rate(whole, names, "cer").value
    base = beyond_report.base_of(results, "beyond-merge", names)
    here = f"{most} adapters to {half[0]}: CER {points(found)} below {percent(rate)} %{gained(base, whole, names)}"
    return Finding(here, as_good(base, whole, half[1], names))


def near_start_helps_switching(results: Results) -> Finding:
    cold, near = systems(results.systems("beyond-switching"), "cold", "warm-es")
    found = {name: difference(cold, near, name, "cer") for name in cold.measured()}
    switched = next(each for name, each in found.items() if name.endswith("switched"))
    here = ", ".join(f"{set_name(name)} {points(each)}" for name, each in found.items())
    return Finding(f"CER of a start from Spanish below a cold one: {here}", lower(switched))


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "S2-LoRA ([Liu et al. 2023](https://arxiv.org/abs/2309.11756)), Chinese child speech there, English child speech here": (
        Claim(
            "a small set of parameters does as well as full fine-tuning", "no figure (abstract, of PEFT)", "B", "child", small_set_is_enough
        ),
        Claim("a learnable rank coefficient is a good design", "AdaLoRA against LoRA (abstract)", "A", "child", coefficients_are_good),
        Claim("in domain comparable to AdaLoRA, with much fewer parameters", "no figure (abstract)", "B", "child", in_domain_like_adalora),
        Claim("generalises better out of domain than AdaLoRA", "no figure (abstract)", "A", "child", better_out_of_domain),
        Claim(
            "generalises better out of domain than full fine-tuning",
            "implied (abstract)",
            "A",
            "child",
            partial(better_out_of_domain, than=FULL),
        ),
        Claim("0.02 % of the parameters are enough to adapt", "0.02 % (body, as reported by readers)", "B", "child", tiny_adapters_learn),
        Claim("its ranks are distributed as AdaLoRA's", "similar patterns (abstract)", "C", "child", ranks_alike),
        Claim("v and o need ranks, q and k hardly", "v, o above q, k (body, as reported by readers)", "A", "child", values_before_queries),
    ),
    "LoRA-Whisper ([Song et al. 2024](https://arxiv.org/abs/2406.06619)), eight languages of MLS and FLEURS there": (
        Claim(
            "a LoRA per language against one model for all: less interference",
            "18.5 % relative, 11.68 to 9.52 WER (abstract, body)",
            "A",
            "languages",
            interference("joint-full", "per-language-lora"),
        ),
        Claim(
            "a LoRA per language against one LoRA for all (what sharing costs)",
            "the reason it gives (abstract)",
            "A",
            "languages",
            interference("joint-lora", "per-language-lora"),
        ),
        Claim(
            "one model per language against one model for all",
            "the same, without LoRA",
            "A",
            "languages",
            interference("joint-full", "per-language-full"),
        ),
        Claim("about 5 % of the parameters per language", "5 % (body)", "F", "languages", few_parameters),
        Claim(
            "a new language from the nearest, against full fine-tuning",
            "23.0 % relative, 28.33 to 21.8 WER (abstract, body)",
            "A",
            "languages",
            expansion("full", "warm-nearest"),
        ),
        Claim(
            "a new language by a mixture of near ones, against full fine-tuning",
            "23.0 % relative (abstract), the better of the two",
            "A",
            "languages",
            expansion("full", "moe"),
        ),
        Claim(
            "plain LoRA on a new language, against full fine-tuning",
            "28.33 to 22.97 WER (body)",
            "A",
            "languages",
            expansion("full", "cold"),
        ),
        Claim("from the nearest, against a cold start", "about 5 % relative (body)", "A", "languages", expansion("cold", "warm-nearest")),
        Claim("a mixture, against a cold start", "about 5 % relative (body)", "A", "languages", expansion("cold", "moe")),
        Claim(
            "full fine-tuning on a new language hurts the old ones", "up to three times the WER (body)", "A", "languages", full_hurts_old
        ),
        Claim("LoRA-Whisper leaves the old languages as they are", "the same WER (abstract, body)", "D", "languages", old_untouched),
        Claim("a start from a dissimilar language can be worse than none", "reported (body)", "E", "languages", far_start_hurts),
        Claim("similar languages help more", "the idea of the paper (abstract)", "C", "languages", similar_sources_help),
    ),
    "Later work and this project": (
        Claim(
            "shared + private LoRA beats private LoRA",
            "macro WER 41.90 to 19.85 in one study, low resource",
            "A",
            "languages",
            interference("per-language-lora", "shared-private"),
        ),
        Claim(
            "stacked on a frozen near LoRA beats a warm start",
            "safer with little data (one study)",
            "A",
            "languages",
            expansion("warm-nearest", "stacked"),
        ),
        Claim(
            "two minutes of a new language: a LoRA beats full fine-tuning",
            "ours",
            "A",
            "languages",
            partial(with_little_speech, minutes=2, than="full", how="cold"),
        ),
        Claim(
            "two minutes of a new language: from the nearest beats full fine-tuning",
            "ours",
            "A",
            "languages",
            partial(with_little_speech, minutes=2, than="full", how="warm-nearest"),
        ),
        Claim(
            "eight minutes of a new language: from the nearest beats a cold start",
            "ours",
            "A",
            "languages",
            partial(with_little_speech, minutes=8, than="cold", how="warm-nearest"),
        ),
        Claim("coefficients of a pool beat a LoRA of rank 1", "ours", "A", "beyond", pool_against_lora_r1),
        Claim("the same, of a pool for new languages", "ours", "A", "beyond", partial(pool_against_lora_r1, pool="pool-broad")),
        Claim("many languages: a pool is as good as a LoRA each, in fewer bytes", "ours", "B", "beyond", pool_for_many),
        Claim("the same, with a pool for new languages", "ours", "B", "beyond", partial(pool_for_many, pool="pool-broad")),
        Claim("a batch of many languages writes what each writes alone", "ours", "D", "beyond", mixed_is_the_same),
        Claim("half as many adapters after merging what is alike", "ours", "B", "beyond", half_the_adapters),
        Claim(
            "adapters in the decoder alone are as good, and the encoder runs once",
            "ours",
            "B",
            "beyond",
            decoder_is_enough,
            "the own decoder's encoder is frozen: there is nothing to compare with",
        ),
        Claim("speech that changes to Spanish: a start from Spanish beats none", "ours", "A", "beyond", near_start_helps_switching),
    ),
}


def judged(claim: Claim, results: Sequence[Results]) -> list[tuple[str, Finding]]:
    """(name of the results, finding) for all that a claim can be judged by; where runs that it needs are missing, the finding says so.
    Without results of its part there is one finding, and no name."""
    found: list[tuple[str, Finding]] = []
    for each in results:
        if each.run["part"] != claim.part:
            continue
        try:
            found.append((each.name, claim.check(each)))
        except Missing as reason:
            found.append((each.name, Finding(str(reason), UNTESTED)))
    return found or [("", Finding(claim.why_not, UNTESTED))]


def lines(claim: Claim, found: Sequence[tuple[str, Finding]]) -> list[list[str]]:
    """Rows of the table: those that were judged, or one that says why none was."""
    tested = [(name, finding) for name, finding in found if finding.verdict != UNTESTED]
    reasons = "; ".join(f"{name}: {finding.here}" if name else finding.here for name, finding in found)
    shown = tested or [("", Finding(reasons, UNTESTED))]
    return [[claim.claim, claim.paper, name, finding.here, f"{finding.verdict} ({claim.rule})"] for name, finding in shown]


def in_short(title: str, counts: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """How often each verdict was given to the claims of a source, by each of the results."""
    verdicts = (HOLDS, DIRECTION, UNDECIDED, FAILS, UNTESTED)
    return [[title, name, *(str(found.get(verdict, 0)) for verdict in verdicts)] for name, found in counts.items()]


def table(results: Sequence[Results], folder: Path) -> str:
    """All claims, how many of them came to what, and the rules.

    Args:
        results: everything that has been committed.
        folder: where the benchmarks' results are.
    """
    made, short = [], []
    for title, claims in CLAIMS.items():
        rows = []
        counts: dict[str, Counter[str]] = {}
        for claim in claims:
            found = judged(claim, results)
            rows += lines(claim, found)
            for name, finding in found if found[0][0] else ():
                counts.setdefault(name, Counter())[finding.verdict] += 1
        if title.startswith("S2-LoRA"):
            try:
                finding = merged_costs_nothing(folder)
            except Missing as reason:
                finding = Finding(str(reason), UNTESTED)
            rows.append(["no extra cost at inference", "none (abstract)", "whisper-small", finding.here, f"{finding.verdict} (D)"])
            counts["whisper-small"] = Counter([finding.verdict])
        short += in_short(title.partition(" (")[0], counts)
        made.append(f"**{title}**\n\n{markdown(['claim', 'the paper', 'ground', 'here', 'verdict'], rows, left=5)}")
    smoke = any(each.run["smoke"] for each in results)
    rules = "\n".join(f"- {letter}: {text}." for letter, text in RULES.items())
    note = "**Made by the smoke path: these figures and verdicts mean nothing.**\n\n" if smoke else ""
    heads = ["claims of", "ground", *(verdict.strip("*") for verdict in (HOLDS, DIRECTION, UNDECIDED, FAILS)), "not run or not testable"]
    return (
        f"{note}{markdown(heads, short, left=2)}\n\n"
        "A ground with a variant is judged by itself: two lengths are two chances, and a claim that holds at one of them holds at that "
        "length.\n\n"
        + "\n\n".join(made)
        + f"\n\nVerdicts are computed by rules. A part with a single seed (growth, merging, layouts, switching) reaches "
        f"direction only at most:\n\n{rules}\n\nIntervals are over clips or speakers drawn again, and over seeds; differences in "
        "percentage points, above 0 where the first named is better. Error rates in words for child speech, in characters where "
        "languages are averaged. What the paper calls out of domain is judged on sets that the base was trained on where no other is "
        f"there; the finding says so. One arm stands for S2-LoRA in all claims: `{S2_ARM}`."
    )
