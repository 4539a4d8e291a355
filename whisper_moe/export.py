"""A language adapter for programs that know nothing of this package: as plain LoRA, merged into its base, or for CTranslate2.

The main path is `export_adapter`: load the base, put the adapter on it, write. A folder appears whole or not at all, and nothing is
written beside it. Ways from other PEFT methods to LoRA come in as arguments. Importing this file loads neither torch nor PEFT.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from whisper_moe.languages import language_name, language_tokens
from whisper_moe.pocket import ADAPTERS as POCKET_ADAPTERS
from whisper_moe.pocket import MODEL as POCKET_FOLDER
from whisper_moe.registry import CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE, AdapterRegistry, AdapterSwitch, LanguageAdapter

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

Format: TypeAlias = Literal["lora", "merged", "ct2"]
Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
Quantization: TypeAlias = Literal["int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32"]
Converter: TypeAlias = Callable[..., Any]
"""Writes the equal plain LoRA of a model's adapter: `convert(model, folder=...)`."""

_CARD = "README.md"
_POCKET = "peft-s2lora/pocket-whisper"  # what adapters of the shipped pocket call their base
# The merged model may differ from base and adapter by rounding alone. Relative to the largest logit; rounding is about 1e-6.
_SAME = 1e-3
# faster-whisper gives every model 3,000 frames of 10 ms, and asks for up to 448 tokens. CTranslate2 takes a vocabulary of this
# size for a multilingual one, and a smaller one for English only.
_FRAMES, _HOP, _RATE, _TOKENS, _MULTILINGUAL = 3000, 160, 16_000, 448, 51_865


def find_adapter(adapter: str | Path) -> LanguageAdapter:
    """The adapter in a folder, or the shipped one of that name. A folder goes first."""
    if Path(adapter).is_dir():
        return LanguageAdapter.load(adapter)
    shipped = AdapterRegistry.from_folder(POCKET_ADAPTERS) if POCKET_ADAPTERS.is_dir() else AdapterRegistry()
    found = {each.name: each for each in shipped}.get(str(adapter))
    if found is None:
        known = ", ".join(f"{each.name} ({language_name(each.language)})" for each in shipped) or "none"
        raise ValueError(f"There is no adapter folder {str(adapter)!r}, and no shipped adapter of that name. Shipped: {known}.")
    return found


def export_adapter(
    adapter: LanguageAdapter | str | Path,
    to: str | Path,
    format: Format,
    *,
    model: str | Path | None = None,
    dtype: Precision | None = None,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    to_lora: Mapping[str, Converter] | None = None,
    render_card: Callable[[Path], str] | None = None,
) -> Path:
    """Write an adapter out for other programs.

    Args:
        adapter: A language adapter, its folder, or the name of a shipped one.
        to: Folder to write.
        format: "lora", a language adapter that PEFT loads without this package; "merged", a Whisper checkpoint with the adapter in
            its weights; "ct2", the same for CTranslate2 and faster-whisper (needs the `ct2` extra).
        model: Folder or Hub id of the base; None: the one that the adapter names.
        dtype: Precision of the merged checkpoint; None: that of the base. The merging itself is done in single precision.
        quantization: What CTranslate2 stores; None: the precision of the base.
        overwrite: Replace an earlier export.
        to_lora: For methods other than LoRA: PEFT's name of the method -> the function that writes the equal LoRA.
        render_card: Makes the card of a converted adapter from its folder; None: the card is left out.

    Raises:
        ValueError: The request makes no sense, or the adapter does not fit the base (`WrongBaseError`). Nothing is written.
    """
    adapter = adapter if isinstance(adapter, LanguageAdapter) else find_adapter(adapter)
    source = _base_source(adapter, model)
    target = _checked_target(Path(to).resolve(), adapter, source, overwrite)
    _check_options(format, dtype, quantization)
    converter = None if format != "lora" or adapter.peft_type == "LORA" else _converter(adapter, to_lora or {})
    if format == "ct2":
        _ct2_converter()  # before any work
    base, processor = _open_base(source)
    if format == "ct2":
        _check_geometry(base, processor)
    kept = str(base.dtype).removeprefix("torch.")
    adapted = _attach(adapter, base.float())
    if format == "lora":
        with _written_whole(target, overwrite) as folder:
            _write_lora(folder, adapter, adapted, source, converter, render_card)
        return target
    merged = _merge(adapter, adapted)
    stored = (dtype if format == "merged" else quantization) or kept
    _check_range(merged, stored)
    with _written_whole(target, overwrite) as folder:
        if format == "merged":
            _write_checkpoint(folder, merged, processor, stored)
        else:
            _write_ct2(folder, merged, processor, stored)
        _write_cards(folder, adapter, source)
    return target


