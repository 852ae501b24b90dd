"""Train with REX-RAG from a recipe.

accelerate launch --config_file recipes/accelerate_configs/NAME.yaml \\
    scripts/train.py --config recipes/MODEL/METHOD.yaml [--key value ...]

Every key of the recipe can be overridden on the command line; an unknown key is refused. Questions, retriever and
configuration are checked before the model is loaded; what a user can mend is said without a traceback,
with exit code 2.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser, get_peft_config, get_quantization_config

from rex_rag.commands.terminal import refuse
from rex_rag.config import REXRAGConfig
from rex_rag.data.qa import load_questions
from rex_rag.evaluation.during_training import check_best_metric, load_evaluation_sets
from rex_rag.progress import ProgressLine
from rex_rag.recipe import RECIPE_PARTS
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.load import load_retriever
from rex_rag.trainer import REXRAGTrainer


def main() -> int:
    """Train; returns the exit code: 0, or 2 for errors a user can mend."""
    try:
        trainer, checkpoint = prepare()
    except Exception as error:
        return refuse(error)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RetrievalError as error:  # any other error in the middle of training is worth its traceback
        return refuse(error)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return 0


def prepare() -> tuple[REXRAGTrainer, str | None]:
    """The trainer that recipe and command line ask for, and the checkpoint to go on from."""
    recipe = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv[:-1] else None
    parser = TrlParser(RECIPE_PARTS)
    questions, evaluation, retrieval, config, model = parser.parse_args_and_config()
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set; name a Hub model or a folder in the recipe")
    checkpoint = find_checkpoint(config)

    with config.main_process_first(desc="questions and corpus"):
        train_dataset = load_questions(questions)
        eval_dataset = load_evaluation_sets(evaluation, config.eval_strategy)
        if eval_dataset is not None:
            check_best_metric(eval_dataset, config.metric_for_best_model)
        retriever = load_retriever(retrieval)
    retriever.check()

    quantization = get_quantization_config(model)
    config.model_init_kwargs = {
        **(config.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    trainer = REXRAGTrainer(
        model=model.model_name_or_path,
        retriever=retriever,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            padding_side="left",
            trust_remote_code=config.trust_remote_code,
        ),
        callbacks=[ProgressLine()],
        quantization_config=quantization,
        peft_config=get_peft_config(model),
        recipe=recipe,
    )
    for noisy in (ProgressCallback, PrinterCallback):  # they print every metric at every step
        trainer.remove_callback(noisy)
    return trainer, checkpoint


def find_checkpoint(config: REXRAGConfig) -> str | None:
    """The folder that `resume_from_checkpoint` names; `true` means the last one in the output directory."""
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={asked} is no directory here ({Path.cwd()}); name a checkpoint-N"
            )
        return str(asked)
    output = Path(config.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if last is None:
        raise ValueError(
            f"resume_from_checkpoint is true, but {output} holds no checkpoint; leave it out to begin anew"
        )
    return last


if __name__ == "__main__":
    sys.exit(main())
