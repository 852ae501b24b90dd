"""Our rollout against TRL's own tool loop: the same policy, questions, tool and engine, in one run.

    python -m rex_rag.quickstart.warm_start --protocol tool_calls --output DIR/warm_start --world DIR/world
    python scripts/benchmark_tool_loop.py --start DIR [--latency 0 50] [--repeat 5] [--use_vllm true ...]

Both trainers sample a generation batch of search rollouts, without probes, turn about: model-written tokens a second
of the time inside `_generate`, the median of the repeats. Each search takes the latency more, whatever the batch; TRL
calls its tools one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

from rex_rag.data.qa import QuestionArguments, load_questions
from rex_rag.protocols import make_protocol
from rex_rag.retrieval.base import Retriever
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.tools.retrieval import render_passages
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer

TOP_K = 1  # as in the quickstart: one passage holds one hop
PROMPT = Path(__file__).resolve().parents[1] / "recipes/quickstart/prompt.txt"


class DelayedRetriever(Retriever):
    """As a server over a network: so many seconds more for a batch; several at once."""

    is_concurrent = True
    delay = 0.0

    def __init__(self, own: Retriever) -> None:
        self._own = own

    description = "delayed"

    def check(self):
        self._own.check()

    def search(self, queries, top_k):
        time.sleep(self.delay)
        return self._own.search(queries, top_k)


def sample(trainer: GRPOTrainer, batch: list[dict], seed: int) -> tuple[float, int, float]:
    """Seconds inside `_generate`, model-written tokens, calls a rollout."""
    torch.manual_seed(seed)
    taken: dict[str, float] = {}
    generate = type(trainer)._generate

    def timed(prompts):
        started = time.perf_counter()
        rows = generate(trainer, prompts)
        taken["seconds"] = time.perf_counter() - started
        taken["tokens"] = sum(map(sum, rows[2]))
        return rows

    trainer._generate = timed
    trainer._generate_and_score_completions([dict(row) for row in batch])
    return taken["seconds"], taken["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=Path, required=True, help="folder with warm_start/ and world/")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5, help="trajectories a question")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 50], help="milliseconds a search")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vllm", action="store_true", help="colocated vLLM in the place of transformers")
    parser.add_argument("--schedule", default="auto", help="rollout_schedule of ours")
    options = parser.parse_args()
    if options.vllm and not torch.cuda.is_available():
        import vllm._custom_ops as ops

        ops._supports_onednn = False  # repacked weights could not be synchronised
    retriever = DelayedRetriever(BM25Retriever.from_corpus([options.start / "world" / "corpus.jsonl"]))
    rows = load_questions(QuestionArguments(datasets=[str(options.start / "world" / "train.jsonl")]))
    rows = rows.select(range(options.questions))
    policy = str(options.start / "warm_start")
    common = {
        "output_dir": str(options.start / "benchmark"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": options.questions * options.samples,
        "num_generations": options.samples,
        "use_vllm": options.vllm,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 512,
        "temperature": 1.0,
    }

    def tokenizer():
        return AutoTokenizer.from_pretrained(policy, padding_side="left")

    def search(query: str) -> str:
        """Search.

        Args:
            query: What to look for.
        """
        return render_passages(retriever.search([query], TOP_K)[0])

    protocol = make_protocol("tool_calls", template=PROMPT.read_text())
    asked = [protocol.messages(row["question"], ()) for row in rows]
    of_trl = tokenizer()
    of_trl.response_template = qwen3_template
    # TRL asks that a template shows calls; it is not shown any.
    said = "message['content']"
    of_trl.chat_template = of_trl.chat_template.replace(
        f"{said} +", f"{said} + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    trainers = {
        "trl": GRPOTrainer(
            policy,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=GRPOConfig(**common, max_completion_length=400, max_tool_calling_iterations=4),
            train_dataset=Dataset.from_list([{"prompt": messages} for messages in asked]),
            processing_class=of_trl,
            tools=[search],
        ),
        "rex_rag": REXRAGTrainer(
            policy,
            retriever,
            REXRAGConfig(
                **common,
                protocol="tool_calls",
                rollout_schedule=options.schedule,
                prompt_template=str(PROMPT),
                num_probe_slots=0,
                retrieval_top_k=TOP_K,
                max_turns=4,
                max_prompt_length=64,
                max_turn_tokens=64,
                max_observation_tokens=80,
                max_sequence_length=512,
            ),
            rows,
            processing_class=tokenizer(),
        ),
    }
    for trainer in trainers.values():
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    batches = {
        name: [dict(row) for row in trainer.train_dataset for _ in range(options.samples)]
        for name, trainer in trainers.items()
    }
    for latency in (0.0, *options.latency):  # the first to warm up
        retriever.delay = latency / 1000
        taken = {name: [] for name in trainers}
        for repeat in range(options.repeat):
            for name in list(trainers)[:: 1 if repeat % 2 else -1]:
                taken[name].append(sample(trainers[name], batches[name], repeat))
        figures = {
            name: {
                "tokens_per_second": round(statistics.median(tokens / seconds for seconds, tokens in found)),
                "tokens": round(statistics.mean(tokens for _, tokens in found)),
                "seconds": [round(seconds, 2) for seconds, _ in found],
            }
            for name, found in taken.items()
        }
        print(json.dumps({"latency_ms": latency, "trajectories": len(batches["trl"]), **figures}), flush=True)


if __name__ == "__main__":
    main()
