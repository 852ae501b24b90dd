"""Results in a model card: the Hub's evaluation-results metadata (model-index) and a table that people read.

Plain data in, a README.md out, so that training (its own evaluation, at the end) and `rex-rag report` write the same
form. Whatever else the card says stays; results written before stay too, unless the same result comes again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.log_rows import EXACT_MATCH, UNNAMED_SET, evaluated_sets
from rex_rag.support.numbers import is_number
from rex_rag.support.tables import markdown_table, markdown_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

TASK_TYPE = "question-answering"
TASK_NAME = "Question answering with search"
# The entry of a result's details that says which weights it is of.
WEIGHTS = "weights_sha256"

_NO_METADATA = "---\n\n---\n"
_BEGIN = "<!-- results: begin -->"
_END = "<!-- results: end -->"
# A key of the metadata with all that belongs to it: lines that are indented, entries of a list, blank lines.
_INDEX = re.compile(r"^model-index:.*(?:\n(?:[ \t-].*|(?=\n)))*", re.MULTILINE)
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CardResult:
    """One figure of a model.

    Attributes:
        dataset_type: the data set's id on the Hub, or its own name where it has none.
        metric_type: the metric's id, such as `exact_match`.
        metric_name: what people read; it says the unit, and the method where a model is used by several.
        value: in that unit.
        n: questions behind the figure.
        interval: its 95 % interval, in the same unit.
        protocol: names how it was made; figures of different protocols cannot be compared.
        details: further JSON-able facts, for programs.
    """

    dataset_name: str
    dataset_type: str
    metric_type: str
    metric_name: str
    value: float
    dataset_config: str | None = None
    dataset_split: str | None = None
    n: int | None = None
    interval: tuple[float, float] | None = None
    protocol: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def write_results(path: str | Path, results: Sequence[CardResult], *, model_name: str) -> None:
    """Add results to the card at `path`, in its metadata and as a table; a card is begun where there is none.

    A result with the data set, split, metric and metric name of one from before replaces it.

    Args:
        model_name: used where the card does not name its model.

    Raises:
        ValueError: no results; or the card's metadata cannot be read, or holds results that would not survive being
            written again. The card is left as it was.
    """
    if not results:
        raise UserError(f"there are no results to write into {path}; evaluate the model first")
    path = Path(path)
    content = _content(path) if path.is_file() else f"{_NO_METADATA}\n# {markdown_text(model_name)}\n"
    card = _parsed(path, content)
    new = [_as_eval_result(result) for result in results]
    identities = {_identity(result) for result in new}
    if len(identities) < len(new):
        raise UserError(
            f"two of the {len(new)} results for {path} have the same data set, metric and metric name; "
            "write one of them, or name their methods apart"
        )
    kept = [result for result in card.data.eval_results or [] if _identity(result) not in identities]
    card.data.model_name = card.data.model_name or model_name
    card.data.eval_results = kept + new
    _check_survival(path, card)
    card.text = _with_section(card.text, _section([result for result in kept + new if _is_ours(result)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(_rendered(content, card).encode())


def read_results(path: str | Path) -> list[CardResult]:
    """The results that `write_results` put into a card; none where there is no card.

    Raises:
        ValueError: if the card's metadata cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        return []
    results = _parsed(path, _content(path)).data.eval_results or []
    return [_from_eval_result(result) for result in results if _is_ours(result)]


def training_results(log_history: Sequence[Mapping[str, Any]], decoded: str) -> list[CardResult]:
    """What training's own evaluation says of the model in the end: the last exact match of every evaluation set.

    Args:
        log_history: of the trainer's state; exact match stands under `eval_em/originals`, or
            `eval_<set>_em/originals` where there are several sets.
        decoded: how the rollouts were made, "greedy" or "sampled".
    """
    last: dict[str, tuple[Any, float]] = {}
    for row in log_history:
        for name, prefix in evaluated_sets(row).items():
            if is_number(value := row[prefix + EXACT_MATCH]):
                last[name or UNNAMED_SET] = row.get("step"), value
    results = []
    for name, (step, value) in sorted(last.items()):
        results.append(
            CardResult(
                dataset_name=name,
                dataset_type=name,
                metric_type="exact_match",
                metric_name=f"Exact match, % ({decoded}, during training)",
                value=round(100 * value, 2),
                details={"step": step},
            )
        )
    return results


def _content(path: Path) -> str:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    with path.open(encoding="utf-8-sig", newline="") as file:
        content = file.read()
    return content if REGEX_YAML_BLOCK.search(content) else _NO_METADATA + content


