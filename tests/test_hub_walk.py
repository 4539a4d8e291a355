"""The whole way: an adapter is published, found, fetched and transcribes, each in a fresh process that knows the Hub by its environment.

LoRA, S2-LoRA and LoRA-MoE. What arrives must compute, bit for bit, what the trainer's folder does; by our loader, and by PEFT's own.
And the way that begins with a recording: a language is heard, the registry file names its adapter, which is fetched, trusted, loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, tone
from loopback_hub import LoopbackHub, hub_fixture, no_network, online_fixture  # noqa: F401

BASE = "tests/tiny"
LANGUAGES = {"cy": "lora", "br": "s2lora", "ga": "loramoe"}  # language -> method; Irish has no token in Whisper and borrows one

PUBLISH = """
import sys
from whisper_moe.cli import main

for folder in sys.argv[1:]:
    assert main(["publish", folder, "--base-model", "tests/tiny", "--license", "cc0-1.0"]) == 0
"""

# What every process computes of an adapter: logits of fixed features, and a transcript.
COMPUTE = """
def logits_of(model):
    import torch

    features = torch.linspace(-1, 1, 80 * 200).reshape(1, 80, 200)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


def compute(base, folder, name, recording):
    from transformers import WhisperForConditionalGeneration

    import peft_s2lora
    from hub_utils import load_adapter
    from whisper_moe import LoraMoeConfig, Transcriber, check_base

    model = WhisperForConditionalGeneration.from_pretrained(base).eval()
    adapted = load_adapter(model, folder, check_base=check_base)
    text = Transcriber.from_pretrained(base, adapters=folder, device="cpu").transcribe(recording, adapter=name).text
    return logits_of(adapted), text
"""

FETCH = (
    COMPUTE
    + """
import json, sys
import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration
from hub_utils import fetch_adapter, find_adapters, pick_adapter

base, recording, out, *languages = sys.argv[1:]
rows = {}
for language in languages:
    found = pick_adapter(find_adapters("tests/tiny", language, namespaces=["alice"]))
    fetched = fetch_adapter(found.repo_id, found.sha, base_model="tests/tiny", language=language)
    logits, text = compute(base, fetched.path, language, recording)
    torch.save(logits, f"{out}/{language}.pt")
    alone = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(base).eval(), found.repo_id).eval()
    torch.save(logits_of(alone), f"{out}/peft-{language}.pt")
    rows[language] = {"repo_id": found.repo_id, "text": text}
print(json.dumps(rows))
"""
)


def run(code: str, *arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folders(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Language -> folder of a trained adapter, one of each method."""
    from peft_s2lora import S2LoraConfig
    from whisper_moe import LoraMoeConfig

    targets = ["q_proj", "v_proj"]
    cy = make_adapter("cy")
    br = make_adapter("br", peft_config=S2LoraConfig(r=4, target_modules=targets, init_weights=False))
    experts = LoraMoeConfig(r=2, target_modules=[*targets, "out_proj"], experts={"cy": str(cy)}, init_weights=False)
    return {"cy": cy, "br": br, "ga": make_adapter("ga", carrier="cy", peft_config=experts)}


