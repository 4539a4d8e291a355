"""Add Kichwa to the shipped pocket in each of the four ways, and measure all of them.

    python -m recipes.four_starts                 # everything; goes on where it stopped
    python -m recipes.four_starts --smoke         # the same path in under a minute, on a handful of clips; its figures mean nothing

Cold, warm, stacked and a mixture get the same clips, steps, seed, rank and targets. They begin from adapters for English (recordings of
many adults, trained here), Spanish (espeak-ng, trained here) and Welsh (espeak-ng, shipped); which of them is "most similar" the pocket
decides by what it hears. It has heard people speak only English and German, so it takes recordings of people for English: that is a
statement about microphones as much as about languages. So one more adapter is stacked on Spanish, whose spelling and loanwords
Kichwa shares, whatever the pocket hears.

Afterwards: error rates on the test clips with bootstrap intervals and paired tests, and old languages' outputs before and after each
adapter, bit for bit. Results go to `benchmarks/results`, the table and the figure into `docs/starts.md`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from recipes.evaluate_pocket import cpu_name, pack_clips
from recipes.synthetic_speech import pack_synthetic
from recipes.train_shipped_adapters import ALL_LINEAR, SMALL_MODEL, synthetic
from recipes.train_shipped_adapters import Paths as ShippedPaths
from whisper_moe.comparison import Comparison, EvalSet, OldLanguage, SystemResult, evaluate_adapters
from whisper_moe.data import Clips, load_clips
from whisper_moe.languages import language_name
from whisper_moe.pocket import ADAPTERS, MODEL
from whisper_moe.registry import LanguageAdapter
from whisper_moe.similarity import Similarity, language_similarity
from whisper_moe.starts import Start, choose_start
from whisper_moe.train import POCKET_ID, CardNotes, TrainSettings, train_language_adapter

LANGUAGE, CARRIER = "qug", "es"
"""Kichwa, and the token it is prompted with: that of the shipped Kichwa adapter, the same for all starts."""
PAGE, FIGURE = "starts.md", "four_starts.png"
START, END = "<!-- FOUR-STARTS -->", "<!-- /FOUR-STARTS -->"
KILLKAN = (
    "Killkan: Taguchi, Saransig, Velásquez, Chiang (LREC-COLING 2024), of the radio drama 'Jaboneropak Ayllullaktapi' by Radialistas "
    "Apasionadas y Apasionados, CC BY 4.0; a part of its training clips."
)


@dataclass(frozen=True)
class Settings:
    """What is run, and where."""

    num_steps: int = 120
    """Optimizer steps of every start."""
    source_steps: int = 120
    """Optimizer steps of the adapters to begin from."""
    num_clips: int = 400
    """Kichwa clips to train on."""
    num_test: int | None = None
    """Kichwa clips to test on; all by default."""
    num_old: int = 12
    """Clips of each old language."""
    num_spoken: int = 800
    """Clips of each source that is trained: English recordings, and Spanish for espeak-ng to speak."""
    batch_size: int = 16
    rank: int = 16
    """Of every adapter that is trained; that of the shipped Welsh one."""
    also_from: str | None = "es"
    """A source to stack on as well, whatever similarity says."""
    seed: int = 0
    threads: int = 2
    smoke: bool = False
    """Try the path out: two steps, a handful of clips, nothing written into the repository."""
    speech: Path = Path("../shared/speech")
    """Recorded speech, a folder per set."""
    text: Path = Path("../shared/text")
    """Sentences for espeak-ng."""
    work: Path = Path("runs/four_starts")
    """Where adapters and packs are kept; what is complete there is not made again."""
    results: Path = Path("benchmarks/results")
    """Folder for the JSON."""
    docs: Path = Path("docs")
    """Folder of the page and its images."""

    def made_small(self) -> Settings:
        """The settings of `--smoke`: no speech is synthesised, so Spanish is no source."""
        if not self.smoke:
            return self
        work = self.work / "smoke"
        small: dict[str, Any] = {
            "num_steps": 1,
            "source_steps": 1,
            "num_clips": 4,
            "num_test": 2,
            "num_old": 1,
            "num_spoken": 0,
            "batch_size": 2,
        }
        return replace(self, **small, also_from=None, work=work, results=work, docs=work / "docs")

    def training(self, num_steps: int) -> TrainSettings:
        options: dict[str, Any] = {"num_workers": 0} if self.smoke else {}
        return replace(SMALL_MODEL, max_steps=num_steps, batch_size=self.batch_size, num_checkpoints=3, seed=self.seed, **options)

    def lora(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=ALL_LINEAR)


# ---- data and sources --------------------------------------------------------------------------------------------------


def kichwa(settings: Settings, split: str, limit: int | None) -> Clips:
    """Recorded Kichwa; a few transcripts say [UNK] where the transcriber gave up."""
    return load_clips(settings.speech / "qug_killkan", split=split, language=LANGUAGE, exclude_text=r"\[UNK\]", limit=limit)


def spoken(settings: Settings, language: str, split: str) -> Clips:
    """Clips that espeak-ng speaks, kept in the work folder."""
    packs = settings.work / "packs"
    if not (packs / f"{language}.jsonl").exists():
        num_train = settings.num_spoken if language == "es" else 0
        pack_synthetic(settings.text, packs, language, num_train, num_test=settings.num_old, seed=settings.seed, workers=settings.threads)
    if split == "test":
        clips = pack_clips(packs, language, settings.num_old)
        return Clips(clips.clips, f"espeak-ng {language}/test")
    return synthetic(language)(ShippedPaths(packs=packs, parquet=settings.work / "parquet"), split)


def sources(settings: Settings) -> list[LanguageAdapter]:
    """The adapters to begin from: Welsh is shipped, the others are trained here."""
    options = [
        ("en", lambda: load_clips(settings.speech / "en_speechocean_adult", split="train", language="en", limit=settings.num_spoken or 4))
    ]
    if settings.num_spoken:
        options.append(("es", lambda: spoken(settings, "es", "train")))
    found = [LanguageAdapter.load(ADAPTERS / "cy")]
    for language, clips in options:
        found.append(
            _trained(settings, "sources", language, language, clips, settings.source_steps, choose_start("cold", config=settings.lora()))
        )
    return found


def _trained(
    settings: Settings, kind: str, name: str, language: str, clips: Callable[[], Clips], num_steps: int, start: Start
) -> LanguageAdapter:
    """The adapter, from the work folder if it is complete there."""
    out = settings.work / kind / name
    if (out / "language_adapter.json").is_file():
        return LanguageAdapter.load(out)
    print(f"{kind}/{name}: {start.kind}. {start.reason}", flush=True)
    return train_language_adapter(
        str(MODEL),
        clips(),
        language=language,
        out=out,
        name=name,
        carrier=CARRIER if language == LANGUAGE else None,
        base_id=POCKET_ID,
        start=start,
        settings=settings.training(num_steps),
        notes=CardNotes(train_data=KILLKAN if language == LANGUAGE else None, command="python -m recipes.four_starts"),
        resume=True,
        progress=False,
    )


def old_languages(settings: Settings) -> list[OldLanguage]:
    """Recordings and synthetic speech of languages that the pocket, or the shipped Welsh adapter, wrote before."""
    recorded = {"de_kerstin": "de", "en_kathleen": "en"}
    found = [
        OldLanguage(load_clips(settings.speech / name, split="test", language=code, limit=settings.num_old), code)
        for name, code in recorded.items()
    ]
    if not settings.smoke:
        found += [OldLanguage(spoken(settings, code, "test"), code) for code in ("es", "fr", "pl")]
        found.append(OldLanguage(spoken(settings, "cy", "test"), "cy", LanguageAdapter.load(ADAPTERS / "cy")))
    return found


# ---- the four starts ---------------------------------------------------------------------------------------------------


def starts(settings: Settings, candidates: list[LanguageAdapter], similarity: Similarity, hours: float, model: Any) -> dict[str, Start]:
    """Name -> start, the same rank and targets for all."""
    config = settings.lora()
    chosen = {kind: choose_start(kind, candidates, similarity, hours, config, model=model) for kind in ("cold", "warm", "stacked", "moe")}
    if settings.also_from is not None:
        named = [each for each in candidates if each.language == settings.also_from]
        chosen[f"stacked-{settings.also_from}"] = choose_start("stacked", named, None, hours, config, model=model)
    return chosen


def run(settings: Settings) -> dict[str, Any]:
    """Train what is missing, measure everything, and return all figures."""
    began = time.monotonic()
    _same_settings(settings)
    torch.set_num_threads(settings.threads)
    model = WhisperForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(MODEL)
    candidates = sources(settings)
    clips = kichwa(settings, "train", settings.num_clips)
    similarity = language_similarity(
        model, processor, clips, language=LANGUAGE, adapters={each.name: each.language for each in candidates}, seed=settings.seed
    )
    print(similarity.to_markdown(), flush=True)
    automatic = choose_start("auto", candidates, similarity, clips.hours, settings.lora(), model=model)
    print(f"auto: {automatic.kind}. {automatic.reason}", flush=True)
    chosen = starts(settings, candidates, similarity, clips.hours, model)
    adapters = [_trained(settings, "adapters", name, LANGUAGE, lambda: clips, settings.num_steps, start) for name, start in chosen.items()]
    evaluation = evaluate_adapters(
        model,
        processor,
        [EvalSet(kichwa(settings, "test", settings.num_test), LANGUAGE, CARRIER)],
        adapters,
        old_languages=old_languages(settings),
        batch_size=32,
        seed=settings.seed,
        name="pocket",
        save_to=settings.work / "evaluation",
    )
    if evaluation.problems:
        raise RuntimeError("; ".join(evaluation.problems))
    results = described(settings, similarity, automatic, clips, adapters, evaluation)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"four-starts_pocket_{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (settings.docs / "images").mkdir(parents=True, exist_ok=True)
    draw(evaluation, settings.docs / "images" / FIGURE)
    write_page(results, settings.docs / PAGE)
    return results


def _same_settings(settings: Settings) -> None:
    """Adapters that were made with other settings are not mixed with these."""
    of_evaluation = ("threads", "num_test", "num_old")
    told = {key: value for key, value in asdict(settings).items() if not isinstance(value, Path) and key not in of_evaluation}
    path = settings.work / "settings.json"
    if path.is_file() and (found := json.loads(path.read_text("utf-8"))) != told:
        differing = ", ".join(f"{key} {found.get(key)}, not {value}" for key, value in told.items() if found.get(key) != value)
        raise ValueError(f"{settings.work} holds a run with other settings ({differing}). Delete it, or choose another with --work.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=2) + "\n", "utf-8")


# ---- what is written ---------------------------------------------------------------------------------------------------


def described(
    settings: Settings, similarity: Similarity, automatic: Start, clips: Clips, adapters: list[LanguageAdapter], evaluation: Comparison
) -> dict[str, Any]:
    """Plain values: the run, its machine, and every figure."""
    rows = {}
    for adapter in adapters:
        row = json.loads((adapter.path / "language_adapter.json").read_text("utf-8"))
        rows[adapter.name] = {key: row[key] for key in ("num_parameters", "start")} | {
            "method": adapter.peft_type,
            "num_bytes": adapter.num_bytes,
            "last_loss": row["training"]["last_loss"],
        }
    told = {key: value for key, value in asdict(settings).items() if not isinstance(value, Path)}
    defaults = Settings()
    changed = [f" --{key.replace('_', '-')} {value}" for key, value in told.items() if value != getattr(defaults, key)]
    if settings.smoke:
        changed = [" --smoke"]
    return {
        "command": "python -m recipes.four_starts" + "".join(changed),
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": settings.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "settings": told,
        "training_clips": {"clips": len(clips), "hours": round(clips.hours, 3)},
        "similarity": similarity.to_dict() | {"rows": similarity.to_dict()["rows"][:13]},
        "auto": {"kind": automatic.kind, "reason": automatic.reason},
        "adapters": rows,
        "evaluation": evaluation.to_dict(),
    }


def table(results: dict[str, Any]) -> str:
    """The page's tables, from the results file alone."""
    evaluation, (measured,) = results["evaluation"], results["evaluation"]["sets"]
    normalizer = evaluation["settings"]["normalizers"][0]
    lines = ["| | begins from | trained | saved as | CER | WER |", "|---|---|---:|---|---:|---:|"]
    for system in measured["systems"]:
        adapter, rates = results["adapters"].get(system["name"]), system["rates"][normalizer]
        told = ["the pocket alone", "", ""]
        if adapter is not None:
            begins = " + ".join(f"{language_name(source['language'])}" for source in adapter["start"]["sources"]) or "nothing"
            method = {"LORA": "LoRA", "LORAMOE": "LoRA-MoE"}[adapter["method"]]
            told = [begins, f"{adapter['num_parameters']:,}", f"{method}, {adapter['num_bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {system['name']} | {' | '.join(told)} | {_interval(rates['cer'])} | {_interval(rates['wer'])} |")
    settings = results["settings"]
    lines += [
        "",
        f"{measured['num_clips']} test clips, {measured['hours'] * 60:.0f} minutes; intervals of {evaluation['settings']['level']:.0%}. ",
    ]
    lines[-1] += f"Trained on {results['training_clips']['clips']} clips ({results['training_clips']['hours'] * 60:.0f} minutes) for "
    lines[-1] += f"{settings['num_steps']} steps of {settings['batch_size']}, rank {settings['rank']}, seed {settings['seed']}."
    lines += ["", f"`auto` would have chosen **{results['auto']['kind']}**: {results['auto']['reason']}", ""]
    rate = measured["comparisons"][0]["rate"].upper()
    lines += [f"| pair | {rate} points lower | p after Holm |", "|---|---:|---:|"]
    for pair in measured["comparisons"]:
        if "base" not in (pair["better"], pair["than"]):
            spread = "" if pair["low"] is None else f" ({100 * pair['low']:.1f} to {100 * pair['high']:.1f})"
            lines.append(f"| {pair['better']} against {pair['than']} | {100 * pair['difference']:.1f}{spread} | {pair['p_adjusted']:.2g} |")
    lines += ["", "Old languages, before any adapter was attached and again after each of them:", ""]
    lines += ["| set | written by | clips | after all adapters: weights, encoder, logits, text |", "|---|---|---:|---|"]
    for name in dict.fromkeys(old["name"] for old in evaluation["old_languages"]):
        rows = [old for old in evaluation["old_languages"] if old["name"] == name]
        differing = sorted({part for old in rows for part in old["differing"]})
        verdict = f"**different: {', '.join(differing)}**" if differing else f"the same bits (`{rows[0]['digest']}`)"
        lines.append(f"| {name} ({rows[0]['language']}) | {rows[0]['served_by']} | {rows[0]['num_clips']} | {verdict} |")
    lines += ["", f"`{results['command']}`, {results['date']}, {results['machine']['cpu']}, {results['machine']['threads']} thread(s)."]
    return "\n".join(lines)


