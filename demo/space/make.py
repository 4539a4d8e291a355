"""Fills a folder that is a Space: the packages with the pocket, app.py, requirements.txt and the card. Upload it, and the Space runs.

    python -m demo.space.make my-space --hardware zero --model openai/whisper-small --adapters my-team/whisper-small-s2lora-cy

The packages are copied as they are installed here, so the Space needs no release of them. Nothing is sent anywhere.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

Hardware: TypeAlias = Literal["cpu", "gpu", "zero"]

PACKAGES = ("peft_s2lora", "whisper_moe", "hub_utils", "demo")
HERE = Path(__file__).parent
_FLAVORS = {"cpu": "cpu-basic", "gpu": "t4-small", "zero": "zero-a10g"}  # the Hub's names; the last is ZeroGPU's, whatever it runs on
_REPOSITORY = r"[\w.-]+/[\w.-]+"
_ON_HUB = rf"{_REPOSITORY}(@[\w./-]+)?(/[\w./-]+)?|owner:[\w.-]+|collection:{_REPOSITORY}"  # what `--adapters` takes, folders aside
_BINARY = ("safetensors", "png", "wav", "ogg", "flac", "mp3")


def make_space(
    out: Path,
    *,
    hardware: Hardware = "cpu",
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    title: str | None = None,
) -> list[str]:
    """Fill a folder with everything that a Space needs.

    Args:
        out: a folder that does not exist yet, or is empty.
        hardware: cpu, gpu or zero (ZeroGPU).
        model: Hub id of the base model. Default: the pocket, which is copied along.
        adapters: adapters on the Hub for that model, as `whisper-moe-demo --adapters` names them. Default: those of the pocket.
        title: what the Space is called on the Hub.

    Returns:
        The commands that make the Space on the Hub, in order.

    Raises:
        ValueError: There is something in `out`, or a value cannot be written into a card.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is there already. Name a new folder, or empty that one.")
    card = _card((HERE / "README.md").read_text("utf-8"), hardware, model, adapters, title)
    out.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        shutil.copytree(_home(package), out / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copy(HERE / "app.py", out / "app.py")
    (out / "README.md").write_text(card, "utf-8")
    (out / "requirements.txt").write_text(_requirements((HERE / "requirements.txt").read_text("utf-8"), hardware), "utf-8")
    (out / ".gitattributes").write_text("".join(f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in _BINARY), "utf-8")
    return _commands(out, hardware, model, adapters)


def _home(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    return Path(spec.origin or "").parent


def _card(card: str, hardware: Hardware, model: str | None, adapters: tuple[str, ...], title: str | None) -> str:
    """The card with what was chosen in its front matter."""
    for each in [*adapters, *([] if model is None else [model])]:
        if not re.fullmatch(_ON_HUB if each is not model else _REPOSITORY, each):
            raise ValueError(f"A Space fetches models and adapters from the Hub: give 'owner/name', not {each!r}.")
    if title is not None and not re.fullmatch(r"[^\"\\\x00-\x1f]{1,100}", title):
        raise ValueError(f"A title is one line of at most 100 characters without quotation marks; got {title!r}.")
    named = [each for each in (model, *adapters) if each is not None and ":" not in each]
    names = ["/".join(each.partition("@")[0].split("/")[:2]) for each in named]
    card = card.replace("models: []\n", "models:\n" + "".join(f"  - {name}\n" for name in names) if names else "models: []\n", 1)
    card = card.replace("suggested_hardware: cpu-basic\n", f"suggested_hardware: {_FLAVORS[hardware]}\n", 1)
    return card if title is None else re.sub(r"(?m)^title: .*$", lambda _: f'title: "{title}"', card, count=1)


def _requirements(text: str, hardware: Hardware) -> str:
    """Without the line for CPUs where there is a GPU."""
    if hardware == "cpu":
        return text
    return "".join(line for line in text.splitlines(keepends=True) if "whl/cpu" not in line and "CPU hardware" not in line)


def _commands(out: Path, hardware: Hardware, model: str | None, adapters: tuple[str, ...]) -> list[str]:
    variables = {"MODEL": model, "ADAPTERS": ",".join(adapters) or None}
    given = "".join(f" --env {name}={value}" for name, value in variables.items() if value is not None)
    return [
        "hf auth login",
        f"hf repos create YOU/NAME --type space --space-sdk gradio --flavor {_FLAVORS[hardware]}",
        *([f"hf spaces variables add YOU/NAME{given}"] if given else []),
        f"hf upload YOU/NAME {out} . --type space",
        "hf spaces logs YOU/NAME",
    ]


def main() -> None:
    """`python -m demo.space.make`."""
    import tyro

    try:
        commands = tyro.cli(make_space, prog="python -m demo.space.make", config=(tyro.conf.PositionalRequiredArgs,))
    except (ValueError, OSError) as error:
        raise SystemExit(f"demo.space.make: {error}") from error
    print("The folder is ready. With your own name for YOU/NAME:", *commands, sep="\n    ")


if __name__ == "__main__":
    main()
