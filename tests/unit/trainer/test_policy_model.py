import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.trainer import policy_model
from services.trainer.packing import MicroBatch, pack
from services.trainer.policy_model import PolicyModel
from tests.training import VOCABULARY, a_language_model

PROMPTS = [[1, 2, 3], [4], [5, 6]]
COMPLETIONS = [[7, 8], [9, 10, 11, 12], []]


def packed(*rows: int) -> MicroBatch:
    return pack(list(rows), PROMPTS, COMPLETIONS, torch.device("cpu"))


def distributions(prompt: Sequence[int], completion: Sequence[int], temperature: float) -> torch.Tensor:
    """[tokens, vocabulary] log-probabilities, from the library's model and nothing else."""
    model = a_language_model(attention="sdpa")
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


class Allocations(TorchDispatchMode):
    """Bytes of what operations make: the most that were alive together, and the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_each_sequence_by_itself(temperature: float) -> None:
    scores = PolicyModel(a_language_model())(packed(0, 1, 2), temperature)
    expected = [distributions(*pair, temperature) for pair in zip(PROMPTS[:2], COMPLETIONS[:2], strict=True)]
    logprobs = [d[range(len(ids)), ids] for d, ids in zip(expected, COMPLETIONS[:2], strict=True)]
    entropies = [-(d.exp() * d).sum(-1) for d in expected]
    torch.testing.assert_close(scores.logprobs, torch.cat(logprobs), rtol=0, atol=1e-10)
    torch.testing.assert_close(scores.entropies, torch.cat(entropies), rtol=0, atol=1e-10)


def test_the_head_gives_the_same_however_few_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model = PolicyModel(a_language_model())
        logprobs = model(packed(0, 1), 1.0).logprobs
        logprobs.square().sum().backward()
        return logprobs, model.language_model.lm_head.weight.grad

    at_once = logprobs_and_gradient()
    monkeypatch.setitem(policy_model.LOGITS_AT_ONCE, "cpu", VOCABULARY)
    one_by_one = logprobs_and_gradient()
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-12)


def test_the_gradient_of_the_scores_is_that_of_finite_differences() -> None:
    hidden, head = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    targets = torch.tensor([0, 3, 3, 1, 2])
    inputs = hidden.requires_grad_(), head.requires_grad_(), targets, 0.7, False
    assert torch.autograd.gradcheck(lambda *given: policy_model._Score.apply(*given)[0], inputs)


def test_chunks_of_a_narrow_model_add_to_the_gradient_of_the_head_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tokens push the same logit by 1 and by a 256th: in bfloat16, 1 + 1/256 is 1."""
    monkeypatch.setitem(policy_model.LOGITS_AT_ONCE, "cpu", 2)
    hidden = torch.tensor([[1.0]] + [[1 / 256]] * 100, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    policy_model._Score.apply(hidden, head, torch.zeros(101, dtype=torch.long), 1.0, False)[0].sum().backward()
    assert head.grad is not None
    # Each token's share is (1 - 1/2) of its hidden value for its target, and minus as much for the other.
    assert head.grad[:, 0].tolist() == pytest.approx([(1 + 100 / 256) / 2, -(1 + 100 / 256) / 2], rel=0.005)


def test_neither_forward_nor_backward_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens, at_once = 32_768, 512, 16
    monkeypatch.setitem(policy_model.LOGITS_AT_ONCE, "cpu", at_once * vocabulary)
    model = PolicyModel(a_language_model(dtype=torch.float32, vocabulary=vocabulary))
    batch = pack([0], [[1]], [[2] * tokens], torch.device("cpu"))
    with Allocations() as allocations:
        model(batch, 1.0).logprobs.sum().backward()
    chunk = at_once * vocabulary * 4
    assert chunk <= allocations.largest < 2 * chunk
    assert allocations.peak < tokens * vocabulary * 4 / 2


def test_scores_of_a_narrow_model_are_float32() -> None:
    scores = PolicyModel(a_language_model(dtype=torch.bfloat16))(packed(0), 1.0)
    assert scores.logprobs.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_without_rows_gives_every_parameter_a_gradient_of_zero(tied: bool) -> None:
    model = PolicyModel(a_language_model(tied=tied))
    model(packed(), 1.0).logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_row_without_completion_has_no_scores_and_a_gradient_of_zero() -> None:
    model = PolicyModel(a_language_model())
    scores = model(packed(2), 1.0)
    assert scores.logprobs.shape == (0,)
    scores.logprobs.sum().backward()
    assert not model.language_model.lm_head.weight.grad.any()


def test_entropies_carry_no_gradient_and_are_zeros_where_nobody_asks() -> None:
    model = PolicyModel(a_language_model())
    assert not model(packed(0), 1.0).entropies.requires_grad
    assert model(packed(0), 1.0, entropies=False).entropies.tolist() == [0.0, 0.0]


def test_a_frozen_head_has_no_gradient_and_what_is_before_it_has() -> None:
    model = PolicyModel(a_language_model(tied=False))
    head = model.language_model.lm_head.weight.requires_grad_(False)
    model(packed(0, 1), 1.0).logprobs.sum().backward()
    assert head.grad is None
    assert model.language_model.model.embed_tokens.weight.grad.any()