def test_published_adapters_are_found_fetched_and_compute_what_the_trainers_do(
    hub: LoopbackHub, tiny_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    recording = tmp_path / "speech.wav"
    soundfile.write(recording, tone(300), SAMPLE_RATE)
    assert np.abs(soundfile.read(recording)[0]).max() > 0.1
    printed = run(PUBLISH, *map(str, folders.values()), env=hub.environment("hf_alice"))
    assert printed.count("Published") == 3
    stranger = hub.environment(HF_HUB_ETAG_TIMEOUT="30")
    rows = json.loads(run(FETCH, str(tiny_folder), str(recording), str(tmp_path), *LANGUAGES, env=stranger).splitlines()[-1])
    assert {code: row["repo_id"] for code, row in rows.items()} == {code: f"alice/tiny-{m}-{code}" for code, m in LANGUAGES.items()}
    for row in rows.values():
        sent = [hub.read(row["repo_id"], name) for name in ("README.md", "adapter_config.json", "language_adapter.json")]
        assert str(tmp_path).encode() not in b"".join(sent)
    here: dict[str, Any] = {}
    exec(COMPUTE, here)
    seen = []
    for code, folder in folders.items():
        logits, text = here["compute"](str(tiny_folder), folder, code, recording)
        assert torch.equal(torch.load(tmp_path / f"{code}.pt"), logits)
        assert torch.equal(torch.load(tmp_path / f"peft-{code}.pt"), logits)
        assert rows[code]["text"] == text
        seen.append(logits)
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))  # they do something, each its own


# What `whisper-moe transcribe` prints for a recording, per language that may be heard; and how long was waited for the network.
TRANSCRIBE = """
import json, sys, time
from whisper_moe.cli import main

import httpx2 as client

waited = []
send = client.HTTPTransport.handle_request


def timed(self, request):
    start = time.perf_counter()
    try:
        return send(self, request)
    finally:
        waited.append(time.perf_counter() - start)


client.HTTPTransport.handle_request = timed
base, registry, recording, *languages = sys.argv[1:]
for language in languages:
    code = main(["transcribe", recording, "--model", base, "--registry", registry, "--allowed", language, "--device", "cpu", "--json"])
    assert code == 0, code
print(json.dumps(waited))
"""


@pytest.mark.usefixtures("online")
def test_a_language_that_is_heard_fetches_its_adapter_once_and_without_a_network_all_goes_on(
    hub: LoopbackHub, tiny_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from hub_utils import Pinned, RegistryEntry, RegistryFile, publish_adapter
    from whisper_moe import Transcriber

    recording, registry = tmp_path / "speech.wav", RegistryFile(tmp_path / "adapters.json")
    soundfile.write(recording, tone(300), SAMPLE_RATE)
    expected = {}
    for seed, code in enumerate(("cy", "br"), 1):
        folder = make_adapter(code, seed=seed)
        published = publish_adapter(folder, base_model=BASE, license="cc0-1.0", api=hub.api("hf_alice"))
        registry.add(RegistryEntry(code, None, Pinned(published.repo_id, published.sha)))
        expected[code] = Transcriber.from_pretrained(tiny_folder, folder, "cpu").transcribe(recording, language=code).text
    base_alone = Transcriber.from_pretrained(tiny_folder, device="cpu").transcribe(recording, language="cy").text
    assert len({expected["cy"], expected["br"], base_alone}) == 3
    registry.add(RegistryEntry("gl", None, Pinned("alice/nowhere", "0" * 40)))

    def transcribe(*languages: str) -> tuple[list[dict[str, Any]], list[float]]:
        arguments = [str(tiny_folder), str(registry.path), str(recording), *languages]
        *rows, waited = run(TRANSCRIBE, *arguments, env=hub.environment()).splitlines()
        return [json.loads(row) for row in rows], json.loads(waited)

    hub.requests.clear()
    [cy, gl], waited = transcribe("cy", "gl")
    assert (cy["text"], cy["adapter"], cy["warnings"]) == (expected["cy"], "cy", [])
    assert "heard" in cy["reason"]
    assert gl["adapter"] is None  # nothing is skipped in silence: the base writes, and the transcript says why
    assert "alice/nowhere@" in gl["warnings"][0]
    assert "is not on the Hub, or it is private" in gl["warnings"][0]
    assert hub.count("GET", "/storage/") == 1  # Welsh was heard; Breton was not, and is not asked for
    assert waited
    with no_network(hub):
        [again], waited = transcribe("cy")
    assert (again["text"], again["adapter"], again["warnings"]) == (expected["cy"], "cy", [])
    assert waited == []  # a commit that is in the cache asks nobody, so nothing is waited for