# ---- before any work ---------------------------------------------------------------------------------------------------


def _base_source(adapter: LanguageAdapter, model: str | Path | None) -> str:
    """Where the base is loaded from: a folder or an id of the Hub."""
    if model is not None:
        return str(model)
    return str(POCKET_FOLDER) if adapter.base == _POCKET else adapter.base


def _check_options(format: Format, dtype: Precision | None, quantization: Quantization | None) -> None:
    if dtype is not None and format != "merged":
        raise ValueError(f"dtype is the precision of a merged checkpoint; the format is {format!r}. Leave it out (ct2: give quantization).")
    if quantization is not None and format != "ct2":
        raise ValueError(f"quantization is for the format 'ct2'; the format is {format!r}. Leave it out.")


def _converter(adapter: LanguageAdapter, to_lora: Mapping[str, Converter]) -> Converter:
    if adapter.peft_type not in to_lora:
        known = ", ".join(["LORA", *to_lora])
        raise ValueError(f"No exact way from {adapter.peft_type} to plain LoRA is known, only from: {known}. Export it as 'merged'.")
    return to_lora[adapter.peft_type]


def _checked_target(to: Path, adapter: LanguageAdapter, source: str, overwrite: bool) -> Path:
    """The folder to write, refused where something would be lost."""
    sources = {f"the adapter {adapter.name!r}": adapter.path.resolve()} | (
        {"the base": Path(source).resolve()} if Path(source).is_dir() else {}
    )
    for what, path in sources.items():
        if to.is_relative_to(path) or path.is_relative_to(to):
            raise ValueError(f"{str(to)!r} is, holds or lies in the folder of {what}. Name a folder beside it.")
    if Path.cwd().is_relative_to(to):
        raise ValueError(f"{str(to)!r} is the folder you are in, or above it. Name a new one.")
    if not to.exists():
        return to
    if not to.is_dir():
        raise ValueError(f"{str(to)!r} is a file. Name a folder.")
    if any(to.iterdir()):
        if not overwrite:
            raise ValueError(f"{str(to)!r} exists and is not empty. Name another folder, or say overwrite to replace an earlier export.")
        if not _is_model_folder(to):
            raise ValueError(
                f"{str(to)!r} does not look like an earlier export, so it is not overwritten. Remove it yourself, or name another."
            )
    return to


def _is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter and nothing deeper: all that an export ever writes."""
    names = {path.name: path.is_dir() for path in folder.iterdir()}
    return bool(names.keys() & {CONFIG_FILE, "config.json"}) and not any(names.values())


def _ct2_converter() -> Any:
    """CTranslate2's converter of Transformers models, if the package is there."""
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise ValueError(
            f"CTranslate2's format needs its package: pip install 'peft-s2lora[ct2]' ({error}). The format 'merged' needs nothing more."
        ) from None
    return TransformersConverter


