"""From rows with questions to rows with prompts: the dataset side of the search protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rex_rag.data.question_rows import checked_answers
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset, IterableDataset

    from rex_rag.protocols.base import Protocol
    from rex_rag.training.config import REXRAGConfig

REQUIRED_COLUMNS = ("question", "golden_answers")


def checked_questions(dataset: Dataset | IterableDataset | dict | None, name: str):
    """The dataset with usable questions and answers: a string becomes a list of one, blank answers are left out.

    Raises:
        ValueError: naming the missing and the existing columns, for a dataset without questions or answers, or
            without rows; naming dataset and row, for one whose question or answers cannot be used (a stream's when it
            comes).
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: checked_questions(part, f"{name}[{key!r}]") for key, part in dataset.items()}
    if not hasattr(dataset, "column_names"):
        raise UserError(
            f"{name} is a {type(dataset).__name__}; make it a datasets.Dataset, with from_list or from_pandas"
        )
    columns = dataset.column_names
    missing = [column for column in REQUIRED_COLUMNS if columns is not None and column not in columns]
    if missing:
        raise UserError(
            f"{name} has no column {' or '.join(map(repr, missing))}; it has {', '.join(map(repr, columns))}. Rename "
            "them with dataset.rename_column, or load it with rex_rag.data.qa.load_questions"
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise UserError(f"{name} has no rows; nothing can be trained on it")

    def checked(row: dict, index: int) -> dict:
        return {"golden_answers": checked_answers(row, f"{name}[{index}]")}

    return dataset.map(checked, with_indices=True, **_described(dataset, "checking questions"))


def add_prompts(dataset: Dataset | IterableDataset | dict | None, protocol: Protocol, forbidden: Sequence[str]):
    """Add the conversational `prompt` column that TRL trains on.

    Args:
        forbidden: the tokenizer's control tokens, escaped in the prompt; the question itself stays as it is.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: add_prompts(part, protocol, forbidden) for key, part in dataset.items()}
    described = _described(dataset, "writing prompts")
    return dataset.map(lambda row: {"prompt": protocol.messages(row["question"], forbidden)}, **described)


def _described(dataset: Dataset | IterableDataset, name: str) -> dict[str, str]:
    """What a progress bar says; a stream has none."""
    return {"desc": name} if hasattr(dataset, "__len__") else {}


def refuse_long_prompt(length: int, prompt: list[dict[str, str]], args: REXRAGConfig) -> None:
    """The question is never what gets truncated: raise a ValueError that names it where its prompt is too long."""
    if length > args.max_prompt_length:
        raise UserError(
            f"the prompt that ends in {prompt[-1]['content'][-80:]!r} has {length} tokens, more than "
            f"max_prompt_length {args.max_prompt_length}; raise it or remove the question"
        )


def refuse_long_prompts(
    dataset: Dataset, encode: Callable[[list[dict[str, str]]], list[int]], args: REXRAGConfig
) -> None:
    """Check every prompt of a dataset, before GPU hours are spent on it."""
    overhead = len(encode(dataset[0]["prompt"]))
    for index, question in enumerate(dataset["question"]):
        # A token holds at least one byte, so most questions need no tokenizer to be known short enough.
        if len(question.encode()) + overhead > args.max_prompt_length:
            prompt = dataset[index]["prompt"]
            refuse_long_prompt(len(encode(prompt)), prompt, args)
