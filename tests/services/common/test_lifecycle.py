from __future__ import annotations

import asyncio
import threading

import pytest

from services.common.lifecycle import Draining, Lifecycle


def test_the_drain_waits_for_open_work_and_refuses_more() -> None:
    async def scenario() -> None:
        lifecycle = Lifecycle()
        seen: list[bool] = []
        lifecycle.on_drain(lambda: seen.append(lifecycle.draining))
        with lifecycle.work():
            drained = asyncio.create_task(lifecycle.drain(5.0))
            await lifecycle.drain_started.wait()
            assert seen == [True]
            with pytest.raises(Draining), lifecycle.work():
                raise AssertionError("work began during the drain")
            assert lifecycle.open_work == 1
            assert not drained.done()
        assert await drained
        assert lifecycle.open_work == 0

    asyncio.run(scenario())


def test_the_drain_gives_up_at_its_timeout() -> None:
    async def scenario() -> bool:
        lifecycle = Lifecycle()
        with lifecycle.work():
            return await lifecycle.drain(0.01)

    assert not asyncio.run(scenario())


def test_a_failure_from_another_thread_stops_the_service_and_the_first_one_counts() -> None:
    async def scenario() -> None:
        lifecycle = Lifecycle()
        first, second = RuntimeError("first"), RuntimeError("second")
        for error in (first, second):
            thread = threading.Thread(target=lifecycle.fail, args=(error,))
            thread.start()
            thread.join()
        await asyncio.wait_for(lifecycle.wait_stop(), 5.0)
        assert lifecycle.failure is first

    asyncio.run(scenario())
