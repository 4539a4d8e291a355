"""Which languages a new one is near to, as a Whisper hears it: a ranked table with its spread, and a matrix of several languages.

Three views, none of which needs an adapter or changes the model: the *language posterior* (what the base takes the clips for), the *cosine*
between mean encoder states, and *token coverage* (how much of one language's text is written with tokens the other uses). The first is
what LoRA-Whisper (Song et al. 2024) chooses a warm start by; the other two are ours, and need clips of both languages.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe.data import Clips, extract_features
from whisper_moe.evaluate import encode
from whisper_moe.languages import adapters_off, allowed_codes, language_code, language_name, language_posterior, language_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import WhisperProcessor

WEAK_EVIDENCE = 0.1
"""Below this share of the posterior, what the candidates are ranked by is mostly noise."""


@dataclass(frozen=True)
class SimilarLanguage:
    """One row of the table.

    Args:
        language: Its code.
        probability: Mean posterior, renormalised over the candidates; None for a language without a token.
        low, high: Where that mean would lie for other utterances (bootstrap, 95 %).
        spread: Standard deviation from utterance to utterance.
        heard: Share of the utterances that are taken for this language rather than another candidate.
        cosine: Of mean encoder states; None without clips of that language.
        coverage: Share of the new language's tokens that this language's texts use too; None without its texts.
        adapters: Names of the adapters that write it.
    """

    language: str
    probability: float | None
    low: float | None
    high: float | None
    spread: float | None
    heard: float | None
    cosine: float | None = None
    coverage: float | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Similarity:
    """What a set of clips sounds like.

    Args:
        name: Of the set.
        language: The set's own language, which is no candidate; None if it was not said.
        num_utterances: Clips that were listened to.
        own: Mean posterior of the language's own token; None if it has none.
        share: How much of the posterior the candidates have together, own token left out.
        rows: The candidates, most similar first.
        centred: Whether the cosines are of states less the mean of all languages: raw ones are all near 1.
    """

    name: str
    language: str | None
    num_utterances: int
    own: float | None
    share: float
    rows: tuple[SimilarLanguage, ...]
    centred: bool = False

    @property
    def nearest(self) -> SimilarLanguage:
        """The most similar candidate."""
        return self.rows[0]

    @property
    def is_weak(self) -> bool:
        """Whether the candidates hold so little of the posterior that their order means little."""
        return self.share < WEAK_EVIDENCE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, and for the record in an adapter."""
        return asdict(self)

    def to_markdown(self, longest: int = 10) -> str:
        """The table."""
        titles = ["language", "probability", "95 % interval", "spread", "heard", "cosine", "coverage", "adapters"]
        lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * 6 + "---|"]
        for row in self.rows[:longest]:
            interval = "" if row.low is None or row.high is None else f"{row.low:.1%} to {row.high:.1%}"
            cells = [f"{language_name(row.language)} ({row.language})", _percent(row.probability), interval, _percent(row.spread)]
            cells += [
                _percent(row.heard),
                "" if row.cosine is None else f"{row.cosine:.3f}",
                _percent(row.coverage),
                ", ".join(row.adapters),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if len(self.rows) > longest:
            lines.append(f"\n{len(self.rows) - longest} more.")
        return "\n".join(lines)

    def figure(self, longest: int = 10) -> Figure:
        """The posterior with its intervals, a row for each language."""
        from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.probability is not None][:longest]
        figure = Figure(figsize=(7, 1 + 0.34 * max(1, len(rows))), layout="constrained")
        axis = figure.subplots()
        for at, row in enumerate(rows):
            color = "C0" if row.adapters else "0.6"
            axis.barh(at, 100 * (row.probability or 0), color=color)
            if row.low is not None and row.high is not None:
                axis.plot([100 * row.low, 100 * row.high], [at, at], color="black", linewidth=1)
        axis.set_yticks(range(len(rows)), [f"{language_name(row.language)} ({row.language})" for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, None)
        axis.set_xlabel(
            f"language posterior in percent, {self.num_utterances} utterances" + ("; blue: has an adapter" if self._any else "")
        )
        axis.set_title(f"What {self.name} sounds like", loc="left", fontsize=10)
        return figure

    @property
    def _any(self) -> bool:
        return any(row.adapters for row in self.rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


# ---- one language against many ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heard:
    """What the base made of some clips: posteriors (utterances, languages), and the mean encoder state (d_model,)."""

    codes: list[str]
    posteriors: np.ndarray
    state: np.ndarray


def language_similarity(
    model: Any,
    processor: WhisperProcessor,
    clips: Clips,
    *,
    language: str | None = None,
    among: Collection[str] | None = None,
    others: Mapping[str, Clips] | None = None,
    adapters: Mapping[str, str] | None = None,
    num_utterances: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    precision: str = "auto",
) -> Similarity:
    """Rank languages by how much a set of clips sounds like them.

    Args:
        model, processor: a Whisper, with or without adapters, which stay out of it.
        clips: the new language.
        language: its code; its own token is masked, or it would always be nearest to itself.
        among: candidates; None: all that the model has tokens for, and those of `others`.
        others: clips of other languages, for cosine and coverage.
        adapters: adapter name -> language, to be shown in the table.
        num_utterances: clips listened to, drawn by `seed`.
        batch_size, precision: of the encoder.

    Raises:
        ValueError: No clip, or no candidate.
    """
    own = None if language is None else language_code(language)
    others = {language_code(code): other for code, other in (others or {}).items() if language_code(code) != own}
    tokens = list(language_tokens(model) or {"en": 0})
    wanted = list(dict.fromkeys([*tokens, *others] if among is None else map(language_code, among)))
    if unknown := [code for code in wanted if code not in tokens and code not in others]:
        allowed_codes(tokens, unknown)  # refuses with the languages that can be heard
    candidates = [code for code in wanted if code != own]
    if not candidates:
        raise ValueError("There is no language to compare with. Leave `among` out to compare with all that the model hears.")
    heard = _listen(model, processor, clips, num_utterances, batch_size, seed, precision)
    hearable = [code for code in candidates if code in heard.codes]
    masses = heard.posteriors[:, [heard.codes.index(code) for code in hearable]]  # (utterances, candidates)
    rows = _ranked(hearable, masses, seed)
    states = {code: _listen(model, processor, other, num_utterances, batch_size, seed, precision).state for code, other in others.items()}
    cosines, centred = _cosines(heard.state, states)
    covered = {code: token_coverage(processor, clips.texts, other.texts) for code, other in others.items()}
    named: dict[str, list[str]] = {}
    for name, code in (adapters or {}).items():
        named.setdefault(language_code(code), []).append(name)
    rows += [(code, None, None, None, None, None) for code in candidates if code not in hearable]
    ranked = [SimilarLanguage(*row, cosines.get(row[0]), covered.get(row[0]), tuple(sorted(named.get(row[0], ())))) for row in rows]
    ranked.sort(
        key=lambda row: (-(row.probability if row.probability is not None else -1), -(row.cosine if row.cosine is not None else -2))
    )
    mean = heard.posteriors.mean(0)
    return Similarity(
        clips.name,
        own,
        len(heard.posteriors),
        float(mean[heard.codes.index(own)]) if own in heard.codes else None,
        float(masses.sum(1).mean()) if hearable else 0.0,
        tuple(ranked),
        centred,
    )


def _listen(
    model: Any, processor: WhisperProcessor, clips: Clips, num_utterances: int, batch_size: int, seed: int, precision: str
) -> _Heard:
    if not len(clips):
        raise ValueError(f"{clips.name} has no clips to listen to.")
    chosen = np.random.default_rng(seed).permutation(len(clips))[:num_utterances].tolist()
    chosen.sort(key=lambda row: len(clips.clips[row].samples))
    extractor = processor.feature_extractor
    posteriors, states = [], []
    codes = list(language_tokens(model) or {"en": 0})
    with adapters_off(model):
        for start in range(0, len(chosen), batch_size):
            waves = [clips[row]["audio"] for row in chosen[start : start + batch_size]]
            encoded = encode(model, extract_features(processor, waves), precision)
            posteriors += [
                [each.probabilities[code] for code in codes] for each in language_posterior(model, None, encoder_outputs=encoded)
            ]
            for wave, state in zip(waves, encoded.last_hidden_state, strict=True):  # (positions, d_model)
                positions = -(-len(wave) // (2 * extractor.hop_length))  # those that heard the clip, not the silence behind it
                states.append(state[: max(1, positions)].float().mean(0).cpu().numpy())
    return _Heard(codes, np.array(posteriors, np.float64), np.mean(states, axis=0))


_RankedRow = tuple[str, "float | None", "float | None", "float | None", "float | None", "float | None"]


def _ranked(codes: Sequence[str], masses: np.ndarray, seed: int, num_resamples: int = 1000) -> list[_RankedRow]:
    """(code, probability, low, high, spread, heard) from posteriors (utterances, candidates); renormalised after averaging."""
    if not codes:
        return []
    mean = masses.mean(0)
    probabilities = mean / mean.sum()
    shares = masses / np.maximum(masses.sum(1, keepdims=True), 1e-30)  # (utterances, candidates)
    drawn = np.random.default_rng(seed).integers(len(masses), size=(num_resamples, len(masses)))
    means = np.stack([masses[rows].mean(0) for rows in drawn])  # (resamples, candidates)
    low, high = np.quantile(means / means.sum(1, keepdims=True), [0.025, 0.975], axis=0)
    heard = np.bincount(masses.argmax(1), minlength=len(codes)) / len(masses)
    several = len(masses) > 1
    return [
        (
            code,
            float(probabilities[at]),
            float(low[at]) if several else None,
            float(high[at]) if several else None,
            float(shares[:, at].std()) if several else None,
            float(heard[at]),
        )
        for at, code in enumerate(codes)
    ]


def _cosines(state: np.ndarray, others: Mapping[str, np.ndarray]) -> tuple[dict[str, float], bool]:
    """Cosine with each; from three languages on their common mean is taken off first, since it is most of every state."""
    if not others:
        return {}, False
    centred = len(others) >= 2
    middle = np.mean([state, *others.values()], axis=0) if centred else 0.0
    return {code: cosine(state - middle, other - middle) for code, other in others.items()}, centred


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two vectors; 0 if one of them is zero."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms > 0 else 0.0


def token_coverage(processor: WhisperProcessor, texts: Sequence[str], other_texts: Sequence[str]) -> float:
    """Share of the tokens in `texts` that also occur in `other_texts`, each occurrence counted. Depends on how much text there is."""

    def tokens(lines: Sequence[str]) -> list[int]:
        return [token for line in lines for token in processor.tokenizer(f" {line}", add_special_tokens=False).input_ids]

    written = tokens(texts)
    if not written:
        raise ValueError("There is no text to compare tokens of.")
    known = set(tokens(other_texts))
    return sum(token in known for token in written) / len(written)


# ---- all pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimilarityMatrix:
    """All pairs of some languages; rows are what is spoken, columns what it is compared with. Missing values are nan.

    Args:
        languages: Codes, in the order of rows and columns.
        posterior: (languages, languages) mean posterior, not renormalised: the diagonal is how often a language is recognised.
        cosine: (languages, languages) of mean encoder states, centred from three languages on. Centred cosines of k languages average about
            -1 / (k - 1): compare pairs with each other, not with 0.
        coverage: (languages, languages) of tokens.
        num_utterances: clips listened to of each language.
    """

    languages: tuple[str, ...]
    posterior: np.ndarray
    cosine: np.ndarray
    coverage: np.ndarray
    num_utterances: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; nan is null."""
        tables = {name: getattr(self, name) for name in ("posterior", "cosine", "coverage")}
        plain = {name: [[None if np.isnan(cell) else float(cell) for cell in row] for row in table] for name, table in tables.items()}
        return {"languages": list(self.languages), "num_utterances": list(self.num_utterances), **plain}

    def figure(self) -> Figure:
        """Three heat maps."""
        from matplotlib.figure import Figure

        size = len(self.languages)
        figure = Figure(figsize=(3 * (1.4 + 0.42 * size), 1.4 + 0.42 * size), layout="constrained")
        titles = {
            "posterior": "heard as",
            "cosine": "encoder cosine" + (", centred" if size > 2 else ""),
            "coverage": "tokens also used by",
        }
        for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            table = getattr(self, name)
            lowest = -1.0 if name == "cosine" else 0.0
            axis.imshow(table, vmin=lowest, vmax=1, cmap="RdBu" if lowest else "Blues")
            axis.set_facecolor("0.85")  # shows where there is no value
            axis.set_xticks(range(size), self.languages)
            axis.set_yticks(range(size), self.languages)
            axis.set_title(title, fontsize=10)
            for (row, column), value in np.ndenumerate(table):
                dark = abs(value) > 0.6
                text = "" if np.isnan(value) else f"{value:.2f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        return figure


def similarity_matrix(
    model: Any,
    processor: WhisperProcessor,
    sets: Mapping[str, Clips],
    *,
    num_utterances: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    precision: str = "auto",
) -> SimilarityMatrix:
    """Every pair of languages in the three views.

    Args:
        sets: code -> clips of that language, two or more.
        Others: as in `language_similarity`.
    """
    clips = {language_code(code): each for code, each in sets.items()}
    if len(clips) < 2:
        raise ValueError(f"A matrix needs two languages or more; got {', '.join(clips) or 'none'}.")
    heard = {code: _listen(model, processor, each, num_utterances, batch_size, seed, precision) for code, each in clips.items()}
    codes = tuple(heard)
    middle = np.mean([each.state for each in heard.values()], axis=0) if len(codes) > 2 else 0.0
    posterior = [
        [float(heard[row].posteriors.mean(0)[heard[row].codes.index(column)]) if column in heard[row].codes else np.nan for column in codes]
        for row in codes
    ]
    cosines = [[cosine(heard[row].state - middle, heard[column].state - middle) for column in codes] for row in codes]
    coverage = [[token_coverage(processor, clips[row].texts, clips[column].texts) for column in codes] for row in codes]
    num_heard = tuple(len(heard[code].posteriors) for code in codes)
    return SimilarityMatrix(codes, np.array(posterior), np.array(cosines), np.array(coverage), num_heard)


def save_similarity(folder: str | Path, similarity: Similarity, matrix: SimilarityMatrix | None = None) -> Path:
    """Write `similarity.json`, `.md` and `.png`, and `similarity_matrix.png` where there is one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    row = similarity.to_dict() | ({} if matrix is None else {"matrix": matrix.to_dict()})
    (folder / "similarity.json").write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "similarity.md").write_text(f"# What {similarity.name} sounds like\n\n{similarity.to_markdown()}\n", "utf-8")
    similarity.figure().savefig(folder / "similarity.png", dpi=150)
    if matrix is not None:
        matrix.figure().savefig(folder / "similarity_matrix.png", dpi=150)
    return folder
