"""Fewer adapters for many languages: similar ones are found, merged into one, and what that costs is said.

LoRA-Whisper's files grow with every language. `merge_similar` clusters adapters by the cosine of their deltas, or by a similarity of the
languages that is given to it, merges each cluster into one LoRA, and reports for every language how far the merged delta is from its own,
the bytes saved and, with clips at hand, the error rates before and after.

    <D1, D2> = tr(D1^T D2) = sum over ranks of (B1^T B2) * (A1 A2^T)        D = B A: never formed, except for pruning

The papers do not do this: the whole file is ours, but for the pruning rules, which are PEFT's (TIES, DARE, magnitude).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from whisper_moe.adapter_files import Pair
from whisper_moe.languages import language_code, language_name
from whisper_moe.moe_export import truncate
from whisper_moe.plain_lora import copy_adapter, other_base, read_pairs, write_lora
from whisper_moe.registry import LANGUAGE_FILE, MERGED_FILE, WEIGHTS_FILE, AdapterRegistry, LanguageAdapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn
    from transformers import WhisperProcessor

    from whisper_moe.comparison import SetResult
    from whisper_moe.data import Clips
    from whisper_moe.similarity import SimilarityMatrix

Pairs: TypeAlias = Mapping[str, Pair]
Pruning: TypeAlias = Literal["none", "magnitude", "ties", "dare_linear", "dare_ties"]

THRESHOLD = 0.5
"""Least mean cosine between the deltas of two clusters that are merged. Ours: of two equally long deltas at 0.5, the mean differs from each
by half its length."""
_FORMAT = 1
_DIVIDES = ("ties", "dare_ties")  # PEFT's rules that end in a mean over the entries that were kept; the others in a sum
_FILES = {"json": "growth.json", "markdown": "growth.md", "figure": "growth.png"}


# ---- how alike -----------------------------------------------------------------------------------------------------------


def delta_products(adapters: Sequence[Pairs]) -> np.ndarray:
    """(adapters, adapters) inner products of the deltas, over all modules, without forming any of them. In float64."""
    products = np.zeros((len(adapters), len(adapters)))
    for module in dict.fromkeys(name for pairs in adapters for name in pairs):
        present = [index for index, pairs in enumerate(adapters) if module in pairs]
        A = torch.cat([adapters[index][module][0].double() for index in present])  # (all ranks, d_in)
        B = torch.cat([adapters[index][module][1].double() for index in present], 1)  # (d_out, all ranks)
        both = (B.T @ B) * (A @ A.T)  # (all ranks, all ranks)
        ranks = [len(adapters[index][module][0]) for index in present]
        owner = torch.repeat_interleave(torch.arange(len(present)), torch.tensor(ranks))
        blocks = torch.zeros(len(present), len(present), dtype=torch.float64)
        blocks.index_put_((owner[:, None].expand_as(both), owner[None].expand_as(both)), both, accumulate=True)
        products[np.ix_(present, present)] += blocks.numpy()
    return products


def delta_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines from `delta_products`; an adapter that adds nothing is like no other."""
    lengths = np.sqrt(np.maximum(np.diag(products), 0))
    scale = np.where(lengths > 0, lengths, 1.0)
    cosines = products / scale[:, None] / scale[None]
    np.fill_diagonal(cosines, 1.0)
    return cosines


