"""launch/slurm.sbatch and launch/tpu_vm.sh with stand-ins for srun, scontrol, gcloud and docker."""

import signal

import pytest

from tests.launch.conftest import until

SRUN = """
echo "$*" >>srun
while [[ $1 == --* ]]; do shift; done
cd "$OLDPWD" && SLURM_PROCID=0 "$@"
"""


@pytest.fixture
def slurm(stage):
    """A cluster whose job is run by the test: `codes` of a stage are what the run ends with, in turn."""
    stage.command("srun", SRUN)
    stage.command("scontrol", 'echo "$*" >>scontrol')
    stage.command("aura-jax", 'echo "$*" >>trained; exit $(next codes)')
    return lambda **variables: stage.run("slurm.sbatch", "--config=x.py", SLURM_JOB_ID="12", **variables)


def test_slurm_ends_with_the_run(stage, slurm):
    stage.write("codes", "0")
    assert slurm(SLURM_CPUS_PER_TASK="8").returncode == 0
    assert stage.lines("trained") == ["train --config=x.py"]
    assert stage.lines("srun") == ["--kill-on-bad-exit=0 --wait=60 launch/run.sh --config=x.py"]
    assert stage.lines("scontrol") == []


def test_slurm_puts_a_run_that_saved_back_into_the_queue(stage, slurm):
    stage.write("codes", "75")
    assert slurm().returncode == 75
    assert stage.lines("scontrol") == ["requeue 12"]
    assert len(stage.lines("trained")) == 1


def test_slurm_leaves_a_users_mistake(stage, slurm):
    stage.write("codes", "2")
    assert slurm().returncode == 2
    assert (len(stage.lines("trained")), stage.lines("scontrol")) == (1, [])


def test_slurm_retries_deaths_a_bounded_number_of_times(stage, slurm):
    stage.write("codes", "137", "1", "137", "137")
    run = slurm(AURA_JAX_RETRIES="2")
    assert (run.returncode, len(stage.lines("trained")), stage.lines("scontrol")) == (137, 3, [])
    assert "given up after 2 retries" in run.stderr


# Describes the queued resource by the lines of `states`, and executes on this machine what goes to the hosts.
GCLOUD = r"""
printf '%s\n' "${*//$'\n'/ }" >>gcloud
case "$*" in
  *" describe "*)
    state=$(next states)
    if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi
    echo "$state" ;;
  *" ssh "*) command=${*: -1}; bash -c "${command#--command=}" ;;
esac
"""
# One container; it ends with the next of `codes`, which may be to wait until it is told to save.
DOCKER = r"""
echo "$*" >>docker
case $1 in
  inspect) [ -e container ] ;;
  run) for argument in "$@"; do printf '%s\n' "$argument"; done >container ;;
  rm) rm -f container ;;
  wait)
    code=$(next codes)
    if [ "$code" = saves ]; then touch waits; until [ -e killed ]; do sleep 0.02; done; code=75; fi
    echo "$code" ;;
  kill) touch killed ;;
esac
"""
SLICE = {"ZONE": "here", "TYPE": "v5litepod-16", "RUNTIME": "v2", "IMAGE": "image:1", "POLL_SECONDS": "0"}
SLICE |= {"SETUP": "echo >>mounted"}


@pytest.fixture
def cloud(stage):
    """Starts launch/tpu_vm.sh, with two arguments that a shell on the way must not touch, or runs it to its end."""
    stage.command("gcloud", GCLOUD)
    stage.command("docker", DOCKER)
    stage.command("sudo", 'exec "$@"')
    arguments = ("mine", "--workdir", "/mnt/a run", '--config.data.train=(("gs://b/$x", 1.0),)')
    return lambda do, **variables: do("tpu_vm.sh", *arguments, **SLICE, **variables)


def test_a_slice_is_asked_for_and_every_host_runs_the_image(stage, cloud):
    stage.write("states", "NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    stage.write("codes", "0")
    run = cloud(stage.run)
    assert run.returncode == 0
    (create,) = [line for line in stage.lines("gcloud") if " create " in line]
    assert create == (
        "compute tpus queued-resources create mine --zone=here --node-id=mine --accelerator-type=v5litepod-16 "
        "--runtime-version=v2 --spot"
    )
    assert [line.partition(" --command")[0] for line in stage.lines("gcloud") if " ssh " in line] == [
        "compute tpus tpu-vm ssh mine --zone=here --worker=all"
    ] * 2
    assert len(stage.lines("mounted")) == 1
    assert stage.lines("container")[-4:] == [
        "image:1",
        "--workdir",
        "/mnt/a run",
        '--config.data.train=(("gs://b/$x", 1.0),)',
    ]
    assert "queued-resources delete mine --zone=here --force" in run.stderr


def test_a_slice_that_was_taken_away_is_asked_for_again(stage, cloud):
    stage.write("states", "ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "ACTIVE")
    stage.write("codes", "255", "0")
    run = cloud(stage.run, AURA_JAX_RETRIES="0", SPOT="")
    assert run.returncode == 0
    done = [line.split()[3] for line in stage.lines("gcloud") if " queued-resources " in line]
    assert done == ["describe", "describe", "describe", "delete", "describe", "create", "describe"]
    assert not any("--spot" in line for line in stage.lines("gcloud"))


def test_a_connection_that_comes_back_finds_the_container(stage, cloud):
    stage.command("docker", DOCKER.replace("inspect) [ -e container ]", "inspect) true"))
    stage.write("states", "ACTIVE")
    stage.write("codes", "0")
    assert cloud(stage.run).returncode == 0
    assert [line.split()[0] for line in stage.lines("docker")] == ["stop", "rm", "inspect", "wait"]


def test_on_a_slice_that_saved_the_run_goes_on(stage, cloud):
    stage.write("states", "ACTIVE", "ACTIVE")
    stage.write("codes", "75", "0")
    assert cloud(stage.run, AURA_JAX_RETRIES="0").returncode == 0
    assert sum(line.startswith("run ") for line in stage.lines("docker")) == 2


@pytest.mark.parametrize(("code", "runs"), [("2", 1), ("137", 3)])
def test_on_a_slice_mistakes_end_the_run_and_deaths_are_bounded(stage, cloud, code, runs):
    stage.write("states", *["ACTIVE"] * 10)
    stage.write("codes", *[code] * 10)
    assert cloud(stage.run, AURA_JAX_RETRIES="2").returncode == int(code)
    assert sum(line.startswith("run ") for line in stage.lines("docker")) == runs


def test_a_request_that_fails_ends_the_launcher(stage, cloud):
    stage.write("states", "FAILED")
    assert cloud(stage.run).returncode == 1
    assert stage.lines("docker") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_the_run_after_saving(stage, cloud, number):
    stage.write("states", "ACTIVE")
    stage.write("codes", "saves")
    process = cloud(stage.start)
    until(lambda: (stage.folder / "waits").exists())
    process.send_signal(number)
    assert process.wait(60) == 75
    assert "kill --signal=TERM aura-jax" in stage.lines("docker")


def test_a_signal_while_waiting_for_a_slice_ends_the_launcher(stage, cloud):
    stage.write("states", *["WAITING_FOR_RESOURCES"] * 100_000)
    process = cloud(stage.start)
    until(lambda: stage.lines("gcloud"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
