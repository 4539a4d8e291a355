"""Greedy decoding without what surrounds it in transformers: the same tokens as `generate`, at a fraction of the cost of a step.

    decoder = GreedyDecoder(model)
    if decoder.refusal() is None:
        tokens = decoder(states, ["cy", "en"], limit=100)

A step of a small Whisper is a millisecond of arithmetic and two of Python: masks made anew, caches wrapped, processors called. Here the
prompt goes through the model's own decoder, hooks and all, and every further token through its modules one after the other, so whatever
adapters are on them take part. Keys and values are written into tensors that are as long as the text may become.

With `graphs=True` nothing ever moves: one step is recorded as a CUDA graph for each size of batch and replayed, because on a GPU the
launching of kernels is what takes the time. Adapters then come from `LanguageTable.static_rows`, and batches are filled up to a few sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional

from whisper_moe.languages import language_tokens
from whisper_moe.routed_linear import BeginDecoder

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

    from whisper_moe.language_table import LanguageTable, StaticRows

_LOOK_EVERY = 8  # steps of a graph between two looks at whether every row has ended: a look waits for the GPU
_NUM_RECORDED = 6  # sizes of batches whose graphs and memory are kept: whisper-large needs a quarter of a gigabyte for each row
_Key: TypeAlias = tuple[int, int, bool]  # rows, positions of the sound, whether any row has an adapter
_PLAIN = {  # of a generation config, what greedy decoding here does, or what has no part in it: see `refusal`
    *("alignment_heads", "begin_suppress_tokens", "bos_token_id", "cropped_windows", "decoder_start_token_id", "eos_token_id"),
    *("forced_decoder_ids", "heard_languages", "is_multilingual", "lang_to_id", "language", "max_initial_timestamp_index", "max_length"),
    *("median_filter_width", "no_timestamps_token_id", "pad_token_id", "prev_sot_token_id", "return_timestamps", "suppress_tokens"),
    *("task", "task_to_id", "transformers_version", "use_cache", "written_languages", "_from_model_config"),
}


@dataclass
class _Memory:
    """Keys and values of every layer, and what is being written.

    own: of the text, for each layer (2, rows, heads, length, d_head). cross: of the sound, for each layer twice
    (rows, heads, positions, d_head).
    """

    own: list[torch.Tensor]
    cross: list[tuple[torch.Tensor, torch.Tensor]]
    tokens: torch.Tensor  # (rows, length) prompt and text
    ended: torch.Tensor  # (rows,)


@dataclass
class _Recorded:
    """A batch of one size at fixed places, and the graph of one step on it."""

    memory: _Memory
    place: torch.Tensor  # (1,) the position of the last token
    mask: torch.Tensor  # (1, 1, 1, length) 0 for what has been written, else minus infinity
    table: LanguageTable | None
    rows: StaticRows | None
    graph: Any = None


class GreedyDecoder:
    """Writes texts greedily for windows that were encoded, as `generate(num_beams=1, return_timestamps=False)` does, token by token. Where
    a configuration has several ends, a text is over at the first of them; `generate` leaves such an end in the text.

    Args:
        model: A Whisper, with or without adapters on its modules.
        graphs: Whether everything stays at its place and, on CUDA, a step is one recorded graph. Without CUDA only good for tests.
    """

    def __init__(self, model: WhisperForConditionalGeneration, *, graphs: bool = False) -> None:
        self.model: Any = model
        self.graphs = graphs
        self._recorded: dict[_Key, _Recorded] = {}
        self._known_indices: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}

    def refusal(self) -> str | None:
        """Why this model's texts are better written by `generate`; None if they need not be."""
        from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoderLayer

        if not language_tokens(self.model):
            return "it has no language tokens"
        unknown = sorted(set(self.model.generation_config.to_diff_dict()) - _PLAIN)
        if unknown:
            return f"its generation config sets {', '.join(unknown)}"
        decoder = self.model.get_decoder()
        hooks = [*decoder._forward_hooks.values(), *decoder._forward_pre_hooks.values(), *self.model._forward_hooks.values()]
        if any(not isinstance(hook, BeginDecoder) for hook in [*hooks, *self.model._forward_pre_hooks.values()]):
            return "its decoder has hooks"  # of a mixture that PEFT put there, for instance: they follow the model's own forward
        for layer in decoder.layers:
            parts = (layer, layer.self_attn, layer.encoder_attn)
            if [type(part) for part in parts] != [WhisperDecoderLayer, WhisperAttention, WhisperAttention]:
                return "its decoder layers are not Whisper's"
            if any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts):
                return "its decoder layers have hooks"
        return None

    def __call__(
        self,
        states: torch.Tensor,
        languages: Sequence[str],
        limit: int,
        *,
        table: LanguageTable | None = None,
        adapters: Sequence[str | None] | None = None,
        gates: Sequence[Any] | None = None,
    ) -> torch.Tensor:
        """The tokens of each window after the prompt and without the end, (rows, tokens), filled up with the padding token.

        Args:
            states: (rows, positions, d_model) the encoder's.
            languages: Of the token in each row's prompt.
            limit: The most tokens.
            table, adapters, gates: With `graphs` only, where rows have adapters: for each row the name of one in the table, or None.
                Without graphs, `with table.rows(...)` around the call does the same.
        """
        with torch.no_grad():
            prompt = self._prompt(languages, states.device)
            length = min(prompt.shape[1] + limit, self.model.config.max_target_positions)
            if self.graphs:
                tokens = self._replay(states, prompt, length, table, adapters, gates)
            else:
                assert adapters is None, "without graphs, adapters come from a `with table.rows(...)` around the call"
                tokens = self._write(states, prompt, length)
            return self._texts(tokens[:, prompt.shape[1] :])

    # ---- the parts of both ways ----------------------------------------------------------------------------------------

    def _prompt(self, languages: Sequence[str], device: torch.device) -> torch.Tensor:
        """(rows, 4): start, language, task, no timestamps."""
        config, ids = self.model.generation_config, language_tokens(self.model)
        fixed = [config.task_to_id["transcribe"], config.no_timestamps_token_id]
        return torch.tensor([[config.decoder_start_token_id, ids[code], *fixed] for code in languages], device=device)

    def _begin(self, states: torch.Tensor, prompt: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The prompt through the model's own decoder: its cache, and the first token (rows,)."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self.model.get_decoder()(input_ids=prompt, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        logits = self.model.proj_out(hidden.last_hidden_state[:, -1])
        return cache, self._likeliest(logits, self.model.generation_config.begin_suppress_tokens)

    def _likeliest(self, logits: torch.Tensor, also_suppressed: Sequence[int] | None = None) -> torch.Tensor:
        for suppressed in (self.model.generation_config.suppress_tokens, also_suppressed):
            if suppressed:
                logits = logits.index_fill(1, self._indices(tuple(suppressed), logits.device), float("-inf"))
        return logits.argmax(-1)

    def _indices(self, tokens: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if (tokens, device) not in self._known_indices:  # made once: a graph must not copy from the host
            self._known_indices[tokens, device] = torch.tensor(tokens, device=device)
        return self._known_indices[tokens, device]

    def _step(self, memory: _Memory, token: torch.Tensor, write: Any, seen: Any, mask: torch.Tensor | None) -> torch.Tensor:
        """One token (rows,) after those before it -> the next one (rows,). `write`: its position; `seen`: those that are looked at."""
        decoder = self.model.get_decoder()
        h = decoder.embed_tokens(token)[:, None] + decoder.embed_positions.weight[write]  # (rows, 1, d_model)
        for layer, own, (keys, values) in zip(decoder.layers, memory.own, memory.cross, strict=True):
            attention, x = layer.self_attn, layer.self_attn_layer_norm(h)
            query = _heads(attention.q_proj(x) * attention.scaling, attention)
            own[0, :, :, write] = _heads(attention.k_proj(x), attention)
            own[1, :, :, write] = _heads(attention.v_proj(x), attention)
            h = h + attention.out_proj(_attend(query, own[0, :, :, seen], own[1, :, :, seen], mask))
            attention, x = layer.encoder_attn, layer.encoder_attn_layer_norm(h)
            query = _heads(attention.q_proj(x) * attention.scaling, attention)
            h = h + attention.out_proj(_attend(query, keys, values, None))
            h = h + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(h))))
        return self._likeliest(self.model.proj_out(decoder.layer_norm(h)[:, 0]))

    def _ends(self, token: torch.Tensor) -> torch.Tensor:
        ends = self.model.generation_config.eos_token_id
        if isinstance(ends, int):
            return token == ends
        return torch.isin(token, self._indices(tuple(ends), token.device))

    def _texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cut where the longest text ends, the rest of each row filled up."""
        is_over = self._ends(tokens).cumsum(1) > 0
        longest = int((~is_over).sum(1).max()) if tokens.numel() else 0
        return tokens.masked_fill(is_over, self.model.generation_config.pad_token_id)[:, :longest]

    # ---- without graphs ------------------------------------------------------------------------------------------------

    def _write(self, states: torch.Tensor, prompt: torch.Tensor, length: int) -> torch.Tensor:
        """Prompt and text, (rows, up to length)."""
        cache, token = self._begin(states, prompt)
        memory = _memory_of(cache, prompt, length, cross=None)
        for place in range(prompt.shape[1], length):
            memory.tokens[:, place] = token
            memory.ended |= self._ends(token)
            if place == length - 1 or bool(memory.ended.all()):
                return memory.tokens[:, : place + 1]
            token = self._step(memory, token, slice(place, place + 1), slice(0, place + 1), None)
        return memory.tokens[:, : prompt.shape[1]]

    # ---- with graphs ---------------------------------------------------------------------------------------------------

    def _replay(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        length: int,
        table: LanguageTable | None,
        adapters: Sequence[str | None] | None,
        gates: Sequence[Any] | None,
    ) -> torch.Tensor:
        """The same with every tensor in its place; rows that fill the batch up are copies of the first, and are left out of the answer."""
        count, size = len(states), _size_of_batch(len(states))
        spare = size - count
        states = torch.cat([states, states[:1].expand(spare, -1, -1)]) if spare else states
        prompt = torch.cat([prompt, prompt[:1].expand(spare, -1)]) if spare else prompt
        if adapters is not None and not any(name is not None for name in adapters):
            adapters = None
        rows: StaticRows | None = None
        if adapters is not None:
            assert table is not None, "adapters are names in a table"
            filled = [*adapters, *[None] * spare]
            rows = self._rows(table, (size, states.shape[1], True), filled, None if gates is None else [*gates, *[None] * spare])
        around: AbstractContextManager[Any] = nullcontext() if rows is None else rows.use()
        with around:
            cache, token = self._begin(states, prompt)
            recorded = self._at_its_place((size, states.shape[1], rows is not None), cache, prompt, table, rows)
            memory, begin = recorded.memory, prompt.shape[1]
            memory.tokens[:, begin] = token
            memory.ended.copy_(self._ends(token))
            memory.ended[count:] = True
            recorded.place.fill_(begin)
            recorded.mask.fill_(float("-inf"))[..., : begin + 1] = 0
            for number in range(length - 1 - begin):
                if number % _LOOK_EVERY == 0 and bool(memory.ended.all()):
                    break
                self._one(recorded)
        return memory.tokens[:count, :length].clone()  # behind a row's end may stand what is from another batch: it is cut off

    def _rows(self, table: LanguageTable, key: _Key, adapters: Sequence[str | None], gates: Sequence[Any] | None) -> StaticRows:
        """The table's rows for batches of this kind, with their adapters; made anew where those that were recorded cannot hold them."""
        known = self._recorded.get(key)
        if known is not None and known.rows is not None and known.table is table:
            try:
                known.rows.set(adapters, gates=gates)
                return known.rows
            except ValueError:  # of another stack than there were, or the model was moved; or the caller's fault, which comes out below
                pass
        self._recorded.pop(key, None)
        rows = table.static_rows(len(adapters))
        rows.set(adapters, gates=gates)
        return rows

    def _at_its_place(self, key: _Key, cache: Any, prompt: torch.Tensor, table: LanguageTable | None, rows: StaticRows | None) -> _Recorded:
        """What the prompt left behind, moved to where the graph expects it."""
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            while len(self._recorded) >= _NUM_RECORDED:
                del self._recorded[next(iter(self._recorded))]
            length = self.model.config.max_target_positions
            memory = _memory_of(cache, prompt, length, cross=torch.empty_like)
            mask = memory.own[0].new_zeros(1, 1, 1, length)
            recorded = _Recorded(memory, prompt.new_zeros(1), mask, table, rows)
        self._recorded[key] = recorded  # the one used last stands last
        memory, begin = recorded.memory, prompt.shape[1]
        memory.tokens[:, :begin] = prompt
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        for layer, kept in zip(own, memory.own, strict=True):
            kept[0, :, :, :begin], kept[1, :, :, :begin] = layer.keys, layer.values
            kept[:, :, :, begin:] = 0  # masked, but what is not finite would come through
        for layer, (keys, values) in zip(cross, memory.cross, strict=True):
            keys.copy_(layer.keys)
            values.copy_(layer.values)
        return recorded

    def _one(self, recorded: _Recorded) -> None:
        """One step: recorded the first time, replayed afterwards."""
        if recorded.graph is not None:
            recorded.graph.replay()
        elif recorded.place.is_cuda:
            recorded.graph = self._record(recorded)
            recorded.graph.replay()
        else:
            self._step_in_place(recorded)

    def _step_in_place(self, recorded: _Recorded) -> None:
        memory, place = recorded.memory, recorded.place
        token = memory.tokens.index_select(1, place)[:, 0]
        token = self._step(memory, token, place, slice(None), recorded.mask)
        token = token.masked_fill(memory.ended, self.model.generation_config.pad_token_id)
        place.add_(1)
        memory.tokens.index_copy_(1, place, token[:, None])
        recorded.mask.index_fill_(3, place, 0)
        memory.ended |= self._ends(token)

    def _record(self, recorded: _Recorded) -> Any:
        """The graph of a step. Recording runs the step a few times; what that writes is put back."""
        memory = recorded.memory
        changing = (recorded.place, recorded.mask, memory.tokens, memory.ended)
        before = [tensor.clone() for tensor in changing]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries make their own work space at first use, which must not happen in a graph
                self._step_in_place(recorded)
                for tensor, old in zip(changing, before, strict=True):
                    tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may be busy with other windows
            self._step_in_place(recorded)
        return graph


