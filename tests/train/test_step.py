"""The step: what it changes, what it leaves alone, and what the compiled program holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax.train import step as step_lib
from tests.train.conftest import same, trainable

pytestmark = pytest.mark.slow  # each test compiles its own step


def prepare(make_config, make_run, objectives=None, **overrides):
    c = make_config(**(objectives or {"lm": 1.0, "distill": 1.0}))
    c.distill.target_norm = "layernorm"
    for key, value in overrides.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    built, variables, batch, mesh = make_run(c)
    rates, trained, frozen = trainable(built, variables)
    state = step_lib.new_state(c, trained, 0, mesh)
    step = step_lib.jit_step(built, c.train.stages.only, 0, rates, mesh)
    return step, state, frozen, batch, built


def hlo_shapes(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}


def test_loss_falls_and_only_trained_variables_change(make_config, make_run):
    step, state, frozen, batch, _ = prepare(make_config, make_run)
    before, frozen_before = jax.device_get((state.trained, frozen))
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, step_lib.Constants(), batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert same(frozen, frozen_before)
    changed = {path for path, x in state.trained.items() if (np.asarray(x) != before[path]).any()}
    assert changed == set(before)
    assert "params/embedder/text_rms" not in changed


@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_accumulation_equals_the_big_batch(make_config, make_run, layout):
    results = []
    for n in (1, 2):
        step, state, frozen, batch, _ = prepare(
            make_config,
            make_run,
            {"lm": 1.0, "distill": 1.0, "text_anchor": 1.0},
            train__accumulate=n,
            data__layout=layout,
            data__row_tokens=160,
            data__row_clips=4,
        )
        for _ in range(2):
            state, metrics = step(state, frozen, step_lib.Constants(), batch)
        results.append((metrics, state.trained))
    for name, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][name], rtol=2e-5, atol=1e-7, err_msg=name)
    for path, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_text_objectives_are_zero_before_training_and_hold_afterwards(make_config, make_run):
    for name in ("text_anchor", "text_kd"):
        step, state, frozen, batch, _ = prepare(make_config, make_run, {"lm": 1.0, name: 1.0})
        state, first = step(state, frozen, step_lib.Constants(), batch)
        assert abs(float(first[f"loss/{name}"])) < 1e-6  # B starts at zero: adapters change nothing yet
        for _ in range(3):
            state, later = step(state, frozen, step_lib.Constants(), batch)
        assert float(later[f"loss/{name}"]) > 1e-6


def test_a_step_with_non_finite_gradients_is_skipped_and_counted(make_config, make_run):
    step, state, frozen, batch, _ = prepare(make_config, make_run)
    bad = batch._replace(waveform_BxKxS=batch.waveform_BxKxS * jnp.nan)
    state, _ = step(state, frozen, step_lib.Constants(), batch)
    before = jax.device_get(state)
    state, metrics = step(state, frozen, step_lib.Constants(), bad)
    assert int(metrics["skipped_in_a_row"]) == 1 and int(state.step) == 2
    assert same(state.trained, before.trained) and same(state.moments, before.moments)
    state, metrics = step(state, frozen, step_lib.Constants(), bad)
    assert int(metrics["skipped_in_a_row"]) == 2
    state, metrics = step(state, frozen, step_lib.Constants(), batch)
    assert int(metrics["skipped_in_a_row"]) == 0
    assert not same(state.trained, before.trained)


def test_rates_by_path(make_config, make_run):
    slow = (("lora/", 1.0), ("heads/", 1.0), ("params/embedder/(?!text_rms)", 1e-6))
    step, state, frozen, batch, _ = prepare(make_config, make_run, trainable=slow)
    before = jax.device_get(state.trained)
    state, _ = step(state, frozen, step_lib.Constants(), batch)
    moved = {path: float(jnp.abs(x - before[path]).max()) for path, x in state.trained.items()}
    assert max(v for path, v in moved.items() if "embedder" in path) < 1e-6
    assert max(v for path, v in moved.items() if path.startswith("lora")) > 1e-4


def test_the_compiled_step_holds_no_full_logits_and_no_second_copy_of_the_weights(make_config, make_run):
    step, state, frozen, batch, built = prepare(make_config, make_run, train__loss_chunk=4)
    compiled = step.lower(state, frozen, step_lib.Constants(), batch).compile()
    vocab = built.model.config.llm.vocab
    rows = len(batch.tokens_BxT)
    logits = [s for s in hlo_shapes(compiled.as_text()) if s[-1] == vocab and np.prod(s[:-1]) > 4]
    assert not logits, logits  # nor [D, V], a transposed copy of the embedding table
    assert batch.target_id_BxR.size > 4 and rows == 4  # so that full logits would have been seen

    memory = compiled.memory_analysis()
    trained = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.moments)))
    assert memory.alias_size_in_bytes >= trained  # donated, and reused
    assert "input_output_alias" in compiled.as_text()


def test_a_frozen_weight_is_read_not_copied(make_config, make_run):
    step, state, frozen, batch, _ = prepare(make_config, make_run)
    memory = step.lower(state, frozen, step_lib.Constants(), batch).compile().memory_analysis()
    # Outputs beyond the donated state are a few scalars: no frozen leaf is passed through.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_distilling_alone_runs_neither_upper_blocks_nor_the_head(make_config, make_run):
    step, state, frozen, batch, built = prepare(make_config, make_run, {"distill": 1.0})
    compiled = step.lower(state, frozen, step_lib.Constants(), batch).compile()
    vocab = built.model.config.llm.vocab
    assert not [s for s in hlo_shapes(compiled.as_text()) if vocab in s and len(s) > 2]
    full, state_f, frozen_f, batch_f, _ = prepare(make_config, make_run, {"distill": 1.0, "lm": 1.0})
    arguments = compiled.memory_analysis().argument_size_in_bytes
    all_arguments = (
        full.lower(state_f, frozen_f, step_lib.Constants(), batch_f).compile().memory_analysis().argument_size_in_bytes
    )
    upper = sum(x.nbytes for x in jax.tree.leaves(frozen["params"]["llm"]["plain"]))
    assert all_arguments - arguments >= upper  # the upper blocks are not even arguments
    assert batch.tokens_BxT.shape[1] < batch_f.tokens_BxT.shape[1]  # rows end with the audio
    state, metrics = step(state, frozen, step_lib.Constants(), batch)
    assert set(metrics) >= {"loss/distill/block_00", "loss/distill/block_01"}


def test_learning_rate_warms_up_and_falls(make_config):
    stage = make_config().train.stages.only
    stage.update(steps=100, warmup_steps=10, learning_rate=1e-3, final_fraction=0.1)
    rate = step_lib.learning_rate(stage)
    values = [float(rate(i)) for i in range(101)]
    assert np.argmax(values) == 10 and values[10] == pytest.approx(1e-3)
    assert values[100] == pytest.approx(1e-4) and values[0] == pytest.approx(1e-4)
