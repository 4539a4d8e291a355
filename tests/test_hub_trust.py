"""The rules for adapters, as pure functions: what good adapters of every kind look like, and that nothing else gets by or gets out."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor, write_adapter
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hub_utils.adapter_files import CONFIG_FILE, MAX_JSON_BYTES, WEIGHTS_FILE, AdapterError, parse_header, parse_json, read_adapter
from hub_utils.load import describe_base, load_adapter
from hub_utils.trust import BaseModel, check_config, check_same_base, check_tensors, check_values, declared_base, fresh_config, targets
from peft_s2lora import S2LoraConfig, to_lora
from whisper_moe import LoraMoeConfig
from whisper_moe.base_signature import check_base

ROOT = Path(__file__).parent.parent
POCKET_ADAPTERS = sorted((ROOT / "whisper_moe" / "pocket" / "adapters").iterdir())

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base() -> WhisperForConditionalGeneration:
    return build_tiny_model(build_tiny_processor())


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    features = torch.randn(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


# ---- good adapters -----------------------------------------------------------------------------------------------------

NAMES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
GOOD = {
    "LoRA": LoraConfig(r=2, target_modules=NAMES),
    "LoRA, named in full": LoraConfig(target_modules=["model.encoder.layers.0.fc1", "model.decoder.layers.1.encoder_attn.q_proj"]),
    "LoRA, with ranks of their own": LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=NAMES,
        rank_pattern={"fc1": 4, "^model.encoder.layers.0.self_attn.q_proj": 3},
        alpha_pattern={"decoder.layers.1.self_attn.v_proj": 7},
    ),
    "LoRA, rank-stabilised": LoraConfig(r=4, target_modules=NAMES, use_rslora=True, lora_dropout=0.1),
    "LoRA, some layers": LoraConfig(target_modules=NAMES, layers_to_transform=[1], layers_pattern="layers"),
    "LoRA, one layer": LoraConfig(target_modules=NAMES, layers_to_transform=0),
    "LoRA, all but some": LoraConfig(target_modules=NAMES, exclude_modules=["encoder_attn.q_proj", "fc2"]),
    "LoRA, initialised otherwise": LoraConfig(target_modules=NAMES, init_lora_weights="gaussian"),
    "LoRA, on the output head": LoraConfig(target_modules=["q_proj", "proj_out"]),
    "S2-LoRA": S2LoraConfig(r=4),
    "S2-LoRA, all types": S2LoraConfig(r=3, target_modules=NAMES, s2lora_alpha=5, sparsity_weight=0.1),
    "S2-LoRA, by type": S2LoraConfig(r=4, target_modules=NAMES, share_scope="module_type"),
    "S2-LoRA, one pair": S2LoraConfig(r=4, target_modules=NAMES, share_scope="global"),
    "S2-LoRA, groups": S2LoraConfig(r=4, target_modules=NAMES, share_groups=[r".*encoder\.layers.*", r".*fc1"]),
    "S2-LoRA, some layers": S2LoraConfig(r=4, target_modules=NAMES, layers_to_transform=[0]),
    "S2-LoRA, all linear layers": S2LoraConfig(r=4, target_modules="all-linear"),
    "LoRA-MoE without experts": LoraMoeConfig(r=2),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", GOOD)
def test_good_adapters_compute_what_peft_makes_of_them(base: Any, tmp_path: Path, name: str) -> None:
    """PEFT saves, PEFT loads: that is the truth. Predicting its tensors one by one must come to the same."""
    folder = write_adapter(tmp_path / "adapter", base, "cy", peft_config=copy.deepcopy(GOOD[name]))
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))
    assert not torch.equal(expected, logits(base))
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), folder, check_base=check_base)), expected)


@pytest.mark.parametrize("router", ["utterance", "token", "static", "language"])
def test_mixtures_compute_what_peft_makes_of_them(base: Any, tmp_path: Path, router: str) -> None:
    cy = write_adapter(tmp_path / "cy", base, "cy", seed=2)
    fr = write_adapter(tmp_path / "fr", base, "fr", peft_config=S2LoraConfig(r=4, target_modules=["q_proj", "fc1"]), seed=3)
    config = LoraMoeConfig(r=2, experts={"cy": str(cy), "fr": str(fr)}, router=router, prior={"cy": 3, "fr": 1})
    folder = write_adapter(tmp_path / "mixture", base, "oc", peft_config=config)
    for expert in (cy, fr):
        (expert / WEIGHTS_FILE).unlink()  # the mixture holds what it needs
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), folder, check_base=check_base)), expected)


def test_an_s2_lora_after_pruning_is_good(base: Any, tmp_path: Path) -> None:
    adapted = get_peft_model(copy.deepcopy(base), S2LoraConfig(r=6, target_modules=NAMES, init_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "s2lora_coefficients" in name:
                parameter[3:] = 0
    adapted.base_model.prune()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["group_ranks"]
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path, base_model="x/y")), logits(adapted))


def test_an_s2_lora_exported_to_lora_is_good(base: Any, tmp_path: Path) -> None:
    """Its rank patterns name every module, as regular expressions that are nothing but escaped names."""
    adapted = get_peft_model(copy.deepcopy(base), S2LoraConfig(r=6, target_modules=NAMES, init_weights=False))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "s2lora_coefficients" in name:
                parameter[1 + i % 5 :] = 0
    to_lora(adapted, folder=tmp_path)
    assert len(json.loads((tmp_path / CONFIG_FILE).read_text())["rank_pattern"]) > 16  # enough for them to be joined
    loaded = load_adapter(copy.deepcopy(base), tmp_path, base_model="x/y")
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)


@pytest.mark.parametrize("folder", POCKET_ADAPTERS, ids=lambda folder: folder.name)
def test_the_adapters_that_are_shipped_are_good(folder: Path) -> None:
    files = read_adapter(folder)
    assert fresh_config(files.config).peft_type == files.config["peft_type"]
    assert declared_base(files.config, files.language) == "peft-s2lora/pocket-whisper"
    check_values({"weights": torch.zeros(1)}, files.label)


def test_the_largest_whisper_fits_in_the_bounds(tmp_path: Path) -> None:
    """S2-LoRA on all six types of whisper-large-v2, exported as a LoRA: but for one whose coefficients are all zero, each of its
    512 weights is named in full, with a rank of its own."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(
            WhisperConfig(d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20)
        )
    base = describe_base(model)
    modules = [name for name in base.linear if name.rpartition(".")[2] in NAMES]
    assert len(modules) == 512
    modules = modules[1:]
    ranks = {name: 1 + i % 31 for i, name in enumerate(modules)}
    patterns = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()}
    LoraConfig(r=32, lora_alpha=32, target_modules=modules, rank_pattern=patterns, alpha_pattern=dict(patterns)).save_pretrained(tmp_path)
    assert MAX_JSON_BYTES / 2 < (tmp_path / CONFIG_FILE).stat().st_size < MAX_JSON_BYTES
    rows, end = {}, 0
    for name in modules:
        d_out, d_in = base.linear[name]
        for key, shape in (("lora_A", [ranks[name], d_in]), ("lora_B", [d_out, ranks[name]])):
            size = 2 * math.prod(shape)
            rows[f"base_model.model.{name}.{key}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(rows).encode()
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    start = time.process_time()
    files = read_adapter(tmp_path)
    fresh = fresh_config(files.config)
    check_tensors(files, fresh, base)
    assert time.process_time() - start < 3
    assert len(fresh.rank_pattern) == 31


# ---- configurations ----------------------------------------------------------------------------------------------------


def test_a_fresh_configuration_holds_nothing_but_known_fields() -> None:
    config = {
        **LORA,
        "base_model_name_or_path": "mallory/model",
        "revision": "evil",
        "auto_mapping": {"base_model_class": "Whisper", "parent_library": "transformers.models.whisper.modeling_whisper"},
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "an_option_of_the_future": None,
    }
    fresh = fresh_config(config)
    assert fresh.inference_mode
    assert (fresh.base_model_name_or_path, fresh.revision, fresh.auto_mapping, fresh.task_type) == (None, None, None, None)
    assert fresh.init_lora_weights is True
    assert not hasattr(fresh, "an_option_of_the_future")
    assert (fresh.r, set(fresh.target_modules)) == (2, {"q_proj"})


def test_the_rules_know_every_field_that_peft_writes() -> None:
    """A new PEFT version may bring new ones: decide about each. Here: those that do harm must not pass by their default alone."""
    for kind in (LoraConfig, S2LoraConfig, LoraMoeConfig):
        config = kind(target_modules=["q_proj"])
        row = json.loads(json.dumps(config.to_dict(), default=sorted))
        assert {"r", "target_modules"} <= set(check_config(row))


def test_a_method_that_is_not_imported_says_what_to_import(tmp_path: Path) -> None:
    program = f"from hub_utils.trust import fresh_config; fresh_config({ {**LORA, 'peft_type': 'S2LORA'}!r})"
    result = run_python(program, tmp_path)
    assert "AdapterError" in result.stderr
    assert "Run `import peft_s2lora` first" in result.stderr


@pytest.mark.parametrize("sign", ["\x1b", "\x9b", "\x85", "\u202e", "\u2066", "\u200b"])
@pytest.mark.parametrize("field", ["revision", "expert_names", "prior"])
def test_text_that_could_steer_a_terminal_or_turn_itself_around_is_refused(field: str, sign: str) -> None:
    text = f"a{sign}b"
    values = {"revision": text, "expert_names": [text], "prior": {text: 1.0}}
    mixture = {"peft_type": "LORAMOE", "r": 2, "target_modules": ["q_proj"]}
    with pytest.raises(AdapterError) as caught:
        check_config({**mixture, field: values[field]})
    says_plainly(caught.value)
    assert check_config(
        {**mixture, "revision": "pr\u00eat \u2014 \u0939\u093f\u0928\u094d\u0926\u0940", "expert_names": ["br"], "prior": {"br": 1.0}}
    )


@pytest.mark.parametrize("prior", [[0.0], [-1], [True], ["1"], [1e9], {"br": None}, 1.0, "br", [1.0] * 65])
def test_gates_to_start_from_are_positive_numbers(prior: Any) -> None:
    with pytest.raises(AdapterError, match="prior"):
        check_config({"peft_type": "LORAMOE", "r": 2, "target_modules": ["q_proj"], "prior": prior})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["q_proj", ".*", "(a+)+$", "pissa"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = sorted({*LoraConfig().to_dict(), *S2LoraConfig().to_dict(), *LoraMoeConfig().to_dict(), "other"})


def says_plainly(error: AdapterError) -> None:
    """Messages show what was in the file: on one line, cut short, without control characters."""
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["LORA", "S2LORA", "LORAMOE"]), st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=4))
def test_any_configuration_is_either_taken_or_refused(method: str, fields: dict[str, Any]) -> None:
    """No other exception, and nothing that names, replaces or imports gets through."""
    try:
        fresh = fresh_config({**LORA, "peft_type": method, **fields})
    except AdapterError as error:
        says_plainly(error)
        return
    assert not fresh.modules_to_save
    assert fresh.bias == "none"
    assert fresh.base_model_name_or_path is None
    assert fresh.auto_mapping is None
    assert 1 <= fresh.r <= 1024
    assert all(name.replace(".", "").replace("_", "").isalnum() for name in fresh.target_modules)
    assert getattr(fresh, "init_lora_weights", True) is True


