"""What the README says is what was measured, and what it points to is there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from aura_jax import config, system
from aura_jax.train.inputs import Inputs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_committed_results():
    code = "import tables; assert [page for page in tables.PAGES if tables.with_tables(page) != page.read_text()] == []"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_command_for_your_own_speech_finds_its_data(tiny_config, sample_data, tmp_path, monkeypatch):
    (command,) = re.findall(r"^aura-jax train (.*)$", README, re.MULTILINE)
    arguments = shlex.split(command)
    for name in ("configs", "sample_data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    row = json.loads((sample_data / "commands" / "train.jsonl").read_text().splitlines()[0])
    (tmp_path / "my").mkdir()
    manifest = tmp_path / "my" / "train.jsonl"
    manifest.write_text(json.dumps({"audio": str(sample_data / "commands" / row["audio"]), "text": row["text"]}) + "\n")

    c = config.load([argument for argument in arguments if argument.startswith("--config")])
    c.model.llm, c.model.teacher = tiny_config().model.llm, tiny_config().model.teacher
    c.lora.n_blocks = 2
    assert Inputs(system.build(c), tmp_path / "run").remarks == []
