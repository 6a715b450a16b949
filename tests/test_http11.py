import time

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.bodies import LAST_CHUNK, ChunkedDecoder, LengthDecoder, frame_chunk, read_body
from wire.http11 import (
    FIELD_LINE,
    MAX_FIELDS,
    BadHead,
    Head,
    KnownHeads,
    Pairs,
    ResponseHead,
    Truncated,
    cannot_be_head,
    end_to_end,
    frame_request,
    frame_start,
    parse_request_head,
    parse_response_head,
    stored_headers,
)


def nobody(path: bytes, headers: Pairs) -> tuple[tuple[bytes, ...], bytes, Pairs]:
    return (), path, headers


def parsed(text: bytes) -> Head:
    return parse_request_head(text, nobody)


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /call_model HTTP/1.1\r\nHost: a\r\n"


def test_a_head_is_parsed() -> None:
    head = parsed(
        b"POST /call_model?x=1 HTTP/1.1\r\nHost: a:80\r\nX-One: 1\r\ncontent-length:  12 \r\n"
        b"x-one: 2\r\nExpect: 100-Continue\r\n\r\n"
    )
    assert (head.method, head.path, head.query) == (b"POST", b"/call_model", b"x=1")
    assert (head.length, head.chunked, head.keep_alive) == (12, False, True)
    assert head.expects_continue
    assert head.get(b"x-one") == b"1, 2"
    assert head.get(b"x-two") is None


