"""What the configuration refuses, and that each refusal says value, reason and way out."""

import copy
import logging
import pickle

import pytest

from rex_rag.training.config import REXRAGConfig

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def make(tmp_path, **settings):
    return REXRAGConfig(output_dir=str(tmp_path), **CPU, **settings)


def test_defaults_are_the_papers(tmp_path):
    config = make(tmp_path)
    assert (config.num_originals, config.num_probe_slots, config.probe_probability) == (5, 5, 0.2)
    assert (config.keep_ratio, config.correction, config.probe_filter) == (0.12, "token", "likelihood")
    assert (config.beta, config.epsilon, config.learning_rate, config.loss_type) == (0.001, 0.2, 1e-6, "dapo")
    assert not config.use_bias_correction_kl and config.temperature == 1.0 and config.top_p == 1.0
    budget = config.rollout_budget()
    assert (config.max_prompt_length, budget.max_turn_tokens, budget.max_observation_tokens) == (2048, 500, 500)
    assert (budget.max_sequence_length, budget.top_k) == (4096, 3)
    assert config.max_completion_length == 4096
    assert len(config.exploration_pool()) == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, r"top_p is 0.9: truncated sampling biases every ratio.*top_p 1.0"),
        ({"top_k": 50}, r"top_k is 50: .*Passages per search are retrieval_top_k"),
        ({"min_p": 0.1}, r"min_p is 0.1"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty is 1.1"),
        ({"temperature": 0.0}, r"temperature is 0.0; rollouts of a group must differ"),
        ({"generation_kwargs": {"top_p": 0.5}}, r"generation_kwargs is \{'top_p': 0.5\}"),
        ({"num_generations": 5, "num_probe_slots": 5}, r"num_generations is 5 with num_probe_slots 5.*no original"),
        ({"num_probe_slots": -1}, r"num_probe_slots is -1; use 0"),
        ({"max_sequence_length": 2500}, r"cannot hold a prompt and a turn .*2048 \+ .* 500 = 2548"),
        ({"max_turn_tokens": 0}, r"max_turn_tokens is 0; use at least 1"),
        ({"retrieval_top_k": 0}, r"retrieval_top_k is 0; use at least 1"),
        ({"keep_ratio": 1.5}, r"keep_ratio is 1.5; it is a share"),
        ({"probe_probability": -0.1}, r"probe_probability is -0.1; it is a share"),
        ({"correction": "importance"}, r"correction is 'importance'; choose one of token, decoupled, sequence, none"),
        ({"correction_weight_max": 0.5}, r"correction_weight_max is 0.5; below 1"),
        ({"correction_weight_max": float("nan")}, r"correction_weight_max is nan; give a number"),
        ({"epsilon": float("nan"), "learning_rate": float("nan")}, r"(?s)learning_rate is nan.*epsilon is nan"),
        ({"correction": "floor", "correction_weight_min": 0.0}, r"correction_weight_min is 0.0; .*in \(0, 1\]"),
        ({"correction": "floor", "correction_weight_min": 1.5}, r"correction_weight_min is 1.5; above 1"),
        ({"loss_type": "vespo"}, r"loss_type is 'vespo' with correction 'token'.*the gradient vanishes.*'decoupled'"),
        ({"loss_type": "vespo", "correction": "decoupled"}, None),
        ({"loss_type": "vespo", "num_generations": 5, "num_probe_slots": 0}, None),
        (
            {"importance_sampling_level": "sequence"},
            r"importance_sampling_level is 'sequence' with .*'token'",
        ),
        ({"importance_sampling_level": "sequence", "correction": "none"}, None),
        ({"loss_type": "cispo"}, r"'cispo' with epsilon_high None: TRL cuts every importance weight to 0.2 there"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, r"'cispo' with epsilon_high 0.28: .* to 0.28 there"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, None),
        ({"loss_type": "bnpo"}, r"loss_type is 'bnpo', which averages over micro-batches.*use 'dapo'"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha is 5.0: noise .*leave it unset"),
        ({"mask_truncated_completions": True}, r"every answer would be masked"),
        ({"max_completion_length": 512}, r"max_completion_length is 512, .*max_sequence_length \(4096"),
        ({"use_transformers_continuous_batching": True}, r"cannot stop a row at a tag"),
        (
            {"exploration_prompts": "no/such/file.txt"},
            r"exploration_prompts is 'no/such/file.txt', which is not a file",
        ),
        ({"prompt_template": "no/such/file.txt"}, r"prompt_template is 'no/such/file.txt'"),
        ({"feedback_text": "no/such/file.txt"}, r"feedback_text is 'no/such/file.txt'"),
        ({"kl_token_max": 0.0}, r"kl_token_max is 0.0"),
        ({"loss_type": "grpo"}, r"loss_type is 'grpo', which averages over rows.*use 'dapo'"),
        ({"loss_type": "grpo", "num_generations": 5, "num_probe_slots": 0}, None),
        ({"remove_unused_columns": True}, r"would remove the gold answers"),
        ({"num_generations": None}, r"num_generations is None"),
        ({"format_reward_weight": 0.1, "reward_weights": [1.0, 0.5]}, r"format_reward_weight is 0.1 beside"),
        (
            {"eval_strategy": "steps", "per_device_eval_batch_size": 6, "num_generations_eval": 4},
            r"per_device_eval_batch_size is 6, not a multiple of num_generations_eval 4|divisible",
        ),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 5, "num_generations": 10}, None),
        (
            {"per_device_train_batch_size": 15, "steps_per_generation": 2, "num_generations": 6, "num_probe_slots": 3},
            None,
        ),
        ({"format_reward_weight": -1.0}, r"format_reward_weight is -1.0"),
        ({"dynamic_sampling_rounds": -1}, r"dynamic_sampling_rounds is -1; use 0 \(off\)"),
        ({"rest_after": -2}, r"rest_after is -2; use 0 \(off\)"),
        ({"reward_weights": [0.0, 1.0]}, None),
        (
            {"reward_weights": [0.0, 1.0], "dynamic_sampling_rounds": 1},
            r"does not count, but dynamic_sampling_rounds 1 judges by it.*set it to 0",
        ),
        (
            {"explorer": "endpoint"},
            r"(?s)explorer_url None and explorer_model None; name the address.*reads them; use",
        ),
        ({"explorer_url": "http://h:1"}, r"are for explorer 'endpoint', but explorer is 'pool'"),
        (
            {"explorer": "endpoint", "explorer_url": "h:1", "explorer_model": "m", "correction": "none"},
            r"the endpoint 'h:1' is not a plain http",
        ),
        ({"explorer": "endpoint", "explorer_url": "http://h", "explorer_model": "m", "correction": "none"}, None),
        ({"explorer": "lucky"}, r"explorer='lucky' is unknown; use 'pool', 'backtracking', 'model', 'endpoint'"),
        ({"use_vllm": True, "vllm_max_model_length": 1024}, r"vllm_max_model_length is 1024, less than"),
    ],
)
def test_refusals(tmp_path, settings, message):
    if message is None:
        make(tmp_path, **settings)
        return
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_groups_split_over_processes_are_refused(tmp_path, monkeypatch):
    """Two processes of 5 rows make one group of 10: TRL accepts that, but originals and probes would be apart."""
    monkeypatch.setattr(REXRAGConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"5 \* 1 = 5, not a multiple of num_generations 10"):
        make(tmp_path, per_device_train_batch_size=5)


