"""The line that training writes for every log."""

from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from rex_rag.training.progress_line import ProgressLine


@pytest.fixture
def written(monkeypatch):
    lines = []
    monkeypatch.setattr(tqdm, "write", lines.append)
    return lines


def log(logs, main_process=True, probe_slots=5):
    line = ProgressLine()
    state = SimpleNamespace(is_world_process_zero=main_process, global_step=0, max_steps=8, logging_steps=4)
    args = SimpleNamespace(generation_batch_size=20, num_generations=10, output_dir="out", num_probe_slots=probe_slots)
    line.on_train_begin(args, state, None)
    state.global_step = 4
    line.on_log(args, state, None, logs=logs)


def test_headline_metrics_rate_and_time_left(written):
    log({"em/originals": 0.4375, "dead_end/rescue_rate": float("nan"), "kl": 0.125, "loss": 9.0})
    begin, line = written
    assert begin == "training: 8 steps, 2 questions a generation; a line every 4 steps, all figures in out/log.jsonl"
    assert line.startswith("step 4/8  EM 0.44  KL 0.12  ") and line.endswith(" s/step  0:00:00 left")


def test_a_run_without_probes_shows_no_figures_of_them(written):
    log({"em/originals": 0.5, "probes/kept": 0.0, "dead_end/rate": 0.25}, probe_slots=0)
    assert "EM 0.50  dead ends 0.25  " in written[-1] and "kept" not in written[-1]


def test_the_first_step_says_how_long_it_took_where_the_first_line_is_far(written):
    args = SimpleNamespace(generation_batch_size=20, num_generations=10, output_dir="out")
    for logging_steps, said in ((4, 1), (1, 0)):
        written.clear()
        line = ProgressLine()
        state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=8, logging_steps=logging_steps)
        line.on_train_begin(args, state, None)
        for state.global_step in (1, 2):
            line.on_step_end(args, state, None)
        assert sum("the first step took" in text for text in written) == said


def test_every_evaluation_set_has_its_line(written):
    log({"eval_nq_em/originals": 0.5, "eval_nq_searches/mean": 1.25, "eval_nq_loss": 3.0})
    log({"eval_em/originals": 0.25})
    said = [line for line in written if line.startswith("step")]
    assert said == ["step 4/8  evaluation of nq: EM 0.50  searches 1.25", "step 4/8  evaluation: EM 0.25"]


def test_other_logs_and_other_processes_are_silent(written):
    log({"train_runtime": 3.0})
    log(None)
    assert [line.split(":")[0] for line in written] == ["training", "training"]
    written.clear()
    log({"em/originals": 0.5, "eval_em/originals": 0.25}, main_process=False)
    assert written == []
