"""Which token comes next: the likeliest, or one drawn from the model's distribution.

What is drawn depends on the seed, the request's own number and the token's number, and on nothing else: not on the
batch that a request falls in, nor on padding, nor on the mesh.

Dimensions: B rows, T columns of tokens, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aura_jax.errors import UserError

MAX_SEED = 2**32 - 1

# Its draws are the same however a batch is split over devices, and for each row of a batch by itself.
_GENERATOR = "threefry2x32"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are picked; the default is greedy decoding.

    Attributes:
      temperature: 0: the likeliest token; above: drawn from softmax(logits / temperature).
      top_p: drawn among the fewest tokens whose probabilities exceed it together; 1: among all.
      repetition_penalty: divides the positive logits, and multiplies the negative ones, of every token that prompt or
        answer already hold; 1: none. It acts on greedy decoding as well.
      seed: of what is drawn.

    Raises:
      UserError: a value is out of range, or for drawing where nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 0.001 <= self.temperature <= 100:
            raise UserError(f"temperature {self.temperature}: give 0 (the likeliest token), or 0.001 to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a share above 0 and up to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty {self.repetition_penalty}: give 0.01 to 100 (1 is none)")
        if not isinstance(self.seed, (int, np.integer)) or not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed}: give a whole number from 0 to {MAX_SEED}")
        if self.temperature == 0 and (self.top_p != 1 or self.seed != 0):
            name, value = ("top_p", self.top_p) if self.top_p != 1 else ("seed", self.seed)
            raise UserError(f"{name} {value} is of sampling, and temperature 0 draws nothing: give a temperature too")


GREEDY = Sampling()


@struct.dataclass
class Choice:
    """A `Sampling` for a batch, as a compiled program takes it.

    Numbers are traced. A field that is None is a part that the program does without: greedy decoding is an argmax.

    Attributes:
      temperature: scalar.
      tail: scalar, 1 - top_p.
      penalty: scalar.
      seed: scalar, uint32.
      number_B: uint32, each request's own number.
      seen_BxV: the tokens that prompt and answer hold so far.
    """

    temperature: Any = None
    tail: Any = None
    penalty: Any = None
    seed: Any = None
    number_B: Any = None
    seen_BxV: Any = None

    @classmethod
    def of(
        cls, sampling: Sampling, number_B: np.ndarray, tokens_BxT: np.ndarray, is_text_BxT: np.ndarray, vocab: int
    ) -> "Choice":
        """Returns the choice of a batch's first tokens.

        Args:
          number_B: each request's own number, from 0 to 2^32 - 1.
          tokens_BxT: of the prompts.
          is_text_BxT: which of them are tokens of text: neither audio nor padding.
          vocab: of the model.
        """
        draws, penalises = sampling.temperature > 0, sampling.repetition_penalty != 1
        seen_BxV = None
        if penalises:
            seen_BxV = np.zeros((len(tokens_BxT), vocab), bool)
            rows, columns = np.nonzero(is_text_BxT)
            seen_BxV[rows, tokens_BxT[rows, columns]] = True
        return cls(
            temperature=np.float32(sampling.temperature) if draws else None,
            tail=np.float32(1 - sampling.top_p) if sampling.top_p < 1 else None,
            penalty=np.float32(sampling.repetition_penalty) if penalises else None,
            seed=np.uint32(sampling.seed) if draws else None,
            number_B=number_B.astype(np.uint32) if draws else None,
            seen_BxV=seen_BxV,
        )

    def after(self, token_B: jax.Array) -> "Choice":
        """Returns the choice of the tokens that follow `token_B`."""
        if self.seen_BxV is None:
            return self
        rows_B = jnp.arange(len(token_B))
        return dataclasses.replace(self, seen_BxV=jnp.asarray(self.seen_BxV).at[rows_B, token_B].set(True))


def adjusted(logits_BxV: jax.Array, choice: Choice) -> jax.Array:
    """Returns the logits [B, V] that are compared or drawn by: penalised, tempered, -inf for what top_p leaves out.

    The same as transformers' processors of these names, in their order. Equal logits at the edge of top_p all stay.

    Args:
      logits_BxV: float32.
    """
    if choice.penalty is not None:
        penalised_BxV = jnp.where(logits_BxV < 0, logits_BxV * choice.penalty, logits_BxV / choice.penalty)
        logits_BxV = jnp.where(choice.seen_BxV, penalised_BxV, logits_BxV)
    if choice.temperature is not None:
        logits_BxV = logits_BxV / choice.temperature
    if choice.tail is not None:
        ascending_BxV = jnp.sort(logits_BxV, axis=-1)
        below_BxV = jnp.cumsum(jax.nn.softmax(ascending_BxV, axis=-1), axis=-1)
        n_out_B = jnp.minimum((below_BxV <= choice.tail).sum(-1), logits_BxV.shape[-1] - 1)  # the likeliest stays
        # By value, not by place: noise then belongs to the token, and a change in the last bit moves no other's.
        edge_Bx1 = jnp.take_along_axis(ascending_BxV, n_out_B[:, None], axis=-1)
        logits_BxV = jnp.where(logits_BxV < edge_Bx1, -jnp.inf, logits_BxV)
    return logits_BxV


def next_token(logits_BxV: jax.Array, choice: Choice, place: jax.Array | int) -> jax.Array:
    """Returns the next token of each row, int32 [B]: the likeliest, or one drawn by the Gumbel-max method.

    Args:
      logits_BxV: float32.
      place: of the token in its answer, from 0.
    """
    logits_BxV = adjusted(logits_BxV, choice)
    if choice.temperature is not None:
        key = jax.random.key(choice.seed, impl=_GENERATOR)
        noise = lambda number: jax.random.gumbel(
            jax.random.fold_in(jax.random.fold_in(key, number), place), logits_BxV.shape[1:]
        )
        logits_BxV = logits_BxV + jax.vmap(noise)(choice.number_B)
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
