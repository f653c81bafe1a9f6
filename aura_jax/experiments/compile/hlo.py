"""What a compiled program moves, read from its HLO text: collectives, and bytes to and from HBM.

The compiler's own cost analysis counts the body of a loop once. Here every instruction counts as often as it runs: a
loop's body times its trip count, however deep loops are nested. Of the branches of a conditional, each counts once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}  # others say it in their name
_ARRAY = re.compile(r"\b(pred|bf16|[suf](?:2|4|8|16|32|64)\w*|c64|c128)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")
# They read and write nothing by themselves, or only what they call does.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")
_FREE += ("after-all", "partition-id", "optimization-barrier", "add-dependency")


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape of a program: bytes without padding, and whether it lies in HBM rather than on the chip."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def n_bytes(self) -> float:
        size = _BYTES.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0]) / 8
        return math.prod(self.dims) * size

    @property
    def hbm_bytes(self) -> float:
        return self.n_bytes if self.in_hbm else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation; `rest` is what follows its operands."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        return [name.lstrip("%") for match in _CALLED.findall(self.rest) for name in match.split(", ")]

    @property
    def n_bytes(self) -> float:
        return sum(array.n_bytes for array in self.arrays)

    @property
    def scope(self) -> str:
        """Where in the source it is from, as the profiler shows it."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      arrays: what it leaves on a chip.
      group: chips that exchange.
      times: how often a step runs it.
      n_bytes: of the whole array that a chip has before or after, of one run.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: int
    times: int
    n_bytes: float
    scope: str

    @property
    def link_bytes(self) -> float:
        """Bytes that a chip sends in all runs, by ring algorithms: what a link must carry at least."""
        if self.kind == "collective-permute":
            return self.times * self.n_bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.n_bytes * (self.group - 1) / self.group


