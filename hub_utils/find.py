"""Finding the adapter for a language: in the local registry, else among allow-listed owners or in one collection. Never on all the Hub.

The Hub's filters only narrow the search down (a language filter also matches a plain tag); what counts is the card, read again here.
The order is by a metric on one named test set, downloads come last, and equals share a rank: nobody wins by chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ._hub import ask
from .adapter_files import is_line
from .card import ENTRIES, POCKET, hub_language
from .naming import is_hub_id, method_name

if TYPE_CHECKING:
    from .registry_file import RegistryFile

MAX_ENTRIES = 200
"""Adapters that one repository may list; more are not read."""
MAX_MODELS = 1000
"""Repositories of one owner, or of a collection, that are looked at."""

_FIELDS = ["sha", "cardData", "downloads", "gated", "private", "tags"]
_LONGEST_TEXT = 200
_SUBFOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter that could be used. What it says of itself is unverified until it is fetched.

    Args:
        repo_id: Its repository; None for a folder of the registry.
        sha: The commit that was looked at; None for a folder.
        subfolder: Where in a repository of many; None if it is the repository's only one.
        path: Its folder, for an entry of the registry that names one.
        language: The language it writes.
        base_model: The base it is for; None where the registry does not say.
        peft_type: PEFT's name of the method; None if unknown.
        domain: Kind of speech; None for the language in general.
        wer: Word error rate on `test_set`, a fraction; None if it was not measured.
        cer: Character error rate, likewise.
        test_set: What it was measured on.
        normalizer: How texts were made comparable before they were compared.
        downloads: As the Hub counts them.
        gated: Whether one must ask for access.
        private: Whether only its owner sees it.
        rank: Place in the order, from 1; equals share one.
        reason: What put it there.
    """

    repo_id: str | None
    sha: str | None
    subfolder: str | None
    path: Path | None
    language: str
    base_model: str | None
    peft_type: str | None = None
    domain: str | None = None
    wer: float | None = None
    cer: float | None = None
    test_set: str | None = None
    normalizer: str | None = None
    downloads: int = 0
    gated: bool = False
    private: bool = False
    rank: int = 0
    reason: str = ""

    @property
    def source(self) -> str:
        """What a registry file writes for it."""
        if self.repo_id is None:
            return str(self.path)
        return f"{self.repo_id}@{self.sha}" + ("" if self.subfolder is None else f"/{self.subfolder}")


def find_adapters(
    base_model: str,
    language: str,
    *,
    registry: RegistryFile | None = None,
    namespaces: Collection[str] = (),
    collection: str | None = None,
    domain: str | None = None,
    methods: Collection[str] | None = None,
    metric: Literal["wer", "cer"] = "wer",
    test_set: str | None = None,
    normalizer: str = "mark-preserving",
    token: str | None = None,
    api: HfApi | None = None,
) -> list[FoundAdapter]:
    """Adapters for a language on a base, the best first.

    An entry of the registry is the answer, alone; the Hub is then not asked. Otherwise every adapter of the named owners or of the
    collection whose card says this base and language, in order: those measured on `test_set` by the metric, then the others, each by
    downloads. Adapters that are equal in all of this have the same `rank`; `pick_adapter` refuses to choose between them.

    Args:
        base_model: Hub id of the base, "openai/whisper-small".
        language: The language's code.
        registry: The local map that goes first.
        namespaces: Users and organisations who may be searched.
        collection: Slug of the one collection to search instead.
        domain: Kind of speech; None for the language in general.
        methods: PEFT types that are wanted, such as ("LORA",); None for all.
        metric: What to order by.
        test_set: The set whose figures count. None: the one set on which all candidates were measured, if there is such a set.
        normalizer: The text normaliser whose figures count; others cannot be compared.
        token: By default the one that was logged in with.
        api: The client to use, in place of one made from `token`.

    Raises:
        ValueError: Nobody was named who may be searched, or the request makes no sense.
        HubError: The Hub refused, or could not be reached.
    """
    if metric not in ("wer", "cer"):
        raise ValueError(f"metric is {metric!r}; expected 'wer' or 'cer'.")
    entry = None if registry is None else registry.get(language, domain)
    if registry is not None and entry is not None:
        return [_of_entry(entry, registry)]
    if not namespaces and collection is None:
        known = "" if registry is None else f" The registry {registry.path} has none for {language!r}."
        raise ValueError(f"Say where to look: namespaces=['owner'] or collection='owner/slug'.{known} The whole Hub is never searched.")
    if namespaces and collection is not None:
        raise ValueError("Give owners (namespaces) or one collection, not both.")
    if not is_hub_id(base_model):
        raise ValueError(f"base_model is {base_model!r}; expected a model of the Hub, such as 'openai/whisper-small'.")
    api = HfApi(token=token) if api is None else api
    models = _of_owners(api, namespaces, base_model, language) if collection is None else _of_collection(api, collection)
    found = [
        adapter
        for model in models
        for adapter in describe(model)
        if (adapter.base_model, adapter.domain) == (base_model, domain)
        and _is_same_language(adapter.language, language)
        and (methods is None or adapter.peft_type in methods)
    ]
    return _ranked(found, metric, test_set, normalizer)


