"""A packed row gives what the library's own model gives for each sequence by itself."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.trainer import attention
from services.trainer.attention import attend_at_once, attend_one_by_one, packed_attention
from services.trainer.packing import MicroBatch, pack
from services.trainer.segments import NO_PREFIX, Segments
from tests.training import VOCABULARY, a_language_model

ONE_VERY_LONG = [3, 700, 2, 1]
CPU = torch.device("cpu")
LAYOUTS = [
    ([1], [NO_PREFIX]),
    ([5, 5], [NO_PREFIX, NO_PREFIX]),
    (ONE_VERY_LONG, [NO_PREFIX] * 4),
    ([130, 9, 300, 1, 4], [NO_PREFIX, 0, 0, NO_PREFIX, 3]),
]


def a_row(lengths: Sequence[int], prompt: int = 1) -> tuple[MicroBatch, list[list[int]]]:
    """Sequences of such lengths, and packed. Prompts longer than a token are the same."""
    generator = torch.Generator().manual_seed(len(lengths))
    shared = torch.randint(VOCABULARY, (prompt,), generator=generator).tolist()
    sequences = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    if prompt > 1:
        sequences = [shared + sequence[prompt:] for sequence in sequences]
    rows = list(range(len(lengths)))
    batch = pack(
        rows, [sequence[:prompt] for sequence in sequences], [s[prompt:] for s in sequences], CPU, share=prompt > 1
    )
    return batch, sequences


def packed_hidden_states(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    return model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments,
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


def test_a_shared_prompt_has_the_hidden_states_that_it_has_in_each_sequence_by_itself() -> None:
    plain_model = a_language_model(attention="sdpa")
    batch, sequences = a_row([9, 7, 12], prompt=6)
    with torch.no_grad():
        alone = [plain_model.model(torch.tensor([sequence])).last_hidden_state[0] for sequence in sequences]
        hidden = packed_hidden_states(a_language_model(), batch)
    expected = torch.cat([alone[0][:6], *(states[6:] for states in alone)])
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)


def test_a_token_depends_on_its_prompt_on_no_other_sequence_and_on_no_later_token() -> None:
    model = a_language_model()
    batch = pack([0, 1, 2], [[1, 2], [1, 2], [3]], [[4, 5], [6, 7], [8]], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 6, 7, 3, 8]]
    embeddings = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    hidden = model.model(
        inputs_embeds=embeddings, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
    ).last_hidden_state[0]
    hidden[4].square().sum().backward()  # the first token of the second completion
    assert embeddings.grad is not None
    touched = embeddings.grad[0].abs().sum(-1).gt(0).tolist()
    assert touched == [True, True, False, False, True, False, False, False]


def queries_keys_values(lengths: Sequence[int], *, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """For four query heads of 32 and two key/value heads, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, count, sum(lengths), 32, generator=generator, device=device, dtype=dtype).requires_grad_()
        for count in (4, 2, 2)
    ]


@pytest.mark.parametrize(("lengths", "prefixes"), LAYOUTS)
def test_what_each_segment_sees_put_before_it_gives_what_the_cpu_gives(lengths: list[int], prefixes: list[int]) -> None:
    heads = queries_keys_values(lengths, device="cpu", dtype=torch.float64)
    segments = Segments.of(lengths, prefixes, CPU)
    one_by_one = attend_one_by_one(*heads, segments, 0.125)
    on_cpu, _ = packed_attention(torch.nn.Module(), *heads, None, segments=segments, scaling=0.125)
    torch.testing.assert_close(one_by_one, on_cpu, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(one_by_one.square().sum(), heads),
        torch.autograd.grad(on_cpu.square().sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def by_the_kernels_documentation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What `varlen_attn` is said to compute, its causal mask aligned to the last key, for tensors [T, heads, d]."""
    assert window_size == (-1, 0)
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(queries), max(keys))
    out = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~mask, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


@pytest.mark.parametrize(("lengths", "prefixes"), LAYOUTS)
def test_the_kernel_is_asked_for_what_the_cpu_gives(
    lengths: list[int], prefixes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", by_the_kernels_documentation)
    heads = queries_keys_values(lengths, device="cpu", dtype=torch.float64)
    segments = Segments.of(lengths, prefixes, CPU)
    on_cpu, _ = packed_attention(torch.nn.Module(), *heads, None, segments=segments, scaling=0.125)
    torch.testing.assert_close(attend_at_once(*heads, segments, 0.125), on_cpu, rtol=0, atol=1e-12)


def test_the_kernel_for_all_sequences_takes_what_it_is_given() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        segments = Segments.of([3, 9, 1], [NO_PREFIX, 0, 0], CPU)
        heads = queries_keys_values([3, 9, 1], device="cpu")
        out = attend_at_once(*heads, segments, 0.125)
        out.sum().backward()
    assert out.shape == (1, 13, 4, 32)
    assert heads[1].grad is not None
    assert heads[1].grad.shape == (1, 2, 13, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packed sequences needs a GPU")
@pytest.mark.parametrize(("lengths", "prefixes"), LAYOUTS)
def test_the_kernel_gives_what_one_call_a_segment_gives(lengths: list[int], prefixes: list[int]) -> None:
    heads = queries_keys_values(lengths, device="cuda")
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    given = {"attention_mask": None, "segments": Segments.of(lengths, prefixes, heads[0].device), "scaling": 0.125}
    at_once, _ = packed_attention(torch.nn.Module(), *heads, **given)
    one_by_one, _ = packed_attention(torch.nn.Module(), *exact, **given)
    torch.testing.assert_close(at_once.double(), one_by_one, rtol=0, atol=0.02)
    for out in (at_once, one_by_one):
        out.square().sum().backward()
    for kernel, plain in zip(heads, exact, strict=True):
        assert kernel.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(kernel.grad.double(), plain.grad, rtol=0.05, atol=0.05)
