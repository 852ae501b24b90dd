"""The search rollout: batched over all live trajectories, token ids in and token ids out.

Invariant: the ids the model is given in turn k+1 are exactly the ids of turn k plus the ids of the inserted text.
Text is decoded only to be parsed. The engine knows neither rewards nor trainers; generator, retriever and the one
collective it needs are injected.

Every process makes the same number of generate calls: a process with nothing left to do joins with a dummy row, since
entering generation is a collective under ZeRO-3, FSDP, served and tensor-parallel vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rex_rag.protocols.search_r1 import (
    FEEDBACK_TEXT,
    OBSERVATION_HEAD,
    OBSERVATION_TAIL,
    control_tokens,
    parse_action,
    render_passages,
)
from rex_rag.retrieval.base import Retriever, checked_search
from rex_rag.rollout.cuts import tokens_before
from rex_rag.types import AnswerSpan, Passage, SearchCall, Segment, SegmentKind, Trajectory, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation, Generator
    from rex_rag.probes.pool import EncodedPool, ExplorationPool


@dataclass(frozen=True, slots=True)
class RolloutBudget:
    """Limits of a rollout, in tokens unless said otherwise. Defaults: METHOD/paper (2048 prompt, 500, 500, 4096)."""

    max_turns: int = 5  # turns that may search; one last generation follows in which a search is not executed
    max_turn_tokens: int = 500
    max_observation_tokens: int = 500
    max_sequence_length: int = 4096  # prompt and completion together
    top_k: int = 3  # passages per search


@dataclass(slots=True)
class RolloutSeconds:
    """Where the wall time of rollouts went, in seconds, since the last reset."""

    generation: float = 0.0
    retrieval: float = 0.0
    total: float = 0.0

    @property
    def engine(self) -> float:
        """The engine's own share: neither model nor retriever."""
        return self.total - self.generation - self.retrieval


