"""Adapters over several ranks, and over the wire: replicas add them to a base of their own, and serve nothing else."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from retort import weight_sync
from retort.config import WeightSyncConfig
from retort.identity import Identity
from retort.lora import base_digest, merge
from retort.weight_sync import LoraBase, Snapshot, TensorSpec, WeightManifest
from services.trainer.weight_sender import Probe, WeightSender
from tests.integration.lora_programs import load_then_train, train_and_save
from tests.integration.queue_run import Run
from tests.integration.rank_programs import Arrays
from tests.integration.replica import AUTHORIZATION
from tests.integration.torch_replica import TorchReplica, Weights, prompt_logprobs
from tests.integration.trainer_ranks import Ranks
from tests.training import a_language_model

RanksOf = Callable[[int], Ranks]
PROBE_IDS = [3, 1, 4, 1, 5, 9, 2, 6]
RANK, SCALE = 2, 1.5
PAIR = "model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.1.mlp.up_proj.lora_A.weight"


def assert_equal(state: Mapping[str, Arrays], expected: Mapping[str, Arrays], tolerance: float) -> None:
    for part, tensors in expected.items():
        assert state[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(state[part][name], tensor, rtol=0, atol=tolerance, err_msg=f"{part}.{name}")


def test_adapters_train_alike_on_any_number_of_ranks_and_go_on_on_any_other(ranks: RanksOf, tmp_path: Path) -> None:
    saved = {size: ranks(size).run(train_and_save, tmp_path / str(size))[0] for size in (1, 2, 3)}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in saved[1]["policy"])
    assert all(np.abs(moment).max() > 0 for moment in saved[1]["exp_avg"].values())
    [(_, expected)] = ranks(1).run(load_then_train, tmp_path / "1")
    for writers, readers in ((2, 1), (2, 3), (3, 2)):
        assert_equal(saved[writers], saved[1], tolerance=1e-10)
        for loaded, trained in ranks(readers).run(load_then_train, tmp_path / str(writers)):
            assert_equal(loaded, saved[writers], tolerance=0.0)
            assert_equal(trained, expected, tolerance=1e-10)


@cache
def base() -> Weights:
    """Made once: replicas are threads here, and two at a time would draw from one generator."""
    model = a_language_model(0, dtype=torch.float32, attention="sdpa")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def adapters_of(version: int) -> Weights:
    """Of every linear layer of the blocks, other ones for each version."""
    generator = torch.Generator().manual_seed(version)
    factors = {}
    for name, weight in base().items():
        if name.endswith("_proj.weight"):
            layer, (rows, columns) = name.removesuffix("weight"), weight.shape
            factors[f"{layer}lora_A.weight"] = 0.3 * torch.randn(RANK, columns, generator=generator)
            factors[f"{layer}lora_B.weight"] = 0.3 * torch.randn(rows, RANK, generator=generator)
    return factors


def policy_of(version: int) -> Qwen3ForCausalLM:
    """The plain model that base and adapters add up to."""
    model, factors = a_language_model(0, dtype=torch.float32, attention="sdpa"), adapters_of(version)
    for name, parameter in model.named_parameters():
        if f"{name.removesuffix('weight')}lora_A.weight" in factors:
            layer = name.removesuffix("weight")
            pair = factors[f"{layer}lora_A.weight"], factors[f"{layer}lora_B.weight"]
            parameter.data = merge(parameter.detach(), *pair, SCALE)
    return model


def a_sender(run: Run) -> WeightSender:
    config = WeightSyncConfig(deadline_s=30.0, max_probe_gap=1e-4)
    return WeightSender(
        run.trainer(1), config, epoch=1, backend="gloo", authorization=AUTHORIZATION, identity=Identity()
    )


def specs_of(tensors: Weights) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=list(tensor.shape), dtype="float32") for name, tensor in tensors.items()]


def publish(sender: WeightSender, version: int) -> None:
    adapters, specs = adapters_of(version), specs_of(base())
    manifest = WeightManifest.of(specs_of(adapters), 2**10, LoraBase(tensors=specs, scale=SCALE))
    snapshot = Snapshot.take(version, manifest, adapters.items(), base_digest=base_digest(specs, base()))
    sender.publish(snapshot, Probe(PROBE_IDS, prompt_logprobs(policy_of(version), PROBE_IDS)))


def assert_holds(replica: TorchReplica, version: int) -> None:
    policy = policy_of(version)
    for (name, ours), theirs in zip(policy.named_parameters(), replica.engine.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def evictions(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    fields = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "replica_evicted"]
    return [(f["replica"], f["phase"], f["reason"]) for f in fields]


def test_replicas_serve_base_and_adapters_version_after_version_and_late_ones_too(run: Run) -> None:
    sender = a_sender(run)
    with TorchReplica(run, "early", files=base) as early:
        for version in (0, 1, 2):
            publish(sender, version)
            assert sender.sync() == 1
            assert_holds(early, version)
        with TorchReplica(run, "late", files=base) as late:
            assert sender.sync() == 2
            assert_holds(late, 2)
            publish(sender, 3)
            assert sender.sync() == 2
            for replica in (early, late):
                assert_holds(replica, 3)
                assert replica.calls[-4:] == ["prepare", "transfer", "probe", "commit"]


def test_what_is_broadcast_are_the_bytes_of_the_adapters(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, broadcast = [], weight_sync.broadcast

    def count(group: weight_sync.ProcessGroup, buffer: Tensor, timeout_s: float) -> None:
        sent.append(len(buffer))
        broadcast(group, buffer, timeout_s)

    monkeypatch.setattr(weight_sync, "broadcast", count)
    sender = a_sender(run)
    with TorchReplica(run, files=base):
        publish(sender, 0)
        assert sender.sync() == 1
    assert sum(sent) == sum(tensor.nbytes for tensor in adapters_of(0).values()) == 3712
    assert sum(tensor.nbytes for tensor in base().values()) == 4 * 4448


def flip_one_bit(number: int, bucket: Tensor) -> None:
    if number == 1:
        bucket[7] ^= 64


def test_a_flipped_bit_in_an_adapter_stops_the_commit(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sender = a_sender(run)
    with TorchReplica(run, files=base, corrupt=flip_one_bit) as replica:
        publish(sender, 0)
        assert sender.sync() == 0
        assert replica.calls == ["prepare", "transfer"]
        assert replica.receiver.served_version is None
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("rollout-0", "transfer")
    assert "received 4 of 4 buckets, with other bytes than were sent in buckets [1]" in reason


def one_bit_off() -> Weights:
    weights = {name: tensor.clone() for name, tensor in base().items()}
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    return weights


def without_the_norm() -> Weights:
    return {name: tensor for name, tensor in base().items() if name != "model.norm.weight"}


@pytest.mark.parametrize("files", [one_bit_off, without_the_norm, dict])
def test_another_base_stops_the_commit(
    run: Run, caplog: pytest.LogCaptureFixture, files: Callable[[], Weights]
) -> None:
    caplog.set_level(logging.INFO, logger="retort")
    sender = a_sender(run)
    with TorchReplica(run, "right", files=base) as right, TorchReplica(run, "wrong", files=files) as wrong:
        publish(sender, 0)
        assert sender.sync() == 1
        assert right.says_it_serves(0)
        assert wrong.calls == ["prepare", "transfer"]
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("wrong", "transfer")
    assert "another base than the trainer's: its model.path does not hold the same weights" in reason


def swap_two(weights: Weights) -> Weights:
    one, other = (name.replace("lora_A.", "") for name in PAIR)
    return {**weights, one: weights[other], other: weights[one]}


def test_what_is_loaded_wrongly_after_merging_the_probe_finds(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sender = a_sender(run)
    with TorchReplica(run, files=base, load_as=swap_two) as replica:
        publish(sender, 0)
        assert sender.sync() == 0
        assert replica.receiver.served_version is None
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("rollout-0", "probe")
    assert "it does not hold what was sent" in reason
