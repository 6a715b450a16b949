import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standin import Script, StandIn

from answers.notes import MAX_PARSED, Notes, progress_notes
from answers.ollama_api import Form, RouteTable, digests, loaded, route_table, version
from answers.questions import (
    MAX_VALUES,
    PassThrough,
    Question,
    check_values,
    is_deterministic,
    managed_models,
)
from wire.http11 import HTTPError, Response

TRACES = Path(__file__).parent / "traces"
TRACES_33 = Path(__file__).parent / "traces-0.33"
TABLE = route_table(32 << 20)


def response(name: str, folder: Path = TRACES) -> tuple[int, str, bytes]:
    """A recorded response's status, content type and body, taken out of its chunks."""
    head, _, body = (folder / f"{name}.response").read_bytes().partition(b"\r\n\r\n")
    kind = re.search(rb"Content-Type: (.*)\r\n", head)
    if b"Transfer-Encoding: chunked" in head:
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return int(head.split(b" ")[1]), kind[1].decode() if kind else "", body


def noted(path: bytes, body: bytes, kind: str = "application/x-ndjson", status: int = 200) -> Notes:
    found = TABLE.find(path)
    assert found
    assert found[0].codec
    notes = found[0].codec.notes(Response(status, ((b"Content-Type", kind.encode()),), body))
    notes.feed(body)
    return notes


def noted_trace(path: bytes, name: str, folder: Path = TRACES) -> Notes:
    status, kind, body = response(name, folder)
    return noted(path, body, kind, status)


def asked(path: bytes, body: object) -> Question:
    found = TABLE.find(path)
    assert found
    assert found[0].codec
    return found[0].codec.question(
        body if isinstance(body, bytes) else json.dumps(body).encode(), found[1]
    )


# The fold.


def shape(value: object) -> object:
    """The names and types of a value, in order, with lists of one kind cut to one member."""
    if isinstance(value, dict):
        return [(name, shape(member)) for name, member in value.items()]
    if isinstance(value, list):
        return [shape(member) for member in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize(
    ("path", "stream", "whole"),
    [
        (b"/api/generate", "generate-stream-default", "generate-nonstream"),
        (b"/api/generate", "generate-logprobs-stream", "generate-logprobs-nonstream"),
        (b"/api/generate", "generate-format-schema", "generate-format-json"),
        (b"/api/chat", "chat-stream", "chat-nonstream"),
    ],
)
def test_the_fold_has_the_names_order_and_types_of_the_trace(
    path: bytes, stream: str, whole: str
) -> None:
    folded = json.loads(noted_trace(path, stream).fold())
    assert shape(folded) == shape(json.loads(response(whole)[2]))


def test_a_folded_trace_holds_all_that_was_said() -> None:
    lines = [json.loads(line) for line in response("generate-stream-default")[2].splitlines()]
    folded = json.loads(noted_trace(b"/api/generate", "generate-stream-default").fold())
    assert folded["response"] == "Why is the sky blue? mendatanguser\nWhy is"
    assert folded == {**lines[-1], "response": folded["response"]}


TEXT = st.text(max_size=6)
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}


@given(
    tokens=st.lists(TEXT, max_size=8),
    thinking=st.lists(st.text(min_size=1, max_size=6), max_size=3),
    calls=st.integers(0, 2),
    chat=st.booleans(),
    logprobs=st.booleans(),
)
def test_the_fold_is_the_object_that_the_stand_in_makes_of_the_same_tokens(
    tokens: list[str], thinking: list[str], calls: int, chat: bool, logprobs: bool
) -> None:
    standin = StandIn(
        Script(tokens=tokens, thinking=thinking, tool_calls=[CALL] * calls if chat else [])
    )
    body: dict[str, Any] = {"model": "llama2", "logprobs": logprobs}
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in standin.lines(body, chat))
    folded = json.loads(noted(b"/api/chat" if chat else b"/api/generate", lines).fold())
    whole = standin.whole(body, chat)
    folded.pop("created_at")
    whole.pop("created_at")
    assert folded == whole


# `thinking`, `tool_calls` and embeddings have no trace. Their form here is that of Ollama's
# docs/api.md, and of GenerateHandler and ChatHandler in server/routes.go (0.13): the last
# response, with thinking, content and logprobs joined and tool calls gathered.
def test_a_chat_with_thinking_and_tool_calls_folds_to_what_was_written_by_hand() -> None:
    lines = b"""\
{"model":"qwen3","created_at":"t1","message":{"role":"assistant","content":"","thinking":"Hm"},"done":false}
{"model":"qwen3","created_at":"t2","message":{"role":"assistant","content":"","thinking":"m."},"done":false}
{"model":"qwen3","created_at":"t3","message":{"role":"assistant","content":"Let "},"done":false}
{"model":"qwen3","created_at":"t4","message":{"role":"assistant","content":"me see."},"done":false}
{"model":"qwen3","created_at":"t5","message":{"role":"assistant","content":"","tool_calls":[{"function":{"name":"a","arguments":{"x":1}}}]},"done":false}
{"model":"qwen3","created_at":"t6","message":{"role":"assistant","content":"","tool_calls":[{"function":{"name":"b","arguments":{}}}]},"done":false}
{"model":"qwen3","created_at":"t7","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","eval_count":7}
"""
    whole = {
        "model": "qwen3",
        "created_at": "t7",
        "message": {
            "role": "assistant",
            "content": "Let me see.",
            "thinking": "Hmm.",
            "tool_calls": [
                {"function": {"name": "a", "arguments": {"x": 1}}},
                {"function": {"name": "b", "arguments": {}}},
            ],
        },
        "done": True,
        "done_reason": "stop",
        "eval_count": 7,
    }
    assert json.loads(noted(b"/api/chat", lines).fold()) == whole


