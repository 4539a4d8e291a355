"""Beyond the papers: pools and their bytes, forty languages, mixed batches, merging, layouts, and sentences in two languages.

    beyond-bytes       bytes of an adapter against its error rate: coefficients of a pool, S2-LoRA of its own, LoRA
    beyond-growth      forty languages one by one: a pool and coefficients against a LoRA each
    beyond-mixed       a batch of several languages against each language alone
    beyond-merge       eight of the curve's LoRAs become six, four, two, one
    beyond-layouts     where in the model an adapter sits (on the pocket: the own decoder's encoder is frozen)
    beyond-switching   Kichwa clips with and without Spanish in them

Learning rates are those that `sources` has tuned for a new language. A mean over languages is of error rates in characters: words
differ too much from language to language.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import Ground, Item
from recipes.evidence.growth_speech import GROWTH, NUM_TEST, NUM_TRAIN, Spoken, growth_items
from recipes.evidence.measuring import TOKENS_A_SECOND
from recipes.evidence.methods import ATTENTION, Method, Trained, _no_step, _nothing, trainable
from recipes.evidence.pools import BROAD_POOL, POOL, RANDOM_POOL, PoolKind, joint_pool, over_pool
from recipes.evidence.runs import Context, Run, Settings, measure_sets, train
from recipes.evidence.sources import LORA, begin, best_rate, source_adapter, write_card

PART = "beyond"
NUM_NEW = 3
"""New languages for `beyond-bytes`, the first ones of the settings: one of people, two of espeak-ng."""
NUM_KICHWA = 120
"""Test clips of it, where there are three seeds to measure."""
WEIGHTS = "adapter_model.safetensors"


def _pooled(**chosen: Any) -> Method:
    return Method("s2lora", rank=POOL.rank, **chosen)


METHODS: dict[str, tuple[Method, PoolKind | None]] = {
    "pool": (_pooled(), POOL),
    "lora-r8": (Method("lora", rank=8), None),
    "pool-attention": (_pooled(modules=ATTENTION), POOL),
    "lora-r1": (Method("lora", rank=1), None),
    "s2-r32": (Method("s2lora", rank=32), None),
    "pool-random": (_pooled(), RANDOM_POOL),
    "pool-broad": (_pooled(), BROAD_POOL),
    "s2-r8": (Method("s2lora", rank=8), None),
    "lora-r32": (Method("lora", rank=32), None),
}
"""Arm -> method without its learning rate, and the pool that it uses."""
GROWTH_METHODS = ("pool", "lora-r8", "pool-broad")

SHARES = {"bytes": (0.5, 0.5), "growth": (0.5, 0.25), "layouts": (0.5, 0.5), "switching": (0.5, 0.5)}
"""Steps, and clips of a step, as parts of the settings'. With few clips a step the loss fell further at the same cost."""


def schedule(settings: Settings, part: str, seed: int) -> Schedule:
    steps, clips = SHARES[part]
    return Schedule(max(2, round(settings.num_steps * steps)), max(1, round(settings.batch_size * clips)), seed=seed)


def training_items(context: Context, name: str) -> list[Item]:
    return context.ground.items(name, "train", 8 if context.settings.smoke else None)


def test_items(context: Context, name: str) -> list[Item]:
    most = context.settings.test_clips
    return context.ground.items(name, "test", min(most, NUM_KICHWA) if name == "kichwa" else most)


# ---- the runs ----------------------------------------------------------------------------------------------------------


def runs(settings: Settings) -> list[Run]:
    """One seed of everything, then the other seeds of what has seeds."""
    seeds = list(range(1 if settings.smoke else settings.seeds))
    made: list[Run] = []
    made += bytes_runs(settings, 0)
    made += growth_runs(settings)
    made += merge_runs(settings)
    made += [Run(f"{PART}-mixed", "mixed", 0, mixed)]
    made += switch_runs()
    if settings.ground == "pocket":
        made += layout_runs(settings)
    for seed in seeds[1:]:
        made += bytes_runs(settings, seed)
    return made


# ---- one adapter -------------------------------------------------------------------------------------------------------


