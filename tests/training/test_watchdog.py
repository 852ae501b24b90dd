"""A step that stands still is told of, with the stage and the line, by the process that is in it."""

import re
import threading
import time

from parts import PASSAGES
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.support.stages import STAGES
from rex_rag.training.watchdog import watched


class SlowRetriever(BM25Retriever):
    slow = False

    def search(self, queries, top_k):
        if self.slow:
            time.sleep(0.7)
        return super().search(queries, top_k)


def test_stages_nest_are_left_on_errors_and_are_each_threads_own():
    def now():
        return STAGES.of(threading.get_ident())[0]

    seen = []
    with STAGES.inside("outer"):
        other = threading.Thread(target=lambda: seen.append(now()))
        other.start()
        other.join()
        try:
            with STAGES.inside("inner"):
                assert now() == ("outer", "inner")
                raise ValueError
        except ValueError:
            assert now() == ("outer",)
    assert now() == () and seen == [()]


def test_it_speaks_once_then_after_twice_the_time_and_of_the_next_stage_anew(capfd):
    with watched(0.2, 1, 4, lambda: 7):
        with STAGES.inside("first"):
            time.sleep(0.9)  # at 0.2 and 0.4, not yet at 0.8 plus the time that a look takes
        with STAGES.inside("second"):
            time.sleep(0.3)
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "stage 'first'" in line]) in (2, 3)
    assert len([line for line in said if "stage 'second'" in line]) == 1
    assert all(line.startswith("watchdog: step 7, process 1 of 4 is in stage") for line in said)


def test_a_search_that_hangs_is_named(tmp_path, capfd):
    retriever = SlowRetriever(PASSAGES)
    trainer = tiny_trainer(
        save_tiny_policy(tmp_path / "tiny"),
        tmp_path / "out",
        retriever,
        max_steps=1,
        watchdog_seconds=0.3,
        per_device_train_batch_size=18,
        save_strategy="no",
        num_probe_slots=0,
    )
    retriever.slow = True
    trainer.train()
    said = capfd.readouterr().err
    assert re.search(
        r"step 1, process 0 of 1 is in stage 'generation batch > tools' for \d s \(.*\.py:\d+ search", said
    )
