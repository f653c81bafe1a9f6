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
# # Teach a small LLM to hear your recordings
#
# From a folder of recordings and a CSV with their transcripts to an adapter that transcribes them. Without a folder of
# your own, a demonstration runs: 341 telephone prompts, fourteen minutes of one speaker.
#
# | runtime | the demonstration takes | memory |
# |---|---|---|
# | two CPU cores | 22 minutes | 5.5 GiB |
# | T4 GPU | about 10 minutes (an estimate, not measured) | 5 GiB of the GPU's (an estimate, not measured) |
# | v5e-1 TPU | about 10 minutes (an estimate, not measured) | 5 GiB of the TPU's (an estimate, not measured) |
#
# Time grows with the hours of speech; memory grows with the longest clip.

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
CONFIG = os.environ.get("AURA_JAX_CONFIG", "configs/own_speech.py")
WORKDIR = Path(os.environ.get("AURA_JAX_WORKDIR", "runs/own"))

# %% [markdown]
# ## Your folder
#
# Put the recordings (WAV, FLAC, Ogg, MP3; any rate) into a folder, and beside them `transcripts.csv`, which begins with
# the line `file,text`. Further columns, such as `speaker`, are kept. Write the folder's name below. On Colab, drag the
# folder into the files on the left, or mount your Drive:
# `from google.colab import drive; drive.mount("/content/drive")`.

# %%
FOLDER = ""  # such as "/content/drive/MyDrive/recordings"

# %%
import csv
import shutil

from aura_jax.data.manifest import load_manifest

folder = Path(FOLDER) if FOLDER else WORKDIR.with_name("demonstration")
if not FOLDER:
    shutil.copytree("sample_data/recordings/train", folder, dirs_exist_ok=True)
    with open(folder / "transcripts.csv", "w", newline="", encoding="utf-8") as file:
        rows = load_manifest("sample_data/recordings/train.jsonl")
        csv.writer(file).writerows([("file", "text"), *((Path(row.audio).name, row.text) for row in rows)])

print((folder / "transcripts.csv").read_text(encoding="utf-8")[:300])

# %% [markdown]
# ## Check it
#
# Training reads a manifest: a JSON object a line. Every clip is decoded once, and whatever is wrong is named, line by
# line: mend or delete these lines of the CSV before you go on. `aura-jax data validate --decode` does the same.

# %%
import json

from aura_jax.data import validate

data = WORKDIR.with_name(f"{WORKDIR.name}-data")
data.mkdir(parents=True, exist_ok=True)


def write_manifest(name, lines):
    path = data / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


with open(folder / "transcripts.csv", newline="", encoding="utf-8-sig") as file:
    lines = [{"audio": str((folder / line["file"]).resolve()), **line} for line in csv.DictReader(file)]

everything = write_manifest("all", lines)
report = validate.check(everything, decode=True)
print(report.summary)
for problem in report.problems:
    print(problem)

# %% [markdown]
# ## Look and listen
#
# Many short clips and a few long ones are usual.

# %%
import numpy as np
from IPython.display import display

from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.data.manifest import clip_samples
from aura_jax.report import notebook

rows = load_manifest(everything)
seconds = np.array(clip_samples(rows)) / SAMPLE_RATE
display(notebook.durations(seconds))
print(f"half of the clips are shorter than {np.median(seconds):.1f} s, the longest has {seconds.max():.1f} s")

