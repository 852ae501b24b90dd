"""Runs in a model card, read back by huggingface_hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rex_rag.evaluation.finished import read_run
from rex_rag.evaluation.publish import card_results, write_model_card
from rex_rag.models.identity import folder_sha256 as model_hash
from rex_rag.support.model_index import read_results
from tests.evaluation.run_parts import open_questions, write_run


def test_results_of_a_run_by_hand(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", {"hotpotqa": [1, 1, 1, 0], "own": [0, 0]}))
    results = card_results(run)
    assert [(one.dataset_name, one.metric_type, one.value) for one in results] == [
        ("HotpotQA", "exact_match", 75.0),
        ("HotpotQA", "f1", 75.0),
        ("own", "exact_match", 0.0),
        ("own", "f1", 0.0),
    ]
    first, last = results[0], results[-1]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "RUC-NLPIR/FlashRAG_datasets",
        "hotpotqa",
        "dev",
    )
    assert (last.dataset_type, last.dataset_config, last.dataset_split) == ("own", None, None)
    assert first.metric_name == "Exact match, % (REX-RAG)"
    assert (first.n, first.protocol) == (4, run.protocol)
    assert first.interval == (
        25.0,
        100.0,
    )  # of four questions, three right: 1/256 + 12/256 of samples have at most one
    assert first.details["top_k"] == 3 and first.details["retriever"] == "BM25 over c.jsonl"
    run.card["retriever"]["answers_sha256"] = "ab"
    assert card_results(run)[0].details["answers_sha256"] == "ab" and first.details["answers_sha256"] is None
    assert first.details["questions_sha256"] == run.benchmarks["hotpotqa"]["sha256"]


def test_subsets_and_samples_are_said_in_the_metrics_name(tmp_path: Path):
    part = replace(open_questions("own", 2), size=1200, subset="2 of 1200")
    run = read_run(
        write_run(
            tmp_path / "a", {"own": [[1, 0], [1, 1]]}, benchmarks={"own": part}, temperature=1.0, method="direct"
        )
    )
    first = card_results(run)[0]
    assert first.metric_name == "Exact match, % (Direct answer, mean of 2 samples, 2 of 1,200 questions)"
    assert first.value == 75.0
    assert first.details["retriever"] is None and first.details["top_k"] is None
    assert {name: first.details[name] for name in ("samples", "seed", "subset")} == {
        "samples": 2,
        "seed": 0,
        "subset": "2 of 1200",
    }


def test_runs_of_one_model_go_into_one_card(tmp_path: Path):
    runs = [
        read_run(write_run(tmp_path / "a", {"nq": [1, 1]})),
        read_run(write_run(tmp_path / "b", {"nq": [0, 0]}, method="rag")),
    ]
    write_model_card(tmp_path / "README.md", runs)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "me/model-3B"
    assert [(one.metric_name, one.metric_value) for one in data.eval_results] == [
        ("Exact match, % (REX-RAG)", 100.0),
        ("F1, % (REX-RAG)", 100.0),
        ("Exact match, % (RAG)", 0.0),
        ("F1, % (RAG)", 0.0),
    ]
    assert read_results(tmp_path / "README.md")[0].n == 2
    text = (tmp_path / "README.md").read_text()
    assert "| NQ (test) | Exact match, % (RAG)     |   0.0 |     0.0 to 0.0 |         2 |" in text


def test_an_evaluation_done_again_takes_the_old_ones_place(tmp_path: Path):
    write_model_card(tmp_path / "README.md", [read_run(write_run(tmp_path / "a", {"nq": [1, 1]}))])
    write_model_card(tmp_path / "README.md", [read_run(write_run(tmp_path / "b", {"nq": [0, 1]}))])
    assert [one.value for one in read_results(tmp_path / "README.md")] == [50.0, 50.0]


def test_what_a_card_cannot_hold_is_refused(tmp_path: Path):
    a = read_run(write_run(tmp_path / "a", {"nq": [1, 1]}))
    b = read_run(write_run(tmp_path / "b", {"nq": [1, 1]}, model="other"))
    c = read_run(write_run(tmp_path / "c", {"nq": [1, 1]}, unfinished={"nq": 1}))
    card = tmp_path / "README.md"
    with pytest.raises(ValueError, match="a card is of one model, but these runs are of 2"):
        write_model_card(card, [a, b])
    with pytest.raises(ValueError, match="c is not whole: nq: 1 of 2 questions missing"):
        write_model_card(card, [c])
    with pytest.raises(ValueError, match="two of the 4 results"):
        write_model_card(card, [a, replace(a, path=tmp_path / "again")])
    with pytest.raises(ValueError, match="no run to write"):
        write_model_card(card, [])
    assert not card.exists()


def test_results_of_other_weights_do_not_pass_for_this_models(tmp_path: Path):
    card = tmp_path / "README.md"
    write_model_card(card, [read_run(write_run(tmp_path / "a", {"nq": [1, 1]}))])
    before = card.read_bytes()
    trained_on = read_run(write_run(tmp_path / "b", {"own": [0, 1]}))
    trained_on.card["model"]["weights_sha256"] = "1"
    with pytest.raises(ValueError, match=r"holds 2 results of other weights \(NQ: Exact match, % \(REX-RAG\)"):
        write_model_card(card, [trained_on])
    assert card.read_bytes() == before
    again = read_run(write_run(tmp_path / "c", {"nq": [0, 1]}))
    again.card["model"]["weights_sha256"] = "1"
    write_model_card(card, [again])  # in their place
    assert [one.value for one in read_results(card)] == [50.0, 50.0]


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.bin"])
def test_figures_of_other_weights_than_lie_beside_the_card_are_refused(tmp_path: Path, caplog, weights: str):
    run = read_run(write_run(tmp_path / "a", {"nq": [1, 1]}))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / weights).write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    card = folder / "README.md"
    card.write_text("# Mine\n")
    run.card["model"]["weights_sha256"] = "0" * 64
    with pytest.raises(
        ValueError, match=r"README\.md lies beside weights with the hash \w{12}, but \S+a evaluated"
    ) as no:
        write_model_card(card, [run])
    assert "000000000000; name the card in that model's folder, or evaluate the model in" in str(no.value)
    assert card.read_text() == "# Mine\n"
    run.card["model"]["weights_sha256"] = model_hash(folder)
    write_model_card(card, [run])
    assert len(read_results(card)) == 2 and caplog.text == ""
    run.card["model"]["weights_sha256"] = None  # of the Hub, or behind an endpoint
    write_model_card(card, [run])
    assert "does not say which weights me/model-3B were" in caplog.text
