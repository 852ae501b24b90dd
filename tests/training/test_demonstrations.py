"""Demonstrations on one's own data: ids and masks of a rollout, what is demonstrated and what is left out."""

import json

import pytest

from rex_rag.cli import main
from rex_rag.evaluation.records import Prediction, Sample
from rex_rag.protocols import SearchR1, make_protocol
from rex_rag.quickstart.demonstrations import build_demonstrations, tokenize_demonstrations
from rex_rag.quickstart.hopworld import HopWorldConfig, build_hopworld
from rex_rag.quickstart.warm_start import build_tokenizer
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.errors import UserError
from rex_rag.tools import SearchTool
from rex_rag.training.demonstrations import Turns, demonstration_rows, look_up, play, right_turns, row_of
from rex_rag.types import Passage, SegmentKind

BUDGET = RolloutBudget(max_turns=3, max_turn_tokens=64, max_observation_tokens=96, max_sequence_length=512, top_k=1)
PASSAGES = [Passage("0", "Hamlet", "Hamlet is a play by William Shakespeare."), Passage("1", "Elm", "A tree.")]


@pytest.mark.parametrize("name", ["search_r1", "tool_calls"])
def test_played_turns_have_the_ids_and_masks_of_the_scripted_ones(name):
    """Two ways to the same rows: through the agent, and from the texts piece by piece."""
    world = build_hopworld(HopWorldConfig(train_questions=(10, 20, 0), test_questions=(0, 0, 0)))
    retriever = BM25Retriever(world.passages)
    protocol = make_protocol(name, template="Question: {question}")
    tokenizer = build_tokenizer(protocol)
    scripted = build_demonstrations(world.train, retriever, wrong_rate=0.0, protocol=protocol)
    turns = [
        Turns(
            one.question.question,
            tuple(one.question.golden_answers),
            tuple(text for kind, text in one.segments if kind is SegmentKind.POLICY),
        )
        for one in scripted
    ]
    played = play(turns, [SearchTool(retriever, 1)], tokenizer, protocol, BUDGET)
    assert len(played) == len(scripted) == 30
    assert [row_of(one) for one in played] == tokenize_demonstrations(scripted, tokenizer, protocol)
    rows, left_out = demonstration_rows(turns, played)
    assert len(rows) == 30 and not left_out
    assert [row["answer"] for row in rows] == [one.answer for one in scripted]


def test_only_an_answer_that_one_search_finds_is_demonstrated_and_no_yes_or_no():
    asked = [
        {"question": "Who wrote Hamlet?", "golden_answers": ["Shakespeare", "William Shakespeare"]},
        {"question": "Who wrote Hamlet?", "golden_answers": ["Marlowe"]},
        {"question": "Is an elm a tree?", "golden_answers": ["yes", "a"]},
    ]
    [found] = look_up(asked, BM25Retriever(PASSAGES), SearchR1(), top_k=1)
    assert found.question == "Who wrote Hamlet?"
    search, answer = found.texts
    assert SearchR1().parse(search).calls[0].arguments == {"query": "Who wrote Hamlet?"}
    assert SearchR1().parse(answer).answer == "William Shakespeare"  # the longest that stands there


def test_of_a_run_only_right_and_clean_attempts_are_shown_and_each_once(tmp_path):
    def sample(answer, *kinds):
        segments = [{"kind": kind, "text": f"{kind} {place}"} for place, kind in enumerate(kinds)]
        return Sample(answer, segments, [], 1, 0, {})

    right = sample("Elm", "POLICY", "INFORMATION", "POLICY")
    attempts = (right, right, sample("oak", "POLICY"), sample("elm", "POLICY", "FEEDBACK", "POLICY"), sample(None))
    folder = tmp_path / "run" / "trees"
    folder.mkdir(parents=True)
    row = Prediction("1", "Which tree?", ("elm",), attempts).as_row()
    (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    assert list(right_turns(tmp_path / "run")) == [Turns("Which tree?", ("elm",), ("POLICY 0", "POLICY 2"))]
    (folder / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1, is no prediction"):
        list(right_turns(tmp_path / "run"))
    with pytest.raises(UserError, match="holds no predictions"):
        list(right_turns(tmp_path))


def test_what_the_budget_has_no_room_for_and_what_is_wrong_by_now_is_left_out(bpe_tokenizer):
    answer = ("<search> Hamlet </search>", "<answer> Shakespeare </answer>")
    turns = [
        Turns("Who?", ("Shakespeare",), answer),
        Turns("Who?", ("Shakespeare",), answer[1:]),  # the same prompt again
        Turns("Who?", ("Marlowe",), answer),
        Turns("How?", ("Shakespeare",), ("well " * 500, answer[1])),
        Turns("How?", ("Shakespeare",), (*answer[:1] * 5, answer[1])),
        Turns("When?", ("Shakespeare",), answer[:1]),  # says nothing more
    ]
    budget = RolloutBudget(
        max_turns=3, max_turn_tokens=64, max_observation_tokens=200, max_sequence_length=2000, top_k=1
    )
    played = play(turns, [SearchTool(BM25Retriever(PASSAGES), 1)], bpe_tokenizer, SearchR1(), budget)
    rows, left_out = demonstration_rows(turns, played)
    assert [len(row["input_ids"]) for row in rows] == [
        len(played[0].prompt_ids) + len(played[0].completion_ids),
        len(played[1].prompt_ids) + len(played[1].completion_ids),
    ]
    assert len(rows[0]["input_ids"]) > len(rows[1]["input_ids"])  # each went its own way
    assert sorted(left_out.values()) == [2, 2]


def test_a_recipe_without_anything_to_show_is_refused(tmp_path, bpe_tokenizer, capsys):
    bpe_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "title": "Elm", "text": "A tree."}\n')
    (tmp_path / "train.jsonl").write_text('{"question": "Who wrote it?", "golden_answers": ["Marlowe"]}\n')
    words = [
        *("--model_name_or_path", tmp_path / "model", "--datasets", tmp_path / "train.jsonl", "--bf16", "false"),
        *("--corpus", tmp_path / "corpus.jsonl", "--retriever", "bm25", "--output", tmp_path / "out"),
    ]
    assert main(["demonstrations", "quickstart/grpo", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "nothing to demonstrate: 1 question, 0 with an answer" in said and "rex-rag coverage" in said
    assert not (tmp_path / "out").exists()
