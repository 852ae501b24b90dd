"""The transformers backend: rows stop on their own, at tags, end tokens and limits."""

import pytest
import torch
from parts import STOP_STRINGS, make_bpe_tokenizer, make_tiny_model, make_word_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from rex_rag.models.generation import TransformersGenerator


@pytest.mark.parametrize("make_tokenizer", [make_word_tokenizer, make_bpe_tokenizer])
def test_rows_end_at_the_first_tag_or_end_token(make_tokenizer):
    tokenizer = make_tokenizer()
    model = make_tiny_model(tokenizer)
    torch.manual_seed(0)
    generator = TransformersGenerator(model, tokenizer, stop_strings=STOP_STRINGS)
    prompts = [[5, 6, 7], [8], [9, 10]] * 40
    generations = generator.generate(prompts, max_new_tokens=40)
    assert len(generations) == 120
    lengths = {len(generation.ids) for generation in generations}
    assert len(lengths) > 3
    stopped = 0
    for generation in generations:
        assert 1 <= len(generation.ids) <= 40
        before = tokenizer.decode(generation.ids[:-1], skip_special_tokens=False)
        text = tokenizer.decode(generation.ids, skip_special_tokens=False)
        assert not any(tag in before for tag in STOP_STRINGS)
        assert tokenizer.eos_token_id not in generation.ids[:-1]
        ended = any(tag in text for tag in STOP_STRINGS) or generation.ids[-1] == tokenizer.eos_token_id
        assert ended or len(generation.ids) == 40
        stopped += ended
    assert stopped > 20


def test_sampled_tokens_follow_the_models_distribution():
    """Left padding, temperature and stopping leave the next-token distribution alone (chi-square by hand)."""
    tokenizer = make_word_tokenizer()
    model = make_tiny_model(tokenizer)
    prompt = [5, 6, 7]
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    torch.manual_seed(1)
    rows = 4000
    # every second row is longer, so that half of the rows under test are padded
    prompts = [prompt, [4, 5, 6, 7, 8]] * rows
    first = torch.tensor(
        [g.ids[0] for g in TransformersGenerator(model, tokenizer, stop_strings=STOP_STRINGS).generate(prompts, 1)]
    )[::2]
    counts = torch.bincount(first, minlength=len(tokenizer)).float()
    chi_square = ((counts - rows * probabilities).square() / (rows * probabilities)).sum().item()
    degrees = len(tokenizer) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_greedy_decoding_repeats_itself():
    tokenizer = make_word_tokenizer()
    generator = TransformersGenerator(make_tiny_model(tokenizer), tokenizer, temperature=0, stop_strings=STOP_STRINGS)
    assert generator.generate([[5, 6]], 20) == generator.generate([[5, 6]], 20)


def test_a_stop_string_is_looked_for_in_what_was_generated_alone():
    """A text that was stopped behind "." can be continued with " word"; without stop strings nothing stops it."""
    tokenizer = make_bpe_tokenizer()
    model = make_tiny_model(tokenizer)
    plain = TransformersGenerator(model, tokenizer, temperature=0, eos_token_ids=[], stop_strings=())
    prompts = [[45, 46, 47], [40, 41]]
    free = plain.generate(prompts, 12)
    assert [len(generation.ids) for generation in free] == [12, 12]
    first, second = (tokenizer.decode(free[0].ids[index]) for index in range(2))
    tail = tokenizer.decode(prompts[0][-1])
    across = TransformersGenerator(model, tokenizer, temperature=0, eos_token_ids=[], stop_strings=(tail + first,))
    assert across.generate(prompts, 12)[0] == free[0]
    inside = TransformersGenerator(model, tokenizer, temperature=0, eos_token_ids=[], stop_strings=(first + second,))
    assert inside.generate(prompts, 12)[0].ids == free[0].ids[:2]


def test_missing_pad_token_is_refused():
    tokenizer = make_word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        TransformersGenerator(make_tiny_model(make_word_tokenizer()), tokenizer, stop_strings=STOP_STRINGS)


def test_a_models_own_generation_settings_are_hidden_and_restored():
    """A repetition penalty shipped with a model would make samples and log-probabilities disagree."""
    tokenizer = make_word_tokenizer()
    model = make_tiny_model(tokenizer)
    plain = TransformersGenerator(model, tokenizer, temperature=0, stop_strings=STOP_STRINGS).generate([[5, 6]], 30)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert (
        TransformersGenerator(model, tokenizer, temperature=0, stop_strings=STOP_STRINGS).generate([[5, 6]], 30)
        == plain
    )
    assert len(set(plain[0].ids)) < len(plain[0].ids)  # what the penalties would have forbidden
    assert model.generation_config.repetition_penalty == 5.0


LORA = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.mark.parametrize(
    "wrappers",
    [
        [LoraConfig(**LORA)],
        [LoraConfig(**LORA, task_type="CAUSAL_LM")],
        [LoraConfig(**LORA), LoraConfig(**LORA, task_type="CAUSAL_LM")],
        [PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")],
    ],
    ids=["adapter of no task", "adapter", "adapter over an adapter", "prompt learning"],
)
@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generation_settings_below_an_adapter_are_hidden_and_restored(wrappers, tmp_path):
    """Also the wrapper's own where it has some, and what peft writes into the base model while it generates."""
    tokenizer = make_word_tokenizer()
    model = base = make_tiny_model(tokenizer)
    for wrapper in wrappers:
        model = get_peft_model(model, wrapper)

    def sample():
        generator = TransformersGenerator(model, tokenizer, temperature=0, eos_token_ids=[], stop_strings=())
        return generator.generate([[5, 6], [7]], 60)

    bare = sample()
    held = {module for module in model.modules() if "generation_config" in vars(module)}
    base.generation_config = own = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=[2, 9]
    )
    assert sample() == bare
    assert len(set(bare[0].ids)) < len(bare[0].ids)  # what the penalties would have forbidden
    assert base.generation_config is own
    assert {module for module in model.modules() if "generation_config" in vars(module)} == held
    model.generation_config = wrapping = GenerationConfig(repetition_penalty=3.0)
    assert sample() == bare
    assert model.generation_config is wrapping and base.generation_config is own
    base.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).to_diff_dict().items() >= {"no_repeat_ngram_size": 1}.items()
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 9]
