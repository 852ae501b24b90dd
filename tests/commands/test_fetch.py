"""`rex-rag fetch` against a stand-in of the Hub: sizes first, resumption, what is there, and no Hub at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import hub_stand_in

from rex_rag.cli import main
from rex_rag.data.corpus import read_corpus
from rex_rag.data.qa import QuestionArguments, load_questions
from rex_rag.support import hub as hub_support
from rex_rag.support.hub_files import HubFile, HubListing, partial

ROOT = Path(__file__).resolve().parents[2]
# The Hub's client gives on what came in blocks of 10 MiB.
BLOCK = 10 << 20
LARGE = bytes(range(256)) * (2 * BLOCK // 256 + 1)
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"


def fetch(capsys, *words) -> str:
    """What the command says; it must end well."""
    assert main(["fetch", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert main(["fetch", *map(str, words)]) == 2
    return capsys.readouterr().err


def question(number: int, passages: int = 2) -> dict:
    """As FlashRAG has HotpotQA's rows; neighbours share a passage."""
    titles = [f"Title {number + place}" for place in range(passages)]
    return {
        "id": f"train_{number}",
        "question": f"Who wrote “{number}”?",
        "golden_answers": [f"author {number}"],
        "metadata": {
            "type": "bridge",
            "level": "easy",
            "supporting_facts": {"title": [*titles[:1], *titles[:1]], "sent_id": [0, 1]},
            "context": {"title": titles, "sentences": [[f"About {title}.", " More."] for title in titles]},
        },
    }


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with hub_stand_in() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub_support._ask_first.cache_clear()
        train = lines([question(number, passages=0 if number == 3 else 2) for number in range(900)])
        files = {"hotpotqa/dev.jsonl": lines([question(1)]), "hotpotqa/train.jsonl": train, "README.md": b"read me"}
        hub.datasets = {
            "a" * 40: {FLASHRAG: {**files, "hotpotqa/dev.jsonl": b"{}\n"}},
            "b" * 40: {
                FLASHRAG: {**files, "bamboogle/test.jsonl": lines([question(1)])},
                "PeterJinGo/wiki-18-bm25-index": {"bm25/segments": b"1", "bm25/a": LARGE},
                "PeterJinGo/wiki-18-corpus": {"wiki-18.jsonl.gz": b"1"},
            },
        }
        yield hub


def test_a_set_is_fetched_whole_and_once_and_its_size_told_before(hub, tmp_path, capsys, monkeypatch):
    files = hub.datasets["b" * 40][FLASHRAG]
    told = fetch(capsys, "hotpotqa", "--output", tmp_path / "data", "--dry-run")
    size = len(files["hotpotqa/train.jsonl"]) + len(files["hotpotqa/dev.jsonl"])
    assert f"{size / 1000:.3g} kB to fetch" in told
    assert hub.served == [] and not (tmp_path / "data").exists()

    fetch(capsys, "hotpotqa/dev", "hotpotqa", "--output", tmp_path / "data")
    folder = tmp_path / "data" / "hotpotqa"
    for split in ("dev", "train"):
        assert (folder / f"{split}.jsonl").read_bytes() == files[f"hotpotqa/{split}.jsonl"]
    assert {path.name for path in folder.glob("*")} == {"dev.jsonl", "train.jsonl", "fetched.json", ".fetching"}
    assert json.loads((folder / "fetched.json").read_text())["revision"] == "b" * 40

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "all there" in fetch(capsys, "hotpotqa", "--output", tmp_path / "data")
    assert len(hub.served) == 2


def test_a_broken_connection_and_a_killed_process_are_gone_on_with(hub, tmp_path, capsys):
    target = tmp_path / "wiki_18_bm25" / "bm25" / "a"
    hub.breaks = [10**9, BLOCK + 1000]
    fetch(capsys, "wiki-18-bm25", "--output", tmp_path)
    assert hub.served == [("bm25/segments", 0), ("bm25/a", 0), ("bm25/a", BLOCK)]
    assert target.read_bytes() == LARGE

    held = json.loads((tmp_path / "wiki_18_bm25" / "fetched.json").read_text())["files"]["bm25/a"]
    left = partial(HubFile("bm25/a", held["bytes"], held["digest"]), target)
    target.unlink()
    left.write_bytes(LARGE[:1234])
    said = fetch(capsys, "wiki-18-bm25", "--output", tmp_path)
    assert f"{(len(LARGE) - 1234) / 1e6:.3g} MB to fetch" in said and hub.served[-1] == ("bm25/a", 1234)
    assert target.read_bytes() == LARGE and not left.exists()

    target.unlink()
    left.write_bytes(b"another file's")
    assert "is not what the Hub says" in refused(capsys, "wiki-18-bm25", "--output", tmp_path)
    assert not left.exists() and not target.exists()
    fetch(capsys, "wiki-18-bm25", "--output", tmp_path)
    assert target.read_bytes() == LARGE


