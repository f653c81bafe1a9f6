"""What the LLM itself says after reading each transcript: the responses that BLSP (arXiv 2309.00916) trains on.

They are written in `parts`. What is sampled for a row depends on the seed and the row's place in the manifest.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from aura_jax import checkpoint
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.data.manifest import LET_TRANSCRIBE
from aura_jax.errors import UserError
from aura_jax.infer import parts
from aura_jax.infer.generate import plain_generator
from aura_jax.infer.parts import Line, Part
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import GREEDY, Sampling

# What responses depend on, and how an error calls it.
_NAMES = {
    "prompt": "prompt",
    "llm": "LLM",
    "dtypes": "number format",
    "chat": "chat template",
    "sampling": "sampling",
    "max_new_tokens": "--max-new-tokens",
    "weights": "LLM's weights",
}


class Reply(NamedTuple):
    """A row's response, and whether the LLM ended it (or the longest length did)."""

    response: str
    ended: bool


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
      path: of the manifest, or of the part.
      n_kept: responses that an earlier call had written.
      n_cut, n_empty: responses that the longest length ended; that are empty.
      n_others: rows without audio, which are as they were.
    """

    path: Path
    n_responses: int
    n_kept: int
    n_cut: int
    n_empty: int
    n_others: int

    @property
    def summary(self) -> str:
        """The report in one line."""
        kept = f" ({self.n_kept} of them were there)" if self.n_kept else ""
        text = f"{self.path}: {self.n_responses} responses{kept}, {self.n_cut} cut at the longest length"
        text += f", {self.n_empty} empty" if self.n_empty else ""
        return text + (f", and {self.n_others} rows without audio as they were" if self.n_others else "")


def config_of(llm: str, overrides: Sequence[str] = ()) -> Config:
    """Returns a config that names an LLM and no more; `overrides` are `--config.KEY=VALUE`.

    Raises:
      UserError: for a wrong key or value.
    """
    c = config_lib.default()
    c.model.llm = llm
    # A config is valid with a schedule only, and nothing here trains.
    c.train.schedule, c.train.stages.none = ("none",), config_lib.stage(1, 1.0, {"lm": 1.0})
    c = config_lib.override(c, overrides)
    config_lib.validate(c)
    return c


def write(
    manifest: str,
    output: Path,
    config: Config,
    *,
    prompt: str | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    part: Part | None = None,
    progress: bool = True,
) -> Report:
    """Writes the manifest with `response`, its `ended`, and the `prompt` that asked for it, in every speech row.

    The LLM is asked as training asks it, with the transcript in the place of the audio. No audio is read; paths are
    made relative to the new manifest.

    Args:
      manifest: a manifest, or a folder of shards; every speech row has a `text`.
      output: of the new manifest.
      config: its LLM, its chat template, its mesh; the batch size is `eval.batch_size`.
      prompt: None: `data.prompt`.
      max_new_tokens: of a response; None: `eval.max_new_tokens`.
      limit: the first rows only; None: all.
      part: write this part only. None: join the parts there are; if there are none, write all rows.
      progress: show a progress bar on standard error.

    Raises:
      UserError: for a manifest that will not do; a part that was made of something else or is not finished; an
        `output` that is there already without its parts; a model that cannot be found.
    """
    n_new = config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
    if n_new < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {n_new}")
    asked = config.data.prompt if prompt is None else prompt
    lines = parts.read(manifest, limit)
    m, d = config.model, config.data
    column = parts.Column(
        format="aura-jax continuations",
        entry=Reply,
        places=_spoken(manifest, lines),
        making={
            "prompt": asked,
            "llm": m.llm,
            "dtypes": [m.dtype, m.param_dtype, m.matmul_dtype],
            "chat": [d.chat_template, d.system, d.template_kwargs.to_dict()],
            "sampling": asdict(sampling),
            "max_new_tokens": n_new,
        },
        names=_NAMES,
        load=lambda: _load(lines, config, asked, sampling, n_new),
        values=lambda reply: {"prompt": asked, "response": reply.response, "ended": reply.ended},
        # The longest first: what does not fit the memory is known at once.
        order=lambda place: -len(lines[place].row.text or ""),
    )
    path, replies, n_kept, is_whole = parts.write(manifest, output, lines, column, part, progress)
    return Report(
        path=path,
        n_responses=len(replies),
        n_kept=n_kept,
        n_cut=sum(not reply.ended for reply in replies.values()),
        n_empty=sum(not reply.response for reply in replies.values()),
        n_others=len(lines) - len(replies) if is_whole else 0,
    )


def _spoken(manifest: str, lines: Sequence[Line]) -> list[int]:
    """Returns the places of the speech rows.

    Raises:
      UserError: there are none, or one without a transcript.
    """
    places = [place for place, line in enumerate(lines) if line.row.audio is not None]
    if not places:
        raise UserError(f"{manifest}: no row with 'audio': only speech rows get a response")
    for row in (lines[place].row for place in places):
        if row.text is None:
            raise UserError(f"{row.where}: a speech row without 'text': add what is said, or {LET_TRANSCRIBE}")
        if not row.text.strip():
            raise UserError(f"{row.where}: 'text' is empty: add what is said, or {LET_TRANSCRIBE}")
    return places


def _reply(text: str, ended: bool) -> Reply:
    """Returns a response; one that was cut inside a character is without what there is of it."""
    return Reply(text if ended else text.rstrip("\ufffd"), ended)


def _load(lines: Sequence[Line], config: Config, prompt: str, sampling: Sampling, n_new: int) -> parts.Writer[Reply]:
    """Returns what answers: the LLM alone."""
    generator = plain_generator(config, n_new)

    def answer(places: Sequence[int]) -> list[Reply]:
        rows = [(place, lines[place].row) for place in places]
        requests = [
            Request(transcript=row.text, prompt=prompt, history=row.history, number=place) for place, row in rows
        ]
        return [_reply(reply.text, reply.ended) for reply in generator.generate(requests, None, sampling)]

    return parts.Writer(answer, generator.batch_size, checkpoint.fingerprint(generator.variables["params"]["llm"]))
