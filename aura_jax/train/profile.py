"""A trace of a few steps, for TensorBoard, and where their time went by part of the step."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax

from aura_jax import hosts

# Scopes of an operation's name, the innermost meaning first: what runs on plain text is not speech, whatever block.
_PARTS = (
    ("optimizer", "optimizer"),
    ("teacher", "teacher"),
    ("plain_text", "text objectives"),
    ("reading", "reading of transcripts"),
    ("features", "log-mel"),
    ("heads", "distillation heads"),
    ("lm_head", "LM head"),
    (r"SpeechLLM\.hear|(?:SpeechLLM\.)?embed", "audio embedder"),
    (r"(?:llm|SpeechLLM)\.adapted_blocks", "adapted blocks"),
    (r"(?:llm|SpeechLLM)\.plain_blocks", "upper blocks"),
)
_OTHER = "copies and the rest"
_CONTAINERS = ("while", "conditional", "call")  # their time is that of what they contain
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")


class Profile:
    """Traces steps `start` to `start + n_steps - 1` of a run into `workdir/profile`; 0 steps trace nothing.

    When they are done, `workdir/profile.json` says how long each part of a step kept processors busy: {"step", "steps",
    "seconds": {part: {"forward", "backward"}}}, seconds a step, summed over the processors of this host. Of several
    hosts the first alone traces: those that share a workdir could give their traces one name.
    """

    def __init__(self, workdir: Path, start: int, n_steps: int):
        self._workdir, self._steps = workdir, range(start, start + n_steps)
        self._program: str | None = None

    def before(self, step: int, program: Callable[[], str]) -> None:
        """To be called before each step; `program` returns the compiled step's text."""
        if step in self._steps and self._program is None:
            self._program, self._first = program(), step  # on each host: some backends compile on all of them at once
            if hosts.is_first():
                jax.profiler.start_trace(str(self._workdir / "profile"))

    def after(self, step: int, out: object) -> None:
        """To be called after each step was dispatched; `out` is what it returned."""
        if self._program is not None and step + 1 not in self._steps:
            jax.block_until_ready(out)
            self.close()

    def close(self) -> None:
        """Ends the trace, if the run or the stage ends before its steps do."""
        if self._program is None:
            return
        program, self._program = self._program, None
        if hosts.is_first():
            jax.profiler.stop_trace()
            newest = max((self._workdir / "profile").rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
            found = {"step": self._first + 1, **breakdown(newest, program)}
            (self._workdir / "profile.json").write_text(json.dumps(found, indent=1) + "\n")


def breakdown(trace: Path, program: str) -> dict[str, object]:
    """Returns {"steps", "seconds": {part: {"forward", "backward"}}} of the runs of one program in a trace.

    Args:
      trace: an .xplane.pb file, whose first compiled program is meant: batches of other shapes run other ones.
      program: the text of that program after compilation; its operations carry the scopes they were traced in.
    """
    scopes, containers = {}, set()
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            name = re.search(r'op_name="([^"]*)"', line)
            scopes[match[1]] = name[1] if name else ""
            if match[2] in _CONTAINERS:
                containers.add(match[1])
    module = re.match(r"HloModule ([\w.\-]+)", program)
    events = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                tags = dict(event.stats)
                if "hlo_op" in tags and module and tags.get("hlo_module") == module[1]:
                    events.append((event.start_ns, event.duration_ns, tags))
    if not events:
        return {"steps": 0, "seconds": {}}
    ours = min(events, key=lambda event: event[0])[2]["program_id"]
    events = [event for event in events if event[2]["program_id"] == ours]
    n_steps = len({tags["run_id"] for _, _, tags in events})
    seconds: dict[str, dict[str, float]] = {}
    for _, nanoseconds, tags in events:
        if tags["hlo_op"] not in containers:
            part, way = _part(scopes.get(tags["hlo_op"], ""))
            seconds.setdefault(part, {"forward": 0.0, "backward": 0.0})[way] += nanoseconds / n_steps / 1e9
    return {"steps": n_steps, "seconds": dict(sorted(seconds.items(), key=lambda item: -sum(item[1].values())))}


def _part(scope: str) -> tuple[str, str]:
    way = "backward" if "transpose(" in scope or "rematted" in scope else "forward"
    for pattern, part in _PARTS:
        if re.search(rf"[/(]{pattern}[)/]", scope):
            return part, way
    return _OTHER, way
