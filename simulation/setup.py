"""What is simulated: a run file, and what its machine and model take."""

from dataclasses import dataclass

from retort.config import RunConfig
from services.rollout.engine_steps import TokenTime
from services.rollout.simulated_engine import Lengths


@dataclass(frozen=True)
class Setup:
    """Times in seconds."""

    config: RunConfig
    token_time: TokenTime
    live_completions: int
    """Of one engine."""
    lengths: Lengths
    prompt_tokens: int
    training_s: float
    """Of a whole step, on all trainer ranks."""
    transfer_s: float
    """Of the weights of one version, to all replicas."""
    reward_s: float = 0.02
    """Of one group."""
    restart_s: float = 60.0
    """From the death of a replica to another that asks for weights."""
    deaths: int = 0
    """Replicas that die in their first step, one after the other; each starts again."""
    death_every_s: float = 5.0


@dataclass(frozen=True)
class Measured:
    """What a simulated run came to."""

    step_s: list[float]
    """Virtual seconds of each step: from issuing its groups to the next version being served."""
    groups: int
    """Trained, each once."""
    tokens: int
    redis_calls: float
    """Commands a group, those that functions execute included."""
    redis_bytes: float
    """A group, in and out."""
    redis_cpu_s: float
    """Of a step."""
    trainer_cpu_s: float
    """Of a step: admission, reading, the weight sync's calls."""
    replica_cpu_s: float
    """Of a step and one replica."""
    real_s: float
    """What the simulation took."""

    @property
    def groups_per_s(self) -> float:
        return self.groups / sum(self.step_s)

    @property
    def control_share(self) -> float:
        """Redis, trainer and one replica, one after the other, as a share of the step."""
        control = self.redis_cpu_s + self.trainer_cpu_s + self.replica_cpu_s
        return control / (control + sum(self.step_s) / len(self.step_s))
