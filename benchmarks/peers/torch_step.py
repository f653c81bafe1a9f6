"""One train step of the torch peer, and the trained variables by the paths that aura_jax gives them."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_aura
from torch import nn


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A variable of aura_jax and the parameters that hold it: one, or one for each adapted block on a first axis.

    Attributes:
      axes: our block's axis i is the parameter's axis axes[i]; empty for the same order.
    """

    parameters: tuple[nn.Parameter, ...]
    stacked: bool = False
    axes: tuple[int, ...] = ()

    def load(self, value: np.ndarray) -> None:
        with torch.no_grad():
            for parameter, part in zip(self.parameters, value if self.stacked else [value], strict=True):
                stored = part.transpose(np.argsort(self.axes)) if self.axes else part
                parameter.copy_(torch.from_numpy(np.array(stored)))

    def read(self, of: Callable[[nn.Parameter], torch.Tensor]) -> np.ndarray:
        parts = [of(parameter).detach().float().numpy() for parameter in self.parameters]
        parts = [part.transpose(self.axes) if self.axes else part for part in parts]
        return np.stack(parts) if self.stacked else parts[0].copy()


def leaves(model: torch_aura.AuRA) -> dict[str, Leaf]:
    """Returns everything that is neither the LLM's nor the teacher's by its path in aura_jax."""
    out = {}
    layers: Any = model.decoder.layers[: model.n_adapted]
    for target in model.setting.config["lora"]["targets"]:
        room, module = ("attn", "self_attn") if target in "qkvo" else ("mlp", "mlp")
        linears = [getattr(getattr(layer, module), f"{target}_proj") for layer in layers]
        path = f"lora/llm/adapted/{room}/{target}"
        out[f"{path}/a"] = Leaf(tuple(linear.lora_A["default"].weight for linear in linears), True, (1, 0))
        out[f"{path}/b"] = Leaf(tuple(linear.lora_B["default"].weight for linear in linears), True, (1, 0))
    embedder, path = model.embedder, "params/embedder"
    rows: dict[str, tuple[Any, tuple[int, ...]]] = {"proj": (embedder.proj, (1, 0))}
    if embedder.kind == "stem":
        rows |= {"stem/conv1": (embedder.conv1, (2, 1, 0)), "stem/conv2": (embedder.conv2, (2, 1, 0))}
    else:
        rows["patch"] = (embedder.patch, (1, 0))
    for name, (module, axes) in rows.items():
        out[f"{path}/{name}/kernel"] = Leaf((module.weight,), axes=axes)
        out[f"{path}/{name}/bias"] = Leaf((module.bias,))
    out |= {f"{path}/norm/scale": Leaf((embedder.norm.weight,)), f"{path}/norm/bias": Leaf((embedder.norm.bias,))}
    out |= {f"{path}/{name}": Leaf((getattr(embedder, name),)) for name in ("gain", "text_rms")}
    return out | {f"heads/{name}": Leaf((getattr(model.heads, name),)) for name in ("scale", "kernel")}


def schedule(stage: Mapping[str, Any], step: int) -> float:
    """Returns the learning rate: linear warm-up, then a cosine down to `final_fraction` of the peak."""
    peak, warmup = stage["learning_rate"], min(stage["warmup_steps"], stage["steps"] - 1)
    start = peak / max(stage["warmup_steps"], 1)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min(step - warmup, stage["steps"] - warmup) / (stage["steps"] - warmup)
    final = stage["final_fraction"]
    return peak * ((1 - final) * 0.5 * (1 + math.cos(math.pi * done)) + final)


class Trainer:
    """AdamW on the adapters, the embedder and the heads, each group of paths at its own rate.

    Args:
      weights: every path of `leaves`; and, where targets are standardised, `statistics/mean` and `statistics/std`.
      dtype: of the frozen weights; if not float32, the step runs under autocast.
      compiled: the decoder's blocks, where nearly all the work is, with torch.compile: a program for each shape.
    """

    def __init__(
        self,
        setting: torch_aura.Setting,
        weights: Mapping[str, np.ndarray],
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        self.model = torch_aura.AuRA(setting, dtype)
        self.leaves, self._dtype, self._config = leaves(self.model), dtype, setting.config
        self._statistics = None
        if setting.config["distill"]["target_norm"] == "standardise":
            self._statistics = {name: torch.from_numpy(weights[f"statistics/{name}"]) for name in ("mean", "std")}
        self.rates = self._rates(setting.config["trainable"])
        self.load(weights)
        if compiled:
            self._compile()

    def _rates(self, table: Any) -> dict[str, float]:
        """Returns the multiplier of every trained path; the first row that matches counts."""
        rates = {}
        for path in self.leaves:
            row = next((rate for pattern, rate in table if re.match(pattern, path)), None)
            for parameter in self.leaves[path].parameters:
                parameter.requires_grad_(row is not None)
            if row is not None:
                rates[path] = row
        return rates

    def _compile(self) -> None:
        # One program serves all blocks of a kind; a recompilation for each shape, adapters on and off.
        torch._dynamo.config.recompile_limit = 128
        for layer in self.model.decoder.layers:
            layer.compile(dynamic=False)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Starts anew from `weights`, with fresh moments, at step 0."""
        for path, leaf in self.leaves.items():
            leaf.load(weights[path])
        c, groups = self._config["optimizer"], {}
        for path, rate in self.rates.items():
            decay = c["weight_decay"] if path.rpartition("/")[2] in ("kernel", "a", "b") else 0.0
            groups.setdefault((rate, decay), []).extend(self.leaves[path].parameters)
        self._optimizer = torch.optim.AdamW(
            [{"params": p, "rate": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
            betas=(c["b1"], c["b2"]),
            eps=c["eps"],
            fused=True,
        )
        self._step = 0

    def step(self, batch: Mapping[str, np.ndarray], stage: Mapping[str, Any]) -> dict[str, float]:
        """Takes one step and returns its metrics, named as aura_jax names them."""
        active = {name: weight for name, weight in stage["objectives"].items() if weight}
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype != torch.float32):
            losses, by_block = self.model(to_tensors(batch), active, self._statistics)
        loss = sum(active[name] * value for name, value in losses.items())
        assert isinstance(loss, torch.Tensor)
        self._optimizer.zero_grad()
        loss.backward()
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, stage["clip_norm"])
        for group in self._optimizer.param_groups:
            group["lr"] = schedule(stage, self._step) * group["rate"]
        self._optimizer.step()
        self._step += 1
        metrics = {f"loss/{name}": value for name, value in losses.items()}
        metrics |= {f"loss/distill/block_{block:02d}": value for block, value in by_block.items()}
        return {name: value.item() for name, value in {**metrics, "loss": loss, "grad_norm": norm}.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the trained variables."""
        return {path: self.leaves[path].read(lambda parameter: parameter) for path in self.rates}

    def gradients(self) -> dict[str, np.ndarray]:
        """Returns the gradients of the last step, clipped as its optimizer saw them."""

        def gradient(parameter: nn.Parameter) -> torch.Tensor:
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

        return {path: self.leaves[path].read(gradient) for path in self.rates}


def to_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns a batch by field name; indices as torch wants them."""
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    return {name: x.long() if x.dtype == torch.int32 else x for name, x in tensors.items()}
