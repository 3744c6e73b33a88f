"""The version and lease protocol, small enough to walk every interleaving of it.

Actions are named like the code's: what a replica does is `WeightReceiver` and `Sampler`, what the trainer does is
`WeightSender` and `Rank0Steps`, what Redis does is functions.lua. A step trains one group. A sync goes on beside
whatever else happens, training and the next version included, so that no order of the two is left out. Replicas are
alike, so their order does not count: what is known about one of them lies in its record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Weights = tuple[int, int]
"""(epoch, version): what one trainer made. A trainer that restarts makes the same version anew, as other weights."""
TORN: Weights = (-1, -1)
"""What a broadcast that broke in the middle leaves."""


class Hand(NamedTuple):
    """A group that a replica has leased and what it has sampled of it."""

    step: int
    epoch: int
    sampled_by: Weights | None = None
    said: int = -1
    """The version that the replica says has sampled it."""
    is_acked: bool = False


class Replica(NamedTuple):
    phase: str = "joining"
    epoch: int = 0
    pending: Weights | None = None
    weights: Weights | None = None
    is_damaged: bool = False
    """What was received is not what was sent."""
    hand: Hand | None = None
    before: Weights | None = None
    """What it served until the update that goes on; noted only if that has sampled what it has in hand."""
    is_draining: bool = False
    is_current: bool = False
    """The trainer has verified this process at its present version."""
    is_evicted: bool = False
    late: tuple[str, Weights] | None = None
    """A call that its trainer has given up on, and that may still arrive."""


class State(NamedTuple):
    replicas: tuple[Replica, ...]
    epoch: int = 1
    version: int = 0
    checkpoint: int = 0
    work: tuple[str, ...] = ("absent", "absent")
    """Of each step's group: absent, issued, leased or submitted."""
    stream: tuple[tuple[int, Weights, int], ...] = ()
    """Finished groups: step, the weights that sampled it, the version that they are said to be."""
    zombie: tuple[int, int] | None = None
    """(epoch, version) of a trainer that was replaced and does not know it."""
    committed: frozenset[Weights] = frozenset()
    """Every policy that a trainer has verified on some replica."""
    broken: str = ""
    crashes: int = 1
    faults: int = 1
    drains: int = 0
    max_staleness: int = 0

    @property
    def policy(self) -> Weights:
        # A resumed trainer holds the weights of its checkpoint, whoever made them.
        return (self.epoch, self.version)


