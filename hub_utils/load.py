"""The one function that puts an adapter on a model, and a cache that keeps a few of them there.

Everything is checked before the model is touched (adapter_files.py, trust.py); the tensors that were checked are the ones that are used,
no file is opened twice. Should PEFT fail all the same, every module is put back as it was.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_files import WEIGHTS_FILE, AdapterError, AdapterFiles, read_adapter, short
from .fetch import MANIFEST_FILE, FetchedAdapter, find_cached
from .naming import is_hub_id
from .trust import BaseModel, check_same_base, check_tensors, check_values, declared_pool, fresh_config

if TYPE_CHECKING:
    from peft import PeftModel

BaseCheck = Callable[[Mapping[str, Any], Any], None]
"""Takes a base model's signature, as an adapter carries it, and the model; raises `ValueError` if they do not belong together."""


def load_adapter(
    model: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    base_model: str | None = None,
    check_base: BaseCheck | None = None,
) -> PeftModel:
    """Put an adapter on a model, for inference.

    A pooled S2-LoRA needs the adapter whose A and B it uses. If that is not on the model, but in the cache as the commit that the pooled
    one names, it is put there first; nothing is downloaded.

    Args:
        model: The base model (`torch.nn.Module`), changed in place, or the `PeftModel` that an earlier call returned.
        folder: The adapter's folder on this machine, such as `fetch_adapter(...).path`. Never a name on the Hub.
        adapter_name: What the adapter is called in the model.
        base_model: Hub id of the base model at hand; by default what the model says it was loaded from.
        check_base: Compares the signature of the base that the adapter carries with the model (`whisper_moe.base_signature.check_base`).
            Where it can be used it decides, and names are not compared.

    Returns:
        The model with the adapter. The first adapter is active; for others call `model.set_adapter(adapter_name)`.

    Raises:
        AdapterError: The adapter is broken, not trusted, or made for another model. The model is as it was, byte for byte.
    """
    files = read_adapter(folder)
    _check_base(files, model, base_model, check_base)
    config = fresh_config(files.config, files.label)
    base = describe_base(model)
    check_tensors(files, config, base)
    tensors = _tensors(files)
    check_values(tensors, files.label)
    _check_name(adapter_name, model, base, config)
    before = Snapshot(model)
    try:
        adapted = _with_pool(model, files, config, base_model, check_base)
        adapted = _attach(adapted, config, tensors, adapter_name)
        if adapted is not model and len(adapted.peft_config) > 1:  # the pool came first, and is not what was asked for
            adapted.set_adapter(adapter_name, inference_mode=True)
        return adapted
    except BaseException as error:
        before.restore()
        if isinstance(error, Exception):
            raise AdapterError(f"{files.label} cannot be put on this model: {short(error)}{_where_pool(files)}") from error
        raise


def check_adapter(folder: str | Path, model: Any) -> Path | None:
    """Everything that `load_adapter` would refuse, found out without touching a model: before an adapter takes another one's place.

    Whether it was made for this very base, by name or signature, is not looked at; a pool must be on the model or in the cache.

    Args:
        folder: The adapter's folder.
        model: The model it is for, or what `describe_base` said of it.

    Returns:
        The folder of the pool that it needs, if it needs one and that is not on the model.

    Raises:
        AdapterError: The adapter is broken, not trusted, does not fit, or its pool is not here.
    """
    files = read_adapter(folder)
    config = fresh_config(files.config, files.label)
    check_tensors(files, config, model if isinstance(model, BaseModel) else describe_base(model))
    check_values(_tensors(files), files.label)
    if getattr(config, "pool", None) is None or config.pool in getattr(model, "peft_config", {}):
        return None
    pool = _find_pool(files)
    if pool is None:
        raise AdapterError(f"{files.label} cannot be used: its pool is not here.{_where_pool(files)}")
    check_adapter(pool.path, model)
    return pool.path


def describe_base(model: Any) -> BaseModel:
    """What the checks need to know of a model, adapters left out."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linear, others, inside = {}, set(), "\n"  # no name begins with a line's end
    for name, module in base.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside, module = f"{name}.", module.get_base_layer()
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            d_in, d_out = _get_in_out_features(module)
            linear[name] = (d_out, d_in)
        else:
            others.add(name)
    encoder, width = _encoder(base)
    return BaseModel(linear, frozenset(others), encoder, width)


def _encoder(base: Any) -> tuple[str | None, int | None]:
    config = getattr(base, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None, None
    encoder = base.get_encoder()
    path = next((f"{name}." for name, module in base.named_modules() if module is encoder), None)
    return path, getattr(config, "d_model", None)


def _check_base(files: AdapterFiles, model: Any, base_model: str | None, check_base: BaseCheck | None) -> None:
    signature = (files.language or {}).get("base_signature")
    if signature is not None and check_base is not None:
        try:
            check_base(signature, model)
        except Exception as error:  # a signature comes from the file too, and may be anything
            raise AdapterError(f"{files.label} does not belong to this model: {short(error)}") from error
        return
    if not check_same_base(files, _hub_id_of(model) if base_model is None else base_model):
        warnings.warn(
            f"{files.label}: nothing says whether it was made for this very model, only that it fits in size. On another one it writes "
            "nonsense. To have it checked: load_adapter(..., base_model='owner/name') or check_base=.",
            stacklevel=3,
        )


def _hub_id_of(model: Any) -> str | None:
    """The Hub id that a model was loaded from; None if that was a folder, or is not known."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and is_hub_id(name) and not os.path.isdir(name) else None