class Module:
    """A program's text.

    Attributes:
      computations: {name: {name of an instruction: instruction}}.
      unknown_trips: loops whose trip count the text does not say.
    """

    def __init__(self, text: str, passes: int = 1):
        """
        Args:
          passes: of each loop whose trip count the text does not say. What such a loop does in one pass is the
            difference between 1 and 0.
        """
        self._passes = passes
        self.computations: dict[str, Computation] = {}
        self._entry = ""
        self.unknown_trips = 0
        body: Computation = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                body = self.computations.setdefault(head[1], {})
                if line.startswith("ENTRY"):
                    self._entry = head[1]
            elif (instruction := _instruction(line)) is not None:
                body[instruction.name] = instruction
        self._times = self._count_runs()

    def _count_runs(self) -> dict[str, int]:
        """Returns how often a step runs each computation; reductions' and fusions' inner ones included."""
        times = dict.fromkeys(self.computations, 0)

        def run(name: str, n: int) -> None:
            times[name] += n
            for instruction in self.computations[name].values():
                per_run = n
                if instruction.opcode == "while":
                    trips = self.trip_count(instruction)
                    self.unknown_trips += trips is None
                    per_run = n * (self._passes if trips is None else trips)
                for called in instruction.called:
                    if called in self.computations:
                        run(called, per_run)

        if self._entry:
            run(self._entry, 1)
        return times

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a while loop runs: as noted by the compiler, or by its condition `counter < constant`."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        if condition is None:
            return None
        instructions = self.computations.get(condition[1], {})
        root = next((x for x in instructions.values() if x.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        limits = [instructions[x] for x in root.operands if x in instructions and instructions[x].opcode == "constant"]
        value = re.fullmatch(r"\d+", limits[0].operands[0]) if limits else None
        return int(value[0]) if value else None

    def collectives(self) -> list[Collective]:
        """Returns every collective of the program, with how often it runs.

        What the compiler cut into a chain of steps, each fused with something else that runs meanwhile, counts once.
        """
        found: list[Collective] = []
        chains: dict[str, Collective] = {}
        for name, computation in self.computations.items():
            for x in computation.values():
                kind = x.opcode.removesuffix("-start")
                if kind not in COLLECTIVES or not self._times[name]:
                    continue
                one = self._collective(kind, x, computation, self._times[name])
                chain = re.search(r'chain_id="(\d+)"', x.rest)
                if chain is None:
                    found.append(one)
                elif chain[1] not in chains or one.times < chains[chain[1]].times:
                    chains[chain[1]] = one
        return [*found, *chains.values()]

    def _collective(self, kind: str, x: Instruction, computation: Computation, times: int) -> Collective:
        operands = [array for o in x.operands if o in computation for array in computation[o].arrays]
        arrays = x.arrays
        if x.opcode.endswith("-start") and len(arrays) > len(operands):
            arrays = arrays[len(operands) : 2 * len(operands)]  # a start returns its operands, results and contexts
        size = max(sum(a.n_bytes for a in arrays), sum(a.n_bytes for a in operands))
        return Collective(kind, arrays, _group_size(x.rest), times, size, x.scope)

    def hbm_bytes(self) -> float:
        """Returns the bytes that instructions read from and write to HBM in one step: an estimate.

        Every instruction reads its operands and writes its result, a fusion only what it slices from them; what the
        compiler keeps on the chip is left out.
        """
        inner = {called for c in self.computations.values() for x in c.values() for called in _inner(x)}
        return sum(
            self._times[name] * self._traffic(x, computation)
            for name, computation in self.computations.items()
            if name not in inner
            for x in computation.values()
        )

    def _traffic(self, x: Instruction, computation: Computation) -> float:
        if x.opcode in _FREE or x.opcode.endswith("-done"):
            return 0.0
        operands = [computation[o].arrays for o in x.operands if o in computation]
        written = sum(array.hbm_bytes for array in x.arrays)
        if x.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if x.opcode == "dynamic-update-slice":
            return 2 * sum(array.hbm_bytes for array in operands[1])
        if x.opcode.endswith("-start"):
            return sum(array.hbm_bytes for array in x.arrays)  # the operand and the result
        inside = self._inside(x)
        if inside is None:
            return written + sum(array.hbm_bytes for arrays in operands for array in arrays)
        read = 0.0
        for number, arrays in enumerate(operands):
            whole = sum(array.hbm_bytes for array in arrays)
            read += min(whole, self._read_of(inside, _parameter(inside, number))) if whole else 0.0
        return read + _written_by(inside, x.arrays)

    def _inside(self, x: Instruction) -> Computation | None:
        return self.computations.get(x.called[0]) if x.opcode == "fusion" and x.called else None

    def _read_of(self, inside: Computation, name: str) -> float:
        """Bytes that a fusion reads of one of its values: only slices, if nothing else reads it; none to pass it on."""
        total = 0.0
        for user in inside.values():
            for number, operand in enumerate(user.operands):
                if operand != name or user.opcode in ("tuple", *COLLECTIVES):
                    continue
                within = self._inside(user)
                if user.opcode == "bitcast" or _retiles(user, within):
                    total += self._read_of(inside, user.name)
                elif within is not None:
                    total += self._read_of(within, _parameter(within, number))
                elif number == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.n_bytes
                elif number != 0 or user.opcode != "dynamic-update-slice":
                    return math.inf
        return total


def _retiles(x: Instruction, inside: Computation | None) -> bool:
    """Whether a fusion inside of a fusion only sees an array in other tiles: a copy of it onto itself."""
    in_place = "output_to_operand_aliasing={{}: (0, {})}" in x.rest
    return in_place and inside is not None and any(y.is_root and y.opcode == "copy" for y in inside.values())


def _inner(x: Instruction) -> list[str]:
    """The computations that are part of an instruction, such as those of a fusion or a reduction."""
    return [] if x.opcode in ("while", "conditional", "call", "async-start") else x.called


def _parameter(inside: Computation, number: int) -> str:
    return next((x.name for x in inside.values() if x.opcode == "parameter" and x.operands == (str(number),)), "")


def _written_by(inside: Computation, arrays: Sequence[Array]) -> float:
    """Bytes that a fusion writes: of an array updated in place, the update; nothing of one that it passes on."""
    root = next((x for x in inside.values() if x.is_root), None)
    names = root.operands if root is not None and root.opcode == "tuple" else (root.name,) if root is not None else ()
    total = 0.0
    for name, array in zip(names, arrays, strict=False):
        x = inside[name]
        if x.opcode == "dynamic-update-slice":
            total += min(array.hbm_bytes, inside[x.operands[1]].n_bytes)
        elif x.opcode != "parameter" and x.opcode not in COLLECTIVES:
            total += array.hbm_bytes
    return total


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    call = re.match(r" ?([\w\-]+)\(", line[end:])
    if call is None:
        return None
    opening = end + call.end() - 1
    closing = _closing(line, opening)
    operands = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    # Older texts repeat the shape before an operand's name.
    names = tuple(o.strip().split(" ")[-1].lstrip("%") for o in _split(operands))
    return Instruction(match[2], _arrays(line[start:end]), call[1], names, line[closing + 1 :], bool(match[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _split(operands: str) -> Iterator[str]:
    """Splits at the commas that are not inside of brackets."""
    depth, start = 0, 0
    for i, char in enumerate(operands):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            yield operands[start:i]
            start = i + 1
    if operands[start:].strip():
        yield operands[start:]


@functools.lru_cache(maxsize=65536)
def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        # S(0), or nothing, is HBM; S(1) and above are memories on the chip.
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), not re.search(r"S\([1-9]", layout))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _group_size(rest: str) -> int:
    """Returns the chips of a group, in any of the ways that a program writes groups."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)?\s*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    return 1
