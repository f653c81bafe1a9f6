"""The arms of `aura-jax bench infer` that are not ours: `python benchmarks/peers/infer_worker.py`, spoken to by
`protocol`.

A Whisper of transformers or of CTranslate2 writes down what it hears, and an LLM of transformers or of llama.cpp
answers the text; or an LLM answers text alone; or our own export hears in torch.
"""

import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aura_jax.experiments.bench import protocol

_PACKAGES = ("torch", "transformers", "faster-whisper", "ctranslate2", "llama-cpp-python")
_RATE = 16000


class Arm:
    """One way to answer, from a case folder (see `aura_jax.experiments.bench.infer_case.write`)."""

    def prepare(self, what: str, directory: str, output: str, kind: str = "") -> dict[str, Any]:
        """Writes a Hugging Face directory in the format that a peer reads.

        Args:
          what: "gguf" or "ctranslate2".
          kind: of the GGUF file's matrices.
        """
        if what == "gguf":
            import gguf_file

            gguf_file.write(Path(directory), Path(output), kind)
        else:
            from ctranslate2.converters import TransformersConverter

            files = ["tokenizer.json", "preprocessor_config.json"]
            TransformersConverter(directory, copy_files=files).convert(output)
        return {}

    def load(self, case: str, hears: str | None, answers: str, **options: Any) -> dict[str, Any]:
        """Loads the models.

        Args:
          hears: "torch", "faster-whisper", or None: nothing, or the LLM itself does.
          answers: "torch", "llama.cpp" or "export".
          options: "directory" of what answers, "whisper" of what hears and its "compute_type".
        """
        folder = Path(case)
        about = json.loads((folder / "case.json").read_text())
        with np.load(folder / "clips.npz") as file:
            self._clips = dict(file)
        self._text, self._batch = about["text_ids"], about["batch"]
        self._most = about["max_new_tokens"]
        self._hears = None
        if hears is not None:
            self._hears = _HEARS[hears](Path(options["whisper"]), about, options.get("compute_type"))
        self._answers = _ANSWERS[answers](Path(options["directory"]), about)
        versions = {}
        for name in _PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        at_once = min(1 if one is None else one.at_once for one in (self._hears or self._answers, self._answers))
        return {
            "versions": versions,
            "batch": at_once,
            "weight_bytes": self._answers.weight_bytes,
        }

    def answer(self, clip: str, n_tokens: int) -> dict[str, Any]:
        """Returns the wall time from a clip (or the text) to the last of so many tokens of its answer."""
        return self._timed([clip], n_tokens)

    def batch(self, n_tokens: int) -> dict[str, Any]:
        """Returns the wall time until each clip of the batch has so many tokens of its answer."""
        return self._timed(self._batch, n_tokens)

    def _timed(self, clips: Sequence[str], n_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        answers = self._respond([self._clips.get(clip) for clip in clips], n_tokens)
        seconds = time.perf_counter() - start
        if [len(answer) for answer in answers] != [n_tokens] * len(clips):
            raise ValueError(f"answers of {[len(answer) for answer in answers]} tokens, not of {n_tokens}")
        return {"seconds": seconds}

    def _respond(self, clips: Sequence[Any], n_tokens: int) -> list[list[int]]:
        if isinstance(self._answers, _Export):
            return self._answers.tokens(clips, n_tokens, n_tokens)
        prompts = [self._text] * len(clips)
        if self._hears is not None:
            prompts = [self._answers.prompt(text) for text in self._hears.transcribe(clips)]
        return self._answers.tokens(prompts, n_tokens)

    def hear(self, clips: Sequence[str]) -> dict[str, Any]:
        """Returns what it writes down of each clip."""
        waveforms = [self._clips[clip] for clip in clips]
        if isinstance(self._answers, _Export):
            return {"texts": self._answers.texts(waveforms, self._most)}
        assert self._hears is not None
        size = self._hears.at_once
        parts = [waveforms[i : i + size] for i in range(0, len(waveforms), size)]
        return {"texts": [text for part in parts for text in self._hears.transcribe(part)]}


class _TorchWhisper:
    """transformers' Whisper, greedy, without timestamps."""

    def __init__(self, directory: Path, about: dict[str, Any], compute_type: str | None):
        import torch
        import transformers

        assert compute_type is None
        torch.set_num_threads(about["threads"])
        self.at_once = len(about["batch"])
        self._most, self._torch = about["transcript_tokens"], torch
        self._features = transformers.WhisperFeatureExtractor.from_pretrained(directory)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model.eval()

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        features = self._features(list(waveforms), sampling_rate=_RATE, return_tensors="pt").input_features
        with self._torch.no_grad():
            out = self._model.generate(features, max_new_tokens=self._most, do_sample=False, num_beams=1)
        return [text.strip() for text in self._tokenizer.batch_decode(out, skip_special_tokens=True)]


class _FasterWhisper:
    """CTranslate2's Whisper, greedy, without timestamps, one clip after another."""

    at_once = 1

    def __init__(self, directory: Path, about: dict[str, Any], compute_type: str | None):
        import faster_whisper

        self._most = about["transcript_tokens"]
        self._model = faster_whisper.WhisperModel(
            str(directory), device="cpu", compute_type=compute_type or "float32", cpu_threads=about["threads"]
        )

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for waveform in waveforms:
            segments, _ = self._model.transcribe(
                waveform,
                beam_size=1,
                temperature=0.0,
                without_timestamps=True,
                condition_on_previous_text=False,
                max_new_tokens=self._most,
            )
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return texts


class _TorchLLM:
    """An LLM of transformers, greedy."""

    def __init__(self, directory: Path, about: dict[str, Any]):
        import torch
        import transformers

        torch.set_num_threads(about["threads"])
        self.at_once = len(about["batch"])
        self._torch, self._pad = torch, about["stop_ids"][0]
        self._written = _Written(directory, about)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model.eval()
        self.weight_bytes = _weight_bytes(self._model)

    def prompt(self, text: str) -> list[int]:
        return self._written.prompt(text)

    def tokens(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        torch, longest = self._torch, max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, row_mask, prompt in zip(ids, mask, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt)
            row_mask[longest - len(prompt) :] = 1
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=self._pad,
            )
        return out[:, longest:].tolist()


class _LlamaCpp:
    """llama.cpp, greedy, one prompt after another; nothing of an earlier prompt is used again."""

    at_once = 1

    def __init__(self, directory: Path, about: dict[str, Any]):
        """`directory` is a GGUF file."""
        import llama_cpp

        self._written = _Written(Path(about["llm_dir"]), about)
        self._model: Any = llama_cpp.Llama(
            model_path=str(directory),
            n_ctx=about["context"],
            n_threads=about["threads"],
            n_threads_batch=about["threads"],
            verbose=False,
        )
        self.weight_bytes = directory.stat().st_size

    def prompt(self, text: str) -> list[int]:
        return self._written.prompt(text)

    def tokens(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        out = []
        for prompt in prompts:
            self._model.reset()
            written = self._model.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
            out.append([next(written) for _ in range(n_tokens)])
        return out


class _Export:
    """Our export in the format hf."""

    def __init__(self, directory: Path, about: dict[str, Any]):
        import torch
        from torch_exports import Exported

        torch.set_num_threads(about["threads"])
        self.at_once = len(about["batch"])
        self._stops, self._pad = set(about["stop_ids"]), about["stop_ids"][0]
        self._exported = Exported("hf", directory)
        self.weight_bytes = _weight_bytes(self._exported.model.language_model)

    def tokens(self, waveforms: Sequence[np.ndarray], least: int, most: int) -> list[list[int]]:
        inputs = self._exported.processor(audio=list(waveforms))
        out = self._exported.model.generate(**inputs, max_new_tokens=most, min_new_tokens=least, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def texts(self, waveforms: Sequence[np.ndarray], most: int) -> list[str]:
        parts = [waveforms[i : i + self.at_once] for i in range(0, len(waveforms), self.at_once)]
        rows = [row for part in parts for row in self.tokens(part, 0, most)]
        return [text.strip() for text in self._exported.processor.batch_decode(rows, skip_special_tokens=True)]


class _Written:
    """The prompt that asks for an answer to a transcript: the run's own template around it."""

    def __init__(self, directory: Path, about: dict[str, Any]):
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._before, self._after = about["before_ids"], about["after_ids"]

    def prompt(self, text: str) -> list[int]:
        return [*self._before, *self._tokenizer(text, add_special_tokens=False)["input_ids"], *self._after]


def _weight_bytes(model: Any) -> int:
    """Returns the bytes of the weights that a token's step reads: all but an embedding that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding or p is head)


_HEARS = {"torch": _TorchWhisper, "faster-whisper": _FasterWhisper}
_ANSWERS = {"torch": _TorchLLM, "llama.cpp": _LlamaCpp, "export": _Export}


if __name__ == "__main__":
    protocol.serve(Arm())
