"""Write the measured tables of README.md from the committed results, so that no figure in it is typed by hand.

    python -m recipes.update_readme

Reads the newest `benchmarks/results/pocket_*.json` and the `language_adapter.json` of each shipped adapter, and replaces what
stands between `<!-- POCKET-TABLE -->` and `<!-- /POCKET-TABLE -->`. A test fails when the page and the files disagree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whisper_moe.languages import language_name
from whisper_moe.pocket import ADAPTERS
from whisper_moe.registry import AdapterRegistry, LanguageAdapter

ROOT = Path(__file__).parent.parent
START, END = "<!-- POCKET-TABLE -->", "<!-- /POCKET-TABLE -->"
SETS = {
    "de_kerstin": "German, one speaker, who is also in training",
    "en_kathleen": "English, one speaker, who is also in training",
    "en_speechocean_adult": "English with a Mandarin accent, new speakers",
}


def newest_results(results: Path) -> dict[str, Any]:
    """The last measurement of the pocket."""
    found: dict[str, Any] = json.loads(max(results.glob("pocket_*.json")).read_text("utf-8"))
    return found


def pocket_table(results: dict[str, Any]) -> list[str]:
    """The base: synthetic speech by language, then recordings."""
    written = {code: row for code, row in results["synthetic"].items() if "wer" in row}
    lines = ["| the pocket alone, on | WER | CER | language heard right |", "|---|---:|---:|---:|"]
    for code, row in written.items():
        lines.append(f"| {language_name(code)}, synthetic | {row['wer']:.0%} | {row['cer']:.0%} | {row['detected']:.0%} |")
    detected = {code: row for code, row in results["synthetic"].items() if code not in written}
    for code, row in detected.items():
        lines.append(f"| {language_name(code)}, synthetic | not written | | {row['detected']:.0%} |")
    for name, row in results["recorded"].items():
        lines.append(f"| {SETS[name]} | {row['wer']:.0%} | {row['cer']:.0%} | |")
    return lines


def adapter_table(adapters: list[LanguageAdapter]) -> list[str]:
    """The shipped adapters: what each changes on its own test set."""
    lines = ["| adapter | for | method | parameters | file | WER | CER |", "|---|---|---|---:|---:|---:|---:|"]
    for adapter in adapters:
        before, after = adapter.metrics["before"], adapter.metrics["after"]
        spoken = language_name(adapter.language) + ("" if adapter.domain is None else f", {adapter.domain} speech")
        method = {"LORA": "LoRA", "S2LORA": "S2-LoRA"}[adapter.peft_type]
        rates = [f"{before[rate]:.0%} → {after[rate]:.0%}" for rate in ("wer", "cer")]
        size = f"{adapter.num_bytes / 1e6:.1f} MB" if adapter.num_bytes >= 1e6 else f"{adapter.num_bytes / 1e3:.0f} kB"
        lines.append(f"| `{adapter.name}` | {spoken} | {method} | {adapter.num_parameters:,} | {size} | {' | '.join(rates)} |")
    return lines


def block(results: dict[str, Any], adapters: list[LanguageAdapter]) -> str:
    """The whole block, markers included."""
    summary = results["summary"]
    text = (
        f"Measured by `recipes.evaluate_pocket` on {results['date']} (normaliser `{results['normalizer']}`, greedy). Synthetic: espeak-ng, "
        f"sentences and voices kept out of training; on average WER {summary['synthetic_wer']:.1%}, CER {summary['synthetic_cer']:.1%}, "
        f"language right {summary['detected']:.1%}."
    )
    return "\n".join([START, text, "", *pocket_table(results), "", *adapter_table(adapters), END])


def updated(page: str, new: str) -> str:
    """The page with its block replaced. Raises `ValueError` if the markers are gone."""
    if START not in page or END not in page:
        raise ValueError(f"The page has lost its markers {START} and {END}; put them where the tables belong.")
    return page[: page.index(START)] + new + page[page.index(END) + len(END) :]


def main() -> None:
    page = ROOT / "README.md"
    new = block(newest_results(ROOT / "benchmarks" / "results"), list(AdapterRegistry.from_folder(ADAPTERS)))
    page.write_text(updated(page.read_text("utf-8"), new), "utf-8")


if __name__ == "__main__":
    main()
