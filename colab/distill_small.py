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
# SmolLM2-135M reads and writes text. Whisper tiny.en hears. Here the first learns to hear from the second: its early
# blocks are trained until their states tell what the encoder's states tell. Then the encoder is thrown away, and
# speech goes straight into the language model.
#
# You will train it, watch it learn, listen to what it hears, score it on voices and sentences it never met, look inside
# it, and take it to PyTorch.
#
# | runtime | takes | memory |
# |---|---|---|
# | two CPU cores | 27 minutes, 22 of them training | 5.5 GiB |
# | T4 GPU | 10 to 15 minutes (an estimate, not measured) | 5 GiB of the GPU's (an estimate, not measured) |
# | v5e-1 TPU | 10 to 15 minutes (an estimate, not measured) | 5 GiB of the TPU's (an estimate, not measured) |
#
# On Colab, *Runtime → Change runtime type* chooses one, and *Runtime → Run all* does the rest.

# %% [markdown]
# ## Install
#
# On Colab this takes a few minutes; if Colab asks to restart the runtime, agree, and run the cell once more. Where
# `aura_jax` is installed already, nothing happens.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/aura-jax/aura_jax"

if importlib.util.find_spec("aura_jax") is None:
    gpu, tpu = Path("/dev/nvidia0").exists(), os.environ.get("COLAB_TPU_1VM") == "1"
    extras = "torch,cuda12" if gpu else "torch,tpu" if tpu else "torch"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "aura-jax"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--editable", f"./aura-jax[{extras}]"], check=True)
    sys.path.insert(0, str(Path("aura-jax").resolve()))

# %%
import warnings

import aura_jax
from aura_jax import cache

os.chdir(Path(aura_jax.__file__).parents[1])  # where configs/ and sample_data/ are
cache.keep_compiled_programs()  # what ran once starts faster the next time
os.environ.update(TQDM_POSITION="0", TQDM_MININTERVAL="1")  # a progress bar keeps to its line
# Of tqdm, where there are no widgets, and of PEFT: nothing to mend here.
warnings.filterwarnings("ignore", "IProgress not found|`is_gradient_checkpointing` is deprecated")

# %%
# The project's tests set these, to run every cell in a minute. There is nothing to change here.
CONFIG = os.environ.get("AURA_JAX_CONFIG", "configs/quickstart.py")
WORKDIR = Path(os.environ.get("AURA_JAX_WORKDIR", "runs/colab"))

# %% [markdown]
# ## The machine, and settings that fit it
#
# `configs/quickstart.py` is the recipe. On a CPU and on a TPU, products with the LLM's frozen weights are computed in
# bfloat16, and everything else in float32. A T4 has no bfloat16 units, so there everything is float32. A GPU or a TPU
# takes twice the batch in half the steps: as many clips, and fewer shapes to compile.

# %%
import jax

from aura_jax import config

settings = config.load([f"--config={CONFIG}"])
device = jax.devices()[0]

if device.platform != "cpu":
    settings.data.batch_size, settings.data.buckets = 16, (2.16, 3.84)
    settings.train.stages.distil.steps, settings.train.stages.joint.steps = 300, 250
if device.platform == "gpu" and float(device.compute_capability) < 8:
    settings.model.matmul_dtype = "float32"

print(f"{device.device_kind}: {config.total_steps(settings)} steps of {settings.data.batch_size} clips")

# %% [markdown]
# ## What it learns from
#
# 1,452 spoken commands in 22 voices, and 341 recordings of one speaker: an hour of speech, each clip with its
# transcript. The picture is what the model gets to see of a clip: time to the right, pitch upwards, light where it is
# loud.

# %%
from IPython.display import display

from aura_jax.data.manifest import load_manifest
from aura_jax.report import notebook

for row in load_manifest("sample_data/commands/train.jsonl")[:2]:
    display(notebook.clip(row.audio, row.text, title=row.extra["voice"]))

# %% [markdown]
# ## Train
#
# There are two stages. In *distil* the language model listens and says nothing: four of its blocks learn to point where
# the encoder's blocks point (the loss is one minus the cosine). In *joint* it also learns to write down what it heard,
# and a few rows of plain text a step hold it where it was on text.
#
# *Stop* saves before it stops, and running the cell again goes on from there.

# %%
from aura_jax.train import loop

