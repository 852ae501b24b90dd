"""`rex-rag evaluate`: arguments, recipes, and a whole run from the command line."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rex_rag.commands.evaluate import _may_go_first, evaluate, launched_shard
from rex_rag.commands.sections import parse_section
from rex_rag.evaluation.arguments import EvaluationArguments, SearchArguments
from rex_rag.evaluation.benchmarks import FLASHRAG_SETS
from rex_rag.evaluation.methods import METHODS
from rex_rag.evaluation.run import RunError, Shard
from rex_rag.models import language_model as models
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
from tests.evaluation.test_judge import JudgeServer
from tests.evaluation.tiny_run import ROOT, make_tiny_world
from tests.retrieval.running import Running

RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes" / "evaluation").glob("*.yaml"))
ENOUGH = {"model": "m", "benchmarks": ["nq"], "output": "runs/a"}


def parse(*words: str):
    return parse_section("evaluate", "", "evaluate", (EvaluationArguments, SearchArguments), words)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """Recipes hold paths relative to the repository root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError) as raised:
        EvaluationArguments(
            benchmarks=["a=1.jsonl,a=2.jsonl"],
            samples=3,
            batch_size=0,
            temperature=0,
            backend="vllm",
            endpoint="http://me:secret@host",
            dtype="int4",
            prompt_template="nowhere.txt",
            endpoint_timeout=-1.0,
            seed=True,
        )
    said = str(raised.value)
    for part in (
        "model is not set",
        "output is not set",
        "benchmarks names a more than once",
        "samples=3 at temperature 0 are all equal",
        "batch_size=0",
        "dtype='int4'",
        "prompt_template='nowhere.txt' is no file",
        "endpoint_timeout=-1.0",
        "seed=True",
        "do not go together",
        "user name or password",
    ):
        assert part in said, part
    assert "secret" not in said.replace("me:secret@host' and backend", ""), "shown once, where it was typed"


def test_benchmarks_are_separated_by_commas_or_spaces():
    for words in (["nq,popqa"], ["nq", "popqa"], ["nq,", " popqa"]):
        arguments, _, _ = parse("--model", "m", "--output", "o", "--benchmarks", *words)
        assert arguments.benchmarks == ["nq", "popqa"]
    assert EvaluationArguments(**{**ENOUGH, "benchmarks": "nq, popqa"}).benchmarks == ["nq", "popqa"]


def test_the_backend_follows_from_the_endpoint():
    assert EvaluationArguments(**ENOUGH).chosen_backend == "transformers"
    assert EvaluationArguments(**ENOUGH, backend="vllm").chosen_backend == "vllm"
    served = EvaluationArguments(**ENOUGH, endpoint="http://127.0.0.1:8000")
    assert served.chosen_backend == "endpoint"
    assert served.model_options().endpoint.model == "m"
    with pytest.raises(ValueError, match="backend='endpoint' needs endpoint"):
        EvaluationArguments(**ENOUGH, backend="endpoint")


def test_a_retriever_may_be_left_out_and_is_checked_if_it_is_not():
    assert not SearchArguments().is_given
    assert SearchArguments(corpus=["a.jsonl"]).is_given
    with pytest.raises(ValueError, match="has its own corpus"):
        SearchArguments(retriever=["http://127.0.0.1:1"], corpus=["a.jsonl"])


