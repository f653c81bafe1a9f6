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
# # From JAX to PyTorch
#
# A trained run becomes a folder that PyTorch loads, in three formats. This notebook writes each, loads it, and holds
# its numbers beside those of JAX. It takes the run of `distill_small.ipynb` if there is one, and else trains a very
# short one: what is compared is the arithmetic, not how well it hears.
#
# | runtime | takes | memory |
# |---|---|---|
# | two CPU cores | half a minute; without a run at hand, some minutes more to train one | 4.5 GiB |
# | T4 GPU | about 3 minutes, 3 more to train (an estimate, not measured) | 4 GiB of the GPU's (an estimate) |
# | v5e-1 TPU | about 3 minutes, 3 more to train (an estimate, not measured) | 4 GiB of the TPU's (an estimate) |

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
finished = Path("runs/colab/scores.json").exists()
WORKDIR = Path(os.environ.get("AURA_JAX_WORKDIR", "runs/colab" if finished else "runs/short"))

# %% [markdown]
# ## A run

# %%
import jax

from aura_jax import config
from aura_jax.report import notebook
from aura_jax.train import loop

if not (WORKDIR / "checkpoints").exists():
    settings = config.load([f"--config={CONFIG}"])
    settings.train.stages.distil.steps = settings.train.stages.joint.steps = 30
    settings.data.buckets, settings.teacher.precompute, settings.lora.text_energy = (3.84,), False, 1.0
    with notebook.live_curves(settings, WORKDIR):
        loop.train(settings, WORKDIR)

# %% [markdown]
# ## What JAX says
#
# Training may have multiplied in bfloat16. Here everything is float32, so that a difference means something.

# %%
import dataclasses

from aura_jax import checkpoint

jax.config.update("jax_default_matmul_precision", "highest")
built, variables = checkpoint.load_for_inference(WORKDIR)
built = dataclasses.replace(built, model=built.model.clone(matmul_dtype=None))

# %% [markdown]
# The answers to three clips, decoded greedily with a KV cache:

# %%
from IPython.display import display

from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request

N_NEW = 24  # tokens, at most

rows = load_manifest("sample_data/commands/test_new_voices.jsonl")[:3]
waveforms = [load_audio(row.audio) for row in rows]
replies = Generator(built, variables, max_new_tokens=N_NEW).generate([Request(w) for w in waveforms])
texts = [reply.text for reply in replies]
for row, text in zip(rows, texts, strict=True):
    display(notebook.clip(row.audio, row.text, text))

# %% [markdown]
# And the logits of every token of the vocabulary, at every column of a prompt with a clip in it:

# %%
import numpy as np

logits = Generator(built, variables).prompt_logits(Request(waveforms[0]))
print(f"{logits.shape[0]} columns, {logits.shape[1]} tokens of the vocabulary")

# %% [markdown]
# ## peft: an adapter for the untouched base
#
# LoRA as PEFT writes it, and the audio embedder beside it. The base stays where it is. This is the smallest format, and
# the one for going on with PyTorch's tools.

# %%
import shutil

from aura_jax.exchange.export import export_run


def export_as(format, **options):
    folder = WORKDIR / f"export-{format}"
    shutil.rmtree(folder, ignore_errors=True)
    return export_run(WORKDIR, folder, format, **options)


as_peft = export_as("peft")
for path in sorted(as_peft.iterdir()):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")

# %%
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(as_peft, trust_remote_code=True)
one, all_three = processor(audio=waveforms[0]), processor(audio=waveforms)
question = processor(text="What is the capital of France?")

base = AutoModelForCausalLM.from_pretrained(built.llm_dir)
logits_of_base = base(question["input_ids"]).logits.detach()
model = PeftModel.from_pretrained(base, as_peft)

# %% [markdown]
# `audio_embedder.py` came with the export. The four lines of `logits_in_torch` are all that hearing takes: audio tokens
# from the log-mel, put among the embeddings of the text tokens, under the mask that the run trained with.

# %%
import torch