def _tensors(files: AdapterFiles) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(files.read_weights())
    except SafetensorError as error:
        raise AdapterError(f"{files.label}: {WEIGHTS_FILE} cannot be read: {short(error)}. Get it again.") from error


_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _check_name(adapter_name: str, model: Any, base: BaseModel, config: Any) -> None:
    """Refuse a name that PEFT could not tell from a part of a parameter's name."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if not isinstance(adapter_name, str) or not _ADAPTER_NAME.fullmatch(adapter_name):
        raise AdapterError(f"An adapter cannot be called {short(adapter_name)}: letters, digits, '_' and '-' only, at most 64.")
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(
            f"The model has an adapter {adapter_name!r} already. Use another name, or model.delete_adapter({adapter_name!r})."
        )
    parts = {"base_model", "base_layer", *(part for name in (*base.linear, *base.others) for part in name.split("."))}
    if adapter_name in parts:
        raise AdapterError(f"{adapter_name!r} is the name of a module in this model. Call the adapter {adapter_name + '_adapter'!r}, say.")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    if adapter_name in prefix or prefix in adapter_name:
        raise AdapterError(
            f"The adapter cannot be called {adapter_name!r}: PEFT would mix it up with {prefix!r}, its name for weights. "
            f"Call it {'language-' + adapter_name.replace(prefix, '')!r}, say."
        )


def _with_pool(model: Any, files: AdapterFiles, config: Any, base_model: str | None, check_base: BaseCheck | None) -> Any:
    """The model with the pool that an adapter uses, if that is in the cache. Whether it is the right one, the tuner decides by hash."""
    from peft import PeftModel

    pool = getattr(config, "pool", None)
    if pool is None:
        return model
    name = f"pool-{config.pool_hash[:16]}"  # by what it holds: several pools may have been called the same in training
    if isinstance(model, PeftModel) and {name, pool} & set(model.peft_config):
        return model
    found = _find_pool(files)
    return model if found is None else load_adapter(model, found.path, name, base_model=base_model, check_base=check_base)


def _find_pool(files: AdapterFiles) -> FetchedAdapter | None:
    """The pool that an adapter names, if it says where that is published and it is in the cache: the adapter's own, or the usual one."""
    source = declared_pool(files.config, files.language)
    in_cache = (files.folder / MANIFEST_FILE).is_file()
    return None if source is None else find_cached(source, files.folder.parents[1] if in_cache else None)


def _where_pool(files: AdapterFiles) -> str:
    """What a message says of an adapter's pool, if it has one: where it is, and how to get it."""
    if files.config.get("pool") is None:
        return ""
    source = declared_pool(files.config, files.language)
    if source is None:
        return " It holds coefficients only, and does not say where its pool is published: ask its makers, and load the pool first."
    subfolder = "" if source.subfolder is None else f", subfolder={source.subfolder!r}"
    return f" It holds coefficients only; its pool is {source}. Fetch that: fetch_adapter({source.repo_id!r}, {source.sha!r}{subfolder})."


def _attach(model: Any, config: Any, tensors: dict[str, Any], adapter_name: str) -> PeftModel:
    from peft import PeftModel, set_peft_model_state_dict

    # Adapter weights keep the base's precision: a mixed product would be computed in the higher one, at twice the cost.
    if isinstance(model, PeftModel):
        adapted = model
        adapted.add_adapter(adapter_name, config, autocast_adapter_dtype=False)
    else:
        adapted = PeftModel(model, config, adapter_name, autocast_adapter_dtype=False)
    result = set_peft_model_state_dict(adapted, tensors, adapter_name=adapter_name)
    lost = [key for key in result.missing_keys if f".{adapter_name}" in key] + list(result.unexpected_keys)
    if lost:
        raise ValueError(f"{len(lost)} of its weights found no place, the first is {lost[0]!r}.")
    adapted.eval()
    return adapted


