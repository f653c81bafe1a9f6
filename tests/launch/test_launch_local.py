"""launch/run.sh and launch/local.sh: what every host executes, and several hosts on one machine."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, is_alive, until

# Says where it stands, then waits for a signal as a run does; `saved` when it came.
WAITS = """
trap 'echo "$AURA_JAX_HOST TERM" >>saved; exit 75' TERM
trap 'echo "$AURA_JAX_HOST INT" >>saved; exit 75' INT
echo "$AURA_JAX_HOST $$" >>ready
while :; do sleep 0.02; done
"""


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_run_hands_arguments_and_exit_code_on(stage, code):
    stage.command("aura-jax", f'printf "%s\\n" "$@" >arguments; exit {code}')
    assert stage.run("run.sh", "--workdir", "a folder", "--config=x.py").returncode == code
    assert stage.lines("arguments") == ["train", "--workdir", "a folder", "--config=x.py"]


def test_run_becomes_the_training_process(stage):
    stage.command("aura-jax", "echo $$")
    process = stage.start("run.sh")
    assert int(process.communicate()[0]) == process.pid


def test_run_takes_the_repositorys_environment_if_there_is_no_other(stage):
    (stage.folder / "repository" / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "run.sh", stage.folder / "repository" / "launch")
    stage.command("aura-jax", "echo found")
    (stage.folder / "repository" / ".venv").mkdir()
    (stage.folder / "bin").rename(stage.folder / "repository" / ".venv" / "bin")
    run = stage.run(str(stage.folder / "repository" / "launch" / "run.sh"), PATH="/usr/bin:/bin")
    assert (run.returncode, run.stdout) == (0, "found\n")


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (1, 1), (2, 254), (75, 75)])
def test_under_srun_a_mistake_is_the_highest_code(stage, code, seen):
    stage.command("aura-jax", f"exit {code}")
    assert stage.run("run.sh", SLURM_PROCID="0").returncode == seen


def test_under_srun_a_signal_to_the_whole_group_lets_the_run_save(stage):
    stage.command("aura-jax", WAITS)
    process = stage.start("run.sh", SLURM_PROCID="0")
    until(lambda: stage.lines("ready"))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert stage.lines("saved") == [" TERM"]


def test_every_host_is_told_its_place(stage):
    stage.command("aura-jax", 'echo "$AURA_JAX_HOST of $AURA_JAX_HOSTS at $AURA_JAX_COORDINATOR: $*" >>told')
    run = stage.run("local.sh", "3", "--config=x.py", "--workdir", "w")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    told = [
        re.fullmatch(r"(\d) of 3 at (127\.0\.0\.1:\d+): train --config=x.py --workdir w", line)
        for line in stage.lines("told")
    ]
    assert sorted(match[1] for match in told if match) == ["0", "1", "2"]
    assert len({match[2] for match in told if match}) == 1
    assert list(stage.folder.glob("aura-jax-hosts.*")) == []


def test_only_host_0_writes_to_the_terminal(stage):
    stage.command("aura-jax", 'echo "out $AURA_JAX_HOST"; echo "error $AURA_JAX_HOST" >&2')
    run = stage.run("local.sh", "2")
    assert (run.stdout, run.stderr) == ("out 0\n", "error 0\n")


def test_a_run_that_saved_goes_on_until_it_is_done(stage):
    stage.command("aura-jax", "echo >>attempts$AURA_JAX_HOST; exit $(next codes$AURA_JAX_HOST)")
    for host in range(2):
        stage.write(f"codes{host}", "75", "75", "0")
    run = stage.run("local.sh", "2", AURA_JAX_RETRIES="0")
    assert run.returncode == 0
    assert [len(stage.lines(f"attempts{host}")) for host in range(2)] == [3, 3]
    assert run.stderr.count("exit code 75: going on") == 2


def test_a_users_mistake_is_not_retried(stage):
    stage.command("aura-jax", "echo >>attempts; echo 'error: no such config' >&2; exit 2")
    run = stage.run("local.sh", "1")
    assert (run.returncode, run.stderr) == (2, "error: no such config\n")
    assert len(stage.lines("attempts")) == 1


def test_one_hosts_mistake_ends_all_and_is_shown(stage):
    stage.command("aura-jax", f'if [ $AURA_JAX_HOST -eq 0 ]; then {WAITS}\nfi; echo "error: no disk" >&2; exit 2')
    run = stage.run("local.sh", "2")
    assert run.returncode == 2
    assert "host 1: error: no disk\n" in run.stderr and "host 1 ended with exit code 2" in run.stderr


def test_when_a_host_dies_the_others_are_killed_and_the_culprit_named(stage):
    dies = "until [ -s ready ]; do sleep 0.02; done; echo 'out of memory' >&2; exit 9"
    hangs = "trap '' TERM INT; sleep 1000 & echo $! >>ready; wait"
    stage.command("aura-jax", f"echo >>attempts; if [ $AURA_JAX_HOST -eq 1 ]; then {dies}; else {hangs}; fi")
    run = stage.run("local.sh", "3", AURA_JAX_RETRIES="0")
    assert run.returncode == 9
    assert "host 1: out of memory\n" in run.stderr
    assert "host 1 ended with exit code 9: the others are killed" in run.stderr
    assert "given up after 0 retries" in run.stderr and "Killed" not in run.stderr
    (logs,) = stage.folder.glob("aura-jax-hosts.*")
    assert str(logs) in run.stderr and "out of memory" in (logs / "host-1.log").read_text()
    until(lambda: not any(is_alive(int(pid)) for pid in stage.lines("ready")))


def test_deaths_are_retried_a_bounded_number_of_times(stage):
    stage.command("aura-jax", "echo >>attempts; kill -KILL $$")
    run = stage.run("local.sh", "1", AURA_JAX_RETRIES="2")
    assert run.returncode == 137
    assert len(stage.lines("attempts")) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_host_and_ends_the_launcher_after_they_saved(stage, number):
    stage.command("aura-jax", WAITS)
    process = stage.start("local.sh", "3")
    until(lambda: len(stage.lines("ready")) == 3)
    process.send_signal(number)
    assert process.wait(60) == 75
    name = number.name.removeprefix("SIG")
    assert sorted(stage.lines("saved")) == [f"{host} {name}" for host in range(3)]
    assert len(stage.lines("ready")) == 3
    assert not any(is_alive(int(line.split()[1])) for line in stage.lines("ready"))


def test_one_host_that_is_told_to_stop_does_not_stop_the_launcher(stage):
    save = "trap 'touch told; exit 75' TERM; echo $$ >>ready; until [ -e told ]; do sleep 0.02; done; exit 75"
    stage.command("aura-jax", f"[ ! -e told ] || exit 0; {save}")
    process = stage.start("local.sh", "2")
    until(lambda: len(stage.lines("ready")) == 2)
    os.kill(int(stage.lines("ready")[0]), signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_run_stopped_before_it_notes_signals_is_not_started_again(stage):
    stage.command("aura-jax", "echo >>ready; exec sleep 1000")
    process = stage.start("local.sh", "2")
    until(lambda: len(stage.lines("ready")) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(stage.lines("ready")) == 2


@pytest.mark.parametrize("number", ["", "0", "two", "--config=x.py"])
def test_a_number_of_processes_is_asked_for(stage, number):
    run = stage.run("local.sh", number)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1 and f"'{number}' is no number of processes" in run.stderr


def test_the_variables_are_those_of_the_program():
    from aura_jax import hosts

    assert all(name in (LAUNCH / "local.sh").read_text() for name in hosts.VARIABLES)
    assert Path(LAUNCH / "run.sh").stat().st_mode & 0o111
