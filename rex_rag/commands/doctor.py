"""`rex-rag doctor`: everything that would stop a training run, found before it is started.

Each examination is one function: it adds what it found to a report, and none keeps the next from its turn.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.support.errors import UserError, one_line
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.training.config import REXRAGConfig

_DRY_RUN_SECONDS = 300
_STEPS = 2
# What a dry run has of its own, behind everything that a recipe and a command line say.
_STAND_IN = {
    **{"max_steps": _STEPS, "use_cpu": "true", "bf16": "false", "dtype": "float32", "use_vllm": "false"},
    **{"gradient_checkpointing": "false", "report_to": "none", "push_to_hub": "false", "save_strategy": "no"},
    **{"eval_strategy": "no", "eval_benchmarks": "none", "steps_per_generation": 1, "num_iterations": 1},
    **{"gradient_accumulation_steps": 1, "log_completions": "false", "logging_steps": 1, "max_questions": 16},
}
_BYTES_OF_ADAM = 8  # a parameter: two moments in float32


@dataclass
class Report:
    """What was found: lines of (mark, examination, text)."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def ok(self, name: str, text: str) -> None:
        self.lines.append(("ok", name, text))

    def problem(self, name: str, text: str) -> None:
        self.lines.append(("PROBLEM", name, text))

    def left_out(self, name: str, text: str) -> None:
        self.lines.append(("left out", name, text))

    @property
    def is_well(self) -> bool:
        return not any(mark == "PROBLEM" for mark, _, _ in self.lines)

    def tried(self, name: str, examine: Callable[[], object]) -> Any:
        """What an examination gives; what it raises is a problem, of a user's or of ours."""
        try:
            return examine()
        except Exception as error:
            said = " ".join((one_line(error) or f"{type(error).__name__}: {error}").split())[:400]
            self.problem(name, said)
            return None


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """`rex-rag doctor`: a recipe and this machine."""
    doctor = commands.add_parser(
        "doctor",
        help="find what would stop a training run, before it is started",
        description="Examine a recipe, overrides (--key value) behind it included, and this machine: settings, "
        "versions, files, tokenizer and protocol, questions, retriever, room for checkpoints, login; then train two "
        "steps of a tiny stand-in for the model on the CPU, with everything else real. Every problem is told, each "
        "with its way out; exit code 1 where there is one.",
    )
    doctor.add_argument("recipe", metavar="RECIPE", help="a file, or a name that `rex-rag recipe` lists")
    doctor.add_argument("--no-dry-run", action="store_true", help="leave the two steps out")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from rex_rag.support.recipes import recipe_path

    words = ["--config", str(recipe_path(options.recipe)), *options.overrides]
    report = Report()
    examine_all(words, report, dry_run=not options.no_dry_run)
    width = max(len(name) for _, name, _ in report.lines)
    for mark, name, text in report.lines:
        print(f"{mark:<8}  {name:<{width}}  {text}")
    return 0 if report.is_well else 1


def examine_all(words: list[str], report: Report, *, dry_run: bool) -> None:
    """Everything, cheap things first. What rests on settings that are wrong is left out."""
    from rex_rag.training.preflight import examine, read_settings

    _versions(report)
    settings = report.tried("recipe", lambda: read_settings(words))
    found = None if settings is None else report.tried("recipe", lambda: examine(settings))
    if found is None:
        return
    for name, problems in (("settings", found.settings), ("machine", found.here), ("retriever", found.waiting)):
        for problem in problems:
            report.problem(name, problem)
    parts = None if found.settings else report.tried("settings", lambda: _parsed(words))
    if parts is None:
        return
    report.ok("settings", "every key is known and every value goes with the others")
    questions, _, retriever, config, model = parts
    if not settings.get("use_cpu"):
        report.tried("memory", lambda: _memory(report, words))
    report.tried("disk", lambda: _disk(report, config, model))
    tokenizer = report.tried("tokenizer", lambda: _tokenizer(report, config, model))
    report.tried("questions", lambda: _questions(report, questions))
    if not found.waiting:
        report.tried("retriever", lambda: _retriever(report, retriever, config.retrieval_top_k))
    if not dry_run:
        return
    amiss = [
        name for mark, name, _ in report.lines if mark == "PROBLEM" and name not in ("machine", "disk", "versions")
    ]
    if tokenizer is None or amiss:
        report.left_out("dry run", f"first mend {', '.join(dict.fromkeys(amiss)) or 'the tokenizer'}")
        return
    report.tried("dry run", lambda: _dry_run(report, words, config, tokenizer))


