"""The claims of the two papers, what came out here, and a verdict by a rule that was written down before the runs.

A claim names the paper's figure and where it stands; what it came to here is computed from committed results and never typed. A check
looks at one results file and gives a `Finding`; it raises `Missing` where the runs that it needs have not been made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from recipes.evidence import beyond_report, child_report, languages_report
from recipes.evidence.child_report import system_name
from recipes.evidence.child_speech import IN_DOMAIN
from recipes.evidence.comparing import LEVEL, Estimate, Results, System, common_sets, difference, mean_difference, mean_rate
from recipes.evidence.tables import bytes_cell, estimate_cell, how_name, percent, set_name, targets_of, ways
from recipes.evidence.tables import table as markdown

S2_ARMS = ("s2-r32-sparse-0.1", "s2-r32")
"""What stands for the paper's method: sparse, with all linear layers. The first that has been run."""
TINY_ARM = "s2-r32-attention"
"""The reading that gives 0.02 % on whisper-small."""
ADALORA, LORA, FULL = "adalora-r8", "lora-r8", "full"
MARGIN = 0.1
"""Relative loss up to which two methods count as comparable."""
MUCH_FEWER = 0.5
"""Share of the other's trained numbers up to which a method has "much fewer"."""
WHISPER_SMALL = {"d_model": 768, "layers": 12, "ffn": 3072, "parameters": 241_734_912}

