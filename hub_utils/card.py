"""The card of a language adapter: `README.md` with the Hub's metadata, made from what the run left in its folder.

Reads `adapter_config.json` (PEFT's), `language_adapter.json` (ours) and the size of the weights; nothing is typed by hand.
What the run did not record is left out with a warning, never guessed. No model is loaded.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .naming import Pinned, is_hub_id, method_name

FORMAT = 1
"""The format of `language_adapter.json` this file reads."""

POCKET = "peft-s2lora/pocket-whisper"
"""Name of the base model that is installed with the package and lies on no Hub."""

_WEIGHTS = "adapter_model.safetensors"
_METHOD_TITLES = {"lora": "LoRA", "s2lora": "S2-LoRA", "loramoe": "LoRA-MoE"}
_TEACHES_PEFT = {"S2-LoRA": "import peft_s2lora", "LoRA-MoE": "from whisper_moe import LoraMoeConfig"}
_MOST_RATE, _MOST_CLIPS = 100, 999_999_999  # a figure beyond is none
_HUB_LANGUAGES = {"jw": "jv"}  # Whisper's code -> the code the Hub's language list has

ENTRIES = "language_adapters"
"""Metadata field that says exactly what the Hub's own fields only say roughly: one entry for each adapter of a repository."""


@dataclass(frozen=True)
class ErrorRates:
    """Error rates on one test set, as fractions (0.25 is 25 %); above 1 is possible."""

    wer: float
    cer: float
    clips: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("wer", self.wer), ("cer", self.cer)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= _MOST_RATE:  # NaN is not
                raise ValueError(f"metrics: {name} is {repr(value)[:100]}, expected a fraction from 0 to {_MOST_RATE} (1 is 100 %).")
        if self.clips is not None and (not isinstance(self.clips, int) or not 0 <= self.clips <= _MOST_CLIPS):
            raise ValueError(f"metrics: clips is {repr(self.clips)[:100]}, expected a whole number from 0 to {_MOST_CLIPS}.")


