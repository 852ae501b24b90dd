"""The agent as an object: agent.json, asking, and what evaluation takes from it."""

from __future__ import annotations

import io
import json

import pytest
from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.agent import AGENT_FILE, AgentError, AgentSettings, Answer, SearchAgent
from rex_rag.cli import main
from rex_rag.evaluation.arguments import EvaluationArguments
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.script import RolloutBudget
from rex_rag.types import Segment


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent")
    sizes = {"max_turns": 2, "per_device_train_batch_size": 6}
    trainer = tiny_trainer(save_tiny_policy(folder), folder / "run", BM25Retriever(PASSAGES), **sizes)
    trainer.save_model()
    return folder / "run"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in PASSAGES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_saves_how_the_model_acts(saved):
    settings = AgentSettings.load(str(saved))
    assert settings.protocol == "search_r1" and settings.tools == ("search",)
    assert settings.template == "Question: {question}" and settings.feedback is None
    assert settings.budget == RolloutBudget(2, 30, 40, 200, 3)
    assert settings.method == "rex_rag"


def test_a_model_trained_without_probes_goes_by_the_name_of_grpo_everywhere(tmp_path):
    sizes = {"num_generations": 3, "num_probe_slots": 0, "per_device_train_batch_size": 6}
    trainer = tiny_trainer(save_tiny_policy(tmp_path), tmp_path / "run", BM25Retriever(PASSAGES), **sizes)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "GRPO over searches (Search-R1)" in card and "2503.09516" in card
    assert "REX-RAG" not in card and "2508.08149" not in card and "\n- rex-rag\n" not in card
    shared = {"model": str(tmp_path / "run"), "benchmarks": ["nq"], "output": str(tmp_path / "out")}
    for method, ran in (("rex_rag", "search_r1"), ("search_r1", "search_r1"), ("rag", "rag")):
        assert EvaluationArguments(**shared, method=method).method == ran


def test_an_agent_is_loaded_and_asked(saved):
    agent = SearchAgent.load(str(saved), BM25Retriever(PASSAGES), device="cpu", dtype="float32")
    try:
        found = agent.ask("where is the owl")
        *segments, last = agent.turns("where is the owl")
        assert isinstance(last, Answer) and last.trajectory == found.trajectory  # greedy: the same again
        assert segments == found.trajectory.segments and all(isinstance(one, Segment) for one in segments)
        assert found.trajectory.done and found.trajectory.turns <= 3
        with pytest.raises(ValueError, match="the question is blank"):
            agent.ask("  ")
    finally:
        agent.close()


def test_sources_are_all_passages_that_were_shown_once():
    from rex_rag.types import ToolUse, Trajectory

    uses = [
        ToolUse("search", {"query": "owl"}, tuple(PASSAGES[:2])),
        ToolUse("read", {"document": "Owl"}, (PASSAGES[1],)),
    ]
    answer = Answer("?", "oak", Trajectory([1], tool_uses=uses))
    assert [passage.id for passage in answer.sources] == ["0", "1"]


def test_the_command_shows_the_turns_and_takes_typed_questions(saved, corpus, capsys, monkeypatch):
    command = ["ask", str(saved), "--corpus", str(corpus), "--device", "cpu"]
    assert main([*command, "where is the owl"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[POLICY]\n    ") and "\nanswer: " in shown
    monkeypatch.setattr("sys.stdin", io.StringIO("where is the owl\n\nnever read\n"))
    assert main(command) == 0
    assert capsys.readouterr().out == shown
    assert main([*command, " "]) == 2
    assert "the question is blank" in capsys.readouterr().err


def test_a_model_without_settings_and_a_broken_file_are_named(saved, tmp_path, corpus, capsys):
    assert main(["ask", str(tmp_path), "x", "--corpus", str(corpus)]) == 2
    assert f"{tmp_path} has no {AGENT_FILE}" in capsys.readouterr().err
    for text in ("{", '{"format": 9}', '{"format": 1, "budget": {"max_turns": 1}, "tools": ["search"], "more": 1}'):
        (tmp_path / AGENT_FILE).write_text(text)
        with pytest.raises(AgentError, match="does not describe an agent"):
            AgentSettings.load(str(tmp_path))
    with pytest.raises(ValueError, match="the tool 'search' needs a retriever"):
        SearchAgent.load(str(saved), device="cpu")


def test_evaluation_takes_what_is_left_open_from_the_model_and_says_what_differs(saved, tmp_path):
    shared = {"model": str(saved), "benchmarks": ["nq"], "output": str(tmp_path / "out")}
    plain = EvaluationArguments(**shared)
    assert plain.budget() == RolloutBudget(2, 30, 40, 200, 3) and plain.differences == []
    assert plain.prompt_text() == "Question: {question}" and plain.method_options()["protocol"] == "search_r1"
    other = tmp_path / "prompt.txt"
    other.write_text("Q {question}")
    changed = EvaluationArguments(**shared, top_k=5, prompt_template=str(other))
    assert changed.differences == [
        "top_k is 5 here, 3 in training",
        "prompt_template is another text here than in training",
    ]
    assert changed.prompt_text() == "Q {question}"
    # A method that is no trained agent has prompts and limits of its own.
    assert EvaluationArguments(**shared, method="rag").budget() == RolloutBudget()
