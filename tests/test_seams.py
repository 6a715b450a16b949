"""The promise of the seams: a new step on the way to Ollama is one function around the others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from parts import OneBody, make_head, make_proxy, make_upstream
from standin import StandIn

from record import Record
from wire.http11 import Ask, Exchange, Response

QUESTION = b'{"model": "llama2", "prompt": "Why?", "stream": false}'


def counting(exchange: Exchange, counts: list[str]) -> Exchange:
    """An exchange that only counts."""

    @asynccontextmanager
    async def counted(ask: Ask) -> AsyncIterator[Response]:
        counts.append(ask.model)
        async with exchange(ask) as response:
            yield response

    return counted


def delaying(exchange: Exchange, gate: asyncio.Event) -> Exchange:
    """An exchange that only delays, until a gate opens."""

    @asynccontextmanager
    async def delayed(ask: Ask) -> AsyncIterator[Response]:
        await gate.wait()
        async with exchange(ask) as response:
            yield response

    return delayed


async def test_exchanges_that_count_and_delay_are_put_around_the_upstream(ollama: StandIn) -> None:
    counts: list[str] = []
    gate = asyncio.Event()
    upstream = make_upstream(ollama.port)
    made = make_proxy(upstream, exchange=counting(delaying(upstream.exchange, gate), counts))
    head = make_head(length=len(QUESTION))
    records = [Record("-"), Record("-"), Record("-")]
    asked = [
        asyncio.create_task(made.proxy.handle(OneBody(head, QUESTION), record))
        for record in records[:2]
    ]
    while len(counts) < 1:
        await asyncio.sleep(0)
    assert ollama.asked() == []  # both wait together, inside one flight
    gate.set()
    first, second = await asyncio.gather(*asked)
    third = await made.proxy.handle(OneBody(head, QUESTION), records[2])
    assert first.body == second.body == third.body
    assert [record.outcome for record in records] == ["miss", "collapsed", "hit"]
    assert counts == ["llama2:latest"]
    for response in (first, second):
        assert response.release is not None
        response.release()
    await upstream.close()