# ---- files -------------------------------------------------------------------------------------------------------------

GOOD_WEIGHTS = save({"a": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.ones(())})


def parsed(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return parse_header(data[: 8 + length], len(data), "The adapter")


def test_a_good_header_is_read_as_safetensors_reads_it() -> None:
    found = {name: (place.dtype, place.shape) for name, place in parsed(GOOD_WEIGHTS).items()}
    assert found == {"a": ("F32", (3, 2)), "b": ("BF16", (2,)), "c": ("F32", ())}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD_WEIGHTS) - 1), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 40))
def test_any_damage_to_a_file_is_either_harmless_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    """What our parser takes, safetensors takes too, with the same names and shapes."""
    from safetensors.torch import load

    data = bytearray(GOOD_WEIGHTS)
    for at, byte in changes:
        data[at] = byte
    data = data[: len(data) - cut]
    try:
        places = parsed(bytes(data))
    except AdapterError as error:
        says_plainly(error)
        return
    truth = {name: tuple(tensor.shape) for name, tensor in load(bytes(data)).items()}
    assert {name: place.shape for name, place in places.items()} == truth


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eEtrufalsn-.NI \\u', max_size=60).map(str.encode))
def test_any_text_is_either_an_object_or_refused(data: bytes) -> None:
    try:
        assert isinstance(parse_json(data, "x.json", "The adapter"), dict)
    except AdapterError as error:
        says_plainly(error)


