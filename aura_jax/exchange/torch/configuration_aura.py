# Copyright: the authors of aura_jax. SPDX-License-Identifier: Apache-2.0
"""The configuration of `AuraForCausalLM`: that of the LLM, and what says how it takes audio."""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig


class AuraConfig(PretrainedConfig):
    """The configuration of a speech LLM.

    Args:
      text_config: of the LLM, a configuration of transformers or its dictionary.
      audio_config: the contents of `audio_config.json`, without the configuration of the training run.
    """

    model_type = "aura"
    sub_configs: ClassVar[Any] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_config: Any = None,
        **kwargs: Any,
    ):
        # Before the parent's: it passes the dtype and the attention implementation on to `text_config`.
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.audio_config = audio_config
        super().__init__(**kwargs)
