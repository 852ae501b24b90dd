"""Search-o1: searches inside the reasoning; documents are condensed before they enter it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rex_rag.evaluation.methods.base import Attempt, Method
from rex_rag.evaluation.methods.extraction import boxed_answer
from rex_rag.evaluation.methods.prompt_texts import (
    SEARCH_O1,
    SEARCH_O1_BLANK,
    SEARCH_O1_DOCUMENTS,
    SEARCH_O1_LIMIT,
    SEARCH_O1_NOTHING,
    SEARCH_O1_REPEATED,
    fill,
)
from rex_rag.protocols.inert import make_inert
from rex_rag.rollout.script import Generate, Script, search
from rex_rag.types import Truncation

QUERY_MARKS = ("<|begin_search_query|>", "<|end_search_query|>")
RESULT_MARKS = ("<|begin_search_result|>", "<|end_search_result|>")
RESULT_HEAD = "\n\n" + RESULT_MARKS[0]
RESULT_TAIL = RESULT_MARKS[1] + "\n\n"

_QUERY = re.compile(
    f"{re.escape(QUERY_MARKS[0])}((?:(?!{re.escape(QUERY_MARKS[0])}).)*?){re.escape(QUERY_MARKS[1])}", re.DOTALL
)
_FINAL = re.compile(r"\*\*\s*Final Information\s*:?\s*\*\*:?", re.IGNORECASE)
_KEPT_STEPS = 5


def condense_reasoning(text: str) -> str:
    """The reasoning as the authors quote it to the reason-in-documents step: numbered paragraphs; of more than five,
    the first, the last four and those that hold a search or its result, the others as one "..."."""
    steps = [line for line in text.splitlines() if line.strip()]
    numbered = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    if len(numbered) <= _KEPT_STEPS:
        return "\n\n".join(numbered)
    kept: list[str] = []
    for index, step in enumerate(numbered):
        searching = QUERY_MARKS[0] in step or RESULT_MARKS[0] in step
        if index == 0 or index > len(numbered) - _KEPT_STEPS or searching:
            kept.append(step)
        elif kept[-1] != "...":
            kept.append("...")
    return "\n\n".join(kept)


def condensed_information(text: str) -> str:
    """What the reason-in-documents step found: the text behind its last heading, as one line."""
    parts = _FINAL.split(text)
    found = " ".join(parts[-1].split()) if len(parts) > 1 else ""
    return found or SEARCH_O1_NOTHING


class SearchO1(Method):
    r"""One chain of reasoning with searches between special strings, and a side prompt that reads the documents.

    A turn ends behind a query, at the end of the model's message, or at the token limit (the next turn goes on where
    it was cut). After `max_turns` searches or turns a query is refused, and one last turn follows. A query that was
    asked before is not searched again. The answer is the last `\boxed{…}` of the chain; what the side prompt writes
    is read for its final information alone, and is inert where it enters the chain.

    Segments in time: chain (POLICY), the side prompt's output (POLICY), what entered the chain (INFORMATION).
    """

    name = "search_o1"
    title = "Search-o1"
    source = "Li et al., Search-o1: Agentic Search-Enhanced Large Reasoning Models, arXiv 2501.05366"
    uses_retriever = True
    default_template = SEARCH_O1
    further_prompts: Mapping[str, str] = {
        "documents": SEARCH_O1_DOCUMENTS,
        "nothing": SEARCH_O1_NOTHING,
        "repeated": SEARCH_O1_REPEATED,
        "limit": SEARCH_O1_LIMIT,
        "blank": SEARCH_O1_BLANK,
    }
    stop_strings = ((), (QUERY_MARKS[1],))
    marks = (*QUERY_MARKS, *RESULT_MARKS)

    def script(self, attempt: Attempt) -> Script:
        budget, trajectory = attempt.tools.budget, attempt.trajectory
        trajectory.prompt_ids = attempt.tools.encode_chat(
            self.prompt_text(attempt.question, searches=str(budget.max_turns))
        )
        chain = list(trajectory.prompt_ids)
        fresh: list[int] = []  # ids of the model's since the last insertion
        said, quoted = "", ""  # the chain's text: the model's alone, and with what was inserted
        asked: set[str] = set()
        for turn in range(budget.max_turns + 2):
            written = yield Generate(chain, (QUERY_MARKS[1],))
            chain += written.ids
            fresh += written.ids
            text = attempt.tools.decode(fresh)
            query = _QUERY.search(text)
            last = turn == budget.max_turns + 1 or written.truncation is Truncation.SEQUENCE
            # Kept at once: a chain that runs out of room behind a search ends where it is.
            trajectory.answer = boxed_answer(said + text)
            if query is None or last:
                if trajectory.answer is None and written.truncation is Truncation.TURN and not last:
                    continue
                trajectory.invalid_actions += int(trajectory.answer is None and query is None)
                return
            said, quoted, fresh = said + text, quoted + text, []
            content = query.group(1).strip()
            if not content:
                trajectory.invalid_actions += 1
                result = SEARCH_O1_BLANK
            elif turn == budget.max_turns:
                result = SEARCH_O1_LIMIT
            elif content in asked:
                result = SEARCH_O1_REPEATED
            else:
                asked.add(content)
                [found] = yield search(content)
                side = yield Generate(self._reading_prompt(attempt, quoted, content, found.text))
                result = condensed_information(side.text)
            result, ids = self._insert(attempt, result)
            quoted += result
            chain += ids

    def _forbidden(self, attempt: Attempt) -> tuple[str, ...]:
        return (*attempt.tools.control_tokens, *QUERY_MARKS, *RESULT_MARKS)

    def _reading_prompt(self, attempt: Attempt, quoted: str, query: str, found: str) -> list[int]:
        """The reason-in-documents prompt. The model's words are quoted in it, control tokens made inert."""
        documents = attempt.within_observation(make_inert(found, self._forbidden(attempt)))
        return attempt.tools.encode_chat(
            fill(
                SEARCH_O1_DOCUMENTS,
                reasoning=make_inert(condense_reasoning(quoted), attempt.tools.control_tokens),
                query=make_inert(query, attempt.tools.control_tokens),
                documents=documents,
            )
        )

    def _insert(self, attempt: Attempt, result: str) -> tuple[str, list[int]]:
        """Record the result between its marks, cut so that both fit the observation budget; return text and ids."""
        body = attempt.within_observation(
            make_inert(result, self._forbidden(attempt)), frame=RESULT_HEAD + RESULT_TAIL
        )
        text = RESULT_HEAD + body + RESULT_TAIL
        return text, attempt.inform(text)
