"""Which checkpoints are whole, which one a run goes on from, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import PartialState
from parts import PASSAGES
from safetensors.numpy import save_file
from tiny_training import save_tiny_policy, tiny_trainer

from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.checkpoints import (
    SAVING,
    CheckpointError,
    NotSaved,
    checkpoints,
    damage,
    find_checkpoint,
    other_processes,
    refuse_other_engine,
    remove,
    set_aside_later,
)
from rex_rag.training.run_folder import FolderError, check_folder, clear_folder, left_by_runs


@pytest.fixture(autouse=True)
def _process_state() -> None:
    PartialState()


def write_checkpoint(folder: Path, step: int, processes: int = 1) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": numpy.zeros((3, 3), numpy.float32)}, folder / "model.safetensors")
    names = ["rng_state"] if processes == 1 else [f"rng_state_{rank}" for rank in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *(f"{name}.pth" for name in names)):
        torch.save({"state": torch.zeros(500)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    (folder / "rex_rag_state.json").write_text(json.dumps({"keep_ratio": {"value": 0.1}}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints 2, 4 and 10."""
    for step in (2, 4, 10):
        write_checkpoint(tmp_path / "run" / f"checkpoint-{step}", step)
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "rex_rag_state.json"],
)
def test_a_checkpoint_with_a_part_missing_empty_or_cut_is_not_whole(run: Path, name: str):
    part = run / "checkpoint-10" / name
    assert damage(part.parent) is None
    content = part.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n", None):
        part.unlink() if broken is None else part.write_bytes(broken)
        assert damage(part.parent).startswith(name), broken


def test_shards_adapters_and_deepspeed_parts_are_looked_at(tmp_path: Path):
    sharded = write_checkpoint(tmp_path / "sharded", 1)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors, which model.safetensors.index.json names, is missing" in damage(sharded)
    shutil.copy(sharded / shards["a"], sharded / shards["b"])
    assert damage(sharded) is None

    adapter = write_checkpoint(tmp_path / "adapter", 1)
    (adapter / "adapter_config.json").write_text("{}")
    assert damage(adapter) == "adapter_model.safetensors is missing"  # a whole model beside it does not count

    deepspeed = write_checkpoint(tmp_path / "deepspeed", 1, processes=2)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (deepspeed / name).unlink()
    (deepspeed / "latest").write_text("global_step1")
    assert damage(deepspeed) == "global_step1, which `latest` names, is missing"
    parts = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1) for kind in ("model", "optim")]
    (deepspeed / "global_step1").mkdir()
    for part in parts:
        torch.save({"state": torch.zeros(500)}, deepspeed / "global_step1" / part)
    assert damage(deepspeed) is None
    cut(deepspeed / "global_step1" / parts[3])
    assert damage(deepspeed).startswith(f"global_step1/{parts[3]} is cut")


