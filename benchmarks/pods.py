"""What the flagship configs need on whole slices of TPUs: `make test-pods`, into benchmarks/results/pods.json.

Each config is compiled for each slice with as many rows a chip as it has on the slice it is made for. Results that are
there already are kept, so that an interrupted run goes on; --again compiles all anew.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
# Config -> slices, and the rows of a chip.
LARGE = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
PLAN = {
    "whisper_large_v3_qwen2_5_7b": (LARGE, 4),
    "whisper_large_v3_turbo_qwen3_8b": (LARGE, 4),
    "whisper_large_v3_llama_3_1_8b": (LARGE, 4),
    "whisper_small_qwen2_5_0_5b": (("v5e:1x1",), 4),
    "whisper_small_qwen2_5_7b_int8": (("v5e:1x1",), 4),
}


def main() -> int:
    """Compiles what is missing, one after another, and returns 0 if every step is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compile what was compiled before, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = {} if args.again or not args.output.is_file() else json.loads(args.output.read_text())["results"]
    for slice_number in range(len(LARGE)):
        for name, (slices, rows) in PLAN.items():
            for topology in slices[slice_number : slice_number + 1]:
                key = f"{name} on {topology}"
                if key not in found:
                    found[key] = compile_one(name, topology, rows)
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    values = {"command": "make test-pods", "results": found}
                    args.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    wrong = {key: faults for key, values in found.items() if (faults := faults_of(values))}
    for key, faults in wrong.items():
        print(f"{key}: {'; '.join(faults)}")
    print(f"{len(found) - len(wrong)} of {len(found)} are as they should be")
    return bool(wrong)


def faults_of(values: dict) -> list[str]:
    """Returns what is wrong with a compiled step.

    It should fit, gather parameters alone, copy no state, and have no loop whose collectives cannot be counted.
    """
    if not values["fits"]:
        return ["does not fit"]
    collectives, donated = values["collectives"], values["donated"]
    faults = [f"gathers {one}" for one in collectives["all_gathers_of_no_parameter"]]
    faults += [f"on logits: {one}" for one in collectives["on_logits"]]
    if n := collectives["loops_of_unknown_length"]:
        faults.append(f"{n} loops of unknown length")
    return faults + (["copies trained state"] if donated["aliased"] < donated["state"] else [])


def compile_one(name: str, topology: str, rows: int) -> dict:
    """Returns what `aura-jax compile` writes; a process of its own, because a compiler keeps what it took."""
    n_chips = 1
    for n in topology.partition(":")[2].split("x"):
        n_chips *= int(n)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [sys.executable, "-m", "aura_jax.cli", "compile", f"--config=configs/{name}.py"]
        command += [f"--config.data.batch_size={rows * n_chips}", "--topology", topology, "--json", str(out)]
        run = subprocess.run(command, cwd=ROOT, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
        found = json.loads(out.read_text())
        del found["seconds"]  # of this machine's compiler: no part of what a slice needs
        return found


if __name__ == "__main__":
    sys.exit(main())
