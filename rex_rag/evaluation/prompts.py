"""The words of every method's prompts, in one place. Structure after each method's authors, words our own.

`{name}` marks a placeholder; `fill` replaces all of them in one pass, so that braces in a question or a passage stay
what they are. The search agents' prompt is the one they are trained with, `rex_rag.protocol.PROMPT_TEMPLATE`.
"""

from __future__ import annotations

import re

from rex_rag.evaluation.records import Question

# A multiple-choice question, for every method: what takes the place of `{question}`.
CHOICES = "{question}\nChoices:\n{choices}\nAnswer with the letter of the right choice alone."

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def placeholders(template: str) -> list[str]:
    """The names in braces, in order of appearance."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


def fill(template: str, **values: str) -> str:
    """Replace the placeholders that are given; other text in braces stays."""
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)


def question_text(question: Question) -> str:
    """A question as every method shows it: its text, and its lettered choices where it has some."""
    if question.choices is None:
        return question.question.strip()
    choices = "\n".join(f"{letter}. {text}" for letter, text in question.choices.items())
    return fill(CHOICES, question=question.question.strip(), choices=choices)
