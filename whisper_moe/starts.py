"""How a new adapter begins: from nothing, as a copy of a near one, on top of a near one, or as a mixture of several.

    start = choose_start("auto", candidates, similarity, hours, config, model=model)   # or "cold", "warm", "stacked", "moe"
    adapted = start.attach(model)               # or: get_peft_model(model, start.config()), then start.fill(adapted)
    ...                                         # train `adapted` as any PEFT model; its adapter is called "default"
    start.finish(adapted, out, base_id)         # writes the adapter's two files; a stacked one becomes one plain LoRA
    row["start"] = start.record()               # for language_adapter.json

`candidates` are `LanguageAdapter`s or folders, `similarity` is what `language_similarity` says of the new clips (with all languages of
the base as candidates, its default), `hours` how much speech there is to train on, `config` what a cold start would train. Without
`config` a warm start takes its source's, the others LoRA-Whisper's. What cannot work is refused by `choose_start`, before a model is
touched; if `attach` fails, the model is as it was. Where the adapter needs a pool, only `attach` puts it there.

    kind      frozen                         trained                                     saved as
    cold      nothing                        a new adapter of any PEFT method            that method
    warm      nothing (or the same pool)     a copy of the nearest adapter               its method
    stacked   the nearest LoRA or S2-LoRA    a new LoRA on top of it                     one LoRA, ranks side by side, exact
    moe       up to three LoRA or S2-LoRA    a new LoRA, and a router that begins at     LoRA-MoE, experts inside
                                             their similarity
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from whisper_moe.adapter_files import CARD_FILE, CONFIG_FILE, HARMLESS_INITS, LORA, S2LORA, WEIGHTS_FILE, read_adapter
from whisper_moe.languages import language_code, language_name
from whisper_moe.moe import LoraMoeConfig, to_lora  # registers the method with PEFT
from whisper_moe.registry import AdapterSwitch, LanguageAdapter, check_fit
from whisper_moe.similarity import WEAK_EVIDENCE, Similarity

KINDS = ("auto", "cold", "warm", "stacked", "moe")
ADAPTER_NAME = "default"  # of the adapter that is trained
POOL_NAME = "pool"  # of the pool beside it, if its configuration does not name one

# The rule of "auto". Only the number of experts is a paper's; the rest is ours, and not measured beyond docs/starts.md.
SIMILARITY_FLOOR = WEAK_EVIDENCE
"""Least share of what is heard for a language to be a source. A dissimilar start can be worse than none. Ours."""
SIMILAR_TO_NEAREST = 0.5
"""A language counts as similar too if its share is at least this part of the nearest one's: then a mixture beats a choice. Ours."""
MOST_EXPERTS = 3
"""Experts of a mixture: the three most similar languages (LoRA-Whisper, Song et al. 2024)."""
ROUTER_HOURS = 1.0
"""Least hours of speech for a mixture: its routers have a weight for every input of every adapted weight to learn. Ours."""
WARM_HOURS = 10.0
"""Least hours for a warm start. With less, what the source knew is overwritten more easily than it is kept, and a frozen source under
a new LoRA was found safer; where the border lies is ours (FLEURS has about as much of each of its languages)."""
LEAST_PRIOR = 0.05
"""Least share of an expert in the gates that a mixture begins with: an expert whose gate is 0 gets no gradient. Ours."""


@dataclass(frozen=True)
class Heard:
    """How much of the new language's speech the base takes for another language, the new language's own token left out.

    Args:
        share: Of everything heard, from 0 to 1.
        low, high: 95 % interval over utterances; None for a single one.
        spread: Standard deviation from utterance to utterance; None for a single one.
    """

    share: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Source:
    """An adapter that a start begins from.

    Args:
        name: What it is called.
        path: Its folder.
        sha256: Of its weights' file, so that the record says which weights they were.
        language: The language it writes; None if its folder does not say.
        peft_type: PEFT's name of its method.
    """

    name: str
    path: Path
    sha256: str
    language: str | None
    peft_type: str


