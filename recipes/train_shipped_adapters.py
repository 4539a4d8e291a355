"""Train the adapters that ship with the pocket: Kichwa, Welsh, and English as children speak it.

    python -m recipes.train_shipped_adapters                      # all three, from the folders of the defaults
    python -m recipes.train_shipped_adapters --only qug --resume  # one, going on where it stopped

Kichwa is real speech in a language new to the base, Welsh is spoken by espeak-ng (packs of `recipes.synthetic_speech`), child
speech is a domain: S2-LoRA's own case. Each folder gets its weights, `language_adapter.json` and a card with the error rates
before and after. On two CPU cores: about 20, 20 and 10 minutes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

import peft_s2lora
from hub_utils import render_card
from recipes.synthetic_speech import SAMPLE_RATE, read_pack
from whisper_moe.data import Clips, load_clips
from whisper_moe.languages import language_name
from whisper_moe.pocket import ADAPTERS, MODEL
from whisper_moe.registry import LanguageAdapter
from whisper_moe.train import POCKET_ID, CardNotes, TrainSettings, train_language_adapter

SMALL_MODEL = TrainSettings(batch_size=16, learning_rate=1e-3, label_smoothing=0.1, crop_share=0.8, num_checkpoints=6, eval_batch_size=32)
"""A model of a few million parameters takes ten times the learning rate of a published Whisper."""


@dataclass(frozen=True)
class Recipe:
    """One shipped adapter: its data, its method and what its card says."""

    language: str
    clips: Callable[[Paths, str], Clips]
    """(folders, split) -> clips."""
    settings: TrainSettings
    method: dict[str, Any]
    """Arguments of `train_language_adapter` that choose the PEFT method."""
    train_data: str
    license: str
    limits: str
    domain: str | None = None
    carrier: str | None = None


@dataclass(frozen=True)
class Paths:
    """Where things lie."""

    base: Path = MODEL
    """The pocket."""
    speech: Path = Path("../shared/speech")
    """Recorded speech, a folder per set."""
    packs: Path = Path("runs/pocket/data")
    """Packs of `recipes.synthetic_speech`."""
    parquet: Path = Path("runs/adapters/data")
    """Where packs are written as parquet."""
    out: Path = ADAPTERS
    """The adapters' folder."""


# ---- data --------------------------------------------------------------------------------------------------------------


def export_pack(packs: Path, name: str, out: Path) -> Path:
    """Write a pack as `<out>/<split>.parquet` in the Hub's layout with FLAC audio; splits that are there are kept."""
    import pyarrow
    import pyarrow.parquet as parquet

    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = [("audio", audio), ("text", pyarrow.string()), ("language", pyarrow.string()), ("speaker", pyarrow.string())]
    schema = pyarrow.schema(columns)
    samples, rows = read_pack(packs, name)
    out.mkdir(parents=True, exist_ok=True)
    for split in sorted({row["split"] for row in rows}):
        path = out / f"{split}.parquet"
        if path.exists():
            continue
        chosen = [row for row in rows if row["split"] == split]
        unfinished = path.with_suffix(".new")
        with parquet.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, len(chosen), 256):
                table = [
                    {"audio": {"bytes": _flac(samples[row["offset"] : row["offset"] + row["samples"]]), "path": None}}
                    | {column: row[column] for column in ("text", "language", "speaker")}
                    for row in chosen[start : start + 256]
                ]
                writer.write_table(pyarrow.Table.from_pylist(table, schema))
        unfinished.replace(path)
    return out


