"""A tiny ColBERT made on the spot, in the three forms in which such checkpoints are saved. Its weights are random."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.retrieval.dense_parts import WORDS

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
VOCABULARY = [*SPECIALS, *WORDS, *(mark for mark in string.punctuation if mark not in WORDS)]
IDS = {word: number for number, word in enumerate(VOCABULARY)}
QUERY_LENGTH, PASSAGE_LENGTH, DIMENSION = 8, 32, 4
FORMS = ("stanford", "pylate", "sentence_transformers")


def save_colbert(folder: Path, form: str = "stanford", seed: int = 0) -> Path:
    """BERT of one layer and a projection to four dimensions; markers `[unused0]` and `[unused1]`."""
    words = Tokenizer(models.WordPiece(IDS, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", IDS["[CLS]"]), ("[SEP]", IDS["[SEP]"])]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=words, mask_token="[MASK]", model_max_length=PASSAGE_LENGTH, **names
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(IDS), max_position_embeddings=64, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    linear = torch.randn(DIMENSION, 16)
    weights = folder / "model.safetensors"
    if form == "stanford":
        bert = {f"bert.{name}": weight for name, weight in load_file(weights).items()}
        save_file({**bert, "linear.weight": linear}, weights, metadata={"format": "pt"})
        _change(folder / "config.json", architectures=["HF_ColBERT"])
        metadata = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": QUERY_LENGTH}
        metadata |= {"doc_maxlen": PASSAGE_LENGTH, "mask_punctuation": True, "attend_to_mask_tokens": False}
        (folder / "artifact.metadata").write_text(json.dumps(metadata))
        return folder
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": linear}, folder / "1_Dense" / "model.safetensors")
    identity = "torch.nn.modules.linear.Identity"
    head = {"in_features": 16, "out_features": DIMENSION, "bias": False, "activation_function": identity}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(head))
    types = ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": kind}
        for n, (path, kind) in enumerate(zip(["", "1_Dense"], types, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = {"model_type": "ColBERT", "query_prefix": "[unused0] ", "document_prefix": "[unused1] "}
    settings |= {"query_length": QUERY_LENGTH, "document_length": PASSAGE_LENGTH, "do_query_expansion": True}
    settings |= {"attend_to_expansion_tokens": False, "skiplist_words": list(string.punctuation)}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    if form == "sentence_transformers":
        from sentence_transformers import MultiVectorEncoder

        own = folder.with_name(f"{folder.name}-own")
        MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).save_pretrained(str(own))
        return own
    return folder


def by_hand(folder: Path, ids: list[int], attended: int) -> torch.Tensor:
    """What transformers and a matrix product make of ids: vectors of length 1, (ids, 4).

    folder: of the form `stanford`. attended: so many of the first ids are seen by the others.
    """
    weights = load_file(folder / "model.safetensors")
    model = BertModel(BertConfig.from_pretrained(folder))
    model.load_state_dict({name.removeprefix("bert."): w for name, w in weights.items() if name.startswith("bert.")})
    mask = torch.tensor([[int(place < attended) for place in range(len(ids))]])
    with torch.inference_mode():
        hidden = model.eval()(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden @ weights["linear.weight"].T, dim=1)


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
