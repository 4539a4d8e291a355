"""Which adapter speaks for which language, and the switch that puts it on the base model and takes it off again.

An adapter is a folder: PEFT's own two files and `language_adapter.json`, which says the language, the base it was made for and
how well it did. `AdapterRegistry` chooses and always says why; `AdapterSwitch` is the only place where adapters touch a model.
Importing this file loads neither torch nor PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe.base_signature import WrongBaseError, check_base
from whisper_moe.languages import LanguagePosterior, is_whisper_language, language_code, language_name

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE = "adapter_config.json", "adapter_model.safetensors", "language_adapter.json"
BASE = "none"  # said instead of an adapter's name: the base model alone
_FORMAT = 1


# ---- one adapter -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageAdapter:
    """What is known of an adapter before it is loaded.

    Args:
        name: What it is called; unique in a registry.
        path: Its folder.
        language: The language it writes; Whisper's code, ISO 639-3 where Whisper has none.
        domain: Kind of speech it is for ("child"); None for the language in general. Domain adapters are chosen by name only.
        carrier: Whisper's language whose token stands in for a language that has none; None if it has its own.
        peft_type: PEFT's name of the method.
        base: Name of the base model it was made for.
        base_signature: Fingerprint of that base (`whisper_moe.base_signature`); None if it was not taken.
        num_parameters: Trained numbers.
        num_bytes: Size of the weights on disk.
        metrics: Error rates before and after, with the test set and the normalizer.
    """

    name: str
    path: Path
    language: str
    domain: str | None
    carrier: str | None
    peft_type: str
    base: str
    base_signature: dict[str, Any] | None
    num_parameters: int
    num_bytes: int
    metrics: dict[str, Any]

    @property
    def prompt_language(self) -> str:
        """The language whose token opens the decoder's prompt."""
        return self.language if self.carrier is None else self.carrier

    @classmethod
    def load(cls, folder: str | Path) -> LanguageAdapter:
        """Read an adapter's folder. Its weights stay on disk."""
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"There is no adapter folder {str(path)!r}.")
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{str(path)!r} is no language adapter: it lacks {', '.join(missing)}. `whisper-moe train` writes them.")
        row = _read_json(path / LANGUAGE_FILE)
        if row.get("format") != _FORMAT:
            raise ValueError(f"{path / LANGUAGE_FILE} has format {row.get('format')!r}; this version reads {_FORMAT}. Update the package.")
        try:
            return cls(
                name=_checked_name(row["name"]),
                path=path,
                language=language_code(row["language"]),
                domain=row.get("domain"),
                carrier=_checked_carrier(row["language"], row.get("carrier")),
                peft_type=_read_json(path / CONFIG_FILE)["peft_type"],
                base=row["base_model"],
                base_signature=row.get("base_signature"),
                num_parameters=row["num_parameters"],
                num_bytes=(path / WEIGHTS_FILE).stat().st_size,
                metrics=row.get("metrics", {}),
            )
        except KeyError as error:
            raise ValueError(f"The adapter in {str(path)!r} does not say its {error.args[0]!r}.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds a {type(row).__name__}; expected an object.")
    return row


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not name.strip() or name == BASE:
        raise ValueError(f"An adapter cannot be called {name!r}; {BASE!r} means the base model alone.")
    return name


def _checked_carrier(language: str, carrier: str | None) -> str | None:
    if carrier is not None and not is_whisper_language(language_code(carrier)):
        raise ValueError(f"The carrier {carrier!r} has no token in Whisper either. Choose one of Whisper's languages.")
    if carrier is None and not is_whisper_language(language_code(language)):
        raise ValueError(f"Whisper has no token for {language!r}: the adapter needs a carrier, one of Whisper's languages.")
    return None if carrier is None else language_code(carrier)


