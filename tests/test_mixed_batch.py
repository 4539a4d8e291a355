"""Batches in which every row speaks another language: `generate` inside `table.rows`, and `generate_mixed` for recordings of any length.

The truth for a row is the row alone: the model's own `generate`, long-form loop included, with that row's adapter. That the adapter itself
is right is held against PEFT here once, and in test_language_table.py in every way.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tiny_model, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

from peft_s2lora import S2LoraConfig
from whisper_moe import LanguageTable, generate_mixed

WINDOW = 200  # frames of the tiny model's two seconds
ADAPTERS = {
    "cy": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "out_proj"]),
    "fr": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "fc1", "fc2"]),
    "de": S2LoraConfig(r=6, s2lora_alpha=3),
}
LANGUAGES = [None, *ADAPTERS]
# Tokens of a window, enough for several segments. Not max_length: transformers' own loop lets that grow from window to window.
SHORT = {"max_new_tokens": 20}


def stamped_model(processor, seed: int = 0):
    """The tiny Whisper with timestamp tokens, one per 20 ms of its window. Double precision: no near ties decided by rounding."""
    model = build_tiny_model(processor, seed)
    config = copy.deepcopy(model.config)
    config.vocab_size = len(processor.tokenizer) + 1 + WINDOW // 2
    torch.manual_seed(seed)
    stamped = type(model)(config).eval().double()
    stamped.generation_config = model.generation_config
    return stamped


@pytest.fixture(scope="module")
def model(tiny_processor):
    return stamped_model(tiny_processor)


@pytest.fixture(scope="module")
def plain(tiny_processor, folders):
    """(bare model, table) without timestamp tokens: one with random weights would write them where none are asked for."""
    model = build_tiny_model(tiny_processor).double()
    table = LanguageTable.attach(copy.deepcopy(model))
    root = next(iter(folders.values())).parent / "plain"
    made = enumerate(ADAPTERS.items())
    table.load_many({name: write_adapter(root / name, model, name, peft_config=copy.deepcopy(c), seed=n) for n, (name, c) in made})
    return model, table


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("adapters")
    made = enumerate(ADAPTERS.items())
    return {name: write_adapter(root / name, model, name, peft_config=copy.deepcopy(c), seed=n) for n, (name, c) in made}


@pytest.fixture(scope="module")
def table(model, folders):
    table = LanguageTable.attach(copy.deepcopy(model))
    table.load_many(folders)
    return table


@pytest.fixture(scope="module")
def sound() -> torch.Tensor:
    """(6, mels, frames) long enough for three and a half windows."""
    return 2 * torch.randn(6, 80, 700, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def mask_of(lengths, frames: int) -> torch.Tensor:  # (rows, frames)
    return (torch.arange(frames)[None] < torch.tensor(lengths)[:, None]).long()


def prompt_of(language) -> str:
    return language or "en"


def alone(table, features, language, **options):
    """Segments that the model's own loop writes of one row: (tokens, start, end) of each."""
    with torch.no_grad(), table.rows([language]):
        output = table.model.generate(
            features,
            attention_mask=torch.ones(1, features.shape[2]).long(),
            language=prompt_of(language),
            task="transcribe",
            return_segments=True,
            **SHORT,
            **options,
        )
    found = [(each["tokens"].tolist(), float(each["start"]), float(each["end"])) for each in output["segments"][0]]
    return [(tuple(tokens), round(start_s, 4), round(end_s, 4)) for tokens, start_s, end_s in found]


def segments(row):
    return [(each.tokens, round(each.start_s, 4), round(each.end_s, 4)) for each in row.segments]