def test_a_folder_stays_with_its_commit_and_no_file_of_the_users_is_replaced(hub, tmp_path, capsys):
    old, new = (hub.datasets[commit * 40][FLASHRAG] for commit in "ab")
    folder = tmp_path / "hotpotqa"
    fetch(capsys, "hotpotqa/dev", "--output", tmp_path, "--revision", "a" * 40)
    assert (folder / "dev.jsonl").read_bytes() == old["hotpotqa/dev.jsonl"]
    assert not (folder / "train.jsonl").exists()
    fetch(capsys, "hotpotqa", "--output", tmp_path)
    assert (folder / "train.jsonl").read_bytes() == old["hotpotqa/train.jsonl"]
    assert json.loads((folder / "fetched.json").read_text())["revision"] == "a" * 40

    fetch(capsys, "hotpotqa", "--output", tmp_path, "--revision", "main")
    assert (folder / "dev.jsonl").read_bytes() == new["hotpotqa/dev.jsonl"]
    (folder / "dev.jsonl").write_text("mine")
    assert "dev.jsonl is there" in refused(capsys, "hotpotqa", "--output", tmp_path)
    assert (folder / "dev.jsonl").read_text() == "mine"


def test_the_sample_is_cut_from_the_beginning_of_the_training_questions(hub, tmp_path, capsys):
    fetch(capsys, "hotpotqa-sample", "--output", tmp_path)
    folder = tmp_path / "hotpotqa_sample"
    rows = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and "train_3" not in {row["id"] for row in rows}  # it came without passages
    assert rows[0]["metadata"] == {"type": "bridge", "level": "easy", "supporting_titles": ["Title 0"]}
    others = load_questions(QuestionArguments(datasets=[str(folder / "other_questions.jsonl")]))
    assert len(others) == 899 - 100
    passages = read_corpus([folder / "corpus.jsonl"])
    assert len({passage.title for passage in passages}) == len(passages) == 702  # of 700 questions, each once
    assert all(passage.text == f"About {passage.title}. More." for passage in passages)
    assert {title for row in rows for title in row["metadata"]["supporting_titles"]} <= {one.title for one in passages}

    content = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    asked = len(hub.served)
    fetch(capsys, "hotpotqa-sample", "--output", tmp_path)
    assert len(hub.served) == asked
    (folder / "corpus.jsonl").unlink()
    fetch(capsys, "hotpotqa-sample", "--output", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == content


@pytest.mark.parametrize(
    "recipe", ["hotpotqa_sample/rex_rag", "evaluation/local_sample", "retrieval/wiki18_bm25", "retrieval/wiki18_e5"]
)
def test_what_a_recipes_header_fetches_is_what_the_recipe_names(recipe, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    [names] = re.findall(r"^#   rex-rag fetch (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    fetch(capsys, *names.split())
    named = re.findall(r"\bdata/[\w./-]+\.jsonl(?:\.gz)?", text)
    assert named and all((tmp_path / path).is_file() for path in named), named


def test_names_that_it_does_not_know_are_refused_with_those_that_it_does(hub, tmp_path, capsys):
    for name, said in (
        ("hotpot", "did you mean hotpotqa?"),
        ("hotpotqa/test", "it has dev, train"),
        ("hotpotqa-sample/dev", "no 'hotpotqa-sample/dev' to fetch"),
        ("wiki-18-e5", "PeterJinGo/wiki-18-e5-index"),
    ):
        assert said in refused(capsys, name, "--output", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_hub_one_line_says_what_to_do(tmp_path):
    """In a process of its own: one that finds no Hub stays offline."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rex_rag.cli", "fetch", "nq", "--output", tmp_path / "data"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "data").exists()
    assert "offline" in done.stderr and "HF_ENDPOINT" in done.stderr and "Traceback" not in done.stderr


def test_more_than_the_disk_holds_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    vast = HubListing(FLASHRAG, "b" * 40, (HubFile("nq/train.jsonl", 10**18, "git:0"),))
    monkeypatch.setattr("rex_rag.commands.fetch.list_files", lambda repository, revision: vast)
    assert "has room for" in refused(capsys, "nq", "--output", tmp_path / "data")
    assert not (tmp_path / "data").exists()
