"""Qdrant: its embedded mode, and the URL path against a local server that speaks its documented REST routes.

The server answers from an embedded instance, so requests, answers, retries and killed loads are those of the real
client over HTTP; what a cluster does inside (shards, graph, quantisation) is not seen here.
"""

import socket
import threading

import numpy as np
import pytest

from rex_rag.cli import main
from rex_rag.data.corpus import write_corpus
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.dense import qdrant_index, qdrant_load
from rex_rag.retrieval.dense.qdrant_calls import API_KEY_VARIABLE, connect_qdrant
from rex_rag.retrieval.dense.qdrant_index import QUERIES_PER_REQUEST, QdrantIndex
from rex_rag.retrieval.dense.qdrant_load import ROWS_IN_FLIGHT, QdrantOptions, load_qdrant
from rex_rag.retrieval.indexed import NO_ROW
from rex_rag.retrieval.load import RetrieverArguments, load_retriever
from tests.retrieval.dense_parts import save_word_encoder, word_passages
from tests.retrieval.running import AppServer

qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client: install the retrieval extra")
fastapi = pytest.importorskip("fastapi", reason="the HTTP tests need fastapi: install the dev extra")
pytest.importorskip("uvicorn", reason="the HTTP tests need uvicorn: install the dev extra")

QdrantClient, models = qdrant_client.QdrantClient, qdrant_client.models

FINGERPRINT = {"corpus": "c0ffee", "encoder": "tiny@1", "prompts": {"query": None, "parts": ("a", 1)}}
NAME = "passages"


def unit_vectors(rows, dimension=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def in_blocks(vectors, size=100):
    return ((first, vectors[first : first + size]) for first in range(0, len(vectors), size))


def brute_force(vectors, queries, top_k):
    scores = queries @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, rows, axis=1), rows


class Cluster:
    """Qdrant's REST routes over an embedded instance. `fail` says how many coming calls of a route fail, and how."""

    def __init__(self):
        self.reset()
        self._lock = threading.Lock()
        app = fastapi.FastAPI()
        at = "/collections/{name}"

        def route(method, path, name):
            def wrap(function):
                async def handle(request: fastapi.Request):
                    body = await request.json() if await request.body() else {}
                    with self._lock:
                        self.requests.append((name, body))
                        self.keys.add(request.headers.get("api-key"))
                        left, status = self.fail.get(name, (0, 0))
                        if left:
                            self.fail[name] = (left - 1, status)
                            error = {"status": {"error": "out of order"}, "time": 0.0}
                            return fastapi.responses.JSONResponse(error, status_code=status)
                        result = function(request.path_params.get("name"), body)
                    return {"result": result, "status": "ok", "time": 0.0}

                app.add_api_route(path, handle, methods=[method])

            return wrap

        @route("GET", at + "/exists", "exists")
        def exists(name, body):
            return {"exists": self.client.collection_exists(name)}

        @route("GET", at, "info")
        def info(name, body):
            return self.client.get_collection(name).model_dump(mode="json", exclude_none=True)

        @route("PUT", at, "create")
        def create(name, body):
            vectors = models.VectorParams(**body["vectors"])
            metadata = body["metadata"] if self.keeps_metadata else None
            return self.client.create_collection(name, vectors_config=vectors, metadata=metadata)

        @route("PATCH", at, "update")
        def update(name, body):
            return self.client.update_collection(name, metadata=body["metadata"])

        @route("PUT", at + "/points", "upsert")
        def upsert(name, body):
            if self.unapplied:
                self.unapplied -= 1
                return {"operation_id": 1, "status": "wait_timeout"}
            rows = [row for row in body["batch"]["ids"] if row != self.loses]
            vectors = body["batch"]["vectors"][: len(rows)]
            return self.client.upsert(name, models.Batch(ids=rows, vectors=vectors)).model_dump(mode="json")

        @route("POST", at + "/points/count", "count")
        def count(name, body):
            return self.client.count(name).model_dump()

        @route("POST", at + "/points/query/batch", "query")
        def query(name, body):
            # The embedded mode would warn that it always searches exactly.
            requests = [models.QueryRequest(**{**request, "params": None}) for request in body["searches"]]
            return [answer.model_dump(mode="json") for answer in self.client.query_batch_points(name, requests)]

        self._running = AppServer(app)
        self.url = self._running.url

    def reset(self):
        self.client = QdrantClient(":memory:")
        self.requests = []  # (route, body), failed ones too
        self.keys = set()
        self.fail = {}
        self.keeps_metadata = True
        self.unapplied = 0  # so many coming uploads are only queued
        self.loses = None  # a row that is acknowledged and not kept

    def stop(self):
        self._running.stop()

    def bodies(self, name):
        return [body for route, body in self.requests if route == name]

    def rows_sent(self):
        return [row for body in self.bodies("upsert") for row in body["batch"]["ids"]]


