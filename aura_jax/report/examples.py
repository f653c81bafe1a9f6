"""The worst and the best utterances of every test set, with what was heard."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

from aura_jax.audio import features
from aura_jax.audio.io import AudioError, load_audio
from aura_jax.data.manifest import Row, load_manifest
from aura_jax.errors import UserError
from aura_jax.evaluate.score import word_errors

WORST, BEST = 2, 1  # of each set


def choose(transcripts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Returns the utterances of each set with the most word errors for their length, and the longest without any.

    Args:
      transcripts: {set: [{"id", "reference", "hypothesis"}, ...]}, as `transcripts.json` holds them.

    Returns:
      [{"set", "id", "kind": "worst" or "best", "errors", "words", "reference", "hypothesis"}, ...]; a set without
      errors has no worst, one without a perfect transcript no best.
    """
    out = []
    for name, outputs in transcripts.items():
        scored = []
        for output in outputs:
            errors, words = word_errors(output["reference"], output["hypothesis"])
            scored.append({"set": name, **output, "errors": errors, "words": words})
        wrong = [one for one in scored if one["errors"]]
        right = [one for one in scored if not one["errors"]]
        wrong.sort(key=lambda one: (-one["errors"] / max(one["words"], 1), -one["errors"]))
        right.sort(key=lambda one: -one["words"])
        out += [{"kind": "worst", **one} for one in wrong[:WORST]] + [{"kind": "best", **one} for one in right[:BEST]]
    return out


def with_audio(
    chosen: Sequence[Mapping[str, Any]], manifests: Mapping[str, str | Path], n_mels: int, normalisation: str
) -> list[dict[str, Any]]:
    """Returns the examples with "seconds", "audio" (FLAC in base64), "mel" (log-mel [F, M]) and "problem".

    Whatever vanished or broke since the run is a "problem" of its example, and the others are None there.

    Args:
      manifests: {set: manifest} that the utterances are from.
      n_mels, normalisation: of the log-mel that the student hears.
    """
    rows: dict[str, dict[str, Row] | str] = {}
    for name in {one["set"] for one in chosen}:
        try:
            if name not in manifests:
                raise UserError(f"the run's eval.sets names no {name!r}")
            rows[name] = {row.id: row for row in load_manifest(manifests[name])}
        except UserError as error:
            rows[name] = str(error)
    out = []
    for one in chosen:
        found = rows[one["set"]]
        waveform_S, problem = None, found if isinstance(found, str) else None
        if not isinstance(found, str):
            row = found.get(one["id"])
            try:
                if row is None or row.audio is None:
                    raise UserError(f"{manifests[one['set']]}: no clip with the id {one['id']!r} any more")
                waveform_S = load_audio(row.audio)
            except (AudioError, UserError) as error:
                problem = str(error)
        if waveform_S is None:
            out.append({**one, "seconds": None, "audio": None, "mel": None, "problem": problem})
            continue
        out.append(
            {
                **one,
                "seconds": len(waveform_S) / features.SAMPLE_RATE,
                "audio": {"mime": "audio/flac", "base64": _flac(waveform_S)},
                "mel": _log_mel(waveform_S, n_mels, normalisation),
                "problem": None,
            }
        )
    return out


def _flac(waveform_S: np.ndarray) -> str:
    out = io.BytesIO()
    soundfile.write(out, waveform_S, features.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return base64.b64encode(out.getvalue()).decode("ascii")


def _log_mel(waveform_S: np.ndarray, n_mels: int, normalisation: str) -> list[list[float]]:
    # Whole seconds: few shapes to compile.
    padding = -len(waveform_S) % features.SAMPLE_RATE
    padded_1xS, n_samples_1 = np.pad(waveform_S, (0, padding))[None], np.array([len(waveform_S)])
    mel_1xFxM = features.log_mel(padded_1xS, n_mels, n_samples_B=n_samples_1, normalisation=normalisation)
    return np.asarray(jax.device_get(mel_1xFxM))[0, : features.n_frames(len(waveform_S))].round(3).tolist()
