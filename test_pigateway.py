#!/usr/bin/env python3
"""Tests of pigateway.py. `python3 test_pigateway.py` runs them, and gets pytest first where it is missing.

Sections follow the module's. Tests that need an optional package, a program or a real model skip where it is absent;
`.ci/run` brings all of them.
"""
from __future__ import annotations

import os
import subprocess
import sys


def bootstrap() -> int:
    """Runs the tests; without pytest, in a virtual environment beside this file that is made first."""
    here = os.path.dirname(os.path.abspath(__file__))
    python = sys.executable
    try:
        import pytest  # noqa: F401
    except ImportError:
        folder = os.path.join(here, ".venv")
        python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
        if not os.path.exists(python):
            subprocess.check_call([sys.executable, "-m", "venv", folder])
        subprocess.check_call([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pytest"])
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", os.path.abspath(__file__), *sys.argv[1:]]
    return subprocess.call(command, cwd=here)


if __name__ == "__main__":
    sys.exit(bootstrap())

import base64
import contextlib
import hashlib
import http.client
import http.server
import importlib.util
import io
import json
import logging
import random
import re
import shutil
import signal
import socket
import stat
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

import pigateway as pg

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "pigateway.py")

# ======================================================================================================================
# Helpers
# ======================================================================================================================

STAMP = pg.Stamp("0123456789abcdef01234567", 1760000000)
CHAT, MESSAGES = pg.CHAT, pg.MESSAGES
COMPLETIONS = pg.UPSTREAM_PROTOCOLS["openai-completions"]
ANTHROPIC = pg.UPSTREAM_PROTOCOLS["anthropic-messages"]


def sse(events: Sequence[Any], named: bool = False, end: str = "") -> bytes:
    """Server-sent events with JSON payloads; `named` adds event lines from each payload's type, `end` a last payload."""
    out = "".join((f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n" for event in events)
    return (out + (f"data: {end}\n\n" if end else "")).encode("utf-8")


def model(protocol: str = "openai-completions", **facts: Any) -> pg.Model:
    """A model of a made-up provider."""
    facts = {"id": "m1", "provider": "p", "base_url": "http://127.0.0.1:9/v1", "reasoning": True, **facts}
    return pg.Model(protocol=protocol, **facts)


def chat_request(**fields: Any) -> pg.Request:
    """A parsed chat request with one user message unless told otherwise."""
    return CHAT.parse({"model": "p/m1", "messages": [{"role": "user", "content": "Hi"}], **fields})


def messages_request(**fields: Any) -> pg.Request:
    """A parsed Anthropic request with one user message unless told otherwise."""
    return MESSAGES.parse({"model": "p/m1", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}],
                           **fields})


def built(request: pg.Request, target: pg.Model, client: Any = CHAT) -> Tuple[Dict[str, Any], List[str]]:
    """The JSON body that a translated request becomes, and what was dropped."""
    upstream = pg.UPSTREAM_PROTOCOLS[target.protocol]
    lane = pg.TranslatedLane(client, upstream, request, target, STAMP)
    call, dropped = lane.call(pg.Credential("api_key", "sk-test"))
    return json.loads(call.body), dropped


def read_all(upstream: Any, wire: bytes, sizes: Sequence[int] = (), target: Optional[pg.Model] = None,
             is_cut: bool = False) -> List[Any]:
    """The events that a provider's bytes become, fed whole or in pieces of the given sizes, over and over."""
    reader = pg.Settled(upstream.reader(target or model(upstream.name), STAMP))
    events: List[Any] = []
    place, turn = 0, 0
    while place < len(wire):
        size = sizes[turn % len(sizes)] if sizes else len(wire)
        events.extend(reader.feed(wire[place:place + size]))
        place, turn = place + size, turn + 1
    return events + reader.end()


def texts(events: Sequence[Any]) -> List[Any]:
    """Events with neighbouring deltas of a part joined, so that runs cut at other places compare equal."""
    out: List[Any] = []
    for event in events:
        if isinstance(event, pg.PartDelta) and out and isinstance(out[-1], pg.PartDelta) and out[-1].index == event.index:
            out[-1] = pg.PartDelta(event.index, out[-1].text + event.text)
        elif isinstance(event, pg.Failed):
            out.append(("failed", type(event.error).__name__))
        else:
            out.append(event)
    return out


class Received(NamedTuple):
    """A request as a fake provider got it."""

    method: str
    path: str
    headers: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    """What a fake provider says: body bytes, or pieces with pauses (a float), b"" cuts the connection there."""

    status: int = 200
    body: Any = b""
    content_type: str = "application/json"
    headers: Dict[str, str] = {}


class FakeUpstream:
    """A scripted provider: a real HTTP server on a free port that gives the queued answers in turn, the last one for
    ever, and keeps what it received. An answer may be a function of the request."""

    def __init__(self, *answers: Any) -> None:
        self.answers: List[Any] = list(answers)
        self.received: List[Received] = []
        self.connections = 0
        self.client_gone = threading.Event()
        self.release = threading.Event()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                fake.connections += 1
                super().setup()

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Received(self.command, self.path, headers, body)
                fake.received.append(request)
                answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                fake.give(self, answer(request) if callable(answer) else answer)

            do_GET = do_POST

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def give(self, handler: Any, answer: Answer) -> None:
        handler.send_response(answer.status)
        handler.send_header("content-type", answer.content_type)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if isinstance(answer.body, bytes):
            handler.send_header("content-length", str(len(answer.body)))
            handler.end_headers()
            handler.wfile.write(answer.body)
            return
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        try:
            for piece in answer.body:
                if isinstance(piece, float):
                    time.sleep(piece)
                elif piece is None:                 # waits until the test says so
                    fake_wait = self.release.wait(20)
                    assert fake_wait
                elif not piece:
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                else:
                    handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    handler.wfile.flush()
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.client_gone.set()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def fake_upstream(*answers: Any) -> Iterator[FakeUpstream]:
    """A scripted provider for the length of a `with`."""
    fake = FakeUpstream(*answers)
    try:
        yield fake
    finally:
        fake.close()


def write_agent_files(home: Any, **files: Any) -> str:
    """Writes ~/.pi/agent/NAME.json files (dicts as JSON, strings as they are); the folder's path."""
    folder = os.path.join(str(home), ".pi", "agent")
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
    return folder


def two_providers(url: str, **model_facts: Any) -> Dict[str, Any]:
    """models.json with `chat` and `anth`, the same server in both provider protocols, each with the model m1."""
    facts = {"id": "m1", "reasoning": True, "input": ["text", "image"], **model_facts}
    return {"providers": {
        "chat": {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": "sk-upstream-chat-key", "models": [facts]},
        "anth": {"baseUrl": url, "api": "anthropic-messages", "apiKey": "sk-upstream-anth-key", "models": [facts]}}}


@contextlib.contextmanager
def running(home: Any, environ: Optional[Dict[str, str]] = None, **overrides: Any) -> Iterator[pg.ServerHandle]:
    """A gateway in this process, on a free port, with `home` as home directory."""
    overrides = {"port": 0, "demo_delay_ms": 0, "force_abort_timeout_ms": 100, **overrides}
    handle = pg.start_server(environ={"HOME": str(home), **(environ or {})}, **overrides)
    try:
        yield handle
    finally:
        pg.stop_server(handle, 0.1)


class Result(NamedTuple):
    """An HTTP answer as a client got it."""

    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> List[Any]:
        """The JSON payloads of a stream, "[DONE]" as a string."""
        payloads = [text for _, text in pg.parse_events(self.body)]
        return [text if text == "[DONE]" else json.loads(text) for text in payloads]


def call(url: str, path: str, body: Any = None, method: Optional[str] = None, **headers: str) -> Result:
    """One request; a dict goes out as JSON, header names have underscores for dashes."""
    split = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=20)
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    try:
        connection.request(method or ("GET" if data is None else "POST"), path, data,
                           {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Result(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


# ======================================================================================================================
# §3 Logging and redaction
# ======================================================================================================================

KEYS = [
    ("Authorization: Bearer abcdef1234567890", "abcdef1234567890"),
    ("authorization: bearer   abcdef1234567890", "abcdef1234567890"),
    ("key sk-ant-api03-AbCdEf_123456-xyz refused", "sk-ant-api03-AbCdEf_123456-xyz"),
    ("Incorrect API key provided: sk-proj-0123456789abcdef.", "sk-proj-0123456789abcdef"),
    ("gsk_0123456789abcdefABCD", "gsk_0123456789abcdefABCD"),
    ("xai-0123456789abcdefABCD", "xai-0123456789abcdefABCD"),
    ("hf_0123456789abcdefABCD", "hf_0123456789abcdefABCD"),
    ("ghu_0123456789abcdefABCD", "ghu_0123456789abcdefABCD"),
    ("AIzaSyA0123456789abcdefghijklmnopqrstu", "AIzaSyA0123456789abcdefghijklmnopqrstu"),
    ("ya29.a0AfH6SMBx_0123456789", "ya29.a0AfH6SMBx_0123456789"),
    ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln", "eyJzdWIiOiIxMjM0In0"),
    ("GET /v1beta/models?key=plain-secret&alt=sse", "plain-secret"),
    ("GET /x?a=b&api_key=plain-secret", "plain-secret"),
]


@pytest.mark.parametrize("text, secret", KEYS, ids=[secret[:12] for _, secret in KEYS])
def test_redact_finds_keys_by_shape(text: str, secret: str) -> None:
    assert secret not in pg.redact(text) and pg.REDACTED in pg.redact(text)


def test_redact_hides_exact_values_of_any_shape() -> None:
    assert pg.redact("say correct horse twice: correct horse", ["correct horse"]) == "say [redacted] twice: [redacted]"
    # a value of three letters is no secret, and hiding it would spoil every log line
    assert pg.redact("an abc", ["abc", ""]) == "an abc"


@pytest.mark.parametrize("text", [
    "the model said: sketch a task-runner in Python", "prompt is too long: 210000 tokens > 200000 maximum",
    "no model \"p/sk-1\" here", "messages[0].content[1].image_url.url: must be an http, https or data URL",
    "req_0123456789abcdef01234567 200 POST /v1/chat/completions", "bearer of news", "monkey=banana"])
def test_redact_leaves_innocent_text(text: str) -> None:
    assert pg.redact(text) == text


def test_json_formatter_writes_one_line_without_secrets() -> None:
    try:
        raise RuntimeError("refused sk-ant-api03-AbCdEf_123456-xyz")
    except RuntimeError:
        record = logging.LogRecord(pg.NAME, logging.WARNING, __file__, 1, "two\nlines, Bearer %s",
                                   ("abcdef1234567890",), sys.exc_info())
    record.fields = {"status": 502, "odd": object()}        # type: ignore[attr-defined]
    text = pg.JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text and "abcdef1234567890" not in text and "AbCdEf_123456" not in text
    assert line["level"] == "warn" and line["status"] == 502 and "RuntimeError" in line["trace"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])


# ======================================================================================================================
# §5 Framing
# ======================================================================================================================

# One stream in all that the format allows: BOM, comments, names, many data lines, fields to ignore, no last blank line.
SSE_LINES = ["\ufeff: hello", "", "event: one", "data: {\"a\":", "data:  1}", "", "id: 7", "retry: 10", ": keep-alive",
             "",
             "data:no blank", "", "event: empty", "", "data: é漢😀 \u2028\u0085", "", "", "data", "", "event: last",
             "data: end"]
SSE_EVENTS = [("one", "{\"a\":\n 1}"), ("", "no blank"), ("", "é漢😀 \u2028\u0085"), ("last", "end")]


def split_events(pieces: Sequence[bytes]) -> List[Tuple[str, str]]:
    """Events of a stream that comes in these pieces."""
    splitter = pg.EventSplitter()
    out = [event for piece in pieces for event in pg.parse_events(splitter.feed(piece))]
    return out + list(pg.parse_events(splitter.end()))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_events_are_the_same_at_every_split(ending: str) -> None:
    wire = ending.join(SSE_LINES).encode()
    assert split_events([wire]) == SSE_EVENTS
    assert split_events([wire[place:place + 1] for place in range(len(wire))]) == SSE_EVENTS
    for place in range(len(wire)):
        assert split_events([wire[:place], wire[place:]]) == SSE_EVENTS, place


def test_event_splitter_gives_each_event_as_soon_as_it_is_whole() -> None:
    splitter = pg.EventSplitter()
    assert splitter.feed(b"data: 1\n") == b""
    assert splitter.feed(b"\ndata: 2") == b"data: 1\n\n"
    assert splitter.feed(b"\r\n\r") == b""
    assert splitter.feed(b"\n") == b"data: 2\r\n\r\n"


def test_event_splitter_bounds_what_it_holds(monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "MAX_EVENT_BYTES", 1000)
    splitter = pg.EventSplitter()
    with pytest.raises(pg.UpstreamProtocolError):
        for _ in range(20):
            splitter.feed(b"x" * 100)


def test_an_event_that_is_not_utf8_loses_nothing_before_it() -> None:
    events = pg.parse_events(b"data: good\n\ndata: \xff\n\n")
    assert next(events) == ("", "good")
    with pytest.raises(ValueError):
        next(events)


def test_sse_writes_ascii_only() -> None:
    # litellm splits lines at U+2028, U+2029 and U+0085; a lone surrogate has no UTF-8
    frame = pg.sse({"t": "\u2028\u2029\u0085\ud800é"}, "x")
    assert frame == b'event: x\ndata: {"t":"\\u2028\\u2029\\u0085\\ud800\\u00e9"}\n\n'


CHUNKED = (b"4\r\nWiki\r\n5;name=value\r\npedia\r\nE \r\n in\r\n\r\nchunks.\r\n0\r\nX-Trailer: 1\r\n\r\nHTTP/1.1 200 OK\r\n",
           b"Wikipedia in\r\n\r\nchunks.", b"HTTP/1.1 200 OK\r\n")


def test_dechunker_at_every_split() -> None:
    wire, body, rest = CHUNKED
    for place in range(len(wire) + 1):
        decoder = pg.Dechunker()
        got = decoder.feed(wire[:place])
        before = decoder.rest
        got += decoder.feed(wire[place:]) if not decoder.done else b""
        assert got == body and decoder.done, place
        assert decoder.rest == rest or before + wire[place:] == rest, place
    decoder = pg.Dechunker()
    end = wire.index(b"HTTP")
    assert b"".join(decoder.feed(wire[place:place + 1]) for place in range(end)) == body and decoder.done


@pytest.mark.parametrize("wire", [
    b"x\r\n", b"\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b"1 1\r\n", b"1;a\nb\r\n", b"3\r\nabcd\r\n", b"3\r\nabcX\r\n",
    b"3\nabc\n", b"fffffffffffff\r\n", b"1" * 5000, b" 1\r\n", b"1;\0\r\n",
    b"0\r\n" + b"A: b\r\n" * 300 + b"\r\n"],
    ids=["no number", "blank", "minus", "plus", "hex prefix", "two numbers", "LF in extension", "too long", "no CRLF",
         "bare LF", "13 digits", "endless", "blank first", "NUL", "trailers"])
def test_dechunker_refuses_what_is_malformed(wire: bytes) -> None:
    decoder = pg.Dechunker()
    with pytest.raises(ValueError):
        decoder.feed(wire)
        decoder.feed(b"\r\n" * 10)      # a bare LF is only seen with the next line end


def test_parse_head_reads_what_is_right() -> None:
    start, headers = pg.parse_head(b"POST /x?a=b HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\nx-a:\t2\r\nEmpty:\r\nU: \xe9")
    assert start == "POST /x?a=b HTTP/1.1"
    assert headers == {"host": "h", "x-a": "1, 2", "empty": "", "u": "é"}


@pytest.mark.parametrize("line", [
    b"A: 1\r\n folded", b"A : 1", b" A: 1", b"A: 1\0", b"A: 1\n2", b"A: 1\r2", b"no colon", b": 1", b"A(: 1",
    b"\xe9: 1",
    b"Content-Length: 1\r\nContent-Length: 1", b"Content-Length: 1\r\nContent-Length: 2", b"Host: a\r\nHost: b",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"A: 1\nB: 2", b"A: 1\r\n\r\nB: 2"],
    ids=["fold", "space before colon", "leading space", "NUL", "LF", "CR", "no colon", "no name", "bad name",
         "non-ASCII name", "same length twice", "two lengths", "two hosts", "two codings", "bare LF line",
         "blank line"])
def test_parse_head_refuses_what_is_malformed(line: bytes) -> None:
    with pytest.raises(ValueError):
        pg.parse_head(b"GET / HTTP/1.1\r\n" + line)


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\nA: b", b"GET /\r HTTP/1.1", b"GET /\0 HTTP/1.1"],
                         ids=["LF", "CR", "NUL"])
def test_parse_head_refuses_a_malformed_start_line(start: bytes) -> None:
    with pytest.raises(ValueError):
        pg.parse_head(start + b"\r\nHost: h")


def test_parse_head_bounds_the_headers() -> None:
    with pytest.raises(ValueError):
        pg.parse_head(b"GET / HTTP/1.1\r\n" + b"\r\n".join(b"A%d: b" % n for n in range(pg.MAX_HEADERS + 1)))


BAD_LENGTHS = [{"transfer-encoding": "chunked", "content-length": "3"}, {"transfer-encoding": "gzip, chunked"},
               {"transfer-encoding": "identity"}, {"transfer-encoding": ""}, {"content-length": "+3"},
               {"content-length": "-1"}, {"content-length": "0x3"}, {"content-length": "3, 3"}, {"content-length": ""},
               {"content-length": "1" * 16}, {"content-length": "٣"}]


@pytest.mark.parametrize("headers", BAD_LENGTHS, ids=lambda headers: str(headers))
def test_body_length_refuses_what_is_unclear(headers: Dict[str, str]) -> None:
    with pytest.raises(ValueError):
        pg.body_length(headers)


def test_body_length() -> None:
    assert [pg.body_length(headers) for headers in ({"content-length": "12"}, {"transfer-encoding": "Chunked"}, {})
            ] == [12, None, -1]


@pytest.mark.parametrize("body, expected", [
    (b'\xef\xbb\xbf{"a": "\xc3\xa9"}', {"a": "é"}),                                       # G63
    (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
    (b'{"a": "x\\ud83dy", "\\udc00k": [{"b": "\\ude00"}]}', {"a": "xy", "k": [{"b": ""}]}),
    (b'{"n": 9007199254740993, "f": 1.0}', {"n": 9007199254740993, "f": 1.0}),              # G10
], ids=["BOM", "pair", "lone surrogates", "numbers"])
def test_parse_json_object(body: bytes, expected: Any) -> None:
    assert repr(pg.parse_json_object(body)) == repr(expected)


@pytest.mark.parametrize("body, words", [
    (b"", "line 1"), (b"{", "line 1, column 2"), (b'{"a":\n x}', "line 2, column 2"), (b'{"a": "\xff"}', "byte 7"),
    (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"), (b'{"a": 1e999}', "1e999"), (b"[1]", "object"),
    (b'"x"', "object"), (b"null", "object"), (b"[" * 200_000, "nested"), (b'{"a":' * 200_000, "nested"),
    (b'{"a": 1} x', "line 1"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", "line 1"), (b'{"a": "\n"}', "line 1"), (b'{"a": 1%s}' % (b"1" * 5000), "not JSON"),
], ids=["empty", "cut", "second line", "not UTF-8", "NaN", "Infinity", "1e999", "array", "string", "null", "deep array",
        "deep object", "trailing text", "two BOMs", "control character", "huge integer"])
def test_parse_json_object_says_what_is_wrong(body: bytes, words: str) -> None:
    if b"1" * 5000 in body and sys.version_info < (3, 10, 7):
        pytest.skip("older Pythons read integers of any length")
    with pytest.raises(pg.BadRequest, match=re.escape(words)) as caught:
        pg.parse_json_object(body)
    assert caught.value.code == "invalid_json" and caught.value.status == 400


@pytest.mark.parametrize("text, expected", [
    # R13: raw control characters
    ("", {}), (" \n", {}), ('{"a": 1}', {"a": 1}), ('{"a": "x\ny\t"}', {"a": "x\ny\t"}),
    (r'{"p": "C:\dir\q"}', {"p": "C:\\dir\\q"}), ('```json\n{"a": 1}\n```', {"a": 1}),
    ('\n```\n{"a": 1}```\n', {"a": 1}),
    (r'{"a": "\u00e9\n"}', {"a": "é\n"}), ('{"n": 9007199254740993}', {"n": 9007199254740993}),
    ('{"city":"Par', None), ("{", None), ("[1]", None), ('"x"', None), ("null", None), ("not JSON", None),    # G11
    ('{"a": 1}{"b": 2}', None), ("[" * 100_000, None), ("```json\n[1]\n```", None),
], ids=["empty", "blank", "plain", "control characters", "invalid escapes", "fence", "bare fence", "valid escapes",
        "big integer", "cut", "brace", "array", "string", "null", "prose", "two objects", "deep", "fenced array"])
def test_repair_json_object(text: str, expected: Any) -> None:
    assert pg.repair_json_object(text) == expected


@pytest.mark.parametrize("text, expected", [
    ('{"a": 1, // one\n "b": 2,\n}', {"a": 1, "b": 2}), ('\ufeff{"u": "http://x/y", }', {"u": "http://x/y"}),
    ('{"s": ",} // \\" ,]",}', {"s": ',} // " ,]'}), ('[1, // last,\n ]', [1]), ('{"a": [1,2,],}// end', {"a": [1, 2]}),
    ('{"a": "x\\\\", // c\n}', {"a": "x\\"})],
    ids=["both", "URL in a string", "marks in a string", "comma and comment", "nested", "escaped backslash"])
def test_strip_json_comments(text: str, expected: Any) -> None:
    plain = pg.strip_json_comments(text)
    assert json.loads(plain) == expected and len(plain) == len(text.lstrip("\ufeff"))


@pytest.mark.parametrize("headers, expected", [
    ({"retry-after": "12"}, 12.0), ({"retry-after": " 1.5 "}, 1.5),
    ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0), ({"retry-after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10.0),
    ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0), ({}, None), ({"retry-after": ""}, None),
    ({"retry-after": "soon"}, None), ({"retry-after": "-5"}, None), ({"retry-after": "nan"}, None),
    ({"retry-after": "9" * 400}, None), ({"retry-after": "Thu, 99 Jan 1970"}, None)],
    ids=["seconds", "fraction", "milliseconds first", "bad milliseconds", "date", "past date", "none", "empty", "word",
         "negative", "nan", "endless", "bad date"])
def test_parse_retry_after(headers: Dict[str, str], expected: Any) -> None:
    assert pg.parse_retry_after(headers, 1000.0) == expected


@pytest.mark.parametrize("text, expected", [
    ("plain é", "plain é"), ("\ud83d\ude00", "😀"), ("a\ud83db", "ab"), ("\ude00\ud83d", ""), ("😀\udc00", "😀")],
    ids=["none", "pair", "lone high", "wrong order", "after a pair"])
def test_clean_text(text: str, expected: str) -> None:
    assert pg.clean_text(text) == expected


# ======================================================================================================================
# §6 Normalisation
# ======================================================================================================================


def calls(*ids: str) -> pg.Message:
    return pg.Message("assistant", tuple(pg.ToolCall(each, "f", "{}") for each in ids))


def results(*pairs: str) -> pg.Message:
    """Results written id=text."""
    return pg.Message("tool", tuple(pg.ToolResult(pair.partition("=")[0], (pg.Text(pair.partition("=")[2]),))
                                    for pair in pairs))


def said(text: str, role: str = "user") -> pg.Message:
    return pg.Message(role, (pg.Text(text),))


def short(messages: Sequence[pg.Message]) -> str:
    """A conversation as one readable line."""
    words = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, pg.ToolCall):
                words.append(f"call:{part.id}")
            elif isinstance(part, pg.ToolResult):
                text = "".join(inner.text for inner in part.parts if isinstance(inner, pg.Text))
                words.append(f"{part.call_id}={'?' if part.is_error and text == pg.NO_RESULT else text}")
            else:
                words.append(f"{message.role}:{part.text[:8]}")
    return " ".join(words)


@pytest.mark.parametrize("messages, expected, is_paired", [
    ([said("hi")], "user:hi", True),
    ([calls("a"), results("a=1")], "call:a a=1", True),
    ([calls("a", "b"), results("a=1", "b=2"), said("ok")], "call:a call:b a=1 b=2 user:ok", True),
    ([calls("a"), said("go on")], "call:a a=? user:go on", False),
    ([calls("a", "b"), results("b=2"), said("x")], "call:a call:b a=? b=2 user:x", False),
    ([said("hi"), calls("a")], "user:hi call:a a=?", False),
    ([calls("a"), results("a=1", "a=2")], "call:a a=2", False),                                   # G39
    ([said("hi"), results("z=9")], "user:hi user:[Result  user:9", False),                         # G39
    ([calls("a"), results("a=1", "z=9"), said("x")], "call:a a=1 user:[Result  user:9 user:x", False),
    ([calls("a", "b"), results("b=2", "a=1")], "call:a call:b a=1 b=2", False),
    ([calls("a"), said("rule", "system"), results("a=1")], "call:a a=1 system:rule", True),
    ([calls("a", "b"), results("a=1"), said("rule", "system"), results("b=2"), said("x")],
     "call:a call:b a=1 b=2 system:rule user:x", True),
    ([calls("a"), results("a=1"), said("x"), calls("a"), results("a=2")], "call:a a=1 user:x call:a a=2", True),
    ([calls("a"), results("a=1"), calls("a"), said("x")], "call:a a=1 call:a a=? user:x", False),
    ([], "", True),
], ids=["plain", "one", "parallel", "missing", "one of two missing", "missing at the end", "duplicate", "orphan",
        "orphan beside a result", "out of order", "system between", "system between results", "same id later",
        "same id later, unanswered", "empty"])
def test_pair_tool_calls(messages: List[pg.Message], expected: str, is_paired: bool) -> None:
    paired = pg.pair_tool_calls(messages)
    assert short(paired) == expected
    assert pg.is_paired(messages) is is_paired and pg.is_paired(paired)
    assert short(pg.pair_tool_calls(paired)) == expected


def test_text_before_a_tool_result_loses_no_result() -> None:
    # R19: a text block in front of a tool_result must not make up a missing result
    request = messages_request(messages=[
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "text", "text": "note"},
                                     {"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]}])
    assert short(pg.pair_tool_calls(request.messages)) == "user:Hi call:t1 t1=ok user:note"


def test_fit_id_keeps_ids_apart() -> None:
    odd = ["call.1", "call:1", "call|1", "call_1", "é", "", "x" * 41, "x" * 40 + "y", "x" * 400, "a b", "a\tb"]
    for limit in (40, 64):
        fitted = [pg.fit_id(each, limit) for each in odd]
        assert len(set(fitted)) == len(odd)                                                     # G16
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,%d}" % limit, each) for each in fitted)
        assert fitted == [pg.fit_id(each, limit) for each in odd] and "call_1" in fitted


@pytest.mark.parametrize("level, levels, expected", [
    ("high", {}, "high"), ("off", {}, "off"), ("off", {"off": None}, None), ("off", {"off": "none"}, "off"),
    ("xhigh", {}, "high"), ("max", {}, "high"), ("xhigh", {"xhigh": "xhigh"}, "xhigh"),
    ("xhigh", {"max": "max"}, "max"),
    ("minimal", {"minimal": None}, "low"), ("high", {"high": None}, "medium"),
    ("high", {"high": None, "max": "m"}, "max"),
    ("low", dict.fromkeys(["minimal", "low", "medium"]), "high"),
    ("medium", dict.fromkeys(["minimal", "low", "medium", "high"]), None)],
    ids=["own name", "off", "cannot be off", "off by word", "xhigh needs an entry", "max needs an entry",
         "xhigh mapped",
         "upward", "minimal up", "downward", "upward before downward", "over two", "none"])
def test_fit_level(level: str, levels: Dict[str, Any], expected: Any) -> None:
    assert pg.fit_level(level, model(thinking_levels=levels)) == expected


@pytest.mark.parametrize("budget, level", [(0, "off"), (-1, "off"), (1, "low"), (2048, "low"), (2049, "medium"),
                                           (8192, "medium"), (24576, "high"), (24577, "max")])
def test_level_of_budget(budget: int, level: str) -> None:
    assert pg.level_of_budget(budget) == level


def normalised(request: pg.Request, target: pg.Model, client: Any = CHAT) -> Tuple[pg.Request, List[str]]:
    return pg.normalise(request, target, pg.UPSTREAM_PROTOCOLS[target.protocol], client.field_names)


def test_what_a_model_lacks_is_named_in_the_clients_words() -> None:
    request = chat_request(seed=1, frequency_penalty=1, presence_penalty=1, logit_bias={"1": 2}, verbosity="low",
                           top_p=0.5,
                           temperature=1, reasoning_effort="high", metadata={"a": "b"}, stop="x")
    fitted, dropped = normalised(request, model("anthropic-messages", reasoning=False))
    assert sorted(dropped) == ["frequency_penalty", "logit_bias", "metadata", "presence_penalty", "reasoning_effort",
                               "seed",
                               "verbosity"]
    assert (fitted.seed, fitted.logit_bias, fitted.reasoning) == (None, None, None) and fitted.top_p == 0.5
    request = messages_request(top_k=4, thinking={"type": "enabled", "budget_tokens": 2000}, stop_sequences=["x"],
                               cache_control={"type": "ephemeral"}, context_management={"edits": []})
    fitted, dropped = normalised(request, model(reasoning=False), MESSAGES)
    assert set(dropped) == {"top_k", "thinking", "cache_control", "context_management"} and fitted.stop == ("x",)


def test_defaults_are_neither_refused_nor_named() -> None:
    # G32: several clients always send the default of every field
    request = chat_request(n=1, frequency_penalty=0, presence_penalty=0, top_p=1, logprobs=False, stop=[],
                           logit_bias={},
                           response_format={"type": "text"}, store=False, service_tier="auto", modalities=["text"],
                           metadata={}, reasoning_effort="none", user=None, parallel_tool_calls=True)
    assert normalised(request, model("anthropic-messages", reasoning=False))[1] == []


@pytest.mark.parametrize("fields, facts, param", [
    ({"n": 2}, {}, "n"), ({"logprobs": True}, {}, "logprobs"), ({"top_logprobs": 3, "logprobs": True}, {}, ""),
    ({"modalities": ["text", "audio"]}, {}, "modalities"), ({"audio": {"voice": "x"}}, {}, "audio"),
    ({"response_format": {"type": "json_object"}}, {}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
     {"compat": {"supportsOutputFormat": False}}, "response_format"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"},
                                                {"type": "input_audio", "input_audio": {}}]}]},
     {}, "messages[0].content[1].type"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, {},
     "messages[0].content[0].file"),
], ids=["n", "logprobs", "top_logprobs", "modalities", "audio", "json_object", "json_schema", "input_audio", "file_id"])
def test_what_would_change_the_answer_is_refused(fields: Any, facts: Any, param: str) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        normalised(chat_request(**fields), model("anthropic-messages", **facts))
    assert caught.value.code == "unsupported_parameter" and (caught.value.param or "").startswith(param)
    assert caught.value.param and caught.value.message.startswith(caught.value.param)


@pytest.mark.parametrize("fields, param", [
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"), ({"container": "c"}, "container"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
     "messages[0].content[0].source.type"),
    ({"tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice.name"),
], ids=["mcp_servers", "container", "client tool", "file source", "choice of no tool"])
def test_what_only_claude_can_is_refused_elsewhere(fields: Any, param: str) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        normalised(messages_request(**fields), model(input=("text",)), MESSAGES)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


def test_images_are_found_for_models_that_take_none() -> None:
    # R10: the gateway refuses these by the path, it does not drop them
    picture = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    request = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "user", "content": [
        {"type": "text", "text": "x"}, picture]}])
    assert request.images == ("messages[1].content[1]",)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}]}
    request = messages_request(messages=[{"role": "user", "content": [result]}])
    assert request.images == ("messages[0].content[0].content[0]",)