@pytest.fixture(scope="module")
def running_cluster():
    running = Cluster()
    yield running
    running.stop()


@pytest.fixture
def cluster(running_cluster, monkeypatch):
    monkeypatch.setattr(qdrant_load, "SECONDS_BETWEEN_POLLS", 0.01)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    running_cluster.reset()
    return running_cluster


def load(cluster, vectors, fingerprint=FINGERPRINT, blocks=None, **options):
    client = connect_qdrant(cluster.url)
    options = {"backoff": 0.001, **options}
    rows, dimension = vectors.shape
    load_qdrant(blocks or in_blocks(vectors), client, NAME, rows, dimension, fingerprint, **options)


def connect(cluster, vectors, fingerprint=FINGERPRINT, **options):
    return QdrantIndex.connect(cluster.url, NAME, *vectors.shape, fingerprint, backoff=0.001, **options)


def test_embedded_scores_and_rows_of_a_hand_made_matrix():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], dtype=np.float32)
    index = QdrantIndex.embedded([(0, vectors[:3]), (3, vectors[3:])], 4, 2, FINGERPRINT)
    scores, rows = index.search(np.array([[1, 0], [0, 2]], dtype=np.float32), top_k=4)
    assert rows.tolist() == [[0, 2, 1, 3], [1, 2, 0, 3]]  # rows 0 and 3 both score 0 in the second: by row
    assert scores == pytest.approx(np.array([[1.0, 0.6, 0.0, -1.0], [2.0, 1.6, 0.0, 0.0]]))
    assert (scores.dtype, rows.dtype, len(index), index.dimension) == (np.float32, np.int64, 4, 2)


def test_embedded_equals_brute_force_also_in_float16_blocks_and_across_requests():
    vectors, queries = unit_vectors(500), unit_vectors(2 * QUERIES_PER_REQUEST + 3, seed=1)
    halves = vectors.astype(np.float16)
    index = QdrantIndex.embedded(in_blocks(halves, size=77), 500, 8, FINGERPRINT)
    scores, rows = index.search(queries, top_k=10)
    expected_scores, expected_rows = brute_force(halves.astype(np.float32), queries, 10)
    assert scores == pytest.approx(expected_scores, abs=1e-5)
    assert (rows == expected_rows).all()


def test_a_ranking_is_never_longer_than_the_index():
    index = QdrantIndex.embedded([(0, np.eye(3, dtype=np.float32))], 3, 3, FINGERPRINT)
    scores, rows = index.search(np.eye(3, dtype=np.float32), top_k=10)
    assert rows.shape == scores.shape == (3, 3)
    assert index.search(np.zeros((0, 3), dtype=np.float32), top_k=2)[1].shape == (0, 2)
    with pytest.raises(RetrievalError, match=r"shape \(1, 2\); this index takes \(n, 3\)"):
        index.search(np.zeros((1, 2), dtype=np.float32), top_k=2)


def test_over_http_the_same_rankings_as_brute_force_and_the_parameters_asked_for(cluster):
    vectors, queries = unit_vectors(300), unit_vectors(5, seed=1)
    load(cluster, vectors, options=QdrantOptions(hnsw_m=32, shards=3), batch_size=64)
    created, updated = cluster.bodies("create")[0], cluster.bodies("update")[0]
    assert created["vectors"]["distance"] == "Dot" and created["vectors"]["on_disk"] is True
    assert created["vectors"]["quantization_config"]["scalar"]["type"] == "int8"
    assert (created["hnsw_config"]["m"], updated["hnsw_config"]["m"], created["shard_number"]) == (0, 32, 3)
    assert sorted(cluster.rows_sent()) == list(range(300))

    walked, exact = connect(cluster, vectors, ef=40), connect(cluster, vectors, exact=True)
    for index in (walked, exact):
        scores, rows = index.search(queries, top_k=50)
        expected_scores, expected_rows = brute_force(vectors, queries, 50)
        assert (rows == expected_rows).all()
        assert scores == pytest.approx(expected_scores, abs=1e-5)
    asked = [body["searches"][0]["params"] for body in cluster.bodies("query")]
    assert asked[0]["hnsw_ef"] == 50 and asked[0]["quantization"]["rescore"] is True  # never fewer than top_k
    assert asked[1]["exact"] is True and asked[1]["quantization"]["ignore"] is True
    assert walked.description == f"Qdrant 'passages' at {cluster.url} (HNSW, ef=40)"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop_at", [0, 1, 4000, 5999])
