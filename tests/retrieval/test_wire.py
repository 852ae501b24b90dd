"""The wire format, byte by byte, and there and back."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.passages import passage_json
from rex_rag.retrieval.remote.wire import WireError, decode_rankings, encode_rankings, encode_request
from rex_rag.types import Passage

OWL = b'{"id": "7", "contents": "\\"Owl\\"\\nin the oak"}'
FOX = '{"id": "8", "contents": "\\"Füchse\\"\\nare red"}'.encode()


def test_a_request_is_compact_utf8_and_asks_for_scores():
    body = '{"queries":["Où est Oslo?","b"],"topk":3,"return_scores":true}'
    assert encode_request(["Où est Oslo?", "b"], 3) == body.encode()


def test_half_a_surrogate_pair_is_sent_as_a_question_mark():
    assert json.loads(encode_request(["a\ud83db"], 1))["queries"] == ["a?b"]


def test_an_answer_holds_the_documents_bytes_as_they_are():
    rankings = [[(OWL, 1.5), (FOX, -0.25)], [(FOX, 3)]]
    assert encode_rankings(rankings, return_scores=True) == (
        b'{"result":[[{"document":' + OWL + b',"score":1.5},{"document":' + FOX + b',"score":-0.25}],'
        b'[{"document":' + FOX + b',"score":3.0}]]}'
    )
    assert encode_rankings(rankings, return_scores=False) == (
        b'{"result":[[' + OWL + b"," + FOX + b"],[" + FOX + b"]]}"
    )


def test_an_answer_is_read_back_in_order():
    body = encode_rankings([[(OWL, 1.5), (FOX, -0.25)], [(FOX, 3.0)]], return_scores=True)
    owl, fox = Passage("7", "Owl", "in the oak", 1.5), Passage("8", "Füchse", "are red", -0.25)
    assert decode_rankings(body, ["a", "b"], 2) == [[owl, fox], [Passage("8", "Füchse", "are red", 3.0)]]
    assert decode_rankings(body, ["a", "b"], 1) == [[owl], [Passage("8", "Füchse", "are red", 3.0)]]


def test_bare_documents_have_no_score():
    body = encode_rankings([[(OWL, 1.5)]], return_scores=False)
    assert decode_rankings(body, ["a"], 1) == [[Passage("7", "Owl", "in the oak", None)]]


def test_numpy_scores_become_plain_numbers():
    import numpy as np

    body = encode_rankings([[(OWL, np.float32(0.5))]], return_scores=True)
    assert body.endswith(b'"score":0.5}]]}')


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("return_scores", [True, False])
def test_a_score_that_is_not_finite_never_leaves(score, return_scores):
    with pytest.raises(RetrievalError, match=rf"rank 2 has the score {score}.*Füchse"):
        encode_rankings([[(OWL, 1.0), (FOX, score)]], return_scores)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b'{"result": [[{"docu', "malformed JSON"),
        (b"", "malformed JSON .* in 0 bytes"),
        (b'{"result": "\xff"}', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"[]", 'no list under "result"'),
        (b'{"results": []}', 'no list under "result"'),
        (b'{"result": []}', "0 results for 1 query"),
        (b'{"result": [[], []]}', "2 results for 1 query"),
        (b'{"result": [[]]}', "the result of query 'q' is empty"),
        (b'{"result": [{}]}', "result 0 is not a list"),
        (b'{"result": [["words"]]}', "for query 'q' cannot be used: not an object: 'words'"),
        (b'{"result": [[{"document": "words"}]]}', "its document is not an object: 'words'"),
        (b'{"result": [[{"id": "1"}]]}', "cannot be used: missing fields"),
        (b'{"result": [[{"contents": "\\ud800"}]]}', "cannot be used: .*half a surrogate pair"),
        (b'{"result": [[{"title": "\\udfff", "text": "x"}]]}', "cannot be used: .*half a surrogate pair"),
        (b'{"result": [[{"contents": ' + b"[" * 900 + b"]" * 900 + b"}]]}", "cannot be used"),
        (
            b'{"result": [[%b]]}' % b",".join([b'{"contents": "x"}'] * 500),
            "500 passages for query 'q', which asked for 3",
        ),
        (b'{"result": [[{"document": {"contents": "x"}, "score": NaN}]]}', "is not finite: nan"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": 1e999}]]}', "is not finite: inf"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": -1%b}]]}' % (b"0" * 400), "is not finite: -1000"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": "high"}]]}', "is not a number: 'high'"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": true}]]}', "is not a number: True"),
    ],
)
def test_a_wrong_answer_is_named(body, cause):
    with pytest.raises(WireError, match=cause):
        decode_rankings(body, ["q"], 3)


BLANK = '{"id": "3", "contents": "\\"List of owls\\"\\n"}'


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (f'{{"document": {BLANK}, "score": 0.7}}', r"1 result for query 'q' cannot be used: empty text .*'id': '3'"),
        (BLANK, "empty text"),
        ('{"document": {"id": "3", "contents": "x"}, "score": NaN}', "its score is not finite: nan"),
        ('{"document": {"id": "3"}, "score": 1}', "missing fields"),
        ('{"document": null, "score": 1}', "its document is not an object"),
        ("null", "not an object"),
    ],
)
def test_a_passage_that_cannot_be_used_costs_that_passage_and_is_told(bad, reason):
    good = ['{"document": {"id": "1", "contents": "a"}, "score": 3}', '{"document": {"id": "2", "contents": "b"}}']
    told: list[str] = []
    body = f'{{"result": [[{good[0]}, {bad}, {good[1]}], [{good[1]}]]}}'.encode()
    first, second = decode_rankings(body, ["q", "r"], 2, told.append)
    assert ([passage.id for passage in first], [passage.id for passage in second]) == (["1", "2"], ["2"])
    [said] = told
    assert re.search(reason, said)
    assert [passage.id for passage in decode_rankings(body, ["q", "r"], 1, told.append)[0]] == ["1"]
    assert len(told) == 1  # behind what is asked for, nothing is read
    with pytest.raises(WireError, match="2 results for query 'q' cannot be used"):
        decode_rankings(f'{{"result": [[{bad}, {bad}]]}}'.encode(), ["q"], 2)


def test_a_document_without_id_is_known_by_its_text():
    [[first]] = decode_rankings(b'{"result": [[{"title": "T", "text": "x"}]]}', ["a"], 1)
    [[second]] = decode_rankings(b'{"result": [[{"text": "x", "title": "T"}]]}', ["b"], 1)
    # sha1("T\nx"), first 16 digits
    assert first.id == second.id == "30a2a83f93e99f89"


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, words, st.floats(-1e300, 1e300)), min_size=1, max_size=4))
def test_any_passage_comes_through_as_it_went_in(rows):
    passages = [Passage(str(n), " ".join(title.split()), text, score) for n, (title, text, score) in enumerate(rows)]
    body = encode_rankings([[(passage_json(passage), passage.score) for passage in passages]], return_scores=True)
    assert decode_rankings(body, ["q"], len(passages)) == [passages]