@dataclass(frozen=True)
class Start:
    """How an adapter begins. Made by `choose_start`, which checks that it can work.

    Args:
        kind: "cold", "warm", "stacked" or "moe".
        reason: Why, in one plain sentence or two.
        peft_config: What `config` gives copies of.
        sources: The adapters it begins from, most similar first; none for a cold start.
        similarity: Language -> how similar, as far as it was measured.
        hours: Of training speech, if that was said.
        pool: Folder of the pool of an adapter that owns coefficients only.
    """

    kind: str
    reason: str
    peft_config: PeftConfig = field(repr=False)
    sources: tuple[Source, ...] = ()
    similarity: Mapping[str, Heard] = field(default_factory=dict)
    hours: float | None = None
    pool: Path | None = None

    def config(self) -> PeftConfig:
        """The configuration to train, for `get_peft_model`. A new copy each time: PEFT writes into it."""
        return copy.deepcopy(self.peft_config)

    def attach(self, model: nn.Module) -> PeftModel:
        """Put the adapter on a bare model, its pool first if it has one, and fill it.

        Raises:
            ValueError: The sources do not fit this model. The model is as it was.
        """
        switch = AdapterSwitch(model)  # knows what the bare model was
        try:
            adapted = get_peft_model(model, self.config()) if self.pool is None else self._over_pool(model, self.pool)
            self.fill(adapted)
        except BaseException as error:
            switch.unload()
            if isinstance(error, (RuntimeError, KeyError)):
                raise ValueError(f"A {self.kind} start does not fit this model. {error}") from error
            raise
        return adapted

    def fill(self, adapted: PeftModel) -> None:
        """Copy the source's weights into the adapter, for a warm start; the other kinds have what they need from `config()`.

        Raises:
            ValueError: The adapter is not of the source's method, rank and targets.
        """
        if self.kind == "warm":
            _copy_weights(self.sources[0].path, adapted, ADAPTER_NAME)

    def finish(self, adapted: PeftModel, out: str | Path, base_id: str | None = None) -> Path:
        """Write the trained adapter's configuration and weights. A pool beside it is not written.

        Args:
            adapted: What `attach` returned, trained.
            out: The folder.
            base_id: Public name of the base.
        """
        out = Path(out)
        adapted.peft_config[ADAPTER_NAME].base_model_name_or_path = base_id
        if self.kind == "stacked":
            to_lora(adapted, out, adapter_name=ADAPTER_NAME)
        else:
            # Without save_embedding_layers=False, PEFT asks the Hub whether the base's vocabulary has grown.
            adapted.save_pretrained(str(out), selected_adapters=[ADAPTER_NAME], save_embedding_layers=False)
        return out

    def record(self) -> dict[str, Any]:
        """Plain values for `language_adapter.json`: no paths, but the hash of every source."""
        sources = [
            {"name": source.name, "language": source.language, "method": source.peft_type, "sha256": source.sha256}
            for source in self.sources
        ]
        row: dict[str, Any] = {"kind": self.kind, "reason": self.reason, "sources": sources}
        if self.pool is not None:
            row["pool_sha256"] = _sha256(self.pool)
        if self.hours is not None:
            row["hours"] = round(self.hours, 3)
        if self.similarity:
            row["similarity"] = {code: asdict(heard) for code, heard in self.similarity.items()}
        return row

    def _over_pool(self, model: nn.Module, pool: Path) -> PeftModel:
        config = self.config()
        pool_config, pool_name = _read_config(pool), getattr(config, "pool", None) or POOL_NAME
        pool_config.inference_mode = True
        adapted = PeftModel(model, pool_config, pool_name)
        _copy_weights(pool, adapted, pool_name)
        adapted.add_adapter(ADAPTER_NAME, config)  # refuses another pool than the one the coefficients were trained on
        adapted.set_adapter(ADAPTER_NAME)
        return adapted


