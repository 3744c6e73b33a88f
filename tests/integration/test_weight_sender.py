"""Weight syncs with real HTTP, a real broadcast and real members: only what was verified is ever served."""

import logging
import time
from collections.abc import Callable

import httpx
import pytest
import torch
from torch import Tensor

from retort.config import WeightSyncConfig
from retort.identity import Identity
from retort.queues import Evicted
from retort.weight_sync import PrepareRequest, Snapshot, TensorSpec, WeightManifest
from services.trainer.weight_sender import Probe, WeightSender
from tests.integration.doomed_replica import PHASES, a_doomed_replica
from tests.integration.queue_run import Run
from tests.integration.replica import AUTHORIZATION
from tests.integration.torch_replica import TorchReplica, Weights, prompt_logprobs, untouched
from tests.training import a_language_model

PROBE_IDS = [3, 1, 4, 1, 5, 9, 2, 6]
DEADLINE_S = 3.0
HEADERS = {"Authorization": AUTHORIZATION}
TENSORS_ONE_BY_ONE = 1e-6


def a_sender(run: Run, epoch: int = 1, host: str = "127.0.0.1") -> WeightSender:
    config = WeightSyncConfig(deadline_s=DEADLINE_S, max_probe_gap=1e-4, host=host)
    return WeightSender(
        run.trainer(epoch), config, epoch=epoch, backend="gloo", authorization=AUTHORIZATION, identity=Identity()
    )


def publish(sender: WeightSender, version: int, *, bucket_mib: float = 0.004) -> torch.nn.Module:
    """Publish a policy that is another one for every version."""
    policy = a_language_model(version, dtype=torch.float32, attention="sdpa")
    specs = [TensorSpec(name=name, shape=list(p.shape), dtype="float32") for name, p in policy.named_parameters()]
    manifest = WeightManifest.of(specs, int(bucket_mib * 2**20))
    tensors = ((name, parameter.detach()) for name, parameter in policy.named_parameters())
    probe = Probe(PROBE_IDS, prompt_logprobs(policy, PROBE_IDS))
    sender.publish(Snapshot.take(version, manifest, tensors), probe)
    return policy


