"""One value per event loop, closed with it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from milvus_vllm_retrievers._core.per_loop import PerLoop


class Resource:
    """Refers to its loop, as async clients do."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed_in: asyncio.AbstractEventLoop | None = None
        self.closed = asyncio.Event()


async def close(resource: Resource) -> None:
    for _ in range(5):  # as real ones, it takes a while
        await asyncio.sleep(0)
    resource.closed.set()
    resource.closed_in = asyncio.get_running_loop()


@pytest.fixture
def per_loop() -> PerLoop[Resource]:
    return PerLoop(Resource, close)


async def test_a_loop_keeps_its_value_until_it_is_closed(per_loop: PerLoop[Resource]) -> None:
    first = await per_loop.get()
    assert await per_loop.get() is first

    await per_loop.close()
    await per_loop.close()

    assert first.closed_in is asyncio.get_running_loop()
    assert await per_loop.get() is not first


async def test_tasks_that_ask_at_once_share_one_value(per_loop: PerLoop[Resource]) -> None:
    values = await asyncio.gather(*(per_loop.get() for _ in range(9)))

    assert len(set(values)) == 1


def test_what_nobody_closes_is_closed_in_its_own_loop_when_that_ends(
    per_loop: PerLoop[Resource],
) -> None:
    first, second = asyncio.run(per_loop.get()), asyncio.run(per_loop.get())

    assert first.loop is not second.loop
    assert (first.closed_in, second.closed_in) == (first.loop, second.loop)


def test_loops_that_ended_are_not_kept(per_loop: PerLoop[Resource]) -> None:
    first, second, _ = (weakref.ref(asyncio.run(per_loop.get())) for _ in range(3))

    gc.collect()

    assert (first(), second()) == (None, None)


# Uses


async def test_a_value_that_is_used_is_closed_by_the_last_who_uses_it(
    per_loop: PerLoop[Resource],
) -> None:
    async with per_loop.using() as first:
        async with per_loop.using() as same:
            await per_loop.close()
        assert same is first
        assert first.closed_in is None

        async with per_loop.using() as other:
            assert other is not first

    assert first.closed_in is asyncio.get_running_loop()
    assert other.closed_in is None
    await per_loop.close()
    assert other.closed_in is asyncio.get_running_loop()


async def test_a_value_that_is_used_when_it_is_discarded_is_closed_after_that(
    per_loop: PerLoop[Resource],
) -> None:
    async with per_loop.using() as value:
        per_loop.discard(value)
        await asyncio.sleep(0)
        assert value.closed_in is None
    assert value.closed_in is asyncio.get_running_loop()


async def test_a_value_that_nobody_uses_when_it_is_discarded_is_closed_soon(
    per_loop: PerLoop[Resource],
) -> None:
    value = await per_loop.get()
    per_loop.discard(value)
    per_loop.discard(value)

    await value.closed.wait()
    assert await per_loop.get() is not value


async def test_a_use_that_fails_is_over(per_loop: PerLoop[Resource]) -> None:
    async def fail() -> None:
        async with per_loop.using():
            await per_loop.close()
            raise ZeroDivisionError

    value = await per_loop.get()
    with pytest.raises(ZeroDivisionError):
        await fail()

    assert value.closed_in is asyncio.get_running_loop()


async def test_closing_goes_on_though_its_waiting_is_cancelled(per_loop: PerLoop[Resource]) -> None:
    value = await per_loop.get()
    closing = asyncio.create_task(per_loop.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing

    await value.closed.wait()


class Connecting:
    """Makes resources that connect before their first use, and may fail to."""

    def __init__(self) -> None:
        self.tried: list[Resource] = []
        self.fails = False
        self.per_loop = PerLoop(Resource, close, self.connect)

    async def connect(self, resource: Resource) -> None:
        self.tried.append(resource)
        await asyncio.sleep(0)
        if self.fails:
            raise ConnectionError

    async def use(self) -> Resource:
        async with self.per_loop.using() as value:
            return value


async def test_a_value_is_connected_once_however_many_ask_first() -> None:
    connecting = Connecting()

    values = await asyncio.gather(*(connecting.use() for _ in range(9)))

    assert connecting.tried == list(set(values))


async def test_a_value_that_did_not_connect_is_connected_by_its_next_user() -> None:
    connecting = Connecting()
    connecting.fails = True
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await connecting.use()
    connecting.fails = False

    value = await connecting.use()

    assert connecting.tried == [value] * 3


async def test_a_value_that_is_closed_while_it_connects_is_closed_after_that() -> None:
    connecting = Connecting()
    connecting.fails = True
    using = asyncio.create_task(connecting.use())
    await asyncio.sleep(0)
    await connecting.per_loop.close()
    (value,) = connecting.tried
    assert value.closed_in is None

    with pytest.raises(ConnectionError):
        await using
    assert value.closed_in is asyncio.get_running_loop()


# What is dropped


async def leave(per_loop: PerLoop[Resource], closed: list[Resource]) -> None:
    closed.append(await per_loop.get())


async def dropped_at_once(closed: list[Resource]) -> None:
    await leave(PerLoop(Resource, close), closed)


async def dropped_a_little_before(closed: list[Resource]) -> None:
    await leave(PerLoop(Resource, close), closed)
    await asyncio.sleep(0)


async def dropped_by_a_task_that_the_end_cancels(closed: list[Resource]) -> None:
    serves = asyncio.Event()

    async def serve(per_loop: PerLoop[Resource]) -> None:
        await leave(per_loop, closed)
        serves.set()
        await asyncio.sleep(3600)

    serving = asyncio.create_task(serve(PerLoop(Resource, close)))
    await serves.wait()
    assert not serving.done()


async def dropped_in_a_cycle(closed: list[Resource]) -> None:
    per_loop: Any = PerLoop(Resource, close)
    per_loop.itself = per_loop
    await leave(per_loop, closed)


@pytest.mark.parametrize(
    "drop",
    [
        dropped_at_once,
        dropped_a_little_before,
        dropped_by_a_task_that_the_end_cancels,
        dropped_in_a_cycle,
    ],
)
def test_what_is_dropped_as_its_loop_ends_is_closed(
    drop: Callable[[list[Resource]], Coroutine[Any, Any, None]],
) -> None:
    values: list[Resource] = []

    asyncio.run(drop(values))

    assert values[0].closed_in is values[0].loop


async def test_what_is_dropped_while_its_loop_runs_is_closed_soon() -> None:
    values: list[Resource] = []
    await dropped_at_once(values)

    await values[0].closed.wait()


async def test_a_value_that_cannot_be_closed_fails_no_call() -> None:
    async def fail(resource: Resource) -> None:
        resource.closed.set()
        raise RuntimeError("the server is gone")

    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    per_loop = PerLoop(Resource, fail)

    async with per_loop.using() as used:
        await per_loop.close()
    dropped = await per_loop.get()
    per_loop.discard(dropped)
    await dropped.closed.wait()
    await asyncio.sleep(0)
    gc.collect()

    assert used.closed.is_set()
    assert heard == []
