"""The `rex-rag` command: quick help, real work, and errors of one line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rex_rag
from rex_rag.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("check", "search", "hopworld", "view", "prompts")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": "1", "contents": '"Lisbon"\nLisbon is the capital of Portugal.'},
        {"id": "2", "title": "Oslo", "text": "Oslo is the capital\x1b[31m of Norway."},
        {"id": "3", "contents": '"Rhine"\nThe Rhine is a river.'},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a command that must fail, and return its message."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_quick_and_imports_no_torch(arguments: list[str]):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))\n"
        "from rex_rag.cli import main\n"
        f"main({arguments!r})\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: rex-rag")
    assert done.stdout.rstrip().endswith("False False")
    assert seconds < 2, "help must feel instant"


def test_help_lists_every_command(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text


def test_version(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"rex-rag {rex_rag.__version__}\n"


def test_search_shows_the_best_passages_first(corpus: Path, capsys: pytest.CaptureFixture):
    assert main(["search", "--corpus", str(corpus), "--top-k", "2", "capital of Norway"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("BM25 over 3 passages")
    assert lines[1].startswith("1. Oslo")
    assert lines[3].startswith("2. Lisbon")
    assert len(lines) == 5


def test_search_keeps_control_sequences_of_passages_off_the_terminal(corpus: Path, capsys: pytest.CaptureFixture):
    main(["search", "--corpus", str(corpus), "--top-k", "1", "Norway"])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "Oslo is the capital [31m of Norway." in text


def test_search_reads_several_corpora(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    more = tmp_path / "more.jsonl"
    more.write_text('{"id": "9", "contents": "\\"Kigali\\"\\nKigali is the capital of Rwanda."}\n', encoding="utf-8")
    assert main(["search", "--corpus", str(corpus), "--corpus", str(more), "--top-k", "1", "Rwanda"]) == 0
    assert "1. Kigali" in capsys.readouterr().out


def test_search_of_a_missing_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    message = failure(capsys, "search", "--corpus", str(tmp_path / "absent.jsonl"), "anything")
    assert message.startswith("rex-rag search: ")
    assert "absent.jsonl" in message
    assert message.count("\n") == 1


def test_search_for_nothing_is_refused(corpus: Path, capsys: pytest.CaptureFixture):
    assert "the query is empty" in failure(capsys, "search", "--corpus", str(corpus), "  ")


@pytest.mark.parametrize("arguments", [["search", "anything"], ["bench-retrieval", "--queries", "1"]])
def test_a_server_that_is_away_is_one_line_without_options_that_the_command_does_not_have(
    arguments: list[str], capsys: pytest.CaptureFixture
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        message = failure(capsys, *arguments, "--url", url)
    assert f"{url}/retrieve failed after 1 attempt: connection failed" in message
    assert message.endswith(". Is the server running and reachable from here?\n")
    assert message.count("\n") == 1


def test_search_wants_a_corpus_or_a_server_but_not_both(corpus: Path, capsys: pytest.CaptureFixture):
    for arguments in (["search", "x"], ["search", "--corpus", str(corpus), "--url", "http://127.0.0.1:1", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "--corpus" in capsys.readouterr().err


SMALL_WORLD = ["--people", "20", "--cities", "5", "--organisations", "4", "--countries", "3"]
SMALL_QUESTIONS = ["--train-questions", "10", "20", "5", "--test-questions", "3", "4", "2"]


def test_hopworld_writes_the_same_world_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        arguments = ["hopworld", "--output", str(tmp_path / name), "--seed", seed, *SMALL_WORLD, *SMALL_QUESTIONS]
        assert main(arguments) == 0
    # 20 people + 5 cities + 4 organisations + 3 countries, one passage each.
    assert "world 7 with 32 passages, 35 train and 9 test questions" in capsys.readouterr().out
    for file, lines in (("corpus.jsonl", 32), ("train.jsonl", 35), ("test.jsonl", 9)):
        a, b, c = ((tmp_path / name / file).read_text(encoding="utf-8") for name in "abc")
        assert len(a.splitlines()) == lines
        assert a == b != c


def test_hopworld_replaces_a_world_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["hopworld", "--output", str(tmp_path), *SMALL_WORLD, *SMALL_QUESTIONS, "--seed"]
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*arguments, "1"]) == 0
    world = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "corpus.jsonl").unlink()
    capsys.readouterr()
    assert "holds train.jsonl, test.jsonl, test_1_hop.jsonl" in failure(capsys, *arguments, "2")
    assert (tmp_path / "train.jsonl").read_text() == world and not (tmp_path / "corpus.jsonl").exists()
    assert main([*arguments, "2", "--overwrite_output_dir"]) == 0
    assert (tmp_path / "train.jsonl").read_text() != world and (tmp_path / "notes.txt").read_text() == "mine"


def test_hopworld_refuses_a_world_that_its_names_cannot_fill(tmp_path: Path, capsys: pytest.CaptureFixture):
    message = failure(capsys, "hopworld", "--output", str(tmp_path / "world"), "--cities", "1000")
    assert "cities=1000" in message
    assert not (tmp_path / "world").exists()


def test_prompts_prints_the_pool_one_a_line(capsys: pytest.CaptureFixture):
    assert main(["prompts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert all(line.startswith("<think>") for line in lines)


def test_check_works_the_batch_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["check", "recipes/Qwen2.5-3B/rex_rag.yaml", "--processes", "8"]) == 1  # no server listens here
    text = capsys.readouterr().out
    assert "recipes/Qwen2.5-3B/rex_rag.yaml is valid" in text
    assert "RUC-NLPIR/FlashRAG_datasets nq train; RUC-NLPIR/FlashRAG_datasets hotpotqa train" in text
    assert "5 originals + 5 probe slots a question" in text
    assert "paper, equation 7" in text
    assert "512 questions x 10 rows = 5,120 rows over 8 processes" in text
    assert "10 updates a generation, each of 256 to 287 trajectories (reference: 256), that is 51.2 questions," in text
    assert "at most 307 probes kept of 2,560 originals a generation" in text  # floor(0.12 x 2560 = 307.2)
    assert "10,050 updates = 1,005 generations" in text


def test_check_says_that_probes_are_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    main(["check", "recipes/quickstart/grpo.yaml"])
    text = capsys.readouterr().out
    assert "off: Search-R1's GRPO" in text
    assert "16 questions x 5 rows = 80 rows over 1 process" in text
    assert "correction" not in text


def test_check_says_when_a_batch_is_too_small_to_keep_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "300")
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "retriever: http://127.0.0.1:9\noutput_dir: out\nbf16: false\n"
        "model_name_or_path: nobody/nothing\ndatasets: [questions]\n"
        "eval_strategy: epoch\neval_benchmarks: nq\neval_subset: 1\n",
        encoding="utf-8",
    )
    assert main(["check", str(recipe)]) == 1
    # One question of five originals: floor(0.12 x 5) = 0.
    text = capsys.readouterr().out
    assert "at most 0 probes kept of 5 originals a generation: NONE" in text
    assert "1 question x 10 rows = 10 rows over 1 process\n" in text
    assert "nq, 1 question of each; every epoch, 1 rollout a question\n" in text


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("keep_ratio:", "keep_ration:", "'keep_ration' (did you mean keep_ratio?)"),
        ("num_probe_slots: 5", "num_probe_slots: 10", "leaves no original"),
        ("retriever: bm25", "retriever: bm52", "bm52"),
        ("seed: 42", "seed: [", "recipe.yaml"),
    ],
)
def test_check_names_what_is_wrong(
    old: str,
    new: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes/quickstart/rex_rag.yaml").read_text(encoding="utf-8")
    assert old in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    message = failure(capsys, "check", str(recipe))
    assert message.startswith("rex-rag check: ")
    assert named in message


def test_check_says_what_this_machine_lacks_and_shows_the_reranker(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    recipe = tmp_path / "recipe.yaml"

    def said(retriever: str, more: str = "") -> str:
        recipe.write_text(
            f"retriever: {retriever}\noutput_dir: out\nbf16: false\n{more}model_name_or_path: ./none\n"
            "datasets: [no.jsonl, one.jsonl]\n",
            encoding="utf-8",
        )
        assert main(["check", str(recipe)]) == 1
        return capsys.readouterr().out

    (tmp_path / "one.jsonl").write_text('{"question": "q", "answer": "a"}\n')

    absent = said("indexes/mine", "rerank_model: BAAI/bge-reranker-base\nrerank_candidates: 20\n")
    assert "recipe.yaml is valid, but this machine lacks what it needs\n" in absent
    assert "lacking       indexes/mine: no such directory; build one with `rex-rag index`" in absent
    assert "lacking       model_name_or_path is './none', and there is no such folder here" in absent
    assert "lacking       no.jsonl: no such file" in absent
    assert "one.jsonl: there is no column 'golden_answers'" in absent and "has no GPU" in absent
    assert "re-ranking    the first 20 passages by BAAI/bge-reranker-base\n" in absent
    (tmp_path / "empty").mkdir()
    assert "lacking       empty: it has no manifest.json, so it is not a finished index" in said("./empty")
    assert main(["index", "--corpus", str(corpus), "--output", "index"]) == 0
    capsys.readouterr()
    whole = said("./index")
    assert "  retriever     ./index, top 3\n" in whole
    assert "manifest" not in whole and "re-ranking" not in whole


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "recipes/retrieval/wiki18_e5.yaml",
            "has the parts `index:` and `serve:`, for `rex-rag index --config recipes/retrieval/wiki18_e5.yaml` and "
            "`rex-rag serve --config recipes/retrieval/wiki18_e5.yaml`; `--dry-run` behind the first says",
        ),
        (
            "recipes/evaluation/quickstart.yaml",
            "has the part `evaluate:`, for `rex-rag evaluate --config recipes/evaluation/quickstart.yaml`\n",
        ),
    ],
)
def test_check_of_another_commands_recipe_names_that_command(
    recipe: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    said = failure(capsys, "check", recipe)
    assert said.startswith(f"rex-rag check: {recipe} is no training recipe: it ")
    assert message in said


def test_check_takes_overrides_as_training_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    recipe = "recipes/quickstart/rex_rag.yaml"
    evaluation = ["--eval_benchmarks", "bamboogle", "--eval_strategy", "steps", "--eval_steps", "5"]
    main(["check", recipe, "--max_steps", "2", *evaluation, "--processes", "1"])
    printed = capsys.readouterr().out
    assert "  training      2 updates = 2 generations" in printed
    assert "  evaluation    bamboogle; every 5 steps" in printed
    assert "'max_stps' (did you mean max_steps?)" in failure(capsys, "check", recipe, "--max_stps", "2")
    assert "eval_strategy is 'no'" in failure(capsys, "check", recipe, *evaluation[:2])


def test_check_of_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "there is no recipe at" in failure(capsys, "check", str(tmp_path / "none.yaml"))


def test_check_of_a_wrong_type_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes/quickstart/rex_rag.yaml").read_text(encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("num_generations: 10", "num_generations: ten"), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["check", str(recipe)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "num_generations" in message
    assert len(message.splitlines()) <= 2


def segments_of(*texts: str) -> str:
    kinds = ("POLICY", "INFORMATION", "POLICY", "PROBE", "POLICY")
    return json.dumps([{"kind": kind, "text": text} for kind, text in zip(kinds, texts, strict=False)])


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Two steps of one question each, two originals and a right probe: both originals wrong, then one right."""
    import pyarrow
    import pyarrow.parquet

    original = segments_of("<search> isle </search>", "<information>Doc 1(Title: Isle) <b>sea</b></information>", "no")
    probe = segments_of(
        "<search> isle </search>", "<information>Doc 1(Title: Isle)</information>", "so", "<think> Hm", ""
    )
    for step, question, rights in ((1, "Which isle?", (0.0, 0.0, 1.0)), (2, "Whose isle?", (1.0, 0.0, 1.0))):
        table = pyarrow.table(
            {
                "step": [step] * 3,
                "question": [question] * 3,
                "golden_answers": [["Man", "Isle of Man"]] * 3,
                "exact_match_reward": list(rights),
                "predicted_answer": ["Wight", None, "Man"],
                "is_probe": [False, False, True],
                "segments": [original, original, probe],
                "rollout": ["0.0", "0.1", "0.2"],
                "parent": [None, None, "0.0"],
                "cut": [None, None, 3],
                "tool_uses": ["[]"] * 3,
            }
        )
        folder = tmp_path / "run" / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / f"completions_{step:05d}.parquet")
    return tmp_path / "run"


