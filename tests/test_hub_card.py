"""The adapter card, read back by the Hub client's own parser and by Python: metadata, numbers, snippets, refusals."""

import ast
import json
import re
import warnings

import pytest
import yaml
from huggingface_hub import ModelCard

from hub_utils import AdapterCardData, render_card
from hub_utils.card import POCKET

RUN = {
    "format": 1,
    "name": "cy",
    "language": "cy",
    "domain": None,
    "carrier": None,
    "base_model": "openai/whisper-small",
    "base_signature": {},
    "num_parameters": 53_760,
    "train_data": "Common Voice sentences | read by espeak-ng",
    "metrics": {
        "test_set": "held-out voices (test)",
        "normalizer": "mark-preserving",
        "before": {"wer": 1.0423, "cer": 0.5, "clips": 1200},
        "after": {"wer": 0.21, "cer": 0.08, "clips": 1200},
    },
    "training": {"steps": 400, "learning_rate": 1e-4, "history": [1, 2, 3]},
}
PEFT_CONFIG = {"peft_type": "S2LORA", "r": 32, "target_modules": ["v_proj", "q_proj"], "share_scope": "shape"}


@pytest.fixture
def adapter_folder(tmp_path):
    """Writes an adapter folder as a run leaves it, with some entries changed."""

    def write(config=PEFT_CONFIG, **changes):
        (tmp_path / "language_adapter.json").write_text(json.dumps(RUN | changes), encoding="utf-8")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (tmp_path / "adapter_model.safetensors").write_bytes(bytes(216_000))
        return tmp_path

    return write


def test_the_hub_finds_the_adapter_by_its_metadata(adapter_folder):
    data = ModelCard(render_card(adapter_folder(), language_name="Welsh", license="cc-by-4.0")).data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "automatic-speech-recognition"
    assert data.base_model == "openai/whisper-small"
    assert data.base_model_relation == "adapter"
    assert data.language == ["cy"]
    assert data.license == "cc-by-4.0"
    assert {"peft", "whisper", "s2-lora", "base_model:adapter:openai/whisper-small"} <= set(data.tags)


def test_the_model_index_carries_the_rates_after_training_in_percent(adapter_folder):
    data = ModelCard(render_card(adapter_folder(), license="cc0-1.0")).data
    results = {result.metric_type: result for result in data.eval_results}
    assert results["wer"].metric_value == pytest.approx(21.0)
    assert results["cer"].metric_value == pytest.approx(8.0)
    assert results["wer"].dataset_name == "held-out voices (test)"
    assert "mark-preserving" in results["cer"].metric_name
    assert results["wer"].task_type == "automatic-speech-recognition"


@pytest.mark.parametrize(("language", "on_the_hub"), [("no", "no"), ("qug", "qug"), ("jw", "jv")])
def test_language_codes_arrive_as_text(adapter_folder, language, on_the_hub):
    """Bare `no` is False in YAML, and the Hub knows Javanese as `jv`."""
    card = render_card(adapter_folder(language=language), license="cc0-1.0")
    assert yaml.safe_load(card.split("---\n")[1])["language"] == [on_the_hub]


def test_the_text_shows_before_after_data_method_and_size(adapter_folder):
    text = ModelCard(render_card(adapter_folder(), language_name="Welsh", license="cc0-1.0")).text
    assert "| base model alone | 104.2 % | 50.0 % | 1,200 |" in text
    assert "| with this adapter | 21.0 % | 8.0 % | 1,200 |" in text
    assert "CER changed by -84%" in text
    assert "Welsh (`cy`)" in text
    assert "53,760 parameters, 216 kB" in text
    assert "| target modules | q_proj, v_proj |" in text
    assert r"| data | Common Voice sentences \| read by espeak-ng |" in text
    assert "history" not in text


def test_what_the_run_was_told_reaches_the_card(adapter_folder):
    told = {"license": "cc-by-4.0", "limits": "One reader only.", "command": "whisper-moe train --language cy"}
    card = ModelCard(render_card(adapter_folder(training={"steps": 400} | told)))
    assert card.data.license == "cc-by-4.0"
    assert "- One reader only." in card.text
    assert "```bash\nwhisper-moe train --language cy\n```" in card.text
    assert ModelCard(render_card(adapter_folder(training=told), license="cc0-1.0")).data.license == "cc0-1.0"


