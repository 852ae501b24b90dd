"""`rex-rag view`, `curves` and `reliability` as a user types them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from rex_rag.commands.pictures import add_curves, add_reliability, add_view
from rex_rag.evaluation.records import Prediction, Sample
from rex_rag.protocols import SearchR1
from rex_rag.quickstart import warm_start
from tests.evaluation.run_parts import write_run
from tests.visualization.test_records import policy, row, write_table

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in (add_view, add_curves, add_reliability):
        add(commands)
    options = parser.parse_args([str(word) for word in words])
    options.run(options)


def write_predictions(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    samples = (Sample("Man", [{"kind": "POLICY", "text": "<answer>Man</answer>"}], [], 3, 0, {}),)
    rows = (Prediction(f"q{number}", f"Which isle, {number}?", ("Man",), samples).as_row() for number in range(count))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_view_writes_a_page_beside_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_predictions(tmp_path / "nq", 3)
    write_predictions(tmp_path / "popqa", 3)
    run("view", tmp_path)
    page = tmp_path / "trajectories.html"
    assert capsys.readouterr().out == f"{page}: 6 of 6 trajectories, 6 right, 0 wrong, 0 without an answer\n"
    text = page.read_text()
    assert "right (6)" in text
    assert f"<h1>Trajectories of {tmp_path.name}</h1>" in text and str(tmp_path) not in text
    run("view", tmp_path, "--benchmark", "popqa", "--limit", "2")
    said = f"{page}: 2 of 3 trajectories, 2 right, 0 wrong, 0 without an answer; --limit 3 shows all\n"
    assert capsys.readouterr().out == said
    text = page.read_text()
    assert "Shown here: 2 of 3 trajectories." in text
    assert "<dd>popqa</dd>" in text and "<dd>nq</dd>" not in text
    run("view", tmp_path / "nq" / "predictions.jsonl")
    assert "<h1>Trajectories of nq/predictions.jsonl</h1>" in (tmp_path / "nq" / "trajectories.html").read_text()


def test_view_says_of_training_how_many_are_probes_and_of_an_evaluation_how_many_are_right(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    kinds = (False, True, True)
    rows = [row([policy("x")], "x", 0.0, probe=is_probe) for is_probe in kinds]
    write_table(tmp_path / "completions" / "completions_00001.parquet", rows)
    run("view", tmp_path)
    page = tmp_path / "trajectories.html"
    assert capsys.readouterr().out == f"{page}: 3 of 3 trajectories, 2 of them probes\n"
    assert '<dl class="run">' not in page.read_text()
    write_run(tmp_path / "run", {"nq": [1, 0, None, 1]})
    (tmp_path / "completions").rename(tmp_path / "run" / "completions")
    run("view", tmp_path / "run", "--output", page)
    assert capsys.readouterr().out == (
        f"{page}: 7 of 7 trajectories: 3 of training, 2 of them probes; 4 of an evaluation, 2 right, 1 wrong, "
        "1 without an answer\n"
    )
    text = page.read_text()
    assert "original, not rewarded" in text and "<dt>reward</dt>" in text  # of training
    assert "<dt>exact match</dt>" in text and '<p>The evaluation:</p><dl class="run">' in text
    assert '<option value="/training">training (3)</option><option value="nq">nq (4)</option>' in text
    assert "> rescued (0)</label>" in text
    run("view", tmp_path / "run", "--step", "1", "--output", page)
    assert '<dl class="run">' not in page.read_text()


def test_view_shows_an_evaluation_under_way_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write_run(
        tmp_path / "run", {"nq": [1, 0, 1], "popqa": [1] * 4, "musique": [0] * 2}, unfinished={"popqa": 3}
    )
    shutil.rmtree(path / "musique")  # not begun
    page = path / "trajectories.html"
    run("view", path)
    missing = "not finished, so far only: popqa 3 of 4 questions, musique 0 of 2 questions"
    assert capsys.readouterr().out == (
        f"{page}: 6 of 6 trajectories, 5 right, 1 wrong, 0 without an answer\nthe evaluation is {missing}\n"
    )
    said = missing.replace("not finished, ", "<dt>not finished</dt><dd>")
    assert said in page.read_text()
    # Of a benchmark that is finished nothing is missing.
    run("view", path, "--benchmark", "nq")
    assert "not finished" not in capsys.readouterr().out + page.read_text()
    run("view", path / "popqa", "--output", page)
    assert capsys.readouterr().out.endswith("the evaluation is not finished, so far only: popqa 3 of 4 questions\n")
    assert "<dd>popqa</dd>" in page.read_text()
    run("view", path / "popqa" / "chunks" / "000000.jsonl", "--output", page)
    assert "<dd>popqa</dd>" in page.read_text() and "so far only: popqa 3 of 4" in page.read_text()
    only = write_run(tmp_path / "begun", {"nq": [1]}, unfinished={"nq": 1})
    (only / "nq" / "chunks" / "000000.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="an evaluation shows once its first chunk is finished"):
        run("view", only)


def test_view_heads_the_page_with_what_the_card_says_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_run(tmp_path / "run", {"nq": [[1, 0]]}, model="me/<b>model</b>", temperature=0.7)
    run("view", path)
    page = path / "trajectories.html"
    head = re.search(r'<dl class="run">(.*?)</dl>', page.read_text())[1]
    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", head) == [
        ("method", "REX-RAG"),
        ("model", "me/&lt;b&gt;model&lt;/b&gt;"),
        ("decoding", "temperature 0.7, top-p 1, seed 0; 2 samples a question"),
        ("retriever", "BM25 over c.jsonl; 3 passages a search"),
    ]
    judge = {"model": "some/judge", "prompt_sha256": "0", "settings": {}}
    (path / "judge.json").write_text(json.dumps(judge))
    (path / "nq" / "judged.jsonl").write_text(json.dumps({"id": "q0", "answer": "Oporto", "score": 1}) + "\n")
    run("view", path)
    head += "<dt>judge</dt><dd>some/judge</dd>"
    assert head in page.read_text() and "> judge disagrees (1)</label>" in page.read_text()
    # From within, a relative path has no folders to read names from.
    monkeypatch.chdir(path / "nq")
    run("view", "predictions.jsonl")
    text = Path("trajectories.html").read_text()
    assert head in text and "<dt>benchmark</dt><dd>nq</dd>" in text
    plain = write_run(tmp_path / "plain", {"nq": [1]}, method="direct")
    run("view", plain)
    text = (plain / "trajectories.html").read_text()
    assert "<dt>decoding</dt><dd>greedy</dd><dt>retriever</dt><dd>none</dd>" in text
    card = json.loads((plain / "run.json").read_text())
    (plain / "run.json").write_text(json.dumps({"format": card["format"]}))
    with pytest.raises(ValueError, match=r"run\.json is not a card of this version \(KeyError: 'method'\)"):
        run("view", plain)


def test_curves_draws_runs_under_their_labels(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, steps in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "kl": 0.1 * step} for step in range(1, steps + 1)] + [{"train_runtime": 2.0}]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    picture = tmp_path / "curves.svg"
    run("curves", tmp_path / "a", f"other={tmp_path / 'b'}", "--output", picture, "--title", "Two & two")
    assert capsys.readouterr().out == f"{picture}: rows logged: a 3, other 5\n"
    text = picture.read_text()
    assert all(f">{shown}</text>" in text for shown in ("a", "other", "Two &amp; two"))
    with pytest.raises(FileNotFoundError, match=r"nor trainer_state\.json in"):
        run("curves", tmp_path / "nowhere", "--output", picture)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models with random weights, as folders that AutoModel and AutoTokenizer load."""
    tokenizer = warm_start.build_tokenizer(SearchR1(template="Question: {question}"))
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = warm_start.build_model(tokenizer, hidden_size=32, layers=1)
        with torch.no_grad():
            # Random weights of the usual size give logits of about 0: larger ones are evidence.
            model.model.embed_tokens.weight.mul_(20)
        folders.append(tmp_path_factory.mktemp(f"model_{seed}"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def test_reliability_draws_two_models_with_search(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"Owl\\"\\nthe owl is in the oak"}\n')
    picture, page = tmp_path / "a.svg", tmp_path / "a.html"
    words = ["--question", "Where is the owl?", "--corpus", corpus, "--max-turn-tokens", "6", "--max-turns", "1"]
    run("reliability", "--model", models[0], "--model", models[1], *words, "--output", picture, "--page", page)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(picture) and said[-1] == str(page)
    counts = [int(re.search(r": (\d+) tokens, mean reliability -0\.\d+", line)[1]) for line in said[1:3]]
    assert all(0 < count <= 12 for count in counts)
    drawn, text = picture.read_text(), page.read_text()
    for model in models:
        assert f">{model.name}</text>" in drawn
        assert f"<summary>Token reliability, {model.name}</summary>" in text
    assert not any(str(tmp_path.parent) in shown for shown in (drawn, text))  # no path of this machine
    assert text.count('<section class="family pair">') == 1
    assert len(re.findall(r'<span class="token (?:r\d|none)" title', text)) == sum(counts)
    run("reliability", "--model", models[0], *words, "--output", tmp_path / "b.svg")
    assert models[1].name not in (tmp_path / "b.svg").read_text()


def test_reliability_without_anything_to_search_is_one_turn(models: list[Path], tmp_path: Path, capsys):
    words = ["--question", "Where?", "--max-turn-tokens", "5", "--k", "3", "--output", tmp_path / "a.png"]
    run("reliability", "--model", models[0], *words)
    assert int(re.search(r": (\d+) tokens", capsys.readouterr().out)[1]) <= 5


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path):
    nowhere = ["reliability", "--model", "no/such-model"]
    with pytest.raises(ValueError, match="question is empty"):
        run(*nowhere, "--question", " ", "--output", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.gif does not say what picture"):
        run(*nowhere, "--question", "Where?", "--output", tmp_path / "a.gif")
    asking = [*nowhere, "--question", "Where?", "--output", tmp_path / "a.png"]
    with pytest.raises(ValueError, match="--k is 1; uncertainty between candidates needs 2 or more"):
        run(*asking, "--k", "1")
    with pytest.raises(FileNotFoundError, match=r"template\.txt"):
        run(*asking, "--prompt-template", tmp_path / "template.txt")
    (tmp_path / "template.txt").write_text("Answer.")
    with pytest.raises(ValueError, match=r"no '\{question\}' placeholder"):
        run(*asking, "--prompt-template", tmp_path / "template.txt")