def _check_geometry(base: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    """Refuse a Whisper that faster-whisper would run wrongly or not at all."""
    features, config = processor.feature_extractor, base.config
    expected = f"{_FRAMES} frames of {1000 * _HOP // _RATE} ms"
    wrong = []
    if (features.nb_max_frames, features.hop_length, features.sampling_rate) != (_FRAMES, _HOP, _RATE):
        frame_ms = 1000 * features.hop_length / features.sampling_rate
        wrong.append(f"a window of {features.nb_max_frames} frames of {frame_ms:g} ms, not {expected}")
    if config.max_target_positions < _TOKENS:
        wrong.append(f"room for {config.max_target_positions} tokens, not {_TOKENS}")
    if language_tokens(base) and config.vocab_size < _MULTILINGUAL:
        wrong.append(
            f"language tokens in a vocabulary of {config.vocab_size:,}, below the {_MULTILINGUAL:,} by which CTranslate2 knows them"
        )
    if wrong:
        raise ValueError(f"faster-whisper runs Whispers of OpenAI's form only. This base has {'; '.join(wrong)}. Export it as 'merged'.")


# ---- the base and the adapter ------------------------------------------------------------------------------------------


def _open_base(source: str) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The base in the precision it is kept in, and its processor."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

    try:
        config = WhisperConfig.from_pretrained(source)
        quantized = getattr(config, "quantization_config", None) is not None
        if not quantized:
            base = WhisperForConditionalGeneration.from_pretrained(source, dtype="auto")
            processor = WhisperProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"The base {source!r} cannot be loaded. Name its folder or its id on the Hub (--model). {error}") from error
    if quantized:
        raise ValueError(f"The base {source!r} is quantized; an export from it would carry its errors. Name the model it was made from.")
    return base.eval().requires_grad_(False), processor


def _attach(adapter: LanguageAdapter, base: WhisperForConditionalGeneration) -> PeftModel:
    """The adapter on its base, at work, in the base's precision."""
    from peft import PeftModel

    switch = AdapterSwitch(base)
    with switch.active(adapter):
        pass  # the switch refuses what does not fit and what would overwrite the base
    return PeftModel.from_pretrained(switch.unload(), str(adapter.path), torch_device="cpu", autocast_adapter_dtype=False).eval()


def _merge(adapter: LanguageAdapter, adapted: PeftModel) -> WhisperForConditionalGeneration:
    """The base with the adapter in its weights. Compared with what base and adapter computed before."""
    import torch

    inputs = _noise(adapted.get_base_model())
    with torch.no_grad():
        before = adapted(**inputs).logits  # (1, tokens, vocabulary)
        merged: WhisperForConditionalGeneration = adapted.merge_and_unload(safe_merge=True)
        difference = (merged(**inputs).logits - before).abs().max() / before.abs().max()
    if not difference <= _SAME:  # NaN is wrong too
        raise ValueError(
            f"The adapter {adapter.name!r} cannot be merged: the merged model differs by {difference:.1%} of its largest logit. Either "
            "the adapter's effect depends on the input, or it adapts a weight that is used twice (Whisper's embedding is its output layer)."
        )
    _add_written_language(adapter, merged)
    return merged


