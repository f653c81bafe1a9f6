"""What a train step must compute: floating-point operations by part, from shapes alone.

A multiplication and an addition count as two. A frozen weight of P entries costs a token 2P forward and 2P backward
(the gradient of its input, none of itself), a trained one 2P and 4P. What an implementation computes a second time to
save memory stands apart. Left out, as too little to see: norms, softmax, RoPE, log-mel, the optimizer.
"""

import dataclasses
from collections.abc import Collection

from aura_jax.audio.features import n_encoder_frames, n_frames
from aura_jax.data.batch import Batch
from aura_jax.models.speech_llm import SpeechLLMConfig
from aura_jax.models.whisper import WhisperConfig
from aura_jax.train import objectives


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of one part; `recompute` is what rematerialisation adds."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    @property
    def total(self) -> float:
        """What must be computed: without `recompute`."""
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)


def frozen(weights: float, tokens: float, recompute: bool = False) -> Cost:
    """The products of `tokens` with frozen matrices of so many entries."""
    once = 2.0 * weights * tokens
    return Cost(once, once, once if recompute else 0.0)


def trained(weights: float, tokens: float) -> Cost:
    return Cost(2.0 * weights * tokens, 4.0 * weights * tokens)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static shape of a batch, in the letters of `data.batch`; padding is computed like anything else."""

    n_rows: int  # B
    n_tokens: int  # T
    n_clips: int  # K
    n_audio: int  # A
    n_samples: int  # S
    n_targets: int  # R
    precomputed: bool = True  # the batch holds the teacher's states
    text_rows: int = 0  # M
    text_tokens: int = 0  # L
    n_reading: int = 0  # U

    @classmethod
    def of(cls, batch: Batch) -> "Sizes":
        B, T = batch.tokens_BxT.shape
        _, K, A = batch.audio_position_BxKxA.shape
        M, L = (0, 0) if batch.text_tokens_MxL is None else batch.text_tokens_MxL.shape
        S, R = batch.waveform_BxKxS.shape[2], batch.target_id_BxR.shape[1]
        U = 0 if batch.reading is None else batch.reading.tokens_BxU.shape[1]
        return cls(B, T, K, A, S, R, batch.teacher_BxKxPxAxE is not None, M, L, U)


def step(
    model: SpeechLLMConfig,
    teacher: WhisperConfig | None,
    pairs: Collection[tuple[int, int]],
    sizes: Sizes,
    active: Collection[str],
) -> dict[str, Cost]:
    """Returns the cost of every part of one step with these objectives, {part: cost}; parts that do not run are absent.

    The LM head's `recompute` is that of `losses`, which computes the logits of every chunk once more; that of the
    blocks is 0, as with `model.remat` "none".
    """
    out: dict[str, Cost] = {}
    if objectives.SPEECH & set(active):
        tokens, clips = sizes.n_rows * sizes.n_tokens, sizes.n_rows * sizes.n_clips
        out["embedder"] = _embedder(model, clips, sizes.n_samples)
        out |= _adapted(model, tokens, sizes.n_tokens)
        head = frozen(model.llm.width * model.llm.vocab, sizes.n_rows * sizes.n_targets, recompute=True)
        if objectives.ANSWERS & set(active):
            out |= _plain(model, tokens, sizes.n_tokens)
        if {"lm", "response_kd"} & set(active):
            # Of divergence: also of the reading, forward only.
            read = Cost(head.forward, 0.0, head.recompute) if "response_kd" in active else Cost()
            out["LM head"] = _times(head, len({"lm", "response_kd"} & set(active))) + read
        if objectives.ANSWERS & objectives.READING & set(active):
            out["text reading"] = _base(model, sizes.n_rows * sizes.n_reading, sizes.n_reading)
        if "distill" in active and teacher is not None:
            audio = clips * sizes.n_audio
            out["distillation heads"] = trained(model.llm.width * teacher.width * len(pairs), audio)
            if not sizes.precomputed:
                out["teacher"] = _teacher(teacher, 1 + max(block for _, block in pairs), clips, sizes.n_samples)
    text = [name for name in ("text_anchor", "text_kd") if name in active]
    if text:
        out["text objectives"] = _text(model, sizes.text_rows * sizes.text_tokens, sizes.text_tokens, text)
    return out


def total(parts: dict[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


def _block_weights(model: SpeechLLMConfig) -> int:
    c = model.llm
    return c.width * c.head_width * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.width * c.mlp_width


def _lora_weights(model: SpeechLLMConfig) -> int:
    """Entries of A and B of one block."""
    c, lora = model.llm, model.lora
    if lora is None:
        return 0
    q, kv = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
    sides = {"q": (c.width, q), "k": (c.width, kv), "v": (c.width, kv), "o": (q, c.width)}
    sides |= {"gate": (c.width, c.mlp_width), "up": (c.width, c.mlp_width), "down": (c.mlp_width, c.width)}
    return lora.rank * sum(sum(sides[target]) for target in lora.targets)


def _attention(model: SpeechLLMConfig, tokens: float, length: int) -> Cost:
    """Scores and the sum of values of one block; every query meets every key of its row."""
    once = 2.0 * 2.0 * tokens * length * model.llm.n_heads * model.llm.head_width
    return Cost(once, 2.0 * once)


def _times(cost: Cost, n: int) -> Cost:
    return Cost(n * cost.forward, n * cost.backward, n * cost.recompute)


def _adapted(model: SpeechLLMConfig, tokens: float, length: int) -> dict[str, Cost]:
    n = model.lora.n_blocks if model.lora is not None else 0
    return {
        "adapted blocks, frozen": frozen(n * _block_weights(model), tokens),
        "adapted blocks, LoRA": trained(n * _lora_weights(model), tokens),
        "adapted blocks, attention": _times(_attention(model, tokens, length), n),
    }


def _plain(model: SpeechLLMConfig, tokens: float, length: int) -> dict[str, Cost]:
    n = model.llm.n_blocks - (model.lora.n_blocks if model.lora is not None else 0)
    return {
        "upper blocks, frozen": frozen(n * _block_weights(model), tokens),
        "upper blocks, attention": _times(_attention(model, tokens, length), n),
    }


def _embedder(model: SpeechLLMConfig, clips: int, n_samples: int) -> Cost:
    c, frames = model.embedder, n_frames(n_samples)
    positions = n_encoder_frames(n_samples)
    n_audio = -(-positions // c.frames_per_token)
    if c.kind == "patch":
        first = 2 * c.frames_per_token * c.n_mels * c.width * clips * n_audio
        rest = trained(c.width * c.out_width, clips * n_audio)
    else:
        first = 3 * c.n_mels * c.width * clips * frames
        rest = trained(3 * c.width**2, clips * positions)
        rest += trained(c.frames_per_token * c.width * c.out_width, clips * n_audio)
    return rest + Cost(2.0 * first, 2.0 * first)  # nothing needs the gradient of the mel frames


def _teacher(teacher: WhisperConfig, n_blocks: int, clips: int, n_samples: int) -> Cost:
    """The encoder up to the last paired block, forward only, on clips of the batch's length."""
    frames, positions, width = n_frames(n_samples), n_encoder_frames(n_samples), teacher.width
    stem = 3 * teacher.n_mels * width * frames + 3 * width**2 * positions
    block = (4 * width**2 + 2 * width * teacher.encoder_mlp_width + 2 * positions * width) * positions
    return Cost(2.0 * clips * (stem + n_blocks * block))


def _base(model: SpeechLLMConfig, tokens: float, length: int) -> Cost:
    """All blocks of the LLM without adapters, forward only."""
    blocks = total(_adapted(model, tokens, length)) + total(_plain(model, tokens, length))
    return Cost(blocks.forward - 2.0 * tokens * (model.lora.n_blocks if model.lora else 0) * _lora_weights(model))


def _text(model: SpeechLLMConfig, tokens: float, length: int, active: Collection[str]) -> Cost:
    """Plain text through the model with and without adapters; without them, forward only."""
    student = total(_adapted(model, tokens, length))
    base = Cost(student.forward - 2.0 * tokens * (model.lora.n_blocks if model.lora else 0) * _lora_weights(model))
    if "text_kd" in active:
        upper = total(_plain(model, tokens, length)) + frozen(model.llm.width * model.llm.vocab, tokens, recompute=True)
        student, base = student + upper, base + Cost(upper.forward, 0.0, 0.0)
    return student + base
