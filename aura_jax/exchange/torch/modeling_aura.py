# Copyright: the authors of aura_jax. SPDX-License-Identifier: Apache-2.0
"""A speech LLM trained by aura_jax: an LLM of transformers, LoRA in its first blocks, and the audio embedder.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIRECTORY, trust_remote_code=True)
    inputs = processor(audio=waveform)
    tokens = model.generate(**inputs, max_new_tokens=64)
    print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

LoRA is not folded into the weights, because it may act on a part of the tokens only: on all ("all"), on those of rows
that have audio ("request"), or on the audio tokens themselves ("audio"). Where it does not act, the model is the base
LLM to the bit.

Shapes: B rows, T columns of the input, S columns in all (the cached ones come before those T), N clips in the order of
their rows, F mel frames, M mel bins, D width of the LLM.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .audio_embedder import AudioEmbedder, attention_mask_4d, count_positions, insert_audio
from .configuration_aura import AuraConfig

_LINEARS = {
    **{name: ("self_attn", f"{name}_proj") for name in ("q", "k", "v", "o")},
    **{name: ("mlp", f"{name}_proj") for name in ("gate", "up", "down")},
}


class LoraScope:
    """Where LoRA acts in the present call of the LLM: everywhere (True), nowhere (False), or a mask [B, T] or [B, 1].

    One is shared by all adapted linears. The LLM's own forward knows no such argument, so a hook takes it out before.
    It stays until the next call: gradient checkpointing runs the blocks again in the backward pass.
    """

    def __init__(self, default: bool):
        self.default: bool = default
        self.where: bool | torch.Tensor = default

    def before_call(self, llm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.where = kwargs.pop("lora_where", self.default)
        return args, kwargs


class LoraLinear(nn.Linear):
    """A linear with a low-rank delta: x W^T + b + scale * x A^T B^T where `scope` says so."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, scope: LoraScope):
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        super().__init__(base.in_features, base.out_features, base.bias is not None, **like)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, **like))
        self.scale, self.scope = scale, scope
        self.reset_lora()

    def reset_lora(self) -> None:
        """Starts anew: B is zero, and so is the delta."""
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, where = super().forward(x), self.scope.where
        if where is False:
            return y
        adapted = y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        # Selected, not multiplied by 0: rows outside the scope stay the base LLM's, whatever the delta is.
        return adapted if where is True else torch.where(where.to(y.device)[..., None], adapted, y)

    def merged(self) -> nn.Linear:
        """Returns a plain linear that computes the same everywhere."""
        delta = self.lora_B.float() @ self.lora_A.float() * self.scale
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


