"""`compile`: what is read from a program's text, the roofline, mistakes, and real compilations for TPUs, with none."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aura_jax import assets, cli, config, libtpu, sharding
from aura_jax.errors import UserError
from aura_jax.experiments.bench.flops import Cost
from aura_jax.experiments.compile import chips, hlo, program, roofline, run, shapes

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[2]
FLAGSHIPS = sorted(path.stem for path in (ROOT / "configs").glob("whisper_*.py"))
SMOKE = f"--config={ROOT / 'configs' / 'smoke.py'}"

# A loop of 3 in a loop of 24; the inner one's length is in its condition, the outer one's in a note of the compiler.
NESTED = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p.0: bf16[24,8,128], p.1: s32[]) -> bf16[8,128] {
  %p.0 = bf16[24,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,128}
}

%inner_condition (t: (s32[], f32[64])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%inner_body (t.1: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t.1 = (s32[], f32[64]{0}) parameter(0)
  %x.1 = f32[64]{0} get-tuple-element(%t.1), index=1
  %sum.1 = f32[64]{0} all-reduce(%x.1), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="inner/sum"}
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %out.1 = (s32[], f32[64]{0}) tuple(%i.1, %sum.1)
}

%outer_condition (t.2: (s32[], f32[64])) -> pred[] {
  %t.2 = (s32[], f32[64]{0}) parameter(0)
  ROOT %never.read = pred[] custom-call(%t.2), custom_call_target="opaque"
}

%outer_body (t.3: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t.3 = (s32[], f32[64]{0}) parameter(0)
  %w = bf16[24,8,128]{2,1,0:T(8,128)(2,1)} constant({...})
  %n = s32[] get-tuple-element(%t.3), index=0
  %part = bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%fused
  %whole = bf16[8,512]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={1}, metadata={op_name="outer/w"}
  ROOT %loop.1 = (s32[], f32[64]{0}) while(%t.3), condition=%inner_condition, body=%inner_body
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %start = s32[] constant(0)
  %pair = (s32[], f32[64]{0}) tuple(%start, %x)
  %loop = (s32[], /*index=1*/f32[64]{0}) while(%pair), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"24"}}
  %y = f32[64]{0} get-tuple-element(%loop), index=1
  %begun = (f32[64]{0}, f32[256]{0}) all-gather-start(%y), replica_groups=mesh['a'=2,'b'=4], \
device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %done = f32[256]{0} all-gather-done(%begun)
  ROOT %shard = f32[64]{0} reduce-scatter(%done), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""

# One gather that the compiler cut into a chain, each step of it fused with something else.
CHAIN = """\
%first (p.0: f32[4]) -> f32[16] {
  %p.0 = f32[4]{0} parameter(0)
  ROOT %g.0 = f32[16]{0} all-gather(%p.0), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
}

%second (p.1: f32[4], p.2: f32[16]) -> (f32[16], f32[16]) {
  %p.1 = f32[4]{0} parameter(0)
  %p.2 = f32[16]{0} parameter(1)
  %g.1 = f32[16]{0} all-gather(%p.1), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
  ROOT %both = (f32[16]{0}, f32[16]{0}) tuple(%g.1, %p.2)
}