@dataclass(frozen=True)
class AdapterCardData:
    """Everything a card says, read from an adapter folder by `AdapterCardData.from_folder`."""

    name: str
    language: str
    base_model: str
    peft_type: str
    num_parameters: int
    num_bytes: int
    language_name: str | None = None
    domain: str | None = None
    carrier: str | None = None
    train_data: str | None = None
    test_set: str | None = None
    normalizer: str | None = None
    before: ErrorRates | None = None
    after: ErrorRates | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    limits: str | None = None
    command: str | None = None
    pool_source: str | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, *, language_name: str | None = None, license: str | None = None) -> AdapterCardData:
        """Read an adapter folder.

        Args:
            folder: What `whisper-moe train` writes.
            language_name: The language in words, `"Welsh"`; without it the card shows the code.
            license: The Hub's identifier, `"cc-by-4.0"`; by default what the run was told. The data decide it, so nothing is assumed.

        Raises:
            ValueError: A file is missing or does not say what it must.
        """
        folder = Path(folder)
        ours = _read_json(folder / "language_adapter.json")
        config = _read_json(folder / "adapter_config.json")
        if ours.get("format") != FORMAT:
            raise ValueError(f"{folder / 'language_adapter.json'}: format {ours.get('format')!r}, expected {FORMAT}. Update peft-s2lora.")
        metrics, training = ours.get("metrics") or {}, dict(ours.get("training") or {})
        told = {key: training.pop(key, None) for key in ("license", "limits", "command")}
        try:
            return cls(
                name=ours["name"],
                language=ours["language"],
                base_model=ours["base_model"],
                peft_type=config["peft_type"],
                num_parameters=ours["num_parameters"],
                num_bytes=_weights_size(folder),
                language_name=language_name,
                domain=ours.get("domain"),
                carrier=ours.get("carrier"),
                train_data=ours.get("train_data"),
                test_set=metrics.get("test_set"),
                normalizer=metrics.get("normalizer"),
                before=_error_rates(metrics.get("before")),
                after=_error_rates(metrics.get("after")),
                adapter_config=config,
                training=training,
                pool_source=_pool_source(ours.get("pool_source")),
                **(told if license is None else told | {"license": license}),
            )
        except KeyError as error:
            raise ValueError(f"{folder}: {error} is missing from its JSON files. Make it again with `whisper-moe train`.") from error

    @property
    def method(self) -> str:
        """The method's usual name, `"S2-LoRA"`; PEFT's own name where we have none."""
        try:
            return _METHOD_TITLES[method_name(self.peft_type)]
        except ValueError:
            return self.peft_type

    @property
    def hub_base(self) -> str | None:
        """The base model if others can fetch it from the Hub by this name."""
        return self.base_model if is_hub_id(self.base_model) and self.base_model != POCKET else None

    @property
    def speech(self) -> str:
        """What the adapter transcribes, in words: `"Welsh (cy), child speech"`."""
        language = f"{self.language_name} (`{self.language}`)" if self.language_name else f"`{self.language}`"
        return f"{language}, {self.domain} speech" if self.domain else language

    def unknown_fields(self) -> list[str]:
        """What a complete card would say and this run did not record."""
        missing = [label for label, value in (("train_data", self.train_data), ("license", self.license)) if value is None]
        if self.adapter_config.get("pool") is not None and self.pool_source is None:
            missing.append("pool_source")
        missing += [f"metrics {label}" for label, rates in (("before", self.before), ("after", self.after)) if rates is None]
        return missing if is_hub_id(self.base_model) else [*missing, f"a Hub id of the base model (it is {self.base_model!r})"]

    def metadata(self) -> ModelCardData:
        """The Hub's metadata: what filters and widgets read."""
        tags = ["peft", "whisper", "language-adapter", self.method.lower()]
        if self.hub_base is not None:
            tags.append(f"base_model:adapter:{self.hub_base}")
        more: dict[str, Any] = {} if self.hub_base is None else {"base_model_relation": "adapter"}
        if "-" in self.language:
            more["language_bcp47"] = [self.language]
        return ModelCardData(
            language=[hub_language(self.language)],
            license=self.license,
            library_name="peft",
            pipeline_tag="automatic-speech-recognition",
            base_model=self.hub_base,
            tags=tags,
            metrics=["wer", "cer"],
            model_name=self.name,
            eval_results=self._eval_results(),
            **more,
            **{ENTRIES: [self.entry()]},
        )

    def entry(self, subfolder: str | None = None) -> dict[str, Any]:
        """What a search needs to know of this adapter, as plain data; unknown fields are left out. Rates are fractions."""
        measured = {} if self.after is None else {"wer": round(self.after.wer, 5), "cer": round(self.after.cer, 5)}
        fields = {
            "language": self.language,
            "name": self.name,
            "base_model": self.base_model,
            "peft_type": self.peft_type,
            "subfolder": subfolder,
            "domain": self.domain,
            "carrier": self.carrier,
            "pool": self.pool_source,
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            **measured,
            "test_set": self.test_set if measured else None,
            "normalizer": self.normalizer if measured else None,
        }
        return {key: value for key, value in fields.items() if value is not None}

    def _eval_results(self) -> list[EvalResult] | None:
        if self.after is None or self.test_set is None:
            return None
        return [
            EvalResult(
                task_type="automatic-speech-recognition",
                task_name="Speech Recognition",
                dataset_type=re.sub(r"[^\w./-]+", "_", self.test_set),
                dataset_name=self.test_set,
                metric_type=metric,
                metric_name=f"{metric.upper()} in percent, {self.normalizer} normaliser",
                metric_value=round(100 * rate, 2),
            )
            for metric, rate in (("wer", self.after.wer), ("cer", self.after.cer))
        ]


def hub_language(code: str) -> str:
    """The code under which the Hub lists a language: two or three letters, without script or region."""
    primary = code.partition("-")[0]
    return _HUB_LANGUAGES.get(primary, primary)


