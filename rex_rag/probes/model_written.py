"""Doubts that the policy itself writes, about the very reasoning that failed, instead of a prompt from a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rex_rag.probes.explorer import Explorer, Failed, Proposal
from rex_rag.protocols.chat import encode_chat
from rex_rag.protocols.inert import THINK_TAGS, make_inert
from rex_rag.rollout.cuts import tokens_before
from rex_rag.rollout.script import Generate, Script, Written
from rex_rag.types import Trajectory

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent

# Log-probabilities of ids behind contexts, row by row: (contexts, ids) -> one a token. A collective.
Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[float]]]

DOUBT_TEMPLATE = (
    "The answer to the question below is wrong. Write one short sentence in the first person, beginning with Wait, "
    "that doubts the reasoning and says what to check next.\n"
    "Question: {question}\nReasoning: {reasoning}\nWrong answer: {answer}\n"
)
SENTENCE_ENDS = (".", "?", "!")
MAX_DOUBT_TOKENS = 40


class ModelWrittenExplorer(Explorer):
    """Has the policy write one sentence of doubt in a conversation aside, and inserts the very ids before the answer.

    Its place in eq. 6: the sentence was drawn from pi_old given the conversation aside, which follows from the prefix
    and the answer; so its tokens have the log-probabilities that they were sampled with there. What stands before it
    (`<think>`, and the characters of a token across the answer's first) follows from the original: log-probability 0.
    A sentence that does not end in time, or holds a mark of the protocol, is thrown away: what is left is taken for
    the whole of the distribution, as the trajectory filter takes it too. The conversation quotes the wrong answer,
    which a probe's density would have to sum over; it is exact where the prefix decides the answer, as in the paper.

    Args:
        agent: runs the policy.
        score: where the engine reports no log-probabilities; without it, proposals have none.
    """

    name = "model"

    def __init__(self, agent: Agent, score: Score | None = None) -> None:
        self._agent = agent
        self._score = score

    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        script = self._agent.script
        asides = [Trajectory(prompt_ids=self._aside(one)) for one in failed]
        written: dict[int, Written] = {}

        def doubt(row: int) -> Script:
            written[row] = yield Generate(asides[row].prompt_ids, SENTENCE_ENDS, MAX_DOUBT_TOKENS)

        scripts = [(doubt(row), aside) for row, aside in enumerate(asides)]
        self._agent.driver.run(scripts, stop_sets=[SENTENCE_ENDS])
        rows = [row for row in written if self._is_usable(written[row])]
        logprobs = self._logprobs(asides, rows)
        proposals: list[Proposal | None] = [None] * len(failed)
        for row, values in zip(rows, logprobs, strict=True):
            original, span = failed[row].original, failed[row].original.answer_span
            answered = original.segments[span.segment]
            kept, leftover = tokens_before(answered, span.offset, script.decode)
            opening = leftover + f"{THINK_TAGS[0]} "
            opening_ids = script.tokenizer(opening, add_special_tokens=False)["input_ids"]
            proposals[row] = Proposal(
                failed[row].index,
                span.segment,
                kept,
                answered.text[: span.offset - len(leftover)],
                opening_ids + asides[row].segments[0].ids,
                opening + asides[row].segments[0].text,
                None if values is None else [0.0] * len(opening_ids) + values,
            )
        return proposals

    def _aside(self, failed: Failed) -> list[int]:
        script, original = self._agent.script, failed.original
        quoted = {
            "question": script.decode([original.prompt_ids])[0],
            "reasoning": "".join(segment.text for segment in original.segments),
            "answer": original.answer or "",
        }
        text = DOUBT_TEMPLATE
        for name, value in quoted.items():
            inert = make_inert(value, script.control_tokens, script.protocol.marks)
            text = text.replace(f"{{{name}}}", " ".join(inert.split()))
        return encode_chat(script.tokenizer, [{"role": "user", "content": text}], script.settings)

    def _is_usable(self, written: Written) -> bool:
        return written.text.endswith(SENTENCE_ENDS) and not any(
            mark in written.text for mark in self._agent.protocol.marks
        )

    def _logprobs(self, asides: Sequence[Trajectory], rows: Sequence[int]) -> list[list[float] | None]:
        sampled = [asides[row].segments[0] for row in rows]
        if self._score is None:
            return [segment.logprobs for segment in sampled]
        # Also where the engine reports some: processes must make equally many calls.
        return self._score([asides[row].prompt_ids for row in rows], [segment.ids for segment in sampled])
