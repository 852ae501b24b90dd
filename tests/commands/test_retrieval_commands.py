"""From a corpus to a served index by commands alone, and the retrieval recipes, parsed as the commands parse them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from rex_rag.cli import main
from rex_rag.commands.retrieval import _index_as_retriever
from rex_rag.commands.sections import parse_section
from rex_rag.retrieval.index.arguments import IndexArguments
from rex_rag.retrieval.load import RetrieverArguments
from rex_rag.retrieval.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes" / "retrieval").glob("*.yaml"))


@pytest.fixture
def index(tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    corpus = tmp_path / "corpus.jsonl"
    rows = [
        {"id": str(n), "title": f"City {n}", "text": f"City {n} has {n} bridges and a harbour."} for n in range(40)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["index", "--corpus", str(corpus), "--output", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    return tmp_path / "index"


@pytest.fixture
def server(index: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "rex_rag.cli", "serve", "--index", str(index), "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    yield url, process
    process.kill()
    process.communicate()


def test_search_and_load_on_a_served_index(server: tuple[str, subprocess.Popen], index: Path, tmp_path: Path, capsys):
    url, process = server
    assert main(["search", "--url", url, "--top-k", "1", "17 bridges"]) == 0
    assert "1. City 17  (" in capsys.readouterr().out
    assert main(["search", "--index", str(index), "--top-k", "1", "17 bridges"]) == 0
    assert "1. City 17  (" in capsys.readouterr().out

    report = tmp_path / "bench.json"
    arguments = ["--queries", "400", "--concurrency", "8", "--json", str(report), "--index", str(index)]
    assert main(["bench-retrieval", "--url", url, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "queries/s answered, 0 requests failed" in shown
    for stage in ("queue", "encode", "search", "fetch", "wire"):
        assert re.search(rf"^ *{stage}\b", shown, re.MULTILINE), stage
    assert re.search(r"the server answers [0-9.]+ times what the index answers in process", shown)
    served, in_process = json.loads(report.read_text())
    assert served["queries"] == in_process["queries"] == 400

    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, process.stderr.read()


def test_serving_a_directory_that_is_no_index_ends_with_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "rex_rag.cli", "serve", "--index", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "has no manifest.json, so it is not a finished index" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_verify_takes_a_directory_and_nothing_else(index: Path, capsys: pytest.CaptureFixture):
    for words in (["--verify", str(index)], [f"--verify={index}"]):
        assert main(["index", *words]) == 0
        assert f"{index}: 40 passages, all " in capsys.readouterr().out
    for words in (["--verify"], ["--verify", str(index), "--force"], ["--force", "--verify", str(index)]):
        assert main(["index", *words]) == 2
        assert "--verify takes one index directory and nothing else" in capsys.readouterr().err


def test_short_forms_are_spelled_out():
    spelled = _index_as_retriever(["--index", "d", "--gpus", "0", "1", "--port", "8", "--index=e", "--gpus=2"])
    assert spelled == [
        *("--retriever", "d", "--retriever_devices", "cuda:0", "cuda:1", "--port", "8"),
        *("--retriever", "e", "--retriever_devices", "cuda:2"),
    ]


def test_help_of_index_and_serve_names_every_setting_and_imports_no_torch():
    for command, settings in (
        ("index", ("--passage-prefix", "--verify DIR", "--dry-run")),
        ("serve", ("--rerank-model", "--index DIR", "--gpus N [N ...]")),
    ):
        code = (
            "import sys\n"
            "from rex_rag.cli import main\n"
            "try:\n"
            f"    main(['{command}', '--help'])\n"
            "finally:\n"
            "    print('torch' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        listed = "\n".join(line for line in done.stdout.partition("\noptions:\n")[2].splitlines() if line[:3] == "  -")
        for setting in settings:
            assert setting in listed
        assert done.stdout.rstrip().endswith("False")


def test_there_is_a_recipe_for_the_papers_retriever_and_its_lexical_twin():
    assert RECIPES == ["recipes/retrieval/wiki18_bm25.yaml", "recipes/retrieval/wiki18_e5.yaml"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_retrieval_recipes_parse_strictly_and_serve_what_they_build(recipe: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert set(yaml.safe_load(Path(recipe).read_text())) == {"index", "serve"}
    built, _ = parse_section("index", "", "index", (IndexArguments,), ["--config", recipe])
    retrieval, options, _ = parse_section(
        "serve", "", "serve", (RetrieverArguments, ServerOptions), ["--config", recipe]
    )
    assert retrieval.retriever == [built.output]
    assert retrieval.kind.name == "index"
    assert options.is_loopback
    text = Path(recipe).read_text()
    for command in ("rex-rag index", "rex-rag serve"):
        assert f"{command} --config {recipe}" in text


def test_the_papers_recipe_is_e5_at_half_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    arguments, _ = parse_section(
        "index", "", "index", (IndexArguments,), ["--config", "recipes/retrieval/wiki18_e5.yaml", "--index", "ivf"]
    )
    assert (arguments.model, arguments.index, arguments.batch_size) == ("intfloat/e5-base-v2", "ivf", 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index: {}\n", "has no part `serve:`"),
        ("serve: [a]\n", "has no part `serve:`"),
        ("serve: {prot: 80}\n", r"under `serve:`: unknown keys: 'prot' \(did you mean port\?\)"),
        ("serve: {retriever: x/y, port: -1}\n", "port=-1"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_section("serve", "", "serve", (RetrieverArguments, ServerOptions), ["--config", str(recipe)])
    with pytest.raises(ValueError, match="there is no recipe at"):
        parse_section("serve", "", "serve", (RetrieverArguments,), ["--config", str(tmp_path / "absent.yaml")])
