"""The correction forms: what each puts into the loss, by hand, and its expected gradient, by exact enumeration.

The enumerated policy writes a prefix x, then answers at once, tries an answer, or doubts and tries then. Answering at
once is right behind prefix 0 alone; a try is right if it is the last of three, doubted or not. Probes re-open prefixes
1 and 2, which fail, insert a doubt drawn uniformly and go on with the policy: "</think>", then a try.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import ScriptedGenerator, agent_for, start_probe
from torch.nn.utils.rnn import pad_sequence
from trl import TrlParser

from rex_rag.correction.densities import PADDING_KIND
from rex_rag.correction.forms import FORMS, CorrectionForm, register
from rex_rag.correction.realignment import realign
from rex_rag.protocols import SearchR1
from rex_rag.protocols.search_r1 import FEEDBACK_TEXT
from rex_rag.rollout.script import RolloutBudget
from rex_rag.training.config import REXRAGConfig
from rex_rag.types import Segment, SegmentKind, Trajectory

DOUBTS, CLOSE = (3, 4), 9
TEXTS = ["x0", "x1", "x2", "<think> d0", "<think> d1", "<answer>y</answer>", *(f"<answer>{c}</answer>" for c in "abc")]
TEXTS.append("</think>")
SHARE, Z_PREFIXES = 0.1, (1, 2)
SETTINGS = SimpleNamespace(correction_weight_max=None, correction_weight_min=0.1)


def decode(rows):
    return ["".join(TEXTS[token] for token in row) for row in rows]


SCRIPT = SimpleNamespace(decode=decode, parse=SearchR1().parse)


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    second = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    second[:, :2] -= 5.0  # doubting by itself is rare
    return {
        "prefix": torch.randn(3, generator=generator, dtype=torch.float64),
        "second": second,
        "try": torch.randn(3, 2, 3, generator=generator, dtype=torch.float64),
    }


def token_logps(theta, ids) -> torch.Tensor:
    """log pi of every token of a trajectory."""
    tables = {name: value.log_softmax(-1) for name, value in theta.items()}
    x, second, *rest = ids
    logps = [tables["prefix"][x], tables["second"][x, second - DOUBTS[0]]]
    if rest:
        close, last = rest
        assert close == CLOSE
        logps += [torch.zeros((), dtype=torch.float64), tables["try"][x, second - DOUBTS[0], last - 6]]
    return torch.stack(logps)


def reward(ids) -> float:
    return float(ids[-1] == 8 or ids[-2:] == [0, 5])


ORIGINALS = [[x, token] for x in range(3) for token in (5, 6, 7, 8)]
ORIGINALS += [[x, d, CLOSE, c] for x in range(3) for d in DOUBTS for c in (6, 7, 8)]
PROBES = [[x, d, CLOSE, c] for x in Z_PREFIXES for d in DOUBTS for c in (6, 7, 8)]


def rows() -> list[Trajectory]:
    """Every original, then every probe."""
    originals = [Trajectory([], [Segment(SegmentKind.POLICY, ids, decode([ids])[0])]) for ids in ORIGINALS]
    cut = ((SegmentKind.POLICY, slice(0, 1)), (SegmentKind.PROBE, slice(1, 2)), (SegmentKind.POLICY, slice(2, None)))
    probes = [
        Trajectory([], [Segment(kind, ids[part], decode([ids[part]])[0]) for kind, part in cut]) for ids in PROBES
    ]
    return originals + probes


def densities(theta) -> tuple[torch.Tensor, float]:
    """The probability of every row of `rows` in its own policy, and z."""
    with torch.no_grad():
        originals = torch.stack([token_logps(theta, ids).sum().exp() for ids in ORIGINALS])
        z = theta["prefix"].softmax(0)[list(Z_PREFIXES)].sum().item()
        probes = [token_logps(theta, ids)[[0, 3]].sum().exp() / z / len(DOUBTS) for ids in PROBES]
    probes = torch.stack(probes)
    assert originals.sum().item() == pytest.approx(1.0) and probes.sum().item() == pytest.approx(1.0)
    return torch.cat([originals, probes]), z


def expected_gradient(name: str, settings=SETTINGS) -> torch.Tensor:
    """The mean gradient of a form's surrogate at pi_theta = pi_old, advantages being rewards."""
    theta = {key: value.requires_grad_() for key, value in parameters().items()}
    density, z = densities(theta)
    share = torch.tensor([1 - SHARE] * len(ORIGINALS) + [SHARE] * len(PROBES), dtype=torch.float64)
    rollouts, form = rows(), FORMS[name]
    trained = [form.trained(row, SCRIPT) if row.is_probe else row for row in rollouts]
    logps = pad_sequence([token_logps(theta, row.completion_ids) for row in trained], batch_first=True)
    inputs = {
        "completion_mask": pad_sequence([torch.tensor(row.trained_mask) for row in trained], batch_first=True),
        "segment_kinds": pad_sequence(
            [torch.tensor(row.kinds, dtype=torch.int8) for row in trained], True, PADDING_KIND
        ),
        "pool_logps": torch.full(logps.shape, -math.log(len(DOUBTS))),
        "advantages": torch.tensor([reward(row.completion_ids) for row in rollouts], dtype=torch.float64),
        "mixing_share": torch.tensor(SHARE),
        "failure_rate": torch.tensor(z),
    }
    result = realign(inputs, logps.detach(), form, settings)
    inputs |= result.inputs
    advantages = inputs["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    ratio = (logps - inputs.get("old_per_token_logps", logps.detach())).exp()
    surrogate = (ratio * advantages * inputs["completion_mask"]).sum(1)
    return flat((density * share * surrogate).sum(), theta)


def flat(objective, theta) -> torch.Tensor:
    gradients = torch.autograd.grad(objective, list(theta.values()), allow_unused=True)
    pairs = zip(gradients, theta.values(), strict=True)
    return torch.cat([torch.zeros_like(value).flatten() if g is None else g.flatten() for g, value in pairs])


def exactly(objective) -> torch.Tensor:
    theta = {key: value.requires_grad_() for key, value in parameters().items()}
    return flat(objective(theta), theta)


def policy_objective(theta):
    return sum(token_logps(theta, ids).sum().exp() * reward(ids) for ids in ORIGINALS)


def imitation(theta, cut=lambda ids: ids):
    """The log-likelihood of probes, as the policy's own, weighed by reward."""
    density, _ = densities(theta)
    probes = zip(density[len(ORIGINALS) :], PROBES, strict=True)
    return sum(weight * reward(ids) * token_logps(theta, cut(ids)).sum() for weight, ids in probes)


def value_of_going_on(theta):
    """Of the prefixes and prompts that probes have, and of those of the batch, not of the policy in training."""
    density, _ = densities(theta)
    pairs = zip(density[len(ORIGINALS) :], PROBES, strict=True)
    return sum(p * reward(ids) * token_logps(theta, ids)[3] for p, ids in pairs)


def agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_none_imitates_whole_probes():
    agree(expected_gradient("none"), (1 - SHARE) * exactly(policy_objective) + SHARE * exactly(imitation))


def test_continuation_is_the_value_of_going_on_without_bias():
    """Log-likelihood times density is the value's gradient: sum p(c) R(c) d log p(c) = d sum p(c) R(c)."""
    theta = {key: value.requires_grad_() for key, value in parameters().items()}
    started = theta["prefix"].detach().softmax(0)[list(Z_PREFIXES)]
    started = started / started.sum()
    tries = theta["try"].log_softmax(-1)[list(Z_PREFIXES), :, 2].exp()  # the probability of the right one
    value = flat((started.unsqueeze(1) / len(DOUBTS) * tries).sum(), theta)
    agree(exactly(value_of_going_on), value)
    agree(expected_gradient("continuation"), (1 - SHARE) * exactly(policy_objective) + SHARE * value)


def test_unprompted_imitates_going_on_without_the_thought():
    shorter = exactly(lambda theta: imitation(theta, cut=lambda ids: [ids[0], ids[3]]))
    agree(expected_gradient("unprompted"), (1 - SHARE) * exactly(policy_objective) + SHARE * shorter)


def test_sequence_is_the_policys_objective_but_for_originals_that_doubt_by_themselves():
    """Those are taken to have no density under the probe policy, and so count again what probes count already."""
    theta = {key: value.requires_grad_() for key, value in parameters().items()}
    density, _ = densities(theta)
    twice = 0.0
    for ids, probe in zip(PROBES, density[len(ORIGINALS) :], strict=True):
        own = token_logps(theta, ids).sum().exp().detach()
        posterior = SHARE * probe / ((1 - SHARE) * own + SHARE * probe)
        twice = twice + own * posterior * reward(ids) * token_logps(theta, ids).sum()
    exact = exactly(policy_objective)
    agree(expected_gradient("sequence"), exact + flat(twice, theta))


def test_token_and_decoupled_agree_at_the_first_update():
    agree(expected_gradient("token"), expected_gradient("decoupled"))


def test_floor_lies_between_decoupled_and_none():
    low = SimpleNamespace(correction_weight_min=1e-9, correction_weight_max=None)
    agree(expected_gradient("floor", low), expected_gradient("decoupled"))
    one = SimpleNamespace(correction_weight_min=1.0, correction_weight_max=1.0)
    agree(expected_gradient("floor", one), expected_gradient("none"))


# Relative distance from the policy gradient; gradient towards doubting behind failing prefixes, as a multiple of it.
BIAS = {
    "token": (0.089, 5.93),
    "decoupled": (0.089, 5.93),
    "sequence": (0.002, 4.01),
    "none": (0.184, 241.29),
    "floor": (0.090, 25.04),
    "continuation": (0.120, 0.90),
    "unprompted": (0.158, 0.33),
}


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.replays])
def test_bias_in_the_enumerated_policy(name):
    exact, gradient = exactly(policy_objective), expected_gradient(name)
    distance = ((gradient - exact).norm() / exact.norm()).item()
    towards = [values[3:21].view(3, 6)[1:, :2].sum().item() for values in (gradient, exact)]
    assert (distance, towards[0] / towards[1]) == pytest.approx(BIAS[name], abs=0.001, rel=0.002)
    assert f"| {distance:.3f} | {towards[0] / towards[1]:.1f} |" in row_of(name)


