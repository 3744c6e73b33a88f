"""A training step in plain formulas: one process, float64, one sequence at a time, none of the trainer's own code."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Row:
    """One completion and what is known of it before the step."""

    prompt: list[int]
    completion: list[int]
    rollout_logprobs: Tensor
    advantage: float
    teacher_prompt: list[int] | None
    old_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    teacher_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))


def logprobs_of(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    predicting = logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
    return predicting.log_softmax(-1).gather(-1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]


def loss_of_row(model: nn.Module, row: Row) -> Tensor:
    """Mean over the row's tokens of u * l, with the reference run's constants."""
    if not row.completion:
        return torch.zeros((), dtype=torch.float64)
    logprobs = logprobs_of(model, row.prompt, row.completion)
    sign = (row.advantage > 0) - (row.advantage < 0)
    advantage = torch.full_like(logprobs, row.advantage)
    if row.teacher_prompt is not None:
        w = (sign * (row.teacher_logprobs - logprobs.detach())).clamp(-20, 20).exp()
        advantage = row.advantage * (0.5 + 0.5 * w.clamp(0.8, 1.2))
    ratio = (logprobs - row.old_logprobs).clamp(-20, 20).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    if row.advantage < 0:
        loss = torch.minimum(loss, -3 * advantage)
    correction = (row.old_logprobs - row.rollout_logprobs).clamp(-20, 20).exp().clamp(max=2.0)
    return (correction * loss).mean()


def gradients_of(model: nn.Module, rows: Sequence[Row]) -> tuple[float, dict[str, Tensor]]:
    """Loss of an update and its gradient: the mean over the rows of their losses."""
    model.zero_grad()
    total = 0.0
    for row in rows:
        loss = loss_of_row(model, row) / len(rows)
        total += loss.item()
        if loss.requires_grad:
            loss.backward()
    return total, {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


class ReferenceTrainer:
    """Policy, teacher and AdamW with their update rules written out."""

    def __init__(self, policy: nn.Module, teacher: nn.Module, *, max_grad_norm: float, weight_decay: float) -> None:
        self.policy = policy
        self.teacher = teacher
        self.first = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}
        self._updates = 0
        self._max_grad_norm = max_grad_norm
        self._weight_decay = weight_decay

    def step(self, updates: Sequence[Sequence[Row]], *, learning_rate: float) -> None:
        with torch.no_grad():
            for row in (row for rows in updates for row in rows):
                row.old_logprobs = logprobs_of(self.policy, row.prompt, row.completion)
                if row.teacher_prompt is not None:
                    row.teacher_logprobs = logprobs_of(self.teacher, row.teacher_prompt, row.completion)
        for rows in updates:
            self._update(gradients_of(self.policy, rows)[1], learning_rate)
        with torch.no_grad():
            for average, parameter in zip(self.teacher.parameters(), self.policy.parameters(), strict=True):
                average.copy_(0.95 * average + 0.05 * parameter)

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], learning_rate: float) -> None:
        norm = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
        scale = min(1.0, self._max_grad_norm / (float(norm) + 1e-6))
        self._updates += 1
        for name, parameter in self.policy.named_parameters():
            gradient = gradients[name] * scale
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            mean = self.first[name] / (1 - 0.9**self._updates)
            deviation = (self.second[name] / (1 - 0.999**self._updates)).sqrt()
            parameter.mul_(1 - learning_rate * self._weight_decay)
            parameter.sub_(learning_rate * mean / (deviation + 1e-8))