def test_half_a_surrogate_pair_survives_the_fold() -> None:
    lines = b'{"response":"\\ud83d","done":false}\n{"response":"\\ude00","done":true}\n'
    assert json.loads(noted(b"/api/generate", lines).fold())["response"] == "\U0001f600"
    alone = b'{"response":"\\ud83d","done":true}\n'
    assert json.loads(noted(b"/api/generate", alone).fold())["response"] == "\ud83d"


def test_a_fold_that_grows_too_large_is_refused_with_advice() -> None:
    found = route_table(20).find(b"/api/generate")
    assert found
    assert found[0].codec
    notes = found[0].codec.notes(Response(200, ((b"Content-Type", b"application/x-ndjson"),), b""))
    notes.feed(b'{"response":"0123456789","done":false}\n')
    assert not notes.too_large
    notes.feed(b'{"response":"0123456789+","done":true}\n')
    assert notes.too_large
    assert notes.keeps()  # for those who take a stream
    with pytest.raises(HTTPError, match=r'"stream": true') as caught:
        notes.fold()
    assert caught.value.status == 502


# What is complete.


GOOD, LAST = b'{"response":"a","done":false}\n', b'{"response":"","done":true}\n'


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ([GOOD, LAST], True),
        ([LAST], False),  # it says nothing
        ([b'{"response":"a","done":true}\n'], True),
        ([GOOD, LAST[:-1]], True),
        ([GOOD, b"\n", LAST], True),
        ([b"\n \r\n", GOOD, LAST, b"\n\n"], True),
        ([b'{"response":"\\n{\\"error\\"","done":false}\n', LAST], True),
        ([b'{"error":"boom"}\n', LAST], False),
        ([GOOD, b'{"error":"boom"}\n', LAST], False),
        ([GOOD, b"nonsense\n", LAST], False),
        ([b"[]\n", GOOD, LAST], False),
        ([b'{"response":\n', GOOD, LAST], False),
    ],
)
def test_what_comes_in_one_read_with_the_last_line_is_judged_too(
    lines: list[bytes], kept: bool
) -> None:
    notes = noted(b"/api/generate", b"".join(lines))
    assert notes.keeps() is kept
    one_by_one = noted(b"/api/generate", b"")
    for line in lines:
        one_by_one.feed(line)
    assert one_by_one.keeps() is kept


@pytest.mark.parametrize(
    "lines",
    [
        b'{"response":"a\nb","done":true}\n',
        b'{"response":"a"},{"response":"","done":true}\n',
        b'{"response":"a"\n"b":2},{"response":"","done":true}\n',  # two lines, two objects
        b'{"response":"a\nb"},{"response":"","done":true}\n',
        b'{"response":"a}\n{b"},{"response":"","done":true}\n',
        b'{"response":"a"}\n\n{"response":"\n"},{"response":"","done":true}\n',
    ],
)
def test_a_line_is_one_object_and_no_more(lines: bytes) -> None:
    notes = noted(b"/api/generate", lines)
    assert not notes.finished


def test_blank_lines_and_space_around_lines_do_not_count() -> None:
    lines = b'{"response":"a"}\r\n\r\n \n\t{"response":"b"} \n\n{"response":"","done":true}\n'
    notes = noted(b"/api/generate", lines)
    assert (notes.lines, notes.finished, notes.close()) == (3, True, True)
    assert json.loads(notes.fold())["response"] == "ab"


def test_a_whole_stream_is_complete() -> None:
    notes = noted_trace(b"/api/generate", "generate-stream-default")
    assert (notes.finished, notes.keeps(), notes.close()) == (True, True, True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"/api/generate", "generate-empty-prompt-load"),
        (b"/api/generate", "keep-alive-0-unload"),
        (b"/api/chat", "chat-empty-messages-load"),
        (b"/api/generate", "generate-unknown-model"),
        (b"/api/generate", "generate-malformed-json"),
        (b"/api/embed", "embed"),
        (b"/api/embeddings", "embeddings-legacy"),
    ],
)
def test_loads_and_errors_are_never_kept(path: bytes, name: str) -> None:
    notes = noted_trace(path, name)
    assert notes.close()
    assert not notes.keeps()


def test_a_load_that_comes_as_a_stream_is_not_kept() -> None:
    load = b'{"response":"a","done":true,"done_reason":"load"}\n'
    assert not noted(b"/api/generate", load).keeps()


