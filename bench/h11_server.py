"""A bare yardstick: h11 over asyncio streams; each request gets an answer of 600 bytes.

usage: h11_server.py PORT
"""

import asyncio
import sys

import h11

BODY = b"x" * 600


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = h11.Connection(h11.SERVER)
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(65536)
            connection.receive_data(data)
            if not data:
                break
        elif isinstance(event, h11.EndOfMessage):
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]
            head = connection.send(h11.Response(status_code=200, headers=headers)) or b""
            body = connection.send(h11.Data(data=BODY)) or b""
            writer.write(head + body + (connection.send(h11.EndOfMessage()) or b""))
            await writer.drain()
            connection.start_next_cycle()
        elif isinstance(event, h11.ConnectionClosed):
            break
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
