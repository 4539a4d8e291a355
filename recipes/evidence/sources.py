"""LoRA-Whisper's adapters, one a language, as the folders that starts, registry and merging take; and what a new language sounds like.

    folder = source_adapter(context, "espeak-es", seed)     # made once, by whoever needs it first
    rate = best_rate(context, "lora", "base")               # the same, tuned on dev sets
    heard = similarity(context, "kichwa")

All are artifacts of the ground's work folder, so runs may come in any order.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import Ground, Item
from recipes.evidence.measuring import measure
from recipes.evidence.methods import Method, Trained, _no_step, _nothing, trainable
from recipes.evidence.pools import POOL_METHOD, joint_pool, over_pool
from recipes.evidence.runs import Context, Settings, train
from whisper_moe.base_signature import base_signature
from whisper_moe.layouts import MODULES, decoder_only
from whisper_moe.registry import LANGUAGE_FILE, LanguageAdapter
from whisper_moe.similarity import Similarity, SimilarLanguage, language_similarity
from whisper_moe.starts import Start, choose_start, heard_languages

RANK = 32
"""LoRA-Whisper's."""
LORA = Method("lora", rank=RANK, modules=MODULES)
S2_LORA = Method("s2lora", rank=RANK, modules=MODULES)
FULL = Method("full")
PER_LANGUAGE = 0.5
"""Steps that a set gets in every arm of the interference, and a base language's own adapter, as a share of the settings' steps."""
EXPANSION = 0.5
"""Steps that a new language gets."""
TUNING_SEED = 100
TUNING_CLIPS = 12
"""Of each dev set."""
RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
    "s2lora": (1.5e-3, 5e-3, 1.5e-2),
    "pool": (5e-3, 1.5e-2, 5e-2),
}
"""Kind -> the learning rates that are tried. Those of a pool are A's, were it trained; its coefficients learn ten times as fast."""
LEARNT = ("child", "kerstin", "kichwa", "espeak-ca", "espeak-fi", "espeak-sv")
"""What the small grounds have something to learn from: of the base's own languages the recorded sets, and languages that it cannot write.
More of what a synthesizer says in a language that it knows teaches the base next to nothing."""
HEARD_CLIPS = 60
"""Clips of a new language that the base listens to."""


# ---- sets --------------------------------------------------------------------------------------------------------------


def is_small(settings: Settings) -> bool:
    """Whether these are the sets of the small grounds, and sizes those of `languages`. A full-size recipe names sets of its own."""
    return settings.new_sets == Settings.new_sets


def learnt_sets(settings: Settings) -> tuple[str, ...]:
    """The sets of the interference."""
    return LEARNT if is_small(settings) else settings.base_sets


def steps(settings: Settings, share: float) -> int:
    return max(1, round(settings.num_steps * share))


def training_items(context: Context, name: str, minutes: float | None = None, seed: int = 0) -> list[Item]:
    """A set to train on, or so many minutes of it, other clips for each seed."""
    items = context.ground.items(name, "train", 8 if context.settings.smoke else None)
    if minutes is None:
        return items
    order = np.random.default_rng((seed, 11)).permutation(len(items))
    before = np.cumsum([0.0, *(items[index].seconds for index in order)])[:-1]
    return [items[index] for index, seconds in zip(order, before, strict=True) if seconds < 60 * minutes]


def language_of(context: Context, name: str) -> str:
    return context.ground.data.source(name).language


# ---- learning rates ----------------------------------------------------------------------------------------------------


def tuned(context: Context, kind: str, task: str) -> dict[str, Any]:
    """The rates that were tried and their character error rates.

    Args:
        context: of the run.
        kind: of method: one of `RATES`.
        task: "base" or "learnt", a quarter of a joint run over the base languages or over `learnt_sets`, or "new", a cold run on the first
            new language that is spoken by a synthesizer: the recorded one's clips are dear.
    """

    def make(folder: Path) -> None:
        if task != "new":
            names = list(context.settings.base_sets if task == "base" else learnt_sets(context.settings))
            num_steps = steps(context.settings, PER_LANGUAGE * len(names) / 4)
        else:
            names, num_steps = [tuning_set(context.settings)], steps(context.settings, EXPANSION)
        rates = RATES[kind][1:2] if context.settings.smoke else RATES[kind]
        found = {}
        for rate in rates:
            schedule = Schedule(num_steps, context.settings.batch_size, seed=TUNING_SEED)
            method = method_of(kind).with_rate(rate)
            begun = over_pool(context, joint_pool(context), method, TUNING_SEED) if kind == "pool" else None
            trained, row = train(context, method, [training_items(context, name) for name in names], schedule, trained=begun)
            devs = [
                context.ground.items(name, "dev", min(40 if task == "new" else TUNING_CLIPS, context.settings.test_clips)) for name in names
            ]
            # A mean over languages: otherwise the one with the longest sentences would choose.
            found[f"{rate:g}"] = {
                "cer": float(np.mean([measure(trained.model, context.ground, dev).cer for dev in devs])),
                "last_loss": row["last_loss"],
            }
        folder.mkdir(parents=True)
        (folder / "rates.json").write_text(json.dumps(found), "utf-8")

    read: dict[str, Any] = json.loads((context.artifact(f"rates-{kind}-{task}", make) / "rates.json").read_text("utf-8"))
    return read


