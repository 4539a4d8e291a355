"""What runs in each process of a batch: settings that become a transcriber, the actor that gets files, the ledger of who died over what.

Plain classes: Ray Data starts the actor (`ray_batch`), and tests call it as it is. Importing this file loads neither Ray nor torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from whisper_moe.audio import SAMPLE_RATE, AudioError, load_audio
from whisper_moe.batch_output import COLUMNS, is_plain_name

if TYPE_CHECKING:
    from whisper_moe.engine import CheckAdapter
    from whisper_moe.registry import LanguageAdapter, LoadAdapter
    from whisper_moe.transcribe import Transcriber

LARGEST_BYTES = 4 * 2**30  # of a file, which is read whole: four hours of stereo at 48 kHz
MAX_DEATHS = 3  # workers that may die over a file before it is given up

Kind = Literal["audio", "too large", "unreadable", "refused", "killed its worker", "failed"]


# ---- what is asked ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSettings:
    """How recordings are transcribed; the fields are those of `Transcriber.from_pretrained` and `Transcriber.transcribe`.

    Args:
        model: Folder or Hub id of a Whisper; every machine must find it there. None: the pocket.
        adapters: Folders of adapters; None: those shipped with the pocket, and none for another model.
        language: The language of all recordings; None: it is detected.
        adapter: An adapter to use whatever is heard; "none" for the base model alone.
        allowed: Languages to choose among when detecting.
        threshold: Below this probability the language counts as uncertain.
        num_beams: Beams of the search.
        batch_size: Windows of a recording written at a time.
        max_duration_s: Longer recordings are reported and passed over; None: no limit.
        device: "cuda", "mps", "cpu" or "auto".
        dtype: "float16", "bfloat16", "float32" or "auto".
        imports: Modules that each worker imports first: `peft_s2lora`, for adapters of that method.
    """

    model: str | None = None
    adapters: tuple[str, ...] | None = None
    language: str | None = None
    adapter: str | None = None
    allowed: tuple[str, ...] | None = None
    threshold: float = 0.5
    num_beams: int = 1
    batch_size: int = 8
    max_duration_s: float | None = 4 * 3600.0
    device: str = "auto"
    dtype: str = "auto"
    imports: tuple[str, ...] = ()

    def digest(self) -> str:
        """Of all that decides a transcript, the bytes of model and adapters included. Machine and batch size are not in it.

        Raises:
            ValueError: There is no such model or adapter.
        """
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NO_MATTER}
        said |= {"model": _model_digest(self.model), "adapters": self._adapters_digest()}
        return sha256_of(json.dumps(said, sort_keys=True).encode())[:16]

    def load(self, load: LoadAdapter | None = None, check: CheckAdapter | None = None) -> Transcriber:
        """The transcriber. Settings and adapters that it refuses are refused now, before any recording is read.

        Args:
            load, check: What puts adapters on the model and looks them over, as for `Transcriber.from_pretrained`.
        """
        for module in self.imports:
            import_module(module)
        from whisper_moe.transcribe import Transcriber

        adapters = None if self.adapters is None else list(self.adapters)
        transcriber = Transcriber.from_pretrained(self.model, adapters, self.device, self.dtype, load=load, check=check)
        for adapter in self._may_write(transcriber):
            transcriber.load(adapter)  # else an adapter that does not fit would be found out by every recording anew
        self.transcribe(transcriber, np.zeros(SAMPLE_RATE, np.float32))  # silence: everything is checked, and nothing written
        return transcriber

    def transcribe(self, transcriber: Transcriber, samples: np.ndarray, language: str | None = None) -> dict[str, Any]:
        """The transcript of a recording, (samples,) at 16 kHz, as plain values."""
        transcript = transcriber.transcribe(
            samples,
            language=self.language if language is None else language,
            adapter=self.adapter,
            allowed=self.allowed,
            threshold=self.threshold,
            num_beams=self.num_beams,
            batch_size=self.batch_size,
            max_duration_s=self.max_duration_s,
        )
        return transcript.to_dict()

    def _may_write(self, transcriber: Transcriber) -> list[LanguageAdapter]:
        """The adapters that a recording may come to."""
        from whisper_moe.registry import BASE

        if self.adapter is not None:
            return [] if self.adapter == BASE else [transcriber.registry[self.adapter]]
        return [adapter for adapter in transcriber.registry if adapter.domain is None]

    def _adapters_digest(self) -> list[list[str | None]]:
        """Who writes which language under whose token, and the bytes. One folder may be there for several languages."""
        adapters = self._adapters()
        files = {path: _digest_of(path) for path in {adapter.path for adapter in adapters}}
        rows = [[each.name, each.language, each.domain, each.carrier, files[each.path]] for each in adapters]
        return sorted(rows, key=json.dumps)

    def _adapters(self) -> list[LanguageAdapter]:
        from whisper_moe.pocket import ADAPTERS, MODEL
        from whisper_moe.registry import AdapterRegistry

        shipped = ADAPTERS.is_dir() and (self.model is None or Path(self.model).resolve() == MODEL.resolve())
        folders = ([ADAPTERS] if shipped else []) if self.adapters is None else [Path(folder) for folder in self.adapters]
        return [adapter for folder in folders for adapter in AdapterRegistry.from_folder(folder)]


_NO_MATTER = ("batch_size", "device", "imports")  # to what is written


def _model_digest(model: str | None) -> str:
    """Of a folder its files; of a model of the Hub its commit."""
    from whisper_moe.pocket import MODEL

    path = MODEL if model is None else Path(model)
    if path.is_dir():
        return _digest_of(path)
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(str(model), "config.json")
    except OSError as error:
        raise ValueError(f"There is no Whisper {str(model)!r}, as a folder or on the Hub: {error}") from error
    return f"{model}@{Path(str(config)).parent.name}"


def _digest_of(folder: Path) -> str:
    """Of what is in a model's or an adapter's folder; notes for people do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt"):
            digest.update(f"{path.name} {sha256_of(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- who died over what ----------------------------------------------------------------------------------------------------


class Ledger:
    """Which files are being worked on, kept outside the workers: after a worker's death it says what it died over.

    A file that is begun again without having been ended has cost a worker its life. Files that were in a dead worker's hands together are
    suspects; they are then taken one at a time, so that the innocent are soon cleared.
    """

    def __init__(self, num_workers: int) -> None:
        self._open: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._starts_in_vain, self._most_starts = 0, (1 + MAX_DEATHS) * num_workers
        self._problem: str | None = None
        self._starts: Counter[str] = Counter()

    def start(self, worker: str = "") -> str | None:
        """A worker starts, for the first time or again. Returns why it should not, if all die again and again without finishing a file."""
        self._starts[worker] += 1
        self._starts_in_vain += 1
        if self._starts_in_vain > self._most_starts:
            self.refuse(
                f"{self._starts_in_vain - 1} workers died one after another before they had finished a single file. Is there memory "
                "enough for a model in each? Try fewer workers, or one with `whisper-moe transcribe`."
            )
        return self._problem

    def refuse(self, problem: str) -> None:
        """The run cannot go on, and why."""
        self._problem = problem

    def problem(self) -> str | None:
        return self._problem

    def begin(self, file: str) -> int:
        """A worker takes a file in hand. Returns how many died over it."""
        if file in self._open:
            self._deaths[file] += 1
        self._open.add(file)
        return self._deaths[file]

    def end(self, file: str) -> None:
        """A worker is done with it."""
        self._open.discard(file)
        self._starts_in_vain = 0

    def is_suspect(self, files: Sequence[str]) -> bool:
        """Whether a worker died with one of these in its hands."""
        return any(file in self._open or self._deaths[file] for file in files)

    def num_deaths(self) -> int:
        """How many workers had to be replaced."""
        return sum(number - 1 for number in self._starts.values())


class RemoteLedger:
    """The ledger in its own process; each call waits until it is written down."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments))

    def start(self) -> str | None:
        import ray

        found: str | None = self._ask("start", ray.get_runtime_context().get_actor_id())  # it stays the same when an actor is replaced
        return found

    def refuse(self, problem: str) -> None:
        self._ask("refuse", problem)

    def problem(self) -> str | None:
        found: str | None = self._ask("problem")
        return found

    def begin(self, file: str) -> int:
        return int(self._ask("begin", file))

    def end(self, file: str) -> None:
        self._ask("end", file)

    def is_suspect(self, files: Sequence[str]) -> bool:
        return bool(self._ask("is_suspect", files))

    def num_deaths(self) -> int:
        return int(self._ask("num_deaths"))


# ---- in a worker -----------------------------------------------------------------------------------------------------------


class TranscribeActor:
    """A transcriber that Ray Data gives groups of files to. While one is written, the next is read and decoded.

    Args:
        settings: How to transcribe.
        fs: The file system that the recordings are on.
        ledger: A `Ledger`, or the way to one.
        load, check: What puts adapters on the model and looks them over.
    """

    def __init__(
        self,
        settings: BatchSettings,
        fs: Any,
        ledger: Ledger | RemoteLedger,
        load: LoadAdapter | None = None,
        check: CheckAdapter | None = None,
    ) -> None:
        self.settings, self._fs, self._ledger = settings, fs, ledger
        if (problem := ledger.start()) is not None:
            raise ValueError(problem)
        try:
            self.transcriber = settings.load(load, check)
        except Exception as error:
            ledger.refuse(str(error) if isinstance(error, (ValueError, OSError)) else f"The model cannot be loaded. {_told(error)}")
            raise

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Groups of jobs as JSON -> rows of the output as JSON, one for each job."""
        results = [result for group in batch["jobs"] for result in self.transcribe(json.loads(group))]
        return {"result": [json.dumps(result) for result in results]}

    def transcribe(self, jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For each job (a `Recording`, its language and settings) a row of the output, or `{"file", "kind", "reason"}`."""
        reads_ahead = not self._ledger.is_suspect([job["name"] for job in jobs])
        with ThreadPoolExecutor(1) as reader:
            ahead: _Reading | None = None
            for job, following in zip(jobs, [*jobs[1:], None], strict=True):
                reading = ahead or self._begin(reader, job)
                ahead = self._begin(reader, following) if reads_ahead and following is not None else None
                yield self._result(job, reading)
                self._ledger.end(job["name"])

    def _begin(self, reader: ThreadPoolExecutor, job: dict[str, Any]) -> _Reading:
        if self._ledger.begin(job["name"]) >= MAX_DEATHS:
            return _Refusal("killed its worker", f"{MAX_DEATHS} workers died over it: it may need more memory, or crash a decoder.")
        if job["size"] > LARGEST_BYTES:
            most = LARGEST_BYTES / 2**30
            return _Refusal("too large", f"It has {job['size'] / 2**30:.1f} GiB; at most {most:.0f} are read. Cut it into parts.")
        if any("\ud800" <= letter <= "\udfff" for letter in job["name"]):
            return _Refusal("refused", "Its name is not in UTF-8, so it cannot be written down. Rename it.")
        if not is_plain_name(job["name"]):
            return _Refusal("refused", "A part of its name is empty, '.' or '..', so that its texts could lie anywhere. Rename it.")
        return reader.submit(self._read, job["path"])

    def _read(self, path: str) -> tuple[str, np.ndarray]:
        """Digest of a file's bytes, and its samples (samples,) at 16 kHz."""
        data = self._fs.cat_file(path)
        return sha256_of(data), load_audio(data, max_duration_s=self.settings.max_duration_s)

    def _result(self, job: dict[str, Any], reading: _Reading) -> dict[str, Any]:
        if isinstance(reading, _Refusal):
            return {"file": job["name"], "kind": reading.kind, "reason": reading.reason}
        try:
            sha256, samples = reading.result()
            transcript = self.settings.transcribe(self.transcriber, samples, job["language"])
        except Exception as error:  # whatever it is, it is this file's fault alone, and the run goes on
            if _gpu_is_lost(self.transcriber):
                _die(f"{job['name']}: {_told(error)}")
            return {"file": job["name"], "kind": _kind(error), "reason": _told(error)}
        row = {"file": job["name"], "sha256": sha256, "settings": job["settings"], "stamp": job["stamp"], "finished_at": ""} | transcript
        return {name: row[name] for name in COLUMNS}


@dataclass(frozen=True)
class _Refusal:
    kind: Kind
    reason: str


_Reading: TypeAlias = "Future[tuple[str, np.ndarray]] | _Refusal"


def _gpu_is_lost(transcriber: Transcriber) -> bool:
    """Whether CUDA refuses this process for good, as after an illegal access or a failed assertion. Out of memory passes."""
    import torch

    if transcriber.model.device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(transcriber.model.device)  # asked, because the error that was met may be of any library on top of CUDA
    except RuntimeError:
        return True
    return False


def _die(reason: str) -> None:
    """End this process as a crash would: Ray starts another in its place, and the ledger knows over what it died."""
    print(f"The GPU is lost to this process: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _kind(error: Exception) -> Kind:
    if isinstance(error, AudioError):
        return "audio"
    if isinstance(error, OSError):
        return "unreadable"
    return "refused" if isinstance(error, ValueError) else "failed"


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AudioError) else f"{type(error).__name__}: {error}"
