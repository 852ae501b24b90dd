"""Trains an adapter with a colocated vLLM on CPU and writes down what the engine was given, and what it samples then.

python tests/e2e/vllm_adapter_worker.py FOLDER, which holds the recipe `lora.yaml`; files of the result go there.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import save_file
from tiny_training import brevity
from vllm import SamplingParams
from vllm_worker import prepare_vllm_on_cpu

from rex_rag.training.launch import prepare, run


def main() -> None:
    prepare_vllm_on_cpu()
    folder = Path(sys.argv[1])
    words = ["--config", str(folder / "lora.yaml"), "--output_dir", str(folder / "run"), "--use_vllm", "true"]
    words += ["--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.1"]
    with ExitStack() as held_folder:
        trainer, *_ = prepare(words, held_folder)
        trainer.reward_funcs[0] = brevity
        model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        given, load_weights = {}, model.load_weights

        def recording(pairs):
            pairs = list(pairs)
            given.update((name, value.detach().clone()) for name, value in pairs)
            return load_weights(pairs)

        model.load_weights = recording
        run(trainer, None)
        given.clear()
        prompts = [trainer.tokenizer(text)["input_ids"] for text in ("Question: where is the owl", "so. the oak")]
        with trainer.vllm_engine() as engine:
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True),
                use_tqdm=False,
            )
        save_file(given, folder / "given.safetensors")
        frozen = {name: value for name, value in trainer.model.named_parameters() if not value.requires_grad}
        save_file({name: value.detach().clone() for name, value in frozen.items()}, folder / "frozen.safetensors")
    sampled = [
        {
            "prompt": prompt,
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [row[token].logprob for token, row in zip(*taken(output), strict=True)],
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    log = [row for row in trainer.state.log_history if "loss" in row]
    (folder / "out.json").write_text(json.dumps({"sampled": sampled, "log": log}))


def taken(output):
    return output.outputs[0].token_ids, output.outputs[0].logprobs


if __name__ == "__main__":
    main()
