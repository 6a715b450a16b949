"""200 identical requests at once take no longer than one alone.

usage: shared.py [CLIENTS]

Measured: the time from the first request to the last byte of the last response, for one client
and for many at once, of one streamed answer that takes a second to make; three rounds in turn.
The time to write the responses is measured apart, as the same number of hits of that answer.
Limits: all clients are on this machine, in one process, which reads as fast as it can.
"""

import asyncio
import sys
import time

from common import median, ollprox, post, save, script

LINES, PAUSE = 100, 0.01


async def ask(port: int, prompt: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(prompt, stream=True, header="Connection: close\r\n"))
    data = await reader.read()
    writer.close()
    assert data.count(b'"done":') == LINES + 1, data[:300]
    return len(data)


async def at_once(port: int, prompt: str, clients: int) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*(ask(port, prompt) for _ in range(clients)))
    return time.perf_counter() - begun


async def measure(clients: int) -> int:
    alone, together, written = [], [], []
    with script("fast_ollama.py", LINES, PAUSE) as upstream, ollprox(upstream) as (port, _):
        for number in range(3):
            alone.append(await at_once(port, f"alone {number}", 1))
            together.append(await at_once(port, f"together {number}", clients))
            written.append(await at_once(port, f"together {number}", clients))
    figures = {"one alone": alone, f"{clients} at once": together, f"{clients} hits": written}
    save("shared", {"seconds": figures})
    limit = 1.1 * median(alone) + median(written)
    print(f"one alone          {median(alone):.3f} s")
    print(f"{clients} at once        {median(together):.3f} s")
    print(f"{clients} hits           {median(written):.3f} s   (the time to write the responses)")
    print(f"the limit          {limit:.3f} s   (one alone, 10 % more, and the writing)")
    kept = median(together) <= limit
    print("kept" if kept else "NOT KEPT")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(measure(int(sys.argv[1]) if sys.argv[1:] else 200)))
