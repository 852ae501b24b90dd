"""Methods written as scripts: a Python generator a question, all questions of a batch driven in lockstep.

A script yields what it wants, `Generate` or `Search`, and gets back `Written` or the passages; the driver puts the
wants of all questions together into one call each. The driver also keeps the books: every text the model wrote becomes
a POLICY segment with the sampled ids, every search a `SearchCall`, every cut a counted truncation. A script adds the
INFORMATION segments and the answer.

A script keeps the ids of what the model wrote and continues them; it never encodes them anew, save where a method's
own prompt quotes the model. Where a method shows retrieved text inside its prompt (RAG, IRCoT) or asks the model aside
(Search-o1), a trajectory's segments follow each other in time, not in one sequence of tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from rex_rag.evaluation.methods.base import Method, Toolbox
from rex_rag.evaluation.records import Question
from rex_rag.protocols.search_r1 import ALL_TAGS
from rex_rag.retrieval.base import checked_search
from rex_rag.types import Passage, SearchCall, Segment, SegmentKind, Trajectory, Truncation


@dataclass(frozen=True, slots=True)
class Generate:
    """Have the model continue these ids until a stop string, its end-of-sequence token or a limit.

    The limit is that of a turn, lowered by `limit` (tokens) and by what `max_sequence_length` leaves.
    """

    prompt_ids: list[int]
    stop: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """Ask the retriever. The query must not be blank."""

    query: str


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote: the sampled ids, up to where it ended its message (as is its text).

    ended: it ended its message. truncation: why it was cut, `None` where it stopped by itself.
    """

    ids: list[int]
    text: str
    ended: bool
    truncation: Truncation | None


Script = Coroutine[Generate | Search, Written | list[Passage], None]


class Desk:
    """What a script works with: one question, its trajectory, and the tools."""

    def __init__(self, question: Question, toolbox: Toolbox) -> None:
        self.question = question
        self.tools = toolbox
        self.trajectory = Trajectory(prompt_ids=[])

    def within_observation(self, text: str, frame: str = "") -> str:
        """Text cut to what the observation budget leaves beside the frame it will stand in; a cut is counted."""
        ids = self.tools.encode(text)
        limit = max(0, self.tools.budget.max_observation_tokens - len(self.tools.encode(frame)))
        if len(ids) <= limit:
            return text
        self.trajectory.truncations[Truncation.OBSERVATION] += 1
        return self.tools.decode(ids[:limit]).rstrip("\ufffd")

    def inform(self, text: str) -> list[int]:
        """Record text that the model is shown next; return its ids."""
        ids = self.tools.encode(text)
        self.trajectory.segments.append(Segment(SegmentKind.INFORMATION, ids, text))
        return ids


class ScriptMethod(Method):
    """A method given by its script. `marks`: strings of its own that carry meaning in what the model writes."""

    marks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def script(self, desk: Desk) -> Script:
        """Work on one question: set `prompt_ids` and, where there is one, `answer` of `desk.trajectory`."""

    def _run(self, questions: Sequence[Question], toolbox: Toolbox) -> list[Trajectory]:
        driver = _Driver(toolbox, self.marks)
        seats = [_Seat(self.script(desk), desk.trajectory) for desk in (Desk(each, toolbox) for each in questions)]
        for seat in seats:
            seat.resume(None)
        while any(seat.wants for seat in seats):
            # All searches first, so that as many questions as possible wait for the model together.
            searching = [seat for seat in seats if isinstance(seat.wants, Search)]
            if searching:
                driver.search(searching)
            else:
                driver.generate([seat for seat in seats if seat.wants])
        return [seat.trajectory for seat in seats]


