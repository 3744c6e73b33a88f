"""What travels between trainer and rollout service: work, finished groups, and the questions behind them.

Token ids travel, never text that somebody would have to tokenise again. Encoding is msgpack; a decoded object is valid
or `msgspec.ValidationError` was raised.
"""

import hashlib
from typing import Literal, Self

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A value that crosses a process border."""

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return msgspec.msgpack.decode(data, type=cls)


class SamplingParameters(Message, frozen=True, kw_only=True):
    """How to sample a group. Nothing else is applied, in particular not the model's own generation config."""

    temperature: float
    top_p: float
    max_completion_tokens: int


class WorkItem(Message, frozen=True, kw_only=True):
    """One prompt to sample `group_size` completions for and to have them scored."""

    group_id: str
    kind: Literal["train", "validation"]
    step: int
    """Training step that will use the group; for validation the policy version to be measured."""
    min_policy_version: int
    """Oldest policy version that may sample it. For validation exactly the version."""
    prompt_ids: list[int]
    group_size: int
    seeds: list[int]
    """One per completion, from `sample_seed`."""
    sampling: SamplingParameters
    checker: str
    answer: str

    def __post_init__(self) -> None:
        if len(self.seeds) != self.group_size:
            raise ValueError(f"group {self.group_id}: {self.group_size} completions but {len(self.seeds)} seeds")

    @property
    def max_policy_version(self) -> int:
        """Newest policy version that may sample it.

        Version s is made from the groups of step s. A replica that has it while they are still wanted got it from a
        trainer that died, and it is of a future that may not come again.
        """
        return self.step - 1 if self.kind == "train" else self.step


class Rollout(Message, frozen=True, kw_only=True):
    """One completion, with what the trainer needs to learn from it."""

    completion_ids: list[int]
    """The sampled tokens, the end-of-sequence token included."""
    rollout_logprobs: list[float]
    """Log-probability of each completion token under the policy version that sampled it."""
    policy_versions: list[int]
    """Policy version that sampled each completion token."""
    finish_reason: Literal["stop", "length"]
    reward: float
    parsed: str
    """What the checker read as the answer; it votes in maj@k."""
    format_ok: bool

    def __post_init__(self) -> None:
        tokens = len(self.completion_ids)
        if len(self.rollout_logprobs) != tokens or len(self.policy_versions) != tokens:
            raise ValueError(
                f"{tokens} completion tokens but {len(self.rollout_logprobs)} logprobs "
                f"and {len(self.policy_versions)} policy versions"
            )


class RolloutGroup(Message, frozen=True, kw_only=True):
    """All rollouts sampled for one prompt; advantages are computed within it."""

    group_id: str
    kind: Literal["train", "validation"]
    step: int
    sampled_by: str
    """Name of the replica, for the timeline and for the operator."""
    prompt_ids: list[int]
    rollouts: list[Rollout]
    generate_seconds: float
    score_seconds: float
    scored_at: float = 0.0
    """Unix time, on the replica's clock, at which the last reward was there. 0 in the files of an older Retort."""

    @property
    def oldest_policy_version(self) -> int:
        return min((min(r.policy_versions) for r in self.rollouts if r.policy_versions), default=self.step)


def sample_seed(run_seed: int, group_id: str, sample: int) -> int:
    """Seed of one completion: a function of run, group and sample, so a repeated group repeats its completions.

    63 bits, non-negative, which every engine accepts.
    """
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
