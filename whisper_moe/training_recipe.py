"""Recipes of a run as YAML: flat `key: value` lines, each key known and each value of the type its key wants.

Strict, because a run takes hours: a misspelt key is refused with the nearest known one, `language: no` (which YAML reads as false) is not
taken for a language, and a number in words is no number. Knows nothing of training; the keys and their types are the caller's.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from whisper_moe.train_settings import did_you_mean

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-3, which YAML 1.1 takes for a word
_WORDS = {True: ("yes", "on", "true"), False: ("no", "off", "false")}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def read_recipe(path: str | Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, checked and converted; a key that is left empty counts as not given.

    Args:
        path: a YAML file.
        keys: known key -> its type: `str`, `int`, `float`, `bool`, `Path`, a `Literal`, a `tuple[one of these, ...]`, each also
            `| None`.

    Raises:
        ValueError: No such file, no YAML, a key that is not known or stands twice, or a value of another type.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"A recipe is a .yaml file, got {str(path)!r}. Clips are named with --data.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}.") from error
    content = parse_yaml(text, path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a recipe is lines of `key: value`, such as `language: cy`.")
    known = list(keys)
    for key in content:
        if key not in keys:
            raise ValueError(f"{path}: unknown key {key!r}{did_you_mean(str(key), known)} Known: {', '.join(known)}.")
    return {key: checked(value, keys[key], f"{path}: {key}") for key, value in content.items() if value is not None}


def parse_yaml(text: str, path: Path) -> Any:
    """Plain data, and no key twice. Raises `ValueError` for what is no YAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data only, and no key twice: YAML itself would keep the last one without a word."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name, _ in node.value:
            if name.value in seen:
                raise ValueError(f"{path}, line {name.start_mark.line + 1}: the key {name.value!r} stands twice.")
            seen.add(name.value)
        found: dict[Any, Any] = loader.construct_mapping(node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    except (TypeError, RecursionError) as error:  # a list as a key, or a knot of aliases
        raise ValueError(f"{path} is not a recipe: {error}.") from error


def checked(value: Any, wanted: Any, where: str) -> Any:
    """The value as its type wants it (see `read_recipe`). Raises `ValueError`, which begins with `where`."""
    if get_origin(wanted) in (Union, types.UnionType):
        wanted = next(each for each in get_args(wanted) if each is not type(None))
    if get_origin(wanted) is tuple:
        of = get_args(wanted)[0]
        return tuple(checked(each, of, f"{where}, entry {at}") for at, each in enumerate(value if isinstance(value, list) else [value], 1))
    if get_origin(wanted) is Literal:
        allowed = get_args(wanted)
        if value not in allowed or isinstance(value, bool):
            _refuse(where, f"one of {', '.join(allowed)}", value)
        return value
    if wanted is float and isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        value = float(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    expected = str if wanted is Path else wanted
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        _refuse(where, _NAMES[wanted], value)
    return Path(value) if wanted is Path else value


def _refuse(where: str, expected: str, value: Any) -> None:
    hint = ""
    if isinstance(value, bool) and expected != _NAMES[bool]:
        words = " or ".join(_WORDS[value])
        hint = f" YAML reads a bare {words} so."
        hint += ' Quote it if that is what you mean: "no" is Norwegian.' if value is False else f' Quote it: "{_WORDS[value][0]}".'
    elif expected == "text" and isinstance(value, (int, float)):
        hint = f' Quote it: "{value}".'
    raise ValueError(f"{where} is {_shown(value)}, expected {expected}.{hint}")


def _shown(value: Any) -> str:
    text = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