# ---- choosing ----------------------------------------------------------------------------------------------------------


def choose_start(
    kind: str = "auto",
    candidates: Sequence[LanguageAdapter | str | Path] = (),
    similarity: Similarity | None = None,
    hours: float | None = None,
    config: PeftConfig | None = None,
    *,
    model: nn.Module | None = None,
    pool: str | Path | None = None,
) -> Start:
    """Decide how a new adapter begins.

    "auto" is cautious, since a start from a dissimilar language can be worse than none. It starts cold if no candidate's language has
    at least `SIMILARITY_FLOOR` of what is heard (at the low end of the interval, where there is one). Otherwise: a mixture if several
    languages are similar and there is speech enough to learn a router (`ROUTER_HOURS`); a warm start if there is a lot of speech
    (`WARM_HOURS`); stacked with less, or where a copy would not have the rank and targets that `config` asks for. An adapter for the
    language itself is not considered, since its own token takes no part in the comparison: ask for a warm or stacked start from it.

    Args:
        kind: "auto", "cold", "warm", "stacked" or "moe".
        candidates: adapters to begin from, for the same base. Of several, the most similar are taken.
        similarity: of the new clips, from `language_similarity`. "auto" needs it; without it a warm or stacked start takes the one
            candidate there is, and a mixture gives each of its candidates the same weight at the start.
        hours: of speech to train on; None: not known, which "auto" takes for little.
        config: what a cold start would train. A warm start must have its source's rank and targets, so leave it out there. A stacked
            start and a mixture train a new LoRA of its rank and targets, and of those that the sources adapt.
        model: the base, bare or wrapped; sources that were made for another are refused.
        pool: folder of the pool, where the source or `config` is a pooled S2-LoRA.

    Raises:
        ValueError: The kind is unknown, or cannot work with these candidates; the message says why and what would.
    """
    if kind not in KINDS:
        raise ValueError(f"The start must be one of {', '.join(KINDS)}, got {kind!r}.")
    if hours is not None and not (math.isfinite(hours) and hours >= 0):
        raise ValueError(f"hours must be 0 or above, got {hours!r}.")
    _check_cold(config)
    heard = {} if similarity is None else heard_languages(similarity)
    folder = None if pool is None else Path(pool)
    known = _Choice(heard, hours, config, folder, None if similarity is None else similarity.language)
    if kind == "cold":
        return known.start("cold", "A cold start was asked for.", ())
    if kind == "auto":
        return _automatic(known, candidates, similarity, model)
    sources = known.ranked([_read_source(candidate, model) for candidate in candidates])
    return _asked_for(known, kind, sources, measured=similarity is not None)


def heard_languages(similarity: Similarity) -> dict[str, Heard]:
    """Language -> its share of all that is heard in the new language's clips, most first; languages without a token are left out.

    The report's probabilities are shares among its candidates alone: with one candidate that is 100 %, however foreign it sounds.
    """
    others = max(1.0 - (similarity.own or 0.0), WEAK_EVIDENCE)  # a base that knows the language leaves little to compare by
    whole = min(1.0, similarity.share / others)

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * whole

    return {
        row.language: Heard(row.probability * whole, scaled(row.low), scaled(row.high), scaled(row.spread))
        for row in similarity.rows
        if row.probability is not None
    }


