"""The identity of a run: what has to be the same on both sides, and what need not."""

from copy import deepcopy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retort.identity import Identity, identity_of
from tests.training import a_config

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def test_what_differs_is_named_with_both_digests(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = identity_of(a_config(tmp_path), tokenizer)
    assert trainer.contradiction(trainer) == ""

    with_template = deepcopy(tokenizer)
    with_template.chat_template = "{{ messages }}"
    replica = identity_of(a_config(tmp_path), with_template)
    expected = f"its chat template is {replica.chat_template} and the trainer's is {trainer.chat_template}"
    assert replica.contradiction(trainer) == expected

    with_a_token = deepcopy(tokenizer)
    with_a_token.add_tokens(["<new>"])
    replica = identity_of(a_config(tmp_path), with_a_token)
    expected = f"its tokenizer is {replica.tokenizer} and the trainer's is {trainer.tokenizer}"
    assert replica.contradiction(trainer) == expected


def test_another_run_and_other_sampling_are_others_and_another_place_is_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = identity_of(a_config(tmp_path), tokenizer)
    elsewhere = a_config(tmp_path / "elsewhere", rollout={"replicas": 3, "host": "10.0.0.2"}, timeouts={"stall_s": 5})
    assert identity_of(elsewhere, tokenizer) == trainer

    hotter = identity_of(a_config(tmp_path, sampling={"temperature": 0.5}), tokenizer)
    assert hotter.contradiction(trainer) == f"its config is {hotter.config} and the trainer's is {trainer.config}"
    other_run = identity_of(a_config(tmp_path).model_copy(update={"run_id": "other"}), tokenizer)
    assert other_run.contradiction(trainer) == f"its run is other and the trainer's is {trainer.run}"


def test_a_side_that_says_nothing_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert identity_of(a_config(tmp_path), tokenizer).contradiction(Identity()) != ""
