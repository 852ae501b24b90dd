"""Small real parts that tests share: tokenizers made on the spot, a tiny Qwen2, a corpus, a scripted generator."""

from __future__ import annotations

import threading

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rex_rag.models.generation import Generation
from rex_rag.probes.explorer import Failed, reopen
from rex_rag.probes.mixed_sampling import MixedSampler, MixedSamplingConfig
from rex_rag.probes.pool import ExplorationPool, PoolExplorer
from rex_rag.protocols import SearchR1
from rex_rag.protocols.inert import ALL_TAGS
from rex_rag.protocols.search_r1 import FEEDBACK_TEXT
from rex_rag.rollout.agent import Agent
from rex_rag.rollout.script import RolloutBudget
from rex_rag.tools import SearchTool
from rex_rag.types import Passage

WORDS = "red blue green gold oak elm fox owl river hill where is the tree of Doc Title ( ) 1 2 : . abcdef Question"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, every tag one token: a random policy often writes tags."""
    pool_words = "<think> Wait I may be wrong . Maybe not so Hold on"
    pieces = [*WORDS.split(), *pool_words.replace("<think>", "").split()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<unk>", "<eos>", *pieces]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in ALL_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_bpe_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained so that tokens merge across tag borders ("> <", ".</", "><")."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="\x00", behavior="isolated")  # merges may cross everything
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [backend.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    text = [
        "<think> the owl is in the oak.</think>\n<search> where is the owl </search>",
        "\n\n<information>Doc 1(Title: Owl) the owl</information>\n\n<think> so.</think><answer> oak </answer>",
        ".</think>\n<answer> red </answer>. </answer>. \n</search>\n",
        FEEDBACK_TEXT,
    ] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(tokenizer, seed: int = 0, hidden: int = 32) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)


PASSAGES = [
    Passage("0", "Fox", "the fox is red"),
    Passage("1", "Owl", "the owl is in the oak"),
    Passage("2", "River", "the river of gold"),
    Passage("3", "Hill", "the hill is green"),
]


class ScriptedGenerator:
    """Plays texts back, in the order of the calls, encoded by the tokenizer; checks what it is given."""

    equal_rows = False

    def __init__(self, tokenizer, turns: list[list[str]]) -> None:
        self.tokenizer = tokenizer
        self.turns = list(turns)
        self.seen: list[list[list[int]]] = []

    def generate(self, prompt_ids, max_new_tokens):
        self.seen.append([list(row) for row in prompt_ids])
        texts = self.turns.pop(0)
        assert len(texts) == len(prompt_ids), f"{len(prompt_ids)} rows asked, {len(texts)} scripted"
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [Generation(row[:max_new_tokens], [-1.0] * len(row[:max_new_tokens])) for row in ids]


def agent_for(generator, retriever, tokenizer, budget, max_over_ranks=None, context_length=None, **protocol) -> Agent:
    """Search-R1 over one generator, whatever the stop strings."""
    return Agent(
        lambda stop: generator,
        [SearchTool(retriever, budget.top_k)],
        tokenizer,
        SearchR1(**protocol),
        budget,
        max_over_ranks=max_over_ranks or (lambda count: count),
        context_length=context_length,
    )


def play(agent: Agent, generator) -> None:
    """Have an agent's turns come from this generator."""
    agent.driver.generator = lambda stop: generator


def token_gradients(trainer, inputs):
    """log pi_theta and d loss / d log pi_theta of every token."""
    seen = {}
    before_loss = trainer.before_loss

    def keep(inputs, per_token_logps):
        per_token_logps.retain_grad()
        seen["logps"] = per_token_logps
        before_loss(inputs, per_token_logps)

    trainer.before_loss = keep
    try:
        trainer.compute_loss(trainer.model, inputs).backward()
    finally:
        del trainer.before_loss
    return seen["logps"].detach(), seen["logps"].grad


STOP_STRINGS = SearchR1().stop_strings


def build_prompt(question: str, template: str | None = None, forbidden=()) -> list[dict[str, str]]:
    return SearchR1(template=template).messages(question, forbidden)


class Drawn:
    """Random numbers of which one is asked for, and known."""

    def __init__(self, number: int) -> None:
        self.number = number

    def integers(self, count: int) -> int:
        return self.number


def start_probe(agent: Agent, original, index: int, prompts, prompt: int):
    """A probe of an original with the prompt of this number."""
    explorer = PoolExplorer(ExplorationPool(prompts, agent.script.tokenizer), agent.script)
    [proposal] = explorer.propose([Failed(original, index, Drawn(prompt))])
    return reopen(original, proposal, agent.budget.max_sequence_length)


PROBE_POOL = ["<think> Wait I may be wrong .", "<think> Maybe not so .", "<think> Hold on ."]
RIGHT, WRONG, SILENT = "<answer> oak </answer>", "<answer> red </answer>", "<think> oak </think>"
BUDGET = RolloutBudget(max_turns=1, max_turn_tokens=40, max_observation_tokens=60, max_sequence_length=300, top_k=1)


class TwoRanks:
    """Two threads in the place of two processes: a gather that waits for both."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=20)
        self.items = [None, None]

    def gather(self, rank):
        def call(item):
            self.items[rank] = item
            self.barrier.wait()
            items = list(self.items)
            self.barrier.wait()
            return items

        return call


def sampler_for(
    tokenizer,
    retriever,
    turns,
    *,
    score=None,
    trained=lambda probe: probe,
    gather=lambda item: [item],
    rank=0,
    **config,
):
    settings = {"originals_per_question": 2, "probe_slots": 2, "probe_probability": 1.0, "probe_filter": "likelihood"}
    gathered_max = lambda count: max(gather(count))  # noqa: E731
    agent = agent_for(ScriptedGenerator(tokenizer, turns), retriever, tokenizer, BUDGET, gathered_max)
    return MixedSampler(
        agent,
        PoolExplorer(ExplorationPool(PROBE_POOL, tokenizer), agent.script),
        MixedSamplingConfig(**{**settings, "seed": 0, **config}),
        score_probes=score or (lambda probes: [0.0] * len(probes)),
        trained=trained,
        gather=gather,
        rank=rank,
    )


def run_on_both(work) -> None:
    """Run `work(rank)` in two threads that stand for two processes."""
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
