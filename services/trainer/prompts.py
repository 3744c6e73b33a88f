"""From a question to the token ids of a prompt, and from a completion's ids back to text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat up to where the completion begins. Thinking is off in every prompt of a run."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """What was written, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
