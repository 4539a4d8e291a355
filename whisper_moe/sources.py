"""Where clips come from: the Hub, parquet, CSV, TSV or JSONL files, folders with `metadata.csv`, unpacked Common Voice.

`open_rows` looks at a source, decides what it is, and returns its rows: `{"audio", "text", "language", "speaker"}`, the audio still
encoded or a path. Decodes nothing, filters nothing. Column names are guessed; a wrong guess ends in an error that lists those there are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from whisper_moe.languages import language_code, language_name

# What data sets call their columns, in order of preference.
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription")
AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath", "audio_path", "audio_file", "file", "filename", "wav", "clip")
LANGUAGE_COLUMNS = ("language", "locale", "lang")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
SPLIT_NAMES = {  # what a split is called elsewhere
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test", "testing"),
}
HOLD_OUT = {"test": 0.2, "dev": 0.1}
"""Shares of a folder without splits that are kept away from training."""

NO_JSON_OBJECT, IN_NO_SPLIT = "on a line that is no JSON object", "with an empty cell for the split"
PROBLEMS = (NO_JSON_OBJECT, IN_NO_SPLIT)
"""What may be wrong with a line of a table; phrases, so that a report can be read aloud."""

PARQUET_BRANCH = "refs/convert/parquet"  # the Hub's own conversion of data sets that are still a script
FLEURS = "google/fleurs"
LIBRISPEECH = "facebook/multilingual_librispeech"
FLEURS_LOCALES = re.findall(
    r"\w+",
    """
af_za am_et ar_eg as_in ast_es az_az be_by bg_bg bn_in bs_ba ca_es ceb_ph ckb_iq cmn_hans_cn cs_cz cy_gb da_dk de_de el_gr en_us es_419
et_ee fa_ir ff_sn fi_fi fil_ph fr_fr ga_ie gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id ig_ng is_is it_it ja_jp jv_id ka_ge
kam_ke kea_cv kk_kz km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la lt_lt luo_ke lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm
nb_no ne_np nl_nl nso_za ny_mw oc_fr om_et or_in pa_in pl_pl ps_af pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke
ta_in te_in tg_tj th_th tr_tr uk_ua umb_ao ur_pk uz_uz vi_vn wo_sn xh_za yo_ng yue_hant_hk zu_za
""",
)
LIBRISPEECH_LANGUAGES = ("nl", "fr", "de", "it", "pl", "pt", "es")

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?")

Row = Mapping[str, Any]
Loader = Callable[..., Any]
"""`datasets.load_dataset`, or something that answers as it does."""


class Rows(Protocol):
    """Rows of one split. `read` may be called again, and gives every `num_shards`-th row, beginning at `shard`."""

    @property
    def name(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None: there is none."""

    audio: str
    text: str
    language: str | None = None
    speaker: str | None = None

    @classmethod
    def guess(cls, columns: Sequence[str], where: str, text: str | None = None, audio: str | None = None) -> Columns:
        """The first column of each list that is there. `text` and `audio` name them instead.

        Raises:
            ValueError: No such column; the message lists those there are.
        """
        found_text = _pick(columns, (text,) if text else TEXT_COLUMNS, "the transcript", "text_column", where)
        return cls(
            _pick(columns, (audio,) if audio else AUDIO_COLUMNS, "the recordings", "audio_column", where),
            found_text,
            next((name for name in LANGUAGE_COLUMNS if name in columns), None),
            next((name for name in SPEAKER_COLUMNS if name in columns), None),
        )

    @property
    def names(self) -> list[str]:
        return [name for name in (self.audio, self.text, self.language, self.speaker) if name is not None]

    def row(self, values: Row) -> dict[str, Any]:
        """A row under our names."""
        return {
            "audio": values.get(self.audio),
            "text": values.get(self.text),
            "language": values.get(self.language) if self.language else None,
            "speaker": _named(values.get(self.speaker)) if self.speaker else None,
        }


def _named(speaker: Any) -> Any:
    """An empty cell names nobody: clips without a speaker are not those of one."""
    return None if isinstance(speaker, str) and not speaker.strip() else speaker


def _pick(columns: Sequence[str], candidates: Sequence[str], what: str, option: str, where: str) -> str:
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(
        f"{where} has no column {' or '.join(candidates)} for {what}. Its columns: {', '.join(map(str, columns)) or '(none)'}. "
        f"Name the right one with {option}=..."
    )


