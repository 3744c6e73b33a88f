"""The teacher: an exponential moving average of the policy, float32, in shards of the policy's shape."""

from services.trainer.policy import Policy
from services.trainer.schedule import update_teacher
from services.trainer.weight_copy import WeightCopy


class Teacher(WeightCopy):
    """The averaged weights, with which the policy's network scores what has a demonstration."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.local_shards())

    def follow(self, policy: Policy, *, rate: float, finite_updates: int) -> None:
        """Move towards the policy; once per training step."""
        update_teacher(self.shards, policy.local_shards(), rate=rate, finite_updates=finite_updates)
