"""What one batch says about the objectives: forward passes of student and teacher, to (sum, count) of each objective.

Dimensions as in data/batch.py, and: N = B * K clips, Q = K * A audio columns of a row, D width of the student.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import losses, sharding
from aura_jax.audio import augment, features
from aura_jax.data.batch import Batch
from aura_jax.models.llm import RMSNorm, Tap
from aura_jax.models.speech_llm import Columns, audio_tokens, text_context
from aura_jax.system import System
from aura_jax.train.teacher import teacher_states

READING = frozenset({"response_kd", "input_kd", "hidden_l2", "embedding_l2"})  # they compare speech with its transcript
ANSWERS = frozenset({"lm", "response_kd", "hidden_l2"})  # they read what follows the audio
_OUTPUTS = ANSWERS | {"input_kd"}  # they read the LLM's output
SPEECH = READING | {"lm", "distill", "quantity"}
TEXT = frozenset({"text_anchor", "text_kd"})


def audio_mask(system: System, batch: Batch) -> jax.Array:
    """Returns float32 [B, K, A]: 1 where a clip has an audio token."""
    n_tokens_BxK = features.n_audio_tokens(batch.n_samples_BxK, system.config.embedder.token_rate)
    return (jnp.arange(batch.audio_position_BxKxA.shape[2]) < n_tokens_BxK[..., None]).astype(jnp.float32)


def counts(system: System, batch: Batch, active: frozenset[str]) -> dict[str, jax.Array]:
    """Returns each objective's denominator, from the masks of the whole global step, before any split of it."""
    out = {}
    if "lm" in active:
        out["lm"] = batch.target_weight_BxR.sum()
    if "distill" in active:
        out["distill"] = audio_mask(system, batch).sum() * len(system.pairs)
    if "response_kd" in active:
        out["response_kd"] = batch.target_weight_BxR.sum()
    if "hidden_l2" in active:
        out["hidden_l2"] = first_targets(batch).sum()
    for name in {"embedding_l2", "input_kd"} & active:
        out[name] = aligned_tokens(batch)[1].sum()
    if "quantity" in active:
        out["quantity"] = (audio_tokens(Columns.of(batch)) > 0).sum()
    for name in TEXT & active:
        out[name] = (batch.text_segment_MxL != 0).sum()
    return {name: jnp.maximum(count.astype(jnp.float32), 1) for name, count in out.items()}


def first_targets(batch: Batch) -> jax.Array:
    """Returns float32 [B, R]: 1 at the first target of every example."""
    segment_BxR = jnp.take_along_axis(batch.segment_BxT, batch.target_position_BxR, axis=1)
    before_BxR = jnp.pad(segment_BxR[:, :-1], ((0, 0), (1, 0)))
    return ((segment_BxR != before_BxR) & (batch.target_weight_BxR > 0)).astype(jnp.float32)


