"""The configuration: files, overrides, and one clear line for every mistake in them."""

import json
import sys
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
                     "--config.eval.sets={'a': 'b.jsonl'}", "--noconfig.embedder.from_teacher",
                     "--config.data.template_kwargs={'enable_thinking': False}"])  # fmt: skip
    assert (c.lora.rank, c.train.steps, c.lora.targets, c.lora.rslora) == (8, 25, ("q", "v"), True)
    assert (c.train.stages.first.learning_rate, c.train.stages.first.clip_norm) == (2e-3, 5.0)
    assert c.eval.sets.to_dict() == {"a": "b.jsonl"} and c.embedder.from_teacher is False
    assert c.data.template_kwargs.to_dict() == {"enable_thinking": False}
    assert c.lora.alpha == default().lora.alpha
    apart = config.load(["--config", path, "--config.train.steps", "25"])
    assert apart.train.steps == 25


def test_a_file_may_import_its_neighbours(file, tmp_path):
    Path(file()).rename(tmp_path / "base.py")
    text = f"from {tmp_path.name} import base\ndef get_config():\n    c = base.get_config()\n    BODY\n    return c\n"
    assert config.load([f"--config={file('c.seed = 3', text)}"]).seed == 3


def test_a_file_s_neighbours_are_those_of_its_own_checkout(file, tmp_path, monkeypatch):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for root, seed in ((mine, 3), (other, 4)):
        (root / "of_two_checkouts").mkdir(parents=True)
        Path(file(f"c.seed = {seed}")).rename(root / "of_two_checkouts" / "base.py")
    text = "from of_two_checkouts import base\n\n\ndef get_config():\n    return base.get_config()\n"
    (mine / "of_two_checkouts" / "one.py").write_text(text)
    for root in (mine, other):  # the other is before what is appended
        monkeypatch.syspath_prepend(root)
    before = list(sys.path)
    assert config.load([f"--config={mine / 'of_two_checkouts' / 'one.py'}"]).seed == 3
    assert sys.path == before


def test_a_base_of_another_checkout_has_its_own_neighbours(file, tmp_path):
    text = "from two_more_checkouts import base\n\n\ndef get_config():\n    return base.get_config()\n"
    system = "from aura_jax.config import read\nfrom two_more_checkouts import base\n\n\n"
    system += "def get_config(other):\n    c = read(other)\n    c.lora.rank = base.get_config().seed\n"
    system += "    from two_more_checkouts import late\n    c.lora.n_blocks = late.N\n    return c\n"
    for root, seed in (("mine", 3), ("other", 4)):
        folder = tmp_path / root / "two_more_checkouts"
        folder.mkdir(parents=True)
        Path(file(f"c.seed = {seed}")).rename(folder / "base.py")
        (folder / "one.py").write_text(text)
        (folder / "system.py").write_text(system)
        (folder / "late.py").write_text(f"N = {seed}\n")
    mine, other = (tmp_path / root / "two_more_checkouts" for root in ("mine", "other"))
    c = config.load([f"--config={mine / 'system.py'}:{other / 'one.py'}"])
    assert (c.seed, c.lora.rank, c.lora.n_blocks) == (4, 3, 3)
    assert config.load([f"--config={other / 'one.py'}"]).seed == 4
    assert not [name for name in sys.modules if name.startswith("two_more_checkouts")]


def test_a_file_may_take_a_base(file, tmp_path):
    Path(file("c.seed = 3")).rename(tmp_path / "base.py")
    text = "from aura_jax.config import read\ndef get_config(base):\n    c = read(base)\n    BODY\n    return c\n"
    argument = f"--config={file('c.seed += 1', text)}:{tmp_path / 'base.py'}"
    assert config.load([argument]).seed == 4
    assert "no config file" in the_line(config.load, [argument + "x"])
    line = the_line(config.load, [f"--config={file('c.seed = 3')}:configs/smoke.py"])
    assert "its get_config() takes no base: write get_config(base)" in line


