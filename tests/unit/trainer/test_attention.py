"""A packed row gives what the library's own model gives for each sequence by itself."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.trainer.attention import attend_at_once, packed_attention
from services.trainer.packing import MicroBatch, pack
from tests.training import VOCABULARY, a_language_model

ONE_VERY_LONG = [3, 700, 2, 1]


def a_row(lengths: Sequence[int]) -> tuple[MicroBatch, list[list[int]]]:
    generator = torch.Generator().manual_seed(len(lengths))
    sequences = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    rows = list(range(len(lengths)))
    return pack(
        rows, [sequence[:1] for sequence in sequences], [s[1:] for s in sequences], torch.device("cpu")
    ), sequences


def packed_hidden_states(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    return model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        longest_sequence=max(batch.sequence_lengths),
        sequence_bounds=batch.sequence_bounds,
        use_cache=False,
    ).last_hidden_state[0]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[1], [5], [5, 5], [3, 9, 1, 4], ONE_VERY_LONG])
def test_packing_changes_no_hidden_state(lengths: list[int], kv_heads: int) -> None:
    packed_model = a_language_model(kv_heads=kv_heads)
    plain_model = a_language_model(kv_heads=kv_heads, attention="sdpa")
    batch, sequences = a_row(lengths)
    with torch.no_grad():
        expected = [plain_model.model(torch.tensor([sequence])).last_hidden_state[0] for sequence in sequences]
        hidden = packed_hidden_states(packed_model, batch)
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=0, atol=1e-10)


def test_a_token_depends_on_no_other_sequence_and_on_no_later_token() -> None:
    model = a_language_model()
    batch, _ = a_row([4, 3])
    embeddings = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    hidden = model.model(
        inputs_embeds=embeddings,
        position_ids=batch.position_ids,
        longest_sequence=max(batch.sequence_lengths),
        sequence_bounds=batch.sequence_bounds,
        use_cache=False,
    ).last_hidden_state[0]
    hidden[5].square().sum().backward()  # the second token of the second sequence
    assert embeddings.grad is not None
    assert embeddings.grad[0].abs().sum(-1).gt(0).tolist() == [False, False, False, False, True, True, False]


def queries_keys_values(lengths: Sequence[int], *, device: str) -> tuple[list[Tensor], Tensor]:
    """For four query heads of 32 and two key/value heads, with gradients; and the bounds of the sequences."""
    generator = torch.Generator(device).manual_seed(0)
    heads = [
        torch.randn(1, count, sum(lengths), 32, generator=generator, device=device, dtype=torch.bfloat16)
        for count in (4, 2, 2)
    ]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return [tensor.requires_grad_() for tensor in heads], bounds


def test_the_kernel_for_all_sequences_takes_what_it_is_given() -> None:
    with FakeTensorMode():
        heads, bounds = queries_keys_values([3, 9, 1], device="cpu")
        out = attend_at_once(*heads, bounds, 9, 0.125)
        out.sum().backward()
    assert out.shape == (1, 13, 4, 32)
    assert heads[1].grad is not None
    assert heads[1].grad.shape == (1, 2, 13, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packed sequences needs a GPU")
@pytest.mark.parametrize("lengths", [[1], [5, 5], [3, 9, 1, 4], ONE_VERY_LONG])
def test_the_kernel_gives_what_one_call_a_sequence_gives(lengths: list[int]) -> None:
    heads, bounds = queries_keys_values(lengths, device="cuda")
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    given = {"attention_mask": None, "longest_sequence": max(lengths), "sequence_bounds": bounds, "scaling": 0.125}
    at_once, _ = packed_attention(torch.nn.Module(), *heads, **given)
    one_by_one, _ = packed_attention(torch.nn.Module(), *exact, **given)
    torch.testing.assert_close(at_once.double(), one_by_one, rtol=0, atol=0.02)
    for out in (at_once, one_by_one):
        out.square().sum().backward()
    for kernel, plain in zip(heads, exact, strict=True):
        assert kernel.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(kernel.grad.double(), plain.grad, rtol=0.05, atol=0.05)
