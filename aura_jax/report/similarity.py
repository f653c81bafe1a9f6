"""How alike the blocks of student and teacher are, on speech that was held out, before and after training.

Dimensions: B clips of a batch, A audio tokens of a clip, n tokens of all clips, L blocks of the student's LLM, T blocks
of the teacher, D width of the student, E of the teacher, P pairs of blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aura_jax import checkpoint, sharding, system
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.data.batch import Batch
from aura_jax.data.manifest import Row
from aura_jax.data.pipeline import make_dataset
from aura_jax.data.plan import BUCKETS, BatchPlan
from aura_jax.data.sources import make_source
from aura_jax.models.speech_llm import Columns
from aura_jax.system import System
from aura_jax.train import objectives
from aura_jax.train.teacher import statistics, teacher_states

N_CLIPS = 48
N_TOKENS = 1024  # of all clips: every token is compared with every other
_BATCH = 8


def compare(workdir: Path, rows: Sequence[Row], progress: bool = True) -> dict[str, Any]:
    """Returns the similarity of every student block with every teacher block, before training and after.

    Args:
      workdir: of a run with a teacher and a checkpoint.
      rows: speech that was held out; up to `N_CLIPS` of them, evenly spread, are heard.

    Returns:
      {"n_clips", "n_tokens", "before", "after"}, the latter two {"cka": [L][T], "cosine": [P], or None if nothing was
      distilled}: the unbiased linear CKA of the states, and the cosine of the paired blocks' states as distillation
      takes it, through the heads and with the normalised targets.

    Raises:
      UserError: there is no checkpoint, the base weights are others, or no clip can be read.
    """
    built, after = checkpoint.load(workdir)
    mesh = checkpoint.system_mesh(built.config)
    with jax.set_mesh(mesh):
        before = system.initial_variables(built, mesh)
        teacher = before.pop("teacher")
        batches = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in held_out_batches(built, rows)]
        heard = [np.asarray(objectives.audio_mask(built, batch)[:, 0]) > 0 for batch in batches]
        student_of = jax.jit(functools.partial(student_states, built))
        teacher_of = jax.jit(functools.partial(_all_teacher_states, built))
        with tqdm(total=3 * len(batches), desc="similarity", unit="batch", disable=not progress) as bar:
            grams = {}
            for name, states in (
                ("teacher", lambda batch: teacher_of(teacher, batch)),
                ("before", lambda batch: student_of(before, batch)),
                ("after", lambda batch: student_of(after, batch)),
            ):
                parts = []
                for batch, mask_BxA in zip(batches, heard, strict=True):
                    parts.append(np.asarray(states(batch), np.float32)[:, mask_BxA])
                    bar.update()
                grams[name] = [gram(h_nxD) for h_nxD in np.concatenate(parts, axis=1)[:, :N_TOKENS]]
        out: dict[str, Any] = {
            "n_clips": int(sum(mask_BxA.any(1).sum() for mask_BxA in heard)),
            "n_tokens": len(grams["teacher"][0]),
        }
        cosine_of = _cosines(built, workdir)
        for name, variables in (("before", before), ("after", after)):
            cka_LxT = [[cka(mine, theirs) for theirs in grams["teacher"]] for mine in grams[name]]
            cosine = cosine_of({**variables, "teacher": teacher}, batches) if cosine_of else None
            out[name] = {"cka": cka_LxT, "cosine": cosine}
    return out


def held_out_batches(built: System, rows: Sequence[Row]) -> Iterator[Batch]:
    c = built.config
    rows = rows[:: max(1, len(rows) // N_CLIPS)][:N_CLIPS]
    source = make_source(rows, built.chat, prompt=c.data.prompt)
    seconds = float(source.lengths.n_samples_N.max()) / SAMPLE_RATE
    plan = BatchPlan(
        [source.lengths],
        batch_size=min(_BATCH, len(rows)),
        bucket_seconds=[b for b in BUCKETS if b < seconds] + [seconds],
        token_rate=c.embedder.token_rate,
        sequential=True,
    )
    with make_dataset([source], plan) as dataset:
        for _, batch in dataset:
            yield batch


def student_states(built: System, student: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Returns the output of every block of the LLM at the audio tokens, [L, B, A, D]; batches have one clip a row."""
    model: Any = built.model
    student = {name: student[name] for name in ("params", "lora") if name in student}
    columns = Columns.of(batch)
    heard = model.apply(student, columns, *objectives.student_mel(built, batch, None), method="hear")
    x_BxTxD = heard.x_BxTxD
    ctx = model.context(columns)
    capturing = model.clone(tap=lambda h_BxQxD, block, args: h_BxQxD)
    h_BxTxD, _, states = capturing.apply(student, x_BxTxD, ctx, None, None, method="adapted_blocks")
    n_left = model.config.llm.n_blocks - model.config.lora.n_blocks
    if n_left:
        # Taps belong to adapted blocks. Without the collection `lora` those are plain blocks: so the upper ones are
        # taken for the adapted blocks of an LLM that has no others.
        llm = dataclasses.replace(model.config.llm, n_blocks=n_left)
        lora = dataclasses.replace(model.config.lora, n_blocks=n_left)
        upper = capturing.clone(config=dataclasses.replace(model.config, llm=llm, lora=lora))
        variables = {"params": {"llm": {"adapted": student["params"]["llm"]["plain"]}}}
        _, _, upper_states = upper.apply(variables, h_BxTxD, ctx, None, None, method="adapted_blocks")
        states = jnp.concatenate([states, upper_states])
    return states