# What the docs and the commands say


def row_of(name: str) -> str:
    table = (Path(__file__).parents[2] / "docs" / "correction.md").read_text(encoding="utf-8")
    return next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_docs_say_what_the_object_says(form):
    assert f"| {form.summary} | {form.expectation} |" in row_of(form.name)


class Halved(CorrectionForm):
    """As a user would write it: the probes of a batch count half."""

    name, summary, expectation = "halved", "probes at half weight", "nothing in particular"

    def log_weights(self, mixture, args):
        is_probe = (mixture.kinds == SegmentKind.PROBE).any(dim=1, keepdim=True)
        return torch.where(is_probe, math.log(0.5), 0.0)


@pytest.fixture
def halved():
    register(Halved())
    yield FORMS["halved"]
    del FORMS["halved"]


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_a_form_of_ones_own_is_registered_by_one_object(halved, tmp_path):
    with pytest.raises(ValueError, match="named 'halved' already"):
        register(Halved())
    options = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--correction", "halved"]
    (config,) = TrlParser([REXRAGConfig]).parse_args_and_config(options)
    assert config.correction_form is halved
    assert halved.describe(config) == "halved: probes at half weight"
    inputs = {
        "completion_mask": torch.ones(2, 3),
        "segment_kinds": torch.tensor([[0, 3, 0], [0, 0, 0]]),
        "pool_logps": torch.zeros(2, 3),
        "advantages": torch.tensor([2.0, -1.0]),
        "mixing_share": torch.tensor(0.5),
        "failure_rate": torch.tensor(0.5),
    }
    replaced = realign(inputs, torch.zeros(2, 3), halved, config).inputs
    assert set(replaced) == {"advantages"}
    torch.testing.assert_close(replaced["advantages"], torch.tensor([[1.0], [-1.0]]))
    halved.log_weights = lambda mixture, args: torch.zeros(2)  # TRL would spread it over rows and rows
    with pytest.raises(ValueError, match=r"'halved' gives weights of shape \(2,\) for 2 rows of 3 tokens"):
        realign(inputs, torch.zeros(2, 3), halved, config)