with notebook.live_curves(settings, WORKDIR):
    result = loop.train(settings, WORKDIR)
print(f"{result.step} steps in {result.seconds / 60:.1f} minutes")

# %% [markdown]
# ## Listen
#
# Three clips of voices that it never heard. What went in is the sound alone: no transcript, no encoder, no prompt.
# A word that it missed is struck out, what it heard instead is underlined.

# %%
from aura_jax import checkpoint
from aura_jax.audio.io import load_audio
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

built, variables = checkpoint.load_for_inference(WORKDIR)
generator = Generator(built, variables)
rows = load_manifest("sample_data/commands/test_new_voices.jsonl")[:3]
requests = [Request(load_audio(row.audio)) for row in rows]
for row, reply in zip(rows, generator.generate(requests), strict=True):
    display(notebook.clip(row.audio, row.text, reply.text, title=row.extra["voice"]))

# %% [markdown]
# ## Score
#
# Every clip of every test set is transcribed. WER counts wrong, missing and additional words for every hundred that
# were said, with its 95% interval; *exact* are clips without a mistake. New voices and new sentences of the commands
# should be nearly right. The recordings are open English, of which it heard fourteen minutes: there it is lost, and
# WER is about 100 or above. The last lines say what hearing cost the language model as a reader of text.

# %%
from aura_jax.evaluate import score, suite

scores, transcripts = suite.score_run(WORKDIR)
print(score.table(scores["sets"]))
if "text" in scores:
    print(suite.text_lines(scores))

# %% [markdown]
# The worst and the best of the first set:

# %%
from aura_jax.report import examples

name, manifest = next(iter(settings.eval.sets.items()))
clips = {row.id: row.audio for row in load_manifest(manifest)}
for one in examples.choose({name: transcripts[name]}):
    display(notebook.clip(clips[one["id"]], one["reference"], one["hypothesis"], title=one["kind"]))

# %% [markdown]
# ## Look inside
#
# The report is one page with everything above and more. Two of its figures:

# %%
from IPython.display import Image

from aura_jax.report.run import report_run

page = report_run(WORKDIR)
print(page)
display(Image(page.parent / "figures" / "cosine.png", width=840))

# %% [markdown]
# Each row is a pair of blocks that was taught. Before training the language model's state has nothing to do with the
# encoder's. Afterwards they point the same way: what the encoder knew of the speech, the language model knows.

# %%
display(Image(page.parent / "figures" / "cka-maps.png", width=840))

# %% [markdown]
# The same for all pairs of blocks, taught (outlined) or not, by a measure that needs no head between them (CKA). Light
# is alike. The blocks on the left learned to see speech as the encoder does; those on the right were never touched.

# %% [markdown]
# ## Take it to PyTorch
#
# The export is a PEFT adapter for the untouched SmolLM2, the audio embedder, and readable torch sources that need
# nothing of this package.

# %%
import shutil

from aura_jax.exchange.export import export_run

shutil.rmtree(WORKDIR / "peft", ignore_errors=True)
export = export_run(WORKDIR, WORKDIR / "peft", "peft")
for path in sorted(export.iterdir()):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

sys.path.insert(0, str(export))
from audio_embedder import AudioEmbedder, generate

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(built.llm_dir), export)
embedder = AudioEmbedder.from_pretrained(export)
processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)

# %% [markdown]
# The three clips from above, once more in JAX and in PyTorch, both in float32:

# %%
import dataclasses

plain = dataclasses.replace(built, model=built.model.clone(matmul_dtype=None))
with jax.default_matmul_precision("highest"):
    in_jax = [reply.text for reply in Generator(plain, variables).generate(requests)]

inputs = processor(audio=[request.waveform for request in requests])
tokens = generate(model, embedder, inputs, max_new_tokens=settings.eval.max_new_tokens)
in_torch = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

display(notebook.table(("JAX", "PyTorch"), list(zip(in_jax, in_torch, strict=True))))
print("the same words" if in_jax == in_torch else "they differ")

# %% [markdown]
# ## Where to go
#
# * Your own recordings: [`own_data.ipynb`](own_data.ipynb).
# * The other formats, and how exactly they agree: [`port_to_pytorch.ipynb`](port_to_pytorch.ipynb).
# * The whole experiment in one page: `configs/quickstart.py`. Change it, and run this again with another `WORKDIR`.