def test_a_killed_load_goes_on_where_it_was_and_ends_the_same(cluster, stop_at):
    vectors = unit_vectors(6000)

    def dying():
        for first, block in in_blocks(vectors, size=1000):
            if first + len(block) > stop_at:
                yield first, block[: stop_at - first]
                raise Killed
            yield first, block

    with pytest.raises(Killed):
        load(cluster, vectors, blocks=dying(), batch_size=500, workers=2)
    with pytest.raises(RetrievalError, match="is incomplete: its load was interrupted; run the same"):
        connect(cluster, vectors)
    there = cluster.client.count(NAME).count
    cluster.requests.clear()
    load(cluster, vectors, batch_size=1024, workers=4)
    assert min(cluster.rows_sent()) == max(0, there - ROWS_IN_FLIGHT)
    assert cluster.client.count(NAME).count == 6000
    sample = vectors[::997]
    assert connect(cluster, vectors).search(sample, 1)[1].ravel().tolist() == list(range(0, 6000, 997))


def test_a_load_whose_older_batches_failed_while_newer_ones_arrived_leaves_no_hole(cluster):
    vectors = unit_vectors(1200, dimension=2)
    cluster.fail["upsert"] = (3, 500)  # of four batches under way, three fail for good
    with pytest.raises(RetrievalError, match=r"upsert failed after 1 attempt \(UnexpectedResponse: .*500"):
        load(cluster, vectors, batch_size=100, workers=4, max_attempts=1)
    load(cluster, vectors, batch_size=100)
    assert cluster.client.count(NAME).count == 1200


def test_an_upload_that_is_only_queued_is_sent_again(cluster):
    cluster.unapplied = 2
    load(cluster, unit_vectors(50), workers=1, max_attempts=3)
    assert cluster.rows_sent() == 3 * list(range(50))
    assert cluster.client.count(NAME).count == 50


def test_a_cluster_that_loses_rows_is_not_called_complete(cluster):
    vectors = unit_vectors(50)
    cluster.loses = 49
    with pytest.raises(RetrievalError, match="holds 49 points after 50 rows were loaded"):
        load(cluster, vectors)
    with pytest.raises(RetrievalError, match="is incomplete"):
        connect(cluster, vectors)


def test_a_complete_collection_is_not_loaded_again(cluster):
    vectors = unit_vectors(50)
    load(cluster, vectors)
    cluster.requests.clear()
    load(cluster, vectors)
    assert cluster.rows_sent() == []


def test_another_corpus_or_encoder_is_refused_and_nothing_is_touched(cluster):
    vectors = unit_vectors(50)
    load(cluster, vectors)
    other = {**FINGERPRINT, "encoder": "tiny@2"}
    cluster.requests.clear()
    for attempt in (load, connect):
        with pytest.raises(RetrievalError, match=r"encoder is 'tiny@1' there, 'tiny@2' here\); it was not touched"):
            attempt(cluster, vectors, other)
        with pytest.raises(RetrievalError, match="rows is 50 there, 40 here"):
            attempt(cluster, vectors[:40])
    assert not cluster.bodies("upsert") and not cluster.bodies("update") and not cluster.bodies("create")


def test_a_foreign_collection_is_refused(cluster):
    cluster.client.create_collection(NAME, models.VectorParams(size=8, distance=models.Distance.DOT))
    with pytest.raises(RetrievalError, match="carries no fingerprint: it was not made by"):
        load(cluster, unit_vectors(10))
    assert not cluster.bodies("upsert")


def test_a_server_that_keeps_no_metadata_is_named(cluster):
    cluster.keeps_metadata = False
    with pytest.raises(RetrievalError, match=r"the server is older than 1\.16"):
        load(cluster, unit_vectors(10))


