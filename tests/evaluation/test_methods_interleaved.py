"""IRCoT and Search-o1 turn by turn, with the ids the model is given."""

from __future__ import annotations

import pytest
from evaluation.test_methods import Bench, kinds, question
from parts import make_bpe_tokenizer

from rex_rag.evaluation.methods.ircot import MAX_PARAGRAPHS, SENTENCE_STOPS, first_sentence
from rex_rag.evaluation.methods.prompt_texts import SEARCH_O1, fill
from rex_rag.evaluation.methods.search_o1 import QUERY_MARKS, condense_reasoning, condensed_information
from rex_rag.rollout.script import RolloutBudget
from rex_rag.types import Passage

OWL = "Title: Owl\nthe owl is in the oak"
HILL = "Title: Hill\nthe hill is green"
STOP_QUERY = ("<|end_search_query|>",)
ASK_OWL = "I look. <|begin_search_query|> where is the owl <|end_search_query|>"
ASK_HILL = "<|begin_search_query|>hill<|end_search_query|>"


def ids(bench: Bench, text: str) -> list[int]:
    return bench.tokenizer(text, add_special_tokens=False)["input_ids"]


def queries(trajectory) -> list[str]:
    return [call.query for call in trajectory.searches]


# --- IRCoT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence", "length"),
    [
        ("The owl is here. The", "The owl is here.", 16),
        ("\n\nThe owl. The", "The owl.", 10),
        ("Who? I", "Who?", 4),
        ("the owl\n", "the owl", 7),
        ("It costs 3.5 million. And", "It costs 3.5 million.", 21),
        ("George W. Bush won. He", "George W. Bush won.", 19),
        ("Dr. King spoke. He", "Dr. King spoke.", 15),
        ("in the U.S. army, e.g. here. And", "in the U.S. army, e.g. here.", 28),
        ("So the answer is: No. The", "So the answer is: No.", 21),
        ("So the answer is:\n\nan oak. It", "So the answer is:\n\nan oak.", 26),
    ],
)
def test_a_sentence_ends_where_people_say_it_ends(text, sentence, length):
    assert first_sentence(text) == (sentence, length)


@pytest.mark.parametrize("text", ["", "\n\n", "the owl", "the owl.", "George W. ", "St. ", "So the answer is:\n"])
def test_no_sentence_is_complete_yet(text):
    assert first_sentence(text) is None


def test_ircot_searches_with_the_question_then_with_each_sentence(bpe_tokenizer):
    # The model runs a token past each sentence; it stays, and is part of the next one.
    turns = [["The owl is on the hill. The"], [" hill is green. So"], [" the answer is: green.<eos>"]]
    budget = RolloutBudget(max_turns=3, max_turn_tokens=100, max_sequence_length=20_000, top_k=1)
    bench = Bench(bpe_tokenizer, turns, budget=budget)
    [trajectory] = bench.run("ircot", question("where is the fox"))
    assert queries(trajectory) == ["where is the fox", "The owl is on the hill.", "The hill is green."]
    assert trajectory.answer == "green"
    assert bench.stops == [SENTENCE_STOPS] * 3
    fox = "Title: Fox\nthe fox is red"
    found = [text for kind, text in kinds(trajectory) if kind == "INFORMATION"]
    assert found[0] == fox
    # Paragraphs found so far stand before the question, the thoughts follow as the ids that were sampled.
    thoughts: list[int] = []
    for call, turn in enumerate(turns):
        [row] = bench.generator.seen[call]
        assert row[len(row) - len(thoughts) :] == thoughts
        text = bpe_tokenizer.decode(row[: len(row) - len(thoughts)])
        shown = "\n\n".join(found[: call + 1])
        assert text.endswith(f"Now it is your turn.\n\n{shown}\n\nQuestion: where is the fox\nThought: ")
        thoughts += ids(bench, turn[0])
    assert kinds(trajectory)[1] == ("POLICY", "The owl is on the hill. The")


