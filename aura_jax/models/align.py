"""Which teacher block a student block learns from, and which teacher frames a student token covers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from aura_jax.errors import UserError, nearest

LAYER_MAPS = ("stride", "identity", "last", "list")


def layer_map(
    kind: str, n_student: int, n_teacher: int, pairs: Sequence[tuple[int, int]] = ()
) -> tuple[tuple[int, int], ...]:
    """Returns pairs (student block, teacher block), both counted from 0 over *blocks*, in ascending order.

    A pair compares the *outputs* of two blocks. (In Hugging Face's `hidden_states`, block i's output is entry i + 1.)

    Args:
      kind: "stride": every teacher block, at uniform steps, the last with the student's last adapted block (4 teacher
        blocks on 12: 2, 5, 8, 11), or every adapted block if there are fewer; "identity": i with i, as VoRA
        (arXiv 2503.20680); "last": the last blocks of both, aligned at the end; "list": `pairs` as given.
      n_student: adapted blocks of the student.
      n_teacher: blocks of the teacher.

    Raises:
      UserError: for an unknown kind, or a pair out of range or out of order.
    """
    if pairs and kind != "list":
        raise UserError(f"distill.pairs is for layer_map 'list', and distill.layer_map is {kind!r}: drop one of them")
    n = min(n_student, n_teacher)
    if kind == "stride":
        return tuple(((i + 1) * n_student // n - 1, (i + 1) * n_teacher // n - 1) for i in range(n))
    if kind == "identity":
        return tuple((i, i) for i in range(n))
    if kind == "last":
        return tuple((n_student - n + i, n_teacher - n + i) for i in range(n))
    if kind != "list":
        raise UserError(f"unknown distill.layer_map {kind!r}: {nearest(kind, LAYER_MAPS)}")
    if not pairs:
        raise UserError("distill.layer_map is 'list', but distill.pairs is empty: give (student, teacher) pairs")
    for student, teacher in pairs:
        if not (0 <= student < n_student and 0 <= teacher < n_teacher):
            raise UserError(
                f"distill.pairs: ({student}, {teacher}) is out of range: "
                f"{n_student} adapted student blocks and {n_teacher} teacher blocks, counted from 0"
            )
    students = [student for student, _ in pairs]
    if students != sorted(set(students)):
        raise UserError(f"distill.pairs: student blocks must ascend without repetition, not {students}")
    return tuple((int(s), int(t)) for s, t in pairs)


def pool_frames(h_NxFxE: jax.Array, n_frames_N: jax.Array, frames_per_token: int) -> jax.Array:
    """Returns [N, ceil(F / frames_per_token), E]: the mean of the valid frames that each token covers.

    Token a covers frames [a * frames_per_token, (a + 1) * frames_per_token); frames from `n_frames_N` on are not
    valid, and a token without valid frames is 0.
    """
    n, n_frames, width = h_NxFxE.shape
    n_tokens = -(-n_frames // frames_per_token)
    padding = n_tokens * frames_per_token - n_frames
    valid_NxF = jnp.arange(n_frames) < n_frames_N[:, None]
    # Select rather than multiply: what a padded frame holds may be anything.
    h_NxFxE = jnp.where(valid_NxF[..., None], h_NxFxE.astype(jnp.float32), 0)
    h_NxFxE = jnp.pad(h_NxFxE, ((0, 0), (0, padding), (0, 0)))
    sum_NxAxE = h_NxFxE.reshape(n, n_tokens, frames_per_token, width).sum(axis=2)
    count_NxA = jnp.clip(n_frames_N[:, None] - jnp.arange(n_tokens) * frames_per_token, 1, frames_per_token)
    return sum_NxAxE / count_NxA[..., None]
