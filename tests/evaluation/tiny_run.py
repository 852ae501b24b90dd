"""A tiny real Qwen2 in a folder, a world to search, and runs over it: what the tests of runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken

from rex_rag.data.corpus import read_corpus
from rex_rag.evaluation.benchmarks import load_benchmark
from rex_rag.evaluation.methods import make_method
from rex_rag.evaluation.run import EvaluationRun
from rex_rag.evaluation.run_card import protocol_card
from rex_rag.models.language_model import ModelOptions, open_model
from rex_rag.protocols import SearchR1
from rex_rag.quickstart import warm_start
from rex_rag.quickstart.hopworld import HopWorldConfig, build_hopworld, write_hopworld
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.script import RolloutBudget

ROOT = Path(__file__).resolve().parents[2]
BUDGET = RolloutBudget(max_turns=2, max_turn_tokens=12, max_observation_tokens=64, max_sequence_length=256, top_k=1)
TEMPLATE = "Question: {question}"


@dataclass(frozen=True)
class TinyWorld:
    """Folders of a model and of a world with its questions and passages."""

    model: Path
    questions: Path
    corpus: Path

    def words(self, output: Path, **settings: object) -> list[str]:
        """The command line of a run over this world with budgets to its size."""
        values = {
            "model": self.model,
            "dtype": "float32",
            "device": "cpu",
            "benchmarks": f"world={self.questions}",
            "corpus": self.corpus,
            "prompt_template": self.model / "prompt.txt",
            "output": output,
            "max_turns": BUDGET.max_turns,
            "max_turn_tokens": BUDGET.max_turn_tokens,
            "max_observation_tokens": BUDGET.max_observation_tokens,
            "max_sequence_length": BUDGET.max_sequence_length,
            "top_k": BUDGET.top_k,
            **settings,
        }
        return [word for name, value in values.items() for word in (f"--{name}", *map(str, _listed(value)))]


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def make_tiny_world(folder: Path, further: Sequence[str] = ()) -> TinyWorld:
    """An untrained model that searches and answers now and then: whole actions are tokens, and come up often."""
    world = build_hopworld(HopWorldConfig(people=30, train_questions=(0, 0, 0), test_questions=(20, 20, 0)))
    write_hopworld(world, folder / "world")
    tokenizer = warm_start.build_tokenizer(SearchR1(template=TEMPLATE))
    names = [passage.title for passage in world.passages]
    actions = [f"<search> {name}</search>" for name in names[:60]]
    actions += [f"<answer> {name}</answer>" for name in names[:30]]
    actions += further
    # Not normalised, like the tags: otherwise a text with an action would be cut at its tags first.
    tokenizer.add_tokens([AddedToken(action, normalized=False, special=False) for action in actions])
    torch.manual_seed(0)
    model = warm_start.build_model(tokenizer, 64, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "prompt.txt").write_text(TEMPLATE, encoding="utf-8")
    return TinyWorld(folder / "model", folder / "world" / "test.jsonl", folder / "world" / "corpus.jsonl")


def make_run(world: TinyWorld, output: Path, *, temperature=0.0, samples=1, seed=0, chunk_size=4, **options):
    """An `EvaluationRun` of the search agent in this process."""
    model = open_model(
        ModelOptions(str(world.model), dtype="float32", device="cpu", temperature=temperature, seed=seed)
    )
    benchmarks = [load_benchmark(f"world={world.questions}")]
    method = make_method("rex_rag", TEMPLATE)
    card = protocol_card(
        method=method,
        model=model.describe(),
        benchmarks=benchmarks,
        retriever={"kind": "bm25", "description": "the world's passages", "fingerprint": "1"},
        budget=BUDGET,
        temperature=temperature,
        samples=samples,
        seed=seed,
        chunk_size=chunk_size,
    )
    retriever = BM25Retriever(list(read_corpus([str(world.corpus)])))
    return EvaluationRun(
        output,
        card,
        benchmarks,
        method,
        model,
        retriever,
        budget=BUDGET,
        samples=samples,
        chunk_size=chunk_size,
        **options,
    )
