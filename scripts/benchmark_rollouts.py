"""Streaming against lock-step through vLLM: the same agent, questions and seeds, at several retrieval latencies.

    python scripts/benchmark_rollouts.py --model outputs/quickstart/rescue_replay \\
        --corpus outputs/quickstart/world/corpus.jsonl \\
        --questions outputs/quickstart/world/test.jsonl [--latency 0 50 200] [--temperature 0] [--repeat 3]

Each search takes the latency more, whatever the batch, as a server over a network does. Trajectories a second, the
median of the repeats, turn about; at temperature 0 the sampled ids must be the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from rex_rag.agent import AgentSettings
from rex_rag.models.language_model import ModelOptions, open_model
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.rollout.agent import Agent
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.tools import SearchTool


class DelayedSearch(SearchTool):
    """A search that takes so many seconds more; like a remote one, several at once."""

    is_concurrent = True
    delay = 0.0

    def run(self, calls):
        time.sleep(self.delay)
        return super().run(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a trained agent")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--limit", type=int, default=64, help="questions")
    parser.add_argument("--samples", type=int, default=5, help="trajectories a question, as training has them")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 50, 200], help="milliseconds a search")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    settings = AgentSettings.load(options.model)
    model = open_model(
        ModelOptions(
            name=options.model,
            backend="vllm",
            dtype="float32",
            temperature=options.temperature,
            max_length=settings.budget.max_sequence_length,
            gpu_memory_utilization=0.5,
            enforce_eager=True,
        )
    )
    tool = DelayedSearch(load_retriever(RetrieverArguments(corpus=options.corpus)), settings.budget.top_k)
    agents = {
        name: Agent(
            model.generator,
            [tool],
            model.tokenizer,
            settings.make_protocol(),
            settings.budget,
            stream=model.stream if name == "streaming" else None,
        )
        for name in ("lock_step", "streaming")
    }
    rows = [row for _, row in iter_json_objects(options.questions, ValueError)][: options.limit]
    prompts = [agents["lock_step"].script.encode(row["question"]) for row in rows for _ in range(options.samples)]
    for agent in agents.values():
        agent.rollout(prompts[:20])
    for latency in options.latency:
        DelayedSearch.delay = latency / 1000
        seconds: dict[str, list[float]] = {name: [] for name in agents}
        ids = {}
        for repeat in range(options.repeat):
            for name, agent in agents.items():
                model.start_batch(repeat)
                started = time.perf_counter()
                trajectories = agent.rollout(prompts)
                seconds[name].append(time.perf_counter() - started)
                ids[name] = [one.completion_ids for one in trajectories]
        rates = {name: round(len(prompts) / statistics.median(taken), 1) for name, taken in seconds.items()}
        print(
            json.dumps(
                {
                    "latency_ms": latency,
                    "trajectories": len(prompts),
                    "trajectories_per_second": rates,
                    "speed_up": round(rates["streaming"] / rates["lock_step"], 2),
                    "seconds": {name: [round(one, 2) for one in taken] for name, taken in seconds.items()},
                    "same_ids": sum(map(list.__eq__, ids["lock_step"], ids["streaming"])) / len(prompts),
                }
            ),
            flush=True,
        )
    model.close()


if __name__ == "__main__":
    main()
