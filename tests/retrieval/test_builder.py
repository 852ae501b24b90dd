"""Index directories built by the command: whole or absent, the same bytes however often a build was killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from rex_rag.cli import main
from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.retrieval.dense import encode_corpus, faiss_index
from rex_rag.retrieval.dense.kind import _encoding_devices
from rex_rag.retrieval.dense.qdrant_load import QdrantOptions
from rex_rag.retrieval.estimate import NotEnoughRoom, Room
from rex_rag.retrieval.index import builder
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.index.builder import build_index
from rex_rag.retrieval.index.kinds import open_index
from rex_rag.retrieval.index_kind import SearchOptions
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.retrieval.manifest import verify
from rex_rag.support.durable import locked
from rex_rag.types import Passage
from tests.retrieval.dense_parts import save_word_encoder, word_passages

CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Delhi"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    passages = [Passage(str(n), city, f"{city} has a harbour and {n} bridges.") for n, city in enumerate(CITIES)]
    write_corpus(passages, tmp_path / "corpus.jsonl")
    return tmp_path / "corpus.jsonl"


def build(corpus: Path, output: Path, **options: object) -> list[str]:
    said: list[str] = []
    switches = {name: options.pop(name) for name in ("force", "dry_run") if name in options}
    build_index(IndexArguments(corpus=[str(corpus)], output=str(output), **options), said.append, **switches)
    return said


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_bm25_directory_answers_as_the_retriever_in_memory_does(corpus: Path, tmp_path: Path):
    said = build(corpus, tmp_path / "index")
    assert "about 8 passages; this build will take" in said[0]
    assert "8 passages" in said[-1] and "fingerprint" in said[-1]
    assert not (tmp_path / "index.building").exists()
    queries = ["harbour of Lima", "7 bridges", "nothing of this"]
    found = open_index(tmp_path / "index").search(queries, 3)
    assert found == BM25Retriever.from_corpus(corpus).search(queries, 3)


def test_one_passage_is_no_passages(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_corpus([Passage("1", "Oslo", "A harbour.")], tmp_path / "corpus.jsonl")
    said = "\n".join(build(tmp_path / "corpus.jsonl", tmp_path / "index"))
    assert main(["index", "--verify", str(tmp_path / "index")]) == 0
    said += capsys.readouterr().out + open_index(tmp_path / "index").description
    said += BM25Retriever.from_corpus(tmp_path / "corpus.jsonl").description
    assert said.count("1 passage") == 5
    assert "1 passages" not in said


def test_the_same_command_again_does_nothing_and_another_overwrites_nothing(corpus: Path, tmp_path: Path):
    output = tmp_path / "index"
    build(corpus, output)
    before = contents(output)
    assert build(corpus, output) == [f"{output} is already built: nothing to do"]
    with pytest.raises(
        RetrievalError, match=r"holds an index of its own \(stemmer 'english', now 'german'\); it is not overwritten"
    ):
        build(corpus, output, stemmer="german")
    write_corpus([Passage("a", "Other", "Another corpus.")], corpus)
    with pytest.raises(RetrievalError, match="another corpus"):
        build(corpus, output)
    assert contents(output) == before


def test_a_directory_that_is_no_index_and_a_file_are_not_touched(corpus: Path, tmp_path: Path):
    output = tmp_path / "index"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(RetrievalError, match="exists and is no index; it is not touched"):
        build(corpus, output)
    with pytest.raises(RetrievalError, match="is a file"):
        build(corpus, output / "notes.txt")
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt"])
def test_what_lies_where_the_work_area_would_be_is_not_touched(corpus: Path, tmp_path: Path, name: str):
    """An output named `a.building` is what building `a` would work in, and remove."""
    if name == "manifest.json":
        build(corpus, tmp_path / "a.building")
    else:
        (tmp_path / "a.building").mkdir()
        (tmp_path / "a.building" / name).write_text("mine")
    before = contents(tmp_path / "a.building")
    with pytest.raises(RetrievalError, match=r"a\.building, where the index would be built .* no build left there"):
        build(corpus, tmp_path / "a")
    assert contents(tmp_path / "a.building") == before


def test_a_link_is_followed_and_the_working_directory_is_taken(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "real").mkdir()
    for target in ("real", "absent"):
        (tmp_path / f"to_{target}").symlink_to(target)
        build(corpus, tmp_path / f"to_{target}")
        assert (tmp_path / f"to_{target}").is_symlink() and len(open_index(tmp_path / target)) == len(CITIES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(corpus, Path("."))
    assert len(open_index(tmp_path / "here")) == len(CITIES)


def test_a_parent_that_does_not_exist_is_made_and_relative_paths_are_of_the_working_directory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    build(Path("corpus.jsonl"), Path("p/q/index"))
    assert len(open_index(tmp_path / "p" / "q" / "index")) == len(CITIES)


SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs "$1"
exec "$0" -m rex_rag.cli index --force --corpus "$2" --output "$1{inside}"
"""