@dataclass(frozen=True)
class Join:
    """One step of the clustering: which members came together, and how alike they were on average."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    similarity: float


def cluster(
    similarity: np.ndarray, *, threshold: float | None = THRESHOLD, number: int | None = None
) -> tuple[list[list[int]], list[Join]]:
    """Agglomerative clustering with average linkage: the two most alike clusters join until none are alike enough, or few enough are left.

    Args:
        similarity: (n, n), symmetric.
        threshold: Least average similarity of two clusters that join; None: no limit.
        number: Clusters wanted; then the threshold does not count.

    Returns:
        The clusters, by their first member, and every join up to a single cluster, for the figure.
    """
    size = len(similarity)
    if number is not None and not 1 <= number <= size:
        raise ValueError(f"number is how many adapters are to be left, 1 to {size} here; got {number}.")
    groups: list[tuple[int, ...]] = [(index,) for index in range(size)]
    joins, kept = list[Join](), None
    while len(groups) > 1:
        scores = {
            (i, j): float(similarity[np.ix_(groups[i], groups[j])].mean()) for i in range(len(groups)) for j in range(i + 1, len(groups))
        }
        (i, j), score = max(scores.items(), key=lambda item: item[1])
        done = len(groups) <= number if number is not None else threshold is not None and score < threshold
        if done and kept is None:
            kept = list(groups)
        joins.append(Join(groups[i], groups[j], score))
        groups = [group for index, group in enumerate(groups) if index not in (i, j)] + [tuple(sorted(groups[i] + groups[j]))]
    chosen = groups if kept is None else kept
    return sorted(sorted(group) for group in chosen), joins


# ---- merging -------------------------------------------------------------------------------------------------------------


def merge_pairs(
    adapters: Sequence[Pairs],
    rank: int,
    weights: Sequence[float] | None = None,
    *,
    pruning: Pruning = "none",
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Pair]:
    """One LoRA for several: module name -> A, B of at most `rank`.

    Args:
        adapters: Each one's pairs. A module that one of them leaves alone counts as zero there.
        rank: Of the result. The mean of the deltas is cut to it by SVD, which is the nearest of this rank.
        weights: Of each adapter; they sum to 1. None: equal.
        pruning: "none": the mean itself, of concatenated ranks, no delta is ever formed. Others are PEFT's rules for merging, which look
            at single entries: the deltas are formed, one module at a time.
        density: The share of entries that pruning keeps.
        seed: Of "dare_linear" and "dare_ties", which keep entries by chance.
    """
    if pruning not in get_args(Pruning):
        raise ValueError(f"pruning is one of {', '.join(get_args(Pruning))}; got {pruning!r}.")
    if rank < 1 or not 0 < density <= 1:
        raise ValueError(f"rank is at least 1 and density above 0 and up to 1; got {rank} and {density}.")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    merged = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in dict.fromkeys(name for pairs in adapters for name in pairs):
            found = [(share, *pairs[module]) for share, pairs in zip(shares, adapters, strict=True) if module in pairs]
            if pruning == "none":
                A = torch.cat([A for _, A, _ in found])
                B = torch.cat([B * share for share, _, B in found], 1)
            else:
                A, B = _pruned(module, adapters, shares, pruning, density)
            merged[module] = truncate(A, B, rank)[:2] if len(A) > rank else (A, B)
    return merged


def _pruned(module: str, adapters: Sequence[Pairs], shares: Sequence[float], pruning: str, density: float) -> Pair:
    """The pruned mean of a module's deltas as a pair of full rank: A (d_in, d_in) is the identity, or B is, whichever is smaller."""
    from peft.utils import merge_utils

    rule = getattr(merge_utils, {"magnitude": "magnitude_prune"}.get(pruning, pruning))
    like = next(pairs[module] for pairs in adapters if module in pairs)
    empty = torch.zeros(len(like[1]), like[0].shape[1])  # (d_out, d_in)
    deltas = [pairs[module][1] @ pairs[module][0] if module in pairs else empty for pairs in adapters]
    weights = [share * len(shares) for share in shares] if pruning in _DIVIDES else shares
    delta = rule(deltas, torch.tensor(weights), density)
    d_out, d_in = delta.shape
    return (torch.eye(d_in), delta) if d_in <= d_out else (delta, torch.eye(d_out))


