"""Backends: transformers in process, and endpoints that are real HTTP servers with a real tiny model behind them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from parts import PASSAGES, STOP_STRINGS
from transformers import GenerationConfig

from rex_rag.evaluation.methods import Toolbox, make_method
from rex_rag.evaluation.records import Question
from rex_rag.models import endpoint
from rex_rag.models import language_model as models
from rex_rag.models.endpoint import EndpointError, EndpointOptions, check_endpoint_url
from rex_rag.models.identity import model_identity, tokenizer_sha256
from rex_rag.models.language_model import (
    ModelError,
    ModelOptions,
    check_name,
    confirmed_tokenizer_sha256,
    derived_seed,
    end_token_ids,
    load_tokenizer,
    open_model,
    stored_max_length,
)
from rex_rag.models.served_model import missing_stop
from rex_rag.protocols import SearchR1
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.script import RolloutBudget
from tests.evaluation.tiny_run import make_tiny_world
from tests.odd_servers import answering, fixed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def greedy(world):
    return open_model(ModelOptions(str(world.model), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def prompts(greedy):
    """Two prompts of different lengths: after the first the model writes an action, after the second none."""
    actions = [token for token in greedy.tokenizer.get_vocab() if token.startswith("<search> ")]
    first = greedy.tokenizer([f"Question: who? {action}" for action in actions])["input_ids"]
    written = greedy.generator(STOP_STRINGS).generate(first, 16)
    texts = [greedy.tokenizer.decode(row.ids) for row in written]
    [found, *_] = [
        ids for ids, text in zip(first, texts, strict=True) if "<search>" in text and text.endswith("</search>")
    ]
    return [found, greedy.tokenizer("Question: where is the friend of the mentor?")["input_ids"]]


class PlainServer:
    """OpenAI's completions, text in and text out, by a real model; what it is told to answer first comes first.

    takes_ids: whether prompts may be token ids, which are then counted as such. returns_ids: as vLLM does.
    """

    def __init__(self, model, *, takes_ids: bool, returns_ids: bool = False) -> None:
        self.model = model
        self.takes_ids, self.returns_ids = takes_ids, returns_ids
        self.first: list[tuple[int, dict[str, str], str]] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    def answer(self, body: dict) -> tuple[int, dict[str, str], str]:
        tokenizer = self.model.tokenizer
        unknown = set(body) - {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed"}
        if unknown and not self.returns_ids:
            return 400, {}, json.dumps({"error": {"message": f"Unrecognized request argument: {sorted(unknown)[0]}"}})
        prompt = body["prompt"]
        if not isinstance(prompt, str) and not self.takes_ids:
            return 422, {}, json.dumps({"error": {"message": "prompt must be a string"}})
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        stop = tuple(body.get("stop", ()))
        [generation] = self.model.generator(stop).generate([ids], body["max_tokens"])
        text = tokenizer.decode(generation.ids)
        stopped = [string for string in stop if string in text]
        if not self.returns_ids:  # the stop string is cut off, as the format has it
            for string in stopped:
                text = text[: text.index(string)]
        choice = {"index": 0, "text": text, "finish_reason": "stop" if stopped else "length"}
        if self.returns_ids:
            choice |= {"token_ids": generation.ids, "prompt_token_ids": ids}
        return 200, {}, json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})


@contextlib.contextmanager
def serving(server: PlainServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, headers: dict[str, str], text: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            listed = {"data": [{"id": "tiny", "max_model_len": 300}]} if self.path == "/v1/models" else {}
            self.reply(200 if listed else 404, {}, json.dumps(listed))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.keys.append(self.headers.get("Authorization"))
                server.bodies.append(body)
                server.busy += 1
                server.busiest = max(server.busiest, server.busy)
                first = server.first.pop(0) if server.first else None
            try:
                time.sleep(0.02)
                with server.lock:
                    answered = first or server.answer(body)
            finally:
                with server.lock:
                    server.busy -= 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had no patience
                self.reply(*answered)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def open_endpoint(url: str, world, **options):
    model = {name: options.pop(name) for name in ("temperature", "seed", "tokenizer") if name in options}
    return open_model(
        ModelOptions(
            "tiny",
            backend="endpoint",
            endpoint=EndpointOptions(url, **{"model": "tiny", **options}),
            **{"tokenizer": str(world.model), **model},
        )
    )


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)


def test_transformers_ends_rows_at_the_strings_asked_for(greedy, prompts):
    stopped = greedy.generator(STOP_STRINGS).generate(prompts, 16)
    free = greedy.generator(()).generate(prompts, 16)
    assert greedy.generator(STOP_STRINGS) is greedy.generator(STOP_STRINGS)
    assert len(stopped[0].ids) < 12
    assert greedy.tokenizer.decode(stopped[0].ids).endswith(STOP_STRINGS)
    assert [len(row.ids) for row in (stopped[1], *free)] == [16, 16, 16]
    assert free[0].ids[: len(stopped[0].ids)] == stopped[0].ids
    assert free[1].ids == stopped[1].ids


def test_draws_follow_from_seed_and_key_alone(world, prompts):
    def draw(seed: int, *key: object) -> list[list[int]]:
        model = open_model(ModelOptions(str(world.model), dtype="float32", device="cpu", temperature=1.0, seed=seed))
        model.start_batch("other", 5)
        model.generator(()).generate(prompts, 5)  # what ran before does not matter
        model.start_batch(*key)
        return [row.ids for row in model.generator(()).generate(prompts, 12)]

    first = draw(0, "nq", 3)
    assert draw(0, "nq", 3) == first
    assert draw(0, "nq", 4) != first
    assert draw(1, "nq", 3) != first


def test_seeds_are_spelled_out():
    # int(hashlib.sha256(b'["0", "nq", "3"]').hexdigest()[:16], 16) >> 33
    import hashlib

    expected = int(hashlib.sha256(b'["0", "nq", "3"]').hexdigest()[:16], 16) >> 33
    assert derived_seed(0, "nq", 3) == expected
    assert 0 <= expected < 2**31
    assert derived_seed(1, 23) != derived_seed(12, 3), "parts do not run together"


def test_the_card_tells_weights_apart_and_names_no_folder_of_the_machine(world, greedy, tmp_path):
    import shutil

    said = greedy.describe()
    assert said["backend"] == "transformers" and said["dtype"] == "float32" and said["device"] == "cpu"
    assert said["attention"] == "sdpa"
    assert said["name"] == "/".join(world.model.parts[-2:])
    assert str(world.model.parent) not in json.dumps(said)
    copy = tmp_path / "copy"
    shutil.copytree(world.model, copy)
    (copy / "README.md").write_text("another page")
    assert model_identity(str(copy), None)["weights_sha256"] == said["weights_sha256"]
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_identity(str(copy), None)["weights_sha256"] != said["weights_sha256"]


def test_the_tokenizers_hash_sees_its_chat_template(greedy, world):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(world.model)
    assert tokenizer_sha256(other) == tokenizer_sha256(greedy.tokenizer)
    other.chat_template = other.chat_template + "\n"
    assert tokenizer_sha256(other) != tokenizer_sha256(greedy.tokenizer)


def test_a_tokenizer_that_is_as_expected_is_recognised_by_its_files(greedy, world, tmp_path, monkeypatch):
    expected = tokenizer_sha256(greedy.tokenizer)
    shutil.copytree(world.model, tmp_path / "model")
    files = ModelOptions("m", tokenizer=str(tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_tokenizer", lambda options: pytest.fail("transformers loads it"))
        assert confirmed_tokenizer_sha256(ModelOptions(str(world.model)), expected) == expected
        assert confirmed_tokenizer_sha256(files, expected) == expected
    # Anything else is hashed as ever.
    assert confirmed_tokenizer_sha256(files, None) == expected
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    changed = confirmed_tokenizer_sha256(files, expected)
    assert changed == tokenizer_sha256(load_tokenizer(files)) != expected
    for broken in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / broken).write_text("[")
        with pytest.raises(ModelError, match="no tokenizer can be loaded"):
            confirmed_tokenizer_sha256(files, changed)


def test_rows_end_at_every_end_token_of_tokenizer_and_model(greedy):
    config = GenerationConfig(eos_token_id=[7, greedy.tokenizer.eos_token_id])
    for given in (config, config.to_dict()):  # vLLM gives the second
        assert end_token_ids(greedy.tokenizer, given) == sorted({7, greedy.tokenizer.eos_token_id})
    assert end_token_ids(greedy.tokenizer, None) == [greedy.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("gpt2", True),
        ("Qwen/Qwen2.5-3B", True),
        ("outputs/quickstart/nope", False),
        ("./nope", False),
        ("/nope", False),
        ("~/nope", False),
        ("nope/", False),
        ("owner/a--b", False),
        ("a name", False),
    ],
)
def test_a_name_that_is_no_folder_must_be_able_to_be_a_hub_name(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, setting in (
        (ModelOptions(name), "model"),
        (ModelOptions("gpt2", tokenizer=name), "tokenizer"),
        (ModelOptions("any model of/this/server", backend="endpoint", tokenizer=name), "tokenizer"),
        (ModelOptions(name, backend="endpoint"), "tokenizer"),
    ):
        if is_one:
            check_name(options)
            continue
        with pytest.raises(ModelError, match=f"^{setting}={re.escape(repr(name))}: there is no such folder here"):
            check_name(options)
    if not is_one and "~" not in name and not name.startswith("/"):
        (tmp_path / name).mkdir(parents=True)
        check_name(ModelOptions(name))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; name the folder"):
        check_name(ModelOptions(str(tmp_path / "model.safetensors")))


def test_a_hub_name_that_is_not_there_is_not_blamed_on_the_tokenizer():
    with pytest.raises(ModelError, match=r"^model='some/nope': there is no such folder here.*; correct model$"):
        load_tokenizer(ModelOptions("some/nope"))
    with pytest.raises(ModelError, match=r"^tokenizer='some/nope': there is no such folder here.*; set tokenizer$"):
        load_tokenizer(ModelOptions("m", tokenizer="some/nope"))


def test_a_models_length_is_known_without_its_weights(greedy, world, tmp_path):
    for path in world.model.iterdir():
        if "safetensors" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert stored_max_length(ModelOptions(str(tmp_path))) == greedy.max_length == 2048
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert stored_max_length(ModelOptions(str(adapter))) == 2048
    assert stored_max_length(ModelOptions(str(tmp_path), backend="vllm")) is None
    (tmp_path / "config.json").write_text("{")
    assert stored_max_length(ModelOptions(str(tmp_path))) is None


def test_models_that_cannot_be_opened_are_named(world, tmp_path):
    with pytest.raises(ModelError, match=r"backend='tgi'.*transformers, vllm, endpoint"):
        open_model(ModelOptions(str(world.model), backend="tgi"))
    with pytest.raises(ModelError, match=r"no tokenizer can be loaded from .*empty"):
        (tmp_path / "empty").mkdir()
        open_model(ModelOptions(str(tmp_path / "empty")))
    with pytest.raises(ModelError, match="no address is given"):
        open_model(ModelOptions("tiny", backend="endpoint", tokenizer=str(world.model)))


@pytest.mark.parametrize(
    ("server", "prompts_as", "completions_as"),
    [
        ({"takes_ids": True, "returns_ids": True}, "token ids", "token ids"),
        ({"takes_ids": True}, "token ids", "text, encoded again by the local tokenizer"),
        ({"takes_ids": False}, "text", "text, encoded again by the local tokenizer"),
    ],
)
def test_an_endpoint_writes_what_the_model_writes_in_process(
    world, greedy, prompts, server, prompts_as, completions_as
):
    with serving(PlainServer(greedy, **server)) as url:
        served = open_endpoint(url, world)
        assert served.max_length == 300
        said = served.describe()
        assert (said["prompts"], said["completions"]) == (prompts_as, completions_as)
        assert url not in json.dumps(said)
        ours = [greedy.generator(STOP_STRINGS).generate([row], 16)[0].ids for row in prompts]
        theirs = [row.ids for row in served.generator(STOP_STRINGS).generate(prompts, 16)]
        decode = greedy.tokenizer.decode
        assert [decode(ids) for ids in theirs] == [decode(ids) for ids in ours]
        if completions_as == "token ids":
            assert theirs == ours
        served.close()


def test_an_endpoint_is_asked_for_plain_decoding_and_gets_a_seed_of_its_own_for_each_row(world, greedy, prompts):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        for seed in (0, 0, 1):
            served = open_endpoint(url, world, temperature=0.7, seed=seed)
            server.bodies.clear()
            served.start_batch("nq", 3)
            served.generator(()).generate(prompts, 4)
            seeds = {len(body["prompt"]): body["seed"] for body in server.bodies}
            rows = {len(prompt): row for row, prompt in enumerate(prompts)}
            assert seeds == {length: derived_seed(seed, "nq", 3, 1, row) for length, row in rows.items()}
            for body in server.bodies:
                # A served model's own generation_config.json must not decide.
                assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, -1, 1.0)
                assert body["temperature"] == 0.7 and "stop" not in body
            served.close()


def test_a_row_near_the_models_end_asks_for_what_is_left(world, greedy):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world)
        server.bodies.clear()
        [row] = served.generator(()).generate([[5] * 297], 16)  # of 300 tokens
        assert server.bodies[0]["max_tokens"] == 3 and len(row.ids) == 3
        served.close()


def test_passing_trouble_is_met_again_and_answers_stay_in_order(world, greedy, prompts):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, concurrency=4)
        asked = [prompts[row % 2] for row in range(12)]
        calm = [row.ids for row in served.generator(()).generate(asked, 6)]
        server.first = [
            (500, {}, "boom"),
            (503, {}, "loading"),
            (429, {"Retry-After": "0"}, "slow down"),
            (200, {}, "not json"),
            (200, {}, '{"choices": []}'),
            (200, {}, "[1]"),
        ]
        server.busiest = 0
        assert [row.ids for row in served.generator(()).generate(asked, 6)] == calm
        assert calm[0] != calm[1] and calm[:2] * 6 == calm
        assert 2 <= server.busiest <= 4
        served.close()


def test_spent_attempts_name_address_count_and_cause_but_never_the_key(world, greedy, prompts, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret-123")
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, attempts=3, key_variable="TEST_KEY")
        server.bodies.clear()
        server.first = [(500, {}, "no GPU for sk-secret-123")] * 3
        with pytest.raises(
            EndpointError, match=r"/v1/completions gave no usable answer in 3 attempts.*no GPU"
        ) as raised:
            served.generator(()).generate(prompts[:1], 6)
        assert "sk-secret" not in str(raised.value) and "sk-secret" not in json.dumps(served.describe())
        assert len(server.bodies) == 3
        assert set(server.keys) == {"Bearer sk-secret-123"}
        served.close()


def test_white_space_around_a_key_is_not_part_of_it_and_an_unusable_key_is_not_shown(
    world, greedy, prompts, monkeypatch
):
    monkeypatch.setenv("TEST_KEY", "sk-secret-123\r\n")
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, attempts=2, key_variable="TEST_KEY")
        assert set(server.keys) == {"Bearer sk-secret-123"}
        # Quoted where the message is cut to 400 characters, the key leaves no part of itself.
        server.first = [(500, {}, "x" * 390 + "sk-secret-123")] * 2
        with pytest.raises(EndpointError, match="last cause: HTTP 500") as raised:
            served.generator(()).generate(prompts[:1], 6)
        assert "sk-s" not in str(raised.value)
        served.close()
        for key in ("sk-secret\n-123", "sk-secret-é"):
            monkeypatch.setenv("TEST_KEY", key)
            with pytest.raises(ValueError, match="TEST_KEY holds a control or non-ASCII character") as raised:
                open_endpoint(url, world, attempts=2, key_variable="TEST_KEY")
            assert "secret" not in str(raised.value)


def test_a_refused_request_is_not_repeated_and_ends_the_others(world, greedy, prompts):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, concurrency=1)
        server.bodies.clear()
        server.first = [(400, {}, '{"error": {"message": "prompt too long"}}')]
        with pytest.raises(EndpointError, match=r"refuses the request, HTTP 400.*too long.*max_sequence_length"):
            served.generator(()).generate(prompts * 5, 6)
        assert len(server.bodies) == 1
        served.close()


def test_an_interrupt_ends_what_has_not_been_asked_yet(world, greedy, prompts):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, concurrency=2)
        server.bodies.clear()
        answered = itertools.count(1)  # two threads answer at once, and each sees its own number

        def answer(body):
            if next(answered) == 6:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return 200, {}, '{"choices": [{"text": "a", "token_ids": [5]}]}'

        server.answer = answer
        # A shell starts what runs in the background with the interrupt ignored, and Python leaves it so.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                served.generator(()).generate(prompts * 50, 6)
        finally:
            signal.signal(signal.SIGINT, before)
        asked = len(server.bodies)
        time.sleep(0.3)
        assert 6 <= len(server.bodies) == asked < 100
        served.close()


def test_a_server_that_is_away_or_hangs_is_named_in_bounded_time(world, greedy):
    with serving(PlainServer(greedy, takes_ids=True)) as url:
        pass
    with pytest.raises(EndpointError, match=r"2 attempts, last cause: ConnectError"):
        open_endpoint(url, world, attempts=2)
    hanging = PlainServer(greedy, takes_ids=True)
    hanging.answer = lambda body: time.sleep(1.5) or (200, {}, "{}")
    with serving(hanging) as url:
        started = time.monotonic()
        with pytest.raises(EndpointError, match=r"2 attempts, last cause: ReadTimeout"):
            open_endpoint(url, world, attempts=2, timeout=0.3)
        assert time.monotonic() - started < 3.0


def test_a_model_that_is_not_served_is_named_with_those_that_are(world, greedy):
    raises = pytest.raises(EndpointError, match="serves no model 'large'; it serves tiny")
    with serving(PlainServer(greedy, takes_ids=True)) as url, raises:
        open_endpoint(url, world, model="large")


@pytest.mark.parametrize("returns_ids", [True, False])
def test_another_models_tokenizer_is_refused(world, greedy, tmp_path, returns_ids):
    """Ids that mean something else to the server would be answered all the same; their number gives them away."""
    from rex_rag.quickstart import warm_start

    other = warm_start.build_tokenizer(SearchR1(template="Something quite different: {question}"))
    other.add_tokens(["wrote Hamlet"])
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((world.model / "config.json").read_text())
    raises = pytest.raises(ValueError, match=r"the server's into 24.*set `tokenizer` to that of the served model")
    with serving(PlainServer(greedy, takes_ids=True, returns_ids=returns_ids)) as url, raises:
        open_endpoint(url, world, tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://host/gateway/v1/", "https://host/gateway/v1"),
        ("https://host/openai", "https://host/openai"),
    ],
)
def test_base_addresses(url, expected):
    assert str(check_endpoint_url(url)) == expected


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host/v1", "http://host/v1?key=1", "http://user:word@host/v1"])
def test_addresses_that_are_none_are_refused_without_showing_a_password(url):
    with pytest.raises(ValueError, match="endpoint") as raised:
        check_endpoint_url(url)
    assert "word@" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("<think> a</think><search> b ", None, "</search>"),
        ("<search> b</search> c <answer> d", None, "</answer>"),
        ("<search> b", "</answer>", "</answer>"),  # the server knows better
        ("<answer> d</answer>", None, ""),
        ("no action at all", None, ""),
        ("a stray closing tag was cut here", None, ""),
        ("<search> b", 7, ""),  # the end token ended it
    ],
)
def test_the_stop_string_that_a_server_cut_off_comes_back(text: str, reason: str | None, expected: str):
    assert missing_stop(text, STOP_STRINGS, reason) == expected
    assert missing_stop("a sentence", ["\n"], None) == ""


def test_methods_whose_turns_end_at_other_strings_work_where_the_server_cuts_these_off(world, greedy):
    """A server as OpenAI describes it: text alone, without the stop string that ended it."""

    def completion(text: str) -> tuple[int, dict[str, str], str]:
        reason = "length" if text.endswith("…") else "stop"  # of fewer tokens than were asked for, as it may look here
        text = text.removesuffix("…")
        for stop in server.bodies[-1].get("stop", ()):
            text = text.split(stop)[0]
        choice = {"text": text, "finish_reason": reason}
        return 200, {}, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1}})

    turns = {
        "search_o1": [
            "I ask myself …",
            "where. <|begin_search_query|> owl <|end_search_query|> and then",
            "**Final Information** in the oak",
            "\\boxed{oak}",
        ],
        "ircot": ["By George W. Hill. It", "Hill. It is old. So", "It is old. So", "So the answer is: oak. I think"],
    }
    asked = {"search_o1": ["owl"], "ircot": ["where is the owl", "By George W. Hill.", "It is old."]}
    budget = RolloutBudget(max_turns=3, max_turn_tokens=200, max_sequence_length=20_000, top_k=1)
    server = PlainServer(greedy, takes_ids=False)
    with serving(server) as url:
        served = open_endpoint(url, world)
        for name, said in turns.items():
            played = iter(said)
            server.answer = lambda body, played=played: completion(next(played))
            toolbox = Toolbox(served.tokenizer, served.generator, BM25Retriever(PASSAGES), budget)
            [trajectory] = make_method(name).run([Question("0", "where is the owl", ("oak",))], toolbox)
            assert [call.query for call in trajectory.searches] == asked[name]
            assert trajectory.answer == "oak"
            assert dict(trajectory.truncations) == ({"turn": 1} if name == "search_o1" else {})
        served.close()


@pytest.mark.parametrize(
    "body",
    [
        '{"choices": [{"text": "a", "token_ids": [5, -1]}]}',
        '{"choices": [{"text": "a", "token_ids": [5, 1e3]}]}',
        '{"choices": [{"text": "a", "token_ids": [true]}]}',
        '{"choices": [{"text": "a", "token_ids": ["5"]}]}',
        '{"choices": [{"text": "a", "token_ids": {"0": 5}}]}',
        '{"choices": [{"text": "a", "token_ids": [99999999]}]}',
        '{"choices": [{"text": "a", "prompt_token_ids": 7}]}',
        '{"choices": [{"text": "a"}], "usage": [1]}',
        '{"choices": {"text": "a"}}',
        '{"choices": [7]}',
        '{"choices": ' + "[" * 50_000,
        '{"choices": [{"text": "' + "\\u001b[2J" * 10 + '"',
        "[]",
    ],
)
def test_an_answer_out_of_form_is_one_clear_error(world, greedy, prompts, body):
    server = PlainServer(greedy, takes_ids=True, returns_ids=True)
    with serving(server) as url:
        served = open_endpoint(url, world, attempts=2)
        server.first = [(200, {}, body)] * 2
        with pytest.raises(EndpointError) as raised:
            served.generator(()).generate(prompts[:1], 6)
        said = str(raised.value)
        assert url in said and len(said) < 1000 and "\x1b" not in said
        served.close()


def test_half_a_surrogate_pair_is_mended_both_ways(world, greedy):
    """Refused, the same question would end the run again at every resume."""
    server = PlainServer(greedy, takes_ids=False)
    with serving(server) as url:
        served = open_endpoint(url, world)
        server.first = [(200, {}, '{"choices": [{"text": "red \\ud800 fox", "finish_reason": "stop"}]}')]
        [row] = served.generator(()).generate([[5, 6]], 6)
        assert row.ids == greedy.tokenizer("red ? fox", add_special_tokens=False)["input_ids"]
        served._served.client.complete({"prompt": "half \ud800", "max_tokens": 1})
        assert server.bodies[-1]["prompt"] == "half ?"
        served.close()


def test_names_that_an_endpoint_tells_are_inert(world, greedy):
    served = [{"id": f"\x1b[2J{number}" + "x" * 500} for number in range(20)]

    with answering(fixed(json.dumps({"data": served}).encode())) as url, pytest.raises(EndpointError) as raised:
        open_endpoint(url, world, attempts=1)
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 2000
