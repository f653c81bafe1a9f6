"""The configuration: files, overrides, and one clear line for every mistake in them."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from aura_jax import config
from aura_jax.config import default, stage
from aura_jax.errors import UserError

FILE = """from aura_jax.config import default, stage

def get_config():
    c = default()
    c.model.llm, c.model.teacher = "an-llm", "a-whisper"
    c.train.stages.first = stage(30, 1e-3, {"distill": 1.0}, clip_norm=5.0)
    c.train.stages.second = stage(20, 1e-4, {"lm": 1, "distill": 0.5})
    c.train.schedule = ("first", "second")
    BODY
    return c
"""


@pytest.fixture
def file(tmp_path):
    """Returns a function: writes a config file with a line more (or the whole text) and returns its path."""

    def write(line: str = "pass", text: str = FILE) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text.replace("BODY", line))
        return str(path)

    return write


def valid() -> ConfigDict:
    c = default()
    c.model.llm, c.model.teacher = "an-llm", "a-whisper"
    c.train.stages.first = stage(30, 1e-3, {"distill": 1.0})
    c.train.stages.second = stage(20, 1e-4, {"lm": 1.0})
    c.train.schedule = ("first", "second")
    return c


def the_line(call, *arguments) -> str:
    """The text of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_a_file_changes_defaults_and_arguments_change_the_file(file):
    path = file("c.lora.rank = 8")
    c = config.load([f"--config={path}", "--config.train.steps=25", "--config.lora.targets=('q', 'v')",
                     "--config.lora.rslora", "--config.train.stages.first.learning_rate=2e-3",
                     "--config.eval.sets={'a': 'b.jsonl'}", "--noconfig.embedder.from_teacher"])  # fmt: skip
    assert (c.lora.rank, c.train.steps, c.lora.targets, c.lora.rslora) == (8, 25, ("q", "v"), True)
    assert (c.train.stages.first.learning_rate, c.train.stages.first.clip_norm) == (2e-3, 5.0)
    assert c.eval.sets.to_dict() == {"a": "b.jsonl"} and c.embedder.from_teacher is False
    assert c.lora.alpha == default().lora.alpha
    apart = config.load(["--config", path, "--config.train.steps", "25"])
    assert apart.train.steps == 25


def test_a_file_may_import_its_neighbours(file, tmp_path):
    Path(file()).rename(tmp_path / "base.py")
    text = f"from {tmp_path.name} import base\ndef get_config():\n    c = base.get_config()\n    BODY\n    return c\n"
    assert config.load([f"--config={file('c.seed = 3', text)}"]).seed == 3


def test_shipped_configs_are_valid():
    files = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
    assert {"quickstart.py", "smoke.py"} <= {f.name for f in files}
    for f in files:
        assert config.load([f"--config={f}"]).train.schedule


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.step=3", "unknown key train.step: did you mean 'steps'?"),
        ("--config.trian.steps=3", "unknown key trian.steps: did you mean 'train'?"),
        ("--config.train.stages.first.stepz=3", "unknown key train.stages.first.stepz: did you mean 'steps'?"),
        ("--config.train.stages.third.steps=3", "unknown key train.stages.third.steps: valid: first, second"),
        ("--noconfig.lora.rsloro", "unknown key lora.rsloro: did you mean 'rslora'?"),
        ("--config.seed.x=3", "unknown key seed.x: seed has no keys below it"),
        ("--config.train.steps=ten", "--config.train.steps=ten: invalid literal for int()"),
        ("--config.train.steps=1.5", "--config.train.steps=1.5: invalid literal for int()"),
        ("--config.lora.alpha=big", "--config.lora.alpha=big: could not convert string to float"),
        ("--config.lora.rslora=maybe", "--config.lora.rslora=maybe: "),
        ("--config.train=3", "--config.train=3: "),
        ("--config.train.steps", "Missing value for flag --config.train.steps"),
        ("--steps=3", "Unknown command line flag 'steps'"),
        ("steps=3", "unexpected argument 'steps=3': overrides look like --config.train.steps=10"),
        ("--config.model.dtype=float23", "unknown model.dtype 'float23': did you mean 'float32'?"),
    ],
)
def test_mistakes_on_the_command_line(file, argument, message):
    assert message in the_line(config.load, [f"--config={file()}", argument])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.train.step = 3", "unknown key train.step: did you mean 'steps'?"),
        ("c.trian = 3", "unknown key trian: did you mean 'train'?"),
        ("c.data.update(batchsize=3)", "unknown key data.batchsize: did you mean 'batch_size'?"),
        ("c.data.augment = dict(gain=3)", "unknown key data.augment.gain: did you mean 'gain_db'?"),
        ("c.mesh = dict(data=1)", "there is no mesh.fsdp"),
        ("c.train.stages.third = stage(1, 1.0, {'lm': 1}, warmup=3)", "of a stage: did you mean 'warmup_steps'?"),
        ("c.train.stages.third = stage(1, 1.0, {'distil': 1})", "'distil': did you mean 'distill'?"),
        ("c.train.stages.third = 3", "train.stages.third is not a stage"),
        ("c.train.stages.third = dict(step=3)", "unknown key train.stages.third.step: did you mean 'steps'?"),
        ("c.train.steps = 'ten'", ":9: TypeError: Could not override field 'steps'"),
        ("1 / 0", ":9: ZeroDivisionError: division by zero"),
        ("open('/nowhere')", ":9: FileNotFoundError: "),
        ("return None", "get_config() must change what aura_jax.config.default() returns, and return it"),
        ("return {}", "get_config() must change what aura_jax.config.default() returns, and return it"),
    ],
)
def test_mistakes_in_a_file(file, line, message):
    path = file(line)
    error = the_line(config.load, [f"--config={path}"])
    assert message in error and error.startswith(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import nothing_of_that_name\n", ":1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("x = 3\n", "has no get_config(): start from a file in configs/"),
    ],
)
def test_files_that_are_no_config(file, text, message):
    path = file(text=text)
    error = the_line(config.load, [f"--config={path}"])
    assert error.startswith(path) and message in error


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config="], ["--config.train.steps=3"]])
def test_no_config_is_said_so(argv):
    assert the_line(config.load, argv).startswith("no config: add --config=")


