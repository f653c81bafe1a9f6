"""What the LLM itself says after reading each transcript: the responses that BLSP (arXiv 2309.00916) trains on.

The speech rows of a manifest are dealt out to parts, each written by a process of its own:

    OUT.1-of-2.jsonl  what it is made of and by, then {"row", "response", "ended"} a row; grows by a batch at a time
    OUT.2-of-2.jsonl
    OUT.jsonl         the manifest with the responses of all parts; written last, whole or not at all

A process that was stopped goes on where its part ends. What is sampled for a row depends on the seed and the row's
place in the manifest, so that any number of parts gives the same manifest.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from aura_jax import checkpoint
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.data.manifest import Row, manifest_lines, parse_row
from aura_jax.errors import UserError
from aura_jax.infer.generate import Generator, plain_generator
from aura_jax.infer.prompting import Request
from aura_jax.infer.sampling import GREEDY, Sampling
from aura_jax.storage import Folder, is_remote

_FORMAT = "aura-jax continuations"

# What a part is made of and by, and how an error calls it.
_NAMES = {
    "format": "format",
    "input": "input (MANIFEST or --limit)",
    "prompt": "prompt",
    "llm": "LLM",
    "dtypes": "number format",
    "chat": "chat template",
    "sampling": "sampling",
    "max_new_tokens": "--max-new-tokens",
    "weights": "LLM's weights",
}


class Part(NamedTuple):
    """One of several parts, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads "I/N". Raises UserError if it is none."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text!r}: write --shard I/N, with I from 1 to N, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def path(self, output: Path) -> Path:
        """Where the part lies, of a manifest that will be at `output`."""
        return output.with_name(f"{output.stem}.{self.index}-of-{self.count}{output.suffix}")


class Reply(NamedTuple):
    """A row's response, and whether the LLM ended it (or the longest length did)."""

    response: str
    ended: bool


class _Line(NamedTuple):
    """A line of the input: as it is, and as it was understood."""

    values: dict[str, Any]
    row: Row


class _Written(NamedTuple):
    """What a part's file holds: its first line, if it has one; its replies by row; the bytes of its whole lines."""

    head: dict[str, Any] | None
    replies: dict[int, Reply]
    n_bytes: int


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
    """Writes the manifest with `response`, and the `prompt` that asked for it, in every speech row.

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
    if output.absolute() == Path(manifest).absolute():
        raise UserError(f"{output}: the manifest itself: name another --output")
    n_new = config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
    for name, value in (("--limit", limit), ("--max-new-tokens", n_new)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    lines = _read(manifest, limit)
    head = _head(lines, config, config.data.prompt if prompt is None else prompt, sampling, n_new)
    there = _counts(output)
    if output.exists() and not there:
        raise UserError(f"{output}: there already, and no part of it: name another --output, or remove it")
    count = part.count if part else max(there, default=1)
    if there - {count}:
        numbers = " and of ".join(map(str, sorted(there | {count})))
        raise UserError(f"{output}: parts of {numbers}: remove those that are not wanted, or name another --output")
    n_kept = 0
    if part is not None or count == 1:
        part = part or Part(1, 1)
        written, n_kept = _write_part(part, output, lines, head, config, progress)
        if count > 1:
            return _report(part.path(output), written.replies, n_kept, 0)
    replies = _replies(output, count, lines, head)
    _join(manifest, output, lines, head["prompt"], replies)
    return _report(output, replies, n_kept, len(lines) - len(replies))


def _read(manifest: str, limit: int | None) -> list[_Line]:
    home, lines = Path(manifest).parent.absolute(), []
    for where, values in manifest_lines(manifest):
        row = parse_row(dict(values), where, home)
        if row.audio is not None and row.text is None:
            raise UserError(f"{where}: a speech row without 'text': add what is said, which the LLM shall read")
        if row.audio is not None and not (row.text or "").strip():
            raise UserError(f"{where}: 'text' is empty: add what is said, or remove the row")
        lines.append(_Line(values, row))
        if len(lines) == limit:
            break
    if not lines:
        raise UserError(f"{manifest}: an empty manifest: give one JSON object a line")
    if not _rows(Part(1, 1), lines):
        raise UserError(f"{manifest}: no row with 'audio': only speech rows get a response")
    return lines


def _rows(part: Part, lines: Sequence[_Line]) -> list[int]:
    """Returns the places of the speech rows of a part."""
    speech = [place for place, line in enumerate(lines) if line.row.audio is not None]
    return speech[part.index - 1 :: part.count]


def _head(lines: Sequence[_Line], config: Config, prompt: str, sampling: Sampling, n_new: int) -> dict[str, Any]:
    """Returns what responses depend on, as the first line of a part has it, but for the LLM's weights."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line.values, sort_keys=True).encode() + b"\n")
    m, d = config.model, config.data
    head = {
        "format": _FORMAT,
        "input": f"{len(lines)} rows, {digest.hexdigest()[:16]}",
        "prompt": prompt,
        "llm": m.llm,
        "dtypes": [m.dtype, m.param_dtype, m.matmul_dtype],
        "chat": [d.chat_template, d.system, d.template_kwargs.to_dict()],
        "sampling": asdict(sampling),
        "max_new_tokens": n_new,
    }
    return json.loads(json.dumps(head))  # as it is read again: without tuples


