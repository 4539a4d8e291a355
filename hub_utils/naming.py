"""Repository names of language adapters, `<base>-<method>-<language>[-<domain>]`, and pinned sources, `owner/name@sha`: made and read back.

The method's name separates the base from the language, so it may stand in a name only once: that is what makes reading
exact. Text in, text out; the Hub's own rules for names come from `huggingface_hub`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub.utils import HFValidationError, validate_repo_id

METHODS = ("lora", "s2lora", "loramoe")
"""Methods as they are written in a repository name."""

_LANGUAGE = re.compile(r"[a-z]{2,3}")
_DOMAIN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_EXPECTED = "expected owner/name@ and the 40 hex digits of a commit, then perhaps /subfolder."
PINNED = re.compile(r"(?P<repo_id>[^@]+)@(?P<sha>[0-9a-f]{40})(/(?P<subfolder>[A-Za-z0-9][A-Za-z0-9._-]{0,63}))?")


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a model of the Hub (`openai/whisper-small`) rather than a path."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def method_name(peft_type: str) -> str:
    """PEFT's name of a method (`"S2LORA"`) as it stands in a repository name (`"s2lora"`)."""
    method = peft_type.replace("_", "").lower()
    if method not in METHODS:
        raise ValueError(f"No repository name for the method {peft_type!r}. Known: {', '.join(METHODS)}.")
    return method


@dataclass(frozen=True)
class AdapterName:
    """The name of an adapter's repository, taken apart.

    `str(name)` writes it, `AdapterName.parse` reads it, and one undoes the other. Every part is checked when the name is made.

    Args:
        base: The base model's repository without its owner, `"whisper-small"`.
        method: One of `METHODS`.
        language: Two or three lower-case letters, as Whisper or ISO 639-3 has them.
        domain: What the adapter is for beyond its language (`"child"`): lower-case letters, digits and single hyphens.
    """

    base: str
    method: str
    language: str
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Method {self.method!r} is unknown. Known: {', '.join(METHODS)}.")
        if not _LANGUAGE.fullmatch(self.language):
            raise ValueError(f"Language {self.language!r} is not two or three lower-case letters; a region goes into `domain`.")
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ValueError(f"Domain {self.domain!r} has more than lower-case letters, digits and single hyphens.")
        self._check_single_method()
        self._check_hub_rules()

    def __str__(self) -> str:
        return "-".join(part for part in (self.base, self.method, self.language, self.domain) if part is not None)

    @classmethod
    def of(cls, base_model: str, peft_type: str, language: str, domain: str | None = None) -> AdapterName:
        """The name for an adapter on `base_model` (`"openai/whisper-small"`) made with PEFT's `peft_type`."""
        if not is_hub_id(base_model):
            raise ValueError(f"Base model {base_model!r} is not a model of the Hub. Expected owner/name, such as 'openai/whisper-small'.")
        return cls(base_model.split("/")[1], method_name(peft_type), language, domain)

    @classmethod
    def parse(cls, repo_id: str) -> AdapterName:
        """Read a repository name, with or without its owner."""
        if "/" in repo_id and not is_hub_id(repo_id):
            raise ValueError(f"{repo_id!r} is not a repository id of the Hub, such as 'owner/whisper-small-s2lora-cy'.")
        parts = repo_id.rpartition("/")[2].split("-")
        methods = [position for position, part in enumerate(parts) if part in METHODS]
        if len(methods) != 1 or methods[0] == 0 or methods[0] == len(parts) - 1:
            raise ValueError(f"{repo_id!r} is not named <base>-<method>-<language>[-<domain>], with one method of {', '.join(METHODS)}.")
        at = methods[0]
        return cls("-".join(parts[:at]), parts[at], parts[at + 1], "-".join(parts[at + 2 :]) if parts[at + 2 :] else None)

    def repo_id(self, owner: str) -> str:
        """The full repository id under a user or organisation."""
        repo_id = f"{owner}/{self}"
        if not is_hub_id(repo_id):
            raise ValueError(f"{owner!r} cannot own a repository on the Hub: letters, digits, '-', '_' and '.' only, at most 96.")
        return repo_id

    def _check_single_method(self) -> None:
        for part in (*self.base.split("-"), *(self.domain or "").split("-")):
            if part in METHODS:
                raise ValueError(f"The name {str(self)!r} could be read in two ways: base and domain may not contain the method {part!r}.")

    def _check_hub_rules(self) -> None:
        if not self.base or "/" in self.base:
            raise ValueError(f"Base {self.base!r} is not the last part of a repository id, such as 'whisper-small'.")
        try:
            validate_repo_id(str(self))
        except HFValidationError as error:
            raise ValueError(f"The Hub would refuse the name {str(self)!r}: {error}") from error


@dataclass(frozen=True)
class Pinned:
    """An adapter on the Hub, at one commit. `str` writes it as the file has it: `owner/name@sha`, with `/subfolder` behind it."""

    repo_id: str
    sha: str
    subfolder: str | None = None

    def __post_init__(self) -> None:
        if PINNED.fullmatch(str(self)) is None or not is_hub_id(self.repo_id):
            raise ValueError(f"{str(self)!r} is not pinned: {_EXPECTED}")

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.sha}" + ("" if self.subfolder is None else f"/{self.subfolder}")

    @classmethod
    def parse(cls, text: str) -> Pinned:
        """Read what `str` wrote."""
        found = PINNED.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not pinned: {_EXPECTED}")
        return cls(found["repo_id"], found["sha"], found["subfolder"])
