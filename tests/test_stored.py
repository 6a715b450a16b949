"""Stored answers as bytes, for other processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answers.stored import MAGIC, StoredAnswer
from wire.http11 import pack

COUNT = st.integers(0, 2**64 - 1)
VALUE = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8)
HEADERS = st.lists(st.tuples(st.sampled_from(["Content-Type", "X-Y"]), VALUE), max_size=3)
ANSWERS = st.builds(
    StoredAnswer,
    packed=HEADERS.map(lambda pairs: pack(tuple((n.encode(), v.encode()) for n, v in pairs))),
    body=st.binary(max_size=40),
    object=st.binary(max_size=40),
    model=st.text(max_size=8) | st.just("half \ud83d"),
    digest=st.text("0123456789abcdef", max_size=8),
    born=st.floats(allow_nan=False, allow_infinity=False),
    lines=COUNT,
    prompt_tokens=COUNT,
    tokens=COUNT,
    gpu_seconds=st.floats(0, allow_nan=False, allow_infinity=False),
)
ANSWER = StoredAnswer(
    b"Content-Type: application/x-ndjson",
    *(b"line\n", b"object", "llama2:latest", "abc", 1795424298.5, 1, 2, 3, 4.5),
)


@given(ANSWERS, st.booleans())
def test_what_is_dumped_is_loaded(answer: StoredAnswer, relayed: bool) -> None:
    if relayed:
        answer = answer._replace(object=answer.body)
    loaded = StoredAnswer.load(answer.dump())
    assert loaded == answer
    assert (loaded.object is loaded.body) is (answer.object is answer.body)
    assert (loaded.size, loaded.usage) == (answer.size, answer.usage)


@given(st.binary(max_size=200), st.booleans())
def test_any_other_bytes_are_rejected(data: bytes, marked: bool) -> None:
    with pytest.raises(ValueError, match="stored answer"):
        StoredAnswer.load(MAGIC + data if marked else data)


@given(st.integers(0, len(ANSWER.dump()) - 1), st.integers(1, 255))
def test_a_damaged_answer_is_rejected(index: int, change: int) -> None:
    data = bytearray(ANSWER.dump())
    data[index] ^= change
    for wrong in (bytes(data), ANSWER.dump()[:index], ANSWER.dump() + bytes([change])):
        with pytest.raises(ValueError, match="stored answer"):
            StoredAnswer.load(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"packed": b"Content-Type: a\nSet-Cookie: b"},
        {"packed": b"Content-Type: a\r\n\r\nHTTP/1.1 200 OK"},
        {"packed": b"no header"},
        {"born": float("nan")},
        {"born": float("inf")},
        {"gpu_seconds": -1.0},
        {"gpu_seconds": float("nan")},
    ],
)
def test_what_could_not_be_sent_or_counted_is_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="malformed"):
        StoredAnswer.load(ANSWER._replace(**change).dump())  # type: ignore[arg-type]


def test_an_age_is_never_negative() -> None:
    """The clock may be set back."""
    assert ANSWER.age(ANSWER.born - 5) == 0
    assert ANSWER.age(ANSWER.born + 5) == 5