@dataclass
class RolloutEngine:
    """Runs search rollouts.

    Args:
        generator: continues token ids.
        retriever: answers the queries of a turn in one batch.
        tokenizer: encodes inserted text, decodes sampled ids for parsing.
        budget: the limits.
        max_over_ranks: the maximum of an integer over all processes; the identity for one process.
        feedback: text inserted after an invalid action.
        context_length: tokens, prompt and limit together, that an engine serving all processes takes of a row;
            `max_sequence_length` by default. The larger it is, the fewer rows near their end need a call of their own.
    """

    generator: Generator
    retriever: Retriever
    tokenizer: PreTrainedTokenizerBase
    budget: RolloutBudget = field(default_factory=RolloutBudget)
    max_over_ranks: Callable[[int], int] = lambda count: count
    feedback: str = FEEDBACK_TEXT
    context_length: int | None = None

    def __post_init__(self) -> None:
        self.seconds = RolloutSeconds()
        self.generate_calls = 0
        self._control_tokens = control_tokens(self.tokenizer)
        self._feedback_ids = self._encode([self.feedback])[0]
        self._tail_ids = self._encode([OBSERVATION_TAIL])[0]
        smallest = len(self._encode([OBSERVATION_HEAD])[0]) + len(self._tail_ids) + 1
        if self.budget.max_observation_tokens < smallest:
            raise ValueError(
                f"max_observation_tokens is {self.budget.max_observation_tokens}, but the information tags alone take "
                f"{smallest - 1} tokens with this tokenizer; use at least {smallest}, better several hundred"
            )
        self._smallest_observation = smallest

    def rollout(self, prompts: Sequence[Sequence[int]]) -> list[Trajectory]:
        """Run one trajectory per prompt (token ids) to its end.

        Raises:
            ValueError: for a prompt that leaves no token to generate.
            RetrievalError: when a search could not be answered.
        """
        for prompt in prompts:
            if len(prompt) >= self.budget.max_sequence_length:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens leaves nothing of max_sequence_length "
                    f"{self.budget.max_sequence_length}; shorten the prompt template or raise the limit"
                )
        trajectories = [Trajectory(prompt_ids=list(prompt)) for prompt in prompts]
        self.resume(trajectories)
        return trajectories

    def resume(self, trajectories: Sequence[Trajectory]) -> None:
        """Run the given trajectories to their end, in place. A collective: every process must call it."""
        started = time.perf_counter()
        live = [trajectory for trajectory in trajectories if not trajectory.done]
        while (rows := self.max_over_ranks(len(live))) > 0:
            self._turn(live, rows)
            live = [trajectory for trajectory in live if not trajectory.done]
        self.seconds.total += time.perf_counter() - started

    def start_probe(self, original: Trajectory, parent: int, pool: ExplorationPool, prompt: int) -> Trajectory | None:
        """Re-open a failed original before its answer and insert an exploration prompt.

        The kept ids are exactly the sampled ones, up to and not including the `<answer>` tag. A token that straddles
        the tag's first character is dropped; the characters it held before the tag head the inserted text.

        Returns:
            A live trajectory for `resume`, or `None` where the prompt does not fit into max_sequence_length.
        """
        span = original.answer_span
        if span is None:
            raise ValueError("only an original that answered can be probed; this one has no answer")
        answered = original.segments[span.segment]
        kept, leftover = tokens_before(answered, span.offset, self.decode)
        encoded: EncodedPool = pool.encode(leftover)
        segments = [*original.segments[: span.segment]]
        if kept:
            logprobs = answered.logprobs[:kept] if answered.logprobs is not None else None
            text = answered.text[: span.offset - len(leftover)]
            segments.append(Segment(SegmentKind.POLICY, answered.ids[:kept], text, logprobs))
        segments.append(Segment(SegmentKind.PROBE, list(encoded.ids[prompt]), encoded.texts[prompt]))
        probe = Trajectory(
            prompt_ids=original.prompt_ids,
            segments=segments,
            searches=list(original.searches),
            turns=original.turns - 1,  # the answering turn is open again
            invalid_actions=original.invalid_actions,
            truncations=original.truncations.copy(),
            parent=parent,
            pool_logprobs=list(encoded.logprobs[prompt]),
        )
        return probe if probe.length < self.budget.max_sequence_length else None

    def _turn(self, live: list[Trajectory], rows: int) -> None:
        generations = self._generate(live, rows)
        texts = self.decode([generation.ids for generation in generations])
        searching: list[tuple[Trajectory, str]] = []
        for trajectory, generation, text in zip(live, generations, texts, strict=True):
            query = self._apply(trajectory, generation, text)
            if query is not None:
                searching.append((trajectory, query))
        if searching:
            self._observe(searching)

    def _limit(self, trajectory: Trajectory) -> int:
        return min(self.budget.max_turn_tokens, self.budget.max_sequence_length - trajectory.length)

    def _generate(self, live: list[Trajectory], rows: int) -> list[Generation]:
        """Sample one turn for every live row, cut to each row's own limit."""
        prompts = [trajectory.prompt_ids + trajectory.completion_ids for trajectory in live]
        limits = [self._limit(trajectory) for trajectory in live]
        output: dict[int, Generation] = {}
        started = time.perf_counter()
        for asked, limit, count in self._calls(prompts, limits, rows):
            dummies = [self._feedback_ids[:1]] * (count - len(asked))
            answers = self.generator.generate([prompts[row] for row in asked] + dummies, max_new_tokens=limit)
            output.update(zip(asked, answers, strict=False))
            self.generate_calls += 1
        self.seconds.generation += time.perf_counter() - started
        return [
            replace(
                generation,
                ids=generation.ids[:limit],
                logprobs=generation.logprobs[:limit] if generation.logprobs is not None else None,
                is_cut=bool(generation.is_cut) or len(generation.ids) >= limit,
            )
            for generation, limit in ((output[row], limit) for row, limit in enumerate(limits))
        ]

    def _calls(self, prompts: list[list[int]], limits: list[int], rows: int) -> Iterator[tuple[list[int], int, int]]:
        """Split a turn into generate calls, equally many on every process: (indices of rows, token limit, rows sent).

        An engine of this process alone ends each row where its context does, so one call with the largest limit does.
        An engine that serves all processes takes one limit for all rows, and refuses a call in which a single row
        could outgrow its context: rows of little room wait for a call with a limit that they can take. A row is in
        one call a turn, so it is sampled as if it were alone.
        """
        if not self.generator.equal_rows:
            yield list(range(len(prompts))), max(limits, default=1), max(1, len(prompts))
            return
        context = self.context_length or self.budget.max_sequence_length
        waiting = list(range(len(prompts)))
        while rows:
            limit = self.max_over_ranks(max((limits[row] for row in waiting), default=1))
            asked = [row for row in waiting if len(prompts[row]) + limit <= context]
            yield asked, limit, self.max_over_ranks(len(asked))
            waiting = [row for row in waiting if row not in asked]
            rows = self.max_over_ranks(len(waiting))

    def _apply(self, trajectory: Trajectory, generation: Generation, text: str) -> str | None:
        """Append what was sampled and act on it; return the query where a search is to be executed."""
        limit = self._limit(trajectory)
        trajectory.segments.append(Segment(SegmentKind.POLICY, generation.ids, text, generation.logprobs))
        trajectory.turns += 1
        last = trajectory.turns > self.budget.max_turns
        action = parse_action(text)
        if action is not None and action.kind == "answer":
            trajectory.answer = action.content
            trajectory.answer_span = AnswerSpan(len(trajectory.segments) - 1, action.start)
            trajectory.done = True
            return None
        if action is not None and not last:
            return action.content
        if action is None:
            trajectory.invalid_actions += 1
            if generation.is_cut:
                cause = Truncation.TURN if limit == self.budget.max_turn_tokens else Truncation.SEQUENCE
                trajectory.truncations[cause] += 1
                last = last or cause is Truncation.SEQUENCE
        if last:
            trajectory.done = True
        else:
            self._insert(trajectory, SegmentKind.FEEDBACK, self._feedback_ids, self.feedback)
        return None

    def _insert(self, trajectory: Trajectory, kind: SegmentKind, ids: list[int], text: str) -> None:
        """Append inserted text, or end the trajectory where it would leave no token to generate."""
        if trajectory.length + len(ids) < self.budget.max_sequence_length:
            trajectory.segments.append(Segment(kind, list(ids), text))
        else:
            trajectory.truncations[Truncation.SEQUENCE] += 1
            trajectory.done = True

    def _observe(self, searching: list[tuple[Trajectory, str]]) -> None:
        """Execute the searches of a turn in one batch and append what they found."""
        queries = list(dict.fromkeys(query for _, query in searching))  # a group often asks the same thing
        started = time.perf_counter()
        rankings = checked_search(self.retriever, queries, self.budget.top_k)
        self.seconds.retrieval += time.perf_counter() - started
        bodies = [OBSERVATION_HEAD + render_passages(ranking, self._control_tokens) for ranking in rankings]
        found = dict(zip(queries, zip(rankings, bodies, self._encode(bodies), strict=True), strict=True))
        for trajectory, query in searching:
            passages, body, body_ids = found[query]
            self._append_observation(trajectory, query, passages, body, body_ids)

    def _append_observation(
        self, trajectory: Trajectory, query: str, passages: list[Passage], body: str, body_ids: list[int]
    ) -> None:
        trajectory.searches.append(SearchCall(query, tuple(passages)))
        room = self.budget.max_sequence_length - trajectory.length - 1
        allowance = min(self.budget.max_observation_tokens, room)
        if allowance < self._smallest_observation:
            trajectory.truncations[Truncation.SEQUENCE] += 1
            trajectory.done = True
            return
        kept = allowance - len(self._tail_ids)
        if len(body_ids) > kept:
            cause = Truncation.OBSERVATION if allowance < room else Truncation.SEQUENCE
            trajectory.truncations[cause] += 1
            body_ids = body_ids[:kept]
            body = self.decode([body_ids])[0]
        self._insert(trajectory, SegmentKind.INFORMATION, body_ids + self._tail_ids, body + OBSERVATION_TAIL)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # verbose: passages are cut to the budget afterwards, so their length is nothing to warn of.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The texts of a batch of token ids, control tokens and spaces included."""
        if not ids:  # a rank that only joins in; batch_decode takes an empty batch for one empty row
            return []
        return self.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
