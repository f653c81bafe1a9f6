# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach a small LLM to hear
#
# Distils a Whisper encoder into the LoRA of a small LLM, then lets the LLM transcribe, with the encoder gone.
# With `SMOKE = True` (random tiny models, no download) it takes two to five minutes and 2 GiB on two CPU cores, and
# learns nothing: it shows that everything runs. With `SMOKE = False` it is the quickstart: real weights, real speech.
#
# Run it from the root of the repository, with `aura-jax` installed (`pip install -e .`).

# %%
import json
import os
from pathlib import Path

ROOT = Path.cwd() if Path("configs").is_dir() else Path.cwd().parent
os.chdir(ROOT)
SMOKE = True

# %%
from aura_jax import checkpoint, config
from aura_jax.train import loop

name = "smoke" if SMOKE else "quickstart"
settings = config.load([f"--config=configs/{name}.py"])
workdir = Path(os.environ.get("AURA_JAX_WORKDIR", f"runs/notebook-{name}"))
result = loop.train(settings, workdir)
print(f"{result.step} steps")

# %% [markdown]
# ## How it learned

# %%
import matplotlib.pyplot as plt

rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
figure, axis = plt.subplots(figsize=(7, 3.5))
for key in ("loss/distill", "loss/lm", "loss/text_anchor"):
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axis.plot(*zip(*points, strict=True), label=key.removeprefix("loss/"))
axis.set(xlabel="step", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# ## What it hears now: speech straight into the LLM

# %%
from IPython.display import Audio, display

from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.infer.generate import Generator, Request

generator = Generator(*checkpoint.load_for_inference(workdir))
heard = load_manifest("sample_data/commands/test_new_voices.jsonl")[:3]
waveforms = [load_audio(row.audio) for row in heard]
for row, waveform, reply in zip(heard, waveforms, generator.generate([Request(w) for w in waveforms]), strict=True):
    display(Audio(waveform, rate=16000))
    print(f"said:  {row.text}\nheard: {reply.text}\n")
