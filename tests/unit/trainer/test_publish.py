from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from retort.weight_sync import Snapshot
from services.trainer.policy import Policy
from services.trainer.publish import WeightPublisher
from services.trainer.weight_sender import Probe, SyncReport, WeightSender
from tests.training import a_config, a_language_model


class CollectingSender(WeightSender):
    """Keeps what it is to send."""

    def __init__(self) -> None:
        self.published: list[Any] = []
        self.report = SyncReport(replicas=3)
        self.snapshot: Snapshot | None = None
        self._going_on = None

    def publish(self, snapshot: Snapshot, probe: Probe) -> SyncReport:
        self.snapshot = snapshot
        self.published.append((snapshot, probe))
        return SyncReport(replicas=2)

    def sync(self) -> int:
        self.published.append("sync")
        return 0

    def start_sync(self, oldest: int = 0) -> int:
        self.published.append("start_sync")
        return 0


def a_policy(mesh: DeviceMesh) -> Policy:
    policy = Policy(a_language_model(), a_config().trainer, mesh, dtype=torch.float64, temperature=0.5)
    policy.version = 3
    return policy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_snapshot_holds_every_tensor_in_the_served_type(mesh: DeviceMesh, dtype: str) -> None:
    policy, sender = a_policy(mesh), CollectingSender()
    config = a_config(model={"dtype": dtype}, weight_sync={"bucket_mib": 0.002})
    WeightPublisher(sender, config, policy, probe_ids=[1, 2]).publish(policy)
    [(snapshot, _), _] = sender.published
    served = getattr(torch, dtype)
    tensors = [tensor.to(served) for _, tensor in policy.full_tensors()]
    specs = [spec for bucket in snapshot.manifest.buckets for spec in bucket]
    assert (snapshot.version, len(snapshot.buckets)) == (3, len(snapshot.manifest.buckets))
    assert len(snapshot.buckets) > 1
    assert [spec.name for spec in specs] == policy.names
    assert [(spec.shape, spec.dtype) for spec in specs] == [(list(tensor.shape), dtype) for tensor in tensors]
    first = snapshot.buckets[0][: tensors[0].nbytes].view(served).view(tensors[0].shape)
    assert torch.equal(first, tensors[0])


def test_the_probe_is_the_trainers_own_word_on_the_version_and_the_sync_follows(mesh: DeviceMesh) -> None:
    policy, sender = a_policy(mesh), CollectingSender()
    WeightPublisher(sender, a_config(), policy, probe_ids=[4, 5, 6]).publish(policy)
    [(_, probe), then] = sender.published
    assert probe == Probe([4, 5, 6], policy.score_prompt([4, 5, 6]))
    assert then == "sync"


def test_the_next_snapshot_lies_where_the_last_one_was_and_holds_the_new_weights(mesh: DeviceMesh) -> None:
    policy, sender = a_policy(mesh), CollectingSender()
    weights = WeightPublisher(sender, a_config(), policy, probe_ids=[1, 2])
    weights.publish(policy)
    assert sender.snapshot
    places, digests = [bucket.data_ptr() for bucket in sender.snapshot.buckets], sender.snapshot.digests
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(2.0)
    weights.publish(policy)
    assert [bucket.data_ptr() for bucket in sender.snapshot.buckets] == places
    assert sender.snapshot.digests != digests
    fresh = Snapshot.take(policy.version, sender.snapshot.manifest, policy.full_tensors())
    assert fresh.digests == sender.snapshot.digests


@pytest.mark.parametrize(
    ("max_staleness", "steps", "then", "replicas"),
    [(0, 9, "sync", 3), (1, 9, "start_sync", 2), (1, 3, "sync", 3)],
    ids=["nothing may be stale", "the next step may", "the last version"],
)
def test_training_goes_on_beside_a_sync_where_the_next_step_may_be_sampled_by_older_versions(
    mesh: DeviceMesh, max_staleness: int, steps: int, then: str, replicas: int
) -> None:
    """The report is of the sync that was waited for: where none was, of the version before."""
    policy, sender = a_policy(mesh), CollectingSender()
    config = a_config(trainer={"max_staleness": max_staleness, "steps": steps})
    weights = WeightPublisher(sender, config, policy, probe_ids=[1, 2])
    weights.publish(policy)
    assert sender.published[1:] == [then]
    assert weights.report.replicas == replicas
    assert weights.report.snapshot_seconds > 0


def test_the_report_is_empty_on_other_ranks(mesh: DeviceMesh) -> None:
    policy = a_policy(mesh)
    elsewhere = WeightPublisher(None, a_config(), policy, probe_ids=[1, 2])
    elsewhere.publish(policy)
    assert elsewhere.report == SyncReport()