def _heads(x: torch.Tensor, attention: Any) -> torch.Tensor:
    """(rows, 1, d_model) -> (rows, heads, 1, d_head)."""
    return x.view(x.shape[0], 1, attention.num_heads, attention.head_dim).transpose(1, 2)


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(rows, heads, 1, d_head) and (rows, heads, n, d_head) twice -> (rows, 1, d_model). The query was scaled before."""
    mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
    return mixed.transpose(1, 2).flatten(2)


def _memory_of(cache: Any, prompt: torch.Tensor, length: int, cross: Any) -> _Memory:
    """Room for `length` tokens, with what the prompt left in a cache. `cross` makes places for the sound's keys and values; None: as is."""
    own = []
    for layer in cache.self_attention_cache.layers:
        rows, heads, begin, d_head = layer.keys.shape
        kept = layer.keys.new_zeros(2, rows, heads, length, d_head)
        kept[0, :, :, :begin], kept[1, :, :, :begin] = layer.keys, layer.values
        own.append(kept)
    sound = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]
    if cross is not None:
        sound = [(cross(keys), cross(values)) for keys, values in sound]
    tokens = prompt.new_zeros(len(prompt), length)
    tokens[:, : prompt.shape[1]] = prompt
    return _Memory(own, sound, tokens, torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device))


def _size_of_batch(count: int) -> int:
    """The next power of two: a graph for each of a few sizes, and not for each number of rows."""
    return 1 << (count - 1).bit_length()
