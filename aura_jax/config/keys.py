"""Every key with its default, and the stages that a configuration makes of them.

A file in configs/ starts from `default()` and changes what it needs. A key that does not exist is an error.
"""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

from aura_jax.errors import UserError, nearest

# A ConfigDict, whose attributes no type checker knows.
Config: TypeAlias = Any

OBJECTIVES = (
    "lm",
    "distill",
    "response_kd",
    "input_kd",
    "quantity",
    "hidden_l2",
    "embedding_l2",
    "text_anchor",
    "text_kd",
)

# Nodes whose keys the user names.
OPEN = ("train.stages", "eval.sets", "data.template_kwargs")


def stage(steps: int, learning_rate: float, objectives: dict[str, float], **changes) -> Config:
    """Returns one stage of training; `changes` override its other keys."""
    out: Config = ConfigDict(
        dict(
            steps=steps,
            learning_rate=learning_rate,  # peak; the schedule warms up linearly and falls along a cosine
            warmup_steps=20,
            final_fraction=0.1,  # of the peak, at the end of the stage
            clip_norm=1.0,
            objectives=dict.fromkeys(OBJECTIVES, 0.0),  # weights; 0 leaves an objective out
            merge_lora=False,  # fold LoRA into the LLM before the stage starts
            trainable=(),  # as the top-level `trainable`, for this stage alone; empty: the top-level table
        )
    )
    with out.objectives.ignore_type():
        for name, weight in objectives.items():
            if name not in OBJECTIVES:
                raise UserError(f"unknown objective {name!r}: {nearest(name, OBJECTIVES)}")
            out.objectives[name] = float(weight)
    for key, value in changes.items():
        if key not in out:
            raise UserError(f"unknown key {key} of a stage: {nearest(key, out.keys())}")
        out[key] = value
    return out


