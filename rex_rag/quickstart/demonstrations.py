"""Scripted search trajectories over HopWorld, for a supervised warm start.

They are imperfect by construction: most multi-hop questions are answered with the entity that the first search found.
A policy trained on them has real dead ends, and still gives the way out of them a small probability.

Invariant: the ids of a tokenised demonstration are those that the rollout engine would build around the same model
text: the prompt through the chat template, every segment encoded by itself, the closing tag of an observation apart
from its body. Labels are -100 wherever the text is not the model's.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from rex_rag.protocols import Protocol, SearchR1, ToolCall
from rex_rag.protocols.chat import render_chat
from rex_rag.protocols.inert import control_tokens, make_inert
from rex_rag.quickstart.hopworld import HopQuestion
from rex_rag.retrieval.base import Retriever, checked_search
from rex_rag.support.errors import UserError
from rex_rag.tools.retrieval import render_passages
from rex_rag.training.demonstrations import IGNORED_LABEL
from rex_rag.types import Passage, SegmentKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A scripted trajectory: (kind, text) segments after the prompt of `question`, and the answer they end with.

    The text of an INFORMATION segment is what the search brought; the protocol frames it.
    """

    question: HopQuestion
    segments: tuple[tuple[SegmentKind, str], ...]
    answer: str

    @property
    def is_correct(self) -> bool:
        return self.answer in self.question.golden_answers


class TokenizedDemonstration(TypedDict):
    input_ids: list[int]
    labels: list[int]


def write_demonstration(
    question: HopQuestion,
    rankings: Sequence[Sequence[Passage]],
    searches: int | None = None,
    doubt: str | None = None,
    protocol: Protocol | None = None,
) -> Demonstration:
    """Script the walk of a question's chain, one search a hop, and answer with the entity reached.

    Args:
        question: the question and its chain.
        rankings: what the retriever returned for each hop's query (`search_query`), best first.
        searches: how many hops to search before answering; all of them by default. Fewer give a wrong answer.
        doubt: an exploration prompt to insert (`PROBE`, no loss) after the first search, before the next action.
        protocol: what calls and answers are written in; Search-R1's tags by default.
    """
    protocol = protocol or SearchR1()
    searches = question.hops if searches is None else searches
    if not 1 <= searches <= question.hops:
        raise UserError(f"searches={searches} is outside 1..{question.hops}, the hops of {question.question!r}")
    segments: list[tuple[SegmentKind, str]] = []
    thought = f"I need the {question.relations[0]} of {question.chain[0]}"
    for hop in range(searches):
        query = search_query(question, hop)
        action = protocol.write_call(ToolCall("search", {"query": query}))
        segments += _turn(thought, action, doubt if hop == 1 else None)
        segments.append((SegmentKind.INFORMATION, render_passages(rankings[hop])))
        # The thought after a search is the same whether a search or an answer follows: the choice between them, where
        # dead ends arise, falls on one token.
        thought = f"the {question.relations[hop]} of {question.chain[hop]} is {question.chain[hop + 1]}"
    answer = question.chain[searches]
    segments += _turn(thought, protocol.write_answer(answer), doubt if searches == 1 else None)
    return Demonstration(question=question, segments=tuple(segments), answer=answer)


def _turn(thought: str, action: str, doubt: str | None) -> list[tuple[SegmentKind, str]]:
    if doubt is None:
        return [(SegmentKind.POLICY, f"<think> {thought}</think>{action}")]
    return [
        (SegmentKind.POLICY, f"<think> {thought}</think>"),
        (SegmentKind.PROBE, doubt),
        (SegmentKind.POLICY, f"</think>{action}"),
    ]


def search_query(question: HopQuestion, hop: int) -> str:
    """The query of a hop, counted from 0."""
    return f"{question.relations[hop]} of {question.chain[hop]}"