def render_card(
    folder: str | Path, *, language_name: str | None = None, license: str | None = None, published: tuple[str, ...] | None = None
) -> str:
    """The `README.md` of an adapter folder. Arguments and errors are those of `AdapterCardData.from_folder`.

    Args:
        published: `(repo id,)` or `(repo id, subfolder)` where the folder will lie; the snippets then fetch it from there.
    """
    data = AdapterCardData.from_folder(folder, language_name=language_name, license=license)
    if unknown := data.unknown_fields():
        warnings.warn(f"The card of {data.name!r} is incomplete, the run did not record: {', '.join(unknown)}.", stacklevel=2)
    use = _use_section(data, published)
    sections = [_opening(data), _error_rates_section(data), _training_section(data), use, _limits_section(data)]
    return f"---\n{data.metadata().to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _opening(data: AdapterCardData) -> str:
    license = f"Licence: {data.license}." if data.license else "Licence: not stated by its makers; ask them before you use it."
    return (
        f"# {data.name}: {data.method} language adapter for Whisper\n\n"
        f"Transcribes {data.speech} on top of `{data.base_model}`, a [Whisper](https://arxiv.org/abs/2212.04356) that stays unchanged. "
        f"{data.num_parameters:,} parameters, {_size(data.num_bytes)}. {license}{_pool_note(data)}"
    )


def _pool_note(data: AdapterCardData) -> str:
    """Where the A and B of a pooled adapter are; empty for one that has its own."""
    if data.adapter_config.get("pool") is None:
        return ""
    if data.pool_source is None:
        where = "Where that is published, its makers did not say; ask them."
    else:
        pinned = Pinned.parse(data.pool_source)
        where = f"That is [{pinned.repo_id}](https://huggingface.co/{pinned.repo_id}/tree/{pinned.sha}), `{pinned}`."
    return (
        f"\n\n**It needs its pool.** The file holds coefficients only; A and B are those of another adapter, called "
        f"`{data.adapter_config['pool']}` in training (SHA-256 `{str(data.adapter_config.get('pool_hash'))[:12]}...`). {where}"
    )


def _error_rates_section(data: AdapterCardData) -> str:
    if data.before is None and data.after is None:
        return "## Error rates\n\nNot measured."
    rows = ["| | WER | CER | clips |", "|---|---:|---:|---:|"]
    for label, rates in (("base model alone", data.before), ("with this adapter", data.after)):
        rows.append(f"| {label} | {_percent(rates, 'wer')} | {_percent(rates, 'cer')} | {_clips(rates)} |")
    measured = f"Measured on: {data.test_set or 'a set the run did not name'}. Text normaliser: {data.normalizer or 'not recorded'}."
    return "## Error rates\n\n" + "\n".join(rows) + f"\n\n{measured}{_verdict(data)}"


def _verdict(data: AdapterCardData) -> str:
    if data.before is None or data.after is None or data.before.cer == 0:
        return ""
    change = data.after.cer / data.before.cer - 1
    if change >= 0:
        return f" **The adapter does not help here:** CER changed by {change:+.0%}."
    return f" CER changed by {change:+.0%}."


def _training_section(data: AdapterCardData) -> str:
    facts: dict[str, object] = {"data": data.train_data or "not recorded", "method": f"{data.method} (PEFT type `{data.peft_type}`)"}
    facts |= {key: data.adapter_config[key] for key in ("r", "target_modules", "share_scope") if data.adapter_config.get(key) is not None}
    facts |= {key: value for key, value in data.training.items() if isinstance(value, (str, int, float))}
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items()]
    command = f"\n\n```bash\n{data.command}\n```" if data.command else ""
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(rows) + command


