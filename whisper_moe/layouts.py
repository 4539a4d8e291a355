"""Where in a Whisper adapters sit, as lists of `target_modules`, and two adapters of disjoint places as one.

    decoder only                   the encoder is the base's: a recording is encoded once, whatever languages are tried on it
    shared lower, private upper    one adapter for all languages below, a small one for each language above

The lists hold plain names, not a regular expression, because adapters of strangers are refused if their configuration holds one. They mean
the same to every PEFT method with `target_modules`. Importing this file loads neither torch nor PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Side = Literal["encoder", "decoder", "both"]

MODULES = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
"""What LoRA-Whisper adapts (arXiv 2406.06619)."""
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_KNOWN = (*_IN_ATTENTION, "fc1", "fc2")
_WEIGHTS_FILE, _CARD_FILE = "adapter_model.safetensors", "language_adapter.json"


# ---- where ---------------------------------------------------------------------------------------------------------------


def decoder_only(config: Any, modules: Sequence[str] = MODULES) -> list[str]:
    """`target_modules` for every layer of the decoder, and nothing of the encoder.

    Args:
        config: The `WhisperConfig`, or a model that has one.
        modules: Last names of the weights.
    """
    return _names(config, "decoder", range(_sizes(config)["decoder"]), modules)


def upper_private(config: Any, k: int, modules: Sequence[str] = MODULES, side: Side = "both") -> list[str]:
    """`target_modules` for the top `k` layers: what each language owns in the layout "shared lower, private upper".

    Args:
        config: The `WhisperConfig`, or a model that has one.
        k: Layers counted from the top, of each side that is meant.
        modules: Last names of the weights.
        side: "both", or "decoder"/"encoder" to keep the private layers to that side.
    """
    sizes = _checked_depth(config, k, side)
    return [
        name
        for each, count in sizes.items()
        if side in (each, "both")
        for name in _names(config, each, range(count - k, count), modules)
    ]  # fmt: skip


def lower_shared(config: Any, k: int, modules: Sequence[str] = MODULES, side: Side = "both") -> list[str]:
    """`target_modules` for everything that `upper_private` with the same arguments leaves out: the part that all languages share."""
    sizes = _checked_depth(config, k, side)
    return [
        name
        for each, count in sizes.items()
        for name in _names(config, each, range(count - k if side in (each, "both") else count), modules)
    ]  # fmt: skip


def _names(config: Any, side: str, layers: Sequence[int], modules: Sequence[str]) -> list[str]:
    unknown = [name for name in modules if name not in _KNOWN]
    if unknown or not modules:
        said = ", ".join(map(repr, unknown)) or "an empty list"
        raise ValueError(f"modules are names of weights in Whisper's layers: {', '.join(_KNOWN)}; got {said}.")
    blocks = ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn")
    places = [f"{block}.{name}" for block in blocks for name in modules if name in _IN_ATTENTION]
    places += [name for name in modules if name not in _IN_ATTENTION]
    return [f"{side}.layers.{layer}.{place}" for layer in layers for place in places]


def _sizes(config: Any) -> dict[str, int]:
    config = getattr(config, "config", config)
    return {"encoder": config.encoder_layers, "decoder": config.decoder_layers}


def _checked_depth(config: Any, k: int, side: str) -> dict[str, int]:
    sizes = _sizes(config)
    if side not in (*sizes, "both"):
        raise ValueError(f"side is 'encoder', 'decoder' or 'both'; got {side!r}.")
    shallowest = min(count for each, count in sizes.items() if side in (each, "both"))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= shallowest:
        raise ValueError(f"k is a number of layers, 1 to {shallowest} here; got {k!r}.")
    return sizes


# ---- what an adapter touches ---------------------------------------------------------------------------------------------


def touches_encoder(folder: str | Path) -> bool:
    """Whether an adapter changes what the encoder answers. Read from the names in its weights' file, not from what it says of itself.

    In doubt it does: only where every tensor belongs to the decoder or to the output layer may the base's encoder states be used for it.
    """
    path = Path(folder) / _WEIGHTS_FILE
    try:
        stat = path.stat()
        return _header_touches_encoder(str(path), stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"The weights in {str(folder)!r} cannot be read: {error}.") from None


@lru_cache(maxsize=1024)
def _header_touches_encoder(path: str, changed_ns: int, num_bytes: int) -> bool:
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > num_bytes:
            raise ValueError("the header is longer than the file")
        names = [name for name in json.loads(file.read(length)) if name != "__metadata__"]
    return not names or not all(".decoder." in f".{name}" or ".proj_out." in f".{name}" for name in names)


# ---- what it costs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutSize:
    """What a layout costs on disk, for LoRA of one rank.

    Args:
        shared_bytes: Of the part that all languages share; 0 if there is none.
        bytes_per_language: Of what each language owns.
        bytes_if_private: Of an adapter on all of these weights, which each language would own without sharing.
    """

    shared_bytes: int
    bytes_per_language: int
    bytes_if_private: int

    def total(self, num_languages: int) -> int:
        """Bytes of all adapters of so many languages."""
        return self.shared_bytes + num_languages * self.bytes_per_language

    def share(self, num_languages: int) -> float:
        """The total as a part of what fully private adapters would need."""
        return self.total(num_languages) / (num_languages * self.bytes_if_private)


def layout_size(config: Any, private: Sequence[str], shared: Sequence[str] = (), *, r: int = 32, bytes_per_number: int = 4) -> LayoutSize:
    """Bytes of a layout's tensors, from the model's sizes. A file's header comes on top (about 150 bytes a tensor).

    Args:
        config: The `WhisperConfig`, or a model that has one.
        private, shared: `target_modules` as the functions above return them.
        r: Rank.
        bytes_per_number: 4 for float32, 2 for half precision.
    """
    both = set(private) & set(shared)
    if both:
        raise ValueError(f"{sorted(both)[0]!r} is in the shared and in the private part. A weight belongs to one of them.")
    own, common = (sum(_rows_and_columns(config, name) for name in names) * r * bytes_per_number for names in (private, shared))
    return LayoutSize(common, own, own + common)


def _rows_and_columns(config: Any, name: str) -> int:
    """d_out + d_in of a weight: what each rank of a LoRA on it costs."""
    config = getattr(config, "config", config)
    side, last = name.split(".")[0], name.rpartition(".")[2]
    ffn: int = getattr(config, f"{side}_ffn_dim")
    d_model: int = config.d_model
    return 2 * d_model if last in _IN_ATTENTION else d_model + ffn


# ---- two adapters as one -------------------------------------------------------------------------------------------------


def compose_adapters(shared: str | Path, private: str | Path, out: str | Path, *, base: nn.Module | None = None) -> Path:
    """Write a shared and a private adapter as one LoRA folder, which loads like any other. Exact: they adapt different weights.

    Args:
        shared: The adapter below; a LoRA, or an S2-LoRA with its own factors.
        private: The adapter above. Name, language, carrier and metrics are its own.
        out: A new folder.
        base: The bare base model; needed where one of the two is an S2-LoRA.

    Raises:
        ValueError: They adapt a weight both, were made for different bases, or `out` is taken.
    """
    from whisper_moe.plain_lora import other_base, read_pairs, write_lora

    out = Path(out)
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already. Name a new folder.")
    cards = [json.loads((Path(folder) / _CARD_FILE).read_text("utf-8")) for folder in (shared, private)]
    problem = other_base(*((str(card["base_model"]), card.get("base_signature")) for card in cards))
    if problem is not None:
        raise ValueError(f"The shared and the private adapter do not belong together: {problem}")
    below, above = read_pairs(shared, base), read_pairs(private, base)
    both = sorted(set(below) & set(above))
    if both:
        raise ValueError(
            f"Both adapters change {both[0]!r} ({len(both)} weights in all). "
            "Train them on `lower_shared(k)` and `upper_private(k)` with the same k."
        )
    made_of = {"shared": cards[0]["name"], "private": cards[1]["name"]}
    card = cards[1] | {"training": cards[1].get("training", {}) | {"composed_of": made_of}}
    return write_lora(out, below | above, [private, shared], card)
