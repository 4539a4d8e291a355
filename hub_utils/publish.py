"""Publishing: the folder of a trained adapter becomes a repository of the Hub, or a subfolder of one that holds many languages.

Four files in one commit: weights, PEFT's config, what the run recorded, and the card made from these. The folder itself stays as it
is; what goes out is a copy without the paths of the machine it was trained on. Publishing again what is there already does nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError

from ._hub import STALE, HubError, ask, explain, is_ours, is_passing, pause
from .adapter_files import CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE, read_adapter, short
from .card import ENTRIES, POCKET, AdapterCardData, hub_language, render_card
from .naming import AdapterName, Pinned, is_hub_id
from .trust import check_config

CARD_FILE = "README.md"
_SUBFOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# /home/me/clips and C:\Users\me\clips, but not https://host/clips and not a/b.
_MACHINE_PATH = re.compile(r"(?<![\w:/.~-])(?:/|[A-Za-z]:\\)(?:[^\s/\\'\"`|]+[/\\])+(?=[^\s/\\'\"`|]|\b|$)")


@dataclass(frozen=True)
class Published:
    """Where an adapter lies now.

    Args:
        repo_id: The repository.
        subfolder: The folder in it; None if the repository holds this adapter alone.
        sha: The commit that has it.
        tag: The release's name, if it was given one.
        changed: Whether a commit was made; False if the Hub had it already.
        url: The page to look at.
    """

    repo_id: str
    subfolder: str | None
    sha: str
    tag: str | None
    changed: bool
    url: str

    @property
    def source(self) -> str:
        """What a registry file writes for it: `owner/name@sha`, with `/subfolder` behind it."""
        return f"{self.repo_id}@{self.sha}" + ("" if self.subfolder is None else f"/{self.subfolder}")


def publish_adapter(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    owner: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    gated: Literal["auto", "manual", False] | None = None,
    tag: str | None = None,
    base_model: str | None = None,
    pool: str | None = None,
    language_name: str | None = None,
    license: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
    attempts: int = 4,
) -> Published:
    """Publish the folder of a trained adapter.

    Args:
        folder: What `whisper-moe train` writes.
        repo_id: The repository; by default `<owner>/<base>-<method>-<language>[-<domain>]`.
        owner: User or organisation of the default repository; by default whose token it is.
        subfolder: Where in a repository of many languages ("cy"); None for a repository of its own. Needs `repo_id`.
        private: Only its owner sees the repository; None leaves one that is there as it is, and makes a new one public.
        gated: Users must ask for access: "auto", "manual" (somebody decides) or False; None as above.
        tag: Name of a release ("v1"). A tag that is there and holds something else is refused: tags do not move.
        base_model: The base's id on the Hub, for a run that knew its base as a folder only.
        pool: For an S2-LoRA that uses the A and B of another adapter: where that one is published, "owner/name@sha". Written down for
            whoever loads this one.
        language_name: For the card: the language in words ("Welsh").
        license: For the card: the Hub's identifier ("cc-by-4.0"); by default what the run was told.
        token: By default the one that was logged in with.
        api: The client to use, in place of one made from `token`.
        attempts: How often a commit is tried while others commit or the network fails.

    Raises:
        ValueError: The adapter could not be loaded again by others, or the request makes no sense. Nothing was changed on the Hub.
        HubError: The Hub refused, or could not be reached. Publishing again continues where this ended.
    """
    _check_names(repo_id, owner, subfolder, tag)
    api = HfApi(token=token) if api is None else api
    with tempfile.TemporaryDirectory() as work:
        staged = _stage(Path(folder), Path(work), base_model, pool)
        data = AdapterCardData.from_folder(staged, language_name=language_name, license=license)
        _check_loads_again(staged, data)
        _check_pool(data, api)
        target = _target(data, repo_id, owner, api)
        published = (target,) if subfolder is None else (target, subfolder)
        card = render_card(staged, language_name=language_name, license=license, published=published)
        (staged / CARD_FILE).write_text(card, "utf-8")
        _open_repository(api, target, private, gated)
        sha, changed = _commit(api, staged, data, target, subfolder, tag, attempts)
    if tag is not None:
        ask(lambda: api.create_tag(target, tag=tag, revision=sha, exist_ok=True), target)
    return Published(
        target, subfolder, sha, tag, changed, f"{api.endpoint}/{target}" + ("" if subfolder is None else f"/tree/main/{subfolder}")
    )


# ---- before anything is sent -------------------------------------------------------------------------------------------


def _check_names(repo_id: str | None, owner: str | None, subfolder: str | None, tag: str | None) -> None:
    if repo_id is not None and not is_hub_id(repo_id):
        raise ValueError(f"{repo_id!r} is no repository of the Hub. Expected owner/name, such as 'me/whisper-small-s2lora-cy'.")
    if repo_id is not None and owner is not None:
        raise ValueError("Give the repository or its owner, not both.")
    if subfolder is not None and repo_id is None:
        raise ValueError("A subfolder needs the repository it is in: repo_id='owner/name'.")
    if subfolder is not None and (not _SUBFOLDER.fullmatch(subfolder) or subfolder.endswith(".")):
        raise ValueError(f"subfolder is {subfolder!r}; expected one plain name of letters, digits, '-', '_' and '.', such as 'cy'.")
    if tag is not None and (not _TAG.fullmatch(tag) or tag == "main" or tag.endswith((".", ".lock")) or ".." in tag):
        raise ValueError(f"tag is {tag!r}; expected the name of a release, such as 'v1'.")


def _stage(folder: Path, work: Path, base_model: str | None, pool: str | None) -> Path:
    """A copy of the adapter as it will lie on the Hub, still without its card."""
    ours, config = _read_json(folder, LANGUAGE_FILE), _read_json(folder, CONFIG_FILE)
    if pool is not None:
        if config.get("pool") is None:
            raise ValueError(f"pool is {pool!r}, and the adapter uses none: it has A and B of its own. Leave pool out.")
        ours["pool_source"] = pool
    ours["base_model"] = _public_base(ours.get("base_model"), base_model)
    config["base_model_name_or_path"] = ours["base_model"]
    staged = work / "adapter"
    staged.mkdir()
    for name, content in ((LANGUAGE_FILE, _without_paths(ours)), (CONFIG_FILE, config)):
        (staged / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    try:
        shutil.copyfile(folder / WEIGHTS_FILE, staged / WEIGHTS_FILE)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an adapter folder: {WEIGHTS_FILE} is missing.{_pickled(folder)}") from None
    return staged


def _pickled(folder: Path) -> str:
    if not (folder / "adapter_model.bin").is_file():
        return ""
    return " It holds adapter_model.bin, a pickle, which nobody should load: save it with `save_pretrained(..., safe_serialization=True)`."


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an adapter folder: {name} is missing. `whisper-moe train` makes one.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / name} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} holds a {type(content).__name__}, expected an object.")
    return content


def _public_base(recorded: Any, given: str | None) -> str:
    """The base's id on the Hub: what the run recorded, or what it is now said to be if the run knew a folder only."""
    if given is not None and not is_hub_id(given):
        raise ValueError(f"base_model is {given!r}; expected a model of the Hub, such as 'openai/whisper-small'.")
    if isinstance(recorded, str) and is_hub_id(recorded):
        if given is not None and given != recorded:
            raise ValueError(f"The adapter was trained on {recorded!r}, not on {given!r}. Leave base_model out.")
        return recorded
    if given is not None:
        return given
    raise ValueError(
        f"The adapter's base is {recorded!r}, which others cannot load. Give the base's id on the Hub: "
        "base_model='openai/whisper-small' (--base-model), or train with --base-id."
    )