def test_ollamas_own_error_ends_a_stream_and_is_no_answer() -> None:
    notes = noted_trace(b"/api/generate", "generate-stream-runner-killed")
    assert (notes.finished, notes.keeps()) == (False, False)
    with pytest.raises(HTTPError) as caught:
        notes.close()
    assert caught.value.kind == "reported"
    _, _, body = response("generate-nonstream-runner-killed")
    assert (caught.value.status, json.loads(caught.value.body or b"")) == (500, json.loads(body))


@pytest.mark.parametrize(
    ("body", "broken"),
    [
        (b"", False),
        (b'{"response":"a","done":false}\n', False),
        (b'{"response":"a","done":true}\n{"response":"b","done":false}\n', False),
        (b'{"response":"a","done":"true"}\n', False),
        (b'not json\n{"response":"a","done":true}\n', True),
        (b'["done"]\n', True),
    ],
)
def test_a_stream_without_a_last_line_is_incomplete_and_one_without_json_is_broken(
    body: bytes, broken: bool
) -> None:
    notes = noted(b"/api/generate", body)
    assert (notes.finished, notes.keeps()) == (False, False)
    if not broken:
        assert not notes.close()
        return
    with pytest.raises(HTTPError) as caught:
        notes.close()
    assert caught.value.kind == "broken"


def test_a_fold_that_joins_only_the_first_piece_of_thinking_would_be_seen() -> None:
    """All of them are joined, whether they come alone or beside text."""
    lines = [
        b'{"message":{"content":"","thinking":"one "},"done":false}\n',
        b'{"message":{"content":"x","thinking":"two "},"done":false}\n',
        b'{"message":{"content":"y","thinking":"three"},"done":true}\n',
    ]
    notes = noted(b"/api/chat", b"")
    for line in lines:
        notes.feed(line)
    message = json.loads(notes.fold())["message"]
    assert message == {"content": "xy", "thinking": "one two three"}


@pytest.mark.parametrize("name", ["thinking-generate", "thinking-chat", "tools-chat"])
def test_thinking_and_tool_calls_fold_as_in_the_trace(name: str) -> None:
    path = b"/api/" + name.partition("-")[2].encode()
    notes = noted_trace(path, f"{name}-stream", TRACES_33)
    assert (notes.close(), notes.keeps()) == (True, True)
    whole = json.loads(response(f"{name}-nonstream", TRACES_33)[2])
    assert unmeasured(json.loads(notes.fold())) == unmeasured(whole)


def unmeasured(value: Any) -> Any:
    """A response without what differs each time: times, and made-up ids."""
    if isinstance(value, list):
        return [unmeasured(member) for member in value]
    if isinstance(value, dict):
        return {
            name: unmeasured(member)
            for name, member in value.items()
            if name not in {"created_at", "id"} and not name.endswith("_duration")
        }
    return value


# What ends in order without having been finished.


@pytest.mark.parametrize(
    ("path", "name", "tokens"),
    [
        (b"/api/generate", "repeat-guard-generate-stream", 32),
        (b"/api/chat", "repeat-guard-chat-stream", 31),
        (b"/v1/chat/completions", "repeat-guard-openai-chat-stream", 31),
        (b"/v1/chat/completions", "repeat-guard-openai-chat-nonstream", 0),
        (b"/v1/messages", "anthropic-messages-repeat-guard-stream", 31),
        (b"/v1/messages", "anthropic-messages-repeat-guard-nonstream", 0),
        (b"/v1/responses", "openai-responses-repeat-guard-stream", 31),
    ],
)
def test_what_the_repeat_guard_ended_is_incomplete(path: bytes, name: str, tokens: int) -> None:
    notes = noted_trace(path, name, TRACES_33)
    assert not notes.close()
    assert (notes.keeps(), notes.error, notes.usage.tokens) == (False, None, tokens)


@pytest.mark.parametrize("kind", ["generate", "chat"])
def test_the_object_of_the_repeat_guard_is_that_of_the_trace(kind: str) -> None:
    notes = noted_trace(f"/api/{kind}".encode(), f"repeat-guard-{kind}-stream", TRACES_33)
    theirs = json.loads(response(f"repeat-guard-{kind}-nonstream", TRACES_33)[2])
    assert json.loads(notes.fold()) | {"created_at": ""} == theirs | {"created_at": ""}


@pytest.mark.parametrize(
    ("name", "folder", "kind"),
    [
        ("runner-killed-openai-chat-stream", TRACES_33, "broken"),
        ("openai-chat-stream-runner-killed", TRACES, "broken"),
        ("runner-killed-generate-stream", TRACES_33, "reported"),
        ("runner-killed-chat-stream", TRACES_33, "reported"),
    ],
)
def test_a_killed_runner_is_no_end(name: str, folder: Path, kind: str) -> None:
    path = b"/v1/chat/completions" if "openai" in name else b"/api/chat"
    notes = noted_trace(path, name, folder)
    assert not notes.finished
    with pytest.raises(HTTPError) as caught:
        notes.close()
    assert caught.value.kind == kind


# What is worth keeping.


def said(**message: object) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"content": "", **message}, "finish_reason": "stop"}]}
    ).encode()