def find_all_adapters(
    base_model: str,
    *,
    namespaces: Collection[str] = (),
    collection: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
) -> dict[tuple[str, str | None], list[FoundAdapter]]:
    """Every adapter of the named owners, or of a collection, for a base: by language and domain, the best of each first.

    Arguments and errors are those of `find_adapters`; the order too, where nothing is said of test sets.
    """
    if bool(namespaces) == (collection is not None):
        raise ValueError("Say where to look: namespaces=['owner'] or collection='owner/slug', not both. The whole Hub is never searched.")
    if not is_hub_id(base_model):
        raise ValueError(f"base_model is {base_model!r}; expected a model of the Hub, such as 'openai/whisper-small'.")
    api = HfApi(token=token) if api is None else api
    models = _of_owners(api, namespaces, base_model, None) if collection is None else _of_collection(api, collection)
    found: dict[tuple[str, str | None], list[FoundAdapter]] = {}
    for model in models:
        for adapter in describe(model):
            if adapter.base_model == base_model:
                found.setdefault((adapter.language, adapter.domain), []).append(adapter)
    return {key: _ranked(found[key], "wer", None, "mark-preserving") for key in sorted(found, key=str)}


def adapters_in(repo_id: str, revision: str | None = None, *, token: str | None = None, api: HfApi | None = None) -> list[FoundAdapter]:
    """The adapters that a repository's card lists, at the commit that the revision stands for now.

    Raises:
        ValueError: The repository has another name now.
        HubError: The Hub refused, or could not be reached.
    """
    api = HfApi(token=token) if api is None else api
    info = ask(lambda: api.model_info(repo_id, revision=revision), repo_id)
    if info.id != repo_id:
        raise ValueError(f"{repo_id} is called {info.id[:_LONGEST_TEXT]!r} now. If that is the same owner, use that name.")
    return describe(info)


def rank_adapters(found: Iterable[FoundAdapter]) -> list[FoundAdapter]:
    """What several searches found, each adapter once, in one order with new ranks: as `find_adapters` orders it by word error rate."""
    return _ranked(list({adapter.source: adapter for adapter in found}.values()), "wer", None, "mark-preserving")


def pick_adapter(found: list[FoundAdapter]) -> FoundAdapter:
    """The best of what `find_adapters` found.

    Raises:
        ValueError: There is none, or several share the first rank; the message lists them.
    """
    if not found:
        raise ValueError("No adapter was found. Train one with `whisper-moe train`, or add one with `whisper-moe adapters add`.")
    first = [adapter for adapter in found if adapter.rank == found[0].rank]
    if len(first) > 1:
        listed = "; ".join(f"{adapter.source} ({adapter.reason})" for adapter in first)
        raise ValueError(f"{len(first)} adapters are equally good: {listed}. Choose one with `whisper-moe adapters add`.")
    return first[0]


# ---- where to look -----------------------------------------------------------------------------------------------------


def _of_entry(entry: Any, registry: RegistryFile) -> FoundAdapter:
    pinned = None if isinstance(entry.source, Path) else entry.source
    return FoundAdapter(
        repo_id=None if pinned is None else pinned.repo_id,
        sha=None if pinned is None else pinned.sha,
        subfolder=None if pinned is None else pinned.subfolder,
        path=entry.source if pinned is None else None,
        language=entry.language,
        base_model=None,
        domain=entry.domain,
        rank=1,
        reason=f"named in {registry.path}",
    )


def _of_owners(api: HfApi, namespaces: Collection[str], base_model: str, language: str | None) -> Iterable[Any]:
    """Models of these owners that the Hub's filters let through. The pocket lies on no Hub, so its adapters have no base to filter by."""
    about = "language-adapter" if base_model == POCKET else f"base_model:adapter:{base_model}"
    for owner in dict.fromkeys(namespaces):
        tags = [about] if language is None else [about, hub_language(language)]
        wanted = {"author": owner, "filter": tags, "expand": _FIELDS, "limit": MAX_MODELS}
        for model in ask(lambda wanted=wanted: list(api.list_models(**wanted)), f"the models of {owner}"):  # type: ignore[misc]
            if model.id.split("/")[0] == owner:
                yield model


def _of_collection(api: HfApi, slug: str) -> Iterable[Any]:
    """Models of a collection. One that is gone or closed to this user is left out: the others are still there."""
    for item in ask(lambda: api.get_collection(slug), f"the collection {slug}").items[:MAX_MODELS]:
        if item.item_type != "model":
            continue
        try:
            model = ask(lambda item=item: api.model_info(item.item_id, expand=_FIELDS), item.item_id)  # type: ignore[misc]
        except OSError as error:
            if _is_gone(error.__cause__):
                continue
            raise
        if model.id == item.item_id:  # a renamed repository answers under its new name, which nobody put into the collection
            yield model