@dataclass(frozen=True)
class _Choice:
    """What is known when a start is chosen."""

    heard: dict[str, Heard]
    hours: float | None
    config: PeftConfig | None
    pool: Path | None
    own: str | None = None
    """The new language itself, whose token was masked when others were compared with it."""

    def start(self, kind: str, reason: str, sources: Sequence[Source]) -> Start:
        """The start, checked. Raises `ValueError` if it cannot work."""
        needed_pool = None
        if kind == "cold":
            _check_base_stays(self.config)
            config = _new_config(self.config)
        elif kind == "warm":
            config = _warm_config(sources[0], self.config)
        else:
            config = _mixture_config(kind, sources, self.config, self.prior(sources))
        if getattr(config, "pool", None) is not None:
            if self.pool is None:
                raise ValueError(f"The adapter needs the A and B of its pool {config.pool!r}. Give the pool's folder: pool=...")
            needed_pool = self.pool
        elif self.pool is not None:
            raise ValueError(
                f"A pool was given ({self.pool.name!r}), and what this {kind} start trains uses none. Leave the pool out, or train "
                "coefficients over it: peft_s2lora.S2LoraConfig(pool=...)."
            )
        return Start(kind, reason, config, tuple(sources), self.told(sources), self.hours, needed_pool)

    def start_or_problem(self, kind: str, reason: str, sources: Sequence[Source]) -> Start | str:
        """The start, or why it cannot work, in words that may stand in a record: without paths of this machine."""
        try:
            return self.start(kind, reason, sources)
        except ValueError as error:
            return _without_paths(error, [source.path for source in sources])

    def told(self, sources: Sequence[Source], most: int = 5) -> dict[str, Heard]:
        """The most similar languages and those of the sources."""
        of_sources = {source.language for source in sources}
        return {code: heard for at, (code, heard) in enumerate(self.heard.items()) if at < most or code in of_sources}

    def share(self, source: Source) -> float:
        heard = None if source.language is None else self.heard.get(source.language)
        return 0.0 if heard is None else heard.share

    def ranked(self, sources: Sequence[Source]) -> list[Source]:
        return sorted(sources, key=self.share, reverse=True)  # keeps the given order among equals

    def prior(self, sources: Sequence[Source]) -> dict[str, float]:
        """Gates to begin with."""
        shares = [self.share(source) for source in sources]
        total = sum(shares)
        parts = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
        return {source.name: max(part, LEAST_PRIOR) for source, part in zip(sources, parts, strict=True)}

    def similar(self, source: Source) -> str:
        heard = None if source.language is None else self.heard.get(source.language)
        spoken = "a language its folder does not name" if source.language is None else f"{language_name(source.language)}"
        return f"{source.name!r} ({spoken}{'' if heard is None else f', {heard.share:.0%} of what is heard'})"


def _automatic(
    known: _Choice, candidates: Sequence[LanguageAdapter | str | Path], similarity: Similarity | None, model: nn.Module | None
) -> Start:
    read = [_source_or_problem(candidate, model) for candidate in candidates]
    usable = [source for source in read if isinstance(source, Source)]
    problems = [problem for problem in read if isinstance(problem, str)]
    left_out = f" {len(problems)} could not be used, the first because: {problems[0]}" if problems else ""

    def cold(why: str) -> Start:
        return known.start("cold", why + left_out, ())

    if not usable:
        return cold("There is no adapter to begin from.")
    if similarity is None:
        raise ValueError("start='auto' decides by similarity: pass what language_similarity says of the clips, or name the kind.")
    sources = [source for source in known.ranked(usable) if _is_similar(known, source)]
    if not sources:
        nearest = known.ranked(usable)[0]
        return cold(
            f"No adapter's language is similar enough: the nearest is {known.similar(nearest)}, and below {SIMILARITY_FLOOR:.0%} (at the "
            "low end of the interval) a start from it may be worse than none."
        )
    nearest = sources[0]
    several = [source for source in sources if known.share(source) >= SIMILAR_TO_NEAREST * known.share(nearest)]
    of_language: dict[str | None, Source] = {}
    for source in several:
        of_language.setdefault(source.language, source)
    one_each = list(of_language.values())[:MOST_EXPERTS]
    spoken = _amount(known.hours)
    near = f"The nearest adapter is {known.similar(nearest)}"
    wishes: list[tuple[str, str, Sequence[Source]]] = []
    if len(one_each) > 1 and known.hours is not None and known.hours >= ROUTER_HOURS:
        listed = ", ".join(known.similar(source) for source in one_each)
        wishes.append(("moe", f"Several adapters are similar: {listed}; with {spoken} a router can learn to mix them.", one_each))
    warm = ("warm", f"{near}; with {spoken} a copy of it can be trained further.", [nearest])
    stacked = ("stacked", f"{near}; with {spoken} it stays frozen under a new LoRA, which is safer than training a copy.", [nearest])
    wishes += [warm, stacked] if known.hours is not None and known.hours >= WARM_HOURS else [stacked, warm]
    refused = ""
    for kind, reason, chosen in wishes:
        found = known.start_or_problem(kind, f"{reason}{refused}{left_out}", chosen)
        if isinstance(found, Start):
            return found
        refused += f" Not {kind}: {found}"
    return cold(f"{near}, but nothing can begin from it.{refused}")