def fitted(context: Context, arm: str, items: list[Item], plan: Schedule) -> tuple[Any, dict[str, Any]]:
    """One arm trained on one language: the model, and what a row says of it."""
    method, pool = METHODS[arm]
    method = method.with_rate(best_rate(context, kind_of(arm), "new"))
    trained = None if pool is None else over_pool(context, joint_pool(context, pool), method, plan.seed)
    trained, row = train(context, method, [items], plan, trained=trained)
    if pool is not None:
        row["about"] = {"pool": pool.name, "pool_bytes": (joint_pool(context, pool) / WEIGHTS).stat().st_size}
    row["about"] = {"how": arm} | row.get("about", {})
    return trained.model, row


def kind_of(arm: str) -> str:
    method, pool = METHODS[arm]
    return method.kind if pool is None else "pool"


def save_adapter(ground: Ground, model: Any, folder: Path, name: str, item: Item, notes: dict[str, Any]) -> None:
    """A trained adapter as a folder that everything which ships can load, with `notes` beside it."""
    # Without save_embedding_layers=False, PEFT asks the Hub whether the base's vocabulary has grown.
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter], save_embedding_layers=False)
    write_card(ground, folder, name, item, notes)
    (folder / "row.json").write_text(json.dumps(notes), "utf-8")


# ---- bytes against errors ----------------------------------------------------------------------------------------------


def bytes_runs(settings: Settings, seed: int) -> list[Run]:
    """Every arm on every new language."""
    part, arms, names = f"{PART}-bytes", list(METHODS), settings.new_sets[:NUM_NEW]
    if settings.smoke:
        arms, names = ["pool", "lora-r8", "pool-random"], names[:1]
    made = [Run(part, f"base-{name}", 0, partial(base, name=name)) for name in names] if seed == 0 else []
    return made + [Run(part, f"{arm}-{name}", seed, partial(bytes_arm, arm=arm, name=name, seed=seed)) for arm in arms for name in names]


def base(context: Context, name: str) -> dict[str, Any]:
    """The base as it is."""
    return bare(context, {name: test_items(context, name)}, target=name)


def bare(context: Context, sets: dict[str, list[Item]], tokens_a_second: float = TOKENS_A_SECOND, **about: Any) -> dict[str, Any]:
    """A row of the base without anything."""
    sets_row = measure_sets(context, context.ground.base, sets, tokens_a_second=tokens_a_second)
    return {"method": Method("none").to_dict(), "about": {"how": "base"} | about, "sets": sets_row}


def bytes_arm(context: Context, arm: str, name: str, seed: int) -> dict[str, Any]:
    """One arm on one language."""
    model, row = fitted(context, arm, training_items(context, name), schedule(context.settings, "bytes", seed))
    row["about"]["target"] = name
    row["sets"] = measure_sets(context, model, {name: test_items(context, name)})
    return row


# ---- forty languages ---------------------------------------------------------------------------------------------------

BYTES_A_SECOND = 60
"""Tokens that a decoder may write a second where letters are bytes: Georgian takes three for each."""


def growth_runs(settings: Settings) -> list[Run]:
    """Language by language: the base, coefficients, a LoRA. Each takes a hundred clips."""
    part, languages = f"{PART}-growth", GROWTH[:2] if settings.smoke else GROWTH
    return [
        Run(part, f"{arm}-{spoken.name}", 0, partial(growth_arm, arm=arm, spoken=spoken))
        for spoken in languages
        for arm in ("base", *GROWTH_METHODS)
    ]


def growth_arm(context: Context, arm: str, spoken: Spoken) -> dict[str, Any]:
    """One language of the curve."""
    about = {"target": spoken.name, "language": spoken.language, "known": spoken.known, "latin": spoken.latin}
    sets = {spoken.name: growth_test(context, spoken)}
    if arm == "base":
        return bare(context, sets, BYTES_A_SECOND, **about)
    folder = growth_adapter(context, arm, spoken)
    row: dict[str, Any] = json.loads((folder / "row.json").read_text("utf-8"))
    row["about"] |= about
    return row | {"sets": measure_sets(context, with_adapter(context, folder), sets, tokens_a_second=BYTES_A_SECOND)}


def growth_test(context: Context, spoken: Spoken) -> list[Item]:
    return growth_items(context.ground, spoken, "test", min(NUM_TEST, context.settings.test_clips))


