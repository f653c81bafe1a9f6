"""The files of launch/ by the tools and schemas of those who read them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from aura_jax.errors import USER_MISTAKE
from aura_jax.train import loop
from tests.launch.conftest import LAUNCH

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# Of https://slurm.schedmd.com/sbatch.html.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "signal": r"(B:)?[A-Z]+(@\d+)?",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
}


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(json.loads(Path(__file__).with_name("jobset-v0.12.0.json").read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_say_how_to_call_them(script):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    run = subprocess.run([shellcheck, "--shell=bash", str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    subprocess.run(["bash", "-n", str(script)], check=True)
    head = script.read_text().split("\nset -u")[0]
    assert re.search(rf"^#   (.* )?launch/{re.escape(script.name)} ", head, re.MULTILINE)


def test_slurms_options_are_documented_ones():
    lines = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        name, equals, value = line.removeprefix("--").partition("=")
        pattern = SBATCH[name]
        assert re.fullmatch(pattern, value) if pattern else not equals, line


def test_the_jobset_is_what_its_schema_says(jobset, schema):
    assert [f"{list(error.absolute_path)}: {error.message}" for error in schema.iter_errors(jobset)] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("restartPolicy: Never", "restartPolcy: Never"),
        ("backoffLimit: 0", "backoffLimit: none"),
        ("action: FailJobSet", "action: Fail"),
        ("operator: In", "operators: In"),
        ("mountPath: /runs", "path: /runs"),
    ],
)
def test_the_schema_sees_mistakes(schema, old, new):
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    assert text.count(old) == 1
    assert not schema.is_valid(yaml.safe_load(text.replace(old, new)))


def test_the_jobset_tells_exit_codes_apart(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["containerName"] == container["name"]
    assert set(codes["values"]) == {USER_MISTAKE, loop.RESUME_EXIT_CODE}
    assert job["parallelism"] == job["completions"]
    mistake, preempted = jobset["spec"]["failurePolicy"]["rules"]
    # As Kubernetes writes it; JobSet searches with a regular expression.
    says = "Container train for pod default/a-hosts-0-3-x failed with exit code {} matching FailJob rule at index 0"
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    assert re.search(pattern, says.format(2))
    assert not any(re.search(pattern, says.format(code)) for code in (20, 75, 137))
    assert preempted["action"].endswith("IgnoreMaxRestarts") and "onJobFailureMessagePatterns" not in preempted
    assert {volume["name"] for volume in job["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }


def test_the_image_holds_what_the_launchers_need():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert {"aura_jax", "configs", "launch", "pyproject.toml"} <= copied
    assert all((LAUNCH.parent / source).exists() for source in copied)
    assert lines[-1] == 'ENTRYPOINT ["launch/run.sh"]'


def test_the_page_names_every_launcher_and_its_links_lead_somewhere():
    page = LAUNCH.parent / "docs" / "pods.md"
    text = page.read_text()
    assert [path.name for path in LAUNCH.iterdir() if f"launch/{path.name}" not in text] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (page.parent / link).exists()] == []