def test_view_shows_every_trajectory_of_a_run(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    page = tmp_path / "page.html"
    assert main(["view", str(run_directory), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: 6 of 6 trajectories, 2 of them probes\n"
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 6
    assert text.count('<div class="segment probe">') == 2
    assert "<b>" not in text and "&lt;b&gt;sea&lt;/b&gt;" in text
    assert "Man | Isle of Man" in text
    # A right probe rescues only where every original of its question was wrong: in step 1, not in step 2.
    assert text.count("a rescue") == 1
    assert text.index("a rescue") < text.index("Whose isle?")


def test_view_takes_one_table_a_step_and_a_limit(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    page = tmp_path / "page.html"
    table = run_directory / "completions" / "completions_00001.parquet"
    for source, options, counts in (
        (table, (), "3 of 3 trajectories, 1 of them probes"),
        (table.parent, ("--limit", "4"), "4 of 6 trajectories, 1 of them probes"),
        (run_directory, ("--step", "2", "--limit", "2"), "2 of 3 trajectories, 0 of them probes"),
    ):
        assert main(["view", str(source), "--output", str(page), *options]) == 0
        assert counts in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "Whose isle?" in text and "Which isle?" not in text


def test_view_says_what_it_cannot_show(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    import pyarrow
    import pyarrow.parquet

    def message(source: Path, *options: str) -> str:
        return failure(capsys, "view", str(source), "--output", str(tmp_path / "page.html"), *options)

    assert "log_completions: true" in message(tmp_path / "nowhere")
    assert "no completions of step 9; it has those of steps 1 to 2" in message(run_directory, "--step", "9")
    text = tmp_path / "text.parquet"
    text.write_text("not a table", encoding="utf-8")
    assert "is not a parquet file" in message(text)
    foreign = tmp_path / "foreign.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"step": [1], "question": ["q"]}), foreign)
    assert "has no column golden_answers, predicted_answer" in message(foreign)
    assert not (tmp_path / "page.html").exists()