# ---- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Who writes, and why.

    Args:
        language: The language that is spoken, as far as is known.
        prompt_language: The language whose token opens the prompt.
        probability: Of the language, where it was detected.
        adapter: The adapter to use; None for the base model alone.
        reason: One plain sentence.
        warning: What the reader should be told besides; None if nothing.
    """

    language: str
    prompt_language: str
    probability: float | None
    adapter: LanguageAdapter | None
    reason: str
    warning: str | None = None


class AdapterRegistry:
    """The adapters at hand, by name. Holds no weights."""

    def __init__(self, adapters: Iterable[str | Path | LanguageAdapter] = ()) -> None:
        self._adapters: dict[str, LanguageAdapter] = {}
        for adapter in adapters:
            self.add(adapter)

    @classmethod
    def from_folder(cls, path: str | Path) -> AdapterRegistry:
        """Every adapter in the sub-folders of `path`, or the one that `path` itself is."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"There is no folder {str(path)!r} to look for adapters in.")
        if (path / CONFIG_FILE).is_file():
            return cls([path])
        return cls(sorted(folder for folder in path.iterdir() if (folder / CONFIG_FILE).is_file()))

    def add(self, adapter: str | Path | LanguageAdapter) -> LanguageAdapter:
        """Add an adapter or the folder of one."""
        adapter = adapter if isinstance(adapter, LanguageAdapter) else LanguageAdapter.load(adapter)
        if adapter.name in self._adapters:
            raise ValueError(f"There is an adapter {adapter.name!r} already, in {self._adapters[adapter.name].path}. Remove it first.")
        self._adapters[adapter.name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; its files stay."""
        del self._adapters[self[name].name]

    def __getitem__(self, name: str) -> LanguageAdapter:
        if name not in self._adapters:
            raise ValueError(f"There is no adapter {name!r}. Known: {self._known_names()}. For the base model alone say {BASE!r}.")
        return self._adapters[name]

    def __iter__(self) -> Iterator[LanguageAdapter]:
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def languages(self) -> list[str]:
        """The languages that adapters write, domain adapters left out."""
        return sorted({adapter.language for adapter in self if adapter.domain is None})

    def for_language(self, code: str) -> LanguageAdapter | None:
        """The adapter that writes a language in general, None if there is none."""
        found = [adapter for adapter in self if adapter.language == code and adapter.domain is None]
        if len(found) > 1:
            names = ", ".join(repr(adapter.name) for adapter in found)
            raise ValueError(f"{len(found)} adapters write {language_name(code)}: {names}. Choose one by its name, or remove the others.")
        return found[0] if found else None

    def check(self, language: str | None, adapter: str | None) -> None:
        """Raise `ValueError` if nobody could write what is asked for. Needs no sound, so it comes before any work."""
        if adapter is not None and adapter != BASE:
            chosen = self[adapter]
            if language is not None and language != chosen.language:
                raise ValueError(
                    f"The adapter {chosen.name!r} writes {language_name(chosen.language)}, not {language_name(language)}. "
                    "Give the language or the adapter, not both."
                )
            return
        if language is None or is_whisper_language(language):
            return
        if adapter == BASE or self.for_language(language) is None:
            raise ValueError(
                f"Whisper has no token for {language_name(language)} ({language!r}), and no adapter writes it. "
                f"Adapters: {self._known_names()}. Train one with `whisper-moe train`."
            )

    def choose(
        self,
        posterior: LanguagePosterior | None,
        *,
        language: str | None = None,
        adapter: str | None = None,
        threshold: float = 0.5,
        written: Collection[str] | None = None,
    ) -> Decision:
        """Decide who writes a recording.

        Args:
            posterior: What was heard; None if a language or an adapter is given.
            language: The language, known beforehand: nothing is guessed.
            adapter: The name of an adapter to use whatever is heard, or "none" for the base model.
            threshold: Below this probability the language counts as uncertain and the base model writes.
            written: Languages the base model is known to write. None: not known, then any language of Whisper may be.
        """
        self.check(language, adapter)
        if adapter is not None and adapter != BASE:
            return self._named(self[adapter], posterior)
        if language is None and posterior is None:
            raise ValueError("Nothing to choose by: give what was heard, a language or an adapter.")
        if language is None:
            assert posterior is not None
            return self._heard(posterior, adapter, threshold, written)
        return self._told(language, posterior, adapter, written)

    def _named(self, adapter: LanguageAdapter, posterior: LanguagePosterior | None) -> Decision:
        probability = None if posterior is None else posterior.probabilities.get(adapter.language)
        reason = f"You asked for the adapter {adapter.name!r}, which writes {language_name(adapter.language)}."
        return Decision(adapter.language, adapter.prompt_language, probability, adapter, reason)

    def _told(self, language: str, posterior: LanguagePosterior | None, adapter: str | None, written: Collection[str] | None) -> Decision:
        name = language_name(language)
        probability = None if posterior is None else posterior.probabilities.get(language)
        if adapter == BASE:
            return Decision(language, language, probability, None, f"You said it is {name}, and asked for the base model.")
        found = self.for_language(language)
        if found is not None:
            reason = f"You said it is {name}; the adapter {found.name!r} writes it."
            return Decision(language, found.prompt_language, probability, found, reason)
        if written is not None and language in written:
            return Decision(language, language, probability, None, f"You said it is {name}; the base model writes it itself.")
        reason = f"You said it is {name}; no adapter writes it, so the base model does."
        return Decision(language, language, probability, None, reason, self._no_adapter(language, written))

    def _heard(self, posterior: LanguagePosterior, adapter: str | None, threshold: float, written: Collection[str] | None) -> Decision:
        language, probability = posterior.best
        name, percent = language_name(language), f"{probability:.0%}"
        if probability < threshold:
            guesses = ", ".join(f"{language_name(code)} {p:.0%}" for code, p in posterior.top(3).items())
            return Decision(
                language,
                language,
                probability,
                None,
                f"{name} is only the best guess ({percent}, the threshold is {threshold:.0%}), so the base model writes.",
                f"The language is uncertain: {guesses}. If you know it, say so.",
            )
        if adapter == BASE:
            return Decision(language, language, probability, None, f"{name} was heard ({percent}); you asked for the base model.")
        found = self.for_language(language)
        if found is not None:
            reason = f"{name} was heard ({percent}); the adapter {found.name!r} writes it."
            return Decision(language, found.prompt_language, probability, found, reason)
        if written is not None and language not in written:
            reason = f"{name} was heard ({percent}); no adapter writes it, so the base model does."
            return Decision(language, language, probability, None, reason, self._no_adapter(language, written))
        return Decision(language, language, probability, None, f"{name} was heard ({percent}); the base model writes it itself.")

    def _no_adapter(self, language: str, written: Collection[str] | None) -> str:
        name = language_name(language)
        trained = "" if written is None else f" The base model hears {name} but never learnt to write it: expect nonsense."
        return f"No adapter for {name} ({language!r}). Adapters: {self._known_names()}.{trained}"

    def _known_names(self) -> str:
        return ", ".join(f"{adapter.name} ({language_name(adapter.language)})" for adapter in self) or "none yet"


# ---- switching ---------------------------------------------------------------------------------------------------------

# Methods whose adapters share nothing, so that several may stay attached side by side. VeRA, RandLoRA and VB-LoRA share tensors
# between adapters and accept a second one that does not fit; whatever is not listed here is attached alone.
_SIDE_BY_SIDE = frozenset({"LORA", "S2LORA"})
# PEFT initialises an adapter before it loads its weights. These initialisations touch the adapter alone; others (PiSSA, OLoRA,
# CorDA, LoftQ, LoRA-GA) subtract it from the base weights, for good.
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva"})


class AdapterSwitch:
    """Puts adapters on a base model and takes them off: `with switch.active(adapter): ...`.

    Outside the context the model is the base, and its weights are the same bytes throughout. Adapters stay attached, switched
    off, so that coming back to one costs little. Any failure to attach takes everything off again. Not thread-safe: the caller
    holds a lock.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise ValueError("AdapterSwitch wants the bare base model; got a PeftModel. Give it `model.unload()`.")
        self.model = model
        self._names = frozenset(model.state_dict())  # tied weights under each of their names
        self._bare = [(module, dict(module._modules), module.training) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._peft: PeftModel | None = None
        self._attached: dict[str, str] = {}  # key of the adapter's files -> its name inside PEFT
        self._active: LanguageAdapter | None = None

    @contextmanager
    def active(self, adapter: LanguageAdapter | None) -> Iterator[nn.Module]:
        """The model with the adapter at work (None: the base alone); afterwards what was active before."""
        previous = self._active
        try:
            self._activate(adapter)
            yield self.model
        finally:
            self._activate(previous)

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base, as it was given."""
        for module, children, training in self._bare:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
        vars(self.model).pop("peft_config", None)  # PEFT leaves it on the model, and would add to it
        self._peft, self._attached, self._active = None, {}, None
        return self.model

    def _activate(self, adapter: LanguageAdapter | None) -> None:
        self._enable(False)  # first, so that a failure leaves the base at work
        self._active = None
        if adapter is not None:
            name = self._attach(adapter)
            assert self._peft is not None
            self._enable(True)
            self._peft.set_adapter(name, inference_mode=True)
            self._active = adapter

    def _enable(self, enabled: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if self._peft is not None:
            for module in self.model.modules():
                if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                    module.enable_adapters(enabled)

    def _attach(self, adapter: LanguageAdapter) -> str:
        """Attach the adapter unless it is there already. Returns its name inside PEFT."""
        key = _files_key(adapter)
        if key in self._attached:
            return self._attached[key]
        config = _checked_config(adapter)
        check_fit(adapter, self.model)
        _check_weights(adapter, config, self._names)
        if self._peft is not None and not _side_by_side(config, self._peft):
            self.unload()
        # Not the adapter's own name: PEFT reads meaning into names ("lo" is part of "lora_", a dot breaks module paths).
        name = f"language{len(self._attached)}"
        try:
            self._load(adapter, config, name)
        except BaseException as error:
            self.unload()
            if isinstance(error, Exception):
                raise ValueError(f"The adapter {adapter.name!r} does not fit this model: {error}") from error
            raise
        self._attached[key] = name
        return name

    def _load(self, adapter: LanguageAdapter, config: PeftConfig, name: str) -> None:
        from peft import PeftModel

        if self._peft is None:
            self._peft = PeftModel(self.model, config, name, autocast_adapter_dtype=False)
        else:
            self._peft.add_adapter(name, config, autocast_adapter_dtype=False)
        device = str(next(self.model.parameters()).device)
        # Adapter weights keep the base's precision: a mixed product would be computed in the higher one, at twice the cost.
        result = self._peft.load_adapter(str(adapter.path), name, torch_device=device, autocast_adapter_dtype=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(
                f"{len(result.missing_keys)} of its weights are missing and {len(result.unexpected_keys)} have no place "
                f"(for instance {(result.missing_keys + result.unexpected_keys)[0]!r})."
            )


def _files_key(adapter: LanguageAdapter) -> str:
    """Changes when the adapter is trained anew in the same folder."""
    try:
        stat = (adapter.path / WEIGHTS_FILE).stat()
    except OSError as error:
        raise ValueError(f"The weights of the adapter {adapter.name!r} are gone: {error}.") from None
    return f"{adapter.path.resolve()} {stat.st_mtime_ns} {stat.st_size}"


def _checked_config(adapter: LanguageAdapter) -> PeftConfig:
    """The PEFT config of an adapter, refused if attaching it could change the base."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if adapter.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"The adapter {adapter.name!r} has peft_type {adapter.peft_type!r}, which PEFT does not know. "
            "If it is 'S2LORA', `import peft_s2lora` first; else install the package that brings the method."
        )
    config = PeftConfig.from_pretrained(str(adapter.path))
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init not in _HARMLESS_INITS:
        raise ValueError(
            f"The adapter {adapter.name!r} was initialised with {init!r}, which changes the base weights. Save it as a plain LoRA: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    config.inference_mode = True
    return config


def check_fit(adapter: LanguageAdapter, model: nn.Module) -> None:
    """Raise `WrongBaseError` if the adapter is known to have been made for another base."""
    if adapter.base_signature is not None:
        try:
            check_base(adapter.base_signature, model)
        except WrongBaseError as error:
            name = Path(str(getattr(model.config, "_name_or_path", "") or "this model")).name
            raise WrongBaseError(f"The adapter {adapter.name!r} was made for {adapter.base!r}, not for {name!r}. {error}") from None


def _check_weights(adapter: LanguageAdapter, config: PeftConfig, base: Collection[str]) -> None:
    """Refuse weights that would land in the base (PEFT loads whatever matches a name) and values that are not numbers."""
    from safetensors import SafetensorError, safe_open

    own = tuple(f"{module}." for module in getattr(config, "modules_to_save", None) or ())
    try:
        with safe_open(adapter.path / WEIGHTS_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, a handle is no dict
                name = key.removeprefix("base_model.model.")
                copied = any(f".{module}" in f".{name}" for module in own)
                if ".base_layer." in key or (name in base and not copied):
                    raise ValueError(f"The adapter {adapter.name!r} would overwrite the base weight {name!r}; it is not used.")
                if not file.get_tensor(key).isfinite().all():
                    raise ValueError(f"The adapter {adapter.name!r} holds values that are not numbers, in {key!r}; it is not used.")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights of the adapter {adapter.name!r} cannot be read: {error}.") from error


def _side_by_side(config: PeftConfig, attached: PeftModel) -> bool:
    """Whether the adapter may join those that are attached."""
    configs = [config, *attached.peft_config.values()]
    kinds = {str(getattr(each.peft_type, "value", each.peft_type)) for each in configs}
    return len(kinds) == 1 and kinds <= _SIDE_BY_SIDE and not any(getattr(each, "modules_to_save", None) for each in configs)
