"""A folder or bucket of recordings -> transcripts, on as many processes and machines as Ray has. Ray Data is the engine.

The main path is `transcribe_batch`. Workers get names of files and read them themselves, each a file ahead of the one it writes; only names
and transcripts travel. What is done stays done (`BatchOutput`), and a file that cannot be transcribed is reported and passed over, also
one that takes its worker with it. Importing this file loads neither Ray nor torch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from whisper_moe.batch_output import EVALUATION, SUMMARY, BatchOutput, FileFormat, Known, TextFormat, is_plain_name
from whisper_moe.batch_references import evaluate_transcripts, given_languages, read_references
from whisper_moe.batch_worker import BatchSettings, Ledger, RemoteLedger, TranscribeActor, sha256_of
from whisper_moe.languages import language_name

if TYPE_CHECKING:
    from whisper_moe.engine import CheckAdapter
    from whisper_moe.registry import LoadAdapter

SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".m4b", ".aac", ".webm", ".mka", ".mkv", ".mov", ".avi", ".flv"),
    *(".3gp", ".amr", ".wma", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".wv", ".tta", ".ape", ".mpg", ".mpeg"),
)
"""Files of a folder that are taken for recordings."""

_GROUP_BYTES = 64 * 2**20  # of files that one call gets together: what a worker that dies has to do again
_MOST_BLOCKS = 2000  # Ray keeps books on each
_OBJECT_STORE_BYTES = 128 * 2**20  # of a Ray of our own: what goes through it are names and transcripts

OnResult = Callable[[dict[str, Any]], None]


# ---- what is answered ------------------------------------------------------------------------------------------------------


@dataclass
class BatchSummary:
    """What became of the files, also written as `summary.json`.

    Args:
        found: Recordings in the source.
        transcribed: By this run.
        kept: Transcribed before, with the same contents and settings.
        failed: Kind of failure -> files; each is in `errors.jsonl`.
        hours: Of sound that this run transcribed.
        elapsed_s: Of this run, from start to end.
        languages: Of all files: code -> files and hours. "" stands for recordings in which nobody speaks.
        no_longer_there: Transcripts in the output whose recording is gone.
        worker_deaths: How often a worker died and was replaced.
        workers: Processes that transcribed.
        settings: Those of this run.
        evaluation: Error rates, if references were given: see `evaluate_transcripts`.
    """

    found: int
    transcribed: int
    kept: int
    failed: dict[str, int]
    hours: float
    elapsed_s: float
    languages: dict[str, dict[str, float]]
    no_longer_there: int
    worker_deaths: int
    workers: int
    settings: dict[str, Any]
    evaluation: dict[str, Any] | None = field(default=None)

    @property
    def real_time_factor(self) -> float | None:
        """Time of the run over time of the sound: below 1 is faster than speech. None if nothing was transcribed."""
        return self.elapsed_s / (3600 * self.hours) if self.hours else None

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"real_time_factor": self.real_time_factor}

    def __str__(self) -> str:
        speed = "" if self.real_time_factor is None else f", real-time factor {self.real_time_factor:.3g}"
        lines = [
            f"{self.found:,} recordings: {self.transcribed:,} transcribed, {self.kept:,} kept from before, {self.num_failed:,} failed",
            f"{self.hours:.2f} h of sound in {self.elapsed_s:.0f} s by {self.workers} workers{speed}",
        ]
        heard = [
            f"{language_name(code) if code else 'nobody speaks'}: {row['files']:,.0f} files, {row['hours']:.2f} h"
            for code, row in sorted(self.languages.items(), key=lambda item: -item[1]["hours"])
        ]
        lines += ["; ".join(heard)] if heard else []
        lines += ["failed: " + ", ".join(f"{number:,} {kind}" for kind, number in self.failed.items())] if self.failed else []
        for row in [] if self.evaluation is None else self.evaluation["languages"]:
            rates = row["rates"][self.evaluation["normalizers"][0]] if self.evaluation is not None else {}
            lines.append(f"{row['name']}: WER {_percent(rates['wer'])}, CER {_percent(rates['cer'])} on {row['files']:,} files")
        return "\n".join(lines)


def _percent(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return f"{interval['value']:.1%}"
    return f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"


# ---- the main path ---------------------------------------------------------------------------------------------------------


def transcribe_batch(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: BatchSettings | None = None,
    *,
    references: str | os.PathLike[str] | None = None,
    known_languages: bool = False,
    file_format: FileFormat = "jsonl",
    texts: Sequence[TextFormat] = (),
    trust_listing: bool = False,
    concurrency: int | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    files_per_call: int = 8,
    address: str | None = None,
    storage_options: dict[str, Any] | None = None,
    load: LoadAdapter | None = None,
    check: CheckAdapter | None = None,
    on_result: OnResult | None = None,
) -> BatchSummary:
    """Transcribe all recordings of a folder or bucket, except those that are done already.

    Args:
        source: A folder or an address that fsspec knows (`s3://bucket/folder`), searched to its depth. Every machine must reach it.
        out: Folder or address for the transcripts. A second run there goes on where the first one ended.
        settings: How to transcribe.
        references: A CSV, TSV or JSONL file with the recordings' names (from `source`) and what is said: error rates are measured.
        known_languages: Take each recording's language from the references' column instead of detecting it.
        file_format: "jsonl" or "parquet", of the transcripts.
        texts: "txt" and "srt": also a file of each recording's own.
        trust_listing: A file whose size and time of change (or tag) are as before counts as unchanged without being read. Otherwise its
            contents are compared, which reads all that is done already once more.
        concurrency: Workers, each with its own model. Default: as many as the cluster has GPUs, or else processors, for.
        num_cpus: Processors that each worker takes, where it takes no GPU.
        num_gpus: GPUs that each worker takes; a fraction shares one. Default: 1 if the cluster has any.
        files_per_call: Recordings that a worker gets at a time, fewer if they are large. A worker that dies does these again.
        address: Of a Ray cluster ("auto", "ray://host:10001"). Default: the one that this process is in, that of RAY_ADDRESS, or else a
            Ray of our own on this machine, which ends with the run.
        storage_options: For fsspec.
        load, check: What puts adapters on the model in each worker and what looks them over, as for `Transcriber.from_pretrained`;
            `hub_utils.load_adapter` and `check_adapter` for adapters of strangers. Pickled: functions of a module that every machine has.
        on_result: Called with every finished file: its row of the output, or `{"file", "kind", "reason"}`.

    Raises:
        ValueError: Ray is missing, there are no recordings, or the settings cannot work. No recording has been touched then.
        OSError: The output cannot be written. What was written stays.
    """
    started = time.monotonic()
    settings = BatchSettings() if settings is None else settings
    _check_numbers(concurrency, num_cpus, num_gpus, files_per_call)
    ray = _import_ray()
    store = _store(source, storage_options)
    recordings = list_recordings(*store)
    table = {} if references is None else read_references(references, recordings)
    languages = given_languages(table) if known_languages else {}
    digest = settings.digest()
    run = _Run()
    with BatchOutput(out, file_format, texts, storage_options=storage_options) as output, _cluster(ray, address):
        done = {name for name, each in recordings.items() if _is_known(each, output.known.get(name), digest, languages, trust_listing)}
        if done and not trust_listing:
            done = _unchanged(ray, store[0], [recordings[name] for name in done], output)
        jobs = [each.job(languages.get(name), digest) for name, each in recordings.items() if name not in done]
        if jobs:
            workers = _workers(ray, settings, concurrency, num_cpus, num_gpus)
            for result in _results(ray, store[0], jobs, settings, workers, files_per_call, load, check, run):
                run.take(result, output)
                if on_result is not None:
                    on_result(result)
        output.tidy()
        output.write_texts(done)
        summary = BatchSummary(
            found=len(recordings),
            transcribed=run.transcribed,
            kept=len(done),
            failed=dict(Counter(error["kind"] for error in output.errors)),
            hours=round(run.seconds / 3600, 4),
            elapsed_s=round(time.monotonic() - started, 2),
            languages=_by_language(output, recordings),
            no_longer_there=len(output.known.keys() - recordings.keys()),
            worker_deaths=run.deaths,
            workers=run.workers,
            settings=asdict(settings) | {"digest": digest, "known_languages": known_languages},
            evaluation=evaluate_transcripts(output.rows(), table) if table else None,
        )
        if summary.evaluation is not None:
            output.write_json(EVALUATION, summary.evaluation)
        output.write_json(SUMMARY, summary.to_dict())
    return summary


@dataclass
class _Run:
    """What is counted on the way."""

    transcribed: int = 0
    seconds: float = 0.0
    workers: int = 0
    deaths: int = 0

    def take(self, result: dict[str, Any], output: BatchOutput) -> None:
        if "kind" in result:
            output.fail(result["file"].encode(errors="backslashreplace").decode(), result["kind"], result["reason"])
            return
        result["finished_at"] = datetime.now(timezone.utc).isoformat(timespec="microseconds")  # by one clock, that of the writer
        output.add(result)
        self.transcribed += 1
        self.seconds += result["duration_s"]


def _check_numbers(concurrency: int | None, num_cpus: float, num_gpus: float | None, files_per_call: int) -> None:
    if (concurrency is not None and concurrency < 1) or files_per_call < 1:
        raise ValueError(f"concurrency and files_per_call are at least 1; got {concurrency} and {files_per_call}.")
    if num_cpus <= 0 or (num_gpus is not None and num_gpus < 0):
        raise ValueError(f"A worker takes some part of a processor, and no less than no GPU; got {num_cpus} and {num_gpus}.")


# ---- what there is to do ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A file of the source, as the listing has it.

    Args:
        name: Its path from the source, with slashes, letter for letter: in an object store `a/b.wav` and `a//b.wav` are two.
        path: Its path on the file system.
        size: In bytes.
        stamp: Size and time of change, or the tag that an object store gives its contents.
    """

    name: str
    path: str
    size: int
    stamp: str

    def job(self, language: str | None, digest: str) -> dict[str, Any]:
        return asdict(self) | {"language": language, "settings": _settings_of(digest, language)}


