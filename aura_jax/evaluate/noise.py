"""Sets heard in noise. The noise of a row is the same in every run; only its size depends on the ratio asked for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aura_jax.audio.io import load_audio
from aura_jax.audio.noise import babble, mix, white
from aura_jax.config import Config
from aura_jax.data.manifest import Row
from aura_jax.errors import UserError
from aura_jax.evaluate.score import table

N_TALKERS = 6  # of a babble, where the set has so many other clips
_FEWEST = 2


class Noise:
    """Puts noise into the clips of a set, by row.

    Attributes:
      rows: those of the set that have audio.
    """

    def __init__(self, kind: str, rows: Sequence[Row], *, name: str, seed: int = 0):
        """
        Args:
          kind: "white" or "babble": the sum of up to `N_TALKERS` other clips of the set, of other voices if the row
            has a `voice`.
          rows: of the set.
          name: of the set, for errors.
          seed: a row's noise depends on this, the row's id and the kind alone, and the babble on the set's other rows.

        Raises:
          UserError: no row has audio, or some row has too few others for a babble.
        """
        self.rows = [row for row in rows if row.audio is not None]
        if not self.rows:
            raise UserError(f"eval.noise: the set {name!r} has no audio to put noise into: leave it out")
        self._kind, self._seed = kind, seed
        # Each clip once, by id: a manifest may be in any order.
        clips = {str(row.audio): _voice(row) for row in sorted(self.rows, key=lambda row: (row.id, str(row.audio)))}
        self._clips = list(clips)
        self._number = {audio: i for i, audio in enumerate(clips)}
        self._voices = {voice: i for i, voice in enumerate(sorted({"", *clips.values()}))}  # "": unknown, 0
        self._voice_N = np.array([self._voices[voice] for voice in clips.values()])
        if kind == "babble":
            for row in self.rows:
                n = len(self._talkers(row))
                if n < _FEWEST:
                    whose = f" of other voices than {_voice(row)!r}" if _voice(row) else ""
                    raise UserError(
                        f"eval.noise: {row.where}: {n} other clips{whose} in the set {name!r}, and a babble needs "
                        f"{_FEWEST}: leave the set out of eval.noise.sets, or babble out of eval.noise.kinds"
                    )

    def _talkers(self, row: Row) -> np.ndarray:
        """Returns the numbers of the clips that may be heard behind a row."""
        others_N = np.ones(len(self._clips), bool)
        voice = self._voices[_voice(row)]
        if voice:
            others_N = (self._voice_N != voice) & (self._voice_N != 0)
        others_N[self._number[str(row.audio)]] = False
        return np.flatnonzero(others_N)

    def of(self, row: Row, n_samples: int) -> np.ndarray:
        """Returns the noise of a row, float32 [n_samples]."""
        what = json.dumps([self._seed, row.id, self._kind]).encode()
        random = np.random.default_rng(int.from_bytes(hashlib.sha256(what).digest()))
        if self._kind == "white":
            return white(n_samples, random)
        others = self._talkers(row)
        chosen = random.choice(others, min(N_TALKERS, len(others)), replace=False)
        clips = [load_audio(self._clips[i]) for i in chosen]
        try:
            return babble(clips, n_samples, random)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None

    def at(self, snr_db: float) -> Any:
        """Returns a function (row, clip) -> the clip in this noise, for `run.evaluate_set`."""
        return lambda row, clip_S: mix(clip_S, self.of(row, len(clip_S)), snr_db)


def _voice(row: Row) -> str:
    voice = row.extra.get("voice")
    return "" if voice is None else str(voice)


def noises(config: Config, sets: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Noise]]:
    """Returns {set: {kind: noise}} of the sets and kinds of noise that `eval.noise` names.

    Raises:
      UserError: as `Noise`.
    """
    c = config.eval.noise
    names = (c.sets or tuple(sets)) if c.kinds else ()
    return {name: {kind: Noise(kind, sets[name], name=name) for kind in c.kinds} for name in names}


def noise_table(scores: Mapping[str, Mapping[str, Any]], noise: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Returns the scores in noise as a plain-text table, below those of each set without noise.

    Args:
      scores: {set: scores}.
      noise: {set: {kind: {dB: scores}}}.
    """
    lines = {}
    for name, kinds in noise.items():
        lines[f"{name}, clean"] = scores[name]
        lines |= {f"{name}, {kind} {db} dB": one for kind, of_kind in kinds.items() for db, one in of_kind.items()}
    return table(lines)
