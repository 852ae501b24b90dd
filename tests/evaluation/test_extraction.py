"""Where answers stand in model-written text."""

import pytest

from rex_rag.evaluation.methods.extraction import announced_answer, bare_answer, boxed_answer, tagged_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> oak </answer> <answer> elm </answer>", "oak"),
        ("<answer> said <answer> oak\ntree </answer>", "oak\ntree"),
        ("<answer> oak", None),
        ("oak </answer>", None),
        ("<answer>  </answer>", None),
    ],
)
def test_tagged(text, answer):
    assert tagged_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\n\n oak \nelm", "oak"),
        ("well\n<answer>oak</answer>", "oak"),
        (" \n\t\n", None),
        ("", None),
        ("<think>\nHm, elm?\n</think>\n\noak\n", "oak"),
        ("Hm, elm?\n</think>\n\noak", "oak"),
        ("<think>\nHm, elm? And", None),
    ],
)
def test_bare(text, answer):
    assert bare_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("X. So the answer is: oak.", "oak"),
        ("so the answer is oak\nelm", None),
        ("So the answer is: oak.\nSo the answer is: elm.", "elm"),
        ("The answer is: elm? No, no elm. So the answer is: oak.", "oak"),
        ("So the answer is not known yet. So the answer is: oak", "oak"),
        ('I must end with "So the answer is: <the answer>".\nSo the answer is: oak', "oak"),
        ("So the answer is: oak.\nSo the answer is:", "oak"),
        ("So the answer is: oak.\n\nQuestion: Who?\nSo the answer is: elm", "oak"),
        ("Question: Who?\nThe answer is: elm. So the answer is: oak", "oak"),
        ("So the answer is:\n\noak", "oak"),
        ("**So the answer is:** oak", "oak"),
        ("So the answer is: **the oak**.", "the oak"),
        ("So the answer is: U.S.", "U.S"),
        ("So the answer is: 3.5", "3.5"),
        ("So the answer is:", None),
        ("So the answer is: .", None),
        ("The answer is: oak", "oak"),
        ("The answer is: oak. So the answer is:", "oak"),
        ('So the answer is: oak\nI wrote "So the answer is:", as asked.', "oak"),
        ('So the answer is:"oak"', '"oak"'),
        ("So the answer is\uff1aoak", "oak"),
        ("So the answer is: oak\n\n**Question:** Who?\nSo the answer is: elm", "oak"),
        ("<think>So the answer is: oak</think>\nIndeed", "oak"),
        ("Therefore, the final **answer is**: oak.", "oak"),
        ("I wonder what the answer is. The answer is unknown.", None),
    ],
)
def test_announced(text, answer):
    assert announced_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{oak}", "oak"),
        (r"\boxed{elm} then \boxed {oak}", "oak"),
        (r"\boxed{\text{the oak}}", "the oak"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{oak} \boxed{open", "oak"),
        (r"\boxed{oak} \boxed{ }", "oak"),
        (r"\boxed{\text{a} and \text{b}}", r"\text{a} and \text{b}"),
        ("boxed{oak}", None),
    ],
)
def test_boxed(text, answer):
    assert boxed_answer(text) == answer