@pytest.mark.parametrize(
    ("size", "inside", "message"),
    [
        ("4k", "/index", r"the disk is full: \S+/index\.building could not be written"),
        ("1m", "", "is a mount point, which no rename replaces; name a directory inside it"),
    ],
)
def test_a_full_disk_and_a_mount_point_are_named(corpus: Path, tmp_path: Path, size: str, inside: str, message: str):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own needs user namespaces")
    script = SMALL_DISK.format(size=size, inside=inside)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, str(disk), str(corpus)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr.splitlines()[-1])


def test_an_empty_directory_is_taken(corpus: Path, tmp_path: Path):
    (tmp_path / "index").mkdir()
    build(corpus, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == len(CITIES)


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(corpus: Path, tmp_path: Path):
    [said] = build(corpus, tmp_path / "index", dry_run=True)
    assert "time" in said and "memory" in said and "disk" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_a_machine_that_is_too_small_is_refused_unless_forced(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(builder, "measure_room", lambda directory: Room(ram=1 << 20, disk=1 << 10))
    with pytest.raises(NotEnoughRoom, match=r"of disk .*, and 1 KiB are free"):
        build(corpus, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
    build(corpus, tmp_path / "index", force=True)
    assert (tmp_path / "index" / "manifest.json").exists()


def test_two_builders_of_one_directory_do_not_meet(corpus: Path, tmp_path: Path):
    building = tmp_path / "index.building"
    building.mkdir()
    with (
        locked(building / "lock") as ours,
        pytest.raises(RetrievalError, match="another process is building"),
    ):
        assert ours
        build(corpus, tmp_path / "index")
    build(corpus, tmp_path / "index")


def test_a_lock_whose_file_its_holder_removed_is_no_lock(tmp_path: Path):
    """What a second process opened before the first one, at its end, removed the work area with the lock in it."""
    path = tmp_path / "lock"
    code = (
        "import fcntl, sys\nfrom pathlib import Path\nfrom rex_rag.support import durable\n"
        "flock = fcntl.flock\n"
        "def late(file, how):\n    print('opened', flush=True)\n    sys.stdin.readline()\n    flock(file, how)\n"
        "fcntl.flock = late\n"
        "with durable.locked(Path(sys.argv[1])) as ours:\n    print(ours)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as second:
        assert second.stdout.readline() == "opened\n"
        path.unlink()
        assert second.communicate("go\n")[0] == "False\n"


def test_an_index_that_another_process_finished_meanwhile_is_taken(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other one's build falls between this one's first look and its work."""
    build(corpus, tmp_path / "other")
    estimate = builder.measure_room

    def finishing(directory: Path) -> Room:
        os.rename(tmp_path / "other", tmp_path / "index")
        return estimate(directory)

    monkeypatch.setattr(builder, "measure_room", finishing)
    said = build(corpus, tmp_path / "index")
    assert said[-1] == f"{tmp_path / 'index'} is already built: nothing to do"
    assert not (tmp_path / "index.building").exists()


def test_killed_between_its_last_two_steps_and_removed_by_hand_a_build_begins_anew(corpus: Path, tmp_path: Path):
    """The index has its name, the work area is still there: all but the index."""
    build(corpus, tmp_path / "index")
    whole = contents(tmp_path / "index")
    building = tmp_path / "index.building"
    shutil.rmtree(tmp_path / "index")
    building.mkdir()
    (building / "passages.json").write_text(
        json.dumps({"passages": 8, "bytes": 1, "sha256": "0" * 64, "prefixed_ids": 0})
    )
    build(corpus, tmp_path / "index")
    assert contents(tmp_path / "index") == whole


def test_files_made_large_ahead_of_their_content_do_not_count_as_disk_that_a_build_has(tmp_path: Path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "full").write_bytes(b"x" * 10_000)
    assert 10_000 <= builder._size(tmp_path) < 1 << 20


def test_an_unfinished_build_is_not_taken_for_an_index_nor_finished_as_another(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(builder, "hash_files", killed)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path / "index")
    with pytest.raises(RetrievalError, match="an unfinished build lies in"):
        open_index(tmp_path / "index")
    # What a kill in the middle of writing a file leaves behind must not become part of the index.
    for name in (".manifest.json.part", "bm25/.meta.json.part"):
        (tmp_path / "index.building" / "index" / name).write_text("half a fi")
    with pytest.raises(RetrievalError, match=r"unfinished build of something else \(stopwords 'english', now None\)"):
        build(corpus, tmp_path / "index", stopwords=None)
    said = build(corpus, tmp_path / "index")
    assert any("going on with the unfinished build" in line for line in said)
    build(corpus, tmp_path / "twin")
    assert contents(tmp_path / "index") == contents(tmp_path / "twin")


def test_a_broken_corpus_leaves_no_index(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    corpus.write_text(corpus.read_text() + '{"id": "x", "contents": \n')
    assert main(["index", "--corpus", str(corpus), "--output", str(tmp_path / "index")]) == 2
    assert f"{corpus}, line 9: broken JSON" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
    corpus.write_text(corpus.read_text().replace('"contents": \n', '"contents": "mended"}\n'))
    assert main(["index", "--corpus", str(corpus), "--output", str(tmp_path / "index")]) == 0


def test_an_index_is_checked_against_the_corpus_that_a_recipe_names(corpus: Path, tmp_path: Path):
    build(corpus, tmp_path / "index")
    place = [str(tmp_path / "index")]
    assert (
        load_retriever(RetrieverArguments(retriever=place, corpus=[str(corpus)])).search(["Rome"], 1)[0][0].id == "1"
    )
    write_corpus([Passage("a", "Other", "Another corpus.")], tmp_path / "other.jsonl")
    with pytest.raises(RetrievalError, match=r"was built from corpus\.jsonl .*, not from other\.jsonl"):
        load_retriever(RetrieverArguments(retriever=place, corpus=[str(tmp_path / "other.jsonl")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "torch"}, "is a bm25 index, which does not take retriever_engine='torch'; leave it out"),
        ({"nprobe": 3}, "does not take retriever_nprobe=3"),
        ({"ef_search": 3}, "does not take retriever_ef_search=3"),
        ({"encoder": "x"}, "does not take retriever_encoder='x'"),
    ],
)
def test_options_that_an_index_does_not_take_are_refused(corpus: Path, tmp_path: Path, options: dict, message: str):
    build(corpus, tmp_path / "index")
    with pytest.raises(RetrievalError, match=message):
        open_index(tmp_path / "index", SearchOptions(**options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "corpus is empty.*; output is not set"),
        ({"kind": "bm52"}, "kind='bm52'; it must be one of bm25, dense"),
        ({"kind": "dense"}, "needs an encoder"),
        ({"model": "m"}, "model='m' is for kind='dense'"),
        ({"kind": "dense", "model": "m", "index": "tree"}, "index='tree'; it must be one of flat"),
        ({"kind": "dense", "model": "m", "index": "ivf", "nlist": 4, "nprobe": 5}, "nprobe=5 is more than nlist=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": None}, "batch_size=None"),
        ({"workers": 2}, "workers=2 is for kind='dense', but kind is 'bm25'"),
        ({"output": 3}, "output=3 is no text"),
        ({"corpus": 3}, r"corpus=\[3\] holds 3"),
        ({"corpus": {"a": 1}}, r"holds \{'a': 1\}"),
        ({"kind": "dense", "model": "m", "devices": 0}, r"devices=\[0\] holds 0"),
        ({"kind": "dense", "model": "m", "revision": 1234567}, "revision=1234567 is no text"),
        ({"pooling": "cls"}, "pooling='cls' is for kind='dense', but kind is 'bm25'"),
        ({"nlist": 4}, "nlist=4 is for kind='dense', but kind is 'bm25'; set kind to dense, or drop nlist"),
        ({"kind": "dense", "model": "m", "nprobe": 4}, "nprobe=4 is for index='ivf', but index is 'flat'"),
        ({"kind": "dense", "model": "m", "index": "ivf", "hnsw_m": 4}, "is for index='hnsw' or 'qdrant', but index"),
        (
            {"kind": "dense", "model": "m", "index": "ivf", "build_threads": 4},
            "is for index='hnsw', but index is 'ivf'",
        ),
        (
            {"kind": "dense", "model": "m", "index": "hnsw", "build_threads": 0},
            "build_threads=0; it must be an integer",
        ),
        ({"kind": "dense", "model": "m", "workers": 2, "devices": ["cpu"]}, "both say how many processes encode"),
        (
            {"kind": "dense", "model": "m", "qdrant_url": "http://q"},
            "qdrant_url='http://q' is for index='qdrant', but",
        ),
        ({"kind": "dense", "model": "m", "index": "qdrant", "qdrant_url": "http://q"}, "needs qdrant_collection"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_together(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        IndexArguments(**values)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_word_encoder(tmp_path_factory.mktemp("encoder") / "words"))


def test_what_would_stop_a_dense_build_after_encoding_stops_it_before(corpus: Path, tmp_path: Path, words: str):
    dense = {"kind": "dense", "model": words, "query_prefix": "", "passage_prefix": ""}
    with pytest.raises(RetrievalError, match=r"nlist=3 lists need 117 vectors \(39 a list\), and there are 8"):
        build_index(IndexArguments([str(corpus)], str(tmp_path / "index"), index="ivf", nlist=3, **dense), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "faiss.py").write_text("raise ImportError('no FAISS here')")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rex_rag.cli", "index", "--corpus", str(corpus)),
            *("--output", str(tmp_path / "index"), "--kind", "dense", "--model", words),
            *("--query-prefix=", "--passage-prefix="),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'without'}:{Path(__file__).parents[2]}"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rex-rag index: dense indexes need FAISS: pip install")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "without"]


@pytest.mark.parametrize("kind", ["flat", "flat-fp16", "ivf", "hnsw"])
def test_a_dense_directory_answers_and_goes_on_where_it_was_killed(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch, kind: str
):
    write_corpus(word_passages(60), tmp_path / "c.jsonl")

    def dense(output: Path) -> None:
        prefixes = {"query_prefix": "", "passage_prefix": ""}
        arguments = IndexArguments(
            [str(tmp_path / "c.jsonl")], str(output), "dense", model=words, index=kind, **prefixes
        )
        build_index(arguments, lambda line: None)

    dense(tmp_path / "whole")
    for step in ("write_check_vectors", "VectorShards"):
        with monkeypatch.context() as patched:
            patched.setattr(encode_corpus, step, killed)
            with pytest.raises(KeyboardInterrupt):
                dense(tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
    dense(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    index = open_index(tmp_path / "killed", SearchOptions(devices=("cpu",)))
    [ranking] = index.search([index.passages[17].text], 3)
    assert ranking[0].score == pytest.approx(1, abs=1e-3)
    assert ranking[0].text.split().count("oslo") == index.passages[17].text.split().count("oslo")


def test_an_index_is_the_same_wherever_its_encoder_lies_and_says_nothing_of_the_place(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
):
    write_corpus(word_passages(60), tmp_path / "c.jsonl")
    shutil.copytree(words, tmp_path / "secret" / "model")
    shutil.copytree(words, tmp_path / "elsewhere" / "model-2")
    monkeypatch.chdir(tmp_path)

    def dense(output: str, model: str | Path) -> list[str]:
        said: list[str] = []
        arguments = IndexArguments(["c.jsonl"], output, "dense", model=str(model), query_prefix="", passage_prefix="")
        build_index(arguments, said.append)
        return said

    places = {"a": tmp_path / "secret" / "model", "b": "secret/model", "c": "./elsewhere/model-2"}
    for output, model in places.items():
        dense(output, model)
        folder = contents(tmp_path / output).get("encoder_folder.txt")
        assert folder.decode() == f"{(tmp_path / model).resolve()}\n"
    built = [
        {name: data for name, data in contents(tmp_path / output).items() if name[-4:] != ".txt"} for output in places
    ]
    assert built[0] == built[1] == built[2]
    assert not any(b"secret" in data or str(tmp_path).encode() in data for data in built[0].values())
    assert dense("a", "secret/../secret/model") == ["a is already built: nothing to do"]
    verify(tmp_path / "a")

    manifest = json.loads(built[0]["manifest.json"])
    digest = manifest["encoder"]["revision"].removeprefix("sha256:")
    opened = open_index(tmp_path / "b")
    assert opened.description.startswith(f"local encoder ({digest[:12]}), FAISS flat over 60 passages (index b, ")

    save_word_encoder(tmp_path / "secret" / "model", seed=1)
    with pytest.raises(RetrievalError, match=rf"an index of its own \(revision 'sha256:{digest}', now 'sha256:"):
        dense("a", "secret/model")
    shutil.rmtree(tmp_path / "secret")
    with pytest.raises(RetrievalError, match=r"a local encoder, local encoder \(sha256:\w+\), .*where it lies: retr"):
        open_index(tmp_path / "a")
    moved = open_index(tmp_path / "a", SearchOptions(encoder="elsewhere/model-2"))
    assert moved.search(["oslo rome"], 3) == opened.search(["oslo rome"], 3)


def test_the_threads_that_build_a_graph_are_chosen_and_said(tmp_path: Path, words: str):
    write_corpus(word_passages(200), tmp_path / "c.jsonl")
    dense = {"kind": "dense", "model": words, "query_prefix": "", "passage_prefix": "", "index": "hnsw"}
    for threads, said in ((None, "built by 1 thread, so that it"), (2, "built by 2 threads, and no two builds are")):
        lines: list[str] = []
        output = tmp_path / f"index-{threads}"
        build_index(
            IndexArguments([str(tmp_path / "c.jsonl")], str(output), build_threads=threads, **dense), lines.append
        )
        assert said in lines[0]
        index = open_index(output)
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["index"]["faiss"]["build_threads"] == threads
        assert index.search([index.passages[7].text], 1)[0][0].score == pytest.approx(1, abs=1e-3)


def test_workers_on_a_machine_with_gpus_do_not_quietly_mean_its_cpu(words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = IndexArguments(["c"], "o", "dense", workers=3, model=words)
    with pytest.raises(RetrievalError, match="drop workers, or say --devices cpu cpu cpu"):
        _encoding_devices(asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _encoding_devices(asked) == ["cpu"] * 3
    assert _encoding_devices(IndexArguments(["c"], "o", "dense", model=words)) is None


def killed(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_is_said_in_one_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(builder, "hash_files", killed)
    assert main(["index", "--corpus", str(corpus), "--output", str(tmp_path / "index")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "rex-rag index: interrupted; the same command goes on where it stood"
    )


def test_help_says_what_the_defaults_are():
    text = {entry.name: entry.metadata.get("help", "") for entry in fields(IndexArguments)}
    assert f"at least {faiss_index.MIN_NPROBE}" in text["nprobe"] and faiss_index.NPROBE_SHARE == 16
    assert f"{faiss_index.NLIST_PER_ROOT} sqrt(passages)" in text["nlist"]
    assert f"Default: {faiss_index.HNSW_M}, qdrant {QdrantOptions().hnsw_m}." in text["hnsw_m"]
    built = f"Default: {faiss_index.HNSW_EF_CONSTRUCTION}, qdrant {QdrantOptions().hnsw_ef_construct}."
    assert built in text["ef_construction"]
    assert f"Default: {faiss_index.HNSW_EF_SEARCH}." in text["ef_search"]


def test_a_recipes_part_gives_defaults_and_the_command_line_goes_over_them(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"index:\n  corpus: {corpus}\n  output: {tmp_path}/index\n  stopwords: german\n  stemmer: null\n"
    )
    assert main(["index", "--config", str(recipe), "--stopwords", "french"]) == 0
    arguments = json.loads((tmp_path / "index" / "manifest.json").read_text())["arguments"]
    assert arguments == {"kind": "bm25", "stemmer": None, "stopwords": "french"}
    assert main(["index", "--verify", str(tmp_path / "index")]) == 0
    assert "8 passages, all" in capsys.readouterr().out
    recipe.write_text("index:\n  corpsu: x\n")
    assert main(["index", "--config", str(recipe)]) == 2
    assert "'corpsu' (did you mean corpus?)" in capsys.readouterr().err


# Forks a process for every line "MOMENT OUTPUT" that it reads: it builds, and dies of SIGKILL right before the change
# to the file system of that number (0: never). Answers with the changes made or begun, and what waiting for it gave.
MORTAL_BUILDS = """
import os, signal, sys
import numpy, tantivy, yaml  # whatever an attempt would import takes it no time
import rex_rag.retrieval.bm25.build, rex_rag.retrieval.index.builder
from rex_rag.cli import main
from transformers import HfArgumentParser

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

def place(value, folder=-1):
    if not isinstance(value, (str, os.PathLike)):
        return ""
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder != -1 else "", os.fspath(value))

def changed(event, arguments):
    if event == "open":
        path, _, flags = arguments
        return place(path) if flags & (os.O_WRONLY | os.O_RDWR) else ""
    folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
    return place(arguments[0], folder) if event in CHANGES else ""

for line in sys.stdin:
    moment, output = line.split()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        made = 0

        def watch(event, arguments):
            global made
            if changed(event, arguments).startswith(output):
                made += 1
                os.write(tell, b".")
                if made == int(moment):
                    os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(2, 1)
        sys.addaudithook(watch)
        os._exit(main(["index", "--corpus", sys.argv[1], "--output", output]))
    os.close(tell)
    made = 0
    while dots := os.read(told, 4096):
        made += len(dots)
    os.close(told)
    print(made, os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def mortal_build(tmp_path: Path):
    """A function (output, moment) -> (changes, status): builds an index of 800 passages, and dies at the moment."""
    draw = random.Random(3)
    words = [f"word{n}" for n in range(3_000)]
    # Half a megabyte: what is written does not wait in buffers until its file is closed.
    passages = [Passage(str(n), words[n % 500], " ".join(draw.choices(words, k=60))) for n in range(800)]
    write_corpus(passages, tmp_path / "corpus.jsonl")
    with (
        (tmp_path / "said").open("w+b") as said,
        subprocess.Popen(
            [sys.executable, "-c", MORTAL_BUILDS, str(tmp_path / "corpus.jsonl")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        ) as process,
    ):

        def build_until(output: Path, moment: int = 0) -> tuple[int, int]:
            process.stdin.write(f"{moment} {output}\n")
            process.stdin.flush()
            answer = process.stdout.readline().split()
            assert len(answer) == 2, (tmp_path / "said").read_text()[-3000:]
            return int(answer[0]), int(answer[1])

        yield build_until


@pytest.mark.slow
def test_killed_at_every_moment_a_build_ends_with_the_same_bytes(tmp_path: Path, mortal_build):
    """Moments are counted in changes to the file system, not in seconds: neither load nor luck has a part in them."""
    moments, status = mortal_build(tmp_path / "whole")
    assert status == 0
    assert mortal_build(tmp_path / "again") == (moments, 0)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "again") == whole
    output, building = tmp_path / "killed", tmp_path / "killed.building"
    left_behind = set()
    for moment in range(1, moments + 1):
        assert mortal_build(output, moment) == (moment, signal.SIGKILL)
        assert not output.exists() or contents(output) == whole
        left_behind.add(tuple(sorted((name, len(data)) for name, data in contents(building).items())))
        assert mortal_build(output)[1] == 0
        assert contents(output) == whole, moment
        assert not building.exists()
        shutil.rmtree(output)
    # As counted, without tantivy's own steps, which no audit hook sees; a build in fewer steps may lower them.
    assert moments >= 52
    assert len(left_behind) >= 35, len(left_behind)


@pytest.mark.slow
def test_killed_ten_times_a_build_goes_on_each_time_from_where_the_last_one_died(tmp_path: Path, mortal_build):
    moments, _ = mortal_build(tmp_path / "whole")
    draw = random.Random(3)
    output, killed = tmp_path / "killed", 0
    while killed < 10:
        _, status = mortal_build(output, draw.randint(1, moments))
        killed += status == signal.SIGKILL
        if status == 0:  # less was left to do than the draw asked for: begin anew
            assert contents(output) == contents(tmp_path / "whole")
            shutil.rmtree(output)
    assert mortal_build(output)[1] == 0
    assert contents(output) == contents(tmp_path / "whole")
