"""Rows of experiments that never ran, with error rates chosen beforehand: what the page says of them can be checked against the choice."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from recipes.evidence.child_speech import METHODS
from recipes.evidence.ground import Data
from recipes.evidence.methods import Method
from recipes.evidence.runs import Settings
from recipes.evidence.store import Store

BASE = "0123456789ab"
NUM_CLIPS, NUM_WORDS = 48, 40  # so many words that the seeds of an arm lie close together
LAYERS = [f"model.encoder.layers.{layer}.{kind}" for layer in range(2) for kind in ("self_attn", "fc")]
LAYERS += [f"model.decoder.layers.{layer}.{kind}" for layer in range(2) for kind in ("self_attn", "encoder_attn", "fc")]
BASE_SETS, NEW_SETS = ("child", "kerstin", "espeak-es"), ("kichwa", "espeak-ca")
GROWTH = {"ca": 0.2, "fi": 0.3, "es": 0.1, "th": 0.6}  # the third known to the base, the last in other letters


def ground(digest: str = BASE) -> Any:
    """What `collect` asks of a ground: here a base of a million numbers."""
    return SimpleNamespace(name="pocket", folder="a/folder", digest=digest, base=nn.Linear(1000, 1000, bias=False), frozen_encoder=False)


def settings(work: Path, **chosen: Any) -> Settings:
    return Settings(ground="pocket", data=Data(work=work), **chosen)


def set_row(rate: float, name: str, seed: int, speakers: int = 12) -> dict[str, Any]:
    """A set on which a system is wrong at `rate`; the same clips are hard for all systems."""
    hard = np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, NUM_CLIPS)
    rng = np.random.default_rng((zlib.crc32(name.encode()), seed, round(rate * 1e4)))
    words = rng.binomial(NUM_WORDS, np.clip(rate * hard, 0, 1))
    chars = rng.binomial(5 * NUM_WORDS, np.clip(rate * hard, 0, 1))
    return {
        "language": "en",
        "seconds": 2.0 * NUM_CLIPS,
        "speakers": [number % speakers for number in range(NUM_CLIPS)],
        "wer": round(float(words.sum() / (NUM_WORDS * NUM_CLIPS)), 5),
        "cer": round(float(chars.sum() / (5 * NUM_WORDS * NUM_CLIPS)), 5),
        "word_errors": words.tolist(),
        "words": [NUM_WORDS] * NUM_CLIPS,
        "char_errors": chars.tolist(),
        "chars": [5 * NUM_WORDS] * NUM_CLIPS,
        "texts": ["what was heard"],
    }


def row(
    part: str, arm: str, seed: int, errors: Mapping[str, float], method: Method | None = None, num_trained: int = 1000, **more: Any
) -> dict[str, Any]:
    """A run: set -> its error rate, and what a trained run says of itself."""
    made: dict[str, Any] = {"method": (Method("none") if method is None else method).to_dict()}
    if method is not None:
        made |= {"schedule": {"num_steps": 200, "batch_size": 16}, "clips": [100], "minutes": [8.0], "num_trained": num_trained}
        made |= {"num_bytes": 4 * num_trained, "train_s": num_trained**0.3, "ranks": None}
    made |= {"sets": {name: set_row(rate, name, seed) for name, rate in errors.items()}}
    made |= {"part": part, "arm": arm, "seed": seed, "ground": "pocket", "base": BASE, "seconds": 1.0, "versions": {"torch": "2"}}
    return made | more


def ranks(shift: int, seed: int) -> dict[str, int]:
    """A rank for every weight, larger for v and o than for q and k."""
    large = {"q_proj": 2, "k_proj": 1, "v_proj": 12, "out_proj": 10}
    found = {}
    for layer in LAYERS:
        block, _, kind = layer.rpartition(".")
        if kind == "fc":
            found |= {f"{block}.fc1": 8 + shift, f"{block}.fc2": 6 + seed}
        else:
            found |= {f"{layer}.{name}": rank + shift + seed % 2 for name, rank in large.items()}
    return found


def child_rows(seeds: Sequence[int] = (0, 1, 2), rates: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """The part `child`: in domain S2-LoRA is as good as AdaLoRA, out of domain better, unless `rates` says otherwise of a kind."""
    inside = {"full": 0.25, "bitfit": 0.34, "lora": 0.28, "adalora": 0.27, "vera": 0.33, "s2lora": 0.262} | dict(rates or {})
    outside = {"full": 0.55, "bitfit": 0.42, "lora": 0.5, "adalora": 0.5, "vera": 0.45, "s2lora": 0.4}
    trained = {"full": 990_000, "bitfit": 9_000, "lora": 40_000, "adalora": 60_000, "vera": 8_000, "s2lora": 12_000}
    made = [row("child", "base", 0, {"child": 0.6, "adult": 0.4, "kathleen": 0.38, "kerstin": 0.45})]
    for kind, tried in {"lora": (1e-3, 3e-3), "s2lora": (1e-3, 3e-3)}.items():
        for rate in tried:
            method = METHODS["lora-r8" if kind == "lora" else "s2-r32"].with_rate(rate)
            made.append(row("child-tuning", f"{kind}-{rate:g}", 100, {"child-dev": 0.3 + 30 * rate}, method))
    for seed in seeds:
        for number, (arm, method) in enumerate(METHODS.items()):
            rates_of = {
                "child": inside[method.kind] + 0.001 * number,
                **dict.fromkeys(("adult", "kathleen", "kerstin"), outside[method.kind]),
            }
            pattern = ranks(0 if method.kind == "s2lora" else -1, seed) if method.sparsity or method.kind == "adalora" else None
            made.append(row("child", arm, seed, rates_of, method, trained[method.kind] + 500 * number, ranks=pattern))
        for arm in ("full", "lora-r8", "s2-r32"):
            for minutes in (5, 25):
                rates_of = {"child": inside[METHODS[arm].kind] + 0.6 / minutes, "adult": 0.5}
                made.append(row("child-amount", f"{arm}-{minutes}min", seed, rates_of, METHODS[arm], minutes=[float(minutes)]))
    return made


INTERFERENCE = {"joint-full": 0.3, "joint-lora": 0.32, "per-language-full": 0.33, "per-language-lora": 0.24, "shared-private": 0.22}
EXPANSION = {"full": 0.4, "cold": 0.3, "warm-nearest": 0.25, "warm-farthest": 0.33, "stacked": 0.26, "moe": 0.24, "pool": 0.35}
LORA = Method("lora", rank=32)


def language_rows(seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """The part `languages`."""
    made = [row("languages-interference", "base", 0, dict.fromkeys(BASE_SETS, 0.5))]
    everything = dict.fromkeys(BASE_SETS, 0.3) | dict.fromkeys(NEW_SETS, 0.8)
    made.append(row("languages-expansion", "base", 0, everything))
    made.append(row("languages-tuning", "lora-base", 0, {}, kind="lora", task="base", tried=[0.1], rates={"0.1": {"cer": 0.3}}, chosen=0.1))
    del made[-1]["sets"]
    for seed in seeds:
        for arm, rate in INTERFERENCE.items():
            made.append(row("languages-interference", arm, seed, dict.fromkeys(BASE_SETS, rate), LORA, 50_000))
        for arm, last in {"sequential-full": 0.7, "sequential-lora": 0.5}.items():
            order = [*BASE_SETS[seed:], *BASE_SETS[:seed]]
            learned = {name: set_row(0.25, name, seed) for name in order}
            stages = {name: {key: learned[name][key] for key in ("wer", "cer", "word_errors", "char_errors")} for name in order}
            made.append(row("languages-interference", arm, seed, dict.fromkeys(order, last), LORA, order=order, stages=stages))
        for name in NEW_SETS:
            for kind, rate in EXPANSION.items():
                rates = {name: rate} | (dict.fromkeys(BASE_SETS, 0.75) if kind == "full" else {})
                more = {"old_languages": {"kerstin": []}} if seed == 0 and kind != "full" else {}
                made.append(row("languages-expansion", f"{name}-{kind}", seed, rates, LORA, 50_000, kind=kind, **more))
                for minutes in (2, 8):
                    rates = {name: rate + 0.3 / minutes}
                    arm = f"{name}-{kind}-{minutes}min"
                    made.append(row("languages-hours", arm, seed, rates, LORA, kind=kind, max_minutes=minutes))
            made.append(row("languages-similarity", f"{name}-cold", seed, {name: 0.4}, LORA, source=None, similarity=None))
            for source, heard in zip(BASE_SETS, (0.02, 0.2, 0.7), strict=True):
                arm = f"{name}-from-{source}"
                made.append(
                    row("languages-similarity", arm, seed, {name: 0.4 - 0.2 * heard}, LORA, source=source, similarity=heard, own=0.55)
                )
    return made


def beyond_rows() -> list[dict[str, Any]]:
    """The part `beyond`."""
    ways = {
        "pool": (0.3, 2000),
        "pool-attention": (0.33, 1000),
        "lora-r1": (0.31, 4000),
        "lora-r8": (0.27, 32_000),
        "s2-r32": (0.28, 15_000),
    }
    made = []
    for name in NEW_SETS:
        made.append(row("beyond-bytes", f"base-{name}", 0, {name: 0.8}, about={"how": "base", "target": name}))
        for how, (rate, size) in ways.items():
            for seed in (0, 1, 2):
                about = {"how": how, "target": name} | ({"pool_bytes": 500_000} if how.startswith("pool") else {})
                made.append(row("beyond-bytes", f"{how}-{name}", seed, {name: rate}, LORA, size, about=about))
    for name, hard in GROWTH.items():
        for how in ("base", "pool", "lora-r8"):
            rate, size = ways.get(how, (0.6, 0))
            about = {"how": how, "target": name, "latin": name != "th", "known": name == "es"} | (
                {"pool_bytes": 500_000} if how == "pool" else {}
            )
            made.append(
                row("beyond-growth", f"{how}-{name}", 0, {name: rate * 2 * hard}, None if how == "base" else LORA, size, about=about)
            )
    for number, rate in ((3, 0.2), (2, 0.3), (1, 0.5)):
        about = {"num_adapters": number, "groups": "ca / fi th"}
        made.append(row("beyond-merge", f"to-{number}", 0, dict.fromkeys(GROWTH, rate), num_bytes=number * 128_000, about=about))
    one = {"rows_equal": 12, "largest_difference": 1e-5}
    mixed = {"adapters": "kichwa lora-r8, ca pool", "num_texts": 12, "equal_texts": 12, "equal_texts_in_table": 12, "logit_spread": 3.2}
    mixed |= {"time_ratio": 2.1, "mixed_s": 1.0, "one_by_one_s": 2.1}
    made.append(row("beyond-mixed", "mixed", 0, {}, about=mixed, logits={"in_table": one, "with_peft": one | {"rows_equal": 3}}))
    for how, rate in {"everything": 0.2, "decoder-only": 0.22, "upper-private": 0.3, "both": 0.33}.items():
        for name in NEW_SETS:
            about = {"how": how, "target": name, "one_pass": how in ("decoder-only", "both"), "shared_bytes": 0}
            made.append(row("beyond-layouts", f"{how}-{name}", 0, {name: rate}, LORA, about=about))
    for how, rate in {"base": 0.9, "cold": 0.5, "warm-es": 0.4, "moe": 0.45}.items():
        rates = {"kichwa-switched": rate, "kichwa-plain": rate + 0.05}
        made.append(row("beyond-switching", how, 0, rates, None if how == "base" else LORA, about={"how": how}))
    return made


def write_rows(work: Path, rows: Sequence[Mapping[str, Any]], chosen: Settings | None = None) -> Settings:
    """Put rows where runs leave them; the settings to collect them with."""
    chosen = settings(work) if chosen is None else chosen
    store = Store(chosen.work / "rows")
    for each in rows:
        key = f"{each['part']}/{each['arm']}-s{each['seed']}"
        store.path(key).parent.mkdir(parents=True, exist_ok=True)
        store.write(key, dict(each))
    return chosen