# ---- the door --------------------------------------------------------------------------------------------------------------


def open_rows(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    language: str | None = None,
    streaming: bool = False,
    load_dataset: Loader | None = None,
) -> Rows:
    """Find the rows of a source.

    Args:
        source: a parquet, CSV, TSV or JSONL file; a glob of parquet files; a folder of such files, with `metadata.csv` (or `.jsonl`),
            or of an unpacked Common Voice; or a data set of the Hub as `owner/name` or `owner/name:config`.
        split: which split; a file has none. A folder without splits is divided by transcript or speaker, see `HOLD_OUT`.
        config: of a Hub data set; for FLEURS and Multilingual LibriSpeech it follows from the language.
        text_column, audio_column: names of columns, where guessing fails.
        language: the language that is wanted, for the config.
        streaming: read a Hub data set while it is downloaded.
        load_dataset: for tests; by default that of the `datasets` package.

    Raises:
        ValueError: Nothing usable is there. The message says what was looked for, and what is there.
    """
    path = Path(source)
    asked = (text_column, audio_column)
    if path.is_file():
        if path.suffix in TABLE_SUFFIXES:
            return _table(path, path.parent, *asked)
        return ParquetRows([path], f"{path.parent.name}/{path.stem}", *asked)
    if path.is_dir():
        return _folder(path, split, *asked)
    if found := sorted(Path(match) for match in glob(str(source))):
        return ParquetRows(found, f"{path.name}/{split or 'all'}", *asked)
    match = _HUB_ID.fullmatch(str(source))
    if match is None or path.suffix in (*TABLE_SUFFIXES, ".parquet"):
        raise ValueError(
            f"There is nothing at {source}. Expected a .parquet, .csv, .tsv or .jsonl file, a glob such as 'data/train-*.parquet', a "
            "folder with <split>.parquet or metadata.csv, or a data set of the Hub as 'owner/name' or 'owner/name:config'."
        )
    if split is None:
        raise ValueError(
            f"{source} is no file or folder. As a data set of the Hub it needs a split: split='train'. Or download it first: "
            f"`hf download --repo-type dataset {match['id']} --local-dir DIR`."
        )
    config = config if match["config"] is None else match["config"]
    config = known_config(match["id"], language) if config is None else config
    return HubRows(match["id"], config, split, *asked, streaming=streaming, load_dataset=load_dataset)


def known_config(dataset: str, language: str | None) -> str | None:
    """The config of a language in data sets whose configs are known here; None for others."""
    if dataset not in (FLEURS, LIBRISPEECH):
        return None
    if dataset == FLEURS:
        configs = {language_code(locale): locale for locale in FLEURS_LOCALES}
    else:
        configs = {code: language_name(code).lower() for code in LIBRISPEECH_LANGUAGES}
    code = None if language is None else language_code(language)
    if code not in configs:
        said = "No language was given" if code is None else f"It has no {language_name(code)} ({code})"
        raise ValueError(f"{dataset} needs one of its configs. {said}. It has: {', '.join(configs.values())}.")
    return configs[code]


def _folder(folder: Path, split: str | None, text_column: str | None, audio_column: str | None) -> Rows:
    """The split of a folder, in any of the known layouts."""
    asked = (text_column, audio_column)
    parquet: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        parquet.setdefault(path.stem.split("-")[0], []).append(path)
    if parquet:
        paths = parquet[_split_name(split, list(parquet), folder)]
        name = f"{paths[0].parent.name}/{paths[0].stem}" if len(paths) == 1 else f"{folder.name}/{split or 'all'}"
        return ParquetRows(paths, name, *asked)
    voices = {path.stem: path for path in sorted(folder.glob("*.tsv"))}
    if (folder / "clips").is_dir() and voices:
        return _table(voices[_split_name(split, list(voices), folder)], folder / "clips", *asked)
    for name in METADATA:
        if (folder / name).is_file():
            return _metadata(folder / name, split, *asked)
    tables = {path.parent.name: path for name in METADATA for path in sorted(folder.glob(f"*/{name}"))}
    tables |= {path.stem: path for suffix in TABLE_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))}
    if tables:
        table = tables[_split_name(split, list(tables), folder)]
        return _table(table, table.parent, *asked)
    held = ", ".join(sorted(path.name for path in islice(folder.iterdir(), 8))) or "nothing"
    raise ValueError(
        f"{folder} has no data set in it: no <split>.parquet, no {', '.join(METADATA)}, no <split>.csv, and no clips/ with a .tsv as "
        f"Common Voice has them. It holds: {held}."
    )


