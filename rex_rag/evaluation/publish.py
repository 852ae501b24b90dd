"""Evaluation runs as results of a model card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from rex_rag.evaluation.benchmarks import FLASHRAG_REPOSITORY, FLASHRAG_SETS
from rex_rag.evaluation.bootstrap import Estimate
from rex_rag.evaluation.finished import FinishedRun
from rex_rag.evaluation.published import label
from rex_rag.evaluation.scores import ACCURACY, EXACT_MATCH, F1, JUDGE
from rex_rag.support.errors import UserError
from rex_rag.support.model_index import WEIGHTS, CardResult, read_results, write_results

logger = logging.getLogger(__name__)

# In the Hub's names of metrics. Sub-match has none there.
_METRICS = {EXACT_MATCH: "Exact match", F1: "F1", ACCURACY: "Accuracy"}


def card_results(run: FinishedRun) -> list[CardResult]:
    """What a card says of a run: exact match and F1, or accuracy, of every set, in per cent with its interval.

    Raises:
        ValueError: for a run that is not whole.
    """
    if run.missing:
        raise UserError(f"{run.path} is not whole: {run.missing_text}; resume it, then write the card")
    return list(_results(run))


def write_model_card(path: str | Path, runs: Sequence[FinishedRun]) -> None:
    """Write the results of one model's runs into the card at `path`; what else it says stays.

    Raises:
        ValueError: for runs of several models or of other weights than lie beside the card, runs that are not whole,
            or two that would have the same place in the card; see `write_results` for cards that cannot be written
            into.
    """
    if not runs:
        raise UserError(f"there is no run to write into {path}; name at least one directory")
    identities = {tuple(run.card["model"].get(key) for key in ("name", "revision", "weights_sha256")) for run in runs}
    if len(identities) > 1:
        listed = ", ".join(f"{run.path} ({run.model})" for run in runs)
        raise UserError(f"a card is of one model, but these runs are of {len(identities)}: {listed}; name one's runs")
    results = [result for run in runs for result in card_results(run)]
    _check_weights(Path(path), runs[0])
    replaced = set(map(_place, results))
    stale = [one for one in read_results(path) if _place(one) not in replaced and _is_of_other_weights(one, runs[0])]
    if stale:
        listed = ", ".join(f"{result.dataset_name}: {result.metric_name}" for result in stale[:3])
        raise UserError(
            f"{path} holds {len(stale)} results of other weights ({listed}{', …' if len(stale) > 3 else ''}), which "
            "would pass for this model's; remove them there (model-index), or name another file"
        )
    write_results(path, results, model_name=runs[0].model)


def _check_weights(path: Path, run: FinishedRun) -> None:
    """A card in a model's folder speaks of the weights there."""
    from rex_rag.models.identity import folder_sha256, holds_weights

    folder = path.parent
    if not holds_weights(folder):
        return
    there = folder_sha256(folder)
    ours = run.card["model"].get("weights_sha256")
    if ours is None:
        logger.warning(
            "%s lies beside model weights, and %s does not say which weights %s were; see that they are these",
            path,
            run.path,
            run.model,
        )
    elif ours != there:
        raise UserError(
            f"{path} lies beside weights with the hash {there[:12]}, but {run.path} evaluated {run.model} with "
            f"{ours[:12]}; name the card in that model's folder, or evaluate the model in {folder}"
        )


def _place(result: CardResult) -> tuple[str | None, ...]:
    """What of a result a card keeps apart."""
    place = (result.dataset_type, result.dataset_config, result.dataset_split)
    return (*place, result.metric_type, result.metric_name)


def _is_of_other_weights(result: CardResult, run: FinishedRun) -> bool:
    weights = run.card["model"].get("weights_sha256")
    return None not in (weights, result.details.get(WEIGHTS)) and result.details[WEIGHTS] != weights


def _results(run: FinishedRun) -> Iterator[CardResult]:
    card = run.card
    for name, scores in run.scores.items():
        row = run.benchmarks[name]
        how = [run.method]
        if scores.samples > 1:
            how.append(f"mean of {scores.samples} samples")
        if row["questions"] != row["size"]:
            how.append(f"{row['questions']:,} of {row['size']:,} questions")
        known = name in FLASHRAG_SETS
        titles = dict(_METRICS)
        if run.judge is not None:
            titles[JUDGE] = f"Judged right by {run.judge['model']}"
        for metric, title in titles.items():
            if metric not in scores.metrics:
                continue
            value, interval = _per_cent(scores.metrics[metric])
            yield CardResult(
                dataset_name=label(name),
                dataset_type=FLASHRAG_REPOSITORY if known else name,
                dataset_config=name if known else None,
                dataset_split=FLASHRAG_SETS[name][0] if known else None,
                metric_type=metric,
                metric_name=f"{title}, % ({', '.join(how)})",
                value=value,
                n=scores.n,
                interval=interval,
                protocol=run.protocol,
                details={
                    "method": card["method"]["name"],
                    WEIGHTS: card["model"].get("weights_sha256"),
                    "questions_sha256": row["sha256"],
                    "retriever": (card["retriever"] or {}).get("description"),
                    "corpus_sha256": (card["retriever"] or {}).get("corpus_sha256"),
                    "answers_sha256": (card["retriever"] or {}).get("answers_sha256"),
                    "top_k": card["budget"]["top_k"] if card["retriever"] else None,
                    "temperature": card["decoding"]["temperature"],
                    "samples": card["decoding"]["samples"],
                    "seed": card["decoding"]["seed"],
                    "subset": row.get("subset"),
                },
            )


def _per_cent(estimate: Estimate) -> tuple[float, tuple[float, float]]:
    return round(100 * estimate.mean, 2), (round(100 * estimate.low, 2), round(100 * estimate.high, 2))
