"""The loop: stages in order, from the newest checkpoint to the last step.

Where a run starts: a workdir without checkpoints starts at step 0; otherwise at the newest checkpoint. Step i takes
batch i of the plan, so the step count is the position in the data.
"""

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aura_jax import checkpoint, sharding, system
from aura_jax import config as config_lib
from aura_jax.config import Config
from aura_jax.data.batch import Batch
from aura_jax.errors import UserError
from aura_jax.models.lora import LoRAConfig
from aura_jax.train import null_space, teacher
from aura_jax.train import step as step_lib
from aura_jax.train.evaluator import Evaluator
from aura_jax.train.inputs import Inputs
from aura_jax.train.log import Log

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on

# Keys that may differ between the runs that share a workdir: they change nothing that was computed so far.
_MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_",
    "train.checkpoint_every",
    "train.keep",
    "train.max_skipped",
    "train.profile_",
    "eval.",
    "data.workers",
    "data.threads",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the steps taken in all, whether a signal cut it short, and the last metrics."""

    step: int
    interrupted: bool
    metrics: dict[str, float]


def train(config: Config, workdir: Path) -> Result:
    """Trains, or goes on training, in `workdir`.

    Raises:
      UserError: for a mistake in the configuration or the data, a workdir of another run, or gradients that stay
        non-finite.
    """
    config_lib.validate(config)
    _claim(workdir, config)
    mesh = checkpoint.system_mesh(config)
    with jax.set_mesh(mesh), _Signals() as signals:
        return _Run(config, workdir, mesh, signals).run()


class _Run:
    """One call of `train`: what its stages share."""

    def __init__(self, config: Config, workdir: Path, mesh: Mesh, signals: "_Signals"):
        self.config, self.workdir, self.mesh, self.signals = config, workdir, mesh, signals
        self.built = system.build(config)
        self.stages = config_lib.stages(config)
        self.last_step = config_lib.total_steps(config)
        self.inputs = Inputs(self.built, workdir)
        self.variables = system.initial_variables(self.built, mesh)
        self.own = {p for p in sharding.flatten(self.variables) if not p.startswith(("params/llm/", "teacher/"))}
        lora = self.built.model.config.lora
        assert lora is not None
        self.meta = {
            "llm": str(config.model.llm),
            "llm_fingerprint": checkpoint.fingerprint(self.variables["params"]["llm"]),
            "lora": dataclasses.asdict(lora),
        }
        if "teacher" in self.variables:
            self.meta["teacher_fingerprint"] = checkpoint.fingerprint(self.variables["teacher"])
        self.checkpoints = checkpoint.Checkpoints(workdir, config)
        self.evaluator = Evaluator(self.inputs.validation_rows, workdir)
        self.constants = step_lib.Constants()

    def run(self) -> Result:
        newest = self.checkpoints.newest()
        start = 0 if newest is None else newest[0]
        log = Log(self.workdir, start, self.last_step)
        try:
            if newest is not None:
                self._check_frozen(newest[1])
                if start >= self.last_step:
                    log.say(f"{self.workdir}: all {start} steps are done")
                    return Result(start, False, {})
                log.say(f"resuming {self.workdir} at step {start}")
            for line in self.inputs.remarks:
                log.say(line)
            self._prepare_teacher(log)
            self._find_null_space(log)
            return self._run_stages(start, newest, log)
        finally:
            self.checkpoints.close()
            log.close()

    def _check_frozen(self, meta: dict) -> None:
        for key in ("llm_fingerprint", "teacher_fingerprint"):
            if key in self.meta and meta.get(key) != self.meta[key]:
                name = key.partition("_")[0]
                raise UserError(
                    f"{self.workdir} was trained with another {name}: model.{name} {self.config.model[name]} has "
                    f"fingerprint {self.meta[key]}, the checkpoint wants {meta.get(key)}"
                )

    def _prepare_teacher(self, log: Log) -> None:
        """Precomputes the teacher's states if so configured, and takes the statistics that standardise them."""
        if not any(stage.objectives.distill for _, stage in self.stages):
            return
        if self.config.teacher.precompute:
            self.inputs.precompute_teacher(self.variables["teacher"], self.meta["teacher_fingerprint"])
        if self.config.distill.target_norm == "standardise":
            path = self.workdir / "target_statistics.npz"
            samples = None if path.is_file() else self.inputs.teacher_samples(self.variables["teacher"], self.mesh)
            statistics, baseline = teacher.statistics(samples, path)
            statistics = jax.device_put(statistics, sharding.replicated(self.mesh))
            self.constants = dataclasses.replace(self.constants, statistics=statistics)
            scores = ", ".join(f"{x:.2f}" for x in baseline)
            log.say(f"predicting the mean of the raw teacher blocks would score a cosine of {scores}")

    def _find_null_space(self, log: Log) -> None:
        """Confines LoRA to directions that text hardly uses, if so configured."""
        energy = self.config.lora.text_energy
        if energy < 1:
            log.say("looking for the directions that text hardly uses")
            text = self.inputs.plain_text()
            bases = null_space.bases(self.built, self.variables["params"], text, energy, self.mesh)
            widths = {path.split("/")[-2]: basis.shape[-1] for path, basis in bases.items()}
            log.say("LoRA reads, at most: " + ", ".join(f"{name} {n} directions" for name, n in widths.items()))
            bases = jax.device_put(bases, sharding.replicated(self.mesh))
            self.constants = dataclasses.replace(self.constants, null_space=bases)
            self.variables = sharding.join(null_space.confine(sharding.flatten(self.variables), bases), {})

    def _run_stages(self, start: int, newest: Any, log: Log) -> Result:
        first, state, metrics, rates = 0, None, {}, {}
        for name, stage in self.stages:
            if stage.merge_lora:
                self._keep(state)
                self._merge_lora()
                state = None
            paths = sharding.flatten({k: v for k, v in self.variables.items() if k != "teacher"})
            new_rates = sharding.learning_rates(paths, stage.trainable or self.config.trainable)
            if state is None or set(new_rates) != set(rates):
                self._keep(state)
                trained, _ = sharding.split(self.variables, new_rates)
                state = step_lib.new_state(self.config, trained, first, self.mesh)
            rates = new_rates
            self.own |= set(rates)
            end = min(first + stage.steps, self.last_step)
            if start < end:
                if newest is not None:
                    state, newest = self._restore(newest[0], state), None
                frozen = sharding.split(self.variables, rates)[1]
                log.stage(name)
                span = (first, max(start, first), end)
                state, metrics, stopped = self._run_stage(stage, span, state, frozen, rates, log)
                if stopped:
                    return Result(int(state.step), True, metrics)
            first = end
        assert state is not None
        return Result(int(state.step), False, metrics)

    def _keep(self, state: step_lib.State | None) -> None:
        """Takes over what was trained so far, before the division into trained and frozen changes."""
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
        self.variables = sharding.join(own, self.variables)
        return dataclasses.replace(rest, trained={path: own[path] for path in state.trained})

    def _merge_lora(self) -> None:
        """Folds LoRA into the LLM and drops it: from here on the model has no adapters."""
        lora = self.built.model.config.lora
        assert lora is not None
        adapters = self.variables.pop("lora")["llm"]
        self.variables["params"]["llm"] = merge(self.variables["params"]["llm"], adapters, lora)
        merged = {f"params/llm/{p.removesuffix('/a')}/kernel" for p in sharding.flatten(adapters) if p.endswith("/a")}
        self.own = {path for path in self.own if not path.startswith("lora/")} | merged

    def _run_stage(
        self,
        stage: Config,
        span: tuple[int, int, int],
        state: step_lib.State,
        frozen: dict,
        rates: dict[str, float],
        log: Log,
    ) -> tuple[step_lib.State, dict[str, float], bool]:
        """Takes the steps of a stage: `span` is (its first step, the step to start at, the step to end before)."""
        first, start, end = span
        c = self.config.train
        run_step = step_lib.jit_step(self.built, stage, first, rates, self.mesh)
        active = step_lib.active_objectives(stage)
        batches = self.inputs.batches(active, start)
        on_cpu = jax.default_backend() == "cpu"
        pending: tuple[int, Any, Batch, float] | None = None
        metrics: dict[str, float] = {}
        clock = time.perf_counter()
        try:
            for step in range(start, end):
                if step == c.profile_start and c.profile_steps:
                    jax.profiler.start_trace(str(self.workdir / "profile"))
                batch = next(batches)
                state, out = run_step(state, frozen, self.constants, self.inputs.to_mesh(batch, self.mesh))
                if on_cpu:
                    # With several CPU devices, jax deadlocks when many steps are in flight.
                    jax.block_until_ready(out)
                if c.profile_steps and step + 1 == c.profile_start + c.profile_steps:
                    jax.block_until_ready(out)
                    jax.profiler.stop_trace()
                now = time.perf_counter()
                seconds, clock = now - clock, now
                # Step N is dispatched before the metrics of step N - 1 are read: the device never waits for us.
                if pending is not None:
                    metrics = self._report(active, *pending, log)
                pending = (step + 1, out, batch, seconds)
                last = step + 1 == end
                stop = self.signals.received and not last
                if last or stop or (step + 1) % c.checkpoint_every == 0 or _due(c.eval_every, step + 1):
                    metrics = self._report(active, *pending, log)
                    pending = None
                    if last or stop or (step + 1) % c.checkpoint_every == 0:
                        self._save(step + 1, state)
                    if not stop and (_due(c.eval_every, step + 1) or (last and end == self.last_step)):
                        self._evaluate(step + 1, state, frozen, log)
                    clock = time.perf_counter()
                if stop:
                    log.say(f"{self.signals.received} received: saved at step {step + 1}; the same command resumes")
                    return state, metrics, True
        finally:
            batches.close()
        return state, metrics, False

    def _report(
        self,
        active: frozenset[str],
        step: int,
        out: dict[str, jax.Array],
        batch: Batch,
        seconds: float,
        log: Log,
    ) -> dict[str, float]:
        values = {name: float(x) for name, x in jax.device_get(out).items()}
        skipped = int(values.pop("skipped_in_a_row"))
        values |= {
            "step_seconds": seconds,
            "tokens_per_second": int((batch.segment_BxT != 0).sum()) * jax.process_count() / seconds,
            "audio_seconds_per_second": int(batch.n_samples_BxK.sum()) / 16000 * jax.process_count() / seconds,
            "skipped": skipped,
        }
        log.progress(step, values)
        if step % self.config.train.log_every == 0 or step == 1 or skipped:
            log.record(step, values)
        if skipped:
            rows = self.inputs.row_names(active, step - 1)
            with (self.workdir / "nonfinite.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "rows": rows}) + "\n")
            if skipped >= self.config.train.max_skipped:
                raise UserError(
                    f"gradients were not finite {skipped} steps in a row, up to step {step}: the rows are in "
                    f"{self.workdir / 'nonfinite.jsonl'}; lower the learning rate or look at these clips"
                )
        return values

    def _save(self, step: int, state: step_lib.State) -> None:
        own = self._own(state)
        self.checkpoints.save(step, own, dataclasses.replace(state, trained={}), {**self.meta, "own": sorted(own)})

    def _evaluate(self, step: int, state: step_lib.State, frozen: dict, log: Log) -> None:
        variables = sharding.join(state.trained, frozen)
        student = {name: variables[name] for name in ("params", "lora") if name in variables}
        scores = self.evaluator(self.built, student, step)
        if scores is None:
            return
        log.record(step, {f"validation/{name}": value for name, value in scores.items()})
        log.say(f"step {step}: validation " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        best = self.checkpoints.best()
        if best is None or scores["wer"] <= best["validation"]["wer"]:
            own = self._own(state)
            self.checkpoints.save_best(step, own, {**self.meta, "own": sorted(own), "validation": scores})


def merge(llm: dict, lora: dict, config: LoRAConfig) -> dict:
    """Returns the LLM's variables with W + scale A B in place of every adapted W, in the dtype of W."""
    flat, deltas = sharding.flatten(llm), sharding.flatten(lora)
    for path in [p.removesuffix("/a") for p in deltas if p.endswith("/a")]:
        kernel = flat[f"{path}/kernel"]
        delta = jnp.einsum("lir,lro->lio", deltas[f"{path}/a"], deltas[f"{path}/b"]) * config.scale
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return sharding.unflatten(flat)


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _claim(workdir: Path, config: Config) -> None:
    """Writes config.json; raises UserError if the workdir belongs to a run with another configuration."""
    path = workdir / "config.json"
    if path.is_file():
        old, new = json.loads(path.read_text()), json.loads(config_lib.to_json(config))
        changed = [key for key in _differing(old, new) if not key.startswith(_MAY_CHANGE)]
        if changed:
            raise UserError(f"{workdir} belongs to a run with another {changed[0]}: choose another --workdir")
    elif workdir.is_dir() and any(workdir.iterdir()) and not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} is not empty and holds no run: choose another --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(config_lib.to_json(config))
        partial.replace(path)


def _differing(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differing(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.removesuffix(".")


class _Signals:
    """Notes SIGINT and SIGTERM, so that the loop can save before it ends; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = ""

    def __enter__(self) -> "_Signals":
        # Only the main thread may set handlers; elsewhere (in a notebook's worker, say) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._old = {}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