def aligned_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the audio token that goes with each token of the transcript, int32 [B, K, I], and a mask of those.

    They are the clip's last audio tokens, as in DiVA (arXiv 2410.02678): under a causal mask these have heard most.
    Where there are as many as the transcript has, they go one to one.
    """
    assert batch.reading is not None
    n_audio_BxK = audio_tokens(Columns.of(batch))
    n_text_BxK = batch.reading.n_transcript_BxK
    i_I = jnp.arange(batch.reading.transcript_position_BxKxI.shape[2])
    token_BxKxI = (n_audio_BxK - n_text_BxK)[..., None] + i_I
    mask_BxKxI = (i_I < n_text_BxK[..., None]) & (token_BxKxI >= 0)
    return jnp.where(mask_BxKxI, token_BxKxI, 0), mask_BxKxI.astype(jnp.float32)


def clip_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """Returns a random key per clip of the global step [B, K], whatever micro-batch or host the clip is in."""
    n_rows, n_clips = batch.n_samples_BxK.shape
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n_rows * n_clips)).reshape(n_rows, n_clips)


def student_mel(system: System, batch: Batch, keys_BxK: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns what the student hears, log-mel [B, K, F, M] and frames [B, K]; augmented if keys are given."""
    B, K, S = batch.waveform_BxKxS.shape
    waveform_NxS, n_samples_N = batch.waveform_BxKxS.reshape(B * K, S), batch.n_samples_BxK.reshape(-1)
    c = system.config.data.augment
    keys_3xN = None
    if keys_BxK is not None:
        keys_3xN = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys_BxK.reshape(-1)), 1, 0)
        if tuple(c.gain_db) != (0.0, 0.0):
            waveform_NxS = augment.random_gain(keys_3xN[0], waveform_NxS, *c.gain_db)
        if c.noise_probability:
            waveform_NxS = augment.add_noise(
                keys_3xN[1], waveform_NxS, n_samples_N, *c.noise_snr_db, c.noise_probability
            )
    mel_NxFxM = features.log_mel(
        waveform_NxS, system.n_mels, n_samples_B=n_samples_N, normalisation=system.config.model.normalisation
    )
    n_frames_N = features.n_frames(n_samples_N)
    if keys_3xN is not None and (c.freq_masks or c.time_masks):
        mel_NxFxM = augment.spec_augment(
            keys_3xN[2],
            mel_NxFxM,
            n_frames_N,
            n_freq_masks=c.freq_masks,
            freq_width=c.freq_width,
            n_time_masks=c.time_masks,
            time_width=c.time_width,
        )
    return mel_NxFxM.reshape(B, K, *mel_NxFxM.shape[1:]), n_frames_N.reshape(B, K)


def normalise_target(target: jax.Array, kind: str, statistics: Mapping[str, jax.Array] | None) -> jax.Array:
    """Normalises teacher states [N, P, A, E]: predicting the mean of raw ones already scores a cosine of 0.66 to 0.89.

    Args:
      kind: "standardise" per channel by `statistics` (mean and std, [P, E]), "layernorm" per token, or "none".
    """
    if kind == "none":
        return target
    if kind == "layernorm":
        centred = target - target.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    assert statistics is not None
    return (target - statistics["mean"][:, None]) / statistics["std"][:, None]


def distill_tap(system: System) -> Tap:
    """Returns the tap that compares a student block with its teacher block: (sum, count) for each adapted block.

    Its arguments are (heads, targets [P, B, Q, E] already normalised, mask [B, Q]). A block without a partner costs
    nothing, and no two blocks' projections are held together.
    """
    c = system.config.distill
    assert system.model.config.lora is not None
    pair_of_block = np.full(system.model.config.lora.n_blocks, -1, np.int32)
    for pair, (student, _) in enumerate(system.pairs):
        pair_of_block[student] = pair
    norm = RMSNorm(system.model.config.llm.norm_eps)

    def tap(h_BxQxD: jax.Array, block: jax.Array, args: Any) -> losses.SumCount:
        heads, target_PxBxQxE, mask_BxQ = args
        pair = jnp.asarray(pair_of_block)[block]

        @jax.named_scope("heads")
        def compare() -> losses.SumCount:
            head = pair if c.head == "own" else 0
            normed_BxQxD = norm.apply({"params": {"scale": heads["scale"][head]}}, h_BxQxD.astype(jnp.float32))
            return losses.distill(normed_BxQxD @ heads["kernel"][head], target_PxBxQxE[pair], mask_BxQ, c.loss)

        return jax.lax.cond(pair >= 0, compare, lambda: (jnp.float32(0), jnp.float32(0)))

    return tap


def text_positions(segment_MxL: jax.Array) -> jax.Array:
    """Returns each token's index within its segment; segments are contiguous."""
    index_L = jnp.arange(segment_MxL.shape[1])
    first = jnp.concatenate([jnp.ones_like(segment_MxL[:, :1]), segment_MxL[:, 1:] != segment_MxL[:, :-1]], axis=1)
    return index_L - jax.lax.cummax(jnp.where(first, index_L, 0), axis=1)