class Snapshot:
    """A model's modules as they are now, to be put back if something goes wrong. Weights are not copied: nothing writes to them.

    Everything PEFT changes hangs on modules: children, parameters, hooks, plain attributes and the dicts and lists among them.
    """

    def __init__(self, model: Any) -> None:
        self._modules = [(vars(module), dict(vars(module))) for module in model.modules()]
        containers = {id(value): value for attributes, _ in self._modules for value in attributes.values()}
        self._containers = [(value, value.copy()) for value in containers.values() if isinstance(value, (dict, list, set))]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back. The containers stay the same objects, because handles of hooks refer to them."""
        for attributes, saved in self._modules:
            attributes.clear()
            attributes.update(saved)
        for container, saved_values in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(saved_values)
            else:
                container.update(saved_values)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)


class AdapterCache:
    """Keeps the adapters used last on one model, so that coming back to one costs little, and no more than `max_adapters` of them.

    Args:
        model: The bare base model. It belongs to the cache until `unload`.
        max_adapters: How many may be there at once; the one unused for longest goes first. A pool stays while adapters use it.
        base_model, check_base: As for `load_adapter`.
    """

    def __init__(self, model: Any, max_adapters: int = 8, *, base_model: str | None = None, check_base: BaseCheck | None = None) -> None:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise AdapterError("AdapterCache wants the bare base model; got a PeftModel. Give it `model.unload()`.")
        if not isinstance(max_adapters, int) or max_adapters < 1:
            raise AdapterError(f"max_adapters must be a whole number from 1 up, got {max_adapters!r}.")
        self.max_adapters = max_adapters
        self._options: dict[str, Any] = {"base_model": base_model, "check_base": check_base}
        self._base, self._bare = model, Snapshot(model)
        self._peft: PeftModel | None = None
        self._loaded: OrderedDict[str, str] = OrderedDict()  # key of the adapter's files -> its name, the one used last at the end
        self._num_loads = 0

    def __len__(self) -> int:
        return len(self._loaded)

    def use(self, folder: str | Path, name: str | None = None) -> PeftModel:
        """The model with this adapter at work, loaded if it is not there yet.

        Args:
            folder: The adapter's folder.
            name: What to call it in the model; needed for a pool, which others ask for by name.

        Raises:
            AdapterError: As `load_adapter`; the model and the adapters on it are as they were.
        """
        key = _files_key(Path(folder))
        if key not in self._loaded:
            self._load(Path(folder), key, name)
        self._loaded.move_to_end(key)
        assert self._peft is not None
        self._peft.set_adapter(self._loaded[key], inference_mode=True)
        return self._peft

    def unload(self) -> Any:
        """Take every adapter off and return the base model as it was given."""
        self._bare.restore()
        self._peft = None
        self._loaded.clear()
        return self._base

    def _load(self, folder: Path, key: str, name: str | None) -> None:
        name = f"cached{self._num_loads}" if name is None else name
        if self._peft is not None and not self._joins(folder):
            self._reload_alone(folder, name)
        else:
            self._peft = load_adapter(self._base if self._peft is None else self._peft, folder, name, **self._options)
        self._num_loads += 1
        self._loaded[key] = name
        self._evict(key)

    def _joins(self, folder: Path) -> bool:
        """Whether PEFT can hold the adapter beside those that are there: methods cannot be mixed in one model."""
        assert self._peft is not None
        return str(getattr(self._peft.peft_type, "value", self._peft.peft_type)) == read_adapter(folder).config.get("peft_type")

    def _reload_alone(self, folder: Path, name: str) -> None:
        """Load an adapter of another method: on the bare model, so what was there goes, unless loading fails."""
        before, peft = Snapshot(self._base), self._peft
        self._bare.restore()
        try:
            self._peft = load_adapter(self._base, folder, name, **self._options)
        except BaseException:
            before.restore()
            self._peft = peft
            raise
        self._loaded.clear()

    def _evict(self, newest: str) -> None:
        assert self._peft is not None
        pools = {getattr(config, "pool", None) for config in self._peft.peft_config.values()}
        for key in [key for key, name in self._loaded.items() if key != newest and name not in pools]:
            if len(self._loaded) <= self.max_adapters:
                return
            self._peft.set_adapter(self._loaded[newest], inference_mode=True)  # PEFT chooses another one when the active one goes
            self._peft.delete_adapter(self._loaded.pop(key))


def _files_key(folder: Path) -> str:
    """Changes when the adapter is trained anew in the same folder."""
    try:
        status = (folder / WEIGHTS_FILE).stat()
    except OSError as error:
        raise AdapterError(f"The adapter in {folder} has no readable {WEIGHTS_FILE} ({error.strerror}).") from None
    return f"{folder.resolve()} {status.st_mtime_ns} {status.st_size}"
