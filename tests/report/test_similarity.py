"""CKA, and the states that it compares, on random tiny models."""

import jax
import numpy as np
import pytest

from aura_jax import checkpoint
from aura_jax.data.manifest import load_manifest
from aura_jax.models.speech_llm import Columns
from aura_jax.report import similarity
from aura_jax.report.similarity import cka, gram
from aura_jax.train import objectives


def states(seed: int, n: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def test_cka_of_states_that_agree_up_to_rotation_and_scale_is_one():
    h_nxD = states(0, 64, 32)
    rotation, _ = np.linalg.qr(states(1, 32, 32))
    assert cka(gram(h_nxD), gram(3.0 * h_nxD @ rotation)) == pytest.approx(1.0, abs=1e-5)


def test_cka_of_states_with_nothing_in_common_is_zero_on_average_however_wide():
    found = [cka(gram(states(2 * i, 100, 300)), gram(states(2 * i + 1, 100, 300))) for i in range(20)]
    assert abs(np.mean(found)) < 0.02
    # The biased estimator would find a likeness of about 0.75 here.
    centre = np.eye(100) - 1 / 100
    k, other = (centre @ gram(states(i, 100, 300)) @ centre for i in (0, 1))
    assert (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()) > 0.5


def test_cka_does_not_see_the_length_of_a_state():
    h_nxD, other_nxE = states(0, 64, 16), states(1, 64, 8) + states(0, 64, 16)[:, :8]
    longer_nxD = h_nxD * np.linspace(0.1, 100, 64)[:, None].astype(np.float32)
    assert cka(gram(longer_nxD), gram(other_nxE)) == pytest.approx(cka(gram(h_nxD), gram(other_nxE)), abs=1e-5)


def test_states_are_those_of_the_model(tiny_loaded, sample_data, tmp_path):
    built, variables = tiny_loaded
    c = built.config.copy_and_resolve_references()
    rows = load_manifest(sample_data / "commands" / "test_new_voices.jsonl")[:4]
    (batch,) = similarity.held_out_batches(built, rows)
    with jax.set_mesh(checkpoint.system_mesh(c)):
        found_LxBxAxD = similarity.student_states(built, variables, batch)
        assert len(found_LxBxAxD) == built.model.config.llm.n_blocks > built.model.config.lora.n_blocks
        # The last block's, after the final norm, are what the whole model returns at the audio columns.
        mel = objectives.student_mel(built, batch, None)
        h_BxTxD, _ = built.model.apply(variables, Columns.of(batch), *mel)
        norm = built.model.bind(variables).llm.final_norm
        expected_BxAxD = np.take_along_axis(np.asarray(h_BxTxD), batch.audio_position_BxKxA[:, 0, :, None], axis=1)
        np.testing.assert_allclose(norm(found_LxBxAxD[-1]), expected_BxAxD, rtol=1e-5, atol=1e-5)
        # And adapters act on the adapted blocks.
        plain = {"params": variables["params"]}
        assert np.abs(similarity.student_states(built, plain, batch)[0] - found_LxBxAxD[0]).max() > 1e-3