@pytest.mark.parametrize(
    ("text", "keep_alive"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_keep_alive(text: bytes, keep_alive: bool) -> None:
    assert parsed(text).keep_alive is keep_alive


BAD_HEADS = [
    POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
    POST + b"Content-Length: 1\r\ncontent-length: 2\r\n\r\n",
    POST + b"Content-Length: 1, 1\r\n\r\n",
    POST + b"Content-Length: +1\r\n\r\n",
    POST + b"Content-Length: -1\r\n\r\n",
    POST + b"Content-Length: 0x1\r\n\r\n",
    POST + b"Content-Length: 1_0\r\n\r\n",
    POST + b"Content-Length: \r\n\r\n",
    POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    POST + b"Transfer-Encoding: identity\r\n\r\n",
    POST + b"Transfer-Encoding: xchunked\r\n\r\n",
    POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    POST + b"Transfer-Encoding : chunked\r\n\r\n",
    POST + b"Transfer-Encoding\t: chunked\r\n\r\n",
    b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    GET + b"X: a\r\n b\r\n\r\n",
    GET + b" X: a\r\n\r\n",
    GET + b"X: a\x00b\r\n\r\n",
    GET + b"X: a\x7fb\r\n\r\n",
    GET + b"X\r\n\r\n",
    GET + b": x\r\n\r\n",
    GET + b"X Y: x\r\n\r\n",
    GET + b"X: a\nY: b\r\n\r\n",
    GET + b"X: a\rY: b\r\n\r\n",
    b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    GET + b"Host: b\r\n\r\n",
    GET + b"Host: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    b"GET / http/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    b"GET /\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\n\r\n",
]


@pytest.mark.parametrize("text", BAD_HEADS)
def test_what_is_not_strictly_a_head_is_refused(text: bytes) -> None:
    with pytest.raises(BadHead) as caught:
        parsed(text)
    assert caught.value.status == 400


HUGE_LENGTHS = [b"1" * 19, b"18446744073709551650", b"9" * 16000]
HUGE_CHUNKS = [b"7fffffffffffffff", b"11111111111111111", b"f" * 1000]


@pytest.mark.parametrize("length", HUGE_LENGTHS)
def test_a_length_of_any_number_of_digits_is_413(length: bytes) -> None:
    with pytest.raises(BadHead) as caught:
        parsed(POST + b"Content-Length: " + length + b"\r\n\r\n")
    assert caught.value.status == 413


def test_zeros_in_front_of_a_length_do_not_count() -> None:
    assert parsed(POST + b"Content-Length: " + b"0" * 15 + b"12\r\n\r\n").length == 12


def test_a_head_has_at_most_100_fields() -> None:
    assert len(parsed(GET + b"X: 1\r\n" * (MAX_FIELDS - 1) + b"\r\n").headers) == 100
    with pytest.raises(BadHead) as caught:
        parsed(GET + b"X: 1\r\n" * MAX_FIELDS + b"\r\n")
    assert caught.value.status == 431


def test_refusals_quote_nothing_of_the_head() -> None:
    for text in BAD_HEADS:
        with pytest.raises(BadHead) as caught:
            parsed(text.replace(b"Host: a\r\n", b"Host: a\r\nAPIKEY: secretgardenkey\r\n"))
        assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("start", "lost"),
    [
        (b"", False),
        (b"GET / HTTP/1.1\r\nHost: a\r", False),
        (b"GET / HTTP/1.1\nHost: a\n\n", True),
        (b"GET / HTTP/1.1\rHost", True),
        (b"\x16\x03\x01\x02", True),
        (b"GET /\x00", True),
        (b"\r", False),
    ],
)
def test_a_start_that_cannot_be_a_head_is_noticed_at_once(start: bytes, lost: bool) -> None:
    assert cannot_be_head(start) is lost
    told = [cannot_be_head(start[:end], end - 1) for end in range(1, len(start) + 1)]
    assert any(told) is lost


def test_each_distinct_head_is_parsed_once() -> None:
    calls: list[bytes] = []

    def parse(raw: bytes) -> Head:
        calls.append(raw)
        return parsed(raw)

    known = KnownHeads(parse, check=False)
    one, two = POST + b"Content-Length: 1\r\n\r\n", POST + b"Content-Length: 2\r\n\r\n"
    assert known(one) is known(one)
    assert known(two).length == 2
    assert len(calls) == 2
    for number in range(3000):
        known(POST + b"X: %d\r\n\r\n" % number)
    assert known(one).length == 1
    assert len(calls) == 3003


def test_in_development_mode_a_known_head_is_held_against_a_fresh_one() -> None:
    heads = iter([parsed(GET + b"\r\n"), parsed(GET + b"\r\n"), parsed(GET + b"X: 1\r\n\r\n")])
    known = KnownHeads(lambda raw: next(heads), check=True)
    assert known(b"head") == known(b"head")
    with pytest.raises(AssertionError):
        known(b"head")


# Responses.


def test_a_response_head_is_parsed_with_order_and_case() -> None:
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nX-RateLimit-b: 1\r\nx-ratelimit-B:\t2 \r\n"
        b"Content-Length: 5\r\nX-Request-ID: theirs\r\n\r\n"
    )
    assert (head.status, head.length, head.chunked, head.keep_alive) == (200, 5, False, True)
    assert head.headers == (
        (b"Content-Type", b"x"),
        (b"X-RateLimit-b", b"1"),
        (b"x-ratelimit-B", b"2"),
    )


def test_what_is_for_operators_alone_is_no_header_of_the_response() -> None:
    fields = b"Location: /x\r\nServer: nginx\r\nServer: b\r\n"
    head = parse_response_head(b"HTTP/1.1 302 X\r\n%b\r\n" % fields)
    assert (head.location, head.server, head.headers) == (b"/x", b"nginx", ())


def test_a_response_header_that_connection_names_stops_here() -> None:
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nConnection: Retry-After\r\nRetry-After: 1\r\n\r\n"
    )
    assert head.headers == ()


@pytest.mark.parametrize(
    ("fields", "storable"),
    [
        (b"", True),
        (b"Cache-Control: no-cache\r\n", True),
        (b"Cache-Control: max-age=0, must-revalidate\r\n", True),
        (b"Cache-Control: public\r\nCache-Control: Private\r\n", False),
        (b'cache-control: private="set-cookie, x"\r\n', False),
        (b"Cache-Control: max-age=1,no-store\r\n", False),
        (b"Set-Cookie: a=b\r\n", False),
        (b"X: set-cookie, private\r\n", True),
    ],
)
def test_a_response_meant_for_one_client_is_seen(fields: bytes, storable: bool) -> None:
    assert parse_response_head(b"HTTP/1.1 200 OK\r\n%b\r\n" % fields).storable is storable


