"""Adapters that are broken, or made to harm: each is refused with a message that says why, the model stays what it was, in little
memory and little time. Every case is made here, and judged in a process of its own (see hostile_server.py).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_adapter
from hostile_server import BASE_ID, HostileServer, Judgement
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hub_utils.adapter_files import CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE
from peft_s2lora import S2LoraConfig

MEMORY_OVER_CLEAN = 200 * 1024**2  # bytes
TIME_S = 5.0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")

PREFIX = "base_model.model."
Q_PROJ = f"{PREFIX}model.encoder.layers.0.self_attn.q_proj"


# ---- making them -------------------------------------------------------------------------------------------------------


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG_FILE, **fields)


def config_text(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data) and None


def config_with(text: str) -> Callable[[Path], None]:
    """Text put in front of the first field, as it is: what json.dumps would not write."""

    def spoil(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text("{" + text + "," + path.read_text().lstrip()[1:])

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """The weights after `change` has had its way with them."""

    def spoil(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS_FILE)

    return spoil


def extra(name: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: torch.ones(shape)}))


def without(*suffixes: str) -> Callable[[Path], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.endswith(suffixes)]:
            del found[name]

    return tensors(change)


def replaced(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The first tensor with that end, changed."""

    def spoil(found: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(found) if name.endswith(suffix))
        found[name] = change(found[name])

    return tensors(spoil)


