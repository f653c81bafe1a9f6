"""From a configuration to modules, tokenizer and weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from jax.sharding import Mesh

from aura_jax import assets, sharding
from aura_jax.audio.features import frames_per_token
from aura_jax.config import Config
from aura_jax.convert import hf
from aura_jax.data.prompts import ChatFormat
from aura_jax.errors import UserError
from aura_jax.models.align import layer_map
from aura_jax.models.embedder import EmbedderConfig
from aura_jax.models.llm import Context, LLMConfig
from aura_jax.models.lora import LoRAConfig, float_dtype
from aura_jax.models.speech_llm import SpeechLLM, SpeechLLMConfig
from aura_jax.models.whisper import WhisperConfig, WhisperEncoder

# Variables below these are read from files, and no checkpoint holds them unless they were trained.
BASE = ("params/llm/", "params/encoder/", "teacher/")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a directory has one of them


@dataclasses.dataclass(frozen=True)
class System:
    """A configured speech LLM and, if one is named, its teacher: everything but the weights.

    Attributes:
      llm_dir, teacher_dir, encoder_dir: Hugging Face directories of the frozen weights.
      pairs: (student block, teacher block) that distillation compares.
      frames_per_token: 50 Hz teacher frames that one audio token covers.
    """

    config: Config
    llm_dir: Path
    teacher_dir: Path | None
    encoder_dir: Path | None
    model: SpeechLLM
    teacher: WhisperEncoder | None
    teacher_config: WhisperConfig | None
    pairs: tuple[tuple[int, int], ...]
    frames_per_token: int
    tokenizer: Any
    chat: ChatFormat

    @property
    def n_mels(self) -> int:
        return self.model.config.embedder.n_mels

    @property
    def token_rate(self) -> float | None:
        """Audio tokens a second in training; None: a clip has as many as its transcript."""
        return None if self.config.embedder.kind == "cformer" else self.config.embedder.token_rate


def build(config: Config) -> System:
    """Reads the models' configs and tokenizer and puts the modules together; loads no weights.

    Raises:
      UserError: for a model that cannot be found, or values that do not fit the models named.
    """
    llm_dir = assets.resolve(config.model.llm)
    llm = hf.load_llm_config(llm_dir)
    teacher_dir = assets.resolve(config.model.teacher) if config.model.teacher else None
    whisper = hf.load_whisper_config(teacher_dir) if teacher_dir else None
    encoder_dir = assets.resolve(config.model.encoder) if config.model.encoder else None
    encoder = hf.load_whisper_config(encoder_dir) if encoder_dir else None

    lora = None
    if config.lora.n_blocks:
        lora = LoRAConfig(
            n_blocks=llm.n_blocks if config.lora.n_blocks == -1 else config.lora.n_blocks,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            rslora=config.lora.rslora,
            targets=tuple(config.lora.targets),
            scope=config.lora.scope,
        )
    if whisper is None and config.embedder.from_teacher and config.embedder.kind == "stem":
        raise UserError("embedder.from_teacher needs model.teacher: name a Whisper, or set embedder.from_teacher=False")
    n_mels, width = _embedder_shape(config, llm, whisper, encoder)
    embedder = EmbedderConfig(
        kind=config.embedder.kind,
        n_mels=n_mels,
        width=width,
        out_width=llm.width,
        frames_per_token=frames_per_token(config.embedder.token_rate),
        hidden=config.embedder.hidden or llm.width,
        n_before=config.embedder.n_before,
        n_after=config.embedder.n_after,
    )
    dtype, param_dtype = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
    model = SpeechLLM(
        SpeechLLMConfig(llm, embedder, lora, config.model.mask, config.model.chunk, encoder),
        dtype,
        param_dtype,
        config.model.attention,
        config.model.remat,
        matmul_dtype=jnp.dtype(config.model.matmul_dtype) if config.model.matmul_dtype else None,
    )
    pairs = ()
    if whisper is not None and lora is not None:
        given = tuple(tuple(pair) for pair in config.distill.pairs)
        pairs = layer_map(config.distill.layer_map, lora.n_blocks, whisper.encoder_blocks, given)
    teacher = None
    if whisper is not None:
        floats = float_dtype(param_dtype, dtype)
        teacher = WhisperEncoder(whisper, dtype, floats, attention_impl=config.model.attention)
    tokenizer = load_tokenizer(llm_dir)
    return System(
        config=config,
        llm_dir=llm_dir,
        teacher_dir=teacher_dir,
        encoder_dir=encoder_dir,
        model=model,
        teacher=teacher,
        teacher_config=whisper,
        pairs=pairs,
        frames_per_token=embedder.frames_per_token,
        tokenizer=tokenizer,
        chat=ChatFormat(
            tokenizer,
            config.data.chat_template or None,
            config.data.system or None,
            config.data.template_kwargs.to_dict(),
        ),
    )


def _embedder_shape(
    config: Config, llm: LLMConfig, whisper: WhisperConfig | None, encoder: WhisperConfig | None
) -> tuple[int, int]:
    """Returns the mel bins that the embedder reads, and its width inside.

    Raises:
      UserError: for values that do not fit the Whisper: states have its width, and a stem that starts from the
        teacher's has its shape. Teacher and student read the same log-mel.
    """
    like, c = encoder or whisper, config.embedder
    found = like.n_mels if like else 80, like.width if like else llm.width
    given = c.n_mels or found[0], c.width or found[1]
    for name, own, of_whisper, is_fixed in (
        ("n_mels", given[0], found[0], like is not None),
        ("width", given[1], found[1], encoder is not None or (c.kind == "stem" and c.from_teacher)),
    ):
        if own != of_whisper and is_fixed:
            whose = "model.encoder" if encoder is not None else "model.teacher"
            raise UserError(f"embedder.{name} {own} is not the {of_whisper} of {whose}: set it to 0")
    return given


def build_text(config: Config) -> System:
    """As `build`, for requests of text to the base LLM: `load_llm` gives all the weights it needs.

    Raises:
      UserError: as `build`.
    """
    config = config.copy_and_resolve_references()
    config.model.teacher, config.model.encoder = "", ""
    config.embedder.update(kind="patch", from_teacher=False)
    config.lora.n_blocks = 0
    return build(config)


def build_llm_config(config: Config) -> LLMConfig:
    """Reads the shape of the LLM that a configuration names."""
    return hf.load_llm_config(assets.resolve(config.model.llm))


def load_tokenizer(directory: Path) -> Any:
    """Reads the tokenizer of a Hugging Face directory.

    Raises:
      UserError: it holds no tokenizer, or a damaged one.
    """
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        # For a Whisper, transformers would make an empty one.
        raise UserError(f"{directory}: no tokenizer ({', '.join(_TOKENIZERS)}): copy it there, beside the weights")
    # An export of ours: with the config of the LLM inside, or transformers would ask to run the directory's own code.
    inside = {"config": transformers.AutoConfig.for_model(**hf.text_config(directory))} if hf.is_aura(directory) else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **inside)
    except Exception as error:  # of transformers, tokenizers or json, and none of them documented
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: the tokenizer cannot be read ({reason}): copy or fetch it again") from error


def _init(system: System, key: jax.Array) -> dict:
    """Draws every variable of the student at random, distillation heads included."""
    student: Any = system.model
    # No parameter depends on attention, and a shape may be asked for where its kernel cannot run.
    model, c = student.clone(attention_impl="xla"), student.config
    keys = dict(zip(("params", "lora", "heads"), jax.random.split(key, 3), strict=True))
    tokens = jnp.zeros((1, 1), jnp.int32)
    ctx = Context(tokens, tokens + 1, tokens + 1, tokens + 1)

    def touch_everything(module: SpeechLLM) -> jax.Array:
        module.embed_audio(jnp.zeros((1, 1, 2 * c.embedder.frames_per_token, c.embedder.n_mels)), tokens + 1, 1)
        x = module.embed_text(tokens)
        return module.logits(module.llm(x, ctx)[0])

    variables = dict(model.init({"params": keys["params"], "lora": keys["lora"]}, method=touch_everything))
    if system.pairs and system.teacher_config is not None:
        n = len(system.pairs) if system.config.distill.head == "own" else 1
        width, out = c.llm.width, system.teacher_config.width
        variables["heads"] = {
            "scale": jnp.ones((n, width)),
            "kernel": jax.random.normal(keys["heads"], (n, width, out)) / width**0.5,
        }
    return variables


def new_variables(system: System, mesh: Mesh, seed: int) -> dict:
    """Draws what a run trains: adapters, embedder and heads, on the mesh; without the weights that are read from files.

    A stem of the teacher's shape, if so configured, and the text embeddings' size are filled in by
    `initial_variables`.
    """
    init = lambda key: _without_base(_init(system, key))
    key = jax.random.key(seed)
    shardings = sharding.tree_shardings(jax.eval_shape(init, key), mesh)
    # What the result does not hold, the compiler never draws.
    return jax.jit(init, out_shardings=shardings)(key)


def _without_base(variables: dict) -> dict:
    params = {k: v for k, v in variables["params"].items() if k not in ("llm", "encoder")}
    return {**variables, "params": params}


def abstract_variables(system: System) -> dict:
    """Returns shapes and dtypes of the student's variables, LLM and encoder included."""
    return jax.eval_shape(functools.partial(_init, system), jax.random.key(0))


