"""Rotary frequencies of every scaling rule against transformers, and dynamic scaling in a whole model."""

import pytest
import torch
from checkpoints import BY_NAME, load_folder, one_rank_context, prompt_logits, random_tokens, read_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headrace.config import RopeConfig, RopeScaling, RopeType
from headrace.layers.rotary import RotaryTable, amplitude, scaled_inv_freq
from headrace.models.families import HfConfig, read_model_config

LENGTH = 4096


def oracle(head_dim: int, seq_len: int | None, **parameters):
    """transformers' frequencies and amplitude for these rope parameters."""
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)


def ours(head_dim: int, max_model_len: int, **parameters) -> tuple[torch.Tensor, float]:
    """Frequencies and amplitude of the same parameters, read from a config.json."""
    config = HfConfig(
        {"max_position_embeddings": LENGTH, "rope_parameters": {"rope_theta": 10000.0, **parameters}}
    ).rope(head_dim)
    assert config.scaling is not None
    return scaled_inv_freq(config, max_model_len), amplitude(config.scaling)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

PARAMETERS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-1": {"rope_type": "linear", "factor": 1.0},
    "linear-fraction": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic-1": {"rope_type": "dynamic", "factor": 1.0},
    "llama3": LLAMA3,
    "llama3-1": LLAMA3 | {"factor": 1.0},
    "llama3-odd-factors": LLAMA3 | {"factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 17.0},
    "llama3-narrow-blend": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.001},
    "llama3-3.2": LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0},
    "yarn": YARN,
    "yarn-1": YARN | {"factor": 1.0},
    "yarn-no-truncate": YARN | {"truncate": False},
    "yarn-betas": YARN | {"beta_fast": 64.0, "beta_slow": 0.25},
    "yarn-betas-equal": YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "yarn-betas-null": YARN | {"beta_fast": None, "beta_slow": None},
    "yarn-short-original": YARN | {"original_max_position_embeddings": 16},
    "yarn-attention-factor": YARN | {"attention_factor": 0.7},
    "yarn-mscale": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-mscale-alone": YARN | {"mscale": 0.707},
    "yarn-mscale-zero": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
}


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
@pytest.mark.parametrize("max_model_len", [100, LENGTH, 3 * LENGTH + 1])
def test_frequencies_and_amplitude_equal_those_of_transformers(parameters, head_dim, max_model_len):
    expected, expected_amplitude = oracle(head_dim, max_model_len, **parameters)
    frequencies, actual_amplitude = ours(head_dim, max_model_len, **parameters)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert actual_amplitude == pytest.approx(expected_amplitude, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    half=st.integers(4, 64),
    factor=st.floats(1.0, 64.0),
    beta_slow=st.floats(0.1, 4.0),
    beta_span=st.floats(1.0, 32.0),
    original=st.integers(8, LENGTH),
    theta=st.floats(100.0, 1e7),
    truncate=st.booleans(),
)
def test_yarn_equals_transformers_for_any_parameters(half, factor, beta_slow, beta_span, original, theta, truncate):
    parameters = YARN | {
        "factor": factor,
        "beta_slow": beta_slow,
        "beta_fast": beta_slow * beta_span,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
        "truncate": truncate,
    }
    expected, expected_amplitude = oracle(2 * half, None, **parameters)
    frequencies, actual_amplitude = ours(2 * half, LENGTH, **parameters)
    # A ramp that is nearly a step turns rounding of its border into a visible difference.
    torch.testing.assert_close(frequencies, expected, rtol=1e-3, atol=1e-9)
    assert actual_amplitude == pytest.approx(expected_amplitude, rel=1e-12)


def test_dynamic_ignores_an_original_length_as_transformers_does():
    """Bug: a dynamic entry with original_max_position_embeddings was stretched from there; transformers stretches from
    max_position_embeddings."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
    expected, _ = oracle(64, 2 * LENGTH, **parameters)
    torch.testing.assert_close(ours(64, 2 * LENGTH, **parameters)[0], expected, rtol=1e-6, atol=0)


def test_no_scaling_is_the_plain_geometric_row():
    config = RopeConfig(rotary_dim=8, theta=16.0)
    assert torch.equal(scaled_inv_freq(config, 100), torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_table_is_cosine_and_sine_of_position_times_frequency():
    scaling = RopeScaling(rope_type=RopeType.YARN, factor=4.0, original_max_position_embeddings=64)
    config = RopeConfig(rotary_dim=8, scaling=scaling)
    positions = torch.tensor([0, 5, 1000, 131071])
    cos, sin = RotaryTable(config, 256, one_rank_context())(positions)
    angles = positions.double()[:, None] * scaled_inv_freq(config, 256).double()
    assert cos.shape == sin.shape == (4, 4)
    # float32 angles: an ulp of 131071 is 0.008 of a radian.
    for actual, expected in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(actual.double(), expected * amplitude(scaling), rtol=0, atol=0.01)


@pytest.mark.parametrize("num_tokens", [100, 128, 129, 300])
def test_dynamic_model_equals_one_prefill_of_transformers_at_its_full_length(tmp_path, num_tokens):
    """Within the original 128 positions unscaled; beyond, the frequencies are those of max_model_len tokens."""
    model = BY_NAME["llama-rope-dynamic"].write(tmp_path)
    prompt = random_tokens(num_tokens, seed=5)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    actual = prompt_logits(load_folder(tmp_path, max_model_len=num_tokens), prompt)
    assert (actual - expected).abs().max() < 1e-4


def test_glm_rotates_half_of_each_head_in_neighbouring_pairs(tmp_path):
    BY_NAME["glm"].write(tmp_path)
    rope = read_model_config(read_config(tmp_path))[1].layers[0].rope
    assert (rope.rotary_dim, rope.interleaved) == (8, True)
