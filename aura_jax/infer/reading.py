"""Reads prompts, and answers that are given, with a speech LLM: one compiled pass from waveform to hidden states.

Dimensions: B rows, T prompt columns, G columns left for an answer, R answer tokens that are given, D width,
V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aura_jax import sharding
from aura_jax.audio import features
from aura_jax.errors import UserError
from aura_jax.infer.prompting import Inputs, Request, lay_out, tokenise
from aura_jax.models.llm import Cache, as_multiplied, blocks_apart
from aura_jax.models.lora import as_computed
from aura_jax.models.speech_llm import text_context
from aura_jax.system import System

# Where LoRA acts on the tokens of a request. "off": the model is the base LLM, bit by bit.
OFF, EVERYWHERE, AT_AUDIO = "off", "everywhere", "at_audio"


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static in a compiled program: Readers of equal models share what is compiled."""

    model: Any
    mesh: jax.sharding.Mesh | None
    lora: str
    n_new: int
    normalisation: str

    def apply(self, variables: Mapping[str, Any], *args: Any, method: str) -> Any:
        on_mesh = (
            contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        )
        with on_mesh:  # the model places its activations on it, whoever calls
            return self.model.apply(self.visible(variables), *args, method=method)

    def visible(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the collections that a pass may see: without `lora`, the model is the base LLM (or a merged one)."""
        names = ("params",) if self.lora == OFF else ("params", "lora")
        return {name: variables[name] for name in names if name in variables}


class Weights:
    """A model's variables as passes read them. What is made of them is made once, for all that read with it.

    Attributes:
      variables: `params` and `lora`.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any]):
        # Cast once, and not in front of every piece of an answer.
        lora = {"lora": as_computed(variables["lora"], model.dtype)} if "lora" in variables else {}
        self.variables: Mapping[str, Any] = {**variables, **lora}
        self._multiplied = jnp.dtype(model.matmul_dtype or model.dtype)

    @functools.cached_property
    def apart(self) -> Mapping[str, Any]:
        """The variables with the LLM's blocks apart, and their kernels as they are multiplied."""
        params = self.variables["params"]
        read = {"params": {**params, "llm": as_multiplied(params["llm"], self._multiplied)}}
        if "lora" in self.variables:
            read["lora"] = self.variables["lora"]
        return {name: {**tree, "llm": blocks_apart(tree["llm"])} for name, tree in read.items()}


class Reader:
    """Reads requests with a speech LLM.

    A spoken request uses the adapters as `lora.scope` says; one without audio runs without the `lora` collection under
    the scopes "request" and "audio", and is then the base LLM's answer to the bit.

    Attributes:
      batch_size: most rows read together.
      variables: `params` and `lora`; other trees replace them between calls without compiling anew (during training).
    """

    def __init__(
        self,
        system: System,
        variables: Mapping[str, Any] | Weights,
        *,
        batch_size: int | None = None,
        adapters_on_text: bool | None = None,
    ):
        """
        Args:
          system: from `system.build`.
          variables: `params` and `lora`; after a merge `params` alone. `Weights` are shared by several readers.
          batch_size: most rows read together; None: `eval.batch_size`.
          adapters_on_text: adapters in requests without audio: True as after a merge, or in a text turn after a spoken
            one; False for the base LLM; None: as `lora.scope` says.

        Raises:
          UserError: if adapters are asked for on text that scope "audio" never lets act there, or no row is read.
        """
        scope = system.model.config.lora.scope if system.model.config.lora else "request"
        if adapters_on_text and scope == "audio":
            raise UserError("lora.scope 'audio' acts at audio tokens only: text with adapters on does not exist")
        on_text = scope == "all" if adapters_on_text is None else adapters_on_text
        self.system = system
        # The splash kernel reads queries by the hundred, and a step of decoding has one.
        model: Any = system.model
        self._model = model.clone(attention_impl="xla") if model.attention_impl == "splash" else model
        self._weights = variables if isinstance(variables, Weights) else Weights(model, variables)
        self.batch_size = system.config.eval.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size}: must be at least 1")
        self._text_lora = EVERYWHERE if on_text else OFF
        self._speech_lora = AT_AUDIO if scope == "audio" else EVERYWHERE
        self._mesh = _mesh_of(self.variables)
        self._row_multiple = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1

    @property
    def variables(self) -> Mapping[str, Any]:
        return self._weights.variables

    @variables.setter
    def variables(self, variables: Mapping[str, Any]) -> None:
        self._weights = Weights(self._model, variables)

    def held(self, program: Program, n_rows: int) -> tuple[Mapping[str, Any], Program]:
        """Returns the variables that a pass over so many rows reads, and its program.

        XLA for CPUs copies a block's weights out of their stack before it multiplies by them, which takes a single row
        as long as the product. There, a single row is given them block by block, as they are multiplied. It is not
        worth it for weights that are narrower than what is multiplied, as XLA would convert those of all blocks at
        once, in front of every piece of an answer; nor for several rows, as it takes longer to compile.
        """
        multiplied = self._model.matmul_dtype or self._model.dtype
        is_wide = jnp.dtype(self._model.param_dtype).itemsize >= jnp.dtype(multiplied).itemsize
        if jax.default_backend() != "cpu" or self._mesh is not None or n_rows > 1 or not is_wide:
            return self.variables, program
        return self._weights.apart, dataclasses.replace(program, model=program.model.clone(apart=True))

    def prompt_logits(self, request: Request) -> np.ndarray:
        """Returns the logits [T, V], float32, at every token of the request's prompt, audio tokens included.

        They are what another implementation of the same model can be compared with.

        Raises:
          UserError: as `prompting.tokenise`.
        """
        prompt = tokenise(self.system, 0, request)
        inputs = lay_out(self.system, [prompt], self._row_multiple)
        variables, program = self.held(self.program(bool(prompt.clips), n_new=0), self._row_multiple)
        logits_BxTxV, segment_BxT = _prompt_logits(variables, inputs, program)
        return np.asarray(logits_BxTxV)[0, np.asarray(segment_BxT)[0] != 0]

    def answer_states(self, requests: Sequence[Request], answers: Sequence[Sequence[int]]) -> jax.Array:
        """Reads given answers after their requests; returns the normed hidden states that predict their tokens.

        Args:
          requests: all spoken, or all of text; one batch of at most `batch_size`.
          answers: ids of each.

        Returns:
          [B, R, D] on the variables' mesh: row i has the states of answer i first, and anything after them. B and R are
          rounded up from the number and the longest of the answers, by nothing else: they are the same for a spoken
          and a written reading.

        Raises:
          UserError: as `prompting.tokenise`.
        """
        prompts = [
            dataclasses.replace(tokenise(self.system, i, request), answer=answer)
            for i, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]
        n_rows = self.n_rows(len(prompts))
        variables, program = self.held(self.program(bool(prompts[0].clips), n_new=0), n_rows)
        return _answer_states(variables, lay_out(self.system, prompts, n_rows), program)

    def n_rows(self, n: int) -> int:
        """Returns the rows of a batch of n requests.

        They are rounded up to a power of two, and then to the mesh's multiple: the last batch of a set must not compile
        anew each time.
        """
        n_rows = min(1 << (n - 1).bit_length(), self.batch_size)
        return -(-n_rows // self._row_multiple) * self._row_multiple

    def program(self, is_spoken: bool, n_new: int) -> Program:
        """Returns the program of requests with speech or without, whose answers have up to `n_new` tokens."""
        lora = self._speech_lora if is_spoken else self._text_lora
        return Program(self._model, self._mesh, lora, n_new, self.system.config.model.normalisation)


def _mesh_of(variables: Any) -> jax.sharding.Mesh | None:
    """Returns the mesh that the variables are spread over; None for a single device."""
    for leaf in jax.tree.leaves(variables):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding):
            mesh = leaf.sharding.mesh
            return mesh if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1 else None
    return None


