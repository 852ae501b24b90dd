"""The agent as an object: a model with the protocol, the tools and the budget that it was trained with.

`agent.json` beside the weights says all that a model has to be asked with. Training writes it, `SearchAgent.load`
reads it, and so does `rex-rag evaluate`, which says where a flag differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.models.files import HUB_NAME
from rex_rag.protocols import Protocol, make_protocol
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.durable import write_json
from rex_rag.support.errors import UserError
from rex_rag.tools import make_tools, tool_specs
from rex_rag.types import Passage, Segment, Trajectory

if TYPE_CHECKING:
    from rex_rag.models.language_model import LanguageModel
    from rex_rag.retrieval.base import Retriever

AGENT_FILE = "agent.json"
_FORMAT = 1


class AgentError(UserError):
    """An agent cannot be loaded; the message names the file, the reason and the way out."""


@dataclass(frozen=True)
class AgentSettings:
    """How a model is asked and acts. `template` and `feedback` are texts; `None` is the protocol's own.

    `method` names the row of the comparison that it is: `rex_rag`, or `search_r1` for one trained without probes.
    """

    protocol: str = "search_r1"
    tools: tuple[str, ...] = ("search",)
    template: str | None = None
    feedback: str | None = None
    budget: RolloutBudget = field(default_factory=RolloutBudget)
    chat_template_kwargs: Mapping[str, Any] | None = None
    method: str | None = None

    def make_protocol(self) -> Protocol:
        return make_protocol(self.protocol, tool_specs(self.tools), self.template, self.feedback)

    def save(self, folder: str | Path) -> None:
        """Write `agent.json`, whole or not at all."""
        write_json(Path(folder) / AGENT_FILE, {"format": _FORMAT, **asdict(self)}, alone=False)

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> AgentSettings | None:
        """The settings beside a model, in a folder or on the Hub; `None` where it has none.

        Raises:
            AgentError: for a file that cannot be read.
        """
        path = _find(model, revision)
        if path is None:
            return None
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if row.pop("format") != _FORMAT:
                raise UserError("it is of another format")
            budget = RolloutBudget(**row.pop("budget"))
            return cls(**{**row, "tools": tuple(row["tools"]), "budget": budget})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AgentError(
                f"{path} does not describe an agent ({type(error).__name__}: {error}); fetch it again, or remove it "
                "and give the settings yourself"
            ) from error


def _find(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / AGENT_FILE
        return path if path.is_file() else None
    if not HUB_NAME.fullmatch(model):
        return None
    from transformers.utils import cached_file

    found = cached_file(
        model,
        AGENT_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question. `answer` is `None` where there is none; `sources` are all passages that were shown."""

    question: str
    answer: str | None
    trajectory: Trajectory

    @property
    def sources(self) -> list[Passage]:
        found = {passage.id: passage for use in self.trajectory.tool_uses for passage in use.passages}
        return list(found.values())


class SearchAgent:
    """A model that searches, ready to be asked.

    Args:
        model: as `open_model` gives it.
        settings: how it is asked and acts.
        retriever: answers its searches.
    """

    def __init__(self, model: LanguageModel, settings: AgentSettings, retriever: Retriever | None) -> None:
        self.model = model
        self.settings = settings
        self._agent = Agent(
            model.generator,
            make_tools(settings.tools, retriever, settings.budget.top_k),
            model.tokenizer,
            settings.make_protocol(),
            settings.budget,
            chat_template_kwargs=settings.chat_template_kwargs,
        )

    @classmethod
    def load(
        cls,
        model: str,
        retriever: Retriever | str | Sequence[str] | None = None,
        *,
        corpus: Sequence[str] = (),
        settings: AgentSettings | None = None,
        **options: Any,
    ) -> SearchAgent:
        """A trained agent from its folder, or from the Hub.

        Args:
            retriever: one that is open, or what a recipe names: `bm25`, an index directory, URLs of servers.
            corpus: JSON lines files that `bm25` searches.
            settings: instead of those beside the model; needed for a model that has none.
            options: of `rex_rag.models.language_model.ModelOptions`: `backend`, `temperature`, `revision`, …

        Raises:
            AgentError: for a model without `agent.json`, where no settings are given.
            ModelError, RetrievalError: for a model that cannot be opened, a retriever that cannot answer.
        """
        from rex_rag.models.language_model import ModelOptions, open_model

        settings = settings or AgentSettings.load(model, options.get("revision"))
        if settings is None:
            raise AgentError(
                f"{model} has no {AGENT_FILE}, which says how the model was trained to act; pass "
                "settings=AgentSettings(…) with its protocol, prompt and budget"
            )
        if retriever is None and corpus:
            retriever = "bm25"
        if isinstance(retriever, Sequence):
            from rex_rag.retrieval.load import RetrieverArguments, load_retriever

            names = [retriever] if isinstance(retriever, str) else list(retriever)
            retriever = load_retriever(RetrieverArguments(retriever=names, corpus=list(corpus)))
        if retriever is not None:
            retriever.check()
        opened = open_model(ModelOptions(name=model, chat_template_kwargs=settings.chat_template_kwargs, **options))
        return cls(opened, settings, retriever)

    def ask(self, question: str) -> Answer:
        """Work on a question to the end.

        Raises:
            RetrievalError: when a search could not be answered.
        """
        trajectory = self._begin(question)
        self._agent.resume([trajectory])
        return Answer(question, trajectory.answer, trajectory)

    def turns(self, question: str) -> Iterator[Segment | Answer]:
        """Work on a question, and give every segment as it comes; the answer is the last."""
        trajectory = self._begin(question)
        shown = 0
        for _ in self._agent.driver.rounds([(self._agent.script.turns(trajectory), trajectory)]):
            yield from trajectory.segments[shown:]
            shown = len(trajectory.segments)
        yield from trajectory.segments[shown:]
        yield Answer(question, trajectory.answer, trajectory)

    def close(self) -> None:
        """Give memory and connections back."""
        self.model.close()

    def _begin(self, question: str) -> Trajectory:
        if not question.strip():
            raise UserError("the question is blank; ask something")
        return Trajectory(prompt_ids=self._agent.script.encode(question))