def _interval(rate: dict[str, Any]) -> str:
    if rate["low"] is None:
        return f"{rate['value']:.1%}"
    return f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def write_page(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the page's markers; a page that is not there is made of them alone."""
    block = f"{START}\n{table(results)}\n{END}"
    text = page.read_text("utf-8") if page.is_file() else f"{START}{END}\n"
    before, rest = text.split(START)
    page.write_text(f"{before}{block}{rest.split(END)[1]}", "utf-8")


def newest_results(results: Path) -> dict[str, Any]:
    """The last run."""
    found: dict[str, Any] = json.loads(max(results.glob("four-starts_pocket_*.json")).read_text("utf-8"))
    return found


def draw(evaluation: Comparison, path: Path) -> None:
    """Character and word error rates with their intervals, a row for each system."""
    from matplotlib.figure import Figure

    (measured,) = evaluation.sets
    normalizer = evaluation.settings["normalizers"][0]
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(measured.systems)), layout="constrained")
    for axis, rate in zip(figure.subplots(1, 2, sharey=True), ("cer", "wer"), strict=True):
        for at, system in enumerate(measured.systems):
            _draw_row(axis, at, system, rate, normalizer)
        axis.set_yticks(range(len(measured.systems)), [system.name for system in measured.systems])
        axis.set_ylim(len(measured.systems) - 0.4, -0.8)
        ends = [getattr(system.rates[normalizer], rate) for system in measured.systems]
        axis.set_xlim(0, 108 * max(interval.value if interval.high is None else interval.high for interval in ends))
        axis.grid(axis="x", color="0.9")
        axis.set_xlabel(f"{rate.upper()} in percent, {evaluation.settings['level']:.0%} interval")
    figure.suptitle(f"Kichwa on the pocket, {measured.num_clips} test clips", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, format="png", dpi=150)


def _draw_row(axis: Any, at: int, system: SystemResult, rate: str, normalizer: str) -> None:
    interval, color = getattr(system.rates[normalizer], rate), "0.45" if system.name == "base" else f"C{at}"
    if interval.low is not None:
        axis.plot([100 * interval.low, 100 * interval.high], [at, at], color=color, linewidth=2)
    axis.plot([100 * interval.value], [at], "o", color=color)
    axis.annotate(f"{interval.value:.1%}", (100 * interval.value, at), (0, 7), textcoords="offset points", ha="center", fontsize=9)


def main(settings: Settings) -> None:
    """See the top of this file."""
    if not settings.smoke and shutil.which("espeak-ng") is None:
        raise SystemExit("The Spanish and the old languages' clips are spoken by espeak-ng, which is not installed (Debian: espeak-ng).")
    results = run(settings.made_small())
    print(table(results), flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
