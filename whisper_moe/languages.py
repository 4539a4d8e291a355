"""Languages: their codes and names, and which one a recording is in.

Codes are Whisper's (`"fr"`, `"jw"` for Javanese), ISO 639-3 where Whisper has none (`"qug"`); whatever people write is converted
here, where it enters. `language_posterior` is the one source of language probabilities: one decoder step with all adapters off.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import WhisperForConditionalGeneration

# ---- codes and names ---------------------------------------------------------------------------------------------------

# Whisper's languages: code, English name, then other codes (ISO 639-1, 639-2, 639-3) and names it goes by.
_WHISPER = """
en English eng|zh Chinese zho chi cmn Mandarin|de German deu ger|es Spanish spa Castilian|ru Russian rus|ko Korean kor|fr French fra fre
ja Japanese jpn|pt Portuguese por|tr Turkish tur|pl Polish pol|ca Catalan cat Valencian|nl Dutch nld dut Flemish|ar Arabic ara arb
sv Swedish swe|it Italian ita|id Indonesian ind in|hi Hindi hin|fi Finnish fin|vi Vietnamese vie|he Hebrew heb iw|uk Ukrainian ukr
el Greek ell gre|ms Malay msa may zsm|cs Czech ces cze|ro Romanian ron rum mo Moldavian Moldovan|da Danish dan|hu Hungarian hun
ta Tamil tam|no Norwegian nor nb nob Bokmål Norwegian_Bokmål|th Thai tha|ur Urdu urd|hr Croatian hrv|bg Bulgarian bul|lt Lithuanian lit
la Latin lat
mi Maori mri mao|ml Malayalam mal|cy Welsh cym wel|sk Slovak slk slo|te Telugu tel|fa Persian fas per pes Farsi|lv Latvian lav lvs
bn Bengali ben Bangla|sr Serbian srp|az Azerbaijani aze azj|sl Slovenian slv Slovene|kn Kannada kan|et Estonian est ekk
mk Macedonian mkd mac|br Breton bre|eu Basque eus baq|is Icelandic isl ice|hy Armenian hye arm|ne Nepali nep npi
mn Mongolian mon khk|bs Bosnian bos|kk Kazakh kaz|sq Albanian sqi alb als|sw Swahili swa swh|gl Galician glg|mr Marathi mar
pa Punjabi pan Panjabi|si Sinhala sin Sinhalese|km Khmer khm|sn Shona sna|yo Yoruba yor|so Somali som|af Afrikaans afr
oc Occitan oci|ka Georgian kat geo|be Belarusian bel|tg Tajik tgk|sd Sindhi snd|gu Gujarati guj|am Amharic amh|yi Yiddish yid ydd
lo Lao lao|uz Uzbek uzb uzn|fo Faroese fao|ht Haitian_Creole hat Haitian|ps Pashto pus Pushto|tk Turkmen tuk
nn Nynorsk nno Norwegian_Nynorsk
mt Maltese mlt|sa Sanskrit san|lb Luxembourgish ltz Letzeburgesch|my Burmese mya bur Myanmar|bo Tibetan bod tib
tl Tagalog tgl fil Filipino|mg Malagasy mlg plt|as Assamese asm|tt Tatar tat|haw Hawaiian|ln Lingala lin|ha Hausa hau|ba Bashkir bak
jw Javanese jv jav|su Sundanese sun|yue Cantonese
"""

# The rest of ISO 639-1, and languages of this project's data: Whisper has no token for them.
_OTHERS = """
qug Kichwa|chr Cherokee|aa Afar aar|ab Abkhazian abk Abkhaz|ae Avestan ave|ak Akan aka|an Aragonese arg|av Avar ava Avaric
ay Aymara aym|bi Bislama bis|bm Bambara bam|ce Chechen che|ch Chamorro cha|co Corsican cos|cr Cree cre|cu Church_Slavic chu
cv Chuvash chv|dv Dhivehi div Divehi Maldivian|dz Dzongkha dzo|ee Ewe ewe|eo Esperanto epo|ff Fulah ful Fula|fj Fijian fij
fy Western_Frisian fry Frisian|ga Irish gle|gd Scottish_Gaelic gla Gaelic|gn Guarani grn|gv Manx glv|ho Hiri_Motu hmo|hz Herero her
ia Interlingua ina|ie Interlingue ile|ig Igbo ibo|ii Sichuan_Yi iii Nuosu|ik Inupiaq ipk|io Ido ido|iu Inuktitut iku|kg Kongo kon
ki Kikuyu kik|kj Kuanyama kua|kl Kalaallisut kal Greenlandic|kr Kanuri kau|ks Kashmiri kas|ku Kurdish kur|kv Komi kom
kw Cornish cor|ky Kyrgyz kir Kirghiz|lg Ganda lug Luganda|li Limburgish lim Limburgan|lu Luba-Katanga lub
mh Marshallese mah|na Nauru nau
nd North_Ndebele nde|ng Ndonga ndo|nr South_Ndebele nbl|nv Navajo nav|ny Chichewa nya Nyanja|oj Ojibwe oji Ojibwa|om Oromo orm
or Odia ori ory Oriya|os Ossetian oss Ossetic|pi Pali pli|qu Quechua que|rm Romansh roh|rn Rundi run Kirundi|rw Kinyarwanda kin
sc Sardinian srd|se Northern_Sami sme|sg Sango sag|sm Samoan smo|ss Swati ssw Swazi|st Southern_Sotho sot Sesotho|ti Tigrinya tir
tn Tswana tsn
to Tongan ton|ts Tsonga tso|tw Twi twi|ty Tahitian tah|ug Uyghur uig Uighur|ve Venda ven|vo Volapük vol|wa Walloon wln|wo Wolof wol
xh Xhosa xho|za Zhuang zha|zu Zulu zul
"""


def _rows(table: str) -> dict[str, list[str]]:
    """Code -> its English name and whatever else it goes by."""
    fields = (row.split() for row in re.split(r"[|\n]", table.strip()))
    return {code: [word.replace("_", " ") for word in words] for code, *words in fields}


_WHISPER_ROWS = _rows(_WHISPER)
_ROWS = _WHISPER_ROWS | _rows(_OTHERS)


@cache
def _codes() -> dict[str, str]:
    """Everything a language goes by, in lower case -> its code."""
    known = {word.lower(): code for code, words in _ROWS.items() for word in words}
    return known | {code: code for code in _ROWS}


def language_code(text: Any) -> str:
    """The code of a language, from a name or from any usual code: "French", "fr-FR", "fra" and "FR" are "fr".

    A three-letter code that is nobody's alias is taken for ISO 639-3 and stays ("qug"): adapters may speak any language.
    """
    if not isinstance(text, str):
        hint = ' YAML reads a bare no (Norwegian) as false: write "no", in quotes.' if text is False else ""
        raise ValueError(f"A language is given as text, such as 'fr' or 'French'; got {text!r}.{hint}")
    words = text.strip().removeprefix("<|").removesuffix("|>").lower()
    known = _codes()
    for candidate in (words, re.split(r"[-_]", words)[0]):  # the whole first: names may hold a dash
        if candidate in known:
            return known[candidate]
    if re.fullmatch(r"[a-z]{3}", re.split(r"[-_]", words)[0]):
        return re.split(r"[-_]", words)[0]
    near = difflib.get_close_matches(words, known, n=3, cutoff=0.6)
    meant = list(dict.fromkeys(f"{known[word]} ({language_name(known[word])})" for word in near))
    hint = f"Did you mean {' or '.join(meant)}?" if meant else "Give a name such as 'French' or a code such as 'fr'."
    raise ValueError(f"{text!r} is no language known here. {hint}")


def language_name(code: str) -> str:
    """The English name of a language, the code itself where no name is known."""
    return _ROWS[code][0] if code in _ROWS else code


def is_whisper_language(code: str) -> bool:
    """Whether Whisper has a token for the language (its largest models; smaller tables exist)."""
    return code in _WHISPER_ROWS


# ---- which language is spoken ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguagePosterior:
    """How probable each language is.

    Args:
        probabilities: Code -> probability, the most probable first. They sum to 1 over the allowed languages.
        no_speech: Probability that nobody speaks, of the whole vocabulary; None where the model has no token for it.
    """

    probabilities: dict[str, float]
    no_speech: float | None

    @property
    def best(self) -> tuple[str, float]:
        """The most probable language and its probability."""
        return next(iter(self.probabilities.items()))

    def top(self, n: int) -> dict[str, float]:
        """The `n` most probable languages."""
        return dict(list(self.probabilities.items())[:n])

    @classmethod
    def mean(cls, posteriors: Collection[LanguagePosterior], weights: Collection[float]) -> LanguagePosterior:
        """The weighted mean of posteriors over the same languages."""
        shares = [weight / sum(weights) for weight in weights]
        languages = next(iter(posteriors)).probabilities
        sums = {code: sum(s * p.probabilities[code] for s, p in zip(shares, posteriors, strict=True)) for code in languages}
        silences = [posterior.no_speech for posterior in posteriors]
        heard = [silence for silence in silences if silence is not None]
        no_speech = sum(s * n for s, n in zip(shares, heard, strict=True)) if len(heard) == len(silences) else None
        return cls(dict(sorted(sums.items(), key=lambda item: -item[1])), no_speech)


def language_tokens(model: WhisperForConditionalGeneration) -> dict[str, int]:
    """Code -> id of its language token. Empty for English-only checkpoints, which have none."""
    config = model.generation_config
    if not getattr(config, "is_multilingual", True):
        return {}
    tokens: dict[str, int] = getattr(config, "lang_to_id", {})
    return {token.removeprefix("<|").removesuffix("|>"): index for token, index in tokens.items()}


def language_posterior(
    model: WhisperForConditionalGeneration,
    input_features: torch.Tensor | None,
    *,
    allowed: Collection[str] | None = None,
    encoder_outputs: Any = None,
) -> list[LanguagePosterior]:
    """Language probabilities from one decoder step after start-of-transcript, with all adapters off.

    Args:
        model: A Whisper, bare or with adapters (which stay out of it).
        input_features: `(batch, n_mels, frames)`, any float type; None if `encoder_outputs` is given.
        allowed: Languages to choose among; None: all that the model has tokens for.
        encoder_outputs: The encoder's answer for the same sound, made with adapters off.

    Returns:
        One posterior a row. An English-only checkpoint answers English.
    """
    import torch

    tokens = language_tokens(model)
    codes = allowed_codes(tokens or {"en": 0}, allowed)
    rows = len(input_features) if input_features is not None else len(encoder_outputs[0])
    config = model.generation_config
    with torch.no_grad(), adapters_off(model):
        if input_features is not None:
            encoder_outputs = model.get_encoder()(input_features.to(model.device, model.dtype))
        logits = _first_logits(model, encoder_outputs).float()  # (batch, vocabulary)
    # Whisper's vocabulary has the no-speech token right before the no-timestamps token, whatever its name.
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    no_speech = [None] * rows if no_timestamps is None else logits.softmax(-1)[:, no_timestamps - 1].tolist()
    chosen = logits[:, [tokens[code] for code in codes]].softmax(-1) if tokens else torch.ones(rows, 1)  # (batch, languages)
    return [
        LanguagePosterior(dict(sorted(zip(codes, row, strict=True), key=lambda item: -item[1])), silence)
        for row, silence in zip(chosen.tolist(), no_speech, strict=True)
    ]


def _first_logits(model: Any, encoder_outputs: Any) -> torch.Tensor:
    """What comes first after the start of the transcript, (batch, vocabulary), with whatever adapters are at work."""
    import torch

    states = encoder_outputs[0]  # (batch, positions, d_model)
    cross = [_plain_cross_weights(layer) for layer in model.get_decoder().layers]
    if all(weights is not None for weights in cross):
        return _one_query(model, states, cross)
    start = torch.full((len(states), 1), model.generation_config.decoder_start_token_id, dtype=torch.long, device=states.device)
    logits: torch.Tensor = model(encoder_outputs=encoder_outputs, decoder_input_ids=start, use_cache=False).logits
    return logits[:, -1]


def _one_query(model: Any, states: torch.Tensor, cross: list[Any]) -> torch.Tensor:
    """The decoder's first step without keys and values: (batch, positions, d_model) -> (batch, vocabulary).

    Whisper's own forward makes a key and a value of every position of the window, which costs a tenth of the encoder, for a single query.
    One query may go the other way: q (W_k x) = (W_k^T q) x, and the mean of the values is W_v of the mean of x. Equal up to rounding.
    """
    import torch

    decoder = model.get_decoder()
    start = torch.full((len(states), 1), model.generation_config.decoder_start_token_id, dtype=torch.long, device=states.device)
    h = (decoder.embed_tokens(start) + decoder.embed_positions.weight[0])[:, 0]  # (batch, d_model)
    for layer, (key, value) in zip(decoder.layers, cross, strict=True):
        own, attention = layer.self_attn, layer.encoder_attn
        h = h + own.out_proj(own.v_proj(layer.self_attn_layer_norm(h)))  # one position attends to itself alone
        q = attention.q_proj(layer.encoder_attn_layer_norm(h)).unflatten(-1, (attention.num_heads, -1)) * attention.scaling  # (b, heads, d)
        W_k, W_v = (weights.weight.unflatten(0, (attention.num_heads, -1)) for weights in (key, value))  # (heads, d, d_model)
        weights = (torch.einsum("bhd,hdi->bhi", q, W_k) @ states.mT).softmax(-1)  # (b, heads, positions); a bias of the keys falls out
        mixed = torch.einsum("bhi,hdi->bhd", weights @ states, W_v).flatten(1) + (0 if value.bias is None else value.bias)
        h = h + attention.out_proj(mixed)
        h = h + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(h))))
    logits: torch.Tensor = model.get_output_embeddings()(decoder.layer_norm(h))
    return logits


def _plain_cross_weights(layer: Any) -> tuple[Any, Any] | None:
    """The cross-attention's k and v as plain linear layers; None if they are something else (quantized, merged, off-loaded)."""
    from torch import nn

    found = []
    for module in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
        plain = getattr(module, "base_layer", module)
        if type(plain) is not nn.Linear or getattr(module, "merged", False) or hasattr(plain, "_hf_hook") or plain.weight.is_meta:
            return None
        found.append(plain)
    return found[0], found[1]


