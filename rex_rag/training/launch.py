"""Training as a verb: from a recipe to a trained model.

Questions, retriever and configuration are checked before the model is loaded; what a user can mend is said without a
traceback, with exit code 2. A run that ends by itself before it is done says so with exit code 1 (`RunEnded`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rex_rag.support.errors import RunEnded, UserError

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from tqdm.auto import tqdm
from trl import TrlParser, get_peft_config, get_quantization_config

from rex_rag.data.qa import load_questions
from rex_rag.evaluation.during_training import check_best_metric, load_evaluation_sets
from rex_rag.models.adapters import load_policy, tokenizer_place
from rex_rag.models.files import check_model, explained
from rex_rag.models.identity import holds_weights
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.load import BM25, RetrieverArguments, load_retriever
from rex_rag.support.announce import announce
from rex_rag.support.errors import from_the_user, refuse
from rex_rag.support.hub import bound_hub_requests
from rex_rag.support.logs import start_logging
from rex_rag.support.options import LISTS, with_lists_joined
from rex_rag.support.recipes import with_recipe_path
from rex_rag.support.tokenization import open_tokenizer
from rex_rag.support.wording import counted
from rex_rag.training.budgets import fit_budgets
from rex_rag.training.checkpoints import find_checkpoint, finished_at, refuse_other_engine
from rex_rag.training.config import REXRAGConfig
from rex_rag.training.push import push
from rex_rag.training.recipe import RECIPE_PARTS
from rex_rag.training.run_folder import check_folder, clear_folder, held
from rex_rag.training.run_settings import changed_settings, recorded_settings, run_settings
from rex_rag.training.trainer import REXRAGTrainer


def main(words: Sequence[str] | None = None) -> int:
    """Train as a command line says, this process's by default; returns the exit code: 0, or 2 for errors a user can
    mend."""
    start_logging()
    bound_hub_requests()
    with ExitStack() as held_folder:
        try:
            trainer, checkpoint, search_words = prepare(sys.argv[1:] if words is None else words, held_folder)
        except RunFinished as finished:
            sys.stderr.write(f"{finished}\n")
            return 0
        except Exception as error:
            return refuse(error)
        try:
            run(trainer, checkpoint, search_words)
        except (RetrievalError, RunEnded) as error:  # any other in the middle of training is worth its traceback
            return refuse(error)
    # Left to the interpreter's end, a thread of torch's may be cut off then, which aborts a run that is done.
    trainer.accelerator.state.destroy_process_group()
    return 0


class RunFinished(UserError):
    """There is nothing left to train; the message says where the model is."""


def train(recipe: str | Path, **overrides: object) -> REXRAGTrainer:
    """Train from a recipe, with its keys overridden, and return the trainer; the model lies in its output_dir.

    Raises:
        ValueError, OSError: for what a user can mend, before the model is loaded.
        RetrievalError: when a search could not be answered.
        RunEnded: where a signal ended the run, or numbers that are none.
    """
    words = ["--config", str(recipe)]
    for key, value in overrides.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{key}", *("none" if one is None else str(one) for one in values)]
    with ExitStack() as held_folder:
        trainer, checkpoint, search_words = prepare(words, held_folder)
        run(trainer, checkpoint, search_words)
    return trainer


def run(trainer: REXRAGTrainer, checkpoint: str | None, search_words: Sequence[str] = ()) -> None:
    """Train to the end, save, push where that is asked for, and say where the model is and how to look at it.

    Args:
        search_words: what `rex-rag ask` needs to search as training did.
    """
    if trainer.args.overwrite_output_dir:
        clear_folder(trainer.args.output_dir, trainer.accelerator)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_final()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        push(trainer.push_to_hub, trainer.args.output_dir, str(trainer.hub_model_id))
    if trainer.is_world_process_zero():
        tqdm.write(farewell(trainer.args, search_words))


def farewell(args: REXRAGConfig, search_words: Sequence[str]) -> str:
    """Where the model is, and the commands that look at it."""
    folder = shlex.quote(args.output_dir)
    looks = [
        ("how training went", f"curves {folder} --output {shlex.quote(str(Path(args.output_dir, 'curves.png')))}"),
        ("what it wrote", f"view {folder}" if args.log_completions else ""),
        ("put a question", shlex.join(["ask", args.output_dir, "your question", *search_words])),
    ]
    return "\n".join(
        [f"saved to {args.output_dir}", *(f"  {why + ':':<19}rex-rag {how}" for why, how in looks if how)]
    )


def prepare(words: Sequence[str], held_folder: ExitStack) -> tuple[REXRAGTrainer, str | None, list[str]]:
    """The trainer that recipe and command line ask for, the checkpoint to go on from, and `run`'s search words.

    Args:
        held_folder: holds the output directory for this run until it is closed.
    """
    words = with_recipe_path(with_lists_joined(words, LISTS))
    recipe = words[words.index("--config") + 1] if "--config" in words else None
    parser = TrlParser(RECIPE_PARTS, usage=argparse.SUPPRESS)  # hundreds of lines before the one that matters
    with from_the_user():
        questions, evaluation, retrieval, config, model = parser.parse_args_and_config(words)
    if model.model_name_or_path is None:
        raise UserError("model_name_or_path is not set; name a Hub model or a folder in the recipe")
    name = model.model_name_or_path
    check_model(name, model.model_revision)
    config.model_init_kwargs = {
        **(config.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    with explained(name):
        config = fit_budgets(config, name)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config.output_dir)
    if checkpoint is not None:
        refuse_other_engine(checkpoint, config)
        refuse_finished(config, checkpoint)
    held_folder.enter_context(held(config.output_dir, here=config.process_index == 0))
    check_folder(config.output_dir, overwrite=config.overwrite_output_dir, checkpoint=checkpoint, model=name)

    with config.main_process_first(desc="questions and corpus"):
        announce(f"reading questions: {', '.join(source.path for source in questions.datasets)}")
        train_dataset = load_questions(questions)
        eval_dataset = load_evaluation_sets(evaluation, config.eval_strategy)
        if eval_dataset is not None:
            check_best_metric(eval_dataset, config.metric_for_best_model)
        announce(f"{counted(len(train_dataset), 'question')}; retriever: {retrieval.name}")
        retriever = load_retriever(retrieval)
    retriever.check()
    if checkpoint is not None:
        settings = run_settings(config, name, train_dataset, retriever.description)
        changed_settings(recorded_settings(checkpoint) or settings, settings)

    quantization = get_quantization_config(model)
    peft_config = get_peft_config(model)
    engine = ", then starting vLLM" if config.use_vllm and config.vllm_mode == "colocate" else ""
    announce(f"{retriever.description}; loading {name} on {config.device.type}{engine}")
    place, revision = tokenizer_place(name, model.model_revision)
    with explained(name):
        tokenizer = open_tokenizer(place, revision, trust_remote_code=config.trust_remote_code)
        trainer = REXRAGTrainer(
            model=load_policy(name, config, quantization, peft_config),
            retriever=retriever,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=peft_config,
            recipe=recipe,
        )
    return trainer, checkpoint, ask_words(retrieval)


def ask_words(retrieval: RetrieverArguments) -> list[str]:
    """The options of `rex-rag ask` that name the retriever of a training."""
    named = [] if retrieval.retriever == [BM25] else retrieval.retriever
    pairs = [*(("--retriever", one) for one in named), *(("--corpus", one) for one in retrieval.corpus)]
    return [word for pair in pairs for word in pair]


def refuse_finished(config: REXRAGConfig, checkpoint: str) -> None:
    step = finished_at(checkpoint, config.max_steps, config.num_train_epochs)
    if step is None:
        return
    output = Path(config.output_dir)
    raise RunFinished(
        f"{output} is finished: all {step} steps are done, and nothing is left to train. The model is in "
        f"{output if holds_weights(output) else checkpoint}; raise max_steps or num_train_epochs to go on"
    )
