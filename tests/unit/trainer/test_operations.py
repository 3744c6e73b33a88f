import torch
from torch.utils.flop_counter import FlopCounterMode

from services.trainer.operations import ModelCost, matmul_rate, peak_rate
from services.trainer.packing import Span, pack
from services.trainer.policy_model import PolicyModel
from tests.training import VOCABULARY, a_language_model

BLOCK = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16 + 2 * 4
"""Weights of queries and output, keys and values, MLP, norms of one of the two blocks."""
CPU = torch.device("cpu")


def test_attention_costs_as_much_as_the_blocks_at_their_weights_over_its_width() -> None:
    # Four heads of four; the number of blocks cancels out.
    assert ModelCost.of(a_language_model()).parity == BLOCK / (4 * 4) == 122.5


def test_a_forward_pass_costs_two_operations_a_weight_and_token_and_the_squares() -> None:
    # Sequences of 3 and 5 tokens, of which 2 and 4 are predicted.
    expected = 2 * (2 * BLOCK * 8 + 16 * VOCABULARY * 6 + 2 * 4 * 4 * (9 + 25))
    assert ModelCost.of(a_language_model()).forward([Span(3, 0), Span(5, 0)], 6) == expected


def test_a_shared_prompt_costs_once_and_what_completions_see_of_it_each_time() -> None:
    # A prompt of 4 and behind it 1 and 3 tokens: 16, then 25 - 16 and 49 - 16.
    expected = 2 * (2 * BLOCK * 8 + 16 * VOCABULARY * 4 + 2 * 4 * 4 * (16 + 9 + 33))
    batch = pack([0, 1], [[1, 2, 3, 4]] * 2, [[5], [6, 7, 8]], CPU)
    assert ModelCost.of(a_language_model()).forward(batch.spans, len(batch.targets)) == expected


def test_products_with_weights_are_as_many_as_torch_counts() -> None:
    model = a_language_model(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PolicyModel(model)(pack([0], [[1]], [[2] * 40], CPU), 1.0)
    # Norms are no products, and torch has no count for attention on the CPU.
    norms, attention = 2 * 2 * (2 * 16 + 2 * 4) * 41, 2 * (2 * 4 * 4) * 41**2
    assert counter.get_total_flops() == ModelCost.of(model).forward([Span(41, 0)], 40) - norms - attention


def test_the_peak_of_a_processor_is_what_a_product_of_matrices_reaches() -> None:
    assert 1e8 < peak_rate(CPU, torch.float32) < 1e13
    assert 1e8 < matmul_rate(CPU, torch.float64) < 1e13