def abstract_teacher(system: System) -> dict:
    """Returns shapes and dtypes of the teacher's variables."""
    assert system.teacher is not None and system.teacher_config is not None
    encoder: Any = system.teacher
    mel_1xFxM = jax.ShapeDtypeStruct((1, 2, system.teacher_config.n_mels), jnp.float32)
    return jax.eval_shape(encoder.clone(attention_impl="xla").init, jax.random.key(0), mel_1xFxM)["params"]


def load_llm(system: System, mesh: Mesh) -> dict:
    """Reads the LLM's weights onto the mesh, every host only its part, quantised where they are held in int8."""
    model = system.model
    return hf.load_llm(
        system.llm_dir,
        model.config.llm,
        n_adapted=model.config.lora.n_blocks if model.config.lora else 0,
        dtype=float_dtype(model.param_dtype, model.dtype),
        int8=model.param_dtype == jnp.int8,
        sharding=_by_table(mesh, "params/llm/"),
    )


def load_teacher(system: System, mesh: Mesh) -> dict:
    """Reads the teacher's weights onto the mesh."""
    assert system.teacher is not None and system.teacher_dir is not None and system.teacher_config is not None
    return hf.load_whisper_encoder(
        system.teacher_dir,
        system.teacher_config,
        dtype=system.teacher.param_dtype,
        sharding=_by_table(mesh, "teacher/"),
    )