def split_names(split: str) -> tuple[str, ...]:
    """What a split may be called, the name itself first: "dev" is "validation" elsewhere."""
    known = next((names for names in SPLIT_NAMES.values() if split in names), ())
    return tuple(dict.fromkeys((split, *known)))


def _split_name(split: str | None, there: Sequence[str], where: str | Path) -> str:
    """The split under the name it has there."""
    if split is None and len(there) == 1:
        return there[0]
    if split is not None:
        for name in split_names(split):
            if name in there:
                return name
    asked = "name one with split=..." if split is None else f"there is no '{split}'"
    raise ValueError(f"{where} has the splits {', '.join(there) or '(none)'}; {asked}.")


# ---- parquet ---------------------------------------------------------------------------------------------------------------


class ParquetRows:
    """Parquet files, read a batch at a time. Relative audio paths start at their file."""

    def __init__(self, paths: Sequence[Path], name: str, text_column: str | None = None, audio_column: str | None = None) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ValueError('Parquet files need pyarrow: pip install "peft-s2lora[train]".') from error
        self.paths, self.name = list(paths), name
        self.notes: tuple[str, ...] = ()
        try:
            headers = [parquet.read_schema(path).names for path in self.paths]
            self.num_rows = sum(parquet.read_metadata(path).num_rows for path in self.paths)
        except pyarrow.ArrowException as error:
            raise ValueError(f"Not a parquet file among {', '.join(map(str, self.paths))}: {error}") from error
        self.columns = [Columns.guess(names, str(path), text_column, audio_column) for path, names in zip(self.paths, headers, strict=True)]

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Row]:
        import pyarrow.parquet as parquet

        number = 0
        for path, columns in zip(self.paths, self.columns, strict=True):
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=columns.names):
                # Only this shard's rows become Python objects: the audio of the others would cost as much.
                ours = [at for at in range(len(batch)) if (number + at) % num_shards == shard]
                number += len(batch)
                for values in (batch if num_shards == 1 else batch.take(ours)).to_pylist():
                    row = columns.row(values)
                    yield row | {"audio": _beside(path.parent, row["audio"])}


def _beside(folder: Path, audio: Any) -> Any:
    """Audio that is only a path, as a path from `folder`; of a Hub-style struct the bytes are kept where there are some."""
    if isinstance(audio, Mapping):
        if audio.get("array") is not None or audio.get("bytes") is not None:
            return audio
        audio = audio.get("path")
    return folder / audio if isinstance(audio, str) and audio else audio


# ---- tables ----------------------------------------------------------------------------------------------------------------


@dataclass
class TableRows:
    """Rows of a text file, whose audio lies in files beside it."""

    name: str
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Row]:
        yield from self.rows[shard::num_shards]


def _table(path: Path, audio_folder: Path, text_column: str | None, audio_column: str | None) -> TableRows:
    return TableRows(f"{path.parent.name}/{path.stem}", [row for row, _ in _table_rows(path, audio_folder, text_column, audio_column)])


def _metadata(path: Path, split: str | None, text_column: str | None, audio_column: str | None) -> TableRows:
    """One table for all splits: told apart by its column `split`, or else divided here."""
    both = _table_rows(path, path.parent, text_column, audio_column)
    name = path.parent.name
    # Lines that cannot be read are in no part. They stand in the train part, so that whoever trains is told of them, once.
    whole = [(row, values) for row, values in both if "problem" not in row]
    problems = [row for row, _ in both if "problem" in row]
    if any("split" in values for _, values in whole):
        of_row = [str(values.get("split") or "").strip() for _, values in whole]
        there = list(dict.fromkeys(part for part in of_row if part))
        wanted = _split_name(split, there, path)
        problems += [{"problem": IN_NO_SPLIT}] * of_row.count("")
        train = next((part for part in split_names("train") if part in there), wanted)
        rows = [row for (row, _), part in zip(whole, of_row, strict=True) if part == wanted]
        return TableRows(f"{name}/{wanted}", rows + (problems if wanted == train else []))
    rows = [row for row, _ in whole]
    if split is None:
        return TableRows(name, rows + problems)
    wanted = next((ours for ours, theirs in SPLIT_NAMES.items() if split in theirs), split)
    parts, by = hold_out(rows)
    sizes = ", ".join(f"{len(part)} {part_name}" for part_name, part in parts.items())
    parts["train"] += problems
    if wanted not in parts:
        raise ValueError(f"{path} is not split; what is drawn from it here: {', '.join(parts)}. There is no '{split}'.")
    return TableRows(f"{name}/{wanted}", parts[wanted], (f"{path.name} is not split; divided by {by} here: {sizes}",))


