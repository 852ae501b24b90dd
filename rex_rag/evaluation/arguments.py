"""What an evaluation is asked to do, as the command line and recipes say it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rex_rag.agent import AgentSettings
from rex_rag.evaluation.benchmarks import benchmark_specs
from rex_rag.evaluation.methods import AGENTS
from rex_rag.evaluation.methods.agents import REXRAG, SearchR1
from rex_rag.models.endpoint import DEFAULT_KEY_VARIABLE, EndpointOptions, check_endpoint_url
from rex_rag.models.language_model import BACKENDS, ENDPOINT, TRANSFORMERS, VLLM, ModelOptions
from rex_rag.protocols.chat import read_settings
from rex_rag.retrieval.load import BM25, RetrieverArguments
from rex_rag.rollout.script import RolloutBudget
from rex_rag.support.errors import UserError

AUTO = "auto"
SCHEDULES = ("auto", "lock_step")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_COUNTS = (
    "samples",
    "batch_size",
    "top_k",
    "max_turns",
    "max_turn_tokens",
    "max_observation_tokens",
    "max_sequence_length",
    "tensor_parallel_size",
    "endpoint_attempts",
    "endpoint_concurrency",
)
_POSITIVE_NUMBERS = ("endpoint_timeout", "wait_minutes")


@dataclass
class EvaluationArguments:
    """One run: a model, a method, benchmarks, and where the results go.

    Raises:
        ValueError: naming everything that is out of range, missing or does not go together.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the model; with --endpoint, the name it is served under."},
    )
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to answer, separated by spaces or commas: nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, "
            "musique, bamboogle (from the Hub), NAME=FILE.jsonl, a file, or a .yaml that describes your own set."
        },
    )
    method: str = field(default="rex_rag", metadata={"help": "Method of the comparison, by name or module:Class."})
    output: str | None = field(default=None, metadata={"help": "Directory of the run; an unfinished one goes on."})
    subset: int | None = field(
        default=None,
        metadata={"help": "Only so many questions of each benchmark, chosen by hash of seed and question."},
    )
    subset_seed: int = field(default=0, metadata={"help": "Names one subset."})
    benchmark_revision: str | None = field(
        default=None, metadata={"help": "Revision of the Hub's repository of the seven benchmarks."}
    )
    samples: int = field(default=1, metadata={"help": "Attempts at each question; more than one needs a temperature."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws; nothing is drawn at temperature 0."})
    batch_size: int = field(
        default=64,
        metadata={"help": "Questions that are run together, and what a kill can cost; part of the protocol."},
    )
    backend: str = field(
        default=AUTO,
        metadata={
            "help": "transformers, vllm (offline) or endpoint; auto: endpoint if one is named, else transformers."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model's Hub repository."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the tokenizer, if it is not where the model is."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "transformers: cpu, cuda:0, …; default, a GPU if any."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "vllm: share of a GPU's memory it may take."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs that share one model."})
    enforce_eager: bool = field(default=False, metadata={"help": "vllm: compile nothing; starts sooner, runs slower."})
    endpoint: str | None = field(
        default=None,
        metadata={"help": "Base URL of an OpenAI-compatible server, for example http://127.0.0.1:8001/v1."},
    )
    endpoint_timeout: float = field(default=600.0, metadata={"help": "Seconds one attempt at a completion may take."})
    endpoint_attempts: int = field(default=6, metadata={"help": "Attempts at a completion before it is an error."})
    endpoint_concurrency: int = field(default=32, metadata={"help": "Requests under way at once."})
    endpoint_key_variable: str = field(
        default=DEFAULT_KEY_VARIABLE, metadata={"help": "Environment variable that holds the key, if there is one."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Text file with the method's first prompt; `none`, the default, is the built-in one."},
    )
    feedback_text: str | None = field(
        default=None,
        metadata={"help": "Text file with what a search agent is told after an invalid action; default: built-in."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON of what the model's chat template is rendered with, as in training, for example "
            '{"enable_thinking": false} for Qwen3.'
        },
    )
    protocol: str | None = field(
        default=None,
        metadata={"help": "How a search agent acts: search_r1, auto_refine, tool_calls, or module:Class."},
    )
    agent_tools: list[str] | None = field(
        default=None, metadata={"help": "What a search agent may call: search, read, or module:function."}
    )
    schedule: str = field(
        default=AUTO,
        metadata={"help": "auto streams through vllm and endpoints; lock_step sends whole batches, turn by turn."},
    )
    top_k: int | None = field(default=None, metadata={"help": "Passages a search."})
    max_turns: int | None = field(
        default=None, metadata={"help": "Turns that may search; one last generation follows."}
    )
    max_turn_tokens: int | None = field(default=None, metadata={"help": "Longest generation of a turn, in tokens."})
    max_observation_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest observation, in tokens, tags included."},
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Prompt and completion in all, in tokens."}
    )
    judge_endpoint: str | None = field(
        default=None,
        metadata={
            "help": "Base URL of an OpenAI-compatible server with the model that judges the answers to open questions "
            "once all are there; a metric beside exact match. A finished run may be judged later."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The name that the judge is served under."})
    judge_key_variable: str = field(
        default=DEFAULT_KEY_VARIABLE, metadata={"help": "Environment variable that holds the judge's key."}
    )
    wait_minutes: float = field(
        default=60.0,
        metadata={"help": "How long to wait for other processes while none of them finishes a batch."},
    )

    def __post_init__(self) -> None:
        self.benchmarks = benchmark_specs(self.benchmarks)
        self._take_agent_settings()
        for name in ("temperature", "gpu_memory_utilization", *_POSITIVE_NUMBERS):
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(self, name, float(value))
        problems = [*self._missing(), *self._value_problems(), *self._backend_problems()]
        try:
            self.chat_template_kwargs = read_settings(self.chat_template_kwargs) or None
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def _take_agent_settings(self) -> None:
        """Fill what is left open from the model's agent.json, for a search agent that has one, or by the defaults.

        `differences` then says where a flag is not what the model was trained with.
        """
        where = self.tokenizer or self.model
        has_folder = self.chosen_backend != ENDPOINT or (where is not None and Path(where).is_dir())
        self._agent = None
        if self.method in AGENTS and self.model and has_folder:
            self._agent = AgentSettings.load(
                self.model if self.chosen_backend != ENDPOINT else where, self.model_revision
            )
        agent = self._agent or AgentSettings()
        if self.method == REXRAG.name and agent.method == SearchR1.name:  # the same rollouts under the right name
            self.method = agent.method
        known = {"protocol": agent.protocol, "agent_tools": list(agent.tools), **asdict(agent.budget)}
        self.differences: list[str] = []
        for name, value in known.items():
            given = getattr(self, name)
            if given is None:
                setattr(self, name, value)
            elif self._agent is not None and given != value:
                self.differences.append(f"{name} is {given} here, {value} in training")
        if self._agent is not None:
            for name, trained in (("prompt_template", agent.template), ("feedback_text", agent.feedback)):
                given = getattr(self, name)
                if given is not None and Path(given).is_file() and Path(given).read_text(encoding="utf-8") != trained:
                    self.differences.append(f"{name} is another text here than in training")

    def method_options(self) -> dict[str, Any]:
        """What `make_method` is given beside the texts: a search agent's protocol and tools."""
        return {"protocol": self.protocol, "tools": self.agent_tools} if self.method in AGENTS else {}

    @property
    def chosen_backend(self) -> str:
        """`backend` with `auto` resolved."""
        if self.backend != AUTO:
            return self.backend
        return ENDPOINT if self.endpoint else TRANSFORMERS

    def budget(self) -> RolloutBudget:
        return RolloutBudget(**{limit.name: getattr(self, limit.name) for limit in fields(RolloutBudget)})

    def model_options(self, process: int = 0) -> ModelOptions:
        """Args: process: number of this process on its machine, which chooses its GPU."""
        endpoint = None
        if self.endpoint:
            endpoint = EndpointOptions(
                url=self.endpoint,
                model=self.model,
                timeout=self.endpoint_timeout,
                attempts=self.endpoint_attempts,
                concurrency=self.endpoint_concurrency,
                key_variable=self.endpoint_key_variable,
            )
        return ModelOptions(
            name=self.model,
            backend=self.chosen_backend,
            revision=self.model_revision,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=self.device,
            max_length=self.max_sequence_length,
            temperature=self.temperature,
            seed=self.seed,
            endpoint=endpoint,
            chat_template_kwargs=read_settings(self.chat_template_kwargs) or None,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            enforce_eager=self.enforce_eager,
            schedule=self.schedule,
            process=process,
        )

    def judge_options(self) -> EndpointOptions | None:
        """Who judges, `None` if nobody; patience and concurrency are those of `endpoint_*`."""
        if self.judge_endpoint is None:
            return None
        return EndpointOptions(
            url=self.judge_endpoint,
            model=self.judge_model,
            timeout=self.endpoint_timeout,
            attempts=self.endpoint_attempts,
            concurrency=self.endpoint_concurrency,
            key_variable=self.judge_key_variable,
        )

    def prompt_text(self) -> str | None:
        """The text of `prompt_template`, `None` for the method's own."""
        if self.prompt_template is None:
            return self._agent.template if self._agent is not None else None
        return Path(self.prompt_template).read_text(encoding="utf-8")

    def further_texts(self) -> dict[str, str]:
        """What takes the place of the method's further prompts, by name."""
        if self.feedback_text is None:
            trained = self._agent.feedback if self._agent is not None else None
            return {} if trained is None else {"feedback": trained}
        return {"feedback": Path(self.feedback_text).read_text(encoding="utf-8")}

    def _missing(self) -> Iterator[str]:
        if not self.model:
            yield "model is not set; name a Hub model or a folder, or with endpoint the name it is served under"
        if not self.benchmarks:
            yield "benchmarks is empty; name at least one, for example nq or mine=questions.jsonl"
        if not self.output:
            yield "output is not set; name the directory of the run"
        for name in ("prompt_template", "feedback_text"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                yield f"{name}={value!r} is no file here ({Path.cwd()}); correct the path"

    def _value_problems(self) -> Iterator[str]:
        for name in _COUNTS + (("subset",) if self.subset is not None else ()):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name}={value!r}; it must be an integer of at least 1"
        for name in _POSITIVE_NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < float("inf"):
                yield f"{name}={value!r}; it must be a finite number above 0"
        for name in ("seed", "subset_seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                yield f"{name}={value!r}; it must be an integer"
        if not isinstance(self.temperature, float) or not 0 <= self.temperature < float("inf"):
            yield f"temperature={self.temperature!r}; it must be a finite number of at least 0"
        elif self.temperature == 0 and isinstance(self.samples, int) and self.samples > 1:
            yield f"samples={self.samples} at temperature 0 are all equal; set a temperature, for example 1.0"
        if not isinstance(self.gpu_memory_utilization, float) or not 0 < self.gpu_memory_utilization <= 1:
            yield f"gpu_memory_utilization={self.gpu_memory_utilization!r}; it must be above 0 and at most 1"
        if self.schedule not in SCHEDULES:
            yield f"schedule={self.schedule!r}; it must be one of {', '.join(SCHEDULES)}"
        if self.dtype not in DTYPES:
            yield f"dtype={self.dtype!r}; it must be one of {', '.join(DTYPES)}"
        names = [_name(entry) for entry in self.benchmarks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            yield f"benchmarks names {', '.join(repeated)} more than once; name each once"

    def _backend_problems(self) -> Iterator[str]:
        if self.backend not in (AUTO, *BACKENDS):
            yield f"backend={self.backend!r}; it must be one of {', '.join((AUTO, *BACKENDS))}"
            return
        if self.chosen_backend == ENDPOINT and not self.endpoint:
            yield "backend='endpoint' needs endpoint, the server's base URL, for example http://127.0.0.1:8001/v1"
        if self.endpoint and self.chosen_backend != ENDPOINT:
            yield f"endpoint={self.endpoint!r} and backend={self.backend!r} do not go together; leave one of them out"
        if bool(self.judge_endpoint) != bool(self.judge_model):
            yield (
                f"judge_endpoint={self.judge_endpoint!r} and judge_model={self.judge_model!r} belong together; name "
                "both or neither"
            )
        for url in filter(None, (self.endpoint, self.judge_endpoint)):
            try:
                check_endpoint_url(url)
            except ValueError as error:
                yield str(error)
        if self.tensor_parallel_size != 1 and self.chosen_backend != VLLM:
            yield f"tensor_parallel_size={self.tensor_parallel_size} is for vllm, not for {self.chosen_backend}"


@dataclass
class SearchArguments(RetrieverArguments):
    """`RetrieverArguments` that may be left out, for methods that never search."""

    def __post_init__(self) -> None:
        self.is_given = not (self.retriever in ([BM25], BM25) and not self.corpus)
        if self.is_given:
            super().__post_init__()


def _name(entry: Any) -> str:
    return entry.partition("=")[0] if isinstance(entry, str) else str(entry.get("name", entry))