def test_problems_are_reported_together(tmp_path):
    with pytest.raises(ValueError) as error:
        make(tmp_path, top_p=0.9, keep_ratio=2.0, max_turns=-1)
    for word in ("top_p is 0.9", "keep_ratio is 2.0", "max_turns is -1"):
        assert word in str(error.value)


def test_prompt_without_place_for_the_question_is_refused(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Answer me.")
    with pytest.raises(ValueError, match=r"has no .*placeholder"):
        make(tmp_path, prompt_template=str(path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"correction_weight_max": 2.0}, "correction_weight_max is 2.0, which correction 'token' does not read"),
        ({"correction": "decoupled", "correction_weight_max": 2.0}, None),
        ({"correction": "decoupled", "correction_weight_min": 0.5}, "correction_weight_min is 0.5, which"),
        ({"correction": "none", "probe_density": "coarse"}, "probe_density is 'coarse', which correction 'none'"),
        ({"use_bias_correction_kl": True}, "weighs the KL term by pi_theta / mu"),
        ({"use_bias_correction_kl": True, "correction": "decoupled"}, "weighs the KL term by pi_theta / pi_old"),
        ({"use_bias_correction_kl": True, "num_generations": 5, "num_probe_slots": 0}, None),
    ],
)
def test_a_form_warns_of_settings_that_it_does_not_take_as_others_do(tmp_path, caplog, settings, said):
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.config"):
        make(tmp_path, **{"num_generations": 10, "per_device_train_batch_size": 100, **settings})
    if said is None:
        assert not caplog.text
    else:
        assert said in caplog.text


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"keep_ratio": 0.12}, False),
        ({"keep_ratio": 0.25}, True),
        ({"keep_ratio": 0.25, "epsilon_high": 0.28}, False),
        ({"keep_ratio": 0.25, "correction": "decoupled"}, False),
        ({"keep_ratio": 0.25, "loss_type": "cispo", "epsilon_high": 5.0}, False),
        ({"probe_filter": "none", "probe_probability": 0.5}, True),
        ({"keep_ratio": 0.25, "num_generations": 5, "num_probe_slots": 0}, False),
    ],
)
def test_warning_beyond_the_clip_bound(tmp_path, caplog, settings, warns):
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.config"):
        make(tmp_path, per_device_train_batch_size=100, **settings)
    assert ("beyond the clip bound" in caplog.text) is warns


