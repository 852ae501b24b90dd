"""Models under evaluation, opened by arguments: transformers in this process, vLLM offline, or a served endpoint.

Invariant: what a batch of prompts yields depends on the model, the prompts and the key given to `start_batch` alone:
draws are seeded from (seed, key, call, row), so that a batch comes out the same in any process and after any restart.
Exactly so for transformers on CPU; engines that schedule by time (vLLM, servers) may round differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.models.endpoint import EndpointOptions, in_order
from rex_rag.models.files import (
    HUB_NAME,
    adapter_base,
    check_model,
    check_tokenizer,
    is_adapter,
    load_causal_lm,
    refuse_nonfinite,
)
from rex_rag.models.identity import TokenizerFiles, model_identity, tokenizer_sha256
from rex_rag.models.served_model import EndpointModel, EndpointStream
from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import open_tokenizer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation, Generator, Stream

TRANSFORMERS, VLLM, ENDPOINT = "transformers", "vllm", "endpoint"
BACKENDS = (TRANSFORMERS, VLLM, ENDPOINT)
# Both engines and servers take seeds of 32 bits with a sign.
_SEED_BITS = 31


class ModelError(UserError):
    """A model cannot be opened; the message names it, the reason and the way out."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it generates.

    name: a Hub name, a folder, or the name under which an endpoint serves it. revision: of the Hub's repository.
    tokenizer: where it lies if not with the model. dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
    device: for transformers; default, this process's GPU if there is one. max_length: prompt and completion in tokens,
    as vLLM reserves room for them. temperature: 0 decodes greedily. chat_template_kwargs: what its chat template is
    rendered with. enforce_eager: vLLM compiles nothing, which starts
    sooner and runs slower. schedule: `auto` streams through vLLM and endpoints, `lock_step` sends whole batches.
    process: number of this process on its machine.
    """

    name: str
    backend: str = TRANSFORMERS
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str | None = None
    max_length: int | None = None
    temperature: float = 0.0
    seed: int = 0
    endpoint: EndpointOptions | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    schedule: str = "auto"
    process: int = 0


class LanguageModel(ABC):
    """A model that continues token ids. Made by `open_model`."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self._key: tuple[object, ...] = ()
        self._calls = 0
        self._generators: dict[tuple[str, ...], Generator] = {}

    def generator(self, stop_strings: tuple[str, ...]) -> Generator:
        """The backend that ends a row after any of the stop strings; the same object for the same strings."""
        stop_strings = tuple(stop_strings)
        if stop_strings not in self._generators:
            self._generators[stop_strings] = self._make_generator(stop_strings)
        return self._generators[stop_strings]

    @property
    def max_length(self) -> int | None:
        """The longest prompt and completion together that the model takes, in tokens, where that is known."""
        return None

    @property
    def stream(self) -> Stream | None:
        """The engine to stream through; `None` for one that takes whole batches only."""
        return None

    def start_batch(self, *key: object) -> None:
        """Seed the draws of what follows from the run's seed and this key."""
        self._key = key
        self._calls = 0

    def describe(self) -> dict[str, Any]:
        """What the run card says of the model; JSON-able, and without a path or address of this machine."""
        return {
            "backend": self.options.backend,
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "chat_template_kwargs": self.options.chat_template_kwargs,
            **self._describe(),
        }

    def close(self) -> None:
        """Give memory and connections back."""
        self._generators.clear()

    def key_seed(self, key: tuple[int, ...]) -> int:
        """The seed of a streamed row: it does not depend on what is under way beside it."""
        return derived_seed(self.options.seed, *self._key, "stream", *key)

    def row_seed(self, row: int) -> int:
        """The seed of a row of the current call."""
        return derived_seed(self.options.seed, *self._key, self._calls, row)

    @abstractmethod
    def _make_generator(self, stop_strings: tuple[str, ...]) -> Generator: ...

    @abstractmethod
    def _describe(self) -> dict[str, Any]: ...


