"""Real questions and real Wikipedia passages through the committed recipe: search, probes, masks, logs, resumption."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((DATA / name).is_dir() for name in ("hotpotqa_sample", "2wiki_passages", "hotpotqa_dev")),
        reason="the real questions and passages are not beside the repository, in ../shared/data",
    ),
]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONPATH": str(ROOT),
}


def call(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def train(recipe, *overrides):
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate_configs/cpu.yaml"]
    call(*launch, "-m", "rex_rag.train", "--config", recipe, "--max_steps", 4, "--save_steps", 2, *overrides)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The committed recipe, with the files beside the repository in the place of those from the Hub."""
    text = (ROOT / "recipes/hotpotqa_sample/rex_rag.yaml").read_text(encoding="utf-8")
    corpus = "\n".join(f"  - {DATA / name / 'corpus.jsonl'}" for name in ("hotpotqa_sample", "2wiki_passages"))
    for fetched, here in (
        ("{path: data/hotpotqa_sample/qa.jsonl}", f"{{path: {DATA / 'hotpotqa_sample' / 'qa.jsonl'}}}"),
        ("  - data/hotpotqa_sample/corpus.jsonl", corpus),
    ):
        assert text.count(fetched) == 1
        text = text.replace(fetched, here)
    path = tmp_path_factory.mktemp("recipe") / "rex_rag.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(recipe, tmp_path_factory):
    """Trained for too few steps to copy a question, and for enough to write actions."""
    folder = tmp_path_factory.mktemp("hotpotqa") / "tiny_model"
    call(
        *(
            "-m",
            "rex_rag.quickstart.tiny_model",
            "--recipe",
            recipe,
            "--questions",
            DATA / "hotpotqa_dev" / "qa.jsonl",
            "--output",
            folder,
        ),
        *("--max-questions", 800, "--max-steps", 600),
    )
    return folder


@pytest.fixture(scope="module")
def openings():
    """How every passage begins when it is the first of an observation."""
    from rex_rag.data.corpus import read_corpus

    corpora = [DATA / name / "corpus.jsonl" for name in ("hotpotqa_sample", "2wiki_passages")]
    return [f"\n\n<information>Doc 1(Title: {passage.title}) {passage.text}"[:120] for passage in read_corpus(corpora)]


def timeless(history):
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds/") and key != "step_time"}
        for row in history
        if "em/originals" in row
    ]


def test_the_recipe_searches_real_text_logs_and_resumes(recipe, model, openings, tmp_path):
    from safetensors.torch import load_file

    from rex_rag.cli import main
    from rex_rag.visualization.records import read_completion_tables

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    # Such a model answers nothing right: only a format that counts all the same gives it something to learn from.
    learning = ("--model_name_or_path", model, "--shaping_needs_right_answer", "false")
    train(recipe, *learning, "--output_dir", whole)
    train(
        recipe,
        *(*learning, "--output_dir", resumed),
        *("--resume_from_checkpoint", whole / "checkpoint-2"),
    )

    logs = [timeless(json.loads((run / "trainer_state.json").read_text())["log_history"]) for run in (whole, resumed)]
    assert len(logs[0]) == 4 and logs[0] == logs[1]
    weights = [load_file(run / "model.safetensors") for run in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    start = load_file(model / "model.safetensors")
    assert not all(start[name].equal(weights[0][name]) for name in start), "nothing was learnt from"

    for row in logs[0]:
        weighed = ("importance_weight/mean",) if row["probes/kept"] else ()  # without probes nothing is weighed
        for key in ("loss", "grad_norm", "kl", "em/originals", "dead_end/rate", *weighed):
            assert math.isfinite(row[key]), key
        # 4 questions x 5 originals; floor(0.12 x 20 = 2.4) probes at most.
        assert row["probes/kept"] == min(2, row["probes/made"])
        assert row["probes/mixing_share"] == pytest.approx(row["probes/kept"] / (20 + row["probes/kept"]))
    assert sum(row["probes/kept"] for row in logs[0]) > 0
    assert sum(row["searches/mean"] for row in logs[0]) > 0
    assert sum(row["truncations/observation"] for row in logs[0]) > 0

    records = read_completion_tables(whole)
    assert len(records) == sum(20 + row["probes/kept"] for row in logs[0])
    later = [record for record in records if record["step"] > 2]
    earlier = len(records) - len(later)
    for record in later:  # a probe names its original by its place among the records that were read
        record["parent"] = None if record["parent"] is None else record["parent"] - earlier
    assert later == read_completion_tables(resumed)
    assert any(record["kind"] == "probe" for record in records)
    observations = {
        segment["text"] for record in records for segment in record["segments"] if segment["kind"] == "INFORMATION"
    }
    assert len(observations) > 10
    for text in observations:
        assert any(text.startswith(opening) for opening in openings), text[:200]

    assert main(["view", str(whole), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<article") == len(records)


def test_no_token_of_a_passage_is_trained(recipe, model, openings, tmp_path, monkeypatch):
    from transformers import AutoTokenizer
    from trl import TrlParser

    from rex_rag.correction.realignment import loss_mask
    from rex_rag.data.qa import load_questions
    from rex_rag.retrieval.load import load_retriever
    from rex_rag.training.recipe import RECIPE_PARTS
    from rex_rag.training.trainer import REXRAGTrainer

    monkeypatch.chdir(ROOT)
    parser = TrlParser(RECIPE_PARTS)
    overrides = ["--output_dir", str(tmp_path), "--max_steps", "2", "--save_strategy", "no"]
    questions, _, retrieval, config, _ = parser.parse_args_and_config(["--config", str(recipe), *overrides])
    trainer = REXRAGTrainer(
        model=str(model),
        retriever=load_retriever(retrieval),
        args=config,
        train_dataset=load_questions(questions),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    seen = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        texts = {tuple(row.completion_ids): row for row in trainer._slots.filled}
        trained = loss_mask(inputs).bool()
        for ids, in_loss, present in zip(
            inputs["completion_ids"], trained, inputs["completion_mask"].bool(), strict=True
        ):
            seen.append((texts[tuple(ids[present].tolist())], ids[present & in_loss], ids[present & ~in_loss]))
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watch)
    trainer.train()
    rows = list(
        zip(
            trainer._logs["extra"]["question"],
            *(trainer._logs["rewards"][name] for name in ("exact_match_reward", "format_reward")),
            trainer._logs["advantages"],
            strict=True,
        )
    )
    answered = {question for question, right, _, _ in rows if right}
    others = [row for row in rows if row[0] not in answered]
    assert {shape for _, _, shape, _ in others} == {0.0, 1.0}, "format differs where nothing is right"
    assert not any(advantage for *_, advantage in others), "and is not learnt there"

    decode = trainer.processing_class.decode
    passages = 0
    for row, trained, masked in seen:
        inserted = [segment for segment in row.segments if segment.kind.name in ("INFORMATION", "FEEDBACK")]
        assert masked.tolist() == [token for segment in inserted for token in segment.ids]
        assert decode(masked) == "".join(segment.text for segment in inserted)
        assert decode(trained) == row.model_text
        for segment in inserted:
            if segment.kind.name == "INFORMATION":
                passages += 1
                assert any(segment.text.startswith(opening) for opening in openings)
                assert segment.text not in row.model_text
    assert len(seen) >= 40 and passages > 10
