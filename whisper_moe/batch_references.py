"""What is said in the recordings of a batch: a table of references, and the error rates of transcripts against it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_moe.languages import language_code, language_name


@dataclass(frozen=True)
class Reference:
    """What is said in a recording, and in which language, if the table says it."""

    text: str
    language: str | None


def read_references(table: str | os.PathLike[str], recordings: Collection[str]) -> dict[str, Reference]:
    """Read the table of what is said, by the recordings' names.

    Raises:
        ValueError: No such table, a column is missing, or none of its names is a recording's.
    """
    from whisper_moe.sources import TABLE_SUFFIXES, open_rows

    path = Path(table)
    if not path.is_file() or path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is no table of references. Expected a file that ends in {', '.join(TABLE_SUFFIXES)}.")
    rows = [row for row in open_rows(path).read() if row.get("audio") and isinstance(row.get("text"), str) and row["text"].strip()]
    names = [Path(os.path.relpath(row["audio"], path.parent)).as_posix() for row in rows]
    if not set(recordings) & set(names):
        shown = f"its first name is {names[0]!r}, a recording is called {next(iter(recordings))!r}" if names else "it has no row with both"
        raise ValueError(f"{path} does not say of any recording what is said in it: {shown}. Names start at the source.")
    return {name: Reference(row["text"], row["language"] or None) for name, row in zip(names, rows, strict=True)}


def given_languages(table: dict[str, Reference]) -> dict[str, str]:
    languages = {name: _code(row.language) for name, row in table.items() if row.language}
    if not languages:
        raise ValueError("known_languages takes languages from the references; give references with a column 'language'.")
    return languages


def _code(language: str) -> str:
    """The code of a language; what nobody knows stays as it is, and is refused where it is used, for that file."""
    try:
        return language_code(language)
    except ValueError:
        return language


def evaluate_transcripts(rows: Iterator[dict[str, Any]], table: dict[str, Reference]) -> dict[str, Any]:
    """Error rates of transcripts by language, with bootstrap intervals, under both normalisers.

    A language is that of the references; where they do not say it, the one that was written.

    Returns:
        `normalizers`; `languages`: rows of `language`, `name`, `files`, `rates` (normaliser -> `wer` and `cer` with their intervals,
        and which of them is the `headline`); `without_transcript`: references whose recording has none; `heard_right`: share of the files
        with a known language that were written in it, None where none is known; `problems`.
    """
    from whisper_moe.evaluate import NORMALIZERS, count_errors
    from whisper_moe.intervals import bootstrap_rate

    groups: dict[str, list[tuple[str, str]]] = {}
    found, told, right = 0, 0, 0
    for row in rows:
        reference = table.get(row["file"])
        if reference is None:
            continue
        found += 1
        language = _code(reference.language) if reference.language else row["language"] or ""
        groups.setdefault(language, []).append((reference.text, row["text"]))
        told += reference.language is not None
        right += reference.language is not None and row["language"] == language
    evaluated: dict[str, Any] = {"normalizers": list(NORMALIZERS), "languages": [], "problems": []}
    for language, pairs in sorted(groups.items()):
        rates = {}
        said, written = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        try:
            for normalizer in NORMALIZERS:
                counts = count_errors(said, written, normalizer, language=language)
                wer = bootstrap_rate(counts.word_errors, counts.words)
                cer = bootstrap_rate(counts.char_errors, counts.chars)
                rates[normalizer] = {"wer": wer.to_dict(), "cer": cer.to_dict(), "headline": counts.scores.headline}
        except ValueError as error:
            evaluated["problems"].append(f"{language or 'nobody speaks'}: {error}")
            continue
        name = language_name(language) if language else "no language"
        evaluated["languages"].append({"language": language, "name": name, "files": len(pairs), "rates": rates})
    return evaluated | {"without_transcript": len(table) - found, "heard_right": right / told if told else None}
