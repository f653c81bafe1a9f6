"""Checks a manifest, or a folder of shards, and every clip in it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.audio.io import AudioError, audio_seconds, load_audio
from aura_jax.data import shards
from aura_jax.data.manifest import Row, load_manifest

_TOLERANCE = 0.1  # seconds that a manifest's 'seconds' may be off: buckets are chosen by it


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        n_rows, n_clips: lines, and those of them with audio.
        seconds: of all readable clips.
        problems: one line each: "manifest:line: what is wrong".
    """

    n_rows: int
    n_clips: int
    seconds: float
    problems: list[str]

    @property
    def summary(self) -> str:
        """The report in one line."""
        text = f"{self.n_rows} rows, {self.n_clips} clips, {self.seconds / 3600:.2f} hours"
        return f"{text}, {len(self.problems)} bad" if self.problems else f"{text}, all good"


def check(path: str | Path, *, decode: bool = False, n_threads: int = 8, progress: bool = True) -> Report:
    """Reads a manifest and opens every clip; of shards, compares each with its checksum too.

    Args:
        decode: decode the clips whole; otherwise read their headers only.
        progress: show a progress bar on standard error.

    Raises:
        UserError: as `load_manifest`, at the first line that is malformed, or shard that is missing or truncated.
    """
    rows = load_manifest(path)
    damage = shards.damage(path, progress=progress) if shards.is_shards(path) else []

    def measure(row: Row) -> float | str | None:
        if row.audio is None:
            return None
        try:
            seconds = len(load_audio(row.audio)) / SAMPLE_RATE if decode else audio_seconds(row.audio)
        except AudioError as error:
            return f"{row.where}: {error}"
        if row.seconds is not None and abs(seconds - row.seconds) > _TOLERANCE:
            return f"{row.where}: 'seconds' is {row.seconds:g}, but the clip has {seconds:.3f}: mend it or leave it out"
        return seconds

    with ThreadPoolExecutor(n_threads) as pool:
        found = list(tqdm(pool.map(measure, rows), str(path), len(rows), unit="row", disable=not progress))
    return Report(
        n_rows=len(rows),
        n_clips=sum(row.audio is not None for row in rows),
        seconds=sum(x for x in found if isinstance(x, float)),
        problems=damage + [x for x in found if isinstance(x, str)],
    )
