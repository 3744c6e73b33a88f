"""Mean and standard deviation of numbers that are spread over micro-batches and ranks.

Count, mean and sum of squared deviations of two sets give those of their union (Chan, Golub, LeVeque 1979).
Plain sums of squares would not do: the deviation of nearly equal numbers drowns in their rounding.
"""

import torch
from torch import Tensor


def moments(values: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of `values` [K], as [3] in float64. No values: zeros."""
    values = values.detach().double()
    count = torch.tensor(values.numel(), dtype=torch.float64, device=values.device)
    mean = values.sum() / count.clamp(min=1)
    return torch.stack((count, mean, (values - mean).square().sum()))


def merge(parts: Tensor) -> Tensor:
    """Moments of the union of P sets: [P, ..., 3] to [..., 3]."""
    count, mean, squares = parts.unbind(-1)
    total = count.sum(0)
    center = (count * mean).sum(0) / total.clamp(min=1)
    return torch.stack((total, center, (squares + count * (mean - center).square()).sum(0)), dim=-1)


def std(of: Tensor) -> Tensor:
    """Population standard deviation of moments [..., 3]; 0 for an empty set."""
    return (of[..., 2] / of[..., 0].clamp(min=1)).sqrt()
