"""A small run's report, every part of it there."""

from collections.abc import Callable
from typing import Any

import pytest


def _rate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _set(n: int, wer: float, intents: bool = True) -> dict[str, Any]:
    out = {"n": n, "wer": _rate(wer, 0.5 * wer, 1.7 * wer), "exact_match": _rate(0.9375, 0.875, 0.98765)}
    return out | ({"intent_accuracy": _rate(1.0, 1.0, 1.0)} if intents else {})


def _text(base: float, rise: float, tokens: int) -> dict[str, float]:
    edges = {"low": rise - 0.01, "high": rise + 0.02}
    return {"n": 7, "tokens": tokens, "base": base, "adapted": base + rise, "rise": rise, **edges}


def _cka(bend: float) -> list[list[float]]:
    return [[0.1 + bend * ((3 * block + 5 * teacher) % 7) / 8 for teacher in range(4)] for block in range(10)]


@pytest.fixture(scope="session")
def make_report_data() -> Callable[[], dict[str, Any]]:
    return _report_data


@pytest.fixture
def report_data() -> dict[str, Any]:
    return _report_data()


def _report_data() -> dict[str, Any]:
    """The dictionary that a page is made of: 5 recorded steps of two stages, the second without distillation."""
    return {
        "name": "small",
        "finished": True,
        "step": 1100,
        "total_steps": 1200,
        "missing": {},
        "commands": [
            {"time": "2026-11-21T12:00:00Z", "command": "aura-jax quickstart --workdir 'a b'", "first_step": 0}
        ],
        "environment": {"python": "3.11.2", "device": "cpu", "n_devices": 1, "mesh": {"data": 1, "fsdp": 1}},
        "config": {"seed": 0, "lora": {"rank": 8, "targets": ["q", "v"]}, "note": "größer & <smaller>"},
        "model": {
            "llm": "Tiny-LLM",
            "llm_blocks": 10,
            "llm_width": 64,
            "n_adapted": 6,
            "rank": 8,
            "alpha": 12.5,
            "targets": ["q", "v"],
            "scope": "request",
            "mask": "bidirectional",
            "teacher": "tiny-encoder",
            "teacher_blocks": 4,
            "teacher_width": 48,
            "encoder": None,
            "n_mels": 80,
            "embedder": "stem",
            "frames_per_token": 4,
            "token_rate": 12.5,
            "pairs": [[2, 1], [5, 3]],
        },
        "parameters": [
            {"part": "audio embedder", "trained": 1420992, "frozen": 576, "kept": True},
            {"part": "LLM", "trained": 0, "frozen": 134515008, "kept": True},
            {"part": "teacher", "trained": 0, "frozen": 8208384, "kept": False},
        ],
        "stages": [
            {"name": "distil", "first": 0, "end": 700, "objectives": {"distill": 1.0}, "learning_rate": 1e-3},
            {"name": "joint", "first": 700, "end": 1200, "objectives": {"lm": 1.0}, "learning_rate": 2.5e-4},
        ],
        "metrics": {
            "step": [1, 300, 600, 700, 1100],
            "loss": [1.0, 0.5, 0.3, 0.25, 0.7],
            "loss/distill": [1.0, 0.5, 0.3, 0.25, None],
            "loss/lm": [None, None, None, None, 0.7],
            "grad_norm": [0.2, 0.1, 0.1, 0.05, 2.0],
            "learning_rate": [5e-5, 1e-3, 5e-4, 1e-4, 2.5e-4],
            "step_seconds": [6.6, 0.5, 0.5, 0.5, 1.5],
        },
        "validation": {"step": [700, 1100], "wer": [0.5, 0.0331], "exact_match": [0.25, 0.875]},
        "alignment": {
            "step": [1, 300, 600, 700, 1100],
            "blocks": [2, 5],
            "loss_kind": "cosine",
            "value": [[-0.01, 0.5, 0.7, 0.76, None], [0.01, 0.4, 0.65, 0.74, None]],
        },
        "similarity": {
            "set": "held-out voices",
            "n_clips": 64,
            "n_tokens": 1523,
            "before": {"cosine": [-0.003, 0.012], "cka": _cka(0.1)},
            "after": {"cosine": [0.7811, 0.7399], "cka": _cka(0.9)},
        },
        "scores": {
            "step": 1100,
            "sets": {
                "new voices": _set(93, 0.0074487895716946),
                "read v1.2 speech": _set(55, 0.03436426116838488),
                "recordings": _set(90, 1.0528375733855186, intents=False),
            },
            "text": {
                "adapters": "request",
                "loss": {
                    "chat": _text(2.6283824936750064, -0.0969123518416648, 711),
                    "prose": _text(3.4421310131742158, 0.05233031992112469, 3124),
                    "all": _text(3.536884352269911, 0.05669724705333046, 3835),
                },
                "questions": {
                    "n": 2,
                    "base": 2,
                    "adapted": 1,
                    "answers": [
                        {
                            "question": "What?",
                            "base": "This.",
                            "base_right": True,
                            "adapted": "So.",
                            "adapted_right": True,
                        },
                        {
                            "question": "Who?",
                            "base": "Me.",
                            "base_right": True,
                            "adapted": "No.",
                            "adapted_right": False,
                        },
                    ],
                },
            },
            "seconds": {"train": 1323.0937646769999, "evaluate": 127.91502650900293},
            "peak_memory_gib": 5.199008941650391,
        },
        "examples": [
            {
                "set": "new voices",
                "id": "af_bella_00000",
                "kind": "worst",
                "errors": 2,
                "words": 6,
                "reference": "Set a timer for forty minutes.",
                "hypothesis": "Set a timer for fifteen minutes please.",
                "seconds": 1.694,
                "audio": {"mime": "audio/flac", "base64": "ZkxhQw=="},
                "mel": [[0.0, 0.5, 1.0], [0.1, 0.6, 0.9]],
                "problem": None,
            },
            {
                "set": "recordings",
                "id": "gone",
                "kind": "best",
                "errors": 0,
                "words": 1,
                "reference": "Goodbye.",
                "hypothesis": "goodbye",
                "seconds": 0.61,
                "audio": None,
                "mel": None,
                "problem": "clips/x.ogg: no such file",
            },
        ],
        "speed": {
            "stages": [
                {
                    "name": "distil",
                    "median_step_seconds": 0.4981,
                    "tokens_per_second": 352.1,
                    "audio_seconds_per_second": 24.1,
                    "first_step_seconds": 6.63,
                    "wait_share": 0.0012,
                },
                {
                    "name": "joint",
                    "median_step_seconds": 1.471,
                    "tokens_per_second": 1172.4,
                    "audio_seconds_per_second": 8.25,
                    "first_step_seconds": 14.2,
                    "wait_share": None,
                },
            ],
            "breakdown": [{"part": "adapted blocks", "seconds": 0.612}, {"part": "optimizer", "seconds": 0.0921}],
            "wall": [{"part": "compilation", "seconds": 21.0}, {"part": "steps", "seconds": 1044.0}],
            "peak_memory_gib": 5.25,
        },
    }
