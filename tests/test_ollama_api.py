import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standin import Script, StandIn

from answers.notes import BaseNotes
from answers.ollama_api import Form, RouteTable, digests, route_table, version
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
TABLE = route_table(32 << 20)


def response(name: str) -> tuple[int, str, bytes]:
    """A recorded response's status, content type and body, taken out of its chunks."""
    head, _, body = (TRACES / f"{name}.response").read_bytes().partition(b"\r\n\r\n")
    kind = re.search(rb"Content-Type: (.*)\r\n", head)
    if b"Transfer-Encoding: chunked" in head:
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return int(head.split(b" ")[1]), kind[1].decode() if kind else "", body


def noted(
    path: bytes, body: bytes, kind: str = "application/x-ndjson", status: int = 200
) -> BaseNotes:
    found = TABLE.find(path)
    assert found
    assert found[0].codec
    notes = found[0].codec.notes(Response(status, ((b"Content-Type", kind.encode()),), body))
    notes.feed(body)
    return notes


def noted_trace(path: bytes, name: str) -> BaseNotes:
    status, kind, body = response(name)
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
    assert not notes.keeps(b"")
    with pytest.raises(HTTPError, match=r'"stream": true') as caught:
        notes.fold()
    assert caught.value.status == 502


# What is complete.


GOOD, LAST = b'{"response":"a","done":false}\n', b'{"response":"","done":true}\n'


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ([GOOD, LAST], True),
        ([LAST], True),
        ([GOOD, LAST[:-1]], True),
        ([b'{"response":"\\n{\\"error\\"","done":false}\n', LAST], True),
        ([b'{"error":"boom"}\n', LAST], False),
        ([GOOD, b'{"error":"boom"}\n', LAST], False),
        ([GOOD, b"nonsense\n", LAST], False),
        ([b"[]\n", GOOD, LAST], False),
        ([b'{"response":\n', GOOD, LAST], False),
    ],
)
def test_what_comes_in_one_read_with_the_last_line_is_judged_too(
    lines: list[bytes], kept: bool, folds: bool
) -> None:
    tape = b"".join(lines)
    notes = noted(b"/api/generate", b"")
    if not folds:
        notes.forget()
    notes.feed(tape)
    assert notes.keeps(tape) is kept


@pytest.mark.parametrize(
    "lines",
    [b'{"response":"a\nb","done":true}\n', b'{"response":"a"},{"response":"","done":true}\n'],
)
def test_a_line_is_one_object_and_no_more(lines: bytes) -> None:
    notes = noted(b"/api/generate", lines)
    assert not notes.finished


def test_a_whole_stream_is_complete() -> None:
    notes = noted_trace(b"/api/generate", "generate-stream-default")
    assert (notes.finished, notes.keeps(b""), notes.close()) == (True, True, None)


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
    assert not noted_trace(path, name).keeps(response(name)[2])


def test_a_load_that_comes_as_a_stream_is_not_kept() -> None:
    assert not noted(b"/api/generate", b'{"response":"","done":true,"done_reason":"load"}\n').keeps(
        b""
    )


def test_ollamas_own_error_ends_a_stream_and_is_no_answer() -> None:
    notes = noted_trace(b"/api/generate", "generate-stream-runner-killed")
    assert (notes.finished, notes.keeps(b""), notes.close()) == (False, False, None)
    with pytest.raises(HTTPError) as caught:
        notes.fold()
    _, _, body = response("generate-nonstream-runner-killed")
    assert (caught.value.status, json.loads(caught.value.body or b"")) == (500, json.loads(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"response":"a","done":false}\n',
        b'{"response":"a","done":true}\n{"response":"b","done":false}\n',
        b'{"response":"a","done":"true"}\n',
        b'not json\n{"response":"a","done":true}\n',
        b'["done"]\n',
    ],
)
def test_a_stream_without_a_last_line_is_cut(body: bytes) -> None:
    notes = noted(b"/api/generate", body)
    assert not notes.finished
    assert notes.close()


@given(st.binary(max_size=80))
@example(b'{"done":true,"error":"x"}')
def test_any_bytes_can_be_noted(data: bytes) -> None:
    for path in (b"/api/generate", b"/api/chat", b"/api/embed"):
        notes = noted(path, data)
        notes.close()
        if notes.finished:
            notes.fold()


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
    assert question.body() == json.dumps(json.loads(body), separators=(",", ":")).encode()


def test_upstream_is_asked_for_a_stream_in_the_clients_order() -> None:
    body = asked(b"/call_model", b'{ "prompt":"\\u00e9", "model":"m", "stream":false}').body()
    assert body == b'{"prompt":"\\u00e9","model":"m","stream":true}'


def test_a_load_is_asked_for_as_its_client_wants_it() -> None:
    assert json.loads(asked(b"/call_model", {"model": "m"}).body())["stream"] is False
    assert json.loads(asked(b"/api/generate", {"model": "m"}).body())["stream"] is True


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
        status = 200 if isinstance(json.loads(question.body()), dict) else 0
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
    assert (notes.finished, notes.reported, notes.keeps(lines)) == (False, True, False)
    events = (
        b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
        b'data: {"error":{"message":"died"}}\n\ndata: [DONE]\n\n'
    )
    notes = noted(b"/v1/chat/completions", events, "text/event-stream")
    assert (notes.reported, notes.keeps(events)) == (True, False)


def test_any_depth_is_answered_or_refused() -> None:
    for depth in range(100, 1100, 7):
        body = b'{"model":"m","prompt":"p","x":%b%b}' % (b"[" * depth, b"]" * depth)
        try:
            asked(b"/api/generate", body).body()
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
