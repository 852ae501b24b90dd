"""The output directory of a training run: one run a folder, unless it is said to begin anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.models.files import ADAPTER_FILE, adapter_base, is_adapter
from rex_rag.support.durable import locked
from rex_rag.support.errors import UserError
from rex_rag.support.run_log import LOG_FILE
from rex_rag.training.checkpoints import ABANDONED, TRAINER_STATE_FILE, checkpoints, completion_tables, remove

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a run leaves in its folder beside checkpoints and tables. Settings, tokenizer and card are written anew.
_FILES = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", ADAPTER_FILE, TRAINER_STATE_FILE, "training_args.bin"),
    LOG_FILE,
)
LOCK_FILE = ".train.lock"


class FolderError(UserError):
    """A run would mix with another one; the message names the folder and the way out."""


def left_by_runs(output: Path) -> list[Path]:
    """What earlier runs left in a folder: checkpoints, completion tables, weights, the trainer's state and arguments.

    The same of what resumed runs put aside. It is also what `overwrite_output_dir` removes, and nothing else.
    """
    found = [*checkpoints(output), *(path for _, path in completion_tables(output))]
    found += [path for pattern in _FILES for path in sorted(output.glob(pattern))]
    return [*found, *(left_by_runs(output / ABANDONED) if (output / ABANDONED).is_dir() else [])]


def check_folder(output_dir: str, *, overwrite: bool, checkpoint: str | None, model: str) -> None:
    """Refuse to mix two runs in a folder, and to remove what this run needs.

    Args:
        overwrite: whether what earlier runs left there may be removed.
        checkpoint: what the run goes on from; its own folder may be used.
        model: folder or Hub name of what is trained.

    Raises:
        FolderError: naming what stands in the way.
    """
    output = Path(output_dir)
    if overwrite:
        base = adapter_base(Path(model))[0] if is_adapter(model) else None
        needs = (("resume_from_checkpoint", checkpoint), ("model_name_or_path", model), ("the adapter", base))
        for setting, needed in needs:
            if needed and Path(needed).is_dir() and Path(needed).resolve().is_relative_to(output.resolve()):
                raise FolderError(
                    f"overwrite_output_dir would remove {needed}, from which {setting} starts; leave out one of them, "
                    "or name another output_dir"
                )
        return
    if checkpoint is not None and Path(checkpoint).resolve().parent == output.resolve():
        return
    if left := left_by_runs(output):
        raise FolderError(
            f"{output} holds a run already ({left[0].relative_to(output)}{' and more' if left[1:] else ''}); name "
            "another output_dir, go on with --resume_from_checkpoint true, or remove it with --overwrite_output_dir"
        )


def clear_folder(output_dir: str, accelerator: Accelerator) -> None:
    """Remove what earlier runs left; every process calls it, once all have checked the folder."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in left_by_runs(Path(output_dir)):
            remove(path)
    accelerator.wait_for_everyone()


@contextmanager
def held(output_dir: str, *, here: bool) -> Iterator[None]:
    """Hold the folder for this run as long as the block runs; the kernel lets go of it when the process dies.

    Args:
        here: whether this process holds it; one process of a run does.

    Raises:
        FolderError: where another run holds it.
    """
    output = Path(output_dir)
    if not here:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    lock = output / LOCK_FILE
    with locked(lock) as ours:
        if not ours:
            raise FolderError(
                f"another run is training into {output} now ({LOCK_FILE} is locked); name another output_dir, or wait "
                "for it to end"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
