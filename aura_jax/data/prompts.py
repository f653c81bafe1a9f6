"""The chat template around a clip: tokens before it, tokens after it, and the response.

The template is rendered with a mark where the audio goes, and the text on either side of the mark is tokenised by
itself. So a reading of the clip and a reading of its transcript differ in the span only: prefix, suffix and response
have the same tokens, and no token straddles an edge of the span.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from aura_jax.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Bare ChatML, as a `chat_template`: no default system turn, for short sequences."""

_MARK = "\ue000audio\ue000"  # private use: in no vocabulary, and no template changes it
_Turns = Sequence[Mapping[str, str]]


class ChatFormat:
    """Turns prompts, clips and responses into token ids, by a chat template.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: Jinja source that replaces the tokenizer's own template.
        system: text of an explicit system turn. None: what the template does by itself.
        template_kwargs: further variables for the template, such as {"enable_thinking": False}.

    Attributes:
        stop_ids: ids that end a response when generated.

    Raises:
        UserError: there is no chat template, or the template does not work for one user turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise UserError(
                f"{name} has no chat template: set data.chat_template, such as aura_jax.data.prompts.CHATML"
            )
        self.tokenizer = tokenizer
        self._template, self._system, self._template_kwargs = chat_template, system, dict(template_kwargs or {})
        # A bounded cache per object: manifests repeat few prompts.
        self._around = functools.lru_cache(maxsize=4096)(self._around_uncached)
        self._end_ids = self._find_end_of_turn()
        stops = self._end_ids[-1:] if len(self._end_ids) == 1 else ()
        eos = tokenizer.eos_token_id
        self.stop_ids = tuple(dict.fromkeys((*stops, *(() if eos is None else (eos,)))))
        if not self.stop_ids:
            raise UserError("no token ends a response: give a tokenizer with eos_token, or another data.chat_template")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_around"]  # a cache over a bound method cannot travel to a worker process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._around = functools.lru_cache(maxsize=4096)(self._around_uncached)

    def encode(
        self, prompt: str = "", has_audio: bool = True, history: _Turns = ()
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (prefix_ids, suffix_ids): the tokens before and after the audio, up to where the response begins.

        The audio comes first in the user turn, then the prompt, on a line of its own.

        Args:
            prompt: the user's words beside the audio; may be empty if there is audio.
            has_audio: False: everything is in the prefix, and the suffix is empty.
            history: earlier turns, each {"role": "user" or "assistant", "content": text}.

        Raises:
            UserError: the template drops or repeats the user turn, or refuses the turns.
        """
        prefix, *rest = self.around([*history, {"role": "user", "content": prompt, "audio": has_audio}])
        (suffix,) = rest or [()]
        return prefix, suffix

    def around(self, turns: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...]:
        """Returns the tokens before, between and after the clips of a conversation, up to where the response begins.

        Args:
            turns: each {"role", "content": text} and, where there is a clip, "audio": True. It comes first in its turn,
                then the text, on a line of its own.

        Returns:
            The ids, one sequence more than there are clips.

        Raises:
            UserError: as `encode`.
        """
        return self._around(json.dumps([dict(turn) for turn in turns]))

    def _around_uncached(self, turns: str) -> tuple[tuple[int, ...], ...]:
        shown, n_clips = json.loads(turns), 0
        for turn in shown:
            if turn.pop("audio", False):
                turn["content"] = f"{_MARK}\n{turn['content']}" if turn["content"] else _MARK
                n_clips += 1
        return tuple(self.text(part) for part in self._split(self._render(shown, add_generation_prompt=True), n_clips))

    def text(self, text: str) -> tuple[int, ...]:
        """The ids of `text` alone: no special token is added; those spelled out in it are recognised."""
        # verbose: a document may well be longer than the model's context, from which rows are cut
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def response(self, text: str, ended: bool = True) -> tuple[int, ...]:
        """The ids of a response and, if it `ended` or is empty, of the end of its turn."""
        ids = self.text(text)
        return ids + self._end_ids if ended or not ids else ids

    def conversation(self, turns: _Turns) -> tuple[int, ...]:
        """The ids of a whole conversation as the template renders it."""
        return self.text(self._render(turns, add_generation_prompt=False))

    def _find_end_of_turn(self) -> tuple[int, ...]:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
        _, tail = self._split(self._render(turns, add_generation_prompt=False))
        # Whitespace after the turn's end belongs to the template, and is never to be learned.
        end = self.text(tail.strip())
        if end:
            return end
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError("the chat template ends no assistant turn, and the tokenizer has no eos_token: mend either")
        return (eos,)

    def _split(self, rendered: str, n_marks: int = 1) -> list[str]:
        parts = rendered.split(_MARK)
        if len(parts) != n_marks + 1:
            whose = "a turn's content" if n_marks == 1 else f"the content of {n_marks} turns"
            raise UserError(f"the chat template shows {whose} {len(parts) - 1} times: set one that does once")
        return parts

    def _render(self, turns: _Turns, *, add_generation_prompt: bool) -> str:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            return self.tokenizer.apply_chat_template(
                [*system, *turns],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._template_kwargs,
            )
        except Exception as error:  # Jinja's own errors, and whatever a template raises
            raise UserError(
                f"the chat template fails ({error}): set another data.chat_template, or an empty data.system"
            ) from error