def test_warning_when_no_probe_can_be_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.config"):
        make(tmp_path)  # one question: floor(0.12 * 5) = 0
    assert "none is ever kept" in caplog.text


def test_vllm_stops_at_our_tags(tmp_path):
    config = make(tmp_path, use_vllm=True)
    assert config.generation_kwargs == {"stop": ["</search>", "</answer>"], "include_stop_str_in_output": True}
    assert config.vllm_max_model_length == 4096


@pytest.mark.parametrize(
    ("served", "accumulated", "save_steps", "multiple"),
    [
        *((4, 2, 100, None), (4, 2, 101, 2), (2, 4, 1, None)),
        *((3, 2, 2, 3), (3, 2, 3, None)),  # a generation batch of one update and a half
        *((2, 3, 1, 2), (2, 3, 2, None)),  # three generation batches in two updates
    ],
)
def test_warning_when_checkpoints_fall_inside_a_generation_batch(
    tmp_path, caplog, served, accumulated, save_steps, multiple
):
    with caplog.at_level(logging.WARNING, logger="rex_rag.training.config"):
        make(tmp_path, steps_per_generation=served, gradient_accumulation_steps=accumulated, save_steps=save_steps)
    assert ("save_steps" in caplog.text) is (multiple is not None)
    assert multiple is None or f"Use a multiple of {multiple}" in caplog.text


def test_secrets_are_in_nothing_that_is_saved_or_told_to_trackers(tmp_path):
    config = make(tmp_path, hub_token="hf_SECRET", model_init_kwargs={"token": "hf_SECRET", "dtype": "float32"})
    for written in (pickle.dumps(config), repr(config).encode(), config.to_json_string().encode()):
        assert b"hf_SECRET" not in written
    restored = pickle.loads(pickle.dumps(config))
    assert restored.hub_token is None and restored.model_init_kwargs == {"token": None, "dtype": "float32"}
    for pushing in (config, copy.copy(config), copy.deepcopy(config)):
        assert pushing.hub_token == pushing.model_init_kwargs["token"] == "hf_SECRET" and pushing == config


def test_fsdp_on_a_cpu_is_refused(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"use_cpu is on under an FSDP .*launch with ddp_cpu or zero3_cpu"):
        make(tmp_path)
