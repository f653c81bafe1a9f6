"""Kokoro-82M: text to speech in 28 English voices, by ONNX Runtime on this machine's cores."""

import json
from collections.abc import Sequence

import numpy as np
import safetensors.numpy
import soxr

from aura_jax import assets
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.errors import UserError
from aura_jax.synthesis.pronounce import Lexicon, Unspoken

MODEL = "kokoro-82m-int8-wheel"
TEST_VOICES = ("af_bella", "af_nova", "am_michael")
"""Voices of `sample_data`'s tests of new voices: not to be trained on."""

_ACCENTS = ("american", "british")
_RATE = 24000
_LONGEST = 510  # phonemes
_SILENCE, _MARGIN = 0.01, 0.08  # of the loudest sample; seconds that are kept of what is below


class Kokoro:
    """Says English texts.

    Attributes:
      model: what a clip depends on beside its text, voice and speed.
      voices: their names, sorted; the first letter is the accent, "a" American or "b" British.
    """

    model = MODEL

    def __init__(self):
        """Fetches the model when needed.

        Raises:
          UserError: ONNX Runtime is not installed, or the model cannot be fetched.
        """
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]
        except ImportError:
            mend = 'pip install "aura_jax[synthesize]"'
            raise UserError(f"data synthesize needs a package that is not installed: {mend}") from None
        folder = assets.fetch(MODEL)
        read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))
        self._ids = read("vocabulary.json")
        self._lexicons = {accent[0]: Lexicon(read(f"{accent}.json"), accent == "british") for accent in _ACCENTS}
        self._styles = safetensors.numpy.load_file(folder / "voices.safetensors")
        self.voices: Sequence[str] = sorted(self._styles)
        options = onnxruntime.SessionOptions()
        # One clip a core is faster than one clip on all cores, and says the same on any number of them.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])

    def check(self, text: str) -> None:
        """Raises Unspoken unless every voice can say `text`: voices must not choose the texts."""
        for accent in self._lexicons:
            self._phonemes(text, accent)

    def speak(self, text: str, voice: str, speed: float) -> np.ndarray:
        """Returns float32 [samples] at 16 kHz, silence at either end cut to 0.08 s. Several threads may call it.

        Args:
          speed: 1 is the voice's own; above it is faster.

        Raises:
          Unspoken: as `check`.
        """
        phonemes = self._phonemes(text, voice[0])
        tokens_1xT = np.array([[0, *(self._ids[phoneme] for phoneme in phonemes), 0]])
        style_1xD = self._styles[voice][None, len(phonemes) - 1]
        inputs = {"tokens": tokens_1xT, "style": style_1xD, "speed": np.array([speed], np.float32)}
        waveform_S = np.asarray(self._session.run(None, inputs)[0])
        return soxr.resample(_trim(waveform_S), _RATE, SAMPLE_RATE, quality="HQ")

    def _phonemes(self, text: str, accent: str) -> str:
        phonemes = self._lexicons[accent].phonemes(text)
        unknown = sorted(set(phonemes) - self._ids.keys())
        if unknown or len(phonemes) > _LONGEST:
            raise Unspoken(f"phonemes unknown to the model: {unknown}" if unknown else f"over {_LONGEST} phonemes")
        return phonemes


def _trim(waveform_S: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(waveform_S) > _SILENCE * np.abs(waveform_S).max())
    margin = round(_MARGIN * _RATE)
    return waveform_S[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else waveform_S