def _flac(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC")
    return buffer.getvalue()


def recorded(name: str, language: str) -> Callable[[Paths, str], Clips]:
    """Clips of a recorded set; at most 120 decide which checkpoint is kept, so that deciding stays quick."""

    def load(paths: Paths, split: str) -> Clips:
        # Three Kichwa transcripts say [UNK] where the transcriber gave up.
        return load_clips(
            paths.speech / name, split=split, language=language, exclude_text=r"\[UNK\]", limit=120 if split == "dev" else None
        )

    return load


def synthetic(language: str) -> Callable[[Paths, str], Clips]:
    """Clips of a pack, by way of parquet."""

    def load(paths: Paths, split: str) -> Clips:
        folder = export_pack(paths.packs, language, paths.parquet / language)
        return load_clips(folder, split=split, language=language, name=f"espeak-ng {language}/{split}")

    return load


# ---- methods -----------------------------------------------------------------------------------------------------------

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def lora(r: int) -> dict[str, Any]:
    """LoRA on every linear weight of encoder and decoder."""
    return {"peft_config": LoraConfig(r=r, lora_alpha=r, target_modules=ALL_LINEAR)}


class _PruneAtEnd(TrainerCallback):
    """Drops the rank directions that no weight uses any more; the output stays the same."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: PeftModel | None = None, **_: Any) -> None:
        assert model is not None
        peft_s2lora.prune(model)


def s2lora(r: int, sparsity_weight: float) -> dict[str, Any]:
    """S2-LoRA on every linear weight, with what it needs of the Trainer: its learning rates and the step that makes it sparse."""
    return {
        "peft_config": peft_s2lora.S2LoraConfig(r=r, target_modules=ALL_LINEAR, sparsity_weight=sparsity_weight),
        "callbacks": [peft_s2lora.S2LoraCallback(), _PruneAtEnd()],
        "optimizer_parameter_groups": peft_s2lora.s2lora_param_groups,
    }


# ---- the adapters ------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Recipe] = {
    "qug": Recipe(
        language="qug",
        carrier="es",
        clips=recorded("qug_killkan", "qug"),
        method=lora(32),
        settings=replace(SMALL_MODEL, num_epochs=10),
        train_data=(
            "Killkan, 2.9 hours of Kichwa: Taguchi, Saransig, Velásquez, Chiang (LREC-COLING 2024), of the radio drama "
            "'Jaboneropak Ayllullaktapi' by Radialistas Apasionadas y Apasionados, CC BY 4.0. Changed: cut into sentences, re-encoded. "
            "Source: github.com/Oumaya-Chelbi/kichwa@fed0bc04; licence as stated in github.com/ctaguchi/killkan."
        ),
        license="cc-by-4.0",
        limits=(
            "Kichwa is the language of living communities; this adapter shows that the method works, and makes no claim about quality for "
            "its speakers. One radio drama of Ecuador: the same actors speak in training and test, chapters apart; 16 of the 331 test "
            "transcripts, mostly title lines, also occur in training. Many sentences mix in Spanish."
        ),
    ),
    "cy": Recipe(
        language="cy",
        clips=synthetic("cy"),
        method=lora(16),
        settings=replace(SMALL_MODEL, num_epochs=4),
        train_data=(
            "Welsh sentences of the Common Voice project (CC0), spoken by espeak-ng in many voices, speeds and pitches "
            "(recipes/synthetic_speech.py). Test sentences and test voices do not occur in training."
        ),
        license="cc0-1.0",
        limits=(
            "Trained and measured on one synthesizer's voices alone: expect it to fail on people. It shows the path from clips to an "
            "adapter and serves tests and the demo; for Welsh speech, train on recordings."
        ),
    ),
    "en-child": Recipe(
        language="en",
        domain="child",
        clips=recorded("en_speechocean_child", "en"),
        method=s2lora(32, sparsity_weight=0.05),
        settings=replace(SMALL_MODEL, num_epochs=8),
        train_data=(
            "speechocean762 (Zhang et al., Interspeech 2021), 57 minutes of 49 children aged 6 to 12 whose first language is Mandarin, "
            "reading English: 'available for free download for both commercial and non-commercial purposes'. "
            "Source: github.com/jimbozhang/speechocean762@613968e3. Changed: selection, re-encoded."
        ),
        license="other",
        limits=(
            "Other children speak in the test than in training, but all read aloud, with a Mandarin accent, from similar lists; five test "
            "sentences also occur in training. Transcripts are what was to be read, not always what was said."
        ),
    ),
}


def train(name: str, paths: Paths, resume: bool = False, **overrides: Any) -> LanguageAdapter:
    """Train one of the `RECIPES` and write its card."""
    recipe = RECIPES[name]
    adapter = train_language_adapter(
        str(paths.base),
        recipe.clips(paths, "train"),
        language=recipe.language,
        out=paths.out / name,
        name=name,
        domain=recipe.domain,
        carrier=recipe.carrier,
        base_id=POCKET_ID,
        eval_data=recipe.clips(paths, "test"),
        dev_data=recipe.clips(paths, "dev"),
        settings=recipe.settings,
        notes=CardNotes(recipe.train_data, recipe.license, f"python -m recipes.train_shipped_adapters --only {name}"),
        resume=resume,
        **recipe.method,
        **overrides,
    )
    card = render_card(adapter.path, language_name=language_name(recipe.language), license=recipe.license)
    (adapter.path / "README.md").write_text(f"{card}- {recipe.limits}\n", "utf-8")  # the card ends with the list of limits
    return adapter


def main(
    paths: Paths = Paths(),
    only: tuple[Literal["qug", "cy", "en-child"], ...] = ("qug", "cy", "en-child"),
    resume: bool = False,
    max_steps: int | None = None,
) -> None:
    """Train the shipped adapters.

    Args:
        paths: folders.
        only: which adapters.
        resume: go on from the last checkpoint of each, if there is one.
        max_steps: stop early, to try the path out.
    """
    for name in only:
        adapter = train(name, paths, resume, **({} if max_steps is None else {"max_steps": max_steps}))
        before, after = adapter.metrics["before"], adapter.metrics["after"]
        rates = ", ".join(f"{rate.upper()} {before[rate]:.1%} -> {after[rate]:.1%}" for rate in ("wer", "cer"))
        print(f"{name}: {adapter.num_parameters:,} parameters, {rates}", flush=True)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