def _amount(hours: float | None) -> str:
    if hours is None:
        return "an unknown amount of speech"
    return f"{60 * hours:.0f} minutes of speech" if hours < 1 else f"{hours:.1f} hours of speech"


def _is_similar(known: _Choice, source: Source) -> bool:
    heard = None if source.language is None else known.heard.get(source.language)
    return heard is not None and (heard.share if heard.low is None else heard.low) >= SIMILARITY_FLOOR


def _asked_for(known: _Choice, kind: str, sources: list[Source], measured: bool) -> Start:
    if not sources:
        raise ValueError(f"A {kind} start needs adapters to begin from, and there are none. Name their folders (sources), or start cold.")
    names = ", ".join(source.name for source in sources)
    most = MOST_EXPERTS if kind == "moe" else 1
    if len(sources) > most and not measured:
        raise ValueError(
            f"A {kind} start takes {'up to ' if most > 1 else ''}{most} of {len(sources)} adapters ({names}), and without similarity "
            "nobody knows which. Pass what language_similarity says of the clips, or name only those you want."
        )
    chosen = sources[:most]
    why = ", ".join(known.similar(source) for source in chosen)
    start = known.start(kind, f"A {kind} start was asked for, from {why}.", chosen)
    if measured and not _is_similar(known, chosen[0]) and chosen[0].language != known.own:
        warnings.warn(
            f"{known.similar(chosen[0])} is not similar to what is to be learnt (below {SIMILARITY_FLOOR:.0%}): a {kind} start may be "
            "worse than a cold one.",
            stacklevel=3,
        )
    return start


# ---- sources -----------------------------------------------------------------------------------------------------------


def _source_or_problem(candidate: LanguageAdapter | str | Path, model: nn.Module | None) -> Source | str:
    try:
        return _read_source(candidate, model)
    except ValueError as error:
        return _without_paths(error, [candidate.path if isinstance(candidate, LanguageAdapter) else Path(candidate)])


def _without_paths(error: ValueError, folders: Sequence[Path]) -> str:
    text = str(error)
    for folder in folders:
        text = text.replace(str(folder), folder.name)
    return text


def _read_source(candidate: LanguageAdapter | str | Path, model: nn.Module | None) -> Source:
    """What a start must know of an adapter. Raises `ValueError` if it is none, or was made for another base."""
    folder = candidate.path if isinstance(candidate, LanguageAdapter) else Path(candidate)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} is no adapter to begin from: it lacks {', '.join(missing)}. Give a folder that training wrote.")
    config = _read_config(folder)
    peft_type = _method(config)
    if not isinstance(candidate, LanguageAdapter) and (folder / CARD_FILE).is_file():
        candidate = LanguageAdapter.load(folder)
    if not isinstance(candidate, LanguageAdapter):  # a folder that PEFT wrote
        return Source(folder.resolve().name, folder, _sha256(folder), None, peft_type)
    if model is not None:
        check_fit(candidate, model)
    return Source(candidate.name, folder, _sha256(folder), language_code(candidate.language), peft_type)


