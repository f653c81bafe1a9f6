"""What answering with the flagship configs needs on a slice of eight TPU chips: into results/answer_pods.json.

`python benchmarks/answer_pods.py` compiles prefill and decode loop of each case, without a TPU and without weights.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "answer_pods.json"
SLICE = "v5e:2x4"
NEW_TOKENS = 256
QWEN, INT8, LLAMA = (
    f"whisper_{name}" for name in ("large_v3_qwen2_5_7b", "small_qwen2_5_7b_int8", "large_v3_llama_3_1_8b")
)
# Config, (data, tensor) of its mesh, rows, merged. Qwen2.5-7B has 4 key/value heads of 28, Llama 3.1 8B has 8 of 32.
CASES = (
    (QWEN, (2, 4), 2, False),
    (QWEN, (1, 8), 1, False),
    (QWEN, (1, 8), 1, True),
    (QWEN, (2, 4), 32, False),
    (INT8, (2, 4), 2, False),
    (INT8, (1, 8), 1, False),
    (LLAMA, (1, 8), 1, False),
    (LLAMA, (1, 8), 1, True),
)


def main() -> int:
    """Compiles all cases and returns 0 if every one is as it should be."""
    found = {}
    for name, (data, tensor), rows, merged in CASES:
        key = f"{name}, data {data} x tensor {tensor}, {rows} rows, adapters {'merged' if merged else 'separate'}"
        found[key] = compile_one(name, data, tensor, rows, merged)
        values = {"command": "python benchmarks/answer_pods.py", "results": found}
        RESULTS.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    wrong = {key: faults for key, values in found.items() if (faults := faults_of(values))}
    for key, faults in wrong.items():
        print(f"{key}: {'; '.join(faults)}")
    return bool(wrong)


def faults_of(values: dict) -> list[str]:
    """Returns what is wrong: the programs should fit, copy no cache, and move little for a token."""
    if not values["fits"]:
        return ["does not fit"]
    cache, token = values["decode"]["cache"], values["decode"]["token"]
    faults = ["copies the cache"] if cache["aliased"] < cache["bytes"] else []
    line = token["roofline"]
    # A gathered weight or cache would be far more than the activations of a token.
    return faults + (["moves weights or cache"] if line["link_bytes"] > 0.05 * line["hbm_bytes"] else [])


def compile_one(name: str, data: int, tensor: int, rows: int, merged: bool) -> dict:
    """Returns what `aura-jax compile` writes; a process of its own, because a compiler keeps what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [sys.executable, "-m", "aura_jax.cli", "compile", f"--config=configs/{name}.py", "--json", str(out)]
        command += ["--topology", SLICE, "--program", "answer", *(["--merged"] if merged else [])]
        command += [f"--config.mesh.data={data}", "--config.mesh.fsdp=1", f"--config.mesh.tensor={tensor}"]
        command += [f"--config.eval.batch_size={rows}", f"--config.eval.max_new_tokens={NEW_TOKENS}"]
        run = subprocess.run(command, cwd=ROOT, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    sys.exit(main())