# %%
for i in np.argsort(seconds)[[len(rows) // 2, -len(rows) // 10]]:
    display(notebook.clip(rows[i].audio, rows[i].text))

# %% [markdown]
# ## Leave out what is too long
#
# The longest clip sets the memory that training needs, and attention grows with its square. The recipe in
# `configs/own_speech.py` stops at 15 s; raise `settings.data.max_seconds` if many of yours are longer.

# %%
from aura_jax import config

settings = config.load([f"--config={CONFIG}"])
fits = seconds <= settings.data.max_seconds
lines, seconds = [line for line, fit in zip(lines, fits, strict=True) if fit], seconds[fits]
print(f"{len(lines)} of {len(fits)} clips have at most {settings.data.max_seconds:g} s")

# %% [markdown]
# ## Split
#
# A tenth is for testing, a tenth for validation, and the rest trains. Which tenth a clip is in depends on its value of
# `KEY` alone. So the same sentence is never on both sides, and clips that are added later move none of the others. If
# several people speak, use `KEY = "speaker"`: then the test says how well it hears somebody new.

# %%
import zlib

KEY = "text"


def part_of(line):
    place = zlib.crc32(line[KEY].strip().lower().encode()) % 10
    return {0: "test", 1: "validation"}.get(place, "train")


parts = {name: [line for line in lines if part_of(line) == name] for name in ("train", "validation", "test")}
for name, part in parts.items():
    print(f"{name:12}{len(part):5} clips")

held_in = [{**line, "part": name} for name in ("train", "validation") for line in parts[name]]
train, test = write_manifest("train", held_in), write_manifest("test", parts["test"])
some = write_manifest("some", parts["train"][: len(parts["test"])])

# %% [markdown]
# ## Buckets
#
# All clips of a batch are padded to the length of its bucket, and every bucket is a program to compile. Four will do:
# most clips go into the small ones, and the few long ones do not make the others wait.

# %%
slowest = min(settings.data.speeds)  # clips are also heard slowed down, and are longer then
edges = np.quantile(seconds, (0.5, 0.8, 0.95, 1.0)) / slowest
buckets = tuple(sorted({float(np.ceil(edge * 12.5) / 12.5) for edge in edges}))
settings.data.buckets = buckets

display(notebook.durations(seconds, buckets))
padded = np.array(buckets)[np.searchsorted(buckets, seconds)]
print(f"{1 - seconds.sum() / padded.sum():.0%} of what is computed is padding")

# %% [markdown]
# ## Settings
#
# The recipe is that of the quickstart. Each stage takes three passes over the data, and 300 steps at least. A GPU or a
# TPU takes twice the batch. On a T4, which has no bfloat16 units, everything is float32.

# %%
import jax

device = jax.devices()[0]
if device.platform != "cpu":
    settings.data.batch_size = 16
if device.platform == "gpu" and float(device.compute_capability) < 8:
    settings.model.matmul_dtype = "float32"

steps = max(300, 3 * len(parts["train"]) // settings.data.batch_size)
settings.train.stages.distil.steps = settings.train.stages.joint.steps = steps
settings.data.train = ((str(train), 1.0),)
settings.data.update(validation_key="part", validation_values=("validation",))
settings.eval.sets = {"trained on": str(some), "never heard": str(test)}

print(f"{device.device_kind}: {config.total_steps(settings)} steps of {settings.data.batch_size} clips")

# %% [markdown]
# ## Before
#
# What the language model makes of sound before it has learned anything. Its guesses have nothing to do with what was
# said.

# %%
from aura_jax import checkpoint, system
from aura_jax.evaluate.run import evaluate_sets
from aura_jax.infer.generate import Generator

mesh = checkpoint.system_mesh(settings)
built = system.build(settings)
with jax.set_mesh(mesh):
    untrained = Generator(built, system.initial_variables(built, mesh))
    before, heard_before = evaluate_sets(untrained, settings.eval.sets, settings)
del untrained

# %% [markdown]
# ## Train
#
# *Stop* saves before it stops, and running the cell again goes on from there.

# %%
from aura_jax.train import loop

with notebook.live_curves(settings, WORKDIR):
    result = loop.train(settings, WORKDIR)
print(f"{result.step} steps in {result.seconds / 60:.1f} minutes")

# %% [markdown]
# ## After

# %%
from aura_jax.evaluate import suite

scores, heard = suite.score_run(WORKDIR)
percent = lambda wer: f"{100 * wer['value']:.0f} ({100 * wer['low']:.0f} to {100 * wer['high']:.0f})"
rows = [(name, s["n"], percent(before[name]["wer"]), percent(s["wer"])) for name, s in scores["sets"].items()]
display(notebook.table(("clips", "how many", "WER % before", "WER % after"), rows))
if "text" in scores:
    print(suite.text_lines(scores))

# %% [markdown]
# The two rows tell different things. Clips that it was trained on get better first: it learns them by heart. Clips that
# it never heard follow with the hours of speech. Fourteen minutes, as in the demonstration, are too little for them;
# an hour of a small vocabulary, as in `distill_small.ipynb`, is enough. The lines below the table say what hearing cost
# the language model as a reader of text.

# %%
rows = [
    (first["reference"], first["hypothesis"], then["hypothesis"])
    for name in heard
    for first, then in list(zip(heard_before[name], heard[name], strict=True))[:3]
]
display(notebook.table(("said", "heard before", "heard after"), rows))

# %% [markdown]
# ## Keep it
#
# The adapter, the audio embedder and what PyTorch needs to use them, in one file. `port_to_pytorch.ipynb` loads it, and
# shows the other formats. On Colab, `from google.colab import files; files.download(str(archive))` brings it home.

# %%
from aura_jax.exchange.export import export_run

shutil.rmtree(WORKDIR / "peft", ignore_errors=True)
export = export_run(WORKDIR, WORKDIR / "peft", "peft")
shutil.make_archive(str(export), "zip", export)
archive = export.with_suffix(".zip")
print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB")

# %% [markdown]
# ## Where to go
#
# * More speech helps more than anything else. Add lines to the CSV, choose another `WORKDIR`, and run all again.
# * A response instead of the transcript: name that column of the CSV `response`, and the question's words, if there are
#   any beside the sound, `prompt`.
# * The same from the command line: `aura-jax train --config=configs/own_speech.py --workdir runs/mine` with the keys
#   above, such as `--config.data.buckets='(1.6, 3.6, 12.0)'`.