def hold_out(rows: Sequence[Row]) -> tuple[dict[str, list[Any]], str]:
    """Divide rows into train, dev and test, the same way each time. Returns the parts and what they were divided by.

    Speakers stay together where five or more are named, so that test speakers are unheard; otherwise equal transcripts do.

    Raises:
        ValueError: Fewer than three different speakers or transcripts.
    """
    speakers = {row["speaker"] for row in rows}
    by = "speaker" if len(speakers) >= 5 and None not in speakers else "transcript"
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["speaker" if by == "speaker" else "text"]), []).append(row)
    if len(groups) < len(HOLD_OUT) + 1:
        raise ValueError(
            f"{len(groups)} different {by}s cannot be divided into train, dev and test. Add clips, or make the splits yourself: "
            "a column 'split', or one file each."
        )
    order = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
    parts: dict[str, list[Any]] = {"train": [], "dev": [], "test": []}
    for part, share in HOLD_OUT.items():
        while order and len(parts[part]) < max(1, round(share * len(rows))) and len(order) > 1:
            parts[part] += groups[order.pop()]
    for group in order:
        parts["train"] += groups[group]
    for rows_of_part in parts.values():
        rows_of_part.sort(key=lambda row: str(row["audio"]))
    return parts, by


def _table_rows(
    path: Path, audio_folder: Path, text_column: str | None, audio_column: str | None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(row under our names, all of its values). A line that cannot be read is a row with a `problem`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            values = list(_json_lines(file) if path.suffix == ".jsonl" else _csv_lines(file, path.suffix))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: {error}.") from error
    names = list(dict.fromkeys(name for row in values if "problem" not in row for name in row))
    columns = Columns.guess(names, str(path), text_column, audio_column)
    read = []
    for row in values:
        ours = row if "problem" in row else columns.row(row)
        read.append((ours if "problem" in row else ours | {"audio": _beside(audio_folder, ours["audio"])}, row))
    return read


def _csv_lines(file: Any, suffix: str) -> Iterator[dict[str, Any]]:
    header = file.readline()
    file.seek(0)
    csv.field_size_limit(1 << 24)
    if suffix == ".tsv":  # Common Voice's: quotes are part of the sentence
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(file, delimiter=max(",;\t|", key=header.count))
    for row in reader:
        yield {name.strip(): value for name, value in row.items() if name}


def _json_lines(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in file:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else {"problem": NO_JSON_OBJECT}


# ---- the Hub ---------------------------------------------------------------------------------------------------------------


@dataclass
class HubRows:
    """A split of a data set of the Hub, streamed or downloaded as a whole; loaded when it is first read."""

    dataset: str
    config: str | None
    split: str | None
    text_column: str | None = None
    audio_column: str | None = None
    streaming: bool = False
    load_dataset: Loader | None = None
    retries: int = 4
    """Attempts after a fault of the network, each after twice the pause."""
    pause_s: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    notes: tuple[str, ...] = ()
    _loaded: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.dataset, self.config) if part) + (f"/{self.split}" if self.split else "")

    @property
    def num_rows(self) -> int | None:
        return None if self.streaming else len(self.loaded())

    def loaded(self) -> Any:
        """The data set, its audio encoded."""
        if self._loaded is None:
            self._loaded = self._undecoded(self._load())
        return self._loaded

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Row]:
        dataset = self.loaded()
        names = list(getattr(dataset, "column_names", None) or next(iter(dataset)))
        columns = Columns.guess(names, self.name, self.text_column, self.audio_column)
        if self.config is not None:  # it has chosen the language already; the column may say it in words nobody else uses
            columns = Columns(columns.audio, columns.text, None, columns.speaker)
        if _shards_itself(dataset):  # among the workers of this process; which of several processes this is, it does not know
            num_workers = _num_workers()
            shard, num_shards = shard // num_workers, max(1, num_shards // num_workers)
        for number, values in enumerate(self._steadily(dataset)):
            if number % num_shards == shard % num_shards:
                yield columns.row(values)

    def _steadily(self, dataset: Any) -> Iterator[Row]:
        """All rows; after a fault of the network the stream is opened again where it broke off."""
        done = faults = 0
        while True:
            try:
                quick = done and hasattr(dataset, "skip") and not _shards_itself(dataset)
                rest = dataset.skip(done) if quick else islice(iter(dataset), done, None)
                for values in rest:
                    yield values
                    done, faults = done + 1, 0
                return
            except Exception as error:  # noqa: PERF203, trying again is the point
                faults += 1
                if not is_network_fault(error):
                    raise
                if faults > self.retries:
                    raise ConnectionError(
                        f"{self.name} broke off after {done:,} rows, and {self.retries} more attempts failed: {error}. "
                        "Run it again when the network is back; files that were downloaded whole are kept in the cache."
                    ) from error
                self.sleep(self.pause_s * 2 ** (faults - 1))

    def _load(self) -> Any:
        load = _load_dataset() if self.load_dataset is None else self.load_dataset
        assert self.split is not None, "open_rows has asked for one"
        attempts: list[dict[str, Any]] = [{"name": self.config}, {"name": self.config, "revision": PARQUET_BRANCH}]
        if self.config is not None:  # on that branch a config is a folder, and is not always known by name
            attempts.append({"data_dir": self.config, "revision": PARQUET_BRANCH})
        problem: Exception | None = None
        for options in attempts:
            try:
                return self._load_split(load, options)
            except (RuntimeError, ValueError) as error:  # noqa: PERF203
                on_branch = "revision" in options
                missing_config = on_branch and "name" in options and "BuilderConfig" in str(error)
                if not missing_config and (on_branch or "scripts are no longer supported" not in str(error)):
                    raise ValueError(f"{self.name} cannot be loaded: {error}") from error
                problem = error
        raise ValueError(f"{self.name} cannot be loaded, not from the branch {PARQUET_BRANCH} either: {problem}") from problem

    def _load_split(self, load: Loader, options: dict[str, Any]) -> Any:
        """Try the names the split may have, each with retries."""
        assert self.split is not None
        problem: Exception | None = None
        for split in split_names(self.split):
            try:
                return self._retried(partial(load, self.dataset, split=split, streaming=self.streaming, **options))
            except ValueError as error:  # noqa: PERF203
                if "split" not in str(error).lower():
                    raise
                problem = problem or error
        assert problem is not None
        raise problem

    def _retried(self, load: Callable[[], Any]) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return load()
            except Exception as error:  # noqa: PERF203
                if isinstance(error, FileNotFoundError):  # also a data set that does not exist
                    raise ValueError(f"{error} Or is it a path? There is no such file or folder.") from error
                if attempt == self.retries or not is_network_fault(error):
                    raise
                self.sleep(self.pause_s * 2**attempt)
        raise AssertionError("unreachable")

    def _undecoded(self, dataset: Any) -> Any:
        """Audio as bytes: decoding is ours, and `datasets` would want torchcodec for it."""
        features = getattr(dataset, "features", None) or {}
        for name, feature in features.items():
            if type(feature).__name__ == "Audio":
                from datasets import Audio

                dataset = dataset.cast_column(name, Audio(decode=False))
        return dataset