def test_a_stored_answer_keeps_no_header_that_was_true_once() -> None:
    headers = ((b"Content-Type", b"x"), (b"Retry-After", b"1"), (b"DATE", b"d"))
    assert stored_headers(headers) == ((b"Content-Type", b"x"), (b"DATE", b"d"))


@pytest.mark.parametrize("bad", [b"\x00", b"\x7f"])
def test_a_long_header_line_takes_linear_time(bad: bytes) -> None:
    """With a pattern that backtracks, these took more than ten seconds."""
    line = b"X:" + b" " * (60 << 10) + bad
    began = time.perf_counter()
    with pytest.raises(BadHead):
        parse_response_head(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % line)
    assert FIELD_LINE.fullmatch(line) is None  # as trailers use it
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: a\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\x00\x01\r\n\r\n",
    ],
)
def test_upstreams_heads_are_held_to_the_same_grammar(text: bytes) -> None:
    with pytest.raises(BadHead):
        parse_response_head(text)


@pytest.mark.parametrize("text", [b"HTTP/1.1 200\r\n\r\n", b"HTTP/1.1 200 \r\n\r\n"])
def test_a_reason_may_be_missing(text: bytes) -> None:
    assert parse_response_head(text) == ResponseHead(200, (), None, False, True)


def test_only_end_to_end_headers_pass() -> None:
    names = [
        (b"Connection", b"close, X-Private"),
        (b"Keep-Alive", b"1"),
        (b"Proxy-Connection", b"x"),
        (b"TE", b"x"),
        (b"Trailer", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"Content-Length", b"1"),
        (b"X-Private", b"x"),
        (b"X-Public", b"1"),
        (b"X-PUBLIC", b"2"),
    ]
    assert end_to_end(tuple(names)) == ((b"X-Public", b"1"), (b"X-PUBLIC", b"2"))


# Chunked bodies, fed whole, byte by byte, and with what follows.


def decode(data: bytes, step: int) -> tuple[bytes, bool, bytes]:
    decoder, buffer, out = ChunkedDecoder(), bytearray(), b""
    for start in range(0, len(data), step):
        buffer += data[start : start + step]
        while not decoder.done and (part := decoder.decode(buffer)):
            out += part
    return out, decoder.done, bytes(buffer)


GOOD_BODIES = [
    (b"0\r\n\r\n", b""),
    (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"003\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", b"abc0123456789"),
    (b'3;a=b;c="d e";f\r\nabc\r\n0;last\r\n\r\n', b"abc"),
    (b"3;a\r\nabc\r\n0\r\nX: y\r\nZ: \r\n\r\n", b"abc"),
]


@pytest.mark.parametrize(("data", "body"), GOOD_BODIES)
@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_a_chunked_body_is_decoded_however_it_is_cut(data: bytes, body: bytes, step: int) -> None:
    assert decode(data, step) == (body, True, b"")
    assert decode(data + b"GET /", step) == (body, True, b"GET /")


BAD_BODIES = [
    b"3 \r\nabc\r\n",
    b"3 ;a\r\nabc\r\n",
    b"3; a\r\nabc\r\n",
    b"g\r\n",
    b"+3\r\nabc",
    b"0x3\r\nabc",
    b"3_0\r\n",
    b"-1\r\n",
    b"\r\n",
    b" 3\r\nabc",
    b"3\nabc\n",
    b"3\rabc",
    b"3\r\nabcd\r\n",
    b"3\r\nabc\n0\r\n",
    b"3\r\nabc\r0",
    b"3\r\nabc0\r\n\r\n",
    b"3;a\nb\r\nabc\r\n",
    b"3;\x00\r\nabc\r\n",
    b'3;a="b\r\nabc\r\n',
    b"3;" + b"x" * 2000 + b"\r\nabc\r\n",
    b"3;" + b"x" * 2000,
    b"0\r\nnot a trailer\r\n\r\n",
    b"0\r\nX : y\r\n\r\n",
    b"0\r\n X: y\r\n\r\n",
    b"0\r\nX: y\nZ: z\r\n\r\n",
    b"0\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    b"0\r\nX: y\n\n",
    b"0\r\n\n",
]