def test_a_form_is_described_with_the_settings_that_it_reads(tmp_path):
    settings = {"correction": "floor", "correction_weight_min": 0.3, "correction_weight_max": 2.0}
    config = REXRAGConfig(output_dir=str(tmp_path), **CPU, **settings)
    said = config.correction_form.describe(config)
    assert said.startswith("floor: ") and "min 0.3" in said and "max 2.0" in said and "density exact" in said
    config = REXRAGConfig(output_dir=str(tmp_path), **CPU, correction="continuation")
    assert "density" not in config.correction_form.describe(config)


# By hand


def test_floor_holds_weights_from_both_sides():
    """The decoupled weights of tests/correction/test_densities.py: 0.906164 on the prefix, 0.498667 and 0.069447 on
    the prompt, 1 behind it, 4/3 on an original."""
    settings = SimpleNamespace(correction_weight_min=0.1, correction_weight_max=1.2)
    inputs = {
        "completion_mask": torch.ones(2, 5),
        "segment_kinds": torch.tensor([[0, 0, 3, 3, 0], [0] * 5]),
        "pool_logps": torch.tensor([[0, 0, math.log(0.25), 0.0, 0], [0.0] * 5]),
        "advantages": torch.tensor([1.0, -2.0]),
        "mixing_share": torch.tensor(0.25),
        "failure_rate": torch.tensor(0.5),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0, -4.0, -0.5]] * 2),
    }
    replaced = realign(inputs, torch.zeros(2, 5), FORMS["floor"], settings).inputs["advantages"]
    expected = torch.tensor([[0.906164, 0.906164, 0.498667, 0.1, 1.0], [-2.4] * 5])
    torch.testing.assert_close(replaced, expected, rtol=1e-5, atol=1e-5)