def growth_adapter(context: Context, arm: str, spoken: Spoken) -> Path:
    """The folder of a language's adapter: the curve measures it, mixed batches and merging use it."""

    def make(folder: Path) -> None:
        items = growth_items(context.ground, spoken, "train", 8 if context.settings.smoke else NUM_TRAIN)
        model, row = fitted(context, arm, items, schedule(context.settings, "growth", 0))
        save_adapter(context.ground, model, folder, spoken.name.lower(), items[0], row)

    return context.artifact(f"growth-{arm}-{spoken.name}", make)


def with_adapter(context: Context, folder: Path) -> Any:
    """A bare base with a saved adapter, over its pool if it is one of coefficients."""
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    about = json.loads((folder / "row.json").read_text("utf-8"))["about"]
    if "pool" not in about:
        return PeftModel.from_pretrained(context.ground.fresh(), str(folder)).eval()
    method, pool = next(each for each in METHODS.values() if each[1] is not None and each[1].name == about["pool"])
    assert pool is not None
    model = over_pool(context, joint_pool(context, pool), method, 0).model
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    return model.eval()


# ---- mixed batches -----------------------------------------------------------------------------------------------------

MIXED = (("kichwa", "lora-r8"), ("ca", "pool"), ("fi", "lora-r8"), ("sv", "pool"))
"""Languages of a mixed batch and how each is adapted. Rows without an adapter, of the first language, go with them."""
ROWS_EACH = 4
NUM_TIMED = 3


def mixed(context: Context) -> dict[str, Any]:
    """A batch of several languages: does every row get what its language gets alone, and what does it cost?"""
    from whisper_moe.language_table import LanguageTable
    from whisper_moe.mixed_batch import generate_mixed

    spoken = {each.name: each for each in GROWTH}
    chosen = MIXED[:2] if context.settings.smoke else MIXED
    folders = {name: growth_adapter(context, arm, spoken[name]) for name, arm in chosen}
    parts: dict[str | None, list[Item]] = {name: growth_test(context, spoken[name])[:ROWS_EACH] for name in folders}
    parts[None] = parts[chosen[0][0]]
    rows = [(name, item) for turn in range(ROWS_EACH) for name, items in parts.items() for item in items[turn : turn + 1]]
    model = context.ground.fresh().eval()
    table = LanguageTable.attach(model)
    table.add_pool(joint_pool(context))
    for name, folder in folders.items():
        table.add(name, folder, carrier=parts[name][0].prompt)
    # As in `measuring`, and one limit for all: a text that does not end is cut at the same place, alone or not.
    longest = int(min(model.config.max_target_positions - 8, 14 + 15 * max(item.seconds for _, item in rows)))

    def in_table(chosen: Sequence[tuple[str | None, Item]]) -> list[tuple[int, ...]]:
        heard = _whole_windows(context.ground, model, [item for _, item in chosen])
        prompts = [item.prompt for _, item in chosen]
        written = generate_mixed(
            table, heard.get("input_features"), [name for name, _ in chosen], encoder_outputs=heard.get("states"),
            prompt_languages=prompts, return_timestamps=False, max_length=longest,
        )  # fmt: skip
        return [row.tokens for row in written]

    adapted = {name: with_adapter(context, folder) for name, folder in folders.items()} | {None: context.ground.base}

    def alone(name: str | None) -> list[tuple[int, ...]]:
        heard = _whole_windows(context.ground, model, parts[name])
        given = {"input_features": heard["input_features"]} if "input_features" in heard else _as_outputs(heard["states"])
        prompt = parts[name][0].prompt
        tokens = adapted[name].generate(**given, language=prompt, task="transcribe", max_length=longest, num_beams=1, do_sample=False)
        return [_only_text(context.ground, row) for row in tokens.tolist()]

    told = [_only_text(context.ground, tokens) for tokens in in_table(rows)]
    same_table = _compared(
        rows, told, {name: [_only_text(context.ground, t) for t in in_table([(name, i) for i in parts[name]])] for name in parts}
    )
    same_peft = _compared(rows, told, {name: alone(name) for name in parts})
    times = _interleaved(partial(in_table, rows), lambda: [alone(name) for name in parts], 1 if context.settings.smoke else NUM_TIMED)
    logits = _logits(context, table, adapted, rows, parts)
    about = {
        "adapters": ", ".join(f"{name} {arm}" for name, arm in chosen) + f", {chosen[0][0]} base",
        "num_texts": len(rows),
        "equal_texts": same_peft,
        "equal_texts_in_table": same_table,
        "equal_bits": logits["with_peft"]["rows_equal"] == len(rows),
        "equal_bits_in_table": logits["in_table"]["rows_equal"] == len(rows),
        "largest_logit_difference": logits["with_peft"]["largest_difference"],
        "logit_spread": logits["spread"],
        "mixed_s": statistics.median(times[0]),
        "one_by_one_s": statistics.median(times[1]),
        "time_ratio": round(statistics.median(times[1]) / statistics.median(times[0]), 3),
    }
    return {"about": about, "logits": logits, "times": times}