@pytest.mark.parametrize("data", BAD_BODIES)
@pytest.mark.parametrize("step", [1, 3, 100_000])
def test_malformed_chunks_are_refused(data: bytes, step: int) -> None:
    with pytest.raises(BadHead):
        decode(data, step)


async def pieces(
    decoder: LengthDecoder | ChunkedDecoder, *arriving: bytes
) -> tuple[list[bytes], bytes]:
    """Read a body whose connection ends after `arriving`."""
    buffer, rest = bytearray(), iter(arriving)

    async def more() -> bool:
        data = next(rest, b"")
        buffer.extend(data)
        return bool(data)

    return [piece async for piece in read_body(decoder, buffer, more)], bytes(buffer)


async def test_a_body_is_read_as_it_arrives() -> None:
    chunks = (b"1\r\na\r\n", b"2\r\nb", b"c\r\n0\r\n\r\nnext")
    assert await pieces(ChunkedDecoder(), *chunks) == ([b"a", b"b", b"c"], b"next")
    assert await pieces(LengthDecoder(3), b"a", b"bcnext") == ([b"a", b"bc"], b"next")
    assert await pieces(LengthDecoder(0), b"next") == ([], b"")
    assert await pieces(LengthDecoder(None), b"a", b"b") == ([b"a", b"b"], b"")


@pytest.mark.parametrize(
    ("decoder", "arriving"), [(LengthDecoder(3), b"ab"), (ChunkedDecoder(), b"2\r\nab\r\n")]
)
async def test_a_body_that_ends_early_is_truncated(
    decoder: LengthDecoder | ChunkedDecoder, arriving: bytes
) -> None:
    with pytest.raises(Truncated):
        await pieces(decoder, arriving)


async def test_a_declared_size_above_the_limit_is_413_before_its_bytes_arrive() -> None:
    for attack in (b"4\r\n", b"1\r\na\r\n3\r\n", b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"):
        with pytest.raises(BadHead) as caught:
            await pieces(ChunkedDecoder(3), attack)
        assert caught.value.status == 413
    with pytest.raises(BadHead) as caught:
        LengthDecoder(4, 3)
    assert caught.value.status == 413
    assert (await pieces(ChunkedDecoder(3), b"3\r\nabc\r\n0\r\n\r\n"))[0] == [b"abc"]


@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_are_decoded_as_h11_would_or_refused(data: bytes, step: int) -> None:
    """The decoder never accepts what h11 refuses, and never reads a body differently."""
    try:
        body, done, rest = decode(data, step)
    except BadHead:
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(POST + b"Transfer-Encoding: chunked\r\n\r\n" + data)
    server.next_event()
    theirs = b""
    while isinstance(event := server.next_event(), h11.Data):
        theirs += event.data
    assert theirs == body
    assert isinstance(event, h11.EndOfMessage) is done
    if done:
        assert server.trailing_data[0] == rest


@given(st.lists(st.binary(min_size=1, max_size=300)), st.integers(1, 400))
def test_what_is_framed_is_decoded(pieces: list[bytes], step: int) -> None:
    data = b"".join(map(frame_chunk, pieces)) + LAST_CHUNK
    assert decode(data, step) == (b"".join(pieces), True, b"")


def test_h11_reads_the_responses_that_we_frame() -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    headers = ((b"Content-Type", b"x"), (b"Transfer-Encoding", b"chunked"))
    head = frame_start(200, headers, b"today") + b"\r\n"
    client.receive_data(head + frame_chunk(b"abc") + LAST_CHUNK)
    response, data, end = (client.next_event() for _ in range(3))
    assert isinstance(response, h11.Response)
    assert (response.status_code, response.reason) == (200, b"OK")
    assert isinstance(data, h11.Data)
    assert data.data == b"abc"
    assert isinstance(end, h11.EndOfMessage)


def test_h11_reads_the_requests_that_we_frame() -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(frame_request(b"POST", b"/api/generate", ((b"Host", b"a"),), 2) + b"{}")
    request, data, end = (server.next_event() for _ in range(3))
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (b"POST", b"/api/generate")
    assert isinstance(data, h11.Data)
    assert data.data == b"{}"
    assert isinstance(end, h11.EndOfMessage)
    assert b"Content-Length" not in frame_request(b"GET", b"/", (), None)
