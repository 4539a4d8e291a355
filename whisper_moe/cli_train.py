"""The command `whisper-moe train`: a recipe and flags in, one call of `train_language_adapter`, a plan or an adapter out.

Registered in `cli.py`. As there, heavy libraries are imported when a command runs, and this is where `peft_s2lora` and `hub_utils` join.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from tyro.conf import Positional, arg

from whisper_moe.train_settings import CardNotes, Logger, Metric, TrainSettings

if TYPE_CHECKING:
    from peft import PeftConfig

Switch = Annotated[bool | None, arg(constructor=bool)]
"""--stream or --no-stream; None if neither was given, and then a recipe may say it."""

STOPPED = 130  # exit code of a run that Ctrl-C has ended

_REQUIRED = ("data", "language", "out")
_ONLY_FLAGS = ("recipe", "resume", "dry_run")
_OF_METHOD = ("method", "rank", "alpha", "dropout", "target_modules", "part", "sparsity", "peft_config")


@dataclass(frozen=True)
class Train:
    """Teach a frozen Whisper a language or a kind of speech: clips in, a measured adapter out.

    Everything but the recipe itself, --resume and --dry-run can stand in a YAML recipe under the same name (`max_steps: 100`); flags win.
    On several GPUs or machines: accelerate launch -m whisper_moe.cli train recipe.yaml.
    """

    recipe: Positional[Path | None] = None
    """A YAML file with the values of the flags below."""
    dry_run: bool = False
    """Print what would be done, and about how long it takes; write nothing."""
    resume: bool = False
    """Go on from the last checkpoint, if there is one."""

    data: tuple[str, ...] | None = None
    """Training clips: a folder, a file, or a data set of the Hub. Several are mixed. Required."""
    weights: tuple[float, ...] | None = None
    """Shares of several sources in the mixture. Default: all clips of each."""
    language: str | None = None
    """The language of the clips: a code or a name; ISO 639-3 where Whisper has none ("qug"). Required."""
    out: Path | None = None
    """Folder for the adapter. Required."""
    eval_data: str | None = None
    """Clips to measure on, before and after; of a folder its test split."""
    dev_data: str | None = None
    """Clips that decide which checkpoint is kept, and when to stop early; of a folder its dev split."""
    dev_limit: int | None = None
    """Decide by only so many of them: deciding stays quick."""
    text_column: str | None = None
    """The transcripts' column, where guessing fails."""
    audio_column: str | None = None
    """The recordings' column, where guessing fails."""
    exclude_text: str | None = None
    """A regular expression; clips whose transcript it matches are left out."""
    max_chars_per_s: float | None = None
    """Clips with more characters a second are left out: sound and text are not the same."""
    limit: int | None = None
    """Train on only so many clips of each source, drawn by the seed."""
    stream: Switch = None
    """Decode the training clips on the way instead of keeping them in memory; needs --max-steps."""
    shuffle_buffer: int | None = None
    """Clips of a stream among which the next one is drawn. Default: 1000."""

    model: str | None = None
    """Folder or Hub id of the base. Default: the pocket Whisper that is shipped."""
    base_id: str | None = None
    """Public name of the base, needed if --model is a folder."""
    name: str | None = None
    """What the registry calls the adapter. Default: the language, with the domain."""
    domain: str | None = None
    """Kind of speech ("child"), for an adapter that is chosen by name only."""
    carrier: str | None = None
    """Whisper's language whose token carries one that has none. Default: the one that is heard most."""

    start: Literal["auto", "cold", "warm", "stacked", "moe"] | None = None
    """How the adapter begins: from nothing (cold, the default), as a copy of a source, on top of one, as a mixture of several; auto
    decides by similarity and hours of data."""
    sources: tuple[Path, ...] | None = None
    """Folders of adapters that the start may begin from."""
    pool: Path | None = None
    """Folder of the pool, for an S2-LoRA adapter that shares one."""
    method: Literal["s2lora", "lora"] | None = None
    """The PEFT method. Default: s2lora; with --start the source's, or lora on top of it."""
    rank: int | None = None
    """Rank directions: shared by many weights in S2-LoRA, of each weight in LoRA. Default: 32."""
    alpha: float | None = None
    """The adapter's scale is alpha / rank. Default: the rank."""
    dropout: float | None = None
    """Of the adapter's input."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers to adapt. Default: q_proj k_proj v_proj out_proj fc1 fc2."""
    part: Literal["both", "decoder"] | None = None
    """Adapt encoder and decoder, or the decoder alone: quicker to train and to switch."""
    sparsity: float | None = None
    """S2-LoRA: pull of the rank coefficients towards zero; 0.01 to 0.3 works, 0 is none. Default: 0.05."""
    lr_multiplier: float | None = None
    """How much faster LoRA's B (LoRA+), or S2-LoRA's coefficients, learn. Default: 1, or 10 for S2-LoRA."""
    peft_config: Path | None = None
    """Folder with an adapter_config.json: any method that PEFT knows, instead of the flags above."""

    num_epochs: float | None = None
    """Passes over the clips. Default: 10."""
    max_steps: int | None = None
    """Optimizer steps, instead of passes."""
    batch_size: int | None = None
    """Clips at a time, in each process."""
    gradient_accumulation: int | None = None
    """Batches a step."""
    learning_rate: float | None = None
    """Highest learning rate."""
    warmup_share: float | None = None
    """Share of the steps in which the learning rate rises."""
    weight_decay: float | None = None
    """Pull of the weights towards zero."""
    label_smoothing: float | None = None
    """Share of probability that the loss spreads over all tokens."""
    augment: Switch = None
    """Change speed, level and noise, and mask parts of the features. Default: True."""
    crop_share: float | None = None
    """Share of batches that are cut behind the longest clip: quicker if clips are much shorter than the window."""
    num_checkpoints: int | None = None
    """How often to save, and to measure on the dev set."""
    best_metric: Metric | None = None
    """Which error rate on the dev set decides. Default: cer."""
    patience: int | None = None
    """Stop after so many measurements on the dev set without a better one."""
    eval_batch_size: int | None = None
    """Windows written at a time when measuring."""
    normalizer: Literal["mark-preserving", "whisper-basic"] | None = None
    """Text normaliser of the error rates."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Of the arithmetic."""
    gradient_checkpointing: Switch = None
    """Less memory for about a third more time."""
    cache_encoder_states: Switch = None
    """Encode the clips once, on disk; for --part decoder and without --augment."""
    storage: Literal["float16", "model"] | None = None
    """Of encoder states: half precision, or the type of the model's weights."""
    crop_states: Switch = None
    """End the window of encoder states behind the longest clip."""
    num_workers: int | None = None
    """Processes that prepare batches."""
    log_to: Logger | None = None
    """Where the curves go."""
    seed: int | None = None
    """Of everything that is drawn at random."""

    train_data: str | None = None
    """For the card: the data, whose they are, and where they are from. Default: the path."""
    license: str | None = None
    """For the card: licence of the adapter as the data allow it ("cc-by-4.0")."""
    limits: str | None = None
    """For the card: what the adapter must not be relied on for."""

    def run(self) -> int:
        asked = self.with_recipe()
        for name in _REQUIRED:
            if getattr(asked, name) is None:
                raise ValueError(f"{name} is missing: give --{name}, or a line `{name}: ...` in a recipe.")
        from hub_utils import render_card
        from whisper_moe.languages import language_name
        from whisper_moe.train import plan_training, train_language_adapter

        base, data, arguments = asked._base(), asked._clips(), asked._arguments()
        if self.dry_run:
            plan = plan_training(base, data, **arguments)
            if _speaks():
                print(plan)
            return 0
        adapter = train_language_adapter(
            base,
            data,
            resume=self.resume,
            notes=CardNotes(asked.train_data, asked.license, shlex.join(["whisper-moe", *sys.argv[1:]]), asked.limits),
            render_card=lambda folder: render_card(folder, language_name=language_name(str(asked.language)), license=asked.license),
            **arguments,
        )
        if _speaks():
            from whisper_moe.cli import _adapter_line

            print(_adapter_line(adapter))
        stopped = json.loads((adapter.path / "language_adapter.json").read_text("utf-8"))["training"].get("stopped", "")
        if not stopped.startswith("by Ctrl-C"):
            return 0
        if _speaks():
            print(f"stopped {stopped}. The same command with --resume goes on.", file=sys.stderr)
        return STOPPED

    def with_recipe(self) -> Train:
        """The values of the recipe, overridden by the flags that were given."""
        if self.recipe is None:
            return self
        from whisper_moe.training_recipe import read_recipe

        types = {name: wanted for name, wanted in get_type_hints(Train).items() if name not in _ONLY_FLAGS}
        read = read_recipe(self.recipe, types)
        return replace(self, **{name: value for name, value in read.items() if getattr(self, name) is None})

    # ---- flags -> arguments of training ------------------------------------------------------------------------------------

    def _base(self) -> str:
        from whisper_moe.pocket import MODEL

        return str(MODEL) if self.model is None else self.model

    def _settings(self) -> dict[str, Any]:
        """The settings that were given; the others keep the defaults of `TrainSettings`."""
        names = [each.name for each in fields(TrainSettings)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _clips(self) -> Any:
        """The training clips: one source, a mixture, or streams of them."""
        from whisper_moe.data import Filters, StreamMixture, load_clips, mix_clips, stream_clips
        from whisper_moe.languages import language_code

        data, language = self.data or (), language_code(str(self.language))
        if self.weights is not None and len(self.weights) != len(data):
            raise ValueError(f"{len(data)} sources in data and {len(self.weights)} weights: there must be one weight for each.")
        columns: dict[str, Any] = {"text_column": self.text_column, "audio_column": self.audio_column}
        filters: dict[str, Any] = {"exclude_text": self.exclude_text, "max_chars_per_s": self.max_chars_per_s}
        seed = self.seed or 0
        if self.stream:
            if self.limit is not None:
                raise ValueError("limit counts clips that are loaded; a stream goes as far as max_steps. Leave one of them out.")
            buffer = 1000 if self.shuffle_buffer is None else self.shuffle_buffer
            options: dict[str, Any] = {"filters": Filters(language, **filters), "shuffle_buffer": buffer, "seed": seed, **columns}
            streams = [stream_clips(source, split=_split_of(source), **options) for source in data]
            return streams[0] if len(streams) == 1 else StreamMixture(streams, self.weights or [1.0] * len(streams), seed=seed)
        if self.shuffle_buffer is not None:
            raise ValueError("shuffle_buffer is for a stream: add stream, or leave it out. Clips in memory are shuffled as a whole.")
        sets = [
            load_clips(source, split=_split_of(source), language=language, limit=self.limit, seed=seed, **columns, **filters)
            for source in data
        ]
        if len(sets) == 1:
            return sets[0]
        return mix_clips(sets, self.weights or [len(each) for each in sets], seed=seed)

    def _measured_on(self, source: str | None, split: str) -> Any:
        from whisper_moe.data import load_clips
        from whisper_moe.languages import language_code

        if source is None:
            return None
        split_name = _split_of(source, split)
        columns: dict[str, Any] = {"text_column": self.text_column, "audio_column": self.audio_column}
        return load_clips(
            source,
            split=split_name,
            language=language_code(str(self.language)),
            exclude_text=self.exclude_text,
            limit=self.dev_limit if split == "dev" else None,
            seed=self.seed or 0,
            **columns,
        )

    def _arguments(self) -> dict[str, Any]:
        """What `train_language_adapter` and `plan_training` have in common."""
        given = {name: getattr(self, name) for name in ("language", "out", "name", "domain", "carrier", "base_id", "pool")}
        return {
            **given,
            "eval_data": self._measured_on(self.eval_data, "test"),
            "dev_data": self._measured_on(self.dev_data, "dev"),
            "start": self.start or ("warm" if self.sources else "cold"),
            "sources": self.sources or (),
            "peft_config": self._peft_config(),
            "callbacks": _s2lora_callbacks(),
            "optimizer_parameter_groups": self._parameter_groups,
            **self._settings(),
        }

    def _peft_config(self) -> PeftConfig | None:
        """The method, where it was named or nothing else suggests one."""
        from peft import LoraConfig, PeftConfig

        import peft_s2lora

        given = [name for name in _OF_METHOD if getattr(self, name) is not None]
        begun = self.sources is not None or self.start not in (None, "cold")
        if self.pool is not None and not begun:
            return self._pooled_config(self.pool, given)
        if self.peft_config is not None:
            given.remove("peft_config")
            if given:
                raise ValueError(f"peft_config says all there is to say of the method; leave out {', '.join(given)}.")
            return PeftConfig.from_pretrained(str(self.peft_config))
        if begun and not given:
            return None
        method = self.method or ("lora" if begun else "s2lora")
        if method == "lora" and self.sparsity is not None:
            raise ValueError("sparsity is S2-LoRA's: add method s2lora, or leave it out.")
        rank = 32 if self.rank is None else self.rank
        targets = self._targets()
        if method == "lora":
            return LoraConfig(
                r=rank, lora_alpha=rank if self.alpha is None else self.alpha, lora_dropout=self.dropout or 0.0, target_modules=targets
            )
        return peft_s2lora.S2LoraConfig(
            r=rank,
            s2lora_alpha=self.alpha,
            s2lora_dropout=self.dropout or 0.0,
            target_modules=targets,
            sparsity_weight=0.05 if self.sparsity is None else self.sparsity,
            **self._multiplier(),
        )

    def _pooled_config(self, pool: Path, given: Sequence[str]) -> PeftConfig:
        """Fresh coefficients over the pool's A and B; rank and weights are the pool's, the weights fewer if that is asked for."""
        from peft import PeftConfig

        import peft_s2lora

        if used := [name for name in ("rank", "alpha") if name in given]:
            raise ValueError(f"{' and '.join(used)} are the pool's; leave them out.")
        if "peft_config" in given or self.method == "lora":
            raise ValueError("Over a pool, S2-LoRA coefficients are trained. Leave out peft_config and method lora, or leave out the pool.")
        shared = PeftConfig.from_pretrained(str(pool))
        if not isinstance(shared, peft_s2lora.S2LoraConfig) or shared.pool is not None:
            raise ValueError(f"{pool} is no pool: a pool is an S2-LoRA adapter with A and B of its own (S2LoraConfig without pool=).")
        chosen = self.target_modules is not None or self.part == "decoder"
        return peft_s2lora.S2LoraConfig(
            pool=pool.resolve().name.replace(".", "-"),  # PEFT names modules by it
            r=shared.r,
            target_modules=self._targets_of(pool) if chosen else shared.target_modules,
            share_scope=shared.share_scope,
            share_groups=shared.share_groups,
            s2lora_dropout=self.dropout or 0.0,
            sparsity_weight=0.05 if self.sparsity is None else self.sparsity,
            **self._multiplier(),
        )

    def _multiplier(self) -> dict[str, Any]:
        return {} if self.lr_multiplier is None else {"coefficient_lr_multiplier": self.lr_multiplier}

    def _targets_of(self, pool: Path) -> list[str]:
        """Those of the weights that the pool adapts which the flags name."""
        from whisper_moe.adapter_files import read_adapter, s2_coefficients

        adapted = sorted(s2_coefficients(read_adapter(pool)))
        wanted = None if self.target_modules is None else tuple(f".{name}" for name in self.target_modules)
        found = [name for name in adapted if self.part != "decoder" or name.startswith("model.decoder.")]
        found = [name for name in found if wanted is None or f".{name}".endswith(wanted)]
        if not found:
            raise ValueError(f"The pool {pool} adapts no weight that target_modules and part name; it adapts {', '.join(adapted[:3])}, ...")
        return found

    def _targets(self) -> list[str]:
        modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] if self.target_modules is None else list(self.target_modules)
        if self.part != "decoder":
            return modules
        from transformers import WhisperConfig

        from whisper_moe.layouts import decoder_only

        return decoder_only(WhisperConfig.from_pretrained(self._base()), modules)

    def _parameter_groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        import peft_s2lora
        from whisper_moe.train import lora_plus_groups

        decay, sparse = self.weight_decay or 0.0, _trained_s2lora(model)
        if self.lr_multiplier is not None and not sparse:
            return lora_plus_groups(model, lr, multiplier=self.lr_multiplier, weight_decay=decay)
        if sparse:
            for config in sparse if self.lr_multiplier is not None else ():
                config.coefficient_lr_multiplier = self.lr_multiplier  # a warm start has its source's configuration
            groups: list[dict[str, Any]] = peft_s2lora.s2lora_param_groups(model, lr, decay)
            return groups
        return [{"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": lr, "weight_decay": decay}]


def _trained_s2lora(model: Any) -> list[Any]:
    """Configurations of the S2-LoRA adapters that are active, and not of a pool beside them."""
    from peft_s2lora import S2LoraConfig

    active = [config for name, config in model.peft_config.items() if name in model.active_adapters]
    return [config for config in active if isinstance(config, S2LoraConfig)]


def _s2lora_callbacks() -> Sequence[Any]:
    """S2-LoRA's own step, taken where there is an S2-LoRA that is to become sparse; what is trained is known when training begins."""
    from peft_s2lora import S2LoraCallback, S2LoraConfig

    class WhereSparse(S2LoraCallback):
        """Does nothing for other methods."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            active = [config for name, config in model.peft_config.items() if name in model.active_adapters]
            self.wanted = any(isinstance(config, S2LoraConfig) and config.sparsity_weight > 0 for config in active)

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if self.wanted:
                super().on_optimizer_step(*args, **kwargs)

    return [WhereSparse()]


def _split_of(source: str, split: str = "train") -> str | None:
    return None if Path(source).is_file() else split


def _speaks() -> bool:
    """Whether this is the process that prints, of those that `accelerate launch` has started."""
    return os.environ.get("RANK", "0") == "0"
