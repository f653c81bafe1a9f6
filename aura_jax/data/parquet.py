"""Parquet files as Hugging Face writes them: an audio column of {bytes, path}, and columns of text and numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aura_jax.data.layouts import Item
from aura_jax.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "response")

_AUDIO = "audio"
_ROWS_AT_ONCE = 16


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet files needs pyarrow: pip install 'aura-jax[parquet]'") from None
    return pyarrow


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file: the least that parquet reads at once."""

    path: str
    number: int
    first_row: int
    n_rows: int
    n_bytes: int
    text_column: str
    columns: tuple[str, ...]  # that are kept, besides audio and text

    @property
    def identity(self) -> list[Any]:
        return [Path(self.path).name, self.number, self.n_rows, self.n_bytes, self.text_column, list(self.columns)]

    def items(self) -> Iterator[Item]:
        # Page by page: a row group may hold gigabytes of audio.
        file = _pyarrow().parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        columns = [_AUDIO, self.text_column, *self.columns]
        row = self.first_row
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[self.number], columns=columns, use_threads=False):
                for values in batch.to_pylist():
                    yield self._item(row, values)
                    row += 1
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: row {row}: cannot be read ({error}): download it again") from None

    def _item(self, row: int, values: dict[str, Any]) -> Item:
        where = f"{self.path}: row {row}"
        audio, name = values.pop(_AUDIO), None
        if isinstance(audio, Mapping):
            audio, name = audio.get("bytes"), audio.get("path")
        text = values.pop(self.text_column)
        key = "response" if self.text_column == "response" else "text"
        kept = {name: value for name, value in values.items() if value is not None}
        identity = kept.pop("id", None)
        identity = str(identity if identity is not None else name or f"{Path(self.path).stem}-{row}")
        line = {"id": identity, **kept, key: text}
        return Item(where, line, audio or b"", None if audio else f"{where}: no bytes in column {_AUDIO!r}")


def parts(path: Path, text_column: str | None) -> list[RowGroup]:
    """The row groups of a file.

    Args:
        text_column: what is said in the audio. None: the first of `TEXT_COLUMNS` that there is.

    Raises:
        UserError: pyarrow is missing; the file is not parquet; a column is missing, or not of audio or text.
    """
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]}): download it again") from None
    shown = ", ".join(schema.names)
    if _AUDIO not in schema.names or not _holds_audio(schema.field(_AUDIO).type):
        raise UserError(f"{path}: no column 'audio' with bytes, but {shown}: rename the column, or embed the audio")
    text = text_column or next((name for name in TEXT_COLUMNS if name in schema.names), None)
    if text is None or text not in schema.names or not _is_text(schema.field(text).type):
        wanted = f"no column {text!r} of text" if text else "no column of text with a usual name"
        raise UserError(f"{path}: {wanted}, but {shown}: name it with --text-column")
    kept = tuple(n for n in schema.names if n not in (_AUDIO, text) and _is_plain(schema.field(n).type))
    out, first = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        out.append(RowGroup(str(path), number, first, group.num_rows, group.total_byte_size, text, kept))
        first += group.num_rows
    return out


def _holds_audio(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    types = _pyarrow().types
    return types.is_string(kind) or types.is_large_string(kind)


def _is_plain(kind: Any) -> bool:
    """Whether values of an Arrow type can stand in a line of JSON."""
    types = _pyarrow().types
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):  # as the turns of a `history`
        return all(_is_plain(field.type) for field in kind)
    return _is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