@pytest.mark.parametrize(
    ("path", "body", "kept"),
    [
        (b"/api/embed", b'{"embeddings":[[0.5],[1]]}', True),
        (b"/api/embed", b'{"embeddings":[]}', False),
        (b"/api/embed", b'{"embeddings":[[]]}', False),
        (b"/api/embed", b'{"embeddings":[[0.5],[]]}', False),
        (b"/api/embed", b'{"embeddings":null}', False),
        (b"/api/embeddings", b'{"embedding":[0.0]}', True),
        (b"/api/embeddings", b'{"embedding":[]}', False),
        (b"/v1/embeddings", b'{"data":[{"embedding":[0.5]}]}', True),
        (b"/v1/embeddings", b'{"data":[{"embedding":"a8uPvA=="}]}', True),
        (b"/v1/embeddings", b'{"data":[{"embedding":[]}]}', False),
        (b"/v1/embeddings", b'{"data":[{"embedding":""}]}', False),
        (b"/v1/embeddings", b'{"data":[]}', False),
        (b"/v1/chat/completions", said(content="a"), True),
        (b"/v1/chat/completions", said(reasoning="a"), True),
        (b"/v1/chat/completions", said(tool_calls=[{"id": "", "function": {"name": "f"}}]), True),
        (b"/v1/chat/completions", said(), False),
        (b"/v1/chat/completions", said(tool_calls=[]), False),
        (b"/v1/chat/completions", b'{"choices":[{"message":{"content":"a"}}]}', False),
        (b"/v1/completions", b'{"choices":[{"text":"a","finish_reason":"stop"}]}', True),
        (b"/v1/completions", b'{"choices":[{"text":"","finish_reason":"stop"}]}', False),
        (b"/v1/completions", b'{"choices":[]}', False),
        (b"/v1/completions", b"{}", False),
        (b"/v1/completions", b"[]", False),
        (b"/v1/completions", b'{"text":%b"a"%b}' % (b"[" * 900, b"]" * 900), False),
        (b"/v1/messages", b'{"content":[{"text":""}],"stop_reason":"end_turn"}', False),
        (b"/v1/messages", b'{"content":[{"name":"f"}],"stop_reason":"tool_use"}', True),
        (b"/v1/responses", b'{"text":{"format":{"type":"text"}},"output":[]}', False),
        (b"/v1/responses", b'{"output":[{"content":[{"text":""}]}]}', False),
        (b"/v1/responses", b'{"output":[{"content":[{"text":"a"}]}]}', True),
        (b"/v1/completions", b'{"error":"x","choices":[{"text":"a"}]}', False),
    ],
)
def test_an_object_is_kept_if_it_says_something(path: bytes, body: bytes, kept: bool) -> None:
    notes = noted(path, body, "application/json")
    notes.close()
    assert notes.keeps() is kept


@pytest.mark.parametrize(
    ("delta", "kept"),
    [
        ({"content": "a"}, True),
        ({"content": "", "reasoning": "a"}, True),
        ({"content": "", "tool_calls": [{"id": "x"}]}, True),
        ({"content": ""}, False),
        ({"content": "", "tool_calls": []}, False),
        ({}, False),
    ],
)
def test_a_stream_of_v1_is_kept_if_it_says_something(delta: object, kept: bool) -> None:
    for separators in ((",", ":"), (", ", ": ")):
        choice = json.dumps({"choices": [{"delta": delta}]}, separators=separators)
        last = json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        events = f"data: {choice}\n\ndata: {last}\n\ndata: [DONE]\n\n".encode()
        notes = noted(b"/v1/chat/completions", events, "text/event-stream")
        assert (notes.close(), notes.keeps()) == (True, kept)


@pytest.mark.parametrize(
    "line",
    [
        b'{"response":"","thinking":"","done":true}',
        b'{"message":{"content":"","tool_calls":[]},"done":true}',
        b'{"message":{"content":"a"},"response":"a","done":true,"done_reason":"unload"}',
        b'{"done":true}',
    ],
)
def test_a_native_stream_that_says_nothing_is_not_kept(line: bytes) -> None:
    for path in (b"/api/generate", b"/api/chat"):
        notes = noted(path, line + b"\n")
        assert (notes.close(), notes.keeps()) == (True, False)


