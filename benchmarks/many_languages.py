"""A table of 1,000 languages beside PEFT: loading, switching, adding and dropping, and bytes.

    python -m benchmarks.many_languages
    python -m benchmarks.many_languages --model tiny --languages 100 --peft-loaded 3 --rounds 2      to try it out

Whisper with random weights of the published sizes, one thread. Every language is a folder as PEFT writes it: coefficients on one S2 pool of
rank 32 for the table, a LoRA of rank 32 on the same weights for PEFT. Folders are read once before, so that the disk's cache is warm for
both. Switching is all that must be done before the model may be called: `with table.rows(...)`, or PEFT's `set_adapter`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import RESULTS, provenance, table, use_threads, write_results
from benchmarks.s2lora import Sizes, whisper

if TYPE_CHECKING:
    from torch import nn

MODELS = {
    "tiny": Sizes(d_model=384, layers=4, heads=6, ffn_dim=1536),
    "small": Sizes(d_model=768, layers=12, heads=12, ffn_dim=3072),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
RANK = 32


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: Literal["tiny", "small"] = "small"
    languages: int = 1000
    peft_loaded: int = 10
    """Adapters that PEFT has loaded when its switching is timed; its loading is quadratic in them."""
    rounds: int = 5
    threads: int = 1
    out: Path = RESULTS
    """Folder for the JSON."""


def make_folders(base: nn.Module, root: Path, languages: int) -> None:
    """root/pool, root/x0 ... and root/lora."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from peft_s2lora import S2LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT and transformers say to each other
        pooled = get_peft_model(base, S2LoraConfig(r=RANK, target_modules=TARGETS, init_weights=False), adapter_name="pool")
        pooled.add_adapter("x0", S2LoraConfig(pool="pool", init_weights=False))
        pooled.save_pretrained(str(root), save_embedding_layers=False)
        bare = pooled.unload()
        lora = get_peft_model(bare, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False))
        lora.save_pretrained(str(root / "lora"), save_embedding_layers=False)
        lora.unload()
    tensors = load_file(root / "x0" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for number in range(1, languages):
        folder = root / f"x{number}"
        folder.mkdir()
        shutil.copy(root / "x0" / "adapter_config.json", folder)
        drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_table(base: nn.Module, root: Path, settings: Settings) -> dict[str, Any]:
    """Loading, switching, adding and dropping of the table, and its bytes."""
    from whisper_moe import LanguageTable

    names = [f"x{number}" for number in range(settings.languages)]
    load_many, load_file, switches = list[float](), list[float](), dict[int, list[float]]()
    for _ in range(settings.rounds):
        languages = LanguageTable.attach(base)
        load_many.append(seconds_of(lambda: languages.add_pool(root / "pool")))  # noqa: B023, used at once
        load_many[-1] += seconds_of(lambda: languages.load_many({name: root / name for name in names}))  # noqa: B023
        languages.save(root / "table.safetensors")
        languages.detach()
        load_file.append(seconds_of(lambda: LanguageTable.load(root / "table.safetensors", base).detach()))
    for count in sorted({1, 10, 100, settings.languages} & set(range(settings.languages + 1))):
        languages = LanguageTable.attach(base)
        languages.add_pool(root / "pool")
        languages.load_many({name: root / name for name in names[:count]})
        switches[count] = [seconds_of(lambda: use(languages, [names[i % count]])) for i in range(50)]  # noqa: B023
        languages.detach()
    languages = LanguageTable.attach(base)
    languages.add_pool(root / "pool")
    languages.load_many({name: root / name for name in names})
    batch = [seconds_of(lambda: use(languages, names[:8])) for _ in range(50)]
    drops = [seconds_of(lambda: languages.drop(name)) for name in names[:50]]  # noqa: B023
    adds = [seconds_of(lambda: languages.add(name, root / name)) for name in names[:50]]  # noqa: B023
    nbytes = {"one_language": languages.nbytes("x0"), "everything": languages.nbytes()}
    languages.detach()
    return {
        "load_folders_s": load_many,
        "load_one_file_s": load_file,
        "switch_s": {str(count): median(each) for count, each in switches.items()},
        "switch_8_rows_s": median(batch),
        "drop_s": median(drops),
        "add_from_folder_s": median(adds),
        "nbytes": nbytes,
    }


def use(languages: Any, names: list[str]) -> None:
    with languages.rows(names):
        pass


def measure_peft(base: nn.Module, root: Path, settings: Settings) -> dict[str, Any]:
    """Loading of one adapter into a model that has none yet, of further ones, and switching."""
    from peft import PeftModel
    from safetensors import safe_open

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(base, str(root / "lora"), adapter_name="x0")
        loads = [
            seconds_of(lambda: model.load_adapter(str(root / "lora"), f"x{number}"))  # noqa: B023
            for number in range(1, settings.peft_loaded)
        ]
        switches = [seconds_of(lambda: model.set_adapter(f"x{number % settings.peft_loaded}")) for number in range(10)]  # noqa: B023
    with safe_open(root / "lora" / "adapter_model.safetensors", framework="pt") as file:
        nbytes = sum(4 * file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    model.unload()
    return {"load_adapter_s": loads, "first_load_adapter_s": loads[0], "switch_s": median(switches), "nbytes": {"one_language": nbytes}}


def as_table(results: dict[str, Any]) -> str:
    """What was measured, the table beside PEFT."""
    ours, peft, settings = results["table"], results["peft"], results["settings"]
    count = settings["languages"]
    rows = [
        [f"load {count} languages from their folders", f"{1000 * median(ours['load_folders_s']):.0f} ms", ""],
        [f"load {count} languages from one file", f"{1000 * median(ours['load_one_file_s']):.0f} ms", ""],
        ["load one adapter", f"{1e3 * ours['add_from_folder_s']:.2f} ms", f"{1000 * peft['first_load_adapter_s']:.0f} ms"],
        *[[f"switch, {n} loaded", f"{1000 * took:.2f} ms", ""] for n, took in ours["switch_s"].items()],
        [f"switch, {settings['peft_loaded']} loaded", "", f"{1000 * peft['switch_s']:.0f} ms"],
        ["switch a batch of 8 languages", f"{1000 * ours['switch_8_rows_s']:.2f} ms", ""],
        ["drop", f"{1e6 * ours['drop_s']:.0f} us", ""],
        ["bytes of a language", f"{ours['nbytes']['one_language']:,}", f"{peft['nbytes']['one_language']:,}"],
        ["bytes of everything", f"{ours['nbytes']['everything']:,}", f"{count * peft['nbytes']['one_language']:,}"],
    ]
    return table(["", "table", "PEFT"], rows)


def run(settings: Settings) -> Path:
    """Measure, print the table and write the file."""
    use_threads(settings.threads)
    sizes = MODELS[settings.model]
    base = whisper(sizes).requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folders(base, root, settings.languages)
        results = {"table": measure_table(base, root, settings), "peft": measure_peft(base, root, settings)}
    chosen = {"languages": settings.languages, "peft_loaded": settings.peft_loaded, "rounds": settings.rounds, "rank": RANK}
    header = provenance() | {"model": {"name": settings.model, **vars(sizes)}, "settings": chosen | {"targets": TARGETS}}
    path = write_results(settings.out, "many-languages", settings.model, header | results)
    print(f"whisper-{settings.model} sizes\n{as_table(json.loads(path.read_text('utf-8')))}\n{path}", flush=True)
    return path


def main() -> None:
    import tyro

    run(tyro.cli(Settings, description=__doc__))


if __name__ == "__main__":
    main()
