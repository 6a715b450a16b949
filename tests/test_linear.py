"""Everything a client sends before its key is checked is read in linear time.

These tests count steps instead of measuring time: for patterns with a matcher that backtracks
like `re`, for parsers by the functions that they call.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from re import _parser  # type: ignore[attr-defined]
from types import FrameType
from typing import Any

import pytest

import proxy
from wire import bodies, http11, server
from wire.bodies import ChunkedDecoder
from wire.http11 import BadHead, Pairs, cannot_be_head, end_to_end, parse_request_head

SIZE = 16  # how often something is repeated; the other size is twice as large


class Matcher:
    """A backtracking matcher of bytes that counts its steps."""

    def __init__(self, pattern: bytes) -> None:
        self.tree = list(_parser.parse(pattern))
        self.data = b""
        self.steps = 0

    def fullmatch(self, data: bytes) -> bool:
        self.data, self.steps = data, 0
        return any(end == len(data) for end in self.ends(self.tree, 0))

    def search(self, data: bytes) -> bool:
        self.data, self.steps = data, 0
        return any(True for at in range(len(data) + 1) for _ in self.ends(self.tree, at))

    def ends(self, nodes: list[Any], at: int) -> Iterator[int]:
        """Give the positions where `nodes` can end, in the order in which `re` tries them."""
        if not nodes:
            yield at
            return
        kind, value = nodes[0]
        for middle in self.node(kind, value, at):
            yield from self.ends(nodes[1:], middle)

    def node(self, kind: Any, value: Any, at: int) -> Iterator[int]:
        self.steps += 1
        ends: Iterator[int] = getattr(self, f"_{kind}".lower())(value, at)
        return ends

    def _literal(self, value: int, at: int) -> Iterator[int]:
        return self._in([("LITERAL", value)], at)

    def _in(self, members: list[Any], at: int) -> Iterator[int]:
        if at < len(self.data):
            found = any(is_member(str(name), item, self.data[at]) for name, item in members)
            if found != (str(members[0][0]) == "NEGATE"):
                yield at + 1

    def _max_repeat(self, value: tuple[int, int, Any], at: int) -> Iterator[int]:
        least, most, body = value
        if most:
            for middle in self.ends(list(body), at):
                if middle > at:
                    yield from self._max_repeat((max(0, least - 1), most - 1, body), middle)
        if not least:
            yield at

    def _subpattern(self, value: Any, at: int) -> Iterator[int]:
        return self.ends(list(value[3]), at)

    def _branch(self, value: Any, at: int) -> Iterator[int]:
        for branch in value[1]:
            yield from self.ends(list(branch), at)

    def _at(self, value: Any, at: int) -> Iterator[int]:
        if at == {"AT_BEGINNING_STRING": 0, "AT_END_STRING": len(self.data)}[str(value)]:
            yield at

    def _assert_not(self, value: Any, at: int) -> Iterator[int]:
        start = at if value[0] > 0 else at - 1
        if start < 0 or not any(True for _ in self.ends(list(value[1]), start)):
            yield at


def is_member(name: str, item: Any, byte: int) -> bool:
    if name == "RANGE":
        return bool(item[0] <= byte <= item[1])
    if name == "CATEGORY":
        category = {"CATEGORY_WORD": rb"\w", "CATEGORY_DIGIT": rb"\d"}[str(item)]
        return re.match(category, bytes([byte])) is not None
    return name == "LITERAL" and byte == int(item)


PATTERNS = {
    name: pattern
    for module in (http11, bodies, server, proxy)
    for name, pattern in vars(module).items()
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, bytes)
}
STARTS = (b"", b"X:", b"X: a", b"GET /", b"HTTP/1.1 200 ", b"1", b"1;", b'1;a="', b"max-age=", b"[")
REPEATED = (b" ", b"\t", b"a", b"0", b",", b":", b"/", b'"', b"\r", b"\n", b";a", b";a=a", b' "')
LASTS = (b"", b"\x00", b"\x7f", b" HTTP/1.1", b'"', b"\r\n")


def is_linear(count: Callable[[int], int]) -> bool:
    """Compare the steps for a size with those for its half; squares would make them four times."""
    return count(2 * SIZE) <= 2.3 * count(SIZE) + 20


def steps(pattern: bytes, start: bytes, repeated: bytes, last: bytes) -> Callable[[int], int]:
    def count(size: int) -> int:
        matcher = Matcher(pattern)
        data = start + repeated * size + last
        assert matcher.fullmatch(data) is (re.fullmatch(pattern, data) is not None)
        total = matcher.steps
        matcher.search(data)
        return total + (matcher.steps if b"\\A" in pattern else 0)

    return count


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_backtracks_more_than_once(name: str) -> None:
    pattern = PATTERNS[name].pattern
    for attack in product(STARTS, REPEATED, LASTS):
        assert is_linear(steps(pattern, *attack)), attack


def test_the_count_finds_a_pattern_that_does() -> None:
    pattern = rb"([a-z]+):[\t ]*([\t\x20-\x7e]*)"
    assert not is_linear(steps(pattern, b"x:", b" ", b"\x00"))


def calls(function: Callable[[], object]) -> int:
    """Count the calls, of C functions too, that a function makes."""
    total = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal total
        total += event in {"call", "c_call"}

    sys.setprofile(note)
    try:
        with suppress(BadHead):
            function()
    finally:
        sys.setprofile(None)
    return total


def nobody(path: bytes, headers: Pairs) -> tuple[tuple[bytes, ...], bytes, Pairs]:
    return (), path, headers


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
LISTS = [b"Connection: ", b"Via: ", b"Cache-Control: ", b"Transfer-Encoding: ", b"Accept: "]


def everything(raw: bytes) -> None:
    """Do with a head what is done before its key is looked at, and a little more."""
    head = parse_request_head(raw, nobody)
    end_to_end(head.headers)
    proxy._passed_on(head)
    server._request_id(head)


def heads(size: int) -> list[bytes]:
    """Heads of about `size` bytes that make much work."""
    found = [GET + name + part * (size // len(part)) for name in LISTS for part in (b",", b"a, ")]
    found += [GET + b"X:" + pad * size + last for pad in (b" ", b"\t ") for last in (b"", b"\x7f")]
    found += [GET + b"X: a" + b" " * size + b"a", GET + b"X: " + b"a " * (size // 2)]
    found += [GET + b"\r\n".join([b"a:"] * (size // 4)), b"GET /" + b"a" * size + b" HTTP/1.1"]
    found += [GET + b"\r\n".join([b"x:" + b" a" * (size // 200)] * 98)]
    found += [
        b"GET / HTTP/1.1\r\nHost: " + b"a" * size + b"/",
        GET + b"X-Request-ID:" + b"a" * size,
    ]
    found += [GET + b"Content-Length:" + b"9" * size, GET + b"Expect:" + b"1" * size]
    return [head + b"\r\n\r\n" for head in found]


def test_the_calls_for_a_head_grow_with_its_size_alone() -> None:
    for number in range(len(heads(1000))):
        small, large = heads(4000)[number], heads(8000)[number]
        few, many = calls(lambda: everything(small)), calls(lambda: everything(large))  # noqa: B023
        assert many <= 2.3 * few + 50, large[:60]


def test_no_head_stops_the_others_for_long() -> None:
    """Each takes a few milliseconds of this thread's time at most; the bound has room."""
    for raw in heads((16 << 10) - 120):
        times = []
        for _ in range(5):
            begun = time.thread_time()
            with suppress(BadHead):
                everything(raw)
            times.append(time.thread_time() - begun)
        assert min(times) < 0.02, raw[:60]


@pytest.mark.parametrize("line", [b"X: y\r\n", b"a:\r\n", b"X:" + b" " * 60 + b"\r\n"])
def test_trailers_are_looked_at_once(line: bytes) -> None:
    """Bytes that are known to be fine are not looked at again when more of them come."""
    looked_at = 0

    class Buffer(bytearray):
        def find(self, what: Any, start: Any = 0, end: Any = None) -> int:
            nonlocal looked_at
            looked_at += len(self) - start
            return super().find(what, start, end)

    decoder, buffer = ChunkedDecoder(), Buffer(b"0\r\n")
    data = line * (4000 // len(line))
    with suppress(BadHead):
        for byte in data:
            buffer.append(byte)
            decoder.decode(buffer)
    assert len(data) <= looked_at <= 5 * len(data)


def test_what_is_checked_of_a_start_is_not_checked_again() -> None:
    assert cannot_be_head(b"\x00" + b"a" * 10)
    assert not cannot_be_head(b"\x00" + b"a" * 10, 5)