def _parsed(path: Path, content: str) -> ModelCard:
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.repocard_data import eval_results_to_model_index

    try:
        card = ModelCard(content)
        # ModelCard keeps no raw copy of this part of the metadata, and some forms of it do not pass through unchanged.
        metadata = yaml.safe_load(REGEX_YAML_BLOCK.search(content).group(2)) or {}
        before = _without_nulls(metadata.get("model-index") or [])
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"the metadata at the head of {path} cannot be read ({error}); correct it there") from error
    results = card.data.eval_results
    after = eval_results_to_model_index(card.data.model_name, results) if results else []
    if before != after:
        raise UserError(
            f"{path} holds results (model-index) in a form that would change on being written again, such as several "
            "models or fields that huggingface_hub does not know; mend them there, or name another file"
        )
    return card


def _rendered(content: str, card: ModelCard) -> str:
    """The card as a file, its metadata word for word but for the results.

    Written anew as a whole it would lose comments, and change what YAML reads otherwise than people do: `no`, 1.10.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.repocard_data import eval_results_to_model_index
    from huggingface_hub.utils import yaml_dump

    newline = "\r\n" if "\r\n" in content else "\n"
    found = REGEX_YAML_BLOCK.search(content)
    before = found[2].replace("\r\n", "\n")
    index = {"model-index": eval_results_to_model_index(card.data.model_name, card.data.eval_results)}
    dumped = yaml_dump(index, sort_keys=False).rstrip("\n")
    after, places = _INDEX.subn(lambda _: dumped, before)
    if not places:
        after = f"{before.rstrip()}\n{dumped}".lstrip("\n")
    said = yaml.safe_load(before) or {}
    try:
        as_meant = places == ("model-index" in said) and yaml.safe_load(after) == {**said, **index}
    except yaml.YAMLError:
        as_meant = False
    # Metadata in an unusual form, such as braces around all of it, is written anew after all.
    return f"{found[1]}{after.replace(chr(10), newline)}{found[3]}{card.text}" if as_meant else str(card)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value if entry is not None]
    return value


def _check_survival(path: Path, card: ModelCard) -> None:
    """The format groups results by data set and keeps name, arguments and source of the first alone."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    results = card.data.eval_results
    _, back = model_index_to_eval_results(eval_results_to_model_index(card.data.model_name, results))
    lost = [result for result in results if result not in back]
    if lost:
        names = sorted({f"{result.dataset_name}: {result.metric_name or result.metric_type}" for result in lost})
        raise UserError(
            f"{path} already describes one of the data sets in another way (its name, arguments or source), and a "
            f"card can hold only one; this would be lost: {'; '.join(names)}. Remove that result, or name another file"
        )


def _identity(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _is_ours(result: EvalResult) -> bool:
    return result.task_name == TASK_NAME


def _as_eval_result(result: CardResult) -> EvalResult:
    from huggingface_hub import EvalResult

    arguments = {
        "n": result.n,
        "interval_95": None if result.interval is None else list(result.interval),
        "protocol": result.protocol,
        **result.details,
    }
    return EvalResult(
        task_type=TASK_TYPE,
        task_name=TASK_NAME,
        dataset_type=result.dataset_type,
        dataset_name=result.dataset_name,
        dataset_config=result.dataset_config,
        dataset_split=result.dataset_split,
        metric_type=result.metric_type,
        metric_name=result.metric_name,
        metric_value=result.value,
        metric_args=_without_nulls(arguments) or None,
    )


def _from_eval_result(result: EvalResult) -> CardResult:
    details = dict(result.metric_args or {})
    interval = details.pop("interval_95", None)
    return CardResult(
        dataset_name=result.dataset_name,
        dataset_type=result.dataset_type,
        dataset_config=result.dataset_config,
        dataset_split=result.dataset_split,
        metric_type=result.metric_type,
        metric_name=result.metric_name or result.metric_type,
        value=result.metric_value,
        n=details.pop("n", None),
        interval=None if interval is None else tuple(interval),
        protocol=details.pop("protocol", None),
        details=details,
    )


def _section(results: Sequence[EvalResult]) -> str:
    rows = []
    for result in map(_from_eval_result, results):
        where = " ".join(filter(None, (result.dataset_name, result.dataset_split and f"({result.dataset_split})")))
        interval = "" if result.interval is None else f"{result.interval[0]:.1f} to {result.interval[1]:.1f}"
        rows.append(
            [
                markdown_text(where),
                markdown_text(result.metric_name),
                f"{result.value:.1f}" if isinstance(result.value, int | float) else markdown_text(str(result.value)),
                interval,
                "" if result.n is None else f"{result.n:,}",
                markdown_text(result.protocol or ""),
            ]
        )
    table = markdown_table(("data set", "metric", "value", "95 % interval", "questions", "protocol"), rows, 2)
    lines = [_BEGIN, "## Evaluation results", "", table]
    if any(result.metric_args and "protocol" in result.metric_args for result in results):
        lines += ["Rows of one protocol share retriever, token limits, decoding and scorer.", ""]
    return "\n".join([*lines, _END])


def _with_section(text: str, section: str) -> str:
    """The card's text with the section in its old place, or at the end where it has none."""
    newline = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", newline)
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}{newline}{newline}{section}{newline}"
