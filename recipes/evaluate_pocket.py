"""Measure a pocket model and write its card from the figures: nothing in the card is typed by hand.

    python -m recipes.evaluate_pocket --model whisper_moe/pocket/model --packs runs/pocket/data

Synthetic speech: the test split of each pack (held-out sentences, held-out voices), WER and CER of the languages the pocket
writes, and whether the language of all is detected. Recorded speech: the test clips of three sets. Results go to
`benchmarks/results/pocket_<date>.json`, the card to `<model>/README.md`. Minutes on two CPU cores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from recipes.synthetic_speech import read_pack
from whisper_moe.data import Clip, Clips, extract_features, load_clips
from whisper_moe.evaluate import encode, evaluate_clips, score, uses_bf16, write_down
from whisper_moe.languages import language_name, language_posterior
from whisper_moe.pocket import MODEL

RECORDED = {"de_kerstin": "de", "en_kathleen": "en", "en_speechocean_adult": "en"}


@dataclass(frozen=True)
class Settings:
    """What is measured, and where."""

    model: Path = MODEL
    """Folder of the pocket."""
    packs: Path = Path("runs/pocket/data")
    """Packs of `recipes.synthetic_speech`."""
    speech: Path = Path("../shared/speech")
    """Recorded speech, a folder per set."""
    results: Path = Path("benchmarks/results")
    """Folder for the JSON."""
    name: str = "pocket"
    """What the JSON is called, with the date behind it; another model of `recipes.own_decoder` is measured with the same lines."""
    card: bool = True
    """Write `README.md` into the model's folder."""
    limit: int | None = None
    """Clips per set, to try the path out."""
    batch_size: int = 32
    precision: str = "auto"
    """Of the encoder: bf16, fp32 or auto."""


# ---- measuring ---------------------------------------------------------------------------------------------------------


def pack_clips(packs: Path, language: str, limit: int | None) -> Clips:
    """The test split of a pack."""
    samples, rows = read_pack(packs, language)
    chosen = [row for row in rows if row["split"] == "test"][:limit]
    return Clips([Clip(samples[row["offset"] : row["offset"] + row["samples"]], row["text"], language) for row in chosen], language)


def measure_synthetic(
    model: Any, processor: WhisperProcessor, clips: Clips, language: str, candidates: list[str], writes: bool, settings: Settings
) -> dict[str, Any]:
    """Detection among `candidates` and among all languages, and error rates where the pocket writes the language."""
    heard, heard_of_all, texts = Counter[str](), Counter[str](), []
    for start in range(0, len(clips), settings.batch_size):
        waves = [clips[row]["audio"] for row in range(start, min(start + settings.batch_size, len(clips)))]
        encoded = encode(model, extract_features(processor, waves), settings.precision)
        heard.update(p.best[0] for p in language_posterior(model, None, allowed=candidates, encoder_outputs=encoded))
        heard_of_all.update(p.best[0] for p in language_posterior(model, None, encoder_outputs=encoded))
        if writes:
            texts += write_down(model, processor, encoded, language)
    row: dict[str, Any] = {"clips": len(clips), "detected": heard[language] / len(clips)}
    row |= {"detected_of_all_languages": heard_of_all[language] / len(clips)}
    row["heard_instead"] = {code: count for code, count in heard.most_common() if code != language}
    if writes:
        scores = score(clips.texts, texts, language=language)
        row |= {"wer": scores.wer, "cer": scores.cer, "examples": list(zip(clips.texts, texts, strict=True))[:3]}
    return row


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, with what they were measured on and with."""
    started = time.monotonic()
    trained = json.loads((settings.model / "training.json").read_text("utf-8"))
    model = WhisperForConditionalGeneration.from_pretrained(settings.model, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(settings.model)
    candidates = [*trained["written"], *trained["detected_only"]]
    synthetic = {}
    for language in candidates:
        clips = pack_clips(settings.packs, language, settings.limit)
        synthetic[language] = measure_synthetic(model, processor, clips, language, candidates, language in trained["written"], settings)
        print(f"{language}: {_line(synthetic[language])}", flush=True)
    recorded = {}
    for name, language in RECORDED.items():
        clips = load_clips(settings.speech / name, split="test", language=language, limit=settings.limit)
        evaluation = evaluate_clips(
            model, processor, clips, prompt_language=language, batch_size=settings.batch_size, precision=settings.precision
        )
        recorded[name] = {"language": language, "clips": len(clips), "wer": evaluation.scores.wer, "cer": evaluation.scores.cer}
        print(f"{name}: {evaluation.scores}", flush=True)
    written = [synthetic[language] for language in trained["written"]]
    return {
        "command": "python -m recipes.evaluate_pocket" + ("" if settings.limit is None else f" --limit {settings.limit}"),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "bf16": uses_bf16("cpu", settings.precision)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "model": {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "bytes": (settings.model / "model.safetensors").stat().st_size,
            **{name: getattr(model.config, name) for name in ("d_model", "encoder_layers", "decoder_layers", "vocab_size")},
            "window_s": processor.feature_extractor.chunk_length,
        },
        "training": trained,
        "normalizer": "mark-preserving",
        "synthetic": synthetic,
        "recorded": recorded,
        "summary": {
            "synthetic_wer": sum(row["wer"] for row in written) / len(written),
            "synthetic_cer": sum(row["cer"] for row in written) / len(written),
            "detected": sum(row["detected"] for row in synthetic.values()) / len(synthetic),
        },
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def _line(row: dict[str, Any]) -> str:
    rates = f"WER {row['wer']:.1%}, CER {row['cer']:.1%}, " if "wer" in row else ""
    instead = ", ".join(f"{count} as {code}" for code, count in list(row["heard_instead"].items())[:3])
    return f"{rates}detected {row['detected']:.1%} of {row['clips']}" + (f" ({instead})" if instead else "")


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the checkout, None outside of one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


# ---- the card ----------------------------------------------------------------------------------------------------------


def card(results: dict[str, Any]) -> str:
    """The model's README, from the figures."""
    model, training, summary = results["model"], results["training"], results["summary"]
    languages = [*training["written"], *training["detected_only"]]
    sections = [
        _header(languages),
        "# Pocket Whisper",
        f"A very small [Whisper](https://arxiv.org/abs/2212.04356), trained from nothing: {model['parameters'] / 1e6:.1f} million "
        f"parameters, {model['bytes'] / 1e6:.0f} MB, width {model['d_model']}, {model['encoder_layers']} + {model['decoder_layers']} "
        f"layers, a window of {model['window_s']} seconds. It is shipped inside the package so that tests, examples and the demo run "
        "without a network; language adapters are tried out on it. It has Whisper's architecture, special tokens and language tokens, "
        "and loads with `WhisperForConditionalGeneration.from_pretrained` and `WhisperProcessor.from_pretrained`. It shares no weights "
        "with OpenAI's models. **For real work point the same code at `openai/whisper-*`.**",
        f"It writes {_names(training['written'])}. It also recognises, without being able to write them, "
        f"{_names(training['detected_only'])}: as with Whisper itself, a language may be heard that only an adapter can write.",
        "## Error rates",
        f"Synthetic speech (espeak-ng), sentences and voices that training never saw; on average WER {summary['synthetic_wer']:.1%}, "
        f"CER {summary['synthetic_cer']:.1%}, language detected {summary['detected']:.1%} (among these {len(languages)} languages):",
        _synthetic_table(results["synthetic"]),
        "Recordings of people, test clips. The first two speakers are also those of the training clips:",
        _recorded_table(results["recorded"]),
        f"Greedy decoding, whole windows; text normalised by `{results['normalizer']}`. Measured on {results['date']} by "
        f"`{results['command']}` (torch {results['versions']['torch']}, transformers {results['versions']['transformers']}).",
        "## Limits",
        _limits(),
        "## Training data",
        _data(),
        "## How it was made",
        "`recipes/synthetic_speech.py`, then `recipes/train_pocket.py`. `training.json` has the settings the run ended with "
        f"({training['num_steps']:,} steps, batches of {training['batch_size']}); changes on the way are in the project's `docs/log.md`. "
        "A CTC head on the encoder helped training and is not "
        "part of the model.",
    ]
    return "\n\n".join(sections) + "\n"