def test_ircot_shows_a_paragraph_once(bpe_tokenizer):
    bench = Bench(bpe_tokenizer, [["The owl is in the oak.\n"], ["So the answer is: oak"]])
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert [p.id for call in trajectory.searches for p in call.passages] == ["1", "1"]
    assert kinds(trajectory) == [
        ("INFORMATION", OWL),
        ("POLICY", "The owl is in the oak.\n"),
        ("POLICY", "So the answer is: oak"),
    ]
    assert bench.shown(1).count(OWL) == 1


def test_ircot_writes_the_rest_in_one_go_once_searches_are_spent(bpe_tokenizer):
    turns = [["One. A"], [" two. A"], [" third. A fourth. So the answer is: oak.\nQuestion: So the answer is: elm"]]
    bench = Bench(bpe_tokenizer, turns)  # two searches
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl", "One."]
    assert bench.stops == [SENTENCE_STOPS, SENTENCE_STOPS, ()]
    assert trajectory.answer == "oak" and trajectory.turns == 3


def test_ircot_takes_an_answer_on_the_next_line_and_searches_for_nothing_meanwhile(bpe_tokenizer):
    bench = Bench(bpe_tokenizer, [["So the answer is:\n"], ["\noak\n"]])
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert trajectory.answer == "oak" and queries(trajectory) == ["where is the owl"]


def test_ircot_stops_where_its_authors_do(bpe_tokenizer):
    bench = Bench(bpe_tokenizer, [["The answer is: oak.\n"]])
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert trajectory.answer == "oak" and queries(trajectory) == ["where is the owl"]


def test_ircot_reads_the_rest_by_sentences_too(bpe_tokenizer):
    turns = [["One. A"], [" two. A"], [" third. So the answer is: George W. Hill. That is certain.\nAnd"]]
    bench = Bench(bpe_tokenizer, turns)  # two searches
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert trajectory.answer == "George W. Hill"


def test_ircot_goes_on_after_an_initial_and_after_an_ended_message(bpe_tokenizer):
    turns = [["It was George W. "], ["Bush.<eos>"], ["So the answer is: George W. "], ["Bush. "]]
    bench = Bench(bpe_tokenizer, turns)
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl", "It was George W. Bush."]
    assert trajectory.answer == "George W. Bush"
    # The end token ended the message, not the reasoning: it is recorded, and not given back.
    assert kinds(trajectory)[2] == ("POLICY", "Bush.<eos>")
    assert bench.generator.seen[2][0][-len(ids(bench, "Bush.")) :] == ids(bench, "Bush.")


def test_ircot_without_a_thought_or_an_answer_is_unanswered(bpe_tokenizer):
    bench = Bench(bpe_tokenizer, [["<eos>", "A thought.\n"], ["Another.\n"], ["And so on"]])
    silent, lost = bench.run("ircot", question("where is the owl"), question("where is the fox", 1))
    assert silent.answer is None and silent.turns == 1 and queries(silent) == ["where is the owl"]
    assert lost.answer is None and lost.turns == 3 and len(lost.searches) == 2