def test_shipped_configs_are_valid():
    files = sorted((Path(__file__).parents[1] / "configs").rglob("[!_]*.py"))
    assert {"quickstart.py", "smoke.py", "bridge.py"} <= {f.name for f in files}
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
        ("model.param_dtype", "int4", "unknown model.param_dtype 'int4': did you mean 'int8'"),
        ("model.remat", "dot", "unknown model.remat 'dot': did you mean 'dots'?"),
        ("model.attention", "flash", "unknown model.attention 'flash': did you mean 'splash'?"),
        ("model.normalisation", "stream", "did you mean 'streaming'?"),
        ("teacher.window", "30", "unknown teacher.window '30'"),
        ("lora.scope", "requests", "unknown lora.scope 'requests': did you mean 'request'?"),
        ("distill.layer_map", "strid", "unknown distill.layer_map 'strid': did you mean 'stride'?"),
        ("kd.temperature", float("nan"), "kd.temperature must be above 0, not nan"),
        ("train.stages.first.learning_rate", float("nan"), "train.stages.first.learning_rate must be above 0, not nan"),
        (
            "train.stages.first.objectives.lm",
            float("nan"),
            "train.stages.first.objectives.lm must be at least 0, not nan",
        ),
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
        ("train.eval_rows", 0, "train.eval_rows must be at least 1"),
        ("train.profile_start", -1, "train.profile_start must be at least 0, not -1"),
        ("train.profile_steps", -1, "train.profile_steps must be at least 0, not -1"),
        ("lora.alpha", 0.0, "lora.alpha must be above 0, not 0.0"),
        ("lora.n_blocks", -2, "lora.n_blocks must be at least -1, not -2"),
        ("lora.n_blocks", 0, "train.stages.first distils into the blocks that LoRA adapts, and lora.n_blocks is 0"),
        ("embedder.n_before", -1, "embedder.n_before must be at least 0, not -1"),
        ("embedder.hidden", 8, "embedder.hidden is for stack and conv: embedder.kind 'stem' has none"),
        ("embedder.kind", "cformer", "distils frame by frame, and embedder.kind 'cformer' has no frames"),
        ("kd.temperature", 0.0, "kd.temperature must be above 0, not 0.0"),
        ("train.stages.second.objectives.input_kd", 1.0, "input_kd needs an audio token for each token of the transcr"),
        ("train.stages.second.objectives.quantity", 1.0, "set embedder.kind to 'cformer'"),
        ("data.train", ("my.jsonl",), """'my.jsonl' is no pair of a manifest and its passes per epoch: write (("""),
        ("data.train", ("my.jsonl", 1.0), """such as --config.data.train='(("my.jsonl", 1.0),)'"""),
        ("data.train", (("my.jsonl", "1"),), "('my.jsonl', '1') is no pair"),
        ("data.train", (("my.jsonl", 0.0),), "the passes of my.jsonl must be above 0, not 0.0"),
        ("data.speeds", (1.0, 0.0), "data.speeds must be factors above 0"),
        ("data.speeds", (), "data.speeds must be factors above 0"),
        ("data.augment.gain_db", (3.0,), "data.augment.gain_db must be two numbers, the lower first, not (3.0,)"),
        ("data.augment.noise_snr_db", (20.0, 5.0), "data.augment.noise_snr_db must be two numbers, the lower first"),
        ("data.augment.noise_probability", 1.5, "data.augment.noise_probability must be from 0 to 1, not 1.5"),
        ("data.augment.freq_masks", -1, "data.augment.freq_masks must be at least 0, not -1"),
        ("data.augment.time_width", -1, "data.augment.time_width must be at least 0, not -1"),
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


_NO_LORA = {
    "lora.n_blocks": 0,
    "train.stages.first.objectives.distill": 0.0,
    "train.stages.first.objectives.lm": 1.0,
    "train.stages.second.objectives.distill": 0.0,
}
_PLORA = {"lora.scope": "audio"}
_ANCHORED = {"train.stages.second.objectives.text_anchor": 1.0, "data.text_pool": "pool.jsonl"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (_PLORA | {"train.stages.second.merge_lora": True}, "lora.scope 'audio' (PLoRA) acts at audio tokens only"),
        (_PLORA | _ANCHORED, "lora.scope 'audio' never touches text: drop one of them"),
        (_ANCHORED | {"data.text_rows": 0}, "data.text_rows must be at least 1, not 0"),
        (_ANCHORED | {"data.text_rows": 3, "train.accumulate": 2}, "data.text_rows 3 is not a multiple of train.acc"),
        (
            {"train.stages.first.merge_lora": True, "train.stages.second.merge_lora": True},
            "train.stages.second: merge_lora, but an earlier stage merged LoRA",
        ),
        (
            {"train.stages.second.merge_lora": True, "train.stages.second.objectives.response_kd": 1.0},
            "train.stages.second: response_kd compares with the LLM without adapters, which merge_lora ended",
        ),
        ({"model.encoder": "a-whisper", "model.normalisation": "streaming"}, "'streaming' is for embedders of frames"),
        (_NO_LORA | {"lora.text_energy": 0.5}, "lora.text_energy below 1 confines LoRA, and lora.n_blocks is 0"),
        (_NO_LORA | {"train.stages.second.merge_lora": True}, "lora.n_blocks is 0: there is nothing to merge"),
        (_NO_LORA | _ANCHORED, "anchors text, which nothing changes, because lora.n_blocks is 0"),
        ({"distill.pairs": (1, 2)}, "distill.pairs: 1 is no pair of blocks: write (("),
        ({"distill.layer_map": "list", "distill.pairs": ((1, 0.5),)}, "distill.pairs: (1, 0.5) is no pair"),
    ],
)
def test_values_that_exclude_each_other_are_named(changes, message):
    c = valid()
    for key, value in changes.items():
        change(c, key, value)
    assert message in the_line(config.validate, c)