# ---- the report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What became of one adapter.

    Args:
        name, language: Of the adapter.
        into: Name of the adapter that replaces it; its own if it was left alone.
        error: Length of the difference of the two deltas, as a part of its own delta's length; 0 if left alone.
        cosine: Of its delta and the one that replaces it; 1 if left alone.
        rates: Where clips were given: the language's headline rate ("wer" or "cer") before and after, the cost, and its 95 % interval.
    """

    name: str
    language: str
    into: str
    error: float
    cosine: float
    rates: dict[str, Any] = field(default_factory=dict)


@dataclass
class Growth:
    """What `merge_similar` did.

    Args:
        folder: Where the adapters now lie, with a file that says who speaks for which language.
        names, languages: Of the adapters that were compared, in the order of `similarity`.
        similarity: (adapters, adapters).
        by: What they were compared by: "delta cosine" or "language similarity".
        joins: The clustering, step by step, up to a single cluster.
        adapters: What became of each.
        left_out: Names of adapters that were copied without being compared (for a domain).
        bytes_before, bytes_after: Of all weights' files.
        settings: What was asked for.
    """

    folder: Path
    names: list[str]
    languages: list[str]
    similarity: np.ndarray
    by: str
    joins: list[Join]
    adapters: list[Merged]
    left_out: list[str]
    bytes_before: int
    bytes_after: int
    settings: dict[str, Any]

    @property
    def num_after(self) -> int:
        """Adapters that are left."""
        return len({each.into for each in self.adapters}) + len(self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, without the folder."""
        row = {name: getattr(self, name) for name in ("names", "languages", "by", "left_out", "bytes_before", "bytes_after", "settings")}
        joins = [asdict(join) | {"first": list(join.first), "second": list(join.second)} for join in self.joins]
        return {
            "format": _FORMAT,
            **row,
            "similarity": self.similarity.tolist(),
            "joins": joins,
            "adapters": list(map(asdict, self.adapters)),
        }

    def to_markdown(self) -> str:
        """A line for each adapter, and what was saved."""
        measured = any(each.rates for each in self.adapters)
        header = ["adapter", "language", "now", "error", "cosine"] + (["rate", "before", "after", "cost [95 %]"] if measured else [])
        lines = [f"| {' | '.join(header)} |", "|---|---|---|" + "--:|" * (len(header) - 3)]
        for each in self.adapters:
            cells = [each.name, language_name(each.language), each.into, f"{each.error:.3f}", f"{each.cosine:.3f}"]
            if measured:
                cells += _rate_cells(each.rates)
            lines.append(f"| {' | '.join(cells)} |")
        before, after = len(self.adapters) + len(self.left_out), self.num_after
        saved = 1 - self.bytes_after / self.bytes_before
        lines += ["", f"{before} adapters became {after}; {self.bytes_before:,} bytes became {self.bytes_after:,} ({saved:.0%} saved)."]
        return "\n".join(lines)

    def figure(self) -> Figure:
        """The similarities as a matrix in the order of the clustering, and the tree beside it."""
        from matplotlib.figure import Figure

        size = len(self.names)
        order = list(_leaves(self.joins, size))
        figure = Figure(figsize=(3.6 + 0.95 * size, 1.8 + 0.5 * size), layout="constrained")
        tree, matrix = figure.subplots(1, 2, width_ratios=[1, 2])
        _draw_tree(tree, self.joins, order, self._limit())
        shown = self.similarity[np.ix_(order, order)]
        names = [self.names[index] for index in order]
        matrix.imshow(shown, vmin=-1, vmax=1, cmap="RdBu")
        matrix.set_xticks(range(size), names, rotation=90)
        matrix.set_yticks(range(size), names)
        matrix.set_title(self.by, fontsize=10)
        for (row, column), value in np.ndenumerate(shown):
            matrix.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 else "black")
        return figure

    def save(self, folder: str | Path | None = None) -> Path:
        """Write `growth.json`, `.md` and `.png`, by default beside the adapters."""
        folder = self.folder if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILES["json"]).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / _FILES["markdown"]).write_text(f"# Merged adapters\n\n{self.to_markdown()}\n", "utf-8")
        self.figure().savefig(folder / _FILES["figure"], dpi=150)
        return folder

    def _limit(self) -> float | None:
        return None if self.settings["number"] is not None else self.settings["threshold"]


def _rate_cells(rates: Mapping[str, Any]) -> list[str]:
    if not rates:
        return ["-", "-", "-", "-"]
    interval = "" if rates["low"] is None else f" [{rates['low']:+.1%}, {rates['high']:+.1%}]"
    return [rates["rate"].upper(), f"{rates['before']:.1%}", f"{rates['after']:.1%}", f"{rates['cost']:+.1%}{interval}"]


