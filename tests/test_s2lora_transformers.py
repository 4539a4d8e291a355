"""S2-LoRA through transformers' own doors: add_adapter, load_adapter, from_pretrained on an adapter folder, Trainer checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, PeftModelForSeq2SeqLM, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from tuner_behaviours import CASES, Utterances, output

from peft_s2lora import S2LoraCallback, S2LoraConfig, s2lora_param_groups

WHISPER = CASES["whisper"]


def coefficients(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "s2lora_coefficients" in name])


@pytest.fixture
def saved(tmp_path):
    """An adapter folder and its logits."""
    model = get_peft_model(WHISPER.base(), S2LoraConfig(r=4, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", output(model, WHISPER.inputs)


def test_load_adapter_of_a_transformers_model(saved):
    folder, expected = saved
    model = WHISPER.base()
    model.load_adapter(str(folder))
    assert torch.equal(output(model, WHISPER.inputs), expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "s2lora_" in name)
    model.disable_adapters()
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_an_adapter_added_by_a_transformers_model_is_saved_and_loaded(tmp_path):
    model = WHISPER.base()
    model.add_adapter(S2LoraConfig(r=4, init_weights=False), "mine")
    expected = output(model, WHISPER.inputs)
    assert {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad} == {"mine"}
    model.save_pretrained(tmp_path)
    loaded = WHISPER.base()
    loaded.load_adapter(str(tmp_path), "mine")
    assert torch.equal(output(loaded, WHISPER.inputs), expected)
    assert len([key for key in load_file(tmp_path / "adapter_model.safetensors") if "s2lora_A" in key]) == 1
    model.delete_adapter("mine")
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))


def test_two_adapters_of_a_transformers_model_switch(saved):
    folder, expected = saved
    model = WHISPER.base()
    model.load_adapter(str(folder), "first")
    model.add_adapter(S2LoraConfig(r=2), "second")
    assert torch.equal(output(model, WHISPER.inputs), output(WHISPER.base(), WHISPER.inputs))
    model.set_adapter("first")
    assert torch.equal(output(model, WHISPER.inputs), expected)


def test_from_pretrained_on_an_adapter_folder_brings_base_and_adapter(saved, tmp_path):
    folder, expected = saved
    WHISPER.base().save_pretrained(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert torch.equal(output(model, WHISPER.inputs), expected)


def test_a_task_type_gives_the_matching_peft_model(tmp_path):
    case = CASES["encoder_decoder"]
    model = get_peft_model(case.base(), S2LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", init_weights=False))
    assert isinstance(model, PeftModelForSeq2SeqLM)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(case.base(), tmp_path), case.inputs), output(model, case.inputs))


def test_a_trained_token_row_is_saved(tmp_path):
    config = S2LoraConfig(r=4, init_weights=False, trainable_token_indices={"embed_tokens": [5, 7]})
    model = get_peft_model(WHISPER.base(), config)
    name, rows = next((name, p) for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert rows.requires_grad, name
    with torch.no_grad():
        rows.add_(1)
    expected = output(model, WHISPER.inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(WHISPER.base(), tmp_path), WHISPER.inputs), expected)


def trainer(model: PeftModel, folder, steps: int) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, seed=1,
        label_names=["labels"], remove_unused_columns=False, lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.Adam(s2lora_param_groups(model, lr=0.01))
    return Seq2SeqTrainer(model, arguments, train_dataset=Utterances(), optimizers=(optimizer, None), callbacks=[S2LoraCallback()])


def test_a_run_resumed_from_a_checkpoint_ends_where_the_whole_run_ends(tmp_path):
    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(WHISPER.base(), S2LoraConfig(r=4, sparsity_weight=0.1))

    whole = fresh()
    trainer(whole, tmp_path / "whole", 4).train()
    trainer(fresh(), tmp_path / "parts", 2).train()
    resumed = fresh()
    trainer(resumed, tmp_path / "parts", 4).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert torch.allclose(coefficients(resumed), coefficients(whole), atol=1e-6)
    assert coefficients(whole).abs().sum() > 0
    loaded = PeftModel.from_pretrained(WHISPER.base(), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(output(loaded, WHISPER.inputs), output(whole, WHISPER.inputs))


def test_an_adapter_file_with_a_stray_tensor_leaves_the_base_alone(saved):
    # PEFT loads with strict=False; a stray name is passed over, as for its own methods.
    folder, expected = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.nowhere.s2lora_coefficients": torch.ones(4)}, folder / "adapter_model.safetensors")
    assert torch.equal(output(PeftModel.from_pretrained(WHISPER.base(), folder), WHISPER.inputs), expected)