def sums(
    system: System,
    variables: Mapping[str, Any],
    batch: Batch,
    active: frozenset[str],
    keys_BxK: jax.Array | None,
    statistics: Mapping[str, jax.Array] | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the sum of every active objective over a batch, and per-block (sum, count) of distillation.

    Without an objective that reads the LLM's output, only the adapted blocks run: no upper block, no head.

    Args:
      variables: `params`, `lora`, and, for distillation, `heads` and (unless states are precomputed) `teacher`.
      keys_BxK: a random key per clip for augmentation; None for none.
    """
    out: dict[str, jax.Array] = {}
    blocks: dict[str, jax.Array] = {}
    # After a merged stage there is no `lora`.
    student = {name: variables[name] for name in ("params", "lora") if name in variables}
    if active & SPEECH:
        out, blocks = _speech_sums(system, variables, student, batch, active, keys_BxK, statistics)
    if active & TEXT:
        with jax.named_scope("plain_text"):
            out |= _text_sums(system, student, batch, active)
    return out, blocks


def _speech_sums(system, variables, student, batch, active, keys_BxK, statistics):
    model, tap_args = system.model, None
    if "distill" in active:
        model = model.clone(tap=distill_tap(system))
        with jax.named_scope("teacher"):
            target_PxBxQxE = _targets(system, variables, batch, statistics)
        tap_args = (variables["heads"], target_PxBxQxE, audio_mask(system, batch).reshape(len(batch.tokens_BxT), -1))
    with jax.named_scope("features"):
        mel_BxKxFxM, n_frames_BxK = student_mel(system, batch, keys_BxK)
    cols = Columns.of(batch)
    heard = model.apply(student, cols, mel_BxKxFxM, n_frames_BxK, method="hear")
    x_BxTxD = heard.x_BxTxD
    ctx = model.context(cols)
    h_BxTxD, _, taps = model.apply(student, x_BxTxD, ctx, None, tap_args, method="adapted_blocks")

    out, blocks = {}, {}
    if "distill" in active:
        sum_N, count_N = taps
        out["distill"] = sum_N.sum()
        blocks = {"sum": sum_N, "count": count_N}
    if "quantity" in active:
        out["quantity"] = losses.quantity(heard.n_tokens_BxK, audio_tokens(cols))[0]
    if active & _OUTPUTS:
        h_BxTxD, _ = model.apply(student, h_BxTxD, ctx, method="plain_blocks")
        h_BxRxD = _at(h_BxTxD, batch.target_position_BxR)
        whole = _with_whole_head(system, student)
        logits = lambda h: model.apply(whole, h, method="logits")
        chunk, weight_BxR = system.config.train.loss_chunk, batch.target_weight_BxR
    if "lm" in active:
        with jax.named_scope("lm_head"):
            out["lm"], _ = losses.cross_entropy(logits, h_BxRxD, batch.target_id_BxR, weight_BxR, chunk)
    if active & READING & _OUTPUTS:
        temperature = system.config.kd.temperature
        with jax.named_scope("reading"):
            read_BxUxD = _read(system, student, batch)
            read_BxRxD = _at(read_BxUxD, batch.reading.target_position_BxR)
    if "response_kd" in active:
        with jax.named_scope("lm_head"):
            out["response_kd"], _ = losses.kl_divergence(logits, read_BxRxD, h_BxRxD, weight_BxR, chunk, temperature)
    if "input_kd" in active:
        spoken_BxJ, heard_BxJ, mask_BxJ = _aligned_columns(batch)
        spoken_BxJxD, heard_BxJxD = _at(read_BxUxD, spoken_BxJ), _at(h_BxTxD, heard_BxJ)
        with jax.named_scope("lm_head"):
            out["input_kd"], _ = losses.kl_divergence(logits, spoken_BxJxD, heard_BxJxD, mask_BxJ, chunk, temperature)
    if "hidden_l2" in active:
        out["hidden_l2"], _ = losses.relative_l2(h_BxRxD, read_BxRxD, first_targets(batch))
    if "embedding_l2" in active:
        spoken_BxJ, heard_BxJ, mask_BxJ = _aligned_columns(batch)
        tokens_BxJ = jnp.take_along_axis(batch.reading.tokens_BxU, spoken_BxJ, axis=1)
        text_BxJxD = jax.lax.stop_gradient(model.apply(student, tokens_BxJ, method="embed_text"))
        out["embedding_l2"], _ = losses.relative_l2(_at(x_BxTxD, heard_BxJ), text_BxJxD, mask_BxJ)
    return out, blocks


def _at(x_BxTxD: jax.Array, position_BxR: jax.Array) -> jax.Array:
    return sharding.keep_rows(jnp.take_along_axis(x_BxTxD, position_BxR[..., None], axis=1))


def _aligned_columns(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns for each token of a row's transcripts (J = K I) its column in the reading, the column of the audio token
    that goes with it in the batch, and a mask, all [B, J]."""
    assert batch.reading is not None
    token_BxKxI, mask_BxKxI = aligned_tokens(batch)
    heard_BxKxI = jnp.take_along_axis(batch.audio_position_BxKxA, token_BxKxI, axis=2)
    flat = lambda x: x.reshape(len(x), -1)
    return flat(batch.reading.transcript_position_BxKxI), flat(heard_BxKxI), flat(mask_BxKxI)


def _read(system: System, student: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Returns the normed states [B, U, D] of the base LLM where it reads the transcripts."""
    model: Any = system.model
    reading = batch.reading
    assert reading is not None
    base = {"params": jax.lax.stop_gradient(student["params"])}
    ctx = text_context(reading.position_BxU, reading.segment_BxU)
    x_BxUxD = model.apply(base, reading.tokens_BxU, method="embed_text")
    h_BxUxD, _, _ = model.apply(base, x_BxUxD, ctx, method="adapted_blocks")
    h_BxUxD, _ = model.apply(base, h_BxUxD, ctx, method="plain_blocks")
    return jax.lax.stop_gradient(h_BxUxD)


def _with_whole_head(system: System, student: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the student's variables with the LLM's head gathered: losses go through it chunk by chunk."""
    path = "params/llm/embed/embedding" if system.model.config.llm.tied else "params/llm/lm_head/kernel"
    head = sharding.flatten(student)[path]
    return sharding.join({path: sharding.gathered(path, head)}, dict(student))


def _targets(system, variables, batch, statistics) -> jax.Array:
    B, K, S = batch.waveform_BxKxS.shape
    if batch.teacher_BxKxPxAxE is not None:
        states = batch.teacher_BxKxPxAxE.astype(jnp.float32)
        states_NxPxAxE = states.reshape(B * K, *states.shape[2:])
    else:
        waveform_NxS, n_samples_N = batch.waveform_BxKxS.reshape(B * K, S), batch.n_samples_BxK.reshape(-1)
        states_NxPxAxE = teacher_states(system, variables["teacher"], waveform_NxS, n_samples_N)
    states_NxPxAxE = jax.lax.stop_gradient(states_NxPxAxE)
    target = normalise_target(states_NxPxAxE, system.config.distill.target_norm, statistics)
    _, P, A, E = target.shape
    return target.reshape(B, K, P, A, E).transpose(2, 0, 1, 3, 4).reshape(P, B, K * A, E)


def _text_sums(system, student, batch, active):
    model, segment_MxL = system.model, batch.text_segment_MxL
    mask_MxL = (segment_MxL != 0).astype(jnp.float32)
    base = {"params": jax.lax.stop_gradient(student["params"])}
    ctx = text_context(text_positions(segment_MxL), segment_MxL)
    x_MxLxD = model.apply(base, batch.text_tokens_MxL, method="embed_text")
    h_MxLxD, _, _ = model.apply(student, x_MxLxD, ctx, method="adapted_blocks")
    base_MxLxD, _, _ = model.apply(base, x_MxLxD, ctx, method="adapted_blocks")
    base_MxLxD = jax.lax.stop_gradient(base_MxLxD)
    out = {}
    if "text_anchor" in active:
        out["text_anchor"], _ = losses.relative_l2(h_MxLxD, base_MxLxD, mask_MxL)
    if "text_kd" in active:
        h_MxLxD, _ = model.apply(student, h_MxLxD, ctx, method="plain_blocks")
        base_MxLxD, _ = model.apply(base, base_MxLxD, ctx, method="plain_blocks")
        whole = _with_whole_head(system, student)
        logits = lambda h: model.apply(whole, h, method="logits")
        chunk = system.config.train.loss_chunk
        out["text_kd"], _ = losses.kl_divergence(logits, base_MxLxD, h_MxLxD, mask_MxL, chunk)
    return out