def default() -> Config:
    """Returns the configuration with every key at its default."""
    c: Config = ConfigDict()
    c.seed = 0
    c.model = ConfigDict(
        dict(
            llm="",  # a directory, an asset's name, or hf://owner/name[@revision]
            teacher="",  # likewise, a Whisper: what is distilled from
            encoder="",  # likewise, a Whisper that stays in the model, for an embedder.kind that reads its states
            dtype="float32",  # of the computation: float32 or bfloat16
            # Frozen weights are stored in this. int8: the LLM's linears, one scale for each output; all else as dtype.
            param_dtype="float32",
            matmul_dtype="",  # of the operands of products with the frozen weights of the LLM's blocks; "": as dtype
            attention="xla",  # of LLM and teacher: xla, cudnn, or splash (TPU; answers are decoded by xla)
            remat="none",  # none, dots, or full
            mask="causal",  # inside an audio span: causal, bidirectional, or block
            chunk=0,  # tokens, for mask = block
            normalisation="whisper",  # of the student's log-mel: whisper (looks ahead) or streaming (does not)
        )
    )
    c.lora = ConfigDict(
        dict(
            n_blocks=12,  # the first N blocks of the LLM; -1: all; 0: no LoRA
            rank=64,
            alpha=64.0,
            rslora=False,
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            scope="request",  # all, request, or audio
            # Below 1, A reads only directions of its input that hold this share of the energy of data.text_pool.
            text_energy=1.0,
        )
    )
    c.embedder = ConfigDict(
        dict(
            kind="stem",  # stem or patch; with an encoder, stack, conv or cformer
            token_rate=12.5,  # Hz: 25, 12.5, 8.33 or 6.25; of cformer, the most that there may be
            from_teacher=True,  # stem: start from the teacher's convolutions; the others start at random
            width=0,  # of stem and patch, inside; 0: the teacher's, or without one the LLM's
            n_mels=0,  # that stem and patch read; 0: the teacher's, or without one 80
            hidden=0,  # width of the hidden layer of stack and conv; 0: the LLM's width
            n_before=2,  # blocks of cformer before it decides what is a token
            n_after=2,  # and after
        )
    )
    c.teacher = ConfigDict(
        dict(
            window="unpadded",  # unpadded, or 30s
            precompute=False,  # write the pooled states to disk once, instead of running the teacher in every step
        )
    )
    c.distill = ConfigDict(
        dict(
            loss="cosine",  # cosine, mse, nmse, or smooth_l1
            head="own",  # own: one a pair of blocks; shared: one for all
            layer_map="stride",  # stride, identity, last, or list
            pairs=(),  # for list: (student block, teacher block), counted from 0
            target_norm="standardise",  # standardise (per channel), layernorm, or none
        )
    )
    c.kd = ConfigDict(dict(temperature=1.0))  # of both readings in response_kd and input_kd
    c.data = ConfigDict(
        dict(
            train=(),  # (manifest or folder of shards, passes per epoch) pairs
            validation_key="voice",  # rows of the training manifests whose key ...
            validation_values=(),  # ... has one of these values are held out
            min_seconds=0.0,
            max_seconds=30.0,  # longer clips are left out, and counted
            buckets=(),  # seconds, ascending: a batch is padded to the smallest that holds its clips
            batch_size=16,  # rows, over all hosts
            layout="slot",  # slot: one example a row; packed: several
            row_tokens=512,  # packed: length of a row
            row_clips=8,  # packed: most clips a row
            speeds=(1.0,),  # factors, drawn anew each epoch
            prompt="",  # after the audio, where the manifest has none
            chat_template="",  # Jinja; empty: the tokenizer's own
            template_kwargs={},  # further variables of the template, such as {"enable_thinking": False}
            system="",  # system turn; empty: what the template does by itself
            workers=0,  # processes; 0: threads of this one
            threads=2,
            augment=dict(
                gain_db=(0.0, 0.0),
                noise_probability=0.0,
                noise_snr_db=(5.0, 20.0),
                freq_masks=0,
                freq_width=10,  # mel bins, at most
                time_masks=0,
                time_width=10,  # frames, at most
            ),
            text_pool="",  # JSON lines of plain text and chats, for text_anchor, text_kd and lora.text_energy
            text_rows=6,
            text_length=64,  # tokens
            text_chat=-1.0,  # share of the rows from conversations; below 0: as the pool has them, but at least a row
        )
    )
    c.trainable = (  # (regular expression of parameter paths, multiplier of the learning rate)
        ("params/embedder/(?!text_rms)", 1.0),
        ("lora/", 1.0),
        ("heads/", 1.0),
    )
    c.optimizer = ConfigDict(dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01))
    c.train = ConfigDict(
        dict(
            schedule=(),  # names of stages, in order
            stages={},
            steps=0,  # stop after so many steps over all stages; 0: all of them
            accumulate=1,  # micro-batches a step
            loss_chunk=128,  # targets whose logits are held at a time, over all devices: some dozens for each of many
            log_every=10,
            eval_every=0,  # steps, in stages that train answers; 0: only at the end of the run
            eval_rows=32,
            checkpoint_every=100,
            keep=2,  # newest checkpoints
            keep_every=0,  # and each one at a multiple of this
            max_skipped=5,  # steps in a row with non-finite gradients before the run stops
            profile_start=0,
            profile_steps=0,
        )
    )
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    c.eval = ConfigDict(
        dict(
            sets={},  # name: manifest or folder of shards
            batch_size=16,
            max_new_tokens=48,
            max_seconds=600.0,  # longer clips are not answered, unless data.max_seconds is longer
            text_questions="",
            text_heldout="",
            noise=dict(  # the sets once more, in noise
                kinds=(),  # of white and babble; empty: no noise
                snr_db=(20.0, 10.0, 5.0, 0.0),
                sets=(),  # names of eval.sets; empty: all of them
            ),
            likelihood=(),  # names of eval.sets whose answers are read, not written: perplexity and divergence
        )
    )
    return c


def stages(config: Config) -> list[tuple[str, ConfigDict]]:
    """Returns the stages in order, cut off at `train.steps`."""
    left = config.train.steps or 1 << 62
    out = []
    for name in config.train.schedule:
        if left > 0:
            one = config.train.stages[name].copy_and_resolve_references()
            out.append((name, one))
            left -= one.steps
    return out


def answer_objectives(config: Config) -> dict[str, float]:
    """Returns what teaches a config's answers, of `lm` and `response_kd`, with the weights of the last stage that has
    one; {"lm": 1.0} where none has."""
    for name in reversed(config.train.schedule):
        objectives = config.train.stages[name].objectives
        if found := {key: objectives[key] for key in ("lm", "response_kd") if objectives[key]}:
            return found
    return {"lm": 1.0}


def total_steps(config: Config) -> int:
    steps = sum(config.train.stages[name].steps for name in config.train.schedule)
    return min(steps, config.train.steps) if config.train.steps else steps
