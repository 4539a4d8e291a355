"""A real Whisper encoder with a decoder of our own: the proving ground of docs/evidence.md.

    python -m recipes.synthetic_speech                  # once: the packs of speech
    python -m recipes.own_decoder --cache-only          # encodes ahead of the training, on another core; may be left out
    python -m recipes.own_decoder                       # trains; resumes where it stopped; encodes what is not there yet

Where no Whisper can be had whole but its encoder can. The encoder stays frozen, so what it says to the corpus is computed once and kept
on disk (`own_decoder_data`), and a training step costs what the small decoder costs. The result loads with
`WhisperForConditionalGeneration.from_pretrained` and `WhisperProcessor.from_pretrained`, and adapters go into encoder and decoder as into
any Whisper. Two things differ from the encoder's own model: the window is 10 s, and the tokenizer is Whisper's with the tokens that
this corpus hardly uses taken out, so that no token is left untrained and a new language falls apart into pieces that are known.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from recipes.own_decoder_data import Shard, Shards, StatesSettings
from recipes.synthetic_speech import SAMPLE_RATE, read_pack
from recipes.train_pocket import IGNORED, Progress, build_generation_config, build_tokenizer, guided_attention_loss, save
from whisper_moe.evaluate import autocast, score, write_down
from whisper_moe.languages import language_posterior

MAX_TOKENS = 160  # of a text, with its prompt


@dataclass(frozen=True, kw_only=True)
class Settings(StatesSettings):
    """One training run."""

    out: Path = Path("runs/own_decoder/model")
    """Folder for the model, the checkpoint and the logs."""
    num_shards: int = 31
    """Shards the corpus is taken to have: some 30,000 clips, 40 hours."""
    turns_per_new_shard: int = 2
    """While shards are still being made, one turn in so many takes a new one and the others take one of those that are there: encoding a
    shard costs about twice what training on it does. When all have been seen, the run goes through them in a new order again and again."""
    decoder_layers: int = 3
    min_uses: int = 100
    """A token of Whisper's is kept if the texts of the corpus use it (or a longer one made of it) so often."""
    steps_per_shard: int = 20
    """Batches a shard is cut into, by length."""
    num_steps: int = 2400
    """What docs/results.md was measured with; longer runs should be better. May be raised between two parts of a run, as long as the rate
    has not begun to fall."""
    warmup_steps: int = 200
    decay_share: float = 0.4
    """Share of the steps, at the end, over which the rate falls to zero."""
    learning_rate: float = 1.5e-3
    """Of the matrices (Muon, matched to AdamW's update size); half of it for all other weights (AdamW)."""
    label_smoothing: float = 0.1
    guided_steps: int = 1500
    """Steps in which two cross-attention heads a layer are led along the diagonal, less and less."""
    token_dropout: float = 0.1
    """Share of the decoder's input tokens replaced by random ones: it must listen."""
    dropout: float = 0.1
    """In training only: the model that is written has none."""
    report_every: int = 25
    evaluate_every: int = 500
    checkpoint_every_s: float = 240
    threads: int = 1
    cache_only: bool = False
    """Make the shards and do not train."""

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, level, linear to zero: the level part can be made longer without starting again."""
        left = (self.num_steps - step) / max(1.0, self.decay_share * self.num_steps)
        return min((step + 1) / self.warmup_steps, 1.0, max(0.0, left))


# ---- tokenizer and model -----------------------------------------------------------------------------------------------


def count_words(settings: Settings) -> Counter[str]:
    """The words of the training texts that the decoder will write, as the byte-level tokenizer cuts them."""
    from tokenizers.pre_tokenizers import ByteLevel

    cut, words = ByteLevel(add_prefix_space=False), Counter[str]()
    for name in (*settings.written, *(name for name, _ in settings.recorded)):
        for row in read_pack(settings.data, name)[1]:
            if row["split"] == "train":
                words.update(word for word, _ in cut.pre_tokenize_str(" " + row["text"]))
    return words


def applied_merges(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding makes on the way from a word's bytes to its tokens, lowest rank first."""
    pieces, applied = list(word), set()
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        first = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], len(ranks)))
        if pairs[first] not in ranks:
            break
        applied.add(pairs[first])
        pieces[first : first + 2] = ["".join(pairs[first])]
    return applied


