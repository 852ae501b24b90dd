"""Trains a full policy and an adapter under one engine, each in one go and resumed from its second step.

    accelerate launch --config_file ... tests/e2e/engine_worker.py FOLDER ENGINE ROWS

FOLDER holds the recipes `full.yaml` and `lora.yaml`; ENGINE names the folders of the runs; ROWS are those of a
micro-batch of one process. What a row writes follows from its prompt alone, so that any number of processes trains on
the same trajectories.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate.state import AcceleratorState

from rex_rag.models.generation import Generation
from rex_rag.training.launch import prepare, run

POLICIES = ("full", "lora")
STEPS, SAVED_AT = 3, 2
TEXTS = (
    "<search> where is the owl </search>",
    "<answer> red </answer>",
    "<answer> oak </answer>",
    "<think> oak </think>",
)


class ByPrompt:
    """Writes what follows from a row's prompt, and from how many rows with the same prompt came before it."""

    equal_rows = False

    def __init__(self, tokenizer) -> None:
        self._texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        seen: Counter[tuple[int, ...]] = Counter()
        rows = []
        for prompt in map(tuple, prompt_ids):
            number = zlib.crc32(str((prompt, seen[prompt])).encode())
            rows.append(Generation(self._texts[number % len(TEXTS)][:max_new_tokens]))
            seen[prompt] += 1
        return rows


def train(folder: Path, policy: str, output: Path, rows: int, checkpoint: Path | None = None) -> None:
    words = ["--config", str(folder / f"{policy}.yaml"), "--output_dir", str(output)]
    words += ["--per_device_train_batch_size", str(rows), "--max_steps", str(STEPS), "--save_steps", str(SAVED_AT)]
    words += [] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
    with ExitStack() as held_folder:
        trainer, found, _ = prepare(words, held_folder)
        generator = ByPrompt(trainer.tokenizer)
        trainer.sampler.agent.driver.generator = lambda stop: generator
        run(trainer, found)
    # A second trainer of the same process may bring a DeepSpeed configuration of its own.
    AcceleratorState._reset_state()


def main() -> None:
    folder, engine, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for policy in POLICIES:
        whole = folder / f"{engine}_{policy}"
        train(folder, policy, whole, rows)
        train(folder, policy, folder / f"{engine}_{policy}_resumed", rows, whole / f"checkpoint-{SAVED_AT}")


if __name__ == "__main__":
    main()