def _noise(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Something to compare two models on."""
    import torch

    config, generator = model.config, torch.Generator().manual_seed(0)
    features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)  # (1, n_mels, frames)
    tokens = torch.randint(config.vocab_size, (1, 8), generator=generator)
    return {"input_features": features, "decoder_input_ids": tokens}


def _add_written_language(adapter: LanguageAdapter, merged: WhisperForConditionalGeneration) -> None:
    """A checkpoint that lists the languages it writes (the pocket does) lists the adapter's from now on."""
    written = getattr(merged.generation_config, "written_languages", None)
    if written is not None and adapter.carrier is None and adapter.language not in written:
        merged.generation_config.written_languages = [*written, adapter.language]


# ---- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def _written_whole(to: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `to` when all has gone well and vanishes otherwise."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as holder:
        new, old = Path(holder) / "new", Path(holder) / "old"
        new.mkdir()
        yield new
        for file in new.iterdir():
            file.chmod(new.stat().st_mode & 0o666)  # as any new file: safetensors makes its own private, and others are to read these
        if to.exists():
            if overwrite:
                os.rename(to, old)
            else:
                to.rmdir()  # fails if somebody else has written there meanwhile
        try:
            os.rename(new, to)
        except OSError:
            if old.exists():
                os.rename(old, to)
            raise


def _write_lora(
    folder: Path,
    adapter: LanguageAdapter,
    adapted: PeftModel,
    source: str,
    convert: Converter | None,
    render_card: Callable[[Path], str] | None,
) -> None:
    """A language adapter in PEFT's own LoRA format. A LoRA is copied, any other method converted."""
    if convert is None:
        for name in (CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE, _CARD):
            if (adapter.path / name).is_file():
                shutil.copyfile(adapter.path / name, folder / name)
        return
    # While it converts, PEFT asks whether the vocabulary has grown, and asks the Hub unless it is told where the base lies.
    adapted.active_peft_config.base_model_name_or_path = source
    convert(adapted, folder=folder)
    known = _read_json(adapter.path / CONFIG_FILE)
    about_base = {field: known.get(field) for field in ("base_model_name_or_path", "auto_mapping")}  # its public name, and its class
    _write_json(folder / CONFIG_FILE, _read_json(folder / CONFIG_FILE) | about_base)
    row = _read_json(adapter.path / LANGUAGE_FILE)
    row["training"] = row.get("training", {}) | {"exported_from": f"{adapter.peft_type}, {adapter.num_parameters:,} trained parameters"}
    row["num_parameters"] = _num_values(folder / WEIGHTS_FILE)
    _write_json(folder / LANGUAGE_FILE, row)
    if render_card is not None:
        (folder / _CARD).write_text(render_card(folder), "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return row


def _write_json(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _num_values(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118, a handle is no dict


def _check_range(merged: WhisperForConditionalGeneration, stored: str) -> None:
    """Refuse a precision that turns a weight into infinity."""
    import torch

    largest = torch.finfo(torch.float16 if stored in ("float16", "int8_float16") else torch.float32).max
    for name, weight in merged.named_parameters():
        if weight.abs().max() > largest:
            raise ValueError(f"The weight {name!r} goes up to {weight.abs().max():.3g}, too much for {stored}. Take float32 or bfloat16.")


def _write_checkpoint(folder: Path, merged: WhisperForConditionalGeneration, processor: WhisperProcessor, dtype: str) -> None:
    """A Whisper checkpoint that `from_pretrained` loads without PEFT."""
    import torch

    merged.to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)  # a second time, in the file that other programs look for


def _write_ct2(folder: Path, merged: WhisperForConditionalGeneration, processor: WhisperProcessor, quantization: str) -> None:
    """The merged model in CTranslate2's format, with the two files that faster-whisper reads besides."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as checkpoint:
        _write_checkpoint(Path(checkpoint), merged, processor, "float32")
        _ct2_converter()(checkpoint).convert(str(folder), quantization=quantization, force=True)  # force: the folder exists
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copyfile(Path(checkpoint) / name, folder / name)


def _write_cards(folder: Path, adapter: LanguageAdapter, source: str) -> None:
    """What the merged model is, and the cards of its two parts, which name the data and whose they are."""
    spoken = language_name(adapter.language) + ("" if adapter.domain is None else f", {adapter.domain} speech")
    prompt = f"Pass `language={adapter.prompt_language!r}`"
    if adapter.carrier is not None:
        prompt += f": {language_name(adapter.language)} has no token of its own in Whisper and was trained under this one"
    lines = [
        f"# {adapter.name}, merged into {adapter.base}",
        "",
        f"`{adapter.base}` with the language adapter `{adapter.name}` ({spoken}; {adapter.peft_type}) added to its weights.",
        "",
        f"- {prompt}.",
        "- The adapter is always at work here: other languages may come out worse than with the base, and so may the detection of the",
        "  language.",
    ]
    cards = {"README.adapter.md": ("adapter", adapter.path / _CARD), "README.base.md": ("base", Path(source) / _CARD)}
    for name, (what, card) in cards.items():
        if card.is_file():
            shutil.copyfile(card, folder / name)
            lines.append(f"- Data, licence and error rates of the {what}: [{name}]({name}).")
        else:
            lines.append(f"- The {what} came without a card: look up its licence before you pass this on.")
    (folder / _CARD).write_text("\n".join(lines) + "\n", "utf-8")
