"""Batches from files: what is in them does not depend on hosts, threads, workers or where reading began."""

import json

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from aura_jax.audio.augment import change_speed
from aura_jax.audio.features import n_audio_tokens
from aura_jax.audio.io import load_audio
from aura_jax.data.batch import Part
from aura_jax.data.manifest import load_manifest
from aura_jax.data.pipeline import Quarantine, make_dataset
from aura_jax.data.plan import BatchPlan
from aura_jax.data.prompts import CHATML, ChatFormat
from aura_jax.data.sources import make_source
from aura_jax.data.text_pool import Documents, TextPool
from aura_jax.errors import UserError

N_CLIPS = 10


@pytest.fixture(scope="module")
def chat(tiny_llm_dir):
    return ChatFormat(AutoTokenizer.from_pretrained(tiny_llm_dir), CHATML)


@pytest.fixture
def rows(tmp_path):
    """Ten tones, a chat turn and a plain text."""
    rng, lines = np.random.default_rng(0), []
    for i in range(N_CLIPS):
        n_samples = int(rng.integers(3000, 14000))
        tone = 0.3 * np.sin(np.arange(n_samples) * (i + 1) / 40)
        soundfile.write(tmp_path / f"{i}.wav", tone, 16000, "FLOAT")
        lines.append({"audio": f"{i}.wav", "text": f"tone number {i}", "seconds": round(n_samples / 16000, 3)})
    lines += [{"prompt": "Two and two?", "response": "Four."}, {"text": "Once upon a time there was a tone."}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_manifest(tmp_path / "train.jsonl")


def make_plan(sources, layout="slot", **changes) -> BatchPlan:
    arguments = {"batch_size": 4, "bucket_seconds": (0.5, 1.0), "token_rate": 12.5, "speeds": (10 / 9, 1.0, 10 / 11)}
    if layout == "packed":
        arguments |= {"pack_tokens": 90, "pack_clips": 3, "batch_size": 2}
    return BatchPlan([s.lengths for s in sources], layout=layout, **(arguments | changes))


def take(n: int, *args, **kwargs) -> list:
    with make_dataset(*args, **kwargs) as batches:
        return [next(batches) for _ in range(n)]


def assert_same(ones, others) -> None:
    for one, other in zip(ones, others, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_batches_hold_the_planned_rows(rows, chat, layout):
    sources = [make_source(rows, chat, prompt="Transcribe.")]
    plan = make_plan(sources, layout)
    for position, batch in take(4, sources, plan):
        planned = plan.batch(position)
        assert batch.tokens_BxT.shape == (planned.shape.n_rows, planned.shape.n_tokens)
        for b, picks in enumerate(planned.examples):
            assert batch.segment_BxT[b].max() == len(picks)
            heard = [pick for pick in picks if rows[pick.row].audio]
            for k, pick in enumerate(heard):
                wanted = change_speed(load_audio(rows[pick.row].audio), pick.speed)
                n_samples = batch.n_samples_BxK[b, k]
                assert n_samples == len(wanted)
                np.testing.assert_array_equal(batch.waveform_BxKxS[b, k, :n_samples], wanted)
            for segment, pick in enumerate(picks, 1):
                (columns,) = np.nonzero((batch.segment_BxT[b] == segment) & (batch.audio_source_BxT[b] < 0))
                row = rows[pick.row]
                words = chat.tokenizer.decode(batch.tokens_BxT[b, columns])
                if row.audio:
                    assert words.startswith("<|im_start|>user\n\nTranscribe.<|im_end|>") and words.endswith(row.target)
                elif row.is_plain_text:
                    assert row.text.startswith(words)
                else:
                    assert words == f"<|im_start|>user\n{row.prompt}<|im_end|>\n<|im_start|>assistant\n{row.response}"


def test_the_end_of_a_response_that_was_cut_is_no_target(tmp_path, chat):
    lines = [{"prompt": "Count.", "response": "One, two,", "ended": ended} for ended in (True, False)]
    (tmp_path / "cut.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole, cut = make_source(load_manifest(tmp_path / "cut.jsonl"), chat).response_ids
    assert whole[: len(cut)] == cut == chat.text("One, two,") and set(whole[len(cut) :]) & set(chat.stop_ids)


def test_hosts_threads_workers_and_position_change_nothing(rows, chat):
    sources = [make_source(rows, chat)]
    plan = make_plan(sources)
    pool = TextPool(Documents([tuple(range(1000))], []), n_rows=2, n_tokens=8)
    wanted = take(7, sources, plan, text_pool=pool, n_threads=1)
    assert [position for position, _ in wanted] == list(range(7))
    batches = [batch for _, batch in wanted]
    assert_same([b for _, b in take(7, sources, plan, text_pool=pool, n_threads=3, cache_bytes=0)], batches)
    resumed = take(4, sources, make_plan(sources), text_pool=pool, position=3)
    assert [position for position, _ in resumed] == [3, 4, 5, 6]
    assert_same([b for _, b in resumed], batches[3:])
    hosts = [take(7, sources, plan, text_pool=pool, part=Part((host,), 2)) for host in (0, 1)]
    for i, batch in enumerate(batches):
        joined = [
            None if one is None else np.concatenate([one, other])
            for one, other in zip(hosts[0][i][1], hosts[1][i][1], strict=True)
        ]
        assert_same([joined], [batch])
    assert_same([b for _, b in take(3, sources, plan, text_pool=pool, n_workers=2)], batches[:3])


def test_a_sequential_plan_ends(rows, chat):
    sources = [make_source(rows, chat)]
    plan = make_plan(sources, sequential=True, speeds=(1.0,), batch_size=5)
    with make_dataset(sources, plan) as batches:
        assert [position for position, _ in batches] == [0, 1, 2] and batches.position == 3
    ((_, last),) = take(1, sources, plan, position=2)
    assert (last.segment_BxT.max(axis=1) > 0).tolist() == [True, True, False, False, False]
    assert not last.target_weight_BxR[2:].any()
    with make_dataset(sources, plan, position=3) as batches:
        assert not list(batches)


def test_an_unreadable_clip_weighs_nothing_and_is_written_down_once(rows, chat, tmp_path):
    soundfile.write(tmp_path / "0.wav", np.array([0.1, np.nan]), 16000, "FLOAT")
    (tmp_path / "1.wav").write_bytes(b"not audio")
    (tmp_path / "2.wav").unlink()
    soundfile.write(tmp_path / "3.wav", np.zeros(30000), 16000)  # twice what the manifest says
    sources = [make_source(rows, chat)]
    plan = make_plan(sources, sequential=True, speeds=(1.0,))
    path = tmp_path / "run" / "quarantine.jsonl"
    for _ in range(2):
        with make_dataset(sources, plan, quarantine=path) as batches:
            for position, batch in batches:
                for b, picks in enumerate(plan.batch(position).examples):
                    bad = bool(picks) and picks[0].row < 4
                    assert (batch.segment_BxT[b].max() == 0) == (bad or not picks)
                    assert bool(batch.target_weight_BxR[b].any()) == (bool(picks) and not bad)
                    assert not (bad and (batch.n_samples_BxK[b].any() or batch.waveform_BxKxS[b].any()))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["audio"] for line in lines) == [str(tmp_path / f"{i}.wav") for i in range(4)]
    errors = {line["row"].rpartition(":")[2]: line["error"] for line in lines}
    assert "NaN" in errors["1"] and "cannot be decoded" in errors["2"] and "no such" in errors["3"]
    assert "mend 'seconds' in the manifest" in errors["4"]


def test_a_header_that_cannot_be_read_is_quarantined_too(rows, chat, tmp_path):
    (tmp_path / "0.wav").write_bytes(b"")
    lines = [{"audio": f"{i}.wav", "text": "a"} for i in range(4)]
    (tmp_path / "bare.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [make_source(load_manifest(tmp_path / "bare.jsonl"), chat)]
    ((_, batch),) = take(1, sources, make_plan(sources, speeds=(1.0,)), quarantine=tmp_path / "bad.jsonl")
    assert sorted((batch.n_samples_BxK[:, 0] > 0).tolist()) == [False, True, True, True]
    assert "0 bytes" in (tmp_path / "bad.jsonl").read_text()


def test_two_processes_write_a_clip_down_once(tmp_path):
    for _ in range(2):
        quarantine = Quarantine(tmp_path / "q.jsonl")
        quarantine.add("a", "m:1", "bad")
        quarantine.add("b", "m:2", "bad")
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


class Store:
    """Teacher states that tell their clip, speed and token."""

    def __init__(self, sources, missing=()):
        self.n_samples_N, self.missing = sources[0].lengths.n_samples_N, missing

    def read(self, row: int, speed: float) -> np.ndarray:
        if row in self.missing:
            raise KeyError(row)
        n_tokens = n_audio_tokens(round(int(self.n_samples_N[row]) / speed), 12.5)
        value = row + speed + np.arange(n_tokens)[:, None] / 100
        return np.broadcast_to(value, (2, n_tokens, 3)).astype(np.float16)


@pytest.mark.parametrize("layout", ["slot", "packed"])
def test_teacher_states(rows, chat, layout):
    sources = [make_source(rows, chat)]
    plan = make_plan(sources, layout)
    store = Store(sources)
    for position, batch in take(3, sources, plan, teacher_store=store):
        for b, picks in enumerate(plan.batch(position).examples):
            for k, pick in enumerate(pick for pick in picks if rows[pick.row].audio):
                wanted = store.read(pick.row, pick.speed)
                states = batch.teacher_BxKxPxAxE[b, k]
                np.testing.assert_array_equal(states[:, : wanted.shape[1]], wanted)
                assert not states[:, wanted.shape[1] :].any()
    with pytest.raises(UserError, match=r"train.jsonl:\d+: no teacher states"):
        take(3, sources, plan, teacher_store=Store(sources, missing=range(1, N_CLIPS)))
    with pytest.raises(UserError, match="none of the clips"):
        take(1, sources, plan, teacher_store=Store(sources, missing=range(N_CLIPS)))


def test_mistakes(rows, chat):
    sources = [make_source(rows, chat)]
    with pytest.raises(UserError, match="12 rows, its sources 24"):
        make_dataset([*sources, *sources], make_plan(sources))
    with pytest.raises(UserError, match="3 parts"):
        make_dataset(sources, make_plan(sources), part=Part((0,), 3))
    with pytest.raises(UserError, match="without rows"):
        make_source([], chat)


def test_the_sample_commands(sample_data, chat):
    rows = load_manifest(sample_data / "commands" / "test_new_voices_and_sentences.jsonl")
    sources = [make_source(rows, chat)]
    plan = BatchPlan([sources[0].lengths], batch_size=8, bucket_seconds=(2, 4), token_rate=12.5, sequential=True)
    with make_dataset(sources, plan) as batches:
        heard = sum(int((batch.n_samples_BxK > 0).sum()) for _, batch in batches)
    assert heard == len(rows) == 55