def _is_gone(error: BaseException | None) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403, 404)


# ---- what a card says --------------------------------------------------------------------------------------------------


def describe(model: Any) -> list[FoundAdapter]:
    """The adapters that a model's card lists, each field checked; what is malformed is left out.

    Args:
        model: A `ModelInfo` of the client, with its card.
    """
    card = model.card_data
    if card is None:
        return []
    listed = card.get(ENTRIES)
    rows = listed[:MAX_ENTRIES] if isinstance(listed, list) else [_plain_row(model, card)]
    described = (_described(row, model) for row in rows if isinstance(row, dict))
    return [adapter for adapter in described if adapter is not None]


def _plain_row(model: Any, card: Any) -> dict[str, Any]:
    """An adapter published by other means: what the Hub's own fields say, if they say one base and one language."""
    bases, languages = card.get("base_model"), card.get("language")
    bases, languages = ([each] if isinstance(each, str) else each for each in (bases, languages))
    tags = model.tags if isinstance(model.tags, list) else []
    if not (isinstance(bases, list) and isinstance(languages, list) and len(bases) == len(languages) == 1):
        return {}
    if card.get("library_name") != "peft" or f"base_model:adapter:{bases[0]}" not in tags:
        return {}
    return {"language": languages[0], "base_model": bases[0]}


def _described(row: dict[str, Any], model: Any) -> FoundAdapter | None:
    text = {key: value for key, value in row.items() if is_line(value, _LONGEST_TEXT, 1)}
    if not {"language", "base_model"} <= text.keys() or not is_hub_id(text["base_model"]):
        return None
    if "subfolder" in row and not _SUBFOLDER.fullmatch(text.get("subfolder", "")):
        return None
    if "domain" in row and "domain" not in text:
        return None
    if "peft_type" in row and not _is_known(text.get("peft_type", "")):
        return None
    return FoundAdapter(
        repo_id=model.id,
        sha=model.sha,
        subfolder=text.get("subfolder"),
        path=None,
        language=text["language"],
        base_model=text["base_model"],
        peft_type=text.get("peft_type"),
        domain=text.get("domain"),
        wer=_rate(row.get("wer")),
        cer=_rate(row.get("cer")),
        test_set=text.get("test_set"),
        normalizer=text.get("normalizer"),
        downloads=model.downloads if isinstance(model.downloads, int) else 0,
        gated=bool(model.gated),
        private=bool(model.private),
    )


def _is_same_language(said: str, wanted: str) -> bool:
    """Also where a card has the Hub's code of a language and we have Whisper's (`jv`, `jw`); never `pt` for `pt-BR`."""
    return said == wanted or ("-" not in said + wanted and hub_language(said) == hub_language(wanted))


def _is_known(peft_type: str) -> bool:
    try:
        return bool(method_name(peft_type))
    except ValueError:
        return False


def _rate(value: Any) -> float | None:
    """An error rate that can be one: NaN would be neither better nor worse than anything, and nothing is below zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        return None
    return float(value)


# ---- the order ---------------------------------------------------------------------------------------------------------


def _ranked(found: list[FoundAdapter], metric: str, test_set: str | None, normalizer: str) -> list[FoundAdapter]:
    """Best first. Equal figures and downloads are the same rank; within it the order is by name, which decides nothing."""
    counted = _common_set(found, normalizer) if test_set is None else test_set

    def figure(adapter: FoundAdapter) -> float | None:
        value: float | None = getattr(adapter, metric)
        return value if counted is not None and (adapter.test_set, adapter.normalizer) == (counted, normalizer) else None

    def key(adapter: FoundAdapter) -> tuple[float, int]:
        value = figure(adapter)
        return (math.inf if value is None else value, -adapter.downloads)

    ordered = sorted(found, key=lambda adapter: (key(adapter), adapter.source))
    keys = [key(adapter) for adapter in ordered]
    ranked = []
    for adapter in ordered:
        value = figure(adapter)
        measured = "no figure that could be compared" if value is None else f"{metric.upper()} {value:.1%} on {counted}"
        ranked.append(replace(adapter, rank=keys.index(key(adapter)) + 1, reason=f"{measured}, {adapter.downloads:,} downloads"))
    return ranked


def _common_set(found: list[FoundAdapter], normalizer: str) -> str | None:
    """The test set on which all were measured, with this normaliser; None if they differ."""
    sets = {(adapter.test_set, adapter.normalizer) for adapter in found}
    return next(iter(sets))[0] if len(sets) == 1 and next(iter(sets))[1] == normalizer else None
