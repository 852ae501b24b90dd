"""Trains a few steps under `accelerate launch` and writes down what each rank saw.

    accelerate launch --config_file ... tests/e2e/rank_worker.py MODEL_DIRECTORY OUTPUT_DIRECTORY [CORRECTION]

Rank 1 answers in its first turn, rightly and wrongly in turns (its sampled ids are replaced behind the real generate
call), rank 0 samples freely: the ranks finish their rollouts after different numbers of turns, and dynamic sampling
replaces rank 0's groups alone. Afterwards they evaluate on five questions, two each at a time, of which rank 1's
answers are right. Under another correction than `token` rank 1's originals are all wrong and its probes right, and its
reward function is slow at first, so that the watchdog has to speak.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer

from rex_rag.models.generation import Generation
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.trainer import REXRAGTrainer
from rex_rag.types import Passage


def main() -> None:
    model, output = sys.argv[1], Path(sys.argv[2])
    correction = sys.argv[3] if len(sys.argv) > 3 else "token"
    rescues = correction != "token"
    trainer = REXRAGTrainer(
        model=model,
        args=REXRAGConfig(
            output_dir=str(output / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            max_steps=3,
            watchdog_seconds=1.0 if rescues else 0.0,
            learning_rate=1e-3,
            num_generations=6,
            num_probe_slots=3,
            per_device_train_batch_size=6,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            probe_probability=0.6,
            keep_ratio=0.25,
            probe_filter="none" if rescues else "likelihood",
            correction=correction,
            dynamic_sampling_rounds=0 if rescues else 1,
            max_prompt_length=200,
            max_turn_tokens=40 if rescues else 16,
            max_observation_tokens=60,
            max_sequence_length=400,
            max_turns=3,
            retrieval_top_k=1,
            prompt_template=f"{model}/prompt.txt",
        ),
        train_dataset=Dataset.from_list(
            [{"question": f"who is person {index}", "golden_answers": ["nobody"]} for index in range(16)]
        ),
        eval_dataset=Dataset.from_list(
            [{"question": f"who is person {index}", "golden_answers": ["somebody"]} for index in range(5)]
        ),
        retriever=BM25Retriever([Passage("0", "One", "person one"), Passage("1", "Two", "person two")]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        reward_funcs=slow_brevity if rescues and os.environ["RANK"] == "1" else brevity,
    )
    rank = trainer.accelerator.process_index
    agent, sampler = trainer.sampler.agent, trainer.sampler
    answers = ["somebody"] if rescues else ["nobody", "somebody"]
    if rank == 1:
        answer_at_once(agent, answers, "nobody" if rescues else None)
        answer_at_once(trainer.evaluator, ["somebody"])
    records = []
    score_probes, sample = sampler._score_probes, sampler.sample

    def recording_score(probes):
        scores = score_probes(probes)
        records.append({"scores": [[probe.parent, score] for probe, score in zip(probes, scores, strict=True)]})
        return scores

    def recording_sample(*args, **kwargs):
        before = agent.driver.generate_calls
        batch = sample(*args, **kwargs)
        record = records[-1] if records and "kept" not in records[-1] else {"scores": []}
        if record not in records:
            records.append(record)
        record |= {
            "kept": [probe.parent for probe in batch.probes],
            "global": [batch.global_originals, batch.global_failed, batch.global_made, batch.global_kept],
            "generate_calls": agent.driver.generate_calls - before,
            "own_turns": max((trajectory.turns for trajectory in batch.originals), default=0),
            "originals": len(batch.originals),
        }
        return batch

    sampler._score_probes, sampler.sample = recording_score, recording_sample
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    checksum = sum(float(value.double().abs().sum()) for value in weights.values()) if weights else None
    log = [row for row in trainer.state.log_history if "em/originals" in row]
    result = {"records": list(records), "checksum": checksum, "log": log}
    result["evaluated"] = trainer.evaluate()["eval_em/originals"]
    (output / f"rank{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.state.destroy_process_group()


def brevity(completions, **_):
    return [-0.01 * len(completion[0]["content"]) for completion in completions]


def slow_brevity(completions, seen=[], **_):  # noqa: B006 (remembers its first call)
    time.sleep(0 if seen else 3)
    seen.append(True)
    return brevity(completions)


slow_brevity.__name__ = "brevity"  # both ranks log the same figures


def answer_at_once(agent, answers, of_probes=None) -> None:
    """Rows, of which there are six where they are originals, answer in turns; probes, if told to, all the same."""
    generator = agent.driver.generator(agent.protocol.stop_strings)
    generate = generator.generate

    def replaced(prompt_ids, max_new_tokens):
        texts = itertools.cycle(f"<answer> {answer} </answer>" for answer in answers)
        rows = generate(prompt_ids, max_new_tokens)
        if of_probes and len(rows) < 6:
            texts = itertools.repeat(f"</think> <answer> {of_probes} </answer>")
        return [
            Generation(agent.script.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text, _ in zip(texts, rows, strict=False)
        ]

    generator.generate = replaced


if __name__ == "__main__":
    main()
