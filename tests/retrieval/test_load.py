"""Retriever arguments as recipes and command lines give them, and the retriever they lead to."""

import socket
import subprocess
import sys

import pytest
from trl import TrlParser

from rex_rag.data.corpus import CorpusError, write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
from rex_rag.retrieval.remote.client import RemoteRetriever
from rex_rag.training.recipe import RECIPE_PARTS
from rex_rag.types import Passage


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write_corpus([Passage("a", "Oslo", "A harbour."), Passage("b", "Rome", "A forum.")], path)
    return path


def test_bm25_over_a_corpus_relative_to_the_working_directory(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    retriever = load_retriever(RetrieverArguments(corpus=["corpus.jsonl"]))
    assert isinstance(retriever, BM25Retriever)
    assert retriever.search(["rome"], 1)[0][0].id == "b"


def test_bm25s_takes_parameters_and_is_told_apart_from_bm25(corpus):
    asked = RetrieverArguments(retriever="bm25s", corpus=[str(corpus)], bm25s_k1=1, bm25s_b=0.5)
    retriever = load_retriever(asked)
    assert retriever.description.endswith("corpus.jsonl (k1=1, b=0.5)")
    assert retriever.search(["rome"], 1)[0][0].id == "b"
    others = [RetrieverArguments(corpus=[str(corpus)]), RetrieverArguments(retriever="bm25s", corpus=[str(corpus)])]
    known = [retriever_identity(arguments) for arguments in (asked, *others)]
    assert len({identity["fingerprint"] for identity in known}) == 3
    assert len({identity["corpus_sha256"] for identity in known}) == 1


def test_url_gives_a_client_with_the_limits():
    retriever = load_retriever(
        RetrieverArguments(retriever="http://127.0.0.1:8000", retriever_timeout=3, retriever_max_attempts=2)
    )
    assert isinstance(retriever, RemoteRetriever)
    assert retriever.description == "retrieval server at http://127.0.0.1:8000/retrieve"
    assert (retriever._timeout, retriever._max_attempts) == (3.0, 2)


def test_a_server_that_is_away_names_the_settings_as_recipes_do():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        retriever = load_retriever(RetrieverArguments(retriever=url, retriever_max_attempts=1))
        with pytest.raises(RetrievalError, match=r"raise retriever_timeout \(60 s\) or retriever_max_attempts \(1\)$"):
            retriever.check()
    retriever.close()


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"absent\.jsonl: no such file"):
        load_retriever(RetrieverArguments(corpus=[str(tmp_path / "absent.jsonl")]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "corpus is empty"),
        ({"retriever": "elastic", "corpus": ["a"]}, "neither 'bm25', google nor serpapi, nor"),
        ({"retriever": "http://x", "corpus": ["a"]}, "leave corpus out"),
        ({"retriever": "bm25s"}, "retriever='bm25s' searches a corpus.*corpus is empty"),
        ({"retriever": "bm25s", "corpus": ["a"], "bm25s_b": 2}, "bm25s_b=2; it must be a number within 0 and 1"),
        ({"retriever": "bm25s", "corpus": ["a"], "bm25s_k1": "x"}, "bm25s_k1='x'; it must be a number"),
        ({"corpus": ["a"], "bm25s_k1": 1.5}, "bm25s_k1=1.5 is for retriever='bm25s', not for bm25"),
        ({"corpus": ["a", " "]}, "holds ' '"),
        ({"corpus": [3]}, "holds 3"),
        ({"corpus": ["a"], "retriever_devices": 0}, r"retriever_devices=\[0\] holds 0"),
        ({"retriever": 3}, "holds 3"),
        ({"corpus": ["a"], "retriever_timeout": 0}, "retriever_timeout=0.0"),
        ({"corpus": ["a"], "retriever_timeout": float("nan")}, "retriever_timeout=nan"),
        ({"corpus": ["a"], "retriever_max_attempts": 0}, "retriever_max_attempts=0"),
        (
            {"retriever": "http://x", "retriever_nprobe": 8},
            "retriever_nprobe=8 is for an index directory, but retriever=http://x is searched by its .*; leave it out",
        ),
        ({"corpus": ["a"], "retriever_engine": "torch"}, "retriever_engine='torch' is for .* or at auto"),
        ({"corpus": ["a"], "retriever_ef_search": 9}, "retriever_ef_search=9 is for .* searches in memory"),
        ({"retriever": ["http://x", "http://y"], "retriever_encoder": "e"}, "retriever=http://x http://y is searched"),
        (
            {"retriever": "google", "search_cache": "c", "max_paid_searches": 1, "retriever_engine": "faiss"},
            "retriever=google is an online engine; leave it out or at auto",
        ),
        ({"retriever": "http://x", "retriever_devices": ["cuda:0"]}, "leave it out, or set rerank_model"),
    ],
)
def test_values_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RetrieverArguments(**values)


def test_what_an_index_or_a_reranker_reads_is_taken(tmp_path):
    index = RetrieverArguments(retriever=str(tmp_path), retriever_nprobe=8, retriever_engine="torch")
    assert index.kind.name == "index"
    assert RetrieverArguments(retriever="http://x", retriever_devices="cuda:0", rerank_model="m").kind.name == "remote"
    assert (
        RetrieverArguments(retriever="http://x", retriever_engine="auto", retriever_devices=[]).kind.name == "remote"
    )


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("retriever: bm25\ncorpus: one.jsonl\nretriever_timeout: 5\n")
    [arguments] = TrlParser(RetrieverArguments).parse_args_and_config(["--config", str(recipe)])
    assert (arguments.corpus, arguments.retriever_timeout) == (["one.jsonl"], 5.0)
    [arguments] = TrlParser(RetrieverArguments).parse_args_and_config(
        ["--config", str(recipe), "--corpus", "two.jsonl", "three.jsonl"]
    )
    assert arguments.corpus == ["two.jsonl", "three.jsonl"]


def test_field_names_do_not_clash_with_the_trainer_and_help_renders():
    parser = TrlParser(RECIPE_PARTS)
    help_text = parser.format_help()
    assert "--retriever_max_attempts" in help_text and "--subset_seed" in help_text


def test_imports_stay_light():
    code = (
        "import sys, rex_rag.retrieval.load, rex_rag.retrieval.bm25.retriever, rex_rag.retrieval.remote.client\n"
        "import rex_rag.data.qa, rex_rag.data.corpus\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'bm25s') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr.strip()) == ("[]", "")


def test_a_corpus_that_a_recipe_names_can_be_left_out_on_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("retriever: bm25\ncorpus: one.jsonl\n")
    words = ["--config", str(recipe), "--retriever", "http://127.0.0.1:8000"]
    with pytest.raises(ValueError, match="--corpus none where a recipe names it"):
        TrlParser(RetrieverArguments).parse_args_and_config(words)
    [arguments] = TrlParser(RetrieverArguments).parse_args_and_config([*words, "--corpus", "none"])
    assert (arguments.corpus, arguments.kind.name) == ([], "remote")