def assert_holds(replica: TorchReplica, policy: torch.nn.Module) -> None:
    for model in replica.engine.models:
        for (name, ours), theirs in zip(policy.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def evictions(log: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    """(replica, phase, reason) of every eviction so far."""
    fields = [r.__dict__["fields"] for r in log.records if r.getMessage() == "replica_evicted"]
    return [(f["replica"], f["phase"], f["reason"]) for f in fields]


def assert_evicted(run: Run, replica: TorchReplica) -> None:
    assert replica.name not in run.view.members()
    with pytest.raises(Evicted):
        replica.announce()
    assert httpx.get(f"{replica.url}/readyz").status_code == 503
    assert replica.receiver.served_version is None


def test_every_replica_serves_what_was_sent_version_after_version(run: Run) -> None:
    sender = a_sender(run)
    with TorchReplica(run, "rollout-0") as first, TorchReplica(run, "rollout-1") as second:
        for version in (0, 1):
            policy = publish(sender, version)
            assert sender.sync() == 2
            for replica in (first, second):
                assert_holds(replica, policy)
                assert replica.says_it_serves(version)
            assert sender.report.replicas == 2
            assert sender.report.probe_gap < 1e-4


def test_a_replica_with_another_chat_template_is_refused_and_both_are_named(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    sender = a_sender(run)
    publish(sender, 0)
    other = TorchReplica(run)
    other.receiver._identity = Identity(run="", chat_template="00c0ffee00c0ffee")
    with other:
        assert sender.sync() == 0
        [(name, phase, reason)] = evictions(caplog)
        assert (name, phase) == (other.name, "prepare")
        assert "its chat template is 00c0ffee00c0ffee and the trainer's is " in reason
        assert_evicted(run, other)


def test_a_process_group_goes_on_while_its_members_are_the_same_and_nothing_fails(run: Run) -> None:
    sender = a_sender(run)

    def groups(*replicas: TorchReplica) -> list[object]:
        return [
            sender._broadcast._going and sender._broadcast._going.group,
            *(replica.engine.memberships[0]._group for replica in replicas),
        ]

    with TorchReplica(run, "first") as first:
        publish(sender, 0)
        assert sender.sync() == 1
        opened = groups(first)
        publish(sender, 1)
        assert sender.sync() == 1
        assert groups(first) == opened
        with TorchReplica(run, "second", corrupt=fail_in_transfer(2)) as second:
            publish(sender, 2)
            assert sender.sync() == 2
            of_two = groups(first, second)
            assert not set(map(id, of_two)) & set(map(id, opened))
            publish(sender, 3)
            assert sender.sync() == 2, "it failed once"
            assert not set(map(id, groups(first, second))) & set(map(id, of_two))


@pytest.mark.parametrize("bucket_mib", [TENSORS_ONE_BY_ONE, 1.0])
def test_a_sync_is_four_calls_a_replica_whatever_the_number_of_buckets(run: Run, bucket_mib: float) -> None:
    sender = a_sender(run)
    with TorchReplica(run) as replica:
        publish(sender, 0, bucket_mib=bucket_mib)
        assert sender.sync() == 1
        assert replica.calls == ["prepare", "transfer", "probe", "commit"]
        assert sender.sync() == 1
        assert len(replica.calls) == 4, "a replica that is current is left alone"


def flip_one_bit(number: int, bucket: Tensor) -> None:
    if number == 1:
        bucket[7] ^= 64


def test_a_flipped_bit_stops_the_commit(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sender = a_sender(run)
    with TorchReplica(run, corrupt=flip_one_bit) as replica:
        publish(sender, 0)
        assert sender.sync() == 0
        assert replica.calls == ["prepare", "transfer"]
        assert_evicted(run, replica)
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("rollout-0", "transfer")
    assert "in buckets [1]" in reason


def swap_two(weights: Weights) -> Weights:
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    return {**weights, one: weights[other], other: weights[one]}


def fail_in_transfer(number: int) -> Callable[[int, Tensor], None]:
    """A wire that breaks, for a replica, in one of the transfers that it takes part in, counted from 1."""
    begun = []

    def broken(bucket: int, _: Tensor) -> None:
        begun.extend([bucket] if bucket == 0 else [])
        if len(begun) == number:
            raise RuntimeError("out of memory")

    return broken


def drop_a_bucket(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.1.mlp")}


def keep_the_old_head(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != "model.embed_tokens.weight"}


def transpose_a_square(weights: Weights) -> Weights:
    name = "model.layers.1.self_attn.o_proj.weight"
    return {**weights, name: weights[name].T}


@pytest.mark.parametrize("load_as", [swap_two, drop_a_bucket, keep_the_old_head, transpose_a_square])
def test_right_bytes_loaded_wrongly_stop_the_commit(
    run: Run, caplog: pytest.LogCaptureFixture, load_as: Callable[[Weights], Weights]
) -> None:
    sender = a_sender(run)
    with TorchReplica(run, "bad", load_as=load_as) as bad, TorchReplica(run, "good") as good:
        policy = publish(sender, 0)
        assert sender.sync() == 1
        assert_holds(good, policy)
        assert good.says_it_serves(0)
        assert_evicted(run, bad)
        assert bad.calls == ["prepare", "transfer", "probe"]
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("bad", "probe")
    assert "weight_sync.max_probe_gap is 0.0001" in reason


def test_a_replica_that_was_served_well_before_is_evicted_as_well(run: Run) -> None:
    """The second version is loaded wrongly: the first is not served on, since its weights are gone."""
    healthy = [True]
    sender = a_sender(run)
    with TorchReplica(run, load_as=lambda weights: weights if healthy[0] else swap_two(weights)) as replica:
        publish(sender, 0)
        assert sender.sync() == 1
        healthy[0] = False
        publish(sender, 1)
        assert sender.sync() == 0
        assert_evicted(run, replica)


@pytest.mark.parametrize("phase", ["prepare", "transfer", "probe", "commit"])
def test_a_replica_that_is_silent_in_a_phase_is_named_and_costs_the_others_its_deadline(
    run: Run, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    sender = a_sender(run)
    with TorchReplica(run, "silent", silent_at=phase) as silent, TorchReplica(run, "well") as well:
        policy = publish(sender, 0)
        start = time.monotonic()
        serving = sender.sync()
        assert time.monotonic() - start < 1.5 * DEADLINE_S  # one deadline, and no second one
        assert serving == 1
        assert_holds(well, policy)
        assert well.says_it_serves(0)
        assert_evicted(run, silent)
    [(name, at, reason)] = evictions(caplog)
    assert (name, at) == ("silent", phase)
    assert f"/weights/{phase} did not answer within 3 s (weight_sync.deadline_s)" in reason


@pytest.mark.parametrize("fate", ["stopped", "killed"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_is_stopped_or_killed_in_a_phase_costs_the_others_its_deadline(
    run: Run, caplog: pytest.LogCaptureFixture, phase: str, fate: str
) -> None:
    sender = a_sender(run)
    with a_doomed_replica(run, phase, fate), TorchReplica(run, "well") as well:
        policy = publish(sender, 0)
        start = time.monotonic()
        assert sender.sync() == 1
        assert time.monotonic() - start < 1.5 * DEADLINE_S  # one deadline, and no second one
        assert_holds(well, policy)
        assert well.says_it_serves(0)
    call = phase.replace("broadcast", "transfer")
    assert [(name, at) for name, at, _ in evictions(caplog)] == [("doomed", call)]
    # A broadcast that failed for one has failed for all who did not have everything by then, and is repeated for them.
    repeated = {"transfer": {2}, "broadcast": {1, 2}}
    assert well.calls.count("transfer") in repeated.get(phase, {1})


def test_a_replica_that_breaks_the_broadcast_for_all_is_found_out(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def break_off(number: int, _: Tensor) -> None:
        if number == 2:
            raise RuntimeError("out of memory")

    sender = a_sender(run)
    with TorchReplica(run, "broken", corrupt=break_off) as broken, TorchReplica(run, "well") as well:
        policy = publish(sender, 0)
        assert sender.sync() == 1
        assert_holds(well, policy)
        assert_evicted(run, broken)
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("broken", "transfer")
    assert "out of memory" in reason


def test_those_who_are_left_of_a_broadcast_are_sent_to_together(run: Run) -> None:
    sender = a_sender(run)
    with (
        a_doomed_replica(run, "transfer", "killed"),
        TorchReplica(run, "one") as one,
        TorchReplica(run, "two") as two,
    ):
        publish(sender, 0)
        assert sender.sync() == 2
        going = sender._broadcast._going
        assert going and {name for name, _ in going.members} == {one.incarnation, two.incarnation}
        assert one.calls.count("transfer") == two.calls.count("transfer") == 2


def test_every_worker_of_a_replica_has_a_rank_of_its_own_and_holds_what_was_sent(run: Run) -> None:
    """As with tensor parallelism: ranks 1 and 2 are of one replica, 3 of the other, 4 to 6 of the last."""
    sender = a_sender(run)
    replicas = [TorchReplica(run, f"rollout-{number}", num_workers=size) for number, size in enumerate([2, 1, 3])]
    with replicas[0], replicas[1], replicas[2]:
        for version in (0, 1):
            policy = publish(sender, version)
            assert sender.sync() == 3
            going = sender._broadcast._going
            assert going and [size for _, size in going.members] == [2, 1, 3]
            for replica in replicas:
                assert_holds(replica, policy)
                assert replica.says_it_serves(version)


def test_one_worker_that_received_other_bytes_stops_the_commit_of_its_replica(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    sender = a_sender(run)
    with TorchReplica(run, corrupt=flip_one_bit, num_workers=2) as replica:
        publish(sender, 0)
        assert sender.sync() == 0
        assert_evicted(run, replica)
    [(_, phase, reason)] = evictions(caplog)
    assert phase == "transfer"
    assert "worker 1 received" in reason
    assert "in buckets [1]" in reason


def test_a_replica_that_is_gone_is_named(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    sender = a_sender(run)
    with TorchReplica(run) as replica:
        pass
    replica.announce()
    publish(sender, 0)
    assert sender.sync() == 0
    [(name, phase, reason)] = evictions(caplog)
    assert (name, phase) == ("rollout-0", "prepare")
    assert "ConnectError" in reason


def test_a_late_joiner_is_brought_up_by_the_next_sync_alone(run: Run) -> None:
    sender = a_sender(run)
    with TorchReplica(run, "early") as early:
        policy = publish(sender, 0)
        assert sender.sync() == 1
        with TorchReplica(run, "late") as late:
            assert sender.sync() == 2
            assert_holds(late, policy)
            assert late.says_it_serves(0)
            assert len(early.calls) == 4


def test_a_restarted_replica_is_brought_up_under_its_old_name(run: Run) -> None:
    sender = a_sender(run)
    publish(sender, 0)
    with TorchReplica(run, corrupt=flip_one_bit):
        assert sender.sync() == 0
    with TorchReplica(run, corrupt=untouched) as again:
        assert sender.sync() == 1
        assert again.says_it_serves(0)


def test_without_replicas_nothing_is_sent_and_nobody_serves(run: Run) -> None:
    sender = a_sender(run)
    publish(sender, 0)
    assert sender.sync() == 0


def test_a_replica_refuses_a_trainer_that_was_replaced(run: Run) -> None:
    with TorchReplica(run) as replica:
        newer = a_sender(run, epoch=2)
        publish(newer, 5)
        assert newer.sync() == 1
        late_word = PrepareRequest(epoch=1, version=6, manifest=WeightManifest(buckets=[]))
        answer = httpx.post(f"{replica.url}/weights/prepare", content=late_word.to_bytes(), headers=HEADERS)
        assert answer.status_code == 409
        assert answer.text == "prepare: trainer epoch 1 is over: epoch 2 has taken over"
        assert replica.says_it_serves(5)


@pytest.fixture(autouse=True)
def what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="retort")
