"""LoRA: present, absent and out of scope at a layer; against PEFT in a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from aura_jax.convert import hf
from aura_jax.errors import UserError
from aura_jax.models.llm import LLM
from aura_jax.models.lora import TARGETS, Dense, LoRAConfig, matmul, merge
from aura_jax.models.speech_llm import text_context

CONFIG = LoRAConfig(n_blocks=2, rank=4, alpha=6.0)
N, T, N_IN, N_OUT = 2, 5, 6, 7
MASK = np.array([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], bool)


def draw(*shape, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = draw(N, T, N_IN)
PARAMS = {"kernel": draw(N_IN, N_OUT, seed=1), "bias": draw(N_OUT, seed=2)}
AB = {"a": draw(N_IN, 4, seed=3), "b": draw(4, N_OUT, seed=4)}
PLAIN = X @ PARAMS["kernel"] + PARAMS["bias"]


def dense(lora: LoRAConfig | None = CONFIG, ab: dict | None = AB, mask=None, x=X):
    variables = {"params": PARAMS} | ({"lora": ab} if ab is not None else {})
    return np.asarray(jax.jit(Dense(N_OUT, True, lora).apply)(variables, x, mask))


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_is_the_formula(rslora):
    scale = 6 / 2 if rslora else 6 / 4
    out = dense(dataclasses.replace(CONFIG, rslora=rslora))
    np.testing.assert_allclose(out, PLAIN + scale * X @ AB["a"] @ AB["b"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_of_16_bit_operands_is_summed_in_32_bits(axis, rows):
    """Value and both gradients equal the float32 product of the rounded operands."""
    x, w, dy = draw(rows, 50, seed=5), draw(50, 20, seed=6), draw(rows, 20, seed=7)
    turn = lambda w: w if axis == 0 else w.T
    out, pull = jax.vjp(lambda x, w: matmul(x, turn(w), jnp.bfloat16, axis), x, w)
    x16, w16, dy16 = (np.asarray(jnp.asarray(z, jnp.bfloat16), np.float32) for z in (x, w, dy))
    for found, expected in zip((out, *pull(dy)), (x16 @ w16, dy16 @ w16.T, x16.T @ dy16), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(out) - x @ w).max() > 1e-3


def test_without_the_collection_and_out_of_scope_it_is_the_plain_linear_to_the_bit():
    plain = dense(lora=None, ab=None)
    np.testing.assert_array_equal(dense(ab=None), plain)
    np.testing.assert_array_equal(dense(ab=None, mask=MASK), plain)
    np.testing.assert_array_equal(dense(mask=MASK)[~MASK], plain[~MASK])
    np.testing.assert_array_equal(dense(mask=MASK)[MASK], dense()[MASK])
    assert (dense(mask=MASK)[MASK] != plain[MASK]).all()


def test_a_nan_of_the_delta_does_not_leak_out_of_its_scope():
    out = dense(ab={"a": AB["a"], "b": np.full_like(AB["b"], np.nan)}, mask=MASK)
    np.testing.assert_array_equal(np.isnan(out).all(-1), MASK)
    np.testing.assert_array_equal(out[~MASK], dense(ab=None)[~MASK])
    x = X.copy()
    x[MASK] = np.inf  # inf - inf in the delta's matmuls
    assert np.isfinite(dense(mask=MASK, x=x)[~MASK]).all()


def test_starts_as_the_plain_linear_with_peft_initialisation():
    layer = Dense(50, False, LoRAConfig(n_blocks=1, rank=32, alpha=32.0))
    x = draw(1, 3, 64)
    variables = layer.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, x)
    a, b = np.asarray(variables["lora"]["a"]), np.asarray(variables["lora"]["b"])
    assert a.shape == (64, 32) and b.shape == (32, 50) and not b.any()
    np.testing.assert_array_equal(layer.apply(variables, x), layer.apply({"params": variables["params"]}, x))
    # torch's kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(n_in).
    assert 0.98 / 8 < np.abs(a).max() <= 1 / 8
    np.testing.assert_allclose(a.std(), 1 / 8 / 3**0.5, rtol=0.05)


def test_every_linear_of_every_block_draws_its_own_a():
    config = hf.LLMConfig("llama", 9, 8, 8, 3, 2, 2, 4, 1e4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    run = lambda llm: llm(llm.embed(tokens), text_context(tokens, tokens + 1))
    llm = LLM(config, dataclasses.replace(CONFIG, n_blocks=3))
    init = jax.jit(lambda: llm.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, method=run)["lora"])
    drawn = [block.tobytes() for leaf in jax.tree.leaves(init()) for block in np.asarray(leaf) if block.any()]
    assert len(drawn) == len(set(drawn)) == 3 * len(TARGETS)


@pytest.mark.parametrize("targets", [("q",), ("v", "gate"), ("o", "down")])
def test_only_targets_have_adapters(targets):
    config = hf.LLMConfig("llama", 9, 8, 8, 3, 2, 2, 4, 1e4)
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = lambda llm: llm(llm.embed(tokens), text_context(tokens, tokens + 1))
    llm = LLM(config, dataclasses.replace(CONFIG, targets=targets))
    keys = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    adapters = jax.eval_shape(lambda: llm.init(keys, method=init))["lora"]
    assert list(adapters) == ["adapted"]
    assert sorted(name for room in adapters["adapted"].values() for name in room) == sorted(targets)
    assert {x.shape[0] for x in jax.tree.leaves(adapters)} == {2}


@pytest.fixture
def one_torch_thread():
    """Models this small run faster in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Qwen2: config and directory."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    directory = tmp_path_factory.mktemp("base")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory, hf.load_llm_config(directory)