def test_a_large_object_is_judged_by_its_ends() -> None:
    """Parsing it would hold up the event loop."""
    vector = b"[%b]" % b",".join([b"0.5"] * MAX_PARSED)
    whole = b'{"embeddings":[%b],"prompt_eval_count":7}\n' % vector
    for body, kept in (
        (whole, True),
        (whole[:-9], False),
        (whole[1:], False),
        (b'{"error":"%b"}' % (b"x" * MAX_PARSED), False),
        (b'{"choices":[{"text":"%b","finish_reason":null}]}' % (b"x" * MAX_PARSED), False),
    ):
        notes = noted(b"/api/embed", b"", "application/json")
        for start in range(0, len(body), 10_000):
            notes.feed(body[start : start + 10_000])
        assert notes.held <= MAX_PARSED
        notes.close()
        assert notes.keeps() is kept
        if kept:
            assert notes.usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (b'"output":[{"content":[{"type":"output_text","text":""}]}]', False),
        (b'"output":[{"content":[{"type":"output_text","text":"a"}]}]', True),
        (b'"output":[{"type":"function_call","name":"f","arguments":"{}"}]', True),
        (b'"choices":[{"message":{"content":""}}]', False),
        (b'"choices":[{"message":{"content":"","tool_calls":[{"id":"c"}]}}]', True),
        (b'"embeddings":[[0.5],[]]', False),
        (b'"embeddings":[[],[0.5]]', False),
        (b'"embeddings":[[-0.5],[0.5]]', True),
        (b'"data":[{"embedding":[0.5]},{"embedding":[]}]', False),
        (b'"data":[{"embedding":"AAAA"},{"embedding":""}]', False),
        (b'"data":[{"embedding":"AAAA"}]', True),
    ],
)
def test_a_large_object_that_says_nothing_is_not_kept(said: bytes, kept: bool) -> None:
    """What makes it large is an echo of the question, such as the instructions."""
    body = b'{%b,"instructions":"%b"}' % (said, b"x" * MAX_PARSED)
    for size in (37, 10_000):  # so that names and values come apart too
        notes = noted(b"/v1/responses", b"", "application/json")
        for start in range(0, len(body), size):
            notes.feed(body[start : start + size])
        notes.close()
        assert notes.keeps() is kept