HOLDS, DIRECTION, FAILS, UNTESTED = "**holds**", "direction only", "**does not hold**", "not testable here"
RULES = {
    "A": f"lower error rate: holds if the difference on the same clips is above 0 and its {LEVEL:.0%} interval leaves 0 out; direction "
    "only if it is above 0; does not hold otherwise",
    "B": f"comparable: holds if the low end of that interval is above a loss of {MARGIN:.0%} of the other's rate; direction only if the "
    "difference itself is; does not hold otherwise. Where the claim is one of fewer numbers or bytes too, they have to be at most "
    f"{MUCH_FEWER:.0%} of the other's",
    "C": "alike: holds if a rank correlation is above 0 and its interval leaves 0 out; direction only if it is above 0",
    "D": "always: holds if it is so in every run that looked; does not hold otherwise",
    "E": "sometimes: holds if the interval of at least one language leaves 0 out in that direction; direction only if one lies there",
    "F": "counted: holds if the number, computed for whisper-small, rounds to the paper's; it takes no run",
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
    return (HOLDS if found.sure else DIRECTION) if found.value > 0 else FAILS


def comparable(found: Estimate, rate: float, share: float = 0.0) -> str:
    """Rule B. `rate`: the other's; `share`: of its numbers or bytes."""
    most = -MARGIN * rate
    if share > MUCH_FEWER or found.value <= most:
        return FAILS
    return HOLDS if found.low is not None and found.low > most else DIRECTION


def always(good: int, looked: int) -> str:
    """Rule D."""
    if not looked:
        raise Missing("no run has looked")
    return HOLDS if good == looked else FAILS


def sometimes(found: Sequence[Estimate]) -> str:
    """Rule E; each estimate is above 0 where the claim is right."""
    if any(each.sure and each.value > 0 for each in found):
        return HOLDS
    return DIRECTION if any(each.value > 0 for each in found) else FAILS


def points(found: Estimate) -> str:
    return f"{estimate_cell(found)} points"


def systems(found: dict[str, System], *names: str) -> list[System]:
    """Those of the names. Raises `Missing` with what is not there."""
    absent = [name for name in names if name not in found]
    if absent:
        raise Missing(f"not run: {', '.join(absent)}")
    return [found[name] for name in names]


def first(found: dict[str, System], names: Sequence[str]) -> System:
    chosen = next((found[name] for name in names if name in found), None)
    if chosen is None:
        raise Missing(f"not run: {' or '.join(names)}")
    return chosen


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
    full, lora = systems(child_report.child_systems(results), FULL, LORA)
    found, rate = difference(full, lora, IN_DOMAIN), full.sample(IN_DOMAIN).rate
    ratio = (lora.mean("num_trained") or 0) / (full.mean("num_trained") or 1)
    here = f"{system_name(lora)} trains {_share(lora, results)} and is {points(found)} below full fine-tuning ({percent(rate)} % WER)"
    return Finding(here, comparable(found, rate, ratio))


def coefficients_are_good(results: Results) -> Finding:
    lora, adalora = systems(child_report.child_systems(results), LORA, ADALORA)
    found = difference(lora, adalora, IN_DOMAIN)
    return Finding(f"AdaLoRA is {points(found)} of WER below LoRA of the same rank in domain", lower(found))


def in_domain_like_adalora(results: Results) -> Finding:
    found = child_report.child_systems(results)
    (adalora,), s2 = systems(found, ADALORA), first(found, S2_ARMS)
    below, rate = difference(adalora, s2, IN_DOMAIN), adalora.sample(IN_DOMAIN).rate
    ratio = (s2.mean("num_trained") or 0) / (adalora.mean("num_trained") or 1)
    here = f"{system_name(s2)} is {points(below)} below {system_name(adalora)} ({percent(rate)} % WER), with {ratio:.0%} of its numbers"
    return Finding(here, comparable(below, rate, ratio))


def better_out_of_domain(results: Results, than: str = ADALORA) -> Finding:
    found, outside = child_report.child_systems(results), child_report.out_of_domain(results)
    (other,), s2 = systems(found, than), first(found, S2_ARMS)
    below = mean_difference(other, s2, outside, "wer")
    each = ", ".join(f"{set_name(name)} {percent(difference(other, s2, name).value)}" for name in outside)
    return Finding(
        f"{system_name(s2)} is {points(below)} of WER below {system_name(other)} in the mean of {len(outside)} sets ({each})",
        lower(below),
    )


def s2_share_of_small() -> float:
    """Trained share of whisper-small with one pair of rank 32 for all attention matrices: r (d + d) + r M."""
    width, layers = WHISPER_SMALL["d_model"], WHISPER_SMALL["layers"]
    weights = 4 * layers + 8 * layers  # of the encoder; of the decoder, which attends twice
    return 32 * (2 * width + weights) / WHISPER_SMALL["parameters"]


def tiny_adapters_learn(results: Results) -> Finding:
    base, tiny = systems(child_report.child_systems(results), "base", TINY_ARM)
    found = difference(base, tiny, IN_DOMAIN)
    here = f"{s2_share_of_small():.3%} of whisper-small by its formula, {_share(tiny, results)} of this base; "
    here += f"{points(found)} of WER below the base"
    return Finding(here, lower(found) if round(100 * s2_share_of_small(), 2) == 0.02 else FAILS)


def ranks_alike(results: Results) -> Finding:
    sides, found = child_report.rank_sides(results), child_report.rank_correlation(results)
    if sides is None or found is None:
        raise Missing("a sparse S2-LoRA and AdaLoRA have not both been run")
    verdict = lower(found)
    span = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    return Finding(
        f"rank correlation over the weights {found.value:.2f}{span}, {system_name(sides[0])} and {system_name(sides[1])}",
        verdict,
    )


def values_before_queries(results: Results) -> Finding:
    """Mean rank of v and o less that of q and k, an attention block being the unit."""
    sides = child_report.rank_sides(results)
    if sides is None:
        raise Missing("a sparse S2-LoRA and AdaLoRA have not both been run")
    ranks = child_report.mean_ranks(sides[0])
    blocks = sorted({module.rpartition(".")[0] for module in ranks if module.endswith("q_proj")})
    if not all(f"{block}.{name}" in ranks for block in blocks for name in ("k_proj", "v_proj", "out_proj")):
        raise Missing("not all attention matrices are adapted")
    kinds = {name: np.array([ranks[f"{block}.{name}"] for block in blocks]) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    gain = (kinds["v_proj"] + kinds["out_proj"] - kinds["q_proj"] - kinds["k_proj"]) / 2  # (blocks,)
    drawn = gain[np.random.default_rng(0).integers(len(gain), size=(2000, len(gain)))].mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    means = ", ".join(f"{name.removesuffix('_proj')} {values.mean():.1f}" for name, values in kinds.items())
    return Finding(f"mean ranks {means}: {gain.mean():.1f} more ({low:.1f} to {high:.1f})", lower(Estimate(gain.mean(), low, high)))


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
    one, other = systems(ways(results, part), than, how)
    names = _some([name for name in sets(results) if one.has(name) and other.has(name)])
    found = mean_difference(one, other, names)
    gains = {rate: 1 - mean_rate(other, names, rate).value / mean_rate(one, names, rate).value for rate in ("cer", "wer")}
    here = f"{how_name(how)} against {how_name(than)}: CER {points(found)} lower, relative {gains['cer']:+.1%} (WER {gains['wer']:+.1%})"
    return Finding(f"{here}; {len(names)} languages", lower(found))


def expansion(than: str, how: str) -> Callable[[Results], Finding]:
    return partial(fewer_errors, part="languages-expansion", than=than, how=how, sets=partial(targets_of, part="languages-expansion"))


def interference(than: str, how: str) -> Callable[[Results], Finding]:
    return partial(fewer_errors, part="languages-interference", than=than, how=how, sets=languages_report.base_sets)


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
    worse = {name: difference(far, cold, name, "cer") for name in names}
    here = "CER above the cold start, from the farthest source: " + ", ".join(
        f"{set_name(name)} {points(each)}" for name, each in worse.items()
    )
    return Finding(here, sometimes(list(worse.values())))


def similar_sources_help(results: Results) -> Finding:
    found = languages_report.similarity_correlation(results)
    if found is None:
        raise Missing("fewer than four pairs of language and source")
    span = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    number = len(languages_report.similarity_points(results))
    return Finding(f"rank correlation of similarity and low CER within languages {found.value:.2f}{span}, {number} pairs", lower(found))


def lora_share_of_small() -> float:
    """Trained share of whisper-small: rank 32 on q, k, v, fc1, fc2."""
    width, layers, ffn = WHISPER_SMALL["d_model"], WHISPER_SMALL["layers"], WHISPER_SMALL["ffn"]
    attention = 3 * 3 * layers * 2 * width  # three matrices, of one block in the encoder and two in the decoder
    return 32 * (attention + 2 * 2 * layers * (width + ffn)) / WHISPER_SMALL["parameters"]


def few_parameters(results: Results) -> Finding:
    (own,) = systems(ways(results, "languages-interference"), "per-language-lora")
    share = lora_share_of_small()
    return Finding(
        f"{share:.1%} of whisper-small by its formula, {_share(own, results)} of this base", HOLDS if round(100 * share) == 5 else FAILS
    )


# ---- beyond ------------------------------------------------------------------------------------------------------------


def pool_for_many(results: Results) -> Finding:
    lora, pool = systems(ways(results, "beyond-growth"), "lora-r8", "pool")
    names = _some(beyond_report.growth_order(results))
    found, rate = mean_difference(lora, pool, names), mean_rate(lora, names, "cer").value
    sizes = [beyond_report.growth_curve(results, how)[-1][1] for how in ("pool", "lora-r8")]
    here = f"{len(names)} languages: {bytes_cell(sizes[0])} with the pool, {bytes_cell(sizes[1])} as LoRA r 8; "
    return Finding(f"{here}CER {points(found)} below LoRA's {percent(rate)} %", comparable(found, rate, sizes[0] / sizes[1]))


def pool_against_lora_r1(results: Results) -> Finding:
    lora, pool = systems(ways(results, "beyond-bytes"), "lora-r1", "pool")
    names = _some([name for name in targets_of(results, "beyond-bytes") if lora.has(name) and pool.has(name)])
    found = mean_difference(lora, pool, names)
    sizes = [bytes_cell(system.mean("num_bytes")) for system in (pool, lora)]
    return Finding(f"{sizes[0]} against {sizes[1]} a language: CER {points(found)} lower; {len(names)} languages", lower(found))


def mixed_is_the_same(results: Results) -> Finding:
    rows = results.rows("beyond-mixed")
    same, all_rows = sum(int(row["equal_texts"]) for row in rows), sum(int(row["num_texts"]) for row in rows)
    return Finding(f"{same} of {all_rows} texts, as PEFT writes them with each adapter alone", always(same, all_rows))


def decoder_is_enough(results: Results) -> Finding:
    everything, decoder = systems(ways(results, "beyond-layouts"), "everything", "decoder-only")
    names = _some([name for name in targets_of(results, "beyond-layouts") if everything.has(name) and decoder.has(name)])
    found, rate = mean_difference(everything, decoder, names), mean_rate(everything, names, "cer").value
    return Finding(f"LoRA r 8 on the decoder: CER {points(found)} below one on everything ({percent(rate)} %)", comparable(found, rate))


def half_the_adapters(results: Results) -> Finding:
    merged = beyond_report.merge_systems(results)
    if len(merged) < 2:
        raise Missing("nothing has been merged")
    (most, whole), half = merged[0], next(((number, each) for number, each in merged if 2 * number <= merged[0][0]), None)
    if half is None:
        raise Missing("adapters have not been merged to half their number")
    names = _some(common_sets([whole, half[1]]))
    found, rate = mean_difference(whole, half[1], names), mean_rate(whole, names, "cer").value
    return Finding(f"{most} adapters to {half[0]}: CER {points(found)} below {percent(rate)} %", comparable(found, rate))


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
        Claim("0.02 % of the parameters are enough to adapt", "0.02 % (body, as reported by readers)", "A", "child", tiny_adapters_learn),
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
        Claim("coefficients of a pool beat a LoRA of rank 1", "ours", "A", "beyond", pool_against_lora_r1),
        Claim("many languages: a pool is as good as a LoRA each, in fewer bytes", "ours", "B", "beyond", pool_for_many),
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
    """(ground, finding) for every ground whose results a claim can be judged by; one without a ground where there is none."""
    found: list[tuple[str, Finding]] = []
    reasons = []
    for each in results:
        if each.run["part"] != claim.part:
            continue
        try:
            found.append((each.ground, claim.check(each)))
        except Missing as reason:
            reasons.append(f"{each.ground}: {reason}")
    return found or [("", Finding("; ".join(reasons) or claim.why_not, UNTESTED))]


def table(results: Sequence[Results], folder: Path) -> str:
    """All claims, and the rules.

    Args:
        results: everything that has been committed.
        folder: where the benchmarks' results are.
    """
    made = []
    for title, claims in CLAIMS.items():
        rows = []
        for claim in claims:
            for ground, finding in judged(claim, results):
                rows.append([claim.claim, claim.paper, ground, finding.here, f"{finding.verdict} ({claim.rule})"])
        if title.startswith("S2-LoRA"):
            try:
                finding = merged_costs_nothing(folder)
            except Missing as reason:
                finding = Finding(str(reason), UNTESTED)
            rows.append(["no extra cost at inference", "none (abstract)", "whisper-small", finding.here, f"{finding.verdict} (D)"])
        made.append(f"**{title}**\n\n{markdown(['claim', 'the paper', 'ground', 'here', 'verdict'], rows, left=5)}")
    smoke = any(each.run["smoke"] for each in results)
    rules = "\n".join(f"- {letter}: {text}." for letter, text in RULES.items())
    note = "**Made by the smoke path: these figures and verdicts mean nothing.**\n\n" if smoke else ""
    return (
        note + "\n\n".join(made) + f"\n\nVerdicts are computed:\n\n{rules}\n\nIntervals are over clips "
        "or speakers drawn again, errors summed over seeds; differences in percentage points, above 0 where the first named is better. "
        "Error rates in words for child speech, in characters where languages are averaged."
    )
