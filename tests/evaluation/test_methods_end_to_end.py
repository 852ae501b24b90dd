"""Every method with a real, untrained Qwen2, BM25 and HopWorld's questions, greedily and together."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parts import make_tiny_model

from rex_rag.evaluation.methods import METHODS, Toolbox, make_method
from rex_rag.evaluation.methods.search_o1 import QUERY_MARKS
from rex_rag.evaluation.records import Prediction, Question, Sample
from rex_rag.models.generation import TransformersGenerator
from rex_rag.protocols.inert import ALL_TAGS
from rex_rag.quickstart.hopworld import HopWorldConfig, build_hopworld
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.script import RolloutBudget
from rex_rag.types import SegmentKind, Trajectory


@pytest.fixture(scope="module")
def tokenizer():
    """Whole actions and announcements are tokens, so that an untrained model writes them now and then."""
    from parts import make_bpe_tokenizer

    tokenizer = make_bpe_tokenizer()
    words = ["Ada", "Boris", "Clara", "Valmere"]
    queries = [QUERY_MARKS[0] + word + QUERY_MARKS[1] for word in words]
    searches = [f"<search> {word} </search>" for word in words]
    phrases = [". ", "So the answer is: oak\n", "\\boxed{oak}", "**Final Information** owl", "<answer> oak </answer>"]
    tokenizer.add_tokens([*ALL_TAGS, *queries, *searches, *phrases])
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    """Float64, so that what a row is padded with cannot tip the choice between two tokens."""
    model = make_tiny_model(tokenizer, seed=2).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[400:] *= 2.5  # the tokens added above come up more often
    return model


@pytest.fixture(scope="module")
def questions():
    world = build_hopworld(HopWorldConfig(people=30, train_questions=(0, 0, 0), test_questions=(4, 4, 0)))
    return world, [Question(each.id, each.question, each.golden_answers) for each in world.test]


@pytest.fixture(scope="module")
def toolbox(tokenizer, model, questions):
    @cache
    def generator(stop):
        return TransformersGenerator(model, tokenizer, temperature=0, stop_strings=stop)

    budget = RolloutBudget(
        max_turns=3, max_turn_tokens=24, max_observation_tokens=200, max_sequence_length=4000, top_k=2
    )
    return Toolbox(tokenizer, generator, BM25Retriever(questions[0].passages), budget)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_its_results_do_not_depend_on_the_order(name, toolbox, questions):
    method, asked = make_method(name), questions[1]
    trajectories = method.run(asked, toolbox)
    assert len(trajectories) == len(asked) == 8
    for one, trajectory in zip(asked, trajectories, strict=True):
        check_books(trajectory, toolbox)
        row = Prediction(one.id, one.question, one.golden_answers, (Sample.of(trajectory),)).as_row()
        assert Prediction.from_row(row).samples[0].answer == trajectory.answer
        assert bool(trajectory.searches) <= method.uses_retriever
    # Reversed and alone, each question meets the same end. (In float32, other rows' lengths pad a row differently and
    # may tip a tie between two tokens: runs are compared with the same chunks of questions.)
    assert method.run(asked[::-1], toolbox)[::-1] == trajectories
    assert method.run(asked[:1], toolbox) == trajectories[:1]
    # Sampled several times means listed several times; greedily, all samples agree.
    assert method.run([asked[0], asked[0]], toolbox) == [trajectories[0]] * 2


@pytest.mark.parametrize("name", ["ircot", "search_o1", "search_r1"])
def test_the_untrained_model_reaches_the_parts_under_test(name, toolbox, questions):
    """The test above would show little if no search were made, no answer given and no text cut."""
    trajectories = make_method(name).run(questions[1], toolbox)
    assert sum(len(trajectory.searches) for trajectory in trajectories) >= 5
    assert sum(trajectory.answer is not None for trajectory in trajectories) >= 3
    assert sum(sum(trajectory.truncations.values()) for trajectory in trajectories) >= 3


def check_books(trajectory: Trajectory, toolbox: Toolbox) -> None:
    """The ids are the texts, limits hold, an answer was written by the model."""
    budget = toolbox.budget
    assert trajectory.done and trajectory.prompt_ids
    for segment in trajectory.segments:
        if segment.kind is SegmentKind.POLICY:
            assert 0 < len(segment.ids) <= budget.max_turn_tokens
            assert segment.text == toolbox.decode(segment.ids)
        elif segment.kind is SegmentKind.INFORMATION:
            assert segment.ids and toolbox.decode(segment.ids) == segment.text
    assert len(trajectory.searches) <= budget.max_turns
    assert all(1 <= len(call.passages) <= budget.top_k for call in trajectory.searches)
    if trajectory.answer is not None:
        assert trajectory.answer in trajectory.model_text