def segment(kind, ids, text="", logprobs=None):
    return Segment(SegmentKind[kind], ids, text, logprobs)


def test_continuation_trains_what_stands_behind_the_prompt():
    probe = Trajectory(
        [1],
        [
            segment("POLICY", [2, 3], "so", [-1.0, -2.0]),
            segment("INFORMATION", [4]),
            segment("POLICY", [5], "so", [-1.0]),
            segment("PROBE", [6, 7]),
            segment("POLICY", [8], "hm", [-3.0]),
            segment("INFORMATION", [9]),
            segment("POLICY", [10], "oak", [-4.0]),
        ],
        pool_logprobs=[-1.0, 0.0],
    )
    trained = FORMS["continuation"].trained(probe, SCRIPT)
    assert trained.completion_ids == probe.completion_ids and trained.kinds == probe.kinds
    assert trained.trained_mask == [0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert probe.trained_mask == [1, 1, 0, 1, 1, 1, 1, 0, 1]  # shared with the original, and left as it was
    assert trained.model_length == 7


POOL = ["<think> Wait I may be wrong .", "<think> Done . </think> I go on"]
BUDGET = RolloutBudget(max_turns=3, max_turn_tokens=60, max_observation_tokens=80, max_sequence_length=400, top_k=1)
SEARCH = "<think> so </think> <search> owl </search>"


def finished_probe(tokenizer, retriever, answer, continuation, prompt=0):
    """A probe of an original that searched once and answered; `continuation` holds its turns."""
    turns = [[SEARCH], [answer], *([turn] for turn in continuation)]
    agent = agent_for(ScriptedGenerator(tokenizer, turns), retriever, tokenizer, BUDGET)
    (original,) = agent.rollout([[5, 6]])
    probe = start_probe(agent, original, 0, POOL, prompt)
    agent.resume([probe])
    return probe, agent.script


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_unprompted_cuts_prompt_and_thought_and_nothing_else(word_tokenizer, retriever):
    answer, turns = "<think> red </think> <answer> red </answer>", ["Maybe not </think> " + SEARCH, SEARCH_OAK]
    probe, script = finished_probe(word_tokenizer, retriever, answer, turns)
    before = [replace(part) for part in probe.segments]
    trained = FORMS["unprompted"].trained(probe, script)
    kinds = [part.kind.name for part in trained.segments]
    assert kinds == ["POLICY", "INFORMATION", "POLICY", "POLICY", "INFORMATION", "POLICY"]
    information = probe.segments[1].ids
    written = [SEARCH, None, "<think> red </think>", SEARCH, None, SEARCH_OAK]
    expected = [information if text is None else encode(word_tokenizer, text) for text in written]
    assert [part.ids for part in trained.segments] == expected
    assert trained.segments[3].text.strip() == SEARCH
    # before the cut the engine sampled in this context, behind it in another
    assert trained.segments[0].logprobs == [-1.0] * 6 and trained.segments[2].logprobs == [-1.0] * 3
    assert [part.logprobs for part in trained.segments[3:]] == [None] * 3
    assert not trained.is_probe and trained.pool_logprobs is None
    assert (trained.answer, trained.parent, trained.prompt_ids) == ("oak", 0, [5, 6])
    assert probe.segments == before and probe.is_probe


SEARCH_OAK = "<think> oak </think> <answer> oak </answer>"


@pytest.mark.parametrize(
    ("continuation", "prompt", "outcome"),
    [
        (["Maybe <answer> oak </answer>"], 0, "unclosed"),  # never closed
        (["Maybe <search> owl </search>", "</think> <answer> oak </answer>"], 0, "unclosed"),  # searched within it
        (["Maybe so", "</think> <answer> oak </answer>"], 0, "unclosed"),  # feedback came before it was closed
        (["Maybe <search> owl </think> </search>", "<answer> oak </answer>"], 0, "unclosed"),  # inside the query
        (["Maybe </think>", "<answer> oak </answer>"], 0, ["<feedback>", "<answer> oak </answer>"]),
        (["Maybe </think> so </think> <answer> oak </answer>"], 0, ["so </think> <answer> oak </answer>"]),
        (["<answer> oak </answer>"], 1, ["<answer> oak </answer>"]),  # the prompt closes its own thought
    ],
)
def test_which_thoughts_can_be_cut_out(word_tokenizer, retriever, continuation, prompt, outcome):
    answer = "<think> red </think> <answer> red </answer>"
    probe, script = finished_probe(word_tokenizer, retriever, answer, continuation, prompt)
    trained = FORMS["unprompted"].trained(probe, script)
    if isinstance(outcome, str):
        assert trained == outcome
        return
    rest = [FEEDBACK_TEXT if text == "<feedback>" else text for text in outcome]
    assert [part.ids for part in trained.segments[3:]] == [encode(word_tokenizer, text) for text in rest]


def test_nothing_behind_the_thought_is_nothing_to_train(word_tokenizer, retriever):
    probe, script = finished_probe(
        word_tokenizer, retriever, "<answer> red </answer>", ["x </think>", "<answer> oak </answer>"]
    )
    probe.segments = probe.segments[: probe.probe_segment + 2]  # as if the tokens had run out there
    assert FORMS["unprompted"].trained(probe, script) == "unclosed"


@pytest.mark.parametrize(
    ("answer", "continuation", "kept"),
    [
        # "><answer> " is one token: what is left of it before the tag, ">", would be lost with the prompt
        ("<think> so.</think><answer> red </answer>", " hm </think>\n<answer> oak </answer>", None),
        # "> " is the prefix's own; ".</think>\n" holds white space beyond the cut, and goes as a whole
        (
            "<think> so.</think> <answer> red </answer>",
            " hm.</think>\n<answer> oak </answer>",
            "<answer> oak </answer>",
        ),
        # "><answer> " again, behind the thought: its tag would be lost
        ("<think> so.</think> <answer> red </answer>", " so.</think><answer> oak </answer>", None),
        # ">" ends where the thought does
        ("<think> so.</think> <answer> red </answer>", " so </think><search", "<search"),
    ],
)
def test_a_cut_inside_a_token_drops_the_probe(bpe_tokenizer, retriever, answer, continuation, kept):
    turns = [continuation, "<answer> oak </answer>"]
    probe, script = finished_probe(bpe_tokenizer, retriever, answer, turns)
    trained = FORMS["unprompted"].trained(probe, script)
    if kept is None:
        assert trained == "token"
        return
    first = probe.segments[probe.probe_segment + 1]
    assert trained.segments[3].text == kept
    assert trained.segments[3].ids == first.ids[-len(trained.segments[3].ids) :]
    assert trained.segments[2] == probe.segments[2]