@pytest.mark.parametrize("asked, limit, expected", [(None, 0, None), (None, 100, None), (50, 100, 50),
                                                    (128000, 8192, 8192),
                                                    (128000, 0, 128000)])
def test_max_tokens_is_clamped(asked: Any, limit: int, expected: Any) -> None:
    assert pg.fit_max_tokens(asked, model(max_tokens=limit)) == expected                         # G35


def test_late_system_turns() -> None:
    messages = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"}, {"role": "system", "content": "C"},
                {"role": "user", "content": "x"}]
    request = chat_request(messages=messages)
    folded, _ = normalised(request, model())
    assert [text.text for text in folded.system] == ["A", "B", "C"]
    assert short(folded.messages) == "user:Hi assistant:Yes user:x"
    kept, _ = normalised(request, model(compat={"supportsMidConvoSystemMessages": True}))
    assert [text.text for text in kept.system] == ["A", "B"]
    assert short(kept.messages) == "user:Hi assistant:Yes system:C user:x"


def test_estimate_tokens_counts_what_is_costly() -> None:
    plain = pg.estimate_tokens(messages_request())
    assert plain >= 1
    tools = [{"name": "f", "description": "d" * 3500, "input_schema": {"type": "object"}}]
    assert pg.estimate_tokens(messages_request(tools=tools)) > plain + 900                     # R49
    assert pg.estimate_tokens(messages_request(messages=[{"role": "user", "content": "漢" * 1000}])) > plain + 900
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    assert pg.estimate_tokens(messages_request(messages=[{"role": "user", "content": [image]}])) > plain + 1000
    result = {"type": "tool_result", "tool_use_id": "t", "content": "word " * 1000}
    assert pg.estimate_tokens(messages_request(messages=[{"role": "user", "content": [result]}])) > plain + 1000


# ======================================================================================================================
# §7 Client protocols
# ======================================================================================================================

PNG = "iVBORw0KGgo="
WEATHER = {"type": "function", "function": {"name": "wx", "description": "Weather", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"],
    "additionalProperties": False,
    "$defs": {"c": {"type": "string"}}}}}
WX = pg.Tool("wx", "Weather", WEATHER["function"]["parameters"], True)       # type: ignore[index]
BARE = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("fields, expected", [
    ({}, {"stream": False, "max_tokens": None, "temperature": None, "stop": (), "tools": (), "reasoning": None,
          "include_usage": False, "output": None, "extra": {}, "lost": (), "refused": ()}),
    # G33: null is absent
    (dict.fromkeys(["stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n",
                    "stop",
                    "seed", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
                    "response_format", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call",
                    "reasoning_effort", "reasoning", "thinking", "enable_thinking", "verbosity", "user", "metadata",
                    "safety_identifier", "store", "service_tier", "prediction", "modalities", "audio",
                    "web_search_options", "prompt_cache_key", "moderation"]),
     {"stream": False, "max_tokens": None, "tools": (), "extra": {}, "refused": ()}),
    ({"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
     {"stream": True, "include_usage": True}),
    ({"max_tokens": 5}, {"max_tokens": 5}), ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
    ({"temperature": 0}, {"temperature": 0}), ({"temperature": 2.0}, {"temperature": 2.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 40}, {"top_k": 40}), ({"seed": -5}, {"seed": -5}),
    ({"stop": "END"}, {"stop": ("END",)}), ({"stop": ["a", "b"]}, {"stop": ("a", "b")}), ({"stop": ""}, {"stop": ()}),
    ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2, "presence_penalty": 2}),
    ({"frequency_penalty": 0}, {"frequency_penalty": None}), ({"logit_bias": {"50256": -100}},
                                                              {"logit_bias": {"50256": -100}}),
    ({"response_format": {"type": "text"}}, {"output": None}),
    ({"response_format": {"type": "json_object"}}, {"output": pg.OutputFormat()}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"},
                                                                 "strict": True}}},
     {"output": pg.OutputFormat({"type": "object"}, "n", True)}),
    ({"tools": [WEATHER, BARE]}, {"tools": (WX, pg.Tool("now"))}), ({"tools": []}, {"tools": ()}),
    ({"parallel_tool_calls": False}, {"parallel_tools": False}),
    ({"parallel_tool_calls": True}, {"parallel_tools": None}),
    ({"user": "u"}, {"user": "u"}), ({"safety_identifier": "s"}, {"user": "s"}),
    ({"verbosity": "low"}, {"verbosity": "low"}),
    ({"metadata": {"a": "b"}, "moderation": {"x": 1}, "made_up": 1}, {"extra": {"metadata": {"a": "b"},
                                                                                "moderation": {"x": 1}, "made_up": 1}}),
    ({"reasoning_effort": "none"}, {"reasoning": pg.Reasoning("off")}),
    ({"reasoning_effort": "XHigh"}, {"reasoning": pg.Reasoning("xhigh")}),                       # G34
    ({"reasoning_effort": "extreme"}, {"reasoning": None, "extra": {"reasoning_effort": "extreme"}}),
    ({"reasoning": {"effort": "low"}}, {"reasoning": pg.Reasoning("low"), "extra": {}}),
    ({"reasoning": {"max_tokens": 4000}}, {"reasoning": pg.Reasoning("medium", 4000)}),
    ({"reasoning": {"enabled": False}}, {"reasoning": pg.Reasoning("off")}),
    ({"thinking": {"type": "enabled", "budget_tokens": 20000}}, {"reasoning": pg.Reasoning("high", 20000)}),
    ({"thinking": {"type": "disabled"}}, {"reasoning": pg.Reasoning("off")}),
    ({"enable_thinking": True}, {"reasoning": pg.Reasoning("medium")}),
    ({"functions": [{"name": "old"}], "function_call": {"name": "old"}},
     {"tools": (pg.Tool("old"),), "tool_choice": pg.ToolChoice("tool", "old")}),
    ({"functions": [{"name": "old"}], "function_call": "none"}, {"tool_choice": pg.ToolChoice("none")}),
    ({"tool_choice": "required", "tools": [BARE]}, {"tool_choice": pg.ToolChoice("required")}),
    ({"tool_choice": {"type": "function", "function": {"name": "now"}}, "tools": [BARE]},           # G31
     {"tool_choice": pg.ToolChoice("tool", "now")}),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "now"}}]}}, "tools": [WEATHER, BARE]},
     {"tool_choice": pg.ToolChoice("required"), "tools": (pg.Tool("now"),)}),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"type": "function", "name": "wx"}]}},
      "tools": [WEATHER, BARE]}, {"tool_choice": pg.ToolChoice("auto"), "tools": (WX,)}),
], ids=lambda value: ",".join(value)[:40] if isinstance(value, dict) else None)
def test_chat_fields(fields: Dict[str, Any], expected: Dict[str, Any]) -> None:
    request = chat_request(**fields)
    assert {name: getattr(request, name) for name in expected} == expected


def test_chat_custom_tools() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: X"}}
    request = chat_request(tools=[{"type": "custom", "custom": {"name": "sh", "description": "Shell",
                                                                "format": grammar}}],
                           tool_choice={"type": "custom", "custom": {"name": "sh"}})
    tool = request.tools[0]
    assert tool.custom and tool.name == "sh" and "start: X" in (tool.description or "") and "lark" in (tool.description or "")
    assert tool.schema["required"] == ["input"] and request.tool_choice == pg.ToolChoice("tool", "sh")


def parts_of(message: Dict[str, Any]) -> List[Any]:
    """What one chat message becomes, behind a user turn."""
    request = chat_request(messages=[{"role": "user", "content": "Hi"}, message])
    return [part for turn in request.messages[1:] for part in turn.parts]


CALL = {"id": "c1", "type": "function", "function": {"name": "wx", "arguments": "{\"a\": 1.0}"}}


@pytest.mark.parametrize("message, expected", [
    ({"role": "user", "content": "x"}, [pg.Text("x")]),
    ({"role": "user", "name": "Bob", "content": [{"type": "text", "text": "x"}]}, [pg.Text("x")]),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}",
                                                                      "detail": "high"}}]},
     [pg.Image("image/png", PNG, detail="high")]),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "https://h/x.png"}]},
     [pg.Image(url="https://h/x.png")]),
    ({"role": "user",
      "content": [{"type": "image_url", "image_url": {"url": "data:image/svg+xml;charset=utf-8,%3Csvg%2F%3E"}}]},
     [pg.Image("image/svg+xml", base64.b64encode(b"<svg/>").decode())]),
    ({"role": "user", "content": [{"type": "file", "file": {"file_data": "data:application/pdf;base64,QUJD",
                                                            "filename": "a.pdf"}}]},
     [pg.Document("application/pdf", "QUJD", name="a.pdf")]),
    ({"role": "user", "content": [{"type": "file", "file": {"file_data": "QUJD"}}]},
     [pg.Document("application/pdf", "QUJD")]),
    ({"role": "assistant", "content": None}, []), ({"role": "assistant"}, []),
    ({"role": "assistant", "content": "", "tool_calls": [CALL]}, [pg.ToolCall("c1", "wx", "{\"a\": 1.0}")]),       # G10
    ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]},     # G37
     [pg.Text("a"), pg.Text("no")]),
    ({"role": "assistant", "content": None, "refusal": "no"}, [pg.Text("no")]),
    ({"role": "assistant", "content": "x", "tool_calls": None, "reasoning_content": None, "audio": None},
     [pg.Text("x")]),
    ({"role": "assistant", "content": "x", "reasoning_content": "why"}, [pg.Thinking("why"), pg.Text("x")]),       # G13
    ({"role": "assistant", "content": "x", "reasoning": "why"}, [pg.Thinking("why"), pg.Text("x")]),
    ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}}]},               # G37
     [pg.ToolCall("c", "f", "")]),
    ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}, [pg.ToolCall("c", "f", "")]),
    ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}]},
     [pg.ToolCall("c", "f", '{"a":1}')]),
    ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1]"}}]},
     [pg.ToolCall("c", "f", "[1]")]),
    ({"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]},
     [pg.ToolCall("c", "sh", '{"input":"ls"}')]),
    ({"role": "tool", "tool_call_id": "c", "content": "ok"}, [pg.ToolResult("c", (pg.Text("ok"),))]),
    # G14
    ({"role": "tool", "tool_call_id": "c", "content": ""}, [pg.ToolResult("c")]),
    ({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "see"}, {
        "type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]},
     [pg.ToolResult("c", (pg.Text("see"), pg.Image("image/png", PNG)))]),
], ids=["string", "parts and name", "data URL", "bare URL", "data URL not base64", "file", "file without a scheme",
        "null",
        "absent", "call", "refusal part", "refusal", "nulls", "reasoning_content", "reasoning", "empty arguments",
        "no arguments", "object arguments", "array arguments", "custom call", "result", "empty result",
        "result with image"])
def test_chat_messages(message: Dict[str, Any], expected: List[Any]) -> None:
    assert parts_of(message) == expected


def test_chat_results_of_one_turn_are_one_message() -> None:
    request = chat_request(messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [
            CALL, {**CALL, "id": "c2"}]}, {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"}])
    assert [message.role for message in request.messages] == ["user", "assistant", "tool"]


def test_chat_legacy_function_call_and_result_are_paired() -> None:
    turn = [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "ok"}]
    request = chat_request(messages=[{"role": "user", "content": "x"}, *turn, *turn])
    assert pg.is_paired(request.messages)
    ids = [part.id for message in request.messages for part in message.parts if isinstance(part, pg.ToolCall)]
    assert len(set(ids)) == 2


def message_at(**message: Any) -> Dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, message]}


def image_at(url: Any) -> Dict[str, Any]:
    return message_at(role="user", content=[{"type": "text", "text": "x"},
                                            {"type": "image_url", "image_url": {"url": url}}])


URL_AT = "messages[1].content[1].image_url.url"


