"""Per-language adapters on the Hugging Face Hub: what they are called, what their card says, and the ways there and back.

Works on adapter folders and repository names: no audio, no user interface. Names are loaded when first used, so importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._hub import HubError, check_reachable
    from .adapter_files import AdapterError
    from .card import AdapterCardData, render_card
    from .experts import fetch_experts
    from .fetch import FetchedAdapter, cached_adapters, cached_origin, fetch_adapter, verify_cached
    from .find import FoundAdapter, adapters_in, find_adapters, find_all_adapters, pick_adapter, rank_adapters
    from .load import AdapterCache, check_adapter, load_adapter
    from .mirror import Mirrored, fetch_entry, mirror_adapters, verify_mirror
    from .naming import METHODS, AdapterName, Pinned
    from .publish import Published, publish_adapter
    from .registry_file import RegistryEntry, RegistryFile, Update, default_registry, entry_of, update_registry

_HOMES = {
    "_hub": ("HubError", "check_reachable"),
    "adapter_files": ("AdapterError",),
    "card": ("AdapterCardData", "render_card"),
    "experts": ("fetch_experts",),
    "fetch": ("FetchedAdapter", "cached_adapters", "cached_origin", "fetch_adapter", "verify_cached"),
    "find": ("FoundAdapter", "adapters_in", "find_adapters", "find_all_adapters", "pick_adapter", "rank_adapters"),
    "load": ("AdapterCache", "check_adapter", "load_adapter"),
    "mirror": ("Mirrored", "fetch_entry", "mirror_adapters", "verify_mirror"),
    "naming": ("METHODS", "AdapterName", "Pinned"),
    "publish": ("Published", "publish_adapter"),
    "registry_file": ("RegistryEntry", "RegistryFile", "Update", "default_registry", "entry_of", "update_registry"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "AdapterCache",
    "AdapterCardData",
    "AdapterError",
    "AdapterName",
    "FetchedAdapter",
    "FoundAdapter",
    "HubError",
    "Mirrored",
    "Pinned",
    "Published",
    "RegistryEntry",
    "RegistryFile",
    "Update",
    "adapters_in",
    "cached_adapters",
    "cached_origin",
    "check_adapter",
    "check_reachable",
    "default_registry",
    "entry_of",
    "fetch_adapter",
    "fetch_entry",
    "fetch_experts",
    "find_adapters",
    "find_all_adapters",
    "load_adapter",
    "mirror_adapters",
    "pick_adapter",
    "publish_adapter",
    "rank_adapters",
    "render_card",
    "update_registry",
    "verify_cached",
    "verify_mirror",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