def _whole_windows(ground: Ground, model: Any, items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """What items are in whole windows, silence behind them: states, or features where the encoder is adapted too."""
    length = model.config.max_source_positions * (1 if ground.frozen_encoder else 2)
    heard = torch.stack([torch.cat([item.heard, item.heard[-1:].expand(length - len(item.heard), -1)]) for item in items]).float()
    return {"states": heard} if ground.frozen_encoder else {"input_features": heard.transpose(1, 2)}


def _as_outputs(states: torch.Tensor) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutput

    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}


def _only_text(ground: Ground, tokens: Iterable[int]) -> tuple[int, ...]:
    special = set(ground.processor.tokenizer.all_special_ids)
    return tuple(token for token in tokens if token not in special)


def _compared(
    rows: Sequence[tuple[str | None, Item]], told: Sequence[tuple[int, ...]], alone: dict[str | None, list[tuple[int, ...]]]
) -> int:
    """In how many rows of the mixed batch the tokens are those of the language alone."""
    waiting = {name: iter(each) for name, each in alone.items()}
    return sum(tokens == next(waiting[name]) for (name, _), tokens in zip(rows, told, strict=True))


@torch.inference_mode()
def _logits(
    context: Context,
    table: Any,
    adapted: dict[str | None, Any],
    rows: Sequence[tuple[str | None, Item]],
    parts: dict[str | None, list[Item]],
) -> dict[str, Any]:
    """The same labels through the mixed batch, each language alone in the table, and alone with PEFT: how far apart the logits are."""

    def logits(model: Any, items: Sequence[Item]) -> torch.Tensor:
        width = max(len(item.labels) for _, item in rows)
        start, end = model.config.decoder_start_token_id, model.config.pad_token_id
        tokens = torch.tensor([[start, *item.labels] + [end] * (width - len(item.labels)) for item in items])
        heard = _whole_windows(context.ground, model, items)
        given = _as_outputs(heard["states"]) if "states" in heard else heard
        return model(**given, decoder_input_ids=tokens, use_cache=False).logits

    with table.rows([name for name, _ in rows]):
        together = logits(table.model, [item for _, item in rows])
    found: dict[str, Any] = {}
    for way in ("in_table", "with_peft"):
        largest, equal = 0.0, 0
        for name, items in parts.items():
            own = together[[at for at, (each, _) in enumerate(rows) if each == name]]
            if way == "in_table":
                with table.rows([name] * len(items)):
                    alone = logits(table.model, items)
            else:
                alone = logits(adapted[name], items)
            largest = max(largest, float((own - alone).abs().max()))
            equal += int((own == alone).flatten(1).all(1).sum())
        found[way] = {"largest_difference": largest, "rows_equal": equal}
    return found | {"spread": round(float(together.std()), 3)}


