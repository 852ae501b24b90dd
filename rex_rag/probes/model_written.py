"""Doubts that a model writes about the very reasoning that failed, instead of a prompt from a pool."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rex_rag.models.endpoint import EndpointClient, EndpointOptions, chat_reply, check_endpoint_url, in_order
from rex_rag.probes.explorer import Explorer, Failed, Proposal, Score
from rex_rag.protocols.chat import encode_chat
from rex_rag.protocols.inert import THINK_TAGS, make_inert
from rex_rag.rollout.cuts import tokens_before
from rex_rag.rollout.script import Generate, Script, Written
from rex_rag.support.tokenization import encode_on
from rex_rag.types import Trajectory

if TYPE_CHECKING:
    from rex_rag.rollout.agent import Agent, AgentScript
    from rex_rag.training.config import REXRAGConfig

DOUBT_TEMPLATE = (
    "The answer to the question below is wrong. Write one short sentence in the first person, beginning with Wait, "
    "that doubts the reasoning and says what to check next.\n"
    "Question: {question}\nReasoning: {reasoning}\nWrong answer: {answer}\n"
)
SENTENCE_ENDS = (".", "?", "!")
MAX_DOUBT_TOKENS = 40
# An endpoint says how long it thought in tokens of its own.
MAX_REPLY_TOKENS = 1024
_SENTENCE = re.compile(r"[^.?!]*[.?!]")


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

    @classmethod
    def make(cls, agent: Agent, args: REXRAGConfig, score: Score | None) -> ModelWrittenExplorer:
        return cls(agent, score)

    def __init__(self, agent: Agent, score: Score | None = None) -> None:
        self._agent = agent
        self._score = score

    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        script = self._agent.script
        asides = [
            Trajectory(
                prompt_ids=encode_chat(
                    script.tokenizer, [{"role": "user", "content": _aside(script, one)}], script.settings
                )
            )
            for one in failed
        ]
        written: dict[int, Written] = {}

        def doubt(row: int) -> Script:
            written[row] = yield Generate(asides[row].prompt_ids, SENTENCE_ENDS, MAX_DOUBT_TOKENS)

        scripts = [(doubt(row), aside) for row, aside in enumerate(asides)]
        self._agent.driver.run(scripts, stop_sets=[SENTENCE_ENDS])
        rows = [row for row in written if written[row].text.endswith(SENTENCE_ENDS)]
        rows = [row for row in rows if not any(mark in written[row].text for mark in script.protocol.marks)]
        logprobs = self._logprobs(asides, rows)
        proposals: list[Proposal | None] = [None] * len(failed)
        for row, values in zip(rows, logprobs, strict=True):
            sentence = asides[row].segments[0]
            proposals[row] = _before_the_answer(script, failed[row], sentence.text, sentence.ids, values)
        return proposals

    def _logprobs(self, asides: Sequence[Trajectory], rows: Sequence[int]) -> Sequence[list[float] | None]:
        sampled = [asides[row].segments[0] for row in rows]
        if self._score is None:
            # One that the engine could not score leaves the whole sentence without: `Proposal` knows all or none.
            known = [[value for value in segment.logprobs or () if value is not None] for segment in sampled]
            return [
                values if len(values) == len(one.ids) else None for values, one in zip(known, sampled, strict=True)
            ]
        # Also where the engine reports some: processes must make equally many calls.
        return self._score([asides[row].prompt_ids for row in rows], [segment.ids for segment in sampled])


class EndpointExplorer(Explorer):
    """Has a model behind an OpenAI-format endpoint write the sentence, and inserts its text before the answer.

    It has no place in eq. 6: what the endpoint's distribution gives the policy's tokens is not known. So its probes
    are for forms that read no density: uncorrected ones, or those that leave the inserted text out of the loss.

    A reply without a whole sentence of at most `MAX_DOUBT_TOKENS` tokens, or with a mark or a control token in it, is
    no proposal. An endpoint that fails ends the run, once its attempts are spent.
    """

    name = "endpoint"
    has_density = False

    @classmethod
    def make(cls, agent: Agent, args: REXRAGConfig, score: Score | None) -> EndpointExplorer:
        assert args.explorer_url and args.explorer_model  # `problems` refuses others
        options = EndpointOptions(args.explorer_url, args.explorer_model)
        return cls(agent.script, EndpointClient(options, "/chat/completions", chat_reply))

    @staticmethod
    def problems(args: REXRAGConfig) -> list[str]:
        if not args.explorer_url or not args.explorer_model:
            return [
                f"explorer is 'endpoint' with explorer_url {args.explorer_url!r} and explorer_model "
                f"{args.explorer_model!r}; name the address (http://host:port/v1) and the model that is served there"
            ]
        check_endpoint_url(args.explorer_url)
        return []

    def __init__(self, script: AgentScript, client: EndpointClient) -> None:
        self._script = script
        self._client = client

    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        asked = [self._client.threads.submit(self._client.complete, self._body(one)) for one in failed]
        return [self._proposal(one, reply["text"]) for one, reply in zip(failed, in_order(asked), strict=True)]

    def _body(self, failed: Failed) -> dict:
        return {
            "messages": [{"role": "user", "content": _aside(self._script, failed)}],
            "max_tokens": MAX_REPLY_TOKENS,
            # As repeatable as the server makes it.
            "seed": int(failed.draws.integers(2**31)),
        }

    def _proposal(self, failed: Failed, reply: str) -> Proposal | None:
        # What a reasoning model thinks first is no part of the doubt.
        sentence = _SENTENCE.match(reply.rpartition(THINK_TAGS[1])[2].strip())
        if sentence is None:
            return None
        text = " ".join(sentence.group().split())
        script = self._script
        ids = encode_on(script.tokenizer, [text])[0]
        forbidden = any(mark in text for mark in (*script.protocol.marks, *script.control_tokens))
        return None if forbidden or len(ids) > MAX_DOUBT_TOKENS else _before_the_answer(script, failed, text, ids)


def _aside(script: AgentScript, failed: Failed) -> str:
    """What a model is asked, aside; everything that it quotes is inert."""
    original = failed.original
    quoted = {
        "question": script.decode([original.prompt_ids])[0],
        "reasoning": "".join(segment.text for segment in original.segments),
        "answer": original.answer or "",
    }
    text = DOUBT_TEMPLATE
    for name, value in quoted.items():
        inert = make_inert(value, script.control_tokens, script.protocol.marks)
        text = text.replace(f"{{{name}}}", " ".join(inert.split()))
    return text


def _before_the_answer(
    script: AgentScript, failed: Failed, sentence: str, ids: list[int], logprobs: list[float] | None = None
) -> Proposal:
    """The original re-opened before its answer, with a thought that begins with the sentence."""
    span = failed.original.answer_span
    assert span is not None  # a failed original answered
    answered = failed.original.segments[span.segment]
    kept, leftover = tokens_before(answered, span.offset, script.decode)
    opening = leftover + f"{THINK_TAGS[0]} "
    opening_ids = encode_on(script.tokenizer, [opening])[0]
    return Proposal(
        failed.index,
        span.segment,
        kept,
        answered.text[: span.offset - len(leftover)],
        opening_ids + ids,
        opening + sentence,
        None if logprobs is None else [0.0] * len(opening_ids) + logprobs,
    )