@dataclass(frozen=True)
class Protocol:
    """What can happen next. `bug` names the one rule that is left out."""

    bug: str = ""

    def actions(self, state: State) -> Iterator[tuple[str, State]]:
        if is_done(state):
            return
        yield from self.trainer(state)
        for number, replica in enumerate(state.replicas):
            others = state.replicas[:number] + state.replicas[number + 1 :]
            for moves in (self.sync, self.sample, self.fail):
                for action, after, new in moves(state, replica):
                    yield action, after._replace(replicas=tuple(sorted((*others, new), key=hash)))

    def trainer(self, state: State) -> Iterator[tuple[str, State]]:
        step = state.version + 1
        for ahead in range(step, min(step + state.max_staleness, len(state.work)) + 1):
            if state.work[ahead - 1] == "absent":
                yield f"issue {ahead}", with_work(state, ahead, "issued")
        if any(entry[0] == step for entry in state.stream):
            replicas = tuple(sorted((r._replace(is_current=False) for r in state.replicas), key=hash))
            yield f"train {step}", state._replace(version=step, replicas=replicas)
        if state.checkpoint < state.version:
            yield f"checkpoint {state.version}", state._replace(checkpoint=state.version)
        yield from (self.release(state, entry[0]) for entry in state.stream if entry[0] <= state.checkpoint)
        if state.crashes:
            yield (
                "trainer replaced",
                state._replace(
                    epoch=state.epoch + 1,
                    version=state.checkpoint,
                    crashes=state.crashes - 1,
                    zombie=(state.epoch, state.version),
                    replicas=tuple(sorted((self.seen_by_successor(state, r) for r in state.replicas), key=hash)),
                ),
            )
        if state.zombie and self.bug == "fence_not_checked_by_redis":
            yield "replaced trainer issues", state._replace(broken="a trainer that was replaced wrote to Redis")

    def seen_by_successor(self, state: State, replica: Replica) -> Replica:
        trusts = self.bug == "successor_trusts_what_a_replica_says"
        says_it_serves = replica.phase == "serving" and replica.pending and replica.pending[1] == state.checkpoint
        return replica._replace(is_current=bool(trusts and says_it_serves))

    def release(self, state: State, step: int) -> tuple[str, State]:
        stream = tuple(entry for entry in state.stream if entry[0] != step)
        return f"release {step}", with_work(state._replace(stream=stream), step, "absent")

    def sync(self, state: State, r: Replica) -> Iterator[tuple[str, State, Replica]]:
        """The four calls, from whoever believes to be the trainer."""
        # Who drains is left out, but says so only while it serves: in an update it has to come to the end of that.
        says_it_drains = r.is_draining and (r.phase == "serving" or self.bug == "drain_hides_an_update")
        if not r.is_current and not r.is_evicted and not says_it_drains:
            yield from self.next_call(state, r)
        if state.zombie:
            # It was about to make one more call when it was replaced; a commit only if it was content with the probe.
            calls = ["prepare"] if r.is_evicted else ["prepare", "commit"]
            for call in calls:
                for after, new, _ in self.call(state, r, call, state.zombie):
                    yield f"{call} by the replaced trainer", after._replace(zombie=None), new
        if r.late:
            for after, new, _ in self.call(state, r._replace(late=None), *r.late):
                yield f"late {r.late[0]}", after, new

    def next_call(self, state: State, r: Replica) -> Iterator[tuple[str, State, Replica]]:
        """The present trainer's next call, which may be lost on the way, may lose its answer, or may come late."""
        call = {"prepared": "transfer", "received": "probe", "verifying": "commit"}.get(r.phase, "prepare")
        if r.phase != "serving" and r.pending != state.policy:
            call = "prepare"
        for after, new, is_content in self.call(state, r, call, state.policy):
            yield call, after, new._replace(is_current=is_content and call == "commit", is_evicted=not is_content)
            if after.faults:
                yield f"{call}, its answer is lost", spent(after), new._replace(is_evicted=True)
        if state.faults:
            yield f"{call} comes late", spent(state), r._replace(is_evicted=True, late=(call, state.policy))

    def call(self, state: State, r: Replica, call: str, policy: Weights) -> Iterator[tuple[State, Replica, bool]]:
        """What a replica does with a call: the state after, the replica after, and whether the trainer is content."""
        if policy[0] < r.epoch:
            if self.bug != "fence_not_checked_by_replica":
                yield state, r, False
                return
            state = state._replace(broken="a replica obeyed a trainer that was replaced")
        if call == "prepare":
            served = r.pending if r.phase == "serving" and r.hand and r.hand.sampled_by else r.before
            prepared = r._replace(phase="prepared", epoch=policy[0], pending=policy, is_damaged=False, before=served)
            yield state, prepared, True
        elif call == "transfer" and r.phase == "prepared" and r.pending == policy:
            yield state, r._replace(phase="received"), True
            if state.faults:
                yield spent(state), r._replace(phase="received", is_damaged=True), True
                # For whichever replica it breaks, those who are left are prepared again; none is evicted for it.
                yield spent(state), r._replace(phase="torn", weights=TORN), True
        elif call == "probe" and r.phase == "received" and r.pending == policy:
            skips = self.bug == "late_joiner_skips_verification" and r.weights is None
            loaded = r._replace(phase="verifying", weights=r.pending)
            yield state, loaded, skips or not r.is_damaged
        elif call == "commit" and r.pending is not None and self.may_commit(r, policy):
            serving = r._replace(phase="serving", before=None)
            yield state._replace(committed=state.committed | {r.pending}), serving, True
        else:
            yield state, r, False

    def may_commit(self, r: Replica, policy: Weights) -> bool:
        if self.bug == "commit_out_of_phase":
            return True
        return r.phase == "verifying" and r.pending == policy

    def sample(self, state: State, r: Replica) -> Iterator[tuple[str, State, Replica]]:
        if r.hand is None:
            if r.is_draining and r.phase in ("joining", "serving"):
                yield "drained replica leaves", state, Replica()
            elif r.phase == "serving":
                for step, work in enumerate(state.work, start=1):
                    if work == "issued":
                        yield f"take {step}", with_work(state, step, "leased"), r._replace(hand=Hand(step, r.epoch))
        elif r.hand.sampled_by is None:
            goes_on = {"sampled_before_commit": "verifying", "version_advanced_before_apply": "prepared"}
            if r.phase in ("serving", goes_on.get(self.bug)) and r.weights and r.pending:
                sampled = r.hand._replace(epoch=r.epoch, sampled_by=r.weights, said=r.pending[1])
                yield f"sample {r.hand.step}", state, r._replace(hand=sampled)
        elif self.may_be_submitted(state, r, r.hand):
            yield from self.submit(state, r, r.hand)
        elif r.phase == "serving":
            given_back = with_work(state, r.hand.step, "issued") if is_leased(state, r.hand.step) else state
            yield f"give back {r.hand.step}", given_back, r._replace(hand=None, before=None)

    def may_be_submitted(self, state: State, r: Replica, hand: Hand) -> bool:
        served = r.phase == "serving" and r.pending is not None and r.pending[1] >= hand.said
        # What was committed before the update that goes on need not wait for its end.
        served |= r.before is not None and r.before[0] == r.epoch and r.before[1] >= hand.said
        same_epoch = hand.epoch == r.epoch or self.bug == "epochs_not_compared"
        fresh = hand.said >= hand.step - 1 - state.max_staleness or self.bug == "staleness_not_checked"
        return (served or self.bug == "unverified_tokens_leave") and same_epoch and fresh

    def submit(self, state: State, r: Replica, hand: Hand) -> Iterator[tuple[str, State, Replica]]:
        assert hand.sampled_by is not None
        if hand.epoch != r.epoch:
            state = state._replace(broken="tokens that were sampled for one trainer left for another")
        if self.bug == "acknowledged_before_appended" and not hand.is_acked:
            yield f"acknowledge {hand.step}", with_work(state, hand.step, "submitted"), with_ack(r, hand)
            return
        stored = state._replace(stream=(*state.stream, (hand.step, hand.sampled_by, hand.said)))
        is_awaited = state.work[hand.step - 1] in ("issued", "leased") or hand.is_acked
        is_stored = is_awaited or self.bug == "duplicates_are_stored"
        after = with_work(stored, hand.step, "submitted") if is_stored else state
        yield f"submit {hand.step}", after, r._replace(hand=None, before=None)

    def fail(self, state: State, r: Replica) -> Iterator[tuple[str, State, Replica]]:
        """A lease runs out, a process dies, an evicted one learns it, an operator drains one."""
        if state.drains and not r.is_draining:
            yield "drain", state._replace(drains=state.drains - 1), r._replace(is_draining=True)
        if r.hand and state.faults and is_leased(state, r.hand.step):
            late = with_work(spent(state), r.hand.step, "issued")
            yield f"lease of {r.hand.step} runs out", late, r
        restarted = Replica()
        if r.is_evicted:
            yield "evicted replica restarts", self.let_go(state, r), restarted
        if state.crashes:
            yield "replica dies", self.let_go(state, r)._replace(crashes=state.crashes - 1), restarted

    def let_go(self, state: State, r: Replica) -> State:
        """The work of a process that is gone: its lease runs out, and another takes it."""
        if r.hand and is_leased(state, r.hand.step) and self.bug != "expired_leases_are_kept":
            return with_work(state, r.hand.step, "issued")
        return state