@pytest.mark.parametrize(
    ("n_blocks", "targets", "rslora"),
    [(1, TARGETS, False), (2, ("q", "v", "down"), True), (3, ("k", "o", "gate"), False)],
)
def test_the_same_matrices_give_the_logits_of_peft(base, one_torch_thread, n_blocks, targets, rslora):
    directory, llm_config = base
    rank, alpha = 4, 10
    module = lambda t: f"{t}_proj"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=[module(t) for t in targets],
            layers_to_transform=list(range(n_blocks)),
            layers_pattern="layers",
        ),
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        weights = {n: p.normal_(std=0.2).numpy().T for n, p in theirs.named_parameters() if "lora_" in n}
    assert len(weights) == 2 * n_blocks * len(targets)

    lora = LoRAConfig(n_blocks=n_blocks, rank=rank, alpha=alpha, rslora=rslora, targets=targets)
    room = lambda t: "attn" if t in "qkvo" else "mlp"
    of = lambda i, t, x: next(w for n, w in weights.items() if f".{i}." in n and f"{module(t)}.lora_{x}." in n)
    stack = lambda t, x: np.stack([of(i, t, x) for i in range(n_blocks)])
    adapters: dict = {}
    for t in targets:
        adapters.setdefault(room(t), {})[t] = {"a": stack(t, "A"), "b": stack(t, "B")}

    tokens = np.random.default_rng(0).integers(3, 64, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        with theirs.disable_adapter():
            without = theirs(torch.tensor(tokens)).logits.numpy()

    params = hf.load_llm(directory, llm_config, n_adapted=n_blocks, dtype=jnp.float32)
    ctx = text_context(jnp.tile(jnp.arange(12), (2, 1)), jnp.ones((2, 12), jnp.int32))
    run = jax.jit(lambda v: LLM(llm_config, lora).apply(v, method=lambda m: m.logits(m(m.embed(tokens), ctx)[0])))
    ours = run({"params": params, "lora": {"adapted": adapters}})
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected - without).max() > 0.1 * np.abs(without).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, not 0"),
        ({"scope": "requests"}, "unknown lora.scope 'requests': did you mean 'request'?"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("q", "gates")}, "unknown lora.targets 'gates': did you mean 'gate'?"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert "\n" not in str(caught.value)


def test_plora_cannot_be_merged():
    with pytest.raises(UserError, match="PLoRA"):
        merge({}, {}, dataclasses.replace(CONFIG, scope="audio"))
