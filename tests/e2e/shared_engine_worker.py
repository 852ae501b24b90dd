"""Trains on engines that all processes share, of which stand-ins take the place, and writes down who was given what.

    accelerate launch --config_file ... tests/e2e/shared_engine_worker.py FOLDER OUTPUT MODE POLICY [MODE POLICY ...]

FOLDER holds the recipes `full.yaml` and `lora.yaml`; MODE is `server` or `tensor_parallel`. Rows of rank 0 answer in
their first turn; those of rank 1 search until they may not, which is three turns. Every completion holds a number of
its own, so that none can be taken for another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl.generation.vllm_generation as engines
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rex_rag.training.launch import prepare, run
from rex_rag.training.trainer import REXRAGTrainer

CONTEXT = 256


class Writer:
    """What both stand-ins write, for the prompts of all processes in the order of ranks."""

    tokenizer: PreTrainedTokenizerBase
    log: list[list[list[int]]]  # of every call the completions

    def write(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        assert max(map(len, prompts)) + max_tokens <= CONTEXT, "an engine refuses the whole call"
        half = len(prompts) // 2
        texts = [
            f"{len(self.log)} {row}" + ("<answer> red </answer>" if row < half else "<search> owl </search>")
            for row in range(len(prompts))
        ]
        self.log.append([ids[:max_tokens] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]])
        return self.log[-1]


class Client(Writer):
    """`trl.generation.vllm_client.VLLMClient` of trl 1.16, as far as training calls it."""

    def __init__(self, base_url: str | None = None, group_port: int = 0, connection_timeout: float = 0.0) -> None:
        self.log, self.weights, self.syncs = [], {}, 0

    def init_communicator(self, device: torch.device) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"max_model_len": CONTEXT, "logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list, named_params: Iterable[tuple[str, torch.Tensor]]) -> None:
        # As vLLM's sender, which packs a gigabyte's worth of tensors before it reads any.
        self.weights = {name: value.detach().clone() for name, value in list(named_params)}
        given = [(name, str(value.dtype)[6:], list(value.shape)) for name, value in self.weights.items()]
        assert given == metadata, "a server receives what it was told of, in that order"
        self.syncs += 1

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], max_tokens: int, n: int, features: Any = None, **_: Any) -> dict:
        assert n == 1
        ids = self.write(prompts, max_tokens)
        logprobs = [[[-1.0] for _ in row] for row in ids]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logprobs, "logprob_token_ids": None}


class Engine(Writer):
    """`vllm.LLM` over two processes, as far as TRL calls it: all have to make the same call, or it hangs."""

    def __init__(self, **settings: Any) -> None:
        assert settings["tensor_parallel_size"] == 2
        self.log, self.weights, self.syncs = [], {}, 0
        model = SimpleNamespace(load_weights=lambda pairs: self.weights.update({k: v.clone() for k, v in pairs}))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def reset_prefix_cache(self) -> None:
        self.syncs += 1

    def generate(self, prompts: list[dict], sampling_params: Any, use_tqdm: bool) -> list[SimpleNamespace]:
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        one, other = gather_object([(rows, repr(sampling_params))])
        assert one == other, "the parts of an engine were asked for different things"
        outputs = []
        for prompt, ids in zip(rows, self.write(rows, sampling_params.max_tokens), strict=True):
            logprobs = [{token: SimpleNamespace(rank=1, logprob=-1.0)} for token in ids]
            outputs.append(
                SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)])
            )
        return outputs


def frozen_weights(trainer: REXRAGTrainer) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in trainer.model.named_parameters() if not value.requires_grad}
    with trainer.vllm_generation._dist.gather_params(list(found.values())):
        return {name: value.detach().clone() for name, value in found.items()}


def train(folder: Path, output: Path, mode: str, policy: str) -> None:
    words = ["--config", str(folder / f"{policy}.yaml"), "--output_dir", str(output / f"{mode}_{policy}")]
    words += ["--use_vllm", "true", "--vllm_max_model_length", str(CONTEXT)]
    words += ["--vllm_mode", "server" if mode == "server" else "colocate"]
    words += ["--vllm_tensor_parallel_size", "1" if mode == "server" else "2"]
    with ExitStack() as held_folder:
        trainer, *_ = prepare(words, held_folder)
        rank, generation, calls = trainer.accelerator.process_index, trainer.vllm_generation, []
        generate, rollout = generation.generate, trainer.sampler.agent.rollout
        turns: list[int] = []

        def recording_generate(prompts: list[list[int]], **others: Any) -> tuple:
            result = generate(prompts=prompts, **others)
            calls.append({"sent": len(prompts), "given": result[1]})
            return result

        def recording_rollout(prompts: Sequence[Sequence[int]]) -> list:
            rows = rollout(prompts)
            turns.append(max(row.turns for row in rows))
            return rows

        generation.generate, trainer.sampler.agent.rollout = recording_generate, recording_rollout
        frozen = frozen_weights(trainer)
        run(trainer, None)
        trainer.evaluate(trainer.train_dataset.select(range(5)))
        generation.sync_weights()
        engine = getattr(generation, "llm", None) or getattr(generation, "vllm_client", None)
        if engine is not None:
            save_file(engine.weights, output / f"{mode}_{policy}_given_{rank}.safetensors")
        result = {
            "calls": calls,
            "turns": turns,
            "written": engine.log if engine else None,
            "syncs": engine.syncs if engine else None,
            "moved": [name for name, value in frozen_weights(trainer).items() if not torch.equal(value, frozen[name])],
            "log": [row for row in trainer.state.log_history if "loss" in row],
        }
    (output / f"{mode}_{policy}_{rank}.json").write_text(json.dumps(result))
    AcceleratorState._reset_state()


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    Writer.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    engines.VLLMClient, engines.LLM = Client, Engine
    for mode, policy in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        train(folder, output, mode, policy)


if __name__ == "__main__":
    main()
