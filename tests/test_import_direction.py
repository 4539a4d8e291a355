"""Who may import whom: reads every import in the code and holds it to the picture in docs/architecture.md.

The three libraries do not import each other, nothing imports demo, recipes or benchmarks, and every library in use is a
declared dependency that something needs.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
LIBRARIES = {"peft_s2lora", "whisper_moe", "hub_utils"}

# room -> what it may import beside the standard library and itself
ALLOWED = {
    "peft_s2lora": {"torch", "peft", "transformers", "safetensors", "matplotlib"},
    "whisper_moe": {
        "torch", "peft", "transformers", "numpy", "safetensors", "soundfile", "soxr", "av", "jiwer", "pyarrow", "tyro",
        "ctranslate2", "datasets", "evaluate", "matplotlib", "ray", "fsspec", "yaml", "pysubs2",
    },
    "hub_utils": {"huggingface_hub", "peft", "safetensors"},
    "demo": {*LIBRARIES, "gradio", "numpy", "soxr", "tyro"},
    "recipes": {
        *LIBRARIES, "torch", "peft", "transformers", "numpy", "safetensors", "soundfile", "soxr", "pyarrow", "tokenizers", "tyro",
        "matplotlib", "datasets",
    },
    "benchmarks": {*LIBRARIES, "torch", "peft", "transformers", "numpy", "safetensors", "soundfile", "soxr", "pyarrow", "tyro"},
}  # fmt: skip

# The command line is where the rooms meet: it may use the others, inside its functions.
EXCEPTIONS = {
    ("whisper_moe/cli.py", "peft_s2lora"),
    ("whisper_moe/cli.py", "hub_utils"),
    ("whisper_moe/cli_hub.py", "hub_utils"),
    ("whisper_moe/cli_batch.py", "hub_utils"),
    ("whisper_moe/cli_data.py", "peft_s2lora"),
    ("whisper_moe/cli_data.py", "hub_utils"),
    ("whisper_moe/cli_train.py", "peft_s2lora"),
    ("whisper_moe/cli_train.py", "hub_utils"),
    ("whisper_moe/cli_many.py", "hub_utils"),
    ("whisper_moe/cli_growth.py", "peft_s2lora"),
}


def imported_packages(source: str) -> set[str]:
    """Top-level names of everything a source imports: at the top, in functions, for type checking, by `import_module("x")`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    return {name.partition(".")[0] for name in names if not name.startswith(".")}


def imports_of(room: str) -> list[tuple[str, str]]:
    """(file, imported package) pairs of a room, without the standard library and the room itself."""
    outside = sys.stdlib_module_names | {room}
    return [
        (path.relative_to(ROOT).as_posix(), name)
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in sorted(imported_packages(path.read_text(encoding="utf-8")) - outside)
    ]


def test_the_reader_sees_imports_wherever_they_stand():
    source = """
from __future__ import annotations
import torch.nn as nn
from .sibling import name
if TYPE_CHECKING:
    from peft import PeftModel
def f():
    import gradio, numpy as np
    importlib.import_module("whisper_moe.audio")
    importlib.import_module(".relative", __name__)
"""
    assert imported_packages(source) - sys.stdlib_module_names == {"torch", "peft", "gradio", "numpy", "whisper_moe"}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_the_picture_allows(room):
    pairs = imports_of(room)
    assert pairs or room == "benchmarks", f"no imports found in {room}: the test does not see its files"
    forbidden = [pair for pair in pairs if pair[1] not in ALLOWED[room] and pair not in EXCEPTIONS]
    assert not forbidden, f"{room} may import {sorted(ALLOWED[room])}; see docs/architecture.md. Not allowed: {forbidden}"


def test_every_exception_is_still_needed():
    used = {pair for room in ALLOWED for pair in imports_of(room)}
    assert used >= EXCEPTIONS


def test_the_exceptions_are_imported_inside_functions():
    for file, package in EXCEPTIONS:
        statements = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        top_level = [ast.unparse(node) for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert package not in imported_packages("\n".join(top_level))


# Declared for a library of ours that imports it behind our back, or to run what we write.
INDIRECT = {"accelerate", "faster_whisper"}
IMPORTED_AS = {"pyyaml": "yaml"}


def declared(requirements: list[str]) -> set[str]:
    names = {re.match(r"[\w-]+", requirement).group().replace("-", "_") for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_installed_code_imports_declared_dependencies_and_each_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installable = declared(project["dependencies"]).union(*(declared(extras[extra]) for extra in ("demo", "train", "ct2", "ray")))
    used = {name for room in (*LIBRARIES, "demo") for _, name in imports_of(room)} - LIBRARIES
    assert used - installable == set(), "imported, but no dependency of pyproject.toml"
    assert installable - used == INDIRECT, "in pyproject.toml, but nothing imports it"