def test_true_takes_the_newest_whole_checkpoint_and_names_what_it_left_out(run: Path, caplog):
    assert find_checkpoint(None, run) is find_checkpoint("false", run) is find_checkpoint(False, run) is None
    assert find_checkpoint("true", run) == str(run / "checkpoint-10")  # by number, not by name
    cut(run / "checkpoint-10" / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(True, run) == str(run / "checkpoint-4")
    assert f"{run}/checkpoint-10 is not whole and left out: optimizer.pt is cut" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint-10 is not .*optimizer\.pt is cut.*last whole one is .*-4$"):
        find_checkpoint(str(run / "checkpoint-10"), run)
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        find_checkpoint(True, run)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(True, run / "nothing")


def test_a_checkpoint_of_another_number_of_processes_is_noticed(tmp_path: Path):
    written = write_checkpoint(tmp_path / "checkpoint-1", 1, processes=2)
    assert damage(written) is None
    assert (other_processes(written, 1), other_processes(written, 2)) == (2, None)


@pytest.mark.parametrize(
    ("stage", "now", "processes", "told"),
    [
        (3, 3, 2, None),
        (2, 1, 2, None),
        (None, None, 1, None),
        (3, None, 2, r"written by DeepSpeed ZeRO-3 in 2 process\(es\) and would be resumed by no DeepSpeed"),
        (None, 2, 2, r"written by no DeepSpeed and would be resumed by DeepSpeed ZeRO-1 or 2 in 2"),
        (2, 3, 2, r"written by DeepSpeed ZeRO-1 or 2 in 2 process\(es\) and would be resumed by DeepSpeed ZeRO-3"),
        (3, 3, 1, r"written by DeepSpeed ZeRO-3 in 2 process\(es\) and would be resumed by DeepSpeed ZeRO-3 in 1"),
    ],
)
def test_an_optimizer_that_the_run_could_not_read_is_refused(tmp_path: Path, stage, now, processes, told):
    written = write_checkpoint(tmp_path / "checkpoint-1", 1, processes=2)
    if stage is not None:
        (written / "latest").write_text("global_step1")
        (written / "global_step1").mkdir()
        states = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        (written / "global_step1" / states).write_text("x")
    plugin = None if now is None else SimpleNamespace(zero_stage=now)
    args = SimpleNamespace(deepspeed_plugin=plugin, world_size=processes)
    with nullcontext() if told is None else pytest.raises(CheckpointError, match=told):
        refuse_other_engine(str(written), args)


def test_later_steps_are_put_aside_and_can_be_abandoned_again(run: Path, caplog):
    tables = run / "completions"
    tables.mkdir()
    for step in (1, 4, 5, 9):
        (tables / f"completions_{step:05d}.parquet").write_text(f"first {step}")
    (tables / "mine.parquet").write_text("kept")
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": []}))
    with caplog.at_level(logging.WARNING):
        set_aside_later(run, run / "checkpoint-4")
    assert "completions_00005.parquet" in caplog.text
    assert sorted(path.name for path in tables.iterdir()) == [
        *("completions_00001.parquet", "completions_00004.parquet", "mine.parquet")
    ]
    assert sorted(path.name for path in run.iterdir()) == ["abandoned", "checkpoint-2", "checkpoint-4", "completions"]
    aside = ["completions_00005.parquet", "completions_00009.parquet"]
    assert sorted(path.name for path in (run / "abandoned" / "completions").iterdir()) == aside
    kinds = ["checkpoint-10", "completions", "trainer_state.json"]
    assert sorted(path.name for path in (run / "abandoned").iterdir()) == kinds
    write_checkpoint(run / "checkpoint-10", 10)
    (tables / "completions_00005.parquet").write_text("second 5")
    set_aside_later(run, run / "checkpoint-4")
    assert sorted(path.name for path in (run / "abandoned" / "completions").iterdir()) == aside
    assert (run / "abandoned" / "completions" / "completions_00005.parquet").read_text() == "second 5"
    (run / "abandoned" / "notes.txt").write_text("mine")
    for path in left_by_runs(run / "abandoned"):
        remove(path)
    left = [path.name for path in (run / "abandoned").rglob("*") if path.is_file()]
    assert left == ["notes.txt"] and run / "abandoned" not in left_by_runs(run)


def check(folder: Path, overwrite: bool = False, checkpoint: Path | None = None, model: str = "a/model") -> None:
    check_folder(str(folder), overwrite=overwrite, checkpoint=checkpoint and str(checkpoint), model=model)


def test_a_used_folder_is_refused_and_overwriting_removes_what_runs_leave_alone(run: Path, tmp_path: Path):
    for name in ("model.safetensors", "trainer_state.json", "notes.txt", "config.json"):
        (run / name).write_text("x")
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/base"}))
    (run / "completions").mkdir()
    (run / "completions" / "completions_00001.parquet").write_text("x")
    (run / "checkpoint-best").mkdir()
    with pytest.raises(FolderError, match=r"holds a run already \(checkpoint-2 and more\).*--overwrite_output_dir"):
        check(run)
    with pytest.raises(FolderError, match="holds a run already"):
        check(run, checkpoint=write_checkpoint(tmp_path / "other" / "checkpoint-1", 1))
    check(run, checkpoint=run / "checkpoint-4")
    check(run, overwrite=True)
    check(tmp_path / "new")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run)}))
    for needed in (
        *({"checkpoint": run / "checkpoint-4"}, {"model": str(run)}, {"model": str(run / "checkpoint-2")}),
        {"model": str(adapter)},
    ):
        with pytest.raises(FolderError, match="overwrite_output_dir would remove"):
            check(run, overwrite=True, **needed)

    from accelerate import Accelerator

    (run / "checkpoint-7").symlink_to(adapter)
    clear_folder(str(run), Accelerator(cpu=True))
    assert left_by_runs(run) == [] and list(adapter.iterdir())  # a link is removed, and not what it leads to
    kept = ["checkpoint-best", "completions", "config.json", "notes.txt"]
    assert sorted(path.name for path in run.iterdir()) == kept
    check(run)


def saving_run(folder: Path, **settings):
    shared = {"per_device_train_batch_size": 18, "max_turns": 1, "retrieval_top_k": 1, "num_probe_slots": 0}
    policy, retriever = save_tiny_policy(folder / "tiny"), BM25Retriever(PASSAGES)
    return tiny_trainer(policy, folder / "out", retriever, **shared | {"save_steps": 1} | settings)


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Each file of a checkpoint is followed by a kill: what stands under its name is whole."""
    trainer = saving_run(tmp_path, max_steps=1)

    class Killed(BaseException):
        pass

    steps = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state")
    for name in steps:
        plain = getattr(trainer, name)

        def killed(*args, plain=plain, **kwargs):
            plain(*args, **kwargs)
            assert [path.name for path in (tmp_path / "out" / SAVING).iterdir()] == ["checkpoint-1"]
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, killed)
            with pytest.raises(Killed):
                trainer.train()
        assert checkpoints(tmp_path / "out") == []
    trainer.train()
    [whole] = checkpoints(tmp_path / "out")
    assert damage(whole) is None and not (tmp_path / "out" / SAVING).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/out/optimizer.pt"),
        RuntimeError(
            "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed: No space left on device"
        ),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, error):
    trainer = saving_run(tmp_path, max_steps=2, save_total_limit=1)
    plain = trainer._save_rng_state

    def full(folder):
        if trainer.state.global_step == 2:
            raise error
        plain(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(NotSaved, match=r"checkpoint-2 could not be written.*whole checkpoint is .*checkpoint-1"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]


def test_only_so_many_checkpoints_stay_and_another_error_keeps_its_traceback(tmp_path, monkeypatch):
    trainer = saving_run(tmp_path, max_steps=3, save_total_limit=2)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