def build_demonstrations(
    questions: Sequence[HopQuestion],
    retriever: Retriever,
    *,
    wrong_rate: float = 0.9,
    top_k: int = 1,
    seed: int = 0,
    doubts: Sequence[str] = (),
    doubt_rate: float = 0.0,
    doubt_wrong_rate: float | None = None,
    protocol: Protocol | None = None,
) -> list[Demonstration]:
    """Script one demonstration a question, in order, with what the retriever really returns.

    Args:
        questions: questions of any hop count; one-hop questions are always answered correctly.
        retriever: searched once, with the queries of all hops.
        wrong_rate: probability that a multi-hop question is answered after its first search, with the first
            intermediate entity.
        top_k: passages an observation.
        seed: of the draws.
        doubts: exploration prompts that some demonstrations contain, so that a policy can read on after one.
        doubt_rate: share of demonstrations with one. Off by default.
        doubt_wrong_rate: the `wrong_rate` of multi-hop demonstrations with a doubt. By default the same, so that what
            a doubt should lead to is not taught; a lower one stands in for what a pretrained model has read, that a
            doubt is often followed by a second look.
        protocol: what calls and answers are written in; Search-R1's tags by default.

    Returns:
        The demonstrations. A question one of whose passages the retriever did not return is left out: its
        demonstration would state facts that nobody read. How many were left out is logged.

    Raises:
        ValueError: when a rate is not a probability, or there are no doubts to draw from.
        RetrievalError: when the retriever fails.
    """
    doubt_wrong_rate = wrong_rate if doubt_wrong_rate is None else doubt_wrong_rate
    for name, rate in (("wrong_rate", wrong_rate), ("doubt_wrong_rate", doubt_wrong_rate)):
        if not 0.0 <= rate <= 1.0:
            raise UserError(f"{name}={rate} is not a probability; choose a number from 0 to 1")
    if not 0.0 <= doubt_rate <= 1.0 or (doubt_rate > 0 and not doubts):
        raise UserError(f"doubt_rate={doubt_rate} with {len(doubts)} doubts; choose 0 to 1, and give doubts above 0")
    queries = list(dict.fromkeys(search_query(item, hop) for item in questions for hop in range(item.hops)))
    found = dict(zip(queries, checked_search(retriever, queries, top_k), strict=True)) if queries else {}
    draw, draw_doubt = random.Random(f"demonstrations/{seed}"), random.Random(f"demonstrations/{seed}/doubts")
    demonstrations = []
    for question in questions:
        doubt = draw_doubt.choice(doubts) if draw_doubt.random() < doubt_rate else None
        stops = question.hops > 1 and draw.random() < (wrong_rate if doubt is None else doubt_wrong_rate)
        searches = 1 if stops else question.hops
        rankings = [found[search_query(question, hop)] for hop in range(searches)]
        if all(
            any(passage.title == entity for passage in ranking)
            for entity, ranking in zip(question.chain, rankings, strict=False)
        ):
            demonstrations.append(write_demonstration(question, rankings, searches, doubt, protocol))
    if len(demonstrations) < len(questions):
        logger.info(
            "left out %d of %d demonstrations whose passage was not among the %d retrieved",
            len(questions) - len(demonstrations),
            len(questions),
            top_k,
        )
    return demonstrations


def tokenize_demonstrations(
    demonstrations: Iterable[Demonstration], tokenizer: PreTrainedTokenizerBase, protocol: Protocol | None = None
) -> list[TokenizedDemonstration]:
    """Encode demonstrations to rows of `input_ids` and `labels`, -100 on all but `POLICY` tokens.

    A row ends where a rollout stops. Where the protocol's turns are whole messages, their end is taught too.
    """
    demonstrations = list(demonstrations)
    if not demonstrations:
        return []
    protocol = protocol or SearchR1()
    prompts = [
        render_chat(tokenizer, protocol.messages(item.question.question), tools=protocol.schemas)
        for item in demonstrations
    ]
    framing, forbidden = protocol.framing(tokenizer), control_tokens(tokenizer)

    def pieces(demonstration: Demonstration) -> list[tuple[SegmentKind, str]]:
        """The texts that are encoded apart: every segment, and what closes an observation."""
        found: list[tuple[SegmentKind, str]] = []
        segments = demonstration.segments
        following = [*(kind for kind, _ in segments[1:]), None]
        for (kind, text), next_kind in zip(segments, following, strict=True):
            if kind is SegmentKind.INFORMATION:
                found.append((kind, framing.head + make_inert(text, forbidden, protocol.marks)))
                found.append((kind, framing.tail))
            else:
                ends_turn = next_kind in (SegmentKind.INFORMATION, None)
                found.append((kind, text + framing.message_end if ends_turn else text))
        return found

    rows_of_pieces = [pieces(item) for item in demonstrations]
    # One batched call over the distinct texts: most passages recur.
    texts = list(dict.fromkeys([*prompts, *(text for row in rows_of_pieces for _, text in row)]))
    ids_of = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    rows: list[TokenizedDemonstration] = []
    for prompt, row in zip(prompts, rows_of_pieces, strict=True):
        input_ids = list(ids_of[prompt])
        labels = [IGNORED_LABEL] * len(input_ids)
        for kind, text in row:
            ids = ids_of[text]
            input_ids += ids
            labels += ids if kind is SegmentKind.POLICY else [IGNORED_LABEL] * len(ids)
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows
