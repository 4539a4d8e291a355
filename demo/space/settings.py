"""Settings of a Space, read from its environment variables. An unset or empty variable means the default."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..page import Limits

_HIGHEST = {
    "MAX_MINUTES": 24 * 60,
    "MAX_UPLOAD_MB": 10_000,
    "MAX_FILES": 10_000,
    "MAX_AT_ONCE": 1000,  # each has a thread
    "MAX_WAITING": 100_000,
    "GPU_SECONDS": 3600,
    "PORT": 65_535,
}
_DEVICES, _DTYPES = re.compile(r"auto|cpu|mps|cuda(:\d+)?"), ("auto", "float32", "float16", "bfloat16")

PORT = 7860  # where a Space, and a container, is expected to listen
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Settings:
    """What a Space serves.

    Args:
        model: Hub id of the base model, or a folder in the Space's repository; None: the pocket that comes with the package.
        adapters: What `whisper-moe-demo --adapters` takes.
        registry: A registry file in the Space's repository.
        base_model: The base's name on the Hub, if `model` is a folder: adapters are looked for by it.
        device, dtype: As for `whisper-moe-demo`.
        gpu_seconds: On ZeroGPU, how long one request may hold the GPU.
        limits: What visitors may ask for.
        mcp: Whether to offer the API as tools to language models.
        port: Where to listen.
    """

    model: str | None = None
    adapters: tuple[str, ...] = ()
    registry: Path | None = None
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    gpu_seconds: int = 60
    limits: Limits = field(default_factory=Limits)
    mcp: bool = False
    port: int = PORT

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Settings:
        """Read the variables. Raises `ValueError` that names the variable which cannot be read."""
        given = {name: value.strip() for name, value in variables.items() if value.strip()}
        registry = given.get("REGISTRY")
        limits: dict[str, Any] = {
            "max_minutes": _number(given, "MAX_MINUTES"),
            "max_upload_mb": _count(given, "MAX_UPLOAD_MB"),
            "max_files": _count(given, "MAX_FILES"),
            "max_at_once": _count(given, "MAX_AT_ONCE"),
            "max_waiting": _count(given, "MAX_WAITING"),
        }
        chosen: dict[str, Any] = {
            "model": given.get("MODEL"),
            "adapters": tuple(filter(None, re.split(r"[\s,;]+", given.get("ADAPTERS", "")))) or None,
            "registry": None if registry is None else Path(registry),
            "base_model": given.get("BASE_MODEL"),
            "device": _device(given),
            "dtype": _dtype(given),
            "gpu_seconds": _count(given, "GPU_SECONDS"),
            "limits": Limits(**{name: value for name, value in limits.items() if value is not None}),
            "mcp": _switch(given, "MCP"),
            "port": _count(given, "PORT"),
        }
        return cls(**{name: value for name, value in chosen.items() if value is not None})


def is_zero_gpu(variables: Mapping[str, str]) -> bool:
    """Whether this is a Space on ZeroGPU, by the variable that the platform sets."""
    return variables.get("SPACES_ZERO_GPU", "").lower() in {"1", "t", "true"}


def _number(given: Mapping[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        number = float(given[name])
    except ValueError:
        number = math.nan
    if not 0 < number <= _HIGHEST[name]:
        raise ValueError(f"The variable {name} is a number above 0, and at most {_HIGHEST[name]:,}; got {given[name]!r}.")
    return number


def _device(given: Mapping[str, str]) -> str | None:
    device = given.get("DEVICE")
    if device is not None and not _DEVICES.fullmatch(device.lower()):
        raise ValueError(f"The variable DEVICE is auto, cpu, cuda, cuda:1 (or another number) or mps; got {device!r}.")
    return None if device is None else device.lower()


def _dtype(given: Mapping[str, str]) -> str | None:
    dtype = given.get("DTYPE")
    if dtype is not None and dtype.lower() not in _DTYPES:
        raise ValueError(f"The variable DTYPE is {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}; got {dtype!r}.")
    return None if dtype is None else dtype.lower()


def _count(given: Mapping[str, str], name: str) -> int | None:
    number = _number(given, name)
    if number is None:
        return None
    if not number.is_integer():
        raise ValueError(f"The variable {name} is a whole number; got {given[name]!r}.")
    return int(number)


def _switch(given: Mapping[str, str], name: str) -> bool | None:
    if name not in given:
        return None
    value = given[name].lower()
    if value not in _TRUE | _FALSE:
        raise ValueError(f"The variable {name} is 'true' or 'false'; got {given[name]!r}.")
    return value in _TRUE
