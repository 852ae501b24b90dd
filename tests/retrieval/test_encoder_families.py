"""Qwen3-Embedding and BGE-M3 as tiny models of their architectures, weights drawn at random.

What is held is how they are used, against transformers alone: which position becomes the vector, whatever is padded,
and what stands before queries and before nothing else. Their real weights could not be had here.
"""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config, XLMRobertaConfig

from rex_rag.retrieval.dense.encoder import Encoder
from rex_rag.retrieval.dense.families import FAMILIES, resolve_encoder

INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
TEXTS = ["oslo", "the river of rome and the hill of paris", "rome hill"]
WORDS = sorted({*" ".join([INSTRUCTION, *TEXTS]).replace(":", " ").replace(",", " ").split(), ":", ","})
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}  # which XLM-R does not have


def tiny(folder, config, template, padding_side, pooling=None):
    """A checkpoint with one token a word; `template` says what the tokenizer puts around a text."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*specials, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, n) for n, name in enumerate(specials)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "cls_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, padding_side=padding_side, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SMALL | (HEADS if config is Qwen3Config else {})
    AutoModel.from_config(
        config(vocab_size=words.get_vocab_size(), pad_token_id=1, initializer_range=0.5, **sizes)
    ).save_pretrained(folder)
    if pooling:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling

        transformer = Transformer(str(folder))
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def vector_at(folder, text, position):
    """What transformers alone makes of one text, at one position and of length 1, and the tokens it read."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        vector = AutoModel.from_pretrained(folder)(**ids).last_hidden_state[0, position].numpy()
    return vector / np.linalg.norm(vector), tokenizer.convert_ids_to_tokens(ids.input_ids[0])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["lasttoken", None])
def test_qwen3_embedding_takes_the_last_token_whichever_side_is_padded(tmp_path, padding_side, pooling):
    folder = tiny(tmp_path / "tiny", Qwen3Config, "$A </s>", padding_side, pooling)
    spec = resolve_encoder(str(folder), family="qwen3-embedding")
    encoder = Encoder(spec, ["cpu"])
    assert (encoder.spec.pooling, encoder.spec.normalize) == ("lasttoken", True)
    # Of unlike lengths in one batch, so that all but one are padded.
    for found, prefix in ((encoder.encode_queries(TEXTS), INSTRUCTION), (encoder.encode_passages(TEXTS), "")):
        for text, vector in zip(TEXTS, found, strict=True):
            expected, tokens = vector_at(folder, prefix + text, -1)
            assert tokens[-1] == "</s>" and (tokens[0] == "Instruct") is bool(prefix)
            np.testing.assert_allclose(vector, expected, atol=1e-5)
        assert abs(found[0] @ found[1]) < 0.99


def test_bge_m3_takes_the_first_token_and_no_prefix(tmp_path):
    folder = tiny(tmp_path / "tiny", XLMRobertaConfig, "<s> $A </s>", "right")
    encoder = Encoder(resolve_encoder(str(folder), family="bge-m3"), ["cpu"])
    queries, passages = encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)
    np.testing.assert_array_equal(queries, passages)
    for text, vector in zip(TEXTS, queries, strict=True):
        expected, tokens = vector_at(folder, text, 0)
        assert tokens[0] == "<s>"
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_the_table_has_the_instruction_of_the_model_card():
    family = FAMILIES["qwen3-embedding"]
    assert (family.query_prefix, family.passage_prefix) == (INSTRUCTION, "")