# ---- generate inside table.rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_writes_every_row_as_peft_does_alone(plain, folders, sound, num_beams):
    model, table = plain
    rows = ["cy", None, "fr", "de"]
    features, options = sound[:4, :, :WINDOW], {"num_beams": num_beams, "max_length": 24, "task": "transcribe"}
    with torch.no_grad(), table.rows(rows):
        mixed = table.model.generate(features, language=[prompt_of(language) for language in rows], **options)
    written = set()
    for number, language in enumerate(rows):
        base = copy.deepcopy(model)
        if language is not None:
            base = PeftModel.from_pretrained(base, folders[language].parent / "plain" / language, autocast_adapter_dtype=False).eval()
        expected = base.generate(input_features=features[number : number + 1], language=prompt_of(language), **options)[0]
        assert mixed[number, : len(expected)].tolist() == expected.tolist(), language
        written.add(tuple(expected.tolist()))
    assert len(written) == 4, "the rows say different things"


def test_several_sequences_of_a_row_are_rows_of_their_own(plain, sound):
    _, table = plain
    options = {"language": ["cy", "fr"], "do_sample": True, "num_return_sequences": 2, "max_length": 12}
    with torch.no_grad(), pytest.raises(ValueError, match="name each row's language n times"), table.rows(["cy", "fr"]):
        table.model.generate(sound[:2, :, :WINDOW], **options)
    with torch.no_grad(), table.rows(["cy", "cy", "fr", "fr"]):
        assert table.model.generate(sound[:2, :, :WINDOW], **options).shape[0] == 4


def test_generate_refuses_rows_that_leave_and_names_the_way_out(table, sound):
    mask = mask_of([700, 300], 700)
    refusal = r"for 2 rows, but the model was called with 1\..*use generate_mixed"
    with torch.no_grad(), table.rows(["cy", "fr"]), pytest.raises(ValueError, match=refusal):
        table.model.generate(sound[:2], attention_mask=mask, language=["cy", "fr"], return_timestamps=True)
    assert table.model.generate(sound[:1, :, :WINDOW], language="en", max_length=8) is not None, "nothing is left behind"


# ---- generate_mixed, one window ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_short_rows_are_written_as_generate_writes_them(plain, sound, num_beams):
    _, table = plain
    rows = ["cy", None, "fr", "de"]
    features, prompts = sound[:4, :, :WINDOW], [prompt_of(language) for language in rows]
    written = generate_mixed(table, features, rows, prompt_languages=prompts, num_beams=num_beams, **SHORT)
    for number, language in enumerate(rows):
        expected = alone(table, features[number : number + 1], language, num_beams=num_beams, return_timestamps=False)
        assert [tokens for tokens, *_ in segments(written[number])] == [tokens for tokens, *_ in expected]
        assert written[number].tokens == expected[0][0]
        assert written[number].prompt_language == prompts[number]


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=6),
    lengths=st.lists(st.integers(20, 700), min_size=6, max_size=6),
    num_beams=st.sampled_from([1, 2]),
)
def test_any_batch_of_recordings_is_its_rows_one_by_one(table, sound, rows, lengths, num_beams):
    lengths = lengths[: len(rows)]
    frames = max(lengths)
    features, prompts = sound[: len(rows), :, :frames], [prompt_of(language) for language in rows]
    options = {"num_beams": num_beams, "return_timestamps": True, "max_new_tokens": 12}
    together = generate_mixed(table, features, rows, prompt_languages=prompts, attention_mask=mask_of(lengths, frames), **options)
    for number, language in enumerate(rows):
        own = features[number : number + 1, :, : lengths[number] if frames > WINDOW else frames]
        (single,) = generate_mixed(table, own, [language], prompt_languages=prompts[number : number + 1], **options)
        assert together[number].segments == single.segments, (number, language)


# ---- generate_mixed, recordings of several windows ---------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_that_end_at_different_times_are_written_as_whispers_own_loop_does(table, sound, num_beams):
    rows, lengths = ["cy", None, "de", "fr", "cy"], [700, 200, 430, 90, 650]
    prompts = [prompt_of(language) for language in rows]
    options = {"attention_mask": mask_of(lengths, 700), "num_beams": num_beams, **SHORT}
    written = generate_mixed(table, sound[:5], rows, prompt_languages=prompts, **options)
    for number, language in enumerate(rows):
        own = sound[number : number + 1, :, : lengths[number]]
        expected = alone(table, own, language, num_beams=num_beams, return_timestamps=True)
        assert segments(written[number]) == expected, language
    counts = [len(row.windows) for row in written]
    assert len(set(counts)) > 1, "rows do leave at different times"
    assert max(counts) >= 4


