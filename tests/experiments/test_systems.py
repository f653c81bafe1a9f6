"""Every system of configs/systems on random tiny models: it trains, resumes, answers and is scored, and learns."""

import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest

from aura_jax import checkpoint, cli, config, sharding
from aura_jax.audio.io import load_audio
from aura_jax.data.manifest import load_manifest
from aura_jax.experiments.compare import plan
from aura_jax.infer.generate import Generator
from aura_jax.infer.prompting import Request
from aura_jax.models import adapters, embedder, speech_llm
from aura_jax.train import loop

pytestmark = pytest.mark.slow  # each trains a system of its own

ROOT = Path(__file__).parents[2]
SYSTEMS = sorted(path.stem for path in (ROOT / "configs" / "systems").glob("[!_]*.py"))
RESUMED = {"bridge", "blsp_kd"}  # the others are parts of these, and of what test_loop.py resumes
KEEP_AN_ENCODER = {"bridge", "blsp", "blsp_kd", "diva"}


@pytest.fixture
def tiny(tiny_llm_dir, tiny_whisper_dir, sample_data, tmp_path):
    """Makes the config of a system smaller: models, data and steps; all else as it is."""
    source = sample_data / "commands" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:12]]
    rows = [row | {"audio": str(source.parent / row["audio"])} for row in rows]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, *base: str) -> config.Config:
        c = importlib.import_module(f"configs.systems.{name}").get_config(*base)
        c.model.llm = str(tiny_llm_dir)
        for key in ("teacher", "encoder"):
            if c.model[key]:
                c.model[key] = str(tiny_whisper_dir)
        if c.lora.n_blocks:
            c.lora.update(n_blocks=2, rank=8, alpha=8.0)
        c.embedder.hidden = 16 if c.embedder.hidden else 0
        c.data.update(train=((str(manifest), 1.0),), validation_values=(), batch_size=4, buckets=(3.84,), speeds=(1.0,))
        if c.data.text_pool:
            c.data.update(text_pool=str(sample_data / "text" / "train.jsonl"), text_rows=2, text_length=32)
        c.train.schedule = c.train.schedule[-1:]
        c.train.stages[c.train.schedule[0]].update(steps=8, learning_rate=1e-2, warmup_steps=2)
        c.train.update(log_every=1, checkpoint_every=5, profile_steps=0)
        c.eval.update(sets={"rows": str(manifest)}, max_new_tokens=6, text_heldout="", text_questions="", batch_size=4)
        return c

    return make


def logged(workdir: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: {k: v for k, v in x.items() if k.startswith("loss")} for x in lines if "loss" in x}


def assert_neighbours_do_not_matter(generator: Generator, c: config.Config) -> None:
    requests = [Request(load_audio(row.audio)) for row in load_manifest(c.data.train[0][0])]
    together, alone = (generator.generate(of)[0] for of in (requests, requests[:1]))
    assert together.tokens == alone.tokens


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_resumes_answers_and_is_scored(tiny, name, tmp_path, capsys):
    c = tiny(name)
    loop.train(c, tmp_path / "whole")
    whole = logged(tmp_path / "whole")
    assert len(whole) == 8
    if name in RESUMED:
        c.train.steps = 5
        loop.train(c, tmp_path / "parts")
        c.train.steps = 0
        loop.train(c, tmp_path / "parts")
        assert logged(tmp_path / "parts") == whole
    assert whole[8]["loss"] < whole[1]["loss"]
    active = {k.removeprefix("loss/") for k in whole[1] if k.startswith("loss/") and "block" not in k}
    stage = c.train.stages[c.train.schedule[0]]
    assert active == {objective for objective, weight in stage.objectives.items() if weight}

    held = json.loads((tmp_path / "whole" / "checkpoints" / "8" / "meta" / "metadata").read_text())
    assert not [path for path in held["own"] if "encoder" in path or "/llm/embed" in path]
    assert ("encoder_fingerprint" in held) == (name in KEEP_AN_ENCODER)
    built, variables = checkpoint.load_for_inference(tmp_path / "whole")
    paths = sharding.flatten(variables)
    assert any(path.startswith("params/encoder/") for path in paths) == (name in KEEP_AN_ENCODER)

    assert_neighbours_do_not_matter(Generator(built, variables), c)

    assert cli.main(["eval", "--workdir", str(tmp_path / "whole"), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["rows"]["n"] == 12


def test_a_bridge_learns_what_the_llm_says(tiny, tmp_path):
    c = tiny("bridge", "configs/questions.py")
    source = Path(c.data.train[0][0])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text("".join(json.dumps(row | {"response": f"You said: {row['text']}"}) + "\n" for row in rows))
    loop.train(c, tmp_path / "run")
    losses = logged(tmp_path / "run")
    assert losses[1].keys() == {"loss", "loss/response_kd"} and losses[8]["loss"] < losses[1]["loss"]


def test_the_example_of_new_system_md_trains_and_answers(tiny, tmp_path, monkeypatch):
    module, of_config = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new_system.md").read_text(), re.DOTALL)
    names = dict(vars(adapters))
    exec(module, names)
    monkeypatch.setitem(adapters.ADAPTERS, "pool", names["PoolAdapter"])
    for room in (embedder, speech_llm):
        monkeypatch.setattr(room, "OF_STATES", (*embedder.OF_STATES, "pool"))
    monkeypatch.setattr(embedder, "KINDS", (*embedder.KINDS, "pool"))
    pool = types.ModuleType("configs.systems.pool")
    exec(of_config, vars(pool))
    monkeypatch.setitem(sys.modules, pool.__name__, pool)
    written = tmp_path / "pool.py"
    written.write_text(of_config)
    (job,) = plan.equal_steps([str(written)], [0], tmp_path, tmp_path, "configs/smoke.py", [])
    assert (job.system, job.config.embedder.kind) == ("pool", "pool")
    c = tiny("pool")
    assert c.embedder.kind == "pool"
    loop.train(c, tmp_path / "run")
    losses = logged(tmp_path / "run")
    assert losses[8]["loss"] < losses[1]["loss"]
    built, variables = checkpoint.load_for_inference(tmp_path / "run")
    assert_neighbours_do_not_matter(Generator(built, variables), c)