def test_an_error_among_lines_of_progress_is_seen() -> None:
    ok, error = b'{"status":"pulling \\"error\\""}\n', b'{"error":"disk full"}\n'
    response = Response(200, ((b"Content-Type", b"application/x-ndjson"),), b"")
    notes = progress_notes(response)
    notes.feed(ok)
    assert notes.close()
    notes.feed(ok + error)
    with pytest.raises(HTTPError, match="disk full") as caught:
        notes.close()
    assert caught.value.kind == "reported"


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"died","type":"api_error"}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"message":"died"}}\n\n',
        b'data: {"type": "error", "error": {"message": "died"}}\n\n',
        b'data:{"error":{"message":"died"}}\n\n',
    ],
)
def test_an_error_event_is_seen_in_each_form(event: bytes) -> None:
    for path in (b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"):
        notes = noted(path, event + b"data: [DONE]\n\n", "text/event-stream")
        with pytest.raises(HTTPError, match="died") as caught:
            notes.close()
        assert (caught.value.kind, notes.finished) == ("reported", False)


@pytest.mark.parametrize(
    ("path", "name", "folder", "usage"),
    [
        (b"/v1/chat/completions", "openai-chat-stream-usage", TRACES_33, (9, 11)),
        (b"/v1/completions", "openai-completions-stream-usage", TRACES_33, (9, 11)),
        (b"/v1/chat/completions", "tools-openai-chat-nonstream", TRACES_33, (137, 35)),
        (b"/v1/responses", "openai-responses-stream", TRACES_33, (9, 11)),
        (b"/v1/responses", "openai-responses-nonstream", TRACES_33, (9, 11)),
        (b"/v1/messages", "anthropic-messages-stream", TRACES_33, (9, 11)),
        (b"/v1/messages", "anthropic-messages-nonstream", TRACES_33, (9, 11)),
        (b"/v1/embeddings", "openai-embeddings-base64", TRACES_33, (2, 0)),
        (b"/api/embed", "embed-two", TRACES_33, (4, 0)),
        (b"/api/chat", "tools-chat-stream", TRACES_33, (137, 35)),
        # Without a usage, an event with content counts as a token.
        (b"/v1/chat/completions", "tools-openai-chat-stream", TRACES_33, (0, 2)),
        (b"/v1/messages", "runner-killed-anthropic-messages-stream", TRACES_33, (9, 6)),
    ],
)
def test_tokens_are_counted_on_each_route(
    path: bytes, name: str, folder: Path, usage: tuple[int, int]
) -> None:
    notes = noted_trace(path, name, folder)
    with contextlib.suppress(HTTPError):
        notes.close()
    assert (notes.usage.prompt_tokens, notes.usage.tokens) == usage


@given(st.binary(max_size=80))
@example(b'{"done":true,"error":"x"}')
@example(b"data: [DONE]")
@example(b'{"error":%b' % (b"[" * 3000))
def test_any_bytes_can_be_noted(data: bytes) -> None:
    for path in (b"/api/generate", b"/api/chat", b"/api/embed"):
        notes = noted(path, data)
        with contextlib.suppress(HTTPError):
            notes.close()
        if notes.finished:
            notes.fold()
        assert (notes.usage.tokens, notes.keeps()) >= (0, False)


# The cache key.


def key(body: object, path: bytes = b"/api/generate") -> bytes | None:
    return asked(path, body).key


SAME = b'{"model": "m", "prompt": "p", "options": {"seed": 1, "top_k": 2}}'


@pytest.mark.parametrize(
    "other",
    [
        b'{"options":{"top_k":2,"seed":1},"prompt":"p","model":"m"}',
        b'{"model": "m", "prompt": "p", "stream": true, "options": {"seed": 1, "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "stream": null, "options": {"seed": 1, "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "keep_alive": -1, "options": {"seed": 1, "top_k": 2}}',
        b'{"model": "m", "prompt": "\\u0070", "options": {"seed": 1, "top_k": 2}}',
    ],
)
def test_order_space_stream_and_keep_alive_do_not_matter(other: bytes) -> None:
    assert key(other) == key(SAME) is not None


# Ollama fills a schema's properties in their order (it was seen to), and shows a model tools
# and arguments in theirs.
@pytest.mark.parametrize(
    ("path", "field", "one", "other"),
    [
        (
            b"/api/generate",
            "format",
            {"properties": {"name": {}, "age": {}}},
            {"properties": {"age": {}, "name": {}}},
        ),
        (b"/api/chat", "tools", [{"a": 1, "b": 2}], [{"b": 2, "a": 1}]),
        (
            b"/api/chat",
            "messages",
            [{"tool_calls": [{"arguments": {"a": 1, "b": 2}}]}],
            [{"tool_calls": [{"arguments": {"b": 2, "a": 1}}]}],
        ),
        (
            b"/v1/chat/completions",
            "response_format",
            {"json_schema": {"a": 1, "b": 2}},
            {"json_schema": {"b": 2, "a": 1}},
        ),
        (b"/v1/chat/completions", "tools", [{"a": 1, "b": 2}], [{"b": 2, "a": 1}]),
        (b"/api/generate", "options", {"x": {"a": 1, "b": 2}}, {"x": {"b": 2, "a": 1}}),
    ],
)
def test_the_order_of_names_below_the_top_and_the_options_matters(
    path: bytes, field: str, one: object, other: object
) -> None:
    body = {"model": "m", "prompt": "p", "messages": [{"role": "user", "content": "p"}]}
    keys = [key({**body, field: value}, path) for value in (one, other)]
    assert None not in keys
    assert keys[0] != keys[1]


def test_nothing_that_changes_an_answer_is_left_out_of_the_key() -> None:
    more = ["images", "suffix", "system", "template", "context", "raw", "format", "think"]
    more += ["logprobs", "top_logprobs", "truncate", "shift", "width", "height", "steps", "x"]
    for path, input_name in ((b"/api/generate", "prompt"), (b"/api/embed", "input")):
        body = {"model": "m", input_name: "p"}
        keys = {key({**body, name: value}, path) for name in more for value in ("a", "b")}
        assert len(keys | {key(body, path)}) == 2 * len(more) + 1
    chat = [{"role": "user", "content": "p", "images": [image]} for image in ("a", "b")]
    assert len({key({"model": "m", "messages": [m]}, b"/api/chat") for m in chat}) == 2


@pytest.mark.parametrize(
    "path",
    [
        b"/api/generate",
        b"/api/chat",
        b"/api/embed",
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/embeddings",
    ],
)
def test_an_answer_that_repeats_the_models_name_has_a_key_for_each_name(path: bytes) -> None:
    """The trace `generate-local-name`: the answer has the name as it was asked for."""
    body = {"prompt": "p", "messages": [{"role": "user"}], "input": "p"}
    keys = {key({"model": name, **body}, path) for name in ("m", "m:latest", "M", "m:local")}
    assert len(keys) == 4


def test_embeddings_without_a_name_are_shared_by_all_names_of_their_model() -> None:
    def of(name: object) -> bytes | None:
        return key({"model": name, "prompt": "p"}, b"/api/embeddings")

    assert of("m") == of(" M:latest ") == of("library/m:local") is not None
    assert of("m") != of("m:cloud")
    assert of("m") != of("me/m")


@pytest.mark.parametrize(
    "other",
    [
        b'{"model": "M", "prompt": "p", "options": {"seed": 1, "top_k": 2}}',
        b'{"model": "m", "prompt": "p ", "options": {"seed": 1, "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": "1", "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": 1.5, "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": true, "top_k": 2}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": 1}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": 1, "top_k": 2}, "raw": true}',
    ],
)
def test_everything_else_matters(other: bytes) -> None:
    assert key(other) != key(SAME)


def test_call_model_and_generate_share_their_answers() -> None:
    assert key(SAME, b"/call_model") == key(SAME, b"/api/generate")


def test_routes_do_not_share_keys() -> None:
    body = {"model": "m", "prompt": "p", "messages": [1], "input": "p"}
    paths = (b"/api/generate", b"/api/chat", b"/api/embed", b"/api/embeddings")
    assert len({key(body, path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (b"/api/generate", {"model": "m"}),
        (b"/api/generate", {"model": "m", "prompt": ""}),
        (b"/api/generate", {"model": "m", "prompt": None}),
        (b"/api/chat", {"model": "m", "messages": []}),
        (b"/api/embed", {"model": "m"}),
    ],
)
def test_a_request_that_loads_has_no_key(path: bytes, body: object) -> None:
    assert key(body, path) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":"p","Stream":false}',
        b'{"model":"m","prompt":"p","\\u017ftream":false}',
        b'{"MODEL":"m","prompt":"p"}',
        b'{"model":"m","prompt":"p","stream":"yes"}',
        b'{"model":"m","prompt":"p","stream":1}',
        b'{"model":"m","prompt":"p","Options":{"seed":1}}',
        b'{"model":"m","prompt":"p","system":"A","System":"B"}',
        b'{"model":"m","prompt":"p","options":{"stop":"A","Stop":"B"}}',
    ],
)
def test_only_ollama_can_tell_what_an_ambiguous_body_means(body: bytes) -> None:
    question = asked(b"/call_model", body)
    assert (question.key, question.relayed, question.ambiguous) == (None, True, True)
    assert question.body == json.dumps(json.loads(body), separators=(",", ":")).encode()