@pytest.mark.parametrize("fields, param, code", [
    ({"model": None}, "model", "missing_required_parameter"), ({"model": 5}, "model", "invalid_type"),
    ({"messages": None}, "messages", "missing_required_parameter"), ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "Hi"}, "messages", "invalid_type"), ({"messages": ["Hi"]}, "messages[0]", "invalid_type"),
    (message_at(content="x"), "messages[1].role", "missing_required_parameter"),
    (message_at(role="wizard", content="x"), "messages[1].role", "invalid_value"),
    (message_at(role="user"), "messages[1].content", "missing_required_parameter"),
    (message_at(role="user", content=5), "messages[1].content", "invalid_type"),
    (message_at(role="user", content=[{"text": "x"}]), "messages[1].content[0].type", "missing_required_parameter"),
    (message_at(role="user", content=[{"type": "text", "text": 5}]), "messages[1].content[0].text", "invalid_type"),
    (message_at(role="user", content=[{"type": "image_url"}]), "messages[1].content[0].image_url",
     "missing_required_parameter"),
    (image_at("ftp://x/y"), URL_AT, "invalid_value"), (image_at("data:image/png;base64"), URL_AT, "invalid_value"),
    (image_at("data:image/png;base64,@@@"), URL_AT, "invalid_value"),
    (image_at("data:image/png;base64,"), URL_AT, "invalid_value"),
    (image_at("data:text/html;base64,QUJD"), URL_AT, "invalid_value"), (image_at("https://["), URL_AT, "invalid_value"),
    (message_at(role="tool", content="x"), "messages[1].tool_call_id", "missing_required_parameter"),
    (message_at(role="function", content="x"), "messages[1].name", "missing_required_parameter"),
    (message_at(role="assistant", tool_calls=[{"function": {"name": "f"}}]), "messages[1].tool_calls[0].id",
     "missing_required_parameter"),
    (message_at(role="assistant", tool_calls=[{"id": "c"}]), "messages[1].tool_calls[0].function",
     "missing_required_parameter"),
    (message_at(role="assistant", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": 5}}]),
     "messages[1].tool_calls[0].function.arguments", "invalid_type"),
    (message_at(role="assistant", reasoning_details=5), "messages[1].reasoning_details", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"), ({"stream": 1}, "stream", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"), ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"), ({"max_completion_tokens": -1}, "max_completion_tokens",
                                                          "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"), ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": 1.1}, "top_p", "invalid_value"), ({"top_p": True}, "top_p", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"), ({"n": 129}, "n", "invalid_value"),
    ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
    ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"), ({"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    ({"stream_options": True}, "stream_options", "invalid_type"),
    ({"reasoning_effort": 5}, "reasoning_effort", "invalid_type"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema",
     "invalid_type"),
    ({"tools": {}}, "tools", "invalid_type"), ({"tools": [5]}, "tools[0]", "invalid_type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters",
     "invalid_type"),
    ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"), ({"tool_choice": 5}, "tool_choice", "invalid_type"),
    ({"tool_choice": {"type": "x"}}, "tool_choice.type", "invalid_value"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice.function.name", "invalid_value"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": 5}}}, "tool_choice.allowed_tools.tools",
     "invalid_type"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"type": []}]}}, "tools": [BARE]},
     "tool_choice.allowed_tools.tools[0].type", "invalid_type"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"type": "function", "function": "now"}]}}},
     "tool_choice.allowed_tools.tools[0].function", "invalid_type"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": []}]}}, "tools": [BARE]},
     "tool_choice.allowed_tools.tools[0].name", "invalid_type"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_chat_names_the_field_at_fault(fields: Dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        chat_request(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.message.startswith(param + ":")


B64 = {"type": "base64", "media_type": "image/png", "data": PNG}
AWX = {"name": "wx", "description": "Weather",
       "input_schema": WEATHER["function"]["parameters"]}   # type: ignore[index]


@pytest.mark.parametrize("fields, expected", [
    ({}, {"max_tokens": 100, "system": (), "stream": False, "tool_choice": None, "extra": {}, "reasoning": None}),
    (dict.fromkeys(["system", "tools", "tool_choice", "thinking", "output_config", "temperature", "top_p", "top_k",
                    "stop_sequences", "stream", "metadata", "service_tier", "cache_control", "container", "mcp_servers",
                    "context_management", "thread"]), {"extra": {}, "refused": (), "stream": False}),
    ({"system": "S"}, {"system": (pg.Text("S"),)}),
    ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]},
     {"system": (pg.Text("a"), pg.Text("b")), "lost": ("cache_control",)}),
    # R8
    ({"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["x"], "stream": True},
     {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop": ("x",), "stream": True}),
    ({"metadata": {"user_id": "u"}}, {"user": "u"}),
    ({"tools": [AWX]}, {"tools": (pg.Tool("wx", "Weather", AWX["input_schema"]),)}), ({"tools": []}, {"tools": ()}),
    ({"tools": [{**AWX, "type": "custom", "strict": True, "defer_loading": True, "eager_input_streaming": True}]},
     {"tools": (WX,)}),
    # R9
    ({"tools": [AWX, {"type": "web_search_20260318", "name": "web_search"}]},
     {"tools": (pg.Tool("wx", "Weather", AWX["input_schema"]),), "lost": ("tools[1]",), "refused": ()}),
    # R7
    ({"tool_choice": {"type": "auto"}}, {"tool_choice": pg.ToolChoice("auto"), "parallel_tools": None}),
    ({"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
     {"tool_choice": pg.ToolChoice("required"), "parallel_tools": False}),
    ({"tool_choice": {"type": "tool", "name": "wx"}, "tools": [AWX]}, {"tool_choice": pg.ToolChoice("tool", "wx")}),
    ({"tool_choice": {"type": "none"}}, {"tool_choice": pg.ToolChoice("none")}),
    # R30
    ({"thinking": {"type": "disabled"}}, {"reasoning": pg.Reasoning("off")}),
    # R32
    ({"thinking": {"type": "enabled", "budget_tokens": 16000}}, {"reasoning": pg.Reasoning("high", 16000)}),
    # R33
    ({"thinking": {"type": "adaptive", "display": "updates"}}, {"reasoning": pg.Reasoning("high")}),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, {"reasoning": pg.Reasoning("max")}),
    ({"thinking": {"type": "between_tools"}}, {"reasoning": pg.Reasoning("low")}),
    ({"output_config": {"effort": "low"}}, {"reasoning": pg.Reasoning("low")}),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
     {"output": pg.OutputFormat({"type": "object"}, strict=True)}),
    ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, {"lost": ("output_config.task_budget",)}),
    ({"context_management": {"edits": [{"type": "x"}]}, "made_up": 1}, {"extra": {"context_management": {
        "edits": [{"type": "x"}]}, "made_up": 1}, "refused": ()}),
], ids=lambda value: ",".join(value)[:40] if isinstance(value, dict) else None)
def test_messages_fields(fields: Dict[str, Any], expected: Dict[str, Any]) -> None:
    request = messages_request(**fields)
    assert {name: getattr(request, name) for name in expected} == expected


def blocks_of(*blocks: Any, role: str = "user") -> List[Any]:
    request = messages_request(messages=[{"role": role, "content": list(blocks)}])
    return [part for turn in request.messages for part in turn.parts]


@pytest.mark.parametrize("block, expected", [
    ({"type": "text", "text": "x", "citations": [{}], "cache_control": {"type": "ephemeral"}}, [pg.Text("x")]),
    ({"type": "image", "source": B64}, [pg.Image("image/png", PNG)]),
    # G12
    ({"type": "image", "source": {"type": "url", "url": "https://h/x.png"}}, [pg.Image(url="https://h/x.png")]),
    ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "QUJD"}, "title": "T"},
     [pg.Document("application/pdf", "QUJD", name="T")]),
    ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"}, "title": "T",
      "context": "C"},
     [pg.Text("T"), pg.Text("C"), pg.Text("D")]),
    ({"type": "document", "source": {"type": "url", "url": "https://h/x.pdf"}}, [pg.Document(url="https://h/x.pdf")]),
    ({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "in"}]}}, [pg.Text("in")]),
    ({"type": "search_result", "source": "https://h", "title": "T", "content": [{"type": "text", "text": "found"}]},
     [pg.Text("T https://h"), pg.Text("found")]),
    # R14
    ({"type": "tool_use", "id": "t", "name": "f", "input": {"n": 9007199254740993, "f": 1.0, "z": "é"}},
     [pg.ToolCall("t", "f", '{"n":9007199254740993,"f":1.0,"z":"é"}')]),
    ({"type": "tool_result", "tool_use_id": "t"}, [pg.ToolResult("t")]),
    ({"type": "tool_result", "tool_use_id": "t", "content": "x", "is_error": True},
     [pg.ToolResult("t", (pg.Text("x"),), True)]),
    ({"type": "tool_result", "tool_use_id": "t", "content": [
        {"type": "text", "text": "a"}, {"type": "image", "source": B64}, {"type": "tool_reference", "tool_name": "g"}]},
     [pg.ToolResult("t", (pg.Text("a"), pg.Image("image/png", PNG), pg.Text("The tool g is now available.")))]),
    ({"type": "thinking", "thinking": "why", "signature": "c2ln"},
     # R4
     [pg.Thinking("why", "c2ln", False, "anthropic-messages")]),
    # R5
    ({"type": "redacted_thinking", "data": "RU5D"}, [pg.Thinking("", "RU5D", True, "anthropic-messages")]),
    ({"type": "thinking", "thinking": "why", "signature": ""}, [pg.Thinking("why")]),
    ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, []),
    ({"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, []), ({"type": "fallback"}, []),
    ({"type": "compaction", "content": "so far"}, [pg.Text("so far")]),
    ({"type": "compaction", "encrypted_content": "x"}, []),
    ({"type": "container_upload", "file_id": "f"}, []), ({"type": "mcp_tool_result", "tool_use_id": "s"}, []),
], ids=lambda value: value["type"] if isinstance(value, dict) else None)
def test_messages_blocks(block: Dict[str, Any], expected: List[Any]) -> None:
    assert blocks_of(block) == expected


def test_messages_system_turns_are_kept() -> None:
    # Claude Code 2.1 puts turns with role system into messages, also as the last one
    request = messages_request(messages=[{"role": "user", "content": "Hi"}, {"role": "system", "content": "env"}])
    assert short(request.messages) == "user:Hi system:env"
    assert built(request, model(), MESSAGES)[0]["messages"] == [
        {"role": "system", "content": "env"}, {"role": "user", "content": "Hi"}]


def block_at(**block: Any) -> Dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, block]}]}


@pytest.mark.parametrize("fields, param", [
    # R44
    ({"max_tokens": None}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
    ({"model": None}, "model"), ({"messages": None}, "messages"), ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": 5}]},
                                                               "messages[0].content"),
    ({"messages": [5]}, "messages[0]"), ({"system": 5}, "system"), ({"system": [{"type": "text"}]}, "system[0].text"),
    (block_at(text="x"), "messages[0].content[1].type"), (block_at(type="text"), "messages[0].content[1].text"),
    (block_at(type="image"), "messages[0].content[1].source"), (block_at(type="image", source={"type": "base64"}),
                                                               "messages[0].content[1].source.media_type"),
    (block_at(type="image", source={**B64, "data": "@@"}), "messages[0].content[1].source.data"),
    (block_at(type="image", source={"type": "url", "url": "file:///etc/passwd"}), "messages[0].content[1].source.url"),
    (block_at(type="tool_use", name="f", input={}), "messages[0].content[1].id"),
    (block_at(type="tool_use", id="t", name="f", input="{}"), "messages[0].content[1].input"),
    (block_at(type="tool_result"), "messages[0].content[1].tool_use_id"),
    (block_at(type="tool_result", tool_use_id="t", content=[{"type": "text", "text": 5}]),
     "messages[0].content[1].content[0].text"),
    (block_at(type="thinking", signature="x"), "messages[0].content[1].thinking"),
    (block_at(type="redacted_thinking"), "messages[0].content[1].data"),
    ({"thinking": {}}, "thinking.type"), ({"thinking": {"type": "x"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"output_config": {"effort": 5}}, "output_config.effort"), ({"output_config": {"format": {"type": "xml"}}},
                                                                  "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"), ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tool_choice": {"type": "x"}}, "tool_choice.type"), ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": "auto"}, "tool_choice"), ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": ["x", 5]}, "stop_sequences[1]"), ({"temperature": 3}, "temperature"), ({"top_p": 2}, "top_p"),
    ({"top_p": True}, "top_p"), ({"top_k": -1}, "top_k"), ({"stream": "yes"}, "stream"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_messages_names_the_field_at_fault(fields: Dict[str, Any], param: str) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        messages_request(**fields)
    assert caught.value.param == param and caught.value.message.startswith(param + ":")


def test_threads_are_refused_by_the_code_that_sdks_fall_back_on() -> None:
    with pytest.raises(pg.BadRequest) as caught:
        messages_request(thread={"type": "create"})
    status, body = MESSAGES.render_error(caught.value, "req_1")
    assert status == 400 and body["error"]["details"] == {"error_code": "thread_unsupported_request"}


def test_count_tokens_needs_no_max_tokens() -> None:
    assert MESSAGES.parse_prompt({"model": "m", "messages": [{"role": "user", "content": "x"}]}).max_tokens is None


# --- Random bodies ----------------------------------------------------------------------------------------------------

CHAT_SEED: Dict[str, Any] = {
    "model": "p/m1", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "temperature": 1,
    "top_p": 0.5,
    "stop": ["a"], "n": 1, "reasoning": {"effort": "low", "max_tokens": 5, "enabled": True}, "reasoning_effort": "low",
    "thinking": {"type": "enabled", "budget_tokens": 5}, "enable_thinking": True, "user": "u", "metadata": {"a": "b"},
    "logit_bias": {"1": 1}, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    "tools": [WEATHER, {"type": "custom", "custom": {"name": "sh", "format": {"type": "grammar", "grammar": {
        "syntax": "lark", "definition": "x"}}}}], "functions": [{"name": "old", "parameters": {}}],
        "function_call": "auto",
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "wx"}}]}},
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "S"}]}, {"role": "user", "name": "b", "content": [
            {"type": "text", "text": "x"}, {"type": "image_url",
                                            "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
            {"type": "file", "file": {"file_data": "QUJD", "filename": "f"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning_content": "r",
         "refusal": "n",
         "reasoning_details": [{"type": "reasoning.text", "text": "t", "signature": "pigw1.W10="}],
         "audio": {"id": "a"},
         "tool_calls": [CALL, {"id": "c2", "type": "custom", "custom": {"name": "sh", "input": "i"}}],
         "function_call": {"name": "old", "arguments": "{}"}},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
        {"role": "function", "name": "old", "content": "x"}]}
MESSAGES_SEED: Dict[str, Any] = {
    "model": "p/m1", "max_tokens": 5, "stream": True, "temperature": 1, "top_p": 1, "top_k": 5, "stop_sequences": ["a"],
    "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}], "metadata": {"user_id": "u"},
    "thinking": {"type": "enabled", "budget_tokens": 2000}, "service_tier": "auto", "betas": [], "container": "c",
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}, "task_budget": {}},
    "output_format": {"type": "json_schema", "schema": {}}, "mcp_servers": [{}], "context_management": {"edits": []},
    "tools": [AWX, {"type": "web_search_20260318", "name": "w"}, {"type": "bash_20250124", "name": "bash"}],
    "tool_choice": {"type": "tool", "name": "wx", "disable_parallel_tool_use": True},
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}, {"type": "image", "source": B64},
                                     {"type": "document", "source": {"type": "content",
                                                                     "content": [{"type": "text", "text": "x"}]},
                                      "title": "t", "context": "c"},
                                     {"type": "search_result", "source": "s", "title": "t", "content": [
                                         {"type": "text", "text": "x"}]}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "pigw1.W10="},
                                          {"type": "redacted_thinking", "data": "RA=="},
                                          {"type": "server_tool_use", "id": "s"},
                                          {"type": "tool_use", "id": "t", "name": "wx", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [
            {"type": "tool_reference", "tool_name": "g"}, {"type": "image",
                                                           "source": {"type": "url", "url": "https://h"}}]}]},
        {"role": "system", "content": [{"type": "compaction", "content": "x"}]}]}
JUNK: List[Any] = [None, True, False, 0, -1, 5, 1.5, 10 ** 30, "", "x", "auto", "enabled", "function", "tool_use",
                   "data:", "\ud800",
                   [], {}, [1], ["x"], [[]], [{}], {"type": "text"}, {"type": 5}, {"type": []}, {"type": {}},
                   {"type": "function"},
                   {"name": []}, {"a": {"b": [None]}}, [None]]


def places(value: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(body: Any, path: Tuple[Any, ...], rng: random.Random) -> Any:
    """A copy with the place at `path` replaced by junk, dropped, doubled or given an unknown neighbour."""
    if not path:
        return rng.choice(JUNK)
    copy: Any = dict(body) if isinstance(body, dict) else list(body)
    action = rng.random() if len(path) == 1 else 1
    if action < 0.1:
        del copy[path[0]]
    elif action < 0.15 and isinstance(copy, list):
        copy.append(copy[path[0]])
    elif action < 0.2 and isinstance(copy, dict):
        copy[rng.choice(["type", "name", "content", "unknown"])] = rng.choice(JUNK)
    else:
        copy[path[0]] = mutate(copy[path[0]], path[1:], rng)
    return copy


@pytest.mark.parametrize("client, seed", [(CHAT, CHAT_SEED), (MESSAGES, MESSAGES_SEED)], ids=["chat", "messages"])
def test_any_body_is_parsed_or_refused_with_a_reason(client: Any, seed: Dict[str, Any]) -> None:
    assert client.parse(seed)
    rng = random.Random(20261122)
    faults: Dict[str, Any] = {}
    for _ in range(3000):
        body = seed
        for _ in range(rng.randint(1, 3)):
            body = mutate(body, rng.choice(list(places(body)) or [("model",)]), rng)
        try:
            assert isinstance(client.parse(body), pg.Request)
        except pg.BadRequest as error:
            assert error.param is not None and error.code and error.message
        except Exception as error:      # any other kind would be a 500
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            faults[f"{type(error).__name__}: {error} in {frame.tb_frame.f_code.co_name if frame else ''}"] = body
    assert not faults, list(faults)


# --- What a client would read -----------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What a client makes of an answer: the parts that both protocols can show."""

    text: str = ""
    thinking: str = ""
    calls: Tuple[Tuple[str, str, str], ...] = ()        # id, name, arguments
    stop: str = ""
    usage: Any = None
    error: Any = None
    signatures: Tuple[str, ...] = ()


HARD_TO_READ = ("\u2028", "\u2029", "\u0085")
CHAT_STOPS = ("stop", "length", "tool_calls", "content_filter", "function_call")


def check_bytes(wire: bytes) -> str:
    """Rules for every stream: UTF-8, no line separators that split lines for some clients, no halves of pairs."""
    text = wire.decode("utf-8")
    assert not any(mark in text for mark in HARD_TO_READ)
    assert text.endswith("\n\n") and "\r" not in text
    assert not re.search(r"\\ud[89a-f]", re.sub(r"\\ud[89ab]..\\ud[c-f]..", "", text)), "half of a surrogate pair"
    return text


def check_chat_stream(wire: bytes, include_usage: bool = True) -> Read:
    """Asserts all rules of a Chat Completions stream and returns what a client accumulates."""
    frames = check_bytes(wire).split("\n\n")[:-1]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames), "no event names, one line each"
    payloads = [frame[len("data: "):] for frame in frames]
    assert "[DONE]" not in payloads[:-1]
    is_done = payloads[-1:] == ["[DONE]"]
    chunks = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    error = chunks.pop()["error"] if chunks and "error" in chunks[-1] else None
    assert is_done != (error is not None), "either [DONE] or an error, never both, never neither"
    text, thinking, stop, usage = "", "", "", None
    built_calls: List[Dict[str, str]] = []
    signatures: List[str] = []
    if error is not None:
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    for place, chunk in enumerate(chunks):
        assert "error" not in chunk and chunk["object"] == "chat.completion.chunk"
        assert all(chunk[name] == chunks[0][name] for name in ("id", "created", "model", "system_fingerprint"))
        assert chunk["id"].startswith("chatcmpl-") and isinstance(chunk["created"], int)
        assert ("usage" in chunk) is include_usage, "usage only when asked for, and then null in all but the last"
        if chunk.get("usage") is not None:
            assert chunk["choices"] == [] and place == len(chunks) - 1 and stop, "G57: usage rides in a last chunk"
            usage = chunk["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]         # G56
            continue
        choice, = chunk["choices"]
        assert choice["index"] == 0 and "finish_reason" in choice and not stop, "nothing after the finish reason"
        delta = choice["delta"]
        assert (delta.get("role") == "assistant") == (place == 0), "the role first and once"
        text += delta.get("content") or ""
        assert not ("reasoning" in delta and "reasoning_content" in delta), "one name for thinking"
        thinking += delta.get("reasoning_content") or ""
        signatures.extend(str(item.get("signature") or item.get("data")) for item in delta.get("reasoning_details") or ()
                          if item.get("signature") or item.get("data"))
        for call in delta.get("tool_calls") or ():
            inner = call.get("function") or call.get("custom") or {}
            if call["index"] == len(built_calls):
                assert call["id"] and call["type"] in ("function", "custom") and inner["name"]
                built_calls.append({"id": call["id"], "name": inner["name"], "arguments": ""})
            else:
                assert call["index"] < len(built_calls), "indices ascend without gaps"
                assert not {"id",
                            "type"} & set(call) and "name" not in inner, "accumulators would join repeated strings"
            built_calls[call["index"]]["arguments"] += inner.get("arguments", inner.get("input", ""))
        stop = choice["finish_reason"] or ""
        assert stop in CHAT_STOPS + ("",)
    assert error is not None or stop, "a finish reason, or an error"
    assert error is None or not stop, "no finish reason before an error"
    assert not is_done or not include_usage or usage is not None or chunks[-1]["choices"]
    ids = [call["id"] for call in built_calls]
    assert len(set(ids)) == len(ids) and all(call["arguments"] for call in built_calls if stop), 'no "" as arguments'
    return Read(text, thinking, tuple((call["id"], call["name"], call["arguments"]) for call in built_calls), stop,
                usage, error, tuple(signatures))


def check_messages_stream(wire: bytes) -> Read:
    """Asserts all rules of an Anthropic stream and returns what a client accumulates."""
    frames = check_bytes(wire).split("\n\n")[:-1]
    events = []
    for frame in frames:
        head, data = frame.split("\n", 1)
        event = json.loads(data[len("data: "):])
        assert head == f"event: {event['type']}" and data.startswith("data: "), "SDKs skip events without a name"
        if event["type"] != "ping":
            events.append(event)
    kinds = [event["type"] for event in events]
    error = events.pop()["error"] if kinds[-1:] == ["error"] else None
    if error is not None:
        assert error["type"] and error["message"] and "request_id" in json.loads(frames[-1].split("data: ", 1)[1])
        assert not {"message_delta", "message_stop"} & set(kinds), "no end beside an error"
    else:
        assert kinds[-2:] == ["message_delta", "message_stop"] and kinds.count("message_delta") == 1
    if not events:
        return Read(error=error)
    assert kinds[0] == "message_start" and kinds.count("message_start") == 1
    message = events[0]["message"]
    assert message["id"].startswith("msg_") and message["content"] == [] and message["stop_reason"] is None
    assert message["role"] == "assistant" and {"input_tokens", "output_tokens"} <= set(message["usage"])
    text, thinking, stop, usage, block = "", "", "", None, None
    got: List[Tuple[str, str, str]] = []
    signatures: List[str] = []
    count = 0
    for event in events[1:]:
        kind = event["type"]
        if kind == "content_block_start":
            assert block is None and event["index"] == count, "one block at a time, numbered without gaps"      # R43
            block, count, arguments, seals = event["content_block"], count + 1, "", 0
            assert block["type"] != "tool_use" or block["input"] == {}
            if block["type"] == "redacted_thinking":
                signatures.append(block["data"])
            length = len(text)
        elif kind == "content_block_delta":
            assert block is not None and event["index"] == count - 1
            delta = event["delta"]
            assert seals == 0, "the signature is the last delta"
            assert (block["type"], delta["type"]) in {("text", "text_delta"), ("thinking", "thinking_delta"),
                                                      ("thinking", "signature_delta"), ("tool_use", "input_json_delta")}
            text += delta.get("text", "")
            thinking += delta.get("thinking", "")
            arguments += delta.get("partial_json", "")
            if delta["type"] == "signature_delta":
                seals += 1
                signatures.append(delta["signature"])
        elif kind == "content_block_stop":
            assert block is not None and event["index"] == count - 1
            assert block["type"] != "text" or len(text) > length, "no empty text block"
            if block["type"] == "tool_use":
                got.append((block["id"], block["name"], arguments))
            block = None
        elif kind == "message_delta":
            assert block is None and "output_tokens" in event["usage"]
            stop, usage = event["delta"]["stop_reason"], event["usage"]
            assert stop in pg.MESSAGES_STOP.values() and "stop_sequence" in event["delta"]
    assert block is None or error is not None, "a block was left open"
    assert len({call_id for call_id, _, _ in got}) == len(got)
    return Read(text, thinking, tuple(got), stop, usage, error, tuple(signatures))


def read_of(reply: pg.Reply, client: Any) -> Read:
    """What a client of this protocol should read of a reply."""
    def arguments(part: pg.ToolCall) -> str:
        return part.arguments or ("{}" if client is CHAT else "")

    stops = pg.CHAT_FINISH if client is CHAT else pg.MESSAGES_STOP
    usage = pg.chat_usage if client is CHAT else pg.messages_usage
    return Read("".join(part.text for part in reply.parts if isinstance(part, pg.Text)),
                "".join(part.text for part in reply.parts if isinstance(part, pg.Thinking)),
                tuple((part.id, part.name, arguments(part)) for part in reply.parts if isinstance(part, pg.ToolCall)),
                stops[reply.stop_reason], usage(reply.usage), None,
                tuple(pg.seal(part, client.name) for part in reply.parts if isinstance(part,
                    pg.Thinking) and part.signature))


def read_body(body: Dict[str, Any], client: Any) -> Read:
    """What a client reads of a whole answer, in the same terms."""
    if client is CHAT:
        choice, = body["choices"]
        message = choice["message"]
        found = [(call["id"],
                  *((call["function"]["name"], call["function"]["arguments"]) if call["type"] == "function" else
                                (call["custom"]["name"],
                                 call["custom"]["input"]))) for call in message.get("tool_calls", ())]
        return Read(message["content"] or "", message.get("reasoning_content", ""), tuple(found),
                    choice["finish_reason"],
                    body["usage"], None, tuple(item.get("signature") or item["data"]
                                               for item in message.get("reasoning_details", ())))
    content = body["content"]
    return Read("".join(block["text"] for block in content if block["type"] == "text"),
                "".join(block["thinking"] for block in content if block["type"] == "thinking"),
                tuple((block["id"], block["name"], json.dumps(block["input"])) for block in content
                      if block["type"] == "tool_use"), body["stop_reason"], body["usage"], None,
                tuple(block.get("signature") or block.get("data") for block in content
                      if block.get("signature") or block.get("data")))


def loaded(read: Read) -> Read:
    """With arguments as values, so that spacing does not matter."""
    return read._replace(calls=tuple((call_id, name, json.loads(text or "{}")) for call_id, name, text in read.calls))


CHECKS: Dict[str, Callable[[bytes], Read]] = {CHAT.name: check_chat_stream, MESSAGES.name: check_messages_stream}
CLIENTS = pytest.mark.parametrize("client", [CHAT, MESSAGES], ids=["chat", "messages"])


def client_request(client: Any, **fields: Any) -> pg.Request:
    """A streaming request of this protocol."""
    if client is CHAT:
        return chat_request(stream=True, stream_options={"include_usage": True}, **fields)
    return messages_request(stream=True, **fields)


USAGE = pg.Usage(20, 9, 30, 4, 5)
SIGNED = pg.Thinking("Hm", "sig", maker="anthropic-messages")
TWO_CALLS = [pg.Start("x"), pg.PartStart(0, pg.ToolCall("a", "f")), pg.PartDelta(0, '{"n"'),
             pg.PartStart(1, pg.ToolCall("b", "g")),
             pg.PartDelta(1, '{"m":2}'), pg.PartDelta(0, ":1}"), pg.PartEnd(0, pg.ToolCall("a", "f", '{"n":1}')),
             pg.PartEnd(1, pg.ToolCall("b", "g", '{"m":2}')), pg.Done("tool_use", USAGE)]
RUNS: Dict[str, List[Any]] = {
    "text": [pg.Start("chatcmpl-1"), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "It "),
             pg.PartDelta(0, "is\u2028\u0085é😀"),
             pg.PartEnd(0, pg.Text("It is\u2028\u0085é😀")), pg.Done("stop", USAGE)],
    "nothing": [pg.Start(), pg.Done("stop", USAGE)],
    "empty text": [pg.Start(), pg.PartStart(0, pg.Text()), pg.PartEnd(0, pg.Text()), pg.Done("length", USAGE)],
    "two texts": [pg.Start(), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "a"), pg.PartEnd(0, pg.Text("a")),
                  pg.PartStart(1, pg.Text()), pg.PartDelta(1, "b"), pg.PartEnd(1, pg.Text("b")),
                  pg.Done("pause", USAGE)],
    "thinking": [pg.Start("msg_1"), pg.PartStart(0, pg.Thinking(maker="anthropic-messages")), pg.PartDelta(0, "Hm"),
                 pg.PartEnd(0, SIGNED), pg.PartStart(1, pg.Text()), pg.PartDelta(1, "ok"), pg.PartEnd(1, pg.Text("ok")),
                 pg.Done("stop_sequence", USAGE, "END")],
    "redacted": [pg.Start(), pg.PartStart(0, pg.Thinking("", "RU5D", True, "anthropic-messages")),
                 pg.PartEnd(0, pg.Thinking("", "RU5D", True, "anthropic-messages")),
                 pg.Done("refusal", USAGE, "Cannot.")],
    "two calls in turns": TWO_CALLS,
    "call without arguments": [pg.Start(), pg.PartStart(0, pg.ToolCall("a", "f")), pg.PartEnd(0, pg.ToolCall("a", "f")),
                               pg.Done("tool_use", USAGE)],
    "text in the middle of a call": [                                                     # G2, R12
        pg.Start(), pg.PartStart(0, pg.ToolCall("a", "f")), pg.PartDelta(0, '{"n"'), pg.PartStart(1, pg.Text()),
        pg.PartDelta(1, "by the way"), pg.PartEnd(1, pg.Text("by the way")), pg.PartDelta(0, ":1}"),
        pg.PartEnd(0, pg.ToolCall("a", "f", '{"n":1}')), pg.Done("tool_use", USAGE)],
    "overflow": [pg.Start(), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "a"), pg.PartEnd(0, pg.Text("a")),
                 pg.Done("overflow", USAGE)],
    "failed": [pg.Start(), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "Par"), pg.Failed(pg.Overloaded("busy"))],
}