def value(number: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = number
        return tensor.to(dtype)

    return replaced("weight", change)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The header of the weights, written by hand; the numbers stay."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS_FILE).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        rows = json.loads(data[8 : 8 + length])
        text = change(rows)
        text = json.dumps(rows).encode() if not isinstance(text, bytes) else text
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def first_row(**fields: Any) -> Callable[[Path], None]:
    def change(rows: dict[str, Any]) -> None:
        next(row for name, row in rows.items() if name != "__metadata__").update(fields)

    return header(change)


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(change((folder / WEIGHTS_FILE).read_bytes())) and None


def sparse_giant(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 10 * 1024**3)


def sparse_giant_tensor(folder: Path) -> None:
    """A file of 900 MB that is in order, but for its one tensor."""
    size = 900 * 1024**2
    text = json.dumps({f"{Q_PROJ}.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / WEIGHTS_FILE, 8 + len(text) + size)


def linked(name: str, target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / f"elsewhere-{name}")
        (folder / name).symlink_to(folder.parent / f"elsewhere-{name}" if target == "elsewhere" else target)

    return spoil


def fifo(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def directory(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


def link_out_of_the_client_cache(folder: Path) -> None:
    """As if it were a snapshot of the Hub client's cache, with a link that leaves it."""
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / WEIGHTS_FILE, outside)
    snapshot = folder.parent / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (folder.parent / "models--a--b" / "blobs").mkdir()
    (folder / WEIGHTS_FILE).symlink_to(outside)
    shutil.move(folder, snapshot)
    folder.symlink_to(snapshot)


class Runs:
    """Unpickling this leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pickle-has-run",))


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))


def a_pickle_by_another_name(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Runs()))


def a_torch_archive_by_another_name(folder: Path) -> None:
    found = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    torch.save(found, folder / WEIGHTS_FILE)


def for_another_base_by_name(folder: Path) -> None:
    edit_json(folder / CONFIG_FILE, base_model_name_or_path="mallory/whisper-tiny")
    (folder / LANGUAGE_FILE).unlink()


def for_another_base_by_signature(folder: Path) -> None:
    path = folder / LANGUAGE_FILE
    row = json.loads(path.read_text())
    row["base_signature"]["weights"] = {name: number + 1 for name, number in row["base_signature"]["weights"].items()}
    path.write_text(json.dumps(row))


def signature(content: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / LANGUAGE_FILE, base_signature=content)


def config_of_another_commit(folder: Path) -> None:
    """Configuration and weights of two trainings of one adapter."""
    edit_json(folder / CONFIG_FILE, r=4, lora_alpha=4)


def second_owner(found: dict[str, torch.Tensor]) -> None:
    """A and B of one sharing group, under two of its layers."""
    name = next(name for name in found if name.endswith("s2lora_A"))
    coefficients = [other for other in found if other.endswith("s2lora_coefficients")]
    owner = next(other for other in coefficients if not name.startswith(other.rpartition(".")[0] + "."))
    found[owner.replace("s2lora_coefficients", "s2lora_A")] = found[name].clone()


ENDLESS = "(([a-z_.]+)*)*!"  # takes a time that doubles with every letter of the name

# name -> (which good adapter, what is done to it, words of the refusal)
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # tensors aimed at the base
    "extra: a base weight": ("lora", extra(f"{PREFIX}model.encoder.conv1.bias", 16), "1 tensor.s. that its configuration does not ask for"),
    "extra: a tied weight": ("lora", extra(f"{PREFIX}proj_out.weight", 364, 16), "does not ask for.*proj_out"),
    "extra: inside a wrapped layer": ("lora", extra(f"{Q_PROJ}.base_layer.weight", 16, 16), "base_layer"),
    "extra: a bias beside the adapter": ("lora", extra(f"{Q_PROJ}.bias", 16), "does not ask for"),
    "extra: without PEFT's prefix": ("lora", extra("model.encoder.conv1.bias", 16), "does not ask for"),
    "extra: a whole module": ("lora", extra(f"{PREFIX}proj_out.modules_to_save.weight", 364, 16), "does not ask for"),
    "extra: a layer that is not there": ("lora", extra(f"{PREFIX}model.encoder.layers.9.fc1.lora_A.weight", 2, 16), "does not ask for"),
    "extra: magnitudes of DoRA": ("lora", extra(f"{Q_PROJ}.lora_magnitude_vector", 16), "does not ask for"),
    "extra: an embedding": ("lora", extra(f"{PREFIX}model.decoder.embed_tokens.lora_embedding_A", 2, 364), "does not ask for"),
    "extra: another adapter's name": ("lora", extra(f"{Q_PROJ}.lora_A.default.weight", 2, 16), "does not ask for"),
    "extra: ten thousand": (
        "lora",
        tensors(lambda found: found.update({f"{PREFIX}x{i}": torch.ones(1) for i in range(10_000)})),
        "10000 tensor",
    ),
    "extra: S2-LoRA, a base weight": ("s2lora", extra(f"{PREFIX}model.encoder.conv1.bias", 16), "does not ask for"),
    "extra: S2-LoRA, two owners of one pair": ("s2lora", tensors(second_owner), "does not ask for.*s2lora_A"),
    "extra: LoRA-MoE, a base weight": ("loramoe", extra(f"{PREFIX}model.encoder.conv1.bias", 16), "does not ask for"),
    # missing and half tensors
    "missing: an A": ("lora", without("layers.0.self_attn.q_proj.lora_A.weight"), "lacks 2 tensor"),
    "missing: every B": ("lora", without("lora_B.weight"), "lacks .*lora_B"),
    "missing: the whole decoder": ("lora", tensors(lambda f: [f.pop(n) for n in list(f) if ".decoder." in n]), "lacks .*decoder"),
    "missing: everything": ("lora", tensors(lambda found: found.clear()), "lacks"),
    "missing: S2-LoRA, coefficients of one weight": ("s2lora", without("encoder.layers.1.self_attn.q_proj.s2lora_coefficients"), "lacks 1"),
    "missing: S2-LoRA, a shared factor": ("s2lora", without("s2lora_B"), "lacks .*s2lora_B"),
    "missing: LoRA-MoE, the router": ("loramoe", without("loramoe_router_bias"), "lacks .*router_bias"),
    "half: an A with half its rows": ("lora", replaced("lora_A.weight", lambda t: t[:1]), "has shape .1, 16."),
    # shapes
    "shape: an A the wrong way round": ("lora", replaced("lora_A.weight", lambda t: t.T), "has shape .16, 2."),
    "shape: a number instead of a matrix": ("lora", replaced("lora_A.weight", lambda t: t[0, 0]), r"has shape \(\)"),
    "shape: one dimension more": ("lora", replaced("lora_A.weight", lambda t: t[None]), "has shape .1, 2, 16."),
    "shape: S2-LoRA, coefficients of another rank": ("s2lora", replaced("s2lora_coefficients", lambda t: t[:2]), "has shape .2,."),
    "shape: LoRA-MoE, an expert too few": ("loramoe", replaced("loramoe_experts_A", lambda t: t[:1]), "has shape .1, "),
    "shape: configuration of another commit": ("lora", config_of_another_commit, "different adapters"),
    # types
    "type: whole numbers": ("lora", replaced("weight", lambda t: t.long()), "of type 'I64'"),
    "type: booleans": ("lora", replaced("weight", lambda t: t.bool()), "of type 'BOOL'"),
    "type: complex numbers": ("lora", replaced("weight", lambda t: t.to(torch.complex64)), "of type 'C64'"),
    "type: eight bits": ("lora", replaced("weight", lambda t: t.to(torch.float8_e4m3fn)), "of type 'F8_E4M3'"),
    "type: an invented one": ("lora", first_row(dtype="F1024"), "of type 'F1024'"),
    "type: a list": ("lora", first_row(dtype=["F32"]), r"of type \['F32'\]"),
    # values
    "value: not a number": ("lora", value(float("nan")), "numbers from nan"),
    "value: infinite": ("lora", value(float("inf")), "to inf"),
    "value: minus infinite": ("lora", value(float("-inf")), "from -inf"),
    "value: huge": ("lora", value(1e30), "at most 10,000"),
    "value: largest of half precision": ("lora", value(65504.0, torch.float16), "at most 10,000"),
    "value: not a number, in bfloat16": ("lora", value(float("nan"), torch.bfloat16), "numbers from nan"),
    "value: S2-LoRA, infinite coefficient": ("s2lora", replaced("s2lora_coefficients", lambda t: t / 0), "numbers from"),
    # ranks and other numbers
    "rank: a thousand million": ("lora", config(r=10**9), "r=1000000000, expected a whole number from 1 to 1024"),
    "rank: zero": ("lora", config(r=0), "r=0, expected"),
    "rank: negative": ("lora", config(r=-8), "r=-8, expected"),
    "rank: true": ("lora", config(r=True), "r=True, expected"),
    "rank: text": ("lora", config(r="8"), "r='8', expected"),
    "rank: a list": ("lora", config(r=[2]), r"r=\[2\], expected"),
    "rank: large, not in the file": ("lora", config(r=1024), "shape"),
    "rank: in a pattern": ("lora", config(rank_pattern={"q_proj": 10**6}), "rank_pattern=.*expected"),
    "rank: in a pattern, not in the file": ("lora", config(rank_pattern={"q_proj": 512}), "ask for .512, 16."),
    "rank: S2-LoRA, of a group": ("s2lora", config(group_ranks={"16x16": 10**7}), "group_ranks=.*expected"),
    "rank: LoRA-MoE, of experts": ("loramoe", config(expert_ranks={"model.encoder.layers.0.fc1": 10**7}), "expert_ranks=.*expected"),
    "alpha: huge": ("lora", config(lora_alpha=1e300), "lora_alpha=1e.300, expected"),
    "alpha: zero": ("lora", config(lora_alpha=0), "lora_alpha=0, expected"),
    "alpha: in a pattern": ("lora", config(alpha_pattern={"q_proj": -1}), "alpha_pattern=.*expected"),
    "dropout: above one": ("lora", config(lora_dropout=1.5), "lora_dropout=1.5, expected"),
    # regular expressions
    "endless: targets": ("lora", config(target_modules=ENDLESS), "target_modules=.*no regular expression"),
    "endless: among targets": ("lora", config(target_modules=["q_proj", ENDLESS]), "target_modules=.*no regular expression"),
    "endless: exclusions": ("lora", config(exclude_modules=ENDLESS), "exclude_modules=.*no regular expression"),
    "endless: ranks": ("lora", config(rank_pattern={ENDLESS: 2}), "rank_pattern=.*expected"),
    "endless: alphas": ("lora", config(alpha_pattern={ENDLESS: 2}), "alpha_pattern=.*expected"),
    "endless: layers": ("lora", config(layers_to_transform=[0], layers_pattern=ENDLESS), "layers_pattern=.*expected"),
    "endless: S2-LoRA, groups": ("s2lora", config(share_groups=[ENDLESS]), "share_groups=.*expected"),
    "endless: S2-LoRA, wildcards": ("s2lora", config(share_groups=[".*" * 20 + "x"]), "share_groups=.*expected"),
    "endless: S2-LoRA, many groups": ("s2lora", config(share_groups=[f"group{i}" for i in range(4000)]), "share_groups=.*expected"),
    # targets
    "targets: 300,000 names": ("lora", config(target_modules=[f"name{i}" for i in range(300_000)]), "at most 131,072 are read"),
    "targets: 5,000 names": ("lora", config(target_modules=[f"n{i}" for i in range(5_000)]), "expected a list of 1 to 1024"),
    "targets: everything": ("lora", config(target_modules="all-linear"), "target_modules='all-linear', expected"),
    "targets: nothing": ("lora", config(target_modules=[]), r"target_modules=\[\], expected"),
    "targets: null": ("lora", config(target_modules=None), "target_modules=None, expected"),
    "targets: numbers": ("lora", config(target_modules=[1, 2]), r"target_modules=\[1, 2\], expected"),
    "targets: names of no module": ("lora", config(target_modules=["no_such_layer"]), "this model has none of these"),
    "targets: a convolution": ("lora", config(target_modules=["q_proj", "conv1"]), "conv1, which is no linear layer"),
    "targets: the embedding": ("lora", config(target_modules=["q_proj", "embed_tokens"]), "embed_tokens, which is no linear layer"),
    "targets: more than the file has": ("lora", config(target_modules=["q_proj", "v_proj", "out_proj", "fc1"]), "lacks"),
    "targets: up and away": ("lora", config(target_modules=["../q_proj"]), "target_modules=.*expected"),
    # methods
    "method: unknown": ("lora", config(peft_type="TELEPATHY"), "peft_type 'TELEPATHY'; trusted are LORA, S2LORA"),
    "method: shared factors": ("lora", config(peft_type="VERA"), "peft_type 'VERA'"),
    "method: prompts": ("lora", config(peft_type="PROMPT_TUNING"), "peft_type 'PROMPT_TUNING'"),
    "method: names other repositories": ("lora", config(peft_type="XLORA"), "peft_type 'XLORA'"),
    "method: whole modules": ("lora", config(peft_type="TRAINABLE_TOKENS"), "peft_type 'TRAINABLE_TOKENS'"),
    "method: none": ("lora", config(peft_type=None), "peft_type None"),
    "method: a list": ("lora", config(peft_type=["LORA"]), r"peft_type \['LORA'\]"),
    "method: another one's fields": ("lora", config(peft_type="S2LORA"), "lora.*not among the fields"),
    # what rewrites the base
    **{
        f"initialised by {name}": ("lora", config(init_lora_weights=name), f"init_lora_weights='{name}', expected")
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica")
    },
    "initialised by LoftQ's options": ("lora", config(loftq_config={"loftq_bits": 4}), "changes the base weights"),
    "replaces: the output head": ("lora", config(modules_to_save=["proj_out"]), "modules_to_save.*whole modules"),
    "replaces: biases": ("lora", config(bias="all"), "bias='all', expected 'none'"),
    "replaces: biases of adapted layers": ("lora", config(bias="lora_only"), "bias='lora_only', expected 'none'"),
    "replaces: rows of the embedding": ("lora", config(trainable_token_indices=[0, 1]), "rows of the embedding"),
    "replaces: the order of layers": ("lora", config(layer_replication=[[0, 1000000]]), "rebuilds the base model"),
    "replaces: parameters": ("lora", config(target_parameters=["weight"]), "target_parameters"),
    "replaces: S2-LoRA, the output head": ("s2lora", config(modules_to_save=["proj_out"]), "whole modules"),
    "option: DoRA": ("lora", config(use_dora=True), "use_dora"),
    "option: trained bias of B": ("lora", config(lora_bias=True), "lora_bias"),
    "option: unheard of": ("lora", config(run_this="rm -rf"), "run_this"),
    "option: ten thousand unheard of": ("lora", config(**{f"o{i}": 1 for i in range(3_000)}), "not among the fields"),
    # imports and other repositories
    "imports: auto_mapping": (
        "lora",
        config(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
        "auto_mapping=.*never imported",
    ),
    "imports: auto_mapping to code here": (
        "lora",
        config(auto_mapping={"base_model_class": "X", "parent_library": "transformers.models.../evil"}),
        "auto_mapping=.*expected",
    ),
    "imports: megatron_core": ("lora", config(megatron_core="antigravity"), "megatron_core='antigravity', expected"),
    "imports: megatron_config": ("lora", config(megatron_config={"a": 1}), "imports a module by name"),
    "imports: arrow experts": ("lora", config(arrow_config={"top_k": 1}), "needs other adapters"),
    "imports: LoRA-MoE, experts from paths": ("loramoe", config(experts={"a": "../../elsewhere"}), "experts=.*save_experts='copy'"),
    "imports: LoRA-MoE, experts by reference": ("loramoe", config(save_experts="reference"), "save_experts='reference', expected"),
    # bases
    "base: another of the same size, by name": ("lora", for_another_base_by_name, f"made for 'mallory/whisper-tiny', not for '{BASE_ID}'"),
    "base: another of the same size, by its signature": ("lora", for_another_base_by_signature, "does not belong to this model"),
    "base: a signature of nonsense": ("lora", signature("x" * 1000), "does not belong to this model"),
    "base: an empty signature": ("lora", signature({"format": 1, "architecture": {}, "weights": {}}), "does not belong to this"),
    # pickles
    "pickle: nothing else": ("lora", only_a_pickle, "adapter_model.bin, a pickle"),
    "pickle: by another name": ("lora", a_pickle_by_another_name, "no safetensors file"),
    "pickle: a torch archive by another name": ("lora", a_torch_archive_by_another_name, "no safetensors file"),
    # safetensors
    "file: empty": ("lora", weights(lambda data: b""), "no safetensors file"),
    "file: cut off": ("lora", weights(lambda data: data[:-100]), "cut off"),
    "file: cut off in the header": ("lora", weights(lambda data: data[:100]), "cut off"),
    "file: something behind": ("lora", weights(lambda data: data + b"x" * 100), "something behind its tensors"),
    "file: ten gigabytes": ("lora", sparse_giant, "at most 1,073,741,824 are read"),
    "file: 900 MB in one tensor": ("lora", sparse_giant_tensor, "does not ask for|lacks"),
    "header: of a size without end": ("lora", weights(lambda data: b"\xff" * 8 + data[8:]), "no safetensors file"),
    "header: no JSON": ("lora", header(lambda rows: b"{" + b"x" * 200), "not valid JSON"),
    "header: a list": ("lora", header(lambda rows: b"[]" + b" " * 200), "no safetensors file"),
    "header: a name twice": ("lora", header(lambda rows: json.dumps(rows).encode()[:-1] + b"," + json.dumps(rows).encode()[1:]), "twice"),
    "header: nested without end": ("lora", header(lambda rows: b'{"a":' * 200_000), "nested too deeply|not valid JSON"),
    "header: metadata that are no text": ("lora", header(lambda rows: rows.update(__metadata__={"a": [1]})), "metadata"),
    "header: a field more": ("lora", first_row(run="this"), "does not say type, shape and place"),
    "tensors: overlapping": ("lora", header(lambda rows: _move(rows, -64)), "overlaps another"),
    "tensors: with a gap": ("lora", header(lambda rows: _move(rows, 64)), "leaves a gap|overlaps"),
    "tensors: before the beginning": ("lora", first_row(data_offsets=[-128, 0]), "The file is broken"),
    "tensors: beyond the end": ("lora", first_row(data_offsets=[10**15, 10**15 + 128]), "The file is broken|cut off|gap"),
    "tensors: offsets that are no numbers": ("lora", first_row(data_offsets=["0", "128"]), "The file is broken"),
    "tensors: a product that overflows": ("lora", first_row(shape=[2**40, 2**40]), "should have"),
    "tensors: a thousand dimensions": ("lora", first_row(shape=[1] * 1000), "The file is broken"),
    # JSON
    "json: a key twice": ("lora", config_with('"r": 2, "r": 2'), "'r' stands there twice"),
    "json: not a number": ("lora", config_with('"lora_dropout": NaN'), "NaN is no number"),
    "json: infinity": ("lora", config_with('"lora_dropout": Infinity'), "Infinity is no number"),
    "json: a number that overflows": ("lora", config_with('"lora_dropout": 1e999'), "too large"),
    "json: a million digits": ("lora", config_with(f'"x": {"9" * 60_000}'), "not valid JSON"),
    "json: nested without end": ("lora", config_text('{"r":' + "[" * 30_000), "nested too deeply|not valid JSON"),
    "json: fifty megabytes": ("lora", config_text('{"r": "' + "x" * 50_000_000 + '"}'), "at most 131,072 are read"),
    "json: a list": ("lora", config_text("[1, 2]"), "holds a list"),
    "json: nothing": ("lora", config_text(""), "not valid JSON"),
    "json: no text": ("lora", config_text(b"\xff\xfe\x00"), "not valid JSON"),
    "json: an empty object": ("lora", config_text("{}"), "peft_type None"),
    # files
    "file: no configuration": ("lora", lambda folder: (folder / CONFIG_FILE).unlink(), "has no adapter_config.json"),
    "link: weights": ("lora", linked(WEIGHTS_FILE, "elsewhere"), "is a link"),
    "link: configuration": ("lora", linked(CONFIG_FILE, "elsewhere"), "is a link"),
    "link: without end": ("lora", linked(WEIGHTS_FILE, "/dev/zero"), "is a link"),
    "link: to a secret": ("lora", linked(LANGUAGE_FILE, "/etc/passwd"), "is a link"),
    "link: to nothing": ("lora", linked(WEIGHTS_FILE, "/no/such/file"), "is a link"),
    "link: out of the client's cache": ("lora", link_out_of_the_client_cache, "is a link"),
    "pipe: weights": ("lora", fifo(WEIGHTS_FILE), "no regular file"),
    "pipe: configuration": ("lora", fifo(CONFIG_FILE), "no regular file"),
    "folder: in place of the weights": ("lora", directory, "no regular file|cannot be read"),
    # pools
    "pool: another one's hash": ("pooled", config(pool_hash="0" * 64), "other values than the one loaded"),
    "pool: no hash": ("pooled", config(pool_hash=None), "does not say its hash"),
    "pool: a path": ("pooled", config(pool="../pool"), "pool='../pool', expected"),
    "pool: not there": ("pooled", config(pool="missing", pool_hash="0" * 64), "which is not loaded"),
    "pool: with factors of its own": ("pooled", extra(f"{Q_PROJ}.s2lora_A", 4, 16), "does not ask for"),
}  # fmt: skip


def _move(rows: dict[str, Any], by: int) -> None:
    """Move the last tensor."""
    last = max((row for name, row in rows.items() if name != "__metadata__"), key=lambda row: row["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


# ---- judging them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good adapter of each kind, for the model that the server has."""
    from conftest import build_tiny_model, build_tiny_processor
    from peft import PeftModel

    import whisper_moe

    folder, model = tmp_path_factory.mktemp("good"), build_tiny_model(build_tiny_processor())
    targets = ["q_proj", "v_proj", "out_proj"]
    adapters = {
        "lora": LoraConfig(r=2, lora_alpha=2, target_modules=targets),
        "other-lora": LoraConfig(r=3, target_modules=["q_proj", "fc1"]),
        "s2lora": S2LoraConfig(r=4, target_modules=targets),
    }
    paths = {name: write_adapter(folder / name, model, "cy", peft_config=config) for name, config in adapters.items()}
    experts = {"cy": str(paths["lora"]), "fr": str(paths["other-lora"])}
    moe = whisper_moe.LoraMoeConfig(r=2, experts=experts)
    paths["loramoe"] = write_adapter(folder / "loramoe", model, "oc", peft_config=moe)

    pooled = PeftModel.from_pretrained(model, paths["s2lora"], adapter_name="pool")
    pooled.add_adapter("pooled", S2LoraConfig(pool="pool"))
    for name, parameter in pooled.named_parameters():
        if name.endswith("s2lora_coefficients.pooled"):
            torch.nn.init.normal_(parameter)
    pooled.save_pretrained(folder, selected_adapters=["pooled"], save_embedding_layers=False)
    shutil.copy(paths["s2lora"] / LANGUAGE_FILE, folder / "pooled")
    return paths | {"pooled": folder / "pooled"}


def neighbour(kind: str, good: dict[str, Path]) -> dict[str, Path]:
    """An adapter that may already be on the model."""
    names = {"lora": "other-lora", "s2lora": "s2lora", "pooled": "s2lora", "loramoe": "loramoe"}
    return {"pool": good[names[kind]]}


@pytest.fixture(scope="module")
def clean(server: HostileServer, good: dict[str, Path]) -> Judgement:
    return server.judge(good["lora"])[0]


@pytest.mark.parametrize("kind", ["lora", "other-lora", "s2lora", "loramoe"])
def test_a_good_adapter_is_loaded(server: HostileServer, good: dict[str, Path], kind: str) -> None:
    [judgement] = server.judge(good[kind])
    assert (judgement.verdict, judgement.message) == ("loaded", "")
    assert not judgement.unchanged  # so the fingerprint sees adapters


@pytest.mark.parametrize("kind", ["lora", "s2lora", "pooled"])
def test_a_good_adapter_is_loaded_beside_another(server: HostileServer, good: dict[str, Path], kind: str) -> None:
    [judgement] = server.judge(good[kind], [neighbour(kind, good)])
    assert (judgement.verdict, judgement.message) == ("loaded", "")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_adapter_is_refused_and_the_model_stays_what_it_was(
    name: str, server: HostileServer, good: dict[str, Path], clean: Judgement, tmp_path: Path
) -> None:
    kind, spoil, words = CASES[name]
    folder = tmp_path / "hostile"
    shutil.copytree(good[kind], folder)
    spoil(folder)
    companies = [neighbour(kind, good)] if kind == "pooled" else [{}, neighbour(kind, good)]
    judgements = server.judge(folder, companies, cwd=tmp_path)
    assert [judgement.verdict for judgement in judgements] == ["refused"] * len(companies), judgements
    for judgement in judgements:
        assert_says(judgement.message, words)
        assert judgement.unchanged
        assert judgement.seconds < TIME_S
        assert judgement.peak_bytes < clean.peak_bytes + MEMORY_OVER_CLEAN
    assert not (tmp_path / "pickle-has-run").exists()


def assert_says(message: str, words: str) -> None:
    assert re.search(words, message), f"{words!r} is not in {message!r}"
    assert len(message) < 800
    assert message.isprintable()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
