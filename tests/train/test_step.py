"""The step: what it changes, what it leaves alone, and what the compiled program holds."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import sharding
from aura_jax.convert import random_models
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
    """Every shape, of whatever dtype."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)}


# What these return was in memory before; the loops' and branches' own bodies are looked through like any computation.
_WRITE_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}


def written(text: str) -> list[tuple[tuple[int, ...], str]]:
    """Returns (shape, line) of every array, of whatever dtype, that an optimised program writes.

    What is inside a fusion stays in registers; its result is what the line of the fusion itself says.
    """
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    out, computation = [], ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = head[1]
        # NAME = SHAPE OP(...), where the shape of several results is a parenthesis.
        instruction = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if instruction and computation not in fused and instruction[2] not in _WRITE_NOTHING:
            out += [(shape, line.strip()) for shape in sorted(hlo_shapes(instruction[1]))]
    return out


def copies(text: str, weights: dict[str, jax.Array]) -> list[str]:
    """Returns a line for every array that is as large as one of `weights`, and not the argument itself."""
    path_of_size = {x.size: path for path, x in weights.items()}
    sizes = [(math.prod(shape), line) for shape, line in written(text)]
    return [f"{path_of_size[size]}: {line[:300]}" for size, line in sizes if size in path_of_size]


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


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory):
    """Models whose stacked kernels and embedding table have as many elements as no other array of the step.

    Squares of 7 and 17, and the factors 107, 73 and 71 (of the vocabulary, 355), are in no other dimension.
    """
    llm, teacher = (tmp_path_factory.mktemp(name) for name in ("llm", "teacher"))
    random_models.build_llm(llm, n_blocks=8, width=56, mlp_width=107)
    random_models.build_whisper(teacher, n_blocks=5, width=34, mlp_width=73)
    return {"model__llm": str(llm), "model__teacher": str(teacher), "lora__n_blocks": 3}


def stacked(frozen: dict) -> dict[str, jax.Array]:
    """The frozen kernels [N, I, O] that scans run over, and the embedding table [V, D]."""
    flat = sharding.flatten(frozen)
    weights = {p: x for p, x in flat.items() if re.search(r"(attn|mlp)/\w+/kernel$|embed/embedding$", p)}
    assert {p.split("/mlp")[0] for p in weights if "/mlp" in p} == {
        "params/llm/adapted",
        "params/llm/plain",
        "teacher/blocks",
    }
    return weights


@pytest.mark.optimised
@pytest.mark.parametrize("matmul_dtype", ["", "bfloat16"])
@pytest.mark.parametrize(
    ("objectives", "accumulate"),
    [
        ({"lm": 1.0, "distill": 1.0}, 1),
        ({"lm": 1.0, "distill": 1.0, "text_anchor": 1.0, "text_kd": 1.0}, 2),
        ({"response_kd": 1.0, "hidden_l2": 1.0, "embedding_l2": 1.0}, 1),
    ],
    ids=["speech", "all, accumulated", "the transcript, too"],
)
def test_the_compiled_step_holds_no_full_logits_and_no_second_copy_of_the_weights(
    make_config, make_run, odd_models, objectives, accumulate, matmul_dtype
):
    step, state, frozen, batch, built = prepare(
        make_config,
        make_run,
        objectives,
        model__matmul_dtype=matmul_dtype,
        train__accumulate=accumulate,
        train__loss_chunk=4,
        **odd_models,
    )
    compiled = step.lower(state, frozen, step_lib.Constants(), batch).compile()
    text, vocab, width = compiled.as_text(), built.model.config.llm.vocab, built.model.config.llm.width
    rest = lambda shape: math.prod(shape) // vocab
    logits = [s for s in hlo_shapes(text) if vocab in s and rest(s) > 4 and sorted(s) != sorted((vocab, width))]
    assert not logits, logits
    assert batch.target_id_BxR.size > 4 and len(batch.tokens_BxT) == 4  # so that full logits would have been seen

    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))  # donated, and reused
    # Outputs beyond the donated state are a few scalars: no frozen leaf is passed through.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
    found = copies(text, stacked(frozen))
    assert not found, "\n".join(found)


def test_a_copy_of_the_weights_would_be_seen():
    weights = {"kernels": jnp.ones((3, 8, 8)), "table": jnp.ones((35, 8))}

    def found(kernels, table):
        def run(weights, x):
            x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels(weights["kernels"]))
            return x.astype(jnp.float32) @ table(weights["table"]).T

        text = jax.jit(run).lower(weights, jnp.ones((2, 8), kernels(weights["kernels"]).dtype)).compile().as_text()
        return {line.partition(":")[0] for line in copies(text, weights)}

    as_it_is, half = lambda x: x, lambda x: x.astype(jnp.bfloat16)
    assert found(as_it_is, as_it_is) == set()
    assert found(half, as_it_is) == {"kernels"}
    assert found(lambda x: x.swapaxes(1, 2), as_it_is) == {"kernels"}
    assert found(as_it_is, lambda x: half(x).astype(jnp.float32)) == {"table"}


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


def test_bfloat16_stays_close_to_float32_and_keeps_float32_masters(make_config, make_run):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        step, state, frozen, batch, _ = prepare(
            make_config,
            make_run,
            {"lm": 1.0, "distill": 1.0, "text_anchor": 10.0},
            model__dtype=dtype,
            model__param_dtype=dtype,
        )
        before = jax.device_get(state.trained)
        assert {x.dtype for x in jax.tree.leaves(frozen["params"]["llm"])} == {jnp.dtype(dtype)}
        losses[dtype] = []
        for _ in range(3):
            state, metrics = step(state, frozen, step_lib.Constants(), batch)
            assert all(np.isfinite(x) for x in metrics.values()) and int(state.skipped) == 0
            losses[dtype].append([metrics[f"loss/{name}"] for name in ("lm", "distill", "text_anchor")])
        masters = jax.tree.leaves((state.trained, state.moments))
        assert {x.dtype for x in masters if x.ndim} == {jnp.dtype(jnp.float32)}
        moved = {path: np.abs(x - before[path]).max() for path, x in state.trained.items()}
        assert min(moved.values()) > 0
    full, half = np.asarray(losses["float32"]), np.asarray(losses["bfloat16"])
    np.testing.assert_allclose(half, full, rtol=0.02, atol=1e-3)
    assert (half[2, :2] < half[0, :2]).all()


def test_learning_rate_warms_up_and_falls(make_config):
    stage = make_config().train.stages.only
    stage.update(steps=100, warmup_steps=10, learning_rate=1e-3, final_fraction=0.1)
    rate = step_lib.learning_rate(stage)
    values = [float(rate(i)) for i in range(101)]
    assert np.argmax(values) == 10 and values[10] == pytest.approx(1e-3)
    assert values[100] == pytest.approx(1e-4) and values[0] == pytest.approx(1e-4)
