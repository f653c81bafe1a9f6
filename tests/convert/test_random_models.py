"""Random tiny models: directories like the real ones, that transformers reads as we do; and always the same bytes."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from aura_jax.convert import hf, random_models
from aura_jax.models.llm import LLM, Context

PARITY = 1e-4
CASES = [
    dict(family="llama", tied=True, dtype="float32", shards=1),
    dict(family="llama", tied=False, dtype="float16", shards=3),
    dict(family="qwen2", tied=True, dtype="float16", shards=1),
    dict(family="qwen2", tied=False, dtype="bfloat16", shards=2),
    dict(family="qwen3", tied=True, dtype="bfloat16", shards=3),
    dict(family="qwen3", tied=False, dtype="float32", shards=2),
]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_transformers_reads_it_whole_and_computes_the_same(tmp_path, case):
    random_models.build_llm(tmp_path, n_blocks=2, width=32, mlp_width=48, **case)
    model, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert model.config.model_type == case["family"] and model.dtype == getattr(torch, case["dtype"])
    assert not any(about.values()), about  # missing, unexpected or mismatched keys
    assert len(list(tmp_path.glob("*.safetensors"))) == case["shards"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Turn on the kitchen lights."}]
    tokens_BxT = np.array([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    assert tokenizer.decode(tokens_BxT[0]) == (
        "<|im_start|>user\nTurn on the kitchen lights.<|im_end|>\n<|im_start|>assistant\n"
    )
    with torch.no_grad():
        theirs = model.float()(torch.tensor(tokens_BxT)).logits.numpy()

    config = hf.load_llm_config(tmp_path)
    assert (config.family, config.tied) == (case["family"], case["tied"])
    variables = {"params": hf.load_llm(tmp_path, config, n_adapted=0, dtype=jnp.float32)}
    column_BxT = np.arange(tokens_BxT.shape[1])[None]
    ctx = Context(column_BxT, column_BxT + 1, np.ones_like(column_BxT), np.ones_like(column_BxT))
    run = lambda llm: llm.logits(llm(llm.embed(tokens_BxT), ctx)[0])
    ours = np.asarray(jax.jit(lambda v: LLM(config).apply(v, method=run))(variables))
    assert np.abs(ours - theirs).max() <= PARITY * np.abs(theirs).max()


def test_the_index_names_the_file_of_every_key(tmp_path):
    random_models.build_llm(tmp_path, n_blocks=1, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, tensors in stored.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in stored.values() for x in tensors.values())


def test_the_default_is_the_same_model_on_every_machine(tiny_llm_dir):
    content = b"".join(x.tobytes() for _, x in sorted(load_file(tiny_llm_dir / "model.safetensors").items()))
    assert hashlib.sha256(content).hexdigest() == "60f6d27723cb7addbf4c00ba570d05f52e88b40453ffd3b960ae2a47ed1fe24a"
