"""The documentation cannot go stale: every ```python block of README.md and docs/*.md runs, every `whisper-moe` command of a
```bash block is one the command line understands, and every relative link leads somewhere.

Blocks of one file share their names and run in order, in a folder of their own that holds `recording.wav`. A comment in the
line above a block says what it needs; what is absent there skips the block:

    <!-- needs: pocket -->    the trained pocket Whisper
    <!-- needs: network -->   the Hub; such a block is never run here, its syntax and its imports are checked
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tyro

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>\w+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One ```python block."""

    page: Path
    line: int
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["needs"]) for match in BLOCK.finditer(text)]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
MARKS = {"pocket": [pytest.mark.pocket], "network": [], None: []}


@pytest.fixture(scope="module")
def pages_run(tmp_path_factory):
    """Runs a page's blocks up to a given one, each once. State of a page: names, folder, blocks that have run."""
    state: dict[Path, tuple[dict, Path, list[Block]]] = {}

    def run(last: Block, change_folder) -> None:
        if last.page not in state:
            folder = tmp_path_factory.mktemp(last.page.stem)
            write_recording(folder / "recording.wav")
            state[last.page] = ({"__name__": "__main__"}, folder, [])
        names, folder, done = state[last.page]
        change_folder(folder)
        for block in (block for block in BLOCKS if block.page == last.page and block.line <= last.line):
            if block not in done and block.needs in (None, last.needs):
                done.append(block)
                # Line numbers as in the page, so that a traceback points into it.
                exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)

    return run


def write_recording(path: Path) -> None:
    """A spoken example that ships with the page; where it is absent, a tone."""
    example = ROOT / "demo" / "examples" / "english.wav"
    if example.is_file():
        path.write_bytes(example.read_bytes())
    else:
        soundfile.write(path, 0.1 * np.sin(np.arange(16_000) / 5), 16_000)


@pytest.mark.parametrize("block", [pytest.param(block, marks=MARKS[block.needs], id=str(block)) for block in BLOCKS])
def test_a_block_of_the_documentation_runs(block, pages_run, monkeypatch):
    if block.needs == "network":
        check_imports(block)
    else:
        pages_run(block, monkeypatch.chdir)


def check_imports(block: Block) -> None:
    """What a block would import is there, though the block itself cannot run."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], f"{block}: not in {node.module}"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_documentation_imports_our_libraries_by_their_public_names(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom):
            deep = re.match(r"(peft_s2lora|hub_utils|whisper_moe)\.", node.module)
            assert deep is None, f"{block} imports from {node.module}; readers import from {deep[1]}"


def read_commands(page: Path) -> list[str]:
    """The `whisper-moe` lines of a page's ```bash blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("whisper-moe ")]


@pytest.mark.parametrize("command", [command for page in PAGES for command in read_commands(page)])
def test_a_command_of_the_documentation_is_understood(command):
    cli = importlib.import_module("whisper_moe.cli")
    tyro.cli(cli.Command, args=shlex.split(command, comments=True)[1:])  # leaves with SystemExit if it is not


def test_the_reader_finds_blocks_their_lines_and_their_needs():
    text = "# Title\n\n```python\na = 1\n```\n\n<!-- needs: network -->\n```python\nb = 2\n```\n\n```bash\nnot python\n```\n"
    found = [(match["needs"], match["code"]) for match in BLOCK.finditer(text)]
    assert found == [(None, "a = 1\n"), ("network", "b = 2\n")]
    assert BLOCKS, "no block found in the documentation"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]