def test_an_adapter_that_made_things_worse_says_so(adapter_folder):
    worse = RUN["metrics"] | {"after": {"wer": 1.2, "cer": 0.6, "clips": 1200}}
    text = render_card(adapter_folder(metrics=worse), license="cc0-1.0")
    assert "**The adapter does not help here:** CER changed by +20%." in text


def test_a_carrier_and_a_domain_reach_the_snippet_and_the_limits(adapter_folder):
    text = render_card(adapter_folder(name="qug-radio", language="qug", carrier="es", domain="radio"), license="cc-by-4.0")
    assert 'language="es"' in text
    assert "Whisper has no token for `qug`" in text
    assert "meant for radio speech" in text


@pytest.mark.parametrize("base_model", ["openai/whisper-small", POCKET])
@pytest.mark.parametrize("peft_type", ["S2LORA", "LORA"])
def test_the_snippets_are_python_and_import_our_tuner_only_where_peft_needs_it(adapter_folder, base_model, peft_type):
    text = render_card(adapter_folder(PEFT_CONFIG | {"peft_type": peft_type}, base_model=base_model), license="cc0-1.0")
    transcriber_snippet, peft_snippet = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {alias.name for node in ast.walk(ast.parse(peft_snippet)) if isinstance(node, ast.Import) for alias in node.names}
    assert ("peft_s2lora" in names) == (peft_type == "S2LORA")
    assert ("pocket.MODEL" in transcriber_snippet) == (base_model == POCKET)
    ast.parse(transcriber_snippet)


def test_the_pocket_is_not_claimed_to_be_a_model_of_the_hub(adapter_folder):
    card = render_card(adapter_folder(base_model=POCKET), license="cc0-1.0")
    data = ModelCard(card).data
    assert data.base_model is None
    assert not [tag for tag in data.tags if tag.startswith("base_model:")]
    assert f"`{POCKET}`" in card


def test_what_the_run_did_not_record_is_left_out_with_one_warning(adapter_folder):
    folder = adapter_folder(metrics={}, train_data=None, base_model="/somewhere/model")
    with pytest.warns(UserWarning, match="train_data, license, metrics before, metrics after, a Hub id") as caught:
        card = render_card(folder)
    assert len(caught) == 1
    data = ModelCard(card).data
    assert data.license is None
    assert data.eval_results is None
    assert data.base_model is None
    assert "Not measured." in card
    assert "Licence: not stated" in card


def test_a_complete_run_warns_of_nothing(adapter_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render_card(adapter_folder(), license="cc0-1.0")


@pytest.mark.parametrize("missing", ["language_adapter.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_refused_with_the_missing_file(adapter_folder, missing):
    folder = adapter_folder()
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"not an adapter folder: {re.escape(missing)}"):
        render_card(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"metrics": {"after": {"wer": "good", "cer": 0.1}}}, "wer is 'good'"),
        ({"metrics": {"after": {"wer": 0.1, "cer": float("nan")}}}, "cer is nan"),
        ({"metrics": {"before": {"wer": 0.1}}}, "'cer' is missing"),
        ({"metrics": {"before": {"wer": 10**400, "cer": 0.1}}}, "wer is 1000.* from 0 to 100"),
        ({"metrics": {"before": {"wer": 0.1, "cer": -0.5}}}, "cer is -0.5"),
        ({"metrics": {"after": {"wer": 0.1, "cer": 0.1, "clips": float("nan")}}}, "clips is nan"),
        ({"metrics": {"after": {"wer": 0.1, "cer": 0.1, "clips": 10**400}}}, "clips is 1000"),
    ],
)
def test_a_broken_record_is_refused_with_its_value(adapter_folder, changes, says):
    with pytest.raises(ValueError, match=says):
        AdapterCardData.from_folder(adapter_folder(**changes))


def test_json_that_is_cut_off_is_refused_with_the_file_name(adapter_folder):
    folder = adapter_folder()
    (folder / "adapter_config.json").write_text('{"peft_type": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        render_card(folder)
