"""What a GPU does not need all the time, kept in the host's memory and copied there and back around its use.

It is computed with where it would be otherwise, so every result has the same bits. Without a GPU the copies are within
one memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from services.trainer.weight_copy import local

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments lie on the host and visit the device one parameter at a time.

    They are plain tensors: this rank's shards.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "nothing is evaluated again"
        for settings in self.param_groups:
            for parameter in settings["params"]:
                if parameter.grad is not None:
                    self._update(parameter, settings)

    def _update(self, parameter: Tensor, settings: dict[str, Any]) -> None:
        assert parameter.grad is not None
        shard = local(parameter)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=shard.device)
            state.update((name, zero_moment(self, parameter)) for name in MOMENTS)
        first, second = (state[name].to(shard.device) for name in MOMENTS)
        adamw(
            [shard],
            [local(parameter.grad)],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            state[name].copy_(moment)


def zero_moment(optimizer: torch.optim.AdamW, parameter: Tensor) -> Tensor:
    """A moment before the first update, where this optimizer keeps it."""
    if isinstance(optimizer, HostAdamW):
        shard = local(parameter)
        return torch.zeros_like(shard, device="cpu", pin_memory=shard.is_cuda)
    return torch.zeros_like(parameter)