def _all_teacher_states(built: System, teacher: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Returns the output of every teacher block at the audio tokens, [T, B, A, E]."""
    assert built.teacher_config is not None
    everything = dataclasses.replace(
        built, pairs=tuple((0, block) for block in range(built.teacher_config.encoder_blocks))
    )
    states = teacher_states(everything, dict(teacher), batch.waveform_BxKxS[:, 0], batch.n_samples_BxK[:, 0])
    return jnp.moveaxis(states, 1, 0)


def _cosines(built: System, workdir: Path) -> Callable[[Mapping[str, Any], Sequence[Batch]], list[float]] | None:
    """Returns a function (variables, batches) -> the cosine of each pair; None if the run does not distil."""
    c = built.config
    if not any(c.train.stages[name].objectives.distill for name in c.train.schedule):
        return None
    config = c.copy_and_resolve_references()
    config.distill.loss = "cosine"
    system_of_cosine = dataclasses.replace(built, config=config)
    path = workdir / "target_statistics.npz"
    targets = jax.device_put(statistics(None, path)[0]) if c.distill.target_norm == "standardise" else None
    active = frozenset({"distill"})
    sums = jax.jit(
        lambda variables, batch: objectives.sums(system_of_cosine, variables, batch, active, None, targets)[1]
    )

    def cosines(variables: Mapping[str, Any], batches: Sequence[Batch]) -> list[float]:
        found = [jax.device_get(sums(variables, batch)) for batch in batches]
        total, count = (np.sum([blocks[key] for blocks in found], axis=0) for key in ("sum", "count"))
        return [float(1 - total[student] / count[student]) for student, _ in built.pairs]

    return cosines


def gram(h_nxD: np.ndarray) -> np.ndarray:
    """Returns the inner products [n, n] of the states of n tokens, each scaled to unit length.

    Otherwise the few tokens and blocks with massive activations would outweigh all others.
    """
    h_nxD = h_nxD / np.maximum(np.linalg.norm(h_nxD, axis=1, keepdims=True), 1e-12)
    return h_nxD @ h_nxD.T


def cka(k_nxn: np.ndarray, l_nxn: np.ndarray) -> float:
    """Returns the centred kernel alignment of two sets of states of the same tokens, given their inner products.

    The unbiased estimator (arXiv 1905.00414, with HSIC as in arXiv 2010.15327): 1 for states that agree up to rotation
    and scale, 0 on average for states that have nothing in common, however wide they are.
    """
    return _hsic(k_nxn, l_nxn) / float(np.sqrt(_hsic(k_nxn, k_nxn) * _hsic(l_nxn, l_nxn)))


def _hsic(k_nxn: np.ndarray, l_nxn: np.ndarray) -> float:
    n = len(k_nxn)
    k_nxn, l_nxn = (np.where(np.eye(n, dtype=bool), 0, x).astype(np.float64) for x in (k_nxn, l_nxn))
    both = (k_nxn * l_nxn).sum()
    apart = k_nxn.sum() * l_nxn.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (k_nxn.sum(0) @ l_nxn.sum(0)) / (n - 2)
    return float(both + apart - mixed) / (n * (n - 3))
