"""Checkpoints of a training run: which are whole, which one a run goes on from, and what it then puts aside."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from safetensors import SafetensorError

from rex_rag.models.files import broken, damaged_weights
from rex_rag.support.durable import sync_folder
from rex_rag.support.errors import RunEnded, UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = get_logger(__name__)

STATE_FILE = "rex_rag_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
ABANDONED = "abandoned"
SAVING = ".saving"  # where a checkpoint is written before it takes its place
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_LEAST_FREE = 2**20  # bytes; with less a write has failed for want of room
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TABLE = re.compile(r"completions_(\d+)\.parquet")


class CheckpointError(UserError):
    """Training cannot go on from a checkpoint; the message names folder, file and reason."""


class NotSaved(RunEnded):
    """A checkpoint could not be written; the message names it, the cause and the last whole one."""


@contextmanager
def disk_errors_explained(checkpoint: Path) -> Iterator[None]:
    """Errors of writing a checkpoint that come of a full disk, or of one that is gone, become one line.

    Raises:
        NotSaved: for these; others stay what they are.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's and safetensors' own errors carry no number
        full = "No space left" in str(error) or shutil.disk_usage(checkpoint.parent).free < _LEAST_FREE
        if not full and getattr(error, "errno", None) not in _DISK_ERRORS:
            raise
        shutil.rmtree(checkpoint.parent / SAVING, ignore_errors=True)
        whole = newest_whole(checkpoint.parent)
        cause = "no space left on the disk" if full else error
        raise NotSaved(
            f"{checkpoint} could not be written ({cause}); make room, then go on with --resume_from_checkpoint true: "
            + (f"the last whole checkpoint is {whole}" if whole else "there is no whole checkpoint yet")
        ) from error


def put_in_place(written: Path, place: Path) -> None:
    """Let a checkpoint that is written whole take its name, in the stead of one of the same step."""
    if place.exists():
        remove(place)
    os.replace(written, place)
    sync_folder(place.parent)
    written.parent.rmdir()