ENTRY %main (x: f32[4]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  %one = f32[16]{0} fusion(%x), kind=kCustom, calls=%first
  %two = (f32[16]{0}, f32[16]{0}) fusion(%x, %one), kind=kCustom, calls=%second
  ROOT %out = f32[16]{0} get-tuple-element(%two), index=0
}
"""


def test_collectives_count_as_often_as_they_run():
    module = hlo.Module(NESTED)
    found = {one.scope or one.kind: one for one in module.collectives()}
    assert module.unknown_trips == 0 and len(module.collectives()) == 4
    inner, outer = found["inner/sum"], found["outer/w"]
    assert (inner.kind, inner.times, inner.group, inner.n_bytes) == ("all-reduce", 24 * 3, 4, 64 * 4)
    assert inner.link_bytes == 72 * 2 * 256 * 3 / 4
    assert (outer.kind, outer.times, outer.group, outer.n_bytes) == ("all-gather", 24, 4, 8 * 512 * 2)
    assert outer.link_bytes == 24 * 8192 * 3 / 4
    last, scatter = found["all-gather"], found["reduce-scatter"]
    assert (last.times, last.group, last.n_bytes, last.arrays[0].dims) == (1, 4, 1024, (256,))
    assert (scatter.times, scatter.n_bytes, scatter.link_bytes) == (1, 1024, 1024 * 3 / 4)


def test_hbm_bytes_are_what_is_sliced_and_not_what_stays_on_the_chip():
    # A loop's step: the slice and its index are read, and the slice written on the chip; it is gathered from there,
    # 8 KiB; the inner loop reads and writes 256 bytes three times.
    loop = 8 * 128 * 2 + 4 + 8192 + 3 * 2 * 256
    # After them: a gather that reads 256 bytes and writes 1 KiB, and a scatter the other way round.
    assert hlo.Module(NESTED).hbm_bytes() == 24 * loop + 2 * (256 + 1024)


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    module = hlo.Module(NESTED.replace("known_trip_count", "another_note"))
    assert module.unknown_trips == 1
    assert {one.times for one in module.collectives() if one.kind == "all-reduce"} == {3}


def test_a_gather_that_was_cut_into_a_chain_counts_once():
    module = hlo.Module(CHAIN)
    (one,) = module.collectives()
    assert (one.kind, one.times, one.n_bytes) == ("all-gather", 1, 64)
    assert module.hbm_bytes() == 0  # what is passed on is not read, and the links bring the rest


def test_the_roofline_is_the_slowest_of_three():
    chip = chips.CHIPS["v5e"]
    line = roofline.roofline(chip, 4, must=3 * 4 * 197e12, does=4 * 4 * 197e12, hbm_bytes=819e9, link_bytes=400e9)
    assert line.seconds == {"compute": 4.0, "hbm": 1.0, "links": 2.0}
    assert (line.bound, line.step, line.mfu) == ("compute", 4.0, 0.75)
    assert roofline.roofline(chip, 1, 0, 0, 819e9, 400e9).bound == "links"


def test_rematerialisation_runs_forward_passes_again():
    parts = {
        "adapted blocks, frozen": Cost(2, 2),
        "adapted blocks, LoRA": Cost(1, 2),
        "upper blocks, attention": Cost(5, 10),
        "LM head": Cost(7, 7, 7),
        "teacher": Cost(100),
    }
    must = 4 + 3 + 15 + 14 + 100
    assert roofline.executed(parts, "none") == must + 7
    assert roofline.executed(parts, "dots") == must + 7 + 5
    assert roofline.executed(parts, "full") == must + 7 + 2 + 1 + 5


def test_shapes_are_those_of_the_models_and_need_no_download(monkeypatch):
    monkeypatch.setattr(shapes, "hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    for name in FLAGSHIPS:
        c = config.load([f"--config={ROOT / 'configs' / name}.py"])
        with shapes.build(c) as built:
            llm, whisper = built.model.config.llm, built.teacher_config
            assert whisper is not None and llm.n_blocks >= c.lora.n_blocks
    # Of the published sizes: parameters in all, from the shapes alone.
    c = config.load([f"--config={ROOT / 'configs' / 'whisper_large_v3_qwen2_5_7b.py'}"])
    with shapes.build(c) as built:
        abstract = program._variables(built, merged=False)
        count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        assert count(abstract["params"]["llm"]) == 7_615_616_512  # as the model card has it
        assert count(abstract["teacher"]) == 636_968_960


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", r"unknown topology 'v5e:3x3': .*known are v5e: 1x1 2x2 .*; v5p: 2x2x1 "),
        ("v9:2x2", "unknown topology 'v9:2x2'"),
        ("v5e", "unknown topology 'v5e': write KIND:SHAPE"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UserError, match=message) as caught:
        chips.topology(name)
    assert "\n" not in str(caught.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(libtpu, "installed", lambda: False)
    with pytest.raises(UserError, match=r"install the extra `tpu` \(pip install 'aura-jax\[tpu\]'\)"):
        chips.topology("v5e:2x2")


def test_libtpu_is_told_that_there_is_no_tpu_vm_unless_somebody_said_what_there_is(monkeypatch):
    for name in libtpu._ANSWERS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    monkeypatch.setattr(libtpu, "installed", lambda: False)
    libtpu.settle()
    assert "TPU_SKIP_MDS_QUERY" not in os.environ
    monkeypatch.setattr(libtpu, "installed", lambda: True)
    libtpu.settle()
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1" and os.environ["TPU_WORKER_HOSTNAMES"] == "host-0,host-1"


def test_every_known_topology_has_a_device_for_each_chip():
    for chip in chips.CHIPS.values():
        for shape in chip.shapes:
            devices = chips.topology(f"{chip.name}:{shape}").devices
            assert len(devices) == np.prod([int(n) for n in shape.split("x")])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.mesh.fsdp=3"], "mesh data=1, fsdp=3, tensor=1 needs 3 devices, and there are 4: change mesh"),
        (["--config.data.batch_size=6"], "data.batch_size 6 is not a multiple of 4"),
        (["--stage", "third"], "no stage 'third' in train.schedule: valid: distil, joint"),
    ],
)
def test_what_does_not_divide_is_one_line(overrides, message, capsys, tmp_path):
    out = tmp_path / "out.json"
    argv = ["compile", SMOKE, "--topology", "v5e:2x2", "--json", str(out), "--config.data.text_rows=4", *overrides]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "reason",
    [
        "RESOURCE_EXHAUSTED: ... memory required for HLO temporaries (20.25G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded by 4.50G.",
    ],
)
def test_too_little_hbm_says_how_much_is_missing_and_what_to_change(reason):
    c = config.load([SMOKE, "--config.data.batch_size=8"])
    found = run._refused(c, reason, chips.CHIPS["v5e"], 4)
    assert found["compiles"] and not found["fits"]
    assert found["memory"]["missing"] == 4.5 * 2**30
    assert (
        found["mend"]
        == "try model.remat='full', train.accumulate=2, a smaller data.batch_size, or more or larger chips"
    )
    other = run._refused(c, "INTERNAL: something else", chips.CHIPS["v5e"], 4)
    assert not other["compiles"] and other["reason"] == "INTERNAL: something else"


def test_a_real_program_scanned_over_blocks_gathers_each_blocks_weight():
    """Pure FSDP by hand: rows and weights over the same chips, a scan of 5 in which the weight is gathered."""
    mesh = sharding.make_mesh(1, 4, 1, devices=chips.topology("v5e:2x2").devices)
    place = lambda *shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def forward(x, w):
        body = lambda h, w: (sharding.keep_rows(jnp.tanh(h @ w)), None)
        return jax.lax.scan(body, sharding.keep_rows(x), w)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        arguments = (
            place(512, 1024, spec=PartitionSpec(sharding.BATCH_AXES)),
            place(5, 1024, 1024, spec=PartitionSpec(None, "fsdp")),
        )
        module = hlo.Module(jax.jit(forward).lower(*arguments).compile().as_text())
    gathers = [one for one in module.collectives() if one.kind == "all-gather"]
    assert module.unknown_trips == 0
    assert sum(one.times * one.n_bytes for one in gathers) == 5 * 1024 * 1024 * 2
    assert {one.group for one in gathers} == {4}


def compiled(capsys, tmp_path, *argv: str) -> dict:
    out = tmp_path / "out.json"
    code = cli.main(["compile", *argv, "--json", str(out)])
    captured = capsys.readouterr()
    found = json.loads(out.read_text())
    assert code == 0, captured.out
    assert "at best" in captured.out and "Traceback" not in captured.err
    return found


def test_answering_where_heads_do_not_divide_copies_no_cache_and_gathers_neither_it_nor_weights(capsys, tmp_path):
    llm = tmp_path / "llm"
    shutil.copytree(assets.resolve("random-llama-tiny"), llm, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(shape | {"vocab_size": 512}))
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=4"]
    short = ["--config.data.max_seconds=1", "--config.eval.batch_size=2", "--config.eval.max_new_tokens=4"]
    argv = (SMOKE, f"--config.model.llm={llm}", "--topology", "v5e:2x2", "--program", "answer", *mesh, *short)
    found = compiled(capsys, tmp_path, *argv)
    assert found["fits"] and found["kv_heads"] == {"of_the_llm": 2, "split": False}
    decode, token = found["decode"], found["decode"]["token"]
    assert decode["loops_of_unknown_length"] == 1  # until the answers end
    assert decode["cache"]["aliased"] >= decode["cache"]["bytes"] > 0
    # What is exchanged are activations of one token; a block's smallest kernel alone has 8 KiB.
    assert set(token["collectives"]) == {"all-gather", "all-reduce"}
    assert token["collectives"]["all-gather"]["bytes"] < 2**12
    assert token["roofline"]["link_bytes"] < 2**14 < token["roofline"]["hbm_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--program", "answer", "--stage", "joint"], "--stage is of training: leave it out"),
        (["--merged"], "--merged is of answering: leave it out"),
    ],
)
def test_what_is_of_the_other_program_is_refused(arguments, message, capsys, tmp_path):
    argv = ["compile", SMOKE, "--topology", "v5e:2x2", "--json", str(tmp_path / "out.json"), *arguments]
    assert cli.main(argv) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.slow  # half a minute of a compiler
def test_the_smoke_config_compiles_whole_for_four_chips(capsys, tmp_path):
    argv = (SMOKE, "--topology", "v5e:2x2", "--config.data.text_rows=4", "--config.teacher.precompute=False")
    found = compiled(capsys, tmp_path, *argv)
    assert found["compiles"] and found["fits"] and found["stage"] == "joint"
    assert found["donated"]["aliased"] >= found["donated"]["state"] > 0
    assert found["collectives"]["loops_of_unknown_length"] == 0 and found["collectives"]["on_logits"] == []
    assert found["memory"]["total"] < 2**30
    assert found["roofline"]["bound"] in ("compute", "hbm", "links")
    assert found["flops"]["does"] > found["flops"]["must"] > 0


@pytest.mark.slow  # a minute or two of a compiler, each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["whisper_large_v3_turbo_qwen3_8b", "whisper_small_qwen2_5_7b_int8"])
def test_a_flagship_config_compiles_whole_for_eight_chips(name, capsys, tmp_path):
    """The largest, and the one in int8; `make test-pods` compiles them all, for the slices they are made for.

    All of a config but its rows, which are short: kernels for long ones take a compiler several times as long.
    """
    short = ["--config.data.batch_size=8", "--config.data.row_tokens=128", "--config.data.row_clips=1"]
    short += ["--config.data.max_seconds=2", "--config.train.loss_chunk=128", "--config.mesh.data=1"]
    short += ["--config.train.accumulate=1"]
    argv = (f"--config={ROOT / 'configs' / name}.py", *short, "--config.mesh.fsdp=8", "--topology", "v6e:2x4")
    found = compiled(capsys, tmp_path, *argv)
    assert found["fits"] and found["stage"] == "joint" and found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert found["donated"]["aliased"] >= found["donated"]["state"] > 0
    assert found["collectives"]["on_logits"] == [] and found["collectives"]["loops_of_unknown_length"] == 0