@CLIENTS
@pytest.mark.parametrize("name", RUNS)
def test_a_stream_keeps_the_contract_and_reads_as_the_whole_answer(client: Any, name: str) -> None:
    events, request = RUNS[name], client_request(client)
    writer = client.writer(request, STAMP)
    read = CHECKS[client.name](b"".join(writer.write([event]) for event in events))
    at_once = client.writer(request, STAMP).write(events)
    assert CHECKS[client.name](at_once) == read
    if name == "failed":
        assert read.text == "Par" and read.error["message"] == "busy"
        return
    reply = pg.collect(events)
    expected = read_of(reply, client)
    assert read._replace(calls=()) == expected._replace(calls=()) and set(read.calls) == set(expected.calls)
    body = client.render(request, reply, STAMP)
    assert loaded(read_body(body,
                            client)) == loaded(expected)                          # G18, G19: stream and whole agree
    json.dumps(body, allow_nan=False)


def test_chat_writer_bytes() -> None:
    envelope = ('data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"p/m1",'
                '"system_fingerprint":"fp_pigateway",')
    tail = ',"logprobs":null,"finish_reason":null}]}\n\n'
    wire = CHAT.writer(chat_request(stream=True), STAMP).write(RUNS["text"])
    head = envelope + '"choices":[{"index":0,"delta":'
    assert wire.decode("ascii") == (
        head + '{"role":"assistant","content":""}' + tail + head + '{"content":"It "}' + tail
        + head + '{"content":"is\\u2028\\u0085\\u00e9\\ud83d\\ude00"}' + tail
        + head + '{},"logprobs":null,"finish_reason":"stop"}]}\n\n' + "data: [DONE]\n\n")
    assert check_chat_stream(wire, include_usage=False).usage is None


def test_messages_writer_bytes() -> None:
    wire = MESSAGES.writer(messages_request(stream=True), STAMP).write(RUNS["thinking"])
    usage = '{"input_tokens":20,"cache_creation_input_tokens":4,"cache_read_input_tokens":30,"output_tokens":9,' \
            '"output_tokens_details":{"thinking_tokens":5}}'
    lines = [line[len("data: "):] for line in wire.decode("ascii").split("\n") if line.startswith("data: ")]
    assert lines[1:] == [
        '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"sig"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"ok"}}',
        '{"type":"content_block_stop","index":1}',
        '{"type":"message_delta","delta":{"stop_reason":"stop_sequence","stop_sequence":"END"},"usage":%s}' % usage,
        '{"type":"message_stop"}']
    assert json.loads(lines[0])["message"]["id"] == "msg_1" and json.loads(lines[0])["message"]["model"] == "p/m1"


def test_chat_completion_object() -> None:
    reply = pg.Reply("gen-1", (SIGNED, pg.Text("a"), pg.Text("b"), pg.ToolCall("c", "wx", '{"n":9007199254740993}')),
                     "tool_use", USAGE)
    assert CHAT.render(chat_request(), reply, STAMP) == {
        "id": "chatcmpl-" + STAMP.id, "object": "chat.completion", "created": STAMP.created, "model": "p/m1",
        "system_fingerprint": "fp_pigateway", "choices": [{
            "index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {
                "role": "assistant", "content": "ab", "refusal": None, "annotations": [], "reasoning_content": "Hm",
                "reasoning_details": [{"type": "reasoning.text", "text": "Hm",
                                       "signature": pg.seal(SIGNED, CHAT.name)}],
                "tool_calls": [{"id": "c", "type": "function", "function": {
                    "name": "wx", "arguments": '{"n":9007199254740993}'}}]}}],
        "usage": {"prompt_tokens": 54, "completion_tokens": 9, "total_tokens": 63,
                  "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 4, "audio_tokens": 0},
                  "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 0,
                                                "accepted_prediction_tokens": 0,
                                                "rejected_prediction_tokens": 0}}}