def spent(state: State) -> State:
    """One fault more has happened."""
    return state._replace(faults=state.faults - 1)


def is_leased(state: State, step: int) -> bool:
    return state.work[step - 1] == "leased"


def with_work(state: State, step: int, work: str) -> State:
    return state._replace(work=(*state.work[: step - 1], work, *state.work[step:]))


def with_ack(r: Replica, hand: Hand) -> Replica:
    return r._replace(hand=hand._replace(is_acked=True))


def violation(state: State) -> str:
    """Which promise a state breaks; empty: none."""
    serving = [r for r in state.replicas if r.phase == "serving"]
    believed = [r for r in serving if r.is_current and not r.is_evicted]
    steps = [step for step, _, _ in state.stream]
    sampled = [(r.hand.sampled_by, r.hand.said) for r in state.replicas if r.hand and r.hand.sampled_by]
    rules = {
        "a replica serves weights that are not what was sent": all(
            not r.is_damaged and r.weights == r.pending for r in serving
        ),
        "the trainer believes a replica to be current that is not": all(r.pending == state.policy for r in believed),
        "tokens are said to be of another version than sampled them": all(w[1] == said for w, said in sampled),
        "a token was sampled by weights that were not committed": all(w in state.committed for w, _ in sampled),
        "tokens are staler than allowed": all(
            0 <= step - 1 - said <= state.max_staleness for step, _, said in state.stream
        ),
        "a group is there twice": len(steps) == len(set(steps)),
    }
    return next((promise for promise, holds in rules.items() if not holds), state.broken)


def is_done(state: State) -> bool:
    return state.checkpoint == len(state.work) and not state.stream
