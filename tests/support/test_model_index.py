"""Results in model cards: read back by huggingface_hub itself, and nothing else of the card disturbed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rex_rag.protocols import SearchR1
from rex_rag.support.model_index import TASK_NAME, CardResult, read_results, training_results, write_results

NQ = CardResult(
    dataset_name="NQ",
    dataset_type="RUC-NLPIR/FlashRAG_datasets",
    dataset_config="nq",
    dataset_split="test",
    metric_type="exact_match",
    metric_name="Exact match, % (rex_rag)",
    value=43.9,
    n=3610,
    interval=(42.3, 45.5),
    protocol="ab12cd34",
    details={"top_k": 3},
)
OWN = CardResult("Own | set", "own", "exact_match", "Exact match, % (rex_rag)", 50.0, n=2)

CARD = """\
---
license: apache-2.0
base_model: Qwen/Qwen2.5-3B
tags:
- trl
- rex-rag
---

# A model

What it is for.
"""


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(CARD, encoding="utf-8")
    return path


def metadata(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def test_the_hubs_library_reads_what_was_written(card: Path):
    write_results(card, [NQ, OWN], model_name="me/model")
    data = ModelCard.load(card).data
    assert data.model_name == "me/model"
    first, second = data.eval_results
    assert first.dataset_type == "RUC-NLPIR/FlashRAG_datasets"
    assert (first.dataset_config, first.dataset_split) == ("nq", "test")
    assert (first.task_type, first.metric_type, first.metric_value) == ("question-answering", "exact_match", 43.9)
    assert first.metric_args == {"n": 3610, "interval_95": [42.3, 45.5], "protocol": "ab12cd34", "top_k": 3}
    assert (second.dataset_name, second.metric_args) == ("Own | set", {"n": 2})
    assert read_results(card) == [NQ, OWN]


def test_what_the_card_said_stays(card: Path):
    write_results(card, [NQ], model_name="me/model")
    text = card.read_text(encoding="utf-8")
    head = text.split("---\n")[1]
    assert head.startswith("license: apache-2.0\nbase_model: Qwen/Qwen2.5-3B\ntags:\n- trl\n- rex-rag\nmodel-index:\n")
    assert text.split("---\n", 2)[2].startswith("\n# A model\n\nWhat it is for.\n\n<!-- results: begin -->\n")


def test_the_table_in_the_text(card: Path):
    write_results(card, [NQ, OWN], model_name="me/model")
    text = card.read_text(encoding="utf-8")
    assert "| NQ (test)  | Exact match, % (rex_rag) |  43.9 |  42.3 to 45.5 |     3,610 | ab12cd34 |\n" in text
    assert "| Own \\| set | Exact match, % (rex_rag) |  50.0 |               |         2 |          |\n" in text
    assert "Rows of one protocol share retriever, token limits, decoding and scorer." in text


def test_the_same_result_is_replaced_and_others_are_kept(card: Path):
    write_results(card, [NQ, OWN], model_name="me/model")
    text = card.read_text(encoding="utf-8").replace("<!-- results: end -->", "<!-- results: end -->\n\nBelow.")
    card.write_text(text, encoding="utf-8")
    better = replace(NQ, value=44.5, interval=(42.9, 46.1))
    plain = replace(NQ, metric_name="Exact match, % (rag)", value=34.8)
    write_results(card, [better, plain], model_name="another/name")
    assert read_results(card) == [OWN, better, plain]
    text = card.read_text(encoding="utf-8")
    assert text.count("<!-- results: begin -->") == 1
    assert "43.9" not in text
    assert text.endswith("<!-- results: end -->\n\nBelow.\n")
    assert ModelCard.load(card).data.model_name == "me/model"


def test_writing_twice_changes_nothing(card: Path):
    write_results(card, [NQ, OWN], model_name="me/model")
    once = card.read_bytes()
    write_results(card, [NQ, OWN], model_name="me/model")
    assert card.read_bytes() == once
    write_results(card, read_results(card), model_name="me/model")
    assert card.read_bytes() == once


def test_a_card_is_begun_where_there_is_none(tmp_path: Path):
    path = tmp_path / "new" / "README.md"
    assert read_results(path) == []
    write_results(path, [NQ], model_name="me/<b>x")
    assert "\n# me/&lt;b&gt;x\n" in path.read_text(encoding="utf-8")
    assert list(metadata(path)) == ["model-index"]
    assert metadata(path)["model-index"][0]["name"] == "me/<b>x"


def test_a_card_without_metadata_gets_some(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("# Only text\n", encoding="utf-8")
    write_results(path, [NQ], model_name="me/model")
    assert read_results(path) == [NQ]
    assert "\n# Only text\n" in path.read_text(encoding="utf-8")


def test_line_endings_stay_as_they_are(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_bytes(CARD.replace("\n", "\r\n").encode())
    write_results(path, [NQ], model_name="me/model")
    content = path.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 20
    assert read_results(path) == [NQ]


def with_index(tmp_path: Path, index: list[dict]) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"---\n{yaml.safe_dump({'model-index': index})}---\n# Text\n", encoding="utf-8")
    return path


def foreign(name: str = "me/model", **more: object) -> dict:
    return {
        "name": name,
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": "ai2_arc", "name": "ARC", "revision": None},
                "metrics": [{"type": "accuracy", "value": 61.2, "verified": True, "verifyToken": "abc"}],
                **more,
            }
        ],
    }


def test_results_of_others_stay_and_are_not_taken_for_ours(tmp_path: Path):
    source = {"name": "A leaderboard", "url": "https://example.org"}
    path = with_index(tmp_path, [foreign(source=source)])
    write_results(path, [NQ], model_name="me/model")
    assert read_results(path) == [NQ]
    theirs, ours = metadata(path)["model-index"][0]["results"]
    assert theirs["metrics"] == [{"type": "accuracy", "value": 61.2, "verified": True, "verifyToken": "abc"}]
    assert theirs["source"] == source and "source" not in ours
    assert "ARC" not in path.read_text(encoding="utf-8").split("# Text")[1]


def test_a_result_of_ours_that_has_lost_its_metrics_name_is_shown_by_its_type(tmp_path: Path):
    path = with_index(tmp_path, [foreign(task={"type": "text-generation", "name": TASK_NAME})])
    write_results(path, [NQ], model_name="me/model")
    assert [result.metric_name for result in read_results(path)] == ["accuracy", NQ.metric_name]
    assert re.search(r"\| ARC +\| accuracy +\| +61\.2 \|", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([foreign("one"), foreign("two")], "would change on being written again"),
        ([foreign(comment="a field of its own")], "would change on being written again"),
        ([{"name": "me/model"}], "cannot be read"),
    ],
)
def test_results_that_would_not_survive_are_refused_and_the_card_stays(tmp_path: Path, index: list, message: str):
    path = with_index(tmp_path, index)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_results(path, [NQ], model_name="me/model")
    assert path.read_bytes() == before


def test_a_data_set_described_in_another_way_is_refused(card: Path):
    write_results(card, [NQ], model_name="me/model")
    before = card.read_bytes()
    other = replace(NQ, dataset_name="Natural Questions", metric_type="f1", metric_name="F1")
    with pytest.raises(ValueError, match="would be lost: Natural Questions: F1"):
        write_results(card, [other], model_name="me/model")
    assert card.read_bytes() == before


def test_broken_metadata_is_refused(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("---\na: [1\n---\n# Text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata at the head of .*README\.md cannot be read"):
        write_results(path, [NQ], model_name="me/model")


def test_two_of_the_same_and_none_at_all_are_refused(card: Path):
    with pytest.raises(ValueError, match="two of the 2 results"):
        write_results(card, [NQ, replace(NQ, value=1.0)], model_name="me/model")
    with pytest.raises(ValueError, match="no results to write"):
        write_results(card, [], model_name="me/model")
    assert card.read_text(encoding="utf-8") == CARD


def test_trainings_own_evaluation():
    log = [
        {"step": 10, "eval_em/originals": 0.25},
        {"step": 20, "eval_em/originals": 0.375, "em/originals": 0.9},
        {"step": 20, "train_runtime": 3.0},
        {"step": 30, "eval_em/originals": float("nan"), "eval_two_em/originals": 1},
    ]
    found = [(one.dataset_name, one.value, one.details) for one in training_results(log, "greedy")]
    assert found == [("evaluation questions", 37.5, {"step": 20}), ("two", 100.0, {"step": 30})]
    assert training_results([{"step": 5, "em/originals": 0.9}], "greedy") == []


def test_a_card_of_training_holds_its_last_evaluation_as_the_hub_reads_it(card: Path, tmp_path: Path):
    from rex_rag.training.config import REXRAGConfig
    from rex_rag.training.model_card import write_card

    args = REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_accumulation_steps=4, max_turns=1)
    log = [
        {"step": 5, "em/originals": 0.5, "dead_end/rate": 0.125},
        {"step": 6, "eval_nq_em/originals": 0.25, "eval_nq_searches/mean": 1.5},
        {"step": 6, "eval_hotpotqa_em/originals": 0.75},
    ]
    prompt = "Search.\n```\nQuestion: {question}\n"
    recipe = "/somewhere/of/mine/rex_rag.yaml"
    write_card(
        card,
        name="me/agent",
        args=args,
        protocol=SearchR1(template=prompt, feedback="\nTry `once` more.\n"),
        retriever="a|b",
        recipe=recipe,
        log_history=log,
        evaluation_sets={"nq": (20, "20 of 3610 questions, seed 0"), "hotpotqa": (7405, "")},
    )
    hotpotqa, nq = sorted(read_results(card), key=lambda result: result.dataset_name)
    assert (hotpotqa.dataset_name, hotpotqa.metric_type, hotpotqa.value, hotpotqa.n) == (
        *("hotpotqa", "exact_match", 75.0, 7405),
    )
    assert hotpotqa.metric_name == "Exact match, % (greedy, during training)"
    assert (nq.value, nq.n) == (25.0, 20)
    assert nq.metric_name == "Exact match, % (greedy, during training; 20 of 3610 questions, seed 0)"
    data, text = ModelCard.load(card).data, card.read_text(encoding="utf-8")
    assert (data.license, data.base_model) == ("apache-2.0", "Qwen/Qwen2.5-3B")  # TRL's metadata stays
    assert (
        "# me/agent\n" in text
        and "from [Qwen/Qwen2.5-3B](https://huggingface.co/Qwen/Qwen2.5-3B) with REX-RAG" in text
    )
    assert "SearchAgent.load('me/agent', retriever=" in text
    assert "\n````\nSearch.\n```\nQuestion: {question}\n````\n" in text  # a fence longer than the prompt's own
    assert "\n```\nTry `once` more.\n```\n" in text
    assert "- Rollouts per question: 5 originals, up to 5 probes\n" in text and "- Budgets: 1 search, 500 " in text
    assert "- Recipe: rex_rag.yaml\n" in text and "somewhere" not in text
    assert "Last logged of training questions, sampled, at step 5:" in text and "| dead_end/rate | 0.1250 |" in text
    assert "Last logged of hotpotqa (7,405 questions), greedy, at step 6:" in text
    assert (
        "Last logged of nq (20 of 3610 questions, seed 0), greedy, at step 6:" in text
        and "| searches/mean | 1.5000 |" in text
    )


@pytest.mark.parametrize(
    ("retriever", "shown"),
    [
        ("retrieval server at http://node7.corp:8000/retrieve", "retrieval server; top-k"),
        ("retrieval servers at http://a:1/retrieve, https://b/x/retrieve", "retrieval servers; top-k"),
        (
            "retrieval server at http://a:1/retrieve, the first 50 re-ranked by x",
            "retrieval server, the first 50 re-ranked by x; top-k",
        ),
    ],
)
def test_a_card_of_training_names_no_machine_and_its_command_can_be_copied(card, tmp_path, retriever, shown):
    from rex_rag.training.config import REXRAGConfig
    from rex_rag.training.model_card import write_card

    write_card(
        card,
        name="my agent",
        args=REXRAGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_accumulation_steps=4),
        protocol=SearchR1(template="Question: {question}"),
        retriever=retriever,
        recipe="../../home/of-mine/rex_rag.yaml",
        log_history=[{"step": 6, "eval_<b>_em/originals": 0.25}],
        evaluation_sets={},
    )
    text = card.read_text(encoding="utf-8")
    assert f"- Retriever: {shown} 3\n" in text and "://a" not in text and "corp" not in text
    assert "- Recipe: rex_rag.yaml\n" in text and "of-mine" not in text
    assert "SearchAgent.load('my agent', retriever=" in text
    assert "Last logged of &lt;b&gt;, greedy, at step 6:" in text


def test_a_byte_order_mark_does_not_hide_the_metadata(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_bytes(b"\xef\xbb\xbf" + CARD.encode())
    write_results(path, [NQ], model_name="me/model")
    data = ModelCard.load(path).data
    assert (data.license, data.base_model, len(data.eval_results)) == ("apache-2.0", "Qwen/Qwen2.5-3B", 1)


ODD = """\
---
# What this model knows
language: no  # Norwegian
version: 1.10
license: "mit"
{index}
tags: [a,   b]
---
# Text
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_the_metadata_stays_word_for_word(tmp_path: Path, newline: str):
    path = tmp_path / "README.md"
    path.write_bytes(ODD.replace("{index}\n", "").replace("\n", newline).encode())
    for value in (43.9, 44.5):
        write_results(path, [replace(NQ, value=value)], model_name="me/model")
        content = path.read_bytes().decode()
        head, _, rest = content.partition("model-index:")
        assert head == ODD[: ODD.index("{index}")].replace("\n", newline) + "tags: [a,   b]" + newline
        assert read_results(path)[0].value == value
        assert content.count("model-index:") == 1 and f"---{newline}# Text{newline}" in rest
    # Where the results stand between other keys, they stay there.
    between = tmp_path / "between.md"
    index = content[content.index("model-index:") : content.index(f"---{newline}# Text")].rstrip()
    between.write_bytes(ODD.replace("\n", newline).replace("{index}", index).encode())
    write_results(between, [NQ], model_name="me/model")
    after = between.read_bytes().decode()
    assert after.index("license:") < after.index("model-index:") < after.index(f"tags: [a,   b]{newline}---{newline}")
    assert read_results(between) == [NQ]


def test_metadata_in_braces_is_written_anew(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("---\n{license: mit, tags: [a]}\n---\n# Text\n", encoding="utf-8")
    write_results(path, [NQ], model_name="me/model")
    assert (metadata(path)["license"], read_results(path)) == ("mit", [NQ])