def _use_section(data: AdapterCardData, published: tuple[str, ...] | None) -> str:
    base, pool = "pocket.MODEL" if data.base_model == POCKET else json.dumps(data.base_model), data.adapter_config.get("pool")
    imports = ["from peft import PeftModel", "from transformers import WhisperForConditionalGeneration, WhisperProcessor"]
    teach = _TEACHES_PEFT.get(data.method)
    taught = [] if teach is None else [f"{teach}  # teaches PEFT the method; without it: KeyError '{data.peft_type}'"]
    imports = [*taught, *imports]
    if data.base_model == POCKET:
        imports.append("from whisper_moe import pocket")
    given, fetched, load = ", with `folder` as the folder this card lies in", [], ""
    if published is not None:
        subfolder = f", subfolder={json.dumps(published[1])}" if len(published) > 1 else ""
        given, fetched = "", [*_fetch_pool(data), f"folder = fetch_adapter({json.dumps(published[0])}{subfolder}).path"]
        load = ", load=load_adapter"
    return "\n".join(
        [
            "## Use",
            "",
            f"`pip install peft-s2lora`, then{given}:",
            "",
            "```python",
            *taught,
            *(["from hub_utils import fetch_adapter, load_adapter"] if fetched else []),
            "from whisper_moe import Transcriber",
            *(["from whisper_moe import pocket"] if data.base_model == POCKET else []),
            "",
            *fetched,
            f"transcriber = Transcriber.from_pretrained({base}, adapters=folder{load})",
            f'print(transcriber.transcribe("recording.wav", adapter={json.dumps(data.name)}).text)',
            "```",
            "",
            f"With PEFT alone, `samples` being 16 kHz mono as a float32 array{'' if pool is None else ', `pool` the folder of the pool'}:",
            "",
            "```python",
            *imports,
            "",
            f"processor = WhisperProcessor.from_pretrained({base})",
            *_with_peft(base, pool),
            'inputs = processor(samples, sampling_rate=16_000, return_tensors="pt")',
            f'tokens = model.generate(**inputs, language={json.dumps(data.carrier or data.language)}, task="transcribe")',
            "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
            "```",
        ]
    )


def _with_peft(base: str, pool: str | None) -> list[str]:
    """The lines that put the adapter on its base by PEFT's own means; a pool comes first."""
    whisper = f"WhisperForConditionalGeneration.from_pretrained({base})"
    if pool is None:
        return [f"model = PeftModel.from_pretrained({whisper}, folder)"]
    return [
        f'model = PeftModel.from_pretrained({whisper}, pool, adapter_name="pool")',
        'model.load_adapter(folder, "language")',
        'model.set_adapter("language")',
    ]


def _fetch_pool(data: AdapterCardData) -> list[str]:
    """The line that has the pool here before the adapter that uses it; none for an adapter without."""
    if data.pool_source is None:
        return []
    pinned = Pinned.parse(data.pool_source)
    subfolder = "" if pinned.subfolder is None else f", subfolder={json.dumps(pinned.subfolder)}"
    return [f"fetch_adapter({json.dumps(pinned.repo_id)}, {json.dumps(pinned.sha)}{subfolder})  # the pool"]


def _limits_section(data: AdapterCardData) -> str:
    limits = [f"It fits this base model only (`{data.base_model}`); on another of the same size it would produce nonsense."]
    if data.base_model == POCKET:
        limits.append("The base is the pocket model: small, made for trying out. Expect errors; for real work use a full Whisper.")
    if data.carrier:
        limits.append(f"Whisper has no token for `{data.language}`. The adapter was trained under that of `{data.carrier}`: pass it.")
    if data.domain:
        limits.append(f"It is meant for {data.domain} speech; other speech may come out worse than with the base model.")
    if data.limits:
        limits.append(data.limits)
    limits.append("The rates above hold for that test set. Other speakers, microphones and subjects will differ.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not an adapter folder: {path.name} is missing. `whisper-moe train` makes one.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _weights_size(folder: Path) -> int:
    try:
        return (folder / _WEIGHTS).stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not an adapter folder: {_WEIGHTS} is missing.") from error


def _pool_source(text: Any) -> str | None:
    """Where a pool is published, if the run's record says it so that it can be found again."""
    return None if text is None else str(Pinned.parse(str(text)))


def _error_rates(row: dict[str, Any] | None) -> ErrorRates | None:
    return None if not row else ErrorRates(row["wer"], row["cer"], row.get("clips"))


def _percent(rates: ErrorRates | None, metric: str) -> str:
    return "not measured" if rates is None else f"{100 * getattr(rates, metric):.1f} %"


def _clips(rates: ErrorRates | None) -> str:
    return "" if rates is None or rates.clips is None else f"{rates.clips:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def _cell(value: object) -> str:
    """A value inside a Markdown table: lists joined, bars escaped, one line."""
    text = ", ".join(sorted(map(str, value))) if isinstance(value, (list, tuple)) else str(value)
    return " ".join(text.replace("|", r"\|").split())
