"""The tiny model of the sample: its tokenizer on real-looking text, and demonstrations as rollouts build them."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Config

from rex_rag.protocols import SearchR1
from rex_rag.protocols.inert import ALL_TAGS
from rex_rag.quickstart import tiny_model
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.types import Passage

ROOT = Path(__file__).resolve().parents[2]
PASSAGES = [
    Passage("0", "Émile Zola", "Émile Zola was a French novelist who wrote Germinal, a novel about miners. " * 4),
    Passage("1", "Lisbon", "Lisbon is the capital of Portugal and lies on the Tagus."),
    Passage("2", "Oslo", "Oslo is the capital of Norway."),
]
QUESTIONS = ["Who wrote Germinal?", "Is Lisbon the capital of Portugal?", "Which capital lies on the Tagus?"] * 8


@pytest.fixture
def tokenizer():
    return tiny_model.train_tokenizer(
        [passage.text for passage in PASSAGES], QUESTIONS, SearchR1(template="Question: {question}"), 700
    )


def make_config(tmp_path: Path, **settings) -> REXRAGConfig:
    (tmp_path / "prompt.txt").write_text("Question: {question}", encoding="utf-8")
    settings = {"max_turn_tokens": 80, "max_observation_tokens": 40, **settings}
    return REXRAGConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, prompt_template=str(tmp_path / "prompt.txt"), **settings
    )


def test_the_tokenizer_is_the_same_after_loading_as_a_qwen2_models(tokenizer, tmp_path: Path):
    text = "<think> Émile, 中 1885?</think><search> Who wrote\nGerminal </search><|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert [loaded(tag)["input_ids"] for tag in ALL_TAGS] == [[loaded.convert_tokens_to_ids(tag)] for tag in ALL_TAGS]
    assert not set(ALL_TAGS) & set(loaded.all_special_tokens)
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_demonstrations_hold_cut_observations_and_labels_on_the_models_words_alone(tokenizer, tmp_path: Path):
    built = tiny_model.demonstrate(QUESTIONS, BM25Retriever(PASSAGES), tokenizer, make_config(tmp_path), seed=0)
    assert built.left_out == 0 and len(built.rows) == len(built.openings) == 24
    said = {"yes": 0, "no": 0, "Émile Zola": 0, "Lisbon": 0}
    searches = []
    for row, opening in zip(built.rows, built.openings, strict=True):
        text = tokenizer.decode(row["input_ids"])
        written = tokenizer.decode([token for token in row["labels"] if token != -100])
        searches.append(written.count("<search>"))
        assert text.count("\n\n<information>Doc 1(Title: ") == text.count("</information>\n\n") == searches[-1]
        assert text.startswith("<|im_start|>user\nQuestion: ") and text.endswith("</answer>")
        assert written.startswith("<think> I do not know this yet, so I look it up.</think><search> ")
        assert "Doc 1" not in written and "information" not in written
        said[written.rpartition("<answer> ")[2].removesuffix("</answer>")] += 1
        # An observation of 40 tokens cannot hold the three passages.
        for body in text.split("\n\n<information>")[1:]:
            inside = "\n\n<information>" + body.partition("</information>\n\n")[0]
            assert len(tokenizer(inside)["input_ids"]) <= 40 and "Doc 3" not in inside
        query = tokenizer.decode([token for token in opening["labels"] if token != -100])
        assert query.endswith("</search>") and f"Question: {query.removesuffix('</search>').strip()}" in text
        assert row["input_ids"][: len(opening["input_ids"])] == opening["input_ids"]
    # 8 questions each; a coin answers the one that asks for yes or no.
    assert said["Émile Zola"] == said["Lisbon"] == said["yes"] + said["no"] == 8
    assert set(searches) == {1, 2}


def test_a_question_whose_turn_is_beyond_the_budget_is_left_out_and_counted(tokenizer, tmp_path: Path):
    config = make_config(tmp_path, max_turn_tokens=35)
    long = "Who wrote Germinal, " + "a novel about miners, " * 5 + "in France?"
    built = tiny_model.demonstrate([*QUESTIONS[:3], long], BM25Retriever(PASSAGES), tokenizer, config, seed=0)
    assert (built.left_out, len(built.rows)) == (1, 3)
