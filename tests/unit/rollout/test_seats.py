"""Seats for completions: who gets how many when, and that nobody leaves with one."""

import asyncio

import pytest

from services.rollout.seats import Seats


class Guest:
    """Asks for seats, and keeps them until told to go."""

    def __init__(self, seats: Seats, count: int) -> None:
        self.is_seated = False
        self.may_go = asyncio.Event()
        self._task = asyncio.create_task(self._visit(seats, count))

    async def _visit(self, seats: Seats, count: int) -> None:
        async with seats.taken(count):
            self.is_seated = True
            await self.may_go.wait()

    async def go(self) -> None:
        self.may_go.set()
        await self._task
        await settled()

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await settled()


async def settled() -> None:
    """All that can happen without another call has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


async def free(seats: Seats) -> int:
    """How many seats are free, found out by taking them."""
    count = 0
    guests = []
    while True:
        guests.append(Guest(seats, 1))
        await settled()
        if not guests[-1].is_seated:
            break
        count += 1
    for guest in guests:
        await guest.cancel()
    return count


def test_whoever_came_first_is_seated_first_also_when_a_later_one_needs_less() -> None:
    async def story() -> None:
        seats = Seats(16)
        first, large, small = Guest(seats, 10), Guest(seats, 10), Guest(seats, 1)
        await settled()
        assert (first.is_seated, large.is_seated, small.is_seated) == (True, False, False)
        await first.go()
        assert (large.is_seated, small.is_seated) == (True, True)
        await large.go()
        await small.go()
        assert await free(seats) == 16

    asyncio.run(story())


def test_two_who_together_need_more_than_there_are_do_not_wait_for_each_other() -> None:
    async def story() -> None:
        seats = Seats(16)
        for guest in [Guest(seats, 10) for _ in range(5)]:
            await settled()
            assert guest.is_seated
            await guest.go()

    asyncio.run(story())


@pytest.mark.parametrize("who", ["who sits", "who has some of the seats", "who waits for a turn"])
def test_a_request_that_is_cancelled_leaves_its_seats_to_the_others(who: str) -> None:
    async def story() -> None:
        seats = Seats(16)
        guests = {name: Guest(seats, 10) for name in ("who sits", "who has some of the seats", "who waits for a turn")}
        last = Guest(seats, 16)
        await settled()
        await guests.pop(who).cancel()
        for guest in guests.values():
            assert guest.is_seated
            await guest.go()
        assert last.is_seated
        await last.go()
        assert await free(seats) == 16

    asyncio.run(story())


@pytest.mark.parametrize("moments", range(6))
def test_one_who_is_cancelled_while_a_seat_falls_free_leaves_none_taken(moments: int) -> None:
    async def story() -> None:
        seats = Seats(1)
        sitting, waiting = Guest(seats, 1), Guest(seats, 1)
        await settled()
        sitting.may_go.set()
        for _ in range(moments):
            await asyncio.sleep(0)
        await waiting.cancel()
        await sitting.go()
        assert await free(seats) == 1

    asyncio.run(story())


def test_more_than_there_are_is_an_error_and_no_wait() -> None:
    async def story() -> None:
        with pytest.raises(ValueError, match="17 seats were asked for, and there are 16"):
            async with Seats(16).taken(17):
                pass

    asyncio.run(story())