class _Seat:
    """A running script and what it waits for; `wants` is `None` once it is done."""

    def __init__(self, script: Script, trajectory: Trajectory) -> None:
        self._script = script
        self.trajectory = trajectory
        self.wants: Generate | Search | None = None

    def resume(self, result: Written | list[Passage] | None) -> None:
        try:
            self.wants = self._script.send(result)
        except StopIteration:
            self.end()

    def end(self) -> None:
        self._script.close()
        self.trajectory.done = True
        self.wants = None


class _Driver:
    def __init__(self, toolbox: Toolbox, marks: Sequence[str]) -> None:
        self._tools = toolbox
        self._budget = toolbox.budget
        as_id = toolbox.tokenizer.convert_tokens_to_ids
        self._end_ids = {as_id(token) for token in toolbox.end_tokens}
        # A tokenizer may hold the tags as control tokens; they carry meaning and stay.
        self._control_ids = {as_id(token) for token in toolbox.control_tokens if token not in {*ALL_TAGS, *marks}}

    def search(self, seats: list[_Seat]) -> None:
        """Answer all waiting searches in one batch, a query that several ask only once."""
        queries = list(dict.fromkeys(seat.wants.query for seat in seats))
        rankings = checked_search(self._tools.retriever, queries, self._budget.top_k)
        found = dict(zip(queries, rankings, strict=True))
        for seat in seats:
            query = seat.wants.query
            seat.trajectory.searches.append(SearchCall(query, tuple(found[query])))
            seat.resume(found[query])

    def generate(self, seats: list[_Seat]) -> None:
        """Continue all waiting rows, one call for each set of stop strings among them."""
        fitting = []
        for seat in seats:
            if self._room(seat.wants) > 0:
                fitting.append(seat)
            else:
                seat.trajectory.truncations[Truncation.SEQUENCE] += 1
                seat.end()
        for stop, group in groupby(sorted(fitting, key=lambda seat: seat.wants.stop), lambda seat: seat.wants.stop):
            self._generate(stop, list(group))

    def _room(self, wants: Generate) -> int:
        return self._budget.max_sequence_length - len(wants.prompt_ids)

    def _limit(self, wants: Generate) -> int:
        turn = self._budget.max_turn_tokens
        return min(turn, turn if wants.limit is None else wants.limit, self._room(wants))

    def _generate(self, stop: tuple[str, ...], seats: list[_Seat]) -> None:
        limits = [self._limit(seat.wants) for seat in seats]
        prompts = [seat.wants.prompt_ids for seat in seats]
        generations = self._tools.generator(stop).generate(prompts, max_new_tokens=max(limits))
        for seat, limit, generation in zip(seats, limits, generations, strict=True):
            ids = generation.ids[:limit]
            logprobs = generation.logprobs[:limit] if generation.logprobs is not None else None
            segment = Segment(SegmentKind.POLICY, ids, self._tools.decode(ids), logprobs)
            seat.trajectory.segments.append(segment)
            seat.trajectory.turns += 1
            is_cut = bool(generation.is_cut) or len(ids) >= limit
            seat.resume(self._written(seat, segment, limit, is_cut, stop))

    def _written(self, seat: _Seat, segment: Segment, limit: int, is_cut: bool, stop: tuple[str, ...]) -> Written:
        kept = next((place for place, token in enumerate(segment.ids) if token in self._end_ids), len(segment.ids))
        while kept and segment.ids[kept - 1] in self._control_ids:
            kept -= 1
        has_end_token = kept < len(segment.ids)
        text = self._tools.decode(segment.ids[:kept]) if has_end_token else segment.text
        # A backend may leave the end token out; a row that stopped early for no other reason ended.
        stopped = any(string in text for string in stop)
        ended = has_end_token or not (is_cut or stopped)
        truncation = None
        if not ended and not stopped:
            cut_by_turn = limit in (seat.wants.limit, self._budget.max_turn_tokens)
            truncation = Truncation.TURN if cut_by_turn else Truncation.SEQUENCE
            seat.trajectory.truncations[truncation] += 1
        return Written(segment.ids[:kept], text, ended, truncation)