def tuning_set(settings: Settings) -> str:
    return next((name for name in settings.new_sets if name != "kichwa"), settings.new_sets[0])


def best_rate(context: Context, kind: str, task: str) -> float:
    """The learning rate with the fewest wrong characters; tried out by whoever asks first."""
    found = tuned(context, kind, task)
    return float(min(found, key=lambda rate: found[rate]["cer"]))


def method_of(kind: str) -> Method:
    return {"full": FULL, "lora": LORA, "s2lora": S2_LORA, "pool": POOL_METHOD}[kind]


# ---- adapters ----------------------------------------------------------------------------------------------------------


def lora_config(context: Context) -> LoraConfig:
    """LoRA-Whisper's, in the decoder alone where the encoder is frozen. Plain names, as folders for others have them."""
    targets = decoder_only(context.ground.base.config, MODULES) if context.ground.frozen_encoder else list(MODULES)
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)


def begin(
    context: Context,
    kind: str,
    candidates: Sequence[Path] = (),
    heard: Similarity | None = None,
    *,
    rate: float,
    seed: int,
) -> tuple[Start, Trained]:
    """A bare base with an adapter on it that starts cold, warm, stacked or as a mixture, ready to be trained."""
    model = context.ground.fresh()
    torch.manual_seed(1000 + seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not similar to what is to be learnt.*")  # that is what is tried out
        # A copy takes its source's configuration: PEFT has shortened the names there, so the same places would not compare equal.
        config = None if kind == "warm" else lora_config(context)
        start = choose_start(kind, list(candidates), heard, config=config, model=model)
    adapted = start.attach(model)
    return start, Trained(adapted, trainable(adapted, rate), _nothing, _no_step)


def save_adapter(
    context: Context, start: Start, adapted: Any, folder: Path, name: str, item: Item, row: Mapping[str, Any]
) -> LanguageAdapter:
    """A trained adapter as a folder that everything which ships can load."""
    start.finish(adapted, folder, context.ground.name)
    write_card(context.ground, folder, name, item, row, start=start.record())
    return LanguageAdapter.load(folder)


def write_card(ground: Ground, folder: Path, name: str, item: Item, row: Mapping[str, Any], **more: Any) -> None:
    """What the registry reads of an adapter: its language, its base and the `row` of its training."""
    card = {
        "format": 1,
        "name": name,
        "language": item.language,
        "domain": None,
        "carrier": None if item.prompt == item.language else item.prompt,
        "base_model": ground.name,
        "base_signature": base_signature(ground.base),
        "num_parameters": row["num_trained"],
        "train_data": name,
        "metrics": {},
        "training": {key: row[key] for key in ("schedule", "method", "train_s", "last_loss")},
        **more,
    }
    (folder / LANGUAGE_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")


def source_adapter(context: Context, name: str, seed: int = 0) -> Path:
    """The folder of a set's own LoRA, trained cold with its share of the steps.

    Args:
        context: of the run.
        name: of the set: "child", "espeak-es".
        seed: each has its own.
    """

    def make(folder: Path) -> None:
        rate = best_rate(context, "lora", "learnt" if name in learnt_sets(context.settings) else "base")
        start, trained = begin(context, "cold", rate=rate, seed=seed)
        items = training_items(context, name)
        schedule = Schedule(steps(context.settings, PER_LANGUAGE), context.settings.batch_size, seed=seed)
        trained, row = train(context, LORA.with_rate(rate), [items], schedule, trained=trained)
        save_adapter(context, start, trained.model, folder, name, items[0], row)

    return context.artifact(f"sources-s{seed}/{name}", make)


def card(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / LANGUAGE_FILE).read_text("utf-8"))
    return read


# ---- similarity --------------------------------------------------------------------------------------------------------


def similarity(context: Context, name: str) -> Similarity:
    """What the base takes a new language for; listened to once."""

    def make(folder: Path) -> None:
        language = language_of(context, name)
        most = min(HEARD_CLIPS, context.settings.test_clips)
        clips = context.ground.data.clips(name, "train", most)
        adapters = {each: language_of(context, each) for each in context.settings.base_sets}
        found = language_similarity(
            context.ground.base, context.ground.processor, clips, language=language, adapters=adapters, num_utterances=most
        )
        folder.mkdir(parents=True)
        (folder / "similarity.json").write_text(json.dumps(found.to_dict()), "utf-8")

    read = json.loads((context.artifact(f"similarity/{name}", make) / "similarity.json").read_text("utf-8"))
    rows = tuple(SimilarLanguage(**{**row, "adapters": tuple(row["adapters"])}) for row in read["rows"])
    return Similarity(**{**read, "rows": rows})


def ranked_sources(context: Context, name: str) -> dict[str, float]:
    """Base set -> how much of a new language's speech the base takes for its language, the most first."""
    heard = heard_languages(similarity(context, name))
    shares = {each: heard[code].share if (code := language_of(context, each)) in heard else 0.0 for each in context.settings.base_sets}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))
