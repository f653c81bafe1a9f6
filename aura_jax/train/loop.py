"""The loop: stages in order, from the newest checkpoint to the last step.

Where a run starts: a workdir without checkpoints starts at step 0; otherwise at the newest checkpoint. Step i takes
batch i of the plan, so the step count is the position in the data.
"""

import contextlib
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aura_jax import checkpoint, hosts, machine, sharding, system
from aura_jax import config as config_lib
from aura_jax.audio.features import SAMPLE_RATE
from aura_jax.config import Config
from aura_jax.data.batch import Batch
from aura_jax.errors import UserError
from aura_jax.models.lora import merge
from aura_jax.train import objectives, stages
from aura_jax.train import step as step_lib
from aura_jax.train.evaluator import Evaluator
from aura_jax.train.inputs import Inputs
from aura_jax.train.log import Log
from aura_jax.train.prepare import prepare
from aura_jax.train.profile import Profile
from aura_jax.train.signals import Signals
from aura_jax.train.workdir import agree, claim

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on

_A_WAIT = 0.01  # of a step's time: below it, the batch was ready


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the steps taken in all, whether a signal cut it short, and the last metrics.

    Attributes:
      seconds: that training took, with those before an interruption.
    """

    step: int
    interrupted: bool
    metrics: dict[str, float]
    seconds: float


def train(config: Config, workdir: Path) -> Result:
    """Trains, or goes on training, in `workdir`.

    Raises:
      UserError: for a mistake in the configuration or the data, a workdir of another run, or gradients that stay
        non-finite.
    """
    config_lib.validate(config)
    agree(config)
    claim(workdir, config)
    mesh = checkpoint.system_mesh(config)
    with jax.set_mesh(mesh), Signals(mesh) as signals:
        return _Run(config, workdir, mesh, signals).run()


def begin(
    config: Config, workdir: Path, leaves: Mapping[str, np.ndarray], *, llm_fingerprint: str | None = None
) -> None:
    """Makes `workdir` that of a run at step 0 which starts from given variables; `train` goes on from there.

    Args:
      leaves: path -> array, of variables that are not the LLM's own; the others start as they always do.
      llm_fingerprint: of the LLM that they belong to; None: unknown.

    Raises:
      UserError: as `train`, and for another LLM.
    """
    config_lib.validate(config)
    claim(workdir, config)
    mesh = checkpoint.system_mesh(config)
    with jax.set_mesh(mesh), Signals(mesh) as signals:
        _Run(config, workdir, mesh, signals).begin(leaves, llm_fingerprint)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A step that was dispatched: its number, what it returns, its batch, its seconds, those it waited for data."""

    step: int
    out: dict[str, jax.Array]
    batch: Batch
    seconds: float
    waited: float


