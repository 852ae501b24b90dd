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


def log(logs, main_process=True):
    line = ProgressLine()
    state = SimpleNamespace(is_world_process_zero=main_process, global_step=4, max_steps=8)
    line.on_train_begin(None, SimpleNamespace(global_step=0), None)
    line.on_log(None, state, None, logs=logs)


def test_headline_metrics_rate_and_time_left(written):
    log({"em/originals": 0.4375, "dead_end/rescue_rate": float("nan"), "kl": 0.125, "loss": 9.0})
    [line] = written
    assert line.startswith("step 4/8  EM 0.44  KL 0.12  ") and line.endswith(" s/step  0:00:00 left")


def test_every_evaluation_set_has_its_line(written):
    log({"eval_nq_em/originals": 0.5, "eval_nq_searches/mean": 1.25, "eval_nq_loss": 3.0})
    log({"eval_em/originals": 0.25})
    assert written == ["step 4/8  evaluation of nq: EM 0.50  searches 1.25", "step 4/8  evaluation: EM 0.25"]


def test_other_logs_and_other_processes_are_silent(written):
    log({"train_runtime": 3.0})
    log(None)
    log({"em/originals": 0.5, "eval_em/originals": 0.25}, main_process=False)
    assert written == []