def _shards_itself(dataset: Any) -> bool:
    """Streams of `datasets` give each worker process of a DataLoader its own part without being asked."""
    from torch.utils.data import IterableDataset, get_worker_info

    return isinstance(dataset, IterableDataset) and get_worker_info() is not None


def _num_workers() -> int:
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return 1 if worker is None else worker.num_workers


def _load_dataset() -> Loader:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError('Data sets of the Hub need the datasets package: pip install "peft-s2lora[train]".') from error
    loader: Loader = load_dataset
    return loader


def is_network_fault(error: BaseException) -> bool:
    """Whether trying again may help: the connection failed, or the server did. A missing data set or a bad file is not."""
    if isinstance(error, FileNotFoundError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3", "aiohttp")


# ---- drawing ---------------------------------------------------------------------------------------------------------------


def drawn(rows: Rows, limit: int | None, seed: int) -> Iterator[Row]:
    """All rows, or `limit` of them: drawn by `seed` where their number is known, the first ones of a stream."""
    total = getattr(rows, "num_rows", None)
    if limit is None or (total is not None and limit >= total):
        yield from rows.read()
    elif total is None:
        yield from islice(rows.read(), limit)
    else:
        chosen = set(np.random.default_rng(seed).permutation(total)[:limit].tolist())
        yield from (row for number, row in enumerate(rows.read()) if number in chosen)