def allowed_codes(tokens: Collection[str], allowed: Collection[str] | None) -> list[str]:
    """The codes of the allowed languages, refused if the model cannot hear one. None allows all."""
    if allowed is None:
        return list(tokens)
    codes = list(dict.fromkeys(language_code(text) for text in allowed))
    if not codes:
        raise ValueError("The list of allowed languages is empty. Leave it out to allow all.")
    deaf = [code for code in codes if code not in tokens]
    if deaf:
        raise ValueError(
            f"This model has no language token for {', '.join(map(repr, deaf))}, so it cannot hear it. "
            f"It hears: {', '.join(sorted(tokens))}. A language without a token is chosen with language=..., not detected."
        )
    return codes


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model alone, whatever adapters are attached and active; afterwards all is as before.

    Works on a bare model, on a `PeftModel`, on a base whose layers PEFT has wrapped and on one with a `LanguageTable`. PEFT's own
    `disable_adapter` leaves the active adapter trainable behind; this does not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from whisper_moe.routed_linear import RoutedLinear

    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    switched = [layer for layer in layers if not layer.disable_adapters]
    trainable = [(parameter, parameter.requires_grad) for layer in switched for parameter in layer.parameters()]
    for layer in switched:
        layer.enable_adapters(False)
    try:
        with ExitStack() as stack:
            for slot in {module.slot for module in model.modules() if isinstance(module, RoutedLinear)}:
                stack.enter_context(slot.use(None))
            yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