def test_processes_that_were_launched_take_their_part():
    assert launched_shard({}) == Shard(0, 1)
    assert launched_shard({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Shard(2, 4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_parse_strictly_and_name_real_benchmarks_and_methods(recipe):
    arguments, search, _ = parse("--config", recipe)
    written = yaml.safe_load((ROOT / recipe).read_text())["evaluate"]
    for name, value in written.items():
        owner = arguments if hasattr(arguments, name) else search
        assert getattr(owner, name) in (value, [value]), name
    assert arguments.method in METHODS
    assert search.is_given
    assert all(name in FLASHRAG_SETS or "=" in name or "/" in name for name in arguments.benchmarks)


@pytest.mark.parametrize("recipe", RECIPES)
def test_headers_name_files_that_exist_and_show_an_override_that_parses(recipe):
    text = "\n".join(
        line.removeprefix("#").strip() for line in (ROOT / recipe).read_text().splitlines() if line.startswith("#")
    ).replace("\\\n", "")
    [(config, script, named)] = re.findall(r"accelerate launch --config_file (\S+) -m (\S+) --config (\S+)", text)
    assert (ROOT / config).is_file() and script == "rex_rag.evaluate"
    assert named == recipe
    shown = re.findall(r"^(--.+)", text, re.MULTILINE)
    assert shown and "for example:\n--" in text
    for overrides in map(str.split, shown):
        arguments, _, _ = parse("--config", recipe, *overrides)
        for name, value in zip(overrides[::2], overrides[1::2], strict=True):
            assert str(getattr(arguments, name[2:])) == value.replace("none", "None")
        # Its own prompt takes more than 400 tokens, whatever the tokenizer.
        assert arguments.method != "search_o1" or arguments.max_sequence_length >= 1024


def test_the_papers_recipe_asks_all_51713_questions():
    arguments, _, _ = parse("--config", "recipes/evaluation/paper_7_sets.yaml")
    assert arguments.benchmarks == list(FLASHRAG_SETS)
    assert sum(FLASHRAG_SETS[name][1] for name in arguments.benchmarks) == 51_713
    assert arguments.subset is None and arguments.temperature == 0.0


def test_a_whole_run_from_the_command_line(world, tmp_path, capsys, monkeypatch):
    words = world.words(tmp_path / "run", subset=12, batch_size=5)
    evaluate(words)
    printed = capsys.readouterr().out
    assert "12 questions of 1 benchmark\n" in printed
    assert re.search(r"^world +12 +\d+\.\d +\d+\.\d to \d+\.\d", printed, re.MULTILINE)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["benchmarks"]["world"]["n"] == 12
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["retriever"]["kind"] == "bm25" and card["chunk_size"] == 5
    assert card["benchmarks"]["world"]["subset"].startswith("12 of 40 questions, seed 0")
    assert str(tmp_path) not in json.dumps(card)
    before = (tmp_path / "run" / "world" / "predictions.jsonl").read_bytes()
    # Finished, or another run: both are said without a model.
    monkeypatch.setattr(models, "open_model", lambda options: pytest.fail("a model is loaded"))
    evaluate(words)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'run'} holds this run, finished: all 12 questions were answered before" in printed
    assert re.search(r"^world +12 +\d+\.\d", printed, re.MULTILINE)
    assert (tmp_path / "run" / "world" / "predictions.jsonl").read_bytes() == before
    for name, value, named in (
        ("dtype", "bfloat16", "dtype: float32 against bfloat16"),
        ("temperature", "0.5", "temperature: 0.0 against 0.5"),
        ("method", "search_r1", "method.*: rex_rag against search_r1"),
        ("corpus", world.questions.with_name("other.jsonl"), "retriever.*fingerprint"),
    ):
        if name == "corpus":
            value.write_text('{"id": "0", "title": "Fox", "text": "red"}\n')
        with pytest.raises(RunError, match=named):
            evaluate(world.words(tmp_path / "run", **{"subset": 12, "batch_size": 5, name: value}))
    with pytest.raises(RunError, match=r"another run.*benchmarks\.world\.questions: 12 against 10"):
        evaluate(world.words(tmp_path / "run", subset=10, batch_size=5))


def test_a_finished_run_is_shown_again_without_torch(world, tmp_path):
    words = world.words(tmp_path / "run", subset=2)
    evaluate(words)
    code = (
        "import sys; from rex_rag.commands.evaluate import evaluate; evaluate(sys.argv[1:]);"
        "sys.exit(', '.join({'torch', 'sklearn', 'bm25s', 'datasets'} & set(sys.modules)) or 0)"
    )
    shown = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "holds this run, finished" in shown.stdout


def test_an_unfinished_run_with_other_arguments_is_refused_without_a_model(world, tmp_path, monkeypatch):
    evaluate([*world.words(tmp_path / "run", subset=12, batch_size=5), "--shard", "1/2"])
    with monkeypatch.context() as patch:
        patch.setattr(models, "open_model", lambda options: pytest.fail("a model is loaded"))
        with pytest.raises(RunError, match=r"max_turns: 2 against 1"):
            evaluate(world.words(tmp_path / "run", subset=12, batch_size=5, max_turns=1))
    evaluate(world.words(tmp_path / "run", subset=12, batch_size=5))
    assert (tmp_path / "run" / "results.json").exists()


def test_a_finished_run_does_not_need_its_server_again(world, tmp_path, capsys):
    arguments = RetrieverArguments(corpus=[str(world.corpus)])
    server = Running(
        lambda: load_retriever(arguments), identify=lambda loaded: retriever_identity(arguments, loaded)
    ).ready()
    words = world.words(tmp_path / "run", subset=2)
    place = words.index("--corpus")
    words[place : place + 2] = ["--retriever", server.url]
    try:
        evaluate(words)
    finally:
        server.stop()
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["retriever"]["fingerprint"] == retriever_identity(arguments)["fingerprint"]
    assert server.url not in json.dumps(card)
    evaluate(words)
    assert "holds this run, finished" in capsys.readouterr().out
    # The same corpus searched in this process finds the same.
    evaluate(world.words(tmp_path / "run", subset=2))


def test_a_set_smaller_than_the_subset_is_said_in_one_line(world, tmp_path, capsys):
    evaluate(world.words(tmp_path / "run", subset=100, method="direct"))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("subset")]
    assert line == "subset=100: all 40 questions of world, which has no more"


def test_a_finished_run_is_judged_when_a_judge_is_named(world, tmp_path, capsys):
    evaluate(world.words(tmp_path / "run", subset=6))
    assert " judged " not in capsys.readouterr().out
    judge = JudgeServer()
    try:
        evaluate(world.words(tmp_path / "run", subset=6, judge_endpoint=judge.server.url, judge_model="j"))
    finally:
        judge.server.stop()
    printed = capsys.readouterr().out
    assert "holds this run, finished" in printed and re.search(r"F1 +judged +searches", printed)
    assert "judge" in json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]["world"]["metrics"]


