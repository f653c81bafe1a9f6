"""Exports of aura-jax in torch, as their model cards say: logits and greedy text of spoken requests.

Tests and `benchmarks/interop.py` compare them with the run that was exported.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import ArrayLike


class Exported:
    """An export, loaded.

    Args:
      format: "peft", "hf" or "merged".
      base: the untouched LLM's directory, for "peft".
    """

    def __init__(self, format: str, directory: Path, base: Path | None = None, dtype: torch.dtype = torch.float32):
        auto = transformers.AutoModelForCausalLM
        self.processor: Any = transformers.AutoProcessor.from_pretrained(directory, trust_remote_code=True)
        self.model: Any
        self._parts: Any = None
        if format == "hf":
            self.model = auto.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
        else:
            self.model = auto.from_pretrained(base if format == "peft" else directory, dtype=dtype)
            self._parts = _module(directory / "audio_embedder.py")
            self._embedder = self._parts.AudioEmbedder.from_pretrained(directory).to(dtype)
        if format == "peft":
            self.model = peft.PeftModel.from_pretrained(self.model, directory)
        self.model.eval()

    @torch.no_grad()
    def logits(self, waveform: ArrayLike) -> np.ndarray:
        """Returns the logits [T, V] at every column of the prompt with one clip in it, in float32."""
        inputs = self.processor(audio=waveform)
        if self._parts is None:
            return self.model(**inputs).logits[0].float().numpy()
        n_frames, is_audio = inputs["n_frames"], inputs["audio_token_mask"]
        audio = self._embedder(inputs["input_features"], n_frames)
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        embeds = self._parts.insert_audio(embeds, is_audio, audio, self._embedder.n_tokens(n_frames))
        c = self._embedder.audio_config
        mask = self._parts.attention_mask_4d(inputs["attention_mask"], is_audio, c["mask"], c["chunk"], embeds.dtype)
        return self.model(inputs_embeds=embeds, attention_mask=mask).logits[0].float().numpy()

    def tokens(self, waveforms: Sequence[np.ndarray], max_new_tokens: int) -> list[list[int]]:
        """Returns the greedy answer to each clip, without the token that ended it."""
        inputs = self.processor(audio=list(waveforms))
        if self._parts is None:
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            out = out[:, inputs["input_ids"].shape[1] :]
        else:
            out = self._parts.generate(self.model, self._embedder, inputs, max_new_tokens=max_new_tokens)
        stops = set(self.processor.stop_ids)
        return [row[: next((i for i, t in enumerate(row) if t in stops), len(row))] for row in out.tolist()]


def _module(file: Path) -> Any:
    """Imports the Python file of an export."""
    spec = importlib.util.spec_from_file_location(f"export_{abs(hash(str(file)))}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
