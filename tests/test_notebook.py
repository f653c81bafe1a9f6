"""The notebooks run top to bottom, one of them on the real small models, and are the pairs of their sources."""

import json
import re
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from matplotlib.figure import Figure

from aura_jax import config
from aura_jax.report import notebook

COLAB = Path(__file__).parents[1] / "colab"
NAMES = sorted(path.stem for path in COLAB.glob("*.py"))

REAL = "distill_small"  # the one that runs on the real small models

# Few steps, few shapes to compile, nothing computed ahead.
SMALL = """
from configs import quickstart

def get_config():
    c = quickstart.get_config()
    c.model.matmul_dtype = ""
    c.model.update({models!r})
    c.lora.update(n_blocks=2, rank=8, alpha=8.0, text_energy=1.0)
    c.teacher.precompute = False
    c.distill.target_norm = "none"
    c.data.train = (({train!r}, 1.0),)
    c.data.update(buckets=(3.84,), batch_size=2, speeds=(1.0,), validation_values=("am_liam",), text_pool="")
    c.train.stages.distil.steps = c.train.stages.joint.steps = 2
    c.train.stages.joint.objectives.text_anchor = 0.0
    c.train.update(log_every=1, eval_rows=4, steps=4)
    c.eval.sets = {{"few": {test!r}}}
    c.eval.update(batch_size=16, max_new_tokens=8, text_heldout="", text_questions="")
    return c
"""

# What must have been printed or shown, in this order, and the number of pictures.
WANTED = {
    "distill_small": (
        "4 steps of 2 clips, 4 steps in, few +4 +\\d, report.html, adapter_model.safetensors, the same words",
        3,
    ),
    "own_data": (
        "341 clips, all good, train +\\d+ clips, what is computed is padding, 4 steps in, never heard, peft.zip",
        3,
    ),
    "port_to_pytorch": (
        "peft: .* answers: yes, hf: .* answers: yes, merged: .* answers: yes, hf .* 0 ",
        1,
    ),
}
# Standard error has progress bars, and two lines that tell how it goes.
PROGRESS = re.compile(r"\d+%\|.*\d+/\d+ \[|^step \d+: validation |clips are outside data\.min_seconds")


def _manifest(path: Path, rows: list[dict], home: Path) -> str:
    path.write_text("".join(json.dumps({**row, "audio": str(home / row["audio"])}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small(name, sample_data, tmp_path, monkeypatch) -> None:
    """The environment of a notebook's short execution: a workdir, and a config that names a few clips."""
    home = sample_data / "commands"
    read = lambda name: [json.loads(line) for line in (home / name).read_text().splitlines()]
    short = [row for row in read("train.jsonl") if row["seconds"] < 2]
    held_out = [row for row in short if row["voice"] == "am_liam"][:4]
    train = [row for row in short if row["voice"] != "am_liam"][:24]
    values = {
        "models": {} if name == REAL else {"llm": "random-llama-tiny", "teacher": "random-whisper-tiny"},
        "train": _manifest(tmp_path / "train.jsonl", [*train, *held_out], home),
        "test": _manifest(tmp_path / "test.jsonl", read("test_new_voices.jsonl")[:4], home),
    }
    (tmp_path / "small.py").write_text(SMALL.format(**values))
    monkeypatch.setenv("AURA_JAX_CONFIG", str(tmp_path / "small.py"))
    monkeypatch.setenv("AURA_JAX_WORKDIR", str(tmp_path / "runs" / "run"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait: beside other tests, for minutes


def test_every_notebook_is_tested():
    assert NAMES == sorted(WANTED) == sorted(path.stem for path in COLAB.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_has_the_same_cells(name):
    source, pair = jupytext.read(COLAB / f"{name}.py"), nbformat.read(COLAB / f"{name}.ipynb", 4)
    cells = lambda of: [(cell.cell_type, cell.source) for cell in of.cells]
    assert cells(source) == cells(pair)


def test_all_install_in_the_same_way():
    cells = [jupytext.read(COLAB / f"{name}.py").cells for name in NAMES]
    assert len({next(cell.source for cell in of if "REPOSITORY" in cell.source) for of in cells}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name, small):
    book = jupytext.read(COLAB / f"{name}.py")
    resources = {"metadata": {"path": str(COLAB)}}
    nbclient.NotebookClient(book, timeout=550, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    data = [output.data for output in outputs if "data" in output]
    shown = "\n".join(
        output.text if output.output_type == "stream" else output.data.get("text/markdown", "")
        for output in outputs
        if output.get("name") != "stderr"
    )
    patterns, n_pictures = WANTED[name]
    assert re.search(patterns.replace(", ", ".*?"), shown, re.DOTALL), shown
    assert sum("image/png" in of for of in data) == n_pictures
    assert sum("<audio" in of.get("text/html", "") for of in data) >= 2

    told = "".join(output.text for output in outputs if output.get("name") == "stderr")
    lines = [line.strip() for line in re.split(r"[\r\n]", re.sub(r"\x1b\[\d*[A-Za-z]", "", told))]
    assert [line for line in lines if line and not PROGRESS.search(line)] == []


def test_curves_follow_a_run_and_end_with_all_of_it(tmp_path, monkeypatch):
    shown = []

    class Handle:
        def update(self, picture):
            shown.append(picture)

    monkeypatch.setattr(notebook, "display", lambda *args, **kwargs: Handle())
    drawn = []
    monkeypatch.setattr(
        notebook.figures, "learning_curves", lambda metrics, stages: drawn.append((dict(metrics), stages)) or Figure()
    )
    c = config.default()
    c.train.schedule = ("distil", "joint")
    c.train.stages.update(distil=config.stage(2, 1e-3, {"distill": 1.0}), joint=config.stage(3, 1e-3, {"lm": 1.0}))
    with notebook.live_curves(c, tmp_path, every=0.01), (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 2, "loss": 1.5, "loss/distill": 1.5, "loss/distill/block_02": 1.5}\n{"validation/wer": 1}\n'
        )
        file.flush()
        while not drawn:
            time.sleep(0.01)
        file.write('{"step": 4, "loss": 3.0, "loss/lm": 3.0}\n{"step": 6, "lo')
    metrics, stages = drawn[-1]
    assert metrics == {"step": [2, 4], "loss": [1.5, 3.0], "loss/distill": [1.5, None], "loss/lm": [None, 3.0]}
    assert stages == [{"name": "distil", "first": 0, "end": 2}, {"name": "joint", "first": 2, "end": 5}]
    assert len(shown) == len(drawn) >= 2


def test_a_clip_shows_what_was_missed(sample_data):
    path = next((sample_data / "commands" / "train").glob("*.ogg"))
    html = notebook.clip(path, "turn on <all> lights", "turn off <all> lights", "a & b").data
    assert "<del>on</del>" in html and "<ins>off</ins>" in html and "&lt;all&gt;" in html and "a &amp; b" in html
    assert html.count("data:audio/ogg;base64,") == 1 and html.count("data:image/png;base64,") == 1


def test_a_table_puts_numbers_to_the_right():
    text = notebook.table(("said", "WER"), [("a | b", "1.5"), ("c", "20 (0 to 30)")]).data
    assert text == "| said | WER |\n|:---|---:|\n| a \\| b | 1.5 |\n| c | 20 (0 to 30) |"