def _leaves(joins: Sequence[Join], size: int) -> Sequence[int]:
    """The adapters in the order in which the tree has no crossings."""
    orders: dict[tuple[int, ...], list[int]] = {(index,): [index] for index in range(size)}
    for join in joins:
        orders[tuple(sorted(join.first + join.second))] = orders[join.first] + orders[join.second]
    return orders[tuple(range(size))]


def _draw_tree(axis: Any, joins: Sequence[Join], order: Sequence[int], limit: float | None) -> None:
    """The clustering as a dendrogram that grows to the left; rows line up with those of the matrix."""
    place: dict[tuple[int, ...], tuple[float, float]] = {
        (index,): (1.0, float(row)) for row, index in enumerate(order)
    }  # cluster -> similarity at which it formed, and its row
    for join in joins:
        (x1, y1), (x2, y2) = place[join.first], place[join.second]
        axis.plot([x1, join.similarity, join.similarity, x2], [y1, y1, y2, y2], color="0.2", linewidth=1.2)
        place[tuple(sorted(join.first + join.second))] = (join.similarity, (y1 + y2) / 2)
    if limit is not None:
        axis.axvline(limit, color="tab:red", linestyle="--", linewidth=1)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_xlabel("similarity at which they join", fontsize=9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


# ---- the whole -----------------------------------------------------------------------------------------------------------


def merge_similar(
    adapters: Sequence[str | Path | LanguageAdapter] | str | Path,
    out: str | Path,
    *,
    threshold: float | None = THRESHOLD,
    number: int | None = None,
    similarity: SimilarityMatrix | Mapping[tuple[str, str], float] | None = None,
    rank: int | None = None,
    pruning: Pruning = "none",
    density: float = 0.5,
    seed: int = 0,
    base: nn.Module | None = None,
    processor: WhisperProcessor | None = None,
    eval_sets: Mapping[str, Clips] | None = None,
) -> Growth:
    """Merge adapters that are alike, and write what is left into a folder that serves all of their languages.

    Args:
        adapters: Folders of adapters, or one folder that holds several. Adapters for a domain are copied and not compared.
        out: A new folder: an adapter for each cluster, and `merged_adapters.json`, which says who speaks for which language. It is used
            like any folder of adapters (`--adapters`, `AdapterRegistry.from_folder`). Folders in it are named by language, whatever
            adapters call themselves.
        threshold: Least mean similarity of two clusters that are merged.
        number: How many adapters are to be left instead.
        similarity: Of languages, to cluster by instead of the deltas: the matrix of `similarity_matrix` (the posterior, both ways), or
            numbers for pairs of codes.
        rank: Of merged adapters; by default the largest of the cluster's.
        pruning, density, seed: As in `merge_pairs`.
        base: The bare base model; needed for S2-LoRA and for `eval_sets`.
        processor: The base's processor; needed for `eval_sets`.
        eval_sets: Clips by language: their error rates are measured before and after.

    Raises:
        ValueError: The adapters are of different bases or cannot be read as low-rank products, two write the same language, or `out` is
            taken. Nothing has been written then.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already. Name a new folder.")
    if eval_sets and (base is None or processor is None):
        raise ValueError("To measure error rates, give the base model and its processor too.")
    every = _adapters(adapters)
    compared = [adapter for adapter in every if adapter.domain is None]
    left_out = [adapter for adapter in every if adapter.domain is not None]
    _check(compared, eval_sets)
    pairs = [read_pairs(adapter.path, base) for adapter in compared]
    products = delta_products(pairs)
    by = "delta cosine" if similarity is None else "language similarity"
    alike = delta_cosines(products) if similarity is None else _language_similarity(compared, similarity)
    clusters, joins = cluster(alike, threshold=threshold, number=number)
    settings = {"threshold": threshold, "number": number, "rank": rank, "pruning": pruning, "density": density, "seed": seed}
    rows: list[Merged] = []
    folders: dict[str, str] = {}  # name of an adapter that is left -> its folder: what a stranger's file says never becomes a path
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for members in clusters:
            chosen, own = [compared[index] for index in members], [pairs[index] for index in members]
            if len(members) == 1:
                folders[chosen[0].name] = _unused(chosen[0].language, folders.values())
                copy_adapter(chosen[0].path, part / folders[chosen[0].name])
                rows.append(Merged(chosen[0].name, chosen[0].language, chosen[0].name, 0.0, 1.0))
                continue
            name = _unused(f"merged-{chosen[0].language}-{len(chosen)}", [*(adapter.name for adapter in every), *folders.values()])
            folders[name] = name
            wanted = max(len(A) for each in own for A, _ in each.values()) if rank is None else rank
            merged = merge_pairs(own, wanted, pruning=pruning, density=density, seed=seed)
            write_lora(part / name, merged, [adapter.path for adapter in chosen], _card(name, chosen, by, settings))
            rows += _errors(name, chosen, own, merged)
        for adapter in left_out:
            folders[adapter.name] = _unused(adapter.language, folders.values())
            copy_adapter(adapter.path, part / folders[adapter.name])
        _write_map(part, rows, compared, folders)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    rows.sort(key=lambda row: [adapter.name for adapter in compared].index(row.name))
    growth = Growth(
        folder=out,
        names=[adapter.name for adapter in compared],
        languages=[adapter.language for adapter in compared],
        similarity=alike,
        by=by,
        joins=joins,
        adapters=rows,
        left_out=[adapter.name for adapter in left_out],
        bytes_before=sum(adapter.num_bytes for adapter in every),
        bytes_after=sum(path.stat().st_size for path in out.glob(f"*/{WEIGHTS_FILE}")),
        settings=settings,
    )
    if eval_sets:
        growth.adapters = _with_rates(growth, compared, base, processor, eval_sets)
    return growth


def _adapters(adapters: Sequence[str | Path | LanguageAdapter] | str | Path) -> list[LanguageAdapter]:
    if isinstance(adapters, (str, Path)):
        return list(AdapterRegistry.from_folder(adapters))
    return list(AdapterRegistry(adapters))


def _check(adapters: Sequence[LanguageAdapter], eval_sets: Mapping[str, Clips] | None) -> None:
    if len(adapters) < 2:
        raise ValueError(f"There is nothing to compare: {len(adapters)} adapters for languages. Name two or more.")
    first = adapters[0]
    for adapter in adapters[1:]:
        problem = other_base((first.base, first.base_signature), (adapter.base, adapter.base_signature))
        if problem is not None:
            raise ValueError(f"{first.name!r} and {adapter.name!r} cannot be merged: {problem}")
    languages = [adapter.language for adapter in adapters]
    for adapter in adapters:
        if languages.count(adapter.language) > 1:
            raise ValueError(f"Two adapters write {language_name(adapter.language)}. Leave one out, or give one of them a domain.")
    unknown = sorted({language_code(code) for code in eval_sets or ()} - set(languages))
    if unknown:
        raise ValueError(f"There are clips for {unknown[0]!r}, and no adapter for it. Adapters: {', '.join(languages)}.")


def _language_similarity(adapters: Sequence[LanguageAdapter], similarity: SimilarityMatrix | Mapping[tuple[str, str], float]) -> np.ndarray:
    """(adapters, adapters) from what was given for languages, the same both ways."""
    from whisper_moe.similarity import SimilarityMatrix

    if isinstance(similarity, SimilarityMatrix):
        codes = similarity.languages
        known = {(a, b): float(similarity.posterior[i, j]) for i, a in enumerate(codes) for j, b in enumerate(codes)}
    else:
        known = {(language_code(a), language_code(b)): float(value) for (a, b), value in similarity.items()}
    alike = np.eye(len(adapters))
    for i, first in enumerate(adapters):
        for j, second in enumerate(adapters):
            values = [known[pair] for pair in ((first.language, second.language), (second.language, first.language)) if pair in known]
            values = [value for value in values if not np.isnan(value)]
            if i != j and not values:
                raise ValueError(f"No similarity of {first.language!r} and {second.language!r} was given.")
            if i != j:
                alike[i, j] = np.mean(values)
    return alike


def _errors(name: str, adapters: Sequence[LanguageAdapter], pairs: Sequence[Pairs], merged: Pairs) -> list[Merged]:
    """How far the merged delta is from each member's, from inner products alone."""
    products = delta_products([*pairs, merged])
    length = products[-1, -1]
    rows = []
    for index, adapter in enumerate(adapters):
        own, both = products[index, index], products[index, -1]
        error = np.sqrt(max(0.0, own - 2 * both + length) / own) if own > 0 else 0.0
        cosine = both / np.sqrt(own * length) if own > 0 and length > 0 else 0.0
        rows.append(Merged(adapter.name, adapter.language, name, float(error), float(cosine)))
    return rows


def _card(name: str, adapters: Sequence[LanguageAdapter], by: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `language_adapter.json` of a merged adapter says. The language is the first one's; the map beside the folders names all."""
    first = json.loads((adapters[0].path / LANGUAGE_FILE).read_text("utf-8"))
    merged_from = [{"name": adapter.name, "language": adapter.language, "carrier": adapter.carrier} for adapter in adapters]
    described = {"train_data": f"none: merged from the adapters {', '.join(adapter.name for adapter in adapters)}", "metrics": {}}
    return first | described | {"name": name, "training": {"merged_from": merged_from, "by": by, **settings}}


def _unused(stem: str, taken: Iterable[str]) -> str:
    """The stem, with a number behind it if need be. Letters' case does not count: on some disks it makes no difference."""
    names = {name.casefold() for name in taken}
    return next(name for name in chain([stem], (f"{stem}-{number}" for number in count(2))) if name.casefold() not in names)


def _write_map(folder: Path, rows: Sequence[Merged], adapters: Sequence[LanguageAdapter], folders: Mapping[str, str]) -> None:
    """Who speaks for which language, as `AdapterRegistry.from_folder` reads it."""
    carriers = {adapter.name: adapter.carrier for adapter in adapters}
    entries = [{"name": row.name, "language": row.language, "carrier": carriers[row.name], "folder": folders[row.into]} for row in rows]
    text = json.dumps({"format": _FORMAT, "adapters": entries}, indent=2, ensure_ascii=False)
    (folder / MERGED_FILE).write_text(text + "\n", "utf-8")


def _with_rates(
    growth: Growth, adapters: Sequence[LanguageAdapter], base: Any, processor: Any, eval_sets: Mapping[str, Clips]
) -> list[Merged]:
    """The rows with error rates: each language written by its own adapter and by the one that replaces it."""
    from whisper_moe.comparison import EvalSet, evaluate_adapters

    now = {adapter.language: adapter for adapter in AdapterRegistry.from_folder(growth.folder) if adapter.domain is None}
    clips = {language_code(code): each for code, each in eval_sets.items()}
    gone = {row.name for row in growth.adapters if row.into != row.name}
    replaced = [adapter for adapter in adapters if adapter.name in gone and adapter.language in clips]
    if not replaced:
        return growth.adapters
    after = [replace(now[adapter.language], name=f"{adapter.name} merged") for adapter in replaced]
    sets = [EvalSet(clips[adapter.language], adapter.language) for adapter in replaced]
    measured = evaluate_adapters(base, processor, sets, [*replaced, *after], with_base=False)
    for problem in measured.problems:
        warnings.warn(f"The adapters are merged, but an error rate could not be measured: {problem}", stacklevel=3)
    found = {result.language: _cost(result) for result in measured.sets}
    return [replace(row, rates=found.get(row.language, {})) for row in growth.adapters]


def _cost(result: SetResult) -> dict[str, Any]:
    """The headline rate of an adapter and of its replacement on the same clips, and the paired interval of the difference."""
    (pair,) = result.comparisons
    own, merged = (getattr(next(iter(system.rates.values())), pair.rate).value for system in result.systems)
    low, high = (pair.low, pair.high) if pair.better == result.systems[0].name else (_minus(pair.high), _minus(pair.low))
    return {"rate": pair.rate, "before": own, "after": merged, "cost": merged - own, "low": low, "high": high}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
