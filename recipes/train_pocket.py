"""Train the pocket Whisper from nothing: a real Whisper architecture, small enough to ship, on synthetic and recorded speech.

    python -m recipes.synthetic_speech                                                   # once, a quarter of an hour
    python -m recipes.train_pocket --data runs/pocket/data --out runs/pocket/model       # resumes where it stopped
    python -m recipes.train_pocket --start whisper_moe/pocket/model ...                  # trains a finished model further

The result loads with `WhisperForConditionalGeneration.from_pretrained` and `WhisperProcessor.from_pretrained`. Training adds
what inference does not need: a CTC head on the encoder (it teaches the alignment early; Watanabe et al. 2017, hybrid
CTC/attention), windows cropped to the speech in them for most steps, noise, echo and SpecAugment. Languages in
`detected_only` teach the language token alone: the pocket hears that it is Welsh, as Whisper hears many languages that it
cannot write, and an adapter teaches the writing. Bigger: raise `d_model`, the layers, `num_steps`; a GPU is used if there is one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from recipes.synthetic_speech import SAMPLE_RATE, clean_sentence, read_pack
from whisper_moe.cropped_encoder import encode_cropped

IGNORED = -100  # label that the loss leaves out


@dataclass(frozen=True)
class Settings:
    """One training run. Sizes are those of the shipped pocket."""

    data: Path
    """Folder of packs (`recipes.synthetic_speech`)."""
    out: Path
    """Folder for the model, the checkpoint and the log."""
    text: Path = Path("../shared/text")
    """Sentence lists the tokenizer is trained on."""
    start: Path | None = None
    """A model of this recipe to train further, with its tokenizer; the schedule begins anew. None: from nothing."""
    written: tuple[str, ...] = ("en", "de", "es", "fr", "it", "nl", "pl", "pt")
    """Languages the pocket writes."""
    detected_only: tuple[str, ...] = ("cy", "fi", "tr", "sv", "ca")
    """Languages the pocket detects and does not write."""
    recorded: tuple[tuple[str, float], ...] = (("de_kerstin", 0.5), ("en_kathleen", 0.5), ("en_speechocean_adult", 0.5))
    """Packs of recorded speech and how often to draw them; a written synthetic language counts 1."""
    detected_weight: float = 0.12
    """How often to draw a language of `detected_only`."""
    nospeech_share: float = 0.03
    """Share of clips that are silence or noise."""
    d_model: int = 256
    num_heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 3
    num_merges: int = 1000
    """Byte-pair merges of the tokenizer."""
    window_s: int = 10
    hop_length: int = 320
    """Samples between two mel frames: 20 ms, so an encoder position is 40 ms (Whisper's: 20 ms) and costs half."""
    n_fft: int = 512
    batch_size: int = 40
    num_steps: int = 4000
    warmup_steps: int = 150
    learning_rate: float = 2e-3
    """Of the matrices (Muon, matched to AdamW's update size); half of it for all other weights (AdamW)."""
    ctc_weight: float = 0.3
    label_smoothing: float = 0.1
    guided_attention_share: float = 0.4
    """Share of the run in which two cross-attention heads a layer are led along the diagonal, less and less."""
    token_dropout: float = 0.1
    """Share of the decoder's input tokens replaced by random ones: it must listen."""
    dropout: float = 0.0
    """Off: clips are seen about twice, and drawing masks costs a tenth of the step on a CPU."""
    seed: int = 0
    checkpoint_every_s: float = 240
    report_every: int = 50
    threads: int = 2

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a decay to zero."""
        return min((step + 1) / self.warmup_steps, max(0.0, 1 - step / self.num_steps) ** 0.75)

    def augmented_share(self, step: int) -> float:
        """Share of the clips that are disturbed: none while the first alignments form, later two in five."""
        return min(0.4, max(0.0, step / self.num_steps - 0.1) * 3)


# ---- tokenizer and model -----------------------------------------------------------------------------------------------


def build_processor(settings: Settings) -> WhisperProcessor:
    """A byte-level BPE tokenizer with Whisper's special and language tokens in Whisper's order, and the mel front end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from recipes.synthetic_speech import ACCENTS

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + settings.num_merges, initial_alphabet=alphabet, show_progress=False)
    sentences = [
        clean_sentence(line)
        for code in settings.written + settings.detected_only
        for line in (settings.text / f"{ACCENTS[code][0]}.txt").read_text("utf-8").splitlines()
    ]
    bpe.train_from_iterator([f" {sentence}" for sentence in sentences], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = build_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    features = WhisperFeatureExtractor(
        hop_length=settings.hop_length, n_fft=settings.n_fft, chunk_length=settings.window_s, sampling_rate=SAMPLE_RATE
    )
    return WhisperProcessor(features, tokenizer)


def build_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> WhisperTokenizer:
    """Whisper's byte-level tokenizer with this vocabulary, and behind it Whisper's special and language tokens in Whisper's order."""
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges)
    languages = [f"<|{code}|>" for code in LANGUAGES]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks]})
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def build_model(settings: Settings, processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """The untrained model, with a generation config as Whisper's: language and task tokens, nothing forced."""
    to_id = processor.tokenizer.convert_tokens_to_ids
    end, start = to_id("<|endoftext|>"), to_id("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(processor.tokenizer),
        d_model=settings.d_model,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=settings.num_heads,
        decoder_attention_heads=settings.num_heads,
        encoder_ffn_dim=4 * settings.d_model,
        decoder_ffn_dim=4 * settings.d_model,
        max_source_positions=settings.window_s * SAMPLE_RATE // settings.hop_length // 2,
        max_target_positions=160,
        dropout=settings.dropout,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        init_std=0.8 * settings.d_model**-0.5,
    )
    torch.manual_seed(settings.seed)
    model = WhisperForConditionalGeneration(config)
    for conv in (model.model.encoder.conv1, model.model.encoder.conv2):
        # Whisper adds sinusoids of amplitude 1 to what the convolutions give. At the usual initialisation that sum is nine
        # tenths position, and a run of 400 steps had learnt next to nothing.
        nn.init.normal_(conv.weight, std=2.0 * (conv.in_channels * 3) ** -0.5)
    model.generation_config = build_generation_config(processor, settings.written, settings.detected_only)
    return model


def build_generation_config(
    processor: WhisperProcessor, written: tuple[str, ...], detected_only: tuple[str, ...], max_length: int = 160
) -> GenerationConfig:
    """As Whisper's: language and task tokens, nothing forced; and which languages the base writes and hears."""
    to_id = processor.tokenizer.convert_tokens_to_ids
    end = to_id("<|endoftext|>")
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": to_id(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: to_id(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=to_id("<|notimestamps|>"),
        prev_sot_token_id=to_id("<|startofprev|>"),
        decoder_start_token_id=to_id("<|startoftranscript|>"),
        eos_token_id=end,
        pad_token_id=end,
        max_length=max_length,
        return_timestamps=False,
        written_languages=list(written),  # what the transcriber may say of the base
        heard_languages=[*written, *detected_only],
    )