def test_chat_content_is_null_only_beside_calls() -> None:
    empty = CHAT.render(chat_request(), pg.Reply("", (), "stop", USAGE), STAMP)["choices"][0]["message"]
    assert empty["content"] == "" and "tool_calls" not in empty
    called = pg.Reply("", (pg.ToolCall("c", "f"),), "tool_use", USAGE)
    message = CHAT.render(chat_request(), called, STAMP)["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == "{}"
    refused = CHAT.render(chat_request(), pg.collect(RUNS["redacted"]), STAMP)["choices"][0]
    assert refused["message"]["refusal"] == "Cannot." and refused["finish_reason"] == "content_filter"      # G55
    assert "[Reasoning redacted]" not in json.dumps(refused)                                                # G18


def test_message_object() -> None:
    reply = pg.Reply("x", (SIGNED, pg.Text(""), pg.Text("a"), pg.ToolCall("c", "wx", '{"n":9007199254740993,"f":1.0}')),
                     "tool_use", USAGE)
    body = MESSAGES.render(messages_request(), reply, STAMP)
    assert body == {
        "id": "msg_" + STAMP.id, "type": "message", "role": "assistant", "model": "p/m1", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "sig"}, {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "c", "name": "wx", "input": {"n": 9007199254740993, "f": 1.0}}],
        "stop_reason": "tool_use", "stop_sequence": None, "usage": {
            "input_tokens": 20, "cache_creation_input_tokens": 4, "cache_read_input_tokens": 30, "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 5}}}
    refused = MESSAGES.render(messages_request(), pg.collect(RUNS["redacted"]), STAMP)
    assert refused["stop_reason"] == "refusal" and refused["stop_details"]["explanation"] == "Cannot."
    assert refused["content"] == [{"type": "redacted_thinking", "data": "RU5D"}]                             # R5


def test_a_malformed_call_is_shown_and_not_made_up() -> None:
    # G11, R13: cut arguments are neither completed nor replaced by {}
    reply = pg.Reply("", (pg.ToolCall("c", "wx", '{"city":"Par'),), "length", USAGE)
    call = CHAT.render(chat_request(), reply, STAMP)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["arguments"] == '{"city":"Par'
    body = MESSAGES.render(messages_request(), reply, STAMP)
    assert [block["type"] for block in body["content"]] == ["text"] and '{"city":"Par' in body["content"][0]["text"]
    used = MESSAGES.render(messages_request(), pg.replace(reply, stop_reason="tool_use"), STAMP)
    assert used["stop_reason"] == "end_turn"


def test_custom_tools_come_back_as_free_text() -> None:
    request = client_request(CHAT, tools=[{"type": "custom", "custom": {"name": "sh"}}, BARE])
    whole = pg.ToolCall("c", "sh", '{"input": "ls\\n"}')
    events = [pg.Start(), pg.PartStart(0, pg.ToolCall("c", "sh")), pg.PartDelta(0, '{"input":'),
              pg.PartDelta(0, ' "ls\\n"}'),
              pg.PartEnd(0, whole), pg.PartStart(1, pg.ToolCall("d", "now")), pg.PartEnd(1, pg.ToolCall("d", "now")),
              pg.Done("tool_use", USAGE)]
    wire = CHAT.writer(request, STAMP).write(events)
    assert check_chat_stream(wire).calls == (("c", "sh", "ls\n"), ("d", "now", "{}"))
    assert b'"type":"custom","custom":{"name":"sh","input":"ls\\n"}' in wire
    message = CHAT.render(request, pg.collect(events), STAMP)["choices"][0]["message"]
    assert message["tool_calls"][0] == {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls\n"}}


def test_thinking_is_hidden_where_the_first_block_is_read_as_json() -> None:
    request = client_request(MESSAGES, output_config={"format": {"type": "json_schema", "schema": {}}})
    wire = MESSAGES.writer(request, STAMP).write(RUNS["thinking"])
    assert check_messages_stream(wire)[:2] == ("ok", "")
    assert MESSAGES.render(request, pg.collect(RUNS["thinking"]), STAMP)["content"] == [{"type": "text", "text": "ok"}]


def test_message_start_has_a_guess_at_the_prompt() -> None:
    # R16: clients show it before the provider has said anything
    wire = MESSAGES.writer(messages_request(stream=True), STAMP).write([pg.Start()])
    usage = json.loads(wire.decode().split("data: ")[1])["message"]["usage"]
    assert usage["input_tokens"] > 0 and usage["output_tokens"] == 0


# class → (Chat status, type, code), (Anthropic status, type); by C4, A1.8 and A2.6
ERRORS: List[Tuple[Any, Tuple[int, str, str], Tuple[int, str]]] = [
    (pg.GatewayError, (500, "server_error", "internal_error"), (500, "api_error")),
    (pg.BadRequest, (400, "invalid_request_error", "invalid_value"), (400, "invalid_request_error")),
    (pg.ContextOverflow, (400, "invalid_request_error", "context_length_exceeded"), (400, "invalid_request_error")),
    (pg.ModelNotFound, (404, "invalid_request_error", "model_not_found"), (404, "not_found_error")),
    (pg.RouteNotFound, (404, "invalid_request_error", "endpoint_not_found"), (404, "not_found_error")),
    (pg.MethodNotAllowed, (405, "invalid_request_error", "method_not_allowed"), (405, "invalid_request_error")),
    (pg.Conflict, (409, "invalid_request_error", "conflict"), (409, "conflict_error")),
    (pg.BodyTooLarge, (413, "invalid_request_error", "request_body_too_large"), (413, "request_too_large")),
    (pg.Unauthorized, (401, "authentication_error", "invalid_api_key"), (401, "authentication_error")),
    (pg.Forbidden, (403, "permission_error", "forbidden"), (403, "permission_error")),
    (pg.ShuttingDown, (503, "service_unavailable_error", "shutting_down"), (529, "overloaded_error")),
    (pg.UpstreamError, (502, "upstream_error", "provider_error"), (502, "api_error")),
    (pg.CredentialRefused, (502, "authentication_error", "upstream_auth_failed"), (502, "api_error")),
    (pg.RateLimited, (429, "rate_limit_error", "rate_limit_exceeded"), (429, "rate_limit_error")),
    (pg.QuotaExceeded, (429, "insufficient_quota", "insufficient_quota"), (402, "billing_error")),
    (pg.Overloaded, (503, "service_unavailable_error", "server_is_overloaded"), (529, "overloaded_error")),
    (pg.UpstreamTimeout, (504, "server_error", "upstream_timeout"), (504, "timeout_error")),
    (pg.UpstreamProtocolError, (502, "upstream_error", "stream_incomplete"), (502, "api_error")),
]


@pytest.mark.parametrize("kind, chat, messages", ERRORS, ids=[kind.__name__ for kind, _, _ in ERRORS])
def test_error_envelopes(kind: Any, chat: Any, messages: Any) -> None:
    error = kind("prompt is too long: it is \u2028 big", param="model")
    status, body = CHAT.render_error(error, "req_1")
    assert (status, body) == (chat[0], {"error": {"message": error.message, "type": chat[1], "param": "model",
                                                  "code": chat[2]}})
    status, body = MESSAGES.render_error(error, "req_1")
    assert (status, body) == (messages[0], {"type": "error", "request_id": "req_1", "error": {
        "type": messages[1], "message": error.message}})
    assert check_chat_stream(CHAT.error_event(error, "req_1")).error["type"] == chat[1]
    assert check_messages_stream(MESSAGES.error_event(error, "req_1")).error["type"] == messages[1]


def test_every_error_class_has_its_row() -> None:
    def below(kind: Any) -> List[Any]:
        return [kind] + [inner for child in kind.__subclasses__() for inner in below(child)]

    assert set(below(pg.GatewayError)) == {kind for kind, _, _ in ERRORS}


def test_overflow_is_worded_as_claude_code_expects() -> None:
    _, body = MESSAGES.render_error(pg.ContextOverflow("maximum context length is 8192 tokens"), "req_1")
    assert body["error"]["message"] == "prompt is too long: maximum context length is 8192 tokens"


@pytest.mark.parametrize("maker, client", [("anthropic-messages", CHAT), ("openai-completions", MESSAGES),
                                           ("anthropic-messages", MESSAGES), ("openai-completions", CHAT)])
def test_seals_open_to_the_same_bytes(maker: str, client: Any) -> None:
    for signature in ("c2ln", '[{"data":"QUJD\\n"}]', "é" * 300):
        sealed = pg.seal(pg.Thinking("t", signature, maker=maker), client.name)
        assert pg.unseal(sealed, client.name) == (signature, maker)
        assert (sealed == signature) == (maker == client.name) and "synthetic" not in sealed                # R4


@pytest.mark.parametrize("sealed", ["pigw1.", "pigw1.@@@", "pigw1.W10=", "pigw1.NQ==", "pigw1.WzEsMl0=", "pigw1.é"])
def test_a_broken_seal_is_no_signature(sealed: str) -> None:
    assert pg.unseal(sealed, "anthropic-messages") == (None, "")


def test_no_signature_is_no_seal() -> None:
    assert pg.seal(pg.Thinking("t"), "openai-chat") == "" and pg.unseal("", "x") == (None, "x")


# ======================================================================================================================
# §8 Upstream protocols
# ======================================================================================================================

# --- Transcripts ------------------------------------------------------------------------------------------------------
# D1 to D10 are those of the wire reference (hand-written, accepted by the OpenAI and Anthropic SDKs); the others are
# what the named hosts send, with ids and tokens removed.


def chunk(delta: Optional[Dict[str, Any]] = None, finish: Optional[str] = None, **fields: Any) -> Dict[str, Any]:
    """A chat.completion.chunk."""
    return {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1760000000, "model": "m1", "choices": [
        {"index": 0, "delta": delta or {}, "finish_reason": finish}], **fields}


def call_delta(index: Any = None, call_id: Any = None, name: Any = None, arguments: Any = None,
               **more: Any) -> Dict[str, Any]:
    """A chunk with one tool-call fragment, of the fields that are given."""
    call = pg.present(index=index, id=call_id, function=pg.present(name=name, arguments=arguments) or None, **more)
    return chunk({"tool_calls": [call]})


def block(index: int, content: Dict[str, Any], *deltas: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The events of one Anthropic content block."""
    return [{"type": "content_block_start", "index": index, "content_block": content},
            *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": index}]


def start(**usage: Any) -> Dict[str, Any]:
    return {"type": "message_start", "message": {
        "id": "msg_x", "type": "message", "role": "assistant", "model": "claude-m", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": 8, "output_tokens": 0, **usage}}}


def ending(stop_reason: str = "end_turn", **more: Any) -> List[Dict[str, Any]]:
    return [{"type": "message_delta", "delta": {"stop_reason": stop_reason, "stop_sequence": None, **more},
             "usage": {"output_tokens": 2}}, {"type": "message_stop"}]


def text_delta(text: str) -> Dict[str, Any]:
    return {"type": "text_delta", "text": text}


def json_delta(text: str) -> Dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": text}


STOP = [chunk({}, "stop")]
TOOL_STOP = [chunk({}, "tool_calls")]
CHAT_REASONING = b": heartbeat\n\n" + sse([                                                                 # D1
    chunk({"role": "assistant", "content": ""}), chunk({"reasoning_content": "Two plus "}),
                                           chunk({"reasoning_content": "two."}),
    chunk({"content": "It is "}), chunk({"content": "4."}), *STOP,
    {**chunk(), "choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 9, "total_tokens": 59,
                                         "prompt_tokens_details": {
        "cached_tokens": 30}, "completion_tokens_details": {"reasoning_tokens": 5}}}], end="[DONE]")
CHAT_TWO_CALLS = sse([                                                                                       # D2
    call_delta(0, "call_A", "wx", "", type="function"), call_delta(0, arguments='{"city":'),
                      call_delta(1, "call_B", "now", "{}"),
    call_delta(0, arguments='"Rome"}'), *TOOL_STOP], end="[DONE]")
OPENROUTER_DETAILS = b": OPENROUTER PROCESSING\n\n" + sse([                                                  # D3
    chunk({"role": "assistant", "content": "", "reasoning": "Hmm", "reasoning_details": [
        {"type": "reasoning.text", "text": "Hmm", "format": "x-v1", "index": 0}]}),
    chunk({"content": "", "reasoning_details": [{"type": "reasoning.encrypted", "data": "QUJD", "id": "rs_1",
                                                 "index": 1}]}),
    chunk({"content": "ok"})])
OPENROUTER_ERROR = OPENROUTER_DETAILS + sse([{"id": "gen-d3", "error": {                                      # D3
    "code": 502, "message": "Provider returned error", "metadata": {"raw": "overloaded"}},
    "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}])
DETAILS = '[{"type":"reasoning.text","text":"Hmm","format":"x-v1","index":0},' \
          '{"type":"reasoning.encrypted","data":"QUJD","id":"rs_1","index":1}]'
ANTHROPIC_TOOLS = sse([                                                                                      # D8
    start(input_tokens=12, cache_creation_input_tokens=100, cache_read_input_tokens=900,
          cache_creation={"ephemeral_5m_input_tokens": 60, "ephemeral_1h_input_tokens": 40}, output_tokens=1),
    *block(0, {"type": "thinking", "thinking": "", "signature": ""},
           {"type": "thinking_delta", "thinking": "Look it up."},
           {"type": "signature_delta", "signature": "c2ln"}), {"type": "ping"},
    *block(1, {"type": "text", "text": ""}, text_delta("Checking.")),
    *block(2, {"type": "tool_use", "id": "toolu_d8", "name": "wx", "input": {}}, json_delta(""),
           json_delta('{"city": "Ro'),
           json_delta('me"}')),
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
     "usage": {"output_tokens": 33, "output_tokens_details": {"thinking_tokens": 9}}}, {"type": "message_stop"}],
                      named=True)
ANTHROPIC_REFUSAL = sse([start(), *block(0, {"type": "redacted_thinking", "data": "RU5D"}),
                         *ending("refusal", stop_details={  # D9
    "type": "refusal", "category": "cyber", "explanation": "Cannot help with that."})], named=True)
ANTHROPIC_ERROR = sse([start(), *block(0, {"type": "text", "text": ""}, text_delta("Par"))[:-1],               # D10
                       {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}], named=True)

OLD = "openai-completions"
NO_USAGE = pg.Usage()
COUNTED = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def whole_call(call_id: str, name: str, arguments: str) -> pg.ToolCall:
    return pg.ToolCall(call_id, name, arguments)


# name → (protocol, wire, parts, stop reason, usage, detail)
TRANSCRIPTS: Dict[str, Tuple[Any, bytes, List[Any], str, pg.Usage, Optional[str]]] = {
    "D1 reasoning": (COMPLETIONS, CHAT_REASONING, [pg.Thinking("Two plus two.", maker=OLD), pg.Text("It is 4.")],
                     "stop",
                     pg.Usage(20, 9, 30, 0, 5), None),
    "D2 interleaved calls": (COMPLETIONS, CHAT_TWO_CALLS, [whole_call("call_A", "wx", '{"city":"Rome"}'),
                                                           whole_call("call_B", "now", "{}")], "tool_use", NO_USAGE,
                             None),
    "D3 OpenRouter details": (COMPLETIONS, OPENROUTER_DETAILS + sse(STOP, end="[DONE]"),
                              [pg.Thinking("Hmm", DETAILS, False, OLD), pg.Text("ok")], "stop", NO_USAGE, None),
    # DeepSeek, 2026: content null while it thinks, both fields in every delta
    "DeepSeek reasoning": (COMPLETIONS, sse([
        chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
        chunk({"content": None, "reasoning_content": "Let "}),
        chunk({"content": None, "reasoning_content": "me."}), chunk({"content": "4", "reasoning_content": None}),
        chunk({"content": "", "reasoning_content": None}, "stop", usage={
            "prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16, "prompt_cache_hit_tokens": 8,
            "prompt_cache_miss_tokens": 2,
            "completion_tokens_details": {"reasoning_tokens": 4}})], end="[DONE]"),
        [pg.Thinking("Let me.", maker=OLD), pg.Text("4")], "stop", pg.Usage(2, 6, 8, 0, 4), None),
    "Moonshot usage in the choice": (COMPLETIONS, sse([chunk({"role": "assistant", "content": "Hi"}), {
        **chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop",
                                "usage": {**COUNTED, "cached_tokens": 1}}]}],
        end="[DONE]"), [pg.Text("Hi")], "stop", pg.Usage(2, 2, 1), None),
    "no indices": (COMPLETIONS, sse([call_delta(None, "a", "f", '{"n":'), call_delta(None, None, None, "1}"),
                                     call_delta(None, "b", "g", "{}"), *TOOL_STOP], end="[DONE]"),
                   [whole_call("a", "f", '{"n":1}'), whole_call("b", "g", "{}")], "tool_use", NO_USAGE, None),
    "all calls numbered 0": (COMPLETIONS, sse([call_delta(0, "a", "f", '{"n":1}'), call_delta(0, "b", "g", '{"m":'),
                                               call_delta(0, None, None, "2}"), *TOOL_STOP], end="[DONE]"),
                             [whole_call("a", "f", '{"n":1}'), whole_call("b", "g", '{"m":2}')], "tool_use", NO_USAGE,
                             None),
    "late name": (COMPLETIONS, sse([call_delta(0, "a", None, '{"n"'), call_delta(0, None, "f", ":"),
                                    call_delta(0, None, None, "1}"),
                                    *TOOL_STOP], end="[DONE]"), [whole_call("a", "f", '{"n":1}')], "tool_use",
                  NO_USAGE, None),
    "late id": (COMPLETIONS, sse([call_delta(0, None, None, ""), call_delta(0, "a", "f", "{}"), *TOOL_STOP],
                                 end="[DONE]"),
                [whole_call("a", "f", "{}")], "tool_use", NO_USAGE, None),
    "id and name repeated": (COMPLETIONS, sse([call_delta(0, "a", "f", '{"n":'), call_delta(0, "a", "f", "1}"),
                                               *TOOL_STOP],
                                              end="[DONE]"), [whole_call("a", "f", '{"n":1}')], "tool_use", NO_USAGE,
                             None),
    # G20
    "one id twice": (COMPLETIONS, sse([call_delta(0, "a", "f", "{}"), call_delta(1, "a", "g", "{}"), *TOOL_STOP],
                                      end="[DONE]"), [whole_call("a", "f", "{}"), whole_call("a_1", "g", "{}")],
                     "tool_use",
                     NO_USAGE, None),
    "text before and inside a call": (COMPLETIONS,
                                      sse([                                                                     # G1, G2
        chunk({"content": "So: "}), call_delta(0, "a", "f", '{"n"'), chunk({"content": "hm"}),
                                           call_delta(0, None, None, ":1}"),
        *TOOL_STOP], end="[DONE]"), [pg.Text("So: "), whole_call("a", "f", '{"n":1}'), pg.Text("hm")], "tool_use",
                                      NO_USAGE, None),
    "stop beside a call": (COMPLETIONS, sse([call_delta(0, "a", "f", "{}"), *STOP], end="[DONE]"),
                           [whole_call("a", "f", "{}")],
                           "tool_use", NO_USAGE, None),
    # G11
    "cut by the limit": (COMPLETIONS, sse([call_delta(0, "a", "f", '{"n":'), chunk({}, "length")], end="[DONE]"),
                         [whole_call("a", "f", '{"n":')], "length", NO_USAGE, None),
    "finish, then usage": (COMPLETIONS, sse([chunk({"content": "Hi"}, "stop"),
                                             {**chunk(), "choices": [], "usage": COUNTED}],
                                            end="[DONE]"), [pg.Text("Hi")], "stop", pg.Usage(3, 2), None),
    "finish twice": (COMPLETIONS, sse([chunk({"content": "Hi"}, "length"), *STOP], end="[DONE]"), [pg.Text("Hi")],
                     "length",
                     NO_USAGE, None),
    "no [DONE]": (COMPLETIONS, sse([chunk({"content": "Hi"}), *STOP]), [pg.Text("Hi")], "stop", NO_USAGE, None),
    # G17
    "refusal": (COMPLETIONS, sse([chunk({"role": "assistant", "refusal": "I "}), chunk({"refusal": "won't."}), *STOP],
                                 end="[DONE]"), [pg.Text("I won't.")], "refusal", NO_USAGE, None),
    # G55
    "content filter": (COMPLETIONS, sse([chunk({"content": "Par"}), chunk({}, "content_filter")], end="[DONE]"),
                       [pg.Text("Par")], "refusal", NO_USAGE, None),
    "reasoning twice": (COMPLETIONS, sse([chunk({"reasoning": "Hm", "reasoning_content": "Hm"}),
                                          chunk({"content": "ok"}), *STOP],
                                         end="[DONE]"), [pg.Thinking("Hm", maker=OLD), pg.Text("ok")], "stop",
                        NO_USAGE, None),
    "content in parts": (COMPLETIONS, sse([chunk({"content": [{"type": "text", "text": "a"},
                                                              {"type": "text", "text": "b"}]}),
                                           *STOP], end="[DONE]"), [pg.Text("ab")], "stop", NO_USAGE, None),
    "pair split between deltas": (COMPLETIONS, sse([chunk({"content": "a\ud83d"}), chunk({"content": "\ude00b"}),
                                                    *STOP],
                                                   end="[DONE]"), [pg.Text("a😀b")], "stop", NO_USAGE, None),
    "lone half": (COMPLETIONS, sse([chunk({"content": "a\ud83d"}), chunk({"content": "b"}),
                                    chunk({"content": "\ude00é"}), *STOP],
                                   end="[DONE]"), [pg.Text("abé")], "stop", NO_USAGE, None),
    "CRLF": (COMPLETIONS, CHAT_REASONING.replace(b"\n", b"\r\n"),
             [pg.Thinking("Two plus two.", maker=OLD),                  # R17
                                                                   pg.Text("It is 4.")], "stop",
             pg.Usage(20, 9, 30, 0, 5), None),
    "separators": (COMPLETIONS,
                   'data: {"choices":[{"delta":{"content":"a\u2028\u2029\u0085漢"},"finish_reason":"stop"}]}\n\n'
                   .encode(), [pg.Text("a\u2028\u2029\u0085漢")], "stop", NO_USAGE, None),
    "D8 thinking, text, tool": (ANTHROPIC, ANTHROPIC_TOOLS, [
        pg.Thinking("Look it up.", "c2ln", False, "anthropic-messages"), pg.Text("Checking."),
        whole_call("toolu_d8", "wx", '{"city": "Rome"}')], "tool_use", pg.Usage(12, 33, 900, 100, 9, 40), None),
    "D9 redacted, refusal": (ANTHROPIC, ANTHROPIC_REFUSAL, [pg.Thinking("", "RU5D", True, "anthropic-messages")],
                             "refusal",
                             pg.Usage(8, 2), "Cannot help with that."),
    "server tools": (ANTHROPIC, sse([
        start(), *block(0, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                        json_delta('{"q":1}')),
        *block(1, {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}),
        *block(2, {"type": "text", "text": ""}, {"type": "citations_delta", "citation": {}}, text_delta("Found.")),
        *ending()],
        named=True), [pg.Text("Found.")], "stop", pg.Usage(8, 2), None),
    "input in the start": (ANTHROPIC, sse([start(), *block(0,
                                                           {"type": "tool_use", "id": "t", "name": "f",
                                                            "input": {"n": 1}}),
                                           *block(1, {"type": "tool_use", "id": "u", "name": "g", "input": {}}),
                                           *ending("tool_use")],
                                          named=True), [whole_call("t", "f", '{"n":1}'), whole_call("u", "g", "")],
                           "tool_use",
                           pg.Usage(8, 2), None),
    "unknown events": (ANTHROPIC, sse([{"type": "ping"}, start(), {"type": "news"},
                                       *block(0, {"type": "text", "text": ""},
                       {"type": "odd_delta"}, text_delta("Hi")), *ending("pause_turn")], named=True), [pg.Text("Hi")],
                       "pause",
                       pg.Usage(8, 2), None),
    "without event names": (ANTHROPIC, sse([start(), *block(0, {"type": "text", "text": "H"}, text_delta("i")),
                                            *ending("stop_sequence", stop_sequence="END")]), [pg.Text("Hi")],
                            "stop_sequence",   # R6
                            pg.Usage(8, 2), "END"),
    "window full": (ANTHROPIC, sse([start(), *block(0, {"type": "text", "text": ""}, text_delta("Hi")),
                                    *ending("model_context_window_exceeded")], named=True), [pg.Text("Hi")],
                    "overflow",         # R6
                    pg.Usage(8, 2), None),
}
FAILURES: Dict[str, Tuple[Any, bytes, Any, str]] = {
    "D3 error": (COMPLETIONS, OPENROUTER_ERROR, pg.UpstreamError, "Provider returned error: overloaded"),
    "D10 error": (ANTHROPIC, ANTHROPIC_ERROR, pg.Overloaded, "Overloaded"),
    "error first": (COMPLETIONS, sse([{"error": {"message": "slow down", "type": "rate_limit_error"}}]),
                    pg.RateLimited, "slow"),
    "error as text": (COMPLETIONS, sse([{"error": "it broke"}]), pg.UpstreamError, "it broke"),
    "overflow in the stream": (COMPLETIONS, sse([{"error": {"message": "maximum context length is 5 tokens",
                                                            "code": 400}}]),
                               pg.ContextOverflow, "maximum"),
    "Anthropic error first": (ANTHROPIC, sse([{"type": "error",
                                               "error": {"type": "rate_limit_error", "message": "slow"}}],
                                             named=True), pg.RateLimited, "slow"),
    # G4, R3
    "no finish reason": (COMPLETIONS, sse([chunk({"content": "Hi"})]), pg.UpstreamProtocolError, "finish reason"),
    "no message_stop": (ANTHROPIC, sse([start(), *block(0, {"type": "text", "text": "Hi"})], named=True),
                        pg.UpstreamProtocolError, "message_stop"),
    "network_error": (COMPLETIONS, sse([chunk({"content": "Hi"}), chunk({}, "network_error")], end="[DONE]"),
                      pg.UpstreamError,
                      "network_error"),
    # G6
    "HTML": (COMPLETIONS, b"<html><body>Bad gateway</body></html>", pg.UpstreamProtocolError, ""),
    "JSON in place of events": (ANTHROPIC, b'{"type":"error","error":{"type":"api_error","message":"x"}}',
                                pg.UpstreamProtocolError, ""),
    "nothing": (COMPLETIONS, b"", pg.UpstreamProtocolError, ""),
    "nothing at all": (ANTHROPIC, b"", pg.UpstreamProtocolError, ""),
    "only [DONE]": (COMPLETIONS, b"data: [DONE]\n\n", pg.UpstreamProtocolError, "empty"),
    "broken JSON": (COMPLETIONS, sse([chunk({"content": "Hi"})]) + b"data: {oops\n\n", pg.UpstreamProtocolError,
                    "malformed"),
    "not an object": (COMPLETIONS, b"data: [1]\n\n", pg.UpstreamProtocolError, "object"),
    "not UTF-8": (COMPLETIONS, b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', pg.UpstreamProtocolError,
                  "malformed"),
    "deep": (COMPLETIONS, b"data: " + b"[" * 100_000 + b"\n\n", pg.UpstreamProtocolError, "malformed"),
    "odd types": (COMPLETIONS, sse([{"choices": [{"delta": {"content": 5, "tool_calls": 7}}]}]),
                  pg.UpstreamProtocolError, ""),
    "delta before start": (ANTHROPIC, sse([{"type": "content_block_delta"}], named=True), pg.UpstreamProtocolError, ""),
}
ALL_TRANSCRIPTS = pytest.mark.parametrize("name", TRANSCRIPTS)
CHAT_TRANSCRIPTS = [name for name, row in TRANSCRIPTS.items() if row[0] is COMPLETIONS]
ANTHROPIC_TRANSCRIPTS = [name for name, row in TRANSCRIPTS.items() if row[0] is ANTHROPIC]


def check_event_order(events: Sequence[Any]) -> None:
    """The rules that all runs of events keep, whichever protocol they come from."""
    assert sum(isinstance(event, (pg.Done, pg.Failed)) for event in events) == 1
    assert isinstance(events[-1], (pg.Done, pg.Failed))
    is_done = isinstance(events[-1], pg.Done)
    starts = [place for place, event in enumerate(events) if isinstance(event, pg.Start)]
    assert starts == ([0] if is_done or len(events) > 1 else [])
    opened: List[int] = []
    ended: Dict[int, str] = {}
    joined: Dict[int, str] = {}
    for event in events:
        if isinstance(event, pg.PartStart):
            assert event.index == len(opened) and (not isinstance(event.part,
                                                                  pg.ToolCall) or (event.part.id and event.part.name))
            opened.append(event.index)
            joined[event.index] = ""
        elif isinstance(event, (pg.PartDelta, pg.PartEnd)):
            assert event.index in joined and event.index not in ended
            if isinstance(event, pg.PartDelta):
                assert event.text
                joined[event.index] += event.text
            else:
                part = event.part
                ended[event.index] = part.arguments if isinstance(part, pg.ToolCall) else getattr(part, "text")
    assert not is_done or ended == joined, "every part ends, and its deltas are its text"


def check_stream(upstream: Any, wire: bytes, expected: Sequence[Any]) -> None:
    """The same events however the bytes are cut."""
    for sizes in ([1], [2, 3], [7, 1, 64], [13], [100, 1]):
        assert texts(read_all(upstream, wire, sizes)) == texts(expected), sizes


@ALL_TRANSCRIPTS
def test_transcripts(name: str) -> None:
    upstream, wire, parts, stop_reason, usage, detail = TRANSCRIPTS[name]
    events = read_all(upstream, wire)
    check_event_order(events)
    reply = pg.collect(events)
    assert (list(reply.parts), reply.stop_reason, reply.usage, reply.detail) == (parts, stop_reason, usage, detail)
    check_stream(upstream, wire, events)


@ALL_TRANSCRIPTS
def test_a_cut_is_never_a_complete_answer(name: str) -> None:
    # G4, R3: neither SDK notices a stream that just ends
    upstream, wire, *_ = TRANSCRIPTS[name]
    terminal = wire.rfind(b"message_stop") if upstream is ANTHROPIC else min(
        place for place in (wire.find(b'"finish_reason": "' + word) for word in (b"stop", b"tool", b"length",
            b"content_filter"))
        if place >= 0) if b'"finish_reason": "' in wire else wire.index(b'"stop"')
    for place in range(0, terminal, 1 if len(wire) < 1500 else 7):
        events = read_all(upstream, wire[:place])
        assert isinstance(events[-1], pg.Failed), wire[:place]
        check_event_order(events)


@pytest.mark.parametrize("name", FAILURES)
def test_failed_transcripts(name: str) -> None:
    upstream, wire, kind, words = FAILURES[name]
    events = read_all(upstream, wire)
    check_event_order(events)
    assert type(events[-1].error) is kind and words in events[-1].error.message
    check_stream(upstream, wire, events)


def test_a_host_without_finish_reasons() -> None:
    target = model(compat={"supportsFinishReason": False})
    events = read_all(COMPLETIONS, sse([chunk({"content": "Hi"})]), target=target)
    assert pg.collect(events).stop_reason == "stop"
    assert pg.collect(read_all(COMPLETIONS, sse([call_delta(0, "a", "f", "{}")]),
                               target=target)).stop_reason == "tool_use"
    assert isinstance(read_all(COMPLETIONS, b"", target=target)[-1], pg.Failed)


def test_a_call_without_an_id_gets_one_that_lasts() -> None:
    wire = sse([call_delta(0, None, "f", "{}"), call_delta(1, None, "g", "{}"), *TOOL_STOP], end="[DONE]")
    ids = [part.id for part in pg.collect(read_all(COMPLETIONS, wire)).parts]
    assert len(set(ids)) == 2 and all(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", each) for each in ids)
    assert ids == [part.id for part in pg.collect(read_all(COMPLETIONS, wire, [1])).parts]


def test_nothing_follows_the_last_event() -> None:
    reader = pg.Settled(COMPLETIONS.reader(model(), STAMP))
    assert isinstance(reader.feed(CHAT_TWO_CALLS)[-1], pg.Done)
    assert reader.feed(CHAT_TWO_CALLS) == [] and reader.end() == [] and reader.fail(pg.UpstreamError("x")) == []


@CLIENTS
@ALL_TRANSCRIPTS
def test_every_provider_through_every_client(client: Any, name: str) -> None:
    """The N + M grid: what a client reads, streamed or whole, is what the provider said."""
    upstream, wire, *_ = TRANSCRIPTS[name]
    events, request = read_all(upstream, wire), client_request(client)
    lane = pg.TranslatedLane(client, upstream, request, model(upstream.name), STAMP)
    read = CHECKS[client.name](lane.feed(wire) + lane.end())
    reply = pg.collect(events)
    expected = read_of(reply, client)
    assert read == expected and lane.finished and lane.usage == reply.usage and lane.stop_reason == reply.stop_reason
    if name != "cut by the limit":          # a malformed call cannot be a tool_use block of a whole message
        assert loaded(read_body(client.render(request, reply, STAMP), client)) == loaded(expected)


@CLIENTS
@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_through_every_client(client: Any, name: str) -> None:
    upstream, wire, kind, words = FAILURES[name]
    lane = pg.TranslatedLane(client, upstream, client_request(client), model(upstream.name), STAMP)
    out = lane.feed(wire) + lane.end()
    assert type(lane.error) is kind and lane.finished
    assert CHECKS[client.name](out).error["message"]
    whole = pg.TranslatedLane(client, upstream, chat_request() if client is CHAT else messages_request(),
                              model(upstream.name), STAMP)
    assert whole.feed(wire) + whole.end() == b"" and type(whole.error) is kind          # R2: no partial text as a 200


# --- Whole answers ----------------------------------------------------------------------------------------------------

WHOLE_CHAT = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m1", "choices": [{
    "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok", "reasoning": "Hm",
                                                     "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}]}}], "usage": COUNTED}
WHOLE_MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-m", "stop_reason": "tool_use",
                 "stop_sequence": None, "content": [
                     {"type": "thinking", "thinking": "Hm", "signature": "c2ln"}, {"type": "text", "text": "ok"},
                     {"type": "server_tool_use", "id": "s", "name": "w", "input": {}},
                     {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 9007199254740993}}],
                 "usage": {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 7}}


def whole_events(upstream: Any, body: Any) -> List[Any]:
    return pg.Settled(upstream.reader(model(upstream.name), STAMP)).whole(body)


def test_whole_answers() -> None:
    events = whole_events(COMPLETIONS, WHOLE_CHAT)
    check_event_order(events)
    assert pg.collect(events) == pg.Reply("chatcmpl-1", (pg.Thinking("Hm", maker=OLD), pg.Text("ok"),
                                                         whole_call("a", "f", '{"n":1}'),
                                                         whole_call("b", "g", "{}")), "tool_use", pg.Usage(3, 2))
    events = whole_events(ANTHROPIC, WHOLE_MESSAGE)
    check_event_order(events)
    assert pg.collect(events) == pg.Reply("msg_1", (
        pg.Thinking("Hm", "c2ln", False, "anthropic-messages"), pg.Text("ok"),
        whole_call("a", "f", '{"n":9007199254740993}')),
        "tool_use", pg.Usage(3, 2, 7))


@CLIENTS
@pytest.mark.parametrize("upstream, body, kind", [
    (COMPLETIONS, b"<html>", pg.UpstreamProtocolError), (COMPLETIONS, b"", pg.UpstreamProtocolError),
    (COMPLETIONS, b"[]", pg.UpstreamProtocolError), (COMPLETIONS, b"{}", pg.UpstreamProtocolError),
    (COMPLETIONS, b'{"choices": []}', pg.UpstreamProtocolError),
    (COMPLETIONS, b'{"choices": [{"mess', pg.UpstreamProtocolError),
    (COMPLETIONS, b'{"choices": [5]}', pg.UpstreamProtocolError),
    (COMPLETIONS, b'{"choices": [{}]}', pg.UpstreamProtocolError),
    (COMPLETIONS, b'{"error": {"message": "busy", "type": "overloaded_error"}}', pg.Overloaded),
    (ANTHROPIC, b"<html>", pg.UpstreamProtocolError), (ANTHROPIC, b"{}", pg.UpstreamProtocolError),
    (ANTHROPIC, b'{"type":"error","error":{"type":"rate_limit_error","message":"slow"}}', pg.RateLimited),
], ids=lambda value: value.decode()[:24] if isinstance(value, bytes) else None)
def test_a_200_that_is_no_answer_is_an_error(client: Any, upstream: Any, body: bytes, kind: Any) -> None:
    # G6, R17; both lanes
    request = chat_request() if client is CHAT else messages_request()
    lanes = {pg.TranslatedLane, pg.choose_lane(client, upstream, request)}
    for lane_type in lanes:
        lane = lane_type(client, upstream, request, model(upstream.name), STAMP)
        try:
            assert lane.whole(body) == b"" and type(lane.error) is kind
        except pg.GatewayError as error:
            assert type(error) is kind


# --- Native lanes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAT_TRANSCRIPTS)
@pytest.mark.parametrize("include_usage", [True, False], ids=["usage", "no usage"])
def test_chat_lane(name: str, include_usage: bool) -> None:
    upstream, wire, *_ = TRANSCRIPTS[name]
    request = chat_request(stream=True, **({"stream_options": {"include_usage": True}} if include_usage else {}))
    outputs = []
    for sizes in ([len(wire)], [1], [7, 1, 64]):
        lane, out, place, turn = pg.ChatLane(CHAT, COMPLETIONS, request, model(), STAMP), b"", 0, 0
        while place < len(wire):
            out += lane.feed(wire[place:place + sizes[turn % len(sizes)]])
            place, turn = place + sizes[turn % len(sizes)], turn + 1
        outputs.append(out + lane.end())
        assert lane.finished and lane.error is None
    assert outputs[1:] == outputs[:1] * 2
    reply = pg.collect(read_all(upstream, wire))
    read, expected = check_chat_stream(outputs[0], include_usage), read_of(reply, CHAT)
    refusals = "".join(json.loads(text)["choices"][0]["delta"].get("refusal") or "" for _,
                       text in pg.parse_events(outputs[0])
                       if text != "[DONE]" and json.loads(text)["choices"])
    assert (read.text + refusals, read.thinking, len(read.calls)) == (expected.text, expected.thinking,
                                                                      len(expected.calls))
    assert read.calls == expected.calls
    assert lane.usage == reply.usage


@pytest.mark.parametrize("name", [name for name, row in FAILURES.items() if row[0] is COMPLETIONS])
def test_chat_lane_failures(name: str) -> None:
    _, wire, kind, _ = FAILURES[name]
    lane = pg.ChatLane(CHAT, COMPLETIONS, client_request(CHAT), model(), STAMP)
    out = lane.feed(wire) + lane.end()
    assert lane.error is not None and issubclass(kind, pg.UpstreamError) == isinstance(lane.error, pg.UpstreamError)
    assert check_chat_stream(out).error


@pytest.mark.parametrize("name", CHAT_TRANSCRIPTS)
def test_chat_lane_cuts(name: str) -> None:
    wire = TRANSCRIPTS[name][1]
    finish = re.search(rb'"finish_reason": ?"', wire)
    assert finish
    for place in range(0, finish.start(), 11):
        lane = pg.ChatLane(CHAT, COMPLETIONS, client_request(CHAT), model(), STAMP)
        assert check_chat_stream(lane.feed(wire[:place]) + lane.end()).error and lane.error


def test_chat_lane_passes_what_only_this_host_knows() -> None:
    wire = sse([chunk({"role": "assistant", "content": "a"}, provider="Host", service_tier="flex", choices_extra=1),
                {**chunk({}, "stop"), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop",
                                                   "logprobs": {"content": []},
                                                   "native_finish_reason": "eos"}]}], end="[DONE]")
    lane = pg.ChatLane(CHAT, COMPLETIONS, chat_request(stream=True), model(), STAMP)
    events = [json.loads(text) for _, text in pg.parse_events(lane.feed(wire)) if text != "[DONE]"]
    assert events[0]["provider"] == "Host" and events[0]["service_tier"] == "flex" and events[0]["model"] == "p/m1"
    assert events[1]["choices"][0]["native_finish_reason"] == "eos" and events[1]["choices"][0]["logprobs"] == {"content": []}


def test_chat_lane_whole() -> None:
    lane = pg.ChatLane(CHAT, COMPLETIONS, chat_request(), model(), STAMP)
    body = json.loads(lane.whole(json.dumps({**WHOLE_CHAT, "id": "x", "odd": 1}).encode()))
    choice = body["choices"][0]
    assert body["model"] == "p/m1" and body["id"] == "chatcmpl-" + STAMP.id and body["odd"] == 1 and body["usage"] == COUNTED
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"] == "Hm"
    assert (lane.usage, lane.stop_reason, lane.finished) == (pg.Usage(3, 2), "tool_calls", True)


@pytest.mark.parametrize("name", ANTHROPIC_TRANSCRIPTS)
def test_anthropic_lane(name: str) -> None:
    upstream, wire, *_ = TRANSCRIPTS[name]
    request = messages_request(stream=True)
    outputs = []
    for size in (len(wire), 1, 13):
        lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, request, model("anthropic-messages"), STAMP)
        outputs.append(b"".join(lane.feed(wire[place:place + size]) for place in range(0, len(wire),
            size)) + lane.end())
        assert lane.finished and lane.error is None
    assert outputs[1:] == outputs[:1] * 2
    named = wire if wire.startswith(b"event") else sse([json.loads(text) for _, text in pg.parse_events(wire)],
                                                       named=True)
    assert outputs[0] == named.replace(b'"claude-m"', b'"p/m1"'), "every byte as it came but for the model's name"
    reply = pg.collect(read_all(upstream, wire))
    assert lane.usage == reply.usage
    for place in range(0, wire.rfind(b"message_stop"), 17):
        lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, request, model("anthropic-messages"), STAMP)
        out = lane.feed(wire[:place]) + lane.end()
        assert lane.error is not None and out.count(b"event: error") == 1 and b"message_stop" not in out


@pytest.mark.parametrize("name", [name for name, row in FAILURES.items() if row[0] is ANTHROPIC])
def test_anthropic_lane_failures(name: str) -> None:
    _, wire, kind, _ = FAILURES[name]
    lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, client_request(MESSAGES), model("anthropic-messages"), STAMP)
    out = lane.feed(wire) + lane.end()
    assert lane.error is not None and (type(lane.error) is kind or name == "delta before start") and b"event: error" in out


def test_anthropic_lane_whole_is_spliced() -> None:
    body = b' {"model" : "claude-m", "id":"msg_1","content":[{"type":"text","text":"\xc3\xa9"}],"usage":{"input_tokens":3}}\n'
    lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, messages_request(), model("anthropic-messages"), STAMP)
    assert lane.whole(body) == body.replace(b"claude-m", b"p/m1") and lane.usage.input == 3


def native(client: Any, request: pg.Request, target: pg.Model,
           credential: pg.Credential = pg.Credential("api_key", "sk-test"),
           ) -> pg.Call:
    """The call of a native lane."""
    upstream = pg.UPSTREAM_PROTOCOLS[target.protocol]
    lane = pg.choose_lane(client, upstream, request)(client, upstream, request, target, STAMP)
    assert lane.name == "native"
    return lane.call(credential)[0]


SPLICES = [b'{"model":"p/m1","max_tokens":5,"messages":[{"role":"user","content":"x"}]}',
           b'{\n  "max_tokens" : 5, "messages":[{"role":"user","content":"\xc3\xa9 \\u00e9"}],\n "model" :\t"p/m1" }\n',
           b'{"tools":[{"name":"f","input_schema":{"properties":{"model":{"const":"p/m1"}},"model":"p/m1"}}],"max_tokens":5,'
           b'"messages":[{"role":"user","content":"\\"model\\": \\"p/m1\\""}],"model":"p/m1"}',
           b'{"metadata":{"model":"p/m1"},"model":"p/m1","max_tokens":5,"messages":[{"role":"user","content":"x"}]}',
           b'{"model":"p\\/m1","max_tokens":5,"messages":[{"role":"user","content":"x"}]}',
           b'{"model":"p/m1","max_tokens":5,"messages":[{"role":"user","content":"\\ud83d\\ude00 \\ud83d"}],"n":1.0,"m":9007199254740993}',
           b'\xef\xbb\xbf{"model":"p/m1","max_tokens":5,"messages":[{"role":"user","content":"x"}]}']


@pytest.mark.parametrize("body", SPLICES, ids=["plain", "white space", "nested keys", "nested first", "escaped value",
                                               "surrogates", "BOM"])
def test_native_body_is_the_clients_but_for_the_model(body: bytes) -> None:
    data = pg.parse_json_object(body)
    request = pg.replace(MESSAGES.parse(data), body=body)
    for model_id in ("claude-x", 'quo"te\\é', "p/m1"):
        call = native(MESSAGES, request, model("anthropic-messages", id=model_id))
        sent = pg.parse_json_object(call.body)
        assert sent == {**data, "model": model_id}
        start_same = len(os.path.commonprefix([body, call.body]))
        end_same = len(os.path.commonprefix([body[start_same:][::-1], call.body[start_same:][::-1]]))
        changed = body[start_same:len(body) - end_same]
        assert changed in b"p\\/m1" or changed in b"p/m1", "one place changed, the top-level value"


def test_native_body_with_an_escaped_key() -> None:
    body = b'{"mod\\u0065l":"p/m1","max_tokens":5,"messages":[{"role":"user","content":"x"}]}'
    request = pg.replace(MESSAGES.parse(pg.parse_json_object(body)), body=body)
    call = native(MESSAGES, request, model("anthropic-messages"))
    assert json.loads(call.body)["model"] == "m1" and json.loads(call.body)["max_tokens"] == 5


def test_lanes_are_chosen_by_protocol() -> None:
    request, unpaired = chat_request(), chat_request(messages=[{"role": "tool", "tool_call_id": "z", "content": "x"}])
    assert pg.choose_lane(CHAT, COMPLETIONS, request) is pg.ChatLane
    assert pg.choose_lane(CHAT, COMPLETIONS, unpaired) is pg.TranslatedLane
    assert pg.choose_lane(CHAT, ANTHROPIC, request) is pg.choose_lane(MESSAGES, COMPLETIONS,
                                                                      request) is pg.TranslatedLane
    assert pg.choose_lane(MESSAGES, ANTHROPIC, messages_request()) is pg.AnthropicLane


# --- Builders ---------------------------------------------------------------------------------------------------------

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Look"},
                                 {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}",
                                                                     "detail": "high"}}]},
    {"role": "assistant", "content": "So:", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "wx", "arguments": '{"n":9007199254740993}'}},
        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    {"role": "user", "content": "Thanks"}]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image", "source": B64}]},
    {"role": "assistant", "content": [
        {"type": "text", "text": "So:"}, {"type": "tool_use", "id": "c1", "name": "wx",
                                          "input": {"n": 9007199254740993}},
        {"type": "tool_use", "id": "c2", "name": "now", "input": {}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "noon"}]},
        {"type": "text", "text": "Thanks"}]}]
MARK = {"cache_control": {"type": "ephemeral"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def unmarked(value: Any) -> Any:
    """Without cache marks."""
    if isinstance(value, dict):
        return {key: unmarked(inner) for key, inner in value.items() if key != "cache_control"}
    return [unmarked(inner) for inner in value] if isinstance(value, list) else value


def test_chat_to_anthropic() -> None:
    request = chat_request(messages=HISTORY, tools=[WEATHER, BARE], tool_choice="auto", parallel_tool_calls=False,
                           max_tokens=50,
                           temperature=1.5, top_p=0.5, stop=["END"], user="u", stream=True, response_format={
                               "type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}})
    body, dropped = built(request, model("anthropic-messages"))
    assert dropped == [] and unmarked(body) == {
        "model": "m1", "max_tokens": 50, "messages": BLOCKS, "system": [{"type": "text", "text": "Be brief."}],
        # G15, R11
        "tools": [{"name": "wx", "description": "Weather", "input_schema": AWX["input_schema"]},
                  {"name": "now", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "temperature": 1, "top_p": 0.5,
        "stop_sequences": ["END"], "metadata": {"user_id": "u"}, "stream": True}
    assert MARK.items() <= body["system"][-1].items() and MARK.items() <= body["tools"][-1].items()
    assert MARK.items() <= body["messages"][-1]["content"][-1].items() and json.dumps(body).count("ephemeral") == 3


def test_anthropic_to_chat() -> None:
    request = messages_request(messages=BLOCKS, system="Be brief.", tools=[AWX], tool_choice={"type": "any"},
                               temperature=0.5,
                               stop_sequences=["END"], metadata={"user_id": "u"}, stream=True,
                               output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    body, dropped = built(request, model(), MESSAGES)
    history = json.loads(json.dumps(HISTORY))
    del history[1]["content"][1]["image_url"]["detail"]
    assert dropped == [] and body == {
        "model": "m1", "messages": history, "stream": True, "stream_options": {"include_usage": True},
        "max_completion_tokens": 100, "temperature": 0.5, "stop": ["END"], "user": "u",
        "tools": [{"type": "function", "function": {"name": "wx", "description": "Weather",
                                                    "parameters": AWX["input_schema"]}}],
        "tool_choice": "required", "response_format": {"type": "json_schema", "json_schema": {
            "name": "output", "schema": SCHEMA, "strict": True}}}


def test_images_of_tool_results() -> None:
    image = {"type": "image", "source": B64}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {}},
                                             {"type": "tool_use", "id": "c2", "name": "f", "input": {}}]}
    answers = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [image]},
                                           {"type": "tool_result", "tool_use_id": "c2", "is_error": True}]}
    request = messages_request(messages=[{"role": "user", "content": "x"}, call, answers])
    body, _ = built(request, model(), MESSAGES)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool", "tool", "user"]    # F11
    assert body["messages"][2]["content"] and "attached" not in body["messages"][3]["content"]                   # G14
    assert body["messages"][4]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    failed = messages_request(messages=[{"role": "user", "content": "x"}, call, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "is_error": True,
         "content": [{"type": "text", "text": "no"}, image]},
        {"type": "tool_result", "tool_use_id": "c2", "content": "ok"}]}])
    body, _ = built(failed, model("anthropic-messages"), MESSAGES)
    content = body["messages"][2]["content"]
    assert [item["type"] for item in content[:2]] == ["tool_result",
                                                      "tool_result"], "all results first"            # F10
    assert unmarked(content[0]["content"]) == [{"type": "text", "text": "no"}] and content[0]["is_error"] is True


@pytest.mark.parametrize("protocol", ["openai-completions", "anthropic-messages"])
@pytest.mark.parametrize("provider", ["p", "openai"])
@pytest.mark.parametrize("call_id", ["c", "call.1", "call|fc", "x" * 41, "x" * 50 + "|y", "x" * 64, "x" * 65,
                                     "x" * 450],
                         ids=lambda call_id: f"{call_id[:6]}-{len(call_id)}")
def test_a_result_has_the_id_of_its_call(protocol: str, provider: str, call_id: str) -> None:
    twin = call_id + "."
    request = chat_request(messages=[
        {"role": "user", "content": "x"}, {"role": "assistant",
                                           "tool_calls": [{**CALL, "id": call_id}, {**CALL, "id": twin}]},
        {"role": "tool", "tool_call_id": call_id, "content": "1"},
        {"role": "tool", "tool_call_id": twin, "content": "2"}])
    body, _ = built(request, model(protocol, provider=provider))
    text = json.dumps(body)
    called = re.findall(r'"id": "([^"]*)"', text)
    assert re.findall(r'"(?:tool_call_id|tool_use_id)": "([^"]*)"', text) == called and len(set(called)) == 2
    if protocol == "anthropic-messages" or provider == "openai":
        assert all(len(each) <= (40 if provider == "openai" and protocol != "anthropic-messages" else 64) for each in called)


def test_histories_that_providers_refuse_are_mended() -> None:
    target = model("anthropic-messages")
    only_system = chat_request(messages=[{"role": "system",
                                          "content": "S"}])                                        # G38
    assert unmarked(built(only_system, target)[0]["messages"]) == [{"role": "user",
                                                                    "content": [{"type": "text", "text": "S"}]}]
    first = chat_request(messages=[{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "you"},
                                   {"role": "user", "content": "x"}, {"role": "user", "content": " "}])
    assert [message["role"] for message in built(first, target)[0]["messages"]] == ["user", "assistant", "user"]
    empty = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": ""},
                                   {"role": "user", "content": "y"}])
    assert [message["role"] for message in built(empty, model())[0]["messages"]] == ["user", "user"]
    broken = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
        {"id": "c", "function": {"name": "f", "arguments": '{"city":"Par'}}]}])
    content = built(broken, target)[0]["messages"][1]["content"]
    # G11
    assert content[0]["input"] == {"malformed_arguments": '{"city":"Par'}
    assert built(messages_request(tools=[]), model(),
                 MESSAGES)[0].get("tools") is None                               # R21


def test_big_numbers_pass_in_both_directions() -> None:
    # G10: as text to chat providers, as numbers to Anthropic ones, and in the order they came
    arguments = '{"10":1.0,"2":9007199254740993}'
    request = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
        {"id": "c", "function": {"name": "f", "arguments": arguments}}]}])
    lane = pg.TranslatedLane(CHAT, ANTHROPIC, request, model("anthropic-messages"), STAMP)
    assert b'"input":' + arguments.encode() in lane.call(pg.Credential())[0].body
    assert built(request, model())[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments


def thinking_turn(*blocks: Dict[str, Any]) -> pg.Request:
    return messages_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": [
        *blocks, {"type": "text", "text": "ok"}]}, {"role": "user", "content": "y"}])


OWN = {"type": "thinking", "thinking": "why", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "RU5D"}
FOREIGN = {"type": "thinking", "thinking": "Hmm", "signature": pg.seal(pg.Thinking("Hmm", DETAILS, maker=OLD),
    MESSAGES.name)}


def test_signed_thinking_goes_back_to_its_maker_only() -> None:
    request = thinking_turn(OWN, REDACTED, FOREIGN, {"type": "thinking", "thinking": "unsigned", "signature": ""})
    translated = pg.TranslatedLane(MESSAGES, ANTHROPIC, request, model("anthropic-messages"), STAMP)
    body = json.loads(translated.call(pg.Credential())[0].body)
    assert body["messages"][1]["content"] == [OWN, REDACTED,
                                              {"type": "text", "text": "ok"}]                 # R4, R5, F13
    turn = built(request, model(), MESSAGES)[0]["messages"][1]
    assert turn == {"role": "assistant", "content": "ok", "reasoning_details": json.loads(DETAILS)}


def test_native_foreign_thinking_is_taken_out() -> None:
    request = thinking_turn(OWN, FOREIGN)
    body = json.loads(native(MESSAGES, request, model("anthropic-messages")).body)
    assert body["messages"][1]["content"] == [OWN, {"type": "text", "text": "ok"}]
    untouched = pg.replace(thinking_turn(OWN, REDACTED), body=b'{"model": "p/m1", "x": 1}',
                           data={"model": "p/m1", "x": 1})
    assert native(MESSAGES, untouched, model("anthropic-messages")).body == b'{"model": "m1", "x": 1}'


def test_claudes_thinking_survives_a_chat_client() -> None:
    message = CHAT.render(chat_request(), pg.collect(RUNS["thinking"]), STAMP)["choices"][0]["message"]
    request = chat_request(messages=[{"role": "user", "content": "x"}, message, {"role": "user", "content": "y"}])
    body, _ = built(request, model("anthropic-messages"))
    assert body["messages"][1]["content"] == [{"type": "thinking", "thinking": "Hm", "signature": "sig"},
                                              {"type": "text", "text": "ok"}]


@pytest.mark.parametrize("flags, expected", [
    ({}, None), ({"requiresReasoningContentOnAssistantMessages": True}, "why"),
    ({"requiresThinkingAsText": True}, None)])
def test_plain_reasoning_goes_back_where_it_is_wanted(flags: Dict[str, Any], expected: Any) -> None:
    request = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "ok",     # G13
                                                                       "reasoning_content": "why"}])
    turn = built(request, model(compat=flags))[0]["messages"][1]
    assert turn.get("reasoning_content") == expected
    assert turn["content"] == ("why\n\nok" if "requiresThinkingAsText" in flags else "ok")


@pytest.mark.parametrize("chat, messages, sent_chat, sent_messages", [
    ("none", {"type": "none"}, "none", {"type": "none"}), ("auto", {"type": "auto"}, "auto", {"type": "auto"}),
    # G30, R7
    ("required", {"type": "any"}, "required", {"type": "any"}),
    ({"type": "function", "function": {"name": "wx"}}, {"type": "tool", "name": "wx"},
     {"type": "function", "function": {"name": "wx"}}, {"type": "tool", "name": "wx"}), (None, None, None, None)],
    ids=["none", "auto", "required", "tool", "absent"])
def test_tool_choice(chat: Any, messages: Any, sent_chat: Any, sent_messages: Any) -> None:
    # E2
    requests = ((chat_request(tools=[WEATHER], tool_choice=chat), CHAT),
                (messages_request(tools=[AWX], tool_choice=messages), MESSAGES))
    for request, client in requests:
        assert built(request, model(), client)[0].get("tool_choice") == sent_chat
        assert built(request, model("anthropic-messages"), client)[0].get("tool_choice") == sent_messages
        bare = pg.replace(request, tools=())
        assert "tool_choice" not in built(bare, model(), client)[0], "never a choice without tools"
        assert "tool_choice" not in built(bare, model("anthropic-messages"), client)[0]


def test_one_call_at_a_time() -> None:
    request = chat_request(tools=[WEATHER], parallel_tool_calls=False)
    assert built(request, model("anthropic-messages"))[0]["tool_choice"] == {"type": "auto",
        "disable_parallel_tool_use": True}
    request = messages_request(tools=[AWX], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert built(request, model(), MESSAGES)[0]["parallel_tool_calls"] is False


TEMPLATES = {"thinking": {"$var": "thinking.enabled"}, "effort": {"$var": "thinking.effort", "omitWhenOff": True},
             "keep": 1,
             "budget": {"$var": "thinking.budget"}}


@pytest.mark.parametrize("form, flags, levels, on, off", [                      # B1.3; on is "high"
    ("openai", {}, {}, {"reasoning_effort": "high"}, {}),
    ("openai", {}, {"off": "none", "high": "big"}, {"reasoning_effort": "big"}, {"reasoning_effort": "none"}),
    ("openai", {}, {"off": None}, {"reasoning_effort": "high"}, {}),
    ("openai", {"supportsReasoningEffort": False}, {}, {}, {}),
    ("openrouter", {}, {}, {"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "none"}}),
    ("openrouter", {}, {"off": None}, {"reasoning": {"effort": "high"}}, {}),
    ("deepseek", {}, {}, {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
     {"thinking": {"type": "disabled"}}),
    ("deepseek", {"supportsReasoningEffort": False}, {"off": None}, {"thinking": {"type": "enabled"}}, {}),
    ("zai", {}, {}, {"thinking": {"type": "enabled", "clear_thinking": False}}, {"thinking": {"type": "disabled"}}),
    ("zai", {}, {"high": "max"}, {"thinking": {"type": "enabled", "clear_thinking": False}, "reasoning_effort": "max"},
     {"thinking": {"type": "disabled"}}),
    ("qwen", {}, {}, {"enable_thinking": True, "reasoning_effort": "high"}, {"enable_thinking": False}),
    ("qwen-chat-template", {}, {}, {"chat_template_kwargs": {"enable_thinking": True, "preserve_thinking": True}},
     {"chat_template_kwargs": {"enable_thinking": False, "preserve_thinking": True}}),
    ("chat-template", {"chatTemplateKwargs": TEMPLATES}, {},
     {"chat_template_kwargs": {"thinking": True, "effort": "high", "keep": 1, "budget": 16384}},
     {"chat_template_kwargs": {"thinking": False, "keep": 1}}),
    ("baseten", {"chatTemplateArgs": {"t": {"$var": "thinking.enabled"}}}, {},
     {"chat_template_args": {"t": True}, "reasoning_effort": "high"}, {"chat_template_args": {"t": False}}),
    ("baseten", {}, {"off": "none"}, {"reasoning_effort": "high"}, {"reasoning_effort": "none"}),
    ("together", {}, {}, {"reasoning": {"enabled": True}, "reasoning_effort": "high"},
     {"reasoning": {"enabled": False}}),
    ("string-thinking", {}, {"high": "deep"}, {"thinking": "deep"}, {"thinking": "none"}),
    ("string-thinking", {}, {"off": None}, {"thinking": "high"}, {}),
    ("ant-ling", {}, {"high": "high"}, {"reasoning": {"effort": "high"}}, {}), ("ant-ling", {}, {}, {}, {}),
    ("openai", {"thinkingTokenBudgetField": "thinking_budget", "supportsThinkingTokenBudget": True}, {},
     {"reasoning_effort": "high", "thinking_budget": 16384}, {}),
    ("openai", {"thinkingTokenBudgetField": "thinking_budget"}, {}, {"reasoning_effort": "high"}, {}),
])
def test_thinking_formats(form: str, flags: Any, levels: Any, on: Any, off: Any) -> None:
    target = model(thinking_levels=levels, compat={**flags, "thinkingFormat": form})
    names = {"reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs",
             "chat_template_args",
             "thinking_budget"}
    for word, expected in (("high", on), ("none", off)):
        sent = built(chat_request(reasoning_effort=word), target)[0]
        assert {name: value for name, value in sent.items() if name in names} == expected
    plain = built(chat_request(reasoning_effort="high"), pg.replace(target, reasoning=False))
    assert not names & set(plain[0]) and plain[1] == ["reasoning_effort"]


@pytest.mark.parametrize("facts, fields, thinking, effort, limit", [                       # B3.4
    # R30
    ({}, {}, None, None, 100), ({}, {"thinking": {"type": "disabled"}}, {"type": "disabled"}, None, 100),
    ({"thinking_levels": {"off": None}}, {"thinking": {"type": "disabled"}}, None, None, 100),
    ({}, {"max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 5000}},
     {"type": "enabled", "budget_tokens": 5000},
     None, 7000),                                                                                                  # R32
    ({"max_tokens": 3000}, {"thinking": {"type": "enabled", "budget_tokens": 5000}},
     {"type": "enabled", "budget_tokens": 1976},
     None, 3000),
    ({"max_tokens": 2000}, {"thinking": {"type": "enabled", "budget_tokens": 5000}}, None, None, 100),
    ({"compat": {"forceAdaptiveThinking": True}}, {"thinking": {"type": "adaptive"},
                                                   "output_config": {"effort": "low"}},      # R33
     {"type": "adaptive", "display": "summarized"}, "low", 100),
    ({"compat": {"forceAdaptiveThinking": True}}, {"thinking": {"type": "adaptive"},
                                                   "output_config": {"effort": "max"}},
     {"type": "adaptive", "display": "summarized"}, "high", 100),
    ({"compat": {"forceAdaptiveThinking": True}, "thinking_levels": {"max": "max"}},
     {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
     {"type": "adaptive", "display": "summarized"}, "max", 100),
])
def test_anthropic_thinking(facts: Any, fields: Any, thinking: Any, effort: Any, limit: int) -> None:
    body, _ = built(messages_request(**fields), model("anthropic-messages", **facts), MESSAGES)
    assert (body.get("thinking"), body.get("output_config", {}).get("effort"), body["max_tokens"]) == (thinking,
        effort, limit)


def test_what_cannot_stand_beside_thinking() -> None:
    request = chat_request(reasoning_effort="high", temperature=0.5, top_k=4, tools=[WEATHER])                     # R31
    body, dropped = built(request, model("anthropic-messages"))
    assert "temperature" not in body and "top_k" not in body and {"temperature", "top_k"} <= set(dropped)
    body, dropped = built(chat_request(reasoning_effort="high", tools=[WEATHER], tool_choice="required"),
                          model("anthropic-messages"))
    assert "thinking" not in body and body["tool_choice"] == {"type": "any"} and dropped == ["reasoning_effort"]


ANTHROPIC_FLAGS: List[Tuple[Dict[str, Any], Callable[[Dict[str, Any]], bool]]] = [
    ({"supportsTemperature": False}, lambda body: "temperature" not in body),
    ({"supportsCacheControlOnTools": False}, lambda body: "cache_control" not in body["tools"][-1]),
    ({"supportsStrictTools": True}, lambda body: body["tools"][0]["strict"] is True),
    ({}, lambda body: "strict" not in body["tools"][0] and body["temperature"] == 0.5)]


@pytest.mark.parametrize("flags, holds", ANTHROPIC_FLAGS, ids=lambda value: ",".join(value) if isinstance(value,
    dict) else "")
def test_anthropic_flags(flags: Dict[str, Any], holds: Any) -> None:
    assert holds(built(chat_request(tools=[WEATHER], temperature=0.5), model("anthropic-messages", compat=flags))[0])


TOOL_HISTORY = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"}, {"role": "user", "content": "y"}]
# flag → what it does to a body, by B1.2; each holds in the translated and in the native lane
FLAGS: List[Tuple[str, Any, Callable[[Dict[str, Any]], bool], Callable[[Dict[str, Any]], bool]]] = [
    ("supportsStore", False, lambda body: "store" not in body, lambda body: True),
    ("supportsDeveloperRole", False, lambda body: body["messages"][0]["role"] == "system", lambda body: True),
    ("supportsUsageInStreaming", False, lambda body: "stream_options" not in body,
     lambda body: body["stream_options"]["include_usage"] is True),
    ("maxTokensField", "max_tokens", lambda body: body["max_tokens"] == 7 and "max_completion_tokens" not in body,
     lambda body: body["max_completion_tokens"] == 7 and "max_tokens" not in body),
    ("requiresToolResultName", True, lambda body: body["messages"][3]["name"] == "wx",
     lambda body: "name" not in body["messages"][3]),
    ("requiresAssistantAfterToolResult", True, lambda body: body["messages"][4]["role"] == "assistant"
     and body["messages"][2]["content"] == "", lambda body: body["messages"][4]["role"] == "user"),
    ("requiresNonNullAssistantContent", True, lambda body: body["messages"][2]["content"] == "",
     lambda body: body["messages"][2]["content"] is None),
    ("requiresToolsWithToolHistory", True, lambda body: body["tools"] == [], lambda body: "tools" not in body),
    ("requiresReasoningContentOnAssistantMessages", True, lambda body: body["messages"][2]["reasoning_content"] == "",
     lambda body: "reasoning_content" not in body["messages"][2]),
    ("openRouterRouting", {"only": ["x"]}, lambda body: body["provider"] == {"only": ["x"]},
     lambda body: "provider" not in body),
    ("vercelGatewayRouting", {"order": ["x"]}, lambda body: body["providerOptions"] == {"gateway": {"order": ["x"]}},
     lambda body: "providerOptions" not in body),
    ("vllmPriority", 3, lambda body: body["priority"] == 3, lambda body: "priority" not in body),
    ("cacheControlFormat", "anthropic", lambda body: json.dumps(body).count('"ephemeral"') == 2
     and MARK.items() <= body["messages"][0]["content"][-1].items() and MARK.items() <= body["messages"][-1]["content"][-1].items(),
     lambda body: "cache_control" not in json.dumps(body)),
]


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "translated"])
@pytest.mark.parametrize("name, value, holds, default", FLAGS, ids=[row[0] for row in FLAGS])
def test_chat_flags(name: str, value: Any, holds: Any, default: Any, is_native: bool) -> None:
    request = chat_request(messages=[{"role": "developer", "content": "S"}, *TOOL_HISTORY], stream=True, max_tokens=7,
                           store=True)
    for flags, check_body in (({name: value}, holds), ({}, default)):
        target = model(compat=flags)
        body = json.loads(native(CHAT, request, target).body) if is_native else built(request, target)[0]
        assert check_body(body), body


def test_chat_flags_about_tools() -> None:
    request = chat_request(tools=[WEATHER], stream=True)
    assert built(request, model(compat={"zaiToolStream": True}))[0]["tool_stream"] is True
    assert built(request, model(compat={"supportsStrictMode": False}))[0]["tools"][0]["function"].get("strict") is None
    assert built(request, model())[0]["tools"][0]["function"]["strict"] is True                                   # G36
    target = model(sampling={"temperature": 0.1, "min_p": 0.2})
    assert {"temperature": 0.1, "min_p": 0.2}.items() <= built(chat_request(temperature=1), target)[0].items()


@pytest.mark.parametrize("form, names", [("openai", {"session_id", "x-client-request-id", "x-session-affinity"}),
                                         ("openai-nosession", {"x-client-request-id", "x-session-affinity"}),
                                         ("openrouter", {"x-session-id"})])
def test_session_headers(form: str, names: Any) -> None:
    flags = {"sendSessionAffinityHeaders": True, "sessionAffinityFormat": form}
    request = pg.replace(chat_request(), headers={"x-session-id": "s\r\n1"})
    headers = native(CHAT, request, model(compat=flags)).headers
    every = {"session_id", "x-client-request-id", "x-session-affinity", "x-session-id"}
    assert {name: headers[name] for name in every & set(headers)} == dict.fromkeys(names, "s1")
    assert not every & set(native(CHAT, request, model()).headers)


def test_anthropic_headers() -> None:
    # B3.1
    target = model("anthropic-messages", base_url="https://h/")
    call = native(MESSAGES, pg.replace(messages_request(), headers={"anthropic-version": "2026-10-21",
                                                                    "anthropic-beta": "a,b",
                                                                    "x-api-key": "clients"}), target)
    assert call.url == "https://h/v1/messages" and call.headers["x-api-key"] == "sk-test"
    assert call.headers["anthropic-version"] == "2026-10-21" and call.headers["anthropic-beta"] == "a,b"
    assert "authorization" not in call.headers
    lane = pg.TranslatedLane(CHAT, ANTHROPIC, chat_request(), target, STAMP)
    assert lane.call(pg.Credential("api_key", "k"))[0].headers["anthropic-version"] == "2023-06-01"
    flagged = model("anthropic-messages", compat={"auth": "cf-aig-authorization"}, headers={"X-Own": "1"})
    headers = native(MESSAGES, messages_request(), flagged).headers
    assert headers["cf-aig-authorization"] == "Bearer sk-test" and "x-api-key" not in headers and headers["x-own"] == "1"


def test_oauth_tokens_need_their_identity() -> None:
    token = pg.Credential("oauth", "sk-ant-oat01-x")
    lane = pg.TranslatedLane(CHAT, ANTHROPIC, chat_request(messages=HISTORY), model("anthropic-messages"), STAMP)
    call = lane.call(token)[0]
    assert call.headers["authorization"] == "Bearer sk-ant-oat01-x" and "x-api-key" not in call.headers
    assert call.headers["anthropic-beta"].startswith("claude-code-20250219,oauth-2025-04-20")
    assert call.headers["user-agent"].startswith("claude-cli/") and call.headers["x-app"] == "cli"
    system = json.loads(call.body)["system"]
    assert [block["text"] for block in system] == [pg.OAUTH_IDENTITY, "Be brief."]
    body = b'{"model":"p/m1","max_tokens":5,"system":"S","messages":[{"role":"user","content":"x"}]}'
    request = pg.replace(MESSAGES.parse(json.loads(body)), body=body, headers={"anthropic-beta": "x"})
    call = native(MESSAGES, request, model("anthropic-messages"), token)
    assert [block["text"] for block in json.loads(call.body)["system"]] == [pg.OAUTH_IDENTITY, "S"]
    assert call.headers["anthropic-beta"] == "claude-code-20250219,oauth-2025-04-20,x"


@pytest.mark.parametrize("base, url", [("https://h/v1", "https://h/v1/chat/completions"),
                                       ("https://h/v1/", "https://h/v1/chat/completions"),
                                       ("https://h", "https://h/chat/completions")])
def test_chat_urls(base: str, url: str) -> None:
    call = native(CHAT, chat_request(), model(base_url=base))
    assert (call.method, call.url, call.headers["authorization"]) == ("POST", url, "Bearer sk-test")


def test_native_chat_keeps_every_field() -> None:
    body = {"model": "p/m1", "messages": HISTORY, "n": 2, "logprobs": True, "made_up": {"x": [1.0, None]},
            "stream": True,
            "stream_options": {"include_usage": False, "other": 1}, "prediction": {"type": "content", "content": "x"},
            "tools": [WEATHER], "max_completion_tokens": 9}
    sent = json.loads(native(CHAT, CHAT.parse(body), model()).body)
    assert sent == {**body, "model": "m1", "stream_options": {"include_usage": True, "other": 1}}


@pytest.mark.parametrize("protocol", ["openai-completions", "anthropic-messages"])
def test_round_trip(protocol: str) -> None:
    """parse → build for the same protocol gives the same body."""
    if protocol == "openai-completions":
        body = {"model": "m1", "messages": HISTORY, "stream": True, "stream_options": {"include_usage": True},
                "temperature": 0.5,
                "max_completion_tokens": 9, "top_p": 0.5, "stop": ["a", "b"], "seed": 1, "frequency_penalty": 0.5,
                "presence_penalty": 0.5, "logit_bias": {"1": 2}, "user": "u", "verbosity": "low", "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "wx"}}, "parallel_tool_calls": False,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA,
                    "strict": True}},
                "reasoning_effort": "high"}
        assert built(CHAT.parse(body), model())[0] == body
    else:
        body = {"model": "m1", "max_tokens": 9, "messages": [*BLOCKS, {"role": "assistant", "content": [OWN, REDACTED]},
                                                            {"role": "user",
                                                             "content": [{"type": "text", "text": "y"}]}],
                "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "stream": True,
                "temperature": 0.5,
                "top_p": 0.5, "top_k": 5, "stop_sequences": ["a"], "metadata": {"user_id": "u"},
                "tools": [{**AWX, "strict": True}],
                "tool_choice": {"type": "tool", "name": "wx", "disable_parallel_tool_use": True},
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
        target = model("anthropic-messages", compat={"supportsStrictTools": True})
        assert unmarked(built(MESSAGES.parse(body), target,
                              MESSAGES)[0]) == body                     # R20: system stays apart


# --- Provider errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, body, kind, code, words", [                     # C4
    (400, {"error": {"message": "bad field", "code": "unknown_parameter"}}, pg.BadRequest, "unknown_parameter",
     "bad field"),
    (400, {"error": {"message": "bad", "type": "invalid_request_error"}}, pg.BadRequest, "invalid_request", "bad"),
    (401, {"error": {"message": "wrong key"}}, pg.CredentialRefused, "upstream_auth_failed", "wrong key"),
    (402, {"error": {"message": "pay"}}, pg.QuotaExceeded, "insufficient_quota", "pay"),
    (403, {"error": {"message": "no"}}, pg.Forbidden, "upstream_forbidden", "no"),
    (404, {"error": {"message": "no such model"}}, pg.ModelNotFound, "model_not_found", "no such model"),
    (408, {"message": "late"}, pg.UpstreamTimeout, "upstream_timeout", "late"),
                                                             (504, {}, pg.UpstreamTimeout, "upstream_timeout", "504"),
    (409, {"error": "twice"}, pg.Conflict, "conflict", "twice"),
                                                             (413, {"error": {"message": "big"}}, pg.BodyTooLarge,
                                                              "request_too_large", "big"),
    (422, {"detail": [{"loc": ["body", "x"], "msg": "odd"}]}, pg.BadRequest, "invalid_request", "odd"),
    (418, {"error": {"message": "tea"}}, pg.BadRequest, "invalid_request", "tea"),
    (429, {"error": {"message": "slow down"}}, pg.RateLimited, "rate_limit_exceeded", "slow down"),
    (429, {"error": {"message": "x", "code": "insufficient_quota"}}, pg.QuotaExceeded, "insufficient_quota", "x"),
    (429, {"error": {"message": "You exceeded your current quota"}}, pg.QuotaExceeded, "insufficient_quota", "quota"),
    (500, {"error": {"message": "oops"}}, pg.UpstreamError, "provider_error", "oops"),
                                                             (520, {}, pg.UpstreamError, "provider_error", "520"),
    (503, {"error": {"message": "busy"}}, pg.Overloaded, "server_is_overloaded", "busy"),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, pg.Overloaded,
     "server_is_overloaded",
     "Overloaded"),
    (500, [{"error": {"message": "in an array"}}], pg.UpstreamError, "provider_error", "in an array"),
    (400, "plain words", pg.BadRequest, "invalid_request", "plain words"),
                                                             (502, "<html>x</html>", pg.UpstreamError,
                                                              "provider_error", "502"),
    (500, "", pg.UpstreamError, "provider_error", "500"), (500, "null", pg.UpstreamError, "provider_error", "null"),
    (400, {"error": {"message": "Provider returned error", "metadata": {"raw": "inner"}}}, pg.BadRequest,
     "invalid_request", "inner"),
    (500, {"error": {"message": {"odd": 1}}}, pg.UpstreamError, "provider_error", "odd"),
])
def test_provider_errors(status: int, body: Any, kind: Any, code: str, words: str) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    for upstream in (COMPLETIONS, ANTHROPIC):
        error = upstream.parse_error(status, {"retry-after": "7"}, raw, 1000.0)
        assert (type(error), error.code) == (kind, code) and words in error.message and "<html" not in error.message
        assert error.retry_after == 7.0 or not isinstance(error, pg.UpstreamError)
    long_body = json.dumps({"error": {"message": "x" * 100_000}}).encode()
    assert len(COMPLETIONS.parse_error(status, {}, long_body, 0).message) <= pg.MAX_MESSAGE_CHARS


@pytest.mark.parametrize("text", [                                                # C3
    "prompt is too long: 210000 tokens > 200000 maximum", "Prompt exceeds max length",
                                  "prompt too long; exceeded max context length by 5",
    "Input is too long for requested model.", "Your input exceeds the context window of this model",
                                  "context_length_exceeded",
    "This model's maximum context length is 8192 tokens.", "exceeds the model's maximum context length of 4096 tokens",
    "context window exceeded", "The input token count (5) exceeds the maximum number of tokens allowed",
                                  "This model's maximum prompt length is 131072",
    "Please reduce the length of the messages or completion.", "exceeds the maximum allowed input length of 5 tokens",
    "The input (5 tokens) is longer than the model's context length (4 tokens).",
                                  "prompt token count of 5 exceeds the limit of 4",
    "the request exceeds the available context size, try increasing it",
                                  "tokens to keep is greater than the context length",
    "invalid params, context window exceeds limit", "Your request exceeded model token limit: 262144",
    "Prompt contains 5 tokens, too large for model with 4 maximum context length",
                                  "prompt has 5 tokens, but the configured context size is 4",
    "model_context_window_exceeded", "Range of input length should be [1, 129024]", "too many tokens",
                                  "token limit exceeded"])
def test_overflow_is_told_by_its_words(text: str) -> None:
    error = COMPLETIONS.parse_error(400, {}, json.dumps({"error": {"message": text}}).encode(), 0)
    assert type(error) is pg.ContextOverflow and error.message == text
    limited = COMPLETIONS.parse_error(429, {}, json.dumps({"error": {"message": f"rate limit: {text}"}}).encode(), 0)
    assert not isinstance(limited, pg.ContextOverflow)


def test_anthropic_error_bodies_are_kept_for_clients_that_read_their_words() -> None:
    body = b'{"type":"error","error":{"type":"invalid_request_error","message":"x"},"request_id":"r"}'
    error = ANTHROPIC.parse_error(400, {"content-type": "application/json"}, body, 0)
    assert error.provider_reply == pg.ProviderReply(400, "application/json", body)
    assert ANTHROPIC.parse_error(401, {}, body, 0).provider_reply is None, "a 401 would make clients drop their own key"
    assert ANTHROPIC.parse_error(502, {}, b"<html>", 0).provider_reply is None


# --- The built-in model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, kinds, stop_reason, text", [
    ({}, [pg.Text], "stop", "Hi"), ({"reasoning_effort": "low"}, [pg.Thinking, pg.Text], "stop", "Hi"),
    ({"tools": [WEATHER]}, [pg.Text], "stop", "Hi"), ({"tools": [WEATHER], "tool_choice": "required"}, [pg.ToolCall],
                                                      "tool_use", ""),
    ({"tools": [WEATHER], "messages": [{"role": "user", "content": "call wx"}]}, [pg.ToolCall], "tool_use", ""),
    ({"tools": [WEATHER], "tool_choice": "none", "messages": [{"role": "user", "content": "call wx"}]}, [pg.Text],
     "stop", "call wx"),
    ({"messages": [{"role": "user", "content": "a b c d"}], "max_tokens": 2}, [pg.Text], "length", "a b"),
    ({"messages": [{"role": "user", "content": "a END b"}], "stop": "END"}, [pg.Text], "stop_sequence", "a "),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {**SCHEMA, "required": ["a"]}}}}, [pg.Text],
     "stop", '{"a":1}'),
    ({"response_format": {"type": "json_object"}}, [pg.Text], "stop", '{"echo":"Hi"}'),
    ({"messages": TOOL_HISTORY[:3], "tools": [WEATHER], "tool_choice": "required"}, [pg.Text], "stop", "1")])
def test_demo_reply(fields: Any, kinds: Any, stop_reason: str, text: str) -> None:
    request = client_request(CHAT, **fields)
    reply = pg.demo_reply(request)
    assert reply == pg.demo_reply(request)
    assert [type(part) for part in reply.parts] == kinds and reply.stop_reason == stop_reason
    assert "".join(part.text for part in reply.parts if isinstance(part, pg.Text)) == text
    body = json.dumps({**request.data, "model": "echo"}).encode()
    kind, pieces = pg.demo_stream(body, STAMP)
    assert kind == "text/event-stream" and (kind, pieces) == pg.demo_stream(body, STAMP)
    read = check_chat_stream(b"".join(pieces))
    assert read == read_of(pg.collect(read_all(COMPLETIONS, b"".join(pieces))), CHAT) and read.text == text
    whole = json.dumps({**request.data, "model": "echo", "stream": False}).encode()
    kind, (piece,) = pg.demo_stream(whole, STAMP)
    assert kind == "application/json" and loaded(read_body(json.loads(piece), CHAT)) == loaded(read)


@pytest.mark.parametrize("schema, value", [
    ({"const": 5}, 5), ({"default": "x", "type": "string"}, "x"), ({"enum": ["b", "a"]}, "b"),
    ({"type": "string"}, "demo"),
    ({"type": "integer"}, 1), ({"type": "integer", "minimum": 7}, 7), ({"type": "number"}, 1.5),
    ({"type": "boolean"}, True),
    ({"type": "null"}, None), ({"type": ["integer", "null"]}, 1),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 1]),
    ({"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}, {"a": 1}),
    ({"properties": {"a": {"type": "null"}}}, {"a": None}),
    ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True), ({"oneOf": [{"const": 1}]}, 1),
    ({"allOf": [{"type": "integer"}]}, 1),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "boolean"}}}, True), ({"$ref": "#/nowhere"}, "demo"), (True, None),
    ({}, "demo")])
def test_example_value(schema: Any, value: Any) -> None:
    assert pg.example_value(schema, schema if isinstance(schema, dict) else {}) == value


def test_example_value_ends_in_a_loop() -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    assert json.dumps(pg.example_value(schema, schema)).count("next") < 20


# ======================================================================================================================
# §9 Catalogue
# ======================================================================================================================


def test_every_line_of_the_catalogue_parses() -> None:
    catalogue = pg.Catalogue(pg.PROVIDERS)
    assert set(pg.MODELS) <= set(pg.PROVIDERS)
    for provider in pg.PROVIDERS.values():
        models = catalogue.models_of(provider)
        assert models or provider.discover, provider.name
        assert len(models) == len([line for line in pg.MODELS.get(provider.models or provider.name,
                                                                  "").split("\n") if line]) or (
            provider.name == pg.DEMO), "no id twice"
        for each in models.values():
            assert each.protocol in pg.UPSTREAM_PROTOCOLS and each.base_url and each.provider == provider.name
            assert set(each.thinking_levels) <= set(pg.LEVELS) and len(each.cost) in (0, 4)
            assert each.context_window > 0 and 0 < each.max_tokens <= each.context_window
            assert each.id == each.id.strip() and all(price >= 0 for price in each.cost)
            assert each.flag("thinkingFormat", "openai") in pg.THINKING_FORMATS


def test_parse_model_line() -> None:
    provider = pg.Provider("p", {"openai-completions": "https://h/v1", "anthropic-messages": "https://h"},
                           auth="cf-aig-authorization",
                           compat={"a": True, "b": True})
    line = 'x/y:z|100|50|ri|1,2,0.5,0|off=- high=max|!a c maxTokensField=max_tokens d={"e":1}|anthropic-messages'
    assert pg.parse_model_line(line, provider) == pg.Model(
        "x/y:z", "p", "anthropic-messages", "https://h", context_window=100, max_tokens=50, reasoning=True,
        input=("text", "image"),
        cost=(1.0, 2.0, 0.5, 0.0), thinking_levels={"off": None, "high": "max"}, compat={
            "a": False, "b": True, "c": True, "maxTokensField": "max_tokens", "d": {"e": 1},
            "auth": "cf-aig-authorization"})
    short_line = pg.parse_model_line("m|100|50", provider)
    assert (short_line.protocol, short_line.input, short_line.reasoning) == ("openai-completions", ("text",), False)


TWO = {name: pg.Provider(name, {"openai-completions": f"https://{name}/v1"}, discover=True) for name in ("one", "two")}
TWO[pg.DEMO] = pg.DEMO_PROVIDER


def catalogue(**options: Any) -> pg.Catalogue:
    """Two providers: `one` has a and both, `two` has both, b, an id with a slash and some with colons."""
    ids = {"one": ["a", "both"], "two": ["both", "b", "org/x", "m:free", "b:high", "one/b"]}
    custom = {name: {each: model(id=each, provider=name) for each in ids[name]} for name in ids}
    return pg.Catalogue(TWO, custom, **options)


def usable(*names: str) -> Callable[[pg.Provider], bool]:
    return lambda provider: provider.name in names


@pytest.mark.parametrize("name, who, expected", [
    ("one/a", "one two", "one/a"), ("a", "one two", "one/a"), ("both", "one two", "one/both"),
    ("both", "two", "two/both"),
    ("two/both", "one two", "two/both"), ("both", "", "one/both"), ("org/x", "one two", "two/org/x"),
    ("two/org/x", "two", "two/org/x"),
    ("m:free", "two", "two/m:free"), ("two/m:free", "two", "two/m:free"), ("a:high", "one", "one/a high"),
    # G34
    ("one/a:HIGH", "one", "one/a high"), ("one/a:none", "one", "one/a off"), ("a:thinking", "one", "one/a medium"),
    ("b:high", "two", "two/b:high"), ("b:high:low", "two", "two/b:high low"), ("m:free:max", "two", "two/m:free max"),
    ("one/new", "one", "one/new"), ("one/org/new:tag", "one", "one/org/new:tag"), ("one/new:low", "one", "one/new low"),
    ("one/b", "one two", "two/one/b"), ("demo", "", "demo/echo"), ("demo/echo", "one", "demo/echo"),
    ("demo/echo:low", "", "demo/echo low"),
    ("one/", "one", None), ("/a", "one", None), ("", "one", None), ("nope", "one two", None),
    ("nope/x", "one two", None),
    ("demo/other", "", None), ("a:extreme", "one", None), (":high", "one", None), ("x" * 5000, "one", None)])
def test_resolve(name: str, who: str, expected: Any) -> None:
    if expected is None:
        with pytest.raises(pg.ModelNotFound) as caught:
            catalogue().resolve(name, usable(*who.split()))
        assert caught.value.param == "model" and caught.value.status == 404 and len(caught.value.message) < 400
        return
    found = catalogue().resolve(name, usable(*who.split()))
    assert f"{found.full_id} {found.level or ''}".strip() == expected


def test_unknown_models_get_a_hint() -> None:
    with pytest.raises(pg.ModelNotFound, match="did you mean \"two/m:free\""):
        catalogue().resolve("two-m:free", usable("one", "two"))


@pytest.mark.parametrize("options, listed, refused", [
    ({}, ["one/a", "one/both", "two/b", "two/b:high", "two/both", "two/m:free", "two/one/b", "two/org/x"], []),
    # G60
    ({"allow": ["a", "two/both"]}, ["one/a", "two/both"], ["one/both", "two/b", "one/new", "b"]),
    ({"deny": ["both", "two/b"]}, ["one/a", "two/b:high", "two/m:free", "two/one/b", "two/org/x"],
     ["both", "two/both", "two/b", "b:low"]),
    ({"allow": ["one/new"]}, [], ["a", "one/other", "demo"]),
    ({"allow": []}, [], ["a", "demo"]), ({"show_demo": True, "allow": ["a", "demo/echo"]}, ["demo/echo", "one/a"],
                                         ["b"]),
    ({"show_demo": True, "deny": ["demo/echo"], "allow": ["a"]}, ["one/a"], ["demo", "demo/echo"])])
def test_allow_and_deny_bind_listing_and_use(options: Any, listed: List[str], refused: List[str]) -> None:
    shop = catalogue(**options)
    everyone = usable("one", "two")
    assert [each.full_id for each in shop.listing(everyone)] == listed == sorted(listed)
    assert shop.listing(everyone) == shop.listing(everyone)
    for name in listed:
        assert shop.resolve(name, everyone).full_id == name
    for name in refused:
        with pytest.raises(pg.ModelNotFound):
            shop.resolve(name, everyone)


def test_a_denied_holder_leaves_a_bare_id_to_the_next() -> None:
    assert catalogue(deny=["one/both"]).resolve("both", usable("one", "two")).full_id == "two/both"
    assert catalogue(allow=["one/new"]).resolve("one/new", usable("one")).full_id == "one/new"


def test_the_demo_model_is_listed_when_there_is_nothing_else() -> None:
    assert [each.full_id for each in catalogue().listing(usable())] == ["demo/echo"]
    assert "demo/echo" not in [each.full_id for each in catalogue().listing(usable("one"))]
    assert [each.full_id for each in catalogue(show_demo=True).listing(usable("one"))] == ["demo/echo", "one/a",
        "one/both"]


def test_discovered_models_are_below_the_users() -> None:
    shop = catalogue()
    found = {"a": model(id="a", provider="one", max_tokens=5), "z": model(id="z", provider="one")}
    assert not shop.is_discovered(TWO["one"])
    shop.discover(TWO["one"], found)
    assert shop.is_discovered(TWO["one"]) and shop.resolve("z", usable("one")).full_id == "one/z"
    assert shop.resolve("a", usable("one")).max_tokens == 0, "the user's own entry wins"
    shop.discover(TWO["one"], {})
    with pytest.raises(pg.ModelNotFound):
        shop.resolve("z", usable("one"))


@pytest.mark.parametrize("body, expected", [
    # llama.cpp (both lists), vLLM, OpenRouter, LM Studio (/api/v0), Anthropic: id, window, output, input, reasoning
    ({"object": "list", "models": [{"name": "x"}], "data": [{"id": "x.gguf", "object": "model",
                                                             "meta": {"n_ctx_train": 32768}}]},
     [("x.gguf", 32768, 0, None, None)]),
    ({"data": [{"id": "x.gguf", "meta": {"n_ctx": 4096, "n_ctx_train": 32768}}]}, [("x.gguf", 4096, 0, None, None)]),
    ({"data": [{"id": "org/m", "max_model_len": 8192, "owned_by": "vllm"}]}, [("org/m", 8192, 0, None, None)]),
    ({"data": [{"id": "v/m:free", "name": "M", "context_length": 5000, "top_provider": {"max_completion_tokens": 700},
                "architecture": {"input_modalities": ["text", "image"]},
                "supported_parameters": ["reasoning", "tools"]}]},
     [("v/m:free", 5000, 700, ("text", "image"), True)]),
    ({"data": [{"id": "m", "type": "llm", "max_context_length": 9000}]}, [("m", 9000, 0, None, None)]),
    ({"data": [{"type": "model", "id": "claude-x", "display_name": "X", "max_input_tokens": 200000,
                "max_tokens": 64000}]},
     [("claude-x", 200000, 64000, None, None)]),
    ({"models": [{"name": "by-name"}]}, [("by-name", 0, 0, None, None)]),
    ({"data": [{"id": "m", "context_length": "many", "meta": 5, "top_provider": None, "architecture": [],
                "supported_parameters": 1}]},
     [("m", 0, 0, None, None)]),
    ({"data": [5, None, {}, {"id": ""}, {"id": 7}, {"id": "ok"}]}, [("ok", 0, 0, None, None)]), ({"data": "x"}, []),
    ({}, [])],
    ids=["llama.cpp", "llama.cpp n_ctx", "vLLM", "OpenRouter", "LM Studio", "Anthropic", "names", "odd types",
         "odd items",
         "no list", "nothing"])
def test_read_model_list(body: Any, expected: Any) -> None:
    found = pg.read_model_list(body, TWO["one"])
    assert [(each.id, each.context_window, each.max_tokens, each.input,
             each.reasoning) for each in found.values()] == expected
    assert list(found) == [each.id for each in found.values()] and all(each.provider == "one" for each in found.values())


# --- models.json ------------------------------------------------------------------------------------------------------


def read_models(**providers: Any) -> pg.ModelsFile:
    return pg.read_models_file({"providers": providers})


def test_models_json_fields() -> None:
    read = read_models(mine={
        "name": "Mine", "baseUrl": "https://mine.example/v1", "api": "openai-completions", "apiKey": "$KEY",
        "authHeader": True,
        "headers": {"X-A": "1", "X-B": "1"}, "compat": {"supportsStore": False, "openRouterRouting": {"only": ["x"]}},
        "unknown": 1,
        "models": [{"id": "org/m:1", "name": "M", "reasoning": True, "input": ["text", "image"], "contextWindow": 1000,
                    "maxTokens": 100,
                    "cost": {"input": 1, "output": 2, "cacheRead": 0.5, "cacheWrite": 0}, "headers": {"X-B": "2"},
                    "compat": {"maxTokensField": "max_tokens", "openRouterRouting": {"order": ["y"]}}, "unknown": [],
                    "thinkingLevelMap": {"high": "big", "off": None}, "samplingParams": {"min_p": 0.1}},
                   {"id": "plain"}, {"id": "claude", "api": "anthropic-messages", "baseUrl": "https://other.example"}]})
    assert read.problems == []
    provider = read.providers["mine"]
    assert (provider.protocol, provider.api_key, provider.auth_header, provider.discover) == ("openai-completions",
        "$KEY", True, False)
    assert read.custom["mine"]["org/m:1"] == pg.Model(
        "org/m:1", "mine", "openai-completions", "https://mine.example/v1", "M", 1000, 100, ("text", "image"), True,
        (1.0, 2.0, 0.5, 0.0),
        {"high": "big", "off": None}, {"supportsStore": False, "maxTokensField": "max_tokens",
                                       "openRouterRouting": {"only": ["x"], "order": ["y"]}}, {"X-A": "1", "X-B": "2"},
                                       {"min_p": 0.1})
    assert read.custom["mine"]["plain"].headers == {"X-A": "1", "X-B": "1"}
    claude = read.custom["mine"]["claude"]
    assert (claude.protocol, claude.base_url) == ("anthropic-messages", "https://other.example")
    assert "KEY" not in repr(provider)


def found_in(read: pg.ModelsFile, name: str) -> pg.Model:
    return pg.Catalogue(read.providers, read.custom).resolve(name, lambda provider: True)


def test_models_json_over_the_built_in_table() -> None:
    # 3.4: provider fields over all its models, then models (which replace), then modelOverrides (last)
    builtin = pg.Catalogue(pg.PROVIDERS).resolve("openai/gpt-4.1", lambda provider: True)
    read = read_models(openai={
        "baseUrl": "https://proxy.example/v1", "headers": {"X-A": "1"}, "compat": {"supportsStore": False},
        "models": [{"id": "gpt-4.1", "maxTokens": 5}, {"id": "mine", "maxTokens": 6}],
        "modelOverrides": {"gpt-4o": {"maxTokens": 7, "headers": {"X-B": "2"}}, "mine": {"contextWindow": 8},
                           "unknown": {"maxTokens": 9},
                           "gpt-5": {"cost": {"input": 0}, "thinkingLevelMap": {"low": "tiny"}}}})
    assert read.problems == []
    untouched = found_in(read, "openai/gpt-4-turbo")
    assert (untouched.base_url, untouched.headers, untouched.flag("supportsStore")) == ("https://proxy.example/v1",
        {"X-A": "1"}, False)
    replaced = found_in(read, "openai/gpt-4.1")
    assert builtin.context_window and (replaced.context_window, replaced.max_tokens) == (0, 5)
    overridden = found_in(read, "openai/gpt-4o")
    assert (overridden.context_window, overridden.max_tokens, overridden.headers) == (128000, 7,
        {"X-A": "1", "X-B": "2"})
    mine = found_in(read, "openai/mine")
    assert (mine.max_tokens, mine.context_window) == (6, 8)
    assert "unknown" not in read.custom["openai"]
    assert read.providers["openai"].env == pg.PROVIDERS["openai"].env and pg.PROVIDERS["openai"].protocol == "openai-completions"


def test_overrides_merge_cost_and_levels_field_by_field() -> None:
    read = read_models(openai={"modelOverrides": {"gpt-5": {"cost": {"input": 0},
                                                            "thinkingLevelMap": {"low": "tiny"}}}})
    each, builtin = found_in(read, "openai/gpt-5"), pg.Catalogue(pg.PROVIDERS).resolve("openai/gpt-5",
        lambda provider: True)
    assert each.cost == (0.0, *builtin.cost[1:])
    assert each.thinking_levels == {**builtin.thinking_levels, "low": "tiny"}


GOOD = {"baseUrl": "https://good.example/v1", "models": [{"id": "m"}]}


@pytest.mark.parametrize("name, entry, words", [
    ("bad", 5, "providers.bad"), ("bad", {}, "providers.bad.baseUrl"),
    ("bad", {"models": [{"id": "m"}]}, "providers.bad.baseUrl"),
    ("bad", {**GOOD, "baseUrl": "ftp://x"}, "providers.bad.baseUrl"),
    ("bad", {**GOOD, "baseUrl": 5}, "providers.bad.baseUrl"),
    ("bad", {**GOOD, "api": "telepathy"}, "providers.bad.api"), ("bad", {**GOOD, "models": {}}, "providers.bad.models"),
    ("bad", {**GOOD, "models": [5]}, "providers.bad.models[0]"),
    ("bad", {**GOOD, "models": [{}]}, "providers.bad.models[0].id"),
    ("bad", {**GOOD, "models": [{"id": "m", "api": "x"}]}, "providers.bad.models[0].api"),
    ("bad", {**GOOD, "models": [{"id": "m", "maxTokens": "5"}]}, "providers.bad.models[0].maxTokens"),
    ("bad", {**GOOD, "headers": {"a": 5}}, "providers.bad.headers.a"),
    ("bad", {**GOOD, "authHeader": "yes"}, "providers.bad.authHeader"),
    ("bad", {**GOOD, "models": [{"id": "m", "cost": {"input": "free"}}]}, "providers.bad.models[0].cost"),
    ("bad", {**GOOD, "models": [{"id": "m", "headers": {"a": 5}}]}, "providers.bad.models[0].headers.a"),
    ("bad", {**GOOD, "models": [{"id": "m", "compat": {"openRouterRouting": 5}}]},
     "providers.bad.models[0].compat.openRouterRouting"),
    ("bad", {**GOOD, "models": [{"id": "m", "baseUrl": "ftp://x"}]}, "providers.bad.models[0].baseUrl"),
    ("bad", {**GOOD, "models": [{"id": "m", "input": [5]}]}, "providers.bad.models[0].input"),
    ("bad", {**GOOD, "models": [{"id": "m", "thinkingLevelMap": {"high": 5}}]},
     "providers.bad.models[0].thinkingLevelMap.high"),
    ("a/b", GOOD, "providers.a/b"), ("demo", GOOD, "providers.demo"), ("openai", {"modelOverrides": {"gpt-5": 5}},
                                                                     "providers.openai.modelOverrides.gpt-5")])
def test_models_json_problems_are_named_and_harm_nobody_else(name: str, entry: Any, words: str) -> None:
    read = read_models(**{name: entry, "good": GOOD})
    assert len(read.problems) == 1 and read.problems[0].startswith(words), read.problems             # G64
    assert found_in(read, "good/m").base_url == "https://good.example/v1"
    assert (name in read.providers) == (name in pg.PROVIDERS)


@pytest.mark.parametrize("data", [{}, {"providers": []}, {"providers": None}])
def test_models_json_without_providers_is_malformed(data: Any) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        pg.read_models_file(data)
    assert caught.value.param == "providers"


@pytest.mark.parametrize("url, name, value", [
    ("https://api.deepseek.com/beta", "thinkingFormat", "deepseek"),
    ("http://localhost:8080/v1", "maxTokensField", "max_tokens"),
    ("http://192.168.1.5/v1", "maxTokensField", "max_tokens"), ("http://box:11434/v1", "maxTokensField", "max_tokens"),
    ("http://box.lan/v1", "maxTokensField", "max_tokens"), ("https://unknown.example/v1", "maxTokensField", None)])
def test_compat_by_host(url: str, name: str, value: Any) -> None:
    assert pg.compat_of_host(url).get(name) == value
    read = read_models(mine={"baseUrl": url, "models": [{"id": "m"}], "compat": {"own": 1}})
    assert found_in(read, "mine/m").flag(name) == value and found_in(read, "mine/m").flag("own") == 1


def test_a_provider_without_models_lists_its_own() -> None:
    read = read_models(mine={"baseUrl": "http://localhost:8080/v1"})
    assert read.problems == [] and read.providers["mine"].discover and read.custom["mine"] == {}