def prune_tokens(base: Path, words: Counter[str], min_uses: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of Whisper's tokenizer less what `words` need fewer than `min_uses` times; all bytes stay.

    A token is made of tokens that are made on the way to it, so they are used at least as often as it is: none is left without its parts.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    lines = (base / "merges.txt").read_text("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    uses = Counter[tuple[str, str]]()
    for word, count in words.items():
        for merge in applied_merges(word, ranks):
            uses[merge] += count
    kept = [merge for merge in merges if uses[merge] >= min_uses]
    whole: dict[str, int] = json.loads((base / "vocab.json").read_text("utf-8"))
    tokens = sorted({*ByteLevel.alphabet(), *("".join(merge) for merge in kept)}, key=whole.__getitem__)
    return {token: index for index, token in enumerate(tokens)}, kept


def build_processor(settings: Settings) -> WhisperProcessor:
    """Whisper's tokenizer, pruned, and the encoder's own mel front end with a shorter window."""
    front = json.loads((settings.base / "preprocessor_config.json").read_text("utf-8"))
    features = WhisperFeatureExtractor(
        feature_size=front["feature_size"],
        hop_length=front["hop_length"],
        n_fft=front["n_fft"],
        chunk_length=settings.window_s,
        sampling_rate=SAMPLE_RATE,
    )
    return WhisperProcessor(features, build_tokenizer(*prune_tokens(settings.base, count_words(settings), settings.min_uses)))


def build_model(settings: Settings, processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """The real encoder with an untrained decoder, in fp32; only the decoder requires gradients.

    Raises:
        ValueError: The folder lacks weights of the encoder.
    """
    to_id = processor.tokenizer.convert_tokens_to_ids
    end = to_id("<|endoftext|>")
    config = WhisperConfig.from_pretrained(settings.base)
    positions = settings.window_s * SAMPLE_RATE // processor.feature_extractor.hop_length // 2
    if positions > config.max_source_positions:
        raise ValueError(f"window_s is {settings.window_s}; the encoder in {settings.base} has {config.max_source_positions} positions.")
    changes = {
        "vocab_size": len(processor.tokenizer),
        "decoder_layers": settings.decoder_layers,
        "max_source_positions": positions,
        "max_target_positions": MAX_TOKENS,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": to_id("<|startoftranscript|>"),
        "forced_decoder_ids": None,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "init_std": 0.8 * config.d_model**-0.5,
        "median_filter_width": 7,
    }
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(settings.seed)
    model = WhisperForConditionalGeneration(config).float()
    encoder = model.model.encoder
    state = encoder_weights(settings.base)
    state["embed_positions.weight"] = state["embed_positions.weight"][:positions]  # sinusoids: a position's does not depend on how many
    encoder.load_state_dict(state)
    encoder.requires_grad_(False)
    # Guided attention reads the weights, and on a CPU, at these lengths, it is no slower. Here, for the encoder of all processes alike:
    # another implementation rounds otherwise.
    model.set_attn_implementation("eager")
    model.generation_config = build_generation_config(processor, settings.written, settings.detected_only, MAX_TOKENS)
    return model


def encoder_weights(base: Path) -> dict[str, torch.Tensor]:
    """The encoder's weights in fp32 by their names in the encoder, from `encoder.safetensors` or a whole model's file."""
    from safetensors.torch import load_file

    prefix = "model.encoder."
    for file in (base / "encoder.safetensors", base / "model.safetensors"):
        if file.exists():
            return {name.removeprefix(prefix): weight.float() for name, weight in load_file(file).items() if name.startswith(prefix)}
    raise ValueError(f"{base} holds neither encoder.safetensors nor model.safetensors. Name a Whisper's folder with --base.")


# ---- batches -----------------------------------------------------------------------------------------------------------


def shard_of_turn(settings: Settings, turn: int) -> int:
    """Which shard the training is at, when it has been at `turn` shards before."""
    newest, repeat = divmod(turn, settings.turns_per_new_shard)
    if newest < settings.num_shards:
        return newest if repeat == 0 else int(np.random.default_rng((settings.seed, turn)).integers(newest + 1))
    epoch, place = divmod(turn - settings.num_shards * settings.turns_per_new_shard, settings.num_shards)
    return int(np.random.default_rng((settings.seed, 1, epoch)).permutation(settings.num_shards)[place])


class Batches:
    """The batch of any step, the same for the same settings, so that a resumed run goes on exactly."""

    def __init__(self, settings: Settings, shards: Shards, processor: WhisperProcessor) -> None:
        self.settings, self.shards, self.tokenizer = settings, shards, processor.tokenizer
        self._open: tuple[int, Shard | None] = (-1, None)

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """Encoder states (batch, positions, d_model) with decoder inputs and labels (batch, tokens) and where the speech is."""
        settings = self.settings
        turn, place = divmod(step, settings.steps_per_shard)
        shard = self._shard(shard_of_turn(settings, turn))
        rng = np.random.default_rng((settings.seed, step))
        by_length = sorted(range(len(shard.rows)), key=lambda index: shard.rows[index]["positions"])
        parts = np.array_split(np.array(by_length), settings.steps_per_shard)
        part = parts[np.random.default_rng((settings.seed, turn)).permutation(settings.steps_per_shard)[place]].tolist()
        return {"states": shard.batch(part)} | self._tokens([shard.rows[index] for index in part], rng)

    def _shard(self, number: int) -> Shard:
        if self._open[0] != number:
            self._open = (number, None)  # the old one is let go before the new one is read
            self._open = (number, self.shards.train(number))
        shard = self._open[1]
        assert shard is not None
        return shard

    def _tokens(self, rows: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        to_id = self.tokenizer.convert_tokens_to_ids
        start, task, plain = (to_id(f"<|{name}|>") for name in ("startoftranscript", "transcribe", "notimestamps"))
        end, nospeech = to_id("<|endoftext|>"), to_id("<|nospeech|>")
        inputs, labels, spans = [], [], []
        for row in rows:
            language = to_id(f"<|{row['language']}|>")
            if not row["spoken"]:
                inputs.append([start, nospeech])
                labels.append([nospeech, end])
                spans.append((0, 0, 0))
            elif row["language"] in self.settings.detected_only:
                inputs.append([start, language, task])
                labels.append([language, task, plain])
                spans.append((0, 0, 0))
            else:
                text = self.tokenizer(" " + row["text"], add_special_tokens=False).input_ids[: MAX_TOKENS - 8]
                # Text ids lie below <|endoftext|>.
                heard = [int(rng.integers(end)) if rng.random() < self.settings.token_dropout else token for token in text]
                inputs.append([start, language, task, plain, *heard])
                labels.append([language, task, plain, *text, end])
                spans.append((row["first"], row["last"], len(text)))
        width = max(map(len, inputs))
        return {
            "inputs": torch.tensor([row + [end] * (width - len(row)) for row in inputs]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
            "spans": torch.tensor(spans, dtype=torch.float32),
        }


# ---- training ----------------------------------------------------------------------------------------------------------


def losses(
    model: WhisperForConditionalGeneration, batch: dict[str, torch.Tensor], settings: Settings, guided: bool
) -> dict[str, torch.Tensor]:
    """Cross-entropy of language token and text and the guided attention loss, each a scalar; and the accuracy of both."""
    labels = batch["labels"]
    decoded = model.model.decoder(
        input_ids=batch["inputs"], encoder_hidden_states=batch["states"], output_attentions=guided, use_cache=False
    )
    hidden = decoded.last_hidden_state  # (batch, tokens, d_model)
    asked = labels != IGNORED
    asked[:, 0] = False
    logits, text = model.proj_out(hidden[asked]).float(), labels[asked]  # (asked tokens, vocabulary): none for padding
    languages = model.proj_out(hidden[:, 0]).float()
    return {
        "text": functional.cross_entropy(logits, text, label_smoothing=settings.label_smoothing),
        "language": functional.cross_entropy(languages, labels[:, 0]),
        "attention": guided_attention_loss(decoded.cross_attentions, batch["spans"]) if guided else torch.zeros(()),
        "token_accuracy": (logits.argmax(-1) == text).float().mean(),
        "language_accuracy": (languages.argmax(-1) == labels[:, 0]).float().mean(),
    }


def build_optimizers(model: WhisperForConditionalGeneration, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder's layers, AdamW for its other weights (docs/log.md on why). Rates are set at every step."""
    decoder = dict(model.model.decoder.named_parameters())
    matrices = [weight for name, weight in decoder.items() if name.startswith("layers.") and weight.ndim == 2]
    others = [weight for name, weight in decoder.items() if not (name.startswith("layers.") and weight.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(settings: Settings, on_step: Callable[[int], None] | None = None) -> Path:
    """Train, or go on from the last checkpoint, and save the model in half precision. Returns the model's folder.

    `on_step(step)` is called after every step; what it raises ends the run, as if it were interrupted there.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor(settings)
    model = build_model(settings, processor).to(device)
    decoder = model.model.decoder
    for module in (decoder, *decoder.layers):
        module.dropout = settings.dropout  # not in the config: who trains adapters later has not asked for it
    shards = Shards(settings, model.eval(), processor)
    dev = shards.dev()
    decoder.train()
    optimizers = build_optimizers(model, settings)
    parts_of_state: dict[str, Any] = {"decoder": decoder} | {f"optimizer{index}": optimizer for index, optimizer in enumerate(optimizers)}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    checkpoint, step = settings.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        for name, part in parts_of_state.items():
            part.load_state_dict(state[name])
        step = state["step"]
        print(f"going on from step {step}", flush=True)
    batches, progress = Batches(settings, shards, processor), Progress()
    started = saved = time.monotonic()
    while step < settings.num_steps:
        batch = {name: value.to(device) for name, value in batches.at(step).items()}
        torch.manual_seed(settings.seed + step)  # dropout, the same after a resume
        guidance = max(0.0, 1 - step / max(1, settings.guided_steps))
        with autocast(device.type):
            parts = losses(model, batch | {"states": batch["states"].float()}, settings, guidance > 0)
        (parts["text"] + 0.3 * parts["language"] + 2 * guidance * parts["attention"]).backward()
        parts["gradient_norm"] = nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * settings.learning_rate_factor(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.add(parts)
        if step % settings.report_every == 0:
            rate = optimizers[0].param_groups[0]["lr"]
            _note(settings, {"step": step, "lr": rate, **progress.flush(), "elapsed_s": round(time.monotonic() - started)})
        if step % settings.evaluate_every == 0 or step == settings.num_steps:
            _note(settings, {"step": step, "dev": look(model, processor, dev, settings)})
        if time.monotonic() - saved > settings.checkpoint_every_s or step == settings.num_steps:
            state = {name: part.state_dict() for name, part in parts_of_state.items()} | {"step": step}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(model, processor, settings)
            saved = time.monotonic()
        if on_step is not None:
            on_step(step)
    return settings.out


def _note(settings: Settings, line: dict[str, Any]) -> None:
    with open(settings.out / "log.jsonl", "a") as log:
        log.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(line, flush=True)


def look(model: WhisperForConditionalGeneration, processor: WhisperProcessor, dev: Shard, settings: Settings) -> dict[str, dict[str, Any]]:
    """Word and character error rates of the dev clips and the share whose language is heard, by pack. Few clips: a look, no result."""
    from transformers.modeling_outputs import BaseModelOutput

    by_pack: dict[str, list[int]] = {}
    for index, row in enumerate(dev.rows):
        by_pack.setdefault(row["pack"], []).append(index)
    candidates = [*settings.written, *settings.detected_only]
    seen: dict[str, dict[str, Any]] = {}
    model.eval()
    for pack, indices in sorted(by_pack.items()):
        language = dev.rows[indices[0]]["language"]
        encoded = BaseModelOutput(last_hidden_state=dev.batch(indices).float().to(model.device))
        with torch.no_grad(), autocast(model.device.type):
            heard = [posterior.best[0] for posterior in language_posterior(model, None, allowed=candidates, encoder_outputs=encoded)]
            texts = write_down(model, processor, encoded, language) if language in settings.written else None
        seen[pack] = {"detected": round(heard.count(language) / len(heard), 2)}
        if texts is not None:
            scores = score([dev.rows[index]["text"] for index in indices], texts, language=language)
            seen[pack] |= {"wer": round(scores.wer, 3), "cer": round(scores.cer, 3), "example": texts[0]}
    model.model.decoder.train()
    return seen


# ---- command -----------------------------------------------------------------------------------------------------------


def make_shards(settings: Settings) -> None:
    """Encode all shards that are not there, one after the other."""
    torch.set_num_threads(settings.threads)
    processor = build_processor(settings)
    shards = Shards(settings, build_model(settings, processor).eval(), processor)
    shards.dev()
    for number in range(settings.num_shards):
        if not shards.has(number):
            started, spent = time.monotonic(), time.process_time()
            rows = shards.train(number).rows
            took, work = time.monotonic() - started, time.process_time() - spent
            seconds = sum(row["positions"] for row in rows) * 0.02
            print(f"shard {number}: {len(rows)} clips, {seconds:.0f} s encoded in {took:.0f} s ({work:.0f} s of a core)", flush=True)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings)
    if settings.cache_only:
        make_shards(settings)
    else:
        train(settings)


if __name__ == "__main__":
    main()
