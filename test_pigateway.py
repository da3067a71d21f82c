#!/usr/bin/env python3
"""Tests of pigateway.py. `python3 test_pigateway.py` runs them, and gets pytest first where it is missing.

Sections follow the module's. Tests that need an optional package, a program or a real model skip where it is absent;
`.ci/run` brings all of them.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile

HALF = "--half"                     # `test_pigateway.py --half 0` and `--half 1` are all the tests together


def run_half(number: int) -> int:
    """Runs the test functions of one half. A function belongs to the same one in every run."""
    import zlib

    import pytest

    class Half:
        """A plugin for pytest that leaves out what belongs to the other half."""

        def pytest_collection_modifyitems(self, items: List[Any]) -> None:
            # log-ins come back to fixed ports, so all of them are in one half, which gets less of the rest
            items[:] = [item for item in items if number == (item.originalname.startswith("test_log_in")
                                                             or zlib.crc32(item.originalname.encode()) % 7 < 3)]

    return pytest.main(["-q", "-p", "no:cacheprovider", os.path.abspath(__file__)], [Half()])


def run_both_halves(python: str, **settings: Any) -> int:
    """Runs the two halves side by side and shows them one after the other. Not zero if either failed."""
    command = [python, os.path.abspath(__file__), HALF]
    with tempfile.TemporaryFile() as kept:
        print("The tests run in two halves, side by side. The first:", flush=True)
        with subprocess.Popen([*command, "1"], stdout=kept, stderr=subprocess.STDOUT, **settings) as second:
            status = subprocess.call([*command, "0"], **settings)
        kept.seek(0)
        print("The second:", kept.read().decode("utf-8", "replace"), sep="\n", flush=True)
    status = status or second.returncode
    print("Both halves passed." if status == 0 else "FAILED: see above.", flush=True)
    return status


def bootstrap() -> int:
    """Runs the tests; without pytest, in a virtual environment beside this file that is made first. With arguments for
    pytest, such as `-k NAME` or `-x`, in one process."""
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
    # plugins that happen to be installed cost time in each of some thousand tests, and no test needs one
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if len(sys.argv) == 1:
        return run_both_halves(python, cwd=here, env=environ)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", os.path.abspath(__file__), *sys.argv[1:]]
    return subprocess.call(command, cwd=here, env=environ)


if __name__ == "__main__":
    sys.exit(run_half(int(sys.argv[2])) if sys.argv[1:2] == [HALF] else bootstrap())

import _thread
import base64
import binascii
import contextlib
import copy
import datetime
import errno
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import json
import logging
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import threading
import time
import types
import urllib.parse
import urllib.request
import zlib
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


RUNNING: List[pg.ServerHandle] = []         # the gateways in this process


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Takes away the log handlers that a test has attached: they write to its captured output, which ends with it.
    First come the lines of requests that are answered already: a gateway that stays would write them into the next."""
    before = list(pg.log.handlers)
    yield
    for handle in RUNNING:
        handle.server._wait_idle(2.0)
    for handler in [handler for handler in pg.log.handlers if handler not in before]:
        pg.log.removeHandler(handler)


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


def end_accepting(server: Any) -> None:
    """Has a socketserver's loop end now, not at its next look: half a poll interval on average, for each of hundreds of
    servers. Where a listener that is shut down does not wake the loop, the caller's `shutdown` waits as it always did."""
    server._BaseServer__shutdown_request = True
    with contextlib.suppress(OSError):
        server.socket.shutdown(socket.SHUT_RDWR)


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
            with contextlib.suppress(OSError):      # the client has left
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
        end_accepting(self.server)
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
    overrides = {"port": 0, "demo_delay_ms": 0, "force_abort_timeout_ms": 100, "retries": 0, **overrides}
    handle = pg.start_server(environ={"HOME": str(home), **(environ or {})}, **overrides)
    RUNNING.append(handle)
    try:
        yield handle
    finally:
        RUNNING.remove(handle)
        end_accepting(handle.server)
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
    ('{"a": 1}\n\nI called "it" now.', {"a": 1}), ('{"a": {"b": 1}}}', {"a": {"b": 1}}),
    ('{"a": 1}</tool_call>', {"a": 1}),
    ('{"a": "x\ny"} \n', {"a": "x\ny"}), ('{"a": 1}, "b": 2}', None), ('{"a": 1}} , {"b": 2}', None),
    ('{"a": 1}}, "b" : 2}', None), ('{"a": 1} ["b"]', None), ('{"a": 1} "b"', None),
    ('```json\n{"a": 1}', {"a": 1}), (' ```{"a": 1}``` \nDone.', {"a": 1}), ('```json\n{"a":', None), ("```", None),
    (r'"{\"a\": \"\\n\"}"', {"a": "\n"}), (r'"{\"a\": 1"', None), (r'"\"{}\""', None), ('"{}', None), ('""', {}),
    ('{"a": NaN}', None), ('{"a": -Infinity}', None), ('{"a": 1e999}', None), ("{'a': 1}", None), ('{"a": 1,}', None),
], ids=["empty", "blank", "plain", "control characters", "invalid escapes", "fence", "bare fence", "valid escapes",
        "big integer", "cut", "brace", "array", "string", "null", "prose", "two objects", "deep", "fenced array",
        "words behind", "brace too many", "tag behind", "control character and blanks behind", "closed too early",
        "object behind", "member behind", "array behind", "string behind", "open fence", "fence and words",
        "cut in a fence", "fence alone", "encoded twice", "cut and encoded twice", "encoded thrice", "open string", "empty string",
        "NaN", "infinity", "out of range", "single quotes", "trailing comma"])
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


def places(value: Any, path: Tuple[Any, ...] = ()) -> List[Tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    out: List[Tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        out.append((*path, key))
        if isinstance(inner, (dict, list)):
            out += places(inner, (*path, key))
    return out


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
            body = mutate(body, rng.choice(places(body) or [("model",)]), rng)
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
    wire = sse([call_delta(0, "c", "wx", '{"city":"Par'), chunk({}, "length")], end="[DONE]")
    asked = chat_request(stream=True, stream_options={"include_usage": True})
    lane = pg.TranslatedLane(CHAT, COMPLETIONS, asked, model(), STAMP)
    assert CHECKS[CHAT.name](lane.feed(wire) + lane.end()).calls == (("c", "wx", '{"city":"Par'),)
    for stream in (False, True):
        lane = pg.TranslatedLane(MESSAGES, COMPLETIONS, messages_request(stream=stream), model(), STAMP)
        out = lane.feed(wire)
        read = CHECKS[MESSAGES.name](out) if stream else read_body(json.loads(out), MESSAGES)
        assert not read.calls and '{"city":"Par' in read.text
        assert (read.stop, lane.stop_reason) == ("max_tokens", "length")


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
    (pg.NotSupported, (404, "invalid_request_error", "unsupported_endpoint"), (404, "not_found_error")),
    (pg.RouteNotFound, (404, "invalid_request_error", "endpoint_not_found"), (404, "not_found_error")),
    (pg.MethodNotAllowed, (405, "invalid_request_error", "method_not_allowed"), (405, "invalid_request_error")),
    (pg.RequestTimeout, (408, "invalid_request_error", "request_timeout"), (408, "invalid_request_error")),
    (pg.Conflict, (409, "invalid_request_error", "conflict"), (409, "conflict_error")),
    (pg.BodyTooLarge, (413, "invalid_request_error", "request_body_too_large"), (413, "request_too_large")),
    (pg.HeadTooLarge, (431, "invalid_request_error", "headers_too_large"), (431, "invalid_request_error")),
    (pg.Unauthorized, (401, "authentication_error", "invalid_api_key"), (401, "authentication_error")),
    (pg.LogInOver, (401, "authentication_error", "no_credentials"), (401, "authentication_error")),
    (pg.Forbidden, (403, "permission_error", "forbidden"), (403, "permission_error")),
    (pg.ShuttingDown, (503, "service_unavailable_error", "shutting_down"), (529, "overloaded_error")),
    (pg.UpstreamError, (502, "upstream_error", "provider_error"), (502, "api_error")),
    (pg.CredentialRefused, (502, "authentication_error", "upstream_auth_failed"), (502, "api_error")),
    (pg.RateLimited, (429, "rate_limit_error", "rate_limit_exceeded"), (429, "rate_limit_error")),
    (pg.QuotaExceeded, (429, "insufficient_quota", "insufficient_quota"), (402, "billing_error")),
    (pg.Overloaded, (503, "service_unavailable_error", "server_is_overloaded"), (529, "overloaded_error")),
    (pg.UpstreamTimeout, (504, "server_error", "upstream_timeout"), (504, "timeout_error")),
    (pg.UpstreamProtocolError, (502, "upstream_error", "stream_incomplete"), (502, "api_error")),
    (pg.EmptyAnswer, (502, "upstream_error", "empty_answer"), (502, "api_error")),
    (pg.ProviderMisconfigured, (502, "upstream_error", "provider_error"), (502, "api_error")),
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
        assert pg.unseal(sealed, client.name) == (signature, maker, "")
        assert (sealed == signature) == (maker == client.name) and "synthetic" not in sealed                # R4


@pytest.mark.parametrize("sealed", ["pigw1.", "pigw1.@@@", "pigw1.W10=", "pigw1.NQ==", "pigw1.WzEsMl0=", "pigw1.é"])
def test_a_broken_seal_is_no_signature(sealed: str) -> None:
    assert pg.unseal(sealed, "anthropic-messages") == (None, "", "")


def test_no_signature_is_no_seal() -> None:
    assert pg.seal(pg.Thinking("t"), "openai-chat") == "" and pg.unseal("", "x") == (None, "x", "")


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
    # llama.cpp, 2026-10: no message_start when the first token is half a character
    "no message_start": (ANTHROPIC, sse([*block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi"}),
                                         *ending("end_turn")], named=True), [pg.Text("Hi")], "stop", pg.Usage(0, 2), None),
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
    if client.wants_objects and upstream.is_lax:
        events = pg.SoundCalls().feed(events)
    reply = pg.collect(events)
    expected = read_of(reply, client)
    assert read == expected and lane.finished and lane.usage == reply.usage and lane.stop_reason == reply.stop_reason
    if client.wants_objects or name != "cut by the limit":      # a chat client is given what cannot be loaded
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


# --- Sound calls ------------------------------------------------------------------------------------------------------

# what the model wrote, and what a client that wants objects gets as arguments, None when it is shown as text
DAMAGES: Dict[str, Tuple[str, Optional[str]]] = {
    "none": ('{"a":  1.0}', '{"a":  1.0}'), "no arguments": ("", "{}"), "blanks": (" \n", "{}"),
    "control character": ('{"a": "x\ny"}', '{"a":"x\\ny"}'), "escape": (r'{"a": "C:\d"}', r'{"a":"C:\\d"}'),
    "fence": ('```json\n{"a": 1}\n```', '{"a":1}'), "open fence": ('```\n{"a": 1}', '{"a":1}'),
    "words behind": ('{"a": 1}\nDone.', '{"a":1}'), "encoded twice": (r'"{\"a\": \"é\"}"', '{"a":"é"}'),
    "cut": ('{"a": "Par', None), "two objects": ('{"a": 1}{"b": 2}', None), "prose": ("call it with a = 1", None),
    "array": ("[1]", None), "null": ("null", None), "NaN": ('{"a": NaN}', None), "deep": ('{"a":' * 100_000, None)}


def shown_call(name: str, arguments: str) -> str:
    """The text in the place of a call that cannot be used."""
    return f"[call of {name} with malformed arguments] {arguments}"


def calls_answer(stream: bool, calls: Sequence[Tuple[str, str]], finish: str, text: str = "") -> bytes:
    """A chat answer with these calls (name, arguments), numbered c0, c1, …; their pieces take turns."""
    if not stream:
        told = [{"id": f"c{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for place, (name, arguments) in enumerate(calls)]
        return json.dumps({"id": "x", "model": "m1", "choices": [{"index": 0, "finish_reason": finish, "message": {
            "role": "assistant", "content": text or None, "tool_calls": told}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3}}).encode()
    deltas = [chunk({"content": text})] if text else []
    deltas += [call_delta(place, f"c{place}", name, arguments[:3]) for place, (name, arguments) in enumerate(calls)]
    deltas += [call_delta(place, None, None, arguments[3:]) for place, (_, arguments) in enumerate(calls)]
    return sse([*deltas, chunk({}, finish)], end="[DONE]")


def given_blocks(stream: bool, wire: bytes, size: int = 0) -> Tuple[List[Any], str]:
    """The blocks that a Messages client gets of a chat answer, text or (id, name, input), and the stop reason."""
    lane = pg.TranslatedLane(MESSAGES, COMPLETIONS, messages_request(stream=stream), model(), STAMP)
    if not stream:
        body = json.loads(lane.whole(wire))
        return [block["text"] if block["type"] == "text" else (block["id"], block["name"], block["input"])
                for block in body["content"]], body["stop_reason"]
    pieces = [wire[at:at + size] for at in range(0, len(wire), size)] if size else [wire]
    out = b"".join(map(lane.feed, pieces)) + lane.end()
    check_messages_stream(out)
    blocks: Dict[int, List[Any]] = {}
    for event in (json.loads(line[6:]) for line in out.decode().split("\n") if line.startswith("data: ")):
        if event["type"] == "content_block_start":
            blocks[event["index"]] = [event["content_block"], ""]
        elif event["type"] == "content_block_delta":
            blocks[event["index"]][1] += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
        elif event["type"] == "message_delta":
            stop = event["delta"]["stop_reason"]
    assert list(blocks) == list(range(len(blocks)))
    return [text if block["type"] == "text" else (block["id"], block["name"], json.loads(text))
            for block, text in blocks.values()], stop


both_forms = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both_forms
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_arguments(name: str, stream: bool) -> None:
    written, expected = DAMAGES[name]
    blocks, stop = given_blocks(stream, calls_answer(stream, [("wx", written)], "tool_calls"))
    if expected is None:
        assert blocks == [shown_call("wx", written)] and stop == "end_turn"
    else:
        assert blocks == [("c0", "wx", json.loads(expected))] and stop == "tool_use"
    # a chat client gets what the model wrote
    asked = chat_request(stream=stream)
    lane = pg.TranslatedLane(CHAT, COMPLETIONS, asked, model(), STAMP)
    wire = calls_answer(stream, [("wx", written)], "tool_calls")
    out = lane.feed(wire) + lane.end() if stream else lane.whole(wire)
    shown = re.findall(r'"arguments":("(?:[^"\\]|\\.)*")', out.decode())
    assert "".join(map(json.loads, shown)) == (written or "{}")


@both_forms
@pytest.mark.parametrize("name", DAMAGES)
def test_a_sound_call_beside_a_damaged_one(name: str, stream: bool) -> None:
    written, expected = DAMAGES[name]
    sound = ("c1", "b", {"b": 2})
    for finish, stop_reason in (("tool_calls", "tool_use"), ("stop", "tool_use"), ("length", "max_tokens")):
        wire = calls_answer(stream, [("wx", written), ("b", '{"b": 2}')], finish, "Two.")
        blocks, stop = given_blocks(stream, wire)
        first = shown_call("wx", written) if expected is None else ("c0", "wx", json.loads(expected))
        assert blocks == ["Two.", first, sound] and stop == stop_reason
        turned = calls_answer(stream, [("b", '{"b": 2}'), ("wx", written)], finish)
        blocks, stop = given_blocks(stream, turned)
        if finish == "length" and not written.strip():      # it may have been about to write some
            assert blocks[1] == "[call of wx, cut off before its arguments]"
        else:
            assert blocks[1] == (first if expected is None else ("c1", "wx", json.loads(expected)))
        assert blocks[0] == ("c0", "b", {"b": 2}) and stop == stop_reason


@both_forms
@pytest.mark.parametrize("finish, stop", [("stop", "end_turn"), ("tool_calls", "end_turn"), ("length", "max_tokens"),
                                          ("content_filter", "refusal")])
def test_the_stop_reason_of_a_broken_call(finish: str, stop: str, stream: bool) -> None:
    blocks, given = given_blocks(stream, calls_answer(stream, [("wx", '{"a": "Par')], finish))
    assert blocks == [shown_call("wx", '{"a": "Par')] and given == stop


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "deep"])
def test_damaged_arguments_cut_anywhere(name: str) -> None:
    wire = calls_answer(True, [("wx", DAMAGES[name][0]), ("b", '{"b": 2}')], "tool_calls", "Two.")
    expected = given_blocks(True, wire)
    assert all(given_blocks(True, wire, size) == expected for size in (1, 2, 7))
    for at in range(0, len(wire), 1 if name in ("cut", "encoded twice") else 9):
        lane = pg.TranslatedLane(MESSAGES, COMPLETIONS, messages_request(stream=True), model(), STAMP)
        out = lane.feed(wire[:at]) + lane.feed(wire[at:]) + lane.end()
        assert lane.finished and not lane.error and out.count(b"content_block_start") == 2 * len(expected[0])


def test_what_a_held_call_holds_up() -> None:
    call, wx = pg.ToolCall("a", "f"), pg.ToolCall("b", "wx")
    done = pg.Done("tool_use", USAGE)
    sound = pg.SoundCalls()
    text = [pg.PartStart(0, pg.Text()), pg.PartDelta(0, "x")]
    assert sound.feed([pg.Start(), *text]) == [pg.Start(), *text]
    assert sound.feed([pg.PartStart(1, call), pg.PartDelta(1, "{"), pg.PartStart(2, wx)]) == []
    # an earlier part goes on; later ones wait, ended or not
    assert sound.feed([pg.PartDelta(0, "y"), pg.PartEnd(0, pg.Text("xy"))]) == [pg.PartDelta(0, "y"),
                                                                               pg.PartEnd(0, pg.Text("xy"))]
    ended = pg.replace(wx, arguments="{}")
    later = [pg.PartStart(3, pg.Text()), pg.PartDelta(3, "z")]
    assert sound.feed([pg.PartDelta(2, "{}"), pg.PartEnd(2, ended), *later]) == []
    broken = shown_call("f", "{")
    assert sound.feed([pg.PartEnd(1, pg.replace(call, arguments="{"))]) == [
        pg.PartStart(1, pg.Text()), pg.PartDelta(1, broken), pg.PartEnd(1, pg.Text(broken)),
        pg.PartStart(2, wx), pg.PartDelta(2, "{}"), pg.PartEnd(2, ended), *later]
    rest = [pg.PartDelta(3, "!"), pg.PartEnd(3, pg.Text("z!")), done]
    assert sound.feed(rest) == rest


def test_a_call_without_arguments_waits_for_what_follows() -> None:
    call = pg.ToolCall("a", "f")
    given = [pg.PartStart(0, call), pg.PartDelta(0, "{}"), pg.PartEnd(0, pg.replace(call, arguments="{}"))]
    sound, more = pg.SoundCalls(), pg.SoundCalls()
    assert sound.feed([pg.PartStart(0, call), pg.PartEnd(0, call)]) == []
    assert sound.feed([pg.Done("tool_use", USAGE)]) == [*given, pg.Done("tool_use", USAGE)]
    assert more.feed([pg.PartStart(0, call), pg.PartEnd(0, call), pg.PartStart(1, pg.Text())]) == [
        *given, pg.PartStart(1, pg.Text())]
    failed = pg.Failed(pg.UpstreamError("x"))
    assert pg.SoundCalls().feed([pg.PartStart(0, call), pg.PartEnd(0, call), failed]) == [failed]


@pytest.mark.parametrize("upstream", ["openai-responses", "anthropic-messages", "bedrock-converse-stream"])
def test_streams_of_careful_providers_are_not_held(upstream: str) -> None:
    protocol = pg.UPSTREAM_PROTOCOLS[upstream]
    assert not protocol.is_lax and pg.UPSTREAM_PROTOCOLS["mistral-conversations"].is_lax
    request = messages_request(stream=True)
    assert pg.TranslatedLane(MESSAGES, protocol, request, model(upstream), STAMP)._sound is None
    assert pg.TranslatedLane(MESSAGES, protocol, messages_request(), model(upstream), STAMP)._sound is not None


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "deep"])
def test_damaged_arguments_in_a_history(name: str) -> None:
    """What a chat client sends back goes out as it came; where it has to be an object, it is one all the same."""
    written, expected = DAMAGES[name]
    asked = chat_request(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": written}}]}])
    sent = built(asked, model())[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert sent == (written or "{}")
    given = built(asked, model("anthropic-messages"))[0]["messages"][1]["content"][0]["input"]
    assert given == ({"malformed_arguments": written} if expected is None else json.loads(expected))


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


def test_anthropic_lane_begins_with_message_start() -> None:
    lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, messages_request(stream=True), model("anthropic-messages"), STAMP)
    out = lane.feed(TRANSCRIPTS["no message_start"][1])
    assert check_messages_stream(out).text == "Hi"


@pytest.mark.parametrize("name", [name for name in ANTHROPIC_TRANSCRIPTS if name != "no message_start"])
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
    body = (b' {"type":"message","model" : "claude-m", "id":"msg_1","content":[{"type":"text","text":"\xc3\xa9"}],'
            b'"usage":{"input_tokens":3}}\n')
    lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, messages_request(), model("anthropic-messages"), STAMP)
    assert lane.whole(body) == body.replace(b"claude-m", b"p/m1") and lane.usage.input == 3


# An answer that claims success and holds nothing, or nothing that its protocol knows: (protocol, whole answer, the error)
NOTHING_SAID: List[Tuple[str, Dict[str, Any], Any]] = [
    ("openai-completions", {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}, pg.EmptyAnswer),
    ("openai-completions", {"choices": [{"message": {}}], "usage": {"completion_tokens": 0}}, pg.EmptyAnswer),
    ("openai-completions", {"choices": [{"message": {"content": None, "tool_calls": []}}]}, pg.EmptyAnswer),
    ("openai-completions", {"choices": [{"message": []}]}, pg.UpstreamProtocolError),
    ("openai-completions", {"choices": [{"message": {"content": {"text": "x"}}}]}, pg.UpstreamProtocolError),
    ("anthropic-messages", {"type": "message", "content": [], "stop_reason": "end_turn", "usage": {}}, pg.EmptyAnswer),
    ("anthropic-messages", {"type": "message", "content": [None]}, pg.UpstreamProtocolError),
    ("anthropic-messages", {"type": "message", "content": [{"type": []}], "usage": []}, pg.UpstreamProtocolError),
    ("openai-responses", {"id": "r", "status": "completed", "output": []}, pg.EmptyAnswer),
    ("bedrock-converse-stream", {"output": {"message": {"content": []}}, "stopReason": "end_turn"}, pg.EmptyAnswer),
]


@pytest.mark.parametrize("client", [CHAT, MESSAGES], ids=["chat", "messages"])
@pytest.mark.parametrize("protocol, answer, kind", NOTHING_SAID)
def test_an_answer_of_nothing_is_an_error(protocol: str, answer: Any, kind: Any, client: Any) -> None:
    upstream, request = pg.UPSTREAM_PROTOCOLS[protocol], chat_request() if client is CHAT else messages_request()
    for lane_type in {pg.choose_lane(client, upstream, request), pg.TranslatedLane}:
        lane = lane_type(client, upstream, request, model(protocol), STAMP)
        try:
            lane.whole(json.dumps(answer).encode())
        except pg.GatewayError as error:
            lane.error = error
        assert type(lane.error) is kind and not lane.started


@pytest.mark.parametrize("client, protocol, wire", [
    (CHAT, "openai-completions", sse([chunk({"role": "assistant", "content": ""}), chunk({}, "stop")], end="[DONE]")),
    (MESSAGES, "anthropic-messages", sse([
        {"type": "message_start", "message": {"id": "m", "type": "message", "content": []}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}], named=True))])
def test_a_stream_of_nothing_is_an_error(client: Any, protocol: str, wire: bytes) -> None:
    upstream, request = pg.UPSTREAM_PROTOCOLS[protocol], client_request(client)
    for lane_type in {pg.choose_lane(client, upstream, request), pg.TranslatedLane}:
        lane = lane_type(client, upstream, request, model(protocol), STAMP)
        lane.feed(wire)
        lane.end()
        assert type(lane.error) is pg.EmptyAnswer and not lane.started
        counted = lane.again()                  # the model had nothing to add, and that is an answer
        out = counted.feed(wire.replace(b'"message_delta"', b'"message_delta", "usage": {"output_tokens": 2}').replace(
            b'"finish_reason": "stop"}]', b'"finish_reason": "stop"}], "usage": {"completion_tokens": 2}'))
        assert counted.finished and counted.error is None and out


def test_events_whose_type_is_no_text_are_malformed() -> None:
    for event in ({"type": []}, {"type": {"a": 1}}):
        lane = pg.AnthropicLane(MESSAGES, ANTHROPIC, client_request(MESSAGES), model("anthropic-messages"), STAMP)
        lane.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
        assert type(lane.error) is pg.UpstreamProtocolError


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
        sent = json.loads(call.body.decode("utf-8"))            # without the mark, which is no JSON
        assert pg.clean_strings(sent) == {**data, "model": model_id}
        body = body[3:] if body.startswith(b"\xef\xbb\xbf") else body
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
    request = pg.replace(chat_request(), session="s\r\n1")
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
            assert each.protocol in pg.UPSTREAM_PROTOCOLS and each.provider == provider.name
            assert each.base_url or provider.source == "azure"      # whose address is the user's own
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
    assert read.providers["openai"].env == pg.PROVIDERS["openai"].env and pg.PROVIDERS["openai"].protocol == "openai-responses"


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


# ======================================================================================================================
# §10 Credentials
# ======================================================================================================================

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX system")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: Any) -> None:
    """The machine's own proxies are no part of the tests."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Clock:
    """A clock that the test moves."""

    def __init__(self, now: float = 1_760_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class LogLines(logging.Handler):
    """Keeps the gateway's log records; `wait` gives the first that fits, also one still to come."""

    def __init__(self) -> None:
        super().__init__()
        self.records: List[logging.LogRecord] = []
        self.changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self.changed:
            self.records.append(record)
            self.changed.notify_all()

    def find(self, fits: Callable[[logging.LogRecord], bool]) -> Optional[logging.LogRecord]:
        return next((record for record in self.records if fits(record)), None)

    def wait(self, fits: Callable[[logging.LogRecord], bool], limit_s: float = 5.0) -> logging.LogRecord:
        with self.changed:
            assert self.changed.wait_for(lambda: self.find(fits) is not None, limit_s), "no such log line"
            record = self.find(fits)
        assert record is not None
        return record

    def access(self, limit_s: float = 5.0) -> Dict[str, Any]:
        """The fields of the first access line."""
        return self.wait(lambda record: record.getMessage() == "access", limit_s).fields  # type: ignore[attr-defined]


@pytest.fixture
def lines() -> Iterator[LogLines]:
    """The gateway's log at debug level."""
    handler, level = LogLines(), pg.log.level
    pg.log.addHandler(handler)
    pg.log.setLevel(logging.DEBUG)
    yield handler
    pg.log.removeHandler(handler)
    pg.log.setLevel(level)


def until(holds: Callable[[], Any], limit_s: float = 5.0) -> Any:
    """What `holds` returns as soon as that is true; for conditions that nobody announces."""
    deadline = time.monotonic() + limit_s
    while True:
        value = holds()
        if value or time.monotonic() > deadline:
            assert value, "it did not come to that"
            return value
        time.sleep(0.005)


def credentials(folder: Any, auth: Any = None, environ: Optional[Dict[str, str]] = None,
                clock: Callable[[], float] = time.time) -> pg.Credentials:
    """A credential store over an auth.json with that content."""
    path = os.path.join(str(folder), "auth.json")
    if auth is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(auth if isinstance(auth, str) else json.dumps(auth))
    return pg.Credentials(path, environ or {}, clock)


def provider(name: str = "p", **facts: Any) -> pg.Provider:
    """A provider row."""
    return pg.Provider(name, facts.pop("endpoints", {"openai-completions": "http://127.0.0.1:9/v1"}), **facts)


def token_of(store: pg.Credentials, row: pg.Provider) -> str:
    """The secret that a call to this provider would be sent with."""
    return store.get(row, pg.unlisted_model(row, "m1")).token


VALUE_ENVIRON = {"KEY_A": "alpha", "KEY_B": "beta", "EMPTY": "", "lower": "low"}


@pytest.mark.parametrize("value, expected", [
    ("sk-literal", "sk-literal"),
    ("  sk-blanks \n", "sk-blanks"),
    ("$KEY_A", "alpha"),
    ("${KEY_A}", "alpha"),
    ("pre-$KEY_A-${KEY_B}.end", "pre-alpha-beta.end"),
    ("${KEY_A}${KEY_B}", "alphabeta"),
    ("cost$$5", "cost$5"),
    ("$$KEY_A", "$KEY_A"),
    ("$!echo", "!echo"),
    ("$MISSING", None),
    ("$KEY_A-$MISSING", None),
    ("${EMPTY}", None),
    ("${bad-name}", "${bad-name}"),
    ("lone $ sign", "lone $ sign"),
    ("end$", "end$"),
    ("${KEY_A", "${KEY_A"),
    ("$1abc", "$1abc"),
    ("KEY_A", "alpha"),
    ("lower", "low"),
    ("KEY_MISSING", "KEY_MISSING"),
    ("EMPTY", "EMPTY"),
    ("", None),
    ("   ", None),
    ("!echo sk-from-command", "sk-from-command"),
    ("!printf '  two words  \\n\\n'", "two words"),
    ("!exit 3", None),
    ("!echo out; exit 1", None),
    ("!true", None),
    ("!no-such-program-here", None),
    ("!echo warned >&2; echo sk-out", "sk-out"),
    ("!cat", None),
])
def test_value_forms(tmp_path: Any, value: str, expected: Optional[str]) -> None:
    if os.name == "nt" and value.startswith("!"):
        pytest.skip("a POSIX shell's commands")
    assert credentials(tmp_path, environ=VALUE_ENVIRON).resolve(value) == expected


def test_value_of_entry_env_wins(tmp_path: Any) -> None:
    entry = {"env": {"KEY_A": "own", "EMPTY": "filled", "KEY_B": ""}}
    store = credentials(tmp_path, environ=VALUE_ENVIRON)
    assert store.resolve("$KEY_A-$EMPTY-$KEY_B", entry) == "own-filled-beta"


def test_all_caps_literal_warns_once(tmp_path: Any, lines: LogLines) -> None:
    store = credentials(tmp_path)
    for _ in range(3):
        assert store.resolve("MY_SECRET_KEY") == "MY_SECRET_KEY"
    warnings = [record.getMessage() for record in lines.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "$MY_SECRET_KEY" in warnings[0]


@POSIX
def test_command_results_are_kept(tmp_path: Any) -> None:
    clock, count = Clock(), tmp_path / "count"
    store = credentials(tmp_path, clock=clock)
    command = f"!echo x >> '{count}'; echo sk-made"
    failing = f"!echo x >> '{count}'; exit 1"

    def runs() -> int:
        return len(count.read_text().split()) if count.exists() else 0

    assert [store.resolve(command) for _ in range(3)] == ["sk-made"] * 3 and runs() == 1
    assert [store.resolve(failing) for _ in range(3)] == [None] * 3 and runs() == 2
    clock.now += pg.COMMAND_TIMEOUT_S + 1           # a failure is forgotten sooner than a key
    assert store.resolve(failing) is None and store.resolve(command) == "sk-made" and runs() == 3
    clock.now += pg.COMMAND_CACHE_S + 1
    assert store.resolve(command) == "sk-made" and runs() == 4


@POSIX
def test_command_that_hangs(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "COMMAND_TIMEOUT_S", 0.15)
    store = credentials(tmp_path, clock=Clock())
    started = time.monotonic()
    assert [store.resolve("!exec sleep 20") for _ in range(3)] == [None] * 3
    assert time.monotonic() - started < 2.0        # the failure was kept, too


@pytest.mark.parametrize("auth, api_key, environ, expected", [
    ({"p": {"type": "api_key", "key": "sk-auth"}}, "sk-models", {"P_KEY": "sk-env"}, "sk-auth"),
    ({}, "sk-models", {"P_KEY": "sk-env"}, "sk-models"),
    ({}, None, {"P_KEY": "sk-env"}, "sk-env"),
    ({}, "$MISSING", {"P_KEY": "sk-env"}, "sk-env"),
    ({"p": {"type": "api_key", "key": "$MISSING"}}, "sk-models", {"P_KEY": "sk-env"}, "sk-env"),
    ({"p": {"type": "api_key", "env": {"P_KEY": "sk-own"}}}, None, {"P_KEY": "sk-env"}, "sk-own"),
    ({"other": {"type": "api_key", "key": "sk-other"}}, None, {"P_KEY": "sk-env"}, "sk-env"),
    ({"p": {"type": "oauth", "access": "at-1", "refresh": "r", "expires": 9e15}}, "sk-models", {"P_KEY": "e"}, "at-1"),
    ({"p": "not an object"}, None, {"P_KEY": "sk-env"}, "sk-env"),
    ({"p": {"type": "api_key", "key": 5}}, None, {"P_KEY": "sk-env"}, "sk-env"),
    ("", None, {"P_KEY": "sk-env"}, "sk-env"),
    ("\ufeff" + json.dumps({"p": {"type": "api_key", "key": "sk-bom"}}), None, {}, "sk-bom"),
])
def test_precedence(tmp_path: Any, monkeypatch: Any, auth: Any, api_key: Optional[str], environ: Dict[str, str],
                    expected: str) -> None:
    monkeypatch.setattr(pg, "AUTH_PAUSE_S", 0.001)
    assert token_of(credentials(tmp_path, auth, environ), provider(env=("P_KEY",), api_key=api_key)) == expected


def test_no_auth_file(tmp_path: Any) -> None:
    assert token_of(credentials(tmp_path, None, {"P_KEY": "sk-env"}), provider(env=("P_KEY",))) == "sk-env"
    assert not os.listdir(tmp_path)                # a reader makes no file


def test_env_order_for_anthropic(tmp_path: Any) -> None:
    row = pg.PROVIDERS["anthropic"]
    both = {"ANTHROPIC_OAUTH_TOKEN": "sk-ant-oat01-plan", "ANTHROPIC_API_KEY": "sk-ant-api03-key"}
    assert token_of(credentials(tmp_path, None, both), row) == "sk-ant-oat01-plan"
    assert credentials(tmp_path, None, both).is_subscription(row)
    del both["ANTHROPIC_OAUTH_TOKEN"]
    assert token_of(credentials(tmp_path, None, both), row) == "sk-ant-api03-key"
    assert not credentials(tmp_path, None, both).is_subscription(row)


def test_keyless_provider_needs_nothing(tmp_path: Any) -> None:
    row = provider(keyless=True)
    credential = credentials(tmp_path).get(row, pg.unlisted_model(row, "m1"))
    assert (credential.kind, credential.token) == ("none", "")


def test_sentinel_is_never_a_key(tmp_path: Any) -> None:
    store = credentials(tmp_path, {"p": {"type": "api_key", "key": pg.SENTINEL}})
    for row in (provider(), provider(keyless=True)):
        with pytest.raises(pg.Unauthorized):
            token_of(store, row)


def test_placeholders(tmp_path: Any) -> None:
    row = pg.PROVIDERS["cloudflare-workers-ai"]
    url = row.endpoints["openai-completions"]
    entry = {row.name: {"type": "api_key", "key": "cf-key", "env": {"CLOUDFLARE_ACCOUNT_ID": "acc-own"}}}
    store = credentials(tmp_path, entry, {"CLOUDFLARE_ACCOUNT_ID": "acc-env"})
    assert store.usable(row) and "/accounts/acc-own/ai" in store.fill(url, row)
    store = credentials(tmp_path, {}, {"CLOUDFLARE_API_KEY": "k", "CLOUDFLARE_ACCOUNT_ID": "acc-env"})
    assert store.usable(row) and "/accounts/acc-env/ai" in store.fill(url, row)
    assert not credentials(tmp_path, {}, {"CLOUDFLARE_API_KEY": "k"}).usable(row)


@pytest.mark.parametrize("auth, row, words", [
    ({}, provider("groq", env=("GROQ_API_KEY",)), ['"groq"', "GROQ_API_KEY"]),
    ({}, pg.PROVIDERS["anthropic"], ['"anthropic"', "ANTHROPIC_API_KEY"]),
    ({"p": {"type": "api_key", "key": "$GONE"}}, provider(), ['"p"', "resolves to nothing"]),
    ({}, provider(api_key="!exit 1"), ['"p"', "resolves to nothing"]),
    ({"p": {"type": "oauth", "access": "at", "refresh": "r", "expires": 1000}}, provider(),
     ['"p"', "expired", "log in"]),
], ids=["variable", "two variables", "auth.json", "models.json", "expired"])
def test_no_credentials_says_what_to_do(tmp_path: Any, auth: Any, row: pg.Provider, words: List[str]) -> None:
    with pytest.raises(pg.Unauthorized) as raised:
        token_of(credentials(tmp_path, auth), row)
    assert raised.value.code == "no_credentials" and raised.value.status == 401
    for word in words:
        assert word in raised.value.message


def test_oauth_entry_is_used_as_it_stands(tmp_path: Any) -> None:
    clock = Clock()
    entry = {"type": "oauth", "access": "at-secret", "refresh": "r", "expires": (clock.now + 1) * 1000}
    store = credentials(tmp_path, {"p": entry}, clock=clock)
    credential = store.get(provider(), pg.unlisted_model(provider(), "m1"))
    assert (credential.kind, credential.token) == ("oauth", "at-secret") and store.is_subscription(provider())
    assert "at-secret" not in repr(credential)
    clock.now += 2
    with pytest.raises(pg.Unauthorized):
        token_of(store, provider())


def test_headers_of_provider_and_model(tmp_path: Any) -> None:
    row = provider(env=("P_KEY",), headers={"X-Team": "$TEAM", "X-Same": "provider"}, auth_header=True)
    target = pg.unlisted_model(row, "m1")
    target = pg.replace(target, headers={**target.headers, "X-Same": "model"})
    store = credentials(tmp_path, {}, {"P_KEY": "sk-1", "TEAM": "red"})
    headers = {name.lower(): value for name, value in store.get(row, target).headers.items()}
    assert headers == {"x-team": "red", "x-same": "model", "authorization": "Bearer sk-1"}
    with pytest.raises(pg.Unauthorized, match="X-Team"):
        credentials(tmp_path, {}, {"P_KEY": "sk-1"}).get(row, target)


def test_file_in_the_middle_of_a_rewrite(tmp_path: Any) -> None:
    store = credentials(tmp_path, {"p": {"type": "api_key", "key": "sk-old"}})
    assert token_of(store, provider()) == "sk-old"
    text = json.dumps({"p": {"type": "api_key", "key": "sk-new"}})
    is_torn = threading.Event()

    def rewrite() -> None:
        with open(tmp_path / "auth.json", "w", encoding="utf-8") as file:   # truncates, as pi does
            time.sleep(0.02)
            file.write(text[:len(text) // 2])
            file.flush()
            is_torn.set()
            time.sleep(0.05)
            file.write(text[len(text) // 2:])

    thread = threading.Thread(target=rewrite)
    thread.start()
    seen = set()
    while thread.is_alive():
        seen.add(token_of(store, provider()))
    thread.join()
    assert is_torn.is_set() and seen <= {"sk-old", "sk-new"}
    assert token_of(store, provider()) == "sk-new"


def test_broken_file_keeps_what_was_read(tmp_path: Any, lines: LogLines, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "AUTH_PAUSE_S", 0.001)
    store = credentials(tmp_path, {"p": {"type": "api_key", "key": "sk-good"}})
    assert token_of(store, provider()) == "sk-good"
    for broken in ('{"p": {"type": "api_key", "key": "sk-secr', "[1]", "\x00\x01", '{"p": {}} trailing'):
        credentials(tmp_path, broken)
        assert token_of(store, provider()) == "sk-good"
    assert lines.find(lambda record: "auth.json" in record.getMessage() and record.levelno == logging.WARNING)
    assert not lines.find(lambda record: "sk-secr" in record.getMessage())
    credentials(tmp_path, {"p": {"type": "api_key", "key": "sk-mended"}})
    assert token_of(store, provider()) == "sk-mended"


def test_changes_are_picked_up(tmp_path: Any) -> None:
    store = credentials(tmp_path, {})
    assert not store.usable(provider())
    for key in ("sk-1", "sk-2", "sk-3-longer", "sk-4"):
        credentials(tmp_path, {"p": {"type": "api_key", "key": key}})
        assert token_of(store, provider()) == key
    replacement = tmp_path / "other.json"
    replacement.write_text(json.dumps({"p": {"type": "api_key", "key": "sk-5"}}))
    os.replace(replacement, tmp_path / "auth.json")
    assert token_of(store, provider()) == "sk-5"
    os.unlink(tmp_path / "auth.json")
    assert not store.usable(provider())


# ======================================================================================================================
# §11 HTTP client
# ======================================================================================================================


class RawServer:
    """A TCP server whose answers are written by hand: `serve(sock, number)` gets each connection on a thread."""

    def __init__(self, serve: Callable[[socket.socket, int], None]) -> None:
        self.connections = 0
        self.requests: List[bytes] = []
        self._serve = serve
        self._sockets: List[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(sock)
                self.connections += 1
                threading.Thread(target=self._run, args=(sock, self.connections), daemon=True).start()

    def _run(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), sock:
            self._serve(sock, number)

    def read(self, sock: socket.socket) -> bytes:
        """One request with a Content-Length body, b"" at the end."""
        data = b""
        while True:
            head, blank, rest = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if blank and len(rest) >= int(length.group(1) if length else 0):
                self.requests.append(data)
                return data
            piece = sock.recv(65536)
            if not piece:
                return b""
            data += piece

    def close(self) -> None:
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@contextlib.contextmanager
def raw_server(serve: Callable[[RawServer, socket.socket, int], None]) -> Iterator[RawServer]:
    """A hand-written server for the length of a `with`."""
    holder: List[RawServer] = []
    holder.append(RawServer(lambda sock, number: serve(holder[0], sock, number)))
    try:
        yield holder[0]
    finally:
        holder[0].close()


def http_answer(body: bytes, headers: str = "", status: str = "200 OK") -> bytes:
    """An HTTP/1.1 answer with a length."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def fetch(transport: pg.Transport, url: str, method: str = "POST", **headers: str) -> Tuple[int, bytes]:
    """One call over a transport: status and body."""
    scope = pg.Scope()
    url += "/" if url.count("/") == 2 else ""
    response = transport.open(pg.Call(method, url, headers, b"{}" if method == "POST" else b""), scope)
    try:
        return response.status, response.read(1 << 20)
    finally:
        response.close()


@contextlib.contextmanager
def transport(**limits: float) -> Iterator[pg.Transport]:
    """A transport for the length of a `with`."""
    made = pg.Transport(pg.Limits(**limits))
    try:
        yield made
    finally:
        made.close()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


CHAT_CHUNKS = [{"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m1", "choices": [choice]}
               for choice in ({"index": 0, "delta": {"role": "assistant", "content": "Hel"}, "finish_reason": None},
                              {"index": 0, "delta": {"content": "lo"}, "finish_reason": None},
                              {"index": 0, "delta": {}, "finish_reason": "stop"})]
CHAT_STREAM = sse(CHAT_CHUNKS, end="[DONE]")
CHAT_WHOLE = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m1", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
ANTH_EVENTS = [
    {"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "m1",
                                          "content": [], "stop_reason": None, "stop_sequence": None,
                                          "usage": {"input_tokens": 3, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
     "usage": {"output_tokens": 2}},
    {"type": "message_stop"}]
ANTH_STREAM = sse(ANTH_EVENTS, named=True)
ANTH_WHOLE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m1", "stop_reason": "end_turn",
              "stop_sequence": None, "content": [{"type": "text", "text": "Hello"}],
              "usage": {"input_tokens": 3, "output_tokens": 2}}
STREAMS = {"chat": CHAT_STREAM, "anth": ANTH_STREAM}
WHOLES: Dict[str, Any] = {"chat": CHAT_WHOLE, "anth": ANTH_WHOLE}
WAY_IN = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}
# client protocol and provider of each way through the gateway
WAYS = [("chat", "chat"), ("chat", "anth"), ("messages", "chat"), ("messages", "anth")]


def stream_answer(protocol: str) -> Answer:
    """A good streamed answer."""
    return Answer(200, [STREAMS[protocol]], "text/event-stream")


def whole_answer(protocol: str) -> Answer:
    """A good whole answer."""
    return Answer(200, json.dumps(WHOLES[protocol]).encode())


def question(row: str, stream: bool = False, **fields: Any) -> Dict[str, Any]:
    """A small request that both client protocols take."""
    return {"model": f"{row}/m1", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], "stream": stream,
            **fields}


def answer_text(result: Result) -> str:
    """The text of an answer, streamed or whole, in either dialect."""
    if "event-stream" not in result.headers["content-type"]:
        data = result.json
        return data["choices"][0]["message"]["content"] if "choices" in data else data["content"][0]["text"]
    out = ""
    for event in result.events:
        if isinstance(event, dict):
            out += "".join(choice["delta"].get("content") or "" for choice in event.get("choices") or ())
            out += event.get("delta", {}).get("text", "")
    return out


def is_clean_end(client: str, result: Result) -> bool:
    """Whether a stream ends as its client takes for success."""
    if client == "chat":
        return bool(result.events) and result.events[-1] == "[DONE]"
    return bool(result.events) and result.events[-1]["type"] == "message_stop"


def stream_failure(client: str, result: Result) -> Dict[str, Any]:
    """The error at the end of a stream that failed, checked to be what its client takes for one."""
    assert result.status == 200 and "[DONE]" not in result.events
    last = result.events[-1]
    if client == "messages":
        assert last["type"] == "error" and b"event: error\n" in result.body
        assert not any(event["type"] == "message_stop" for event in result.events)
    else:
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert not any(choice["finish_reason"] for event in result.events for choice in event.get("choices") or ())
    assert last["error"]["message"] and last["error"]["type"]
    return last["error"]


@contextlib.contextmanager
def serving(home: Any, *answers: Any, environ: Optional[Dict[str, str]] = None,
            **overrides: Any) -> Iterator[Tuple[pg.ServerHandle, FakeUpstream]]:
    """A gateway before a fake provider that is `chat` and `anth`."""
    with fake_upstream(*answers) as fake:
        write_agent_files(home, models=two_providers(fake.url))
        with running(home, environ, **overrides) as handle:
            yield handle, fake


@contextlib.contextmanager
def before_url(home: Any, url: str, environ: Optional[Dict[str, str]] = None,
               **overrides: Any) -> Iterator[pg.ServerHandle]:
    """A gateway before a provider at that URL."""
    write_agent_files(home, models=two_providers(url))
    with running(home, environ, **overrides) as handle:
        yield handle


class RawClient:
    """A connection on which the bytes of requests are written by hand; answers are read one at a time."""

    def __init__(self, url: str) -> None:
        split = urllib.parse.urlsplit(url)
        self.netloc = split.netloc
        self.sock = socket.create_connection((split.hostname, split.port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, method: str, path: str, body: Optional[bytes] = None, *lines: str) -> Result:
        """A well-formed request and its answer."""
        head = [f"{method} {path} HTTP/1.1", f"Host: {self.netloc}", *lines]
        if body is not None:
            head.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join(head).encode() + b"\r\n\r\n" + (body or b""))
        result = self.answer(has_body=method != "HEAD")
        assert result is not None
        return result

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            data = b""
        self._buffer += data
        return bool(data)

    def _take(self, mark: bytes) -> Optional[bytes]:
        while mark not in self._buffer:
            if not self._more():
                return None
        taken, _, self._buffer = self._buffer.partition(mark)
        return taken

    def answer(self, has_body: bool = True) -> Optional[Result]:
        """The next answer, None when the connection ended instead."""
        head = self._take(b"\r\n\r\n")
        if head is None:
            assert not self._buffer, "half an answer"
            return None
        start, *lines = head.decode("latin-1").split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) .+", start).group(1))  # type: ignore[union-attr]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = b""
        if not has_body or status in (100, 204):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while True:
                size = int(self._take(b"\r\n") or b"x", 16)
                while len(self._buffer) < size + 2:
                    assert self._more()
                body, self._buffer = body + self._buffer[:size], self._buffer[size + 2:]
                if not size:
                    break
        elif "content-length" in headers:
            while len(self._buffer) < int(headers["content-length"]):
                assert self._more(), "half a body"
            size = int(headers["content-length"])
            body, self._buffer = self._buffer[:size], self._buffer[size:]
        else:
            while self._more():
                pass
            body, self._buffer = self._buffer, b""
        return Result(status, headers, body)

    def is_closed(self) -> bool:
        """Whether the server has closed, or does so now."""
        return not self._buffer and not self._more()


def test_connections_are_kept(tmp_path: Any) -> None:
    answers = [stream_answer("chat"), whole_answer("chat"), Answer(429, b"{}"), stream_answer("chat"),
               Answer(500, b'{"error":{"message":"x"}}'), whole_answer("chat")]
    with serving(tmp_path, *answers) as (handle, fake):
        with RawClient(handle.url) as client:       # one thread: the next call begins when the last is put away
            bodies = [json.dumps(question("chat", stream)).encode() for stream in (True, False, False, True, False,
                                                                                   False)]
            assert [client.ask("POST", WAY_IN["chat"], body).status for body in bodies] == [200, 200, 429, 200, 502,
                                                                                            200]
        assert (fake.connections, len(fake.received)) == (1, 6)


def test_stream_with_a_length_keeps_its_connection(tmp_path: Any) -> None:
    with serving(tmp_path, Answer(200, CHAT_STREAM, "text/event-stream")) as (handle,
                                                                              fake), RawClient(handle.url) as client:
        for _ in range(2):
            assert answer_text(client.ask("POST", WAY_IN["chat"],
                                          json.dumps(question("chat", True)).encode())) == "Hello"
        assert (fake.connections, len(fake.received)) == (1, 2)


def test_chunked_stream_keeps_connection(tmp_path: Any) -> None:
    pieces = [CHAT_STREAM[:50], CHAT_STREAM[50:]]
    with serving(tmp_path, Answer(200, pieces, "text/event-stream")) as (handle, fake), RawClient(handle.url) as raw:
        for client in ("chat", "messages", "chat"):
            assert answer_text(raw.ask("POST", WAY_IN[client], json.dumps(question("chat", True)).encode())) == "Hello"
        assert (fake.connections, len(fake.received)) == (1, 3)


def test_connection_close_is_respected() -> None:
    with fake_upstream(Answer(200, b"{}", headers={"Connection": "close"})) as fake, transport() as made:
        assert [fetch(made, fake.url)[0] for _ in range(3)] == [200] * 3
        assert fake.connections == 3


def test_idle_connection_closed_by_the_provider() -> None:
    is_closed = threading.Event()

    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        sock.sendall(http_answer(b"one"))
        sock.shutdown(socket.SHUT_RDWR)
        is_closed.set()

    with raw_server(serve) as server, transport() as made:
        for turn in range(3):
            is_closed.clear()
            assert fetch(made, server.url) == (200, b"one")
            assert is_closed.wait(5)
        assert (server.connections, len(server.requests)) == (3, 3)


def test_kept_connection_that_dies_under_a_request_is_replaced_once() -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        sock.sendall(http_answer(b"%d" % number))
        server.read(sock)                           # and closes without a word

    with raw_server(serve) as server, transport() as made:
        assert fetch(made, server.url) == (200, b"1")
        assert fetch(made, server.url) == (200, b"2")
        assert (server.connections, len(server.requests)) == (2, 3)


def test_fresh_connection_that_dies_is_not_tried_again() -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)

    with raw_server(serve) as server, transport() as made:
        with pytest.raises(pg.UpstreamError, match="without an answer"):
            fetch(made, server.url)
        assert (server.connections, len(server.requests)) == (1, 1)


@pytest.mark.parametrize("start", [b"H", b"HTTP/1.1 200 OK\r\nContent-Le",
                                   b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"],
                         ids=["one byte", "half a head", "half a body"])
def test_no_retry_once_a_byte_was_answered(start: bytes) -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        sock.sendall(http_answer(b"fine"))
        server.read(sock)
        sock.sendall(start)

    with raw_server(serve) as server, transport() as made:
        assert fetch(made, server.url) == (200, b"fine")
        with pytest.raises(pg.UpstreamProtocolError):
            fetch(made, server.url)
        assert (server.connections, len(server.requests)) == (1, 2)


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_connection_refused(tmp_path: Any, client: str) -> None:
    port = closed_port()
    with before_url(tmp_path, f"http://127.0.0.1:{port}") as handle:
        result = call(handle.url, WAY_IN[client], question("chat"))
    assert result.status == 502 and f"127.0.0.1:{port}" in result.json["error"]["message"]
    code = result.json["error"]["code"] if client == "chat" else result.json["error"]["details"]["error_code"]
    assert code == "connection_error"


def test_unknown_host_is_a_502_in_words(tmp_path: Any) -> None:
    with before_url(tmp_path, "http://no-such-host.invalid") as handle:
        result = call(handle.url, WAY_IN["chat"], question("chat"))
    assert result.status == 502 and "no-such-host.invalid" in result.json["error"]["message"]


@pytest.mark.parametrize("client, kind", [("chat", "server_error"), ("messages", "timeout_error")])
def test_first_byte_limit(tmp_path: Any, client: str, kind: str) -> None:
    hold = threading.Event()

    def silent(request: Received) -> Answer:
        hold.wait(10)
        return whole_answer("chat")

    with serving(tmp_path, silent, first_byte_timeout_ms=100) as (handle, _):
        started = time.monotonic()
        result = call(handle.url, WAY_IN[client], question("chat"))
        assert time.monotonic() - started < 3
        hold.set()
    assert (result.status, result.json["error"]["type"]) == (504, kind)


@pytest.mark.parametrize("client, row", WAYS)
def test_idle_limit_in_mid_stream(tmp_path: Any, client: str, row: str) -> None:
    cut = STREAMS[row].index(b"lo\"")
    pieces = [STREAMS[row][:STREAMS[row].rindex(b"\n\n", 0, cut) + 2], None]
    with serving(tmp_path, Answer(200, pieces, "text/event-stream"), idle_timeout_ms=100) as (handle, fake):
        result = call(handle.url, WAY_IN[client], question(row, True))
        fake.release.set()
    assert answer_text(result) == "Hel"
    assert stream_failure(client, result)["type"] == {"chat": "server_error", "messages": "timeout_error"}[client]


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (7,), (1, 40), (65536,)])
def test_chunked_answers_in_odd_pieces(sizes: Tuple[int, ...]) -> None:
    body = bytes(range(256)) * 2
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
    wire += b"".join(b"%X ;ext=\"a\"\r\n%b\r\n" % (len(piece), piece) for piece in (body[:1], body[1:300], body[300:]))
    wire += b"000\r\nTrailer: x\r\n\r\n"

    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        while server.read(sock):
            place, turn = 0, 0
            while place < len(wire):
                sock.sendall(wire[place:place + sizes[turn % len(sizes)]])
                place, turn = place + sizes[turn % len(sizes)], turn + 1

    with raw_server(serve) as server, transport() as made:
        assert fetch(made, server.url) == (200, body)
        assert fetch(made, server.url) == (200, body)
        assert server.connections == 1


@pytest.mark.parametrize("coding, bits", [("gzip", 31), ("x-gzip", 31), ("deflate", 15), ("GZIP", 31)])
def test_compressed_answers(coding: str, bits: int) -> None:
    import zlib
    packer = zlib.compressobj(9, zlib.DEFLATED, bits)
    packed = packer.compress(CHAT_STREAM) + packer.flush()
    for body in (packed, [packed[:5], packed[5:6], packed[6:]]):
        with fake_upstream(Answer(200, body, headers={"Content-Encoding": coding})) as fake, transport() as made:
            assert fetch(made, fake.url) == (200, CHAT_STREAM)


@pytest.mark.parametrize("before", ["HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
                                    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"])
@pytest.mark.parametrize("is_apart", [False, True])
def test_interim_answers_are_skipped(before: str, is_apart: bool) -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        while server.read(sock):
            parts = [before.encode(), http_answer(b"final")]
            for data in parts if is_apart else [b"".join(parts)]:
                sock.sendall(data)

    with raw_server(serve) as server, transport() as made:
        assert [fetch(made, server.url) for _ in range(2)] == [(200, b"final")] * 2
        assert server.connections == 1


@pytest.mark.parametrize("wire", [
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/2 200\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\n: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"])
def test_malformed_answers(wire: bytes) -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        sock.sendall(wire)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(10)

    with raw_server(serve) as server, transport() as made, pytest.raises(pg.UpstreamProtocolError):
        fetch(made, server.url)


def test_body_that_ends_with_its_connection() -> None:
    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall ")
        sock.sendall(b"of it")

    with raw_server(serve) as server, transport() as made:
        assert [fetch(made, server.url) for _ in range(2)] == [(200, b"all of it")] * 2
        assert server.connections == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_redirects_are_never_followed(script: Any, status: int) -> None:
    with fake_upstream(whole_answer("chat")) as target:
        handle, fake = script(Answer(status, b"", headers={"Location": target.url + "/v1/chat/completions"}))
        result = call(handle.url, WAY_IN["chat"], question("chat"))
        assert result.status == 502 and "redirect" in result.json["error"]["message"]
        assert len(fake.received) == 1 and not target.received


@pytest.mark.parametrize("headers", [{"x-a": "1\r\nx-evil: 2"}, {"x-a": "1\nx-evil: 2"}, {"x-a": "1\r2"},
                                     {"x-a": "1\0"},
                                     {"x-a\r\nx-evil": "2"}, {"x-a: 1\r\nx-evil": "2"}])
def test_header_injection_is_refused(headers: Dict[str, str]) -> None:
    with fake_upstream(Answer(200, b"{}")) as fake, transport() as made:
        with pytest.raises(pg.GatewayError):
            made.open(pg.Call("POST", fake.url + "/x", headers, b"{}"), pg.Scope())
        assert not fake.received and not fake.connections


@POSIX
def test_key_with_a_line_break_is_refused_without_showing_it(tmp_path: Any) -> None:
    with fake_upstream(whole_answer("chat")) as fake:
        models = two_providers(fake.url)
        models["providers"]["chat"]["apiKey"] = "!printf 'plain-secret\\nx-evil: 1'"
        write_agent_files(tmp_path, models=models)
        with running(tmp_path) as handle:
            result = call(handle.url, WAY_IN["chat"], question("chat"))
        assert result.status >= 400 and b"plain-secret" not in result.body and not fake.received


# --- Proxies and TLS --------------------------------------------------------------------------------------------------


class Proxy(RawServer):
    """A small HTTP proxy: forwards absolute-form requests to `target`, and tunnels CONNECT to it."""

    def __init__(self, target_port: int = 0, refusal: bytes = b"") -> None:
        self.target_port = target_port
        self.refusal = refusal
        super().__init__(self._forward)

    def _forward(self, sock: socket.socket, number: int) -> None:
        while True:
            request = self.read(sock)
            if not request:
                return
            if self.refusal:
                sock.sendall(self.refusal)
                return
            upstream = socket.create_connection(("127.0.0.1", self.target_port))
            if request.startswith(b"CONNECT "):
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                threading.Thread(target=self._pump, args=(upstream, sock), daemon=True).start()
                self._pump(sock, upstream)
                return
            upstream.sendall(request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n", 1))
            self._pump(upstream, sock)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def proxy(*arguments: Any) -> Iterator[Proxy]:
    """A proxy for the length of a `with`."""
    server = Proxy(*arguments)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: Any) -> Tuple[str, str]:
    """(certificate, key) files of a self-signed certificate for localhost."""
    program = shutil.which("openssl")
    if not program:
        pytest.skip("no openssl program")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    done = subprocess.run([program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
                           "-days",
                           "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        pytest.skip("openssl makes no such certificate")
    return cert, key


@contextlib.contextmanager
def tls_upstream(certificate: Tuple[str, str], *answers: Any) -> Iterator[FakeUpstream]:
    """A scripted provider that speaks TLS; `url` says localhost."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with fake_upstream(*answers) as fake:
        fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
        fake.url = f"https://localhost:{fake.server.server_address[1]}"
        yield fake


def test_proxy_for_http(monkeypatch: Any) -> None:
    with fake_upstream(Answer(200, b"from afar")) as fake, proxy(fake.server.server_address[1]) as between:
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@127.0.0.1:{between.port}")
        with transport() as made:
            assert fetch(made, "http://provider.invalid/v1/x?y=1") == (200, b"from afar")
        request = between.requests[0]
        assert request.startswith(b"POST http://provider.invalid/v1/x?y=1 HTTP/1.1\r\nHost: provider.invalid\r\n")
        assert b"Basic " + base64.b64encode(b"user:p@ss") in request
        assert fake.received[0].headers["host"] == "provider.invalid"


def test_no_proxy(monkeypatch: Any) -> None:
    with fake_upstream(Answer(200, b"direct")) as fake, proxy(0, http_answer(b"", status="503 No")) as between:
        monkeypatch.setenv("http_proxy", between.url)
        monkeypatch.setenv("no_proxy", "example.com,127.0.0.1")
        with transport() as made:
            assert fetch(made, fake.url) == (200, b"direct")
        assert not between.connections


@pytest.mark.parametrize("how", ["SSL_CERT_FILE", "caBundle", "REQUESTS_CA_BUNDLE"])
def test_tls_with_a_private_authority(tmp_path: Any, monkeypatch: Any, certificate: Tuple[str, str], how: str) -> None:
    environ, overrides = {}, {}
    if how == "caBundle":
        overrides["ca_bundle"] = certificate[0]
    else:
        environ[how] = certificate[0]
        monkeypatch.setenv(how, certificate[0])
    with tls_upstream(certificate, stream_answer("chat")) as fake:
        with before_url(tmp_path, fake.url, environ, **overrides) as handle, RawClient(handle.url) as client:
            for _ in range(2):
                assert answer_text(client.ask("POST", WAY_IN["chat"],
                                              json.dumps(question("chat", True)).encode())) == "Hello"
        assert fake.connections == 1


def test_tls_provider_that_takes_its_time(tmp_path: Any, monkeypatch: Any, certificate: Tuple[str, str]) -> None:
    """TLS 1.3 session tickets make the socket readable before there is an answer; that must not end the wait for one."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    slow = stream_answer("chat")._replace(body=[0.3, stream_answer("chat").body if isinstance(
        stream_answer("chat").body, bytes) else b"".join(stream_answer("chat").body)])
    with tls_upstream(certificate, slow) as fake:
        with before_url(tmp_path, fake.url, heartbeat_interval_ms=50) as handle, RawClient(handle.url) as client:
            result = client.ask("POST", WAY_IN["chat"], json.dumps(question("chat", True)).encode())
    assert answer_text(result) == "Hello" and result.body.count(b": heartbeat") >= 2


def test_proxy_for_https(tmp_path: Any, monkeypatch: Any, certificate: Tuple[str, str]) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with tls_upstream(certificate, whole_answer("chat")) as fake, proxy(fake.server.server_address[1]) as between:
        monkeypatch.setenv("https_proxy", f"http://user:pw@127.0.0.1:{between.port}")
        with before_url(tmp_path, fake.url) as handle, RawClient(handle.url) as client:
            for _ in range(2):
                assert answer_text(client.ask("POST", WAY_IN["chat"], json.dumps(question("chat")).encode())) == "Hello"
        assert between.connections == 1 and between.requests[0].startswith(b"CONNECT localhost:")
        assert b"Basic " + base64.b64encode(b"user:pw") in between.requests[0]
        assert b"sk-upstream" not in between.requests[0]
        assert [request.path for request in fake.received] == ["/v1/chat/completions"] * 2
        assert "proxy-authorization" not in fake.received[0].headers


def test_proxy_that_refuses(tmp_path: Any, monkeypatch: Any) -> None:
    with proxy(0, b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n") as between:
        monkeypatch.setenv("https_proxy", between.url)
        with before_url(tmp_path, "https://provider.invalid") as handle:
            result = call(handle.url, WAY_IN["chat"], question("chat"))
    assert result.status == 502 and "407" in result.json["error"]["message"]


@pytest.mark.parametrize("is_tls, words", [(True, "certificate"), (False, "")],
                         ids=["unknown authority", "no TLS at all"])
def test_tls_failures_are_told_in_words(tmp_path: Any, certificate: Tuple[str, str], is_tls: bool, words: str) -> None:
    with contextlib.ExitStack() as stack:
        if is_tls:
            url = stack.enter_context(tls_upstream(certificate, whole_answer("chat"))).url
        else:
            url = stack.enter_context(fake_upstream(whole_answer("chat"))).url.replace("http:", "https:")
        handle = stack.enter_context(before_url(tmp_path, url))
        result = call(handle.url, WAY_IN["chat"], question("chat"))
    message = result.json["error"]["message"]
    assert result.status == 502 and result.json["error"]["code"] == "connection_error"
    assert words in message and "Traceback" not in message and str(tmp_path) not in message and len(message) < 300


def test_url_schemes_that_are_no_provider(tmp_path: Any) -> None:
    with transport() as made:
        for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,hi"):
            with pytest.raises(pg.UpstreamError):
                fetch(made, url, "GET")


# ======================================================================================================================
# §12 Gateway
# ======================================================================================================================

@pytest.fixture(scope="session")
def standing(tmp_path_factory: Any) -> Iterator[Tuple[pg.ServerHandle, FakeUpstream]]:
    """One gateway and one fake provider for all tests that need nothing special of either. `chat-plain` and
    `anth-plain` are the same with a key that has not the shape of one."""
    home = tmp_path_factory.mktemp("standing")
    with fake_upstream(Answer()) as fake:
        models = two_providers(fake.url)
        for row in ("chat", "anth"):
            models["providers"][f"{row}-plain"] = {**models["providers"][row], "apiKey": "hunter2hunter2"}
        write_agent_files(home, models=models)
        with running(home) as handle:
            yield handle, fake


Given = Callable[..., Tuple[pg.ServerHandle, FakeUpstream]]


@pytest.fixture
def script(standing: Tuple[pg.ServerHandle, FakeUpstream]) -> Given:
    """Gives the standing provider its answers."""
    def given(*answers: Any) -> Tuple[pg.ServerHandle, FakeUpstream]:
        handle, fake = standing
        fake.answers[:] = answers
        fake.received.clear()
        return handle, fake

    return given


# provider's status: what a Chat client sees (status, type, code), what an Anthropic client sees (status, type)
STATUS_TABLE: Dict[int, Tuple[Tuple[int, str, str], Tuple[int, str]]] = {
    400: ((400, "invalid_request_error", "bad_thing"), (400, "invalid_request_error")),
    401: ((502, "authentication_error", "upstream_auth_failed"), (502, "api_error")),
    403: ((403, "permission_error", "upstream_forbidden"), (403, "permission_error")),
    404: ((404, "invalid_request_error", "model_not_found"), (404, "not_found_error")),
    413: ((413, "invalid_request_error", "request_too_large"), (413, "request_too_large")),
    429: ((429, "rate_limit_error", "rate_limit_exceeded"), (429, "rate_limit_error")),
    500: ((502, "upstream_error", "provider_error"), (502, "api_error")),
    529: ((503, "service_unavailable_error", "server_is_overloaded"), (529, "overloaded_error"))}
ANTH_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
              404: "not_found_error",
              413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 529: "overloaded_error"}


def provider_error(row: str, status: int, message: str) -> Dict[str, Any]:
    """An error body as that provider writes it."""
    if row == "anth":
        return {"type": "error", "error": {"type": ANTH_TYPES[status], "message": message},
                "request_id": "req_upstream"}
    return {"error": {"message": message, "type": "some_error", "param": None,
                      "code": "bad_thing" if status == 400 else None}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("status", STATUS_TABLE)
def test_provider_statuses(script: Given, status: int, client: str, row: str, stream: bool) -> None:
    message = f"The reason for {status}, in so many words."
    body = json.dumps(provider_error(row, status, message), indent=1).encode()
    handle, fake = script(Answer(status, body, headers={"Retry-After": "7"}))
    result = call(handle.url, WAY_IN[client], question(row, stream))
    assert len(fake.received) == 1              # retries are the client's business
    for_chat, for_messages = STATUS_TABLE[status]
    if client == row.replace("anth", "messages") == "messages" and status != 401:
        assert (result.status, result.body) == (status, body)           # Anthropic to Anthropic: word for word
    elif client == "chat":
        expected = {"message": message, "type": for_chat[1], "param": result.json["error"]["param"],
                    "code": for_chat[2]}
        if row == "anth" and status == 400:
            expected["code"] = "invalid_request"
        assert (result.status, result.json) == (for_chat[0], {"error": expected})
    else:
        assert result.status == for_messages[0]
        assert set(result.json) == {"type", "error", "request_id"} and result.json["type"] == "error"
        assert (result.json["error"]["type"], result.json["error"]["message"]) == (for_messages[1], message)
        assert result.json["request_id"] == result.headers["request-id"]
    assert result.headers["content-type"].startswith("application/json") and result.headers["x-request-id"]
    assert result.headers.get("x-should-retry") == ("false" if status == 401 else None)
    if status in (429, 529):
        assert result.headers["retry-after"] == "7"


@both_forms
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_arguments_through_a_server(script: Given, name: str, stream: bool) -> None:
    written, expected = DAMAGES[name]
    wire = calls_answer(stream, [("wx", written), ("b", '{"b": 2}')], "tool_calls", "Two.")
    handle, _ = script(Answer(200, [wire], "text/event-stream") if stream else Answer(200, wire))
    result = call(handle.url, WAY_IN["messages"], question("chat", stream))
    assert result.status == 200 and result.headers["x-pigateway-lane"] == "translated"
    read = check_messages_stream(result.body) if stream else read_body(result.json, MESSAGES)
    calls = {call_id: json.loads(arguments) for call_id, _, arguments in read.calls}
    assert calls == {**({} if expected is None else {"c0": json.loads(expected)}), "c1": {"b": 2}}
    assert read.text == "Two." + (shown_call("wx", written) if expected is None else "") and read.stop == "tool_use"


@pytest.mark.parametrize("client, expected", [("chat", (429, "insufficient_quota")),
                                              ("messages", (402, "billing_error"))])
@pytest.mark.parametrize("status", [402, 429])
def test_used_up_account_is_not_tried_again(script: Given, client: str, expected: Tuple[int, str],
                                            status: int) -> None:
    body = b'{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"x"}}'
    handle, _ = script(Answer(status, body))
    result = call(handle.url, WAY_IN[client], question("chat"))
    assert (result.status, result.json["error"]["type"]) == expected
    assert result.headers["x-should-retry"] == "false"


NO_MESSAGE = "the provider answered 503 without a message"


@pytest.mark.parametrize("body, content_type, message", [
    (b"", "text/plain", NO_MESSAGE), (b"<html><h1>Bad Gateway</h1></html>", "text/html", NO_MESSAGE),
    (b"upstream connect error", "text/plain", "upstream connect error"), (b"[]", "application/json", "[]"),
    (b'{"error":null}', "application/json", NO_MESSAGE), (b"\xff\xfe", "text/plain", "\ufffd\ufffd"),
    (b'{"error":{"message":{"a":1}}}', "application/json", '{"a":1}')])
@pytest.mark.parametrize("client, row", WAYS)
def test_error_bodies_that_are_no_envelope(script: Given, client: str, row: str, body: bytes, content_type: str,
                                           message: str) -> None:
    handle, _ = script(Answer(503, body, content_type))
    result = call(handle.url, WAY_IN[client], question(row))
    if client == "chat":
        error = {"message": message, "type": "service_unavailable_error", "param": None, "code": "server_is_overloaded"}
        assert (result.status, result.json) == (503, {"error": error})
    elif row == "anth" and body.startswith(b'{"error":{'):    # an object with an error object: word for word
        assert (result.status, result.body) == (503, body)
    else:
        error = {"type": "overloaded_error", "message": message}
        assert (result.status, result.json) == (529, {"type": "error", "error": error,
                                                      "request_id": result.headers["request-id"]})


def in_stream_error(row: str, message: str) -> bytes:
    """An overload told inside a stream of status 200."""
    if row == "anth":
        return sse([{"type": "error", "error": {"type": "overloaded_error", "message": message}}], named=True)
    return sse([{"error": {"message": message, "type": "overloaded_error", "code": 529}}])


@pytest.mark.parametrize("is_whole", [False, True], ids=["stream", "whole"])
@pytest.mark.parametrize("before", [b"", b": comment\n\n", b"start"])
@pytest.mark.parametrize("client, row", WAYS)
def test_error_as_first_event_is_a_status(script: Given, client: str, row: str, before: bytes, is_whole: bool) -> None:
    if before == b"start":                          # a head without content
        before = sse([ANTH_EVENTS[0], {"type": "ping"}], named=True) if row == "anth" else sse(
            [{**CHAT_CHUNKS[0], "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""},
                                             "finish_reason": None}]}])
    pieces = [piece for piece in (before, in_stream_error(row, "Busy, sorry")) if piece]
    handle, _ = script(Answer(200, pieces, "text/event-stream"))
    result = call(handle.url, WAY_IN[client], question(row, not is_whole))
    assert (result.status, result.json["error"]["type"]) == {
        "chat": (503, "service_unavailable_error"), "messages": (529, "overloaded_error")}[client]
    assert result.json["error"]["message"] == "Busy, sorry"


@pytest.mark.parametrize("client, row", WAYS)
def test_later_error_is_an_error_event(script: Given, client: str, row: str) -> None:
    cut = STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2
    pieces = [STREAMS[row][:cut], in_stream_error(row, "Busy, sorry"), STREAMS[row][cut:]]
    handle, _ = script(Answer(200, pieces, "text/event-stream"))
    streamed = call(handle.url, WAY_IN[client], question(row, True))
    whole = call(handle.url, WAY_IN[client], question(row, False))
    assert answer_text(streamed) == "Hel"
    error = stream_failure(client, streamed)
    assert error["message"] == "Busy, sorry"
    assert error["type"] == {"chat": "service_unavailable_error", "messages": "overloaded_error"}[client]
    assert whole.status == {"chat": 503, "messages": 529}[client]       # nothing partial is sold as an answer


@pytest.mark.parametrize("end", [b"", None], ids=["connection cut", "ends cleanly"])
@pytest.mark.parametrize("client, row", WAYS)
def test_cut_stream(script: Given, client: str, row: str, end: Optional[bytes]) -> None:
    cut = STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2
    pieces = [STREAMS[row][:cut]] + ([end] if end is not None else [])
    handle, _ = script(Answer(200, pieces, "text/event-stream"))
    streamed = call(handle.url, WAY_IN[client], question(row, True))
    whole = call(handle.url, WAY_IN[client], question(row, False))
    assert answer_text(streamed) == "Hel" and stream_failure(client, streamed)
    assert whole.status == 502 and whole.json["error"]["type"] == {"chat": "upstream_error",
                                                                   "messages": "api_error"}[client]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("body, content_type", [
    (b"<!DOCTYPE html><html><body>Please log in</body></html>", "text/html"), (b"", "application/json"),
    (b"", "text/event-stream"), (b"   \n", "application/json"), (b"{}", "application/json"),
    (b"[]", "application/json"),
    (b'{"choices":[],"content":null}', "application/json"), (b"not json", "text/plain"),
    (b": only comments\n\n", "text/event-stream"), (b"data: {}\n\n", "text/event-stream"),
    (b"data: <html>\n\n", "text/event-stream"), (b"data: [DONE]\n\n", "text/event-stream"),
    (b"{\"choi", "application/json"),
])
def test_two_hundred_that_is_none(script: Given, client: str, row: str, stream: bool, body: bytes,
                                  content_type: str) -> None:
    handle, _ = script(Answer(200, body, content_type))
    result = call(handle.url, WAY_IN[client], question(row, stream))
    assert result.status == 502
    assert result.json["error"]["type"] == {"chat": "upstream_error", "messages": "api_error"}[client]
    assert "log in" not in result.json["error"]["message"]


@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("asked", [True, False], ids=["stream asked", "whole asked"])
@pytest.mark.parametrize("given", ["stream", "whole"])
def test_either_form_becomes_the_one_asked_for(script: Given, client: str, row: str, asked: bool, given: str) -> None:
    answer = stream_answer(row) if given == "stream" else whole_answer(row)
    handle, fake = script(answer)
    result = call(handle.url, WAY_IN[client], question(row, asked))
    assert fake.received[0].json.get("stream", False) is asked
    assert result.status == 200 and answer_text(result) == "Hello"
    assert ("event-stream" in result.headers["content-type"]) is asked
    if asked:
        assert is_clean_end(client, result)
        assert "no-cache" in result.headers["cache-control"] and result.headers["x-accel-buffering"] == "no"
    else:
        assert result.json["model"] == f"{row}/m1"
    is_native = client == row.replace("anth", "messages") and asked == (given == "stream")
    assert result.headers["x-pigateway-lane"] == ("native" if is_native else "translated")
    assert result.headers["x-pigateway-model"] == f"{row}/m1" and "x-pigateway-dropped" not in result.headers


class OpenCall:
    """A request whose answer is read as it comes."""

    def __init__(self, url: str, path: str, body: Any, **headers: str) -> None:
        split = urllib.parse.urlsplit(url)
        self.sock = socket.create_connection((split.hostname, split.port), timeout=10)
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", f"Host: {split.netloc}", f"Content-Length: {len(data)}",
                 *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        self.sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        self.seen = b""

    def read_until(self, mark: bytes) -> bytes:
        """Everything so far, as soon as `mark` is in it."""
        while mark not in self.seen:
            data = self.sock.recv(65536)
            assert data, f"the answer ended without {mark!r}: {self.seen!r}"
            self.seen += data
        return self.seen

    def close(self) -> None:
        self.sock.close()


HEARTBEATS = {"chat": b": heartbeat", "messages": b"event: ping\ndata: {"}


@pytest.mark.parametrize("client, row", WAYS)
def test_heartbeat_while_the_provider_is_silent(tmp_path: Any, client: str, row: str) -> None:
    gates = [threading.Event(), threading.Event(), threading.Event()]
    cut = STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2

    def pieces() -> Iterator[bytes]:
        gates[1].wait(10)
        yield STREAMS[row][:cut]
        gates[2].wait(10)
        yield STREAMS[row][cut:]

    def answer(request: Received) -> Answer:
        gates[0].wait(10)
        return Answer(200, pieces(), "text/event-stream")

    beat = HEARTBEATS[client]
    with serving(tmp_path, answer, heartbeat_interval_ms=30) as (handle, _):
        opened = OpenCall(handle.url, WAY_IN[client], question(row, True))
        for gate in gates[:2]:                      # before the provider's head, before its first event
            seen = opened.read_until(beat)
            assert seen.startswith(b"HTTP/1.1 200") or gate is gates[1]
            opened.seen = b""
            gate.set()
        opened.read_until(b"Hel")
        opened.seen = opened.seen[opened.seen.index(b"Hel"):]
        opened.read_until(beat)
        gates[2].set()
        opened.read_until(b"[DONE]" if client == "chat" else b"message_stop")
        opened.close()


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_refusal_after_a_heartbeat_is_an_error_event(tmp_path: Any, client: str) -> None:
    gate = threading.Event()

    def answer(request: Received) -> Answer:
        gate.wait(10)
        return Answer(429, b'{"error":{"message":"Slow down"}}')

    with serving(tmp_path, answer, heartbeat_interval_ms=30) as (handle, _):
        opened = OpenCall(handle.url, WAY_IN[client], question("chat", True))
        opened.read_until(HEARTBEATS[client])
        gate.set()
        seen = opened.read_until(b"0\r\n\r\n")
        opened.close()
    assert b"Slow down" in seen and b"rate_limit_error" in seen and b"[DONE]" not in seen


def test_no_heartbeat_into_a_whole_answer(tmp_path: Any) -> None:
    def answer(request: Received) -> Answer:
        time.sleep(0.1)
        return whole_answer("chat")

    with serving(tmp_path, answer, heartbeat_interval_ms=10) as (handle, _):
        result = call(handle.url, WAY_IN["chat"], question("chat"))
    assert result.status == 200 and answer_text(result) == "Hello"


def drip(row: str) -> Iterator[Any]:
    """A stream that never ends."""
    yield STREAMS[row][:STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2]
    while True:
        yield 0.01
        yield b": still here\n\n"


@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_client_that_leaves_ends_the_provider_request(tmp_path: Any, lines: LogLines, client: str, row: str,
                                                      stream: bool) -> None:
    begun = threading.Event()

    def pieces() -> Iterator[Any]:
        begun.set()
        yield from drip(row)

    with serving(tmp_path, lambda request: Answer(200, pieces(), "text/event-stream")) as (handle, fake):
        opened = OpenCall(handle.url, WAY_IN[client], question(row, stream))
        if stream:
            opened.read_until(b"Hel")
        assert begun.wait(5)
        opened.close()
        assert fake.client_gone.wait(1.0)
        assert lines.access()["status"] == 499
        until(lambda: handle.gateway.open_requests == 0)


def test_client_that_leaves_a_silent_provider(tmp_path: Any, lines: LogLines) -> None:
    arrived, gone = threading.Event(), threading.Event()

    def serve(server: RawServer, sock: socket.socket, number: int) -> None:
        server.read(sock)
        arrived.set()
        sock.settimeout(5)
        if not sock.recv(1):
            gone.set()

    with raw_server(serve) as server, before_url(tmp_path, server.url) as handle:
        opened = OpenCall(handle.url, WAY_IN["chat"], question("chat"))
        assert arrived.wait(5)
        opened.close()
        assert gone.wait(1.0) and lines.access()["status"] == 499


def test_access_line(tmp_path: Any, lines: LogLines) -> None:
    with serving(tmp_path, whole_answer("anth")) as (handle, _):
        call(handle.url, WAY_IN["chat"] + "?key=AIzaSyA-not-to-be-seen-0123456789", question("anth"),
             authorization="Bearer sk-client-key-0123456789", user_agent="test/1")
        fields = lines.access()
    assert (fields["kind"], fields["method"], fields["url"], fields["status"]) == (
        "access", "POST", "/v1/chat/completions", 200)
    assert (fields["model"], fields["lane"], fields["tokens_in"], fields["tokens_out"]) == ("anth/m1", "translated", 3,
                                                                                            2)
    assert fields["durationMs"] >= 0 and fields["safeHeaders"]["user-agent"] == "test/1"
    assert set(fields["safeHeaders"]) <= {"content-type", "content-length", "user-agent", "accept", "accept-encoding",
                                          "host"}
    text = pg.JsonFormatter().format(lines.wait(lambda record: record.getMessage() == "access"))
    assert json.loads(text)["level"] == "info" and "sk-client" not in text and "AIza" not in text


@pytest.mark.parametrize("how", ["config", "header", "neither"])
def test_strict(tmp_path: Any, how: str) -> None:
    with serving(tmp_path, whole_answer("anth"), strict=how == "config") as (handle, fake):
        headers = {"x_pigateway_strict": "1"} if how == "header" else {}
        result = call(handle.url, WAY_IN["chat"], question("anth", seed=7), **headers)
        plain = call(handle.url, WAY_IN["chat"], question("anth"), **headers)
        if how == "neither":
            assert result.status == 200 and result.headers["x-pigateway-dropped"] == "seed"
        else:
            assert (result.status, result.json["error"]["param"]) == (400, "seed") and len(fake.received) == 1
            assert result.json["error"]["code"] == "unsupported_parameter"
        assert plain.status == 200


AWKWARD_BODIES = {
    "blanks": b'{ "model" :\t"anth/m1" ,\r\n "max_tokens":10 , "messages":[{"role":"user","content":"Hi"}]}',
    "escapes": b'{"messages":[{"role":"user","content":"\\u00e9\\/\\ud83d\\ude00 \xc3\xa9"}],"max_tokens":10,'
               b'"model":"anth\\/m1"}',
    "nested": b'{"metadata":{"user_id":"u","model":"anth/m1"},"max_tokens":10,"x":"\\"model\\": \\"anth/m1\\"",'
              b'"messages":[{"role":"user","content":"a"}],"model":"anth/m1"}',
    "numbers": b'{"model":"anth/m1","max_tokens":10,"temperature":0.10,"big":12345678901234567890123,"e":1E-2,'
               b'"messages":[{"role":"user","content":"a","extra":null}],"unknown":[ ]}',
    "stream": b'{"stream":true,"model":"anth/m1","max_tokens":10,"messages":[{"role":"user","content":[{"type":"text",'
              b'"text":"a","cache_control":{"type":"ephemeral"}}]}]}\n'}


@pytest.mark.parametrize("case", AWKWARD_BODIES)
def test_native_anthropic_body_is_untouched(script: Given, case: str) -> None:
    body = AWKWARD_BODIES[case]
    head, old, tail = body.rpartition(b'"anth\\/m1"' if case == "escapes" else b'"anth/m1"')
    expected = head + b'"m1"' + tail
    is_stream = case == "stream"
    handle, fake = script(stream_answer("anth") if is_stream else whole_answer("anth"))
    result = call(handle.url, WAY_IN["messages"] + "?beta=true", body, anthropic_version="2023-06-01",
                  anthropic_beta="a-1,b-2", authorization="Bearer client-own", x_other="no")
    got = fake.received[0]
    assert old and hashlib.sha256(got.body).hexdigest() == hashlib.sha256(expected).hexdigest()
    assert got.path.partition("?")[0] == "/v1/messages" and got.headers["x-api-key"] == "sk-upstream-anth-key"
    assert (got.headers["anthropic-version"], got.headers["anthropic-beta"]) == ("2023-06-01", "a-1,b-2")
    assert "client-own" not in json.dumps(got.headers) and "x-other" not in got.headers
    name = b"anth/m1"
    if is_stream:                                   # and so is the answer, but for the model's name
        assert result.body == ANTH_STREAM.replace(b'"model": "m1"', b'"model": "' + name + b'"')
    else:
        assert result.json == {**ANTH_WHOLE, "model": "anth/m1"}


@pytest.mark.parametrize("key", ["sk-upstream-key-0123456789", "hunter2hunter2"], ids=["by its shape", "by its value"])
@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("where", ["status", "first event", "whole body", "later event"])
def test_providers_key_is_redacted(script: Given, lines: LogLines, client: str, row: str, where: str,
                                   key: str) -> None:
    message = f"Incorrect API key provided: {key}."
    cut = STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2
    answer = {"status": Answer(400, json.dumps(provider_error(row, 400, message)).encode()),
              "first event": Answer(200, [in_stream_error(row, message)], "text/event-stream"),
              "whole body": Answer(200, json.dumps(provider_error(row, 400, message)).encode()),
              "later event": Answer(200, [STREAMS[row][:cut], in_stream_error(row, message)],
                                    "text/event-stream")}[where]
    handle, _ = script(answer)
    result = call(handle.url, WAY_IN[client], question(f"{row}-plain" if key.startswith("hunter") else row,
                                                      "event" in where))
    lines.access()
    shown = result.json["error"]["message"] if result.status != 200 else result.events[-1]["error"]["message"]
    assert shown.startswith("Incorrect API key provided: ") and key not in shown
    assert key.encode() not in result.body
    assert key not in "".join(pg.JsonFormatter().format(record) for record in lines.records)


PERSONAL = {"anth": {"type": "oauth", "access": "at-1", "refresh": "r", "expires": 9e15}}
SECOND_LOOPBACK = pytest.mark.skipif(not sys.platform.startswith("linux"),
                                     reason="127.0.0.2 is an address on Linux only")


@SECOND_LOOPBACK
@pytest.mark.parametrize("exposes", [False, True])
def test_subscriptions_are_not_shown_to_others(tmp_path: Any, exposes: bool) -> None:
    with fake_upstream(whole_answer("anth")) as fake:
        write_agent_files(tmp_path, models=two_providers(fake.url), auth=PERSONAL)
        config = {"bind_address": "127.0.0.2", "api_key": "gw-key-1", "expose_oauth_subscriptions": exposes or None}
        with running(tmp_path, **config) as handle:
            listed = [item["id"] for item in call(handle.url, "/v1/models", x_api_key="gw-key-1").json["data"]]
            result = call(handle.url, WAY_IN["messages"], question("anth"), x_api_key="gw-key-1")
            counted = call(handle.url, "/v1/messages/count_tokens", question("anth"), x_api_key="gw-key-1")
        assert ("anth/m1" in listed) is exposes and "chat/m1" in listed
        assert bool(fake.received) is exposes
    if exposes:
        assert result.status == 200
    else:
        assert (result.status, counted.status) == (403, 403)
        assert result.json["error"]["type"] == "permission_error"
        assert result.json["error"]["details"]["error_code"] == "subscription_exposure_disabled"


@pytest.mark.parametrize("row, answer, expected, is_native", [
    ("anth", Answer(200, b'{"input_tokens": 42}'), 42, True),
    ("anth", Answer(404, b'{"type":"error","error":{"type":"not_found_error","message":"Not Found"}}'), 0, False),
    ("anth", Answer(404, b"<html>", "text/html"), 0, False),
    ("anth", Answer(200, b"<html>", "text/html"), 0, False),
    ("anth", Answer(405, b"{}"), 0, False),
    ("chat", Answer(500), 0, False),
], ids=["native", "404", "404 page", "html", "405", "no such call"])
def test_count_tokens(script: Given, row: str, answer: Answer, expected: int, is_native: bool) -> None:
    body = {"model": f"{row}/m1", "messages": [{"role": "user", "content": "word " * 100}],
            "tools": [{"name": "wx", "description": "d" * 350, "input_schema": {"type": "object"}}]}
    handle, fake = script(answer)
    result = call(handle.url, "/v1/messages/count_tokens?beta=true", body)
    paths = [request.path.partition("?")[0] for request in fake.received]
    assert paths == (["/v1/messages/count_tokens"] if row == "anth" else [])
    assert result.status == 200 and set(result.json) == {"input_tokens"}
    count = result.json["input_tokens"]
    assert count == expected if is_native else 200 < count < 400


@pytest.mark.parametrize("status", [400, 403, 413, 429, 500, 529])
def test_count_tokens_when_the_provider_refuses(script: Given, status: int) -> None:
    body = json.dumps(provider_error("anth", status, "No.")).encode()
    handle, _ = script(Answer(status, body))
    result = call(handle.url, "/v1/messages/count_tokens", question("anth"))
    if status < 429:                                # what is wrong with the request is told word for word
        assert (result.status, result.body) == (status, body)
    else:                                           # a provider in trouble is no reason not to count
        assert result.status == 200 and result.json["input_tokens"] > 0


def listed_ids(handle: pg.ServerHandle) -> List[str]:
    """The ids of GET /v1/models."""
    return [item["id"] for item in call(handle.url, "/v1/models").json["data"]]


def test_discovery(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "DISCOVERY_RETRY_S", 0.02)
    is_up, asked = threading.Event(), threading.Event()
    found = {"object": "list", "data": [{"id": "org/big:7b", "max_model_len": 4096}, {"id": "small"}, {"no": "id"}, 5]}

    def answer(request: Received) -> Answer:
        if request.method == "POST":
            return whole_answer("chat")
        asked.set()
        return Answer(200, json.dumps(found).encode()) if is_up.is_set() else Answer(503, b"loading")

    with fake_upstream(answer) as fake:
        write_agent_files(tmp_path, models={"providers": {"local": {"baseUrl": f"{fake.url}/v1"}}})
        with running(tmp_path) as handle:
            assert asked.wait(5)
            assert not any(name.startswith("local/") for name in listed_ids(handle))
            result = call(handle.url, WAY_IN["chat"], {**question("local"), "model": "local/any/thing"})
            assert result.status == 200         # known or not, the server decides
            is_up.set()
            until(lambda: "local/small" in listed_ids(handle))
            assert listed_ids(handle) == ["local/org/big:7b", "local/small"]
            single = call(handle.url, "/v1/models/local/org/big:7b").json
            assert single["context_window"] == 4096
            assert call(handle.url, WAY_IN["chat"], {**question("local"), "model": "small"}).status == 200
        posted = [request.json["model"] for request in fake.received if request.method == "POST"]
        assert posted == ["any/thing", "small"]
        assert {request.path for request in fake.received if request.method == "GET"} == {"/v1/models"}


def test_requests_never_wait_for_discovery(tmp_path: Any) -> None:
    hold = threading.Event()

    def answer(request: Received) -> Answer:
        if request.method == "GET":
            hold.wait(10)
        return whole_answer("chat")

    with fake_upstream(answer) as fake:
        write_agent_files(tmp_path, models={"providers": {"local": {"baseUrl": f"{fake.url}/v1"}}})
        started = time.monotonic()
        with running(tmp_path) as handle:
            assert call(handle.url, "/v1/models").status == 200
            assert call(handle.url, WAY_IN["chat"], {**question("local"), "model": "local/x"}).status == 200
        assert time.monotonic() - started < 2.0
        hold.set()


@pytest.mark.parametrize("name", ["nope", "nope/m1", "chat", "chat/", "/m1", "", "anth//", "m1:nope"])
@pytest.mark.parametrize("client", ["chat", "messages"])
def test_unknown_model_is_found_out_before_any_call(script: Given, client: str, name: str) -> None:
    handle, fake = script(Answer(404, b"{}"))
    result = call(handle.url, WAY_IN[client], {**question("chat"), "model": name})
    word = {"chat": "invalid_request_error", "messages": "not_found_error"}[client]
    assert (result.status, result.json["error"]["type"]) == (404, word)
    if name == "anth//":                        # the id "/" at a known provider, which knows best
        assert [request.json["model"] for request in fake.received] == ["/"]
        assert result.headers["x-pigateway-model"] == name
    else:
        assert not fake.received and "x-pigateway-model" not in result.headers
        assert f"no model {json.dumps(name)} here" in result.json["error"]["message"]


@pytest.mark.parametrize("client", ["chat", "messages"])
@pytest.mark.parametrize("row", ["chat", "anth"])
def test_unlisted_id_of_a_known_provider_passes(script: Given, client: str, row: str) -> None:
    handle, fake = script(whole_answer(row))
    result = call(handle.url, WAY_IN[client], {**question(row), "model": f"{row}/vendor/new-model:free"})
    assert result.status == 200 and fake.received[0].json["model"] == "vendor/new-model:free"
    assert result.json["model"] == f"{row}/vendor/new-model:free"


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_no_key_for_the_provider_is_told(tmp_path: Any, client: str) -> None:
    with running(tmp_path) as handle:
        result = call(handle.url, WAY_IN[client], {**question("x"), "model": "groq/llama"})
    assert (result.status, result.json["error"]["type"]) == (401, "authentication_error")
    assert "GROQ_API_KEY" in result.json["error"]["message"]


def test_twenty_clients_at_once(tmp_path: Any) -> None:
    with serving(tmp_path, stream_answer("anth")) as (handle, fake):
        results: List[Result] = []
        threads = [threading.Thread(target=lambda: results.append(call(handle.url, WAY_IN["chat"],
                                                                       question("anth", True))))
                   for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert [answer_text(result) for result in results] == ["Hello"] * 20
        until(lambda: handle.gateway.open_requests == 0)
        assert fake.connections <= 20


# ======================================================================================================================
# §13 HTTP server
# ======================================================================================================================


ECHO = {"model": "demo", "max_tokens": 50, "messages": [{"role": "user", "content": "echo this"}]}
ECHO_BODY = json.dumps(ECHO).encode()


def test_keep_alive(script: Given) -> None:
    handle, _ = script(whole_answer("chat"))
    with RawClient(handle.url) as client:
        for _ in range(3):
            assert client.ask("GET", "/health").json == {"ok": True}
            assert client.ask("POST", WAY_IN["chat"], ECHO_BODY).status == 200
            assert client.ask("POST", WAY_IN["chat"], b"not json").status == 400
            assert client.ask("GET", "/nowhere").status == 404
            assert client.ask("POST", WAY_IN["messages"], json.dumps({**ECHO, "stream": True}).encode()).status == 200
        assert client.ask("GET", "/health", None, "Connection: close").headers["connection"] == "close"
        assert client.is_closed()


def test_pipelining(script: Given) -> None:
    handle, _ = script(whole_answer("chat"))
    with RawClient(handle.url) as client:
        one = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
            WAY_IN["chat"].encode(), len(ECHO_BODY), ECHO_BODY)
        two = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        three = one.replace(b"Content-Length: %d" % len(ECHO_BODY), b"Transfer-Encoding: chunked").replace(
            ECHO_BODY, b"%x\r\n%b\r\n0\r\n\r\n" % (len(ECHO_BODY), ECHO_BODY))
        client.send(one + two + three + two + one)
        answers = [client.answer() for _ in range(5)]
        assert [answer.status for answer in answers if answer] == [200] * 5
        assert ["choices" in answer.json for answer in answers if answer] == [True, False, True, False, True]


def test_pipelined_request_is_no_sign_of_leaving(tmp_path: Any) -> None:
    gate = threading.Event()

    def answer(request: Received) -> Answer:
        gate.wait(10)
        return whole_answer("chat")

    body = json.dumps(question("chat")).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body),
                                                                                                          body)
    with serving(tmp_path, answer) as (handle, fake), RawClient(handle.url) as client:
        client.send(request)
        until(lambda: fake.received)
        client.send(request)
        gate.set()
        first, second = client.answer(), client.answer()
        assert first and second and (first.status, second.status) == (200, 200)


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0(script: Given, stream: bool) -> None:
    handle, _ = script(whole_answer("chat"))
    body = json.dumps({**ECHO, "stream": stream}).encode()
    with RawClient(handle.url) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        result = client.answer()
        assert result and result.status == 200 and answer_text(result) == "echo this"
        assert "transfer-encoding" not in result.headers and client.is_closed()


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/chat/m1"])
def test_head(script: Given, path: str) -> None:
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        get = client.ask("GET", path)
        head = client.ask("HEAD", path)
        assert (get.status, head.status, head.body) == (200, 200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.body))
        assert client.ask("GET", "/health").status == 200   # nothing of a body was left on the connection


@pytest.mark.parametrize("path", [
    "/v1/chat/completions", "/chat/completions", "/v1/chat/completions/", "/chat/completions/",
    "/v1/v1/chat/completions",
    "/v1/chat/completions?api-version=2024-10-21&x=%zz", "/v1/chat/completions?", "/v1/chat/completions/?a=b",
    "/v1/%63hat/completions", "/v1/messages", "/messages", "/messages/", "/v1/messages?beta=true",
    "/v1/v1/messages?beta=true", "http://localhost/v1/messages", "/v1/messages#part"])
def test_paths(script: Given, path: str) -> None:
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        result = client.ask("POST", path, ECHO_BODY)
        assert result.status == 200 and ("choices" in result.json) is ("chat" in path or "63hat" in path)


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/v1/health", "/v1/models", "/models", "/models/", "/v1/",
                                  "/v1", "/v1/models?client_version=1"])
def test_get_paths(script: Given, path: str) -> None:
    handle, _ = script(Answer())
    assert call(handle.url, path).status == 200


@pytest.mark.parametrize("sizes", [(1,), (10, 3), (100000,)])
def test_chunked_request_body(script: Given, sizes: Tuple[int, ...]) -> None:
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        for _ in range(2):
            wire, place, turn = b"", 0, 0
            while place < len(ECHO_BODY):
                piece = ECHO_BODY[place:place + sizes[turn % len(sizes)]]
                wire += b"%X;x=y\r\n%b\r\n" % (len(piece), piece)
                place, turn = place + len(piece), turn + 1
            client.send(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(wire), 37):
                client.send(wire[start:start + 37])
            client.send(b"0\r\nTrailer: 1\r\n\r\n")
            result = client.answer()
            assert result and result.status == 200 and answer_text(result) == "echo this"


def test_byte_by_byte(script: Given) -> None:
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        for byte in b"\r\n\r\nGET /health HTTP/1.1\r\nhost:localhost\r\n\r\n":
            client.send(bytes([byte]))
        result = client.answer()
        assert result and result.json == {"ok": True}


def test_expect_100_continue(script: Given) -> None:
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        for _ in range(2):
            client.send(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                        b"Content-Length: %d\r\n\r\n" % len(ECHO_BODY))
            interim = client.answer()
            assert interim and interim.status == 100
            client.send(ECHO_BODY)
            final = client.answer()
            assert final and final.status == 200


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: Any) -> Iterator[pg.ServerHandle]:
    """A gateway that takes bodies of at most 4 KiB."""
    with running(tmp_path_factory.mktemp("narrow"), max_body_bytes=4096) as handle:
        yield handle


@pytest.mark.parametrize("path, kind", [("/v1/chat/completions", "invalid_request_error"),
                                        ("/v1/messages", "request_too_large")])
@pytest.mark.parametrize("how", ["length", "chunked", "expect"])
def test_body_too_large(narrow: pg.ServerHandle, path: str, kind: str, how: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    with RawClient(narrow.url) as client:
        with contextlib.suppress(ConnectionError):
            if how == "chunked":
                client.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(40):
                    client.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            else:
                extra = b"Expect: 100-continue\r\n" if how == "expect" else b""
                client.send(head + extra + b"Content-Length: 1000000\r\n\r\n")
                client.send(b"" if how == "expect" else b"x" * 600_000)
        result = client.answer()
        assert result and result.status == 413 and result.json["error"]["type"] == kind
        assert result.headers["connection"] == "close" and client.is_closed()
    with RawClient(narrow.url) as client:
        exact = json.dumps(ECHO).encode().ljust(4096)
        assert client.ask("POST", path, exact).status == 200
        assert client.ask("POST", path, exact + b" ").status == 413


def get(*lines: str, target: str = "/health") -> bytes:
    """A request head with these header lines."""
    return "\r\n".join([f"GET {target} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def post(*lines: str, body: bytes = b"") -> bytes:
    """A POST with these header lines and that body."""
    return "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: localhost", *lines, "",
                        ""]).encode("latin-1") + body


# name: (bytes, statuses that are right; 0 = the connection just ends)
HOSTILE: Dict[str, Tuple[bytes, Sequence[int]]] = {
    "bare LF": (b"GET /health HTTP/1.1\nHost: localhost\n\n", (400, 0)),
    "bare LF in a header": (get("Host: localhost", "X: a\nY: b"), (400,)),
    "bare CR in a header": (get("Host: localhost", "X: a\rY: b"), (400,)),
    "folded header": (get("Host: localhost", "X: a", " folded"), (400,)),
    "first header folded": (get(" X: a", "Host: localhost"), (400,)),
    "NUL in a header": (get("Host: localhost", "X: a\0b"), (400,)),
    "NUL in the target": (get("Host: localhost", target="/hea\0lth"), (400,)),
    "blank before the colon": (get("Host : localhost"), (400,)),
    "no colon": (get("Host: localhost", "nonsense"), (400,)),
    "no header name": (get("Host: localhost", ": x"), (400,)),
    "odd header name": (get("Host: localhost", "X(y): x"), (400,)),
    "no Host": (get(), (400,)),
    "two Hosts": (get("Host: localhost", "Host: localhost"), (400,)),
    "two equal lengths": (post("Content-Length: 2", "Content-Length: 2", body=b"{}"), (400,)),
    "two lengths": (post("Content-Length: 2", "Content-Length: 3", body=b"{}"), (400,)),
    "list of lengths": (post("Content-Length: 2, 2", body=b"{}"), (400,)),
    "negative length": (post("Content-Length: -2", body=b"{}"), (400,)),
    "length with a sign": (post("Content-Length: +2", body=b"{}"), (400,)),
    "length in hex": (post("Content-Length: 0x2", body=b"{}"), (400,)),
    "length with an underscore": (post("Content-Length: 1_0", body=b"{}"), (400,)),
    "length in other digits": (post("Content-Length: \xb2", body=b"{}"), (400,)),
    "empty length": (post("Content-Length:", body=b"{}"), (400,)),
    "endless length": (post("Content-Length: " + "9" * 40, body=b"{}"), (400, 413)),
    "length over all limits": (post("Content-Length: 999999999999", body=b"{}"), (413,)),
    "length and chunked": (post("Content-Length: 2", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), (400,)),
    "two codings": (post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), (400, 501)),
    "chunked twice": (post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), (400,)),
    "unknown coding": (post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), (400, 501)),
    "coding in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    "bad chunk size": (post("Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"), (400,)),
    "chunk size with a sign": (post("Transfer-Encoding: chunked", body=b"+2\r\n{}\r\n0\r\n\r\n"), (400,)),
    "chunk size 0x": (post("Transfer-Encoding: chunked", body=b"0x2\r\n{}\r\n0\r\n\r\n"), (400,)),
    "chunk longer than said": (post("Transfer-Encoding: chunked", body=b"2\r\n{}}\r\n0\r\n\r\n"), (400,)),
    "endless chunk line": (post("Transfer-Encoding: chunked", body=b"2;" + b"x" * 9000), (400,)),
    "endless trailers": (post("Transfer-Encoding: chunked", body=b"0\r\n" + b"a: b\r\n" * 5000 + b"\r\n"), (400,)),
    "huge header": (get("Host: localhost", "X: " + "y" * 70000), (400, 431)),
    "huge line": (get("Host: localhost", target="/" + "y" * 70000), (400, 414, 431)),
    "too many headers": (get("Host: localhost", *(f"X{number}: y" for number in range(300))), (400, 431)),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    "HTTP/1.2": (b"GET /health HTTP/1.2\r\nHost: localhost\r\n\r\n", (400, 505)),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400,)),
    "no version number": (b"GET /health HTTP\r\nHost: localhost\r\n\r\n", (400,)),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), (400, 0)),
    "garbage": (bytes(range(1, 256)) + b"\r\n\r\n", (400,)),
    "words": (b"hello there world\r\n\r\n", (400,)),
    "blank line only": (b"\r\n\r\n\r\n", (400, 0)),
    "lower-case method": (b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (400, 405, 501)),
    "unknown method": (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405, 501)),
    "TRACE": (b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405, 501)),
    "CONNECT": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", (400, 404, 405)),
    "two blanks": (b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (400,)),
    "tabs": (b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n", (400,)),
    "blank in the target": (get("Host: localhost", target="/hea lth"), (400,)),
    "absolute URI": (get("Host: localhost", target="http://localhost/health"), (200,)),
    "broken URI": (get("Host: localhost", target="http://[::1/health"), (400,)),
    "encoded path": (get("Host: localhost", target="/%68ealt%68"), (200,)),
    "encoded NUL": (get("Host: localhost", target="/v1/models/%00"), (404,)),
    "encoded line break": (get("Host: localhost", target="/v1/models/%0d%0aSet-Cookie:%20a"), (404,)),
    "broken encoding": (get("Host: localhost", target="/v1/models/%zz%"), (404,)),
    "encoding that is no UTF-8": (get("Host: localhost", target="/v1/models/%ff%fe"), (404,)),
    "way up": (get("Host: localhost", target="/v1/models/../../../etc/passwd"), (400, 404)),
    "encoded way up": (get("Host: localhost", target="/%2e%2e/%2e%2e/etc/passwd"), (400, 404)),
    "raw bytes in the target": (get("Host: localhost", target="/\xff\xfe"), (400, 404)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_heads(script: Given, lines: LogLines, case: str) -> None:
    data, statuses = HOSTILE[case]
    handle, _ = script(Answer())
    with RawClient(handle.url) as client:
        with contextlib.suppress(ConnectionError):
            client.send(data)
            client.sock.shutdown(socket.SHUT_WR)
        result = client.answer()
        assert (result.status if result else 0) in statuses
        if result and result.status >= 400:
            assert set(result.json["error"]) == {"message", "type", "param", "code"}
            assert b"set-cookie" not in "".join(result.headers).lower().encode()
        if result and result.status == 400:
            assert client.is_closed()               # nobody knows where the next request would begin
    assert not lines.find(lambda record: record.levelno >= logging.ERROR)
    assert call(handle.url, "/health").status == 200


@pytest.mark.parametrize("host, is_good", [
    ("localhost", True), ("localhost:4000", True), ("LOCALHOST", True), ("localhost.", True), ("127.0.0.1", True),
    ("127.0.0.1:1", True), ("[::1]", True), ("[::1]:4000", True), ("evil.example", False), ("evil.example:4000", False),
    ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("evil.example#localhost", False),
    ("", False),
    ("0.0.0.0", False), ("192.168.1.5:4000", False), ("localhost evil", False), ("user@localhost", False),
    ("localhost:80:90", False)])
def test_host_guard(script: Given, host: str, is_good: bool) -> None:
    handle, _ = script(Answer())
    for path, method in (("/health", "GET"), ("/v1/models", "OPTIONS"), (WAY_IN["chat"], "POST")):
        result = call(handle.url, path, ECHO if method == "POST" else None, method, host=host)
        assert (result.status in (200, 204)) is is_good
        if not is_good:
            assert (result.status, result.json["error"]["code"]) == (403, "invalid_host")


@pytest.mark.parametrize("allowed, origin, status, shown", [
    ((), None, 200, None),
    ((), "https://evil.example", 403, None),
    ((), "null", 403, None),
    ((), "http://localhost.evil.example", 403, None),
    ((), "http://localhost:5173", 200, None),
    ((), "http://127.0.0.1", 200, None),
    ((), "vscode-webview://abc", 200, None),
    (("https://app.example",), "https://app.example", 200, "https://app.example"),
    (("https://app.example",), "https://app.example.evil.example", 403, None),
    (("https://app.example",), "http://app.example", 403, None),
    (("http://localhost:5173",), "http://localhost:5173", 200, "http://localhost:5173"),
    (("*",), "https://any.example", 200, "*")])
def test_origins(script: Given, monkeypatch: Any, allowed: Tuple[str, ...], origin: Optional[str], status: int,
                 shown: Optional[str]) -> None:
    handle, _ = script(Answer())
    monkeypatch.setattr(handle.server, "config", pg.replace(handle.server.config, allowed_origins=allowed))
    headers = {"origin": origin} if origin else {}
    result = call(handle.url, WAY_IN["messages"], ECHO, **headers)
    wrong = call(handle.url, WAY_IN["messages"], {}, **headers)
    preflight = call(handle.url, WAY_IN["messages"], None, "OPTIONS", access_control_request_method="POST",
                     access_control_request_headers="x-api-key", **headers)
    assert (result.status, preflight.status) == (status, 204)
    if status == 403:
        assert result.json["error"]["type"] == "permission_error"
    for answer in (result, wrong, preflight):
        assert answer.headers.get("access-control-allow-origin") == shown
    if shown:
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-api-key", "anthropic-version", "anthropic-beta"):
            assert name in preflight.headers["access-control-allow-headers"]
        assert result.headers["vary"] == "origin" or shown == "*"


GATEWAY_KEY = "gw-key-0123456789"


@pytest.fixture(scope="session")
def locked(tmp_path_factory: Any) -> Iterator[pg.ServerHandle]:
    """A gateway that demands its key."""
    with running(tmp_path_factory.mktemp("locked"), api_key=GATEWAY_KEY, require_key_on_loopback=True) as handle:
        yield handle


@pytest.mark.parametrize("headers, is_good", [
    ({"authorization": f"Bearer {GATEWAY_KEY}"}, True), ({"authorization": f"bearer {GATEWAY_KEY}"}, True),
    ({"authorization": f"BEARER   {GATEWAY_KEY} "}, True), ({"x_api_key": GATEWAY_KEY}, True),
    ({"x_goog_api_key": GATEWAY_KEY}, True), ({"authorization": "Bearer wrong", "x_api_key": GATEWAY_KEY}, True),
    ({}, False),
    ({"authorization": "Bearer wrong"}, False), ({"authorization": "Bearer"}, False), ({"authorization": ""}, False),
    ({"authorization": f"Basic {GATEWAY_KEY}"}, False), ({"authorization": GATEWAY_KEY}, False),
    ({"x_api_key": "wrong"}, False), ({"x_api_key": ""}, False), ({"x_api_key": GATEWAY_KEY[:-1]}, False),
    ({"x_api_key": GATEWAY_KEY + "x"}, False), ({"x_api_key": GATEWAY_KEY.upper()}, False),
    ({"x_api_key": "\xe9\xff"}, False),
    ({"cookie": f"key={GATEWAY_KEY}"}, False)])
def test_key_check(locked: pg.ServerHandle, headers: Dict[str, str], is_good: bool) -> None:
    for path in ("/v1/models", "/healthz", "/nowhere", f"/v1/models?key={GATEWAY_KEY}"):
        assert (call(locked.url, path, **headers).status == 401) is not is_good
    chat, messages = call(locked.url, WAY_IN["chat"], ECHO, **headers), call(locked.url, WAY_IN["messages"], ECHO,
                                                                            **headers)
    assert (chat.status, messages.status) == ((200, 200) if is_good else (401, 401))
    if not is_good:
        assert (chat.json["error"]["type"], chat.json["error"]["code"]) == ("authentication_error", "invalid_api_key")
        assert messages.json["type"] == "error" and messages.json["error"]["type"] == "authentication_error"
        assert GATEWAY_KEY not in (chat.body + messages.body).decode()


def test_preflight_needs_no_key(locked: pg.ServerHandle) -> None:
    assert call(locked.url, WAY_IN["chat"], None, "OPTIONS").status == 204


def test_unread_body_of_a_refused_request(locked: pg.ServerHandle) -> None:
    with RawClient(locked.url) as client:
        result = client.ask("POST", WAY_IN["chat"], b"x" * 200_000)
        assert result.status == 401 and result.headers["connection"] == "close" and client.is_closed()


def test_loopback_asks_for_no_key(tmp_path: Any) -> None:
    with running(tmp_path, api_key=GATEWAY_KEY) as handle:
        assert call(handle.url, "/v1/models").status == 200
        assert call(handle.url, WAY_IN["chat"], ECHO, authorization="Bearer whatever").status == 200


@pytest.mark.parametrize("method, path, headers, status, kind", [
    ("GET", "/v1/nowhere", {}, 404, "invalid_request_error"),
    ("POST", "/v1/nowhere", {"anthropic_version": "2023-06-01"}, 404, "not_found_error"),
    ("GET", "/v1/messages/nowhere", {}, 404, "not_found_error"),
    ("GET", "/v1/chat/completions", {}, 405, "invalid_request_error"),
    ("DELETE", "/v1/chat/completions", {}, 405, "invalid_request_error"),
    ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
    ("PUT", "/v1/models", {}, 405, "invalid_request_error"),
    ("POST", "/v1/models/demo/echo", {"x_api_key": "k"}, 405, "invalid_request_error"),
    ("GET", "/v1/models/no/such", {}, 404, "invalid_request_error"),
    ("GET", "/v1/models/no/such", {"x_api_key": "k"}, 404, "not_found_error")])
def test_errors_are_told_in_the_callers_dialect(script: Given, method: str, path: str, headers: Dict[str, str],
                                                status: int, kind: str) -> None:
    handle, _ = script(Answer())
    result = call(handle.url, path, None, method, **headers)
    assert (result.status, result.json["error"]["type"]) == (status, kind)
    is_anthropic = bool(headers) or "messages" in path
    assert ("request_id" in result.json) is is_anthropic and ("code" in result.json["error"]) is not is_anthropic
    if status == 405:
        assert set(result.headers["allow"].split(", ")) <= {"GET", "POST"}
    elif not is_anthropic:
        assert result.json["error"]["code"] == ("model_not_found" if "models" in path else "endpoint_not_found")


SHELF = [f"model-{number:02d}" for number in range(30)] + ["org/name:free"]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: Any) -> Iterator[pg.ServerHandle]:
    """A gateway with many models."""
    home = tmp_path_factory.mktemp("shelf")
    write_agent_files(home, models={"providers": {"p": {"baseUrl": "http://127.0.0.1:9/v1", "models": [
        {"id": name, "contextWindow": 1000, "maxTokens": 100, "name": name.title()} for name in SHELF]}}})
    with running(home) as handle:
        yield handle


def test_openai_model_list(shelf: pg.ServerHandle) -> None:
    result = call(shelf.url, "/v1/models").json
    assert set(result) == {"object", "data"} and result["object"] == "list"
    assert [item["id"] for item in result["data"]] == sorted(f"p/{name}" for name in SHELF)
    for item in result["data"]:
        assert {"id", "object", "created", "owned_by"} <= set(item)
        assert (item["object"], item["owned_by"], type(item["created"])) == ("model", "p", int)
    assert call(shelf.url, "/v1/models").json == result


@pytest.mark.parametrize("headers, query", [({"anthropic_version": "2023-06-01"}, ""), ({"x_api_key": "k"}, ""),
                                            ({}, "?limit=20")])
def test_anthropic_model_list(shelf: pg.ServerHandle, headers: Dict[str, str], query: str) -> None:
    result = call(shelf.url, "/v1/models" + query, **headers).json
    assert set(result) == {"data", "has_more", "first_id", "last_id"}
    assert len(result["data"]) == 20 and result["has_more"] is True
    first = result["data"][0]
    assert (first["type"], first["id"], first["display_name"]) == ("model", "p/model-00", "Model-00")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["created_at"])


IDS = sorted(f"p/{name}" for name in SHELF)


@pytest.mark.parametrize("agent", ["claude-cli/2.1.0 (external, cli)", "claude-code/2.1.330"])
def test_claude_code_sees_names_that_it_takes(shelf: pg.ServerHandle, agent: str) -> None:
    listed = [item["id"] for item in call(shelf.url, "/v1/models?limit=1000", user_agent=agent).json["data"]]
    assert listed == sorted([*IDS, *(f"claude-gw-p--{name}" for name in SHELF)])
    for path in ("/v1/models/claude-gw-p--model-03", "/v1/models/claude-gw-p--model-03?limit=20"):
        assert call(shelf.url, path).json["id"] == "claude-gw-p--model-03"


@pytest.mark.parametrize("query, expected, has_more", [
    ("limit=1000", IDS, False), ("limit=31", IDS, False), ("limit=30", IDS[:30], True), ("limit=1", IDS[:1], True),
    ("limit=5&after_id=p/model-02", IDS[3:8], True), ("limit=5&after_id=p/model-27", IDS[28:31], False),
    ("limit=5&after_id=p%2Forg%2Fname%3Afree", [], False), ("limit=5&before_id=p/model-10", IDS[5:10], True),
    ("limit=5&before_id=p/model-03", IDS[:3], False), ("limit=5&before_id=p/model-05", IDS[:5], False),
    ("limit=5&before_id=p/model-00", [], False)])
def test_model_pages(shelf: pg.ServerHandle, query: str, expected: List[str], has_more: bool) -> None:
    result = call(shelf.url, f"/v1/models?{query}").json
    assert [item["id"] for item in result["data"]] == expected and result["has_more"] is has_more
    assert (result["first_id"], result["last_id"]) == ((expected[0], expected[-1]) if expected else (None, None))


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1.5", "limit=%C2%B2",
                                   "limit=5&after_id=no/such", "limit=5&before_id=no/such"])
def test_bad_model_pages(shelf: pg.ServerHandle, query: str) -> None:
    result = call(shelf.url, f"/v1/models?{query}")
    assert (result.status, result.json["error"]["type"]) == (400, "invalid_request_error")


def test_walk_through_all_pages(shelf: pg.ServerHandle) -> None:
    seen: List[str] = []
    query = "limit=7"
    while True:
        page = call(shelf.url, f"/v1/models?{query}").json
        seen += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        query = "limit=7&after_id=" + urllib.parse.quote(page["last_id"], safe="")
    assert seen == IDS


@pytest.mark.parametrize("path", ["/v1/models/p/org/name:free", "/v1/models/p%2Forg%2Fname%3Afree",
                                  "/models/p/org%2fname:free",
                                  "/v1/models/p/org/name:free/", "/v1/models/org/name:free",
                                  "/v1/models/p/org/name:free?x=1"])
def test_single_model(shelf: pg.ServerHandle, path: str) -> None:
    openai, anthropic = call(shelf.url, path), call(shelf.url, path, anthropic_version="2023-06-01")
    assert openai.status == anthropic.status == 200
    assert (openai.json["id"], openai.json["object"]) == ("p/org/name:free", "model")
    assert (anthropic.json["id"], anthropic.json["type"]) == ("p/org/name:free", "model")
    head = call(shelf.url, path, None, "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(openai.body)))


# --- Nothing that a client sends is our fault -------------------------------------------------------------------------

SEEDS: Dict[str, List[Dict[str, Any]]] = {
    "chat": [
        {"model": "ROW/m1", "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {
                "url": "data:image/png;base64,aGk="}}]},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "wx", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}],
         "tools": [{"type": "function", "function": {"name": "wx", "parameters": {"type": "object"}, "strict": True}}],
         "tool_choice": {"type": "function", "function": {"name": "wx"}}, "temperature": 0.5, "max_tokens": 20,
         "stop": ["x"], "reasoning_effort": "low", "response_format": {"type": "json_schema", "json_schema": {
             "name": "n", "schema": {"type": "object"}}}, "stream": False, "stream_options": {"include_usage": True}},
        {"model": "ROW/m1:high", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 1, "seed": 1}],
    "messages": [
        {"model": "ROW/m1", "max_tokens": 2000, "system": [{"type": "text", "text": "Be brief.", "cache_control": {
            "type": "ephemeral"}}], "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image", "source": {
                    "type": "base64", "media_type": "image/png", "data": "aGk="}}]},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                                                  {"type": "tool_use", "id": "toolu_1", "name": "wx",
                                                   "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [
                    {"type": "text", "text": "sunny"}], "is_error": False}]}],
         "tools": [{"name": "wx", "description": "weather", "input_schema": {"type": "object"}}],
         "tool_choice": {"type": "tool", "name": "wx"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
         "stop_sequences": ["x"], "metadata": {"user_id": "u"}, "stream": False},
        {"model": "ROW/m1", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], "stream": True}]}
ODD_VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1, 1.5, 1e308, 2 ** 70, "", "x", "\ud800", "\0", "ünï", [], {}, [None], [[]],
    {"type": "text"},
    {"type": None}, {"": 1}, [{"role": "user", "content": "a"}], {"url": "http://h/x.png"}, "data:,",
    "data:image/png;base64,!",
    {"type": "tool_use"}, {"type": "document", "source": {}}, "null", [1, "a", {}], {"role": 5}, "demo",
    {"$ref": "#/x"})


def with_a_fault(value: Any, rng: random.Random) -> Any:
    """`value` with something in it replaced, removed, doubled or wrapped."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, action = rng.choice(keys), rng.random()
        copy = value.copy()
        if action < 0.12:
            del copy[key]
        elif action < 0.2 and isinstance(copy, list):
            copy.insert(key, copy[key])
        elif action < 0.25 and isinstance(copy, dict):
            copy[rng.choice(("type", "role", "content", "name", "id", "input", "x"))] = rng.choice(ODD_VALUES)
        else:
            copy[key] = with_a_fault(value[key], rng)
        return copy
    return [value] if rng.random() < 0.1 else rng.choice(ODD_VALUES)


def mutated_body(client: str, rng: random.Random) -> bytes:
    """A request body that may or may not be one."""
    data: Any = rng.choice(SEEDS[client])
    data = {**data, "model": data["model"].replace("ROW", rng.choice(("chat", "anth")))}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = with_a_fault(data, rng)
    body = bytearray(json.dumps(data).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(body) + 1)
            body[place:place + rng.randint(0, 3)] = bytes(rng.choices(b'{}[]",:\\u\x00\xff 1eE-tn',
                                                                      k=rng.randint(0, 3)))
    return bytes(body)


@pytest.mark.parametrize("client", ["chat", "messages"])
def test_no_body_is_our_fault(script: Given, lines: LogLines, client: str) -> None:
    def answer(request: Received) -> Answer:
        row = "anth" if request.path.startswith("/v1/messages") else "chat"
        return stream_answer(row) if b'"stream":true' in request.body.replace(b" ", b"") else whole_answer(row)

    handle, fake = script(answer)
    rng = random.Random(20261122)
    counts: Dict[int, int] = {}
    with RawClient(handle.url) as raw:
        for turn in range(600):
            body = mutated_body(client, rng)
            result = raw.ask("POST", WAY_IN[client], body)
            counts[result.status] = counts.get(result.status, 0) + 1
            assert result.status in (200, 400, 404, 401), (turn, result.status, body, result.body)
            assert b"internal error" not in result.body, (turn, body)
            if result.status != 200:
                assert result.json["error"]["message"], (turn, body)
    assert not lines.find(lambda record: record.levelno >= logging.ERROR)
    assert counts[200] > 50 and counts[400] > 50


# ======================================================================================================================
# §14 Configuration and CLI
# ======================================================================================================================

PLANTED = ("sk-planted-in-env-000111222", "plantedinauthjson", "sk-planted-in-models-333444", "planted-gateway-key-555",
           "planted-on-the-command-line", "at-planted-access-token")


def check_written(name: str, text: str) -> None:
    """Whatever a program wrote: none of the keys, and no accident."""
    for secret in PLANTED:
        assert secret not in text, f"{secret} was shown by: {name}"
    assert "Traceback" not in text, name


def child_environ(home: Any, **more: str) -> Dict[str, str]:
    """The environment of a subprocess: this one's without anything of providers or of the gateway."""
    kept = {name: value for name, value in os.environ.items()
            if name.upper() in ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG", "COMSPEC")}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "PYTHONIOENCODING": "utf-8", **more}


def run_program(home: Any, *arguments: str, **more: str) -> Tuple[int, str, str]:
    """Runs the module to its end: exit status, stdout, stderr."""
    done = subprocess.run([sys.executable, "-m", "pigateway", *arguments], cwd=HERE, env=child_environ(home, **more),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20,
                          check=False)
    out, err = done.stdout.decode("utf-8").replace("\r\n", "\n"), done.stderr.decode("utf-8").replace("\r\n", "\n")
    check_written(" ".join(arguments), out + err)
    return done.returncode, out, err


class Program:
    """A gateway in a process of its own."""

    def __init__(self, home: Any, *arguments: str, command: Sequence[str] = (), cwd: str = HERE, **more: str) -> None:
        self.name = " ".join(arguments)
        self.process = subprocess.Popen(
            [sys.executable, *(command or ("-m", "pigateway")), *arguments], cwd=cwd, env=child_environ(home, **more),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.banner = ""
        self.url = ""
        self._pieces: Dict[str, List[bytes]] = {"out": [], "err": []}
        self._ready = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(name, stream), daemon=True)
                         for name, stream in (("out", self.process.stdout), ("err", self.process.stderr))]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str, stream: Any) -> None:
        for line in stream:
            self._pieces[name].append(line)
            if b"configuration " in line:
                self._ready.set()
        if name == "out":
            self._ready.set()

    def text(self, name: str) -> str:
        return b"".join(self._pieces[name]).decode("utf-8").replace("\r\n", "\n")

    def wait_ready(self) -> Program:
        assert self._ready.wait(15)
        self.banner = self.text("out")
        match = re.search(r"listening on (\S+)", self.banner)
        assert match, self.banner + self.text("err")
        self.url = match.group(1)
        return self

    def stop(self, number: int = signal.SIGTERM) -> Tuple[int, float]:
        """Sends a signal: exit status, and the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(15), time.monotonic() - started

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for thread in self._threads:
            thread.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        check_written(self.name, self.text("out") + self.text("err"))


@contextlib.contextmanager
def launched(home: Any, *arguments: str, **more: Any) -> Iterator[Program]:
    """A gateway in a process of its own, once it listens."""
    made = Program(home, "--port", "0", *arguments, **more)
    try:
        yield made.wait_ready()
    finally:
        made.close()


def load(home: Any, flags: Dict[str, Any] = {}, extra: Optional[str] = None, **environ: str) -> pg.Config:
    """The effective configuration with `home` as home directory."""
    return pg.load_config({"HOME": str(home), **environ}, flags, extra)


def test_defaults(tmp_path: Any) -> None:
    assert load(tmp_path) == pg.Config()
    config = load(tmp_path)
    assert (config.port, config.bind_address, config.log_level, config.max_body_bytes) == (4000, "127.0.0.1", "info",
                                                                                           16 << 20)
    assert config.is_loopback and config.exposes_subscriptions


def test_layers(tmp_path: Any) -> None:
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"port": 4, "allowedOrigins": ["c"]}))
    write_agent_files(tmp_path, gateway={"port": 2, "logLevel": "warn", "allowedOrigins": ["a", "b"],
                                         "heartbeatIntervalMs": 2000},
                      pigateway={"port": 3, "strict": True, "heartbeatIntervalMs": 3000})
    assert (load(tmp_path).port, load(tmp_path).allowed_origins) == (3, ("a", "b"))
    config = load(tmp_path, extra=str(extra))
    assert (config.port, config.allowed_origins, config.log_level, config.strict) == (4, ("c",), "warn", True)
    assert config.heartbeat_interval_ms == 3000 and len(config.sources) == 3
    assert load(tmp_path, extra=str(extra), PI_GATEWAY_PORT="5").port == 5
    assert load(tmp_path, {"port": 6}, str(extra), PI_GATEWAY_PORT="5").port == 6
    assert load(tmp_path, PI_GATEWAY_PORT="").port == 3


@pytest.mark.parametrize("environ, attribute, expected", [
    ({"PI_GATEWAY_PORT": "8080"}, "port", 8080), ({"PI_GATEWAY_PORT": " 0 "}, "port", 0),
    ({"PI_GATEWAY_BIND": "localhost"}, "bind_address", "localhost"),
    ({"PI_GATEWAY_BIND": "::1"}, "bind_address", "::1"),
    ({"PI_GATEWAY_API_KEY": "k"}, "api_key", "k"), ({"PI_GATEWAY_AUTH_DIR": "/x"}, "auth_dir", "/x"),
    ({"PI_GATEWAY_LOG_LEVEL": "DEBUG"}, "log_level", "debug"), ({"PI_GATEWAY_LOG_LEVEL": ""}, "log_level", "info"),
    ({"PI_GATEWAY_EXPOSE_OAUTH": "true"}, "expose_oauth_subscriptions", True),
    ({"PI_GATEWAY_EXPOSE_OAUTH": "1"}, "expose_oauth_subscriptions", False),
    ({"PI_GATEWAY_EXPOSE_OAUTH": ""}, "expose_oauth_subscriptions", None)])
def test_variables(tmp_path: Any, environ: Dict[str, str], attribute: str, expected: Any) -> None:
    assert getattr(load(tmp_path, **environ), attribute) == expected


def config_error(capsys: Any, monkeypatch: Any, home: Any, *arguments: str, **environ: str) -> str:
    """What `main` says when it ends with status 2."""
    for name in [name for name in os.environ if name.startswith("PI_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(home), "USERPROFILE": str(home), **environ}.items():
        monkeypatch.setenv(name, value)
    assert pg.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    check_written(" ".join(arguments), out + err)
    assert not out and err.startswith("pigateway: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("content, words", [
    ({"prot": 1}, ['"prot"', '"port"']), ({"bindAdress": "x"}, ['"bindAdress"', '"bindAddress"']),
    ({"apikey": "planted-gateway-key-555"}, ['"apikey"', '"apiKey"']), ({"zzz": 1}, ['"zzz"', "nearest"]),
    ({"port": "4000"}, ["port", "integer"]), ({"port": 65536}, ["port", "65535"]), ({"port": -1}, ["port"]),
    ({"port": 1.5}, ["port"]), ({"port": True}, ["port"]), ({"port": None}, ["port"]),
    ({"bindAddress": 1}, ["bindAddress"]),
    ({"apiKey": 555}, ["apiKey", "string"]), ({"apiKey": ["planted-gateway-key-555"]}, ["apiKey"]),
    ({"logLevel": "loud"}, ["logLevel", "debug"]), ({"logLevel": 1}, ["logLevel"]), ({"strict": "yes"}, ["strict"]),
    ({"requireKeyOnLoopback": 1}, ["requireKeyOnLoopback"]),
    ({"exposeOAuthSubscriptions": "true"}, ["exposeOAuthSubscriptions"]),
    ({"allowedOrigins": "x"}, ["allowedOrigins", "array"]), ({"modelAllowlist": [1]}, ["modelAllowlist"]),
    ({"modelDenylist": {}}, ["modelDenylist"]), ({"forceAbortTimeoutMs": 99}, ["forceAbortTimeoutMs", "100"]),
    ({"heartbeatIntervalMs": 999}, ["heartbeatIntervalMs", "1000"]), ({"maxBodyBytes": 5}, ["maxBodyBytes"]),
    ({"caBundle": 5}, ["caBundle"]), ({"demo": 0}, ["demo"]), ("[]", ["object"]), ("null", ["object"]),
    ("{,}", ["line 1"]),
    ("", ["JSON"]), ("{\n\"port\": 1,\n}", ["line "]), ("[" * 100_000, ["JSON"]),
    ({"bindAddress": "0.0.0.0"}, ["apiKey"]), ({"bindAddress": "0.0.0.0", "apiKey": ""}, ["apiKey"]),
    ({"requireKeyOnLoopback": True}, ["apiKey"])])
@pytest.mark.parametrize("where", ["gateway", "pigateway", "--config"])
def test_bad_configuration_files(tmp_path: Any, capsys: Any, monkeypatch: Any, content: Any, words: List[str],
                                 where: str) -> None:
    arguments = []
    if where == "--config":
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        arguments = ["--config", str(path)]
    else:
        path = os.path.join(write_agent_files(tmp_path, **{where: content}), f"{where}.json")
    message = config_error(capsys, monkeypatch, tmp_path, *arguments)
    assert all(word in message for word in words)
    assert str(path) in message or words == ["apiKey"]
    assert "planted" not in message


@pytest.mark.parametrize("environ, word", [
    ({"PI_GATEWAY_PORT": "abc"}, "PI_GATEWAY_PORT"), ({"PI_GATEWAY_PORT": "70000"}, "PI_GATEWAY_PORT"),
    ({"PI_GATEWAY_PORT": "1e3"}, "PI_GATEWAY_PORT"), ({"PI_GATEWAY_LOG_LEVEL": "loud"}, "PI_GATEWAY_LOG_LEVEL"),
    ({"PI_GATEWAY_BIND": "0.0.0.0"}, "0.0.0.0")])
def test_bad_variables(tmp_path: Any, capsys: Any, monkeypatch: Any, environ: Dict[str, str], word: str) -> None:
    assert word in config_error(capsys, monkeypatch, tmp_path, **environ)


@pytest.mark.parametrize("arguments, word", [
    (["--port", "abc"], "--port"), (["--port", "65536"], "--port"), (["--port", ""], "--port"), (["--port"], "--port"),
    (["--log-level", "loud"], "--log-level"), (["--no-such-flag"], "--no-such-flag"), (["begin"], "begin"),
    (["models", "extra"], "extra"), (["--config", "no/such/file.json"], "no/such/file.json"),
    (["--demo-delay-ms", "-1"], "--demo-delay-ms"),
    (["--bind", "0.0.0.0"], "0.0.0.0"), (["--require-key-on-loopback"], "apiKey"), (["--pro=1"], "--pro"),
    (["--api-key", "planted-on-the-command-line"], "--api-key"),
    (["--api-key=planted-on-the-command-line"], "--api-key"),
    (["--apikey", "planted-on-the-command-line"], "--api-key"),
    (["models", "--api-key", "planted-on-the-command-line"], "--api-key"),
])
def test_bad_flags(tmp_path: Any, capsys: Any, monkeypatch: Any, arguments: List[str], word: str) -> None:
    message = config_error(capsys, monkeypatch, tmp_path, *arguments)
    assert word in message and "planted" not in message


@pytest.mark.parametrize("name, content, words", [
    ("models", "{", ["models.json", "line"]), ("models", "[]", ["models.json"]),
    ("models", {}, ["models.json", "providers"]),
    ("models", {"providers": []}, ["models.json", "providers"])])
def test_broken_models_file(tmp_path: Any, capsys: Any, monkeypatch: Any, name: str, content: Any,
                            words: List[str]) -> None:
    write_agent_files(tmp_path, **{name: content})
    message = config_error(capsys, monkeypatch, tmp_path, "--port", "0")
    assert all(word in message for word in words)


def test_one_bad_provider_does_not_spoil_the_others(tmp_path: Any, lines: LogLines) -> None:
    models = two_providers("http://127.0.0.1:9")
    models["providers"]["bad"] = {"models": [{"id": "x"}]}
    write_agent_files(tmp_path, models=models)
    with running(tmp_path) as handle:
        assert listed_ids(handle) == ["anth/m1", "chat/m1"]
    warning = lines.find(lambda record: record.levelno == logging.WARNING)
    assert warning and "providers.bad" in warning.getMessage()


def test_help(tmp_path: Any) -> None:
    pages = [run_program(tmp_path, *arguments) for arguments in (["--help"], ["-h"], ["help"])]
    assert len(set(pages)) == 1 and pages[0][0] == 0 and not pages[0][2]
    page = pages[0][1].splitlines()
    assert len(page) <= 60 and not [line for line in page if len(line) > 100]
    for option in pg.OPTIONS:
        assert not option.flag or any(line.strip().startswith(option.flag) for line in page)
    assert "--api-key" not in pages[0][1] and "PI_GATEWAY_API_KEY" in pages[0][1]


def test_version(tmp_path: Any) -> None:
    for arguments in (["--version"], ["version"]):
        assert run_program(tmp_path, *arguments) == (0, f"pigateway {pg.VERSION}\n", "")
    assert not os.listdir(tmp_path)


def test_models_command(tmp_path: Any) -> None:
    write_agent_files(tmp_path, models=two_providers("http://127.0.0.1:9", contextWindow=1000, maxTokens=10),
                      auth={"groq": {"type": "api_key", "key": PLANTED[1]}})
    status, out, err = run_program(tmp_path, "models", "--model-denylist", "chat/m1")
    rows = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and not err and rows == sorted(rows)
    assert ["anth/m1", "anth"] in rows and ["chat/m1", "chat"] not in rows
    assert all(name.startswith(row + "/") for name, row in rows) and "groq" in {row for _, row in rows}
    status, out, err = run_program(tmp_path, "models", "--json")
    facts = {item["id"]: item for item in json.loads(out)}
    assert status == 0 and facts["chat/m1"]["contextWindow"] == 1000 and facts["chat/m1"]["provider"] == "chat"
    assert facts["anth/m1"]["protocol"] == "anthropic-messages" and facts["chat/m1"]["input"] == ["text", "image"]
    assert not os.path.exists(tmp_path / ".pi" / "agent" / "gateway.pid")


def test_models_command_without_models(tmp_path: Any) -> None:
    status, out, _ = run_program(tmp_path, "models", "--model-allowlist", "no/such")
    assert (status, out) == (1, "")


def test_a_newcomers_start(tmp_path: Any) -> None:
    with launched(tmp_path) as made:
        assert re.search(r"listening on http://127\.0\.0\.1:\d+\n", made.banner)
        for words in (f"base URL {made.url}/v1 ", f"base URL {made.url} ", "OpenAI clients", "Anthropic clients",
                      "demo/echo",
                      "ANTHROPIC_API_KEY", "models.json", "anything"):
            assert words in made.text("out")
        assert call(made.url, WAY_IN["chat"], ECHO).status == 200 and call(made.url, "/healthz").json["ok"] is True
        assert not [line for line in made.text("out").splitlines() if len(line) > 120]


@POSIX
def test_life_of_a_gateway(tmp_path: Any) -> None:
    folder = write_agent_files(
        tmp_path, gateway={"apiKey": PLANTED[3]}, auth={"groq": {"type": "api_key", "key": PLANTED[1]},
                                                       "zai": {"type": "oauth", "access": PLANTED[5], "expires": 9e15}},
        models={"providers": {"mine": {"baseUrl": f"http://127.0.0.1:{closed_port()}/v1", "apiKey": PLANTED[2],
                                       "models": [{"id": "m1"}]}}})
    pid_file = os.path.join(folder, "gateway.pid")
    with open(pid_file, "w", encoding="ascii") as file:
        file.write("999999999\n")                   # left behind by one that crashed
    with launched(tmp_path, "--log-level", "debug", OPENAI_API_KEY=PLANTED[0]) as made:
        with open(pid_file, encoding="ascii") as file:
            assert file.read() == f"{made.process.pid}\n"
        assert "mine 1" in made.banner and "gateway.json" in made.banner and "environment" not in made.banner
        result = call(made.url, WAY_IN["chat"], {**question("mine"), "model": "mine/m1"},
                      authorization=f"Bearer {PLANTED[3]}")
        assert result.status == 502
        assert call(made.url, f"/v1/nowhere?key={PLANTED[3]}", x_api_key=PLANTED[3]).status == 404
        with RawClient(made.url) as idle:
            assert idle.ask("GET", "/health").status == 200
            status, out, err = run_program(tmp_path, "--port", "0")
            assert status == 3 and not out and str(made.process.pid) in err and "--pid-file" in err
            status, out, err = run_program(tmp_path, "--port", made.url.rpartition(":")[2], "--pid-file",
                                           str(tmp_path / "other.pid"))
            assert status == 1 and "cannot listen" in err and "Traceback" not in err
            assert not os.path.exists(tmp_path / "other.pid")
            status, took = made.stop()
            assert status == 0 and took < 1.5 and idle.is_closed()
        assert not os.path.exists(pid_file)
        access = [json.loads(line) for line in made.text("err").splitlines()]
        assert {line["status"] for line in access if line.get("kind") == "access"} == {200, 404, 502}


@POSIX
@pytest.mark.parametrize("client", ["chat", "messages"])
def test_stopping_tells_open_streams(tmp_path: Any, client: str) -> None:
    with fake_upstream(lambda request: Answer(200, drip("chat"), "text/event-stream")) as fake:
        write_agent_files(tmp_path, gateway={"forceAbortTimeoutMs": 100}, models=two_providers(fake.url))
        with launched(tmp_path) as made:
            opened = OpenCall(made.url, WAY_IN[client], question("chat", True))
            opened.read_until(b"Hel")
            status, took = made.stop()
            seen = opened.read_until(b"0\r\n\r\n")
            opened.close()
        assert status == 0 and took < 3 and fake.client_gone.wait(2)
    assert b"stopping" in seen and b"[DONE]" not in seen and b"message_stop" not in seen
    assert (b"event: error\n" if client == "messages" else b'data: {"error":') in seen


@POSIX
def test_second_signal_ends_at_once(tmp_path: Any) -> None:
    with fake_upstream(lambda request: Answer(200, drip("chat"), "text/event-stream")) as fake:
        folder = write_agent_files(tmp_path, gateway={"forceAbortTimeoutMs": 60_000}, models=two_providers(fake.url))
        with launched(tmp_path) as made:
            opened = OpenCall(made.url, WAY_IN["chat"], question("chat", True))
            opened.read_until(b"Hel")
            made.process.send_signal(signal.SIGINT)
            until(lambda: refuses(made.url))         # the first one is being obeyed
            status, took = made.stop()
            opened.close()
        assert status == 0 and took < 1.0 and not os.path.exists(os.path.join(folder, "gateway.pid"))


def refuses(url: str) -> bool:
    """Whether nobody listens there any more."""
    split = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((split.hostname, split.port), timeout=1).close()
        return False
    except ConnectionError:
        return True


@POSIX
@pytest.mark.parametrize("home", ["/dev/null", "read-only"])
def test_unwritable_home_still_serves(tmp_path: Any, home: str) -> None:
    if home == "read-only" and os.geteuid() == 0:
        if not os.path.isdir("/proc/self"):
            pytest.skip("everything can be written by root")
        home = "/proc"
    elif home == "read-only":
        home = str(tmp_path)
        os.chmod(home, 0o555)
    with launched(home) as made:
        assert call(made.url, WAY_IN["chat"], ECHO).status == 200


def test_the_file_alone_is_enough(tmp_path: Any) -> None:
    folder = tmp_path / "empty folder"
    folder.mkdir()
    shutil.copy(MODULE, folder / "pigateway.py")
    with launched(tmp_path, command=("-I", "-S", "-B", "pigateway.py"), cwd=str(folder)) as made:
        assert answer_text(call(made.url, WAY_IN["messages"], ECHO)) == "echo this"
        assert os.listdir(folder) == ["pigateway.py"]


def test_import_does_no_work(tmp_path: Any) -> None:
    script = ("import builtins, io, os, socket, subprocess, sys, threading\n"
              "import pigateway as first\n"             # for its own imports
              "del sys.modules['pigateway']\n"
              "seen = []\n"
              "sys.addaudithook(lambda name, args: seen.append((name, args)) if name.split('.')[0] in "
              "('socket', 'subprocess', 'os', 'signal', 'urllib') or name == 'open' else None)\n"
              "import pigateway\n"
              "seen = [(name, args) for name, args in seen if name != 'os.listdir' and name != 'os.scandir' and "
              "not (name == 'open' and 'pigateway' in str(args[0])) and name not in ('os.rename', 'os.mkdir')]\n"
              "assert threading.active_count() == 1, threading.enumerate()\n"
              "assert not seen, seen\n"
              "print('done')\n")
    environ = child_environ(tmp_path, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=HERE, env=environ, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=20, check=False)
    assert (done.stderr.decode(), done.stdout.decode().strip()) == ("", "done")
    assert not os.listdir(tmp_path)


def test_start_and_stop_leave_nothing(tmp_path: Any) -> None:
    before = set(threading.enumerate())
    with fake_upstream(stream_answer("chat")) as fake:
        write_agent_files(tmp_path, models=two_providers(fake.url))
        during = set(threading.enumerate())
        for _ in range(2):
            handle = pg.start_server(environ={"HOME": str(tmp_path)}, port=0)
            assert call(handle.url, WAY_IN["chat"], question("chat", True)).status == 200
            with RawClient(handle.url) as idle:
                assert idle.ask("GET", "/health").status == 200
                started = time.monotonic()
                pg.stop_server(handle)
                assert time.monotonic() - started < 1.5 and idle.is_closed()
            assert refuses(handle.url)
            until(lambda: not [thread for thread in set(threading.enumerate()) - during
                               if "process_request" not in thread.name and "Dummy" not in thread.name])
    assert os.listdir(tmp_path / ".pi" / "agent") == ["models.json"]     # no lock file, no auth.json
    until(lambda: {thread for thread in set(threading.enumerate()) - before if thread.name in ("accept",
                                                                                               "discovery")} == set())


def test_two_servers_in_one_process(tmp_path: Any) -> None:
    with running(tmp_path) as first, running(tmp_path, strict=True) as second:
        assert first.url != second.url
        assert call(first.url, "/health").status == call(second.url, "/health").status == 200


def test_stopping_waits_for_what_is_under_way(tmp_path: Any) -> None:
    arrived, gate = threading.Event(), threading.Event()

    def answer(request: Received) -> Answer:
        arrived.set()
        gate.wait(10)
        return whole_answer("chat")

    with fake_upstream(answer) as fake:
        write_agent_files(tmp_path, models=two_providers(fake.url))
        handle = pg.start_server(environ={"HOME": str(tmp_path)}, port=0)
        results: List[Result] = []
        asking = threading.Thread(target=lambda: results.append(call(handle.url, WAY_IN["chat"], question("chat"))))
        asking.start()
        assert arrived.wait(5)
        stopping = threading.Thread(target=pg.stop_server, args=(handle, 5.0))
        stopping.start()
        until(lambda: refuses(handle.url))
        gate.set()
        asking.join(5)
        stopping.join(5)
        assert not stopping.is_alive() and results[0].status == 200 and answer_text(results[0]) == "Hello"


def test_embedding_checks_what_it_is_told(tmp_path: Any) -> None:
    with pytest.raises(pg.ConfigError):
        pg.start_server(pg.Config(port=0, bind_address="0.0.0.0"), {"HOME": str(tmp_path)})
    with pytest.raises(pg.ConfigError):
        pg.start_server(environ={"HOME": str(tmp_path)}, port=0, require_key_on_loopback=True)


# The time module for a product whose pauses pass at once: nobody is about to write the files it waits for.
HURRIED = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


@POSIX
def test_pid_file(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "time", HURRIED)
    path = str(tmp_path / "new folder" / "g.pid")
    lock = pg.PidFile(path)
    lock.claim()
    assert lock.owner() == os.getpid()
    with pytest.raises(pg.AlreadyRunning):
        pg.PidFile(path).claim()
    lock.release()
    assert not os.path.exists(path)
    for stale in ("999999999", "0", "-1", "no number", "\u00b2", "", "99999999999999999999999"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(stale)
        lock.claim()
        assert lock.owner() == os.getpid()
    with open(path, "w", encoding="ascii") as file:
        file.write("1\n")                           # somebody else's by now
    lock.release()
    assert os.path.exists(path)


def test_agent_folder(tmp_path: Any) -> None:
    for environ, config, expected in (
            ({}, {}, tmp_path / ".pi" / "agent"), ({"PI_CODING_AGENT_DIR": "/agent"}, {}, "/agent"),
            ({"PI_CODING_AGENT_DIR": "/agent"}, {"auth_dir": "/mine"}, "/mine")):
        assert pg.agent_dir(pg.Config(**config), {"HOME": str(tmp_path), **environ}) == str(expected)


def test_nothing_secret_was_written(tmp_path: Any) -> None:
    """A key in each place that can hold one, each told by a client, too; then the same files broken beside the key.
    What the programs wrote is searched when they end, here as everywhere."""
    login = {"type": "oauth", "access": PLANTED[5], "expires": 9e15}
    files: Dict[str, Any] = {"gateway": {"apiKey": PLANTED[3]},
                             "auth": {"groq": {"type": "api_key", "key": PLANTED[1]}, "zai": login}}
    with fake_upstream(Answer(400, json.dumps({"error": {"message": f"Not {PLANTED[2]}."}}).encode())) as fake:
        models = {"providers": {"mine": {"baseUrl": f"{fake.url}/v1", "apiKey": PLANTED[2], "models": [{"id": "m1"}]}}}
        write_agent_files(tmp_path, models=models, **files)
        with launched(tmp_path, "--log-level", "debug", OPENAI_API_KEY=PLANTED[0]) as made:
            for secret in PLANTED:
                assert call(made.url, f"/v1/nowhere?key={secret}", x_api_key=secret).status in (401, 404)
            result = call(made.url, WAY_IN["chat"], {**question("mine"), "model": "mine/m1"}, x_api_key=PLANTED[3])
            until(lambda: "mine/m1" in made.text("err"))        # the line follows the answer
        assert result.status == 400 and result.json["error"]["message"] == f"Not {pg.REDACTED}."
        assert fake.received[0].headers["authorization"] == f"Bearer {PLANTED[2]}"
        assert made.text("err").count("/v1/nowhere") >= len(PLANTED)
    assert run_program(tmp_path, "--api-key", PLANTED[4])[0] == 2
    for name, content in {**files, "models": models}.items():
        write_agent_files(tmp_path, **{name: json.dumps(content)[:-1] + "oops"})
        status, out, err = run_program(tmp_path, "models", "--log-level", "debug")
        assert status == (0 if name == "auth" else 2) and f"{name}.json" in err
        write_agent_files(tmp_path, **{name: content})
    for secret in PLANTED:
        with pytest.raises(AssertionError):
            check_written("a program that shows it", f"key {secret}")


# ======================================================================================================================
# Real clients
# ======================================================================================================================
#
# Everything from here on wants something that the rest does without: a package, a program, another Python or a model.
# What is missing skips; `.ci/run` brings it all, names the programs in these variables and lets nothing skip:
#
#   PIGATEWAY_NODE, PIGATEWAY_NODE_MODULES   node, and a node_modules with openai and @anthropic-ai/sdk
#   PIGATEWAY_CLAUDE                         Claude Code's program
#   PIGATEWAY_OLD_SDK_PYTHON                 a Python with openai<2, anthropic<1 and pytest
#   PIGATEWAY_LITELLM_PYTHON                 a Python with litellm
#   PIGATEWAY_REAL_MODEL                     the base URL of a llama.cpp server
#   PIGATEWAY_PYTHONS                        other interpreters, separated as in PATH


class Script(NamedTuple):
    """One answer of a provider, to be said in either provider protocol. A call is (id, name, arguments)."""

    text: str = ""
    thinking: str = ""
    calls: Tuple[Tuple[str, str, str], ...] = ()
    stop: str = ""                              # "" is a normal end

    @property
    def finish(self) -> str:
        """The stop reason, as Chat Completions calls it."""
        return self.stop or ("tool_calls" if self.calls else "stop")


SAID = "Hello from the provider \u2014 \u6f22 \U0001f3c1."
THOUGHT = 'Let me think: 2 + 2 = 4, "na\u00efvely".'
SIGNED_THOUGHT = "c2ln+/bmF0dXJl/+AAECAwQFBgcICQ=="         # base64 with every special character, as real signatures have
PLAIN = Script(SAID)
ONE_CALL = Script("Checking.", calls=(("call_A1", "wx", '{"city": "Rome"}'),))
INTERLEAVED_CALLS = Script(calls=(("call_A1", "wx", '{"city": "Rome"}'),
                          ("call_B2", "now", '{"city": "Paris \\"q\\" \u6f22"}')))
THINKS = Script(SAID, THOUGHT)
THINKS_AND_CALLS = Script("", THOUGHT, ONE_CALL.calls)
CUT_SHORT = Script("This is cut by the", stop="length")
NO_ARGUMENTS = Script(calls=(("call_C3", "wx", "{}"),))
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}
AS_JSON = Script('{"city": "Rome"}')
PICTURE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg"
                       "==")
# What a script costs: 12 tokens read anew, 900 from the cache, 100 into it, 33 written, 9 of them thoughts.
PROMPT_TOKENS, ANSWER_TOKENS = 1012, 33
MESSAGES_STOPS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens", "refusal": "refusal"}


def cut_up(text: str, size: int = 5) -> List[str]:
    """`text` in pieces, as a model streams it."""
    return [text[start:start + size] for start in range(0, len(text), size)]


def chat_body(script: Script, request: Dict[str, Any]) -> Dict[str, Any]:
    """A whole chat completion, as api.openai.com and DeepSeek (reasoning_content) send it."""
    message: Dict[str, Any] = {"role": "assistant", "content": script.text or None, "refusal": None, "annotations": []}
    if script.thinking:
        message["reasoning_content"] = script.thinking
    if script.calls:
        message["tool_calls"] = [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                                 for call_id, name, arguments in script.calls]
    return {"id": "chatcmpl-sc1", "object": "chat.completion", "created": 1760000000, "model": request["model"],
            "service_tier": "default", "system_fingerprint": "fp_1", "usage": chat_cost(),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": script.finish}]}


def chat_cost() -> Dict[str, Any]:
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS,
            "total_tokens": PROMPT_TOKENS + ANSWER_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 900, "cache_write_tokens": 100, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 9, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                          "rejected_prediction_tokens": 0}}


def chat_chunks(script: Script, request: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The same as a stream; the arguments of several calls come interleaved."""
    deltas: List[Dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None}]
    deltas += [{"reasoning_content": piece} for piece in cut_up(script.thinking)]
    deltas += [{"content": piece} for piece in cut_up(script.text)]
    for index, (call_id, name, _) in enumerate(script.calls):
        deltas.append({"tool_calls": [{"index": index, "id": call_id, "type": "function",
                                       "function": {"name": name, "arguments": ""}}]})
    pieces = [(place, index, piece) for index, (_, _, arguments) in enumerate(script.calls)
              for place, piece in enumerate(cut_up(arguments))]
    deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
               for _, index, piece in sorted(pieces)]
    base = {"id": "chatcmpl-sc1", "object": "chat.completion.chunk", "created": 1760000000, "model": request["model"],
            "service_tier": "default", "system_fingerprint": "fp_1"}
    chunks = [{**base, "choices": [{"index": 0, "delta": delta, "logprobs": None,
                                    "finish_reason": None if delta else script.finish}]} for delta in [*deltas, {}]]
    if (request.get("stream_options") or {}).get("include_usage"):
        chunks = [{**chunk, "usage": None} for chunk in chunks] + [{**base, "choices": [], "usage": chat_cost()}]
    return chunks


def message_blocks(script: Script) -> List[Dict[str, Any]]:
    blocks: List[Dict[str, Any]] = []
    if script.thinking:
        blocks.append({"type": "thinking", "thinking": script.thinking, "signature": SIGNED_THOUGHT})
    if script.text:
        blocks.append({"type": "text", "text": script.text})
    return blocks + [{"type": "tool_use", "id": call_id.replace("call_", "toolu_"), "name": name,
                      "input": json.loads(arguments)} for call_id, name, arguments in script.calls]


def message_body(script: Script, request: Dict[str, Any]) -> Dict[str, Any]:
    """A whole Anthropic message."""
    return {"id": "msg_sc1", "type": "message", "role": "assistant", "model": request["model"],
            "content": message_blocks(script), "stop_reason": MESSAGES_STOPS[script.finish], "stop_sequence": None,
            "stop_details": None,
            "usage": {"input_tokens": 12, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 900,
                      "cache_creation": {"ephemeral_5m_input_tokens": 60, "ephemeral_1h_input_tokens": 40},
                      "output_tokens": ANSWER_TOKENS, "service_tier": "standard"}}


def message_events(script: Script, request: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The same as a stream."""
    start = {**message_body(script, request), "content": [], "stop_reason": None}
    start["usage"] = {**start["usage"], "output_tokens": 1}
    events: List[Dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(message_blocks(script)):
        if block["type"] == "text":
            opening = {**block, "text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in cut_up(block["text"])]
        elif block["type"] == "thinking":
            opening = {**block, "thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in cut_up(block["thinking"])]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        else:
            opening = {**block, "input": {}}
            text = json.dumps(block["input"], ensure_ascii=False) if block["input"] else ""
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *cut_up(text)]]
        events.append({"type": "content_block_start", "index": index, "content_block": opening})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    return events + [
        {"type": "message_delta", "delta": {"stop_reason": MESSAGES_STOPS[script.finish], "stop_sequence": None},
         "usage": {"output_tokens": ANSWER_TOKENS}}, {"type": "message_stop"}]


def stream_of(script: Script, request: Received) -> Tuple[List[Any], bool]:
    """The payloads of a streamed answer, and whether it is an Anthropic one."""
    is_messages = "/messages" in request.path
    return (message_events if is_messages else chat_chunks)(script, request.json), is_messages


def saying(script: Script) -> Callable[[Received], Answer]:
    """A provider's good answer, in the protocol and the form it is asked in."""
    def answer(request: Received) -> Answer:
        if request.path.partition("?")[0].endswith("/count_tokens"):
            return Answer(body=b'{"input_tokens": 21}')
        if not request.json.get("stream"):
            whole = message_body if "/messages" in request.path else chat_body
            return Answer(body=json.dumps(whole(script, request.json)).encode())
        payloads, is_messages = stream_of(script, request)
        wire = sse(payloads, is_messages, "" if is_messages else "[DONE]")
        return Answer(200, [wire[:700], wire[700:]] if len(wire) > 700 else [wire], "text/event-stream")
    return answer


def breaking(script: Script, message: str = "") -> Callable[[Received], Answer]:
    """The first half of a good answer, then the connection is cut, or, with a message, an error event ends it."""
    def answer(request: Received) -> Answer:
        if not request.json.get("stream"):
            return refusing(529, message)(request) if message else Answer(200, [b'{"id": "x", "', b""])
        payloads, is_messages = stream_of(script, request)
        wire = sse(payloads[:len(payloads) // 2], is_messages)
        error = {"type": "error", **error_body(529, message, is_messages)} if message else {}
        return Answer(200, [wire, sse([error], is_messages) if message else b""], "text/event-stream")
    return answer


def error_body(status: int, message: str, is_messages: bool) -> Dict[str, Any]:
    """An error as each provider words it."""
    if is_messages:
        kinds = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
                 409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_sc1"}
    kind, code = {429: ("tokens", "rate_limit_exceeded"), 402: ("insufficient_quota", "insufficient_quota")}.get(
        status, ("invalid_request_error" if status < 500 else "server_error", None))
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusing(status: int, message: str) -> Callable[[Received], Answer]:
    """A provider's error status."""
    def answer(request: Received) -> Answer:
        body = error_body(status, message, "/messages" in request.path)
        return Answer(status, json.dumps(body).encode(), headers={"retry-after": "7"} if status in (429, 529) else {})
    return answer


def needs(package: str) -> Any:
    """Skips a test where a package is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"package {package} is not installed")


@contextlib.contextmanager
def served(home: Any, *answers: Any, facts: Optional[Dict[str, Any]] = None, **overrides: Any,
           ) -> Iterator[Tuple[str, FakeUpstream]]:
    """(base URL of a gateway, the provider behind it), which is there in both protocols, as `chat` and `anth`."""
    with fake_upstream(*answers) as fake:
        write_agent_files(home, models=two_providers(fake.url, **(facts or {})))
        with running(home, **overrides) as handle:
            yield handle.url, fake


class Turn(NamedTuple):
    """What a client program made of one answer."""

    text: str
    thinking: str
    calls: List[Tuple[str, Dict[str, Any]]]
    call_ids: List[str]
    stop: str
    tokens: Tuple[int, int]                     # read, written
    message: Dict[str, Any]                     # to go on with the conversation


class OpenAISdk:
    """OpenAI's package, and requests in its form. Modes: whole, raw (the bare stream), helper (the SDK joins it)."""

    name = "openai"
    stops = {"stop": "stop", "tool": "tool_calls", "length": "length"}

    def __init__(self, url: str) -> None:
        self.sdk = importlib.import_module(self.name)
        self.lanes: List[str] = []
        client = self.sdk.DefaultHttpxClient(trust_env=False, event_hooks={"response": [
            lambda response: self.lanes.append(response.headers.get("x-pigateway-lane", ""))]})
        self.client = self.sdk.OpenAI(base_url=url + "/v1", api_key="client-key", max_retries=0, timeout=60,
                                      http_client=client)

    def turn(self, mode: str, **request: Any) -> Turn:
        completions = self.client.chat.completions
        if mode == "helper":
            with completions.stream(stream_options={"include_usage": True}, **request) as stream:
                reply = stream.get_final_completion()
        elif mode == "raw":
            chunks = list(completions.create(stream=True, stream_options={"include_usage": True}, **request))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            stop = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
            usage = chunks[-1].usage
            return Turn(text, "", [], [], stop, (usage.prompt_tokens, usage.completion_tokens), {})
        else:
            reply = completions.create(**request)
        message = reply.choices[0].message
        calls = message.tool_calls or []
        return Turn(message.content or "", (message.model_extra or {}).get("reasoning_content") or "",
                    [(call.function.name, json.loads(call.function.arguments)) for call in calls],
                    [call.id for call in calls], reply.choices[0].finish_reason,
                    (reply.usage.prompt_tokens, reply.usage.completion_tokens), message)

    @staticmethod
    def tools(*names: str) -> List[Any]:
        return [{"type": "function", "function": {"name": name, "description": "A tool.", "parameters": CITY}}
                for name in names]

    @staticmethod
    def image() -> Dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PICTURE).decode()}}

    @staticmethod
    def results(turn: Turn, *contents: Any) -> List[Any]:
        return [{"role": "tool", "tool_call_id": call_id, "content": content}
                for call_id, content in zip(turn.call_ids, contents)]

    @staticmethod
    def request(**fields: Any) -> Dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Hi"}], **fields}

    @staticmethod
    def thinking() -> Dict[str, Any]:
        return {"reasoning_effort": "medium"}

    def parsed(self, **request: Any) -> Any:
        pydantic = importlib.import_module("pydantic")     # which both packages bring
        shape = pydantic.create_model("Place", city=(str, ...))
        return self.client.chat.completions.parse(response_format=shape, **request).choices[0].message.parsed


class AnthropicSdk:
    """Anthropic's package, likewise."""

    name = "anthropic"
    stops = {"stop": "end_turn", "tool": "tool_use", "length": "max_tokens"}

    def __init__(self, url: str) -> None:
        self.sdk = importlib.import_module(self.name)
        self.lanes: List[str] = []
        client = self.sdk.DefaultHttpxClient(trust_env=False, event_hooks={"response": [
            lambda response: self.lanes.append(response.headers.get("x-pigateway-lane", ""))]})
        self.client = self.sdk.Anthropic(base_url=url, api_key="client-key", max_retries=0, timeout=60,
                                         http_client=client)

    def turn(self, mode: str, **request: Any) -> Turn:
        if mode == "helper":
            with self.client.messages.stream(**request) as stream:
                reply = stream.get_final_message()
        elif mode == "raw":
            events = list(self.client.messages.create(stream=True, **request))
            assert events[-1].type == "message_stop"
            text = "".join(getattr(event.delta, "text", "") for event in events if event.type == "content_block_delta")
            last = [event for event in events if event.type == "message_delta"][-1]
            read = max(self.used(events[0].message.usage)[0], self.used(last.usage)[0])     # said first, or last
            return Turn(text, "", [], [], last.delta.stop_reason, (read, last.usage.output_tokens), {})
        else:
            reply = self.client.messages.create(**request)
        calls = [block for block in reply.content if block.type == "tool_use"]
        return Turn("".join(block.text for block in reply.content if block.type == "text"),
                    "".join(block.thinking for block in reply.content if block.type == "thinking"),
                    [(block.name, block.input) for block in calls], [block.id for block in calls], reply.stop_reason,
                    self.used(reply.usage), {"role": "assistant", "content": reply.content})

    @staticmethod
    def used(usage: Any) -> Tuple[int, int]:
        """(read, written): what comes from the cache or goes into it is counted apart from input_tokens."""
        parts = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        return sum(part or 0 for part in parts), usage.output_tokens

    @staticmethod
    def tools(*names: str) -> List[Any]:
        return [{"name": name, "description": "A tool.", "input_schema": CITY} for name in names]

    @staticmethod
    def image() -> Dict[str, Any]:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                            "data": base64.b64encode(PICTURE).decode()}}

    @staticmethod
    def results(turn: Turn, *contents: Any) -> List[Any]:
        return [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": content}
                                             for call_id, content in zip(turn.call_ids, contents)]}]

    @staticmethod
    def request(**fields: Any) -> Dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2048, **fields}

    @staticmethod
    def thinking() -> Dict[str, Any]:
        return {"thinking": {"type": "enabled", "budget_tokens": 1024}}

    def parsed(self, **request: Any) -> Any:
        pydantic = importlib.import_module("pydantic")     # which both packages bring
        shape = pydantic.create_model("Place", city=(str, ...))
        return self.client.messages.parse(output_format=shape, **request).parsed_output


SDKS = {sdk.name: sdk for sdk in (OpenAISdk, AnthropicSdk)}
PROVIDER_OF_LANE = {("openai", "chat"): "native", ("anthropic", "anth"): "native"}
each_sdk = pytest.mark.parametrize("client", [pytest.param(name, marks=needs(name)) for name in SDKS])
each_provider = pytest.mark.parametrize("provider", ["chat", "anth"])
each_form = pytest.mark.parametrize("mode", ["whole", "helper"])


def lane_of(client: str, provider: str) -> str:
    """The lane that a client of that SDK takes to that provider."""
    return PROVIDER_OF_LANE.get((client, provider), "translated")


def tool_results(body: Dict[str, Any]) -> List[str]:
    """What a provider is told that the tools returned, in the order of the calls it made."""
    found: Dict[str, str] = {}
    calls: List[str] = []
    for message in body["messages"]:
        calls += [call["id"] for call in message.get("tool_calls") or ()]
        blocks = message["content"] if isinstance(message["content"], list) else []
        calls += [block["id"] for block in blocks if block["type"] == "tool_use"]
        if message["role"] == "tool":
            blocks = [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}]
        for block in blocks:
            if block["type"] == "tool_result":
                content = block["content"]
                found[block["tool_use_id"]] = content if isinstance(content, str) else content[0]["text"]
    return [found[call_id] for call_id in calls]


@each_sdk
@each_provider
@pytest.mark.parametrize("mode, script, stop", [
    ("whole", PLAIN, "stop"), ("raw", PLAIN, "stop"), ("helper", PLAIN, "stop"), ("whole", CUT_SHORT, "length"),
    ("raw", CUT_SHORT, "length")], ids=["whole", "raw", "helper", "whole cut at the limit", "raw cut at the limit"])
def test_sdk_text(tmp_path: Any, client: str, provider: str, mode: str, script: Script, stop: str) -> None:
    with served(tmp_path, saying(script)) as (url, fake):
        sdk = SDKS[client](url)
        turn = sdk.turn(mode, model=f"{provider}/m1", **sdk.request())
    assert (turn.text, turn.stop) == (script.text, sdk.stops[stop])
    assert turn.tokens == (PROMPT_TOKENS, ANSWER_TOKENS)
    assert sdk.lanes == [lane_of(client, provider)]
    assert fake.received[0].json["model"] == "m1"


@each_sdk
@each_provider
@each_form
@pytest.mark.parametrize("script", [ONE_CALL, INTERLEAVED_CALLS, NO_ARGUMENTS], ids=["one", "two interleaved", "no arguments"])
def test_sdk_tool_loop(tmp_path: Any, client: str, provider: str, mode: str, script: Script) -> None:
    with served(tmp_path, saying(script), saying(PLAIN)) as (url, fake):
        sdk = SDKS[client](url)
        request = sdk.request(model=f"{provider}/m1", tools=sdk.tools("wx", "now"))
        first = sdk.turn(mode, **request)
        results = ["rain", "noon"][:len(script.calls)]
        request["messages"] += [first.message, *sdk.results(first, *results)]
        second = sdk.turn(mode, **request)
    assert first.calls == [(name, json.loads(arguments)) for _, name, arguments in script.calls]
    assert (first.text, first.stop, len(set(first.call_ids))) == (script.text, sdk.stops["tool"], len(script.calls))
    assert (second.text, second.stop) == (SAID, sdk.stops["stop"])
    assert tool_results(fake.received[1].json) == results


@each_sdk
@each_provider
@each_form
def test_sdk_thinking_goes_back_as_it_came(tmp_path: Any, client: str, provider: str, mode: str) -> None:
    wants_thoughts_back = {"compat": {"requiresReasoningContentOnAssistantMessages": True}}
    with served(tmp_path, saying(THINKS_AND_CALLS), saying(THINKS), facts=wants_thoughts_back) as (url, fake):
        sdk = SDKS[client](url)
        request = sdk.request(model=f"{provider}/m1", tools=sdk.tools("wx"), **sdk.thinking())
        first = sdk.turn(mode, **request)
        request["messages"] += [first.message, *sdk.results(first, "rain")]
        second = sdk.turn(mode, **request)
    assert (first.thinking, first.text, second.thinking, second.text) == (THOUGHT, "", THOUGHT, SAID)
    history = next(message for message in fake.received[1].json["messages"] if message["role"] == "assistant")
    if provider == "anth":
        assert history["content"][0] == {"type": "thinking", "thinking": THOUGHT, "signature": SIGNED_THOUGHT}
    else:
        assert history["reasoning_content"] == THOUGHT


@each_sdk
@each_provider
def test_sdk_parses_structured_output(tmp_path: Any, client: str, provider: str) -> None:
    with served(tmp_path, saying(AS_JSON)) as (url, fake):
        sdk = SDKS[client](url)
        assert sdk.parsed(model=f"{provider}/m1", **sdk.request()).city == "Rome"
    body = fake.received[0].json
    shape = body["response_format"]["json_schema"] if provider == "chat" else body["output_config"]["format"]
    assert shape["schema"]["required"] == ["city"]


@each_sdk
@each_provider
@pytest.mark.parametrize("place", ["user", "tool result"])
def test_sdk_images_arrive(tmp_path: Any, client: str, provider: str, place: str) -> None:
    with served(tmp_path, saying(ONE_CALL), saying(PLAIN)) as (url, fake):
        sdk = SDKS[client](url)
        content = [{"type": "text", "text": "Look:"}, sdk.image()]
        request = sdk.request(model=f"{provider}/m1", tools=sdk.tools("wx"))
        if place == "user":
            request["messages"] = [{"role": "user", "content": content}]
        first = sdk.turn("whole", **request)
        if place == "tool result":
            request["messages"] += [first.message, *sdk.results(first, content)]
            sdk.turn("whole", **request)
    body = fake.received[-1].body
    assert body.count(base64.b64encode(PICTURE)) == 1 and b"image/png" in body and b"Look:" in body


@each_sdk
@each_provider
@pytest.mark.parametrize("mode", ["whole", "raw", "helper"])
@pytest.mark.parametrize("script", [PLAIN, ONE_CALL], ids=["text", "tool"])
@pytest.mark.parametrize("message", ["", "the provider's own trouble"], ids=["cut", "error event"])
def test_sdk_raises_when_an_answer_breaks_off(tmp_path: Any, client: str, provider: str, mode: str, script: Script,
                                              message: str) -> None:
    with served(tmp_path, breaking(script, message)) as (url, _):
        sdk = SDKS[client](url)
        with pytest.raises(sdk.sdk.APIError) as raised:
            sdk.turn(mode, model=f"{provider}/m1", **sdk.request(tools=sdk.tools("wx", "now")))
    assert message in str(raised.value)


# A provider's status, and the exception (its status) in OpenAI's and in Anthropic's package. The provider refusing the
# gateway's key is not the client's 401: clients would ask their user to log in again.
STATUS_CLASSES = [
    (400, "BadRequestError", 400, "BadRequestError", 400),
    (401, "InternalServerError", 502, "InternalServerError", 502),
    (403, "PermissionDeniedError", 403, "PermissionDeniedError", 403),
    (404, "NotFoundError", 404, "NotFoundError", 404),
    (413, "APIStatusError", 413, "APIStatusError", 413),
    (429, "RateLimitError", 429, "RateLimitError", 429),
    (500, "InternalServerError", None, "InternalServerError", None),
    (529, "InternalServerError", None, "OverloadedError", 529)]


@each_sdk
@each_provider
@pytest.mark.parametrize("mode", ["whole", "raw"])
@pytest.mark.parametrize("row", STATUS_CLASSES, ids=[str(row[0]) for row in STATUS_CLASSES])
def test_sdk_exception_of_a_status(tmp_path: Any, client: str, provider: str, mode: str, row: Tuple[Any, ...]) -> None:
    message = f"what the provider says about {row[0]}"
    with served(tmp_path, refusing(row[0], message)) as (url, fake):
        sdk = SDKS[client](url)
        with pytest.raises(sdk.sdk.APIStatusError) as raised:
            sdk.turn(mode, model=f"{provider}/m1", **sdk.request())
    name, status = row[1:3] if client == "openai" else row[3:5]
    assert name in [base.__name__ for base in type(raised.value).__mro__]
    assert raised.value.status_code == (status or raised.value.status_code) and message in str(raised.value)
    headers = raised.value.response.headers
    assert headers.get("retry-after") == ("7" if row[0] in (429, 529) else None)
    assert headers.get("x-should-retry") == ("false" if row[0] == 401 else headers.get("x-should-retry"))
    assert len(fake.received) == 1


@each_sdk
def test_sdk_unknown_model_and_model_list(tmp_path: Any, client: str) -> None:
    with served(tmp_path, saying(PLAIN)) as (url, fake):
        sdk = SDKS[client](url)
        with pytest.raises(sdk.sdk.NotFoundError):
            sdk.turn("whole", model="none-such/at-all", **sdk.request())
        assert {"anth/m1", "chat/m1"} <= {model.id for model in sdk.client.models.list()}
        assert sdk.client.models.retrieve("chat/m1").id == "chat/m1"
    assert fake.received == []


@needs("anthropic")
@each_provider
def test_sdk_counts_tokens(tmp_path: Any, provider: str) -> None:
    with served(tmp_path, saying(PLAIN)) as (url, _):
        sdk = AnthropicSdk(url)
        count = sdk.client.messages.count_tokens(model=f"{provider}/m1", messages=sdk.request()["messages"],
                                                 tools=sdk.tools("wx"))
    assert count.input_tokens == 21 if provider == "anth" else count.input_tokens > 0


@needs("anthropic")
@each_provider
def test_sdk_tool_runner(tmp_path: Any, provider: str) -> None:
    """Since its second generation the runner first asks for a conversation kept by the server (`thread`), and sends the
    messages itself when the answer is the documented refusal."""
    with served(tmp_path, saying(ONE_CALL), saying(PLAIN)) as (url, fake):
        sdk = AnthropicSdk(url)

        @sdk.sdk.beta_tool
        def wx(city: str) -> str:
            """Weather.

            Args:
                city: the city
            """
            return "rain in " + city

        runner = sdk.client.beta.messages.tool_runner(tools=[wx], model=f"{provider}/m1", **sdk.request())
        assert "".join(block.text for block in list(runner)[-1].content) == SAID
    assert tool_results(fake.received[-1].json) == ["rain in Rome"]
    assert len(fake.received) == 2 and not any("thread" in request.json for request in fake.received)


def client_environ(**extra: str) -> Dict[str, str]:
    """The environment for a client program: no proxy, and nothing that another account left."""
    kept = {name: value for name, value in os.environ.items()
            if not re.search(r"_PROXY$|^(ANTHROPIC|CLAUDE|OPENAI|PIGATEWAY)", name.upper())}
    return {**kept, **extra}


def program(variable: str) -> str:
    """The program that an environment variable names; skips without one."""
    return os.environ.get(variable) or pytest.skip(f"{variable} names no program")


def output_of(command: Sequence[str], timeout_s: float = 120.0, **options: Any) -> str:
    """What a program prints; its error output explains a failure."""
    done = subprocess.run(list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=timeout_s, encoding="utf-8", **options)
    assert done.returncode == 0, "\n".join([*command[:4], done.stdout[-3000:], done.stderr[-3000:]])
    return done.stdout


def test_old_sdks() -> None:
    """The generations of both packages before the present ones pass the same tests."""
    python = program("PIGATEWAY_OLD_SDK_PYTHON")
    told = output_of([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_sdk_", "--rootdir", HERE,
                      os.path.join(HERE, "test_pigateway.py")], 300.0, env=client_environ(), cwd=HERE)
    assert " passed" in told and "skipped" not in told, told


LITELLM_SCRIPT = '''
import json, sys
import litellm
url, found = sys.argv[1], []
for model, base in (("openai/{}/m1", url + "/v1"), ("anthropic/{}/m1", url)):
    for provider in ("chat", "anth"):
        for stream in (False, True):
            reply = litellm.completion(model=model.format(provider), api_base=base, api_key="k", stream=stream,
                                       messages=[{"role": "user", "content": "Hi"}], num_retries=0)
            parts = [part.choices[0].delta for part in reply] if stream else [reply.choices[0].message]
            found.append("".join(part.content or "" for part in parts))
try:
    litellm.completion(model="openai/chat/none", api_base=url + "/v1", api_key="k", num_retries=0,
                       messages=[{"role": "user", "content": "Hi"}])
except litellm.NotFoundError:
    found.append("not found")
print("FOUND " + json.dumps(found))
'''


def test_litellm(tmp_path: Any) -> None:
    python = program("PIGATEWAY_LITELLM_PYTHON")
    answers = [saying(PLAIN)] * 8 + [refusing(404, "no such model")]
    with served(tmp_path, *answers) as (url, _):
        told = output_of([python, "-c", LITELLM_SCRIPT, url], cwd=str(tmp_path),
                         env=client_environ(LITELLM_LOCAL_MODEL_COST_MAP="True", PYTHONIOENCODING="utf-8"))
    assert json.loads(told.rpartition("FOUND ")[2]) == [SAID] * 8 + ["not found"]


NODE_SCRIPT = r"""
import OpenAI from 'openai';
import Anthropic from '@anthropic-ai/sdk';

const { url, models, tools, max_tokens } = JSON.parse(process.argv[2]);
const lanes = [];
const watch = async (...given) => {
  const response = await fetch(...given);
  lanes.push(response.headers.get('x-pigateway-lane'));
  return response;
};
const openai = new OpenAI({ baseURL: url + '/v1', apiKey: 'k', maxRetries: 0, fetch: watch });
const anthropic = new Anthropic({ baseURL: url, apiKey: 'k', maxRetries: 0, fetch: watch });
const messages = [{ role: 'user', content: 'Say hello to Rome.' }];
const anything = { type: 'object', properties: {} };

const asOpenAI = async (model, stream) => {
  const request = { model, messages, max_completion_tokens: max_tokens, temperature: 0 };
  if (tools) request.tools = tools.map((name) => ({ type: 'function', function: { name, parameters: anything } }));
  const streamed = { ...request, stream_options: { include_usage: true } };
  const reply = stream
    ? await openai.chat.completions.stream(streamed).finalChatCompletion()
    : await openai.chat.completions.create(request);
  const { message } = reply.choices[0], { usage } = reply;
  return { text: message.content ?? '', tokens: [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    calls: (message.tool_calls ?? []).map((call) => [call.function.name, JSON.parse(call.function.arguments)]) };
};
const asAnthropic = async (model, stream) => {
  const request = { model, messages, max_tokens, temperature: 0 };
  if (tools) request.tools = tools.map((name) => ({ name, input_schema: anything }));
  const reply = stream
    ? await anthropic.messages.stream(request).finalMessage()
    : await anthropic.messages.create(request);
  const u = reply.usage;
  const read = u.input_tokens + (u.cache_read_input_tokens ?? 0) + (u.cache_creation_input_tokens ?? 0);
  return { text: reply.content.filter((block) => block.type === 'text').map((block) => block.text).join(''),
    tokens: [read, u.output_tokens, read + u.output_tokens],
    calls: reply.content.filter((block) => block.type === 'tool_use').map((block) => [block.name, block.input]) };
};

const rows = [];
for (const model of models) {
  for (const [client, ask] of [['openai', asOpenAI], ['anthropic', asAnthropic]]) {
    for (const stream of [false, true]) {
      lanes.length = 0;
      const row = { model, client, stream };
      try {
        Object.assign(row, await ask(model, stream));
      } catch (error) {
        row.error = error.constructor.name;
        row.message = String(error.message);
      }
      rows.push({ ...row, lane: lanes[0] });
    }
  }
}
console.log(JSON.stringify(rows));
"""


def node_answers(folder: Any, url: str, models: Sequence[str], tools: Sequence[str] = (), max_tokens: int = 2048,
                 ) -> List[Any]:
    """What both Node packages make of each model, whole and streamed: client, model, stream, lane, and text, calls and
    tokens or error and message."""
    node, modules = program("PIGATEWAY_NODE"), program("PIGATEWAY_NODE_MODULES")
    script = os.path.join(str(folder), "clients.mjs")
    with open(script, "w", encoding="utf-8") as file:
        file.write(NODE_SCRIPT)
    if not os.path.exists(os.path.join(str(folder), "node_modules")):
        os.symlink(modules, os.path.join(str(folder), "node_modules"))
    job = {"url": url, "models": list(models), "tools": list(tools) or None, "max_tokens": max_tokens}
    return json.loads(output_of([node, script, json.dumps(job)], env=client_environ(), cwd=str(folder)))


@pytest.mark.parametrize("answer, tools, expected", [
    (saying(PLAIN), (), {"text": SAID, "calls": []}),
    (saying(INTERLEAVED_CALLS), ("wx", "now"), {"calls": [["wx", {"city": "Rome"}], ["now", {"city": 'Paris "q" \u6f22'}]]}),
    (refusing(429, "slow down, says the provider"), (), {"error": "RateLimitError"}),
    (refusing(404, "slow down, says the provider"), (), {"error": "NotFoundError"}),
    (breaking(PLAIN), (), {}), (breaking(ONE_CALL, "broke off, slow down, says the provider"), ("wx",), {}),
], ids=["text", "tools", "429", "404", "cut", "error event"])
def test_node_sdks(tmp_path: Any, answer: Any, tools: Any, expected: Dict[str, Any]) -> None:
    program("PIGATEWAY_NODE")
    with served(tmp_path, answer) as (url, _):
        rows = node_answers(tmp_path, url, ["chat/m1", "anth/m1"], tools)
    assert len(rows) == 8
    for row in rows:
        assert {name: row.get(name) for name in expected} == expected, row
        if "calls" in expected:
            assert row["tokens"] == [PROMPT_TOKENS, ANSWER_TOKENS, PROMPT_TOKENS + ANSWER_TOKENS], row
            assert row["lane"] == lane_of(row["client"], row["model"].partition("/")[0]), row
        else:
            assert row["error"], row
            assert answer.__qualname__.startswith("breaking") or "slow down, says the provider" in row["message"], row


@each_provider
def test_claude_code(tmp_path: Any, provider: str) -> None:
    """A whole turn of Claude Code: it asks, is told to read a file, reads it, and says what the model then says."""
    claude, note = program("PIGATEWAY_CLAUDE"), tmp_path / "work" / "note.txt"
    note.parent.mkdir()
    note.write_text("the marker is m4rk3r-7 and nothing else\n")

    def answer(request: Received) -> Answer:
        if request.path.partition("?")[0].endswith("/count_tokens"):
            return saying(PLAIN)(request)
        body = request.json
        names = [tool.get("name") or tool["function"]["name"] for tool in body.get("tools") or ()]
        if "Read" not in names:                 # a side question of its own, such as a title
            return saying(Script("ok"))(request)
        if not tool_results(body):
            return saying(Script("", THOUGHT, (("call_R1", "Read", json.dumps({"file_path": str(note)})),)))(request)
        return saying(Script("It says: " + re.findall(r"m4rk3r-\d|$", tool_results(body)[0])[0]))(request)

    with served(tmp_path, answer) as (url, fake):
        told = output_of([claude, "-p", f"Read the file {note} and tell me what it says.", "--model", f"{provider}/m1",
                          "--allowedTools", "Read"], cwd=str(note.parent), env=client_environ(
            HOME=str(tmp_path), ANTHROPIC_BASE_URL=url, ANTHROPIC_API_KEY="x", CLAUDE_CODE_MAX_RETRIES="1",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            PATH=os.pathsep.join([os.path.dirname(os.environ.get("PIGATEWAY_NODE", "")), os.environ["PATH"]])))
    assert "It says: m4rk3r-7" in told
    asked = [request for request in fake.received if b'"Read"' in request.body]
    assert len(asked) == 2
    if provider == "anth":
        assert SIGNED_THOUGHT.encode() in asked[-1].body


# ======================================================================================================================
# §8 Responses, Azure, Codex
# ======================================================================================================================

RESPONSES, AZURE, CODEX = pg.OpenAIResponses(), pg.AzureResponses(), pg.CodexResponses()
RESPONSES_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
RESPONSES_PATCH = "*** Begin Patch\n*** End Patch\n"


def responses_model(**fields: Any) -> pg.Model:
    compat = fields.pop("compat", {})
    return pg.Model(**{"id": "m2", "provider": "p", "protocol": "openai-responses", "reasoning": True,
                       "base_url": "https://api.test/v1", "input": ("text", "image"),
                       "compat": {"supportsStrictMode": True, **compat}, **fields})


def responses_read(data: bytes, step: Optional[int] = None, reader: Any = None, cut: Optional[int] = None) -> List[Any]:
    settled = pg.Settled(reader or pg.ResponsesReader(STAMP))
    events: List[Any] = []
    data = data[:cut]
    for place in range(0, len(data), step or max(1, len(data))):
        events += settled.feed(data[place:place + (step or len(data))])
    return events + settled.end()


def responses_frames(*events: Any) -> bytes:
    return sse(events)


def responses_parts(events: Sequence[Any]) -> List[Any]:
    """The finished parts."""
    return [event.part for event in events if isinstance(event, pg.PartEnd)]


def responses_final(status: str = "completed", **fields: Any) -> Dict[str, Any]:
    """The last event."""
    return {"type": "response." + status, "response": {"id": "r", "status": status, "output": [], **fields}}


def responses_wire(*events: Any, named: bool = False) -> bytes:
    """Events exactly as OpenAI writes them, without blanks."""
    return b"".join((f"event: {event['type']}\n" if named else "").encode() + b"data: " + pg.dumps(event).encode()
                    + b"\n\n" for event in events)


# D4 to D7 of the wire reference, to the byte.
RESPONSES_D4 = responses_wire(
    {"type": "response.created", "sequence_number": 0,
     "response": {"id": "resp_d4", "object": "response", "created_at": 1760000002, "status": "in_progress",
                  "model": "m2", "output": [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}},
    {"type": "response.in_progress", "sequence_number": 1,
     "response": {"id": "resp_d4", "object": "response", "created_at": 1760000002, "status": "in_progress",
                  "model": "m2", "output": [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}},
    {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0,
     "item": {"id": "rs_1", "type": "reasoning", "summary": []}},
    {"type": "response.reasoning_summary_part.added", "sequence_number": 3, "item_id": "rs_1", "output_index": 0,
     "summary_index": 0, "part": {"type": "summary_text", "text": ""}},
    {"type": "response.reasoning_summary_text.delta", "sequence_number": 4, "item_id": "rs_1", "output_index": 0,
     "summary_index": 0, "delta": "Plan it."},
    {"type": "response.reasoning_summary_text.done", "sequence_number": 5, "item_id": "rs_1", "output_index": 0,
     "summary_index": 0, "text": "Plan it."},
    {"type": "response.reasoning_summary_part.done", "sequence_number": 6, "item_id": "rs_1", "output_index": 0,
     "summary_index": 0, "part": {"type": "summary_text", "text": "Plan it."}},
    {"type": "response.output_item.done", "sequence_number": 7, "output_index": 0,
     "item": {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Plan it."}],
              "encrypted_content": "ENC1"}},
    {"type": "response.output_item.added", "sequence_number": 8, "output_index": 1,
     "item": {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}},
    {"type": "response.content_part.added", "sequence_number": 9, "item_id": "msg_1", "output_index": 1,
     "content_index": 0, "part": {"type": "output_text", "text": "", "annotations": []}},
    {"type": "response.output_text.delta", "sequence_number": 10, "item_id": "msg_1", "output_index": 1,
     "content_index": 0, "delta": "Done.", "logprobs": []},
    {"type": "response.output_text.done", "sequence_number": 11, "item_id": "msg_1", "output_index": 1,
     "content_index": 0, "text": "Done.", "logprobs": []},
    {"type": "response.content_part.done", "sequence_number": 12, "item_id": "msg_1", "output_index": 1,
     "content_index": 0, "part": {"type": "output_text", "text": "Done.", "annotations": []}},
    {"type": "response.output_item.done", "sequence_number": 13, "output_index": 1,
     "item": {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": "final_answer",
              "content": [{"type": "output_text", "text": "Done.", "annotations": []}]}},
    {"type": "response.completed", "sequence_number": 14,
     "response": {"id": "resp_d4", "object": "response", "created_at": 1760000002, "status": "completed", "model": "m2",
                  "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                  "output": [{"id": "rs_1", "type": "reasoning",
                              "summary": [{"type": "summary_text", "text": "Plan it."}], "encrypted_content": "ENC1"},
                             {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                              "phase": "final_answer",
                              "content": [{"type": "output_text", "text": "Done.", "annotations": []}]}],
                  "usage": {"input_tokens": 40, "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 0},
                            "output_tokens": 12, "output_tokens_details": {"reasoning_tokens": 8},
                            "total_tokens": 52}}}, named=True)
RESPONSES_D5 = responses_wire(
    {"type": "response.created", "sequence_number": 0,
     "response": {"id": "resp_d5", "object": "response", "created_at": 1760000003, "status": "in_progress",
                  "model": "m2", "output": [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}},
    {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0,
     "item": {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "wx", "arguments": "",
              "status": "in_progress"}},
    {"type": "response.function_call_arguments.delta", "sequence_number": 2, "item_id": "fc_1", "output_index": 0,
     "delta": '{"city":"Ro'},
    {"type": "response.function_call_arguments.delta", "sequence_number": 3, "item_id": "fc_1", "output_index": 0,
     "delta": 'me"}'},
    {"type": "response.function_call_arguments.done", "sequence_number": 4, "item_id": "fc_1", "output_index": 0,
     "arguments": '{"city":"Rome"}'},
    {"type": "response.output_item.done", "sequence_number": 5, "output_index": 0,
     "item": {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "wx", "arguments": '{"city":"Rome"}',
              "status": "completed"}},
    {"type": "response.output_item.added", "sequence_number": 6, "output_index": 1,
     "item": {"id": "ctc_2", "type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": ""}},
    {"type": "response.custom_tool_call_input.delta", "sequence_number": 7, "item_id": "ctc_2", "output_index": 1,
     "delta": "*** Begin Patch\n*** End Patch\n"},
    {"type": "response.custom_tool_call_input.done", "sequence_number": 8, "item_id": "ctc_2", "output_index": 1,
     "input": "*** Begin Patch\n*** End Patch\n"},
    {"type": "response.output_item.done", "sequence_number": 9, "output_index": 1,
     "item": {"id": "ctc_2", "type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch",
              "input": "*** Begin Patch\n*** End Patch\n"}},
    {"type": "response.completed", "sequence_number": 10,
     "response": {"id": "resp_d5", "object": "response", "created_at": 1760000003, "status": "completed", "model": "m2",
                  "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                  "output": [{"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "wx",
                              "arguments": '{"city":"Rome"}', "status": "completed"},
                             {"id": "ctc_2", "type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch",
                              "input": "*** Begin Patch\n*** End Patch\n"}],
                  "usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                            "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12}}},
    named=True)
RESPONSES_D6 = responses_wire(
    {"type": "response.created", "sequence_number": 0,
     "response": {"id": "resp_d6", "status": "in_progress", "output": []}},
    {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0,
     "item": {"id": "msg_6", "type": "message", "role": "assistant", "status": "in_progress", "content": []}},
    {"type": "response.output_text.delta", "sequence_number": 2, "item_id": "msg_6", "output_index": 0,
     "content_index": 0, "delta": "Partial"},
    {"type": "response.incomplete", "sequence_number": 3,
     "response": {"id": "resp_d6", "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"},
                  "output": [], "usage": {"input_tokens": 3, "output_tokens": 16, "total_tokens": 19}}})
RESPONSES_D7 = responses_wire(
    {"type": "response.output_item.added", "item": {"type": "message", "id": "msg_7", "role": "assistant",
                                                    "status": "in_progress", "content": []}},
    {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}},
    {"type": "response.output_text.delta", "delta": "Hello"},
    {"type": "response.output_item.done", "item": {"type": "message", "id": "msg_7", "role": "assistant",
                                                   "status": "completed",
                                                   "content": [{"type": "output_text", "text": "Hello"}]}},
    {"type": "response.done", "response": {"id": "resp_d7", "status": "completed", "service_tier": "default",
                                           "end_turn": True,
                                           "usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 0},
                                                     "output_tokens": 3, "total_tokens": 8}}}) + b"data: [DONE]\n\n"
RESPONSES_ITEM = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Plan it."}],
                  "encrypted_content": "ENC1"}
# Azure: reasoning is sealed only in the last event.
RESPONSES_D11 = RESPONSES_D4.replace(
    b'"text":"Plan it."}],"encrypted_content":"ENC1"}}\n', b'"text":"Plan it."}]}}\n')
assert RESPONSES_D11.count(b"ENC1") == 1
RESPONSES_GOLDENS: Dict[str, Tuple[bytes, Any, List[Any]]] = {
    "D4": (RESPONSES_D4, pg.ResponsesReader,
           [pg.Start("resp_d4", "m2"), pg.PartStart(0, pg.Thinking(maker="openai-responses")),
            pg.PartDelta(0, "Plan it."),
            pg.PartEnd(0, pg.Thinking("Plan it.", pg.dumps(RESPONSES_ITEM), False, "openai-responses")),
            pg.PartStart(1, pg.Text()), pg.PartDelta(1, "Done."), pg.PartEnd(1, pg.Text("Done.")),
            pg.Done("stop", pg.Usage(30, 12, 10, 0, 8))]),
    "D5": (RESPONSES_D5, pg.ResponsesReader,
           [pg.Start("resp_d5", "m2"), pg.PartStart(0, pg.ToolCall("call_1", "wx")), pg.PartDelta(0, '{"city":"Ro'),
            pg.PartDelta(0, 'me"}'), pg.PartEnd(0, pg.ToolCall("call_1", "wx", '{"city":"Rome"}')),
            pg.PartStart(1, pg.ToolCall("call_2", "apply_patch")),
            pg.PartDelta(1, '{"input":"*** Begin Patch\\n*** End Patch\\n'), pg.PartDelta(1, '"}'),
            pg.PartEnd(1, pg.ToolCall("call_2", "apply_patch", pg.json_text({"input": RESPONSES_PATCH}))),
            pg.Done("tool_use", pg.Usage(5, 7))]),
    "D6": (RESPONSES_D6, pg.ResponsesReader,
           [pg.Start("resp_d6"), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "Partial"),
            pg.PartEnd(0, pg.Text("Partial")),
            pg.Done("length", pg.Usage(3, 16))]),
    "D7": (RESPONSES_D7, pg.ResponsesReader,
           [pg.Start(), pg.PartStart(0, pg.Text()), pg.PartDelta(0, "Hello"), pg.PartEnd(0, pg.Text("Hello")),
            pg.Done("stop", pg.Usage(5, 3))]),
    "D11": (RESPONSES_D11, pg.AzureReader,
            [pg.Start("resp_d4", "m2"), pg.PartStart(0, pg.Thinking(maker="openai-responses")),
             pg.PartDelta(0, "Plan it."), pg.PartStart(1, pg.Text()), pg.PartDelta(1, "Done."),
             pg.PartEnd(1, pg.Text("Done.")),
             pg.PartEnd(0, pg.Thinking("Plan it.", pg.dumps(RESPONSES_ITEM), False, "openai-responses")),
             pg.Done("stop", pg.Usage(30, 12, 10, 0, 8))]),
}


@pytest.mark.parametrize("name", RESPONSES_GOLDENS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_responses_golden(name: str, newline: bytes) -> None:
    data, reader, wanted = RESPONSES_GOLDENS[name]
    data = data.replace(b"\n", newline)
    assert responses_read(data, reader=reader(STAMP)) == wanted
    assert responses_read(data, 1, reader(STAMP)) == wanted


@pytest.mark.parametrize("name", RESPONSES_GOLDENS)
def test_responses_any_split_is_the_same(name: str) -> None:
    data, reader, wanted = RESPONSES_GOLDENS[name]
    for cut in range(len(data) + 1):
        settled = pg.Settled(reader(STAMP))
        assert settled.feed(data[:cut]) + settled.feed(data[cut:]) + settled.end() == wanted


@pytest.mark.parametrize("name", RESPONSES_GOLDENS)
def test_responses_mutilated_events_never_raise(name: str) -> None:
    """One value after the other replaced by what it should not be: events or a failure, in order, and nothing else."""
    data, reader, _ = RESPONSES_GOLDENS[name]
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
    frames = [responses_frames(event) for event in events]
    for number, *inside in places(events):
        path = [0, *inside]
        for wrong in (None, 7, "x", [], {}, [None], {"a": None}):
            copy = [json.loads(json.dumps(events[number]))]
            target: Any = copy
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = wrong
            wire = b"".join((*frames[:number], responses_frames(*copy), *frames[number + 1:]))
            out = responses_read(wire, reader=reader(STAMP))
            assert [isinstance(event, (pg.Done, pg.Failed)) for event in out].index(True) == len(out) - 1
            if isinstance(out[-1], pg.Done):
                started = [event.index for event in out if isinstance(event, pg.PartStart)]
                assert started == list(range(len(started)))
                assert sorted(started) == sorted(event.index for event in out if isinstance(event, pg.PartEnd))


@pytest.mark.parametrize("name", RESPONSES_GOLDENS)
def test_responses_any_cut_fails(name: str) -> None:
    data, reader, _ = RESPONSES_GOLDENS[name]
    last = max(data.rfind(b'data: {"type":"response.' + word) for word in (b"completed", b"incomplete", b"done"))
    whole = data.index(b"\n", last)                      # a terminal event without its blank line is still one
    for cut in range(whole):
        events = responses_read(data, reader=reader(STAMP), cut=cut)
        assert isinstance(events[-1], pg.Failed) and isinstance(events[-1].error, pg.UpstreamProtocolError), cut
        assert sum(isinstance(event, (pg.Done, pg.Failed)) for event in events) == 1
    assert isinstance(responses_read(data, reader=reader(STAMP), cut=whole)[-1], pg.Done)


@pytest.mark.parametrize("name", ["D4", "D5"])
def test_responses_whole_answer_is_the_same(name: str) -> None:
    data, _, wanted = RESPONSES_GOLDENS[name]
    last = json.loads(data.strip().rpartition(b"data: ")[2])
    events = pg.Settled(pg.ResponsesReader(STAMP)).whole(last["response"])
    assert responses_parts(events) == responses_parts(wanted) and events[0] == wanted[0] and events[-1] == wanted[-1]


def test_responses_interleaved_items_stay_apart() -> None:
    add, done = "response.output_item.added", "response.output_item.done"
    delta = "response.function_call_arguments.delta"
    calls = [{"type": "function_call", "id": f"fc_{n}", "call_id": f"call_{n}", "name": f"f{n}", "arguments": ""}
             for n in range(2)]
    data = responses_frames(
        *({"type": add, "output_index": n, "item": call} for n, call in enumerate(calls)),
        *({"type": delta, "output_index": n, "item_id": f"fc_{n}", "delta": text}
          for n, text in ((1, '{"b"'), (0, '{"a"'), (1, ":1}"), (0, ":0}"))),
        *({"type": done, "output_index": n, "item": {**calls[n], "arguments": text}}
          for n, text in ((1, '{"b":1}'), (0, '{"a":0}'))), responses_final())
    reply = pg.collect(responses_read(data))
    assert reply.parts == (pg.ToolCall("call_0", "f0", '{"a":0}'), pg.ToolCall("call_1", "f1", '{"b":1}'))
    assert reply.stop_reason == "tool_use"
    by_id = re.sub(rb'"output_index": \d, ', b"", data)     # without indices the item ids tell
    assert pg.collect(responses_read(by_id)).parts == reply.parts


def responses_reasoning(*deltas: Any, item: Any = None, kind: str = "reasoning") -> List[Any]:
    """The events of one reasoning item."""
    events: List[Any] = [{"type": "response.output_item.added", "output_index": 0, "item": {"type": kind, "id": "x"}}]
    events += [{"output_index": 0, **delta} for delta in deltas]
    if item:
        events.append({"type": "response.output_item.done", "output_index": 0,
                       "item": {"type": kind, "id": "x", **item}})
    return responses_read(responses_frames(*events, responses_final()))


RESPONSES_SUMMARY, RESPONSES_RAW = "response.reasoning_summary_text.delta", "response.reasoning_text.delta"


@pytest.mark.parametrize("deltas, item, text, redacted, is_signed", [
    ([{"type": RESPONSES_SUMMARY, "summary_index": 0, "delta": "a"},
      {"type": RESPONSES_SUMMARY, "summary_index": 0, "delta": "b"},
      {"type": RESPONSES_SUMMARY, "summary_index": 1, "delta": "c"}], {"encrypted_content": "E"}, "ab\n\nc", False,
     True),
    ([{"type": RESPONSES_RAW, "content_index": 0, "delta": "raw"}],
     {"summary": [], "content": [{"type": "reasoning_text", "text": "raw!"}]}, "raw!", False, True),
    ([], {"summary": [{"type": "summary_text", "text": "s1"}, {"type": "summary_text", "text": "s2"}],
          "encrypted_content": "E"}, "s1\n\ns2", False, True),
    ([], {"summary": [], "encrypted_content": "E"}, "", True, True),
    ([{"type": RESPONSES_SUMMARY, "delta": "seen"}], {"summary": [{"type": "summary_text", "text": "seen"}]}, "seen",
     False, False),
    ([{"type": RESPONSES_SUMMARY, "delta": "one"}], {"summary": [{"type": "summary_text", "text": "two"}]}, "one",
     False, False),
])
def test_responses_reasoning(deltas: List[Any], item: Dict[str, Any], text: str, redacted: bool,
                             is_signed: bool) -> None:
    events = responses_reasoning(*deltas, item=item)
    [part] = responses_parts(events)
    assert (part.text, part.redacted, part.maker) == (text, redacted, "openai-responses")
    assert "".join(event.text for event in events if isinstance(event, pg.PartDelta)) == text
    assert (json.loads(part.signature) == {"type": "reasoning", "id": "x", **item}) if is_signed else not part.signature


def test_responses_reasoning_that_cannot_be_given_back_and_shows_nothing_is_no_part() -> None:
    assert responses_parts(responses_reasoning(item={"summary": []})) == []


def test_azure_seals_hidden_reasoning_in_its_place() -> None:
    item = {"type": "reasoning", "id": "rs", "summary": []}
    events = responses_read(responses_frames(
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.output_item.added", "output_index": 1,
         "item": {"type": "message", "id": "m", "content": []}},
        {"type": "response.output_text.delta", "output_index": 1, "delta": "hi"},
        responses_final(output=[{**item, "encrypted_content": "E"}])), reader=pg.AzureReader(STAMP))
    assert pg.collect(events).parts == (
        pg.Thinking("", pg.dumps({**item, "encrypted_content": "E"}), False, "openai-responses"), pg.Text("hi"))


@pytest.mark.parametrize("events, wanted, stop", [
    ([{"type": "response.refusal.delta", "output_index": 0, "delta": "No"}], [pg.Text("No")], "refusal"),
    ([{"type": "response.output_item.done", "output_index": 0, "item": {
        "type": "message", "id": "x", "content": [{"type": "refusal", "refusal": "No."}]}}], [pg.Text("No.")],
     "refusal"),
    ([{"type": "response.output_text.delta", "output_index": 0, "delta": "\ud83d"},
      {"type": "response.output_text.delta", "output_index": 0, "delta": "\ude00"}], [pg.Text("\U0001f600")], "stop"),
    ([{"type": "response.brand_new", "x": 1}, {"type": "response.output_text.delta", "output_index": 9, "delta": "?"},
      {"type": "response.output_text.delta", "output_index": 0, "delta": "!"}], [pg.Text("!")], "stop"),
])
def test_responses_message(events: List[Any], wanted: List[Any], stop: str) -> None:
    done = responses_read(responses_frames({"type": "response.output_item.added", "output_index": 0,
                                            "item": {"type": "message", "id": "x", "content": []}}, *events,
                                           responses_final()))
    assert responses_parts(done) == wanted and done[-1].stop_reason == stop


def responses_call(*events: Any, status: str = "completed", kind: str = "function_call", **fields: Any) -> List[Any]:
    """The events of one call."""
    item = {"type": kind, "id": "fc_1", "call_id": "call_1", "name": "wx"}
    return responses_read(responses_frames({"type": "response.output_item.added", "output_index": 0, "item": item},
                                           *({"output_index": 0, **event} for event in events),
                                           responses_final(status, **fields)))


RESPONSES_DELTA, RESPONSES_DONE = "response.function_call_arguments.delta", "response.function_call_arguments.done"
RESPONSES_FC = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "wx"}


@pytest.mark.parametrize("events, arguments, deltas", [
    ([{"type": RESPONSES_DONE, "arguments": '{"a":1}'},
      {"type": "response.output_item.done", "item": {**RESPONSES_FC, "arguments": '{"a":1}'}}],
     '{"a":1}', ['{"a":1}']),
    ([{"type": RESPONSES_DELTA, "delta": '{"a"'}, {"type": RESPONSES_DONE, "arguments": '{"a":1}'},
      {"type": "response.output_item.done", "item": {**RESPONSES_FC, "arguments": '{"a":1}'}}], '{"a":1}',
     ['{"a"', ":1}"]),
    ([{"type": RESPONSES_DELTA, "delta": '{"a":1}'},
      {"type": "response.output_item.done", "item": {**RESPONSES_FC, "arguments": '{"a": 1}'}}],
     '{"a":1}', ['{"a":1}']),
    ([{"type": "response.output_item.done", "item": {**RESPONSES_FC, "arguments": {"a": 12345678901234567890}}}],
     '{"a":12345678901234567890}', ['{"a":12345678901234567890}']),
    ([{"type": "response.output_item.done", "item": {**RESPONSES_FC, "arguments": ""}}], "", []),
])
def test_responses_call_arguments(events: List[Any], arguments: str, deltas: List[Any]) -> None:
    out = responses_call(*events)
    assert responses_parts(out) == [pg.ToolCall("call_1", "wx", arguments)] and out[-1].stop_reason == "tool_use"
    assert [event.text for event in out if isinstance(event, pg.PartDelta)] == deltas


@pytest.mark.parametrize("text", ["", "a\"b\\\n\x01é\U0001f600", "x" * 10])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_responses_custom_call_travels_as_json(text: str, is_streamed: bool) -> None:
    kind = "custom_tool_call"
    deltas = [{"type": "response.custom_tool_call_input.delta", "delta": c} for c in text] if is_streamed else []
    out = responses_call(*deltas,
                         {"type": "response.output_item.done", "item": {**RESPONSES_FC, "type": kind, "input": text}},
                         kind=kind)
    [part] = responses_parts(out)
    assert json.loads(part.arguments) == {"input": text} and pg.custom_input(part) == text
    assert "".join(event.text for event in out if isinstance(event, pg.PartDelta)) == part.arguments


def test_responses_unfinished_call() -> None:
    events = [{"type": RESPONSES_DELTA, "delta": '{"a"'}]
    assert isinstance(responses_call(*events)[-1].error, pg.UpstreamProtocolError)
    done = [{"type": RESPONSES_DONE, "arguments": '{"a":1}'}]         # the item itself never ended
    assert isinstance(responses_call(*done)[-1].error, pg.UpstreamProtocolError)
    cut = responses_call(*events, status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    assert cut[-1].stop_reason == "length" and responses_parts(cut)[0].arguments == '{"a"'
    kept = responses_call(*events, output=[{**RESPONSES_FC, "arguments": '{"a":1}'}])
    assert kept[-1].stop_reason == "tool_use" and responses_parts(kept)[0].arguments == '{"a":1}'


def test_responses_without_indices_the_last_item_to_begin_is_meant() -> None:
    add, delta = "response.output_item.added", "response.output_text.delta"
    out = responses_read(responses_frames({"type": add, "item": {"type": "reasoning"}},
                                          {"type": RESPONSES_SUMMARY, "delta": "t"},
                                          {"type": add, "item": {"type": "message", "id": "m"}},
                                          {"type": delta, "delta": "a"}, responses_final()))
    assert responses_parts(out) == [pg.Thinking("t", maker="openai-responses"), pg.Text("a")]


def test_responses_two_items_in_one_place() -> None:
    add = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message", "id": "m"}}
    assert isinstance(responses_read(responses_frames(add, add))[-1].error, pg.UpstreamProtocolError)


@pytest.mark.parametrize("client", [pg.CHAT, pg.MESSAGES])
def test_responses_reasoning_comes_back_through_either_client(client: Any) -> None:
    """Overlapping parts too: Azure's reasoning ends after the text that follows it."""
    ask = {"model": "x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}],
           **({"thinking": {"type": "adaptive"}} if client is pg.MESSAGES else {})}
    events = responses_read(RESPONSES_D11, reader=pg.AzureReader(STAMP))
    assert client.writer(client.parse(ask), STAMP).write(events)
    answer = client.render(client.parse(ask), pg.collect(events), STAMP)
    message = answer["choices"][0]["message"] if client is pg.CHAT else {"role": "assistant",
                                                                         "content": answer["content"]}
    again = client.parse({**ask, "messages": [*ask["messages"], message, *ask["messages"]]})
    assert responses_body(pg.normalise(again, responses_model(), RESPONSES, {})[0])["input"][1:3] == [RESPONSES_ITEM, {
        "type": "message", "role": "assistant", "status": "completed", "id": "msg_2",
        "content": [{"type": "output_text", "text": "Done.", "annotations": []}]}]


def test_responses_only_done_events() -> None:
    item = {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "Hi"}]}
    out = responses_read(responses_frames({"type": "response.output_item.done",
                                           "item": {**RESPONSES_FC, "arguments": "{}"}},
                                          {"type": "response.output_item.done", "item": item}, responses_final()))
    assert responses_parts(out) == [pg.ToolCall("call_1", "wx", "{}"), pg.Text("Hi")]
    assert responses_parts(responses_read(responses_frames(responses_final(output=[item])))) == [pg.Text("Hi")]


@pytest.mark.parametrize("call_id, wanted", [
    ("call_1", "call_1"), ("call_" + "x" * 90, None), ("call|a+b/=", None), (None, "fc_1")])
def test_responses_clean_ids(call_id: Optional[str], wanted: Optional[str]) -> None:
    calls = [{**RESPONSES_FC, "call_id": call_id, "id": f"fc_{n}", "arguments": "{}"} for n in (1, 2)]
    first, second = responses_parts(pg.Settled(pg.ResponsesReader(STAMP)).whole({"output": calls,
                                                                                 "status": "completed"}))
    assert first.id == (wanted or first.id) and first.id != second.id
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part.id) for part in (first, second))


RESPONSES_FAILED = {"type": "response.failed", "response": {"status": "failed", "error": None}}


def responses_failed(code: str, message: str = "m") -> Dict[str, Any]:
    return {"type": "response.failed", "response": {"status": "failed", "error": {"code": code, "message": message}}}


@pytest.mark.parametrize("event, kind, retry_after", [
    (responses_failed("context_length_exceeded", "Your input exceeds the context window of this model."),
     pg.ContextOverflow, None),
    (responses_failed("rate_limit_exceeded", "Rate limit reached. Please try again in 1m2.5s"), pg.RateLimited, 62.5),
    (responses_failed("server_error"), pg.UpstreamError, None),
    (responses_failed("invalid_prompt"), pg.BadRequest, None),
    (responses_failed("image_content_policy_violation"), pg.BadRequest, None),
    (responses_failed("slow_down"), pg.Overloaded, None),
    (responses_failed("insufficient_quota"), pg.QuotaExceeded, None),
    (responses_failed("server_is_overloaded"), pg.Overloaded, None),
    (RESPONSES_FAILED, pg.UpstreamError, None),
    (responses_final("cancelled"), pg.UpstreamError, None),
    ({"type": "response.done", "response": {"status": "failed", "error": {"code": "server_error", "message": "m"}}},
     pg.UpstreamError, None),
    ({"type": "error", "code": "context_length_exceeded", "message": "m", "param": None}, pg.ContextOverflow, None),
    ({"type": "error", "error": {"code": "rate_limit_exceeded", "message": "try again in 2.5s"}}, pg.RateLimited, 2.5),
    ({"type": "error", "error": {"type": "invalid_request_error", "message": "bad"}}, pg.BadRequest, None),
    ({"type": "error", "error": "oops"}, pg.UpstreamError, None),
    ({"error": {"message": "m", "code": "server_is_overloaded"}}, pg.Overloaded, None),
    ({"type": "error", "error": {"type": "usage_limit_reached", "plan_type": "plus", "resets_at": 1760003600}},
     pg.QuotaExceeded, 3600.0),
    ([1], pg.UpstreamProtocolError, None),
])
def test_responses_failures(event: Any, kind: Any, retry_after: Optional[float]) -> None:
    out = responses_read(responses_frames(event))
    assert type(out[-1].error) is kind and out[-1].error.retry_after == retry_after and out[-1].error.message
    late = responses_read(responses_frames({"type": "response.output_item.added", "output_index": 0,
                                            "item": {"type": "message", "id": "x", "content": []}},
                                           {"type": "response.output_text.delta", "output_index": 0, "delta": "Hi"},
                                           event))
    assert type(late[-1].error) is kind and pg.PartDelta(0, "Hi") in late


@pytest.mark.parametrize("reason, stop", [
    ("max_output_tokens", "length"), ("content_filter", "refusal"), ("steered", "length"), (None, "length")])
def test_responses_incomplete(reason: Optional[str], stop: str) -> None:
    assert responses_read(responses_frames(responses_final("incomplete",
                                                           incomplete_details=reason
                                                           and {"reason": reason})))[-1].stop_reason == stop


@pytest.mark.parametrize("body, kind", [
    ({"error": {"code": "rate_limit_exceeded", "message": "m"}}, pg.RateLimited), ({}, pg.UpstreamProtocolError),
    ({"output": [{"no": "type"}]}, pg.UpstreamProtocolError), ({"output": [{"type": "message", "content": 1}]},
                                                               pg.UpstreamProtocolError),
    ({"output": [], "status": "failed", "error": {"code": "server_error", "message": "m"}}, pg.UpstreamError)])
def test_responses_whole_failures(body: Dict[str, Any], kind: Any) -> None:
    assert type(pg.Settled(pg.ResponsesReader(STAMP)).whole(body)[-1].error) is kind


# --- Bodies -----------------------------------------------------------------------------------------------------------

RESPONSES_USER = pg.Message("user", (pg.Text("Hi"),))
RESPONSES_THINKING = pg.Thinking("Plan it.", pg.dumps(RESPONSES_ITEM), False, "openai-responses")
RESPONSES_TOOLS = (pg.Tool("wx", "weather", RESPONSES_SCHEMA, strict=True), pg.Tool("plain"),
                   pg.Tool("apply_patch", "patches", {"type": "object", "properties": {"input": {"type": "string"}}},
                           custom=True))
RESPONSES_FULL = pg.Request(
    model="x", system=(pg.Text("Be brief."), pg.Text("Be kind.")), tools=RESPONSES_TOOLS,
    tool_choice=pg.ToolChoice("tool", "wx"),
    parallel_tools=False, max_tokens=5, temperature=0.5, top_p=0.9, user="u" * 100, verbosity="low", stream=True,
    reasoning=pg.Reasoning("high"), output=pg.OutputFormat(RESPONSES_SCHEMA, "my output", True),
    data={"prompt_cache_key": "s1"}, session="s1", messages=(
        pg.Message("user", (pg.Text("Look"), pg.Image("image/png", "QUJD", detail="low"),
                            pg.Image(url="https://x/y.png"),
                            pg.Document("application/pdf", "QUJD", name="a.pdf"), pg.Document(url="https://x/y.pdf"),
                            pg.Document("text/plain", "aGk="))),
        pg.Message("assistant", (RESPONSES_THINKING, pg.Text("Sure."), pg.ToolCall("call_1", "wx", '{"city":"Rome"}'),
                                 pg.ToolCall("c|2", "apply_patch", pg.json_text({"input": RESPONSES_PATCH})))),
        pg.Message("tool", (pg.ToolResult("call_1", (pg.Text("sunny"), pg.Image("image/png", "QUJD"))),
                            pg.ToolResult("c|2", (pg.Text("no file"),), True))),
        pg.Message("assistant", (RESPONSES_THINKING, pg.Text("Well."), RESPONSES_THINKING)), RESPONSES_USER))


def responses_body(request: pg.Request, protocol: Any = RESPONSES,
                   credential: pg.Credential = pg.Credential("api_key", "sk-test-123456"), **fields: Any) -> Any:
    """What a request becomes."""
    fitted, _ = protocol.fit(request, responses_model(**fields))
    return json.loads(protocol.build(fitted, responses_model(**fields), credential).body)


RESPONSES_GRAMMAR = {"supportsOpenAIGrammarTools": True}
RESPONSES_INPUT = [
    {"role": "developer", "content": "Be brief.\n\nBe kind."},
    {"role": "user", "content": [
        {"type": "input_text", "text": "Look"},
        {"type": "input_image", "detail": "low", "image_url": "data:image/png;base64,QUJD"},
        {"type": "input_image", "detail": "auto", "image_url": "https://x/y.png"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"},
        {"type": "input_file", "file_url": "https://x/y.pdf"}, {"type": "input_text", "text": "hi"}]},
    RESPONSES_ITEM,
    {"type": "message", "role": "assistant", "status": "completed", "id": "msg_3",
     "content": [{"type": "output_text", "text": "Sure.", "annotations": []}]},
    {"type": "function_call", "call_id": "call_1", "name": "wx", "arguments": '{"city":"Rome"}'},
    {"type": "custom_tool_call", "call_id": pg.fit_id("c|2", 64), "name": "apply_patch", "input": RESPONSES_PATCH},
    {"type": "function_call_output", "call_id": "call_1", "output": [
        {"type": "input_text", "text": "sunny"},
        {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,QUJD"}]},
    {"type": "custom_tool_call_output", "call_id": pg.fit_id("c|2", 64), "output": "Error: no file"},
    RESPONSES_ITEM,
    {"type": "message", "role": "assistant", "status": "completed", "id": "msg_9",
     "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]


def test_responses_golden_body() -> None:
    assert responses_body(RESPONSES_FULL, compat=RESPONSES_GRAMMAR) == {
        "model": "m2", "input": RESPONSES_INPUT, "store": False, "stream": True, "max_output_tokens": 16,
        "temperature": 0.5,
        "top_p": 0.9, "user": pg.fit_id("u" * 100, 64), "prompt_cache_key": "s1",
        "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": pg.fit_id("my output", 64), "schema": RESPONSES_SCHEMA,
                            "strict": True},
                 "verbosity": "low"},
        "tools": [{"type": "function", "name": "wx", "description": "weather", "parameters": RESPONSES_SCHEMA,
                   "strict": True},
                  {"type": "function", "name": "plain", "parameters": {"type": "object", "properties": {}},
                   "strict": False},
                  {"type": "custom", "name": "apply_patch", "description": "patches"}],
        "tool_choice": {"type": "function", "name": "wx"}, "parallel_tool_calls": False}


def test_responses_minimal_body() -> None:
    request = pg.Request("x", (RESPONSES_USER,))
    assert responses_body(request, reasoning=None) == {"model": "m2", "store": False,
                                                       "input": [{"role": "user",
                                                                  "content": [{"type": "input_text", "text": "Hi"}]}]}
    assert responses_body(request)["include"] == ["reasoning.encrypted_content"]
    assert "reasoning" not in responses_body(request)


def test_responses_without_grammar_tools() -> None:
    out = responses_body(RESPONSES_FULL)
    assert out["tools"][2]["type"] == "function"
    assert out["tools"][2]["parameters"]["properties"] == {"input": {"type": "string"}}
    assert [item["type"] for item in out["input"] if "call_id" in item] == [
        "function_call", "function_call", "function_call_output", "function_call_output"]


def responses_schema() -> Any:
    """The schema of a request in OpenAI's own document."""
    with open(OPENAI_SPEC, encoding="utf-8") as file:
        document = json.load(file)
    schemas = document["components"]["schemas"]
    schemas["OutputTextContent"]["required"].remove("logprobs")     # the API takes its own items without it
    schemas["FunctionTool"]["required"].remove("strict")
    schemas["InputImageContent"]["properties"]["detail"].pop("default", None)

    def drop(value: Any) -> Any:
        """`discriminator` is no JSON Schema and some `format`s are not checked; oneOf is anyOf here: items overlap."""
        if isinstance(value, list):
            return [drop(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {("anyOf" if name == "oneOf" else name): drop(item) for name, item in value.items()
                if name not in ("discriminator", "format")}

    return {"$ref": "#/components/schemas/CreateResponse", "components": {"schemas": drop(schemas)}}


RESPONSES_BODIES = {
    "full": (RESPONSES_FULL, RESPONSES, RESPONSES_GRAMMAR), "functions": (RESPONSES_FULL, RESPONSES, {}),
    "azure": (RESPONSES_FULL, AZURE, RESPONSES_GRAMMAR),
    "plain": (pg.Request("x", (RESPONSES_USER,)), RESPONSES, {}),
    "json_object": (pg.Request("x", (RESPONSES_USER,), output=pg.OutputFormat()), RESPONSES, {}),
    "codex": (RESPONSES_FULL, CODEX, RESPONSES_GRAMMAR), "codex plain": (pg.Request("x", (RESPONSES_USER,)), CODEX, {})}


def codex_jwt(claims: Any) -> str:
    return "e30." + base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=") + ".sig"


CODEX_TOKEN = codex_jwt({"https://api.openai.com/auth": {"chatgpt_account_id": "acc-1"}})
AZURE_PARTS = {"resource": "res", "deployment_map": "m2=dep2, broken, =x, y="}


@pytest.mark.parametrize("name", RESPONSES_BODIES)
def test_responses_bodies_fit_the_published_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    request, protocol, compat = RESPONSES_BODIES[name]
    out = responses_body(request, protocol, pg.Credential("oauth", CODEX_TOKEN, parts=AZURE_PARTS), compat=compat)
    if not os.path.exists(OPENAI_SPEC):             # somebody else's document, in no repository of ours
        return
    errors = list(jsonschema.Draft202012Validator(responses_schema()).iter_errors(out))
    assert not errors, [error.message[:300] for error in errors]


@pytest.fixture(scope="module")
def responses_adapters() -> Tuple[Any, Any]:
    """What checks an input item, and what checks a tool."""
    pydantic = pytest.importorskip("pydantic")
    types = pytest.importorskip("openai.types.responses")
    return pydantic.TypeAdapter(types.ResponseInputItemParam), pydantic.TypeAdapter(types.ToolParam)


@pytest.mark.parametrize("name", RESPONSES_BODIES)
def test_responses_bodies_fit_the_sdk_types(name: str, responses_adapters: Any) -> None:
    params = pytest.importorskip("openai.types.responses.response_create_params")
    request, protocol, compat = RESPONSES_BODIES[name]
    out = responses_body(request, protocol, pg.Credential("oauth", CODEX_TOKEN, parts=AZURE_PARTS), compat=compat)
    kind = params.ResponseCreateParamsStreaming if out.get("stream") else params.ResponseCreateParamsNonStreaming
    unknown = set(out) - set(kind.__required_keys__) - set(kind.__optional_keys__)
    assert not unknown
    for item in out["input"]:
        responses_adapters[0].validate_python(item)
    for tool in out.get("tools", ()):
        responses_adapters[1].validate_python({"strict": None, **tool} if tool["type"] == "function" else tool)


@pytest.mark.parametrize("level, fields, wanted", [
    ("high", {}, {"effort": "high", "summary": "auto"}),
    ("minimal", {"thinking_levels": {"minimal": None}}, {"effort": "low", "summary": "auto"}),
    ("minimal", {"thinking_levels": {"minimal": "low"}}, {"effort": "low", "summary": "auto"}),
    ("max", {}, {"effort": "high", "summary": "auto"}),
    ("max", {"thinking_levels": {"max": "max"}}, {"effort": "max", "summary": "auto"}),
    ("off", {}, {"effort": "none"}), ("off", {"thinking_levels": {"off": None}}, None),
    ("off", {"compat": {"supportsReasoningOff": False}}, None),
    ("high", {"compat": {"supportsReasoningEffort": False}}, {"summary": "auto"}),
    ("high", {"reasoning": False}, None), ("high", {"reasoning": None}, None)])
@pytest.mark.parametrize("protocol", [RESPONSES, CODEX])
def test_responses_reasoning_level(level: str, fields: Dict[str, Any], wanted: Optional[Dict[str, Any]],
                                   protocol: Any) -> None:
    request = pg.Request("x", (RESPONSES_USER,), reasoning=pg.Reasoning(level))
    assert responses_body(request, protocol, pg.Credential("oauth", CODEX_TOKEN), **fields).get("reasoning") == wanted


@pytest.mark.parametrize("choice, wanted", [
    (None, None), (pg.ToolChoice("auto"), "auto"), (pg.ToolChoice("none"), "none"),
    (pg.ToolChoice("required"), "required"),
    (pg.ToolChoice("tool", "wx"), {"type": "function", "name": "wx"}),
    (pg.ToolChoice("tool", "apply_patch"), {"type": "custom", "name": "apply_patch"})])
def test_responses_tool_choice(choice: Optional[pg.ToolChoice], wanted: Any) -> None:
    request = pg.Request("x", (RESPONSES_USER,), tools=RESPONSES_TOOLS, tool_choice=choice)
    assert responses_body(request, compat=RESPONSES_GRAMMAR).get("tool_choice") == wanted
    assert "tool_choice" not in responses_body(pg.replace(request, tools=()), compat=RESPONSES_GRAMMAR)


@pytest.mark.parametrize("data, headers, mode, wanted", [
    ({"prompt_cache_key": "k"}, {"x-session-id": "s"}, "auto", "k"), ({}, {"x-session-id": "s"}, "auto", "s"),
    ({}, {"x-claude-code-session-id": "c"}, "auto", "c"), ({}, {}, "auto", None),
    ({"prompt_cache_key": 7}, {}, "auto", None),
    ({"prompt_cache_key": "k"}, {}, "disabled", None),
    ({"prompt_cache_key": "k" * 99}, {}, "auto", pg.fit_id("k" * 99, 64))])
def test_responses_prompt_cache_key(data: Dict[str, Any], headers: Dict[str, Any], mode: str,
                                    wanted: Optional[str]) -> None:
    request = pg.Request("x", (RESPONSES_USER,), data=data, headers=headers, session=pg.session_of(headers, data))
    assert responses_body(request, compat={"promptCacheKeyMode": mode}).get("prompt_cache_key") == wanted


@pytest.mark.parametrize("fields, role",
                         [({}, "developer"), ({"reasoning": False}, "system"), ({"reasoning": None}, "system"),
                          ({"compat": {"supportsDeveloperRole": False}}, "system")])
def test_responses_system_role(fields: Dict[str, Any], role: str) -> None:
    request = pg.Request("x", (RESPONSES_USER, pg.Message("system", (pg.Text("late"),))), system=(pg.Text("s"),))
    assert [item["role"] for item in responses_body(request, **fields)["input"]] == [role, "user", role]


@pytest.mark.parametrize("part, fields, wanted", [
    (RESPONSES_THINKING, {}, True), (pg.Thinking("t"), {}, False),
    (pg.Thinking("t", "sig", False, "anthropic-messages"), {}, False),
    (pg.Thinking("t", "not json", False, "openai-responses"), {}, False),
    (pg.Thinking("t", '{"type":"message"}', False, "openai-responses"), {}, False),
    (pg.Thinking("t", '{"type":"reasoning","x":NaN}', False, "openai-responses"), {}, False),
    (RESPONSES_THINKING, {"reasoning": False}, False), (RESPONSES_THINKING, {"reasoning": None}, True)])
@pytest.mark.parametrize("protocol", [RESPONSES, AZURE, CODEX])
def test_responses_replays(part: pg.Thinking, fields: Dict[str, Any], wanted: bool, protocol: Any) -> None:
    assert protocol.replays(part, responses_model(**fields)) is wanted


def test_responses_round_trip_of_reasoning() -> None:
    first = pg.collect(responses_read(RESPONSES_D4))
    request = pg.Request("x", (RESPONSES_USER, pg.Message("assistant", first.parts), RESPONSES_USER))
    fitted, dropped = pg.normalise(request, responses_model(), RESPONSES, {})
    assert responses_body(fitted)["input"][1] == RESPONSES_ITEM and dropped == []


@pytest.mark.parametrize("result, wanted", [
    (pg.ToolResult("c", ()), "(no output)"), (pg.ToolResult("c", (pg.Text("x"), pg.Text("y"))), "x\ny"),
    (pg.ToolResult("c", (pg.Text("Error: z"),), True), "Error: z"), (pg.ToolResult("c", (), True), "Error: "),
    (pg.ToolResult("c", (pg.Image(url="https://x/y"),)),
     [{"type": "input_image", "detail": "auto", "image_url": "https://x/y"}])])
def test_responses_result(result: pg.ToolResult, wanted: Any) -> None:
    [item] = responses_body(pg.Request("x", (pg.Message("tool", (result,)),)))["input"]
    assert item == {"type": "function_call_output", "call_id": "c", "output": wanted}


@pytest.mark.parametrize("protocol, compat, wanted", [
    (RESPONSES, {}, ["stop"]), (RESPONSES, {"supportsMaxOutputTokens": False}, ["stop", "max_tokens"]),
    (AZURE, {}, ["stop"]), (CODEX, {}, ["top_p", "stop", "user", "max_tokens"])])
def test_responses_dropped(protocol: Any, compat: Dict[str, Any], wanted: List[Any]) -> None:
    request = pg.replace(RESPONSES_FULL, stop=("END",))
    request, dropped = pg.normalise(request, responses_model(compat=compat), protocol, {})
    request, conflicts = protocol.fit(request, responses_model(compat=compat))
    assert dropped + conflicts == wanted


def test_responses_strict_only_where_known() -> None:
    request = pg.Request("x", (RESPONSES_USER,), tools=RESPONSES_TOOLS[:2])
    plain = {"supportsStrictMode": False}
    assert [tool.get("strict", "-") for tool in responses_body(request, compat=plain)["tools"]] == ["-", "-"]


def test_responses_call() -> None:
    call = RESPONSES.build(pg.Request("x", (RESPONSES_USER,)), responses_model(), pg.Credential("api_key", "sk-1"))
    assert call[:2] == ("POST", "https://api.test/v1/responses") and call.headers["authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("text, wanted", [
    ("try again in 2.5s", 2.5), ("Please try again in 300ms.", 0.3), ("try again in 1m30s", 90),
    ("try again in 6m0s", 360),
    ("try again in 1h2m3s", 3723), ("try again in 2h", 7200), ("try again in 20 s", 20), ("try again in a while", None),
    ("", None)])
def test_responses_read_delay(text: str, wanted: Optional[float]) -> None:
    assert pg.read_delay(text) == wanted


@pytest.mark.parametrize("headers, wanted", [({}, 2.5), ({"retry-after": "7"}, 7.0)])
def test_responses_rate_limit_over_http(headers: Dict[str, Any], wanted: float) -> None:
    error = RESPONSES.parse_error(429, headers,
                                  b'{"error":{"code":"rate_limit_exceeded","message":"try again in 2.5s"}}', 0)
    assert type(error) is pg.RateLimited and error.retry_after == wanted


# --- Azure ------------------------------------------------------------------------------------------------------------

AZURE_V1 = "https://r.openai.azure.com/openai/v1"


@pytest.mark.parametrize("parts, fallback, wanted", [
    ({"resource": "r"}, "", AZURE_V1), ({"base_url": " https://r.openai.azure.com/ "}, "", AZURE_V1),
    ({"base_url": "https://r.openai.azure.com/openai"}, "", AZURE_V1),
    ({"base_url": "https://r.openai.azure.com/openai/v1/responses?api-version=2025"}, "", AZURE_V1),
    ({"base_url": AZURE_V1}, "", AZURE_V1),
    ({"base_url": AZURE_V1 + "/"}, "", AZURE_V1),
    ({"base_url": "https://r.cognitiveservices.azure.com"}, "", "https://r.cognitiveservices.azure.com/openai/v1"),
    ({"base_url": "https://r.services.ai.azure.com"}, "", "https://r.services.ai.azure.com/openai/v1"),
    ({"base_url": "https://proxy.test:8080/x/"}, "", "https://proxy.test:8080/x"),
    ({"base_url": "https://evilopenai.azure.com.test/openai"}, "", "https://evilopenai.azure.com.test/openai"),
    ({"base_url": AZURE_V1, "resource": "other"}, "https://z", AZURE_V1), ({}, "https://r.openai.azure.com", AZURE_V1)])
def test_azure_base_url(parts: Dict[str, Any], fallback: str, wanted: str) -> None:
    assert pg.azure_base_url(parts, fallback) == wanted


@pytest.mark.parametrize("parts",
                         [{}, {"base_url": "r.openai.azure.com"}, {"base_url": "https://[oops"}, {"resource": " "}])
def test_azure_without_address(parts: Dict[str, Any]) -> None:
    with pytest.raises(pg.Unauthorized) as caught:
        pg.azure_base_url(parts)
    assert caught.value.code == "no_credentials" and "AZURE_OPENAI_BASE_URL" in caught.value.message


@pytest.mark.parametrize("parts, url, name", [
    (AZURE_PARTS, "https://res.openai.azure.com/openai/v1/responses?api-version=v1", "dep2"),
    ({"resource": "res", "api_version": "2025-04-01 preview"},
     "https://res.openai.azure.com/openai/v1/responses?api-version=2025-04-01%20preview", "m2")])
def test_azure_call(parts: Dict[str, Any], url: str, name: str) -> None:
    call = AZURE.build(pg.Request("x", (RESPONSES_USER,)), responses_model(base_url=""),
                       pg.Credential("api_key", "key-1", parts=parts))
    assert call.url == url and json.loads(call.body)["model"] == name
    assert call.headers["api-key"] == "key-1" and "authorization" not in call.headers


# --- Codex ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["https://c.test/backend-api", "https://c.test/backend-api/",
                                  "https://c.test/backend-api/codex", "https://c.test/backend-api/codex/responses"])
def test_codex_url(base: str) -> None:
    assert pg.codex_url(base) == "https://c.test/backend-api/codex/responses"


@pytest.mark.parametrize("token",
                         ["", "sk-1", "a.b.c", "a.!!!.c", codex_jwt([]), codex_jwt({}),
                          codex_jwt({"https://api.openai.com/auth": 1}),
                          codex_jwt({"https://api.openai.com/auth": {"chatgpt_account_id": ""}}), "a.é.c"])
def test_codex_token_without_account(token: str) -> None:
    with pytest.raises(pg.Unauthorized) as caught:
        CODEX.build(pg.Request("x", (RESPONSES_USER,)), responses_model(), pg.Credential("oauth", token))
    assert caught.value.code == "no_credentials" and caught.value.message


def test_codex_call() -> None:
    request = pg.replace(RESPONSES_FULL, stream=False)
    fitted, dropped = CODEX.fit(request, responses_model(compat=RESPONSES_GRAMMAR))
    call = CODEX.build(fitted, responses_model(compat=RESPONSES_GRAMMAR), pg.Credential("oauth", CODEX_TOKEN))
    out = json.loads(call.body)
    assert dropped == ["max_tokens"] and set(out) <= pg.CODEX_FIELDS
    assert out["instructions"] == "Be brief.\n\nBe kind." and out["store"] is False and out["stream"] is True
    assert [tool.get("strict", "-") for tool in out["tools"]] == [True, None, "-"]
    assert out["input"][0]["role"] == "user" and out["include"] == ["reasoning.encrypted_content"]
    assert out["parallel_tool_calls"] is False and out["tool_choice"] == {"type": "function", "name": "wx"}
    wanted = {"authorization": f"Bearer {CODEX_TOKEN}", "chatgpt-account-id": "acc-1", "originator": "pigateway",
              "openai-beta": "responses=experimental", "accept": "text/event-stream", "session-id": "s1",
              "x-client-request-id": "s1", "content-type": "application/json"}
    assert {name: call.headers.get(name) for name in wanted} == wanted


def test_codex_defaults() -> None:
    out = responses_body(pg.Request("x", (RESPONSES_USER,)), CODEX, pg.Credential("oauth", CODEX_TOKEN))
    assert out["instructions"] == pg.CODEX_INSTRUCTIONS
    assert out["tool_choice"] == "auto" and out["parallel_tool_calls"] is True
    alone = responses_body(pg.Request("x", (), system=(pg.Text("Hi"),)), CODEX, pg.Credential("oauth", CODEX_TOKEN))
    assert alone["input"] == [{"role": "user",
                               "content": [{"type": "input_text", "text": "Hi"}]}] and alone["instructions"]


@pytest.mark.parametrize("status, body, kind, retry_after, words", [
    (429, {"error": {"type": "usage_limit_reached", "message": "The usage limit has been reached", "plan_type": "plus",
                     "resets_at": 1760003600}}, pg.QuotaExceeded, 3600.0, "(plus plan); it resets in about 60 min"),
    (429, {"error": {"code": "usage_limit_reached", "resets_in_seconds": 61}}, pg.QuotaExceeded, 61.0, "about 2 min"),
    (429, {"error": {"type": "usage_limit_reached", "resets_at": 1}}, pg.QuotaExceeded, 0.0, "0 min"),
    (429, {"error": {"type": "usage_limit_reached", "resets_at": 10 ** 400}}, pg.QuotaExceeded, None, "limit"),
    (403, {"error": {"type": "usage_not_included", "message": "m"}}, pg.QuotaExceeded, None, "does not include"),
    (429, {"error": {"code": "rate_limit_exceeded", "message": "try again in 2.5s"}}, pg.RateLimited, 2.5, "2.5s"),
    (400, {"detail": "Unsupported parameter: x"}, pg.BadRequest, None, "Unsupported parameter"),
    (401, {"error": {"message": "m"}}, pg.CredentialRefused, None, "m"),
    (503, {"error": {"code": "server_is_overloaded", "message": "busy"}}, pg.Overloaded, None, "busy"),
    (502, [], pg.UpstreamError, None, "")])
def test_codex_errors(status: int, body: Any, kind: Any, retry_after: Optional[float], words: str) -> None:
    error = CODEX.parse_error(status, {}, json.dumps(body).encode(), 1760000000)
    assert type(error) is kind and error.retry_after == retry_after and words in error.message


def test_codex_html_error() -> None:
    error = CODEX.parse_error(403, {"content-type": "text/html"}, b"<html>blocked</html>", 0)
    assert type(error) is pg.Forbidden and "403" in error.message


# --- Copilot ----------------------------------------------------------------------------------------------------------

COPILOT_PICTURE = pg.Image("image/png", "QUJD")


@pytest.mark.parametrize("messages, initiator, has_vision", [
    ((RESPONSES_USER,), "user", False), ((), "agent", False),
    ((RESPONSES_USER, pg.Message("assistant", (pg.ToolCall("c", "f"),)), pg.Message("tool", (pg.ToolResult("c"),))),
     "agent", False),
    ((pg.Message("user", (COPILOT_PICTURE,)), pg.Message("assistant", (pg.Text("x"),))), "agent", True),
    ((pg.Message("tool", (pg.ToolResult("c", (COPILOT_PICTURE,)),)), RESPONSES_USER), "user", True)])
def test_copilot_headers(messages: Any, initiator: str, has_vision: bool) -> None:
    wanted = {"x-initiator": initiator, "openai-intent": "conversation-edits"}
    if has_vision:
        wanted["copilot-vision-request"] = "true"
    assert pg.copilot_headers(pg.Request("x", messages)) == wanted


@pytest.mark.parametrize("token, domain, wanted", [
    ("tid=1;exp=2;proxy-ep=proxy.individual.githubcopilot.com;x=1", "", "https://api.individual.githubcopilot.com"),
    ("tid=1;proxy-ep=proxy.business.githubcopilot.com", "corp.test", "https://api.business.githubcopilot.com"),
    ("tid=1;proxy-ep=myproxy.x.test", "", "https://myproxy.x.test"),
    ("tid=1", "corp.test", "https://copilot-api.corp.test"),
    ("", "", "https://api.individual.githubcopilot.com")])
def test_copilot_base_url(token: str, domain: str, wanted: str) -> None:
    assert pg.copilot_base_url(token, domain) == wanted


# ======================================================================================================================
# §8 Gemini, Vertex, Code Assist
# ======================================================================================================================

GEMINI, VERTEX, CODE_ASSIST = pg.GoogleGenerativeAI(), pg.GoogleVertex(), pg.CloudCodeAssist()
GEMINI_SIGNATURE = "AAAAAAAAAAAAAAAAAAAAAA=="
GEMINI_KEY = pg.Credential("api_key", "k" * 12)
GEMINI_BASE = "https://generativelanguage.googleapis.com/v1beta"


def gemini_model(model_id: str = "gemini-2.5-flash", **fields: Any) -> pg.Model:
    fields.setdefault("reasoning", True)
    fields.setdefault("base_url", GEMINI_BASE)
    return pg.Model(model_id, "google", "google-generative-ai", **fields)


def gemini_request(*messages: pg.Message, **fields: Any) -> pg.Request:
    return pg.Request("m", tuple(messages), **fields)


def user_turn(*parts: Any) -> pg.Message:
    """A user message of texts (strings) and other parts."""
    return pg.Message("user", tuple(pg.Text(part) if isinstance(part, str) else part for part in parts))


def assistant_turn(*parts: Any) -> pg.Message:
    """An assistant message of texts (strings) and other parts."""
    return pg.Message("assistant", tuple(pg.Text(part) if isinstance(part, str) else part for part in parts))


def tool_turn(*results: pg.ToolResult) -> pg.Message:
    return pg.Message("tool", results)


def gemini_body(asked: pg.Request, which: Optional[pg.Model] = None, upstream: Any = GEMINI,
                credential: pg.Credential = GEMINI_KEY) -> Any:
    """What a request becomes."""
    which = which or gemini_model()
    fitted, _ = pg.normalise(asked, which, upstream, {})
    fitted, _ = upstream.fit(fitted, which)
    return json.loads(upstream.build(fitted, which, credential).body)


def check_gemini_types(types: Any, body: Dict[str, Any]) -> None:
    """Against google-genai's own models, in which an unknown field is an error."""
    for content in body["contents"]:
        types.Content.model_validate(content)
    for entry in body.get("tools", ()):
        types.Tool.model_validate(entry)
    if "toolConfig" in body:
        types.ToolConfig.model_validate(body["toolConfig"])
    if "systemInstruction" in body:
        types.Content.model_validate(body["systemInstruction"])
    types.GenerateContentConfig.model_validate(dict(body.get("generationConfig", {})))
    assert types.Content.model_config["extra"] == "forbid"


def gemini_wire(*chunks: Any, end: str = "\r\n") -> bytes:
    return "".join(f"data: {json.dumps(chunk)}{end}{end}" for chunk in chunks).encode()


def gemini_chunk(*parts: Any, reason: Optional[str] = None, usage: Any = None, **fields: Any) -> Dict[str, Any]:
    """One GenerateContentResponse."""
    candidate: Dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    if reason:
        candidate["finishReason"] = reason
    out = {"candidates": [candidate], "responseId": "r1", "modelVersion": "v1", **fields}
    if usage:
        out["usageMetadata"] = usage
    return out


def gemini_read(data: bytes, upstream: Any = GEMINI, which: Optional[pg.Model] = None,
                step: Optional[int] = None) -> List[Any]:
    settled = pg.Settled(upstream.reader(which or gemini_model(), STAMP))
    events: List[Any] = []
    for place in range(0, len(data), step or len(data) or 1):
        events.extend(settled.feed(data[place:place + (step or len(data))]))
    return events + settled.end()


def gemini_stream(data: bytes, upstream: Any = GEMINI) -> List[Any]:
    """The events of a stream, the same however it is cut."""
    events = gemini_read(data, upstream)
    for step in (1, 7, 64):
        assert repr(gemini_read(data, upstream, step=step)) == repr(events)
    assert sum(isinstance(event, (pg.Done, pg.Failed)) for event in events) == 1
    opened = [event.index for event in events if isinstance(event, pg.PartStart)]
    assert opened == list(range(len(opened)))
    return events


def gemini_error(events: List[Any]) -> Any:
    assert isinstance(events[-1], pg.Failed), events[-1]
    return events[-1].error


# --- Reader -----------------------------------------------------------------------------------------------------------

GEMINI_THINKING = gemini_wire(
    gemini_chunk({"text": "Plan it.", "thought": True}, usage={"promptTokenCount": 12, "thoughtsTokenCount": 3}),
    gemini_chunk({"text": "Hello"}, usage={"promptTokenCount": 12, "thoughtsTokenCount": 3, "candidatesTokenCount": 1}),
    gemini_chunk({"text": "", "thoughtSignature": GEMINI_SIGNATURE}, reason="STOP", usage={
        "promptTokenCount": 12, "cachedContentTokenCount": 4, "thoughtsTokenCount": 3, "candidatesTokenCount": 2,
        "totalTokenCount": 17}))
GEMINI_CALLS = gemini_wire(gemini_chunk({"functionCall": {"id": "a1", "name": "read", "args": {"path": "x"}},
                                         "thoughtSignature": GEMINI_SIGNATURE},
                                        {"functionCall": {"name": "get_status"}},
                                        {"functionCall": {"id": "a1", "name": "read"}},
                       reason="STOP"))


def test_gemini_thinking_text_and_sealed_signature() -> None:
    reply = pg.collect(gemini_stream(GEMINI_THINKING))
    assert reply.parts == (pg.Thinking("Plan it.", None, False, GEMINI.name), pg.Text("Hello"),
                           pg.Thinking("", GEMINI_SIGNATURE, True, GEMINI.name))
    assert reply.usage == pg.Usage(8, 5, 4, 0, 3)
    assert (reply.id, reply.stop_reason) == ("r1", "stop")


def test_gemini_parallel_calls() -> None:
    reply = pg.collect(gemini_stream(GEMINI_CALLS))
    assert reply.stop_reason == "tool_use"
    first, second, third = reply.parts
    assert first == pg.ToolCall("a1", "read", '{"path":"x"}', GEMINI_SIGNATURE, GEMINI.name)
    assert (second.arguments, second.signature) == ("{}", None)
    assert len({first.id, second.id, third.id}) == 3 and all(part.id for part in reply.parts)


def test_gemini_thought_signature_is_kept_and_url_safe_is_mended() -> None:
    data = gemini_wire(gemini_chunk({"text": "a", "thought": True, "thoughtSignature": "_-79"}),
                       gemini_chunk({"text": "b",
                           "thought": True}),
                       gemini_chunk({"text": "c"}, reason="STOP"))
    assert pg.collect(gemini_stream(data)).parts[0] == pg.Thinking("ab", "/+79", False, GEMINI.name)


@pytest.mark.parametrize("data", [
    b": keep-alive\n\n" + gemini_wire(gemini_chunk({"text": "hi"}, reason="STOP"), end="\n"),
    gemini_wire(gemini_chunk({"text": "hi"}, reason="STOP"), end="\n").rstrip(b"\n"),
    b'data: {"candidates":[{"content":{"parts":\r\ndata: [{"text":"hi"}]},"finishReason":"STOP"}]}\r\n\r\n',
    gemini_wire(gemini_chunk({"text": "hi"}, reason="STOP")) + b"data: [DONE]\n\n"],
                         ids=["comment", "no blank", "lines", "done"])
def test_gemini_framing(data: bytes) -> None:
    assert pg.collect(gemini_stream(data)).parts == (pg.Text("hi"),)


@pytest.mark.parametrize("reason, stop", list(pg.GEMINI_STOP.items()))
def test_gemini_finish_reasons(reason: str, stop: str) -> None:
    reply = pg.collect(gemini_stream(gemini_wire(gemini_chunk({"text": "x"}, reason=reason))))
    assert reply.stop_reason == stop and bool(reply.detail) == (stop == "refusal")


@pytest.mark.parametrize("reason", sorted(pg.GEMINI_FAILURES))
def test_gemini_failing_finish_reasons(reason: str) -> None:
    error = gemini_error(gemini_stream(gemini_wire(gemini_chunk({"text": "x"}, reason=reason))))
    assert type(error) is pg.UpstreamError and reason in error.message


@pytest.mark.parametrize("data, kind, word", [
    (gemini_wire(gemini_chunk({"text": "x"}, reason="BRAND_NEW")), pg.UpstreamProtocolError, "BRAND_NEW"),
    (gemini_wire(gemini_chunk({"text": "x"})), pg.UpstreamProtocolError, "finish reason"),
    (b"", pg.EmptyAnswer, "empty"),
    (gemini_wire(gemini_chunk(reason="STOP")), pg.EmptyAnswer, "empty"),
    (gemini_wire(gemini_chunk({"text": "", "thoughtSignature": GEMINI_SIGNATURE}, reason="STOP")), pg.EmptyAnswer,
     "empty"),
    (gemini_wire(gemini_chunk({"text": "hm", "thought": True}, reason="STOP")), pg.EmptyAnswer, "empty"),
    (gemini_wire(gemini_chunk({"text": "x"}), {"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}),
     pg.Overloaded,
     "busy"),
    (gemini_wire([{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}]), pg.BadRequest, "bad"),
    (gemini_wire(gemini_chunk({"text": "x"}))
     + b'[{\n  "error": {\n    "code": 429,\n    "message": "Resource exhausted",\n'
     b'    "status": "RESOURCE_EXHAUSTED"\n  }\n}\n]\n', pg.RateLimited, "exhausted"),
    (b'data: {"candidates"\n\n', pg.UpstreamProtocolError, "malformed"),
    (b"data: 5\n\n", pg.UpstreamProtocolError, "object"),
    (gemini_wire({"candidates": [{"content": {"parts": [{"functionCall": {}}]}}]}), pg.UpstreamProtocolError,
     "malformed"),
])
def test_gemini_broken_streams(data: bytes, kind: Any, word: str) -> None:
    error = gemini_error(gemini_stream(data))
    assert type(error) is kind and word in error.message


@pytest.mark.parametrize("cut", range(1, 3))
def test_gemini_every_cut_fails(cut: int) -> None:
    events = b"".join(gemini_wire(gemini_chunk({"text": str(number)})) for number
                      in range(3)) + gemini_wire(gemini_chunk(reason="STOP"))
    blocks = events.split(b"\r\n\r\n")
    assert isinstance(gemini_read(b"\r\n\r\n".join(blocks[:cut]) + b"\r\n\r\n")[-1], pg.Failed)


def test_gemini_blocked_prompt_is_a_refusal_with_a_start() -> None:
    events = gemini_stream(gemini_wire({"promptFeedback": {"blockReason": "SAFETY"},
                                        "usageMetadata": {"promptTokenCount": 3}}))
    assert isinstance(events[0], pg.Start)
    assert events[-1] == pg.Done("refusal", pg.Usage(3), "The provider blocked the prompt: SAFETY")


def test_gemini_length_without_text_is_an_answer() -> None:
    assert gemini_stream(gemini_wire(gemini_chunk(reason="MAX_TOKENS")))[-1].stop_reason == "length"


def test_gemini_whole() -> None:
    settled = pg.Settled(GEMINI.reader(gemini_model(), STAMP))
    assert pg.collect(settled.whole(gemini_chunk({"text": "hi"}, reason="STOP"))).parts == (pg.Text("hi"),)


def test_code_assist_unwraps() -> None:
    data = gemini_wire({"response": gemini_chunk({"text": "hi"}, reason="STOP"), "traceId": "t"}, {"traceId": "t"})
    assert pg.collect(gemini_stream(data, CODE_ASSIST)).parts == (pg.Text("hi"),)
    assert type(gemini_error(gemini_stream(gemini_wire({"error": {"code": 401, "message": "x"}}),
                                           CODE_ASSIST))) is pg.CredentialRefused


def test_claude_on_vertex_reader() -> None:
    assert isinstance(VERTEX.reader(gemini_model("claude-opus-4-6"), STAMP), pg.AnthropicReader)


# --- Building ---------------------------------------------------------------------------------------------------------

GEMINI_CALL = pg.ToolCall("c1", "read", '{"path":"x"}', GEMINI_SIGNATURE, GEMINI.name)
GEMINI_OTHER = pg.ToolCall("c|2", "look", "")
GEMINI_PICTURE = pg.Image("image/png", "iVBORw0KGgo=")
GEMINI_TOOLS = (pg.Tool("read", "Read", {"type": "object", "properties": {"path": {"const": "x"}}}),)
GEMINI_TURN = (user_turn("go"), assistant_turn(GEMINI_CALL, GEMINI_OTHER),
               tool_turn(pg.ToolResult("c1", (pg.Text("a"), pg.Text("b"))),
                                                              pg.ToolResult("c|2", (GEMINI_PICTURE,), True)))


def gemini_call_request(call: pg.ToolCall) -> pg.Request:
    """A call in an earlier turn, the given one with a sibling, and one after it, all answered."""
    return gemini_request(user_turn("1"), assistant_turn(pg.ToolCall("old", "f")),
                          tool_turn(pg.ToolResult("old", (pg.Text("ok"),))),
                          assistant_turn("fine"), user_turn("2"), assistant_turn(call, pg.ToolCall("b", "f")),
                          tool_turn(pg.ToolResult("a"), pg.ToolResult("b")), assistant_turn(pg.ToolCall("c", "f")),
                          tool_turn(pg.ToolResult("c")))


GEMINI_REQUESTS = {
    "turn": gemini_request(*GEMINI_TURN), "longer turn": gemini_request(*GEMINI_TURN, user_turn("and?")),
    "thinking": gemini_request(
        user_turn("a"), assistant_turn(
            pg.Thinking("t", GEMINI_SIGNATURE, False, GEMINI.name),
            pg.Thinking("", GEMINI_SIGNATURE, True, GEMINI.name),
            pg.Thinking("x", "sig", False, "anthropic-messages"), pg.Thinking("", GEMINI_SIGNATURE, True, VERTEX.name),
            "hi"),
        user_turn("b")),
    "roles": gemini_request(assistant_turn("a"), assistant_turn("b"), user_turn("c"), user_turn("d"),
                            system=(pg.Text("s"), pg.Text("t"))),
    "system": gemini_request(system=(pg.Text("s"),)),
    "config": gemini_request(
        user_turn("x"), max_tokens=100, temperature=0.5, top_p=0.9, top_k=3, stop=tuple("abcdefg"), seed=7,
        frequency_penalty=0.1, presence_penalty=0.2,
        output=pg.OutputFormat({"type": "object", "properties": {"a": {"const": 1}}})),
    "json": gemini_request(user_turn("x"), output=pg.OutputFormat()),
    "tools": gemini_request(user_turn("x"), tools=GEMINI_TOOLS + (pg.Tool("stop"),)),
    "image": gemini_request(user_turn(pg.Image(url="https://x.test/a.png?b=c"))),
    "plain": gemini_request(user_turn("x"))}


def test_gemini_url_and_headers() -> None:
    call = GEMINI.build(gemini_request(user_turn("x"), stream=True), gemini_model("models/gemini-2.5-pro"), GEMINI_KEY)
    assert call.url == GEMINI_BASE + "/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
    assert call.headers["x-goog-api-key"] == GEMINI_KEY.token and "authorization" not in call.headers
    assert GEMINI.build(gemini_request(user_turn("x")), gemini_model("tunedModels/t"),
                        GEMINI_KEY).url == GEMINI_BASE + "/tunedModels/t:generateContent"


def test_turn_gemini_3() -> None:
    body = gemini_body(GEMINI_REQUESTS["turn"], gemini_model("gemini-3-flash-preview"))
    fitted = pg.fit_id("c|2", 64)
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "go"}]},
        {"role": "model", "parts": [
            {"functionCall": {"id": "c1", "name": "read", "args": {"path": "x"}}, "thoughtSignature": GEMINI_SIGNATURE},
            {"functionCall": {"id": fitted, "name": "look", "args": {}}}]},
        {"role": "user", "parts": [
            {"functionResponse": {"id": "c1", "name": "read", "response": {"output": "a\nb"}}},
            {"functionResponse": {"id": fitted, "name": "look", "response": {"error": "(see attached image)"},
                                  "parts": [{"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}]}}]}]


def test_turn_gemini_2() -> None:
    contents = gemini_body(GEMINI_REQUESTS["longer turn"])["contents"]
    assert [list(part) for part in contents[2]["parts"]] == [["functionResponse"]] * 2
    assert "id" not in contents[2]["parts"][0]["functionResponse"] and "parts" not in contents[2]["parts"][1]
    assert [list(part)[0] for part in contents[3]["parts"]] == ["text", "inlineData", "text"]
    assert len(contents) == 4


GEMINI_CALL_SIGNATURES = [
    ("gemini-3-pro-preview", pg.ToolCall("a", "f"), pg.GEMINI_SENTINEL),
    ("gemini-flash-latest", pg.ToolCall("a", "f"), pg.GEMINI_SENTINEL),
    ("gemini-2.5-pro", pg.ToolCall("a", "f"), None),
    ("gemini-3-pro-preview", pg.ToolCall("a", "f", "", "sig", "anthropic-messages"), pg.GEMINI_SENTINEL),
    ("gemini-3-pro-preview", pg.ToolCall("a", "f", "", "_-79", "google-generative-ai"), "/+79"),
    ("gemini-3-pro-preview", pg.ToolCall("a", "f", "", pg.GEMINI_SENTINEL, "google-generative-ai"), pg.GEMINI_SENTINEL),
    ("gemini-3-pro-preview", pg.ToolCall("a", "f", "", "no base64!", "google-generative-ai"), pg.GEMINI_SENTINEL)]


@pytest.mark.parametrize("model_id, call, expected", GEMINI_CALL_SIGNATURES)
def test_gemini_call_signatures(model_id: str, call: pg.ToolCall, expected: Optional[str]) -> None:
    body = gemini_body(gemini_call_request(call), gemini_model(model_id))
    turns = [[part.get("thoughtSignature") for part in content["parts"] if "functionCall" in part]
             for content in body["contents"] if content["role"] == "model"]
    later = pg.GEMINI_SENTINEL if model_id != "gemini-2.5-pro" else None
    assert [turn for turn in turns if turn] == [[None], [expected, None], [later]]


def test_gemini_thinking_goes_back_to_its_maker_only() -> None:
    body = gemini_body(GEMINI_REQUESTS["thinking"])
    assert body["contents"][1]["parts"] == [{"text": "t", "thought": True, "thoughtSignature": GEMINI_SIGNATURE},
                                            {"text": "", "thoughtSignature": GEMINI_SIGNATURE}, {"text": "hi"}]


def test_gemini_roles() -> None:
    body = gemini_body(GEMINI_REQUESTS["roles"])
    assert [(c["role"], [p["text"] for p in c["parts"]]) for c in body["contents"]] == [
        ("user", ["…"]), ("model", ["a", "b"]), ("user", ["c", "d"])]
    assert body["systemInstruction"] == {"parts": [{"text": "s"}, {"text": "t"}]}
    alone = gemini_body(GEMINI_REQUESTS["system"])
    assert alone == {"contents": [{"role": "user", "parts": [{"text": "s"}]}]}


def test_gemini_generation_config() -> None:
    asked = GEMINI_REQUESTS["config"]
    assert gemini_body(asked)["generationConfig"] == {
        "maxOutputTokens": 100, "temperature": 0.5, "topP": 0.9, "topK": 3, "stopSequences": list("abcde"), "seed": 7,
        "frequencyPenalty": 0.1, "presencePenalty": 0.2, "responseMimeType": "application/json",
        "responseJsonSchema": {"type": "object", "properties": {"a": {"enum": [1]}}}}
    assert gemini_body(GEMINI_REQUESTS["json"])["generationConfig"] == {
        "responseMimeType": "application/json"}
    assert GEMINI.fit(asked, gemini_model())[1] == ["stop"]


GEMINI_LEVELS: List[Tuple[str, str, Optional[int], Dict[str, Any]]] = [
    ("gemini-2.5-flash", "off", None, {"thinkingBudget": 0}),
    ("gemini-2.5-pro", "off", None, {"thinkingBudget": 128}),
    ("gemini-2.5-flash", "low", None, {"includeThoughts": True, "thinkingBudget": 2048}),
    ("gemini-2.5-flash-lite", "minimal", None, {"includeThoughts": True, "thinkingBudget": 512}),
    ("gemini-2.5-pro", "max", None, {"includeThoughts": True, "thinkingBudget": 32768}),
    ("gemini-2.5-flash", "medium", 16000, {"includeThoughts": True, "thinkingBudget": 16000}),
    ("gemini-2.5-flash", "max", 64000, {"includeThoughts": True, "thinkingBudget": 24576}),
    ("deep-research-x", "high", None, {"includeThoughts": True, "thinkingBudget": -1}),
    ("gemini-3-pro-preview", "minimal", None, {"includeThoughts": True, "thinkingLevel": "LOW"}),
    ("gemini-3-pro-preview", "medium", None, {"includeThoughts": True, "thinkingLevel": "HIGH"}),
    ("gemini-3-pro-preview", "off", None, {"thinkingLevel": "LOW"}),
    ("gemini-3.1-pro-preview", "minimal", None, {"includeThoughts": True, "thinkingLevel": "LOW"}),
    ("gemini-3-flash-preview", "off", None, {"thinkingLevel": "MINIMAL"}),
    ("gemini-3.8-flash", "xhigh", None, {"includeThoughts": True, "thinkingLevel": "HIGH"}),
    ("gemini-4-argon", "off", None, {"thinkingLevel": "LOW"}),
    ("gemini-3.1-flash-image", "low", None, {"includeThoughts": True, "thinkingLevel": "HIGH"}),
    ("gemma-4-31b-it", "low", None, {"includeThoughts": True, "thinkingLevel": "HIGH"}),
    ("gemini-pro-latest", "medium", 5000, {"includeThoughts": True, "thinkingLevel": "MEDIUM"})]


@pytest.mark.parametrize("model_id, level, budget, expected", GEMINI_LEVELS)
def test_gemini_thinking_config(model_id: str, level: str, budget: Optional[int], expected: Dict[str, Any]) -> None:
    body = gemini_body(gemini_request(user_turn("x"), reasoning=pg.Reasoning(level, budget)), gemini_model(model_id))
    assert body["generationConfig"]["thinkingConfig"] == expected


GEMINI_CATALOGUE = {"off": None, "minimal": "MINIMAL", "low": None, "medium": None, "high": "HIGH"}


def test_gemini_catalogue_levels_win() -> None:
    body = gemini_body(gemini_request(user_turn("x"), reasoning=pg.Reasoning("low")),
                       gemini_model("gemini-9-x", thinking_levels=GEMINI_CATALOGUE))
    assert body["generationConfig"]["thinkingConfig"] == {"includeThoughts": True, "thinkingLevel": "HIGH"}


GEMINI_ROOM = [("low", 2148), ("off", 100), ("high", 8192)]


@pytest.mark.parametrize("level, limit", GEMINI_ROOM)
def test_gemini_room_for_thinking(level: str, limit: int) -> None:
    body = gemini_body(gemini_request(user_turn("x"), max_tokens=100, reasoning=pg.Reasoning(level)),
                       gemini_model(max_tokens=8192))
    assert body["generationConfig"]["maxOutputTokens"] == limit


GEMINI_CHOICES: List[Tuple[str, Optional[pg.ToolChoice], Optional[bool], Any]] = [
    ("gemini-2.5-pro", None, None, None),
    ("gemini-2.5-pro", None, True, None),
    ("gemini-3-pro", None, True, {"mode": "VALIDATED"}),
    ("gemini-2.5-pro", pg.ToolChoice("auto"), None, {"mode": "AUTO"}),
    ("gemini-2.5-pro", pg.ToolChoice("none"), None, {"mode": "NONE"}),
    ("gemini-2.5-pro", pg.ToolChoice("required"), None, {"mode": "ANY"}),
    ("gemini-3-pro", pg.ToolChoice("tool", "read"), True, {"mode": "ANY", "allowedFunctionNames": ["read"]})]


@pytest.mark.parametrize("model_id, choice, strict, expected", GEMINI_CHOICES)
def test_gemini_tool_config(model_id: str, choice: Optional[pg.ToolChoice], strict: Optional[bool],
                            expected: Optional[Dict[str, Any]]) -> None:
    tools = (pg.replace(GEMINI_TOOLS[0], strict=strict),)
    body = gemini_body(gemini_request(user_turn("x"), tools=tools, tool_choice=choice), gemini_model(model_id))
    assert body.get("toolConfig") == (expected and {"functionCallingConfig": expected})


def test_gemini_tools() -> None:
    asked = GEMINI_REQUESTS["tools"]
    assert gemini_body(asked)["tools"] == [{"functionDeclarations": [
        {"name": "read", "description": "Read",
         "parametersJsonSchema": {"type": "object", "properties": {"path": {"enum": ["x"]}}}},
        {"name": "stop", "parametersJsonSchema": {"type": "object", "properties": {}}}]}]
    legacy = gemini_body(asked, gemini_model(compat={"legacyParameters": True}))
    assert legacy["tools"] == [{"functionDeclarations": [
        {"name": "read", "description": "Read", "parameters": {
            "type": "object", "properties": {"path": {"type": "string", "enum": ["x"]}}}}, {"name": "stop"}]}]


@pytest.mark.parametrize("model_id, major", [("gemini-3.1-pro-preview", 3), ("gemini-live-3-x", 3),
                                             ("gemini-flash-latest", None), ("models/gemini-2.5-pro", 2)])
def test_gemini_major(model_id: str, major: Optional[int]) -> None:
    assert pg.gemini_major(model_id) == major


def test_gemini_image_by_address() -> None:
    body = gemini_body(GEMINI_REQUESTS["image"])
    assert body["contents"][0]["parts"] == [{"fileData": {"mimeType": "image/png",
        "fileUri": "https://x.test/a.png?b=c"}}]


GEMINI_SAMPLING = {"top_p": 0.5, "temperature": 1}


def test_gemini_sampling_of_the_models_file() -> None:
    body = gemini_body(GEMINI_REQUESTS["plain"], gemini_model(sampling=GEMINI_SAMPLING))
    assert body["generationConfig"] == {"topP": 0.5, "temperature": 1}


GEMINI_BODIES: List[Tuple[pg.Request, pg.Model]] = [
    *((asked, gemini_model(model_id)) for asked in GEMINI_REQUESTS.values()
      for model_id in ("gemini-2.5-flash", "gemini-3-flash-preview")),
    *((gemini_call_request(call), gemini_model(model_id)) for model_id, call, _ in GEMINI_CALL_SIGNATURES),
    *((gemini_request(user_turn("x"), reasoning=pg.Reasoning(level, budget)), gemini_model(model_id))
      for model_id, level, budget, _ in GEMINI_LEVELS),
    *((gemini_request(user_turn("x"), max_tokens=100, reasoning=pg.Reasoning(level)),
       gemini_model(max_tokens=8192)) for level, _ in GEMINI_ROOM),
    *((gemini_request(user_turn("x"), tools=(pg.replace(GEMINI_TOOLS[0], strict=strict),), tool_choice=choice),
       gemini_model(model_id))
      for model_id, choice, strict, _ in GEMINI_CHOICES),
    (gemini_request(user_turn("x"), reasoning=pg.Reasoning("low")),
     gemini_model("gemini-9-x", thinking_levels=GEMINI_CATALOGUE)),
    (GEMINI_REQUESTS["tools"], gemini_model(compat={"legacyParameters": True})),
    (GEMINI_REQUESTS["plain"], gemini_model(sampling=GEMINI_SAMPLING))]


@pytest.mark.parametrize("number", range(len(GEMINI_BODIES)))
def test_gemini_bodies_fit_googles_own_types(number: int) -> None:
    types = pytest.importorskip("google.genai.types")
    check_gemini_types(types, gemini_body(*GEMINI_BODIES[number]))


def test_gemini_lane_end_to_end() -> None:
    """Through the gateway's own lane: a Chat client, a Gemini answer, and what becomes of a filter."""
    client = pg.OpenAIChat()
    asked = client.parse({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    lane = pg.TranslatedLane(client, GEMINI, asked, gemini_model(), STAMP)
    call, dropped = lane.call(GEMINI_KEY)
    assert json.loads(call.body)["contents"] and dropped == []
    answer = json.loads(lane.whole(json.dumps(gemini_chunk({"text": "no"}, reason="SAFETY")).encode()))
    assert answer["choices"][0]["finish_reason"] == "content_filter"


# --- Errors -----------------------------------------------------------------------------------------------------------


def google_body(code: int, message: str, status: str, *details: Any, wrap: bool = False) -> bytes:
    body = {"error": {"code": code, "message": message, "status": status, "details": list(details)}}
    return json.dumps([body] if wrap else body).encode()


GOOGLE_PER_DAY = {"@type": "x/google.rpc.QuotaFailure", "violations": [{"quotaId": "GenerateRequestsPerDayPerProject"}]}
GOOGLE_PER_MINUTE = {"violations": [{"quotaId": "GenerateRequestsPerMinutePerProject"}]}
GOOGLE_BILLING = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize("status, body, kind, wait", [
    (429, google_body(429, GOOGLE_BILLING, "RESOURCE_EXHAUSTED", {"retryDelay": "34.5s"}, wrap=True), pg.RateLimited,
     34.5),
    (429, google_body(429, GOOGLE_BILLING, "RESOURCE_EXHAUSTED", GOOGLE_PER_DAY, {"retryDelay": "3s"}),
     pg.QuotaExceeded, 3.0),
    (429, google_body(429, GOOGLE_BILLING, "RESOURCE_EXHAUSTED", GOOGLE_PER_MINUTE), pg.RateLimited, 60.0),
    (429, google_body(429, GOOGLE_BILLING, "RESOURCE_EXHAUSTED", {"retryDelay": "4000s"}), pg.QuotaExceeded, 4000.0),
    (429, google_body(429, "Please retry in 900ms.", "RESOURCE_EXHAUSTED"), pg.RateLimited, 0.9),
    (429, google_body(429, GOOGLE_BILLING, "RESOURCE_EXHAUSTED"), pg.QuotaExceeded, None),
    (429, google_body(429, "x", "RESOURCE_EXHAUSTED", {"reason": "QUOTA_EXHAUSTED"}), pg.QuotaExceeded, None),
    (400, google_body(400, "Bad", "INVALID_ARGUMENT", {"reason": "API_KEY_INVALID"}), pg.CredentialRefused, None),
    (400, google_body(400, "API key not valid. Pass one.", "INVALID_ARGUMENT"), pg.CredentialRefused, None),
    (400, google_body(400, "The input token count (9) exceeds the maximum number of tokens allowed (5).",
                      "INVALID_ARGUMENT"), pg.ContextOverflow, None),
    (400, google_body(400, "no", "INVALID_ARGUMENT"), pg.BadRequest, None),
    (401, google_body(401, "no", "UNAUTHENTICATED"), pg.CredentialRefused, None),
    (403, google_body(403, "no", "PERMISSION_DENIED"), pg.Forbidden, None),
    (404, google_body(404, "no", "NOT_FOUND"), pg.ModelNotFound, None),
    (499, google_body(499, "no", "CANCELLED"), pg.UpstreamError, None),
    (500, google_body(500, "no", "INTERNAL"), pg.UpstreamError, None),
    (503, google_body(503, "no", "UNAVAILABLE"), pg.Overloaded, None),
    (504, google_body(504, "no", "DEADLINE_EXCEEDED"), pg.UpstreamTimeout, None),
    (502, b"<html>bad gateway</html>", pg.UpstreamError, None),
    (400, b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long"}}',
     pg.ContextOverflow, None)])
def test_gemini_errors(status: int, body: bytes, kind: Any, wait: Optional[float]) -> None:
    error = VERTEX.parse_error(status, {}, body, 0.0)
    assert (type(error), error.retry_after) == (kind, wait)


@pytest.mark.parametrize("text, headers, expected", [
    ("", {"retry-after": "5"}, 6.0), ("", {"x-ratelimit-reset": "1020"}, 21.0), ("",
     {"x-ratelimit-reset-after": "30"}, 31.0),
    ("Your quota will reset after 18h31m10s", {}, 66671.0), ("reset after 39s", {}, 40.0), ("reset after 10m15s.", {},
     616.0),
    ("Please retry in 900ms", {}, 1.9), ('{"retryDelay": "34.074824224s"}', {}, 35.075), ("later", {}, None),
    ("", {"x-ratelimit-reset": "10"}, None)])
def test_gemini_quota_delay(text: str, headers: Dict[str, Any], expected: Optional[float]) -> None:
    assert pg.parse_quota_delay(text, headers, 1000.0) == expected


def test_gemini_validation_link() -> None:
    body = google_body(403, "Verify", "PERMISSION_DENIED", {"reason": "VALIDATION_REQUIRED"},
        {"links": [{"url": "https://v"}]})
    assert CODE_ASSIST.parse_error(403, {}, body, 0.0).message == "Verify https://v"


# --- Schemas ----------------------------------------------------------------------------------------------------------

GEMINI_DEFS = {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "v": {"type": "integer"}},
                        "required": ["v"]}, "Color": {"enum": ["red", "green"]}, "a/b": {"type": "number"}}
GEMINI_SEE = {"type": "object", "description": "See: Node"}


@pytest.mark.parametrize("given, expected", [
    ({"$ref": "#/$defs/Node", "$defs": GEMINI_DEFS},
     {"type": "object", "properties": {"next": GEMINI_SEE, "v": {"type": "integer"}},
      "required": ["v"]}),
    ({"$ref": "#/$defs/Nope"}, {"type": "object", "description": "See: Nope"}),
    ({"$ref": "https://x.test/s.json"}, {"type": "object", "description": "See: s.json"}),
    ({"$ref": "#/$defs/a~1b", "$defs": GEMINI_DEFS}, {"type": "number"}),
    ({"allOf": [{"$ref": "#/$defs/Color"}], "default": "red", "$defs": GEMINI_DEFS},
     {"type": "string", "enum": ["red", "green"], "default": "red"}),
    ({"const": 3}, {"type": "string", "enum": ["3"]}), ({"enum": [1, "1", True, None]}, {
        "type": "string", "enum": ["1", "true"], "nullable": True}),
    ({"type": ["string", "null"]}, {"type": "string", "nullable": True}),
    ({"type": ["string", "integer"], "minLength": 2}, {"anyOf": [{"type": "string", "minLength": 2},
     {"type": "integer"}]}),
    ({"anyOf": [{"type": "string"}, {"type": "null"}], "title": "T"}, {"type": "string", "nullable": True,
     "title": "T"}),
    ({"oneOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]},
     {"anyOf": [{"type": "string"}, {"type": "number"}], "nullable": True}),
    ({"type": "object", "properties": {"a": True}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     {"type": "object", "properties": {"a": {}}, "description": 'anyOf: [{"required":["a"]},{"required":["b"]}]'}),
    ({"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"b": {"type": "number"}},
                                                                           "required": ["b", "c"]}]},
     {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}, "required": ["a", "b"]}),
    ({"allOf": [{"type": "number", "minimum": 1}, {"type": "integer", "minimum": 5, "maximum": 9}]},
     {"type": "integer", "minimum": 5, "maximum": 9}),
    ({"type": "object", "properties": {"enum": {"type": "string"}, "$ref": {"type": "string"}, "const": {"const": "x"},
                                       "required": {"type": "boolean"}}, "required": ["enum", "$ref", "zz"]},
     {"type": "object", "properties": {"enum": {"type": "string"}, "$ref": {"type": "string"}, "const": {
         "type": "string", "enum": ["x"]}, "required": {"type": "boolean"}}, "required": ["enum", "$ref"]}),
    ({"type": "string", "format": "uri", "description": "Where"}, {"type": "string",
     "description": 'Where\nformat: "uri"'}),
    ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
    ({"type": "object", "default": {"const": 1, "$ref": "#"}, "additionalProperties": False, "$schema": "x"},
     {"type": "object", "default": {"const": 1, "$ref": "#"}}),
    ({"type": "number", "exclusiveMinimum": 0, "x-y": 1}, {"type": "number",
     "description": "exclusiveMinimum: 0\nx-y: 1"}),
    ({"type": "array"}, {"type": "array", "items": {}}),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
     {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number"}]}}),
    ({"properties": {"no": False}}, {"type": "object", "properties": {"no": {"description": "not: {}"}}}),
    ({"properties": {"a": {"type": "string", "required": True}}},
     {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})])
def test_gemini_clean_schema(given: Dict[str, Any], expected: Dict[str, Any]) -> None:
    before = json.dumps(given)
    assert pg.clean_schema(given) == expected
    assert pg.clean_schema(expected) == expected and json.dumps(given) == before


GEMINI_ALLOWED = {"type", "format", "title", "description", "nullable", "enum", "items", "minItems", "maxItems",
                  "properties",
                  "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "minimum",
                  "maximum",
                  "example", "default", "anyOf", "propertyOrdering"}


def check_gemini_schema(schema: Dict[str, Any], depth: int = 0) -> int:
    """How many nodes a schema has; fails unless it is of the dialect."""
    assert set(schema) <= GEMINI_ALLOWED, schema
    assert depth <= 200 and isinstance(schema.get("type", ""), str)
    assert all(isinstance(item, str) for item in schema.get("enum", ()))
    assert "enum" not in schema or schema["type"] == "string"
    assert set(schema.get("required", ())) <= set(schema.get("properties", {}))
    assert schema.get("required") != [] and (schema.get("type") != "array" or "items" in schema)
    below = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()),
        *([schema["items"]] if "items" in schema else ())]
    return 1 + sum(check_gemini_schema(item, depth + 1) for item in below)


def gemini_random_schema(rng: random.Random, depth: int = 0) -> Any:
    if depth > 4 or rng.random() < 0.08:
        return rng.choice([True, False, {}, {"$ref": "#"}, {"$ref": f"#/$defs/D{rng.randrange(4)}"}, {"type": "null"}])
    out: Dict[str, Any] = {}

    def sub() -> Any:
        return gemini_random_schema(rng, depth + 1)

    makers: Dict[str, Callable[[], Any]] = {
        "type": lambda: rng.choice(["string", "object", "array", "INTEGER", "null", "bogus", 5, ["string", "null"],
                                    ["object", "array", "number"], [], ["null"]]),
        "properties": lambda: {rng.choice(["a", "b", "type", "$ref", "enum",
         "allOf"]): sub() for _ in range(rng.randrange(4))},
        "required": lambda: rng.choice([["a", "zz"], ["type", "type", 4], True, []]),
        "items": lambda: rng.choice([sub, lambda: [sub(), sub()]])(), "prefixItems": lambda: [sub()],
        "anyOf": lambda: [sub() for _ in range(rng.randrange(4))],
         "oneOf": lambda: [sub() for _ in range(rng.randrange(3))],
        "allOf": lambda: [sub() for _ in range(rng.randrange(3))], "not": sub, "if": sub, "additionalProperties": sub,
        "enum": lambda: rng.choice([[1, "a"], [None], [], ["x", None], "x", [{"a": 1}]]),
        "const": lambda: rng.choice([None, 1, "c", False, {"a": [1]}]), "$ref": lambda: f"#/$defs/D{rng.randrange(5)}",
        "format": lambda: rng.choice(["uri", "date-time", "int32", 3]), "nullable": lambda: rng.choice([True, False,
         "x"]),
        "minLength": lambda: rng.choice([1, 2.0, "x", -1]), "maximum": lambda: rng.choice([1.5, "x"]),
        "description": lambda: rng.choice(["words", "", 4]), "title": lambda: rng.choice(["T", 3]),
        "default": lambda: rng.choice([None, {"$ref": "#"}, 4]), "examples": lambda: [1], "x-foo": lambda: {"a": "b"},
        "pattern": lambda: "^a", "propertyOrdering": lambda: ["a", "q"], "uniqueItems": lambda: True,
         "$comment": lambda: "c"}
    for name in rng.sample(sorted(makers), rng.randrange(1, 6)):
        out[name] = makers[name]()
    if depth == 0:
        out["$defs"] = {f"D{number}": gemini_random_schema(rng, 2) for number in range(4)}
    return out


def gemini_random_schemas() -> Iterator[Dict[str, Any]]:
    """5000 of them, always the same."""
    rng = random.Random(20260807)
    for _ in range(5000):
        given = gemini_random_schema(rng)
        yield given if isinstance(given, dict) else {}


def test_gemini_random_schemas() -> None:
    for given in gemini_random_schemas():
        once = pg.clean_schema(given)
        check_gemini_schema(once)
        assert pg.clean_schema(once) == once, json.dumps(given)


def test_gemini_random_schemas_fit_googles_own_types() -> None:
    types = pytest.importorskip("google.genai.types")
    for number, given in enumerate(gemini_random_schemas()):
        if number % 10 == 0:
            types.Schema.model_validate(pg.clean_schema(given))


def test_gemini_schema_bombs() -> None:
    doubling = {"$ref": "#/$defs/D0", "$defs": {f"D{number}": {"type": "object", "properties": {
        "a": {"$ref": f"#/$defs/D{number + 1}"}, "b": {"$ref": f"#/$defs/D{number + 1}"}}} for number in range(60)}}
    union = {"$ref": "#/$defs/D0", "$defs": {f"D{number}": {"anyOf": [{"$ref": f"#/$defs/D{number + 1}"}] * 3}
                                            for number in range(60)}}
    merged = {"$ref": "#/$defs/D0", "$defs": {f"D{number}": {"allOf": [{"$ref": f"#/$defs/D{number + 1}"}] * 9}
                                             for number in range(60)}}
    deep: Dict[str, Any] = {"type": "string"}
    for _ in range(100):
        deep = {"type": "object", "properties": {"x": deep}}
    lists: Dict[str, Any] = {"type": "string"}
    for _ in range(300):
        lists = {"anyOf": [{"allOf": [lists]}]}
    circle: Dict[str, Any] = {"type": "object", "properties": {}, "not": {}}
    circle["properties"]["me"] = circle["not"]["me"] = circle
    choice: Dict[str, Any] = {}
    both: Dict[str, Any] = {}
    choice["anyOf"], both["allOf"] = [choice], [both, both]
    for given in (doubling, union, merged, deep, lists, circle, choice, both):
        began = time.perf_counter()
        once = pg.clean_schema(given)
        assert check_gemini_schema(once) <= 3 * pg.MAX_SCHEMA_NODES and time.perf_counter() - began < 3
        assert pg.clean_schema(once) == once


def test_gemini_const_to_enum() -> None:
    given = {"properties": {"const": {"const": "a"}, "b": {"anyOf": [{"const": 1}, {"const": None}]}},
             "default": {"const": 1}, "$defs": {"c": {"items": {"const": 2.5}}}}
    assert pg.const_to_enum(given) == {
        "properties": {"const": {"enum": ["a"]}, "b": {"anyOf": [{"enum": [1]}, {"const": None}]}},
        "default": {"const": 1}, "$defs": {"c": {"items": {"enum": [2.5]}}}}


# --- Vertex and Code Assist -------------------------------------------------------------------------------------------

VERTEX_PLACE = "https://{location}-aiplatform.googleapis.com"
VERTEX_TAIL = "/publishers/google/models/gemini-3-pro:generateContent"


def google_oauth(**parts: str) -> pg.Credential:
    return pg.Credential("oauth", "token-token", parts=parts)


@pytest.mark.parametrize("credential, model_id, base, url", [
    (google_oauth(project="p", location="global"), "gemini-3-pro", VERTEX_PLACE,
     "https://aiplatform.googleapis.com/v1/projects/p/locations/global" + VERTEX_TAIL),
    (google_oauth(project="p", location="eu"), "gemini-3-pro", VERTEX_PLACE,
     "https://aiplatform.eu.rep.googleapis.com/v1/projects/p/locations/eu" + VERTEX_TAIL),
    (google_oauth(project="p", location="us-central1"), "gemini-3-pro", VERTEX_PLACE,
     "https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/us-central1" + VERTEX_TAIL),
    (google_oauth(project="p"), "gemini-3-pro", "https://proxy.test/v1beta1",
     "https://proxy.test/v1beta1/projects/p/locations/global" + VERTEX_TAIL),
    (GEMINI_KEY, "gemini-3-pro", VERTEX_PLACE, "https://aiplatform.googleapis.com/v1" + VERTEX_TAIL),
    (google_oauth(project="p"), "meta/llama-4", VERTEX_PLACE,
     "https://aiplatform.googleapis.com/v1/projects/p/locations/global"
     "/publishers/meta/models/llama-4:generateContent"),
    (google_oauth(project="p"), "claude-opus-4-5@20251101", VERTEX_PLACE,
     "https://aiplatform.googleapis.com/v1/projects/p/locations/"
     "global/publishers/anthropic/models/claude-opus-4-5@20251101:rawPredict")])
def test_vertex_urls(credential: pg.Credential, model_id: str, base: str, url: str) -> None:
    assert VERTEX.build(gemini_request(user_turn("x")), gemini_model(model_id, base_url=base), credential).url == url


def test_vertex_headers_and_refusals() -> None:
    headers = VERTEX.headers(gemini_model(), google_oauth(project="p", quota_project="q"))
    assert headers["authorization"] == "Bearer token-token" and headers["x-goog-user-project"] == "q"
    assert "x-goog-api-key" not in headers and VERTEX.headers(gemini_model(),
                                                              GEMINI_KEY)["x-goog-api-key"] == GEMINI_KEY.token
    refused: Sequence[Dict[str, str]] = ({}, {"project": "p", "location": "evil.test/"})
    for parts in refused:
        with pytest.raises(pg.Unauthorized) as caught:
            VERTEX.build(gemini_request(user_turn("x")), gemini_model(base_url=VERTEX_PLACE), google_oauth(**parts))
        assert caught.value.code == "no_credentials"


def test_claude_on_vertex() -> None:
    which = gemini_model("claude-opus-4-6", base_url=VERTEX_PLACE)
    signed = pg.Thinking("t", "sig", False, "anthropic-messages")
    asked, _ = pg.normalise(gemini_request(user_turn("a"), assistant_turn(signed, "b"), user_turn("c"), stream=True),
                            which, VERTEX, {})
    call = VERTEX.build(asked, which, google_oauth(project="p"))
    body = json.loads(call.body)
    assert body["anthropic_version"] == "vertex-2023-10-16" and "model" not in body and body["stream"] is True
    assert body["messages"][1]["content"][0]["signature"] == "sig"
    assert call.url.endswith(":streamRawPredict") and not {"anthropic-version", "x-api-key"} & set(call.headers)


def test_code_assist() -> None:
    which = gemini_model("gemini-3-pro-preview", base_url="https://cloudcode-pa.googleapis.com")
    asked = gemini_request(user_turn("hi"), tools=GEMINI_TOOLS, max_tokens=50, stream=True)
    call = CODE_ASSIST.build(asked, which, google_oauth(project="proj"))
    body = json.loads(call.body)
    assert call.url == "https://cloudcode-pa.googleapis.com/v1internal:streamGenerateContent?alt=sse"
    assert (body["project"], body["model"], body["userAgent"]) == ("proj", "gemini-3-pro-preview", "pigateway")
    assert body["request"]["contents"][0]["role"] == "user" and body["request"]["sessionId"].startswith("-")
    assert "parametersJsonSchema" in body["request"]["tools"][0]["functionDeclarations"][0]
    with pytest.raises(pg.Unauthorized):
        CODE_ASSIST.build(asked, which, google_oauth())


def test_antigravity() -> None:
    compat = {"codeAssistAgent": "antigravity"}
    which = gemini_model("claude-sonnet-4-6", compat=compat, max_tokens=64000, base_url="https://d.test")
    asked = gemini_request(user_turn("hi"),
                           assistant_turn(pg.Thinking("", GEMINI_SIGNATURE, True, CODE_ASSIST.name),
                                          pg.ToolCall("c", "read")),
                           tool_turn(pg.ToolResult("c")), tools=GEMINI_TOOLS, max_tokens=1000,
                           reasoning=pg.Reasoning("medium"))
    call = CODE_ASSIST.build(asked, which, google_oauth(project="proj"))
    body = json.loads(call.body)
    assert re.fullmatch(r"agent-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", body["requestId"])
    assert (body["requestType"], body["userAgent"]) == ("agent", "antigravity")
    assert call.headers["anthropic-beta"] == pg.ANTIGRAVITY_BETA
    inner = body["request"]
    assert inner["toolConfig"] == {"functionCallingConfig": {"mode": "VALIDATED"}}
    assert "parameters" in inner["tools"][0]["functionDeclarations"][0]
    assert inner["generationConfig"] == {"maxOutputTokens": 9192, "thinkingConfig": {
        "includeThoughts": True, "thinkingBudget": 8192}}
    assert inner["contents"][1]["parts"] == [{"functionCall": {"id": "c", "name": "read", "args": {}}}]
    tight = CODE_ASSIST.config(asked, pg.replace(which, max_tokens=1024))
    assert tight == {"maxOutputTokens": 1024}
    assert CODE_ASSIST.config(asked, gemini_model("gemini-3-flash", compat=compat)).get("maxOutputTokens") is None


# --- Signatures of calls ----------------------------------------------------------------------------------------------


def test_gemini_signature_memory() -> None:
    memory = pg.SignatureMemory(limit=2, ttl_s=10)
    for number, call_id in enumerate(("a", "b", "a", "c")):
        memory.remember(call_id, "m", f"s{number}", now=0)
    assert (memory.recall("a", 1), memory.recall("b", 1), len(memory)) == (("m", "s2", ""), None, 2)
    assert memory.recall("a", 10) is None and len(memory) == 1
    memory.remember("c1", GEMINI.name, GEMINI_SIGNATURE, 0)
    bare = pg.replace(GEMINI_CALL, signature=None, maker="")
    asked = gemini_request(user_turn("x"), assistant_turn(bare, GEMINI_OTHER))
    assert pg.with_remembered(asked, memory, 1).messages[1].parts == (GEMINI_CALL, GEMINI_OTHER)
    assert pg.with_remembered(gemini_request(user_turn("x")), memory, 1) == gemini_request(user_turn("x"))


def test_gemini_signature_memory_threads() -> None:
    memory = pg.SignatureMemory(limit=50)

    def work(start: int) -> None:
        for number in range(500):
            memory.remember(f"{start}-{number}", "m", "s", 0.0)
            memory.recall(f"{number}-{start}", 1.0)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory) == 50


# ======================================================================================================================
# §10 Google credentials
# ======================================================================================================================

# Section 8.3 of the wire reference: a key made for it and never used for any account.
GOOGLE_PEM = """\
-----BEGIN PRIVATE KEY-----
MIIEvgIBADANBgkqhkiG9w0BAQEFAASCBKgwggSkAgEAAoIBAQC2RlMB5YI6ebjz
wxvJeJ2USACXDh+e/AyS5L2Gj77z25OzuMpieby4UDfqI2jXHbVBQ/Gd8Kgy9Fyq
v+QT0ro4D5HUqDOu24W1mN4dJjaQ8pF2XJkcEXn4T0Lm/SI4Swk8DxkTjgmhHWbj
iji3ogz4pAtEfP2Pn/H9G1mAgAtpWAxApmQRKbjCGVCoW+VrbYi6TnzG2QDt83yf
V/7IwU+481kQ+rF40i/jceVpnJIYTGyWwrM2UYoZeITEOOblbLHqxQ75rdw7kfEA
RlG1Z2YrEbOD3dKREXfYfmIbuPg9XGNCQg2lq+i9mopqFy0MypSNY9zNf04f343s
S3DvoRwjAgMBAAECggEAUMCOJNBzpgloPaJKTLNBiMBvdnyc2LgMsAVjy9oiPHIi
mSQ8kW0ihTuQ0gu29lqkgxIhWJoWQmDNLx6NYpTgyFZpgp+0Kfr6XU4o1RwpX4T/
mcMDWBKMCUzANIqf3vWrVS7RKr8qF/VpMFR7tSs3eO5gSYrgYQF42WwE9m+D3rqP
uGC5DbcMW3GY1we4WFfrGKj1JFZjd+s2MQldO5q8QaVvJnQP/fQFm9YBPIDA8MNz
vbFJaiwDaK0GbI3r4nDpvqDIVAY9inS9Z2p3B8h0abMQJ00lgBVH2rKyrOdONiEZ
tlCEdPWELTg7DuoVvSQFHXI0KuQuncK2yrz3UdIu9QKBgQD/XPGf9hkfC9qfk3HH
x4Q1X+7cFafloHvxShpn6LRMIz480iHgJRq9Viza0iXnnIYnQsTYfM46jUrkqoK2
nwLL7sI5lQoQlic8EjhgIgAEih5oBoMMvj1y9VGiAb0XdmEnGC7enEPNLb8w0lwd
i+RRff2w5q5CH0T9DPhgexNY3QKBgQC2urYmoyflAo2IHcizOMXGjVcd1cPOpgG1
C2I41jPRu+WkNMRicWz5KwmUBzCBIHKtBlJSPIJZVTepq7KdILNIDD0bLF93gd0i
4vR0MushDQoUXcqH/LqeGi8omK+NREdFSVD4uB9BVRHVMIH38BXOTxGnehA9K+Es
OcJYJ0R4/wKBgQCjBkQfWe5ZuqicvXWjFAWcSZ1lFdI1L4pQ1X0cHxyTiuBd1czY
mveCLnS+UfDu9ydSAzdF+g9yo+dPKmf+jG8toESQnExroGB14i/pd2tJep/Ey3t4
dC8op+Kwqal9RA7r9W1eoqZKY80uLu2t0zQ0rll6SRqwjePuJQygE5KbZQKBgGSE
UvzwFVsJy3dMAwJrwYfWaky0MZE0io3f5Dklw72k4c8xY7JPeMWcIhm21rzBb7O0
XYZ1WLLxiLwiAhAjU9vXN6oB/8YKvu2Y8SYWeHdm59uKOIYTxUiBWN25GCDapWX8
zbjz9+WFeVjP5T7RZ/1kS27YW6R6xdQBNeIuP6FbAoGBAO203zdVfYyocAaQi7ag
U+1YxWSfKBuPmpw2osqdGkbnY7IG6wExXmfFj0C0TM30XqrWl4z6YbbggZQkIcYj
lYEhBYbZEervOPh5IuAmCxUEJKmP02YMtcGbRU+NtohhH2jFfvNGKUY6SW2RZ/pu
AiUpfyMs8/TtkneOPkfepwW2
-----END PRIVATE KEY-----"""
GOOGLE_SIGNED = (
    "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6InRlc3Qta2V5LWlkLTAwMDEifQ.eyJpc3MiOiJ0ZXN0LXNhQHRlc3Qtc"
    "HJvamVjdC5pYW0uZ3NlcnZpY2VhY2NvdW50LmNvbSIsInNjb3BlIjoiaHR0cHM6Ly93d3cuZ29vZ2xlYXBpcy5jb20vYXV0aC9jb"
    "G91ZC1wbGF0Zm9ybSIsImF1ZCI6Imh0dHBzOi8vb2F1dGgyLmdvb2dsZWFwaXMuY29tL3Rva2VuIiwiaWF0IjoxNzY3MzIzMDQ1L"
    "CJleHAiOjE3NjczMjY2NDV9")
GOOGLE_ASSERTED = (
    "ZaAvcjoGmxq0Bp1dPLrYu7WCLf_y4ydmc1NBrff_4YaOCSLj9_Mj10Z8l1C4hckzg1vWf5LrGYdWTMJhIeO5uzx8xuFghvUnjAKt"
    "_1pVRjVd6YR2VMhJHtklzWIW8NwxvGGQ1U-Z3_LTlUk9iSSZ8usKOFTLoGosQ_50Fo9T44f_FHF0RPtUOZKOyXrO1z1lAXy_HGV1"
    "r_ThjV7TWHx3gFNjgPigZA4mzEti4JNDPoPSD25tU1iKT49wM8PB1ViazEXIv-9u2hvT8rSvcaI5nQWjhGQhHOLWIyX2GQrkxAGf"
    "4E_98evIVRFyvjjlBnZW8MzNaxvGC-oEYZdJ0fKopw")


def test_google_assertion_vector() -> None:
    info = {"client_email": "test-sa@test-project.iam.gserviceaccount.com", "private_key_id": "test-key-id-0001",
            "private_key": GOOGLE_PEM}
    assert pg.service_account_assertion(info, 1767323045.9) == f"{GOOGLE_SIGNED}.{GOOGLE_ASSERTED}"
    raw = pg.sign_rs256(pg.parse_pem(GOOGLE_PEM), GOOGLE_SIGNED.encode())
    assert hashlib.sha256(raw).hexdigest() == "3bcf49edce6c0897532621b99613810864c633ec93112988885901a0a0f02e4b"


@pytest.mark.parametrize("bits", [1024, 2048, 3072, 2048, 1025])
def test_google_random_keys(bits: int) -> None:
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding
    try:
        private = rsa.generate_private_key(65537, bits)
    except ValueError:
        pytest.skip("size refused")
    message = os.urandom(100)
    signatures = set()
    for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL):
        pem = private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
        signatures.add(pg.sign_rs256(pg.parse_pem(pem), message))
    assert len(signatures) == 1
    private.public_key().verify(signatures.pop(), message, padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.parametrize("text", ["", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "no pem",
                                  "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA", "MAA=", "MIA=", "MIIB"])
def test_google_bad_pem(text: str) -> None:
    with pytest.raises(ValueError):
        pg.parse_pem(text)


def test_google_damaged_key() -> None:
    key = pg.parse_pem(GOOGLE_PEM)
    with pytest.raises(ValueError):
        pg.sign_rs256(key._replace(dp=key.dp + 2), b"x")


class FakeGoogle(http.server.BaseHTTPRequestHandler):
    """A token server and a metadata server in one."""

    server: Any

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["content-length"])).decode()
        self.server.forms.append(dict(urllib.parse.parse_qsl(form)))
        time.sleep(self.server.delay_s)
        status, body = self.server.script.pop(0) if self.server.script else (
            200, {"access_token": f"t{len(self.server.forms)}", "expires_in": "3599", "token_type": "Bearer"})
        self.answer(status, json.dumps(body).encode())

    def do_GET(self) -> None:
        assert self.headers["Metadata-Flavor"] == "Google"
        self.server.forms.append(self.path)
        body = b"meta-project" if self.path.endswith("project-id") else b'{"access_token": "mt", "expires_in": 3599}'
        self.answer(200, body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if self.server.flavour:
            self.send_header("Metadata-Flavor", self.server.flavour)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def google_server() -> Iterator[Any]:
    """A running FakeGoogle."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeGoogle)
    server.forms, server.script, server.delay_s, server.flavour = [], [], 0, "Google"
    server.transports = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    for transport in server.transports:
        transport.close()
    end_accepting(server)
    server.shutdown()
    server.server_close()


class GoogleWire:
    """A transport whose every call goes to the fake server."""

    def __init__(self, server: Any) -> None:
        self.base = f"http://127.0.0.1:{server.server_port}"
        self.inner = pg.Transport()
        server.transports.append(self.inner)
        self.urls: List[str] = []

    def open(self, call: pg.Call, scope: pg.Scope) -> Any:
        self.urls.append(call.url)
        return self.inner.open(call._replace(url=self.base + "/token"), scope)


GOOGLE_USER_FILE = {"type": "authorized_user", "client_id": "ci", "client_secret": "cs", "refresh_token": "rt",
                    "quota_project_id": "qp"}


def google_write(path: Any, info: Any) -> Dict[str, str]:
    """Writes a credentials file; the environment that names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info) if isinstance(info, dict) else info)
    return {"GOOGLE_APPLICATION_CREDENTIALS": str(path)}


def test_google_authorized_user_is_cached_and_renewed(google_server: Any, tmp_path: Any) -> None:
    now = [1000.0]
    tokens = pg.GoogleTokens(GoogleWire(google_server), clock=lambda: now[0])
    environ = {**google_write(tmp_path / "adc.json", GOOGLE_USER_FILE), "GCLOUD_PROJECT": "gp",
               "GOOGLE_CLOUD_LOCATION": "eu"}
    first = tokens.token(environ, {"GOOGLE_CLOUD_PROJECT": "own"})
    assert (first.kind, first.token) == ("oauth", "t1")
    assert first.parts == {"project": "own", "location": "eu", "quota_project": "qp"}
    assert google_server.forms[0] == {"grant_type": "refresh_token", "client_id": "ci", "client_secret": "cs",
        "refresh_token": "rt"}
    now[0] += 3599 - 226
    assert tokens.token(environ).token == "t1"
    now[0] += 2
    assert tokens.token(environ).token == "t2"
    now[0] += 3599 - 100                        # late, and Google is down: what is left of the old one serves
    google_server.script = [(503, {})] * 3
    tokens._pause = lambda seconds: None
    assert tokens.token(environ).token == "t2" and len(google_server.forms) == 5


def test_google_service_account(google_server: Any, tmp_path: Any) -> None:
    wire_ = GoogleWire(google_server)
    info = {"type": "service_account", "project_id": "file-project", "client_email": "a@b", "private_key": GOOGLE_PEM,
            "token_uri": "https://example.test/token"}
    credential = pg.GoogleTokens(wire_).token(google_write(tmp_path / "sa.json", info))
    assert credential.parts == {"project": "file-project"} and wire_.urls == ["https://example.test/token"]
    assert google_server.forms[0]["grant_type"].endswith("jwt-bearer")
    claims = json.loads(base64.urlsafe_b64decode(google_server.forms[0]["assertion"].split(".")[1] + "=="))
    assert claims["exp"] - claims["iat"] == 3600 and claims["iss"] == "a@b"


def test_google_one_refresh_for_many(google_server: Any, tmp_path: Any) -> None:
    google_server.delay_s = 0.2
    tokens = pg.GoogleTokens(GoogleWire(google_server))
    found: List[str] = []
    environ = google_write(tmp_path / "adc.json", GOOGLE_USER_FILE)
    threads = [threading.Thread(target=lambda: found.append(tokens.token(environ).token)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["t1"] * 20 and len(google_server.forms) == 1


def test_google_well_known_file_then_metadata(google_server: Any, tmp_path: Any) -> None:
    environ = {"HOME": str(tmp_path), "GCE_METADATA_HOST": f"127.0.0.1:{google_server.server_port}",
        "http_proxy": "http://no:1"}
    tokens = pg.GoogleTokens(GoogleWire(google_server))
    credential = tokens.token(environ)
    assert (credential.token, credential.parts) == ("mt", {"project": "meta-project"})
    tokens.token(environ)
    assert len(google_server.forms) == 2
    google_write(tmp_path / ".config/gcloud/application_default_credentials.json", GOOGLE_USER_FILE)
    assert tokens.token(environ).token == "t3"
    assert tokens.usable({"HOME": str(tmp_path)}) and not tokens.usable({"HOME": "/nowhere"}) and not tokens.usable({})


def test_google_other_things_at_the_metadata_address(google_server: Any) -> None:
    google_server.flavour = ""
    environ = {"GCE_METADATA_HOST": f"127.0.0.1:{google_server.server_port}"}
    with pytest.raises(pg.Unauthorized) as caught:
        pg.GoogleTokens(GoogleWire(google_server)).token(environ)
    assert caught.value.code == "no_credentials" and "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.message


@pytest.mark.parametrize("info, script, word", [
    (None, [], "cannot be read"), ("{", [], "not valid JSON"), ({"type": "external_account"}, [], "external_account"),
    ({"type": "authorized_user", "client_id": "x"}, [], "client_secret"),
    ({"type": "service_account", "client_email": "x", "private_key": "zz"}, [], "private key"),
    (GOOGLE_USER_FILE, [(400, {"error": "invalid_grant", "error_description": "revoked"})], "gcloud auth"),
    (GOOGLE_USER_FILE, [(401, {"error": "invalid_client"})], "invalid_client")])
def test_google_refusals(google_server: Any, tmp_path: Any, info: Any, script: List[Any], word: str) -> None:
    path = tmp_path / "adc.json"
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(path)} if info is None else google_write(path, info)
    google_server.script = list(script)
    tokens = pg.GoogleTokens(GoogleWire(google_server))
    for _ in range(2):                          # the second time from memory
        with pytest.raises(pg.Unauthorized) as caught:
            tokens.token(environ)
        assert word in caught.value.message and caught.value.code == "no_credentials"
        assert "rt" not in caught.value.message.split() and str(tmp_path) not in caught.value.message
    assert len(google_server.forms) == len(script)


def test_google_retries(google_server: Any, tmp_path: Any) -> None:
    pauses: List[float] = []
    tokens = pg.GoogleTokens(GoogleWire(google_server), pause=pauses.append)
    google_server.script = [(503, {}), (500, {})]
    assert tokens.token(google_write(tmp_path / "adc.json", GOOGLE_USER_FILE)).token == "t3" and pauses == [0.5, 1.0]
    google_server.script = [(503, {"error": "temporarily_unavailable"})] * 3
    with pytest.raises(pg.UpstreamError):
        pg.GoogleTokens(GoogleWire(google_server),
                        pause=pauses.append).token(google_write(tmp_path / "adc.json", GOOGLE_USER_FILE))


# ======================================================================================================================
# §5 and §8 Bedrock
# ======================================================================================================================

BEDROCK = pg.BedrockConverse()
AWS_KEYS = {"access_key_id": "AKIDEXAMPLE00000TEST", "secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
AWS_NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc).timestamp()
BEDROCK_PNG = base64.b64encode(b"\x89PNG").decode()
BEDROCK_CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"


def bedrock_model(model_id: str = BEDROCK_CLAUDE, **facts: Any) -> pg.Model:
    facts = {"max_tokens": 64000, "reasoning": True, **facts}
    return pg.Model(model_id, "amazon-bedrock", BEDROCK.name, facts.pop(
        "base_url", "https://bedrock-runtime.us-east-1.amazonaws.com"), **facts)


def bedrock_request(*messages: pg.Message, **fields: Any) -> pg.Request:
    """A request, of "hi" unless told otherwise; `reasoning` may be a level."""
    fields = {name: pg.Reasoning(value) if name == "reasoning" and isinstance(value, str) else value
              for name, value in fields.items()}
    return pg.Request("m", messages or (user_turn("hi"),), **fields)


def aws_credential(**parts: str) -> pg.Credential:
    return pg.Credential("aws", parts={**AWS_KEYS, **parts})


def bedrock_built(req: pg.Request, model: pg.Model, credential: Optional[pg.Credential] = None,
                  upstream: Any = BEDROCK) -> Tuple[pg.Call, Any]:
    """The call that a request becomes, and its body."""
    req, _ = pg.normalise(req, model, upstream, {})
    req, _ = upstream.fit(req, model)
    call = upstream.build(req, model, credential or aws_credential())
    return call, json.loads(call.body)


def provider_events(reader: Any, pieces: Sequence[bytes]) -> List[Any]:
    """The events that a provider's bytes become, fed in the given pieces."""
    settled = pg.Settled(reader)
    events: List[Any] = []
    for piece in pieces:
        events.extend(settled.feed(piece))
    return events + settled.end()


def byte_splits(data: bytes) -> Iterator[List[bytes]]:
    """Whole, byte by byte, in pieces of some sizes, and in two at every place."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    for size in (2, 3, 7, 64):
        yield [data[i:i + size] for i in range(0, len(data), size)]
    for cut in range(1, len(data)):
        yield [data[:cut], data[cut:]]


# --- Event stream -----------------------------------------------------------------------------------------------------

BEDROCK_FRAME_A = bytes.fromhex("""
0000009400000057b4ab9aee0b3a6576656e742d74797065070011636f6e7465
6e74426c6f636b44656c74610d3a636f6e74656e742d74797065070010617070
6c69636174696f6e2f6a736f6e0d3a6d6573736167652d747970650700056576
656e747b22636f6e74656e74426c6f636b496e646578223a302c2264656c7461
223a7b2274657874223a224869227d7d1f944657""".replace("\n", ""))
BEDROCK_FRAME_B = bytes.fromhex("""
0000008800000061de0175f40f3a657863657074696f6e2d7479706507001374
68726f74746c696e67457863657074696f6e0d3a636f6e74656e742d74797065
0700106170706c69636174696f6e2f6a736f6e0d3a6d6573736167652d747970
65070009657863657074696f6e7b226d657373616765223a22736c6f7720646f
776e227d832ee072""".replace("\n", ""))
BEDROCK_FRAME_C = bytes.fromhex("000000100000000005c248eb7d98c8ff")
BEDROCK_MESSAGES: List[Tuple[Dict[str, Any], bytes]] = [
    ({":event-type": "contentBlockDelta", ":content-type": "application/json", ":message-type": "event"},
     b'{"contentBlockIndex":0,"delta":{"text":"Hi"}}'),
    ({":exception-type": "throttlingException", ":content-type": "application/json", ":message-type": "exception"},
     b'{"message":"slow down"}'), ({}, b"")]
BEDROCK_PACKERS: Dict[Any, Tuple[int, Callable[[Any], bytes]]] = {True: (0, lambda v: b""), False: (1, lambda v: b""),
           bytes: (6, lambda v: struct.pack(">H", len(v)) + v),
           str: (7, lambda v: struct.pack(">H", len(v.encode())) + v.encode())}


def bedrock_frame(headers: Dict[str, Any], payload: bytes) -> bytes:
    """A message of AWS's event stream; a header may be a tuple of its type and its bytes."""
    packed = b""
    for name, value in headers.items():
        if isinstance(value, tuple):
            kind, encoded = value
        else:
            kind, pack = BEDROCK_PACKERS[value if isinstance(value, bool) else type(value)]
            encoded = pack(value)
        packed += bytes([len(name.encode())]) + name.encode() + bytes([kind]) + encoded
    prelude = struct.pack(">II", 16 + len(packed) + len(payload), len(packed))
    data = prelude + struct.pack(">I", binascii.crc32(prelude)) + packed + payload
    return data + struct.pack(">I", binascii.crc32(data))


def bedrock_event(name: str, data: Any, kind: str = "event") -> bytes:
    word = ":exception-type" if kind == "exception" else ":event-type"
    return bedrock_frame({word: name, ":content-type": "application/json", ":message-type": kind},
                         data if isinstance(data, bytes) else json.dumps(data).encode())


def bedrock_stream(*events: Tuple[str, Any]) -> bytes:
    return b"".join(bedrock_event(name, data) for name, data in events)


def bedrock_decode(pieces: Sequence[bytes]) -> Tuple[List[Any], int]:
    """The messages in some pieces, and how many bytes are left over."""
    decoder = pg.EventStreamDecoder()
    out = [message for piece in pieces for message in decoder.feed(piece)]
    return out, decoder.pending


def test_bedrock_known_frames_at_every_split() -> None:
    data = BEDROCK_FRAME_A + BEDROCK_FRAME_B + BEDROCK_FRAME_C
    for pieces in byte_splits(data):
        assert bedrock_decode(pieces) == (BEDROCK_MESSAGES, 0)


def test_bedrock_a_cut_frame_is_pending() -> None:
    for cut in range(1, len(BEDROCK_FRAME_A)):
        assert bedrock_decode([BEDROCK_FRAME_A[:cut]]) == ([], cut)
    assert bedrock_decode([BEDROCK_FRAME_A + BEDROCK_FRAME_B[:20]]) == (BEDROCK_MESSAGES[:1], 20)


@pytest.mark.parametrize("data", [BEDROCK_FRAME_A, BEDROCK_FRAME_B, BEDROCK_FRAME_C], ids="ABC")
def test_bedrock_every_flipped_byte_raises(data: bytes) -> None:
    for place in range(len(data)):
        for mask in (0x01, 0x80, 0xff):
            bad = bytearray(data)
            bad[place] ^= mask
            with pytest.raises(pg.UpstreamProtocolError):
                bedrock_decode([bytes(bad)])


def test_bedrock_what_came_before_a_damaged_frame_is_not_lost() -> None:
    bad = BEDROCK_FRAME_A + BEDROCK_FRAME_A[:-1] + b"\0"
    for pieces in ([bad], [bad[:200], bad[200:]]):
        decoder = pg.EventStreamDecoder()
        out: List[Any] = []
        with pytest.raises(pg.UpstreamProtocolError, match="checksum"):
            for piece in pieces:
                for message in decoder.feed(piece):
                    out.append(message)
        assert out == BEDROCK_MESSAGES[:1]


def bedrock_lengths(total: int, headers: int) -> bytes:
    """The beginning of a message that says these lengths."""
    prelude = struct.pack(">II", total, headers)
    return prelude + struct.pack(">I", binascii.crc32(prelude))


@pytest.mark.parametrize("data", [
    bedrock_lengths(15, 0), bedrock_lengths(16, 1), bedrock_lengths(0xffffffff, 0),
    bedrock_lengths(16 + 129 * 1024, 129 * 1024),
    bedrock_lengths(25 * 1024 * 1024 + 16, 0), bedrock_frame({"a": (10, b"")}, b""),
    bedrock_frame({"a": (7, b"\x00\x09abc")}, b""),
    bedrock_frame({"a": (7, b"\x00\x01\xff")}, b"")], ids=str)
def test_bedrock_impossible_frames_raise(data: bytes) -> None:
    with pytest.raises(pg.UpstreamProtocolError):
        bedrock_decode([data])


def test_bedrock_repeated_header_raises() -> None:
    one = b"\x01a\x00"
    prelude = struct.pack(">II", 16 + 2 * len(one), 2 * len(one))
    data = prelude + struct.pack(">I", binascii.crc32(prelude)) + one + one
    with pytest.raises(pg.UpstreamProtocolError, match="repeated"):
        bedrock_decode([data + struct.pack(">I", binascii.crc32(data))])


def test_bedrock_own_frames_are_what_botocore_reads() -> None:
    eventstream = pytest.importorskip("botocore.eventstream")
    rng = random.Random(7)
    for _ in range(100):
        headers = {f"h{n}": rng.choice([True, False, b"\x00\xff" * rng.randrange(9), "ü" * rng.randrange(30),
                                        (2, b"\xff"), (3, b"\xff\xfe"), (4, b"\x00\x00\x01\x00"), (5, b"\xff" * 8)])
                   for n in range(rng.randrange(6))}
        payload = bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
        data = bedrock_frame(headers, payload)
        buffer = eventstream.EventStreamBuffer()
        buffer.add_data(data)
        [theirs] = list(buffer)
        [[(ours, body)], pending] = bedrock_decode([data])
        assert (ours, body, pending) == (theirs.headers, theirs.payload, 0)


# --- Signature --------------------------------------------------------------------------------------------------------

BEDROCK_VECTOR_BODY = b'{"messages":[{"role":"user","content":[{"text":"hi"}]}],"inferenceConfig":{"maxTokens":16}}'
BEDROCK_ARN = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc123def456"


@pytest.mark.parametrize("model_id, token, signature", [
    (BEDROCK_CLAUDE, "", "612d5ca3bb44c713f10a8fc8690a4e6c0b94dc53d9e8ba1ffeb30622a1d476d2"),
    (BEDROCK_CLAUDE, "FwoGZXIvYXdzEXAMPLETOKEN==", "24a26b08fa1189fa7595df3e8845a0ee42db03624320b8084c755d0ffed35913"),
    (BEDROCK_ARN, "", "d29cd569849a6d5164df4f51dfbae2f515d2bfe0bea453f7b05fbfa34bb27cec"),
], ids=["plain", "session token", "arn"])
def test_bedrock_signature_vectors(model_id: str, token: str, signature: str) -> None:
    call = BEDROCK.build(bedrock_request(stream=True), bedrock_model(model_id), aws_credential())
    assert call.url == ("https://bedrock-runtime.us-east-1.amazonaws.com/model/"
                        + urllib.parse.quote(model_id, safe="-._~") + "/converse-stream")
    call = call._replace(body=BEDROCK_VECTOR_BODY)
    signed = BEDROCK.sign(call, aws_credential(**({"session_token": token} if token else {})), AWS_NOW)
    names = "content-type;host;x-amz-date" + (";x-amz-security-token" if token else "")
    assert signed.headers["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE00000TEST/20260102/us-east-1/bedrock/aws4_request, "
        f"SignedHeaders={names}, Signature={signature}")
    assert signed.headers["x-amz-date"] == "20260102T030405Z"
    assert signed.headers.get("x-amz-security-token", "") == token
    assert "authorization" not in call.headers


def test_bedrock_signing_key_vector() -> None:
    key = pg.signing_key(AWS_KEYS["secret_access_key"], "20260102/us-east-1/bedrock/aws4_request")
    assert key.hex() == "5fe7d00891a75b7029b7875f73e3395713a85cc92df11a0b55a6a2f63078cf17"


@pytest.fixture
def botocore_signature(monkeypatch: Any) -> Callable[[pg.Call, Any, str], str]:
    """The Authorization header that botocore makes for a call at NOW, from its content type alone."""
    auth = pytest.importorskip("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    moment = datetime.datetime.fromtimestamp(AWS_NOW, datetime.timezone.utc).replace(tzinfo=None)
    if hasattr(auth, "get_current_datetime"):
        monkeypatch.setattr(auth, "get_current_datetime", lambda *args, **kwargs: moment)
    else:
        class Frozen(datetime.datetime):
            @classmethod
            def utcnow(cls) -> Any:
                return moment

        monkeypatch.setattr(auth.datetime, "datetime", Frozen)

    def sign(call: pg.Call, keys: Any, region: str) -> str:
        theirs = AWSRequest(call.method, call.url, data=call.body,
                            headers={"content-type": call.headers["content-type"]})
        auth.SigV4Auth(Credentials(keys["access_key_id"], keys["secret_access_key"], keys.get("session_token")),
                       "bedrock", region).add_auth(theirs)
        return str(theirs.headers["Authorization"])

    return sign


def test_bedrock_signatures_equal_botocores(botocore_signature: Any) -> None:
    rng = random.Random(3)
    alphabet = "abcXYZ019-._~:/@ +%é漢=&?;,!*'()$"
    for number in range(200):
        model_id = rng.choice(["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30))), BEDROCK_ARN,
                               BEDROCK_CLAUDE,
                               "arn:aws-us-gov:bedrock:us-gov-west-1:123456789012:provisioned-model/a.b"])
        region = rng.choice(["us-east-1", "eu-west-3", "ap-southeast-2"])
        keys = {"access_key_id": f"AKID{number}", "secret_access_key": "".join(rng.choice(alphabet) for _ in range(40)),
                "region": region, **({"session_token": "tok/+=" + str(number)} if number % 2 else {})}
        credential = pg.Credential("aws", parts=keys, headers={"X-Amz-Nope": "1", "Host": "evil", "x-custom": "é"})
        asked = bedrock_request(user_turn("ä" + "x" * number), stream=bool(number % 3))
        call = BEDROCK.build(asked, bedrock_model(model_id), credential)
        if number % 5 == 0:
            call = pg.bedrock_list_call("inference-profiles", bedrock_model(), credential, "a/b+c=" + str(number))
        signed = BEDROCK.sign(call, credential, AWS_NOW)
        host_region = re.search(r"bedrock(?:-runtime)?\.([^.]+)\.", call.url).group(1)
        assert signed.headers["authorization"] == botocore_signature(call, keys, host_region)
        assert "x-amz-nope" not in signed.headers and "host" not in signed.headers


def test_bedrock_what_is_sent_is_what_was_signed(botocore_signature: Any) -> None:
    with fake_upstream(Answer(body=BEDROCK_TOOL_STREAM, content_type=BEDROCK.stream_type)) as fake:
        credential = aws_credential(session_token="tok", region="eu-west-3")
        model = bedrock_model(BEDROCK_ARN, base_url=fake.url + "/sub/")
        call = BEDROCK.sign(BEDROCK.build(bedrock_request(stream=True), model, credential), credential, AWS_NOW)
        transport = pg.Transport()
        response = transport.open(call, pg.Scope())
        events = provider_events(BEDROCK.reader(model, STAMP), list(response))
        response.close()
        transport.close()
    [(method, path, headers, body)] = fake.received
    received = pg.Call(method, "http://" + headers["host"] + path, headers, body)
    assert headers["authorization"] == botocore_signature(received, credential.parts, "us-east-1")
    assert "%3A" in path and "%253A" not in path
    assert events == BEDROCK_TOOL_EVENTS and BEDROCK.stream_type in response.headers["content-type"]


@pytest.mark.parametrize("credential, expected", [
    (pg.Credential("api_key", "bedrock-token"), {"authorization": "Bearer bedrock-token"}),
    (pg.Credential("aws", parts={"skip_auth": "1"}), {}),
    (pg.Credential("api_key", "bedrock-token", headers={"authorization": "Bearer other"}),
     {"authorization": "Bearer bedrock-token"}),
], ids=["bearer", "skip", "bearer wins"])
def test_bedrock_without_signature(credential: pg.Credential, expected: Dict[str, Any]) -> None:
    call = BEDROCK.build(bedrock_request(), bedrock_model(), credential)
    assert "authorization" not in call.headers
    signed = BEDROCK.sign(call, credential, AWS_NOW)
    assert {name: value for name, value in signed.headers.items() if name.startswith(("auth", "x-amz"))} == expected


BEDROCK_US = "https://bedrock-runtime.us-east-1.amazonaws.com"
BEDROCK_EU = "https://bedrock-runtime.eu-west-1.amazonaws.com"
BEDROCK_VPC = "https://vpce-1.bedrock-runtime.us-west-2.vpce.amazonaws.com/x/"


@pytest.mark.parametrize("model_id, base, parts, host, region", [
    ("a.b", BEDROCK_US, {}, "bedrock-runtime.us-east-1.amazonaws.com", "us-east-1"),
    ("a.b", BEDROCK_US, {"region": "eu-west-3"}, "bedrock-runtime.eu-west-3.amazonaws.com", "eu-west-3"),
    ("a.b", BEDROCK_EU, {}, "bedrock-runtime.eu-west-1.amazonaws.com", "eu-west-1"),
    ("eu.a.b", BEDROCK_US, {}, "bedrock-runtime.eu-central-1.amazonaws.com", "eu-central-1"),
    ("eu.a.b", BEDROCK_EU, {}, "bedrock-runtime.eu-west-1.amazonaws.com", "eu-west-1"),
    ("eu.a.b", BEDROCK_US, {"region": "eu-north-1"}, "bedrock-runtime.eu-north-1.amazonaws.com", "eu-north-1"),
    ("us-gov.a.b", BEDROCK_US, {}, "bedrock-runtime.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
    ("a.b", BEDROCK_US, {"profile_region": "eu-west-3"}, "bedrock-runtime.us-east-1.amazonaws.com", "us-east-1"),
    (BEDROCK_ARN.replace("us-east-1", "sa-east-1"), BEDROCK_US, {"region": "eu-west-3"},
     "bedrock-runtime.sa-east-1.amazonaws.com",
     "sa-east-1"),
    ("a.b", BEDROCK_US, {"region": "cn-north-1"}, "bedrock-runtime.cn-north-1.amazonaws.com.cn", "cn-north-1"),
    ("a.b", "https://bedrock-runtime-fips.us-east-1.amazonaws.com", {"region": "us-west-2"},
     "bedrock-runtime-fips.us-west-2.amazonaws.com", "us-west-2"),
    ("a.b", BEDROCK_VPC, {}, "vpce-1.bedrock-runtime.us-west-2.vpce.amazonaws.com", "us-west-2"),
    ("a.b", BEDROCK_VPC, {"region": "us-east-2"}, "vpce-1.bedrock-runtime.us-west-2.vpce.amazonaws.com", "us-east-2"),
    ("a.b", "http://localhost:8080", {"profile_region": "eu-west-3"}, "localhost:8080", "eu-west-3"),
    (BEDROCK_ARN.replace("us-east-1", "sa-east-1"), "http://localhost:8080", {}, "localhost:8080", "sa-east-1"),
])
def test_bedrock_region_and_host(model_id: str, base: str, parts: Dict[str, Any], host: str, region: str) -> None:
    credential = aws_credential(**parts)
    call = BEDROCK.build(bedrock_request(), bedrock_model(model_id, base_url=base), credential)
    assert urllib.parse.urlsplit(call.url).netloc == host
    assert f"/{region}/bedrock/" in BEDROCK.sign(call, credential, AWS_NOW).headers["authorization"]


# --- Converse bodies --------------------------------------------------------------------------------------------------

BEDROCK_TOOL = pg.Tool("read", "Read a file", {"type": "object", "properties": {"path": {"type": "string"}}})
BEDROCK_CALL = pg.ToolCall("call|1", "read", '{"path":"x","":1,"deep":[{"":2,"a":3}]}')
BEDROCK_ID = pg.fit_id("call|1", 64)


@pytest.mark.parametrize("messages, expected", [
    ([user_turn("hi")], [{"role": "user", "content": [{"text": "hi"}]}]),
    ([assistant_turn("yes"), user_turn("hi"), user_turn("  ")],
     [{"role": "user", "content": [{"text": "…"}]}, {"role": "assistant", "content": [{"text": "yes"}]},
      {"role": "user", "content": [{"text": "hi"}, {"text": "…"}]}]),
    ([user_turn("hi"), assistant_turn(" "), user_turn("ho")],
     [{"role": "user", "content": [{"text": "hi"}, {"text": "ho"}]}]),
    ([user_turn("hi"), assistant_turn(BEDROCK_CALL, pg.replace(BEDROCK_CALL, id="c2", arguments="{cut")),
      tool_turn(pg.ToolResult("call|1", (pg.Text("bad"), pg.Image("image/png", BEDROCK_PNG)), True),
                pg.ToolResult("c2")),
      user_turn("now")],
     [{"role": "user", "content": [{"text": "hi"}]},
      {"role": "assistant", "content": [
          {"toolUse": {"toolUseId": BEDROCK_ID, "name": "read", "input": {"path": "x", "deep": [{"a": 3}]}}},
          {"toolUse": {"toolUseId": "c2", "name": "read", "input": {"malformed_arguments": "{cut"}}}]},
      {"role": "user", "content": [
          {"toolResult": {"toolUseId": BEDROCK_ID, "status": "error", "content": [{"text": "bad"}]}},
          {"toolResult": {"toolUseId": "c2", "content": [{"text": pg.EMPTY_RESULT}]}},
          {"text": pg.MOVED_CAPTION}, {"image": {"format": "png", "source": {"bytes": BEDROCK_PNG}}},
          {"text": "now"}]}]),
    ([user_turn(pg.Document("application/pdf", BEDROCK_PNG, name="My file_1.pdf"),
                pg.Document("text/markdown", BEDROCK_PNG)),
      assistant_turn("ok"),
      user_turn(pg.Document("application/pdf", BEDROCK_PNG, name="My file 1.pdf"), "sum",
                pg.Image("image/jpg", BEDROCK_PNG))],
     [{"role": "user", "content": [
         {"document": {"format": "pdf", "source": {"bytes": BEDROCK_PNG}, "name": "My file 1 pdf"}},
         {"document": {"format": "md", "source": {"bytes": BEDROCK_PNG}, "name": "document"}},
         {"text": pg.DOCUMENT_NOTE}]},
      {"role": "assistant", "content": [{"text": "ok"}]},
      {"role": "user", "content": [
          {"document": {"format": "pdf", "source": {"bytes": BEDROCK_PNG}, "name": "My file 1 pdf-2"}}, {"text": "sum"},
          {"image": {"format": "jpeg", "source": {"bytes": BEDROCK_PNG}}}]}]),
], ids=["plain", "begins with the assistant", "blank", "tools", "media"])
def test_bedrock_converse_messages(messages: List[Any], expected: List[Any]) -> None:
    assert pg.converse_messages(messages, True) == expected


@pytest.mark.parametrize("part", [pg.Image(url="https://x/y.png"), pg.Image("image/bmp", BEDROCK_PNG),
                                  pg.Document("application/zip", BEDROCK_PNG)], ids=str)
def test_bedrock_media_that_cannot_go(part: Any) -> None:
    with pytest.raises(pg.BadRequest) as caught:
        pg.converse_messages([user_turn(part)], True)
    assert caught.value.code == "unsupported_parameter"


BEDROCK_SIGNED, BEDROCK_UNSIGNED = pg.Thinking("t", "sig", False, BEDROCK.name), pg.Thinking("t", None, False,
                                                                                             BEDROCK.name)
BEDROCK_REDACTED_THOUGHT = pg.Thinking("", "cmVk", True, BEDROCK.name)


@pytest.mark.parametrize("part, to_claude, to_other", [
    (BEDROCK_SIGNED, {"reasoningText": {"text": "t", "signature": "sig"}}, {"reasoningText": {"text": "t"}}),
    (BEDROCK_UNSIGNED, None, {"reasoningText": {"text": "t"}}),
    (BEDROCK_REDACTED_THOUGHT, {"redactedContent": "cmVk"}, None),
    (pg.replace(BEDROCK_SIGNED, maker="anthropic-messages"), None, None),
], ids=["signed", "unsigned", "redacted", "foreign"])
def test_bedrock_replayed_thinking(part: pg.Thinking, to_claude: Optional[Dict[str, Any]],
                                   to_other: Optional[Dict[str, Any]]) -> None:
    for model, expected in ((bedrock_model(), to_claude), (bedrock_model("openai.gpt-oss-120b-1:0"), to_other)):
        body = bedrock_built(bedrock_request(user_turn("hi"), assistant_turn(part, "yes"), user_turn("go")), model)[1]
        blocks = body["messages"][1]["content"]
        assert blocks == ([{"reasoningContent": expected}] if expected else []) + [{"text": "yes"}]


BEDROCK_ADAPTIVE = {"type": "adaptive", "display": "summarized"}


@pytest.mark.parametrize("model_id, level, expected", [
    ("us.anthropic.claude-opus-4-6-v1", "high", {"thinking": BEDROCK_ADAPTIVE, "output_config": {"effort": "high"}}),
    ("anthropic.claude-opus-4-8", "xhigh", {
        "thinking": {**BEDROCK_ADAPTIVE, **pg.BINDING}, "output_config": {"effort": "xhigh"},
        "anthropic_beta": ["thinking-binding-controls-2026-08-01"]}),
    ("us-gov.anthropic.claude-sonnet-5", "low", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
    ("anthropic.claude-sonnet-5", "off", {"thinking": {"type": "disabled"}}),
    (BEDROCK_CLAUDE, "medium", {"thinking": {"type": "enabled", "budget_tokens": 8192, "display": "summarized"},
                                "anthropic_beta": ["interleaved-thinking-2025-05-14"]}),
    (BEDROCK_CLAUDE, "off", None),
    ("openai.gpt-oss-120b-1:0", "max", {"reasoning_effort": "high"}),
    ("openai.gpt-oss-20b", "minimal", {"reasoning_effort": "low"}),
    ("global.openai.gpt-6-sol", "xhigh", {"reasoning": {"effort": "xhigh"}}),
    ("openai.gpt-5.4", "minimal", {"reasoning": {"effort": "low"}}),
    ("us.amazon.nova-2-lite-v1:0", "high", {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "high"}}),
    ("us.amazon.nova-2-lite-v1:0", "off", None), ("zai.glm-5", "high", None),
])
def test_bedrock_reasoning_fields(model_id: str, level: str, expected: Optional[Dict[str, Any]]) -> None:
    levels = {"xhigh": "xhigh", "max": "max"} if "8" in model_id[-1:] or "gpt-6" in model_id else {}
    model = bedrock_model(model_id, thinking_levels=levels)
    assert bedrock_built(bedrock_request(reasoning=level), model)[1].get("additionalModelRequestFields") == expected


@pytest.mark.parametrize("name, region, expected", [
    ("Claude Opus 4.6", "us-east-1", BEDROCK_ADAPTIVE), ("Claude Opus 4.6", "us-gov-west-1", {"type": "adaptive"}),
    ("", "us-east-1", None)])
def test_bedrock_family_by_name(name: str, region: str, expected: Optional[Dict[str, Any]]) -> None:
    model = bedrock_model(BEDROCK_ARN.replace("us-east-1", region), name=name)
    body = bedrock_built(bedrock_request(reasoning="high"), model)[1]
    assert body.get("additionalModelRequestFields", {}).get("thinking") == expected
    assert ({"cachePoint": {"type": "default"}} in body["messages"][-1]["content"]) == bool(name)


@pytest.mark.parametrize("model_id, fields, config", [
    (BEDROCK_CLAUDE, {}, {"maxTokens": 64000}),
    (BEDROCK_CLAUDE, {"max_tokens": 100, "temperature": 1.5, "top_p": 0.5, "stop": ("E", "")},
     {"maxTokens": 100, "temperature": 1, "topP": 0.5, "stopSequences": ["E"]}),
    (BEDROCK_CLAUDE, {"max_tokens": 2000, "reasoning": "low", "temperature": 0.2}, {"maxTokens": 4048}),
    ("anthropic.claude-opus-4-8", {"temperature": 0.2}, {"maxTokens": 64000}),
    ("zai.glm-5", {}, None), ("zai.glm-5", {"temperature": 0.2}, {"temperature": 0.2}),
    ("us.amazon.nova-2-lite-v1:0", {"reasoning": "high", "temperature": 0.2, "max_tokens": 9}, None),
    ("us.amazon.nova-2-lite-v1:0", {"reasoning": "low", "temperature": 0.2}, {"temperature": 0.2}),
])
def test_bedrock_inference_config(model_id: str, fields: Dict[str, Any], config: Optional[Dict[str, Any]]) -> None:
    assert bedrock_built(bedrock_request(**fields), bedrock_model(model_id))[1].get("inferenceConfig") == config


BEDROCK_USED = (user_turn("hi"), assistant_turn(BEDROCK_CALL), tool_turn(pg.ToolResult("call|1", (pg.Text("ok"),))))
BEDROCK_SPEC = {"toolSpec": {"name": "read", "description": "Read a file",
                             "inputSchema": {"json": BEDROCK_TOOL.schema}}}


@pytest.mark.parametrize("messages, tools, choice, expected", [
    ((), (), None, None), ((), (BEDROCK_TOOL,), None, {"tools": [BEDROCK_SPEC]}),
    ((), (BEDROCK_TOOL,), pg.ToolChoice("auto"), {"tools": [BEDROCK_SPEC], "toolChoice": {"auto": {}}}),
    ((), (BEDROCK_TOOL,), pg.ToolChoice("required"), {"tools": [BEDROCK_SPEC], "toolChoice": {"any": {}}}),
    ((), (BEDROCK_TOOL,), pg.ToolChoice("tool", "read"),
     {"tools": [BEDROCK_SPEC], "toolChoice": {"tool": {"name": "read"}}}),
    ((), (BEDROCK_TOOL,), pg.ToolChoice("none"), None),
    (BEDROCK_USED, (BEDROCK_TOOL,), pg.ToolChoice("none"), {"tools": [BEDROCK_SPEC]}),
])
def test_bedrock_tool_config(messages: Any, tools: Any, choice: Optional[pg.ToolChoice],
                             expected: Optional[Dict[str, Any]]) -> None:
    assert bedrock_built(bedrock_request(*messages, tools=tools, tool_choice=choice),
                         bedrock_model("zai.glm-5"))[1].get(
                             "toolConfig") == expected


def test_bedrock_tool_history_without_tools_names_them() -> None:
    [tool] = bedrock_built(bedrock_request(*BEDROCK_USED), bedrock_model("zai.glm-5"))[1]["toolConfig"]["tools"]
    assert tool["toolSpec"]["name"] == "read"


def test_bedrock_cache_points_schema_and_headers() -> None:
    output = pg.OutputFormat({"type": "object"}, "out")
    call, body = bedrock_built(bedrock_request(system=(pg.Text("Be brief."),), output=output, stream=True),
                               bedrock_model())
    point = {"cachePoint": {"type": "default"}}
    assert body["system"] == [{"text": "Be brief."}, point]
    assert body["messages"][-1]["content"][-1] == point
    assert body["outputConfig"] == {"textFormat": {"type": "json_schema", "structure": {
        "jsonSchema": {"schema": '{"type":"object"}', "name": "out"}}}}
    assert call.headers["accept"] == BEDROCK.stream_type and call.url.endswith("/converse-stream")
    plain, body = bedrock_built(bedrock_request(system=(pg.Text("Be brief."),)), bedrock_model("zai.glm-5"))
    assert body["system"] == [{"text": "Be brief."}] and plain.url.endswith("/model/zai.glm-5/converse")
    forced = bedrock_built(bedrock_request(), bedrock_model("zai.glm-5"), aws_credential(force_cache="1"))[1]
    assert forced["messages"][-1]["content"][-1] == point


def test_bedrock_system_prompt_alone() -> None:
    body = json.loads(BEDROCK.build(pg.Request("m", (), system=(pg.Text("Be"),)), bedrock_model("x.y"),
                                    aws_credential()).body)
    assert body == {"messages": [{"role": "user", "content": [{"text": "Be"}]}]}


def bedrock_big_request(**fields: Any) -> pg.Request:
    """A request with everything."""
    return bedrock_request(
        user_turn("hi", pg.Image("image/png", BEDROCK_PNG), pg.Document("application/pdf", BEDROCK_PNG)),
        assistant_turn(BEDROCK_SIGNED, "let me", BEDROCK_CALL),
        tool_turn(pg.ToolResult("call|1", (pg.Text("no"), pg.Image("image/webp", BEDROCK_PNG)), True)),
        user_turn("again"),
        assistant_turn(BEDROCK_REDACTED_THOUGHT, pg.ToolCall("x" * 90, "read", "")),
        tool_turn(pg.ToolResult("x" * 90, (pg.Image("image/png", BEDROCK_PNG),))),
        **{"system": (pg.Text("Be brief."),), "tools": (BEDROCK_TOOL, pg.Tool("b", "", strict=True)),
           "max_tokens": 5000,
           "stop": ("E",), "top_p": 0.5, "tool_choice": pg.ToolChoice("auto"),
           "output": pg.OutputFormat({"type": "object"}), **fields})


def bedrock_rehydrate(value: Any) -> Any:
    """The wire's base64 as bytes, as SDK users pass it."""
    if isinstance(value, dict):
        return {key: base64.b64decode(item, validate=True) if key in ("bytes",
                                                                      "redactedContent") else bedrock_rehydrate(item)
                for key, item in value.items()}
    return [bedrock_rehydrate(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("model_id", [
    BEDROCK_CLAUDE, BEDROCK_ARN, "anthropic.claude-opus-4-8", "us-gov.openai.gpt-oss-120b-1:0",
    "us.amazon.nova-2-lite-v1:0"])
@pytest.mark.parametrize("fields", [{}, {"reasoning": pg.Reasoning("high")}, {"tools": ()},
                                    {"tool_choice": pg.ToolChoice("tool", "read")}],
                         ids=lambda given: ",".join(given) if isinstance(given, dict) else given)
def test_bedrock_bodies_fit_botocores_model(model_id: str, fields: Dict[str, Any]) -> None:
    session = pytest.importorskip("botocore.session").get_session()
    from botocore.validate import ParamValidator
    shape = session.get_service_model("bedrock-runtime").operation_model("ConverseStream").input_shape
    body = bedrock_built(bedrock_big_request(**fields), bedrock_model(model_id))[1]
    report = ParamValidator().validate({"modelId": model_id, **bedrock_rehydrate(body)}, shape)
    assert not report.has_errors(), report.generate_report()
    unknown = set(body) - set(shape.members)
    assert not unknown
    for message in body["messages"]:
        for block in message["content"]:
            assert len(block) == 1


# --- Converse answers -------------------------------------------------------------------------------------------------

BEDROCK_USAGE = {"inputTokens": 20, "outputTokens": 9, "totalTokens": 29, "cacheReadInputTokens": 100,
                 "cacheWriteInputTokens": 7,
                 "cacheDetails": [{"ttl": "1h", "inputTokens": 5}, {"ttl": "5m", "inputTokens": 2}]}
# wire reference 5.6, with padding, citations and an unknown event added
BEDROCK_TOOL_STREAM = bedrock_stream(
    ("messageStart", {"role": "assistant", "p": "abc"}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "Need file."}}}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "c2ln"}}}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "LTE="}}}),
    ("contentBlockStop", {"contentBlockIndex": 0}),
    ("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"text": ""}}),
    ("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"text": "Réading"}}),
    ("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"citation": {"title": "x"}}}),
    ("novelty", {}), ("contentBlockStop", {"contentBlockIndex": 1}),
    ("contentBlockStart", {"contentBlockIndex": 2, "start": {"toolUse": {"toolUseId": "tooluse_1", "name": "read"}}}),
    ("contentBlockDelta", {"contentBlockIndex": 2, "delta": {"toolUse": {"input": "{\"path\":"}}}),
    ("contentBlockDelta", {"contentBlockIndex": 2, "delta": {"toolUse": {"input": "\"x\"}"}}}),
    ("contentBlockStop", {"contentBlockIndex": 2}), ("messageStop", {"stopReason": "tool_use"}),
    ("metadata", {"usage": BEDROCK_USAGE, "metrics": {"latencyMs": 321}}))
BEDROCK_TOOL_EVENTS = [
    pg.Start(), pg.PartStart(0, pg.Thinking(maker=BEDROCK.name)), pg.PartDelta(0, "Need file."),
    pg.PartEnd(0, pg.Thinking("Need file.", "c2lnLTE=", False, BEDROCK.name)),
    pg.PartStart(1, pg.Text()), pg.PartDelta(1, "Réading"), pg.PartEnd(1, pg.Text("Réading")),
    pg.PartStart(2, pg.ToolCall("tooluse_1", "read")), pg.PartDelta(2, '{"path":'), pg.PartDelta(2, '"x"}'),
    pg.PartEnd(2, pg.ToolCall("tooluse_1", "read", '{"path":"x"}')),
    pg.Done("tool_use", pg.Usage(20, 9, 100, 7, 0, 5))]
BEDROCK_RAW = b"redacted bytes"
BEDROCK_REDACTED = bedrock_stream(
    ("messageStart", {"role": "assistant"}),
    *(("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {
        "redactedContent": base64.b64encode(piece).decode()}}}) for piece in (BEDROCK_RAW[:5], BEDROCK_RAW[5:])),
    ("contentBlockStop", {"contentBlockIndex": 0}),
    ("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"text": "Hi"}}),
    ("messageStop", {"stopReason": "max_tokens"}), ("metadata", {"usage": {"inputTokens": 1, "outputTokens": 2}}))
BEDROCK_REDACTED_PART = pg.Thinking("", base64.b64encode(BEDROCK_RAW).decode(), True, BEDROCK.name)
BEDROCK_REDACTED_EVENTS = [
    pg.Start(), pg.PartStart(0, BEDROCK_REDACTED_PART), pg.PartEnd(0, BEDROCK_REDACTED_PART),
    pg.PartStart(1, pg.Text()),
    pg.PartDelta(1, "Hi"), pg.PartEnd(1, pg.Text("Hi")), pg.Done("length", pg.Usage(1, 2))]
BEDROCK_SILENT_THINKING = bedrock_stream(               # a signature without text, blocks that nobody stops
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "c2ln"}}}),
    ("messageStop", {"stopReason": "end_turn"}), ("metadata", {"usage": {}}))
BEDROCK_SILENT_EVENTS = [
    pg.Start(), pg.PartStart(0, pg.Thinking(maker=BEDROCK.name)),
    pg.PartEnd(0, pg.Thinking("", "c2ln", False, BEDROCK.name)), pg.Done("stop")]


@pytest.mark.parametrize("wire, expected", [
    (BEDROCK_TOOL_STREAM, BEDROCK_TOOL_EVENTS), (BEDROCK_REDACTED, BEDROCK_REDACTED_EVENTS),
    (BEDROCK_SILENT_THINKING, BEDROCK_SILENT_EVENTS)], ids=["tools", "redacted", "silent"])
def test_bedrock_converse_streams_at_every_split(wire: bytes, expected: List[Any]) -> None:
    for pieces in byte_splits(wire):
        assert provider_events(BEDROCK.reader(bedrock_model(), STAMP), pieces) == expected


def test_bedrock_converse_cuts_fail() -> None:
    last = len(BEDROCK_TOOL_STREAM) - len(bedrock_event("metadata",
                                                        {"usage": BEDROCK_USAGE, "metrics": {"latencyMs": 321}}))
    for cut in range(len(BEDROCK_TOOL_STREAM)):
        end = provider_events(BEDROCK.reader(bedrock_model(), STAMP), [BEDROCK_TOOL_STREAM[:cut]])[-1]
        if cut == last:                         # between messageStop and metadata: whole but for the usage
            assert end == pg.Done("tool_use")
        else:
            assert isinstance(end, pg.Failed) and isinstance(end.error, pg.UpstreamProtocolError)


@pytest.mark.parametrize("wire, error, code", [
    (bedrock_event("throttlingException", {"message": "Too many tokens, please wait before trying again."},
                   "exception"),
     pg.RateLimited, "rate_limit_exceeded"),
    (bedrock_event("ValidationException", {"message": "Input is too long for requested model."}, "exception"),
     pg.ContextOverflow, "context_length_exceeded"),
    (bedrock_event("validationException", {"message": "bad"}, "exception"), pg.BadRequest, "invalid_request"),
    (bedrock_event("modelStreamErrorException", {"message": "m", "originalMessage": "o"}, "exception"),
     pg.UpstreamError, "provider_error"),
    (bedrock_event("internalServerException", {"message": "m"}, "exception"), pg.UpstreamError, "provider_error"),
    (bedrock_event("serviceUnavailableException", {"message": "m"}, "exception"), pg.Overloaded,
     "server_is_overloaded"),
    (bedrock_frame({":message-type": "error", ":error-code": "InternalFailure", ":error-message": "x"}, b""),
     pg.UpstreamError,
     "provider_error"),
    (bedrock_event("messageStop", {"stopReason": "malformed_tool_use"}), pg.UpstreamError, "provider_error"),
    (bedrock_event("contentBlockDelta", {"contentBlockIndex": 4, "delta": {"toolUse": {"input": "{"}}}),
     pg.UpstreamProtocolError, "stream_incomplete"),
    (bedrock_event("messageStop", b"{"), pg.UpstreamProtocolError, "stream_incomplete"),
    (b"<html>" * 9, pg.UpstreamProtocolError, "stream_incomplete"),
    (BEDROCK_FRAME_B, pg.RateLimited, "rate_limit_exceeded"),
], ids=str)
def test_bedrock_converse_stream_errors(wire: bytes, error: Any, code: str) -> None:
    end = provider_events(BEDROCK.reader(bedrock_model(), STAMP), [bedrock_event("messageStart", {}) + wire])[-1]
    assert isinstance(end, pg.Failed) and type(end.error) is error and end.error.code == code


def test_bedrock_converse_whole() -> None:
    body = {"output": {"message": {"role": "assistant", "content": [
        {"reasoningContent": {"reasoningText": {"text": "Need file.", "signature": "c2lnLTE="}}}, {"text": "Réading"},
        {"toolUse": {"toolUseId": "tooluse_1", "name": "read", "input": {"path": "x"}}},
        {"reasoningContent": {"redactedContent": "cmVk"}},
        {"citationsContent": {"content": [{"text": "a"}, {"text": "b"}]}}]}}, "stopReason": "tool_use",
            "usage": BEDROCK_USAGE}
    reply = pg.collect(pg.Settled(BEDROCK.reader(bedrock_model(), STAMP)).whole(body))
    assert reply == pg.Reply("", (
        pg.Thinking("Need file.", "c2lnLTE=", False, BEDROCK.name), pg.Text("Réading"),
        pg.ToolCall("tooluse_1", "read", '{"path":"x"}'), BEDROCK_REDACTED_THOUGHT, pg.Text("ab")), "tool_use",
        pg.Usage(20, 9, 100, 7, 0, 5))
    [end] = pg.Settled(BEDROCK.reader(bedrock_model(), STAMP)).whole({"message": "?"})
    assert isinstance(end.error, pg.UpstreamProtocolError)


@pytest.mark.parametrize("reason, stop", [
    ("end_turn", "stop"), ("stop_sequence", "stop_sequence"), ("max_tokens", "length"), ("content_filtered", "refusal"),
    ("model_context_window_exceeded", "overflow"), ("guardrail_intervened", "refusal"), ("new", "stop")])
def test_bedrock_converse_stop_reasons(reason: str, stop: str) -> None:
    wire = bedrock_stream(("messageStop", {"stopReason": reason}), ("metadata", {"usage": {"outputTokens": 1}}))
    assert provider_events(BEDROCK.reader(bedrock_model(), STAMP), [wire])[-1] == pg.Done(stop, pg.Usage(0, 1))


@pytest.mark.parametrize("status, kind, body, error", [
    (400, "ValidationException:http://internal.amazon.com/x", {"message": "bad"}, pg.BadRequest),
    (400, "ValidationException", {"message": "Input is too long for requested model."}, pg.ContextOverflow),
    (400, "ValidationException", {"message": "Too many tokens, please wait before trying again."}, pg.RateLimited),
    (429, "ThrottlingException", {"message": "Too many tokens, please wait before trying again."}, pg.RateLimited),
    (400, "ServiceQuotaExceededException", {"message": "q"}, pg.QuotaExceeded),
    (400, "ConflictException", {"message": "q"}, pg.Conflict),
    (403, "AccessDeniedException", {"Message": "no"}, pg.Forbidden),
    (403, "UnrecognizedClientException", {"message": "The security token is invalid."}, pg.CredentialRefused),
    (403, "InvalidSignatureException", {"message": "s"}, pg.CredentialRefused),
    (403, "", {"__type": "com.amazon.coral.service#ExpiredTokenException", "message": "s"}, pg.CredentialRefused),
    (404, "ResourceNotFoundException", {"message": "s"}, pg.ModelNotFound),
    (408, "ModelTimeoutException", {"message": "s"}, pg.UpstreamTimeout),
    (424, "ModelErrorException", {"message": "s"}, pg.UpstreamError), (424, "", {}, pg.UpstreamError),
    (429, "ModelNotReadyException", {"message": "s"}, pg.RateLimited),
    (500, "InternalServerException", {"message": "s"}, pg.UpstreamError),
    (503, "ServiceUnavailableException", {"message": "s"}, pg.Overloaded), (403, "", {"message": "s"}, pg.Forbidden),
])
def test_bedrock_http_errors(status: int, kind: str, body: Dict[str, Any], error: Any) -> None:
    headers = {"x-amzn-errortype": kind, "retry-after": "7"} if kind else {}
    found = BEDROCK.parse_error(status, headers, json.dumps(body).encode(), AWS_NOW)
    assert type(found) is error
    assert not body or found.message == (body.get("message") or body.get("Message"))
    if error is pg.RateLimited:
        assert found.retry_after == 7


def test_bedrock_model_lists() -> None:
    provider = pg.Provider("amazon-bedrock", {BEDROCK.name: BEDROCK_US})
    foundation = {"modelSummaries": [
        {"modelId": "a.one", "modelName": "One", "inputModalities": ["TEXT", "IMAGE"],
         "responseStreamingSupported": True, "inferenceTypesSupported": ["ON_DEMAND"]},
        {"modelId": "a.two", "modelName": "Two", "inputModalities": ["TEXT"],
         "inferenceTypesSupported": ["INFERENCE_PROFILE"]},
        {"modelId": "a.three", "responseStreamingSupported": False, "inferenceTypesSupported": ["ON_DEMAND"]}]}
    profiles = {"inferenceProfileSummaries": [
        {"inferenceProfileId": "eu.a.two", "inferenceProfileName": "EU Two", "status": "ACTIVE",
         "models": [{"modelArn": "arn:aws:bedrock:eu-west-1::foundation-model/a.two"}]},
        {"inferenceProfileId": "eu.a.x", "models": [{"modelArn": "arn:aws:bedrock:eu-west-1::foundation-model/a.x"}]}]}
    models = pg.read_bedrock_models(foundation, profiles, provider)
    assert {key: (model.name, model.input, model.protocol) for key, model in models.items()} == {
        "a.one": ("One", ("text", "image"), BEDROCK.name), "eu.a.two": ("EU Two", ("text",), BEDROCK.name)}
    call = pg.bedrock_list_call("foundation-models", bedrock_model(), aws_credential(region="eu-west-1"))
    assert call.method == "GET" and call.url == (
        "https://bedrock.eu-west-1.amazonaws.com/foundation-models?byOutputModality=TEXT")
    assert "/eu-west-1/bedrock/" in BEDROCK.sign(call, aws_credential(region="eu-west-1"),
                                                 AWS_NOW).headers["authorization"]


@CLIENTS
def test_bedrock_answers_render_for_all_clients(client: Any) -> None:
    lane = pg.TranslatedLane(client, BEDROCK, bedrock_request(stream=True), bedrock_model(), STAMP)
    out = lane.feed(BEDROCK_TOOL_STREAM) + lane.end()
    assert lane.finished and lane.error is None and b"ading" in out


# ======================================================================================================================
# §10 AWS credentials
# ======================================================================================================================

class AwsResponse:
    """An answer that is there already."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body
        self.headers: Dict[str, str] = {}

    def read(self, limit: int) -> bytes:
        return self.body

    def close(self) -> None:
        pass


class AwsTransport:
    """Answers by method and URL prefix; `calls` are what was asked."""

    def __init__(self, answers: Any = ()) -> None:
        self.answers: Dict[Tuple[str, str], Any] = dict(answers)
        self.calls: List[pg.Call] = []
        self.entered = threading.Event()
        self.gate: Optional[threading.Event] = None

    def open(self, call: pg.Call, scope: pg.Scope) -> AwsResponse:
        self.calls.append(call)
        self.entered.set()
        if self.gate:
            assert self.gate.wait(10)
        for (method, prefix), answer in self.answers.items():
            if call.method == method and call.url.startswith(prefix):
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                return AwsResponse(status, body if isinstance(body, bytes) else json.dumps(body).encode())
        raise pg.UpstreamError("no connection", code="connection_error")


class AwsRig:
    """A home directory, a clock at NOW, and the two ways out that the credentials are asked for on."""

    def __init__(self, tmp_path: Any, far: Any = (), near: Any = ()) -> None:
        self.home, self.clock = tmp_path, Clock(AWS_NOW)
        self.far, self.near = AwsTransport(far), AwsTransport(near)
        self.credentials = pg.AwsCredentials(self.far, self.near, self.clock)
        (tmp_path / ".aws").mkdir(exist_ok=True)

    def write(self, name: str, text: str) -> str:
        path = self.home / ".aws" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def get(self, environ: Any = (), entry: Any = (), key: Optional[str] = None) -> pg.Credential:
        return self.credentials.get({"HOME": str(self.home), "PATH": os.environ.get("PATH", ""), **dict(environ)},
                                    dict(entry), key)


@pytest.fixture
def aws_rig(tmp_path: Any) -> AwsRig:
    return AwsRig(tmp_path)


AWS_ENV_KEYS = {"AWS_ACCESS_KEY_ID": "AKENV", "AWS_SECRET_ACCESS_KEY": "senv"}
AWS_FILES = """[default]
aws_access_key_id = AKDEF
aws_secret_access_key = s%def
[work]
aws_access_key_id = AKWORK
aws_secret_access_key = swork
aws_session_token = twork
"""
AWS_CONFIG = "[default]\nregion = eu-west-1\n[profile work]\nregion = eu-west-3\ns3 =\n  max = 1\n"


@pytest.mark.parametrize("environ, entry, key, expected", [
    ({}, {}, "stored", ("api_key", "stored", None, "")),
    ({"AWS_BEARER_TOKEN_BEDROCK": "tok", **AWS_ENV_KEYS}, {}, None, ("api_key", "tok", None, "")),
    ({"AWS_BEARER_TOKEN_BEDROCK": "tok"}, {"AWS_BEARER_TOKEN_BEDROCK": "own"}, "<authenticated>",
     ("api_key", "own", None, "")),
    (AWS_ENV_KEYS, {}, None, ("aws", "", "AKENV", "")),
    ({**AWS_ENV_KEYS, "AWS_PROFILE": "work"}, {}, None, ("aws", "", "AKENV", "eu-west-3")),
    (AWS_ENV_KEYS, {"AWS_PROFILE": "work"}, None, ("aws", "", "AKWORK", "eu-west-3")),
    ({"AWS_PROFILE": "work"}, {}, None, ("aws", "", "AKWORK", "eu-west-3")),
    ({"AWS_PROFILE": "work", "AWS_REGION": "us-west-2"}, {}, None, ("aws", "", "AKWORK", "us-west-2")),
    ({"AWS_DEFAULT_REGION": "us-west-1"}, {"AWS_REGION": "us-west-2"}, None, ("aws", "", "AKDEF", "us-west-2")),
    ({}, {}, None, ("aws", "", "AKDEF", "")),
    ({"AWS_ACCESS_KEY_ID": "half"}, {"AWS_SECRET_ACCESS_KEY": "other"}, None, ("aws", "", "AKDEF", "")),
    ({"AWS_BEDROCK_SKIP_AUTH": "1", "AWS_BEARER_TOKEN_BEDROCK": "tok"}, {}, None, ("aws", "", None, "")),
])
def test_aws_credential_order(aws_rig: AwsRig, environ: Dict[str, Any], entry: Dict[str, Any], key: Optional[str],
                              expected: Any) -> None:
    aws_rig.write("credentials", AWS_FILES)
    aws_rig.write("config", AWS_CONFIG)
    found = aws_rig.get(environ, entry, key)
    assert (found.kind, found.token, found.parts.get("access_key_id"), found.parts.get("region", "")) == expected
    assert found.parts.get("skip_auth") == environ.get("AWS_BEDROCK_SKIP_AUTH")
    assert not aws_rig.far.calls and not aws_rig.near.calls
    if expected[2] == "AKDEF":
        assert found.parts["secret_access_key"] == "s%def" and found.parts["profile_region"] == "eu-west-1"
    if expected[2] == "AKWORK":
        assert found.parts["session_token"] == "twork"


@pytest.mark.parametrize("environ, expected", [
    ({}, False), (AWS_ENV_KEYS, True), ({"AWS_ACCESS_KEY_ID": "x"}, False), ({"AWS_PROFILE": "x"}, True),
    ({"AWS_BEARER_TOKEN_BEDROCK": "x"}, True), ({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/x"}, True),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "x"}, True), ({"AWS_WEB_IDENTITY_TOKEN_FILE": "x"}, True)])
def test_aws_is_ambient(environ: Dict[str, Any], expected: bool) -> None:
    assert pg.AwsCredentials.is_ambient(environ) is expected


def aws_iso(seconds: float) -> str:
    """NOW and so many seconds."""
    return datetime.datetime.fromtimestamp(AWS_NOW + seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def aws_sts_answer(name: str, key: str = "ASIASTS", seconds: float = 3600) -> bytes:
    return (f"<{name}Response><{name}Result><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>ssts"
            f"</SecretAccessKey><SessionToken>tsts</SessionToken><Expiration>{aws_iso(seconds)}</Expiration>"
            f"</Credentials></{name}Result></{name}Response>").encode()


AWS_ROLES = """[profile role]
role_arn = arn:aws:iam::1:role/r
source_profile = work
external_id = ext
region = eu-west-1
[profile chain]
role_arn = arn:aws:iam::1:role/c
source_profile = role
[profile own]
role_arn = arn:aws:iam::1:role/o
source_profile = own
aws_access_key_id = AKOWN
aws_secret_access_key = sown
[profile ring]
role_arn = r
source_profile = ring2
[profile ring2]
role_arn = r
source_profile = ring
[profile env]
role_arn = arn:aws:iam::1:role/e
credential_source = Environment
[profile mfa]
role_arn = r
source_profile = work
mfa_serial = m
[profile bare]
region = eu-west-9
"""


@pytest.mark.parametrize("profile, environ, roles, key, host", [
    ("role", {}, ["r"], "AKWORK", "sts.eu-west-1.amazonaws.com"),
    ("chain", {}, ["r", "c"], "AKWORK", "sts.eu-west-1.amazonaws.com"),
    ("own", {}, ["o"], "AKOWN", "sts.us-east-1.amazonaws.com"),
    ("env", AWS_ENV_KEYS, ["e"], "AKENV", "sts.us-east-1.amazonaws.com")])
def test_aws_assumed_roles(aws_rig: AwsRig, profile: str, environ: Dict[str, Any], roles: List[Any], key: str,
                           host: str) -> None:
    aws_rig.far.answers[("POST", "https://sts.")] = aws_sts_answer("AssumeRole")
    aws_rig.write("credentials", AWS_FILES)
    aws_rig.write("config", AWS_ROLES)
    found = aws_rig.get(environ, {"AWS_PROFILE": profile})
    assert found.parts["access_key_id"] == "ASIASTS" and found.parts["session_token"] == "tsts"
    forms = [dict(urllib.parse.parse_qsl(call.body.decode())) for call in aws_rig.far.calls]
    assert [form["RoleArn"].rpartition("/")[2] for form in forms] == roles
    first = aws_rig.far.calls[0]
    assert f"Credential={key}/20260102/" in first.headers["authorization"] and "/sts/aws4_request" in first.headers[
        "authorization"]
    assert urllib.parse.urlsplit(first.url).netloc == host
    if profile == "role":
        assert forms[0]["ExternalId"] == "ext" and forms[0]["DurationSeconds"] == "3600"


@pytest.mark.parametrize("profile, words", [
    ("ring", "form a ring"), ("mfa", "one-time code"), ("nowhere", 'no AWS profile "nowhere"'),
    ("bare", "has no keys")])
def test_aws_profiles_that_cannot_be_used(aws_rig: AwsRig, profile: str, words: str) -> None:
    aws_rig.write("credentials", AWS_FILES)
    aws_rig.write("config", AWS_ROLES)
    with pytest.raises(pg.Unauthorized, match=words) as caught:
        aws_rig.get({"AWS_PROFILE": profile, "AWS_EC2_METADATA_DISABLED": "true"})
    assert caught.value.code == "no_credentials" and str(aws_rig.home) not in caught.value.message


def test_aws_sts_refusal_says_why(aws_rig: AwsRig) -> None:
    aws_rig.far.answers[("POST", "https://sts.")] = (403, b"<Error><Message>not allowed</Message></Error>")
    aws_rig.write("credentials", AWS_FILES)
    aws_rig.write("config", AWS_ROLES)
    with pytest.raises(pg.Unauthorized, match="not allowed"):
        aws_rig.get({"AWS_PROFILE": "role"})


def test_aws_web_identity(aws_rig: AwsRig) -> None:
    aws_rig.far.answers[("POST", "https://sts.eu-west-1.")] = aws_sts_answer("AssumeRoleWithWebIdentity")
    token = aws_rig.write("token", "jwt\n")
    found = aws_rig.get({"AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ROLE_ARN": "arn:r", "AWS_REGION": "eu-west-1"})
    assert found.parts["access_key_id"] == "ASIASTS"
    [call] = aws_rig.far.calls
    assert "authorization" not in call.headers and b"WebIdentityToken=jwt&" in call.body + b"&"


AWS_SSO = ("[profile sso]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n"
           "[sso-session s]\nsso_region = eu-north-1\n")
AWS_SSO_URL = "https://portal.sso.eu-north-1.amazonaws.com/federation/credentials?role_name=r&account_id=1"
AWS_SSO_FILE = "sso/cache/a0f1490a20d0211c997b44bc357e1972deab8ae3.json"


def test_aws_sso(aws_rig: AwsRig) -> None:
    aws_rig.write("config", AWS_SSO)
    aws_rig.write(AWS_SSO_FILE, json.dumps({"accessToken": "sso-token", "expiresAt": aws_iso(100)}))
    aws_rig.far.answers[("GET", AWS_SSO_URL)] = {
        "roleCredentials": {"accessKeyId": "ASIASSO", "secretAccessKey": "s", "sessionToken": "t",
                            "expiration": (AWS_NOW + 3600) * 1000}}
    assert aws_rig.get({"AWS_PROFILE": "sso"}).parts["access_key_id"] == "ASIASSO"
    assert aws_rig.far.calls[0].headers["x-amz-sso_bearer_token"] == "sso-token"


@pytest.mark.parametrize("content", [
    None, {"accessToken": "x", "expiresAt": aws_iso(-1).replace("Z", "UTC")}, {"expiresAt": aws_iso(9)}])
def test_aws_sso_needs_a_log_in(aws_rig: AwsRig, content: Optional[Dict[str, Any]]) -> None:
    aws_rig.write("config", AWS_SSO)
    if content:
        aws_rig.write(AWS_SSO_FILE, json.dumps(content))
    with pytest.raises(pg.Unauthorized, match="aws sso login --profile sso"):
        aws_rig.get({"AWS_PROFILE": "sso"})
    assert not aws_rig.far.calls


@pytest.mark.parametrize("printed, key", [
    ({"Version": 1, "AccessKeyId": "AKP $HOME", "SecretAccessKey": "s", "Expiration": aws_iso(3600)}, "AKP $HOME"),
    ({"Version": 2, "AccessKeyId": "AKP", "SecretAccessKey": "s"}, None), ({"Version": 1}, None), ("?", None)])
def test_aws_credential_process_runs_without_shell(aws_rig: AwsRig, printed: Any, key: Optional[str]) -> None:
    script = aws_rig.write("print.py", f"import json, sys\nprint(json.dumps({printed!r}))\n"
                                   "assert sys.argv[1:] == ['$HOME;x', 'a b']")
    aws_rig.write("config", f"[default]\ncredential_process = {sys.executable} {script} $HOME;x 'a b'\n")
    if key:
        assert aws_rig.get().parts["access_key_id"] == key
    else:
        with pytest.raises(pg.Unauthorized):
            aws_rig.get({"AWS_EC2_METADATA_DISABLED": "true"})


AWS_CONTAINER = {"AccessKeyId": "ASIACON", "SecretAccessKey": "s", "Token": "t", "Expiration": aws_iso(3600)}


@pytest.mark.parametrize("environ, url, header, is_near", [
    ({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/x"}, "http://169.254.170.2/v2/x", None, True),
    ({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "@evil.example/x"}, "http://169.254.170.2/@evil.example/x", None, True),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "auth"},
     "http://169.254.170.23/v1", "auth", True),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://[fd00:ec2::23]/v1"}, "http://[fd00:ec2::23]/v1", None, True),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://localhost:99/v1"}, "http://localhost:99/v1", None, True),
    ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "https://keys.example/v1"}, "https://keys.example/v1", None, False),
])
def test_aws_container(aws_rig: AwsRig, environ: Dict[str, Any], url: str, header: Optional[str],
                       is_near: bool) -> None:
    for transport in (aws_rig.near, aws_rig.far):
        transport.answers[("GET", "http")] = AWS_CONTAINER
    assert aws_rig.get(environ).parts["access_key_id"] == "ASIACON"
    [call] = (aws_rig.near if is_near else aws_rig.far).calls
    assert not (aws_rig.far if is_near else aws_rig.near).calls
    assert call.url == url and call.headers.get("authorization") == header


@pytest.mark.parametrize("environ", [
    {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://evil.example/v1"},
    {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "ftp://127.0.0.1/"},
    {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1.evil.example/"},
    {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/x", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a\nb"}])
def test_aws_container_that_is_refused(aws_rig: AwsRig, environ: Dict[str, Any]) -> None:
    with pytest.raises(pg.Unauthorized):
        aws_rig.get(environ)
    assert not aws_rig.near.calls and not aws_rig.far.calls


def test_aws_container_token_file_and_tries(aws_rig: AwsRig) -> None:
    token = aws_rig.write("token", "file-token\n")
    environ = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/x", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token,
               "AWS_CONTAINER_AUTHORIZATION_TOKEN": "other"}
    with pytest.raises(pg.Unauthorized):
        aws_rig.get(environ)
    assert [call.headers["authorization"] for call in aws_rig.near.calls] == ["file-token"] * 3


def test_aws_container_over_a_real_connection(tmp_path: Any) -> None:
    with fake_upstream(Answer(body=json.dumps(AWS_CONTAINER).encode())) as fake:
        transport = pg.Transport()
        credentials = pg.AwsCredentials(transport, transport, Clock(AWS_NOW))
        found = credentials.get({"HOME": str(tmp_path), "AWS_CONTAINER_CREDENTIALS_FULL_URI": fake.url + "/creds",
                                 "AWS_CONTAINER_AUTHORIZATION_TOKEN": "auth"})
        transport.close()
    assert found.parts["access_key_id"] == "ASIACON"
    [(method, path, headers, _)] = fake.received
    assert (method, path, headers["authorization"]) == ("GET", "/creds", "auth")


AWS_META = "http://169.254.169.254/latest/"
AWS_IMDS: Dict[Tuple[str, str], Any] = {("PUT", AWS_META + "api/token"): b"imds-token",
    ("GET", AWS_META + "meta-data/iam/security-credentials/my-role"): {
        "Code": "Success", "AccessKeyId": "ASIAEC2", "SecretAccessKey": "s", "Token": "t",
        "Expiration": aws_iso(6 * 3600)},
    ("GET", AWS_META + "meta-data/iam/security-credentials/"): b"my-role\n"}


def test_aws_instance_role(aws_rig: AwsRig) -> None:
    aws_rig.near.answers.update(AWS_IMDS)
    assert aws_rig.get().parts["access_key_id"] == "ASIAEC2"
    assert not aws_rig.far.calls and len(aws_rig.near.calls) == 3
    assert aws_rig.near.calls[0].headers == {"x-aws-ec2-metadata-token-ttl-seconds": "21600"}
    assert all(call.headers["x-aws-ec2-metadata-token"] == "imds-token" for call in aws_rig.near.calls[1:])


def test_aws_nothing_at_all(aws_rig: AwsRig) -> None:
    tries: Sequence[Tuple[Dict[str, str], int]] = (({}, 1), ({"AWS_EC2_METADATA_DISABLED": "true"}, 0))
    for environ, calls in tries:
        aws_rig.near.calls.clear()
        for _ in range(2):                      # the second is told from memory
            with pytest.raises(pg.Unauthorized, match="AWS_BEARER_TOKEN_BEDROCK") as caught:
                aws_rig.get(environ)
        assert len(aws_rig.near.calls) == calls and caught.value.code == "no_credentials"
    aws_rig.clock.now += 20
    aws_rig.near.answers.update(AWS_IMDS)
    assert aws_rig.get().parts["access_key_id"] == "ASIAEC2"


def test_aws_renewal_ten_minutes_early(aws_rig: AwsRig) -> None:
    aws_rig.near.answers.update(AWS_IMDS)
    aws_rig.get()
    aws_rig.clock.now += 6 * 3600 - 601
    aws_rig.get()
    assert len(aws_rig.near.calls) == 3
    aws_rig.clock.now += 2
    aws_rig.near.answers.clear()
    assert aws_rig.get().parts["access_key_id"] == "ASIAEC2"     # renewal fails, the old keys have minutes left
    assert len(aws_rig.near.calls) == 4
    aws_rig.get()
    assert len(aws_rig.near.calls) == 4
    aws_rig.clock.now += 700
    with pytest.raises(pg.Unauthorized):
        aws_rig.get()


def test_aws_one_fetch_at_a_time(aws_rig: AwsRig) -> None:
    aws_rig.near.answers.update(AWS_IMDS)
    aws_rig.near.gate = threading.Event()
    found: List[str] = []
    threads = [threading.Thread(target=lambda: found.append(aws_rig.get().parts["access_key_id"])) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert aws_rig.near.entered.wait(10)
    aws_rig.near.gate.set()
    for thread in threads:
        thread.join(10)
    assert found == ["ASIAEC2"] * 20 and len(aws_rig.near.calls) == 3


@pytest.mark.parametrize("text", [
    "no section", "[a\n", "[default]\naws_access_key_id = 1\naws_access_key_id = 2\n", '[profile "a]\n'])
def test_aws_broken_file(aws_rig: AwsRig, text: str) -> None:
    aws_rig.write("config", text)
    with pytest.raises(pg.Unauthorized, match="config cannot be read"):
        aws_rig.get()
    assert aws_rig.get({"AWS_BEARER_TOKEN_BEDROCK": "tok"}).token == "tok"


def test_aws_file_changes_are_seen(aws_rig: AwsRig) -> None:
    aws_rig.write("credentials", AWS_FILES)
    assert aws_rig.get().parts["access_key_id"] == "AKDEF"
    aws_rig.write("credentials", AWS_FILES.replace("AKDEF", "AKNEW"))
    aws_rig.clock.now += 61
    assert aws_rig.get().parts["access_key_id"] == "AKNEW"


@pytest.mark.parametrize("text", ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05UTC", "2026-01-02T04:04:05+01:00",
                                  "2026-01-02T03:04:05.123Z", "2026-01-02T03:04:05", AWS_NOW * 1000])
def test_aws_parse_time(text: Any) -> None:
    assert pg.parse_time(text) == AWS_NOW


# ======================================================================================================================
# §8 Mistral
# ======================================================================================================================

MISTRAL = pg.MistralConversations()


def mistral_model(model_id: str = "mistral-small-latest", **facts: Any) -> pg.Model:
    levels: Dict[str, Optional[str]] = {"off": "none", "minimal": None, "low": None, "medium": None, "high": "high",
                                        "xhigh": None, "max": None}
    facts = {"reasoning": True, "thinking_levels": levels, **facts}
    return pg.Model(model_id, "mistral", MISTRAL.name, facts.pop("base_url", "https://api.mistral.ai"), **facts)


def test_mistral_ids() -> None:
    ids = ["D681PevKs", "call_abc", "call-abc", "callabc", "toolu_1|fc_2", "", "ä",
           "abcdefgh_i", "abcdefghi", "call_abc"]
    found = pg.mistral_ids(ids)
    assert set(found) == set(ids) and len(set(found.values())) == len(found)
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", short) for short in found.values())
    assert found["D681PevKs"] == "D681PevKs" and found["abcdefghi"] == "abcdefghi" != found["abcdefgh_i"]
    assert pg.mistral_ids(["abcdefgh_i"]) == {"abcdefgh_i": "abcdefghi"}
    grown = pg.mistral_ids(ids[:4])
    assert all(found[key] == value for key, value in grown.items())
    many = pg.mistral_ids(f"call_{n}" for n in range(5000))
    assert len(set(many.values())) == 5000
    clash = pg.mistral_ids(["x"])["x"]
    assert len(set(pg.mistral_ids(["x", clash]).values())) == 2


def mistral_body(*messages: pg.Message, model: Optional[pg.Model] = None, **fields: Any) -> Any:
    """What a request becomes."""
    return bedrock_built(bedrock_request(*messages, **fields), model or mistral_model(),
                         pg.Credential("api_key", "key"), MISTRAL)[1]


@pytest.mark.parametrize("messages, expected", [
    ([user_turn("a", "b")], [{"role": "user", "content": "a\nb"}]),
    ([user_turn("a", pg.Image("image/png", BEDROCK_PNG))],
     [{"role": "user", "content": [{"type": "text", "text": "a"},
                                   {"type": "image_url", "image_url": f"data:image/png;base64,{BEDROCK_PNG}"}]}]),
    ([user_turn("a"), assistant_turn("Hel")], [{"role": "user", "content": "a"},
                                               {"role": "assistant", "content": "Hel", "prefix": True}]),
    ([user_turn("a"), assistant_turn(pg.Thinking("x", "s", False, MISTRAL.name),
                                     pg.Thinking("y", None, False, MISTRAL.name), "b",
                                     pg.Thinking("no", "z", False, "anthropic-messages")), user_turn("c")],
     [{"role": "user", "content": "a"},
      {"role": "assistant", "content": [
          {"type": "thinking", "thinking": [{"type": "text", "text": "x\ny"}], "signature": "s"},
          {"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]),
    ([user_turn("a"), assistant_turn(pg.ToolCall("D681PevKs", "read", "")),
      tool_turn(pg.ToolResult("D681PevKs", (pg.Text("bad"), pg.Image("image/png", BEDROCK_PNG)), True)),
      user_turn("b")],
     [{"role": "user", "content": "a"},
      {"role": "assistant", "tool_calls": [{"id": "D681PevKs", "type": "function",
                                            "function": {"name": "read", "arguments": "{}"}}]},
      {"role": "tool", "tool_call_id": "D681PevKs", "name": "read", "content": [
          {"type": "text", "text": "[tool error] bad"},
          {"type": "image_url", "image_url": f"data:image/png;base64,{BEDROCK_PNG}"}]},
      {"role": "assistant", "content": pg.MISTRAL_GAP}, {"role": "user", "content": "b"}]),
    ([user_turn("a"), assistant_turn(pg.ToolCall("D681PevKs", "read", "{}"))],
     [{"role": "user", "content": "a"},
      {"role": "assistant", "tool_calls": [{"id": "D681PevKs", "type": "function",
                                            "function": {"name": "read", "arguments": "{}"}}]},
      {"role": "tool", "tool_call_id": "D681PevKs", "name": "read", "content": "[tool error] No result provided"}]),
], ids=["text", "image", "prefix", "thinking", "tools", "no result"])
def test_mistral_messages(messages: List[Any], expected: List[Any]) -> None:
    assert mistral_body(*messages)["messages"] == expected


def test_mistral_ids_agree_between_call_and_result() -> None:
    body = mistral_body(user_turn("a"), assistant_turn(pg.ToolCall("call_1", "f"), pg.ToolCall("call|1", "g")),
                        tool_turn(
                            pg.ToolResult("call|1"), pg.ToolResult("call_1", (pg.Text("x"),))))
    calls, tools = body["messages"][1]["tool_calls"], body["messages"][2:]
    assert [call["id"] for call in calls] == [tool["tool_call_id"] for tool in tools]
    assert [(tool["name"], tool["content"]) for tool in tools] == [("f", "x"), ("g", "(no tool output)")]


@pytest.mark.parametrize("levels, level, expected", [
    ({"off": "none", "low": None, "medium": None, "high": "high"}, "low", {"reasoning_effort": "high"}),
    ({"off": "none", "high": "high"}, "off", {"reasoning_effort": "none"}),
    ({"off": None, "low": "low"}, "off", {}),
    ({"off": None, "low": "low", "minimal": None}, "minimal", {"reasoning_effort": "low"}),
    ({}, "low", {"prompt_mode": "reasoning"}), ({}, "off", {}),
])
def test_mistral_reasoning(levels: Dict[str, Any], level: str, expected: Dict[str, Any]) -> None:
    body = mistral_body(reasoning=level, model=mistral_model(thinking_levels=levels))
    assert {key: body[key] for key in ("reasoning_effort", "prompt_mode") if key in body} == expected


@pytest.mark.parametrize("base", ["https://api.mistral.ai", "https://api.mistral.ai/v1", "https://api.mistral.ai/"])
def test_mistral_call(base: str) -> None:
    req = bedrock_request(seed=7, temperature=1.9, tools=(BEDROCK_TOOL,), tool_choice=pg.ToolChoice("required"),
                          user="u", top_k=3,
                          parallel_tools=False, stop=("E",), stream=True, verbosity="low", logit_bias={"1": 1},
                          output=pg.OutputFormat({"type": "object"}, "o", True), data={"prompt_cache_key": "s1"},
                          session="s1")
    call, body = bedrock_built(req, mistral_model(base_url=base), pg.Credential("api_key", "key"), MISTRAL)
    assert call.url == "https://api.mistral.ai/v1/chat/completions"
    assert call.headers["authorization"] == "Bearer key" and call.headers["x-affinity"] == "s1"
    del body["messages"], body["tools"]
    assert body == {
        "model": "mistral-small-latest", "random_seed": 7, "temperature": 1.5, "tool_choice": "any", "top_k": 3,
        "parallel_tool_calls": False, "stop": ["E"], "stream": True, "prompt_cache_key": "s1",
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "o", "schema": {"type": "object"}, "strict": True}}}


@pytest.mark.parametrize("fields", [
    {}, {"tool_choice": pg.ToolChoice("tool", "read")}, {"tool_choice": pg.ToolChoice("required")},
    {"reasoning": pg.Reasoning("high")}, {"reasoning": pg.Reasoning("off")}, {"output": pg.OutputFormat()}], ids=str)
def test_bodies_fit_mistrals_own_types(fields: Dict[str, Any]) -> None:
    models = pytest.importorskip("mistralai.client.models")
    thought = pg.Thinking("t", "s", False, MISTRAL.name)
    body = mistral_body(*bedrock_big_request().messages[:-2], assistant_turn(thought, "x", BEDROCK_CALL),
                        **{"system": (pg.Text("s"),), "tools": (BEDROCK_TOOL, pg.Tool("b", strict=True)), "seed": 3,
                           "top_k": 2,
                           "stop": ("a",), "user": "u", **fields})
    typed = models.ChatCompletionStreamRequest.model_validate(body)
    known = {f.alias or name for name, f in models.ChatCompletionStreamRequest.model_fields.items()}
    assert set(body) <= known
    back = json.loads(typed.model_dump_json(by_alias=True))
    assert mistral_same(body, back)


def mistral_same(ours: Any, theirs: Any) -> bool:
    """Whether everything of ours survived (theirs may add defaults)."""
    if isinstance(ours, dict):
        return all(key in theirs and mistral_same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(mistral_same, ours, theirs))
    return ours == theirs


def mistral_chunks(*items: Any) -> bytes:
    texts = (item if isinstance(item, str) else json.dumps(item) for item in items)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def mistral_chunk(delta: Any, reason: Optional[str] = None, **more: Any) -> Dict[str, Any]:
    return {"id": "m1", "object": "chat.completion.chunk", "created": 1767323045, "model": "magistral-medium-latest",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


# wire reference 4.6
MISTRAL_STREAM = mistral_chunks(
    mistral_chunk({"role": "assistant",
                   "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Let me "}]}]}),
    mistral_chunk({"content": [{"type": "thinking",
                                "thinking": [{"type": "text", "text": "sée"}, {"type": "reference"}],
                                "signature": "sg", "closed": True}, {"type": "text", "text": "Well"},
                               {"type": "reference"}]}),
    mistral_chunk({"content": ""}),
    mistral_chunk({"content": "", "tool_calls": [
        {"id": "D681PevKs", "function": {"name": "read", "arguments": "{\"path\": \"x\"}"}, "index": 0},
        {"id": "null", "function": {"name": "ls", "arguments": {"a": 1}}, "index": 1}]}, "tool_calls",
                  usage={"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29,
                         "prompt_token_details": {"cached_tokens": 16}}),
    "[DONE]")
MISTRAL_EVENTS = [
    pg.Start("m1", "magistral-medium-latest"), pg.PartStart(0, pg.Thinking(maker=MISTRAL.name)),
    pg.PartDelta(0, "Let me "), pg.PartDelta(0, "sée"),
    pg.PartEnd(0, pg.Thinking("Let me sée", "sg", False, MISTRAL.name)),
    pg.PartStart(1, pg.Text()), pg.PartDelta(1, "Well"), pg.PartEnd(1, pg.Text("Well")),
    pg.PartStart(2, pg.ToolCall("D681PevKs", "read")), pg.PartDelta(2, '{"path": "x"}'),
    pg.PartStart(3, pg.ToolCall(f"call_{STAMP.id}", "ls")), pg.PartDelta(3, '{"a":1}'),
    pg.PartEnd(2, pg.ToolCall("D681PevKs", "read", '{"path": "x"}')),
    pg.PartEnd(3, pg.ToolCall(f"call_{STAMP.id}", "ls", '{"a":1}')),
    pg.Done("tool_use", pg.Usage(4, 9, 16))]


def test_mistral_stream_at_every_split() -> None:
    for wire in (MISTRAL_STREAM, MISTRAL_STREAM.replace(b"\n", b"\r\n")):
        for pieces in byte_splits(wire):
            assert provider_events(MISTRAL.reader(mistral_model(), STAMP), pieces) == MISTRAL_EVENTS


def test_mistral_cuts_fail() -> None:
    finish = MISTRAL_STREAM.index(b"\n\n", MISTRAL_STREAM.index(b'"total_tokens"'))
    for cut in range(finish):
        end = provider_events(MISTRAL.reader(mistral_model(), STAMP), [MISTRAL_STREAM[:cut]])[-1]
        assert isinstance(end, pg.Failed) and isinstance(end.error, pg.UpstreamProtocolError)


@pytest.mark.parametrize("usage, expected", [
    ({"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 16}}, pg.Usage(4, 9, 16)),
    ({"prompt_tokens": 20, "completion_tokens": 9, "num_cached_tokens": 99}, pg.Usage(0, 9, 20)),
    ({"prompt_tokens": 20, "completion_tokens": 9, "prompt_tokens_details": None, "num_cached_tokens": 5},
     pg.Usage(15, 9, 5)),
    ({"prompt_tokens": 20, "completion_tokens": 9}, pg.Usage(20, 9)),
])
def test_mistral_usage(usage: Dict[str, Any], expected: pg.Usage) -> None:
    wire = mistral_chunks(mistral_chunk({"content": "x"}, "model_length", usage=usage), "[DONE]")
    assert provider_events(MISTRAL.reader(mistral_model(), STAMP), [wire])[-1] == pg.Done("length", expected)


def test_mistral_whole() -> None:
    content = [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "Hi"}]
    message = {"role": "assistant", "content": content, "tool_calls": None}
    body = {"id": "m2", "model": "m", "object": "chat.completion", "usage": {"prompt_tokens": 2},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    reply = pg.collect(pg.Settled(MISTRAL.reader(mistral_model(), STAMP)).whole(body))
    assert reply == pg.Reply("m2", (pg.Thinking("t", None, False, MISTRAL.name), pg.Text("Hi")), "stop", pg.Usage(2))


@pytest.mark.parametrize("wire, error", [
    (mistral_chunks(mistral_chunk({"content": "x"}), "[DONE]"), pg.UpstreamProtocolError),
    (mistral_chunks(mistral_chunk({"content": "x"}, "error")), pg.UpstreamError), (b"", pg.UpstreamProtocolError),
    (mistral_chunks({"object": "error", "message": "slow", "type": "rate_limit_error"}), pg.RateLimited)], ids=str)
def test_mistral_stream_failures(wire: bytes, error: Any) -> None:
    end = provider_events(MISTRAL.reader(mistral_model(), STAMP), [wire])[-1]
    assert isinstance(end, pg.Failed) and type(end.error) is error


@pytest.mark.parametrize("status, body, error, message", [
    (400, {"object": "error", "message": "Tool call id was X", "type": "invalid_function_call", "code": "3280"},
     pg.BadRequest, "Tool call id was X"),
    (422, {"object": "error", "message": {"detail": [{"type": "x", "loc": ["body", "seed"], "msg": "Extra inputs"}]}},
     pg.BadRequest, "body.seed: Extra inputs"),
    (422, {"detail": [{"loc": ["body", 0], "msg": "a", "type": "b"}, {"type": "c"}]}, pg.BadRequest, "body.0: a; c"),
    (401, {"message": "Unauthorized"}, pg.CredentialRefused, "Unauthorized"), (401, {"detail": "Unauthorized"},
                                                                               pg.CredentialRefused, "Unauthorized"),
    (400, {"message": "Prompt contains 9 tokens, too large for model with 8 maximum context length"},
     pg.ContextOverflow, None),
    (429, {"message": "Requests rate limit exceeded"}, pg.RateLimited, None), (500, b"<html>", pg.UpstreamError, None),
])
def test_mistral_errors(status: int, body: Any, error: Any, message: Optional[str]) -> None:
    found = MISTRAL.parse_error(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode(), AWS_NOW)
    assert type(found) is error and found.message == (message or found.message)


# ======================================================================================================================
# Hostile clients and providers
# ======================================================================================================================

HOSTILE_KEY = "upstream/Key+9f8e7d"         # of no known shape


@pytest.fixture(scope="session")
def hostile_standing(tmp_path_factory: Any) -> Iterator[Tuple[pg.ServerHandle, FakeUpstream]]:
    """Like `standing`, with that key for both providers."""
    home = tmp_path_factory.mktemp("hostile")
    with fake_upstream(Answer()) as fake:
        models = two_providers(fake.url)
        for row in models["providers"].values():
            row["apiKey"] = HOSTILE_KEY
        write_agent_files(home, models=models)
        with running(home) as handle:
            yield handle, fake


@pytest.fixture
def hostile(hostile_standing: Tuple[pg.ServerHandle, FakeUpstream]) -> Given:
    """Gives that provider its answers."""
    def given(*answers: Any) -> Tuple[pg.ServerHandle, FakeUpstream]:
        handle, fake = hostile_standing
        fake.answers[:] = answers
        fake.received.clear()
        return handle, fake

    return given


def hostile_error(row: str, **fields: Any) -> Dict[str, Any]:
    """An error body of that provider, with these fields in its error."""
    error = {"type": "invalid_request_error", "message": "No.", **fields}
    return {"error": error, **({"type": "error"} if row == "anth" else {})}


def hostile_escaped(data: Any) -> bytes:
    """JSON whose strings hide a key behind escapes."""
    return json.dumps(data).replace("/", "\\/").replace("+", "\\u002b").encode()


def hostile_stream(row: str, data: Any, is_escaped: bool, is_first: bool) -> Answer:
    """A stream with that error in it."""
    text = hostile_escaped(data) if is_escaped else json.dumps(data).encode()
    event = (b"event: error\n" if row == "anth" else b"") + b"data: " + text + b"\n\n"
    start = STREAMS[row][:STREAMS[row].index(b"\n\n", STREAMS[row].index(b"Hel")) + 2]
    return Answer(200, [event] if is_first else [start, event], "text/event-stream")


# where the key stands: (whether the client streams, what the provider answers)
HOSTILE_PLACES: Dict[str, Tuple[bool, Callable[[str], Answer]]] = {
    "code": (False, lambda row: Answer(400, json.dumps(hostile_error(row, code=HOSTILE_KEY)).encode())),
    "type": (False, lambda row: Answer(400, json.dumps(hostile_error(row, type=HOSTILE_KEY)).encode())),
    "param": (False, lambda row: Answer(400, json.dumps(hostile_error(row, param=HOSTILE_KEY)).encode())),
    "request id": (False, lambda row: Answer(400, json.dumps(
        {**hostile_error(row), "request_id": HOSTILE_KEY}).encode())),
    "escaped": (False, lambda row: Answer(400, hostile_escaped(hostile_error(row, message=f"Bad {HOSTILE_KEY}")))),
    "escaped in a 200": (False, lambda row: Answer(200, hostile_escaped(hostile_error(row, message=HOSTILE_KEY)))),
    "behind a BOM": (False, lambda row: Answer(400, b"\xef\xbb\xbf" + hostile_escaped(
        hostile_error(row, message=f"Bad {HOSTILE_KEY}")))),
    "in UTF-16": (False, lambda row: Answer(400, json.dumps(
        hostile_error(row, message=HOSTILE_KEY)).encode("utf-16-le"))),
    "no JSON": (False, lambda row: Answer(500, f"Bad key {HOSTILE_KEY}".encode(), "text/plain")),
    "content type": (False, lambda row: Answer(400, json.dumps(hostile_error(row)).encode(),
                                               f"application/json; k={HOSTILE_KEY}")),
    "header": (False, lambda row: whole_answer(row)._replace(headers={"x-ratelimit-owner": f"org {HOSTILE_KEY}"})),
    "header of a stream": (True, lambda row: stream_answer(row)._replace(headers={"x-ratelimit-owner": HOSTILE_KEY})),
    "header of a refusal": (False, lambda row: Answer(429, json.dumps(hostile_error(row)).encode(),
                                                      headers={"x-ratelimit-owner": HOSTILE_KEY,
                                                               "retry-after": HOSTILE_KEY})),
    "across the cut of a message": (False, lambda row: Answer(400, json.dumps(
        hostile_error(row, message="x" * (pg.MAX_MESSAGE_CHARS - 10) + HOSTILE_KEY)).encode())),
    "across the cut of a text": (False, lambda row: Answer(400, (
        "x" * (pg.MAX_MESSAGE_CHARS - 10) + HOSTILE_KEY).encode(), "text/plain")),
    "across the cut of a body": (False, lambda row: Answer(400, b" " * (pg.MAX_ERROR_BYTES - 10) + HOSTILE_KEY.encode(),
                                                           "text/plain")),
    **{f"{field} of the {'first' if is_first else 'later'} event, {'escaped' if is_escaped else 'plain'}": (
        True, lambda row, field=field, first=is_first, escaped=is_escaped: hostile_stream(      # type: ignore[misc]
            row, hostile_error(row, **{field: f"Bad {HOSTILE_KEY}"}), escaped, first))
       for field in ("message", "code", "type") for is_first in (True, False) for is_escaped in (True, False)}}


HOSTILE_CASES = [(client, row, place) for client, row in WAYS for place in HOSTILE_PLACES]


def test_keys_that_json_escapes_are_found_too() -> None:
    key = 'quote"Key+9f8e7d'
    assert "9f8e7d" not in pg.redact_body(json.dumps({"error": {"message": "Bad " + key}}).encode(), [key]).decode()


@pytest.mark.parametrize("client, row, place", HOSTILE_CASES)
def test_no_answer_shows_a_key_of_unknown_shape(hostile: Given, lines: LogLines, client: str, row: str,
                                                place: str) -> None:
    is_stream, answer = HOSTILE_PLACES[place]
    handle, fake = hostile(answer(row))
    result = call(handle.url, WAY_IN[client], question(row, is_stream))
    lines.access()
    assert HOSTILE_KEY in json.dumps(fake.received[0].headers)
    shown = result.body.decode("utf-8", "replace") + json.dumps(result.headers)
    for old, new in (("\0", ""), ("\\/", "/"), ("\\u002b", "+")):
        shown = shown.replace(old, new)
    logged = "".join(pg.JsonFormatter().format(record) for record in lines.records)
    assert HOSTILE_KEY[:9] not in shown and HOSTILE_KEY[-9:] not in shown
    assert HOSTILE_KEY not in logged.replace("\\/", "/")
    if not is_stream and not place.startswith("header"):
        assert result.status >= 400 and isinstance(result.json["error"]["message"], str)


@pytest.mark.parametrize("row", ["chat", "anth"])
@pytest.mark.parametrize("client", ["chat", "messages"])
def test_stop_reason_in_the_log(hostile: Given, lines: LogLines, client: str, row: str) -> None:
    reason = HOSTILE_KEY + "y" * 5000
    stop = b'"end_turn"' if row == "anth" else b'"stop"'
    handle, _ = hostile(Answer(200, [STREAMS[row].replace(stop, json.dumps(reason).encode())], "text/event-stream"))
    assert call(handle.url, WAY_IN[client], question(row, True)).status == 200
    fields = lines.access()
    assert len(fields["stop"]) <= 64 and HOSTILE_KEY not in json.dumps(fields)


@pytest.mark.parametrize("value", ["\x01\x02 5", "caf\xe9", "\x7f\x80\xff", "a\tb\x1b[31mred", "x" * 5000], ids=ascii)
@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("client, row", WAYS)
def test_carried_headers_are_printable(script: Given, client: str, row: str, status: int, value: str) -> None:
    answer = whole_answer(row) if status == 200 else Answer(status, json.dumps(hostile_error(row)).encode())
    names = ["retry-after", "x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit"]
    handle, _ = script(answer._replace(headers={name: value for name in names}))
    with RawClient(handle.url) as raw:
        result = raw.ask("POST", WAY_IN[client], json.dumps(question(row)).encode())
        assert result.status == status and names[1] in result.headers
        for held in result.headers.values():
            assert len(held) <= 1000 and re.fullmatch(r"[\x20-\x7e]*", held)


@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_provider_sends_many_headers(script: Given, client: str, row: str, stream: bool) -> None:
    answer = stream_answer(row) if stream else whole_answer(row)
    handle, _ = script(answer._replace(headers={f"x-ratelimit-{number}": "1" for number in range(190)}))
    result = call(handle.url, WAY_IN[client], question(row, stream))    # http.client takes a hundred headers
    assert result.status == 200 and answer_text(result) == "Hello"
    assert sum(name.startswith("x-ratelimit-") for name in result.headers) == pg.MAX_CARRIED == 40


def comments_only() -> Iterator[Any]:
    """A stream that never ends and never says anything."""
    while True:
        yield 0.005
        yield b": still here\n\n"


@pytest.mark.parametrize("client, row", WAYS)
def test_heartbeat_beside_comments(tmp_path: Any, client: str, row: str) -> None:
    with serving(tmp_path, lambda request: Answer(200, comments_only(), "text/event-stream"),
                 heartbeat_interval_ms=30) as (handle, fake):
        opened = OpenCall(handle.url, WAY_IN[client], question(row, True))
        for _ in range(3):
            opened.read_until(HEARTBEATS[client])
            opened.seen = b""
        opened.close()
        assert fake.client_gone.wait(5)


def test_heartbeat_while_a_call_is_held(tmp_path: Any) -> None:
    """A weak model may take minutes to write the arguments that the client is given at their end."""
    pieces: List[Any] = [sse([call_delta(0, "c", "wx", '{"a": "')])]
    for _ in range(20):
        pieces += [0.01, sse([call_delta(0, None, None, "x")])]
    pieces.append(sse([call_delta(0, None, None, '"}'), chunk({}, "tool_calls")], end="[DONE]"))
    with serving(tmp_path, Answer(200, pieces, "text/event-stream"), heartbeat_interval_ms=30) as (handle, _):
        result = call(handle.url, WAY_IN["messages"], question("chat", True))
    assert result.body.count(HEARTBEATS["messages"]) >= 2
    assert check_messages_stream(result.body).calls == (("c", "wx", '{"a": "' + "x" * 20 + '"}'),)


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="an end behind unread bytes shows on Linux only")
@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_client_that_speaks_and_leaves(tmp_path: Any, lines: LogLines, client: str, row: str, stream: bool) -> None:
    begun = threading.Event()

    def pieces() -> Iterator[Any]:
        begun.set()
        yield from drip(row)

    with serving(tmp_path, lambda request: Answer(200, pieces(), "text/event-stream")) as (handle, fake):
        opened = OpenCall(handle.url, WAY_IN[client], question(row, stream))
        if stream:
            opened.read_until(b"Hel")
        assert begun.wait(5)
        opened.sock.sendall(b"P")                   # as if of its next request
        assert not fake.client_gone.wait(0.03)
        opened.close()
        assert fake.client_gone.wait(5) and lines.access()["status"] == 499
        until(lambda: handle.gateway.open_requests == 0)


def test_client_that_speaks_is_answered_twice(tmp_path: Any) -> None:
    def answer(request: Received) -> Answer:
        return Answer(200, [CHAT_STREAM[:40], 0.03, CHAT_STREAM[40:80], 0.03, CHAT_STREAM[80:]], "text/event-stream")

    with serving(tmp_path, answer) as (handle, _), RawClient(handle.url) as raw:
        body = json.dumps(question("chat", True)).encode()
        wire = f"POST {WAY_IN['chat']} HTTP/1.1\r\nHost: {raw.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        raw.send(wire + body + wire[:1])
        assert answer_text(raw.answer() or Result(0, {}, b"")) == "Hello"
        raw.send(wire[1:] + body)
        assert answer_text(raw.answer() or Result(0, {}, b"")) == "Hello"


# --- Without end ------------------------------------------------------------------------------------------------------


def endless(row: str, what: str) -> Iterator[bytes]:
    """A stream that never ends."""
    events = [event + b"\n\n" for event in STREAMS[row].split(b"\n\n")]
    place = next(place for place, event in enumerate(events) if b"Hel" in event)
    if what == "text" and place:
        yield b"".join(events[:place])
    while True:
        yield {"text": events[place] * 20, "comments": b": still here\n\n" * 100,
               "one event": b"data: " + b"x" * 2000, "one line": b"x" * 2000}[what]


@pytest.mark.parametrize("what", ["text", "comments", "one event", "one line"])
@pytest.mark.parametrize("client, row", WAYS)
def test_endless_stream_for_a_whole_answer(hostile: Given, monkeypatch: Any, client: str, row: str, what: str) -> None:
    monkeypatch.setattr(pg, "MAX_EVENT_BYTES", 50_000)
    handle, fake = hostile(lambda request: Answer(200, endless(row, what), "text/event-stream"))
    fake.client_gone.clear()
    assert call(handle.url, WAY_IN[client], question(row)).status == 502
    assert fake.client_gone.wait(5)


@pytest.mark.parametrize("client, row", [("chat", "anth"), ("messages", "chat")])
def test_endless_translated_part(hostile: Given, monkeypatch: Any, client: str, row: str) -> None:
    monkeypatch.setattr(pg, "MAX_EVENT_BYTES", 20_000)
    handle, _ = hostile(lambda request: Answer(200, endless(row, "text"), "text/event-stream"))
    assert "longer than" in stream_failure(client, call(handle.url, WAY_IN[client], question(row, True)))["message"]


def gzipped(body: bytes) -> bytes:
    """A gzip member."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(body) + packer.flush()


def test_gzip_bomb() -> None:
    with fake_upstream(Answer(200, gzipped(bytes(32 << 20)), headers={"Content-Encoding": "gzip"})) as fake:
        with transport() as made, pytest.raises(pg.UpstreamProtocolError, match="beyond reason"):
            fetch(made, fake.url)


@pytest.mark.parametrize("rest", [[b"x" * 50_000] * 100, [gzipped(b"more")], [gzipped(bytes(32 << 20))]],
                         ids=["junk", "member", "bomb"])
def test_bytes_after_the_gzip_end(rest: List[bytes]) -> None:
    packed = gzipped(CHAT_STREAM)
    for body in ([packed, *rest], [packed[:5], packed[5:-1], packed[-1:] + rest[0], *rest[1:]]):
        with fake_upstream(Answer(200, body, headers={"Content-Encoding": "gzip"})) as fake, transport() as made:
            assert fetch(made, fake.url) == (200, CHAT_STREAM)


# --- What was quadratic: these took minutes ---------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("-eyJaaaaaaaaa" * 200_000, pg.REDACTED), ("eyJ" * 500_000, pg.REDACTED), ("eyJaaaaaaaa." * 200_000, None),
    ("sk-" * 500_000, pg.REDACTED), ("bearer " * 200_000, None), ("?key=" * 200_000, None), ("AIza" * 300_000, None)],
    ids=["-eyJ", "eyJ", "eyJ.", "sk-", "bearer", "key", "AIza"])
def test_redact_long_text(text: str, expected: Optional[str]) -> None:
    shown = pg.redact(text)
    assert len(shown) <= 2 * len(text) and (expected is None or len(shown) <= len(expected) + 3)


@pytest.mark.parametrize("text, expected", [
    ("```\n" + " " * 2_000_000 + "x", None), ("```json\n{\"a\": 1}" + "\n" * 2_000_000 + "```", {"a": 1}),
    (" " * 2_000_000 + "x", None), ("```" * 700_000, None), ("```" + " " * 2_000_000 + "\n{}```", {}),
    ("```" + "a" * 2_000_000, None), ("{\"a\":" * 200_000, None), ("\n" * 1_000_000 + "{}" + "\n" * 1_000_000, {}),
    ("{}" + " \n" * 1_000_000 + "x", {}), ("{}x" + '"' * 1_000_000 + " " * 1_000_000, {}),
    ('{"a": "' + "\\q" * 700_000, None)],
    ids=["blanks", "fence and blanks", "no fence", "fences", "fence and its blanks", "name", "nested", "blank lines",
         "blanks behind", "quotes behind", "escapes"])
def test_repair_long_arguments(text: str, expected: Any) -> None:
    assert pg.repair_json_object(text) == expected


@pytest.mark.parametrize("fields", [
    {"metadata": {str(number): {"model": "p/m1"} for number in range(5000)}, "model": "p/m1"},
    {"model": "p/m1", "metadata": {str(number): {"model": "p/m1"} for number in range(5000)}},
    {"system": '"model": "' + "\\" * 4_000_000, "model": "p/m1"},
    {"metadata": {"model": "x" * 8_000_000}, "model": "p/m1"}, {"model": "x" * 8_000_000}],
    ids=["nested before", "nested after", "backslashes", "long nested", "long"])
def test_splice_model_into_a_hostile_body(fields: Dict[str, Any]) -> None:
    data = {"max_tokens": 5, **fields}
    body = pg.splice_model(json.dumps(data).encode(), data, "claude-x")
    assert json.loads(body) == {**data, "model": "claude-x"}


def test_splice_model_into_broken_strings() -> None:
    body = b'{"model":"p/m1","x":"' + b'\\"model\\":\\"' * 500_000 + b'"}'
    assert json.loads(pg.splice_model(body, json.loads(body), "y"))["model"] == "y"


def test_many_tool_results_are_one_turn() -> None:
    calls_made = [{**CALL, "id": f"c{number}"} for number in range(20_000)]
    answers = [{"role": "tool", "tool_call_id": made["id"], "content": "x"} for made in calls_made]
    request = chat_request(messages=[{"role": "user", "content": "x"},
                                     {"role": "assistant", "content": None, "tool_calls": calls_made}, *answers])
    assert [turn.role for turn in request.messages] == ["user", "assistant", "tool"]
    assert [part.call_id for part in request.messages[2].parts] == [made["id"] for made in calls_made]


# --- Requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["chat", "messages"])
@pytest.mark.parametrize("row", ["chat", "anth"])
def test_long_model_names(script: Given, client: str, row: str) -> None:
    handle, fake = script(whole_answer(row))
    for name in (f"{row}/" + "x" * 1001, f"{row}/" + "é" * 100_000, "x" * 1_000_000, f"{row}/" + "x/" * 600):
        result = call(handle.url, WAY_IN[client], {**question(row), "model": name})
        assert result.status == 404 and len(result.body) < 5000 and not fake.received
    assert call(handle.url, WAY_IN[client], {**question(row), "model": f"{row}/" + "x" * 1000}).status == 200
    assert fake.received[0].json["model"] == "x" * 1000


@pytest.mark.parametrize("client, row", WAYS)
@pytest.mark.parametrize("field", ["unknown", "schema", "content"])
def test_bodies_nested_below_the_limit(script: Given, client: str, row: str, field: str) -> None:
    handle, _ = script(whole_answer(row))
    body = question(row)
    if field == "unknown":
        body["metadata"] = "HERE"
    elif field == "content":
        body["messages"][0]["content"] = "HERE"
    else:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"properties": "HERE"}}}
                         if client == "chat" else
                         {"name": "f", "input_schema": {"type": "object", "properties": "HERE"}}]
    seen = set()
    for depth in [*range(100, 1100, 45), *range(960, 1000, 3), 3000, 10_000, 100_000]:
        data = json.dumps(body).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth).encode()
        result = call(handle.url, WAY_IN[client], data)
        seen.add(result.status)
        assert result.status in (200, 400) and (result.status == 200 or result.json["error"]["message"]), depth
    assert 400 in seen


# --- Files ------------------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("name, status", [("models", 2), ("gateway", 2), ("pigateway", 2), ("auth", 0)])
def test_pipes_where_files_belong(tmp_path: Any, name: str, status: int) -> None:
    folder = write_agent_files(tmp_path, **{"models": two_providers("http://127.0.0.1:9")} if name != "models" else {})
    os.mkfifo(os.path.join(folder, f"{name}.json"))
    ended, out, err = run_program(tmp_path, "models")       # the time limit of which ends what hangs
    assert ended == status and "Traceback" not in err
    assert "chat/m1" in out if name == "auth" else f"{name}.json: not a regular file" in err.lower()


@POSIX
@pytest.mark.parametrize("content", ["1" * 5000, "1" * 4000 + "\n", "9" * 11, "-" * 5000, " " * 5000 + "1", None],
                         ids=["5000 digits", "4000 digits", "11 digits", "dashes", "blanks", "pipe"])
def test_odd_pid_files(tmp_path: Any, monkeypatch: Any, content: Optional[str]) -> None:
    monkeypatch.setattr(pg, "time", HURRIED)
    path = str(tmp_path / "g.pid")
    if content is None:
        os.mkfifo(path)
    else:
        with open(path, "w", encoding="ascii") as file:
            file.write(content)
    lock = pg.PidFile(path)
    assert lock.owner() is None
    lock.claim()
    assert lock.owner() == os.getpid()
    lock.release()
    assert not os.path.exists(path)


@pytest.mark.parametrize("field", ["contextWindow", "maxTokens"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" * 5000], ids=lambda text: text[:6])
def test_numbers_beyond_reason_in_the_models_file(tmp_path: Any, capsys: Any, monkeypatch: Any, field: str,
                                                  number: str) -> None:
    text = json.dumps(two_providers("http://127.0.0.1:9", **{field: "HERE"})).replace('"HERE"', number)
    write_agent_files(tmp_path, models=text)
    assert "models.json" in config_error(capsys, monkeypatch, tmp_path, "models")


@pytest.mark.parametrize("key", ["clé-0123456789", "key\u2028", "键键键键键键", "a\x7fb", "tab\there", "line\nbreak"], ids=ascii)
@pytest.mark.parametrize("where", ["file", "variable"])
def test_keys_that_no_header_can_hold(tmp_path: Any, capsys: Any, monkeypatch: Any, key: str, where: str) -> None:
    write_agent_files(tmp_path, **{"gateway": {"apiKey": key}} if where == "file" else {})
    environ = {"PI_GATEWAY_API_KEY": key} if where == "variable" else {}
    message = config_error(capsys, monkeypatch, tmp_path, "models", **environ)
    assert "apiKey" in message and key not in message


MS_OPTIONS = [option for option in pg.OPTIONS if option.key.endswith("Ms")]


def test_every_period_has_limits() -> None:
    assert {option.key for option in MS_OPTIONS} == {
        "forceAbortTimeoutMs", "heartbeatIntervalMs", "demoDelayMs", "bodyTimeoutMs", "connectTimeoutMs",
        "firstByteTimeoutMs", "idleTimeoutMs"}
    assert all(option.low is not None and option.high is not None for option in MS_OPTIONS)


@pytest.mark.parametrize("option", MS_OPTIONS, ids=lambda option: option.key)
def test_periods_beyond_reason(tmp_path: Any, capsys: Any, monkeypatch: Any, option: pg.Option) -> None:
    for value in (option.low - 1, option.high + 1, 10 ** 400, -10 ** 400, 0.5):     # type: ignore[operator]
        write_agent_files(tmp_path, pigateway={option.key: value})
        message = config_error(capsys, monkeypatch, tmp_path, "models")
        assert option.key in message and "pigateway.json" in message and len(message) < 400
    for text in ("1e999", "NaN", "1" * 5000):
        write_agent_files(tmp_path, pigateway='{"%s": %s}' % (option.key, text))
        assert "pigateway.json" in config_error(capsys, monkeypatch, tmp_path, "models")
    for value in (option.low, option.high):
        write_agent_files(tmp_path, pigateway={option.key: value})
        assert getattr(load(tmp_path), option.attribute) == value


@pytest.mark.parametrize("argv, words", [
    (["--prot", "4000"], "unknown flag --prot; the nearest is --port"), (["--json"], "--json goes with the commands status, models"),
    (["--secret=sk-abcdefghijklmnop1234"], "unknown flag --secret")])
def test_slips_on_the_command_line(argv: List[str], words: str, capsys: Any) -> None:
    assert pg.main(argv) == 2
    shown = capsys.readouterr().err
    assert words in shown and "abcdefghijklmnop" not in shown


def test_slips_in_models_json_are_named() -> None:
    read = pg.read_models_file({"providers": {"work": {"baseUrl": "http://127.0.0.1:9/v1", "apikey": "x", "pi-only": 1}}})
    assert read.problems == ['providers.work: unknown key "apikey"; did you mean "apiKey"?'] and "work" in read.providers


def test_what_an_address_lacks_is_named(tmp_path: Any) -> None:
    with running(tmp_path, {"CLOUDFLARE_API_KEY": "sk-cloudflare-key"}) as handle:
        result = call(handle.url, "/v1/chat/completions",
                      {"model": "cloudflare-workers-ai/m", "messages": [{"role": "user", "content": "Hi"}]})
    assert result.status == 401 and "needs CLOUDFLARE_ACCOUNT_ID as well" in result.json["error"]["message"]


# ======================================================================================================================
# README
# ======================================================================================================================


def readme_rows(name: str) -> List[List[str]]:
    """The cells of the README table between the comments of that name, without its two head lines."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        table = file.read().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().split("\n")[2:]]


def test_readme_has_every_provider() -> None:
    assert readme_rows("providers") == [
        [provider.name, ", ".join(provider.endpoints), ", ".join(provider.env)]
        for provider in pg.PROVIDERS.values()]


def test_readme_has_every_option() -> None:
    defaults = pg.Config()

    def default(option: pg.Option) -> str:
        value = getattr(defaults, option.attribute)
        return json.dumps(list(value) if isinstance(value, tuple) else value)

    assert readme_rows("options") == [[option.key, option.kind, default(option), option.env, option.flag]
                                      for option in pg.OPTIONS]


def test_readme_and_help_name_every_flag() -> None:
    shown = pg.build_parser().format_help()
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        readme = file.read()
    lines = [line.split("  ")[1].strip() for line in shown.split("\n") if line.startswith("  --")]
    missing = [line for line in lines for flag in line.split(", ") if f"`{flag}`" not in readme]
    assert missing == [] and [option.flag for option in pg.OPTIONS if option.flag not in shown] == []


# ======================================================================================================================
# Contract
# ======================================================================================================================
#
# Everything the gateway says fits its description in schemas/. Requests are checked too: the good ones fit theirs.

SCHEMAS = os.path.join(HERE, "schemas")
OPENAI_SPEC = os.path.join(HERE, "..", "shared", "reference", "specs", "openai.openapi.json")


def schema_errors(name: str, value: Any, definition: str = "") -> List[str]:
    """Where `value` leaves the schema in schemas/`name`.json, or a definition in it."""
    jsonschema = importlib.import_module("jsonschema")
    with open(os.path.join(SCHEMAS, name + ".json"), encoding="utf-8") as file:
        schema = json.load(file)
    if definition:
        schema = {"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]}
    return told_errors(jsonschema.Draft202012Validator(schema), value)


def told_errors(validator: Any, value: Any) -> List[str]:
    """The errors of a validator, and those inside its alternatives."""
    def told(error: Any) -> str:
        inner = "; ".join(told(one) for one in error.context)
        return f"{error.json_path}: {error.message[:300]}" + (f" ({inner})" if inner else "")
    return [told(error) for error in validator.iter_errors(value)]


def nullable(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, still used in OpenAI's 3.1 document, in words that JSON Schema knows."""
    if isinstance(node, list):
        return [nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {name: nullable(value) for name, value in node.items() if name != "nullable"}
    return {"anyOf": [changed, {"type": "null"}]} if node.get("nullable") is True else changed


def fit(name: str, value: Any, definition: str = "") -> None:
    """Fails unless `value` fits."""
    errors = schema_errors(name, value, definition)
    assert not errors, f"{name}: {errors}\n{json.dumps(value)[:2000]}"


def fit_answer(answer: Result, body: Dict[str, Any], is_messages: bool, spec: Sequence[Any]) -> None:
    """A good answer fits its schema; a stream does to its last event, and ends as its protocol says."""
    assert answer.status == 200, answer
    if not body.get("stream"):
        fit("anthropic-message" if is_messages else "openai-chat-completion", answer.json)
        assert is_messages or not spec or not told_errors(spec[0], answer.json)
        return
    events = answer.events
    if is_messages:
        assert events[-1] == {"type": "message_stop"}
    else:
        assert events.pop() == "[DONE]"
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    for event in events:
        fit("anthropic-event" if is_messages else "openai-chat-chunk", event)
        assert is_messages or not spec or not told_errors(spec[1], event)


@pytest.fixture(scope="module")
def openai_spec() -> Sequence[Any]:
    """Validators of a completion and of a chunk from OpenAI's own document. It is somebody else's and not in this
    repository, so it is used where it stands beside the checkout, and its absence skips nothing: schemas/ says the same
    in the project's words."""
    jsonschema = importlib.import_module("jsonschema")
    if not os.path.exists(OPENAI_SPEC):
        return ()
    with open(OPENAI_SPEC, encoding="utf-8") as file:
        components = nullable(json.load(file)["components"])
    return [jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})
            for name in ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse")]


def contract_requests(is_messages: bool) -> Dict[str, Dict[str, Any]]:
    """Requests of one client protocol, by what they are about."""
    sdk: Any = AnthropicSdk if is_messages else OpenAISdk
    call_ids = ["toolu_A1", "toolu_B2"] if is_messages else ["call_A1", "call_B2"]
    history = ({"role": "assistant", "content": message_blocks(INTERLEAVED_CALLS)} if is_messages else
               chat_body(INTERLEAVED_CALLS, {"model": "m1"})["choices"][0]["message"])
    turn = Turn("", "", [], call_ids, "", (0, 0), history)
    tools = sdk.tools("wx", "now")
    shape = ({"output_config": {"format": {"type": "json_schema", "schema": CITY}}} if is_messages else
             {"response_format": {"type": "json_schema",
                                  "json_schema": {"name": "place", "schema": CITY, "strict": True}}})
    results = [history, *sdk.results(turn, "rain", [{"type": "text", "text": "noon"}])]
    stop = {"stop_sequences": ["END"]} if is_messages else {"stop": "END", "seed": 7, "user": "u"}
    return {
        "plain": sdk.request(), "parameters": sdk.request(temperature=0.5, top_p=0.9, **stop),
        "tools": sdk.request(tools=tools), "results": {**sdk.request(tools=tools), "messages": [
            *sdk.request()["messages"], *results]},
        "forced tool": sdk.request(tools=tools, tool_choice={"type": "tool", "name": "wx"} if is_messages else
                                   {"type": "function", "function": {"name": "wx"}}),
        "thinking": sdk.request(**sdk.thinking()), "shape": sdk.request(**shape),
        "image": {**sdk.request(), "messages": [
            {"role": "user", "content": [{"type": "text", "text": "?"}, sdk.image()]}]}}


CLIENT_FORMS = pytest.mark.parametrize("is_messages", [False, True], ids=["openai", "anthropic"])
SCRIPTS = {"text": PLAIN, "one call": ONE_CALL, "two calls": INTERLEAVED_CALLS, "thinking": THINKS, "length": CUT_SHORT,
           "thinking and call": THINKS_AND_CALLS, "no arguments": NO_ARGUMENTS, "json": AS_JSON}
DEMO_MODEL = pg.DEMO_MODEL.full_id
PATHS = {False: "/v1/chat/completions", True: "/v1/messages"}


@needs("jsonschema")
@pytest.mark.parametrize("name", sorted(file[:-5] for file in os.listdir(SCHEMAS) if file.endswith(".json")))
def test_schemas_are_schemas(name: str) -> None:
    jsonschema = importlib.import_module("jsonschema")
    with open(os.path.join(SCHEMAS, name + ".json"), encoding="utf-8") as file:
        schema = json.load(file)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == name + ".json"
    assert not jsonschema.Draft202012Validator(schema).is_valid({"surprise": 1})


@needs("jsonschema")
@CLIENT_FORMS
@pytest.mark.parametrize("model", ["chat/m1", "anth/m1", DEMO_MODEL])
def test_contract_of_good_answers(tmp_path: Any, is_messages: bool, model: str, openai_spec: Sequence[Any]) -> None:
    """Every kind of request, and every kind of answer, in both forms."""
    cases = [(PLAIN, request) for request in contract_requests(is_messages).values()]
    asks_for_tools = contract_requests(is_messages)["tools"]
    cases += [(script, asks_for_tools) for script in SCRIPTS.values() if model != DEMO_MODEL]
    answers = [saying(script) for script, _ in cases for _ in range(3)]
    with served(tmp_path, *answers, demo=True) as (url, _):
        for _, request in cases:
            for extra in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
                body = {"model": model, **request, **extra}
                if is_messages:
                    body.pop("stream_options", None)
                fit("anthropic-messages-request" if is_messages else "openai-chat-request", body)
                fit_answer(call(url, PATHS[is_messages], body), body, is_messages, openai_spec)


@needs("jsonschema")
@CLIENT_FORMS
@each_provider
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 413, 422, 429, 500, 503, 529])
def test_contract_of_refusals(tmp_path: Any, is_messages: bool, provider: str, status: int) -> None:
    with served(tmp_path, refusing(status, "no, said the provider")) as (url, _):
        for stream in (False, True):
            body = {"model": f"{provider}/m1", "stream": stream, **contract_requests(is_messages)["plain"]}
            answer = call(url, PATHS[is_messages], body)
            assert answer.status >= 400 and "no, said the provider" in answer.json["error"]["message"]
            fit("anthropic-error" if is_messages else "openai-error", answer.json)


@needs("jsonschema")
@CLIENT_FORMS
@each_provider
@pytest.mark.parametrize("message", ["", "it broke"], ids=["cut", "error event"])
@pytest.mark.parametrize("script", [PLAIN, INTERLEAVED_CALLS, THINKS], ids=["text", "calls", "thinking"])
def test_contract_of_broken_streams(tmp_path: Any, is_messages: bool, provider: str, message: str, script: Script,
                                    ) -> None:
    with served(tmp_path, breaking(script, message)) as (url, _):
        answer = call(url, PATHS[is_messages], {"model": f"{provider}/m1", "stream": True,
                                                **contract_requests(is_messages)["tools"]})
    assert answer.status == 200 and message in answer.events[-1]["error"]["message"]
    for event in answer.events[:-1]:
        fit("anthropic-event" if is_messages else "openai-chat-chunk", event)
    fit("anthropic-event" if is_messages else "openai-error", answer.events[-1])


@needs("jsonschema")
@CLIENT_FORMS
def test_contract_of_own_errors(tmp_path: Any, is_messages: bool) -> None:
    plain = contract_requests(is_messages)["plain"]
    headers = {"anthropic_version": "2023-06-01"} if is_messages else {}
    path, folder = PATHS[is_messages], "/v1/messages" if is_messages else "/v1"
    bearer = {"authorization": "Bearer gateway-key-of-32-characters-xx", **headers}
    with served(tmp_path, saying(PLAIN), api_key="gateway-key-of-32-characters-xx", require_key_on_loopback=True,
                max_body_bytes=2000) as (url, fake):
        answers = [
            (400, call(url, path, b"{not json", **bearer)), (400, call(url, path, {"model": "chat/m1"}, **bearer)),
            (400, call(url, path, {**plain, "model": "chat/m1", "messages": [{"role": "user", "content": 7}]},
                       **bearer)),
            (400, call(url, path, {**plain, "model": 7}, **bearer)), (400, call(url, path, b"[]", **bearer)),
            (401, call(url, path, {**plain, "model": "chat/m1"}, **headers)),
            (401, call(url, "/v1/models", None, **headers, authorization="Bearer wrong")),
            (403, call(url, path, {**plain, "model": "chat/m1"}, **bearer, host="evil.example")),
            (404, call(url, path, {**plain, "model": "none-such"}, **bearer)),
            (404, call(url, folder + "/none/such", None, **bearer)),
            (404, call(url, "/v1/models/none-such", None, **bearer)),
            (405, call(url, path, None, **bearer)),
            (413, call(url, path, {**plain, "model": "chat/m1", "x": "x" * 3000}, **bearer))]
    for status, answer in answers:
        assert answer.status == status
        fit("anthropic-error" if is_messages else "openai-error", answer.json)
    assert fake.received == []


@needs("jsonschema")
def test_contract_of_lists_counts_and_health(tmp_path: Any) -> None:
    version = {"anthropic_version": "2023-06-01"}
    with fake_upstream(saying(PLAIN)) as fake:
        write_agent_files(tmp_path, models=two_providers(fake.url, contextWindow=9000, maxTokens=900, name="The One"))
        with running(tmp_path, demo=True) as handle:
            url = handle.url
            for query in ("", "?limit=1", "?limit=1&after_id=anth/m1", f"?before_id={DEMO_MODEL}"):
                page = call(url, "/v1/models" + query, **version)
                assert page.status == 200
                fit("anthropic-model-list", page.json)
            models = call(url, "/v1/models").json
            fit("openai-model-list", models)
            assert {"anth/m1", "chat/m1", DEMO_MODEL} <= {model["id"] for model in models["data"]}
            for model in models["data"]:
                fit("openai-model", call(url, "/v1/models/" + model["id"]).json)
                fit("anthropic-model", call(url, "/v1/models/" + model["id"], **version).json)
            for model in ("anth/m1", "chat/m1", DEMO_MODEL):
                for name, body in contract_requests(True).items():
                    body = {field: value for field, value in body.items()
                            if field in ("messages", "tools", "tool_choice", "thinking", "output_config")}
                    fit("anthropic-count-tokens-request", {"model": model, **body})
                    fit("anthropic-count-tokens", call(url, "/v1/messages/count_tokens", {"model": model, **body}).json)
            fit("gateway-health", call(url, "/healthz").json, "healthz")
            fit("gateway-health", call(url, "/health").json, "health")
            fit("gateway-root", call(url, "/").json)


# ======================================================================================================================
# Real model
# ======================================================================================================================
#
# Always at temperature 0: the same answer every time, whatever the model thinks up otherwise.


@pytest.fixture
def real_model(tmp_path: Any) -> Iterator[pg.ServerHandle]:
    """A gateway in front of a llama.cpp server, which is given three times: in both provider protocols, and as an
    address alone, whose models the gateway has to find out."""
    base = program("PIGATEWAY_REAL_MODEL").rstrip("/")
    facts = [{"id": "small", "contextWindow": 8192}]
    write_agent_files(tmp_path, models={"providers": {
        "chat": {"baseUrl": f"{base}/v1", "api": "openai-completions", "apiKey": "none", "models": facts},
        "anth": {"baseUrl": base, "api": "anthropic-messages", "apiKey": "none", "models": facts},
        "home": {"baseUrl": f"{base}/v1"}}})
    with running(tmp_path) as handle:
        yield handle


@each_sdk
@each_provider
@pytest.mark.parametrize("mode", ["whole", "raw", "helper"])
def test_real_model_python(real_model: pg.ServerHandle, client: str, provider: str, mode: str) -> None:
    sdk = SDKS[client](real_model.url)
    most = 600 if mode == "helper" else 24      # OpenAI's helper raises when the limit ends an answer
    turn = sdk.turn(mode, model=f"{provider}/small", max_tokens=most, extra_body={"temperature": 0},
                    messages=[{"role": "user", "content": "Say hello to Rome."}])
    assert turn.text.strip() and turn.stop in sdk.stops.values()
    assert sdk.lanes == [lane_of(client, provider)]
    read, written = turn.tokens
    assert read > 0 and 0 < written <= most


def test_real_model_node(real_model: pg.ServerHandle, tmp_path: Any) -> None:
    rows = node_answers(tmp_path, real_model.url, ["chat/small", "anth/small"], max_tokens=24)
    assert len(rows) == 8
    for row in rows:
        assert row.get("text", "").strip(), row
        read, written, total = row["tokens"]
        assert read > 0 and 0 < written <= 24 and total == read + written, row
        assert row["lane"] == lane_of(row["client"], row["model"].partition("/")[0]), row


def test_real_model_is_discovered(real_model: pg.ServerHandle) -> None:
    deadline, names = time.monotonic() + 20, []
    while not names and time.monotonic() < deadline:
        listed = [model["id"] for model in call(real_model.url, "/v1/models").json["data"]]
        names = [name for name in listed if name.startswith("home/")]
        time.sleep(0 if names else 0.05)
    assert len(names) == 1
    for is_messages in (False, True):
        answer = call(real_model.url, PATHS[is_messages], {
            "model": names[0], "max_tokens": 24, "temperature": 0,
            "messages": [{"role": "user", "content": "Say hello to Rome."}]})
        assert answer.status == 200
        assert answer.headers["x-pigateway-lane"] == ("translated" if is_messages else "native")
        said = answer.json["content"][0]["text"] if is_messages else answer.json["choices"][0]["message"]["content"]
        assert said.strip()


@pytest.mark.parametrize("stream", [True, False])
def test_real_model_goes_on_with_a_text(real_model: pg.ServerHandle, stream: bool) -> None:
    body = {"prompt": "The capital of Italy is", "max_tokens": 8, "temperature": 0, "stream": stream}
    answers = {name: call(real_model.url, "/v1/completions", {"model": name, **body})
               for name in ("chat/small", "anth/small")}
    assert {name: answer.headers["x-pigateway-lane"] for name, answer in answers.items()} == {
        "chat/small": "native", "anth/small": "translated"}
    assert all(text_of(answer).strip() for answer in answers.values())
    direct = call(program("PIGATEWAY_REAL_MODEL"), "/v1/completions", {"model": "small", **body},
                  content_type="application/json")
    assert text_of(answers["chat/small"]) == text_of(direct)


# ======================================================================================================================
# Other Pythons
# ======================================================================================================================


def run_alone(python: str, folder: Any) -> float:
    """Serves the demo model from a copy of the one file; the seconds it took to answer /health."""
    started = time.monotonic()
    gateway = subprocess.Popen([python, "-I", "-S", "pigateway.py", "--port", "0"], cwd=str(folder), encoding="utf-8",
                               env=client_environ(HOME=str(folder), USERPROFILE=str(folder)), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        line = next(line for line in gateway.stdout or () if "http://127.0.0.1:" in line)
        url = re.findall(r"http://127\.0\.0\.1:\d+", line)[0]
        assert call(url, "/health").json == {"ok": True}
        took = time.monotonic() - started
        answer = call(url, "/v1/chat/completions", {"model": DEMO_MODEL, **OpenAISdk.request()})
        assert answer.json["choices"][0]["message"]["content"] == "Hi"
        return took
    finally:
        gateway.terminate()
        gateway.communicate(timeout=20)


def test_other_pythons_run_the_file_alone(tmp_path: Any) -> None:
    for number, python in enumerate(program("PIGATEWAY_PYTHONS").split(os.pathsep)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(MODULE, str(folder))
        told = output_of([python, "-I", "-S", "pigateway.py", "--version"], cwd=str(folder), env=client_environ())
        assert pg.VERSION in told, python
        # the machine may be busy with something else for a moment, but not three times
        assert any(run_alone(python, folder) < 2.0 for _ in range(3)), python


# ======================================================================================================================
# The grid: every client protocol against every provider protocol, at the providers' own host names
# ======================================================================================================================
#
# The gateway runs as shipped. HTTPS_PROXY leads it to a CONNECT proxy of this file, which ends TLS itself and hands the
# requests to fakes by host name. A fake refuses what the real service would refuse, and answers in its wire format.


class GridFacts(NamedTuple):
    """What a provider answers, whatever its protocol: calls are (name, arguments)."""

    text: str = ""
    thinking: str = ""
    calls: Tuple[Tuple[str, str], ...] = ()
    stop: str = "stop"


class GridTurn(NamedTuple):
    """A turn of a conversation, whatever the client: calls are (id, name, arguments), results (id, text, has image)."""

    role: str
    text: str = ""
    image: bool = False
    calls: Tuple[Tuple[str, str, str], ...] = ()
    results: Tuple[Tuple[str, str, bool], ...] = ()
    thinking: str = ""          # a signature that comes with it


class GridCase(NamedTuple):
    """What a client asks for; `results` is what it says of each call that comes back."""

    turns: Tuple[GridTurn, ...] = ()
    system: str = ""
    tools: bool = False
    thinks: bool = False
    output: str = ""            # schema or object
    stop: Tuple[str, ...] = ()
    shows: bool = False         # its tools give pictures back


GRID_SYSTEM = "You answer in one line \u2014 always."
GRID_UNICODE = ("\u6f22\u5b57 \U0001f469\u200d\U0001f4bb caf\u0065\u0301 \u05e9\u05dc\u05d5\u05dd \u2028 end "
                "\u0085 \"\\ \t.")
GRID_THOUGHT = "Two roads; \"Rome\" first."
GRID_RESULT = "18 degrees"
GRID_ROME, GRID_OSLO = '{"city": "Rome", "days": [1, 2]}', '{"city": "Oslo \u2744"}'
GRID_FINAL = GridFacts("It is 18 degrees there.")
GRID_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
               "additionalProperties": False}
GRID_TOOLS = {name: {"type": "object", "properties": {"city": {"type": "string"}, "days": {
    "type": "array", "items": {"type": "integer"}}}, "required": ["city"]} for name in ("weather", "map_of")}
GRID_USAGE = {"prompt": 110, "cached": 80, "written": 10, "output": 30, "reasoning": 12}

GRID_FACTS: Dict[str, GridFacts] = {
    "text": GridFacts("Hello from the other side."), "system": GridFacts("One line."),
    "multi-turn": GridFacts("Your name is Ada."), "image": GridFacts("A single pixel."),
    "tool loop": GridFacts("Let me look.", calls=(("weather", GRID_ROME),), stop="tool_use"), "tool loop/2": GRID_FINAL,
    "parallel tools": GridFacts(calls=(("weather", GRID_ROME), ("map_of", GRID_OSLO), ("weather", GRID_OSLO)),
                                stop="tool_use"), "parallel tools/2": GRID_FINAL,
    "image in result": GridFacts(calls=(("map_of", GRID_ROME),), stop="tool_use"), "image in result/2": GRID_FINAL,
    "thinking": GridFacts("I will look.", GRID_THOUGHT, (("weather", GRID_ROME), ("map_of", GRID_OSLO)), "tool_use"),
    "thinking/2": GridFacts("Warm.", GRID_THOUGHT), "thought": GridFacts("Still warm."),
    "structured output": GridFacts('{"city": "Rome"}'), "json mode": GridFacts('{"any": "object"}'),
    "stop": GridFacts("One, two,", stop="stop_sequence"), "length": GridFacts("This is cut by the", stop="length"),
    "refusal": GridFacts("I cannot help with that.", stop="refusal"), "usage": GridFacts("Counted."),
    "unicode": GridFacts(GRID_UNICODE + " Once more: " + GRID_UNICODE),
    "error": GridFacts(), "error in stream": GridFacts("This breaks off here"),
    "cut": GridFacts("This breaks off here"), "early end": GridFacts("This breaks off here"),
    "model switch": GRID_FINAL, "words after results": GRID_FINAL,
    "long": GridFacts("All accepted."),
}


def grid_ask(scenario: str, *before: GridTurn, image: bool = False) -> Tuple[GridTurn, ...]:
    """A conversation whose last turn names the scenario."""
    return (*before, GridTurn("user", f"Please. scenario: {scenario}.", image))


# Calls that another model made, and what came of them.
GRID_OTHERS = (
    GridTurn("assistant", "Both.", calls=(("call_one-fc", "weather", GRID_ROME), ("2", "map_of", GRID_OSLO))),
    GridTurn("tool", results=(("call_one-fc", GRID_RESULT, False), ("2", GRID_RESULT, False))))

GRID_CASES: Dict[str, GridCase] = {
    "text": GridCase(grid_ask("text")),
    "system": GridCase(grid_ask("system"), system=GRID_SYSTEM),
    "multi-turn": GridCase(grid_ask("multi-turn", GridTurn("user", "I am Ada."), GridTurn("assistant", "Hello Ada."),
                                    GridTurn("user", "And you?"), GridTurn("assistant", "A model."))),
    "tool loop": GridCase(grid_ask("tool loop"), system=GRID_SYSTEM, tools=True),
    "parallel tools": GridCase(grid_ask("parallel tools"), tools=True),
    "image": GridCase(grid_ask("image", image=True)),
    "image in result": GridCase(grid_ask("image in result"), tools=True, shows=True),
    "thinking": GridCase(grid_ask("thinking"), tools=True, thinks=True),
    "structured output": GridCase(grid_ask("structured output"), output="schema"),
    "json mode": GridCase(grid_ask("json mode"), output="object"),
    "stop": GridCase(grid_ask("stop"), stop=("three",)),
    "length": GridCase(grid_ask("length")), "refusal": GridCase(grid_ask("refusal")),
    "usage": GridCase(grid_ask("usage")),
    "unicode": GridCase(grid_ask("unicode", GridTurn("user", GRID_UNICODE), GridTurn("assistant", GRID_UNICODE))),
    "error": GridCase(grid_ask("error")), "error in stream": GridCase(grid_ask("error in stream")),
    "cut": GridCase(grid_ask("cut")), "early end": GridCase(grid_ask("early end")),
    "model switch": GridCase((*grid_ask("model switch"), *GRID_OTHERS), tools=True),
    "words after results": GridCase(grid_ask("words after results", GridTurn("user", "Look."), *GRID_OTHERS),
                                    tools=True),
}
# What a provider protocol cannot do and says so: (scenario, protocol) → the field that is named.
DOCUMENTED_400 = {("json mode", "anthropic-messages"): "response_format",
                  ("json mode", "bedrock-converse-stream"): "response_format"}
# What it cannot do and leaves out, named in x-pigateway-dropped.
GRID_DROPPED = {("stop", name) for name in ("openai-responses", "azure-openai-responses", "openai-codex-responses")}


class GridFault(Exception):
    """A request that the real service would refuse, and why."""


def demand(holds: Any, what: str) -> None:
    if not holds:
        raise GridFault(what)


def demand_fields(value: Any, allowed: str, where: str) -> None:
    """Refuses what is no object, or has a field that the service does not know."""
    demand(isinstance(value, dict), f"{where}: not an object")
    strange = set(value) - set(allowed.split())
    demand(not strange, f"{where}: unknown fields {sorted(strange)}")


def demand_text(value: Any, where: str, is_blank_fine: bool = True) -> str:
    demand(isinstance(value, str) and (value if is_blank_fine else value.strip()), f"{where}: empty text")
    return str(value)


def demand_picture(data: Any, where: str) -> Tuple[str, str]:
    """Refuses what is not the one picture that the tests send."""
    try:
        is_whole = base64.b64decode(str(data).encode(), validate=True) == PICTURE
    except ValueError:
        is_whole = False
    demand(is_whole, f"{where}: damaged image")
    return "image", where


def demand_picture_url(url: Any, where: str) -> Tuple[str, str]:
    demand(isinstance(url, str) and url.startswith("data:image/png;base64,"), f"{where}: not a data URL")
    return demand_picture(url.partition(",")[2], where)


def json_object(text: Any, where: str) -> Dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        value = None
    demand(isinstance(value, dict), f"{where}: arguments are not the JSON text of an object")
    return dict(value)


class GridSeen:
    """A request as its fake understood it. `log` has what was said in order: (user | assistant | system, text),
    (call, id, name, arguments), (result, id, text), (image, where), (thought, signature)."""

    def __init__(self) -> None:
        self.log: List[Tuple[Any, ...]] = []
        self.schema: Any = None             # True for free-form JSON
        self.thinks = False
        self.stop: Tuple[str, ...] = ()
        self.tools: List[str] = []
        self.limit: Optional[int] = None

    def all(self, kind: str) -> List[Any]:
        """What was said of one kind: texts, or the pieces of calls and results without their ids."""
        found = [entry[1:] for entry in self.log if entry[0] == kind]
        return [entry[1:] if kind in ("call", "result") else entry[0] for entry in found]

    def check(self, pattern: str, is_unique: bool) -> None:
        """The rules that all services have: each call answered at once and once, no result without a call."""
        waiting: List[str] = []
        turn: List[str] = []
        ever: List[str] = []
        for kind, *rest in self.log:
            if kind == "call":
                call_id, name = rest[:2]
                demand(re.fullmatch(pattern, call_id), f"call id {call_id!r} does not match {pattern}")
                demand(call_id not in turn, f"call id {call_id!r} twice in a turn")
                demand(not is_unique or call_id not in ever, f"call ids must be unique: {call_id!r}")
                demand(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name), f"bad tool name {name!r}")
                demand(len(waiting) == len(turn), f"calls without results: {waiting}")
                waiting.append(call_id)
                turn.append(call_id)
                ever.append(call_id)
            elif kind == "result":
                demand(rest[0] in waiting, f"result {rest[0]!r} answers no open call")
                waiting.remove(rest[0])
                turn = turn if waiting else []
            elif kind not in ("image", "thought"):
                demand(not waiting, f"calls without results: {waiting}")
                turn = []
        demand(not waiting, f"calls without results: {waiting}")


def grid_scenario(text: str) -> str:
    """The scenario that a body names last; /2 when a tool result follows it."""
    names = "|".join(sorted((re.escape(name) for name in GRID_FACTS if "/" not in name), key=len, reverse=True))
    last = list(re.finditer(f"scenario: ({names})\\.", text))[-1]
    answered = GRID_RESULT in text[last.end():]
    return last.group(1) + ("/2" if answered and last.group(1) + "/2" in GRID_FACTS else "")


def grid_seal(maker: str) -> str:
    """The signature that the provider protocol's fake issues: base64 in the standard alphabet."""
    return base64.b64encode(f"\u00ff\u00fe>>{maker}<<".encode("latin-1")).decode()


GRID_FOREIGN = base64.b64encode(b"made by another model").decode()


class GridFake:
    """A provider: one request in, checked, one answer out."""

    protocol = provider = model = host = path = whole_path = ""
    headers: Dict[str, str] = {}
    counts = frozenset({"cached", "reasoning"})     # what its usage tells besides totals
    id_pattern = r"[\s\S]{1,40}"
    is_unique = False
    stops: Dict[str, str] = {}
    stream_type = "text/event-stream"
    maker = ""                                      # whose signatures it takes; "" when it signs nothing
    has_stop = True
    always_streams = False
    error_fields: Dict[str, Any] = {}

    def __init__(self) -> None:
        self.bodies: List[str] = []
        self.seen: List[GridSeen] = []
        self.faults: List[str] = []

    @property
    def seal(self) -> str:
        return grid_seal(self.maker)

    def validate(self, received: Received) -> Optional[str]:
        """Why the real service would refuse the request; None when it would not."""
        try:
            text = received.body.decode("ascii")
            is_stream = received.path == self.path
            demand(received.path in (self.path, self.whole_path or self.path), f"no such path: {received.path}")
            for name, value in self.headers.items():
                demand(received.headers.get(name) == value, f"header {name} is {received.headers.get(name)!r}")
            demand(received.headers.get("content-type") == "application/json", "content type")
            if not self.whole_path:
                is_stream = bool(received.json.get("stream"))
            self.check_call(received, is_stream)
            self.seen.append(self.understand(text))
            self.bodies.append(text)
        except GridFault as fault:
            return str(fault)
        return None

    def understand(self, text: str) -> GridSeen:
        """The body understood. Raises `GridFault` for what the real service would refuse."""
        body = json.loads(text)
        demand(GRID_FOREIGN not in text, "a signature that another model made")
        try:
            json.dumps(body, ensure_ascii=False).encode("utf-8")            # no half of a surrogate pair
            seen = self.read(body)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise GridFault(f"{type(error).__name__}: {error}") from error
        for signature in seen.all("thought"):
            demand(signature == self.seal, f"a signature that is not ours: {signature[:40]!r}")
        seen.check(self.id_pattern, self.is_unique)
        return seen

    def check_call(self, received: Received, is_stream: bool) -> None:
        """What only this service asks for."""

    def read(self, body: Dict[str, Any]) -> GridSeen:
        """The request understood. Raises `GridFault`."""
        raise NotImplementedError

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        """A streamed answer."""
        raise NotImplementedError

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def error(self, status: int, message: str) -> Dict[str, Any]:
        """An error body, by default OpenAI's."""
        kind = {400: "invalid_request_error", 429: "rate_limit_exceeded"}.get(status, "server_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": kind}}

    def error_frame(self) -> bytes:
        """An error inside a stream."""
        return sse([self.error(503, "The model is overloaded.")])

    def broken(self) -> Answer:
        """A whole answer that is none."""
        return Answer(200, json.dumps(self.error(503, "The model is overloaded.")).encode())

    def stop(self, facts: GridFacts) -> str:
        """The service's word for the end."""
        return self.stops[facts.stop]

    def usage(self) -> Dict[str, int]:
        """Neutral counts, of what the service tells; `fresh` are prompt tokens neither cached nor written."""
        told = {name: count if name in ("prompt", "output") or name in self.counts else 0
                for name, count in GRID_USAGE.items()}
        return {**told, "fresh": told["prompt"] - told["cached"] - told["written"]}

    def call_id(self, place: int) -> str:
        return f"call_{self.provider}|{len(self.seen)}{place}".replace("|", "_").replace("-", "_")

    def answer(self, received: Received) -> Answer:
        """The scenario's answer, or a refusal."""
        fault = self.validate(received)
        if fault is not None:
            self.faults.append(fault)
            return self.refusal(400, fault)
        scenario = grid_scenario(received.body.decode("ascii"))
        if scenario == "error":
            return self.refusal(429, "Slow down, please.")
        facts = GRID_FACTS[scenario]
        is_stream = self.always_streams or (received.path == self.path if self.whole_path
                                            else bool(received.json.get("stream")))
        if not is_stream:
            if scenario == "error in stream":
                return self.broken()
            body = json.dumps(self.whole(facts)).encode()
            part = body[:len(body) // 2] if scenario in ("cut", "early end") else body
            return Answer(200, part, headers={"content-length": str(len(body))} if scenario == "cut" else {})
        usage = bool((received.json.get("stream_options") or {}).get("include_usage"))
        pieces = self.frames(facts, usage)
        if scenario in ("cut", "early end", "error in stream"):
            first = next(place for place, frame in enumerate(pieces) if b'"This ' in frame)
            ends = {"cut": [b""], "early end": [], "error in stream": [self.error_frame()]}
            pieces = pieces[:first + 1] + ends[scenario]
        return Answer(200, pieces, self.stream_type)

    def refusal(self, status: int, message: str) -> Answer:
        return Answer(status, json.dumps(self.error(status, message)).encode(),
                      headers={"retry-after": "7", **self.error_headers(status)} if status == 429 else
                      self.error_headers(status))

    def error_headers(self, status: int) -> Dict[str, str]:
        return {}


class GridChatFake(GridFake):
    """Chat Completions as Groq has it: reasoning in `reasoning`, nothing signed."""

    protocol, provider, model, host = "openai-completions", "groq", "qwen/qwen3.8-27b", "api.groq.com"
    path = "/openai/v1/chat/completions"
    headers = {"authorization": "Bearer gsk_grid0123456789abcdef"}
    stops = {"stop": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "length": "length",
             "refusal": "content_filter"}
    fields = ("model messages stream stream_options max_tokens max_completion_tokens temperature top_p stop tools "
              "tool_choice parallel_tool_calls response_format reasoning_effort seed user")
    limit_names = ("max_tokens", "max_completion_tokens")
    result_fields = "role tool_call_id content"

    def read(self, body: Dict[str, Any]) -> GridSeen:
        seen = GridSeen()
        demand_fields(body, self.fields, "body")
        demand(body["model"] == self.model, f"no model {body['model']!r}")
        limits = [body[name] for name in self.limit_names if name in body]
        demand(len(limits) <= 1, "two limits")
        seen.limit = limits[0] if limits else None
        seen.stop = tuple(body.get("stop") or ())
        seen.thinks = body.get("reasoning_effort") not in (None, "none")
        demand(body.get("reasoning_effort", "none") in ("none", "low", "medium", "high"), "reasoning_effort")
        for tool in body.get("tools", ()):
            demand_fields(tool, "type function", "tool")
            demand_fields(tool["function"], "name description parameters strict", "function")
            seen.tools.append(tool["function"]["name"])
        demand(seen.tools or "tools" not in body, "tools: empty")
        form = body.get("response_format")
        if form:
            demand(form["type"] in ("json_object", "json_schema"), "response_format")
            seen.schema = form["type"] == "json_object" or form["json_schema"]["schema"]
        demand(body["messages"], "messages: empty")
        for place, message in enumerate(body["messages"]):
            self.read_message(message, f"messages[{place}]", seen)
        self.check_order(body["messages"])
        return seen

    def check_order(self, messages: List[Dict[str, Any]]) -> None:
        demand(messages[-1]["role"] != "assistant", "the last turn is the assistant's")

    def read_message(self, message: Dict[str, Any], where: str, seen: GridSeen) -> None:
        role = message["role"]
        if role == "assistant":
            demand_fields(message, "role content tool_calls prefix", where)
            demand(message.get("content") or message.get("tool_calls"), f"{where}: empty")
            if message.get("content"):
                self.read_assistant(message["content"], where, seen)
            for call in message.get("tool_calls", ()):
                demand_fields(call, "id type function", where)
                demand_fields(call["function"], "name arguments", where)
                demand(call["type"] == "function", where)
                arguments = json_object(call["function"]["arguments"], where)
                seen.log.append(("call", call["id"], call["function"]["name"], arguments))
        elif role == "tool":
            demand_fields(message, self.result_fields, where)
            seen.log.append(("result", message["tool_call_id"], self.read_result(message["content"], where, seen)))
        else:
            demand(role in ("system", "user"), f"{where}: role {role}")
            demand_fields(message, "role content", where)
            self.read_content(message["content"], role, where, seen)

    def read_assistant(self, content: Any, where: str, seen: GridSeen) -> None:
        seen.log.append(("assistant", demand_text(content, where)))

    def read_result(self, content: Any, where: str, seen: GridSeen) -> str:
        demand(isinstance(content, str) or all(part["type"] == "text" for part in content),
               f"{where}: a tool message takes text only")
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    def read_content(self, content: Any, role: str, where: str, seen: GridSeen) -> None:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                seen.log.append((role, demand_text(part["text"], where)))
            else:
                demand_fields(part, "type image_url", where)
                seen.log.append(self.read_picture(part["image_url"], where))

    def read_picture(self, value: Any, where: str) -> Tuple[str, str]:
        demand_fields(value, "url detail", where)
        return demand_picture_url(value["url"], where)

    def counted(self) -> Dict[str, Any]:
        counts = self.usage()
        return {"prompt_tokens": counts["prompt"], "completion_tokens": counts["output"],
                "total_tokens": counts["prompt"] + counts["output"],
                "prompt_tokens_details": {"cached_tokens": counts["cached"]},
                "completion_tokens_details": {"reasoning_tokens": counts["reasoning"]}}

    def calls(self, facts: GridFacts) -> List[Dict[str, Any]]:
        return [{"index": place, "id": self.call_id(place), "type": "function",
                 "function": {"name": name, "arguments": arguments}}
                for place, (name, arguments) in enumerate(facts.calls)]

    def thought(self, text: str, is_last: bool) -> Dict[str, Any]:
        return {"reasoning": text}

    def deltas(self, facts: GridFacts) -> List[Dict[str, Any]]:
        out: List[Dict[str, Any]] = [{"role": "assistant", "content": ""}]
        pieces = cut_up(facts.thinking) if facts.thinking else []
        out += [self.thought(piece, place == len(pieces) - 1) for place, piece in enumerate(pieces)]
        out += [{"content": piece} for piece in cut_up(facts.text)] if facts.text else []
        calls = self.calls(facts)
        out += [{"tool_calls": [{**call, "function": {**call["function"], "arguments": ""}}]} for call in calls]
        texts_left = [cut_up(call["function"]["arguments"]) for call in calls]
        for turn in range(max(map(len, texts_left), default=0)):            # they take turns
            out += [{"tool_calls": [{"index": place, "function": {"arguments": pieces[turn]}}]}
                    for place, pieces in enumerate(texts_left) if turn < len(pieces)]
        return out

    def envelope(self, **fields: Any) -> Dict[str, Any]:
        return {"id": "chatcmpl-grid", "created": 1760000000, "model": self.model, **fields}

    def chunk(self, delta: Dict[str, Any], reason: Optional[str] = None, **fields: Any) -> Dict[str, Any]:
        return self.envelope(object="chat.completion.chunk", choices=[
            {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], **fields)

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        chunks = [self.chunk(delta) for delta in self.deltas(facts)] + [self.chunk({}, self.stop(facts))]
        if usage:
            chunks.append(self.envelope(object="chat.completion.chunk", choices=[], usage=self.counted()))
        return [sse([chunk]) for chunk in chunks] + [b"data: [DONE]\n\n"]

    def message(self, facts: GridFacts) -> Dict[str, Any]:
        return {"role": "assistant", "content": facts.text or None,
                **({"reasoning": facts.thinking} if facts.thinking else {})}

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        calls = [{name: value for name, value in call.items() if name != "index"} for call in self.calls(facts)]
        message = {**self.message(facts), **({"tool_calls": calls} if calls else {})}
        return self.envelope(object="chat.completion", usage=self.counted(), choices=[
            {"index": 0, "message": message, "logprobs": None, "finish_reason": self.stop(facts)}])


class GridMistralFake(GridChatFake):
    """Mistral: the strictest order and ids, thinking inside the content."""

    protocol, provider, model, host = "mistral-conversations", "mistral", "mistral-medium-2604", "api.mistral.ai"
    path = "/v1/chat/completions"
    headers = {"authorization": "Bearer grid-mistral-0123456789"}
    counts = frozenset({"cached"})
    id_pattern = r"[a-zA-Z0-9]{9}"
    maker = "mistral-conversations"
    stops = {**GridChatFake.stops, "refusal": "stop"}       # it has no word for a refusal
    fields = ("model messages stream max_tokens temperature top_p stop random_seed tools tool_choice "
              "parallel_tool_calls response_format reasoning_effort prompt_mode frequency_penalty presence_penalty")
    limit_names = ("max_tokens",)
    result_fields = "role tool_call_id content name"
    followers = {"system": "user assistant system", "user": "assistant system user", "assistant": "assistant user tool",
                 "tool": "assistant tool"}

    def check_order(self, messages: List[Dict[str, Any]]) -> None:
        super().check_order(messages)
        roles = [message["role"] for message in messages]
        for before, after in zip(roles, roles[1:]):
            demand(after in self.followers[before].split(), f"Unexpected role '{after}' after role '{before}'")

    def read_assistant(self, content: Any, where: str, seen: GridSeen) -> None:
        if isinstance(content, str):
            seen.log.append(("assistant", demand_text(content, where)))
            return
        for place, chunk in enumerate(content):
            if chunk["type"] == "thinking":
                demand(place == 0, f"{where}: thinking comes first and in one chunk")
                demand_fields(chunk, "type thinking signature closed", where)
                demand("".join(inner["text"] for inner in chunk["thinking"]) == GRID_THOUGHT, f"{where}: thinking")
                seen.log.append(("thought", chunk["signature"]))
            else:
                demand_fields(chunk, "type text", where)
                seen.log.append(("assistant", demand_text(chunk["text"], where)))

    def read_result(self, content: Any, where: str, seen: GridSeen) -> str:
        if isinstance(content, str):
            return content
        seen.log.extend(self.read_picture(part["image_url"], where) for part in content if part["type"] == "image_url")
        return "".join(part["text"] for part in content if part["type"] == "text")

    def read_picture(self, value: Any, where: str) -> Tuple[str, str]:
        return demand_picture_url(value, where)

    def call_id(self, place: int) -> str:
        return f"{len(self.seen) % 10000:04d}abcd{place}"

    def thought(self, text: str, is_last: bool) -> Dict[str, Any]:
        chunk: Dict[str, Any] = {"type": "thinking", "thinking": [{"type": "text", "text": text}]}
        return {"content": [{**chunk, "signature": self.seal} if is_last else chunk]}

    def counted(self) -> Dict[str, Any]:
        counts = self.usage()
        return {"prompt_tokens": counts["prompt"], "completion_tokens": counts["output"],
                "total_tokens": counts["prompt"] + counts["output"], "num_cached_tokens": counts["cached"]}

    def message(self, facts: GridFacts) -> Dict[str, Any]:
        text = [{"type": "text", "text": facts.text}] if facts.text else []
        content = [*self.thought(facts.thinking, True)["content"], *text] if facts.thinking else facts.text
        return {"role": "assistant", "content": content}

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        chunks = [self.chunk(delta) for delta in self.deltas(facts)]
        chunks.append(self.chunk({"content": ""}, self.stop(facts), usage=self.counted()))
        return [sse([chunk]) for chunk in chunks] + [b"data: [DONE]\n\n"]

    def error(self, status: int, message: str) -> Dict[str, Any]:
        return {"object": "error", "message": message, "type": "invalid_request_error" if status == 400 else
                "rate_limited" if status == 429 else "service_unavailable", "param": None, "code": str(status)}


class GridAnthropicFake(GridFake):
    """Anthropic Messages."""

    protocol, provider, model, host = "anthropic-messages", "anthropic", "claude-sonnet-4-5", "api.anthropic.com"
    path = "/v1/messages"
    headers = {"x-api-key": "sk-ant-api03-grid0123456789", "anthropic-version": "2023-06-01"}
    counts = frozenset({"cached", "written", "reasoning"})
    id_pattern = r"[a-zA-Z0-9_-]{1,64}"
    is_unique = True
    maker = "anthropic-messages"
    stops = {"stop": "end_turn", "stop_sequence": "stop_sequence", "tool_use": "tool_use", "length": "max_tokens",
             "refusal": "refusal"}
    block_fields = {"text": "text", "image": "source", "thinking": "thinking signature", "redacted_thinking": "data",
                    "tool_use": "id name input", "tool_result": "tool_use_id content is_error"}

    def read(self, body: Dict[str, Any]) -> GridSeen:
        seen = GridSeen()
        demand_fields(body, "model max_tokens messages system tools tool_choice thinking output_config temperature "
                            "top_p top_k stop_sequences metadata stream", "body")
        demand(body["model"] == self.model, f"no model {body['model']!r}")
        demand(json.dumps(body).count('"cache_control"') <= 4, "more than four cache marks")
        seen.limit, seen.stop = body["max_tokens"], tuple(body.get("stop_sequences", ()))
        thinking = body.get("thinking") or {"type": "disabled"}
        seen.thinks = thinking["type"] == "enabled"
        if seen.thinks:
            demand(1024 <= thinking["budget_tokens"] < body["max_tokens"], "thinking.budget_tokens")
            demand(not {"temperature", "top_k"} & set(body), "no sampling with thinking")
        form = (body.get("output_config") or {}).get("format")
        if form:
            demand(form["type"] == "json_schema", "output_config.format")
            seen.schema = form["schema"]
        system = body.get("system") or []
        seen.log.extend(("system", demand_text(block["text"], "system", False))
                        for block in ([{"text": system}] if isinstance(system, str) else system))
        for tool in body.get("tools", ()):
            demand_fields(tool, "name description input_schema cache_control strict type", "tool")
            demand(tool["input_schema"]["type"] == "object", "input_schema")
            seen.tools.append(tool["name"])
        messages = body["messages"]
        demand(messages and messages[0]["role"] == "user", "messages: the first must be the user's")
        for place, message in enumerate(messages):
            before = messages[place - 1]["role"] if place else None
            demand(message["role"] != before, f"messages.{place}: roles must alternate")
            self.read_message(message, f"messages.{place}", seen)
        demand("tools" in body or not seen.all("call"), "tool_use without tools")
        last = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), [])
        results = [block for block in messages[-1]["content"] if isinstance(block, dict)
                   and block["type"] == "tool_result"]
        demand(not (seen.thinks and results) or last[0]["type"] in ("thinking", "redacted_thinking"),
               "Expected `thinking`, but found `tool_use`")
        return seen

    def read_message(self, message: Dict[str, Any], where: str, seen: GridSeen) -> None:
        demand_fields(message, "role content", where)
        role, content = message["role"], message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        demand(blocks and role in ("user", "assistant"), f"{where}: empty")
        kinds = [block["type"] for block in blocks]
        demand("tool_result" not in kinds[kinds.count("tool_result"):], f"{where}: tool_result blocks come first")
        for block in blocks:
            demand_fields(block, "type cache_control " + self.block_fields[block["type"]], where)
            self.read_block(block, role, where, seen)

    def read_block(self, block: Dict[str, Any], role: str, where: str, seen: GridSeen) -> None:
        kind = block["type"]
        demand((kind in ("tool_result", "image")) <= (role == "user"), f"{where}: {kind}")
        demand((kind in ("tool_use", "thinking")) <= (role == "assistant"), f"{where}: {kind}")
        if kind == "text":
            seen.log.append((role, demand_text(block["text"], where, False)))
        elif kind == "image":
            demand_fields(block["source"], "type media_type data", where)
            demand(block["source"]["media_type"] == "image/png", where)
            seen.log.append(demand_picture(block["source"]["data"], where))
        elif kind == "thinking":
            demand(block["thinking"] == GRID_THOUGHT, f"{where}: thinking was changed")
            seen.log.append(("thought", block["signature"]))
        elif kind == "tool_use":
            demand(isinstance(block["input"], dict), f"{where}: input")
            seen.log.append(("call", block["id"], block["name"], block["input"]))
        else:
            content = block.get("content", "")
            inner = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "".join(demand_text(part["text"], where, False) for part in inner if part["type"] == "text")
            seen.log.append(("result", block["tool_use_id"], text))
            for part in inner:
                if part["type"] != "text":
                    demand(not block.get("is_error"), f"{where}: an error result takes text only")
                    self.read_block(part, role, where, seen)

    def call_id(self, place: int) -> str:
        return f"toolu_01{len(self.seen):06d}{place}"

    def blocks(self, facts: GridFacts) -> List[Dict[str, Any]]:
        thought = [{"type": "thinking", "thinking": facts.thinking, "signature": self.seal}] if facts.thinking else []
        text = [{"type": "text", "text": facts.text}] if facts.text else []
        return thought + text + [{"type": "tool_use", "id": self.call_id(place), "name": name, "input":
                                  json.loads(arguments)} for place, (name, arguments) in enumerate(facts.calls)]

    def counted(self) -> Dict[str, Any]:
        counts = self.usage()
        return {"input_tokens": counts["fresh"], "cache_creation_input_tokens": counts["written"],
                "cache_read_input_tokens": counts["cached"], "output_tokens": counts["output"],
                "output_tokens_details": {"thinking_tokens": counts["reasoning"]}}

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        return {"id": "msg_01grid", "type": "message", "role": "assistant", "model": self.model,
                "content": self.blocks(facts), "stop_reason": self.stop(facts), "usage": self.counted(),
                "stop_sequence": "three" if facts.stop == "stop_sequence" else None}

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        whole = self.whole(facts)
        events: List[Dict[str, Any]] = [{"type": "message_start", "message": {
            **whole, "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {**whole["usage"], "output_tokens": 1}}}, {"type": "ping"}]
        for place, block in enumerate(whole["content"]):
            kind = block["type"]
            empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
            events.append({"type": "content_block_start", "index": place, "content_block": {**block, **empty[kind]}})
            name, text = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
                          "tool_use": ("input_json_delta", "partial_json")}[kind]
            written = json.dumps(block["input"]) if kind == "tool_use" else block[text]
            deltas = [{"type": name, text: piece} for piece in cut_up(written)]
            if kind == "thinking":
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            events += [{"type": "content_block_delta", "index": place, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": place})
        events += [{"type": "message_delta", "delta": {name: whole[name] for name in ("stop_reason", "stop_sequence")},
                    "usage": whole["usage"]}, {"type": "message_stop"}]
        return [sse([event], named=True) for event in events]

    def error(self, status: int, message: str) -> Dict[str, Any]:
        kind = {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "overloaded_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_grid"}

    def error_frame(self) -> bytes:
        return sse([self.error(529, "Overloaded")], named=True)


class GridResponsesFake(GridFake):
    """OpenAI Responses."""

    protocol, provider, model, host = "openai-responses", "openai", "gpt-5.2", "api.openai.com"
    path = "/v1/responses"
    headers = {"authorization": "Bearer sk-proj-grid0123456789"}
    id_pattern = r"[\s\S]{1,64}"
    maker = "openai-responses"
    has_stop = False
    fields = ("model input store stream max_output_tokens temperature top_p user text include reasoning tools "
              "tool_choice parallel_tool_calls prompt_cache_key")

    def read(self, body: Dict[str, Any]) -> GridSeen:
        seen = GridSeen()
        demand_fields(body, self.fields, "body")
        demand(body["model"] == self.model and body["store"] is False, "model or store")
        seen.limit = body.get("max_output_tokens")
        demand(seen.limit is None or seen.limit >= 16, "max_output_tokens: at least 16")
        seen.thinks = (body.get("reasoning") or {}).get("effort", "none") != "none"
        demand(not seen.thinks or body.get("include") == ["reasoning.encrypted_content"], "the reasoning would be lost")
        demand_fields(body.get("reasoning") or {}, "effort summary", "reasoning")
        for tool in body.get("tools", ()):
            demand_fields(tool, "type name description parameters strict", "tool")
            seen.tools.append(tool["name"])
        form = (body.get("text") or {}).get("format")
        if form:
            seen.schema = form["type"] == "json_object" or form["schema"]
            demand(form["type"] == "json_object" or re.fullmatch(r"[\w-]{1,64}", form["name"]), "text.format.name")
        if body.get("instructions"):
            seen.log.append(("system", body["instructions"]))
        items = body["input"]
        for place, item in enumerate(items):
            self.read_item(item, f"input[{place}]", seen)
            is_thought = item.get("type") == "reasoning"
            demand(not is_thought or (place + 1 < len(items) and (items[place + 1].get("role") == "assistant" or items[
                place + 1]["type"] in ("function_call", "reasoning"))), f"input[{place}]: reasoning without its item")
        return seen

    def read_item(self, item: Dict[str, Any], where: str, seen: GridSeen) -> None:
        kind = item.get("type", "message")
        if kind == "reasoning":
            demand_fields(item, "type id summary encrypted_content status content", where)
            demand([part["text"] for part in item["summary"]] == [GRID_THOUGHT], f"{where}: summary was changed")
            seen.log.append(("thought", item["encrypted_content"]))
        elif kind == "function_call":
            demand_fields(item, "type call_id name arguments", where)
            seen.log.append(("call", item["call_id"], item["name"], json_object(item["arguments"], where)))
        elif kind == "function_call_output":
            demand_fields(item, "type call_id output", where)
            parts = item["output"]
            parts = [{"type": "input_text", "text": parts}] if isinstance(parts, str) else parts
            text = "".join(part["text"] for part in parts if part["type"] == "input_text")
            seen.log.append(("result", item["call_id"], text))
            self.read_parts([part for part in parts if part["type"] != "input_text"], "user", where, seen)
        elif item["role"] == "assistant":
            demand_fields(item, "type id role status content", where)
            demand(item["id"].startswith("msg_"), f"{where}.id")
            for part in item["content"]:
                demand_fields(part, "type text annotations", where)
                demand(part["type"] == "output_text", where)
                seen.log.append(("assistant", part["text"]))
        else:
            demand_fields(item, "type role content", where)
            role = "system" if item["role"] in ("system", "developer") else item["role"]
            demand(role in ("system", "user"), where)
            content = item["content"]
            self.read_parts([{"type": "input_text", "text": content}] if isinstance(content, str) else content, role,
                            where, seen)

    def read_parts(self, parts: List[Dict[str, Any]], role: str, where: str, seen: GridSeen) -> None:
        for part in parts:
            if part["type"] == "input_text":
                demand_fields(part, "type text", where)
                seen.log.append((role, demand_text(part["text"], where)))
            else:
                demand(part["type"] == "input_image" and part["detail"] in ("auto", "low", "high"), where)
                demand_fields(part, "type image_url detail", where)
                seen.log.append(demand_picture_url(part["image_url"], where))

    def items(self, facts: GridFacts) -> List[Dict[str, Any]]:
        out: List[Dict[str, Any]] = []
        if facts.thinking:
            out.append({"id": "rs_grid", "type": "reasoning", "encrypted_content": self.seal,
                        "summary": [{"type": "summary_text", "text": facts.thinking}]})
        if facts.text:
            part = {"type": "refusal", "refusal": facts.text} if facts.stop == "refusal" else {
                "type": "output_text", "text": facts.text, "annotations": [], "logprobs": []}
            out.append({"id": "msg_grid", "type": "message", "role": "assistant", "status": "completed",
                        "content": [part]})
        return out + [{"id": f"fc_{place}", "type": "function_call", "call_id": self.call_id(place), "name": name,
                       "arguments": arguments, "status": "completed"}
                      for place, (name, arguments) in enumerate(facts.calls)]

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        counts = self.usage()
        is_cut = facts.stop == "length"
        return {"id": "resp_grid", "object": "response", "created_at": 1760000002, "model": self.model,
                "status": "incomplete" if is_cut else "completed", "error": None,
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None, "output": self.items(facts),
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": {
                    "input_tokens": counts["prompt"], "input_tokens_details": {"cached_tokens": counts["cached"]},
                    "output_tokens": counts["output"], "total_tokens": counts["prompt"] + counts["output"],
                    "output_tokens_details": {"reasoning_tokens": counts["reasoning"]}}}

    def item_events(self, place: int, item: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
        at = {"output_index": place, "item_id": item["id"]}
        kind = item["type"]
        empty = {"reasoning": {"summary": [], "encrypted_content": None}, "message": {"content": []},
                 "function_call": {"arguments": ""}}
        yield {"type": "response.output_item.added", "output_index": place,
               "item": {**item, **empty[kind], "status": "in_progress"}}
        if kind == "function_call":
            yield from ({"type": "response.function_call_arguments.delta", **at, "delta": piece}
                        for piece in cut_up(item["arguments"]))
            yield {"type": "response.function_call_arguments.done", **at, "arguments": item["arguments"]}
        else:
            part, = item["summary"] if kind == "reasoning" else item["content"]
            name = "refusal" if part["type"] == "refusal" else "text"
            word = {"summary_text": "reasoning_summary", "output_text": "content", "refusal": "content"}[part["type"]]
            stem = {"summary_text": "reasoning_summary_text"}.get(part["type"], part["type"])
            at["summary_index" if kind == "reasoning" else "content_index"] = 0
            yield {"type": f"response.{word}_part.added", **at, "part": {**part, name: ""}}
            yield from ({"type": f"response.{stem}.delta", **at, "delta": piece} for piece in cut_up(part[name]))
            yield {"type": f"response.{stem}.done", **at, name: part[name]}
            yield {"type": f"response.{word}_part.done", **at, "part": part}
        yield {"type": "response.output_item.done", "output_index": place, "item": item}

    def events(self, facts: GridFacts) -> List[Dict[str, Any]]:
        whole = self.whole(facts)
        begun = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        events = [{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}]
        for place, item in enumerate(whole["output"]):
            events.extend(self.item_events(place, item))
        return [*events, {"type": f"response.{whole['status']}", "response": whole}]

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        return [sse([{**event, "sequence_number": place}], named=True)
                for place, event in enumerate(self.events(facts))]

    def failed(self) -> Dict[str, Any]:
        return {**self.whole(GridFacts()), "status": "failed",
                "error": {"code": "server_error", "message": "The model failed."}}

    def error_frame(self) -> bytes:
        return sse([{"type": "response.failed", "response": self.failed()}], named=True)

    def broken(self) -> Answer:
        return Answer(200, json.dumps(self.failed()).encode())


class GridAzureFake(GridResponsesFake):
    """Azure OpenAI: another address, another header, the seal of reasoning in the last event only."""

    protocol, provider, host = "azure-openai-responses", "azure-openai-responses", "gridres.openai.azure.com"
    path = "/openai/v1/responses?api-version=v1"
    headers = {"api-key": "grid-azure-0123456789"}

    def item_events(self, place: int, item: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
        for event in super().item_events(place, item):
            if event["type"] == "response.output_item.done" and item["type"] == "reasoning":
                event = {**event, "item": {**item, "encrypted_content": None}}
            yield event


GRID_JWT = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (
    b'{"alg":"none"}', b'{"https://api.openai.com/auth":{"chatgpt_account_id":"acct-grid"}}', b"seal"))


class GridCodexFake(GridResponsesFake):
    """The ChatGPT subscription's backend: always a stream, without event names, ended by response.done."""

    protocol, provider, model, host = "openai-codex-responses", "openai-codex", "gpt-5.6-luna", "chatgpt.com"
    path = "/backend-api/codex/responses"
    headers = {"authorization": f"Bearer {GRID_JWT}", "chatgpt-account-id": "acct-grid", "accept": "text/event-stream",
               "openai-beta": "responses=experimental"}
    fields = ("model store stream instructions input text include prompt_cache_key tool_choice parallel_tool_calls "
              "temperature service_tier tools reasoning")
    always_streams = True

    def read(self, body: Dict[str, Any]) -> GridSeen:
        demand(body.get("stream") is True, "Stream must be set to true")
        demand(body.get("instructions"), "Instructions are required")
        demand(all(item.get("role") != "system" for item in body["input"]), "System messages are not allowed")
        return super().read(body)

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        events = self.events(facts)
        events[-1] = {**events[-1], "type": "response.done"}
        return [sse([event]) for event in events]

    def error(self, status: int, message: str) -> Dict[str, Any]:
        return {"detail": message} if status == 400 else super().error(status, message)


class GridGeminiFake(GridFake):
    """The Gemini API, with a model that checks signatures of calls."""

    protocol, provider, model = "google-generative-ai", "google", "gemini-3-flash-preview"
    host = "generativelanguage.googleapis.com"
    path = f"/v1beta/models/{model}:streamGenerateContent?alt=sse"
    whole_path = f"/v1beta/models/{model}:generateContent"
    headers = {"x-goog-api-key": "AIzaGrid0123456789"}
    maker = "google-generative-ai"
    id_pattern = r"[A-Za-z0-9_:-]{1,64}"
    has_ids = signs_calls = nests = True
    gives_ids = False
    stops = {"stop": "STOP", "stop_sequence": "STOP", "tool_use": "STOP", "length": "MAX_TOKENS", "refusal": "SAFETY"}
    fields = "contents systemInstruction tools toolConfig generationConfig safetySettings"

    def read(self, body: Dict[str, Any]) -> GridSeen:
        seen = GridSeen()
        demand_fields(body, self.fields, "body")
        config = body.get("generationConfig") or {}
        demand_fields(config, "maxOutputTokens temperature topP topK stopSequences seed responseMimeType "
                              "responseJsonSchema thinkingConfig", "generationConfig")
        seen.limit, seen.stop = config.get("maxOutputTokens"), tuple(config.get("stopSequences", ()))
        thinking = config.get("thinkingConfig") or {}
        demand_fields(thinking, "includeThoughts thinkingLevel thinkingBudget", "thinkingConfig")
        demand(len({"thinkingLevel", "thinkingBudget"} & set(thinking)) <= 1, "level and budget together")
        seen.thinks = bool(thinking.get("includeThoughts"))
        if config.get("responseMimeType"):
            seen.schema = config.get("responseJsonSchema", True)
        for tool in body.get("tools", ()):
            for declared in tool["functionDeclarations"]:
                demand_fields(declared, "name description parameters parametersJsonSchema", "functionDeclarations")
                seen.tools.append(declared["name"])
        for part in (body.get("systemInstruction") or {"parts": []})["parts"]:
            seen.log.append(("system", demand_text(part["text"], "systemInstruction")))
        contents = body["contents"]
        demand(contents and contents[0]["role"] == "user", "contents: the first must be the user's")
        open_calls: List[Tuple[str, str]] = []
        for place, content in enumerate(contents):
            open_calls = self.read_content(content, place, contents, open_calls, seen)
        return seen

    def read_content(self, content: Dict[str, Any], place: int, contents: List[Dict[str, Any]],
                     open_calls: List[Tuple[str, str]], seen: GridSeen) -> List[Tuple[str, str]]:
        where = f"contents[{place}]"
        demand_fields(content, "role parts", where)
        demand(content["role"] in ("user", "model") and content["parts"], f"{where}: role or no parts")
        answers = [part for part in content["parts"] if "functionResponse" in part]
        demand(len(answers) == len(open_calls), "the number of function response parts must be equal to that of calls")
        demand(not answers or len(answers) == len(content["parts"]), f"{where}: other parts among function responses")
        calls: List[Tuple[str, str]] = []
        for number, part in enumerate(content["parts"]):
            demand_fields(part, "text thought thoughtSignature functionCall functionResponse inlineData", where)
            spot = f"{place}_{len(calls)}"
            if "functionCall" in part:
                calls.append(self.read_call(part["functionCall"], where, spot, seen))
            elif "functionResponse" in part:
                self.read_answer(part["functionResponse"], where, open_calls[number], seen)
            elif "inlineData" in part:
                demand(part["inlineData"]["mimeType"] == "image/png", where)
                seen.log.append(demand_picture(part["inlineData"]["data"], where))
            elif part.get("thought"):
                demand(content["role"] == "model" and part["text"] == GRID_THOUGHT, f"{where}: thought was changed")
            elif part["text"] or "thoughtSignature" not in part:
                role = "assistant" if content["role"] == "model" else "user"
                seen.log.append((role, demand_text(part["text"], where)))
            signature = part.get("thoughtSignature")
            if signature and signature != "skip_thought_signature_validator":
                seen.log.append(("thought", signature))
        if calls:
            demand(content["role"] == "model", f"{where}: role of a call")
            demand(contents[place - 1]["role"] == "user", "a function call turn comes right after a user turn")
            first = next(part for part in content["parts"] if "functionCall" in part)
            later = contents[place + 1:]
            is_current = not any(turn["role"] == "user" and any("text" in part for part in turn["parts"])
                                 for turn in later)
            demand(not (self.signs_calls and is_current) or first.get("thoughtSignature"),
                   f"{where}: Function call is missing a thought_signature")
        return calls

    def read_call(self, call: Dict[str, Any], where: str, spot: str, seen: GridSeen) -> Tuple[str, str]:
        demand_fields(call, "id name args" if self.has_ids else "name args", where)
        demand(isinstance(call["args"], dict), where)
        call_id = call["id"] if self.has_ids else spot
        seen.log.append(("call", call_id, call["name"], call["args"]))
        return call_id, call["name"]

    def read_answer(self, answer: Dict[str, Any], where: str, call: Tuple[str, str], seen: GridSeen) -> None:
        allowed = "name response" + (" id" if self.has_ids else "") + (" parts" if self.nests else "")
        demand_fields(answer, allowed, where)
        demand(answer["name"] == call[1] and answer.get("id", call[0]) == call[0], f"{where}: answers another call")
        demand(set(answer["response"]) <= {"output", "error"}, where)
        seen.log.append(("result", call[0], next(iter(answer["response"].values()))))
        for part in answer.get("parts", ()):
            seen.log.append(demand_picture(part["inlineData"]["data"], where))

    def call_id(self, place: int) -> str:
        return f"{len(self.seen)}x{place}"

    def parts(self, facts: GridFacts, size: int) -> List[Dict[str, Any]]:
        out: List[Dict[str, Any]] = [{"text": piece, "thought": True} for piece in cut_up(facts.thinking, size)
                                     if facts.thinking]
        out += [{"text": piece} for piece in cut_up(facts.text, size) if facts.text]
        for place, (name, arguments) in enumerate(facts.calls):
            call = {"name": name, "args": json.loads(arguments)}
            out.append({"functionCall": {"id": self.call_id(place), **call} if self.gives_ids else call})
            if place == 0 and (self.signs_calls or facts.thinking):     # of parallel calls only the first is signed
                out[-1]["thoughtSignature"] = self.seal
        if facts.thinking and not facts.calls:              # at the end, on a part of its own
            out.append({"text": "", "thoughtSignature": self.seal})
        return out

    def chunk(self, parts: List[Dict[str, Any]], reason: str = "") -> Dict[str, Any]:
        counts = self.usage()
        candidate: Dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": 0}
        return {"candidates": [{**candidate, "finishReason": reason} if reason else candidate],
                "responseId": "grid", "modelVersion": self.model, "usageMetadata": {
                    "promptTokenCount": counts["prompt"], "cachedContentTokenCount": counts["cached"],
                    "candidatesTokenCount": counts["output"] - counts["reasoning"],
                    "thoughtsTokenCount": counts["reasoning"], "totalTokenCount": counts["prompt"] + counts["output"]}}

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        return self.chunk(self.parts(facts, 10 ** 6), self.stop(facts))

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        chunks = [self.chunk([part]) for part in self.parts(facts, 5)] + [self.chunk([{"text": ""}], self.stop(facts))]
        return [sse([chunk]) for chunk in chunks]

    def error(self, status: int, message: str) -> Dict[str, Any]:
        word = {400: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED"}.get(status, "UNAVAILABLE")
        return {"error": {"code": status, "message": message, "status": word}}


class GridVertexFake(GridGeminiFake):
    """Vertex AI, with a model of the second generation: no call ids, images beside results."""

    protocol, provider, model = "google-vertex", "google-vertex", "gemini-2.5-pro"
    host = "us-central1-aiplatform.googleapis.com"
    whole_path = ("/v1/projects/grid-project/locations/us-central1/publishers/google/models/"
                  f"{model}:generateContent")
    path = whole_path.replace("generateContent", "streamGenerateContent?alt=sse")
    headers = {"x-goog-api-key": "AIzaGridVertex0123456789"}
    maker = "google-vertex"
    has_ids = signs_calls = nests = False


class GridCodeAssistFake(GridGeminiFake):
    """Cloud Code Assist: the Gemini request and answer in wrappers, calls with ids."""

    protocol, provider, model = "google-gemini-cli", "google-gemini-cli", "gemini-3.1-pro-preview"
    host = "cloudcode-pa.googleapis.com"
    path, whole_path = "/v1internal:streamGenerateContent?alt=sse", "/v1internal:generateContent"
    headers = {"authorization": "Bearer ya29.grid0123456789"}
    maker = "google-gemini-cli"
    gives_ids = True
    fields = GridGeminiFake.fields + " sessionId"

    def read(self, body: Dict[str, Any]) -> GridSeen:
        demand_fields(body, "project model request userAgent requestId user_prompt_id", "body")
        demand(body["project"] == "grid-project" and body["model"] == self.model, "project or model")
        return super().read(body["request"])

    def chunk(self, parts: List[Dict[str, Any]], reason: str = "") -> Dict[str, Any]:
        return {"response": super().chunk(parts, reason), "traceId": "grid"}


def grid_aws_frame(kind: str, payload: Dict[str, Any], message: str = "event") -> bytes:
    """One frame of an AWS event stream."""
    named = "event" if message == "event" else "exception"
    pairs = ((f":{named}-type", kind), (":content-type", "application/json"), (":message-type", message))
    head = b"".join(struct.pack(">B", len(name)) + name.encode() + struct.pack(">BH", 7, len(value)) + value.encode()
                    for name, value in pairs)
    body = json.dumps(payload).encode()
    prelude = struct.pack(">II", len(head) + len(body) + 16, len(head))
    frame = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + body
    return frame + struct.pack(">I", zlib.crc32(frame))


class GridBedrockFake(GridFake):
    """Bedrock's Converse with Claude behind it, signed requests, binary frames."""

    protocol, provider = "bedrock-converse-stream", "amazon-bedrock"
    model, host = "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "bedrock-runtime.us-east-1.amazonaws.com"
    path = f"/model/{model.replace(':', '%3A')}/converse-stream"
    whole_path = path[:-len("-stream")]
    counts = frozenset({"cached", "written"})
    id_pattern = r"[a-zA-Z0-9_-]{1,64}"
    is_unique = True
    stream_type = "application/vnd.amazon.eventstream"
    maker = "bedrock-converse-stream"
    stops = GridAnthropicFake.stops
    key, secret = "AKIAGRID0123456789AB", "grid/secret+0123456789"

    def check_call(self, received: Received, is_stream: bool) -> None:
        """The signature, computed once more from what arrived."""
        form = (r"AWS4-HMAC-SHA256 Credential=([^/]+)/((\d{8})/us-east-1/bedrock/aws4_request), "
                r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})")
        found = re.fullmatch(form, received.headers.get("authorization", ""))
        if found is None:
            raise GridFault("IncompleteSignature")
        key, scope, day, names, signature = found.groups()
        demand(key == self.key and {"host", "x-amz-date"} <= set(names.split(";")), "what is signed, and by whom")
        path = urllib.parse.quote(received.path, safe="/-_.~")
        signed = [f"{name}:{received.headers.get(name)}" for name in names.split(";")]
        lines = [received.method, path, "", *signed, "", names, hashlib.sha256(received.body).hexdigest()]
        text = ["AWS4-HMAC-SHA256", received.headers.get("x-amz-date", ""), scope,
                hashlib.sha256("\n".join(lines).encode()).hexdigest()]
        secret = ("AWS4" + self.secret).encode()
        for step in (day, "us-east-1", "bedrock", "aws4_request"):
            secret = hmac.new(secret, step.encode(), hashlib.sha256).digest()
        demand(hmac.new(secret, "\n".join(text).encode(), hashlib.sha256).hexdigest() == signature,
               "SignatureDoesNotMatch")
        demand(received.headers.get("accept") == (self.stream_type if is_stream else "application/json"), "accept")

    def read(self, body: Dict[str, Any]) -> GridSeen:
        seen = GridSeen()
        demand_fields(body, "messages system inferenceConfig toolConfig additionalModelRequestFields outputConfig",
                      "body")
        config, more = body.get("inferenceConfig") or {}, body.get("additionalModelRequestFields") or {}
        demand_fields(config, "maxTokens temperature topP stopSequences", "inferenceConfig")
        demand_fields(more, "thinking anthropic_beta output_config top_k", "additionalModelRequestFields")
        seen.limit, seen.stop = config.get("maxTokens"), tuple(config.get("stopSequences", ()))
        seen.thinks = (more.get("thinking") or {}).get("type") == "enabled"
        demand(not seen.thinks or 1024 <= more["thinking"]["budget_tokens"] < config["maxTokens"], "budget_tokens")
        form = (body.get("outputConfig") or {}).get("textFormat")
        if form:
            seen.schema = json.loads(form["structure"]["jsonSchema"]["schema"])
        for tool in (body.get("toolConfig") or {"tools": []})["tools"]:
            demand_fields(tool["toolSpec"], "name description inputSchema strict", "toolSpec")
            demand(tool["toolSpec"]["inputSchema"]["json"]["type"] == "object", "inputSchema")
            seen.tools.append(tool["toolSpec"]["name"])
        for block in body.get("system", ()):
            if "cachePoint" not in block:
                seen.log.append(("system", demand_text(block["text"], "system", False)))
        messages = body["messages"]
        demand(messages and messages[0]["role"] == "user", "A conversation must start with a user message")
        for place, message in enumerate(messages):
            demand_fields(message, "role content", "message")
            before = messages[place - 1]["role"] if place else None
            demand(message["role"] != before, f"messages.{place}: roles must alternate")
            demand(message["content"], f"messages.{place}: empty")
            kinds = ["toolResult" in block for block in message["content"]]
            demand(sorted(kinds, reverse=True) == kinds, f"messages.{place}: results come first")
            for block in message["content"]:
                self.read_block(block, message["role"], f"messages.{place}", seen)
        demand("toolConfig" in body or not seen.all("call"), "toolConfig is missing")
        results = "toolResult" in messages[-1]["content"][0]
        demand(not (seen.thinks and results) or "reasoningContent" in messages[-2]["content"][0],
               "Expected `thinking`, but found `tool_use`")
        return seen

    def read_block(self, block: Dict[str, Any], role: str, where: str, seen: GridSeen) -> None:
        (kind, value), = block.items()
        demand((kind in ("toolUse", "reasoningContent")) <= (role == "assistant"), f"{where}: {kind}")
        if kind == "text":
            seen.log.append((role, demand_text(value, where, False)))
        elif kind == "image":
            demand_fields(value, "format source", where)
            demand(value["format"] == "png", where)
            seen.log.append(demand_picture(value["source"]["bytes"], where))
        elif kind == "reasoningContent":
            demand(value["reasoningText"]["text"] == GRID_THOUGHT, f"{where}: reasoning was changed")
            seen.log.append(("thought", value["reasoningText"]["signature"]))
        elif kind == "toolUse":
            demand_fields(value, "toolUseId name input", where)
            seen.log.append(("call", value["toolUseId"], value["name"], value["input"]))
        elif kind == "toolResult":
            demand_fields(value, "toolUseId content status", where)
            demand(value["content"] and role == "user", where)
            text = "".join(demand_text(part["text"], where, False) for part in value["content"] if "text" in part)
            seen.log.append(("result", value["toolUseId"], text))
            for part in value["content"]:
                if "text" not in part:
                    demand(value.get("status") != "error", f"{where}: an error result takes text only")
                    self.read_block(part, role, where, seen)
        else:
            demand(block == {"cachePoint": {"type": "default"}}, f"{where}: {kind}")

    def call_id(self, place: int) -> str:
        return f"tooluse_{len(self.seen)}_{place}"

    def counted(self) -> Dict[str, Any]:
        counts = self.usage()
        return {"inputTokens": counts["fresh"], "outputTokens": counts["output"],
                "totalTokens": counts["prompt"] + counts["output"], "cacheReadInputTokens": counts["cached"],
                "cacheWriteInputTokens": counts["written"]}

    def blocks(self, facts: GridFacts) -> List[Dict[str, Any]]:
        out: List[Dict[str, Any]] = []
        if facts.thinking:
            out.append({"reasoningContent": {"reasoningText": {"text": facts.thinking, "signature": self.seal}}})
        if facts.text:
            out.append({"text": facts.text})
        return out + [{"toolUse": {"toolUseId": self.call_id(place), "name": name, "input": json.loads(arguments)}}
                      for place, (name, arguments) in enumerate(facts.calls)]

    def whole(self, facts: GridFacts) -> Dict[str, Any]:
        return {"output": {"message": {"role": "assistant", "content": self.blocks(facts)}},
                "stopReason": self.stop(facts), "usage": self.counted(), "metrics": {"latencyMs": 5}}

    def frames(self, facts: GridFacts, usage: bool) -> List[bytes]:
        frames = [grid_aws_frame("messageStart", {"role": "assistant"})]
        for place, block in enumerate(self.blocks(facts)):
            at = {"contentBlockIndex": place}
            if "toolUse" in block:
                call = block["toolUse"]
                start = {"toolUse": {"toolUseId": call["toolUseId"], "name": call["name"]}}
                frames.append(grid_aws_frame("contentBlockStart", {**at, "start": start}))
                deltas = [{"toolUse": {"input": piece}} for piece in cut_up(json.dumps(call["input"]))]
            elif "text" in block:
                deltas = [{"text": piece} for piece in cut_up(block["text"])]
            else:
                thought = block["reasoningContent"]["reasoningText"]
                deltas = [{"reasoningContent": {"text": piece}} for piece in cut_up(thought["text"])]
                deltas.append({"reasoningContent": {"signature": thought["signature"]}})
            frames += [grid_aws_frame("contentBlockDelta", {**at, "delta": delta, "p": "abc"}) for delta in deltas]
            frames.append(grid_aws_frame("contentBlockStop", at))
        frames.append(grid_aws_frame("messageStop", {"stopReason": self.stop(facts)}))
        return frames + [grid_aws_frame("metadata", {"usage": self.counted(), "metrics": {"latencyMs": 5}})]

    def error(self, status: int, message: str) -> Dict[str, Any]:
        return {"message": message}

    def error_headers(self, status: int) -> Dict[str, str]:
        return {"x-amzn-errortype": {400: "ValidationException", 429: "ThrottlingException"}[status] + ":http://x/"}

    def error_frame(self) -> bytes:
        return grid_aws_frame("modelStreamErrorException", {"message": "The model broke."}, "exception")

    def broken(self) -> Answer:
        return Answer(424, b'{"message":"The model broke."}', headers={"x-amzn-errortype": "ModelErrorException"})


GRID_FAKES = (GridChatFake, GridAnthropicFake, GridResponsesFake, GridAzureFake, GridCodexFake, GridGeminiFake,
              GridVertexFake, GridCodeAssistFake, GridMistralFake, GridBedrockFake)
GRID_PROTOCOLS = [fake.protocol for fake in GRID_FAKES]


# --- The wire ---------------------------------------------------------------------------------------------------------


def make_grid_certificates(folder: str, hosts: Sequence[str]) -> Tuple[str, str]:
    """(authority's certificate, host certificate with its key) made by the `openssl` program."""
    def path(name: str) -> str:
        return os.path.join(folder, name)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, timeout=60, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    names = ",".join(f"DNS:{host}" for host in hosts)
    with open(path("grid.cnf"), "w", encoding="ascii") as file:
        file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=pigateway grid test\n[ca]\n"
                   "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
                   "subjectKeyIdentifier=hash\n[host]\nbasicConstraints=critical,CA:FALSE\n"
                   "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\n"
                   f"authorityKeyIdentifier=keyid\nsubjectAltName={names}\n")
    for name in ("ca", "host"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
    openssl("req", "-x509", "-new", "-key", "ca.key", "-config", "grid.cnf", "-extensions", "ca", "-days", "2",
            "-subj", "/CN=pigateway grid CA", "-out", "ca.pem")
    openssl("req", "-new", "-key", "host.key", "-config", "grid.cnf", "-out", "host.csr")
    openssl("x509", "-req", "-in", "host.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "7", "-days", "2",
            "-extfile", "grid.cnf", "-extensions", "host", "-out", "host.crt")
    with open(path("host.pem"), "w", encoding="ascii") as out:
        for name in ("host.key", "host.crt"):
            with open(path(name), encoding="ascii") as part:
                out.write(part.read())
    return path("ca.pem"), path("host.pem")


class GridProxy:
    """A CONNECT proxy that is the other end itself: TLS with its own certificate, then HTTP, answered by host."""

    def __init__(self, certificate: str, fakes: Dict[str, Any]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            tunnel = ""

            def log_message(self, *_: Any) -> None:
                pass

            def do_CONNECT(self) -> None:
                self.tunnel = self.path.rpartition(":")[0]
                if self.tunnel not in fakes:
                    self.send_error(403, "no such host in the grid")
                    return
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                try:
                    self.connection = context.wrap_socket(self.connection, server_side=True)
                except OSError:
                    self.close_connection = True
                    return
                self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
                self.close_connection = False

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                assert headers["host"] == self.tunnel
                give_grid_answer(self, fakes[self.tunnel].answer(Received(self.command, self.path, headers, body)))

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().finish()
                self.connection.close()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        end_accepting(self.server)
        self.server.shutdown()
        self.server.server_close()


def give_grid_answer(handler: Any, answer: Answer) -> None:
    """Sends an answer: bytes whole, pieces in chunks; b"" among them, or a length that is not reached, cuts it."""
    handler.send_response(answer.status)
    handler.send_header("content-type", answer.content_type)
    is_whole = isinstance(answer.body, bytes)
    fixed = {"content-length": str(len(answer.body))} if is_whole else {"transfer-encoding": "chunked"}
    for name, value in {**fixed, **answer.headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    with contextlib.suppress(OSError):
        if is_whole:
            handler.wfile.write(answer.body)
            is_cut = answer.headers.get("content-length", str(len(answer.body))) != str(len(answer.body))
        else:
            is_cut = b"" in answer.body
            pieces = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in answer.body if piece)
            handler.wfile.write(pieces + (b"" if is_cut else b"0\r\n\r\n"))
        if is_cut:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


class GridWorld(NamedTuple):
    """The gateway and the providers around it, by protocol."""

    url: str
    fakes: Dict[str, GridFake]


GRID_ENVIRON = {
    "GROQ_API_KEY": "gsk_grid0123456789abcdef", "ANTHROPIC_API_KEY": "sk-ant-api03-grid0123456789",
    "OPENAI_API_KEY": "sk-proj-grid0123456789", "AZURE_OPENAI_API_KEY": "grid-azure-0123456789",
    "AZURE_OPENAI_RESOURCE_NAME": "gridres", "GEMINI_API_KEY": "AIzaGrid0123456789",
    "GOOGLE_CLOUD_API_KEY": "AIzaGridVertex0123456789", "GOOGLE_CLOUD_PROJECT": "grid-project",
    "GOOGLE_CLOUD_LOCATION": "us-central1", "MISTRAL_API_KEY": "grid-mistral-0123456789",
    "AWS_ACCESS_KEY_ID": GridBedrockFake.key, "AWS_SECRET_ACCESS_KEY": GridBedrockFake.secret,
    "AWS_REGION": "us-east-1",
}
GRID_LOGINS = {
    "openai-codex": {"type": "oauth", "access": GRID_JWT, "refresh": "r", "expires": 9e15},
    "google-gemini-cli": {"type": "oauth", "access": "ya29.grid0123456789", "refresh": "r", "expires": 9e15,
                          "projectId": "grid-project"},
}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: Any) -> Iterator[GridWorld]:
    """The gateway as shipped, with all of the grid's providers."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("grid")
    fakes = {fake.protocol: fake() for fake in GRID_FAKES}
    authority, certificate = make_grid_certificates(str(folder), [fake.host for fake in GRID_FAKES])
    proxy = GridProxy(certificate, {fake.host: fake for fake in fakes.values()})
    write_agent_files(folder, auth=GRID_LOGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", authority)
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "SSL_CERT_DIR"):
            patch.delenv(name, raising=False)
        for name in ("HTTPS_PROXY", "https_proxy"):         # read when the transport is made
            patch.setenv(name, proxy.url)
        try:
            with running(folder, GRID_ENVIRON) as handle:
                yield GridWorld(handle.url, fakes)
        finally:
            proxy.close()


# --- The clients ------------------------------------------------------------------------------------------------------


class GridChatClient:
    """Chat Completions, as a plain client has it: what it does not know is dropped from what goes back."""

    name, path = "openai-chat", "/v1/chat/completions"
    stops = {"stop": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "length": "length",
             "refusal": "content_filter"}

    def body(self, case: GridCase, model_id: str, stream: bool) -> Dict[str, Any]:
        out: Dict[str, Any] = {"model": model_id, "messages": self.system(case), "max_completion_tokens": 4000}
        for turn in case.turns:
            out["messages"].extend(self.turn(turn))
        if stream:
            out.update(stream=True, stream_options={"include_usage": True})
        if case.tools:
            out["tools"] = [{"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
                            for name, schema in GRID_TOOLS.items()]
        if case.thinks:
            out["reasoning_effort"] = "high"
        if case.stop:
            out["stop"] = list(case.stop)
        if case.output:
            out["response_format"] = {"type": "json_object"} if case.output == "object" else {
                "type": "json_schema", "json_schema": {"name": "place", "schema": GRID_SCHEMA, "strict": True}}
        return out

    def system(self, case: GridCase) -> List[Dict[str, Any]]:
        return [{"role": "system", "content": case.system}] if case.system else []

    def turn(self, turn: GridTurn) -> List[Dict[str, Any]]:
        url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
        picture = {"type": "image_url", "image_url": {"url": url}}
        if turn.results:
            return [{"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": text}, picture]
                     if shows else text} for call_id, text, shows in turn.results]
        content: Any = [{"type": "text", "text": turn.text}, picture] if turn.image else turn.text
        out: Dict[str, Any] = {"role": turn.role, "content": content}
        if turn.thinking:
            out.update(reasoning_content=GRID_THOUGHT, reasoning_details=[
                {"type": "reasoning.text", "text": GRID_THOUGHT, "signature": turn.thinking}])
        if turn.calls:
            out["tool_calls"] = [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                                 for call_id, name, arguments in turn.calls]
        return [out]

    def read(self, result: Result, stream: bool) -> Read:
        if stream and result.status == 200:
            return check_chat_stream(result.body)
        body = result.json
        if "error" in body:
            assert set(body["error"]) == {"message", "type", "param", "code"}
            return Read(error=body["error"])
        choice, = body["choices"]
        message = choice["message"]
        calls = tuple((call["id"], call["function"]["name"], call["function"]["arguments"])
                      for call in message.get("tool_calls", ()))
        return Read(message["content"] or "", message.get("reasoning_content", ""), calls, choice["finish_reason"],
                    body["usage"])

    def usage(self, usage: Dict[str, Any]) -> Dict[str, int]:
        return {"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"],
                "output": usage["completion_tokens"],
                "reasoning": usage["completion_tokens_details"]["reasoning_tokens"]}

    def goes_back(self, result: Result, read: Read, stream: bool) -> List[Dict[str, Any]]:
        """The answer as a turn of the next request."""
        return self.turn(GridTurn("assistant", read.text, calls=read.calls))


class GridMessagesClient(GridChatClient):
    """Anthropic Messages: content goes back block by block, as it came."""

    name, path = "anthropic-messages", "/v1/messages"
    stops = {"stop": "end_turn", "stop_sequence": "end_turn", "tool_use": "tool_use", "length": "max_tokens",
             "refusal": "refusal"}

    def body(self, case: GridCase, model_id: str, stream: bool) -> Dict[str, Any]:
        out: Dict[str, Any] = {"model": model_id, "max_tokens": 4000, "messages": [], "stream": stream}
        for turn in case.turns:
            message, = self.turn(turn)
            if message["role"] == "user" and out["messages"] and out["messages"][-1]["role"] == "user":
                out["messages"][-1]["content"] += message["content"]
            else:
                out["messages"].append(message)
        if case.system:
            out["system"] = [{"type": "text", "text": case.system, "cache_control": {"type": "ephemeral"}}]
        if case.tools:
            out["tools"] = [{"name": name, "description": "d", "input_schema": schema}
                            for name, schema in GRID_TOOLS.items()]
        if case.thinks:
            out["thinking"] = {"type": "enabled", "budget_tokens": 2048}
        if case.stop:
            out["stop_sequences"] = list(case.stop)
        if case.output:
            out["output_config"] = {"format": {"type": "json_schema", "schema": GRID_SCHEMA}}
        return out

    def turn(self, turn: GridTurn) -> List[Dict[str, Any]]:
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                               "data": base64.b64encode(PICTURE).decode()}}
        blocks: List[Dict[str, Any]] = []
        if turn.thinking:
            blocks.append({"type": "thinking", "thinking": GRID_THOUGHT, "signature": turn.thinking})
        if turn.text:
            blocks.append({"type": "text", "text": turn.text})
        blocks += [picture] if turn.image else []
        blocks += [{"type": "tool_use", "id": call_id, "name": name, "input": json.loads(arguments)}
                   for call_id, name, arguments in turn.calls]
        blocks += [{"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": text}, picture]
                    if shows else text} for call_id, text, shows in turn.results]
        return [{"role": "user" if turn.results else turn.role, "content": blocks}]

    def read(self, result: Result, stream: bool) -> Read:
        if stream and result.status == 200:
            return check_messages_stream(result.body)
        body = result.json
        if body["type"] == "error":
            assert body["error"]["message"] and body["error"]["type"]
            return Read(error=body["error"])
        blocks = body["content"]
        calls = tuple((block["id"], block["name"], json.dumps(block["input"])) for block in blocks
                      if block["type"] == "tool_use")
        return Read("".join(block["text"] for block in blocks if block["type"] == "text"),
                    "".join(block["thinking"] for block in blocks if block["type"] == "thinking"), calls,
                    body["stop_reason"], body["usage"])

    def usage(self, usage: Dict[str, Any]) -> Dict[str, int]:
        cached, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
        return {"prompt": usage["input_tokens"] + cached + written, "cached": cached, "output": usage["output_tokens"],
                "reasoning": usage.get("output_tokens_details", {}).get("thinking_tokens", 0)}

    def goes_back(self, result: Result, read: Read, stream: bool) -> List[Dict[str, Any]]:
        if not stream:
            return [{"role": "assistant", "content": result.json["content"]}]
        blocks: List[Dict[str, Any]] = []
        written = ""
        for event in result.events:
            if event["type"] == "content_block_start":
                blocks.append(dict(event["content_block"]))
                written = ""
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                written += delta.get("partial_json", "")
                for name in {"text", "thinking", "signature"} & set(delta):
                    blocks[-1][name] = blocks[-1].get(name, "") + delta[name]
            elif event["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(written or "{}")
        return [{"role": "assistant", "content": blocks}]


GRID_CLIENTS: Dict[str, GridChatClient] = {client.name: client for client in (GridChatClient(), GridMessagesClient())}


# --- The cells --------------------------------------------------------------------------------------------------------


def grid_call(world: GridWorld, client: GridChatClient, fake: GridFake, body: Dict[str, Any]) -> Result:
    """One request; whatever the fake found wrong with it fails the test."""
    fake.faults.clear()
    result = call(world.url, client.path, body)
    assert fake.faults == [], f"{fake.protocol} refused the request"
    return result


def check_grid_answer(client: GridChatClient, fake: GridFake, result: Result, stream: bool, scenario: str) -> Read:
    """What the client reads is what the provider said."""
    assert result.status == 200, result.body
    facts, read = GRID_FACTS[scenario], client.read(result, stream)
    assert read.error is None and read.text == facts.text
    assert read.thinking == facts.thinking
    assert [(name, json.loads(arguments)) for _, name, arguments in read.calls] == [
        (name, json.loads(arguments)) for name, arguments in facts.calls]
    stop = client.stops[facts.stop]
    if scenario == "stop" and client.name == "anthropic-messages" and "stop_sequence" in fake.stops.values():
        stop = "stop_sequence"
    if scenario == "refusal" and fake.protocol == "mistral-conversations":
        stop = client.stops["stop"]
    assert read.stop == stop
    told = fake.usage()
    assert client.usage(read.usage) == {name: told[name] for name in ("prompt", "cached", "output", "reasoning")}
    return read


def check_grid_request(case: GridCase, fake: GridFake, turns: Sequence[GridTurn]) -> None:
    """What the provider understood is what the client said."""
    seen = fake.seen[-1]
    assert "".join(seen.all("system")) in (case.system, *([pg.CODEX_INSTRUCTIONS] if not case.system else ()))
    said = "".join(seen.all("user"))
    for turn in turns:
        if turn.role == "user" and turn.text:
            assert turn.text in said
    spoken = [text for text in seen.all("assistant") if text != pg.MISTRAL_GAP]
    assert spoken == [turn.text for turn in turns if turn.role == "assistant" and turn.text]
    assert seen.all("call") == [(name, json.loads(arguments)) for turn in turns for _, name, arguments in turn.calls]
    results = [(text,) for turn in turns for _, text, _ in turn.results]
    assert seen.all("result") == results
    pictures = sum(turn.image + sum(shows for _, _, shows in turn.results) for turn in turns)
    assert len(seen.all("image")) == pictures
    assert seen.tools == (list(GRID_TOOLS) if case.tools else [])
    assert (seen.schema is True) == (case.output == "object") and bool(seen.schema) == bool(case.output)
    assert seen.stop == (case.stop if fake.has_stop else ())
    assert seen.limit is None or seen.limit >= 4000


# Anthropic's API has no free-form JSON mode, so that its clients cannot ask for it.
GRID_CELLS = [(client, protocol, scenario) for client in GRID_CLIENTS for protocol in GRID_PROTOCOLS
              for scenario, case in GRID_CASES.items() if client == "openai-chat" or case.output != "object"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("client_name, protocol, scenario", GRID_CELLS, ids=["-".join(cell) for cell in GRID_CELLS])
def test_grid(grid: GridWorld, client_name: str, protocol: str, scenario: str, stream: bool) -> None:
    client, fake, case = GRID_CLIENTS[client_name], grid.fakes[protocol], GRID_CASES[scenario]
    count = len(fake.seen)
    body = client.body(case, f"{fake.provider}/{fake.model}", stream)
    result = grid_call(grid, client, fake, body)
    field = DOCUMENTED_400.get((scenario, protocol))
    if field is not None:
        error = client.read(result, stream).error
        assert result.status == 400 and error["code"] == "unsupported_parameter" and error["param"] == field
        assert len(fake.seen) == count, "it was found out before the provider was asked"
        return
    if scenario == "error":
        error = client.read(result, stream).error
        assert (result.status, error["type"]) == (429, "rate_limit_error") and "Slow down" in error["message"]
        assert int(result.headers["retry-after"]) >= 7
        return
    if scenario in ("error in stream", "cut", "early end"):
        read = client.read(result, stream)
        assert read.error and (result.status >= 500 if not stream else result.status == 200 and not read.stop)
        assert not stream or GRID_FACTS[scenario].text.startswith(read.text) and read.text
        return
    read = check_grid_answer(client, fake, result, stream, scenario)
    check_grid_request(case, fake, case.turns)
    if case.thinks:
        assert fake.seen[-1].thinks
    dropped = result.headers.get("x-pigateway-dropped", "")
    assert ((scenario, protocol) in GRID_DROPPED) == ("stop" in dropped)
    assert (protocol == "openai-codex-responses") == ("max_" in dropped), "the one that takes no limit"
    turns = [*case.turns]
    while read.calls:                                       # the tool loop, until the provider is content
        turns += [GridTurn("assistant", read.text, calls=read.calls),
                  GridTurn("tool", results=tuple((call_id, GRID_RESULT, case.shows) for call_id, _, _ in read.calls))]
        body["messages"] += client.goes_back(result, read, stream) + client.turn(turns[-1])
        result = grid_call(grid, client, fake, body)
        read = check_grid_answer(client, fake, result, stream, scenario + "/2")
        check_grid_request(case, fake, turns)
        check_grid_seals(client, fake, case)
    if case.thinks:                                         # and a turn behind it
        turns += [GridTurn("assistant", read.text), *grid_ask("thought")]
        body["messages"] += client.goes_back(result, read, stream) + client.turn(turns[-1])
        result = grid_call(grid, client, fake, body)
        check_grid_answer(client, fake, result, stream, "thought")
        check_grid_request(case, fake, turns)
        check_grid_seals(client, fake, case)


@pytest.mark.parametrize("protocol", GRID_PROTOCOLS)
def test_grid_lanes(grid: GridWorld, protocol: str) -> None:
    for name, native in (("openai-chat", "openai-completions"), ("anthropic-messages", "anthropic-messages")):
        client, fake = GRID_CLIENTS[name], grid.fakes[protocol]
        result = grid_call(grid, client, fake, client.body(GRID_CASES["text"], f"{fake.provider}/{fake.model}", True))
        assert result.headers["x-pigateway-lane"] == ("native" if protocol == native else "translated")


def check_grid_seals(client: GridChatClient, fake: GridFake, case: GridCase) -> None:
    """An Anthropic client gives signatures back, and they reach their maker; a plain chat client knows nothing of them,
    and those that calls cannot do without are remembered for it."""
    if case.thinks and fake.maker and client.name == "anthropic-messages":
        assert fake.seen[-1].all("thought"), "the signature was lost"
    if getattr(fake, "signs_calls", False) and case.tools:
        assert fake.seal in fake.seen[-1].all("thought"), "the call's own signature was lost"


# --- A long conversation ----------------------------------------------------------------------------------------------


def grid_history(client: GridChatClient, fake: GridFake, is_tidy: bool) -> Tuple[GridTurn, ...]:
    """Fifty turns and more: tools, parallel calls, pictures, thinking of all makers; unless `is_tidy`, also what
    clients get wrong: results without calls, calls without results, ids used again, empty turns, halves of pairs."""
    turns: List[GridTurn] = []
    makers = [*pg.UPSTREAM_PROTOCOLS, "another-maker"]
    for number in range(10):
        one, two = (f"call_{number}", f"b{number}") if is_tidy else ("call_again", f"toolu|{number}/\u00e9")
        maker = makers[number % len(makers)]
        is_own = bool(fake.maker) and maker == fake.maker
        signature = pg.seal(pg.Thinking(GRID_THOUGHT, fake.seal if is_own else GRID_FOREIGN, False, maker), client.name)
        turns += [
            GridTurn("user", f"Question {number}" + ("" if is_tidy else " \ud83d half"), image=number % 3 == 0),
            GridTurn("assistant", f"I look {number}.", thinking=signature, calls=(
                (one, "weather", GRID_ROME), (two, "map_of", GRID_OSLO))),
            GridTurn("tool", results=((one, "18", False), *(
                [] if number == 4 and not is_tidy else [(two, "here", number % 2 == 0)]))),
            GridTurn("assistant", f"It is 18, {number}."), GridTurn("user", "Thanks."),
            GridTurn("assistant", "" if number == 5 and not is_tidy else "Any time.")]
        if not is_tidy and number == 2:
            turns += [GridTurn("tool", results=(("call_of_nobody", "lost", True),))]
        if not is_tidy and number == 7:
            turns += [GridTurn("user", ""), GridTurn("assistant", "  ")]
    return grid_ask("long", *turns)


@pytest.mark.parametrize("protocol", GRID_PROTOCOLS)
@pytest.mark.parametrize("client_name", GRID_CLIENTS)
def test_grid_long_conversation(grid: GridWorld, client_name: str, protocol: str) -> None:
    client, fake = GRID_CLIENTS[client_name], grid.fakes[protocol]
    is_tidy = client_name == protocol       # an Anthropic body goes to Anthropic as it came, its faults included
    case = GridCase(grid_history(client, fake, is_tidy), GRID_SYSTEM, True, True)
    result = grid_call(grid, client, fake, client.body(case, f"{fake.provider}/{fake.model}", True))
    check_grid_answer(client, fake, result, True, "long")
    seen = fake.seen[-1]
    assert len(seen.all("call")) == len(seen.all("result")) == 20
    assert len(seen.all("image")) == 9
    assert is_tidy or "lost" in "".join(seen.all("user"))


# --- The fakes themselves ---------------------------------------------------------------------------------------------

# Faults that a request may have: (scenario whose last request is spoilt, what to look for, what to put there).
GRID_SPOILERS: Dict[str, Tuple[str, str, str]] = {
    "unknown field": ("text", r"\A\{", '{"surprise":1,'),
    "damaged image": ("image", re.escape(base64.b64encode(PICTURE).decode()[:40]), "AAAA"),
    "foreign signature": ("thinking", r"//4\+Pm[A-Za-z0-9+/]+=*", GRID_FOREIGN),
    "half of a pair": ("text", "Please", r"\\ud83d"),
    "changed call": ("tool loop", r'("name": ?)"weather"(, ?"arg|, ?"input": ?\{|\}, ?"type)', r'\1"bad name!"\2'),
}


@pytest.mark.parametrize("fault", GRID_SPOILERS)
@pytest.mark.parametrize("protocol", GRID_PROTOCOLS)
def test_grid_fakes_see_faults(grid: GridWorld, protocol: str, fault: str) -> None:
    scenario, pattern, other = GRID_SPOILERS[fault]
    test_grid(grid, "anthropic-messages", protocol, scenario, False)
    fake = grid.fakes[protocol]
    body = fake.bodies[-1]
    fake.understand(body)
    spoilt = re.sub(pattern, other, body, count=1)
    if spoilt == body:
        assert fault == "foreign signature" and not fake.maker or fault == "changed call"
        return
    with pytest.raises(GridFault):
        fake.understand(spoilt)


# Calls as letters, results in capitals, "." for somebody else's turn.
@pytest.mark.parametrize("said, is_unique, fault", [
    ("aA", True, None), ("abBA", True, None), ("aaAA", False, "twice in a turn"), ("aA.aA", True, "must be unique"),
    ("aA.aA", False, None), ("a.", False, "without results"), ("a", False, "without results"),
    ("abA.B", False, "without results"), ("A", False, "no open call"), ("aAA", False, "no open call"),
    ("abAc", False, "without results"), ("1", False, "does not match")])
def test_grid_rules_of_calls(said: str, is_unique: bool, fault: Optional[str]) -> None:
    seen = GridSeen()
    seen.log = [("user", "x") if letter == "." else ("result", letter.lower(), "") if letter.isupper() else
                ("call", letter, "f", {}) for letter in said]
    with pytest.raises(GridFault, match=fault) if fault else contextlib.nullcontext():
        seen.check(r"[a-z]+", is_unique)


# --- The table --------------------------------------------------------------------------------------------------------


def grid_table() -> str:
    """README's table of what works where."""
    rows = [["", *GRID_PROTOCOLS], ["---"] * (len(GRID_PROTOCOLS) + 1)]
    rows += [[scenario, *("400" if (scenario, protocol) in DOCUMENTED_400 else "ok" for protocol in GRID_PROTOCOLS)]
             for scenario in GRID_CASES]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_readme_has_the_grid() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in grid_table().split("\n")]
    assert readme_rows("grid") == rows[2:]


# ======================================================================================================================
# §10 auth.json and the renewal of tokens
# ======================================================================================================================

HOUR_MS = 3_600_000
OTHER_ENTRIES: Dict[str, Any] = {
    "openai": {"type": "api_key", "key": "sk-öther", "env": {"A": "b"}},
    "radius": {"type": "oauth", "access": "ra", "refresh": "rr", "expires": pg.NEVER_MS, "scope": "gateway", "mine": [1, None]},
    "amazon-bedrock": {"type": "api_key"}}


def auth_file(folder: Any, content: Any = None) -> pg.AuthFile:
    """An AuthFile with that content."""
    path = os.path.join(str(folder), "auth.json")
    if content is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
    return pg.AuthFile(path)


def age(path: str, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_lock_is_pi_s_folder(tmp_path: Any) -> None:
    path = str(tmp_path / "auth.json")
    lock, folder = pg.FileLock(path), path + ".lock"
    with lock.held():
        assert os.path.isdir(folder) and not os.listdir(folder)
        with lock.held():                       # a second thread of this process joins
            pass
        assert os.path.isdir(folder)
        with pytest.raises(pg.AuthFileError, match="held by another program"):
            with pg.FileLock(path).held(0.05):
                pass
    assert not os.path.exists(folder)


@pytest.mark.parametrize("seconds, is_taken", [(29.0, False), (31.0, True), (-60.0, False)])
def test_lock_is_stolen_only_when_stale(tmp_path: Any, seconds: float, is_taken: bool) -> None:
    path = str(tmp_path / "auth.json")
    os.mkdir(path + ".lock")
    age(path + ".lock", seconds)
    try:
        with pg.FileLock(path).held(0.05):
            assert is_taken
    except pg.AuthFileError:
        assert not is_taken and os.path.isdir(path + ".lock")


def test_lock_from_the_future_is_stolen_by_our_own_clock(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "LOCK_STALE_S", 0.05)
    monkeypatch.setattr(pg, "LOCK_POLL_S", 0.02)
    path = str(tmp_path / "auth.json")
    os.mkdir(path + ".lock")
    age(path + ".lock", -1000)
    with pg.FileLock(path).held(2):
        pass


def test_lock_is_touched_while_held_but_never_somebody_else_s(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "LOCK_BEAT_S", 0.01)
    path = str(tmp_path / "auth.json")
    lock, folder = pg.FileLock(path), path + ".lock"
    with lock.held():
        first = os.stat(folder).st_mtime_ns
        until(lambda: os.stat(folder).st_mtime_ns != first)
        os.rmdir(folder)                        # another program takes it for dead
        os.mkdir(folder)
        age(folder, 5)
        taken = os.stat(folder).st_mtime_ns
        time.sleep(0.05)
        assert os.stat(folder).st_mtime_ns == taken
    assert os.stat(folder).st_mtime_ns == taken
    os.rmdir(folder)


def test_lock_taken_over_is_taken_again_before_writing(tmp_path: Any) -> None:
    file = auth_file(tmp_path, OTHER_ENTRIES)
    folder = file.path + ".lock"
    with file.lock.held():
        os.rmdir(folder)
        file.change("xai", lambda entry: {"type": "api_key", "key": "k"})
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)


@pytest.mark.skipif(os.name != "posix", reason="links need no rights there")
def test_lock_lost_for_good_is_not_taken_for_held(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "LOCK_WAIT_S", 0.05)
    lock, folder = pg.FileLock(str(tmp_path / "auth.json")), tmp_path / "auth.json.lock"
    with lock.held():
        os.rmdir(folder)
        os.mkdir(folder)                        # another program took it, and keeps it
        for _ in range(2):                      # for each thread that was about to write
            os.utime(folder)
            with pytest.raises(pg.AuthFileError, match="held by another program"):
                lock.ensure()


def test_lock_of_a_link_is_on_both_ends(tmp_path: Any) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "auth.json").write_text("{}")
    (tmp_path / "linked").symlink_to(tmp_path / "real")         # a linked folder is the same place
    (tmp_path / "auth.json").symlink_to(tmp_path / "real" / "auth.json")
    with pg.FileLock(str(tmp_path / "auth.json")).held():
        assert (tmp_path / "auth.json.lock").is_dir() and (tmp_path / "real" / "auth.json.lock").is_dir()
    with pg.FileLock(str(tmp_path / "linked" / "auth.json")).held(0.2):
        pass
    file = pg.AuthFile(str(tmp_path / "auth.json"))
    file.change("xai", lambda entry: {"type": "api_key", "key": "k"})
    assert (tmp_path / "auth.json").is_symlink() and "xai" in json.loads((tmp_path / "real" / "auth.json").read_text())
    assert not list(tmp_path.glob("**/*.lock"))


def test_lock_with_something_in_it_is_told(tmp_path: Any) -> None:
    (tmp_path / "auth.json.lock").mkdir()
    (tmp_path / "auth.json.lock" / "x").write_text("")
    age(str(tmp_path / "auth.json.lock"), 60)
    with pytest.raises(pg.AuthFileError, match="cannot be removed"):
        with pg.FileLock(str(tmp_path / "auth.json")).held(1):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_lose_nothing_of_each_other(tmp_path: Any) -> None:
    path = auth_file(tmp_path, OTHER_ENTRIES).path
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            try:
                file = pg.AuthFile(path)
                for turn in range(8):
                    file.change(f"p{number}", lambda entry: {"type": "api_key", "key": f"{entry.get('key', '')}{turn}"})
            finally:
                os._exit(0)
        children.append(child)
    while any(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children[-1:]):
        with open(path, encoding="utf-8") as file:      # takes no lock, and never sees half a file
            assert set(OTHER_ENTRIES) <= set(json.load(file))
    for child in children[:-1]:
        os.waitpid(child, 0)
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    assert content == {**OTHER_ENTRIES, **{f"p{number}": {"type": "api_key", "key": "01234567"} for number in range(4)}}
    assert sorted(os.listdir(tmp_path)) == ["auth.json"]


def test_auth_file_changes_one_entry_only(tmp_path: Any) -> None:
    file = auth_file(tmp_path, "\ufeff" + json.dumps(OTHER_ENTRIES))
    leftover = file.path + ".123-0123abcd.tmp"
    with open(leftover, "w", encoding="utf-8") as other:
        other.write("{")
    age(leftover, 1000)
    file.change("xai", lambda entry: {"type": "api_key", "key": "\ud800"})
    file.change("openai", lambda entry: {**entry, "key": "new"})
    file.change("nobody", lambda entry: None)
    file.change("radius", lambda entry: entry)
    with open(file.path, encoding="utf-8") as written:
        content = json.load(written)
    assert list(content) == [*OTHER_ENTRIES, "xai"] and content["openai"] == {**OTHER_ENTRIES["openai"], "key": "new"}
    assert {name: content[name] for name in ("radius", "amazon-bedrock")} == {
        name: OTHER_ENTRIES[name] for name in ("radius", "amazon-bedrock")}
    assert os.listdir(tmp_path) == ["auth.json"]
    if os.name == "posix":
        assert os.stat(file.path).st_mode & 0o777 == 0o600
    file.change("xai", lambda entry: None)
    assert "xai" not in file.read()


def test_auth_file_that_is_empty_for_a_moment_is_not_taken_for_empty(tmp_path: Any) -> None:
    file = auth_file(tmp_path, "")              # a tool that takes no lock, between emptying and writing it
    threading.Timer(0.05, auth_file, (tmp_path, OTHER_ENTRIES)).start()
    file.change("xai", lambda old: log_in_entry())
    assert list(file.load()) == [*OTHER_ENTRIES, "xai"]


def test_auth_file_as_pi_writes_it() -> None:
    assert pg.render_auth({"a": {"k": "ö"}}) == '{\n  "a": {\n    "k": "ö"\n  }\n}'.encode()


@pytest.mark.parametrize("content, said", [("{", "not valid JSON"), ("[1]", "must hold a JSON object")])
def test_auth_file_that_is_broken_is_left_alone(tmp_path: Any, monkeypatch: Any, content: str, said: str) -> None:
    monkeypatch.setattr(pg, "AUTH_PAUSE_S", 0.001)
    file = auth_file(tmp_path, content)
    with pytest.raises(pg.AuthFileError, match=said):
        file.change("xai", lambda entry: {"type": "api_key"})
    assert (tmp_path / "auth.json").read_text() == content and os.listdir(tmp_path) == ["auth.json"]


def test_auth_file_in_a_new_folder_is_private(tmp_path: Any) -> None:
    file = pg.AuthFile(str(tmp_path / "a" / "b" / "auth.json"))
    file.change("xai", lambda entry: {"type": "api_key"})
    assert file.read() == {"xai": {"type": "api_key"}}
    if os.name == "posix":
        assert [os.stat(tmp_path / name).st_mode & 0o777 for name in ("a", "a/b", "a/b/auth.json")] == [0o700, 0o700, 0o600]
    blocked = pg.AuthFile(str(tmp_path / "a" / "b" / "auth.json" / "auth.json"))
    with pytest.raises(pg.AuthFileError, match="^auth.json.lock cannot be made: Not a directory$"):
        blocked.change("xai", lambda entry: {})


# --- Renewal ----------------------------------------------------------------------------------------------------------


class FakeVendor:
    """Issues tokens: each refresh token is good for one use."""

    def __init__(self, life_s: float = 3600, now: Optional[float] = None) -> None:
        self.life_s = life_s
        self.valid = {"anthropic": "r0", "xai": "r0"}
        self.calls: List[str] = []
        self.refused = 0
        self.gate = threading.Event()
        self.gate.set()
        self.hanging = ""
        self.now = now
        self.failure: Optional[pg.VendorReply] = None

    def clock(self) -> float:
        return time.time() if self.now is None else self.now

    def post(self, url: str, fields: Dict[str, Any], headers: Any = None, as_json: bool = False, limit_s: float = 0,
             ) -> pg.VendorReply:
        name = "anthropic" if "claude" in url else "xai"
        self.calls.append(name)
        if name == self.hanging:
            assert self.gate.wait(10)
        if self.failure:
            return self.failure
        if fields["refresh_token"] != self.valid[name]:
            self.refused += 1
            return pg.VendorReply(400, {"error": "invalid_grant", "error_description": "used already"})
        number = int(self.valid[name][1:]) + 1
        self.valid[name] = f"r{number}"
        return pg.VendorReply(200, {"access_token": f"a{number}", "refresh_token": f"r{number}", "expires_in": self.life_s})


def log_in_entry(left_s: float = -10.0, number: int = 0, **more: Any) -> Dict[str, Any]:
    return {"type": "oauth", "access": f"a{number}", "refresh": f"r{number}", "expires": (time.time() + left_s) * 1000, **more}


def logins(folder: Any, vendor: FakeVendor, **entries: Any) -> pg.Logins:
    """Log-ins over an auth.json with these entries."""
    return pg.Logins(auth_file(folder, {**OTHER_ENTRIES, **entries}), vendor)


def test_renewal_keeps_the_other_fields_and_entries(tmp_path: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry(email="me@example.com", mine={"x": 1}))
    entry = store.current("xai")
    assert (entry["access"], vendor.calls) == ("a1", ["xai"])
    written = json.loads((tmp_path / "auth.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in OTHER_ENTRIES} == OTHER_ENTRIES
    assert written["xai"] == {**entry, "email": "me@example.com", "mine": {"x": 1}} and written["xai"]["refresh"] == "r1"
    assert 3200 < written["xai"]["expires"] / 1000 - time.time() < 3400      # noted to end five minutes early


def test_fifty_threads_share_one_renewal(tmp_path: Any) -> None:
    vendor = FakeVendor()
    vendor.hanging = "xai"
    vendor.gate.clear()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    seen: List[str] = []
    threads = [threading.Thread(target=lambda: seen.append(store.current("xai")["access"])) for _ in range(50)]
    for thread in threads:
        thread.start()
    vendor.gate.set()
    for thread in threads:
        thread.join(10)
    assert seen == ["a1"] * 50 and vendor.calls == ["xai"]


@pytest.mark.parametrize("left_s, seen_s, calls", [(4000, 0, 0), (290, 3600, 1), (290, 0, 0), (0.5, 3600, 1)])
def test_renewal_ahead_of_the_end_is_beside_the_request(tmp_path: Any, left_s: float, seen_s: float, calls: int) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry(left_s))
    store._seen["xai"] = ("a0", time.time() - seen_s)
    assert store.current("xai")["access"] == "a0"               # still good, so nobody waits
    if calls:
        until(lambda: store.current("xai")["access"] == "a1")
    assert vendor.calls == ["xai"] * calls


def test_token_renewed_by_another_process_is_taken(tmp_path: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    with pg.FileLock(str(tmp_path / "auth.json")).held():       # the other process, in the midst of it
        thread = threading.Thread(target=lambda: store.current("xai"))
        thread.start()
        until(lambda: store._renewals)
        auth_file(tmp_path, {"xai": log_in_entry(900, 5)})
    thread.join(5)
    assert vendor.calls == [] and store.current("xai")["access"] == "a5"


def test_log_in_that_is_over_names_the_command_and_is_asked_once(tmp_path: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry(-10, 7))
    before = (tmp_path / "auth.json").read_bytes()
    for _ in range(3):
        with pytest.raises(pg.LogInOver, match="login xai"):
            store.current("xai")
    assert vendor.calls == ["xai"] and (tmp_path / "auth.json").read_bytes() == before
    auth_file(tmp_path, {"xai": log_in_entry(900, 9)})
    assert store.current("xai")["access"] == "a9"               # a new log-in counts at once


def test_refused_refresh_token_that_another_tool_has_replaced(tmp_path: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    vendor.valid["xai"] = "r3"                                  # a tool that takes no lock was here a moment ago
    vendor.hanging = "xai"
    vendor.gate.clear()
    thread = threading.Thread(target=lambda: store.current("xai"))
    thread.start()
    until(lambda: vendor.calls)
    auth_file(tmp_path, {"xai": log_in_entry(900, 3)})
    vendor.gate.set()
    thread.join(5)
    assert (store.current("xai")["access"], vendor.calls) == ("a3", ["xai"])


RENEWAL_FAILURES: List[Tuple[pg.VendorReply, Any]] = [
    (pg.VendorReply(500, {}), pg.UpstreamError), (pg.VendorReply(429, {"error": "slow"}, 7.0), pg.UpstreamError),
    (pg.VendorReply(200, {}), pg.UpstreamError), (pg.VendorReply(200, {"access_token": 5}), pg.UpstreamError),
    (pg.VendorReply(302, {}), pg.UpstreamError), (pg.VendorReply(400, {"error": "invalid_request"}), pg.UpstreamError),
    (pg.VendorReply(401, {"error": {"code": "refresh_token_reused", "message": "no"}}), pg.LogInOver),
    (pg.VendorReply(403, {}), pg.LogInOver)]


@pytest.mark.parametrize("reply, kind", RENEWAL_FAILURES)
def test_failed_renewal_leaves_the_file_and_is_not_repeated_at_once(tmp_path: Any, reply: Any, kind: Any) -> None:
    vendor = FakeVendor()
    vendor.failure = reply
    store = logins(tmp_path, vendor, xai=log_in_entry())
    before = (tmp_path / "auth.json").read_bytes()
    for _ in range(2):
        with pytest.raises(kind):
            store.current("xai")
    assert vendor.calls == ["xai"] and (tmp_path / "auth.json").read_bytes() == before
    assert not os.path.exists(tmp_path / "auth.json.lock")


def test_vendor_that_hangs_does_not_stop_the_others(tmp_path: Any) -> None:
    vendor = FakeVendor()
    vendor.hanging = "anthropic"
    vendor.gate.clear()
    store = logins(tmp_path, vendor, xai=log_in_entry(), anthropic=log_in_entry())
    waiting = threading.Thread(target=lambda: store.current("anthropic"))
    waiting.start()
    until(lambda: vendor.calls == ["anthropic"])
    assert store.current("xai")["access"] == "a1" and waiting.is_alive()
    vendor.gate.set()
    waiting.join(5)
    assert {name: store.entry(name)["access"] for name in ("xai", "anthropic")} == {"xai": "a1", "anthropic": "a1"}
    assert {name: json.loads((tmp_path / "auth.json").read_text())[name]["refresh"] for name in ("xai", "anthropic")} == {
        "xai": "r1", "anthropic": "r1"}


def test_nothing_is_spent_that_could_not_be_kept(tmp_path: Any, monkeypatch: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    monkeypatch.setattr(pg.AuthFile, "_create", lambda self, target: (_ for _ in ()).throw(pg.AuthFileError("full")))
    with pytest.raises(pg.GatewayError, match="cannot be renewed: full"):
        store.current("xai")
    assert vendor.calls == []


def test_renewed_token_that_cannot_be_written_is_used_and_written_later(tmp_path: Any, monkeypatch: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    monkeypatch.setattr(pg, "SAVE_AGAIN_S", 0.02)
    with monkeypatch.context() as broken:
        broken.setattr(pg.AuthFile, "_write", lambda self, content: (_ for _ in ()).throw(pg.AuthFileError("full")))
        assert store.current("xai")["access"] == "a1" == store.entry("xai")["access"]
    until(lambda: json.loads((tmp_path / "auth.json").read_text())["xai"]["refresh"] == "r1")


def test_log_out_during_a_renewal_stays_a_log_out(tmp_path: Any) -> None:
    vendor = FakeVendor()
    vendor.hanging = "xai"
    vendor.gate.clear()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    thread = threading.Thread(target=lambda: store.current("xai"))
    thread.start()
    until(lambda: vendor.calls)
    auth_file(tmp_path, OTHER_ENTRIES)
    vendor.gate.set()
    thread.join(5)
    assert "xai" not in json.loads((tmp_path / "auth.json").read_text(encoding="utf-8"))


def test_stopping_waits_for_a_token_on_its_way(tmp_path: Any) -> None:
    vendor = FakeVendor()
    vendor.hanging = "xai"
    vendor.gate.clear()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    threading.Thread(target=lambda: store.current("xai")).start()
    until(lambda: vendor.calls)
    threading.Timer(0.05, vendor.gate.set).start()
    store.close()
    assert json.loads((tmp_path / "auth.json").read_text())["xai"]["refresh"] == "r1"


def test_stopping_in_the_moment_before_a_token_is_spent(tmp_path: Any, monkeypatch: Any) -> None:
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    monkeypatch.setattr(pg.AuthFile, "check_writable", lambda self: store.close())
    with pytest.raises(pg.ShuttingDown):
        store.current("xai")
    assert vendor.calls == []


def test_short_lived_token_is_good_for_most_of_its_life() -> None:
    row = pg.SUBSCRIPTIONS["anthropic"]
    assert [row.expiry(life, 0) for life in (1, 600, 3600, "3600", None)] == [900, 540_000, 3_300_000, 3_300_000, 3_300_000]
    assert pg.SUBSCRIPTIONS["openai-codex"].expiry(3600, 0) == HOUR_MS


class BrowsingTerminal(pg.Terminal):
    """Nobody at the keyboard; the browser comes back once with each of `queries`."""

    is_interactive = False

    def __init__(self, *queries: str) -> None:
        super().__init__()
        self.queries = queries
        self.statuses: List[int] = []

    def open_browser(self, url: str) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
        back = query.get("callback_url") or query["redirect_uri"]
        for ending in self.queries:
            try:
                with urllib.request.urlopen(back + ending, timeout=5) as answer:
                    self.statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                self.statuses.append(error.code)


def test_log_in_by_browser(monkeypatch: Any) -> None:
    monkeypatch.setattr("socket.getfqdn", None)                 # may take seconds
    sent: List[Any] = []

    def post(url: str, fields: Any, **more: Any) -> pg.VendorReply:
        sent.append(fields)
        return pg.VendorReply(200, {"key": "sk-or-1"})

    vendor: Any = types.SimpleNamespace(post=post, clock=time.time)
    terminal = BrowsingTerminal("/elsewhere?code=c", "?state=x", "?code=c1", "?code=c2")
    arguments: Any = types.SimpleNamespace(device=False, enterprise=None, no_browser=False, yes=True)
    entry = pg.LogIn(pg.SUBSCRIPTIONS["openrouter"], vendor, terminal, arguments).run()
    assert entry == {"type": "oauth", "access": "sk-or-1", "refresh": "", "expires": pg.NEVER_MS}
    assert terminal.statuses == [404, 400, 200, 409] and sent[0]["code"] == "c1"
    until(lambda: not any(thread.name == "callback" for thread in threading.enumerate()))
@pytest.mark.parametrize("answer, said", [
    ("1", "anthropic"), ("9", "openrouter"), (" xai", "xai"), ("10", r'"10"\. Known'), ("antropic", r'mean "anthropic"\? Known')])
def test_subscription_is_picked_from_a_list(answer: str, said: str) -> None:
    lines: List[str] = []
    terminal: Any = types.SimpleNamespace(is_interactive=True, say=lines.append, ask=lambda prompt: answer.strip())
    arguments: Any = types.SimpleNamespace(provider=None)
    if said in pg.LOG_INS:
        assert pg.pick_subscription(terminal, arguments).provider == said
    else:
        with pytest.raises(pg.ConfigError, match=said):
            pg.pick_subscription(terminal, arguments)
    assert len(lines) == len(pg.LOG_INS)


# As three generations of pi write them; all that matters is which secret a call goes out with.
PI_ENTRIES: Dict[str, Dict[str, Any]] = {
    "0.58": {"anthropic": log_in_entry(4000), "github-copilot": log_in_entry(4000, enterpriseUrl="company.ghe.com"),
             "google-gemini-cli": log_in_entry(4000, projectId="p-1", email="a@b.c"), "google-antigravity": log_in_entry(
                 4000, projectId="p-2"), "groq": {"type": "api_key", "key": "a0"}},
    "0.87": {"openai-codex": log_in_entry(4000, accountId="acc-12345678"), "xai": log_in_entry(4000),
             "kimi-coding": log_in_entry(4000), "meta": log_in_entry(4000), "openrouter": {
                 "type": "oauth", "access": "a0", "refresh": "", "expires": pg.NEVER_MS},
             "github-copilot": log_in_entry(4000, availableModelIds=["gpt-5"]),
             "groq": {"type": "api_key", "key": "$MINE", "env": {"MINE": "a0"}}},
    "1.5": {"openai": log_in_entry(4000, clientId="app_1", scopes=["openid"]), "anthropic": log_in_entry(4000)}}


@pytest.mark.parametrize("generation", PI_ENTRIES)
def test_entries_of_every_pi(tmp_path: Any, generation: str) -> None:
    store = credentials(tmp_path, {"amazon-bedrock": {"type": "api_key"}, **PI_ENTRIES[generation]})
    for name in PI_ENTRIES[generation]:
        row = pg.PROVIDERS[name]
        assert store.usable(row) and token_of(store, row) == "a0"
        assert store.is_subscription(row) == (name != "groq")


@pytest.mark.parametrize("name", pg.SUBSCRIPTIONS)
def test_every_subscription_belongs_to_a_provider(name: str) -> None:
    row = pg.SUBSCRIPTIONS[name]
    assert name in pg.PROVIDERS and row.provider == name and row.title
    assert not row.secret or base64.b64decode(row.secret).startswith(b"GOCSPX-")
    assert (name in pg.LOG_INS) == (name != "openai")


# ======================================================================================================================
# §12 Whose signature it is, and whose credential
# ======================================================================================================================

SEAL_A, SEAL_B = "c2lnbmVkLWJ5LWE=" * 4, "c2lnbmVkLWJ5LWI=" * 4
SIGNED_ANSWER: Dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m1", "stop_reason": "end_turn",
                 "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 2},
                 "content": [{"type": "thinking", "thinking": "Hmm", "signature": SEAL_A}, {"type": "text", "text": "Yes."}]}


def two_models(url: str) -> Dict[str, Any]:
    """models.json with two models of one provider, and the same model at a second one."""
    one = {"baseUrl": url, "api": "anthropic-messages", "apiKey": "sk-upstream-anth-key",
           "models": [{"id": name, "reasoning": True} for name in ("m1", "m2")]}
    return {"providers": {"a": one, "b": {**one, "apiKey": "sk-upstream-other-key"}}}


def signed_stream() -> bytes:
    return sse([{"type": "message_start", "message": {**SIGNED_ANSWER, "content": [], "stop_reason": None}},
                *block(0, {"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": "Hmm"},
                       {"type": "signature_delta", "signature": SEAL_A}),
                *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Yes."}),
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
                {"type": "message_stop"}])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("client", ["messages", "chat/completions"])
def test_thinking_goes_back_to_the_model_and_account_that_made_it(tmp_path: Any, client: str, stream: bool) -> None:
    first = Answer(200, signed_stream(), "text/event-stream") if stream else Answer(200, SIGNED_ANSWER_BYTES)
    later = {**SIGNED_ANSWER, "content": SIGNED_ANSWER["content"][1:]}
    with fake_upstream(first, Answer(200, json.dumps(later).encode())) as fake:
        write_agent_files(tmp_path, models=two_models(fake.url))
        with running(tmp_path) as handle:
            def turn(model: str, messages: List[Any], stream: bool = False) -> Any:
                limit = {"max_tokens": 4096, "thinking": {"type": "enabled", "budget_tokens": 1024}}
                return call(handle.url, f"/v1/{client}", {"model": model, "messages": messages, "stream": stream, **(
                    limit if client == "messages" else {"reasoning_effort": "low"})}, content_type="application/json")

            asked: List[Any] = [{"role": "user", "content": "Yes?"}]
            result = turn("a/m1", asked, stream)
            assert result.status == 200
            if client == "messages":
                said = {"role": "assistant", "content": SIGNED_ANSWER["content"]}
                assert SEAL_A in result.body.decode()           # bare, and every byte as it came
            else:
                events = result.events if stream else [result.json]
                found = [choice.get("delta", choice.get("message")) for event in events if event != "[DONE]"
                         for choice in event["choices"]]
                details = [detail for part in found for detail in part.get("reasoning_details", ())]
                said = {"role": "assistant", "content": "Yes.", "reasoning_details": details}
            talk = [*asked, said, {"role": "user", "content": "Sure?"}]
            for model, keeps in (("a/m1", True), ("a/m2", False), ("b/m1", False), ("a/m1", True)):
                assert turn(model, talk).status == 200
                assert (SEAL_A.encode() in fake.received[-1].body) == keeps, model
                assert b"Sure?" in fake.received[-1].body


SIGNED_ANSWER_BYTES = json.dumps(SIGNED_ANSWER).encode()
BAD_SIGNATURE = Answer(400, json.dumps({"type": "error", "error": {
    "type": "invalid_request_error", "message": "messages.1.content.0: Invalid `signature` in `thinking` block"}}).encode())


@pytest.mark.parametrize("is_loop", [False, True])
def test_refused_signature_is_sent_once_more_without_thinking(tmp_path: Any, is_loop: bool) -> None:
    """Of signatures that nothing is known of: another process, or a restart."""
    content: List[Any] = [{"type": "thinking", "thinking": "Hmm", "signature": SEAL_B}, {"type": "text", "text": "Yes."}]
    reply: Any = "Sure?"
    if is_loop:
        content.append({"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}})
        reply = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "1"}]
    body = {"model": "a/m1", "max_tokens": 4096, "thinking": {"type": "enabled", "budget_tokens": 1024}, "messages": [
        {"role": "user", "content": "Yes?"}, {"role": "assistant", "content": content}, {"role": "user", "content": reply}]}
    with fake_upstream(BAD_SIGNATURE, Answer(200, SIGNED_ANSWER_BYTES), BAD_SIGNATURE) as fake:
        write_agent_files(tmp_path, models=two_models(fake.url))
        with running(tmp_path) as handle:
            result = call(handle.url, "/v1/messages", body, content_type="application/json")
            assert result.status == 200 and len(fake.received) == 2
            assert [SEAL_B.encode() in received.body for received in fake.received] == [True, False]
            again = json.loads(fake.received[1].body)
            assert again["messages"][1]["content"] == content[1:] and again["messages"][2:] == body["messages"][2:]
            # a tool loop that begins without signed thinking cannot go on with a budget
            assert ("thinking" not in again) == is_loop
            assert result.headers.get("x-pigateway-dropped") == ("thinking" if is_loop else None)
            body["messages"][1] = {"role": "assistant", "content": "Yes."}
            assert call(handle.url, "/v1/messages", body, content_type="application/json").status == 400
            assert len(fake.received) == 3                      # nothing to leave out, so nothing to try again


def test_chat_details_go_back_to_their_model_only(tmp_path: Any) -> None:
    details = [{"type": "reasoning.encrypted", "data": SEAL_A}]
    answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m1", "choices": [{
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes.", "reasoning_details": details}}]}
    one = {"api": "openai-completions", "apiKey": "sk-upstream-chat-key", "models": [{"id": "m1"}, {"id": "m2"}]}
    with fake_upstream(Answer(200, json.dumps(answer).encode())) as fake:
        write_agent_files(tmp_path, models={"providers": {"a": {**one, "baseUrl": fake.url}}})
        with running(tmp_path) as handle:
            talk: List[Any] = [{"role": "user", "content": "Yes?"}]
            said = call(handle.url, "/v1/chat/completions", {"model": "a/m1", "messages": talk}).json["choices"][0]["message"]
            assert said["reasoning_details"] == details
            talk += [said, {"role": "user", "content": "Sure?"}]
            for model, keeps in (("a/m1", True), ("a/m2", False)):
                assert call(handle.url, "/v1/chat/completions", {"model": model, "messages": talk}).status == 200
                assert (SEAL_A.encode() in fake.received[-1].body) == keeps


@pytest.mark.parametrize("message, seals", [
    ({"role": "user", "content": "x", "reasoning_details": 5}, ()),            # nobody's business, and no 500
    ({"role": "assistant", "content": "x", "reasoning_details": [{"signature": "s", "text": "t"}, {"data": "d"}, {}]}, ("s", "d"))])
def test_signatures_that_no_part_holds(message: Dict[str, Any], seals: Tuple[str, ...]) -> None:
    request = pg.CHAT.parse({"model": "m", "messages": [message]})
    assert request.seals == seals
    assert pg.without_seals(request, lambda signature, origin: True).foreign == set(seals)



# --- Tool names of Claude subscriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("names, changed", [
    (["read", "bash", "get_weather"], {"Read": "read", "Bash": "bash", "get_weather": "get_weather"}),
    (["Read", "READ"], {}),
    (["read", "Read"], {}), (["webfetch", "WEBFETCH"], {"WebFetch": "webfetch", "WEBFETCH": "WEBFETCH"}), ([], {})])
def test_oauth_tool_names(names: List[str], changed: Dict[str, str]) -> None:
    assert pg.oauth_tool_names(names) == changed


@pytest.mark.parametrize("is_other_form", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("client", ["messages", "chat/completions"])
def test_tools_are_spelt_for_a_subscription_and_come_back(
        tmp_path: Any, client: str, stream: bool, is_other_form: bool) -> None:
    use = {"type": "tool_use", "id": "toolu_9", "name": "Read", "input": {"path": "a"}}
    message = {**SIGNED_ANSWER, "content": [use], "stop_reason": "tool_use"}
    events = sse([{"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
                  *block(0, {**use, "input": {}}, {"type": "input_json_delta", "partial_json": '{"path": "a"}'}),
                  {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 2}},
                  {"type": "message_stop"}])
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    is_stream = stream != is_other_form
    answer = Answer(200, events, "text/event-stream") if is_stream else Answer(200, json.dumps(message).encode())
    with fake_upstream(answer) as fake:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": fake.url}}},
                          auth={"anthropic": log_in_entry(4000)})
        with running(tmp_path) as handle:
            if client == "messages":
                body: Dict[str, Any] = {
                    "max_tokens": 99, "tools": [{"name": "read", "input_schema": schema}, {"name": "f", "input_schema": schema}],
                    "tool_choice": {"type": "tool", "name": "read"}, "messages": [
                        {"role": "user", "content": "read"}, {"role": "assistant", "content": [{**use, "name": "read"}]},
                        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_9", "content": "1"}]}]}
            else:
                body = {"tools": [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("read", "f")],
                        "tool_choice": {"type": "function", "function": {"name": "read"}}, "messages": [
                            {"role": "user", "content": "read"}, {"role": "assistant", "content": None, "tool_calls": [{
                                "id": "toolu_9", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}]},
                            {"role": "tool", "tool_call_id": "toolu_9", "content": "1"}]}
            result = call(handle.url, f"/v1/{client}", {"model": "anthropic/claude-sonnet-4-5", "stream": stream, **body})
            sent = json.loads(fake.received[0].body)
            assert [tool["name"] for tool in sent["tools"]] == ["Read", "f"] and sent["tool_choice"]["name"] == "Read"
            assert sent["messages"][1]["content"][0]["name"] == "Read"
            assert sent["system"][0]["text"] == pg.OAUTH_IDENTITY
            assert re.findall(r'"name": ?"(\w+)"', result.body.decode()) == ["read"], result.body


# --- The client's own credential --------------------------------------------------------------------------------------

PASSED: List[Tuple[str, Dict[str, str], Dict[str, str]]] = [
    ("messages", {"authorization": "Bearer sk-ant-oat01-client-own"}, {"authorization": "Bearer sk-ant-oat01-client-own"}),
    ("messages", {"x-api-key": "sk-ant-api-client-own"}, {"x-api-key": "sk-ant-api-client-own"}),
    ("chat/completions", {"authorization": "Bearer sk-ant-api-client-own"}, {"x-api-key": "sk-ant-api-client-own"}),
    ("chat/completions", {"authorization": "Bearer sk-ant-oat01-client-own"}, {"authorization": "Bearer sk-ant-oat01-client-own"})]


@pytest.mark.parametrize("client, given, sent", PASSED)
def test_client_s_own_credential_goes_through(tmp_path: Any, client: str, given: Dict[str, str], sent: Dict[str, str]) -> None:
    body = {"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    own = {"user_agent": "claude-cli/9.9 (external)", "x_app": "cli", "anthropic_beta": "oauth-2025-04-20,new-1",
           "x_stainless_lang": "js"}
    with fake_upstream(Answer(200, SIGNED_ANSWER_BYTES)) as fake:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": fake.url}}},
                          auth={"anthropic": {"type": "api_key", "key": "sk-ant-stored"}})
        with running(tmp_path, bind_address="0.0.0.0", api_key="gateway-key-1", pass_through=("anthropic",)) as handle:
            url = handle.url.replace("0.0.0.0", "127.0.0.1")
            result = call(url, f"/v1/{client}?beta=true", body, **own, **{name.replace("-", "_"): value for name, value in given.items()},
                          x_goog_api_key="gateway-key-1")
            received = fake.received[0]
            assert result.status == 200, result.body
            keys = {name: received.headers[name] for name in ("authorization", "x-api-key", "x-goog-api-key")
                    if name in received.headers}
            assert keys == sent and b"stored" not in received.body
            if client == "messages":            # to the byte
                assert json.loads(received.body) == body and received.path == "/v1/messages?beta=true"
                assert {name.replace("_", "-"): received.headers[name.replace("_", "-")] for name in own} == {
                    name.replace("_", "-"): value for name, value in own.items()}
            without = call(url, f"/v1/{client}", body, x_goog_api_key="gateway-key-1")
            assert without.status == 401 and b"client's own" in without.body and len(fake.received) == 1


def test_client_s_own_credential_that_is_refused_is_its_own_business(tmp_path: Any) -> None:
    refusal = json.dumps({"type": "error", "error": {"type": "authentication_error", "message": "OAuth token has expired"}})
    body = {"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    with fake_upstream(Answer(401, refusal.encode())) as fake:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": fake.url}}})
        with running(tmp_path, pass_through=("anthropic",)) as handle:
            result = call(handle.url, "/v1/messages", body, authorization="Bearer sk-ant-oat01-client-own")
            assert (result.status, result.body.decode(), len(fake.received)) == (401, refusal, 1)
            assert any(item["id"].startswith("anthropic/") for item in call(handle.url, "/v1/models").json["data"])


# ======================================================================================================================
# §12 When a provider fails
# ======================================================================================================================

FINE = Answer(200, json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m1", "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode())
ASK: Dict[str, Any] = {"model": "chat/m1", "messages": [{"role": "user", "content": "Hi"}]}


def failing(status: int, message: str = "no", **headers: str) -> Answer:
    return Answer(status, json.dumps({"error": {"message": message, "type": "t"}}).encode(), headers={
        name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture()
def quick(monkeypatch: Any) -> Any:
    """Pauses between tries are too short to notice."""
    monkeypatch.setattr(pg, "RETRY_FIRST_S", 0.001)


@pytest.mark.parametrize("answer, calls, status", [
    (failing(429), 3, 429), (failing(500), 3, 502), (failing(503), 3, 503), (failing(529), 3, 503), (failing(408), 3, 504),
    (failing(409), 3, 409), (Answer(200, b""), 3, 502), (Answer(200, b"<html>"), 3, 502),
    (Answer(200, [b"data: {\"id\"", b""], "text/event-stream"), 3, 502),
    (failing(400), 1, 400), (failing(401), 1, 502), (failing(403), 1, 403), (failing(404), 1, 404), (failing(413), 1, 413),
    (failing(402), 1, 429), (failing(429, "exceeded your current quota"), 1, 429), (failing(302, location="http://x/"), 1, 502),
    (failing(500, x_should_retry="false"), 1, 502), (failing(429, retry_after="31"), 1, 429)])
def test_passing_faults_are_tried_again(tmp_path: Any, quick: Any, answer: Answer, calls: int, status: int) -> None:
    with served(tmp_path, answer, retries=2) as (url, fake):
        result = call(url, "/v1/chat/completions", ASK)
        assert (result.status, len(fake.received)) == (status, calls)
        assert result.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_second_try_that_succeeds_is_the_answer(tmp_path: Any, quick: Any, stream: bool) -> None:
    begun = sse([chunk({"content": "fine"}), *STOP], end="data: [DONE]\n\n")
    answer = Answer(200, begun, "text/event-stream") if stream else FINE
    with served(tmp_path, failing(503, retry_after="0", x_ratelimit_remaining="0"), answer, retries=1) as (url, fake):
        result = call(url, "/v1/chat/completions", {**ASK, "stream": stream})
        assert (result.status, len(fake.received)) == (200, 2) and b"fine" in result.body
        assert "retry-after" not in result.headers and fake.received[0].body == fake.received[1].body


def test_nothing_is_tried_again_once_the_client_has_heard_something(tmp_path: Any, quick: Any) -> None:
    cut = Answer(200, [sse([chunk({"content": "fi"})]), b""], "text/event-stream")
    with served(tmp_path, cut, FINE, retries=2) as (url, fake):
        result = call(url, "/v1/chat/completions", {**ASK, "stream": True})
        assert result.status == 200 and len(fake.received) == 1 and result.events[-1]["error"]["code"] == "stream_incomplete"


@pytest.mark.parametrize("error, number, passed_s, expected", [
    (pg.RateLimited("x"), 0, 0, 0.5), (pg.RateLimited("x"), 2, 0, 2.0), (pg.UpstreamError("x"), 9, 0, 8.0),
    (pg.RateLimited("x", retry_after=3), 0, 0, 3), (pg.RateLimited("x", retry_after=3), 0, 28, None),
    (pg.UpstreamTimeout("x"), 0, 30, None), (pg.QuotaExceeded("x"), 0, 0, None), (pg.BadRequest("x"), 0, 0, None),
    (pg.CredentialRefused("x"), 0, 0, None), (pg.ProviderMisconfigured("x"), 0, 0, None), (pg.Conflict("x"), 0, 0, 0.5)])
def test_retry_pause(error: Any, number: int, passed_s: float, expected: Any) -> None:
    assert pg.retry_pause(error, number, passed_s, 0.0) == expected
    spread = pg.retry_pause(error, number, passed_s, 1.0)
    assert spread == (expected if error.retry_after else expected and expected * 0.75)


UNSUPPORTED: List[Tuple[Dict[str, Any], Tuple[str, str]]] = [
    ({"message": "Unsupported parameter: 'temperature' is not supported with this model.", "param": "temperature",
      "code": "unsupported_parameter"}, ("temperature", "")),
    ({"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."},
     ("max_tokens", "max_completion_tokens")),
    ({"message": "Unsupported value: 'temperature' does not support 0.2 with this model.", "param": "temperature",
      "code": "unsupported_value"}, ("temperature", "")),
    ({"message": "Unrecognized request argument supplied: top_k"}, ("top_k", "")),
    ({"message": "Unknown parameter: 'seed'."}, ("seed", "")),
    ({"message": "parallel_tool_calls: Extra inputs are not permitted"}, ("parallel_tool_calls", "")),
    ({"message": "property 'logit_bias' is unsupported"}, ("logit_bias", "")),
    ({"message": "`temperature` is deprecated for this model."}, ("temperature", "")),
    ({"message": "messages.0.content: Extra inputs are not permitted"}, ("", "")),
    ({"message": "temperature must be at most 1", "param": "temperature", "code": "invalid_value"}, ("", "")),
    ({"message": "The model is not supported"}, ("", "")), ({"message": "bad"}, ("", ""))]


@pytest.mark.parametrize("inner, expected", UNSUPPORTED)
def test_unsupported_parameter_is_named(inner: Dict[str, Any], expected: Tuple[str, str]) -> None:
    assert pg.unsupported_parameter(pg.BadRequest(inner["message"]), json.dumps({"error": inner}).encode()) == expected


def test_parameter_that_a_model_refuses_is_left_out_and_remembered(tmp_path: Any, capsys: Any) -> None:
    refusals = [Answer(400, json.dumps({"error": inner}).encode()) for inner, _ in UNSUPPORTED[:2]]
    asked = {**ASK, "temperature": 0.2, "max_tokens": 5}
    with served(tmp_path, refusals[0], FINE, refusals[1], FINE, facts={"compat": {"maxTokensField": "max_tokens"}}) as (url, fake):
        def turn(**more: Any) -> Result:
            return call(url, "/v1/chat/completions", {**asked, **more})

        first = turn()
        assert first.status == 200 and first.headers["x-pigateway-dropped"] == "temperature"
        assert [("temperature" in json.loads(got.body), len(fake.received)) for got in fake.received] == [(True, 2), (False, 2)]
        assert turn().status == 200             # the second refusal: renamed, so that nothing is lost
        assert json.loads(fake.received[-1].body)["max_completion_tokens"] == 5
        assert turn().headers["x-pigateway-dropped"] == "temperature" and len(fake.received) == 5
        strict = call(url, "/v1/chat/completions", asked, x_pigateway_strict="1")
        assert strict.status == 400 and strict.json["error"]["param"] == "temperature" and len(fake.received) == 5
    stored = os.path.join(str(tmp_path), ".pi", "agent", pg.QUIRKS_FILE)
    assert pg.Quirks(stored).all() == {"chat/m1": {"temperature": "", "max_tokens": "max_completion_tokens"}}
    arguments = pg.build_parser().parse_args(["quirks"])
    assert pg.run_quirks(pg.Quirks(stored), arguments) == 0 and "chat/m1\ttemperature\tleft out" in capsys.readouterr().out
    assert pg.run_quirks(pg.Quirks(stored), pg.build_parser().parse_args(["quirks", "--reset"])) == 0
    assert not os.path.exists(stored) and pg.Quirks(stored).all() == {}


def test_parameter_without_which_a_request_is_another_one_stays(tmp_path: Any) -> None:
    refusal = failing(400, "Unknown parameter: 'tools'.")
    with served(tmp_path, refusal) as (url, fake):
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert call(url, "/v1/chat/completions", {**ASK, "tools": tools}).status == 400 and len(fake.received) == 1


CHAIN = {"both": ["chat/m1", "anth/m1"], "one": "anth/m1", "gone": ["nobody/x", "anth/m1"]}
ANTH_FINE = Answer(200, json.dumps({**SIGNED_ANSWER, "content": [{"type": "text", "text": "other"}]}).encode())


@pytest.mark.parametrize("answer, reason", [
    (failing(429), "rate_limited"), (failing(402), "out_of_quota"), (failing(500), "down"), (failing(529), "overloaded"),
    (failing(400, "prompt is too long: 9 tokens > 8 maximum"), "too_long"), (failing(401), "credential_refused"),
    (failing(403), "forbidden"), (failing(404), "no_such_model"), (Answer(200, b""), "down"),
    (failing(400, "bad request"), "")])
def test_next_model_of_a_chain_has_its_turn(tmp_path: Any, quick: Any, answer: Answer, reason: str) -> None:
    with served(tmp_path, answer, ANTH_FINE, model_map=CHAIN, retries=2) as (url, fake):
        result = call(url, "/v1/chat/completions", {**ASK, "model": "both"})
        assert [received.path for received in fake.received] == ["/v1/chat/completions", "/v1/messages"][:2 if reason else 1]
        assert result.status == (200 if reason else 400)
        if reason:
            assert result.json["model"] == "both" and result.json["choices"][0]["message"]["content"] == "other"
            assert result.headers["x-pigateway-model"] == "anth/m1"
            assert result.headers["x-pigateway-fallback"] == f"chat/m1: {reason}"


def test_model_that_failed_rests(tmp_path: Any) -> None:
    with served(tmp_path, failing(429, retry_after="60"), ANTH_FINE, ANTH_FINE, ANTH_FINE, ANTH_FINE, FINE, model_map=CHAIN,
                ) as (url, fake):
        for _ in range(3):
            assert call(url, "/v1/chat/completions", {**ASK, "model": "both"}).status == 200
        assert [received.path for received in fake.received] == ["/v1/chat/completions"] + ["/v1/messages"] * 3
        assert call(url, "/v1/chat/completions", {**ASK, "model": "one"}).headers["x-pigateway-model"] == "anth/m1"
        assert call(url, "/v1/chat/completions", {**ASK, "model": "gone"}).status == 404
        write_agent_files(tmp_path, auth={"chat": {"type": "api_key", "key": "sk-another-account"}})
        before = len(fake.received)             # another account has not failed
        assert call(url, "/v1/chat/completions", {**ASK, "model": "both"}).status == 200
        assert [received.path for received in fake.received[before:]] == ["/v1/chat/completions"]


def test_last_model_of_a_chain_is_tried_again_as_any_other(tmp_path: Any, quick: Any) -> None:
    with served(tmp_path, failing(503), model_map=CHAIN, retries=1) as (url, fake):
        assert call(url, "/v1/chat/completions", {**ASK, "model": "both"}).status == 503
        assert [received.path for received in fake.received] == ["/v1/chat/completions", "/v1/messages", "/v1/messages"]


@pytest.mark.parametrize("value", [[], {"a": []}, {"a": 1}, {"a": ["x", 2]}, {"a": ""}, "x"])
def test_model_map_is_checked(value: Any) -> None:
    option = next(option for option in pg.OPTIONS if option.key == "modelMap")
    with pytest.raises(pg.ConfigError, match="modelMap must be an object of models"):
        pg.check_option(option, value, "gateway.json")



# --- The model map and piai-router's configuration -----------------------------------------------------------------------

# piai-router 0.1.3's rules, told once more in another way: (name, provider, default model, map) → (label, model, effort).


def told_value(value: Any, provider: str, may_vary: bool = True) -> Optional[Tuple[str, Any]]:
    if isinstance(value, str):
        return (value, None) if value else None
    if any(isinstance(value.get(key), str) for key in ("model", "target", "to")) or "reasoning" in value or "effort" in value:
        found = [value[key] for key in ("model", "target", "to") if value.get(key)]
        return (found[0], value.get("reasoning", value.get("effort"))) if found else None
    for key in (provider, "default"):
        if may_vary and key in value:
            return told_value(value[key], provider, False)
    return None


def told_route(name: str, provider: str, default: str, entries: Dict[str, Any]) -> Tuple[str, str, Any]:
    name = name.strip()
    halves = {key: [half.strip() for half in key.split(":", 1)] if re.fullmatch(r"\s*[^:\s].*?:.*\S.*", key) else ["", key]
              for key in entries}
    tries = []
    if name and provider:
        tries += [("exact_provider", key) for key in entries if key == f"{provider}:{name}"]
    if name:
        tries += [("exact", key) for key in entries if key == name]
        plain = [key for key in entries if key not in ("", "default")]
        if provider:
            tries += [("prefix_provider", key) for key in plain if halves[key][0] == provider and name.startswith(halves[key][1])]
        tries += [("prefix", key) for key in plain if not halves[key][0] and name.startswith(key)]
    tries += [("default", "default")] if "default" in entries else []
    for label, key in tries:
        value = told_value(entries[key], provider)
        if value:
            return (f"{label}:{key}", *value)
    if default and name.startswith("claude-") and "openai" in provider.lower():
        return "fallback_family_mismatch_openai", default, None
    if default and name[:2] in ("o1", "o3", "gp") and re.match("gpt|o1|o3", name) and "anthropic" in provider.lower():
        return "fallback_family_mismatch_anthropic", default, None
    if name:
        return "passthrough", name, None
    return ("fallback_model", default, None) if default else ("hard_default", "gpt-5", None)


ROUTES: List[Tuple[str, str, str, Dict[str, Any], str, str]] = [    # name, provider, default, map, label, model
    ("claude-x", "openai-codex", "F", {}, "fallback_family_mismatch_openai", "F"),
    ("claude-x", "openai-codex", "", {}, "passthrough", "claude-x"),
    ("gpt-5", "anthropic", "F", {}, "fallback_family_mismatch_anthropic", "F"),
    ("o3-mini", "my-Anthropic", "F", {}, "fallback_family_mismatch_anthropic", "F"),
    ("gpt-5", "openai", "F", {}, "passthrough", "gpt-5"),
    ("", "openai", "F", {}, "fallback_model", "F"), ("  ", "openai", "", {}, "hard_default", "gpt-5"),
    ("", "openai", "F", {"default": "D"}, "default:default", "D"),
    ("a", "p", "", {"p:a": "1", "a": "2"}, "exact_provider:p:a", "1"),
    ("a", "q", "", {"p:a": "1", "a": "2"}, "exact:a", "2"),
    (" a ", "q", "", {"a": "2"}, "exact:a", "2"),
    ("abc", "p", "", {"ab": "1", "p:a": "2", "a": "3"}, "prefix_provider:p:a", "2"),
    ("abc", "p", "", {"a": "1", "ab": "2"}, "prefix:a", "1"),
    ("abc", "p", "", {"a": {"q": "1"}, "ab": "2"}, "prefix:ab", "2"),
    ("abc", "p", "", {"q:a": "1", "default": "D"}, "default:default", "D"),
    ("llama3:8b", "p", "", {"llama3:8b": "1"}, "exact:llama3:8b", "1"),
    ("8b", "llama3", "", {"llama3:8b": "1"}, "exact_provider:llama3:8b", "1"),
    ("llama3:8b-x", "p", "", {"llama3:8b": "1"}, "passthrough", "llama3:8b-x"),
    ("a", "p", "", {"a": {"p": "1", "default": "2"}}, "exact:a", "1"),
    ("a", "q", "", {"a": {"p": "1", "default": {"to": "2"}}}, "exact:a", "2"),
    ("a", "q", "", {"a": {"p": "1", "default": {"default": "2"}}}, "passthrough", "a"),
    ("a", "q", "", {"a": {"model": "", "target": "", "to": "3"}}, "exact:a", "3"),
    ("a", "q", "", {"a": {"effort": {"low": "high"}}, "default": "D"}, "default:default", "D"),
    (":a", "p", "", {":a": "1"}, "exact::a", "1"), ("default", "p", "", {"default": "D"}, "exact:default", "D"),
    ("claude-opus-9", "p", "", {"claude-*": "x/*"}, "wildcard:claude-*", "x/opus-9"),
    ("claude-opus-9", "p", "", {"p:*-9": "m", "claude": "n"}, "wildcard:p:*-9", "m"),
    ("claude-opus-9", "q", "", {"p:*-9": "m", "claude": "n"}, "prefix:claude", "n"),
]


@pytest.mark.parametrize("name, provider, default, entries, label, target", ROUTES)
def test_routes(name: str, provider: str, default: str, entries: Dict[str, Any], label: str, target: str) -> None:
    [route] = pg.ModelMap(entries, provider, default).routes(name)
    assert (route.reason, route.model) == (label, target)
    if not any("*" in key for key in entries):
        assert told_route(name, provider, default, entries)[:2] == (label, target)


def test_generated_routes_agree_with_the_rules() -> None:
    rng = random.Random(20261122)
    names = ["claude-sonnet-4-5", "claude-opus-4-6", "claude-", "gpt-5", "gpt-5-mini", "o1", "o3-x", "m", "", " m ", "a:b",
             "default", ":m", "m:"]
    seen = set()
    for _ in range(3000):
        providers = rng.sample(["openai-codex", "anthropic", "p", "OpenAI-like", "a"], 2)
        keys = [rng.choice(["", "", f"{rng.choice(providers)}:"]) + rng.choice(names + ["claude", "g", "default"])
                for _ in range(rng.randint(0, 5))]

        def value(depth: int = 0) -> Any:
            kind = rng.random()
            if kind < 0.5 or depth > 1:
                return rng.choice(["x", "y", "gpt-5", "z/1"])
            if kind < 0.75:
                return {rng.choice(["model", "target", "to"]): rng.choice(["x", "y", ""]),
                        **({rng.choice(["reasoning", "effort"]): {"low": "high"}} if rng.random() < 0.5 else {})}
            return {rng.choice([*providers, "default", "other"]): value(depth + 1) for _ in range(2)}

        entries = {key: value() for key in keys}
        name, default = rng.choice(names), rng.choice(["", "F"])
        wanted = told_route(name, providers[0], default, entries)
        [route] = pg.ModelMap(entries, providers[0], default).routes(name)
        assert (route.reason, route.model, route.effort) == wanted, (name, providers[0], default, entries)
        seen.add(wanted[0].partition(":")[0])
    assert len(seen) == 10


README_EFFORTS = {"low": "minimal", "medium": "medium", "high": "high", "max": "xhigh", "default": "medium"}


@pytest.mark.parametrize("effort, level, mapped", [
    (README_EFFORTS, "minimal", "minimal"), (README_EFFORTS, "low", "minimal"), (README_EFFORTS, "medium", "medium"),
    (README_EFFORTS, "high", "high"), (README_EFFORTS, "xhigh", "xhigh"), (README_EFFORTS, "max", "xhigh"),
    (README_EFFORTS, "off", "medium"), (README_EFFORTS, None, "medium"), ("max", "low", "xhigh"), ("none", "high", "off"),
    ({"high": "none"}, "high", "off"), ({"high": "low"}, "low", None), ({"high": "low"}, None, None), ({}, "high", None),
    ({"none": "low"}, "off", "low"), ({"XHIGH": "Low"}, "max", "low"), ({"high": "nonsense", "default": "low"}, "high", "low"),
    ("nonsense", "high", None), (None, "high", None), (5, "high", None)])
def test_effort_maps(effort: Any, level: Optional[str], mapped: Optional[str]) -> None:
    assert pg.map_effort(effort, level) == mapped


# where a client says how hard to think → the level; by both APIs
EFFORTS: List[Tuple[Dict[str, Any], str]] = [
    ({"effort": "high"}, "high"), ({"effort": "Maximum"}, "max"), ({"effort": "disable"}, "off"),
    ({"metadata": {"effort": "low"}}, "low"), ({"metadata": {"reasoning_effort": "medium"}}, "medium"),
    ({"reasoning": {"effort": "high"}}, "high"), ({"effort": "low", "reasoning": {"effort": "high"}}, "low"),
    ({"effort": "nonsense", "metadata": {"effort": "low"}}, "low"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9000, "effort": "low"}}, "low"),
    ({"thinking": {"type": "disabled"}, "effort": "high"}, "high"),
    *(({"thinking": {"type": "enabled", "budget_tokens": budget}}, level) for budget, level in (
        (2048, "low"), (2049, "medium"), (8192, "medium"), (8193, "high"), (24576, "high"), (24577, "max"))),
]


@pytest.mark.parametrize("fields, level", EFFORTS)
def test_efforts_from_everywhere(fields: Dict[str, Any], level: str) -> None:
    for request in (messages_request(**fields), chat_request(**fields)):
        assert request.reasoning is not None and request.reasoning.level == level
        assert "effort" not in request.extra and "reasoning" not in request.extra


def test_stray_effort_never_reaches_anthropic() -> None:
    fields = {"effort": "high", "max_tokens": 32000}
    request = pg.replace(messages_request(**fields), body=json.dumps({"model": "p/m1", **fields}).encode())
    body = json.loads(native(MESSAGES, request, model("anthropic-messages")).body)
    assert "effort" not in body and body["thinking"]


@pytest.mark.parametrize("target, is_lost", [
    (model(), True), (model(compat={"cacheControlFormat": "anthropic"}), False), (model("anthropic-messages"), False),
    (model("bedrock-converse-stream", id="anthropic.claude-sonnet-4-5"), False), (model("google-generative-ai"), True),
    (model("bedrock-converse-stream", id="meta.llama4"), True)])
def test_cache_marks_are_lost_only_where_there_are_none(target: pg.Model, is_lost: bool) -> None:
    request = messages_request(system=[{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}])
    upstream = pg.UPSTREAM_PROTOCOLS[target.protocol]
    dropped = pg.normalise(request, target, upstream, {})[1]
    assert ("cache_control" in dropped) is is_lost and upstream.marks_cache(target) is not is_lost


ROUTED = {"claude-s": {"model": "chat/m1", "reasoning": {"high": "low", "default": "none"}}, "vip-*": "anth/*",
          "first": [{"model": "chat/m1", "effort": "high"}, "anth/m1"]}


def test_mapped_models_on_both_apis(tmp_path: Any) -> None:
    facts = {"reasoning": True}
    with served(tmp_path, FINE, FINE, FINE, ANTH_FINE, failing(404), ANTH_FINE, facts=facts, model_map=ROUTED) as (url, fake):
        for number, (path, effort) in enumerate((("/v1/messages", "low"), ("/v1/chat/completions", "low"))):
            body = {**ASK, "model": "claude-s", "max_tokens": 9, "effort": "high"}
            result = call(url, path, body)
            assert (result.status, result.json["model"]) == (200, "claude-s")
            assert result.headers["x-pigateway-model"] == "chat/m1"
            sent = fake.received[number].json
            assert (sent["model"], sent["reasoning_effort"]) == ("m1", effort) and "effort" not in sent
        call(url, "/v1/messages", {**ASK, "model": "claude-s", "max_tokens": 9})
        assert fake.received[2].json.get("reasoning_effort") in (None, "none")
        assert call(url, "/v1/messages", {**ASK, "model": "vip-m1", "max_tokens": 9}).json["model"] == "vip-m1"
        assert call(url, "/v1/messages", {**ASK, "model": "first", "max_tokens": 9}).headers["x-pigateway-model"] == "anth/m1"
        assert fake.received[4].json["reasoning_effort"] == "high" and "thinking" not in fake.received[5].json
        listed = [item["id"] for item in call(url, "/v1/models").json["data"]]
        assert {"claude-s", "first", "chat/m1"} <= set(listed) and "vip-*" not in listed and listed == sorted(listed)
        assert call(url, "/v1/models/claude-s").json["id"] == "claude-s"


def test_provider_in_charge_and_default_model(tmp_path: Any) -> None:
    with served(tmp_path, *[FINE] * 6, ANTH_FINE, provider="chat", default_model="m1") as (url, fake):
        for name in ("m1", "unheard-of", "chat/m1", "claude-gw-chat--m1", "", None):
            body = {**ASK, "model": name} if name is not None else {"messages": ASK["messages"]}
            result = call(url, "/v1/chat/completions", body)
            assert (result.status, result.json["model"]) == (200, name or "m1")
        assert [received.json["model"] for received in fake.received] == ["m1", "unheard-of", "m1", "m1", "m1", "m1"]
        assert call(url, "/v1/messages", {**ASK, "model": "anth/m1", "max_tokens": 3}).headers["x-pigateway-model"] == "anth/m1"
    with pytest.raises(pg.ConfigError, match="there is no 'nobody'"), running(tmp_path, provider="nobody"):
        pass


CODEX_ENTRY = {"api": "openai-codex-responses", "authMode": "oauth", "oauthProvider": "openai-codex",
               "authFile": "./piai-auth.json", "baseUrl": "https://chatgpt.com/backend-api",
               "defaultModel": "gpt-5.1-codex-mini"}


def routed_config(home: Any, data: Any, environ: Optional[Dict[str, str]] = None) -> pg.Config:
    """What a configuration file of piai-router's, in its place, comes to."""
    if data is not None:
        (home / ".pirouter").mkdir(exist_ok=True)
        (home / ".pirouter" / "config.json").write_text(json.dumps(data))
    return pg.load_config({"HOME": str(home), **(environ or {})})


# (file, variables) → what becomes of it
ROUTER_CONFIGS: List[Tuple[Optional[Dict[str, Any]], Dict[str, str], Dict[str, Any]]] = [
    ({}, {}, {"port": 8787, "provider": ""}),
    ({"provider": "openai-codex", "providers": {"openai-codex": CODEX_ENTRY}}, {},
     {"port": 8787, "provider": "openai-codex", "default_model": "gpt-5.1-codex-mini"}),
    ({"providers": {"x": {"baseUrl": "http://h/v1"}}}, {}, {"provider": "openai-codex", "default_model": "gpt-5.1-codex-mini"}),
    ({"platform": "anthropic", "provider": "openai"}, {}, {"provider": "openai"}),
    ({"platform": "anthropic"}, {}, {"provider": "anthropic"}),
    ({"upstream": {"provider": "openai", "apiKey": "k", "defaultModel": "m"}}, {}, {
        "provider": "openai", "default_model": "m", "providers": {"openai": {"apiKey": "k", "defaultModel": "m"}}}),
    ({"provider": "openai", "upstream": {"defaultModel": "m"}, "providers": {"openai": {"apiKey": "k"}}}, {}, {
        "default_model": "m", "providers": {"openai": {"apiKey": "k", "defaultModel": "m"}}}),
    ({"gatewayApiKey": "secret", "debug": True, "http": {"maxBodyBytes": 2048, "requestTimeoutMs": 500}}, {}, {
        "api_key": "secret", "log_level": "debug", "max_body_bytes": 2048, "body_timeout_ms": 500}),
    ({"port": 9, "modelMap": {"a": "1", "b": "2"}}, {"MODEL_MAP_JSON": '{"b": "3"}', "PORT": "10"}, {
        "port": 10, "model_map": {"a": "1", "b": "3"}}),
    ({"port": 9, "debug": True}, {"PORT": "0", "DEBUG": "express:*"}, {"port": 9, "log_level": "debug"}),
    ({"debug": False}, {"DEBUG": "yes"}, {"log_level": "debug"}),
    (None, {"PI_API_KEY": "k", "PORT": "8787"}, {"port": 8787, "provider": "openai-codex", "providers": {
        "openai-codex": {"apiKey": "k"}}, "default_model": "gpt-5.1-codex-mini"}),
    (None, {"PI_API_KEY": "k", "PI_API": "openai-codex-responses", "PI_PROVIDER": "openai-codex", "PI_MODEL": "m",
            "PI_BASE_URL": "https://chatgpt.com/backend-api"}, {"port": 4000, "default_model": "m"}),
    (None, {"PI_PROVIDER": "openai", "PIAI_PROVIDER": "anthropic", "MODEL_PLATFORM": "xai"}, {"provider": "anthropic"}),
    (None, {"GATEWAY_API_KEY": "b", "ROUTER_API_KEY": "a"}, {"api_key": "a"}),
    (None, {"ROUTER_API_KEY": "a", "PI_GATEWAY_API_KEY": "own"}, {"api_key": "own"}),
    (None, {"PI_REASONING": "no", "PI_INPUT_TYPES": "text, image", "PI_CONTEXT_WINDOW": "5", "PI_MAX_TOKENS": "x",
            "PI_HEADERS_JSON": '{"a": "b"}', "PI_COMPAT_JSON": "{}", "PI_PROVIDER": "openai"}, {"providers": {"openai": {
                "reasoning": False, "input": ["text", "image"], "contextWindow": 5, "headers": {"a": "b"}, "compat": {}}}}),
]


@pytest.mark.parametrize("data, environ, wanted", ROUTER_CONFIGS)
def test_router_configuration(tmp_path: Any, data: Any, environ: Dict[str, str], wanted: Dict[str, Any]) -> None:
    config = routed_config(tmp_path, data, environ)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("data, environ, message", [
    ({"upstream": []}, {}, "upstream must be an object"), ({"http": {"x": 1}}, {}, 'http: unknown key "x"'),
    ({"providers": {"p": {"apikey": "k"}}}, {}, 'unknown key "apikey"; the nearest valid key is "apiKey"'),
    ({"providers": {"p": {"authMode": "magic"}}}, {}, "authMode must be apiKey or oauth"),
    ({"providers": {"p": {"reasoning": "yes"}}}, {}, "providers.p.reasoning must be a boolean"),
    ({"nonsense": 1}, {}, 'unknown key "nonsense"'), (None, {"MODEL_MAP_JSON": "{"}, "MODEL_MAP_JSON: not valid JSON"),
    (None, {"MODEL_MAP_FILE": "/nowhere/x"}, "/nowhere/x: no such file"), (None, {"MODEL_MAP_JSON": "[]"}, "must be an object")])
def test_router_configuration_faults(tmp_path: Any, data: Any, environ: Dict[str, str], message: str) -> None:
    with pytest.raises(pg.ConfigError) as caught:
        routed_config(tmp_path, data, environ)
    assert message in str(caught.value)


def test_router_file_is_only_read_where_no_other_is(tmp_path: Any) -> None:
    (tmp_path / ".pi" / "agent").mkdir(parents=True)
    (tmp_path / ".pi" / "agent" / "pigateway.json").write_text("{}")
    config = routed_config(tmp_path, {"provider": "openai-codex"})
    assert (config.provider, config.port) == ("", 4000)
    named = pg.load_config({"HOME": str(tmp_path)}, {}, str(tmp_path / ".pirouter" / "config.json"))
    assert (named.provider, named.port) == ("openai-codex", 8787)


def test_router_model_map_file_comes_last(tmp_path: Any) -> None:
    (tmp_path / "map.json").write_text('{"b": "4"}')
    environ = {"MODEL_MAP_JSON": '{"b": "3", "c": "5"}', "MODEL_MAP_FILE": str(tmp_path / "map.json")}
    assert routed_config(tmp_path, {"modelMap": {"a": "1", "b": "2"}}, environ).model_map == {"a": "1", "b": "4", "c": "5"}


def test_router_provider_is_called(tmp_path: Any) -> None:
    """A provider of piai-router's configuration: its key and headers, its model, and the client's key where it has none."""
    with fake_upstream(FINE, FINE) as fake:
        entry = {"api": "openai-completions", "baseUrl": fake.url + "/v1", "headers": {"x-a": "b"}, "defaultModel": "big",
                 "contextWindow": 5000, "reasoning": False}
        for key, sent in (("sk-own-key-1", "Bearer sk-own-key-1"), ("", "Bearer sk-the-clients")):
            config = routed_config(tmp_path, {"port": 0, "provider": "work", "providers": {"work": {**entry, "apiKey": key}}})
            values = {name: getattr(config, name) for name in ("provider", "default_model", "providers")}
            with running(tmp_path, **values) as handle:
                result = call(handle.url, "/v1/messages", {**ASK, "model": "big", "max_tokens": 5, "effort": "high"},
                              authorization="Bearer sk-the-clients")
                assert result.status == 200 and result.headers["x-pigateway-model"] == "work/big"
            received = fake.received[-1]
            assert (received.headers["authorization"], received.headers["x-a"]) == (sent, "b")
            assert "reasoning_effort" not in received.json


def test_router_log_in_file(tmp_path: Any) -> None:
    config = routed_config(tmp_path, {"provider": "work", "providers": {"work": {**CODEX_ENTRY, "authFile": "sub/a.json"}}})
    path = tmp_path / ".pirouter" / "sub" / "a.json"
    assert config.providers["work"]["authFile"] == str(path)
    path.parent.mkdir()
    path.write_text(json.dumps({"openai-codex": {"type": "oauth", "access": "a.b.c", "refresh": "r", "expires": 9e15}}))
    gateway = pg.build_gateway(config, {"HOME": str(tmp_path)})
    provider = gateway.catalogue.providers["work"]
    assert gateway.is_usable(provider) and gateway.credentials.get(provider, model()).kind == "oauth"
    path.unlink()
    assert not pg.build_gateway(config, {"HOME": str(tmp_path)}).is_usable(provider)


# ======================================================================================================================
# §7, §8 and §12 Legacy Completions, and what is not offered
# ======================================================================================================================

# --- Legacy Completions -----------------------------------------------------------------------------------------------

# api.openai.com, gpt-3.5-turbo-instruct, and llama.cpp (usage in the last choice's chunk, an id of chat's form)
TEXT_USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def text_chunk(text: str, reason: Any = None, index: int = 0, **fields: Any) -> Dict[str, Any]:
    return {"id": "cmpl-1", "object": "text_completion", "created": 1760000000, "model": "m1-2026", "choices": [
        {"text": text, "index": index, "logprobs": None, "finish_reason": reason}], **fields}


TEXT_STREAM = [text_chunk("Once "), text_chunk("upon"), text_chunk("", "length"),
               {**text_chunk(""), "choices": [], "usage": TEXT_USAGE}]
TEXT_WHOLE = text_chunk("Once upon", "length", usage=TEXT_USAGE)
LLAMA_STREAM = [text_chunk("Once ", id="chatcmpl-7"), text_chunk("upon", id="chatcmpl-7"),
                text_chunk("", "length", id="chatcmpl-7", usage=TEXT_USAGE, timings={"n": 1})]
TEXT_ASK = {"model": "chat/m1", "prompt": "Tell", "max_tokens": 7}


def text_answer(request: Received) -> Answer:
    """A host that has the path, streamed or whole as asked."""
    if request.json.get("stream"):
        return Answer(200, [sse(TEXT_STREAM, end="[DONE]")], "text/event-stream")
    return Answer(body=json.dumps(TEXT_WHOLE).encode())


def text_of(result: Result) -> str:
    """The text of an answer, joined."""
    objects = [event for event in result.events if event != "[DONE]"] if b"data:" in result.body else [result.json]
    return "".join(choice["text"] for item in objects for choice in item.get("choices", ()))


@pytest.mark.parametrize("extra", [
    {}, {"suffix": "s", "echo": True, "logprobs": 0, "best_of": 2, "n": 2, "own": {"a": 1}}, {"prompt": [1, 2]},
    {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"max_tokens": 0}, {"prompt": ""}])
def test_texts_pass_as_they_are(tmp_path: Any, extra: Dict[str, Any]) -> None:
    with served(tmp_path, text_answer) as (url, fake):
        result = call(url, "/v1/completions", {**TEXT_ASK, **extra})
        assert fake.received[0].path == "/v1/completions"
        assert fake.received[0].json == {**TEXT_ASK, **extra, "model": "m1"}
    assert result.json == {**TEXT_WHOLE, "model": "chat/m1", "system_fingerprint": pg.FINGERPRINT}
    assert result.headers["x-pigateway-lane"] == "native"


@pytest.mark.parametrize("wire", [TEXT_STREAM, LLAMA_STREAM], ids=["OpenAI", "llama.cpp"])
@pytest.mark.parametrize("end", ["[DONE]", ""], ids=["done", "no done"])
@pytest.mark.parametrize("asks_usage", [True, False], ids=["usage", "no usage"])
def test_texts_stream(tmp_path: Any, wire: List[Any], end: str, asks_usage: bool) -> None:
    body = {**TEXT_ASK, "stream": True, **({"stream_options": {"include_usage": True}} if asks_usage else {})}
    with served(tmp_path, Answer(200, [sse(wire, end=end)], "text/event-stream")) as (url, fake):
        result = call(url, "/completions", body)
        assert fake.received[0].json == {**body, "model": "m1", "stream_options": {"include_usage": True}}
    *events, last = result.events
    assert last == "[DONE]" and text_of(result) == "Once upon"
    assert {event["model"] for event in events} == {"chat/m1"} and len({event["id"] for event in events}) == 1
    assert events[0]["id"].startswith("cmpl-")
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons == [None, None, "length"]
    assert [event["usage"] for event in events if event.get("usage")] == ([TEXT_USAGE] if asks_usage else [])


def test_several_texts_stream_side_by_side(tmp_path: Any) -> None:
    wire = [text_chunk("a", index=0), text_chunk("\ud83d", index=1), text_chunk("b", "stop", 0),
            text_chunk("\ude00", "stop", 1)]
    with served(tmp_path, Answer(200, [sse(wire, end="[DONE]")], "text/event-stream")) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "n": 2, "stream": True})
    texts = {index: "".join(choice["text"] for event in result.events[:-1] for choice in event["choices"]
                            if choice["index"] == index) for index in (0, 1)}
    assert texts == {0: "ab", 1: "\U0001f600"}


@pytest.mark.parametrize("pieces, words", [
    ([sse(TEXT_STREAM[:2]), b""], "ended"), ([sse(TEXT_STREAM[:2])], "without its last event"),
    ([sse([*TEXT_STREAM[:2], {"error": {"message": "it broke"}}])], "it broke"),
    ([sse([*TEXT_STREAM[:2], text_chunk("", "error")])], "stopped: error"),
    ([sse(TEXT_STREAM[:2]), b"data: {nonsense\n\n"], "malformed")], ids=["cut", "end", "error", "reason", "nonsense"])
def test_texts_that_break_off(tmp_path: Any, pieces: List[bytes], words: str) -> None:
    with served(tmp_path, Answer(200, pieces, "text/event-stream")) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "stream": True})
    assert result.status == 200 and "[DONE]" not in result.events and text_of(result) == "Once upon"
    assert set(result.events[-1]["error"]) == {"message", "type", "param", "code"}
    assert words == "ended" or words in result.events[-1]["error"]["message"]


@pytest.mark.parametrize("answer, status, words", [
    (Answer(200, [sse([{"error": {"message": "it broke"}}])], "text/event-stream"), 502, "it broke"),
    (Answer(200, [sse([], end="[DONE]")], "text/event-stream"), 502, "empty"),
    (failing(429), 429, "no"), (failing(400, "bad sk-upstream-chat-key"), 400, "bad")])
def test_texts_that_fail_before_they_begin(tmp_path: Any, answer: Answer, status: int, words: str) -> None:
    with served(tmp_path, answer) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "stream": True})
    assert result.status == status and words in result.json["error"]["message"] and b"sk-upstream" not in result.body


def test_text_that_is_empty_is_an_answer(tmp_path: Any) -> None:
    nothing = text_chunk("", "stop", usage={**TEXT_USAGE, "completion_tokens": 0})
    for answer in (Answer(body=json.dumps(nothing).encode()),
                   Answer(200, [sse([nothing], end="[DONE]")], "text/event-stream")):
        with served(tmp_path, answer) as (url, _):
            result = call(url, "/v1/completions", {**TEXT_ASK, "stream": answer.content_type != "application/json"})
        assert result.status == 200 and text_of(result) == ""


@pytest.mark.parametrize("stream", [True, False])
def test_host_that_chooses_the_other_form(tmp_path: Any, stream: bool) -> None:
    answer = (Answer(body=json.dumps(TEXT_WHOLE).encode()) if stream else
              Answer(200, [sse(TEXT_STREAM, end="[DONE]")], "text/event-stream"))
    with served(tmp_path, answer) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "stream": stream})
    assert result.status == 200 and text_of(result) == "Once upon"
    assert (b"[DONE]" in result.body) is stream and result.headers["x-pigateway-lane"] == "translated"


AZURES_NO = Answer(400, b'{"error": {"code": "OperationNotSupported", "message": "not with this model"}}')


@pytest.mark.parametrize("no", [failing(404), failing(501), AZURES_NO], ids=["404", "501", "Azure"])
@pytest.mark.parametrize("stream", [True, False])
def test_host_without_the_path_is_asked_for_chat(tmp_path: Any, no: Answer, stream: bool) -> None:
    with served(tmp_path, no, saying(PLAIN)) as (url, fake):
        result = call(url, "/v1/completions", {**TEXT_ASK, "stream": stream})
        assert [received.path for received in fake.received] == ["/v1/completions", "/v1/chat/completions"]
        assert fake.received[1].json["messages"] == [{"role": "user", "content": "Tell"}]
    assert text_of(result) == SAID and result.headers["x-pigateway-lane"] == "translated"


def test_what_cannot_be_translated_is_not(tmp_path: Any) -> None:
    with served(tmp_path, failing(404, "no such model")) as (url, fake):
        result = call(url, "/v1/completions", {**TEXT_ASK, "suffix": "x"})
        assert (result.status, len(fake.received)) == (404, 1) and result.json["error"]["message"] == "no such model"


@pytest.mark.parametrize("script, reason", [(PLAIN, "stop"), (THINKS, "stop"), (CUT_SHORT, "length")],
                         ids=["text", "thinking", "length"])
@pytest.mark.parametrize("stream", [True, False])
def test_texts_are_translated(tmp_path: Any, script: Script, reason: str, stream: bool) -> None:
    body = {**TEXT_ASK, "model": "anth/m1", "stream": stream, "stop": "END", "temperature": 0.5, "user": "u",
            "stream_options": {"include_usage": True}, "seed": 3, "own": 1}
    with served(tmp_path, saying(script)) as (url, fake):
        result = call(url, "/v1/completions", body)
        sent = fake.received[0].json
    assert sent["messages"][0]["role"] == "user" and "Tell" in json.dumps(sent["messages"])
    assert (sent["max_tokens"], sent["stop_sequences"], sent["temperature"]) == (7, ["END"], 0.5)
    assert text_of(result) == script.text and result.headers["x-pigateway-dropped"] == "own, seed"
    objects = [event for event in result.events if event != "[DONE]"] if stream else [result.json]
    assert {item["object"] for item in objects} == {"text_completion"}
    assert {item["model"] for item in objects} == {"anth/m1"} and (result.events[-1:] == ["[DONE]"]) is stream
    assert [choice["finish_reason"] for item in objects for choice in item["choices"]][-1] == reason
    assert objects[-1]["usage"]["completion_tokens"] == ANSWER_TOKENS


@pytest.mark.parametrize("fields, param", [
    ({"suffix": "s"}, "suffix"), ({"best_of": 2}, "best_of"), ({"echo": True}, "echo"), ({"logprobs": 0}, "logprobs"),
    ({"n": 2}, "n"), ({"prompt": [1, 2]}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": ""}, "prompt"),
    ({"prompt": [[1]]}, "prompt"), ({"max_tokens": 0}, "max_tokens"), ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"), ({"temperature": 3}, "temperature"), ({"stream": "yes"}, "stream")])
def test_texts_that_are_refused(tmp_path: Any, fields: Dict[str, Any], param: str) -> None:
    with served(tmp_path, saying(PLAIN)) as (url, fake):
        result = call(url, "/v1/completions", {**TEXT_ASK, "model": "anth/m1", **fields})
        assert (result.status, result.json["error"]["param"], fake.received) == (400, param, [])


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"best_of": 1}, {"echo": False}, {"logprobs": None}, {"n": 1},
                                    {"prompt": ["Tell"]}, {"stop": None}, {"frequency_penalty": 0}])
def test_fields_of_texts_that_ask_for_nothing(tmp_path: Any, fields: Dict[str, Any]) -> None:
    with served(tmp_path, saying(PLAIN)) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "model": "anth/m1", **fields})
        assert result.status == 200 and "x-pigateway-dropped" not in result.headers


@each_provider
@pytest.mark.parametrize("message", ["", "it broke"], ids=["cut", "error event"])
def test_translated_texts_that_break_off(tmp_path: Any, provider: str, message: str) -> None:
    with served(tmp_path, *([failing(404)] if provider == "chat" else []), breaking(PLAIN, message)) as (url, _):
        result = call(url, "/v1/completions", {**TEXT_ASK, "model": f"{provider}/m1", "stream": True})
    assert result.status == 200 and message in result.events[-1]["error"]["message"] and "[DONE]" not in result.events


def test_demo_texts(tmp_path: Any) -> None:
    with running(tmp_path) as handle:
        for stream in (True, False):
            result = call(handle.url, "/v1/completions", {"model": "demo", "prompt": "Say it", "stream": stream})
            assert text_of(result) == "Say it" and result.headers["x-pigateway-lane"] == "native"
        assert call(handle.url, "/v1/completions", {"model": "demo", "prompt": "x", "echo": True}).status == 400


@needs("openai")
@pytest.mark.parametrize("target", ["chat/m1", "anth/m1", "demo"])
def test_texts_with_the_sdk(tmp_path: Any, target: str) -> None:
    with served(tmp_path, saying(PLAIN) if target == "anth/m1" else text_answer, demo=True) as (url, _):
        client = OpenAISdk(url).client
        whole = client.completions.create(model=target, prompt="Tell", max_tokens=7)
        chunks = list(client.completions.create(model=target, prompt="Tell", max_tokens=7, stream=True,
                                                stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text == {"chat/m1": "Once upon", "anth/m1": SAID, "demo": "Tell"}[target]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens > 0 and whole.model == target


# --- What is not offered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, words", [
    ("/v1/images/generations", "images"), ("/v1/audio/speech", "speech"), ("/audio/transcriptions", "speech"),
    ("/v1/moderations", "moderation"), ("/v1/files", "stored files"), ("/v1/files/file-1/content", "stored files"),
    ("/v1/batches", "batches"), ("/v1/assistants", "assistants"), ("/v1/threads/t/runs", "assistants"),
    ("/v1/vector_stores", "vector stores"), ("/v1/fine_tuning/jobs", "fine-tuning"), ("/v1/uploads", "stored files"),
    ("/v1/messages/batches", "message batches"), ("/v1/messages/batches/b1/results", "message batches"),
    ("/v1/imagesx", "no such path"), ("/v1/nothing", "no such path")])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", [{}, {"anthropic_version": "2023-06-01"}], ids=["openai", "anthropic"])
def test_what_is_not_offered(lone: pg.ServerHandle, path: str, words: str, method: str, headers: Dict[str, str],
                             ) -> None:
    result = call(lone.url, path, {} if method == "POST" else None, method, **headers)
    error = result.json["error"]
    is_messages = bool(headers) or "/messages" in path
    assert result.status == 404 and words in error["message"] and path in error["message"]
    assert ("this gateway does not offer" in error["message"]) == (words != "no such path")
    assert error["type"] == ("not_found_error" if is_messages else "invalid_request_error")
    assert is_messages or error["code"] == "endpoint_not_found"


@pytest.fixture(scope="module")
def lone(tmp_path_factory: Any) -> Iterator[pg.ServerHandle]:
    """A gateway that nothing stands behind."""
    with running(tmp_path_factory.mktemp("lone")) as handle:
        yield handle


# --- Their contract ---------------------------------------------------------------------------------------------------


@needs("jsonschema")
@pytest.mark.parametrize("target", ["chat/m1", "anth/m1", "demo"])
def test_contract_of_texts(tmp_path: Any, target: str, legacy_spec: Any) -> None:
    provider = saying(PLAIN) if target == "anth/m1" else text_answer
    with served(tmp_path, provider, demo=True) as (url, _):
        for extra in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
            body = {**TEXT_ASK, "model": target, **extra}
            fit("openai-completion-request", body)
            assert not told_errors(legacy_spec["CreateCompletionRequest"], body)
            result = call(url, "/v1/completions", body)
            for event in result.events[:-1] if extra else ():
                fit("openai-completion-chunk", event)
            if not extra:
                fit("openai-completion", result.json)
                assert not told_errors(legacy_spec["CreateCompletionResponse"], result.json)
        fit("openai-error", call(url, "/v1/completions", {"model": target}).json)


@pytest.fixture(scope="module")
def legacy_spec() -> Dict[str, Any]:
    """Like `openai_spec`: validators by name, which let everything pass where the document is not at hand."""
    jsonschema = importlib.import_module("jsonschema")
    names = ("CreateCompletionRequest", "CreateCompletionResponse")
    if not os.path.exists(OPENAI_SPEC):
        return {name: jsonschema.Draft202012Validator({}) for name in names}
    with open(OPENAI_SPEC, encoding="utf-8") as file:
        components = nullable(json.load(file)["components"])
    return {name: jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})
            for name in names}


# ======================================================================================================================
# §15 Running in the background, in several processes, and while its files change
# ======================================================================================================================


@pytest.fixture()
def own_home(tmp_path: Any, monkeypatch: Any) -> Any:
    """A home of its own for `main` and for what it starts."""
    for name in [name for name in os.environ if name.startswith(("PI_", "ANTHROPIC_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(pg, "attach_log", lambda *_: None)
    yield tmp_path
    pg.main(["stop"])


def worker_pids(pid: int) -> List[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def test_start_status_restart_stop(own_home: Any, capsys: Any) -> None:
    several = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    assert pg.main(["status"]) == 1 and capsys.readouterr().out == "not running\n"
    assert pg.main(["stop"]) == 1 and "no gateway is running" in capsys.readouterr().err
    assert pg.main(["start", "--port", "0", *(["--workers", "2"] if several else [])]) == 0
    url = re.search(r"http://127.0.0.1:\d+", capsys.readouterr().out).group()
    folder = own_home / ".pi" / "agent"
    assert pg.main(["status", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    pid = int((folder / "gateway.pid").read_text())
    assert facts.pop("uptimeMs") >= 0
    assert facts == {"running": True, "pid": pid, "url": url, "version": pg.VERSION, "models": 1, "streams": 0}
    assert call(url, "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}).status == 200
    assert pg.main(["start"]) == 3 and f"pid {pid}" in capsys.readouterr().err
    if several:                                 # one that dies is replaced, and nobody notices
        workers = worker_pids(pid)
        os.kill(workers[0], signal.SIGKILL)
        until(lambda: len(worker_pids(pid)) == 2 and workers[0] not in worker_pids(pid))
        assert {call(url, "/healthz").status for _ in range(6)} == {200}
    assert pg.main(["restart"]) == 0 and pg.main(["status"]) == 0       # with the options that it had
    assert int((folder / "gateway.pid").read_text()) != pid
    assert pg.PidFile(str(folder / "gateway.pid")).read_state()["argv"][:2] == ["--port", "0"]
    capsys.readouterr()
    assert pg.main(["stop"]) == 0 and pg.main(["status", "--json"]) == 1
    assert '"running": false' in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == ["gateway.log"] and b"Traceback" not in (folder / "gateway.log").read_bytes()
    if os.name == "posix":
        assert os.stat(folder / "gateway.log").st_mode & 0o777 == 0o600


def test_start_that_fails_says_why(own_home: Any, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert pg.main(["start", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_status_of_somebody_else_s_number(own_home: Any, capsys: Any) -> None:
    folder = own_home / ".pi" / "agent"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]) as stranger:
        (folder / "gateway.pid").write_text(str(stranger.pid))
        assert pg.main(["status"]) == 1 and pg.main(["stop"]) == 1 and stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("argv, command, expected", [
    (["start", "--port", "1"], "start", ["--port", "1"]), (["--port", "1", "restart", "--demo"], "restart", ["--port", "1", "--demo"]),
    (["--config", "start", "start"], "start", ["--config", "start"]), (["--strict", "start"], "start", ["--strict"])])
def test_own_arguments(argv: List[str], command: str, expected: List[str]) -> None:
    assert pg.own_arguments(argv, command) == expected


def test_files_that_change_are_read_again(own_home: Any, lines: LogLines) -> None:
    folder = write_agent_files(own_home, models={"providers": {"a": {"baseUrl": "http://127.0.0.1:9", "models": [{"id": "m1"}]}}})
    def load() -> pg.Config:
        return pg.load_config(os.environ, {"port": 0})

    config = load()
    handle = pg.serve(pg.Server(config, pg.build_gateway(config, os.environ)))
    reloader = pg.Reloader(handle, load)
    reloader.PAUSE_S = 0.0

    def ids() -> List[str]:
        reloader.check()
        return [item["id"] for item in call(handle.url, "/v1/models").json["data"]]

    def told() -> str:
        return "\n".join(record.getMessage() for record in lines.records)

    def write(name: str, text: str) -> None:
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)

    try:
        assert ids() == ["a/m1"]
        write("models.json", '{"providers": {"b": {"baseUrl": "http://127.0.0.1:9", "models": [{"id": "m2"}, {"id": "m3"}]}}}')
        assert ids() == ["b/m2", "b/m3"]
        write("models.json", '{"providers": ')
        assert ids() == ["b/m2", "b/m3"] and "not valid JSON" in told()
        write("pigateway.json", '{"modelDenylist": ["m3"], "port": 1}')
        assert ids() == ["b/m2", "b/m3"]        # models.json is still broken, so nothing changes by halves
        write("models.json", '{"providers": {"b": {"baseUrl": "http://127.0.0.1:9", "models": [{"id": "m2"}, {"id": "m3"}]}}}')
        assert ids() == ["b/m2"]
        write("pigateway.json", '{"demoDelayMs": 7, "no": 1}')
        assert ids() == ["b/m2"] and 'unknown key "no"' in told()
        write("pigateway.json", '{"demoDelayMs": 7}')
        assert ids() == ["b/m2", "b/m3"] and "demoDelayMs: changed, but only the next start" in told()
        write("gateway.json", '{"requireKeyOnLoopback": true, "apiKey": "a-new-key-1"}')
        reloader.check()
        assert call(handle.url, "/v1/models").status == 401
    finally:
        end_accepting(handle.server)
        pg.stop_server(handle, 0.1)


# ======================================================================================================================
# §12 The log files
# ======================================================================================================================

LOGGED = {"enabled": True}


def log_folder(home: Any) -> str:
    return os.path.join(str(home), ".pi", "agent", "logs")


def log_records(home: Any, name: str, folder: Optional[str] = None) -> List[Dict[str, Any]]:
    """The records of one of the log files, [] when there is none."""
    path = os.path.join(folder or log_folder(home), f"{name}.log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        return [json.loads(line) for line in file]


class Stall:
    """A disk that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, descriptor: int, data: bytes) -> int:
        self.reached.set()
        self.released.wait(20)
        return os.write(descriptor, data)


@pytest.fixture
def stall() -> Iterator[Stall]:
    made = Stall()
    yield made
    made.released.set()


def journal_at(folder: Any, write: Any = os.write, **settings: Any) -> pg.Journal:
    """A journal that has begun."""
    journal = pg.Journal(pg.LogSettings(True, dir=str(folder), **settings), write)
    journal.start()
    return journal


@pytest.mark.parametrize("name, value, expected", [
    *[(name, "x", True) for name in (
        "authorization", "Proxy-Authorization", "api-key", "api_key", "apiKey", "x-api-key", "X_API_KEY",
        "access_token", "accessToken", "refresh_token", "id_token", "token", "TOKEN", "bearer_tokens", "authTokens",
        "secret", "password", "db_passwd", "client_secret", "private_key", "ssh_key", "sessionid", "Cookie",
        "set-cookie", "token_source")],
    ("password", 1234, True), ("cookie", {"a": "b"}, True), ("secret", ["a"], True),
    *[(name, 7, False) for name in (
        "max_tokens", "budget_tokens", "input_tokens", "output_tokens", "total_tokens", "maxTokens", "MAX_TOKENS",
        "token_count", "tokenBudget", "token")],
    ("max_tokens", "7", False), ("prompt_tokens_details", {"cached_tokens": 1}, False), ("apiKey", None, False),
    ("stream", "x", False), ("author", "x", False), ("keyboard", "x", False), ("content", "my token", False)])
def test_names_that_hide_their_values(name: str, value: Any, expected: bool) -> None:
    assert pg.names_secret(name, value) is expected
    assert pg.hide_secrets({"a": [{name: value}]}, []) == {"a": [{name: pg.HIDDEN if expected else value}]}


@pytest.mark.parametrize("given, expected", [
    ({"say": "it is hunter2hunter2"}, {"say": "it is [redacted]"}),
    ({"arguments": '{"password": "a\\"b", "max_tokens": 5, "user": "u"}'},
     {"arguments": '{"password": "[REDACTED]", "max_tokens": 5, "user": "u"}'}),
    ({"hunter2hunter2": 1}, {"[redacted]": 1}), ("Bearer abcdefgh12345", "Bearer [redacted]"),
    (["sk-0123456789abcdef", 5, None, True], ["[redacted]", 5, None, True])])
def test_hide_secrets(given: Any, expected: Any) -> None:
    assert pg.hide_secrets(given, ["hunter2hunter2"]) == expected
    assert pg.hide_body(json.dumps(given).encode(), ["hunter2hunter2"]) == expected


@pytest.mark.parametrize("body, expected", [
    (b'{"a": 1, "password": "hunt', '{"a": 1, "password": "[REDACTED]"'),
    (b'{"x": "{\\"api_key\\": \\"abc\\", \\"n\\": \\"v\\"}',
     '{"x": "{\\"api_key\\": \\"[REDACTED]\\", \\"n\\": \\"v\\"}'),
    (b'data: {"token":"abc","max_tokens":"7"}\n\n', 'data: {"token":"[REDACTED]","max_tokens":"7"}\n\n'),
    (b'{"password": "abc\\', '{"password": "[REDACTED]"'), (b"NaN", "NaN"), (b"\xff", "\ufffd"), (b"", "")])
def test_hide_body_that_is_no_json(body: bytes, expected: str) -> None:
    assert pg.hide_body(body, []) == expected


def test_hiding_takes_time_in_proportion() -> None:
    for text in ('"' * 400_000, '\\"' * 200_000, '"a":"' * 80_000, '"token":"' + "x" * 400_000,
                 '{"a" :' + " " * 400_000, '\\"a\\":\\"' + "\\" * 400_000):
        spent = time.thread_time()
        pg.hide_text(text, [])
        assert time.thread_time() - spent < 2


@pytest.mark.parametrize("client, stream", [("chat", False), ("chat", True), ("messages", False), ("messages", True)])
def test_conversation_is_logged(tmp_path: Any, client: str, stream: bool) -> None:
    body = question("anth", stream, metadata={"password": "p4ssw0rd", "user_id": "hunter2hunter2"})
    with serving(tmp_path, stream_answer("anth") if stream else whole_answer("anth"), logging=LOGGED,
                 api_key="hunter2hunter2") as (handle, _):
        result = call(handle.url, WAY_IN[client] + "?x=hidden-query", body, x_secret="a-header", user_agent="t/1")
    asked, answered = log_records(tmp_path, "conversation")
    assert list(asked) == ["ts", "event", "id", "model", "modelUsed", "provider", "lane", "stream", "body"]
    assert list(answered)[:11] == [*list(asked)[:8], "status", "latencyMs", "usage"]
    assert [asked["event"], answered["event"]] == ["request", "response"] and asked["ts"] <= answered["ts"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["ts"]) for record in (asked, answered))
    lane = "native" if client == "messages" else "translated"
    for record in (asked, answered):
        assert record["id"] == result.headers["x-request-id"]
        assert (record["model"], record["modelUsed"], record["provider"], record["lane"], record["stream"]) == (
            "anth/m1", "anth/m1", "anth", lane, stream)
    assert asked["body"] == {**body, "metadata": {"password": "[REDACTED]", "user_id": "[redacted]"}}
    assert answered["status"] == 200 and answered["usage"]["output_tokens"] > 0
    assert answered.get("reassembled", False) is stream and "cut" not in answered
    if stream:
        text = answered["body"]["choices"][0]["message"]["content"] if client == "chat" else [
            block["text"] for block in answered["body"]["content"] if block["type"] == "text"][0]
        assert text == answer_text(result)
    else:
        assert answered["body"] == result.json
    start, access, stop = log_records(tmp_path, "server")
    assert [list(record)[:2] for record in (start, access, stop)] == [["ts", "event"]] * 3
    assert [record["event"] for record in (start, access, stop)] == ["server_start", "http_access", "server_stop"]
    assert access["id"] == asked["id"] and access["url"] == WAY_IN[client] and stop["droppedLogs"] == 0
    assert set(access["safeHeaders"]) <= set(pg.LOGGED_HEADERS) and access["safeHeaders"]["user-agent"] == "t/1"
    written = json.dumps([asked, answered, start, access, stop])
    assert not [word for word in ("p4ssw0rd", "hunter2", "sk-upstream", "a-header", "hidden-query") if word in written]


@POSIX
def test_log_files_are_private(tmp_path: Any) -> None:
    with running(tmp_path, logging={**LOGGED, "dir": str(tmp_path / "a" / "b")}) as handle:
        call(handle.url, WAY_IN["chat"], ECHO)
    modes = {os.path.basename(path): os.stat(path).st_mode & 0o777 for path in (
        tmp_path / "a" / "b", *(tmp_path / "a" / "b" / f"{name}.log.jsonl" for name in ("server", "conversation")))}
    assert modes == {"b": 0o700, "server.log.jsonl": 0o600, "conversation.log.jsonl": 0o600}


def test_failures_are_logged(tmp_path: Any) -> None:
    with serving(tmp_path, Answer(400, json.dumps({"error": {"message": "Not sk-upstream-chat-key."}}).encode()),
                 logging=LOGGED) as (handle, _):
        assert call(handle.url, WAY_IN["chat"], question("chat")).status == 400
        assert call(handle.url, WAY_IN["chat"], question("nobody")).status == 404
        assert call(handle.url, WAY_IN["chat"], b'{"token": "abc').status == 400
        assert call(handle.url, "/nowhere").status == 404
        with RawClient(handle.url) as client:
            client.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until(lambda: client.sock.recv(100))
    records = log_records(tmp_path, "conversation")
    assert [record["event"] for record in records] == ["request", "response_error"] * 3
    assert [record["status"] for record in records[1::2]] == [400, 404, 400]
    assert records[1]["body"]["error"]["message"] == "Not [redacted]." and records[1]["error"] == "Not [redacted]."
    assert records[4]["body"] == '{"token": "[REDACTED]"' and records[2]["model"] == "nobody/m1"
    events = log_records(tmp_path, "server")[1:-1]
    assert [(record["event"], record["status"]) for record in events] == [
        ("http_error", status) for status in (400, 404, 400, 404, 400)]


def test_stream_that_breaks_is_logged_as_sent(tmp_path: Any) -> None:
    wire = STREAMS["chat"][:STREAMS["chat"].index(b"\n\n", STREAMS["chat"].index(b"Hel")) + 2]
    with serving(tmp_path, Answer(200, [wire, b""], "text/event-stream"), logging=LOGGED) as (handle, _):
        result = call(handle.url, WAY_IN["chat"], question("chat", True))
    answered = log_records(tmp_path, "conversation")[1]
    assert (answered["event"], answered["status"]) == ("response_error", 200) and answered["error"]
    assert answered["body"].encode() == result.body and "reassembled" not in answered


@pytest.mark.parametrize("stream", [False, True])
def test_large_bodies_are_cut(tmp_path: Any, monkeypatch: Any, stream: bool) -> None:
    monkeypatch.setattr(pg, "LOGGED_BYTES", 1000)
    body = {**ECHO, "stream": stream, "messages": [{"role": "user", "content": "word " * 400}]}
    with running(tmp_path, logging=LOGGED) as handle:
        result = call(handle.url, WAY_IN["chat"], body)
    for record, size in zip(log_records(tmp_path, "conversation"), (len(json.dumps(body)), len(result.body))):
        assert record.get("cut", False) is (size > 1000) is isinstance(record["body"], str)
        assert size <= 1000 or len(record["body"]) == 1000


def test_nothing_is_logged_unless_asked_for(tmp_path: Any) -> None:
    for logging_ in ({}, {"enabled": False, "server": True}, {"enabled": True, "server": False, "conversation": False}):
        with running(tmp_path, logging=logging_) as handle:
            assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
            assert handle.gateway.journal._thread is None
        assert not os.path.exists(log_folder(tmp_path))


@pytest.mark.parametrize("off, expected", [("server", ["conversation.log.jsonl"]),
                                           ("conversation", ["server.log.jsonl"])])
def test_one_of_the_log_files(tmp_path: Any, off: str, expected: List[str]) -> None:
    with running(tmp_path, logging={**LOGGED, off: False}) as handle:
        call(handle.url, WAY_IN["chat"], ECHO)
    assert os.listdir(log_folder(tmp_path)) == expected


@pytest.mark.parametrize("count", [10, 100])
def test_log_file_is_put_aside_when_full(tmp_path: Any, count: int) -> None:
    journal = journal_at(tmp_path, max_file_bytes=4096)
    for number in range(count):                 # each waits for its write, or there would be one
        journal.note("n", number=number, fill="x" * 400)
        until(lambda: not journal._lines)
        journal.PAUSE_S = 0.0                   # type: ignore[misc]
    journal.stop()
    new, old = (log_records(tmp_path, name, str(tmp_path)) if not name.endswith("1") else
                [json.loads(line) for line in (tmp_path / "server.log.jsonl.1").read_text().splitlines()]
                if (tmp_path / "server.log.jsonl.1").exists() else [] for name in ("server", "1"))
    numbers = [record["number"] for record in old + new]
    assert numbers == list(range(count))[-len(numbers):] and len(numbers) >= min(count, 8)
    assert all(path.stat().st_size <= 4096 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2 - (not old)


def test_answers_do_not_wait_for_the_disk(tmp_path: Any, stall: Stall, lines: LogLines) -> None:
    with running(tmp_path, logging={**LOGGED, "maxQueueSize": 10}) as handle:
        journal = handle.gateway.journal
        until(lambda: not journal._lines)
        journal._write = stall
        assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
        assert stall.reached.wait(5)
        started = time.monotonic()
        for _ in range(9):
            assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
        assert time.monotonic() - started < 2
        until(lambda: journal.dropped == 7 * 3)     # three lines each, and ten fit
        stall.released.set()
    assert log_records(tmp_path, "server")[-1]["droppedLogs"] == 21
    assert len(log_records(tmp_path, "conversation")) == 6
    told = [record.getMessage() for record in lines.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "does not keep up" in told[0]


def test_stopping_does_not_wait_for_the_disk(tmp_path: Any, stall: Stall, lines: LogLines) -> None:
    journal = journal_at(tmp_path, stall)
    journal.note("a")
    assert stall.reached.wait(5)
    journal.note("server_stop", is_last=True)
    started = time.monotonic()
    journal.stop()
    assert time.monotonic() - started < 1.2 and journal.dropped == 2
    assert lines.find(lambda record: "2 log records were not written" in record.getMessage())


def test_the_last_record_is_written_when_time_is_short(tmp_path: Any) -> None:
    def write(descriptor: int, data: bytes) -> int:
        time.sleep(0.02)
        return os.write(descriptor, data)

    journal = journal_at(tmp_path, write)
    journal.BATCH, journal.LATE_S = 1, 0.1      # type: ignore[misc]
    for _ in range(100):
        journal.note("n")
    journal.note("server_stop", is_last=True)
    journal.stop()
    records = log_records(tmp_path, "server", str(tmp_path))
    assert len(records) < 100 and records[-1]["droppedLogs"] == 100 - (len(records) - 1) > 0


@POSIX
def test_log_file_that_is_a_pipe_which_nobody_reads(tmp_path: Any) -> None:
    os.makedirs(log_folder(tmp_path))
    path = os.path.join(log_folder(tmp_path), "conversation.log.jsonl")
    os.mkfifo(path)
    with running(tmp_path, logging={**LOGGED, "server": False}) as handle:
        for _ in range(3):
            assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
        thread = handle.gateway.journal._thread
        until(lambda: handle.gateway.journal._lines and not handle.gateway.journal._waiting)
    with open(path, "rb") as file:              # lets the thread go
        assert file.readline().startswith(b'{"ts":')
    assert thread
    thread.join(5)


def test_folder_that_cannot_be_written(tmp_path: Any, lines: LogLines) -> None:
    (tmp_path / "file").write_text("")
    with running(tmp_path, logging={**LOGGED, "dir": str(tmp_path / "file" / "logs")}) as handle:
        for _ in range(3):
            assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
            until(lambda: not handle.gateway.journal._lines)
        assert handle.gateway.journal.dropped == 10
    told = [record.getMessage() for record in lines.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "records are dropped" in told[0]


def test_half_a_line_does_not_stay(tmp_path: Any, lines: LogLines) -> None:
    room = [400]

    def write(descriptor: int, data: bytes) -> int:
        return os.write(descriptor, data[:room[0]])

    journal = journal_at(tmp_path, write)
    for size in (10, 500, 10):
        journal.note("n", fill="x" * size)
        until(lambda: not journal._lines)
    journal.stop()
    assert [len(record["fill"]) for record in log_records(tmp_path, "server", str(tmp_path))] == [10, 10]
    assert journal.dropped == 1 and lines.find(lambda record: "the disk is full" in record.getMessage())


def test_record_that_cannot_be_made_is_left_out(tmp_path: Any) -> None:
    journal = journal_at(tmp_path)
    journal.note("odd", value={1, 2})
    journal.note("even")
    journal.stop()
    assert [record["event"] for record in log_records(tmp_path, "server", str(tmp_path))] == ["even"]
    assert journal.dropped == 1


def test_queue_is_bounded_in_bytes(tmp_path: Any, stall: Stall) -> None:
    journal = journal_at(tmp_path, stall)
    for _ in range(3):
        journal.put(pg.LogEntry(1, pg.Journal.HELD_BYTES // 2, lambda: []))
    assert journal.dropped == 1
    journal.stop()


@pytest.mark.parametrize("value, message", [
    (True, "logging must be an object, not True"),
    ({"enbled": True}, 'unknown key "logging.enbled"; .* "logging.enabled"'),
    ({"enabled": "yes"}, "logging.enabled must be true or false"), ({"dir": 5}, "logging.dir must be a string"),
    ({"maxQueueSize": 1}, "logging.maxQueueSize must be between 10 and"), ({"maxFileBytes": 1.5}, "must be an integer"),
    ({"maxFileBytes": 5}, "logging.maxFileBytes must be at least 4096"), ({"server": None}, "must be true or false")])
def test_logging_key_that_cannot_be_used(tmp_path: Any, value: Any, message: str) -> None:
    write_agent_files(tmp_path, pigateway={"logging": value})
    with pytest.raises(pg.ConfigError, match=f"pigateway.json: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("environ, expected", [
    ({}, {}), ({"PIAI_LOG_ENABLED": "true"}, {"enabled": True}), ({"LOG_ENABLED": "ON"}, {"enabled": True}),
    ({"PIAI_LOG_ENABLED": "0", "LOG_ENABLED": "1"}, {"enabled": False}), ({"PIAI_LOG_ENABLED": "maybe"}, {}),
    ({"PIAI_LOG_SERVER": "No", "PIAI_LOG_CONVERSATION": "yes"}, {"server": False, "conversation": True}),
    ({"LOG_DIR": "b", "PIAI_LOG_DIR": ""}, {"dir": "b"}), ({"LOG_DIR": "b", "PIAI_LOG_DIR": "a"}, {"dir": "a"})])
def test_logging_variables(tmp_path: Any, environ: Dict[str, str], expected: Dict[str, Any]) -> None:
    assert load(tmp_path, **environ).logging == expected
    write_agent_files(tmp_path, pigateway={"logging": {"enabled": True, "server": True, "dir": "c"}})
    assert load(tmp_path, **environ).logging == {"enabled": True, "server": True, "dir": "c", **expected}


@pytest.mark.parametrize("given, expected", [
    ({}, os.path.join(".pi", "agent", "logs")), ({"dir": os.path.join("~", "x")}, "x"),
    ({"dir": ""}, os.path.join(".pi", "agent", "logs"))])
def test_log_folder(tmp_path: Any, monkeypatch: Any, given: Dict[str, Any], expected: str) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    environ = {"HOME": str(tmp_path)}
    assert pg.log_settings(pg.Config(logging=given), environ).dir == os.path.join(str(tmp_path), expected)
    monkeypatch.chdir(tmp_path)
    settings = pg.log_settings(pg.Config(logging={"enabled": True, "dir": "here", "maxQueueSize": 11}), environ)
    assert settings == pg.LogSettings(True, dir=os.path.join(os.getcwd(), "here"), max_queue_size=11)


def test_logging_that_changes_is_taken_over(own_home: Any) -> None:
    folder = write_agent_files(own_home)
    path = os.path.join(folder, "pigateway.json")

    def load() -> pg.Config:
        return pg.load_config(os.environ, {"port": 0})

    config = load()
    handle = pg.serve(pg.Server(config, pg.build_gateway(config, os.environ)))
    reloader = pg.Reloader(handle, load)
    reloader.PAUSE_S = 0.0
    try:
        for place in ("", "one", "two", ""):
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"logging": {"enabled": bool(place), "dir": str(own_home / place)}}, file)
            reloader.check()
            assert handle.gateway.journal.settings.enabled is bool(place)
            assert call(handle.url, WAY_IN["chat"], ECHO).status == 200
            handle.server._wait_idle(2.0)
        for place in ("one", "two"):
            assert [record["event"] for record in log_records(own_home, "conversation", str(own_home / place))] == [
                "request", "response"]
    finally:
        end_accepting(handle.server)
        pg.stop_server(handle, 0.1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_share_the_log_files(tmp_path: Any) -> None:
    children = []
    for child in range(4):
        pid = os.fork()
        if not pid:
            try:
                journal = journal_at(tmp_path, max_file_bytes=60_000)
                journal.PAUSE_S, journal.BATCH = 0.0, 3         # type: ignore[misc]
                for number in range(100):
                    journal.note("n", child=child, number=number, fill="x" * 150)
                journal.stop()
                os._exit(min(journal.dropped, 1))
            finally:
                os._exit(9)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ["server.log.jsonl", "server.log.jsonl.1"]
    texts = [(tmp_path / name).read_text() for name in ("server.log.jsonl.1", "server.log.jsonl")]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    assert all(len(text) <= 60_000 and text.endswith("\n") for text in texts)
    assert len({(record["child"], record["number"]) for record in records}) == len(records) > 200
    for child in range(4):
        numbers = [record["number"] for record in records if record["child"] == child]
        assert numbers == sorted(numbers)


@POSIX
def test_program_with_workers_logs(tmp_path: Any) -> None:
    write_agent_files(tmp_path, pigateway={"logging": LOGGED})
    with launched(tmp_path, "--workers", "2") as made:
        assert "log files" in made.text("out")
        assert {call(made.url, WAY_IN["chat"], ECHO).status for _ in range(8)} == {200}
        assert made.stop()[0] == 0
    events = [record["event"] for record in log_records(tmp_path, "server")]
    assert sorted(events) == ["http_access"] * 8 + ["server_start"] * 2 + ["server_stop"] * 2
    assert len(log_records(tmp_path, "conversation")) == 16


# ======================================================================================================================
# §11 Images by address
# ======================================================================================================================

TINY_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")

ADDRESSES = [
    ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
    ("192.168.1.1", False), ("169.254.169.254", False), ("0.0.0.0", False), ("100.64.0.1", False), ("224.0.0.1", False),
    ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False),
    ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::a00:1", False),
    ("2002:7f00:1::", False), ("2002:a00:1::", False), ("not an address", False)]


@pytest.mark.parametrize("address, public", ADDRESSES)
def test_public_addresses(address: str, public: bool) -> None:
    assert pg.is_public(address) == public


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/a.png", "http://localhost:{port}/a.png", "http://[::1]:{port}/a.png",
                                 "http://0.0.0.0:{port}/a.png", "http://2130706433:{port}/", "http://0x7f.1:{port}/",
                                 "http://user@127.0.0.1:{port}/a.png", "http://169.254.169.254/latest/meta-data"])
def test_nothing_is_fetched_from_this_machine_or_its_network(url: str) -> None:
    with fake_upstream(Answer(200, TINY_PNG, "image/png")) as fake:
        with pytest.raises(pg.BadRequest, match="cannot be fetched"):
            pg.MediaFetcher().fetch(pg.Image(url=url.format(port=fake.server.server_address[1])))
        assert fake.received == []


MEDIA: List[Tuple[Answer, str]] = [
    (Answer(200, TINY_PNG, "text/html"), ""), (Answer(404, TINY_PNG), "answered 404"), (Answer(200, b"<html>", "image/png"), "no image"),
    (Answer(200, b""), "no image"), (Answer(200, b"%PDF-1.7", "image/png"), "no image"),
    (Answer(200, TINY_PNG + bytes(300)), "more than 0 MiB"), (Answer(200, [TINY_PNG, bytes(300)]), "longer than 256"),
    (Answer(302, b"", headers={"location": "http://169.254.169.254/"}), "not on the open internet"),
    (Answer(302, b"", headers={"location": "file:///etc/passwd"}), "no address to fetch"),
    (Answer(302, b"", headers={"location": "/again"}), "too many redirects")]


@pytest.mark.parametrize("answer, problem", MEDIA)
def test_what_is_fetched_is_checked(monkeypatch: Any, answer: Answer, problem: str) -> None:
    monkeypatch.setattr(pg, "MEDIA_BYTES", 256)
    real = pg.is_public
    monkeypatch.setattr(pg, "is_public", lambda address: address == "127.0.0.1" or real(address))
    with fake_upstream(answer) as fake:
        def fetch() -> Any:
            return pg.MediaFetcher().fetch(pg.Image(url=fake.url + "/a?b=c"))

        if problem:
            with pytest.raises(pg.BadRequest, match=problem):
                fetch()
        else:
            assert fetch() == pg.Image("image/png", base64.b64encode(TINY_PNG).decode())
        assert "authorization" not in fake.received[0].headers and fake.received[0].path == "/a?b=c"


def test_name_that_changes_its_address_is_called_where_it_was_checked(monkeypatch: Any) -> None:
    """DNS rebinding: the second look-up would give this machine."""
    called: List[Any] = []
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))],
               [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(socket, "create_connection", lambda address, *_: called.append(address))
    pg.connect_public(("changing.example", 80))
    assert called == [("93.184.216.34", 80)]
    with pytest.raises(pg.PrivateAddress):
        pg.connect_public(("changing.example", 80))


@pytest.mark.parametrize("host, is_refused", [("localhost", True), ("router", True), ("metadata.internal", True),
                                              ("127.0.0.1", True), ("unknown.invalid", False)])
def test_names_behind_a_proxy(host: str, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(pg.PrivateAddress):
            pg.check_public_name(host)
    else:
        pg.check_public_name(host)


def test_image_by_address_reaches_a_provider_that_wants_bytes(tmp_path: Any, monkeypatch: Any) -> None:
    real = pg.is_public
    monkeypatch.setattr(pg, "is_public", lambda address: address == "127.0.0.1" or real(address))
    with fake_upstream(Answer(200, TINY_PNG, "image/png")) as pictures_at, fake_upstream(Answer(500, b"{}")) as fake:
        write_agent_files(tmp_path, models={"providers": {"bed": {
            "baseUrl": fake.url, "api": "bedrock-converse-stream", "apiKey": "sk-upstream-bedrock-key",
            "models": [{"id": "m1", "input": ["text", "image"]}]}}})
        with running(tmp_path) as handle:
            content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": pictures_at.url}}]
            result = call(handle.url, "/v1/chat/completions", {"model": "bed/m1", "messages": [
                {"role": "user", "content": content}]})
            assert result.status == 502, result.body
            blocks = json.loads(fake.received[0].body)["messages"][0]["content"]
            assert {"image": {"format": "png", "source": {"bytes": base64.b64encode(TINY_PNG).decode()}}} in blocks
            too_many = call(handle.url, "/v1/chat/completions", {"model": "bed/m1", "messages": [
                {"role": "user", "content": content[1:] * (pg.MEDIA_COUNT + 1)}]})
            assert too_many.status == 400 and len(fake.received) == 1


# ======================================================================================================================
# What an attacker tried on log-ins, seals and passed credentials
# ======================================================================================================================


def test_renewal_that_takes_long_is_still_written(tmp_path: Any, monkeypatch: Any) -> None:
    """Nobody joins a lock that is held for long, but its holder may go on."""
    monkeypatch.setattr(pg, "LOCK_JOIN_S", -1.0)
    vendor = FakeVendor()
    store = logins(tmp_path, vendor, xai=log_in_entry())
    started = time.monotonic()
    assert store.current("xai")["access"] == "a1" and time.monotonic() - started < 5
    assert json.loads((tmp_path / "auth.json").read_text(encoding="utf-8"))["xai"]["refresh"] == "r1"


def test_lock_that_is_a_dangling_link_does_not_spin(tmp_path: Any) -> None:
    if os.name != "posix":
        pytest.skip("links need rights there")
    (tmp_path / "auth.json.lock").symlink_to(tmp_path / "nowhere")
    spent = time.thread_time()
    with pytest.raises(pg.AuthFileError):
        with pg.FileLock(str(tmp_path / "auth.json")).held(0.2):
            pass
    assert time.thread_time() - spent < 0.15


def test_accounts_in_words(tmp_path: Any, capsys: Any) -> None:
    hour = 3600
    entries = {"anthropic": log_in_entry(5.2 * hour), "xai": log_in_entry(-1), "openrouter": {
        "type": "oauth", "access": "k", "refresh": "", "expires": pg.NEVER_MS}, "radius": log_in_entry(-1),
        "groq": {"type": "api_key", "key": "k"}, "meta": log_in_entry(90.4), "kimi-coding": {**log_in_entry(), "expires": 10 ** 400}}
    assert pg.print_accounts(auth_file(tmp_path, entries), False) == 0
    told = {line.split()[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}
    assert told == {"anthropic": "token good for 5 hours, then renewed", "xai": "is renewed at the next request",
                    "openrouter": "does not expire", "radius": "has expired; log in again", "kimi-coding": "does not expire",
                    "meta": "token good for 90 seconds, then renewed"}
    assert pg.print_accounts(auth_file(tmp_path), True) == 0
    rows = {row["provider"]: row for row in json.loads(capsys.readouterr().out)}
    assert abs(rows["anthropic"]["expiresAt"] - time.time() - 5.2 * hour) < 5 and rows["openrouter"]["expiresAt"] is None


def test_refused_token_is_renewed_for_all_who_had_it(tmp_path: Any) -> None:
    vendor = FakeVendor()
    vendor.hanging = "xai"
    vendor.gate.clear()
    store = logins(tmp_path, vendor, xai=log_in_entry(4000))
    told: List[bool] = []
    threads = [threading.Thread(target=lambda: told.append(store.replace_refused("xai", "a0"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: vendor.calls)
    vendor.gate.set()
    for thread in threads:
        thread.join(5)
    assert told == [True] * 8 and vendor.calls == ["xai"]
    assert not store.replace_refused("xai", "a1") and vendor.calls == ["xai"]       # not again and again


def test_vendor_s_words_hide_what_is_secret(tmp_path: Any, lines: LogLines) -> None:
    vendor = FakeVendor()
    vendor.failure = pg.VendorReply(400, {"error": "invalid_grant", "error_description":
                                          "1//opaque-refresh of ada@mail.example \x1b[2J\r\nrevoked"})
    entry = {**log_in_entry(), "refresh": "1//opaque-refresh", "email": "ada@mail.example"}
    store = logins(tmp_path, vendor, xai=entry)
    with pytest.raises(pg.LogInOver) as caught:
        store.current("xai")
    written = caught.value.message + "".join(record.getMessage() for record in lines.records)
    assert "revoked" in written and not re.search(r"opaque|ada@|[\x00-\x09\x0b-\x1f]", written), written


@pytest.mark.parametrize("number", [10 ** 400, -1, float("nan"), True, [], "x", None, 1e300])
def test_odd_numbers_of_a_vendor(number: Any) -> None:
    assert pg.SUBSCRIPTIONS["xai"].expiry(number, 0) == 3_300_000


@pytest.mark.parametrize("fields", [{"access_token": "a\r\nb"}, {"access_token": 5}, {"access_token": ""},
                                    {"access_token": "ä"}, {}])
def test_tokens_that_no_header_can_carry(fields: Dict[str, Any]) -> None:
    with pytest.raises(pg.UpstreamProtocolError):
        pg.SUBSCRIPTIONS["xai"].read({"refresh_token": "r", **fields}, 0)


def test_spent_token_has_its_successor_even_where_the_account_is_missing() -> None:
    entry = pg.SUBSCRIPTIONS["openai-codex"].read({"access_token": "no-jwt", "refresh_token": "r2"}, 0, {"refresh": "r1"})
    assert entry["refresh"] == "r2"
    with pytest.raises(pg.Unauthorized):
        pg.SUBSCRIPTIONS["openai-codex"].read({"access_token": "no-jwt", "refresh_token": "r2"}, 0)


PASTED = [
    ("http://localhost:1/cb?code=C&state=S", "C"), ("HTTP://LOCALHOST:1/cb?state=S&code=C#x", "C"), ("localhost:1/cb?code=C", "C"),
    ("?code=C&state=S", "C"), ("code=C&state=S", "C"), ("C#S", "C"), ("C", "C"), ("4/0Ab-C_d", "4/0Ab-C_d"),
    ("http://localhost:1/cb?code=C&state=T", "state is not ours"), ("C#T", "state is not ours"),
    ("http://localhost:1/cb?error=access_denied&state=S", "refused in the browser"), ("http://[::1/cb?code=C", "C"),
    ("http://localhost:1/cb", "no code in that"), ("http://localhost:1/cb?state=S", "no code in that")]


@pytest.mark.parametrize("text, expected", PASTED)
def test_pasted_addresses(text: str, expected: str) -> None:
    try:
        assert pg.read_return(text, "S") == expected
    except pg.LogInFailed as error:
        assert expected in str(error)


def test_aborted_callback_is_an_answer_all_the_same() -> None:
    answers: Any = queue.Queue()
    server = pg.CallbackServer(("127.0.0.1", 0), "/cb", "S", answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(b"GET /cb?code=C&state=S HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert answers.get(timeout=5) == ("callback", "code=C&state=S")
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert [call(url, path).status for path in ("/cb?code=D&state=S", "/cb?code=D&state=T", "/x", "/cb?error=e")] == [
            409, 400, 404, 400] and answers.empty()
    finally:
        server.shutdown()
        server.server_close()


def test_personal_plans_stay_hidden_whatever_opens_them(tmp_path: Any) -> None:
    write_agent_files(tmp_path, models={"providers": {"openai-codex": {"apiKey": "sk-from-the-file-1"}}})
    with running(tmp_path, {"COPILOT_GITHUB_TOKEN": "gho_planted_0123456789"}, bind_address="0.0.0.0",
                 api_key="gateway-key-1") as handle:
        url = handle.url.replace("0.0.0.0", "127.0.0.1")
        listed = {item["owned_by"] for item in call(url, "/v1/models", authorization="Bearer gateway-key-1").json["data"]}
        assert listed == {"demo"}
        for name in ("github-copilot/gpt-5", "openai-codex/gpt-5.1"):
            result = call(url, "/v1/chat/completions", {**ASK, "model": name}, authorization="Bearer gateway-key-1")
            assert (result.status, result.json["error"]["code"]) == (403, "subscription_exposure_disabled")


@pytest.mark.parametrize("details", [5, True, 1.5, "x", {}, [5], [[]], [{"data": 5}], None])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_odd_reasoning_details_are_no_internal_error(tmp_path: Any, role: str, details: Any) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}, {"role": role, "content": "x", "reasoning_details": details}]}
    with running(tmp_path) as handle:
        assert call(handle.url, "/v1/chat/completions", body).status in (200, 400)


@pytest.mark.parametrize("signature", ["\ud800", 5, [], None])
def test_odd_signatures_of_a_provider_are_no_internal_error(tmp_path: Any, signature: Any) -> None:
    answer = {**SIGNED_ANSWER, "content": [{"type": "thinking", "thinking": "Hmm", "signature": signature},
                                           {"type": "text", "text": "Yes."}, {"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    with served(tmp_path, Answer(200, json.dumps(answer).encode())) as (url, _):
        for path in ("messages", "chat/completions"):
            assert call(url, f"/v1/{path}", {**ASK, "model": "anth/m1", "max_tokens": 9}).status in (200, 502)


def test_identity_in_a_user_s_words_is_not_the_system_s(tmp_path: Any) -> None:
    with fake_upstream(Answer(200, SIGNED_ANSWER_BYTES)) as fake:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": fake.url}}}, auth={"anthropic": log_in_entry(4000)})
        with running(tmp_path) as handle:
            for system, count in ((None, 1), ("Be brief.", 2), (pg.OAUTH_IDENTITY, 1), ([{"type": "text", "text": pg.OAUTH_IDENTITY}], 1)):
                body = {"model": "anthropic/claude-sonnet-4-5", "max_tokens": 9, **({"system": system} if system else {}),
                        "messages": [{"role": "user", "content": f"Who said {pg.OAUTH_IDENTITY}"}]}
                assert call(handle.url, "/v1/messages", body).status == 200
                sent = json.loads(fake.received[-1].body)["system"]
                blocks = [sent] if isinstance(sent, str) else [item["text"] for item in sent]
                assert blocks[0] == pg.OAUTH_IDENTITY and len(blocks) == count


OWN_KEY_PLACES: List[Tuple[str, Dict[str, str]]] = [
    ("", {"x_api_key": "gateway-key-1"}), ("", {"x_goog_api_key": "gateway-key-1"}), ("?key=gateway-key-1&beta=true", {}),
    ("", {"api_key": "gateway-key-1"}), ("", {"x_other": "gateway-key-1"}), ("", {"x_hop": "1", "connection": "x-hop"})]


@pytest.mark.parametrize("query, headers", OWN_KEY_PLACES)
def test_key_of_this_gateway_never_goes_on(tmp_path: Any, query: str, headers: Dict[str, str]) -> None:
    body = {"model": "anthropic/claude-sonnet-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    with fake_upstream(Answer(200, SIGNED_ANSWER_BYTES)) as fake:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": fake.url, "headers": {
            "X-Api-Key": "sk-ant-operator-own", "x-team": "t"}}}})
        with running(tmp_path, api_key="gateway-key-1", pass_through=("anthropic",)) as handle:
            result = call(handle.url, f"/v1/messages{query}", body, authorization="Bearer sk-ant-oat01-client-own", **headers)
            sent = str(fake.received[0].headers) + fake.received[0].path
            assert result.status == 200 and "gateway-key-1" not in sent and "operator" not in sent and "x-hop" not in sent
            assert fake.received[0].headers["x-team"] == "t" and "client-own" in fake.received[0].headers["authorization"]
            for odd in ("Basic gateway-key-1", "token abcdef", "Bearer", "Bearer "):
                assert call(handle.url, "/v1/messages", body, authorization=odd).status == 401
            assert len(fake.received) == 1


def test_client_s_own_credential_is_not_shown_to_the_next_of_a_chain(tmp_path: Any) -> None:
    with fake_upstream(failing(401)) as first, fake_upstream(FINE) as second:
        write_agent_files(tmp_path, models={"providers": {"anthropic": {"baseUrl": first.url}, "groq": {"baseUrl": second.url},
                                                          "local": {"baseUrl": second.url}}})
        chain = {"m": ["anthropic/claude-sonnet-4-5", "groq/x"], "n": ["anthropic/claude-sonnet-4-5", "local/x"]}
        with running(tmp_path, pass_through=("anthropic", "groq"), model_map=chain) as handle:
            for name in chain:
                result = call(handle.url, "/v1/messages", {**ASK, "model": name, "max_tokens": 9}, authorization="Bearer sk-ant-oat01-own")
                assert result.status == 401 and [got for got in second.received if got.method == "POST"] == []


def test_vendor_that_hangs_is_asked_by_one_process_in_a_while(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "HANGING_S", -1.0)
    first, second = FakeVendor(), FakeVendor()
    first.failure = pg.VendorReply(500, {"error_description": "down, a0"})
    for vendor in (first, second):
        store = logins(tmp_path, vendor, xai=log_in_entry()) if vendor is first else pg.Logins(
            pg.AuthFile(str(tmp_path / "auth.json")), vendor)
        with pytest.raises(pg.UpstreamError, match="down"):
            store.current("xai")
    assert (first.calls, second.calls) == (["xai"], [])
    auth_file(tmp_path, {"xai": {**log_in_entry(-5), "access": "another"}})
    assert pg.Logins(pg.AuthFile(str(tmp_path / "auth.json")), second).current("xai")["access"] == "a1"


def test_auth_file_that_cannot_be_replaced_is_overwritten(tmp_path: Any, monkeypatch: Any) -> None:
    """A file that is mounted by itself, as containers do."""
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    file = auth_file(tmp_path, {**OTHER_ENTRIES, "xai": {"type": "api_key", "key": "k" * 999}})
    inode = os.stat(file.path).st_ino
    monkeypatch.setattr(pg, "replace_file", busy)
    file.change("xai", lambda old: {"type": "api_key", "key": "k"})
    assert os.stat(file.path).st_ino == inode and file.load() == {**OTHER_ENTRIES, "xai": {"type": "api_key", "key": "k"}}
    assert os.listdir(tmp_path) == ["auth.json"]


# --- The extension for pi ---------------------------------------------------------------------------------------------


def test_pi_extension_is_written_and_a_stranger_s_is_not_overwritten(own_home: Any, capsys: Any) -> None:
    path = own_home / ".pi" / "agent" / "extensions" / "pigateway.ts"
    assert pg.main(["pi-extension"]) == 2 and not path.exists()
    for _ in range(2):                          # its own older copy is replaced
        assert pg.main(["pi-extension", "--install"]) == 0
    text = path.read_text(encoding="utf-8")
    assert json.dumps(os.path.abspath(pg.__file__)) in text and json.dumps(sys.executable) in text and "__PY" not in text
    path.write_text(text + "// mine", encoding="utf-8")
    assert pg.main(["pi-extension", "--install"]) == 2 and path.read_text(encoding="utf-8").endswith("// mine")
    assert "--force" in capsys.readouterr().err
    assert pg.main(["pi-extension", "--install", "--force"]) == 0 and path.read_text(encoding="utf-8") == text


# --- Signs of life, and two models in one request ---------------------------------------------------------------------


@pytest.mark.parametrize("model_name, path, beat, begin", [
    ("chat/m1", "chat/completions", b": processing\n\n", sse([chunk({"content": "fi"})])),
    ("chat/m1", "messages", b": processing\n\n", sse([chunk({"content": "fi"})])),
    ("anth/m1", "messages", b'event: ping\ndata: {"type": "ping"}\n\n', sse([{"type": "message_start", "message": {
        **SIGNED_ANSWER, "content": [], "stop_reason": None}}, {"type": "content_block_start", "index": 0, "content_block": {
            "type": "text", "text": ""}}])), ("chat/m1", "chat/completions", b": processing\n\n", b"")])
def test_signs_of_life_do_not_hide_a_dead_provider(tmp_path: Any, model_name: str, path: str, beat: bytes, begin: bytes) -> None:
    answer = Answer(200, [piece for piece in [begin, *[beat, 0.02] * 100] if piece], "text/event-stream")
    with served(tmp_path, answer, idle_timeout_ms=150, first_byte_timeout_ms=150) as (url, _):
        started = time.monotonic()
        result = call(url, f"/v1/{path}", {**ASK, "model": model_name, "max_tokens": 9, "stream": True})
        assert time.monotonic() - started < 1.5
        if begin:
            assert "signs of life" in str(result.events[-1]["error"])
        else:
            assert result.status == 504


@pytest.mark.parametrize("text", ['{"model": "anth/m2", "model": "anth/m1"', '{"mod\\u0065l": "anth/m2", "model": "anth/m1"',
                                  '{"model": "anth/m2", "\\u006dodel": "anth/m1"'])
def test_model_that_is_named_twice_is_the_one_that_was_checked(tmp_path: Any, text: str) -> None:
    body = (text + ', "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}').encode()
    with served(tmp_path, Answer(200, SIGNED_ANSWER_BYTES), model_allowlist=("anth/m1",)) as (url, fake):
        assert call(url, "/v1/messages", body).status == 200
        pairs = json.loads(fake.received[0].body, object_pairs_hook=lambda pairs: pairs)
        assert [value for name, value in pairs if name == "model"] == ["m1"]


def test_model_inside_the_conversation_is_nobody_s_business() -> None:
    assert not pg.has_repeated_keys(b'{"model": "a", "metadata": {"model": "b"}, "x": "\\u0041"}')


# ======================================================================================================================
# Log-ins: the vendors' authorisation servers at their own host names
# ======================================================================================================================
#
# `login` runs as shipped. HTTPS_PROXY leads it to `FakeVendors`, which refuses what the vendors would refuse: another
# client, redirect or scope, a verifier that does not fit, a code or a refresh token for the second time.

def reserve_port(port: int) -> Optional[socket.socket]:
    """Keeps the system from giving a port, which vendors know by its number, to somebody else meanwhile: bound, but not
    listened on, it is free for those who ask for it by number."""
    for _ in range(50):                         # a connection of somebody else may have it for a moment
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return sock
        except OSError:
            sock.close()
            time.sleep(0.2)
    return None


RESERVED = [reserve_port(port) for port in (53692, 1455, 8085, 51121)] if sys.platform == "linux" else []

LOGIN_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
LOGIN_ENTERPRISE = "ghe.example.com"
LOGIN_EMAIL, LOGIN_ACCOUNT = "ada.lovelace@mail.example", "0f6f4c1e-5a7b-4a0e-9d5c-8f2b7c3d1e90"
LOGIN_PROJECT = "grid-project"                  # the one that the fake of Cloud Code Assist knows
ABSENT = object()                               # the value of a field that is not there
LOGIN_SCENARIOS = ("", "deny", "expire", "slow_down", "down")


class Ask(NamedTuple):
    """A request to a vendor."""

    method: str
    host: str
    path: str
    query: Dict[str, str]
    headers: Dict[str, str]
    body: bytes

    @property
    def form(self) -> Dict[str, str]:
        demand(self.headers.get("content-type", "").split(";")[0] == "application/x-www-form-urlencoded", "no form")
        return demand_once(self.body.decode("ascii"))

    @property
    def json(self) -> Dict[str, Any]:
        demand(self.headers.get("content-type") == "application/json", "not JSON")
        return json_object(self.body, "body")

    @property
    def bearer(self) -> str:
        return self.headers.get("authorization", "").partition("Bearer ")[2]


def demand_once(text: str) -> Dict[str, str]:
    """The fields of a query or form, none of them twice."""
    pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    demand(len({name for name, _ in pairs}) == len(pairs), f"a field twice: {[name for name, _ in pairs]}")
    return dict(pairs)


def demand_exact(given: Dict[str, Any], where: str, **expected: Any) -> None:
    """Refuses missing, unknown and wrong fields. Expected is a value or a pattern; `None` means any non-empty text."""
    demand(set(given) == set(expected), f"{where}: has {sorted(given)}, not {sorted(expected)}")
    for name, value in expected.items():
        has = given[name]
        demand(value.fullmatch(has) if isinstance(value, re.Pattern) else has == value if value is not None else
               isinstance(has, str) and has, f"{where}: {name} is {has!r}")


def demand_headers(ask: Ask, **expected: str) -> None:
    for name, value in expected.items():
        has = ask.headers.get(name.replace("_", "-"))
        demand(has == value, f"{ask.path}: header {name} is {has!r}")


def json_answer(status: int = 200, **fields: Any) -> Answer:
    return Answer(status, json.dumps(fields).encode())


def oauth_error(name: str, status: int = 400, **fields: Any) -> Answer:
    return json_answer(status, error=name, error_description=f"The vendor says {name}.", **fields)


def web_page(title: str, **links: str) -> Answer:
    """A page with links, each with its name as id."""
    body = "".join(f'<p><a id="{name}" href="{url.replace("&", "&amp;")}">{name.title()}</a></p>'
                   for name, url in links.items())
    text = f"<!doctype html><html><head><title>{title}</title></head><body><h1>{title}</h1>{body}</body></html>"
    return Answer(200, text.encode(), "text/html; charset=utf-8")


def to_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class FakeLogin:
    """The log-in servers of one vendor. `routes` maps "METHOD host/path" patterns to methods."""

    provider = client = scope = ""
    routes: Dict[str, str] = {}
    shapes = ("access-", "refresh-")
    lifetime_s = 3600
    rotates = True

    def __init__(self, world: FakeVendors) -> None:
        self.world = world
        self.access = self.refresh = ""
        self.live: set[str] = set()             # access tokens that the API takes
        self.steps: List[str] = []              # the methods that ran
        self.redirect = ""

    def claims(self, ask: Ask) -> bool:
        """Whether a request to a host that vendors share is for this one."""
        text = urllib.parse.unquote(f"{ask.query} {ask.body.decode('latin-1')}")
        return bool(self.client and self.client in text or ask.bearer in self.live)

    def issue(self, **more: Any) -> Dict[str, Any]:
        """A new access token, and a new refresh token where they rotate; the ones before are void."""
        self.access = self.new_access()
        self.live = {self.access}
        if self.rotates or not self.refresh:
            self.refresh = self.world.secret(self.shapes[1])
        return {"token_type": "Bearer", "access_token": self.access, "refresh_token": self.refresh,
                "expires_in": self.lifetime_s, **more}

    def new_access(self) -> str:
        return self.world.secret(self.shapes[0])

    def renew(self, given: Any) -> Answer:
        """The answer to a refresh token. A used one ends what it was for, as RFC 9700 §4.14.2 has it."""
        if given != self.refresh or not self.refresh:
            return oauth_error("invalid_grant")
        return json_answer(**self.issue())

    def log_in(self) -> None:
        """Somebody has logged in before."""
        self.issue()

    def stored(self) -> Dict[str, Any]:
        """What auth.json has to hold after log-in, but for `expires`."""
        return {"type": "oauth", "access": self.access, "refresh": self.refresh}

    margin_s = 300

    def check_stored(self, entry: Dict[str, Any], began: float) -> None:
        """The entry has what it should have; `expires` may be early by the vendor's margin."""
        entry, expected = dict(entry), self.stored()
        expires = entry.pop("expires")
        assert type(expires) is int and -1000 <= expires - self.earliest(began) and expires <= self.latest() + 1000
        for fields in (entry, expected):
            fields["availableModelIds"] = sorted(fields.get("availableModelIds", ()))
        assert entry == expected

    def earliest(self, began: float) -> float:
        return (began + self.lifetime_s - self.margin_s) * 1000

    def latest(self) -> float:
        return (time.time() + self.lifetime_s - min(self.margin_s, self.lifetime_s / 10)) * 1000


class LoopbackLogin(FakeLogin):
    """Authorisation code with PKCE: the browser comes back to the client's own port."""

    extra: Dict[str, str] = {}                  # fixed fields of the authorize URL
    redirects: Any = None
    deny_fields: Dict[str, str] = {"error": "access_denied", "error_description": "The user said no"}

    def __init__(self, world: FakeVendors) -> None:
        super().__init__(world)
        self.grants: List[Dict[str, str]] = []
        self.codes: Dict[str, Dict[str, str]] = {}
        self.used: set[str] = set()

    def authorize(self, ask: Ask) -> Answer:
        """The consent page."""
        demand_exact(ask.query, "authorize URL", client_id=self.client, response_type="code", scope=self.scope,
                     redirect_uri=self.redirects, code_challenge=re.compile(r"[A-Za-z0-9_-]{43}"),
                     code_challenge_method="S256", state=re.compile(r"[\x21-\x7e]{16,}"), **self.extra)
        self.world.demand_new(ask.query["state"])
        return self.consent_page(ask.query)

    def consent_page(self, grant: Dict[str, str]) -> Answer:
        self.world.demand_new(grant["code_challenge"])
        self.grants.append(grant)
        choose = f"/fake-consent?client_id={urllib.parse.quote(self.client)}&grant={len(self.grants) - 1}&"
        return web_page(f"Log in to {self.provider}", allow=choose + "allow=1", deny=choose + "allow=0")

    def consent(self, ask: Ask) -> Answer:
        """A click on the consent page: back to the client."""
        grant = self.grants[int(ask.query["grant"])]
        fields = dict(self.deny_fields)
        if ask.query["allow"] == "1" and self.world.scenario != "deny":
            code = self.world.secret("code_")
            self.codes[code] = grant
            fields = self.callback_fields(code, grant)
        if "state" in grant:
            fields["state"] = grant["state"]
        back = grant.get("redirect_uri") or grant["callback_url"]
        return Answer(302, headers={"location": f"{back}?{urllib.parse.urlencode(fields)}"})

    def callback_fields(self, code: str, grant: Dict[str, str]) -> Dict[str, str]:
        return {"code": code}

    def take_code(self, fields: Dict[str, Any]) -> Optional[Dict[str, str]]:
        """What a code stands for, once; None when nobody issued it."""
        code, verifier = fields["code"], fields["code_verifier"]
        self.world.secrets.append(verifier)
        demand(code not in self.used, "a code for the second time")
        grant = self.codes.pop(code, None)
        self.used.add(code)
        if grant is None or self.world.scenario == "expire":
            return None
        demand(re.fullmatch(r"[A-Za-z0-9._~-]{43,128}", verifier), "code_verifier")
        demand(to_base64url(hashlib.sha256(verifier.encode()).digest()) == grant["code_challenge"], "PKCE")
        demand(not any(verifier in value for value in grant.values()), "the verifier went through the browser")
        demand(fields.get("redirect_uri") == grant.get("redirect_uri"), "another redirect_uri than at the start")
        demand(fields.get("state", grant.get("state")) == grant.get("state"), "another state than at the start")
        return grant

    def token(self, ask: Ask) -> Answer:
        """The token endpoint."""
        fields = self.fields_of(ask)
        if fields.get("grant_type") == "refresh_token":
            demand_exact(fields, "refresh", grant_type="refresh_token", client_id=self.client, refresh_token=None,
                         **self.own_fields)
            return self.renew(fields["refresh_token"])
        demand_exact(fields, "exchange", grant_type="authorization_code", client_id=self.client, code=None,
                     code_verifier=None, redirect_uri=None, **self.own_fields, **self.exchange_fields)
        if self.take_code(fields) is None:
            return oauth_error("invalid_grant")
        return json_answer(**self.issue(**self.told()))

    own_fields: Dict[str, Any] = {}
    exchange_fields: Dict[str, Any] = {}

    def fields_of(self, ask: Ask) -> Dict[str, Any]:
        return ask.form

    def told(self) -> Dict[str, Any]:
        """What else comes with a log-in."""
        return {"scope": self.scope}


class AnthropicLogin(LoopbackLogin):
    provider, client = "anthropic", "9d1c250a-e61b-44d9-88ed-5944d1962f5e"
    scope = ("org:create_api_key user:profile user:inference user:sessions:claude_code user:mcp_servers "
             "user:file_upload")
    routes = {"GET claude.ai/oauth/authorize": "authorize", "GET claude.ai/fake-consent": "consent",
              "GET platform.claude.com/oauth/code/callback": "show_code",
              "POST platform.claude.com/v1/oauth/token": "token"}
    extra = {"code": "true"}
    redirects = re.compile("http://localhost:53692/callback|https://platform.claude.com/oauth/code/callback")
    exchange_fields = {"state": None}
    shapes = ("sk-ant-oat01-", "sk-ant-ort01-")
    lifetime_s = 28800

    def show_code(self, ask: Ask) -> Answer:
        return web_page(f"{ask.query['code']}#{ask.query['state']}")

    def fields_of(self, ask: Ask) -> Dict[str, Any]:
        demand_headers(ask, accept="application/json")
        return ask.json

    def told(self) -> Dict[str, Any]:
        return {"scope": self.scope, "organization": {"uuid": LOGIN_ACCOUNT, "name": "Ada's"},
                "account": {"uuid": LOGIN_ACCOUNT, "email_address": LOGIN_EMAIL}}


class CodexLogin(LoopbackLogin):
    provider, client = "openai-codex", "app_EMoamEEZ73f0CkXaXp7hrann"
    scope = "openid profile email offline_access"
    routes = {"GET auth.openai.com/oauth/authorize": "authorize", "GET auth.openai.com/fake-consent": "consent",
              "POST auth.openai.com/oauth/token": "token",
              "POST auth.openai.com/api/accounts/deviceauth/usercode": "device",
              "POST auth.openai.com/api/accounts/deviceauth/token": "poll",
              "GET auth.openai.com/codex/device": "enter", "GET auth.openai.com/fake-decision": "decide"}
    extra = {"id_token_add_organizations": "true", "codex_cli_simplified_flow": "true"}
    redirects = "http://localhost:1455/auth/callback"
    device_redirect = "https://auth.openai.com/deviceauth/callback"
    shapes = ("", "rt_")
    lifetime_s = 864000
    margin_s = 0

    def authorize(self, ask: Ask) -> Answer:
        originator = ask.query.pop("originator", "")
        demand(re.fullmatch("[a-z_-]+", originator), "originator")
        return super().authorize(ask)

    def callback_fields(self, code: str, grant: Dict[str, str]) -> Dict[str, str]:
        return {"code": code, "scope": self.scope}

    def new_access(self) -> str:
        claims = {"https://api.openai.com/auth": {"chatgpt_account_id": LOGIN_ACCOUNT, "chatgpt_plan_type": "plus"},
                  "exp": 1, "jti": self.world.secret("jti-"), "odd": "\u00ff\u00fe???"}
        return self.jwt(claims)

    def jwt(self, claims: Dict[str, Any]) -> str:
        parts = [json.dumps({"alg": "RS256"}).encode(), json.dumps(claims, ensure_ascii=False).encode(), b"signature"]
        token = ".".join(map(to_base64url, parts))
        self.world.secrets.append(token)
        return token

    def told(self) -> Dict[str, Any]:
        return {"scope": self.scope, "id_token": self.jwt({"email": LOGIN_EMAIL})}

    def stored(self) -> Dict[str, Any]:
        return {**super().stored(), "accountId": LOGIN_ACCOUNT}

    # --- the device flow: the vendor makes verifier and code itself

    def device(self, ask: Ask) -> Answer:
        demand_exact(ask.json, "usercode", client_id=self.client)
        self.device_grant = DeviceGrant(self.world, self.world.secret("deviceauth_"), "ABCD-12345")
        return json_answer(device_auth_id=self.device_grant.code, user_code=self.device_grant.user_code, interval="5")

    def poll(self, ask: Ask) -> Answer:
        grant = self.device_grant
        demand_exact(ask.json, "poll", device_auth_id=grant.code, user_code=grant.user_code)
        said = grant.poll()
        if said == "authorization_pending":
            return json_answer(403, error={"code": "deviceauth_authorization_pending", "message": "not yet"})
        if said:
            return json_answer(429 if said == "slow_down" else 400, error={"code": said, "message": said})
        verifier, code = self.world.secret("verifier-" + "v" * 34), self.world.secret("code_")
        challenge = to_base64url(hashlib.sha256(verifier.encode()).digest())
        self.codes[code] = {"code_challenge": challenge, "redirect_uri": self.device_redirect}
        return json_answer(authorization_code=code, code_verifier=verifier, code_challenge=challenge)

    def enter(self, ask: Ask) -> Answer:
        return self.device_grant.page(self)

    def decide(self, ask: Ask) -> Answer:
        return self.device_grant.decide(ask)


class DeviceGrant:
    """A device code on its way: what its polls hear. Attended, the user decides on the page; else the world's list of
    answers runs out, which is agreement."""

    def __init__(self, world: FakeVendors, code: str, user_code: str) -> None:
        self.world, self.code, self.user_code = world, code, user_code
        self.polls = list(world.polls)
        self.decision: Optional[str] = None if world.is_attended else ""
        self.is_used = False
        self.polled_at = 0.0

    def page(self, vendor: FakeLogin) -> Answer:
        choose = f"/fake-decision?client_id={vendor.client}&allow="
        return web_page(f"Enter {self.user_code} for {vendor.provider}?", allow=choose + "1", deny=choose + "0")

    def decide(self, ask: Ask) -> Answer:
        self.decision = "" if ask.query["allow"] == "1" else "access_denied"
        return web_page("Thank you. You can close this page.")

    def poll(self) -> str:
        """The error that a poll hears, "" for none."""
        demand(not self.is_used, "a device code for the second time")
        passed_s, self.polled_at = time.monotonic() - self.polled_at, time.monotonic()
        if self.world.is_attended and passed_s < 0.9:       # unattended, waits are cut short
            return "slow_down"
        scripted = {"deny": "access_denied", "expire": "expired_token"}.get(self.world.scenario)
        said = self.polls.pop(0) if self.polls else scripted or self.decision
        self.is_used = not said and said is not None
        return "authorization_pending" if said is None else said


class DeviceLogin(FakeLogin):
    """RFC 8628."""

    device_fields: Dict[str, Any] = {}
    poll_fields: Dict[str, Any] = {}
    page_url = ""
    user_code = "WXYZ-2345"
    offers: Dict[str, Any] = {"interval": 5, "expires_in": 900}
    error_status = 400

    def check_device(self, ask: Ask) -> None:
        """What only this vendor asks for."""

    def device(self, ask: Ask) -> Answer:
        self.check_device(ask)
        demand_exact(ask.form, "device", client_id=self.client, **self.device_fields)
        self.grant = DeviceGrant(self.world, self.world.secret("device_"), self.user_code)
        return json_answer(device_code=self.grant.code, user_code=self.user_code, **self.pages(), **self.offers)

    def pages(self) -> Dict[str, Any]:
        return {"verification_uri": self.page_url, "verification_uri_complete":
                f"{self.page_url}?user_code={self.user_code}"}

    def token(self, ask: Ask) -> Answer:
        fields = ask.form
        if fields.get("grant_type") == "refresh_token":
            demand_exact(fields, "refresh", grant_type="refresh_token", client_id=self.client, refresh_token=None)
            return self.renew(fields["refresh_token"])
        return self.poll(ask)

    def poll(self, ask: Ask) -> Answer:
        self.check_device(ask)
        demand_exact(ask.form, "poll", client_id=self.client, device_code=self.grant.code,
                     grant_type=LOGIN_DEVICE_GRANT)
        said = self.grant.poll()
        if said:
            name, _, interval = said.partition(" ")
            return oauth_error(name, self.error_status, **({"interval": int(interval)} if interval else {}))
        return json_answer(**self.granted())

    def granted(self) -> Dict[str, Any]:
        return self.issue()

    def enter(self, ask: Ask) -> Answer:
        return self.grant.page(self)

    def decide(self, ask: Ask) -> Answer:
        return self.grant.decide(ask)


COPILOT_HEADERS = {"user_agent": "GitHubCopilotChat/0.35.0", "editor_version": "vscode/1.107.0",
                   "editor_plugin_version": "copilot-chat/0.35.0", "copilot_integration_id": "vscode-chat"}


def copilot_model(model_id: str, picker: bool = True, state: str = "enabled", tools: bool = True) -> Dict[str, Any]:
    return {"id": model_id, "model_picker_enabled": picker, **({"policy": {"state": state}} if state else {}),
            "capabilities": {"type": "chat", "supports": {"tool_calls": tools}},
            "supported_endpoints": ["/chat/completions"]}


class CopilotLogin(DeviceLogin):
    provider, client = "github-copilot", "Iv1.b507a08c87ecfe98"
    domains = f"(github.com|{LOGIN_ENTERPRISE})"
    bases = f"(api.individual.githubcopilot.com|copilot-api.{LOGIN_ENTERPRISE})"
    routes = {f"POST {domains}/login/device/code": "device", f"POST {domains}/login/oauth/access_token": "poll",
              f"GET {domains}/login/device": "enter", f"GET {domains}/fake-decision": "decide",
              f"GET api.{domains}/copilot_internal/v2/token": "copilot_token", f"GET {bases}/models": "models",
              f"POST {bases}/models/[^/]+/policy": "policy"}
    device_fields = {"scope": "read:user"}
    error_status = 200
    lifetime_s = 1500

    def __init__(self, world: FakeVendors) -> None:
        super().__init__(world)
        self.domain = ""
        self.offered = [copilot_model("gpt-5.6-luna"), copilot_model("gemini-3.8-flash", state=""),
                        copilot_model("claude-sonnet-5", state="unconfigured"),
                        copilot_model("gpt-6-luna", state="disabled"), copilot_model("grok-4.5", tools=False),
                        copilot_model("kimi-k3", picker=False, state="unconfigured"),
                        copilot_model("unheard-of-1", state="unconfigured")]
        self.enabled: List[str] = []

    def check_device(self, ask: Ask) -> None:
        demand_headers(ask, accept="application/json", user_agent=COPILOT_HEADERS["user_agent"])
        demand(not self.domain or ask.host == self.domain, "another domain than at the start")
        self.domain = ask.host
        self.page_url = f"https://{self.domain}/login/device"

    def pages(self) -> Dict[str, Any]:
        return {"verification_uri": self.page_url}

    def granted(self) -> Dict[str, Any]:
        self.refresh = self.world.secret("gho_")
        return {"access_token": self.refresh, "token_type": "bearer", "scope": "read:user"}

    def copilot_token(self, ask: Ask) -> Answer:
        demand_headers(ask, **COPILOT_HEADERS)
        demand(self.world.is_attended or ask.host == "api." + (self.domain or ask.host[4:]), "another domain")
        if not self.refresh or ask.bearer != self.refresh:
            return json_answer(401, message="Bad credentials", documentation_url="https://docs.github.com/rest")
        self.domain = ask.host[4:]
        expires = self.new_session()
        return json_answer(token=self.access, expires_at=expires, refresh_in=self.lifetime_s - 300)

    def new_session(self) -> int:
        """A new Copilot token; when it ends."""
        proxy = "proxy-ep=proxy.individual.githubcopilot.com;" if self.domain == "github.com" else ""
        expires = int(time.time()) + self.lifetime_s
        self.access = f"tid={self.world.secret('tid')};exp={expires};sku=free;{proxy}st=dotcom;8kp=1:0a1b"
        self.live = {self.access}
        return expires

    def log_in(self) -> None:
        self.domain = "github.com"
        self.granted()
        self.new_session()

    def models(self, ask: Ask) -> Answer:
        demand_headers(ask, x_github_api_version="2026-06-01", **COPILOT_HEADERS)
        if ask.bearer not in self.live:
            return Answer(401, b"unauthorized: token expired\n", "text/plain")
        return json_answer(object="list", data=self.offered)

    def policy(self, ask: Ask) -> Answer:
        demand_headers(ask, openai_intent="chat-policy", x_interaction_type="chat-policy", **COPILOT_HEADERS)
        demand_exact(ask.json, "policy", state="enabled")
        demand(ask.bearer in self.live, "another token")
        self.enabled.append(ask.path.split("/")[2])
        return json_answer()

    def stored(self) -> Dict[str, Any]:
        own = {"enterpriseUrl": self.domain} if self.domain not in ("", "github.com") else {}
        return {**super().stored(), **own, "availableModelIds": ["gpt-5.6-luna", "gemini-3.8-flash", "claude-sonnet-5",
                                                                 "unheard-of-1"]}


GOOGLE_METADATA = {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}


class GeminiLogin(LoopbackLogin):
    provider = "google-gemini-cli"
    client = "681255809395-oo8ft2oprdrnp9e3aqf6av3hmdib135j.apps.googleusercontent.com"
    own_fields = {"client_secret": base64.b64decode("R09DU1BYLTR1SGdNUG0tMW83U2stZ2VWNkN1NWNsWEZzeGw=").decode()}
    scope = " ".join("https://www.googleapis.com/auth/" + name for name in (
        "cloud-platform", "userinfo.email", "userinfo.profile"))
    routes = {"GET accounts.google.com/o/oauth2/v2/auth": "authorize",
              "GET accounts.google.com/fake-consent": "consent", "POST oauth2.googleapis.com/token": "token",
              "GET www.googleapis.com/oauth2/v[12]/userinfo": "userinfo",
              "POST cloudcode-pa.googleapis.com/v1internal:loadCodeAssist": "load",
              "POST cloudcode-pa.googleapis.com/v1internal:onboardUser": "onboard",
              "GET cloudcode-pa.googleapis.com/v1internal/operations/.*": "operation"}
    extra = {"access_type": "offline", "prompt": "consent"}
    redirects = "http://localhost:8085/oauth2callback"
    shapes = ("ya29.", "1//0")
    lifetime_s = 3599
    rotates = False
    agent = {"user_agent": "google-api-nodejs-client/9.15.1", "x_goog_api_client": "gl-node/22.17.0"}

    def __init__(self, world: FakeVendors) -> None:
        super().__init__(world)
        self.project = LOGIN_PROJECT            # of the account
        self.own_project = ""                   # the one that the user has to name
        self.loaded: Dict[str, Any] = {"currentTier": {"id": "free-tier"}, "cloudaicompanionProject": LOGIN_PROJECT}
        self.polls_left = 2

    def callback_fields(self, code: str, grant: Dict[str, str]) -> Dict[str, str]:
        return {"iss": "https://accounts.google.com", "code": code, "scope": self.scope, "authuser": "0",
                "prompt": "consent"}

    def renew(self, given: Any) -> Answer:
        answer = super().renew(given)
        fields = json.loads(answer.body)
        fields.pop("refresh_token", None)       # Google says it once, at the first consent
        return Answer(answer.status, json.dumps(fields).encode())

    def userinfo(self, ask: Ask) -> Answer:
        demand(ask.query == {"alt": "json"} and ask.bearer == self.access, "userinfo")
        return json_answer(id="1", email=LOGIN_EMAIL, verified_email=True)

    def check_internal(self, ask: Ask) -> None:
        demand_headers(ask, content_type="application/json", **self.agent)
        demand(ask.bearer == self.access, "another token")

    def metadata(self) -> Dict[str, Any]:
        return {**GOOGLE_METADATA, **({"duetProject": self.own_project} if self.own_project else {})}

    def load(self, ask: Ask) -> Answer:
        self.check_internal(ask)
        own = {"cloudaicompanionProject": self.own_project} if self.own_project else {}
        demand_exact(ask.json, "loadCodeAssist", metadata=self.metadata(), **own)
        return json_answer(**self.loaded)

    def onboard(self, ask: Ask) -> Answer:
        self.check_internal(ask)
        tiers = [tier["id"] for tier in self.loaded.get("allowedTiers", ()) if tier.get("isDefault")]
        tier = tiers[0] if tiers else "legacy-tier"
        own = {} if tier == "free-tier" else {"cloudaicompanionProject": self.own_project}
        metadata = GOOGLE_METADATA if tier == "free-tier" else self.metadata()
        demand_exact(ask.json, "onboardUser", tierId=tier, metadata=metadata, **own)
        return json_answer(name="operations/onboard.1", done=False)

    def operation(self, ask: Ask) -> Answer:
        demand_headers(ask, **self.agent)
        demand(ask.bearer == self.access and ask.path.endswith("/operations/onboard.1"), "another operation")
        self.polls_left -= 1
        if self.polls_left > 0:
            return json_answer(name="operations/onboard.1")
        return json_answer(name="operations/onboard.1", done=True, response={
            "cloudaicompanionProject": {"id": self.project, "name": "p"}})

    def stored(self) -> Dict[str, Any]:
        return {**super().stored(), "projectId": self.project, "email": LOGIN_EMAIL}


class AntigravityLogin(GeminiLogin):
    provider = "google-antigravity"
    client = "1071006060591-tmhssin2h21lcre235vtolojh4g403ep.apps.googleusercontent.com"
    own_fields = {"client_secret": base64.b64decode("R09DU1BYLUs1OEZXUjQ4NkxkTEoxbUxCOHNYQzR6NnFEQWY=").decode()}
    scope = " ".join([GeminiLogin.scope, *("https://www.googleapis.com/auth/" + name for name in (
        "cclog", "experimentsandconfigs"))])
    hosts = "(cloudcode-pa|daily-cloudcode-pa|daily-cloudcode-pa.sandbox).googleapis.com"
    routes = {**{route: step for route, step in GeminiLogin.routes.items() if "cloudcode" not in route},
              f"POST {hosts}/v1internal:loadCodeAssist": "load", f"POST {hosts}/v1internal:onboardUser": "onboard"}
    redirects = "http://localhost:51121/oauth-callback"
    agent = {"user_agent": "google-api-nodejs-client/9.15.1",
             "x_goog_api_client": "google-cloud-sdk vscode_cloudshelleditor/0.1"}

    def load(self, ask: Ask) -> Answer:
        self.check_internal(ask)
        demand(json.loads(ask.headers["client-metadata"]) == GOOGLE_METADATA, "client-metadata")
        demand_exact(ask.json, "loadCodeAssist", metadata=GOOGLE_METADATA)
        return json_answer(**self.loaded)


class XaiLogin(DeviceLogin):
    provider, client = "xai", "b1a00492-073a-47ea-816f-4c329264a828"
    routes = {"POST auth.x.ai/oauth2/device/code": "device", "POST auth.x.ai/oauth2/token": "token",
              "GET auth.x.ai/device": "enter", "GET auth.x.ai/fake-decision": "decide"}
    device_fields = {"scope": "openid profile email offline_access grok-cli:access api:access",
                     "referrer": re.compile("[a-z]+")}
    page_url = "https://auth.x.ai/device"
    offers = {"expires_in": 1800}                # without an interval
    shapes = ("xai-oauth-", "xai-refresh-")
    lifetime_s = 21600


class KimiLogin(DeviceLogin):
    provider, client = "kimi-coding", "17e5f671-d194-4dfb-9706-5516cb48c098"
    routes = {"POST auth.kimi.com/api/oauth/device_authorization": "device",
              "POST auth.kimi.com/api/oauth/token": "token", "GET auth.kimi.com/device": "enter",
              "GET auth.kimi.com/fake-decision": "decide"}
    page_url = "https://auth.kimi.com/device"
    shapes = ("kimi-access-", "kimi-refresh-")
    lifetime_s = 7200
    margin_s = 0


class MetaLogin(DeviceLogin):
    provider, client = "meta", "1031625952748946"
    routes = {"POST auth.meta.com/oidc/device/authorization/": "device",
              "POST auth.meta.com/oidc/device/token/": "poll", "GET auth.meta.com/device": "enter",
              "GET auth.meta.com/fake-decision": "decide",
              "POST api.meta.ai/muse-code/key": "mint"}
    page_url = "https://auth.meta.com/device"
    lifetime_s = 86400
    margin_s = 0

    def granted(self) -> Dict[str, Any]:
        self.refresh = self.world.secret("meta-identity-")
        return {"access_token": self.refresh, "token_type": "bearer", "expires_in": 5184000}

    def mint(self, ask: Ask) -> Answer:
        demand_headers(ask, accept="application/json", x_api_version="1.0.0")
        demand_exact(ask.json, "mint")
        if not self.refresh or ask.bearer != self.refresh:
            return json_answer(401, message="The identity token is not valid")
        self.new_key()
        return json_answer(api_key=self.access)

    def new_key(self) -> None:
        self.access = self.world.secret("LLM|meta-")
        self.live = {self.access}

    def log_in(self) -> None:
        self.granted()
        self.new_key()


class OpenRouterLogin(LoopbackLogin):
    provider = "openrouter"
    routes = {"GET openrouter.ai/auth": "authorize", "GET openrouter.ai/fake-consent": "consent",
              "POST openrouter.ai/api/v1/auth/keys": "key"}
    redirects = re.compile(r"http://(localhost|127\.0\.0\.1):\d+/oauth/callback/[A-Za-z0-9_-]{16,}")

    def authorize(self, ask: Ask) -> Answer:
        demand_exact(ask.query, "authorize URL", callback_url=self.redirects, code_challenge_method="S256",
                     code_challenge=re.compile(r"[A-Za-z0-9_-]{43}"))
        self.world.demand_new(ask.query["callback_url"].rpartition("/")[2])
        return self.consent_page(ask.query)

    def key(self, ask: Ask) -> Answer:
        demand_exact(ask.json, "keys", code=None, code_verifier=None, code_challenge_method="S256")
        if self.take_code(ask.json) is None:
            return json_answer(403, error={"code": 403, "message": "Invalid code or code_verifier"})
        self.log_in()
        return json_answer(key=self.access, user_id=self.world.secret("user_"))

    def log_in(self) -> None:
        self.access = self.world.secret("sk-or-v1-")
        self.live = {self.access}

    def earliest(self, began: float) -> float:
        return 9007199254740991

    def latest(self) -> float:
        return 9007199254740991


class LoginCodeAssistFake(GridCodeAssistFake):
    """Antigravity's side of Cloud Code Assist."""

    def read(self, body: Dict[str, Any]) -> GridSeen:
        demand(body.pop("requestType", "agent") == "agent", "requestType")
        return super().read(body)


LOGIN_VENDORS = (AnthropicLogin, CodexLogin, CopilotLogin, GeminiLogin, AntigravityLogin, XaiLogin, KimiLogin,
                 MetaLogin, OpenRouterLogin)


class LoginApi(NamedTuple):
    """Where a provider answers requests, and as what."""

    fake: Any
    host: str
    path: str
    model: str


LOGIN_APIS: Dict[str, LoginApi] = {
    "anthropic": LoginApi(GridAnthropicFake, "api.anthropic.com", "/v1/messages", "claude-sonnet-4-5"),
    "openai-codex": LoginApi(GridCodexFake, "chatgpt.com", "/backend-api/codex/responses", "gpt-5.6-luna"),
    "github-copilot": LoginApi(GridChatFake, "api.individual.githubcopilot.com", "/chat/completions",
                               "gemini-3.8-flash"),
    "google-gemini-cli": LoginApi(GridCodeAssistFake, "cloudcode-pa.googleapis.com", GridCodeAssistFake.path,
                                  "gemini-3.1-pro-preview"),
    "google-antigravity": LoginApi(LoginCodeAssistFake, "daily-cloudcode-pa.googleapis.com", GridCodeAssistFake.path,
                                   "gemini-3.1-pro-low"),
    "xai": LoginApi(GridResponsesFake, "api.x.ai", "/v1/responses", "grok-4.5"),
    "kimi-coding": LoginApi(GridChatFake, "api.kimi.com", "/coding/v1/chat/completions", "kimi-for-coding"),
    "meta": LoginApi(GridResponsesFake, "api.meta.ai", "/v1/responses", "muse-spark-1.2"),
    "openrouter": LoginApi(GridChatFake, "openrouter.ai", "/api/v1/chat/completions", "openai/gpt-6-luna"),
}


class FakeVendors:
    """All vendors behind one proxy. By (provider, step), `instead` has answers that come in place of a step's own, used
    up in turn, or functions of the request that may return None; and `fields` changes a good answer's fields. `faults`
    is what clients did wrong."""

    def __init__(self, folder: str, is_attended: bool = False) -> None:
        self.is_attended = is_attended          # whether somebody sits before the pages
        self._issued = 0
        self._once: set[str] = set()
        self.reset()
        hosts = sorted({host for vendor in LOGIN_VENDORS for route in vendor.routes
                        for host in spelt_out(route.partition(" ")[2].partition("/")[0])} |
                       {api.host for api in LOGIN_APIS.values()})
        authority, certificate = make_grid_certificates(folder, hosts)
        self.hosts = {host: HostOfVendors(self, host) for host in hosts}
        self.proxy = GridProxy(certificate, self.hosts)
        world = self

        class Handler(self.proxy.server.RequestHandlerClass):   # type: ignore[name-defined,misc]
            def do_GET(self) -> None:
                if not self.tunnel:             # to the proxy itself: what the one who drives a real browser wants
                    give_grid_answer(self, world.control(self.path))
                    return
                if "content-length" not in self.headers:
                    self.headers["content-length"] = "0"
                self.do_POST()

            def do_POST(self) -> None:
                try:
                    super().do_POST()
                except OSError:                 # a client that gave up
                    self.close_connection = True

        self.proxy.server.RequestHandlerClass = Handler
        self.proxy.server.socket.listen(64)     # many clients at once must not wait for a second SYN
        self.environ = {"HTTPS_PROXY": self.proxy.url, "https_proxy": self.proxy.url, "SSL_CERT_FILE": authority}

    def reset(self) -> None:
        """New vendors, who know of nothing."""
        self.scenario = ""
        self.polls: List[str] = [] if self.is_attended else ["authorization_pending"]
        self.secrets: List[str] = [LOGIN_EMAIL, LOGIN_ACCOUNT]
        self.faults: List[str] = []
        self.instead: Dict[Tuple[str, str], List[Any]] = {}
        self.fields: Dict[Tuple[str, str], Dict[str, Any]] = {}
        self.asked: List[str] = []              # "METHOD host/path" of every request
        self.used_tokens: List[str] = []        # of the API calls that were answered
        self.refuses = False                    # whether the APIs take no token at all
        self.on_api_call: Callable[[], None] = lambda: None
        self.vendors: Dict[str, Any] = {vendor.provider: vendor(self) for vendor in LOGIN_VENDORS}
        self.apis: Dict[str, GridFake] = {}
        for provider, api in LOGIN_APIS.items():
            fake = self.apis[provider] = api.fake()
            fake.path, fake.model, fake.headers = api.path, api.model, {}

    def secret(self, prefix: str) -> str:
        """A text that nobody else has, and that must not be shown."""
        self._issued += 1
        text = prefix + hashlib.sha256(f"{prefix}{self._issued}".encode()).hexdigest()[:32]
        self.secrets.append(text)
        return text

    def demand_new(self, text: str) -> None:
        demand(text not in self._once, "a state, challenge or path that was used before")
        self._once.add(text)

    def answer(self, host: str, received: Received) -> Answer:
        split = urllib.parse.urlsplit(received.path)
        address = f"{received.method} {host}{split.path}"
        if split.path == "/favicon.ico":        # a real browser's own wish
            return json_answer(404)
        self.asked.append(address)
        try:
            ask = Ask(received.method, host, split.path, demand_once(split.query), received.headers, received.body)
            found = [(vendor, step) for vendor in self.vendors.values() for route, step in vendor.routes.items()
                     if re.fullmatch(route, address)]
            if not found:
                return self.api_answer(ask, received)
            vendor, step = next((pair for pair in found if pair[0].claims(ask)), found[0])
            vendor.steps.append(step)
            return self.step_answer(vendor, step, ask)
        except (GridFault, ValueError, KeyError, IndexError, AttributeError) as fault:
            self.faults.append(f"{address}: {type(fault).__name__}: {fault}")
            return oauth_error("invalid_request", error_hint=str(fault))

    def step_answer(self, vendor: FakeLogin, step: str, ask: Ask) -> Answer:
        waiting = self.instead.get((vendor.provider, step))
        other = waiting.pop(0) if waiting else None
        other = other(ask) if callable(other) else other
        if other is None and self.scenario == "down" and ask.method == "POST":
            other = Answer(503, b"<html><body>Service Unavailable</body></html>", "text/html")
        return self.changed(getattr(vendor, step)(ask), vendor.provider, step) if other is None else other

    def changed(self, answer: Answer, provider: str, step: str) -> Answer:
        changes = self.fields.get((provider, step), {})
        if not changes or answer.status != 200 or b'"error"' in answer.body:
            return answer
        fields = {**json.loads(answer.body), **changes}
        body = {name: value for name, value in fields.items() if value is not ABSENT}
        return answer._replace(body=json.dumps(body).encode())

    def api_answer(self, ask: Ask, received: Received) -> Answer:
        """A provider's answer to a request with one of its tokens."""
        provider = next((name for name, api in LOGIN_APIS.items() if api.host == ask.host), "")
        demand(provider, "no such address")
        vendor, fake = self.vendors[provider], self.apis[provider]
        if ask.method == "GET":
            return json_answer(404)
        self.on_api_call()
        if ask.bearer not in vendor.live or self.refuses:
            vendor.steps.append("refused")
            return json_answer(401, error={"message": "Invalid credentials", "type": "authentication_error"})
        demand("x-api-key" not in ask.headers, "a key beside the token")
        if provider == "anthropic":
            demand("oauth-2025-04-20" in ask.headers.get("anthropic-beta", ""), "anthropic-beta")
            demand(ask.json["system"][0]["text"] == pg.OAUTH_IDENTITY, "system")
        if provider == "openai-codex":
            demand_headers(ask, chatgpt_account_id=LOGIN_ACCOUNT)
        self.used_tokens.append(ask.bearer)
        answer = fake.answer(received)
        self.faults.extend(fake.faults)
        return answer

    def control(self, path: str) -> Answer:
        """GET /scenario/NAME, /faults and /asked of the proxy itself."""
        what, _, name = path.strip("/").partition("/")
        if what == "scenario" and name in LOGIN_SCENARIOS:
            self.scenario = name
            self.polls = ["slow_down"] if name == "slow_down" else []
        return json_answer(scenario=self.scenario, faults=self.faults, asked=self.asked)

    def fetch(self, url: str) -> Tuple[int, Dict[str, str], str]:
        """What a browser gets: status, headers, text. Vendors are asked without the network, which saves its time."""
        split = urllib.parse.urlsplit(url)
        path = urllib.parse.urlunsplit(("", "", split.path, split.query, ""))
        if split.hostname in self.hosts:
            answer = self.answer(split.hostname, Received("GET", path, {}, b""))
            return answer.status, answer.headers, answer.body.decode("utf-8")
        connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return (response.status, {name.lower(): value for name, value in response.getheaders()},
                    response.read().decode("utf-8"))
        finally:
            connection.close()

    def click(self, url: str, link: str = "allow") -> str:
        """Opens a page and follows a link on it; the address that it leads to, unless that is a page as well."""
        status, _, text = self.fetch(url)
        assert status == 200, (status, text)
        found = re.search(f'id="{link}" href="([^"]+)"', text)
        assert found, text
        target = urllib.parse.urljoin(url, found.group(1).replace("&amp;", "&"))
        return self.fetch(target)[1].get("location", "")

    def close(self) -> None:
        self.proxy.close()


def spelt_out(pattern: str) -> List[str]:
    """The hosts that a route's pattern stands for: alternatives in brackets."""
    before, bracket, rest = pattern.partition("(")
    if not bracket:
        return [pattern]
    choices, _, after = rest.partition(")")
    return [before + choice + more for choice in choices.split("|") for more in spelt_out(after)]


class HostOfVendors(NamedTuple):
    """One host name of the world."""

    world: FakeVendors
    host: str

    def answer(self, received: Received) -> Answer:
        return self.world.answer(self.host, received)


# --- The user ---------------------------------------------------------------------------------------------------------


class LoginBrowser:
    """The user before a browser. `act` is what happens with the page that the gateway opens."""

    def __init__(self, world: FakeVendors) -> None:
        self.world = world
        self.urls: List[str] = []
        self.pages: List[Tuple[int, Dict[str, str], str]] = []      # what the gateway's own page said
        self.act: Callable[[LoginBrowser, str], None] = click_allow
        self.is_awaited = False                 # by the gateway
        self.lock = threading.Lock()
        self._threads: List[threading.Thread] = []
        self._failures: List[BaseException] = []

    def open(self, url: str, *_: Any, **__: Any) -> bool:
        self.urls.append(url)
        self._threads.append(threading.Thread(target=self._run, args=(url,), daemon=True))
        self._threads[-1].start()
        return True

    def _run(self, url: str) -> None:
        try:
            self.act(self, url)
        except BaseException as failure:        # to be raised in the test's own thread, which waits in vain
            self._failures.append(failure)
            with self.lock:
                if self.is_awaited:
                    _thread.interrupt_main()

    def come_back(self, url: str) -> int:
        self.pages.append(self.world.fetch(url))
        return self.pages[-1][0]

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "the browser still waits"
        for failure in self._failures:
            raise failure


def click_allow(browser: LoginBrowser, url: str) -> None:
    assert browser.come_back(browser.world.click(url)) == 200


def click_deny(browser: LoginBrowser, url: str) -> None:
    assert browser.come_back(browser.world.click(url, "deny")) in (200, 400)


def with_query(url: str, **fields: Optional[str]) -> str:
    """The URL with query fields set, those that are None taken out."""
    split = urllib.parse.urlsplit(url)
    query = {**dict(urllib.parse.parse_qsl(split.query)), **fields}
    return urllib.parse.urlunsplit(split._replace(query=urllib.parse.urlencode({
        name: value for name, value in query.items() if value is not None})))


def click_after_strays(browser: LoginBrowser, url: str) -> None:
    """What else comes to the port before the one request that is meant: other pages, an idle connection as browsers
    make them in advance, and answers that are not to this question."""
    back = browser.world.click(url)
    split = urllib.parse.urlsplit(back)
    strays = [(split._replace(path="/favicon.ico").geturl(), 404), (with_query(back, code=None), 400)]
    if "state" in urllib.parse.parse_qs(split.query):
        strays += [(with_query(back, state=state), 400) for state in ("0" * 32, "", None)]
        strays += [(with_query(back, state="0" * 32, code=None, error="access_denied"), 400)]
    else:
        strays += [(split._replace(path=split.path[:-4] + "0000").geturl(), 404)]
    if sys.platform == "linux":                 # elsewhere this machine has one loopback address only
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", split.port or 0), 5)
    with socket.create_connection(("127.0.0.1", split.port or 0)), \
            socket.create_connection(("127.0.0.1", split.port or 0)) as rude:
        rude.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        for stray, status in strays:
            assert browser.come_back(stray) == status, stray
        assert browser.come_back(back) == 200


# What is in auth.json already, and has to stay: order, unknown fields and other letters included.
LOGIN_OTHERS: Dict[str, Any] = {
    "zeta": {"type": "api_key", "key": "sk-zeta-0123456789abcdef", "env": {"A": "b"}, "note": "caf\u00e9 \u2603"},
    "radius": {"type": "oauth", "access": "a", "refresh": "r", "expires": 1, "scope": "s", "x": [1.5, None, {"y": {}}]},
    "alpha": {"type": "api_key"}}


class LoginScreen(io.StringIO):
    """Standard output, which tells the desk of each address that stands on a line of its own."""

    def __init__(self, desk: LoginDesk) -> None:
        super().__init__()
        self.desk = desk

    def isatty(self) -> bool:
        return self.desk.keyboard is not None

    def write(self, text: str) -> int:
        for url in re.findall(r"^\s*(https://\S+)\s*$", text, re.MULTILINE):
            self.desk.urls.append(url)
            if self.desk.keyboard:
                self.desk.keyboard.type(self.desk.types(url) + "\n")
        return super().write(text)


class LoginKeyboard(io.StringIO):
    """Standard input with somebody who types."""

    def __init__(self) -> None:
        super().__init__()
        self._ends = os.pipe()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._ends[0]

    def type(self, text: str) -> None:
        os.write(self._ends[1], text.encode())

    def hang_up(self) -> None:
        for end in self._ends[::-1]:
            os.close(end)


class LoginDesk:
    """Runs the log-in commands in this process, without a terminal unless `keyboard` is set, and sees to what they
    leave behind."""

    def __init__(self, world: FakeVendors, folder: Any, monkeypatch: Any) -> None:
        world.reset()
        self.world, self.monkeypatch = world, monkeypatch
        self.browser = LoginBrowser(world)
        self.keyboard: Optional[LoginKeyboard] = None
        self.types: Callable[[str], str] = lambda url: ""       # what is typed when that address is shown
        self.urls: List[str] = []
        self.waits: List[float] = []
        self.home = str(folder)
        self.folder = write_agent_files(folder)
        self.path = os.path.join(self.folder, "auth.json")
        self.environ = {"HOME": self.home, "USERPROFILE": self.home, "BROWSER": "stub", **world.environ}
        for name in LOGIN_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("webbrowser.open", self.browser.open)
        serve = pg.CallbackServer.serve_forever     # which notices at its next look that it is to end
        monkeypatch.setattr(pg.CallbackServer, "serve_forever", lambda server, *_: serve(server, 0.005))
        monkeypatch.setattr(pg, "AUTH_PAUSE_S", 0.0)
        monkeypatch.setattr(pg.Terminal, "wait", lambda *given: self.waits.append(given[-1]))

    def write(self, entries: Any) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(entries if isinstance(entries, str) else json.dumps(entries, indent=2, ensure_ascii=False))
        os.chmod(self.path, 0o600)

    @property
    def raw(self) -> Optional[bytes]:
        if not os.path.exists(self.path):
            return None
        with open(self.path, "rb") as file:
            return file.read()

    def run(self, *argv: str, status: int = 0) -> Tuple[str, str]:
        """(stdout, stderr) of a command that has to end with that status."""
        before, self.began = self.raw, time.time()
        out, err = LoginScreen(self), io.StringIO()
        with self.monkeypatch.context() as patch:
            for name, stream in (("stdin", self.keyboard or io.StringIO()), ("stdout", out), ("stderr", err)):
                patch.setattr(sys, name, stream)
            ended = self.run_interruptibly(argv)
        self.browser.join()
        shown = out.getvalue(), err.getvalue()
        assert ended == status, (ended, *shown)
        self.check(*shown)
        if not status:                          # a gateway of an earlier test may still look for models somewhere
            assert [fault for fault in self.world.faults if "amazonaws.com" not in fault] == []
        else:
            assert self.raw == before, "a failure changed auth.json"
            assert re.fullmatch(r"\n?pigateway: [\x20-\x7e\u2026]+\n", shown[1]), shown[1]
        return shown

    def run_interruptibly(self, argv: Sequence[str]) -> int:
        """The exit status of a command. A browser that fails ends the wait for it with SIGINT, which a test run in the
        background ignores by default."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.browser.is_awaited = True
            try:
                return pg.main(list(argv))
            finally:
                with self.browser.lock:
                    self.browser.is_awaited = False
        except KeyboardInterrupt:
            return 130
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self, *shown: str) -> None:
        """What holds after every command."""
        said = urllib.parse.unquote("\n".join([*shown, *self.browser.urls]))
        for secret in ["Traceback", *self.world.secrets]:
            assert secret not in said, f"shows {secret}"
        assert set(os.listdir(self.folder)) <= {"auth.json"}, "something is left over"
        if os.name != "nt" and self.raw is not None:
            assert os.stat(self.path).st_mode & 0o777 == 0o600

    def check_entry(self, provider: str, others: Dict[str, Any] = LOGIN_OTHERS) -> Dict[str, Any]:
        """auth.json holds the others as they were, and the new log-in where the one before was, or last."""
        vendor = self.world.vendors[provider]
        text = (self.raw or b"").decode("utf-8")
        entries = json.loads(text)
        assert list(entries) == list({**others, provider: 0})
        assert text == json.dumps({**others, provider: entries[provider]}, indent=2, ensure_ascii=False)
        vendor.check_stored(entries[provider], self.began)
        return dict(entries[provider])


LOGIN_VARIABLES = ("PI_CODING_AGENT_DIR", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_PROJECT_ID", "SSL_CERT_DIR",
                   "REQUESTS_CA_BUNDLE", "COPILOT_GITHUB_TOKEN", "PI_OAUTH_CALLBACK_HOST")


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: Any) -> Iterator[FakeVendors]:
    """All vendors, behind one proxy."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    world = FakeVendors(str(tmp_path_factory.mktemp("vendors")))
    yield world
    world.close()


@pytest.fixture
def desk(vendors: FakeVendors, tmp_path: Any, monkeypatch: Any) -> LoginDesk:
    """A place to log in from, with an auth.json of others."""
    made = LoginDesk(vendors, tmp_path, monkeypatch)
    made.write(LOGIN_OTHERS)
    return made


class DirectConnection:
    """Stands where an answer's connection would, after all of it has come."""

    def receive(self, *_: Any) -> bytes:
        return b""

    def release(self, *_: Any) -> None:
        pass


@pytest.fixture
def direct(vendors: FakeVendors, monkeypatch: Any) -> None:
    """Vendors are called without sockets, where it matters what they say and not how it travels."""
    def open_directly(transport: pg.Transport, call: pg.Call, scope: pg.Scope) -> pg.Response:
        split = urllib.parse.urlsplit(call.url)
        headers = {name.lower(): value for name, value in call.headers.items()}
        path = urllib.parse.urlunsplit(("", "", split.path, split.query, ""))
        answer = vendors.answer(split.hostname or "", Received(call.method, path, headers, call.body))
        headers = {"content-length": str(len(answer.body)), **answer.headers}
        gone: Any = DirectConnection()
        return pg.Response(answer.status, headers, gone, answer.body, scope, 1.0)

    monkeypatch.setattr(pg.Transport, "open", open_directly)


DIRECT = pytest.mark.usefixtures("direct")


# --- Every flow, and what goes wrong in it ----------------------------------------------------------------------------


class LoginCase(NamedTuple):
    """A way to log in: the command, and the vendor's steps in order, those of the pages apart."""

    argv: Tuple[str, ...]
    steps: Tuple[str, ...]
    host: str = ""              # of the address that is shown

    @property
    def provider(self) -> str:
        return self.argv[0]

    @property
    def is_device(self) -> bool:
        return "poll" in self.steps or self.provider in ("xai", "kimi-coding")

    def run(self, desk: LoginDesk, status: int = 0) -> Tuple[str, str]:
        return desk.run("login", *self.argv, status=status)


LOGIN_CASES: Dict[str, LoginCase] = {
    "anthropic": LoginCase(("anthropic", "--yes"), ("token",), "claude.ai"),
    "openai-codex": LoginCase(("openai-codex", "--yes"), ("token",), "auth.openai.com"),
    "openai-codex device": LoginCase(("openai-codex", "--yes", "--device"), ("device", "poll", "poll", "token"),
                                     "auth.openai.com"),
    "github-copilot": LoginCase(("github-copilot", "--yes"),
                                ("device", "poll", "poll", "copilot_token", "models", "policy"), "github.com"),
    "github enterprise": LoginCase(("github-copilot", "--yes", "--enterprise", f"https://{LOGIN_ENTERPRISE}/login"),
                                   ("device", "poll", "poll", "copilot_token", "models", "policy"), LOGIN_ENTERPRISE),
    "google-gemini-cli": LoginCase(("google-gemini-cli", "--yes"), ("token", "load", "userinfo"),
                                   "accounts.google.com"),
    "google-antigravity": LoginCase(("google-antigravity", "--yes"), ("token", "load", "userinfo"),
                                    "accounts.google.com"),
    "xai": LoginCase(("xai",), ("device", "token", "token"), "auth.x.ai"),
    "kimi-coding": LoginCase(("kimi-coding",), ("device", "token", "token"), "auth.kimi.com"),
    "meta": LoginCase(("meta",), ("device", "poll", "poll", "mint"), "auth.meta.com"),
    "openrouter": LoginCase(("openrouter",), ("key",), "openrouter.ai"),
}
LOGIN_LOOPBACK = [name for name, case in LOGIN_CASES.items() if not case.is_device]
LOGIN_DEVICE = [name for name, case in LOGIN_CASES.items() if case.is_device]
LOGIN_RESTRICTED = ["anthropic", "openai-codex", "github-copilot", "google-gemini-cli", "google-antigravity"]
LOGIN_PORTS = {"anthropic": 53692, "openai-codex": 1455, "google-gemini-cli": 8085, "google-antigravity": 51121}


def steps_of(desk: LoginDesk, provider: str) -> List[str]:
    """What a vendor was asked, without the pages that the browser saw."""
    return [step for step in desk.world.vendors[provider].steps if step not in ("authorize", "consent")]


@pytest.mark.parametrize("name", LOGIN_CASES)
def test_log_in(desk: LoginDesk, name: str) -> None:
    case = LOGIN_CASES[name]
    out, err = case.run(desk)
    assert not err
    assert sorted(set(steps_of(desk, case.provider))) == sorted(set(case.steps))
    assert steps_of(desk, case.provider)[:2] == list(case.steps[:2])
    desk.check_entry(case.provider)
    assert len(desk.urls) == 1 and urllib.parse.urlsplit(desk.urls[0]).hostname == case.host
    if case.is_device:
        vendor = desk.world.vendors[case.provider]
        assert (vendor.device_grant if name == "openai-codex device" else vendor.grant).user_code in out
        assert desk.waits and all(5 <= wait <= 7 for wait in desk.waits)
    else:
        assert desk.browser.urls == desk.urls and desk.waits == []
        status, headers, text = desk.browser.pages[-1]
        assert headers["content-type"].startswith("text/html") and "no-store" in headers["cache-control"]
        assert not any(secret in text for secret in desk.world.secrets)


def test_log_in_makes_the_file(desk: LoginDesk) -> None:
    shutil.rmtree(os.path.join(desk.home, ".pi"))
    LOGIN_CASES["xai"].run(desk)
    desk.check_entry("xai", {})
    if os.name != "nt":
        folders = (desk.folder, os.path.dirname(desk.folder))
        assert [os.stat(folder).st_mode & 0o777 for folder in folders] == [0o700, 0o700]


def test_log_in_again_replaces_the_one_before(desk: LoginDesk) -> None:
    others = {"anthropic": {"type": "api_key", "key": "old"}, **LOGIN_OTHERS}
    desk.write(others)
    for _ in range(2):
        LOGIN_CASES["anthropic"].run(desk)
        desk.check_entry("anthropic", others)


def test_log_in_into_another_folder(desk: LoginDesk, tmp_path: Any) -> None:
    before = desk.raw
    desk.run("login", "xai", "--auth-dir", str(tmp_path / "other"))
    assert desk.raw == before
    desk.path = str(tmp_path / "other" / "auth.json")
    desk.check_entry("xai", {})


@pytest.mark.parametrize("name", LOGIN_LOOPBACK)
def test_log_in_goes_on_after_strays(desk: LoginDesk, name: str) -> None:
    desk.browser.act = click_after_strays
    LOGIN_CASES[name].run(desk)
    desk.check_entry(LOGIN_CASES[name].provider)


@pytest.mark.parametrize("name", LOGIN_CASES)
def test_log_in_denied(desk: LoginDesk, name: str) -> None:
    case = LOGIN_CASES[name]
    desk.world.scenario, desk.browser.act = "deny", click_deny
    _, err = case.run(desk, status=1)
    assert re.search("denied|refused", err)
    assert steps_of(desk, case.provider) == [step for step in case.steps if step in ("device", "poll", "token") and
                                             case.is_device][:3]


@pytest.mark.parametrize("name", LOGIN_CASES)
def test_log_in_expired(desk: LoginDesk, name: str) -> None:
    desk.world.scenario = "expire"
    _, err = LOGIN_CASES[name].run(desk, status=1)
    assert re.search("expired|no longer valid|invalid", err.lower())


@DIRECT
@pytest.mark.parametrize("name", LOGIN_DEVICE)
def test_log_in_slow_down(desk: LoginDesk, name: str) -> None:
    desk.world.polls = ["authorization_pending", "slow_down", "authorization_pending", "slow_down"]
    LOGIN_CASES[name].run(desk)
    desk.check_entry(LOGIN_CASES[name].provider)
    waits = desk.waits[:5] if name != "openai-codex device" else [5, *desk.waits[:4]]
    assert len(waits) == 5 and waits[0] <= waits[1] < 8
    assert waits[2] >= waits[1] + 5 and waits[3] >= waits[2] and waits[4] >= waits[3] + 5


@DIRECT
def test_log_in_slow_down_as_told(desk: LoginDesk) -> None:
    desk.world.polls = ["slow_down 17", "authorization_pending", "slow_down 3"]
    LOGIN_CASES["github-copilot"].run(desk)
    assert [17 <= wait <= 25 for wait in desk.waits[1:3]] == [True] * 2 and 3 <= desk.waits[3] < 17


@DIRECT
@pytest.mark.parametrize("name", LOGIN_DEVICE)
def test_log_in_never_answered(desk: LoginDesk, name: str) -> None:
    desk.world.polls = ["authorization_pending"] * 1000
    desk.world.fields[LOGIN_CASES[name].provider, "device"] = {"interval": 60, "expires_in": 290}
    _, err = LOGIN_CASES[name].run(desk, status=1)
    assert "expired" in err and sum(desk.waits) <= 900


@pytest.mark.parametrize("provider", LOGIN_PORTS)
def test_log_in_port_in_use(desk: LoginDesk, provider: str) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", LOGIN_PORTS[provider]))
        other.listen()
        _, err = LOGIN_CASES[provider].run(desk, status=1)
    assert str(LOGIN_PORTS[provider]) in err and "--no-browser" in err
    assert desk.browser.urls == [] and desk.world.asked == []


@pytest.mark.parametrize("how, words", [("no proxy", "refused|connection"), ("no such host", "403"),
                                        ("no trust", "certificate")])
@pytest.mark.parametrize("name, host", [("anthropic", "platform.claude.com"), ("xai", "auth.x.ai")])
def test_log_in_without_network(desk: LoginDesk, monkeypatch: Any, name: str, host: str, how: str, words: str) -> None:
    if how == "no trust":
        monkeypatch.delenv("SSL_CERT_FILE")
    elif how == "no such host":
        monkeypatch.delitem(desk.world.hosts, host)
    else:
        for variable in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{closed_port()}")
    _, err = LOGIN_CASES[name].run(desk, status=1)
    assert re.search(words, err)


def spoilt(ask: Ask) -> Iterator[Tuple[str, Ask]]:
    """A request with one thing wrong: a field or a header missing, a field changed, one too many."""
    is_json = ask.body[:1] == b"{"
    fields = ask.query if ask.method == "GET" else json.loads(ask.body) if is_json else ask.form
    changes: List[Tuple[str, Dict[str, Any]]] = [("one more", {**fields, "surprise": "1"})]
    for name in fields:
        changes.append((f"no {name}", {other: fields[other] for other in fields if other != name}))
        changes.append((f"another {name}", {**fields, name: "x" + str(fields[name])}))
    for what, changed in changes:
        body = json.dumps(changed) if is_json else urllib.parse.urlencode(changed)
        yield what, ask._replace(query=changed) if ask.method == "GET" else ask._replace(body=body.encode())
    for name in set(ask.headers) - {"host", "content-length", "connection"}:
        yield f"no {name}", ask._replace(headers={other: ask.headers[other] for other in ask.headers if other != name})


# What vendors do not look at.
LOGIN_UNSEEN = {("authorize", "another state"), ("authorize", "another code_challenge"), ("device", "another referrer"),
                ("authorize", "another originator"), *((step, "one more") for step in ("models", "copilot_token"))}
LOGIN_UNSEEN_HEADERS = {"no user-agent", "no accept", *("no " + name.replace("_", "-") for name in COPILOT_HEADERS)}


@DIRECT
@pytest.mark.parametrize("name", LOGIN_CASES)
def test_log_in_vendors_see_faults(desk: LoginDesk, monkeypatch: Any, name: str) -> None:
    world, answer = desk.world, desk.world.step_answer
    unseen: List[Tuple[str, str]] = []

    def probe(vendor: FakeLogin, step: str, ask: Ask) -> Answer:
        once = world._once
        for what, wrong in spoilt(ask) if step != "consent" else ():
            world._once = set(once)
            trial = copy.deepcopy(vendor, {id(world): world})
            try:
                reply = getattr(trial, step)(wrong)
                if reply.status < 400 and b'"error"' not in reply.body:
                    unseen.append((step, what))
            except (GridFault, ValueError, KeyError, IndexError, AttributeError):
                pass
        world._once = once
        return answer(vendor, step, ask)

    world.polls = []
    monkeypatch.setattr(world, "step_answer", probe)
    LOGIN_CASES[name].run(desk)
    assert [pair for pair in unseen if pair not in LOGIN_UNSEEN and pair[1] not in LOGIN_UNSEEN_HEADERS] == []


# What a log-in server may answer instead of what it should.
LOGIN_BAD_ANSWERS: Dict[str, Any] = {
    "400": oauth_error("invalid_request"), "401": json_answer(401, message="Unauthorized"),
    "429": Answer(429, b'{"error": {"type": "rate_limit_error", "message": "Wait."}}', headers={"retry-after": "7"}),
    "503": Answer(503, b"<html>\x1b]0;owned\x07\xff</html>", "text/html"),
    "no JSON": Answer(200, b"<html>Log in to the airport's network</html>", "text/html"),
    "a list": Answer(200, b"[1]"), "null": Answer(200, b"null"), "nothing": Answer(200, b""), "empty": json_answer(),
    "other": json_answer(surprise=True), "deep": Answer(200, b"[" * 5000),
    "cut": Answer(200, b'{"access_token": "', headers={"content-length": "100"}),
    "redirect": Answer(302, headers={"location": "https://evil.example/"}),
    "escapes": json_answer(400, error="invalid_grant", error_description="\x1b[2J\x9b\r\nlogged in\u202e" * 200),
    "echo": lambda ask: json_answer(400, error="invalid_grant", error_description=(
        f"Not valid: {ask.bearer} {urllib.parse.unquote(ask.body.decode())}")),
}
LOGIN_VITAL = [("anthropic", "token"), ("openai-codex", "token"), ("openai-codex device", "device"),
               ("openai-codex device", "poll"), ("openai-codex device", "token"), ("github-copilot", "device"),
               ("github-copilot", "poll"), ("github-copilot", "copilot_token"), ("google-gemini-cli", "token"),
               ("google-gemini-cli", "load"), ("xai", "device"), ("xai", "token"), ("kimi-coding", "token"),
               ("meta", "device"), ("meta", "poll"), ("meta", "mint"), ("openrouter", "key")]


@DIRECT
@pytest.mark.parametrize("turn", range(len(LOGIN_VITAL)), ids=["-".join(pair) for pair in LOGIN_VITAL])
def test_log_in_bad_answers(desk: LoginDesk, turn: int) -> None:
    name, step = LOGIN_VITAL[turn]
    case = LOGIN_CASES[name]
    for kind in [*list(LOGIN_BAD_ANSWERS)[turn % 5::5], ("escapes", "echo")[turn % 2]]:
        desk.world.instead[case.provider, step] = [LOGIN_BAD_ANSWERS[kind]] * 5
        case.run(desk, status=1)
        desk.world.reset()


# Fields that a log-in cannot do without.
LOGIN_FIELDS = [("anthropic", "token", "access_token refresh_token"),
                ("openai-codex", "token", "access_token refresh_token"),
                ("openai-codex device", "device", "device_auth_id user_code"),
                ("openai-codex device", "poll", "authorization_code code_verifier"),
                ("github-copilot", "device", "device_code user_code verification_uri"),
                ("github-copilot", "poll", "access_token"), ("github-copilot", "copilot_token", "token expires_at"),
                ("google-gemini-cli", "token", "access_token refresh_token"),
                ("xai", "device", "device_code user_code"), ("xai", "token", "access_token refresh_token"),
                ("kimi-coding", "token", "access_token refresh_token"), ("meta", "device", "device_code user_code"),
                ("meta", "poll", "access_token"), ("meta", "mint", "api_key"), ("openrouter", "key", "key")]


@DIRECT
@pytest.mark.parametrize("name, step, fields", LOGIN_FIELDS, ids=[f"{row[0]}-{row[1]}" for row in LOGIN_FIELDS])
def test_log_in_fields_missing(desk: LoginDesk, name: str, step: str, fields: str) -> None:
    case = LOGIN_CASES[name]
    for number, field in enumerate(fields.split()):
        for value in (ABSENT, [[{}], ""][number]) if number < 2 else (None,):
            desk.world.fields[case.provider, step] = {field: value}
            case.run(desk, status=1)
            desk.world.reset()


@DIRECT
@pytest.mark.parametrize("life", [ABSENT, None, 0, -5, "soon", [], True, 1e400, float("nan"), 1e300, "1800", 1800.5])
def test_log_in_strange_life(desk: LoginDesk, life: Any) -> None:
    interval = 7.5 if life in ("1800", 1800.5) else life
    desk.world.fields["xai", "device"] = {"expires_in": life, "interval": interval}
    desk.world.fields["xai", "token"] = {"expires_in": life}
    LOGIN_CASES["xai"].run(desk)
    expires = json.loads(desk.raw or b"")["xai"]["expires"]
    assert type(expires) is int and 0 <= expires / 1000 - time.time() <= 3600
    assert all(1 <= wait <= 10 for wait in desk.waits)


@DIRECT
@pytest.mark.parametrize("token", [
    "no-jwt", "a.!!!.c", "..", f"h.{to_base64url(b'[]')}.s", *(
        f"h.{to_base64url(json.dumps({'https://api.openai.com/auth': claim}).encode())}.s"
        for claim in (None, {}, {"chatgpt_account_id": ""}, {"chatgpt_account_id": 7}))])
def test_log_in_codex_without_account(desk: LoginDesk, token: str) -> None:
    desk.world.fields["openai-codex", "token"] = {"access_token": token}
    LOGIN_CASES["openai-codex"].run(desk, status=1)


@DIRECT
@pytest.mark.parametrize("field, text", [
    ("verification_uri", "javascript:alert(1)"), ("verification_uri", "file:///etc/passwd"),
    ("verification_uri", "https://auth.meta.com/\x1b[2J"), ("verification_uri", "https://a\r\nLogged in."),
    ("user_code", "\x1b]0;owned\x07"), ("user_code", "A\u202eB")])
def test_log_in_shows_no_strange_page(desk: LoginDesk, field: str, text: str) -> None:
    desk.world.fields["meta", "device"] = {"verification_uri_complete": ABSENT, field: text}
    out, _ = LOGIN_CASES["meta"].run(desk, status=1)
    assert text not in out and desk.browser.urls == []


# --- Google's projects ------------------------------------------------------------------------------------------------


class ProjectCase(NamedTuple):
    """What Google knows of an account, and what comes of it: a project, or a word of the message."""

    loaded: Dict[str, Any]
    project: str = ""
    words: str = ""
    own: str = ""               # GOOGLE_CLOUD_PROJECT
    instead: Dict[str, List[Answer]] = {}
    steps: str = "load"
    waits: int = 0


GOOGLE_FREE = {"allowedTiers": [{"id": "standard-tier"}, {"id": "free-tier", "isDefault": True}]}
GOOGLE_STANDARD = {"allowedTiers": [{"id": "standard-tier", "isDefault": True}]}
GOOGLE_POLICY = json_answer(403, error={"code": 403, "message": "Request is prohibited by organization's policy",
                                        "details": [{"reason": "SECURITY_POLICY_VIOLATED"}]})
PROJECT_CASES = {
    "own tier": ProjectCase({"currentTier": {"id": "free-tier"}, "cloudaicompanionProject": "kept-1"}, "kept-1"),
    "tier without project": ProjectCase({"currentTier": {"id": "standard-tier"}}, words="GOOGLE_CLOUD_PROJECT"),
    "tier, named project": ProjectCase({"currentTier": {"id": "standard-tier"}}, "mine-1", own="mine-1"),
    "new and free": ProjectCase(GOOGLE_FREE, LOGIN_PROJECT, steps="load onboard operation operation", waits=1),
    "new, free, named project": ProjectCase(GOOGLE_FREE, LOGIN_PROJECT, own="mine-1",
                                            steps="load onboard operation operation", waits=1),
    "done at once": ProjectCase(GOOGLE_FREE, "made-1", instead={"onboard": [json_answer(
        done=True, response={"cloudaicompanionProject": {"id": "made-1"}})]}, steps="load onboard"),
    "done without project": ProjectCase(GOOGLE_FREE, words="GOOGLE_CLOUD_PROJECT", instead={"onboard": [json_answer(
        done=True, response={})]}, steps="load onboard"),
    "new and standard": ProjectCase(GOOGLE_STANDARD, words="GOOGLE_CLOUD_PROJECT"),
    "new, standard, named": ProjectCase(GOOGLE_STANDARD, LOGIN_PROJECT, own="mine-1",
                                        steps="load onboard operation operation", waits=1),
    "no tiers": ProjectCase({}, words="GOOGLE_CLOUD_PROJECT"),
    "no tiers, named": ProjectCase({}, LOGIN_PROJECT, own="mine-1", steps="load onboard operation operation", waits=1),
    "policy": ProjectCase({}, words="GOOGLE_CLOUD_PROJECT", instead={"load": [GOOGLE_POLICY]}),
    "policy, named": ProjectCase({}, "mine-1", own="mine-1", instead={"load": [GOOGLE_POLICY]}),
    "refused": ProjectCase({}, words="", instead={"load": [json_answer(403, error={"message": "No."})]}),
    "onboarding fails": ProjectCase(GOOGLE_FREE, instead={"onboard": [Answer(500, b"")]}, steps="load onboard"),
    "waiting fails": ProjectCase(GOOGLE_FREE, instead={"operation": [Answer(500, b"")]},
                                 steps="load onboard operation"),
}


@DIRECT
@pytest.mark.parametrize("variable", ["GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_PROJECT_ID"])
@pytest.mark.parametrize("name", PROJECT_CASES)
def test_log_in_gemini_project(desk: LoginDesk, monkeypatch: Any, name: str, variable: str) -> None:
    case, vendor = PROJECT_CASES[name], desk.world.vendors["google-gemini-cli"]
    if variable != "GOOGLE_CLOUD_PROJECT" and not case.own:
        return                                  # nothing to name
    if case.own:
        monkeypatch.setenv(variable, case.own)
    vendor.loaded, vendor.own_project, vendor.project = case.loaded, case.own, case.project or vendor.project
    desk.world.instead = {("google-gemini-cli", step): list(answers) for step, answers in case.instead.items()}
    _, err = LOGIN_CASES["google-gemini-cli"].run(desk, status=0 if case.project else 1)
    assert case.words in err
    steps = [step for step in steps_of(desk, "google-gemini-cli") if step not in ("token", "userinfo")]
    assert steps == case.steps.split() and desk.waits == [5] * case.waits
    if case.project:
        desk.check_entry("google-gemini-cli")


@DIRECT
def test_log_in_gemini_onboarding_that_never_ends(desk: LoginDesk) -> None:
    vendor = desk.world.vendors["google-gemini-cli"]
    vendor.loaded, vendor.polls_left = GOOGLE_FREE, 10_000
    LOGIN_CASES["google-gemini-cli"].run(desk, status=1)
    assert set(desk.waits) == {5} and 60 <= sum(desk.waits) <= 900


@DIRECT
@pytest.mark.parametrize("answers, project", [
    ([json_answer(cloudaicompanionProject={"id": "own-7"})], "own-7"),
    ([json_answer(cloudaicompanionProject="own-8")], "own-8"),
    ([Answer(500, b""), json_answer(cloudaicompanionProject="own-9")], "own-9"),
    ([Answer(200, b"[]"), json_answer(cloudaicompanionProject="own-9")], "own-9"),
    ([Answer(500, b"")] * 2, "rising-fact-p41fc"), ([json_answer()] * 2, "rising-fact-p41fc"),
    ([GOOGLE_POLICY] * 2, "rising-fact-p41fc"), ([Answer(200, b"[" * 5000)] * 2, "rising-fact-p41fc"),
    ([json_answer(cloudaicompanionProject=7)] * 2, "rising-fact-p41fc"),
    ([Answer(200, b"{", headers={"content-length": "9"})] * 2, "rising-fact-p41fc")])
def test_log_in_antigravity_project(desk: LoginDesk, answers: List[Answer], project: str) -> None:
    desk.world.vendors["google-antigravity"].project = project
    desk.world.instead["google-antigravity", "load"] = list(answers)
    LOGIN_CASES["google-antigravity"].run(desk)
    desk.check_entry("google-antigravity")


@DIRECT
@pytest.mark.parametrize("provider, answer", [
    ("google-gemini-cli", Answer(500, b"")), ("google-antigravity", json_answer()),
    ("google-antigravity", Answer(200, b"no")),
    ("google-gemini-cli", Answer(200, b"{", headers={"content-length": "9"}))])
def test_log_in_at_google_without_an_address(desk: LoginDesk, provider: str, answer: Answer) -> None:
    desk.world.instead[provider, "userinfo"] = [answer]
    LOGIN_CASES[provider].run(desk)
    entry = json.loads(desk.raw or b"")[provider]
    assert entry["projectId"] == LOGIN_PROJECT and isinstance(entry.get("email", ""), str)


# --- Copilot's models -------------------------------------------------------------------------------------------------


def copilot_ids(desk: LoginDesk) -> Any:
    LOGIN_CASES["github-copilot"].run(desk)
    return json.loads(desk.raw or b"")["github-copilot"].get("availableModelIds")


@DIRECT
def test_copilot_models_are_switched_on(desk: LoginDesk) -> None:
    ids = copilot_ids(desk)
    assert sorted(ids) == sorted(desk.world.vendors["github-copilot"].stored()["availableModelIds"])
    assert "claude-sonnet-5" in desk.world.vendors["github-copilot"].enabled
    assert set(desk.world.vendors["github-copilot"].enabled) <= {"claude-sonnet-5", "unheard-of-1"}


@DIRECT
@pytest.mark.parametrize("answers", [[Answer(500, b"")] * 2, [json_answer(429)] * 9, [Answer(200, b"")],
                                     [Answer(200, b"{", headers={"content-length": "9"})]])
def test_copilot_models_that_stay_off(desk: LoginDesk, answers: List[Answer]) -> None:
    desk.world.instead["github-copilot", "policy"] = list(answers)
    assert {"gpt-5.6-luna", "gemini-3.8-flash"} <= set(copilot_ids(desk))


@DIRECT
def test_copilot_without_a_picker(desk: LoginDesk) -> None:
    vendor = desk.world.vendors["github-copilot"]
    vendor.offered = [copilot_model("gpt-5.6-luna", picker=False),
                      copilot_model("claude-sonnet-5", picker=False, state="unconfigured"),
                      copilot_model("gpt-6-luna", False, "disabled")]
    assert sorted(copilot_ids(desk)) == ["claude-sonnet-5", "gpt-5.6-luna"]


@DIRECT
@pytest.mark.parametrize("answer", [Answer(500, b""), Answer(200, b"no"), json_answer(), json_answer(data=7),
                                    json_answer(data=[7, {}, {"id": 7}, None]), Answer(200, b"[" * 5000),
                                    Answer(200, b"{", headers={"content-length": "9"})])
def test_copilot_without_a_list(desk: LoginDesk, answer: Answer) -> None:
    desk.world.instead["github-copilot", "models"] = [answer]
    assert copilot_ids(desk) is None            # an empty list would hide every model from pi


# --- auth.json --------------------------------------------------------------------------------------------------------


def lock_of(desk: LoginDesk) -> str:
    return desk.path + ".lock"


def test_log_in_waits_for_the_lock_and_keeps_what_came_meanwhile(desk: LoginDesk) -> None:
    others = {**LOGIN_OTHERS, "xai": {"type": "api_key", "key": "$XAI"}}

    def somebody_writes(browser: LoginBrowser, url: str) -> None:
        os.mkdir(lock_of(desk))
        click_allow(browser, url)
        until(lambda: "token" in desk.world.vendors["anthropic"].steps)
        time.sleep(0.05)                        # a log-in that does not wait would have written by now
        assert "anthropic" not in json.loads(desk.raw or b"")
        desk.write(others)
        os.rmdir(lock_of(desk))

    desk.browser.act = somebody_writes
    LOGIN_CASES["anthropic"].run(desk)
    desk.check_entry("anthropic", others)


def test_log_in_steals_a_dead_lock(desk: LoginDesk) -> None:
    os.mkdir(lock_of(desk))
    os.utime(lock_of(desk), (1, 1))
    assert pg.main(["login", "xai"]) == 0
    desk.began = time.time()
    assert not os.path.exists(lock_of(desk)) and "xai" in json.loads(desk.raw or b"")


@pytest.mark.parametrize("text", ['{"a": ', "[]", '"x"', '{"a": {"type": "api_key"}}}', "\x00\x01"])
def test_log_in_leaves_a_broken_file_alone(desk: LoginDesk, text: str) -> None:
    desk.write(text)
    LOGIN_CASES["xai"].run(desk, status=1)
    assert desk.world.asked == [], "better before a log-in than after it"


@DIRECT
@pytest.mark.parametrize("text, others", [("", {}), (" \n", {}), ("{}", {}), ('\ufeff{"b": {"k": "\\ud800"}, "a": 1}', {
    "b": {"k": "\ud800"}, "a": 1})])
def test_log_in_takes_unusual_files(desk: LoginDesk, text: str, others: Dict[str, Any]) -> None:
    desk.write(text)
    LOGIN_CASES["xai"].run(desk)
    entries = json.loads(desk.raw or b"")
    assert {**others, "xai": entries["xai"]} == entries and list(entries) == [*others, "xai"]


@DIRECT
@POSIX
def test_log_in_follows_a_link(desk: LoginDesk, tmp_path: Any) -> None:
    target = tmp_path / "real.json"
    os.rename(desk.path, str(target))
    os.symlink(str(target), desk.path)
    LOGIN_CASES["xai"].run(desk)
    assert os.path.islink(desk.path)
    desk.check_entry("xai")
    assert sorted(os.listdir(str(tmp_path))) == [".pi", "real.json"]


@DIRECT
@POSIX
def test_log_in_makes_a_readable_file_private(desk: LoginDesk) -> None:
    os.chmod(desk.path, 0o644)
    LOGIN_CASES["xai"].run(desk)
    desk.check_entry("xai")


@DIRECT
def test_log_in_replaces_the_file_at_once(desk: LoginDesk) -> None:
    before = os.stat(desk.path).st_ino
    LOGIN_CASES["xai"].run(desk)
    assert os.name == "nt" or os.stat(desk.path).st_ino != before


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (("login",), "which|terminal"), (("login", "antropic", "--yes"), "anthropic"), (("login", "groq"), "groq"),
    (("login", ""), ""), (("login", "openai-codex", "--no-browser", "--yes"), "terminal"),
    (("login", "openrouter", "--no-browser"), "terminal"), (("login", "xai", "--device=1"), ""),
    (("login", "anthropic", "--device", "--yes"), "device"),
    (("login", "xai", "--enterprise", "ghe.example.com"), "enterprise"),
    (("login", "github-copilot", "--yes", "--enterprise", "https://"), "enterprise"),
    (("login", "github-copilot", "--yes", "--enterprise", "a b/../c@d:x"), "enterprise"),
    (("login", "xai", "meta"), ""), (("login", "xai", "--token", "secret"), ""),
    (("logout",), "which"), (("logout", "anthropic"), "anthropic"), (("logout", "zeta"), "zeta"),
    (("accounts", "xai"), ""), (("accounts", "--yes"), "yes"), (("models", "--no-browser"), "browser"),
    *((("login", name), "--yes") for name in LOGIN_RESTRICTED)])
def test_log_in_usage(desk: LoginDesk, argv: Tuple[str, ...], words: str) -> None:
    _, err = desk.run(*argv, status=2)
    assert words in err or re.search(words, err)
    assert desk.world.asked == [] and desk.browser.urls == []


@DIRECT
def test_log_in_over_a_key(desk: LoginDesk) -> None:
    others = {"xai": {"type": "api_key", "key": "sk-own-0123456789"}, **LOGIN_OTHERS}
    desk.write(others)
    _, err = desk.run("login", "xai", status=2)
    assert "--yes" in err and desk.world.asked == []
    desk.run("login", "xai", "--yes")
    desk.check_entry("xai", others)


@DIRECT
def test_log_in_accounts_and_logout(desk: LoginDesk) -> None:
    assert "radius" in desk.run("accounts")[0]
    for name in ("anthropic", "openai-codex", "google-gemini-cli", "openrouter"):
        LOGIN_CASES[name].run(desk)
    out, err = desk.run("accounts")
    assert not err and [line.split()[0] for line in out.splitlines()] == [
        "radius", "anthropic", "openai-codex", "google-gemini-cli", "openrouter"]
    rows = json.loads(desk.run("accounts", "--json")[0])
    assert [row["provider"] for row in rows] == [line.split()[0] for line in out.splitlines()]
    desk.run("logout", "anthropic")
    text = (desk.raw or b"").decode("utf-8")
    entries = json.loads(text)
    assert list(entries) == [*LOGIN_OTHERS, "openai-codex", "google-gemini-cli", "openrouter"]
    assert text == json.dumps(entries, indent=2, ensure_ascii=False)
    desk.run("logout", "zeta", status=2)
    for name in ("radius", "openai-codex", "google-gemini-cli", "openrouter"):
        desk.run("logout", name)
    assert json.loads(desk.raw or b"") == {name: entry for name, entry in LOGIN_OTHERS.items() if name != "radius"}


def test_log_in_accounts_without_a_file(desk: LoginDesk) -> None:
    os.remove(desk.path)
    desk.run("accounts")
    assert json.loads(desk.run("accounts", "--json")[0]) == []
    assert desk.raw is None


# --- What is typed ----------------------------------------------------------------------------------------------------

# What becomes of the address that the browser ended at when it is pasted, and whether the log-in succeeds.
LOGIN_PASTES: Dict[str, Tuple[Callable[[str], str], int]] = {
    "address": (lambda back: back, 0), "blanks around": (lambda back: f"  \t{back} ", 0),
    "after empty lines": (lambda back: f"\n \n{back}", 0),
    "code#state": (lambda back: "#".join(with_code(back)), 0), "code": (lambda back: with_code(back)[0], 0),
    "query": (lambda back: back.partition("?")[2], 0), "question mark and query": (
        lambda back: "?" + back.partition("?")[2], 0),
    "no state": (lambda back: with_query(back, state=None), 0),
    "wrong state": (lambda back: with_query(back, state="0" * 32), 1),
    "code#wrong": (lambda back: with_code(back)[0] + "#" + "0" * 32, 1),
    "wrong query": (lambda back: with_query(back, state="0" * 32).partition("?")[2], 1),
    "refusal": (lambda back: with_query(back, code=None, error="access_denied"), 1),
    "no code": (lambda back: with_query(back, code=None), 1), "the wrong code": (lambda back: "code_invented", 1),
    "letters": (lambda back: "\u00e9\x01\x7f", 1), "long": (lambda back: "x" * 3000, 1),
}


def with_code(back: str) -> Tuple[str, str]:
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(back).query))
    return query["code"], query.get("state", "")


@pytest.fixture
def keyboard(desk: LoginDesk) -> Iterator[LoginKeyboard]:
    """Somebody at the terminal who opens the address elsewhere and pastes what comes of it."""
    desk.keyboard = LoginKeyboard()
    yield desk.keyboard
    desk.keyboard.hang_up()


@DIRECT
@POSIX
@pytest.mark.parametrize("name, paste", [*(("anthropic", paste) for paste in LOGIN_PASTES), *(
    ("openai-codex", paste) for paste in ("address", "code#state", "query", "code#wrong", "refusal"))])
def test_log_in_paste(desk: LoginDesk, keyboard: LoginKeyboard, name: str, paste: str) -> None:
    change, status = LOGIN_PASTES[paste]
    desk.types = lambda url: change(desk.world.click(url))
    provider = LOGIN_CASES[name].provider
    desk.run("login", provider, "--yes", "--no-browser", status=status)
    assert desk.browser.urls == []
    if not status:
        desk.check_entry(provider)
    elif paste not in ("the wrong code", "letters", "long"):
        assert "token" not in desk.world.vendors[provider].steps


@DIRECT
@POSIX
@pytest.mark.parametrize("no_browser", [True, False])
@pytest.mark.parametrize("name", ["google-gemini-cli", "google-antigravity", "openrouter"])
def test_log_in_paste_at_others(desk: LoginDesk, keyboard: LoginKeyboard, name: str, no_browser: bool) -> None:
    desk.types = lambda url: desk.world.click(url)
    desk.browser.act = lambda browser, url: None
    desk.run("login", name, "--yes", *(["--no-browser"] if no_browser else []))
    desk.check_entry(name)
    assert len(desk.browser.urls) == (0 if no_browser else 1)


@POSIX
def test_log_in_paste_with_the_port_in_use(desk: LoginDesk, keyboard: LoginKeyboard) -> None:
    desk.types = lambda url: desk.world.click(url)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", LOGIN_PORTS["anthropic"]))
        other.listen()
        desk.run("login", "anthropic", "--yes", "--no-browser")
    desk.check_entry("anthropic")


@POSIX
def test_log_in_browser_before_the_paste(desk: LoginDesk, keyboard: LoginKeyboard) -> None:
    LOGIN_CASES["anthropic"].run(desk)          # an empty line is typed meanwhile
    desk.check_entry("anthropic")


# --- With a terminal --------------------------------------------------------------------------------------------------

# Imports the module once, then runs each command in a fork with a terminal of its own. An order is
# {"argv": [...], "environ": {...}, "pace": factor of waits}; the answers are the terminal and, at the end, the status.
LOGIN_FORKER = r"""
import json, os, pty, signal, socket, sys, time, traceback, webbrowser
import pigateway
link = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    order = json.loads(link.recv(1 << 20) or b"null")
    if order is None:
        break
    child, terminal = pty.fork()
    if not child:
        link.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(order["environ"])
        sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)
        sys.stderr = open(2, "w", buffering=1)
        webbrowser.open = lambda *_, **__: True
        if order["pace"] < 1:
            pigateway.Terminal.wait = lambda *given: time.sleep(given[-1] * order["pace"])
        status = 99
        try:
            status = pigateway.main(order["argv"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    socket.send_fds(link, [b"t"], [terminal])
    os.close(terminal)
    link.sendall(json.dumps(os.waitpid(child, 0)[1]).encode())
"""


class LoginForker:
    """The process that the forks come from."""

    def __init__(self) -> None:
        self.link, other = socket.socketpair()
        self.link.settimeout(20)
        with other:
            self.process = subprocess.Popen([sys.executable, "-c", LOGIN_FORKER, str(other.fileno())], cwd=HERE,
                                            pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)

    def close(self) -> None:
        self.link.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def forker() -> Iterator[LoginForker]:
    pytest.importorskip("pty", reason="needs pseudo-terminals")
    made = LoginForker()
    yield made
    made.close()


class LoginTerminal:
    """A command in a terminal, and the user who reads and types. For `with`, which ends the command in any case."""

    def __init__(self, forker: LoginForker, desk: LoginDesk, *argv: str, pace: float = 0.001) -> None:
        order = {"argv": argv, "environ": {**os.environ, **desk.environ}, "pace": pace}
        forker.link.sendall(json.dumps(order).encode())
        self.desk, self.link, self.text, self.place = desk, forker.link, "", 0
        self.before = desk.raw
        _, (self.terminal,), _, _ = socket.recv_fds(self.link, 1, 1)
        self.status: Optional[int] = None

    def __enter__(self) -> LoginTerminal:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.status is None:
            self.close()

    def expect(self, pattern: str) -> str:
        """Reads until the pattern has come, behind what was expected before; what it matched."""
        deadline = time.monotonic() + 10
        while True:
            match = re.compile(pattern).search(self.text, self.place)
            if match:
                self.place = match.end()
                return match.group(0)
            assert self.read(deadline), f"no {pattern!r} in {self.text!r}"

    def read(self, deadline: float) -> bool:
        """Takes what has come; False when the other side is closed or nothing comes."""
        if not select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:                         # how Linux says that the last one has closed it
            return False
        self.text += data.decode("utf-8").replace("\r\n", "\n")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def paste(self) -> None:
        """Opens the address that is shown in a browser elsewhere, and brings back what comes of it."""
        url = self.expect(r"https://\S+(?=\n)")
        self.expect("> ")
        self.type(self.desk.world.click(url) + "\n")

    def close(self) -> None:
        os.close(self.terminal)
        ended = json.loads(self.link.recv(100))
        self.status = os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else -os.WTERMSIG(ended)

    def end(self, status: int, left: Tuple[str, ...] = ("auth.json",)) -> str:
        """Reads to the end, which has to come with that status and leave these files; all that was shown."""
        deadline = time.monotonic() + 10
        while self.read(deadline):
            pass
        self.close()
        assert self.status == status, (self.status, self.text)
        assert "Traceback" not in self.text and "Error" not in self.text, self.text
        assert sorted(os.listdir(self.desk.folder)) == sorted(left)
        if status:
            assert self.desk.raw == self.before
        return self.text


def test_log_in_terminal_paste(desk: LoginDesk, forker: LoginForker) -> None:
    with LoginTerminal(forker, desk, "login", "openrouter") as terminal:
        desk.began = time.time()
        terminal.paste()
        terminal.end(0)
    desk.check_entry("openrouter")
    assert desk.world.faults == []


def test_log_in_terminal_callback_while_it_waits_for_a_paste(desk: LoginDesk, forker: LoginForker) -> None:
    with LoginTerminal(forker, desk, "login", "anthropic", "--yes") as terminal:
        desk.began = time.time()
        url = terminal.expect(r"https://\S+(?=\n)")
        terminal.expect("> ")
        terminal.type("half of an addr")
        click_allow(desk.browser, url)
        terminal.end(0)
    desk.check_entry("anthropic")


def test_log_in_terminal_paste_of_another_log_in(desk: LoginDesk, forker: LoginForker) -> None:
    with LoginTerminal(forker, desk, "login", "anthropic", "--yes", "--no-browser") as terminal:
        url = terminal.expect(r"https://\S+(?=\n)")
        terminal.type(with_query(desk.world.click(url), state="0" * 32) + "\n")
        terminal.end(1)
    assert steps_of(desk, "anthropic") == []


def test_log_in_terminal_device(desk: LoginDesk, forker: LoginForker) -> None:
    with LoginTerminal(forker, desk, "login", "xai") as terminal:
        desk.began = time.time()
        terminal.expect(re.escape(desk.world.vendors["xai"].user_code))
        terminal.end(0)
    desk.check_entry("xai")


@pytest.mark.parametrize("provider, answer", [*((provider, "n\n") for provider in LOGIN_RESTRICTED), *(
    ("anthropic", answer) for answer in ("\n", "maybe\n", "\x04"))])
def test_log_in_terminal_no_to_the_question(desk: LoginDesk, forker: LoginForker, provider: str, answer: str) -> None:
    with LoginTerminal(forker, desk, "login", provider) as terminal:
        terminal.expect(r"\?.*$")
        terminal.type(answer)
        text = terminal.end(1)
    assert "https://" not in text and desk.world.asked == []
    assert len(text.partition("?")[0].splitlines()) == 3, "two lines and the question"


@pytest.mark.parametrize("answer", ["y\n", "YES\n"])
def test_log_in_terminal_yes_to_the_question(desk: LoginDesk, forker: LoginForker, answer: str) -> None:
    with LoginTerminal(forker, desk, "login", "anthropic") as terminal:
        desk.began = time.time()
        terminal.expect(r"\?.*$")
        terminal.type(answer)
        terminal.paste()
        terminal.end(0)
    desk.check_entry("anthropic")


@pytest.mark.parametrize("answer, status", [("y\n", 0), ("n\n", 1)])
def test_log_in_terminal_over_a_key(desk: LoginDesk, forker: LoginForker, answer: str, status: int) -> None:
    desk.write({"xai": {"type": "api_key", "key": "sk-own-0123456789"}})
    with LoginTerminal(forker, desk, "login", "xai") as terminal:
        terminal.expect(r"\?.*$")
        terminal.type(answer)
        terminal.end(status)
    assert json.loads(desk.raw or b"")["xai"]["type"] == ("api_key" if status else "oauth")


def test_log_in_terminal_picker(desk: LoginDesk, forker: LoginForker) -> None:
    with LoginTerminal(forker, desk, "login") as terminal:
        number = terminal.expect(r"\d+(?=\s.*\bkimi-coding\n)")
        terminal.expect(r"\?.*$")
        for case in LOGIN_CASES.values():
            assert re.search(fr"\d+\s.*\b{case.provider}\n", terminal.text)
        desk.began = time.time()
        terminal.type(number + "\n")
        terminal.end(0)
    desk.check_entry("kimi-coding")


@pytest.mark.parametrize("answer, status", [("xai\n", 0), ("0\n", 2), ("99\n", 2), ("groq\n", 2), ("\x04", 1)])
def test_log_in_terminal_picker_answers(desk: LoginDesk, forker: LoginForker, answer: str, status: int) -> None:
    with LoginTerminal(forker, desk, "login") as terminal:
        terminal.expect(r"\?.*$")
        terminal.type(answer)
        terminal.end(status)


def hang(desk: LoginDesk, provider: str, step: str) -> Tuple[threading.Event, threading.Event]:
    """The vendor lets that step wait: (it has begun, it may end)."""
    reached, released = threading.Event(), threading.Event()

    def wait(ask: Ask) -> None:
        reached.set()
        released.wait(10)

    desk.world.instead[provider, step] = [wait]
    return reached, released


# Where the user gives up: the command, what is typed before, and what shows that it has come so far (a pattern, or a
# step of the vendor that hangs).
LOGIN_INTERRUPTIONS = {
    "picker": (("login",), r"\?.*$", ""), "question": (("login", "anthropic"), r"\?.*$", ""),
    "paste": (("login", "openrouter", "--no-browser"), "> $", ""), "browser": (("login", "openrouter"), "> $", ""),
    "device wait": (("login", "xai"), "WXYZ-2345[^>]*$", ""), "device code": (("login", "xai"), "", "device"),
    "device poll": (("login", "meta"), "", "poll"), "key": (("login", "meta"), "", "mint"),
    "exchange": (("login", "openrouter"), "", "key"),
    "copilot": (("login", "github-copilot", "--yes"), "", "models"),
}


@pytest.mark.parametrize("name", LOGIN_INTERRUPTIONS)
def test_log_in_terminal_interrupted(desk: LoginDesk, forker: LoginForker, name: str) -> None:
    argv, pattern, step = LOGIN_INTERRUPTIONS[name]
    reached, released = hang(desk, argv[1], step) if step else (None, None)
    with LoginTerminal(forker, desk, *argv, pace=1 if name == "device wait" else 0.001) as terminal:
        if step == "key":
            terminal.paste()
        if reached and released:
            assert reached.wait(10)
        else:
            terminal.expect(pattern)
        terminal.type("\x03")
        terminal.end(130)
        if released:
            released.set()


def test_log_in_terminal_interrupted_at_the_lock(desk: LoginDesk, forker: LoginForker) -> None:
    reached, released = hang(desk, "meta", "mint")
    with LoginTerminal(forker, desk, "login", "meta") as terminal:
        assert reached.wait(10)
        os.mkdir(lock_of(desk))
        before = os.stat(lock_of(desk)).st_mtime_ns
        released.set()
        until(lambda: desk.world.vendors["meta"].access)
        time.sleep(0.1)
        terminal.type("\x03")
        terminal.end(130, ("auth.json", "auth.json.lock"))
    assert os.stat(lock_of(desk)).st_mtime_ns == before, "it is the lock of somebody else"


# What BROWSER names in the test below.
LOGIN_CLICKER = r"""
import re, sys, urllib.parse, urllib.request
page = urllib.request.urlopen(sys.argv[1]).read().decode()
link = re.search('id="allow" href="([^"]+)"', page).group(1).replace("&amp;", "&")
urllib.request.urlopen(urllib.parse.urljoin(sys.argv[1], link))
"""


@POSIX
def test_log_in_as_shipped(desk: LoginDesk, tmp_path: Any) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f"#!{sys.executable}\n{LOGIN_CLICKER}")
    browser.chmod(0o700)
    desk.began = time.time()
    done = subprocess.run([sys.executable, MODULE, "login", "openrouter"], timeout=20, stdin=subprocess.DEVNULL,
                          env={**os.environ, **desk.environ, "BROWSER": str(browser)}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    desk.check(done.stdout)
    desk.check_entry("openrouter")
    assert desk.world.faults == []


# --- Refresh ----------------------------------------------------------------------------------------------------------

# The step that a refresh is, by provider.
REFRESH_STEPS = {"anthropic": "token", "openai-codex": "token", "github-copilot": "copilot_token",
                 "google-gemini-cli": "token", "google-antigravity": "token", "xai": "token", "kimi-coding": "token",
                 "meta": "mint"}
REFRESH_AFTER = {"omega": {"type": "api_key", "key": "sk-omega-0123456789"}}


def keep_login(desk: LoginDesk, provider: str, lasts_s: float) -> None:
    """Puts a log-in into auth.json, among others, whose token lasts so much longer."""
    vendor = desk.world.vendors[provider]
    vendor.log_in()
    entry = {**vendor.stored(), "expires": int((time.time() + lasts_s) * 1000)}
    desk.write({**LOGIN_OTHERS, provider: entry, **REFRESH_AFTER})
    desk.began = time.time()


@contextlib.contextmanager
def login_gateway(desk: LoginDesk) -> Iterator[str]:
    """A gateway with the log-ins of the desk."""
    serve = pg.Server.serve_forever
    with pytest.MonkeyPatch.context() as patch:
        # a server that is stopped notices at its next look
        patch.setattr(pg.Server, "serve_forever", lambda server, *_: serve(server, 0.005))
        with running(desk.home, {name: value for name, value in desk.environ.items() if name != "HOME"}) as handle:
            yield handle.url


def refresh_steps(desk: LoginDesk, provider: str) -> List[str]:
    """What the vendor was asked, apart from the model list that a gateway asks for anyway."""
    return [step for step in desk.world.vendors[provider].steps if step != "models"]


def ask_model(url: str, provider: str, stream: bool = False) -> Result:
    body = {"model": f"{provider}/{LOGIN_APIS[provider].model}", "stream": stream,
            "messages": [{"role": "user", "content": "Please. scenario: text."}]}
    return call(url, "/v1/chat/completions", body)


def check_said(result: Result, stream: bool = False) -> None:
    assert result.status == 200, result.body
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in result.events[:-1]) if stream else (
        result.json["choices"][0]["message"]["content"])
    assert said == GRID_FACTS["text"].text


def check_renewed(desk: LoginDesk, provider: str) -> None:
    """The new log-in stands where the old one was, complete, and all others are as they were."""
    text = (desk.raw or b"").decode("utf-8")
    entries = json.loads(text)
    expected = {**LOGIN_OTHERS, provider: entries[provider], **REFRESH_AFTER}
    assert text == json.dumps(expected, indent=2, ensure_ascii=False)
    desk.world.vendors[provider].check_stored(entries[provider], desk.began)


def check_quiet(desk: LoginDesk, lines: LogLines, *results: Result) -> None:
    """No secret in the log, an answer or another file, no fault seen by a vendor, no lock left."""
    shown = "".join(pg.JsonFormatter().format(record) for record in lines.records)
    shown += "".join(f"{result.headers}{result.body!r}" for result in results)
    for name in set(os.listdir(desk.folder)) - {"auth.json"}:
        with open(os.path.join(desk.folder, name), encoding="utf-8") as file:
            shown += file.read()
    for secret in desk.world.secrets:
        assert secret not in shown
    assert desk.world.faults == []
    assert set(os.listdir(desk.folder)) <= {"auth.json", "pigateway-renewals.json"}


@pytest.mark.parametrize("provider", REFRESH_STEPS)
def test_refresh(desk: LoginDesk, lines: LogLines, provider: str) -> None:
    keep_login(desk, provider, -60)
    vendor, step = desk.world.vendors[provider], REFRESH_STEPS[provider]
    saved: List[bool] = []
    desk.world.on_api_call = lambda: saved.append(vendor.access.encode() in (desk.raw or b""))
    with login_gateway(desk) as url:
        results = [ask_model(url, provider) for _ in range(2)]
        # a token that rotates and is not kept is a log-in lost
        assert saved == [True, True] and desk.world.used_tokens == [vendor.access] * 2
        assert refresh_steps(desk, provider) == [step]
        check_renewed(desk, provider)
        vendor.live.clear()                     # the provider revokes it before its time
        results.append(ask_model(url, provider))
        assert refresh_steps(desk, provider) == [step, "refused", step], desk.world.asked
        check_renewed(desk, provider)
    for result in results:
        check_said(result)
    check_quiet(desk, lines, *results)


def test_good_tokens_are_not_refreshed(desk: LoginDesk, lines: LogLines) -> None:
    entries = dict(LOGIN_OTHERS)
    for provider in LOGIN_APIS:
        keep_login(desk, provider, 3600)
        entries[provider] = json.loads(desk.raw or b"")[provider]
    desk.write(entries)
    before = desk.raw
    with login_gateway(desk) as url:
        results = [ask_model(url, provider) for provider in LOGIN_APIS]
    for result in results:
        check_said(result)
    assert desk.raw == before and len(desk.world.used_tokens) == len(LOGIN_APIS)
    assert not any(REFRESH_STEPS.get(name) in vendor.steps for name, vendor in desk.world.vendors.items())
    check_quiet(desk, lines, *results)


@pytest.mark.parametrize("gateways", [1, 2])
@pytest.mark.parametrize("provider", ["anthropic", "github-copilot"])
def test_one_refresh_for_all_who_wait(desk: LoginDesk, lines: LogLines, provider: str, gateways: int) -> None:
    keep_login(desk, provider, -60)
    vendor = desk.world.vendors[provider]
    results: List[Result] = []
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(login_gateway(desk)) for _ in range(gateways)]
        threads = [threading.Thread(target=lambda url=url: results.append(ask_model(url, provider)), daemon=True)
                   for url in urls * (8 // gateways)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(results) == 8
    for result in results:
        check_said(result)
    assert refresh_steps(desk, provider) == [REFRESH_STEPS[provider]] and set(desk.world.used_tokens) == {vendor.access}
    check_renewed(desk, provider)
    check_quiet(desk, lines, *results)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("provider", ["anthropic", "openai-codex", "meta"])
def test_refused_token_is_renewed_and_tried_once(desk: LoginDesk, lines: LogLines, provider: str, stream: bool) -> None:
    keep_login(desk, provider, 3600)
    vendor, step = desk.world.vendors[provider], REFRESH_STEPS[provider]
    vendor.live.clear()
    with login_gateway(desk) as url:
        result = ask_model(url, provider, stream)
    check_said(result, stream)
    assert refresh_steps(desk, provider) == ["refused", step]
    check_renewed(desk, provider)
    check_quiet(desk, lines, result)


@pytest.mark.parametrize("provider", ["anthropic", "github-copilot", "openrouter"])
def test_token_that_is_refused_for_good(desk: LoginDesk, lines: LogLines, provider: str) -> None:
    keep_login(desk, provider, 3600)
    desk.world.refuses = True
    with login_gateway(desk) as url:
        results = [ask_model(url, provider) for _ in range(2)]
    for result in results:
        assert result.status in (401, 403, 502), result.body
    again = [REFRESH_STEPS[provider], "refused"] if provider in REFRESH_STEPS else []
    assert refresh_steps(desk, provider) == ["refused", *again, "refused"]      # and no more renewals for a while
    check_quiet(desk, lines, *results)


REFRESH_REFUSALS = {
    "invalid_grant": oauth_error("invalid_grant"), "401": json_answer(401, message="Unauthorized"),
    "reused": json_answer(401, error={"message": "Your refresh token has already been used.", "type":
                                      "invalid_request_error", "code": "refresh_token_reused"}),
    "echo": LOGIN_BAD_ANSWERS["echo"], "escapes": LOGIN_BAD_ANSWERS["escapes"]}


@pytest.mark.parametrize("provider", REFRESH_STEPS)
def test_refresh_token_that_is_void(desk: LoginDesk, lines: LogLines, provider: str) -> None:
    keep_login(desk, provider, -60)
    vendor, before = desk.world.vendors[provider], desk.raw
    vendor.refresh = "another"
    with login_gateway(desk) as url:
        results = [ask_model(url, provider) for _ in range(2)]
        assert refresh_steps(desk, provider) == [REFRESH_STEPS[provider]] and desk.raw == before
        for result in results:
            assert result.status == 401 and f"login {provider}" in result.json["error"]["message"]
        vendor.log_in()                         # the user does what the message says
        keep_login(desk, provider, 3600)
        results.append(ask_model(url, provider))
        check_said(results[-1])
    check_quiet(desk, lines, *results)


@pytest.mark.parametrize("kind", REFRESH_REFUSALS)
def test_refusals_of_a_refresh(desk: LoginDesk, lines: LogLines, kind: str) -> None:
    keep_login(desk, "openai-codex", -60)
    before = desk.raw
    desk.world.instead["openai-codex", "token"] = [REFRESH_REFUSALS[kind]]
    with login_gateway(desk) as url:
        result = ask_model(url, "openai-codex")
    assert result.status == 401 and "login openai-codex" in result.json["error"]["message"]
    assert desk.raw == before
    check_quiet(desk, lines, result)


@pytest.mark.parametrize("kind", ["503", "429", "no JSON", "other", "cut", "redirect", "echo 500"])
def test_refresh_that_fails_for_now(desk: LoginDesk, lines: LogLines, kind: str) -> None:
    """The vendor is down: that is no reason to log in again, and the log-in stays."""
    keep_login(desk, "anthropic", -60)
    before = desk.raw
    answer = LOGIN_BAD_ANSWERS[kind] if kind != "echo 500" else lambda ask: Answer(500, ask.body)
    desk.world.instead["anthropic", "token"] = [answer] * 9
    with login_gateway(desk) as url:
        result = ask_model(url, "anthropic")
    assert result.status >= 500 or result.status == 429
    assert desk.raw == before and "login anthropic" not in result.json["error"]["message"]
    check_quiet(desk, lines, result)


def test_scope_that_is_over_leaves_its_connection_to_the_next(tmp_path: Any) -> None:
    """As the discovery of models cancels all its scopes, also those that are answered."""
    over = pg.Scope()
    transport = pg.Transport(pg.Limits(1, 5, 5), proxies={})
    with fake_upstream(Answer(200, b"list"), Answer(200, [0.2, b"answer"])) as fake:
        response = transport.open(pg.Call("GET", fake.url + "/models", {}), over)
        assert response.read(100) == b"list"
        response.close()
        threading.Timer(0.05, over.cancel, [pg.UpstreamTimeout("no list in time")]).start()
        response = transport.open(pg.Call("POST", fake.url + "/v1/messages", {}, b"{}"), pg.Scope())
        assert response.read(100) == b"answer" and [got.method for got in fake.received] == ["GET", "POST"]
        assert fake.connections == 1


# --- What hostile requests showed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", " ", "\ud800", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("name", ["anth/m1", "chat/m1"])
@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_nothing_but_emptiness_is_the_client_s_fault(tmp_path: Any, path: str, name: str, content: Any) -> None:
    body = {"model": name, "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    with served(tmp_path, FINE if name == "chat/m1" else Answer(200, SIGNED_ANSWER_BYTES)) as (url, _):
        assert call(url, f"/v1/{path}", body).status in (200, 400)


def test_many_calls_of_one_id_take_no_longer_than_others() -> None:
    messages = [turn for _ in range(20_000) for turn in (
        pg.Message("assistant", (pg.ToolCall("c", "f"),)), pg.Message("tool", (pg.ToolResult("c"),)))]
    spent = time.thread_time()
    ids = [part.id for message in pg.unique_calls(messages) for part in message.parts if isinstance(part, pg.ToolCall)]
    assert len(set(ids)) == 20_000 and ids[:3] == ["c", "c_2", "c_3"] and time.thread_time() - spent < 5


HOSTS = [("localhost", 200), ("LOCALHOST:4000", 200), ("localhost.:1", 200), ("127.0.0.1", 200), ("[::1]:4000", 200),
         ("[localhost]", 403), ("[localhost", 403), ("localhost]", 403), ("[[localhost]]", 403), ("::1]", 403),
         ("localhost..", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("127.0.0.2", 403), ("", 403)]


@pytest.mark.parametrize("host, status", HOSTS)
def test_host_names_of_this_machine(tmp_path: Any, host: str, status: int) -> None:
    with running(tmp_path) as handle:
        assert call(handle.url, "/health", host=host).status == status


@pytest.mark.parametrize("origin, status", [("app://x", 200), ("app://x, https://evil.example", 403), ("file://", 200)])
def test_origins_come_alone(tmp_path: Any, origin: str, status: int) -> None:
    with running(tmp_path) as handle:
        assert call(handle.url, "/health", origin=origin).status == status


def test_log_hides_the_key_of_the_gateway_and_what_is_written_in_escapes(tmp_path: Any, lines: LogLines) -> None:
    key = 'own"key-of the gateway'
    with running(tmp_path, api_key=key) as handle:
        call(handle.url, "/v1/models/ghp%5F0123456789abcdefABCDEF", user_agent=f"x {key}", accept=key)
        lines.find(lambda record: True)
        until(lambda: lines.records)
        written = "".join(pg.JsonFormatter([key]).format(record) for record in lines.records)
    assert "own" not in written and "0123456789abcdef" not in written and pg.REDACTED in written


def test_byte_order_mark_ends_here(tmp_path: Any) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({**ASK, "model": "anth/m1", "max_tokens": 9}).encode()
    with served(tmp_path, Answer(200, SIGNED_ANSWER_BYTES)) as (url, fake):
        assert call(url, "/v1/messages", body).status == 200 and fake.received[0].body.startswith(b"{")


TRAILERS = [b"X: a\0b", b"no header", b" folded: x", b"X : y", b"X: a\nY: b"]


@pytest.mark.parametrize("trailer", TRAILERS)
def test_trailers_are_as_strict_as_headers(trailer: bytes) -> None:
    with pytest.raises(ValueError):
        pg.Dechunker().feed(b"1\r\na\r\n0\r\n" + trailer + b"\r\n\r\n")
    fine = pg.Dechunker()
    assert fine.feed(b"1\r\na\r\n0\r\nX-Sum: 1\r\n\r\nrest") == b"a" and fine.done and fine.rest == b"rest"


TARGETS = [
    ("GET http://localhost/health", 200), ("GET http://127.0.0.1:4000/health", 200), ("GET http://evil.example/health", 403),
    ("GET https://localhost/health", 400), ("GET ftp://localhost/health", 400), ("GET mailto:a@b", 400), ("GET ?x=1", 400),
    ("GET http:///health", 400), ("GET http://a@localhost/health", 400), ("GET health", 400), ("OPTIONS *", 204), ("GET *", 400)]


@pytest.mark.parametrize("start, status", TARGETS)
def test_request_targets(tmp_path: Any, start: str, status: int) -> None:
    with running(tmp_path) as handle, socket.create_connection((handle.host, handle.port), 5) as sock:
        sock.sendall(f"{start} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert sock.recv(4096).split(b" ")[1] == str(status).encode()


def test_line_ends_before_a_request_do_not_make_time(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "HEAD_TIMEOUT_S", 0.2)
    with running(tmp_path) as handle, socket.create_connection((handle.host, handle.port), 5) as sock:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 4:
                sock.sendall(b"\r\n")
                time.sleep(0.02)
        assert time.monotonic() - started < 2


def test_many_turns_of_gemini_take_no_longer_than_others() -> None:
    asked = gemini_request(*(user_turn("x") for _ in range(20_000)))
    spent = time.thread_time()
    body = GEMINI.body(asked, gemini_model("gemini-3-flash"))
    assert len(body["contents"]) == 1 and time.thread_time() - spent < 5


@pytest.mark.parametrize("schema", [{"properties": {"a": {"type": {"text": "x"}}}}, {"properties": {"a": {"type": [[]]}}},
                                    {"type": "object", "required": [[]]}, {"type": "object", "required": 5}, {"type": 5}])
def test_demo_model_survives_odd_schemas(schema: Any) -> None:
    json.dumps(pg.example_value(schema, schema))


def test_lock_of_our_own_number_is_from_before_the_container_began_again(tmp_path: Any) -> None:
    path = tmp_path / "gateway.pid"
    path.write_text(str(os.getpid()))
    lock = pg.PidFile(str(path))
    lock.claim()
    assert lock.owner() == os.getpid()
    lock.release()
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_stale_lock_has_one_heir(tmp_path: Any) -> None:
    path = str(tmp_path / "gateway.pid")
    for _ in range(5):
        with open(path, "w", encoding="ascii") as file:
            file.write("4194999")               # nobody
        children = []
        for _ in range(6):
            child = os.fork()
            if not child:
                try:
                    pg.is_gateway_process = lambda pid: pid != 4194999
                    pg.PidFile(path).claim()
                    os._exit(0)
                except pg.AlreadyRunning:
                    os._exit(3)
                finally:
                    os._exit(9)
            children.append(child)
        statuses = sorted(os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children)
        assert statuses == [0, 3, 3, 3, 3, 3], statuses


def test_connections_that_a_provider_has_closed_do_not_stay(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pg, "REAP_S", 0.02)
    with served(tmp_path, Answer(200, FINE.body)) as (url, fake):
        assert call(url, "/v1/chat/completions", ASK).status == 200
        transport = RUNNING[-1].gateway.transport
        until(lambda: transport._handler.pool._idle)
        fake.server.shutdown()
        fake.server.server_close()
        idle = next(iter(transport._handler.pool._idle.values()))[0]
        idle.idle_since -= pg.POOL_IDLE_S
        until(lambda: not transport._handler.pool._idle)
