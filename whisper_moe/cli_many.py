"""The command `whisper-moe train-many`: a recipe and flags in, one call of `train_many_languages`, an adapter for each language out.

Registered in `cli.py`. As there, heavy libraries are imported when a command runs, and this is where `hub_utils` joins.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from tyro.conf import Positional

from whisper_moe.cli_train import Switch
from whisper_moe.train_settings import CardNotes, Metric

if TYPE_CHECKING:
    from peft import LoraConfig

    from whisper_moe.train_many import LanguageData

_REQUIRED = ("languages", "out")
_ONLY_FLAGS = ("recipe", "resume")


@dataclass(frozen=True)
class TrainMany:
    """Teach a frozen Whisper many languages in one run: an adapter for each, in batches in which every row trains its own.

    Everything but the recipe itself and --resume can stand in a YAML recipe under the same name (`max_steps: 100`); flags win.
    """

    recipe: Positional[Path | None] = None
    """A YAML file with the values of the flags below."""
    resume: bool = False
    """Go on from the last checkpoint, if there is one."""

    languages: tuple[str, ...] | None = None
    """Each language and its training clips: cy=data/welsh br=data/breton; a folder, a file, or a data set of the Hub. Required."""
    dev_data: tuple[str, ...] | None = None
    """Clips that decide which checkpoint of a language is kept: cy=data/welsh; of a folder its dev split."""
    eval_data: tuple[str, ...] | None = None
    """Clips to measure on, before and after: cy=data/welsh; of a folder its test split. Default: the dev clips."""
    carriers: tuple[str, ...] | None = None
    """For languages without a token in Whisper, whose token to use: qug=es. Default: the one that is heard most."""
    weights: tuple[str, ...] | None = None
    """Multiply a language's share of the batches: br=2."""
    out: Path | None = None
    """Folder; every adapter gets one of its own in it. Required."""

    model: str | None = None
    """Folder or Hub id of the base. Default: the pocket Whisper that is shipped."""
    base_id: str | None = None
    """Public name of the base, needed if --model is a folder."""
    pool: Path | None = None
    """Folder of an S2-LoRA adapter whose A and B all languages use, frozen; each trains coefficients alone."""
    rank: int | None = None
    """Of each weight's LoRA. Default: 32."""
    alpha: float | None = None
    """The adapter's scale is alpha / rank. Default: the rank."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers to adapt. Default: q_proj k_proj v_proj out_proj fc1 fc2, or the pool's."""
    part: Literal["both", "decoder"] | None = None
    """Adapt encoder and decoder, or the decoder alone: quicker to train and to switch."""
    cache_encoder_states: Switch = None
    """Encode the clips once, on disk; for --part decoder and without augmentation."""
    cache_folder: Path | None = None
    """Where encoder states lie, and stay for further runs. Default: in --out, until the run is complete."""
    storage: Literal["float16", "model"] | None = None
    """Of encoder states: half precision, or the type of the model's weights."""
    crop_states: Switch = None
    """End the window of encoder states behind the longest clip."""

    temperature: float | None = None
    """Evens out the languages' shares of a batch: 1 as many rows as there are clips, 5 nearly even, inf the same for each. Default: 1."""
    num_epochs: float | None = None
    """Passes over the clips of all languages together. Default: 10."""
    max_steps: int | None = None
    """Optimizer steps, instead of passes."""
    batch_size: int | None = None
    """Rows at a time, of all languages together."""
    gradient_accumulation: int | None = None
    """Batches a step."""
    learning_rate: float | None = None
    """Highest learning rate."""
    warmup_share: float | None = None
    """Share of the steps in which the learning rate rises."""
    weight_decay: float | None = None
    """Pull of the weights towards zero."""
    max_grad_norm: float | None = None
    """Each language's gradient is clipped to this length."""
    label_smoothing: float | None = None
    """Share of probability that the loss spreads over all tokens."""
    augment: Switch = None
    """Change speed, level and noise, and mask parts of the features. Default: True, and False with cached encoder states."""
    crop_share: float | None = None
    """Share of batches that are cut behind the longest clip: quicker if clips are much shorter than the window."""
    num_checkpoints: int | None = None
    """How often to save, and to measure on the dev sets."""
    best_metric: Metric | None = None
    """Which error rate on the dev set decides. Default: cer."""
    eval_batch_size: int | None = None
    """Windows written at a time when measuring."""
    normalizer: Literal["mark-preserving", "whisper-basic"] | None = None
    """Text normaliser of the error rates."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Of the arithmetic."""
    num_workers: int | None = None
    """Processes that prepare batches."""
    seed: int | None = None
    """Of everything that is drawn at random."""

    train_data: str | None = None
    """For the cards: the data, whose they are, and where they are from. Default: the paths."""
    license: str | None = None
    """For the cards: licence of the adapters as the data allow it ("cc-by-4.0")."""
    limits: str | None = None
    """For the cards: what the adapters must not be relied on for."""

    def run(self) -> int:
        asked = self.with_recipe()
        for name in _REQUIRED:
            if getattr(asked, name) is None:
                raise ValueError(f"{name} is missing: give --{name}, or a line `{name}: ...` in a recipe.")
        data = asked._languages()
        from hub_utils import render_card
        from whisper_moe.cli import _adapter_line
        from whisper_moe.languages import language_name
        from whisper_moe.pocket import MODEL
        from whisper_moe.registry import LanguageAdapter
        from whisper_moe.train_many import ManySettings, train_many_languages

        def card(folder: Path) -> str:
            return render_card(folder, language_name=language_name(LanguageAdapter.load(folder).language), license=asked.license)

        adapters = train_many_languages(
            str(MODEL) if asked.model is None else asked.model,
            data,
            out=Path(str(asked.out)),
            peft_config=asked._peft_config(),
            pool=asked.pool,
            base_id=asked.base_id,
            settings=ManySettings(**asked._settings()),
            cache_folder=asked.cache_folder,
            notes=CardNotes(asked.train_data, asked.license, shlex.join(["whisper-moe", *sys.argv[1:]]), asked.limits),
            resume=self.resume,
            render_card=card,
        )
        for adapter in adapters:
            print(_adapter_line(adapter))
        return 0

    def with_recipe(self) -> TrainMany:
        """The values of the recipe, overridden by the flags that were given."""
        if self.recipe is None:
            return self
        from whisper_moe.training_recipe import read_recipe

        types = {name: wanted for name, wanted in get_type_hints(TrainMany).items() if name not in _ONLY_FLAGS}
        read = read_recipe(self.recipe, types)
        return replace(self, **{name: value for name, value in read.items() if getattr(self, name) is None})

    def _languages(self) -> list[LanguageData]:
        from whisper_moe.train_many import LanguageData

        sources = by_language(self.languages or (), "languages")
        others = {
            argument: by_language(getattr(self, flag) or (), flag, sources)
            for flag, argument in (("dev_data", "dev_data"), ("eval_data", "eval_data"), ("carriers", "carrier"), ("weights", "weight"))
        }
        others["weight"] = {language: _number(text, language) for language, text in others["weight"].items()}  # type: ignore[misc]
        return [
            LanguageData(language, source, **{name: values[language] for name, values in others.items() if language in values})  # type: ignore[arg-type]
            for language, source in sources.items()
        ]

    def _settings(self) -> dict[str, Any]:
        """The settings that were given; the others keep the defaults of `ManySettings`."""
        from whisper_moe.train_many import ManySettings

        own = {each.name for each in fields(self)}
        given = {each.name: getattr(self, each.name) for each in fields(ManySettings) if each.name in own}
        if self.cache_encoder_states and self.augment is None:
            given["augment"] = False
        return {name: value for name, value in given.items() if value is not None}

    def _peft_config(self) -> LoraConfig | None:
        from peft import LoraConfig

        if self.pool is not None:
            if used := [name for name in ("rank", "alpha") if getattr(self, name) is not None]:
                raise ValueError(f"{' and '.join(used)} are the pool's; leave them out.")
            if self.target_modules is None and self.part != "decoder":
                return None
        rank = 32 if self.rank is None else self.rank
        return LoraConfig(r=rank, lora_alpha=rank if self.alpha is None else self.alpha, target_modules=self._targets())

    def _targets(self) -> list[str]:
        modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] if self.target_modules is None else list(self.target_modules)
        if self.part != "decoder":
            return modules
        from transformers import WhisperConfig

        from whisper_moe.layouts import decoder_only
        from whisper_moe.pocket import MODEL

        return decoder_only(WhisperConfig.from_pretrained(str(MODEL) if self.model is None else self.model), modules)


def by_language(texts: tuple[str, ...], flag: str, known: dict[str, str] | None = None) -> dict[str, str]:
    """{"cy": "data/welsh"} of `("cy=data/welsh",)`.

    Raises:
        ValueError: An entry is not of this form, stands twice, or is of a language that is not `known`.
    """
    found: dict[str, str] = {}
    for text in texts:
        language, equals, value = text.partition("=")
        if not (language and equals and value):
            raise ValueError(f"{flag}: {text!r} is not of the form language=value, such as cy=data/welsh.")
        if language in found:
            raise ValueError(f"{flag}: {language} stands twice. Put its clips into one folder, or give one of them another language code.")
        if known is not None and language not in known:
            raise ValueError(f"{flag}: {language} is not among the languages that are trained: {', '.join(known)}.")
        found[language] = value
    return found


def _number(text: str, language: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"weights: {language}={text} is no number; write for instance {language}=2.")
    return number