def test_rows_left_in_a_batch_keep_their_own_language(table, sound):
    """The row that stays is the last one: after the others have left, position 0 belongs to it."""
    rows, lengths = ["cy", "fr", "de"], [150, 150, 700]
    written = generate_mixed(table, sound[:3], rows, attention_mask=mask_of(lengths, 700), **SHORT)
    for wrong in ("cy", "fr"):
        assert segments(written[2]) != alone(table, sound[2:3], wrong, return_timestamps=True)
    assert segments(written[2]) == alone(table, sound[2:3], "de", return_timestamps=True)


def test_a_window_that_says_it_ends_where_it_began_does_not_hold_up_the_loop(table, sound, monkeypatch):
    begin = table.model.generation_config.no_timestamps_token_id + 1
    from whisper_moe import mixed_batch

    text = [begin, 5, begin, begin]  # a segment of no length, then the start of the next
    monkeypatch.setattr(mixed_batch, "_until_end", lambda tokens, end: [*text, end])
    (row,) = generate_mixed(table, sound[:1, :, :500], ["cy"])
    assert [window.start_s for window in row.windows] == [0.0, 2.0, 4.0]


# ---- drawing and trying again ------------------------------------------------------------------------------------------


def test_a_rows_draws_do_not_depend_on_the_rest_of_the_batch(table, sound):
    rows, lengths, seeds = ["cy", None, "de", "fr"], [700, 200, 430, 90], [11, 12, 13, 14]
    prompts = [prompt_of(language) for language in rows]
    options = {"attention_mask": mask_of(lengths, 700), "temperature": 0.8, **SHORT}
    written = generate_mixed(table, sound[:4], rows, prompt_languages=prompts, seeds=seeds, **options)
    for number, language in enumerate(rows):
        own = sound[number : number + 1, :, : lengths[number]]
        given = {"prompt_languages": prompts[number : number + 1], "return_timestamps": True, "temperature": 0.8, **SHORT}
        (same,) = generate_mixed(table, own, [language], seeds=[seeds[number]], **given)
        (other,) = generate_mixed(table, own, [language], seeds=[seeds[number] + 100], **given)
        assert same.segments == written[number].segments
        assert other.segments != written[number].segments


def test_every_window_and_every_attempt_draws_anew(table):
    """Silence throughout: each window hears the same, and only the draws differ."""
    silence, given = torch.zeros(1, 80, 700, dtype=torch.float64), {"seeds": [3], "logprob_threshold": -100.0, **SHORT}
    (row,) = generate_mixed(table, silence, ["cy"], temperature=0.8, **given)
    assert len({window.avg_logprob for window in row.windows}) == len(row.windows) > 2
    (again,) = generate_mixed(table, silence, ["cy"], temperature=(0.8, 0.8), **given | {"logprob_threshold": 0.0})
    assert again.windows[0].avg_logprob != row.windows[0].avg_logprob