def test_a_missing_file_or_a_directory_is_named(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        assert the_line(config.load, [f"--config={path}"]).startswith(f"no config file {path}: ")


def change(c: ConfigDict, key: str, value) -> None:
    *parents, last = key.split(".")
    for part in parents:
        c = c[part]
    c[last] = value


def test_what_is_valid_passes():
    config.validate(valid())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.param_dtype", "int8", "unknown model.param_dtype 'int8'"),
        ("model.remat", "dot", "unknown model.remat 'dot': did you mean 'dots'?"),
        ("model.attention", "flash", "unknown model.attention 'flash': valid: cudnn, xla"),
        ("model.normalisation", "stream", "did you mean 'streaming'?"),
        ("teacher.window", "30", "unknown teacher.window '30'"),
        ("distill.loss", "cosin", "unknown distill.loss 'cosin': did you mean 'cosine'?"),
        ("distill.head", "owned", "unknown distill.head 'owned'"),
        ("distill.target_norm", "layer_norm", "did you mean 'layernorm'?"),
        ("data.layout", "slots", "unknown data.layout 'slots': did you mean 'slot'?"),
        ("data.batch_size", 0, "data.batch_size must be at least 1, not 0"),
        ("train.accumulate", 0, "train.accumulate must be at least 1, not 0"),
        ("train.accumulate", 3, "data.batch_size 16 is not a multiple of train.accumulate 3"),
        ("train.loss_chunk", 0, "train.loss_chunk must be at least 1"),
        ("train.checkpoint_every", 0, "train.checkpoint_every must be at least 1"),
        ("train.max_skipped", 0, "train.max_skipped must be at least 1"),
        ("train.steps", -1, "train.steps must be at least 0, not -1"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay must be at least 0, not -0.1"),
        ("model.llm", "", "model.llm is empty"),
        ("model.teacher", "", "train.stages.first distils, but model.teacher is empty"),
        ("train.schedule", (), "train.schedule is empty"),
        ("train.schedule", ("frist",), "train.schedule names stage 'frist': did you mean 'first'?"),
        ("train.stages.first.steps", 0, "train.stages.first.steps must be at least 1, not 0"),
        ("train.stages.first.warmup_steps", -1, "train.stages.first.warmup_steps must be at least 0, not -1"),
        ("train.stages.first.learning_rate", 0.0, "train.stages.first.learning_rate must be above 0, not 0.0"),
        ("train.stages.second.clip_norm", 0.0, "train.stages.second.clip_norm must be above 0"),
        ("train.stages.second.objectives.lm", 0.0, "train.stages.second.objectives: every weight is 0"),
        ("train.stages.second.objectives.distill", -1.0, "train.stages.second.objectives.distill must be at least 0"),
        ("train.stages.second.objectives.text_kd", 1.0, "train.stages.second uses text, but data.text_pool is empty"),
        ("train.stages.second.trainable", (("lora/(", 1.0),), "'lora/(' is not a regular expression"),
        ("trainable", (("lora/", 0.0),), "trainable: the rate of 'lora/' must be above 0, not 0.0"),
        ("trainable", (("(", 1.0),), "trainable: '(' is not a regular expression"),
    ],
)
def test_impossible_values_are_named(key, value, message):
    c = valid()
    change(c, key, value)
    assert message in the_line(config.validate, c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.stages.second.merge_lora": True}, "lora.scope 'audio' (PLoRA) acts at audio tokens only"),
        (
            {"train.stages.second.objectives.text_anchor": 1.0, "data.text_pool": "pool.jsonl"},
            "lora.scope 'audio' never touches text: drop one of them",
        ),
    ],
)
def test_plora_neither_merges_nor_anchors_text(changes, message):
    c = valid()
    for key, value in (changes | {"lora.scope": "audio"}).items():
        change(c, key, value)
    assert message in the_line(config.validate, c)


@pytest.mark.parametrize(
    ("limit", "names", "total"), [(0, ["first", "second"], 50), (30, ["first"], 30), (31, ["first", "second"], 31),
                                  (29, ["first"], 29), (99, ["first", "second"], 50)]
)  # fmt: skip
def test_steps_cut_the_schedule_off(limit, names, total):
    c = valid()
    c.train.steps = limit
    found = config.stages(c)
    assert [name for name, _ in found] == names and config.total_steps(c) == total
    assert found[0][1].steps == 30  # a stage that is cut off keeps its schedule of learning rates


def test_json_round_trip(tmp_path):
    c = valid()
    c.data.update(train=(("a.jsonl", 1.0), ("b.jsonl", 0.5)), buckets=(1.0, 2.5), validation_values=("x",))
    c.eval.sets = {"new voices": "c.jsonl"}
    path = tmp_path / "config.json"
    path.write_text(config.to_json(c))
    again = config.from_json(path)
    assert again.to_dict() == c.to_dict()
    assert json.loads(config.to_json(again)) == json.loads(path.read_text())
    config.validate(again)


def test_a_workdir_without_or_with_a_broken_config_is_named(tmp_path):
    assert "is this a workdir of aura-jax train?" in the_line(config.from_json, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in the_line(config.from_json, tmp_path / "config.json")