class AuraForCausalLM(PreTrainedModel, GenerationMixin):
    """The speech LLM; `generate` works as for any LLM of transformers, with a dynamic cache."""

    config_class = AuraConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # not flash attention: its kernels take no mask of four dimensions
    _no_split_modules: ClassVar[Any] = ["AudioEmbedder"]  # and the LLM's blocks, which it says itself
    _skip_keys_device_placement: ClassVar[Any] = ["past_key_values"]

    def __init__(self, config: AuraConfig):
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.audio_embedder = AudioEmbedder(config.audio_config)
        lora = config.audio_config["lora"]
        scope = LoraScope(default=lora is not None and lora["scope"] == "all")
        self.language_model.register_forward_pre_hook(scope.before_call, with_kwargs=True)
        if lora is not None:
            self._adapt(lora, scope)
        self.post_init()

    def _adapt(self, lora: dict[str, Any], scope: LoraScope) -> None:
        scale = lora["alpha"] / (lora["rank"] ** 0.5 if lora["rslora"] else lora["rank"])
        for block in self.language_model.model.layers[: lora["n_blocks"]]:
            for target in lora["targets"]:
                parent, name = _LINEARS[target]
                module = getattr(block, parent)
                setattr(module, name, LoraLinear(getattr(module, name), lora["rank"], scale, scope))

    def initialize_weights(self) -> None:
        """Fills in what a checkpoint lacks; the LLM inside does not know the parameters of its adapters."""
        # transformers 4 notes it of modules, 5 of parameters.
        loaded = lambda x: getattr(x, "_is_hf_initialized", False)
        adapted = [module for module in self.modules() if isinstance(module, LoraLinear) and not loaded(module)]
        super().initialize_weights()
        for module in adapted:
            if not (loaded(module.lora_A) and loaded(module.lora_B)):
                module.reset_lora()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        audio_token_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        n_frames: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns what the LLM returns: logits, the cache, and the loss if there are labels.

        Args:
          input_ids: [B, T]; or `inputs_embeds` [B, T, D].
          attention_mask: [B, S], 1 at text and audio, 0 at padding. None: no padding.
          audio_token_mask: bool [B, S] or [B, T], True in the columns of a row's clip. None: no audio in any row.
          input_features: log-mel frames [N, F, M] of the clips in these T columns.
          n_frames: how many of each clip's frames are real [N].
          position_ids: [B, T]; None: real tokens are counted.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds: torch.Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        n_new = embeds.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = count_positions(attention_mask)[:, -n_new:]
        lora_where = self._lora_where(audio_token_mask, n_new)
        if input_features is not None:
            if audio_token_mask is None or n_frames is None:
                raise ValueError("input_features need audio_token_mask and n_frames: pass all that the processor gives")
            here = audio_token_mask[:, -n_new:]  # [B, T]
            audio = self.audio_embedder(input_features, n_frames)
            embeds = insert_audio(embeds, here, audio, self.audio_embedder.n_tokens(n_frames))
            n_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = self._mask_over_audio(attention_mask, here, n_cached, embeds.dtype)
        elif audio_token_mask is not None and n_new > 1 and audio_token_mask[:, -n_new:].any():
            # A single column is a decoding step, which is text: not worth waiting for the device.
            raise ValueError("audio_token_mask marks columns of audio, but there are no input_features for them")
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            lora_where=lora_where,
            **kwargs,
        )

    def _mask_over_audio(
        self, attention_mask: torch.Tensor | None, here: torch.Tensor, n_cached: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Returns the mask that the LLM gets: what the run trained with over the columns of audio, `here` [B, T]."""
        mask, chunk = self.config.audio_config["mask"], self.config.audio_config["chunk"]
        if mask == "causal":
            return attention_mask  # which the LLM makes causal itself
        if attention_mask is None:
            attention_mask = here.new_ones((here.shape[0], n_cached + here.shape[1]), dtype=torch.long)
        if attention_mask.ndim != 2:
            raise ValueError("audio needs an attention_mask [B, S], and so a dynamic cache, not a static one")
        return attention_mask_4d(attention_mask, here, mask, chunk, dtype)

    def _lora_where(self, audio_token_mask: torch.Tensor | None, n_new: int) -> bool | torch.Tensor:
        """Returns where LoRA acts on the new columns; see `LoraScope`."""
        lora = self.config.audio_config["lora"]
        if lora is None or lora["scope"] == "all":
            return lora is not None
        if audio_token_mask is None:
            return False
        return audio_token_mask.any(1, keepdim=True) if lora["scope"] == "request" else audio_token_mask[:, -n_new:]

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """After each step of `generate`: new tokens are text, and the cache has heard the clips."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        if model_kwargs.get("audio_token_mask") is not None:
            model_kwargs["audio_token_mask"] = F.pad(model_kwargs["audio_token_mask"], (0, num_new_tokens))
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("input_features", None)
            model_kwargs.pop("n_frames", None)
        return model_kwargs

    @torch.no_grad()
    def merge_and_unload(self) -> "AuraForCausalLM":
        """Folds LoRA into the weights, where it acts on all tokens of all rows; returns this model, without LoRA.

        Raises:
          ValueError: for the scope "audio", which no weights of the LLM can express.
        """
        lora = self.config.audio_config["lora"]
        if lora is not None and lora["scope"] == "audio":
            raise ValueError("LoRA acts at the audio tokens only (scope 'audio') and cannot be folded into the weights")
        for module in self.language_model.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, LoraLinear):
                    setattr(module, name, child.merged())
        self.config.audio_config = {**self.config.audio_config, "lora": None}
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)