def test_an_absent_collection_and_one_that_lost_points_are_refused_at_load(cluster):
    vectors = unit_vectors(50)
    with pytest.raises(RetrievalError, match="there is no Qdrant collection 'passages' at http"):
        connect(cluster, vectors)
    load(cluster, vectors)
    cluster.client.delete(NAME, models.PointIdsList(points=[7]))
    with pytest.raises(RetrievalError, match="holds 49 points for 50 passages"):
        connect(cluster, vectors)


def test_a_point_beyond_the_corpus_is_an_error_not_a_passage(cluster):
    vectors = unit_vectors(50)
    load(cluster, vectors)
    index = connect(cluster, vectors)
    cluster.client.upsert(NAME, models.Batch(ids=[50], vectors=[(10 * vectors[3]).tolist()]))
    with pytest.raises(RetrievalError, match="found a point that is no row of the 50 passages"):
        index.search(vectors[3:4], 5)


def test_fewer_hits_than_asked_end_in_no_row(cluster):
    vectors = unit_vectors(5)
    load(cluster, vectors)
    index = connect(cluster, vectors)
    cluster.client.delete(NAME, models.PointIdsList(points=[1, 2, 3]))
    scores, rows = index.search(vectors[:1], 4)
    assert rows[0, 0] == 0 and rows[0, 2:].tolist() == [NO_ROW, NO_ROW]
    assert (scores[0, 2:] == -np.inf).all()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_retried_and_then_named(cluster, status):
    vectors = unit_vectors(50)
    cluster.fail = dict.fromkeys(("exists", "create", "info", "count", "upsert", "update"), (2, status))
    load(cluster, vectors, max_attempts=3)
    index = connect(cluster, vectors, max_attempts=3)
    cluster.fail["query"] = (2, status)
    assert index.search(vectors[:1], 1)[1].tolist() == [[0]]
    cluster.fail["query"] = (9, status)
    with pytest.raises(RetrievalError, match=rf"'passages': query_batch_points failed after 3 attempts .*{status}"):
        index.search(vectors[:1], 1)


@pytest.mark.parametrize("by", ["trouble", "time"])
def test_a_collection_exchanged_in_the_middle_of_a_run_is_refused(cluster, monkeypatch, by):
    vectors = unit_vectors(50)
    load(cluster, vectors)
    index = connect(cluster, vectors)
    assert index.search(vectors[:1], 1)[1].tolist() == [[0]]
    cluster.reset()
    load(cluster, unit_vectors(50, seed=1), {**FINGERPRINT, "corpus_sha256": "another"})
    if by == "time":
        monkeypatch.setattr(qdrant_index, "SECONDS_BETWEEN_CHECKS", 0.0)
    else:
        cluster.fail["query"] = (1, 503)
    with pytest.raises(RetrievalError, match="was made from something else"):
        index.search(vectors[:1], 1)


def test_a_refused_request_is_not_repeated(cluster):
    vectors = unit_vectors(50)
    load(cluster, vectors)
    index = connect(cluster, vectors)
    cluster.fail["query"] = (9, 400)
    cluster.requests.clear()
    with pytest.raises(RetrievalError, match=r"failed after 1 attempt .*the request was refused"):
        index.search(vectors[:1], 1)
    assert len(cluster.requests) == 1


def test_the_api_key_goes_into_the_header_and_into_no_message(cluster, monkeypatch, caplog):
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret-key\n")
    vectors = unit_vectors(20)
    with pytest.warns(UserWarning, match="insecure"), caplog.at_level("DEBUG"):
        load(cluster, vectors)
        cluster.fail["exists"] = (9, 401)
        with pytest.raises(RetrievalError, match=f"set the environment variable {API_KEY_VARIABLE}") as refusal:
            connect(cluster, vectors)
    assert cluster.keys == {"s3cret-key"}
    assert "s3cret" not in str(refusal.value)
    assert "s3cret" not in caplog.text
    monkeypatch.setenv(API_KEY_VARIABLE, "s3cret\nkey")
    with pytest.raises(RetrievalError, match="holds characters that no key has") as odd:
        connect_qdrant(cluster.url)
    assert "s3cret" not in str(odd.value)