def find_checkpoint(asked: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for; `None` for none.

    Args:
        asked: a folder, or `True` (or "true") for the newest whole checkpoint in the output directory; damaged ones
            that are newer are named in a warning.

    Raises:
        CheckpointError: for a folder that is not there or not whole, and where no checkpoint is whole.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    output = Path(output_dir)
    if str(asked).lower() != "true":
        named = Path(str(asked))
        if not named.is_dir():
            raise CheckpointError(
                f"resume_from_checkpoint={asked} is no directory here ({Path.cwd()}); name a checkpoint-N"
            )
        if reason := damage(named):
            raise CheckpointError(f"{named} is not a whole checkpoint: {reason}; {_way_out(named.parent)}")
        return str(asked)
    found = checkpoints(output)
    if not found:
        raise CheckpointError(
            f"resume_from_checkpoint is true, but {output} holds no checkpoint; leave it out to begin anew"
        )
    for checkpoint in reversed(found):
        if (reason := damage(checkpoint)) is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not whole and left out: {reason}")
    raise CheckpointError(
        f"no checkpoint in {output} is whole, the newest, {found[-1].name}, since {damage(found[-1])}; begin anew "
        "with overwrite_output_dir, or start from one's weights (model_name_or_path)"
    )


def newest_whole(folder: str | Path, before: int | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, and written before a step where that is given."""
    found = (one for one in reversed(checkpoints(Path(folder))) if before is None or step_of(one) < before)
    return next((one for one in found if damage(one) is None), None)


def _way_out(folder: Path) -> str:
    whole = newest_whole(folder)
    if whole is None:
        return f"{folder} holds no whole one: begin anew, or start from its weights (model_name_or_path)"
    return f"the last whole one is {whole}"


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by step."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()), key=step_of
    )


def step_of(checkpoint: Path) -> int:
    """The step that a folder `checkpoint-N` was written at."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _done_steps(checkpoint: Path) -> int | None:
    """Of a checkpoint, or a finished run."""
    state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    steps = state.get("global_step") if isinstance(state, dict) else None
    return steps if isinstance(steps, int) else None


def finished_at(checkpoint: str, max_steps: int, epochs: float) -> int | None:
    """The step of a checkpoint from which nothing is left to train; `None` where there is.

    Args:
        max_steps: of the run that goes on, not positive where `epochs` count.
    """
    state = json.loads((Path(checkpoint) / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    done = state["global_step"] >= max_steps if max_steps > 0 else (state.get("epoch") or 0.0) >= epochs
    return state["global_step"] if done else None


def damage(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint as if it had not stopped; `None` where it can.

    Files are opened and not read through; see `model_files.broken`.
    """
    return next(_damages(checkpoint), None)


def _damages(checkpoint: Path) -> Iterator[str]:
    if not any(checkpoint.iterdir()):
        yield "it is empty"
    state = checkpoint / TRAINER_STATE_FILE
    if reason := broken(state):
        yield f"{TRAINER_STATE_FILE} {reason}"
    elif _done_steps(checkpoint) is None:
        yield f"{TRAINER_STATE_FILE} does not say at which step it was written"
    if (checkpoint / "latest").is_file():
        yield from _deepspeed_damages(checkpoint)
    else:
        yield from _plain_damages(checkpoint)
    states = random_states(checkpoint)
    if not states:
        yield "rng_state.pth is missing, without which draws are others"
    for path in [*states, *checkpoint.glob("scaler.pt")]:
        if reason := broken(path):
            yield f"{path.name} {reason}"
    if reason := broken(checkpoint / STATE_FILE):
        yield f"{STATE_FILE} {reason}; only checkpoints of this trainer hold it"


def _plain_damages(checkpoint: Path) -> Iterator[str]:
    """Of weights, optimizer and schedule, as transformers and FSDP write them."""
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if not sharded and (reason := damaged_weights(checkpoint)):
        yield reason.replace(f"{checkpoint}/", "")
    optimizers = sorted(checkpoint.glob("optimizer*"))  # a file, or with FSDP a file or a folder
    if not optimizers:
        yield "optimizer.pt is missing: it was saved with save_only_model, or not to its end"
    for path in [*optimizers, *checkpoint.glob("pytorch_model_fsdp*"), checkpoint / "scheduler.pt"]:
        if path.is_dir():
            reason = None if any(path.iterdir()) else "is empty"
        else:
            reason = broken(path)
        if reason:
            yield f"{path.name} {reason}"


def _deepspeed_damages(checkpoint: Path) -> Iterator[str]:
    """DeepSpeed keeps weights and optimizer in a folder that the file `latest` names, a part a process."""
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        yield f"{folder.name}, which `latest` names, is missing"
        return
    parts = sorted(folder.glob("*_optim_states.pt"))
    if not parts or not any(folder.glob("*_model_states.pt")):
        yield f"{folder.name} lacks states of {'the model' if parts else 'the optimizer'}"
    elif 1 < len(parts) < len(random_states(checkpoint)):
        yield f"{folder.name} holds the optimizer's part of {len(parts)} of {len(random_states(checkpoint))} processes"
    for path in sorted(folder.glob("*.pt")):
        if reason := broken(path):
            yield f"{folder.name}/{path.name} {reason}"


def random_states(checkpoint: Path) -> list[Path]:
    """The states of random generators, one for each process that wrote them."""
    return sorted(checkpoint.glob("rng_state*.pth"))


def other_processes(checkpoint: str, processes: int) -> int | None:
    """How many processes wrote a checkpoint, where that is not as many as now."""
    written = len(random_states(Path(checkpoint)))
    return written if written != processes else None


def refuse_other_engine(checkpoint: str, args: TrainingArguments) -> None:
    """Raise for a checkpoint whose optimizer only the engine that wrote it can read.

    Without DeepSpeed its part of a checkpoint would be passed over, and the optimizer begin anew without a word.

    Args:
        args: of the run that goes on.

    Raises:
        CheckpointError: for DeepSpeed against none, ZeRO-3 against an earlier stage, or another number of processes.
    """
    folder, plugin = Path(checkpoint), args.deepspeed_plugin
    written_by = now = "no DeepSpeed"
    if plugin is not None:
        now = _zero(plugin.zero_stage == 3, args.world_size)
    if (folder / "latest").is_file():
        parts = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        written_by = _zero(any(parts.glob("zero_pp_rank_*_model_states.pt")), len(random_states(folder)))
    if written_by != now:
        raise CheckpointError(
            f"{checkpoint} was written by {written_by} and would be resumed by {now}, which cannot read its "
            "optimizer; resume it as it was launched, or start a new run from its weights (model_name_or_path)"
        )


def _zero(shards_weights: bool, processes: int) -> str:
    return f"DeepSpeed ZeRO-{'3' if shards_weights else '1 or 2'} in {processes} process(es)"


def set_aside_later(output_dir: str, checkpoint: str) -> list[Path]:
    """Move what a resumed run leaves behind into `abandoned` of the output directory, and say so.

    These are checkpoints, completion tables and the log of later steps than the checkpoint's: the run writes its own,
    and pictures, the next resume and `save_total_limit` would take the old ones for them. They keep their places in
    it, where a later abandoned file replaces an earlier one.
    """
    output = Path(output_dir)
    step = _done_steps(Path(checkpoint))
    assert step is not None  # else it is damaged, and refused
    later = [path for path in checkpoints(output) if step_of(path) > step]
    later += [path for number, path in completion_tables(output) if number > step]
    finished = output / TRAINER_STATE_FILE  # of a run that came to its end
    if broken(finished) is None and (_done_steps(output) or 0) > step:
        later.append(finished)
    aside = output / ABANDONED
    for path in later:
        place = aside / path.relative_to(output)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            remove(place)
        path.replace(place)
    if later:
        names = ", ".join(path.name for path in later[:4]) + (", …" if len(later) > 4 else "")
        logger.warning(f"{names}: of steps after {step}, from which training goes on, and put into {aside}")
    return later


def completion_tables(output: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's completion tables, by step."""
    found = ((_TABLE.fullmatch(path.name), path) for path in (output / "completions").glob("*.parquet"))
    return sorted((int(match[1]), path) for match, path in found if match)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
