"""lmms-eval where it is installed, and otherwise the part of its interface that a plug-in meets.

Recorded of lmms-eval 0.7.3: `lmms_eval/api/model.py`, `lmms_eval/api/instance.py`, `lmms_eval/models/registry_v2.py`.
"""

import abc
import dataclasses
import importlib.util
import sys
import types

import pytest


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclasses.dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict
    task_name: str | None = None

    def __post_init__(self):
        self.task_name = self.metadata["task"]

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclasses.dataclass
class GenerationResult:
    text: object


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


_RECORDED = {
    "lmms_eval.api.model": [lmms],
    "lmms_eval.api.instance": [Instance, GenerationResult],
    "lmms_eval.models.registry_v2": [ModelManifest],
}


@pytest.fixture(scope="session", autouse=True)
def lmms_eval():
    """Makes `lmms_eval` importable, if it is not installed."""
    if importlib.util.find_spec("lmms_eval") is not None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *_RECORDED):
            module = types.ModuleType(name)
            for recorded in _RECORDED.get(name, ()):
                setattr(module, recorded.__name__, recorded)
            patch.setitem(sys.modules, name, module)
        yield
