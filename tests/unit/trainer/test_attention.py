"""A packed row gives what the library's own model gives for each sequence by itself."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

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
        sequence_lengths=batch.sequence_lengths,
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
        sequence_lengths=batch.sequence_lengths,
        use_cache=False,
    ).last_hidden_state[0]
    hidden[5].square().sum().backward()  # the second token of the second sequence
    assert embeddings.grad is not None
    assert embeddings.grad[0].abs().sum(-1).gt(0).tolist() == [False, False, False, False, True, True, False]
