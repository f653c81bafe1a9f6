"""What the step reports of distillation, against numpy on captured states: heads, targets, masks and pairs.

Dimensions as in data/batch.py, and: N adapted blocks, P teacher blocks, n audio tokens of the whole batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aura_jax import checkpoint, config, sharding, system
from aura_jax.data.manifest import load_manifest
from aura_jax.models.speech_llm import Columns, text_context
from aura_jax.train import objectives
from aura_jax.train import step as step_lib
from aura_jax.train.inputs import Inputs
from aura_jax.train.teacher import teacher_states
from tests.train.conftest import trainable, write_manifest

pytestmark = pytest.mark.slow  # each case compiles its own step

N_BLOCKS = 3  # adapted; the teacher has two


class Reference(NamedTuple):
    """A batch, the variables but for the heads, and the states of both models at every audio token."""

    config: Any
    batch: Any
    variables: dict
    student_NxnxD: np.ndarray
    teacher_PxnxE: np.ndarray
    teacher_BxKxPxAxE: np.ndarray


@pytest.fixture(scope="module")
def reference(tiny_config, sample_data, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("reference")
    c = tiny_config()
    c.lora.update(n_blocks=N_BLOCKS, scope="all")
    c.distill.layer_map = "identity"
    c.data.train = ((str(write_manifest(tmp / "train.jsonl", sample_data)), 1.0),)
    c.data.update(layout="packed", batch_size=2, row_tokens=128, row_clips=6, max_seconds=4.0, buckets=(4.0,))
    c.train.stages.only = config.stage(8, 1e-2, {"distill": 1.0}, warmup_steps=2)
    c.train.schedule = ("only",)
    mesh, built = checkpoint.system_mesh(c), system.build(c)
    assert built.pairs == ((0, 0), (1, 1))
    inputs = Inputs(built, tmp)
    batch = inputs.to_mesh(next(inputs.batches(frozenset({"distill"}), 0)))
    rng = np.random.default_rng(0)
    flat = sharding.flatten(system.initial_variables(built, mesh))
    for path, x in flat.items():
        if path.startswith("lora/"):  # B starts at 0
            flat[path] = x + jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    variables = sharding.unflatten({path: x for path, x in flat.items() if not path.startswith("heads/")})
    model = built.model.clone(tap=lambda h, block, args: h)

    @jax.jit
    def states(student, teacher, batch):
        mel, n_frames = objectives.student_mel(built, batch, None)
        columns = Columns.of(batch)
        x = model.apply(student, columns, mel, n_frames, method="hear").x_BxTxD
        ctx = model.context(columns).replace(tap_position_BxQ=None)  # every column
        _, _, h_NxBxTxD = model.apply(student, x, ctx, method="adapted_blocks")
        B, K, S = batch.waveform_BxKxS.shape
        h_mxPxAxE = teacher_states(built, teacher, batch.waveform_BxKxS.reshape(B * K, S), batch.n_samples_BxK.ravel())
        return h_NxBxTxD, h_mxPxAxE.reshape(B, K, *h_mxPxAxE.shape[1:])

    student = {name: variables[name] for name in ("params", "lora")}
    h_NxBxTxD, teacher_BxKxPxAxE = (np.asarray(x, np.float64) for x in states(student, variables["teacher"], batch))
    # Which token of which clip stands where is read off the columns: no mask is needed.
    row, column = np.nonzero(np.asarray(batch.audio_source_BxT) >= 0)
    clip, token = np.divmod(np.asarray(batch.audio_source_BxT)[row, column], teacher_BxKxPxAxE.shape[3])
    assert len(set(zip(row.tolist(), clip.tolist(), strict=True))) >= 4 and clip.max() >= 1  # several clips in a row
    assert (np.asarray(batch.n_samples_BxK) == 0).any()  # and places for more
    teacher_PxnxE = np.moveaxis(teacher_BxKxPxAxE[row, clip, :, token], 1, 0)
    return Reference(c, batch, variables, h_NxBxTxD[:, row, column], teacher_PxnxE, teacher_BxKxPxAxE)


def normalised(target, kind):
    if kind == "none":
        return target
    axis = -1 if kind == "layernorm" else 0
    deviation = target - target.mean(axis, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(axis, keepdims=True))


def per_token(student, target, kind):
    error = student - target
    if kind == "cosine":
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(target, axis=-1)
        return 1 - (student * target).sum(-1) / norms
    if kind == "mse":
        return (error**2).mean(-1)
    if kind == "nmse":
        return (error**2).sum(-1) / (target**2).sum(-1)
    assert kind == "smooth_l1"
    return np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5).mean(-1)


# (head, loss, target_norm, layer_map, pairs): they cross or leave a block out, so that a block's number is not its
# pair's.
CASES = [
    ("own", "cosine", "standardise", "list", ((0, 1), (2, 0))),
    ("shared", "mse", "layernorm", "list", ((1, 1), (2, 0))),
    ("own", "nmse", "none", "list", ((1, 1), (2, 0))),
    ("shared", "smooth_l1", "standardise", "stride", ((0, 0), (2, 1))),
]


@pytest.mark.parametrize(("head", "loss", "target_norm", "layer_map", "pairs"), CASES)
def test_distillation_is_what_numpy_says(reference, head, loss, target_norm, layer_map, pairs):
    c = reference.config.copy_and_resolve_references()
    c.distill.update(head=head, loss=loss, target_norm=target_norm, layer_map=layer_map)
    c.distill.pairs = pairs if layer_map == "list" else ()
    built, mesh = system.build(c), checkpoint.system_mesh(c)
    assert built.pairs == pairs

    student_NxnxD, teacher_PxnxE = reference.student_NxnxD, reference.teacher_PxnxE
    n_heads = len(pairs) if head == "own" else 1
    rng = np.random.default_rng(1)
    scale = 1 + 0.3 * rng.standard_normal((n_heads, student_NxnxD.shape[-1]))
    kernel = rng.standard_normal((*scale.shape, teacher_PxnxE.shape[-1])) / scale.shape[1] ** 0.5
    heads = {"scale": jnp.asarray(scale, jnp.float32), "kernel": jnp.asarray(kernel, jnp.float32)}
    rates, trained, frozen = trainable(built, {**reference.variables, "heads": heads})
    of_pairs = lambda value_PxE: jnp.asarray(value_PxE[[teacher for _, teacher in pairs]], jnp.float32)
    statistics = {"mean": of_pairs(teacher_PxnxE.mean(1)), "std": of_pairs(teacher_PxnxE.std(1))}
    batch, rtol = reference.batch, 1e-4
    if target_norm == "none":  # and the states are stored ones, in float16
        states_BxKxPxAxE = reference.teacher_BxKxPxAxE[:, :, [teacher for _, teacher in pairs]]
        batch, rtol = batch._replace(teacher_BxKxPxAxE=jnp.asarray(states_BxKxPxAxE, jnp.float16)), 1e-3
    step = step_lib.jit_step(built, c.train.stages.only, 0, rates, mesh)
    constants = step_lib.Constants(statistics=statistics if target_norm == "standardise" else None)
    _, metrics = step(step_lib.new_state(c, trained, 0, mesh), frozen, constants, batch)

    def expected(student: int, teacher: int, pair: int) -> float:
        h_nxD, one = student_NxnxD[student], pair if head == "own" else 0
        h_nxD = h_nxD / np.sqrt((h_nxD**2).mean(-1, keepdims=True) + built.model.config.llm.norm_eps) * scale[one]
        return per_token(h_nxD @ kernel[one], normalised(teacher_PxnxE[teacher], target_norm), loss).mean()

    values = [expected(*blocks, pair) for pair, blocks in enumerate(pairs)]
    names = [f"loss/distill/block_{student:02d}" for student, _ in pairs]
    assert {name for name in metrics if name.startswith("loss/distill/")} == set(names)
    for name, value in zip(names, values, strict=True):
        np.testing.assert_allclose(metrics[name], value, rtol=rtol, err_msg=name)
    np.testing.assert_allclose(metrics["loss/distill"], np.mean(values), rtol=rtol)
    np.testing.assert_allclose(metrics["loss"], metrics["loss/distill"], rtol=1e-6)

    # Any other block or head, and the numbers would be others.
    for pair, ((student, teacher), value) in enumerate(zip(pairs, values, strict=True)):
        others = [expected(other, teacher, pair) for other in range(N_BLOCKS) if other != student]
        others.append(expected(student, 1 - teacher, pair))
        if head == "own":
            others.append(expected(student, teacher, 1 - pair))
        assert min(abs(other - value) for other in others) > 5 * rtol * value, (value, others)


@pytest.fixture
def kd_run(make_config, make_run):
    """A run whose objectives read transcripts, with adapters that do something."""
    c = make_config(lm=1.0, response_kd=1.0, hidden_l2=1.0, embedding_l2=1.0)
    c.kd.temperature = 2.0
    built, variables, batch, _ = make_run(c)
    keys = iter(jax.random.split(jax.random.key(5), 100))
    noisy = lambda x: 0.2 * jax.random.normal(next(keys), x.shape)
    return built, {**variables, "lora": jax.tree.map(noisy, variables["lora"])}, batch


def test_reading_objectives_are_what_a_loop_over_examples_says(kd_run):
    """Against each example read alone and unpadded, by a tokenizer whose tokens differ at the seams."""
    built, variables, batch = kd_run
    model = built.model
    active = frozenset({"response_kd", "input_kd", "hidden_l2", "embedding_l2"})
    found, _ = jax.jit(lambda v, b: objectives.sums(built, v, b, active, None, None))(variables, batch)
    counts = objectives.counts(built, batch, active)
    student = {name: variables[name] for name in ("params", "lora")}
    base = {"params": variables["params"]}

    mel, n_frames = objectives.student_mel(built, batch, None)
    columns = Columns.of(batch)
    x_BxTxD = model.apply(student, columns, mel, n_frames, method="hear").x_BxTxD
    h_BxTxD, _, _ = model.apply(student, x_BxTxD, model.context(columns), method="adapted_blocks")
    h_BxTxD, _ = model.apply(student, h_BxTxD, model.context(columns), method="plain_blocks")
    log = lambda h: jax.nn.log_softmax(model.apply(student, h, method="logits") / 2.0)
    divergence = lambda base, h: float((jnp.exp(log(base)) * (log(base) - log(h))).sum() * 4.0)
    texts = {row.text for row in load_manifest(built.config.data.train[0][0])}
    kl = input_kl = hidden = embedding = n_targets = n_examples = n_aligned = 0.0
    for b in range(len(batch.tokens_BxT)):
        r = type(batch.reading)(*(np.asarray(x)[b] for x in batch.reading))
        n = int((r.segment_BxU != 0).sum())
        tokens = jnp.asarray(r.tokens_BxU[None, :n])
        ctx = text_context(jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))
        t_1xnxD, _, _ = model.apply(base, model.apply(base, tokens, method="embed_text"), ctx, method="adapted_blocks")
        t_1xnxD, _ = model.apply(base, t_1xnxD, ctx, method="plain_blocks")
        m = int(batch.target_weight_BxR[b].sum())
        # The last m columns but none: the response's last token is predicted, never read.
        teacher = t_1xnxD[0, n - m :]
        speech = h_BxTxD[b, batch.target_position_BxR[b, :m]]
        kl += divergence(teacher, speech)
        hidden += float(((speech[0] - teacher[0]) ** 2).sum() / (teacher[0] ** 2).sum())
        heard_at = np.flatnonzero(np.asarray(batch.audio_source_BxT[b]) >= 0)
        audio = x_BxTxD[b, heard_at]
        read_at = r.transcript_position_BxKxI[0, : r.n_transcript_BxK[0]]
        spoken = r.tokens_BxU[read_at].tolist()
        assert built.tokenizer.decode(spoken) in texts and built.chat.text(built.tokenizer.decode(spoken)) == tuple(
            spoken
        )
        k = min(len(spoken), len(audio))
        input_kl += divergence(t_1xnxD[0, read_at[len(spoken) - k :]], h_BxTxD[b, heard_at[len(audio) - k :]])
        text = model.apply(base, jnp.asarray(spoken[len(spoken) - k :]), method="embed_text")
        embedding += float((((audio[len(audio) - k :] - text) ** 2).sum(-1) / ((text**2).sum(-1) + 1e-6)).sum())
        n_targets, n_examples, n_aligned = n_targets + m, n_examples + 1, n_aligned + k
    np.testing.assert_allclose(found["response_kd"], kl, rtol=1e-4)
    np.testing.assert_allclose(found["input_kd"], input_kl, rtol=1e-4)
    np.testing.assert_allclose(found["hidden_l2"], hidden, rtol=1e-4)
    np.testing.assert_allclose(found["embedding_l2"], embedding, rtol=1e-4)
    assert {name: int(x) for name, x in counts.items()} == {
        "response_kd": n_targets,
        "input_kd": n_aligned,
        "hidden_l2": n_examples,
        "embedding_l2": n_aligned,
    }