def test_draws_follow_the_models_distribution(plain, sound):
    """The first token of 1,000 draws, against its probabilities at that temperature."""
    _, table = plain
    rows, temperature = 1000, 0.7
    features = sound[:1, :, :WINDOW].expand(rows, -1, -1)
    drawn = torch.tensor(
        [
            row.tokens[0] if row.tokens else table.model.generation_config.eos_token_id
            for row in generate_mixed(table, features, ["cy"] * rows, temperature=temperature, seeds=0, max_length=1)
        ]
    )
    ids = table.model.generation_config
    prompt = [ids.decoder_start_token_id, ids.lang_to_id["<|cy|>"], ids.task_to_id["transcribe"], ids.no_timestamps_token_id]
    with torch.no_grad(), table.rows(["cy"]):
        logits = table.model(input_features=features[:1], decoder_input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / rows
    assert (found - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    assert expected.max() < 0.9, "there is something to draw"


def test_each_row_tries_again_by_itself(plain, sound):
    """A threshold between the rows' values: some are accepted at once, others go on to the next temperature."""
    _, table = plain
    rows = ["cy", None, "de", "fr"]
    features = sound[:4, :, :WINDOW]
    given = {"prompt_languages": [prompt_of(language) for language in rows], "seeds": 3}
    first = generate_mixed(table, features, rows, logprob_threshold=-100.0, **given)
    found = sorted(row.windows[0].avg_logprob for row in first)
    threshold = (found[1] + found[2]) / 2
    written = generate_mixed(table, features, rows, logprob_threshold=threshold, temperature=(0.0, 0.6), **given)
    for before, after in zip(first, written, strict=True):
        accepted = before.windows[0].avg_logprob > threshold
        assert after.windows[0].temperature == (0.0 if accepted else 0.6)
        assert (after.tokens == before.tokens) == accepted
    for number, language in enumerate(rows):
        options = given | {"prompt_languages": given["prompt_languages"][number : number + 1], "seeds": [3 + number]}
        (single,) = generate_mixed(
            table, features[number : number + 1], [language], logprob_threshold=threshold, temperature=(0.0, 0.6), **options
        )
        assert single.tokens == written[number].tokens


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_mean_log_probability_is_that_of_the_written_tokens(plain, sound, num_beams):
    _, table = plain
    features = sound[:2, :, :WINDOW]
    for row, language, own in zip(
        generate_mixed(table, features, ["cy", "de"], num_beams=num_beams, logprob_threshold=-100.0), ["cy", "de"], features, strict=True
    ):
        ids = table.model.generation_config
        prompt = [ids.decoder_start_token_id, ids.lang_to_id[f"<|{language}|>"], ids.task_to_id["transcribe"], ids.no_timestamps_token_id]
        sequence = torch.tensor([[*prompt, *row.tokens, ids.eos_token_id]])[:, : table.model.config.max_target_positions]
        with torch.no_grad(), table.rows([language]):
            logits = table.model(input_features=own[None], decoder_input_ids=sequence[:, :-1]).logits
        chosen = logits.log_softmax(-1).gather(-1, sequence[:, 1:, None])[0, len(prompt) - 1 :, 0]
        assert row.windows[0].avg_logprob == pytest.approx(chosen.mean().item(), abs=1e-6)


def test_text_that_repeats_itself_is_tried_again(plain, sound):
    _, table = plain
    features = sound[:2, :, :WINDOW]
    accepted = generate_mixed(table, features, ["cy", "de"], compression_ratio_threshold=50.0, temperature=(0.0, 0.5), seeds=1)
    assert [row.windows[0].temperature for row in accepted] == [0.0, 0.0]
    again = generate_mixed(table, features, ["cy", "de"], compression_ratio_threshold=0.01, temperature=(0.0, 0.5), seeds=1)
    assert [row.windows[0].temperature for row in again] == [0.5, 0.5]


def test_a_window_in_which_nobody_speaks_is_left_out(table, sound):
    given = {"logprob_threshold": 0.0, "attention_mask": mask_of([500, 300], 500), **SHORT}  # every text is bad
    silent = generate_mixed(table, sound[:2, :, :500], ["cy", "fr"], no_speech_threshold=0.0, **given)
    assert [row.tokens for row in silent] == [(), ()]
    assert [[window.start_s for window in row.windows] for row in silent] == [[0.0, 2.0, 4.0], [0.0, 2.0]]
    assert all(window.skipped and 0 < window.no_speech < 1 for row in silent for window in row.windows)
    spoken = generate_mixed(table, sound[:2, :, :500], ["cy", "fr"], no_speech_threshold=0.999999, **given)
    assert all(row.tokens for row in spoken)


@pytest.mark.parametrize("frames", [WINDOW, 500])
def test_the_models_own_thresholds_judge_no_window(table, sound, monkeypatch, frames):
    expected = generate_mixed(table, sound[:2, :, :frames], ["cy", "fr"], **SHORT)
    config = copy.deepcopy(table.model.generation_config)
    config.no_speech_threshold, config.logprob_threshold, config.compression_ratio_threshold = 0.0, 0.0, 0.01  # nothing would pass
    monkeypatch.setattr(table.model, "generation_config", config)
    assert generate_mixed(table, sound[:2, :, :frames], ["cy", "fr"], **SHORT) == expected
    assert table.model.generation_config is config
    assert (config.no_speech_threshold, config.logprob_threshold, config.compression_ratio_threshold) == (0.0, 0.0, 0.01)


# ---- prompts -----------------------------------------------------------------------------------------------------------


def test_a_row_without_a_prompt_language_is_heard_by_the_base(model, table, sound):
    features = sound[:3, :, :WINDOW]
    heard = model.detect_language(features)
    code_of = {token: name.strip("<|>") for name, token in model.generation_config.lang_to_id.items()}
    written = generate_mixed(table, features, ["cy", None, None], **SHORT)
    assert [row.prompt_language for row in written] == ["cy", *(code_of[token] for token in heard[1:].tolist())]


def test_the_base_hears_a_row_inside_a_block_of_another_batch_too(table, sound):
    features = sound[:2, :, :WINDOW]
    expected = generate_mixed(table, features, [None, None], **SHORT)
    with table.rows(["cy", "fr", "de"]):
        assert generate_mixed(table, features, [None, None], **SHORT) == expected


def test_a_language_without_a_token_needs_a_carrier(model, folders, sound):
    table = LanguageTable.attach(copy.deepcopy(model))
    table.add("qug", folders["cy"])
    table.add("xho", folders["cy"], carrier="es")
    features = sound[:1, :, :WINDOW]
    with pytest.raises(ValueError, match=r"no token for Kichwa \('qug'\).*carrier"):
        generate_mixed(table, features, ["qug"])
    assert generate_mixed(table, features, ["qug"], prompt_languages=["es"]) == generate_mixed(table, features, ["xho"])


def test_a_mixture_is_prompted_with_its_strongest_language(table, sound):
    features = sound[:2, :, :WINDOW]
    written = generate_mixed(table, features, [{"cy": 0.3, "fr": 0.7}, {"cy": 1.0}], **SHORT)
    assert [row.prompt_language for row in written] == ["fr", "cy"]
    assert written[1].tokens == generate_mixed(table, features[1:], ["cy"], **SHORT)[0].tokens


# ---- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "fewer languages than rows": ({"languages": ["cy"]}, "came with 1 languages"),
    "an unknown language": ({"languages": ["cy", "xx"]}, "'xx' is not in the table"),
    "an unknown prompt": ({"prompt_languages": ["cy", "xx"]}, "Row 1: the model has no token for"),
    "prompts for other rows": ({"prompt_languages": ["cy"]}, "1 prompt_languages came for 2 rows"),
    "a mask of another shape": ({"attention_mask": torch.ones(2, 5)}, r"attention_mask is \(2, 5\)"),
    "no timestamps for long recordings": ({"return_timestamps": False}, "finds its way by timestamps"),
    "no beams": ({"num_beams": 0}, "num_beams must be 1 or more, got 0"),
    "a negative temperature": ({"temperature": (0.0, -1.0)}, "temperature is 0 or above"),
    "seeds for other rows": ({"seeds": [1]}, "1 seeds came for 2 rows"),
    "half of the thresholds": ({"no_speech_threshold": 0.6}, "give both"),
    "what the loop decides": ({"do_sample": True}, "decides do_sample itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_any_work(table, sound, monkeypatch, case):
    options, message = REFUSED[case]
    monkeypatch.setattr(table.model, "get_encoder", lambda: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        generate_mixed(table, sound[:2], **{"languages": ["cy", "fr"], **options})


def test_an_error_in_the_middle_leaves_the_base(table, model, sound, monkeypatch):
    monkeypatch.setattr(table.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        generate_mixed(table, sound[:1], ["cy"])
    monkeypatch.undo()
    features, start = sound[:1, :, :WINDOW], torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        again = table.model(input_features=features, decoder_input_ids=start).logits
        assert torch.equal(again, model(input_features=features, decoder_input_ids=start).logits)
