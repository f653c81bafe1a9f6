"""Fixtures for every room: tiny random models as Hugging Face directories, and the sample data."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from aura_jax import checkpoint, config, sharding, system
from aura_jax.convert import random_models


def pytest_configure(config: pytest.Config) -> None:
    """Has whatever compiles for this run do so quickly and share it: workers, and the processes that tests start.

    Most of the time here is compilation, much of it of the same programs. Those of tiny models take longer to compile
    than to run, so XLA leaves out what makes them fast, and fuses in the older way, which compiles sooner.
    """
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # of a worker, or set on purpose
        _set_jax("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="aura-jax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    _set_jax("jax_compilation_cache_dir", folder)
    _set_jax("jax_persistent_cache_min_compile_time_secs", 0.1)
    _set_jax("jax_persistent_cache_min_entry_size_bytes", -1)


def _set_jax(name: str, value: bool | float | str) -> None:
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _compiled_as_everywhere_else(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has XLA leave nothing out in tests with the marker "optimised", nor in the processes that they start."""
    if not request.node.get_closest_marker("optimised"):
        yield
        return
    before = jax.config.values["jax_disable_most_optimizations"]
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder `sample_data/`."""
    return Path(__file__).parents[1] / "sample_data"


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory) -> Path:
    """A random Llama: 4 blocks, width 64, ChatML template."""
    path = tmp_path_factory.mktemp("tiny") / "llama"
    path.mkdir()
    random_models.build_llm(path)
    return path


@pytest.fixture(scope="session")
def tiny_whisper_dir(tmp_path_factory) -> Path:
    """A random English-only Whisper: 2 + 2 blocks, width 32, 80 mel bins, the 30 s window."""
    path = tmp_path_factory.mktemp("tiny") / "whisper"
    path.mkdir()
    random_models.build_whisper(path)
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_llm_dir, tiny_whisper_dir) -> Callable[[], config.Config]:
    """Makes configs of a run on the random models; each call returns a fresh one."""

    def make() -> config.Config:
        c = config.default()
        c.model.llm, c.model.teacher = str(tiny_llm_dir), str(tiny_whisper_dir)
        c.lora.n_blocks, c.lora.rank, c.lora.alpha = 2, 8, 8.0
        c.data.buckets = (1.0, 2.0)
        c.eval.batch_size, c.eval.max_new_tokens = 4, 8
        return c

    return make


@pytest.fixture(scope="session")
def random_variables() -> Callable[[system.System], dict]:
    """Returns a function that loads a system's variables, with adapters that do something (B is not zero)."""

    def load(built: system.System, seed: int = 0, size: float = 0.3) -> dict:
        variables = system.initial_variables(built, checkpoint.system_mesh(built.config))
        leaves, tree = jax.tree.flatten(variables["lora"])
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noise = [size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return {"params": variables["params"], "lora": jax.tree.unflatten(tree, noise)}

    return load


@pytest.fixture(scope="session")
def tiny_loaded(tiny_config, random_variables) -> tuple[system.System, dict]:
    """The system of `tiny_config()` and its variables, for reading only: shared, because drawing them takes seconds."""
    built = system.build(tiny_config())
    return built, random_variables(built)


@pytest.fixture(scope="session")
def write_workdir() -> Callable[[system.System, dict, Path], Path]:
    """Returns a function that writes a workdir as training leaves it, and returns its path."""

    def write(built: system.System, variables: dict, workdir: Path) -> Path:
        workdir.mkdir()
        (workdir / "config.json").write_text(config.to_json(built.config))
        own = {p: x for p, x in sharding.flatten(variables).items() if not p.startswith(system.BASE)}
        checkpoints = checkpoint.Checkpoints(workdir, built.config)
        meta = {**checkpoint.fingerprints(variables["params"]), "seconds": 1.5}
        checkpoints.save(1, own, {"step": jax.numpy.int32(1)}, meta)
        checkpoints.close()
        return workdir

    return write


@pytest.fixture(scope="session")
def tiny_workdir(tiny_loaded, write_workdir, tmp_path_factory) -> Path:
    """The workdir of the random models with adapters that do something, for reading only."""
    return write_workdir(*tiny_loaded, tmp_path_factory.mktemp("runs") / "tiny")