def _read_config(folder: Path) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(
            f"The adapter in {folder} has peft_type {error}, which PEFT does not know. If it is 'S2LORA', `import peft_s2lora` first; else "
            "install the package that brings the method."
        ) from None
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init not in HARMLESS_INITS:
        raise ValueError(
            f"The adapter in {folder} was initialised with {init!r}, which changes the base weights. Save it as a plain LoRA: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    return config


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def _copy_weights(folder: Path, adapted: PeftModel, adapter_name: str) -> None:
    """Fill an adapter from a folder of the same method, rank and targets."""
    mismatch = f"The adapter in {folder} does not fit this one: rank, targets or method differ. Leave out the configuration to take its."
    own = {name for name, weight in adapted.named_parameters() if f".{adapter_name}" in name and "base_layer" not in name}
    try:
        loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter_name)
    except RuntimeError as error:
        raise ValueError(f"{mismatch} {error}") from error
    if loaded.unexpected_keys or own & set(loaded.missing_keys):
        raise ValueError(mismatch)


# ---- configurations ----------------------------------------------------------------------------------------------------

# What a copy must have in common with its source, of LoRA and S2-LoRA.
_SAME = (
    *("r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save"),
    *("lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("s2lora_alpha", "share_scope", "share_groups", "group_ranks", "pool"),
)
# What a new LoRA on top of frozen ones cannot be told: LoraMoeConfig has no such field.
_NOT_STACKED = (
    *("rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "trainable_token_indices"),
    *("layer_replication", "target_parameters", "fan_in_fan_out"),
)


def _check_cold(config: PeftConfig | None) -> None:
    if config is not None and config.task_type is not None:
        raise ValueError(f"task_type is {config.task_type!r}; leave it out: PEFT has none for Whisper (SEQ_2_SEQ_LM looks for input_ids).")


def _check_base_stays(config: PeftConfig | None) -> None:
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init not in HARMLESS_INITS:
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the base weights, and the base is shared by many adapters. Leave it out, or "
            f"choose among {', '.join(sorted(HARMLESS_INITS))}."
        )


def _new_config(config: PeftConfig | None) -> PeftConfig:
    if config is None:
        from whisper_moe.train import default_peft_config  # train.py imports this file

        config = default_peft_config()
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.inference_mode = None, False
    return config


def _warm_config(source: Source, wanted: PeftConfig | None) -> PeftConfig:
    config = _read_config(source.path)
    if wanted is not None:
        if config.peft_type != wanted.peft_type:
            raise ValueError(
                f"A copy of {source.name!r} is a {source.peft_type}, and a {_method(wanted)} was asked "
                "for. Leave the configuration out to take the source's, or start stacked or cold."
            )
        differing = [name for name in _SAME if _plain(getattr(config, name, None)) != _plain(getattr(wanted, name, None))]
        # PEFT shortens a long list of names when it puts an adapter on a model: the file of the weights says which they were.
        if "target_modules" in differing and _names_each(wanted, _adapted_modules(source.path)):
            differing.remove("target_modules")
        if differing:
            told = ", ".join(f"{name} {_plain(getattr(config, name))!r}, not {_plain(getattr(wanted, name))!r}" for name in differing)
            raise ValueError(
                f"A copy of {source.name!r} has its rank and targets: {told}. Leave the configuration out to take the source's, or start "
                "stacked, which takes any rank, or cold."
            )
        config = copy.deepcopy(wanted)  # dropout and the like are the new run's choice
        if getattr(config, "pool", None) is not None:
            config.pool_hash = _read_config(source.path).pool_hash
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # what it makes is overwritten
    config.base_model_name_or_path, config.inference_mode = None, False
    return config


def _names_each(config: PeftConfig, modules: set[str]) -> bool:
    """Whether the configuration's targets are these modules, a name for each: by PEFT's rule, which also takes the end of a full name."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str) or len(targets) != len(modules):
        return False
    named = [[target for target in targets if module == target or module.endswith(f".{target}")] for module in modules]
    return all(len(each) == 1 for each in named) and {each[0] for each in named} == set(targets)


def _adapted_modules(folder: Path) -> set[str]:
    """Full names of the modules that an adapter changes, from the names in its weights' file."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
        found = (re.match(r"base_model\.model\.(.+?)\.(?:lora_|s2lora_)", name) for name in opened.keys())  # noqa: SIM118
        return {match[1] for match in found if match is not None}


def _mixture_config(kind: str, sources: Sequence[Source], wanted: PeftConfig | None, prior: dict[str, float]) -> LoraMoeConfig:
    modules: dict[str, None] = {}
    for source in sources:
        if source.peft_type not in (LORA, S2LORA):
            raise ValueError(
                f"{source.name!r} is a {source.peft_type}; a {kind} start takes LoRA and S2-LoRA adapters. Turn a mixture into one LoRA "
                "with to_lora or distil first; of other methods a copy can be made: start warm."
            )
        files = read_adapter(source.path)  # refuses what is more than low-rank products
        if files.is_pooled:
            raise ValueError(
                f"{source.name!r} uses the pool {files.config['pool']!r}, and its file does not hold A and B. Write it as LoRA first: "
                "peft_s2lora.to_lora(model, name, folder). Or start warm, over the same pool."
            )
        modules |= dict.fromkeys(key.rpartition(".lora_" if source.peft_type == LORA else ".s2lora_")[0] for key in files.tensors)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the adapters are called the same: {', '.join(names)}. Rename one, or leave it out.")
    # A single expert's gate is 1 for good. With router="language" it is given; a static router would train a bias without effect.
    options: dict[str, Any] = {"router": "language" if kind == "stacked" else "utterance", "prior": prior}
    if isinstance(wanted, LoraMoeConfig):
        if wanted.names:
            raise ValueError("The configuration names experts of its own, and the start chooses them. Leave `experts` out, or start cold.")
        config = copy.deepcopy(wanted).to_dict()
        options = {name: value for name, value in config.items() if name not in ("peft_type", "router", "prior", "peft_version")} | options
    elif wanted is None or isinstance(wanted, LoraConfig):
        options |= _as_mixture(kind, _new_config(wanted))
    else:
        raise ValueError(
            f"A {kind} start trains a new LoRA, and a {_method(wanted)} was asked for. Pass a LoraConfig "
            "(or nothing); S2-LoRA starts warm or cold."
        )
    options["target_modules"] = _with_modules(options["target_modules"], modules)
    options |= {"experts": {source.name: str(source.path) for source in sources}, "inference_mode": False, "base_model_name_or_path": None}
    return LoraMoeConfig(**options)


def _as_mixture(kind: str, config: LoraConfig) -> dict[str, Any]:
    """The new LoRA's settings under LoRA-MoE's names."""
    used = [name for name in _NOT_STACKED if getattr(config, name, None)]
    used += ["init_lora_weights"] if isinstance(config.init_lora_weights, str) else []
    if used:
        raise ValueError(
            f"A {kind} start trains a plain LoRA, and the configuration asks for {', '.join(used)}. Leave that out, or start warm or cold."
        )
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)
    return {
        "r": config.r,
        "loramoe_alpha": alpha,
        "loramoe_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
        "modules_to_save": config.modules_to_save,
        "bias": "loramoe_only" if config.bias == "lora_only" else config.bias,
    }


def _with_modules(targets: Any, modules: Mapping[str, None]) -> Any:
    """Targets that also name the modules which the sources adapt: part of a source would be lost otherwise."""
    if targets is None or targets == "all-linear":
        return targets
    if isinstance(targets, str):
        outside = [module for module in modules if not re.fullmatch(targets, module)]
        return "|".join([f"(?:{targets})", *(re.escape(module) for module in outside)]) if outside else targets
    return {*targets, *(module for module in modules if not any(f".{module}".endswith(f".{target}") for target in targets))}


def _plain(value: Any) -> Any:
    """Settings that mean the same compare equal: sets and lists, None and nothing."""
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted(value, key=str) or None
    return value or None
