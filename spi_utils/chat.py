"""The text "chat": what the 16-bit model answers to prompts of this package, as a text to evaluate it on.

Prose says little about a model that is used to chat. Here each window is a conversation as the tokenizer's
own chat template writes it: a prompt, the model's answer sampled at temperature 1, and where the answer ends
before the window does, another prompt in a fresh conversation right behind it, so that windows are full.
What is counted are the tokens that the model chose, the end of its turn among them; prompts and the
template's words are only read. The draws are this text's own: sensitivity and rounding never see them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from spi_utils.errors import EvaluationError
from spi_utils.sensitivity import COLLAPSED, sample_windows
from spi_utils.texts import CHAT_PROMPTS

STRIDE = 13  # from a window's prompt to its next one: neighbouring windows don't go on with the same
CONVENTION = (
    "windows of one length, each of conversations in the tokenizer's chat template: a prompt and the 16-bit "
    "model's own answer, sampled at temperature 1; where an answer ends, the next prompt follows in the same "
    "window; only the answers' tokens are counted, a window's mean is over its own, and every window weighs "
    "the same; natural logarithms"
)


class Script:
    """What stands in each window: the prompts' tokens, and between them whatever the model draws.

    `answers` (windows, length) marks the tokens that the model drew.
    """

    def __init__(self, prompts: list[list[int]], ends: Iterable[int], windows: int, length: int) -> None:
        self.prompts, self.ends = prompts, frozenset(ends)
        self.answers = np.zeros((windows, length), bool)
        self.next = list(range(windows))
        self.asked: list[deque[int]] = [deque() for _ in range(windows)]
        for window in range(windows):
            self._ask(window)

    def __call__(self, window: int, column: int, drawn: int) -> int:
        """The prompt's next token, or `drawn` where the model answers; the end of its turn asks again."""
        if self.asked[window]:
            return self.asked[window].popleft()
        self.answers[window, column] = True
        if drawn in self.ends:
            self._ask(window)
        return drawn

    def _ask(self, window: int) -> None:
        self.asked[window].extend(self.prompts[self.next[window] % len(self.prompts)])
        self.next[window] += STRIDE


def converse(
    model: Any, tokenizer: Any, windows: int, length: int, seed: int
) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Let the model answer: LongTensor (windows, length), and which of the tokens are its own, bool likewise.

    A window hangs on the seed and on its index alone. Prompts that fill more than half of a window are left
    out.

    Args:
        model: the 16-bit model.
        tokenizer: its own, with a chat template.

    Raises:
        EvaluationError: windows too short for any prompt, or answers that are one token over and over.
    """
    prompts = [
        _as_asked(tokenizer, prompt) for prompt in json.loads(CHAT_PROMPTS.read_text(encoding="utf-8"))
    ]
    fitting = [prompt for prompt in prompts if len(prompt) <= length // 2]
    if not fitting:
        raise EvaluationError(
            f"Windows of {length} tokens are too short for the text 'chat': its shortest prompt has "
            f"{min(map(len, prompts))} tokens and may fill half of a window; choose a larger length."
        )
    held = (model.generation_config, model.config.get_text_config(), tokenizer)
    known = [one.eos_token_id for one in held if getattr(one, "eos_token_id", None) is not None]
    ends = {int(token) for one in known for token in np.atleast_1d(one)}
    script = Script(fitting, ends, windows, length)
    ids = sample_windows(model, windows, length, 0, seed, purpose="chat", script=script)
    answers = [row[own] for row, own in zip(ids.numpy(), script.answers, strict=True)]
    if np.median([np.bincount(one).max() / len(one) for one in answers]) > COLLAPSED:
        raise EvaluationError(
            "This model's chat collapses: in most windows one token makes up more than "
            f"{COLLAPSED:.0%} of its answers. Leave the text 'chat' out, e.g. texts='pydoc,pycode'."
        )
    return ids, script.answers


def _as_asked(tokenizer: Any, prompt: dict[str, str]) -> list[int]:
    """A prompt's tokens as the template writes them, up to where the model's turn begins."""
    messages = [{"role": role, "content": content} for role, content in prompt.items()]
    write = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
    try:
        written = write(messages)
    except TemplateError:  # some templates know no system
        written = write([{"role": "user", "content": "\n\n".join(prompt.values())}])
    return tokenizer(written, add_special_tokens=False)["input_ids"]
