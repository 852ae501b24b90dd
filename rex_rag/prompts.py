"""From rows with questions to rows with prompts: the dataset side of the search protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rex_rag.protocol import build_prompt

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

REQUIRED_COLUMNS = ("question", "golden_answers")


def add_prompts(dataset: Dataset | IterableDataset | dict | None, template: str, name: str):
    """Add the conversational `prompt` column that TRL trains on.

    Raises:
        ValueError: naming the missing and the existing columns, for a dataset without questions or answers, or
            without rows.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: add_prompts(part, template, f"{name}[{key!r}]") for key, part in dataset.items()}
    columns = dataset.column_names
    missing = [column for column in REQUIRED_COLUMNS if columns is not None and column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' or '.join(map(repr, missing))}; it has {', '.join(map(repr, columns))}. Rename "
            "them with dataset.rename_column, or load it with rex_rag.data.qa.load_questions"
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} has no rows; nothing can be trained on it")
    return dataset.map(lambda row: {"prompt": build_prompt(row["question"], template)})
