"""What a run is made of, as its checkpoints remember it, and what has changed when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sized
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.support.differences import difference, paired
from rex_rag.support.errors import UserError
from rex_rag.training.checkpoints import STATE_FILE

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from rex_rag.training.config import REXRAGConfig

SETTINGS_KEY = "settings"  # in a checkpoint's own state

# Settings that say nothing of what is trained: where things are written, logged, pushed, evaluated, and by what means.
_QUIET = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "debug"),
    *("disable_tqdm", "prediction_loss_only", "num_completions_to_print", "num_generations_eval", "do_train"),
    *("do_eval", "do_predict", "local_rank", "use_cpu", "skip_memory_metrics", "batch_eval_metrics", "label_names"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "include_for_metrics"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "rollout_schedule"),
    *("per_device_eval_batch_size", "include_num_input_tokens_seen", "trust_remote_code", "model_init_kwargs"),
)
_QUIET_PREFIXES = (
    *("log", "eval_", "save_", "hub_", "push_to_hub", "trackio_", "dataloader_", "ddp_", "fsdp", "deepspeed"),
    *("vllm_server_", "vllm_group_port", "vllm_gpu_memory", "torch_empty_cache", "collapse_", "watchdog_"),
)
# What the agent's settings hold, read from where these point.
_OF_THE_AGENT = ("prompt_template", "feedback_text", "exploration_prompts", "chat_template_kwargs")
# A checkpoint's optimizer brings its own of these, whatever a recipe says, and its weights their model.
_HELD = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "model")


def run_settings(
    args: REXRAGConfig, model: str, questions: Dataset | IterableDataset | None, retriever: str
) -> dict[str, Any]:
    """What a run is made of, JSON-able.

    Args:
        model: folder or Hub name of what is trained.
        questions: the training set; a stream is not read.
        retriever: its description.
    """
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name not in (*_QUIET, *_OF_THE_AGENT) and not name.startswith(_QUIET_PREFIXES)
    }
    settings |= {
        "model": "/".join(Path(model).parts[-2:]) if Path(model).is_dir() else model,
        "retriever": retriever,
        "exploration_prompts": hashlib.sha256("\n".join(args.exploration_pool()).encode()).hexdigest(),
        "agent": {name: value for name, value in asdict(args.agent_settings()).items() if name != "method"},
    }
    if isinstance(questions, Sized):
        settings["questions"] = {"rows": len(questions), "sha256": _questions_sha256(questions)}
    return json.loads(json.dumps(settings, default=str))


def _questions_sha256(questions: Dataset) -> str:
    """Over questions and answers, in their order."""
    digest = hashlib.sha256()
    for rows in questions.select_columns(["question", "golden_answers"]).iter(1000):
        digest.update(json.dumps([rows["question"], rows["golden_answers"]], ensure_ascii=False).encode())
    return digest.hexdigest()


def recorded_settings(checkpoint: str) -> dict[str, Any] | None:
    """What a checkpoint remembers; `None` of one that an earlier version wrote."""
    return json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8")).get(SETTINGS_KEY)


def changed_settings(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another than when a checkpoint was written, one line each: then against now.

    Raises:
        UserError: where a setting changed that a resumed run takes from the checkpoint, so that the new value would be
            written down and have no effect.
    """
    pairs = [(name, then, value) for name, then, value in paired(recorded, now, "") if then != value]
    held = [difference(*pair) for pair in pairs if pair[0] in _HELD]
    if held:
        raise UserError(
            f"a resumed run takes these from its checkpoint, so a change has no effect: {'; '.join(held)}. Set them "
            "back, or start a new run from the checkpoint's weights (model_name_or_path)"
        )
    return [difference(*pair) for pair in pairs]
