"""Where the gradient of a right probe goes under the paper's form, at the all-wrong start (docs/reproduction.md).

    python scripts/probe_gradient.py [--seeds 0 1 2 3 4]

Every two-hop test question is rolled out once and its wrong answer probed once. Of the right probes: log pi_old, the
weight pi_old / mu, and weight times (1 - pi_old), which is how hard the loss pushes the logit of a token. Then the
same probes without the inserted thought: how probable it is that the policy goes on like this by itself. Nothing is
trained. Writes `recipes/reproduction/results/probe_gradient.md`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from study import ROOT, interval, make_start
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser

from rex_rag.correction.densities import (
    behavior_log_probs,
    decoupled_log_weights,
    prefix_mask,
    probe_log_density,
)
from rex_rag.data.qa import QuestionArguments
from rex_rag.evaluation.dead_ends import evaluate_questions, probe_dead_ends
from rex_rag.models.generation import TransformersGenerator
from rex_rag.probes import explorer_kind
from rex_rag.quickstart.hopworld import TEST_FILES
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.cuts import without_thought
from rex_rag.tools import make_tools
from rex_rag.training.config import REXRAGConfig
from rex_rag.types import SegmentKind, Trajectory

PARTS = ("prefix", "first token of the doubt", "rest of the doubt", "continuation")
SHARE = 0.12 / 1.12  # a, where the filter keeps as many probes as it may


def log_probs(model, trajectory: Trajectory) -> torch.Tensor:
    """(T,) log pi_old of the completion's tokens, at temperature 1."""
    ids = trajectory.completion_ids
    with torch.no_grad():
        logits = model(torch.tensor([trajectory.prompt_ids + ids])).logits[0, -len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)


def right_probes(model, start: Path, seed: int) -> tuple[list[Trajectory], float, Agent]:
    """Probes of a start that answer right, the share of failed originals, and the agent."""
    parser = TrlParser((QuestionArguments, RetrieverArguments, REXRAGConfig, ModelConfig))
    world = start / "world"
    given = [("config", ROOT / "recipes/quickstart/rex_rag.yaml"), ("output_dir", start / "unused"), ("seed", seed)]
    given += [("model_name_or_path", start / "warm_start"), ("corpus", world / "corpus.jsonl")]
    _, retrieval, config, _ = parser.parse_args_and_config(
        [word for key, value in given for word in (f"--{key}", str(value))]
    )
    tokenizer = AutoTokenizer.from_pretrained(start / "warm_start", padding_side="left")
    set_seed(seed)
    agent = Agent(
        lambda stop: TransformersGenerator(model, tokenizer, temperature=1.0, stop_strings=stop),
        make_tools(config.agent_tools, load_retriever(retrieval), config.retrieval_top_k),
        tokenizer,
        config.agent_protocol(),
        config.rollout_budget(),
    )
    rows = [json.loads(line) for line in (world / TEST_FILES[2]).read_text(encoding="utf-8").splitlines()]
    questions = evaluate_questions(agent, rows, samples=1)
    probe_dead_ends(agent, questions, explorer_kind(config.explorer).make(agent, config, None), seed=seed)
    right = [probe for question in questions for probe in question.probes if question.is_correct(probe)]
    return right, sum(question.is_dead_end for question in questions) / len(questions), agent


def examine(start: Path, seed: int) -> dict[str, list[float]]:
    """Of one start: mean log pi_old, mean weight and share of the push of every part; what goes on without a doubt."""
    model = AutoModelForCausalLM.from_pretrained(start / "warm_start", dtype=torch.float32).eval()
    probes, failure_rate, agent = right_probes(model, start, seed)
    sums = {part: torch.zeros(4) for part in PARTS}  # tokens, log pi_old, weight, push
    alone = []
    for probe in probes:
        old, kinds = log_probs(model, probe).unsqueeze(0), torch.tensor([probe.kinds])
        inserted, trained = kinds == SegmentKind.PROBE, torch.tensor([probe.trained_mask]).bool()
        pool = torch.zeros_like(old).masked_scatter(inserted, torch.tensor(probe.pool_logprobs))
        behavior = behavior_log_probs(old, probe_log_density(old, kinds, pool, failure_rate), SHARE)
        weight = decoupled_log_weights(old, behavior).exp()
        first = inserted & (inserted.cumsum(1) == 1)
        prefix = prefix_mask(kinds)
        masks = (prefix, first, inserted & ~first, trained & ~inserted & ~prefix)
        for part, mask in zip(PARTS, masks, strict=True):
            sums[part] += torch.stack(
                [values[mask].sum() for values in (mask.float(), old, weight, weight * (1 - old.exp()))]
            )
        cut = without_thought(probe, agent.script)
        if isinstance(cut, Trajectory):
            kept = sum(len(segment.ids) for segment in probe.segments[: probe.probe_segment])
            tail = log_probs(model, cut)[kept:]
            own = tail[torch.tensor(cut.trained_mask[kept:]).bool()]
            alone.append((own[0].item(), own.sum().item()))
    pushed = sum(values[3] for values in sums.values())
    found = {
        part: [(values[1] / values[0]).item(), (values[2] / values[0]).item(), (values[3] / pushed).item()]
        for part, values in sums.items()
    }
    first_token, whole = (sum(column) / len(alone) for column in zip(*alone, strict=True))
    return {**found, "alone": [len(probes), first_token, whole]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="warm starts")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "studies", help="starts, as of scripts/study.py"
    )
    options = parser.parse_args()
    found = [
        examine(make_start({"wrong_rate": 1.0, "seed": seed}, options.work / "starts"), seed) for seed in options.seeds
    ]

    def over_starts(part: str, column: int, digits: int = 1) -> str:
        return interval([one[part][column] for one in found], digits)

    lines = ["| part | mean log pi_old | mean weight | share of the push on logits |", "|---|---|---|---|"]
    lines += [
        f"| {part} | {' | '.join(over_starts(part, *how) for how in ((0, 1), (1, 4), (2, 2)))} |" for part in PARTS
    ]
    lines += [
        "",
        f"{len(found)} warm starts, {over_starts('alone', 0, 0)} right probes of 100; a = {SHARE:.3f}. Without the "
        f"thought: log pi_old of the first token behind the prefix {over_starts('alone', 1)}, of all that the policy "
        f"would write {over_starts('alone', 2)}.",
    ]
    text = "\n".join(lines) + "\n"
    (ROOT / "recipes" / "reproduction" / "results" / "probe_gradient.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