class _RowGenerator:
    """A `Generator` over an engine that takes any rows at any time; counts its model's calls."""

    equal_rows = False

    def __init__(self, model: _EngineModel, stop_strings: tuple[str, ...]) -> None:
        self._model = model
        self._stop_strings = stop_strings

    def generate(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        self._model._calls += 1
        return self._model._generate(prompt_ids, max_new_tokens, self._stop_strings)


class _EngineModel(LanguageModel):
    def _make_generator(self, stop_strings: tuple[str, ...]) -> Generator:
        return _RowGenerator(self, stop_strings)

    @abstractmethod
    def _generate(
        self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: tuple[str, ...]
    ) -> list[Generation]: ...


class TransformersModel(LanguageModel):
    """`AutoModelForCausalLM` in this process. A folder that holds a PEFT adapter is loaded with its base model."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        import torch

        self.tokenizer = load_tokenizer(options)
        device = options.device or (f"cuda:{options.process}" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ModelError(f"device={device!r}, but torch sees no GPU here; use cpu, or leave it out")
        self._model = load_causal_lm(options.name, revision=options.revision, dtype=options.dtype)
        self._model.to(device).eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def max_length(self) -> int | None:
        return getattr(self._model.config, "max_position_embeddings", None)

    def start_batch(self, *key: object) -> None:
        import torch

        super().start_batch(*key)
        torch.manual_seed(derived_seed(self.options.seed, *key))

    def close(self) -> None:
        super().close()
        self._model = None

    def _make_generator(self, stop_strings: tuple[str, ...]) -> Generator:
        from rex_rag.models.generation import TransformersGenerator

        return TransformersGenerator(
            self._model,
            self.tokenizer,
            temperature=self.options.temperature,
            eos_token_ids=end_token_ids(self.tokenizer, self._model.generation_config),
            stop_strings=stop_strings,
        )

    def _describe(self) -> dict[str, Any]:
        identity = model_identity(self.options.name, self.options.revision)
        # Private, and the only place where transformers says which implementation it chose.
        attention = self._model.config._attn_implementation
        device = self._model.device.type
        return {**identity, "dtype": _plain(self._model.dtype), "device": device, "attention": attention}


class VLLMModel(_EngineModel):
    """vLLM's offline engine, in this process unless VLLM_ENABLE_V1_MULTIPROCESSING=1 is set.

    Open it before a `bm25s` retriever: vLLM's CPU build cannot start once llvmlite is loaded, which that brings in. Of
    several processes on one machine each takes the next `tensor_parallel_size` GPUs.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        if importlib.util.find_spec("vllm") is None:
            raise ModelError("vLLM is not installed; install rex-rag[gpu], or use the backend transformers")
        if is_adapter(options.name):
            raise ModelError(
                f"{options.name} holds an adapter, which vLLM evaluates only once it is merged into its base model "
                "(peft: merge_and_unload, save_pretrained); merge it, or use the backend transformers"
            )
        self.tokenizer = load_tokenizer(options)
        _choose_gpus(options)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # In one process the engine's batches follow from the requests alone, not from when they arrive.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import torch
        from vllm import LLM

        self._engine = LLM(
            model=options.name,
            revision=options.revision,
            tokenizer=options.tokenizer or options.name,
            tokenizer_revision=None if options.tokenizer else options.revision,
            dtype=options.dtype,
            max_model_len=options.max_length,
            tensor_parallel_size=options.tensor_parallel_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            seed=options.seed % 2**_SEED_BITS,
            disable_log_stats=True,
            # vLLM 0.31 on CPU cannot take back the draw of a seeded row whose prompt it cut into chunks.
            enable_chunked_prefill=None if torch.cuda.is_available() else False,
        )
        config = self._engine.llm_engine.model_config
        self._longest = config.max_model_len
        self._dtype = _plain(config.dtype)
        self._end_ids = end_token_ids(self.tokenizer, config.try_get_generation_config())

    @property
    def stream(self) -> Stream | None:
        from rex_rag.models.vllm_stream import VLLMStream

        if self.options.schedule == "lock_step":
            return None
        return VLLMStream(
            lambda: contextlib.nullcontext(self._engine),
            temperature=self.options.temperature,
            max_length=self._longest,
            end_ids=self._end_ids,
            seed=self.key_seed,
        )

    def close(self) -> None:
        super().close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()

    def _generate(
        self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: tuple[str, ...]
    ) -> list[Generation]:
        from vllm import SamplingParams

        from rex_rag.models.generation import Generation

        parameters = [
            SamplingParams(
                temperature=self.options.temperature,
                max_tokens=max(1, min(max_new_tokens, self._longest - len(prompt))),
                stop=list(stop_strings),
                include_stop_str_in_output=True,
                stop_token_ids=self._end_ids,
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
                seed=self.row_seed(row) if self.options.temperature else None,
            )
            for row, prompt in enumerate(prompt_ids)
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompt_ids]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        return [Generation(list(output.outputs[0].token_ids)) for output in outputs]

    def _describe(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        identity = model_identity(self.options.name, self.options.revision)
        return {**identity, "dtype": self._dtype, "device": current_platform.device_type}


class ServedModel(_EngineModel):
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        if options.endpoint is None:
            raise ModelError(f"the model {options.name!r} is to be asked at an endpoint, but no address is given")
        self.tokenizer = load_tokenizer(options)
        self._served = EndpointModel(options.endpoint, self.tokenizer, temperature=options.temperature)

    @property
    def max_length(self) -> int | None:
        return self._served.max_length

    @property
    def stream(self) -> Stream | None:
        return None if self.options.schedule == "lock_step" else EndpointStream(self._served, self.key_seed)

    def close(self) -> None:
        super().close()
        self._served.close()

    def _generate(
        self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: tuple[str, ...]
    ) -> list[Generation]:
        rows = enumerate(prompt_ids)  # one request a row, so that each has its own seed and limit
        return in_order([self.submit(ids, max_new_tokens, stop_strings, self.row_seed(row)) for row, ids in rows])

    def submit(
        self, prompt: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], seed: int
    ) -> Future[Generation]:
        """Continue one row, whatever becomes of others."""
        return self._served.submit(prompt, max_new_tokens, stop_strings, seed)

    def _describe(self) -> dict[str, Any]:
        return self._served.describe()


def open_model(options: ModelOptions) -> LanguageModel:
    """Open the model that the options name.

    Raises:
        ModelError: for an unknown backend, a missing library or GPU, a model that cannot be evaluated this way.
        ModelFileError: for weights that cannot be read, or are not finite.
        OSError: for a model that is not there, and an endpoint that does not answer.
    """
    kinds: dict[str, Any] = {TRANSFORMERS: TransformersModel, VLLM: VLLMModel, ENDPOINT: ServedModel}
    if options.backend not in kinds:
        raise ModelError(f"backend={options.backend!r}; it must be one of {', '.join(BACKENDS)}")
    if options.backend != ENDPOINT:
        refuse_nonfinite(options.name)
    return kinds[options.backend](options)


def check_name(options: ModelOptions) -> None:
    """Refuse a model, or its tokenizer, that is neither a folder here nor can be a name on the Hub; loads nothing.

    An endpoint may serve its model under any name, of which the tokenizer's place alone is looked at.

    Raises:
        ModelError: naming the setting.
    """
    named = {"tokenizer": options.tokenizer, "model": options.name}
    if options.backend == ENDPOINT:
        named = {"tokenizer": options.tokenizer or options.name}
    for setting, name in named.items():
        if name is None or Path(name).is_dir() or HUB_NAME.fullmatch(name):
            continue
        if Path(name).is_file():
            raise ModelError(f"{setting}={name!r} is a file; name the folder that holds it")
        raise ModelError(
            f"{setting}={name!r}: there is no such folder here ({Path.cwd()}), and it is no Hub name either, which is "
            f"of the form OWNER/NAME; {'set' if setting == 'tokenizer' else 'correct'} {setting}"
        )


def check_files(options: ModelOptions) -> None:
    """Refuse a model, or its tokenizer, whose files are damaged, as far as headers tell; loads nothing.

    Raises:
        ModelFileError: naming the file.
    """
    if options.backend != ENDPOINT:
        check_model(options.name, options.revision)
    if options.tokenizer or options.backend == ENDPOINT:
        check_tokenizer(options.tokenizer or options.name)


def stored_max_length(options: ModelOptions) -> int | None:
    """`LanguageModel.max_length` as far as a model's settings tell it, without its weights.

    vLLM, which may stretch positions, and endpoints look for themselves.
    """
    if options.backend != TRANSFORMERS:
        return None
    from transformers import AutoConfig

    name, revision = options.name, options.revision
    try:
        if is_adapter(name):
            name, revision = adapter_base(Path(name))
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        return getattr(config, "max_position_embeddings", None)
    except Exception:  # of many kinds, as below; what is wrong there, opening the model says
        return None


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left.

    Raises:
        ModelError: naming where it was looked for.
    """
    where = options.tokenizer or options.name
    try:
        revision = None if options.tokenizer else options.revision
        return open_tokenizer(where, revision)
    # Libraries below raise KeyError, TypeError and errors of their own for a tokenizer that is not there or broken.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not Path(where).is_dir():
            setting = "tokenizer" if options.tokenizer or options.backend == ENDPOINT else "model"
            raise ModelError(
                f"{setting}={where!r}: there is no such folder here ({Path.cwd()}), and under that name the Hub gives "
                f"no tokenizer ({reason}); {'set' if setting == 'tokenizer' else 'correct'} {setting}"
            ) from error
        raise ModelError(
            f"no tokenizer can be loaded from {where!r} ({reason}); set `tokenizer` to a folder or a Hub name that "
            "holds the model's"
        ) from error


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """The ids that end a row: the tokenizer's end token and those that the model names, ascending.

    generation_config: the model's, or a mapping, which is what vLLM gives.
    """
    if isinstance(generation_config, Mapping):
        named = generation_config.get("eos_token_id")
    else:
        named = getattr(generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])}
    return sorted(token for token in found if token is not None)


def derived_seed(*parts: object) -> int:
    """A seed of 31 bits from a tuple of plain values."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def confirmed_tokenizer_sha256(options: ModelOptions, expected: str | None) -> str:
    """The hash of the options' tokenizer. One that is as expected is recognised without torch, which takes seconds."""
    # The class that a tokenizer's settings name may read its files otherwise, but not to the same hash.
    with contextlib.suppress(Exception):
        if tokenizer_sha256(TokenizerFiles(Path(options.tokenizer or options.name))) == expected:
            return expected
    return tokenizer_sha256(load_tokenizer(options))


def _choose_gpus(options: ModelOptions) -> None:
    """Let vLLM see this process's GPUs alone, before it looks; the environment may name a selection already."""
    if options.process == 0 and options.tensor_parallel_size == 1 and "LOCAL_RANK" not in os.environ:
        return
    import torch

    if not torch.cuda.is_available():
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    first = options.process * options.tensor_parallel_size
    chosen = devices[first : first + options.tensor_parallel_size]
    if len(chosen) < options.tensor_parallel_size:
        raise ModelError(
            f"process {options.process} needs {options.tensor_parallel_size} GPUs from number {first} on, but there "
            f"are {len(devices)}; start fewer processes, or lower tensor_parallel_size"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