def test_upstream_is_asked_for_a_stream_in_the_clients_order() -> None:
    body = asked(b"/call_model", b'{ "prompt":"\\u00e9", "model":"m", "stream":false}').body
    assert body == b'{"prompt":"\\u00e9","model":"m","stream":true}'


def test_a_load_is_asked_for_as_its_client_wants_it() -> None:
    assert json.loads(asked(b"/call_model", {"model": "m"}).body)["stream"] is False
    assert json.loads(asked(b"/api/generate", {"model": "m"}).body)["stream"] is True


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b"{",
        b'"x"',
        b"null",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": %b}' % (b"1" * 5000),
        b'{"a": %b%b}' % (b"[" * 200_000, b"]" * 200_000),
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"model": "m"}',
        '{"model": "m"}'.encode("utf-16"),
        b'{"model": "m"} x',
        b" \n",
        b'{"model": "m", "prompt": "p", "options": {"seed": 1}, "options": {"top_k": 1}}',
        b'{"model": "m", "prompt": "p", "options": {"seed": 1, "seed": 1}}',
        b'{"model": "m", "prompt": "p", "format": {"x": [{"a": 1, "\\u0061": 1}]}}',
    ],
)
def test_what_pythons_json_stumbles_over_is_the_clients_fault(body: bytes) -> None:
    for path in (b"/call_model", b"/api/embed"):
        with pytest.raises(HTTPError) as caught:
            asked(path, body)
        assert caught.value.status == 400


@given(st.binary(max_size=60))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        question = asked(b"/api/generate", body)
    except HTTPError as error:
        status = error.status
    else:
        status = 200 if isinstance(json.loads(question.body), dict) else 0
    assert status in {200, 400}


@pytest.mark.parametrize(
    ("options", "deterministic"),
    [
        (None, False),
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": False}, False),
        ({"seed": 0}, True),
        ({"seed": -1}, False),
        ({"seed": 4294967295}, False),  # which is -1 in 32 bits
        ({"seed": 8589934591}, False),
        ({"seed": 4294967294}, True),
        ({"seed": -2}, True),
        ({"seed": True}, False),
        ({"seed": 42, "temperature": 1}, True),
        ({"seed": "42"}, False),
        ("seed", False),
    ],
)
def test_what_is_deterministic(options: object, deterministic: bool) -> None:
    assert is_deterministic(options) is deterministic


# Models, and the forms of errors.


def test_digests_are_read_off_the_trace() -> None:
    found = digests(response("tags")[2])
    assert found == {
        "gemma3:270m": "751f8a18b021dc6763503bffd3f2d2b27576618005c29a17509a4a325fa7a3c6"
    }
    assert digests(b'{"models":[]}') == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"models":null}',
        b'{"models":{}}',
        b'{"models":[{"name":"a"}]}',
        b'{"models":[{"name":5,"digest":"1"}]}',
        b'{"models":[{"name":"a","digest":"1"},{"name":"","digest":"2"}]}',
        b'{"models":[{"name":"a","digest":null}]}',
        b'{"models":[{"name":"a","digest":"1"},5]}',
    ],
)
def test_a_list_that_is_not_well_formed_throughout_says_nothing(body: bytes) -> None:
    assert digests(body) is None


def test_the_version_is_read_and_cut() -> None:
    assert version(response("version")[2]) == "0.0.0"
    assert version(b"<html>") == "unknown"
    assert len(version(json.dumps({"version": "9" * 500}).encode())) == 40


def test_errors_have_the_form_of_the_trace() -> None:
    message = "model 'nope' not found"
    ours = json.loads(Form.OPENAI.body(404, message))
    theirs = json.loads(response("openai-chat-unknown-model")[2])
    assert shape(ours) == shape(theirs)
    assert ours["error"]["message"] == message
    assert json.loads(Form.OLLAMA.body(404, "x")) == {"error": "x"}
    ours = json.loads(Form.ANTHROPIC.body(401, "x"))
    assert ours == {"type": "error", "error": {"type": "authentication_error", "message": "x"}}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("//api//generate", "/api/generate"),
        ("/api/generate/", "/api/generate"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/api/chat", "/api/chat"),
        ("/api/api/tags", "/api/tags"),
        ("/tags", "/api/tags"),
        ("/V1/Models", "/v1/models"),
        ("/api/genrate", "/api/generate"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/metric", "/metrics"),
        ("/callmodel", "/call_model"),
    ],
)
def test_an_unknown_path_is_answered_with_the_one_that_was_meant(path: str, meant: str) -> None:
    assert TABLE.hint(path.encode()) == f"did you mean {meant}?"


