"""Demonstrations for a supervised start: turns that somebody wrote, played through the agent as if a model wrote them.

Invariant: ids and labels of a row are those that a rollout in training has around the same turns: the prompt through
the chat template, results framed, cut and made inert by the agent itself. Labels are -100 on all that is not the
model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.answers import exact_match, normalize_answer
from rex_rag.evaluation.coverage import AnswerMatcher
from rex_rag.evaluation.records import PREDICTIONS_FILE, Prediction
from rex_rag.models.generation import Generation
from rex_rag.protocols import Protocol, ToolCall
from rex_rag.retrieval.base import Retriever, checked_search
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.errors import UserError
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.tokenization import encode_on
from rex_rag.tools.base import Tool
from rex_rag.types import SegmentKind, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
LOOK_UP = "<think> I do not know this, so I look it up.</think>"
READ_OFF = "<think> {title} answers the question.</think>"


@dataclass(frozen=True, slots=True)
class Turns:
    """What is said in answer to a question, turn by turn; the last one gives the answer."""

    question: str
    golden_answers: tuple[str, ...]
    texts: tuple[str, ...]


def look_up(
    questions: Iterable[Mapping[str, Any]], retriever: Retriever, protocol: Protocol, top_k: int
) -> Iterator[Turns]:
    """One search with the question itself, then the gold answer, where one of the passages found holds it.

    That is all that gold answers alone can show: no second search, and no yes or no. Other questions are left out.

    Args:
        questions: rows of `question` and `golden_answers`.
        top_k: passages to look for the answer in, those that the model will see.

    Raises:
        RetrievalError: when the retriever fails.
    """
    rows = list(questions)
    queries = [row["question"].strip() for row in rows]
    for row, query, passages in zip(rows, queries, checked_search(retriever, queries, top_k), strict=True):
        gold = {form: answer for answer in row["golden_answers"] if (form := normalize_answer(answer))}
        matcher = AnswerMatcher(form for form in gold if form not in ("yes", "no"))
        for passage in passages:
            if found := matcher.find_in(passage):
                answer = gold[max(found, key=len)]
                search = LOOK_UP + protocol.write_call(ToolCall("search", {"query": query}))
                read = READ_OFF.format(title=passage.title or "What I found") + protocol.write_answer(answer)
                yield Turns(query, tuple(row["golden_answers"]), (search, read))
                break


def right_turns(run: str | Path) -> Iterator[Turns]:
    """What a run of `rex-rag evaluate` wrote where its answer was right and every action valid; nothing twice.

    Raises:
        UserError: for a folder without predictions.
    """
    files = sorted(Path(run).glob(f"*/{PREDICTIONS_FILE}"))
    if not files:
        raise UserError(f"{run} holds no predictions; name the --output of a finished `rex-rag evaluate`")
    for file in files:
        for number, row in iter_json_objects(file, UserError):
            try:
                prediction = Prediction.from_row(row)
            except (TypeError, KeyError) as error:
                raise UserError(f"{file}, line {number}, is no prediction ({error}); evaluate again") from error
            seen = set()
            for sample in prediction.samples:
                kinds = {segment["kind"] for segment in sample.segments}
                texts = tuple(one["text"] for one in sample.segments if one["kind"] == SegmentKind.POLICY.name)
                clean = kinds <= {SegmentKind.POLICY.name, SegmentKind.INFORMATION.name}
                if clean and texts not in seen and exact_match(sample.answer, prediction.golden_answers):
                    seen.add(texts)
                    yield Turns(prediction.question, prediction.golden_answers, texts)


class Playback:
    """A generator that gives prepared turns back, each row its own; a row is known by its prompt."""

    equal_rows = False

    def __init__(self, end: int) -> None:
        self._end = [end]  # said where the agent asks for more turns than there are
        self.turns: dict[tuple[int, ...], Iterator[list[int]]] = {}

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        return [Generation(next(self._own(ids), self._end)) for ids in prompt_ids]

    def _own(self, ids: Sequence[int]) -> Iterator[list[int]]:
        lengths = {len(prompt) for prompt in self.turns}
        return next(
            self.turns[prompt] for prompt in (tuple(ids[:length]) for length in lengths) if prompt in self.turns
        )


def play(
    turns: Sequence[Turns],
    tools: Sequence[Tool],
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    budget: RolloutBudget,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Trajectory | None]:
    """Roll out with each turn written as given; searches are really asked. In order.

    Returns:
        The trajectories; `None` for turns that the budget has no room for.

    Raises:
        RetrievalError: when a search could not be answered.
    """
    playback = Playback(tokenizer.eos_token_id or 0)
    agent = Agent(lambda stop: playback, tools, tokenizer, protocol, budget, chat_template_kwargs=chat_template_kwargs)
    prompts = [tuple(agent.script.encode(one.question)) for one in turns]
    # Where a turn is a whole message, its end is the model's to write.
    end = protocol.framing(tokenizer, chat_template_kwargs).message_end
    written = [
        encode_on(tokenizer, [text if text.rstrip().endswith(end) else text + end for text in one.texts])
        for one in turns
    ]
    played: list[Trajectory | None] = [None] * len(turns)
    # A turn as long as the limit counts as cut by it.
    waiting = [
        place
        for place, ids in enumerate(written)
        if len(ids) <= budget.max_turns + 1 and max(map(len, ids)) < budget.max_turn_tokens
    ]
    while waiting:
        batch: dict[tuple[int, ...], int] = {}
        for place in waiting:
            batch.setdefault(prompts[place], place)  # a second answer to a question waits for the next round
        playback.turns = {prompt: iter(written[place]) for prompt, place in batch.items()}
        trajectories = agent.rollout([list(prompt) for prompt in batch])
        for place, trajectory in zip(batch.values(), trajectories, strict=True):
            played[place] = trajectory
        taken = set(batch.values())
        waiting = [place for place in waiting if place not in taken]
    return played


def row_of(trajectory: Trajectory) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a trajectory, -100 on all but `POLICY` tokens."""
    labels = [IGNORED_LABEL] * len(trajectory.prompt_ids)
    for segment in trajectory.segments:
        labels += segment.ids if segment.kind is SegmentKind.POLICY else [IGNORED_LABEL] * len(segment.ids)
    return {"input_ids": trajectory.prompt_ids + trajectory.completion_ids, "labels": labels}


def demonstration_rows(
    turns: Sequence[Turns], trajectories: Sequence[Trajectory | None]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows for supervised training of those that still answer right within the budget, and why others are left out."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for one, trajectory in zip(turns, trajectories, strict=True):
        if trajectory is None or trajectory.truncations[Truncation.SEQUENCE]:
            left_out["too long for the recipe's budgets"] += 1
        elif trajectory.invalid_actions or not exact_match(trajectory.answer, one.golden_answers):
            left_out["not valid or not right by the recipe's protocol"] += 1
        else:
            rows.append({"question": one.question, "answer": trajectory.answer, **row_of(trajectory)})
    return rows, left_out
