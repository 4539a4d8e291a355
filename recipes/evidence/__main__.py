"""The command; see the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from recipes.evidence import beyond, child_speech, languages
from recipes.evidence.collect import RESULTS
from recipes.evidence.collect import collect as write_results
from recipes.evidence.full_size import FullSize, expected, read_full_size
from recipes.evidence.ground import Ground
from recipes.evidence.page import PAGE, write_page
from recipes.evidence.runs import Context, Run, Settings, of_variant, perform
from recipes.evidence.smoke_data import make_smoke_data
from recipes.evidence.store import Store

PARTS = {"child": child_speech, "languages": languages, "beyond": beyond}
"""Name -> module with `runs(settings)`."""
Chosen = Annotated[Settings, tyro.conf.arg(name="")]
"""Settings whose options stand without a prefix: `--ground`, `--data.work`."""


def chosen_runs(settings: Settings) -> list[Run]:
    """The runs of the parts asked for. Raises `ValueError` for a part that is not known."""
    unknown = [part for part in settings.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"No part is called {', '.join(unknown)}. Known: {', '.join(PARTS)}.")
    made = [run for name in settings.parts or PARTS for run in PARTS[name].runs(settings)]
    return [run for run in made if settings.only is None or re.search(settings.only, run.key)]


def run(settings: Chosen) -> None:
    """Do what is not done yet; several processes may do it together."""
    settings = of_variant(settings)
    if settings.smoke:
        settings = smoked(settings)
    _perform(settings, Ground.open(settings.ground, settings.data))


def full_size(
    recipe: tyro.conf.Positional[Path], dry_run: bool = False, device: str | None = None, only: str | None = None, smoke: bool = False
) -> None:
    """The same runs on a real base and real data sets, as a recipe names them.

    Args:
        recipe: a YAML file: recipes/paper_s2lora.yaml or recipes/paper_lora_whisper.yaml.
        dry_run: only say which runs there are, what they train, and the hours and the price to expect; offline.
        device: instead of the recipe's.
        only: only the runs whose key this regular expression finds.
        smoke: try the path out: two steps, one seed, a handful of clips.
    """
    read = _recipe(recipe, smoke)
    settings = replace(read.settings, only=read.settings.only if only is None else only)
    read = replace(read, settings=settings, device=read.device if device is None else device)
    if dry_run:
        print(expected(read, chosen_runs(read.settings)))
    else:
        _perform(read.settings, read.open())


def _recipe(path: Path, smoke: bool) -> FullSize:
    read = read_full_size(path)
    return replace(read, settings=smoked(read.settings)) if smoke else read


def smoked(settings: Settings) -> Settings:
    return replace(settings, num_steps=2, batch_size=2, test_clips=3, seeds=1, smoke=True)


def _perform(settings: Settings, ground: Ground) -> None:
    torch.set_num_threads(settings.threads)
    context = Context(settings, ground, Store(settings.work / "rows"))
    done = perform(chosen_runs(settings), context, lambda line: print(line, flush=True))
    print(f"{done} runs done here")


def collect(settings: Chosen, results: Path = RESULTS, recipe: Path | None = None) -> None:
    """Put the runs that are there into one file per part, for `page`.

    Args:
        settings: those that the runs were made with.
        results: folder to write to.
        recipe: collect the runs of a full-size recipe. It says everything; of the settings it goes with --smoke alone.
    """
    if recipe is None:
        settings = of_variant(settings)
        written = write_results(settings, Ground.open(settings.ground, settings.data), results)
    else:
        if replace(settings, smoke=False) != Settings():
            raise ValueError(f"{recipe} says which runs to collect. Leave out the other settings, except --smoke, or --recipe.")
        read = _recipe(recipe, settings.smoke)
        made_by = f"python -m recipes.evidence full-size {recipe}" + (" --smoke" if settings.smoke else "")
        written = write_results(read.settings, replace(read, device="cpu").open(), results, made_by)  # only to know the base again
    for path in written:
        print(path)


def page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Make the page's tables, figures and claims of the results files."""
    for path in write_page(results, page):
        print(path)


def smoke(out: Path, parts: tuple[str, ...] = ()) -> None:
    """Everything in small, in a folder of its own: data, runs, results, page. Needs nothing but the project; its figures mean nothing."""
    settings = Settings(ground="pocket", parts=parts, smoke=True, data=make_smoke_data(out / "data"))
    run(settings)
    collect(settings, out / "results")
    page(out / "results", out / "docs" / PAGE.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the package."""
    tyro.extras.subcommand_cli_from_dict(
        {"run": run, "full-size": full_size, "smoke": smoke, "collect": collect, "page": page}, args=arguments
    )


if __name__ == "__main__":
    main()