def _rows_on_mesh(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:
        return tree
    place = lambda x: jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))
    return jax.tree.map(place, tree)


@functools.partial(jax.jit, static_argnames="program")
def _prompt_logits(variables: Mapping[str, Any], inputs: Inputs, program: Program) -> tuple[jax.Array, jax.Array]:
    """Reads the prompts; returns the logits [B, T, V] at all their columns, and the columns' segments [B, T]."""
    h_BxTxD, _, segment_BxT = read(variables, inputs, program)
    return program.apply(variables, h_BxTxD, method="logits"), segment_BxT


@functools.partial(jax.jit, static_argnames="program")
def _answer_states(variables: Mapping[str, Any], inputs: Inputs, program: Program) -> jax.Array:
    """Reads prompts and answers; returns the hidden states [B, R, D] that predict the answers."""
    h_BxTxD, *_ = read(variables, inputs, program)
    return jnp.take_along_axis(h_BxTxD, inputs.target_position_BxR[..., None], axis=1)


def read(variables: Mapping[str, Any], inputs: Inputs, program: Program) -> tuple[jax.Array, Cache, jax.Array]:
    """Returns normed hidden states [B, T, D] of the prompts, the cache, T + n_new columns long, and the segments
    [B, T]: 0 where there is no token, or an embedder that decides made none."""
    inputs = _rows_on_mesh(inputs, program.mesh)
    columns, c = inputs.columns, program.model.config
    if inputs.waveform_BxKxN is None or inputs.n_samples_BxK is None:
        x_BxTxD = program.apply(variables, columns.tokens_BxT, method="embed_text")
        ctx = text_context(columns.position_BxT, columns.segment_BxT)
    else:
        B, K, N = inputs.waveform_BxKxN.shape
        mel_CxFxM = features.log_mel(  # C clips: those of all rows
            inputs.waveform_BxKxN.reshape(B * K, N),
            c.embedder.n_mels,
            n_samples_B=inputs.n_samples_BxK.reshape(B * K),
            normalisation=program.normalisation,
        )
        mel_BxKxFxM = mel_CxFxM.reshape(B, K, *mel_CxFxM.shape[1:])
        n_frames_BxK = features.n_frames(inputs.n_samples_BxK)
        heard = program.apply(variables, columns, mel_BxKxFxM, n_frames_BxK, False, method="hear")
        x_BxTxD, columns = heard.x_BxTxD, heard.columns
        ctx = program.apply(variables, columns, method="context").replace(tap_position_BxQ=None)
        if program.lora == EVERYWHERE:
            ctx = ctx.replace(lora_mask_BxT=None)  # all tokens of a spoken request, so no select
    n_rows, n_columns = columns.tokens_BxT.shape
    ctx = dataclasses.replace(ctx, cache_start=jnp.int32(0))
    cache = Cache.zeros(c.llm, n_rows, n_columns + program.n_new, program.model.dtype)
    x_BxTxD, cache, _ = program.apply(variables, x_BxTxD, ctx, cache, method="adapted_blocks")
    h_BxTxD, cache = program.apply(variables, x_BxTxD, ctx, cache, method="plain_blocks")
    return h_BxTxD, cache, columns.segment_BxT