def test_weights_that_change_between_the_check_and_the_reading_are_refused(base: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base, "cy")
    files = read_adapter(folder)
    (folder / WEIGHTS_FILE).write_bytes(save({"base_model.model.proj_out.weight": torch.ones(364, 16)}))
    with pytest.raises(AdapterError, match="changed while it was read"):
        files.read_weights()


def test_files_of_the_hub_clients_own_cache_may_be_links(base: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base, "cy")
    snapshot, blobs = (tmp_path / "models--a--b" / part for part in ("snapshots/0123/cy", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../../blobs/{i}")
    assert read_adapter(snapshot).tensors


# ---- tensors and bases -------------------------------------------------------------------------------------------------


def test_targets_follow_pefts_own_rule() -> None:
    linear = {f"encoder.layers.{i}.{name}": (4, 4) for i in range(3) for name in ("fc1", "xfc1", "fc2")}
    base = BaseModel(linear, frozenset({"encoder.norm"}))
    config = LoraConfig(target_modules=["fc1"], layers_to_transform=[0, 2])
    assert targets(config, base, "it") == ["encoder.layers.0.fc1", "encoder.layers.2.fc1"]
    with pytest.raises(AdapterError, match=r"encoder\.norm, which is no linear layer"):
        targets(LoraConfig(target_modules=["norm", "fc1"]), base, "it")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 10_001.0, -1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_no_training_gives_are_refused(number: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(5, 7, dtype=dtype)
    check_values({"w": tensor, "empty": tensor[:0]}, "it")
    tensor[2, 3] = number if dtype != torch.bfloat16 or abs(number) != 10_001 else math.copysign(10_112, number)
    with pytest.raises(AdapterError, match="'w' holds numbers"):
        check_values({"w": tensor}, "it")


def test_ten_thousand_is_still_a_number() -> None:
    check_values({"w": torch.tensor([1e4, -1e4])}, "it")


@pytest.mark.parametrize(
    ("said", "given_as", "known"),
    [
        ("a/b", "a/b", True),
        ("a/b", None, False),
        ("/path/to/b", "a/b", False),
        (None, "a/b", False),
        (5, "a/b", False),
        ("t", "a/b", False),
    ],
)
def test_bases_are_compared_where_both_are_known(base: Any, tmp_path: Path, said: Any, given_as: str | None, known: bool) -> None:
    folder = write_adapter(tmp_path / "adapter", base, "cy")
    row = json.loads((folder / "language_adapter.json").read_text()) | {"base_model": said}
    (folder / "language_adapter.json").write_text(json.dumps(row))
    assert check_same_base(read_adapter(folder), given_as) is known


def test_what_the_run_wrote_down_counts_before_what_peft_was_loaded_from() -> None:
    assert declared_base({"base_model_name_or_path": "some/folder"}, {"base_model": "openai/whisper-tiny"}) == "openai/whisper-tiny"
    assert declared_base({"base_model_name_or_path": "openai/whisper-tiny"}) == "openai/whisper-tiny"