# ---- clips -> batches --------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """A clip of a pack: where its samples are and what is said."""

    pack: str
    offset: int
    samples: int
    text: str
    language: str


def ctc_symbols(settings: Settings) -> dict[str, int]:
    """The letters of the written languages, lower case, numbered: the CTC head's targets. Its last output is the blank."""
    from recipes.synthetic_speech import ACCENTS

    lines = (line for code in settings.written for line in (settings.text / f"{ACCENTS[code][0]}.txt").read_text("utf-8").splitlines())
    letters = sorted({letter for line in lines for letter in clean_sentence(line).lower() if letter.isalpha()})
    return {letter: index for index, letter in enumerate(letters)}


def read_clips(settings: Settings, split: str) -> tuple[dict[str, np.ndarray], dict[str, list[Clip]]]:
    """Samples and clips of one split, by pack."""
    samples, clips = {}, {}
    for name in (*settings.written, *settings.detected_only, *(name for name, _ in settings.recorded)):
        samples[name], rows = read_pack(settings.data, name)
        clips[name] = [Clip(name, row["offset"], row["samples"], row["text"], row["language"]) for row in rows if row["split"] == split]
    return samples, clips


class Noise:
    """Noise with power spectra of 1/f^k, k from 0 (white) to 2 (brown), made once and cut at random places."""

    def __init__(self, seed: int, duration_s: int = 40) -> None:
        rng, length = np.random.default_rng(seed), 1 << (duration_s * SAMPLE_RATE).bit_length()
        bins = np.maximum(np.arange(length // 2 + 1), 1.0)
        self.kinds = []
        for k in (0.0, 0.5, 1.0, 1.5, 2.0):
            noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * bins ** (-k / 2), length)
            self.kinds.append((noise / noise.std()).astype(np.float32))

    def draw(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(length,) samples of about unit variance."""
        noise = self.kinds[rng.integers(len(self.kinds))]
        at = int(rng.integers(len(noise) - length))
        return noise[at : at + length]


def augment(samples: np.ndarray, noise: Noise, rng: np.random.Generator) -> np.ndarray:
    """Speed (formants and pitch move with it), echo, spectral tilt, noise and gain, each drawn by `rng`. (samples,)"""
    if rng.random() < 0.3:
        samples = soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE * rng.uniform(0.87, 1.14), quality="QQ")
    if rng.random() < 0.3:
        length = int(SAMPLE_RATE * rng.uniform(0.05, 0.3))
        echo = rng.standard_normal(length, np.float32) * np.exp(np.linspace(0, -6.9, length, dtype=np.float32))
        echo *= rng.uniform(0.02, 0.25)
        echo[0] = 1.0
        size = 1 << (len(samples) + length).bit_length()
        samples = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(echo, size), size)[: len(samples)]
    if rng.random() < 0.4:
        tilted = samples.copy()
        tilted[1:] -= np.float32(rng.uniform(-0.5, 0.9)) * samples[:-1]
        samples = tilted
    samples = samples * np.float32(rng.uniform(0.05, 0.95) / (np.abs(samples).max() + 1e-6))
    if rng.random() < 0.6:
        samples = samples + noise.draw(len(samples), rng) * np.float32(samples.std() * 10 ** (-rng.uniform(8, 38) / 20))
    return samples


class Batches(IterableDataset):
    """Endless batches of similar length, the same for the same seed and step, so that a resumed run goes on exactly."""

    def __init__(self, settings: Settings, processor: WhisperProcessor, first_step: int) -> None:
        self.settings, self.processor, self.first_step = settings, processor, first_step
        self.noise, self.symbols = Noise(settings.seed), ctc_symbols(settings)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        settings, pool_batches = self.settings, 40
        samples, clips = read_clips(settings, "train")
        weights = dict.fromkeys(settings.written, 1.0) | dict.fromkeys(settings.detected_only, settings.detected_weight)
        weights |= dict(settings.recorded)
        names = list(weights)
        shares = np.array([weights[name] for name in names]) / sum(weights.values())
        pool = self.first_step // pool_batches
        skipped = self.first_step % pool_batches
        while True:
            rng = np.random.default_rng((settings.seed, pool))
            drawn = rng.choice(len(names), settings.batch_size * pool_batches, p=shares)
            chosen = [clips[names[index]][rng.integers(len(clips[names[index]]))] for index in drawn]
            chosen.sort(key=lambda clip: clip.samples)
            for batch in rng.permutation(pool_batches)[skipped:]:
                batch_rng = np.random.default_rng((settings.seed, pool, int(batch)))
                start = int(batch) * settings.batch_size
                yield self.collate(chosen[start : start + settings.batch_size], samples, batch_rng, pool * pool_batches)
            pool, skipped = pool + 1, 0

    def collate(self, clips: list[Clip], samples: dict[str, np.ndarray], rng: np.random.Generator, step: int) -> dict:
        """Augmented features (batch, n_mels, frames) with decoder inputs, labels (batch, tokens) and CTC targets."""
        settings, tokenizer = self.settings, self.processor.tokenizer
        to_id = tokenizer.convert_tokens_to_ids
        start, task, plain = (to_id(f"<|{name}|>") for name in ("startoftranscript", "transcribe", "notimestamps"))
        end, nospeech = tokenizer.eos_token_id, to_id("<|nospeech|>")
        waves: list[np.ndarray] = []
        inputs: list[list[int]] = []
        labels: list[list[int]] = []
        ctc_targets: list[list[int]] = []
        spans: list[tuple[int, int, int]] = []
        for clip in clips:
            wave: np.ndarray = samples[clip.pack][clip.offset : clip.offset + clip.samples].astype(np.float32) / 32768
            language, text = to_id(f"<|{clip.language}|>"), tokenizer(" " + clip.text, add_special_tokens=False).input_ids[:150]
            if rng.random() < settings.nospeech_share:
                level = 10 ** rng.uniform(-6, -0.5)
                waves.append(self.noise.draw(len(wave), rng) * np.float32(level * (rng.random() < 0.8)))
                inputs.append([start, nospeech])
                labels.append([nospeech, end])
                ctc_targets.append([])
                spans.append((0, 0, 0))
                continue
            silence = np.zeros(int(rng.uniform(0, 0.4) * SAMPLE_RATE) if rng.random() < 0.5 else 0, np.float32)
            wave = np.concatenate([silence, wave])
            waves.append(augment(wave, self.noise, rng) if rng.random() < settings.augmented_share(step) else wave)
            heard = [
                int(rng.integers(end)) if rng.random() < settings.token_dropout else token for token in text
            ]  # text ids lie below <|endoftext|>
            spans.append((len(silence), len(waves[-1]), len(text)))
            inputs.append([start, language, task, plain, *heard])
            written = clip.language not in settings.detected_only
            labels.append([language, task, plain, *text, end] if written else [language, task, plain] + [IGNORED] * (len(text) + 1))
            letters = [self.symbols[letter] for letter in clip.text.lower() if letter in self.symbols]
            ctc_targets.append(letters if written else [])
        window = settings.window_s * SAMPLE_RATE
        longest = min(window, max(len(wave) for wave in waves) + int(rng.uniform(0, 0.4) * SAMPLE_RATE))
        if rng.random() < (0.02 if step < 0.9 * settings.num_steps else 0.3):
            longest = window
        longest = -(-longest // (2 * settings.hop_length)) * 2 * settings.hop_length
        batch = np.zeros((len(waves), longest), np.float32)
        for row, wave in enumerate(waves):
            batch[row, : min(len(wave), longest)] = wave[:longest]
        features = self.processor.feature_extractor(
            list(batch), sampling_rate=SAMPLE_RATE, padding="longest", truncation=False, return_tensors="pt"
        ).input_features
        for row, wave in enumerate(waves):  # SpecAugment (Park et al. 2019)
            if rng.random() > settings.augmented_share(step):
                continue
            frames = max(1, len(wave) // settings.hop_length)
            for _ in range(2):
                low, width = int(rng.integers(80)), int(rng.integers(0, 13))
                features[row, low : low + width] = 0
                at, length = int(rng.integers(frames)), int(rng.integers(0, max(1, min(16, frames // 10)) + 1))
                features[row, :, at : at + length] = 0
        width = max(len(row) for row in inputs)
        return {
            "features": features,
            "inputs": torch.tensor([row + [end] * (width - len(row)) for row in inputs]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
            "ctc_targets": torch.tensor([token for row in ctc_targets for token in row]),
            "ctc_lengths": torch.tensor([len(row) for row in ctc_targets]),
            "spans": torch.tensor(spans, dtype=torch.float32) / torch.tensor([2.0 * settings.hop_length] * 2 + [1.0]),
        }


# ---- training ----------------------------------------------------------------------------------------------------------


def guided_attention_loss(cross_attentions: tuple[torch.Tensor, ...], spans: torch.Tensor) -> torch.Tensor:
    """How far two heads of every layer look from where a token would be at an even rate of speech (Tachibana et al. 2018).

    cross_attentions: a layer each, (batch, heads, tokens, positions); spans: (batch, 3), first and last position of the
    speech and the number of text tokens, whose first is predicted behind the four tokens of the prompt.
    """
    tokens, positions = cross_attentions[0].shape[2:]
    first, last, length = (column[:, None, None] for column in spans.T)  # (batch, 1, 1)
    token = torch.arange(tokens, device=spans.device)[None, :, None] - 3.0
    expected = (token + 0.5) / length.clamp(min=1)
    position = (torch.arange(positions, device=spans.device)[None, None, :] - first) / (last - first).clamp(min=1)
    distance = 1 - torch.exp(-((expected - position) ** 2) / (2 * 0.12**2))  # (batch, tokens, positions)
    asked = ((token >= 0) & (token < length)).float()  # (batch, tokens, 1)
    looked = sum(weights[:, :2].float().mean(1) for weights in cross_attentions) / len(cross_attentions)
    return (looked * distance * asked).sum() / asked.sum().clamp(min=1)


def losses(
    model: WhisperForConditionalGeneration, ctc_head: nn.Linear, batch: dict, settings: Settings, guided: bool
) -> dict[str, torch.Tensor]:
    """Cross-entropy of language token and text, CTC of the encoder and the guided attention loss, each a scalar; and the
    language accuracy."""
    encoded = encode_cropped(model, batch["features"])
    decoded = model.model.decoder(input_ids=batch["inputs"], encoder_hidden_states=encoded, output_attentions=guided)
    hidden = decoded.last_hidden_state
    logits = model.proj_out(hidden).float()  # (batch, tokens, vocabulary)
    labels = batch["labels"]
    text_loss = functional.cross_entropy(
        logits[:, 1:].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, label_smoothing=settings.label_smoothing
    )
    language_loss = functional.cross_entropy(logits[:, 0], labels[:, 0])
    blank = ctc_head.out_features - 1
    log_probs = ctc_head(encoded).float().log_softmax(-1).transpose(0, 1)  # (positions, batch, vocabulary)
    positions = torch.full((len(labels),), log_probs.shape[0], dtype=torch.long)
    spoken = batch["ctc_lengths"] > 0
    ctc_loss = functional.ctc_loss(
        log_probs[:, spoken], batch["ctc_targets"], positions[spoken], batch["ctc_lengths"][spoken], blank=blank, zero_infinity=True
    )
    accuracy = (logits[:, 0].argmax(-1) == labels[:, 0]).float().mean()
    attention = guided_attention_loss(decoded.cross_attentions, batch["spans"]) if guided else torch.zeros(())
    return {"text": text_loss, "language": language_loss, "ctc": ctc_loss, "attention": attention, "language_accuracy": accuracy}


@dataclass
class Progress:
    """Running means since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        self.count += 1
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def flush(self) -> dict[str, float]:
        means = {name: round(value / self.count, 4) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def train(settings: Settings) -> Path:
    """Train, or go on from the last checkpoint, and save the model in half precision. Returns the model's folder."""
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    random.seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor(settings) if settings.start is None else WhisperProcessor.from_pretrained(settings.start)
    model = build_model(settings, processor)
    if settings.start is not None:
        finished = WhisperForConditionalGeneration.from_pretrained(settings.start, dtype=torch.float32)
        model.load_state_dict(finished.state_dict())  # refuses a model of other sizes; the CTC head is not kept and begins anew
    model.to(device).train()
    model.set_attn_implementation("eager")  # guided attention reads the weights; and on a CPU, at these lengths, it is faster
    ctc_head = nn.Linear(settings.d_model, len(ctc_symbols(settings)) + 1).to(device)
    weights = [*model.parameters(), *ctc_head.parameters()]
    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    others = [weight for weight in weights if weight.requires_grad and all(weight is not matrix for matrix in matrices)]
    optimizers = [
        # Muon (Jordan et al. 2024): faster per step than AdamW alone in a first, blurred comparison (docs/log.md).
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_factor) for optimizer in optimizers]
    parts_of_state = {"model": model, "ctc_head": ctc_head}
    parts_of_state |= {f"optimizer{index}": optimizer for index, optimizer in enumerate(optimizers)}
    parts_of_state |= {f"schedule{index}": schedule for index, schedule in enumerate(schedules)}
    checkpoint, step = settings.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        for name, part in parts_of_state.items():
            part.load_state_dict(state[name])
        step = state["step"]
        print(f"going on from step {step}", flush=True)
    loader = iter(DataLoader(Batches(settings, processor, step), batch_size=None, num_workers=1, prefetch_factor=8))
    progress, started, saved = Progress(), time.monotonic(), time.monotonic()
    while step < settings.num_steps:
        batch = {name: value.to(device) for name, value in next(loader).items()}
        torch.manual_seed(settings.seed + step)  # dropout, the same after a resume
        guidance = max(0.0, 1 - step / (settings.guided_attention_share * settings.num_steps))
        with torch.autocast(device.type, torch.bfloat16):
            parts = losses(model, ctc_head, batch, settings, guidance > 0)
        total = (1 - settings.ctc_weight) * parts["text"] + 0.3 * parts["language"] + settings.ctc_weight * parts["ctc"]
        total = total + 2 * guidance * parts["attention"]
        total.backward()
        parts["gradient_norm"] = nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.add(parts)
        if step % settings.report_every == 0:
            line = {"step": step, "lr": schedules[0].get_last_lr()[0], **progress.flush(), "elapsed_s": round(time.monotonic() - started)}
            with open(settings.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if time.monotonic() - saved > settings.checkpoint_every_s or step == settings.num_steps:
            state = {name: part.state_dict() for name, part in parts_of_state.items()} | {"step": step}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(model, processor, settings)
            saved = time.monotonic()
    return settings.out


def save(model: WhisperForConditionalGeneration, processor: WhisperProcessor, settings: Any) -> None:
    """Write the model in half precision (the one in training stays as it is), the processor and the settings (a dataclass) into
    `settings.out`."""
    half = {name: weight.detach().half() for name, weight in model.state_dict().items()}
    model.save_pretrained(settings.out, state_dict=half)
    config = json.loads((settings.out / "config.json").read_text())
    (settings.out / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(settings.out)
    recorded = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    (settings.out / "training.json").write_text(json.dumps(recorded, indent=2) + "\n")


def main() -> None:
    import tyro

    train(tyro.cli(Settings))


if __name__ == "__main__":
    main()
