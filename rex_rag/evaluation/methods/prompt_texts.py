"""The words of every method's prompts, in one place. Structure after each method's authors, words our own.

`{name}` marks a placeholder; `fill` replaces all of them in one pass, so that braces in a question or a passage stay
what they are. The search agents' prompt is the one they are trained with, their protocol's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rex_rag.evaluation.records import Question
from rex_rag.protocols.inert import escape_tokens

# A multiple-choice question, for every method: what takes the place of `{question}`.
CHOICES = "{question}\nChoices:\n{choices}\nAnswer with the letter of the right choice alone."

# Answer without a word of reasoning, from memory.
DIRECT = (
    "Answer the question below from what you know. Write the answer alone, as short as possible, and nothing else.\n"
    "Question: {question}\n"
)

# Wei et al., arXiv 2201.11903, in the zero-shot form of Kojima et al., arXiv 2205.11916.
CHAIN_OF_THOUGHT = (
    "Answer the question below. Think step by step and write your reasoning down. Then end with one line that holds "
    'the answer alone, as short as possible: "So the answer is: <the answer>".\n'
    "Question: {question}\n"
    "Let us think step by step.\n"
)

# Lewis et al., arXiv 2005.11401, as a prompt: the passages found with the question, then the question.
RETRIEVE_ONCE = (
    "Answer the question below. These passages were found for it; they may or may not help.\n\n"
    "{passages}\n\n"
    "Write the answer alone, as short as possible, and nothing else.\n"
    "Question: {question}\n"
)

# Trivedi et al., arXiv 2212.10509: paragraphs first, then question and the thoughts so far (which follow as the
# model's own turn). The paper shows worked examples drawn from each data set's training part; one example of our own
# stands here for every data set, as FlashRAG also has a single one (arXiv 2405.13576).
IRCOT = (
    "You answer questions that need facts from several documents. Think in short sentences, one fact a sentence, each "
    "building on the documents and on your earlier thoughts. Every sentence is used to look for further documents. "
    'When you know the answer, write "So the answer is:" and the answer alone.\n\n'
    "Here is an example.\n\n"
    "Title: The Salt Road\nThe Salt Road is a novel by Mira Holt, printed in 1951.\n\n"
    "Title: Mira Holt\nMira Holt was a novelist. She was born in Arlen and taught music there.\n\n"
    "Question: Where was the author of The Salt Road born?\n"
    "Thought: The Salt Road was written by Mira Holt. Mira Holt was born in Arlen. So the answer is: Arlen.\n\n"
    "Now it is your turn.\n\n"
    "{passages}\n\n"
    "Question: {question}\n"
    "Thought:"
)

# Guo et al., arXiv 2501.12948, with short answers: reasoning and answer in tags, no search.
THINK_AND_ANSWER = (
    "Find the answer to the question below. First reason about it between <think> and </think>. Then write the answer "
    "alone, without any explanation, between <answer> and </answer>, for example <answer> Lisbon </answer>.\n"
    "Question: {question}\n"
)

# Li et al., arXiv 2501.05366: the agent's instruction ...
SEARCH_O1 = (
    "You are a reasoning assistant that can search while it reasons, to answer the question below accurately.\n\n"
    "Whenever you are unsure of a fact, write <|begin_search_query|> your query <|end_search_query|>. The system "
    "searches, reads what it finds, and tells you what is of use, between <|begin_search_result|> and "
    "<|end_search_result|>. You can search again as often as needed, at most {searches} times. Then go on reasoning "
    "with what you were told.\n\n"
    "Example:\n"
    "Question: Where was the author of The Salt Road born?\n"
    "You think: I have to find out who wrote The Salt Road.\n"
    "<|begin_search_query|>The Salt Road author<|end_search_query|>\n"
    "(the system tells you that it was Mira Holt)\n"
    "You think: Now I need her place of birth.\n"
    "<|begin_search_query|>Mira Holt place of birth<|end_search_query|>\n"
    "(the system tells you what it found, and you go on)\n\n"
    "Reason step by step. Give the final answer alone, as short as possible, as \\boxed{YOUR ANSWER}.\n\n"
    "Question: {question}\n"
)
# ... its reason-in-documents step ...
SEARCH_O1_DOCUMENTS = (
    "Someone reasons about a question and has just searched for something. Read what the search found, and pick out "
    "what helps with this search and fits in with the reasoning so far.\n\n"
    "- Read every document with care, and use facts that stand there only.\n"
    "- Take what bears on the search query and moves the reasoning on, and leave out the rest.\n"
    '- If something helps, write "**Final Information**" on a line of its own, and below it the facts, in a few '
    "sentences.\n"
    '- If nothing helps, write "**Final Information**" on a line of its own, and below it "No helpful information '
    'found."\n\n'
    "Reasoning so far:\n{reasoning}\n\n"
    "Search query:\n{query}\n\n"
    "Documents found:\n{documents}\n"
)
# ... and what it is told in place of a result.
SEARCH_O1_NOTHING = "No helpful information found."
SEARCH_O1_REPEATED = "This query was searched before. Use the earlier result."
SEARCH_O1_LIMIT = "No more searches are allowed. Give the final answer now."
SEARCH_O1_BLANK = "The search query was blank. Write what you look for."

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def placeholders(template: str) -> list[str]:
    """The names in braces, in order of appearance."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


def fill(template: str, **values: str) -> str:
    """Replace the placeholders that are given; other text in braces stays."""
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template and what fills it. What stands in a question is text: which of it a tokenizer would take for control
    tokens is only known with the tokenizer."""

    template: str
    question: str
    values: Mapping[str, str]

    def text(self, control_tokens: Iterable[str]) -> str:
        """The prompt, with control tokens in the question escaped."""
        return fill(self.template, question=escape_tokens(self.question, control_tokens), **self.values)


def question_text(question: Question) -> str:
    """A question as every method shows it: its text, and its lettered choices where it has some."""
    if question.choices is None:
        return question.question.strip()
    choices = "\n".join(f"{letter}. {text}" for letter, text in question.choices.items())
    return fill(CHOICES, question=question.question.strip(), choices=choices)
