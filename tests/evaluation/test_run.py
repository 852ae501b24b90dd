"""Runs with a real tiny model: the same bytes for any number of shards, after a kill, and for the same seed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rex_rag.commands.evaluate import evaluate
from rex_rag.evaluation.methods import make_method
from rex_rag.evaluation.records import Prediction
from rex_rag.evaluation.run import EvaluationRun, RunError, Shard, score_run
from rex_rag.support.durable import locked
from tests.evaluation.tiny_run import BUDGET, ROOT, TinyWorld, make_run, make_tiny_world

SAMPLED = {"temperature": 1.0, "samples": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    """A run of one process from start to end, two samples a question."""
    output = tmp_path_factory.mktemp("runs") / "reference"
    assert make_run(world, output, **SAMPLED).run(show_progress=False)
    return output


def predictions(output: Path) -> bytes:
    return (output / "world" / "predictions.jsonl").read_bytes()


def files(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


def test_a_run_holds_every_question_in_order_with_searches_and_answers(world, reference):
    assert files(reference) == {"run.json", "world/predictions.jsonl", "world/timings.jsonl"}
    rows = [Prediction.from_row(json.loads(line)) for line in predictions(reference).splitlines()]
    asked = [json.loads(line) for line in world.questions.read_text().splitlines()]
    assert [row.id for row in rows] == [row["id"] for row in asked]
    assert all(len(row.samples) == 2 for row in rows)
    samples = [sample for row in rows for sample in row.samples]
    # An untrained model: what matters is that both kinds of action happen, so that the rest of this file tests them.
    assert sum(bool(sample.searches) for sample in samples) >= 10
    assert sum(sample.answer is not None for sample in samples) >= 10
    timings = [json.loads(line) for line in (reference / "world" / "timings.jsonl").read_text().splitlines()]
    assert [(row["chunk"], row["first"], row["questions"]) for row in timings] == [(i, 4 * i, 4) for i in range(10)]
    assert all(0 < row["generation"] <= row["seconds"] for row in timings)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_that_wait_for_nobody_give_the_same_bytes(world, reference, tmp_path, count):
    for index in reversed(range(count)):
        finished = make_run(world, tmp_path / "run", **SAMPLED).run(Shard(index, count, helps=False), False)
        assert finished == (index == 0), "the last to end merges"
    assert predictions(tmp_path / "run") == predictions(reference)
    assert files(tmp_path / "run") == files(reference)


def test_processes_at_the_same_time_share_the_work_without_doing_any_twice(world, reference, tmp_path):
    runs = [make_run(world, tmp_path / "run", **SAMPLED) for _ in range(2)]
    done: dict[int, list[int]] = {0: [], 1: []}
    for index, run in enumerate(runs):
        _record_chunks(run, done[index])
    finished = {}
    # The random draws of threads in one process would mix, so only their greedy parts would be comparable: here the
    # second one works while the first is held up in its first chunk.
    held = threading.Event()
    first_predict = runs[0]._predict

    def hold_up(chunk):
        if not held.is_set():
            finished[1] = runs[1].run(Shard(1, 2, helps=False), False)
            held.set()
        return first_predict(chunk)

    runs[0]._predict = hold_up
    finished[0] = runs[0].run(Shard(0, 2), False)
    assert finished == {1: False, 0: True}
    assert sorted(done[0] + done[1]) == list(range(10))
    assert done[1] == [1, 3, 5, 7, 9]
    assert predictions(tmp_path / "run") == predictions(reference)


def test_a_process_takes_over_what_the_others_have_not_begun(world, reference, tmp_path):
    run = make_run(world, tmp_path / "run", **SAMPLED)
    order: list[int] = []
    _record_chunks(run, order)
    assert run.run(Shard(1, 4), False)
    assert order == [1, 5, 9, 0, 2, 3, 4, 6, 7, 8]
    assert predictions(tmp_path / "run") == predictions(reference)


def _record_chunks(run: EvaluationRun, into: list[int]) -> None:
    predict = run._predict

    def recorded(chunk):
        into.append(chunk.number)
        return predict(chunk)

    run._predict = recorded


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_with_the_same_bytes(world, tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"temperature": 1.0, "samples": 4, "batch_size": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "rex_rag.evaluate", *world.words(killed, **settings)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    chunks = killed / "world" / "chunks"
    deadline = time.monotonic() + 120
    while len(list(chunks.glob("[0-9]*.jsonl"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.read_bytes() for path in chunks.glob("[0-9]*.jsonl")}
    assert 3 <= len(before) < 20, "killed in the middle"
    assert not (killed / "world" / "predictions.jsonl").exists()
    for output in (killed, whole):
        evaluate(world.words(output, **settings))
    assert predictions(killed) == predictions(whole)
    assert all(content in predictions(killed) for content in before.values())
    assert (
        files(killed)
        == files(whole)
        == {
            "results.json",
            "run.json",
            "world/predictions.jsonl",
            "world/timings.jsonl",
        }
    )
    assert "EM" in capsys.readouterr().out


def test_the_seed_decides_what_is_drawn(world, reference, tmp_path):
    assert make_run(world, tmp_path / "same", **SAMPLED).run(show_progress=False)
    assert make_run(world, tmp_path / "other", seed=1, **SAMPLED).run(show_progress=False)
    assert predictions(tmp_path / "same") == predictions(reference)
    assert predictions(tmp_path / "other") != predictions(reference)
    # The samples of one question differ too.
    rows = [json.loads(line)["samples"] for line in predictions(reference).splitlines()]
    assert sum(first["segments"] != second["segments"] for first, second in rows) > 30


def test_greedy_runs_do_not_depend_on_the_seed(world, tmp_path):
    for seed in (0, 1):
        assert make_run(world, tmp_path / str(seed), seed=seed).run(show_progress=False)
    assert predictions(tmp_path / "0") == predictions(tmp_path / "1")


def test_another_run_is_refused_field_by_field_and_nothing_is_touched(world, reference, tmp_path):
    before = {name: (reference / name).read_bytes() for name in files(reference)}
    with pytest.raises(RunError, match=r"another run.*batch_size: 4 against 5") as refused:
        make_run(world, reference, chunk_size=5, **SAMPLED).run(show_progress=False)
    assert "decoding" not in str(refused.value)
    with pytest.raises(RunError, match=r"here: seed: 0 against 7"):
        make_run(world, reference, seed=7, **SAMPLED).run(show_progress=False)
    assert {name: (reference / name).read_bytes() for name in files(reference)} == before


def test_a_directory_of_something_else_is_refused(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds thesis.tex but no run.json"):
        make_run(world, tmp_path).run(show_progress=False)
    assert files(tmp_path) == {"thesis.tex"}


def test_waiting_for_a_process_that_stands_still_ends_with_its_chunks_named(world, tmp_path):
    run = make_run(world, tmp_path / "run", patience=0.5)
    chunks = tmp_path / "run" / "world" / "chunks"
    make_run(world, tmp_path / "run").run(Shard(0, 2, helps=False), False)
    with locked(chunks / "000003.lock") as ours:
        assert ours
        with pytest.raises(RunError, match=r"1 chunks \(world/3\) are held by other processes"):
            run.run(show_progress=False)
    assert run.run(show_progress=False), "the lock is gone with its holder"


def test_the_last_to_end_waits_for_a_process_that_merges(world, reference, tmp_path):
    """Otherwise two that end together may each find the other merging a set, and nobody would score."""
    make_run(world, tmp_path / "run", **SAMPLED).run(Shard(0, 2, helps=False), False)
    merging = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "run" / "world" / ".merge.lock") as ours:
            assert ours
            merging.set()
            while len(list((tmp_path / "run" / "world" / "chunks").glob("*[0-9].jsonl"))) < 10:
                time.sleep(0.01)
            time.sleep(1)

    other = threading.Thread(target=hold)
    other.start()
    merging.wait(10)
    finished = make_run(world, tmp_path / "run", **SAMPLED).run(Shard(1, 2, helps=False), False)
    other.join()
    assert finished
    assert predictions(tmp_path / "run") == predictions(reference)


def test_killed_right_after_merging_it_leaves_no_parts_behind(world, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    chunks = tmp_path / "run" / "world" / "chunks"
    chunks.mkdir()
    (chunks / "000000.jsonl").write_bytes(predictions(reference).splitlines(keepends=True)[0])
    assert make_run(world, tmp_path / "run", **SAMPLED).run(show_progress=False)
    assert files(tmp_path / "run") == files(reference)
    assert not chunks.exists()


def test_a_chunk_file_of_other_questions_is_named(world, tmp_path):
    run = make_run(world, tmp_path / "run")
    run.run(Shard(0, 2, helps=False), False)
    chunks = tmp_path / "run" / "world" / "chunks"
    (chunks / "000001.jsonl").write_bytes((chunks / "000000.jsonl").read_bytes())
    with pytest.raises(RunError, match=r"000001.jsonl answers other questions"):
        run.run(show_progress=False)
    assert not (tmp_path / "run" / "world" / "predictions.jsonl").exists()


@pytest.mark.parametrize("content", [b'{"id": "1"', b"\xff\n", b"[1]\n", b"{}\n", b""])
def test_a_broken_chunk_file_is_named(world, tmp_path, content):
    run = make_run(world, tmp_path / "run")
    run.run(Shard(0, 2, helps=False), False)
    broken = tmp_path / "run" / "world" / "chunks" / "000001.jsonl"
    broken.write_bytes(content)
    with pytest.raises(RunError) as raised:
        run.run(show_progress=False)
    assert str(broken) in str(raised.value)


def test_scores_are_written_beside_the_predictions(reference, tmp_path):
    scores = score_run(reference)
    try:
        written = json.loads((reference / "results.json").read_text())
    finally:
        (reference / "results.json").unlink()
    assert written["benchmarks"]["world"]["n"] == scores["world"].n == 40
    assert written["benchmarks"]["world"]["samples"] == 2
    assert set(written["benchmarks"]["world"]["pass_at_k"]) == {"1", "2"}
    assert written["benchmarks"]["world"]["seconds"] > 0


def test_processes_that_end_together_may_all_score(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    with ThreadPoolExecutor(8) as pool:
        scored = [pool.submit(score_run, tmp_path / "run") for _ in range(40)]
    assert all(one.result()["world"].n == 40 for one in scored)
    assert files(tmp_path / "run") == files(reference) | {"results.json"}
    json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_shards_that_do_not_exist_are_refused(text):
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


def test_a_shard_is_read_as_it_is_written():
    assert Shard.parse("1/4") == Shard(1, 4, helps=False)


@pytest.mark.parametrize("method", ["search_r1", "rag"])
def test_a_run_whose_prompts_all_leave_no_room_is_refused_before_it_begins(world, tmp_path, method):
    """It would end within seconds, with a score of 0 like any other."""
    run = replace(
        make_run(world, tmp_path / "run"),
        method=make_method(method),
        budget=replace(BUDGET, max_sequence_length=32),
    )
    with pytest.raises(RunError, match=r"shortest question takes \d+ tokens, and max_sequence_length=32 is") as raised:
        run.run(show_progress=False)
    length = int(re.search(r"takes (\d+) tokens", str(raised.value))[1])
    assert length > 32 and f"raise it (to {length + BUDGET.max_turn_tokens} at least" in str(raised.value)
    assert not (tmp_path / "run").exists(), "the same directory serves for another max_sequence_length"


def test_prompts_that_leave_no_room_are_counted_at_the_end(world, tmp_path, caplog):
    run = make_run(world, tmp_path / "run")
    toolbox = run._toolbox
    lengths = [len(toolbox.encode_chat(run.method.prompt_text(one))) for one in run.benchmarks[0].questions]
    limit = sorted(lengths)[-7]
    cut = sum(length >= limit for length in lengths)
    assert 7 <= cut < 40 and min(lengths) < limit
    budget = replace(BUDGET, max_sequence_length=limit)
    run = replace(run, budget=budget, card={**run.card, "budget": asdict(budget)})
    assert run.run(show_progress=False)
    scores = score_run(tmp_path / "run")
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"world: {cut} of 40 prompts are longer than max_sequence_length={limit}: nothing was generated" in said
    assert scores["world"].n == 40


def test_nothing_is_said_where_every_prompt_fits(reference, tmp_path, caplog):
    shutil.copytree(reference, tmp_path / "run")
    score_run(tmp_path / "run")
    assert not caplog.records