def test_a_judge_is_named_by_endpoint_and_model():
    with pytest.raises(ValueError, match=r"judge_endpoint='http://h' and judge_model=None belong together"):
        EvaluationArguments(**ENOUGH, judge_endpoint="http://h")
    with pytest.raises(ValueError, match="not a plain http"):
        EvaluationArguments(**ENOUGH, judge_endpoint="ftp://h", judge_model="j")
    assert EvaluationArguments(**ENOUGH).judge_options() is None
    options = EvaluationArguments(**ENOUGH, judge_endpoint="http://h", judge_model="j", endpoint_concurrency=3)
    assert (options.judge_options().model, options.judge_options().concurrency) == ("j", 3)


def test_shards_from_the_command_line_merge_with_the_last(world, tmp_path, capsys):
    words = world.words(tmp_path / "run", subset=12, batch_size=5)
    evaluate([*words, "--shard", "1/2"])
    printed = capsys.readouterr().out
    assert printed.startswith("part 1/2 of: REX-RAG with ") and ": 12 questions of 1 benchmark\n" in printed
    assert "part 1/2 is done; others are not" in printed
    assert not (tmp_path / "run" / "results.json").exists()
    evaluate([*words, "--shard", "0/2"])
    assert "results: " in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").exists()


def test_several_samples_bring_their_columns(world, tmp_path, capsys):
    evaluate(world.words(tmp_path / "run", subset=12, samples=3, temperature=1.0))
    *_, head, row, _ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"benchmark +n +EM/accuracy +95 % +pass@3 +majority +F1 +searches .*", head)
    scored = json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]["world"]
    figures = [f"{100 * scored[name]['mean']:.1f}" for name in ("majority",)]
    figures.insert(0, f"{100 * scored['pass_at_k']['3']['mean']:.1f}")
    assert row.split()[6:8] == figures


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_says_how_it_goes_on(world, tmp_path, number, code):
    # Far more than can be done before it is stopped.
    words = world.words(tmp_path / "run", temperature=1.0, samples=50, batch_size=1)
    # A shell starts what runs in the background with the interrupt ignored, which Python leaves so and hands on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rex_rag.evaluate", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    chunks = tmp_path / "run" / "world" / "chunks"
    deadline = time.monotonic() + 120
    while not list(chunks.glob("[0-9]*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.splitlines()[-1] == "stopped; the same command goes on where it stood"
    assert "Traceback" not in said
    for chunk in chunks.glob("[0-9]*.jsonl"):
        [row] = map(json.loads, chunk.read_text().splitlines())
        assert len(row["samples"]) == 50
    assert not (tmp_path / "run" / "world" / "predictions.jsonl").exists()


def test_signals_are_handled_as_before_once_it_has_ended(world, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    evaluate(world.words(tmp_path / "run", subset=2))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_method_without_search_needs_no_retriever(world, tmp_path):
    words = world.words(tmp_path / "run", method="direct", subset=4)
    place = words.index("--corpus")
    evaluate([*words[:place], *words[place + 2 :]])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["retriever"] is None
    words = world.words(tmp_path / "other", method="search_r1", subset=4)
    place = words.index("--corpus")
    with pytest.raises(ValueError, match="the method search_r1 searches, but no retriever is named"):
        evaluate([*words[:place], *words[place + 2 :]])
    assert not (tmp_path / "other").exists()


def test_budgets_beyond_the_model_are_refused_before_its_weights_are_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "open_model", lambda options: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match="max_sequence_length=4096 is more than the 2048 tokens"):
        evaluate(world.words(tmp_path / "run", max_sequence_length=4096))
    assert not Path(tmp_path / "run").exists()


def test_a_retriever_that_is_away_is_found_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "open_model", lambda options: pytest.fail("a model is loaded"))
    words = world.words(tmp_path / "run", retriever_max_attempts=1)
    place = words.index("--corpus")
    with socket.socket() as held:  # bound, so that nobody else listens there, but not listening
        held.bind(("127.0.0.1", 0))
        words[place : place + 2] = ["--retriever", f"http://127.0.0.1:{held.getsockname()[1]}"]
        with pytest.raises(RetrievalError, match=r"http://127\.0\.0\.1:\d+"):
            evaluate(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("backend", "words", "first"),
    [
        ("transformers", ["--corpus", "c.jsonl"], True),
        ("vllm", ["--corpus", "c.jsonl"], True),
        # llvmlite, which bm25s loads, keeps vLLM's CPU build from starting.
        ("vllm", ["--retriever", "bm25s", "--corpus", "c.jsonl"], False),
        ("vllm", ["--retriever", "some/index"], False),
        ("vllm", ["--retriever", "http://127.0.0.1:1"], True),
        ("vllm", ["--retriever", "http://127.0.0.1:1", "--rerank_model", "m"], False),
    ],
)
def test_beside_vllm_only_a_retriever_without_an_engine_here_is_opened_first(backend, words, first):
    arguments, search, _ = parse("--model", "m", "--benchmarks", "nq", "--output", "o", "--backend", backend, *words)
    assert _may_go_first(search, arguments.model_options()) == first


def test_a_remote_retriever_and_bm25_load_no_llvmlite(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "contents": "one"}\n')
    code = (
        "import sys\n"
        "from rex_rag.retrieval.load import RetrieverArguments, load_retriever\n"
        "load_retriever(RetrieverArguments(retriever=['http://127.0.0.1:1']))\n"
        "load_retriever(RetrieverArguments(corpus=[sys.argv[1]])).search(['one'], 1)\n"
        "assert not {'llvmlite', 'bm25s', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "corpus.jsonl"], cwd=ROOT, check=True, timeout=120)


def test_a_model_that_is_not_here_is_said_before_anything_is_loaded(world, tmp_path):
    words = world.words(tmp_path / "run", model=tmp_path / "nope")
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rex_rag.evaluate", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"error: model='{tmp_path / 'nope'}': there is no such folder here ({ROOT}), and it is no")
    assert said.endswith("OWNER/NAME; correct model")
    assert "sklearn" not in ended.stderr and "bm25s" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_the_script_says_in_one_line_what_a_user_can_mend(tmp_path):
    words = ["--model", "m", "--benchmarks", "nosuch", "--method", "direct", "--output", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-m", "rex_rag.evaluate", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: there is no benchmark 'nosuch'")
    assert "Traceback" not in ended.stderr
