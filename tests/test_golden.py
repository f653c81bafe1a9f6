"""What the flagship configs shard is what golden files say it is: a change of the table shows in a diff."""

import difflib

import pytest

from tests.golden import write


@pytest.mark.parametrize("name", write.FLAGSHIPS)
def test_the_sharding_of_every_parameter(name):
    path = write.SHARDING / f"{name}.txt"
    golden = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = write.sharding_of(name)
    diff = "".join(difflib.unified_diff(golden.splitlines(True), found.splitlines(True), str(path), "now"))
    assert not diff, f"write it anew with `python -m tests.golden.write`, if this is meant:\n{diff}"


def test_no_golden_file_is_left_of_a_config_that_is_gone():
    assert sorted(path.stem for path in write.SHARDING.glob("*")) == write.FLAGSHIPS


def test_frozen_matrices_are_split_over_the_whole_mesh():
    """A matrix that lies whole on a device, or on half of the mesh, would show as a line without its axes."""
    for name in write.FLAGSHIPS:
        for line in (write.SHARDING / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            path, _, spec = line.partition(": ")
            last = path.rpartition("/")[2]
            if path.startswith(("params/llm/", "teacher/")) and last in ("kernel", "embedding"):
                axes = ("fsdp",) if "/conv" in path else ("fsdp", "tensor")
                assert all(axis in spec for axis in axes), line