@pytest.mark.parametrize("path", ["/", "/nothing/of/the/kind", "/x", "/wp-login.php"])
def test_a_path_like_no_other_gets_no_guess(path: str) -> None:
    table = RouteTable({p: row for p, row in TABLE.rows.items() if p != b"/"})
    assert "README" in table.hint(path.encode())


def test_a_long_path_is_not_compared_with_all_others() -> None:
    assert "README" in TABLE.hint(b"/api/generate" + b"/" * 64)


def test_after_an_error_nothing_is_an_answer() -> None:
    lines = b'{"response":"a"}\n{"error":"died"}\n{"response":"","done":true}\n'
    notes = noted(b"/api/generate", lines)
    assert (notes.finished, notes.error is None, notes.keeps()) == (False, False, False)
    events = (
        b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
        b'data: {"error":{"message":"died"}}\n\ndata: [DONE]\n\n'
    )
    notes = noted(b"/v1/chat/completions", events, "text/event-stream")
    assert (notes.error is None, notes.keeps()) == (False, False)


def test_any_depth_is_answered_or_refused() -> None:
    for depth in range(100, 1100, 7):
        body = b'{"model":"m","prompt":"p","x":%b%b}' % (b"[" * depth, b"]" * depth)
        try:
            assert asked(b"/api/generate", body).body
        except HTTPError as error:
            status = error.status
        else:
            status = 200
        assert status in {200, 400}


@pytest.mark.parametrize(
    ("more", "cacheable"),
    [
        ({}, True),
        ({"store": False}, True),
        ({"store": None, "previous_response_id": None}, True),
        ({"store": True}, False),
        ({"previous_response_id": "resp_1"}, False),
        ({"previous_response_id": ""}, False),
    ],
)
def test_a_response_that_keeps_state_is_not_cached(
    more: dict[str, object], cacheable: bool
) -> None:
    body = json.dumps({"model": "m", "input": "p", **more}).encode()
    codec = PassThrough("input", may_keep_state=True)
    assert (codec.question(body, b"/v1/responses").key is not None) is cacheable


def test_a_show_by_its_older_name_asks_for_that_model() -> None:
    assert asked(b"/api/show", {"name": "m"}).model == "m"
    assert asked(b"/api/show", {"model": "a", "name": "b"}).model == "a"
    assert asked(b"/api/show", {"Name": "b"}).ambiguous


@pytest.mark.parametrize(
    ("body", "models"),
    [
        (b'{"model": "M"}', {"m:latest"}),
        (b'{"name": "m:local", "stream": false}', {"m:latest"}),
        (b'{"source": "a", "destination": "b"}', {"b:latest"}),
        (b'{"MODEL": "a", "model": "b"}', {"a:latest", "b:latest"}),
        (b'{"model": "a", "model": "b"}', {"a:latest", "b:latest"}),
        (b"{}", None),
        (b"no json", None),
        (b"[" * 100_000, None),
        (b'{"model": 5}', None),
    ],
)
def test_the_models_that_a_managing_request_changes(body: bytes, models: set[str] | None) -> None:
    assert managed_models(body) == models


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'{"a":1}', b'"a"', b'["\\""]'])
def test_a_body_of_very_many_values_is_refused(value: bytes) -> None:
    def body(count: int) -> bytes:
        return b'{"x":[%b]}' % b",".join([value] * count)

    check_values(body(MAX_VALUES // 10))
    with pytest.raises(HTTPError) as caught:
        check_values(body(MAX_VALUES + 1))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "text", [",[{" * MAX_VALUES, '\\"' * MAX_VALUES, "\\" * (2 * MAX_VALUES), '\n,"' * MAX_VALUES]
)
def test_what_stands_in_a_string_is_not_counted(text: str) -> None:
    check_values(json.dumps({"prompt": text}).encode())
    check_values(json.dumps({"prompt": text}).encode()[:-3])  # an unfinished string


VALUES = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda value: st.lists(value) | st.dictionaries(st.text(), value),
)


@given(VALUES)
def test_no_value_escapes_the_count(value: object) -> None:
    def count(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value
        is_leaf = isinstance(inner, str) or not isinstance(inner, Iterable)
        return 1 if is_leaf else 1 + sum(map(count, inner))

    def refused(limit: int) -> bool:
        try:
            check_values(json.dumps(value).encode(), limit)
        except HTTPError:
            return True
        return False

    values = count(value)
    assert values == 1 or refused(values - 2)
    assert not refused(9 * values)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"models":[{"name":"llama2:latest","size":1},{"name":"qwen3:4b"}]}', 2),
        (b'{"models":[]}', 0),
        (b'{"models":null}', 0),
        (b'{"models":[{}]}', 0),
        (b'{"models":[7]}', 0),
        (b'{"models":[{"name":7}]}', 0),
        (b"[]", 0),
        (b"", 0),
        (b'{"models":[%b{"name":"x"}]}' % (b'{"name":"x"},' * 500), 100),
    ],
)
def test_loaded_models_are_read_from_whatever_comes(body: bytes, names: int) -> None:
    assert len(loaded(body)) == names
