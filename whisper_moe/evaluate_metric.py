"""Our error rates as a metric of Hugging Face's `evaluate`, for those whose loop speaks that language.

`evaluate.load("wer")` asks the Hub and knows no normaliser; this one works offline and is `whisper_moe.evaluate.score` underneath. It is a
file of its own because importing it loads `evaluate` and `datasets`, of the `train` extra, which nothing else here needs to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from whisper_moe.evaluate import score


class ErrorRates(evaluate.Metric):
    """WER and CER with the mark-preserving normaliser, or Whisper's.

    `ErrorRates().compute(predictions=[...], references=[...])` returns the fields of `Scores` as a dict; `normalizer` and `language` are
    given to `compute`. `add_batch` works as with every metric; the counts are pooled over all batches, not averaged.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Word and character error rates of transcripts, as fractions, with the counts behind them.",
            citation="",
            inputs_description="predictions, references: one text per clip. normalizer, language: see whisper_moe.score.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], normalizer: str = "mark-preserving", language: str | None = None
    ) -> dict[str, Any]:
        return score(list(references), list(predictions), normalizer, language=language).to_dict()
