"""Exact match, F1 and sub-match as a module of the `evaluate` library; `evaluate.load` takes this file's path.

The library copies this file and runs the copy, so it holds no scoring of its own: that is in `rex_rag.answers`.
"""

import datasets
import evaluate

from rex_rag.answers import exact_match, sub_match, token_f1

_DESCRIPTION = """
Scores of short answers after SQuAD normalisation (lower case, no ASCII punctuation, no English articles, single
spaces), each the best over a question's gold answers, averaged over questions: exact match; F1 of the words;
sub-match, whether a gold answer's words stand in the prediction side by side.
"""

_INPUTS = """
Args:
    predictions: list of strings, `None` where there is no answer, which scores 0.
    references: list of the gold answers of each question: a string or a list of strings.
Returns:
    exact_match, f1, sub_match: means in [0, 1].
Examples:
    >>> metric = evaluate.load(METRIC_PATH)
    >>> metric.compute(predictions=["the Eiffel Tower", "in Rome"], references=[["Eiffel Tower"], ["Rome", "Roma"]])
    {'exact_match': 0.5, 'f1': 0.8333333333333333, 'sub_match': 1.0}
"""

_CITATION = """
@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {EMNLP},
  year = {2016},
}
"""


def _prediction(row) -> list[str]:
    if row is not None and not isinstance(row, str):
        raise ValueError(f"a prediction is {row!r}, a {type(row).__name__}; give a string, or None for no answer")
    return [] if row is None else [row]


def _golden(row) -> list[str]:
    return [row] if isinstance(row, str) else list(row)


class RexRagQa(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": texts, "references": texts}),
            reference_urls=["https://arxiv.org/abs/1606.05250"],
        )

    # The library takes the form of the first row for the form of all, and a first row without an answer for none at
    # all. So every input becomes a list here: of gold answers, and of the one prediction or nothing.

    def add_batch(self, *, predictions=None, references=None) -> None:
        """As in the library; rows may differ in form."""
        super().add_batch(predictions=[*map(_prediction, predictions)], references=[*map(_golden, references)])

    def add(self, *, prediction=None, reference=None) -> None:
        """As in the library; rows may differ in form."""
        super().add(prediction=_prediction(prediction), reference=_golden(reference))

    def _compute(self, predictions: list, references: list) -> dict:
        pairs = [(row[0] if row else None, golden) for row, golden in zip(predictions, references, strict=True)]
        scores = {"exact_match": exact_match, "f1": token_f1, "sub_match": sub_match}
        return {name: sum(float(score(*pair)) for pair in pairs) / len(pairs) for name, score in scores.items()}