def _counts(output: Path) -> set[int]:
    """Returns of how many parts those beside `output` are."""
    name = re.compile(rf"{re.escape(output.stem)}\.\d+-of-(\d+){re.escape(output.suffix)}")
    there = output.parent.iterdir() if output.parent.is_dir() else ()
    return {int(match[1]) for path in there if (match := name.fullmatch(path.name))}


def _read_part(path: Path) -> _Written:
    """Reads the whole lines of a part; what a killed process left of a line is not one of them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return _Written(None, {}, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend that") from None
    whole = data[: data.rfind(b"\n") + 1]
    head, replies = None, {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            if head is None:
                head = {name: values[name] for name in _NAMES}
            else:
                replies[values["row"]] = Reply(values["response"], values["ended"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: damaged, or no part: remove the file to write the part anew") from None
    return _Written(head, replies, len(whole))


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if old[name] != value:
            raise UserError(
                f"{path}: written with another {_NAMES[name]} ({_shown(old[name])}, now {_shown(value)}): "
                "name another --output, or remove the parts"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _write_part(
    part: Part, output: Path, lines: Sequence[_Line], head: Mapping[str, Any], config: Config, progress: bool
) -> tuple[_Written, int]:
    """Writes what a part lacks; returns the whole of it, and how many rows it had."""
    path, mine = part.path(output), _rows(part, lines)
    written = _read_part(path)
    if written.head is not None:
        _check_same(path, written.head, head)
    n_kept, missing = len(written.replies), [place for place in mine if place not in written.replies]
    if written.head is not None and not missing:
        return written, n_kept
    generator, weights = _load(config, head["max_new_tokens"])
    head = {**head, "weights": weights}
    if written.head is not None:
        _check_same(path, written.head, head)
    # The longest first: what does not fit the memory is known at once.
    missing.sort(key=lambda place: -len(lines[place].row.text or ""))
    size, sampling = generator.batch_size, Sampling(**head["sampling"])
    bar = tqdm(total=len(mine), initial=n_kept, desc=path.name, unit="row", disable=not progress)
    try:
        with bar, open(path, "ab") as file:
            file.truncate(written.n_bytes)
            if written.head is None:
                _append(file, [head])
            for start in range(0, len(missing), size):
                places = missing[start : start + size]
                requests = [_request(place, lines[place].row, head["prompt"]) for place in places]
                new = {
                    place: Reply(reply.text, reply.ended)
                    for place, reply in zip(places, generator.generate(requests, bar.update, sampling), strict=True)
                }
                _append(file, [{"row": place, **reply._asdict()} for place, reply in new.items()])
                written.replies.update(new)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): mend that, and call again to go on") from error
    return written, n_kept


def _append(file: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def _request(place: int, row: Row, prompt: str) -> Request:
    return Request(transcript=row.text, prompt=prompt, history=row.history, number=place)


def _load(config: Config, n_new: int) -> tuple[Generator, str]:
    """Returns what answers, the LLM alone, and the fingerprint of its weights."""
    generator = plain_generator(config, n_new)
    return generator, checkpoint.fingerprint(generator.variables["params"]["llm"])


def _replies(output: Path, count: int, lines: Sequence[_Line], head: Mapping[str, Any]) -> dict[int, Reply]:
    """Returns the replies of all parts.

    Raises:
      UserError: a part is missing, not finished, or made of something else.
    """
    replies: dict[int, Reply] = {}
    for part in (Part(index, count) for index in range(1, count + 1)):
        path, mine = part.path(output), _rows(part, lines)
        written = _read_part(path)
        if written.head is not None:
            _check_same(path, written.head, head)
            head = written.head  # with the weights, which all parts must share
        n_there = sum(place in written.replies for place in mine)
        if written.head is None or n_there < len(mine):
            raise UserError(f"{path}: {n_there} of {len(mine)} rows: first finish it with --shard {part.index}/{count}")
        replies |= {place: written.replies[place] for place in mine}
    return replies


def _join(manifest: str, output: Path, lines: Sequence[_Line], prompt: str, replies: Mapping[int, Reply]) -> None:
    """Writes the new manifest."""
    home, there = Path(manifest).parent.absolute(), output.parent.absolute()
    with Folder(there).new_file(output.name) as path, open(path, "w", encoding="utf-8") as file:
        for place, (values, _) in enumerate(lines):
            if place in replies:
                audio = _moved(values["audio"], home, there)
                values = {**values, "audio": audio, "prompt": prompt, "response": replies[place].response}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _moved(audio: str, home: Path, there: Path) -> str:
    """Returns a path relative to `home` as one relative to `there`; other paths and addresses as they are."""
    if home == there or is_remote(audio) or os.path.isabs(audio):
        return audio
    return os.path.relpath(home / audio, there)


def _report(path: Path, replies: Mapping[int, Reply], n_kept: int, n_others: int) -> Report:
    n_cut = sum(not reply.ended for reply in replies.values())
    n_empty = sum(not reply.response for reply in replies.values())
    return Report(path, len(replies), n_kept, n_cut, n_empty, n_others)