def _parsed(words: list[str]) -> tuple:
    from trl import TrlParser

    from rex_rag.support.errors import from_the_user
    from rex_rag.training.recipe import RECIPE_PARTS

    parser = TrlParser(RECIPE_PARTS, prog="rex-rag doctor", usage=argparse.SUPPRESS)
    with from_the_user():  # use_cpu: whether there is a GPU was told before
        return parser.parse_args_and_config([*words, "--use_cpu", "true", "--bf16", "false"])


def _versions(report: Report) -> None:
    """Whether what is installed is what this package was written for."""
    from packaging.requirements import Requirement

    wrong = []
    for text in importlib.metadata.requires("rex-rag") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is not installed (wanted: {need.specifier})")
            continue
        if not need.specifier.contains(installed, prereleases=True):
            wrong.append(f"{need.name} is {installed} (wanted: {need.specifier})")
    if wrong:
        report.problem("versions", f"{'; '.join(wrong)}; install this package anew")
    else:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl"))
        report.ok("versions", shown)


def _memory(report: Report, words: list[str]) -> None:
    """Whether the plan fits the GPUs that are here, with the recipe's batch shared among them."""
    from rex_rag.planning.memory import GIB
    from rex_rag.planning.plan import made_to_fit, make_plan

    sizes = _gpu_sizes()
    if not sizes:
        report.left_out("memory", "no GPU here; `rex-rag plan RECIPE --gpus N --memory G` says what a run takes")
        return
    try:
        plan, _ = make_plan(words[1], words[2:], gpus=len(sizes), memory=min(sizes) // GIB)
    except UserError as error:
        report.left_out("memory", f"no plan: {error}")
        return
    said = f"{plan.memory.peak / GIB:.1f} of {plan.gpu.memory} GiB planned on each of {counted(len(sizes), 'GPU')}"
    if plan.fits:
        report.ok("memory", said)
        return
    other = made_to_fit(plan)
    way_out = f"{other.flags(plan)} fits" if other else "no setting here makes it fit"
    report.problem("memory", f"{said}; {way_out}; see rex-rag plan")


def _gpu_sizes() -> list[int]:
    """Bytes of each GPU that this process sees."""
    import torch

    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def _disk(report: Report, config: REXRAGConfig, model: Any) -> None:
    """Whether the checkpoints that the run will keep fit, weights and Adam's state of every parameter."""
    folder = Path(model.model_name_or_path)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if not weights or config.save_strategy == "no" or model.use_peft:
        report.left_out("disk", "no full checkpoints of a model in a folder here")
        return
    parameters = _parameters(folder)
    one = weights + _BYTES_OF_ADAM * parameters
    known = config.max_steps > 0 and config.save_steps >= 1
    saves = max(config.max_steps // int(config.save_steps), 1) if known else 1
    count = min(saves, config.save_total_limit or saves)
    output = Path(config.output_dir).resolve()
    place = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(place).free
    said = f"{count} checkpoints of {one / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {place}"
    if count * one > free:
        report.problem("disk", f"{said}: set save_total_limit, or another output_dir")
    else:
        report.ok("disk", said)


def _parameters(folder: Path) -> int:
    from math import prod

    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _tokenizer(report: Report, config: REXRAGConfig, model: Any) -> PreTrainedTokenizerBase:
    """Ends, padding, template, and tags that come back as they went in."""
    from rex_rag.models.adapters import tokenizer_place
    from rex_rag.protocols.inert import ALL_TAGS, THINK_TAGS
    from rex_rag.rollout.agent import AgentScript
    from rex_rag.support.tokenization import open_tokenizer

    place, revision = tokenizer_place(model.model_name_or_path, model.model_revision)
    tokenizer = open_tokenizer(place, revision, trust_remote_code=config.trust_remote_code)
    protocol = config.agent_protocol()
    if tokenizer.eos_token_id is None:
        report.problem("tokenizer", f"{place} names no eos_token, so that no rollout would end; set it and save again")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        report.problem("tokenizer", f"{place} names neither pad_token nor eos_token; set one and save again")
    if tokenizer.chat_template is None:
        report.problem("tokenizer", f"{place} has no chat_template; take an instruct model's, or save one with it")
    for tag in dict.fromkeys([*protocol.stop_strings, *ALL_TAGS]):
        ids = tokenizer(f"one {tag} two", add_special_tokens=False)["input_ids"]
        if tag not in tokenizer.decode(ids, skip_special_tokens=False):
            report.problem("tokenizer", f"{tag} does not come back from the tokens of {place}; use another protocol")
    if report.is_well or not any(name == "tokenizer" and mark == "PROBLEM" for mark, name, _ in report.lines):
        script = AgentScript(protocol, tokenizer, config.rollout_budget(), config.chat_template_kwargs)
        prompt = script.encode("who?")
        said = f"{len(tokenizer):,} tokens, tags whole, a prompt of {len(prompt)} tokens and the question"
        [text] = script.decode([prompt])
        if text.rfind(THINK_TAGS[0]) > text.rfind(THINK_TAGS[1]):
            said += f"; the chat template opens {THINK_TAGS[0]}, so that the model begins inside a thought"
        report.ok("tokenizer", said)
    return tokenizer


def _questions(report: Report, questions: Any) -> None:
    from rex_rag.data.qa import load_questions

    loaded = load_questions(questions)
    report.ok("questions", f"{len(loaded):,}, for example {loaded[0]['question']!r}")


def _retriever(report: Report, arguments: Any, top_k: int) -> None:
    from rex_rag.retrieval.load import load_retriever

    retriever = load_retriever(arguments)
    try:
        retriever.check()
        [found] = retriever.search(["Who wrote Hamlet?"], top_k)
        report.ok("retriever", f"{retriever.description}; {len(found)} passages for a question")
    finally:
        retriever.close()


def save_stand_in(folder: str, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """A model of a few thousand parameters with this tokenizer, into a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    # A Llama, since beside a Qwen2 model AutoTokenizer reads every tokenizer as Qwen2's.
    shape = LlamaConfig(
        **sizes,
        **heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dry_run(report: Report, words: list[str], config: REXRAGConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two steps of a model of a few thousand parameters with this tokenizer, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        save_stand_in(f"{scratch}/model", tokenizer, config.max_sequence_length)
        own = {
            **_STAND_IN,
            "model_name_or_path": f"{scratch}/model",
            "output_dir": f"{scratch}/run",
            "per_device_train_batch_size": config.num_generations,
            "max_turn_tokens": min(config.max_turn_tokens, 32),
        }
        arguments = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, "-m", "rex_rag.train", *words, *arguments],
            capture_output=True,
            text=True,
            timeout=_DRY_RUN_SECONDS,
        )
        if done.returncode:
            last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no word")
            raise UserError(f"exit code {done.returncode}: {last}")
        rows = [json.loads(line) for line in Path(scratch, "run", "log.jsonl").read_text().splitlines()]
        trained = [row for row in rows if "loss" in row]
        searches = sum(row.get("searches/mean", 0.0) for row in trained) / len(trained)
        report.ok("dry run", f"{len(trained)} steps of a stand-in, {searches:.2g} searches a rollout, nothing amiss")