def _store(source: str | os.PathLike[str], storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    """The file system of an address, and the folder on it."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(os.fspath(source), **(storage_options or {}))
    return fs, root


def list_recordings(fs: Any, root: str) -> dict[str, Recording]:
    """The recordings below a folder by their names, the largest first: what takes longest should not begin last.

    Raises:
        ValueError: There is no such folder, or no recording in it.
    """
    if not fs.isdir(root):
        raise ValueError(f"{root} is no folder with recordings. For single files there is `whisper-moe transcribe`.")
    found = [
        Recording(path.removeprefix(root.rstrip("/")).removeprefix("/"), path, int(info.get("size") or 0), _stamp(info))
        for path, info in fs.find(root, detail=True).items()
        if path.lower().endswith(SUFFIXES)
    ]
    if not found:
        raise ValueError(f"There is no recording in {root}. Looked for names that end in {', '.join(SUFFIXES)}.")
    return {each.name: each for each in sorted(found, key=lambda each: (-each.size, each.name))}


def _stamp(info: dict[str, Any]) -> str:
    """What changes when a file does: the store's own tag where it gives one, else the time."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated"):
        if info.get(key) is not None:
            return f"{info.get('size')} {info[key]}"
    return ""


def _settings_of(digest: str, language: str | None) -> str:
    return digest if language is None else f"{digest}-{language}"


def _is_known(recording: Recording, known: Known | None, digest: str, languages: dict[str, str], trust_listing: bool) -> bool:
    """Whether the output has it under these settings, as far as can be told without reading it."""
    if known is None or not is_plain_name(recording.name) or known.settings != _settings_of(digest, languages.get(recording.name)):
        return False
    return not trust_listing or (recording.stamp != "" and recording.stamp == known.stamp)


def _unchanged(ray: Any, fs: Any, recordings: Sequence[Recording], output: BatchOutput) -> set[str]:
    """The names of those whose contents are what they were when they were transcribed. Ray's tasks read them, wherever there is room."""
    rows = [{"name": each.name, "path": each.path, "sha256": output.known[each.name].sha256} for each in recordings]
    checked = ray.data.from_items(rows, override_num_blocks=min(len(rows), 200)).map(_compare_contents, fn_kwargs={"fs": fs})
    return {row["name"] for row in checked.iter_rows() if row["same"]}


def _compare_contents(row: dict[str, Any], fs: Any) -> dict[str, Any]:
    try:
        same = sha256_of(fs.cat_file(row["path"])) == row["sha256"]
    except OSError:
        same = False  # a worker will say what is wrong with it
    return {"name": row["name"], "same": same}


# ---- on Ray ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Workers:
    number: int
    cpus: float
    gpus: float


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            'Transcribing in batches runs on Ray: pip install "peft-s2lora[ray]". Some files on one machine need none of it: '
            "`whisper-moe transcribe FILE ...`."
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Ray, joined or started, with its own talk turned down; left as it was found."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    ours = not ray.is_initialized()
    if ours:
        _start(ray, os.environ.get("RAY_ADDRESS") if address is None else address)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if ours:
            ray.shutdown()


def _start(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"address": address}
    if not address:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unless somebody wants it
        options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise ValueError(f"No Ray cluster answers at {address!r}. `ray start --head` starts one. ({error})") from error


def _workers(ray: Any, settings: BatchSettings, concurrency: int | None, num_cpus: float, num_gpus: float | None) -> _Workers:
    """How many workers there will be and what each takes; refused if the cluster has not got it, as Ray would wait for ever."""
    there = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = 1 if there.get("GPU") and settings.device in ("auto", "cuda") else 0
    what, each = ("GPU", num_gpus) if num_gpus else ("CPU", num_cpus)
    room = math.floor(there.get(what, 0) / each + 1e-9)
    if room < (concurrency or 1):
        raise ValueError(
            f"{concurrency or 1} workers of {each:g} {what} are asked for; the cluster has {there.get(what, 0):g} {what}. "
            f"Lower concurrency, or what each takes (num_{what.lower()}s)."
        )
    return _Workers(room if concurrency is None else concurrency, num_cpus, num_gpus)


def _results(
    ray: Any,
    fs: Any,
    jobs: Sequence[dict[str, Any]],
    settings: BatchSettings,
    workers: _Workers,
    files_per_call: int,
    load: LoadAdapter | None,
    check: CheckAdapter | None,
    run: _Run,
) -> Iterator[dict[str, Any]]:
    """A row of the output for each job, or what was wrong with it, as they come."""
    groups = list(_groups(jobs, files_per_call))
    run.workers = min(workers.number, len(groups))
    ledger = RemoteLedger(ray.remote(num_cpus=0)(Ledger).remote(run.workers))
    takes = {"num_gpus": workers.gpus} if workers.gpus else {"num_cpus": workers.cpus}
    dataset = ray.data.from_items([{"jobs": json.dumps(group)} for group in groups], override_num_blocks=min(len(groups), _MOST_BLOCKS))
    # Ray Data starts an actor that died again and gives it the same group, as often as it takes.
    transcribed = dataset.map_batches(
        TranscribeActor,
        batch_size=1,  # a group: its size is decided above, by files and bytes
        compute=ray.data.ActorPoolStrategy(size=run.workers),
        fn_constructor_kwargs={"settings": settings, "fs": fs, "ledger": ledger, "load": load, "check": check},
        **takes,
    )
    try:
        for row in transcribed.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayError as error:
        if (problem := ledger.problem()) is not None:
            raise ValueError(problem) from error
        raise
    run.deaths = ledger.num_deaths()


def _groups(jobs: Sequence[dict[str, Any]], files_per_call: int) -> Iterator[list[dict[str, Any]]]:
    """Jobs that a worker gets together."""
    group: list[dict[str, Any]] = []
    size = 0
    for job in jobs:
        if group and (len(group) == files_per_call or size + job["size"] > _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(job)
        size += job["size"]
    if group:
        yield group


def _by_language(output: BatchOutput, recordings: dict[str, Recording]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, known in output.known.items():
        if name in recordings:
            row = found.setdefault(known.language or "", {"files": 0, "hours": 0.0})
            row["files"] += 1
            row["hours"] = round(row["hours"] + known.duration_s / 3600, 6)
    return found
