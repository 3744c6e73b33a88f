"""Breadth-first exploration of a protocol's model: every state that any order of its actions can reach."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True)
class Exploration(Generic[State]):
    """All reachable states, or the shortest way to one that must not be."""

    num_states: int
    violation: str = ""
    trace: tuple[str, ...] = ()
    """The actions that lead to the violation."""


def explore(
    initial: State,
    actions: Callable[[State], Iterable[tuple[str, State]]],
    violation: Callable[[State], str],
    is_done: Callable[[State], bool],
) -> Exploration[State]:
    """Walk every interleaving. A state that breaks a rule, or from which no order of actions gets done, ends it."""
    came_by: dict[State, tuple[State | None, str]] = {initial: (None, "")}
    before: dict[State, list[State]] = {initial: []}
    frontier = [initial]
    while frontier:
        found: list[State] = []
        for state in frontier:
            for action, after in actions(state):
                before.setdefault(after, []).append(state)
                if after in came_by:
                    continue
                came_by[after] = (state, action)
                found.append(after)
                if broken := violation(after):
                    return Exploration(len(came_by), broken, _trace(after, came_by))
        frontier = found
    hopeless = set(came_by) - _can_reach([state for state in came_by if is_done(state)], before)
    for state in came_by:  # in the order in which they were found: the first has the shortest trace
        if state in hopeless:
            return Exploration(len(came_by), "the run can never be finished", _trace(state, came_by))
    return Exploration(len(came_by))


def _can_reach(goals: Iterable[State], before: dict[State, list[State]]) -> set[State]:
    reached = set(goals)
    frontier = list(reached)
    while frontier:
        for state in before[frontier.pop()]:
            if state not in reached:
                reached.add(state)
                frontier.append(state)
    return reached


def _trace(state: State, came_by: dict[State, tuple[State | None, str]]) -> tuple[str, ...]:
    trace = []
    before, action = came_by[state]
    while before is not None:
        trace.append(action)
        before, action = came_by[before]
    return tuple(reversed(trace))