class _Run:
    """One call of `train`: what its stages share.

    Attributes:
      variables: all of them, but for those that the state of the current stage trains.
      own: paths of all variables that are not base weights, trained at present or not.
      meta: what every checkpoint says of the run.
    """

    def __init__(self, config: Config, workdir: Path, mesh: Mesh, signals: Signals):
        self._started = time.perf_counter()
        self._seconds_before = 0.0
        self.config, self.workdir, self.mesh, self.signals = config, workdir, mesh, signals
        stages.check_rows(config, mesh)
        self.built = hosts.together(lambda: system.build(config))
        self.stages: list[tuple[str, Any]] = config_lib.stages(config)
        self.last_step = config_lib.total_steps(config)
        self.inputs = hosts.together(lambda: Inputs(self.built, workdir))
        hosts.check_same(
            self.inputs.digest(), "data.train reads otherwise than on host 0: give all hosts the same clips"
        )
        self.variables = system.initial_variables(self.built, mesh)
        paths = set(sharding.flatten(self.variables))
        self.rates = stages.rates_of_stages(config, self.stages, {p for p in paths if not p.startswith("teacher/")})
        self.own = {p for p in paths if not p.startswith(system.BASE)}
        lora = self.built.model.config.lora
        self.meta = {
            "llm": str(config.model.llm),
            "lora": dataclasses.asdict(lora) if lora is not None else None,
            **checkpoint.fingerprints(self.variables["params"]),
        }
        if "teacher" in self.variables:
            self.meta["teacher_fingerprint"] = checkpoint.fingerprint(self.variables["teacher"])
        self.checkpoints = checkpoint.Checkpoints(workdir, config)
        self.evaluator = Evaluator(self.inputs.validation_rows, workdir)
        self.constants = step_lib.Constants()
        self._waits: list[bool] = []  # of the steps since the last record: did they wait for data
        self._spent: defaultdict[str, float] = defaultdict(float)  # seconds of this call, by what they went into

    def run(self) -> Result:
        newest = self.checkpoints.newest()
        start = 0 if newest is None else newest[0]
        log = Log(self.workdir, start, self.last_step)
        try:
            for line in self.checkpoints.remarks:
                log.say(line)
            if newest is not None:
                self._check_frozen(newest[1])
                self._seconds_before = newest[1]["seconds"]
                if start > self.last_step or (start == self.last_step and self.evaluator.has(start)):
                    log.say(f"{self.workdir}: all {start} steps are done")
                    return Result(start, False, {}, self._seconds_before)
                log.say(f"resuming {self.workdir} at step {start}")
            for line in self.inputs.remarks:
                log.say(line)
            self.constants, self.variables = prepare(
                self.built,
                self.inputs,
                self.variables,
                self.meta.get("teacher_fingerprint"),
                self.workdir,
                self.mesh,
                log.say,
            )
            log.command(start)
            self._spent["preparing"] = time.perf_counter() - self._started
            result = self._run_stages(start, newest, log)
            log.record(result.step, {f"seconds/{what}": seconds for what, seconds in self._spent.items()})
            return result
        finally:
            self.checkpoints.close()
            log.close()

    def begin(self, leaves: Mapping[str, np.ndarray], llm_fingerprint: str | None) -> None:
        """Saves step 0 with `leaves` in place of what was drawn."""
        try:
            checkpoint.check_llm(self.config, self.meta["llm_fingerprint"], llm_fingerprint)
            drawn = sharding.flatten(self.variables)
            placed = {path: jax.device_put(leaf, drawn[path].sharding) for path, leaf in leaves.items()}
            self.variables = sharding.join(placed, self.variables)
            trained, _ = sharding.split(self.variables, self.rates[0])
            self._save(0, step_lib.new_state(self.config, trained, 0, self.mesh))
        finally:
            self.checkpoints.close()

    def _check_frozen(self, meta: dict) -> None:
        for key in ("llm_fingerprint", "encoder_fingerprint", "teacher_fingerprint"):
            if key in self.meta and meta.get(key) != self.meta[key]:
                name = key.partition("_")[0]
                raise UserError(
                    f"{self.workdir} was trained with another {name}: model.{name} {self.config.model[name]} has "
                    f"fingerprint {self.meta[key]}, the checkpoint wants {meta.get(key)}"
                )

    def _run_stages(self, start: int, newest: Any, log: Log) -> Result:
        first, state, metrics, trained = 0, None, {}, set()
        for (name, stage), rates in zip(self.stages, self.rates, strict=True):
            if stage.merge_lora:
                self._keep(state)
                self._merge_lora()
                state = None
            if state is None or set(rates) != trained:
                self._keep(state)
                trained = set(rates)
                leaves, self.variables = sharding.split(self.variables, rates)
                state = step_lib.new_state(self.config, leaves, first, self.mesh)
                del leaves  # the state holds float32 copies
                self.own |= trained
            end = min(first + stage.steps, self.last_step)
            # Also at the end of this stage: what it left, the next one starts from.
            if newest is not None and start <= end:
                state, newest = self._restore(start, state), None
            if start < end:
                log.stage(name)
                span = (first, max(start, first), end)
                state, metrics, stopped = self._run_stage(stage, span, state, rates, log)
                if stopped:
                    return Result(int(state.step), True, metrics, self._seconds())
            first = end
        assert state is not None
        seconds = self._seconds()
        if not self.evaluator.has(self.last_step):
            self._evaluate(self.last_step, state, log)
        return Result(int(state.step), False, metrics, seconds)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _keep(self, state: step_lib.State | None) -> None:
        """Takes back what was trained so far, before the division into trained and frozen changes."""
        if state is not None:
            self.variables = sharding.join(state.trained, self.variables)

    def _own(self, state: step_lib.State) -> dict[str, jax.Array]:
        """Returns all variables that are not base weights, trained at present or not: what a checkpoint must hold."""
        flat = sharding.flatten(self.variables) | state.trained
        return {path: flat[path] for path in self.own}

    def _restore(self, step: int, state: step_lib.State) -> step_lib.State:
        own, rest = self.checkpoints.restore(
            step,
            checkpoint.abstract_like(self._own(state)),
            checkpoint.abstract_like(dataclasses.replace(state, trained={})),
        )
        trained = {path: own.pop(path) for path in state.trained}
        self.variables = sharding.join(own, self.variables)
        return dataclasses.replace(rest, trained=trained)

    def _merge_lora(self) -> None:
        """Folds LoRA into the LLM and drops it: from here on the model has no adapters."""
        lora = self.built.model.config.lora
        assert lora is not None
        adapters = self.variables.pop("lora")["llm"]
        self.variables["params"]["llm"] = merge(self.variables["params"]["llm"], adapters, lora)
        self.own = stages.after_merge(self.own)

    def _run_stage(
        self,
        stage: Config,
        span: tuple[int, int, int],
        state: step_lib.State,
        rates: dict[str, float],
        log: Log,
    ) -> tuple[step_lib.State, dict[str, float], bool]:
        """Takes the steps of a stage: `span` is (its first step, the step to start at, the step to end before)."""
        first, start, end = span
        c = self.config.train
        run_step = step_lib.jit_step(self.built, stage, first, rates, self.mesh)
        active = step_lib.active_objectives(stage)
        batches = self.inputs.batches(active, start)
        profile = Profile(self.workdir, c.profile_start, c.profile_steps)
        on_cpu = jax.default_backend() == "cpu"
        answers = bool(active & objectives.ANSWERS)  # before it is taught any, a model's answers are noise
        pending: _Taken | None = None
        metrics: dict[str, float] = {}
        clock = time.perf_counter()
        try:
            for step in range(start, end):
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                arguments = (state, self.variables, self.constants, self.inputs.to_mesh(batch))
                profile.before(step, lambda a=arguments: run_step.lower(*a).compile().as_text())
                state, out = run_step(*arguments)
                if on_cpu:
                    # With several CPU devices, jax deadlocks when many steps are in flight.
                    jax.block_until_ready(out)
                profile.after(step, out)
                # A checkpoint is written while the step after it runs, which counts as taken once it is there: a death
                # loses the steps of one interval at most.
                self.checkpoints.wait()
                now = time.perf_counter()
                seconds, clock = now - clock, now
                self._spent["steps"] += seconds
                # Step N is dispatched before the metrics of step N - 1 are read: the device never waits for us.
                if pending is not None:
                    metrics = self._report(active, pending, log)
                # The first batch of a stage is read while nothing else can be done.
                pending = _Taken(step + 1, out, batch, seconds, waited if step > start else 0.0)
                last = step + 1 == end
                stop = self.signals.stop() and not last
                evaluates = answers and bool(c.eval_every) and (step + 1) % c.eval_every == 0
                if last or stop or (step + 1) % c.checkpoint_every == 0 or evaluates:
                    metrics = self._report(active, pending, log)
                    pending = None
                    if last or stop or (step + 1) % c.checkpoint_every == 0:
                        with self._timed("checkpoints"):
                            self._save(step + 1, state)
                    if evaluates and not stop:
                        self._evaluate(step + 1, state, log)
                    clock = time.perf_counter()
                if stop:
                    log.say(f"{self.signals.received} received: saved at step {step + 1}; the same command resumes")
                    return state, metrics, True
        finally:
            batches.close()
            profile.close()
        return state, metrics, False

    def _report(self, active: frozenset[str], taken: "_Taken", log: Log) -> dict[str, float]:
        step, batch, seconds = taken.step, taken.batch, taken.seconds
        values = {name: float(x) for name, x in jax.device_get(taken.out).items()}
        skipped = int(values.pop("skipped_in_a_row"))
        values |= {
            "step_seconds": seconds,
            "tokens_per_second": int((batch.segment_BxT != 0).sum()) / self.inputs.share / seconds,
            "audio_seconds_per_second": int(batch.n_samples_BxK.sum()) / SAMPLE_RATE / self.inputs.share / seconds,
            "peak_memory_gib": machine.peak_memory_gib(),
            "skipped": skipped,
        }
        log.progress(step, values)
        self._waits.append(taken.waited / seconds > _A_WAIT)
        if step % self.config.train.log_every == 0 or step == 1 or skipped:
            log.record(step, values | {"steps_since_record": len(self._waits), "steps_that_waited": sum(self._waits)})
            self._waits.clear()
        if skipped:
            if hosts.is_first():
                rows = self.inputs.row_names(active, step - 1)
                with (self.workdir / "nonfinite.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "rows": rows}) + "\n")
            if skipped >= self.config.train.max_skipped:
                raise UserError(
                    f"gradients were not finite {skipped} steps in a row, up to step {step}: the rows are in "
                    f"{self.workdir / 'nonfinite.jsonl'}; lower the learning rate or look at these clips"
                )
        return values

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - start

    def _save(self, step: int, state: step_lib.State) -> None:
        meta = {**self.meta, "seconds": self._seconds()}
        self.checkpoints.save(step, self._own(state), dataclasses.replace(state, trained={}), meta)

    def _evaluate(self, step: int, state: step_lib.State, log: Log) -> None:
        variables = sharding.join(state.trained, self.variables)
        student = {name: variables[name] for name in ("params", "lora") if name in variables}
        with self._timed("validation"):
            scores = self.evaluator(self.built, student, step)
        if scores is None:
            return
        log.record(step, {f"validation/{name}": value for name, value in scores.items()})
        log.say(f"step {step}: validation " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        best = self.checkpoints.best()
        if best is None or scores["wer"] <= best["validation"]["wer"]:
            self.checkpoints.save_best(step, self._own(state), {**self.meta, "validation": scores})