sys.path.insert(0, str(as_peft))
from audio_embedder import AudioEmbedder, attention_mask_4d, generate, insert_audio

embedder = AudioEmbedder.from_pretrained(as_peft)
about = embedder.audio_config


@torch.no_grad()
def logits_in_torch(model, inputs):
    """Returns [T, V]."""
    audio = embedder(inputs["input_features"], inputs["n_frames"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = insert_audio(embeds, inputs["audio_token_mask"], audio, embedder.n_tokens(inputs["n_frames"]))
    mask = attention_mask_4d(
        inputs["attention_mask"], inputs["audio_token_mask"], about["mask"], about["chunk"], embeds.dtype
    )
    return model(inputs_embeds=embeds, attention_mask=mask).logits[0].numpy()


# %% [markdown]
# Three things to compare: the logits, by the largest of them; the answers; and, to a written question, the logits of
# the base LLM. For that question PEFT needs its adapter turned off.

# %%
table = []


def compare(name, folder, heard, tokens, written):
    apart = np.abs(heard - logits).max() / np.abs(logits).max()
    answers = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    on_text = float((written - logits_of_base).abs().max() / logits_of_base.abs().max())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    same = "yes" if answers == texts else "no"
    table.append((name, f"{apart:.1e}", same, f"{on_text:.1e}" if on_text else "0", f"{size:.0f} MB"))
    print(f"{name}: logits differ by {apart:.1e}; the same answers: {same}")


with torch.no_grad(), model.disable_adapter():
    written = model(question["input_ids"]).logits
compare("peft", as_peft, logits_in_torch(model, one), generate(model, embedder, all_three, N_NEW), written)

# %% [markdown]
# ## hf: one folder that the Auto classes load
#
# Base, adapter and audio embedder together, with the model's torch code. `generate` is that of transformers, and takes
# spoken and written turns in one batch. The adapters are kept apart, so a written turn is the untouched LLM's.

# %%
as_hf = export_as("hf")
model = AutoModelForCausalLM.from_pretrained(as_hf, trust_remote_code=True)

with torch.no_grad():
    heard, written = model(**one).logits[0].numpy(), model(**question).logits
    tokens = model.generate(**all_three, max_new_tokens=N_NEW, do_sample=False)
compare("hf", as_hf, heard, tokens[:, all_three["input_ids"].shape[1] :], written)

# %% [markdown]
# ## merged: a plain LLM directory
#
# LoRA folded into the weights: an ordinary Llama or Qwen for any runtime that takes embeddings as its prompt. Such a
# runtime masks causally, as this run does. Of a run with another `model.mask` the export refuses, unless it is told to
# `force`: there the model would hear badly.

# %%
as_merged = export_as("merged")
model = AutoModelForCausalLM.from_pretrained(as_merged)

with torch.no_grad():
    written = model(question["input_ids"]).logits
compare("merged", as_merged, logits_in_torch(model, one), generate(model, embedder, all_three, N_NEW), written)

# %% [markdown]
# ## Side by side
#
# To speech all three give JAX's logits, up to float32 sums in another order: far less than a ten-thousandth of the
# largest, which this project's tests allow. To a written question *hf*, and *peft* with its adapter off, are the base
# LLM to the bit; *merged* is not.

# %%
head = (
    "format",
    "speech: logits differ from JAX by",
    "the same answers",
    "text: logits differ from the base by",
    "size",
)
display(notebook.table(head, table))

# %% [markdown]
# ## Which one?
#
# | | take |
# |---|---|
# | to train on in PyTorch, or to keep several adapters for one base | **peft** |
# | to run it, share it, or mix spoken and written turns in a batch | **hf** |
# | to serve it where only plain LLMs run | **merged** |
# | to keep the LLM as it was for text, to the bit | **hf**, or **peft** with the adapter off for written turns |
#
# Under **merged** the adapter acts on text as well: measure what that costs before you ship it
# (`aura-jax eval` of a run says it). The way back is `aura-jax import --peft` or `--hf`: the weights become a run that
# trains on in JAX.