def test_ircot_sentences_are_limited(bpe_tokenizer):
    budget = RolloutBudget(max_turns=2, max_turn_tokens=5, max_sequence_length=20_000, top_k=1)
    bench = Bench(bpe_tokenizer, [["zzzzzzz"], ["qqqq. zz"], ["jjj"]], budget=budget)
    [trajectory] = bench.run("ircot", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl", "zzzzz"]
    assert dict(trajectory.truncations) == {"turn": 1}


def test_ircot_stops_at_fifteen_paragraphs(bpe_tokenizer):
    passages = [Passage(str(n), f"T{n}", f"owl number{n}") for n in range(10)]
    passages += [Passage(str(n), f"T{n}", f"fox number{n}") for n in range(10, 20)]
    budget = RolloutBudget(max_turns=2, max_turn_tokens=50, max_sequence_length=20_000, top_k=10)
    bench = Bench(bpe_tokenizer, [["The fox.\n"], ["So the answer is: oak"]], passages=passages, budget=budget)
    [trajectory] = bench.run("ircot", question("owl"))
    assert [len(call.passages) for call in trajectory.searches] == [10, 10]
    assert sum(text.count("Title: ") for kind, text in kinds(trajectory) if kind == "INFORMATION") == MAX_PARAGRAPHS
    assert dict(trajectory.truncations) == {"observation": 1}


# --- Search-o1 ------------------------------------------------------------------------------------------------------


def test_search_o1_condenses_documents_before_they_enter_the_chain(bpe_tokenizer):
    turns = [[ASK_OWL], ["The first says so.\n**Final Information**\nThe owl sits\nin the oak.<eos>"],
             ["So it is \\boxed{elm}, no: \\boxed{\\text{oak}}<eos>"]]  # fmt: skip
    bench = Bench(bpe_tokenizer, turns)
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert trajectory.answer == "oak"
    assert queries(trajectory) == ["where is the owl"]
    assert bench.stops == [STOP_QUERY, (), STOP_QUERY]
    inserted = "\n\n<|begin_search_result|>The owl sits in the oak.<|end_search_result|>\n\n"
    assert kinds(trajectory) == [
        ("POLICY", ASK_OWL),
        ("POLICY", turns[1][0]),
        ("INFORMATION", inserted),
        ("POLICY", turns[2][0]),
    ]
    # The chain only grows: prompt, sampled ids, inserted ids. The documents stand in the side prompt alone.
    [prompt], [side], [chain] = bench.generator.seen
    assert prompt == trajectory.prompt_ids
    assert bpe_tokenizer.decode(prompt) == fill(SEARCH_O1, question="where is the owl", searches="2") + " "
    assert chain == prompt + ids(bench, ASK_OWL) + ids(bench, inserted)
    told = bpe_tokenizer.decode(side)
    assert f"Reasoning so far:\nStep 1: {ASK_OWL}\n\nSearch query:\nwhere is the owl\n\n" in told
    assert "Documents found:\nDoc 1(Title: Owl) the owl is in the oak\n" in told
    assert "the owl is in the oak" not in bpe_tokenizer.decode(chain)


def test_search_o1_reads_its_marks_where_the_tokenizer_holds_them_as_control_tokens():
    tokenizer = make_bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *QUERY_MARKS]})
    bench = Bench(tokenizer, [[ASK_OWL], ["**Final Information** in the oak"], ["\\boxed{oak}<eos>"]])
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert trajectory.answer == "oak" and queries(trajectory) == ["where is the owl"]


def test_search_o1_repeats_no_search_and_refuses_those_beyond_the_limit(bpe_tokenizer):
    turns = [[ASK_OWL], ["**Final Information**\nIn the oak."], [ASK_OWL], [ASK_HILL], ["\\boxed{oak}<eos>"]]
    bench = Bench(bpe_tokenizer, turns)  # two turns may search
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl"]
    told = [text.strip() for kind, text in kinds(trajectory) if kind == "INFORMATION"]
    assert told == [
        "<|begin_search_result|>In the oak.<|end_search_result|>",
        "<|begin_search_result|>This query was searched before. Use the earlier result.<|end_search_result|>",
        "<|begin_search_result|>No more searches are allowed. Give the final answer now.<|end_search_result|>",
    ]
    assert trajectory.answer == "oak" and trajectory.invalid_actions == 0


def test_search_o1_ends_where_the_model_only_searches(bpe_tokenizer):
    side = ["**Final Information**\nNothing."]
    bench = Bench(bpe_tokenizer, [[ASK_OWL], side, [ASK_HILL], side, [ASK_HILL], ["\\boxed{oak} " + ASK_OWL]])
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl", "hill"]
    # The last turn's search is not executed; what the turn says counts.
    assert trajectory.answer == "oak"


def test_search_o1_remembers_an_answer_given_before_a_search(bpe_tokenizer):
    side = ["**Final Information**\n\\boxed{elm}"]
    bench = Bench(bpe_tokenizer, [["\\boxed{oak}? " + ASK_OWL], side, ["It is confirmed.<eos>"]])
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert "\\boxed{elm}" in trajectory.segments[2].text
    assert trajectory.answer == "oak" and trajectory.invalid_actions == 0