def test_a_cluster_that_is_away_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RetrievalError, match=r"after 2 attempts \(ConnectError.*is the cluster up"):
            QdrantIndex.connect(url, NAME, 1, 1, {}, max_attempts=2, backoff=0.001)


def test_a_cluster_that_is_away_or_refuses_the_key_stops_a_build_before_it_encodes(
    cluster, tmp_path, monkeypatch, capsys
):
    write_corpus(word_passages(20), tmp_path / "corpus.jsonl")
    build = ["index", "--corpus", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "index")]
    build += ["--kind", "dense", "--index", "qdrant", "--qdrant-collection", NAME]
    # An encoder that is not there: it is not even loaded.
    build += ["--model", str(tmp_path / "absent"), "--query-prefix", "", "--passage-prefix", ""]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main([*build, "--qdrant-url", url]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"nothing was built, since the vectors could not go to {url}: Qdrant collection 'passages'" in said
    assert "after 3 attempts (ConnectError" in said
    cluster.fail["exists"] = (9, 403)
    assert main([*build, "--qdrant-url", cluster.url]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "after 1 attempt " in said and f"set the environment variable {API_KEY_VARIABLE}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(0, np.zeros((3, 2))), (4, np.zeros((1, 2)))], r"came for row 4; row 3 was next"),
        ([(0, np.zeros((4, 3)))], r"a block of shape \(4, 3\)"),
        ([(0, np.zeros((3, 2)))], "the blocks held 3 vectors, 4 were announced"),
        ([(0, np.full((4, 2), np.nan))], "not finite"),
    ],
)
def test_blocks_that_are_not_what_was_promised_are_refused(blocks, message):
    with pytest.raises(RetrievalError, match=message):
        QdrantIndex.embedded(blocks, 4, 2, FINGERPRINT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: connect_qdrant("localhost:6333"), "'localhost:6333' is not an http"),
        (lambda: connect_qdrant("https://me:secret@host:6333"), "put a key into QDRANT_API_KEY"),
        (lambda: QdrantOptions(hnsw_m=1), "hnsw_m=1; use 2 or more"),
        (lambda: QdrantOptions(shards=0), "shards=0"),
        (lambda: load_qdrant([], QdrantClient(":memory:"), NAME, 1, 1, {}, batch_size=4096, workers=2), "4096"),
        (lambda: load_qdrant([], QdrantClient(":memory:"), NAME, 0, 1, {}), "0 rows of 1 dimensions"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(RetrievalError, match=message):
        make()


def test_threads_share_an_index():
    vectors = unit_vectors(200)
    index = QdrantIndex.embedded(in_blocks(vectors), 200, 8, FINGERPRINT)
    found = {}

    def ask(row):
        found[row] = index.search(vectors[row : row + 1], 1)[1].item()

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(0, 200, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {row: row for row in range(0, 200, 10)}


@pytest.mark.parametrize("place", ["embedded", "cluster"])
def test_an_index_directory_is_built_and_searched_like_any_other(cluster, tmp_path, place):
    passages = word_passages(300)
    write_corpus(passages, tmp_path / "corpus.jsonl")
    build = ["index", "--corpus", str(tmp_path / "corpus.jsonl"), "--kind", "dense", "--devices", "cpu"]
    build += ["--model", str(save_word_encoder(tmp_path / "encoder")), "--query-prefix", "", "--passage-prefix", ""]
    on_cluster = ["--qdrant-url", cluster.url, "--qdrant-collection", NAME] if place == "cluster" else []
    assert main([*build, "--output", str(tmp_path / "qdrant"), "--index", "qdrant", *on_cluster]) == 0
    assert main([*build, "--output", str(tmp_path / "flat"), "--index", "flat-fp16"]) == 0
    queries = [passage.text for passage in word_passages(20, seed=1)]
    found, expected = (
        load_retriever(RetrieverArguments(str(tmp_path / name))).search(queries, 5) for name in ("qdrant", "flat")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert [passage.score for passage in ours] == pytest.approx([passage.score for passage in theirs], abs=1e-5)
    clear = [row for row, ranking in enumerate(expected) if ranking[0].score - ranking[1].score > 1e-4]
    assert len(clear) > 10
    assert [found[row][0].text for row in clear] == [expected[row][0].text for row in clear]
    assert cluster.client.collection_exists(NAME) == (place == "cluster")