def test_text_rows_are_free_where_no_objective_reads_them():
    c = valid()
    c.data.text_rows, c.train.accumulate = 3, 2
    config.validate(c)


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
    c.eval.update(likelihood=("new voices",))
    c.eval.noise.update(kinds=("white",), snr_db=(5.0,))
    path = tmp_path / "config.json"
    path.write_text(config.to_json(c))
    again = config.from_json(path)
    assert again.to_dict() == c.to_dict()
    assert json.loads(config.to_json(again)) == json.loads(path.read_text())
    config.validate(again)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise.kinds": ("pink",)}, "unknown kind 'pink' in eval.noise.kinds: valid: babble, white"),
        ({"noise.kinds": ("white",), "noise.snr_db": ()}, "eval.noise.snr_db must be ratios in dB"),
        ({"noise.kinds": ("white",), "noise.snr_db": ("clean",)}, "eval.noise.snr_db must be ratios in dB"),
        (
            {"noise.kinds": ("white",), "noise.sets": ("old",)},
            "eval.noise.sets names 'old', which eval.sets does not",
        ),
        ({"noise.sets": ("new voices",)}, "eval.noise.kinds no noise: name babble or white"),
        ({"noise.kinds": ("white",), "sets": {}}, "eval.sets no set to be heard in it"),
        (
            {"likelihood": ("new voice",)},
            "names 'new voice', which eval.sets does not: did you mean 'new voices'?",
        ),
    ],
)
def test_mistakes_about_noise_and_likelihood(values, message):
    c = valid()
    c.eval.sets = {"new voices": "c.jsonl"}
    config.validate(c)
    for key, value in values.items():
        node, _, name = f"eval.{key}".rpartition(".")
        target = c.eval if node == "eval" else c.eval.noise
        target[name] = ConfigDict(value) if isinstance(value, dict) else value
    assert message in the_line(config.validate, c)
    assert message in the_line(config.validate_eval, c)


def test_a_config_from_before_a_key_gets_its_default(tmp_path):
    c = valid()
    c.data.template_kwargs = {"enable_thinking": False}
    values = json.loads(config.to_json(c))
    del values["lora"]["text_energy"], values["mesh"], values["train"]["stages"]["first"]["merge_lora"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    again = config.from_json(path)
    assert again.lora.text_energy == 1.0 and again.mesh.fsdp == -1
    assert config.to_json(again) == config.to_json(c)
    config.validate(again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the file is not an object"),
        ('{"lora": 3}', "lora is not an object"),
        ('{"train": {"stages": {"first": 3}}}', "train.stages.first is not an object"),
        (
            '{"train": {"stages": {"first": {"stepz": 3}}}}',
            "unknown key train.stages.first.stepz: did you mean 'steps'",
        ),
        ('{"lora": {"rnak": 3}}', "unknown key lora.rnak: did you mean 'rank'?"),
        ('{"lora": {"rank": "three"}}', "Could not override field 'rank'"),
    ],
)
def test_a_workdir_with_a_broken_config_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    assert "is this a workdir of aura-jax train?" in the_line(config.from_json, path)
    path.write_text(text)
    error = the_line(config.from_json, path)
    assert error.startswith(str(path)) and message in error


ALLOWED = ("mesh.", "model.attention", "eval.")


def test_some_keys_of_a_run_can_be_overridden():
    c = valid()
    c.mesh.data, c.model.attention = 8, "cudnn"
    arguments = ["--config.mesh.data=1", "--config.model.attention=xla", "--config.eval.sets={'a': 'b.jsonl'}"]
    changed = config.override(c, arguments, ALLOWED)
    assert (changed.mesh.data, changed.model.attention, changed.eval.sets.to_dict()) == (1, "xla", {"a": "b.jsonl"})
    assert (c.mesh.data, c.model.attention) == (8, "cudnn") and config.override(c, [], ALLOWED) is c


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.lora.rank=8", "lora.rank is part of what the run was trained with: only mesh.*, model.att"),
        ("--config.model.attentio=xla", "unknown key model.attentio: did you mean 'attention'?"),
        ("--config.mesh.data=many", "--config.mesh.data=many: invalid literal for int()"),
        ("--config=configs/smoke.py", "unexpected argument '--config=configs/smoke.py': the run has its config"),
    ],
)  # fmt: skip
def test_the_other_keys_of_a_run_cannot(argument, message):
    assert message in the_line(config.override, valid(), [argument], ALLOWED)