def _without_paths(value: Any) -> Any:
    """Plain data with folders of this machine shortened to the last part of their paths."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return _MACHINE_PATH.sub("", value) if isinstance(value, str) else value


def _check_loads_again(staged: Path, data: AdapterCardData) -> None:
    """Refuse what a stranger could not load: the checks that need no base model."""
    from safetensors import safe_open

    if not isinstance(data.language, str) or not data.language:
        raise ValueError(f"{LANGUAGE_FILE} does not say the language. `whisper-moe train --language` records it.")
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", data.language):
        raise ValueError(f"{LANGUAGE_FILE} has language {data.language!r}; expected a code such as 'cy', 'qug' or 'pt-BR'.")
    # What the other side checks, checked here: nobody should publish what `fetch_adapter` refuses.
    files = read_adapter(staged, "The adapter")
    if not files.tensors:
        raise ValueError(f"{WEIGHTS_FILE} holds no tensors. Save the adapter again.")
    check_config(files.config, "The adapter")
    with safe_open(staged / WEIGHTS_FILE, framework="pt") as file:
        for name in files.tensors:
            if not file.get_tensor(name).isfinite().all():
                raise ValueError(f"{WEIGHTS_FILE} holds values that are not numbers, in {name!r}. Training went wrong; look at its loss.")


def _check_pool(data: AdapterCardData, api: HfApi) -> None:
    """Refuse coefficients whose A and B nobody could find."""
    if data.adapter_config.get("pool") is None:
        return
    if data.pool_source is None:
        raise ValueError(
            f"The adapter uses the pool {data.adapter_config['pool']!r} and holds coefficients only. Publish the pool first, and say where "
            "it is: pool='owner/name@commit' (--pool), or write a LoRA that needs none: peft_s2lora.to_lora(model, name, folder)."
        )
    source = Pinned.parse(data.pool_source)
    info = ask(lambda: api.model_info(source.repo_id, revision=source.sha), f"the pool {source}")
    name = CONFIG_FILE if source.subfolder is None else f"{source.subfolder}/{CONFIG_FILE}"
    if name not in {sibling.rfilename for sibling in info.siblings or ()}:
        raise ValueError(f"The pool {source} has no {name}, so it is no adapter. Name the commit that holds it.")


# ---- on the Hub --------------------------------------------------------------------------------------------------------


def _target(data: AdapterCardData, repo_id: str | None, owner: str | None, api: HfApi) -> str:
    if repo_id is not None:
        return repo_id
    name = AdapterName.of(data.base_model, data.peft_type, data.language, data.domain)
    return name.repo_id(ask(lambda: api.whoami(), "your account")["name"] if owner is None else owner)


def _open_repository(api: HfApi, repo_id: str, private: bool | None, gated: str | bool | None) -> None:
    """The repository is there and as open as it should be, before anything lies in it."""
    info = _info(api, repo_id)
    if info is None:
        ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
        info = ask(lambda: api.model_info(repo_id), repo_id)
    if info.id != repo_id:
        raise ValueError(f"{repo_id} is called {short(info.id)} now. Publish there, or under a new name.")
    changes: dict[str, Any] = {}
    if private is not None and bool(info.private) != private:
        changes["private"] = private
    if gated is not None and info.gated != gated:
        changes["gated"] = gated
    if changes:
        ask(lambda: api.update_repo_settings(repo_id, **changes), repo_id)


def _info(api: HfApi, repo_id: str) -> Any:
    """What the Hub says of a repository; None if it is not there, or not for these eyes."""
    try:
        return ask(lambda: api.model_info(repo_id), repo_id)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise


def _commit(
    api: HfApi, staged: Path, data: AdapterCardData, repo_id: str, subfolder: str | None, tag: str | None, attempts: int
) -> tuple[str, bool]:
    """(commit that holds the adapter, whether it was made now).

    Each try looks first at what is there: a commit whose answer was lost is then found rather than made twice, and one that
    somebody else came before is made again on top of theirs.
    """
    for attempt in range(attempts):
        info = ask(lambda: api.model_info(repo_id, files_metadata=True), repo_id)
        files = _files(staged, data, info, repo_id, subfolder)
        if tag is not None:
            _check_tag(api, repo_id, tag, files, CARD_FILE if subfolder is not None else None)
        changed = _changed(files, info)
        if not changed:
            return str(info.sha), False
        operations = [CommitOperationAdd(path, content) for path, content in changed.items()]
        try:
            commit = api.create_commit(repo_id, operations, commit_message=_message(data, subfolder), parent_commit=info.sha)
        except Exception as error:
            if not is_ours(error):
                raise
            stale = getattr(getattr(error, "response", None), "status_code", None) == STALE
            if attempt + 1 == attempts or not (stale or is_passing(error)):
                raise HubError(explain(error, repo_id)) from error
            pause(error, 0.1 if stale else 2.0**attempt)
            continue
        return str(commit.oid), True
    raise ValueError(f"attempts is {attempts}; at least one is needed.")


def _message(data: AdapterCardData, subfolder: str | None) -> str:
    return f"{data.method} adapter for {data.language}" + ("" if subfolder is None else f", in {subfolder}")


def _files(staged: Path, data: AdapterCardData, info: Any, repo_id: str, subfolder: str | None) -> dict[str, bytes]:
    """Path in the repository -> content. In a repository of many languages, its front page too."""
    entries = read_entries(info.card_data)
    _check_fits_in(entries, data, repo_id, subfolder)
    prefix = "" if subfolder is None else f"{subfolder}/"
    files = {f"{prefix}{path.name}": path.read_bytes() for path in sorted(staged.iterdir())}
    if subfolder is not None:
        kept = [entry for entry in entries if entry["subfolder"] != subfolder]
        rows = [*kept, data.entry(subfolder) | ({} if data.license is None else {"license": data.license})]
        files[CARD_FILE] = _front_page(repo_id, sorted(rows, key=lambda entry: str(entry["subfolder"]))).encode()
    return files


def read_entries(card: Any) -> list[dict[str, Any]]:
    """The adapters that a repository's card lists, those that are well-formed. The card is anybody's text: trust no field further."""
    listed = None if card is None else card.get(ENTRIES)
    if not isinstance(listed, list):
        return []
    return [row for row in listed if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("language", "base_model"))]


def _check_fits_in(entries: list[dict[str, Any]], data: AdapterCardData, repo_id: str, subfolder: str | None) -> None:
    """Refuse to overwrite another adapter, or to mix the two kinds of repository."""
    alone = [entry for entry in entries if entry.get("subfolder") is None]
    if subfolder is None and len(alone) < len(entries):
        raise ValueError(f"{repo_id} holds adapters in subfolders. Give this one a subfolder too, or another repository.")
    if subfolder is not None and alone:
        raise ValueError(f"{repo_id} holds one adapter ({alone[0]['language']}) and no subfolders. Give another repository.")
    there = next((entry for entry in entries if entry.get("subfolder") == subfolder), None)
    if there is None:
        return
    for field in ("language", "base_model", "domain"):
        if there.get(field) != getattr(data, field):
            where = repo_id if subfolder is None else f"{repo_id}/{subfolder}"
            raise ValueError(
                f"{where} holds an adapter whose {field} is {there.get(field)!r}; this one's is {getattr(data, field)!r}. "
                "Give it a place of its own."
            )


def _front_page(repo_id: str, entries: list[dict[str, Any]]) -> str:
    """The card of a repository of many languages."""
    bases = sorted({entry["base_model"] for entry in entries} - {POCKET})
    licenses = {entry.get("license") for entry in entries}
    only = licenses.pop() if len(licenses) == 1 else "other"
    data = ModelCardData(
        language=sorted({hub_language(entry["language"]) for entry in entries}),
        license=only,
        library_name="peft",
        pipeline_tag="automatic-speech-recognition",
        base_model=bases or None,
        tags=["peft", "whisper", "language-adapter", *(f"base_model:adapter:{base}" for base in bases)],
        **({"base_model_relation": "adapter"} if bases else {}),
        **{ENTRIES: entries},
    )
    rows = ["| folder | language | base model | method | WER | CER | test set |", "|---|---|---|---|---:|---:|---|"]
    for entry in entries:
        rates = [f"{100 * entry[rate]:.1f} %" if isinstance(entry.get(rate), (int, float)) else "not measured" for rate in ("wer", "cer")]
        spoken = entry["language"] + (f", {entry['domain']}" if entry.get("domain") else "")
        cells = [f"[{entry['subfolder']}]({entry['subfolder']})", spoken, entry["base_model"], entry.get("peft_type", ""), *rates]
        rows.append("| " + " | ".join(str(cell).replace("|", r"\|") for cell in [*cells, entry.get("test_set", "")]) + " |")
    call = f'fetch_adapter("{repo_id}", subfolder="{entries[0]["subfolder"]}")'
    example = f"```python\nfrom hub_utils import fetch_adapter\n\nfolder = {call}.path\n```"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Language adapters for Whisper\n\nOne folder for each; its card says what it was trained on and "
        f"what it is good for.\n\n{chr(10).join(rows)}\n\n## Use\n\n`pip install peft-s2lora`, then:\n\n{example}\n"
    )


def _changed(files: dict[str, bytes], info: Any) -> dict[str, bytes]:
    """The files that the Hub has not, or has otherwise."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    return {path: content for path, content in files.items() if path not in there or not _same(content, there[path])}


def _same(content: bytes, sibling: Any) -> bool:
    """Whether a file of the Hub holds these bytes: large ones go by SHA-256, others by git's hash."""
    if sibling.lfs is not None:
        return bool(sibling.lfs.sha256 == hashlib.sha256(content).hexdigest())
    return bool(sibling.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _check_tag(api: HfApi, repo_id: str, tag: str, files: dict[str, bytes], leave_out: str | None) -> None:
    """Refuse a tag that is there and holds something else."""
    refs = ask(lambda: api.list_repo_refs(repo_id), repo_id)
    if all(ref.name != tag for ref in refs.tags):
        return
    there = ask(lambda: api.model_info(repo_id, revision=tag, files_metadata=True), repo_id)
    if _changed({path: content for path, content in files.items() if path != leave_out}, there):
        raise ValueError(f"{repo_id} has a release {tag!r} already, and it holds something else. Releases do not move: give a new name.")
