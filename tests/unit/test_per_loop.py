"""One value per event loop, closed with it."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from milvus_vllm_retrievers.core.per_loop import PerLoop


class Resource:
    """Refers to its loop, as async clients do."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed_in: asyncio.AbstractEventLoop | None = None


async def close(resource: Resource) -> None:
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