def _interleaved(first: Callable[[], Any], second: Callable[[], Any], times: int) -> tuple[list[float], list[float]]:
    """Seconds of two ways, in turns, so that a busy machine is busy for both."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for way, seconds in zip((first, second), took, strict=True):
            started = time.perf_counter()
            way()
            seconds.append(round(time.perf_counter() - started, 3))
    return took


# ---- merging -----------------------------------------------------------------------------------------------------------

MERGED = ("kichwa", "ca", "fi", "sv", "cy", "tr", "cs", "da")
"""Languages of the curve whose LoRAs are merged."""
MERGED_TO = (8, 6, 4, 2, 1)


def merge_runs(settings: Settings) -> list[Run]:
    """Eight LoRAs, and what is left of them."""
    numbers = (2, 1) if settings.smoke else MERGED_TO
    return [Run(f"{PART}-merge", f"to-{number}", 0, partial(merged, number=number)) for number in numbers]


def merged(context: Context, number: int) -> dict[str, Any]:
    """`merge_similar` down to so many adapters, each language written by the one that now speaks for it."""
    from whisper_moe.growth import merge_similar

    spoken = {each.name: each for each in GROWTH}
    names = MERGED[:2] if context.settings.smoke else MERGED
    sources = {name: growth_adapter(context, "lora-r8", spoken[name]) for name in names}
    work = context.settings.work / "merged" / f"to-{number}"
    shutil.rmtree(work, ignore_errors=True)
    if number == len(names):
        growth: dict[str, Any] = {}
        now, size = sources, sum((folder / WEIGHTS).stat().st_size for folder in sources.values())
    else:
        made = merge_similar(list(sources.values()), work, number=number)
        growth, size = made.to_dict(), made.bytes_after
        by_name = {row["name"]: row["folder"] for row in json.loads((work / "merged_adapters.json").read_text("utf-8"))["adapters"]}
        now = {name: work / by_name[name.lower()] for name in names}
    sets: dict[str, Any] = {}
    for name in names:
        sets |= measure_sets(
            context, _with_lora(context, now[name]), {name: growth_test(context, spoken[name])}, tokens_a_second=BYTES_A_SECOND
        )
    shutil.rmtree(work, ignore_errors=True)
    groups = " / ".join(" ".join(name for name in names if now[name] == folder) for folder in dict.fromkeys(now.values()))
    about = {"num_adapters": number, "groups": groups}
    return {"about": about, "num_bytes": size, "growth": growth, "sets": sets}


def _with_lora(context: Context, folder: Path) -> Any:
    from whisper_moe.registry import load_folder

    return load_folder(context.ground.fresh(), folder).eval()


# ---- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = ("everything", "decoder-only", "upper-private", "both")
"""The last: private upper layers over shared lower ones, and the decoder's alone."""
LAYOUT_SETS = ("kichwa", "espeak-ca")
PRIVATE_LAYERS = 1


def layout_runs(settings: Settings) -> list[Run]:
    """The base, and places for a LoRA of rank 8, on two languages."""
    names = LAYOUT_SETS[:1] if settings.smoke else LAYOUT_SETS
    part = f"{PART}-layouts"
    made = [Run(part, f"base-{name}", 0, partial(base, name=name)) for name in names]
    return made + [Run(part, f"{layout}-{name}", 0, partial(layout_arm, layout=layout, name=name)) for layout in LAYOUTS for name in names]


def layout_arm(context: Context, layout: str, name: str) -> dict[str, Any]:
    """A layout on a language: errors, bytes, and whether a clip is encoded once whatever languages are tried on it."""
    from whisper_moe.layouts import compose_adapters, decoder_only, lower_shared, touches_encoder, upper_private

    ground, items = context.ground, training_items(context, name)
    config, plan = ground.base.config, schedule(context.settings, "layouts", 0)
    work = context.settings.work / "layouts" / f"{layout}-{name}"
    shutil.rmtree(work, ignore_errors=True)
    below, above = lower_shared(config, PRIVATE_LAYERS), upper_private(config, PRIVATE_LAYERS)
    shared_bytes = 0
    if layout in ("everything", "decoder-only"):
        trained, row = _train_lora(
            context, ground.fresh(), decoder_only(config) if layout == "decoder-only" else below + above, [items], plan
        )
        folder, model = work / "private", trained.model
        save_adapter(ground, model, folder, name, items[0], row)
    else:
        if layout == "both":
            below, above = ([place for place in part if place.startswith("decoder.")] for part in (below, above))
        shared = _shared_part(context, layout, below, plan)
        shared_bytes = (shared / WEIGHTS).stat().st_size
        merged_base = _with_lora(context, shared).merge_and_unload()
        merged_base.requires_grad_(False)
        trained, row = _train_lora(context, merged_base, above, [items], plan)
        save_adapter(ground, trained.model, work / "private", name, items[0], row)
        folder = compose_adapters(shared, work / "private", work / "composed")
        model = _with_lora(context, folder)
    row["about"] = {"how": layout, "target": name, "one_pass": not touches_encoder(folder), "shared_bytes": shared_bytes}
    row["sets"] = measure_sets(context, model, {name: test_items(context, name)})
    shutil.rmtree(work, ignore_errors=True)
    return row


