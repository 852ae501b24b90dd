"""Train with REX-RAG from a recipe.

accelerate launch --config_file recipes/accelerate_configs/NAME.yaml \\
    scripts/train.py --config recipes/MODEL/METHOD.yaml [--key value ...]

Every key of the recipe can be overridden on the command line; an unknown key is refused. Questions, retriever and
configuration are checked before the model is loaded.
"""

import os
import sys

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from rex_rag.config import REXRAGConfig
from rex_rag.data.qa import QuestionArguments, load_questions
from rex_rag.progress import ProgressLine
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from rex_rag.trainer import REXRAGTrainer


def main() -> None:
    recipe = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv[:-1] else None
    parser = TrlParser((QuestionArguments, RetrieverArguments, REXRAGConfig, ModelConfig))
    questions, retrieval, config, model = parser.parse_args_and_config()
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set; name a Hub model or a folder in the recipe")

    with config.main_process_first(desc="questions and corpus"):
        train_dataset = load_questions(questions)
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
    checkpoint = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