def _header(languages: list[str]) -> str:
    header = {
        "language": languages,
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["whisper", "pocket"],
        "metrics": ["wer", "cer"],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"])


def _names(languages: list[str]) -> str:
    names = [language_name(code) for code in languages]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _synthetic_table(synthetic: dict[str, Any]) -> str:
    lines = ["| language | WER | CER | language detected | clips |", "|---|---:|---:|---:|---:|"]
    for code, row in synthetic.items():
        rates = [f"{row[rate]:.1%}" if rate in row else "not written" for rate in ("wer", "cer")]
        lines.append(f"| {language_name(code)} ({code}) | {' | '.join(rates)} | {row['detected']:.0%} | {row['clips']} |")
    return "\n".join(lines)


def _recorded_table(recorded: dict[str, Any]) -> str:
    lines = ["| set | WER | CER | clips |", "|---|---:|---:|---:|"]
    lines += [f"| {name} ({row['language']}) | {row['wer']:.1%} | {row['cer']:.1%} | {row['clips']} |" for name, row in recorded.items()]
    return "\n".join(lines)


def _limits() -> str:
    return "\n".join(
        [
            "- It has heard one synthesizer and a few hours of three recorded sets. People it has not heard, noise, far microphones, "
            "dialects and spontaneous speech will come out much worse than the tables say; in most languages it has never heard a person.",
            "- It knows few words and spells by ear. It writes something for every sound and can repeat itself.",
            "- It gives no times within a window and does not translate; the tokens for both exist so that the layout is Whisper's.",
            "- Detection was measured among the languages above. Any other language will be taken for one of these.",
            "- Nobody should rely on what it writes. It is here to show and to test a method.",
        ]
    )


def _data() -> str:
    return "\n".join(
        [
            "- Sentences: the text collections of Mozilla Common Voice, CC0-1.0, spoken by espeak-ng in many voices, speeds and pitches.",
            "- `de_kerstin`: Kerstin (rhasspy/dataset-voice-kerstin), CC0-1.0.",
            "- `en_kathleen`: Kathleen (rhasspy/dataset-voice-kathleen), CMU Arctic sentences, CC0-1.0.",
            "- `en_speechocean_adult`: speechocean762, Zhang et al., Interspeech 2021, 'available for free download for both commercial "
            "and non-commercial purposes'; English read by adults whose first language is Mandarin.",
        ]
    )


def main() -> None:
    import tyro

    settings = tyro.cli(Settings)
    results = measure(settings)
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"{settings.name}_{results['date']}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"{path}: {json.dumps(results['summary'])}", flush=True)
    if settings.card:
        (settings.model / "README.md").write_text(card(results), "utf-8")


if __name__ == "__main__":
    main()