def _shared_part(context: Context, layout: str, places: list[str], plan: Schedule) -> Path:
    def make(folder: Path) -> None:
        sets = [training_items(context, each) for each in context.settings.base_sets]
        trained, row = _train_lora(context, context.ground.fresh(), places, sets, plan)
        save_adapter(context.ground, trained.model, folder, "shared", sets[0][0], row)

    return context.artifact(f"layout-{layout}", make)


def _train_lora(
    context: Context, model: Any, modules: list[str], items: list[list[Item]], plan: Schedule
) -> tuple[Trained, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    method = Method("lora", rank=8, modules=tuple(modules), learning_rate=best_rate(context, "lora", "new"))
    torch.manual_seed(1000 + plan.seed)
    adapted = get_peft_model(model, LoraConfig(r=method.rank, lora_alpha=method.rank, target_modules=modules))
    trained = Trained(adapted, trainable(adapted, method.learning_rate), _nothing, _no_step)
    return train(context, method, items, plan, trained=trained)


# ---- two languages in one clip -----------------------------------------------------------------------------------------

SWITCH_STARTS: dict[str, tuple[str, ...]] = {
    "cold": (),
    "warm-es": ("espeak-es",),
    "warm-de": ("kerstin",),
    "moe": ("espeak-es", "espeak-it", "espeak-pl"),
}
"""Arm -> sets of the adapters that it begins from; the mixture's experts."""


def switch_runs() -> list[Run]:
    """The base and four starts, measured on both halves of Kichwa's test set."""
    return [
        Run(f"{PART}-switching", arm, 0, partial(switch_arm, arm=arm)) for arm in ("base", *SWITCH_STARTS)
    ]  # fmt: skip


def switched_items(context: Context) -> dict[str, list[Item]]:
    """Kichwa's test clips in two sets: those in which Spanish occurs, by the data's own flag, and those without."""
    import pyarrow.parquet as parquet

    from whisper_moe.data import Clip, clips_from_rows

    data, source = context.ground.data, context.ground.data.source("kichwa")
    rows = parquet.read_table(data.speech / source.source / "test.parquet").to_pylist()
    flagged = clips_from_rows([row for row in rows if row["code_switch"]], language=source.language, name="kichwa-switched")

    def known_by(clip: Clip) -> tuple[str, bytes]:
        return clip.text, clip.samples.tobytes()

    # A clip does not keep its flag. It is known again by what is said and heard in it.
    switched = {known_by(clip) for clip in flagged.clips}
    items, clips = context.ground.items("kichwa", "test"), data.clips("kichwa", "test").clips
    found: dict[str, list[Item]] = {"kichwa-switched": [], "kichwa-plain": []}
    for item, clip in zip(items, clips, strict=True):
        found["kichwa-switched" if known_by(clip) in switched else "kichwa-plain"].append(item)
    smoke = context.settings.smoke
    return {name: each[: context.settings.test_clips] if smoke else each for name, each in found.items()}


def switch_arm(context: Context, arm: str) -> dict[str, Any]:
    """One start, trained on all of Kichwa's clips and measured on both halves."""
    if arm == "base":
        return bare(context, switched_items(context))
    plan, rate = schedule(context.settings, "switching", 0), best_rate(context, "lora", "new")
    sources = [source_adapter(context, name) for name in SWITCH_STARTS[arm]]
    start, trained = begin(context, arm.partition("-")[0], sources, rate=rate, seed=plan.seed)
    trained, row = train(context, LORA.with_rate(rate), [training_items(context, "kichwa")], plan, trained=trained)
    about = {"how": arm, "sources": ", ".join(source.name for source in start.sources)}
    return row | {"about": about, "sets": measure_sets(context, trained.model, switched_items(context))}