def test_search_o1_keeps_its_answer_when_a_search_leaves_no_room(bpe_tokenizer):
    said = "\\boxed{oak}? " + ASK_OWL
    prompt = fill(SEARCH_O1, question="where is the owl", searches="2") + " "
    used = len(bpe_tokenizer(prompt + said)["input_ids"])
    budget = RolloutBudget(max_turns=2, max_turn_tokens=400, max_sequence_length=used + 5, top_k=1)
    bench = Bench(bpe_tokenizer, [[said], ["**Final Information** It is."]], budget=budget)
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert trajectory.answer == "oak" and dict(trajectory.truncations) == {"sequence": 1}


def test_search_o1_results_keep_to_the_observation_budget_with_their_marks(bpe_tokenizer):
    budget = RolloutBudget(max_turns=1, max_turn_tokens=400, max_observation_tokens=60, max_sequence_length=20_000)
    turns = [[ASK_OWL], ["**Final Information** " + "z" * 200], ["\\boxed{oak}<eos>"]]
    bench = Bench(bpe_tokenizer, turns, budget=budget)
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    [inserted] = [segment for segment in trajectory.segments if segment.kind.name == "INFORMATION"]
    assert len(inserted.ids) == 60 and inserted.text.endswith("z<|end_search_result|>\n\n")
    assert dict(trajectory.truncations) == {"observation": 1}


def test_search_o1_counts_blank_queries_and_silence_as_invalid(bpe_tokenizer):
    bench = Bench(bpe_tokenizer, [["<|begin_search_query|> <|end_search_query|>"], ["I give up.<eos>"]])
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert (trajectory.answer, trajectory.invalid_actions, trajectory.searches) == (None, 2, [])
    assert "The search query was blank" in trajectory.segments[1].text


def test_search_o1_goes_on_where_a_turn_was_cut(bpe_tokenizer):
    head = "z" * 12 + "<|begin_search_query|> where"
    cut = len(bpe_tokenizer(head)["input_ids"])
    budget = RolloutBudget(max_turns=2, max_turn_tokens=cut, max_sequence_length=20_000, top_k=1)
    turns = [[head], [" is the owl<|end_search_query|>"], ["no heading"], ["\\boxed{oak}<eos>"]]
    bench = Bench(bpe_tokenizer, turns, budget=budget)
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert queries(trajectory) == ["where is the owl"]
    assert dict(trajectory.truncations) == {"turn": 1}
    assert "No helpful information found." in trajectory.segments[3].text
    assert trajectory.answer == "oak"


def test_search_o1_stops_at_an_answer_in_a_turn_that_was_cut(bpe_tokenizer):
    text = "\\boxed{oak} and then on and on"
    budget = RolloutBudget(max_turns=2, max_turn_tokens=20, max_sequence_length=20_000, top_k=1)
    assert len(bpe_tokenizer(text)["input_ids"]) > 20
    bench = Bench(bpe_tokenizer, [[text]], budget=budget)
    [trajectory] = bench.run("search_o1", question("where is the owl"))
    assert trajectory.answer == "oak" and dict(trajectory.truncations) == {"turn": 1}


def test_reasoning_is_quoted_with_its_first_last_and_searching_steps():
    assert condense_reasoning("a\n\nb") == "Step 1: a\n\nStep 2: b"
    lines = ["a", "b", "c <|begin_search_query|>", "d", "e", "f", "g", "h", "i"]
    assert condense_reasoning("\n".join(lines)).split("\n\n") == [
        "Step 1: a", "...", "Step 3: c <|begin_search_query|>", "...",
        "Step 6: f", "Step 7: g", "Step 8: h", "Step 9: i",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "information"),
    [
        ("x **Final Information**\n\nthe owl\nhere", "the owl here"),
        ("**Final Information**: a **Final information:** b", "b"),
        ("the owl is here", "No helpful information found."),
        ("**Final Information**\n", "No helpful information found."),
    ],
)
def test_the_final_information_is_what_follows_its_last_heading(text, information):
    assert condensed_information(text) == information
