"""The teacher: an exponential moving average of the policy, float32, in shards of the policy's shape."""

from services.trainer.policy import Policy
from services.trainer.schedule import update_teacher
from services.trainer.weight_copy import WeightCopy


class Teacher(WeightCopy):
    """The averaged weights, with which the policy's network scores what has a demonstration."""

    def __init__(self, policy: Policy, *, on_host: bool = False) -> None:
        super().__init__(policy.local_shards(), on_host=on_host)

    def follow(self, policy: Policy, *, rate: float, finite_updates: int) -> None:
        """Move towards the policy; once per training step."""
        for mine, shard in zip(self.shards, policy.local_shards(), strict=True):
            average = mine.to(shard.device)
            update_teacher([average], [shard], rate=rate, finite_updates=finite_updates)
            mine.copy_(average)
