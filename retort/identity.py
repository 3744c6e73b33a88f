"""What trainer and replica must have in common, as digests. A replica of something else is refused, and told what."""

import hashlib
from typing import TYPE_CHECKING

from retort.config import RunConfig
from retort.rollouts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 16


class Identity(Message, frozen=True, kw_only=True):
    """Of one side. Weights are not in it: they are sent, and verified each time."""

    run: str = ""
    """Prefix of the run's keys in Redis."""
    config: str = ""
    """Digest of what the run file says about how the policy samples. The rest may differ from machine to machine."""
    tokenizer: str = ""
    chat_template: str = ""

    def contradiction(self, trainer: "Identity") -> str:
        """In what this replica's identity is not the trainer's, with both; empty if they are the same."""
        return "; ".join(
            f"its {name.replace('_', ' ')} is {mine} and the trainer's is {theirs}"
            for name in self.__struct_fields__
            if (mine := getattr(self, name)) != (theirs := getattr(trainer, name))
        )


NOBODY = Identity()
"""Of a side that says nothing."""


def identity_of(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> Identity:
    """The same for both sides of a run if they have the same files."""
    sampled = {"model": config.model.model_dump(exclude={"path"}), "sampling": config.sampling.model_dump()}
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer in Python alone has none
    vocabulary = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    return Identity(
        run=config.key_prefix,
        config=_digest(repr(sampled)),
        tokenizer=_digest(vocabulary),
        chat_template=_digest(str(tokenizer.chat_template)),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:DIGITS]