def load_base(system: System, mesh: Mesh) -> dict:
    """Reads what `params` holds of files: the LLM, and the encoder if one is kept."""
    params, encoder = {"llm": load_llm(system, mesh)}, system.model.config.encoder
    if encoder is not None and system.encoder_dir is not None:
        params["encoder"] = hf.load_whisper_encoder(
            system.encoder_dir,
            encoder,
            dtype=float_dtype(system.model.param_dtype, system.model.dtype),
            sharding=_by_table(mesh, "params/encoder/"),
        )
    return params


def _by_table(mesh: Mesh, prefix: str):
    return lambda path, shape: jax.sharding.NamedSharding(mesh, sharding.parameter_spec(prefix + path, shape, mesh))


def initial_variables(system: System, mesh: Mesh) -> dict:
    """Returns all variables at the start of a run: `params`, `lora`, `heads`, and `teacher` if there is one."""
    variables = new_variables(system, mesh, system.config.seed)
    variables["params"] |= load_base(system, mesh)
    embedder = variables["params"]["embedder"]
    rms = jax.jit(lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
    embedder["text_rms"] = rms(variables["params"]["llm"]["embed"]["embedding"])
    if system.teacher is not None:
        variables["teacher"] = load_teacher(system, mesh)
        if system.config.embedder.kind == "stem" and system.config.embedder.from_teacher:
            stem = {name: variables["teacher"][name] for name in ("conv1", "conv2")}
            # A copy: the student trains its own.
            embedder["stem"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), stem)
    return variables
