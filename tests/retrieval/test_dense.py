"""Dense retrieval end to end: encoder, index and passages that belong together; recall on real questions."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rex_rag.data.corpus import read_corpus
from rex_rag.retrieval.base import RetrievalError, Retriever, checked_search
from rex_rag.retrieval.dense.encode_corpus import encode_corpus
from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.faiss_index import FaissIndex, FaissOptions, build_faiss_index
from rex_rag.retrieval.dense.families import resolve_encoder
from rex_rag.retrieval.dense.retriever import DenseRetriever
from rex_rag.retrieval.dense.torch_index import TorchFlatIndex
from rex_rag.retrieval.passages import PassageList
from rex_rag.types import Passage
from tests.retrieval.dense_parts import REAL_DATA, minilm_folder, real_questions, recall, save_word_encoder

# MiniLM with exact search over the 994 passages of hotpotqa_sample, the question as query.
EXACT_RECALL = (0.625, 0.715, 0.785, 0.850)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_word_encoder(tmp_path_factory.mktemp("encoder") / "words")
    return Encoder(resolve_encoder(str(folder), query_prefix="", passage_prefix=""), ["cpu"])


def texts(*values):
    return [Passage(str(n), "", text) for n, text in enumerate(values)]


def retriever_over(encoder, passages, **options):
    vectors = encoder.encode_passages([encoder.spec.passage_text(passage) for passage in passages])
    return DenseRetriever(encoder, TorchFlatIndex(vectors, ["cpu"]), PassageList(passages), **options)


def test_passages_come_back_with_cosines_best_first(encoder):
    retriever = retriever_over(encoder, texts("oslo", "oslo rome", "rome", "paris hill"))
    rankings = checked_search(retriever, ["rome", "Oslo"], 4)
    assert [passage.id for passage in rankings[0]][:2] == ["2", "1"]
    assert [passage.id for passage in rankings[1]][:2] == ["0", "1"]
    # Equal texts have the cosine 1; "oslo rome" is the normalized mean of two unit vectors.
    [rome] = encoder.encode_queries(["rome"])
    assert rankings[0][0].score == pytest.approx(1, abs=1e-5)
    table = np.random.default_rng(0).standard_normal((11, 8), dtype=np.float32)
    mean = table[1] + table[2]
    assert rankings[0][1].score == pytest.approx(float(rome @ mean / np.linalg.norm(mean)), abs=1e-5)
    assert isinstance(retriever, Retriever)
    retriever.check()
    assert retriever.search([], 3) == []
    assert [len(ranking) for ranking in retriever.search(["", "oslo", " \n"], 2)] == [2, 2, 2]
    assert len(retriever.search(["oslo"], 99)[0]) == len(retriever) == 4
    digest = encoder.spec.revision.removeprefix("sha256:")[:12]
    assert retriever.description == f"words ({digest}), torch flat (float32 on cpu) over 4 passages"
    assert retriever_over(encoder, texts("oslo"), description="mine").description == "mine"


def test_parts_that_do_not_belong_together_are_refused(tmp_path, encoder):
    passages = texts("oslo", "rome")
    vectors = encoder.encode_passages(["oslo", "rome", "paris"])
    with pytest.raises(RetrievalError, match="3 vectors for 2 passages"):
        DenseRetriever(encoder, TorchFlatIndex(vectors, ["cpu"]), PassageList(passages))
    with pytest.raises(RetrievalError, match=r"4 dimensions, the encoder .* makes 8"):
        DenseRetriever(encoder, TorchFlatIndex(vectors[:2, :4].copy(), ["cpu"]), PassageList(passages))


def test_threads_and_batches_see_the_same_rankings(encoder):
    draws = np.random.default_rng(0)
    words = ["oslo", "rome", "paris", "river", "hill"]
    # No two passages of the same words, whose scores would differ by rounding alone.
    bags = sorted({" ".join(sorted(draws.choice(words, 9))) for _ in range(200)})
    retriever = retriever_over(encoder, texts(*bags))
    queries = [" ".join(draws.choice(words, 3)) for _ in range(40)]
    alone = [[passage.id for passage in retriever.search([query], 5)[0]] for query in queries]
    together = [[passage.id for passage in ranking] for ranking in retriever.search(queries, 5)]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda query: [p.id for p in retriever.search([query], 5)[0]], queries))
    assert alone == together == threaded


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """MiniLM's vectors of the 994 passages, and of the 100 questions."""
    questions = real_questions()
    encoder = Encoder(resolve_encoder(minilm_folder(), family="minilm"), ["cpu"])
    passages = PassageList(read_corpus(REAL_DATA / "corpus.jsonl"))
    folder = tmp_path_factory.mktemp("vectors")
    vectors = encode_corpus(passages, encoder, folder, dtype="float32")
    assert len(passages) == 994 and len(questions) == 100
    return encoder, passages, vectors, questions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (FaissOptions("flat"), 0.0005),
        (FaissOptions("flat-fp16"), 0.005),
        (FaissOptions("ivf"), 0.0005),  # 25 lists of about 40 passages, so few that all are read
        (FaissOptions("ivf", nprobe=6), 0.08),
        (FaissOptions("hnsw"), 0.01),
    ],
    ids=lambda value: f"{value.kind}-{value.nprobe}" if isinstance(value, FaissOptions) else None,
)
def test_recall_of_gold_passages_on_hotpotqa(tmp_path, real, options, tolerance):
    encoder, passages, vectors, questions = real
    build_faiss_index(vectors, tmp_path / "index", options)
    retriever = DenseRetriever(encoder, FaissIndex(tmp_path / "index", options), passages)
    measured = recall(questions, retriever)
    assert measured == pytest.approx(EXACT_RECALL, abs=tolerance), measured
    if options.kind.startswith("flat"):
        exact = DenseRetriever(encoder, TorchFlatIndex.load(tmp_path / "index", devices=["cpu"]), passages)
        assert recall(questions, exact) == pytest.approx(measured, abs=0.0005)


def test_an_index_that_finds_nothing_does_not_pass_its_check(encoder):
    class Lost:
        description, dimension = "lost", encoder.dimension

        def __len__(self) -> int:
            return 2

        def search(self, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.full((len(vectors), top_k), -np.inf), np.full((len(vectors), top_k), -1)

    passages = PassageList([Passage("a", "oslo", "river"), Passage("b", "rome", "hill")])
    with pytest.raises(RetrievalError, match="returned no passage for the query 'oslo'"):
        DenseRetriever(encoder, Lost(), passages).check()
